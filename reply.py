"""What a request gets: (Request, Archive) -> Reply. Pure (RFC 9110).

Replies are values: equal requests give equal replies, so whoever sends them may keep what it made of one.
"""

import re
import secrets
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from archive import Redirect, Representation, Resource
from http1 import KNOWN, SERVED, format_date, parse_date

MAX_PARTS = 16              # parts of one multipart/byteranges answer; who wants more gets the whole file
MAX_RANGES = 64             # ranges looked at in one request
PART_GAP = 80               # ranges nearer than this many bytes become one: about what a part's own head takes

ALLOW = b"Allow: " + b", ".join(SERVED) + b"\r\n"
BOUNDARY = secrets.token_hex(12).encode()       # made after the archive, so nothing in it can hold this by design

Span = bytes | tuple[int, int]                  # bytes to send, or (offset, length) in the archive


class Reply(NamedTuple):
    """A response: the status line, Server and Date are the sender's to add, `head` is all that follows them."""

    status: int
    head: bytes             # header fields and the empty line
    body: tuple[Span, ...]
    close: bool             # close the connection after it


class Whole(NamedTuple):
    """The Reply that nearly every request gets, 200 with all of a file, before it is spelled out: cheap to make."""

    chosen: Representation
    vary: bool              # whether other representations could have been chosen
    connection: bytes
    head_only: bool         # HEAD: no body

    @property
    def status(self):
        return 200


new_whole = partial(tuple.__new__, Whole)       # as new_request in http1.py


def connection_field(connection):
    return b"Connection: %b\r\n" % connection if connection else b""


class Responder:
    """Answers requests from one archive. `cache_control` (bytes) goes with everything that comes out of it."""

    def __init__(self, archive, cache_control):
        self.archive = archive
        self.cache_control = b"Cache-Control: %b\r\n" % cache_control if cache_control else b""

    def reply(self, request):
        """The Reply or Whole for a Request whose body, if any, has been read past."""
        method, path, _, connection, _, fields = request
        if fields.expect is not None and fields.expect.lower() != b"100-continue":
            return self.error(417, "the only expectation met here is 100-continue", connection, method)
        if method not in (b"GET", b"HEAD"):
            return self.other_method(request)
        found = self.archive.find(path)
        if not isinstance(found, Resource):
            return self.redirect(found, request) if found else self.not_found(request)
        chosen = select(found, fields.codings)
        vary = bool(found.variants)
        if chosen is None:
            return self.error(406, "no content coding of this file is acceptable", connection, method, vary_field(vary))
        if fields.conditional:
            return self.conditional(request, chosen, vary)
        return new_whole((chosen, vary, connection, method == b"HEAD"))

    def other_method(self, request):
        """OPTIONS (RFC 9110 section 9.3.7), and the methods that a file cannot do."""
        method, path, _, connection, _, _ = request
        if method not in KNOWN:
            return self.error(501, "this method is not known here", connection)
        if method != b"OPTIONS":
            return self.error(405, "a file can be read, and nothing else", connection, extra=ALLOW)
        if path != b"*" and self.archive.find(path) is None:
            return self.not_found(request)
        return Reply(204, ALLOW + connection_field(connection) + b"\r\n", (), connection == b"close")

    def not_found(self, request):
        """404, with the archive's own /404.html where it has one."""
        page = self.archive.find(b"/404.html")
        if not isinstance(page, Resource):
            return self.error(404, "", request.connection, request.method, self.cache_control)
        chosen = select(page, request.fields.codings) or page.plain
        head = b"".join((representation_fields(chosen, bool(page.variants)), b"Content-Length: %d\r\n" % chosen.length,
                         self.cache_control, connection_field(request.connection), b"\r\n"))
        body = () if request.method == b"HEAD" else ((chosen.offset, chosen.length),)
        return Reply(404, head, body, request.connection == b"close")

    def redirect(self, found: Redirect, request):
        """308 to a directory's own URL. The location comes from the archive's index, so it never leads elsewhere."""
        extra = b"Location: %b%b\r\n%b" % (found.location, request.query, self.cache_control)
        return self.error(308, "", request.connection, request.method, extra)

    def error(self, status, reason, connection=b"close", method=b"", extra=b""):
        """A short text. `reason` (a few words, or "") explains the status; `extra` is more header fields."""
        phrase = HTTPStatus(status).phrase
        text = f"{status} {phrase}{': ' if reason else ''}{reason}\n".encode()
        head = b"".join((b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n" % len(text), extra,
                         b"X-Content-Type-Options: nosniff\r\n", connection_field(connection), b"\r\n"))
        return Reply(status, head, () if method == b"HEAD" else (text,), connection == b"close")

    # the file itself

    def spell_out(self, whole):
        """The Reply that a Whole stands for."""
        chosen, vary, connection, head_only = whole
        head = b"".join((representation_fields(chosen, vary), b"Content-Length: %d\r\n" % chosen.length,
                         self.validators(chosen), b"Accept-Ranges: bytes\r\n", connection_field(connection), b"\r\n"))
        return Reply(200, head, () if head_only else ((chosen.offset, chosen.length),), connection == b"close")

    def validators(self, chosen):
        etag = b"ETag: %b\r\n" % chosen.etag if chosen.etag else b""
        return b"%bLast-Modified: %b\r\n%b" % (etag, format_date(chosen.mtime), self.cache_control)

    def conditional(self, request, chosen, vary):
        """A request with preconditions or a range (RFC 9110 section 13.2.2 gives the order)."""
        fields, connection = request.fields, request.connection
        head_only = request.method == b"HEAD"
        status = precondition(fields, chosen)
        if status == 412:
            return self.error(412, "", connection, request.method)
        if status == 304:
            head = b"".join((self.validators(chosen), vary_field(vary), connection_field(connection), b"\r\n"))
            return Reply(304, head, (), connection == b"close")
        if fields.range is None or head_only or not range_applies(fields.if_range, chosen):
            return Whole(chosen, vary, connection, head_only)
        ranges = parse_ranges(fields.range, chosen.length)
        if ranges is None:
            return Whole(chosen, vary, connection, head_only)
        if not ranges:
            extra = b"Content-Range: bytes */%d\r\n%b" % (chosen.length, vary_field(vary))
            return self.error(416, "", connection, extra=extra)
        return self.partial(chosen, ranges, vary, connection)

    def partial(self, chosen, ranges, vary, connection):
        """206 (RFC 9110 section 15.3.7): one range as it is, several as multipart/byteranges."""
        if len(ranges) == 1:
            [(start, end)] = ranges
            kind, length = representation_fields(chosen, vary) + content_range(start, end, chosen.length), end - start
            body = ((chosen.offset + start, length),)
        else:
            body, length = multipart(chosen, ranges)
            several = chosen._replace(media_type=b"multipart/byteranges; boundary=" + BOUNDARY)
            kind = representation_fields(several, vary)
        head = b"".join((kind, b"Content-Length: %d\r\n" % length, self.validators(chosen),
                         b"Accept-Ranges: bytes\r\n", connection_field(connection), b"\r\n"))
        return Reply(206, head, body, connection == b"close")


def select(resource: Resource, codings):
    """The smallest Representation in an acceptable content coding, or None (RFC 9110 section 12.5.3)."""
    for variant in resource.variants:       # smallest first
        if variant.coding in codings and (variant.length < resource.plain.length or "" not in codings):
            return variant
    return resource.plain if "" in codings else None


def vary_field(vary):
    return b"Vary: Accept-Encoding\r\n" if vary else b""


def representation_fields(chosen: Representation, vary):
    coding = b"Content-Encoding: %b\r\n" % chosen.coding.encode() if chosen.coding else b""
    return b"Content-Type: %b\r\nX-Content-Type-Options: nosniff\r\n%b%b" % (
        chosen.media_type, coding, vary_field(vary))


# --- preconditions (RFC 9110 section 13)

ENTITY_TAG = re.compile(rb'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*+"')
ENTITY_TAGS = re.compile(rb"[\t ,]*+(?:%b(?:[\t ]*+,[\t ,]*+|[\t ]*+$))+" % ENTITY_TAG.pattern)


def precondition(fields, chosen):
    """412 or 304 where the request's preconditions say so, else None (RFC 9110 section 13.2.2)."""
    if fields.if_match is not None:
        if not matches(fields.if_match, chosen.etag):
            return 412
    elif fields.if_unmodified_since is not None:
        date = parse_date(fields.if_unmodified_since)
        if date is not None and chosen.mtime > date:
            return 412
    if fields.if_none_match is not None:
        if matches(fields.if_none_match, chosen.etag, weak=True):
            return 304
    elif fields.if_modified_since is not None:
        date = parse_date(fields.if_modified_since)
        if date is not None and chosen.mtime <= date:
            return 304
    return None


def matches(value, etag, weak=False):
    """Whether an If-Match or (weak) If-None-Match value names `etag`; a malformed one names nothing."""
    if value == b"*":
        return True
    if not etag or not ENTITY_TAGS.fullmatch(value):
        return False
    tags = ENTITY_TAG.findall(value)
    return etag in ([tag.removeprefix(b"W/") for tag in tags] if weak else tags)


def range_applies(if_range, chosen):
    """If-Range (RFC 9110 section 13.1.5): a strong entity tag, or exactly the date of Last-Modified."""
    if if_range is None:
        return True
    if if_range[:1] == b'"':
        return if_range == chosen.etag
    return parse_date(if_range) == chosen.mtime


# --- ranges (RFC 9110 section 14)

RANGE = re.compile(rb"([0-9]+)-([0-9]*)|-([0-9]+)")


def parse_ranges(value, length):
    """Ranges as (start, end) pairs in the order asked, end exclusive; [] where none can be satisfied.

    None where the field is to be ignored: malformed, another unit, too many parts.
    """
    unit, equals, specs = value.partition(b"=")
    if not equals or unit.strip().lower() != b"bytes":
        return None
    ranges: list[tuple[int, int]] = []
    asked = [spec.strip(b"\t ") for spec in specs.split(b",")]
    if len(asked) > MAX_RANGES or not any(asked):
        return None
    for spec in filter(None, asked):
        match = RANGE.fullmatch(spec)
        if not match:
            return None
        first, last, suffix = map(position, match.groups())
        if suffix is not None:
            if suffix and not length:
                return None                 # satisfiable, but no 206 can say "no bytes": answer with the whole, empty
            start, end = max(0, length - suffix), length
        else:
            if last is not None and last < first:
                return None
            start, end = first, length if last is None else min(last + 1, length)
        if start < end:
            merge(ranges, start, end)
    return ranges if len(ranges) <= MAX_PARTS else None


def position(digits):
    """A byte position as an int, None where there is none. Beyond 18 digits all are the same: past any end."""
    if not digits:
        return None
    digits = digits.lstrip(b"0") or b"0"
    return int(digits) if len(digits) < 19 else 10 ** 18


def merge(ranges, start, end):
    """Add (start, end) to `ranges`, joined with all that it overlaps or nearly touches, at the place of the first."""
    near = [other for other in ranges if start <= other[1] + PART_GAP and other[0] <= end + PART_GAP]
    if not near:
        ranges.append((start, end))
        return
    joined = min(start, *(other[0] for other in near)), max(end, *(other[1] for other in near))
    at = ranges.index(near[0])
    ranges[:] = [other for other in ranges if other not in near]
    ranges.insert(at, joined)


def content_range(start, end, length):
    return b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, length)


def multipart(chosen, ranges):
    """Body spans and total length of a multipart/byteranges answer (RFC 9110 section 14.6)."""
    body: list[Span] = []
    total = 0
    for start, end in ranges:
        head = b"--%b\r\nContent-Type: %b\r\n%b\r\n" % (
            BOUNDARY, chosen.media_type, content_range(start, end, chosen.length))
        head = b"\r\n" + head if body else head
        body += [head, (chosen.offset + start, end - start)]
        total += len(head) + end - start
    tail = b"\r\n--%b--\r\n" % BOUNDARY
    return (*body, tail), total + len(tail)
