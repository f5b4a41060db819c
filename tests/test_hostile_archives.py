"""P5, P6: archives made to mislead, to break out, or to cost too much. GNU tar says what they hold."""

import base64
import ctypes
import gzip
import hashlib
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest
from hostile_archives import (
    END, GNU, KINDS, NO_MAGIC, SPARSE_FORMS, USTAR, base256, cost, file, gnu_tar, header, link, links_into_a_chain,
    links_with_long_names, long_name, many, multiplied, octal, old_sparse, pax, record, refusal, served, sign,
    sparse_0_1,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import run_tarweb, wait_until

import sparse
from archive import open_archive
from sparse import HOLE, HOLE_MAX, PIECES_MAX

INNER = file(b"inner", b"INNER")            # contents that are a member themselves, to whoever gets a size wrong
AFTER = file(b"after", b"AFTER")
SIZE = len(INNER)


@pytest.fixture
def write(tmp_path):
    """write(blocks) -> the path of an archive of these, with an end."""
    def make(*blocks, end=END):
        path = tmp_path / "hostile.tar"
        path.write_bytes(b"".join(blocks) + end)
        return path
    return make


def sized(value, size=None, **fields):
    """INNER as a file, with that pax size before it and that one in its header."""
    return pax((b"size", value)) + file(b"a", INNER, size=octal(SIZE) if size is None else size, **fields)


# --- what GNU tar extracts, tarweb serves --------------------------------------------------------------------------

SAME = {
    "pax size, none in the header": sized(b"1024", octal(0)),
    "pax size 0": sized(b"0"),
    "pax size with leading zeros": sized(b"0001024", octal(5)),
    "pax size twice": pax((b"size", b"5"), (b"size", b"1024")) + file(b"a", INNER),
    "pax size and a long name": pax((b"size", b"1024")) + long_name(b"n" * 120) + file(b"a", INNER, size=octal(0)),
    "pax size of a directory": sized(b"1024", octal(0), kind=KINDS["directory"]),
    "pax size of a hard link": AFTER + sized(b"1024", octal(0), kind=KINDS["link"], link=b"after"),
    "a directory with a size": file(b"d/", INNER, kind=KINDS["directory"]),
    "a hard link with a size": AFTER + file(b"h", INNER, kind=KINDS["link"], link=b"after"),
    "a symbolic link with a size": file(b"l", INNER, kind=KINDS["symlink"], link=b"after"),
    "a size in base 256": file(b"a", INNER, size=base256(SIZE)),
    "a size with spaces": file(b"a", INNER, size=b"     2000 \0"),
    "a size without an end": file(b"a", INNER, size=b"000000002000"),
    "a size with something after NUL": file(b"a", INNER, size=b"2000\x0044\0"),
    "no size": file(b"a", INNER, size=b""),
    "an old directory": file(b"d/", kind=b"\0") + file(b"d/a", b"x", kind=b"\0"),
    "a contiguous file": file(b"a", INNER, kind=b"7"),
    "a long name": long_name(b"/".join([b"n" * 99] * 9)) + file(b"a", b"x"),
    "a long name that says it is shorter": file(b"L", b"long", kind=b"L", size=octal(2)) + file(b"a", b"x"),
    "a long name before a prefix": long_name(b"long") + file(b"a", b"x", prefix=b"pre"),
    "a prefix": file(b"a", b"x", prefix=b"pre"),
    "no prefix without the magic": file(b"a", b"x", magic=NO_MAGIC, prefix=b"pre"),
    "times where a prefix would be": file(b"a", b"x", magic=GNU, prefix=octal(1 << 30) + octal(1 << 30)),
    "times after a long name": long_name(b"n" * 120) + pax((b"mtime", b"5.5")) + file(b"a", b"x"),
    "times after a long target": AFTER + long_name(b"./" * 60 + b"after", b"K") + pax((b"mtime", b"5"))
                                 + link(b"l", b"x"),
    "a long name and the same pax path": long_name(b"n" * 120) + pax((b"path", b"n" * 120)) + file(b"a", b"x"),
    "a long name and a pax size": long_name(b"n" * 120) + sized(b"1024", octal(0)),
    "a long target and the same pax one": AFTER + long_name(b"after", b"K") + pax((b"linkpath", b"after"))
                                         + link(b"l", b"x"),
    "a directory of an incremental archive": file(b"d/", b"Na\0\0", kind=b"D") + file(b"d/a", b"x"),
    "pax path after a long name": pax((b"path", b"pax")) + long_name(b"gnu") + file(b"a", b"x"),
    "a pax header of Solaris": pax((b"path", b"two"), kind=b"X") + file(b"a", b"x"),
    "pax records nobody knows": pax((b"no.such", b"x"), (b"SCHILY.xattr.user.a", b"\0\xff")) + file(b"a", b"x"),
    "NUL after pax records": pax(record(b"path", b"p") + bytes(9)) + file(b"a", b"x"),
    "a global pax header": pax((b"comment", b"x"), (b"mtime", b"5"), kind=b"g") + file(b"a", b"x"),
    "global pax headers": pax((b"comment", b"x"), kind=b"g") * 9 + pax((b"path", b"b")) + file(b"a", b"x"),
    "a name twice": file(b"a", b"1") + file(b"./a", b"2"),
    "a file, then a directory": file(b"a", b"1") + file(b"a/", kind=KINDS["directory"]),
    "a directory, then a file": file(b"a/", kind=KINDS["directory"]) + file(b"a", b"2"),
    "an absolute name": file(b"/etc/passwd", b"mine"),
    "control characters": file(b"\r\n\x1b[2J\x7f\x01", b"x") + file(b"\xff\xfe", b"y"),
    "a zero block": file(b"a", b"x") + bytes(512) + file(b"b", b"x"),
    "two zero blocks": file(b"a", b"x") + END + file(b"b", b"x"),
    "nothing but zeros": bytes(10240),
}


@pytest.mark.parametrize("case", SAME)
def test_p06_sizes_and_names_are_those_of_gnu_tar(write, tmp_path, case):
    path = write(SAME[case], AFTER)
    extracted = gnu_tar(path, tmp_path / "extracted")
    assert extracted.status == 0
    found = served(path)
    assert {name: extracted.at(name) for name in found} == found
    assert extracted.files.items() <= found.items()


def long_sparse(count=4, goes_on=0, offset=b"%011o\0" % 0, size=b"%011o\0" % 512, magic=GNU):
    """A header of type S, and no more."""
    block = bytearray(header(b"a", octal(SIZE), b"S", magic))
    block[386:386 + 24 * count] = (offset + octal(512)) * count
    block[482], block[483:495] = goes_on, size.ljust(12, b"\0")
    return sign(bytes(block)) + INNER


# GNU tar complains of these, and goes on as it thinks best, or takes one of two meanings. Nobody writes them.
REFUSED = {
    "pax size is no number": sized(b"x"),
    "pax size is empty": sized(b""),
    "pax size is hexadecimal": sized(b"0x400"),
    "pax size has a sign": sized(b"+1024"),
    "pax size has a space": sized(b" 1024"),
    "pax size has an underscore": sized(b"10_24"),
    "pax size in other digits": sized("\u0661".encode()),
    "pax size is negative": sized(b"-1024"),
    "pax size of 5000 digits": sized(b"0" * 5000 + b"512"),
    "pax size with NUL": sized(b"512\0"),
    "pax size within the file": sized(b"512"),
    "pax headers after each other": pax((b"size", b"512")) + pax((b"path", b"b")) + file(b"a", INNER),
    "global pax size": pax((b"size", b"1024"), kind=b"g") + file(b"a", INNER, size=octal(0)),
    "global pax path": pax((b"path", b"p"), kind=b"g") + file(b"a", b"x"),
    "global realsize": pax((b"GNU.sparse.realsize", b"1024"), kind=b"g") + file(b"a", b"x"),
    "realsize alone": pax((b"GNU.sparse.realsize", b"2048")) + file(b"a", INNER),
    "size and realsize": pax((b"size", b"1024"), (b"GNU.sparse.realsize", b"2048")) + file(b"a", INNER, size=octal(0)),
    "a sparse link": pax((b"size", b"512"), (b"GNU.sparse.major", b"1")) + file(b"l", kind=KINDS["link"], link=b"good"),
    "a size with a sign": file(b"a", INNER, size=b"+2000\0"),
    "a size with a minus": file(b"a", INNER, size=b"-2000\0"),
    "a size with an underscore": file(b"a", INNER, size=b"2_000\0"),
    "a size with a prefix": file(b"a", INNER, size=b"0o2000\0"),
    "a size of blanks": file(b"a", INNER, size=b" " * 12),
    "a size that is not octal": file(b"a", INNER, size=b"0000008\0"),
    "a negative size": file(b"a", INNER, size=base256(-SIZE)),
    "a size of an unknown base": file(b"a", INNER, size=b"\x81" + base256(SIZE)[1:]),
    "a file with a slash and contents": file(b"d/", INNER),
    "an old directory with contents": file(b"d/", INNER, kind=b"\0", magic=NO_MAGIC),
    "pax path with a slash": pax((b"path", b"d/")) + file(b"a", INNER),
    "two long names": long_name(b"one") + long_name(b"two") + file(b"a", b"x"),
    "a long name and a pax path": long_name(b"one") + pax((b"path", b"two")) + file(b"a", b"x"),
    "a long target and a pax one": AFTER + long_name(b"one", b"K") + pax((b"linkpath", b"after")) + link(b"l", b"x"),
    "a long name and a sparse one": long_name(b"one") + pax((b"GNU.sparse.map", b"0,0"), (b"GNU.sparse.name", b"two")) +
                                    file(b"a"),
    "a sparse file without extents": pax((b"GNU.sparse.size", b"2048"), (b"GNU.sparse.numblocks", b"0"))
                                     + file(b"a", INNER),
    "a sparse map without their number": pax((b"GNU.sparse.size", b"2048"), (b"GNU.sparse.map", b"1024,1024"))
                                         + file(b"a", INNER),
    "a sparse map before their number": pax((b"GNU.sparse.size", b"2048"), (b"GNU.sparse.map", b"1024,1024"),
                                            (b"GNU.sparse.numblocks", b"1")) + file(b"a", INNER),
    "a sparse map of version 0": pax((b"GNU.sparse.realsize", b"2048"), (b"GNU.sparse.major", b"0"))
                                 + file(b"a", INNER),
    "a sparse map that ends and goes on": long_sparse(count=2, goes_on=1),
    "a sparse map that has no numbers": long_sparse(offset=b"+00000000512"),
    "a sparse size that is no number": long_sparse(size=b"0x1000"),
    "a sparse map of several blocks, not GNU tar's": long_sparse(goes_on=1, magic=USTAR),
    "a sparse size below 0": header(b"a", base256(-512), b"S", magic=GNU) + INNER,
    "an old sparse member with a pax size": pax((b"size", b"512")) + old_sparse(b"a", [(0, 512)], 512, INNER[:512]),
    "a long name of gigabytes": header(b"L", octal(1 << 32), b"L") + file(b"a", b"x"),
    "a pax header of gigabytes": header(b"pax", octal(1 << 32), b"x") + file(b"a", b"x"),
    "a long name and no member": AFTER + long_name(b"one"),
    "a pax header and no member": AFTER + pax((b"path", b"one")),
    "a pax record without length": pax(b"0 path=x\n") + file(b"a", b"x"),
    "a pax record that is shorter": pax(b"7 path=x\n") + file(b"a", b"x"),
    "a pax record that is longer": pax(b"99 path=x\n") + file(b"a", b"x"),
    "a pax record without an end": pax(b"9 path=xy") + file(b"a", b"x"),
    "a pax record without a keyword": pax(b"5 =x\n\n") + file(b"a", b"x"),
    "a pax record with NUL before =": pax(b"12 path\0a=x\n\n") + file(b"a", b"x"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("before", [b"", file(b"good", b"x")], ids=["first", "later"])
def test_p06_what_can_be_read_in_two_ways_is_refused(write, case, before):
    said = refusal(write(before, REFUSED[case], b"" if "no member" in case else AFTER))
    assert re.fullmatch(r"\S+ is (not a tar|damaged|cut short)[^\n]+", said)


FULL = bytes(range(1, 129)) * 4             # a block without zeros
HOLES = {
    "a hole in front": ([(1024, 512)], 1536, FULL),
    "a hole behind": ([(0, 512), (5000, 0)], 5000, FULL),
    "a hole between": ([(0, 512), (1024, 512)], 1536, FULL * 2),
    "no hole": ([(0, 512)], 512, FULL),
    "nothing but a hole": ([(5000, 0)], 5000, b""),
    "libarchive's hole": ([(0, 0), (5000, 0)], 5000, b""),
    "nothing at all": ([(0, 0)], 0, b""),
    "the last block is not full": ([(512, 512), (2048, 9)], 2057, FULL + b"123456789"),
    "extents without a hole between": ([(0, 512), (512, 512), (1024, 0)], 1024, FULL * 2),
    "many extents": ([(number * 1024, 512) for number in range(1, 50)], 50 * 1024 - 512, FULL * 49),
    "holes side by side": ([(100, 0), (200, 0), (1000, 512), (1600, 0), (1700, 0)], 1700, FULL),
    "as many pieces as are served": ([(number * 1024 + 512, 512) for number in range(250)], 250 * 1024, FULL * 250),
}
GIGABYTE = 1 << 30


@pytest.mark.parametrize("case", HOLES)
@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_p06_a_sparse_file_is_served_as_gnu_tar_extracts_it(write, tmp_path, form, case):
    path = write(SPARSE_FORMS[form](b"a", *HOLES[case]), AFTER)
    extracted = gnu_tar(path, tmp_path / "extracted")
    assert (extracted.status, extracted.files) == (0, served(path))


@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_a_hole_of_a_gigabyte_is_a_few_spans(write, form):
    path = write(SPARSE_FORMS[form](b"a", [(GIGABYTE, 512)], GIGABYTE + 512, FULL), AFTER)
    archive = open_archive(str(path))
    try:
        plain = archive.find(b"/a").plain
        *holes, (data, length) = plain.spans()
        assert plain.length == GIGABYTE + 512 == sum(size for _, size in holes) + length
        assert len(holes) <= 8 and length == 512
        assert all(ctypes.string_at(address, 4096) == bytes(4096) for address, _ in holes)
        assert os.pread(archive.fd, 512, data - archive.address) == FULL
        assert plain.etag == b'"' + base64.urlsafe_b64encode(whole_digest(GIGABYTE, FULL)[:12]) + b'"'
    finally:
        archive.close()


def test_holes_side_by_side_are_one_piece():
    """Else each extent of no bytes, a few bytes of a map, would take a piece's memory."""
    extents = [(end, 0) for end in (*range(1, 400), HOLE_MAX - 1, HOLE_MAX + 5)]
    assert sparse.pieces(extents, HOLE_MAX + 5, 512, 0) == ((HOLE, HOLE_MAX), (HOLE, 5))


def whole_digest(zeros, data):
    """SHA-256 of so many zeros and then `data`."""
    digest, piece = hashlib.sha256(), bytes(1 << 20)
    for _ in range(zeros // len(piece)):
        digest.update(piece)
    digest.update(data)
    return digest.digest()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.sampled_from(list(SPARSE_FORMS.values())), st.data())
def test_p06_sparse_files_at_random_are_refused_or_served_as_gnu_tar_extracts_them(form, data):
    numbers = st.sampled_from([0, 0, 1, 100, 512, 512, 1024, 1536, 2048, 5000])
    extents = data.draw(st.lists(st.tuples(numbers, numbers), max_size=5))
    if data.draw(st.booleans()):
        extents.sort()
    size = data.draw(st.sampled_from([0, 512, 1024, 5000, sum(extents[-1]) if extents else 0]))
    stored = data.draw(st.sampled_from([0, 512, 1000, sum(length for _, length in extents)]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.tar"
        path.write_bytes(form(b"a", extents, size, (FULL * 99)[:stored]) + AFTER + END)
        if not refusal(path):
            extracted, found = gnu_tar(path, f"{folder}/extracted"), served(path)
            assert found[b"/after"] == b"AFTER"
            assert found.get(b"/a") in (None, extracted.at(b"/a"))


WRONG_MAPS = {
    "it ends before the file": ([(0, 512)], 9999, FULL),
    "it goes beyond the file": ([(0, 512), (1024, 512)], 1024, FULL * 2),
    "it overlaps": ([(0, 512), (256, 512)], 768, FULL * 2),
    "it is out of order": ([(1024, 512), (0, 512)], 1536, FULL * 2),
    "it goes back to cut off": ([(0, 1024), (512, 0)], 512, FULL * 2),
    "a block in the middle is not full": ([(0, 100), (1024, 100)], 1124, FULL[:200]),
    "there is less in the tar": ([(0, 1024)], 1024, FULL),
    "there is more in the tar": ([(0, 512)], 512, FULL * 2),
    "too many pieces": ([(number * 1024 + 512, 512) for number in range(251)], 251 * 1024, FULL * 251),
    "more extents than are read": ([(end, 0) for end in range(1, PIECES_MAX + 2)] + [(9999, 0)], PIECES_MAX + 1, b""),
    "a hole of a petabyte": ([(1 << 50, 0)], 1 << 50, b""),
    "holes of more than is hashed": ([(9 << 30, 0)], 9 << 30, b""),
}


@pytest.mark.parametrize("case", WRONG_MAPS)
@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_p05_what_tools_do_not_agree_on_in_a_sparse_file_is_not_served(write, form, case):
    """What follows it is found, and a note names it."""
    path = write(SPARSE_FORMS[form](b"a", *WRONG_MAPS[case]), AFTER)
    assert served(path) == {b"/after": b"AFTER"}
    assert re.search("not served: 1 sparse file "
                     "(whose map is wrong|of too many pieces .pack it without -S.|with too large holes): 'a'",
                     str(cost(path).notes))


def test_too_large_holes_are_not_counted_against_files_behind_them(write):
    large, small = [(size, 0) for size in (9 << 30, 5000)]
    path = write(sparse_0_1(b"large", [large], large[0], b""), sparse_0_1(b"small", [small], small[0], b""))
    assert served(path) == {b"/small": bytes(5000)}


NUMBLOCKS = b"GNU.sparse.numblocks", b"1"
SPARSE = {
    "old GNU without a map": header(b"a", octal(SIZE), b"S", magic=GNU) + INNER,
    "a sparse file of another program": old_sparse(b"a", [(512, 512)], 1024, FULL, magic=USTAR),
    "a map that is none": pax((b"GNU.sparse.map", b"a,b")) + file(b"a", INNER),
    "a size in a map": pax((b"GNU.sparse.size", b"-5"), (b"GNU.sparse.map", b"-1,9999999")) + file(b"a", INNER),
    "a map and no size": pax((b"GNU.sparse.map", b"0,1024")) + file(b"a", INNER),
    "two sizes": pax(NUMBLOCKS, (b"GNU.sparse.map", b"0,1024"), (b"GNU.sparse.size", b"1024"),
                     (b"GNU.sparse.realsize", b"1024")) + file(b"a", INNER),
    "half an extent": pax((b"GNU.sparse.size", b"1024"), NUMBLOCKS, (b"GNU.sparse.map", b"0,1024,1024"))
                      + file(b"a", INNER),
    "another number of extents": pax((b"GNU.sparse.size", b"1024"), (b"GNU.sparse.numblocks", b"2"),
                                     (b"GNU.sparse.map", b"0,1024")) + file(b"a", INNER),
    "two maps": pax((b"GNU.sparse.size", b"1024"), NUMBLOCKS, (b"GNU.sparse.map", b"0,1024"),
                    (b"GNU.sparse.map", b"0,1024")) + file(b"a", INNER),
    "two formats": pax((b"GNU.sparse.size", b"1024"), NUMBLOCKS, (b"GNU.sparse.map", b"0,1024"),
                       (b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"1024")) + file(b"a", INNER),
    "another version": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"1"), (b"GNU.sparse.realsize", b"512"))
                       + file(b"a", b"1\n0\n512\n".ljust(512, b"\0") + INNER[:512]),
    "a map in the data that is none": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
                                          (b"GNU.sparse.realsize", b"512")) + file(b"a", INNER),
    "a map in the data that does not end": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
                                               (b"GNU.sparse.realsize", b"512")) + file(b"a", b"2\n0\n512\n"),
    "a map in the data of too many": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
                                         (b"GNU.sparse.realsize", b"512")) + file(b"a", b"99999\n"),
}


@pytest.mark.parametrize("case", SPARSE)
def test_p05_no_byte_of_a_sparse_member_without_a_good_map_is_served(write, case):
    """What follows it is found."""
    assert served(write(SPARSE[case], AFTER)) == {b"/after": b"AFTER"}


def test_an_incremental_archive_of_gnu_tar(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "page").write_bytes(b"page")
    subprocess.run(["tar", "-C", tmp_path, "--format=gnu", "-g", tmp_path / "snapshot", "-cf", tmp_path / "inc.tar",
                    "site"], check=True)
    assert served(tmp_path / "inc.tar") == {b"/site/page": b"page"}
    archive = open_archive(str(tmp_path / "inc.tar"))
    assert archive.notes == []
    archive.close()


# --- what it costs -------------------------------------------------------------------------------------------------

COSTLY = {
    "many files": lambda: many(20_000, lambda number: file(b"%d/%d" % divmod(number, 999))),
    "many names of a file": lambda: [file(b"a"), *many(10_000, lambda number: link(b"h%d" % number, b"a", b"1"))],
    "many files of a name": lambda: [file(b"a")] * 10_000,
    "links with long names": lambda: links_with_long_names(300),
    "links that multiply": lambda: multiplied(30, 30),
    "links to and fro": lambda: many(2500, lambda number: link(b"%d/%d" % divmod(number, 50), b"../%d" % (number % 50)))
                                + many(50, lambda number: file(b"%d/x" % number)),
    "a chain of links": lambda: many(5000, lambda number: link(b"%d" % number, b"%d" % (number + 1))),
    "a circle of links": lambda: many(5000, lambda number: link(b"%d" % number, b"%d" % ((number + 1) % 5000))),
    "links into a chain": lambda: links_into_a_chain(3000, b"c0", b"2"),
    "hard links into a chain": lambda: links_into_a_chain(3000, b"c0/x", b"1"),
    "a global header for many": lambda: [pax(*many(20_000, lambda number: (b"k%d" % number, b"")), kind=b"g"),
                                         *many(20_000, lambda number: file(b"%d" % number))],
    "many pax records": lambda: [pax(*many(200_000, lambda number: (b"k%d" % number, b""))), file(b"a")],
    "a pax header of digits": lambda: [pax(b"1" * 2_000_000), file(b"a")],
    "a pax path of digits": lambda: [pax((b"path", b"1" * 2_000_000)), file(b"a")],
    "pax paths of a megabyte": lambda: [pax((b"path", b"n" * 1_000_000)) + file(b"a")] * 20,
    "long names of a megabyte": lambda: [long_name(b"n/" * 500_000) + file(b"a")] * 5,
    "long names of slashes": lambda: many(5, lambda number: long_name(b"/" * 1_000_000 + b"%d" % number) + file(b"a")),
    "links of a megabyte": lambda: many(20, lambda number: pax((b"linkpath", b"../" * 333_333))
                                        + header(b"%d" % number, kind=b"2")),
    "pax headers without end": lambda: [pax((b"comment", b"x" * 1000))] * 20_000,
    "global headers without end": lambda: [pax((b"comment", b"x" * 1000), kind=b"g")] * 20_000,
    "long names without end": lambda: [long_name(b"n" * 1000)] * 20_000,
    "a sparse map without end": lambda: [header(kind=b"S", prefix=bytes(137) + b"\1"), *[b"\1" * 512] * 20_000],
    "a sparse map of many": lambda: [pax((b"GNU.sparse.map", b"1," * 500_000)), file(b"a")],
    "a sparse map of many records": lambda: [pax(*[(b"GNU.sparse.offset", b"1")] * 200_000,
                                                 (b"GNU.sparse.major", b"1")), file(b"a")],
    "many large holes": lambda: many(2000, lambda number: sparse_0_1(b"%d" % number, [(1 << 30, 0)], 1 << 30, b"")),
}


@pytest.mark.parametrize("case", COSTLY)
def test_p06_no_archive_costs_more_than_it_should(write, case):
    """It is opened or refused, within seconds of CPU (else its process is killed) and memory in proportion."""
    path = write(*COSTLY[case]())
    price = cost(path, seconds=20)
    assert bool(price.refusal) != bool(price.paths or price.notes)
    assert price.memory <= (48 << 20) + 4 * path.stat().st_size
    assert max(map(len, [price.refusal, *price.notes])) < 1000


# --- from outside --------------------------------------------------------------------------------------------------

SECRET = b"nobody may see this"

OWN = {                                     # names that look as if they led elsewhere: they are names
    b"index.html": b"home",
    b"%2e%2e/secret": b"literal",
    b"..\\secret": b"backslash",
    b"...": b"dots",
    b"out/passwd": b"beside a link of that name",
    b"etc/passwd": b"mine",
    b"\r\nX-Evil: 1": b"line ends",
    b"\x1b]0;title\x07": b"escape",
    b"\xc0\xae\xc0\xae": b"overlong",
    b"n/" * 1000 + b"n": b"deep",
}
LEADING_OUT = [
    file(b"../secret", b"up"), file(b"a/../../secret", b"up"), file(b"..", b"up"), pax((b"path", b"nul\0")) +
    file(b"x"), link(b"up", b"../secret"), link(b"dir", b".."), link(b"out", b"/etc"), link(b"proc", b"/proc/self"),
    link(b"hard", b"../secret", b"1"), link(b"hard2", b"/etc/hostname", b"1"), link(b"a/b", b"../../secret"),
    link(b"loop", b"loop"), link(b"root", b"/"), header(b"null", kind=b"3", devmajor=b"1", devminor=b"3"),
    header(b"fifo", kind=b"6"), header(b"disk", kind=b"4"),
]
TARGETS = [
    b"/../secret", b"/%2e%2e/secret", b"/..%2fsecret", b"/%2e%2e%2fsecret", b"/a/../../secret", b"/a/b/../../../secret",
    b"//secret", b"/./../secret", b"/dir/secret", b"/up", b"/up/", b"/hard", b"/hard2", b"/a/b", b"/secret",
    b"/root/etc", b"/out/hostname", b"/out/../secret", b"/proc/environ", b"/root/proc/self/environ",
    b"/proc/self/environ", b"/loop", b"/null", b"/fifo", b"/disk", b"/nul", b"/nul%00", b"/index.html%00", b"/%00",
    b"/\\..\\secret", b"/%c0%ae%c0%ae/secret", b"/%u002e%u002e/secret", b"/..;/secret", b"/index.html/../../secret",
    b"/index.html/", b"http://t/../secret", b"file:///etc/passwd", b"/%", b"/%2", b"/%zz", b"secret", b"../secret",
    b"*",
]


def ask(server, target, *fields):
    """(status, body) of a request in raw bytes, on a connection of its own."""
    with server.connect() as client:
        client.send(b"\r\n".join([b"GET %b HTTP/1.1" % target, b"Host: t", b"Connection: close", *fields, b"", b""]))
        raw = client.rest()
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"X-Evil" not in head
    return int(head[9:12]), body


@pytest.fixture
def nasty(write, start, tmp_path):
    (tmp_path / "secret").write_bytes(SECRET)
    outside = [link(b"absolute", os.fsencode(tmp_path / "secret")), link(b"folder", os.fsencode(tmp_path))]
    own = [long_name(name) + file(b"long", data) for name, data in OWN.items()]
    return start(write(*LEADING_OUT, *outside, *own), "--dotfiles", "--access-log", str(tmp_path / "log"))


def test_p05_no_path_and_no_link_leads_out_of_the_archive(nasty, tmp_path):
    """All with one server: whatever a request says, it gets bytes of the archive, or 400, or 404."""
    for name, data in OWN.items():
        assert ask(nasty, b"/" + quote_from_bytes(name).encode()) == (200, data)
    for target in [*TARGETS, b"/absolute", b"/folder/secret", b"/folder/../secret"]:
        status, body = ask(nasty, target)
        assert (status, SECRET in body, b"root:" in body) == (404 if status == 404 else 400, False, False), target
    nasty.stop()
    notes = nasty.stderr()
    assert "1 name with NUL" in notes
    assert "3 names with '..'" in notes
    assert "2 devices" in notes
    assert not re.search("[\x00-\x09\x0b-\x1f]", notes + (tmp_path / "log").read_text())


RANGES = [b"0-9999", b"-9999", b"3-4", b"4-", b"5-", b"99999-", b"0-18446744073709551616", b"-18446744073709551616",
          b"0-0,-1", b"0-1,3-9999", b"4-2", b"-0", b"9223372036854775807-9223372036854775808", b"0-,0-,0-"]


def test_p05_no_range_leads_out_of_a_member(write, start):
    server = start(write(file(b"before", SECRET), file(b"a", b"abcde"), file(b"after", SECRET)))
    for asked in RANGES:
        status, body = ask(server, b"/a", b"Range: bytes=" + asked)
        assert status in (200, 206, 416)
        assert not re.search(rb"\0|nobody|ustar", body)
        assert status == 416 or b"multipart" in body or set(body) <= set(b"abcde") or body.startswith(b"\r\n--")


GIB = 1 << 30
HUGE = {
    b"octal": lambda size: header(b"octal", octal(size)),
    b"binary": lambda size: header(b"binary", base256(size)),
    b"pax": lambda size: pax((b"size", b"%d" % size)) + header(b"pax"),
}


def write_huge(path, sizes):
    """Files of these sizes that are holes but for their last bytes, the names of the next, and then a small one."""
    with path.open("wb") as tar:
        for name, size in sizes.items():
            tar.write(HUGE[name](size))
            tar.seek(size - 7, os.SEEK_CUR)
            tar.write(b"the end" + bytes(-size % 512))
        tar.write(file(b"after", b"AFTER") + END)
    return path


def test_p05_members_of_more_than_4_gib(tmp_path, start):
    """Sizes in octal, in base 256 and in a pax header; GNU tar lists the same."""
    sizes = {b"octal": 5 * GIB + 1, b"binary": 65 * GIB + 2, b"pax": 66 * GIB + 3}
    path = write_huge(tmp_path / "huge.tar", sizes)
    listed = subprocess.run(["tar", "-tvf", path], capture_output=True, check=True).stdout.splitlines()
    assert {line.split()[-1]: int(line.split()[2]) for line in listed} == {**sizes, b"after": 5}
    server = start(path, "--etags", "off")
    assert server.fetch("/after").body == b"AFTER"
    for name, size in sizes.items():
        response = server.fetch(f"/{name.decode()}", Range="bytes=-9")
        assert (response.body, response["Content-Range"]) == (b"\0\0the end", f"bytes {size - 9}-{size - 1}/{size}")
        response = server.fetch(f"/{name.decode()}", Range=f"bytes={size - 7}-{size + 9 * GIB}")
        assert response.body == b"the end"
        assert int(server.fetch(f"/{name.decode()}", "HEAD")["Content-Length"]) == size


NO_SITE = {
    "an empty file": lambda path: path.touch(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a compressed tar": lambda path: path.write_bytes(gzip.compress(AFTER + END)),
    "half a header": lambda path: path.write_bytes(AFTER[:300]),
    "half a file": lambda path: path.write_bytes(file(b"a", bytes(9999))[:5000]),
    "a size of exbibytes": lambda path: path.write_bytes(header(b"a", base256(1 << 62)) + END),
    "a size of more": lambda path: path.write_bytes(header(b"a", base256((1 << 86) + 1)) + END),
    "contents as headers": lambda path: path.write_bytes(sized(b"x") + END),
}


@pytest.mark.parametrize("case", NO_SITE)
def test_p06_what_cannot_be_served_is_refused_with_one_sentence(tmp_path, case):
    NO_SITE[case](tmp_path / "site.tar")
    done = run_tarweb("--listen", "127.0.0.1:0", tmp_path / "site.tar")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "site.tar " in done.stderr


def test_p06_an_archive_that_cannot_be_served_takes_no_place(tmp_path, start):
    """One after the other is refused at a reload, in a sentence; what was served before still is."""
    site, new = tmp_path / "site.tar", tmp_path / "new.tar"
    site.write_bytes(file(b"a", b"first") + END)
    server = start(site)
    for number, case in enumerate(("pax size is no number", "a negative size", "a pax header and no member"), 1):
        new.write_bytes(REFUSED[case] + END)
        os.replace(new, site)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda number=number: len(re.findall(r"site\.tar is .*; ", server.stderr())) == number)
        assert server.fetch("/a").body == b"first"
