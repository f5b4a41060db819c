"""What clients send over HTTP: heads, bodies, paths, preconditions and ranges, the short way to an answer, and what the
log says of them.

The oracles are h11, the email package and the models that the tests have.
"""

import contextlib
import datetime
import itertools
import re

import h11
import test_accesslog as accesslog
import test_answer as answers
import test_http1_properties as properties
import test_reply as replies
from test_http1_properties import MORE, REFUSED

import http1
from http1 import Body, HttpError
from plan import header_section
from reply import MAX_RANGES, FullResponse, Responder, parse_ranges

FRAGMENTS = tuple(fragment for fragment in properties.FRAGMENTS if fragment.strip())
WORDS = (*FRAGMENTS, b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Referer: ", b"User-Agent: ", b"OPTIONS ",
         b"HTTP/1.0", b"keep-alive", b"identity", b'"', b"\\", b"\xc3\xa9")


def examine(test, *arguments):
    """Have a property of the tests looked at, with these arguments."""
    test.hypothesis.inner_test(*arguments)


# --- requests

def request(data):
    """A head and what follows it: h11 reads the same, and the cuts make no difference."""
    if http1.skip_empty_lines(data):                # to h11 nothing at all is the end of the connection
        examine(properties.test_h11_reads_the_same, data)
    examine(properties.test_where_the_cuts_fall_makes_no_difference, data, range(1, len(data), 1 + len(data) // 200))
    examine(properties.test_nothing_but_a_refusal_comes_of_any_bytes, data)
    check_reading_twice(data)


def check_reading_twice(data):
    """What was refused or understood once is so again, from memory or not, and in a later buffer."""
    whole = properties.tarweb_head(data)
    assert properties.tarweb_head(bytes(bytearray(data))) == whole
    for raw in (data, with_lines_of(data)):
        examine(properties.test_the_short_way_is_the_long_one_or_none, raw, b"\r\n")
    assert properties.tarweb_head(data) == whole
    rest = http1.skip_empty_lines(b"\r\n\r\n" + data)
    assert data.endswith(rest)
    assert not rest.startswith(b"\r\n")
    if whole not in (MORE, REFUSED):
        found, size = whole
        assert http1.find_head(data[:size], 0) == size
        assert found.path == b"*" or found.path[:1] == b"/"
        assert found.fields.content_length >= 0
        assert found.connection in (b"", b"close", b"keep-alive")


def with_lines_of(data):
    """A request of which much is known, with the header lines of `data` among the others."""
    lines = data.partition(b"\r\n")[2]
    return b"GET / HTTP/1.1\r\n%b%b" % (b"".join(properties.PLAIN_HEAD[1:]), lines)


def request_seeds():
    return (b"GET / HTTP/1.1\r\n%b\r\n" % b"".join(properties.PLAIN_HEAD),
            b"GET / HTTP/1.1\r\n%b\r\n" % b"".join(properties.LINES[::3]),
            *properties.VALID, b"\r\n" + properties.VALID[0], b"".join(properties.VALID),
            b"POST / HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
            b"CONNECT t:443 HTTP/1.1\r\nHost: t:443\r\n\r\n", b"", b"\r\n",
            b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            b"GET /%41/%2e%2e/b HTTP/1.1\r\nHost: [::1]\r\nAccept-Encoding: gzip;q=0.5, br, *;q=0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: t\r\nRange: bytes=0-1\r\nIf-None-Match: \"a\"\r\nConnection: a, close\r\n\r\n")


# --- chunked bodies

CHUNK_WORDS = (b"\r\n", b"0\r\n\r\n", b"3\r\nabc\r\n", b";", b";a=b", b";a=\"b\"", b"0", b"A", b"f", b"10", b"\n",
               b"\r", b"000000000000000", b"T: u\r\n", b":", b" ", b"\t")
CHUNKED = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"


def body(data):
    """A chunked body in pieces: nothing is lost, it ends where h11 sees its end, and more behind it is left alone."""
    size, stream = 1 + (data[0] if data else 0), data[1:]
    whole = properties.tarweb_body(properties.IN_CHUNKS, stream)
    properties.check_bodies(properties.IN_CHUNKS, stream, properties.h11_read(CHUNKED + stream)[2])
    assert in_pieces(stream, size) == in_pieces(stream, 1) == whole
    if whole is not REFUSED and whole is not MORE:
        assert stream.endswith(whole)
        assert properties.tarweb_body(properties.IN_CHUNKS, stream + b"GET /") == whole + b"GET /"


def in_pieces(stream, size):
    """As tarweb_body, fed `size` bytes at a time."""
    reader, pending, fed = Body(properties.IN_CHUNKS), b"", 0
    try:
        for at in range(0, len(stream), size):
            piece = stream[at:at + size]
            pending, fed = reader.feed(pending + piece), fed + len(piece)
            assert reader.seen + len(pending) == fed
    except HttpError as error:
        assert error.status == 400
        return REFUSED
    return pending if reader.done else MORE


def body_seeds():
    return (b"\0" + b"3\r\nabc\r\n0\r\n\r\n", b"\4" + b"A;x=y\r\n0123456789\r\n000\r\nT: u\r\nV:\r\n\r\nGET /",
            b"\7" + b'1;a="b\\"c"\r\n\n\r\n0;z\r\n\r\n', b"\1" + b"ffffffffffffff\r\n", b"\1" + b"0\r\nT\r\n\r\n",
            b"\2" + b"3\r\nabcd\r\n0\r\n\r\n")


# --- targets

PATH_WORDS = (b"%2e", b"%2E", b"%2f", b"%00", b"%25", b"%", b"/../", b"/./", b"//", b"/.", b"..", b"?", b"#", b"http://",
              b"https://", b"HTTP://", b"*", b":80", b"[::1]", b"@", b"\\", b"%5c", b"%c0%ae", b";", b"\xff")
METHODS = (b"GET", b"OPTIONS", b"CONNECT", b"HEAD", b"BREW")
VISIBLE = re.compile(rb"[!-~]+")


def path(data):
    """A request target: it stands for the path that the RFC's own algorithm gives, or is refused for having no form."""
    method, target = METHODS[(data[0] if data else 0) % len(METHODS)], data[1:]
    raw, target = b"%b %b HTTP/1.1\r\nHost: t\r\n\r\n" % (method, target), properties.escaped(target)
    try:
        found = http1.parse_head(raw)
    except HttpError as error:
        assert error.status == 400
        assert not VISIBLE.fullmatch(target) or not properties.is_target(method, target)
        return
    assert VISIBLE.fullmatch(target)
    assert properties.is_target(method, target)
    assert (found.path, found.query) == properties.located(method, target)
    examine(properties.test_no_path_leads_out, b"/" if found.path == b"*" else found.path)
    examine(properties.test_no_path_leads_out, b"/" + target)


def path_seeds():
    return (b"\0/a/b?c=d", b"\0/a/../%2e%2e/b/.", b"\0/%2F..%00", b"\1*", b"\1http://t", b"\1http://t?q", b"\2t:443",
            b"\3http://[::1]:80/a/./b?", b"\4//a//..", b"\0/%41%zz", b"\0https://u@t/", b"\0/a#b")


# --- replies

FIELDS = ("Range: ", "If-Range: ", "If-Match: ", "If-None-Match: ", "If-Modified-Since: ", "If-Unmodified-Since: ",
          "Accept-Encoding: ", "Connection: close", "Expect: 100-continue", "Host: u")
FIELD_WORDS = (*(b"\r\n" + field.encode() for field in FIELDS), b"bytes=", b"bytes=0-0,500-", b"-1", b"0-", b",", b", ",
               b'"tag"', b'W/"tag"', b'"4000-0"', b"*", b"2500-100", b"identity;q=0", b"gzip", b"br;q=1", b"zstd",
               b"*;q=0", replies.DATE.encode(), replies.BEFORE.encode(), replies.AFTER.encode(),
               b"Sunday, 06-Nov-94 08:49:37 GMT", b"Sun Nov  6 08:49:37 1994",
               b"9999999999999999999", b"\t", b"=", b"-", b";")
PATHS = (b"/plain", b"/packed", b"/empty", b"/untagged", b"/dir", b"/dir/", b"/nowhere", b"*", b"/dir?q%0d",
         b"/404.html")
VERBS = (b"GET", b"HEAD", b"OPTIONS", b"POST", b"BREW")
RESPONDERS = (replies.RESPONDER, Responder(replies.Contents({**replies.SITE, b"/404.html": replies.PAGE}), b""))


def reply(data):
    """Header fields of any kind: the response is whole, h11 reads it, and its status is the one that is asked for."""
    choice, block = (data[0] if data else 0), data[1:]
    target, verb = PATHS[choice % len(PATHS)], VERBS[choice // len(PATHS) % len(VERBS)]
    responder = RESPONDERS[choice // len(PATHS) // len(VERBS) % 2]
    try:
        asked = http1.parse_head(b"%b %b HTTP/1.1\r\nHost: t%b\r\n\r\n" % (verb, target, block))
    except HttpError:
        return
    made = responder.reply(asked)
    assert made == responder.reply(asked)
    made = responder.expand(made) if isinstance(made, FullResponse) else made
    replies.fields(made)
    assert replies.body(made) == read_by_h11(asked, made)
    assert made.close == (asked.connection == b"close")
    if verb == b"GET" and target in (b"/plain", b"/packed", b"/empty", b"/untagged", b"/dir/"):
        check_file(asked, made, replies.SITE[target])


def read_by_h11(asked, made):
    """The body of a Reply, as a client understands it."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=asked.method, target="/", headers=[("Host", "t")]))
    client.send(h11.EndOfMessage())
    client.receive_data(b"HTTP/1.1 %d x\r\n%b%b" % (made.status, header_section(made), replies.body(made)))
    pieces = []
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA, "the response is cut short"
        pieces += [bytes(event.data)] if isinstance(event, h11.Data) else []
    assert client.trailing_data[0] == b"", "there is more than the response"
    return b"".join(pieces)


def check_file(asked, made, resource):
    """The answer to GET of a file, against RFC 9110 sections 12.5.3, 13.2.2 and 14.2."""
    fields = asked.fields
    able = [one for one in (resource.plain, *resource.variants) if one.coding in fields.codings]
    if fields.expect is not None and fields.expect.lower() != b"100-continue":
        assert made.status == 417
        return
    if not able:
        assert made.status == 406
        return
    chosen, ranges = expected_choice(fields, resource, able)
    status = expected_status(fields, chosen, ranges)
    assert made.status == status
    head = replies.fields(made)
    if status in (200, 206, 304):
        assert head.get("ETag", "").encode() == chosen.etag
    if status == 200:
        assert replies.body(made) == replies.content(chosen)
    if status in (200, 206):
        assert head.get("Content-Encoding", "") == chosen.coding
    if status == 206:
        for start, end, part in replies.parts(made, chosen.length):
            assert 0 <= start < end <= chosen.length
            assert part == replies.content(chosen)[start:end]


def expected_choice(fields, resource, able):
    """The representation that is sent, and which ranges of it; None for all."""
    whole, ranged = min(able, key=lambda one: one.length), None
    if fields.range is None:
        return whole, None
    if fields.if_range is None:
        ranged = resource.plain if resource.plain in able else whole
    else:
        named = [one for one in (resource.plain, *resource.variants) if range_applies(fields.if_range, one)]
        ranged = named[0] if len(named) == 1 and named[0] in able else None
    ranges = parse_ranges(fields.range, ranged.length) if ranged else None
    return (whole, None) if ranges is None or len(ranges) > 1 and ranged.coding else (ranged, ranges)


def expected_status(fields, chosen, ranges):
    if fields.if_match is not None:
        if not names(fields.if_match, chosen.etag, weak=False):
            return 412
    elif (when := date(fields.if_unmodified_since)) is not None and chosen.mtime > when:
        return 412
    if fields.if_none_match is not None:
        if names(fields.if_none_match, chosen.etag, weak=True):
            return 304
    elif date(fields.if_modified_since) == chosen.mtime:
        return 304
    return 200 if ranges is None else 206 if ranges else 416


def names(value, etag, weak):
    """Whether a list of entity tags, read letter by letter (RFC 9110 section 8.8.3), has this one; of none, no."""
    if b"*" in value and not value.strip(b"\t ,*") and re.fullmatch(rb"[\t ]*\*?[\t ]*(,[\t ]*\*?[\t ]*)*", value):
        return True
    found, rest = [], value.lstrip(b"\t ,")
    while rest:
        is_weak, rest = rest.startswith(b"W/"), rest.removeprefix(b"W/")
        tag, quote, rest = rest[1:].partition(b'"') if rest.startswith(b'"') else (b"", b"", b"")
        if not quote or any(byte <= 32 or byte == 127 for byte in tag):
            return False
        found += [b'"%b"' % tag] if weak or not is_weak else []
        rest = rest.lstrip(b"\t ")
        if rest and not rest.startswith(b","):
            return False
        rest = rest.lstrip(b"\t ,")
    return etag != b"" and etag in found


def range_applies(value, chosen):
    """RFC 9110 section 13.1.5."""
    return value == chosen.etag if value.startswith(b'"') else date(value) == chosen.mtime


LAYOUTS = "%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"


def date(value):
    """A date as the server reads it, once Python's own reading of it has been heard."""
    if value is None:
        return None
    when = http1.parse_date(value)
    for layout in LAYOUTS if when is not None else ():
        with contextlib.suppress(ValueError):
            parsed = datetime.datetime.strptime(value.decode("latin-1"), layout).replace(tzinfo=datetime.UTC)
            century = datetime.timedelta(36525 if "%y" in layout else 0)    # of two digits each chooses its own
            assert when in ((parsed + century * i).timestamp() for i in (-1, 0, 1))
    return when


def reply_seeds():
    tag, day = b'\r\nIf-None-Match: "tag"', replies.DATE.encode()
    return (b"\0", b"\0\r\nRange: bytes=0-0,500-", b"\0\r\nRange: bytes=-1", b"\0" + tag, b"\x0a" + tag,
            b"\1\r\nAccept-Encoding: gzip, br;q=0.5, identity;q=0", b"\1\r\nAccept-Encoding: *;q=0",
            b'\0\r\nIf-Match: W/"tag", "a,b" , "tag"\r\nIf-None-Match: "x"', b"\0\r\nIf-Modified-Since: " + day,
            b"\0\r\nIf-Unmodified-Since: " + day, b"\0\r\nRange: bytes=0-4\r\nIf-Range: " + day,
            b'\0\r\nRange: bytes=9999-\r\nIf-Range: "tag"', b"\3\r\nIf-None-Match: *", b"\4\r\nConnection: close",
            b"\2\r\nRange: bytes=-5", b"\0\r\nIf-Modified-Since: Sunday, 06-Nov-94 08:49:37 GMT",
            b"\0\r\nIf-Modified-Since: Sun Nov  6 08:49:37 1994", b"\x14\r\nExpect: 100-continue")


# --- the short way

BETWEEN = b"\0\0"            # requests: no head has that
ANSWER_WORDS = (
    BETWEEN, b"?", b"HEAD ", b"//", b"\r\n\r\n", b"\n", b"\r", *(path + b" " for path in answers.CONTENTS),
    *(b"%b: %b\r\n" % (name, value) for name, values in answers.VALUES.items() for value in values[:3]))


def answer(data):
    """Requests to one site, again and again and in other orders: each gets what it gets where nothing is remembered."""
    choice, raws = (data[0] if data else 0), data[1:].split(BETWEEN)[:6]
    answers.check_often([*answers.SITES.values()][choice % len(answers.SITES)](), raws, choice)


def answer_seeds():
    short = [*answers.SHORT.values()]
    for number, at in enumerate(range(0, len(short), 4)):
        yield bytes([number]) + BETWEEN.join((short[0], *short[at:at + 4]))
    for number, raw in enumerate((*properties.VALID, *[*answers.LONG.values()][:16])):
        yield bytes([number]) + BETWEEN.join((short[1], raw))
    for line in properties.WRONG_LINES:
        yield b"\0" + BETWEEN.join((short[0], answers.with_lines(short[0], b"X-A: b", line.rstrip(b"\r\n"), b"Via: p")))


# --- ranges

RANGE_WORDS = (b"bytes=", b"0-", b"-1", b"0-0", b"99-", b",", b"-", b" ", b"\t", b"1000", b"18446744073709551616",
               b"00000000000000000000")
BLANK_OR_VISIBLE = re.compile(r"[\t -~]*")
BEYOND = re.compile(r"[0-9]{19,}-[0-9]{19,}")       # not looked at which is greater, as RFC 9110 section 14.2 allows


def ranges(data):
    """The value of Range, and the length of what it is of: what is sent is what the model's set of bytes asks for."""
    length, value = int.from_bytes(data[:2]) % 1101, data[2:]
    examine(replies.test_any_bytes_have_a_meaning_as_ranges, value, length)
    found = parse_ranges(b"bytes=" + value, length) or []
    assert len(found) <= MAX_RANGES
    assert sum(end - start for start, end in found) <= length, "a byte twice"
    text = value.decode("latin-1")
    specs = text.split(",")
    if len(specs) <= MAX_RANGES and BLANK_OR_VISIBLE.fullmatch(text) and not BEYOND.search(text):
        examine(replies.test_any_ranges_of_any_length, specs, length)


def ranges_seeds():
    values = (b"0-0", b"-5", b"5-", b"0-9,5-14", b"900-,0-9,400-409,800-899", b"0-0, 500-500", b",,1-2,", b"5-4",
              b"1000-", b"bytes=0-1", b"-0", b"0-0,-1,2-3,100-200,300-,50-60", b"1-99999999999999999999999",
              b"5988888888888888888888-888888888888888888888")
    return [length.to_bytes(2) + value for length in (1000, 100, 0) for value in values]


# --- log lines

ADDRESSES = (b"192.0.2.1", b"2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", b"")


def log(data):
    """A head, whole or not, in both styles: one line that others can read, and the same one from memory."""
    choice, head = (data[0] if data else 0), data[1:]
    status, size = (200, 404, 304)[choice % 3], (0, 1, 1 << 40)[choice // 3 % 3]
    examine(accesslog.test_no_head_breaks_a_line, head, status, size)
    for style, address in itertools.product(("combined", "json"), ADDRESSES):
        line = accesslog.line_of(style, head, status, size, address)
        assert line == accesslog.line_of(style, head, status, size, address)
        assert line.isascii()
        assert line[:-1].decode().isprintable()
        accesslog.read(style, line)


def log_seeds():
    agent = b"\r\nHost: t\r\nUser-Agent: a \"b\" \\ \xc3\xa9\xff\x1b[1m\r\nReferer: http://r/\r\n\r\n"
    return (b"\0GET / HTTP/1.1" + agent, b"\1\x16\x03\x01\0\xff", b"\2", b"\5GET /" + b"%41" * 600 + agent,
            b"\4" + b"\xe2\x82\xac" * 600 + agent, b"\3a b c d" + b"\r\nreferer:" + b'"' * 800, b"\6\r\n\r\n")
