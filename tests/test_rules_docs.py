"""The examples of docs/SITES.md do what it says."""

import re

import pytest
from support import ROOT
from test_rules_reply import Site

TEXT = (ROOT / "docs/SITES.md").read_text()
NAMES = re.findall(r"`([^`]+)`", TEXT.partition("with these files: ")[2].partition(".\n")[0])
EXAMPLE = re.compile(r"((?:```_\w+\n[^`]*```\n\s*)?)\| request \| answer \|\n\|---\|---\|\n((?:\|.*\|\n)+)")
EXAMPLES = [(re.findall(r"```(_\w+)\n([^`]*)```", code), re.findall(r"^\| `(.*?)` \| (.*) \|$", rows, re.M))
            for code, rows in EXAMPLE.findall(TEXT)]


def answers(reply, site):
    """All that the page may say of a Reply."""
    head = site.head(reply)
    yield f"{reply.status} to `{head.get('location')}`"
    yield f"{reply.status} with `{site.body(reply).decode()}`"
    for name, value in reply.fields:
        yield f"`{name.decode()}: {value.decode()}`"
    if "x-frame-options" not in head:
        yield "no `X-Frame-Options`"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example(number, tmp_path):
    files, rows = EXAMPLES[number]
    own = dict(files)
    site = Site(tmp_path, own.get("_redirects"), own.get("_headers"), files={name: name.encode() for name in NAMES},
                clean_urls=True)
    for url, answer in rows:
        scheme, host, path = re.fullmatch(r"(?:(https?)://([^/]+))?(/.*)", url).groups()
        reply = site.ask(path, host=host or "t", scheme=scheme or "http")
        assert answer in answers(reply, site), url
    site.archive.close()


def test_there_are_examples_and_all_rows_are_looked_at():
    assert len(NAMES) == 7
    assert sum(len(rows) for _, rows in EXAMPLES) == TEXT.count("\n| `")
    assert sum(len(files) for files, _ in EXAMPLES) == TEXT.count("```_") == 5


def test_the_note_that_is_shown_is_one(tmp_path):
    site = Site(tmp_path, "/a /b\n\n/c /d 302 Country=at", files={"index.html": b""}, notes=1)
    assert f"site.tar: {site.archive.notes[0]}\n" in TEXT
    site.archive.close()
