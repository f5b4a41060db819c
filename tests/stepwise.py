"""Worlds that are looked at after each step, one completion handed to a worker: what must hold, and what was seen."""

import errno
import signal
import socket
from collections import Counter

from simulated import SENDS

import clock as clock_module
import linux
import plan as plan_module
import transport
from connection import (
    ACCEPT, ATTACH, BODY, CANCEL, CLOSE, CLOSING, CONTROL, DAMAGE, FLIGHT, FREE, GOODBYE, HEAD, IDLE, INTERIM, KEYS,
    LINGER, LOAD, LOG, PREFACE, RECV, RECV_HANDSHAKE, RECV_TLS, RESPONSE, SEND, SEND_TLS, SHUTDOWN, SIGNAL, SLOT,
    STATES, TICK,
)
TABLE = [(name, event) for name in STATES for event in name]
OPERATIONS = {RECV: "receive", SEND: "send", ACCEPT: "accept", SHUTDOWN: "shutdown", CANCEL: "cancel", CLOSE: "close",
              TICK: "tick", SIGNAL: "signal", LOG: "log", DAMAGE: "damage", RECV_TLS: "receive for OpenSSL",
              RECV_HANDSHAKE: "receive in the handshake", SEND_TLS: "send by OpenSSL", LOAD: "read", FLIGHT: "flight",
              KEYS: "keys", CONTROL: "record", GOODBYE: "goodbye", ATTACH: "attach"}
OF_SLOTS = [kind for kind in OPERATIONS if kind not in (ACCEPT, CANCEL, CLOSE, TICK, SIGNAL, LOG, DAMAGE)]
ELSEWHERE = "another connection", "it came, or went"
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGUSR2: "SIGUSR2",
           clock_module.END_NOW: "END_NOW", clock_module.LOOK_AGAIN: "LOOK_AGAIN"}
MOVING = RESPONSE, INTERIM, LINGER              # states in which each send begins the wait anew
COARSE = 3                                      # seconds that a limit may be late: ticks are whole ones
ENDS_WITHIN = 30                                # seconds for the operations of a connection to end, once told to
TAKEN: list = []        # rows of the table in connection.py that the present step has taken


class Stepwise:
    """Mixed into a World; what it comes to is kept in `seen`, a model.Seen."""

    def __init__(self, seed, clock, seen, **more):
        self.seen = seen
        self.visits = {}            # slot -> (what distinguishes the present wait, when it began)
        self.strays = self.damages = 0
        self.shut_for = 0           # ticks for which a listener has been left alone though there is room
        super().__init__(seed, clock, **more)
        worker = self.worker
        self.before = [FREE] * len(worker.connections.slots)
        self.take, worker.engine.completions = worker.engine.completions, self.hand_out
        self.turn_away, worker.acceptor.turn_away = worker.acceptor.turn_away, self.on_crowd
        self.victim, worker.acceptor.eviction.victim = worker.acceptor.eviction.victim, self.find_victim
        self.reclaim, worker.acceptor.make_room_for_one = worker.acceptor.make_room_for_one, self.on_reclaim
        self.reclaiming = False

    # steps

    def hand_out(self):
        """Completions one by one, with a look at everything between them."""
        kernel, found = self.kernel, list(self.take())
        kernel.handing.extend(kernel.unseen.popleft() for _ in found)
        kernel.cq_head += len(found)
        for completion in found:
            kernel.handing.popleft()
            if self.phase != "log":
                self.note_event(*completion)
            yield completion
            if self.phase != "log":
                self.note_moves()
                self.check_step()

    def note_event(self, tag, generation, result, flags):
        kind, slot = tag & ~SLOT, tag & SLOT
        TAKEN.clear()
        self.slot = None
        if kind in OF_SLOTS:
            self.slot = slot
            connection = self.worker.connections.slots[slot]
            if generation != connection.epoch:
                self.stale += 1
                self.slot = None
                self.event = OPERATIONS[kind], "of nobody"
                assert self.stale <= self.strays, f"a late {OPERATIONS[kind]}"
                return
        self.event = OPERATIONS[kind], self.outcome(kind, slot, result, flags)
        self.seen.steps += 1

    def outcome(self, kind, slot, result, flags):
        """In a word."""
        if result < 0:
            return errno.errorcode[-result]
        if kind == SIGNAL:
            return SIGNALS[self.worker.clock.signal_byte[0]]
        if kind in (RECV, RECV_HANDSHAKE, RECV_TLS, CONTROL) and not result:
            return "end"
        if kind in (SEND, SEND_TLS):
            connection = self.worker.connections.slots[slot]
            whole = (connection.sent + result >= connection.plan.total if kind == SEND else
                     result == connection.session.unsent)
            return "all" if whole else "part"
        return "last" if kind in (RECV, ACCEPT) and not flags & linux.CQE_MORE else "done"

    def note_moves(self):
        """What the handler has made of it: of the connection concerned, and of others."""
        seen, after = self.seen, [connection.state for connection in self.worker.connections.slots]
        for slot, (old, new) in enumerate(zip(self.before, after, strict=True)):
            if slot == self.slot or old is not new:
                seen.moves[(old, *(self.event if slot == self.slot or self.slot is None else ELSEWHERE), new)] += 1
                if slot == self.slot and not TAKEN and old is not new:      # written out in the loop
                    TAKEN.append(next((old, event) for event, next_one in old.items() if next_one is new))
        seen.table.update(TAKEN)
        self.before = after

    # what must hold after each step

    def check(self):
        """Each step has been looked at already."""
        self.check_closed()
        self.remember()

    def check_step(self):
        self.check_state()
        self.check_alone()
        self.check_plans()
        self.check_count()
        asleep = {tag for tag, _ in self.flying}.isdisjoint
        assert not any(map(asleep, ((TICK,), (SIGNAL,), (DAMAGE,)))), "nobody listens any more"
        for connection in self.worker.connections.slots:
            if connection.state is FREE:
                check_free(connection)
        if self.worker.acceptor.addresses:
            self.check_addresses(self.worker.acceptor.addresses)
        if self.event[0] == "tick":
            self.check_door()

    def check_door(self):
        """Somebody is let in as long as there is room, or one who could make some; two ticks may be of one second."""
        worker, most = self.worker, self.limits.max_connections
        room = worker.connections.live < most or worker.connections.live == most and any(
            connection.state is IDLE and connection.plan is not None for connection in worker.connections.slots)
        shut = worker.clock.stop_at is None and room and None in worker.acceptor.listeners.values()
        self.shut_for = self.shut_for + 1 if shut else 0
        assert self.shut_for <= 2, "nobody is let in"

    def check_alone(self):
        """No operation twice, none on what is closed: armed, in flight, or completed and not yet told of."""
        armed = self.entries
        users = Counter(operation.user for operation in self.kernel.operations)
        users.update(user for user, _, _, flags in self.unseen() if not flags & linux.CQE_MORE)
        users.update(tuple(entry.user_data) for entry in armed if not entry.flags & linux.LINK)
        twice = [user for user, count in users.items() if count > 1 and user[0] & ~SLOT in OF_SLOTS]
        assert not twice, f"twice: {twice}"
        closed = set()
        for entry in armed:
            assert entry.fd not in closed, f"armed behind the close of {entry.fd}"
            if entry.opcode == linux.OP_CLOSE:
                closed.add(entry.fd)

    def check_plans(self):
        """What is sent from a plan is of the plan that its connection keeps; and what nobody waits for is cancelled."""
        connections = self.worker.connections.slots
        cancels = {(entry.addr & 0xFFFFFFFF, entry.addr >> 32) for entry in self.entries
                   if entry.opcode == linux.OP_ASYNC_CANCEL}
        for operation in self.kernel.operations:
            kind, slot = operation.user[0] & ~SLOT, operation.user[0] & SLOT
            if kind not in OF_SLOTS:
                continue
            connection = connections[slot]
            if connection.state is CLOSING and kind != SHUTDOWN and operation.user not in cancels:
                # What is behind a wait for a disk goes out at once: there has been room before.
                soon = operation.user in self.kernel.too_late and not operation.waits_for_all
                assert operation.cancelled or soon, "never cancelled"
            if kind == SEND and operation.code in SENDS:
                assert is_of(operation, connection.plan), "a send of something else"

    def check_count(self):
        """Whoever has come is there, or has gone."""
        counts, closing = self.worker.counts, sum(entry.opcode == linux.OP_CLOSE for entry in self.entries)
        assert counts.accepted - self.worker.connections.live == self.kernel.counts["closed"] + closing

    def check_connection(self, connection, client):
        super().check_connection(connection, client)
        state = connection.state
        if state is LINGER:         # nothing is read any more but to be thrown away
            self.decide(client)
        elif state is not CLOSING:
            client.state, client.parked = state, connection in self.worker.acceptor.parked
        self.check_time(connection, state)

    def check_time(self, connection, state):
        """No state lasts longer than its limit, however many bytes trickle in."""
        slot, now = connection.slot, self.clock.now
        visit = connection.epoch, HEAD if state is BODY else state, state in MOVING and self.kernel.begun[slot]
        former, since = self.visits.get(slot, (None, now))
        if visit != former or connection in self.worker.acceptor.parked:
            since = now
        self.visits[slot] = visit, since
        assert now - since <= self.bound(connection, state) + COARSE, f"{now - since} seconds in {state}"

    def bound(self, connection, state):
        if state is CLOSING:
            return ENDS_WITHIN
        if state is LINGER:
            return clock_module.LINGER_SECONDS
        if state in MOVING:
            return clock_module.SEND_GRACE + max(plan_module.SEND_SIZE, transport.SEAL_SIZE) // self.limits.min_rate
        if state is IDLE and connection.plan is not None:
            return self.limits.keepalive_timeout
        return self.limits.header_timeout

    def decide(self, client):
        """Only who is being sent to can be slow."""
        state, parked = getattr(client, "state", None), getattr(client, "parked", False)
        if client.decided is None and state not in (RESPONSE, INTERIM):
            client.sent_at = self.clock.now
            if parked and self.signalled is not None:       # dropped, as if it still waited to be accepted
                client.excuse = client.excuse or "parked"
        super().decide(client)

    def check_addresses(self, addresses):
        """Each connection counts for the address of its client, and of none there are more than may be."""
        assert all(0 < held <= addresses.limit for held in addresses.held.values())
        counted = Counter(connection.address for connection in self.worker.connections.slots if connection.address)
        assert counted == addresses.held
        fresh = {self.kernel.passed if slot == self.kernel.passing else result
                 for user, slot, result, _ in self.unseen() if user[0] & ~SLOT == ACCEPT and result >= 0}
        for slot, client in self.kernel.sockets.items():
            connection = self.worker.connections.slots[slot]
            if slot not in fresh and connection.state not in (FREE, PREFACE, CLOSING):
                assert connection.address == network(self.trusted, client), "counted as somebody else"

    def on_crowd(self, connection):
        """Somebody is turned away."""
        client = self.kernel.sockets[connection.slot]
        addresses = self.worker.acceptor.addresses
        assert addresses.held[network(self.trusted, client)] == addresses.limit, "turned away though there is room"
        assert not connection.address and not client.received
        client.excuse = client.excuse or "crowded"
        self.kernel.counts["crowded"] += 1
        self.turn_away(connection)

    def on_reclaim(self):
        """Somebody is to make room."""
        self.reclaiming = True
        try:
            return self.reclaim()
        finally:
            self.reclaiming = False

    def find_victim(self, *now):
        """Who makes room has been answered, or owes something, or does not take what it is given."""
        connection = self.victim(*now)
        if self.reclaiming and connection is not None and connection.state is not IDLE:
            assert connection.state not in (FREE, CLOSING) and connection not in self.worker.acceptor.parked
            client = self.kernel.sockets[connection.slot]
            client.excuse = client.excuse or "reclaimed"
        return connection

    def at_end(self):
        super().at_end()
        seen = self.seen
        seen.schedules += 1
        seen.counts.update(self.kernel.counts)
        seen.counts.update({"strays": self.strays, "damage": self.damages})
        if not self.at_once and not self.worker.connections.live:
            for connection in self.worker.connections.slots:
                check_free(connection)
            assert not self.worker.acceptor.addresses or not self.worker.acceptor.addresses.held


def network(trusted, client):
    """As whom a connection of `client` counts; b"" for what a proxy does on its own account."""
    if trusted and client.who.startswith(b"10."):
        return b""
    return socket.inet_pton(socket.AF_INET6, client.who.decode())[:8] if b":" in client.who else client.who


def is_of(operation, plan):
    """Whether a send is of bytes of `plan`."""
    if operation.code == linux.OP_SENDMSG:
        return operation.address == plan.address
    return any(address <= operation.address and operation.address + operation.length <= address + length
               for address, length in plan.spans())


def check_free(connection):
    """Nothing is left of who was there."""
    assert connection.plan is connection.request is connection.body is connection.site is connection.session is None
    assert not (connection.pending or connection.head or connection.address or connection.sent)
    assert not (connection.receiving or connection.sending or connection.shutting)
