"""The sites that are served: archives by host, brought into memory, replaced by newer ones, and let go."""

import mmap
import os
import re
from functools import partial
from typing import NamedTuple

from linux import hide, map_file, map_huge, populate, unmap_file
from archive import Layers, Library, open_archive
from tar import ArchiveError
from reply import Responder


class Identity(NamedTuple):
    """What tells a file from another one, and from itself once it is changed (stat(2))."""
    device: int
    inode: int
    size: int
    mtime: int              # nanoseconds

    @classmethod
    def of(cls, file):
        """That of a path or descriptor; None where there is no such file."""
        try:
            status = os.stat(file)
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Sites:
    """The archives of one generation: for each host ("" is the default) its own, and those that stood in its place.

    Of `previous` Sites, archives whose files are still the same are taken over. Raises ArchiveError.
    """

    def __init__(self, arguments, previous=None):
        self.arguments = arguments
        self.layers = {}                # host: [Archive], the newest first
        self.opened = []                # what is new in this generation
        by_path = {}
        try:
            for host, path in arguments.sites:
                if path not in by_path:
                    by_path[path] = self.load(path, previous.layers[host] if previous else [])
                self.layers[host] = by_path[path]
        except BaseException:
            self.close_all_but(previous)
            raise

    def load(self, path, before):
        """The layers for the tar at `path`, where those `before` have served."""
        if before and before[0].identity == Identity.of(path) == Identity.of(before[0].fd):
            return before
        arguments = self.arguments
        archive = open_archive(path, arguments.prefix, arguments.etags == "on", partial(bring_in, arguments))
        self.opened.append(archive)
        archive.identity = Identity.of(archive.fd)
        if archive.identity is None:
            raise ArchiveError(f"{path} cannot be looked at any more; copy it anew")
        return [archive, *before[:arguments.keep]]

    def archives(self):
        """All of them, each once."""
        return list({id(archive): archive for layers in self.layers.values() for archive in layers}.values())

    def newest(self):
        """(host, Archive) of what is served in the first place."""
        return [(host, layers[0]) for host, layers in self.layers.items()]

    def close_all_but(self, others):
        """Let go of the archives that `others`, perhaps None, have not."""
        kept = {id(archive) for archive in others.archives()} if others else set()
        for archive in {id(archive): archive for archive in (*self.opened, *self.archives())}.values():
            if id(archive) not in kept:
                archive.close()
        self.opened = []

    # in a worker

    def library(self):
        """The Library of all archives, those pages mapped that are in memory."""
        archives = self.archives()
        for archive in archives:
            if not archive.lazy:
                populate(archive.address, archive.size)
        return Library(archives)

    def responders(self):
        """For each host (bytes; b"" is the default) the Responder."""
        return {host.encode(): Responder(Layers(layers) if len(layers) > 1 else layers[0], self.arguments.cache_control)
                for host, layers in self.layers.items()}


# --- into memory, and out of it

def hide_lost(library):
    """Archives have been written to: where one is shorter now, let there be nothing in memory where there was a file.

    From the new end to the end of its page there would be zeros (mmap(2)), which nobody could tell from contents.
    """
    for archive in library.archives:
        try:
            size = os.lseek(archive.fd, 0, os.SEEK_END)
        except OSError:                 # then nobody knows; the kernel cuts off what it cannot read
            continue
        if size < archive.size and not archive.copied:
            start = size & -mmap.PAGESIZE
            hide(archive.address + start, archive.size - start)


def bring_in(arguments, archive):
    """Give an Archive its address: that of a mapping, populated where it fits, or of a copy. Raises ArchiveError."""
    fd, size = archive.fd, archive.size
    try:
        if arguments.hugepages:
            archive.address, archive.copied = map_huge(fd, size, arguments.hugepages), True
        else:
            archive.address = map_file(fd, size)
    except OSError as error:
        advice = "see --hugepages and sysctl vm.nr_hugepages" if arguments.hugepages else "raise ulimit -v"
        raise ArchiveError(f"the archive of {size} bytes cannot be brought into memory: {error}; {advice}") from error
    page = max(1 << arguments.hugepages, mmap.PAGESIZE)
    archive.release = partial(unmap_file, archive.address, -(-size // page) * page)
    fits = archive.copied or arguments.preload or size < available_memory() // 2
    archive.lazy = not (fits and populate(archive.address, size))


def available_memory():
    """Bytes that can be used without swapping, as the kernel and the control group's limit have it; 0 if unknown."""
    found = re.search(r"MemAvailable: *([0-9]+) kB", read_text("/proc/meminfo"))
    return min(int(found[1]) * 1024 if found else 0, *group_limits())


def group_limits():
    """The memory limits of our control group (cgroups(7)), version 2 and 1."""
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from limits_above("/sys/fs/cgroup" + path, "memory.max")
        elif controllers == "memory":
            yield from limits_above("/sys/fs/cgroup/memory" + path, "memory.limit_in_bytes")
    yield 1 << 62


def limits_above(folder, name):
    """The limits in a group's folder and in all above it."""
    while folder != "/sys/fs":
        text = read_text(f"{folder}/{name}").strip()
        if text.isdigit():
            yield int(text)
        folder = os.path.dirname(folder.rstrip("/"))


def read_text(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
