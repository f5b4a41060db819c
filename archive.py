"""The index of a tar: which path stands for which of its bytes. Made once, at start-up; find() is then a dict lookup.

    tar.py        reads the tar's headers, holds what each name is, and follows the links between names
    contents()    hashes what is served (entity tags) and looks whether text may be called UTF-8
    Siblings      which files are others in a content coding, as far as that can be told
    resources()   puts it together: media types, variants, directories
"""

import base64
import bisect
import hashlib
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, takewhile
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import media
from linux import cpus, zeros
from media import Utf8, media_type
from sparse import HOLE, HOLE_MAX, Pieces
from tar import CHUNK, Names, Stored, Tree, chunks, members, normal_prefix, open_file, read, shown
from tar import ArchiveError as ArchiveError  # for whoever opens an archive

BATCH_FILES = 256           # small files hashed by one task
TAG_SIZE, REST_SIZE = 12, 20        # bytes of SHA-256 in an entity tag, and behind them
NOTED_SIBLINGS_MAX = 10     # that are no variants, reported one by one
PAGE = b"/404.html"         # in any directory: what is sent for what is missing there
OWN = b"/_headers", b"/_redirects"      # a site's own rules: see rules.py
OWN_MAX = 256 * 1024        # bytes of such a file; of a larger one nothing is used

# RFC 3986 section 3.3: what a path may hold unencoded.
PATH_SAFE = "/!$&'()*+,;=:@-._~"


class Representation(NamedTuple):
    """One stored byte sequence that may be sent (RFC 9110 section 3.2)."""
    offset: int             # of its first byte from where the archive's `address` counts; see spans()
    length: int
    mtime: int              # seconds since the epoch, perhaps in the future; 0 where it has no date
    coding: str             # content coding; "" for the plain file
    media_type: bytes       # Content-Type of the plain file
    etag: bytes             # strong, in quotes; b"" when etags are off
    # Of a sparse file, whose `offset` is no place: for each piece its end in the file, and what to add to the offset of
    # one of its bytes for the byte's address.
    pieces: tuple[tuple[int, int], ...] = ()

    def spans(self, start: int = 0, end: int | None = None) -> tuple[tuple[int, int], ...]:
        """Where the bytes in [start, end) are, or all: (address, length) each, as many as there are pieces."""
        end = self.length if end is None else end
        if not self.pieces:
            return ((self.offset + start, end - start),)
        found, i = [], bisect.bisect_left(self.pieces, (start + 1,))        # the first that ends behind `start`
        while start < end:
            piece_end, base = self.pieces[i]
            found.append((base + start, min(piece_end, end) - start))
            start, i = piece_end, i + 1
        return tuple(found)


class Resource(NamedTuple):
    """What a path stands for."""
    plain: Representation
    variants: tuple[Representation, ...]    # the same in content codings, smallest first
    blocks: tuple = ()      # those of rules.Block whose header fields go with it


class Redirect(NamedTuple):
    """What a directory's path without its final slash stands for."""
    location: bytes         # begins with exactly one "/", percent-encoded


class Ruled(NamedTuple):
    """What a path stands for where the site's rules have to be asked each time."""
    existing: Resource | Redirect | None    # what counts where they say nothing
    rule: Any               # the rules.Rule that counts for all requests; None where that depends on them


File = Resource | Redirect
Entry = File | Ruled
Index = dict[bytes, File]


class Archive:
    """A tar open for serving.

    path, fd, size: of the tar. address: of its first byte, where it is in memory; what the index says counts from
    there. lazy: whether it is in memory in part only. files, bytes: regular files served and the sum of their lengths,
    each counted once however many links lead to it. notes: sentences for the operator on what is not served, and why.
    own: the files in its root that say how it is served, by name; None for one that is too large. rules: the
    rules.Rules that are made of them, and rule_notes all notes on these.
    """

    def __init__(self, path: str, fd: int, size: int, address: int = 0):
        self.path = path
        self.fd = fd
        self.size = size
        self.address = address
        self.lazy = False
        self.release: Callable[[], None] = lambda: None     # of what `address` is in
        self.copied = False                 # whether memory at `address` is a copy, which nothing can happen to
        self.identity: tuple | None = None  # of the file, for whoever looks whether it has changed
        self.ctime = 0                      # of the file, in nanoseconds, when it was last known to be what it was
        self.watched = self.written = False # whether inotify tells of writes, and whether there have been any
        self.digest = ""                    # of all names and entity tags: equal for equal archives
        self.places = 0                     # a hash of where everything is
        self.files = 0
        self.bytes = 0
        self.notes: list[str] = []
        self.bad_siblings: list[str] = []   # sentences, of which `notes` has the first few
        self.own: dict[str, bytes | None] = {}
        self.rules: Any = None
        self.rule_notes: list = []
        self.deepest_page = 0               # the length of the longest path of a directory with a 404.html
        self._digests = Digests({})
        self._index: Index = {}             # of the files, and
        self._ruled: Mapping[bytes, Entry] = self._index    # the same with what the site's rules make of it

    def find(self, path: bytes) -> Entry | None:
        """What `path` stands for: decoded, absolute, without dot segments."""
        return self._ruled.get(path)

    def stored(self, path: bytes) -> File | None:
        """The same by the files alone, whatever the site's rules say."""
        return self._index.get(path)

    def items(self) -> Iterable[tuple[bytes, File]]:
        """Each path with what it stands for by the files alone."""
        return self._index.items()

    def update(self, changed: Index) -> None:
        """Have paths stand for other files, before there are rules."""
        self._index.update(changed)

    def overlay(self, changed: Mapping[bytes, Entry]) -> None:
        """Have paths stand for something else, where the site's rules say so."""
        self._ruled = {**self._index, **changed}

    def sha256(self, rep: Representation) -> bytes | None:
        """SHA-256 of all bytes of a Representation; None where it is another archive's, or there are no entity tags."""
        rest = self._digests.find(rep.offset - self.address) if self.address <= rep.offset else b""
        return base64.urlsafe_b64decode(rep.etag[1:-1]) + rest if rest else None

    def read(self, rep: Representation) -> bytes:
        """All bytes of a Representation; for start-up, or for what is small. Raises ArchiveError."""
        hole = zeros(HOLE_MAX) if rep.pieces else -HOLE_MAX
        return b"".join([bytes(length) if hole <= start < hole + HOLE_MAX else
                         b"".join(chunks(self.fd, self.path, start - self.address, length))
                         for start, length in rep.spans()])

    def close(self) -> None:
        """Let go of the file, and of its place in memory."""
        self.release()
        os.close(self.fd)


class Layers:
    """An archive, and before it those that stood in its place: their files still answer for paths that it lacks.

    The rules of the newest count for all of them, as if it had these files; but where one of its rules has a fixed
    path, which is in its index, an older file of that path does not count."""

    def __init__(self, archives: list[Archive]):
        self.archives = archives            # the newest first

    def find(self, path: bytes) -> Entry | None:
        """As Archive.find."""
        newest = self.archives[0]
        if (found := newest.find(path)) is not None:
            return found
        kept = self.stored(path)
        return newest.rules.entry(path, kept, self.stored) if newest.rules and kept is not None else kept

    def stored(self, path: bytes) -> File | None:
        """As Archive.stored."""
        for archive in self.archives:
            if (found := archive.stored(path)) is not None:
                return found
        return None

    def sha256(self, rep: Representation) -> bytes | None:
        """As Archive.sha256."""
        return next(filter(None, (archive.sha256(rep) for archive in self.archives)), None)


WHOLE_CHECK = 64 * 1024     # bytes: of more it is not asked whether all are in memory


class Library:
    """All archives of a process, by where they are in memory."""

    def __init__(self, archives: Iterable[Archive]):
        self.archives = sorted(archives, key=lambda archive: archive.address)
        self.addresses = [archive.address for archive in self.archives]
        self.lazy = any(archive.lazy for archive in self.archives)

    def at(self, address: int) -> Archive | None:
        """The archive that has its contents at `address`."""
        i = bisect.bisect(self.addresses, address) - 1
        archive = self.archives[i] if i >= 0 else None
        return archive if archive and address < archive.address + archive.size else None

    def file_at(self, address: int) -> Archive | None:
        """The archive whose file has to be read for what is at `address`; None where it is memory of our own."""
        archive = self.at(address)
        return archive if archive and not archive.copied else None

    def is_lazy(self, spans) -> bool:
        """Whether one of `spans`, of a Reply, is in an archive that is in memory in part only."""
        return any(not isinstance(span, bytes) and (archive := self.at(span[0])) and archive.lazy for span in spans)

    def cold(self, spans) -> list[tuple[int, int]]:
        """Those of `spans` ((address, length)) that a disk may have to be read for, whole pages each."""
        found = []
        for address, length in spans:
            archive = self.at(address)
            if archive and archive.lazy and not in_memory(archive.fd, address - archive.address, length):
                start = address & -mmap.PAGESIZE
                found.append((start, address + length - start))
        return found


def in_memory(fd: int, offset: int, length: int) -> bool:
    """Whether these bytes of a file can be had without waiting for a disk; False where that is not known."""
    if length > WHOLE_CHECK:
        return False
    try:
        return os.preadv(fd, [bytearray(length)], offset, os.RWF_NOWAIT) == length
    except OSError:
        return False


def open_archive(path: str, prefix: str = "", etags: bool = True,
                 place: Callable[[Archive], None] = lambda archive: None, dotfiles: bool = False,
                 clean_urls: bool = False, own_rules: bool = False) -> Archive:
    """Index the tar at `path`; `prefix` is taken off the names that begin with it. Raises ArchiveError.

    `place` brings it into memory before that, and sets its `address`, and what else is to be known of that. `dotfiles`
    is whether names that begin with a dot are served, `clean_urls` whether names ending in .html also without that.
    With `own_rules` the files in OWN are read and not served.
    """
    fd, size = open_file(path)
    archive = Archive(path, fd, size)
    try:
        place(archive)
        _fill(archive, prefix, etags, dotfiles, clean_urls, own_rules)
    except BaseException:
        archive.close()
        raise
    return archive


def _fill(archive: Archive, prefix: str, etags: bool, dotfiles: bool, clean_urls: bool, own_rules: bool) -> None:
    tree = Tree()
    for member in members(archive.path, archive.fd, archive.size):
        tree.add(member)
    taken_off = normal_prefix(prefix)
    paths = tree.paths(taken_off)
    hidden = [] if dotfiles else _hide(paths)
    if own_rules:
        archive.own = _take_own(archive, paths)
    siblings = Siblings(paths)
    found = contents(archive.fd, archive.path, paths, siblings) if etags else {}
    archive._digests = Digests(found)
    archive._index = archive._ruled = resources(paths, found, siblings, archive.address)
    if clean_urls:
        _add_clean_urls(archive._index)
    archive.deepest_page = max([len(path) for path in paths if path.endswith(PAGE)], default=len(PAGE)) - len(PAGE)
    lengths = {stored.offset: stored.length for stored in paths.values()}
    archive.files, archive.bytes = len(lengths), sum(lengths.values())
    digest = hashlib.sha256()
    for name, stored in paths.items():
        digest.update(b"%b\0%d\0%b\0" % (name, stored.length, found.get(stored.offset, UNREAD).etag))
    for own, content in archive.own.items():
        digest.update(b"%b\0%b\0" % (own.encode(), hashlib.sha256(content or b"").digest()))
    archive.digest = digest.hexdigest()[:16]
    archive.places = hash(tuple([stored.offset for stored in paths.values()]))
    archive.notes, archive.bad_siblings = tree.notes() + hidden + siblings.notes(etags), siblings.bad
    if taken_off and not any(name.startswith(taken_off) for name in tree.nodes):
        archive.notes.append(f"no name begins with {shown(taken_off)}, so --prefix takes nothing off")
    if not paths:
        archive.notes.append("there is no file that can be served: every request gets 404")
    elif not taken_off:
        archive.notes += _below_one_directory(paths, archive.files)


HIDDEN = re.compile(rb"/\.(?!well-known(?:/|\Z))[^/]*/?")       # RFC 8615: /.well-known/ is there to be asked for


def _hide(paths: dict[bytes, Stored]) -> list[str]:
    """Take out of `paths` what has a name that begins with a dot in it; sentences on that."""
    hidden = {path: found.end() for path in paths if b"/." in path and (found := HIDDEN.search(path))}
    names = Names()
    for name in dict.fromkeys(path[1:end] for path, end in hidden.items()):
        names.add(name)
    for path in hidden:
        del paths[path]
    files = "1 file" if len(hidden) == 1 else f"{len(hidden)} files"
    return [f"not served, for a name that begins with a dot: {files}: {names}; see --dotfiles"] if hidden else []


def _take_own(archive: Archive, paths: dict[bytes, Stored]) -> dict[str, bytes | None]:
    """Take the files in OWN out of `paths`, with what holds them in a content coding; their contents by name, None for
    one that is too large. Raises ArchiveError."""
    found: dict[str, bytes | None] = {}
    for path in OWN:
        stored = paths.pop(path, None)
        for suffix in media.CODING_SUFFIXES if stored else ():
            paths.pop(path + b"." + suffix, None)
        if stored:
            pieces = stored.pieces and _placed(stored.pieces, archive.address)
            whole = Representation(archive.address + stored.offset, stored.length, 0, "", b"", b"", pieces)
            found[path[1:].decode()] = archive.read(whole) if stored.length <= OWN_MAX else None
    return found


def _below_one_directory(paths: dict[bytes, Stored], files: int) -> list[str]:
    """What to write where all of a site is below one directory, as in 'tar -cf site.tar my-site'. A single file that is
    no index says nothing."""
    pairs = zip(min(paths), max(paths), strict=False)
    common = bytes([one for one, other in takewhile(lambda pair: pair[0] == pair[1], pairs)])
    directory = common.rpartition(b"/")[0][1:] + b"/"
    if directory == b"/" or directory.startswith(b".well-known/"):
        return []
    if files == 1 and b"/" + directory + b"index.html" not in paths:
        return []
    return [f"all files are below {shown(directory)}; to have that left out of URLs: --prefix {shown(directory)}"]


# --- Contents

class Content(NamedTuple):
    """What reading a file's bytes tells."""
    etag: bytes
    utf8: bool              # whether it is text that may be called UTF-8
    crc: int                # CRC-32, where there is a sibling to compare it with, else 0
    ends: bytes             # of such a sibling: its first media.CODING_HEAD bytes and its last media.CODING_TAIL
    rest: bytes = b""       # of SHA-256, behind what the entity tag has of it


UNREAD = Content(b"", True, 0, b"")     # without reading, text is taken for UTF-8


class Job(NamedTuple):
    offset: int
    length: int
    pieces: Pieces          # of a sparse file
    text: bytes             # its media type where that has a charset, else b""
    has_gzip: bool          # whether there is a sibling that says what its CRC-32 should be
    is_sibling: bool


def contents(fd: int, path: str, paths: dict[bytes, Stored], siblings: "Siblings") -> dict[int, Content]:
    """Content by offset, for all that is served. Each file is read once, on all CPUs. Raises ArchiveError."""
    batches = list(_batches(_jobs(paths, siblings)))
    read_batch = partial(_read_batch, fd, path)
    with ThreadPoolExecutor(len(cpus())) as pool:
        try:
            done = pool.map(read_batch, batches)
        except RuntimeError:                    # there can be no more threads just now: this one does it all
            done = map(read_batch, batches)
        return {job.offset: content for batch, result in zip(batches, done, strict=True)
                for job, content in zip(batch, result, strict=True)}


def _jobs(paths: dict[bytes, Stored], siblings: "Siblings") -> list[Job]:
    """One for each file, in the tar's order; text if any of its names says so."""
    jobs: dict[int, Job] = {}
    for path, (offset, length, _, pieces) in paths.items():
        kind = media_type(path)
        if kind.is_text or offset not in jobs:
            jobs[offset] = Job(offset, length, pieces, kind.value if kind.is_text else b"",
                               offset in siblings.with_gzip, offset in siblings.offsets)
    return sorted(jobs.values())


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Neighbours that one read brings in, so that small files cost neither a task nor a system call each."""
    batch: list[Job] = []
    for job in jobs:
        if job.pieces:
            yield [job]
            continue
        if batch and (len(batch) == BATCH_FILES or job.offset + job.length - batch[0].offset > CHUNK):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _read_batch(fd: int, path: str, batch: list[Job]) -> list[Content]:
    if batch[0].pieces:
        return [_content(_sparse_chunks(fd, path, batch[0].pieces), batch[0])]
    start, end = batch[0].offset, batch[-1].offset + batch[-1].length
    if end - start > CHUNK:                     # then it is one large file
        return [_content(chunks(fd, path, start, end - start), batch[0])]
    data = read(fd, path, start, end - start)
    return [_content([data[job.offset - start:job.offset - start + job.length]], job) for job in batch]


def _sparse_chunks(fd: int, path: str, pieces: Pieces) -> Iterator[bytes]:
    none = bytes(CHUNK)
    for place, length in pieces:
        if place == HOLE:
            yield from (none[:length - start] for start in range(0, length, CHUNK))
        else:
            yield from chunks(fd, path, place, length)


def _content(chunks: Iterable[bytes], job: Job) -> Content:
    """Entity tag: SHA-256's first 96 bits, a strong validator (RFC 9110 section 8.8.1) as equal bytes alone share it.

    SHA-256 because CPUs have instructions for it: there it is more than twice as fast as BLAKE2.
    """
    digest, encoding, crc, head, tail = hashlib.sha256(), Utf8(job.text) if job.text else None, 0, b"", b""
    for chunk in chunks:
        digest.update(chunk)
        if encoding:
            encoding.feed(chunk)
        if job.has_gzip:
            crc = zlib.crc32(chunk, crc)
        if job.is_sibling:
            head, tail = head or chunk[:media.CODING_HEAD], (tail + chunk[-media.CODING_TAIL:])[-media.CODING_TAIL:]
    whole = digest.digest()
    etag = b'"' + base64.urlsafe_b64encode(whole[:TAG_SIZE]) + b'"'
    return Content(etag, encoding is not None and encoding.finish(), crc, head + tail, whole[TAG_SIZE:])


class Digests:
    """The rest of SHA-256, behind what entity tags have of it, by where files are: 28 bytes for each, in two pieces of
    memory that workers share."""

    def __init__(self, found: Mapping[int, Content]):
        self.offsets = array("Q", sorted(found))
        self.rests = b"".join([found[offset].rest for offset in self.offsets])

    def find(self, offset: int) -> bytes:
        """That of the file at an offset in the tar; b"" where there is none."""
        i = bisect.bisect_left(self.offsets, offset)
        known = i < len(self.offsets) and self.offsets[i] == offset
        return self.rests[i * REST_SIZE:(i + 1) * REST_SIZE] if known else b""


# --- Siblings

class Siblings:
    """Files beside others whose names say that they hold the others' bytes in a content coding, and which of them do.

    What they say of themselves is compared with the files, which are read anyway; see media.py. Without reading there
    are the dates, and that no coding of anything is empty.
    """

    def __init__(self, paths: dict[bytes, Stored]):
        self.paths = paths
        self.of: dict[bytes, list[tuple[bytes, str]]] = {}      # path -> [(sibling's path, coding)]
        self.bad: list[str] = []
        for path in paths:
            stem, _, suffix = path.rpartition(b".")
            if suffix in media.CODING_SUFFIXES and stem in paths:
                self.of.setdefault(stem, []).append((path, media.CODING_SUFFIXES[suffix]))
        named = [(paths[stem].offset, paths[path].offset, coding) for stem, siblings in self.of.items()
                 for path, coding in siblings]
        self.with_gzip = {plain for plain, _, coding in named if coding == "gzip"}
        self.offsets = {sibling for _, sibling, _ in named}

    def good(self, path: bytes, found: dict[int, Content]) -> list[tuple[Stored, str]]:
        """(sibling, coding) of those of the file at `path` that hold its bytes: the smallest in each coding, smallest
        first. `found` is empty where nothing has been read."""
        best: dict[str, Stored] = {}
        for sibling, coding in sorted(self.of[path], key=lambda one: self.paths[one[0]].length):
            if why := self._wrong(self.paths[path], self.paths[sibling], coding, found):
                self.bad.append(f"{shown(sibling[1:])} is not sent for {shown(path[1:])}: it {why}")
            else:
                best.setdefault(coding, self.paths[sibling])
        return [(stored, coding) for coding, stored in best.items()]

    def _wrong(self, plain: Stored, sibling: Stored, coding: str, found: dict[int, Content]) -> str:
        if not sibling.length:
            return "is empty"
        told = False
        if sibling.offset in found:
            ends = found[sibling.offset].ends
            head, tail = ends[:-media.CODING_TAIL], ends[-media.CODING_TAIL:]
            if why := media.wrong_coding(coding, head, tail, plain.length, found[plain.offset].crc):
                return why
            told = media.tells_length(coding, head)
        return "is older" if not told and plain.mtime - sibling.mtime > media.OLDER else ""

    def notes(self, read: bool) -> list[str]:
        """Sentences for the operator; `read` is whether anything has been read."""
        notes = sibling_summary(self.bad)
        if self.of and not read:
            notes.append("of files like NAME.gz beside NAME only names and dates are checked, not contents, because of "
                         "--etags=off")
        return notes


def sibling_summary(bad: list[str]) -> list[str]:
    """The first few of sentences on files that are no variants, and how many more there are."""
    more = len(bad) - NOTED_SIBLINGS_MAX
    return bad[:NOTED_SIBLINGS_MAX] + [f"{more} more files are not sent for those they are beside"] * (more > 0)


# --- Resources

def resources(paths: dict[bytes, Stored], found: dict[int, Content], siblings: Siblings, address: int = 0) -> Index:
    """What each path stands for, in an archive at `address`. `found` is empty when etags are off."""
    index: Index = {}
    for path, (offset, length, mtime, pieces) in paths.items():
        content = found.get(offset, UNREAD)
        kind = media_type(path)
        plain = Representation(address + offset, length, mtime, "", kind.utf8 if content.utf8 else kind.value,
                               content.etag, pieces and _placed(pieces, address))
        variants = tuple([plain._replace(offset=address + other.offset, length=other.length, mtime=other.mtime,
                                         coding=coding, etag=found.get(other.offset, UNREAD).etag,
                                         pieces=other.pieces and _placed(other.pieces, address))
                          for other, coding in siblings.good(path, found)]) if path in siblings.of else ()
        index[path] = Resource(plain, variants)
    _add_directories(index)
    return index


def _placed(pieces: Pieces, address: int) -> tuple[tuple[int, int], ...]:
    """A sparse file's pieces as Representation has them, in an archive at `address`. Raises ArchiveError."""
    try:
        hole = zeros(HOLE_MAX)
    except OSError as error:
        raise ArchiveError(f"there is no room for zeros, of which sparse files have some: {error.strerror}") from error
    ends = accumulate([length for _, length in pieces])
    return tuple([(end, (hole if place == HOLE else address + place) - (end - length))
                  for end, (place, length) in zip(ends, pieces, strict=True)])


def _add_directories(index: Index) -> None:
    """/dir/ is /dir/index.html, and /dir leads to /dir/ unless a file has that name."""
    for path in [path for path in index if path.endswith(b"/index.html")]:
        directory = path.removesuffix(b"index.html")
        index[directory] = index[path]
        if directory != b"/":
            location = quote_from_bytes(directory, PATH_SAFE).encode()
            index.setdefault(directory[:-1], Redirect(location))


def _add_clean_urls(index: Index) -> None:
    """/about is /about.html, where nothing else has that name."""
    for path in [path for path in index if path.endswith(b".html") and not path.endswith(b"/.html")]:
        index.setdefault(path.removesuffix(b".html"), index[path])
