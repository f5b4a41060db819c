#!/usr/bin/env python3
"""The packer: makes the archive of a site out of a directory, with compressed siblings beside what compresses.

    python3 pack.py my-site site.tar            or: python3 tarweb.py --pack my-site site.tar

    folder.py   what is in the directory
    codings.py  how files are compressed
    packed.py   the archive that is written, and what can be taken over from the one that it replaces
    Packer      reads, compresses and verifies on all cores, and writes in order
    Report      progress, notes, and what is saved

The same files and the same tools give the same bytes, whatever is taken over.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import IO, NamedTuple

if sys.flags.safe_path:         # as in tarweb.py
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

import media
from codings import SUFFIXES, Tool, compresses, find_tools, spelled
from folder import Entry, LeftOut, PackError, Site, add_indexes, size_words, unreadable, walk
from linux import cpus
from options import UsageError
from packed import BLOCK, MADE, Archive, Before
from tar import CHUNK, shown

BATCH_FILES, BATCH_BYTES = 32, CHUNK    # of small files that one task takes
PENDING_BATCHES = 8             # for each core, read ahead of what is being written
TWENTIETH = 20                  # a sibling has to be smaller by so much


class Interrupted(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int):
        self.number = number


# --- packing

class Job(NamedTuple):
    """A file or link, and behind it: existing: its siblings in the directory. wanted: the codings to be made."""
    entry: Entry
    existing: dict[str, list[Entry]]
    wanted: list[str]


class Sibling(NamedTuple):
    """What goes behind a file. source: None: the file in the directory; a place in the archive before; or a file."""
    coding: str
    entry: Entry
    source: IO[bytes] | tuple[int, int] | None


class Packer:
    """Packs a Site into `file`. before: a Before. scratch: the directory for temporary files.

    Raises PackError; then tasks may still be running, which end soon.
    """

    def __init__(self, site: Site, file: IO[bytes], tools: dict[str, Tool], before: Before | None = None,
                 report: "Report | None" = None, scratch: str | None = None):
        self.site, self.tools, self.scratch = site, tools, scratch
        self.archive = Archive(file, tools)
        self.before, self.report = before, report
        self.stopped = False

    def run(self) -> int:
        """The size of the archive."""
        pool, workers = ThreadPoolExecutor(len(cpus())), len(cpus())
        ahead: deque[tuple[list[Job], Future]] = deque()
        try:
            for batch in _batches(self._jobs()):
                ahead.append((batch, pool.submit(self._prepare_all, batch)))
                if len(ahead) > PENDING_BATCHES * workers:
                    self._write_all(*ahead.popleft())
            while ahead:
                self._write_all(*ahead.popleft())
        finally:
            self.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
        return self.archive.finish()

    def _jobs(self) -> Iterator[Job]:
        """In the order of the archive: siblings follow their file."""
        entries = {entry.name: entry for entry in self.site.entries}
        taken = entries.keys() | {name[:-1] for name in self.site.directories}
        for entry in self.site.entries:
            stem, _, suffix = entry.name.rpartition(b".")
            if suffix in media.CODING_SUFFIXES and not entry.target and self._has_siblings(entries.get(stem)):
                continue
            existing, wanted = {}, []
            if self._has_siblings(entry):
                for coding in SUFFIXES:
                    names = [name for name in spelled(entry.name, coding) if name in entries]
                    existing[coding] = [entries[name] for name in names if not entries[name].target]
                    if coding in self.tools and (existing[coding] or entry.name + SUFFIXES[coding] not in taken):
                        wanted.append(coding)
            yield Job(entry, existing, wanted)

    def _has_siblings(self, entry: Entry | None) -> bool:
        return bool(self.tools and entry and not entry.target and compresses(entry.name))

    # in threads

    def _prepare_all(self, batch: list[Job]) -> list[tuple[bytes | None, list[Sibling]]]:
        return [self._prepare(job) for job in batch]

    def _prepare(self, job: Job) -> tuple[bytes | None, list[Sibling]]:
        """(contents, None of a large file; its siblings)"""
        entry, data = job.entry, None
        if entry.size <= CHUNK and not entry.target:
            data = b"".join(self._chunks(entry))
        if not self._has_siblings(entry):
            return data, []
        digest, crc = hashlib.sha256(), 0
        for chunk in self._chunks(entry, data):
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
        known = self.before.known.get(digest.digest(), {}) if self.before else {}
        siblings: list[Sibling] = []
        for coding, existing in job.existing.items():
            kept = [one for one in existing if self._is_good(one, coding, entry, digest.digest(), crc)]
            made = None
            if coding in job.wanted and not kept and known.get(coding, ()) is not None:
                made = self._taken_over(entry, coding, known, crc) or self._make(entry, coding, data)
            siblings += [Sibling(coding, one._replace(mtime=max(one.mtime, entry.mtime)), None) for one in kept]
            siblings += [Sibling("", one, None) for one in existing
                         if one not in kept and not (made and made.entry.name == one.name)]
            siblings += [made] if made else []
            if self.report and len(kept) < len(existing):
                self.report.bad(entry, [one for one in existing if one not in kept], made)
        return data, siblings

    def _chunks(self, entry: Entry, data: bytes | None = None) -> Iterator[bytes]:
        """A file's contents, or `data`, if these are known. Raises PackError."""
        data = entry.data if data is None else data
        if data is not None:
            yield data
            return
        path = self.site.root + b"/" + entry.name
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0) as file:
                left = entry.size
                while left and not self.stopped and (chunk := file.read(min(left, CHUNK))):
                    left -= len(chunk)
                    yield chunk
                status = os.fstat(file.fileno())
        except OSError as error:
            raise unreadable(path, error) from error
        if left or (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime_ns):
            raise PackError(f"{os.fsdecode(path)} has changed while it was packed; pack again once nothing writes "
                            "to it")

    def _is_good(self, sibling: Entry, coding: str, plain: Entry, digest: bytes, crc: int) -> bool:
        """Whether a file of the directory holds `plain` in a coding, as far as that can be told here."""
        try:
            with open(self.site.root + b"/" + sibling.name, "rb") as file:
                if not sibling.size or _wrong(coding, file.fileno(), 0, sibling.size, plain.size, crc):
                    return False
                if coding not in self.tools:        # the server asks for this, too
                    return (media.tells_length(coding, file.read(media.CODING_HEAD))
                            or plain.mtime - sibling.mtime <= media.OLDER)
                found, size = hashlib.sha256(), 0
                for chunk in self.tools[coding].expand(file):
                    found.update(chunk)
                    size += len(chunk)
                    if size > plain.size:
                        return False
                return found.digest() == digest
        except OSError as error:
            raise unreadable(self.site.root + b"/" + sibling.name, error) from error
        except Exception:           # whatever the modules raise for what cannot be expanded
            return False

    def _taken_over(self, plain: Entry, coding: str, known: dict, crc: int) -> Sibling | None:
        """The sibling that is in the archive before, if it is in order."""
        place = known.get(coding)
        if not place or not self.before or _wrong(coding, self.before.fd, place[0], place[1], plain.size, crc):
            return None
        return Sibling(coding, _sibling(plain, coding, place[1]), place)

    def _make(self, plain: Entry, coding: str, data: bytes | None) -> Sibling | None:
        out = tempfile.SpooledTemporaryFile(CHUNK, dir=self.scratch)    # noqa: SIM115
        self.tools[coding].compress(self._chunks(plain, data), plain.size, out)
        size = out.seek(0, os.SEEK_END)
        if size * TWENTIETH > plain.size * (TWENTIETH - 1):
            out.close()
            return None
        return Sibling(coding, _sibling(plain, coding, size), out)

    # in order

    def _write_all(self, batch: list[Job], future: Future) -> None:
        while not future.done() and self.report:
            wait([future], timeout=0.2)
            self.report.show()
        for job, (data, siblings) in zip(batch, future.result(), strict=True):
            self.archive.add(job.entry, self._chunks(job.entry, data))
            for sibling in siblings:
                self._write_sibling(sibling)
            if self.report:
                self.report.add(job.entry, siblings)

    def _write_sibling(self, sibling: Sibling) -> None:
        coding, entry, source = sibling
        if source is None:
            self.archive.add(entry, self._chunks(entry))
        elif isinstance(source, tuple):
            assert self.before
            self.archive.add(entry, self.before.chunks(*source), MADE)
        else:
            with source:
                source.seek(0)
                self.archive.add(entry, iter(lambda: source.read(CHUNK), b""), MADE)


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Small files together, so that they cost no task each."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        if batch and (len(batch) == BATCH_FILES or size + job.entry.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.entry.size
    if batch:
        yield batch


def _sibling(plain: Entry, coding: str, size: int) -> Entry:
    return Entry(plain.name + SUFFIXES[coding], size, plain.mtime)


def _wrong(coding: str, fd: int, offset: int, size: int, plain_size: int, crc: int) -> str:
    """What media.wrong_coding() says of these bytes of a file."""
    head = os.pread(fd, min(size, media.CODING_HEAD), offset)
    at = max(0, size - media.CODING_TAIL)
    return media.wrong_coding(coding, head, os.pread(fd, size - at, offset + at), plain_size, crc)


# --- what people see

class Report:
    """Says on `stream` how far a packer is, and in the end what came of it: on a terminal in one line that changes,
    else in a line now and then."""

    def __init__(self, site: Site, stream):
        self.stream, self.terminal = stream, stream.isatty()
        self.files, self.bytes = len(site.entries), sum(entry.size for entry in site.entries)
        self.files_done = self.bytes_done = self.taken = 0
        self.codings: dict[str, list[int]] = {}     # files, their bytes, those of their siblings
        self.name = b""
        self.started = self.shown = time.monotonic()

    def note(self, text: str) -> None:
        self._print(f"pack: {text}\n")

    def bad(self, plain: Entry, found: list[Entry], made: Sibling | None) -> None:
        """Of a file's siblings in the directory, these do not hold its contents. May be called in threads."""
        for one in found:
            replaced = made and made.entry.name == one.name
            self.note(f"{shown(one.name)} does not hold {shown(plain.name)}: "
                      + ("it is made anew" if replaced else "it is packed as it is, and is not sent in its place"))

    def add(self, entry: Entry, siblings: list[Sibling]) -> None:
        """These have been written."""
        self.files_done, self.bytes_done = self.files_done + 1, self.bytes_done + entry.size
        self.name = entry.name
        for coding, sibling, source in siblings:
            if source is None:
                self.files_done, self.bytes_done = self.files_done + 1, self.bytes_done + sibling.size
            if coding:
                count = self.codings.setdefault(coding, [0, 0, 0])
                count[:] = count[0] + 1, count[1] + entry.size, count[2] + sibling.size
            self.taken += isinstance(source, tuple)
        self.show()

    def show(self) -> None:
        """Bring it up to date, if it is time for that."""
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10):
            return
        self.shown = now
        share = (self.bytes_done + self.files_done) / max(1, self.bytes + self.files)   # an empty file is something
        spent = now - self.started
        left = f", {duration_words(spent / share - spent)} left" if share > 0.02 else ""
        words = (f"{self.files_done} of {self.files} files, {size_words(self.bytes_done)} of {size_words(self.bytes)}, "
                 f"{duration_words(spent)}{left}")
        if not self.terminal:
            self._print(f"pack: {words}\n")
            return
        room = shutil.get_terminal_size().columns - 1
        bar = f"[{'#' * int(20 * share):20}] {share:4.0%} "
        self._print(f"{bar}{words} {ascii(self.name.decode('utf-8', 'replace'))[1:-1]}"[:room])

    def clear(self) -> None:
        """Take the line away that changes."""
        self._print("")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write("\r\x1b[K" * self.terminal + text)
            self.stream.flush()

    def summary(self, path: str, size: int) -> str:
        """What has been written, and what siblings save."""
        lines = [f"{path}: {self.files} files, {size_words(self.bytes)}; {size_words(size)} with all siblings "
                 f"({duration_words(time.monotonic() - self.started)})"]
        for coding, (files, before, after) in sorted(self.codings.items()):
            lines.append(f"{coding}: {files} files, {size_words(before)} are {size_words(after)} "
                         f"({1 - after / max(1, before):.0%} saved)")
        if self.taken:
            lines.append(f"{self.taken} siblings of unchanged files are those of the archive before")
        return "\n".join(lines)


def duration_words(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


# --- the command

def parse_arguments(arguments, prog):
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", metavar="DIRECTORY", help="the site")
    add("archive", metavar="SITE.tar", help="the archive to write, in place of one that is there")
    add("--exclude", metavar="PATTERN", action="append", default=[],
        help="leave out what has such a name, with all that is in it; with a slash, such a path from DIRECTORY. "
             "*, ? and [...] are as in a shell, but * takes slashes, too; repeatable")
    add("--index", action="store_true", help="write a page that lists it into each directory without index.html")
    add("--dotfiles", action="store_true", help="pack names that begin with a dot, too (default: .well-known alone)")
    add("--codings", metavar="LIST", type=codings,
        help="of br, gzip and zstd, those to make siblings in; none for none (default: all that can be made here)")
    return parser.parse_args(arguments)


DESCRIPTION = """\
Packs a directory into an archive that tarweb serves, with compressed siblings (NAME.br, NAME.gz, NAME.zst)
of what compresses. The same files and tools give the same bytes. An archive that is there is replaced at once,
when all is written; siblings of files that have not changed are taken over from it."""

EPILOG = """\
br takes the brotli module or command, zstd the zstd command or Python 3.14. SOURCE_DATE_EPOCH is the latest
date that a file is given. Exit status: 0 packed, 1 failed (the archive is as it was), 2 wrong usage."""


def codings(text):
    found = [] if text == "none" else text.split(",")
    if not set(found) <= SUFFIXES.keys():
        raise argparse.ArgumentTypeError(f"{text!r} is no list of codings: write br,gzip,zstd, or none")
    return found


def run(options) -> None:
    """Pack. Raises PackError and UsageError."""
    directory, path = options.directory, os.path.realpath(options.archive)
    if not os.path.isdir(directory):
        raise UsageError(f"{directory} is no directory: give that of the site")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{options.archive} is no file: give the archive to write")
    tools = find_tools(SUFFIXES if options.codings is None else options.codings)
    for coding in options.codings or ():
        if coding not in tools:
            raise UsageError(f"--codings {coding}: there is neither a module nor a command here for it")
    with replacing(path) as file:
        root = os.path.realpath(os.fsencode(directory))
        own = [os.path.relpath(os.fsencode(one), root) for one in (path, temporary_for(path))]
        site = walk(directory, LeftOut(options.dotfiles, options.exclude, own), latest_date(os.environ))
        if options.index:
            add_indexes(site)
        report = Report(site, sys.stderr)
        for note in site.notes:
            report.note(note)
        size = Packer(site, file, tools, Before(path, tools), report, os.path.dirname(path)).run()
        report.clear()
    print(report.summary(options.archive, size))
    for coding in sorted(SUFFIXES.keys() - tools.keys()) if options.codings is None else ():
        print(f"{coding}: none, for neither its module nor its command is here")


def latest_date(environment) -> int | None:
    """SOURCE_DATE_EPOCH (reproducible-builds.org); None without it. Raises UsageError."""
    text = environment.get("SOURCE_DATE_EPOCH", "")
    if text and not re.fullmatch("[0-9]{1,11}", text, re.ASCII):
        raise UsageError(f"SOURCE_DATE_EPOCH={text} is no date: give seconds since 1970, or unset it")
    return int(text) if text else None


def temporary_for(path: str) -> str:
    """Where the archive that is to be at `path` is written."""
    above, name = os.path.split(path)
    return os.path.join(above, f".{name}.packing")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file to be written, which takes the place of the one at `path` once that is done; else nothing is changed.
    Raises PackError."""
    temporary, replaced, file = temporary_for(path), False, None
    try:
        file = open(_create(temporary), "wb", CHUNK)    # noqa: SIM115  # closed, and so unlocked, once it has its name
        yield file
        file.flush()
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
        os.fsync(file.fileno())
        os.replace(temporary, path)
        replaced = True
    except OSError as error:
        raise PackError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if file and not replaced:
            os.unlink(temporary)
        if file:
            with contextlib.suppress(OSError):
                file.close()


def _create(temporary: str) -> int:
    """A new file, locked. One of this name that nobody has locked was left by a packer that was killed."""
    with contextlib.suppress(FileNotFoundError):
        left = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _lock(left, temporary)
            os.unlink(temporary)
        finally:
            os.close(left)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    _lock(fd, temporary)
    return fd


def _lock(fd: int, temporary: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PackError(f"another packer is writing {temporary}; wait until it has ended") from None


def main(arguments: list[str] | None = None, prog: str = "pack") -> int:
    """Pack as the command line says; the exit status. A signal that asks for the end ends the process."""
    options = parse_arguments(arguments, prog)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        run(options)
        return 0
    except Interrupted as interrupted:
        signal.signal(interrupted.number, signal.SIG_DFL)
        os.kill(os.getpid(), interrupted.number)        # threads that still compress are not waited for
    except (PackError, UsageError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 1


def _interrupt(number, _frame):
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


# --- a directory in place of an archive

def pack_into_memory(directory: str, dotfiles: bool, most: int) -> tuple[int, Site]:
    """(a memfd with the archive of a directory, without siblings made here; what is in it). Nobody can write to it any
    more. Raises PackError, also where it would take more than `most` bytes."""
    site = walk(directory, LeftOut(dotfiles))
    size = sum(entry.size + 3 * BLOCK + len(entry.name) for entry in site.entries)
    if size > most:
        raise PackError(f"{directory} is a directory that takes {size_words(size)}, and at most {size_words(most)} are "
                        f"packed into memory; write an archive: tarweb.py --pack {shlex.quote(directory)} site.tar")
    fd = os.memfd_create("site", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", CHUNK, closefd=False) as file:
            Packer(site, file, {}).run()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS,
                    fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise PackError(f"{directory} cannot be packed into memory: {error.strerror}") from error
        raise
    return fd, site


def state(directory: str, dotfiles: bool) -> tuple | None:
    """What Site.state() of a directory is by now; None where it cannot be read."""
    with contextlib.suppress(PackError, OSError):
        return walk(directory, LeftOut(dotfiles)).state()
    return None


if __name__ == "__main__":
    sys.exit(main())
