"""Archives that no packer writes, block by block; what GNU tar makes of them, and what tarweb, and at which price."""

import json
import os
import resource
import stat
import subprocess
import sys
from itertools import pairwise
from typing import NamedTuple

from support import MTIME, ROOT

from archive import ArchiveError, Resource, open_archive
from linux import zeros
from sparse import HOLE_MAX

BLOCK = 512
END = bytes(2 * BLOCK)
USTAR, GNU, NO_MAGIC = b"ustar\x0000", b"ustar  \0", bytes(8)

# Where a header block has what (POSIX pax, "ustar Interchange Format").
FIELDS = {"name": (0, 100), "mode": (100, 108), "uid": (108, 116), "gid": (116, 124), "size": (124, 136),
          "mtime": (136, 148), "kind": (156, 157), "link": (157, 257), "magic": (257, 265), "uname": (265, 297),
          "devmajor": (329, 337), "devminor": (337, 345), "prefix": (345, 500)}
KINDS = {"link": b"1", "symlink": b"2", "char": b"3", "block": b"4", "directory": b"5", "fifo": b"6"}


# --- writing -------------------------------------------------------------------------------------------------------


def octal(number):
    return b"%011o\0" % number


def base256(number):
    """GNU's binary form, for what is negative or has more than eleven octal digits."""
    return (b"\xff" if number < 0 else b"\x80") + (number % (1 << 88)).to_bytes(11, "big")


def sign(block):
    """A header block with the right checksum, whatever else is wrong."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def overwrite(block, **fields):
    """A header block with some fields replaced, padded or cut to their width, and signed."""
    block = bytearray(block)
    for field, value in fields.items():
        start, end = FIELDS[field]
        block[start:end] = value[:end - start].ljust(end - start, b"\0")
    return sign(block)


NOTHING = octal(0)


def header(name=b"a", size=NOTHING, kind=b"0", magic=USTAR, **fields):
    return overwrite(bytes(BLOCK), name=name, mode=b"0000644\0", uid=b"0000000\0", gid=b"0000000\0", size=size,
                     mtime=octal(MTIME), kind=kind, magic=magic, **fields)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def file(name, data=b"", **fields):
    fields.setdefault("size", octal(len(data)))
    return header(name, **fields) + padded(data)


def link(name, target, kind=b"2"):
    """A link; long names and targets the way that GNU tar writes them."""
    before = (long_name(target, b"K") if len(target) > 99 else b"") + (long_name(name) if len(name) > 99 else b"")
    return before + header(name, kind=kind, link=target, magic=GNU)


def record(keyword, value):
    """A record of a pax header: its own length counts its digits, too."""
    rest = b" %b=%b\n" % (keyword, value)
    size = len(rest)
    while len(b"%d" % size) + len(rest) != size:
        size = len(b"%d" % size) + len(rest)
    return b"%d%b" % (size, rest)


def pax(*records, kind=b"x"):
    """A pax header of (keyword, value) pairs, or of raw bytes."""
    data = b"".join(item if isinstance(item, bytes) else record(*item) for item in records)
    return file(b"pax", data, kind=kind)


def long_name(name, kind=b"L"):
    return file(b"././@LongLink", name + b"\0", kind=kind, magic=GNU)


# Sparse members: `extents` are (offset, bytes) each, of the file as it is extracted, which has `size` bytes.

def old_sparse(name, extents, size, data, magic=GNU):
    """With extents in the header, and more blocks of them behind it."""
    size, *entries = [octal(number) if number < 8 ** 11 else base256(number) for number in (size, *sum(extents, ()))]
    entries = [offset + length for offset, length in zip(entries[::2], entries[1::2], strict=True)]
    block = bytearray(header(name, octal(len(data)), b"S", magic))
    block[386:386 + 24 * len(entries[:4])] = b"".join(entries[:4])
    block[482], block[483:495] = len(entries) > 4, size
    blocks = [sign(bytes(block))]
    for start in range(4, len(entries), 21):
        rest = b"".join(entries[start:start + 21]).ljust(504, b"\0")
        blocks.append((rest + bytes([len(entries) > start + 21])).ljust(BLOCK, b"\0"))
    return b"".join(blocks) + padded(data)


def sparse_0_0(name, extents, size, data):
    pairs = [(b"GNU.sparse." + key, b"%d" % value) for extent in extents
             for key, value in zip((b"offset", b"numbytes"), extent, strict=True)]
    return pax((b"path", name), (b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(extents)),
               *pairs) + file(b"x", data)


def sparse_0_1(name, extents, size, data):
    return pax((b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(extents)),
               (b"GNU.sparse.name", name),
               (b"GNU.sparse.map", b",".join([b"%d,%d" % extent for extent in extents]))) + file(b"x", data)


def sparse_1_0(name, extents, size, data):
    lines = b"".join([b"%d\n" % len(extents), *[b"%d\n%d\n" % extent for extent in extents]])
    return pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", name),
               (b"GNU.sparse.realsize", b"%d" % size)) + file(b"x", padded(lines) + data)


SPARSE_FORMS = {"old GNU": old_sparse, "0.0": sparse_0_0, "0.1": sparse_0_1, "1.0": sparse_1_0}


# --- writing what costs -------------------------------------------------------------------------------------------

DEEP = b"/".join([b"n" * 199] * 19)         # a name of nearly 4 KiB
LONG_WAY = b"d/../" * 800                   # one that takes 1600 steps


def many(count, make):
    return [make(number) for number in range(count)]


def links_with_long_names(count):
    """As many files, and links to their directory with long names: count * count names."""
    return (many(count, lambda number: file(b"d/%d" % number, b"x"))
            + many(count, lambda number: link(b"%b/%d" % (DEEP, number), b"../" * 19 + b"d")))


def links_into_a_chain(count, target, kind):
    """The chain is as long as the kernel follows, and it is a long way from link to link."""
    return [*many(39, lambda number: link(b"c%d" % number, LONG_WAY + b"c%d" % (number + 1))), file(b"c39/x", b"x"),
            *many(count, lambda number: link(b"l%d" % number, target, kind))]


def multiplied(width, depth):
    """Links in each directory to the next: width ** depth names."""
    return [link(b"d%d/%d" % (level, number), b"../d%d" % (level + 1))
            for level in range(depth) for number in range(width)] + [file(b"d%d/x" % depth, b"x")]


# --- GNU tar's opinion ---------------------------------------------------------------------------------------------


class Extracted(NamedTuple):
    status: int             # 0: without complaint
    files: dict             # path, as in a request, -> contents of regular files
    folder: bytes

    def at(self, path):
        """The contents of what `path` leads to, links followed; None where that is no regular file inside."""
        place = os.path.realpath(self.folder + path)
        inside = place.startswith(os.path.realpath(self.folder) + b"/")
        return contents(place) if inside and os.path.isfile(place) else None


def contents(path):
    with open(path, "rb") as opened:
        return opened.read()


def bounded():
    """For what is run on archives that may claim anything; ulimit(1)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))


def gnu_tar(path, folder):
    """Extract the archive at `path` into the new `folder`."""
    os.mkdir(folder)
    done = subprocess.run(["tar", "--no-same-owner", "-xf", path], cwd=folder, capture_output=True, check=False,
                          preexec_fn=bounded, env={"LC_ALL": "C", "PATH": os.environ["PATH"]}, timeout=60)
    folder, files = os.fsencode(folder), {}
    for where, _, names in os.walk(folder):
        for name in names:
            place = os.path.join(where, name)
            if stat.S_ISREG(os.lstat(place).st_mode):
                files[place.removeprefix(folder)] = contents(place)
    return Extracted(done.returncode, files, folder)


# --- tarweb's ------------------------------------------------------------------------------------------------------


def served(path, **options):
    """path -> contents of each file that the archive at `path` is served as, directories left out. Raises ArchiveError.

    Every one of them has to lie in the file, and on no other's bytes.
    """
    archive = open_archive(str(path), **options)
    try:
        found = {name: resource.plain for name, resource in archive._index.items()
                 if isinstance(resource, Resource) and not name.endswith(b"/")}
        check_places(archive.size, set(map(place, found.values())))
        return {name: archive.read(plain) for name, plain in found.items()}
    finally:
        archive.close()


def place(plain):
    """(offset, bytes) of what of a file is in the archive, one piece behind the other."""
    stored = [span for span in plain.spans() if span[0] != zeros(HOLE_MAX)]
    if not stored:
        return plain.offset, 0
    assert all(start + length == after for (start, length), (after, _) in pairwise(stored))
    return stored[0][0], sum(length for _, length in stored)


def check_places(size, places):
    """Files begin at a block's beginning, after a header, end within the archive and before the next one's header."""
    end = 0
    for offset, length in sorted(places):
        assert offset % BLOCK == 0
        assert offset >= end + BLOCK
        end = offset + length
    assert end <= size


def refusal(path):
    """The sentence with which an archive is refused, "" where it is not."""
    try:
        served(path)
    except ArchiveError as error:
        return str(error)
    return ""


class Cost(NamedTuple):
    paths: int              # that are served
    notes: list
    refusal: str
    memory: int             # bytes, at the most


OPEN = """
import json, re, resource, sys
from archive import ArchiveError, open_archive
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)
def highest():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, paths, notes, refusal = highest(), 0, [], ""
try:
    archive = open_archive(sys.argv[1])
    paths, notes = len(archive._index), archive.notes
except ArchiveError as error:
    refusal = str(error)
print(json.dumps([paths, notes, refusal, highest() - before]))
"""


def cost(path, seconds=60):
    """What opening an archive costs, in a process of its own that is killed when it takes that many seconds of CPU."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(path), str(seconds)], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    return Cost(*json.loads(done.stdout))
