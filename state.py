"""What a connection can be: its states, one table of how they follow each other, and what is known of one."""

import heapq
import math
import socket

SEND_GRACE = 10             # seconds that any send may take, whatever the rate floor says
# Where all connections are taken, these are safe:
OWING = 0.25                # one that owes a request, for so many seconds
STALL, PACE = 1, 16 * 1024  # one that is sent to, for so many seconds since it has taken so many bytes

# Events
PREFACED, ACCEPTED, UNSECURED, SECURED, BYTES, REQUEST, BODY_AHEAD, CONTINUE, SENT, LAST, END, ENDED = (
    "prefaced", "accepted", "unsecured", "secured", "bytes", "request", "body ahead", "continue", "sent", "last", "end",
    "ended")


class State(dict):
    """A state is its row of the table below: event -> next state. A KeyError here is our bug, never the peer's."""

    def __init__(self, name):
        self.name = name

    __eq__ = object.__eq__
    __hash__ = object.__hash__      # type: ignore[assignment]  # a dict has none

    def __repr__(self):
        return self.name


FREE, PREFACE, HANDSHAKE, IDLE, HEAD, BODY, INTERIM, RESPONSE, LINGER, CLOSING = map(
    State, ("free", "preface", "handshake", "idle", "head", "body", "interim", "response", "linger", "closing"))

# The connection's life, all of it.
FREE.update({ACCEPTED: IDLE, UNSECURED: HANDSHAKE, PREFACED: PREFACE})
PREFACE.update({ACCEPTED: IDLE, UNSECURED: HANDSHAKE, END: CLOSING})                  # a PROXY header is to come
HANDSHAKE.update({SECURED: IDLE, REQUEST: RESPONSE, END: CLOSING})                    # TLS; or what was not, answered
IDLE.update({BYTES: HEAD, REQUEST: RESPONSE, END: CLOSING})                           # nothing of a request has come
HEAD.update({REQUEST: RESPONSE, BODY_AHEAD: BODY, CONTINUE: INTERIM, END: CLOSING})   # a part of a request head has
BODY.update({REQUEST: RESPONSE, END: CLOSING})                                        # reading past a request body
INTERIM.update({SENT: BODY, END: CLOSING})                                            # sending 100 (Continue)
RESPONSE.update({SENT: IDLE, LAST: LINGER, END: CLOSING})                             # sending a response
LINGER.update({END: CLOSING})                                                         # reading past what is still sent
CLOSING.update({ENDED: FREE})                                                         # operations in flight are ending


class Connection:
    """What is known of one slot."""

    __slots__ = ("slot", "generation", "state", "since", "opened", "plan", "sent", "pending", "scanned", "attention",
                 "receiving", "sending", "shutting", "at_end", "unread", "request", "body",
                 "site", "tls", "attached", "reads", "sends", "message_flags", "listener", "peer", "who", "head",
                 "counted", "taken", "taken_at")

    def __init__(self, slot):
        self.slot = slot
        self.generation = 0
        self.state = FREE
        self.since = 0              # when the present wait began, in ticks (seconds)
        self.opened = 0.0           # when the connection came in, in seconds
        self.plan = None            # what is being sent, or was last
        self.sent = 0               # bytes of `plan` sent
        self.pending = b""          # received, not yet taken
        self.scanned = 0            # how much of `pending` was searched for the end of a head
        self.attention = False      # whether there is more to do after a send than to wait for the next request
        self.receiving = False      # whether a receive is in flight
        self.sending = False        # whether a send is in flight, where the state does not tell
        self.shutting = False       # whether a shutdown is in flight
        self.at_end = False         # the client has sent all it will
        self.unread = False         # the client may still be sending what nobody will read
        self.request = None         # the request whose body is being read past
        self.body = None
        self.site = None            # the Site that answers
        self.tls = None             # the tls.Session, where there is one
        self.attached = False       # whether the kernel is ready to take over TLS
        self.reads = self.sends = 0 # the tags of its receives and sends, without the slot
        self.message_flags = 0      # of its sends
        self.listener = 0           # where it was accepted
        self.peer = b""             # the client's address, where that is asked for
        self.who = b""              # the same as it stands in the access log
        self.head = b""             # the request head that the access log is to tell of
        self.counted = b""          # as whose connection it is counted
        self.taken = 0              # bytes that the client had acknowledged when that was last asked, and seen to grow
        self.taken_at = 0.0         # when that was, in seconds

    def forget(self):
        """Drop what a former connection left, before the slot's next one."""
        self.plan = self.request = self.body = self.site = self.tls = None
        self.pending = self.head = b""
        self.sent = self.scanned = self.taken = 0
        self.attention = self.at_end = self.unread = False


class Eviction:
    """Finds, among `connections`, the one that is first to make room for another.

    acknowledged: called with a slot, gives how many bytes its client has taken altogether, or None where nobody knows.
    """

    BATCH = 64                  # found in one pass over the table

    def __init__(self, connections, acknowledged):
        self.connections, self.acknowledged = connections, acknowledged
        self.found = []                     # (rank, safe_until, slot, generation) of the first ones, in falling order
        self.none_at = -1                   # tick of the last pass that found none: one a tick is enough

    def victim(self, now, moment):
        """The connection whose turn it is, or None. `now`: the tick; `moment`: the time, in seconds."""
        while self.found:
            _, until, slot, generation = self.found[-1]
            connection = self.connections[slot]
            if connection.generation == generation and safe_until(connection) == until and not (
                    is_sending(connection) and self.takes(connection, moment)):         # it may read again since
                return connection
            self.found.pop()
        if self.none_at == now:
            return None
        self.found = heapq.nsmallest(self.BATCH, self.candidates(moment))
        self.found.reverse()
        if not self.found:
            self.none_at = now
            return None
        return self.connections[self.found[-1][2]]

    def candidates(self, moment):
        """First those whose client owes a request or has been answered; then those whose client does not read, who
        would lose something; then those in use, answered within the second."""
        for connection in self.connections:
            until = safe_until(connection)
            if until > moment:
                rank = 2 if is_idle(connection) else None
            elif is_sending(connection):
                rank = None if self.takes(connection, moment) else 1
            else:
                rank = 0
            if rank is not None:
                yield rank, until, connection.slot, connection.generation

    def takes(self, connection, moment):
        """Whether the client has taken PACE bytes since it was last seen to; where nobody knows, it has some time."""
        taken = self.acknowledged(connection.slot)
        if taken is None:
            return moment < began(connection) + SEND_GRACE
        if taken < connection.taken + PACE:
            return False
        connection.taken, connection.taken_at = taken, moment
        return True


def is_idle(connection):
    """Whether a connection was answered, and asks for nothing: it can be ended at any time."""
    return connection.state is IDLE and connection.plan is not None


def is_sending(connection):
    return connection.state is RESPONSE or connection.state is INTERIM


def began(connection):
    """When the present wait began, in seconds; those of new connections, which can be many, are in order."""
    return max(connection.since, connection.opened)


def safe_until(connection):
    """When it can be a connection's turn to be ended in favour of another, in seconds: a little after it began to owe a
    request, or a part of one, or ceased to read. For one that was answered, at the end of the second in which it was:
    whoever is in use goes behind those that have said nothing for as long."""
    if connection.state is FREE or connection.state is CLOSING:
        return math.inf
    if is_sending(connection):
        return max(began(connection), connection.taken_at) + STALL
    return began(connection) + (1 if is_idle(connection) else OWING)


class Addresses:
    """Counts connections by the address that they come from: of one address there are at most `limit`.

    Of IPv6 the first 64 bits count: a client has the rest of them to itself (RFC 6177).
    """

    def __init__(self, limit):
        self.limit = limit
        self.held: dict[bytes, int] = {}

    def admit(self, connection):
        """Count a connection from `connection.peer`; tell whether there is room for it. Whoever has no address has."""
        peer = connection.peer
        key = socket.inet_pton(socket.AF_INET6, peer.decode())[:8] if b":" in peer else peer
        held = self.held.get(key, 0)
        if held >= self.limit:
            return False
        if key:
            self.held[key] = held + 1
            connection.counted = key
        return True

    def release(self, connection):
        """A connection that was counted has ended."""
        key, connection.counted = connection.counted, b""
        if self.held[key] == 1:
            del self.held[key]
        else:
            self.held[key] -= 1


class Limits:
    """Times in seconds and counts, as the command line gives them."""

    def __init__(self, max_connections=4096, header_timeout=10, keepalive_timeout=60, min_rate=1024, drain=10,
                 max_per_ip=None):
        self.max_connections = max_connections
        self.header_timeout = header_timeout        # a request, body included, must have come by then
        self.keepalive_timeout = keepalive_timeout  # between requests
        self.min_rate = min_rate                    # bytes a second below which a reader is cut off
        self.drain = drain                          # what is in flight at the end may take this long
        self.max_per_ip = max_per_ip                # connections from one address, or None
