"""A Worker with TLS on the simulated kernel: clients that speak TLS over its sockets, chance that drives them, scripts.

A client's TLS is Python's ssl in memory, or, where it has to do what no decent client does, records made by hand. The
simulated kernel seals and opens records with the keys that it is given. So a wrong key or number, or bytes that
change while they are sent, are an error at one of the ends, never unnoticed.
"""

import errno
import fcntl
import os
import random
import ssl
import weakref

import machine
import tlskeys
from machine import ADDRESS, CONTENT, Client, Wanted, World, content, get
from simulated import FILES_FROM, SOL_TLS, Socket, make_ring
from tlsmemory import ALL_CIPHERS, ClientContext, Peer

import transport
from connection import (
    CLOSING, FLIGHT, GOODBYE, HANDSHAKE, IDLE, KEYS, PREFACE, RESPONSE, SEND_TLS, SLOT, Limits,
)
from plan import ForgetfulMemo, Site
from reply import Responder
from uring import Ring
from worker import Worker

LARGE = {b"/large": (500, 20_000)}          # more than one record
SMALL = {
    transport: {"SEAL_SIZE": 6000, "LARGEST_KEPT": 4000, "MEMO_PLAINTEXT": 2500, "FREE_BUFFERS": 2,
                "ROOM_AT_ONCE": 400},
    transport.UserspaceTls: {"send_size": 6000},
}
HANDSHAKE_FAILURE = b"\2\x28"        # RFC 8446 section 6.2: an alert, fatal
CONTEXTS = {version: ClientContext(version) for version in ("1.2", "1.3")}


class Archive:
    """CONTENT in a real file; what `find` knows of it is FILES."""

    def __init__(self):
        fd = os.memfd_create("archive")
        self.fd, self.size = fcntl.fcntl(fd, fcntl.F_DUPFD, FILES_FROM), len(CONTENT)
        os.close(fd)
        os.pwrite(self.fd, CONTENT, 0)
        self.address, self.lazy, self.copied = ADDRESS, False, False
        self.find = machine.index().get

    def close(self):
        os.close(self.fd)


class Buffer(transport.Buffer):
    """One that is known of as long as it lives."""

    alive: weakref.WeakSet = weakref.WeakSet()

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.alive.add(self)


def make_secure_worker(kernel, clock, limits, engine, listeners=1, kind=Ring, plain=0, **options):
    """A Worker on `listeners` for TLS, and `plain` more without, which are `worker.plain_listeners`; its archive is at
    `worker.archive`."""
    more = {name: options.pop(name) for name in machine.MORE & options.keys()}
    passing = more.get("passing", False)
    slots = limits.max_connections + listeners + plain + passing
    ring = make_ring(kernel, slots, listeners + plain + passing, kind, passing, **options)
    archive = Archive()
    kernel.steady = lambda tag: tag & ~SLOT in (FLIGHT, SEND_TLS, GOODBYE)
    common = machine.common(kernel, clock, limits, archive, ring, **more)
    responder = Responder(archive, b"")
    plain_site = Site(ForgetfulMemo(common["library"], b"tarweb", clock.time()), responder.reply, responder.expand)
    worker = Worker(**common)
    worker.archive, worker.plain_listeners = archive, range(slots + listeners, slots + listeners + plain)
    transport.add_tls(worker, engine, worker.plain_listeners, plain_site)
    return worker


class Tls:
    """Mixed into a Socket: `received` is plaintext then, `unsent` what the client is going to put on the wire."""

    def begin_tls(self, context, session=None, by_hand=False):
        self.peer = Peer(context, session=session)
        self.unsent, self.put = self.peer.handshake(), 0
        self.by_hand, self.writer = by_hand, None
        self.wire = bytearray()         # what has come from the server
        self.alert = ""                 # what made an end of the reading

    @property
    def notified(self):
        """Whether the server has said close_notify."""
        return self.peer.at_end

    @property
    def produced(self):
        """Bytes that have been put on the wire or will be."""
        return self.put + len(self.unsent)

    def take(self, data):
        assert not self.notified, "more after close_notify"
        self.wire += data
        if self.alert:
            return
        try:
            if not self.peer.done:
                self.unsent += self.peer.handshake(data)
                data = b""
            if self.peer.done:
                self.received += self.peer.read(data)
        except ssl.SSLError as error:
            self.alert = str(error)

    def say(self, data):
        """Encrypt; it is sent by `push`."""
        self.unsent += self.hand.seal_all(data) if self.by_hand else self.peer.encrypt(data)

    @property
    def hand(self):
        """What seals records by hand."""
        self.writer = self.writer or self.peer.directions()[0]
        return self.writer

    def say_record(self, content, kind):
        assert self.by_hand
        self.unsent += self.hand.seal(content, kind)

    def renew(self, asking=False):
        """KeyUpdate, and from then on the next keys."""
        self.say_record(tlskeys.KEY_UPDATE_ASKED if asking else tlskeys.KEY_UPDATE, tlskeys.HANDSHAKE)
        self.writer = self.writer.next()

    def say_goodbye(self):
        if self.by_hand:
            self.say_record(tlskeys.CLOSE_NOTIFY, tlskeys.ALERT)
        else:
            self.unsent += self.peer.close_notify()

    def push(self, size=1 << 30):
        """Send of `unsent` what fits into one segment of this size."""
        piece, self.unsent = self.unsent[:size], self.unsent[size:]
        self.put += len(piece)
        if piece:
            self.incoming.append(piece)


class Caller(Tls, Socket):
    """A client for scripts: it shakes hands by itself, unless told to `hold`, and sends what it is told to."""

    def __init__(self, version="1.3", context=None, session=None, by_hand=False, hold=False, room=10 ** 6):
        super().__init__()
        self.hold = hold
        self.room = room
        self.begin_tls(context or CONTEXTS[version], session, by_hand)
        self.flush()

    def take(self, data):
        super().take(data)
        self.flush()

    def flush(self):
        if not self.hold:
            self.push()

    def ask(self, *data):
        """Send each of these in a record of its own, all in one segment."""
        for piece in data:
            self.say(piece)
        self.push()


# --- chance

class TlsClient(Tls, Client):
    """A random client; `boundaries` count plaintext, `marks` where on the wire requests end."""

    def __init__(self, rnd, former=()):
        Client.__init__(self, rnd)
        self.encrypted, self.marks, self.oddities = 0, [], 0
        self.renewed = None                     # how many marks there were when the keys changed
        self.broke = False                      # it has broken TLS
        self.in_handshake = False               # the server had not done with it when it was last looked at
        self.version = version = rnd.choice(("1.2", "1.3", "1.3"))
        self.context = CONTEXTS[version]
        self.oddity = rnd.choice(("", "", "", "records", "keys", "damage", "garbage")) if version == "1.3" else (
            rnd.choice(("", "", "damage", "garbage")))
        self.damage_at = rnd.choice((rnd.randrange(700), rnd.randrange(3000)))
        sessions = [session for of, session in former if of == version]
        session = rnd.choice(sessions) if sessions and rnd.random() < 0.6 else None
        self.begin_tls(self.context, session, by_hand=self.oddity in ("records", "keys"))
        self.reads = rnd.choice((0, 30, 1000, 10_000, 10_000, 10_000, 10_000))      # a handshake alone takes 1,000
        self.pieces = rnd.choice((20, 300, 300, 5000))
        self.leaves = rnd.choice((None, "notify", "notify", "notify and eof", "eof", "reset"))
        self.said_goodbye = False

    def begin_with(self, header):
        self.unsent = header + self.unsent
        self.damage_at += len(header)

    def want_nothing(self, excuse):
        super().want_nothing(excuse)
        self.marks = []

    def give(self, size):
        piece, self.unsent = self.unsent[:size], self.unsent[size:]
        self.put += len(piece)
        return piece

    def act(self):
        rnd = self.rnd
        self.room = max(self.room, int(2 * rnd.random() * self.reads))
        if rnd.random() > self.eager or self.eof or self.reset or self.alert:
            return
        if self.peer.done and not self.said_goodbye and (not self.unsent or rnd.random() < 0.5):
            self.go_on()
        if self.unsent:
            self.put_some()
        elif self.said_goodbye and self.leaves == "notify and eof":
            self.eof = True
        if rnd.random() < self.fickle:
            self.vanish()
        elif rnd.random() < self.fickle:
            self.eof = True                     # in the middle of whatever it was

    def go_on(self):
        """Say the next thing."""
        rnd, limit = self.rnd, len(self.script)
        if self.encrypted >= limit:
            self.leave()
            return
        if self.patient:
            answered = self.received.count(b"HTTP/1.1 ")
            limit = next((at for at in self.boundaries[answered:]), limit)
        piece = self.script[self.encrypted:min(limit, self.encrypted + rnd.choice((1, 30, 200, 600, 3000)))]
        if piece:
            self.say(piece)
            self.encrypted += len(piece)
            reached = sum(boundary <= self.encrypted for boundary in self.boundaries)
            self.marks += [self.produced] * (reached - len(self.marks))
        self.be_odd()

    def be_odd(self):
        rnd = self.rnd
        if self.oddity == "records" and self.oddities < 5 and rnd.random() < 0.1:     # OpenSSL has its limits too
            self.oddities += 1
            kind = rnd.choice((tlskeys.ALERT, tlskeys.APPLICATION_DATA, tlskeys.APPLICATION_DATA))
            self.say_record(tlskeys.USER_CANCELED if kind == tlskeys.ALERT else b"", kind)
        if self.oddity == "keys" and self.renewed is None and rnd.random() < 0.2:
            self.renewed = len(self.marks)
            self.renew(rnd.random() < 0.5)
        if self.oddity == "garbage" and rnd.random() < 0.05:
            self.unsent += b"\x17\3\3\0\x20" + bytes(32)
            self.broke, self.excuse = True, "garbage"

    def leave(self):
        if self.leaves == "eof" and not self.unsent:
            self.eof = True
        elif self.leaves == "reset" and self.rnd.random() < 0.1:
            self.vanish()
        elif self.leaves in ("notify", "notify and eof"):
            self.say_goodbye()
            self.said_goodbye = True
        elif self.leaves == "alert":
            self.say_record(HANDSHAKE_FAILURE, tlskeys.ALERT)
            self.said_goodbye, self.excuse = True, "alert"

    def put_some(self):
        """A segment; one bit of what is sent may be wrong."""
        size, before = self.rnd.randrange(1, self.pieces + 1), self.put
        self.push(size)
        at = self.damage_at - before
        if self.oddity == "damage" and 0 <= at < len(self.incoming[-1]):
            piece = bytearray(self.incoming.pop())
            piece[at] ^= 1 << self.rnd.randrange(8)
            self.incoming.append(bytes(piece))
            self.broke, self.excuse = True, "damage"

    def due(self):
        due = sum(mark <= self.decided for mark in self.marks)
        if self.renewed is not None and self.rx:        # with new keys the kernel can receive no more
            due = min(due, self.renewed)
        return 0 if self.in_handshake else due


class Stranger(Client):
    """A client that speaks no TLS."""

    def __init__(self, rnd):
        super().__init__(rnd)
        self.plain = rnd.random() < 0.5
        if self.plain:
            self.plan([(get(b"/"), Wanted(400, closes=True))])
            self.eager = rnd.choice((0.02, 0.3, 1.0))
        else:
            self.script, self.wanted, self.boundaries = b"\x16" + rnd.randbytes(rnd.choice((4, 50, 3000))), [], []
        self.excuse = "a stranger"

    def answered(self, stopping):
        return super().answered(stopping) if self.plain else (0, True, b"")


class SecureWorld(World):
    """As World, with TLS on one listener and without on the other; `engine` has the credentials."""

    slack = tlskeys.LARGEST     # the rest of a record, of which nothing has come out before

    def __init__(self, seed, clock, engine):
        self.base = engine
        self.former = []                # (version, session to resume) of clients before
        Buffer.alive.clear()
        super().__init__(seed, clock, listeners=2)
        self.steps = min(self.steps, 400)
        self.signals = {step % self.steps: number for step, number in self.signals.items()}
        self.limits.header_timeout = 8
        self.kernel.refuses = self.refuses

    def make_worker(self, kind, options):
        self.engine = self.base.another(self.rnd.choice(
            (frozenset(), ALL_CIPHERS, ALL_CIPHERS, frozenset({54}), frozenset({52}))))
        return make_secure_worker(self.kernel, self.clock, self.limits, self.engine, 1, kind, plain=1, **options)

    def ring_options(self):
        rnd = self.rnd
        return super().ring_options() | {"entries": rnd.choice((4, 8, 64)), "buffer_size": rnd.choice((64, 512, 2048))}

    def choose_listener(self):
        tls, plain, *passing = self.kernel.listeners
        return self.rnd.choices((tls, plain, *passing), (85, 15, 15)[:2 + len(passing)])[0]

    def new_client(self, listener):
        if listener in self.worker.plain_listeners:
            return Client(self.rnd)
        return Stranger(self.rnd) if self.rnd.random() < 0.05 else TlsClient(self.rnd, self.former)

    def last_client(self):
        last = TlsClient(random.Random(0))
        last.oddity, last.by_hand = "", False
        last.plan([(get(b"/"), Wanted(200, content(b"/")))])
        return last

    def may_fall_short(self, operation):
        """No handshake survives it: then the connection is over."""
        if operation.user[0] & ~SLOT not in (FLIGHT, KEYS):
            return True
        if self.rnd.random() >= self.trouble or self.phase != "busy":
            return False
        self.kernel.sockets[operation.slot].excuse = "a flight fell short"
        return True

    def refuses(self, socket, level, _name):
        """Without the ULP it is done in userspace; without keys it cannot be done any more."""
        if self.rnd.random() >= self.trouble or self.phase != "busy":
            return 0
        if level == SOL_TLS:
            socket.excuse = "keys refused"
        return errno.ENOMEM

    def run(self):
        try:
            super().run()
            assert not self.engine.openssl.alive or self.worker.connections.live
        finally:
            for connection in self.worker.connections.slots:
                if connection.session is not None:
                    self.engine.free(connection.session)
            self.worker.archive.close()

    # what must hold after each batch, besides

    def check_state(self):
        super().check_state()
        worker, userspace = self.worker, self.worker.userspace
        sessions = [connection.session for connection in worker.connections.slots if connection.session]
        assert self.engine.left() == (0, 0, 0)
        assert sorted(session.ssl.value for session in sessions if session.ssl) == sorted(self.engine.openssl.alive)
        buffers = [*worker.userspace.small_buffers, *worker.userspace.large_buffers,
                   *(session.buffer for session in sessions if session.buffer)]
        assert len(buffers) == len(set(buffers)) and set(buffers) == set(Buffer.alive), "a buffer lost, or used twice"
        assert all(len(free) <= transport.FREE_BUFFERS for free in (userspace.small_buffers, userspace.large_buffers))
        assert worker.userspace.gathered_size == sum(plan.total for plan in worker.userspace.gathered)
        assert len(worker.farewell.last_words) <= worker.engine.entries

    def check_connection(self, connection, client):
        # What falls short of a piece is no new beginning of its time.
        if connection.state is not CLOSING:
            client.began = connection.since if connection.state is RESPONSE else self.clock.now
        super().check_connection(connection, client)
        session, state = connection.session, connection.state
        client.in_handshake = state in (PREFACE, HANDSHAKE) or state is not IDLE and client.decided is not None and (
            getattr(client, "in_handshake", False))
        if state is HANDSHAKE and connection not in self.worker.acceptor.parked:
            assert connection.receiving or connection.sending, "deaf in the handshake"
            assert not connection.receiving or not session or not session.established or session.wanted
        if session is None:
            assert (state in (PREFACE, HANDSHAKE) or not isinstance(client, TlsClient) or client.decided is not None
                    or client.oddity == "damage" and not client.damage_at)      # taken for plain HTTP, and told so
            return
        assert session.in_kernel == bool(client.tx and client.rx) or state is HANDSHAKE or connection.sending
        if session.in_kernel:
            assert session.ssl is session.keys is session.secrets is session.buffer is None
        elif state is IDLE:
            assert session.buffer is None

    def is_sending(self, connection):
        """The parts of a hand-over have two tags."""
        return super().is_sending(connection) or self.in_flight(KEYS, connection.slot)

    def decide(self, client):
        client.sent_at = min(client.sent_at, getattr(client, "began", client.sent_at))
        super().decide(client)

    def may_differ(self, client, whole):
        """What has gone out of a piece that was cut off is not known: a response perhaps, without what ends TLS."""
        return isinstance(client, TlsClient) and not (whole and (client.notified or not client.excuse))

    def count_sent(self, drained):
        """As plaintext, where all of it has been read."""

    def check_farewell(self, client, rest):
        """close_notify says that all has been sent; so it is said where it has, and not where not."""
        if not isinstance(client, TlsClient):
            return
        assert client.broke or not client.alert, client.alert
        if client.received and not client.broke and client.peer.tls.session.has_ticket:
            self.former = [*self.former[-3:], (client.version, client.peer.tls.session)]
        if rest:
            assert not client.notified, "it looks whole, and is not"
        elif client.received and not client.excuse and not client.unsaid:
            assert client.notified
        self.kernel.counts["notified" if client.notified else "not notified"] += 1
        self.kernel.counts["in the kernel" if client.tx else "in userspace"] += 1


# --- scripts

def perform_secure(script, clock, engine, limits=None, listeners=1, **options):
    """As machine.perform, for a Worker with TLS."""
    kept = {}

    def make(kernel, clock, limits, listeners, **options):
        kept["worker"] = make_secure_worker(kernel, clock, limits, engine, listeners, **options)
        return kept["worker"]

    try:
        return machine.perform(script, clock, limits or Limits(), listeners, make=make, **options)
    finally:
        for connection in kept["worker"].connections.slots:
            if connection.session is not None:
                engine.free(connection.session)
        kept["worker"].archive.close()


def call(kernel, listener=0, **options):
    """A Caller that is let in."""
    client = Caller(**options)
    [*kernel.listeners.values()][listener].queue.append(client)
    return client
