"""The model check in small: some schedules of `model.py`, and faults planted in the worker for it to find.

What millions of steps have come to is in MODEL.md.
"""

import errno

import pytest
from model import Model
from tlsmemory import TestEngine

import acceptor
import clock
import transport
import uring
import worker
from acceptor import Acceptor
from clock import Clock
from connection import HEAD, LINGER, SEND, SHUTDOWN, SLOT, Connections
from plan import RequestMemo
from worker import Http1, Plain, Worker

STEPS = 24_000          # enough for every row of the table and every kind of trouble
ENOUGH = 200            # schedules in which a planted fault has to show
TROUBLE = ("overflow", "EAGAIN on entering", "EBUSY on entering", "EINTR on entering", "EIO on closing", "strays",
           "damage", "crowded", "cancel missed", "no buffers", "ENOBUFS", "short", "accept_errors", "reclaimed")


@pytest.fixture(scope="module")
def credentials(pairs):
    return TestEngine([(pairs["ed25519"].cert, pairs["ed25519"].key)])


@pytest.fixture
def model(monkeypatch, credentials):
    return Model(monkeypatch, credentials)


@pytest.mark.timeout(600)
def test_p13_p12_p11_p10_whatever_comes_in_whatever_order(model):
    """No slot, buffer or plan lost or used twice, no response mixed, each connection ends: Stepwise.check_step."""
    model.run(STEPS, seed=20_000)
    assert not model.seen.unreached()
    assert not [what for what in TROUBLE if not model.seen.counts[what]]


# --- planted faults

FAULTS = []


def fault(plant):
    """A function that plants a fault into the modules of the server."""
    FAULTS.append(pytest.param(plant, id=plant.__name__.replace("_", " ")))
    return plant


def after(original, change):
    """A method that does what it did, and then `change(self, *arguments)`."""
    def method(self, *arguments, **named):
        result = original(self, *arguments, **named)
        change(self, *arguments)
        return result
    return method


@fault
def a_slot_closed_during_a_shutdown(patch):
    def free_if_ended(self, connection):
        connection.shutting = False
        original(self, connection)

    original = Connections.free_if_ended
    patch(Connections, "free_if_ended", free_if_ended)


@fault
def a_receive_never_cancelled(patch):
    patch(Connections, "cancel_receive", lambda self, connection: None)


@fault
def a_send_never_cancelled(patch):
    def arm_cancel(self, tag, target, epoch):
        if target & ~SLOT != SEND:
            original(self, tag, target, epoch)

    original = uring.Ring.arm_cancel
    patch(uring.Ring, "arm_cancel", arm_cancel)


@fault
def a_buffer_lost_with_a_late_completion(patch):
    patch(Worker, "on_stale", lambda self, flags: setattr(self, "stale", self.stale + 1))


@fault
def a_late_completion_acted_on(patch):
    def dispatch(self, operation, slot, epoch, result, flags):
        if operation == SHUTDOWN:
            epoch = self.connections.slots[slot].epoch
        original(self, operation, slot, epoch, result, flags)

    original = Worker.dispatch
    patch(Worker, "dispatch", dispatch)


@fault
def a_second_send_at_once(patch):
    patch(Plain, "send", after(Plain.send, lambda self, connection, plan: self.engine.arm_sendmsg(
        SEND | connection.slot, connection.epoch, connection.slot, plan.address)))


@fault
def a_plan_let_go_while_it_is_sent(patch):
    def end(self, connection, **more):
        connection.plan = connection.plan and connection.site.refuse(404, "")
        original(self, connection, **more)

    original = Connections.end
    patch(Connections, "end", end)


@fault
def a_response_for_another_request(patch):
    former = []

    def remember(self, request, plan):
        former.append(plan)
        original(self, request, former[-2:][0])

    original = RequestMemo.remember
    patch(RequestMemo, "remember", remember)


@fault
def a_request_lost_behind_another(patch):
    def on_sent(self, connection, plan):
        connection.pending = b""
        original(self, connection, plan)

    original = Http1.on_sent
    patch(Http1, "on_sent", on_sent)


@fault
def a_short_send_taken_for_a_byte_more(patch):
    def on_sent(self, connection, result):
        original(self, connection, result + (0 < result < connection.plan.total - connection.sent - 1))

    original = Plain.on_sent
    patch(Plain, "on_sent", on_sent)


@fault
def no_end_to_waiting_for_a_head(patch):
    original = Clock.patience
    patch(Clock, "patience", lambda self, connection: (
        clock.NEVER if connection.state is HEAD else original(self, connection)))


@fault
def no_end_to_lingering(patch):
    original = Clock.patience
    patch(Clock, "patience", lambda self, connection: (
        clock.NEVER if connection.state is LINGER else original(self, connection)))


@fault
def a_trickle_counted_as_progress(patch):
    patch(Http1, "on_data", after(Http1.on_data, lambda self, connection, data: (
        connection.state is HEAD and setattr(connection, "since", self.connections.tick))))


@fault
def no_buffers_taken_for_the_end(patch):
    patch(worker, "INTERRUPTED", (errno.ECANCELED, errno.EINTR, errno.EAGAIN))


@fault
def a_failed_accept_never_tried_again(patch):
    def watch_listeners(self):
        if not self.counts.accept_errors:
            original(self)

    original = Acceptor.watch_listeners
    patch(Acceptor, "watch_listeners", watch_listeners)


@fault
def damage_looked_for_once(patch):
    patch(Clock, "on_damage", lambda self, *_: self.damage[1]())


@fault
def an_address_with_one_too_many(patch):
    def admit(self, connection):
        self.limit += 1
        try:
            return original(self, connection)
        finally:
            self.limit -= 1

    original = acceptor.Addresses.admit
    patch(acceptor.Addresses, "admit", admit)


@fault
def an_address_never_released(patch):
    patch(acceptor.Addresses, "release", lambda self, connection: None)


@fault
def who_waits_for_room_forgotten(patch):
    def on_freed(self, connection):
        del self.parked[:1]
        original(self, connection)

    original = Acceptor.on_freed
    patch(Acceptor, "on_freed", on_freed)


@fault
def no_entering_after_a_full_queue(patch):
    original = uring.permitted
    patch(uring, "ignore_passing", lambda result: (
        None if -result in (errno.EINTR, errno.EAGAIN) else original(result, "io_uring_enter")))


@fault
def a_buffer_for_openssl_given_back_twice(patch):
    patch(transport.UserspaceTls, "put_back", after(
        transport.UserspaceTls.put_back, lambda self, session: self.small_buffers.extend(self.small_buffers[-1:])))


@pytest.mark.parametrize("plant", FAULTS)
def test_p13_the_model_finds(model, monkeypatch, plant, capfd):
    plant(monkeypatch.setattr)
    with pytest.raises((AssertionError, OSError)):
        model.run_schedules(ENOUGH)
    capfd.readouterr()
