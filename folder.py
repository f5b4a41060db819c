"""What is in the directory that is packed: sorted, without what is left out. And pages that list directories."""

import fnmatch
import html
import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote_from_bytes

import media
from tar import ArchiveError, Names, shown


class PackError(ArchiveError):
    """str() is one sentence: which file or program, what is wrong, what to do."""


class Entry(NamedTuple):
    """A member to be. name: relative, bytes. mtime: for the archive. target: of a symbolic link. data: of a page made
    here. inode: (device, number) of a file that has more names than one."""
    name: bytes
    size: int
    mtime: int
    mtime_ns: int = 0
    target: bytes = b""
    data: bytes | None = None
    inode: tuple[int, int] | None = None


class Site(NamedTuple):
    """What walk() has found. directories: names that end in a slash, b"" for the top."""
    root: bytes
    entries: list[Entry]
    directories: set[bytes]
    notes: list[str]

    def state(self) -> tuple:
        """Changes when the files do. In the shape of generation.identity()."""
        status, entries = os.stat(self.root), self.entries
        newest = max((entry.mtime_ns for entry in entries), default=status.st_mtime_ns)
        return status.st_dev, status.st_ino, sum(entry.size for entry in entries), newest, hash(tuple(entries))


class LeftOut:
    """Decides which names are not packed, and counts them. own: names of the archive itself, if it is inside."""

    def __init__(self, dotfiles: bool = False, patterns: Iterable[str] = (), own: Iterable[bytes] = ()):
        self.dotfiles, self.own = dotfiles, set(own)
        self.dots, self.special = Names(), Names()
        self.patterns = [(pattern, re.compile(fnmatch.translate(pattern.strip("/"))), "/" in pattern.rstrip("/"))
                         for pattern in patterns]
        self.used: set[str] = set()

    def __call__(self, name: bytes) -> bool:
        last = name.rpartition(b"/")[2]
        if last.startswith(b".") and last != b".well-known" and not self.dotfiles:
            self.dots.add(name)
            return True
        path, base = os.fsdecode(name), os.fsdecode(last)
        matching = [pattern for pattern, regex, whole in self.patterns if regex.match(path if whole else base)]
        self.used.update(matching)
        return bool(matching) or name in self.own

    def notes(self) -> list[str]:
        return [
            *[f"left out, for a name that begins with a dot: {self.dots}; see --dotfiles"] * bool(self.dots.count),
            *[f"left out, for they are no files: {self.special}"] * bool(self.special.count),
            *[f"--exclude {pattern} matches nothing" for pattern, *_ in self.patterns if pattern not in self.used]]


def walk(directory: str, left_out: LeftOut, latest: int | None = None) -> Site:
    """The Site in a directory, its entries sorted by name; no date is later than `latest`. Raises PackError."""
    site = Site(os.path.realpath(os.fsencode(directory)), [], {b""}, [])
    try:
        links = _read(site, left_out, latest)
        site.notes.extend(left_out.notes())
        site.entries.extend(_good_links(site, links))
    except OSError as error:
        raise unreadable(os.fsencode(error.filename or site.root), error) from error
    site.entries.sort()
    return site


def _read(site: Site, left_out: LeftOut, latest: int | None) -> list[Entry]:
    """Fill in a Site's files and directories; gives its links, without where they lead."""
    waiting, links = [b""], []
    while waiting:
        above = waiting.pop()
        with os.scandir(site.root + b"/" + above) as listed:
            found = [(above + one.name, one) for one in listed if not left_out(above + one.name)]
        for name, one in found:
            status = one.stat(follow_symlinks=False)
            entry = Entry(name, status.st_size, _date(status, latest), status.st_mtime_ns)
            if one.is_dir(follow_symlinks=False):
                site.directories.add(name + b"/")
                waiting.append(name + b"/")
            elif one.is_symlink():
                links.append(entry._replace(size=0))
            elif one.is_file():
                inode = (status.st_dev, status.st_ino) if status.st_nlink > 1 else None
                site.entries.append(entry._replace(inode=inode) if inode else entry)
            else:
                left_out.special.add(name)
    return links


def unreadable(path: bytes, error: OSError) -> PackError:
    """The error for a file or directory that cannot be read."""
    return PackError(f"{os.fsdecode(path)} cannot be read: {error.strerror}; let this user read it, or --exclude it")


def _date(status: os.stat_result, latest: int | None) -> int:
    date = max(0, status.st_mtime_ns // 10 ** 9)
    return date if latest is None else min(date, latest)


def _good_links(site: Site, links: list[Entry]) -> Iterator[Entry]:
    """Those of the symbolic links that lead to what is packed, as they can be followed inside the archive."""
    there = {entry.name for entry in site.entries} | {name[:-1] for name in site.directories}
    for link in sorted(links):
        path = site.root + b"/" + link.name
        target, real = os.readlink(path), os.path.realpath(path)
        inside = os.path.relpath(real, site.root)
        if inside.split(b"/")[0] == b"..":
            site.notes.append(f"left out: the link {shown(link.name)} leads out of the directory, to {shown(target)}")
        elif inside not in there and inside != b".":
            site.notes.append(f"left out: the link {shown(link.name)} leads to {shown(target)}, which is not packed")
        else:
            above = os.path.dirname(link.name)
            there_too = os.path.normpath(os.path.join(above, target))       # as the archive has it
            stays = not there_too.startswith((b"/", b"../")) and there_too != b".."
            yield link._replace(target=target if stays else os.path.relpath(real, site.root + b"/" + above))


# --- pages for directories that have none

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem }}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid #8884; padding: .3rem .5rem .3rem 0; text-align: left }}
th:first-child, td:first-child {{ overflow-wrap: anywhere; width: 100% }}
td + td, th + th {{ font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }}
@media (max-width: 30rem) {{ td:last-child, th:last-child {{ display: none }} }}
</style>
<h1>{title}</h1>
<table>
<tr><th scope="col">Name<th scope="col">Size<th scope="col">Date (UTC)
{rows}
</table>
"""


def add_indexes(site: Site) -> None:
    """Add a page that lists what is in it to each directory that has no index.html; to none below /.well-known/."""
    listed: dict[bytes, list[Entry]] = {directory: [] for directory in site.directories}
    for directory in site.directories - {b"", b".well-known/"}:
        above = directory[:-1].rpartition(b"/")[0]
        listed[above and above + b"/"].append(Entry(directory, 0, 0))
    names = {entry.name for entry in site.entries}
    for entry in site.entries:
        stem, _, suffix = entry.name.rpartition(b".")
        if suffix not in media.CODING_SUFFIXES or stem not in names:
            listed[entry.name[:entry.name.rfind(b"/") + 1]].append(entry)
    for directory, entries in listed.items():
        if directory + b"index.html" not in names and not directory.startswith(b".well-known/"):
            page = index_page(directory, sorted(entries))
            date = max((entry.mtime for entry in entries), default=0)
            site.entries.append(Entry(directory + b"index.html", len(page), date, data=page))
    site.entries.sort()


def index_page(directory: bytes, entries: Iterable[Entry]) -> bytes:
    """A page with the entries of a directory: names, sizes, dates."""
    rows = ['<tr><td><a href="../">../</a><td><td>'] * bool(directory)
    for entry in entries:
        name = entry.name[len(directory):]
        date = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.mtime)) if entry.mtime else ""
        size = "" if name.endswith(b"/") or entry.target else size_words(entry.size)
        rows.append(f'<tr><td><a href="./{quote_from_bytes(name)}">{_text(name)}</a><td>{size}<td>{date}')
    return PAGE.format(title="/" + _text(directory), rows="\n".join(rows)).encode()


def _text(name: bytes) -> str:
    """A name as HTML; what cannot be shown is replaced."""
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in name.decode("utf-8", "replace")))


def size_words(count: int) -> str:
    """`count` bytes for people: 45.6 MB."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000 ** power:.1f} {' kMGT'[power]}B" if power else f"{count} B"
