"""Attacks tarweb and nginx with the clients of attack_clients.py, and writes ATTACKS.md and attacks.json.

    .venv/bin/python bench/attacks.py [--only NAME,NAME] [--rounds N] [--out DIRECTORY]

What is measured is what others see of an attack: visitors who ask for a small file at a fixed rate. A run of all takes
about eight minutes and writes into bench/; one with --only into .cache/bench/. All traffic stays on loopback.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attack_clients
import attack_report
import content
import latency
import load
import procfs
import run
import servers
import tlspeer
from attack_clients import ATTACKS, HOST, SIZES, SMALL
from servers import CLIENT_CORE, HERE, Failed, Site, find, serving

LIMIT = 1000                    # connections that each server allows
PATIENCE = 2                    # seconds after which a visitor has gone
RATE = 50                       # visitors a second who open a connection; as many requests a second on kept ones
KEPT = 10                       # connections for the latter
VISITOR = "127.0.0.2"           # where visitors come from
SECONDS = 3                     # that a round is measured for
FULL = 0.5                      # seconds that an attack goes on at full strength before that
CALM = 0.5                      # seconds after an attack before memory is measured
PER_IP = 100
BACKLOG = 511                   # connections that wait to be accepted: tarweb's number, and nginx's own

TARWEB = ("--max-connections", LIMIT, "--header-timeout", 5, "--keepalive-timeout", 60)
# The same for nginx. As many as it allows, and the queue in front of them as long as tarweb's.
NGINX = """client_header_timeout 5s;
client_body_timeout 5s;
lingering_timeout 5s;
send_timeout 10s;
keepalive_timeout 60s;
"""
SETUPS = {"tarweb": ("tarweb", TARWEB), "nginx": ("nginx under attack", (f"CONNECTIONS={LIMIT}",)),
          "tarweb, --max-per-ip": ("tarweb", (*TARWEB, "--max-per-ip", PER_IP))}
# Where a limit for each address says something: who comes from few, and stays.
LIMITED = "silent", "slow-head", "slow-read", "half-tls"


def nginx(site, temporary, port, flags, tls):
    """The command line of nginx with the limits above; see servers.COMMANDS."""
    (temporary / "locations.conf").write_text(NGINX)
    command = servers.nginx(site, temporary, port, flags, tls)
    written = temporary / "nginx.conf"
    written.write_text(written.read_text().replace("backlog=4096", f"backlog={BACKLOG}")
                       .replace("keepalive_timeout 3600;\n", ""))
    return command


servers.COMMANDS["nginx under attack"] = nginx


# --- visitors ------------------------------------------------------------------------------------------------------


class Visitors:
    """Ask `server` for a small file: `fresh` over a new connection each, `kept` over some that stay open.

    Both hold a time for each request, from when it was due, in seconds: PATIENCE where there was no answer by then.
    """

    def __init__(self, server):
        self.port, self.request = server.port, load.get(SMALL, server.port)
        self.tls = tlspeer.context() if server.tls else None
        self.fresh, self.kept, self.reopened = [], [], 0

    async def run(self, seconds):
        """Have them all come for so long, and wait for the last one."""
        start = time.monotonic() + 0.01
        fresh = (self.visit(start + number / RATE) for number in range(round(seconds * RATE)))
        kept = (self.stay(start + number / RATE, round(seconds * RATE / KEPT)) for number in range(KEPT))
        await asyncio.gather(*fresh, *kept)

    async def visit(self, due):
        await until(due)
        self.fresh.append(await self.timed(due, self.alone()))

    async def stay(self, start, count):
        """Ask every KEPT / RATE seconds, on one connection as long as the server keeps it."""
        kept = Kept(self)
        for number in range(count):
            due = start + number * KEPT / RATE
            await until(due)
            self.kept.append(await self.timed(due, kept.ask()))
        kept.close()

    async def timed(self, due, asking):
        try:
            await asyncio.wait_for(asking, max(0, due + PATIENCE - time.monotonic()))
        except (OSError, EOFError, TimeoutError):
            return PATIENCE
        return time.monotonic() - due

    async def alone(self):
        reader, writer = await self.connect()
        try:
            await self.answer(reader, writer)
        finally:
            writer.transport.abort() if self.tls else writer.close()

    async def connect(self):
        sock = await attack_clients.connect(self.port, VISITOR)
        return await asyncio.open_connection(sock=sock, ssl=self.tls, server_hostname=HOST if self.tls else None)

    async def answer(self, reader, writer):
        writer.write(self.request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)\r\ncontent-length: *(\d+)\r\n", head)[1])
        if len(await reader.readexactly(length)) != SIZES[SMALL] or not head.startswith(b"HTTP/1.1 200 "):
            raise Failed(f"a visitor got {head!r}")


class Kept:
    """A connection that stays. One that the server has closed is opened anew, and asked again: as browsers do."""

    def __init__(self, visitors):
        self.visitors, self.streams = visitors, None

    async def ask(self):
        if self.streams:
            try:
                await self.visitors.answer(*self.streams)
                return
            except (OSError, EOFError):
                self.visitors.reopened += 1
            except BaseException:           # no answer in time: what comes later is not the next one's
                self.close()
                raise
        self.close()
        self.streams = await self.visitors.connect()
        try:
            await self.visitors.answer(*self.streams)
        except BaseException:
            self.close()
            raise

    def close(self):
        if self.streams:
            self.streams[1].transport.abort()
        self.streams = None


async def until(due):
    await asyncio.sleep(max(0, due - time.monotonic()))


# --- attacks -------------------------------------------------------------------------------------------------------


def command(attack, name, server):
    """The command line that attacks `server`."""
    if attack.wrk:
        tag = f"{os.getpid()}-{time.monotonic_ns()}"
        asks = ("--", "unique", tag) if name == "unique" else ("--",)
        return [find("wrk"), "-t1", "-d60s", "--timeout", "10s", "-s", HERE / "wrk.lua", *attack.wrk,
                server.url(attack.path), *asks]
    return [sys.executable, HERE / "attack_clients.py", name, str(server.port)]


@contextlib.contextmanager
def under_attack(name, server):
    """Attack `server` while the block runs, which begins when the attack has reached its full strength."""
    if name == "none":
        yield
        return
    attack = ATTACKS[name]

    def prepare():
        os.sched_setaffinity(0, {CLIENT_CORE})
        os.nice(10)                 # it shares its core with the visitors, whose latency counts

    process = subprocess.Popen(command(attack, name, server), stdout=subprocess.DEVNULL, preexec_fn=prepare)
    try:
        time.sleep(FULL + (attack.count / attack.rate if attack.rate else 0))
        yield
        if process.poll() is not None:
            raise Failed(f"{name}: the attacker has ended")
    finally:
        process.kill()
        process.wait()


def one_round(name, server, site):
    """One round of attack `name` on `server`."""
    visitors, workers = Visitors(server), server.pids
    with under_attack(name, server):
        cpu, start = procfs.cpu_seconds(server.pids), time.monotonic()
        asyncio.run(visitors.run(SECONDS))
        cpu, seconds = procfs.cpu_seconds(server.pids) - cpu, time.monotonic() - start
    time.sleep(CALM)
    return {"fresh": figures(visitors.fresh), "kept": figures(visitors.kept), "reopened": visitors.reopened,
            "cpu": cpu / seconds, "memory": procfs.memory(server.pids, site.tar)["pss"],
            "survived": server.pids == workers}


def figures(seconds):
    """{"asked", "answered", "p50", "p99", ...}: as latency.figures, those unanswered taking PATIENCE."""
    return latency.figures(seconds) | {"asked": len(seconds), "answered": sum(each < PATIENCE for each in seconds)}


def measure(name, site, rounds):
    """An attack on servers that have just been started, taking turns: {setup: {"before": KiB, "rounds": [...]}}."""
    tls = ATTACKS[name].tls if name in ATTACKS else name == "none, TLS"
    results = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for setup in setups(name):
            kind, flags = SETUPS[setup]
            running[setup] = stack.enter_context(serving(kind, site, flags, tls=tls))
            asyncio.run(Visitors(running[setup]).run(1))
            results[setup] = {"before": procfs.memory(running[setup].pids, site.tar)["pss"], "rounds": []}
        for _ in range(rounds):
            for setup, server in running.items():
                results[setup]["rounds"].append(one_round(name.partition(",")[0], server, site))
                tell(name, setup, results[setup]["rounds"][-1])
    return {"title": attack_report.title(name), "tls": tls, "servers": results}


def setups(name):
    """The setups that an attack is measured with."""
    limited = name in LIMITED and b"--max-per-ip" in subprocess.run(
        [sys.executable, servers.TARWEB, "--help"], capture_output=True, check=True).stdout
    return [setup for setup in SETUPS if "per-ip" not in setup or limited]


def tell(name, setup, seen):
    """One line of progress on stderr."""
    said = ", ".join(f"{seen[kind]['answered']} of {seen[kind]['asked']} {kind} answered, p99 {seen[kind]['p99']:.1f} "
                     "ms" for kind in ("fresh", "kept"))
    print(f"{name:12} {setup:20} {said}; CPU {seen['cpu']:.0%}", file=sys.stderr)


def arguments():
    names = ["none", "none, TLS", *ATTACKS]
    parser = argparse.ArgumentParser(description="Attack tarweb and nginx on loopback.")
    parser.add_argument("--only", metavar="NAMES", help=f"some of: {','.join(ATTACKS)}")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each attack (default: 2)")
    parser.add_argument("--python", default=run.SYSTEM_PYTHON if Path(run.SYSTEM_PYTHON).exists() else sys.executable,
                        help="the interpreter that runs tarweb (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write (default: bench/, or .cache/bench/ with --only)")
    options = parser.parse_args()
    options.out = options.out or (run.TRIAL if options.only else HERE)
    options.names = ["none", *options.only.split(",")] if options.only else names
    options.seconds, options.quick = SECONDS, False
    if unknown := set(options.names) - set(names):
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    return options


def main():
    options = arguments()
    run.require()
    run.prepare()
    results = {"machine": run.machine(options), "attacks": {}}
    with tempfile.TemporaryDirectory(prefix="tarweb-bench-") as temporary:
        site = Site(Path(temporary) / "site", Path(temporary) / "site.tar", options.python)
        site.directory.mkdir()
        content.write_files(site.directory, site.tar, [(path[1:], size) for path, size in SIZES.items()],
                            random.Random(content.SEED))
        tlspeer.write_certificate(site)
        for name in options.names:
            try:
                results["attacks"][name] = measure(name, site, options.rounds)
            except (Failed, OSError) as failure:        # the others go on
                print(f"{name} failed: {failure}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attacks.json").write_text(json.dumps(results, indent=1) + "\n")
    print(attack_report.write(options.out))


if __name__ == "__main__":
    main()
