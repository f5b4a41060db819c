"""What an archive may hold: any bytes for a tar, and any names and links in a good one.

What is shared with tests/test_archive.py is how archives are made. The oracle for links is the kernel.
"""

import base64
import contextlib
import ctypes
import errno
import gc
import hashlib
import io
import itertools
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
from unittest import mock

import test_archive
from hostile_archives import SPARSE_FORMS, place

import archive as archive_module
import tar as tar_module
from archive import Redirect, Resource, open_archive
from linux import zeros
from sparse import HOLE_MAX, PIECES_MAX
from tar import ArchiveError
from tar import NAME_MAX

BLOCK = tarfile.BLOCKSIZE
MEMORY = "/dev/shm"
WORDS = (b"ustar\0" + b"00", b"ustar  \0", b"\0" * 12, b"\x80" + b"\0" * 7, b"\xff" * 12, b"77777777777\0", b"../",
         b"./", b"/", b"..", b"20 path=../../etc/x\n", b"12 size=512\n", b"12 size=-12\n", b"30 GNU.sparse.major=1\n",
         b"mtime=nan", b"GNU.sparse.map=0,1,2,3", b"linkpath=", b"hdrcharset=BINARY", b"././@LongLink\0", b"index.html",
         b".gz", b"\n", *(bytes([kind]) for kind in b"01234567xgLKSDV"))


class Serial:
    """Instead of a pool of threads: the same work, in the same order every time."""

    def __init__(self, *_):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def open_like_any(path, **options):
    """What `open_archive` gives, without hashing zeros for all the time there is."""
    with (mock.patch.object(archive_module, "ThreadPoolExecutor", Serial),
          mock.patch.object(tar_module, "HOLES_MAX", 1 << 20)):
        return open_archive(path, **options)


# --- any bytes

LONGEST_INDEX = 32 << 20        # bytes of all names in the index of a small tar
GROWTH = 64                     # and this many times a larger one's size


def tar(data):
    """They are an archive, of which nothing is outside them, or one sentence says why not; nothing stays open."""
    fd = os.memfd_create("tar")
    gc.disable()                    # it would close what other targets have left, descriptors below the spare one
    try:
        os.write(fd, data)
        spare = os.dup(fd)
        os.close(spare)
        open_and_check(f"/proc/self/fd/{fd}", data)
        again = os.dup(fd)
        os.close(again)
        assert again == spare, "a descriptor has been left open"
    finally:
        gc.enable()
        os.close(fd)


def open_and_check(path, data):
    try:
        opened = open_like_any(path, dotfiles=True)
    except ArchiveError as error:
        assert str(error).isprintable()
        return
    try:
        check_index(opened, data)
        assert all(note.isprintable() for note in opened.notes)
    finally:
        opened.close()


def check_index(opened, data):
    index = opened._index
    assert sum(map(len, index)) <= max(LONGEST_INDEX, GROWTH * len(data)), "out of proportion"
    seen = {}
    for path, found in index.items():
        check_path(path)
        if isinstance(found, Redirect):
            check_redirect(path, found, index)
            continue
        for one in (found.plain, *found.variants):
            check_spans(one, data)
            seen[place(one)] = one
        assert all(one.length and one.coding and one.media_type == found.plain.media_type for one in found.variants)
    assert all(start % BLOCK == 0 for start, _ in seen)
    for (start, length), (after, _) in itertools.pairwise(sorted(spot for spot in seen if spot[1])):
        assert start + length <= after, "bytes of two members, or a header among contents"
    for one in seen.values():
        digest = hashlib.sha256()
        for start, length in one.spans():
            digest.update(bytes(length) if start == zeros(HOLE_MAX) else data[start:start + length])
        assert one.etag == b'"%b"' % base64.urlsafe_b64encode(digest.digest()[:12])


def check_spans(one, data):
    spans = one.spans()
    assert sum(length for _, length in spans) == one.length
    assert len(spans) <= PIECES_MAX
    for start, length in spans:
        assert start == zeros(HOLE_MAX) or 0 <= start <= start + length <= len(data), "outside the file"


def check_path(path):
    assert path[:1] == b"/"
    assert len(path) <= NAME_MAX + len("/index.html/")
    assert b"\0" not in path
    assert not {b".", b".."} & set(path.split(b"/"))
    assert b"//" not in path


def check_redirect(path, found, index):
    assert re.fullmatch(rb"/(?!/)[!-~]*/", found.location)
    assert not re.search(rb'["<>\\^`{|}?#]', found.location)
    assert isinstance(index[path + b"/"], Resource)


def make(*items, form=tarfile.GNU_FORMAT):
    """The bytes of a tar, without the zeros that fill it up."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as made:
        for info, data in items:
            made.addfile(info, io.BytesIO(data))
    data = memory.getvalue().rstrip(b"\0")
    return data + bytes(-len(data) % BLOCK + BLOCK)


def tar_seeds():
    member, link, hard = test_archive.member, test_archive.symlink, test_archive.hardlink
    page, style = member("d/index.html", b"<p>"), member("style.css", b"b{}" * 20)
    pax = {"path": "p\u00e9/x", "mtime": "1.5", "comment": "c", "size": "3"}
    return (
        make(page, style, member("style.css.gz", b"\x1f\x8b"), member("style.css.br", b"x")),
        make(test_archive.directory("d"), page, link("l", "d"), hard("h", "d/index.html"), link("e", "l/../d/x")),
        make(member("n" * 150, b"long"), link("s", "n" * 150), member("\udcff\n", b"odd")),
        make(member("a", b"abc", pax_headers=pax), member("b", b"b"), form=tarfile.PAX_FORMAT),
        make(member("p/" + "q" * 90 + "/" + "r" * 60, b"ustar"), form=tarfile.USTAR_FORMAT),
        make(member("a", b"1"), member("a", b"22"), member("../x", b"no"), member("/abs", b"yes")),
        make(member("f", kind=tarfile.FIFOTYPE), member("c", kind=tarfile.CHRTYPE), member("?", b"v", kind=b"V")),
        make(member("huge", b"x" * 600), form=tarfile.GNU_FORMAT), b"", bytes(1024), b"\x1f\x8b\x08", b"PK\3\4",
        *sparse_seeds(), *sizes_seeds(),
    )


def sizes_seeds():
    """Whose contents would reach into the next members, if all that is said were believed (see FINDINGS.md)."""
    member = test_archive.member
    for headers in ({"GNU.sparse.realsize": "2000"}, {"size": "x"}, {"size": "-512"}, {"size": "1024"}):
        yield make(member("a", b"abc", pax_headers=headers), member("b", b"b" * 600), form=tarfile.PAX_FORMAT)
    for size in (b"+2000\0", b"2_000\0", b"0o2000\0"):
        data = bytearray(make(member("a", b"abc"), member("b", b"b" * 600)))
        data[124:124 + len(size)] = size
        yield repaired(data)
    content = record(b"GNU.sparse.realsize=2000")
    yield make(member("g", content, tarfile.XGLTYPE), member("a", b"abc"), member("b", b"b"))


def sparse_seeds():
    """GNU's four ways to leave out zeros."""
    member = test_archive.member
    for headers, data in (({"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "1",
                            "GNU.sparse.numbytes": "3"}, b"abc"),
                          ({"GNU.sparse.size": "9", "GNU.sparse.map": "1,3", "GNU.sparse.name": "s"}, b"abc"),
                          ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s",
                            "GNU.sparse.realsize": "9"}, b"1\n1\n3\n".ljust(BLOCK, b"\0") + b"abc")):
        yield make(member("s", data, pax_headers=headers), member("b", b"b"), form=tarfile.PAX_FORMAT)
    old = bytearray(make(member("s", b"abc"), member("b", b"b")))
    old[156:157], old[386:410], old[483:495] = b"S", b"%011o\0%011o\0" % (1, 3), b"%011o\0" % 9
    yield repaired(old)
    for form in SPARSE_FORMS.values():
        yield form(b"s", [(512, 512), (2048, 3)], 2051, b"x" * 515) + form(b"h", [(9, 0)], 9, b"") + bytes(2 * BLOCK)


# --- changes that keep a header a header

FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1),
          "linkname": (157, 100), "magic": (257, 8), "device": (329, 16), "prefix": (345, 155), "sparse": (386, 109)}
CHECKSUM = slice(148, 156)
VALUES = (b"", b"\0", b"0", b"1", b"00000001000\0", b"77777777777\0", b"-1", b"\x80" + bytes(10) + b"\1",
          b"\xff" * 12, b"\x80" + b"\xff" * 11, b"a", b"..", b"../a", b"/", b"a/b", b"d",
          b"d/index.html", b"l", b"./", b"a/..", b"\xff", b"00000000001\0" * 4, b"ustar\00000", b"ustar  \0", b"\n",
          b"index.html", b"style.css.gz")
KINDS = b"01234567xgLKSDVNMX\0"
RECORDS = (b"path=a/b", b"path=../x", b"path=a\0b", b"size=3", b"size=0", b"size=-1", b"size=99999999999999999999",
           b"size=1e3", b"mtime=nan", b"mtime=inf", b"mtime=-1", b"linkpath=d", b"linkpath=/etc", b"hdrcharset=BINARY",
           b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.map=0,1", b"GNU.sparse.size=5",
           b"GNU.sparse.realsize=2000", b"GNU.sparse.name=q", b"GNU.sparse.offset=0", b"GNU.sparse.numbytes=3",
           b"GNU.sparse.numblocks=1", b"GNU.sparse.map=512,512,2048,0", b"GNU.sparse.size=2048",
           b"path=" + b"n" * 200, b"=", b"x")


def headers(data):
    """Where the headers of a tar seem to be."""
    at = 0
    while at + BLOCK <= len(data):
        if any(data[at:at + BLOCK]):
            yield at
        try:
            size = tarfile.nti(data[at + 124:at + 136])
        except (ValueError, tarfile.HeaderError):
            size = 0
        holds = data[at + 156:at + 157] in b"\x00067xgLKSDVNMX"
        at += BLOCK + (-(-max(0, size) // BLOCK) * BLOCK if holds and size < len(data) else 0)


def repaired(data):
    """With checksums that are right."""
    data = bytearray(data)
    for at in headers(data):
        block = data[at:at + BLOCK]
        block[CHECKSUM] = b" " * 8
        data[at + 148:at + 156] = b"%06o\0 " % sum(block)
    return bytes(data)


def record(body):
    """A record of a pax header: its length counts itself."""
    size = len(body) + 2
    while len(str(size)) + len(body) + 2 != size:
        size = len(str(size)) + len(body) + 2
    return b"%d %b\n" % (size, body)


def mutate(data, longest, rnd):
    """Another tar, with a field, a record or a member changed, put in, moved or taken out."""
    data = bytearray(data or bytes(BLOCK))
    for _ in range(rnd.choice((1, 1, 2, 4))):
        places = list(headers(data)) or [0]
        at, other = rnd.choice(places), rnd.choice([*places, len(data)])
        rnd.choice((put_field, put_field, put_field, put_records, copy_block, drop_block))(data, at, other, rnd)
    return repaired(data[:longest]) if rnd.random() < 0.9 else bytes(data[:longest])


def put_field(data, at, _, rnd):
    start, size = FIELDS[rnd.choice(list(FIELDS))]
    value = bytes([rnd.choice(KINDS)]) if size == 1 else rnd.choice(VALUES)
    data[at + start:at + start + size] = value[:size].ljust(size, b"\0")


def put_records(data, at, _, rnd):
    """A pax header before a member."""
    content = b"".join(record(rnd.choice(RECORDS)) for _ in range(rnd.randint(1, 3)))
    if rnd.random() < 0.2:
        content = content.replace(b" ", b"", 1) if rnd.random() < 0.5 else content[:-1]
    info = tarfile.TarInfo("pax")
    info.type, info.size = rnd.choice((tarfile.XHDTYPE, tarfile.XGLTYPE)), len(content)
    data[at:at] = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def copy_block(data, at, other, rnd):
    data[other:other] = data[at:at + BLOCK * rnd.randint(1, 3)]


def drop_block(data, at, _, rnd):
    del data[at:at + BLOCK * rnd.randint(1, 2)]


# --- names and links

# All short names of few parts, and all short ways from one to another.
NAMES = [b"/".join(parts) for count in (1, 2, 3) for parts in itertools.product((b"a", b"b", b"c"), repeat=count)]
WAYS = [*NAMES[:12], *(b"../" * count + name for count in (1, 2) for name in NAMES[:12]), b"..", b"../..", b"a/..",
        b"a/../b", b"b/../../c", b"a/../../b/c", b"/a", b"c/../../.."]
PROBES = [*NAMES, *(b"/".join(parts) for parts in itertools.product((b"a", b"b", b"c"), repeat=4))]
RESOLVE_BENEATH, SYS_OPENAT2 = 8, 437     # <linux/openat2.h>, <asm-generic/unistd.h>
HOW = struct.pack("=QQQ", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, RESOLVE_BENEATH)
LIBC = ctypes.CDLL(None, use_errno=True)
MOST_MEMBERS = 10           # no more bad links than notes are made of


def links(data):
    """What a path through links stands for is what the kernel finds once the same things are on a disk."""
    folder = tempfile.mkdtemp(dir=MEMORY if os.path.isdir(MEMORY) else None)
    try:
        made = lay_out(os.fsencode(folder), members_of(data))
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(make(*made) if made else bytes(2 * BLOCK))
            file.flush()
            opened = open_like_any(file.name)
        try:
            compare(os.fsencode(folder), opened, any(b".." in os.fsencode(info.linkname) for info, _ in made))
        finally:
            opened.close()
    finally:
        shutil.rmtree(folder)


def members_of(data):
    """(kind, name, way) for each three bytes."""
    for at in range(0, min(len(data) - 2, 3 * MOST_MEMBERS), 3):
        kind, name, way = data[at:at + 3]
        yield b"flsh"[kind % 4:][:1], NAMES[name % len(NAMES)], WAYS[way % len(WAYS)]


def lay_out(folder, wanted):
    """Put members on the disk, and give those for the tar: of what cannot be in the same place the first."""
    made, taken, directories = [], set(), set()
    for number, (kind, name, way) in enumerate(wanted):
        above = {name[:at] for at, byte in enumerate(name) if byte == ord("/")}
        if name in taken | directories or above & taken:
            continue
        directories |= above
        taken.add(name)
        place = os.path.join(folder, name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        made.append(put(folder, place, kind, name, way, number))
    return made


def put(folder, place, kind, name, way, number):
    if kind == b"f":
        with open(place, "wb") as file:
            file.write(b"%d" % number)
        return test_archive.member(name, b"%d" % number)
    if kind == b"h":
        with contextlib.suppress(OSError):          # then there is no such file, and no such path
            os.link(os.path.join(folder, way.lstrip(b"/")), place, follow_symlinks=False)
        return test_archive.hardlink(name, way)
    os.symlink(way, place)
    return test_archive.symlink(name, way)


def compare(folder, opened, upwards):
    """The archive may find more where a way leads up from what is not there: it has no directories to miss. It may find
    less where a link leads to what it is in itself."""
    circles = any("circle" in note or "in itself" in note for note in opened.notes)
    served = {path[1:] for path, found in opened._index.items() if isinstance(found, Resource)}
    for name in served.union(PROBES):
        on_disk, error = open_beneath(folder, name)
        in_tar = opened.read(opened.find(b"/" + name).plain) if name in served else None
        if in_tar is None:
            assert on_disk is None or circles, (name, on_disk)
        elif on_disk is None:
            assert upwards, (name, in_tar)
            assert error != errno.EXDEV, "a way out of the archive"
        else:
            assert in_tar == on_disk, name


def open_beneath(folder, name):
    """(bytes of a regular file that the kernel finds without leaving the folder, or None; the error, or 0)."""
    parent = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    fd = LIBC.syscall(SYS_OPENAT2, parent, name, HOW, len(HOW))
    error = ctypes.get_errno()
    os.close(parent)
    if fd < 0:
        return None, error
    try:
        return (os.read(fd, 100) if stat.S_ISREG(os.fstat(fd).st_mode) else None), 0
    finally:
        os.close(fd)


def links_seeds():
    name, way = {one: i for i, one in enumerate(NAMES)}, {one: i for i, one in enumerate(WAYS)}
    file, link, hard = 0, 1, 3
    return [bytes(itertools.chain.from_iterable(made)) for made in (
        [(file, name[b"a"], 0)],
        [(file, name[b"a/b"], 0), (link, name[b"b"], way[b"a"])],
        [(file, name[b"a/b"], 0), (link, name[b"b/c"], way[b"../a/b"]), (hard, name[b"c"], way[b"b/c"])],
        [(link, name[b"a"], way[b"b"]), (link, name[b"b"], way[b"a"])],
        [(file, name[b"a/b/c"], 0), (link, name[b"a/a"], way[b"../a"]), (link, name[b"c"], way[b"a/a"])],
        [(link, name[b"a"], way[b"/a"]), (link, name[b"b"], way[b".."]), (link, name[b"c/a"], way[b"../.."])],
        [(file, name[b"a/a"], 0), (link, name[b"b"], way[b"a/.."]), (hard, name[b"c"], way[b"b"])],
        [(file, name[b"a/a"], 0), (link, name[b"b/b"], way[b"../a"]), (link, name[b"c"], way[b"b"])],
        [(file, name[b"a/a"], 0), (link, name[b"b"], way[b"../a"]), (hard, name[b"a/c/c"], way[b"a/../b"])],
        [(file, name[b"a/a"], 0), (link, name[b"a/b"], way[b"a"]), (link, name[b"b"], way[b"a"]),
         (hard, name[b"a/c"], way[b"b/b"])],
    )]
