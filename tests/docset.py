"""A real documentation site for the tests: Debian packages, unpacked, with compressed siblings, packed by GNU tar.

    python3 tests/docset.py        # makes .cache/docs.tar unless it is there, and prints its path

Boost's documentation gives thousands of files, with operators in their names; Django's is what Sphinx makes, with
scripts, styles, images and fonts, its scripts being symbolic links into the JavaScript packages, some of which bring
precompressed siblings of their own. Where packages cannot be had, the standard library's source tree stands in.
"""

import fcntl
import gzip
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
TREE = CACHE / "docs"          # what the tar holds, for comparing
TAR = CACHE / "docs.tar"
PAGE = "doc/python-django-doc/html/intro/tutorial02.html"  # with scripts, styles and images

# Each line is one package under the names it has in different releases.
PACKAGES = [
    ("libboost1.74-doc", "libboost1.83-doc", "libboost1.88-doc"),
    ("python-django-doc",),
    ("libjs-sphinxdoc",),
    ("libjs-jquery",),
    ("libjs-underscore",),
]
TEXT = {".html", ".css", ".js", ".svg", ".txt", ".json", ".xml", ".cpp", ".hpp", ".h", ".py", ".md", ".map"}


def download(names, into):
    """Download the first of these packages that the package lists know; False when none can be had."""
    for name in names:
        got = subprocess.run(["apt-get", "-q", "download", name], cwd=into, stdin=subprocess.DEVNULL,
                             capture_output=True, check=False, timeout=300)
        if got.returncode == 0:
            return True
    return False


def unpack_packages(root):
    """Fill `root` with the packages' /usr/share; False where that is not possible."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return False
    debs = CACHE / "debs"
    debs.mkdir(exist_ok=True)
    if not download(PACKAGES[0], debs):
        if os.geteuid() == 0:  # the package lists may be missing or old
            subprocess.run(["apt-get", "-q", "update"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if not download(PACKAGES[0], debs):
            return False
    if not all(download(names, debs) for names in PACKAGES[1:]):
        return False
    unpacked = CACHE / "unpacked"
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", deb, unpacked], check=True)
    (unpacked / "usr/share").rename(root)
    shutil.rmtree(unpacked)
    shutil.rmtree(debs)
    return True


def copy_standard_library(root):
    print("documentation packages cannot be had here: taking the standard library's source tree", file=sys.stderr)
    shutil.copytree(sysconfig.get_path("stdlib"), root, ignore=shutil.ignore_patterns(
        "__pycache__", "site-packages", "dist-packages", "*.so", "*.a"))


def compress(path):
    """Write the siblings path.gz and path.br, unless the package has brought them."""
    content = path.read_bytes()
    sibling = path.with_name(path.name + ".gz")
    if not sibling.exists():
        sibling.write_bytes(gzip.compress(content, 6, mtime=0))
    try:
        import brotli
    except ImportError:
        return
    sibling = path.with_name(path.name + ".br")
    if not sibling.exists():
        sibling.write_bytes(brotli.compress(content, quality=4))


def build():
    """Make the tar unless it is there, or somebody else is doing that; return its path."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "docs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not TAR.exists():
            make()
    return TAR


def make():
    """Interrupted work is begun again."""
    for leftover in (TREE, CACHE / "unpacked"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not unpack_packages(TREE):
        copy_standard_library(TREE)
    texts = [path for path in TREE.rglob("*") if path.suffix in TEXT and path.is_file() and not path.is_symlink()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(compress, texts))
    part = TAR.with_suffix(".part")
    subprocess.run(["tar", "-C", TREE, "-cf", part, "."], check=True)
    part.rename(TAR)


def served_files():
    """What a server of the tar has to serve: name -> path on disk. Links count when they stay inside."""
    inside = TREE.resolve()
    return {str(path.relative_to(TREE)): path for path in sorted(TREE.rglob("*"))
            if path.is_file() and path.resolve().is_relative_to(inside)}


if __name__ == "__main__":
    print(build())
