"""The check of a site, for people and for CI: reads all of an archive, serves nothing, and says what is wrong with it.

    run()           the archives of the command line, one line for each finding, the exit status
    findings()      everything about one archive
    references()    the links in a page or stylesheet
    resolve()       where a link leads, as a browser has it

What a link leads to is asked of the code that serves (reply.Responder), so rules and --clean-urls count. Contents are
read one file at a time.
"""

import base64
import hashlib
import io
import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from html.parser import HTMLParser
from itertools import takewhile
from typing import Any, NamedTuple
from urllib.parse import quote, quote_from_bytes

import http1
import media
from archive import PAGE, PATH_SAFE, Archive, Representation, Resource, sibling_summary
from codings import SUFFIXES, Tool, find_tools
from generation import Generation, counted
from reply import FullResponse, Reply, Responder
from tar import Names, shown

LOOKED_AT_MAX = 8 << 20     # bytes: links in a larger page or stylesheet are not looked at
REMEMBERED_LINKS = 1 << 16

log = logging.getLogger("tarweb")


class Finding(NamedTuple):
    """kind: see docs/SITES.md. file: relative, b"" where it is about none. line: from 1; 0 for the whole file. hint:
    whether it is no fault, so that it has no influence on the exit status."""
    kind: str
    file: bytes
    line: int
    text: str
    hint: bool = False

    def words(self, archive: str) -> str:
        """The finding in a line."""
        where = [printable(self.file) + f", line {self.line}" * bool(self.line)] if self.file else []
        return ": ".join([archive, *["hint"] * self.hint, *where, self.text])

    def record(self, archive: str) -> str:
        """The finding as a JSON object."""
        file = self.file.decode("utf-8", "backslashreplace") if self.file else None
        return json.dumps({"archive": archive, "kind": self.kind, "hint": self.hint, "file": file,
                           "line": self.line or None, "message": self.text})


def printable(name: bytes) -> str:
    """All of a name in one line."""
    return repr(name.decode("utf-8", "backslashreplace"))[1:-1]


def run(options) -> int:
    """Check the sites of a command line; 0 if nothing is wrong with them, else 1. Raises ArchiveError."""
    logging.disable(logging.WARNING)            # notes are findings
    generation = Generation(options._replace(access_log=None, tls_cert=[], tls_key=[], etags="on", hugepages=0))
    logging.disable(logging.NOTSET)
    responders = generation.responders("https" if options.tls_cert else "http")
    hosts = {layers[0]: host for host, layers in generation.layers.items()}     # one for each archive
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # a locale's characters may be few
    count = 0
    try:
        for archive, host in hosts.items():
            name, found = printable(os.fsencode(archive.path)), 0
            for finding in findings(Site(archive, responders[host.encode()], host, generation.rules)):
                found += not finding.hint
                print(finding.record(name) if options.check == "json" else finding.words(name))
            log.info("%s: %s checked, %s", name, counted(archive.files, "file"),
                     counted(found, "finding") if found else "nothing found")
            count += found
        print(end="", flush=True)
    except BrokenPipeError:                     # the reader has closed its end, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 1 if count else 0


# --- a site

class Site:
    """An archive and what is answered from it. rules: the module, or None."""

    def __init__(self, archive: Archive, responder: Responder, host: str, rules: Any):
        self.archive, self.responder, self.rules = archive, responder, rules
        self.host = host.replace("*", "www").encode() or b"localhost"
        self.fault = lru_cache(REMEMBERED_LINKS)(self._fault)

    def reply(self, target: bytes) -> Reply:
        """What a GET of a target (percent-encoded path) gets. Raises http1.HttpError."""
        found = self.responder.reply(http1.parse_head(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, self.host)))
        return self.responder.expand(found) if isinstance(found, FullResponse) else found

    def _fault(self, target: bytes) -> str:
        """Why a link to a target leads nowhere; "" where it leads somewhere."""
        try:
            status = self.reply(target).status
        except http1.HttpError as error:
            return f"a server refuses that: {error.reason}"
        return "" if status < 400 else "there is no such file" if status == 404 else f"the answer is {status}"

    def files(self) -> Iterator[tuple[bytes, Resource]]:
        """Each file by its own name: neither directories nor clean URLs."""
        for path, found in self.archive.items():
            is_clean = not path.endswith(b".html") and self.archive.stored(path + b".html") is found
            if isinstance(found, Resource) and not path.endswith(b"/") and not is_clean:
                yield path, found

    def is_sibling(self, path: bytes) -> bool:
        stem, _, suffix = path.rpartition(b".")
        return suffix in media.CODING_SUFFIXES and isinstance(self.archive.stored(stem), Resource)


def findings(site: Site) -> Iterator[Finding]:
    """All findings on a site."""
    yield from noted(site)
    yield from about_rules(site)
    yield from about_missing_pages(site)
    yield from lookalikes(path for path, _ in site.files())
    unknown: dict[bytes, Names] = {}
    tools = find_tools(SUFFIXES)
    untold = set()
    for path, resource in site.files():
        private = PRIVATE.search(path)
        if private:
            yield Finding("private", path[1:], 0, f"{shown(private[0].lstrip(b'/'))} looks private, and everybody "
                                                  "can read it: pack the site without it")
        untold |= {one.coding for one in resource.variants} - tools.keys()
        yield from about_siblings(site.archive, path, resource, tools)
        if not private and not site.is_sibling(path):
            yield from about_contents(site, path, resource, unknown)
    for extension, names in unknown.items():
        of = f"the ending .{printable(extension)}" if extension else "names without an ending"
        yield Finding("media-type", b"", 0, f"no media type is known for {of}, so browsers save such files: {names}; "
                                            "give them a Content-Type in _headers")
    for coding in sorted(untold):
        yield Finding("sibling", b"", 0, f"{coding} files are not unpacked, because this machine has neither a module "
                                         "nor a command for that", hint=True)


def noted(site: Site) -> Iterator[Finding]:
    """What is noted when a server starts, and all of what is cut short there."""
    archive = site.archive
    told_below = {*sibling_summary(archive.bad_siblings)}
    if site.rules:
        told_below |= {*site.rules.summary(archive.rule_notes)}
    for note in archive.notes:
        if note not in told_below:
            yield Finding("not-served", b"", 0, note)
    for note in archive.bad_siblings:
        yield Finding("sibling", b"", 0, note)
    for note in archive.rule_notes:
        wins = "; at Cloudflare Pages the line wins" if "is in the archive" in note.reason else ""
        yield Finding("rule", note.file.encode(), note.line, note.reason + wins)


def about_rules(site: Site) -> Iterator[Finding]:
    """Redirects to what is not there, and what other hosts do otherwise."""
    if not site.rules or not site.archive.rules:
        return
    file, by_path = site.rules.REDIRECTS, site.archive.rules.rules
    rules = [*by_path.patterns, *(rule for several in by_path.exact.values() for rule in several)]
    for rule in sorted(rules, key=lambda rule: rule.line):
        if rule.is_redirect and rule.is_fixed and not rule.origin:
            target = b"".join(rule.path)
            if fault := site.fault(target):
                yield Finding("link", file.encode(), rule.line, f"a redirect to {shown(target)}: {fault}")
    lines = dict(site.rules.numbered(site.archive.own.get(file) or b""))
    short = [rule.line for rule in rules if len(words(lines[rule.line])) == 2]
    if short:
        others = f", like {len(short) - 1} other{'s' * (len(short) > 2)}," * (len(short) > 1)
        yield Finding("rule", file.encode(), min(short), f"this line{others} has no status: that is 301 here, and 302 "
                                                         "at Cloudflare Pages; for that write 302", hint=True)
    losing = [rule for rule in by_path.patterns if rule.is_redirect and not rule.force]
    for path, _ in site.files() if losing else ():
        for rule in [rule for rule in losing if rule.pattern.match(path) is not None]:
            losing.remove(rule)
            yield Finding("rule", file.encode(), rule.line, f"{shown(path)} is in the archive and wins over the "
                          f"line; at Cloudflare Pages the line wins: for that write {rule.status}!", hint=True)


def words(line: bytes) -> list[bytes]:
    """Those of a line of _redirects, without a comment."""
    return list(takewhile(lambda word: word[:1] != b"#", line.split()))


def about_missing_pages(site: Site) -> Iterator[Finding]:
    if site.fault(b"/"):
        yield Finding("index", b"", 0, "there is no index.html, so / is a missing page")
    elif site.archive.stored(PAGE) is None and site.fault(b"/no-such-page/of-this-name"):
        yield Finding("index", b"", 0, "there is no 404.html, so a missing page is a line of text; Cloudflare Pages "
                                       "sends index.html then: for that write '/* /index.html 200' into _redirects",
                      hint=True)


# --- names

# What is never meant for the public, whatever is in it.
PRIVATE = re.compile(
    rb"/(?:\.(?:env|git|svn|hg|bzr|ssh|aws|npmrc|netrc|htpasswd|pgpass|DS_Store)(?![a-z0-9])[^/]*"
    rb"|id_(?:rsa|dsa|ecdsa|ed25519)|wp-config\.php|Thumbs\.db|#[^/]*#"
    rb"|[^/]*(?:\.(?:key|pem|p12|pfx|jks|keystore|kdbx|ppk|sql|sqlite3?|bak|old|orig|swp)(?:\.(?:gz|br|zstd?))?|~))"
    rb"(?=/|\Z)", re.IGNORECASE)


def lookalikes(paths: Iterable[bytes]) -> Iterator[Finding]:
    """Names beside each other, of files or directories, that are one where a file system ignores case or Unicode's
    forms."""
    known: dict[tuple[bytes, str], bytes] = {}
    seen: set[bytes] = set()
    for path in paths:
        while path and path not in seen:
            seen.add(path)
            above, _, last = path.rpartition(b"/")
            form = unicodedata.normalize("NFC", last.decode("utf-8", "surrogateescape"))
            key = above, unicodedata.normalize("NFC", form.casefold())
            other = known.setdefault(key, last)
            if other != last:
                same = unicodedata.normalize("NFC", other.decode("utf-8", "surrogateescape")) == form
                yield Finding("name", path[1:], 0, f"{shown(other)} differs only in "
                                                   f"{'its Unicode form' if same else 'case'}")
            path = above


# --- contents

OCTETS = b"application/octet-stream"
MEANT = frozenset((b"bin", b"dat", b"dll", b"dmg", b"exe", b"img", b"iso", b"pak", b"so"))      # to be octet-stream
HTML = frozenset((b"text/html", b"application/xhtml+xml"))
CSS = b"text/css"


def about_contents(site: Site, path: bytes, resource: Resource, unknown: dict[bytes, Names]) -> Iterator[Finding]:
    """Findings on a file; names whose media type is unknown are added to `unknown`, by their ending."""
    archive, plain = site.archive, resource.plain
    reply = site.reply(quote_from_bytes(path, PATH_SAFE).encode())
    fields = {name.lower(): value for name, value in reply.fields} if reply.status == 200 else {}
    content_type = fields.get(b"content-type", plain.media_type).lower()
    kind = content_type.partition(b";")[0].strip()
    if kind == OCTETS:
        _, dot, extension = path.rpartition(b"/")[2].rpartition(b".")
        extension = extension.lower() if dot else b""
        if extension not in MEANT:
            unknown.setdefault(extension, Names()).add(path[1:])
    if kind not in HTML and kind != CSS:
        return
    if plain.length > LOOKED_AT_MAX:
        yield Finding("link", path[1:], 0, f"its links are not looked at, because it is larger than "
                                           f"{LOOKED_AT_MAX >> 20} MiB", hint=True)
        return
    data = archive.read(plain)
    if kind == b"text/html" and b"charset" not in content_type and not media.declared(kind, data[:media.PRESCAN]):
        yield Finding("charset", path[1:], 0, "nothing says in which encoding it is: write <meta charset=...>")
    seen = set()
    base, found = references(data, kind != CSS)
    origin = quote_from_bytes(path, PATH_SAFE)
    origin = origin if base is None else resolve(base, origin) or ""
    for line, reference in found if origin else ():         # else another host is meant
        target = resolve(reference, origin)
        fault = site.fault(quote(target, PATH_SAFE + "%").encode()) if target else ""
        if fault and (line, reference) not in seen:
            seen.add((line, reference))
            yield Finding("link", path[1:], line, f"a link to {shown(reference.encode())}: {fault}")


# --- siblings

def about_siblings(archive: Archive, path: bytes, resource: Resource, tools: dict[str, Tool]) -> Iterator[Finding]:
    """Whether files that are sent in place of another one hold it."""
    for variant in resource.variants:
        fault = wrong(archive, variant, resource.plain, tools[variant.coding]) if variant.coding in tools else ""
        if fault:
            yield Finding("sibling", path[1:], 0, f"the {variant.coding} file that is sent in its place {fault}: "
                                                  "compress it again")


def wrong(archive: Archive, variant: Representation, plain: Representation, tool: Tool) -> str:
    """Why a variant does not hold `plain`; "" if it does."""
    file: Any = io.BytesIO(archive.read(variant)) if variant.pieces else Part(
        archive.fd, variant.offset - archive.address, variant.length)
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in tool.expand(file):
            digest.update(chunk)
            size += len(chunk)
            if size > plain.length:
                return "holds more"
    except Exception:           # whatever the modules raise for what cannot be expanded
        return "cannot be unpacked"
    tag = b'"' + base64.urlsafe_b64encode(digest.digest()[:12]) + b'"'      # as archive.py has it
    return "" if tag == plain.etag and size == plain.length else "holds other bytes"


class Part(io.RawIOBase):
    """Bytes of a file, to be read."""

    def __init__(self, fd: int, start: int, length: int):
        self.fd, self.at, self.end = fd, start, start + length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = os.pread(self.fd, min(len(buffer), self.end - self.at), self.at)
        buffer[:len(data)] = data
        self.at += len(data)
        return len(data)


# --- links

Found = Iterator[tuple[int, str]]       # (line, URL reference) each

URLS = frozenset(("background", "href", "poster", "src", "xlink:href"))     # attributes of any element
REFRESH = re.compile(r"[\s0-9.]*[;,\s]\s*(?:url\s*=\s*)?[\"']?([^\"']*)", re.IGNORECASE)
CANDIDATE = re.compile(r"[\s,]*+(\S*+)")
DESCRIPTORS = re.compile(r"[^,(]*+(?:\([^)]*+\)?+[^,(]*+)*")
LONG_NUMBER = re.compile(r"&#[0-9]{100,}+;?")       # int() refuses long ones, and html.parser does not expect that

STRING = r"\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?"        # one that has no end ends with its line
CSS_TOKEN = re.compile(
    rf"/\*.*?(?:\*/|\Z)|@import\s*+({STRING})|url\(\s*+({STRING}|(?:[^)\"'\s\\]|\\.)*)|{STRING}",
    re.IGNORECASE | re.DOTALL)
ESCAPE = re.compile(r"\\(?:([0-9a-f]{1,6})\s?|\n|(.))", re.IGNORECASE | re.DOTALL)


def references(data: bytes, is_html: bool) -> tuple[str | None, list[tuple[int, str]]]:
    """(what <base> says, links) of a page or stylesheet."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if not is_html:
        return None, list(css_references(text, 1))
    page = Page()
    page.feed(LONG_NUMBER.sub("&#65533;", text))
    page.close()
    return page.base, page.found


class Page(HTMLParser):
    """Fed with a page, it has its base (None without one) and the links that are found in it."""

    def __init__(self) -> None:
        super().__init__()
        self.base: str | None = None
        self.found: list[tuple[int, str]] = []

    def handle_starttag(self, tag, attrs):
        line = self.getpos()[0]
        attributes: dict[str, str] = {}
        for name, value in attrs:
            attributes.setdefault(name, value or "")
        if tag == "base":
            self.base = attributes.get("href") if self.base is None else self.base
            return
        for name, value in attributes.items():
            if name in URLS or (tag, name) == ("object", "data"):
                self.found.append((line, value))
            elif name in ("srcset", "imagesrcset"):
                self.found += [(line, url) for url in srcset(value)]
            elif name == "style":
                self.found += css_references(value, line)
        refreshed = tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh"
        if refreshed and (found := REFRESH.match(attributes.get("content", ""))):
            self.found.append((line, found[1]))

    def handle_data(self, data):
        if self.cdata_elem == "style":
            self.found += css_references(data, self.getpos()[0])

    def parse_html_declaration(self, i):
        """Where HTML has a comment that is none, this class would expect SGML, and raise errors."""
        return self.parse_bogus_comment(i) if self.rawdata.startswith("<![", i) else super().parse_html_declaration(i)


def srcset(text: str) -> Iterator[str]:
    """The URLs in an attribute of that name (HTML, "parse a srcset attribute")."""
    at = 0
    while (found := CANDIDATE.match(text, at)) and found[1]:
        at = found.end()
        if found[1].endswith(","):
            yield found[1].rstrip(",")
        else:
            yield found[1]
            at = DESCRIPTORS.match(text, at).end()      # type: ignore[union-attr]  # it matches anything


def css_references(text: str, line: int) -> Found:
    """url() and @import, in CSS that begins in this line (css-syntax-3)."""
    at = 0
    for token in CSS_TOKEN.finditer(text):
        value = token[1] or token[2]
        if value:
            line, at = line + text.count("\n", at, token.start()), token.start()
            quoted = value[0] in "\"'"
            yield line, ESCAPE.sub(unescape, value[1:].removesuffix(value[0]) if quoted else value)


def unescape(escape: re.Match) -> str:
    """What a backslash in CSS and what follows it stand for."""
    if not escape[1]:
        return escape[2] or ""
    code = int(escape[1], 16)
    return "\ufffd" if not code or 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)


SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
IGNORED = re.compile(r"[\t\n\r]")
EDGES = "".join(map(chr, range(33)))
AFTER_PATH = re.compile(r"[?#]")


def resolve(reference: str, base: str) -> str | None:
    """The path that a URL reference in a document at `base` (a path) leads to, not normalized; None if it leads to
    another host (WHATWG URL; RFC 3986 section 5.2)."""
    text = IGNORED.sub("", reference.strip(EDGES))
    path = AFTER_PATH.split(text, maxsplit=1)[0].replace("\\", "/")
    if SCHEME.match(text) or path.startswith("//"):
        return None
    if not path:
        return base
    return path if path[0] == "/" else base[:base.rfind("/") + 1] + path
