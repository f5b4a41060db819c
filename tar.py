"""What a tar holds: its members, read with `tarfile` and checked for what that module lets pass, and its names.

A Tree is what each name stands for once the last member is read, and where the links between names lead.

File bytes are read with pread and only at start-up: whoever cuts the tar short later can then not kill the process
(SIGBUS).
"""

import errno
import os
import re
import shlex
import stat
import tarfile
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, NoReturn

import sparse
from sparse import HOLE, Pieces

LINKS_MAX = 40              # symbolic links followed for one name, as in the kernel (path_resolution(7))
NAME_MAX = 4096             # bytes in a name: <linux/limits.h> PATH_MAX, and more than a request's target may have
STEPS_MAX = 1_000_000       # components looked at to follow all links, and 50 more for each member
ALIASES_MAX = 100_000       # names that links to directories may add, where ten for each member are fewer
ALIAS_BYTES_MAX = 16 << 20  # of these names, where ten times those of the members are fewer
LAST_DATE = 253_402_300_799 # 9999-12-31T23:59:59Z
NOTED_LINKS_MAX = 10        # bad links reported one by one
HOLES_MAX = 8 << 30         # bytes left out of all sparse files: their entity tags are those of the zeros, too
NAMED_MAX = 4               # names told for each kind of what is not served


class Stored(NamedTuple):
    """A regular file's bytes, whatever the names that lead to them."""
    offset: int
    length: int
    mtime: int              # seconds since the epoch, perhaps in the future; 0 where it has no date
    pieces: Pieces = ()     # of a sparse file; then `offset` only tells it from others


class Symlink(NamedTuple):
    target: bytes


# What a name is: a file, a link, or a word for what is not served.
Node = Stored | Symlink | str
DIRECTORY = "directory"
PLURALS = {"device": "devices", "FIFO": "FIFOs", "unknown member": "unknown members",
           "sparse file whose map is wrong": "sparse files whose maps are wrong",
           sparse.TOO_MANY: "sparse files of too many pieces (pack them without -S)",
           "sparse file with too large holes": "sparse files with too large holes",
           "name with '..'": "names with '..'", "name with NUL": "names with NUL",
           "name that is too long": "names that are too long", "empty name": "empty names"}


class Names:
    """Counts names, and keeps the first few of them; str() is these, and how many more there are."""

    def __init__(self):
        self.count = 0
        self.first: list[bytes] = []

    def add(self, name: bytes) -> None:
        self.count += 1
        if len(self.first) < NAMED_MAX:
            self.first.append(name)

    def __str__(self):
        more = self.count - len(self.first)
        return ", ".join(map(shown, self.first)) + (f" and {more} more" if more else "")


class BadLink(Exception):
    """str() says what is wrong with it, to go after "the link 'name'"."""


class Tree:
    """What each name in the tar is. Names are bytes without "." and empty components; later members replace earlier."""

    def __init__(self):
        self.nodes: dict[bytes, Node] = {}
        self.skipped: dict[str, Names] = {}
        self.stranded = Names()             # members below a link that GNU tar does not follow: they keep their names
        self.has_links = False
        self.above = self.landing = b""     # a directory in the archive, and where GNU tar puts what is in it
        self.bad_links: dict[bytes, str] = {}
        self.once: dict[bytes, None] = {}   # links to a directory that they are in
        self.too_many_aliases = False
        self.steps = 0
        self.holes = 0                      # bytes of the holes of all sparse files that are not refused

    def add(self, member: "Header") -> None:
        name = _normal(encode(member.name))
        if wrong := _wrong_name(name):
            if name or not member.isdir():      # "./" itself is a member of most tars
                self._skip(wrong, name)
            return
        if self.has_links:
            try:
                name = self._landing(name)
            except BadLink:
                self.stranded.add(name)
        self.bad_links.pop(name, None)
        node = self._node(name, member)
        before = self.nodes.pop(name, None)     # so that its place in the order is the last one's, too
        self.nodes[name] = node
        if isinstance(node, Symlink) or isinstance(before, Symlink):
            self.above = self.landing = b""

    def _node(self, name: bytes, member: "Header") -> Node:
        if member.isreg():
            kind = member.wrong or self._too_large(member.pieces)
            if not kind:
                return Stored(member.offset_data, member.size, _date(member.mtime), member.pieces)
        elif member.isdir():
            return DIRECTORY
        elif member.issym():
            self.has_links = True
            return Symlink(encode(member.linkname))
        elif member.islnk():
            return self._hard_link(name, encode(member.linkname))
        else:
            kind = _kind(member)
        self._skip(kind, name)
        return kind

    def _too_large(self, pieces: Pieces) -> str:
        """What a file of these pieces is, if its holes are too large with those counted so far; else "": they count."""
        holes = self.holes + sum([length for place, length in pieces if place == HOLE])
        if holes > HOLES_MAX:
            return "sparse file with too large holes"
        self.holes = holes
        return ""

    def _skip(self, kind: str, name: bytes) -> None:
        self.skipped.setdefault(kind, Names()).add(name)

    def _landing(self, name: bytes) -> bytes:
        """Where GNU tar puts a member of this name: links on the way are followed, but for those that lead upwards,
        which it makes last of all. Raises BadLink."""
        above, _, last = name.rpartition(b"/")
        if not above:
            return name
        if above != self.above:
            landing = self.resolve(above, upwards=False)
            if landing != above and isinstance(self.nodes.get(landing), Stored):
                raise BadLink("leads to a file")
            self.above, self.landing = above, landing
        return self.landing + b"/" + last if self.landing else last

    def _hard_link(self, name: bytes, target: bytes) -> Node:
        """What `target` is by now, as with link(2): later members do not change it, and a symlink stays one."""
        try:
            node = self.nodes.get(_normal(target)) or self._node_at(self._place(target.lstrip(b"/")), target)
            if isinstance(node, str):
                raise BadLink(f"leads to a {node}")
        except BadLink as bad:
            self.bad_links[name] = str(bad)
            return "bad link"
        return node

    def _place(self, path: bytes) -> bytes:
        """The name of what `path` leads to, where a link in its last part is not followed. Raises BadLink."""
        above, _, last = _normal(path).rpartition(b"/")
        if not above or last == b"..":
            return self.resolve(path)
        directory = self.resolve(above)
        return directory + b"/" + last if directory else last

    def _node_at(self, name: bytes, target: bytes) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise BadLink(f"leads to {shown(target)}, which is not there") from None

    def resolve(self, path: bytes, upwards: bool = True) -> bytes:
        """The name `path` leads to when the links on its way are followed (path_resolution(7)). Raises BadLink, and
        unless `upwards` also for links with ".." in them."""
        done, pending, followed = b"", _split(path), 0
        while pending:
            self._step()
            part = pending.pop()
            if part == b"..":
                done = _parent(done)
                continue
            done = done + b"/" + part if done else part
            node = self.nodes.get(done)
            if isinstance(node, Symlink):
                followed += 1
                if followed > LINKS_MAX:
                    raise BadLink("leads in a circle, or through too many links")
                if not upwards and b".." in node.target.split(b"/"):
                    raise BadLink("leads upwards")
                pending += _split(node.target)
                done = _parent(done)
        return done

    def _step(self) -> None:
        """One more component. Long links in a chain that many lead to would take time out of all proportion."""
        self.steps += 1
        if self.steps > STEPS_MAX + 50 * len(self.nodes):
            raise BadLink("is not followed: all links together take too many steps")

    def paths(self, prefix: bytes) -> dict[bytes, Stored]:
        """Every path that has a file, links included; in a collision the member's own name wins over a link's."""
        files: dict[bytes, Stored] = {}
        for name, node in self.nodes.items():
            if isinstance(node, Stored):
                path = _path(name, prefix)
                files.pop(path, None)
                files[path] = node
        for name, node in Linker(self).files():
            files.setdefault(_path(name, prefix), node)
        return files

    def notes(self) -> list[str]:
        """What is not served, in sentences for the operator. Directories are no loss and are not mentioned."""
        notes = [f"not served: {names.count} {kind if names.count == 1 else PLURALS[kind]}: {names}"
                 for kind, names in sorted(self.skipped.items())]
        links = [f"not served: the link {shown(name)} {wrong}" for name, wrong in self.bad_links.items()]
        notes += links[:NOTED_LINKS_MAX]
        if len(links) > NOTED_LINKS_MAX:
            notes.append(f"not served: {len(links) - NOTED_LINKS_MAX} more bad links")
        notes += [f"the link {shown(name)} is followed only once, for it leads to a directory that it is in itself"
                  for name in list(self.once)[:NOTED_LINKS_MAX]]
        if self.stranded.count:
            notes.append(f"served by their own names only, for what is above them is a link: {self.stranded}")
        if self.too_many_aliases:
            notes.append("not served: some names through links to directories, for there are too many of them")
        return notes


class Linker:
    """Follows a Tree's symbolic links. A link to a directory adds a name for each file below that directory.

    Links to directories within linked directories multiply names without end, so: a directory is not entered again
    below itself, at most LINKS_MAX links lie on one path, and the names looked at are counted.
    """

    def __init__(self, tree: Tree):
        self.tree = tree
        self.links = [name for name, node in tree.nodes.items() if isinstance(node, Symlink)]
        self.sorted = sorted(tree.nodes) if self.links else []
        self.targets: dict[bytes, bytes | None] = {}
        self.left = max(ALIASES_MAX, 10 * len(tree.nodes))
        self.bytes_left = max(ALIAS_BYTES_MAX, 10 * sum(map(len, tree.nodes)))

    def files(self) -> Iterator[tuple[bytes, Stored]]:
        """(name, file) for every name that a link gives a file. Links within linked directories have to wait."""
        waiting: deque[tuple[bytes, bytes, tuple[bytes, ...]]] = deque((link, link, ()) for link in self.links)
        while waiting:
            alias, link, inside = waiting.popleft()
            target = self._target(link)
            if target is None:
                continue
            node = self.tree.nodes.get(target)
            if isinstance(node, Stored):
                yield alias, node
            elif self._may_enter(link, target, inside):
                for name, below in self._below(target, alias):
                    if isinstance(below, Stored):
                        yield name, below
                    elif isinstance(below, Symlink):
                        waiting.append((name, (target + name[len(alias):]).lstrip(b"/"), (*inside, target)))

    def _may_enter(self, link: bytes, target: bytes, inside: tuple[bytes, ...]) -> bool:
        """Whether to go into the directory `target` once more; `inside` are those on the way to `link`."""
        circle = target in inside or len(inside) == LINKS_MAX
        if circle and link not in self.tree.once:
            self.tree.bad_links.setdefault(link, "leads in a circle and is not followed below itself")
        return not circle

    def _target(self, link: bytes) -> bytes | None:
        """What `link` leads to in the end, a file or a directory; None for a bad one, which is noted."""
        if link not in self.targets:
            try:
                self.targets[link] = self._good_target(link)
            except BadLink as bad:
                self.tree.bad_links[link] = str(bad)
                self.targets[link] = None
        return self.targets[link]

    def _good_target(self, link: bytes) -> bytes:
        target = self.tree.resolve(link)
        if not target or link.startswith(target + b"/"):
            self.tree.once.setdefault(link)
        if self._range(target):
            return target
        node = self.tree._node_at(target, _target_of(self.tree.nodes[link]))
        if isinstance(node, str) and node != DIRECTORY:
            raise BadLink(f"leads to a {node}")
        return target

    def _range(self, directory: bytes) -> range:
        """Where in the sorted names those below `directory` are; "0" is the byte after "/"."""
        if not directory:
            return range(len(self.sorted))
        return range(bisect_left(self.sorted, directory + b"/"), bisect_left(self.sorted, directory + b"0"))

    def _below(self, directory: bytes, alias: bytes) -> Iterator[tuple[bytes, Node]]:
        """(name under `alias`, node) for what is below `directory`, until too much has been looked at."""
        for place in self._range(directory):
            if not self.left or self.bytes_left < 0:
                self.tree.too_many_aliases = True
                return
            self.left -= 1
            name = self.sorted[place]
            below = alias + name[len(directory):] if directory else alias + b"/" + name
            if len(below) <= NAME_MAX:
                self.bytes_left -= len(below)
                yield below, self.tree.nodes[name]


def _target_of(node: Node) -> bytes:
    return node.target if isinstance(node, Symlink) else b""


def encode(name: str) -> bytes:
    """The bytes a name has in the tar: it was decoded the same way."""
    return name.encode("utf-8", "surrogateescape")


def _normal(name: bytes) -> bytes:
    return b"/".join([part for part in name.split(b"/") if part not in (b"", b".")])


def normal_prefix(prefix: str) -> bytes:
    """Written like the names it is taken off; whether it ends in a slash makes a difference."""
    name = _normal(encode(prefix))
    return name + b"/" if name and prefix.endswith("/") else name


def _wrong_name(name: bytes) -> str:
    """Why a member of this (normal) name is not served, "" if it is."""
    if not name:
        return "empty name"
    if len(name) > NAME_MAX:
        return "name that is too long"
    if b"\0" in name:                           # only pax can have it, and no request can
        return "name with NUL"
    return "name with '..'" if b".." in name and b".." in name.split(b"/") else ""


def _kind(member: tarfile.TarInfo) -> str:
    if member.ischr() or member.isblk():
        return "device"
    return "FIFO" if member.isfifo() else "unknown member"


def _date(mtime: float) -> int:
    """Whole seconds since the epoch, 0 for no date: 0 and 1 are what packers write who want none to be told.

    Pax allows fractions and negative numbers, and tarfile "nan" and "inf"; HTTP's dates end with the year 9999.
    """
    return int(min(mtime, LAST_DATE)) if mtime >= 2 else 0


def _split(path: bytes) -> list[bytes]:
    """The components of a link's path, last one first. Raises BadLink."""
    if path.startswith(b"/"):
        raise BadLink(f"leads out of the archive, to {shown(path)}")
    if not path or len(path) > NAME_MAX:
        raise BadLink("is empty" if not path else "is too long")
    return _normal(path).split(b"/")[::-1] if _normal(path) else []


def _parent(name: bytes) -> bytes:
    if not name:
        raise BadLink("leads out of the archive")
    return name.rpartition(b"/")[0]


def _path(name: bytes, prefix: bytes) -> bytes:
    """Where a name is served. The prefix is one of the text, not of whole components."""
    return b"/" + (_normal(name.removeprefix(prefix)) or name)


def shown(name: bytes) -> str:
    """For messages: in quotes, control characters escaped, not endlessly long."""
    shown = repr(name.decode("utf-8", "backslashreplace"))
    return shown if len(shown) <= 200 else shown[:200] + "..."


CHUNK = 1 << 20             # bytes read at once

# First bytes of what people take for a tar, what it is, what its name then ends in, and how a tar comes of it: with
# such a name, and with any other.
NO_TAR = (
    (b"\x1f\x8b", "gzip-compressed", (".gz", ".tgz"), "gunzip -k", "gzip -dc"),
    (b"BZh", "bzip2-compressed", (".bz2", ".bz", ".tbz2", ".tbz"), "bunzip2 -k", "bzip2 -dc"),
    (b"\xfd7zXZ\0", "xz-compressed", (".xz", ".txz"), "unxz -k", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", (".zst", ".tzst"), "unzstd", "zstd -dc"),
)
ZIP = b"PK\x03\x04"
HOW_TO_PACK = "make one with 'tar -C SITE_DIRECTORY -cf site.tar .'"


class ArchiveError(Exception):
    """str() is one sentence: which file, what is wrong with it, what to do."""


# --- The file

def open_file(path: str) -> tuple[int, int]:
    """(fd, size) of a regular file that is not empty. Raises ArchiveError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)      # a FIFO nobody writes to would block
    except OSError as error:
        advice = "let this user read it (chmod, chgrp)" if error.errno == errno.EACCES else "check the name"
        raise ArchiveError(f"{path} cannot be opened: {error.strerror}; {advice}") from error
    try:
        status = os.fstat(fd)
        _check_file(path, status)
        os.set_blocking(fd, True)               # the flag means something else to io_uring
    except OSError as error:
        os.close(fd)
        raise _unreadable(path, 0, error) from error
    except BaseException:
        os.close(fd)
        raise
    return fd, status.st_size


def _check_file(path: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ArchiveError(f"{path} is a directory; make a tar of it with 'tar -C {shlex.quote(path)} -cf site.tar .'")
    if not stat.S_ISREG(status.st_mode):
        raise ArchiveError(f"{path} is not a regular file; copy the tar into one")
    if not status.st_size:
        raise ArchiveError(f"{path} is empty, not even a tar without files; {HOW_TO_PACK}")


def _pread(fd: int, path: str, offset: int, length: int) -> bytes:
    """pread(2), fewer bytes at the end of the file. Raises ArchiveError."""
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise _unreadable(path, offset, error) from error


def read(fd: int, path: str, offset: int, length: int) -> bytes:
    """Exactly `length` bytes, at most CHUNK, which the index says are there. Raises ArchiveError."""
    data = _pread(fd, path, offset, length)
    while 0 < len(data) < length and (more := _pread(fd, path, offset + len(data), length - len(data))):
        data += more                            # before a place that cannot be read, there are fewer bytes than wanted
    if len(data) < length:
        raise ArchiveError(f"{path} was cut short while it was read; start again once it is no longer written to")
    return data


def _unreadable(path: str, offset: int, error: OSError) -> ArchiveError:
    return ArchiveError(f"{path} cannot be read at byte {offset}: {error.strerror}; copy it anew")


def chunks(fd: int, path: str, offset: int, length: int) -> Iterator[bytes]:
    for start in range(offset, offset + length, CHUNK):
        yield read(fd, path, start, min(CHUNK, offset + length - start))


# --- Headers

EXTENSION_MAX = 16 << 20    # bytes in a header that extends the next one; a megabyte is a lot
EXTENSIONS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME,
              tarfile.GNUTYPE_LONGLINK)
DUMPDIR = b"D"              # a directory in an incremental archive of GNU tar, with the names of what is in it as data
SIZE = re.compile(rb" *[0-7]+ *(\0.*)?|\0.*|[\x80\xff].*", re.DOTALL)     # else int() takes signs, "_" and "0o" too
SAID = {"name": {"path", "GNU.sparse.name"}, "linkname": {"linkpath"}}     # fields, and the pax records that set them
RECORD = re.compile(rb"([1-9][0-9]{0,8}) ([^=\0]{1,512})=")


class Header(tarfile.TarInfo):
    """A header, read as GNU tar reads it, or refused with HeaderError: all must agree on where members begin.

    And `tarfile` keeps every record of pax headers, those of a global one for each member anew; here those few are
    kept that are used. Of a sparse file `size` is that of all of it, `stored` of what is in the tar.
    """

    said: dict[str, str] = {}               # "name" and "linkname", where a pax header has said them
    stored = 0
    pieces: Pieces = ()                     # of a sparse file
    wrong = ""                              # why a sparse file is not served

    def __init__(self, name: str = ""):
        super().__init__(name)
        self.extended: set[bytes] = set()   # types of the headers before it that extend it

    @classmethod
    def fromtarfile(cls, tar):
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        info = cls.frombuf(block, tar.encoding, tar.errors)
        info.offset = tar.fileobj.tell() - tarfile.BLOCKSIZE
        if not SIZE.fullmatch(block, 124, 136) or info.type in EXTENSIONS and not 0 <= info.size <= EXTENSION_MAX:
            raise tarfile.HeaderError("no size, or too large a one")
        if block[257:263] != b"ustar\0":    # then no prefix is there, but times, in an incremental archive of GNU tar
            info.name = text(block[:100])
        if block[156:157] == tarfile.AREGTYPE and info.isdir():
            info.type, info.name = tarfile.AREGTYPE, info.name + "/"    # another name may follow: see members()
        if info.type == tarfile.GNUTYPE_SPARSE:
            return info._proc_old_sparse(tar, block)
        return info._proc_member(tar)       # type: ignore[attr-defined]

    def _data(self, tar) -> bytes:
        return tar.fileobj.read(self.size + 511 & -512)

    def _next(self, tar) -> "Header":
        """The header that this one extends, which nothing of its type must have done yet."""
        info = self.fromtarfile(tar)
        if self.type in info.extended:
            raise tarfile.HeaderError("extended twice")
        info.extended.add(self.type)
        info.offset = self.offset
        return info

    def _proc_gnulong(self, tar):
        name = text(self._data(tar))
        info = self._next(tar)
        field = "name" if self.type == tarfile.GNUTYPE_LONGNAME else "linkname"
        if info.said.get(field, name) != name:
            raise tarfile.HeaderError("two names")      # GNU tar takes one, tarfile the other
        setattr(info, field, name)
        return info

    def _proc_old_sparse(self, tar, block: bytes) -> "Header":
        """Where GNU tar's own magic number is not, another program's map may be; but it has one block, or who knows."""
        is_gnu = block[257:265] == b"ustar  \0"
        if not is_gnu and block[482]:
            raise tarfile.HeaderError("a map in several blocks, and not GNU tar's")
        extents, size = sparse.old_gnu(block, tar.fileobj.read) if is_gnu else ([], -1)
        self._proc_builtin(tar)             # type: ignore[attr-defined]
        self._put_holes(lambda: (extents, size, 0))
        return self

    def _put_holes(self, find_map: Callable[[], tuple[sparse.Extents, int, int]]) -> None:
        """This is a sparse file; `find_map` gives its extents, its size, and how much of the data is the map itself."""
        if self.size < 0:
            raise tarfile.HeaderError("a size of less than nothing")
        self.sparse = []                    # type: ignore[assignment]
        self.stored = self.size
        try:
            extents, size, used = find_map()
            self.pieces, self.size = sparse.pieces(extents, size, self.offset_data + used, self.stored - used), size
        except sparse.MapError as error:
            self.wrong = str(error)

    def _proc_pax(self, tar):
        records, holes = pax_records(self._data(tar)[:self.size])
        if self.type == tarfile.XGLTYPE:
            if holes or not records.keys() <= {"mtime"}:
                raise tarfile.HeaderError("all members would have one name or size")
            tar.pax_headers.update(records)     # _proc_builtin() applies them
            tar.offset = tar.fileobj.tell()     # for an archive may end here: that of an empty tree, by git
            return self.fromtarfile(tar)
        self.type = tarfile.XHDTYPE
        info = self._next(tar)
        if holes and not info.isreg() or info.issparse() and (holes or "size" in records):
            raise tarfile.HeaderError("sparse, and no file")
        info._apply_pax_info(records, tar.encoding, tar.errors)     # type: ignore[attr-defined]
        info.name = records.get("GNU.sparse.name") or records.get("path", info.name)    # not cut at a final slash
        info.said = {field: getattr(info, field) for field, keywords in SAID.items() if keywords & records.keys()}
        if "size" in records:
            has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
            tar.offset = info.offset_data + (info.size + 511 & -512 if has_data else 0)
        if holes:
            info._put_holes(partial(sparse.from_records, holes, partial(_read, tar.fileobj, info.size)))
        return info


def _read(file, most: int, size: int) -> bytes:
    return file.read(min(most, size))


def text(field: bytes) -> str:
    """What a field of a header says: bytes until NUL."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def pax_records(data: bytes) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """(Those records of a pax header that matter, all values of those for sparse files without their "GNU.sparse.").

    POSIX pax, "pax Extended Header".
    """
    found: dict[str, str] = {}
    holes: dict[str, list[bytes]] = {}
    at = 0
    while at < len(data) and data[at]:
        match = RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise tarfile.HeaderError("no pax record")
        keyword, value = text(match[2]), data[match.end():end - 1]
        if keyword in ("path", "linkpath", "size", "mtime", "GNU.sparse.name"):
            found[keyword] = value.decode("utf-8", "surrogateescape")
        if keyword.startswith("GNU.sparse."):
            holes.setdefault(keyword.removeprefix("GNU.sparse."), []).append(value)
        at = end
    if holes and not sparse.is_clear(holes):
        raise tarfile.HeaderError("sparse, and nothing says how")
    if not re.fullmatch("[0-9]{1,19}", found.get("size", "0"), re.ASCII):
        raise tarfile.HeaderError("no size")
    return found, holes


# --- Members

def members(path: str, fd: int, size: int) -> Iterator[Header]:
    """Every member of the tar, in order. Raises ArchiveError for a file that is damaged, cut short or no tar."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)                            # the position is the descriptor's
        tar = _open_tar(path, fd, file)
        last = -1
        while (member := _next(path, tar)) is not None:
            _check_member(path, size, member, last)
            last = member.offset
            if member.isreg() and member.name.endswith("/") or member.type == DUMPDIR:
                member.type = tarfile.DIRTYPE   # in archives older than type 5, and in GNU tar's eyes always
            yield member
        _check_end(path, fd, size, tar.offset)


def _open_tar(path: str, fd: int, file) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=Header, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise _unreadable(path, 0, error) from error
    except Exception as error:                  # see _next
        raise ArchiveError(_no_tar(path, _pread(fd, path, 0, 8))) from error


def _no_tar(path: str, start: bytes) -> str:
    name = shlex.quote(path)
    for magic, what, suffixes, command, to_output in NO_TAR:
        if start.startswith(magic):
            return f"{path} is {what}; tarweb serves plain tar: run '" + (
                f"{command} {name}'" if path.endswith(suffixes) else f"{_unpack(to_output, path)}'")
    if start.startswith(ZIP):
        return (f"{path} is a zip file; tarweb serves plain tar: run 'unzip -d site {name}' and "
                "'tar -C site -cf site.tar .'")
    return f"{path} is not a tar file, or damaged in its first header; {HOW_TO_PACK}"


def _unpack(to_output: str, path: str) -> str:
    """A command that works for any name; without a shell it could not say where to write."""
    script = f"{to_output} {shlex.quote(path)} > {shlex.quote(path.removesuffix('.tar') + '.plain.tar')}"
    return 'sh -c "' + re.sub(r'(["\\$`])', r"\\\1", script) + '"'


def _next(path: str, tar: tarfile.TarFile) -> Header | None:
    try:
        member: Header | None = tar.next()      # type: ignore[assignment]
    except OSError as error:
        raise _unreadable(path, tar.offset, error) from error
    except Exception as error:
        # Whatever a damaged header breaks in tarfile: ReadError, and also ValueError, IndexError, RecursionError...
        _damaged(path, tar.offset, error)
    tar.members.clear()                         # type: ignore[attr-defined]  # or it keeps every TarInfo
    return member


def _check_member(path: str, size: int, member: Header, last: int) -> None:
    """tarfile takes any length for true; a negative one would lead it backwards, and round in circles.

    A file whose name ends in a slash is a directory for GNU tar, which takes what is in it for the next header.
    """
    is_directory_with_data = member.isreg() and member.size and member.name.endswith("/")
    if member.offset <= last or member.size < 0 or is_directory_with_data:
        _damaged(path, member.offset)
    end = member.offset_data + (member.stored if member.issparse() else member.size)
    if member.isreg() and end > size:
        raise ArchiveError(f"{path} is cut short: {shown(encode(member.name))} should end at byte {end} and the file "
                           f"ends at {size}; copy it anew")


def _check_end(path: str, fd: int, size: int, offset: int) -> None:
    """tarfile takes any block that is no header for the end: that is a block of zeros, or the file's end.

    Two blocks of zeros are the standard's end-of-archive (POSIX pax, "ustar Interchange Format"); one is enough here.
    """
    block = _pread(fd, path, offset, tarfile.BLOCKSIZE)
    if offset != size and block != bytes(tarfile.BLOCKSIZE):
        _damaged(path, offset)


def _damaged(path: str, offset: int, error: Exception | None = None) -> NoReturn:
    raise ArchiveError(f"{path} is damaged or cut short: no valid tar header at byte {offset}; "
                       "copy it or make it anew") from error
