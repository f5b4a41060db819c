"""A generation: what one load makes for workers to serve, and whether the files that it was made of have changed.

Archives are opened by it, brought into memory, kept over reloads where their files are still the same, and let go.
"""

import contextlib
import logging
import mmap
import os
import re
import struct
import time
from functools import partial
from importlib.util import find_spec

import linux
from archive import OWN, Layers, Library, Resource, open_archive
from options import UsageError
from reply import Responder
from tar import ArchiveError

log = logging.getLogger("tarweb")

DIRECTORY_MAX = 1 << 30         # bytes: of a directory that is served no more is packed into memory


def identity(file, with_ctime=False):
    """What tells the file at a path or descriptor from another one, and from itself once it is changed (stat(2)):
    (device, inode, size, mtime and ctime in nanoseconds). None where there is no such file. The ctime counts (else it
    is 0) only where a file is known to have been written to: mv and ln change it, too."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns * with_ctime
    return None


def import_rules(options):
    """The module for a site's own rules, before anything is served; None where it is not wanted, or has been left out.
    One of this name that belongs to something else does not count."""
    found = find_spec("rules") if options.site_rules else None
    if found is None or os.path.dirname(found.origin or "") != os.path.dirname(__file__):
        return None
    import rules
    return rules


class Generation:
    """Archives, TLS and the access log, as the command line asks for them.

    layers: for each host ("" stands for all others) its archives, the newest first, and behind it those that it has
    replaced. tls: credentials.Tls, or None. log_fd: of the access log, or -1. channel: in a worker, the socket through
    which its parent passes an access log that has been opened anew. Of a `previous` Generation, what has not
    changed is taken over; with `same_sites` all but the access log. Raises what main explains.
    """

    def __init__(self, options, tls=None, previous=None, same_sites=False):
        self.options, self.rules = options, import_rules(options)
        self.error = self.log_error = ""    # why the last attempt failed to replace this one, or to open its log anew
        self.layers: dict[str, list] = {}
        self.opened: list = []              # the archives that are new in this generation
        self.tls, self.log_fd, self.inotify, self.channel = None, -1, -1, None
        if options.access_log:
            self.log_fd = self.open_log(None if same_sites else previous)
        try:
            if same_sites:
                self.layers, self.tls, self.credentials_were = previous.layers, previous.tls, previous.credentials_were
            else:
                self.load(tls, previous)
        except BaseException:
            self.close_all_but(previous)
            raise
        self.scheme = "https" if self.tls else "http"
        self.newest = [layers[0] for layers in self.layers.values()]        # what is served in the first place
        self.loaded = [archive.identity for archive in self.newest] + self.credentials_were
        self.seen = self.tried = self.loaded
        self.spoilt = False                 # whether an archive has been written to in place
        if same_sites:                      # what went wrong with them is wrong still
            self.error, self.seen, self.tried = previous.error, previous.seen, previous.tried
        self.inotify = linux.open_inotify()
        self.written = False                # whether inotify has told of writes that in_flux() has not
        self.watched = {}                   # archives by the number that inotify has for them
        for archive in self.newest:
            number = -1 if archive.copied else linux.report_writes(self.inotify, archive.fd)
            archive.watched = number >= 0
            if archive.watched:
                self.watched[number] = archive

    def open_log(self, previous):
        """The access log, opened anew. Where that is not all that a reload is for, and fails, as for a FIFO that nobody
        reads at the moment, the `previous` generation's is good enough."""
        from accesslog import open_log
        try:
            return open_log(self.options.access_log)
        except UsageError as error:
            if not previous:
                raise
            log.warning("%s: lines go to where they went before the reload", error)
            return os.dup(previous.log_fd)

    def load(self, tls, previous):
        options, by_path = self.options, {}
        if previous:
            previous.note_writes()
        self.credentials_were = list(map(identity, options.tls_cert + options.tls_key))
        if tls:
            from credentials import load_credentials
            self.tls = load_credentials(options, tls)
            if not previous:
                log.info("TLS %s", tls.words)
        for host, path in options.sites:
            if path not in by_path:
                by_path[path] = self.load_layers(path, previous.layers[host] if previous else [])
            self.layers[host] = by_path[path]

    def load_layers(self, path, before):
        """The layers for the tar at `path`, where those `before` have served."""
        if before and before[0].identity == self.at(path) and not self.rewritten(before[0]):
            return before
        if self.is_directory(path) and not before:
            log.info("%s is a directory: it is packed into memory as it is, to try things out; in production serve an "
                     "archive, which 'tarweb --pack' makes, with compressed siblings", path)
        archive = self.open(path, place=partial(bring_in, self.options))
        self.opened.append(archive)
        archive.identity, archive.ctime = archive.identity or identity(archive.fd), os.fstat(archive.fd).st_ctime_ns
        if archive.identity is None:
            raise ArchiveError(f"{path} cannot be looked at any more; copy it anew")
        renew_dates(archive, Layers(before), int(time.time()))
        if archive.own:
            self.rules.apply(archive)
        elif self.options.site_rules and any(map(archive.find, OWN)):
            archive.notes.append("_headers and _redirects are files like any other, because rules.py, which would read "
                                 "them, is not beside tarweb.py")
        for note in archive.notes:
            log.warning("%s: %s", path, note)
        return [archive, *before[:self.options.keep]]

    def open(self, path, **place):
        """The Archive at `path`, as the command line has it. Raises ArchiveError."""
        if self.is_directory(path):
            return self.open_directory(path, **place)
        return self.index(path, **place)

    def index(self, path, **place):
        options = self.options
        return open_archive(path, options.prefix, options.etags == "on", dotfiles=options.dotfiles,
                            clean_urls=options.clean_urls, own_rules=self.rules is not None, **place)

    def open_directory(self, path, **place):
        """The Archive that a directory is packed into, in memory. Its identity is the directory's."""
        from pack import pack_into_memory
        options = self.options
        most = min(DIRECTORY_MAX, available_memory() // 2 or DIRECTORY_MAX)
        fd, site = pack_into_memory(path, options.dotfiles, most)
        try:
            archive = self.index(f"/proc/self/fd/{fd}", **place)
        finally:
            os.close(fd)
        archive.path, archive.identity, archive.copied = path, site.state(), True
        archive.notes += site.notes
        return archive

    def is_directory(self, path):
        """Whether a directory is to be served: one that takes the place of an archive later is a mistake."""
        return path in self.options.directories and os.path.isdir(path)

    def at(self, path, with_ctime=False):
        """The identity() of what is at a path: of a directory, it tells whether anything in it has changed."""
        if self.is_directory(path):
            from pack import state
            return state(path, self.options.dotfiles)
        return identity(path, with_ctime)

    def present(self, archive):
        """What the identity of an Archive would be by now: that of its path with --watch, else of what is open."""
        if self.options.watch:
            return self.at(archive.path, archive.written)
        return archive.identity if self.is_directory(archive.path) else identity(archive.fd, archive.written)

    def rewritten(self, archive):
        """Whether an Archive has been written to, though it is the file at its path, of the same size and date.

        inotify tells; where it does not, a ctime that has changed, if there are other contents (other names and places
        alone, with --etags=off). That it is read again is rare: mv, ln, chmod and the like take it.
        """
        ctime = os.fstat(archive.fd).st_ctime_ns
        if not archive.written and not archive.watched and ctime != archive.ctime:
            archive.ctime = ctime
            try:
                now = self.open(archive.path)
            except ArchiveError:        # the reload that this leads to says why
                archive.written = True
            else:
                archive.written = (now.digest, now.places) != (archive.digest, archive.places)
                now.close()
        return archive.written

    def archives(self):
        """All of them, each once."""
        return list(dict.fromkeys(archive for layers in self.layers.values() for archive in layers))

    def close_all_but(self, other):
        """Let go of what this generation has and the `other`, if any, has not."""
        for archive in {*self.opened, *self.archives()} - {*(other.archives() if other else ())}:
            archive.close()
        if self.tls and not (other and self.tls is other.tls):
            self.tls.credentials.close()
        for fd in (self.log_fd, self.inotify):
            if fd not in (-1, 1):               # 1: standard output
                with contextlib.suppress(OSError):
                    os.close(fd)

    # in a worker

    def library(self):
        """The Library of all archives, those pages mapped that are in memory."""
        library = Library(self.archives())
        for archive in library.archives:
            if not archive.lazy:
                linux.populate(archive.address, archive.size)
        return library

    def responders(self, scheme, kind=Responder):
        """For each host (bytes; b"" is the default) the Responder, of that `kind`, to requests by `scheme`, "http" or
        "https": the same one for hosts of the same archive."""
        by_archive = {layers[0]: kind(Layers(layers) if len(layers) > 1 else layers[0], self.options.cache_control,
                                      layers[0].rules, scheme, max(archive.deepest_page for archive in layers))
                      for layers in self.layers.values()}
        return {host.encode(): by_archive[layers[0]] for host, layers in self.layers.items()}

    def tell_schemes_apart(self):
        """Whether it matters to the rules of a site by which scheme a request comes."""
        return any(archive.rules and archive.rules.tell_schemes_apart for archive in self.newest)

    # the files

    def changed(self):
        """To be asked once a second: whether a file has changed (with --watch one of this name, else one that is open),
        has stayed so for a second, and has not been tried to be loaded like that."""
        options, before = self.options, self.seen
        if not self.spoilt:
            self.look_for_damage()
        self.seen = [self.present(archive) for archive in self.newest]
        self.seen += map(identity, options.tls_cert + options.tls_key) if options.watch else self.credentials_were
        return self.seen == before and self.seen not in (self.loaded, self.tried)

    def in_flux(self):
        """Whether an archive has been written to since this was asked last."""
        self.note_writes()
        written, self.written = self.written, False
        return written

    def note_writes(self):
        """Take what inotify has to tell."""
        with contextlib.suppress(OSError):
            for number, *_ in struct.iter_unpack("=iIII", os.read(self.inotify, 4096)):     # struct inotify_event
                if number in self.watched:
                    self.watched[number].written = self.written = True

    def look_for_damage(self):
        for archive in self.newest:
            changed = archive.written or identity(archive.fd) != archive.identity
            if not changed and archive.identity == identity(archive.path):
                changed = self.rewritten(archive)
            if changed and not archive.copied:
                self.spoilt = True
                log.error("%s has been written to in place, so responses from it may be wrong; it will be read anew. "
                          "To replace an archive, write another file and mv it there", archive.path)

    def failed(self, reason):
        """It could not be replaced."""
        self.tried, self.error = self.seen, reason

    # in words

    def words(self):
        """3 files, 12.3 kB, from site.tar"""
        count, length = sum(archive.files for archive in self.newest), sum(archive.bytes for archive in self.newest)
        return f"{counted(count, 'file')}, {size(length)}, from {', '.join(dict.fromkeys(a.path for a in self.newest))}"


def counted(number, noun):
    """1 file, 2 files"""
    return f"{number} {noun}{'s' * (number != 1)}"


def size(count):
    """`count` bytes for people: 45.6 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000 ** power:.1f} {' kMG'[power]}B"


# --- dates over reloads

def renew_dates(archive, before, now):
    """Where an Archive has other bytes at a path than those `before` it, and no later date, give them the reload's:
    `now`, in seconds since the epoch. Reproducible archives have the same date each time, roll-backs an older one, and
    whoever asks by date would keep what has been replaced (RFC 9110 section 8.8.2.2). The same bytes keep the later
    of their dates."""
    changed = {}
    for path, resource in archive.items():
        was = before.stored(path)
        if isinstance(resource, Resource) and isinstance(was, Resource):
            later = with_later_dates(resource, was, now)
            if later is not resource:
                changed[path] = later
    archive.update(changed)


def with_later_dates(resource, was, now):
    """A Resource in place of the one that `was` there; the same where no date has to change. Without entity tags all
    bytes are taken to be others."""
    if resource.plain[2:] == was.plain[2:] and resource.plain.etag and not resource.variants:
        return resource                     # nearly all, in less time
    dates = {one.coding: one.mtime for one in (was.plain, *was.variants)}
    tags = {one.coding: one.etag for one in (was.plain, *was.variants)}
    newest, those = max(dates.values()), (resource.plain, *resource.variants)
    if all(one.etag and tags.get(one.coding, one.etag) == one.etag for one in those):
        least = [dates.get(one.coding, was.plain.mtime) for one in those]
    else:
        least = [max(now, newest + 1) if 0 < newest >= one.mtime else 0 for one in those]
    if all(one.mtime >= date for one, date in zip(those, least, strict=True)):
        return resource
    plain, *variants = (one._replace(mtime=max(one.mtime, date)) for one, date in zip(those, least, strict=True))
    return resource._replace(plain=plain, variants=tuple(variants))


# --- into memory, and out of it

def watch(library):
    """What Clock takes to see that archives are written to; None where the system allows no more of that."""
    inotify = linux.open_inotify()
    for archive in library.archives:
        linux.report_writes(inotify, archive.fd)
    return (inotify, partial(on_damage, inotify, library)) if inotify >= 0 else None


def on_damage(inotify, library):
    """Archives have been written to: where one is shorter now, let there be nothing in memory where there was a file.
    From the new end to the end of its page there would be zeros (mmap(2)), which nobody could tell from contents."""
    with contextlib.suppress(BlockingIOError):
        while os.read(inotify, 4096):
            pass
    for archive in library.archives:
        try:
            size = os.lseek(archive.fd, 0, os.SEEK_END)
        except OSError:                 # then nobody knows; the kernel cuts off what it cannot read
            continue
        if size < archive.size and not archive.copied:
            start = size & -mmap.PAGESIZE
            linux.hide(archive.address + start, archive.size - start)


def bring_in(options, archive):
    """Give an Archive its address: that of a mapping, populated where it fits, or of a copy. Raises ArchiveError."""
    fd, size = archive.fd, archive.size
    try:
        if options.hugepages:
            archive.address, archive.copied = linux.map_huge(fd, size, options.hugepages), True
        else:
            archive.address = linux.map_file(fd, size)
    except OSError as error:
        advice = "; see --hugepages and sysctl vm.nr_hugepages" * bool(options.hugepages)
        raise ArchiveError(f"the archive of {size} bytes cannot be brought into memory: {error.strerror or error}"
                           + advice) from error
    page = max(1 << options.hugepages, mmap.PAGESIZE)
    archive.release = partial(linux.unmap_file, archive.address, -(-size // page) * page)
    fits = archive.copied or options.preload or size < available_memory() // 2
    archive.lazy = not (fits and linux.populate(archive.address, size))


# Where the memory limits of our control group are (cgroups(7)), by its controllers: version 2 and 1.
LIMITS = {"": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}


def available_memory():
    """Bytes that can be used without swapping, as the kernel and the limits of our control group and of all above it
    have it; 0 if unknown."""
    found = re.search(r"MemAvailable: *([0-9]+) kB", read_text("/proc/meminfo"))
    limits = [int(found[1]) * 1024 if found else 0]
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in LIMITS:
            top, name = LIMITS[controllers]
            folder = top + path
            while folder != "/sys/fs":
                text = read_text(f"{folder}/{name}").strip()
                if text.isdigit():
                    limits.append(int(text))
                folder = os.path.dirname(folder.rstrip("/"))
    return min(limits)


def read_text(path):
    with contextlib.suppress(OSError), open(path) as file:
        return file.read()
    return ""
