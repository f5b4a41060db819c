"""The packer, from outside: what is in the archives that it makes, that they are the same each time, and whole."""

import contextlib
import fcntl
import gzip
import io
import itertools
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urljoin

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MTIME, PYTHON, ROOT, noise, prose, run_tarweb, wait_until

import codings
import folder
import media
import pack
import packed
from archive import open_archive

FILES = {
    "404.html": prose(700), "index.html": b"<!doctype html>" + prose(3000), "logo.png": prose(5000),
    "a/app.js": prose(20_000), "a/app.js-old": prose(100), "a/b/style.css": prose(9000), "empty.css": b"",
    "noise.css": noise(4000), "d\u00e9j\u00e0 vu.html": prose(1500), "line\nend.txt": prose(300),
    "large.csv": prose(3 << 20),
}
GZIPPED = {"404.html", "index.html", "a/app.js", "a/b/style.css", "d\u00e9j\u00e0 vu.html", "line\nend.txt",
           "large.csv"}
MIB = 1 << 20
needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="there is no zstd command here")


def fill(site, files, mtime=MTIME):
    """Write `files` (name -> bytes), whose order is that of their creation; gives the directory."""
    for name, content in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (mtime, mtime))
    site.mkdir(exist_ok=True)
    return site


@pytest.fixture
def site(tmp_path):
    return fill(tmp_path / "my-site", FILES)


def packing(*arguments, program=(ROOT / "pack.py",), **options):
    return subprocess.run([PYTHON, *program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=100, check=False, **options)


def packs(*arguments, **options):
    """Pack, which has to succeed; what it says."""
    ended = packing(*arguments, **options)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


def refuses(status, *arguments, **options):
    """Pack, which has to fail with one sentence; gives that."""
    ended = packing(*arguments, **options)
    assert (ended.returncode, ended.stdout) == (status, ""), ended
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def members(path):
    """[(member, contents)] in the order of the archive; a link's contents are what it leads to."""
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        return [(one, tar.extractfile(one).read() if one.isreg() or one.islnk() else b"") for one in tar]


def contents(path):
    return {member.name: content for member, content in members(path)}


# --- what is in an archive -----------------------------------------------------------------------------------------


def test_members(site, tmp_path):
    packs(site, tmp_path / "site.tar", "--codings", "gzip")
    found = members(tmp_path / "site.tar")
    plain = [member for member, _ in found if member.mode == 0o644]
    made = [member for member, _ in found if member.mode == 0o444]
    assert {member.name: content for member, content in found if member in plain} == FILES
    assert [member.name for member in plain] == sorted(FILES, key=str.encode)
    assert {member.name for member in made} == {f"{name}.gz" for name in GZIPPED}
    assert len(plain) + len(made) == len(found)
    assert {(one.uid, one.gid, one.uname, one.gname, one.mtime) for one, _ in found} == {(0, 0, "", "", MTIME)}
    for before, (member, content) in zip(found, found[1:], strict=False):
        if member in made:
            assert member.name == before[0].name + ".gz", "a sibling is right behind its file"
            assert gzip.decompress(content) == before[1]
            assert len(content) <= 0.95 * len(before[1])


def test_all_codings(site, tmp_path):
    wanted = ["br", "gzip", *["zstd"] * bool(shutil.which("zstd"))]
    said = packs(site, tmp_path / "site.tar", "--codings", ",".join(wanted))
    found = contents(tmp_path / "site.tar")
    for name in GZIPPED:
        assert brotli.decompress(found[f"{name}.br"]) == FILES[name]
        assert gzip.decompress(found[f"{name}.gz"]) == FILES[name]
        if "zstd" in wanted:
            unpacked = subprocess.run(["zstd", "-dcq"], input=found[f"{name}.zst"], capture_output=True, check=True)
            assert unpacked.stdout == FILES[name]
    assert all(re.search(rf"^{coding}: {len(GZIPPED)} files, .* saved\)$", said, re.M) for coding in wanted)


def test_headers_of_gzip_tell_nothing(site, tmp_path):
    """RFC 1952 section 2.3: neither name nor date."""
    packs(site, tmp_path / "site.tar", "--codings", "gzip")
    for name in GZIPPED:
        assert contents(tmp_path / "site.tar")[f"{name}.gz"][:8] == b"\x1f\x8b\x08\0\0\0\0\0"


@pytest.mark.parametrize("coding", ["br", pytest.param("zstd", marks=needs_zstd)])
def test_windows_are_those_that_browsers_have(tmp_path, coding):
    """RFC 9659, RFC 7932; of a file larger than any window."""
    content = prose(20 * MIB)
    fill(tmp_path / "my-site", {"large.txt": content})
    packs(tmp_path / "my-site", tmp_path / "site.tar", "--codings", coding)
    made = contents(tmp_path / "site.tar")["large.txt" + {"br": ".br", "zstd": ".zst"}[coding]]
    assert media.wrong_coding(coding, made[:32], made[-8:], len(content), zlib.crc32(content)) == ""
    assert codings.brotli_window(1 << 40) == 24


def test_it_is_served(site, tmp_path, start):
    packs(site, tmp_path / "site.tar", "--codings", "gzip")
    server = start(tmp_path / "site.tar")
    assert "not served" not in server.stderr() and "is not sent" not in server.stderr()
    for name, content in FILES.items():
        target = "/" + quote(name)
        assert server.fetch(target).body == content
        response = server.fetch(target, accept_encoding="gzip")
        assert (response.get("Content-Encoding") == "gzip") == (name in GZIPPED)
        assert (gzip.decompress(response.body) if name in GZIPPED else response.body) == content


def test_the_other_ways_to_call_it(site, tmp_path):
    pyz = tmp_path / "tarweb.pyz"
    subprocess.run([PYTHON, ROOT / "deploy" / "pyz.py", pyz], check=True, timeout=60)
    packs(site, tmp_path / "site.tar", "--codings", "gzip")
    for name, program in ("tarweb.py", (ROOT / "tarweb.py", "--pack")), ("pyz", (pyz, "--pack")), \
            ("isolated", ("-I", ROOT / "pack.py")):
        packs(site, tmp_path / name, "--codings", "gzip", program=program)
        assert (tmp_path / name).read_bytes() == (tmp_path / "site.tar").read_bytes()


def test_pack_has_to_come_first(site, tmp_path):
    ended = run_tarweb("-v", "info", "--pack", site, tmp_path / "site.tar")
    assert ended.returncode == 2 and "--pack has to be the first argument" in ended.stderr
    assert not (tmp_path / "site.tar").exists()


# --- the same bytes ------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_bytes(tmp_path):
    """On two file systems, created in another order, whatever the umask, the zone, the locale, the seed of hashes."""
    with contextlib.ExitStack() as stack:
        places = [tmp_path]
        if os.access("/dev/shm", os.W_OK):
            places.append(Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))))
        made = set()
        for seed, place in enumerate([*places, tmp_path / "again"]):
            names = list(FILES)
            random.Random(seed).shuffle(names)
            (place / "site").mkdir(parents=True)
            (place / "site" / "link").symlink_to("a/app.js")
            fill(place / "site", {name: FILES[name] for name in names})
            os.utime(place / "site" / "link", (MTIME, MTIME), follow_symlinks=False)
            environment = os.environ | {"TZ": ("UTC", "Asia/Kathmandu")[seed % 2], "PYTHONHASHSEED": f"{seed}",
                                        "LC_ALL": ("C", "C.UTF-8")[seed % 2]}
            packs(place / "site", place / "site.tar", "--codings", "br,gzip", "--index", env=environment,
                  umask=(0o22, 0o77)[seed % 2])
            made.add((place / "site.tar").read_bytes())
    assert len(made) == 1


def test_dates_are_kept_but_for_later_ones(site, tmp_path):
    os.utime(site / "index.html", (1_000_000_000.75, 1_000_000_000.75))
    os.utime(site / "404.html", (-5, -5))
    packs(site, tmp_path / "site.tar", env=os.environ | {"SOURCE_DATE_EPOCH": "1234567890"})
    assert {member.mtime for member, _ in members(tmp_path / "site.tar")} == {0, 1_000_000_000, 1_234_567_890}
    sentence = refuses(2, site, tmp_path / "site.tar", env=os.environ | {"SOURCE_DATE_EPOCH": "today"})
    assert "SOURCE_DATE_EPOCH=today" in sentence


# --- siblings of the archive before --------------------------------------------------------------------------------


def taken_over(said):
    found = re.search(r"^(\d+) siblings of unchanged files are those of the archive before$", said, re.M)
    return int(found[1]) if found else 0


@pytest.fixture
def both(site, tmp_path):
    """both(*flags): pack over the archive that is there, and anew, to the same bytes; how many siblings were taken
    over."""
    def pack_both(*flags):
        said = packs(site, tmp_path / "site.tar", *flags)
        assert not taken_over(packs(site, tmp_path / "anew.tar", *flags))
        assert (tmp_path / "site.tar").read_bytes() == (tmp_path / "anew.tar").read_bytes()
        (tmp_path / "anew.tar").unlink()
        return taken_over(said)
    return pack_both


GZIP = "--codings", "gzip"


def test_siblings_of_unchanged_files_are_taken_over(site, both):
    assert both(*GZIP) == 0
    assert both(*GZIP) == len(GZIPPED)
    (site / "index.html").write_bytes(prose(2000))                          # changed
    (site / "a/app.js").rename(site / "moved.js")                           # by another name
    os.utime(site / "404.html", (MTIME + 5, MTIME + 5))                     # of another date
    (site / "a/b/style.css").unlink()
    fill(site, {"new.css": prose(800)}, MTIME + 9)
    assert both(*GZIP) == len(GZIPPED) - 2


def test_codings_come_and_go(site, both):
    assert both(*GZIP) == 0
    assert both("--codings", "br,gzip") == len(GZIPPED)
    assert both("--codings", "br") == len(GZIPPED)
    assert both("--codings", "none") == 0
    assert both(*GZIP) == 0


def test_what_another_tool_has_made_is_not_taken_over(tmp_path, both):
    both(*GZIP)
    archive = (tmp_path / "site.tar").read_bytes()
    version = b"gzip=zlib-" + zlib.ZLIB_RUNTIME_VERSION.encode()
    assert archive.count(version) == 1
    (tmp_path / "site.tar").write_bytes(archive.replace(version, version[:-1] + b"x"))
    assert both(*GZIP) == 0


@pytest.mark.parametrize("change", ["-r --mode=444 other.css.gz", "--delete 404.html.gz"])
def test_what_others_have_changed_is_not_taken_over(site, tmp_path, both, change):
    both(*GZIP)
    (tmp_path / "other.css.gz").write_bytes(b"no gzip")
    command, *arguments = change.split()
    subprocess.run(["tar", "-C", tmp_path, "-f", tmp_path / "site.tar", command, *arguments], check=True)
    assert both(*GZIP) == 0


def test_a_damaged_sibling_is_made_anew(tmp_path, both):
    both(*GZIP)
    archive = (tmp_path / "site.tar").read_bytes()
    crc = zlib.crc32(FILES["index.html"]).to_bytes(4, "little")
    assert archive.count(crc) == 1
    (tmp_path / "site.tar").write_bytes(archive.replace(crc, b"\0\0\0\0"))
    assert both(*GZIP) == len(GZIPPED) - 1


@pytest.mark.parametrize("content", [b"", b"x" * 5000, noise(20_000), bytes(20_000)],
                         ids=itertools.count())
def test_what_is_no_archive_is_replaced(tmp_path, both, content):
    (tmp_path / "site.tar").write_bytes(content)
    assert both(*GZIP) == 0


def test_headers_that_are_damaged_mislead_nobody(site, tmp_path):
    """Whichever byte: what is made is in order, and all that is in the directory."""
    (site / "large.csv").unlink()
    files = {name: content for name, content in FILES.items() if name != "large.csv"}
    packs(site, tmp_path / "good.tar", *GZIP)
    good = (tmp_path / "good.tar").read_bytes()
    chance = random.Random(1)
    for _ in range(100):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            bad[chance.choice([chance.randrange(2000), chance.randrange(len(bad))])] = chance.randrange(256)
        (tmp_path / "bad.tar").write_bytes(bad)
        before = packed.Before(str(tmp_path / "bad.tar"), codings.find_tools(["gzip"]))
        out = io.BytesIO()
        pack.Packer(folder.walk(str(site), folder.LeftOut()), out, codings.find_tools(["gzip"]), before).run()
        os.close(before.fd)
        (tmp_path / "made.tar").write_bytes(out.getvalue())
        assert {name: content for name, content in contents(tmp_path / "made.tar").items() if name in files} == files


# --- siblings in the directory -------------------------------------------------------------------------------------


def test_good_siblings_are_kept(site, tmp_path, both):
    own = {"index.html.gz": gzip.compress(FILES["index.html"], 1),
           "a/app.js.br": brotli.compress(FILES["a/app.js"], lgwin=18),
           "large.csv.gz": gzip.compress(FILES["large.csv"], 2), "logo.png.gz": b"a file of its own"}
    fill(site, own, MTIME - 100)
    both("--codings", "br,gzip")
    found = {member.name: (member.mtime, content) for member, content in members(tmp_path / "site.tar")}
    assert {name: found[name][1] for name in own} == own
    assert found["index.html.gz"][0] == MTIME, "as old as its file, or the server would not send it"
    for name in own:
        (site / name).unlink()
    both("--codings", "br,gzip")            # and not by what was kept


@pytest.mark.parametrize(("name", "content"), [
    ("index.html.gz", gzip.compress(FILES["index.html"] + b"!")), ("index.html.gz", b"no gzip"),
    ("index.html.gz", gzip.compress(FILES["index.html"])[:-3]), ("index.html.gz", b""),
    ("index.html.gz", bytes([*gzip.compress(FILES["index.html"], 1)[:30], 255, 255,
                             *gzip.compress(FILES["index.html"], 1)[32:]])),
    ("index.html.br", brotli.compress(bytes(len(FILES["index.html"])))), ("index.html.br", b"no brotli"),
    ("large.csv.gz", gzip.compress(FILES["large.csv"][1:], 1)),
    pytest.param("index.html.zst", b"no zstd", marks=needs_zstd),
], ids=itertools.count())
def test_bad_siblings_are_made_anew(site, tmp_path, name, content):
    flags = "--codings", "br,gzip" + ",zstd" * name.endswith("zst")
    packs(site, tmp_path / "expected.tar", *flags)
    fill(site, {name: content})
    said = packs(site, tmp_path / "site.tar", *flags)
    assert f"'{name}' does not hold '{name.rpartition('.')[0]}': it is made anew" in said
    assert (tmp_path / "site.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()


def test_bad_siblings_stay_files_where_none_is_made(site, tmp_path):
    fill(site, {"noise.css.gz": b"something else", "index.html.zstd": b"not of this coding"})
    said = packs(site, tmp_path / "site.tar", *GZIP)
    assert "'noise.css.gz' does not hold 'noise.css': it is packed as it is" in said
    assert contents(tmp_path / "site.tar")["noise.css.gz"] == b"something else"
    assert contents(tmp_path / "site.tar")["index.html.zstd"] == b"not of this coding"


def test_names_that_others_have_are_left_to_them(site, tmp_path, both):
    (site / "index.html.gz").mkdir()
    fill(site, {"index.html.gz/x.txt": b"x"})
    (site / "404.html.gz").symlink_to("index.html")
    both(*GZIP)
    assert {"index.html.gz/x.txt", "404.html.gz"} < contents(tmp_path / "site.tar").keys()
    (site / "404.html.gz").unlink()
    shutil.rmtree(site / "index.html.gz")
    assert both(*GZIP) == len(GZIPPED) - 2


# --- what is left out ----------------------------------------------------------------------------------------------


def test_dot_names_are_left_out(site, tmp_path):
    hidden = {".git/config": b"x", ".env": b"x", "a/.hidden": b"x", ".well-known/.secret": b"x"}
    fill(site, {**hidden, ".well-known/security.txt": b"Contact: ..."})
    said = packs(site, tmp_path / "site.tar", "--codings", "none")
    assert contents(tmp_path / "site.tar").keys() == FILES.keys() | {".well-known/security.txt"}
    assert "'.git'" in said and "--dotfiles" in said
    packs(site, tmp_path / "site.tar", "--codings", "none", "--dotfiles")
    assert contents(tmp_path / "site.tar").keys() == FILES.keys() | hidden | {".well-known/security.txt"}


def test_exclude(site, tmp_path):
    fill(site, {"drafts/x.html": b"", "a/drafts/y.html": b"", "a/x.map": b"", "x.map": b"", "b/drafts.txt": b"",
                "a/only/here.txt": b"", "only/here.txt": b""})
    said = packs(site, tmp_path / "site.tar", "--codings", "none", "--exclude", "drafts/", "--exclude", "*.map",
                 "--exclude", "a/only/*", "--exclude", "*[!\n-~]*", "--exclude", "nonesuch")
    left = {name for name in FILES if name.isascii()} | {"b/drafts.txt", "only/here.txt"}
    assert contents(tmp_path / "site.tar").keys() == left
    assert "--exclude nonesuch matches nothing" in said


def test_what_is_no_file_is_left_out(site, tmp_path):
    os.mkfifo(site / "fifo")
    said = packs(site, tmp_path / "site.tar", "--codings", "none")
    assert "'fifo'" in said
    assert contents(tmp_path / "site.tar") == FILES


def test_the_archive_itself_is_left_out(site):
    for _ in range(2):
        packs(site, site / "site.tar", *GZIP, "--dotfiles")
    assert "site.tar" not in contents(site / "site.tar")
    assert sorted(path.name for path in site.iterdir() if path.name.startswith((".", "site"))) == ["site.tar"]


# --- links ---------------------------------------------------------------------------------------------------------


def test_symbolic_links(site, tmp_path, start):
    links = {"to-file": "a/app.js", "to-directory": "a/b", "a/up": "../index.html", "twice": "to-file",
             "absolute": str(site / "a/app.js"), "a/b/round": f"../../../{site.name}/404.html"}
    bad = {"out": "/etc/passwd", "a/out": "../../elsewhere", "dangling": "nowhere", "loop": "loop", "hidden": ".env"}
    fill(tmp_path, {"elsewhere": b"secret"})
    fill(site, {".env": b"secret"})
    for name, target in (links | bad).items():
        (site / name).symlink_to(target)
    said = packs(site, tmp_path / "site.tar", *GZIP)
    found = {member.name: member.linkname for member, _ in members(tmp_path / "site.tar") if member.issym()}
    assert found == links | {"absolute": "a/app.js", "a/b/round": "../../404.html"}
    assert all(f"left out: the link '{name}' leads " in said for name in bad)
    server = start(tmp_path / "site.tar")
    assert "link" not in server.stderr()
    for name in links:
        target = f"/{name}" if name != "to-directory" else "/to-directory/style.css"
        assert server.fetch(target).body == (site / target[1:]).read_bytes()


def test_hard_links(site, tmp_path, start):
    os.link(site / "a/app.js", site / "zz.js")
    os.link(site / "a/app.js", site / "0.js")
    packs(site, tmp_path / "site.tar", *GZIP)
    found = {member.name: member for member, _ in members(tmp_path / "site.tar")}
    assert [found[name].linkname for name in ("0.js", "a/app.js", "zz.js")] == ["", "0.js", "0.js"]
    server = start(tmp_path / "site.tar")
    for name in ("0.js", "a/app.js", "zz.js"):
        assert server.fetch(f"/{name}").body == FILES["a/app.js"]
        assert gzip.decompress(server.fetch(f"/{name}", accept_encoding="gzip").body) == FILES["a/app.js"]


# --- names and sizes -----------------------------------------------------------------------------------------------

LONG = "n" * 120
NAMES = ["x" * 100, "x" * 101, "y" * 255, f"{'d' * 154}/{'f' * 100}", f"{'d' * 155}/{'f' * 100}",
         f"{'d' * 156}/{'f' * 100}", f"{'d' * 155}/{'f' * 101}", f"{LONG}/{LONG}/{LONG}/{LONG}", "\u00fc" * 99,
         "bad\udcff", "bad\udcff" + LONG, "'\"\\ *?[x]", "tab\there", "=", "a b=c"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names(tmp_path, name):
    fill(tmp_path / "my-site", {name: b"content", "other": b"x"})
    packs(tmp_path / "my-site", tmp_path / "site.tar")
    assert contents(tmp_path / "site.tar") == {name: b"content", "other": b"x"}
    listed = subprocess.run(["tar", "-tf", tmp_path / "site.tar", "--quoting-style=literal"], capture_output=True,
                            check=True).stdout
    assert os.fsencode(name) in listed.split(b"\n")


@given(st.dictionaries(st.binary(min_size=1, max_size=120).filter(
    lambda name: not set(name) & {0, 47} and not name.startswith(b".") and len(name) <= 120),
    st.binary(max_size=700), min_size=1, max_size=6), st.integers(0, 3))
def test_any_names(files, depth):
    """Read by tarfile, and by the server."""
    above = (b"d" * 90 + b"/") * depth
    with tempfile.TemporaryDirectory() as top:
        root = os.fsencode(top)
        os.makedirs(root + b"/site/" + above)
        for name, content in files.items():
            with open(root + b"/site/" + above + name, "wb") as file:
                file.write(content)
        path = os.path.join(top, "site.tar")
        with open(path, "wb") as out:
            pack.Packer(folder.walk(f"{top}/site", folder.LeftOut()), out, {}).run()
        assert {os.fsencode(name): content for name, content in contents(path).items()} \
            == {above + name: content for name, content in files.items()}
        archive = open_archive(path)
        paths = {name: b"/" + above + name for name in files}
        assert {name: archive.read(archive.find(path).plain) for name, path in paths.items()} == files
        archive.close()


def test_an_empty_directory(tmp_path, start):
    (tmp_path / "my-site").mkdir()
    packs(tmp_path / "my-site", tmp_path / "site.tar")
    server = start(tmp_path / "site.tar")
    assert server.fetch("/").status == 404 and "no file that can be served" in server.stderr()


@pytest.mark.parametrize("size", [0, (8 << 30) - 1, 8 << 30, 1 << 50])
@pytest.mark.parametrize("mtime", [0, (8 << 30) - 1, 8 << 30])
def test_any_sizes_and_dates(size, mtime):
    head = packed.member(b"name", 0o644, size, mtime)
    with tarfile.open(fileobj=io.BytesIO(head + bytes(1024))) as tar:
        found = tar.next()
    assert (found.name, found.size, found.mtime, found.mode) == ("name", size, mtime, 0o644)


# --- memory, and many files ----------------------------------------------------------------------------------------

def peak_memory(*arguments):
    """Bytes of memory that packing has taken at most (a child's ru_maxrss would be ours at least); and what it said."""
    code = "import sys, pack; ended = pack.main(sys.argv[1:]); print(open('/proc/self/status').read()); sys.exit(ended)"
    said = packs(*arguments, program=("-c", code), cwd=ROOT)
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", said, re.M)[1]), said


def test_large_files_are_not_in_memory(tmp_path):
    site = fill(tmp_path / "my-site", {"large.txt": b""})
    with (site / "large.txt").open("wb") as file:
        for i in range(150):
            file.write(noise(MIB // 8, i % 5) + prose(MIB * 7 // 8))
    with (site / "large.bin").open("wb") as file:
        file.truncate(300 * MIB)
    peak, _ = peak_memory(site, tmp_path / "site.tar", *GZIP)
    assert peak < 120 * MIB
    peak, said = peak_memory(site, tmp_path / "site.tar", *GZIP)
    assert peak < 120 * MIB and taken_over(said) == 1
    with tarfile.open(tmp_path / "site.tar") as tar:
        assert [(one.name, one.size) for one in tar][:2] == [("large.bin", 300 * MIB), ("large.txt", 150 * MIB)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """100,000 files, a tenth of which compress."""
    site = tmp_path_factory.mktemp("many") / "my-site"
    for i in range(200):
        (site / f"{i:03}").mkdir(parents=True)
        for j in range(500):
            text = b"<!doctype html><p>%d" % (500 * i + j)
            (site / f"{i:03}" / f"{j:03}.html").write_bytes(text + b"<br>" * 50 if j % 10 == 0 else text)
    return site


def test_many_files(many, tmp_path):
    peak, _ = peak_memory(many, tmp_path / "site.tar", *GZIP)
    assert peak < 160 * MIB
    archive = (tmp_path / "site.tar").read_bytes()
    peak, said = peak_memory(many, tmp_path / "site.tar", *GZIP)
    assert peak < 160 * MIB
    assert taken_over(said) == 10_000
    assert (tmp_path / "site.tar").read_bytes() == archive


# --- pages that list directories -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Its links and what is written there, and all elements."""

    def __init__(self, text):
        super().__init__()
        self.links, self.elements, self.rows = {}, set(), []
        self.href = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        if tag == "a":
            self.href = dict(attrs)["href"]
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data):
        if self.href:
            self.links[self.href] = data
            self.href = None
        elif self.rows:
            self.rows[-1] += f" {data.strip()}"


def test_index_pages(site, tmp_path, start):
    unlucky = "<script>alert(1)&amp;\"'"
    fill(site, {f"a/{unlucky}.html": b"x", "a/bad\udcff.txt": b"x", "a/x:y?z#%41.txt": b"x" * 1234,
                "a/app.js.gz": gzip.compress(FILES["a/app.js"]), "e/f/g.txt": b"g", ".well-known/x/y.txt": b"y"})
    (site / "nothing").mkdir()
    packs(site, tmp_path / "site.tar", "--index", *GZIP)
    found = contents(tmp_path / "site.tar")
    assert found["index.html"] == FILES["index.html"]
    pages = {name for name in found if name.endswith("index.html") and name != "index.html"}
    assert pages == {f"{name}/index.html" for name in ("a", "a/b", "e", "e/f", "nothing")}
    text = found["a/index.html"].decode()
    page = Page(text)
    assert not page.elements & {"script", "link", "img"}
    named = [unquote_to_bytes(href.removeprefix("./")) for href in page.links]
    assert named == [b"../", b"app.js", b"app.js-old", b"b/", os.fsencode("bad\udcff.txt"),
                     f"{unlucky}.html".encode(), b"x:y?z#%41.txt"][:1] + sorted(named[1:])
    assert set(named) == {b"../", b"app.js", b"app.js-old", b"b/", b"bad\xff.txt", f"{unlucky}.html".encode(),
                          b"x:y?z#%41.txt"}
    assert page.links["./b/"] == "b/" and unlucky + ".html" in page.links.values()
    assert any("1.2 kB" in row and "2020-09-13 12:26" in row for row in page.rows)
    assert 'name="viewport"' in text and "color-scheme: light dark" in text and "Content-Security" not in text
    server = start(tmp_path / "site.tar")
    for href in page.links:
        target = urljoin("/a/", href)
        assert server.fetch(target).status == 200, target
    assert server.fetch("/nothing/", accept_encoding="gzip")["Content-Encoding"] == "gzip"


# --- whole, or not at all ------------------------------------------------------------------------------------------


def begin(*arguments, **options):
    return subprocess.Popen([PYTHON, ROOT / "pack.py", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, **options)


def strays(folder_):
    return [path.name for path in folder_.iterdir() if path.name not in ("my-site", "site.tar", "expected.tar")]


def test_killed_at_any_moment(site, tmp_path):
    fill(site, {f"more/{i}.html": prose(20_000) + b"%d" % i for i in range(1000)})
    started = time.monotonic()
    packs(site, tmp_path / "expected.tar", *GZIP)
    spent = time.monotonic() - started
    expected = (tmp_path / "expected.tar").read_bytes()
    (tmp_path / "site.tar").write_bytes(b"the archive before")
    chance, seen = random.Random(), set()
    for _ in range(25):
        process = begin(site, tmp_path / "site.tar", *GZIP)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 1.1 * spent))
        process.kill()
        process.wait()
        found = (tmp_path / "site.tar").read_bytes()
        assert found in (b"the archive before", expected)
        assert strays(tmp_path) in ([], [".site.tar.packing"])
        seen.add(len(strays(tmp_path)))
        (tmp_path / "site.tar").write_bytes(b"the archive before")
    packs(site, tmp_path / "site.tar", *GZIP)
    assert (tmp_path / "site.tar").read_bytes() == expected
    assert strays(tmp_path) == []
    assert 1 in seen, "not once while it was written"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_end(site, tmp_path, number):
    fill(site, {"large.txt": prose(100 * MIB)})
    (tmp_path / "site.tar").write_bytes(b"the archive before")
    process = begin(site, tmp_path / "site.tar", *GZIP,
                    preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))        # nohup(1) has SIGHUP ignored
    wait_until(lambda: strays(tmp_path) or process.poll() is not None)
    process.send_signal(number)
    assert process.wait(20) == -number
    assert strays(tmp_path) == []
    assert (tmp_path / "site.tar").read_bytes() == b"the archive before"


def test_no_space(site, tmp_path):
    """Here a limit of the size of files."""
    (tmp_path / "site.tar").write_bytes(b"the archive before")
    sentence = refuses(1, site, tmp_path / "site.tar", *GZIP,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)))
    assert "site.tar cannot be written" in sentence
    assert strays(tmp_path) == []
    assert (tmp_path / "site.tar").read_bytes() == b"the archive before"


def test_two_at_a_time(site, tmp_path):
    """The second gives up. Where nobody writes any more, it goes on."""
    temporary = tmp_path / ".site.tar.packing"
    with temporary.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another packer" in refuses(1, site, tmp_path / "site.tar", *GZIP)
        assert temporary.exists() and not (tmp_path / "site.tar").exists()
    packs(site, tmp_path / "site.tar", *GZIP)
    assert strays(tmp_path) == []


def test_the_archive_keeps_its_mode_and_place(site, tmp_path):
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases/1.tar").write_bytes(b"old")
    (tmp_path / "releases/1.tar").chmod(0o640)
    (tmp_path / "site.tar").symlink_to("releases/1.tar")
    packs(site, tmp_path / "site.tar", *GZIP)
    assert (tmp_path / "site.tar").is_symlink()
    assert (tmp_path / "releases/1.tar").stat().st_mode & 0o777 == 0o640
    assert contents(tmp_path / "releases/1.tar")["index.html"] == FILES["index.html"]


@pytest.mark.parametrize("name", ["index.html", "large.csv", "logo.png"])
@pytest.mark.parametrize("change", ["longer", "shorter", "touched", "gone"])
def test_a_file_that_changes_meanwhile_is_named(site, name, change):
    found = folder.walk(str(site), folder.LeftOut())
    path = site / name
    if change == "gone":
        path.unlink()
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        path.write_bytes(FILES[name] + b"x" if change == "longer" else FILES[name][:-1])
        os.utime(path, (MTIME, MTIME))
    with pytest.raises(folder.PackError, match=re.escape(str(path))):
        pack.Packer(found, io.BytesIO(), codings.find_tools(["gzip"])).run()


@pytest.mark.parametrize(("status", "arguments", "word"), [
    (2, ["nowhere", "site.tar"], "nowhere"), (2, ["my-site/index.html", "site.tar"], "index.html"),
    (2, ["my-site", "my-site"], "my-site"), (2, ["my-site", "/dev/null"], "/dev/null"),
    (2, ["my-site"], "SITE.tar"), (2, ["my-site", "site.tar", "--codings", "lzma"], "lzma"),
    (2, ["my-site", "site.tar", "--nonesuch"], "--nonesuch"), (1, ["my-site", "nowhere/site.tar"], "nowhere/site.tar"),
])
def test_wrong_arguments_are_named(site, tmp_path, status, arguments, word):
    assert word in refuses(status, *arguments, cwd=tmp_path)
    assert not (tmp_path / "site.tar").exists()


def test_a_command_that_fails_is_named(site, tmp_path):
    """And one that is not there is told."""
    commands = tmp_path / "bin"
    fill(commands, {"zstd": b'#!/bin/sh\n[ "$1" = --version ] && echo v1.2.3 || { echo "no good" >&2; exit 3; }\n'})
    (commands / "zstd").chmod(0o755)
    flags = {"program": ("-S", ROOT / "pack.py"), "env": {"PATH": f"{commands}:/nonesuch"}}
    if sys.version_info < (3, 14):
        sentence = refuses(1, site, tmp_path / "site.tar", "--codings", "zstd", **flags)
        assert f"{commands}/zstd has failed with status 3: no good" in sentence
    assert "--codings br" in refuses(2, site, tmp_path / "site.tar", "--codings", "br", **flags)
    (commands / "zstd").unlink()
    assert "br: none, for neither its module nor its command is here" in packs(site, tmp_path / "site.tar", **flags)


# --- what is said --------------------------------------------------------------------------------------------------


def test_progress_on_a_terminal(site, tmp_path):
    fill(site, {f"more/\x1b[31m{i}\u202e.html": prose(20_000) + b"%d" % i for i in range(500)})
    fill(site, {"large.txt": prose(30 * MIB)})
    ours, theirs = pty.openpty()
    process = subprocess.Popen([PYTHON, ROOT / "pack.py", site, tmp_path / "site.tar", *GZIP], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):              # EIO: the other end is closed
        while piece := os.read(ours, 1 << 16):
            said += piece
    os.close(ours)
    assert process.wait() == 0
    lines = said.split(b"\r\x1b[K")
    assert len(lines) > 2 and lines[-1] == b""
    for line in lines[1:-1]:
        assert re.fullmatch(rb"\[#* *\] +\d+% \d+ of 512 files, [\d.]+ .?B of [\d.]+ MB, [\d.]+ s.*", line), line
        assert b"\x1b" not in line and len(line) < 80


def test_no_progress_bar_elsewhere(site, tmp_path):
    said = packs(site, tmp_path / "site.tar", *GZIP)
    assert "\x1b" not in said and "\r" not in said
    assert re.match(rf".*site.tar: {len(FILES)} files, 3.2 MB; 3.2 MB with all siblings \(\d+\.\d s\)\n"
                    rf"gzip: {len(GZIPPED)} files, 3.2 MB are .* kB \(\d+% saved\)\n$", said)
