"""The cases that compare CPU for each request: what is asked, how a round is measured, and how rounds alternate."""

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import load
import procfs
import tlspeer
from content import MANY, PAGES, SEED, SIZES
from servers import (
    ACCESS_LOG, ALL, CLIENT_CORE, CORES, FLOOR_PATH, PROGRAMS, TLS_SERVERS, Failed, available, serving,
)

WARM_UP = 1                    # seconds, once for each server and case
SETTLE = 0.1                   # seconds after a round, for the work of connections that wrk has left
WAITING = 2_000                # lines of an access log that may be in a buffer still: 64 KiB, and more
BOMB = 15 << 10                # bytes of a request: tarweb takes 16 KiB at most
RANGE = 1 << 10                # bytes of a range, on average
TOLERANCE = 0.03               # by how much the mean size of answers may differ from what is expected


# What a round expects, learnt from the server before it. Each of these functions gives more arguments for wrk.lua, and
# the least and the most bytes that an answer may have on average, its head included; it raises Failed where the server
# does not answer as the case needs. wrk counts answers, bytes, and statuses from 400 on: to have it look at each answer
# would cost the client time.

def whole_file(_server, case):
    """Every answer has all of the file."""
    return (), (SIZES.get(case.path[1:], 1 << 10), math.inf)


def not_found(server, case):
    """Every answer is a 404."""
    agents = "wrk", load.BROWSER["User-Agent"]          # nginx pads what it answers to Chrome
    sizes = []
    for agent in agents:
        with tlspeer.connect(server) as connection:     # http.server closes it after a 404
            request = load.get(f"{case.path}.{os.urandom(8).hex()}", server.port, f"User-Agent: {agent}")
            sizes.append(sum(map(len, load.exchange(connection, request, 404))))
    return (), near(min(sizes), max(sizes))


def validators(server, case):
    """Half of the answers, those to requests with the server's own validators, are 304s, and the others whole files."""
    lines, sizes = [], [0, 0]
    with tlspeer.connect(server) as connection:
        for page in range(PAGES):
            path = case.path.replace("0.html", f"{page}.html")
            full = load.exchange(connection, load.get(path, server.port))
            lines.append(conditions(full[0]))
            unmodified = load.exchange(connection, load.get(path, server.port, lines[-1]), 304)
            for kind, answer in enumerate((full, unmodified)):
                sizes[kind] += sum(map(len, answer))
    return lines, near(sum(sizes) / 2 / PAGES)


def conditions(head):
    """The lines of a request that ask for what has changed since an answer with this head."""
    found = {name.lower(): value for name, value in re.findall(r"([\w-]+): *(.+?)\r\n", head.decode())}
    pairs = ("If-None-Match", found.get("etag")), ("If-Modified-Since", found.get("last-modified"))
    return "\r\n".join(f"{name}: {value}" for name, value in pairs if value)


def small_range(server, case):
    """Every answer is a range of the file."""
    first = SIZES[case.path[1:]] // 2
    with tlspeer.connect(server) as connection:
        _, whole = load.exchange(connection, load.get(case.path, server.port))
        request = load.get(case.path, server.port, f"Range: bytes={first}-{first + RANGE - 1}")
        head, part = load.exchange(connection, request, 206)
    if part != whole[first:first + RANGE]:
        raise Failed(f"{server.name}: a range of {case.path} is not what it should be")
    return (), near(len(head) + RANGE)


def near(least, most=None):
    """What the mean size may be where it ought to be `least`, or up to `most`."""
    return least * (1 - TOLERANCE), (most or least) * (1 + TOLERANCE)


@dataclass(frozen=True)
class Setup:
    """A server as only some cases have it. `flags`: as serving takes them. `base`: the setup it is compared with."""

    server: str
    flags: tuple = ()
    base: str = "nginx"


LOG = f"@DIR@/{ACCESS_LOG}"
LOGGED = {
    "tarweb": Setup("tarweb"),
    "tarweb, combined": Setup("tarweb", ("--access-log", LOG), "tarweb"),
    "tarweb, json": Setup("tarweb", ("--access-log", LOG, "--log-format", "json"), "tarweb"),
    "nginx": Setup("nginx"),
    "nginx, combined": Setup("nginx", (f"LOG={LOG} combined buffer=64k flush=1s",)),
}
TWO = {
    "tarweb, 2 workers": Setup("tarweb", ("--threads", "2"), "nginx, 2 workers"),
    "tarweb, 1 worker": Setup("tarweb", (), "nginx, 2 workers"),
    "nginx, 2 workers": Setup("nginx", ("WORKERS=2",), "nginx, 2 workers"),
}


@dataclass(frozen=True)
class Case:
    """One kind of traffic. `per` is what CPU is divided by: "request" or "MiB".

    `tls` is "" for plain HTTP. Over TLS it says how a connection begins: "kept" for however wrk does it, where
    connections last; where each request has one of its own, "resumed", or "full" for a full handshake.
    """

    title: str
    path: str
    connections: int = 64
    headers: dict = field(default_factory=dict)
    asks: tuple = ()               # wrk.lua's arguments; "TAG" becomes a word never used before
    learn: Callable = whole_file   # what a round expects: see above
    missing: bool = False          # whether every answer has to be an error
    servers: tuple = ALL           # those that can answer it
    per: str = "request"
    longest: int = 3               # seconds a round may take
    tls: str = ""
    setups: dict = field(default_factory=dict)     # {name: Setup} where it is not simply all servers
    cores: int = 1                 # 2: servers and client share two of them, instead of one for each side


CASES = {
    "small": Case("1 KiB, keep-alive", FLOOR_PATH, servers=(*ALL, "floor")),
    "browser": Case("1 KiB, a browser's header block", FLOOR_PATH, headers=load.BROWSER, servers=(*ALL, "floor")),
    "miss": Case("1 KiB, no two URLs alike", "/small/1k.bin", headers=load.BROWSER, asks=("unique", "TAG")),
    "files": Case(f"{MANY:,} files of 1 KiB, shuffled", "/many/", headers=load.BROWSER, asks=("files", MANY, SEED)),
    "mix": Case("1 KiB, as browsers ask: hardly two requests alike", "/pages/f0.html", asks=("mix", PAGES, "TAG")),
    "missing": Case("404, no two URLs alike, as browsers ask", "/pages/f0.html", asks=("missing", PAGES, "TAG"),
                    learn=not_found, missing=True),
    "conditional": Case("1 KiB, as browsers ask, half of it not modified (304)", "/pages/f0.html",
                        asks=("conditional", PAGES, "TAG"), learn=validators),
    "ranges": Case("ranges of 1 KiB of 1 MiB, as browsers ask", "/large/1m.bin",
                   asks=("ranges", PAGES, "TAG", SIZES["large/1m.bin"]), learn=small_range, servers=PROGRAMS),
    "bombs": Case("1 KiB, asked for with 15 KiB of header fields, never the same", "/small/1k.bin",
                  asks=("bombs", BOMB, "TAG"), servers=PROGRAMS),
    "24k": Case("24 KiB", "/medium/24k.bin"),
    "1m": Case("1 MiB", "/large/1m.bin", connections=16, per="MiB"),
    "100m": Case("100 MiB", "/large/100m.bin", connections=4, per="MiB"),
    # Short, so that a round's connections stay about as many as the client's ports.
    "newconn": Case("1 KiB, a connection for each request", "/small/1k.bin",
                    headers={"Connection": "close"}, longest=1),
    "log": Case("1 KiB, keep-alive, access log", "/small/1k.bin", setups=LOGGED),
    "log-miss": Case("1 KiB, no two URLs alike, access log", "/small/1k.bin", headers=load.BROWSER,
                     asks=("unique", "TAG"), setups=LOGGED),
    "two": Case("1 KiB, keep-alive, servers and client together on two cores", "/small/1k.bin", setups=TWO, cores=2),
    "tls-small": Case("TLS: 1 KiB, keep-alive", "/small/1k.bin", tls="kept"),
    "tls-browser": Case("TLS: 1 KiB, a browser's header block", "/small/1k.bin", headers=load.BROWSER, tls="kept"),
    "tls-mix": Case("TLS: 1 KiB, as browsers ask: hardly two requests alike", "/pages/f0.html",
                    asks=("mix", PAGES, "TAG"), tls="kept"),
    "tls-24k": Case("TLS: 24 KiB", "/medium/24k.bin", tls="kept"),
    "tls-1m": Case("TLS: 1 MiB", "/large/1m.bin", connections=16, per="MiB", tls="kept"),
    # The client takes twice the CPU that the server does: four of its processes keep the server supplied.
    "tls-handshake": Case("TLS: 1 KiB, a full handshake for each request", "/small/1k.bin", connections=4, tls="full"),
    "tls-resume": Case("TLS: 1 KiB, a resumed connection for each request", "/small/1k.bin",
                       headers={"Connection": "close"}, tls="resumed"),
}


def measure(name, site, rounds, seconds):
    """Run case `name`, the servers taking turns.

    Gives {"title", "per", "connections", "servers": {name: [round, ...]}, "bases": {name: that of what its CPU is a
    multiple of, where it is not "nginx"}, "tls": version and cipher, or ""}.
    """
    case, setups = CASES[name], setups_of(CASES[name])
    if case.tls:
        tlspeer.write_certificate(site)
    with contextlib.ExitStack() as stack:
        results: dict[str, list] = {each: [] for each in setups}
        servers = warm_servers(name, site, setups, results, stack)
        spoken = tlspeer.agreement(servers.values(), site) if case.tls else ""
        for number in range(rounds):
            for each, server in servers.items():
                result = one_round(server, case, min(seconds, case.longest))
                results[each].append(result)
                tell(name, number, each, result)
    bases = {each: setup.base for each, setup in setups.items() if case.setups}
    return {"title": case.title, "per": case.per, "connections": case.connections, "servers": results, "bases": bases,
            "tls": spoken}


def setups_of(case):
    """The setups that `case` compares, of servers that can be measured here: {name: Setup}."""
    setups = case.setups or {each: Setup(each) for each in (TLS_SERVERS if case.tls else case.servers)}
    return {name: setup for name, setup in setups.items() if setup.server in available()}


def warm_servers(name, site, setups, results, stack):
    """Start the servers of case `name`; gives those that did start, by name, and notes in `results` why not."""
    servers = {}
    for each, setup in setups.items():
        try:
            servers[each] = warm_server(setup, CASES[name], site, stack)
        except (Failed, OSError) as failure:
            results[each].append({"errors": [str(failure)]})
            tell(name, 0, each, results[each][0])
    return servers


def warm_server(setup, case, site, stack):
    """Start a server, end it with `stack`, and see that it serves the right file; gives the Server, warmed up."""
    server = stack.enter_context(serving(setup.server, site, setup.flags, CORES[:case.cores], bool(case.tls)))
    check_content(server, case, site)
    if case.tls == "resumed":
        tlspeer.check_resumption(server, case.path)
    one_round(server, case, WARM_UP)
    return server


def check_content(server, case, site):
    """Raise Failed unless `server` serves the very bytes that are in the site's directory."""
    path = case.path + "00000.bin" if case.path.endswith("/") else case.path
    with tlspeer.connect(server) as connection:
        _, body = load.ask(connection, load.get(path, server.port))
    if body != (site.directory / path[1:]).read_bytes():
        raise Failed(f"{server.name}: {path} is not what it should be")


def one_round(server, case, seconds):
    """Load `server` for `seconds`.

    Gives CPU microseconds of the server for each unit ("cpu", split into "user" and "system") and of the client
    ("client"), "requests" served, requests/s ("rate"), and "errors": words for whatever makes the round worthless.
    """
    asks, sizes = case.learn(server, case)
    pids = server.pids
    cpu, ticks = procfs.cpu_seconds(pids), procfs.stat(pids, "utime", "stime")
    result = put_load(server, case, seconds, asks)
    time.sleep(SETTLE)
    cpu = procfs.cpu_seconds(pids) - cpu
    user, system = (now - then for now, then in zip(procfs.stat(pids, "utime", "stime"), ticks, strict=True))
    units = result["bytes"] / (1 << 20) if case.per == "MiB" else result["requests"]
    if not result["requests"]:
        return {"errors": ["nothing served"]}
    each = cpu / units * 1e6
    return {
        "cpu": each,
        "user": each * user / max(1, user + system),      # the clock does not tell them apart, the ticks do
        "system": each * system / max(1, user + system),
        "client": result["client"] / units * 1e6,
        "requests": result["requests"],
        "rate": result["requests"] / result["seconds"],
        "errors": problems(result, case, sizes) + unlogged(server, result["requests"]),
    }


def put_load(server, case, seconds, more):
    """Load `server` as the case says, with `more` arguments for wrk.lua; gives what load.wrk gives."""
    if case.tls == "full":
        return load.handshakes(server, case.path, case.connections, seconds)
    asks = [*(os.urandom(8).hex() if word == "TAG" else word for word in case.asks), *more]
    cores = CORES[:2] if case.cores == 2 else [CLIENT_CORE]
    return load.wrk(server.url(case.path), case.connections, seconds, case.headers, asks, cores)


def problems(result, case, sizes):
    """What is wrong with a round: the client's errors, or answers of which the mean size is not between `sizes`."""
    errors = dict(result["errors"])
    said = []
    if case.missing and (refused := errors.pop("status", 0)) < result["requests"]:
        said.append(f"{result['requests'] - refused} answers that are no errors")
    said += [f"{count} {kind} errors" for kind, count in errors.items()]
    least, most = sizes
    mean = result["bytes"] / result["requests"]
    if not least <= mean <= most:
        said.append(f"answers of {mean:.0f} bytes on average instead of {least:.0f} to {most:.0f}")
    return said


def unlogged(server, requests):
    """What is wrong with the access log, if there is one: too few lines. Empties it."""
    if not server.log.exists():
        return []
    with server.log.open("r+b") as file:
        lines = sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
        file.truncate(0)
    return [] if lines >= requests - WAITING else [f"{lines} lines logged of {requests} requests"]


def tell(case, number, server, result):
    """One line of progress on stderr."""
    figures = f"{result['cpu']:9.2f} us CPU {result['rate']:9.0f} requests/s" if "cpu" in result else ""
    print(f"{case} {number + 1} {server:17} {figures} {', '.join(result['errors'])}", file=sys.stderr)
