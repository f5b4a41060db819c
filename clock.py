"""What goes on in a worker by the clock and by signals: the second's tick, limits in time, counts, and the end."""

import collections
import logging
import os
import signal
import struct
import time

from connection import (
    BODY, CLOSING, DAMAGE, FREE, HANDSHAKE, HEAD, IDLE, INTERIM, LINGER, LOG, PREFACE, RESPONSE, SEND_GRACE, SIGNAL,
    TICK, Connections,
)
from linux import POLLIN

log = logging.getLogger("tarweb")

END_NOW = signal.SIGRTMIN       # two of SIGTERM can become one on their way; and this one is delivered behind it
LOOK_AGAIN = signal.SIGRTMIN + 1
NEW_LOG = signal.SIGRTMIN + 2
SIGNALS = signal.SIGTERM, END_NOW, LOOK_AGAIN, NEW_LOG, signal.SIGUSR1, signal.SIGUSR2       # see Clock.on_signal
IGNORED = signal.SIGINT, signal.SIGQUIT, signal.SIGHUP          # a terminal's are for the parent alone
FRESH = 1                       # seconds that a new connection's first request is waited for at the end
LINGER_SECONDS = 10             # how long a client that may still be sending is listened to after its last response
CLOSED_WITHIN = 10              # seconds that operations which were cancelled may take to end before that is an error
RETIRING = 1                    # seconds that a retiring worker goes on to accept those who wait
LOG_GRACE = 5                   # seconds that the end waits for the access log to be written
NEVER = float("inf")            # a tick
RESPONSES = "responses_1xx", "responses_2xx", "responses_3xx", "responses_4xx", "responses_5xx"
# Which of Counts' gauges a connection in a state counts for.
GAUGE = {HANDSHAKE: "handshake", PREFACE: "reading", IDLE: "idle", HEAD: "reading", BODY: "reading", INTERIM: "sending",
         RESPONSE: "sending", LINGER: "closing", CLOSING: "closing"}


# What a worker counts up, and what it has at the moment.
COUNTERS = (
    "responses_1xx", "responses_2xx", "responses_3xx", "responses_4xx", "responses_5xx", "bytes_sent",
    "accepted", "accept_errors", "passed", "proxy_refused", "memo_hits", "memo_misses", "reclaimed", "over_limit",
    "timed_out",
    "kernel_full", "kernel_resumed", "userspace_full", "userspace_resumed", "handshakes_failed", "truncated",
    "log_lines", "log_dropped", "no_buffers", "overflows", "cold", "faults",
)
GAUGES = ("handshake", "idle", "reading", "sending", "closing", "waiting", "stuck")
NUMBERS = COUNTERS + GAUGES


class Counts:
    """What one worker counts: an attribute for each of NUMBERS."""

    __slots__ = NUMBERS

    def __init__(self):
        for name in NUMBERS:
            setattr(self, name, 0)


class Clock:
    """A worker's seconds and signals. It serves until `stop_at` (a tick), once that is set.

    sites: all that answer. every_second: functions, called at each tick with the time since the epoch in seconds.
    signals: the end of a pipe at which each signal's number comes out. damage: a descriptor that can be read when an
    archive has been written to, and what to call then; or None. publish: called once a second, when counts are up to
    date; None where nobody wants to know.
    """

    def __init__(self, connections: Connections, acceptor, sites, signals, access_log=None, publish=None, damage=None):
        self.connections, self.acceptor, self.sites, self.access_log = connections, acceptor, sites, access_log
        self.engine, self.counts, self.limits = connections.engine, connections.counts, connections.limits
        self.signals, self.publish, self.damage = signals, publish, damage
        self.signal_byte, self.timespec = bytearray(1), bytearray(16)
        self.stop_at: float | None = None
        self.stuck: set[tuple[int, int]] = set()
        self.every_second = [site.tick for site in sites]
        if access_log is not None:
            self.every_second.append(access_log.tick)

    def handlers(self):
        return {TICK: self.on_tick, SIGNAL: self.on_signal, DAMAGE: self.on_damage,
                LOG: lambda _, result, __: self.access_log.on_written(result)}

    def begin(self):
        self.engine.arm_read(SIGNAL, self.signals, self.signal_byte)
        if self.damage:
            self.engine.arm_poll(DAMAGE, 0, self.damage[0], POLLIN)
        self.arm_tick()
        self.acceptor.watch_listeners()

    # seconds

    def arm_tick(self):
        """One completion at the next full second, when Date changes."""
        rest = 1_000_000_000 - time.time_ns() % 1_000_000_000
        struct.pack_into("=qq", self.timespec, 0, rest // 1_000_000_000, rest % 1_000_000_000)
        self.engine.arm_timeout(TICK, self.timespec)

    def on_tick(self, *_):
        self.arm_tick()
        tick = self.connections.tick = int(time.monotonic())
        wall = time.time()
        for function in self.every_second:
            function(wall)
        self.acceptor.make_room()
        stuck = set()
        for connection in self.connections.slots:
            if connection.state is not FREE and tick - connection.since > self.patience(connection):
                if connection.state is CLOSING:
                    stuck.add((connection.slot, connection.epoch))
                else:
                    self.counts.timed_out += 1
                    self.on_timeout(connection)
        self.report_stuck(stuck)
        self.acceptor.watch_listeners()
        if self.publish:
            self.count()

    def patience(self, connection):
        """How many seconds the present wait of a connection may take."""
        state = connection.state
        if connection.is_answered:
            return self.limits.keepalive_timeout
        if connection.is_sending:
            size = min(connection.transport.send_size, connection.plan.total - connection.sent)
            return SEND_GRACE + size // self.limits.min_rate
        if self.connections.stopping and state in (IDLE, PREFACE):
            return FRESH
        return CLOSED_WITHIN if state is CLOSING else LINGER_SECONDS if state is LINGER else self.limits.header_timeout

    def on_timeout(self, connection):
        if connection.state is BODY or connection.state is HEAD:
            connection.protocol.on_timeout(connection)
            return
        if connection.state is HANDSHAKE:
            connection.transport.farewell.count_failure("it took too long")
        self.connections.end(connection)

    def report_stuck(self, stuck):
        """Connections (slot, epoch) that cannot be closed, since an operation on them does not end although it was
        cancelled: the kernel waits for a disk, perhaps, that does not answer. Their slots are taken until it does."""
        if stuck - self.stuck:
            log.error("%d connections cannot be closed: the kernel does not end what it does for them, such as reading "
                      "the archive; look at the disk it is on", len(stuck))
        self.stuck, self.counts.stuck = stuck, len(stuck)

    def count(self):
        """Bring up to date what of the counts is not counted as it happens, and publish them."""
        counts = self.counts
        states = collections.Counter(GAUGE[connection.state] for connection in self.connections.slots
                                     if connection.state is not FREE)
        for name in GAUGE.values():
            setattr(counts, name, states[name])
        counts.waiting = len(self.acceptor.parked)
        for i, name in enumerate(RESPONSES, 1):
            setattr(counts, name, sum(site.tallies[i][0] for site in self.sites))
        counts.overflows = self.engine.overflows
        if self.access_log is not None:
            counts.log_lines, counts.log_dropped = self.access_log.written, self.access_log.dropped
        self.publish()

    # what comes by itself

    def on_damage(self, *_):
        self.damage[1]()
        self.engine.arm_poll(DAMAGE, 0, self.damage[0], POLLIN)

    def on_signal(self, _, result, __):
        """SIGTERM: stop. END_NOW: end. SIGUSR2: retire, others have taken over. SIGUSR1: serve on, but each response is
        its connection's last. LOOK_AGAIN: a worker has died that waited at the same listeners. NEW_LOG: the access
        log has been opened anew. Any may come several times."""
        number = self.signal_byte[0]
        self.engine.arm_read(SIGNAL, self.signals, self.signal_byte)
        if result <= 0:                             # the read has failed, for want of memory
            return
        if number == LOOK_AGAIN:
            self.acceptor.look_again()
            return
        if number == NEW_LOG:
            if self.access_log is not None:
                self.access_log.take_file()
            return
        for site in self.sites:
            site.close_all()
        for connection in self.connections.slots:
            connection.attention = True         # or the loop would leave it idle after a response
        if number == signal.SIGUSR2:
            self.retire()
        elif number == END_NOW:
            self.stop_at, self.acceptor.accepting = self.connections.tick, False
        elif number != signal.SIGUSR1 and not self.connections.stopping:
            self.stop()

    def retire(self):
        """Accept no more. A request that is on its way on an idle connection is still answered."""
        self.limits.keepalive_timeout = min(self.limits.keepalive_timeout, self.limits.drain)
        if self.stop_at is None:
            self.stop_at = NEVER
            self.acceptor.leave_listeners(self.connections.tick + RETIRING)

    def stop(self):
        """Accept no more, close what is idle, and let what is in flight end."""
        connections = self.connections
        if self.stop_at is None:
            self.acceptor.leave_listeners()
        self.stop_at = connections.tick + self.limits.drain + 1
        connections.stopping = True
        self.acceptor.end_parked()
        for connection in connections.slots:
            if connection.is_answered or connection.state is IDLE and connections.tick - connection.since > FRESH:
                connections.end(connection)

    def finish(self):
        """Write what is left of the access log; and count for the last time."""
        access_log, until = self.access_log, time.monotonic() + LOG_GRACE
        if access_log is not None:
            access_log.flush()
        while access_log is not None and access_log.busy and time.monotonic() < until:
            for tag, _, result, _ in self.engine.wait():
                if tag == LOG:
                    access_log.on_written(result)
                elif tag == TICK:
                    self.arm_tick()
                    access_log.tick(time.time())
        if self.publish:
            self.count()


def signal_pipe():
    """The end of a pipe at which the number of each signal comes out: a read of it is one more operation."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    return read_end
