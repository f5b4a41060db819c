"""What each request gets, without a server: a small archive in memory, and answers put together by hand."""

import email
import email.policy
import hashlib
import html
import itertools
import re
from urllib.parse import quote, urljoin, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import request as raw_request

import http1
from archive import Redirect, Representation, Resource
from plan import header_section
from reply import (
    MAX_RANGES, PART_GAP, FullResponse, Reply, Responder, error_reply, matches, parse_ranges, select,
)

MTIME = 784111777
DATE, BEFORE, AFTER = (http1.format_date(MTIME + days * 86400).decode() for days in (0, -1, 1))
CACHE = b"Cache-Control: max-age=60\r\n"
BYTES = bytes(range(256)) * 64                  # the archive: what offsets in the spans point into


def stored(offset, length, coding="", kind=b"text/plain", etag=None):
    etag = b'"%d-%d"' % (offset, length) if etag is None else etag
    return Representation(offset, length, MTIME, coding, kind, etag)


PLAIN = stored(100, 1000, etag=b'"tag"')
PACKED = Resource(stored(2000, 500), (stored(2500, 100, "br"), stored(2600, 200, "zstd"), stored(2800, 700, "gzip")))
SITE = {
    b"/plain": Resource(PLAIN, ()),
    b"/packed": PACKED,
    b"/empty": Resource(stored(4000, 0), ()),
    b"/untagged": Resource(stored(4000, 50, etag=b""), ()),
    b"/dir": Redirect(b"/dir/"),
    b"/dir/": Resource(stored(5000, 10, kind=b"text/html"), ()),
}
PAGE = Resource(stored(6000, 60, kind=b"text/html"), (stored(6100, 30, "gzip", b"text/html"),))


class Contents:
    """As much of an archive as a Responder asks for."""

    def __init__(self, paths):
        self.find = paths.get

    def sha256(self, rep):
        return hashlib.sha256(content(rep)).digest() if rep.etag else None


RESPONDER = Responder(Contents(SITE), b"max-age=60")


def ask(target, method="GET", responder=RESPONDER, version="1.1", **headers):
    """The Reply to a request, expanded; header names are written with _ for -."""
    raw = raw_request(target, method, **headers).replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1)
    reply = responder.reply(http1.parse_head(raw))
    return responder.expand(reply) if isinstance(reply, FullResponse) else reply


def fields(reply):
    """The header fields of a Reply, after a look at their form in HTTP/1.1."""
    head = header_section(reply)
    assert re.fullmatch(rb"(?:[A-Za-z-]+: [!-~](?:[ -~]*[!-~])?\r\n)*\r\n", head)
    pairs = [line.split(": ", 1) for line in head.decode().split("\r\n")[:-2]]
    assert len(dict(pairs)) == len(pairs), f"a field appears twice: {pairs}"
    return dict(pairs)


def body(reply):
    """The bytes of a Reply's body, spans of the archive included."""
    spans = (span if isinstance(span, bytes) else BYTES[span[0]:span[0] + span[1]] for span in reply.body)
    return b"".join(spans)


def content(chosen):
    return BYTES[chosen.offset:chosen.offset + chosen.length]


# --- 200

def test_a_whole_file():
    reply = ask("/plain")
    assert fields(reply) == {
        "Content-Type": "text/plain", "X-Content-Type-Options": "nosniff", "Content-Length": "1000", "ETag": '"tag"',
        "Last-Modified": DATE, "Cache-Control": "max-age=60", "Accept-Ranges": "bytes"}
    assert (reply.status, reply.body, reply.close) == (200, ((100, 1000),), False)


def test_a_whole_variant():
    reply = ask("/packed", accept_encoding="gzip, br")
    assert fields(reply) == {
        "Content-Type": "text/plain", "X-Content-Type-Options": "nosniff", "Content-Encoding": "br",
        "Vary": "Accept-Encoding", "Content-Length": "100", "ETag": '"2500-100"', "Last-Modified": DATE,
        "Cache-Control": "max-age=60", "Accept-Ranges": "bytes"}
    assert reply.body == ((2500, 100),)


def test_the_plain_file_varies_too_where_it_has_variants():
    assert fields(ask("/packed"))["Vary"] == "Accept-Encoding"
    assert "Content-Encoding" not in fields(ask("/packed"))


def test_without_etags_and_cache_control_there_are_no_such_fields():
    reply = ask("/untagged", responder=Responder(Contents(SITE), b""))
    assert not {"ETag", "Cache-Control"} & set(fields(reply))
    assert fields(reply)["Last-Modified"] == DATE


def test_a_full_response_is_not_expanded_until_asked():
    for method, head_only in (("GET", False), ("HEAD", True)):
        full = RESPONDER.reply(http1.parse_head(raw_request("/packed", method, connection="close")))
        assert full == FullResponse(PACKED.plain, True, b"close", head_only)
        assert RESPONDER.expand(full).status == 200


# Accept-Encoding -> offset of what is sent of /packed: plain 500, br 100, zstd 200, gzip 700 bytes long
CHOICES = {
    None: 2000, "": 2000, "br": 2500, "zstd": 2600, "gzip": 2000, "gzip, br, zstd": 2500, "zstd, gzip": 2600, "*": 2500,
    "br;q=0.1, zstd;q=1": 2500, "br;q=0, *": 2600, "identity;q=0, gzip": 2800, "identity;q=0, *": 2500, "deflate": 2000,
    "gzip, *;q=0": 2800, "identity": 2000, "nonsense;;": 2000,
}


@pytest.mark.parametrize("value", CHOICES)
def test_the_smallest_acceptable_representation_is_chosen(value):
    headers = {} if value is None else {"accept_encoding": value}
    assert ask("/packed", **headers).body[0][0] == CHOICES[value]


def test_a_variant_as_long_as_the_file_is_not_chosen():
    for length, chosen in ((499, "gzip"), (500, ""), (501, "")):
        resource = Resource(stored(0, 500), (stored(1000, length, "gzip"),))
        assert select(resource, {"", "gzip"}).coding == chosen
        assert select(resource, {"gzip"}).coding == "gzip"
        assert select(resource, {"br"}) is None


@pytest.mark.parametrize(("target", "vary"), [("/packed", "Accept-Encoding"), ("/plain", None)])
def test_nothing_acceptable(target, vary):
    reply = ask(target, accept_encoding="identity;q=0", if_none_match="*", range="bytes=0-")
    assert (reply.status, fields(reply).get("Vary")) == (406, vary)


# --- preconditions (RFC 9110 section 13.2.2): every combination against the order the RFC gives

MATCH = {"": None, '"tag"': True, '"x"': False, "*": True, 'W/"tag"': False, '"x" , "tag"': True, "tag": False}
UNMODIFIED = {"": None, DATE: True, AFTER: True, BEFORE: False, "never": None}
NONE_MATCH = {"": None, '"tag"': False, '"x"': True, "*": False, 'W/"tag"': False, '"x",W/"tag"': False, "tag": True}
MODIFIED = {"": None, DATE: False, AFTER: True, BEFORE: True, "never": None}


def expected_status(if_match, if_unmodified, if_none_match, if_modified):
    """Steps 1 to 4; each is True, False, or None where the field is missing or cannot be read."""
    if MATCH[if_match] is False or not if_match and UNMODIFIED[if_unmodified] is False:
        return 412
    if NONE_MATCH[if_none_match] is False or not if_none_match and MODIFIED[if_modified] is False:
        return 304
    return 200


@pytest.mark.parametrize("if_match", MATCH)
@pytest.mark.parametrize("if_none_match", NONE_MATCH)
def test_preconditions_in_their_order(if_match, if_none_match):
    for if_unmodified, if_modified in itertools.product(UNMODIFIED, MODIFIED):
        headers = {"if_match": if_match, "if_unmodified_since": if_unmodified, "if_none_match": if_none_match,
                   "if_modified_since": if_modified}
        given_ones = {name: value for name, value in headers.items() if value}
        status = expected_status(if_match, if_unmodified, if_none_match, if_modified)
        assert ask("/plain", **given_ones).status == status, given_ones
        assert ask("/plain", "HEAD", **given_ones).status == status, given_ones
        ranged = ask("/plain", range="bytes=0-4", **given_ones).status
        assert ranged == (206 if status == 200 else status), given_ones


@pytest.mark.parametrize(("value", "strong", "weak"), [
    (b'"tag"', True, True), (b'W/"tag"', False, True), (b'w/"tag"', False, False), (b'"tag', False, False),
    (b'tag"', False, False), (b"tag", False, False), (b"", False, False), (b"*", True, True), (b"*, *", True, True),
    (b",* ,,\t*,", True, True), (b'"*"', False, False), (b"**", False, False), (b"* *", False, False),
    (b'*, "tag"', False, False), (b'"a", "tag"', True, True), (b'"tag", "a"', True, True), (b'"a" "tag"', False, False),
    (b'"a","tag"', True, True), (b',, "tag" ,\t,', True, True), (b'"a\\", "tag"', True, True),
    (b'"a,"tag"', False, False),
    (b'"xtag"', False, False), (b'"tag" x', False, False), (b'x "tag"', False, False), (b'"", "tag"', True, True),
    (b'"TAG"', False, False), (b'"\xff", "tag"', True, True), (b'"a b", "tag"', False, False), (b",", False, False),
])
def test_entity_tags(value, strong, weak):
    assert (matches(value, b'"tag"'), matches(value, b'"tag"', weak=True)) == (strong, weak)


def test_without_etag_only_an_asterisk_matches():
    for value in (b'""', b'"x"', b"", b'W/""'):
        assert not matches(value, b"") and not matches(value, b"", weak=True)
    assert matches(b"*", b"")


def test_what_has_no_date_is_not_asked_for_by_date():
    """Members of time 0 and the like: Thu, 01 Jan 1970 00:00:00 GMT is no date of theirs."""
    responder = Responder(Contents({b"/": Resource(PLAIN._replace(mtime=0), ())}), b"")
    epoch = http1.format_date(0).decode()
    assert "Last-Modified" not in fields(ask("/", responder=responder))
    for value in (epoch, DATE):
        assert ask("/", responder=responder, if_modified_since=value).status == 200
        assert ask("/", responder=responder, if_unmodified_since=value).status == 200
        assert ask("/", responder=responder, if_range=value, range="bytes=0-4").status == 200
    assert "Last-Modified" not in fields(ask("/", responder=responder, if_none_match="*"))


@pytest.mark.parametrize("target", ["/packed", "/plain"])
@pytest.mark.parametrize("connection", ["", "close"])
def test_not_modified_has_what_a_cache_needs_and_no_length(target, connection):
    headers = {"connection": connection} if connection else {}
    full = fields(ask(target, accept_encoding="br", **headers))
    reply = ask(target, accept_encoding="br", if_none_match=full["ETag"], **headers)
    kept = ("ETag", "Vary", "Cache-Control", "Last-Modified", "Connection")
    assert fields(reply) == {name: full[name] for name in kept if name in full}
    assert (reply.status, reply.body, reply.close) == (304, (), bool(connection))


def test_a_precondition_is_about_the_chosen_variant():
    tags = {coding: fields(ask("/packed", accept_encoding=coding))["ETag"] for coding in ("br", "zstd", "identity")}
    for mine, other in itertools.product(tags, tags):
        assert ask("/packed", accept_encoding=mine, if_none_match=tags[other]).status == (304 if mine == other else 200)


# --- ranges

LENGTH = 1000
RANGES = {
    # one
    "bytes=0-0": [(0, 1)], "bytes=0-999": [(0, 1000)], "bytes=999-999": [(999, 1000)], "bytes=0-1000": [(0, 1000)],
    "bytes=5-": [(5, 1000)], "bytes=999-": [(999, 1000)], "bytes=-1": [(999, 1000)], "bytes=-1000": [(0, 1000)],
    "bytes=-1001": [(0, 1000)], "bytes=-" + "9" * 5000: [(0, 1000)], "bytes=1-" + "9" * 5000: [(1, 1000)],
    "bytes=" + "0" * 5000 + "1-2": [(1, 3)], "bytes=-" + "0" * 30 + "2": [(998, 1000)], "BYTES=1-2": [(1, 3)],
    "bytes= 1-2 ,": [(1, 3)], "bytes=\t1-2": [(1, 3)], "bytes=,,1-2,,": [(1, 3)],
    # none that can be satisfied
    "bytes=1000-": [], "bytes=1000-1000": [], "bytes=-0": [], "bytes=-000": [], "bytes=1000-,2000-3000,-0": [],
    f"bytes={'9' * 19}-": [], f"bytes={'9' * 18}-{'9' * 19}": [],
    # several; in the order asked
    "bytes=0-0,500-500": [(0, 1), (500, 501)], "bytes=500-500,0-0": [(500, 501), (0, 1)],
    "bytes=-1,0-0": [(999, 1000), (0, 1)], "bytes=0-0,2000-,500-500": [(0, 1), (500, 501)],
    "bytes=0-0 , 500-500": [(0, 1), (500, 501)],
    # joined where they overlap, touch or nearly touch, at the place of the first
    "bytes=0-9,5-14": [(0, 15)], "bytes=5-14,0-9": [(0, 15)], "bytes=0-9,10-19": [(0, 20)], "bytes=0-9,0-9": [(0, 10)],
    "bytes=0-99,10-19": [(0, 100)], "bytes=10-19,0-99": [(0, 100)],
    f"bytes=0-9,{10 + PART_GAP}-99": [(0, 100)], f"bytes=0-9,{11 + PART_GAP}-99": [(0, 10), (11 + PART_GAP, 100)],
    f"bytes={10 + PART_GAP}-99,0-9": [(0, 100)], f"bytes={11 + PART_GAP}-99,0-9": [(11 + PART_GAP, 100), (0, 10)],
    "bytes=500-509,0-9,300-309,200-600": [(200, 600 + 1), (0, 10)],
    "bytes=0-9,500-509,300-309,200-600": [(0, 10), (200, 601)],
    "bytes=0-9,500-509,0-": [(0, 1000)], "bytes=900-,0-9,400-409,800-899": [(800, 1000), (0, 10), (400, 410)],
    "bytes=400-409,0-9,600-609,410-599": [(400, 610), (0, 10)],
    # ignored
    **dict.fromkeys((
        "", "bytes", "bytes=", "bytes=,", "bytes= , ", "bytes=-", "bytes=--1", "bytes=1", "bytes=a-b", "bytes=1-a",
        "bytes=5-4", "bytes=1-2-3", "bytes=1 - 2", "bytes=1- 2", "bytes=+1-2", "bytes=0x1-2", "bytes=1_0-20",
        "bytes=1.0-2", "bytes=*", "bytes=*-2", "bytes=0-1;2-3", "bytes=0-1 2-3", "bytes==0-1", "items=0-1",
        "bytes 0-1", "0-1", "=0-1", "byte=0-1", "bytes=0-1,x", "bytes=x,0-1", "bytes=0-1,9-3", "bytes=2000-1000",
        "bytes=\xb2-3", "bytes=0-1, items=0-1", f"bytes={'9' * 18}-{'9' * 17}"), None),
}


@pytest.mark.parametrize("value", RANGES)
def test_ranges(value):
    assert parse_ranges(value.encode("latin-1"), LENGTH) == RANGES[value]


@pytest.mark.parametrize("value", [b"bytes=0-", b"bytes=0-0", b"bytes=-0", b"bytes=-5", b"bytes=0-,-5", b"bytes=x"])
def test_ranges_of_nothing(value):
    assert parse_ranges(value, 0) is None


def far_apart(count):
    return b"bytes=" + b",".join(b"%d-%d" % (i * 200, i * 200) for i in range(count))


def test_too_many_ranges():
    apart = [(i * 200, i * 200 + 1) for i in range(MAX_RANGES)]
    assert parse_ranges(far_apart(MAX_RANGES), 10 ** 6) == apart
    assert parse_ranges(far_apart(MAX_RANGES + 1), 10 ** 6) is None
    assert parse_ranges(b"bytes=" + b",".join([b"0-1"] * MAX_RANGES), 10 ** 6) == [(0, 2)]
    assert parse_ranges(b"bytes=" + b",".join([b"0-1"] * (MAX_RANGES + 1)), 10 ** 6) is None
    joined = far_apart(MAX_RANGES - 1) + b",0-200"      # the last joins the first two
    assert parse_ranges(joined, 10 ** 6) == [(0, 201), *apart[2:-1]]


def test_the_most_ranges_are_as_many_parts():
    responder = Responder(Contents({b"/": Resource(stored(0, 16000), ())}), b"")
    value = ",".join(f"{i * 82}-{i * 82}" for i in reversed(range(MAX_RANGES - 5)))
    found = parts(ask("/", responder=responder, range="bytes=" + value), 16000)
    assert found == [(i * 82, i * 82 + 1, BYTES[i * 82:i * 82 + 1]) for i in reversed(range(MAX_RANGES - 5))]


def test_one_part():
    reply = ask("/plain", range="bytes=10-19")
    assert reply.status == 206
    assert fields(reply) == {**fields(ask("/plain")), "Content-Length": "10", "Content-Range": "bytes 10-19/1000"}
    assert reply.body == ((110, 10),)


def parts(reply, length):
    """[(start, end, bytes)] of a 206, a multipart one read by the email package and then once more byte by byte."""
    head = fields(reply)
    assert int(head["Content-Length"]) == len(body(reply))
    if "multipart" not in head["Content-Type"]:
        return [(*extent(head["Content-Range"], length), body(reply))]
    assert "Content-Range" not in head                                      # RFC 9110 section 15.3.7.2
    mime = b"Content-Type: " + head["Content-Type"].encode() + b"\r\n\r\n" + body(reply)
    message = email.message_from_bytes(mime, policy=email.policy.HTTP)
    assert not message.defects
    found = []
    expected = b""
    for part in message.get_payload():
        start, end = extent(part["Content-Range"], length)
        expected += b"\r\n--%b\r\nContent-Type: %b\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (
            message.get_boundary().encode(), part["Content-Type"].encode(), start, end - 1, length)
        found.append((start, end, body(reply)[len(expected):][:end - start]))
        expected += found[-1][2]
    expected += b"\r\n--%b--\r\n" % message.get_boundary().encode()
    assert body(reply) == expected
    return found


def extent(value, length):
    first, last, size = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", value).groups())
    assert size == length
    return first, last + 1


def test_several_parts():
    """Of the plain file, whatever else the client takes: a message of parts is in no content coding."""
    reply = ask("/packed", accept_encoding="br", range="bytes=99-199,0-4")      # 94 bytes lie between them
    full = fields(ask("/packed"))
    head = fields(reply)
    kind = head["Content-Type"]
    assert re.fullmatch(r"multipart/byteranges; boundary=[0-9a-zA-Z]{20,70}", kind)
    assert head == {**full, "Content-Type": kind, "Content-Length": str(len(body(reply)))}
    data = content(PACKED.plain)
    assert parts(reply, 500) == [(99, 200, data[99:200]), (0, 5, data[:5])]
    assert body(reply).count(b"\r\nContent-Type: text/plain\r\n") == 2
    assert body(reply).startswith(b"\r\n--")                                   # as zsync needs it
    assert reply.body[1::2] == ((2099, 101), (2000, 5))


# Accept-Encoding -> offset of what a range of /packed is of, where nothing says which representation the client has
SLICED = {None: 2000, "br": 2000, "gzip, br, zstd": 2000, "*": 2000, "identity;q=0, br": 2500, "gzip, *;q=0": 2800}


@pytest.mark.parametrize("value", SLICED)
def test_a_range_is_of_the_plain_file_where_that_is_acceptable(value):
    headers = {} if value is None else {"accept_encoding": value}
    reply = ask("/packed", range="bytes=10-19", **headers)
    assert (reply.status, reply.body) == (206, ((SLICED[value] + 10, 10),))
    assert ("Content-Encoding" in fields(reply)) == (SLICED[value] != 2000)
    assert fields(reply)["Vary"] == "Accept-Encoding"
    for ignored in ("bytes=x", "bytes=" + "0-0," * MAX_RANGES + "9-9", "lines=0-1"):
        assert ask("/packed", range=ignored, **headers) == ask("/packed", **headers)


@pytest.mark.parametrize("accepted", ["br", "br, gzip", "identity;q=0, br"])
@pytest.mark.parametrize("specs", ["0-0,99-99", "0-0,99-"])
def test_several_ranges_of_a_coding_are_all_of_it(accepted, specs):
    for more in ({"if_range": '"2500-100"'}, {}) if "identity" in accepted else ({"if_range": '"2500-100"'},):
        reply = ask("/packed", accept_encoding=accepted, range="bytes=" + specs, **more)
        assert reply == ask("/packed", accept_encoding=accepted)


@pytest.mark.parametrize(("accepted", "tag", "start"), [
    ("br, gzip", '"2500-100"', 2500), ("br, gzip", '"2800-700"', 2800), ("br, gzip", '"2000-500"', 2000),
    ("br, gzip", '"2600-200"', None), ("br", '"2800-700"', None), ("identity;q=0, br", '"2000-500"', None),
    ("br, gzip", 'W/"2500-100"', None), ("", '"2000-500"', 2000), ("", '"2500-100"', None)])
def test_if_range_chooses_what_the_client_has(accepted, tag, start):
    reply = ask("/packed", accept_encoding=accepted, if_range=tag, range="bytes=10-19")
    if start is None:
        assert reply == ask("/packed", accept_encoding=accepted)
    else:
        assert (reply.status, reply.body, fields(reply)["ETag"]) == (206, ((start + 10, 10),), tag)


def test_a_date_that_representations_share_is_none_of_one_of_them():
    """RFC 9110 sections 8.8.2.2 and 13.1.5: it is weak, since it does not tell which bytes the client has."""
    for accepted in ("", "br"):
        reply = ask("/packed", accept_encoding=accepted, if_range=DATE, range="bytes=0-4")
        assert reply == ask("/packed", accept_encoding=accepted)
    alone = Resource(PACKED.plain, (PACKED.variants[0]._replace(mtime=MTIME + 86400),))
    responder = Responder(Contents({b"/": alone}), b"")
    for date, start in ((DATE, 2000), (AFTER, 2500)):
        assert ask("/", responder=responder, accept_encoding="br", if_range=date,
                   range="bytes=0-4").body == ((start, 5),)
    assert ask("/", responder=responder, if_range=AFTER, range="bytes=0-4") == ask("/", responder=responder)


def test_no_part():
    reply = ask("/packed", range="bytes=500-")
    head = fields(reply)
    assert (reply.status, head["Content-Range"], head["Vary"]) == (416, "bytes */500", "Accept-Encoding")
    assert int(head["Content-Length"]) == len(body(reply)) > 0


IF_RANGE = {'"tag"': 206, DATE: 206, "Sunday, 06-Nov-94 08:49:37 GMT": 206, 'W/"tag"': 200, '"x"': 200, AFTER: 200,
            BEFORE: 200, "*": 200, "tag": 200, "never": 200, '"tag", "x"': 200, '"tag" ': 206}


@pytest.mark.parametrize("value", IF_RANGE)
def test_if_range(value):
    assert ask("/plain", if_range=value, range="bytes=0-4").status == IF_RANGE[value]
    assert ask("/plain", if_range=value, range="bytes=1000-").status == {206: 416}.get(IF_RANGE[value], 200)
    assert ask("/plain", if_range=value) == ask("/plain")


def test_if_range_without_etags():
    assert ask("/untagged", if_range='""', range="bytes=0-4").status == 200
    assert ask("/untagged", if_range=DATE, range="bytes=0-4").status == 206


@pytest.mark.parametrize("value", ["bytes=0-", "bytes=-5", "bytes=0-1048575", "bytes=-0", "bytes=1-"])
def test_a_range_of_an_empty_file_is_all_of_it(value):
    """A cache that asks by ranges would hand a 416 on to clients that have asked for no range."""
    assert ask("/empty", range=value) == ask("/empty")


# A model: of each range the set of its bytes' positions, with Python's own slices.

NUMBERS = st.integers(0, 1200) | st.integers(0, 10 ** 25)
PAIRS = st.tuples(NUMBERS, NUMBERS).map(sorted).map("{0[0]}-{0[1]}".format)
SPECS = PAIRS | NUMBERS.map("{}-".format) | NUMBERS.map("-{}".format)
BROKEN = st.sampled_from(["5-4", "x", "-", "1-2-3", "1", "+1-2", " "])
RANGE_WORDS = st.sampled_from([b"bytes", b"=", b"0", b"9", b"-", b",", b" ", b"\xb2", b"\0"])
BLANKS = st.sampled_from(["", " ", "\t"])
GOOD = st.lists(st.tuples(BLANKS, SPECS, BLANKS).map("".join), min_size=1, max_size=8)
HEADERS = GOOD | st.lists(SPECS | BROKEN, max_size=4)


def positions(spec, length):
    """The positions that a range of RFC 9110 section 14.1.2 means, or None where it is malformed."""
    first, dash, last = spec.partition("-")
    if not dash or not re.fullmatch(r"(\d+-\d*)|(-\d+)", spec):
        return None
    everything = range(length)
    if not first:
        return set(everything[-int(last):]) if int(last) else set()
    if last and int(last) < int(first):
        return None
    return set(everything[int(first):int(last) + 1] if last else everything[int(first):])


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(HEADERS, st.integers(0, 1100))
def test_any_ranges_of_any_length(specs, length):
    responder = Responder(Contents({b"/": Resource(stored(50, length), ())}), b"")
    reply = ask("/", responder=responder, range="bytes=" + ",".join(specs))
    specs = [spec.strip() for spec in specs if spec.strip()]
    asked = [positions(spec, length) for spec in specs]
    if not asked or None in asked or not length:
        assert (reply.status, reply.body) == (200, ((50, length),))
        return
    wanted = set().union(*asked)
    if not wanted:
        assert (reply.status, fields(reply)["Content-Range"]) == (416, f"bytes */{length}")
        return
    assert reply.status == 206
    found = parts(reply, length)
    sent = [position for start, end, _ in found for position in range(start, end)]
    assert all(data == BYTES[50 + start:50 + end] for start, end, data in found)
    assert len(sent) == len(set(sent)), "a byte is sent twice"
    assert wanted <= set(sent)
    for start, end, _ in found:
        assert {start, end - 1} <= wanted
        asked_here = sorted(wanted & set(range(start, end)))
        assert all(b - a <= PART_GAP + 1 for a, b in itertools.pairwise(asked_here))
    for (start, end, _), (other, other_end, _) in itertools.combinations(found, 2):
        assert start > other_end + PART_GAP or other > end + PART_GAP
    earliest = [min(i for i, one in enumerate(asked) if one & set(range(start, end))) for start, end, _ in found]
    assert earliest == sorted(earliest), "not in the order asked"


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(st.binary(max_size=40) | st.lists(RANGE_WORDS).map(b"".join), st.integers(0, 1000))
def test_any_bytes_have_a_meaning_as_ranges(value, length):
    for ranges in (parse_ranges(value, length), parse_ranges(b"bytes=" + value, length)):
        assert ranges is None or all(0 <= start < end <= length for start, end in ranges)


# --- other methods, other answers

ALLOW = "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("target", ["/plain", "/nowhere", "/dir"])
def test_methods_that_a_file_cannot_do(method, target):
    reply = ask(target, method, if_match='"x"', range="bytes=0-")
    assert (reply.status, fields(reply)["Allow"]) == (405, ALLOW)


def test_connect_cannot_be_done_either():
    reply = ask("t:443", "CONNECT")
    assert (reply.status, fields(reply)["Allow"]) == (405, ALLOW)


@pytest.mark.parametrize("method", ["BREW", "get", "PROPFIND", "OPTION"])
def test_methods_that_nobody_knows(method):
    assert ask("/plain", method).status == 501


@pytest.mark.parametrize(("target", "status"), [("*", 204), ("/plain", 204), ("/dir", 204), ("/nowhere", 404)])
def test_options(target, status):
    reply = ask(target, "OPTIONS", connection="close")
    assert reply.status == status
    if status == 204:
        assert fields(reply) == {"Allow": ALLOW, "Connection": "close"}     # no Content-Length: RFC 9110 section 8.6
        assert (reply.body, reply.close) == ((), True)


def test_get_of_what_options_calls_the_server():
    assert RESPONDER.reply(http1.parse_head(raw_request("/x"))._replace(path=b"*")).status == 404


@pytest.mark.parametrize(("value", "status"), [
    ("100-continue", 200), ("100-Continue", 200), ("a-miracle", 417), ("100-continue, a-miracle", 417)])
def test_expectations(value, status):
    assert ask("/plain", expect=value).status == status


@pytest.mark.parametrize("target", ["/dir", "/dir?a=b&c", "/dir?", "/x/../dir?/../", '/dir?"><b>'])
def test_a_directory_leads_to_its_own_url(target):
    reply = ask(target, if_none_match="*", range="bytes=0-0")
    query = target[target.index("?"):] if "?" in target else ""
    assert (reply.status, fields(reply)["Location"]) == (301, "./dir/" + query)
    assert fields(reply)["Cache-Control"] == "no-cache"
    assert fields(reply)["Content-Type"] == "text/html; charset=utf-8"
    link = html.escape("./dir/" + query)
    assert f'<p>It is at <a href="{link}">{link}</a>.\n'.encode() in body(reply)


# A site where much looks like another host or scheme.
NAMES = [b"/", b"/a:b/", b"/http:/", b"/evil.example/", b"/a/", b"/a/b/", b"/@evil/", b"/\\evil.example/", b"/a b/",
         b"/\r\nX: y/", b"/%2e/", b"/\xff/", b"/a/b/c:d/", b"/?/", b"/#/", b"/.../"]
MANY_SLASHES = Contents({
    **dict.fromkeys(NAMES, SITE[b"/dir/"]),
    **{name[:-1]: Redirect(quote(name, safe="/").encode()) for name in NAMES[1:]}, b"/a/b/page": SITE[b"/plain"]})
TARGET_WORDS = st.sampled_from([
    "/", "//", "%2f", "%2F", "a", "b", "a:b", "http:", "evil.example", ".", "..", "%2e", "%5c", "\\", "@evil", "%20",
    "?", "page", "%0d%0aX:%20y", "%ff", "%25", "c:d", "http://t/", "&", '"', "<"])


@settings(max_examples=1500, derandomize=True, deadline=None, database=None)
@given(st.lists(TARGET_WORDS, min_size=1, max_size=8).map("".join))
def test_no_redirect_leaves_the_host(target):
    """As browsers read a Location: a backslash is a slash to them, tabs and line ends are nothing."""
    responder = Responder(MANY_SLASHES, b"")
    try:
        request = http1.parse_head(raw_request(target))
    except http1.HttpError:
        return
    reply = responder.reply(request)
    if isinstance(reply, FullResponse) or reply.status != 301:
        return
    location = fields(reply)["Location"]
    assert re.match(r"\./|/(?!/)", location)
    assert not re.search(r"[\\\s]", location.partition("?")[0])
    to = urlsplit(urljoin("http://t" + getattr(request.path, "raw", request.path).decode(), location))
    assert (to.scheme, to.netloc) == ("http", "t")
    again = responder.reply(http1.parse_head(raw_request(to.path)))
    assert isinstance(again, FullResponse)
    assert location.endswith(request.query.decode())


def test_not_found_without_a_page():
    reply = ask("/nowhere", if_match='"x"', range="bytes=0-0")
    assert fields(reply) == {"Content-Type": "text/plain; charset=utf-8", "Content-Length": "14",
                             "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    assert (reply.status, body(reply)) == (404, b"404 Not Found\n")


@pytest.mark.parametrize("target", ["/nowhere", "/a%2Fb"])
def test_not_found_with_a_page(target):
    responder = Responder(Contents({**SITE, b"/404.html": PAGE}), b"max-age=60")
    reply = ask(target, responder=responder, if_none_match="*", range="bytes=0-0")
    assert fields(reply) == {"Content-Type": "text/html", "X-Content-Type-Options": "nosniff",
                             "Vary": "Accept-Encoding", "Content-Length": "60", "Cache-Control": "no-cache"}
    assert (reply.status, reply.body) == (404, ((6000, 60),))
    packed = ask(target, responder=responder, accept_encoding="gzip")
    assert (fields(packed)["Content-Encoding"], packed.body) == ("gzip", ((6100, 30),))
    last_resort = ask(target, responder=responder, accept_encoding="identity;q=0")
    assert last_resort.body == ((6000, 60),)
    assert ask("/404.html", responder=responder).status == 200


def test_a_redirect_is_no_page_for_what_is_not_found():
    responder = Responder(Contents({b"/404.html": Redirect(b"/404.html/")}), b"")
    assert body(ask("/nowhere", responder=responder)) == b"404 Not Found\n"


@pytest.mark.parametrize(("status", "reason", "text"), [
    (400, "no", b"400 Bad Request: no\n"), (404, "", b"404 Not Found\n"),
    (408, "too late", b"408 Request Timeout: too late\n")])
def test_the_text_of_an_error(status, reason, text):
    reply = error_reply(status, reason)
    assert fields(reply) == {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(text)),
                             "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache",
                             "Connection": "close"}
    assert reply == Reply(status, reply.fields, (text,), b"close")
    assert reply.close
    kept = error_reply(status, reason, http1.parse_head(raw_request("/", "HEAD")), ((b"X", b"y"),))
    assert (kept.body, kept.close) == ((), False)
    assert fields(kept)["X"] == "y"
    assert "Connection" not in fields(kept)


# --- what holds of all answers

REQUESTS = {
    "whole": ("/plain", {}), "variant": ("/packed", {"accept_encoding": "br"}), "empty": ("/empty", {}),
    "304": ("/plain", {"if_none_match": "*"}), "412": ("/plain", {"if_match": '"x"'}), "404": ("/nowhere", {}),
    "301": ("/dir?x", {}), "406": ("/packed", {"accept_encoding": "*;q=0"}), "417": ("/plain", {"expect": "x"}),
    "if-modified": ("/plain", {"if_modified_since": BEFORE}),
}
RANGED = {
    "206": ("/plain", {"range": "bytes=0-4"}), "several": ("/plain", {"range": "bytes=0-4,500-"}),
    "416": ("/plain", {"range": "bytes=1000-"}), "no range": ("/plain", {"range": "bytes=x"}),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_head_is_get_without_a_body(case):
    target, headers = REQUESTS[case]
    for responder in (RESPONDER, Responder(Contents({**SITE, b"/404.html": PAGE}), b"")):
        reply, brief = ask(target, responder=responder, **headers), ask(target, "HEAD", responder=responder, **headers)
        assert brief == reply._replace(body=())


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "BREW"])
@pytest.mark.parametrize("case", REQUESTS | RANGED)
def test_only_files_are_kept_as_files_are(case, method):
    """Whoever keeps that a file is missing for as long as files are kept does not see it once it is there."""
    target, headers = (REQUESTS | RANGED)[case]
    for responder in (RESPONDER, Responder(Contents({**SITE, b"/404.html": PAGE}), b"max-age=60")):
        reply = ask(target, method, responder=responder, **headers)
        expected = "max-age=60" if reply.status in (200, 206, 304) else "no-cache"
        assert fields(reply)["Cache-Control"] == expected


@pytest.mark.parametrize("case", RANGED)
def test_head_knows_no_ranges(case):
    target, headers = RANGED[case]
    assert ask(target, "HEAD", **headers) == ask(target, "HEAD")


@pytest.mark.parametrize("case", REQUESTS | RANGED)
def test_the_length_is_that_of_the_body(case):
    target, headers = (REQUESTS | RANGED)[case]
    reply = ask(target, **headers)
    assert fields(reply).get("Content-Length", "0") == str(len(body(reply)))


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "BREW"])
@pytest.mark.parametrize("case", REQUESTS | RANGED)
def test_the_connection_is_said_to_be_what_it_will_be(case, method):
    target, headers = (REQUESTS | RANGED)[case]
    for version, connection, said in (("1.1", "x", None), ("1.1", "close", "close"), ("1.0", "x", "close"),
                                      ("1.0", "keep-alive", "keep-alive")):
        reply = ask(target, method, version=version, connection=connection, **headers)
        assert (fields(reply).get("Connection"), reply.close) == (said, said == "close")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "BREW"])
@pytest.mark.parametrize("case", REQUESTS | RANGED)
def test_equal_requests_get_equal_replies(case, method):
    target, headers = (REQUESTS | RANGED)[case]
    raw = raw_request(target, method, **headers)
    first, second = (RESPONDER.reply(http1.parse_head(bytes(bytearray(raw)))) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert RESPONDER.reply(http1.parse_head(raw.replace(b"Host: t", b"Host: u\r\nX: y"))) == first


def test_replies_that_differ_are_not_equal():
    replies = [RESPONDER.reply(http1.parse_head(raw_request(target, method, **headers, **more)))
               for target, headers in [*REQUESTS.values(), *RANGED.values()] if "if-modified" not in headers
               for method in ("GET", "HEAD") for more in ({}, {"connection": "close"})]
    for one, other in itertools.combinations(replies, 2):
        expanded = [RESPONDER.expand(reply) if isinstance(reply, FullResponse) else reply for reply in (one, other)]
        assert (one == other) == (expanded[0] == expanded[1])
