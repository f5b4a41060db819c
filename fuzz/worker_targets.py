"""What one client sends, to a whole worker on the simulated kernel of the tests."""

import re

import machine
import pytest

import http1
from http1 import Body, HttpError
from plan import header_section
from reply import FullResponse, Responder, error_reply
from connection import Limits

WORDS = (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"HEAD /big HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /dir HTTP/1.0\r\n\r\n",
         b"\r\n\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n",
         b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"0\r\n\r\n", b"5\r\nabcde\r\n", b"OPTIONS * ",
         b"POST ", b"Range: bytes=0-9\r\n", b"/one", b"/empty", b"/piece", b"/more", b"/big", b"If-None-Match: *\r\n")
REFUSALS = 400, 414, 431, 501, 505          # of several faults in one request the first to come in is told
FEW = 4                     # connections that there are slots for
SMALL_RING = {"entries": 16, "buffers": 8, "buffer_size": 256}
CONTINUE = re.compile(rb"HTTP/1\.1 100 Continue\r\nServer: tarweb\r\nDate: [^\r]{29}\r\n\r\n")
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+\r\nServer: tarweb\r\nDate: [^\r]{29}\r\n")


def connection(data):
    """Requests of any kind behind each other: the answers are those of the same requests one by one, wherever the cuts
    fall, and of the connection nothing is left."""
    size, stream = 1 + (data[0] if data else 0) * 4, data[1:]
    wanted = answers(stream)
    for pieces in ([stream], [stream[at:at + size] for at in range(0, len(stream), size)]):
        check(converse([piece for piece in pieces if piece]), wanted)


def converse(pieces):
    """What comes back for these pieces, each sent when there is nothing left to do about the one before."""
    with pytest.MonkeyPatch.context() as patch:
        received = []

        def script(kernel, worker):
            client = machine.connect(kernel)
            for piece in pieces:
                client.incoming.append(piece)
                yield from machine.settle(kernel)
            client.eof = True
            yield from machine.settle(kernel)
            received.append(bytes(client.received))
            assert client.closed
            assert worker.connections.live == 0
            assert worker.stale == 0

        machine.perform(script, machine.make_clock(patch), Limits(max_connections=FEW), **SMALL_RING)
    return received[0]


class Archive:
    find = staticmethod(machine.index().get)
    sha256 = staticmethod(lambda rep: None)


RESPONDER = Responder(Archive, b"")


def answers(stream):
    """[Reply] to the requests in `stream`."""
    found = []
    while (stream := http1.skip_empty_lines(stream)) and not (found and found[-1].close):
        try:
            end = http1.find_head(stream, 0)
            if end < 0:
                break
            request, stream = http1.parse_head(stream[:end]), stream[end:]
            request, stream = without_body(request, stream)
        except HttpError as error:
            found.append(error_reply(error.status, error.reason))
            break
        if request is None:
            break
        made = RESPONDER.reply(request)
        found.append(RESPONDER.expand(made) if isinstance(made, FullResponse) else made)
    return found


def without_body(request, stream):
    """The request and what is behind its body; None for it where more has to come. One that is not read is the last."""
    fields = request.fields
    if not request.has_body:
        return request, stream
    reply = RESPONDER.reply(request)
    refused = fields.expect is not None and not isinstance(reply, FullResponse) and reply.status >= 400
    if fields.content_length > http1.MAX_BODY or refused:
        return request._replace(connection=b"close"), b""
    body = Body(fields)
    stream = body.feed(stream)
    return (request if body.done else None), stream


def check(received, wanted):
    """The bytes are those of the wanted replies, but for which fault of a request is told."""
    stream = CONTINUE.sub(b"", received)
    for reply in wanted:
        line = STATUS_LINE.match(stream)
        assert line, f"no response where there should be {reply.status}"
        if reply is wanted[-1] and reply.close and {int(line[1]), reply.status} <= {*REFUSALS}:
            return
        assert int(line[1]) == reply.status
        rest = header_section(reply) + b"".join(span if isinstance(span, bytes) else at(*span) for span in reply.body)
        assert stream[line.end():].startswith(rest)
        stream = stream[line.end() + len(rest):]
    assert stream == b"", "more than was asked for"


def at(address, length):
    start = address - machine.ADDRESS
    return machine.CONTENT[start:start + length]


def connection_seeds():
    get = machine.get
    post, chunked = b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"
    for size in (0, 7, 255):
        yield bytes([size]) + get(b"/") + get(b"/big", b"Range: bytes=0-9,1000-1009\r\n") + get(b"/no")
        yield bytes([size]) + get(b"/one", post, method=b"POST") + b"abcde" + get(b"/one", version=b"1.0")
        yield bytes([size]) + get(b"/big", chunked + b"Expect: 100-continue\r\n") + b"2\r\nab\r\n0\r\n\r\n" + get(b"/x")
    yield b"\1" + get(b"/dir") + b"\r\n" + get(b"/empty", b"Connection: close\r\n") + get(b"/")
    yield b"\2" + get(b"*", method=b"OPTIONS") + get(b"/piece", method=b"HEAD") + b"\x16\3\1"
    yield b"\3" + get(b"/", b"Content-Length: 99999\r\n") + b"abc"
    yield b"\3" + get(b"/no", post + b"Expect: 100-continue\r\n", method=b"PUT") + b"abcde"
