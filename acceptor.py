"""Who comes in: connections accepted on listeners or passed by another process, and who makes room for them.

As long as there is room, accepting is a multishot operation; when the table is nearly full it is done one by one, and
when it is full a connection that is not in use makes room (Eviction), or the new one waits.
"""

import errno
import heapq
import logging
import math
import select
import socket
import time
from typing import Any, NamedTuple

import linux
from connection import (
    ACCEPT, CANCEL, CLOSING, FREE, IDLE, INTERIM, PREFACED, RESPONSE, SEND_GRACE, Connection, Connections,
)
from linux import CQE_MORE, MSG_CMSG_CLOEXEC

log = logging.getLogger("tarweb")

BACKLOG = 511               # connections that wait in the kernel to be accepted: as in nginx
RESERVE = 2 * BACKLOG       # a multishot accept may take this many connections before a cancel reaches it
PASSING_BY = (errno.ECANCELED, errno.ECONNABORTED, errno.EINTR)     # why an accept fails by our or a client's doing
# Where all connections are taken, these are not closed in favour of others:
OWING = 0.25                # one that owes a request, for so many seconds
STALL, PACE = 1, 16 * 1024  # one that is sent to, for so many seconds since it has acknowledged so many bytes


class Service(NamedTuple):
    """What a listener is for: the transport and the protocol that its connections begin with, and who answers."""

    transport: Any
    protocol: Any
    site: Any

    def begin(self, connection):
        """Give a connection that has been let in what it begins with."""
        connection.transport, connection.protocol = self.transport, self.protocol
        connection.site, connection.known, connection.answer = self.site, self.site.known, self.site.answer
        self.transport.begin(connection)


class Acceptor:
    """Lets connections in, and decides who makes room.

    services: the Service of each listener, by descriptor. passing: the descriptor of a datagram socket through which
    another process passes connections, or None; its Service is among `services`. trusted: the proxy.Networks whose
    connections begin with a PROXY header, or None. plain: the transport of connections that have no service yet.
    on_left: called once the last listener has been left.
    """

    def __init__(self, connections: Connections, services, plain, passing=None, trusted=None, access_log=None):
        self.connections, self.services, self.plain, self.access_log = connections, services, plain, access_log
        self.engine, self.counts, self.limits = connections.engine, connections.counts, connections.limits
        self.listeners = dict.fromkeys(services)    # descriptor -> "multishot", "single" or None, as armed
        self.passing, self.trusted = passing, trusted
        if passing is not None:
            from proxy import passed_message, take_passed
            self.message, self.take_passed = passed_message(), take_passed
        if trusted is not None:
            from proxy import ProxyHeader
            self.proxy_header = ProxyHeader(self)
        self.addresses = Addresses(self.limits.max_per_ip) if self.limits.max_per_ip else None
        self.wants_peer = bool(access_log or trusted or self.addresses)     # whether to ask who the peer is
        self.eviction = Eviction(connections.slots, linux.bytes_acknowledged)
        self.parked: list[Connection] = []      # accepted beyond the limit: not read from until there is room
        self.accepting = True
        self.leave_by = math.inf        # tick after which listeners are left even while somebody waits at them
        self.on_left = lambda: None
        connections.on_freed = self.on_freed

    def handlers(self):
        return {ACCEPT: self.on_accept}

    # listeners

    def watch_listeners(self):
        """Accept as far as there is room: multishot while there is plenty, one by one near the end of it.

        When the table is full, one more is still taken if another connection can make room for it.
        """
        if not self.accepting:
            return
        room = self.limits.max_connections - self.connections.live
        want = ("multishot" if room > RESERVE else
                "single" if room > 0 or room == 0 and self.victim() else None)
        for slot, armed in self.listeners.items():
            if armed is None and want:
                self.arm_listener(slot, want)
            elif armed and armed != want and not (slot == self.passing and want):
                self.engine.arm_cancel(CANCEL, ACCEPT | slot, 0)

    def arm_listener(self, slot, want):
        if slot == self.passing:
            self.engine.arm_recvmsg(ACCEPT | slot, 0, slot, self.message.address, MSG_CMSG_CLOEXEC)
        else:
            self.engine.arm_accept(ACCEPT | slot, slot, want == "multishot")
        self.listeners[slot] = want

    def leave_listeners(self, leave_by=math.inf):
        """Accept no more. What waits to be accepted is left to others that listen on the same sockets."""
        self.accepting, self.leave_by = False, leave_by
        for slot, armed in list(self.listeners.items()):
            if armed:
                self.engine.arm_cancel(CANCEL, ACCEPT | slot, 0)
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
                self.engine.arm_cancel(CANCEL, ACCEPT | slot, 0)

    def leave(self, listener, shut):
        """Let a listener go for good; but the one who was woken may have been us, just when the cancel came. Under load
        somebody always waits, so this has an end: whoever comes later wakes another one.

        At the end nobody else will look; but who was accepted by another process, which has passed the connection on,
        is served. `shut`: whether that is over.
        """
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        stopping, tick = self.connections.stopping, self.connections.tick
        over = shut or listener != self.passing if stopping else tick > self.leave_by
        if over or not poller.poll(0):
            self.drop_listener(listener)
        else:
            self.arm_listener(listener, "single")
            self.engine.arm_cancel(CANCEL, ACCEPT | listener, 0)

    def on_accept(self, listener, result, flags):
        data, shut = b"", False
        if listener == self.passing and result >= 0:
            shut = not result                   # no byte, and below no descriptor: the parent has shut the socket
            result, data = self.take_passed(self.message, result)
            shut = shut and result < 0
            self.counts.passed += result >= 0
        if not flags & CQE_MORE:
            self.listeners[listener] = None
            if not self.accepting:
                if result >= 0 or -result in PASSING_BY:
                    self.leave(listener, shut)
                else:
                    self.drop_listener(listener)        # those who have taken over will let it in
        if result >= 0:
            self.open(self.connections.slots[result], self.services[listener], data)
        elif -result not in PASSING_BY:
            self.on_accept_failure(-result)
            return                          # the next tick tries again
        if self.listeners.get(listener) is None or self.connections.live > self.limits.max_connections - RESERVE:
            self.watch_listeners()

    def on_accept_failure(self, error):
        """No memory, too many files in the system; or the listener is shut (EINVAL), and the signal is on its way."""
        if error != errno.EINVAL:
            self.counts.accept_errors += 1
            log.warning("accept: %s", errno.errorcode.get(error, error))

    # connections

    def open(self, connection, service, data):
        """A new connection, of which `data` has been read. What comes when all are busy waits, as it would have in the
        kernel."""
        self.connections.open(connection)
        connection.pending, connection.transport = data, self.plain
        if self.wants_peer:
            self.identify(connection, linux.peer_address(connection.slot))
        if self.trusted is not None and self.trusted.hold(connection.peer):
            connection.service, connection.protocol = service, self.proxy_header
            self.connections.move(connection, PREFACED)
        elif not self.admit(connection):
            return
        else:
            service.begin(connection)
        if self.connections.live > self.limits.max_connections and not self.make_room_for_one():
            connection.opened = math.inf        # not to make room for others
            self.parked.append(connection)
        else:
            self.start(connection)

    def admit(self, connection):
        """Count a connection for its address; where that has as many as it may, turn it away. Tells which."""
        if not self.addresses or self.addresses.admit(connection):
            return True
        self.turn_away(connection)
        return False

    def turn_away(self, connection):
        self.counts.over_limit += 1
        if connection.state is FREE:
            self.connections.move(connection, PREFACED)
        self.connections.end(connection)

    def identify(self, connection, peer):
        connection.peer = peer
        if self.access_log is not None:
            connection.client, forwarders = self.access_log.client(peer), self.access_log.forwarders
            connection.forwards = forwarders is not None and forwarders.hold(peer)

    def start(self, connection):
        """Look at what has come with a connection, or wait for its first bytes.

        The first receive is not multishot: where a connection is for one request, none is left to cancel then.
        """
        data, connection.pending = connection.pending, b""
        if data:
            connection.transport.on_first_bytes(connection, data)
        else:
            connection.transport.receive(connection, multishot=False)

    def on_proxied(self, connection, peer, rest, over_tls=False):
        """The PROXY header is there: it says that the client is `peer` (None: nothing), and whether it speaks TLS.
        `rest` came behind it."""
        if peer is not None:
            self.identify(connection, peer)
            if not self.admit(connection):
                return
        connection.pending, service = rest, connection.service
        if over_tls and service.site.over_tls:
            service = service._replace(site=service.site.over_tls)
        service.begin(connection)
        self.start(connection)

    # room

    def victim(self):
        """The connection that is first to make room for another, or None."""
        return self.eviction.victim(self.connections.tick, time.monotonic())

    def make_room_for_one(self):
        """End the connection whose turn it is; tell whether there was one."""
        connection = self.victim()
        if connection:
            self.counts.reclaimed += 1
            self.connections.end(connection)
        return connection is not None

    def make_room(self):
        """Let those that wait come in, a second having passed."""
        for connection in self.parked:
            connection.since = self.connections.tick
        for _ in self.parked:
            self.make_room_for_one()

    def end_parked(self):
        """End those that wait for room, as if they had not been accepted."""
        parked, self.parked = self.parked, []
        for connection in parked:
            self.connections.end(connection)

    def on_freed(self, connection):
        """A connection has ended."""
        if self.addresses and connection.address:
            self.addresses.release(connection)
        if self.parked and self.connections.live - len(self.parked) < self.limits.max_connections:
            waiting = self.parked.pop(0)
            waiting.since, waiting.opened = self.connections.tick, time.monotonic()
            self.start(waiting)
        elif None in self.listeners.values():
            self.watch_listeners()


# --- who makes room

class Eviction:
    """Finds, among `connections`, the one that is first to make room for another.

    acknowledged: called with a slot, gives how many bytes its client has acknowledged altogether, or None where nobody
    knows. Ticks are whole seconds, `monotonic` is the time in seconds.
    """

    BATCH = 64                  # found in one pass over the table

    def __init__(self, connections, acknowledged):
        self.connections, self.acknowledged = connections, acknowledged
        self.found = []                     # (rank, safe_until, slot, epoch) of the first ones, in falling order
        self.none_at = -1                   # tick of the last pass that found none: one a tick is enough

    def victim(self, tick, monotonic):
        """The connection whose turn it is, or None."""
        while self.found:
            _, until, slot, epoch = self.found[-1]
            connection = self.connections[slot]
            if connection.epoch == epoch and safe_until(connection) == until and not (
                    connection.is_sending and self.still_reads(connection, monotonic)):     # it may read again since
                return connection
            self.found.pop()
        if self.none_at == tick:
            return None
        self.found = heapq.nsmallest(self.BATCH, self.candidates(monotonic))
        self.found.reverse()
        if not self.found:
            self.none_at = tick
            return None
        return self.connections[self.found[-1][2]]

    def candidates(self, monotonic):
        """First those whose client owes a request or has been answered; then those whose client does not read, who
        would lose something; then those in use, answered within the second."""
        for connection in self.connections:
            until, state = safe_until(connection), connection.state
            if until > monotonic:
                rank = 2 if state is IDLE and connection.plan is not None else None
            elif state is RESPONSE or state is INTERIM:
                rank = None if self.still_reads(connection, monotonic) else 1
            else:
                rank = 0
            if rank is not None:
                yield rank, until, connection.slot, connection.epoch

    def still_reads(self, connection, monotonic):
        """Whether the client has acknowledged PACE bytes since it was last seen to; where nobody knows, it has some
        time."""
        acked = self.acknowledged(connection.slot)
        if acked is None:
            return monotonic < began(connection) + SEND_GRACE
        if acked < connection.acked + PACE:
            return False
        connection.acked, connection.acked_at = acked, monotonic
        return True


def began(connection):
    """When the present wait began, in seconds; those of new connections, which can be many, are in order."""
    return max(connection.since, connection.opened)


def safe_until(connection):
    """When it can be a connection's turn to be ended in favour of another, in seconds: a little after it began to owe a
    request, or a part of one, or ceased to read. For one that was answered, at the end of the second in which it was:
    whoever is in use goes behind those that have said nothing for as long."""
    state = connection.state
    if state is FREE or state is CLOSING:
        return math.inf
    if state is RESPONSE or state is INTERIM:
        return max(began(connection), connection.acked_at) + STALL
    return began(connection) + (1 if state is IDLE and connection.plan is not None else OWING)


class Addresses:
    """Counts connections by the address that they come from: of one address there are at most `limit`.

    Of IPv6 the first 64 bits count: a client has the rest of them to itself (RFC 6177).
    """

    def __init__(self, limit):
        self.limit = limit
        self.held: dict[bytes, int] = {}

    def admit(self, connection):
        """Count a connection from `connection.peer`; tell whether there is room for it. Connections without an address
        (unix sockets) are not limited."""
        peer = connection.peer
        key = socket.inet_pton(socket.AF_INET6, peer.decode())[:8] if b":" in peer else peer
        held = self.held.get(key, 0)
        if held >= self.limit:
            return False
        if key:
            self.held[key] = held + 1
            connection.address = key
        return True

    def release(self, connection):
        """A connection that was counted has ended."""
        key, connection.address = connection.address, b""
        if self.held[key] == 1:
            del self.held[key]
        else:
            self.held[key] -= 1
