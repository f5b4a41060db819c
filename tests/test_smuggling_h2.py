"""P7 behind front ends that speak HTTP/2 with clients and HTTP/1.1 with tarweb: what HTTP/2 can say and HTTP/1.1 can
say in another way, or not at all, makes no two requests of one. As test_smuggling_fronts.py, with frames."""

import contextlib
from typing import NamedTuple

import pytest
from smuggling import END, INNER, OUTER, SMUGGLED, identified
from support import Client
from test_smuggling_fronts import FRONTS, attacked, by_stream, check_counts

h2_connection = pytest.importorskip("h2.connection")
h2_config = pytest.importorskip("h2.config")
h2_exceptions = pytest.importorskip("h2.exceptions")
h2_events = pytest.importorskip("h2.events")


class Case(NamedTuple):
    headers: list
    body: bytes
    trailers: tuple


def message(*more, body=b"", trailers=(), first=(), **pseudo):
    """A POST with `more` fields, and pseudo-header fields that may be as wrong as the case needs; None: left out."""
    values = {"method": b"POST", "scheme": b"http", "path": OUTER, "authority": b"t", **pseudo}
    headers = [(b":" + name.encode(), value) for name, value in values.items() if value is not None]
    return Case([*first, *headers, *more], body, trailers)


LINES = b"\r\nTransfer-Encoding: chunked\r\nX: y"
SECOND = b"\r\n\r\nGET " + INNER + b" HTTP/1.1\r\nHost: t\r\nX: y"
ENDED = END + SMUGGLED

CASES = {
    # lengths
    **{f"content-length {value!r}": message((b"content-length", value), body=SMUGGLED) for value in (
        b"0", b"5", b"500", b"+37", b"-37", b" 37", b"37 ", b"0x25", b"37, 37", b"37,0", b"", b"3 7", b"037",
        b"37\r\nX: y", b"18446744073709551653", b"37\0", b"\t37", b"37;")},
    "content-length as it is": message((b"content-length", b"%d" % len(SMUGGLED)), body=SMUGGLED),
    "content-length twice": message((b"content-length", b"0"), (b"content-length", b"37"), body=SMUGGLED),
    "no content-length": message(body=SMUGGLED),
    "no content-length, what looks like chunks": message(body=ENDED),
    "no content-length, no body": message(),
    "content-length without a body": message((b"content-length", b"37")),
    "a GET with a body": message(body=SMUGGLED, method=b"GET"),
    "a HEAD with a body": message(body=SMUGGLED, method=b"HEAD"),
    "a GET with a length and no body": message((b"content-length", b"37"), method=b"GET"),
    # fields that are of a connection, or of a coding that HTTP/2 has not
    **{f"transfer-encoding {value!r}": message((b"transfer-encoding", value), body=ENDED) for value in (
        b"chunked", b"Chunked", b" chunked", b"chunked ", b"\tchunked", b"\x0bchunked", b"identity", b"gzip, chunked",
        b"", b"chunked\0", b"chunked\r\n", b"x")},
    **{f"name {name!r}": message((name, b"chunked"), body=ENDED) for name in (
        b"Transfer-Encoding", b"transfer-encoding ", b" transfer-encoding", b"transfer-encoding\t",
        b"transfer-encoding:", b"transfer-encoding: chunked\r\nx", b"x: y\r\ntransfer-encoding",
        b"x\ntransfer-encoding", b"x\rtransfer-encoding",
        b"transfer_encoding", b"\0transfer-encoding", b"transfer\xadencoding", b"x" + SECOND + b"\r\nz",
        b"", b":", b":x", b"x:y")},
    "both": message((b"content-length", b"0"), (b"transfer-encoding", b"chunked"), body=ENDED),
    **{f"{name.decode()}: {value.decode()}": message((name, value), body=SMUGGLED) for name, value in (
        (b"connection", b"transfer-encoding"), (b"connection", b"content-length"), (b"connection", b"close"),
        (b"connection", b"keep-alive"), (b"keep-alive", b"x"), (b"proxy-connection", b"close"), (b"upgrade", b"h2c"),
        (b"te", b"chunked"), (b"te", b"trailers"), (b"expect", b"100-continue"), (b"expect", b"x"),
        (b"trailer", b"host"))},
    # lines within values
    **{f"value {value!r}": message((b"x", value), body=ENDED) for value in (
        b"y" + LINES, b"y" + LINES.replace(b"\r", b""), b"y" + LINES.replace(b"\n", b""), b"y" + SECOND,
        b"\r\n y", b"y\r\n", b"y\n", b"y\r", b"\n", b"y\0z", b"\x01", b"\xff", b" y ", b"\r\n\r\n", b"\n\n")},
    # the request line
    **{f"path {path!r}": message(path=path, body=ENDED) for path in (
        OUTER + b" HTTP/1.1" + LINES, OUTER + b" HTTP/1.1\r\nHost: t" + SECOND, OUTER + b" HTTP/1.0", OUTER + b" x",
        OUTER + b"\t", OUTER + b"\r\n", OUTER + b"\n", OUTER + b"\0", OUTER + b"#a", OUTER + b"\xff", b" " + OUTER,
        b"http://u" + OUTER, OUTER[1:], b"", b"*", b"//u" + OUTER, b"\\" + OUTER)},
    **{f"method {method!r}": message(method=method, body=ENDED) for method in (
        b"GET " + INNER + b" HTTP/1.1" + LINES, b"GET " + INNER, b"GET\r\n", b"GE T", b"G\0T", b"", b"get",
        b"CONNECT", b"PRI", b"GET\t", b"\r\nGET", b"G:T")},
    **{f"scheme {scheme!r}": message(scheme=scheme, body=ENDED) for scheme in (
        b"http://u" + INNER + b"?", b"http\r\nX: y", b"https", b"x", b"", b"http ", b"http" + SECOND)},
    **{f"authority {authority!r}": message(authority=authority, body=ENDED) for authority in (
        b"t" + LINES, b"t" + SECOND, b"t u", b"u@t", b"", b"t/next", b"t\0", b"t,u", b"[::1", b"t:x")},
    **{f"without {name}": message(body=ENDED, **{name: None}) for name in ("method", "path", "scheme", "authority")},
    "a host beside": message((b"host", b"u"), body=ENDED),
    "two hosts": message((b"host", b"t"), (b"host", b"t"), authority=None, body=ENDED),
    "two paths": message(first=[(b":path", INNER)], body=ENDED),
    "two methods": message(first=[(b":method", b"GET")], body=ENDED),
    "two authorities": message(first=[(b":authority", b"u")], body=ENDED),
    "a path behind the fields": message((b"x", b"y"), (b":path", OUTER), path=None, body=ENDED),
    # trailers
    **{f"trailer {name!r} {value!r}": message(body=SMUGGLED, trailers=((name, value),)) for name, value in (
        (b"x", b"y"), (b"content-length", b"0"), (b"transfer-encoding", b"chunked"), (b":path", INNER), (b"host", b"u"),
        (b"x", b"y" + SECOND), (b"x" + SECOND + b"\r\nz", b"y"), (b"X", b"y"), (b"x ", b"y"),
        (b"connection", b"close"))},
}


def identify(case, number):
    """The case with an ID of its own."""
    def each(fields):
        return [(identified(name, number), identified(value, number)) for name, value in fields]

    return Case(each(case.headers), identified(case.body, number), each(case.trailers))


def run(attack, front):
    for number, case in enumerate(CASES.values()):
        case = identify(case, number)
        with Client(front.h2) as client:
            attack.check(case, exchange(client, case, lambda: attack.be_victim(case)))    # noqa: B023
        attack.be_victim(case)


def exchange(client, case, between):
    """Send a message as one stream, call `between` when all but its end is sent, and give what comes back."""
    connection = h2_connection.H2Connection(h2_config.H2Configuration(
        header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False))
    connection.initiate_connection()
    connection.send_headers(1, case.headers, end_stream=not case.body and not case.trailers)
    client.send(connection.data_to_send())
    between()
    if case.body:
        connection.send_data(1, case.body, end_stream=not case.trailers)
    if case.trailers:
        connection.send_headers(1, case.trailers, end_stream=True)
    with contextlib.suppress(OSError):
        client.send(connection.data_to_send())
    return received(client, connection)


OVER = h2_events.StreamEnded, h2_events.StreamReset, h2_events.ConnectionTerminated


def received(client, connection):
    """All bytes of a response, to the end of its stream or of the connection."""
    body = []
    with contextlib.suppress(ConnectionResetError, h2_exceptions.ProtocolError):     # for frames after the end
        while piece := client.sock.recv(1 << 16):
            events = connection.receive_data(piece)
            body += [event.data for event in events if isinstance(event, h2_events.DataReceived)]
            if any(isinstance(event, OVER) for event in events):
                break
    return b"".join(body)


@pytest.fixture(scope="module", params=FRONTS)
def seen(request, tmp_path_factory, pairs):
    return attacked(request.param, tmp_path_factory.mktemp("front"), pairs["p256"], run)


def test_p07_everybody_gets_the_response_to_their_own_request_over_http_2(seen):
    assert seen.wrong == []


def test_p07_tarweb_sees_the_requests_that_the_front_end_sends_over_http_2(seen):
    check_counts(seen)


def test_p07_the_streams_meet_the_victims_on_shared_connections_over_http_2(seen):
    assert seen.connections < len(seen.sent) / 5
    assert len(by_stream(seen.sent)) > 10
