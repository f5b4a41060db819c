"""Connections: their states, what each completion does to them, and the loop.

One worker serves all its connections from one ring. `Worker.run` takes completions in batches and hands each
to an `on_*` method named for the operation that ended; those arm the next operation (`arm_*` of the ring).
The way of nearly every request, known bytes in and a ready plan out, is written out inside `run`.

Facts about slots
  * A connection's slot is its descriptor, and its place in `connections`: the kernel gives the lowest free number,
    and the limit of open files is set so that it never gives one beyond the table.
  * The kernel gives a number away again as soon as it is closed. So a slot is closed only when no operation on it
    is in flight: the receive has ended, the send (there is at most one) and the shutdown have completed.
  * Every completion carries the generation of the connection it was armed for. One that is not the slot's
    present generation would be a bug of ours; it is dropped and counted, never acted on.
"""

import errno
import logging
import struct
import time

import http1
from abi import CQE_BUFFER, CQE_BUFFER_SHIFT, CQE_MORE, OP_SENDMSG, SEND_FLAGS, SHUT_RD, SHUT_WR, SQE
from plan import PIECE
from reply import Reply
from state import (
    ACCEPTED, BODY, BODY_AHEAD, BYTES, CLOSING, CONTINUE, END, ENDED, FREE, HEAD, IDLE, INTERIM, LAST, LINGER,
    REQUEST, RESPONSE, SENT, Connection, IdleConnections, Site,
)

log = logging.getLogger("tarweb")

MAX_PENDING = 32 * 1024     # bytes received and not yet answered; above that nothing more is read from the connection
BACKLOG = 511               # connections that wait in the kernel to be accepted: as in nginx
RESERVE = 2 * BACKLOG       # a multishot accept may take this many connections before a cancel reaches it
LINGER_SECONDS = 10         # how long a client that may still be sending is listened to after its last response
LINGER_SIZE = 64 * 1024     # a response of more bytes may still be on its way when the kernel has taken it
SEND_GRACE = 10             # seconds that any send may take, whatever the rate floor says
PASSING = (errno.ENOBUFS, errno.ECANCELED, errno.EINTR, errno.EAGAIN)     # reasons for a receive to be armed again

# Tags: the operation in bits 24-31, the descriptor in bits 0-23. A receive's tag is its slot alone.
RECV, SEND, ACCEPT, SHUTDOWN, CANCEL, CLOSE, TICK, SIGNAL = (operation << 24 for operation in range(8))
SLOT = (1 << 24) - 1
GENERATIONS = (1 << 31) - 1


class Worker:
    """Serves `responder`'s archive on `listeners` until told to stop, in descriptors below `slots`."""

    def __init__(self, ring, responder, planner, limits, listeners, signals, slots):
        self.ring = ring
        self.site = Site(responder, planner)
        self.sites = [self.site]
        self.limits = limits
        self.connections = [Connection(slot) for slot in range(slots)]
        self.live = 0
        self.parked = []                            # accepted beyond the limit: not read from until there is room
        self.listeners = dict.fromkeys(listeners)   # descriptor -> "multishot", "single" or None, as armed
        self.signals = signals                      # the pipe that a byte comes through for each signal
        self.signal_byte = bytearray(1)
        self.timespec = bytearray(16)
        self.now = int(time.monotonic())
        self.idle = IdleConnections(self.connections)
        self.stop_at = None                         # tick by which to end, once told to
        self.stale = 0                              # completions of an earlier generation
        self.faults = 0                             # sends that failed because the archive's pages are gone

    # the loop

    def run(self):
        """Serve until told to stop and all is sent, or the time for that is over."""
        ring, connections = self.ring, self.connections
        known = self.site.planner.by_request.get
        pool, buffer_size, buffer_order, buffer_mask = ring.pool, ring.buffer_size, ring.order, ring.buffer_mask
        sqes, sqe_mask, write_sqe = ring.sqes, ring.mask, SQE.pack_into
        responding, idle = IDLE[REQUEST], RESPONSE[SENT]
        self.begin()
        while self.stop_at is None or (self.live or self.listeners) and self.now < self.stop_at:
            now = self.now
            for tag, generation, result, flags in ring.wait():
                if tag < SEND:              # RECV
                    connection = connections[tag]
                    if generation != connection.generation:
                        self.on_stale(flags)
                        continue
                    if result <= 0:
                        self.on_receive_end(connection, result, flags)
                        continue
                    i = flags >> CQE_BUFFER_SHIFT
                    data = pool[i * buffer_size:i * buffer_size + result]
                    if buffer_order[ring.buffer_tail & buffer_mask] == i:
                        ring.buffer_tail += 1
                    else:
                        ring.give_back(i)
                    if connection.state is IDLE:
                        plan = known(data)
                        if plan is not None:
                            connection.state = responding
                            connection.since = now
                            connection.plan = plan
                            if ring.tail == ring.room:
                                ring.flush()
                            write_sqe(sqes, (ring.tail & sqe_mask) << 6, OP_SENDMSG, 0, 0, tag, 0,
                                      plan.address, 1, connection.message_flags, SEND + tag, generation)
                            ring.tail += 1
                            if not flags & CQE_MORE:
                                connection.receiving = False
                                self.go_on(connection)
                            continue
                    self.on_data(connection, data, flags)
                elif tag < ACCEPT:          # SEND
                    connection = connections[tag - SEND]
                    if generation != connection.generation:
                        self.on_stale(flags)
                    elif result == connection.plan.done and not connection.attention:
                        connection.state = idle
                        connection.since = now
                    else:
                        self.on_sent(connection, result)
                else:
                    self.on_other(tag & ~SLOT, tag & SLOT, generation, result, flags)
        ring.flush(ring.entries)        # the last goodbyes are armed, and have to be taken before the process ends

    def begin(self):
        self.ring.arm_read(SIGNAL, self.signals, self.signal_byte)
        self.arm_tick()
        self.watch_listeners()

    def on_stale(self, flags):
        """A completion of a former connection in this slot: see the facts above."""
        self.stale += 1
        if flags & CQE_BUFFER:
            self.ring.give_back(flags >> CQE_BUFFER_SHIFT)

    def on_other(self, operation, slot, generation, result, flags):
        if operation == ACCEPT:
            self.on_accept(slot, result, flags)
        elif operation == TICK:
            self.on_tick()
        elif operation == SIGNAL:
            self.on_signal()
        elif operation == SHUTDOWN:
            self.on_shutdown(slot)
        elif operation == CLOSE:
            log.error("slot %d cannot be closed: %s", slot, errno.errorcode.get(-result, result))

    def move(self, connection, event):
        """Where a connection changes state: here, and with the same words in `run`, `send` and `begin_body`."""
        connection.state = connection.state[event]
        connection.since = self.now

    # accepting

    def watch_listeners(self):
        """Accept as far as there is room: multishot while there is plenty, one by one near the end of it.

        When the table is full, one more is still taken if an idle connection can make room for it.
        """
        if self.stop_at is not None:
            return
        room = self.limits.max_connections - self.live
        want = ("multishot" if room > RESERVE else
                "single" if room > 0 or room == 0 and self.idle.longest(self.now) else None)
        for slot, armed in self.listeners.items():
            if armed is None and want:
                self.ring.arm_accept(ACCEPT | slot, slot, want == "multishot")
                self.listeners[slot] = want
            elif armed and armed != want:
                self.ring.arm_cancel(CANCEL, ACCEPT | slot, 0)

    def on_accept(self, listener, result, flags):
        if not flags & CQE_MORE and listener in self.listeners:
            self.listeners[listener] = None
        if result >= 0:
            self.open(self.connections[result], listener)
        elif self.stop_at is None and result not in (-errno.ECANCELED, -errno.ECONNABORTED, -errno.EINTR):
            log.warning("accept: %s", errno.errorcode.get(-result, result))
            return                          # no memory, or too many files in the system: the next tick tries again
        if self.listeners.get(listener) is None or self.live > self.limits.max_connections - RESERVE:
            self.watch_listeners()

    def open(self, connection, listener):
        """Begin to receive; but what comes when all are busy waits, as it would have in the kernel."""
        self.live += 1
        connection.generation = connection.generation + 1 & GENERATIONS
        self.welcome(connection, listener)
        if self.live > self.limits.max_connections and not self.reclaim():
            self.parked.append(connection)
        else:
            self.receive(connection, multishot=False)

    def welcome(self, connection, _listener):
        """Begin with what a connection accepted on `listener` begins with: here, a request in plaintext."""
        connection.site = self.site
        connection.reads, connection.sends, connection.message_flags = RECV, SEND, SEND_FLAGS
        self.move(connection, ACCEPTED)

    def reclaim(self):
        """End the longest idle connection; tell whether there was one."""
        connection = self.idle.longest(self.now)
        if connection:
            self.end(connection)
        return connection is not None

    # receiving

    def receive(self, connection, multishot=True):
        """The first receive is not multishot: where a connection is for one request, none is left to cancel then."""
        connection.receiving = True
        self.ring.arm_recv(connection.reads | connection.slot, connection.generation, connection.slot, multishot)

    def on_data(self, connection, data, flags):
        """Bytes that are not, by themselves, a request known from before."""
        if not flags & CQE_MORE:
            connection.receiving = False
        state = connection.state
        if state is IDLE:
            self.move(connection, BYTES)
            connection.pending = data
            self.advance(connection)
        elif state is HEAD or state is BODY:
            connection.pending += data
            self.advance(connection)
        elif state is RESPONSE or state is INTERIM:
            connection.pending += data
            connection.attention = True
            if len(connection.pending) > MAX_PENDING and connection.receiving:
                self.cancel_receive(connection)
                return
        self.go_on(connection)

    def on_receive_end(self, connection, result, flags):
        """End of file, a full stop for want of buffers, our own cancel, or an error of the socket."""
        if not flags & CQE_MORE:
            connection.receiving = False
        if -result in PASSING:
            self.go_on(connection)
        elif result == 0 and (connection.state in (RESPONSE, INTERIM)
                              or connection.state is LINGER and connection.sending):
            connection.at_end = connection.attention = True     # what the client asked before is still answered
        else:
            self.end(connection)            # nothing left to answer; or ECONNRESET, ETIMEDOUT and their like

    def go_on(self, connection):
        """Receive again where that has stopped and is wanted, or free the slot where all has ended."""
        if connection.state is CLOSING:
            self.free_if_ended(connection)
        elif not (connection.receiving or connection.at_end or len(connection.pending) > MAX_PENDING
                  or connection.state is RESPONSE and connection.plan.close):
            self.receive(connection)

    def cancel_receive(self, connection):
        self.ring.arm_cancel(CANCEL, connection.reads | connection.slot, connection.generation)

    # from bytes to a response

    def advance(self, connection):
        """Take from `pending` what the connection's state waits for. An error in it is answered, and the last."""
        try:
            if connection.state is HEAD:
                self.take_head(connection)
            if connection.state is BODY:
                self.take_body(connection)
        except http1.HttpError as error:
            self.refuse(connection, error)

    def refuse(self, connection, error):
        connection.pending = b""
        connection.unread = True
        log.debug("%d: %s", error.status, error.reason)
        self.respond(connection, connection.site.error(error.status, error.reason))

    def take_head(self, connection):
        pending = connection.pending
        if pending.startswith(b"\r\n"):    # RFC 9112 section 2.2: empty lines before a request are passed over
            pending = http1.skip_empty_lines(pending)
        end = http1.find_head(pending, connection.scanned)
        if end < 0:
            connection.pending, connection.scanned = pending, len(pending)
            return
        head, connection.pending, connection.scanned = pending[:end], pending[end:], 0
        site = connection.site
        plan = site.planner.by_request.get(head)
        if plan is None:
            request = http1.parse_head(head)
            if request.has_body:
                self.begin_body(connection, request)
                return
            plan = site.planner.plan(site.reply(request))
            site.planner.remember(head, plan)
        self.send(connection, plan)

    def begin_body(self, connection, request):
        """Read past a body before its request is answered. One too long is not read, and ends the connection."""
        connection.request, connection.body = request, http1.Body(request.fields)
        expects = request.fields.expect is not None
        if request.fields.content_length > http1.MAX_BODY or expects and connection.site.reply(request).status >= 400:
            self.leave_body(connection)
        elif expects and not connection.pending:
            self.send(connection, connection.site.plan(Reply(100, b"\r\n", (), False)), CONTINUE)
        else:
            connection.state = connection.state[BODY_AHEAD]     # the time for the request to arrive runs on

    def take_body(self, connection):
        connection.pending = connection.body.feed(connection.pending)
        if connection.body.done:
            self.respond(connection, connection.site.reply(connection.request))
        elif connection.body.seen > http1.MAX_BODY:
            self.leave_body(connection)

    def leave_body(self, connection):
        """Answer without having read the body, and close."""
        connection.pending = b""
        connection.unread = True
        self.respond(connection, connection.site.reply(connection.request._replace(connection=b"close")))

    # sending

    def respond(self, connection, reply):
        self.send(connection, connection.site.plan(reply))

    def send(self, connection, plan, event=REQUEST):
        connection.state = connection.state[event]
        connection.since = self.now
        connection.plan = plan
        connection.attention = bool(connection.pending) or connection.at_end or connection.state is INTERIM
        self.begin_sending(connection, plan)

    def begin_sending(self, connection, plan):
        self.ring.arm_sendmsg(SEND | connection.slot, connection.generation, connection.slot, plan.address,
                              connection.message_flags)

    def go_on_sending(self, connection, plan):
        address, length = plan.locate(connection.sent)
        self.ring.arm_send(SEND | connection.slot, connection.generation, connection.slot, address, length,
                           connection.message_flags)

    def on_sent(self, connection, result):
        """A send has completed, and it was not simply the whole of a response with nothing behind it."""
        plan = connection.plan
        connection.sent += max(result, 0)
        if result > 0 and connection.sent < plan.total and connection.state is not CLOSING:
            connection.since = self.now
            self.go_on_sending(connection, plan)
            return
        connection.sent = 0
        if connection.state is CLOSING:
            connection.sending = False
            self.free_if_ended(connection)
        elif result <= 0:
            self.on_send_failure(connection, result)
        else:
            self.on_response_end(connection, plan)

    def on_send_failure(self, connection, result):
        if result == -errno.EFAULT:
            self.faults += 1
            if self.faults == 1:
                log.error("the archive has been truncated or cannot be read: responses from the lost part are cut off")
        self.end(connection, sending=False)

    def on_response_end(self, connection, plan):
        """The whole of a response is sent: on to the next request, or to the end."""
        if connection.state is RESPONSE and self.is_last(connection, plan):
            self.finish(connection)
            return
        self.move(connection, SENT)
        if connection.state is IDLE and connection.pending:
            self.move(connection, BYTES)
        if connection.state is not IDLE:
            self.advance(connection)
        if connection.at_end and connection.state in (IDLE, HEAD, BODY):
            self.end(connection)
        else:
            self.go_on(connection)

    def is_last(self, connection, plan):
        """Whether the connection ends with the response that is being sent."""
        return plan.close or (connection.at_end or self.stop_at is not None) and not connection.pending

    def finish(self, connection, linger=False):
        """After the last response. Closing at once would reset the connection if the client were still sending,
        and the reset could overtake the response (RFC 9112 section 9.6): then close our side and listen on."""
        on_its_way = connection.plan.total > LINGER_SIZE and self.stop_at is None
        if not linger and (connection.at_end or not (connection.unread or connection.pending or on_its_way)):
            self.end(connection, sending=False)
            return
        self.move(connection, LAST)
        connection.pending = b""
        self.close_our_side(connection)
        self.go_on(connection)

    def close_our_side(self, connection):
        connection.shutting = True
        self.ring.arm_shutdown(SHUTDOWN | connection.slot, connection.generation, connection.slot, SHUT_WR)

    def on_shutdown(self, slot):
        if slot in self.listeners:
            del self.listeners[slot]
        else:
            connection = self.connections[slot]
            connection.shutting = False
            self.go_on(connection)

    # ending

    def end(self, connection, sending=True):
        """Be done with a connection: end the operations in flight, then close it.

        `sending` False: its send has just completed, so there is none in flight whatever the state says.
        """
        if connection.state is not CLOSING:
            connection.sending = sending and (connection.state in (RESPONSE, INTERIM) or connection.sending)
            self.move(connection, END)
            connection.attention = True
            if connection.receiving:
                self.cancel_receive(connection)
            if connection.sending:
                self.ring.arm_cancel(CANCEL, connection.sends | connection.slot, connection.generation)
            else:
                self.say_goodbye(connection)
        self.free_if_ended(connection)

    def say_goodbye(self, connection):
        """Send what a connection ends with, where all else is sent. In plaintext that is nothing."""

    def free_if_ended(self, connection):
        if connection.receiving or connection.sending or connection.shutting:
            return
        self.move(connection, ENDED)
        self.ring.arm_close(CLOSE | connection.slot, connection.generation, connection.slot)
        self.let_go(connection)
        self.live -= 1
        if self.parked and self.live - len(self.parked) < self.limits.max_connections:
            waiting = self.parked.pop(0)
            waiting.since = self.now
            self.receive(waiting, multishot=False)
        elif None in self.listeners.values():
            self.watch_listeners()

    def let_go(self, connection):
        connection.forget()

    # time and signals

    def arm_tick(self):
        """One completion at the next full second, when Date changes."""
        rest = 1_000_000_000 - time.time_ns() % 1_000_000_000
        struct.pack_into("=qq", self.timespec, 0, rest // 1_000_000_000, rest % 1_000_000_000)
        self.ring.arm_timeout(TICK, self.timespec)

    def on_tick(self):
        self.arm_tick()
        self.now = int(time.monotonic())
        for site in self.sites:
            site.planner.tick(time.time())
        for connection in self.parked:
            connection.since = self.now
            self.reclaim()
        for connection in self.connections:
            if connection.state is not FREE and self.now - connection.since > self.patience(connection):
                self.on_timeout(connection)
        self.watch_listeners()

    def patience(self, connection):
        """How many seconds the present wait of a connection may take."""
        state = connection.state
        if state is IDLE and connection.plan is not None:
            return self.limits.keepalive_timeout
        if state is RESPONSE or state is INTERIM:
            size = min(PIECE, connection.plan.total - connection.sent)
            return SEND_GRACE + size // self.limits.min_rate
        return LINGER_SECONDS if state is LINGER else self.limits.header_timeout

    def on_timeout(self, connection):
        if connection.state is BODY or connection.state is HEAD:
            self.refuse(connection, http1.HttpError(408, "the request took too long"))
        elif connection.state is not CLOSING:
            self.end(connection)

    def on_signal(self):
        """Stop accepting, close what is idle, and let what is in flight end."""
        self.ring.arm_read(SIGNAL, self.signals, self.signal_byte)
        self.stop_at = self.now if self.stop_at is not None else self.now + self.limits.drain + 1
        for site in self.sites:
            site.close_all()
        for slot in self.listeners:
            self.ring.arm_shutdown(SHUTDOWN | slot, 0, slot, SHUT_RD)
        parked, self.parked = self.parked, []
        for connection in parked:
            self.end(connection)
        for connection in self.connections:
            connection.attention = True         # or the loop would leave it idle after a response
            if connection.state is IDLE:
                self.end(connection)
