"""Clients that mean harm, those of bench/attack_clients.py: none of them costs others their answers.

P8, P9, P10, P11 and P12 of the README. What the same clients cost beside nginx: bench/ATTACKS.md.
"""

import asyncio
import contextlib
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import PATIENCE, ROOT, Server, build_tar, noise, wait_until
from test_front import metric, status_port
from tlsclient import client_hello

sys.path.insert(0, str(ROOT / "bench"))
import attack_clients
from attack_clients import ATTACKS, HUGE, SIZES, SMALL, SOURCES, STATES, get

PLACES = 40
STATUS = "--status", "127.0.0.1:0"
NO_HURRY = "--header-timeout", "60", "--keepalive-timeout", "60"
AT_ONCE = "--header-timeout", "1", "--keepalive-timeout", "1"
FILES = {path[1:]: noise(size, seed=size) for path, size in (SIZES | {HUGE: 16 << 20}).items()}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The tar that the clients attack."""
    return build_tar(tmp_path_factory.mktemp("target") / "target.tar", FILES)


@pytest.fixture(scope="module")
def tough(target, tmp_path_factory):
    """A server that all of P8's clients come to, one after the other."""
    log = tmp_path_factory.mktemp("tough") / "stderr"
    server = Server(target, *NO_HURRY, "--max-connections", str(PLACES), log=log)
    workers = server.workers
    yield server
    assert server.workers == workers, "a worker has died"
    server.stop()


def all_at_once(*clients, seconds=PATIENCE):
    """Run these coroutines together, to their end."""
    async def together():
        await asyncio.wait_for(asyncio.gather(*clients), seconds)
    asyncio.run(together())


def wave(server, attack, count):
    """`count` clients at a time of an attack, each for one connection."""
    all_at_once(*(attack_clients.once(attack, server.port) for _ in range(count)))


@contextlib.contextmanager
def table_of(connect, *pieces, count=PLACES):
    """So many connections, made and kept by `connect`; each piece is sent on all of them before the next one."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect()) for _ in range(count)]
        for piece in pieces:
            for client in clients:
                client.send(piece)
        yield clients


def is_served(server):
    """A visitor comes, and gets the right file."""
    return server.fetch(SMALL).body == FILES[SMALL[1:]]


# --- P8: no bytes from a peer end a worker -------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_p08_a_reset_in_every_state(tough, state):
    async def client(peer):
        await attack_clients.rst(peer, state)
    wave(tough, replace(ATTACKS["rst"], client=client), 10)
    assert is_served(tough)
    tough.check()


def test_p08_random_bytes(tough):
    attack_clients.CHANCE.seed(8)
    wave(tough, ATTACKS["garbage"], 30)
    assert is_served(tough)
    tough.check()


RIGHT = {
    "a long line": (get("/" + "a" * 10_000), 414), "an endless line": (b"G" * 20_000, 414),
    "many fields": (get(SMALL, *["X-A: b"] * 3000), 431), "one long field": (get(SMALL, "X-A: " + "b" * 20_000), 431),
    "no head at all": (b"\0" * 100 + b"\r\n\r\n", 400), "TLS": (b"\x16\3\1\2\0\1\0\1\xfc\3\3" + bytes(600), 400),
    "another version": (b"GET / HTTP/3.0\r\nHost: t\r\n\r\n", 505),
    "an endless body": (get(SMALL, "Content-Length: 99999999999"), 200),
    "400 ranges": (get(SMALL, "Range: bytes=" + ",".join(f"{at}-{at}" for at in range(0, 800, 2))), 200),
    "a range 60 times": (get(SMALL, "Range: bytes=" + ",".join(["0-"] * 60)), 206),
    "900 codings": (get(SMALL, "Accept-Encoding: " + "gzip;q=0.001," * 900), 200),
    "2000 tags": (get(SMALL, "If-None-Match: " + '"a",' * 2000 + '"b"'), 200),
}


@pytest.mark.parametrize("case", RIGHT)
def test_p08_the_right_status(tough, case):
    raw, status = RIGHT[case]
    with tough.connect() as client:
        client.send(raw)
        assert client.response().status == status
    assert is_served(tough)
    tough.check()


@pytest.mark.parametrize("part", [0, 3, 5, 40, None], ids=lambda part: f"{part} bytes")
@pytest.mark.parametrize("answered", [False, True], ids=["at once", "after the answer"])
def test_p08_a_reset_in_a_handshake(tls_server, part, answered):
    hello = client_hello(tls_server.context)
    for _ in range(10):
        client = tls_server.connect_raw()
        client.send(hello[:part])
        if answered and part is None:
            client.sock.recv(1)
        client.reset()
    assert tls_server.fetch("/next").status == 200


# --- P9: memory is bounded -----------------------------------------------------------------------------------------


async def memo_flood(peer):
    """Two waves of two of these are more than the memo holds."""
    await attack_clients.memo_flood(peer, 850)


def brief(client):
    """A client that leaves, without a goodbye, after a moment."""
    async def leaving(peer):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client(peer), 0.2)
        peer.reset()
    return leaving


WAVES = {       # attack: (what each client does, clients at a time)
    "header-bomb": (brief(attack_clients.header_bomb), 4), "memo-flood": (memo_flood, 2),
    "never-read": (brief(attack_clients.never_read), PLACES),
    "tiny-window": (brief(attack_clients.tiny_window), 8), "range-bomb": (brief(attack_clients.range_bomb), 8),
    "slow-body": (brief(attack_clients.slow_body), PLACES), "garbage": (attack_clients.garbage, 4 * PLACES),
    "rst": (attack_clients.rst, 4 * PLACES),
}
MARGIN = 3 << 20        # bytes: holes where requests have waited; less than 40 KiB for each client of two waves


@pytest.mark.parametrize("name", WAVES)
def test_p09_memory_is_what_it_was_after_the_first_attacks(start, target, name):
    server = start(target, *NO_HURRY, "--max-connections", str(PLACES))
    client, count = WAVES[name]
    attack, sizes = replace(ATTACKS[name], client=client), []
    for _ in range(4):
        wave(server, attack, count)
        assert is_served(server)
        sizes.append(server.anonymous_memory())
    assert max(sizes[2:]) - max(sizes[:2]) < MARGIN, sizes


def test_p09_what_is_not_read_is_not_piled_up_in_the_kernel(start, target):
    """The bytes that a response in progress has left the server with, seen at the client that does not read them."""
    server = start(target, *NO_HURRY)
    with table_of(lambda: server.connect(rcvbuf=attack_clients.WINDOW), get(HUGE), count=8) as clients:
        assert is_served(server)
        ports = {client.sock.getsockname()[1] for client in clients}
        wait_until(lambda: min(queued(server.port, ports), default=0) > 0)
        assert settled(lambda: max(queued(server.port, ports))) < 1 << 20


def queued(port, clients):
    """Bytes in the send queue of each connection from the server's `port` to those of `clients` (proc_net_tcp)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[4].partition(":")[0], 16) for row in rows
            if int(row[1][-4:], 16) == port and int(row[2][-4:], 16) in clients]


def settled(number):
    """What it is, once that does not change any more."""
    before = None
    while before != (before := number()):
        time.sleep(0.3)
    return before


# --- P10: every connection ends ------------------------------------------------------------------------------------


def test_p10_who_says_nothing_or_too_little_is_let_go(start, target):
    """The clients themselves would stay for ever."""
    server = start(target, *AT_ONCE)
    all_at_once(*(attack_clients.once(ATTACKS[name], server.port)
                  for name in ("silent", "idle", "slow-head", "slow-body") for _ in range(8)))


def test_p10_half_a_handshake_is_let_go(start_tls, target):
    server = start_tls(target, *AT_ONCE)
    all_at_once(*(attack_clients.once(ATTACKS[name], server.port) for name in ("silent", "half-tls") for _ in range(8)))
    assert server.ended().failed == 16


# --- P11: one address holds so many --------------------------------------------------------------------------------


def from_address(server, address):
    """A client that comes from there."""
    sock = socket.create_connection((attack_clients.HOST, server.port), PATIENCE, source_address=(address, 0))
    return contextlib.closing(sock)


def test_p11_few_addresses_cannot_fill_the_table(start, target):
    server = start(target, *NO_HURRY, "--max-connections", str(PLACES), "--max-per-ip", "8")
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            for source in SOURCES:
                stack.enter_context(from_address(server, source))
        assert is_served(server)
        for source in SOURCES:
            assert stack.enter_context(from_address(server, source)).recv(1) == b"", "one more than it may have"
        assert is_served(server)


# --- P12: others get in --------------------------------------------------------------------------------------------

WAITING = {     # what a connection that waits for its client has brought, and brings once more
    "silent": (), "half a head": (get(SMALL)[:-2], b"X-"), "half a body": (get(SMALL, "Content-Length: 99"), b"b"),
    "half a chunk": (get(SMALL, "Transfer-Encoding: chunked") + b"ff\r\n", b"b"),
}


@pytest.mark.parametrize("state", WAITING)
def test_p12_a_full_table_makes_room(start, target, state):
    """Nobody's time is up: it is for newcomers that who has waited longest has to go, whatever they still trickle."""
    server = start(target, *NO_HURRY, "--max-connections", str(PLACES))
    with table_of(lambda: server.connect(), *WAITING[state]) as clients:
        for _ in range(3):
            assert is_served(server)
        assert not clients[0].rest().startswith(b"HTTP/1.1 4"), "it was its time, not the newcomers"


def test_p12_a_table_full_of_handshakes_makes_room(start_tls, target):
    server = start_tls(target, *NO_HURRY, "--max-connections", str(PLACES))
    with table_of(lambda: server.connect_raw(), attack_clients.client_hello()):
        for _ in range(3):
            assert is_served(server)


def test_p10_p12_who_does_not_read(start, target):
    """Cut off for newcomers; where there are none, after ten seconds that are granted to all, by the rate.

    Both at a time, since the latter takes so long; which is the proof that the former was not that.
    """
    strict = start(target, *NO_HURRY, *STATUS, "--min-rate", "10000000")
    lenient = start(target, *NO_HURRY, "--min-rate", "1", "--max-connections", str(PLACES))
    port = status_port(strict)
    with (table_of(lambda: strict.connect(rcvbuf=attack_clients.WINDOW), get(HUGE) * 2, count=8),
          table_of(lambda: lenient.connect(rcvbuf=attack_clients.WINDOW), get(HUGE))):
        for _ in range(3):
            assert is_served(lenient)
        assert metric(port, "connections_timed_out_total") == 0
        wait_until(lambda: metric(port, "connections_timed_out_total") == 8)
        assert is_served(strict)


def test_p12_who_reads_is_not_cut_off_for_newcomers(start, target):
    """Slower than a piece in the time that it would be granted. Those around it do not read, nor do the newcomers, and
    for each of these one of those goes."""
    server = start(target, *NO_HURRY, "--min-rate", "1", "--max-connections", str(PLACES))
    with (table_of(lambda: server.connect(rcvbuf=attack_clients.WINDOW), get(HUGE), count=PLACES - 1),
          server.connect(rcvbuf=65_536) as reader, contextlib.ExitStack() as stack):
        reader.send(get(HUGE))
        read = b""
        for _ in range(PLACES - 5):
            newcomer = stack.enter_context(server.connect(rcvbuf=attack_clients.WINDOW))
            newcomer.send(get(HUGE))
            assert newcomer.sock.recv(100).startswith(b"HTTP/1.1 200 ")
            read += reader.sock.recv(30_000)
            time.sleep(0.1)  # the slowness that is tested: 300 kB/s at the most
        reader.pending = read
        assert reader.response().body == FILES[HUGE[1:]]
