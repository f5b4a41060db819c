"""Conditional requests: RFC 9110 section 13, every validator alone and against each other."""

import pytest
from support import FILES, LAST_MODIFIED

EARLIER, LATER = "Sat, 12 Sep 2020 12:26:40 GMT", "Mon, 14 Sep 2020 12:26:40 GMT"

# Headers ({tag} is the file's own ETag) -> the status RFC 9110 13.2.2 asks for.
CASES = {
    "If-None-Match: the tag": ({"if_none_match": "{tag}"}, 304),
    "If-None-Match: weak": ({"if_none_match": "W/{tag}"}, 304),
    "If-None-Match: in a list": ({"if_none_match": '"x", {tag} , "y"'}, 304),
    "If-None-Match: a list without blanks": ({"if_none_match": '"x",W/{tag}'}, 304),
    "If-None-Match: a tag with a comma before it": ({"if_none_match": '"a,b", {tag}'}, 304),
    "If-None-Match: *": ({"if_none_match": "*"}, 304),
    "If-None-Match: * twice": ({"if_none_match": "*, ,*"}, 304),
    "If-None-Match: empty members": ({"if_none_match": ', "x",,{tag},'}, 304),
    "If-None-Match: another": ({"if_none_match": '"x"'}, 200),
    "If-None-Match: only a part of it": ({"if_none_match": '"x{tag}'}, 200),
    "If-Modified-Since: the same": ({"if_modified_since": LAST_MODIFIED}, 304),
    "If-Modified-Since: later": ({"if_modified_since": LATER}, 200),
    "If-Modified-Since: earlier": ({"if_modified_since": EARLIER}, 200),
    "If-Modified-Since: RFC 850": ({"if_modified_since": "Sunday, 13-Sep-20 12:26:40 GMT"}, 304),
    "If-Modified-Since: asctime": ({"if_modified_since": "Sun Sep 13 12:26:40 2020"}, 304),
    "If-Modified-Since: asctime, one digit": ({"if_modified_since": "Sat Oct  3 12:26:40 2020"}, 200),
    "If-Modified-Since: no date": ({"if_modified_since": "yesterday"}, 200),
    "If-Modified-Since: day 32": ({"if_modified_since": "Sun, 32 Sep 2020 12:26:40 GMT"}, 200),
    "If-None-Match wins over If-Modified-Since": ({"if_none_match": '"x"', "if_modified_since": LATER}, 200),
    "If-None-Match and an earlier date": ({"if_none_match": "{tag}", "if_modified_since": EARLIER}, 304),
    "If-Match: the tag": ({"if_match": "{tag}"}, 200),
    "If-Match: in a list": ({"if_match": '"x", {tag}'}, 200),
    "If-Match: *": ({"if_match": "*"}, 200),
    "If-Match: * twice": ({"if_match": ",*,*"}, 200),
    "If-Match: another": ({"if_match": '"x"'}, 412),
    "If-Match: weak": ({"if_match": "W/{tag}"}, 412),
    "If-Unmodified-Since: the same": ({"if_unmodified_since": LAST_MODIFIED}, 200),
    "If-Unmodified-Since: later": ({"if_unmodified_since": LATER}, 200),
    "If-Unmodified-Since: earlier": ({"if_unmodified_since": EARLIER}, 412),
    "If-Unmodified-Since: no date": ({"if_unmodified_since": "never"}, 200),
    "If-Match wins over If-Unmodified-Since": ({"if_match": "{tag}", "if_unmodified_since": EARLIER}, 200),
    "If-Match, then If-None-Match": ({"if_match": "{tag}", "if_none_match": "{tag}"}, 304),
    "If-Match fails before If-None-Match": ({"if_match": '"x"', "if_none_match": "{tag}"}, 412),
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("case", CASES)
def test_conditions(server, case, method):
    headers, status = CASES[case]
    tag = server.fetch("/next")["ETag"]
    with server.connect() as client:
        response = client.ask("/next", method, **{name: value.format(tag=tag) for name, value in headers.items()})
        assert response.status == status
        if method == "GET" and status == 200:
            assert response.body == FILES["next"]
        assert client.ask("/next").body == FILES["next"], "the connection is out of step"


def test_not_modified_repeats_what_a_cache_needs(server):
    full = server.fetch("/style.css", accept_encoding="br")
    brief = server.fetch("/style.css", accept_encoding="br", if_none_match=full["ETag"])
    assert (brief.status, brief.body) == (304, b"")
    for name in ("ETag", "Vary", "Cache-Control", "Content-Location", "Expires"):
        assert brief.get(name) == full.get(name), name
    assert "date" in brief.headers


def test_a_condition_is_about_the_chosen_variant(server):
    tag = server.fetch("/style.css", accept_encoding="gzip")["ETag"]
    assert server.fetch("/style.css", accept_encoding="gzip", if_none_match=tag).status == 304
    assert server.fetch("/style.css", accept_encoding="br", if_none_match=tag).status == 200
    assert server.fetch("/style.css", if_none_match=tag).status == 200


def test_conditions_do_not_change_other_answers(server):
    """RFC 9110 13.2.1: a condition counts only where the answer without it would be 2xx or 412."""
    assert server.fetch("/nowhere", if_none_match="*").status == 404
    assert server.fetch("/nowhere", if_match='"x"').status == 404
    assert server.fetch("/dir", if_none_match="*").status == 301
    assert server.fetch("/next", "POST", if_none_match="*", content_length=0).status == 405


def test_without_etags_dates_and_asterisks_still_count(start, site):
    server = start(site, "--etags=off")
    response = server.fetch("/next")
    assert response.get("ETag") is None
    assert response["Last-Modified"] == LAST_MODIFIED
    assert server.fetch("/next", if_modified_since=LAST_MODIFIED).status == 304
    assert server.fetch("/next", if_none_match="*").status == 304
    assert server.fetch("/next", if_none_match='"x"').status == 200
    assert server.fetch("/next", if_match="*").status == 200
    assert server.fetch("/next", if_match='"x"').status == 412
