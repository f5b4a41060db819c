"""Request smuggling: the published ways to make two parsers disagree about where a request ends, as one table of byte
streams.

A stream is an OUTER request whose framing is odd, and behind or within its body an INNER one. Who is fooled answers
both, or the wrong one. Their queries hold an ID of four digits, by which a log tells one stream from another.
"""

import re
from typing import NamedTuple

from test_http1 import head

from http1 import MAX_BODY, MAX_CHUNK_LINE, MAX_HEAD, MAX_LINE

OUTER, INNER = b"/next?o0000", b"/next?i0000"
SMUGGLED = head(target=INNER)
END = b"0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
OK, BAD, UNKNOWN_CODING = 200, 400, 501         # the target is there


class Case(NamedTuple):
    raw: bytes
    statuses: tuple             # of all responses; where a request is refused, its status is the last one


def stream(*lines, body=b"", behind=SMUGGLED, statuses=(OK, OK), **more):
    """A case that has one reading: by default, both requests are answered."""
    return Case(head(*lines, target=more.pop("target", OUTER), **more) + body + behind, statuses)


def hidden(*lines, body=b"", **more):
    """The INNER request, or what is left of it, belongs to the body of the OUTER one."""
    return stream(*lines, body=body, behind=b"", statuses=(OK,), **more)


def refused(*lines, body=SMUGGLED, status=BAD, **more):
    return stream(*lines, body=body, behind=b"", statuses=(status,), **more)


def endless(*lines, body=SMUGGLED, **more):
    """The body never ends: nothing is answered."""
    return stream(*lines, body=body, behind=b"", statuses=(), **more)


def length(value):
    return b"Content-Length: %b" % (value if isinstance(value, bytes) else b"%d" % value)


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


# --- who says how long the body is ----------------------------------------------------------------------------------

ALL = length(len(END + SMUGGLED))               # of a body that ends at once for who reads chunks
FIVE = b"abcde"

TWO_LENGTHS = {
    "CL.TE": refused(ALL, CHUNKED, body=END + SMUGGLED),
    "TE.CL": refused(CHUNKED, length(4), body=chunk(SMUGGLED) + END),
    "CL.TE, length 0": refused(length(0), CHUNKED, body=chunk(SMUGGLED) + END),
    "CL.TE in HTTP/1.0": refused(ALL, CHUNKED, body=END + SMUGGLED, version=b"HTTP/1.0"),
    "CL.TE, other fields between": refused(ALL, b"X: y", CHUNKED, b"Z: ", body=END + SMUGGLED),
    "CL.TE, both nominated by Connection": refused(
        ALL, CHUNKED, b"Connection: Content-Length, Transfer-Encoding", body=END + SMUGGLED),
    "CL.TE of a wrong length": refused(length(b"5x"), CHUNKED, body=END + SMUGGLED),
    "CL.TE of an unknown coding": refused(ALL, b"Transfer-Encoding: gzip", body=END + SMUGGLED),
    "CL.TE of an empty coding": refused(ALL, b"Transfer-Encoding:", body=END + SMUGGLED),
    "CL.CL": refused(length(0), length(len(SMUGGLED))),
    "CL.CL, the other way round": refused(length(len(SMUGGLED)), length(0)),
    "CL.CL, equal": refused(length(len(SMUGGLED)), length(len(SMUGGLED))),
    "CL.CL, in other letters": refused(b"content-length: 0", b"CONTENT-LENGTH: %d" % len(SMUGGLED)),
    "CL.CL, one empty": refused(length(b""), length(len(SMUGGLED))),
    **{f"CL {value!r}": refused(length(value)) for value in (
        b"0, 41", b"41, 41", b"41,", b",41", b"0;41", b"+41", b"-41", b"-0", b"4 1", b"41 0", b"4\t1", b"0x29", b"0b1",
        b"051o", b"4_1", b"41.0", b"4e1", b"'41'", b'"41"', b"41\x0b", b"\x0c41", b"\xa041", b"41\x85", b"\xef\xbc\x95",
        b"\xd9\xa5", b"\xc2\xb2", b"18446744073709551616", b"18446744073709551657", b"4294967296" * 2, b"9" * 400, b"",
        b"NaN", b"Infinity", b"0" * 19)},
    "CL 2^32": hidden(length(1 << 32), body=SMUGGLED),
    "CL 10^18 - 1": hidden(length(b"9" * 18), body=SMUGGLED),
    "CL with zeros in front": hidden(length(b"%018d" % len(SMUGGLED)), body=SMUGGLED),
    "CL with blanks around": hidden(b"Content-Length:\t %d \t" % len(SMUGGLED), body=SMUGGLED),
    "CL without a blank": hidden(b"Content-Length:%d" % len(SMUGGLED), body=SMUGGLED),
}

# --- names and values that one takes for what they are not ----------------------------------------------------------

OBSCURED_NAMES = {
    **{f"name {name!r}": refused(name + b": chunked", body=END + SMUGGLED) for name in (
        b"Transfer-Encoding ", b"Transfer-Encoding\t", b" Transfer-Encoding", b"\tTransfer-Encoding",
        b"\0Transfer-Encoding", b"Transfer-Encoding\0", b"\x0bTransfer-Encoding", b"Transfer-Encoding\x0b",
        b"Transfer\rEncoding", b"Transfer-\r\n Encoding", b"Transfer-Encoding\r\n ", b"\rTransfer-Encoding",
        b"\xefTransfer-Encoding", b"Transfer-Encoding\xa0", b"Transfer\xadEncoding", b"Transfer Encoding",
        b"X: y\nTransfer-Encoding", b"X: y\rTransfer-Encoding", b"X: y\r\r\nTransfer-Encoding", b"X\nTransfer-Encoding",
        b":Transfer-Encoding", b"Transfer-Encoding[0]", b'"Transfer-Encoding"', b"Transfer-Encoding(x)",
        b"Transfer-Encoding,X", b"X: y\r\n Transfer-Encoding", b"X: y\r\n\tTransfer-Encoding")},
    **{f"name {name!r} beside CL": refused(name + b": %d" % len(SMUGGLED)) for name in (
        b"Content-Length ", b"Content-Length\t", b" Content-Length", b"Content-Length\0", b"\rContent-Length",
        b"Content Length", b"Content-Length\r\n ", b"X: y\nContent-Length", b"X: y\rContent-Length",
        b"\x00Content-Length", b"X: y\r\n Content-Length")},
    # a name of its own, which is no framing field for anybody who reads names as they are
    **{f"name {name!r} says nothing": stream(name + b": chunked") for name in (
        b"Transfer_Encoding", b"Transfer.Encoding", b"TransferEncoding", b"X-Transfer-Encoding", b"Transfer-Encoding-X",
        b"Transfer-Encodin", b"Content-Encoding", b"TE", b"Trailer", b"Content-Transfer-Encoding",
        b"HTTP_TRANSFER_ENCODING", b"_Transfer-Encoding", b"'Transfer-Encoding'", b"$Transfer-Encoding",
        b"Transfer~Encoding")},
    **{f"name {name!r} says nothing of the length": stream(name + b": 5") for name in (
        b"Content_Length", b"ContentLength", b"X-Content-Length", b"Content-Length-X", b"Content-Lengt",
        b"Content~Length", b"HTTP_CONTENT_LENGTH")},
    "an underscore beside the true one": hidden(b"Content_Length: 0", length(len(SMUGGLED)), body=SMUGGLED),
    "names in any case": hidden(b"tRaNsFeR-eNcOdInG: chunked", body=chunk(SMUGGLED) + END),
}

CODINGS = {
    **{f"TE {value!r}": refused(b"Transfer-Encoding: " + value, body=END + SMUGGLED) for value in (
        b"xchunked", b"chunkedx", b"chunk", b"chunked chunked", b"chunked;q=1", b"chunked;", b"chunked,", b"chunked, ,",
        b"chunked, identity", b"chunked, gzip", b"chunked, chunked", b"chunked,chunked", b"identity", b"gzip", b"cow",
        b"none", b"", b'"chunked"', b"'chunked'", b"chun ked", b"chun\tked", b"chunked\0", b"\0chunked", b"chu\0nked",
        b"\x0bchunked", b"chunked\x0b", b"\x0cchunked", b"\x01chunked", b"chunked\x7f", b"\xa0chunked", b"chunked\x85",
        b"\xc2\xa0chunked", b"chun\xe2\x84\xaaed", b"\xef\xbb\xbfchunked", b"chunked\r", b"chunked\r\n ",
        b"\r\n chunked", b"\r\n\tchunked", b"\nchunked", b"chunked\n", b"x\r\n chunked", b"chunked\r\n\t, identity",
        b"%63hunked", b"=?utf-8?q?chunked?=", b"[chunked]", b"{chunked}", b"(chunked)", b"<chunked>", b"chunked:",
        b": chunked")},
    **{f"TE {value!r} is unknown": refused(b"Transfer-Encoding: " + value, body=END + SMUGGLED, status=UNKNOWN_CODING)
       for value in (b"gzip, chunked", b"identity, chunked", b"identity,chunked", b",chunked", b", chunked",
                     b"cow, chunked")},
    **{f"TE.TE {first!r} and {second!r}": refused(
        b"Transfer-Encoding: " + first, b"Transfer-encoding: " + second, body=END + SMUGGLED, status=status)
       for first, second, status in (
           (b"chunked", b"cow", BAD), (b"cow", b"chunked", UNKNOWN_CODING), (b"chunked", b"chunked", BAD),
           (b"chunked", b"identity", BAD), (b"identity", b"chunked", UNKNOWN_CODING), (b"chunked", b"", BAD),
           (b"", b"chunked", UNKNOWN_CODING), (b"gzip", b"gzip", BAD))},
    "TE in capitals": hidden(b"Transfer-Encoding: CHUNKED", body=chunk(SMUGGLED) + END),
    "TE with tabs around": hidden(b"Transfer-Encoding:\tchunked\t", body=chunk(SMUGGLED) + END),
    "TE without a blank": hidden(b"Transfer-Encoding:chunked", body=chunk(SMUGGLED) + END),
    "TE in HTTP/1.0": refused(CHUNKED, body=END + SMUGGLED, version=b"HTTP/1.0"),
    "TE in HTTP/1.0 that is to stay": refused(
        CHUNKED, b"Connection: keep-alive", body=END + SMUGGLED, version=b"HTTP/1.0"),
    "TE nominated by Connection": stream(CHUNKED, b"Connection: Transfer-Encoding", body=END),
    "CL nominated by Connection": hidden(length(len(SMUGGLED)), b"Connection: content-length", body=SMUGGLED),
}

# --- chunks ----------------------------------------------------------------------------------------------------------


def chunked(body, make=refused, **more):
    return make(CHUNKED, body=body, **more)


CHUNK_LINES = {
    **{f"chunk size {size!r}": chunked(size + b"\r\nabcde\r\n" + END + SMUGGLED) for size in (
        b"0x5", b"0X5", b"+5", b"-5", b" 5", b"\t5", b"5 ", b"5\t", b"5 0", b"5_0", b"5,", b"5.", b"5h", b"g", b"",
        b";a", b" ;a", b"\0005", b"5\0", b"5\x0b", b"\x0c5", b"5\xa0", b"\xef\xbc\x95", b"\xd9\xa5", b'"5"', b"'5'",
        b"%35", b"5\r", b"5\r;a", b"5 x;a", b"05" + b"0" * 16, b"0" * 16 + b"5", b"10000000000000005",
        b"FFFFFFFFFFFFFFFF", b"FFFFFFFFFFFFFFFFFFFFF5", b"8000000000000005", b"5;a\0b", b"5;a\x01", b"5;a\rb", b"5;\r",
        b"5;a\x7f", b"5;a\nb", b"5;\n", b"5\n", b"\n5", b"5;" + b"a" * MAX_CHUNK_LINE)},
    **{f"chunk size {size!r} is five": chunked(size + b"\r\nabcde\r\n" + END, stream) for size in (
        b"5", b"05", b"0" * 14 + b"5", b"5;", b"5;a", b"5;a=b", b'5;a="b;c"', b"5 ;a", b"5\t; a = b", b"5;;;", b"5;0x7",
        b"5;\xff", b'5;a="', b"5;\t")},
    "chunk size in capitals": chunked(b"A\r\n0123456789\r\n" + END, stream),
    "chunk size in small letters": chunked(b"a\r\n0123456789\r\n" + END, stream),
    "chunk size beyond 2^32": chunked(b"100000005\r\nabcde\r\n" + END + SMUGGLED, endless),
    "chunk size that would be negative": chunked(b"80000000\r\nabcde\r\n" + END + SMUGGLED, endless),
    "a quoted CRLF in an extension": chunked(b'5;a="\r\nabcde\r\n' + END, stream),
}

CHUNK_ENDS = {
    **{f"chunk ends {end!r}": chunked(b"5\r\nabcde" + end + END + SMUGGLED) for end in (
        b"", b"\n", b"\r", b"\n\n", b"\r\r", b"\n\r", b"XX", b"X\r\n", b"\rX", b"X\n", b"\r\r\n", b" \r\n", b"\0\0",
        b"0\r\n")},
    "chunk is shorter than it says": chunked(b"6\r\nabcde\r\n" + END + SMUGGLED),
    "chunk is longer than it says": chunked(b"4\r\nabcde\r\n" + END + SMUGGLED),
    "an empty line after a chunk": chunked(chunk(FIVE) + b"\r\n" + END + SMUGGLED),
    "bare LF all through": chunked(b"5\nabcde\n0\n\n" + SMUGGLED),
    "bare CR all through": chunked(b"5\rabcde\r0\r\r" + SMUGGLED),
    **{f"last chunk {last!r}": chunked(chunk(FIVE) + last + SMUGGLED) for last in (
        b"0\n\n", b"0\n\r\n", b"0\r\n\n", b"0\r\r\n\r\n", b"-0\r\n\r\n", b"+0\r\n\r\n", b"0x0\r\n\r\n", b" 0\r\n\r\n",
        b"0 \r\n\r\n", b"0;\n\r\n", b"0" * 16 + b"\r\n\r\n", b"\r\n\r\n", b"\r\n0\r\n\r\n", b"0\r\n\r", b"0\r\n \r\n",
        b"0\r\n\0\r\n")},
    **{f"last chunk {last!r} is one": chunked(chunk(FIVE) + last, stream) for last in (
        b"0\r\n\r\n", b"00\r\n\r\n", b"000;a=b\r\n\r\n", b"0 ;a\r\n\r\n")},
    "no last chunk": chunked(chunk(SMUGGLED), endless),
    "a last chunk without an end": chunked(b"0\r\n", endless),
    "a last chunk within data": chunked(chunk(END + SMUGGLED) + END, hidden),
    "an empty line between two requests": chunked(END + b"\r\n", stream),
}

TRAILERS = {
    **{f"trailer {line!r}": chunked(chunk(FIVE) + b"0\r\n" + line + b"\r\n\r\n" + SMUGGLED) for line in (
        b"X", b"X : y", b" X: y", b"\tX: y", b"X: y\r\n z", b"X: y\r\n\tz", b"X: y\nZ: z", b"X: y\rZ: z", b"X: \0",
        b"X\0: y", b": y", b"X Y: z", b"X: \x01", b"X: y\n", b"X: y\r", b"GET /next?i0000 HTTP/1.1",
        b"X: " + b"a" * MAX_CHUNK_LINE)},
    **{f"trailer {line!r} says nothing": chunked(chunk(FIVE) + b"0\r\n" + line + b"\r\n\r\n", stream) for line in (
        b"X: y", b"Content-Length: 500", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Host: u",
        b"Connection: keep-alive", b"Trailer: Content-Length", b"Content-Length: x\r\nContent-Length: y", b"Expect: x",
        b"Range: bytes=0-0")},
    "a trailer announced": stream(CHUNKED, b"Trailer: Content-Length", body=b"0\r\nContent-Length: 41\r\n\r\n"),
}

# --- requests that should have no body, or whose body nobody wants ---------------------------------------------------

SIZE = length(len(SMUGGLED))
UNWANTED = {
    "CL.0 by GET": hidden(SIZE, body=SMUGGLED),
    "CL.0 by POST": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(405,), method=b"POST"),
    "CL.0 by OPTIONS": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(204,), method=b"OPTIONS"),
    "CL.0 by DELETE": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(405,), method=b"DELETE"),
    "CL.0 by TRACE": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(405,), method=b"TRACE"),
    "CL.0 by CONNECT": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(405,), method=b"CONNECT", target=b"t:443"),
    "CL.0 by an unknown method": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(501,), method=b"BREW"),
    "CL.0 of what is not there": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(404,), target=b"/gone?o0000"),
    "CL.0 of a redirect": stream(SIZE, body=SMUGGLED, behind=b"", statuses=(301,), target=b"/dir?o0000"),
    "CL.0 of a failing condition": stream(SIZE, b'If-Match: "x"', body=SMUGGLED, behind=b"", statuses=(412,)),
    "CL.0 of a range": stream(SIZE, b"Range: bytes=0-0", body=SMUGGLED, behind=b"", statuses=(206,)),
    "CL.0 of a range that is none": stream(SIZE, b"Range: bytes=99-", body=SMUGGLED, behind=b"", statuses=(416,)),
    "CL.0 in HTTP/1.0 that is to stay": hidden(
        SIZE, b"Connection: keep-alive", body=SMUGGLED, version=b"HTTP/1.0"),
    "TE.0 by GET": hidden(CHUNKED, body=chunk(SMUGGLED) + END),
    "TE.0 by OPTIONS": stream(
        CHUNKED, body=chunk(SMUGGLED) + END, behind=b"", statuses=(204,), method=b"OPTIONS"),
    "0.CL": stream(length(0)),
    "a length of 0, spelled long": stream(length(b"0" * 18)),
    "no length at all": stream(),
    "no length at all by POST": stream(method=b"POST", statuses=(405, OK)),
    "HTTP/1.0 that does not stay": hidden(body=SMUGGLED, version=b"HTTP/1.0"),
    "Connection: close": hidden(b"Connection: close", body=SMUGGLED),
    "a body that is too long to be read": stream(
        length(MAX_BODY + 1), body=SMUGGLED * (MAX_BODY // len(SMUGGLED)), statuses=(OK,)),
    "chunks that are too long to be read": chunked(
        b"%x\r\n%b" % (MAX_BODY * 2, SMUGGLED * (MAX_BODY // len(SMUGGLED) + 2)), hidden),
    "Expect": stream(SIZE, b"Expect: 100-continue", body=SMUGGLED, statuses=(OK, OK)),
    "Expect with chunks": stream(CHUNKED, b"Expect: 100-continue", body=chunk(SMUGGLED) + END),
    "Expect of what is refused anyhow": stream(
        SIZE, b"Expect: 100-continue", body=SMUGGLED, statuses=(405,), method=b"POST"),
    "Expect of what is not there": stream(
        SIZE, b"Expect: 100-continue", body=SMUGGLED, statuses=(404,), target=b"/gone?o0000"),
    "Expect of something else": stream(SIZE, b"Expect: 100-continued", body=SMUGGLED, statuses=(417,)),
    "Expect in two fields": stream(SIZE, b"Expect: 100-continue", b"Expect: 100-continue", body=SMUGGLED),
    "Expect after an empty member": stream(SIZE, b"Expect: ,100-continue", body=SMUGGLED),
    "Expect of nothing": stream(SIZE, b"Expect: ,", body=SMUGGLED),
    "Expect twice": stream(SIZE, b"Expect: 100-continue", b"Expect: x", body=SMUGGLED, statuses=(417,)),
    "Expect on a second line": refused(SIZE, b"Expect:\r\n 100-continue"),
    "Expect in HTTP/1.0": hidden(SIZE, b"Expect: 100-continue", body=SMUGGLED, version=b"HTTP/1.0"),
    "Expect without a body": stream(b"Expect: 100-continue"),
}

# --- all around the framing fields -----------------------------------------------------------------------------------

AROUND = {
    "HTTP/0.9": Case(b"GET /next?o0000\r\n" + SMUGGLED, (BAD,)),
    "HTTP/0.9 and an empty line": Case(b"GET /next?o0000\r\n\r\n" + SMUGGLED, (BAD,)),
    "HTTP/0.9 by a version": refused(version=b"HTTP/0.9", status=505),
    "HTTP/1.0 with lengths in a list": refused(length(b"0, 41"), version=b"HTTP/1.0"),
    "the preface of HTTP/2": Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED, (505,)),
    "the preface of HTTP/2 after a request": Case(
        head(target=OUTER) + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED, (OK, 505)),
    "Upgrade: h2c": stream(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAAQAAP__"),
    "Upgrade: h2c with a body": hidden(
        b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__", SIZE,
        body=SMUGGLED),
    "Upgrade: websocket": stream(
        b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: " + b"A" * 22 + b"=="),
    "CONNECT opens no tunnel": stream(method=b"CONNECT", target=b"t:443", host=b"Host: t:443", statuses=(405, OK)),
    "CONNECT of a path": refused(method=b"CONNECT", target=b"/next?o0000 x"),
    "absolute-form against Host": stream(target=b"http://u/next?o0000"),
    "absolute-form with a user": refused(target=b"http://t@u/next?o0000"),
    "absolute-form without Host": refused(target=b"http://t/next?o0000", host=b"X: y"),
    "absolute-form with an address that is none": refused(target=b"http://[1:2]/next?o0000"),
    "bytes over 127 in the target": stream(target=b"/next?o0000\xc3\xa9"),
    "bytes over 127 after the target": refused(target=b"/next?o0000 \xa0"),
    "Host with an address that is none": refused(host=b"Host: [::1::2]"),
    "Host twice": refused(b"Host: u"),
    "Host on two lines": refused(b" u"),
    "Host in a list": stream(host=b"Host: t,u"),
    "no Host": refused(host=b"X: y"),
    "empty lines in front": stream()._replace(raw=b"\r\n\r\n" + stream().raw),
    "an empty line between": stream(body=b"\r\n"),
    "bare LF in front": Case(b"\n" + stream().raw, (BAD,)),
    "bare CR in front": Case(b"\r" + stream().raw, (BAD,)),
    "a blank in front": Case(b" " + stream().raw, (BAD,)),
    "NUL in front": Case(b"\0" + stream().raw, (BAD,)),
    "a field in front": Case(b"X: y\r\n" + stream().raw, (BAD,)),
    "bare LF between": stream(body=b"\n", statuses=(OK, BAD)),
    "bare LF ends the head": Case(head(target=OUTER)[:-4] + b"\n\n" + SMUGGLED, (BAD,)),
    "bare LF ends the last field": Case(head(target=OUTER)[:-4] + b"\n\r\n" + SMUGGLED, (BAD,)),
    "CR CR LF ends the head": Case(head(target=OUTER)[:-4] + b"\r\r\n\r\n" + SMUGGLED, (BAD,)),
    "bare CR ends the head": Case(head(target=OUTER)[:-4] + b"\r\r" + SMUGGLED, (BAD,)),
    "a blank line ends the head": refused(b" \r\n"),
    "a request as a field": refused(SMUGGLED[:-4]),
    "a request in a value": stream(b"X: " + SMUGGLED.split(b"\r\n")[0]),
    "a request in the target": Case(
        head(target=OUTER + b" HTTP/1.1\r\nHost: t\r\n\r\nGET " + INNER + b" x"), (OK, BAD)),
    "a request in the version": refused(version=b"HTTP/1.1 HTTP/1.1"),
    "a request after a refused one": Case(head(target=OUTER) + head(b"X") + SMUGGLED, (OK, BAD)),
    "a request after two refused ones": Case(head(b"X") + head(b" ") + SMUGGLED, (BAD,)),
    "a request after one that is too long": refused(b"X: " + b"a" * MAX_HEAD, status=431),
    "a request after a target that is too long": refused(target=b"/" + b"a" * MAX_LINE, status=414),
    "a request after a body that is refused": Case(
        head(target=OUTER) + head(CHUNKED) + b"x\r\n" + SMUGGLED, (OK, BAD)),
    "a response": Case(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + SMUGGLED, (BAD,)),
    "a chunk": Case(chunk(FIVE) + END + SMUGGLED, (BAD,)),
}

CASES = TWO_LENGTHS | OBSCURED_NAMES | CODINGS | CHUNK_LINES | CHUNK_ENDS | TRAILERS | UNWANTED | AROUND


# --- at a socket ---------------------------------------------------------------------------------------------------


def answers(client, method="GET"):
    """The responses to all that has been sent, with that method, until the server ends the connection."""
    client.half_close()
    found = []
    while not client.at_end():
        found.append(client.response(method))
    return found


def identified(raw, number):
    """`raw` with an ID of its own."""
    return re.sub(rb"(?<=\?[oi])0000", b"%04d" % number, raw)
