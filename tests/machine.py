"""Workers on a simulated kernel: clients, what they want, and chance or a script that drives all of it."""

import errno
import json
import logging
import mmap
import random
import re
import signal
import socket
import struct
import time
import zlib
from collections import Counter
from types import SimpleNamespace

from simulated import PAGE, RECEIVES, SENDS, STREAMS, Datagram, Kernel, Socket, Sqe, make_ring, present

import acceptor
import accesslog
import archive as archive_module
import clock as clock_module
import connection as connection_module
import http1
import linux
import plan as plan_module
import proxy
import worker as worker_module
from accesslog import AccessLog
from archive import Library, Redirect, Representation, Resource
from connection import (
    ACCEPT, CLOSING, FREE, HANDSHAKE, IDLE, INTERIM, LINGER, LOG, PREFACE, RESPONSE, SHUTDOWN, SLOT, Limits,
    illegal_flags,
)
from clock import Counts
from plan import WARM_SECONDS, Memo, make_site
from proxy import Networks
from reply import BOUNDARY, Responder
from uring import PolledRing, Ring
from worker import Worker

EPOCH = 1_700_000_000
# Small enough that a few hundred steps reach every limit.
SMALL = {
    worker_module: {"MAX_PENDING": 1500},
    worker_module.Plain: {"send_size": 700},
    clock_module: {"LINGER_SECONDS": 3, "SEND_GRACE": 4},
    acceptor: {"RESERVE": 2, "SEND_GRACE": 4, "STALL": 4, "PACE": 500},
    connection_module: {"SEND_GRACE": 4},
    plan_module: {"SEND_SIZE": 700, "COLD_SEND_SIZE": 600, "LAZY_MEMO": 800},
    archive_module: {"WHOLE_CHECK": 500},
    accesslog: {"LARGEST_WRITE": 2000, "PIPE_BUF": 300, "ENOUGH": 12},
    http1: {"MAX_HEAD": 900, "MAX_LINE": 400, "MAX_BODY": 600},
}

CONTENT = random.Random(5).randbytes(21_000)
MEMORY = mmap.mmap(-1, len(CONTENT))        # what stands for the mapped archive
MEMORY[:] = CONTENT
ADDRESS = linux.address_of(MEMORY)
FILES = {b"/": (0, 40), b"/one": (40, 1), b"/empty": (41, 0), b"/piece": (100, 450), b"/more": (100, 700),
         b"/big": (200, 2800)}


class Clock:
    """Stands in for the time module."""

    gmtime, strftime = time.gmtime, time.strftime

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return EPOCH + self.now

    def time_ns(self):
        return EPOCH * 10 ** 9 + int(self.now * 10 ** 9)


def make_small(monkeypatch, *more):
    """Set limits to the values of SMALL, and of `more` like it; gives a Clock."""
    clock = make_clock(monkeypatch)
    for module, values in (item for limits in (SMALL, *more) for item in limits.items()):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    # bytes hash differently in each process; a schedule has to be the same again
    monkeypatch.setattr(plan_module, "hash", zlib.crc32, raising=False)
    monkeypatch.setattr(logging.getLogger("tarweb"), "disabled", True)
    return clock


def make_clock(monkeypatch):
    """A Clock that the worker goes by."""
    clock = Clock()
    for module in (acceptor, clock_module, connection_module, accesslog):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(acceptor, "STALL", 10)     # so that a client is busy by not reading
    monkeypatch.setattr(linux, "peer_address", present.peer_address)
    monkeypatch.setattr(linux, "bytes_acknowledged", present.bytes_acknowledged)
    monkeypatch.setattr(proxy, "is_stream", present.is_stream)
    monkeypatch.setattr(proxy, "os", SimpleNamespace(close=present.close))
    monkeypatch.setattr(acceptor, "select", SimpleNamespace(poll=present.poll, POLLIN=1))
    monkeypatch.setattr(archive_module, "in_memory", present.in_memory)
    monkeypatch.setattr(archive_module, "mmap", SimpleNamespace(PAGESIZE=PAGE))
    return clock


def index():
    """What `find` knows of FILES."""
    files = {path: Resource(Representation(ADDRESS + offset, length, 0, "", b"text/plain", b'"x"'), ())
             for path, (offset, length) in FILES.items()}
    return {**files, b"/dir": Redirect(b"/dir/")}


MORE = {"log", "log_to_file", "trusted", "passing", "lazy", "publish", "on_damage"}


def common(kernel, clock, limits, archive, ring, log=None, log_to_file=True, trusted=None, passing=False, lazy=False,
           publish=None, on_damage=None):
    """What a Worker of any kind is made of. log: the style of an access log. trusted: networks of proxies.

    passing: the last listener passes connections. lazy: nothing of the archive is in memory at first. on_damage: what
    to call when the archive has been written to.
    """
    archive.lazy = lazy
    if lazy:
        kernel.lazy = range(ADDRESS, ADDRESS + len(CONTENT))
        kernel.lasts = WARM_SECONDS + 4
    library = Library([archive])
    site = make_site(Memo(library, b"tarweb", clock.time()), {b"": Responder(archive, b"")})
    listeners = [slot for slot in kernel.listeners if slot != kernel.passing]
    return {"engine": ring, "slots": kernel.slots, "limits": limits, "counts": Counts(), "signals": kernel.signal_pipe,
            "listeners": listeners, "passing": kernel.passing, "trusted": trusted and Networks(trusted),
            "access_log": log and AccessLog(ring, kernel.open_log(log_to_file), log, LOG),
            "publish": publish, "damage": on_damage and (kernel.damage, on_damage),
            "library": library, "site": site}


def make_worker(kernel, clock, limits, listeners=1, kind=Ring, **options):
    """A Worker over a simulated ring, serving FILES; for its options see `common`, and make_ring."""
    more = {name: options.pop(name) for name in MORE & options.keys()}
    listeners += more.get("passing", False)
    ring = make_ring(kernel, limits.max_connections + listeners, listeners, kind, more.get("passing", False), **options)
    archive = SimpleNamespace(find=index().get, address=ADDRESS, size=len(CONTENT), fd=-1, copied=True)
    return Worker(**common(kernel, clock, limits, archive, ring, **more))


# --- what clients send, and what they ought to get

class Wanted:
    """One response: `body` is what Content-Length speaks of, absent from the wire where `bare`."""

    def __init__(self, status, body=None, closes=False, bare=False, may_continue=False):
        self.status, self.body, self.closes, self.bare, self.may_continue = status, body, closes, bare, may_continue
        self.line = b""             # of the request


def content(path):
    offset, length = FILES[path]
    return CONTENT[offset:offset + length]


def get(path, fields=b"", version=b"1.1", method=b"GET"):
    return b"%b %b HTTP/%b\r\nHost: a\r\n%b\r\n" % (method, path, version, fields)


def random_request(rnd):
    """(bytes, Wanted): the answer is due once all the bytes have come."""
    path = rnd.choice(list(FILES))
    kind = rnd.choice(("plain",) * 8 + ("known",) * 8 + (
        "head", "close", "old", "missing", "range", "ranges", "options", "post", "chunked", "expect", "expect",
        "refused", "empty line", "redirect"))
    body = rnd.randbytes(rnd.choice((1, 5, 200, 500)))
    length = b"Content-Length: %d\r\n" % len(body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:3], body[3:]) if piece) + b"0\r\n\r\n"
    match kind:
        case "plain":
            return get(path, b"X: %d\r\n" % rnd.randrange(50)), Wanted(200, content(path))
        case "head":
            return get(path, method=b"HEAD"), Wanted(200, content(path), bare=True)
        case "close":
            return get(path, b"Connection: close\r\n"), Wanted(200, content(path), closes=True)
        case "old":
            return get(path, version=b"1.0"), Wanted(200, content(path), closes=True)
        case "missing":
            return get(b"/no"), Wanted(404)
        case "redirect":
            return get(b"/dir"), Wanted(301)
        case "range":
            return get(b"/big", b"Range: bytes=5-1004\r\n"), Wanted(206, content(b"/big")[5:1005])
        case "ranges":
            return get(b"/big", b"Range: bytes=1500-1600,5-500\r\n"), Wanted(206, TWO_PARTS)
        case "options":
            return get(b"*", method=b"OPTIONS"), Wanted(204, bare=True)
        case "post":
            return get(path, length, method=b"POST") + body, Wanted(405)
        case "chunked":
            return get(path, b"Transfer-Encoding: chunked\r\n") + chunks, Wanted(200, content(path))
        case "expect":
            return (get(path, length + b"Expect: 100-continue\r\n") + body,
                    Wanted(200, content(path), may_continue=True))
        case "refused":
            return get(b"/no", length + b"Expect: 100-continue\r\n"), Wanted(404, closes=True)
        case "empty line":
            return b"\r\n\r\n" + get(path), Wanted(200, content(path))
    return get(path), Wanted(200, content(path))


TWO_PARTS = b"".join(
    b"\r\n--%b\r\nContent-Type: text/plain\r\nContent-Range: bytes %d-%d/2800\r\n\r\n%b" % (
        BOUNDARY, start, end, content(b"/big")[start:end + 1])
    for start, end in ((1500, 1600), (5, 500))) + b"\r\n--%b--\r\n" % BOUNDARY


def random_end(rnd):
    """(bytes, Wanted or None) after which nothing more is asked; None where no answer may come but 408."""
    return rnd.choice((
        (b"", None), (b"", None), (b"GET / HTT", None), (b"\r", None), (get(b"/")[:-1], None),
        (get(b"/", b"Content-Length: 9\r\n") + b"12345678", None),
        (get(b"/", b"Transfer-Encoding: chunked\r\n") + b"5\r\nabc", None),
        (b"\x16\x03\x01\x02\x00\n\n", Wanted(400, closes=True)),
        (b"GET /" + b"a" * 500, Wanted(414, closes=True)),
        (get(b"/", b"X: " + b"a" * 1000 + b"\r\n"), Wanted(431, closes=True)),
        (b"GARBAGE\r\n\r\n", Wanted(400, closes=True)),
        (get(b"/", b"Content-Length: 1000\r\n"), Wanted(200, content(b"/"), closes=True)),
        (get(b"/", b"Transfer-Encoding: chunked\r\n") + b"ffff\r\n" + b"a" * 605,
         Wanted(200, content(b"/"), closes=True)),
        (get(b"/", b"Transfer-Encoding: chunked\r\n") + b"x\r\n", Wanted(400, closes=True)),
    ))


STATUS_HEAD = re.compile(rb"HTTP/1\.1 (\d\d\d) [A-Za-z \-]+\r\nServer: tarweb\r\nDate: [^\r]{29}(?:\r\n|$)")
REFUSALS = {400, 414, 431}                  # which of them depends on how much comes at once


class Client(Socket):
    """A client: what it will send, how it cuts it up, and how well it reads."""

    def __init__(self, rnd):
        super().__init__()
        self.rnd = rnd
        self.script, self.wanted, self.boundaries = b"", [], []
        for _ in range(rnd.choice((0, 1, 1, 2, 3, 8, 30))):
            self.add(*random_request(rnd))
        raw, wanted = random_end(rnd)
        self.add(raw, wanted)
        if wanted and rnd.random() < 0.5:       # more than anybody will read
            self.script += rnd.randbytes(rnd.choice((10, 3000)))
        self.stops = []                         # where a piece ends, besides
        self.sent = 0
        self.pieces = rnd.choice((1, 20, 300, 5000))
        self.reads = rnd.choice((0, 1, 30, 10_000, 10_000, 10_000))
        self.eager = rnd.choice((0.02, 0.3, 1.0))
        self.patient = rnd.random() < 0.5       # sends a request only when the one before it is answered
        self.leaves = rnd.choice((None, None, "eof", "eof", "reset"))
        self.fickle = 0.002                     # how often it goes in the middle of something
        self.decided = None                     # of `delivered`: what had been seen when its end was decided
        self.seen = self.seen_before = 0
        self.sent_at = 0.0

    def plan(self, requests):
        """Do nothing but send these, [(bytes, Wanted)], and read well."""
        self.script, self.wanted, self.boundaries = b"", [], []
        for raw, wanted in requests:
            self.add(raw, wanted)
        self.reads, self.eager, self.pieces, self.patient, self.leaves, self.fickle = 5000, 1.0, 5000, False, None, 0

    def add(self, raw, wanted):
        self.script += raw
        if wanted:
            wanted.line = raw.lstrip(b"\r\n").partition(b"\r\n")[0]
            self.wanted.append(wanted)
            self.boundaries.append(len(self.script))

    def begin_with(self, header):
        """Send this before all else."""
        self.script = header + self.script
        self.boundaries, self.stops = ([at + len(header) for at in marks] for marks in (self.boundaries, self.stops))

    def want_nothing(self, excuse):
        """Whatever is asked, there will be no answer."""
        self.excuse, self.wanted, self.boundaries = excuse, [], []

    def give(self, size):
        """Bytes that another process has read before it passes the connection."""
        size = min(size, len(self.script))
        self.sent += size
        return self.script[:size]

    def act(self):
        """Do something, perhaps."""
        rnd = self.rnd
        self.room = max(self.room, int(2 * rnd.random() * self.reads))
        if rnd.random() > self.eager or self.eof or self.reset:
            return
        if self.sent < len(self.script):
            limit = len(self.script)
            if self.patient:
                answered = self.received.count(b"HTTP/1.1 ")    # nearly: content is random bytes
                limit = next((at for at in self.boundaries[answered:]), limit)
            limit = min([limit, *(at for at in self.stops if at > self.sent)])
            piece = self.script[self.sent:min(limit, self.sent + rnd.randrange(1, self.pieces + 1))]
            if piece:
                self.sent += len(piece)
                self.incoming.append(piece)
        elif self.leaves == "eof":
            self.eof = True
        elif self.leaves == "reset" and rnd.random() < 0.1:
            self.vanish()
        if rnd.random() < self.fickle:
            self.vanish()

    def vanish(self):
        self.reset, self.excuse = True, "reset"

    def due(self):
        """How many responses are owed for what had been seen when the end was decided."""
        return sum(boundary <= self.decided for boundary in self.boundaries)

    def answered(self, stopping):
        """How many of the wanted responses are there, whole; whether the last of them ends the connection; the rest.

        Whatever is there has to be what was wanted, in order: else an AssertionError.
        """
        stream, count = bytes(self.received), 0
        for wanted in self.wanted:
            size, closes = self.match(stream, wanted, stopping)
            if wanted.may_continue and size and stream.startswith(b"HTTP/1.1 100 "):
                stream = stream[size:]
                size, closes = self.match(stream, wanted, stopping)
            if size is None:
                return count, False, stream
            stream = stream[size:]
            count += 1
            if closes:
                assert not stream, f"after the last response: {stream[:80]}"
                return count, True, b""
        if stream:
            size, closes = self.match(stream, None, stopping)
            assert size is None or size == len(stream) and closes
            return count, closes, stream[size:] if closes else stream
        return count, False, b""

    def outline(self):
        """[(status, bytes of content, whether it is whole, request line)] of the responses that have been received,
        but for interim ones, and for one whose head is incomplete."""
        stream, found, wanted = bytes(self.received), [], list(self.wanted)
        while stream:
            head, empty_line, body = stream.partition(b"\r\n\r\n")
            if not empty_line:
                break
            status = int(head[9:12])
            if status == 100:
                stream = body
                continue
            answered = wanted.pop(0) if wanted and status != 408 else None
            length = int((re.search(rb"\r\nContent-Length: (\d+)", head) or (0, 0))[1])
            length = 0 if answered and answered.bare or status == 304 else length
            found.append((status, min(length, len(body)), len(body) >= length, answered and answered.line))
            stream = body[length:]
        return found

    @staticmethod
    def match(stream, wanted, stopping):
        """(size of the response at the front of `stream` or None where it is incomplete, whether it is the last)."""
        head, empty_line, body = stream.partition(b"\r\n\r\n")
        if not empty_line:
            assert stream[:9] == b"HTTP/1.1 "[:len(stream)]
            return None, False
        known = STATUS_HEAD.match(head)
        assert known, f"no head of a response: {head}"
        status = int(known[1])
        if status == 100:
            assert wanted and wanted.may_continue and b"Content-Length" not in head
            return len(head) + 4, False
        closes = b"\r\nConnection: close" in head
        length = int((re.search(rb"\r\nContent-Length: (\d+)", head) or (0, 0))[1])
        if status == 408:
            assert closes
            return (len(head) + 4 + length if len(body) >= length else None), True
        assert wanted, f"unasked for: {head}"
        assert status == wanted.status or {status, wanted.status} <= REFUSALS, (status, wanted.status)
        assert closes or not wanted.closes
        assert wanted.closes or not closes or stopping
        if wanted.bare:
            length = 0
        elif wanted.body is not None:
            assert length == len(wanted.body)
            assert body[:length] == wanted.body[:len(body)]
        return (len(head) + 4 + length if len(body) >= length else None), closes


# --- any schedule

# Of what is counted, what schedules have to come to: in a few dozen seeds, and over them.
REACHED = ("passed", "proxy_refused", "accept_errors", "memo_hits", "memo_misses", "reclaimed", "timed_out",
           "no_buffers", "cold", "faults", "log_lines", "log_dropped")
REACHED_IN_THE_KERNEL = (
    "overflow", "cancelled", "cancel missed", "no buffers", "short", "EPIPE", "EFAULT", "EMFILE", "ECONNABORTED",
    "ECANCELED", "ENOSPC", "accept", "multishot accept", "passing ", "passing cut", "passing nothing",
    "passing no stream", "PROXY header", "bad PROXY header", "in memory", "not in memory", "populated",
    "cancel too late", "broken chain", "write", "short write", "the log fails", "published")


class World:
    """A worker, its clients, and the chance that drives them. What must hold is looked at after each batch."""

    slack = 0           # bytes that may come at once, besides what the buffers hold

    def __init__(self, seed, clock, listeners=1):
        self.rnd = rnd = random.Random(seed)
        self.clock = clock
        self.kernel = kernel = Kernel(clock)
        self.limits = Limits(max_connections=rnd.choice((1, 2, 3, 5, 8)), header_timeout=4, keepalive_timeout=8,
                             min_rate=500, drain=6)
        self.listeners = listeners
        kernel.most_completions = rnd.choice((4, 16, 1024))
        self.clients = []           # all that there have been
        self.worker = self.make_worker(rnd.choice((Ring, Ring, PolledRing)), self.ring_options() | self.more_options())
        self.steps = rnd.choice((100, 400, 700))
        self.signals = {rnd.randrange(self.steps): number for number, chance in (
            (signal.SIGUSR1, 0.2), (signal.SIGUSR2, 0.2), (signal.SIGTERM, 0.4), (clock_module.END_NOW, 0.05),
            (clock_module.LOOK_AGAIN, 0.2))
            if rnd.random() < chance}
        self.busy = rnd.choice((0.02, 0.1, 0.5))        # how often someone connects
        self.lateness = rnd.choice((0.0, 0.5, 0.9))     # how often something that could complete does not yet
        self.trouble = rnd.choice((0.0, 0.02))          # how often something fails
        self.step = 0
        self.phase = "busy"
        self.waited = 0
        self.signalled = None       # when it was told to stop
        self.retired = None         # likewise
        self.at_once = False        # whether it was told to end at once
        self.all_close = False      # whether each response may be the last
        self.stale = 0              # how many completions of former connections there have been
        self.left = 0               # how often all listeners have been left
        self.worker.acceptor.on_left = self.on_left
        self.finish_log, self.worker.clock.finish = self.worker.clock.finish, self.on_end_of_loop
        kernel.on_enter = self.on_enter
        kernel.on_wait = self.on_wait
        kernel.submits = self.submits
        kernel.choose_slot = rnd.choice
        kernel.holds = lambda: rnd.random() < 0.05

    # what others may do otherwise

    def ring_options(self):
        rnd = self.rnd
        return {"entries": rnd.choice((4, 8, 64)), "buffers": rnd.choice((2, 8, 16)),
                "buffer_size": rnd.choice((16, 64, 512))}

    def more_options(self):
        """What there may be besides connections on listeners: see `common`."""
        rnd = self.rnd
        self.passing = rnd.random() < 0.3
        self.trusted = ["10.0.0.0/8"] if rnd.random() < 0.3 else None
        self.log = rnd.choice(("combined", "combined", "json", None))
        return {"passing": self.passing, "trusted": self.trusted, "lazy": rnd.random() < 0.4, "log": self.log,
                "log_to_file": rnd.random() < 0.5, "publish": self.on_publish}

    def make_worker(self, kind, options):
        return make_worker(self.kernel, self.clock, self.limits, self.listeners, kind, **options)

    def choose_listener(self):
        """Where somebody connects."""
        return self.rnd.choice(list(self.kernel.listeners))

    def new_client(self, listener):
        """One that connects to `listener`."""
        return Client(self.rnd)

    def come(self):
        """Somebody connects, or is passed by another process."""
        slot = self.choose_listener()
        queue = self.kernel.listeners[slot].queue
        if len(queue) == 4:
            return
        client = self.new_client(slot)
        self.introduce(client)
        if slot != self.kernel.passing:
            queue.append(client)
            return
        datagram = Datagram(client, client.give(self.rnd.choice((0, 0, 1, 10, 50, 300))))
        kind = self.rnd.choice(("",) * 20 + ("nothing", "cut", "no stream"))
        self.kernel.counts[f"passing {kind}"] += 1
        if kind == "nothing":
            datagram.passed = None
        elif kind:
            datagram.cut, client.is_stream = kind == "cut", kind != "no stream"
            client.want_nothing("not passed well")
        queue.append(datagram)

    def introduce(self, client):
        """Each has an address of its own. Those from proxies say for whom they speak, as well as they can."""
        client.source, proxy, speaks_for = self.addresses(len(self.clients))
        client.who = client.source
        self.clients.append(client)
        if self.trusted is None or self.rnd.random() < 0.4:
            return
        client.source = proxy
        header, said, good = random_header(self.rnd, speaks_for)
        client.who = speaks_for if said else client.source
        client.begin_with(header)
        self.kernel.counts["PROXY header" if good else "bad PROXY header"] += 1
        if not good:
            client.want_nothing("no good PROXY header")

    def addresses(self, number):
        """(a client's, a proxy's, the one that it speaks for): nobody else's."""
        return tuple(b"%b.%d.%d" % (network, *divmod(number, 256)) for network in (b"203.0", b"10.0", b"198.18"))

    def last_client(self):
        """One that wants what it will get."""
        last = Client(random.Random(0))
        last.plan([(get(b"/"), Wanted(200, content(b"/")))])
        return last

    def run(self):
        try:
            self.worker.run()
            self.at_end()
        finally:
            self.kernel.close()

    # chance

    def submits(self, count):
        """Now and then the kernel has no memory for all of them."""
        return self.rnd.randrange(count + 1) if self.rnd.random() < 0.02 else count

    def on_enter(self, waiting):
        """Before submission: what is armed now may come too late for what happens here."""
        if waiting and self.phase != "log":
            self.check()
            self.next_step()
        if self.rnd.random() < 0.5:
            self.something_happens()

    def on_wait(self):
        if self.rnd.random() < 0.02:
            return                                      # a signal for nobody
        for _ in range(self.rnd.randrange(4)):
            self.something_happens()
        while not self.kernel.unseen:
            if not self.something_happens(always=True):
                self.pass_time(self.rnd.random())

    def something_happens(self, always=False):
        """Clients act, and some operations go on; tell whether anything completed."""
        for client in self.present():
            client.act()
        happened = False
        operations = list(self.kernel.operations)
        self.rnd.shuffle(operations)
        if self.rnd.random() < 0.05:
            self.kernel.warm -= set(self.rnd.sample(sorted(self.kernel.warm), len(self.kernel.warm) // 2))
        for operation in operations:
            if operation in self.kernel.operations and (
                    always or operation.code == linux.OP_TIMEOUT or self.rnd.random() > self.lateness):
                happened |= bool(self.go_on(operation))
        return happened

    def present(self):
        waiting = [client for listener in self.kernel.listeners.values() for client in listener.queue]
        passed = [each.passed if isinstance(each, Datagram) else each for each in waiting]
        return [*self.kernel.sockets.values(), *filter(None, passed)]

    def go_on(self, operation):
        rnd, kernel = self.rnd, self.kernel
        if rnd.random() < self.trouble and self.phase == "busy" and not operation.held:
            if operation.code == linux.OP_ACCEPT:
                return kernel.end(operation, rnd.choice((errno.EMFILE, errno.ENFILE, errno.ECONNABORTED)))
            if self.passing and operation.slot == kernel.passing:
                return kernel.end(operation, rnd.choice((errno.ENOMEM, errno.EINTR)))
            if operation.code in STREAMS:
                return self.break_stream(operation)
            if operation.code == linux.OP_MADVISE:
                kernel.sockets[operation.slot].excuse = "a disk error"
                return kernel.end(operation, rnd.choice((errno.EFAULT, errno.EAGAIN)))
        if operation.code == linux.OP_WRITE and rnd.random() < 3 * self.trouble and self.phase == "busy":
            kernel.counts["the log fails"] += 1
            return kernel.end(operation, rnd.choice((errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EIO)))
        if operation.code == linux.OP_MADVISE and not operation.started_work and not operation.cancelled:
            operation.started_work = rnd.random() < 0.5
            return False
        size = rnd.choice((1, 10, 100, 10_000, 10_000))
        more = rnd.random() > 0.05
        if operation.code in SENDS and operation.done and rnd.random() < 0.2 and self.may_fall_short(operation):
            self.kernel.counts["short"] += 1
            return self.kernel.end(operation, errno.EAGAIN)
        return self.kernel.go_on(operation, size, more)

    def may_fall_short(self, operation):
        """Whether a send may end before its end without an error."""
        return True

    def break_stream(self, operation):
        client, rnd = self.kernel.sockets[operation.slot], self.rnd
        if operation.code in RECEIVES:
            passing = rnd.random() < 0.7
            error = rnd.choice((errno.ECANCELED, errno.EINTR, errno.ENOBUFS) if passing else
                               (errno.ECONNRESET, errno.ETIMEDOUT))
        else:
            passing = bool(operation.done)
            error = rnd.choice((errno.EPIPE, errno.ECONNRESET, errno.EFAULT, errno.ECANCELED))
        if not passing:
            client.excuse = errno.errorcode[error]
        return self.kernel.end(operation, error)

    def next_step(self):
        rnd = self.rnd
        self.step += 1
        if rnd.random() < 0.1:
            self.pass_time(rnd.choice((0.1, 0.5, 1, 1)))
        if self.phase == "busy":
            if rnd.random() < self.busy:
                self.come()
            if self.step in self.signals:
                self.signal(self.signals[self.step])
            if self.step >= self.steps:
                self.all_leave()
        else:
            self.after_leaving()

    def pass_time(self, seconds):
        """A sleeper is woken when its time is up, not later."""
        due = [operation.due for operation in self.kernel.operations if operation.code == linux.OP_TIMEOUT]
        self.clock.now = min(self.clock.now + seconds, *due, self.clock.now + 1) if due else self.clock.now + 0.01

    def signal(self, number):
        self.all_close |= number != clock_module.LOOK_AGAIN
        if number == clock_module.END_NOW:
            self.at_once = True
        elif number == signal.SIGTERM:
            self.signalled = self.signalled or self.clock.now
            if self.passing:
                self.kernel.listeners[self.kernel.passing].shut = self.rnd.random() < 0.8
        elif number == signal.SIGUSR2:
            self.retired = self.clock.now
        self.kernel.counts.update(
            {f"{connection.state} at signal {number}" for connection in self.worker.connections.slots})
        self.kernel.signals.append(number)

    def on_left(self):
        self.left += 1

    def on_publish(self):
        """What the worker says that there is, is there."""
        worker, counts = self.worker, self.worker.counts
        assert worker.connections.live == sum(getattr(counts, name) for name in set(clock_module.GAUGE.values()))
        assert counts.waiting == len(worker.acceptor.parked)
        self.kernel.counts["published"] += 1

    def on_end_of_loop(self):
        """What completes from now on is of no interest, but for the log."""
        self.phase = "log"
        self.finish_log()

    # the end: first all clients go, then a last one comes and is served, then the signal

    def all_leave(self):
        self.phase = "leaving"
        self.deadline = self.clock.now + 60
        for client in self.present():
            client.vanish()

    def after_leaving(self):
        kernel, worker = self.kernel, self.worker
        assert self.clock.now < self.deadline, f"stuck in {self.phase}: {self.describe()}"
        if self.signalled is not None or self.retired is not None or self.at_once:
            return
        if self.phase == "leaving" and not kernel.sockets and not any(
                listener.queue for listener in kernel.listeners.values()):
            assert worker.connections.live == 0 and not worker.acceptor.parked, self.describe()
            self.phase, self.deadline = "last", self.clock.now + 60
            self.last = self.last_client()
            self.clients.append(self.last)
            self.last.source = self.last.who = b"192.0.2.77"
            kernel.listeners[worker_slot(worker)].queue.append(self.last)
        elif self.phase == "last" and self.last.answered(self.all_close)[0] == 1:
            self.phase, self.deadline = "stopping", self.clock.now + self.limits.drain + 5
            self.signal(signal.SIGTERM)

    def at_end(self):
        """After `run` has returned."""
        self.check_closed()
        assert self.signalled is not None or self.retired is not None or self.at_once
        drained = not self.worker.connections.live and not self.worker.acceptor.listeners
        assert drained or self.at_once or self.signalled and self.clock.now - self.signalled >= self.limits.drain - 1
        assert self.left == (not self.worker.acceptor.listeners)
        if drained:
            assert all(connection.state is FREE for connection in self.worker.connections.slots)
        for client in self.kernel.sockets.values():
            client.answered(True)
        self.check_counts(drained)
        if self.log:
            self.check_log()
        counts = self.worker.counts
        for name in (*REACHED, *clock_module.RESPONSES):
            self.kernel.counts[name] += getattr(counts, name)

    def check_counts(self, drained):
        counts = self.worker.counts
        self.count_sent(drained)
        answered = Counter(status // 100 for client in self.clients
                           for status, _, whole, _ in client.outline() if whole)
        for i, name in enumerate(clock_module.RESPONSES, 1):
            assert not drained or getattr(counts, name) >= answered[i]
        if self.log:
            assert counts.log_lines == self.kernel.log.count(b"\n")
            responses = sum(getattr(counts, name) for name in clock_module.RESPONSES[1:])
            assert counts.log_lines + counts.log_dropped == responses

    def count_sent(self, drained):
        """As many bytes as clients have had."""
        assert not drained or self.worker.counts.bytes_sent == sum(len(client.received) for client in self.clients)

    def check_log(self):
        """A line for each response that has been begun, in whole lines, in the order of each connection."""
        kernel, log = self.kernel, self.worker.access_log
        assert not log.busy and not log.lines and kernel.log[-1:] in (b"", b"\n")
        lines = {}
        for line in bytes(kernel.log).splitlines():
            who, *what = read_line(line, self.log)
            lines.setdefault(who, []).append(what)
        assert not lines.keys() - {client.who for client in self.clients}
        if not log.dropped:
            for client in self.clients:
                self.compare(client, lines.get(client.who, []))

    def compare(self, client, lines):
        outline = client.outline()
        if not client.closed and outline and len(lines) < len(outline):
            outline.pop()                   # it was being sent at the end of the time for it
        assert len(outline) <= len(lines) <= len(outline) + 1, (outline, lines)
        for (status, size, whole, request), (its_status, its_size, its_request) in zip(outline, lines, strict=False):
            assert status == its_status
            assert size == its_size or self.may_differ(client, whole)
            assert request in (its_request, None) or its_status in REFUSALS
        for _, size, _ in lines[len(outline):]:
            assert not size, "a line for what has not been sent"

    def may_differ(self, client, whole):
        """Whether the log may tell of fewer bytes of content than the client has had."""
        return False

    def describe(self):
        slots = self.worker.connections.slots
        return [(connection.slot, connection.state, connection.receiving) for connection in slots
                if connection.state is not FREE] + [(operation.code, operation.slot, operation.cancelled)
                                                    for operation in self.kernel.operations]

    # what must hold after each batch

    def check(self):
        self.check_state()
        self.check_closed()
        self.remember()

    def check_state(self):
        worker, kernel = self.worker, self.kernel
        unseen = self.unseen()
        live = 0
        armed = self.entries = self.armed()
        closing = {entry.fd for entry in armed if entry.opcode == linux.OP_CLOSE}
        self.flying = {tuple(entry.user_data) for entry in armed}
        self.flying.update(user for user, _, _, flags in unseen if not flags & linux.CQE_MORE)
        for operation in kernel.operations:
            self.flying.update((operation.user, *(other.user for other in operation.behind)))
        fresh = {kernel.passed if slot == kernel.passing else result
                 for user, slot, result, _ in unseen if user[0] & ~SLOT == ACCEPT and result >= 0}
        for connection in worker.connections.slots:
            slot = connection.slot
            is_open = slot in kernel.sockets and slot not in fresh and slot not in closing
            assert (connection.state is not FREE) == is_open, (connection.state, slot)
            live += is_open
            if is_open:
                self.check_connection(connection, kernel.sockets[slot])
        assert worker.connections.live == live <= len(worker.connections.slots)
        assert worker.stale == self.stale
        assert not worker.acceptor.parked or live - len(worker.acceptor.parked) >= self.limits.max_connections
        assert len({connection.slot for connection in worker.acceptor.parked}) == len(worker.acceptor.parked)
        assert all(connection.state in (PREFACE, IDLE, HANDSHAKE) and not connection.receiving
                   for connection in worker.acceptor.parked)
        self.check_buffers(unseen)

    def unseen(self):
        """Completions that no handler has been given."""
        return [*self.kernel.handing, *self.kernel.unseen]

    def in_flight(self, kind, slot):
        """Whether an operation (RECV, SEND, SHUTDOWN) on a slot is armed, in flight, or completed and not yet taken."""
        return (kind | slot, self.worker.connections.slots[slot].epoch) in self.flying

    def is_sending(self, connection):
        """Whether a send of a connection is in flight."""
        return self.in_flight(connection.send_tag, connection.slot)

    def armed(self):
        """The entries that the kernel has not taken yet."""
        ring, start = self.worker.engine, self.kernel.sq_head
        return [Sqe.from_buffer_copy(ring.queue, (i & ring.mask) * 64) for i in range(start, ring.tail)]

    def check_connection(self, connection, client):
        state, slot = connection.state, connection.slot
        assert connection.receiving == self.in_flight(connection.recv_tag, slot), "receive"
        sending = state in (RESPONSE, INTERIM) or connection.sending
        assert sending == self.is_sending(connection), f"send in {state}"
        assert connection.shutting == self.in_flight(SHUTDOWN, slot), "shutdown"
        parked = connection in self.worker.acceptor.parked
        assert illegal_flags(connection) == ["receiving"] * (parked and state in (PREFACE, IDLE)), f"flags in {state}"
        if state is LINGER:
            assert connection.receiving or connection.at_end and connection.sending, f"deaf in {state}"
        if state is RESPONSE or state is INTERIM:
            assert (connection.receiving or connection.at_end or len(connection.pending) > worker_module.MAX_PENDING
                    or connection.plan.close)
        if state is IDLE:
            assert not connection.pending or connection in self.worker.acceptor.parked
            assert not connection.sent and not connection.at_end
            assert not self.worker.connections.stopping or connection.plan is None, "left idle at the end"
        if state is CLOSING:
            assert connection.receiving or connection.sending or connection.shutting, "nothing will end this"
            self.decide(client)
        # A cancel takes a batch to arrive, and the buffers may go round once before it is submitted.
        slack = self.slack + 2 * self.worker.engine.buffer_size * self.kernel.buffers
        assert len(connection.pending) <= worker_module.MAX_PENDING + slack

    def decide(self, client):
        """The worker has decided to end this: what it had seen before has to be answered, unless there is an excuse."""
        if client.decided is None:
            client.decided = client.seen_before
            waited = self.clock.now - client.sent_at
            if client.excuse is None and waited >= clock_module.SEND_GRACE - 2:     # ticks are coarse
                client.excuse = "slow"

    def check_buffers(self, unseen):
        """Each receive buffer is in the ring, or being filled, or in a completion that nobody has taken: once."""
        ring, kernel = self.worker.engine, self.kernel
        held = [flags >> linux.CQE_BUFFER_SHIFT for _, _, _, flags in unseen if flags & linux.CQE_BUFFER]
        held += [operation.held[0] for operation in kernel.operations if operation.held]
        given = [kernel.buffer(position) for position in range(kernel.buffer_head, ring.buffer_tail)]
        assert sorted(held + [buffer for _, _, buffer in given]) == list(range(kernel.buffers))
        for address, length, buffer in given:
            assert (address, length) == (ring.buffer_address(buffer), ring.buffer_size)

    def check_closed(self):
        """Clients whose connection has ended have got what they ought to."""
        for client in self.kernel.closed:
            self.decide(client)
            for status in re.findall(rb"HTTP/1\.1 (\d\d\d) ", client.received):
                self.kernel.counts[f"answered {status.decode()}"] += 1
            count, closes, rest = client.answered(self.all_close)
            self.check_farewell(client, rest)
            due = client.due()
            assert closes or client.excuse or count >= due, (
                f"{count} answered of {due} seen, {len(client.wanted)} wanted, {client.received[-200:]}")
        self.kernel.closed.clear()

    def check_farewell(self, client, rest):
        """How a connection has ended, `rest` being of a response that was cut off."""

    def remember(self):
        if self.kernel.overflow:        # nobody knows when they will be seen
            return
        for client in self.kernel.sockets.values():
            client.seen_before, client.seen = client.seen, client.delivered


def random_header(rnd, address):
    """(a PROXY header, whether it says that the client is `address`, whether it is a good one)."""
    v2, family = b"\r\n\r\n\0\r\nQUIT\n", socket.AF_INET6 if b":" in address else socket.AF_INET
    own, number, kind = (b"::1", b"6", b"\x21") if family == socket.AF_INET6 else (b"192.0.2.1", b"4", b"\x11")
    inet = b"".join(socket.inet_pton(family, end.decode()) for end in (address, own)) + struct.pack(">HH", 1234, 80)
    return rnd.choice((
        (b"PROXY TCP%b %b %b 1234 80\r\n" % (number, address, own), True, True),
        (b"PROXY UNKNOWN\r\n", False, True),
        (b"PROXY UNKNOWN \"\\\r\n", False, True),
        (v2 + b"\x21" + kind + struct.pack(">H", len(inet)) + inet, True, True),
        (v2 + b"\x21" + kind + struct.pack(">H", len(inet) + 10) + inet + b"\x04\0\7" + bytes(7), True, True),
        (v2 + b"\x20\0\0\0", False, True),
        (b"", False, False),
        (b"PROXY TCP4 300.0.0.1 192.0.2.1 1 2\r\n", False, False),
        (b"PROXY UNKNOWN " + b"x" * 100, False, False),
        (v2 + b"\x31" + kind + struct.pack(">H", len(inet)) + inet, False, False),
    ))


COMBINED = re.compile(rb'([^ ]+) - - \[[0-9]{2}/[A-Z][a-z]{2}/[0-9]{4}:[0-9:]{8} \+0000\] '
                      rb'"([^"]*)" ([0-9]{3}) ([0-9]+|-) "([^"]*)" "([^"]*)"')


def read_line(line, style):
    """[who, status, bytes, request line] of a line of the access log."""
    if style == "combined":
        who, request, status, size, referer, agent = COMBINED.fullmatch(line).groups()
        assert referer == agent == b"-"
        return [who, int(status), int(size.replace(b"-", b"0")), request]
    told = json.loads(line)
    request = " ".join(filter(None, (told["method"], told["target"], told["protocol"])))
    return [told["remote"].encode(), told["status"], told["bytes"], request.encode()]


def worker_slot(worker):
    return next(iter(worker.acceptor.listeners))


def play(seeds, clock, **options):
    for seed in seeds:
        try:
            clock.now = 1000.0
            World(seed, clock, **options).run()
        except BaseException:
            print(f"TARWEB_SEED={seed}")
            raise


# --- schedules with something to say

class Over(Exception):
    """A script has come to its end, and the worker is to be abandoned."""


def perform(script, clock, limits=None, listeners=1, make=make_worker, **options):
    """Run a worker against script(kernel, worker), a generator: each `yield` hands the worker what was completed.

    Tells whether the worker came to its end before the script did; the rest of that looks at what is left.
    """
    kernel = Kernel(clock)
    worker = make(kernel, clock, limits or Limits(), listeners, **options)
    steps = script(kernel, worker)

    def on_wait():
        if next(steps, Over) is Over:
            raise Over

    kernel.on_wait = on_wait
    try:
        worker.run()
        kernel.over = True
        for _ in steps:
            pass
        return True
    except Over:
        return False
    finally:
        kernel.close()


def connect(kernel, *pieces, room=10 ** 6, listener=0, source=b"192.0.2.1"):
    """A client that is let in, and what it sends with it."""
    client = Socket()
    client.source = source
    client.room = room
    client.incoming.extend(pieces)
    [*kernel.listeners.values()][listener].queue.append(client)
    return client


def settle(kernel):
    """Let all happen that can, until nothing more does."""
    kernel.go_on_all()
    while kernel.unseen and not kernel.over:
        yield
        kernel.go_on_all()


def seconds(kernel, count):
    """Let time pass, with all that it brings."""
    for _ in range(count):
        kernel.clock.now += not kernel.over
        yield from settle(kernel)


def tell(kernel, number):
    """Send the worker a signal."""
    kernel.signals.append(number)
    yield from settle(kernel)


def stop(kernel):
    yield from tell(kernel, signal.SIGTERM)


def end_at_once(kernel):
    yield from tell(kernel, clock_module.END_NOW)


def retire(kernel):
    yield from tell(kernel, signal.SIGUSR2)


def statuses(client):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", client.received)]
