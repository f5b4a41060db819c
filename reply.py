"""What a request gets: (Request, Archive) -> Reply. Pure (RFC 9110).

Replies are values: equal requests give equal replies, so whoever sends them may keep what it made of one. They are the
same for every version of HTTP, each of which puts them on the wire in its own way (HTTP/1.1: plan.py).
"""

import re
import secrets
from base64 import b64encode
from functools import lru_cache, partial
from html import escape
from http import HTTPStatus
from operator import itemgetter
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from archive import PAGE, PATH_SAFE, Redirect, Representation, Resource
from http1 import KNOWN, SERVED, Decoded, list_members, merge_slashes, parse_date

MAX_RANGES = 200            # in one request, as Apache has it; who asks for more gets the whole file
PART_GAP = 80               # ranges nearer than this many bytes become one: about what a part's own head takes

Span = bytes | tuple[int, int]                  # bytes to send, or (address, length) in the archive

ALLOW = b"Allow", b", ".join(SERVED)
READ_ONLY = b"Allow", b"GET, HEAD"              # of what is made when it is asked for, where OPTIONS is no use
NO_CACHE = b"Cache-Control", b"no-cache"        # of errors and redirects: what is missing may be there the next time
NO_STORE = b"Cache-Control", b"no-store"
NOSNIFF = b"X-Content-Type-Options", b"nosniff"
BOUNDARY = secrets.token_hex(12).encode()       # made after the archive, so nothing in it can hold this by design


class Reply(NamedTuple):
    """A response but for what its sender adds: Server, Date, Last-Modified, and Connection in HTTP/1."""

    status: int
    fields: tuple[tuple[bytes, bytes], ...]         # names and values
    body: tuple[Span, ...]
    connection: bytes = b""     # as in Request: b"" (persist), b"close", b"keep-alive" (said to HTTP/1.0)
    modified: int = 0           # seconds since the epoch, for Last-Modified where Date is not earlier; 0: not known
    bare: bool = False          # whether it goes without Strict-Transport-Security that its sender would add

    @property
    def close(self):
        return self.connection == b"close"


class FullResponse(NamedTuple):
    """What nearly every request gets, 200 with all of a file, in a form that is cheap to make; see Responder.expand."""

    chosen: Representation
    vary: bool              # whether other representations could have been chosen
    connection: bytes
    head_only: bool         # HEAD: no body
    blocks: tuple = ()      # as in Resource


new_full_response = partial(tuple.__new__, FullResponse)        # as new_request in http1.py


class Responder:
    """Answers requests from one archive. `cache_control` (bytes) goes with every file of it that is asked for.

    rules: the site's own (rules.Rules), or None; then `archive` need not have more than `find` and `sha256`. scheme: by
    which its requests come, "http" or "https". deepest_page: as in Archive, 0 for a 404.html in the root alone."""

    def __init__(self, archive, cache_control, rules=None, scheme="http", deepest_page=0):
        self.archive, self.rules, self.scheme, self.deepest_page = archive, rules, scheme.encode(), deepest_page
        self.stored = archive.stored if rules else archive.find     # what the files alone give for a path
        self.cache_control = ((b"Cache-Control", cache_control),) if cache_control else ()

    def reply(self, request):
        """The Reply or FullResponse for a Request whose body, if any, has been read past."""
        method, path, _, connection, _, fields = request
        if fields.expect is not None and fields.expect.lower() != b"100-continue":
            return error_reply(417, "the only expectation met here is 100-continue", request)
        if method not in (b"GET", b"HEAD"):
            return self.other_method(request)
        found = self.archive.find(path)
        if not isinstance(found, Resource):
            return self.elsewhere(request, found)
        chosen = select(found, fields.codings)
        vary = bool(found.variants)
        if chosen is None:
            return not_acceptable(request, vary)
        if fields.conditional:
            dress = found.blocks and self.rules.dress_of(found.blocks)
            if reply := self.conditional(request, found, chosen, dress):
                return reply
        return new_full_response((chosen, vary, connection, method == b"HEAD", found.blocks))

    def other_method(self, request):
        """OPTIONS (RFC 9110 section 9.3.7), and the methods that a file cannot do."""
        if request.method not in KNOWN:
            return error_reply(501, "this method is not known here", request)
        if request.method != b"OPTIONS":
            return error_reply(405, "a file can be read, and nothing else", request, (ALLOW,))
        if request.path != b"*":
            found = self.archive.find(request.path)
            if not isinstance(found, Resource | Redirect):
                instead = self.elsewhere(request, found)
                if instead.status in (404, 410, 451):
                    return instead
        return self.dressed(Reply(204, (ALLOW,), (), request.connection), request)

    # what is no file

    def elsewhere(self, request, found):
        """The Reply where what was `found` in the index is no Resource, but a directory's Redirect, Ruled or None."""
        if isinstance(found, Redirect):
            return self.moved(relative_location(request, found) + request.query, request)
        if found is None and b"//" in request.path and (reply := self.without_slashes(request)):
            return reply
        existing = found.existing if found else None
        if self.rules and (reply := self.by_rule(request, existing, found and found.rule)):
            return reply
        if isinstance(existing, Resource):
            return self.file(request, existing, self.dress(request))
        return self.elsewhere(request, existing) if existing else self.error_page(request)

    def without_slashes(self, request):
        """A redirect to the path without repeated slashes, where the archive has something there; else None."""
        path = merge_slashes(request.path)
        found = self.stored(path)
        if isinstance(found, Redirect):
            return self.moved(found.location + request.query, request)
        return self.moved(quote_from_bytes(path, PATH_SAFE).encode() + request.query, request) if found else None

    def by_rule(self, request, existing, rule):
        """What the site's rules say of a path that is `existing` or None: a Reply, or None where they say nothing.
        `rule` is the one that counts for all requests; None where it has to be looked for."""
        rule, values = (rule, {}) if rule else self.rules.first(self.scheme, request) or (None, None)
        if rule is None or existing is not None and not rule.force:
            return None
        if rule.is_redirect:
            location = rule.location(values, self.scheme, request)
            return location and self.moved(location, request, rule.status)
        found = rule.file(values, self.stored)
        if found is None:
            return self.error_page(request)
        if rule.status == 200:
            return self.file(request, found, self.dress(request))
        return self.page(request, found, rule.status)

    def moved(self, location, request, status=301):
        return self.dressed(redirect_reply(location, request, status), request)

    def error_page(self, request):
        """404, with the nearest 404.html upwards from the path, where the archive has one."""
        end = request.path.rfind(b"/", 0, self.deepest_page + 1)
        while end >= 0:
            page = self.stored(request.path[:end] + PAGE)
            if isinstance(page, Resource):
                return self.page(request, page, 404)
            end = request.path.rfind(b"/", 0, end)
        return error_reply(404, "", request)

    def page(self, request, page, status):
        """An error with a page of the archive's own."""
        chosen = select(page, request.fields.codings) or page.plain
        fields = *representation_fields(chosen, bool(page.variants)), length_field(chosen.length), NO_CACHE
        body = () if request.method == b"HEAD" else chosen.spans()
        return self.dressed(Reply(status, fields, body, request.connection), request)

    # the site's own header fields

    def dress(self, request):
        return self.rules.dress(self.scheme, request) if self.rules else None

    def dressed(self, reply, request):
        """A Reply that is not a file with the fields that the site's rules give."""
        dress = self.dress(request)
        return put_on(dress.of_others(), reply) if dress else reply

    # the file itself

    def expand(self, response):
        """The Reply that a FullResponse stands for."""
        chosen, vary, connection, head_only, blocks = response
        return self.whole(chosen, vary, connection, head_only, blocks and self.rules.dress_of(blocks))

    def whole(self, chosen, vary, connection, head_only, dress, digest=()):
        """200 with all of a file. `dress`, here and below, is the rules.Dress that the response gets, if any; `digest`
        as `digest_fields` gives it."""
        body = () if head_only else chosen.spans()
        reply = Reply(200, self.file_fields(chosen, vary, chosen.length, *digest), body, connection, chosen.mtime)
        return put_on(dress, reply) if dress else reply

    def file_fields(self, chosen, vary, length, *content):
        """The header fields that go with all or parts of a file; `content` are more that say what is sent of it."""
        return (*representation_fields(chosen, vary), *content, length_field(length), *self.validators(chosen),
                (b"Accept-Ranges", b"bytes"))

    def validators(self, chosen):
        etag = ((b"ETag", chosen.etag),) if chosen.etag else ()
        return *etag, *self.cache_control

    def digest_fields(self, request, chosen):
        """Repr-Digest, where it is wanted and known (RFC 9530 section 3). It is of the Representation, whatever part
        of that is sent. No Vary tells of it: whoever did not ask for it can be sent it all the same."""
        digest = self.archive.sha256(chosen) if request.fields.digest else None
        return ((b"Repr-Digest", b"sha-256=:%b:" % b64encode(digest)),) if digest else ()

    def file(self, request, resource, dress):
        """The Reply for a Resource; no FullResponse, because the next request for its path may get something else."""
        chosen, vary = select(resource, request.fields.codings), bool(resource.variants)
        if chosen is None:
            return not_acceptable(request, vary)
        reply = self.conditional(request, resource, chosen, dress) if request.fields.conditional else None
        return reply or self.whole(chosen, vary, request.connection, request.method == b"HEAD", dress)

    def conditional(self, request, resource, chosen, dress):
        """The Reply to a request with preconditions or a range (RFC 9110 section 13.2.2 gives the order), or one that
        wants a digest; None where they do not count. `chosen` is what of the Resource is sent where no range counts."""
        fields, connection, vary = request.fields, request.connection, bool(resource.variants)
        ranges = None
        if fields.range is not None and request.method == b"GET":
            chosen, ranges = select_ranges(fields, resource, chosen)
        status = precondition(fields, chosen)
        if status == 412:
            return error_reply(412, "", request)
        if status == 304:
            reply = Reply(304, (*self.validators(chosen), *vary_fields(vary)), (), connection, chosen.mtime)
            return put_on(dress, reply) if dress else reply
        digest = self.digest_fields(request, chosen)
        if ranges is None:
            return self.whole(chosen, vary, connection, request.method == b"HEAD", dress, digest) if digest else None
        if not ranges:
            unsatisfied = b"Content-Range", b"bytes */%d" % chosen.length
            return error_reply(416, "", request, (unsatisfied, *vary_fields(vary)))
        return self.partial(chosen, ranges, vary, connection, dress, digest)

    def partial(self, chosen, ranges, vary, connection, dress, digest):
        """206 (RFC 9110 section 15.3.7): one range as it is, several as multipart/byteranges."""
        if len(ranges) == 1:
            [(start, end)] = ranges
            body, length = chosen.spans(start, end), end - start
            fields = self.file_fields(chosen, vary, length, content_range(start, end, chosen.length), *digest)
        else:
            if dress and dress.media_type is not None:
                chosen = chosen._replace(media_type=dress.media_type)
            body, length = multipart(chosen, ranges)
            several = chosen._replace(media_type=b"multipart/byteranges; boundary=" + BOUNDARY)
            fields = self.file_fields(several, vary, length, *digest)
            dress = dress and dress.of_parts()
        reply = Reply(206, fields, body, connection, chosen.mtime)
        return put_on(dress, reply) if dress else reply


def put_on(dress, reply):
    """A Reply with the header fields of a rules.Dress."""
    return reply._replace(fields=dress.put_on(reply.fields), bare=b"strict-transport-security" in dress.names)


# --- replies that are not a file's

def content_reply(status, media_type, content, request=None, extra=()):
    """The Reply with `content` (bytes), which is in no archive; `extra` is more header fields. Without a `request`,
    because what came cannot be understood as one, the connection ends with it."""
    return own_reply(status, media_type, content, extra, *framing(request))


def framing(request):
    """(whether the response has no body, what it says of the connection)."""
    return (request.method == b"HEAD", request.connection) if request else (False, b"close")


def own_reply(status, media_type, content, extra, head_only, connection):
    fields = (b"Content-Type", media_type), length_field(len(content)), *extra, NOSNIFF
    return Reply(status, fields, () if head_only else (content,), connection)


def error_reply(status, reason, request=None, extra=(), caching=NO_CACHE):
    """A short text. `reason` (a few words, or "") explains the status; all else is as in content_reply."""
    return text_reply(status, reason, (*extra, caching), *framing(request))


def not_acceptable(request, vary):
    return error_reply(406, "no content coding of this file is acceptable", request, vary_fields(vary))


@lru_cache(64)              # a flood of 404s asks for the same one again and again
def text_reply(status, reason, extra, head_only, connection):
    text = f"{status} {HTTPStatus(status).phrase}{': ' if reason else ''}{reason}\n".encode()
    return own_reply(status, b"text/plain; charset=utf-8", text, extra, head_only, connection)


# --- redirects

def redirect_reply(location, request, status=301):
    """301 (RFC 9110 section 15.4.2), which all clients follow, 308 not, unless a site's rules say otherwise; and a link
    for those who read it."""
    link, title = escape(location.decode()), f"{status} {HTTPStatus(status).phrase}"
    text = f'<!DOCTYPE html>\n<title>{title}</title>\n<p>It is at <a href="{link}">{link}</a>.\n'
    more = (b"Location", location), NO_CACHE
    return content_reply(status, b"text/html; charset=utf-8", text.encode(), request, more)


def relative_location(request, found):
    """Where a directory is, seen from its path without the final slash, so that it is right behind a proxy that takes a
    prefix off: ./dir/ from /a/dir (RFC 3986 section 4.2: a colon in it makes no scheme). To the client an encoded slash
    is no end of a segment: ./a/dir/ from /a%2Fdir."""
    path = request.path
    name = unquote_to_bytes(path.raw.rpartition(b"/")[2]) if isinstance(path, Decoded) else path.rpartition(b"/")[2]
    if not path.endswith(b"/" + name):          # it had dot segments that to the client are none
        return found.location
    return b"./%b/" % quote_from_bytes(name, PATH_SAFE).encode()


# --- redirects to HTTPS, and ACME's challenges (RFC 8555 section 8.3)

CHALLENGES = b"/.well-known/acme-challenge/"
HOST_AND_PORT = re.compile(rb"(\[[^\]]+\]|[^:]+)(?::[0-9]*)?")


class Redirector:
    """Answers every request on the plain listener beside an HTTPS one with its address on `port` over HTTPS.

    name: the host for those who name none, as HTTP/1.0 allows and health checks do; they get 400 where it is empty.
    read_challenge: gives the content for a challenge's token (bytes), or None where there is none. It is called each
    time, since challenges come and go. Without it they are redirected like all else."""

    def __init__(self, port, read_challenge=None, name=b""):
        self.port = b"" if port == 443 else b":%d" % port
        self.read_challenge, self.name = read_challenge, name

    def reply(self, request):
        path = request.path
        if self.read_challenge and path.startswith(CHALLENGES):
            return self.challenge(path.removeprefix(CHALLENGES), request)
        if not path.startswith(b"/"):
            return error_reply(404, "", request)
        host = HOST_AND_PORT.fullmatch(self.name if request.fields.host is None else request.fields.host)
        if not host:
            return error_reply(400, "without a Host nobody can be sent to https", request)
        path = quote_from_bytes(path, PATH_SAFE).encode()
        location = b"https://%b%b%b%b" % (host[1], self.port, path, request.query)
        return redirect_reply(location, request)

    def challenge(self, token, request):
        if request.method not in (b"GET", b"HEAD"):
            return error_reply(405, "a file can be read, and nothing else", request, (READ_ONLY,))
        content = self.read_challenge(token)
        if content is None:
            return error_reply(404, "there is no such challenge", request)
        return content_reply(200, b"application/octet-stream", content, request, (NO_STORE,))


# --- representations and header fields

def select(resource: Resource, codings):
    """The smallest Representation in an acceptable content coding, or None (RFC 9110 section 12.5.3)."""
    for variant in resource.variants:       # smallest first
        if variant.coding in codings and (variant.length < resource.plain.length or "" not in codings):
            return variant
    return resource.plain if "" in codings else None


def representation_fields(chosen: Representation, vary):
    coding = ((b"Content-Encoding", chosen.coding.encode()),) if chosen.coding else ()
    return (b"Content-Type", chosen.media_type), NOSNIFF, *coding, *vary_fields(vary)


def vary_fields(vary):
    return ((b"Vary", b"Accept-Encoding"),) if vary else ()


def length_field(length):
    return b"Content-Length", b"%d" % length


def field_lines(fields):
    """Header fields as lines of text: those of HTTP/1.1 (RFC 9112 section 5) and of the parts of a multipart body."""
    return b"\r\n".join([*map(b": ".join, fields), b""])


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
    elif fields.if_modified_since is not None and has_date(chosen, fields.if_modified_since):
        return 304
    return None


def has_date(chosen, value):
    """Whether a Representation's date is exactly the HTTP-date in a field's value. A later one does not do, though RFC
    9110 section 13.1.3 would let it: after a roll-back the client's copy is the newer one, and another."""
    return chosen.mtime != 0 and parse_date(value) == chosen.mtime


def matches(value, etag, weak=False):
    """Whether an If-Match or (weak) If-None-Match value names `etag`; a malformed one names nothing."""
    if value == b"*" or b"*" in value and list_members(value) == {b"*"}:
        return True
    if not etag or not ENTITY_TAGS.fullmatch(value):
        return False
    tags = ENTITY_TAG.findall(value)
    return etag in ([tag.removeprefix(b"W/") for tag in tags] if weak else tags)


# --- ranges (RFC 9110 section 14)

RANGE = re.compile(rb"([0-9]+)-([0-9]*)|-([0-9]+)")


def select_ranges(fields, resource, chosen):
    """(Representation, ranges of it as in parse_ranges) for a request with a Range: (chosen, None) where that does not
    count. Several ranges are of the plain file alone: a multipart message can say no Content-Encoding of its parts."""
    found = select_ranged(fields, resource, chosen)
    ranges = parse_ranges(fields.range, found.length) if found else None
    return (chosen, None) if ranges is None or found.coding and len(ranges) > 1 else (found, ranges)


def select_ranged(fields, resource, chosen):
    """The Representation that a Range is of, or None where the client has another one.

    Without If-Range it is the plain file where that is acceptable: few who ask for a slice can decode one of gzip.
    If-Range (RFC 9110 section 13.1.5) names it by a strong entity tag, or by exactly its date, which is none of a
    single representation where others have the same (section 8.8.2.2)."""
    if fields.if_range is None:
        return resource.plain if "" in fields.codings else chosen
    is_tag = fields.if_range[:1] == b'"'
    named = [one for one in (resource.plain, *resource.variants)
             if (one.etag == fields.if_range if is_tag else has_date(one, fields.if_range))]
    return named[0] if len(named) == 1 and named[0].coding in fields.codings else None


def parse_ranges(value, length):
    """Ranges as (start, end) pairs in the order asked, end exclusive; [] where none can be satisfied; None where the
    field is to be ignored: malformed, another unit, too many, or of nothing at all (caches in front take what a 416
    says of an empty file for the answer to everybody)."""
    unit, _, specs = value.partition(b"=")
    asked = [spec.strip(b"\t ") for spec in specs.split(b",")]
    if unit.strip().lower() != b"bytes" or len(asked) > MAX_RANGES or not any(asked) or not length:
        return None
    ranges = []
    for spec in filter(None, asked):
        match = RANGE.fullmatch(spec)
        if not match:
            return None
        first, last, suffix = map(position, match.groups())
        if last is not None and last < first:
            return None
        if suffix is None:
            start, end = first, length if last is None else min(last + 1, length)
        else:
            start, end = max(0, length - suffix), length
        if start < end:
            ranges.append((start, end))
    return joined(ranges)


def position(digits):
    """A byte position as an int, None where there is none. Beyond 18 digits all are the same: past any end."""
    if not digits:
        return None
    return min(int(b"0" + digits.lstrip(b"0")[:19]), 10 ** 18)


def joined(ranges):
    """`ranges` with those in one that overlap or nearly touch, at the place of the first of them: no byte is in two, so
    together they are never more than the file."""
    found: list[list[int]] = []         # start, end, place
    for start, end, place in sorted((start, end, place) for place, (start, end) in enumerate(ranges)):
        if found and start <= found[-1][1] + PART_GAP:
            found[-1][1:] = max(end, found[-1][1]), min(place, found[-1][2])
        else:
            found.append([start, end, place])
    return [(start, end) for start, end, _ in sorted(found, key=itemgetter(2))]


def content_range(start, end, length):
    return b"Content-Range", b"bytes %d-%d/%d" % (start, end - 1, length)


def multipart(chosen, ranges):
    """Body spans and total length of a multipart/byteranges answer (RFC 9110 section 14.6). A line end comes before
    the first boundary too, as RFC 2046 section 5.1.1 allows: zsync takes a part only behind one."""
    body: list[Span] = []
    for start, end in ranges:
        kind = ((b"Content-Type", chosen.media_type),) if chosen.media_type else ()
        fields = field_lines((*kind, content_range(start, end, chosen.length)))
        head = b"\r\n--%b\r\n%b\r\n" % (BOUNDARY, fields)
        body += [head, *chosen.spans(start, end)]
    body.append(b"\r\n--%b--\r\n" % BOUNDARY)
    return tuple(body), sum(len(span) if isinstance(span, bytes) else span[1] for span in body)
