"""Worlds in which everything goes wrong that can: more than in `machine.py`.

Entering fails, sends and receives fail in every way, receive buffers are short for a while, completions come that
belong to nobody, archives are written to, addresses have too many connections; and in a state of its choice each
schedule has clients go, or fall silent.
"""

import errno
import os
import random

import machine
from machine import Wanted, World, content, get
from securemachine import SecureWorld, Stranger
from simulated import RECEIVES
from stepwise import OF_SLOTS, STATES, Stepwise

import connection as connection_module
import linux
from connection import INTERIM, LOAD, RECV, RECV_HANDSHAKE, RECV_TLS, SEND, SHUTDOWN, SIGNAL, SLOT

PASSING = errno.ECANCELED, errno.EINTR, errno.ENOBUFS, errno.EAGAIN
FATAL = {True: (errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOMEM, errno.EHOSTUNREACH),
         False: (errno.EPIPE, errno.ECONNRESET, errno.EFAULT, errno.ECANCELED, errno.ENOMEM, errno.ENOBUFS,
                 errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EPERM)}
NOT_ACCEPTED = (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM, errno.ENOBUFS, errno.EPERM, errno.EINTR,
                errno.EPROTO, errno.ECANCELED)
NOT_ENTERED = errno.EAGAIN, errno.EBUSY, errno.EINTR
GOODBYE_TO_ALL = 400                            # seconds in which all connections end, though nobody goes
EXPECTING = get(b"/", b"Content-Length: 3\r\nExpect: 100-continue\r\n") + b"abc"


class Harsh(Stepwise):
    """Mixed into a World, as Stepwise is."""

    def __init__(self, seed, clock, seen, **more):
        self.chance = chance = random.Random(f"harsh {seed}")
        super().__init__(seed, clock, seen, **more)
        kernel = self.kernel
        self.trouble = chance.choice((0.0, 0.01, 0.05))
        self.storms, self.storm_until = chance.choice((0, 0, 0.01)), 0      # of receives without buffers
        self.aim = chance.choice(STATES[1:]), chance.choice(("reset", "end", "silence", "silence"))
        self.aims = chance.choice((0, 0.1, 0.5))
        self.regular = chance.random() < 0.4        # whether most ask for the same again and again
        self.stays = chance.random() < 0.3          # whether at the end nobody goes, or does anything
        kernel.fails = lambda: self.fault(0.02) and chance.choice(NOT_ENTERED)
        kernel.fails_to_close = lambda: self.fault(0.5) and chance.choice((errno.EIO, errno.EINTR))
        kernel.sleeps = lambda: chance.random() < 0.5
        kernel.ends_when_full = chance.random() < 0.5

    def fault(self, rate):
        """Whether something fails that need not."""
        return self.phase == "busy" and self.trouble and self.chance.random() < rate

    def more_options(self):
        self.limits.max_per_ip = self.chance.choice((None, 1, 2, 3))
        return super().more_options() | {"on_damage": self.on_damage}

    def addresses(self, number):
        """Some have one of IPv6, and neighbours."""
        client, proxy, speaks_for = super().addresses(number)
        network = self.chance.randrange(1, 9)
        if network < 4:
            client, speaks_for = (b"2001:db8:%d:%d::%x" % (i, network, number + 1) for i in (1, 2))
        return client, proxy, speaks_for

    def new_client(self, listener):
        client, chance = super().new_client(listener), self.chance
        if isinstance(client, Stranger):
            return client
        if chance.random() < (0.5 if self.aim[0] is INTERIM else 0.1):
            count = chance.choice((1, 3))
            client.plan([(EXPECTING, Wanted(200, content(b"/"), may_continue=True))] * count)
            client.stops = [i * len(EXPECTING) - 3 for i in range(1, count + 1)]     # the end of a head comes alone
        elif self.regular and chance.random() < 0.8:
            paths = chance.choices((b"/", b"/", b"/one", b"/one", b"/piece", b"/big"), k=chance.choice((1, 5, 30)))
            eager, reads, leaves = client.eager, client.reads, client.leaves
            client.plan([(get(path), Wanted(200, content(path))) for path in paths])
            client.patient, client.eager, client.reads, client.leaves = True, max(eager, 0.3), max(reads, 30), leaves
        return client

    def next_step(self):
        super().next_step()
        if self.phase == "busy":
            self.kernel.damaged |= self.chance.random() < 0.01
            if self.chance.random() < self.storms:
                self.storm_until = self.step + 20
            if self.fault(0.01):
                self.post_stray()

    def post_stray(self):
        """A completion for what was in a slot before: it cannot come, so it is to do nothing."""
        kernel, chance = self.kernel, self.chance
        kind, slot = chance.choice(self.strays_of), chance.randrange(kernel.slots)
        generation = self.worker.connections.slots[slot].epoch - chance.choice((1, 2)) & connection_module.EPOCHS
        result, flags = chance.choice((-errno.ECANCELED, 0, 5)), 0
        if kind in (RECV, RECV_HANDSHAKE, RECV_TLS) and kernel.has_buffer:
            result, flags = 5, linux.CQE_BUFFER | kernel.buffer(kernel.buffer_head)[2] << linux.CQE_BUFFER_SHIFT
            kernel.buffer_head += 1
        self.strays += 1
        kernel.post((kind | slot, generation), None, result, flags)

    def go_on(self, operation):
        kernel, code = self.kernel, operation.code
        if operation.held or operation.cancelled or self.phase != "busy":
            return super().go_on(operation)
        if code == linux.OP_RECV and self.step < self.storm_until and self.chance.random() < 0.5:
            return kernel.end(operation, errno.ENOBUFS)
        if code == linux.OP_ACCEPT and self.fault(self.trouble):
            return kernel.end(operation, self.chance.choice(NOT_ACCEPTED))
        if operation.user[0] == SIGNAL and self.fault(0.02):
            return kernel.end(operation, self.chance.choice((errno.ENOMEM, errno.EINTR)))
        reads = code in (linux.OP_POLL_ADD, linux.OP_READ)
        if reads and operation.user[0] & ~SLOT in (SEND, LOAD) and self.fault(0.02):
            error = self.chance.choice((errno.ENOMEM, errno.EIO, errno.EINTR))
            kernel.sockets[operation.user[0] & SLOT].excuse = errno.errorcode[error]
            return kernel.end(operation, error)
        return super().go_on(operation)

    def break_stream(self, operation):
        receives = operation.code in RECEIVES
        passing = self.chance.random() < 0.7 if receives else bool(operation.done)
        error = self.chance.choice(PASSING if receives and passing else FATAL[receives])
        if not passing:
            self.kernel.sockets[operation.slot].excuse = errno.errorcode[error]
        return self.kernel.end(operation, error)

    def strike(self, client):
        """The connection is in the state that this schedule is after."""
        if self.aim[1] == "reset":
            client.vanish()
        elif self.aim[1] == "end":
            client.eof = True
        else:
            silence(client)

    def all_leave(self):
        if not self.stays:
            super().all_leave()
            return
        self.phase, self.deadline = "leaving", self.clock.now + GOODBYE_TO_ALL
        for client in self.present():
            silence(client)

    def check_connection(self, connection, client):
        super().check_connection(connection, client)
        if connection.state is self.aim[0] and self.phase == "busy" and self.chance.random() < self.aims:
            self.strike(client)

    def on_damage(self):
        assert self.kernel.damaged
        self.kernel.damaged = False
        self.damages += 1


def silence(client):
    """It neither reads nor sends any more, and does not go."""
    client.eager, client.reads = -1, 0


class HarshWorld(Harsh, World):
    strays_of = RECV, SEND, SHUTDOWN


class HarshSecureWorld(Harsh, SecureWorld):
    """OpenSSL fails, too, and the archive is cut short for a while; clients send fatal alerts."""

    strays_of = OF_SLOTS

    def __init__(self, seed, clock, seen, **more):
        self.whole_again = 0        # the step in which the archive is
        super().__init__(seed, clock, seen, **more)
        self.cuts, self.ssl_fails = self.chance.choice((0, 0, 0.01)), self.chance.choice((0, 0, 0.1))
        self.seal, self.engine.seal = self.engine.seal, self.seal_or_not
        self.write, self.worker.userspace.write_ssl = self.worker.userspace.write_ssl, self.write_or_not

    def new_client(self, listener):
        client = super().new_client(listener)
        if getattr(client, "by_hand", False) and self.chance.random() < 0.3:
            client.leaves = "alert"
        return client

    def next_step(self):
        super().next_step()
        archive = self.worker.archive
        if self.whole_again:
            self.excuse_all()
        if self.step == self.whole_again or self.phase != "busy" and self.whole_again:
            os.pwrite(archive.fd, machine.CONTENT, 0)
            self.whole_again = 0
        elif self.phase == "busy" and not self.whole_again and self.chance.random() < self.cuts:
            os.ftruncate(archive.fd, self.chance.choice((0, 300, 3000)))
            self.whole_again = self.step + 10
            self.kernel.counts["archive cut short"] += 1
            self.excuse_all()

    def excuse_all(self):
        for client in self.present():
            client.excuse = client.excuse or "archive cut short"

    def seal_or_not(self, session, *rest):
        if self.fails_for(session.ssl):
            self.write(session.ssl, None, -1)
            raise self.engine.failure(session)
        return self.seal(session, *rest)

    def write_or_not(self, ssl, source, size):
        """SSL_write with a negative size fails as with any other reason: there is an error in the queue."""
        return self.write(ssl, source, -1 if self.fails_for(ssl) else size)

    def fails_for(self, ssl):
        """Whether OpenSSL fails; then the client of `ssl` has an excuse."""
        if self.phase != "busy" or self.chance.random() >= self.ssl_fails:
            return False
        [slot] = [connection.slot for connection in self.worker.connections.slots
                  if connection.session is not None and connection.session.ssl is ssl]
        self.kernel.sockets[slot].excuse = "OpenSSL failed"
        self.kernel.counts["OpenSSL failed"] += 1
        return True
