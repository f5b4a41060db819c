"""The members of a tar, read with `tarfile` and checked for what that module lets pass.

File bytes are read with pread and only at start-up: whoever cuts the tar short later can then not kill the process
(SIGBUS).
"""

import errno
import os
import re
import shlex
import stat
import tarfile
from collections.abc import Iterator
from typing import NoReturn

from tree import encode, shown

CHUNK = 1 << 20             # bytes read at once

# First bytes of what people take for a tar, what it is, and how a tar comes of it.
NO_TAR = (
    (b"\x1f\x8b", "gzip-compressed", "run 'gunzip -k {}'"),
    (b"BZh", "bzip2-compressed", "run 'bunzip2 -k {}'"),
    (b"\xfd7zXZ\0", "xz-compressed", "run 'unxz -k {}'"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "run 'unzstd {}'"),
    (b"PK\x03\x04", "a zip file", "run 'unzip -d site {}' and 'tar -C site -cf site.tar .'"),
)
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
SIZE = re.compile(rb" *[0-7]+ *(\0.*)?|\0.*|[\x80\xff].*", re.DOTALL)     # else int() takes signs, "_" and "0o" too
RECORD = re.compile(rb"([1-9][0-9]{0,8}) ([^=\0]{1,512})=")


class Header(tarfile.TarInfo):
    """A header, read as GNU tar reads it, or refused with HeaderError: all must agree on where members begin.

    And `tarfile` keeps every record of pax headers, those of a global one for each member anew; here those few are
    kept that are used.
    """

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
        return info._proc_member(tar)       # type: ignore[attr-defined]

    def _data(self, tar) -> bytes:
        return tar.fileobj.read(self.size + 511 & -512)

    def _next(self, tar, *others: bytes) -> "Header":
        """The header that this one extends, which nothing of its type must have done yet, or of `others`."""
        info = self.fromtarfile(tar)
        if not info.extended.isdisjoint((self.type, *others)):
            raise tarfile.HeaderError("extended twice")
        info.extended.add(self.type)
        info.offset = self.offset
        return info

    def _proc_gnulong(self, tar):
        name = text(self._data(tar))
        info = self._next(tar, tarfile.XHDTYPE)
        setattr(info, "name" if self.type == tarfile.GNUTYPE_LONGNAME else "linkname", name)
        return info

    def _proc_pax(self, tar):
        records = pax_records(self._data(tar)[:self.size])
        if self.type == tarfile.XGLTYPE:
            if not records.keys() <= {"mtime"}:
                raise tarfile.HeaderError("all members would have one name or size")
            tar.pax_headers.update(records)     # _proc_builtin() applies them
            tar.offset = tar.fileobj.tell()     # for an archive may end here: that of an empty tree, by git
            return self.fromtarfile(tar)
        self.type = tarfile.XHDTYPE
        info = self._next(tar)
        if "GNU.sparse" in records and not info.isreg():
            raise tarfile.HeaderError("sparse, and no file")
        if "GNU.sparse" in records:
            info.sparse = []                    # type: ignore[assignment]
        info._apply_pax_info(records, tar.encoding, tar.errors)     # type: ignore[attr-defined]
        info.name = records.get("GNU.sparse.name") or records.get("path", info.name)    # not cut at a final slash
        if "size" in records:
            has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
            tar.offset = info.offset_data + (info.size + 511 & -512 if has_data else 0)
        return info


def text(field: bytes) -> str:
    """What a field of a header says: bytes until NUL."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def pax_records(data: bytes) -> dict[str, str]:
    """Those records of a pax header that matter (POSIX pax, "pax Extended Header"); "GNU.sparse" if there are such."""
    found, sparse, at = {}, set(), 0
    while at < len(data) and data[at]:
        match = RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise tarfile.HeaderError("no pax record")
        keyword = text(match[2])
        if keyword in ("path", "linkpath", "size", "mtime", "GNU.sparse.name"):
            found[keyword] = data[match.end():end - 1].decode("utf-8", "surrogateescape")
        if keyword.startswith("GNU.sparse."):
            found["GNU.sparse"] = ""
            sparse.add(keyword.removeprefix("GNU.sparse."))
        at = end
    if sparse and sparse.isdisjoint(("map", "numblocks", "major")):     # of formats 0.1, 0.0 and 1.0
        raise tarfile.HeaderError("sparse, and nothing says how")
    if not re.fullmatch("[0-9]{1,19}", found.get("size", "0"), re.ASCII):
        raise tarfile.HeaderError("no size")
    return found


# --- Members

def members(path: str, fd: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Every member of the tar, in order. Raises ArchiveError for a file that is damaged, cut short or no tar."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)                            # the position is the descriptor's
        tar = _open_tar(path, fd, file)
        last = -1
        while (member := _next(path, tar)) is not None:
            _check_member(path, size, member, last)
            last = member.offset
            if member.isreg() and member.name.endswith("/"):
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
    for magic, what, remedy in NO_TAR:
        if start.startswith(magic):
            return f"{path} is {what}; tarweb serves plain tar: {remedy.format(shlex.quote(path))}"
    return f"{path} is not a tar file, or damaged in its first header; {HOW_TO_PACK}"


def _next(path: str, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except OSError as error:
        raise _unreadable(path, tar.offset, error) from error
    except Exception as error:
        # Whatever a damaged header breaks in tarfile: ReadError, and also ValueError, IndexError, RecursionError...
        _damaged(path, tar.offset, error)
    tar.members.clear()                         # type: ignore[attr-defined]  # or it keeps every TarInfo
    return member


def _check_member(path: str, size: int, member: tarfile.TarInfo, last: int) -> None:
    """tarfile takes any length for true; a negative one would lead it backwards, and round in circles.

    A file whose name ends in a slash is a directory for GNU tar, which takes what is in it for the next header.
    """
    is_directory_with_data = member.isreg() and member.size and member.name.endswith("/")
    if member.offset <= last or member.size < 0 or is_directory_with_data:
        _damaged(path, member.offset)
    if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
        raise ArchiveError(f"{path} is cut short: {shown(encode(member.name))} should end at byte "
                           f"{member.offset_data + member.size} and the file ends at {size}; copy it anew")


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
