"""What the black-box tests share: building sites, running the real server, and talking to it in raw bytes."""

import contextlib
import gzip
import io
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import brotli
import h11

ROOT = Path(__file__).resolve().parent.parent
TARWEB = Path(os.environ.get("TARWEB_PROGRAM", ROOT / "tarweb.py"))     # or one copied elsewhere, or tarweb.pyz
PYTHON = os.environ.get("TARWEB_PYTHON", sys.executable)
MTIME = 1_600_000_000  # of every member, unless said otherwise
LAST_MODIFIED = "Sun, 13 Sep 2020 12:26:40 GMT"
PATIENCE = 20  # seconds: for what ought to happen at once; only ever reached by a failing test

# The ways the engine can run: each serves the same bytes.
MODES = {
    "default": (),
    "libc": ("--no-liburing",),
    "sqpoll": ("--sqpoll-ms", "50"),
    "threads": ("--threads", "2"),
}


# --- sites ---------------------------------------------------------------------------------------------------------


def noise(size, seed=0):
    """`size` bytes that look like nothing else, the same ones on every run."""
    return random.Random(seed).randbytes(size)


def prose(size):
    """`size` bytes of text that compresses well."""
    line = b"The quick brown fox jumps over the lazy dog, and the dog does not mind. "
    return (line * (size // len(line) + 1))[:size]


def build_tar(path, files, links=()):
    """Pack `files` (name -> bytes) as a tar at `path`, then `links` ((name, target, tarfile type)); return the path."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), MTIME
            tar.addfile(member, io.BytesIO(content))
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.linkname, member.mtime, member.type = target, MTIME, kind
            tar.addfile(member)
    return path


def zstd(size, more):
    """The header of a zstd frame (RFC 8878) that holds `size` bytes, and `more`: not every Python has a compressor, and
    the server looks at no more of it."""
    return b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little") + more


def _compressed():
    """A stylesheet with one variant for each coding; brotli's is the smallest, gzip's the largest."""
    text = prose(40_000)
    best = brotli.compress(text)
    return {
        "style.css": text,
        "style.css.gz": gzip.compress(text, 1, mtime=0),
        "style.css.zst": zstd(len(text), noise(len(best) + 16, seed=7)),
        "style.css.br": best,
    }


FILES = {
    "index.html": b"<!doctype html><title>home</title>" + prose(2000),
    "next": b"the next one",
    "404.html": b"<!doctype html><title>no such page</title>",
    "dir/index.html": b"<!doctype html><title>dir</title>",
    "dir/page.html": b"<!doctype html><title>page</title>",
    "evil.example/index.html": b"<!doctype html><title>a directory with an unlucky name</title>",
    "with space/d\u00e9j\u00e0/index.html": b"<!doctype html><title>encoded</title>",
    "split\r\nX-Evil: 1/index.html": b"<!doctype html><title>line ends in a name</title>",
    "100%/r\u00e9sum\u00e9 (1)?.txt": b"a name that has to be encoded",
    "literal%41.txt": b"decoded once, not twice",
    "empty.txt": b"",
    "app.wasm": b"\0asm\x01\0\0\0",
    "app.mjs": b"export default 1\n",
    "random.bin": noise(300_000, seed=1),
    "large.bin": noise(5 << 20, seed=2),
    "packed/index.html": prose(9000),
    "packed/index.html.gz": gzip.compress(prose(9000), mtime=0),
    "larger.txt": b"short",
    "larger.txt.gz": gzip.compress(b"short", mtime=0),
    "zstd.txt": prose(9000),
    "zstd.txt.zstd": zstd(9000, noise(60, seed=8)),
    **_compressed(),
    **{f"n/{i:03}.txt": b"number %d " % i + noise(1000 + 3 * i, seed=1000 + i) for i in range(200)},
}


# --- the server ----------------------------------------------------------------------------------------------------


class Server:
    """The real process. Started and ready when the constructor returns; `stop()` ends it and checks how it ended."""

    def __init__(self, tar, *flags, listen="127.0.0.1:0", log, preexec_fn=None, python=(PYTHON,),
                 program=(str(TARWEB),)):
        address = () if listen is None else ("--listen", listen)
        self.log = Path(log)
        self.signalled = False
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*python, *program, *address, *flags, str(tar)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, preexec_fn=preexec_fn,
            )
        self.ready_line = self.read_line(60)
        found = re.search(r"(https?)://(\[[^\]]+\]|[^:/\s]+):(\d+)/", self.ready_line)
        if not found:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no URL in {self.ready_line!r}; stderr: {self.stderr()}")
        self.port = int(found[3])
        self.pid = self.process.pid
        self.url = f"{found[1]}://127.0.0.1:{self.port}"

    def read_line(self, seconds):
        deadline, line = time.monotonic() + seconds, b""
        out = self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(out, 1) if ready else b""
            if not piece:
                break
            line += piece
        return line.decode(errors="replace")

    def stderr(self):
        return self.log.read_text(errors="replace")

    def check(self):
        """Fail if the server has died or a Python error reached its stderr."""
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.stderr()}"
        assert "Traceback" not in self.stderr(), self.stderr()

    @property
    def workers(self):
        """The pids of its child processes, oldest first."""
        return children(self.pid)

    def anonymous_memory(self):
        """Bytes of memory of its own: without the mapped tar, which RSS would count."""
        return sum(1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])
                   for pid in self.workers)

    def signal(self, number=signal.SIGTERM):
        self.signalled = True
        self.process.send_signal(number)

    def wait(self, seconds=PATIENCE):
        """Wait for the process to end by itself; return the rest of its stdout."""
        try:
            rest, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {seconds} s; stderr: {self.stderr()}") from None
        assert "Traceback" not in self.stderr(), self.stderr()
        assert self.process.returncode == 0, f"exit {self.process.returncode}: {self.stderr()}"
        return rest.decode()

    def stop(self):
        if self.process.returncode is None:
            if not self.signalled:  # a second signal might cut short what the first one lets finish
                self.signal()
            self.wait()

    def connect(self, **options):
        return Client(("127.0.0.1", self.port), **options)

    def fetch(self, target, method="GET", **headers):
        """One request on a connection of its own; header names are written with _ for -."""
        with self.connect() as client:
            client.send(request(target, method, **headers, connection="close"))
            return client.response(method)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_tarweb(*arguments, seconds=30, program=TARWEB, **options):
    """Run the command line to its end, for the cases in which nothing is served."""
    return subprocess.run([PYTHON, str(program), *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=seconds, check=False, **options)


# --- the client ----------------------------------------------------------------------------------------------------


def request(target="/", method="GET", body=b"", **headers):
    """The bytes of a well-formed request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: t"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@dataclass
class Response:
    status: int
    headers: dict
    body: bytes
    version: str
    interim: list = field(default_factory=list)

    def __getitem__(self, name):
        return self.headers[name.lower()]

    def get(self, name, default=None):
        return self.headers.get(name.lower(), default)

    @property
    def closes(self):
        return "close" in self.get("Connection", "").lower()


class Client:
    """One TCP connection: raw bytes out, responses in, read by h11 (which refuses what RFC 9112 does)."""

    def __init__(self, address, rcvbuf=None, sndbuf=None, source=None):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        if rcvbuf:  # before connecting: it decides the window
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        if sndbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        if source:
            self.sock.bind((source, 0))
        self.sock.settimeout(PATIENCE)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pending = b""  # received, and not yet part of a response

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    def reset(self):
        """Close with an RST instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def send(self, *pieces):
        for piece in pieces:
            self.sock.sendall(piece)

    def half_close(self):
        self.sock.shutdown(socket.SHUT_WR)

    def ask(self, target="/", method="GET", **headers):
        """Send one request on this connection and return its response."""
        self.send(request(target, method, **headers))
        return self.response(method)

    def response(self, method="GET"):
        """Read exactly one final response (to a request of that method), and the interim ones before it."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "t")]))
        parser.send(h11.EndOfMessage())
        head, body, interim = None, [], []
        if self.pending:
            parser.receive_data(self.pending)
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                piece = self.sock.recv(1 << 18)
                assert piece, f"the connection ended {'within' if head else 'instead of'} a response"
                parser.receive_data(piece)
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                raise AssertionError(f"unexpected {event}")
        self.pending = parser.trailing_data[0]
        return _response(head, b"".join(body), interim)

    def at_end(self):
        """True when the server closes its side without another byte; False when bytes come."""
        if self.pending:
            return False
        try:
            self.pending = self.sock.recv(1 << 16)
        except ConnectionResetError as error:
            raise AssertionError("the server reset the connection instead of closing it") from error
        return not self.pending

    def rest(self):
        """Everything until the server closes (a reset counts as the end)."""
        received, self.pending = [self.pending], b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.sock.recv(1 << 18):
                received.append(piece)
        return b"".join(received)

    def readable(self, seconds):
        return bool(self.pending or select.select([self.sock], [], [], seconds)[0])


def _response(head, body, interim):
    names = [name.decode() for name, _ in head.headers]
    assert len(names) == len(set(names)), f"a header appears twice: {names}"
    headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
    return Response(head.status_code, headers, body, head.http_version.decode(), interim)


def deliveries(raw):
    """The three ways bytes can arrive, each as (name, pieces)."""
    yield "at once", [raw]
    yield "byte by byte", [raw[i:i + 1] for i in range(len(raw))]
    yield "with the next request behind it", [raw + request("/next")]


def wait_until(condition, seconds=PATIENCE):
    """Poll for what no socket or process can announce."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
