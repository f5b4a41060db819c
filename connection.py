"""What a connection can be: its states, one table of how they follow each other, and one place that changes them.

A connection's slot is its descriptor, and its place in the table: the kernel gives the lowest free number, and the
limit of open files is set so that it never gives one beyond the table.

Facts about slots
  * The kernel gives a number away again as soon as it is closed. So a slot is closed only when no operation on it
    is in flight: the receive has ended, the send (there is at most one) and the shutdown have completed.
  * Every completion carries the epoch of the connection it was armed for. One that is not the slot's present epoch
    would be a bug of ours; it is dropped and counted, never acted on.
"""

import time

from linux import SEND_FLAGS

SEND_GRACE = 10             # seconds that any send may take, whatever the rate floor says

# Operations: an operation's tag has its number in bits 24-31 and a descriptor in bits 0-23. A receive's tag is its slot
# alone, a plain send's is next: Worker.run knows these two. What all others lead to is in one table, Worker.handlers.
(RECV, SEND,                            # of Plain, which the loop knows
 SHUTDOWN, RECV_HANDSHAKE, FLIGHT, KEYS, ATTACH, RECV_TLS, SEND_TLS, LOAD, CONTROL, GOODBYE,     # of one connection
 ACCEPT, CANCEL, CLOSE, TICK, SIGNAL, LOG, DAMAGE,                               # of the worker: ACCEPT and above
 ) = (number << 24 for number in range(19))
SLOT = (1 << 24) - 1
EPOCHS = (1 << 31) - 1

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


FREE, PREFACE, HANDSHAKE, IDLE, HEAD, BODY, INTERIM, RESPONSE, LINGER, CLOSING = STATES = tuple(map(
    State, ("free", "preface", "handshake", "idle", "head", "body", "interim", "response", "linger", "closing")))

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

# Which flags a state allows: {False}, {True} or both. A send that the state itself speaks of (INTERIM, RESPONSE) is not
# in `sending`. A connection that waits for room is not receiving in any state. The model asserts this after each step.
NO, YES, EITHER = {False}, {True}, {False, True}
FLAGS = "receiving", "sending", "shutting", "at_end"
LEGAL = {
    FREE:      (NO, NO, NO, NO),
    PREFACE:   (YES, NO, NO, NO),
    HANDSHAKE: (EITHER, EITHER, NO, NO),        # not neither: it waits for the client or for a send
    IDLE:      (YES, NO, NO, NO),
    HEAD:      (YES, NO, NO, NO),
    BODY:      (YES, NO, NO, NO),
    INTERIM:   (EITHER, NO, NO, EITHER),        # not receiving: at the end, or too much is pending
    RESPONSE:  (EITHER, NO, NO, EITHER),        # likewise, or the response is the last
    LINGER:    (EITHER, EITHER, EITHER, EITHER),
    CLOSING:   (EITHER, EITHER, EITHER, EITHER),
}


def illegal_flags(connection):
    """The names of the flags that a connection should not have, or lacks, in its state."""
    return [name for name, allowed in zip(FLAGS, LEGAL[connection.state], strict=True)
            if getattr(connection, name) not in allowed]


class Connection:
    """What is known of one slot: its state, its transport and protocol, what is in flight, and what is pending."""

    __slots__ = ("slot", "epoch", "state", "since", "opened", "transport", "protocol", "site", "known", "answer",
                 "session", "plan", "sent", "pending", "scanned", "attention", "receiving", "sending", "shutting",
                 "at_end", "unread", "request", "body", "attached", "recv_tag", "send_tag", "send_flags", "service",
                 "peer", "client", "forwards", "head", "address", "acked", "acked_at")

    def __init__(self, slot):
        self.slot = slot
        self.epoch = 0              # which of the slot's connections this is
        self.state = FREE
        self.since = 0              # when the present wait began, in ticks (seconds)
        self.opened = 0.0           # when the connection came in, in seconds (monotonic)
        self.transport = None       # how its bytes come and go
        self.protocol = None        # what they mean
        self.site = None            # the Site that answers
        self.known = None           # that site's look-up of plans by the bytes of a request
        self.answer = None          # the same site's way to a plan for bytes that come for the first time
        self.session = None         # the tls.Session, where there is one
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
        self.attached = False       # whether the kernel is ready to take over TLS
        self.recv_tag = self.send_tag = 0       # of its receive and send in flight, without the slot
        self.send_flags = SEND_FLAGS            # of its sends, send(2)
        self.service = None         # what it was accepted for, while a PROXY header is to come
        self.peer = b""             # the client's address, where that is asked for
        self.client = b""           # the same as it stands in the access log
        self.forwards = False       # whether each request says who has sent it
        self.head = b""             # the request head that the access log is to tell of
        self.address = b""          # as whose connection it is counted
        self.acked = 0              # bytes that the client had acknowledged when that was last asked, and seen to grow
        self.acked_at = 0.0         # when that was, in seconds (monotonic)

    def forget(self):
        """Drop what a former connection left, before the slot's next one."""
        self.plan = self.request = self.body = self.site = self.known = self.answer = self.session = None
        self.pending = self.head = b""
        self.sent = self.scanned = self.acked = 0
        self.attention = self.at_end = self.unread = False

    @property
    def is_sending(self):
        """Whether a response is being sent, an interim one too."""
        return self.state is RESPONSE or self.state is INTERIM

    @property
    def is_answered(self):
        """Whether it was answered and asks for nothing: it can be ended at any time."""
        return self.state is IDLE and self.plan is not None


class Limits:
    """Times in seconds and counts, as the command line gives them."""

    def __init__(self, max_connections=4096, header_timeout=10, keepalive_timeout=75, min_rate=1024, drain=10,
                 max_per_ip=None):
        self.max_connections = max_connections
        self.header_timeout = header_timeout        # a request, body included, must have come by then
        self.keepalive_timeout = keepalive_timeout  # between requests
        self.min_rate = min_rate                    # bytes a second below which a reader is cut off
        self.drain = drain                          # what is in flight at the end may take this long
        self.max_per_ip = max_per_ip                # connections from one address, or None


class Connections:
    """All slots of a worker, and what its parts share: the engine, limits, counts, and the second that it is.

    tick: whole seconds of the monotonic clock. stopping: whether told to end, not only to retire. on_freed: called with
    a connection that has ended, before what is known of it is forgotten.
    """

    def __init__(self, engine, slots, limits, counts):
        self.engine, self.limits, self.counts = engine, limits, counts
        self.slots = [Connection(slot) for slot in range(slots)]
        self.live = 0
        self.tick = int(time.monotonic())
        self.stopping = False
        self.on_freed = lambda connection: None

    def move(self, connection, event):
        """Where a connection changes state. The steps that are written out instead: REQUEST and SENT where they are too
        frequent for a call (Worker.run, Http1.send, UserspaceTls.send_kept and on_sealed_sent), with them CONTINUE; and
        BODY_AHEAD (Http1.begin_body), which leaves `since` as it is."""
        connection.state = connection.state[event]
        connection.since = self.tick

    def open(self, connection):
        """A slot's next connection begins."""
        self.live += 1
        self.counts.accepted += 1
        connection.opened = time.monotonic()
        connection.epoch = connection.epoch + 1 & EPOCHS
        connection.recv_tag, connection.send_tag, connection.send_flags = RECV, SEND, SEND_FLAGS

    def cancel_receive(self, connection):
        self.engine.arm_cancel(CANCEL, connection.recv_tag | connection.slot, connection.epoch)

    def end(self, connection, sending=True):
        """Be done with a connection: end the operations in flight, then close it.

        `sending` False: its send has just completed, so there is none in flight whatever the state says.
        """
        if connection.state is not CLOSING:
            connection.sending = sending and (connection.is_sending or connection.sending)
            self.move(connection, END)
            connection.attention = True
            if connection.receiving:
                self.cancel_receive(connection)
            if connection.sending:
                self.engine.arm_cancel(CANCEL, connection.send_tag | connection.slot, connection.epoch)
            else:
                connection.transport.farewell.say(connection)
        self.free_if_ended(connection)

    def free_if_ended(self, connection):
        """Close a connection in CLOSING once nothing is in flight any more; its slot is free then."""
        if connection.receiving or connection.sending or connection.shutting:
            return
        self.move(connection, ENDED)
        self.engine.arm_close(CLOSE | connection.slot, connection.epoch, connection.slot)
        connection.transport.farewell.release(connection)
        self.live -= 1
        self.on_freed(connection)
        connection.forget()
