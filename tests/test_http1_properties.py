"""The parser against another one (h11), against the RFCs' own algorithms, and against bytes at random.

The examples are the same on every run. TARWEB_EXAMPLES=100000 looks further, at others each time.
"""

import calendar
import ipaddress
import itertools
import os
import re
import time
from urllib.parse import quote_from_bytes, unquote_to_bytes, urljoin, urlsplit

import h11
import smuggling
from hypothesis import example, given, settings
from hypothesis import strategies as st

import http1
from archive import PATH_SAFE
from http1 import Body, HttpError

EXPLORING = int(os.environ.get("TARWEB_EXAMPLES", 0))


def examples(count):
    return settings(max_examples=EXPLORING or count, derandomize=not EXPLORING, deadline=None, database=None)


# --- requests, nearly valid

VALID = [
    b"GET /a/b HTTP/1.1\r\nHost: t\r\n\r\n",
    b"HEAD /a/../b%2e?c=d HTTP/1.1\r\nHost: t:80\r\nAccept: */*\r\n\r\n",
    b"GET http://example.org/a HTTP/1.1\r\nhost: [::1]:80\r\nX:\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: t\r\nMax-Forwards: 1\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nab\r\nc",
    b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: t\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: u\r\n\r\n",
]
FRAGMENTS = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\r\n ", b"\n\t", b":", b": ", b",", b", ", b";",
    b"\0", b"\x01", b"\x0b", b"\x7f", b"\x80", b"\xff", b"#", b"?", b"%", b"%2f", b"%2e", b"%00", b"/", b"//", b"/..",
    b"/./", b"@", b"[", b"]", b"*", b"0", b"1", b"5", b"+", b"-", b"a", b"_", b"HTTP/1.1", b"1.2", b"2.0", b"0.9",
    b"http://", b"chunked", b"chunked, chunked", b"gzip, chunked", b"Content-Length: 5\r\n", b"Content-Length: 6\r\n",
    b"Content-Length:\r\n", b"Content-Length: 5, 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding : chunked\r\n", b"Host: t\r\n", b"Host: u@t\r\n", b"Host: \r\n", b"X: y\r\n", b": y\r\n",
    b"X\r\n", b"CONNECT ", b"GET / HTTP/1.1\r\n", b"Host: [1:2]\r\n", b"[::1]", b"\xc3\xa9",
]
PLACES = st.integers(0, 400)


@st.composite
def mutated(draw):
    """A valid request with another one behind it, changed in a few places."""
    raw = draw(st.sampled_from(VALID)) + VALID[0]
    for kind in draw(st.lists(st.sampled_from(["insert", "line", "delete", "replace", "double"]), max_size=3)):
        at, fragment = draw(PLACES) % (len(raw) + 1), draw(st.sampled_from(FRAGMENTS))
        if kind == "line":                          # at the start of a line, where a field would be
            at = raw.find(b"\n", at) + 1
        if kind in ("insert", "line"):
            raw = raw[:at] + fragment + raw[at:]
        elif kind == "delete":
            raw = raw[:at] + raw[at + draw(st.integers(1, 6)):]
        elif kind == "replace":
            raw = raw[:at] + fragment + raw[at + 1:]
        else:
            start, end = raw.rfind(b"\n", 0, at) + 1, raw.find(b"\n", at) + 1
            raw = raw[:end] + raw[start:end] + raw[end:]
    return raw


# --- what each of the two parsers makes of it

MORE, REFUSED = "more", "refused"


def tarweb_head(raw):
    """(Request, size of the head), or MORE, or REFUSED."""
    try:
        end = http1.find_head(raw, 0)
        return (http1.parse_head(raw[:end]), end) if end >= 0 else MORE
    except HttpError:
        return REFUSED


def tarweb_body(framing, raw):
    """What is left after the body, or MORE, or REFUSED."""
    body = Body(framing)
    try:
        rest = body.feed(raw)
    except HttpError:
        return REFUSED
    return rest if body.done else MORE


def h11_read(raw):
    """(h11.Request, what is left after the head, and after the body or MORE or REFUSED), or MORE, or REFUSED."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError:
        return REFUSED
    if request is h11.NEED_DATA:
        return MORE
    behind = connection.trailing_data[0]
    try:
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return request, behind, MORE
    except h11.RemoteProtocolError:
        return request, behind, REFUSED
    return request, behind, connection.trailing_data[0]


# --- where tarweb is the stricter one

def values(head, name):
    """The values of a field as they stand in a head, whatever its lines end with."""
    return re.findall(rb"(?im)^%b:[ \t]*(.*?)[ \t]*\r?$" % name, head)


def is_host(value):
    """RFC 9110 section 7.2: uri-host [ ":" port ], no user."""
    name, colon, port = value.rpartition(b":") if value[-1:] != b"]" and b":" in value else (value, b"", b"")
    if port.strip(b"0123456789"):
        return False
    if name[:1] == b"[":
        return name[-1:] == b"]" and is_address(name[1:-1].decode("latin-1"))
    return not re.search(rb"[^\w.~!$&'()*+,;=-]", re.sub(rb"%[\da-fA-F]{2}", b"", name))


def is_address(text):
    """RFC 3986 section 3.2.2: IPv6address, which has no zone, or IPvFuture."""
    try:
        return "%" not in text and ipaddress.IPv6Address(text) is not None
    except ValueError:
        return re.fullmatch(r"[vV][\da-fA-F]+\.[a-zA-Z\d._~!$&'()*+,;=:-]+", text) is not None


def escaped(target):
    """`target` with the bytes above 0x7F percent-encoded."""
    return quote_from_bytes(target, bytes(range(0x80))).encode()


def with_escaped_target(raw):
    """`raw` with the bytes above 0x7F in its request target percent-encoded: h11 wants that."""
    line = re.match(rb"([!-~]+ )([!-~\x80-\xff]+) HTTP/\d\.\d\r?\n", raw)
    return line[1] + escaped(line[2]) + raw[line.end(2):] if line else raw


def is_target(method, target):
    """RFC 9112 section 3.2: whether the target has one of the four forms, and the right one for its method."""
    path, question, _ = target.partition(b"?")
    if b"#" in target or not path:
        return False
    if method == b"CONNECT" and path[:1] != b"/" or (method, target) == (b"OPTIONS", b"*"):
        return True
    if re.match(rb"(?i)https?://", target):
        host, slash, path = path.split(b"//", 1)[1].partition(b"/")
        if not host or host[:1] == b":" or not is_host(host):
            return False
        path = slash + path
    elif path[:1] != b"/":
        return False
    path = re.sub(rb"%(?!00)[\da-fA-F]{2}", b"", path)
    return b"%" not in path


def stricter(head, request):
    """Why tarweb refuses a head that h11 accepts: all of the reasons there are, as words."""
    lengths, codings = values(head, b"content-length"), values(head, b"transfer-encoding")
    version = bytes(request.http_version)
    reasons = {
        "a line ends with bare LF": re.search(rb"(?<!\r)\n", head),
        "a field is folded": re.search(rb"\n[ \t]", head),
        "a control character in a value": re.search(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]", head),
        "neither HTTP/1.0 nor HTTP/1.1": version[:1] != b"1",
        "Host is missing from a later minor version": version > b"1.1" and not values(head, b"host"),
        "Host is none": not all(map(is_host, values(head, b"host"))),
        "the target has no form that fits": not is_target(request.method, request.target),
        "Content-Length more than once": len(lengths) > 1,
        "Content-Length is no plain number": not all(re.fullmatch(rb"\d{1,18}", length) for length in lengths),
        "Transfer-Encoding and Content-Length": lengths and codings,
        "Transfer-Encoding in HTTP/1.0": codings and version == b"1.0",
    }
    return {reason for reason, holds in reasons.items() if holds}


# --- models

def without_dot_segments(path):
    """RFC 3986 section 5.2.4, word for word."""
    source, output = path, b""
    while source:
        if source.startswith(b"/./"):                                               # B
            source = source[2:]
        elif source == b"/.":
            source = b"/"
        elif source.startswith(b"/../") or source == b"/..":                        # C
            source = b"/" + source[4:]
            output = output[:max(output.rfind(b"/"), 0)]
        else:                                                                       # E
            end = source.find(b"/", 1)
            end = len(source) if end < 0 else end
            output, source = output + source[:end], source[end:]
    return output


def located(method, target):
    """(path, query) that a valid target stands for."""
    path, question, query = target.partition(b"?")
    if path[:1] != b"/":
        if method == b"CONNECT" or path == b"*":
            return b"*", question + query
        slash, path = path.split(b"//", 1)[1].partition(b"/")[1:]
        if not slash:
            return b"*" if method == b"OPTIONS" and not question else b"/", question + query
        path = slash + path
    return without_dot_segments(unquote_to_bytes(path)), question + query


def framing(request):
    """Of an h11 request: "chunked", or its length."""
    fields = dict(request.headers)
    return "chunked" if b"transfer-encoding" in fields else int(fields.get(b"content-length", 0))


SPACE_BEFORE_EXTENSION = re.compile(rb"[\da-fA-F][\t ]+;")      # RFC 9112 section 7.1.1 allows it, h11 does not


@examples(1500)
@given(mutated())
@example(b"GET / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n0 ;a\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 00000000000000000005\r\n\r\nabcde")
@example(b"GET / HTTP/1.1\r\nHost: %:80\r\n\r\n")
@example(b"GET /\xc3\xa9?\xff HTTP/1.1\r\nHost: t\r\n\r\n")
@example(b"GET http://[::1\xff]/ HTTP/1.1\r\nHost: t\r\n\r\n")
@example(b"CONNECT t:443 HTTP/1.1\r\nHost: t:443\r\n\r\n")
def test_h11_reads_the_same(raw):
    while raw.startswith(b"\r\n"):              # RFC 9112 section 2.2 passes over them, h11 does not
        raw = raw[2:]
    given, raw = raw, with_escaped_target(raw)
    ours, theirs = tarweb_head(raw), h11_read(raw)
    assert heads_alike(tarweb_head(given), ours)
    if theirs in (REFUSED, MORE):
        assert ours in (REFUSED, MORE)
        return
    request, behind, after = theirs
    head = raw[:len(raw) - len(behind)]
    reasons = stricter(head, request)
    assert (ours is REFUSED) == bool(reasons), reasons
    if ours is REFUSED:
        return
    found, size = ours
    assert size == len(head)
    assert found.method == request.method
    assert (found.path, found.query) == located(bytes(request.method), bytes(request.target))
    assert found.has_body == (framing(request) != 0)
    if not found.has_body:
        assert after == behind
        return
    assert (found.fields.transfer_encoding is not None) == (framing(request) == "chunked")
    assert framing(request) in ("chunked", found.fields.content_length)
    check_bodies(found.fields, behind, after)


def check_bodies(fields, behind, after):
    """Where tarweb finds the end of a body, h11 finds the same one."""
    rest = tarweb_body(fields, behind)
    if rest is not REFUSED and not SPACE_BEFORE_EXTENSION.search(behind):
        assert rest == after or rest is MORE and after in (MORE, REFUSED)


def heads_alike(one, other):
    """Whether two heads are read as the same; their lengths may differ."""
    return one == other if MORE in (one, other) or REFUSED in (one, other) else one[0] == other[0]


def test_the_requests_to_start_from_are_valid():
    for raw in VALID:
        found, size = tarweb_head(raw)
        assert not found.has_body or tarweb_body(found.fields, raw[size:]) == b""


@examples(1000)
@given(mutated(), st.lists(PLACES, max_size=4))
def test_where_the_cuts_fall_makes_no_difference(raw, places):
    """(But a head with two faults may be refused for the other one, when that one comes in first.)"""
    ends = sorted({place % (len(raw) + 1) for place in places} | {len(raw)})
    scanned, pieced = 0, MORE
    for end in ends:
        try:
            size = http1.find_head(raw[:end], scanned)
            if size >= 0:
                pieced = http1.parse_head(raw[:size]), size
                break
        except HttpError:
            pieced = REFUSED
            break
        scanned = end
    whole = tarweb_head(raw)
    assert pieced == whole
    if whole in (MORE, REFUSED) or not whole[0].has_body:
        return
    body, pending = Body(whole[0].fields), b""
    try:
        for start, end in zip([whole[1], *ends], ends, strict=False):
            pending = body.feed(pending + raw[max(start, whole[1]):max(end, whole[1])])
    except HttpError:
        pieced = REFUSED
    else:
        pieced = pending if body.done else MORE
    assert pieced == tarweb_body(whole[0].fields, raw[whole[1]:])


# --- what is remembered of header fields

LINES = [line + b"\r\n" for line in (
    b"Host: t", b"host: u:80", b"Connection: keep-alive", b"connection: Close, x", b"Accept-Encoding: gzip, br",
    b"Accept-Encoding:", b"User-Agent: Mozilla/5.0 (X11)", b"Accept: */*", b"Cookie: a=b", b"Cookie: \xff\x80", b"X:",
    b"Referer: http://t/", b"If-None-Match: *", b'if-none-match: "a"', b'If-Match: \t"x" ', b"If-Range: x",
    b"Range: bytes=0-", b"If-Modified-Since: Mon, 23 Nov 2026 01:02:03 GMT", b"If-Unmodified-Since: x",
    b"Content-Length: 0", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Expect: ,")]
WRONG_LINES = [
    b"\r\n", b"Cookie\r\n", b"Cookie : a\r\n", b" Cookie: a\r\n", b"\tx\r\n", b": a\r\n", b"Cookie: \0\r\n",
    b"Cookie: a\rb\r\n", b"Cookie: a\nb\r\n", b"Cookie: a\r\r\n", b"Accept: */*\n", b"Accept: */*\r", b"\r", b"\n",
    b"If-None-Match: a\x7f\r\n", b"Range : x\r\n"]
PLAIN_HEAD = LINES[0], LINES[2], LINES[4], LINES[6], LINES[7]


@st.composite
def of_lines(draw):
    """A head put together from lines, most of them right, some of which came before."""
    lines = list(draw(st.sampled_from([PLAIN_HEAD, LINES[:1], ()])))
    for line in draw(st.lists(st.sampled_from(LINES) | st.sampled_from(WRONG_LINES), max_size=4)):
        lines.insert(draw(PLACES) % (len(lines) + 1), line)
    target = draw(st.sampled_from([b"/", b"/a?b", b"/a/../b", b"/%41", b"*", b"http://t/"]))
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0"]))
    behind = draw(st.sampled_from([b"", b"", *LINES, b"\r\n"]))
    return b"GET %b HTTP/%b\r\n%b\r\n%b" % (target, version, b"".join(lines), behind)


def check_short_way(raw):
    """That the short way gives what find_head and parse_head do, or nothing; and what is asked without conditions."""
    whole, (line, block) = tarweb_head(raw), http1.split_head(raw)
    if line is None:
        return
    bare, lines = http1.without_conditions(http1.essence(block))
    found, same, general = (read_plain(line, text) for text in (http1.essence(block), block, bare))
    assert found is None or (found, len(raw)) == whole
    assert same == found
    assert lines or bare == http1.essence(block)
    check_conditions(found, general, lines)


def read_plain(line, block):
    fields = http1.plain_fields(block)
    return fields and http1.plain_request(line, fields)


def check_conditions(general, bare, lines):
    """That `bare` is the request that `general` is but for the conditions in `lines`."""
    assert (bare is None) == (general is None)
    if bare is None:
        return
    assert bare[:5] == general[:5]
    taken = {line.partition(b":")[0] for line in lines}
    may_differ = {"conditional"} | {name for field, names in (
        (b"If-None-Match", ("if_none_match", "if_modified_since")), (b"Range", ("range",))) if field in taken
        for name in names}
    assert {name for name, value in bare.fields._asdict().items()
            if value != general.fields._asdict()[name]} <= may_differ
    assert not taken or general.fields.conditional
    if b"If-None-Match" not in taken:
        assert bare.fields.if_modified_since == general.fields.if_modified_since
    if bare.fields.if_none_match is None and b"If-None-Match" in taken:
        values = [line.partition(b"\r")[0].partition(b":")[2] for line in lines if line.startswith(b"If-None-Match")]
        assert b", ".join(value.strip(b"\t ") for value in values) == general.fields.if_none_match


@examples(1500)
@given(of_lines() | mutated(), st.sampled_from([*[b""] * 5, VALID[0], b"\r\n", b"x"]))
def test_the_short_way_is_the_long_one_or_none(raw, behind):
    check_short_way(raw)
    check_short_way(raw + behind)
    found = tarweb_head(raw)
    if behind and found not in (MORE, REFUSED) and found[1] == len(raw):
        assert http1.split_head(raw + behind) == (None, b"")


def test_only_what_is_plain_has_a_short_way():
    for raw in VALID:
        line, block = http1.split_head(raw)
        found = line and read_plain(line, block)
        assert not found or (found, len(raw)) == tarweb_head(raw)
        assert found or raw != VALID[0]


def test_smuggling_finds_no_short_way():
    plain = b"GET / HTTP/1.1\r\n%b\r\n" % b"".join(PLAIN_HEAD)
    heads = [case.raw.partition(b"\r\n")[2].partition(b"\r\n\r\n")[0] for case in smuggling.CASES.values()]
    mixed = [b"GET / HTTP/1.1\r\n%b%b\r\n\r\n" % (b"".join(PLAIN_HEAD[1:]), head) for head in heads]
    for raw in (plain, *(case.raw for case in smuggling.CASES.values()), *mixed):
        check_short_way(raw)


# --- chunked bodies

TOKENS = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=8).map(str.encode)
EXTENSIONS = st.lists(st.one_of(
    TOKENS.map(b";%b".__mod__), st.tuples(TOKENS, TOKENS).map(b";%b=%b".__mod__),
    st.tuples(TOKENS, TOKENS).map(b';%b="%b; \t\xff"'.__mod__)), max_size=3).map(b"".join)
TRAILERS = st.lists(st.tuples(TOKENS, st.sampled_from([b"", b" v", b"\tv w ", b"v:\xff"])).map(b"%b:%b\r\n".__mod__),
                    max_size=3).map(b"".join)
SIZES = st.tuples(st.sampled_from([b"%x", b"%X", b"%04x", b"%015X"]), EXTENSIONS)
DATA = st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"0\r\n\r\n", b"x" * 500])
CHUNKS = st.lists(st.tuples(DATA, SIZES), max_size=6)
PLACES_FAR = st.lists(st.integers(0, 5000), max_size=8)
IN_CHUNKS = http1.parse_fields(b"Transfer-Encoding: chunked\r\n\r\n")


def encode(chunks, last, trailers):
    lines = [b"%b%b\r\n%b\r\n" % (form % len(data), extension, data) for data, (form, extension) in chunks]
    form, extension = last
    return b"".join((*lines, form % 0, extension, b"\r\n", trailers, b"\r\n"))


@examples(400)
@given(CHUNKS, SIZES, TRAILERS, PLACES_FAR, st.sampled_from([b"", b"\r\n", b"GET /", b"0"]))
def test_a_chunked_body_is_consumed_exactly(chunks, last, trailers, places, behind):
    raw = encode(chunks, last, trailers)
    stream = raw + behind
    ends = sorted({place % (len(stream) + 1) for place in places}) + [len(stream)]
    body, pending, start = Body(IN_CHUNKS), b"", 0
    for end in ends:
        pending, start = body.feed(pending + stream[start:end]), end
        assert body.seen + len(pending) == end
        assert body.done == (end >= len(raw))
    assert (pending, body.seen) == (behind, len(raw))
    head = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert h11_read(head + stream)[2] == behind


# --- paths

SEGMENTS = st.sampled_from([b"", b".", b"..", b"...", b"a", b".a", b"%2e", b"%2E.", b".%2e", b"%2e%2e", b"%41", b"%25",
                            b"%252e", b"%2f", b"\xff", b"%ff", b"%5c.."])
PATHS = st.lists(SEGMENTS, max_size=8).map(lambda segments: b"/" + b"/".join(segments))


@examples(1000)
@given(PATHS)
def test_paths_are_decoded_as_the_rfc_says(path):
    found = http1.decode_path(path)
    assert found == without_dot_segments(unquote_to_bytes(path))


@examples(1000)
@given(PATHS | st.binary(max_size=30).map(b"/".__add__))
@example(b"//evil.example/")
@example(b"/%2f%5cevil.example/%2e%2e")
def test_no_path_leads_out(path):
    try:
        found = http1.decode_path(path)
    except HttpError as error:
        assert error.status == 400
        return
    assert found[:1] == b"/"
    assert not {b".", b".."} & set(found.split(b"/"))
    assert b"\0" not in unquote_to_bytes(path) or b"\0" in path
    if b"%" not in found:
        assert http1.decode_path(found) == found
    merged = http1.merge_slashes(found)
    assert merged == b"".join(b"" if byte == "/" == before else byte.encode("latin-1")
                              for before, byte in itertools.pairwise(" " + found.decode("latin-1")))
    assert urlsplit(urljoin("http://t/a/b", quote_from_bytes(merged, PATH_SAFE))).netloc == "t"


# --- dates

DATE_WORDS = st.sampled_from([
    *http1.DAYS, *http1.MONTHS, b"Sunday", b", ", b" ", b"-", b":", b"00", b"31", b"99", b"2024", b"0000", b"GMT",
    b"\xff"])
DAYS_IN_FULL = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@examples(300)
@given(st.integers(-30610224000, 253402300799))         # the years 1000 to 9999
def test_a_date_is_read_as_it_was_written(when):
    date = http1.format_date(when)
    assert len(date) == 29
    assert http1.parse_date(date) == when
    assert http1.parse_date(time.asctime(time.gmtime(when)).encode()) == when


@examples(300)
@given(st.integers(calendar.timegm((1990, 1, 1, 0, 0, 0)), calendar.timegm((2060, 1, 1, 0, 0, 0))))
def test_the_three_forms_of_a_date_agree(when):
    parts = time.gmtime(when)
    obsolete = time.strftime(f"{DAYS_IN_FULL[parts.tm_wday]}, %d-%b-%y %H:%M:%S GMT", parts).encode()
    assert http1.parse_date(obsolete) == http1.parse_date(http1.format_date(when)) == when


@examples(500)
@given(st.lists(DATE_WORDS, max_size=14).map(b"".join) | st.binary(max_size=40))
@example(b"Sun, 31 Feb 9999 23:59:60 GMT")
def test_whatever_is_no_date_is_none(value):
    assert isinstance(http1.parse_date(value), int | None)


# --- bytes at random

NOISE = st.binary(max_size=60) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join)
CODING_WORDS = [b"gzip", b"br", b"*", b"identity", b";q=", b"0", b"1", b".5", b",", b" ", b";", b"\xff"]
CODING_NOISE = st.lists(st.sampled_from(CODING_WORDS), max_size=12).map(b"".join)


@examples(500)
@given(NOISE | CODING_NOISE)
def test_any_accept_encoding_has_a_meaning(value):
    assert http1.acceptable_codings(value) <= {"", "br", "zstd", "gzip"}


WHERE = {
    "find_head": lambda raw: http1.find_head(raw, 0),
    "find_head on": lambda raw: http1.find_head(raw, len(raw) // 2),
    "parse_head": http1.parse_head,
    "parse_fields": http1.parse_fields,
    "a field": lambda raw: http1.parse_head(b"GET / HTTP/1.1\r\nHost: t\r\n" + raw + b"\r\n\r\n"),
    "a target": lambda raw: http1.parse_head(b"GET /" + raw + b" HTTP/1.1\r\nHost: t\r\n\r\n"),
    "Content-Length": lambda raw: http1.parse_fields(b"Content-Length: " + raw + b"\r\n\r\n"),
    "Host": lambda raw: http1.parse_fields(b"Host: " + raw + b"\r\n\r\n"),
    "a path": lambda raw: http1.decode_path(b"/" + raw),
    "chunks": lambda raw: Body(IN_CHUNKS).feed(raw),
    "a chunk": lambda raw: Body(IN_CHUNKS).feed(b"3\r\n" + raw),
    "trailers": lambda raw: Body(IN_CHUNKS).feed(b"0\r\n" + raw),
}


@examples(300)
@given(NOISE)
@example(b"")
def test_nothing_but_a_refusal_comes_of_any_bytes(raw):
    for where, function in WHERE.items():
        try:
            function(raw)
        except HttpError as error:
            assert error.status in (400, 414, 431, 501, 505), where
