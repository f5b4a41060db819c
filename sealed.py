"""Connections that OpenSSL encrypts, not the kernel: what comes between the ring and the handlers of `conn.py`.

Received: each piece goes through OpenSSL, and what it gives is looked at as if it had been received so.
Sent: a plan goes out in pieces of PIECE bytes at most, each brought together in one buffer, encrypted there, and sent
from there. No connection has more than one buffer, and none while it is idle.

Contents are read from the file, not from its mapping: reading a mapping of a file that has been cut short ends the
process. A small response is read once and kept in one piece; pieces of large ones are read through the ring, so that
no connection waits for another one's disk.
"""

import errno
import logging
import mmap
import os

import linux
from linux import CQE_MORE
from conn import SEND_GRACE, Worker
from plan import Plaintext
from state import CLOSING, IDLE, REQUEST, RESPONSE, SENT
from tls import LARGEST_PLAINTEXT, MOST_OUTPUT, RECORD_HEADER, TlsError

log = logging.getLogger("tarweb")

# Tags, as in conn.py. WRAPPED: a receive whose bytes are no request yet. SEALED: a send of what OpenSSL has encrypted.
WRAPPED, SEALED, LOAD = (operation << 24 for operation in (8, 9, 10))

PIECE = 64 * 1024               # bytes of a plan encrypted at a time: a few records, within the CPU's caches
RECORD_OVERHEAD = 64            # bytes that encryption adds to a record, and more
SPARE = 2 * MOST_OUTPUT         # for what OpenSSL has to say before a response
SMALL_BUFFER = LARGEST_PLAINTEXT + RECORD_OVERHEAD + SPARE
LARGE_BUFFER = PIECE + PIECE // LARGEST_PLAINTEXT * RECORD_OVERHEAD + SPARE
RESPONDING = IDLE[REQUEST]
FREE_BUFFERS = 256              # of each size are kept
MEMO_PLAINTEXT = 16 << 20       # bytes of small responses kept in one piece each; beyond that all are let go


class Buffer:
    """Memory for what is encrypted and sent. `free`: the list it returns to."""

    def __init__(self, size, free):
        self.size, self.free = size, free
        self.memory = mmap.mmap(-1, size)
        self.address = linux.address_of(self.memory)
        self.pointer = linux.pointer(self.address)


class SealedWorker(Worker):
    """A Worker whose connections may have a tls.Session, of the Engine `engine`, that is not the kernel's."""

    def __init__(self, engine, **more):
        super().__init__(**more)
        self.engine = engine
        self.write_bio, self.read_bio = engine.openssl.BIO_write, engine.openssl.BIO_read
        self.read_ssl, self.write_ssl = engine.openssl.SSL_read, engine.openssl.SSL_write
        self.known, self.heads = self.site.known, self.site.status_heads
        ring = self.ring
        self.received = [linux.pointer(ring.buffer_address(i)) for i in range(ring.buffer_count)]
        self.small_buffers, self.large_buffers = [], []         # those that are free
        self.gathered, self.gathered_size = [], 0               # plans whose plaintext is kept, and its bytes

    # receiving

    def on_ciphertext(self, connection, session, i, size, flags):
        """`size` bytes have been received into buffer `i`.

        The common case, exactly one record, of application data, is written out here; `Engine.feed` has all others.
        """
        engine, pool, at = self.engine, self.ring.pool, i * self.ring.buffer_size
        try:
            if not session.tail and int.from_bytes(pool[at + 3:at + 5], "big") + RECORD_HEADER == size:
                self.write_bio(engine.incoming, self.received[i], size)
                self.ring.give_back(i)
                got = self.read_ssl(session.ssl, engine.plain_at, LARGEST_PLAINTEXT)
                data = engine.plain[:got] if got > 0 else engine.after_read(session, got)
            else:
                piece = pool[at:at + size]
                self.ring.give_back(i)
                data = engine.feed(session, piece)
        except TlsError as error:
            if not flags & CQE_MORE:
                connection.receiving = False
            self.on_tls_error(connection, error)
            return
        if connection.state is IDLE and flags & CQE_MORE and not session.at_end:
            plan = self.known(data)
            if plan is not None:
                connection.head = data
                if plan.dated is self.heads.date and not session.output and plan.done == plan.total:
                    self.answer(connection, session, plan)
                else:
                    self.counts.memo_hits += 1
                    self.send(connection, plan)
                return
        self.on_plaintext(connection, session, data, flags)

    def answer(self, connection, session, plan):
        """The way of nearly every request: what `send` leads to, for a plan in one piece with the Date of now."""
        connection.state, connection.since, connection.plan = RESPONDING, self.now, plan
        connection.attention = False
        self.counts.memo_hits += 1
        buffer = self.small_buffers.pop() if self.small_buffers else Buffer(SMALL_BUFFER, self.small_buffers)
        if self.write_ssl(session.ssl, plan.plaintext.pointer, plan.total) != plan.total:
            log.debug("TLS broken: %s", self.engine.failure(session))       # which takes it out of OpenSSL's queue
            self.seal(connection, session, buffer, None, 0)
            return
        size = self.read_bio(self.engine.outgoing, buffer.pointer, SMALL_BUFFER)
        session.buffer, session.piece, session.sealed, session.unsent = buffer, plan.total, size, size
        connection.sends = SEALED
        self.ring.arm_send(SEALED | connection.slot, connection.generation, connection.slot, buffer.address, size)

    def on_plaintext(self, connection, session, data, flags):
        """What OpenSSL gave, perhaps nothing: then the client has said something about TLS itself."""
        if data:
            self.on_data(connection, data, flags)
        else:
            connection.receiving = connection.receiving and bool(flags & CQE_MORE)
        if session.at_end and connection.tls is session and connection.state is not CLOSING:
            self.on_last_data(connection)
        elif not data:
            self.go_on(connection)

    def on_last_data(self, connection):
        """The client will send no more: what it has asked is answered, then the connection ends.

        As at the end of a receive; but the receive, if one is in flight, goes on.
        """
        Worker.on_receive_end(self, connection, 0, CQE_MORE)

    def on_tls_error(self, connection, error):
        """The client has broken TLS: it is told how, if nothing else is being sent to it."""
        log.debug("TLS broken: %s", error)
        self.end(connection)

    # sending

    def send_piece(self, connection, plan):
        session = connection.tls
        if session is None or session.in_kernel:
            super().send_piece(connection, plan)
        elif plan.total <= LARGEST_PLAINTEXT and not connection.sent and self.at_hand(plan):
            self.seal(connection, session, self.small_buffer(), self.plaintext(plan), plan.total)
        else:
            self.load(connection, session, plan)

    def at_hand(self, plan):
        """Whether a small plan can be had without waiting for a disk."""
        return not plan.lazy or plan.plaintext is not None or not self.library.cold(plan.spans())

    def load(self, connection, session, plan):
        """Fill a buffer with the next piece of a plan: bytes of our own, then those of one span of the archive."""
        session.buffer = buffer = self.large_buffer()
        filled, skip = 0, connection.sent
        for address, length in plan.spans():
            if skip >= length:
                skip -= length
                continue
            size = min(length - skip, PIECE - filled)
            archive = self.library.file_at(address)
            if archive and size:
                session.piece, connection.sends = filled, LOAD
                self.ring.arm_pread(LOAD | connection.slot, connection.generation, archive.fd,
                                    buffer.address + filled, size, address - archive.address + skip)
                return
            linux.copy(buffer.address + filled, address + skip, size)
            filled, skip = filled + size, 0
        self.seal(connection, session, buffer, buffer.pointer, filled)

    def on_loaded(self, connection, result):
        """A piece is there, or as much of it as the file gave at once; where it gave nothing, it has been cut short."""
        session = connection.tls
        if result > 0 and connection.state is not CLOSING:
            self.seal(connection, session, session.buffer, session.buffer.pointer, session.piece + result)
        else:
            self.put_back(session)
            self.on_sent(connection, -errno.EFAULT)

    def seal(self, connection, session, buffer, source, size):
        """Encrypt `size` bytes at pointer `source` (None: they are lost) into `buffer`, and send that."""
        session.buffer, session.piece, connection.sends = buffer, size, SEALED
        try:
            session.sealed = self.engine.seal(session, source, size, buffer.pointer, buffer.size) if source else 0
        except TlsError as error:
            log.debug("TLS broken: %s", error)
            session.sealed = 0
        whole = session.sealed and connection.sent + size == connection.plan.total
        if whole and self.is_last(connection, connection.plan):
            session.sealed += self.engine.end_behind(session, buffer.address + session.sealed)
        session.unsent = session.sealed
        # Nothing sealed: the send fails (EFAULT), and its completion ends the connection like that of any other.
        self.ring.arm_send(SEALED | connection.slot, connection.generation, connection.slot,
                           buffer.address if session.sealed else 0, session.sealed or 1)

    def is_last(self, connection, plan):
        """As ever; and once close_notify has gone with a response, nothing can come behind it."""
        session = connection.tls
        return (super().is_last(connection, plan) and connection.state is RESPONSE
                or session is not None and session.ended and not session.in_kernel)

    def on_sealed(self, connection, result):
        session = connection.tls
        if result != session.unsent and result > 0 and connection.state is not CLOSING:
            session.unsent -= result
            self.ring.arm_send(SEALED | connection.slot, connection.generation, connection.slot,
                               session.buffer.address + session.sealed - session.unsent, session.unsent)
            return
        self.put_back(session)
        if result == session.unsent and session.piece == connection.plan.done and not connection.attention:
            connection.state = connection.state[SENT]
            connection.since = self.now
            self.account(connection, connection.plan, session.piece)
        else:
            self.on_sent(connection, session.piece if result == session.unsent else min(result, 0))

    def patience(self, connection):
        session = connection.tls
        if connection.state is RESPONSE and session is not None and not session.in_kernel:
            return SEND_GRACE + min(PIECE, connection.plan.total - connection.sent) // self.limits.min_rate
        return super().patience(connection)

    # memory

    def small_buffer(self):
        return self.small_buffers.pop() if self.small_buffers else Buffer(SMALL_BUFFER, self.small_buffers)

    def large_buffer(self):
        return self.large_buffers.pop() if self.large_buffers else Buffer(LARGE_BUFFER, self.large_buffers)

    def put_back(self, session):
        buffer, session.buffer = session.buffer, None
        if len(buffer.free) < FREE_BUFFERS:
            buffer.free.append(buffer)

    def plaintext(self, plan):
        """A pointer to all of a small plan in one piece, with the Date of now; None where the archive has lost it."""
        if plan.plaintext is None and not self.gather(plan):
            return None
        plaintext = plan.plaintext
        if plan.dated is not self.heads.date:
            linux.copy(plaintext.pointer, plaintext.head_address, plaintext.head_length)
            plan.dated = self.heads.date
        return plaintext.pointer

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
