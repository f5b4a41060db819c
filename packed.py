"""The archive that the packer writes, and what it reads of the one that it replaces.

Members are ustar's, with pax headers where that is not enough. The same members give the same bytes: owners and modes
are always the same. The archive begins with a comment (a pax global header) that names the tools which made siblings,
and those have a mode of their own: so each of them can be taken over by the next archive where compressing the file
again would give these very bytes.
"""

import contextlib
import hashlib
import itertools
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import media
from codings import COMPRESSES, SUFFIXES, Tool, compresses, spelled
from folder import Entry, PackError
from tar import CHUNK, pax_records

MEMBER, MADE = 0o644, 0o444     # the modes of files, and of siblings made here
BLOCK = 512
HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")   # POSIX pax, "ustar Interchange Format"
NUMBER_MAX = 0o77777777777      # in a field of 12 bytes
FILE, HARD_LINK, SYMLINK, PAX, PAX_GLOBAL = b"0", b"1", b"2", b"x", b"g"


def block(name: bytes, mode: int, size: int, mtime: int, kind: bytes, target: bytes = b"",
          prefix: bytes = b"") -> bytes:
    """A ustar header, of which all fields fit."""
    found = HEADER.pack(name, b"%07o" % mode, b"0000000", b"0000000", b"%011o" % size, b"%011o" % mtime, b" " * 8, kind,
                        target, b"ustar", b"00", b"", b"", b"0000000", b"0000000", prefix)
    return b"%b%06o\0 %b" % (found[:148], sum(found), found[156:])


def member(name: bytes, mode: int, size: int, mtime: int, kind: bytes = FILE, target: bytes = b"") -> bytes:
    """The header of a member, with a pax header before it where a field does not fit."""
    records, prefix, last = [], b"", name
    if len(name) > 100:
        slash = name.find(b"/", len(name) - 101)
        prefix, last = (name[:slash], name[slash + 1:]) if 0 < slash <= 155 else (b"", b"")
        if not last:
            records.append((b"path", name))
            last = name[:100]
    if len(target) > 100:
        records.append((b"linkpath", target))
    if size > NUMBER_MAX:
        records.append((b"size", b"%d" % size))
    if mtime > NUMBER_MAX:
        records.append((b"mtime", b"%d" % mtime))
    return (extension(PAX, records) if records else b"") + block(
        last, mode, size if size <= NUMBER_MAX else 0, min(mtime, NUMBER_MAX), kind, target[:100], prefix)


def extension(kind: bytes, records: list[tuple[bytes, bytes]]) -> bytes:
    """A pax header of these records (POSIX pax, "pax Extended Header"), for the next member or for all."""
    data = b"".join(itertools.starmap(record, records))
    if not _is_utf8(data):
        data = record(b"hdrcharset", b"BINARY") + data
    return block(b"pax", MEMBER, len(data), 0, kind) + data + padding(len(data))


def record(keyword: bytes, value: bytes) -> bytes:
    """A record begins with its length, which counts its own digits."""
    rest = b" %b=%b\n" % (keyword, value)
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%b" % (length, rest)


def _is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode()) or True
    except UnicodeDecodeError:
        return False


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


class Archive:
    """The archive being written to `file`, which begins with a comment on `tools`."""

    def __init__(self, file: IO[bytes], tools: dict[str, Tool]):
        self.file, self.tools = file, tools
        self.inodes: dict[tuple[int, int], bytes] = {}      # of files with several names: the first written
        file.write(extension(PAX_GLOBAL, [(b"comment", comment(tools, 0))]))

    def add(self, entry: Entry, chunks: Iterable[bytes], mode: int = MEMBER) -> None:
        """Write a file or link. Raises PackError where `chunks` are not as long as the entry says."""
        if entry.target:
            self.file.write(member(entry.name, 0o777, 0, entry.mtime, SYMLINK, entry.target))
        elif entry.inode in self.inodes:
            self.file.write(member(entry.name, mode, 0, entry.mtime, HARD_LINK, self.inodes[entry.inode]))
        else:
            self.file.write(member(entry.name, mode, entry.size, entry.mtime))
            for chunk in chunks:
                self.file.write(chunk)
            self.file.write(padding(entry.size))
            if entry.inode:
                self.inodes[entry.inode] = entry.name

    def finish(self) -> int:
        """Write the end, and the comment once more, for now the size is known; gives the size."""
        self.file.write(bytes(2 * BLOCK))
        size = self.file.tell()
        self.file.seek(0)
        self.file.write(extension(PAX_GLOBAL, [(b"comment", comment(self.tools, size))]))
        self.file.flush()
        return size


def comment(tools: dict[str, Tool], size: int) -> bytes:
    """Says what made the siblings in an archive of `size` bytes, and by which rules: the version of this format, which
    types compress."""
    rules = zlib.crc32(media.TYPES.encode() + COMPRESSES.pattern)
    words = [f"{coding}={tool.version}" for coding, tool in sorted(tools.items())]
    return " ".join([f"tarweb-pack 1 size={size:020} rules={rules:08x}", *words]).encode()


class Before:
    """The archive that is to be replaced. Only one that this packer has made, and nobody has changed in size since, is
    of any use: known[SHA-256 of a file][coding] is then where its sibling is, or None where it was not worth keeping.

    A tool that is another by now, or that was not there, has its coding left out.
    """

    def __init__(self, path: str, tools: dict[str, Tool]):
        self.known: dict[bytes, dict[str, tuple[int, int] | None]] = {}
        self.fd = -1
        with contextlib.suppress(OSError):
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._read(tools)
            except Exception:           # whatever a damaged archive leads to: then nothing is known
                self.known.clear()

    def _read(self, tools: dict[str, Tool]) -> None:
        size = os.fstat(self.fd).st_size
        said, now = self._comment().split(), comment(tools, size).split()
        codings = [word.partition(b"=")[0].decode() for word in now[4:] if word in said[4:]]
        if said[:4] != now[:4] or not codings:
            return
        files: dict[bytes, tuple[int, tuple[int, int]]] = {}
        taken: set[bytes] = set()
        for name, mode, place in self._members(size):
            if place:
                files[name] = mode, place
            while name and name not in taken:
                taken.add(name)
                name = name.rpartition(b"/")[0]
        for name, (mode, place) in files.items():
            if mode == MEMBER and compresses(name):
                known = self.known.setdefault(self._digest(*place), {})
                for coding in codings:
                    made, at = files.get(name + SUFFIXES[coding], (0, None))
                    if made == MADE or not taken.intersection(spelled(name, coding)):
                        known[coding] = at

    def _comment(self) -> bytes:
        """As comment() made it; b"" for none."""
        head = os.pread(self.fd, 2 * BLOCK, 0)
        found = re.match(rb"[0-9]+ comment=([^\n]*)\n", head[BLOCK:])
        return found[1] if head[156:157] == PAX_GLOBAL and found else b""

    def _members(self, size: int) -> Iterator[tuple[bytes, int, tuple[int, int] | None]]:
        """(name, mode, (offset, length) of a file or None). It reads what member() writes, many times faster
        than tarfile."""
        at = 2 * BLOCK
        said: dict[str, str] = {}
        while at < size - 2 * BLOCK:
            fields = [field.rstrip(b"\0") for field in HEADER.unpack(os.pread(self.fd, BLOCK, at))]
            name, mode, kind, prefix = fields[0], int(fields[1], 8), fields[7], fields[-1]
            at, length = at + BLOCK, int(said["size"]) if "size" in said else int(fields[4], 8)
            if kind == PAX:
                said, _ = pax_records(os.pread(self.fd, length, at))
            else:
                path = said.get("path", "").encode("utf-8", "surrogateescape")
                yield path or (prefix + b"/" + name).lstrip(b"/"), mode, (at, length) if kind == FILE else None
                said = {}
            at += length + -length % BLOCK

    def _digest(self, offset: int, length: int) -> bytes:
        digest = hashlib.sha256()
        for chunk in self.chunks(offset, length):
            digest.update(chunk)
        return digest.digest()

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Its bytes from `offset` on. Raises PackError."""
        for at in range(offset, offset + length, CHUNK):
            wanted = min(CHUNK, offset + length - at)
            chunk = os.pread(self.fd, wanted, at)
            if len(chunk) != wanted:
                raise PackError("the archive that is to be replaced has been cut short while it was read; pack again")
            yield chunk
