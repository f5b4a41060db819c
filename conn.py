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
import http1
from linux import (
    CQE_BUFFER, CQE_BUFFER_SHIFT, CQE_MORE, CQE_SKIP_SUCCESS, LINK, MADV_POPULATE_READ, MSG_WAITALL, OP_SENDMSG,
    POLLOUT, SHUT_WR,
)
from door import ACCEPT, CANCEL, CLOSE, SEND, SHUTDOWN, SLOT
from life import DAMAGE, FRESH, LOG, SIGNAL, TICK, Life
from plan import SEND_SIZE
from state import (
    BODY, BODY_AHEAD, BYTES, CLOSING, CONTINUE, END, ENDED, HEAD, IDLE, INTERIM, LAST, LINGER, PREFACE, REQUEST,
    RESPONSE, SEND_GRACE, SENT,
)

log = logging.getLogger("tarweb")

MAX_PENDING = 32 * 1024     # bytes received and not yet answered; above that nothing more is read from the connection
LINGER_SECONDS = 10         # how long a client that may still be sending is listened to after its last response
LINGER_SIZE = 64 * 1024     # a response of more bytes may still be on its way when the kernel has taken it
PASSING = (errno.ENOBUFS, errno.ECANCELED, errno.EINTR, errno.EAGAIN)     # reasons for a receive to be armed again


class Worker(Life):
    """Serves `site`, whose contents are in the archives of `library`, until told to stop."""

    def __init__(self, site, library, **more):
        super().__init__(**more)
        self.site, self.library = site, library
        self.sites = [self.site]
        self.stale = 0                              # completions of an earlier generation

    # the loop

    def run(self):
        """Serve until told to stop and all is sent, or the time for that is over."""
        ring, connections, counts, access_log = self.ring, self.connections, self.counts, self.access_log
        site, known, told = self.site, self.site.known, self.site.lines.get
        lines: list = access_log.lines if access_log is not None else []
        pool, buffer_size, buffer_order, buffer_mask = ring.pool, ring.buffer_size, ring.buffer_order, ring.buffer_mask
        queue, mask, write = ring.queue, ring.mask, ring.write
        responding, idle = IDLE[REQUEST], RESPONSE[SENT]
        self.begin()
        while self.stop_at is None or (self.live or self.listeners) and self.now < self.stop_at:
            now, hits, sent = self.now, 0, 0
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
                            connection.state, connection.since = responding, now
                            connection.plan, connection.head = plan, data
                            hits += 1
                            if ring.tail == ring.room:
                                ring.flush()
                            write(queue, (ring.tail & mask) << 6, OP_SENDMSG, 0, 0, tag, 0,
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
                        continue
                    plan = connection.plan
                    if result == plan.done and not connection.attention:
                        connection.state, connection.since = idle, now
                        plan.tally[0] += 1
                        sent += result
                        if access_log is not None:
                            line = told(connection.head) if connection.site is site else None
                            if line is None:
                                self.note(connection, plan, result)
                            else:
                                lines += (connection.who, access_log.date, line)
                    else:
                        self.on_sent(connection, result)
                else:
                    self.on_other(tag & ~SLOT, tag & SLOT, generation, result, flags)
            counts.memo_hits += hits
            counts.bytes_sent += sent
            if access_log is not None and len(lines) > access_log.enough:
                access_log.flush()
        self.finish_log()
        ring.flush(ring.entries)        # the last goodbyes are armed, and have to be taken before the process ends

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
            self.on_signal(self.signal_byte[0] if result > 0 else 0)
        elif operation == DAMAGE:
            self.on_damage()
        elif operation == LOG:
            self.access_log.on_written(result)
        elif operation == SHUTDOWN:
            self.on_shutdown(self.connections[slot], generation)
        elif operation == CLOSE:
            log.error("slot %d cannot be closed: %s", slot, errno.errorcode.get(-result, result))

    # receiving

    def receive(self, connection, multishot=True):
        connection.receiving = True
        self.ring.arm_recv(connection.reads | connection.slot, connection.generation, connection.slot, multishot)

    def on_bytes(self, connection, data, flags):
        """The first bytes of a connection, where it did not come without any."""
        self.on_data(connection, data, flags)

    def on_data(self, connection, data, flags):
        """Bytes that are not, by themselves, a request known from before."""
        if not flags & CQE_MORE:
            connection.receiving = False
        state = connection.state
        if state is PREFACE:
            self.on_preface(connection, data)
            return
        if state is IDLE:
            request = http1.known_request(data)
            if request is not None:
                self.counts.memo_misses += 1
                connection.head = data
                self.reply_to(connection, request)
            else:
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
            self.counts.no_buffers += result == -errno.ENOBUFS
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
            self.receive(connection, multishot=connection.state is not PREFACE)

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
        self.send(connection, connection.site.refuse(error.status, error.reason))

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
        plan = connection.site.known(head)
        if plan is not None:
            self.counts.memo_hits += 1
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
        connection.since = self.now
        connection.plan = plan
        connection.attention = bool(connection.pending) or connection.at_end or connection.state is INTERIM
        self.send_piece(connection, plan)

    def send_piece(self, connection, plan):
        """Send the first piece of a response, or the next one."""
        flags = connection.message_flags
        if plan.lazy and (cold := self.library.cold(plan.piece(connection.sent))):
            self.warm(connection, cold)
            flags &= ~MSG_WAITALL           # what waited in the kernel could have to be read from the disk again
        if not connection.sent:
            self.ring.arm_sendmsg(SEND | connection.slot, connection.generation, connection.slot, plan.address, flags)
            return
        address, length = plan.locate(connection.sent)
        self.ring.arm_send(SEND | connection.slot, connection.generation, connection.slot, address, length, flags)

    def warm(self, connection, spans):
        """Have the send that is armed next wait, first for room, then for a kernel's worker to have brought `spans`
        into memory: should a send meet pages that are not there, all connections would wait for the disk.

        All of it is one chain: there is one completion, of the send, or of what it waited for in vain.
        """
        self.counts.cold += 1
        ring, slot, generation, flags = self.ring, connection.slot, connection.generation, LINK | CQE_SKIP_SUCCESS
        spans = spans[:ring.entries - 2]        # as go into one submission; the others are read while they are sent
        ring.reserve(len(spans) + 2)
        ring.arm_poll(SEND | slot, generation, slot, POLLOUT, flags)
        for address, length in spans:
            ring.arm_madvise(SEND | slot, generation, address, length, MADV_POPULATE_READ, flags)

    def on_sent(self, connection, result):
        """A send has completed, and it was not simply the whole of a response with nothing behind it."""
        plan = connection.plan
        connection.sent += max(result, 0)
        if result > 0 and connection.sent < plan.total and connection.state is not CLOSING:
            connection.since = self.now
            self.send_piece(connection, plan)
            return
        self.account(connection, plan, connection.sent)
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
            self.counts.faults += 1
            if self.counts.faults == 1:
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
        return plan.close or (connection.at_end or self.stopping) and not connection.pending

    def finish(self, connection, linger=False):
        """After the last response. Closing at once would reset the connection if the client were still sending,
        and the reset could overtake the response (RFC 9112 section 9.6): then close our side and listen on."""
        on_its_way = connection.plan.total > LINGER_SIZE and not self.stopping
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

    def on_shutdown(self, connection, generation):
        if generation != connection.generation:
            self.on_stale(0)
            return
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
        if self.addresses and connection.counted:
            self.addresses.release(connection)
        self.let_go(connection)
        self.on_room()

    def let_go(self, connection):
        connection.forget()

    # time

    def patience(self, connection):
        """How many seconds the present wait of a connection may take."""
        state = connection.state
        if state is IDLE and connection.plan is not None:
            return self.limits.keepalive_timeout
        if state is RESPONSE or state is INTERIM:
            size = min(SEND_SIZE, connection.plan.total - connection.sent)
            return SEND_GRACE + size // self.limits.min_rate
        if self.stopping and state in (IDLE, PREFACE):
            return FRESH
        return LINGER_SECONDS if state is LINGER else self.limits.header_timeout

    def on_timeout(self, connection):
        if connection.state is BODY or connection.state is HEAD:
            self.refuse(connection, http1.HttpError(408, "the request took too long"))
        elif connection.state is not CLOSING:
            self.end(connection)
