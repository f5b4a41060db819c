"""The parser by itself: every rule of RFC 9112 in tables, with the bytes of each request cut in three ways."""

import itertools
import time
from types import SimpleNamespace

import pytest
from support import deliveries

import http1
from http1 import MAX_CHUNK_LINE, MAX_HEAD, MAX_LINE, Body, HttpError

# --- heads


def head(*lines, method=b"GET", target=b"/", version=b"HTTP/1.1", host=b"Host: t"):
    """A request head, with lines that may be as wrong as the case needs."""
    start = b"%b %b %b" % (method, target, version)
    return b"\r\n".join((start, *([host] if host is not None else []), *lines, b"", b""))


def read(pieces):
    """(Request, what comes after it) as a connection reads it from pieces; (None, all) where there is no end yet."""
    pending, scanned = b"", 0
    for i, piece in enumerate(pieces):
        pending = http1.skip_empty_lines(pending + piece)
        end = http1.find_head(pending, scanned)
        if end >= 0:
            return http1.parse_head(pending[:end]), pending[end:] + b"".join(pieces[i + 1:])
        scanned = len(pending)
    return None, pending


def each_way(raw):
    """(name, Request or status, rest) for each way in which the bytes can come."""
    for how, pieces in deliveries(raw):
        try:
            yield how, *read(pieces)
        except HttpError as error:
            yield how, error.status, None


def accepted(raw):
    """The Request that `raw` is, however it comes."""
    outcomes = list(each_way(raw))
    for (how, outcome, rest), (_, pieces) in zip(outcomes, deliveries(raw), strict=True):
        assert isinstance(outcome, http1.Request), (how, outcome)
        assert outcome == outcomes[0][1], how
        assert rest == b"".join(pieces)[len(raw):], how
    return outcomes[0][1]


def meaning(request):
    """What of a Request differs from a plain GET / of HTTP/1.1, as one flat dict."""
    plain = http1.parse_head(head())
    flat = {**request._asdict(), **request.fields._asdict()}
    return {name: value for name, value in flat.items()
            if name != "fields" and value != {**plain._asdict(), **plain.fields._asdict()}[name]}


CHUNKED = b"Transfer-Encoding: chunked"
FRAMED = {"has_body": True, "transfer_encoding": b"chunked"}
TOKEN_CHARACTERS = b"!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz"

ACCEPTED = {
    "the least": (head(), {}),
    "one empty line before": (b"\r\n" + head(), {}),
    "many empty lines before": (b"\r\n" * 50 + head(), {}),
    # the request line
    "HEAD": (head(method=b"HEAD"), {"method": b"HEAD"}),
    "a method of every token character": (head(method=TOKEN_CHARACTERS), {"method": TOKEN_CHARACTERS}),
    "a method in lower case is another method": (head(method=b"get"), {"method": b"get"}),
    "a path": (head(target=b"/a/b.c"), {"path": b"/a/b.c"}),
    "every character a path may have": (
        head(target=b"/-._~!$&'()*+,;=:@aZ09"), {"path": b"/-._~!$&'()*+,;=:@aZ09"}),
    "characters beyond RFC 3986 that clients send": (head(target=b'/"<>[]\\^`{|}'), {"path": b'/"<>[]\\^`{|}'}),
    "a query": (head(target=b"/a?b=c&d"), {"path": b"/a", "query": b"?b=c&d"}),
    "an empty query": (head(target=b"/?"), {"query": b"?"}),
    "a query is not decoded": (head(target=b"/a?%zz/../%00?"), {"path": b"/a", "query": b"?%zz/../%00?"}),
    "two slashes in front are a path, no authority": (head(target=b"//a/b"), {"path": b"//a/b"}),
    "percent-encoding": (head(target=b"/%41%c3%A9%20"), {"path": b"/A\xc3\xa9 "}),
    "dot segments": (head(target=b"/a/./b/../c"), {"path": b"/a/c"}),
    "encoded dot segments": (head(target=b"/a/%2e/b/%2E./c"), {"path": b"/a/c"}),
    "dots above the root": (head(target=b"/../../x"), {"path": b"/x"}),
    "an encoded slash is a slash": (head(target=b"/@scope%2Fname"), {"path": b"/@scope/name"}),
    "encoded slashes in a row stay": (head(target=b"/a%2f/b"), {"path": b"/a//b"}),
    "dot segments between encoded slashes": (head(target=b"/a%2F..%2F..%2Fb"), {"path": b"/b"}),
    "bytes over 127 in the path": (head(target=b"/gr\xc3\xbc\xff"), {"path": b"/gr\xc3\xbc\xff"}),
    "bytes over 127 in the query": (head(target=b"/a?\xc3\xbc\xff&%"), {"path": b"/a", "query": b"?%C3%BC%FF&%"}),
    "bytes over 127 among dot segments": (head(target=b"/\x80/../a/%2e\xff"), {"path": b"/a/.\xff"}),
    "bytes over 127 beside percent-encoding": (head(target=b"/%25\xc3%BC"), {"path": b"/%\xc3\xbc"}),
    "an encoded percent sign is decoded once": (head(target=b"/%252e%252e/a"), {"path": b"/%2e%2e/a"}),
    "an encoded question mark belongs to the path": (head(target=b"/a%3Fb"), {"path": b"/a?b"}),
    # RFC 9112 section 3.2.2: its host counts, whatever the field says
    "absolute-form": (head(target=b"http://example.org/a?b"), {"path": b"/a", "query": b"?b", "host": b"example.org"}),
    "absolute-form of https": (head(target=b"https://example.org/a"), {"path": b"/a", "host": b"example.org"}),
    "absolute-form in capitals": (head(target=b"HTTP://EXAMPLE.ORG/a"), {"path": b"/a", "host": b"EXAMPLE.ORG"}),
    "absolute-form without a path": (head(target=b"http://example.org"), {"host": b"example.org"}),
    "absolute-form with only a query": (head(target=b"http://example.org?q"), {"query": b"?q", "host": b"example.org"}),
    "absolute-form with a port": (head(target=b"http://t:8080/a"), {"path": b"/a", "host": b"t:8080"}),
    "absolute-form with an empty port": (head(target=b"http://t:/a"), {"path": b"/a", "host": b"t:"}),
    "absolute-form with IPv6": (head(target=b"http://[::1]:80/a"), {"path": b"/a", "host": b"[::1]:80"}),
    "absolute-form with IPvFuture": (head(target=b"http://[v1.x]/a"), {"path": b"/a", "host": b"[v1.x]"}),
    "absolute-form with bytes over 127": (
        head(target=b"http://\xc3\xbc/\xc3?\xbc"), {"path": b"/\xc3", "query": b"?%BC", "host": b"%C3%BC"}),
    "absolute-form with dot segments": (head(target=b"http://t/a/../%2e%2e/b"), {"path": b"/b"}),
    "absolute-form in a path": (head(target=b"/http://t/a"), {"path": b"/http://t/a"}),
    "asterisk-form": (head(method=b"OPTIONS", target=b"*"), {"method": b"OPTIONS", "path": b"*"}),
    "OPTIONS of a path": (head(method=b"OPTIONS", target=b"/a"), {"method": b"OPTIONS", "path": b"/a"}),
    "OPTIONS of a server in absolute-form": (                                   # RFC 9112 section 3.2.4
        head(method=b"OPTIONS", target=b"http://t"), {"method": b"OPTIONS", "path": b"*"}),
    "OPTIONS of a root in absolute-form": (
        head(method=b"OPTIONS", target=b"http://t/"), {"method": b"OPTIONS"}),
    "OPTIONS of a query in absolute-form": (
        head(method=b"OPTIONS", target=b"http://t?q"), {"method": b"OPTIONS", "query": b"?q"}),
    "authority-form": (head(method=b"CONNECT", target=b"t:443"), {"method": b"CONNECT", "path": b"*"}),
    "HTTP/1.2 is spoken as 1.1": (head(version=b"HTTP/1.2"), {}),
    "HTTP/1.9 is spoken as 1.1": (head(version=b"HTTP/1.9"), {}),
    "HTTP/1.0": (head(version=b"HTTP/1.0"), {"connection": b"close"}),
    "HTTP/1.0 without Host": (head(version=b"HTTP/1.0", host=None), {"connection": b"close", "host": None}),
    # fields
    "no blank after the colon": (head(host=b"Host:t"), {}),
    "blanks around a value": (head(host=b"Host: \t t\t \t"), {}),
    "names in any case": (head(b"cOnTeNt-LeNgTh: 5", host=b"hOST: t"), {"has_body": True, "content_length": 5}),
    "an empty value": (head(b"X-A:"), {}),
    "a value of blanks alone": (head(b"X-A: \t "), {}),
    "a tab in a value": (head(b"If-Match: a\tb"), {"if_match": b"a\tb", "conditional": True}),
    "blanks within a value": (head(b"If-Match: a  b"), {"if_match": b"a  b", "conditional": True}),
    "a colon in a value": (head(b"If-Match: a:b: c"), {"if_match": b"a:b: c", "conditional": True}),
    "every printable byte and obs-text in a value": (
        head(b"If-Match: " + bytes([*range(0x21, 0x7f), *range(0x80, 0x100)])),
        {"if_match": bytes([*range(0x21, 0x7f), *range(0x80, 0x100)]), "conditional": True}),
    "every token character in a name": (head(TOKEN_CHARACTERS + b": 1"), {}),
    "a name that only begins like another": (head(b"Hosts: u", b"X-Host: v", b"Content-Length-X: 5"), {}),
    "a line that looks like a field in a value": (head(b"X: Content-Length: 5"), {}),
    "all conditions": (
        head(b"If-Match: 1", b"If-None-Match: 2", b"If-Modified-Since: 3", b"If-Unmodified-Since: 4", b"If-Range: 5",
             b"Range: 6"),
        {"if_match": b"1", "if_none_match": b"2", "if_modified_since": b"3", "if_unmodified_since": b"4",
         "if_range": b"5", "range": b"6", "conditional": True}),
    "Range alone": (head(b"Range: bytes=0-"), {"range": b"bytes=0-", "conditional": True}),
    "a field given twice is a list": (
        head(b"If-Match: 1", b"X: y", b"If-Match: 2"), {"if_match": b"1, 2", "conditional": True}),
    **{f"Expect {values!r}": (head(*(b"Expect: " + value for value in values)), {"expect": b"100-continue"})
       for values in ([b"100-continue"], [b"100-Continue"], [b", 100-continue"], [b"100-continue, ,"],
                      [b"100-continue"] * 2, [b"100-continue,100-CONTINUE"], [b"", b"100-continue"])},
    **{f"Expect nothing {values!r}": (head(*(b"Expect: " + value for value in values)), {})
       for values in ([b""], [b","], [b" ,\t, "], [b"", b""])},
    "Expect something else": (head(b"Expect: 100-continue, a-miracle"), {"expect": b"100-continue, a-miracle"}),
    "Accept-Encoding": (head(b"Accept-Encoding: br"), {"codings": {"", "br"}}),
    "Accept-Encoding twice": (head(b"Accept-Encoding: br", b"Accept-Encoding: gzip;q=0, zstd"),
                              {"codings": {"", "br", "zstd"}}),
    # Connection
    "close": (head(b"Connection: close"), {"connection": b"close", "close": True}),
    "close in capitals": (head(b"Connection: CLOSE"), {"connection": b"close", "close": True}),
    "close in a list": (head(b"Connection: a ,\tclose,b"), {"connection": b"close", "close": True}),
    **{f"close {value!r}": (head(b"Connection: " + value), {"connection": b"close", "close": True})
       for value in (b", close", b"close, ,", b",,close,,", b"close, close", b"\t,\tclose\t,")},
    "empty options alone": (head(b"Connection: , ,"), {}),
    "close in a second field": (head(b"Connection: a", b"Connection: close"), {"connection": b"close", "close": True}),
    "an option that holds close": (head(b"Connection: closed, not close"), {}),
    "keep-alive in HTTP/1.1 goes without saying": (head(b"Connection: keep-alive"), {"keep_alive": True}),
    "keep-alive in HTTP/1.0": (head(b"Connection: Keep-Alive", version=b"HTTP/1.0"),
                               {"connection": b"keep-alive", "keep_alive": True}),
    "close wins over keep-alive": (head(b"Connection: keep-alive, close", version=b"HTTP/1.0"),
                                   {"connection": b"close", "keep_alive": True, "close": True}),
    # Host
    "an empty Host": (head(host=b"Host:"), {"host": b""}),                      # RFC 9112 section 3.2
    "Host with a port": (head(host=b"Host: t:8080"), {"host": b"t:8080"}),
    "Host with an empty port": (head(host=b"Host: t:"), {"host": b"t:"}),
    "Host as IPv4": (head(host=b"Host: 127.0.0.1:80"), {"host": b"127.0.0.1:80"}),
    "Host as IPv6": (head(host=b"Host: [2001:dB8::1]"), {"host": b"[2001:dB8::1]"}),
    "Host as IPv6 with a port": (head(host=b"Host: [::ffff:1.2.3.4]:80"), {"host": b"[::ffff:1.2.3.4]:80"}),
    **{f"Host {value!r}": (head(host=b"Host: " + value), {"host": value}) for value in (
        b"[::]", b"[::]:", b"[1::]", b"[1:2:3:4:5:6:7:8]", b"[1:2:3:4:5:6:7::]", b"[::2:3:4:5:6:7:8]:80",
        b"[1:2:3:4:5:6:1.2.3.4]", b"[0001::ABCD]", b"[v1.x]", b"[VfF.a:b:!]:80")},
    "Host with a dot at its end": (head(host=b"Host: t.:80"), {"host": b"t.:80"}),
    "Host with every character a name may have": (
        head(host=b"Host: aZ0-._~!$&'()*+,;=%2f"), {"host": b"aZ0-._~!$&'()*+,;=%2f"}),
    # body framing
    "Content-Length: 0": (head(b"Content-Length: 0"), {}),
    "Content-Length: 5": (head(b"Content-Length: 5"), {"has_body": True, "content_length": 5}),
    "Content-Length with zeros in front": (head(b"Content-Length: 0005"), {"has_body": True, "content_length": 5}),
    "a huge Content-Length": (
        head(b"Content-Length: " + b"9" * 18), {"has_body": True, "content_length": 10 ** 18 - 1}),
    "chunked": (head(CHUNKED), FRAMED),
    "chunked in capitals": (head(b"TRANSFER-ENCODING: \tCHUNKED "), {**FRAMED, "transfer_encoding": b"CHUNKED"}),
    "chunked in HTTP/1.2": (head(CHUNKED, version=b"HTTP/1.2"), FRAMED),
}

HTTP_505 = {f"HTTP/{version}": (head(version=b"HTTP/" + version.encode()), 505) for version in (
    "0.9", "2.0", "2.1", "3.0", "9.9", "0.0")}

REQUEST_LINES = {name: (raw, 400) for name, raw in {
    "HTTP/0.9 has no version": b"GET /\r\n\r\n",
    "nothing but a method": b"GET\r\n\r\n",
    "an empty method": b" / HTTP/1.1\r\nHost: t\r\n\r\n",
    "an empty target": b"GET  HTTP/1.1\r\nHost: t\r\n\r\n",
    "an empty version": b"GET / \r\nHost: t\r\n\r\n",
    "two spaces before the target": b"GET  / HTTP/1.1\r\nHost: t\r\n\r\n",
    "two spaces after the target": b"GET /  HTTP/1.1\r\nHost: t\r\n\r\n",
    "a space at the start": b" GET / HTTP/1.1\r\nHost: t\r\n\r\n",
    "a space at the end": b"GET / HTTP/1.1 \r\nHost: t\r\n\r\n",
    "a tab after the method": b"GET\t/ HTTP/1.1\r\nHost: t\r\n\r\n",
    "a tab after the target": b"GET /\tHTTP/1.1\r\nHost: t\r\n\r\n",
    "a vertical tab in the line": b"GET /\x0bHTTP/1.1\r\nHost: t\r\n\r\n",
    "a no-break space in the line": b"GET /\xa0HTTP/1.1\r\nHost: t\r\n\r\n",
    "three words after the method": head(target=b"/ x"),
    "lower-case http": head(version=b"http/1.1"),
    "mixed-case http": head(version=b"Http/1.1"),
    "another protocol": head(version=b"SIP/2.0"),
    "a version of one digit": head(version=b"HTTP/1"),
    "a version without a minor": head(version=b"HTTP/1."),
    "a version with a comma": head(version=b"HTTP/1,1"),
    "a version of three digits": head(version=b"HTTP/1.10"),
    "a version with a zero in front": head(version=b"HTTP/01.1"),
    "a version with a sign": head(version=b"HTTP/+1.1"),
    "a method that is no token": head(method=b"G(T"),
    "a method with a colon": head(method=b"GET:"),
    "a method of bytes over 127": head(method=b"G\xc3\x8aT"),
    "a method with a control character": head(method=b"G\x01T"),
    "a fragment": head(target=b"/a#b"),
    "a fragment after a query": head(target=b"/a?b#c"),
    "a fragment alone": head(target=b"#a"),
    "a query alone": head(target=b"?a"),
    "bytes over 127 before the target": head(target=b"\xc3/a"),
    "bytes over 127 and a fragment": head(target=b"/\xc3#a"),
    "bytes over 127 and a blank": head(target=b"/\xc3 a"),
    "bytes over 127 and a control character": head(target=b"/\xc3\x1f"),
    "bytes over 127 and DEL": head(target=b"/\xc3\x7f"),
    "bytes over 127 and bad percent-encoding": head(target=b"/\xc3%"),
    "bytes over 127 that end half an encoded byte": head(target=b"/%4\xc1"),
    "bytes over 127 in the version": head(version=b"HTTP/1.\xb1"),
    "absolute-form with bytes over 127 for a port": head(target=b"http://t:\xb8/"),
    "absolute-form with bytes over 127 in the scheme": head(target=b"http\xf3://t/"),
    "a control character in the target": head(target=b"/\x1f"),
    "DEL in the target": head(target=b"/\x7f"),
    "NUL in the target": head(target=b"/a\0b"),
    "NUL in the query": head(target=b"/?\0"),
    "a target without a slash": head(target=b"a"),
    "a target that is a host": head(target=b"example.org/a"),
    "asterisk-form with GET": head(target=b"*"),
    "asterisk-form with HEAD": head(method=b"HEAD", target=b"*"),
    "asterisk-form with a query": head(method=b"OPTIONS", target=b"*?a"),
    "asterisk-form with more": head(method=b"OPTIONS", target=b"*/"),
    "options in lower case": head(method=b"options", target=b"*"),
    "authority-form with GET": head(target=b"example.org:80"),
    "another scheme": head(target=b"ftp://t/a"),
    "a scheme that only ends in http": head(target=b"xhttp://t/a"),
    "one slash after the scheme": head(target=b"http:/t/a"),
    "absolute-form without a host": head(target=b"http:///a"),
    "absolute-form with a port alone": head(target=b"http://:80/a"),
    "absolute-form with a user": head(target=b"http://u@t/a"),
    "absolute-form with a user and a password": head(target=b"http://u:p@t/a"),
    "absolute-form with a port that is none": head(target=b"http://t:http/a"),
    "absolute-form with a percent sign and no hex": head(target=b"http://%:80/a"),
    "absolute-form with half a bracket": head(target=b"http://[::1/a"),
    "absolute-form with a backslash for a slash": head(target=b"http://t\\a"),
    "a percent sign and no hex": head(target=b"/%zz"),
    "a percent sign at the end": head(target=b"/a%"),
    "half an encoded byte": head(target=b"/%4"),
    "a sign in an encoded byte": head(target=b"/%+4a"),
    "a percent sign before an encoded byte": head(target=b"/%%41"),
    "encoded NUL": head(target=b"/a%00"),
    "bad percent-encoding in absolute-form": head(target=b"http://t/%zz"),
}.items()}

LINE_ENDS = {name: (raw, 400) for name, raw in {
    "bare LF everywhere": head().replace(b"\r\n", b"\n"),
    "bare LF after the request line": head().replace(b"\r\n", b"\n", 1),
    "bare LF after a field": head(b"X: 1\nY: 2"),
    "bare LF in the request line": head(target=b"/\n"),
    "bare LF at the start": b"\n" + head(),
    "bare LF after an empty line": b"\r\n\n" + head(),
    "bare LF in a name": head(b"X\nY: 1"),
    "bare CR after the request line": b"GET / HTTP/1.1\rHost: t\r\n\r\n",
    "bare CR after a field": head(b"X: 1\rY: 2"),
    "bare CR in the request line": head(target=b"/\ra"),
    "bare CR at the start": b"\r" + head(),
    "bare CR at the end of the request line": b"GET / HTTP/1.1\r\r\nHost: t\r\n\r\n",
    "bare CR at the end of a value": head(b"X: 1\r"),
    "bare CR at the start of a value": head(b"X:\r1"),
    "bare CR in a name": head(b"X\rY: 1"),
    "bare CR in a line of its own": head(b"\r"),
    "LF before CR": head(b"X: 1\n\rY: 2"),
    "two bare CR": head(b"X: \r\r1"),
    "NUL in a value": head(b"X: 1\0"),
    "NUL in a name": head(b"X\0: 1"),
    "NUL at the start": b"\0" + head(),
    "NUL in Host": head(host=b"Host: t\0"),
}.items()}

FIELDS = {name: (raw, 400) for name, raw in {
    "obs-fold by a space": head(b"X: 1", b" 2"),
    "obs-fold by a tab": head(b"X: 1", b"\t2"),
    "obs-fold of blanks alone": head(b"X: 1", b" "),
    "obs-fold that hides a field": head(b"X: 1", b" Content-Length: 5"),
    "a blank before the first field": head(host=b" Host: t"),
    "a tab before the first field": head(host=b"\tHost: t"),
    "a space before the colon": head(b"X : 1"),
    "a tab before the colon": head(b"X\t: 1"),
    "a space before the colon of Content-Length": head(b"Content-Length : 5"),
    "a space before the colon of Transfer-Encoding": head(b"Transfer-Encoding : chunked"),
    "no colon": head(b"X"),
    "no colon but a blank": head(b"X 1"),
    "an empty name": head(b": 1"),
    "a colon alone": head(b":"),
    "a blank in a name": head(b"X Y: 1"),
    "a byte over 127 in a name": head(b"X\xff: 1"),
    **{f"{chr(byte)!r} in a name": head(b"X%cY: 1" % byte) for byte in b'"(),/;<=>?@[\\]{}\x7f'},
    **{f"control character {byte} in a value": head(b"X: 1%c2" % byte)
       for byte in (*range(1, 9), 0x0b, 0x0c, *range(0x0e, 0x20), 0x7f)},
    "a control character in a name": head(b"X\x01: 1"),
}.items()}

NO_ADDRESSES = [b"[%b]" % value for value in (
    b":", b".", b"1", b"1:2", b"::1::2", b":::", b"12345::", b"00001::", b"1:2:3:4:5:6:7:8:9", b"1:2:3:4:5:6:7",
    b"1:2:3:4:5:6:7:8::", b"1:2:3:4::5:6:7:8", b":1", b"1:", b":1:2:3:4:5:6:7", b"1:2:3:4:5:6:7:", b"ab..cd",
    b"1.2.3.4", b"::1.2.3", b"::1.2.3.4.5", b"::1.2.3.256", b"::01.2.3.4", b"::1.2.3.4:5", b"1:2:3:4:5:6:7:1.2.3.4",
    b"::1.2.3.", b"g::", b"v", b"v1", b"v1.", b"v.x", b"vg.x", b"v1.x@", b"v1.[x]", b"v1.%41", b"::1%eth0",
    b"::1/64", b"[::1]")]

HOSTS = {name: (raw, 400) for name, raw in {
    "no Host": head(host=None),
    "no Host in HTTP/1.2": head(host=None, version=b"HTTP/1.2"),
    "no Host with absolute-form": head(host=None, target=b"http://t/"),
    "Host twice": head(b"Host: u"),
    "the same Host twice": head(b"Host: t"),
    "Host twice in HTTP/1.0": head(b"Host: t", version=b"HTTP/1.0"),
    "Host twice, once empty": head(b"Host: t", host=b"Host:"),
    "Host twice in other letters": head(b"HOST: t"),
    **{f"Host: {value!r}": head(host=b"Host: " + value) for value in (
        b"u@t", b"u:p@t", b"t/a", b"t?a", b"t#a", b"t:http", b"t:80:80", b"t:-1", b"a b", b"a\tb", b"[::1", b"::1",
        b"[::1]x", b"[::1]:x", b"[]", b"[::1%25eth0]", b"t%", b"t%zz", b"%:80",
        b"t%:80", b"%4:80", b"a\\b", b'"t"', b"<t>", b"\xc3\xa9",
        b"http://t", *NO_ADDRESSES)},
    **{f"absolute-form with {value!r}": head(target=b"http://%b/" % value) for value in NO_ADDRESSES},
    "a bad Host in HTTP/1.0": head(host=b"Host: u@t", version=b"HTTP/1.0"),
}.items()}

FRAMING = {name: (raw, 400) for name, raw in {
    "Content-Length twice": head(b"Content-Length: 5", b"Content-Length: 6"),
    "the same Content-Length twice": head(b"Content-Length: 5", b"Content-Length: 5"),
    "Content-Length twice, once zero": head(b"Content-Length: 0", b"Content-Length: 5"),
    **{f"Content-Length: {value!r}": head(b"Content-Length: " + value) for value in (
        b"", b"5, 5", b"5,6", b"5,", b"+5", b"-5", b"-0", b"5 6", b"0x5", b"5.0", b"1e1", b"1_0", b"five", b"5;",
        b'"5"', b"\xb2", b"\xd9\xa5", b"9" * 19, b"9" * 5000, b"0" * 30 + b"5")},
    "Content-Length in HTTP/1.0, bad too": head(b"Content-Length: x", version=b"HTTP/1.0"),
    "both": head(b"Content-Length: 5", CHUNKED),
    "both, the other way round": head(CHUNKED, b"Content-Length: 5"),
    "both, Content-Length: 0": head(b"Content-Length: 0", CHUNKED),
    "both in HTTP/1.0": head(b"Content-Length: 5", CHUNKED, version=b"HTTP/1.0"),
    "chunked in HTTP/1.0": head(CHUNKED, version=b"HTTP/1.0"),
    "chunked twice": head(b"Transfer-Encoding: chunked, chunked"),
    "chunked in two fields": head(CHUNKED, CHUNKED),
    "chunked is not the last": head(b"Transfer-Encoding: chunked, gzip"),
    "chunked is not the last of two fields": head(CHUNKED, b"Transfer-Encoding: gzip"),
    "chunked and nothing after a comma": head(b"Transfer-Encoding: chunked,"),
    "an empty Transfer-Encoding": head(b"Transfer-Encoding:"),
    **{f"Transfer-Encoding: {value!r}": head(b"Transfer-Encoding: " + value) for value in (
        b"gzip", b"identity", b"chunkedx", b"xchunked", b"chunked x", b'"chunked"', b"chunked;q=1", b"\xa0chunked")},
}.items()}

CODINGS_501 = {name: (raw, 501) for name, raw in {
    "gzip before chunked": head(b"Transfer-Encoding: gzip, chunked"),
    "gzip in a field before": head(b"Transfer-Encoding: gzip", CHUNKED),
    "identity before chunked": head(b"Transfer-Encoding: identity,chunked"),
}.items()}

REFUSED = {**HTTP_505, **REQUEST_LINES, **LINE_ENDS, **FIELDS, **HOSTS, **FRAMING, **CODINGS_501}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_means_the_same_however_it_comes(case):
    raw, expected = ACCEPTED[case]
    assert meaning(accepted(raw)) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_alike_however_it_comes(case):
    raw, status = REFUSED[case]
    assert {how: outcome for how, outcome, _ in each_way(raw)} == dict.fromkeys(dict(deliveries(raw)), status)


def test_a_plain_request_in_full():
    fields = http1.Fields(b"t", False, False, None, 0, None, frozenset({""}), False, False, *[None] * 6)
    assert accepted(head()) == http1.Request(b"GET", b"/", b"", b"", False, fields)


def test_a_refusal_is_the_same_each_time():
    for _ in range(3):
        with pytest.raises(HttpError) as refused:
            http1.parse_head(head(b"X"))
        assert (refused.value.status, refused.value.args) == (400, (400, "malformed header field"))


# limits: (size, status or None where it is accepted). One byte of a CRLF may come without the other.

@pytest.mark.parametrize(("size", "status"), [(MAX_LINE - 1, None), (MAX_LINE, None), (MAX_LINE + 1, 414)])
def test_the_longest_request_line(size, status):
    raw = head(target=b"/" + b"a" * (size - len(b"GET / HTTP/1.1")))
    assert raw.index(b"\r\n") == size
    for how, outcome, _ in each_way(raw):
        assert (outcome if status else outcome.path[:2]) == (status or b"/a"), how


@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD - 1, None), (MAX_HEAD, None), (MAX_HEAD + 1, 431)])
def test_the_longest_head(size, status):
    raw = head(b"X: " + b"a" * (size - len(head(b"X: "))))
    assert len(raw) == size
    for how, outcome, _ in each_way(raw):
        assert (outcome if status else outcome.path) == (status or b"/"), how


@pytest.mark.parametrize(("start", "status"), [
    (b"a" * (MAX_LINE + 2), 414),
    (b"GET /" + b"a" * MAX_HEAD, 414),
    (b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD, 431),
    (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * (MAX_HEAD // 6), 431),
], ids=["method", "target", "field", "many fields"])
def test_a_head_without_end_is_refused_as_soon_as_it_is_too_long(start, status):
    for pieces in ([start], [start[i:i + 1] for i in range(len(start))]):
        with pytest.raises(HttpError) as refused:
            read(pieces)
        assert refused.value.status == status


def test_what_comes_behind_a_head_is_not_counted_as_head():
    raw = head() + b"x" * 3 * MAX_HEAD
    assert http1.find_head(raw, 0) == len(head())


def test_an_unfinished_head_is_waited_for():
    assert http1.find_head(b"a" * MAX_LINE + b"\r", 0) == -1
    for raw in (head(), head(b"X: 1")):
        for end in range(len(raw)):
            assert read([raw[:end]]) == (None, raw[:end]), end


@pytest.mark.parametrize("start", [
    b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: t\n", b"\rG", b"GET / HTTP/1.1\r\nX: a\rb", b"GET /\0", b"\n"])
def test_a_line_that_cannot_get_well_again_is_not_waited_for(start):
    for pieces in ([start], [start[i:i + 1] for i in range(len(start))], [start[:-1], start[-1:]]):
        with pytest.raises(HttpError) as refused:
            read(pieces)
        assert refused.value.status == 400


@pytest.mark.parametrize("value", [b"a" + b" " * 15_000 + b"b", b"a \t" * 5000, b" " * 15_000], ids=[
    "one run of blanks", "many", "nothing else"])
def test_blanks_in_a_value_do_not_cost_more_than_they_weigh(value):
    block = b"X: %b\r\n\r\n" % value
    spent = []
    for _ in range(3):
        begin = time.process_time()
        http1.parse_fields(block)
        spent.append(time.process_time() - begin)
    assert min(spent) < 0.02, "in time that grows with the square of the length"


@pytest.mark.parametrize(("buffer", "rest"), [
    (b"", b""), (b"\r\n", b""), (b"\r\n\r\nGET", b"GET"), (b"GET\r\n", b"GET\r\n"), (b"\r", b"\r"), (b"\r\n\r", b"\r"),
    (b"\n\r\n", b"\n\r\n"), (b" \r\n", b" \r\n")])
def test_empty_lines_are_skipped(buffer, rest):
    assert http1.skip_empty_lines(buffer) == rest


# --- requests that differ in nothing that counts

BROWSER = b"User-Agent: x", b"Accept: */*", b"Accept-Encoding: gzip"
CORE = head(*BROWSER[1:], target=b"/a")


def browser(number, *more, target=b"/a"):
    """What a browser sends, of which only a few lines are as in its other requests."""
    return head(*BROWSER, b"Referer: http://t/%d" % number, b"Cookie: session=%d" % number, *more, target=target)


def essence(raw):
    """A request without the lines that are taken out; None where it is not one in whole."""
    line, block = http1.split_head(raw)
    return line and line + b"\r" + http1.essence(block)


def whole(raw):
    """What the short way makes of a request; None where it is left to the parser."""
    line, block = http1.split_head(raw)
    fields = line and http1.plain_fields(http1.essence(block))
    return fields and http1.plain_request(line, fields)


def test_what_differs_from_one_client_to_another_is_no_part_of_the_essence():
    for number in range(3):
        assert essence(browser(number)) == CORE
        assert whole(browser(number)) == accepted(browser(number)) == accepted(CORE)


@pytest.mark.parametrize("line", [
    b"Cookie: a=b", b"cookie: a", b"Cookie:", b"Cookie:\t \xff", b"Referer: http://t/", b"referer: /", b"User-Agent: x",
    b"user-agent: x", b"X-Forwarded-For: 192.0.2.1", b"x-request-id: 1", b"X-A:b", b"Forwarded: for=x", b"forwarded: x",
    b"Via: 1.1 p", b"via: 1.1 p", b"traceparent: 00"])
def test_a_line_that_is_taken_out(line):
    for lines in ([line, *BROWSER[1:]], [*BROWSER[1:], line], [BROWSER[1], line, line, BROWSER[2], line]):
        assert essence(head(*lines, target=b"/a")) == CORE
    assert essence(head(*BROWSER[1:], target=b"/a", host=line + b"\r\nHost: t")) == CORE


@pytest.mark.parametrize("line", [
    b"Host: u", b"Connection: close", b"Accept-Encoding: br", b"Content-Length: 3", b"Transfer-Encoding: chunked",
    b"Expect: x", b"Range: x", b'If-None-Match: "a"', b"Accept: x", b"COOKIE: a", b"Cookies: a", b"Via", b"A-Cookie: x",
    b"A: Cookie: x", b"X", b"X: y",
    # of which nobody knows what they are
    b"Cookie", b"Cookie : a", b" Cookie: a", b"\tCookie: a", b"Cookie: \0", b"Cookie: a\rb", b"Cookie: a\x7f",
    b"Cookie\0: a", b"X-\xff: a", b"X-A : b", b"\rCookie: a", b"Cookie: a\r", b"\0Cookie: a"])
def test_a_line_that_stays(line):
    for raw in (browser(1, line), browser(1, line, b"Cookie: x")):
        assert essence(raw) == head(*BROWSER[1:], line, target=b"/a")


@pytest.mark.parametrize("line", [
    b"Cookie: a\nb", b"A: b\nCookie: a", b"\nCookie: a", b"Cookie: a\r\n b", b"Cookie: a\n"])
def test_a_line_end_that_is_none_stays(line):
    assert whole(browser(1, line)) is None
    with pytest.raises(HttpError):
        http1.parse_head(browser(1, line))


@pytest.mark.parametrize("more", [
    (), (b"Connection: close",), (b"Accept-Encoding: br",), (b"Range: a", b"range: b"), (b"Expect: x",),
    (b'If-None-Match:  "1"\t',), (b"Content-Length: 0",), [b"X-%d: y" % i for i in range(100)],
    [b"Y%d: y" % i for i in range(100)]])
def test_what_is_known_in_whole_is_what_the_parser_says(more):
    assert whole(browser(1, *more)) == accepted(browser(1, *more))


@pytest.mark.parametrize("more", [
    (b"Host: t",), (b"host: u",), (b"X",), (b"X : y",), (b" X: y",), (b"X: \0",), (b"X: a\rb",), (b"X: a\nb",), (b"",),
    (b"Content-Length: 3",), (b"Transfer-Encoding: chunked",), (b"Content-Length: x",),
    (b"Content-Length: 0", b"Content-Length: 0")])
def test_what_is_left_to_the_parser(more):
    for _ in range(2):
        assert whole(browser(1, *more)) is None
        assert whole(browser(1)) is not None


@pytest.mark.parametrize("target", [
    b"*", b"http://t/", b"/%4", b"/%00", b"/\xff", b"/a?\xff", b"/a#b", b"a"])
def test_a_target_that_is_left_to_the_parser(target):
    assert whole(browser(1, target=target)) is None


def test_other_versions_are_left_to_the_parser():
    for version in (b"HTTP/1.0", b"HTTP/1.2", b"HTTP/1.10", b"HTTP/2.0", b"http/1.1"):
        assert whole(head(version=version)) is None
    assert whole(head(host=None)) is None


@pytest.mark.parametrize("behind", [
    b"Accept: */*\r\n", b"Cookie: new\r\n", b"Range: x\r\n", b"Host: t\r\n", b"\r\n", b"X", browser(0),
    b"Cookie: new\r\n\r\n"])
def test_what_has_more_behind_it_is_left_to_the_parser(behind):
    """Also where this is a line that means nothing before the empty one."""
    assert whole(browser(0)) is not None
    assert essence(browser(0) + behind) is None


def test_what_has_not_come_in_whole_has_no_essence():
    for raw in (browser(0), head(), b"\r\n\r\n", b"abc"):
        for end in range(len(raw)):
            assert essence(raw[:end]) is None


@pytest.mark.parametrize(("extra", "known"), [(0, True), (10, False)])
def test_a_long_head_has_no_essence(extra, known):
    room = MAX_LINE - len(browser(1, b"Cookie: "))
    assert (whole(browser(1, b"Cookie: " + b"x" * (room + extra))) is not None) == known


CONDITIONS = {                  # lines, and which of them are taken out
    (): [],
    (b'If-None-Match: "a"',): [b'If-None-Match: "a"'],
    (b"Range: bytes=0-1", b"A: b", b"If-None-Match: x"): [b"Range: bytes=0-1", b"If-None-Match: x"],
    (b"If-None-Match: x", b"If-Modified-Since: y"): [b"If-None-Match: x\r\nIf-Modified-Since: y"],
    (b"If-None-Match: x", b"If-Modified-Since: y", b"If-Modified-Since: z"): [
        b"If-None-Match: x\r\nIf-Modified-Since: y"],
    (b"If-Modified-Since: y", b"If-None-Match: x"): [b"If-None-Match: x"],
    (b"If-None-Match: x", b"A: b", b"If-Modified-Since: y"): [b"If-None-Match: x"],
    (b"If-None-Match: x", b"Range:", b"If-None-Match: y"): [b"If-None-Match: x", b"If-None-Match: y"],
    **{(line,): [] for line in (
        b"If-Modified-Since: y", b'if-none-match: "a"', b"If-None-Match:x", b"range: x", b"If-Range: x", b"If-Match: x",
        b"If-Unmodified-Since: x", b"Range : x", b"Range: \0", b"Range: a\rb", b"A: Range: b", b" Range: x",
        b"Ranges: x")},
}


@pytest.mark.parametrize("lines", CONDITIONS)
def test_a_request_without_its_conditions(lines):
    core, taken = head(*BROWSER, *lines), CONDITIONS[lines]
    line, block = http1.split_head(core)
    bare, found = http1.without_conditions(block)
    gone = b"\r\n".join(taken).split(b"\r\n")
    kept = list(lines)
    for each in gone if taken else ():
        kept.remove(each)
    assert (line + b"\r" + bare, found) == (head(*BROWSER, *kept), taken)


# --- paths

PATHS = {
    b"/": b"/", b"//": b"//", b"/a": b"/a", b"/a/": b"/a/", b"/a//b": b"/a//b",
    b"/.": b"/", b"/./": b"/", b"/..": b"/", b"/../": b"/", b"/../..": b"/", b"/a/..": b"/", b"/a/../": b"/",
    b"/a/.": b"/a/", b"/a/./": b"/a/", b"/a/./b": b"/a/b", b"/a/../b": b"/b", b"/a/b/..": b"/a/", b"/a/b/../..": b"/",
    b"/a/b/../../..": b"/", b"/a/b/c/./../../g": b"/a/g", b"/../../../etc/passwd": b"/etc/passwd",
    b"/mid/content=5/../6": b"/mid/6",                                                  # RFC 3986 section 5.2.4
    b"/a//../b": b"/a/b", b"//..": b"/", b"/..//a": b"//a",
    b"/...": b"/...", b"/.a": b"/.a", b"/a.": b"/a.", b"/..a": b"/..a", b"/a..": b"/a..", b"/.../..": b"/",
}

ENCODED = {
    b"/%41": b"/A", b"/%c3%A9": b"/\xc3\xa9", b"/%ff": b"/\xff", b"/%0d%0A": b"/\r\n", b"/a%20b": b"/a b",
    b"/%2e": b"/", b"/%2e%2E/": b"/", b"/a/%2e./b": b"/b", b"/a/.%2e/b": b"/b", b"/%2e%2e/%2e%2e/etc": b"/etc",
    b"/%2e%2e%2e": b"/...", b"/a%2eb": b"/a.b", b"/a%2e": b"/a.",
    b"/%2f": b"//", b"/a%2Fb": b"/a/b", b"/a%2f%2Fb": b"/a//b", b"/%2Fb": b"//b", b"/a%2F": b"/a/",
    b"/..%2f..%2fetc": b"/etc", b"/%2F%2e%2e": b"/", b"/a%2f..": b"/", b"/a%2F.%2Fb": b"/a/b",
    b"/a%2f../%2e%2E%2f": b"/", b"/%2e%2e%2f%2e%2e%2Fetc": b"/etc", b"/a%2e%2f": b"/a./",
    b"/%25": b"/%", b"/%2541": b"/%41", b"/%252f": b"/%2f", b"/%25%32%66": b"/%2f", b"/%5c": b"/\\",
}

BAD_ESCAPES = [b"/%", b"/%4", b"/%4/1", b"/%zz", b"/%4g", b"/%g4", b"/%%", b"/%%41", b"/%+1", b"/% 1", b"/%\xb21",
               b"/%0x", b"/%00", b"/a%00b", b"/%2f%", b"/%2f%00"]


@pytest.mark.parametrize("path", PATHS)
def test_dot_segments(path):
    assert http1.remove_dot_segments(path) == http1.decode_path(path) == PATHS[path]


@pytest.mark.parametrize("path", ENCODED)
def test_percent_encoding(path):
    assert http1.decode_path(path) == ENCODED[path]


@pytest.mark.parametrize("path", BAD_ESCAPES)
def test_bad_percent_encoding(path):
    with pytest.raises(HttpError) as refused:
        http1.decode_path(path)
    assert refused.value.status == 400


@pytest.mark.parametrize(("path", "merged"), [
    (b"/", b"/"), (b"/a/b/", b"/a/b/"), (b"//", b"/"), (b"///", b"/"), (b"//evil.example/", b"/evil.example/"),
    (b"/a//b", b"/a/b"), (b"/a/////b//", b"/a/b/"), (b"//a/b//c", b"/a/b/c"), (b"/\n//\n", b"/\n/\n"),
    (b"/\\//a", b"/\\/a")])
def test_slashes_in_a_row_become_one(path, merged):
    assert http1.merge_slashes(path) == merged
    assert http1.merge_slashes(merged) == merged


# --- Accept-Encoding

ALL = {"", "br", "zstd", "gzip"}
ACCEPT = {
    None: {""}, b"": {""}, b" ": {""}, b",": {""}, b", ,": {""},
    b"gzip": {"", "gzip"}, b"x-gzip": {"", "gzip"}, b"GZip": {"", "gzip"}, b"br": {"", "br"}, b"zstd": {"", "zstd"},
    b"gzip, deflate, br, zstd": ALL, b"gzip,br": {"", "gzip", "br"}, b" \tgzip\t ,\tbr": {"", "gzip", "br"},
    b"gzip;q=0.5": {"", "gzip"}, b"gzip ; q=0.001": {"", "gzip"}, b"gzip;Q=1.000": {"", "gzip"},
    b"gzip;q=1.": {"", "gzip"},
    b"gzip;q=0": {""}, b"gzip;q=0.0": {""}, b"gzip;q=0.": {""}, b"gzip;\tq=0.000 ": {""},
    b"*": ALL, b"*;q=0.1": ALL, b"*;q=0": set(), b"*, gzip;q=0": ALL - {"gzip"}, b"gzip;q=0, *": ALL - {"gzip"},
    b"gzip, *;q=0": {"gzip"}, b"identity, *;q=0": {""}, b"identity;q=0": set(), b"identity;q=0, br": {"br"},
    b"identity;q=0, *": ALL - {""}, b"identity;q=0.5, *;q=0": {""}, b"br;q=0, gzip, *;q=0": {"gzip"},
    b"compress": {""}, b"deflate": {""}, b"gzipx": {""}, b"xgzip": {""},
    # what breaks the grammar is passed over, member by member
    **dict.fromkeys((
        b"gzip;q=2", b"gzip;q=1.001", b"gzip;q=0.0000", b"gzip;q=-1", b"gzip;q=", b"gzip;", b"gzip;q=x", b"gzip;q = 1",
        b"gzip q=1", b"gzip;level=9", b"gzip;q=1;q=0", b"(gzip)", b"gzip;q=.5", b"gzip;q=1e0", b"gzip br"), {""}),
    b",gzip": {"", "gzip"}, b"gzip,": {"", "gzip"}, b", ,\tgzip;q=0.5 ,, br,": {"", "gzip", "br"},
    b"gzip, gzip": {"", "gzip"}, b"gzip;q=0,,gzip;q=0": {""}, b",identity;q=0,": set(),
    b"gzip;q=9, br": {"", "br"}, b"br, \xff, gzip": {"", "br", "gzip"},
}


@pytest.mark.parametrize("value", ACCEPT)
def test_acceptable_codings(value):
    assert http1.acceptable_codings(value) == ACCEPT[value]


# --- bodies

def fields(*lines):
    return http1.parse_fields(b"\r\n".join((b"Host: t", *lines, b"", b"")))


def swallow(framing, pieces):
    """The Body that has read the pieces as a connection gives them, and what it left."""
    body, pending = Body(framing), b""
    for piece in pieces:
        pending = body.feed(pending + piece)
    return body, pending


def cuts(raw):
    """Every way to cut `raw` in two, byte by byte, and not at all."""
    yield [raw]
    yield [raw[i:i + 1] for i in range(len(raw))]
    yield from ([raw[:i], raw[i:]] for i in range(1, len(raw)))


WITH_LENGTH = fields(b"Content-Length: 5")
IN_CHUNKS = fields(CHUNKED)

CHUNKED_BODIES = {
    "nothing": b"0\r\n\r\n",
    "one chunk": b"5\r\nabcde\r\n0\r\n\r\n",
    "several": b"1\r\na\r\n2\r\nbc\r\n3\r\ndef\r\n0\r\n\r\n",
    "hex in both cases": b"a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n",
    "two digits": b"1f\r\n" + b"x" * 31 + b"\r\n0\r\n\r\n",
    "zeros in front": b"00005\r\nabcde\r\n000\r\n\r\n",
    "fifteen digits": b"000000000000005\r\nabcde\r\n000000000000000\r\n\r\n",
    "data that looks like framing": b"c\r\n\r\n0\r\n\r\n5\r\na\r\r\n0\r\n\r\n",
    "an extension": b"5;a=b\r\nabcde\r\n0;c\r\n\r\n",
    "a quoted extension": b'5;a="b;c"\r\nabcde\r\n0\r\n\r\n',
    "blanks before an extension": b"5 \t; a = b\r\nabcde\r\n0 ;\r\n\r\n",
    "obs-text in an extension": b"5;\xff\r\nabcde\r\n0\r\n\r\n",
    "a trailer": b"5\r\nabcde\r\n0\r\nX: y\r\n\r\n",
    "several trailers": b"0\r\nX: y\r\nContent-Length: 5\r\nZ:\r\n\r\n",
    "the longest line": b"5;" + b"a" * (MAX_CHUNK_LINE - 2) + b"\r\nabcde\r\n0\r\n\r\n",
}

BAD_CHUNKS = {name: raw + b"0\r\n\r\n" for name, raw in {
    "no size": b"\r\n", "a letter": b"g\r\n", "a sign": b"+5\r\nabcde\r\n", "a minus": b"-5\r\nabcde\r\n",
    "0x": b"0x5\r\nabcde\r\n", "an underscore": b"1_0\r\n", "a space before": b" 5\r\nabcde\r\n",
    "a space behind": b"5 \r\nabcde\r\n", "a tab before": b"\t5\r\nabcde\r\n", "a semicolon alone": b";\r\n",
    "an extension alone": b";a=b\r\n", "a comma": b"5,\r\nabcde\r\n", "two sizes": b"5 5\r\nabcde\r\n",
    "a digit over 127": b"\xb2\r\nab\r\n", "sixteen digits": b"0000000000000005\r\nabcde\r\n",
    "sixteen digits, huge": b"ffffffffffffffff\r\n", "thousands of digits": b"1" * 5000 + b"\r\n",
    "bare LF after the size": b"5\nabcde\r\n", "bare CR after the size": b"5\rabcde\r\n",
    "CR CR LF after the size": b"5\r\r\nabcde\r\n", "NUL in an extension": b"5;\0\r\nabcde\r\n",
    "a control character in an extension": b"5;\x1f\r\nabcde\r\n", "DEL in an extension": b"5;\x7f\r\nabcde\r\n",
    "bare LF in an extension": b"5;a\nb\r\nabcde\r\n", "bare CR in an extension": b"5;a\rb\r\nabcde\r\n",
    "data longer than the size": b"5\r\nabcdef\r\n", "data shorter than the size": b"5\r\nabcd\r\n\r\n",
    "nothing after the data": b"5\r\nabcde", "a blank after the data": b"5\r\nabcde \r\n",
    "bare LF after the data": b"5\r\nabcde\n", "bare CR after the data": b"5\r\nabcde\r",
    "a line longer than allowed": b"5;" + b"a" * (MAX_CHUNK_LINE - 1) + b"\r\nabcde\r\n",
}.items()}

BAD_TRAILERS = {name: b"0\r\n" + raw + b"\r\n\r\n" for name, raw in {
    "a trailer without a colon": b"X", "a trailer with a space before the colon": b"X : 1",
    "a trailer without a name": b": 1", "a folded trailer": b"X: 1\r\n 2", "a blank before a trailer": b" X: 1",
    "bare LF in a trailer": b"X: 1\nY: 2", "bare CR in a trailer": b"X: 1\r2", "NUL in a trailer": b"X: \0",
    "a control character in a trailer": b"X: \x01",
    "a trailer longer than allowed": b"X:" + b"a" * (MAX_CHUNK_LINE - 1),
}.items()}

BAD_BODIES = {**BAD_CHUNKS, **BAD_TRAILERS}


@pytest.mark.parametrize("case", CHUNKED_BODIES)
def test_a_chunked_body_ends_where_it_ends_however_it_comes(case):
    raw = CHUNKED_BODIES[case]
    for pieces, behind in itertools.product(cuts(raw), (b"", b"GET /next", b"\r\n", b"0\r\n\r\n")):
        body, rest = swallow(IN_CHUNKS, [*pieces[:-1], pieces[-1] + behind])
        assert (body.done, rest, body.seen) == (True, behind, len(raw)), pieces
    for end in range(len(raw)):
        body, rest = swallow(IN_CHUNKS, [raw[:end]])
        assert not body.done, end
        assert body.seen + len(rest) == end


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_bad_chunk_is_refused_however_it_comes(case):
    for pieces in cuts(BAD_BODIES[case]):
        with pytest.raises(HttpError) as refused:
            swallow(IN_CHUNKS, pieces)
        assert refused.value.status == 400, pieces


def test_a_body_with_a_length_ends_where_it_ends_however_it_comes():
    for pieces, behind in itertools.product(cuts(b"\r\n0\r\n"), (b"", b"GET /next", b"\r\n")):
        body, rest = swallow(WITH_LENGTH, [*pieces[:-1], pieces[-1] + behind])
        assert (body.done, rest, body.seen) == (True, behind, 5)
    body, rest = swallow(WITH_LENGTH, [b"abcd"])
    assert (body.done, rest, body.seen, body.left) == (False, b"", 4, 1)


def test_the_largest_chunk_is_read_on_and_on():
    body, rest = swallow(IN_CHUNKS, [b"f" * 15 + b"\r\n" + b"x" * 1000, b"x" * 1000])
    assert (body.done, rest, body.left) == (False, b"", 16 ** 15 - 1 - 2000)
    assert body.seen == 17 + 2000


@pytest.mark.parametrize("start", [
    b"x" * (MAX_CHUNK_LINE + 2), b"0\r\nX: " + b"x" * MAX_CHUNK_LINE, b"5\nab", b"5\r\nabcde\n"])
def test_a_chunk_line_that_cannot_get_well_again_is_not_waited_for(start):
    for pieces in cuts(start):
        with pytest.raises(HttpError):
            swallow(IN_CHUNKS, pieces)


def test_the_end_of_a_chunk_is_waited_for_in_either_half():
    body, rest = swallow(IN_CHUNKS, [b"5\r\nabcde\r"])
    assert (body.done, rest) == (False, b"\r")
    assert body.feed(rest + b"\n0\r\n\r\nGET") == b"GET"
    assert body.done


# --- dates

DATE = 784111777                # RFC 9110 section 5.6.7 gives it in all three forms
DATES = {
    b"Sun, 06 Nov 1994 08:49:37 GMT": DATE, b"Sunday, 06-Nov-94 08:49:37 GMT": DATE, b"Sun Nov  6 08:49:37 1994": DATE,
    b"Thu, 01 Jan 1970 00:00:00 GMT": 0, b"Thu Jan  1 00:00:00 1970": 0, b"Wed, 31 Dec 1969 23:59:59 GMT": -1,
    b"Tue, 29 Feb 2000 12:00:00 GMT": 951825600, b"Sat, 31 Dec 2016 23:59:60 GMT": 1483228800,
    b"Tue, 19 Jan 2038 03:14:08 GMT": 2 ** 31, b"Mon, 06 Nov 1994 08:49:37 GMT": DATE,      # the weekday says nothing
    b"Sun Nov 06 08:49:37 1994": DATE, b"Sun Nov 16 08:49:37 1994": DATE + 10 * 86400,
}

NO_DATES = [
    b"", b" ", b"0", b"784111777", b"yesterday", b"Sun, 06 Nov 1994 08:49:37", b"Sun, 06 Nov 1994 08:49:37 UTC",
    b"Sun, 06 Nov 1994 08:49:37 +0000", b"Sun, 06 Nov 1994 08:49:37 gmt", b"Sun, 6 Nov 1994 08:49:37 GMT",
    b"sun, 06 nov 1994 08:49:37 GMT", b"Sun 06 Nov 1994 08:49:37 GMT", b"Sun, 06-Nov-1994 08:49:37 GMT",
    b"Sun, 06 Nov 94 08:49:37 GMT", b"Sun, 06 Nov 1994 8:49:37 GMT", b"Sun, 06 Nov 1994 08:49 GMT",
    b"Xyz, 06 Nov 1994 08:49:37 GMT",
    b"Sun, 06 Foo 1994 08:49:37 GMT", b"Sun, 00 Nov 1994 08:49:37 GMT", b"Sun, 32 Nov 1994 08:49:37 GMT",
    b"Sun, 06 Nov 1994 24:00:00 GMT", b"Sun, 06 Nov 1994 08:60:37 GMT", b"Sun, 06 Nov 1994 08:49:61 GMT",
    b"Sun, 06 Nov 0000 08:49:37 GMT", b" Sun, 06 Nov 1994 08:49:37 GMT", b"Sun, 06 Nov 1994 08:49:37 GMT ",
    b"Sun, 06 Nov 1994 08:49:37 GMT\n", b"Sun, 06 Nov 1994  08:49:37 GMT", b"Sun, +6 Nov 1994 08:49:37 GMT",
    b"Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT", b"Sun, 06-Nov-94 08:49:37 GMT",
    b"Sunday, 06-Nov-94 08:49:37", b"Sunday, 6-Nov-94 08:49:37 GMT", b"Sonday, 06-Nov-94 08:49:37 GMT",
    b"Sun Nov  6 08:49:37 1994 GMT", b"Sun Nov 6 08:49:37 1994", b"Sun Nov  0 08:49:37 1994",
    b"Sun Nov    08:49:37 1994",
    b"Sun, 06 Nov \xb2994 08:49:37 GMT", "Sun, ٠٦ Nov 1994 08:49:37 GMT".encode(),
]


@pytest.mark.parametrize("value", DATES)
def test_dates(value):
    assert http1.parse_date(value) == DATES[value]


@pytest.mark.parametrize("value", NO_DATES)
def test_what_is_no_date(value):
    assert http1.parse_date(value) is None


def test_format_date():
    assert http1.format_date(DATE) == b"Sun, 06 Nov 1994 08:49:37 GMT"
    assert http1.format_date(DATE + 0.9) == b"Sun, 06 Nov 1994 08:49:37 GMT"
    assert http1.format_date(0) == b"Thu, 01 Jan 1970 00:00:00 GMT"


@pytest.mark.parametrize("month", range(12))
def test_every_month_and_weekday_has_its_name(month):
    when = DATE + month * 30 * 86400
    assert http1.format_date(when).decode() == time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(when))
    assert http1.parse_date(http1.format_date(when)) == when


@pytest.mark.parametrize(("two_digits", "year"), [
    (0, 2000), (26, 2026), (75, 2075), (76, 2076), (77, 1977), (99, 1999)])
def test_two_digit_years_are_never_more_than_50_years_ahead(monkeypatch, two_digits, year):
    monkeypatch.setattr(http1, "time", SimpleNamespace(gmtime=lambda *_: time.gmtime(1_790_000_000)))      # in 2026
    asked = b"Sunday, 06-Nov-%02d 08:49:37 GMT" % two_digits
    assert time.gmtime(http1.parse_date(asked)).tm_year == year
