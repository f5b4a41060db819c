"""Hostile clients: what each does with a connection, and crowds of them. They reach loopback alone.

    python3 bench/attack_clients.py NAME PORT [--count N] [--rate N] [--seconds N]

A client is a coroutine that gets one connected Peer; when it returns or its connection ends, the crowd opens another.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import re
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass

HOST = "127.0.0.1"
SOURCES = tuple(f"127.0.1.{number}" for number in range(1, 5))  # where crowds come from: others can be told from them
WINDOW = 2_304                  # the smallest receive buffer that Linux gives: some hundred bytes of window
PAUSE = 1                       # seconds between two words of a slow client
SMALL, MEDIUM, LARGE, HUGE = "/small/1k.bin", "/medium/24k.bin", "/large/1m.bin", "/large/64m.bin"
SIZES = {SMALL: 1 << 10, MEDIUM: 24 << 10, LARGE: 1 << 20, HUGE: 64 << 20}      # what a site under attack has to hold
IP_BIND_ADDRESS_NO_PORT = 24    # <linux/in.h>; Python 3.11 has no name for it


def get(target, *fields, method="GET"):
    """The bytes of a request."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: t", *fields, "", ""]).encode()


class Peer:
    """One connection to the server, of which each byte is asked for or sent by hand."""

    def __init__(self, sock):
        self.sock, self.loop = sock, asyncio.get_running_loop()

    async def send(self, data):
        await self.loop.sock_sendall(self.sock, data)

    async def receive(self, size=1 << 18):
        """Some bytes, b"" at the end."""
        return await self.loop.sock_recv(self.sock, size)

    async def end(self):
        """Read past all that comes until the server closes."""
        while await self.receive():
            pass

    async def trickle(self, data):
        """Send `data` again and again, with pauses, until the server closes."""
        end = asyncio.ensure_future(self.end())
        try:
            while not (await asyncio.wait([end], timeout=PAUSE))[0]:
                await self.send(data)
        finally:
            end.cancel()

    async def ask(self, request):
        """Send a request and read its whole answer. ConnectionError where there is none."""
        await self.send(request)
        answer = await self.more(b"")
        while (head := re.search(rb"(?i)\r\ncontent-length: *(\d+)\r\n(?s:.*?)\r\n\r\n", answer)) is None:
            answer += await self.more(answer)
        missing = head.end() + int(head[1]) - len(answer)
        while missing > 0:
            missing -= len(await self.more(answer))

    async def more(self, answer):
        if not (piece := await self.receive()):
            raise ConnectionError(f"after {answer[:100]!r} came the end")
        return piece

    def reset(self):
        """End the connection with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


# --- those who take places and do nothing with them ----------------------------------------------------------------


async def silent(peer):
    await peer.end()


async def idle(peer):
    await peer.ask(get(SMALL))
    await peer.end()


async def slow_head(peer):
    await peer.send(get(SMALL).removesuffix(b"\r\n"))
    await peer.trickle(b"X-A: b\r\n")


async def slow_body(peer):
    await peer.send(get(SMALL, "Content-Length: 60000"))
    await peer.trickle(b"b")


async def slow_read(peer):
    """A hundred bytes a second of a large file."""
    await peer.send(get(HUGE))
    while await peer.receive(100):
        await asyncio.sleep(PAUSE)


async def never_read(peer):
    """Requests as many as it takes, and none of the answers."""
    while True:
        await peer.send(get(LARGE) * 100)


async def half_tls(peer):
    """The first half of a handshake."""
    await peer.send(client_hello())
    await peer.end()


# --- those who make work -------------------------------------------------------------------------------------------


async def tls_flood(peer):
    """As much of a handshake as costs the server a signature, and the client nothing."""
    await peer.send(client_hello())
    await peer.receive()
    peer.reset()


async def tiny_window(peer):
    while True:
        await peer.ask(get(LARGE))


async def header_bomb(peer):
    """A thousand fields that nobody has sent before."""
    padding = [f"X-{number}: bomb" for number in range(900)]
    for number in NUMBERS:
        await peer.ask(get(SMALL, *padding, f"X-Number: {number}"))


async def memo_flood(peer, count=1 << 40):
    """Requests that nobody has sent before, each of them twice: what comes again is worth remembering."""
    for _ in range(count):
        request = get(f"{SMALL}?{CHANCE.random()}", f"X-A: {CHANCE.randbytes(950).hex()}")
        await peer.ask(request)
        await peer.ask(request)


async def range_bomb(peer):
    """Hundreds of single bytes, never the same ones."""
    while True:
        asked = sorted(CHANCE.sample(range(0, SIZES[MEDIUM], 2), 400))
        await peer.ask(get(MEDIUM, "Range: bytes=" + ",".join(f"{at}-{at}" for at in asked)))


async def garbage(peer):
    await peer.send(CHANCE.randbytes(CHANCE.randrange(1, 5000)))
    peer.sock.shutdown(socket.SHUT_WR)
    await peer.end()


# What has been sent, and how many bytes are read, when the RST goes out.
STATES = {
    "connected": (b"", 0), "half a request line": (b"GET /sm", 0), "half a head": (get(SMALL)[:-2], 0),
    "half a body": (get(SMALL, "Content-Length: 9") + b"1234", 0), "expecting": (
        get(SMALL, "Content-Length: 9", "Expect: 100-continue"), 25),
    "asked": (get(SMALL), 0), "asked for much": (get(HUGE), 0), "half an answer": (get(HUGE), 100_000),
    "answered": (get(SMALL), SIZES[SMALL]), "refused": (b"\0\r\n\r\n", 1), "pipelining": (get(LARGE) * 50, 1000),
}


async def rst(peer, state=None):
    """An RST in this state, or in the next one of all."""
    sent, read = STATES[state or next(CYCLE)]
    if sent:
        await peer.send(sent)
    while read > 0:
        read -= len(await peer.more(b""))
    peer.reset()


NUMBERS, CHANCE, CYCLE = itertools.count(), random.Random(5), itertools.cycle(STATES)


def client_hello():
    """The first bytes of a TLS client; always the same, which no server minds."""
    if not HELLO:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        hello = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
        HELLO.append(hello.read())
    return HELLO[0]


HELLO: list[bytes] = []


# --- crowds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """`count` clients at a time, of which no more than `rate` a second come in; or wrk with these arguments."""

    title: str
    client: Callable | None = None
    count: int = 50
    rate: int = 0               # 0: as fast as they can
    window: int = 0             # bytes of receive buffer, 0 for the kernel's choice
    tls: bool = False
    wrk: tuple = ()
    path: str = SMALL


MANY = 2_000                    # twice the connections that the servers under attack allow
ATTACKS = {
    "silent": Attack("connections that never say a word", silent, MANY, 1000),
    "idle": Attack("connections that ask once and stay", idle, MANY, 1000),
    "slow-head": Attack("a header field each second (slowloris)", slow_head, MANY, 1000),
    "slow-body": Attack("a byte of body each second", slow_body, MANY, 1000),
    "slow-read": Attack("64 MiB, read at 100 bytes a second", slow_read, MANY, 1000, WINDOW),
    "never-read": Attack("pipelined requests for 1 MiB, no answer read", never_read, 500, 1000),
    "tiny-window": Attack("1 MiB through the smallest window, again and again", tiny_window, window=WINDOW),
    "header-bomb": Attack("15 KiB of header fields, never the same", header_bomb),
    "range-bomb": Attack("400 ranges, never the same", range_bomb),
    "memo-flood": Attack("each URL twice, and never again", memo_flood),
    "unique": Attack("no two URLs alike, as fast as wrk can", wrk=("-c64",)),
    "churn": Attack("a connection for each request, as fast as wrk can", wrk=("-c200", "-H", "Connection: close")),
    "rst": Attack("RST in every state", rst),
    "garbage": Attack("random bytes", garbage),
    "half-tls": Attack("TLS: a ClientHello, then silence", half_tls, MANY, 1000, tls=True),
    "tls-flood": Attack("TLS: half a handshake, then RST", tls_flood, 20, tls=True),
}


class Pace:
    """Lets through no more than `rate` a second."""

    def __init__(self, rate):
        self.gap, self.due = 1 / rate if rate else 0, 0.0

    async def turn(self):
        now = asyncio.get_running_loop().time()
        self.due = max(now, self.due + self.gap)
        await asyncio.sleep(self.due - now)


async def connect(port, source, window=0):
    """A non-blocking socket connected to `port`, or OSError."""
    sock = socket.socket()
    sock.setblocking(False)
    if window:                  # before connecting: it decides what is offered
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        sock.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
    except BaseException:
        sock.close()
        raise
    return sock


async def once(attack, port, source=SOURCES[0]):
    """One connection, to its end. OSError if there is none to be had; how it ends is all the same."""
    with await connect(port, source, attack.window) as sock, contextlib.suppress(OSError):
        await attack.client(Peer(sock))


async def again(attack, port, source, pace):
    while True:
        await pace.turn()
        try:
            await once(attack, port, source)
        except OSError:         # refused, or no port left
            await asyncio.sleep(0.1)


async def crowd(attack, port):
    """All its clients, until cancelled."""
    pace, sources = Pace(attack.rate), itertools.cycle(SOURCES)
    await asyncio.gather(*(again(attack, port, next(sources), pace) for _ in range(attack.count)))


def arguments():
    parser = argparse.ArgumentParser(description="Attack a server that listens on 127.0.0.1.")
    parser.add_argument("name", choices=[name for name, attack in ATTACKS.items() if attack.client])
    parser.add_argument("port", type=int)
    parser.add_argument("--count", type=int, help="connections at a time")
    parser.add_argument("--rate", type=int, help="new ones a second (default: as the attack has it)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    return parser.parse_args()


async def attack_for(attack, port, seconds):
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(crowd(attack, port), seconds)


def main():
    options = arguments()
    changes = {name: value for name in ("count", "rate") if (value := getattr(options, name)) is not None}
    attack = Attack(**vars(ATTACKS[options.name]) | changes)
    asyncio.run(attack_for(attack, options.port, options.seconds))


if __name__ == "__main__":
    main()
