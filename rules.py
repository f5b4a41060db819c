"""A site's own rules: what the files `_redirects` and `_headers` in the root of its archive say. No I/O.

    parse_redirects, parse_headers      the bytes of a file -> rules or blocks, and notes on lines that cannot be used
    Rules                               which of them count for a path
    apply                               puts what they say into the index of an Archive, where that is the same for all
                                        requests, so that these cost nothing; reply.Responder asks Rules for the rest

docs/SITES.md says what a site's author has to know. Patterns match in time that grows with the path's length alone.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from heapq import merge
from itertools import takewhile
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from archive import OWN_MAX, PATH_SAFE, Archive, Entry, File, Redirect, Resource, Ruled
from http1 import BAD_PERCENT, TOKEN, Request, host_name, remove_dot_segments
from tar import shown

REDIRECTS, HEADERS = "_redirects", "_headers"       # as archive.OWN has them

LINE_MAX = 2000             # bytes in a line
EXACT_MAX = 10_000          # rules of one file, or blocks, whose path is fixed
PATTERNS_MAX = 200          # others: they are looked through one by one
FILLED_MAX = 32 * 1024      # bytes put in for placeholders in one response: the longest path, percent-encoded, fits
NOTED_MAX = 10              # lines of a file that the start-up names one by one

# Fields that say how a message is framed, or what this server alone knows; Vary is added to.
UNTOUCHED = frozenset((
    b"accept-ranges", b"allow", b"connection", b"content-length", b"content-encoding", b"content-range", b"date",
    b"etag", b"keep-alive", b"last-modified", b"location", b"proxy-connection", b"repr-digest", b"server", b"te",
    b"trailer", b"transfer-encoding", b"upgrade"))
OF_FILES = frozenset((b"cache-control", b"expires", b"content-type"))       # no field of these goes with an error
STATUSES = frozenset((200, 301, 302, 303, 307, 308, 404, 410, 451))
CONDITIONS = b"country=", b"language=", b"role=", b"cookie="

ORIGIN = re.compile(rb"(https?)://([^/?#]*)", re.IGNORECASE)
HOST_NAME = re.compile(rb"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?|\[[0-9A-Fa-f:.]+\]")
AUTHORITY = re.compile(rb"(?:%b)(?::[0-9]{1,5})?" % HOST_NAME.pattern)
PATH_START = re.compile(rb"\A//+")
PIECES = re.compile(rb":([A-Za-z_][A-Za-z0-9_]*)|(\*)|((?:[^:*]|:(?![A-Za-z_]))+)")
CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
NAME = re.compile(TOKEN)
BOM = b"\xef\xbb\xbf"

Template = tuple[bytes | str, ...]      # bytes that stand as they are, and names of placeholders
Values = dict[str, bytes]               # what a path has in their places
Stored = Callable[[bytes], File | None]        # gives what a path stands for by an archive's files alone


class Note(NamedTuple):
    """Why a line (from 1; 0 is the whole file) of one of the two files is not used."""
    file: str
    line: int
    reason: str

    def __str__(self):
        return f"{self.file}, line {self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class RuleError(Exception):
    """A line cannot be used; the text says why."""


# --- patterns

class Pattern(NamedTuple):
    """Which URLs a line is for."""
    scheme: bytes               # b"http" or b"https", or b"" for both
    host: bytes                 # in lower case; b"" for any
    prefix: bytes               # what a path begins with, decoded: all of it where there is no `regex`
    regex: re.Pattern | None
    names: tuple[str, ...]      # of its groups

    def match(self, path: bytes) -> Values | None:
        """What the placeholders stand for in a decoded path; None where it does not match."""
        if self.regex is None:
            return {} if path == self.prefix else None
        if not path.startswith(self.prefix) or not (found := self.regex.fullmatch(path)):
            return None
        return dict(zip(self.names, found.groups(), strict=True))

    def is_for(self, scheme: bytes, host: bytes) -> bool:
        """Whether it is for requests by `scheme` to `host` (as host_name gives it)."""
        return not self.host or (self.scheme == scheme and self.host == host)

    def covers(self, other: "Pattern") -> bool:
        """Whether it certainly matches whatever `other` does."""
        if not self.is_for(other.scheme, other.host):
            return False
        if other.regex is None:
            return self.match(other.prefix) is not None
        takes_all = self.names == ("splat",) and self.match(self.prefix) is not None
        return takes_all and other.prefix.startswith(self.prefix)


def parse_pattern(text: bytes, star_is_last: bool) -> Pattern:
    """The Pattern of a path, or of an http(s) URL with one. Raises RuleError.

    `*` matches anything. `:name` matches what is there up to a slash or the character that follows in the pattern;
    behind a `*` it also ends at the character in front of it, or one path could be looked through again and again.
    """
    scheme, host, path = split_origin(text)
    if host and not HOST_NAME.fullmatch(host):
        raise RuleError(f"{shown(host)} is not a host's name: write it without a port and placeholders, in ASCII")
    path = path or b"/"
    if b"?" in path:
        raise RuleError("query parameters cannot be compared: write the path alone")
    if path[:1] != b"/" or b"#" in path:
        raise RuleError(f"{shown(text)} is neither a path, which begins with '/', nor an http(s) URL")
    pieces = [(name.decode(), star, unquoted(literal)) for name, star, literal in PIECES.findall(path)]
    probe = b"".join([literal or b"x" for _, _, literal in pieces])
    if remove_dot_segments(probe) != probe:
        raise RuleError("no request has such a path: its dot segments are resolved before it is compared")
    regex, names = build_regex(pieces, star_is_last)
    compiled = re.compile(regex, re.DOTALL) if names else None
    return Pattern(scheme, host.lower().removesuffix(b"."), pieces[0][2], compiled, tuple(names))


def build_regex(pieces: list[tuple[str, bytes, bytes]], star_is_last: bool) -> tuple[bytes, list[str]]:
    """A regular expression, and the names of its groups, for pieces of which each is a (name, star or literal)."""
    regex, names, before = b"", [], b""
    for i, (name, star, literal) in enumerate(pieces):
        following = pieces[i + 1][2] if i + 1 < len(pieces) else b"/"
        if star and "splat" in names:
            raise RuleError("'*' can stand there only once")
        if star and star_is_last and i + 1 < len(pieces):
            raise RuleError("'*' can stand at the end only")
        if (name or star) and not following:
            raise RuleError("between two placeholders there has to be some text")
        if name in names or name == "splat":
            raise RuleError(f"':{name}' is the name of another placeholder")
        if name:
            ends = b"".join({b"/", following[:1], before[-1:] if "splat" in names else b""})
            regex += b"([^%b]++)" % re.escape(ends)
        else:
            regex += b"(.*)" if star else re.escape(literal)
        before = literal
        names += ["splat"] if star else [name] if name else []
    return regex, names


def split_origin(text: bytes) -> tuple[bytes, bytes, bytes]:
    """(scheme in lower case, authority, all the rest) of a URL; of a path the first two are empty. Raises RuleError."""
    found = ORIGIN.match(text)
    if not found:
        return b"", b"", text
    if not found[2]:
        raise RuleError(f"there is no host in {shown(text)}")
    return found[1].lower(), found[2], text[found.end():]


def unquoted(path: bytes) -> bytes:
    """Percent-decoded once, as paths of requests are. Raises RuleError."""
    if BAD_PERCENT.search(path):
        raise RuleError(f"bad percent-encoding in {shown(path)}")
    return unquote_to_bytes(path)


# --- templates

def split_template(text: bytes, names: Iterable[str]) -> Template:
    """`text` with `:name` for each of `names` taken for a placeholder; other colons are just colons."""
    named = "|".join(names).encode()
    pieces = re.split(rb":(%b)(?![A-Za-z0-9_])" % named, text) if named else [text]
    return tuple([piece.decode() if i % 2 else piece for i, piece in enumerate(pieces) if i % 2 or piece])


def fill(template: Template, values: Values, safe: str | None = None) -> bytes | None:
    """The text with `values` put in: percent-encoded but for what is `safe` too, or as they are where that is None.
    None where that could be more than FILLED_MAX bytes."""
    if 3 * sum([len(values[piece]) for piece in template if isinstance(piece, str)]) > FILLED_MAX:
        return None
    return b"".join([piece if isinstance(piece, bytes) else values[piece] if safe is None else
                     quote_from_bytes(values[piece], safe).encode() for piece in template])


# --- _redirects

class Rule(NamedTuple):
    """A line of _redirects: FROM TO STATUS."""
    line: int
    pattern: Pattern
    status: int
    force: bool                 # whether it counts where the archive has something, too
    origin: bytes               # of TO: b"https://host" perhaps with a port, or b""
    path: Template              # of TO: as it goes into a Location, or, of what is no redirect, decoded
    query: Template | None      # with its "?"; None where TO has none
    fragment: Template

    @property
    def is_redirect(self) -> bool:
        return 300 <= self.status < 400

    @property
    def is_fixed(self) -> bool:
        """Whether the path in TO has no placeholders."""
        return not any(isinstance(piece, str) for piece in self.path)

    def location(self, values: Values, scheme: bytes, request: Request) -> bytes | None:
        """The Location of a redirect for a Request that came by `scheme`. None where it would be too long, or leads to
        the very URL that was asked for.

        What stands for placeholders has no influence on where a host is looked for: an `origin` ends before them, and
        without one there is exactly one slash at the beginning (RFC 3986 section 4.2)."""
        path, query = fill(self.path, values, PATH_SAFE), fill(self.query or (), values, "")
        fragment = fill(self.fragment, values, "")
        if path is None or query is None or fragment is None:
            return None
        path = path if self.origin else PATH_START.sub(b"/", path)
        query = request.query if self.query is None else query
        same_origin = not self.origin or same_authority(self.origin, scheme, request.fields.host)
        if same_origin and query == request.query and remove_dot_segments(unquote_to_bytes(path)) == request.path:
            return None
        return self.origin + path + query + fragment

    def file(self, values: Values, stored: Stored) -> Resource | None:
        """What is served in place of what was asked for: the file at TO, or the index of that directory, whose slash
        may be left out; None where there is none.

        It has no date, because where rules lead may change while all dates stay as they are: a client that asks by
        date would keep what has been replaced (RFC 9110 section 8.8.2.2)."""
        path = fill(self.path, values)
        found = stored(path) if path is not None else None
        if isinstance(found, Redirect) and path is not None:
            found = stored(path + b"/")
        if not isinstance(found, Resource):
            return None
        return Resource(found.plain._replace(mtime=0), tuple([variant._replace(mtime=0) for variant in found.variants]))


def same_authority(origin: bytes, scheme: bytes, host: bytes | None) -> bool:
    """Whether `origin`, of a rule, is where a request with this Host field came to by `scheme`."""
    its_scheme, authority, _ = split_origin(origin)
    port = b":443" if scheme == b"https" else b":80"
    ours, theirs = (value.lower().removesuffix(port).removesuffix(b".") for value in (authority, host or b""))
    return its_scheme == scheme and ours == theirs


def parse_redirects(data: bytes) -> tuple[list[Rule], list[Note]]:
    """The rules of a _redirects file, in its order, and notes on those of its lines that are not used."""
    rules: list[Rule] = []
    notes: list[Note] = []
    room = Room()
    for number, line in numbered(data):
        try:
            rule = parse_rule(number, line)
            room.take(rule.pattern)
            rules.append(rule)
        except RuleError as error:
            notes.append(Note(REDIRECTS, number, str(error)))
            if isinstance(error, TooMany):
                break
    return rules, notes


def parse_rule(number: int, line: bytes) -> Rule:
    """The Rule in a line: FROM TO [STATUS[!]]. Raises RuleError."""
    check_line(line.replace(b"\t", b" "))
    words = list(takewhile(lambda word: word[:1] != b"#", line.split()))       # a comment may stand behind a rule
    if len(words) > 1 and b"=" in words[1] and words[1][:1] != b"/" and not ORIGIN.match(words[1]):
        raise RuleError("query parameters cannot be compared: write the path alone")
    if any(word.lower().startswith(CONDITIONS) for word in words[2:]):
        raise RuleError("conditions (Country, Language, Role, Cookie) are not supported")
    if not 2 <= len(words) <= 3:
        raise RuleError(f"this is not FROM TO STATUS: {shown(line)}")
    status, force = parse_status(words[2] if len(words) > 2 else b"301")
    pattern = parse_pattern(words[0], star_is_last=True)
    return Rule(number, pattern, status, force, *parse_target(words[1], pattern.names, status))


def parse_status(word: bytes) -> tuple[int, bool]:
    digits, force = word.removesuffix(b"!"), word.endswith(b"!")
    if not re.fullmatch(rb"[0-9]{3}", digits) or int(digits) not in STATUSES:
        raise RuleError(f"{shown(word)} is not a status that can be had: "
                        f"write one of {', '.join(map(str, sorted(STATUSES)))}, perhaps with '!'")
    return int(digits), force


def parse_target(text: bytes, names: tuple[str, ...], status: int) -> tuple[bytes, Template, Template | None, Template]:
    """(origin, path, query, fragment) of TO, as Rule has them. Raises RuleError."""
    scheme, authority, rest = split_origin(text)
    if authority and not AUTHORITY.fullmatch(authority):
        raise RuleError(f"{shown(authority)} is not a host, perhaps with a port: no placeholder can stand in it")
    if not authority and (text[:1] != b"/" or text[:2] == b"//"):
        raise RuleError(f"{shown(text)} is neither a path, which begins with one '/', nor an http(s) URL")
    if "splat" not in names and split_template(text, ["splat"]) != (text,):
        raise RuleError("':splat' is what a '*' at the end of FROM stands for, and there is none")
    rest, hash_sign, fragment = rest.partition(b"#")
    path, question_mark, query = rest.partition(b"?")
    if not 300 <= status < 400:
        if authority:
            raise RuleError(f"what another server has is not passed on: with status {status} write a path")
        pieces = split_template(path, names)
        return b"", tuple([unquoted(piece) if isinstance(piece, bytes) else piece for piece in pieces]), None, ()
    return (scheme + b"://" + authority if authority else b"", split_template(encoded(path or b"/"), names),
            split_template(encoded(question_mark + query, "?"), names) if question_mark else None,
            split_template(encoded(hash_sign + fragment, "?#"), names))


def encoded(text: bytes, safe: str = "") -> bytes:
    """A part of a URL as its author wrote it, with what cannot stand in it percent-encoded. Raises RuleError."""
    unquoted(text)
    return quote_from_bytes(text, PATH_SAFE + "%" + safe).encode()


# --- _headers

class Block:
    """A pattern of _headers with its fields: (name, value) each, or (name, None) for one that is taken away.

    filled: whether placeholders stand in values. Blocks are compared by identity, so sets of them can be found fast.
    """

    def __init__(self, line: int, pattern: Pattern):
        self.line, self.pattern, self.filled = line, pattern, False
        self.fields: list[tuple[bytes, Template | None]] = []


def parse_headers(data: bytes) -> tuple[list[Block], list[Note]]:
    """The blocks of a _headers file, in its order, and notes on those of its lines that are not used."""
    blocks: list[Block] = []
    notes: list[Note] = []
    room, fields_count = Room(), True           # False: the fields to come are for a pattern that was refused
    for number, line in numbered(data):
        is_pattern = line[:1] == b"/" or ORIGIN.match(line) is not None
        try:
            if is_pattern:
                fields_count = False
                check_line(line)
                block = Block(number, parse_pattern(line, star_is_last=False))
                room.take(block.pattern)
                blocks.append(block)
                fields_count = True
            elif fields_count:
                check_line(line)
                parse_field(line, blocks)
        except RuleError as error:
            notes.append(Note(HEADERS, number, str(error)))
            if isinstance(error, TooMany):
                break
    notes += [Note(HEADERS, block.line, "no field follows that could be sent") for block in blocks if not block.fields]
    return [block for block in blocks if block.fields], sorted(notes, key=attrgetter("line"))


def parse_field(line: bytes, blocks: list[Block]) -> None:
    """Put a line `Name: value`, or `! Name`, into the last of `blocks`. Raises RuleError."""
    if not blocks:
        raise RuleError("in front of the first field there has to be a path, which begins with '/'")
    block = blocks[-1]
    removed = line[:1] == b"!"
    name, colon, value = (line[1:].strip(), b":", b"") if removed else line.partition(b":")
    value, lower = value.strip(), name.lower()
    if not colon or not NAME.fullmatch(name):
        raise RuleError(f"this is neither a path nor 'Name: value' nor '! Name': {shown(line)}")
    if lower == b"basic-auth":
        raise RuleError("BASIC-AUTH PROTECTS NOTHING HERE: no password is asked for, and everybody can read what is "
                        "there. Take it out of the archive, or have a server in front ask")
    if lower in UNTOUCHED or (removed and lower == b"vary"):
        raise RuleError(f"{shown(name)} is the server's own business")
    if not removed and not value:
        raise RuleError(f"{shown(name)} has no value; to take it away write '! {name.decode()}'")
    template = None if removed else split_template(value, block.pattern.names)
    block.filled |= template is not None and template != (value,)
    block.fields.append((name, template))


# --- lines

class TooMany(RuleError):
    """There are more rules than are taken."""


class Room:
    """How many more rules a file may have."""

    def __init__(self):
        self.exact, self.patterns = EXACT_MAX, PATTERNS_MAX

    def take(self, pattern: Pattern) -> None:
        """Count one. Raises TooMany."""
        self.exact -= pattern.regex is None
        self.patterns -= pattern.regex is not None
        if self.exact < 0 or self.patterns < 0:
            most = f"{EXACT_MAX} with a fixed path" if self.exact < 0 else f"{PATTERNS_MAX} with '*' or ':name'"
            raise TooMany(f"there may be {most}: this line and all after it are not used")


def numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, line) for each that is neither empty nor a comment, without blanks around it."""
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        line = line.removesuffix(b"\r").strip(b" \t")
        if line and line[:1] != b"#":
            yield number, line


def check_line(line: bytes) -> None:
    if len(line) > LINE_MAX:
        raise RuleError(f"it is longer than {LINE_MAX} bytes")
    if CONTROL.search(line):
        raise RuleError("there is a control character in it")


# --- header fields of a response

class Dress(NamedTuple):
    """Header fields that a site's rules put in place of the server's own."""
    names: frozenset[bytes]                         # of those that are replaced or taken away, in lower case
    fields: tuple[tuple[bytes, bytes], ...]

    @property
    def media_type(self) -> bytes | None:
        """The Content-Type; None where it is left to the server, b"" where it is taken away."""
        given = [value for name, value in self.fields if name.lower() == b"content-type"]
        return given[0] if given else b"" if b"content-type" in self.names else None

    def of_parts(self) -> "Dress":
        """The same for a multipart message, whose parts have the file's Content-Type."""
        return self.without(frozenset({b"content-type"}))

    def of_others(self) -> "Dress":
        """The same for a response that is not the file."""
        return self.without(OF_FILES)

    def without(self, names: frozenset[bytes]) -> "Dress":
        """The same, with no influence on fields of these names."""
        return Dress(self.names - names, tuple([field for field in self.fields if field[0].lower() not in names]))

    def put_on(self, fields: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
        """`fields`, the server's own, without those that are replaced, and then these."""
        kept, vary = [], b""
        for name, value in fields:
            lower = name.lower()
            if lower not in self.names:
                kept.append((name, value))
            elif lower == b"vary":
                vary = value + b", "
        added = [(name, vary + value if name.lower() == b"vary" else value) for name, value in self.fields]
        return *kept, *added


@lru_cache(64)
def dress_of(blocks: tuple[Block, ...]) -> Dress:
    """The Dress of blocks that have no placeholders in their values."""
    return make_dress([(block, {}) for block in blocks])


def make_dress(matches: Iterable[tuple[Block, Values]]) -> Dress:
    """Of blocks in their order, each with what its placeholders stand for. `! Name` undoes what was before it."""
    found: dict[bytes, tuple[bytes, list[bytes]]] = {}
    room = FILLED_MAX
    for block, values in matches:
        for name, template in block.fields:
            lower = name.lower()
            if template is None:
                found.pop(lower, None)
                found[lower] = name, []
                continue
            value = fill(template, values, "/")     # so that no other directive can be begun in it
            if block.filled and value is not None:
                room -= len(value)
            if value and room >= 0:
                found.setdefault(lower, (name, []))[1].append(value)
    fields: list[tuple[bytes, bytes]] = []
    for lower, (name, several) in found.items():
        if lower == b"set-cookie":              # RFC 9110 section 5.3: the one field that cannot be a list
            fields += [(name, value) for value in several]
        elif several:
            fields.append((name, b", ".join(several)))
    return Dress(frozenset(found), tuple(fields))


# --- what counts for a path

Match = tuple[Any, Values]              # a Rule or a Block, and what its placeholders stand for


class ByPath:
    """Lines, each a Rule or each a Block, by the paths that they match."""

    def __init__(self, lines: Iterable[Any]):
        self.exact: dict[bytes, list[Any]] = {}
        self.patterns: list[Any] = []
        for line in lines:
            (self.patterns if line.pattern.regex else self.exact.setdefault(line.pattern.prefix, [])).append(line)

    def matches(self, path: bytes) -> Iterator[Match]:
        """Those that match a path, in the file's order, for whatever scheme and host; and what their placeholders
        stand for."""
        exact = self.exact.get(path)
        for line in merge(exact, self.patterns, key=attrgetter("line")) if exact else self.patterns:
            if (values := line.pattern.match(path)) is not None:
                yield line, values


class Rules:
    """What the two files of an archive say. `rules` and `blocks` are in the files' order."""

    def __init__(self, rules: list[Rule], blocks: list[Block]):
        self.rules, self.blocks = ByPath(rules), ByPath(blocks)
        self.has_blocks, self.forces = bool(blocks), any(rule.force for rule in rules)
        patterns = [*(rule.pattern for rule in rules), *(block.pattern for block in blocks)]
        self.has_origins = any(pattern.host for pattern in patterns)
        self.tell_schemes_apart = self.has_origins or any(rule.origin for rule in rules)
        self.sets: dict[tuple[Block, ...], tuple[Block, ...]] = {}     # of blocks: equal ones are one object

    def first(self, scheme: bytes, request: Request) -> Match | None:
        """The rule that counts for a Request that came by `scheme`, and what its placeholders stand for."""
        return next(self.of_origin(self.rules.matches(request.path), scheme, request), None)

    def dress(self, scheme: bytes, request: Request) -> Dress | None:
        """What goes with the response to a Request that came by `scheme`; None where no block matches."""
        if not self.has_blocks:
            return None
        found = list(self.of_origin(self.blocks.matches(request.path), scheme, request))
        if any(block.filled for block, _ in found):
            return make_dress(found)
        return dress_of(tuple([block for block, _ in found])) if found else None

    dress_of = staticmethod(dress_of)

    def of_origin(self, matches: Iterator[Match], scheme: bytes, request: Request) -> Iterator[Match]:
        """Those of `matches` that count for the scheme and host of a Request."""
        if not self.has_origins:
            return matches
        host = host_name(request.fields.host)
        return (match for match in matches if match[0].pattern.is_for(scheme, host))

    def entry(self, path: bytes, existing: File | None, stored: Stored) -> Entry | None:
        """What the index is to have for a path that is `existing` in the archive, or None.

        It is a Resource where a file is the answer to all requests: they never come here again."""
        rule = self.leading(path, existing)
        if isinstance(rule, Rule) and rule.status == 200:
            existing, rule = rule.file({}, stored), False
        blocks = [block for block, _ in self.blocks.matches(path)] if isinstance(existing, Resource) else []
        if rule or any(block.filled or block.pattern.host for block in blocks):
            return Ruled(existing, rule if isinstance(rule, Rule) else None)
        if blocks and isinstance(existing, Resource):
            return existing._replace(blocks=self.sets.setdefault(tuple(blocks), tuple(blocks)))
        return existing

    def leading(self, path: bytes, existing: File | None) -> Rule | bool:
        """The rule with a fixed path that counts for all requests for it; where there is none, whether it has to be
        looked at each time which one does, in spite of what is `existing`."""
        if existing is not None and not self.forces:
            return False
        force = False
        is_first = True
        for rule, _ in self.rules.matches(path):
            force |= rule.force
            if not rule.pattern.host:
                if is_first and not rule.pattern.regex and (force or existing is None):
                    return rule
                break
            is_first = False
        return force and existing is not None


def apply(archive: Archive) -> None:
    """Have the rules that an Archive brings along count in its index. What cannot be used is put into its notes."""
    rules: list[Rule] = []
    blocks: list[Block] = []
    notes = [Note(file, 0, f"it is not used, because it is larger than {OWN_MAX // 1024} KiB")
             for file, data in archive.own.items() if data is None]
    if data := archive.own.get(REDIRECTS):
        found, bad = parse_redirects(data)
        rules, useless = without_useless(found, archive.stored)
        notes += sorted(bad + useless, key=attrgetter("line"))
    if data := archive.own.get(HEADERS):
        blocks, bad = parse_headers(data)
        notes += bad
    made = archive.rules = Rules(rules, blocks)
    archive.rule_notes = notes
    archive.notes += summary(notes)
    changed: dict[bytes, Entry] = {}
    for path, existing in archive.items() if made.has_blocks or made.forces else ():
        entry = made.entry(path, existing, archive.stored)
        if entry is not None and entry is not existing:
            changed[path] = entry
    for path in made.rules.exact:
        if archive.stored(path) is None and (entry := made.entry(path, None, archive.stored)) is not None:
            changed[path] = entry
    archive.overlay(changed)


def without_useless(rules: Iterable[Rule], stored: Stored) -> tuple[list[Rule], list[Note]]:
    """Those rules that can count, and notes on the others."""
    useful: list[Rule] = []
    notes: list[Note] = []
    exact: dict[bytes, list[Rule]] = {}
    patterns: list[Rule] = []
    for rule in rules:
        pattern = rule.pattern
        before = [*patterns, *(exact.get(pattern.prefix, ()) if not pattern.regex else ())]
        takes_it = next((other for other in before if other.pattern.covers(pattern)), None)
        if takes_it:
            notes.append(Note(REDIRECTS, rule.line, f"it never applies: line {takes_it.line} takes its path already"))
        elif not pattern.regex and not rule.force and stored(pattern.prefix) is not None:
            notes.append(Note(REDIRECTS, rule.line, f"it never applies: {shown(pattern.prefix)} is in the archive; "
                                                    f"to have the line count all the same, write {rule.status}!"))
        elif rule.is_fixed and not rule.is_redirect and rule.file({}, stored) is None:
            notes.append(Note(REDIRECTS, rule.line, f"there is no {shown(fill(rule.path, {}) or b'')} in the archive"))
        else:
            useful.append(rule)
            (patterns if pattern.regex else exact.setdefault(pattern.prefix, [])).append(rule)
    return useful, notes


def summary(notes: Iterable[Note]) -> list[str]:
    """Sentences for the start: of each file the first few notes, and how many more there are."""
    sentences = []
    for file in (REDIRECTS, HEADERS):
        of_file = [note for note in notes if note.file == file]
        sentences += list(map(str, of_file[:NOTED_MAX]))
        if len(of_file) > NOTED_MAX:
            sentences.append(f"{file}: {len(of_file) - NOTED_MAX} more lines are not used")
    return sentences
