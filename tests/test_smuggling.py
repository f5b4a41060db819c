"""P7: a message whose framing can be read in two ways is refused, and its connection ends.

The table is in smuggling.py; what a generator makes of its pieces is read by tarweb and by h11, which have to agree,
but where tarweb refuses for one of the reasons below. Behind nginx and HAProxy: test_smuggling_fronts.py. Of heads
alone there is more in test_http1.py and test_http1_properties.py.
"""

import json
import re
from typing import NamedTuple

import pytest
import test_http
import test_http1
from hypothesis import example, given
from hypothesis import strategies as st
from smuggling import CASES, END, SMUGGLED, answers, chunk, identified, stream
from support import FILES, build_tar
from test_http1 import head
from test_http1_properties import MORE, PLACES, REFUSED, SPACE_BEFORE_EXTENSION, examples, h11_read, stricter

import http1
from http1 import MAX_CHUNK_LINE, MAX_HEAD, MAX_LINE, Body, HttpError, skip_empty_lines

HEADS = {f"{name} (parser)": case for name, case in test_http1.REFUSED.items()} | {
    f"{name} (socket)": case[:2] for name, case in test_http.REFUSED.items() if case[1] != 417}


# --- two readers ---------------------------------------------------------------------------------------------------

CLOSED = "closed"


class Reading(NamedTuple):
    """Where each request that is complete ends, in bytes from the start of a stream, and what is then: MORE is waited
    for, the connection is CLOSED, or the next request is REFUSED (by tarweb: with a status)."""

    ends: list
    then: object


def tarweb_reads(raw):
    """What tarweb's parser makes of a stream, called as a connection calls it."""
    ends, left = [], raw
    try:
        while True:
            left = skip_empty_lines(left)
            size = http1.find_head(left, 0)
            if size < 0:
                return Reading(ends, MORE)
            request, left = http1.parse_head(left[:size]), left[size:]
            if request.has_body:
                body = Body(request.fields)
                left = body.feed(left)
                if not body.done:
                    return Reading(ends, MORE)
            ends.append(len(raw) - len(left))
            if request.connection == b"close":
                return Reading(ends, CLOSED)
    except HttpError as error:
        return Reading(ends, error.status)


def h11_reads(raw):
    """What h11 makes of it. (It knows no empty lines in front, and no HTTP/1.0 that stays: both are seen to here.)"""
    ends, left = [], raw
    while True:
        left = skip_empty_lines(left)
        found = h11_read(left) if left else MORE
        if found in (MORE, REFUSED):
            return Reading(ends, found)
        request, _, left = found
        if left in (MORE, REFUSED):
            return Reading(ends, left)
        ends.append(len(raw) - len(left))
        if closes(request):
            return Reading(ends, CLOSED)


def closes(request):
    """Whether a connection ends with an h11.Request (RFC 9112 section 9.3)."""
    options = {option.strip().lower() for name, value in request.headers if name == b"connection"
               for option in value.split(b",")}
    return b"close" in options or request.http_version < b"1.1" and b"keep-alive" not in options


# --- at the socket -------------------------------------------------------------------------------------------------


def ways(raw):
    """The ways in which a stream can arrive: at once, byte by byte, and cut within its lines' ends.

    Who says that the connection is to close and sends on has to do it at once: what comes later meets a closed socket,
    and the reset that answers it can overtake the response (RFC 9112 section 9.6).
    """
    yield [raw]
    if tarweb_reads(raw).then is not CLOSED:
        yield [raw[i:i + 1] for i in range(len(raw))] if len(raw) < 2000 else [raw[:1000], raw[1000:]]
        yield re.split(rb"(?<=\r)", raw)


@pytest.mark.parametrize("case", CASES)
def test_p07_each_published_way(server, case):
    """However the bytes come, the responses are the same, and after a refusal there is none."""
    raw, expected = CASES[case]
    for pieces in ways(raw):
        with server.connect() as client:
            client.send(*pieces)
            found = answers(client)
        assert tuple(response.status for response in found) == expected
        assert all(response.closes for response in found if response.status in (400, 414, 417, 431, 505))


@pytest.mark.parametrize("case", HEADS)
def test_p07_what_follows_a_refused_head_is_never_answered(server, case):
    raw, status = HEADS[case]
    with server.connect() as client:
        client.send(raw + SMUGGLED)
        found = answers(client, "HEAD" if raw.startswith(b"HEAD ") else "GET")
    assert [response.status for response in found] == [status]
    assert found[0].closes


def test_p07_the_log_has_a_line_for_each_response_and_no_other(start, tmp_path):
    tar = build_tar(tmp_path / "site.tar", {"next": FILES["next"], "dir/index.html": b""})
    server = start(tar, "--access-log", str(tmp_path / "log"), "--log-format", "json")
    expected = []
    for number, (raw, statuses) in enumerate(CASES.values()):
        with server.connect() as client:
            client.send(identified(raw, number))
            answers(client)
        expected += [(number, status) for status in statuses]
    server.stop()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["status"] for line in lines] == [status for _, status in expected]
    for line, (number, _) in zip(lines, expected, strict=True):
        assert set(re.findall(r"\?[oi](\d{4})", line["target"])) <= {f"{number:04}"}


def test_p07_a_body_that_comes_too_late_is_not_a_request(start, tmp_path):
    """Who gives up on a body (408) has closed: the rest of it, an INNER request, reaches nobody."""
    server = start(build_tar(tmp_path / "site.tar", {"next": b"next"}), "--header-timeout", "1")
    with server.connect() as client:
        client.send(head(b"Content-Length: %d" % len(SMUGGLED), target=b"/next"))
        response = client.response()
        client.send(SMUGGLED)
        assert (response.status, response.closes, client.rest()) == (408, True, b"")


@pytest.mark.parametrize("target", ["/next", "/dir", "/gone", "/dir/", "/empty.txt", "/large.bin", "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "BREW"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_p07_nobody_leaves_a_body_for_the_next_request(server, method, target, chunked):
    """CL.0 and TE.0: whatever answers, it has read the body or it ends the connection."""
    if target == "*" and method != "OPTIONS":
        return
    fields = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(SMUGGLED)
    body = chunk(SMUGGLED) + END if chunked else SMUGGLED
    with server.connect() as client:
        client.send(head(fields, method=method.encode(), target=target.encode()) + body + head(target=b"/dir?after"))
        client.half_close()
        first = client.response(method)
        if not first.closes:
            assert client.response()["Location"].endswith("/dir/?after")
        assert client.at_end()


# --- beside h11 ----------------------------------------------------------------------------------------------------

LIMITS = {
    "a request line of more than 8 KiB": rb"^[^\r\n]{%d}" % (MAX_LINE + 1),
    "a head of more than 16 KiB": rb"(?s)^.{%d}" % (MAX_HEAD + 1),
}
BODY_REASONS = {  # why tarweb refuses a body that h11 reads: stricter() has the reasons for heads
    "blanks end a chunk size": rb"(?m)^[\da-fA-F]+[ \t]+\r?$",
    "a chunk size of more than 15 digits": rb"[\da-fA-F]{16}",
    "a control character in a line": rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)",
    "a line that ends with bare LF": rb"(?<!\r)\n",
    "a trailer field on two lines": rb"\n[ \t]",
    "a line of more than 1 KiB": rb"[^\n]{%d}" % MAX_CHUNK_LINE,
}
LENIENT = {  # what tarweb reads and h11 does not
    "a blank before a chunk extension (RFC 9112 section 7.1.1 allows it)": SPACE_BEFORE_EXTENSION.pattern,
    "bytes over 127 in a target (they count as if percent-encoded)": rb"^[!-~]+ [!-~]*[\x80-\xff]",
    "framing fields in a trailer (RFC 9110 section 6.5.1: ignored)":
        rb"(?i)\n0+(;[^\n]*)?\r\n([^\n]+\r\n)*(content-length|transfer-encoding|host)[ \t]*:",
}


def reasons(table, raw):
    return {reason for reason, pattern in table.items() if re.search(pattern, raw)}


def check(raw):
    """Both see the same ends of requests, up to where tarweb refuses for a reason that is known."""
    ours, theirs = tarweb_reads(raw), h11_reads(raw)
    common = min(len(ours.ends), len(theirs.ends))
    assert ours.ends[:common] == theirs.ends[:common]
    left = skip_empty_lines(raw[ours.ends[common - 1]:] if common else raw)
    if len(theirs.ends) > common:
        assert isinstance(ours.then, int), "waited for what has come"
        request, behind, after = h11_read(left)
        size = len(left) - len(behind)
        head, body = left[:size], left[size:len(left) - len(after)]
        assert stricter(head, request) or reasons(LIMITS, head) or reasons(BODY_REASONS, body)
    elif len(ours.ends) > common:
        assert theirs.then is REFUSED and reasons(LENIENT, left)
    elif ours.then is MORE:
        assert theirs.then in (MORE, REFUSED)


@pytest.mark.parametrize("case", CASES)
def test_p07_h11_sees_the_same_ends_in_each_published_way(case):
    check(CASES[case].raw)


NAMES = st.sampled_from([b"Content-Length", b"Transfer-Encoding"] * 6 + [
    b"content-length", b"TRANSFER-ENCODING", b"Content_Length", b"Transfer_Encoding", b" Content-Length",
    b"X\nContent-Length",
    b"Transfer-Encoding\0", b"X: y\r\n Transfer-Encoding", b"X", b"Connection", b"Host", b"Trailer", b"TE"])
COLONS = st.sampled_from([b": "] * 8 + [b":", b":\t", b" : ", b"\t:", b":  ", b": \x0b", b":\r\n "])
VALUES = st.sampled_from([b"chunked"] * 6 + [b"%d" % size for size in (0, 3, 5, 10, len(SMUGGLED))] * 2 + [
    b"005", b"5, 5", b"+5", b"5 ", b"0x5", b"5_0", b"-5", b"99", b"18446744073709551621", b"Chunked", b"chunked ",
    b"chunked,",
    b"xchunked", b"gzip, chunked", b"chunked, chunked", b"chunked\r", b"close", b"keep-alive", b"content-length", b""])
LINE_ENDS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b" \r\n", b"\r\n "])
FIELDS = st.tuples(NAMES, COLONS, VALUES, LINE_ENDS).map(b"".join)
CHUNKED_PIECES = st.sampled_from([
    chunk(b"abc"), chunk(SMUGGLED), END, b"0\r\n", b"00;a\r\n", b"\r\n", b"\n", b"\r", b"3\r\nabc", b"3\r\nabcd\r\n",
    b"3 ;a\r\nabc\r\n", b"3 \r\nabc\r\n", b"3;a\nb\r\nabc\r\n", b"0x3\r\nabc\r\n", b"X: y\r\n",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b" y\r\n", b"-3\r\nabc\r\n",
    b"fffffffffffffffff3\r\nabc\r\n", b"3\nabc\n", b"abc",
    b"3;" + b"\xff" * 9 + b"\r\nabc\r\n", b"12345"])
BODIES = st.lists(CHUNKED_PIECES, max_size=5).map(b"".join)
STARTS = st.sampled_from([b"GET /next HTTP/1.1\r\nHost: t\r\n"] * 3 + [
    b"POST /next HTTP/1.1\r\nHost: t\r\n", b"GET /next HTTP/1.0\r\n",
    b"GET /next HTTP/1.0\r\nConnection: keep-alive\r\n", b"GET /next HTTP/1.1\nHost: t\r\n",
    b"GET http://u/next HTTP/1.1\r\nHost: t\r\n",
    b"\r\nGET /next HTTP/1.1\r\nHost: t\r\n"])
MESSAGES = st.tuples(STARTS, st.lists(FIELDS, max_size=3).map(b"".join), st.sampled_from([b"\r\n"] * 8 + [b"\n"]),
    BODIES)
STREAMS = st.lists(MESSAGES.map(b"".join) | st.just(SMUGGLED), min_size=1, max_size=4).map(b"".join)


@examples(600)
@given(STREAMS)
@example(stream(b"Transfer-Encoding: chunked", body=b"0 ;a\r\n\r\n").raw)
def test_p07_h11_sees_the_same_ends_in_generated_streams(raw):
    check(raw)


@examples(200)
@given(STREAMS, st.lists(PLACES, max_size=3))
def test_p07_the_server_answers_what_the_parser_reads(shared_server, raw, places):
    """Cut anywhere, one response for each request that is complete, and one that refuses what cannot be read."""
    expected = tarweb_reads(raw)
    places = () if expected.then is CLOSED else places      # see ways()
    cuts = sorted({place % (len(raw) + 1) for place in places} | {0, len(raw)})
    with shared_server.connect() as client:
        client.send(*(raw[at:end] for at, end in zip(cuts, cuts[1:], strict=False)))
        statuses = [response.status for response in answers(client)]
    refusal = [expected.then] if isinstance(expected.then, int) else []
    assert len(statuses) == len(expected.ends) + len(refusal)
    assert statuses[len(expected.ends):] == refusal


def test_p07_the_generator_makes_streams_of_every_kind():
    """What it makes is read to an end, refused and waited for, and differs from h11's reading, each often enough."""
    seen = {"equal": 0, "refused": 0, "more": 0, "stricter": 0, "several": 0}

    @examples(200)
    @given(STREAMS)
    def count(raw):
        ours, theirs = tarweb_reads(raw), h11_reads(raw)
        seen["equal"] += ours.ends == theirs.ends != []
        seen["refused"] += isinstance(ours.then, int)
        seen["more"] += ours.then is MORE
        seen["stricter"] += len(ours.ends) < len(theirs.ends)
        seen["several"] += len(ours.ends) > 1

    count()
    assert all(number >= 5 for number in seen.values()), seen
