"""Compares the packer with tar and gzip -9 over the same files, on the same cores.

    python3 bench/packing.py [--files N] [--rounds N]

Both make an archive with NAME.gz beside the same files, alternating, each from a tree without them and without an
archive before; each is to bring its archive to the disk. The packer's second time, with nothing changed, is measured
too. Prints medians of wall-clock and CPU seconds, and ratios of one round each.
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from codings import compresses  # noqa: E402
from linux import cpus  # noqa: E402

SIZES = 1 << 10, 40 << 10       # bytes of a file, evenly spread by their logarithm
IMAGES = 10                     # one file in so many does not compress
SHELL = """set -eu
cd "$1"
xargs -0 -n 32 -P "$3" gzip -9 -n -k -- <"$4"
find . -type f -print0 | sort -z | tar --null --no-recursion -T - -cf "$2"
sync "$2"
"""


def make_site(folder, count):
    """Files of text that is cut out of this project's pages and sources at random, and of noise; the same each time."""
    chance = random.Random(1)
    text = b"".join(path.read_bytes() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*.md")]))
    least, most = SIZES
    for number in range(count):
        path = folder / f"{number // 200:03}" / f"{number:05}.{'png' if number % IMAGES == 0 else 'html'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = int(least * (most / least) ** chance.random())
        pieces = [text[at:at + 400] for at in (chance.randrange(len(text)) for _ in range(size // 400 + 1))]
        path.write_bytes(chance.randbytes(size) if path.suffix == ".png" else b"".join(pieces)[:size])


def timed(command):
    """(wall-clock seconds, CPU seconds) of a command and all that it starts."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    spent, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_packer(site, archive):
    return timed([sys.executable, ROOT / "pack.py", site, archive, "--codings", "gzip"])


def by_shell(site, archive, names):
    try:
        return timed(["sh", "-c", SHELL, "sh", site, archive, str(len(cpus())), names])
    finally:
        for path in site.rglob("*.gz"):
            path.unlink()


def measure(folder, rounds):
    """{what: [(wall, CPU) of each round]}"""
    site, archive, names = folder / "site", folder / "site.tar", folder / "names"
    files = sorted(path.relative_to(site) for path in site.rglob("*") if path.is_file())
    names.write_bytes(b"".join(os.fsencode(name) + b"\0" for name in files if compresses(os.fsencode(name))))
    found = {"pack.py": [], "pack.py again": [], "tar and gzip -9": []}
    for _ in range(rounds):
        archive.unlink(missing_ok=True)
        found["pack.py"].append(by_packer(site, archive))
        found["pack.py again"].append(by_packer(site, archive))
        archive.unlink()
        found["tar and gzip -9"].append(by_shell(site, archive, names))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = parser.parse_args()
    if not shutil.which("gzip") or not shutil.which("tar"):
        sys.exit("this needs gzip and GNU tar")
    with tempfile.TemporaryDirectory() as top:
        make_site(Path(top) / "site", options.files)
        found = measure(Path(top), options.rounds)
    print(f"{options.files} files, {len(cpus())} cores, {options.rounds} rounds; seconds: wall-clock, CPU")
    for what, rounds in found.items():
        print(f"{what:16} {statistics.median(wall for wall, _ in rounds):6.2f} "
              f"{statistics.median(cpu for _, cpu in rounds):6.2f}")
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(found["pack.py"], found["tar and gzip -9"], strict=True)]
    print(f"pack.py takes {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) of the time")


if __name__ == "__main__":
    main()
