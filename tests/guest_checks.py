"""What the scripts for guests share: the site, the server's process, a client, and the checks that hold over plain HTTP
and over TLS alike. Runs in a guest, with nothing but Python's own modules.
"""

import contextlib
import io
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import traceback

PATIENCE = 10       # seconds for a socket, where only a failure takes so long
STARTING = 30       # seconds for a process: the processor is simulated, and Python starts slowly
BIG = 10_000_000
SWITCH = "/proc/sys/kernel/io_uring_disabled"       # Linux 6.6


def noise(size):
    return random.Random(size).randbytes(size)


SITE = {"index.html": b"<!doctype html><title>home</title>", "404.html": b"<!doctype html><title>none</title>",
        "empty.txt": b"", "one.bin": b"1", "big.bin": noise(BIG),
        **{f"f{size}.bin": noise(size) for size in (511, 4096, 16_385, 65_536, 300_001)},
        **{f"n{i:02}.txt": b"number %d " % i * (i + 1) for i in range(20)}}


def command(*flags):
    """How the server is started; with time to drain in, for everything takes long."""
    return [sys.executable, "tarweb.py", "-l", "127.0.0.1:0", f"--drain={STARTING}", *flags, "/tmp/site.tar"]


class Server:
    """The real process, ready when the constructor returns."""

    SCHEME = "http"

    def __init__(self, *flags):
        self.log = open("/tmp/stderr", "w+b")       # noqa: SIM115  # open as long as the server
        self.process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=self.log)
        line = self.process.stdout.readline().decode()
        found = re.search(rf"{self.SCHEME}://127\.0\.0\.1:(\d+)/", line)
        assert found, f"not ready: {line!r} {self.stderr()}"
        self.address = "127.0.0.1", int(found[1])

    def stderr(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def plug(self, rcvbuf=None):
        """A socket connected to the server."""
        sock = socket.socket()
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        sock.settimeout(PATIENCE)
        sock.connect(self.address)
        return sock

    def connect(self, rcvbuf=None):
        return Client(self.plug(rcvbuf))

    def end(self):
        """Wait for the end that a signal has begun."""
        try:
            status = self.process.wait(STARTING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running {STARTING} s after SIGTERM: {self.stderr()}") from None
        assert status == 0, f"exit {status}: {self.stderr()}"
        self.read_report(self.stderr())

    def read_report(self, said):
        assert not said, said


class Client:
    """Asks and reads over a socket, or over what has a socket's methods."""

    def __init__(self, sock):
        self.sock = sock
        self.stream = sock.makefile("rb", 1 << 16)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.sock.close()

    def send(self, name, method="GET", **fields):
        self.sock.sendall(request(name, method, **fields))

    def head(self):
        """(status, fields) of the next response."""
        line = self.stream.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        fields = {}
        while (field := self.stream.readline().rstrip(b"\r\n")):
            key, _, value = field.decode().partition(": ")
            fields[key.lower()] = value
        return int(line.split()[1]), fields

    def response(self):
        status, fields = self.head()
        return status, self.stream.read(int(fields.get("content-length", 0)))

    def ask(self, name, **fields):
        self.send(name, **fields)
        return self.response()


def request(name, method="GET", **fields):
    lines = [f"{method} /{name} HTTP/1.1", "Host: t"] + [f"{key.title()}: {value}" for key, value in fields.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def same(got, expected):
    """Compare without printing megabytes."""
    (status, body), (right, content) = got, expected
    assert status == right, f"status {status} instead of {right}: {body[:80]!r}"
    if body != content:
        at = next((i for i, pair in enumerate(zip(body, content, strict=False)) if pair[0] != pair[1]), "the end")
        raise AssertionError(f"{len(body)} bytes instead of {len(content)}, different from {at} on")


# --- the checks: each with a server that has been through those before it ------------------------------------------


def files(server):
    """Every file, each on a connection of its own."""
    for name, content in SITE.items():
        with server.connect() as client:
            same(client.ask(name, connection="close"), (200, content))
            assert client.stream.read() == b"", "bytes behind the response"
    with server.connect() as client:
        same(client.ask("no/such"), (404, SITE["404.html"]))


def ranges(server):
    with server.connect() as client:
        for name in ("f16385.bin", "f300001.bin", "big.bin"):
            content = SITE[name]
            last, half = len(content) - 1, len(content) // 2
            for first, end in ((0, 0), (half, half + 4096), (last, last), (half, last), (1, last - 1)):
                same(client.ask(name, range=f"bytes={first}-{end}"), (206, content[first:end + 1]))
            same(client.ask(name, range="bytes=-100"), (206, content[-100:]))


def keep_alive(server):
    with server.connect() as client:
        for i in range(60):
            name = f"n{i % 20:02}.txt"
            same(client.ask(name), (200, SITE[name]))
        client.send("big.bin", method="HEAD")
        status, fields = client.head()
        assert (status, fields["content-length"]) == (200, str(BIG)), (status, fields)
        same(client.ask("empty.txt"), (200, b""))


def pipelining(server):
    """200 requests in one piece, then in pieces that end anywhere."""
    names = [f"n{i % 20:02}.txt" if i % 10 else "f16385.bin" for i in range(200)]
    wanted = b"".join(map(request, names))
    for step in (len(wanted), 777):
        with server.connect() as client:
            for at in range(0, len(wanted), step):
                client.sock.sendall(wanted[at:at + step])
            for name in names:
                same(client.response(), (200, SITE[name]))


def many_connections(server):
    """100 at once: all open before the first asks, all asked before the first answer is read; twice."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(100)]
        for step in (1, 7):
            for i, client in enumerate(clients):
                client.send(f"n{i * step % 20:02}.txt")
            for i, client in enumerate(clients):
                same(client.response(), (200, SITE[f"n{i * step % 20:02}.txt"]))


def slow_reader(server):
    with server.connect(rcvbuf=4096) as client:
        client.send("big.bin")
        time.sleep(0.5)
        status, _ = client.head()
        pieces = []
        for _ in range(10):
            pieces.append(client.stream.read(3000))
            time.sleep(0.02)
        pieces.append(client.stream.read(BIG - 30_000))
        same((status, b"".join(pieces)), (200, SITE["big.bin"]))
        same(client.ask("one.bin"), (200, b"1"))


def slow_writer(server):
    with server.connect() as client:
        for _ in range(3):
            for byte in request("n05.txt"):
                client.sock.sendall(bytes([byte]))
            same(client.response(), (200, SITE["n05.txt"]))


def resets(server):
    """Clients that leave in the middle, by FIN or by RST; the server goes on."""
    for i in range(20):
        with server.connect(rcvbuf=4096) as client:
            client.send("big.bin")
            client.stream.read(1000)
            if i % 2:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with server.connect() as client:
        same(client.ask("one.bin"), (200, b"1"))
        client.sock.sendall(b"GET / HT")
        client.sock.shutdown(socket.SHUT_WR)
        client.stream.read()
    with server.connect() as client:
        same(client.ask("one.bin"), (200, b"1"))
        client.send("big.bin", connection="close")
        client.sock.shutdown(socket.SHUT_WR)
        same(client.response(), (200, SITE["big.bin"]))
        assert client.stream.read() == b""


def bodies(server):
    with server.connect() as client:
        client.sock.sendall(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n0123456789")
        status, _ = client.response()
        assert status == 405, status
        client.sock.sendall(b"GET /one.bin HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert client.head()[0] == 100
        client.sock.sendall(b"01234")
        same(client.response(), (200, b"1"))
        client.sock.sendall(b"GET /n07.txt HTTP/1.1\r\nHost: t\r\nContent-Length: 60000\r\n\r\n" + noise(60_000))
        same(client.response(), (200, SITE["n07.txt"]))
        same(client.ask("one.bin"), (200, b"1"))


def departures(server):
    """A connection is closed when it is done with, even while an older one is idle: FIN sent, socket gone."""
    with server.connect() as idle:
        same(idle.ask("one.bin"), (200, b"1"))
        for _ in range(50):
            with server.connect() as client:
                same(client.ask("one.bin", connection="close"), (200, b"1"))
                assert client.stream.read() == b""
        for _ in range(50):
            server.connect().sock.close()
        deadline = time.monotonic() + PATIENCE
        while (left := open_sockets(server.address[1])) > 1:
            assert time.monotonic() < deadline, f"{left} sockets, where one connection is left"
            time.sleep(0.05)
        same(idle.ask("one.bin"), (200, b"1"))


def open_sockets(port):
    """How many of the server's connections the kernel holds in ESTABLISHED (1) or CLOSE_WAIT (8): proc_net_tcp.rst."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in list(table)[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] in ("01", "08") for row in rows)


def drain(server):
    """What is being sent when SIGTERM comes is sent to its end, and then the server ends."""
    with server.connect(rcvbuf=4096) as client:
        client.send("big.bin")
        status, _ = client.head()
        server.process.send_signal(signal.SIGTERM)
        same((status, client.stream.read(BIG)), (200, SITE["big.bin"]))
        assert client.stream.read() == b""
    server.end()


def patience(server):
    """Both timeouts, with a flag of one second each."""
    with server.connect() as client:
        client.sock.sendall(b"GET /")
        assert client.response()[0] == 408
        assert client.stream.read() == b""
    with server.connect() as client:
        same(client.ask("one.bin"), (200, b"1"))
        assert client.stream.read() == b""


def crowd(server):
    """30 connections where 8 fit: the idle ones give way, each new one is served."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(30):
            clients.append(stack.enter_context(server.connect()))
            same(clients[-1].ask("one.bin"), (200, b"1"))
        assert clients[0].stream.read() == b"", "the first was not closed"


def terminate(server):
    server.process.send_signal(signal.SIGTERM)
    server.end()


def refusal(*flags):
    """What the server says where it cannot serve: on stderr alone, with exit status 1."""
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=STARTING, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done
    return done.stderr


SERVING = (files, ranges, keep_alive, pipelining, many_connections, slow_reader, slow_writer, resets, bodies,
           departures, drain)


# --- running -------------------------------------------------------------------------------------------------------


def pack_site():
    with tarfile.open("/tmp/site.tar", "w") as tar:
        for name, content in SITE.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def attempt(name, function, *arguments):
    """("" or the traceback, what it gave). The time is printed for whoever has to see how far it came."""
    began = time.monotonic()
    try:
        return "", function(*arguments)
    except Exception:
        return traceback.format_exc(), None
    finally:
        print(f"{name} {time.monotonic() - began:.1f} s", flush=True)


def perform(start, checks):
    """check -> "" or what went wrong, with the server that `start` gives. Checks after a failed one are tried too."""
    server, outcome = None, {}
    if start:
        outcome["start"], server = attempt("start", start)
        if server is None:
            return outcome
    for check in checks:
        outcome[check.__name__] = attempt(check.__name__, check, server)[0]
    if server is not None and server.process.poll() is None:
        server.process.kill()
    return outcome
