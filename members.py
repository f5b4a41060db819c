"""The members of a tar, read with `tarfile` and checked for what that module lets pass.

File bytes are read with pread and only at start-up: whoever cuts the tar short later can then not kill the process
(SIGBUS).
"""

import errno
import os
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
            yield member
        _check_end(path, fd, size, tar.offset)


def _open_tar(path: str, fd: int, file) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
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
    """tarfile takes any length for true; a negative one would lead it backwards, and round in circles."""
    if member.offset <= last or member.size < 0:
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
