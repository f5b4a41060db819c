"""TLS's part of the connection state machine on a simulated kernel that can do TLS: random schedules, and scripts.

TARWEB_TLS_SEEDS=2000 runs more random schedules than usual; TARWEB_SEED=17 runs that one alone.
"""

import errno
import logging
import os
import signal
from collections import Counter

import pytest
import securemachine
import tlskeys
from machine import FILES, connect, content, get, make_clock, make_small, perform, seconds, settle, statuses, stop
from securemachine import SMALL, Buffer, Caller, SecureWorld, call, perform_secure
from simulated import SENDS, SOL_TCP, SOL_TLS, TCP_ULP, TLS_RX, TLS_TX
from tlskeys import ALERT, APPLICATION_DATA, HANDSHAKE
from tlsmemory import ALL_CIPHERS, ClientContext, TestEngine

import clock as clock_module
import linux
import transport
import worker as worker_module
from connection import FREE, IDLE, RESPONSE, Limits
from connection import HANDSHAKE as IN_HANDSHAKE
from tls import LARGEST_PLAINTEXT

SEEDS = int(os.environ.get("TARWEB_TLS_SEEDS", "120"))
SCHEDULES = [int(os.environ["TARWEB_SEED"])] if "TARWEB_SEED" in os.environ else range(SEEDS)


@pytest.fixture(scope="module")
def credentials(pairs):
    """An engine to make others from. Its key is of a kind whose signatures are all of one length: so a schedule is the
    same whenever it is run."""
    return TestEngine([(pairs["ed25519"].cert, pairs["ed25519"].key)])


@pytest.fixture
def files(monkeypatch):
    for path, where in securemachine.LARGE.items():
        monkeypatch.setitem(FILES, path, where)
    monkeypatch.setattr(transport, "LARGEST_KEPT", LARGEST_PLAINTEXT)       # or there would be nothing to load
    monkeypatch.setattr(transport, "Buffer", Buffer)
    Buffer.alive.clear()


# --- any schedule

def play(seeds, clock, engine):
    """The counts of what has happened."""
    seen = Counter()
    for seed in seeds:
        try:
            clock.now = 1000.0
            world = SecureWorld(seed, clock, engine)
            world.run()
        except BaseException:
            print(f"TARWEB_SEED={seed}")
            raise
        seen += world.kernel.counts + Counter(counts(world.worker)) + Counter([type(world.worker.engine).__name__])
    return seen


@pytest.fixture
def small(monkeypatch, files):
    return make_small(monkeypatch, SMALL)


@pytest.mark.parametrize("block", range(0, len(SCHEDULES), 30))
def test_any_schedule(small, credentials, block):
    play(SCHEDULES[block:block + 30], small, credentials)


def test_schedules_reach_what_they_are_for(small, credentials):
    """Else all of the above would prove little."""
    seen = play(range(50), small, credentials)
    assert not seen["WAITALL refused"]
    assert not seen["torn chain"]
    states = [(number, state) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
              for state in (IN_HANDSHAKE, RESPONSE)]
    for what in ("kernel_full", "kernel_resumed", "userspace_full", "userspace_resumed", "handshakes_failed",
                 "truncated", "notified", "not notified", "EBADMSG", f"record of type {ALERT}",
                 f"record of type {HANDSHAKE}", "short without WAITALL", "read from the file", "broken chain",
                 "overflow", "no buffers", "Ring", "PolledRing", "passed", "proxy_refused", "populated", "cold",
                 *(f"{state} at signal {number}" for number, state in states),
                 *(f"answered {status}" for status in (200, 206, 301, 400, 404, 405, 408))):
        assert seen[what], (what, seen)


# --- schedules with something to say

@pytest.fixture(params=("kernel", "userspace"))
def way(request):
    """Who encrypts."""
    return request.param


@pytest.fixture
def engine(credentials, way):
    yield credentials.another(ALL_CIPHERS if way == "kernel" else frozenset())
    assert not credentials.openssl.alive, "an SSL that nobody has freed"


@pytest.fixture
def in_kernel(credentials):
    """An engine whose connections the kernel takes over."""
    yield credentials.another(ALL_CIPHERS)
    assert not credentials.openssl.alive, "an SSL that nobody has freed"


@pytest.fixture
def in_userspace(credentials):
    yield credentials.another(frozenset())
    assert not credentials.openssl.alive, "an SSL that nobody has freed"


@pytest.fixture
def clock(monkeypatch, files):
    """Limits are as they are."""
    return make_clock(monkeypatch)


each_version = pytest.mark.parametrize("version", ("1.2", "1.3"))
CLOSE = b"Connection: close\r\n"


def counts(worker):
    """What is counted of TLS, where it is not 0."""
    names = ("kernel_full", "kernel_resumed", "userspace_full", "userspace_resumed", "handshakes_failed", "truncated")
    return {name: count for name in names if (count := getattr(worker.counts, name))}


def served(way, **more):
    return {f"{way}_full": 1, **more}


def ended(worker, *clients):
    """Whether nothing is left of them, in the worker or of their own."""
    return (all(client.closed for client in clients) and worker.connections.live == sum(
        connection.state is not FREE for connection in worker.connections.slots) == 0 and not worker.stale)


def call_and_stop_short(kernel, version):
    """A client that is done with the handshake but for what it sends next."""
    client = call(kernel, version=version, hold=True)
    for _ in range(2 if version == "1.2" else 1):
        client.push()
        yield from settle(kernel)
    return client


@each_version
def test_request_response_and_goodbye(clock, engine, way, version):
    def script(kernel, worker):
        client = call(kernel, version=version)
        yield from settle(kernel)
        client.ask(get(b"/"))
        yield from settle(kernel)
        assert client.received.endswith(b"\r\n\r\n" + content(b"/"))
        assert bool(client.tx) == bool(client.rx) == (way == "kernel")
        client.say_goodbye()
        client.push()
        yield from settle(kernel)
        assert client.notified
        assert ended(worker, client)
        assert counts(worker) == served(way)

    assert not perform_secure(script, clock, engine)


@each_version
def test_answered_before_the_client_has_heard_the_end_of_the_handshake(clock, engine, way, version):
    """In the segment of its last flight (TLS 1.2: of the flight that follows on our last)."""
    def script(kernel, worker):
        client = yield from call_and_stop_short(kernel, version)
        client.ask(get(b"/"), get(b"/one"), get(b"/", CLOSE))
        yield from settle(kernel)
        assert statuses(client) == [200] * 3
        assert client.notified
        assert client.closed
        assert counts(worker) == served(way)

    perform_secure(script, clock, engine)


@each_version
@pytest.mark.parametrize("size", (1, 3, 100))
def test_all_in_small_segments(clock, engine, way, version, size):
    def script(kernel, worker):
        client = call(kernel, version=version, hold=True)
        for step in range(4):
            while client.unsent:
                client.push(size)
                yield from settle(kernel)
            if step == 2:
                client.say(get(b"/"))
        assert statuses(client) == [200]
        assert counts(worker) == served(way)

    perform_secure(script, clock, engine)


@each_version
def test_last_response(clock, engine, way, version):
    """close_notify comes with it, or before our FIN; then the connection ends."""
    def script(kernel, worker):
        for path in (b"/", b"/large"):
            client = call(kernel, version=version)
            yield from settle(kernel)
            client.ask(get(path, CLOSE))
            yield from settle(kernel)
            assert client.received.endswith(content(path))
            assert client.notified
            client.eof = True
            yield from settle(kernel)
            assert ended(worker, client)

    perform_secure(script, clock, engine)


@each_version
def test_many_requests_in_one_record_and_one_in_many(clock, engine, version):
    def script(kernel, worker):
        client = call(kernel, version=version)
        yield from settle(kernel)
        client.ask(get(b"/") * 20)
        yield from settle(kernel)
        client.ask(*(bytes([byte]) for byte in get(b"/one")))
        yield from settle(kernel)
        assert statuses(client) == [200] * 21
        assert client.received.endswith(content(b"/one"))

    perform_secure(script, clock, engine)


@each_version
def test_request_body(clock, engine, version):
    def script(kernel, worker):
        client = call(kernel, version=version)
        yield from settle(kernel)
        client.ask(get(b"/", b"Content-Length: 50000\r\nExpect: 100-continue\r\n"))
        yield from settle(kernel)
        assert statuses(client) == [100]
        client.ask(bytes(20_000), bytes(20_000), bytes(10_000) + get(b"/one"))
        yield from settle(kernel)
        assert statuses(client) == [100, 200, 200]

    perform_secure(script, clock, engine)


def test_resumption(clock, engine, way):
    """TLS 1.3's ticket comes with the first response, or before the kernel takes over."""
    def script(kernel, worker):
        context = ClientContext("1.3")
        session = None
        for _ in range(3):
            client = call(kernel, context=context, session=session)
            yield from settle(kernel)
            client.ask(get(b"/", CLOSE))
            yield from settle(kernel)
            assert statuses(client) == [200]
            assert client.peer.tls.session_reused == (session is not None)
            session = client.peer.tls.session
        assert counts(worker) == {f"{way}_full": 1, f"{way}_resumed": 2}

    perform_secure(script, clock, engine)


def test_handshake_in_userspace_makes_no_send_of_its_own_for_tickets(clock, in_userspace):
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        assert worker.connections.slots[client.slot].state is IDLE
        before = len(client.wire)
        client.ask(get(b"/"))
        yield from settle(kernel)
        assert len(tlskeys.split(bytes(client.wire[before:]))) == 2

    perform_secure(script, clock, in_userspace)


# --- clients that go

@pytest.mark.parametrize("goes", ("eof", "reset"))
@pytest.mark.parametrize(("step", "failed"), (("at once", 0), ("in the hello", 1), ("after the hello", 1),
                                              ("in the last flight", 1)))
def test_going_in_the_handshake(clock, engine, goes, step, failed):
    def script(kernel, worker):
        client = Caller(hold=True)
        if step != "at once":
            client.push(100 if step == "in the hello" else 1 << 30)
        [*kernel.listeners.values()][0].queue.append(client)
        yield from settle(kernel)
        if step == "in the last flight":
            client.push(20)
            yield from settle(kernel)
        setattr(client, goes, True)
        yield from settle(kernel)
        assert ended(worker, client)
        assert counts(worker) == ({"handshakes_failed": failed} if failed else {})

    perform_secure(script, clock, engine)


@pytest.mark.parametrize("goes", ("eof", "reset"))
def test_gone_before_it_is_let_in(clock, engine, goes):
    """Where the client has sent FIN already, the ULP is refused (ENOTCONN); what it sent before is still heard."""
    def script(kernel, worker):
        client = Caller()
        setattr(client, goes, True)
        [*kernel.listeners.values()][0].queue.append(client)
        yield from settle(kernel)
        assert ended(worker, client)
        assert not client.ulp or goes == "reset"

    perform_secure(script, clock, engine)


@each_version
@pytest.mark.parametrize(("notify", "fin"), ((True, False), (False, True), (True, True)))
def test_half_closing(clock, engine, way, version, notify, fin):
    """What was asked before the end is answered, and the answer has its close_notify."""
    def script(kernel, worker):
        client = call(kernel, version=version)
        yield from settle(kernel)
        client.say(get(b"/") * 3 + b"GET /")
        if notify:
            client.say_goodbye()
        client.push()
        client.eof = fin
        yield from settle(kernel)
        assert statuses(client) == [200] * 3
        assert client.notified
        assert ended(worker, client)
        assert counts(worker) == served(way) | ({} if notify else {"truncated": 1})

    perform_secure(script, clock, engine)


@pytest.mark.parametrize("notify", (False, True))
def test_half_closing_does_not_cost_close_notify(clock, in_kernel, notify):
    """While our last words wait for room, behind a response that has filled what there was."""
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.ask(get(b"/large"))
        yield from settle(kernel)
        whole = len(client.received)
        client.ask(get(b"/large", CLOSE))
        client.room = whole + len(CLOSE)
        yield from settle(kernel)
        assert client.room == 0
        assert not client.closed
        if notify:
            client.say_goodbye()
            client.push()
        else:
            client.eof = True
        yield from settle(kernel)
        client.room = 1000
        yield from settle(kernel)
        assert client.notified
        assert client.closed

    perform_secure(script, clock, in_kernel)


@pytest.mark.parametrize("goes", ("eof", "reset"))
def test_going_within_a_response(clock, engine, way, goes):
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.room = 5000
        client.ask(get(b"/large"))
        yield from settle(kernel)
        setattr(client, goes, True)
        client.room = 10 ** 6
        yield from settle(kernel)
        assert ended(worker, client)
        assert client.received.endswith(content(b"/large")) == (goes == "eof") == client.notified

    perform_secure(script, clock, engine)


@each_version
def test_a_fin_behind_half_a_record_behind_the_handshake(clock, engine, way, version):
    """What was asked in whole records before it is answered, whoever was going to encrypt."""
    def script(kernel, worker):
        client = yield from call_and_stop_short(kernel, version)
        client.say(get(b"/"))
        whole = len(client.unsent)
        client.say(get(b"/one"))
        client.push(whole + 10)
        yield from settle(kernel)
        client.eof = True
        yield from settle(kernel)
        assert statuses(client) == [200]
        assert client.closed

    perform_secure(script, clock, engine)


# --- the hand-over to the kernel

@each_version
@pytest.mark.parametrize("refused", (errno.ENOENT, errno.EOPNOTSUPP, errno.ENOMEM))
def test_without_the_ulp_it_is_done_in_userspace(clock, in_kernel, version, refused):
    def script(kernel, worker):
        kernel.refuses = lambda _, level, name: refused if (level, name) == (SOL_TCP, TCP_ULP) else 0
        client = call(kernel, version=version)
        yield from settle(kernel)
        client.ask(get(b"/"), get(b"/large", CLOSE))
        yield from settle(kernel)
        assert statuses(client) == [200, 200]
        assert client.notified
        assert counts(worker) == {"userspace_full": 1}

    perform_secure(script, clock, in_kernel)


@each_version
@pytest.mark.parametrize("option", (TLS_TX, TLS_RX))
def test_without_keys_the_connection_is_over(clock, in_kernel, version, option):
    """Nobody can go on with it: it is closed without a word, and others are served."""
    def script(kernel, worker):
        kernel.refuses = lambda _, *which: errno.ENOMEM if which == (SOL_TLS, option) else 0
        client = call(kernel, version=version)
        yield from settle(kernel)
        assert ended(worker, client)
        assert not client.notified
        assert not client.alert
        assert counts(worker) == {"handshakes_failed": 1}
        kernel.refuses = lambda *_: 0
        other = call(kernel, version=version)
        yield from settle(kernel)
        other.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(other) == [200]

    perform_secure(script, clock, in_kernel)


@each_version
@pytest.mark.parametrize("result", (errno.EPIPE, errno.ECONNRESET, errno.EAGAIN))
@pytest.mark.parametrize("room", (0, 50))
def test_last_flight_cannot_be_sent(clock, in_kernel, version, result, room):
    """Not, or not all of it: then no keys are set, and the connection is over."""
    def script(kernel, worker):
        client = call(kernel, version=version, hold=True)
        client.push()
        yield from settle(kernel)
        client.room = room
        client.push()
        yield from settle(kernel)
        [flight] = kernel.in_flight(client.slot, SENDS)
        assert len(flight.behind) == 2
        kernel.end(flight, result)
        yield from settle(kernel)
        assert ended(worker, client)
        assert not client.tx
        assert not client.rx
        assert counts(worker) == {"handshakes_failed": 1}

    perform_secure(script, clock, in_kernel)


@each_version
def test_last_flight_waits_for_room(clock, in_kernel, version):
    """Keys are set when it is out, and not before: the client can read all of it."""
    def script(kernel, worker):
        client = call(kernel, version=version, hold=True)
        client.push()
        yield from settle(kernel)
        client.room = 20
        client.push()
        yield from settle(kernel)
        if version == "1.3":
            client.ask(get(b"/"))
        yield from settle(kernel)
        assert not client.tx
        client.room = 10 ** 6
        yield from settle(kernel)
        assert client.tx
        assert client.rx
        if version == "1.2":
            client.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [200]

    perform_secure(script, clock, in_kernel)


def test_time_is_over_while_the_last_flight_waits_for_room(clock, in_kernel):
    """What is linked behind it must not keep the connection alive."""
    def script(kernel, worker):
        client = call(kernel, hold=True)
        client.push()
        yield from settle(kernel)
        client.room = 0
        client.push()
        yield from settle(kernel)
        assert kernel.in_flight(client.slot, SENDS)
        yield from seconds(kernel, 6)
        assert ended(worker, client)

    perform_secure(script, clock, in_kernel, Limits(header_timeout=4))


def test_a_chain_is_never_torn(clock, in_kernel):
    """However full the submission queue is: so many connections come to their hand-over in one batch."""
    def script(kernel, worker):
        clients = [call(kernel, hold=True) for _ in range(20)]
        for client in clients:
            client.push()
        yield from settle(kernel)
        for client in clients:
            client.push()
        yield from settle(kernel)
        for client in clients:
            client.ask(get(b"/"))
        yield from settle(kernel)
        assert [statuses(client) for client in clients] == [[200]] * 20
        assert kernel.counts["torn chain"] == 0
        assert counts(worker) == {"kernel_full": 20}

    perform_secure(script, clock, in_kernel, entries=8)


@pytest.mark.parametrize("cut", (1, 4, 5, 6, 30))
def test_a_record_that_has_begun_is_received_to_its_end_and_no_further(clock, in_kernel, cut):
    def script(kernel, worker):
        client = call(kernel, hold=True)
        client.push()
        yield from settle(kernel)
        client.say(get(b"/"))
        size = len(client.unsent)
        client.say(get(b"/one") + get(b"/") * 3)
        client.push(size + cut)
        yield from settle(kernel)
        assert worker.connections.slots[client.slot].state is IN_HANDSHAKE
        client.ask(get(b"/one"), get(b"/one"))      # in one segment with what is missing
        yield from settle(kernel)
        assert statuses(client) == [200] * 7
        assert client.tx
        assert worker.connections.slots[client.slot].session.sequences[1] == 2, "OpenSSL has had more than it needed"
        assert client.rx.sequence == 4

    perform_secure(script, clock, in_kernel)


# --- records that are no application data, once the kernel opens them

GETS = get(b"/") * 2
FATAL = b"\2\x50"               # internal_error
AFTER = {   # [(content, type)] of what the client sends after a first request: how many answers, and what becomes of it
    "close_notify": ([(tlskeys.CLOSE_NOTIFY, ALERT)], 0, "notified"),
    "requests and close_notify": ([(GETS, APPLICATION_DATA), (tlskeys.CLOSE_NOTIFY, ALERT)], 2, "notified"),
    "half a request and close_notify": ([(b"GET /", APPLICATION_DATA), (tlskeys.CLOSE_NOTIFY, ALERT)], 0, "notified"),
    "new keys": ([(tlskeys.KEY_UPDATE, HANDSHAKE)], 0, "notified"),
    "requests and new keys": ([(GETS, APPLICATION_DATA), (tlskeys.KEY_UPDATE_ASKED, HANDSHAKE)], 2, "notified"),
    "an alert": ([(FATAL, ALERT)], 0, "silent"),
    "requests and an alert": ([(GETS, APPLICATION_DATA), (FATAL, ALERT)], None, "silent"),
    "half an alert": ([(b"\2", ALERT)], 0, "silent"),
    "user_canceled": ([(tlskeys.USER_CANCELED, ALERT)], 0, "open"),
    "user_canceled and requests": ([(tlskeys.USER_CANCELED, ALERT), (GETS, APPLICATION_DATA)], 2, "open"),
    "user_canceled and close_notify": ([(tlskeys.USER_CANCELED, ALERT), (tlskeys.CLOSE_NOTIFY, ALERT)], 0, "notified"),
    "nothing": ([(b"", APPLICATION_DATA), (b"", APPLICATION_DATA), (GETS, APPLICATION_DATA)], 2, "open"),
}


@pytest.mark.parametrize("case", AFTER)
def test_control_records_in_the_kernel(clock, in_kernel, case):
    def script(kernel, worker):
        records, answers, fate = AFTER[case]
        client = call(kernel, by_hand=True)
        yield from settle(kernel)
        client.ask(get(b"/"))
        yield from settle(kernel)
        assert client.rx
        for content_, kind in records:
            client.say_record(content_, kind)
        client.push()
        yield from settle(kernel)
        assert answers is None or statuses(client) == [200] * (1 + answers)
        assert client.closed == (fate != "open")
        assert client.notified == (fate == "notified")
        assert ended(worker) == client.closed

    perform_secure(script, clock, in_kernel)


def test_control_record_behind_requests_that_wait(clock, in_kernel):
    """close_notify while a response is being sent: all that was asked is answered first."""
    def script(kernel, worker):
        client = call(kernel, by_hand=True)
        yield from settle(kernel)
        client.room = 100
        client.ask(get(b"/large"), get(b"/one"))
        yield from settle(kernel)
        client.say_goodbye()
        client.push()
        yield from settle(kernel)
        assert not client.closed
        client.room = 10 ** 6
        yield from settle(kernel)
        assert statuses(client) == [200, 200]
        assert client.notified
        assert client.closed

    perform_secure(script, clock, in_kernel)


def test_new_keys_and_more_requests_in_the_kernel(clock, in_kernel):
    """What is behind them cannot be read any more: what was before is answered, and the end is an honest one."""
    def script(kernel, worker):
        client = call(kernel, by_hand=True)
        yield from settle(kernel)
        client.say(get(b"/"))
        client.renew()
        client.say(get(b"/one"))
        client.push()
        yield from settle(kernel)
        assert statuses(client) == [200]
        assert client.notified
        assert client.closed

    perform_secure(script, clock, in_kernel)


@pytest.mark.parametrize("times", (1, 64))
@pytest.mark.parametrize("asking", (False, True))
def test_new_keys_in_userspace(clock, in_userspace, asking, times):
    def script(kernel, worker):
        client = call(kernel, by_hand=True)
        yield from settle(kernel)
        for _ in range(3):
            client.say(get(b"/"))
            for _ in range(times):
                client.renew(asking)
            client.push()
            yield from settle(kernel)
        client.ask(get(b"/one"))
        yield from settle(kernel)
        assert statuses(client) == [200] * 4

    perform_secure(script, clock, in_userspace)


def test_a_receive_of_a_control_record_that_is_interrupted(clock, in_kernel):
    def script(kernel, worker):
        client = call(kernel, by_hand=True)
        yield from settle(kernel)
        client.say_record(tlskeys.USER_CANCELED, ALERT)
        client.push()
        while not kernel.in_flight(client.slot, (linux.OP_RECVMSG,)):
            [receive] = kernel.in_flight(client.slot, (linux.OP_RECV,))
            kernel.go_on(receive)
            yield
        [fetch] = kernel.in_flight(client.slot, (linux.OP_RECVMSG,))
        kernel.end(fetch, errno.EINTR)
        yield from settle(kernel)
        client.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [200]

    perform_secure(script, clock, in_kernel)


def test_the_time_is_over_while_a_control_record_is_fetched(clock, in_kernel):
    """The kernel has promised one; should it not come, the connection ends all the same."""
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        [receive] = kernel.in_flight(client.slot, (linux.OP_RECV,))
        kernel.end(receive, errno.EIO)
        yield from settle(kernel)
        assert kernel.in_flight(client.slot, (linux.OP_RECVMSG,))
        yield from seconds(kernel, 6)
        assert ended(worker, client)

    perform_secure(script, clock, in_kernel, Limits(header_timeout=4))


@each_version
@pytest.mark.parametrize("at", (0, 3, 10, -1))
def test_a_changed_record(clock, engine, way, version, at):
    """It ends the connection; what was answered before stands, and others are not touched."""
    def script(kernel, worker):
        bystander, client = call(kernel), call(kernel, version=version)
        yield from settle(kernel)
        client.ask(get(b"/"))
        yield from settle(kernel)
        client.say(get(b"/one") * 3)
        record = bytearray(client.unsent)
        record[at] ^= 1
        client.unsent = bytes(record) + bytes(600)          # one byte more or less in its length: it has them all
        client.push()
        yield from settle(kernel)
        assert client.closed
        assert not client.notified
        assert statuses(client) == [200]
        bystander.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(bystander) == [200]
        assert engine.left() == (0, 0, 0)

    perform_secure(script, clock, engine)


def test_what_one_client_sends_does_not_get_to_another(clock, in_userspace):
    """A record's head alone, and then its rest with a second record, which together look like a single one: the second
    was left in the BIO that all share."""
    def script(kernel, worker):
        client, victim = call(kernel, by_hand=True), call(kernel)
        yield from settle(kernel)
        one, two = look_alike(client.hand, 100, 60)
        client.unsent = one[:5]
        client.push()
        yield from settle(kernel)
        client.unsent = one[5:] + two
        assert int.from_bytes(client.unsent[3:5]) + 5 == len(client.unsent)
        client.push()
        yield from settle(kernel)
        assert in_userspace.left() == (0, 0, 0)
        victim.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(victim) == [200]

    perform_secure(script, clock, in_userspace)


def look_alike(writer, *sizes):
    """Two records with this much content; bytes 3 and 4 of the first one's body tell the length of what follows."""
    length = sum(sizes) + 5 + 2 * 17 - 5        # both bodies and the second head, but for a head's 5 bytes
    sequence = writer.sequence
    stream = writer.seal(bytes(sizes[0]))[5:]   # AES-GCM: a stream is added to the plaintext
    writer.sequence = sequence
    wanted = bytes(a ^ b for a, b in zip(length.to_bytes(2), stream[3:5], strict=True))
    return writer.seal(b"abc" + wanted + bytes(sizes[0] - 5)), writer.seal(b"d" * sizes[1])


@each_version
def test_nothing_behind_close_notify_counts(clock, engine, way, version):
    """Neither records nor plaintext (RFC 8446 section 6.1), though it comes while a response is sent."""
    def script(kernel, worker):
        client = call(kernel, version=version, by_hand=True)
        yield from settle(kernel)
        client.room = 100
        client.say(get(b"/large"))
        client.say_goodbye()
        client.push()
        yield from settle(kernel)
        client.ask(get(b"/"))
        client.unsent = get(b"/one")
        client.push()
        yield from settle(kernel)
        client.room = 10 ** 6
        yield from settle(kernel)
        assert statuses(client) == [200]
        assert client.notified
        assert client.closed

    perform_secure(script, clock, engine)


def test_known_request_and_close_notify_in_one_segment(clock, engine):
    def script(kernel, worker):
        for _ in range(5):
            client = call(kernel)
            yield from settle(kernel)
            client.ask(get(b"/"))
            yield from settle(kernel)
            client.say(get(b"/"))
            client.say_goodbye()
            client.push()
            yield from settle(kernel)
            assert statuses(client) == [200, 200]
            assert client.notified
            assert ended(worker, client)

    perform_secure(script, clock, engine)


def test_plain_http_on_the_port_for_tls(clock, engine):
    def script(kernel, worker):
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [400]
        assert b"https" in client.received
        client.eof = True
        yield from settle(kernel)
        assert ended(worker, client)
        assert counts(worker) == {}

    perform_secure(script, clock, engine)


def test_plain_listener_beside_it(clock, engine):
    def script(kernel, worker):
        client = connect(kernel, get(b"/") + get(b"/one"), listener=1)
        yield from settle(kernel)
        assert statuses(client) == [200, 200]
        assert not client.ulp

    perform_secure(script, clock, engine, plain=1)


# --- time, room and the end

@pytest.mark.parametrize("step", ("at once", "in the hello", "after the hello", "in the last flight",
                                  "in a record behind it"))
def test_handshake_has_a_time(clock, engine, way, step):
    def script(kernel, worker):
        client = call(kernel, hold=True)
        if step != "at once":
            client.push(100 if step == "in the hello" else 1 << 30)
        yield from settle(kernel)
        if step == "in the last flight":
            client.push(20)
        elif step == "in a record behind it":
            client.say(b"GET /")
            client.push(len(client.unsent) - 3)
        yield from seconds(kernel, 4)
        assert not client.closed
        yield from seconds(kernel, 2)
        assert ended(worker, client) or step == "in a record behind it"

    perform_secure(script, clock, engine, Limits(header_timeout=4))


def test_a_trickle_does_not_move_the_end_of_the_time(clock, engine):
    def script(kernel, worker):
        client = call(kernel, hold=True)
        for _ in range(6):
            client.push(1)
            yield from seconds(kernel, 1)
        assert ended(worker, client)
        assert counts(worker) == {"handshakes_failed": 1}

    perform_secure(script, clock, engine, Limits(header_timeout=4))


@each_version
def test_idle_connection_is_told_goodbye(clock, engine, version):
    def script(kernel, worker):
        client, silent = call(kernel, version=version), call(kernel, version=version)
        yield from settle(kernel)
        client.ask(get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 7)
        assert client.notified
        assert silent.notified
        assert ended(worker, client, silent)

    perform_secure(script, clock, engine, Limits(header_timeout=4, keepalive_timeout=5))


@pytest.mark.parametrize("room", (0, 1))
def test_goodbye_without_room_holds_nothing_up(clock, engine, room):
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.ask(get(b"/"))
        yield from settle(kernel)
        client.room = room
        yield from seconds(kernel, 7)
        assert kernel.counts["no room for last words"] == 1
        assert not client.notified
        assert ended(worker, client)

    perform_secure(script, clock, engine, Limits(keepalive_timeout=5))


def test_reader_who_stops_is_cut_off_without_close_notify(clock, engine):
    """It would say that the response was whole."""
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.room = 3000
        client.ask(get(b"/large"))
        yield from settle(kernel)
        yield from seconds(kernel, 40)
        assert ended(worker, client)
        client.room = 10 ** 6
        assert not client.notified

    perform_secure(script, clock, engine)


@each_version
@pytest.mark.parametrize("asks", (False, True))
def test_drain_during_the_handshake(clock, engine, way, version, asks):
    """The handshake may end, and what comes then is answered: with its end, or right behind it."""
    def script(kernel, worker):
        client = call(kernel, version=version, hold=True)
        clients.append(client)
        client.push()
        yield from settle(kernel)
        yield from stop(kernel)
        assert not client.closed
        if version == "1.3" and asks:
            client.say(get(b"/"))
        client.push()
        yield from settle(kernel)
        if version == "1.2" and asks:
            client.ask(get(b"/"))
        yield from seconds(kernel, 0 if asks else clock_module.FRESH + 1)
        yield from settle(kernel)

    clients = []
    assert perform_secure(script, clock, engine)
    assert clock.now <= 1000 + (0 if asks else clock_module.FRESH + 1)
    assert statuses(clients[0]) == [200] * asks
    assert clients[0].notified
    assert clients[0].closed


def test_last_words_are_sent_though_nobody_waits_for_them(clock, engine):
    """The loop ends with the batch in which they are armed."""
    clients = []

    def script(kernel, worker):
        clients.extend(call(kernel) for _ in range(5))
        yield from settle(kernel)
        for client in clients:
            client.ask(get(b"/"))
        yield from settle(kernel)
        yield from stop(kernel)

    assert perform_secure(script, clock, engine)
    assert all(client.notified for client in clients)


def test_drain_ends_responses_with_close_notify(clock, engine):
    def script(kernel, worker):
        idle, busy = call(kernel), call(kernel)
        yield from settle(kernel)
        busy.room = 100
        busy.ask(get(b"/large"))
        idle.ask(get(b"/"))
        yield from settle(kernel)
        yield from stop(kernel)
        assert idle.notified
        assert idle.closed
        assert not busy.closed
        busy.room = 10 ** 6
        yield from settle(kernel)
        assert busy.received.endswith(content(b"/large"))
        assert busy.notified

    assert perform_secure(script, clock, engine)


def park(kernel, worker):
    """(a busy client, one that is let in beyond the limit, of one connection): in steps, for a script."""
    busy = call(kernel)
    yield from settle(kernel)
    busy.ask(get(b"/"))
    yield from settle(kernel)
    yield from seconds(kernel, 1)           # it is idle now, so that one more may be let in
    busy.room = 0
    busy.ask(get(b"/large"))                # but it comes to life again at the same moment
    parked = call(kernel)
    yield from settle(kernel)
    assert len(worker.acceptor.parked) == 1
    return busy, parked


def test_parked_connection_is_served_when_there_is_room(clock, engine):
    def script(kernel, worker):
        busy, parked = yield from park(kernel, worker)
        yield from seconds(kernel, 6)
        assert not parked.closed, "the time for a handshake has not begun"
        busy.reset = True
        yield from settle(kernel)
        parked.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(parked) == [200]

    perform_secure(script, clock, engine, Limits(max_connections=1, header_timeout=4))


def test_parked_connection_is_dropped_at_the_signal(clock, engine):
    def script(kernel, worker):
        busy, parked = yield from park(kernel, worker)
        yield from stop(kernel)
        assert parked.closed
        assert not parked.wire
        busy.reset = True
        yield from settle(kernel)

    assert perform_secure(script, clock, engine, Limits(max_connections=1))


def test_full_table_takes_the_longest_idle(clock, engine):
    """Which is told goodbye; not one that has been shaking hands for less long."""
    def script(kernel, worker):
        first = call(kernel)
        yield from settle(kernel)
        first.ask(get(b"/"))
        yield from seconds(kernel, 1)
        second = call(kernel, hold=True)
        yield from seconds(kernel, 1)
        third = call(kernel)
        yield from seconds(kernel, 1)
        assert first.notified
        assert first.closed
        assert not second.closed
        third.ask(get(b"/"))
        yield from settle(kernel)
        assert statuses(third) == [200]

    perform_secure(script, clock, engine, Limits(max_connections=2))


# --- what is sealed in userspace

def loads(kernel):
    """Reads of the archive that are in flight."""
    return [operation for operation in kernel.operations if operation.code == linux.OP_READ and operation.segments]


def until_loading(kernel, client):
    """Let a client's request arrive, and nothing of what follows from it; gives the read of the archive."""
    while not loads(kernel):
        for receive in kernel.in_flight(client.slot, (linux.OP_RECV,)):
            kernel.go_on(receive)
        yield
    return loads(kernel)[0]


def test_sends_that_fall_short(clock, engine):
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.ask(get(b"/large"), get(b"/"))
        for _ in range(300):
            client.room = 150
            for send in kernel.in_flight(client.slot, SENDS):
                kernel.go_on(send, 100)
                if send in kernel.operations and send.done:
                    kernel.end(send, errno.EAGAIN)
            yield from settle(kernel)
        assert statuses(client) == [200, 200]
        assert content(b"/large") in client.received
        assert client.received.endswith(content(b"/"))

    perform_secure(script, clock, engine)


def test_a_response_of_a_few_records_is_kept_in_one_piece(clock, in_userspace, monkeypatch):
    monkeypatch.setattr(transport, "LARGEST_KEPT", 30_000)

    def script(kernel, worker):
        client = call(kernel)
        for number in range(1, 4):
            yield from settle(kernel)
            client.ask(get(b"/large"))
            yield from settle(kernel)
            assert statuses(client) == [200] * number
            assert client.received.endswith(content(b"/large"))
        assert not kernel.counts["read from the file"], "it was read through the engine"

    perform_secure(script, clock, in_userspace)


@pytest.mark.parametrize("size", (1, 700, 5000))
def test_reads_that_fall_short(clock, in_userspace, size):
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.ask(get(b"/large"))
        limit = 40 if size == 1 else 1 << 30        # bytes of it in small pieces
        while not client.received.endswith(content(b"/large")):
            for operation in list(kernel.operations):
                short = operation in loads(kernel) and limit > 0
                limit -= short
                kernel.go_on(operation, size if short else 1 << 30)
            yield
        assert statuses(client) == [200]
        assert kernel.counts["read from the file"] >= min(40, 20_000 // size)

    perform_secure(script, clock, in_userspace)


@pytest.mark.parametrize("error", (errno.EIO, errno.EINTR))
def test_a_read_that_fails_cuts_the_response_off(clock, in_userspace, error):
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.room = 0
        client.ask(get(b"/large"))
        load = yield from until_loading(kernel, client)
        kernel.end(load, error)
        client.room = 10 ** 6
        yield from settle(kernel)
        assert ended(worker, client)
        assert not client.notified
        assert len(worker.userspace.large_buffers) == 1

    perform_secure(script, clock, in_userspace)


@each_version
def test_truncated_archive(clock, in_userspace, version, monkeypatch):
    """What is lost is cut off, without close_notify; what is there is served on, and nothing falls over."""
    monkeypatch.setattr(transport, "SEAL_SIZE", 6000)

    def script(kernel, worker):
        early, late, small = (call(kernel, version=version) for _ in range(3))
        yield from settle(kernel)
        early.room = 10_000
        early.ask(get(b"/large"))
        small.ask(get(b"/one"))
        yield from settle(kernel)
        os.ftruncate(worker.archive.fd, 50)
        early.room = 10 ** 6
        late.ask(get(b"/large"))
        yield from settle(kernel)
        small.ask(get(b"/one"), get(b"/"), get(b"/piece"))
        yield from settle(kernel)
        for client in (early, late, small):
            assert client.closed
            assert not client.notified
        assert statuses(late) == []
        assert statuses(small) == [200] * 3
        assert small.received.endswith(content(b"/"))
        assert worker.counts.faults == 3
        assert ended(worker)

    perform_secure(script, clock, in_userspace)


def test_plaintext_that_is_kept_is_bounded(clock, in_userspace, monkeypatch):
    """When it is too much, all of it goes, and is gathered anew."""
    monkeypatch.setattr(transport, "MEMO_PLAINTEXT", 2000)

    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        for _ in range(5):
            for path in (b"/", b"/one", b"/piece", b"/more", b"/empty", b"/big"):
                client.ask(get(path))
                yield from settle(kernel)
                assert client.received.endswith(b"\r\n\r\n" + content(path))
                kept = {plan for plan in worker.site.by_reply.values() if plan.plaintext}
                assert kept == set(worker.userspace.gathered)
                assert len(kept) == len(worker.userspace.gathered)
                size = sum(plan.total for plan in kept)
                assert size == worker.userspace.gathered_size
                assert size <= 2000 or len(kept) == 1

    perform_secure(script, clock, in_userspace)


def test_date_of_what_is_kept_goes_on(clock, engine):
    def script(kernel, worker):
        client, dates = call(kernel), []
        yield from settle(kernel)
        for _ in range(6):
            del client.received[:]
            client.ask(get(b"/"))
            yield from settle(kernel)
            dates.append(bytes(client.received).split(b"Date: ")[1][:29])
            yield from seconds(kernel, 1)
        assert len(set(dates)) == 6
        assert dates == sorted(dates)

    perform_secure(script, clock, engine)


def test_free_buffers_are_bounded(clock, in_userspace, monkeypatch):
    """Each connection that sends has one; afterwards so many are kept, and the others let go."""
    monkeypatch.setattr(transport, "FREE_BUFFERS", 3)

    def script(kernel, worker):
        clients = [call(kernel) for _ in range(20)]
        yield from settle(kernel)
        for i, client in enumerate(clients):
            client.room = 0
            client.ask(get(b"/large" if i % 2 else b"/"))
        yield from settle(kernel)
        assert len(Buffer.alive) == 20
        for client in clients:
            client.room = 10 ** 6
        yield from settle(kernel)
        assert len(worker.userspace.small_buffers) == len(worker.userspace.large_buffers) == 3
        assert set(Buffer.alive) == {*worker.userspace.small_buffers, *worker.userspace.large_buffers}
        assert all(connection.session.buffer is None for connection in worker.connections.slots if connection.session)

    perform_secure(script, clock, in_userspace)


@pytest.mark.parametrize("end", ("reset", "time", "signal"))
def test_buffers_come_back_from_what_is_cut_off(clock, in_userspace, end):
    def script(kernel, worker):
        clients = [call(kernel) for _ in range(4)]
        yield from settle(kernel)
        for client in clients:
            client.room = 100
            client.ask(get(b"/large"))
        yield from settle(kernel)
        if end == "reset":
            for client in clients:
                client.reset = True
            yield from settle(kernel)
        elif end == "time":
            yield from seconds(kernel, 60)
        else:
            yield from stop(kernel)
            for client in clients:
                client.room = 10 ** 6
            yield from settle(kernel)
        assert ended(worker, *clients)
        assert set(Buffer.alive) == {*worker.userspace.small_buffers, *worker.userspace.large_buffers}

    perform_secure(script, clock, in_userspace)


def gone_while_loading(kernel):
    """A client that goes while a piece of the file is being read, and that load."""
    client = call(kernel)
    yield from settle(kernel)
    client.ask(get(b"/large"))
    load = yield from until_loading(kernel, client)
    client.reset = True
    [receive] = kernel.in_flight(client.slot, (linux.OP_RECV,))
    kernel.go_on(receive)
    return client, load


def test_cancelled_load(clock, in_userspace):
    """The client goes while a piece of the file is being read: the buffer stays until that has ended."""
    def script(kernel, worker):
        client, load = yield from gone_while_loading(kernel)
        yield
        assert not client.closed
        assert load.cancelled
        yield from settle(kernel)
        assert ended(worker, client)
        assert len(worker.userspace.large_buffers) == 1

    perform_secure(script, clock, in_userspace)


def test_p10_a_connection_that_the_kernel_does_not_let_go_of_is_logged_and_counted(clock, in_userspace, caplog,
                                                                                   monkeypatch):
    """A read of the archive that does not end although it is cancelled, as on a disk that no longer answers."""
    monkeypatch.setattr(logging.getLogger("tarweb"), "disabled", False)

    def script(kernel, worker):
        client, load = yield from gone_while_loading(kernel)
        kernel.operations.remove(load)
        yield from seconds(kernel, 20)
        assert worker.counts.stuck == 1 and not client.closed
        assert caplog.text.count("cannot be closed") == 1
        kernel.operations.append(load)
        yield from seconds(kernel, 2)
        assert worker.counts.stuck == 0 and ended(worker, client)

    perform_secure(script, clock, in_userspace)


@pytest.mark.parametrize("after", ("handshake", "request"))
def test_what_comes_behind_close_notify_is_not_read_on_and_on(clock, in_userspace, after):
    """While a response is being sent that the client does not take: else a flood would cost the worker its time."""
    def script(kernel, worker):
        client = call(kernel, hold=after == "handshake", room=10_000)
        if after == "handshake":
            while not client.peer.done:
                client.push()
                yield from settle(kernel)
        yield from settle(kernel)
        client.room = 0
        client.ask(get(b"/large"))
        client.say_goodbye()
        client.push()
        yield from settle(kernel)
        before = client.delivered
        for _ in range(300):
            client.incoming.append(bytes(4096))
            yield from settle(kernel)
        assert client.delivered - before <= 2 * worker.engine.buffer_count * worker.engine.buffer_size
        assert not worker.connections.slots[client.slot].receiving
        client.room = 10 ** 7
        yield from settle(kernel)
        assert client.received.endswith(content(b"/large")) and client.notified

    perform_secure(script, clock, in_userspace)


def test_a_known_request_with_the_end_of_the_handshake_is_one(clock, in_userspace):
    """It is not parsed, and does not take up room in the memo again and again."""
    def script(kernel, worker):
        for _ in range(12):
            client = call(kernel, hold=True)
            client.push()
            yield from settle(kernel)
            assert client.peer.done
            client.ask(get(b"/one"))
            yield from settle(kernel)
            assert statuses(client) == [200]
        assert worker.counts.memo_hits >= 6
        assert worker.counts.memo_misses <= 5
        requests = worker.site.memo.requests
        room = requests.room
        requests.remember(get(b"/one"), worker.site.known(get(b"/one")))
        assert requests.room == room, "what is remembered takes no room a second time"

    perform_secure(script, clock, in_userspace)


def test_pipelining_without_reading_is_bounded(clock, engine):
    def script(kernel, worker):
        client = call(kernel, room=10_000)
        yield from settle(kernel)
        client.room = 0
        for _ in range(200):
            client.say(get(b"/") * 20)
        while client.unsent:
            client.push(4096)
        yield from settle(kernel)
        pending = len(worker.connections.slots[client.slot].pending)
        assert worker_module.MAX_PENDING < pending < worker_module.MAX_PENDING + 2 * 8 * 4096 + tlskeys.LARGEST
        client.room = 10 ** 7
        yield from settle(kernel)
        assert statuses(client) == [200] * 4000

    perform_secure(script, clock, engine, buffers=8)


def test_plain_worker_is_what_it_was(clock):
    """The simulated kernel's TLS changes nothing for a Worker without it."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/large"))
        yield from settle(kernel)
        assert client.received.endswith(content(b"/large"))

    perform(script, clock)
