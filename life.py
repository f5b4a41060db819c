"""A worker's life rather than a connection's: the seconds that pass, signals, its counts and its access log."""

import signal
import struct
import time
from collections.abc import Callable

from linux import POLLIN
from door import Door
from plan import Site
from state import BODY, CLOSING, FREE, HANDSHAKE, HEAD, IDLE, INTERIM, LINGER, PREFACE, RESPONSE

TICK, SIGNAL, LOG, DAMAGE = 6 << 24, 7 << 24, 16 << 24, 17 << 24        # tags, as in door.py
AT_ONCE = signal.SIGRTMIN       # two of SIGTERM can become one on their way; and this one is delivered behind it
LOOK = signal.SIGRTMIN + 1
FRESH = 1                       # seconds that a new connection's first request is waited for at the end
LEAVE = 1                       # seconds that a retiring worker goes on to accept those who wait
LOG_GRACE = 5                   # seconds that the end waits for the access log to be written
NEVER = float("inf")            # a tick
RESPONSES = "responses_1xx", "responses_2xx", "responses_3xx", "responses_4xx", "responses_5xx"
# Which of Counts' gauges a connection in a state counts for.
GAUGE = {HANDSHAKE: "handshake", PREFACE: "reading", IDLE: "idle", HEAD: "reading", BODY: "reading", INTERIM: "sending",
         RESPONSE: "sending", LINGER: "closing", CLOSING: "closing"}


class Life(Door):
    """What goes on in a Worker by the clock and by signals.

    signals: the end of a pipe at which each signal's number comes out. damage: a descriptor that can be read when an
    archive has been written to, and what to call then; or None. publish: called once a second, when `counts`
    are up to date; None where nobody wants to know. What comes in as `more` is Door's.
    """

    # A Worker's own: all that answer; how long a connection may wait, and what happens then.
    sites: list[Site]
    patience: Callable[..., int]
    on_timeout: Callable[..., None]

    def __init__(self, signals, publish, damage=None, **more):
        super().__init__(**more)
        self.signals, self.publish, self.damage = signals, publish, damage
        self.signal_byte = bytearray(1)
        self.timespec = bytearray(16)

    def begin(self):
        self.ring.arm_read(SIGNAL, self.signals, self.signal_byte)
        if self.damage:
            self.ring.arm_poll(DAMAGE, 0, self.damage[0], POLLIN)
        self.arm_tick()
        self.watch_listeners()

    def arm_tick(self):
        """One completion at the next full second, when Date changes."""
        rest = 1_000_000_000 - time.time_ns() % 1_000_000_000
        struct.pack_into("=qq", self.timespec, 0, rest // 1_000_000_000, rest % 1_000_000_000)
        self.ring.arm_timeout(TICK, self.timespec)

    def on_tick(self):
        self.arm_tick()
        self.now, now = int(time.monotonic()), time.time()
        for site in self.sites:
            site.tick(now)
        if self.access_log is not None:
            self.access_log.tick(now)
        self.make_room()
        for connection in self.connections:
            if connection.state is not FREE and self.now - connection.since > self.patience(connection):
                self.counts.timed_out += connection.state is not CLOSING
                self.on_timeout(connection)
        self.watch_listeners()
        if self.publish:
            self.count()

    def count(self):
        """Bring up to date what of `counts` is not counted as it happens."""
        counts, ring = self.counts, self.ring
        for name in GAUGE.values():
            setattr(counts, name, 0)
        for connection in self.connections:
            if connection.state is not FREE:
                name = GAUGE[connection.state]
                setattr(counts, name, getattr(counts, name) + 1)
        counts.waiting = len(self.parked)
        for i, name in enumerate(RESPONSES, 1):
            setattr(counts, name, sum(site.tallies[i][0] for site in self.sites))
        counts.overflows = ring.overflows
        if self.access_log is not None:
            counts.log_lines, counts.log_dropped = self.access_log.written, self.access_log.dropped
        self.publish()

    def on_damage(self):
        self.damage[1]()
        self.ring.arm_poll(DAMAGE, 0, self.damage[0], POLLIN)

    def on_signal(self, number):
        """SIGTERM: stop. AT_ONCE: end. SIGUSR2: retire, others have taken over. SIGUSR1: serve on, but each response is
        its connection's last. LOOK: somebody has died who waited at the same listeners. Any may come several times."""
        self.ring.arm_read(SIGNAL, self.signals, self.signal_byte)
        if not number:                              # the read has failed, for want of memory
            return
        if number == LOOK:
            self.look_again()
            return
        for site in self.sites:
            site.close_all()
        for connection in self.connections:
            connection.attention = True         # or the loop would leave it idle after a response
        if number == signal.SIGUSR2:
            self.retire()
        elif number == AT_ONCE:
            self.stop_at = self.now
        elif number != signal.SIGUSR1 and not self.stopping:
            self.stop()

    def retire(self):
        """Accept no more. A request that is on its way on an idle connection is still answered."""
        self.limits.keepalive_timeout = min(self.limits.keepalive_timeout, self.limits.drain)
        if self.stop_at is None:
            self.stop_at, self.leave_by = NEVER, self.now + LEAVE
            self.leave_listeners()

    def stop(self):
        """Accept no more, close what is idle, and let what is in flight end."""
        if self.stop_at is None:
            self.leave_listeners()
        self.stop_at = self.now + self.limits.drain + 1
        self.stopping = True
        parked, self.parked = self.parked, []
        for connection in parked:
            self.end(connection)
        for connection in self.connections:
            if connection.state is IDLE and (connection.plan is not None or self.now - connection.since > FRESH):
                self.end(connection)

    def finish_log(self):
        """Write what is left of the access log; and count for the last time."""
        access_log, until = self.access_log, time.monotonic() + LOG_GRACE
        if access_log is not None:
            access_log.flush()
        while access_log is not None and access_log.busy and time.monotonic() < until:
            for tag, _, result, _ in self.ring.wait():
                if tag == LOG:
                    access_log.on_written(result)
                elif tag == TICK:
                    self.arm_tick()
                    access_log.tick(time.time())
        if self.publish:
            self.count()

    # the access log

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
        access_log.lines += (connection.who, access_log.date, line)
