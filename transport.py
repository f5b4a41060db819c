"""The transports of TLS: Handshake, which becomes UserspaceTls (OpenSSL encrypts) or KernelTls (the kernel does).

Once a handshake is done and the kernel has its keys, a connection is served like one in plaintext: by the loop in
worker.py, with the same plans and the same operations; KernelTls only differs in how a connection ends. Where the
kernel does not take over, UserspaceTls stands between the engine and the protocol.

Facts about the hand-over to the kernel
  * While OpenSSL reads, there is a single receive in flight at the most, so that none can take, undecrypted, what the
    kernel is to decrypt. What has come behind the handshake's end is read by OpenSSL, and counted; if it ends within a
    record, exactly the missing bytes are received.
  * OpenSSL's last bytes, TLS_TX and TLS_RX are linked: one submission, and each happens only if the one before it
    has succeeded completely (MSG_WAITALL makes a failure of a short send). There is one completion for all: those that
    are to be skipped on success make none, and when one of these fails, those linked behind it make none either.
"""

import collections
import errno
import logging
import mmap
import os

import ktls
import linux
from acceptor import Service
from connection import (
    ATTACH, CANCEL, CLOSING, CONTROL, FLIGHT, GOODBYE, HANDSHAKE, IDLE, KEYS, LINGER, LOAD, RECV, RECV_HANDSHAKE,
    RECV_TLS, REQUEST, RESPONSE, SECURED, SEND, SEND_TLS, SENT, UNSECURED,
)
from http1 import HttpError
from ktls import ALERT, CLOSE_NOTIFY, INFO_SIZE, ULP, USER_CANCELED
from linux import CQE_BUFFER_SHIFT, CQE_MORE, CQE_SKIP_SUCCESS, LAST_WORDS, LINK, MSG_NOSIGNAL, SEND_FLAGS
from plan import Plaintext
from tls import LARGEST_PLAINTEXT, MOST_OUTPUT, RECORD_HEADER, TlsError
from worker import Plain, Worker

log = logging.getLogger("tarweb")

ROOM_AT_ONCE = 8 * 1024         # bytes of a response behind which there is sure to be room for some more at once
CONTROL_SIZE = 64               # bytes of a record that is no application data: the rest of it is of no interest
PLAIN_HTTP = "this port speaks HTTPS: write https:// in front of the address"

SEAL_SIZE = 64 * 1024           # bytes of a plan encrypted at a time: a few records, within the CPU's caches
RECORD_OVERHEAD = 64            # bytes that encryption adds to a record, and more
SPARE = MOST_OUTPUT + RECORD_OVERHEAD       # for what OpenSSL has to say before a response, and an alert behind it
SMALL_BUFFER = LARGEST_PLAINTEXT + RECORD_OVERHEAD + SPARE
LARGE_BUFFER = SEAL_SIZE + SEAL_SIZE // LARGEST_PLAINTEXT * RECORD_OVERHEAD + SPARE
RESPONDING = IDLE[REQUEST]
FREE_BUFFERS = 256              # of each size are kept
LARGEST_KEPT = 32 * 1024        # bytes of a response that is kept in one piece, instead of read for each request
MEMO_PLAINTEXT = 16 << 20       # bytes of such responses; beyond that all are let go


def add_tls(worker: Worker, tls, plain_listeners=(), plain_site=None):
    """Have a Worker speak TLS, by the tls.Engine `tls`, on all of its listeners but `plain_listeners`; there, and to
    those who speak plain HTTP elsewhere, `plain_site` answers."""
    farewell = Farewell(worker.connections, tls)
    userspace = UserspaceTls(worker.connections, worker.library, farewell)
    kernel = KernelTls(worker.connections, worker.library, farewell)
    plain = Service(worker.plain, worker.http1, plain_site)
    handshake = Handshake(worker.connections, worker.library, farewell, userspace, kernel, plain)
    for listener, service in worker.acceptor.services.items():
        worker.acceptor.services[listener] = plain if listener in plain_listeners else service._replace(
            transport=handshake)
    for part in (handshake, userspace, kernel, farewell):
        worker.handlers.update(part.handlers())
    worker.clock.sites.append(plain_site)
    worker.clock.every_second += [plain_site.tick, tls.credentials.renew_tickets]
    worker.handshake, worker.userspace, worker.farewell = handshake, userspace, farewell


# --- how TLS ends

class Farewell:
    """close_notify (RFC 8446 section 6.1), or the alert that OpenSSL has for the client: as worker.NoFarewell, for all
    transports of TLS."""

    def __init__(self, connections, tls):
        self.connections, self.tls, self.engine, self.counts = connections, tls, connections.engine, connections.counts
        self.close_notify = ktls.close_notify()
        self.last_words: collections.deque = collections.deque()    # (the engine's tail behind it, what is to be sent)

    def handlers(self):
        return {GOODBYE: self.on_sent}

    def say(self, connection):
        """Say it where there is room at once (MSG_DONTWAIT), as there is when nothing has been sent for a while.

        So it is over when the kernel takes what is armed next, closing the socket perhaps. It completes only if it
        fails, which is as uninteresting as that a cancel does.
        """
        self.arm(connection, CANCEL, 0, LAST_WORDS, CQE_SKIP_SUCCESS)

    def say_first(self, connection):
        if not self.arm(connection, GOODBYE | connection.slot, connection.epoch, MSG_NOSIGNAL, 0):
            return False                # it has gone with the last response
        connection.sending, connection.send_tag = True, GOODBYE
        return True

    def on_sent(self, connection, *_):
        connection.sending = False
        if connection.state is LINGER:
            if connection.at_end or self.connections.stopping and not connection.unread:
                self.connections.end(connection)
                return
            connection.transport.shut_down(connection)
        connection.transport.go_on(connection)

    def withhold(self, connection):
        if connection.session is not None:
            connection.session.ended = True

    def on_peer_end(self, connection, result):
        """Whether the client said before that this would be the end (RFC 8446 section 6.1)."""
        session = connection.session
        if session is None:
            return
        if not session.established:
            self.count_failure("the client has gone" if not result else errno.errorcode.get(-result, result))
        elif not (result or session.at_end or session.ended):
            self.counts.truncated += 1
            log.debug("a client has gone without close_notify")
        if result:
            session.ended = True        # there is nobody left to say it to

    def count_failure(self, reason):
        self.counts.handshakes_failed += 1
        log.debug("handshake failed: %s", reason)

    def release(self, connection):
        if connection.session is not None:
            self.tls.free(connection.session)

    def arm(self, connection, tag, epoch, message_flags, flags):
        """Send what there is to say; tell whether there is anything."""
        session, engine = connection.session, self.engine
        if session is None or session.ended:
            return False
        if session.in_kernel:
            session.ended = True
            engine.arm_sendmsg(tag, epoch, connection.slot, self.close_notify.address, message_flags, flags)
            return True
        session.flight = words = self.tls.end(session)
        if words:
            engine.arm_send(tag, epoch, connection.slot, linux.address_of(words), len(words), message_flags, flags)
            self.keep_until_submitted(words)
        return bool(words)

    def keep_until_submitted(self, words):
        """Keep what was armed last until the kernel has taken the entry, and so copied it: the session may be gone."""
        self.last_words.append((self.engine.tail, words))
        while self.last_words[0][0] <= self.engine.submitted:
            self.last_words.popleft()


# --- the handshake

class Handshake(Plain):
    """The transport of connections whose TLS handshake is not done: `userspace` or `kernel` takes over then.

    plain: the Service of those that turn out to speak plain HTTP.
    """

    def __init__(self, connections, library, farewell, userspace, kernel, plain):
        super().__init__(connections, library, farewell)
        self.tls, self.userspace, self.kernel, self.plain = farewell.tls, userspace, kernel, plain
        self.ulp = linux.address_of(ULP), len(ULP)

    def handlers(self):
        return {RECV_HANDSHAKE: self.on_received, FLIGHT: self.on_flight_sent, KEYS: self.on_keys_set,
                ATTACH: self.on_not_attached}

    def begin(self, connection):
        self.connections.move(connection, UNSECURED)
        connection.recv_tag = RECV_HANDSHAKE
        connection.attached = bool(self.tls.kernel_ciphers)
        if connection.attached:
            self.engine.arm_setsockopt(ATTACH | connection.slot, connection.epoch, connection.slot, ktls.ATTACH,
                                       self.ulp, CQE_SKIP_SUCCESS)

    def on_not_attached(self, connection, *_):
        """It completes only if it has failed."""
        connection.attached = False

    # receiving

    def receive(self, connection, multishot=False):
        """Piece by piece: see the facts above."""
        connection.receiving = True
        self.engine.arm_recv(RECV_HANDSHAKE | connection.slot, connection.epoch, connection.slot, False,
                             connection.session.wanted if connection.session else 0)

    def go_on(self, connection):
        """Receive only while OpenSSL is to have what comes."""
        if connection.state is CLOSING:
            self.connections.free_if_ended(connection)
        elif not connection.receiving:
            session = connection.session
            if session is None or not session.established or session.wanted:
                self.receive(connection)

    def on_received(self, connection, result, flags):
        if result <= 0:
            self.on_receive_end(connection, result, flags)
            return
        connection.receiving = False
        i, engine = flags >> CQE_BUFFER_SHIFT, self.engine
        data = engine.pool[i * engine.buffer_size:i * engine.buffer_size + result]
        engine.give_back(i)
        if connection.state is HANDSHAKE:
            self.on_first_bytes(connection, data)
        else:
            self.go_on(connection)

    def on_first_bytes(self, connection, data):
        """Bytes for OpenSSL, in order: those of the handshake, then those that came before the kernel took over."""
        if connection.session is None and data[:1].isalpha():
            # No handshake record, which begins with 22 (RFC 8446 section 5.1).
            self.refuse_plaintext(connection)
            return
        try:
            if connection.session is None:
                connection.session = self.tls.start(connection.attached)
            session = connection.session
            read = self.tls.feed if session.established else self.tls.handshake
            connection.pending += read(session, data)
        except TlsError as error:
            self.fail(connection, error)
        else:
            self.proceed(connection, session)

    def refuse_plaintext(self, connection):
        """Somebody speaks plain HTTP here."""
        connection.transport, connection.protocol, connection.recv_tag = self.plain.transport, self.plain.protocol, RECV
        connection.site = self.plain.site
        connection.protocol.refuse(connection, HttpError(400, PLAIN_HTTP))
        connection.transport.go_on(connection)

    def on_receive_end(self, connection, result, flags):
        session = connection.session
        if result == 0 and connection.state is HANDSHAKE and session is not None and session.established:
            # The rest of a record that the kernel was waiting for will not come; what came before it is still answered.
            self.farewell.on_peer_end(connection, result)
            connection.receiving = session.to_kernel = False
            session.at_end = True
            self.proceed(connection, session)
        else:
            super().on_receive_end(connection, result, flags)

    # sending

    def proceed(self, connection, session):
        """Do what a handshake needs next, unless a send is in flight: its completion comes here again."""
        if not connection.sending:
            if session.established and session.to_kernel and not session.wanted:
                self.hand_over(connection, session)
            elif session.output and not session.can_wait:
                self.arm_flight(connection, session)
            elif session.established and not session.to_kernel:
                self.establish(connection, session)
                return
        self.go_on(connection)

    def arm_flight(self, connection, session, flags=0):
        """Send what OpenSSL has to say."""
        session.flight, session.output = session.output, b""
        connection.sending, connection.send_tag = True, FLIGHT
        self.engine.arm_send(FLIGHT | connection.slot, connection.epoch, connection.slot,
                             linux.address_of(session.flight), len(session.flight), SEND_FLAGS, flags)

    def hand_over(self, connection, session):
        """Give the kernel the keys: the facts above say how the parts of this depend on each other."""
        self.engine.reserve(3)
        size = self.tls.derive_keys(session)
        connection.sending, connection.send_tag = True, KEYS
        if session.output:
            self.arm_flight(connection, session, LINK | CQE_SKIP_SUCCESS)
        at = linux.address_of(session.keys)
        for option, address, flags in ((ktls.SEND_KEYS, at, LINK | CQE_SKIP_SUCCESS),
                                       (ktls.RECEIVE_KEYS, at + INFO_SIZE, 0)):
            self.engine.arm_setsockopt(KEYS | connection.slot, connection.epoch, connection.slot, option,
                                       (address, size), flags)

    def on_flight_sent(self, connection, result, _):
        """What OpenSSL had to say is sent, or it is where it fell short that a hand-over has ended."""
        session = connection.session
        if self.survives(connection, result == len(session.flight), result):
            self.proceed(connection, session)

    def on_keys_set(self, connection, result, _):
        """The kernel has its keys, or refused them."""
        if self.survives(connection, result == 0, result):
            self.tls.hand_over(connection.session)
            self.establish(connection, connection.session)

    def survives(self, connection, succeeded, result):
        """Whether a connection goes on now that what was sent for its handshake has completed."""
        connection.sending = False
        if connection.state is CLOSING:
            self.connections.free_if_ended(connection)
        elif succeeded:
            return True
        else:
            connection.session.ended = True     # it cannot be known what the client would make of more bytes
            self.fail(connection, errno.errorcode.get(-result, "a send fell short"))
        return False

    def establish(self, connection, session):
        """Both sides are done with the handshake; what has come behind it is a request, or the beginning of one."""
        if session.in_kernel:
            connection.transport, connection.recv_tag, connection.send_tag = self.kernel, RECV, SEND
            connection.send_flags = MSG_NOSIGNAL        # MSG_WAITALL is refused
        else:
            connection.transport, connection.recv_tag, connection.send_tag = self.userspace, RECV_TLS, SEND_TLS
            self.tls.forget_secrets(session)
        name = ("kernel" if session.in_kernel else "userspace") + ("_resumed" if session.resumed else "_full")
        setattr(self.counts, name, getattr(self.counts, name) + 1)
        self.connections.move(connection, SECURED)
        data, connection.pending = connection.pending, b""
        plan = connection.protocol.look_up(connection, data)
        if plan is not None:
            connection.head = data
            connection.protocol.send(connection, plan)
            connection.transport.go_on(connection)
        elif data:
            connection.protocol.on_data(connection, data)
        elif not session.at_end:
            connection.transport.receive(connection, multishot=False)       # as for any first request
        if session.at_end:
            connection.transport.on_last_data(connection)

    # failing

    def fail(self, connection, reason):
        self.farewell.count_failure(reason)
        self.connections.end(connection)


# --- the kernel encrypts

class KernelTls(Plain):
    """The transport of connections that the kernel encrypts: plain, but for records that are no application data."""

    def handlers(self):
        return {CONTROL: self.on_control}

    def on_receive_end(self, connection, result, flags):
        if result != -errno.EIO or connection.state is CLOSING:
            super().on_receive_end(connection, result, flags)
            return
        # The kernel has a record that is no application data: fetch it.
        session = connection.session
        session.control = ktls.record_message(CONTROL_SIZE)
        connection.receiving, connection.recv_tag = True, CONTROL
        self.engine.arm_recvmsg(CONTROL | connection.slot, connection.epoch, connection.slot, session.control.address)

    def on_control(self, connection, result, _):
        """An alert; or a KeyUpdate or the wish to renegotiate, after which the kernel can receive no more."""
        session = connection.session
        connection.receiving, connection.recv_tag = False, RECV
        kind, content = ktls.received_record(session.control, max(result, 0))
        if result <= 0 or connection.state is CLOSING:
            self.on_receive_end(connection, result, 0)
        elif kind == ALERT and content[1:] == USER_CANCELED:    # RFC 8446 section 6.1: close_notify follows
            self.go_on(connection)
        elif kind == ALERT and content[1:] != CLOSE_NOTIFY:
            log.debug("a client sent alert %s", content[1:].hex())
            session.ended = True
            self.connections.end(connection)
        else:
            session.at_end = True
            self.on_last_data(connection)

    def must_linger(self, connection):
        """Also where the kernel may have no room left for close_notify behind the last response."""
        return super().must_linger(connection) or connection.plan.total > ROOM_AT_ONCE


# --- OpenSSL encrypts

class Buffer:
    """Memory for what is encrypted and sent. `free`: the list it returns to."""

    def __init__(self, size, free):
        self.size, self.free = size, free
        self.memory = mmap.mmap(-1, size)
        self.address = linux.address_of(self.memory)
        self.pointer = linux.pointer(self.address)


class UserspaceTls(Plain):
    """The transport of connections that OpenSSL encrypts.

    Received: each piece goes through OpenSSL, and what it gives is looked at as if it had been received so.
    Sent: a plan goes out in pieces of SEAL_SIZE bytes at most, each brought together in one buffer, encrypted there,
    and sent from there. No connection has more than one buffer, and none while it is idle.

    Contents are read from the file, not from its mapping: reading a mapping of a file that has been cut short ends the
    process. A small response is read once and kept in one piece; pieces of large ones are read through the engine, so
    that no connection waits for another one's disk.
    """

    send_size = SEAL_SIZE

    def __init__(self, connections, library, farewell):
        super().__init__(connections, library, farewell)
        engine, self.tls = self.engine, farewell.tls
        openssl = self.tls.openssl
        self.write_bio, self.read_bio = openssl.BIO_write, openssl.BIO_read
        self.read_ssl, self.write_ssl = openssl.SSL_read, openssl.SSL_write
        self.received = [linux.pointer(engine.buffer_address(i)) for i in range(engine.buffer_count)]
        self.small_buffers, self.large_buffers = [], []         # those that are free
        self.gathered, self.gathered_size = [], 0               # plans whose plaintext is kept, and its bytes

    def handlers(self):
        return {RECV_TLS: self.on_received, SEND_TLS: self.on_sealed_sent, LOAD: self.on_loaded}

    # receiving

    def go_on(self, connection):
        """As ever; but what comes behind the end of TLS is not read while a response is being sent."""
        session = connection.session
        if not (connection.is_sending and (session.at_end or session.ended)):
            super().go_on(connection)

    def on_received(self, connection, result, flags):
        """Ciphertext. The common case, exactly one record, of application data, is written out here; `Engine.feed` has
        all others."""
        session = connection.session
        if result <= 0:
            self.on_receive_end(connection, result, flags)
            return
        if not flags & CQE_MORE:
            connection.receiving = False
        i, tls, engine = flags >> CQE_BUFFER_SHIFT, self.tls, self.engine
        pool, at = engine.pool, i * engine.buffer_size
        if session.at_end or session.ended:
            engine.give_back(i)
            connection.unread = True            # nobody reads it, and the client may go on
            if connection.is_sending and connection.receiving:
                self.connections.cancel_receive(connection)
            else:
                self.go_on(connection)
            return
        try:
            if not session.tail and int.from_bytes(pool[at + 3:at + 5], "big") + RECORD_HEADER == result:
                self.write_bio(tls.incoming, self.received[i], result)
                engine.give_back(i)
                got = self.read_ssl(session.ssl, tls.plain_at, LARGEST_PLAINTEXT)
                data = tls.plain[:got] if got > 0 else tls.after_read(session, got)
            else:
                piece = pool[at:at + result]
                engine.give_back(i)
                data = tls.feed(session, piece)
        except TlsError as error:       # the client is told how, if nothing else is being sent to it
            log.debug("TLS broken: %s", error)
            self.connections.end(connection)
            return
        if connection.state is IDLE and not session.at_end:
            plan = connection.protocol.look_up(connection, data)
            if plan is not None:
                connection.head = data
                if plan.dated is connection.site.status_heads.date and not session.output and plan.done == plan.total:
                    self.send_kept(connection, session, plan)
                else:
                    connection.protocol.send(connection, plan)
                if not connection.receiving:
                    self.go_on(connection)
                return
        self.on_plaintext(connection, session, data)

    def send_kept(self, connection, session, plan):
        """The way of nearly every request: what `send` leads to, for a plan in one piece with the Date of now."""
        connection.state, connection.since, connection.plan = RESPONDING, self.connections.tick, plan
        connection.attention = False
        buffer = self.take_buffer(plan.total)
        if self.write_ssl(session.ssl, plan.plaintext.pointer, plan.total) != plan.total:
            log.debug("TLS broken: %s", self.tls.failure(session))      # which takes it out of OpenSSL's queue
            self.seal(connection, session, buffer, None, 0)
            return
        size = self.read_bio(self.tls.outgoing, buffer.pointer, buffer.size)
        session.buffer, session.filled, session.sealed, session.unsent = buffer, plan.total, size, size
        connection.send_tag = SEND_TLS
        self.engine.arm_send(SEND_TLS | connection.slot, connection.epoch, connection.slot, buffer.address, size)

    def on_plaintext(self, connection, session, data):
        """What OpenSSL gave, perhaps nothing: then the client has said something about TLS itself."""
        if data:
            connection.protocol.on_data(connection, data)
        if session.at_end and connection.session is session and connection.state is not CLOSING:
            self.on_last_data(connection)
        elif not data:
            self.go_on(connection)

    # sending

    def send(self, connection, plan):
        session = connection.session
        if plan.total <= LARGEST_KEPT and not connection.sent and self.at_hand(plan):
            buffer = self.take_buffer(plan.total)
            self.seal(connection, session, buffer, self.plaintext(connection, plan), plan.total)
        else:
            self.load(connection, session, plan)

    def at_hand(self, plan):
        """Whether a small plan can be had without waiting for a disk."""
        return not plan.lazy or plan.plaintext is not None or not self.library.cold(plan.spans())

    def load(self, connection, session, plan):
        """Fill a buffer with the next piece of a plan: bytes of our own, then those of one span of the archive."""
        session.buffer = buffer = self.take_buffer(SEAL_SIZE)
        filled, skip = 0, connection.sent
        for address, length in plan.spans():
            if skip >= length:
                skip -= length
                continue
            size = min(length - skip, SEAL_SIZE - filled)
            archive = self.library.file_at(address)
            if archive and size:
                session.filled, connection.send_tag = filled, LOAD
                self.engine.arm_pread(LOAD | connection.slot, connection.epoch, archive.fd,
                                      buffer.address + filled, size, address - archive.address + skip)
                return
            linux.copy(buffer.address + filled, address + skip, size)
            filled, skip = filled + size, 0
        self.seal(connection, session, buffer, buffer.pointer, filled)

    def on_loaded(self, connection, result, _):
        """A piece is there, or as much of it as the file gave at once; where it gave nothing, it has been cut short."""
        session = connection.session
        if result > 0 and connection.state is not CLOSING:
            self.seal(connection, session, session.buffer, session.buffer.pointer, session.filled + result)
        else:
            self.put_back(session)
            self.on_sent(connection, -errno.EFAULT)

    def seal(self, connection, session, buffer, source, size):
        """Encrypt `size` bytes at pointer `source` (None: they are lost) into `buffer`, and send that."""
        session.buffer, session.filled, connection.send_tag = buffer, size, SEND_TLS
        try:
            session.sealed = self.tls.seal(session, source, size, buffer.pointer, buffer.size) if source else 0
        except TlsError as error:
            log.debug("TLS broken: %s", error)
            session.sealed = 0
        whole = session.sealed and connection.sent + size == connection.plan.total
        if whole and self.is_last(connection, connection.plan):
            session.sealed += self.tls.end_behind(session, buffer.address + session.sealed)
        session.unsent = session.sealed
        # Nothing sealed: the send fails (EFAULT), and its completion ends the connection like that of any other.
        self.engine.arm_send(SEND_TLS | connection.slot, connection.epoch, connection.slot,
                             buffer.address if session.sealed else 0, session.sealed or 1)

    def is_last(self, connection, plan):
        """As ever; and once close_notify has gone with a response, nothing can come behind it."""
        return super().is_last(connection, plan) or connection.state is RESPONSE and connection.session.ended

    def on_sealed_sent(self, connection, result, _):
        session = connection.session
        if result != session.unsent and result > 0 and connection.state is not CLOSING:
            session.unsent -= result
            self.engine.arm_send(SEND_TLS | connection.slot, connection.epoch, connection.slot,
                                 session.buffer.address + session.sealed - session.unsent, session.unsent)
            return
        self.put_back(session)
        if result == session.unsent and session.filled == connection.plan.done and not connection.attention:
            connection.state = connection.state[SENT]
            connection.since = self.connections.tick
            connection.protocol.account(connection, connection.plan, session.filled)
        else:
            self.on_sent(connection, session.filled if result == session.unsent else min(result, 0))

    # memory

    def take_buffer(self, size):
        """A Buffer for `size` bytes of plaintext."""
        if size <= LARGEST_PLAINTEXT:
            return self.small_buffers.pop() if self.small_buffers else Buffer(SMALL_BUFFER, self.small_buffers)
        return self.large_buffers.pop() if self.large_buffers else Buffer(LARGE_BUFFER, self.large_buffers)

    def put_back(self, session):
        buffer, session.buffer = session.buffer, None
        if len(buffer.free) < FREE_BUFFERS:
            buffer.free.append(buffer)

    def plaintext(self, connection, plan):
        """A pointer to all of a small plan in one piece, with the Date of now; None where the archive has lost it."""
        if plan.plaintext is None and not self.gather(plan):
            return None
        _, pointer, head, size = plan.plaintext
        date = connection.site.status_heads.date
        if plan.dated is not date:
            linux.copy(pointer, head, size)
            plan.dated = date
        return pointer

    def gather(self, plan):
        """Put all of a small plan into one piece; tell whether it was all there."""
        memory, at = bytearray(plan.total), 0
        address = linux.address_of(memory)
        for source, length in plan.spans():
            archive = self.library.file_at(source)
            if archive is None:
                linux.copy(address + at, source, length)
            elif not read_exactly(archive.fd, memoryview(memory)[at:at + length], source - archive.address):
                return False
            at += length
        plan.plaintext = Plaintext(memory, linux.pointer(address), *plan.spans()[0])
        self.keep(plan)
        return True

    def keep(self, plan):
        if self.gathered_size + plan.total > MEMO_PLAINTEXT:
            for other in self.gathered:
                other.plaintext = other.dated = None
            self.gathered.clear()
            self.gathered_size = 0
        self.gathered.append(plan)
        self.gathered_size += plan.total


def read_exactly(fd, memory, offset):
    """Fill `memory` from a file; tell whether it had as much."""
    try:
        return os.preadv(fd, [memory], offset) == len(memory)
    except OSError:
        return False
