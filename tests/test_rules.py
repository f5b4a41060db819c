"""What lines of _redirects and _headers mean, and what is said of those that cannot be used. No server, no archive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http1 import host_name, parse_head
from rules import (
    EXACT_MAX, FILLED_MAX, LINE_MAX, OF_FILES, PATTERNS_MAX, UNTOUCHED, make_dress, parse_headers, parse_pattern,
    parse_redirects,
)


def redirects(*lines):
    """The rules in these lines, none of which is refused."""
    found, notes = parse_redirects("\n".join(lines).encode())
    assert notes == []
    return found


def reasons(text, parse=parse_redirects):
    """{line: why it is not used}."""
    _, notes = parse(text if isinstance(text, bytes) else text.encode())
    assert all(str(note).isprintable() for note in notes)
    return {note.line: note.reason for note in notes}


def request(target="/", host="example.com"):
    return parse_head(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


def location(line, target, scheme="http", host="example.com"):
    """Where a line sends a request to; None where it does not match, or is not made."""
    [rule] = redirects(line)
    asked = request(target, host)
    values = rule.pattern.match(asked.path)
    return None if values is None else (rule.location(values, scheme.encode(), asked) or b"").decode() or None


# --- lines of _redirects

def test_a_line_is_from_to_and_perhaps_a_status():
    [one, two, three] = redirects("/a /b", "  /c\t/d \t 302!  ", "/e https://example.org/f 307")
    assert [(rule.line, rule.status, rule.force) for rule in (one, two, three)] == [
        (1, 301, False), (2, 302, True), (3, 307, False)]
    assert (three.origin, three.path) == (b"https://example.org", (b"/f",))


def test_comments_empty_lines_line_ends_and_a_byte_order_mark():
    text = b"\xef\xbb\xbf# comment\r\n\r\n  # another\n/a /b\r\n/c /d 302 # behind a rule\n\t\n/e /f#g"
    found, notes = parse_redirects(text)
    assert notes == []
    assert [(rule.line, rule.status) for rule in found] == [(4, 301), (5, 302), (7, 301)]
    assert found[2].fragment == (b"#g",)


@pytest.mark.parametrize("status", [200, 301, 302, 303, 307, 308, 404, 410, 451])
@pytest.mark.parametrize("mark", ["", "!"])
def test_each_status_that_there_is(status, mark):
    [rule] = redirects(f"/a /b {status}{mark}")
    assert (rule.status, rule.force) == (status, bool(mark))
    assert rule.is_redirect == (300 <= status < 400)


@pytest.mark.parametrize(("line", "word"), [
    ("/a", "FROM TO STATUS"), ("/a /b 301 more", "FROM TO STATUS"), ("/a /b 500", "status"), ("/a /b 30", "status"),
    ("/a /b 301!!", "status"), ("/a /b ³01", "status"), ("/a /b +30", "status"), ("a /b", "'a' is neither a path"),
    ("/a b", "'b' is neither a path"), ("/a //b", "'//b' is neither a path"), ("/a ftp://b/", "'ftp://b/'"),
    ("/a https://", "no host"), ("/a https:///b", "no host"), ("/a https://u:p@b/", "not a host"),
    ("/a https://b:port/", "not a host"), ("/:a https://:a/", "not a host"), ("/* https://a:splat", "not a host"),
    ("/a https://b\\c/", "not a host"), ("https://b:80/a /c", "not a host"), ("https://*.b/a /c", "not a host"),
    ("https://bücher.example/ /c", "not a host"), ("/a/*/b /c", "end only"), ("/a** /c", "end only"),
    ("/* /b/* /c", "status"), ("/:a:b /c", "between two placeholders"), ("/:a* /c", "between two placeholders"),
    ("/:a/:a /c", "':a' is the name of another"), ("/:splat /c", "':splat' is the name of another"),
    ("/a /:splat", "':splat' is what a '*'"), ("/%zz /b", "percent-encoding"), ("/a%00 /b", "percent-encoding"),
    ("/a /b%", "percent-encoding"), ("/a /%c 200", "percent-encoding"), ("/a /b?%", "percent-encoding"),
    ("/a/../b /c", "dot segments"), ("/a/%2e/b /c", "dot segments"), ("/a/. /c", "dot segments"),
    ("/a#b /c", "neither a path"), ("/\x01 /b", "control character"), ("/a https://b/ 200", "not passed on"),
    ("/a http://b/ 404!", "not passed on"), ("/a?b=c /d", "query parameters"), ("/a id=:id /b", "query parameters"),
    ("/a /b 302 Country=at", "conditions"), ("/a /b 302 Language=de", "conditions"),
    ("/a /b 200! role=admin", "conditions"), ("/a /b 302 Cookie=x", "conditions"),
    ("/" + "a" * LINE_MAX + " /b", "longer than 2000 bytes"),
])
def test_a_line_that_cannot_be_used_is_noted_and_the_others_count(line, word):
    found, notes = parse_redirects(f"/first /1\n{line}\n/last /2".encode())
    assert [rule.line for rule in found] == [1, 3]
    [note] = notes
    assert (note.file, note.line) == ("_redirects", 2)
    assert word in note.reason
    assert str(note) == f"_redirects, line 2: {note.reason}"
    assert str(note).isprintable()


# --- FROM

@pytest.mark.parametrize(("pattern", "matched", "not_matched"), [
    ("/a", ["/a"], ["/A", "/a/", "/", "/ab", "/a%2f"]),
    ("/a%20b", ["/a%20b"], ["/a%2520b"]),
    ("/%61", ["/a", "/%61"], ["/%2561"]),
    ("/é", ["/%C3%A9"], ["/e"]),
    ("/a%2Fb", ["/a/b", "/a%2fb"], ["/a"]),
    ("/a%3Ab%2A", ["/a:b*"], ["/acb"]),
    ("/a:8", ["/a:8"], ["/a8"]),
    ("/a/*", ["/a/", "/a/x/y", "/a/%0A", "/a//"], ["/a", "/ab"]),
    ("/a*", ["/a", "/a/x", "/ab"], ["/b", "/"]),
    ("/*", ["/", "/a", "//a"], []),
    ("/:a", ["/x", "/x-y.z", "/%0A"], ["/", "/x/", "/x/y"]),
    ("/:a/", ["/x/"], ["//", "/x"]),
    ("/:year-:month", ["/2024-05", "/2024-05-06"], ["/2024", "/-05", "/2024-", "/a/b-c"]),
    ("/:file.html", ["/a.html"], ["/.html", "/a.b.html", "/a.htmlx", "/a/b.html"]),
    ("/:a/:b_2/*", ["/x/y_2/", "/x/y/z"], ["/x/y", "/x//z"]),
    ("/a+(b)|c.*", ["/a+(b)|c.", "/a+(b)|c.d"], ["/a+(b)|cx", "/aab"]),
])
def test_which_paths_a_pattern_matches(pattern, matched, not_matched):
    made = parse_pattern(pattern.encode(), star_is_last=True)
    assert [target for target in matched if made.match(request(target).path) is None] == []
    assert [target for target in not_matched if made.match(request(target).path) is not None] == []


@pytest.mark.parametrize(("pattern", "target", "values"), [
    ("/a/*", "/a/x/y", {"splat": b"x/y"}), ("/a/*", "/a/", {"splat": b""}),
    ("/:year-:month/*", "/2024-05/x", {"year": b"2024", "month": b"05", "splat": b"x"}),
    ("/:a.:b", "/x.y.z", {"a": b"x", "b": b"y.z"}), ("/:a-b", "/x-b", {"a": b"x"}),
])
def test_what_placeholders_stand_for(pattern, target, values):
    assert parse_pattern(pattern.encode(), star_is_last=True).match(request(target).path) == values


@pytest.mark.parametrize(("pattern", "matched", "not_matched"), [
    ("/*.js", {"/a.js": {"splat": b"a"}, "/a/b.js": {"splat": b"a/b"}, "/.js": {"splat": b""}}, ["/a.css", "/a.js/"]),
    ("/a/*/b", {"/a/x/b": {"splat": b"x"}, "/a//b": {"splat": b""}, "/a/b/b/b": {"splat": b"b/b"}}, ["/a/b"]),
    ("/*/:name.css", {"/a/b/c.css": {"splat": b"a/b", "name": b"c"}}, ["/c.css", "/a/.css"]),
    ("/*-:name", {"/a-b-c": {"splat": b"a-b", "name": b"c"}}, ["/a-", "/ab"]),
])
def test_a_star_anywhere_in_a_pattern_of_headers(pattern, matched, not_matched):
    made = parse_pattern(pattern.encode(), star_is_last=False)
    assert {target: made.match(target.encode()) for target in matched} == matched
    assert [target for target in not_matched if made.match(target.encode()) is not None] == []


@pytest.mark.parametrize("pattern", ["/*a:b-c:d", "/*ab:c", "/:a-:b-:c-*", "/*/:a-:b.:c", "/*.:a/:b"])
@pytest.mark.parametrize("unit", [b"a", b"-", b"ab-c", b"/a-", b"a-b-c.", b"."])
def test_patterns_take_time_in_proportion(pattern, unit):
    """Each character is looked at a few times at most, whatever the path: with backtracking this would take hours, and
    the test's time would be over."""
    made = parse_pattern(pattern.encode(), star_is_last=False)
    for length in range(7000, 8000, 10):
        path = b"/" + unit * (length // len(unit))
        values = made.match(path)
        assert values is None or all(value in path for value in values.values())


def test_a_host_is_compared_without_case_and_port_and_with_the_scheme():
    [rule] = redirects("HTTPS://WWW.Example.com./A https://example.com/a")
    assert rule.pattern.is_for(b"https", host_name(b"www.EXAMPLE.com:8443"))
    assert rule.pattern.is_for(b"https", host_name(b"www.example.com."))
    assert not rule.pattern.is_for(b"http", b"www.example.com")
    assert not rule.pattern.is_for(b"https", b"example.com")
    assert rule.pattern.match(b"/A") == {}
    assert rule.pattern.match(b"/a") is None, "case matters in paths"
    [everywhere] = redirects("/a /b")
    assert everywhere.pattern.is_for(b"http", b"") and everywhere.pattern.is_for(b"https", b"x")
    [root] = redirects("http://[::1] /b")
    assert root.pattern.match(b"/") == {} and root.pattern.is_for(b"http", host_name(b"[::1]:80"))


# --- TO

@pytest.mark.parametrize(("line", "target", "expected"), [
    ("/a /b", "/a", "/b"),
    ("/a /b", "/a?q=1", "/b?q=1"),
    ("/a /b?c", "/a?q=1", "/b?c"),
    ("/a /b?", "/a?q=1", "/b?"),
    ("/a /b#c", "/a?q", "/b?q#c"),
    ("/a /b?c#d", "/a", "/b?c#d"),
    ("/a https://example.org", "/a?q", "https://example.org/?q"),
    ("/a HTTPS://Example.org:8443/b", "/a", "https://Example.org:8443/b"),
    ("/a/* /b/:splat", "/a/x/y", "/b/x/y"),
    ("/a/* /b/:splat", "/a/", "/b/"),
    ("/a/* /b/:splat", "/a/x%0D%0ASet-Cookie:%20y", "/b/x%0D%0ASet-Cookie:%20y"),
    ("/a/* /b/:splat", "/a/%3Fx%23y%25%5C", "/b/%3Fx%23y%25%5C"),
    ("/n/:year/:title /:title/:year#:year", "/n/2024/x%20y", "/x%20y/2024#2024"),
    ("/s/:q /search?q=:q", "/s/a%26b%3Dc", "/search?q=a%26b%3Dc"),
    ("/a /b:c/Talk:Main", "/a", "/b:c/Talk:Main"),
    ("/:a /x/:ab", "/y", "/x/:ab"),
    ("/a /b%2Fc%20d", "/a", "/b%2Fc%20d"),
    ("/a /é<\"\\", "/a", "/%C3%A9%3C%22%5C"),
    ("/* /:splat", "//evil.example/", "/evil.example/"),
    ("/* /:splat", "///evil.example/", "/evil.example/"),
    ("/x* /:splat", "/x/evil.example", "/evil.example"),
    ("/x/* /:splat", "/x/%5Cevil.example", "/%5Cevil.example"),
    ("/x/* /:splat", "/x/%09/evil.example", "/%09/evil.example"),
    ("/x/* https://example.org/:splat", "/x//evil.example", "https://example.org//evil.example"),
    ("/x/* https://example.org:splat", "/x/@evil.example", None),
])
def test_where_a_redirect_leads(line, target, expected):
    if expected is None:
        assert list(reasons(line)) == [1]
    else:
        assert location(line, target) == expected


@pytest.mark.parametrize(("line", "target", "scheme", "host"), [
    ("/* /:splat", "/a", "http", "t"), ("/a /a", "/a?q", "http", "t"), ("/a /%61#x", "/a", "http", "t"),
    ("/a%2Fb /a%2Fb", "/a/b", "http", "t"), ("/a /b/../a", "/a", "http", "t"),
    ("/* https://t/:splat 301!", "/a?b", "https", "T:443"), ("/* http://t:80/:splat", "/a", "http", "t."),
    ("/a /a?b", "/a?b", "http", "t"),
])
def test_a_redirect_to_the_very_url_that_was_asked_for_is_not_made(line, target, scheme, host):
    assert location(line, target, scheme, host) is None


@pytest.mark.parametrize(("line", "target", "scheme", "host"), [
    ("/* https://t/:splat 301!", "/a", "http", "t"), ("/* https://t/:splat 301!", "/a", "https", "www.t"),
    ("/* https://t/:splat 301!", "/a", "https", "t:8443"), ("/a /a?b", "/a", "http", "t"),
    ("/a /a?", "/a?b", "http", "t"),
])
def test_one_to_another_scheme_host_or_query_is_made(line, target, scheme, host):
    assert location(line, target, scheme, host) is not None


def test_what_is_put_in_for_placeholders_is_bounded():
    longest = "x" * 8000
    assert location("/a/* /:splat/b", "/a/" + longest) == f"/{longest}/b"
    assert location("/a/* /:splat" + "/:splat" * 100, "/a/" + longest) is None
    [block] = parse_headers(b"/*\n" + b"X: :splat\n" * 100)[0]
    [(_, value)] = make_dress([(block, {"splat": longest.encode()})]).fields
    assert 8000 < len(value) <= FILLED_MAX + 100


# --- bounds

def test_how_many_rules_there_may_be():
    exact, patterns = EXACT_MAX * ["/a /b"], PATTERNS_MAX * ["/a/* /b"]
    assert len(redirects(*exact, *patterns)) == EXACT_MAX + PATTERNS_MAX
    for over in ("/a /b", "/a/* /b"):
        found, [note] = parse_redirects("\n".join([*exact, *patterns, over, "/c /d"]).encode())
        assert len(found) == EXACT_MAX + PATTERNS_MAX
        assert note.line == EXACT_MAX + PATTERNS_MAX + 1
        assert "this line and all after it are not used" in note.reason
    found, [note] = parse_headers(b"/a/:b\nX: y\n" * (PATTERNS_MAX + 2))
    assert (len(found), note.line) == (PATTERNS_MAX, 2 * PATTERNS_MAX + 1)


def test_how_long_a_line_may_be():
    longest = "/a /" + "b" * (LINE_MAX - 4)
    assert len(redirects(longest)) == 1
    assert "longer" in reasons(longest + "b")[1]
    assert "longer" in reasons("/\nX: " + "y" * (LINE_MAX - 2), parse_headers)[2]


# --- _headers

def dress(text, path="/", notes=0):
    """The fields that a file with this text gives for a path, and the names that it replaces."""
    blocks, found = parse_headers(text if isinstance(text, bytes) else text.encode())
    assert len(found) == notes, found
    made = make_dress([(block, values) for block in blocks
                       if (values := block.pattern.match(path.encode())) is not None])
    return [(name.decode(), value.decode()) for name, value in made.fields], {name.decode() for name in made.names}


def test_a_pattern_and_its_fields_indented_or_not():
    fields, names = dress("# comment\n\n/*\r\n  X-One: 1\n# between\n\nX-Two:2\r\n\t x-three :  3", notes=1)
    assert fields == [("X-One", "1"), ("X-Two", "2")]
    assert names == {"x-one", "x-two"}


def test_all_blocks_that_match_apply_in_order_and_fields_are_joined():
    text = "/*\n A: 1\n B: 1\n/a\n b: 2\n B: 3\n/c\n A: no\n/:x\n A: 4"
    assert dress(text, "/a")[0] == [("A", "1, 4"), ("B", "1, 2, 3")]
    assert dress(text, "/d/e")[0] == [("A", "1"), ("B", "1")]


def test_cookies_are_not_joined():
    assert dress("/*\n Set-Cookie: a=1\n X: y\n set-cookie: b=2")[0] == [
        ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X", "y")]


def test_a_field_is_taken_away_and_can_be_given_again():
    assert dress("/*\n A: 1\n B: 1\n/a\n ! a\n! C", "/a") == ([("B", "1")], {"a", "b", "c"})
    assert dress("/*\n A: 1\n B: 1\n/a\n !A\n A: 2", "/a")[0] == [("B", "1"), ("A", "2")]


def test_names_and_values_go_out_as_written():
    assert dress("/\n x-ODD:  a  b: \"c\", é;d=1/* \n")[0] == [("x-ODD", 'a  b: "c", é;d=1/*')]


def test_placeholders_stand_in_values():
    text = "/:lang/*\nContent-Language: :lang\nLink: <https://x.example:8080/:splat>; rel=canonical\n X: :langs :other"
    assert dress(text, "/de/a b/c")[0] == [
        ("Content-Language", "de"), ("Link", "<https://x.example:8080/a%20b/c>; rel=canonical"), ("X", ":langs :other")]


def test_a_value_that_comes_out_empty_is_left_out():
    assert dress("/*\n X: :splat\n Y: a:splat")[0] == [("Y", "a")]


def test_what_is_put_in_begins_nothing_new():
    """No line, no directive of a policy, no member of a list."""
    fields, _ = dress("/*\n Content-Security-Policy: img-src /:splat", "/a; script-src *,\r\nX: y\0\xff\"'")
    assert fields == [("Content-Security-Policy",
                       "img-src /a%3B%20script-src%20%2A%2C%0D%0AX%3A%20y%00%C3%BF%22%27")]


@pytest.mark.parametrize("name", sorted(UNTOUCHED))
@pytest.mark.parametrize("line", ["{}: x", "! {}"])
def test_fields_that_are_the_servers_own_are_left_alone(name, line):
    line = line.format(name.decode().title())
    assert list(reasons(f"/*\n{line}\n X: y", parse_headers)) == [2]
    assert dress(f"/*\n{line}\n X: y", notes=1)[0] == [("X", "y")]


def test_what_is_not_to_be_touched_is_what_the_contract_names():
    listed = ("Accept-Ranges, Allow, Connection, Content-Length, Content-Encoding, Content-Range, Date, ETag, "
              "Keep-Alive, Last-Modified, Location, Repr-Digest, Server, TE, Trailer, Transfer-Encoding, Upgrade")
    assert {name.decode() for name in UNTOUCHED} == {*listed.lower().split(", "), "proxy-connection"}


def test_vary_is_added_to_and_never_taken_away():
    assert list(reasons("/*\n ! Vary\n X: y", parse_headers)) == [2]
    assert dress("/*\n Vary: Origin\n vary: X")[0] == [("Vary", "Origin, X")]
    [block] = parse_headers(b"/*\n Vary: Origin")[0]
    assert make_dress([(block, {})]).put_on([(b"Vary", b"Accept-Encoding"), (b"A", b"b")]) == (
        (b"A", b"b"), (b"Vary", b"Accept-Encoding, Origin"))


def test_a_password_is_refused_loudly():
    found = reasons("/secret/*\n  Basic-Auth: me:secret\n", parse_headers)
    assert found[2].startswith("BASIC-AUTH PROTECTS NOTHING HERE")
    assert "secret" not in found[2]


@pytest.mark.parametrize(("line", "word"), [
    ("X: a\x01b", "control character"), ("X: a\tb", "control character"), ("X: \x7f", "control character"),
    ("X: a\rY: b", "control character"), ("X : y", "neither a path"), ("X\xa0: y", "neither a path"),
    ("no field", "neither a path"),
    (": y", "neither a path"), ("!", "neither a path"), ("! X: y", "neither a path"), ("X:", "has no value"),
    ("X: \t", "has no value"), ("(x): y", "neither a path"),
])
def test_a_field_that_cannot_be_used_is_noted_and_the_others_count(line, word):
    fields, _ = dress(f"/*\nA: 1\n{line}\nB: 2", notes=1)
    assert fields == [("A", "1"), ("B", "2")]
    assert word in reasons(f"/*\nA: 1\n{line}\nB: 2", parse_headers)[3]


@pytest.mark.parametrize("pattern", ["/a/../b", "/**", "/*/*", "/:a:b", "/%zz", "/a?b", "https://h:1/",
                                     "/" + "a" * LINE_MAX])
def test_the_fields_of_a_pattern_that_cannot_be_used_go_with_no_other(pattern):
    text = f"/*\nA: 1\n{pattern}\nB: 2\nC: 3\n/*\nD: 4"
    assert list(reasons(text, parse_headers)) == [3]
    assert dress(text, notes=1)[0] == [("A", "1"), ("D", "4")]


def test_fields_without_a_pattern_and_patterns_without_fields_are_noted():
    assert list(reasons("X: y\n/a\n/b\nX: y", parse_headers)) == [1, 2]
    assert "no field follows" in reasons("/a\n/b\nX: y", parse_headers)[1]


def test_some_fields_of_a_block_go_with_the_file_alone():
    [block] = parse_headers(b"/*\nCache-Control: immutable\nExpires: 0\nContent-Type: a/b\nX: y")[0]
    others = make_dress([(block, {})]).of_others()
    assert others.fields == ((b"X", b"y"),)
    assert others.names == {b"x"}
    assert sorted(OF_FILES) == [b"cache-control", b"content-type", b"expires"]


# --- any bytes

LINES = st.sampled_from([b"/a", b"/*", b"/:x", b"https://h/", b" /b", b" 301!", b"\n", b"\r\n", b"X: y", b"! X",
                         b":splat", b"#", b"?", b"%41", b"%", b"\0", b"\xff", b" ", b"\t",
                         b"*"]) | st.binary(max_size=5)


@given(st.lists(LINES, max_size=30).map(b"".join))
def test_any_bytes_are_rules_or_notes(text):
    count = text.count(b"\n") + 1
    for parse in (parse_redirects, parse_headers):
        found, notes = parse(text)
        assert all(1 <= one.line <= count for one in (*found, *notes))
        assert all(str(note).isprintable() for note in notes)
        assert not {rule.line for rule in found} & {note.line for note in notes}
