"""A worker: the loop, HTTP/1.1's handlers, and connections whose bytes come and go as the engine gives and takes them.

One worker serves all its connections from one engine. `Worker.run` takes completions in batches and hands each to the
handler that its operation has in one table; handlers arm the next operation (`arm_*` of the engine). The way of nearly
every request, known bytes in and a ready plan out, is written out inside `run`.

A connection has a transport (Plain here; those of TLS in transport.py), which knows how bytes come and go, and a
protocol (Http1 here), which knows what they mean: any of the one goes with any of the other.
"""

import errno
import logging
from typing import Any

import http1
from acceptor import Acceptor, Service
from clock import Clock
from connection import (
    ACCEPT, ACCEPTED, BODY, BODY_AHEAD, BYTES, CANCEL, CLOSE, CLOSING, CONTINUE, HEAD, IDLE, INTERIM, LAST, LINGER,
    PREFACE, REQUEST, RESPONSE, SEND, SENT, SHUTDOWN, SLOT, Connections,
)
from linux import (
    CQE_BUFFER, CQE_BUFFER_SHIFT, CQE_MORE, CQE_SKIP_SUCCESS, LINK, MADV_POPULATE_READ, MSG_WAITALL, OP_SENDMSG,
    POLLOUT, SHUT_WR,
)
from plan import SEND_SIZE

log = logging.getLogger("tarweb")

MAX_PENDING = 32 * 1024     # bytes received and not yet answered; above that nothing more is read from the connection
LINGER_SIZE = 64 * 1024     # a response of more bytes may still be on its way when the kernel has taken it
INTERRUPTED = (errno.ENOBUFS, errno.ECANCELED, errno.EINTR, errno.EAGAIN)   # reasons for a receive to be armed again


class Worker:
    """Serves `site` on `listeners` (descriptors), whose contents are in the archives of `library`, until told to stop.

    What it is made of are its parts: `connections` (all slots), `plain` (a transport), `http1` (a protocol), `acceptor`
    and `clock`; transport.add_tls adds those of TLS. For passing and trusted see Acceptor, for signals, publish and
    damage Clock.
    """

    def __init__(self, engine, slots, limits, counts, library, site, listeners, signals, passing=None, trusted=None,
                 access_log=None, publish=None, damage=None):
        self.engine, self.counts, self.library, self.access_log, self.site = engine, counts, library, access_log, site
        self.connections = Connections(engine, slots, limits, counts)
        self.plain = Plain(self.connections, library)
        self.http1 = Http1(self.connections, library, access_log)
        service = Service(self.plain, self.http1, site)
        services = dict.fromkeys([*listeners] if passing is None else [*listeners, passing], service)
        self.acceptor = Acceptor(self.connections, services, self.plain, passing, trusted, access_log)
        self.clock = Clock(self.connections, self.acceptor, [site], signals, access_log, publish, damage)
        self.handshake = self.userspace = self.farewell = None     # see transport.add_tls
        self.stale = 0                          # completions of an earlier epoch
        # Every operation but RECV and SEND: what its completion leads to. Those of one connection are called with it,
        # the result and flags, those of the worker with the descriptor in place of the connection.
        self.handlers = {**self.plain.handlers(), **self.acceptor.handlers(), **self.clock.handlers(),
                         CLOSE: on_close_failure,
                         CANCEL: lambda *_: None}       # completes only if it has failed: what it was for has ended

    # the loop: the hot path is written out in it, and it is kept on one screen

    def run(self):
        """Serve until told to stop and all is sent, or the time for that is over."""
        engine, counts, access_log, clock = self.engine, self.counts, self.access_log, self.clock
        table, acceptor, slots = self.connections, self.acceptor, self.connections.slots
        lines: list = access_log.lines if access_log is not None else []
        pool, buffer_size, buffer_order, buffer_mask = (
            engine.pool, engine.buffer_size, engine.buffer_order, engine.buffer_mask)
        queue, mask, write = engine.queue, engine.mask, engine.write
        responding, idle = IDLE[REQUEST], RESPONSE[SENT]
        clock.begin()
        while clock.stop_at is None or (table.live or acceptor.listeners) and table.tick < clock.stop_at:
            tick, hits, misses, sent = table.tick, 0, 0, 0
            for tag, epoch, result, flags in engine.wait():
                if tag < SEND:              # RECV
                    connection = slots[tag]
                    if epoch != connection.epoch:
                        self.on_stale(flags)
                        continue
                    if result <= 0:
                        connection.transport.on_receive_end(connection, result, flags)
                        continue
                    i = flags >> CQE_BUFFER_SHIFT
                    data = pool[i * buffer_size:i * buffer_size + result]
                    if buffer_order[engine.buffer_tail & buffer_mask] == i:
                        engine.buffer_tail += 1
                    else:
                        engine.give_back(i)
                    if not flags & CQE_MORE:
                        connection.receiving = False
                    if connection.state is IDLE:
                        plan = connection.known(data)
                        if plan is not None:
                            hits += 1
                        elif (plan := connection.answer(data)) is not None:
                            misses += 1
                        if plan is not None:
                            connection.state, connection.since = responding, tick
                            connection.plan, connection.head = plan, data
                            if engine.tail == engine.room:
                                engine.flush()
                            write(queue, (engine.tail & mask) << 6, OP_SENDMSG, 0, 0, tag, 0, plan.address, 1,
                                  connection.send_flags, SEND + tag, epoch)
                            engine.tail += 1
                            if not connection.receiving:
                                connection.transport.go_on(connection)
                            continue
                    connection.protocol.on_data(connection, data)
                elif tag < SHUTDOWN:        # SEND
                    connection = slots[tag - SEND]
                    if epoch != connection.epoch:
                        self.on_stale(flags)
                        continue
                    plan = connection.plan
                    if result == plan.done and not connection.attention:
                        connection.state, connection.since = idle, tick
                        plan.tally[0] += 1
                        sent += result
                        if access_log is not None:
                            line = connection.site.lines.get(connection.head)
                            if line is None or connection.forwards:
                                connection.protocol.note(connection, plan, result)
                            else:
                                lines += (connection.client, access_log.date, line)
                    else:
                        connection.transport.on_sent(connection, result)
                else:
                    self.dispatch(tag & ~SLOT, tag & SLOT, epoch, result, flags)
            counts.memo_hits += hits
            counts.memo_misses += misses
            counts.bytes_sent += sent
            if access_log is not None and len(lines) > access_log.enough:
                access_log.flush()
        clock.finish()
        engine.flush(engine.entries)    # the last goodbyes are armed, and have to be taken before the process ends

    def dispatch(self, operation, slot, epoch, result, flags):
        """Hand a completion to its handler."""
        handler = self.handlers[operation]
        if operation >= ACCEPT:
            handler(slot, result, flags)
            return
        connection = self.connections.slots[slot]
        if epoch == connection.epoch:
            handler(connection, result, flags)
        else:
            self.on_stale(flags)

    def on_stale(self, flags):
        """A completion of a former connection in this slot: see the facts in connection.py."""
        self.stale += 1
        if flags & CQE_BUFFER:
            self.engine.give_back(flags >> CQE_BUFFER_SHIFT)


def on_close_failure(slot, result, _):
    log.error("slot %d cannot be closed: %s", slot, errno.errorcode.get(-result, result))


class NoFarewell:
    """How a connection in plaintext ends: without a word. transport.Farewell is how those of TLS do."""

    def say(self, connection):
        """Send what a connection ends with, where all else is sent."""

    def say_first(self, connection):
        """Send it before our side is closed; tell whether that goes on once it is sent, by a handler of its own."""
        return False

    def withhold(self, connection):
        """A response is not whole: nothing may be said that would make it look so."""

    def on_peer_end(self, connection, result):
        """The client has closed its side (0), or its connection is broken (-errno)."""

    def release(self, connection):
        """Let go of what only this connection had."""


class Plain:
    """The transport of connections whose bytes are sent and received as they are: plaintext, and (a subclass in
    transport.py) TLS that the kernel encrypts.

    `send_size`: bytes of one send, on which its time depends. `farewell`: how connections end.
    """

    send_size = SEND_SIZE

    def __init__(self, connections: Connections, library, farewell=None):
        self.connections, self.library = connections, library
        self.farewell: Any = farewell or NoFarewell()
        self.engine, self.counts = connections.engine, connections.counts

    def handlers(self):
        """{operation: what its completion on a connection leads to}, besides RECV and SEND."""
        return {SHUTDOWN: self.on_shutdown}

    def begin(self, connection):
        """A connection has been let in: what comes is a request."""
        self.connections.move(connection, ACCEPTED)

    def on_first_bytes(self, connection, data):
        """What had been received of a connection before it was let in."""
        connection.protocol.on_data(connection, data)

    # receiving

    def receive(self, connection, multishot=True):
        connection.receiving = True
        self.engine.arm_recv(connection.recv_tag | connection.slot, connection.epoch, connection.slot, multishot)

    def go_on(self, connection):
        """Receive again where that has stopped and is wanted, or free the slot where all has ended."""
        if connection.state is CLOSING:
            self.connections.free_if_ended(connection)
        elif not (connection.receiving or connection.at_end or len(connection.pending) > MAX_PENDING
                  or connection.state is RESPONSE and connection.plan.close):
            self.receive(connection, multishot=connection.state is not PREFACE)

    def on_receive_end(self, connection, result, flags):
        """End of file, a full stop for want of buffers, our own cancel, or an error of the socket."""
        if not flags & CQE_MORE:
            connection.receiving = False
        if -result in INTERRUPTED:
            self.counts.no_buffers += result == -errno.ENOBUFS
            self.go_on(connection)
            return
        if connection.state is not CLOSING:
            self.farewell.on_peer_end(connection, result)
        self.on_last_data(connection, result)

    def on_last_data(self, connection, result=0):
        """The client will send no more (0): what it has asked is answered, then the connection ends. Or it is broken
        (-errno)."""
        if result == 0 and (connection.is_sending or connection.state is LINGER and connection.sending):
            connection.at_end = connection.attention = True     # what the client asked before is still answered
        else:
            self.connections.end(connection)    # nothing left to answer; or ECONNRESET, ETIMEDOUT and their like

    # sending

    def send(self, connection, plan):
        """Send the first piece of a response, or the next one."""
        engine, slot, flags = self.engine, connection.slot, connection.send_flags
        if plan.lazy and (cold := self.library.cold(plan.piece(connection.sent))):
            self.warm(connection, cold)
            flags &= ~MSG_WAITALL           # what waited in the kernel could have to be read from the disk again
        if not connection.sent:
            engine.arm_sendmsg(SEND | slot, connection.epoch, slot, plan.address, flags)
            return
        address, length = plan.locate(connection.sent)
        engine.arm_send(SEND | slot, connection.epoch, slot, address, length, flags)

    def warm(self, connection, spans):
        """Have the send that is armed next wait, first for room, then for a kernel's worker to have brought `spans`
        into memory: should a send meet pages that are not there, all connections would wait for the disk.

        All of it is one chain: there is one completion, of the send, or of what it waited for in vain.
        """
        self.counts.cold += 1
        engine, slot, epoch, flags = self.engine, connection.slot, connection.epoch, LINK | CQE_SKIP_SUCCESS
        spans = spans[:engine.entries - 2]      # as go into one submission; the others are read while they are sent
        engine.reserve(len(spans) + 2)
        engine.arm_poll(SEND | slot, epoch, slot, POLLOUT, flags)
        for address, length in spans:
            engine.arm_madvise(SEND | slot, epoch, address, length, MADV_POPULATE_READ, flags)

    def on_sent(self, connection, result):
        """A send has completed, and it was not simply the whole of a response with nothing behind it."""
        plan = connection.plan
        connection.sent += max(result, 0)
        if result > 0 and connection.sent < plan.total and connection.state is not CLOSING:
            connection.since = self.connections.tick
            self.send(connection, plan)
            return
        connection.protocol.account(connection, plan, connection.sent)
        connection.sent = 0
        if connection.state is CLOSING:
            connection.sending = False
            self.connections.free_if_ended(connection)
        elif result <= 0:
            self.on_send_failure(connection, result)
        else:
            connection.protocol.on_sent(connection, plan)

    def on_send_failure(self, connection, result):
        if result == -errno.EFAULT:
            self.counts.faults += 1
            if self.counts.faults == 1:
                log.error("the archive has been truncated or cannot be read: responses from the lost part are cut off")
        self.farewell.withhold(connection)
        self.connections.end(connection, sending=False)

    # ending

    def is_last(self, connection, plan):
        """Whether the connection ends with the response that is being sent."""
        return connection.state is RESPONSE and (
            plan.close or (connection.at_end or self.connections.stopping) and not connection.pending)

    def finish(self, connection):
        """After the last response. Closing at once would reset the connection if the client were still sending,
        and the reset could overtake the response (RFC 9112 section 9.6): then close our side and listen on."""
        if not self.must_linger(connection):
            self.connections.end(connection, sending=False)
            return
        self.connections.move(connection, LAST)
        connection.pending = b""
        self.close_our_side(connection)
        self.go_on(connection)

    def must_linger(self, connection):
        on_its_way = connection.plan.total > LINGER_SIZE and not self.connections.stopping
        return not connection.at_end and (connection.unread or connection.pending or on_its_way)

    def close_our_side(self, connection):
        """After what it ends with."""
        if not self.farewell.say_first(connection):
            self.shut_down(connection)

    def shut_down(self, connection):
        connection.shutting = True
        self.engine.arm_shutdown(SHUTDOWN | connection.slot, connection.epoch, connection.slot, SHUT_WR)

    def on_shutdown(self, connection, *_):
        connection.shutting = False
        connection.transport.go_on(connection)

class Http1:
    """HTTP/1.1 on a connection (RFC 9112): bytes come in, plans go out, whatever the transport."""

    def __init__(self, connections: Connections, library, access_log=None):
        self.connections, self.library, self.access_log = connections, library, access_log
        self.counts = connections.counts
        self.unanswered = b""           # what a site has just found no short way to answer

    # from bytes to a response

    def on_data(self, connection, data):
        """Bytes that the loop has not answered itself."""
        state = connection.state
        if state is IDLE:
            self.connections.move(connection, BYTES)
            connection.pending = self.unanswered = data
            self.advance(connection)
        elif state is HEAD or state is BODY:
            connection.pending += data
            self.advance(connection)
        elif connection.is_sending:
            connection.pending += data
            connection.attention = True
            if len(connection.pending) > MAX_PENDING and connection.receiving:
                self.connections.cancel_receive(connection)
                return
        connection.transport.go_on(connection)

    def look_up(self, connection, data):
        """The Plan for `data`, counted, where it is one whole request that is known or has a short way to its answer;
        else None. Worker.run has this written out."""
        plan = connection.known(data)
        if plan is not None:
            self.counts.memo_hits += 1
            return plan
        plan = None if data is self.unanswered else connection.answer(data)
        self.counts.memo_misses += plan is not None
        return plan

    def advance(self, connection):
        """Take from `pending` what the connection's state waits for. A parse error is answered and ends the
        connection."""
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
        head_only = connection.head.startswith(b"HEAD ")        # RFC 9110 section 9.3.2: without content
        self.send(connection, connection.site.refuse(error.status, error.reason, head_only))

    def take_head(self, connection):
        pending = connection.pending
        if pending.startswith(b"\r\n"):    # RFC 9112 section 2.2: empty lines before a request are passed over
            pending = http1.skip_empty_lines(pending)
        connection.head = pending
        end = http1.find_head(pending, connection.scanned)
        if end < 0:
            connection.pending, connection.scanned = pending, len(pending)
            return
        head, connection.pending, connection.scanned = pending[:end], pending[end:], 0
        connection.head = head
        plan = self.look_up(connection, head)
        if plan is not None:
            self.send(connection, plan)
            return
        self.counts.memo_misses += 1
        request = http1.parse_head(head)
        if request.has_body:
            self.begin_body(connection, request)
        else:
            self.reply_to(connection, request)

    def reply_to(self, connection, request):
        """Send what a request without a body gets, and remember it: its bytes are the connection's `head`."""
        site = connection.site
        plan = site.respond(request)
        if not (plan.lazy and self.library.cold(plan.piece(0))):    # known requests are sent without a look
            site.remember(connection.head, plan)
        self.send(connection, plan)

    def begin_body(self, connection, request):
        """Read past a body before its request is answered. One too long is not read, and ends the connection."""
        connection.request, connection.body = request, http1.Body(request.fields)
        expects = request.fields.expect is not None
        if request.fields.content_length > http1.MAX_BODY or expects and connection.site.respond(request).status >= 400:
            self.leave_body(connection)
        elif expects and not connection.pending:
            self.send(connection, connection.site.interim(), CONTINUE)
        else:
            connection.state = connection.state[BODY_AHEAD]     # the time for the request to arrive runs on

    def take_body(self, connection):
        connection.pending = connection.body.feed(connection.pending)
        if connection.body.done:
            self.send(connection, connection.site.respond(connection.request))
        elif connection.body.seen > http1.MAX_BODY:
            self.leave_body(connection)

    def leave_body(self, connection):
        """Answer without having read the body, and close."""
        connection.pending = b""
        connection.unread = True
        self.send(connection, connection.site.respond(connection.request._replace(connection=b"close")))

    # sending

    def send(self, connection, plan, event=REQUEST):
        connection.state = connection.state[event]
        connection.since = self.connections.tick
        connection.plan = plan
        connection.attention = bool(connection.pending) or connection.at_end or connection.state is INTERIM
        connection.transport.send(connection, plan)

    def on_sent(self, connection, plan):
        """The whole of a response is sent: on to the next request, or to the end."""
        transport = connection.transport
        if transport.is_last(connection, plan):
            transport.finish(connection)
            return
        self.connections.move(connection, SENT)
        if connection.state is IDLE and connection.pending:
            self.connections.move(connection, BYTES)
        if connection.state is not IDLE:
            self.advance(connection)
        if connection.at_end and connection.state in (IDLE, HEAD, BODY):
            self.connections.end(connection)
        else:
            transport.go_on(connection)

    def on_timeout(self, connection):
        """A request, body included, has not arrived in time."""
        self.refuse(connection, http1.HttpError(408, "the request took too long"))

    # counts and the access log

    def account(self, connection, plan, size):
        """Count, and note in the access log, a response of which `size` bytes have been sent, and no more will be."""
        plan.tally[0] += 1
        self.counts.bytes_sent += size
        if self.access_log is not None and plan.status != 100:
            self.note(connection, plan, size)

    def note(self, connection, plan, size):
        """A line in the access log."""
        access_log, site = self.access_log, connection.site
        line = site.lines.get(connection.head)
        if line is None or size != plan.total:
            line = access_log.describe(connection.head, plan.status, max(0, size - plan.total + plan.content))
            if size == plan.total and site.remembers(connection.head):
                site.lines[connection.head] = line
        client = access_log.forwarded(connection) if connection.forwards else connection.client
        access_log.lines += (client, access_log.date, line)
