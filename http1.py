"""HTTP/1.1 requests: bytes in, values out, no I/O (RFC 9112, and RFC 9110 for the fields).

Strict on purpose. Whatever two parsers could read in two ways (bare CR or LF, obs-fold, a space
before the colon, doubled Content-Length, Content-Length beside Transfer-Encoding) is refused, so
that nothing in front of this server can disagree with it about where a request ends.
"""

import calendar
import re
import socket
import time
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

MAX_HEAD = 16 * 1024       # bytes of request line and header fields: browsers with many cookies send about 8 KiB
MAX_LINE = 8 * 1024        # bytes of request line: RFC 9112 section 3 recommends 8000 at least
MAX_BODY = 64 * 1024       # bytes of body read past before the answer; a longer one costs its sender the connection
MAX_CHUNK_LINE = 1024      # bytes of chunk-size line or trailer field
MEMO_VALUES = 64           # field values remembered, where few are in use: 1 MiB at most

SERVED = (b"GET", b"HEAD", b"OPTIONS")
KNOWN = frozenset((*SERVED, b"POST", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT"))


class HttpError(Exception):
    """A request that cannot be answered as asked: `status` is the response's, `reason` says why in a few words."""

    def __init__(self, status, reason):
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class Fields(NamedTuple):
    """What a header block means to this server. Bytes are None where the field is missing."""

    host: bytes | None
    close: bool                     # Connection: close
    keep_alive: bool                # Connection: keep-alive (HTTP/1.0)
    transfer_encoding: bytes | None
    content_length: int
    expect: bytes | None            # b"100-continue", or what else is expected as it stands; None: nothing
    codings: frozenset              # acceptable content codings among "", br, zstd, gzip ("" is identity)
    digest: bool                    # whether Want-Repr-Digest asks for sha-256
    conditional: bool               # whether it does, or any of the fields below is there
    if_match: bytes | None
    if_none_match: bytes | None
    if_modified_since: bytes | None
    if_unmodified_since: bytes | None
    if_range: bytes | None
    range: bytes | None


class Decoded(bytes):
    """A path that the request target has otherwise, as `raw`."""

    raw: bytes


class Request(NamedTuple):
    """One request head. A body follows it when `has_body`."""

    method: bytes
    path: bytes                     # decoded, dot segments removed: begins with a slash; or b"*" for OPTIONS *. Where
                                    # that has changed something, it is of class Decoded
    query: bytes                    # not decoded, visible ASCII, with its "?", or b""
    connection: bytes               # what the response says: b"" (persist), b"close", b"keep-alive" (HTTP/1.0)
    has_body: bool
    fields: Fields


new_request = partial(tuple.__new__, Request)       # of a tuple, for two thirds of what a call of Request takes

# Possessive quantifiers (++, *+) keep matching linear; on single characters only, for on groups that hold alternatives
# they match what they should not before Python 3.11.5.
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
REQUEST_LINE = re.compile(                                                                        # RFC 9112 section 3
    rb"(%b) ([!-\"$->@-~]++)(\?[!-\"$-~]*+)? HTTP/([0-9])\.([0-9])\r\n" % TOKEN)
PLAIN_LINE = re.compile(rb"(%b) (/[!-\"$->@-~]*+)(\?[!-\"$-~]*+)? HTTP/1\.1" % TOKEN)
QUERY = re.compile(rb"\?[!-\"$-~]*+ HTTP/1\.1")
FIELD_LINE = re.compile(rb"%b:[\t -~\x80-\xff]*+" % TOKEN)                                        # RFC 9112 section 5
FIELD_BLOCK = re.compile(rb"(?:%b\r\n)*\r\n" % FIELD_LINE.pattern)
RAW_TARGET = re.compile(rb"(%b )([!-~\x80-\xff]++)(?= HTTP/)" % TOKEN)
ESCAPED = [b"%c" % byte if byte < 0x80 else b"%%%02X" % byte for byte in range(256)]
REG_NAME = rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*"                                 # RFC 3986 section 3.2.2
IP_LITERAL = rb"\[(?:([0-9A-Fa-f:.]+)|[Vv][0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+,;=:]+)\]"
HOST = re.compile(rb"(?:%b|%b)(?::[0-9]*)?" % (IP_LITERAL, REG_NAME))
PORT = re.compile(rb":[0-9]*\Z")
ABSOLUTE = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE)                                    # RFC 9112 section 3.2
SLASH = ord("/")
BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})|%00")
SLASHES = re.compile(rb"//+")


def skip_empty_lines(buffer):
    """`buffer` without the CRLFs it begins with."""
    at = 0
    while buffer.startswith(b"\r\n", at):
        at += 2
    return buffer[at:]


def find_head(buffer, scanned):
    """Where the request head in `buffer` ends (the index after its empty line), or -1 when more bytes are needed.

    `scanned` is how many bytes an earlier call has seen. Raises HttpError as soon as no further byte could help.
    """
    end = buffer.find(b"\r\n\r\n", max(0, scanned - 3))
    size = end + 4 if end >= 0 else len(buffer)
    if size >= MAX_LINE + 2 and buffer.find(b"\r\n", 0, MAX_LINE + 2) < 0:
        raise HttpError(414, "the request line is longer than 8 KiB")
    if size > MAX_HEAD:
        raise HttpError(431, "the request head is longer than 16 KiB")
    if end >= 0:
        return size
    if is_broken(buffer, scanned):                      # in a whole head `parse_head` finds it
        raise HttpError(400, "a line does not end with CRLF, or NUL")
    return -1


def is_broken(buffer, start):
    """Whether there is NUL, or CR or LF alone (RFC 9112 section 2.2), in `buffer` from `start` on, before which there
    is none. A CR at its end may become a CRLF."""
    if buffer[start - 1:start] == b"\r":
        start -= 1
    end = len(buffer) - buffer.endswith(b"\r")
    lines = buffer.count(b"\r\n", start, end)
    return not (lines == buffer.count(b"\r", start, end) == buffer.count(b"\n", start, end)) or b"\0" in buffer[start:]


def parse_head(head):
    """The Request that `head` (bytes up to and with the empty line) asks. Raises HttpError."""
    line = REQUEST_LINE.match(head)
    if not line:
        head = escape_target(head)
        line = REQUEST_LINE.match(head)
    if not line:
        raise HttpError(400, "malformed request line")
    method, path, query, major, minor = line.groups()
    if major != b"1":
        raise HttpError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    fields = parse_fields(head[line.end():])
    if minor == b"0":
        connection = b"keep-alive" if fields.keep_alive and not fields.close else b"close"
        fields = fields._replace(expect=None)       # RFC 9110 section 10.1.1: not for HTTP/1.0
    else:
        connection = b"close" if fields.close else b""
        if fields.host is None:
            raise HttpError(400, "Host is missing")
    has_body = fields.transfer_encoding is not None or fields.content_length > 0
    if fields.transfer_encoding is not None:
        check_transfer_encoding(fields.transfer_encoding, minor)
    if path[0] != SLASH:
        path, host = parse_target(method, path, query)
        if host is not None:
            fields = fields._replace(host=host)     # RFC 9112 section 3.2.2: whatever the field says
    return Request(method, decoded(path), query or b"", connection, has_body, fields)


def check_transfer_encoding(value, minor):
    """Only `chunked`, and only from HTTP/1.1 (RFC 9112 section 6.1). Raises HttpError."""
    codings = [coding.strip(b"\t ").lower() for coding in value.split(b",")]
    if minor == b"0" or codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        raise HttpError(400, "Transfer-Encoding must be chunked, and HTTP/1.1")
    if len(codings) > 1:
        raise HttpError(501, "no transfer coding but chunked is known here")


def escape_target(head):
    """`head` with the bytes above 0x7F in its request target percent-encoded: some clients leave that out."""
    start = RAW_TARGET.match(head)
    return start[1] + b"".join(map(ESCAPED.__getitem__, start[2])) + head[start.end():] if start else head


def host_name(value):
    """The name in a Host field's value (bytes, or None), in lower case, without a port and a final dot."""
    return PORT.sub(b"", value or b"").lower().removesuffix(b".")


@lru_cache(MEMO_VALUES)
def is_host(value):
    """Whether `value` is a host, which may be empty, and perhaps a port (RFC 9110 section 7.2)."""
    host = HOST.fullmatch(value)
    return host is not None and (host[1] is None or is_ipv6(host[1]))


def is_ipv6(value):
    """Whether `value` is an IPv6 address without a zone, as RFC 3986 section 3.2.2 spells it."""
    try:
        socket.inet_pton(socket.AF_INET6, value.decode())
    except OSError:
        return False
    return True


def parse_target(method, target, query):
    """(path, host or None) of a request target that is no path itself (RFC 9112 section 3.2). Raises HttpError."""
    if target == b"*" and not query and method == b"OPTIONS" or method == b"CONNECT":
        return b"*", None
    absolute = ABSOLUTE.fullmatch(target)
    if not absolute or absolute[1][:1] in (b"", b":") or not is_host(absolute[1]):
        raise HttpError(400, "the request target is neither a path nor an http URI")
    if method == b"OPTIONS" and not absolute[2] and not query:
        return b"*", absolute[1]
    return absolute[2] or b"/", absolute[1]


def decoded(path):
    """`path` as Request has it. Raises HttpError."""
    if b"%" not in path and b"/." not in path:
        return path
    changed = Decoded(decode_path(path))
    changed.raw = path
    return changed


def decode_path(path):
    """`path` percent-decoded once, then without dot segments (RFC 3986 section 5.2.4). Raises HttpError.

    Decoding comes first, so %2e%2e is a dot segment and %2F a slash like any other: npm asks for /@scope%2Fname and
    means the file "name" in the folder "@scope".
    """
    if b"%" in path:
        if BAD_PERCENT.search(path):
            raise HttpError(400, "bad percent-encoding in the path")
        path = unquote_to_bytes(path)
    return remove_dot_segments(path) if b"/." in path else path


def remove_dot_segments(path):
    """RFC 3986 section 5.2.4; climbing above the root stays there."""
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            del kept[-1:]
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def merge_slashes(path):
    """`path` with one slash where there are several in a row, so a redirect to it stays on this host.

    Percent-encode it for that: browsers take a backslash for a slash and drop tabs and line ends.
    """
    return SLASHES.sub(b"/", path)


# --- header fields

WANTED = {name: i for i, name in enumerate((
    b"host", b"connection", b"transfer-encoding", b"content-length", b"expect", b"accept-encoding",
    b"want-repr-digest", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"if-range",
    b"range"))}
SF_KEY = rb"[a-z*][a-z0-9_\-.*]*+"
PREFERENCE = re.compile(rb"(%b)(?:=([0-9]{1,15}))?(?:;[ ]*+%b(?:=[!#-+\--:<-~]++)?)*" % (SF_KEY, SF_KEY))
WANTED_LINE = re.compile(rb"\n(%b):([^\r]*+)" % b"|".join(WANTED))      # in lower case, of a block without other CRs


def parse_fields(block):
    """The Fields of a header block: all that follows the request line, its empty line included. Raises HttpError."""
    if not FIELD_BLOCK.fullmatch(block):
        raise HttpError(400, "malformed header field")
    found: list = [None] * len(WANTED)
    for line in WANTED_LINE.finditer(b"\n" + block.lower()):    # others, which can be many, are not even looked at
        name, (start, end) = line[1], line.span(2)
        i, value = WANTED[name], block[start - 1:end - 1].strip(b"\t ")
        if found[i] is not None:
            if i in (WANTED[b"host"], WANTED[b"content-length"]):
                raise HttpError(400, f"{name.decode()} is given twice")
            value = found[i] + b", " + value        # RFC 9110 section 5.3; what is no list becomes unreadable: ignored
        found[i] = value
    host, connection, coding, length, expect, accept, wanted, *conditions = found
    if host is not None and not is_host(host):
        raise HttpError(400, "malformed Host")
    if coding is not None and length is not None:
        raise HttpError(400, "both Transfer-Encoding and Content-Length")
    options = list_members(connection or b"")           # RFC 9110 section 7.6.1
    digest = wanted is not None and wants_sha256(wanted)
    return Fields(host, b"close" in options, b"keep-alive" in options, coding, parse_length(length),
                  parse_expect(expect), acceptable_codings(accept), digest,
                  digest or any(value is not None for value in conditions), *conditions)


@lru_cache(MEMO_VALUES)
def list_members(value):
    """The distinct members of a list field value, in lower case and without empty ones (RFC 9110 section 5.6.1)."""
    return frozenset(member.strip(b"\t ").lower() for member in value.split(b",")) - {b""}


def parse_expect(value):
    """Fields.expect of an Expect field value (RFC 9110 section 10.1.1)."""
    if value is None or not (members := list_members(value)):
        return None
    return b"100-continue" if members == {b"100-continue"} else value


@lru_cache(MEMO_VALUES)
def wants_sha256(value):
    """Whether a Want-Repr-Digest field value asks for sha-256 (RFC 9530 section 4): a dictionary (RFC 8941 section 3.2)
    of algorithms, each with a preference from 1 to 10, or 0 where it is not wanted. Anything else is ignored."""
    preferences = {}
    for text in value.split(b","):
        member = PREFERENCE.fullmatch(text.strip(b"\t "))
        if not member:
            return False
        preferences[member[1]] = member[2]      # of several, the last one counts
    return 1 <= int(preferences.get(b"sha-256") or 0) <= 10


def parse_length(value):
    """Content-Length as an int, 0 where it is missing (RFC 9110 section 8.6). Raises HttpError."""
    if value is None:
        return 0
    if not value.isdigit() or len(value) > 18:
        raise HttpError(400, "malformed Content-Length")
    return int(value)


# --- requests that differ in nothing that counts
#
# Browsers' requests hardly ever come twice, because cookies, referers and entity tags differ. Without these lines, they
# do. Only whole lines are taken out: each begins after a line feed, is well-formed and ends with CRLF, and the only
# empty line of the head is its last. So what is left is a valid request if and only if the original is one. (A bare
# line feed before such a line stays, and makes what is left invalid.)

VALUE = rb"[\t -~\x80-\xff]*+"
VARYING = re.compile(       # between clients and visits; and what proxies in front add, or spell as HTTP/2 has it
    rb"\n(?:Cookie|Referer|User-Agent|cookie|referer|user-agent|X-%b|x-%b|Forwarded|forwarded|Via|via|traceparent):%b"
    rb"\r(?=\n)" % (TOKEN, TOKEN, VALUE))
CONDITION = re.compile(
    rb"\n(?=[IR])(If-None-Match: %b(?:\r\nIf-Modified-Since: %b)?|Range: %b)\r(?=\n)" % (VALUE, VALUE, VALUE))


def split_head(data):
    """(request line, header block) of `data`, where it is one request in whole; else (None, b""). The CR behind the
    request line is in neither."""
    if not 0 < data.find(b"\r\n\r\n") == len(data) - 4 < MAX_LINE:
        return None, b""
    line, _, block = data.partition(b"\r")
    return line, block


def essence(block):
    """A header block without the lines that mean nothing here but differ from one client or visit to another."""
    return VARYING.sub(b"", block)


def without_conditions(block):
    """(a header block without If-None-Match and Range, the lines of these). An If-Modified-Since behind If-None-Match,
    which overrides it (RFC 9110 section 13.1.3), goes with it."""
    parts = CONDITION.split(block)
    return b"".join(parts[::2]), parts[1::2]


def plain_fields(block):
    """The Fields of a header block, as split_head gives it, of an HTTP/1.1 request without a body; None where it is
    malformed, or belongs to a request with a body or without Host."""
    try:
        fields = parse_fields(block[1:])
    except HttpError:
        return None
    has_body = fields.content_length or fields.transfer_encoding is not None
    return None if has_body or fields.host is None or not block.startswith(b"\n") else fields


def plain_request(line, fields):
    """The Request of a request line, without its CRLF, and plain_fields; None where it is malformed, or has another
    version or form of target (RFC 9112 section 3.2) than the usual ones."""
    match = PLAIN_LINE.fullmatch(line)
    if match is None:
        return None
    method, path, query = match.groups(b"")
    try:
        path = decoded(path)
    except HttpError:
        return None
    return new_request((method, path, query, b"close" if fields.close else b"", False, fields))


# --- content negotiation (RFC 9110 section 12.5.3)

CODINGS = {b"br": "br", b"zstd": "zstd", b"gzip": "gzip", b"x-gzip": "gzip", b"identity": ""}
ACCEPTED = re.compile(rb"[\t ]*(%b)[\t ]*(?:;[\t ]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[\t ]*)?" % TOKEN)
IDENTITY = frozenset({""})


@lru_cache(MEMO_VALUES)
def acceptable_codings(value):
    """The codings among "", br, zstd and gzip that an Accept-Encoding field value accepts ("" is identity).

    Members that break the grammar are passed over.
    """
    if value is None:
        return IDENTITY
    weights = {}
    for member in value.split(b","):
        accepted = ACCEPTED.fullmatch(member)
        if accepted:
            weights[accepted[1].lower()] = float(accepted[2] or 1)
    others = weights.get(b"*")
    named = {coding: weights[name] for name, coding in CODINGS.items() if name in weights}
    for coding in CODINGS.values():
        if coding not in named and others is not None:
            named[coding] = others
    named.setdefault("", 1.0)
    return frozenset(coding for coding, weight in named.items() if weight > 0)


# --- bodies that are read past

CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[\t ]*;[\t -~\x80-\xff]*)?")     # RFC 9112 section 7.1


class Body:
    """Reads past the body that follows a request head. `done` once its last byte is in."""

    def __init__(self, fields):
        self.chunked = fields.transfer_encoding is not None
        self.left = fields.content_length     # bytes of the body, or of the chunk at hand, still to come
        self.seen = 0                         # bytes read so far, framing included
        self.expects = Body.chunk_size        # what the next line of a chunked body has to be
        self.done = False

    def feed(self, buffer):
        """Take what belongs to the body from the front of `buffer`; return the rest. Raises HttpError.

        A rest that is left while `done` is False is a piece of a line: give it again with more behind it.
        """
        at = 0
        while at < len(buffer) and not self.done:
            if self.left:
                taken = min(self.left, len(buffer) - at)
                self.left -= taken
                at += taken
                self.done = not self.left and not self.chunked
                continue
            end = buffer.find(b"\r\n", at, at + MAX_CHUNK_LINE + 2)
            if end < 0:
                if len(buffer) - at >= MAX_CHUNK_LINE + 2 or b"\n" in buffer[at:]:
                    raise HttpError(400, "malformed chunk, or one of its lines is too long")
                break
            self.expects(self, buffer[at:end])
            at = end + 2
        self.seen += at
        return buffer[at:]

    def chunk_size(self, line):
        size = CHUNK_SIZE.fullmatch(line)
        if not size:
            raise HttpError(400, "malformed chunk size")
        self.left = int(size[1], 16)
        self.expects = Body.chunk_end if self.left else Body.trailer

    def chunk_end(self, line):
        if line:
            raise HttpError(400, "a chunk is longer than its size says")
        self.expects = Body.chunk_size

    def trailer(self, line):
        if line and not FIELD_LINE.fullmatch(line):
            raise HttpError(400, "malformed trailer field")
        self.done = not line


# --- dates (RFC 9110 section 5.6.7)

DAYS = (b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat", b"Sun")
MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")
MONTH, TIME = rb"(?P<month>%b)" % b"|".join(MONTHS), rb"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
DATES = tuple(map(re.compile, (
    rb"(?:%b), (?P<day>\d\d) %b (?P<year>\d{4}) %b GMT" % (b"|".join(DAYS), MONTH, TIME),           # IMF-fixdate
    rb"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, (?P<day>\d\d)-%b-(?P<year>\d\d) %b GMT" % (MONTH, TIME),
    rb"(?:%b) %b (?P<day>[ \d]\d) %b (?P<year>\d{4})" % (b"|".join(DAYS), MONTH, TIME))))          # asctime


def format_date(when):
    """`when` (seconds since the epoch) as an IMF-fixdate: always 29 bytes."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(when)
    return b"%b, %02d %b %04d %02d:%02d:%02d GMT" % (
        DAYS[weekday], day, MONTHS[month - 1], year, hour, minute, second)


def parse_date(value):
    """Seconds since the epoch of an HTTP-date in any of its three forms, or None where it is none."""
    date = next((match for form in DATES if (match := form.fullmatch(value))), None)
    if date is None:
        return None
    year, month = int(date["year"]), MONTHS.index(date["month"]) + 1
    day, hour, minute, second = (int(date[part]) for part in ("day", "hour", "minute", "second"))
    if len(date["year"]) == 2:      # RFC 850: more than 50 years ahead means the past
        this_year = time.gmtime().tm_year
        year += this_year - this_year % 100
        year -= 100 if year > this_year + 50 else 0
    if not 1 <= day <= 31 or hour > 23 or minute > 59 or second > 60 or year < 1:
        return None
    return calendar.timegm((year, month, day, hour, minute, second))
