"""The cases that are not rates: memory of connections and of files, start-up, and the steady state."""

import contextlib
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import content
import latency
import load
import procfs
from servers import CORES, Failed, Site, advice, available, find, serving

IDLE = 10_000                  # connections of the idle case
BUSY = 1_000                   # connections of the memory case
SPARE = 500                    # file descriptors that client and server need besides
WINDOW = 2                     # seconds of system calls that are counted
SQPOLL = ("--sqpoll-ms", "50", "--busyloop", "50ms")
ATTACHED = re.compile(rb"Process \d+ attached")


def slots(count):
    """tarweb's flags for `count` connections, and some to spare."""
    return ("--max-connections", str(count + SPARE))


def idle(site):
    """Memory of each server before and with many quiet connections, in KiB: {server: {...}}."""
    count = min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE)
    return {name: idle_server(name, site, count) for name in available() if name in ("tarweb", "nginx", "lighttpd")}


def idle_server(name, site, count):
    """The idle case for one server: memory (proc.memory's, without the tar) and kernel slab, KiB."""
    with serving(name, site, slots(count) if name == "tarweb" else ()) as server:
        request = load.get("/small/1k.bin", server.port)
        with load.connected(server.port, 1) as probe:
            load.ask(probe[0], request)
        before = procfs.memory(server.pids, site.tar) | {"slab": procfs.kernel_slab()}
        with load.connected(server.port, count) as connections:
            for connection in connections:
                load.ask(connection, request)
            after = procfs.memory(server.pids, site.tar) | {"slab": procfs.kernel_slab()}
            return {"connections": count, "open": load.still_open(connections), "before": before, "after": after}


def memory(site):
    """tarweb's memory, KiB, without the mapped tar, after every file went over one of many connections."""
    with serving("tarweb", site, slots(BUSY)) as server, load.connected(server.port, BUSY) as connections:
        for number in range(content.MANY):
            load.ask(connections[number % BUSY], load.get(f"/many/{number:05}.bin", server.port))
        return {"files": content.MANY, "connections": BUSY, "open": load.still_open(connections),
                "without_tar": procfs.memory(server.pids, site.tar), "with_tar": procfs.memory(server.pids)}


def startup(site, rounds):
    """Seconds until tarweb serves a large archive, with and without etags, and until tarfile has read it."""
    archive = Site(site.directory, site.tar.parent / "archive.tar", site.python)
    content.write_archive(archive.tar)
    ways = {
        "etags": lambda: start_seconds(archive),
        "--etags=off": lambda: start_seconds(archive, "--etags=off"),
        "tarfile alone": lambda: read_seconds(archive),
    }
    read_seconds(archive)          # once for nothing: the archive is in memory from here on
    results: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, seconds in ways.items():
            results[way].append(seconds())
    return {"files": content.ARCHIVE, "seconds": results}


def start_seconds(site, *flags):
    """Seconds from exec to the line that says where tarweb serves."""
    start = time.perf_counter()
    with serving("tarweb", site, flags):
        return time.perf_counter() - start


def read_seconds(site):
    """Seconds that a Python takes to start and iterate over all members with the tarfile module."""
    start = time.perf_counter()
    walk = "import sys, tarfile\nfor member in tarfile.open(sys.argv[1]): pass"
    subprocess.run([site.python, "-c", walk, site.tar], check=True)
    return time.perf_counter() - start


def steady(site, requests):
    """What a server that has warmed up still asks of the system, over `requests` requests: {mode: {...}}."""
    results = {"tarweb": growth(site, requests)}
    if not find("strace"):
        print(advice("strace"), file=sys.stderr)
        return results
    results["tarweb"] |= traced("tarweb", site)
    # The kernel's polling thread and the loop both spin: on one core they would only wait for each other.
    results["tarweb, sqpoll"] = traced("tarweb", site, SQPOLL, CORES)
    if "nginx" in available():
        results["nginx"] = traced("nginx", site)
    return results


def growth(site, requests):
    """tarweb's anonymous memory (KiB) and page faults before and after `requests` requests, counted after as many
    as a tenth of that to warm up."""
    with serving("tarweb", site) as server:
        serve_some(server, requests // 10)
        before, faults = procfs.memory(server.pids, site.tar), procfs.stat(server.pids, "minflt")[0]
        served = serve_some(server, requests)
        after = procfs.memory(server.pids, site.tar)
        faults = procfs.stat(server.pids, "minflt")[0] - faults
        return {"requests": served, "faults": faults, "before": before, "after": after}


def serve_some(server, requests):
    """Load `server` until it has served `requests`, or for two minutes; gives how many it did serve."""
    served, deadline = 0, time.monotonic() + 120
    while served < requests and time.monotonic() < deadline:
        result = load.wrk(server.url("/small/1k.bin"), 64, 2)
        if result["errors"] or not result["requests"]:
            raise Failed(f"{server.name}: {result['errors'] or 'nothing served'}")
        served += result["requests"]
    return served


def traced(name, site, flags=(), cores=CORES[:1]):
    """System calls of a server in a window of full load: {"calls": {name: count}, "answers", "window": seconds}."""
    with serving(name, site, flags, cores) as server, load.Steady(server, "/small/1k.bin", 64) as clients:
        time.sleep(1)
        start = time.monotonic()
        with counting(server, site.directory.parent / "strace.txt") as calls:
            answers = clients.answers
            time.sleep(WINDOW)
            answers = clients.answers - answers
        return {"calls": calls, "answers": answers, "window": time.monotonic() - start}


@contextlib.contextmanager
def counting(server, output):
    """Count the system calls of all the server's threads while the block runs; gives {name: count}, filled after."""
    calls: dict[str, int] = {}
    targets = [word for pid in server.pids for word in ("-p", str(pid))]
    command = [find("strace"), "-c", "-f", "-o", output, *targets]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
        assert strace.stderr
        try:
            said = b""
            while len(ATTACHED.findall(said)) < len(server.pids):
                if not (line := strace.stderr.readline()):
                    raise Failed(f"strace: {said.decode(errors='replace')}")
                said += line
            yield calls
        finally:
            strace.terminate()
    calls |= table(output)


def table(output):
    """The counts in what `strace -c` wrote: columns "% time, seconds, usecs/call, calls, [errors], syscall"."""
    rows = [line.split() for line in Path(output).read_text().splitlines()]
    return {row[-1]: int(row[3]) for row in rows if len(row) > 4 and row[3].isdigit() and row[-1] != "total"}


SPECIAL = {
    "idle": lambda site, options: idle(site),
    "startup": lambda site, options: startup(site, options.rounds),
    "memory": lambda site, options: memory(site),
    "steady": lambda site, options: steady(site, options.requests),
    "cold": lambda site, options: latency.cold(options),
    "reload": lambda site, options: latency.reload(site),
}
