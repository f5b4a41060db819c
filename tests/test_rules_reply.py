"""What requests get from an archive that brings rules along: index, Responder and kept layers, without a server."""

import gzip
import os
import re
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import build_tar

import http1
import linux
import rules
from archive import Layers, Library, Redirect, Resource, Ruled, open_archive
from generation import renew_dates
from plan import Memo, header_section, make_site
from reply import FullResponse, Responder

PAGES = {"index.html": b"home", "about.html": b"about", "dir/index.html": b"a directory", "dir/page": b"a page",
         "404.html": b"not found", "gone.html": b"gone", "app.js": b"let it = 'be'" * 50,
         "app.js.gz": gzip.compress(b"let it = 'be'" * 50, mtime=0)}


class Site:
    """An archive with rules, of which so many `notes` are made, before it those of `kept`, and what it answers."""

    def __init__(self, folder, redirects=None, headers=None, files=PAGES, notes=0, kept=(), scheme="http",
                 own_rules=True, **options):
        own = {name: text if isinstance(text, bytes) else text.encode()
               for name, text in (("_redirects", redirects), ("_headers", headers)) if text is not None}
        number = len([*folder.iterdir()])
        path = build_tar(folder / f"{number}.tar", {**files, **own})
        self.archive = open_archive(str(path), own_rules=own_rules, **options,
                                    place=lambda archive: setattr(archive, "address", number << 30))
        self.archives = [self.archive, *(site.archive for site in kept)]
        renew_dates(self.archive, Layers(self.archives[1:]), 1_700_000_000)
        if self.archive.own:
            rules.apply(self.archive)
        assert len(self.archive.rule_notes) == notes, self.archive.rule_notes
        self.scheme = scheme
        self.responder = self.by(scheme)

    def by(self, scheme):
        found = Layers(self.archives) if len(self.archives) > 1 else self.archive
        return Responder(found, b"no-cache", self.archive.rules, scheme, max(one.deepest_page for one in self.archives))

    def ask(self, target, method="GET", host="t", scheme=None, **headers):
        """The Reply, with its `fields` as a dict of names in lower case, and `content`."""
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        request = http1.parse_head(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode("latin-1"))
        responder = self.by(scheme) if scheme else self.responder
        reply = responder.reply(request)
        self.is_full = isinstance(reply, FullResponse)
        return responder.expand(reply) if self.is_full else reply

    def get(self, target, **more):
        """(status, Location or body)."""
        reply = self.ask(target, **more)
        return reply.status, self.head(reply).get("location") or self.body(reply)

    def head(self, reply):
        return {name.decode().lower(): value.decode("latin-1") for name, value in reply.fields}

    def body(self, reply):
        return b"".join(span if isinstance(span, bytes) else self.read(*span) for span in reply.body)

    def read(self, start, length):
        [archive] = [one for one in self.archives if one.address <= start < one.address + one.size]
        return os.pread(archive.fd, length, start - archive.address)

    def notes(self):
        return {note.line: note.reason for note in self.archive.rule_notes}


@pytest.fixture
def site(tmp_path):
    opened = []

    def make(*arguments, **options):
        opened.append(Site(tmp_path, *arguments, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.archive.close()


HOME, ABOUT, NOT_FOUND = (200, b"home"), (200, b"about"), (404, b"not found")


# --- redirects and rewrites

def test_a_line_redirects_serves_something_else_or_says_that_it_is_gone(site):
    made = site("/a /about.html\n/b /about.html 302\n/c /about.html 200\n/d /gone.html 410\n/e /gone.html 451\n"
                "/f /gone.html 404\n/g https://example.org/x 308")
    assert made.get("/a?q=1") == (301, "/about.html?q=1")
    assert made.get("/b") == (302, "/about.html")
    assert made.get("/c?q") == ABOUT
    assert [made.get(path) for path in ("/d", "/e", "/f")] == [(410, b"gone"), (451, b"gone"), (404, b"gone")]
    assert made.get("/g") == (308, "https://example.org/x")
    assert made.get("/h") == NOT_FOUND


def test_a_redirect_has_a_link_for_those_who_read_it(site):
    made = site('/a https://example.org/"<b>&c 303')
    text = made.body(made.ask("/a")).decode()
    assert text.startswith("<!DOCTYPE html>\n<title>303 See Other</title>")
    assert 'href="https://example.org/%22%3Cb%3E&amp;c"' in text


def test_the_first_line_that_matches_wins_exact_or_not(site):
    made = site("/a/b /1\n/a/:x /2\n/a/* /3\n/* /4")
    assert [made.get(path)[1] for path in ("/a/b", "/a/c", "/a/c/d", "/a/", "/x")] == ["/1", "/2", "/3", "/3", "/4"]


def test_what_exists_wins_over_all_lines(site):
    made = site("/* /index.html 200", clean_urls=True)
    assert made.get("/dir/page") == (200, b"a page")
    assert made.get("/dir/") == (200, b"a directory")
    assert made.get("/dir") == (301, "./dir/")
    assert made.get("/about") == ABOUT
    assert made.get("/dir//page") == (301, "/dir/page"), "the path without repeated slashes exists"
    assert made.get("/any/thing/else") == HOME


def test_unless_the_status_has_an_exclamation_mark(site):
    made = site("/about.html /new 302!\n/dir/* /index.html 200!\n/app.js /gone.html 410!\n/index.html /about.html 200!")
    assert made.get("/about.html") == (302, "/new")
    assert [made.get(path) for path in ("/dir/page", "/dir/", "/dir/x", "/dir")] == [HOME, HOME, HOME, (301, "./dir/")]
    assert made.get("/app.js") == (410, b"gone")
    assert made.get("/index.html") == ABOUT
    assert made.get("/") == HOME


def test_a_line_that_is_not_forced_keeps_later_ones_from_what_exists(site):
    """The first line that matches wins, and what exists wins over that."""
    made = site("/dir/* /about.html 200\n/* https://example.org/:splat 301!")
    assert made.get("/dir/page") == (200, b"a page")
    assert made.get("/dir/x") == ABOUT
    assert made.get("/about.html") == (301, "https://example.org/about.html")


def test_lines_that_never_apply_are_noted(site):
    made = site("/a/* /1\n/a/b /2\n/c /3\n/c /4 301!\n/about.html /5\n/dir /6\n/a/:x /7\nhttp://h/a/c /8\n"
                "http://h/d /9\n/d /10\nhttp://h/d /11\n/dir/ /12 302!", notes=7)
    notes = made.notes()
    assert list(notes) == [2, 4, 5, 6, 7, 8, 11]
    assert all(reason.startswith("it never applies: ") for reason in notes.values())
    assert "line 1 takes its path already" in notes[2]
    assert "line 9 takes its path" in notes[11]
    assert "'/about.html' is in the archive; to have the line count all the same, write 301!" in notes[5]


def test_one_pass(site):
    """Neither does a rewrite lead through other rules, nor does a redirect's target count before it is asked for."""
    made = site("/a /about.html 200\n/about.html /index.html 200!\n/b /a 200\n/c /a", notes=1)
    assert made.get("/a") == ABOUT
    assert made.get("/about.html") == HOME
    assert "there is no '/a' in the archive" in made.notes()[3]
    assert made.get("/b") == NOT_FOUND
    assert made.get("/c") == (301, "/a")


def test_a_rewrite_to_what_is_missing(site):
    made = site("/fixed /nowhere 200\n/x/* /dir/:splat 200\n/y/* /nowhere/:splat 404\n/z/* /nowhere.html 410", notes=2)
    assert list(made.notes()) == [1, 4]
    assert made.get("/x/page") == (200, b"a page")
    assert made.get("/x/") == (200, b"a directory")
    assert made.get("/x/nothing") == NOT_FOUND
    assert made.get("/y/z") == NOT_FOUND
    assert made.get("/fixed") == NOT_FOUND


def test_a_rewrite_finds_what_names_stand_for(site):
    made = site("/a /dir 200\n/b /ab%6fut.html?x#y 200\n/c/:n /:n.html 200\n/d /about 200", clean_urls=True)
    assert [made.get(path) for path in ("/a", "/b", "/c/about", "/c/%61bout", "/d")] == [
        (200, b"a directory"), ABOUT, ABOUT, ABOUT, ABOUT]


def test_a_redirect_to_the_very_url_that_was_asked_for_is_not_made(site):
    made = site("/* /:splat\n/about.html /about.html?x 302!\n", notes=1)
    assert made.get("/nowhere") == NOT_FOUND
    assert made.get("//nowhere") == (301, "/nowhere")
    made = site("/about.html /about.html?x 302!\n/* https://t/:splat 301!")
    assert made.get("/about.html") == (302, "/about.html?x")
    assert made.get("/about.html?x") == ABOUT
    assert made.get("/about.html", method="HEAD")[0] == 302
    assert not made.is_full, "or it would be remembered by its path"
    assert made.get("/dir/page", scheme="https", host="t:443") == (200, b"a page")
    assert made.get("/dir/page", scheme="https", host="u") == (301, "https://t/dir/page")
    assert made.get("/x", scheme="https") == NOT_FOUND


def test_a_request_cannot_choose_where_a_redirect_leads(site):
    made = site("/* /:splat")
    for target in ("//evil.example/", "///evil.example", "/%2F/evil.example/", "/%2f%2fevil.example",
                   "/\\\\evil.example"):
        status, where = made.get(target)
        assert status in (301, 404)
        if status == 301:
            assert urlsplit(urljoin("http://t/", where)).netloc == "t"


def test_percent_encodings_are_undone_once(site):
    made = site("/a%20b /c%20d\n/e%2520f /g")
    assert made.get("/a%20b") == (301, "/c%20d")
    assert made.get("/%61%20b") == (301, "/c%20d")
    assert made.get("/e%2520f") == (301, "/g")
    assert made.get("/e%20f") == NOT_FOUND


def test_lines_for_one_scheme_and_host(site):
    made = site("https://www.example.com/* https://example.com/:splat 301!\nhttp://example.com/a /plain 302\n"
                "/a /any\nhttp://example.com/about.html /never\nhttp://example.com/dir/page /forced!", notes=2)
    assert made.get("/about.html?q", scheme="https", host="WWW.example.com:443") == (301, "https://example.com/about.html?q")
    assert made.get("/about.html", scheme="https", host="example.com") == ABOUT
    assert made.get("/about.html", host="www.example.com") == ABOUT, "plain HTTP"
    assert made.get("/a", host="example.com") == (302, "/plain")
    assert made.get("/a", scheme="https", host="example.com") == (301, "/any")
    assert made.get("/x", scheme="https", host="www.example.com") == (301, "https://example.com/x")
    assert made.get("/x", host="www.example.com") == NOT_FOUND
    without_host = http1.parse_head(b"GET /a HTTP/1.0\r\n\r\n")
    assert dict(made.responder.reply(without_host).fields)[b"Location"] == b"/any"


def test_what_depends_on_the_host_is_remembered_for_that_host_alone(site):
    made = site("http://one/* https://example.org/:splat 302!", "http://two/dir/*\n X: two\n/about.html\n X: any")
    memo = Memo(Library([]), b"tarweb", 0)
    answers = make_site(memo, {b"": made.responder})

    def plan(host, path):
        return answers.answer(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

    for _ in range(5):
        assert [plan(host, path).status for path in ("/about.html", "/dir/page") for host in ("one", "two", "three")
                ] == [302, 200, 200, 302, 200, 200]
    assert len(answers.blocks) == 3
    made = site(None, "http://two/dir/*\n X: two\n/about.html\n X: any")
    answers = make_site(memo, {b"": made.responder})
    for host in ("two", "three"):
        assert made.head(made.ask("/dir/page", host=host)).get("x") == ("two" if host == "two" else None)
        assert [plan(host, path).status for path in ("/about.html", "/dir/page")] == [200, 200]
    assert plan("two", "/about.html") is plan("three", "/about.html")
    assert plan("two", "/dir/page") is not plan("three", "/dir/page")


def test_a_hit_goes_by_no_rule(site, monkeypatch):
    """Paths of files are in the index as Resources, whatever the rules, if these say the same for all requests."""
    made = site("/old /about.html\n/short /about.html 200\n/x/* /y/:splat\n/about.html /dir/page 200!",
                "/*\n X: y\n/dir/*\n Cache-Control: immutable")
    for path, found in made.archive._ruled.items():
        assert isinstance(found, Resource if path not in (b"/old", b"/dir") else Ruled | Redirect), path
    monkeypatch.setattr(rules.Pattern, "match", None)
    assert made.get("/short") == ABOUT
    assert made.is_full
    assert made.get("/about.html") == (200, b"a page")
    assert made.head(made.ask("/dir/page"))["cache-control"] == "immutable"


def test_blocks_that_are_equal_are_one_object_and_files_without_rules_as_they_were(site):
    files = {f"{i}.txt": b"%d" % i for i in range(100)}
    made = site("/a /b", "/1*\n X: y\n/12.txt\n X: z", files=files)
    sets = {id(found.blocks) for found in made.archive._ruled.values() if isinstance(found, Resource)}
    assert len(sets) == 3
    assert made.archive.find(b"/2.txt") is made.archive.stored(b"/2.txt")
    without = site(None, None, files=files)
    assert without.archive._ruled is without.archive._index
    assert without.archive.rules is None


def test_options_and_other_methods(site):
    made = site("/a /about.html\n/b /gone.html 410\n/app/* /index.html 200", "/*\n Access-Control-Allow-Origin: *")
    for path, status in (("/about.html", 204), ("/a", 204), ("/app/x", 204), ("/dir", 204), ("/b", 410), ("/x", 404),
                         ("*", 204)):
        reply = made.ask(path, "OPTIONS")
        assert reply.status == status
        assert (made.head(reply).get("access-control-allow-origin") == "*") == (path != "*")
    assert made.ask("/a", "POST").status == 405
    assert "access-control-allow-origin" not in made.head(made.ask("/a", "POST"))
    assert made.get("/app/x", method="HEAD") == (200, b"")


def test_a_rewrite_has_no_date_because_rules_may_change_while_dates_do_not(site):
    made = site("/short /about.html 200\n/app/* /index.html 200\n/app.js /index.html 200!")
    assert [made.ask(path).modified for path in ("/short", "/app/x", "/app.js")] == [0, 0, 0]
    assert made.ask("/about.html").modified
    date = http1.format_date(made.ask("/about.html").modified).decode()
    assert made.ask("/app.js", if_modified_since=date).status == 200
    etag = made.head(made.ask("/short"))["etag"]
    assert etag == made.head(made.ask("/about.html"))["etag"]
    for path in ("/short", "/about.html"):
        assert made.ask(path, if_none_match=etag).status == 304
    assert made.ask("/app/x", if_none_match=made.head(made.ask("/"))["etag"]).status == 304
    assert made.get("/app/x", range="bytes=1-2") == (206, b"om")


def test_rewrites_have_variants(site):
    made = site("/x/* /app.js 200\n/y /app.js 200\n/z /app.js 404")
    for path, status in (("/x/1", 200), ("/y", 200), ("/z", 404)):
        reply = made.ask(path, accept_encoding="gzip")
        assert (reply.status, made.head(reply)["content-encoding"], made.head(reply)["vary"]) == (
            status, "gzip", "Accept-Encoding")
        assert gzip.decompress(made.body(reply)) == PAGES["app.js"]
    assert made.ask("/x/1", accept_encoding="identity;q=0").status == 406


# --- header fields

SECURE = "/*\n X-Frame-Options: DENY\n Cache-Control: immutable\n Expires: 0\n Content-Type: text/odd\n Vary: Origin\n"


@pytest.mark.parametrize(("status", "target", "headers"), [
    (200, "/about.html", {}), (200, "/about.html", {"method": "HEAD"}), (206, "/about.html", {"range": "bytes=0-1"}),
    (304, "/about.html", {"if_none_match": "*"}), (200, "/rewritten/x", {}), (200, "/short", {}),
    (206, "/rewritten/x", {"range": "bytes=0-1"}),
])
def test_they_go_with_the_file_itself(site, status, target, headers):
    made = site("/rewritten/* /about.html 200\n/short /about.html 200", SECURE)
    reply = made.ask(target, **headers)
    head = made.head(reply)
    assert reply.status == status
    assert [head[name] for name in ("x-frame-options", "cache-control", "expires", "content-type", "vary")] == [
        "DENY", "immutable", "0", "text/odd", "Origin"]
    assert sum(name.lower() == b"cache-control" for name, _ in reply.fields) == 1
    assert made.head(made.ask("/app.js", accept_encoding="gzip"))["vary"] == "Accept-Encoding, Origin"


@pytest.mark.parametrize(("status", "target", "method"), [
    (204, "/about.html", "OPTIONS"), (301, "/dir", "GET"), (301, "/dir//page", "GET"), (302, "/moved", "GET"),
    (404, "/nowhere", "GET"), (404, "/nowhere", "HEAD"), (410, "/gone", "GET"),
])
def test_and_with_redirects_preflights_and_errors_but_none_is_made_immutable(site, status, target, method):
    made = site("/moved /about.html 302\n/gone /gone.html 410", SECURE + " ! Expires\n ! Cache-Control\n")
    reply = made.ask(target, method)
    head = made.head(reply)
    assert reply.status == status
    assert (head["x-frame-options"], head["vary"]) == ("DENY", "Origin")
    assert head.get("cache-control") == (None if status == 204 else "no-cache")
    assert head.get("content-type") in (None, "text/html", "text/html; charset=utf-8")
    assert "expires" not in head


def test_they_do_not_go_with_short_texts_of_the_servers_own(site):
    made = site(None, SECURE, files={"a.txt": b"a"})
    for status, target, headers in ((404, "/x", {}), (405, "/a.txt", {"method": "PUT"}),
                                    (412, "/a.txt", {"if_match": '"x"'}), (417, "/a.txt", {"expect": "x"}),
                                    (416, "/a.txt", {"range": "bytes=9-"}),
                                    (406, "/a.txt", {"accept_encoding": "identity;q=0"}),
                                    (501, "/a.txt", {"method": "BREW"})):
        reply = made.ask(target, **headers)
        assert reply.status == status
        assert "x-frame-options" not in made.head(reply)


def test_they_are_those_of_the_url_that_was_asked_for(site):
    made = site("/app/* /index.html 200\n/short /index.html 200\n/old/* /new/:splat",
                "/app/*\n X: app\n/index.html\n X: index\n/\n X: root\n/404.html\n X: page\n/old/*\n X: :splat\n"
                "/short\n X: short\n/nowhere\n X: nowhere")
    expected = {"/app/x": "app", "/index.html": "index", "/": "root", "/404.html": "page", "/old/a%20b": "a%20b",
                "/short": "short", "/nowhere": "nowhere", "/nothing": None, "/new/a": None}
    assert {path: made.head(made.ask(path)).get("x") for path in expected} == expected


def test_what_the_server_sets_by_itself_is_replaced_or_taken_away(site):
    made = site(None, "/about.html\n cache-control: public\n content-type: text/x\n ! X-Content-Type-Options\n"
                      "/dir/*\n ! Content-Type\n ! Cache-Control\n X-Content-Type-Options: other")
    reply = made.ask("/about.html")
    assert [(name, value) for name, value in reply.fields if name.islower()] == [
        (b"cache-control", b"public"), (b"content-type", b"text/x")]
    assert not {b"Cache-Control", b"Content-Type", b"X-Content-Type-Options"} & {name for name, _ in reply.fields}
    head = made.head(made.ask("/dir/page"))
    assert not {"content-type", "cache-control"} & set(head)
    assert head["x-content-type-options"] == "other"


def test_they_come_after_the_servers_own_as_written(site):
    made = site(None, "/*\n x-B: 2\n X-a: 1\n Set-Cookie: a=1\n Set-Cookie: b=2\n Cache-Control: x")
    assert made.ask("/about.html").fields[-5:] == (
        (b"x-B", b"2"), (b"X-a", b"1"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"), (b"Cache-Control", b"x"))
    assert made.ask("/about.html").fields[-6] == (b"Accept-Ranges", b"bytes")


def test_parts_of_a_file_have_its_type_and_the_message_stays_multipart(site):
    for headers, kind in (("/*\n Content-Type: text/odd\n X: y", b"text/odd"), ("/*\n ! Content-Type\n X: y", None)):
        made = site(None, headers)
        reply = made.ask("/app.js", range="bytes=0-1,500-501")
        head, text = made.head(reply), made.body(reply)
        assert reply.status == 206
        assert head["content-type"].startswith("multipart/byteranges; boundary=")
        assert head["x"] == "y"
        assert int(head["content-length"]) == len(text)
        assert re.findall(rb"Content-Type: (.*)\r\n", text) == ([kind] * 2 if kind else [])


def test_blocks_for_one_scheme_and_host(site):
    made = site(None, "https://example.com/*\n X: https\nhttp://example.com/about.html\n X: http\n/*\n X: any")
    assert made.head(made.ask("/about.html", host="EXAMPLE.com:80"))["x"] == "http, any"
    assert made.head(made.ask("/about.html", host="example.com", scheme="https"))["x"] == "https, any"
    assert made.head(made.ask("/about.html", host="www.example.com"))["x"] == "any"
    assert made.head(made.ask("/nowhere", host="example.com", scheme="https"))["x"] == "https, any"


def test_strict_transport_security_of_the_servers_is_left_out_where_a_block_names_it(site):
    made = site(None, "/dir/*\n Strict-Transport-Security: max-age=1\n/about.html\n ! strict-transport-security")
    memo = Memo(Library([]), b"tarweb", 0, ((b"Strict-Transport-Security", b"max-age=5"),))
    assert [made.ask(path).bare for path in ("/dir/page", "/about.html", "/", "/dir/x")] == [True, True, False, True]
    for path, length in (("/dir/page", None), ("/about.html", None), ("/", 5)):
        reply = made.ask(path)
        head = memo.status_heads.get(reply.status, reply.bare)
        start = head[0] - linux.address_of(memo.status_heads.memory)
        assert (b"max-age=5" in memo.status_heads.memory[start:start + head[1]]) == bool(length)


# --- beside them

def test_neither_file_is_served_unless_it_is_to_be_a_file_like_any_other(site):
    files = {**PAGES, "_redirects.gz": b"packed", "_headers.br": b"packed", "dir/_headers": b"not in the root"}
    made = site("/a /b", "/*\n X: y", files=files)
    for path in ("/_redirects", "/_headers", "/_redirects.gz", "/_headers.br"):
        assert made.get(path) == NOT_FOUND
    assert made.get("/dir/_headers") == (200, b"not in the root")
    made = site("/a /b", "/*\n X: y", files=files, own_rules=False)
    assert made.get("/_redirects") == (200, b"/a /b")
    assert made.get("/_headers")[0] == 200
    assert made.get("/a") == NOT_FOUND
    assert "x" not in made.head(made.ask("/"))


def test_below_a_prefix_the_root_is_there(site):
    files = {f"public/{name}": content for name, content in PAGES.items()}
    made = site(files={**files, "public/_redirects": b"/a /b"}, prefix="public/")
    assert made.get("/a") == (301, "/b")


def test_a_file_that_is_too_large_is_noted_and_not_used(site):
    line = b"/a /about.html\n"
    made = site(line + b"#" * (256 * 1024 - len(line)))
    assert made.get("/a") == (301, "/about.html")
    made = site(line + b"#" * (256 * 1024 - len(line) + 1), notes=1)
    assert made.get("/a") == NOT_FOUND
    assert made.archive.notes == ["_redirects: it is not used, because it is larger than 256 KiB"]
    assert made.get("/_redirects") == NOT_FOUND


def test_notes_at_the_start_name_file_line_and_reason_and_are_not_many(site):
    made = site("bad\n" * 15, "X: y\n/*\nnothing", notes=18)
    assert made.archive.notes[0] == "_redirects, line 1: this is not FROM TO STATUS: 'bad'"
    assert made.archive.notes[10:] == [
        "_redirects: 5 more lines are not used",
        "_headers, line 1: in front of the first field there has to be a path, which begins with '/'",
        "_headers, line 2: no field follows that could be sent",
        "_headers, line 3: this is neither a path nor 'Name: value' nor '! Name': 'nothing'"]


def test_the_nearest_404_page_upwards(site):
    files = {"404.html": b"root", "docs/404.html": b"docs", "docs/deep/er/404.html": b"deeper", "docs/index.html": b"i",
             "other/404.html/index.html": b"a directory of that name"}
    made = site(files=files)
    expected = {"/x": b"root", "/docs/x": b"docs", "/docs/": b"i", "/docs/deep/": b"docs", "/docs/deep/x": b"docs",
                "/docs/deep/er/": b"deeper", "/docs/deep/er/x/y/z": b"deeper", "/docsx": b"root", "/other/x": b"root",
                "/docs//deep/er/x": b"docs", "/" + "x/" * 3000: b"root", "/docs" + "/x" * 3000: b"docs"}
    assert {path: made.get(path)[1] for path in expected} == expected
    assert made.get("/docs/x", method="HEAD") == (404, b"")
    made = site(files={"docs/404.html": b"docs"})
    assert made.get("/docs/x") == (404, b"docs")
    assert made.get("/x") == (404, b"404 Not Found\n")


def test_clean_urls(site):
    files = {"about.html": b"about", "both": b"a file", "both.html": b"another", "dir.html": b"beside a directory",
             "dir/index.html": b"index", "bare.html": b"bare", "bare/x": b"x", "a.html.html": b"twice",
             "sub/p.html": b"p", "sub/.html": b"no name"}
    made = site(files=files, clean_urls=True, dotfiles=True)
    expected = {"/about": b"about", "/about.html": b"about", "/both": b"a file", "/both.html": b"another",
                "/dir": "./dir/", "/dir/": b"index", "/bare": b"bare", "/bare/x": b"x", "/a.html": b"twice",
                "/a": b"404 Not Found\n", "/sub/p": b"p", "/sub/": b"404 Not Found\n", "/about/": b"404 Not Found\n"}
    assert {path: made.get(path)[1] for path in expected} == expected
    assert site(files=files).get("/about")[0] == 404, "off by default"


def test_clean_urls_count_for_rules(site):
    made = site("/about /x\n/gone /y 301!", "/about\n X: y", clean_urls=True, notes=1)
    assert made.get("/about") == ABOUT
    assert made.head(made.ask("/about"))["x"] == "y"
    assert "x" not in made.head(made.ask("/about.html"))
    assert made.get("/gone") == (301, "/y")


# --- kept layers

def test_the_rules_of_the_newest_archive_count_for_what_is_kept(site):
    old = site("/was /index.html 200\n/about.html /dir/page 200!\n/* /about.html 200", "/*\n X: old\n/kept.js\n Y: old",
               files={**PAGES, "kept.js": b"old", "force/x": b"old", "moved": b"old", "both": b"old"})
    made = site("/moved /new\n/force/* /about.html 200!\n/* /index.html 200", "/*\n X: new",
                files={**PAGES, "both": b"new"}, kept=[old])
    assert made.get("/kept.js") == (200, b"old"), "the file goes before a pattern"
    assert made.head(made.ask("/kept.js"))["x"] == "new"
    assert "y" not in made.head(made.ask("/kept.js"))
    assert made.get("/both")[0] == 200
    assert made.get("/moved") == (301, "/new"), "a line of its own for a path goes before an old file"
    assert made.get("/was") == HOME, "the old rule is gone"
    assert made.get("/force/x") == ABOUT
    assert made.get("/about.html") == ABOUT
    without = site(files={"index.html": b"home"}, kept=[old])
    assert without.get("/about.html") == ABOUT
    assert without.get("/_headers")[0] == 404
    assert "x" not in without.head(without.ask("/kept.js"))


def test_kept_files_by_host(site):
    old = site(files={**PAGES, "kept.js": b"old"})
    made = site("http://one/* https://example.org/:splat 301!", "http://two/*\n X: y", kept=[old])
    assert made.get("/kept.js", host="one") == (301, "https://example.org/kept.js")
    assert made.head(made.ask("/kept.js", host="two"))["x"] == "y"
    assert "x" not in made.head(made.ask("/kept.js", host="three"))


def test_dates_are_renewed_whatever_rules_there_are(site):
    """Two archives with all dates alike: what is another file at a path has the reload's date."""
    old = site("/a /b", "/*\n X: 1")
    made = site("http://one/* https://example.org/:splat 301!", "/*\n X: 2",
                files={**PAGES, "about.html": b"ABOUT"}, kept=[old])
    assert made.ask("/about.html").modified == 1_700_000_000
    assert made.ask("/dir/page").modified == old.ask("/dir/page").modified


def test_other_rules_make_another_archive(site):
    digests = {site(redirects, headers).archive.digest
               for redirects in (None, "/a /b", "/a /c") for headers in (None, "/*\n X: y", "/*\n X: z")}
    assert len(digests) == 9
    assert site("/a /b").archive.digest == site("/a /b").archive.digest
    assert site("/a /b", etags=False).archive.digest != site("/a /c", etags=False).archive.digest


# --- whatever rules and requests

SEGMENTS = st.sampled_from(["", "a", "b", "about.html", "dir", "page", "evil.example", "%2e%2e", "%2F", "%5C",
                            "%0D%0A", "%C3%A9", "@evil.example", "http:", "https:", ":x", ":splat", "*", ":x-:y",
                            "\\evil", ";", "="])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
FROM = st.one_of(PATHS, *map(st.just, ("/*", "/:x", "/:x/*", "/a*", "/a/:x", "/about.html", "/dir/*")))
TO = st.one_of(PATHS, *map(st.just, ("/:splat", "/:x", "/:x/:splat", "/b:splat", "/b?:splat", "/gone.html")))
ORIGINS = st.sampled_from(["", "", "", "http://one.example", "https://two.example:8443"])
TARGETS = st.tuples(ORIGINS, TO, st.sampled_from(["", "?q", "?x=:x&s=:splat", "#f", "#:splat"])).map("".join)
STATUSES = st.sampled_from(["", " 301", " 302!", " 308", " 200", " 200!", " 404", " 410!"])
RULES = st.lists(st.tuples(ORIGINS, FROM, st.just(" "), TARGETS, STATUSES).map("".join), max_size=4).map("\n".join)
FIELDS = st.sampled_from(["X: y", "X: :splat", "! X", "Cache-Control: immutable", "Content-Type: :x", "! Content-Type",
                          "Vary: Origin", "Location: http://evil.example/", "Content-Length: 5", "Set-Cookie: a=:splat",
                          "Transfer-Encoding: chunked", "Connection: close", "! ETag", "Link: </:x>"])
BLOCKS = st.lists(st.tuples(ORIGINS, FROM, st.lists(FIELDS, max_size=4)), max_size=4).map(
    lambda blocks: "\n".join("\n".join([origin + path, *lines]) for origin, path, lines in blocks))
ASKED = st.tuples(st.sampled_from(["", "", "/", "/a", "/a/"]), PATHS).map("".join)
REQUESTS = st.tuples(st.sampled_from(["GET", "HEAD", "OPTIONS"]), ASKED, st.sampled_from(["", "?q", "?//evil"]),
                     st.sampled_from(["one.example", "two.example:8443", "t"]), st.sampled_from(["http", "https"]),
                     st.sampled_from([{}, {"range": "bytes=0-1,4-"}, {"if_none_match": "*"}]))


@settings(deadline=None, max_examples=300)
@given(RULES, BLOCKS, st.lists(REQUESTS, min_size=1, max_size=8))
def test_nobody_is_led_to_a_host_that_no_rule_names_and_no_message_breaks(tmp_path_factory, redirects, headers,
                                                                          requests):
    made = Site(tmp_path_factory.mktemp("any"), redirects, headers, notes=Any())
    try:
        named = set(re.findall(r" (https?://[a-z.]+(?::\d+)?)", redirects))
        for method, path, query, host, scheme, more in requests:
            reply = made.ask(path + query, method, host, scheme, **more)
            check(made, named, reply, f"{scheme}://{host}{path}{query}", method)
    finally:
        made.archive.close()


class Any:
    """Equal to any number."""

    def __eq__(self, other):
        return True


def check(made, named, reply, url, method):
    section = header_section(reply)
    assert re.fullmatch(rb"(?:[!-9;-~]+: [^\x00-\x1f\x7f]+\r\n)+\r\n|\r\n", section), section
    names = [name.lower() for name, _ in reply.fields]
    for alone in (b"content-length", b"location", b"etag", b"content-encoding", b"vary", b"accept-ranges"):
        assert names.count(alone) <= 1
    assert not {b"transfer-encoding", b"connection", b"trailer"} & set(names)
    head, text = made.head(reply), made.body(reply)
    if reply.status in (204, 304) or method == "HEAD":
        assert text == b""
    else:
        assert int(head["content-length"]) == len(text)
    if 301 <= reply.status <= 308 and reply.status != 304:
        there, here = urlsplit(urljoin(url, head["location"])), urlsplit(url)
        assert re.fullmatch(r"https?://[^/\\]+/[^\\]*|/(?!/)[^\\]*|\./[^\\]*", head["location"]), head["location"]
        assert f"{there.scheme}://{there.netloc}" in named or there[:2] == here[:2]
        assert there.username is None
        asked = unquote_to_bytes(here.path), here.query
        assert (unquote_to_bytes(there.path), there.query) != asked or there[:2] != here[:2] or "//" in here.path \
            or "%2e" in here.path
    elif "location" in head:
        raise AssertionError("a Location without a redirect")
    assert reply.status < 400 or "immutable" not in head.get("cache-control", "")
