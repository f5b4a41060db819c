"""An hour of everything at once: all kinds of clients, reloads, archives that are broken, workers that are killed.

    .venv/bin/python tests/soak.py [--minutes N] [--seed N] [--record]

Three servers: one whose archives and log are replaced and whose workers are killed, one that speaks TLS and gets new
certificates, and one that is left alone, so that one worker lives through all of it. At a moderate rate: it may run
beside other things. At the end memory, descriptors and Python's allocated blocks must be what they were at the
beginning, every response right, every connection over, and the servers' counts must be those of the clients.
Exit status 1 otherwise. --record writes SOAK.md and soak.png beside this file.
"""

import argparse
import contextlib
import datetime
import http.client
import itertools
import json
import mmap
import os
import platform
import re
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from certificates import Authority
from prometheus_client.parser import text_string_to_metric_families
from soak_clients import (
    BROKEN, CLAIMED, DRAIN, HEADER_TIMEOUT, KEEPALIVE_TIMEOUT, KINDS, MIN_RATE, PER_ADDRESS, TRUSTED, Crowd,
    SiteVersions, Target,
)
from support import PATIENCE, ROOT, Server, run_tarweb
from tlsclient import TlsServer, client_context

FOLDER = Path(__file__).resolve().parent
PERIOD, SAMPLES = 60, 6         # seconds from one reload to the next, and samples in that time
KILL_EVERY, ROTATE_EVERY, RENEW_EVERY = 5, 4, 15        # periods
WARM_UP = 0.1                   # of the time, which does not count
LONG = 1800                     # seconds; in less time memos are still being filled
# What the last quarter may be above the first one: a part of it, and so much besides. Blocks rise while memos fill, and
# fall when they are emptied, so of them the least is compared; of the others, the median.
GROWTH = 0.05
SUMMARIES = statistics.median, min, statistics.median
SLACK = {"memory": 2048, "blocks": 2000, "fds": 4}                  # KiB, blocks, descriptors
SLACK_OF_SHORT_RUNS = {"memory": 24 * 1024, "blocks": 150_000, "fds": 30}
EVENTS = {"disturbed": ("reloads", "refused", "kills", "rotations"), "secure": ("reloads", "renewals", "kills"),
          "quiet": ()}
ROLES = "parent", "workers", "status"
PATIENT = ("--header-timeout", str(HEADER_TIMEOUT), "--keepalive-timeout", str(KEEPALIVE_TIMEOUT),
           "--min-rate", str(MIN_RATE), "--drain", str(DRAIN))
EXPECTED = [                    # all that the servers may say
    r"reloaded: generation \d+ (serves|has the access log opened anew, and serves) .*",
    r"reload failed, generation \d+ still serves: .*\.tar.*",
    r"worker \d+ ended: SIGKILL; another one takes its place.*", r"TLS in userspace .*", r"TLS in the kernel .*",
    r"TLS connections: .*",
]

# The real program, which besides writes into memory shared with us how many blocks Python holds, each second; a process
# that is locked up can still do that. 32 bytes for each process: its id, the blocks, whether it is a worker.
PROGRAM = """
import mmap, os, struct, sys
sys.path.insert(0, sys.argv.pop(1))
with open(sys.argv.pop(1), "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
import clock, supervisor, tarweb
def recording(function, worker):
    def recorded(self, *arguments):
        struct.pack_into("=QQQ", memory, os.getpid() * 32 % len(memory), os.getpid(), sys.getallocatedblocks(),
                         worker and self.publish is not None)
        return function(self, *arguments)
    return recorded
clock.Clock.on_tick = recording(clock.Clock.on_tick, True)
supervisor.Supervisor.wait = recording(supervisor.Supervisor.wait, False)
sys.exit(tarweb.main())
"""
BLOCKS_SIZE = 1 << 20           # bytes of that memory


# --- a server ------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Of the processes of one role, at one time: KiB of anonymous memory, blocks, descriptors."""

    memory: int
    blocks: int
    fds: int


class Subject:
    """A server that is watched. `samples`: for each role [(time, Sample)]."""

    def __init__(self, name, folder, sites, flags=(), threads=1, pair=None, features=()):
        self.name, self.sites, self.threads, self.log_file = name, sites, threads, folder / f"{name}.log"
        self.logs = [self.log_file]
        self.samples = {role: [] for role in ROLES}
        self.status_path = folder / f"{name}.status"
        self.blocks_file = folder / f"{name}.blocks"
        self.blocks_file.write_bytes(bytes(BLOCKS_SIZE))
        with self.blocks_file.open("r+b") as file:
            self.blocks = mmap.mmap(file.fileno(), 0)
        self.done = dict.fromkeys(("reloads", "refused", "kills", "rotations", "renewals"), 0)
        hosts = [f"--site={host}={site.path}" for site in sites[1:] for host in site.hosts]
        kind, options = (TlsServer, {"pairs": [pair]}) if pair else (Server, {})
        self.server = kind(sites[0].path, *hosts, "--threads", str(threads), "--access-log", str(self.log_file),
                           "--status", f"unix:{self.status_path}", *PATIENT, *limit_of_addresses(), *flags, **options,
                           log=folder / f"{name}.stderr",
                           program=("-c", PROGRAM, str(ROOT), str(self.blocks_file)))
        self.pair = pair
        self.target = self.as_target({*features, "hosts"})

    def as_target(self, features):
        places = {"tcp": ("127.0.0.1", self.server.port)}
        context = None
        if "unix" in features:
            places["unix"] = str(self.status_path.with_suffix(".sock"))
        if self.pair:
            context = self.server.context
            places["redirect"] = "127.0.0.1", self.server.redirect_port
        if not limit_of_addresses():
            features.discard("limit")
        target = Target(self.name, self.sites, places, context, frozenset(features))
        target.old_context = self.pair and client_context(self.server.root, "1.2")
        return target

    # what it says of itself

    def page(self, path, statuses=(200,)):
        connection = http.client.HTTPConnection("status", timeout=PATIENCE)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        with contextlib.closing(connection):
            connection.sock.connect(str(self.status_path))
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status in statuses, f"{self.name}: {path} has status {response.status}"
            return response.read().decode()

    def metrics(self):
        """{name with its labels: value}."""
        return {" ".join((sample.name.removeprefix("tarweb_"), *sample.labels.values())): sample.value
                for family in text_string_to_metric_families(self.page("/metrics")) for sample in family.samples}

    def wait_for_number(self, name, value):
        wait_for(f"{self.name}: {name} is not {value:g}", lambda: self.metrics()[name] >= value)

    def connections(self):
        return sum(value for name, value in self.metrics().items() if name.startswith("connections "))

    def said(self):
        """What it has said that it should not have."""
        lines = [line.removeprefix("tarweb: ") for line in self.server.stderr().splitlines()]
        return [line for line in lines if not any(re.fullmatch(known, line) for known in EXPECTED)]

    # what the system says of it

    def roles(self):
        """{role: processes} of those that serve, without workers that retire."""
        children = self.server.workers
        status = [pid for pid in children if (seen := self.recorded(pid)) and not seen[1]]
        workers = [pid for pid in children if pid not in status][-self.threads:]
        return {"parent": [self.server.pid], "workers": workers, "status": status}

    def recorded(self, pid):
        """(blocks, whether it is a worker); None as long as it has not said so."""
        found, blocks, worker = struct.unpack_from("=QQQ", self.blocks, pid * 32 % BLOCKS_SIZE)
        return (blocks, worker) if found == pid else None

    def sample(self, now):
        for role, processes in self.roles().items():
            recorded = [self.recorded(pid) for pid in processes]
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):        # one of them has just ended
                if all(recorded) and len(processes) == (self.threads if role == "workers" else 1):
                    self.samples[role].append((now, Sample(
                        sum(map(own_memory, processes)), sum(blocks for blocks, _ in recorded),
                        sum(map(descriptors, processes)))))

    def settled(self):
        """Whether nobody is connected, and all processes serve."""
        return (len(self.server.workers) == self.threads + 1 and not self.connections()
                and [len(processes) for processes in self.roles().values()] == [1, self.threads, 1])

    def descriptors(self):
        """{role: descriptors}: the least of some counts, since who has asked for the metrics may still be leaving."""
        counts = {role: [] for role in ROLES}
        for _ in range(10):
            for role, processes in self.roles().items():
                counts[role].append(sum(map(descriptors, processes)))
            time.sleep(0.1)
        return {role: min(found) for role, found in counts.items()}

    def begin(self):
        """As at the end: everything replaced, nobody there."""
        self.replace_all()
        wait_for(f"{self.name}: not settled", self.settled)
        self.descriptors_before = self.descriptors()

    def end(self):
        self.last = self.metrics()
        self.replace_all()
        wait_for(f"{self.name}: not settled", self.settled)
        self.last, after = self.metrics(), self.descriptors()
        assert after == self.descriptors_before, (
            f"{self.name}: descriptors {self.descriptors_before} in the beginning, {after} in the end")

    # what is done to it

    def replace(self, sites, by_signal=True):
        """The next versions of these sites; all others are whole."""
        before = self.metrics()["reloads_total success"]
        for site in sites:
            site.write()
        for site in sites:
            site.place()
        if by_signal:
            self.server.process.send_signal(signal.SIGHUP)
        self.wait_for_number("reloads_total success", before + 1)
        for site in self.sites:
            site.floor = site.number
        self.done["reloads"] += 1

    def replace_all(self):
        if "reloads" in self.target.features:
            self.replace(self.sites)

    def spoil(self, site, how):
        """Something that is no archive, in the place of one."""
        before = self.metrics()
        site.spoil(how)
        self.server.process.send_signal(signal.SIGHUP)
        self.wait_for_number("reloads_total failure", before["reloads_total failure"] + 1)
        assert self.metrics()["reloads_total success"] == before["reloads_total success"], f"it has loaded {how}"
        self.done["refused"] += 1

    def kill(self, which):
        """A worker's sudden death."""
        before = self.metrics()["worker_restarts_total"]
        workers = self.roles()["workers"]
        self.target.kills.append(time.monotonic())
        os.kill(workers[which % len(workers)], signal.SIGKILL)
        self.wait_for_number("worker_restarts_total", before + 1)
        self.done["kills"] += 1

    def rotate(self):
        """Another access log."""
        before = self.metrics()["reloads_total success"]
        self.logs.append(self.log_file.with_suffix(f".log.{len(self.logs)}"))
        os.rename(self.log_file, self.logs[-1])
        self.server.process.send_signal(signal.SIGUSR1)
        self.wait_for_number("reloads_total success", before + 1)
        self.done["rotations"] += 1

    def renew(self, pair):
        """Another certificate and key in place of the present ones, which --watch is to see."""
        before = self.metrics()["reloads_total success"]
        os.replace(pair.key, self.pair.key)
        os.replace(pair.cert, self.pair.cert)
        self.wait_for_number("reloads_total success", before + 1)
        self.done["renewals"] += 1


def wait_for(what, condition):
    """Look five times a second whether it is so."""
    until = time.monotonic() + 3 * PATIENCE
    while not condition():
        assert time.monotonic() < until, f"{what}, after {3 * PATIENCE} s"
        time.sleep(0.2)


def limit_of_addresses():
    return ("--max-per-ip", str(PER_ADDRESS)) if "--max-per-ip" in run_tarweb("--help").stdout else ()


def own_memory(pid):
    """KiB, without what is mapped from files. (Anybody may read that, also of processes whose memory nobody may.)"""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def descriptors(pid):
    """How many; 0 where we may not know."""
    with contextlib.suppress(PermissionError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


# --- what happens --------------------------------------------------------------------------------------------------


class Soak:
    """All of it. `wrong`: what was not as it should be, in sentences."""

    def __init__(self, options, folder):
        self.seconds, self.seed = options.minutes * 60, options.seed
        self.period = options.period or min(PERIOD, self.seconds / 6)
        self.folder, self.authority = folder, Authority(folder)
        self.wrong, self.crowd = [], Crowd()
        self.over = threading.Event()
        self.subjects = []

    def run(self):
        try:
            self.start_servers()
            for subject in self.subjects:
                subject.begin()
            self.begin = time.monotonic()
            threads = [threading.Thread(target=self.trying, args=[what])
                       for what in (self.watch, self.disturb_plain, self.disturb_tls)]
            for thread in (*threads, *self.crowd.threads):
                thread.start()
            self.over.wait(self.seconds)
            self.over.set()
            for thread in threads:
                thread.join()
            self.crowd.end()
            self.judge()
        finally:
            self.over.set()
            self.crowd.over.set()
            for subject in self.subjects:
                self.stop(subject)

    def stop(self, subject):
        try:
            subject.server.stop()
        except AssertionError as error:
            self.wrong.append(f"{subject.name}: {error}")
        self.wrong += [f"{subject.name} said: {line}" for line in subject.said()]

    def start_servers(self):
        def sites(server, *names):
            return [SiteVersions(self.folder, f"{server}-{name}", hosts) for name, hosts in names]

        def unix(name):
            return "--listen", f"unix:{self.folder}/{name}.sock"

        three = ("default", ["localhost", "127.0.0.1"]), ("one", ["one.example"]), ("many", ["*.many.example"])
        proxied = "--proxy-from", f"{TRUSTED}/32"
        self.add("disturbed", sites("disturbed", *three), ("--watch", *proxied, *unix("disturbed")), 2,
                 features=("unix", "proxy", "reloads"))
        self.add("secure", sites("secure", *three[:2]), ("--watch", "--redirect-http", "127.0.0.1:0"),
                 pair=self.authority.issue("p256"), features=("redirect", "reloads"))
        self.add("quiet", sites("quiet", *three), (*proxied, *unix("quiet"), "--log-format", "json"),
                 features=("unix", "proxy", "limit"))

    def add(self, *arguments, **options):
        subject = Subject(arguments[0], self.folder, *arguments[1:], **options)
        self.subjects.append(subject)
        self.crowd.send_in(subject.target, self.seed)

    def trying(self, what):
        try:
            what()
        except Exception as error:              # whatever it is, the others go on
            self.wrong.append(f"{what.__name__}: {type(error).__name__}: {error}")

    def watch(self):
        """Look at all servers, again and again."""
        for number in itertools.count():
            for subject in self.subjects:
                subject.sample(time.monotonic() - self.begin)
                subject.page(("/", "/healthz")[number % 2])
                subject.page("/readyz", (200, 503) if subject.target.kills else (200,))     # at times nobody is there
            if self.over.wait(self.period / SAMPLES):
                return

    def disturb_plain(self):
        """In each period a new archive or one that cannot be served; now and then a kill, and a new log."""
        subject, pause = self.subjects[0], self.period / 3
        for number in itertools.count(1):
            if self.over.wait(pause) and number > 2:           # each thing at least once
                return
            site = subject.sites[(number + 1) // 2 % 3]         # what is spoilt is the next to be replaced
            if number % 2:
                subject.spoil(site, BROKEN[number // 2 % len(BROKEN)])
            else:
                subject.replace([site], number % 4)
            self.over.wait(pause)
            if number % KILL_EVERY == 1:
                subject.kill(number)
            self.over.wait(pause)
            if number % ROTATE_EVERY == 2:
                subject.rotate()

    def disturb_tls(self):
        """Seldom, so that workers live long enough to fill what they remember."""
        subject = self.subjects[1]
        for number in itertools.count(1):
            if self.over.wait(self.period) and number > 3:
                return
            if number % RENEW_EVERY == 1:
                subject.renew(self.authority.issue("p256"))
            elif number % RENEW_EVERY == 2:
                subject.replace([subject.sites[number // RENEW_EVERY % 2]], number % 2)
            elif number % (2 * RENEW_EVERY) == 3:
                subject.kill(0)

    # what came of it

    def judge(self):
        self.wrong += self.crowd.failures
        for subject in self.subjects:
            self.trying(subject.end)
            for judge in (self.judge_counts, self.judge_log, self.judge_growth, self.judge_visits):
                self.wrong += [f"{subject.name}: {words}" for words in judge(subject)]

    def judge_counts(self, subject):
        """The server's numbers, where there is something to hold against them."""
        now, done = subject.last, subject.done
        expected = {"worker_restarts_total": done["kills"], "ready": 1, "workers serving": subject.threads,
                    "workers draining": 0, "accept_errors_total": 0, "ring_overflows_total": 0,
                    "archive_faults_total": 0, "log_lines_dropped_total": 0, "connections_reclaimed_total": 0,
                    "reloads_total success": done["reloads"] + done["rotations"] + done["renewals"]}
        for name, value in expected.items():
            if now[name] != value:
                yield f"{name} is {now[name]:g}, not {value}"
        if self.crowd.tallies[subject.name, "resumed"] != self.crowd.tallies[subject.name, "to resume"]:
            yield (f"of {self.crowd.tallies[subject.name, 'to resume']} sessions "
                   f"{self.crowd.tallies[subject.name, 'resumed']} were resumed")
        yield from (f"no {event}" for event in EVENTS[subject.name] if not done[event])
        if not done["refused"] <= now["reloads_total failure"] <= 3 * done["refused"]:
            yield f"{now['reloads_total failure']:g} reloads failed, and {done['refused']} should have"

    def judge_log(self, subject):
        """A line for each response, and in it who was behind a proxy."""
        lines = [line for path in subject.logs for line in path.read_bytes().splitlines()]
        responses = sum(subject.last[f"responses_total {status}xx"] for status in range(2, 6))
        sent = subject.last["log_lines_total"]
        if not subject.done["kills"] and not len(lines) == sent == responses:
            yield f"{len(lines)} lines in the log, {sent:g} by its own count, {responses:g} responses"
        if len(lines) > responses + 1000 * subject.done["kills"]:
            yield f"{len(lines)} lines in the log and {responses:g} responses"
        if strange := [line for line in lines if not is_line(line)]:
            yield f"{len(strange)} strange lines in the log: {strange[0]!r}"
        claimed = sum(CLAIMED.encode() in line for line in lines)
        expected = self.crowd.tallies[subject.name, "proxied"]
        if claimed < expected - 1000 * subject.done["kills"]:
            yield f"{claimed} lines in the log for clients of proxies, {expected} answers to them"

    def judge_visits(self, subject):
        """Whether there were all that there should have been."""
        for kind in self.crowd.invited[subject.name]:
            if self.seconds >= LONG and not self.crowd.visits[subject.name, kind]:
                yield f"no visit of the kind {kind}"

    def judge_growth(self, subject):
        """Whether it has grown."""
        slack = SLACK if self.seconds >= LONG else SLACK_OF_SHORT_RUNS
        for role in ROLES:
            first, last = self.quarters(subject.samples[role])
            for name, most in slack.items():
                before, after = getattr(first, name), getattr(last, name)
                if after > before * (1 + GROWTH) + most:
                    yield f"{name} of {role} has grown from {before} to {after}"

    def quarters(self, samples):
        """What the first quarter, after the warm-up, and the last one come to."""
        warm = [sample for at, sample in samples if at >= WARM_UP * self.seconds]
        quarter = max(1, len(warm) // 4)
        return [Sample(*(int(summary(column)) for summary, column in zip(SUMMARIES, columns, strict=True)))
                for columns in (zip(*warm[:quarter], strict=True), zip(*warm[-quarter:], strict=True))]


def is_line(line):
    """Whether this is a line of an access log, from its beginning to its end."""
    if not line.startswith(b"{"):
        return re.fullmatch(rb'[^ ]+ - - \[[^]]+\] "[^"]*" \d{3} (\d+|-) "[^"]*" "[^"]*"', line)
    try:
        return {"remote", "time", "status", "bytes"} <= set(json.loads(line))
    except ValueError:
        return False


# --- in words ------------------------------------------------------------------------------------------------------


def report(soak):
    """What SOAK.md says."""
    servers = [subject.name for subject in soak.subjects]
    yield from ("# Soak", "", "Written by `make soak`: [soak.py](soak.py) says what is done, "
                "[soak_clients.py](soak_clients.py) by whom.", "")
    yield from (f"- {name}: {value}" for name, value in facts(soak).items())
    yield from ("", f"**{'Passed' if not soak.wrong else f'Failed: {len(soak.wrong)} things were wrong'}.**", "")
    yield from (f"    {line}" for words in soak.wrong[:20] for line in words.splitlines())
    yield from ("## Growth", "", f"The first quarter, after a warm-up of {WARM_UP:.0%} of the time, and the last one: "
                "the median of anonymous memory and of descriptors, the least of allocated blocks.", "")
    yield from rows(["server", "processes", "memory, KiB", "allocated blocks", "descriptors"], growth_rows(soak), 2)
    if soak.seconds >= LONG:
        yield from ("", f"Allowed: {GROWTH:.0%} and {SLACK['memory']} KiB, {SLACK['blocks']} blocks, {SLACK['fds']} "
                    "descriptors more. With nobody connected, descriptors are exactly those of the beginning.")
    yield from ("", "![memory and blocks](soak.png)", "", "## What happened", "")
    yield from rows(["", *servers], event_rows(soak))
    yield from ("", "## Visits", "", "By kind; in brackets, those that ended with a worker that was killed.", "")
    yield from rows(["kind", *servers], visit_rows(soak))


def rows(heads, cells, words=1):
    """The lines of a table, the first columns of which are words."""
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * words + "| ---: " * (len(heads) - words) + "|"
    for row in cells:
        yield f"| {' | '.join(row)} |"


def facts(soak):
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "time": f"{soak.seconds / 60:g} minutes, seed {soak.seed}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs",
        "Python": platform.python_version(),
        "tarweb": subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
                                 check=False).stdout.strip() or "unknown",
        "CPU seconds": " and ".join(f"{usage.ru_utime + usage.ru_stime:,.0f} of the {who}" for who, usage in (
            ("servers", resource.getrusage(resource.RUSAGE_CHILDREN)),
            ("clients", resource.getrusage(resource.RUSAGE_SELF)))),
        "flags": " ".join((*PATIENT, *limit_of_addresses())),
    }


def growth_rows(soak):
    for subject in soak.subjects:
        for role in ROLES:
            first, last = soak.quarters(subject.samples[role])
            cells = (f"{before:,} → {after:,}" for before, after in zip(first, last, strict=True))
            yield [subject.name, role, *cells]


def event_rows(soak):
    names = {"responses": lambda subject: sum(subject.last[f"responses_total {n}xx"] for n in range(1, 6)),
             "bytes sent": lambda subject: subject.last["sent_bytes_total"],
             "connections": lambda subject: subject.last["connections_accepted_total"],
             "TLS handshakes": lambda subject: sum(value for name, value in subject.last.items()
                                                   if name.startswith("handshakes_total")),
             "connections that timed out": lambda subject: subject.last["connections_timed_out_total"],
             "PROXY headers refused": lambda subject: subject.last["proxy_refused_total"],
             "new archives": lambda subject: subject.done["reloads"],
             "broken archives refused": lambda subject: subject.done["refused"],
             "new certificates": lambda subject: subject.done["renewals"],
             "logs rotated": lambda subject: subject.done["rotations"],
             "workers killed": lambda subject: subject.done["kills"],
             "visits lost by that": lambda subject: sum(count for (name, _), count in soak.crowd.lost.items()
                                                        if name == subject.name)}
    for name, value in names.items():
        yield [name, *(f"{int(value(subject)):,}" for subject in soak.subjects)]


def visit_rows(soak):
    for kind in (kind.__name__ for kind in KINDS):
        cells = []
        for subject in soak.subjects:
            key = subject.name, kind
            cells.append(f"{soak.crowd.visits[key]:,}" + f" ({soak.crowd.lost[key]})" * bool(soak.crowd.lost[key])
                         if soak.crowd.visits[key] else "")
        yield [kind.replace("_", " "), *cells]


def draw(soak, path):
    """Memory and blocks over the time, for each role of each server."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(soak.subjects), figsize=(12, 5), layout="constrained", squeeze=False)
    for row, (name, unit, words) in enumerate((("memory", 1024, "MiB"), ("blocks", 1000, "thousands of blocks"))):
        for column, subject in enumerate(soak.subjects):
            place = axes[row][column]
            for role, samples in subject.samples.items():
                place.plot([at / 60 for at, _ in samples],
                           [getattr(sample, name) / unit for _, sample in samples], label=role, linewidth=1)
            place.set_ylim(0)
            place.set_title(f"{subject.name}: {words}", fontsize=9)
    axes[1][0].set_xlabel("minutes")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Serve everybody for an hour, and see whether anything grows.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--period", type=float, help=f"seconds between reloads (default: {PERIOD}, or less)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write SOAK.md and soak.png")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to (default: beside this file)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # and end the servers
    with tempfile.TemporaryDirectory(prefix="tarweb-soak-") as folder:
        soak = Soak(options, Path(folder))
        soak.run()
    text = "\n".join(report(soak)) + "\n"
    print(text)
    if options.record:
        draw(soak, options.out / "soak.png")
        (options.out / "SOAK.md").write_text(text)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
