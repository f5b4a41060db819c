"""The index: what each path in a tar stands for, and every way a tar can be wrong."""

import base64
import contextlib
import gc
import gzip
import hashlib
import io
import mmap
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hostile_archives import END, file, link, sparse_1_0
from support import zstd

import archive as module
import tar as reading
import tar
from archive import (
    WHOLE_CHECK, Archive, ArchiveError, Layers, Library, Redirect, Representation, Resource, in_memory, open_archive,
)
from http1 import format_date

PACKED = gzip.compress(b"docs")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
MTIME = 1_600_000_000


def member(name, data=b"", kind=tarfile.REGTYPE, target="", **fields):
    """A TarInfo with its content; names may be bytes."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.type, info.linkname, info.size, info.mtime = kind, os.fsdecode(target), len(data), MTIME
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def symlink(name, target):
    return member(name, kind=tarfile.SYMTYPE, target=target)


def hardlink(name, target):
    return member(name, kind=tarfile.LNKTYPE, target=target)


def directory(name):
    return member(name, kind=tarfile.DIRTYPE)


def write_tar(path, members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def build(tmp_path):
    """build(member, ..., prefix=, etags=) -> Archive; ("name", b"data") pairs are members too. Closed afterwards."""
    opened = []

    def open_members(*members, form=tarfile.GNU_FORMAT, **options):
        made = [member(*item) if isinstance(item[0], (str, bytes)) else item for item in members]
        opened.append(open_archive(write_tar(tmp_path / f"{len(opened)}.tar", made, form), **options))
        return opened[-1]

    yield open_members
    for archive in opened:
        archive.close()


def content(archive, path):
    """The plain bytes at `path`, or None where there is no file."""
    found = archive.find(path)
    return archive.read(found.plain) if isinstance(found, Resource) else None


# --- Names

NAMES = [
    ("a.txt", b"/a.txt"),
    ("./a.txt", b"/a.txt"),
    ("/a.txt", b"/a.txt"),
    ("./././dir//a.txt", b"/dir/a.txt"),
    ("dir/./a.txt", b"/dir/a.txt"),
    (b"caf\xc3\xa9.txt", b"/caf\xc3\xa9.txt"),
    (b"\xff\xfe\x80.txt", b"/\xff\xfe\x80.txt"),
    ("with space\n.txt", b"/with space\n.txt"),
    ("...", b"/..."),
    ("a..b/..c", b"/a..b/..c"),
    ("d" * 90 + "/" + "f" * 90, b"/" + b"d" * 90 + b"/" + b"f" * 90),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "path"), NAMES)
def test_a_name_in_every_format(build, form, name, path):
    archive = build((name, b"data"), form=FORMATS[form], dotfiles=True)
    assert content(archive, path) == b"data"
    assert archive.notes == []


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_long_names(build, form):
    name = "/".join(["component"] * 100)
    assert content(build((name, b"data"), form=FORMATS[form]), b"/" + name.encode()) == b"data"


@pytest.mark.parametrize("name", ["..", "../a", "a/../b", "a/..", "/../a"])
def test_a_name_with_dot_dot_is_not_served(build, name):
    archive = build((name, b"no"), ("yes", b"yes"))
    assert (archive.files, archive.notes) == (1, [f"not served: 1 name with '..': {name.lstrip('/')!r}"])


@pytest.mark.parametrize(("fields", "name", "note"), [
    ({"pax_headers": {"path": "a\0b"}}, "ab", r"1 name with NUL: 'a\x00b'"),
    ({}, "n" * 4097, "1 name that is too long: '" + "n" * 199 + "..."),
    ({}, ".", "1 empty name: ''"),
])
def test_names_no_request_can_have(build, fields, name, note):
    archive = build(member(name, b"no", **fields), ("yes", b"yes"), form=tarfile.PAX_FORMAT)
    assert (archive.files, archive.notes) == (1, [f"not served: {note}"])


PREFIXES = [
    ("site/", "site/a", b"/a"),
    ("site", "site/a", b"/a"),
    ("./site/", "site/a", b"/a"),
    ("/site//", "./site/a", b"/a"),
    ("site/", "other/a", b"/other/a"),
    ("site/", "site", b"/site"),
    ("site/deep/", "site/deep/a", b"/a"),
    ("si", "site/a", b"/te/a"),
    ("a", "a", b"/a"),
    (".", ".hidden", b"/.hidden"),
    ("", "site/a", b"/site/a"),
]


@pytest.mark.parametrize(("prefix", "name", "path"), PREFIXES)
def test_prefix(build, prefix, name, path):
    archive = build((name, b"data"), prefix=prefix, dotfiles=True)
    assert content(archive, path) == b"data"
    assert ("--prefix" in str(archive.notes)) == (prefix == "site/" and name in ("other/a", "site"))


@pytest.mark.parametrize("name", [
    ".git/config", ".env", ".htpasswd", "._index.html", ".DS_Store", "a/.svn/entries", "a/b/.c", "...", "..a",
    ".well-known/.htaccess", ".well-knownx", ".well-known\n", "x/.well-known.txt",
])
def test_names_that_begin_with_a_dot_are_not_served(build, name):
    archive = build((name, b"secret"), ("b", b"b"), symlink("l", name))
    assert archive.find(b"/" + name.encode()) is None
    assert content(archive, b"/l") == b"secret"         # the packer has given it another name
    assert len(archive.notes) == 1
    assert archive.notes[0].startswith("not served, for a name that begins with a dot: 1 file: ")
    shown = build((name, b"secret"), ("b", b"b"), dotfiles=True)
    assert content(shown, b"/" + name.encode()) == b"secret"
    assert shown.notes == []


@pytest.mark.parametrize("name", [".well-known/security.txt", "a/.well-known/b", ".well-known/a.b/c.", "a.b/c", "a./b"])
def test_names_with_other_dots_are_served(build, name):
    archive = build((name, b"x"), ("b", b"b"))
    assert (content(archive, b"/" + name.encode()), archive.notes) == (b"x", [])


def test_what_is_hidden_is_named_by_its_first_name_with_a_dot(build):
    hidden = [(name, b"") for name in (".git/config", ".git/objects/a", "a/.env", "._a", ".b", ".c")]
    archive = build(*hidden, ("a/a", b"a"), ("b", b"b"), ("b/index.html", b""), symlink("l", "a"))
    [note] = archive.notes
    assert note == ("not served, for a name that begins with a dot: 7 files: '.git/', 'a/.env', '._a', '.b' "
                    "and 2 more; see --dotfiles")
    assert archive.files == 3


def test_a_prefix_may_begin_with_a_dot(build):
    archive = build((".output/public/index.html", b"home"), (".output/.env", b""), prefix=".output/public/")
    assert content(archive, b"/") == b"home"
    assert archive.files == 1


BELOW = [
    (["my-site/index.html", "my-site/style.css"], "my-site/"),
    (["./my-site/index.html"], "my-site/"),
    (["package/a.js", "package/lib/b.js"], "package/"),
    (["var/www/html/index.html", "var/www/html/a/b"], "var/www/html/"),
    (["my-site/a", "my-sites/a"], None),
    (["my-site/index.html", "a"], None),
    (["my-site/a.html"], None),
    ([".well-known/a", ".well-known/b"], None),
]


@pytest.mark.parametrize(("names", "directory"), BELOW)
def test_where_all_is_below_one_directory_a_note_says_what_to_write(build, names, directory):
    archive = build(*[(name, b"x") for name in names])
    note = f"all files are below {directory!r}; to have that left out of URLs: --prefix {directory!r}"
    assert archive.notes == ([note] if directory else [])
    if directory:
        archive = build(*[(name, b"x") for name in names], prefix=directory)
        assert archive.notes == []
        assert min(archive._index).count(b"/") == 1


def test_a_prefix_that_no_name_has_is_noted(build):
    archive = build(("my-site/index.html", b"home"), prefix="my-sit/")
    assert archive.notes == ["no name begins with 'my-sit/', so --prefix takes nothing off"]
    assert content(archive, b"/my-site/") == b"home"


def test_the_last_wins_where_the_prefix_makes_two_names_one(build):
    archive = build(("site/a", b"1"), ("a", b"2"), ("site/a", b"3"), prefix="site/")
    assert content(archive, b"/a") == b"3"


def test_prefix_makes_the_site_s_root(build):
    archive = build(("site/index.html", b"home"), ("site/a", b"a"), symlink("site/b", "../shared/c"),
                    ("shared/c", b"c"), prefix="site/")
    assert content(archive, b"/") == b"home"
    assert archive.find(b"/site/a") is None
    assert content(archive, b"/b") == b"c"


# --- Files

def test_representation_fields(build):
    archive = build(("a.html", b"<p>"))
    plain = archive.find(b"/a.html").plain
    assert plain == Representation(512, 3, MTIME, "", b"text/html; charset=utf-8", plain.etag)
    assert re.fullmatch(rb'"[A-Za-z0-9_-]{16}"', plain.etag)
    assert archive.size == os.stat(archive.path).st_size
    assert os.pread(archive.fd, plain.length, plain.offset) == b"<p>"


def test_the_file_descriptor_is_an_ordinary_one(build):
    """O_NONBLOCK, which opening needs, would make io_uring fail with EAGAIN instead of waiting for the disk."""
    archive = build(("a", b"a"))
    assert os.get_blocking(archive.fd)
    assert not os.get_inheritable(archive.fd)


def test_members_are_not_kept(build):
    archive = build(*[(f"f{number}", b"") for number in range(50)])
    alive = []
    for _ in reading.members(archive.path, archive.fd, archive.size):
        alive.append(sum(isinstance(item, tarfile.TarInfo) for item in gc.get_objects()))
    assert len(alive) == 50
    assert alive[-1] <= alive[5]


@pytest.mark.parametrize(("mtime", "expected"), [
    (0, 0), (-5, 0), (1, 0), (1.9, 0), (2, 2), (2.9, 2), (MTIME, MTIME), ("nan", 0), ("-inf", 0), ("garbage", 0),
    (1 << 32, 1 << 32), ("inf", tar.LAST_DATE), ("1e300", tar.LAST_DATE), (tar.LAST_DATE + 1, tar.LAST_DATE),
])
def test_mtime_is_whole_seconds_since_the_epoch_or_0_for_none(build, mtime, expected):
    """In the future, too: clocks of boards are set later than archives are read."""
    archive = build(member("a", b"a", pax_headers={"mtime": str(mtime)}), form=tarfile.PAX_FORMAT)
    assert archive.find(b"/a").plain.mtime == expected
    assert len(format_date(expected)) == 29


def test_the_last_of_a_name_wins(build):
    archive = build(("./a", b"first"), ("b", b"b"), ("a", b"second"))
    assert content(archive, b"/a") == b"second"
    assert (archive.files, archive.bytes) == (2, 7)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_what_is_no_file_hides_an_earlier_file(build, kind):
    assert build(("a", b"a"), member("a", kind=kind)).find(b"/a") is None
    assert content(build(member("a", kind=kind), ("a", b"a")), b"/a") == b"a"


def test_what_is_not_served_is_counted(build):
    archive = build(directory("dir"), member("fifo", kind=tarfile.FIFOTYPE), member("null", kind=tarfile.CHRTYPE),
                    member("disk", kind=tarfile.BLKTYPE), member("odd", kind=b"Q"), ("a", b"a"))
    assert archive.notes == ["not served: 1 FIFO: 'fifo'", "not served: 2 devices: 'null', 'disk'",
                             "not served: 1 unknown member: 'odd'"]
    assert (archive.files, archive.bytes) == (1, 1)


def test_only_the_first_names_of_what_is_not_served_are_told(build):
    archive = build(*[member(f"d/{number}", kind=tarfile.FIFOTYPE) for number in range(9)], ("a", b"a"))
    assert archive.notes == ["not served: 9 FIFOs: 'd/0', 'd/1', 'd/2', 'd/3' and 5 more"]


def test_directories_alone_are_not_worth_a_note(build):
    assert build(directory("./"), directory("dir"), ("dir/a", b"a")).notes == []


def test_an_archive_without_files_says_so(build):
    archive = build(directory("dir"))
    assert (archive.files, archive.bytes, archive.find(b"/")) == (0, 0, None)
    assert len(archive.notes) == 1
    assert "no file" in archive.notes[0]


# --- Directories

def test_directory_index(build):
    archive = build(("index.html", b"home"), ("docs/index.html", b"docs"), ("docs/index.html.gz", PACKED))
    assert content(archive, b"/") == b"home"
    assert archive.find(b"/docs/") == archive.find(b"/docs/index.html")
    assert [variant.coding for variant in archive.find(b"/docs/").variants] == ["gzip"]
    assert archive.find(b"/docs") == Redirect(b"/docs/")
    assert archive.find(b"") is None


def test_a_directory_without_index_is_nothing(build):
    archive = build(directory("empty"), ("dir/a", b"a"))
    assert [archive.find(path) for path in (b"/", b"/dir", b"/dir/", b"/empty", b"/empty/")] == [None] * 5


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_named_like_a_directory_wins_over_the_redirect(build, order):
    archive = build(*[("a", b"file"), ("a/index.html", b"index")][::order])
    assert (content(archive, b"/a"), content(archive, b"/a/")) == (b"file", b"index")


@pytest.mark.parametrize(("name", "location"), [
    ("a b", b"/a%20b/"),
    ("100%", b"/100%25/"),
    ("a?b#c", b"/a%3Fb%23c/"),
    ("a\r\nb", b"/a%0D%0Ab/"),
    (b"\xc3\xa9\xff", b"/%C3%A9%FF/"),
    ("//evil.example", b"/evil.example/"),
    ("\\evil.example", b"/%5Cevil.example/"),
    ("http://host", b"/http:/host/"),
    ("!$&'()*+,;=:@-._~", b"/!$&'()*+,;=:@-._~/"),
    ("a/b c", b"/a/b%20c/"),
])
def test_redirect_locations(build, name, location):
    archive = build((os.fsencode(name) + b"/index.html", b"index"))
    redirects = [found for found in archive._index.values() if isinstance(found, Redirect)]
    assert redirects == [Redirect(location)]


# --- Variants

PLAIN = b"p" * 999
SIBLINGS = {"br": brotli.compress(PLAIN), "zst": zstd(999, b"z" * 20), "gz": gzip.compress(PLAIN, mtime=0)}


def test_variants_are_the_siblings_smallest_first(build):
    archive = build(("a.css", PLAIN), *[(f"a.css.{suffix}", data) for suffix, data in SIBLINGS.items()])
    found = archive.find(b"/a.css")
    assert sorted(map(len, SIBLINGS.values())) == list(map(len, SIBLINGS.values()))
    assert [(v.coding, archive.read(v)) for v in found.variants] == [
        ("br", SIBLINGS["br"]), ("zstd", SIBLINGS["zst"]), ("gzip", SIBLINGS["gz"])]
    assert {v.media_type for v in found.variants} == {b"text/css; charset=utf-8"}
    assert len({found.plain.etag, *(v.etag for v in found.variants)}) == 4
    assert archive.notes == []


def test_a_variant_is_also_a_file_of_its_own(build):
    archive = build(("a.html", PLAIN), member("a.html.gz", SIBLINGS["gz"], mtime=77))
    own, variant = archive.find(b"/a.html.gz").plain, archive.find(b"/a.html").variants[0]
    assert (own.media_type, own.coding) == (b"application/gzip", "")
    assert variant == own._replace(media_type=b"text/html; charset=utf-8", coding="gzip")
    assert variant.mtime == 77


@pytest.mark.parametrize(("siblings", "expected"), [
    ({"a.zst": zstd(999, b"12"), "a.zstd": zstd(999, b"1")}, [("zstd", 10)]),
    ({"a.zst": zstd(999, b"1"), "a.zstd": zstd(999, b"12")}, [("zstd", 10)]),
    ({"a.zst": b"", "a.zstd": zstd(999, b"12")}, [("zstd", 11)]),
    ({"a.zst": zstd(9, b"1"), "a.zstd": zstd(999, b"12")}, [("zstd", 11)]),
    ({"a.gz": b""}, []),
    ({"b.gz": SIBLINGS["gz"], "a.GZ": SIBLINGS["gz"], "a.gz/b": SIBLINGS["gz"]}, []),
])
def test_which_siblings_count(build, siblings, expected):
    archive = build(("a", PLAIN), *siblings.items())
    assert [(v.coding, v.length) for v in archive.find(b"/a").variants] == expected


BAD_SIBLINGS = {
    "no gzip": ("gz", b"version https://git-lfs.github.com/spec/v1", 0, "is no gzip file"),
    "gzip of something else": ("gz", gzip.compress(PLAIN[1:]), 0,
                               "holds other bytes (its CRC-32 or length differs): compress it again"),
    "no zstd": ("zst", b"version https://git-lfs.github.com/spec/v1", 0,
                "is no zstd file, or one that takes a dictionary"),
    "zstd of something else": ("zst", zstd(998, b"z"), 0, "holds other bytes (its length differs): compress it again"),
    "zstd that takes much memory": ("zst", b"\x28\xb5\x2f\xfd\0\x89\1\0\0", 0,
                                    "takes a window of 144 MiB, and browsers allow for 8 (RFC 9659)"),
    "older zstd of unknown length": ("zst", b"\x28\xb5\x2f\xfd\0\x48\1\0\0", -3, "is older"),
    "in Breton": ("br", b"Demat (Breton)", 0, "is no brotli file, or holds other bytes"),
    "older brotli": ("br", brotli.compress(PLAIN), -3, "is older"),
    "empty": ("br", b"", 0, "is empty"),
}


@pytest.mark.parametrize("case", BAD_SIBLINGS)
def test_a_sibling_that_does_not_hold_the_file_s_bytes_is_passed_over_with_a_note(build, case):
    suffix, data, seconds, why = BAD_SIBLINGS[case]
    archive = build(("d/a.js", PLAIN), member(f"d/a.js.{suffix}", data, mtime=MTIME + seconds), ("b", b"b"))
    assert archive.find(b"/d/a.js").variants == ()
    assert content(archive, f"/d/a.js.{suffix}".encode()) == data
    assert archive.notes == [f"'d/a.js.{suffix}' is not sent for 'd/a.js': it {why}"]


@pytest.mark.parametrize(("suffix", "seconds"), [("br", -2), ("zst", -9), ("gz", -9)])
def test_a_sibling_may_be_older_where_it_says_what_it_holds(build, suffix, seconds):
    archive = build(("a", PLAIN), member(f"a.{suffix}", SIBLINGS[suffix], mtime=MTIME + seconds))
    assert len(archive.find(b"/a").variants) == 1
    assert archive.notes == []


def test_without_reading_a_sibling_s_date_counts(build):
    archive = build(("a", PLAIN), ("a.zst", b"?"), ("a.br", b""), member("a.gz", SIBLINGS["gz"], mtime=MTIME - 3),
                    etags=False)
    assert [v.coding for v in archive.find(b"/a").variants] == ["zstd"]
    assert archive.notes[:-1] == ["'a.br' is not sent for 'a': it is empty", "'a.gz' is not sent for 'a': it is older"]
    assert "--etags=off" in archive.notes[-1]
    assert build(("a", PLAIN), etags=False).notes == []


def test_only_the_first_bad_siblings_are_reported_one_by_one(build):
    archive = build(*[item for number in range(12) for item in ((f"{number}", PLAIN), (f"{number}.gz", b"no"))])
    assert len(archive.notes) == 11
    assert archive.notes[-1] == "2 more files are not sent for those they are beside"


def test_the_crc_of_large_files_is_compared_too(build):
    large = bytes(range(256)) * (reading.CHUNK // 256) * 2 + b"end"
    archive = build(("a", large), ("a.gz", gzip.compress(large)), ("b", large[:-1] + b"D"), hardlink("b.gz", "a.gz"),
                    ("c.gz", gzip.compress(large, 0)), ("c", large))
    assert [bool(archive.find(path).variants) for path in (b"/a", b"/b", b"/c")] == [True, False, True]


def test_a_compressed_file_alone_has_no_plain_one(build):
    assert build(("a.css.gz", b"z")).find(b"/a.css") is None


# --- Links

LINKS = [
    ("symlink beside", [("a", b"x"), symlink("l", "a")], b"/l"),
    ("symlink in a directory", [("d/a", b"x"), symlink("d/l", "a")], b"/d/l"),
    ("symlink upwards", [("a", b"x"), symlink("d/e/l", "../../a")], b"/d/e/l"),
    ("symlink before its target", [symlink("l", "a"), ("a", b"x")], b"/l"),
    ("symlink written oddly", [("d/a", b"x"), symlink("l", ".//d/./../d//a")], b"/l"),
    ("symlink to a symlink", [("a", b"x"), symlink("l", "m"), symlink("m", "a")], b"/l"),
    ("symlink to a hard link", [("a", b"x"), hardlink("h", "a"), symlink("l", "h")], b"/l"),
    ("symlink through a linked directory", [("v2/a", b"x"), symlink("cur", "v2"), symlink("l", "cur/a")], b"/l"),
    ("symlink up from a linked directory", [("v/2/a", b"x"), ("v/b", b""), symlink("cur", "v/2"),
                                            symlink("l", "cur/../2/a")], b"/l"),
    ("hard link", [("d/a", b"x"), hardlink("l", "d/a")], b"/l"),
    ("hard link written oddly", [("./d/a", b"x"), hardlink("l", "/d//./a")], b"/l"),
    ("hard link to a hard link", [("a", b"x"), hardlink("m", "a"), hardlink("l", "m")], b"/l"),
    ("hard link to itself", [("a", b"x"), hardlink("a", "a")], b"/a"),
    ("hard link to a symlink", [("d/a", b"x"), symlink("d/s", "a"), ("a", b"y"), hardlink("d/l", "d/s")], b"/d/l"),
    ("hard link to a symlink, elsewhere", [("a", b"x"), ("d/a", b"y"), symlink("d/s", "a"),
                                           hardlink("l", "d/s")], b"/l"),
    ("hard link from the root through a linked directory", [("v2/a", b"x"), symlink("cur", "v2"),
                                                            hardlink("l", "/cur/a")], b"/l"),
    ("hard link through a linked directory", [("v2/a", b"x"), symlink("cur", "v2"), hardlink("l", "cur/a")], b"/l"),
    ("hard link keeps what its target was", [("a", b"x"), hardlink("l", "a"), ("a", b"new")], b"/l"),
    ("hard link to the newest", [("a", b"old"), ("a", b"x"), hardlink("l", "a")], b"/l"),
    ("symlink follows its target", [("a", b"old"), symlink("l", "a"), ("a", b"x")], b"/l"),
    ("directory link", [("v2/d/a", b"x"), symlink("cur", "v2")], b"/cur/d/a"),
    ("directory link to a directory link", [("v2/a", b"x"), symlink("cur", "new"), symlink("new", "v2")], b"/cur/a"),
    ("directory link within a linked one", [("v2/a", b"x"), symlink("d/cur", "../v2"), symlink("e", "d")], b"/e/cur/a"),
    ("file link within a linked directory", [("a", b"x"), symlink("v2/l", "../a"), symlink("cur", "v2")], b"/cur/l"),
    ("a name of its own wins over a link's", [("cur/a", b"x"), ("v2/a", b"y"), symlink("cur", "v2")], b"/cur/a"),
    ("a good link replaces a bad one", [("a", b"x"), symlink("l", "none"), symlink("l", "a")], b"/l"),
    ("a good hard link replaces a bad one", [("a", b"x"), hardlink("l", "none"), hardlink("l", "a")], b"/l"),
]


@pytest.mark.parametrize(("members", "path"), [case[1:] for case in LINKS], ids=[case[0] for case in LINKS])
def test_links_inside_the_archive(build, members, path):
    archive = build(*members)
    assert content(archive, path) == b"x"
    assert archive.notes == []


def test_a_linked_directory_is_like_the_directory(build):
    archive = build(("v2/index.html", b"docs"), ("v2/index.html.gz", PACKED), ("v2/b.css", b"b"), symlink("cur", "v2"))
    for path in (b"/%s/", b"/%s/index.html", b"/%s/b.css"):
        assert archive.find(path % b"cur") == archive.find(path % b"v2")
    assert archive.find(b"/cur") == Redirect(b"/cur/")
    assert archive.files == 3


BAD_LINKS = [
    ("dangling symlink", [symlink("l", "none")], "'none', which is not there"),
    ("dangling below a file", [("a", b""), symlink("l", "a/b")], "'a/b', which is not there"),
    ("dangling hard link", [hardlink("l", "none")], "'none', which is not there"),
    ("hard link before its target", [hardlink("l", "a"), ("a", b"")], "'a', which is not there"),
    ("absolute symlink", [symlink("l", "/etc/passwd")], "out of the archive"),
    ("absolute symlink to a member", [("a", b""), symlink("l", "/a")], "out of the archive"),
    ("symlink above the root", [("a", b""), symlink("l", "../a")], "out of the archive"),
    ("symlink far above the root", [("d/a", b""), symlink("d/l", "../../../../d/a")], "out of the archive"),
    ("above the root and through a link", [symlink("d/e", ".."), symlink("l", "d/e/../x")], "out of the archive"),
    ("hard link above the root", [hardlink("l", "../a")], "out of the archive"),
    ("link to itself", [symlink("l", "l")], "in a circle"),
    ("empty target", [symlink("l", "")], "is empty"),
    ("link to a FIFO", [member("f", kind=tarfile.FIFOTYPE), symlink("l", "f")], "leads to a FIFO"),
    ("hard link to a directory", [directory("d"), hardlink("l", "d")], "leads to a directory"),
    ("control characters", [symlink("l", "\x1b[2J")], r"'\x1b[2J'"),
]


@pytest.mark.parametrize(("members", "why"), [case[1:] for case in BAD_LINKS], ids=[case[0] for case in BAD_LINKS])
def test_bad_links_are_not_served_and_reported(build, members, why):
    archive = build(*members, ("yes", b"yes"))
    assert [archive.find(path) for path in (b"/l", b"/d/l", b"/l/", b"/l/a", b"/d/l/a")] == [None] * 5
    assert any(re.match("not served: the link '(d/)?l' ", note) and why in note for note in archive.notes)
    assert content(archive, b"/yes") == b"yes"


ONCE = [
    ("link to the root", [symlink("l", "."), ("a", b"x"), ("d/b", b"y")], "l", [b"/l/a", b"/l/d/b"]),
    ("link to the root from below", [symlink("d/l", ".."), ("a", b"x"), ("d/b", b"y")], "d/l",
     [b"/d/l/a", b"/d/l/d/b"]),
    ("link to its directory", [symlink("d/l", "."), ("d/a", b"x"), ("d/e/b", b"y"), ("z", b"")], "d/l",
     [b"/d/l/a", b"/d/l/e/b"]),
]


@pytest.mark.parametrize(("members", "link", "paths"), [case[1:] for case in ONCE], ids=[case[0] for case in ONCE])
def test_a_link_to_a_directory_that_it_is_in_is_followed_once(build, members, link, paths):
    archive = build(*members)
    assert [content(archive, path) for path in paths] == [b"x", b"y"]
    assert not [path for path in archive._index if path.count(b"/l/") > 1]
    assert archive.notes == [
        f"the link {link!r} is followed only once, for it leads to a directory that it is in itself"]


def test_a_link_to_the_root_has_an_index_and_variants(build):
    archive = build(("index.html", b"docs"), ("index.html.gz", PACKED), symlink("ubuntu", "."))
    assert archive.find(b"/ubuntu/") == archive.find(b"/")
    assert archive.find(b"/ubuntu") == Redirect(b"/ubuntu/")


BELOW_LINKS = [
    ("a new file", [("v2/a", b"a"), symlink("cur", "v2"), ("cur/b", b"x")], b"/v2/b", b"/cur/b"),
    ("another version", [("v2/a", b"old"), symlink("cur", "v2"), ("cur/a", b"x")], b"/v2/a", b"/cur/a"),
    ("through two links", [("v2/a", b""), symlink("cur", "v2"), symlink("new", "cur"), ("new/b", b"x")],
     b"/v2/b", b"/new/b"),
    ("deep below", [("v2/a", b""), symlink("d/cur", "e"), ("d/cur/f/g/b", b"x")], b"/d/e/f/g/b", b"/d/cur/f/g/b"),
    ("a hard link", [("a", b"x"), ("v2/a", b""), symlink("cur", "v2"), hardlink("cur/b", "a")], b"/v2/b", b"/cur/b"),
    ("a link below a link", [("v2/a", b"x"), symlink("cur", "v2"), symlink("cur/l", "a")], b"/v2/l", b"/cur/l"),
    ("below the root", [symlink("cur", "."), ("cur/b", b"x")], b"/b", b"/cur/b"),
    ("by a link that is no more", [("v2/a", b""), symlink("cur", "v2"), ("cur/b", b"x"), symlink("cur", "v3"),
                                   ("v3/b", b"y")], b"/v2/b", b"/v2/b"),
    ("where a directory is again", [symlink("cur", "v2"), ("v2/a", b""), ("cur/b", b"y"), directory("cur"),
                                    ("cur/b", b"x")], b"/cur/b", b"/cur/b"),
]


@pytest.mark.parametrize(("members", "path", "other"), [case[1:] for case in BELOW_LINKS],
                         ids=[case[0] for case in BELOW_LINKS])
def test_members_below_a_link_land_where_gnu_tar_puts_them(build, members, path, other):
    archive = build(*members)
    assert (content(archive, path), content(archive, other)) == (b"x", b"x")
    assert not [note for note in archive.notes if "not served" in note]


@pytest.mark.parametrize("target", ["../v2", "/v2", "cur", "v2/a", "e/../v2"])
def test_members_below_a_link_that_gnu_tar_does_not_follow_keep_their_names(build, target):
    archive = build(("v2/a", b"a"), ("d/v2/a", b"a"), ("a", b"a"), symlink("d/cur", target), ("d/cur/b", b"b"))
    assert archive.find(b"/v2/b") is archive.find(b"/d/v2/b") is None
    assert content(archive, b"/d/cur/b") == b"b"
    assert "served by their own names only, for what is above them is a link: 'd/cur/b'" in archive.notes


@pytest.mark.parametrize(("length", "served"), [(40, True), (41, False)])
def test_as_many_links_in_a_row_as_the_kernel_follows(build, length, served):
    chain = [symlink(f"l{step}", f"l{step + 1}") for step in range(length)]
    archive = build(*chain, (f"l{length}", b"x"))
    assert content(archive, b"/l0") == (b"x" if served else None)
    assert content(archive, b"/l1") == b"x"


def test_only_the_first_bad_links_are_reported_one_by_one(build):
    archive = build(*[symlink(f"l{number}", "none") for number in range(25)], ("a", b"a"))
    assert len(archive.notes) == 11
    assert archive.notes[-1] == "not served: 15 more bad links"


def test_a_link_gives_no_name_that_is_too_long(build):
    long = "/".join(["n" * 99] * 25)
    archive = build((f"{long}/a", b"x"), ("d/a", b"x"), symlink("d/l", "../" + "n" * 99), symlink(f"{long}/l", "d"))
    assert content(archive, f"/d/l/{long[100:]}/a".encode()) == b"x"
    archive = build((f"v/{long}/a", b"x"), symlink(f"{long}/l", "../" * 25 + "v"), symlink("s", "v"))
    assert content(archive, f"/s/{long}/a".encode()) == b"x"
    assert max(map(len, archive._index)) < 4096


def test_directories_that_link_to_each_other(build):
    archive = build(("a/file", b"a"), ("b/file", b"b"), symlink("a/x", "../b"), symlink("b/y", "../a"))
    assert content(archive, b"/a/x/file") == b"b"
    assert content(archive, b"/a/x/y/file") == b"a"
    assert archive.find(b"/a/x/y/x/file") is None
    assert any("in a circle" in note for note in archive.notes)


def test_links_that_multiply_are_bounded(build):
    """Ten links in each of twelve directories, each to the next directory: 10^12 names."""
    links = [symlink(f"d{depth}/{number}", f"../d{depth + 1}") for depth in range(12) for number in range(10)]
    archive = build(*links, ("d12/file", b"x"), etags=False)
    assert content(archive, b"/d11/0/file") == b"x"
    assert len(archive._index) <= tar.ALIASES_MAX + 1
    assert any("too many" in note for note in archive.notes)


def test_directories_that_all_link_to_each_other_are_bounded(build):
    names = range(20)
    links = [symlink(f"d{one}/l{two}", f"../d{two}") for one in names for two in names if one != two]
    archive = build(*links, *[(f"d{one}/file", b"x") for one in names], etags=False)
    assert content(archive, b"/d0/l1/file") == b"x"
    assert len(archive._index) <= tar.ALIASES_MAX + len(names)


# --- What GNU tar writes

def gnu_tar(tmp_path, *options):
    subprocess.run(["tar", "-C", tmp_path / "site", *options, "-cf", tmp_path / "site.tar", "."], check=True)
    return open_archive(str(tmp_path / "site.tar"))


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_gnu_tar_formats(tmp_path, form):
    below = tmp_path / "site" / "dir"
    below.mkdir(parents=True)
    (below / "page.html").write_bytes(b"<p>")
    (below / "page.html").chmod(0o600)
    os.link(below / "page.html", below / "hard.html")
    (tmp_path / "site" / "soft").symlink_to("dir")
    archive = gnu_tar(tmp_path, f"--format={form}")
    assert {content(archive, b"/dir/page.html"), content(archive, b"/dir/hard.html"),
            content(archive, b"/soft/page.html")} == {b"<p>"}
    assert (archive.files, archive.notes) == (1, [])
    archive.close()


SPARSE_FILES = {
    "a hole between": [(0, b"A" * 5000), ((2 << 20) - 5, b"END!!")],
    "a hole behind": [(0, b"A" * 5000), (3 << 20, b"")],
    "a hole in front": [(1 << 20, b"x" * 777)],
    "nothing else": [(1 << 20, b"")],
    "many": [(part << 20, b"data") for part in range(30)],      # enough for an extension header
}
SPARSE_TARS = [
    ("tar", "--sparse", "--format=gnu"), ("tar", "--sparse", "--format=oldgnu"),
    *[("tar", "--sparse", "--format=posix", f"--sparse-version={version}") for version in ("0.0", "0.1", "1.0")],
    ("tar", "--sparse", "--hole-detection=raw"), ("bsdtar",),
]


@pytest.mark.parametrize("command", SPARSE_TARS, ids=" ".join)
def test_sparse_files_are_served_as_they_were(tmp_path, command):
    """And what follows them is found. bsdtar looks for holes unasked."""
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    (tmp_path / "site").mkdir()
    for name, parts in SPARSE_FILES.items():
        with open(tmp_path / "site" / name, "wb") as file:
            for offset, data in parts:
                file.truncate(offset)
                file.seek(offset)
                file.write(data)
        (tmp_path / "site" / f"{name}.after").write_bytes(b"after")
    subprocess.run([*command, "-C", tmp_path / "site", "-cf", tmp_path / "site.tar", "."], check=True)
    assert (tmp_path / "site.tar").stat().st_size < 1 << 20
    with open_to_close(tmp_path / "site.tar") as archive:
        assert archive.notes == []
        for name in SPARSE_FILES:
            whole = (tmp_path / "site" / name).read_bytes()
            found = archive.find(f"/{name}".encode()).plain
            assert archive.read(found) == whole
            assert (found.length, found.etag) == (len(whole), etag_of(whole))
            assert content(archive, f"/{name}.after".encode()) == b"after"


def open_to_close(path):
    return contextlib.closing(open_archive(str(path)))


def etag_of(data):
    """The entity tag of the same bytes in a plain member."""
    return b'"%b"' % base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:12])


def test_sparse_files_have_siblings_links_and_dates_as_others(tmp_path):
    plain = bytes(512) + b"x" * 512
    blocks = sparse_1_0(b"a.txt", [(512, 512)], 1024, plain[512:]) + file(b"a.txt.gz", gzip.compress(plain))
    blocks += sparse_1_0(b"b.gz", [(512, 512)], 1024, b"y" * 512) + file(b"b", b"b") + link(b"l", b"a.txt")
    blocks += link(b"h", b"a.txt", b"1")
    (tmp_path / "site.tar").write_bytes(blocks + END)
    with open_to_close(tmp_path / "site.tar") as archive:
        found = archive.find(b"/a.txt")
        assert [variant.coding for variant in found.variants] == ["gzip"]
        assert (found.plain.mtime, found.plain.media_type) == (MTIME, b"text/plain")
        for path in (b"/a.txt", b"/l", b"/h"):
            assert content(archive, path) == plain
        assert archive.find(b"/b").variants == ()
        assert (archive.files, archive.bytes) == (4, 1024 + found.variants[0].length + 1024 + 1)


@pytest.mark.parametrize(("start", "end", "expected"), [
    (0, 100, [(900, 10), ("hole", 30), (910, 60)]), (0, 10, [(900, 10)]), (5, 15, [(905, 5), ("hole", 5)]),
    (10, 40, [("hole", 30)]), (11, 12, [("hole + 1", 1)]), (39, 41, [("hole + 29", 1), (910, 1)]),
    (99, 100, [(969, 1)]),
])
def test_spans_of_a_sparse_file(start, end, expected):
    places = {"hole": 10_000, "hole + 1": 10_001, "hole + 29": 10_029}
    rep = Representation(-1, 100, 0, "", b"", b"", ((10, 900), (40, 9990), (100, 870)))
    assert rep.spans(start, end) == tuple((places.get(place, place), length) for place, length in expected)
    assert rep.spans() == ((900, 10), (10_000, 30), (910, 60))
    assert Representation(900, 100, 0, "", b"", b"").spans(start, end) == ((900 + start, end - start),)


def test_no_room_for_zeros_is_an_error_of_the_archive(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(12, "no room")
    (tmp_path / "site.tar").write_bytes(sparse_1_0(b"a", [(512, 0)], 512, b"") + END)
    monkeypatch.setattr(module, "zeros", refuse)
    with pytest.raises(ArchiveError, match="sparse files have some: no room"):
        open_archive(str(tmp_path / "site.tar"))


def test_gnu_long_names_and_raw_bytes(tmp_path):
    name = b"\xff" + b"n" * 150 + b"/" + b"m" * 200
    path = os.fsencode(tmp_path / "site") + b"/" + name
    os.makedirs(os.path.dirname(path))
    Path(os.fsdecode(path)).write_bytes(b"long")
    archive = gnu_tar(tmp_path, "--format=gnu")
    assert content(archive, b"/" + name) == b"long"
    archive.close()


# --- Entity tags and charsets

@pytest.mark.parametrize(("name", "data", "media_type"), [
    ("a.html", b"<p>", b"text/html; charset=utf-8"),
    ("a.html", b"", b"text/html; charset=utf-8"),
    ("a.html", "grüße".encode(), b"text/html; charset=utf-8"),
    ("a.html", "grüße".encode("latin-1"), b"text/html"),
    ("a.html", "grüße".encode("utf-16"), b"text/html"),
    ("a.html", "grü".encode()[:-1], b"text/html"),
    ("a.html", b"\xed\xa0\x80", b"text/html"),
    ("a.svg", "ü".encode("latin-1"), b"image/svg+xml"),
    ("a.json", "ü".encode("latin-1"), b"application/json"),
    ("a.png", b"\x89PNG", b"image/png"),
    ("a.html", b"<meta charset=windows-1251>", b"text/html"),
    ("a.html", b"<meta charset=utf-8>", b"text/html; charset=utf-8"),
    ("a.css", b'@charset "latin1";', b"text/css"),
    ("a.svg", b"<?xml version='1.0' encoding='latin1'?>", b"image/svg+xml"),
    ("a.svg", "<?xml version='1.0' encoding='utf-16'?>".encode("utf-16-le"), b"image/svg+xml"),
    ("a.txt", "\u65e5\u672c".encode("iso-2022-jp"), b"text/plain"),
])
def test_charset_only_where_the_content_is_utf8(build, name, data, media_type):
    assert build((name, data)).find(b"/" + name.encode()).plain.media_type == media_type
    assumed = build((name, data), etags=False).find(b"/" + name.encode()).plain.media_type
    assert (b"charset" in assumed) == (name not in ("a.json", "a.png"))


@pytest.mark.parametrize(("data", "utf8"), [
    (b"a" * (reading.CHUNK - 1) + "ü".encode() + b"a" * 9, True),
    (b"a" * (reading.CHUNK - 1) + "ü".encode()[:1] + b"a" * module.CHUNK, False),
    (b"a" * (reading.CHUNK * 2 - 1) + "ü".encode()[:1], False),
    (b"\xff" + b"a" * reading.CHUNK, False),
])
def test_charset_across_chunks(build, data, utf8):
    assert (b"charset" in build(("a.txt", data)).find(b"/a.txt").plain.media_type) == utf8


def test_the_plain_file_s_charset_counts_for_its_variants(build):
    archive = build(("a.txt", b"\xff"), ("a.txt.gz", gzip.compress(b"\xff")), ("b.txt", b"ascii"),
                    ("b.txt.gz", gzip.compress(b"ascii")))
    assert archive.find(b"/a.txt").variants[0].media_type == b"text/plain"
    assert archive.find(b"/b.txt").variants[0].media_type == b"text/plain; charset=utf-8"


@pytest.mark.parametrize("order", [1, -1])
def test_charset_of_a_file_with_a_text_name_and_another(build, order):
    first, second = ["a.bin", "a.txt"][::order]
    archive = build((first, "ü".encode()), hardlink(second, first))
    assert archive.find(b"/a.txt").plain.media_type == b"text/plain; charset=utf-8"
    assert archive.find(b"/a.bin").plain.media_type == b"application/octet-stream"


def test_equal_bytes_have_equal_etags_and_others_have_not(build):
    archive = build(("a", b"same"), ("b", b"same"), ("c", b"other"), hardlink("h", "a"))
    a, b, c, h = (archive.find(path).plain.etag for path in (b"/a", b"/b", b"/c", b"/h"))
    assert a == b == h != c


def test_without_etags_nothing_is_read(build, monkeypatch):
    monkeypatch.setattr(module, "contents", None)
    assert build(("a", b"a"), etags=False).find(b"/a").plain.etag == b""


def test_etags_of_many_files_do_not_depend_on_how_they_are_grouped(build, monkeypatch):
    files = [(f"f{number}", bytes([number % 251]) * (number * 7)) for number in range(600)]
    together = build(*files)
    monkeypatch.setattr(module, "CHUNK", 512)
    monkeypatch.setattr(module, "BATCH_FILES", 1)
    apart = build(*files)
    assert [together.find(b"/" + name.encode()) for name, _ in files] == [
        apart.find(b"/" + name.encode()) for name, _ in files]
    assert len({apart.find(b"/" + name.encode()).plain.etag for name, _ in files}) == 600


def test_no_thread_is_left(build):
    before = threading.active_count()
    build(*[(f"f{number}", b"x" * 100_000) for number in range(50)])
    assert threading.active_count() == before


# --- What is no tar, or not all of one

def refusal(path):
    """The ArchiveError's sentence; the file descriptor must not stay open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ArchiveError) as caught:
        open_archive(str(path))
    assert os.listdir("/proc/self/fd") == before
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("suffix", "start", "command"), [
    ("gz", gzip.compress(b"tar" * 999, mtime=0), "gunzip -k"),
    ("bz2", b"BZh91AY&SY" + b"x" * 999, "bunzip2 -k"),
    ("xz", b"\xfd7zXZ\0" + b"x" * 999, "unxz -k"),
    ("zst", b"\x28\xb5\x2f\xfd" + b"x" * 999, "unzstd"),
])
def test_compressed(tmp_path, suffix, start, command):
    path = tmp_path / f"my site.tar.{suffix}"
    path.write_bytes(start)
    assert f"{command} '{path}'" in refusal(path)


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz", "zstd"])
@pytest.mark.parametrize("name", ["site.tar", "my site.tar", "it's a site", "s.tgz", "s.tbz2", "s.txz", "s.tzst"])
def test_the_advice_for_a_compressed_tar_works_whatever_its_name(tmp_path, tool, name):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    path = tmp_path / name
    tar = Path(write_tar(tmp_path / "plain", [member("a", b"a")])).read_bytes()
    path.write_bytes(subprocess.run([tool, "-c"], input=tar, capture_output=True, check=True).stdout)
    command = re.search("run '(.*)'$", refusal(path))[1]
    before = set(tmp_path.iterdir())
    for run in (shlex.split(command), ["sh", "-c", command]):
        subprocess.run(run, cwd=tmp_path, stdin=subprocess.DEVNULL, check=True)
        [made] = set(tmp_path.iterdir()) - before
        assert made.read_bytes() == tar
        made.unlink()


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as file:
        file.writestr("index.html", "<p>")
    assert "is a zip file" in refusal(tmp_path / "site.zip")


@pytest.mark.parametrize("data", [b"x", b"<!doctype html>" * 99, b"\0" * 100, bytes(range(256)) * 99])
def test_no_tar(tmp_path, data):
    (tmp_path / "page").write_bytes(data)
    assert "is not a tar file" in refusal(tmp_path / "page")


def test_a_tar_whose_first_name_looks_like_compression(build):
    assert content(build(("BZh91AY", b"x")), b"/BZh91AY") == b"x"


def test_empty_file(tmp_path):
    (tmp_path / "empty.tar").touch()
    assert "is empty" in refusal(tmp_path / "empty.tar")


def test_directory_fifo_device_and_nothing(tmp_path):
    assert f"'tar -C {tmp_path} -cf site.tar .'" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(tmp_path / "fifo")
    assert "not a regular file" in refusal("/dev/null")
    assert "No such file" in refusal(tmp_path / "missing.tar")


def test_unreadable(tmp_path, monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "open", deny)       # root may read everything, so modes would not do
    assert "let this user read it" in refusal(tmp_path / "secret.tar")


@pytest.fixture
def three(tmp_path):
    """A tar with 3 members: headers at 0, 1024 and 2048, then the end-of-archive blocks."""
    return Path(write_tar(tmp_path / "three.tar", [member(name, b"data") for name in "abc"]))


@pytest.mark.parametrize("size", [3072, 3072 + 512, 3072 + 1024])
def test_the_end_of_archive_blocks_may_be_missing(three, size):
    os.truncate(three, size)
    archive = open_archive(str(three))
    assert (archive.files, archive.notes) == (3, [])
    archive.close()


@pytest.mark.parametrize("size", [513, 515, 1000, 1025, 1535, 1537, 2047, 2049, 2560, 2563, 3071, 3073, 3072 + 511])
def test_cut_short(three, size):
    os.truncate(three, size)
    assert "cut short" in refusal(three)


def test_cut_short_names_the_member(three):
    os.truncate(three, 2562)
    assert "'c' should end at byte 2564 and the file ends at 2562" in refusal(three)


def test_cut_short_at_every_byte_is_refused_unless_it_ends_between_members(tmp_path, three):
    whole, path = three.read_bytes(), tmp_path / "cut.tar"
    for size in range(1, 3600, 7):
        path.write_bytes(whole[:size])
        if size % 1024 and size < 3584:
            refusal(path)


@pytest.mark.parametrize("offset", [1024, 2048])
@pytest.mark.parametrize("damage", [b"X", b"\xff" * 512])
def test_a_damaged_header_is_not_the_end(three, offset, damage):
    with three.open("r+b") as file:
        file.seek(offset)
        file.write(damage)
    assert f"no valid tar header at byte {offset}" in refusal(three)


def header(size=b"%011o\0" % 0, kind=b"0", name=b"evil", sparse=False):
    """A header block with the right checksum, whatever else is wrong (POSIX pax, "ustar Interchange Format")."""
    block = bytearray(512)
    block[0:len(name)], block[124:136], block[156:157] = name, size, kind
    block[100:124], block[136:148], block[148:156] = b"0000000\0" * 3, b"%011o\0" % 0, b" " * 8
    block[257:265] = b"ustar\x0000"
    block[482] = sparse                         # GNU: an extension header follows
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative(number):
    return b"\xff" * 4 + (2**64 - number).to_bytes(8, "big")


def pax(record, size=None):
    return header(b"%011o\0" % (len(record) if size is None else size), b"x") + record.ljust(512, b"\0")


HOSTILE = {
    "leads back to itself": header(negative(512)),
    "leads back before the file": header(negative(1 << 40)),
    "longer than the file": header(b"%011o\0" % (1 << 30)),
    "longer than any file": header(b"\x80" + b"\xff" * 11),
    "pax size is negative": pax(b"20 size=-2000000000\n") + header(),
    "pax size is huge": pax(b"22 size=9999999999999\n") + header(),
    "pax record without length": pax(b"0 path=x\n") + header(),
    "pax header longer than the file": pax(b"9 path=a\n", 1 << 32) + header(),
    "pax header longer than memory": header(b"\x80" + b"\x7f" * 11, b"x") + header(),
    "pax header and nothing": pax(b"9 path=a\n"),
    "pax headers without end": pax(b"9 path=a\n") * 2000 + header(),
    "GNU long name without end": header(b"%011o\0" % (1 << 32), b"L"),
    "GNU sparse leads back to itself": header(negative(512), b"S"),
    "GNU sparse map without end": header(kind=b"S", sparse=True),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
    path = tmp_path / "hostile.tar"
    path.write_bytes(header(name=b"good") + HOSTILE[case])
    refusal(path)


def test_the_header_maker_makes_good_ones_too(tmp_path):
    (tmp_path / "good.tar").write_bytes(header() + pax(b"9 path=a\n") + header() + bytes(1024))
    archive = open_archive(str(tmp_path / "good.tar"))
    assert (content(archive, b"/evil"), content(archive, b"/a")) == (b"", b"")
    archive.close()


def test_a_tar_that_shrinks_while_it_is_read(three, monkeypatch):
    def shrink_first(*arguments, jobs=module._jobs):
        os.truncate(three, 600)
        return jobs(*arguments)
    monkeypatch.setattr(module, "_jobs", shrink_first)
    assert "cut short while it was read" in refusal(three)


def test_a_tar_that_shrinks_later(build):
    archive = build(("a", b"a" * 5000))
    os.truncate(archive.path, 600)
    with pytest.raises(ArchiveError, match="cut short"):
        archive.read(archive.find(b"/a").plain)


def test_a_read_error_is_reported_as_one(three, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(reading.os, "pread", fail)
    assert "cannot be read at byte 3072: Input/output error" in refusal(three)


# --- Anything

COMPONENT = st.binary(min_size=1, max_size=12).filter(
    lambda part: b"\0" not in part and b"/" not in part and part not in (b".", b".."))
NAME = st.lists(COMPONENT, min_size=1, max_size=4).map(b"/".join)
TREE = st.dictionaries(NAME, st.binary(max_size=1500), max_size=12)


@settings(max_examples=150, deadline=None)
@given(TREE, st.sampled_from(list(FORMATS.values())), st.booleans())
def test_every_file_is_found_and_read_back_byte_for_byte(tree, form, etags):
    with tempfile.TemporaryDirectory() as where:
        path = write_tar(Path(where) / "site.tar", [member(name, data) for name, data in tree.items()], form)
        archive = open_archive(path, etags=etags, dotfiles=True)
        for name, data in tree.items():
            assert content(archive, b"/" + name) == data
        assert (archive.files, archive.bytes) == (len(tree), sum(map(len, tree.values())))
        archive.close()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_tar_with_changed_bytes_is_indexed_or_refused(changes):
    """And nothing else: no other exception, no circle; what is indexed can be read."""
    with tempfile.TemporaryDirectory() as where:
        path = write_tar(Path(where) / "site.tar", [
            member("a", b"data"), symlink("l", "a"), member("b" * 200, b"data", pax_headers={"comment": "x"}),
        ], tarfile.PAX_FORMAT)
        data = bytearray(Path(path).read_bytes())
        for place, value in changes:
            data[place] = value
        Path(path).write_bytes(data)
        try:
            archive = open_archive(path)
        except ArchiveError as error:
            assert str(error).startswith(path)
            return
        for found in archive._index.values():
            assert len(archive.read(found.plain)) == found.plain.length
        archive.close()


# --- where archives are in memory

def at_addresses(*places):
    """A Library of archives at (address, size)."""
    return Library([Archive(f"{address}.tar", -1, size, address) for address, size in places])


def test_each_address_has_its_archive():
    library = at_addresses((5000, 100), (1000, 50), (1050, 10))
    for address, path in ((999, None), (1000, "1000.tar"), (1049, "1000.tar"), (1050, "1050.tar"), (1060, None),
                          (4999, None), (5000, "5000.tar"), (5099, "5000.tar"), (5100, None)):
        archive = library.at(address)
        assert (archive and archive.path) == path
    assert Library([]).at(0) is None


def test_a_copy_needs_no_file():
    library = at_addresses((1000, 50), (2000, 50))
    library.at(1000).copied = True
    assert library.file_at(1000) is None
    assert library.file_at(2000).path == "2000.tar"
    assert library.file_at(3000) is None


def test_spans_that_may_have_to_be_read(monkeypatch):
    """Whole pages of those in an archive that is not all in memory, but for what is there."""
    archives = [Archive(f"{address}.tar", 7, 100_000, address) for address in (1 << 20, 1 << 21)]
    archives[0].lazy = True
    library = Library(archives)
    monkeypatch.setattr(module, "in_memory", lambda fd, offset, length: (fd, offset) == (7, 50))
    cold, there = ((1 << 20) + 5000, 300), ((1 << 20) + 50, 10)
    page = mmap.PAGESIZE
    start = cold[0] // page * page
    assert library.cold([(99, 10), ((1 << 21) + 5, 10), there, cold]) == [(start, cold[0] + cold[1] - start)]
    assert library.lazy
    assert library.is_lazy((b"text", there))
    assert not library.is_lazy((b"text", (5, 5), (1 << 21, 10)))
    assert not at_addresses((1000, 50)).lazy


def test_whether_a_part_of_a_file_is_in_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))                # so it is, just now
    with path.open("rb") as file:
        assert in_memory(file.fileno(), 10, 5000)
        assert in_memory(file.fileno(), 99_990, 10)
        assert not in_memory(file.fileno(), 99_990, 11)
        assert not in_memory(file.fileno(), 0, WHOLE_CHECK + 1)
    assert not in_memory(-1, 0, 1)


def test_layers_answer_for_what_the_newest_one_lacks(tmp_path):
    stores = {"new": ("a",), "old": ("a", "b", "c/index.html")}
    layers = Layers([open_archive(write_tar(tmp_path / name, [member(path, name.encode()) for path in paths]))
                     for name, paths in stores.items()])
    new, old = layers.archives
    assert new.read(layers.find(b"/a").plain) == b"new"
    assert old.read(layers.find(b"/b").plain) == b"old"
    assert layers.find(b"/c") == Redirect(b"/c/")
    assert layers.find(b"/x") is None
    for archive in layers.archives:
        archive.close()


def test_what_the_index_says_counts_from_the_address(tmp_path):
    path = write_tar(tmp_path / "site.tar", [member("a", b"abc"), member("a.gz", gzip.compress(b"abc"))])
    plain, moved = open_archive(path), open_archive(path, place=lambda archive: setattr(archive, "address", 1 << 30))
    for before, after in zip(plain.find(b"/a"), moved.find(b"/a"), strict=True):
        for one, other in zip([before] if isinstance(before, Representation) else before,
                              [after] if isinstance(after, Representation) else after, strict=True):
            assert other == one._replace(offset=one.offset + (1 << 30))
    assert moved.read(moved.find(b"/a").plain) == b"abc"
    assert moved.digest == plain.digest
    plain.close()
    moved.close()
