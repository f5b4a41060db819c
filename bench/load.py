"""The clients: wrk for rates, openssl for full handshakes, plain sockets for connections that are many, or watched."""

import contextlib
import itertools
import json
import os
import re
import resource
import select
import selectors
import socket
import subprocess
import threading
import time
from pathlib import Path

from servers import CLIENT_CORE, HOST, Failed, advice, find

HERE = Path(__file__).resolve().parent
TIMEOUT = 10                   # seconds a client waits for an answer
NO_MORE = 30                   # seconds after its time when a client is given up
PACE = 0.0005                  # seconds that a Paced client waits after each answer

# What Chrome 131 sends for a page it opens, after wrk's own Host.
BROWSER = {
    "Connection": "keep-alive",
    "Upgrade-Insecure-Requests": "1",
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
                  "Chrome/131.0.0.0 Safari/537.36",
    "Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "Sec-Fetch-Site": "none",
    "Sec-Fetch-Mode": "navigate",
    "Sec-Fetch-Dest": "document",
    "Accept-Encoding": "gzip, deflate, br, zstd",
    "Accept-Language": "en-US,en;q=0.9",
}


def wrk(url, connections, seconds, headers=None, asks=(), cores=(CLIENT_CORE,)):
    """Ask for `url` as wrk.lua's arguments `asks` say, on `cores`, a thread for each.

    Gives {"requests", "bytes", "seconds", "errors": {kind: count, without zeros}, "client": CPU seconds of wrk}.
    """
    fields = [part for name, value in (headers or {}).items() for part in ("-H", f"{name}: {value}")]
    command = [find("wrk"), f"-t{len(cores)}", f"-c{connections}", f"-d{seconds}s", "--timeout", f"{TIMEOUT}s",
               "-s", HERE / "wrk.lua", *fields, url, "--", *map(str, asks)]
    before = client_seconds()
    said = subprocess.run(command, capture_output=True, text=True, timeout=seconds + NO_MORE,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores))
    summary = re.search(r"^summary (.*)$", said.stdout, re.M)
    if said.returncode or not summary:
        raise Failed(f"wrk: {said.stdout[-500:]}{said.stderr[-500:]}")
    result = json.loads(summary[1])
    result["errors"] = {kind: count for kind, count in result["errors"].items() if count}
    result["client"] = client_seconds() - before
    return result


def handshakes(server, path, clients, seconds):
    """Ask for `path` from `clients` processes of `openssl s_time`, each time with a full handshake.

    wrk is no client for this: it keeps the session of a connection that ends and resumes it in the next one. Gives
    what wrk() gives; among the errors are connections that were resumed all the same.
    """
    if not find("openssl"):
        raise Failed(advice("openssl"))
    command = [find("openssl"), "s_time", "-connect", f"{HOST}:{server.port}", "-new", "-www", path,
               "-time", str(seconds)]
    total = {"requests": 0, "bytes": 0, "errors": {}}
    before, start = client_seconds(), time.monotonic()
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                                        text=True)) for _ in range(clients)]
        for process in running:
            stack.callback(process.kill)
        for process in running:
            add_handshakes(total, process.communicate(timeout=seconds + NO_MORE)[0])
    return total | {"seconds": time.monotonic() - start, "client": client_seconds() - before}


def add_handshakes(total, said):
    """Add to `total` what one s_time printed: a star for a full handshake, an "r" for a resumed one, and sums.

    It ends at the first handshake that fails, without sums, which raises Failed. It does not look at answers; but
    all have one length, so that any other leaves a remainder.
    """
    summary = re.search(r"^([*r]+)$.*^(\d+) connections in .*, bytes read (\d+)$", said, re.M | re.S)
    if not summary:
        raise Failed(f"openssl s_time: {said[-500:]}")
    count, size = int(summary[2]), int(summary[3])
    total["requests"] += count
    total["bytes"] += size
    for kind, errors in (("resumption", summary[1].count("r")), ("length", size % count)):
        if errors:
            total["errors"][kind] = total["errors"].get(kind, 0) + errors


def client_seconds():
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def get(path, port, *lines):
    """The bytes of a GET request for `path`, with these lines in its header."""
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {HOST}:{port}", *lines, "", ""]).encode()


def ask(connection, request):
    """Send `request` on a socket and read the whole answer; gives its length in bytes and its body."""
    head, body = exchange(connection, request)
    return len(head) + len(body), body


def exchange(connection, request, status=200):
    """Send `request` on a socket and read the whole answer, which has this `status`; gives its head and its body."""
    connection.sendall(request)
    answer = b""
    while (head := re.match(rb"HTTP/1\.1 %d (?s:.*?)\r\n\r\n" % status, answer)) is None:
        answer += received(connection, answer, status)
    body = [answer[head.end():]]
    missing = -len(body[0]) if status == 304 else length_of(head[0]) - len(body[0])
    while missing > 0:
        body.append(received(connection, answer, status))
        missing -= len(body[-1])
    return head[0], b"".join(body)


def length_of(head):
    """The Content-Length in the head of an answer."""
    return int(re.findall(rb"\r\ncontent-length: *(\d+)\r\n", head, re.I)[0])


def received(connection, answer, status=200):
    """More bytes of a socket's `answer`; raises Failed when that has another status, or ended early."""
    good = (b"HTTP/1.1 %d " % status).startswith(answer[:13])
    if not good or not (piece := connection.recv(1 << 20)):
        raise Failed(f"instead of an answer came {answer[:200]!r}")
    return piece


@contextlib.contextmanager
def connected(port, count):
    """Open `count` connections to `port` of HOST; gives the sockets and closes them in the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((HOST, port), TIMEOUT)) for _ in range(count)]


def still_open(connections):
    """How many of these quiet connections the server has not closed; leaves the sockets non-blocking."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            count += connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            count += 1
        except OSError:
            pass
    return count


class Steady(threading.Thread):
    """Keep-alive clients that ask again as soon as they have their answer, until stopped (a context manager).

    `answers` counts whole answers, so that the requests of any window can be told exactly.
    """

    def __init__(self, server, path, connections):
        super().__init__(daemon=True)
        self.server = server
        self.request = get(path, server.port)
        self.connections = connections
        self.answers = 0
        self.failure = None
        self.stopped = threading.Event()

    def run(self):
        try:
            with connected(self.server.port, self.connections) as clients:
                self.serve(clients)
        except (OSError, Failed) as failure:
            self.failure = failure

    def serve(self, clients):
        """Go round the clients until stopped."""
        length, _ = ask(clients[0], self.request)        # all answers are alike
        missing = dict.fromkeys(clients, length)
        with selectors.DefaultSelector() as ready:
            for client in clients:
                ready.register(client, selectors.EVENT_READ)
                client.sendall(self.request)
            while not self.stopped.is_set():
                for key, _ in ready.select(0.1):
                    self.on_piece(key.fileobj, missing, length)

    def on_piece(self, client, missing, length):
        """Count what came on `client`; ask again when the answer is whole."""
        missing[client] -= len(received(client, b""))
        if missing[client] == 0:
            self.answers += 1
            missing[client] = length
            client.sendall(self.request)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.join(TIMEOUT)
        if self.failure:
            raise Failed(f"{self.server.name}: {self.failure}")


class Paced:
    """A client that asks for `paths` in turn over one connection, PACE seconds after each answer (a context manager).

    Where the server has closed the connection it opens another one, and where it closes it instead of an answer, asks
    again. `seconds`: how long each answer took, with all of that; `lost`: how many were asked for twice.
    """

    def __init__(self, server, paths):
        self.server = server
        self.requests = itertools.cycle([get(path, server.port) for path in paths])
        self.connection = None
        self.seconds = []
        self.lost = 0

    def step(self):
        """Wait, and ask once; gives the body."""
        time.sleep(PACE)
        request, start = next(self.requests), time.perf_counter()
        try:
            if self.closed():
                self.connect()
            _, body = ask(self.connection, request)
        except (OSError, Failed):
            self.lost += 1
            self.connect()
            _, body = ask(self.connection, request)
        self.seconds.append(time.perf_counter() - start)
        return body

    def run(self, seconds):
        """Steps for so long; gives how long each answer took."""
        self.seconds, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            self.step()
        return self.seconds

    def closed(self):
        """Whether the server has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def connect(self):
        self.connection.close()
        self.__enter__()

    def __enter__(self):
        self.connection = socket.create_connection((HOST, self.server.port), TIMEOUT)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_):
        self.connection.close()
