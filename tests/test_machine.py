"""The connection state machine on a simulated kernel: random schedules, and the cases that needed one of their own.

TARWEB_SEEDS=5000 runs more random schedules than usual; TARWEB_SEED=17 runs that one alone.
"""

import errno
import os
import signal
from collections import Counter

import pytest
from machine import (
    REACHED, REACHED_IN_THE_KERNEL, World, connect, content, end_at_once, get, make_clock, make_small, perform, play,
    seconds, settle, statuses, stop,
)
from simulated import SENDS

import acceptor
import clock as clock_module
import connection as connection_module
import linux
import worker as worker_module
from connection import HEAD, IDLE, PREFACE, RESPONSE, Limits

SEEDS = int(os.environ.get("TARWEB_SEEDS", "250"))
SCHEDULES = [int(os.environ["TARWEB_SEED"])] if "TARWEB_SEED" in os.environ else range(SEEDS)


@pytest.fixture
def small(monkeypatch):
    return make_small(monkeypatch)


# --- any schedule

@pytest.mark.parametrize("block", range(0, len(SCHEDULES), 50))
def test_any_schedule(small, block):
    play(SCHEDULES[block:block + 50], small)


def test_any_schedule_with_two_listeners(small):
    play(SCHEDULES[:len(SCHEDULES) // 4 + 1], small, listeners=2)


def test_schedules_reach_what_they_are_for(small):
    """Else all of the above would prove little."""
    seen = Counter()
    for seed in range(120):
        small.now = 1000.0
        world = World(seed, small)
        world.run()
        seen += world.kernel.counts
        seen[world.worker.engine.__class__.__name__] += 1
    states = [*((number, state) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
                for state in (IDLE, HEAD, RESPONSE)), (signal.SIGTERM, PREFACE), (clock_module.END_NOW, RESPONSE),
              (clock_module.LOOK_AGAIN, RESPONSE)]
    for what in (*REACHED, *REACHED_IN_THE_KERNEL, "Ring", "PolledRing",
                 *(f"{state} at signal {number}" for number, state in states),
                 *(f"answered {status}" for status in (100, 200, 204, 206, 301, 400, 404, 405, 408, 414, 431))):
        assert seen[what], (what, seen)


# --- schedules with something to say

@pytest.fixture
def clock(monkeypatch):
    """Limits are as they are."""
    return make_clock(monkeypatch)


def test_request_response_and_goodbye(clock):
    def script(kernel, worker):
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        assert client.received.endswith(b"\r\n\r\n" + content(b"/"))
        assert worker.connections.live == 1
        client.eof = True
        yield from settle(kernel)
        assert client.closed
        assert worker.connections.live == 0

    assert not perform(script, clock)


def test_signal_closes_what_is_idle_and_ends_the_loop_at_once(clock):
    def script(kernel, worker):
        connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from stop(kernel)

    assert perform(script, clock)
    assert clock.now == 1000


@pytest.mark.parametrize("asks", (False, True))
def test_first_request_is_on_its_way_at_the_signal(clock, asks):
    """No client repeats one on a connection that it has just made. It is waited for, not long."""
    def script(kernel, worker):
        silent = connect(kernel)
        yield from settle(kernel)
        yield from seconds(kernel, clock_module.FRESH + 1)
        fresh = connect(kernel)
        yield from settle(kernel)
        yield from stop(kernel)
        assert silent.closed
        assert not fresh.closed
        if asks:
            fresh.incoming.append(get(b"/"))
            yield from settle(kernel)
            assert statuses(fresh) == [200]
        yield from seconds(kernel, clock_module.FRESH + 1)

    assert perform(script, clock)
    assert clock.now <= 1000 + 2 * clock_module.FRESH + (1 if asks else 2)


@pytest.mark.parametrize("times", (1, 5))
def test_signal_during_a_response_ends_the_loop_once_it_is_sent(clock, times):
    """`times` 5: the request is answered from memory by then."""
    def script(kernel, worker):
        client = connect(kernel)
        yield from settle(kernel)
        for _ in range(times - 1):
            client.incoming.append(get(b"/"))
            yield from settle(kernel)
        client.room = 10
        client.incoming.append(get(b"/"))
        yield from settle(kernel)
        yield from stop(kernel)
        assert not client.closed
        client.room = 1000
        yield from settle(kernel)
        assert statuses(client) == [200] * times

    assert perform(script, clock), "the connection stays open, idle, for all of the time to drain"


@pytest.mark.parametrize("times", (0, 1, 2))
def test_signal_to_end_at_once(clock, times):
    """And none but that: two processes may have sent the other one."""
    def script(kernel, worker):
        connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        for _ in range(times):
            yield from stop(kernel)
        assert worker.connections.live == 1
        yield from end_at_once(kernel)

    assert perform(script, clock)
    assert clock.now == 1000


def test_drain_has_an_end(clock):
    def script(kernel, worker):
        connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        yield from stop(kernel)
        yield from seconds(kernel, 4)
        assert worker.connections.live == 1
        yield from seconds(kernel, 3)

    assert perform(script, clock, Limits(drain=5))


def test_keepalive_time_runs_from_the_end_of_the_response(clock):
    """P: a connection may be idle for `keepalive_timeout`. A slow reader's must not be over when it has read."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        yield from seconds(kernel, 6)
        client.room = 10_000
        yield from settle(kernel)
        assert statuses(client) == [200]
        yield from seconds(kernel, 3)
        assert not client.closed, "closed after 3 seconds of 5"
        yield from seconds(kernel, 4)
        assert client.closed

    perform(script, clock, Limits(keepalive_timeout=5))


@pytest.mark.parametrize("error", (errno.EPERM, errno.EPIPE, errno.ECONNRESET, errno.EFAULT))
@pytest.mark.parametrize("fields", (b"", b"Connection: close\r\n"))
def test_failed_send_ends_the_connection(clock, error, fields):
    """EPERM: what a firewall rule makes of it, and -1 as a result."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/", fields), room=0)
        yield from settle(kernel)
        [send] = kernel.in_flight(client.slot, SENDS)
        kernel.end(send, error)
        yield from settle(kernel)
        assert client.closed, worker.connections.slots[client.slot].state

    perform(script, clock)


def test_parked_connections_are_served_when_there_is_room(clock):
    """With as many listeners, several may be parked at a time; each has its turn."""
    def script(kernel, worker):
        busy = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)           # it is idle now, so that one more may be let in by each listener
        busy.room = 0
        busy.incoming.append(get(b"/big"))      # but it comes to life again at the same moment
        parked = [connect(kernel, get(b"/"), listener=i) for i in (0, 1)]
        yield from settle(kernel)
        assert len(worker.acceptor.parked) == 2
        busy.reset = True
        for client in parked:
            yield from seconds(kernel, 3)
            assert statuses(client) == [200], (worker.connections.live, worker.acceptor.parked)
            client.eof = True
            yield from settle(kernel)
            assert client.closed

    perform(script, clock, Limits(max_connections=1), listeners=2)


def test_full_table_takes_the_longest_idle(clock):
    def script(kernel, worker):
        first, second = connect(kernel, get(b"/")), connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        first.incoming.append(get(b"/one"))
        yield from settle(kernel)
        third = connect(kernel, get(b"/"))
        yield from seconds(kernel, 1)
        assert statuses(third) == [200]
        assert second.closed
        assert not first.closed

    perform(script, clock, Limits(max_connections=2))


def test_full_table_of_busy_connections_makes_others_wait(clock):
    def script(kernel, worker):
        busy = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        waiting = connect(kernel, get(b"/"))
        yield from seconds(kernel, 2)
        assert worker.connections.live == 1
        assert not waiting.received
        busy.room = 10_000
        busy.eof = True
        yield from settle(kernel)
        assert statuses(waiting) == [200]

    perform(script, clock, Limits(max_connections=1))


def test_accept_goes_on_after_the_system_was_out_of_files(clock):
    def script(kernel, worker):
        yield from settle(kernel)
        [accept] = kernel.in_flight(*worker.acceptor.listeners, (linux.OP_ACCEPT,))
        kernel.end(accept, errno.ENFILE)
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        assert statuses(client) == [200]

    perform(script, clock)


def test_no_buffers_is_no_loss(clock):
    def script(kernel, worker):
        request = get(b"/", b"X: " + b"a" * 500 + b"\r\n")
        clients = [connect(kernel, request) for _ in range(3)]
        yield from settle(kernel)
        assert kernel.counts["no buffers"]
        assert [statuses(client) for client in clients] == [[200]] * 3

    perform(script, clock, buffers=2, buffer_size=64)


def test_half_closed_client_gets_all_it_asked_for(clock):
    def script(kernel, worker):
        client = connect(kernel, get(b"/") * 10 + b"GET /")
        client.eof = True
        yield from settle(kernel)
        assert statuses(client) == [200] * 10
        assert client.closed

    perform(script, clock)


def test_pipelining_without_reading_is_bounded(clock):
    def script(kernel, worker):
        client = connect(kernel, room=0)
        for _ in range(200):
            client.incoming.append(get(b"/") * 20)
        yield from settle(kernel)
        pending = len(worker.connections.slots[client.slot].pending)
        assert worker_module.MAX_PENDING < pending < worker_module.MAX_PENDING + 2 * 8 * 4096
        client.room = 10 ** 7
        yield from settle(kernel)
        assert statuses(client) == [200] * 4000

    perform(script, clock, buffers=8)


def test_body_in_flight_while_the_refusal_is_sent(clock):
    """The client goes on sending: it is listened to until it stops, so that no reset overtakes the answer."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/", b"Content-Length: 1000000\r\n"))
        yield from settle(kernel)
        assert client.received.endswith(content(b"/"))
        assert client.shut
        assert not client.closed
        client.incoming.extend([bytes(5000)] * 20)
        yield from settle(kernel)
        assert not client.incoming
        client.eof = True
        yield from settle(kernel)
        assert client.closed

    perform(script, clock)


def test_reader_who_stops_is_cut_off(clock):
    def script(kernel, worker):
        client = connect(kernel, get(b"/big"), room=100)
        yield from settle(kernel)
        yield from seconds(kernel, connection_module.SEND_GRACE)
        assert not client.closed
        yield from seconds(kernel, 5)
        assert client.closed
        assert worker.connections.live == 0

    perform(script, clock)


def test_silence_is_cut_off(clock):
    """Before a request, and after one."""
    def script(kernel, worker):
        silent, idle = connect(kernel), connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 3)
        assert not silent.closed
        yield from seconds(kernel, 2)
        assert silent.closed
        assert not silent.received
        assert not idle.closed
        yield from seconds(kernel, 4)
        assert idle.closed

    perform(script, clock, Limits(header_timeout=3, keepalive_timeout=6))


@pytest.mark.parametrize("start", (b"G", b"\r\n", get(b"/")[:-1], get(b"/", b"Content-Length: 5\r\n") + b"1234"))
def test_half_a_request_is_answered_when_its_time_is_over(clock, start):
    def script(kernel, worker):
        client = connect(kernel, start)
        yield from settle(kernel)
        yield from seconds(kernel, 3)
        assert not client.received
        yield from seconds(kernel, 2)
        assert statuses(client) == [408]
        yield from seconds(kernel, clock_module.LINGER_SECONDS + 2)
        assert client.closed

    perform(script, clock, Limits(header_timeout=3))


def test_accepts_are_single_near_the_limit(clock, monkeypatch):
    """A multishot accept that is not cancelled in time must not take more than there is room for."""
    monkeypatch.setattr(acceptor, "RESERVE", 3)

    def script(kernel, worker):
        armed = []
        for _ in range(7):
            yield from settle(kernel)
            accepts = kernel.in_flight(*worker.acceptor.listeners, (linux.OP_ACCEPT,))
            armed.append([accept.multishot for accept in accepts])
            connect(kernel)
        assert armed[:3] == [[True]] * 3
        assert armed[4:] == [[False]] * 2 + [[]]        # at 3, when just RESERVE are left, either will do

    perform(script, clock, Limits(max_connections=6))


def test_parked_connection_is_dropped_at_the_signal(clock):
    def script(kernel, worker):
        busy = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        busy.room = 0
        busy.incoming.append(get(b"/big"))
        parked = connect(kernel, get(b"/"))
        yield from settle(kernel)
        assert len(worker.acceptor.parked) == 1
        yield from stop(kernel)
        assert parked.closed
        assert not parked.received
        busy.reset = True
        yield from settle(kernel)

    assert perform(script, clock, Limits(max_connections=1))


def test_each_connection_of_a_slot_has_its_generation(clock):
    def script(kernel, worker):
        worker.connections.slots[0].epoch = connection_module.EPOCHS - 1
        seen = []
        for _ in range(3):
            client = connect(kernel, get(b"/"))
            yield from settle(kernel)
            assert statuses(client) == [200]
            seen.append(worker.connections.slots[0].epoch)
            client.eof = True
            yield from settle(kernel)
        assert seen == [connection_module.EPOCHS, 0, 1]

    perform(script, clock)


@pytest.mark.parametrize("kind", (connection_module.RECV, connection_module.SEND))
def test_completion_of_a_former_connection_is_dropped(clock, kind):
    """It cannot come; if it does, it touches nothing but a counter, and its buffer is not lost."""
    def script(kernel, worker):
        client = connect(kernel)
        yield from settle(kernel)
        flags = linux.CQE_BUFFER | kernel.buffer(kernel.buffer_head)[2] << linux.CQE_BUFFER_SHIFT
        if kind == connection_module.RECV:
            kernel.buffer_head += 1
        before = worker.engine.buffer_tail
        kernel.post((kind | client.slot, 99), client.slot, 5, flags if kind == connection_module.RECV else 0)
        yield
        assert worker.stale == 1
        assert worker.connections.slots[client.slot].state is IDLE
        assert worker.engine.buffer_tail - before == (kind == connection_module.RECV)

    perform(script, clock)
