"""Who comes in: connections accepted on listeners or passed by another process, and what they have to show first.

A connection's slot is its descriptor. As long as there is room, accepting is a multishot operation; when the table is
nearly full it is done one by one, and when it is full who has waited longest for its client makes room (state.py), or
the new one waits.

Tags: the operation in bits 24-31, the descriptor in bits 0-23. A receive's tag is its slot alone.
"""

import errno
import logging
import math
import select
import time
from collections.abc import Callable

import linux
import proxy
from linux import CQE_MORE, MSG_CMSG_CLOEXEC, SEND_FLAGS
from plan import Site
from proxy import passed_message, take_passed
from state import ACCEPTED, FREE, PREFACED, Addresses, Connection, Eviction

log = logging.getLogger("tarweb")

RECV, SEND, ACCEPT, SHUTDOWN, CANCEL, CLOSE = (operation << 24 for operation in range(6))
SLOT = (1 << 24) - 1
GENERATIONS = (1 << 31) - 1

BACKLOG = 511               # connections that wait in the kernel to be accepted: as in nginx
RESERVE = 2 * BACKLOG       # a multishot accept may take this many connections before a cancel reaches it
PASSING_BY = (errno.ECANCELED, errno.ECONNABORTED, errno.EINTR)     # why an accept fails by our or a client's doing


class Entrance:
    """Where connections come from, and what is to be known of them.

    listeners: descriptors of listening sockets. passing: that of a datagram socket through which another process
    passes connections, or None. trusted: the proxy.Networks whose connections begin with a PROXY header, or None.
    """

    def __init__(self, listeners, passing=None, trusted=None):
        self.listeners, self.passing, self.trusted = listeners, passing, trusted


class Door:
    """Lets connections in, for a Worker, which knows what to do with them."""

    # A Worker's own: what answers those who come in; and how to go on with them.
    site: Site
    receive: Callable[..., None]
    on_bytes: Callable[..., None]
    end: Callable[..., None]

    def __init__(self, ring, limits, slots, entrance, counts, access_log=None):
        self.ring, self.limits, self.counts, self.access_log = ring, limits, counts, access_log
        self.connections = [Connection(slot) for slot in range(slots)]
        self.live = 0
        self.parked: list[Connection] = []      # accepted beyond the limit: not read from until there is room
        self.listeners = dict.fromkeys(entrance.listeners)      # descriptor -> "multishot", "single" or None, as armed
        self.passing, self.trusted = entrance.passing, entrance.trusted
        if self.passing is not None:
            self.listeners[self.passing] = None
            self.envelope = passed_message()
        self.addresses = Addresses(limits.max_per_ip) if limits.max_per_ip else None
        self.curious = bool(access_log or self.trusted or self.addresses)   # whether to ask who the peer is
        self.now = int(time.monotonic())
        self.eviction = Eviction(self.connections, linux.bytes_acknowledged)
        self.leave_by = 0               # tick after which listeners are left even while somebody waits at them
        self.on_left = lambda: None     # called once the last listener has been left
        self.stopping = False           # whether told to stop, not only to retire
        self.stop_at: float | None = None       # tick by which to end, once told to

    # listeners

    def watch_listeners(self):
        """Accept as far as there is room: multishot while there is plenty, one by one near the end of it.

        When the table is full, one more is still taken if another connection can make room for it.
        """
        if self.stop_at is not None:
            return
        room = self.limits.max_connections - self.live
        want = ("multishot" if room > RESERVE else
                "single" if room > 0 or room == 0 and self.eviction.victim(self.now, time.monotonic()) else None)
        for slot, armed in self.listeners.items():
            if armed is None and want:
                self.arm_listener(slot, want)
            elif armed and armed != want and not (slot == self.passing and want):
                self.ring.arm_cancel(CANCEL, ACCEPT | slot, 0)

    def arm_listener(self, slot, want):
        if slot == self.passing:
            self.ring.arm_recvmsg(ACCEPT | slot, 0, slot, self.envelope.address, MSG_CMSG_CLOEXEC)
        else:
            self.ring.arm_accept(ACCEPT | slot, slot, want == "multishot")
        self.listeners[slot] = want

    def leave_listeners(self):
        """Accept no more. What waits to be accepted is left to others that listen on the same sockets."""
        for slot, armed in list(self.listeners.items()):
            if armed:
                self.ring.arm_cancel(CANCEL, ACCEPT | slot, 0)
            else:
                self.drop_listener(slot)

    def drop_listener(self, slot):
        del self.listeners[slot]
        if not self.listeners:
            self.on_left()

    def look_again(self):
        """Of those who wait at a listener, the kernel wakes one for each connection. Where that one is no more, the
        connection stays there until the next one comes; but an accept that is armed anew takes what is there."""
        for slot, armed in self.listeners.items():
            if armed:
                self.ring.arm_cancel(CANCEL, ACCEPT | slot, 0)

    def leave(self, listener, shut):
        """Let a listener go for good; but the one who was woken may have been us, just when the cancel came. Under load
        somebody always waits, so this has an end: whoever comes later wakes another one.

        At the end nobody else will look; but who was accepted by another process, which has passed the connection on,
        is served. `shut`: whether that is over.
        """
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        over = shut or listener != self.passing if self.stopping else self.now > self.leave_by
        if over or not poller.poll(0):
            self.drop_listener(listener)
        else:
            self.arm_listener(listener, "single")
            self.ring.arm_cancel(CANCEL, ACCEPT | listener, 0)

    def on_accept(self, listener, result, flags):
        data, shut = b"", False
        if listener == self.passing and result >= 0:
            shut = not result                   # no byte, and below no descriptor: the parent has shut the socket
            result, data = take_passed(self.envelope, result)
            shut = shut and result < 0
            self.counts.passed += result >= 0
        if not flags & CQE_MORE:
            self.listeners[listener] = None
            if self.stop_at is not None:
                if result >= 0 or -result in PASSING_BY:
                    self.leave(listener, shut)
                else:
                    self.drop_listener(listener)        # those who have taken over will let it in
        if result >= 0:
            self.open(self.connections[result], listener, data)
        elif -result not in PASSING_BY:
            self.on_accept_failure(-result)
            return                          # the next tick tries again
        if self.listeners.get(listener) is None or self.live > self.limits.max_connections - RESERVE:
            self.watch_listeners()

    def on_accept_failure(self, error):
        """No memory, too many files in the system; or the listener is shut (EINVAL), and the signal is on its way."""
        if error != errno.EINVAL:
            self.counts.accept_errors += 1
            log.warning("accept: %s", errno.errorcode.get(error, error))

    # connections

    def open(self, connection, listener, data):
        """A new connection, of which `data` has been read. What comes when all are busy waits, as it would have in the
        kernel."""
        self.live += 1
        self.counts.accepted += 1
        connection.opened = time.monotonic()
        connection.generation = connection.generation + 1 & GENERATIONS
        connection.pending = data
        connection.reads, connection.sends, connection.message_flags = RECV, SEND, SEND_FLAGS
        if self.curious:
            self.identify(connection, linux.peer_address(connection.slot))
        if self.trusted is not None and self.trusted.hold(connection.peer):
            connection.listener = listener
            self.move(connection, PREFACED)
        elif self.addresses and not self.addresses.admit(connection):
            self.turn_away(connection)
            return
        else:
            self.welcome(connection, listener)
        if self.live > self.limits.max_connections and not self.reclaim():
            connection.opened = math.inf        # not to make room for others
            self.parked.append(connection)
        else:
            self.start(connection)

    def turn_away(self, connection):
        """Its address has as many connections as it may."""
        self.counts.crowded += 1
        if connection.state is FREE:
            self.move(connection, PREFACED)
        self.end(connection)

    def identify(self, connection, peer):
        connection.peer = peer
        if self.access_log is not None:
            connection.who = self.access_log.who(peer)

    def start(self, connection):
        """Look at what has come with a connection, or wait for its first bytes.

        The first receive is not multishot: where a connection is for one request, none is left to cancel then.
        """
        data, connection.pending = connection.pending, b""
        if data:
            self.on_bytes(connection, data, 0)
        else:
            self.receive(connection, multishot=False)

    def welcome(self, connection, _listener):
        """Begin with what a connection accepted on `listener` begins with: here, a request in plaintext."""
        connection.site = self.site
        self.move(connection, ACCEPTED)

    def on_preface(self, connection, data):
        """Bytes of a PROXY header: who the client is, says the one in front of us."""
        connection.pending += data
        try:
            header = proxy.take_header(connection.pending)
        except proxy.ProxyError as error:
            log.debug("PROXY header: %s", error)
            self.counts.proxy_refused += 1
            self.end(connection)
            return
        if header is None:
            self.receive(connection, multishot=False)
            return
        peer, size = header
        if peer is not None:
            self.identify(connection, peer)
            if self.addresses and not self.addresses.admit(connection):
                self.turn_away(connection)
                return
        connection.pending = connection.pending[size:]
        self.welcome(connection, connection.listener)
        self.start(connection)

    # room

    def reclaim(self):
        """End the connection whose turn it is; tell whether there was one."""
        connection = self.eviction.victim(self.now, time.monotonic())
        if connection:
            self.counts.reclaimed += 1
            self.end(connection)
        return connection is not None

    def make_room(self):
        """Let those that wait come in, a second having passed."""
        for connection in self.parked:
            connection.since = self.now
        for _ in self.parked:
            self.reclaim()

    def on_room(self):
        """A connection has ended."""
        self.live -= 1
        if self.parked and self.live - len(self.parked) < self.limits.max_connections:
            waiting = self.parked.pop(0)
            waiting.since, waiting.opened = self.now, time.monotonic()
            self.start(waiting)
        elif None in self.listeners.values():
            self.watch_listeners()

    def move(self, connection, event):
        """Where a connection changes state: here, and with the same words in `run`, `send` and `begin_body`."""
        connection.state = connection.state[event]
        connection.since = self.now
