"""The cases that compare CPU for each request: what is asked, how a round is measured, and how rounds alternate."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, field

import load
import procfs
import tlspeer
from content import MANY, PAGES, SEED, SIZES
from servers import ACCESS_LOG, CLIENT_CORE, CORES, TLS_SERVERS, Failed, available, serving

WARM_UP = 1                    # seconds, once for each server and case
SETTLE = 0.1                   # seconds after a round, for the work of connections that wrk has left
WAITING = 2_000                # lines of an access log that may be in a buffer still: 64 KiB, and more


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
    per: str = "request"
    longest: int = 3               # seconds a round may take
    tls: str = ""
    setups: dict = field(default_factory=dict)     # {name: Setup} where it is not simply all servers
    cores: int = 1                 # 2: servers and client share two of them, instead of one for each side


CASES = {
    "small": Case("1 KiB, keep-alive", "/small/1k.bin"),
    "browser": Case("1 KiB, a browser's header block", "/small/1k.bin", headers=load.BROWSER),
    "miss": Case("1 KiB, no two URLs alike", "/small/1k.bin", headers=load.BROWSER, asks=("unique", "TAG")),
    "files": Case(f"{MANY:,} files of 1 KiB, shuffled", "/many/", headers=load.BROWSER, asks=("files", MANY, SEED)),
    "mix": Case("1 KiB, as browsers ask: hardly two requests alike", "/pages/f0.html", asks=("mix", PAGES, "TAG")),
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
    setups = case.setups or {each: Setup(each) for each in available() if not case.tls or each in TLS_SERVERS}
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
    pids = server.pids
    cpu, ticks = procfs.cpu_seconds(pids), procfs.stat(pids, "utime", "stime")
    result = put_load(server, case, seconds)
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
        "errors": problems(result, case) + unlogged(server, result["requests"]),
    }


def put_load(server, case, seconds):
    """Load `server` as the case says; gives what load.wrk gives."""
    if case.tls == "full":
        return load.handshakes(server, case.path, case.connections, seconds)
    asks = [os.urandom(8).hex() if word == "TAG" else word for word in case.asks]
    cores = CORES[:2] if case.cores == 2 else [CLIENT_CORE]
    return load.wrk(server.url(case.path), case.connections, seconds, case.headers, asks, cores)


def problems(result, case):
    """What is wrong with a round: the client's errors, or answers too short to hold the file."""
    said = [f"{count} {kind} errors" for kind, count in result["errors"].items()]
    if result["bytes"] < result["requests"] * SIZES.get(case.path[1:], 1 << 10):
        said.append("short answers")
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
