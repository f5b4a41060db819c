"""The files that are served: the same bytes as a directory and as a tar, made anew from a fixed seed."""

import io
import os
import random
import tarfile

SEED = 2026
VERSIONED = "small/version.txt"
MTIME = 1_700_000_000          # of every file, so that all servers send the same Last-Modified
MANY = 10_000                  # files of 1 KiB under /many/
PAGES = 60                     # files of 1 KiB under /pages/
ARCHIVE = 100_000              # files of the start-up case's archive
COLD = 16, 48 << 20            # files of the cold archive, and their size: far more than it gets memory for
HOT = 20                       # files of 1 KiB there
SIZES = {
    "small/1k.bin": 1 << 10,
    "medium/24k.bin": 24 << 10,
    "large/1m.bin": 1 << 20,
    "large/100m.bin": 100 << 20,
}


def noise(source, size):
    """`size` bytes that do not compress, repeated after 1 MiB: enough to tell a wrong byte."""
    block = source.randbytes(min(size, 1 << 20))
    return block * (size // len(block))


def write_site(site, tar):
    """Fill the directory `site` and put all of it into the new file `tar`."""
    sizes = SIZES | {f"many/{number:05}.bin": 1 << 10 for number in range(MANY)}
    sizes |= {f"pages/f{number}.html": 1 << 10 for number in range(PAGES)}
    write_files(site, tar, sizes.items(), random.Random(SEED))


def write_files(site, tar, sizes, source):
    """Write files, (name, size) each, into the directory `site` and into the archive `tar`."""
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, size in sizes:
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(source, size))
            os.utime(path, (MTIME, MTIME))
            archive.add(path, name)


def write_cold(site, tar):
    """Fill the directory `site`, and `tar`, with HOT small files and COLD large ones."""
    count, size = COLD
    sizes = [(f"hot/{number}.bin", 1 << 10) for number in range(HOT)]
    sizes += [(f"large/{number}.bin", size) for number in range(count)]
    write_files(site, tar, sizes, random.Random(SEED))


def write_versions(site, tars):
    """Write the small files of `site` into two archives that differ in one of them: VERSIONED."""
    for version, tar in enumerate(tars):
        with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted((site / "many").iterdir()):
                archive.add(path, f"many/{path.name}")
            member = tarfile.TarInfo(VERSIONED)
            member.size, member.mtime = 1 << 10, MTIME
            archive.addfile(member, io.BytesIO(version_of(version)))


def version_of(number):
    """What VERSIONED holds in the archive of this number."""
    return f"{number}\n".encode() * (1 << 9)


def write_archive(tar):
    """Write an archive of ARCHIVE small files in a thousand directories."""
    source = random.Random(SEED)
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(ARCHIVE):
            member = tarfile.TarInfo(f"{number % 1000:03}/page-{number}.html")
            member.size, member.mtime = 300, MTIME
            archive.addfile(member, io.BytesIO(source.randbytes(member.size)))
