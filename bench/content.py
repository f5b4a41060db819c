"""The files that are served: the same bytes as a directory and as a tar, made anew from a fixed seed."""

import io
import os
import random
import tarfile

SEED = 2026
MTIME = 1_700_000_000          # of every file, so that all servers send the same Last-Modified
MANY = 10_000                  # files of 1 KiB under /many/
ARCHIVE = 100_000              # files of the start-up case's archive
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
    source = random.Random(SEED)
    sizes = SIZES | {f"many/{number:05}.bin": 1 << 10 for number in range(MANY)}
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, size in sizes.items():
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(source, size))
            os.utime(path, (MTIME, MTIME))
            archive.add(path, name)


def write_archive(tar):
    """Write an archive of ARCHIVE small files in a thousand directories."""
    source = random.Random(SEED)
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(ARCHIVE):
            member = tarfile.TarInfo(f"{number % 1000:03}/page-{number}.html")
            member.size, member.mtime = 300, MTIME
            archive.addfile(member, io.BytesIO(source.randbytes(member.size)))
