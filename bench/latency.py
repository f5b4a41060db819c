"""The cases of latency: how long a client waits while the server reads a cold archive, or loads a new one."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import content
import load
from servers import CORES, HERE, HOST, Failed, Site, available, serving

SERVERS = ("tarweb", "nginx")
CACHE = HERE.parent / ".cache" / "bench"
GROUPS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}   # v1, v2
MEMORY = 150_000_000           # bytes that a server of the cold archive has, page cache included
READERS = 2
RATE = 30_000_000              # bytes/s that each of them reads
WARM_UP = 1                    # seconds of the quiet client that are not counted
RELOADS = 10
RELOADED = 10                  # seconds that a reload may take
AFTER = 0.5                    # seconds after a reload for which its latency counts


# --- a cold archive


def cold(options):
    """Latency of small files that are in memory, while nothing else happens and while large ones are read from disk.

    Gives {"bytes", "memory", "readers", "rate", "servers": {name: [{"quiet", "cold": see figures, "read": bytes/s}]}}.
    """
    results: dict[str, list] = {name: [] for name in SERVERS if name in available()}
    seconds = 2 if options.quick else 6
    CACHE.mkdir(parents=True, exist_ok=True)
    with memory_group(MEMORY) as group, tempfile.TemporaryDirectory(prefix="cold-", dir=CACHE) as temporary:
        site = Site(Path(temporary) / "site", Path(temporary) / "site.tar", options.python)
        content.write_cold(site.directory, site.tar)
        for number in range(options.rounds):
            for name, its_rounds in results.items():
                its_rounds.append(cold_round(name, site, group, seconds))
                tell("cold", number, name, its_rounds[-1]["quiet"], its_rounds[-1]["cold"])
        size = site.tar.stat().st_size
    return {"bytes": size, "memory": MEMORY, "readers": READERS, "rate": RATE, "servers": results}


def cold_round(name, site, group, seconds):
    """One round of the cold case, of a server that has just been started, nothing of its site being in memory."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    paths = [f"/hot/{number}.bin" for number in range(content.HOT)]
    with serving(name, site, cores=CORES, group=group) as server, load.Paced(server, paths) as client:
        client.run(WARM_UP)
        quiet = figures(client.run(seconds))
        with reading(server) as total:
            client.run(WARM_UP)
            before, start = total(), time.monotonic()
            cold = figures(client.run(seconds))
            rate = (total() - before) / (time.monotonic() - start)
    return {"quiet": quiet, "cold": cold, "read": rate}


@contextlib.contextmanager
def memory_group(size):
    """A control group (cgroups(7)) of so many bytes of memory, page cache included; gives its directory, or Failed."""
    if os.geteuid():
        raise Failed("only root may make a control group and drop caches")
    parent, limit = next(place for place in GROUPS.items() if place[0].is_dir())
    group = parent / f"tarweb-bench-{os.getpid()}"
    try:
        if limit == "memory.max":
            (parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / limit).write_text(str(size))
    except OSError as error:
        raise Failed(f"no control group for memory: {error}") from None
    try:
        yield group
    finally:
        group.rmdir()


@contextlib.contextmanager
def reading(server):
    """Have READERS processes read large files; gives a function that tells how many bytes they have read so far."""
    counts = [multiprocessing.Value("Q", 0) for _ in range(READERS)]
    readers = [multiprocessing.Process(target=read, args=(server.port, number, count), daemon=True)
               for number, count in enumerate(counts)]
    for reader in readers:
        reader.start()
    try:
        yield lambda: sum(count.value for count in counts)
        if not all(reader.is_alive() for reader in readers):
            raise Failed(f"{server.name}: a reader of large files has failed")
    finally:
        for reader in readers:
            reader.kill()
            reader.join()


def read(port, number, count):
    """Read large files, every READERS-th from `number` on, at RATE; adds to `count` what has come. Never returns."""
    os.nice(19)                    # it shares its core with the client whose latency counts
    while True:
        with socket.create_connection((HOST, port)) as connection:
            request = load.get(f"/large/{number % content.COLD[0]}.bin", port)
            connection.sendall(request.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n")
            start, size = time.monotonic(), 0
            while piece := connection.recv(1 << 18):
                size += len(piece)
                count.value += len(piece)
                time.sleep(max(0, start + size / RATE - time.monotonic()))
        if size < content.COLD[1]:
            raise Failed("the answer is short")
        number += READERS


# --- a reload


def reload(site):
    """Latency of a small file, while nothing else happens and while the server is told to load the site anew.

    Gives {"files", "servers": {name: {"quiet": see figures, "reloads": [the same, and "served": seconds or None],
    "lost": see load.Paced}}}.
    """
    with tempfile.TemporaryDirectory(prefix="tarweb-bench-") as temporary:
        versions = [Path(temporary) / f"{number}.tar" for number in range(2)]
        content.write_versions(site.directory, versions)
        (site.directory / content.VERSIONED).write_bytes(content.version_of(1))      # for nginx, once for all
        own = Site(site.directory, Path(temporary) / "site.tar", site.python)
        results = {name: reload_server(name, own, versions) for name in SERVERS if name in available()}
    return {"files": content.MANY, "servers": results}


def reload_server(name, site, versions):
    """The reload case for one server."""
    put(versions[0], site.tar)
    with serving(name, site) as server, load.Paced(server, [f"/{content.VERSIONED}"]) as client:
        client.run(WARM_UP)
        quiet = figures(client.run(RELOADS))
        reloads = []
        for number in range(1, RELOADS + 1):
            put(versions[number % 2], site.tar)
            expected = content.version_of(number % 2) if name == "tarweb" else None
            reloads.append(reload_once(server, client, expected))
            tell("reload", number - 1, name, quiet, reloads[-1])
    return {"quiet": quiet, "reloads": reloads, "lost": client.lost}


def reload_once(server, client, expected):
    """Figures of the client's, from SIGHUP until AFTER seconds after all is new: workers, and what they serve.

    "served": seconds until `expected` is, which is None for nginx, whose site is no part of what it loads.
    """
    workers = set(server.pids[1:])
    start, served, end = time.monotonic(), None, None
    client.seconds = []
    server.process.send_signal(signal.SIGHUP)
    while not end or time.monotonic() < end:
        if time.monotonic() > start + RELOADED:
            raise Failed(f"{server.name} has not reloaded")
        if expected in (None, client.step()) and not served:
            served = time.monotonic() - start
        if served and not end and not workers & set(server.pids):
            end = time.monotonic() + AFTER
    return figures(client.seconds) | {"served": expected and served}


def put(version, path):
    """Have `path` be a copy of the archive `version`, from one moment to the next."""
    new = path.with_suffix(".new")
    shutil.copyfile(version, new)
    new.replace(path)


# --- both


def figures(seconds):
    """Milliseconds: {"p50", "p99", "p99.9", "max"}, and how many "requests" they are of."""
    cuts = statistics.quantiles(seconds, n=1000, method="inclusive")
    return {"requests": len(seconds), "p50": cuts[499] * 1e3, "p99": cuts[989] * 1e3, "p99.9": cuts[998] * 1e3,
            "max": max(seconds) * 1e3}


def tell(case, number, server, quiet, busy):
    """One line of progress on stderr."""
    print(f"{case} {number + 1} {server:17} ms: p99 {quiet['p99']:.2f}, then {busy['p99']:.2f}; longest "
          f"{quiet['max']:.2f}, then {busy['max']:.2f}", file=sys.stderr)
