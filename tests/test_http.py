"""The grammar of RFC 9112 at the socket: each request comes at once, byte by byte, and with another behind it."""

from email.utils import parsedate_to_datetime

import pytest
from support import FILES, deliveries, request

KEEP, CLOSE, EITHER = "keep", "close", "either"
HOST = b"Host: t\r\n"


def get(*lines, target=b"/next", version=b"1.1", host=HOST, body=b""):
    """A GET in bytes, with header lines that may be as wrong as the case needs."""
    head = b"GET " + target + b" HTTP/" + version + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines)
    return head + b"\r\n" + body


def post(*lines, method=b"POST", target=b"/next", body=b""):
    return get(*lines, target=target, body=body).replace(b"GET", method, 1)


ALLOWED = {
    "plain": (get(), KEEP),
    "an empty line before the request": (b"\r\n" + get(), KEEP),
    "a query": (get(target=b"/next?a=/../b&c"), KEEP),
    "an empty query": (get(target=b"/next?"), KEEP),
    "absolute-form": (get(target=b"http://t/next"), KEEP),
    "absolute-form wins over Host": (get(target=b"http://other.example:81/next"), KEEP),
    "absolute-form, scheme in capitals": (get(target=b"HTTP://t/next"), KEEP),
    "encoded letters": (get(target=b"/%6ee%78t"), KEEP),
    "dot segments": (get(target=b"/./dir/../next"), KEEP),
    "encoded dot segments": (get(target=b"/dir/%2e%2E/next"), KEEP),
    "bytes over 127 in the query": (get(target=b"/next?\xc3\xa9"), KEEP),
    "an encoded slash": (get(target=b"/dir%2F..%2fnext"), KEEP),
    "Host with a port": (get(host=b"Host: t:8080\r\n"), KEEP),
    "Host as IPv6 literal": (get(host=b"Host: [::1]:8080\r\n"), KEEP),
    "Host as IPvFuture": (get(host=b"Host: [v1.x]\r\n"), KEEP),
    "header names in any case": (get(host=b"hOsT: t\r\n"), KEEP),
    "no space after the colon": (get(host=b"Host:t\r\n"), KEEP),
    "blanks around a value": (get(b"X-A: \t b \t "), KEEP),
    "an empty value": (get(b"X-A:"), KEEP),
    "bytes over 127 in a value": (get(b"X-A: \xff\xfe\x80"), KEEP),
    "every token character in a name": (get(b"!#$%&'*+-.^_`|~9aZ: 1"), KEEP),
    "Connection: close": (get(b"Connection: close"), CLOSE),
    "close in a list": (get(b"Connection: x-a , Close"), CLOSE),
    "close beside empty options": (get(b"Connection: , close,,"), CLOSE),
    "Expect after an empty member": (get(b"Expect: , 100-continue"), KEEP),
    "Expect twice": (get(b"Expect: 100-continue", b"Expect: 100-continue"), KEEP),
    "Expect without a member": (get(b"Expect: ,"), KEEP),
    "HTTP/1.0": (get(version=b"1.0"), CLOSE),
    "HTTP/1.0 without Host": (get(version=b"1.0", host=b""), CLOSE),
    "HTTP/1.0 keep-alive": (get(b"Connection: keep-alive", version=b"1.0"), KEEP),
    "a body with a length": (get(b"Content-Length: 5", body=b"12345"), KEEP),
    "a body that looks like a request": (get(b"Content-Length: 24", body=b"GET /evil HTTP/1.1\r\n\r\n\r\n"), KEEP),
    "a chunked body": (get(b"Transfer-Encoding: chunked", body=b"5\r\n12345\r\n0\r\n\r\n"), KEEP),
    "Chunked in capitals": (get(b"Transfer-Encoding: CHUNKED", body=b"A\r\n1234567890\r\n0\r\n\r\n"), KEEP),
    "chunk extensions and trailers": (
        get(b"Transfer-Encoding: chunked", body=b'05;a=b;c="d"\r\n12345\r\n00;x\r\nX-Sum: 1\r\nX-B: 2\r\n\r\n'), KEEP),
    "an empty chunked body": (get(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), KEEP),
    "a head just under the bound": (get(b"X-A: " + b"a" * 16_000), KEEP),
}

REFUSED = {
    # the request line
    "HTTP/0.9": (b"GET /next\r\n\r\n", 400),
    "two spaces": (b"GET  /next HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a tab for a space": (b"GET\t/next HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a space at the start": (b" GET /next HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a space at the end": (b"GET /next HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    "a space in the target": (get(target=b"/a b"), 400),
    "a control character in the target": (get(target=b"/a\x7fb"), 400),
    "NUL in the target": (get(target=b"/a\0b"), 400),
    "a target without a slash": (get(target=b"next"), 400),
    "asterisk-form with GET": (get(target=b"*"), 400),
    "a method that is no token": (post(method=b"G(T"), 400),
    "lower-case protocol": (b"GET /next http/1.1\r\n" + HOST + b"\r\n", 400),
    "a version of two digits": (get(version=b"1.11"), 400),
    "a version without a dot": (get(version=b"11"), 400),
    "HTTP/2.0": (get(version=b"2.0"), 505),
    "HTTP/3.0": (get(version=b"3.0"), 505),
    "a percent sign and no hex": (get(target=b"/%zz"), 400),
    "half an encoded byte": (get(target=b"/next%4"), 400),
    "a percent sign at the end": (get(target=b"/next%"), 400),
    "a hex digit with a sign": (get(target=b"/%+4next"), 400),
    "%00": (get(target=b"/next%00"), 400),
    "a long request line": (get(target=b"/" + b"a" * 8300), 414),
    # headers
    "bare LF": (get().replace(b"\r\n", b"\n"), 400),
    "bare LF after a header": (get(b"X-A: 1\nX-B: 2"), 400),
    "bare CR in a value": (get(b"X-A: 1\r2"), 400),
    "bare CR at the end of a value": (get(b"X-A: 1\r"), 400),
    "NUL in a value": (get(b"X-A: 1\0"), 400),
    "a control character in a value": (get(b"X-A: \x01"), 400),
    "obs-fold": (get(b"X-A: 1", b" 2"), 400),
    "obs-fold by tab": (get(b"X-A: 1", b"\t2"), 400),
    "a blank before the first header": (get(host=b" " + HOST), 400),
    "a space before the colon": (get(b"X-A : 1"), 400),
    "a tab before the colon": (get(b"X-A\t: 1"), 400),
    "a header without a colon": (get(b"X-A"), 400),
    "an empty name": (get(b": 1"), 400),
    "a space in a name": (get(b"X A: 1"), 400),
    "a bracket in a name": (get(b"X(A): 1"), 400),
    "a byte over 127 in a name": (get(b"X\xff: 1"), 400),
    "a long head": (get(b"X-A: " + b"a" * 16_500), 431),
    # Host
    "no Host": (get(host=b""), 400),
    "no Host with absolute-form": (get(host=b"", target=b"http://t/next"), 400),
    "Host twice": (get(host=HOST + HOST), 400),
    "Host twice in HTTP/1.0": (get(host=HOST + HOST, version=b"1.0"), 400),
    "Host with a path": (get(host=b"Host: t/next\r\n"), 400),
    "Host with a space": (get(host=b"Host: a b\r\n"), 400),
    "Host with a user": (get(host=b"Host: u@t\r\n"), 400),
    "Host with a port that is none": (get(host=b"Host: t:http\r\n"), 400),
    "Host with an address that is none": (get(host=b"Host: [1:2]\r\n"), 400),
    "absolute-form with an address that is none": (get(target=b"http://[::1::2]/next"), 400),
    "Host with half a bracket": (get(host=b"Host: [::1\r\n"), 400),
    # body framing
    "Content-Length twice": (get(b"Content-Length: 5", b"Content-Length: 6", body=b"12345"), 400),
    "the same Content-Length twice": (get(b"Content-Length: 5", b"Content-Length: 5", body=b"12345"), 400),
    "Content-Length and Transfer-Encoding": (
        get(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    "Content-Length that is no number": (get(b"Content-Length: five"), 400),
    "Content-Length with a plus": (get(b"Content-Length: +5", body=b"12345"), 400),
    "Content-Length below zero": (get(b"Content-Length: -1"), 400),
    "Content-Length with an underscore": (get(b"Content-Length: 1_0", body=b"1234567890"), 400),
    "Content-Length in hex": (get(b"Content-Length: 0x5", body=b"12345"), 400),
    "an empty Content-Length": (get(b"Content-Length:"), 400),
    "different Content-Lengths in a list": (get(b"Content-Length: 5, 6", body=b"12345"), 400),
    "Transfer-Encoding in HTTP/1.0": (get(b"Transfer-Encoding: chunked", version=b"1.0", body=b"0\r\n\r\n"), 400),
    "another coding before chunked": (get(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501),
    # RFC 9112 6.3 wants 400 where chunked is not the last coding, 6.1 wants 501 for an unknown one: this is both.
    "another coding alone": (get(b"Transfer-Encoding: gzip"), 400, 501),
    "a coding that only begins like chunked": (get(b"Transfer-Encoding: chunkedx", body=b"0\r\n\r\n"), 400, 501),
    "a coding after chunked": (get(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"), 400, 501),
    "chunked twice": (get(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 400, 501),
    "a vertical tab before chunked": (get(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), 400),
    **{f"chunked body {body!r}": (get(b"Transfer-Encoding: chunked", body=body), 400) for body in (
        b"x\r\n12345\r\n0\r\n\r\n", b"-5\r\n12345\r\n0\r\n\r\n", b"0x5\r\n12345\r\n0\r\n\r\n", b"1_0\r\n",
        b" 5\r\n12345\r\n0\r\n\r\n", b"\r\n\r\n", b"5\n12345\r\n0\r\n\r\n", b"5\r\n123456\r\n0\r\n\r\n",
        b"5\r\n12345\n0\r\n\r\n", b"5\r\n12345\r\n0\r\n X: 1\r\n\r\n", b"5\r\n12345\r\n0\r\nX : 1\r\n\r\n",
    )},
    "another expectation": (get(b"Expect: a-miracle"), 417),
}

METHODS = {
    **dict.fromkeys(("POST", "PUT", "DELETE", "PATCH", "TRACE"), (405, EITHER)),
    "OPTIONS": (204, KEEP),
    "HEAD": (200, KEEP),
    **dict.fromkeys(("BREW", "get", "Get", "PROPFIND", "GETS", "GE"), (501, EITHER)),
}


def check_framing(response):
    """What holds of every response, whatever it answers."""
    assert response.version == "1.1"
    assert parsedate_to_datetime(response["Date"]).utcoffset().total_seconds() == 0
    assert response["Date"].endswith(" GMT")
    if response.status == 204:
        assert response.get("Content-Length") is None  # RFC 9110 8.6
    else:
        assert "Content-Length" in {name.title() for name in response.headers}


def exchange(server, pieces, behind, method="GET", keep=EITHER):
    """Deliver one request, check what comes back and whether the connection then lives on; return the response."""
    with server.connect() as client:
        client.send(*pieces)
        response = client.response(method)
        check_framing(response)
        assert response.closes == (keep == CLOSE) or keep == EITHER
        if response.closes:
            assert client.at_end(), f"after Connection: close came {client.pending!r}"
        else:
            if not behind:
                client.send(request("/next"))
            assert client.response().body == FILES["next"]
        return response


def each_way(server, raw, **expected):
    for name, pieces in deliveries(raw):
        yield name, exchange(server, pieces, behind="behind" in name, **expected)


@pytest.mark.parametrize("case", ALLOWED)
def test_well_formed_requests_are_answered(server, case):
    raw, keep = ALLOWED[case]
    for how, response in each_way(server, raw, keep=keep):
        assert (response.status, response.body) == (200, FILES["next"]), how


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_requests_are_refused_and_end_the_connection(server, case):
    raw, *expected = REFUSED[case]
    for how, response in each_way(server, raw, keep=EITHER if expected == [417] else CLOSE):
        assert response.status in expected, how
        assert response.body, how


@pytest.mark.parametrize("method", METHODS)
def test_methods(server, method):
    status, keep = METHODS[method]
    for how, response in each_way(server, post(b"Content-Length: 0", method=method.encode()), method=method, keep=keep):
        assert response.status == status, how
        if status in (204, 405):
            allowed = {item.strip() for item in response["Allow"].split(",")}
            assert {"GET", "HEAD"} <= allowed <= {"GET", "HEAD", "OPTIONS"}


def test_connect_is_known_and_not_served(server):
    for _, response in each_way(server, b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"):
        assert response.status == 405
        assert "GET" in response["Allow"]


def test_options_asks_about_the_whole_server(server):
    for _, response in each_way(server, b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n", keep=KEEP):
        assert response.status == 204
        assert "GET" in response["Allow"]


def test_http_1_0_is_told_that_the_connection_stays(server):
    with server.connect() as client:
        client.send(get(b"Connection: keep-alive", version=b"1.0"))
        assert client.response()["Connection"].lower() == "keep-alive"


@pytest.mark.parametrize(("start", "status"), [
    (b"GET /" + b"a" * 9000, 414),
    (b"GET / HTTP/1.1\r\nHost: t\r\nX-A: " + b"a" * 17_000, 431),
    (b"GET / HTTP/1.1\r\nHost: t\r\n" + b"X: 1\r\n" * 3000, 431),
    (b"a" * 20_000, 414),
], ids=["request line", "one header", "many headers", "method"])
def test_a_head_without_end_is_refused_before_it_ends(server, start, status):
    with server.connect() as client:
        client.send(start)
        assert client.response().status in (status, 400)
        assert client.at_end()


def test_a_target_just_under_the_bound_is_looked_up(server):
    assert server.fetch("/" + "a" * 8000).status == 404


@pytest.mark.parametrize("target", ["/next", "/style.css", "/dir", "/nowhere", "/empty.txt", "/%zz"])
def test_head_has_the_headers_of_get(server, target):
    answers = []
    for method in ("GET", "HEAD"):
        response = server.fetch(target, method)
        answers.append((response.status, {k: v for k, v in response.headers.items() if k != "date"}))
    assert answers[0] == answers[1]
    assert server.fetch(target, "HEAD").body == b""


@pytest.mark.parametrize("head", [
    b"HEAD * HTTP/1.1\r\n" + HOST, b"HEAD / HTTP/1.1\r\nX : y\r\n", b"HEAD / HTTP/3.0\r\n", b"HEAD / HTTP/1.1\r\n",
    b"HEAD /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST])
def test_a_refused_head_has_no_content_either(server, head):
    with server.connect() as client:
        client.send(head + b"\r\n")
        section, _, content = client.rest().partition(b"\r\n\r\n")
    assert section.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505 "))
    assert b"\r\nContent-Length: " in section
    assert content == b""


def test_every_split_of_a_pipeline_in_two(server):
    raw = (request("/next")
           + get(b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n", target=b"/dir/page.html")
           + request("/empty.txt", "HEAD") + request("/n/001.txt", connection="close"))
    for at in range(1, len(raw)):
        with server.connect() as client:
            client.send(raw[:at], raw[at:])
            assert client.response().body == FILES["next"], at
            assert client.response().body == FILES["dir/page.html"], at
            assert client.response("HEAD")["Content-Length"] == "0", at
            assert client.response().body == FILES["n/001.txt"], at
            assert client.at_end(), at
