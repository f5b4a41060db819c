"""A site's own rules: any bytes for _redirects and _headers, and a request for what they are about.

The oracle for what is worked out beforehand, in the index, is to look through all lines for each request.
"""

import functools
import re
import tempfile
from pathlib import Path
from unittest import mock

from http_targets import read_by_h11
from tar_targets import Serial
from test_rules_reply import Site

import archive as archive_module
import http1
import rules as rules_module
from http1 import HttpError
from reply import FullResponse, Responder

ORIGINS = re.compile(rb"(https?)://([^/?#\s]+)", re.IGNORECASE)
SPLIT = b"\n---\n"           # between _redirects, _headers and a request
WORDS = (SPLIT, b"/* /index.html 200", b"/:a/:b ", b" /:splat", b":splat", b" 301!", b" 200!", b" 410", b"http://t/",
         b"https://u/", b"//", b"%2f", b"%2e", b"/about.html", b"/dir/page", b"/dir/", b"?q=:a", b"#", b"*",
         b"X: :splat", b"! Content-Type", b"Cache-Control: immutable", b"Vary: Origin", b"Set-Cookie: a=:a",
         b"Content-Length: 1", b"Range: bytes=0-0,3-", b"If-None-Match: *", b"OPTIONS ", b"Host: u", b"\r\n", b"\\")


@functools.cache
def plain():
    """A site without rules, whose archive is the same each time."""
    with mock.patch.object(archive_module, "ThreadPoolExecutor", Serial):
        return Site(Path(tempfile.mkdtemp()))


class Ruled(Site):
    """That site with rules."""

    def __init__(self, own):
        base = plain().archive
        self.archive = archive_module.Archive(base.path, base.fd, base.size, base.address)
        self.archive._index = self.archive._ruled = dict(base._index)
        self.archive.own = own
        self.archives = [self.archive]
        rules_module.apply(self.archive)


def rules(data):
    redirects, headers, head = (*data.split(SPLIT, 2), b"", b"")[:3]
    check_notes(redirects, headers)
    site = Ruled({"_redirects": redirects, "_headers": headers})
    try:
        request = http1.parse_head(head + b"\r\n\r\n")
    except HttpError:
        return
    named = {b"%b://%b" % (scheme.lower(), host) for scheme, host in ORIGINS.findall(redirects)}
    for scheme in ("http", "https"):
        responder = Responder(site.archive, b"no-cache", site.archive.rules, scheme)
        made = responder.reply(request)
        assert made == responder.reply(request)
        made = responder.expand(made) if isinstance(made, FullResponse) else made
        slow = Responder(AllRuled(site.archive), b"no-cache", site.archive.rules, scheme).reply(request)
        assert made == slow, "the index says something else than the lines"
        check_message(site, request, made)
        check_location(made, named)


def check_notes(redirects, headers):
    for parse, text in ((rules_module.parse_redirects, redirects), (rules_module.parse_headers, headers)):
        found, notes = parse(text)
        assert all(str(note).isprintable() for note in notes)
        assert all(1 <= one.line <= text.count(b"\n") + 1 for one in (*found, *notes))


class AllRuled:
    """An archive in which nothing has been worked out beforehand."""

    def __init__(self, archive):
        self.stored, self.sha256 = archive.stored, archive.sha256

    def find(self, path):
        found = self.stored(path)
        return found and archive_module.Ruled(found, None)


def check_message(site, request, made):
    """Of what frames a message, rules change nothing."""
    assert all(rules_module.NAME.fullmatch(name) for name, _ in made.fields)
    assert not any(rules_module.CONTROL.search(value) for _, value in made.fields)
    names = [name.lower() for name, _ in made.fields]
    assert not {b"transfer-encoding", b"connection", b"trailer", b"server", b"date"} & set(names)
    for name in (b"content-length", b"etag", b"content-range", b"location", b"content-encoding", b"vary"):
        assert names.count(name) <= 1
    assert (b"location" in names) == (300 <= made.status < 400 and made.status != 304)
    assert made.status < 400 or b"cache-control" in names, "an error can be kept"
    body = site.body(made)
    assert read_by_h11(request, made._replace(body=(body,))) == body


def check_location(made, named):
    where = dict(made.fields).get(b"Location")
    if where is None:
        return
    assert re.fullmatch(rb"[!-~]+", where)
    assert not re.search(rb'["<>\\^`{|}]', where.partition(b"?")[0])      # a query goes along as it came
    found = re.match(rb"(https?://[^/?#]*)[/?#]", where)
    assert found[1] in named if found else re.match(rb"/(?!/)|\./", where)


def rules_seeds():
    get = b"GET %b HTTP/1.1\r\nHost: %b"
    redirects = (b"/a/* /:splat\n/old/:x/:y /:y?x=:x#:x 302!\nhttps://u/* https://t/:splat 301!\n/gone /gone.html 410\n"
                 b"/about.html /index.html 200!\n/x* https://example.org/:splat\n/* /index.html 200")
    headers = (b"/*\n X: :splat\n Vary: Origin\n/dir/*\n! Content-Type\n Cache-Control: immutable\n"
               b"https://u/:page.html\n Set-Cookie: a=:page\n Set-Cookie: b=c\n/about.html\nContent-Length: 5\n"
               b" Strict-Transport-Security: x")
    for path in (b"/a//evil.example", b"/a/a", b"/old/1/2?q", b"/gone", b"/about.html", b"/dir/page", b"/xy", b"/dir",
                 b"/app.js", b"/a/%0d%0ax", b"//dir/page"):
        for host in (b"t", b"u"):
            yield SPLIT.join((redirects, headers, get % (path, host)))
    yield SPLIT.join((b"/a /b 301", b"/*\nContent-Type: a/b", get % (b"/app.js", b"t") + b"\r\nRange: bytes=0-1,500-"))
    yield SPLIT.join((b"", headers, get % (b"/dir/page", b"t") + b"\r\nIf-None-Match: *"))
    yield SPLIT.join((b"/* /:splat/ 308!", b"", b"OPTIONS /about.html HTTP/1.1\r\nHost: t"))
    yield SPLIT.join((b"/:a-:b* /:b/:a\n", b"/*.html\n X: a, b\n", get % (b"/1-2-3", b"t")))
    yield SPLIT.join((b"bad\n/a\n/:a:b /c\n/a /b Country=x", b"X: y\n/**\nA: b", get % (b"/%61", b"t")))
    yield from (b"", SPLIT, SPLIT * 2)
