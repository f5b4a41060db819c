"""Scripts on the simulated kernel for who comes in, and how a worker ends: PROXY headers, passed connections, accepts
that fail, retiring; and for what any response may have to do with: archives out of memory and the access log."""

import errno
import signal

import pytest
import securemachine
from machine import (
    FILES, connect, content, end_at_once, get, make_clock, perform, retire, seconds, settle, statuses, stop, tell,
)
from securemachine import Buffer, Caller, call, perform_secure
from simulated import Datagram, Socket
from test_machine_tls import credentials, each_version, engine, ended, in_kernel, in_userspace, way     # noqa: F401

import clock as clock_module
import connection as connection_module
import linux
import transport
from connection import CLOSING, FREE, IDLE, PREFACE, Limits
from connection import HANDSHAKE as IN_HANDSHAKE
from plan import WARM_SECONDS

PROXY = b"10.0.0.1"
TRUSTED = {"trusted": ["10.0.0.0/8"], "log": "combined"}
V1 = b"PROXY TCP4 198.51.100.7 192.0.2.1 1234 80\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2 = SIGNATURE + b"\x21\x11\0\x0c" + bytes((198, 51, 100, 7)) + bytes((192, 0, 2, 1)) + b"\4\xd2\0\x50"
HEADERS = {"version 1": (V1, b"198.51.100.7"), "version 1 of nobody": (b"PROXY UNKNOWN\r\n", PROXY),
           "version 2": (V2, b"198.51.100.7"), "version 2 of itself": (SIGNATURE + b"\x20\0\0\0", PROXY)}
CLOSES = b"\r\nConnection: close\r\n"


@pytest.fixture
def clock(monkeypatch):
    for path, where in securemachine.LARGE.items():
        monkeypatch.setitem(FILES, path, where)
    monkeypatch.setattr(transport, "Buffer", Buffer)
    Buffer.alive.clear()
    return make_clock(monkeypatch)


def whos(kernel):
    """Who has been answered, says the access log."""
    return [line.split()[0] for line in kernel.log.splitlines()]


def closes(client):
    """For each response, whether it says that it is the last."""
    return [CLOSES in head for head in bytes(client.received).split(b"HTTP/1.1 ")[1:]]


# --- PROXY headers

@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("way_it_comes", ("byte by byte", "at once", "with half a request", "alone"))
def test_header_and_then_requests(clock, case, way_it_comes):
    def script(kernel, worker):
        header, who = HEADERS[case]
        stream = header + get(b"/") + get(b"/one")
        cut = {"byte by byte": 1, "at once": len(stream), "with half a request": len(header) + 5,
               "alone": len(header)}[way_it_comes]
        client = connect(kernel, source=PROXY)
        for piece in [stream[i:i + cut] for i in range(0, len(stream), cut)]:
            client.incoming.append(piece)
            yield from settle(kernel)
        assert statuses(client) == [200, 200]
        yield from seconds(kernel, 1)
        assert whos(kernel) == [who] * 2
        assert worker.connections.slots[client.slot].state is IDLE

    perform(script, clock, **TRUSTED)


@pytest.mark.parametrize("case", HEADERS)
def test_header_before_a_handshake(clock, engine, case):    # noqa: F811
    """Of the bytes behind it none is lost, whoever encrypts afterwards."""
    def script(kernel, worker):
        header, who = HEADERS[case]
        for size in (1 << 20, 7, len(header), len(header) + 20):
            client = Caller(hold=True)
            client.source, client.unsent = PROXY, header + client.unsent
            next(iter(kernel.listeners.values())).queue.append(client)
            for _ in range(4):
                while client.unsent:
                    client.push(size)
                    yield from settle(kernel)
            client.ask(get(b"/"))
            yield from settle(kernel)
            assert statuses(client) == [200]
        yield from seconds(kernel, 1)
        assert whos(kernel) == [who] * 4

    perform_secure(script, clock, engine, **TRUSTED)


@pytest.mark.parametrize("start", (
    b"GET / HTTP/1.1\r\n", b"PROXY TCP4 1.2.3.400 1.2.3.4 1 2\r\n", b"PROXY UNKNOWN" + b" " * 100, b"\x16\3\1",
    SIGNATURE + b"\x11"))
@pytest.mark.parametrize("size", (1, 1000))
def test_bad_header_ends_the_connection_without_a_word(clock, start, size):
    def script(kernel, worker):
        client, other = connect(kernel, source=PROXY), connect(kernel, V1 + get(b"/"), source=PROXY)
        for piece in [start[i:i + size] for i in range(0, len(start), size)]:
            client.incoming.append(piece)
            yield from settle(kernel)
        assert client.closed
        assert not client.received
        assert worker.counts.proxy_refused == 1
        assert statuses(other) == [200]

    perform(script, clock, **TRUSTED)


def test_header_of_somebody_else_is_a_bad_request(clock):
    def script(kernel, worker):
        client, other = connect(kernel, V1 + get(b"/")), connect(kernel, get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [400]
        assert statuses(other) == [200]
        assert worker.counts.proxy_refused == 0

    perform(script, clock, **TRUSTED)


@pytest.mark.parametrize("source", (b"", b"10.0.0.1"))
def test_proxies_on_unix_sockets(clock, source):
    def script(kernel, worker):
        client = connect(kernel, V1 + get(b"/"), source=source)
        yield from settle(kernel)
        assert statuses(client) == [200 if source == b"" else 400]

    perform(script, clock, trusted=["unix"])


@pytest.mark.parametrize("start", (b"", b"P", V1[:-1], SIGNATURE, V2[:-1]))
def test_header_has_a_time(clock, start):
    """That of a request, which a trickle does not move."""
    def script(kernel, worker):
        client = connect(kernel, source=PROXY)
        for i in range(4):
            client.incoming.extend([start[i:i + 1]] * bool(start[i:i + 1]))
            yield from settle(kernel)
            assert not client.closed
            yield from seconds(kernel, 1)
        yield from seconds(kernel, 1)
        assert client.closed
        assert not client.received
        assert worker.counts.timed_out == 1

    perform(script, clock, Limits(header_timeout=4), **TRUSTED)


@pytest.mark.parametrize("goes", ("eof", "reset"))
def test_going_within_the_header(clock, goes):
    def script(kernel, worker):
        client = connect(kernel, V1[:9], source=PROXY)
        yield from settle(kernel)
        setattr(client, goes, True)
        yield from settle(kernel)
        assert client.closed
        assert worker.connections.live == 0

    perform(script, clock, **TRUSTED)


def test_half_closed_behind_header_and_request(clock):
    def script(kernel, worker):
        client = connect(kernel, V1 + get(b"/"), source=PROXY)
        client.eof = True
        yield from settle(kernel)
        assert statuses(client) == [200]
        assert client.closed

    perform(script, clock, **TRUSTED)


@pytest.mark.parametrize("error", (errno.ENOBUFS, errno.EINTR, errno.ECANCELED))
def test_interrupted_within_the_header(clock, error):
    def script(kernel, worker):
        client = connect(kernel, V1[:9], source=PROXY)
        yield from settle(kernel)
        [receive] = kernel.in_flight(client.slot, (linux.OP_RECV,))
        kernel.end(receive, error)
        yield from settle(kernel)
        client.incoming.append(V1[9:] + get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [200]

    perform(script, clock, **TRUSTED)


def fill(kernel, worker, **options):
    """A client that is busy, so that one more is let in and has to wait: for one connection at the most. In steps."""
    busy = connect(kernel, get(b"/"))
    yield from settle(kernel)
    yield from seconds(kernel, 1)
    busy.room = 0
    busy.incoming.append(get(b"/big"))
    parked = connect(kernel, **options)
    yield from settle(kernel)
    assert len(worker.acceptor.parked) == 1
    return busy, parked


def test_parked_before_the_header(clock):
    """Nothing is read and no time runs until there is room."""
    def script(kernel, worker):
        busy, parked = yield from fill(kernel, worker, source=PROXY)
        assert worker.connections.slots[parked.slot].state is PREFACE
        parked.incoming.append(V1 + get(b"/"))
        yield from seconds(kernel, 6)
        assert parked.incoming
        busy.reset = True
        yield from settle(kernel)
        assert statuses(parked) == [200]

    perform(script, clock, Limits(max_connections=1, header_timeout=3), **TRUSTED)


@pytest.mark.parametrize("signals", ((signal.SIGUSR2,), (signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)))
@pytest.mark.parametrize("start", (b"", V1[:9]))
def test_signal_within_the_header(clock, signals, start):
    """Who has come in gets an answer, and it is the last."""
    def script(kernel, worker):
        client = connect(kernel, *[start] * bool(start), source=PROXY)
        yield from settle(kernel)
        for number in signals:
            yield from tell(kernel, number)
        assert not client.closed
        client.incoming.append(V1[len(start):] + get(b"/"))
        yield from settle(kernel)
        assert closes(client) == [True]
        assert client.closed

    assert perform(script, clock, **TRUSTED)


@pytest.mark.parametrize("comes", (False, True))
def test_the_end_comes_though_no_request_does(clock, comes):
    """Nor, perhaps, a header."""
    def script(kernel, worker):
        client = connect(kernel, source=PROXY)
        yield from settle(kernel)
        yield from stop(kernel)
        if comes:
            client.incoming.append(V1)
        yield from seconds(kernel, 7)
        assert client.closed

    assert perform(script, clock, Limits(header_timeout=4, drain=5), **TRUSTED)
    assert clock.now <= 1000 + clock_module.FRESH + 2


# --- accepts that fail

def accepts(kernel, worker):
    return [operation for slot in kernel.listeners
            for operation in kernel.in_flight(slot, (linux.OP_ACCEPT, linux.OP_RECVMSG))]


@pytest.mark.parametrize("error", (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EPERM))
@pytest.mark.parametrize("passing", (False, True))
def test_accept_goes_on_with_the_next_second(clock, error, passing):
    """Not at once: what is missing now would be missing then too."""
    def script(kernel, worker):
        yield from settle(kernel)
        for count in range(1, 4):
            accept = accepts(kernel, worker)[-1]
            kernel.end(accept, error)
            yield from settle(kernel)
            assert not kernel.in_flight(accept.slot, (accept.code,))
            assert worker.counts.accept_errors == count
            yield from seconds(kernel, 1)
            assert kernel.in_flight(accept.slot, (accept.code,))
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [200]

    perform(script, clock, passing=passing)


@pytest.mark.parametrize("error", (errno.ECONNABORTED, errno.EINTR))
def test_accept_goes_on_at_once(clock, error):
    """Behind an error that is the client's or nobody's."""
    def script(kernel, worker):
        yield from settle(kernel)
        [accept] = accepts(kernel, worker)
        kernel.end(accept, error)
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        assert statuses(client) == [200]
        assert worker.counts.accept_errors == 0

    perform(script, clock)


# --- connections that another process passes

def hand_over(kernel, data=b"", rest=b"", passed=True, cut=False, is_stream=True, source=b"192.0.2.1"):
    """A Socket that is passed, `data` that was read from it, and `rest` that was not."""
    client = Socket()
    client.room, client.is_stream, client.source = 10 ** 6, is_stream, source
    client.incoming.extend([rest] * bool(rest))
    kernel.listeners[kernel.passing].queue.append(Datagram(client if passed else None, data, cut))
    return client


@pytest.mark.parametrize("size", (0, 1, 20, 27, 40, 200))
def test_passed_with_what_has_been_read(clock, size):
    def script(kernel, worker):
        stream = get(b"/") + get(b"/one") + get(b"/big")
        client = hand_over(kernel, stream[:size], rest=stream[size:])
        yield from settle(kernel)
        assert statuses(client) == [200] * 3
        assert client.received.endswith(content(b"/big"))
        assert worker.counts.passed == worker.counts.accepted == 1

    perform(script, clock, passing=True)


def test_passed_with_all_that_is_asked(clock):
    """Then nothing more need come."""
    def script(kernel, worker):
        client, last = hand_over(kernel, get(b"/") * 3), hand_over(kernel, get(b"/one", b"Connection: close\r\n"))
        yield from settle(kernel)
        assert statuses(client) == [200] * 3
        assert statuses(last) == [200]
        assert last.closed
        client.incoming.append(get(b"/one"))
        yield from settle(kernel)
        assert statuses(client) == [200] * 4

    perform(script, clock, passing=True)


def test_passed_with_a_hello(clock, engine):    # noqa: F811
    def script(kernel, worker):
        for size in (0, 1, 100, 1000):
            client = Caller(hold=True)
            data, client.unsent = client.unsent[:size], client.unsent[size:]
            kernel.listeners[kernel.passing].queue.append(Datagram(client, data))
            client.hold = False
            client.flush()
            yield from settle(kernel)
            client.ask(get(b"/"))
            yield from settle(kernel)
            assert statuses(client) == [200]

    perform_secure(script, clock, engine, passing=True)


def test_passed_by_a_proxy(clock):
    """The header comes first, wherever it is."""
    def script(kernel, worker):
        for cut in (0, 5, len(V1), len(V1) + 5, 1000):
            stream = V1 + get(b"/")
            client = hand_over(kernel, stream[:cut], stream[cut:], source=PROXY)
            yield from settle(kernel)
            assert statuses(client) == [200]

    perform(script, clock, passing=True, **TRUSTED)


@pytest.mark.parametrize("kind", ("nothing", "cut", "no stream"))
def test_passed_as_it_should_not_be(clock, kind):
    """Whatever was in it is closed, and the next one is served."""
    def script(kernel, worker):
        wrong = hand_over(kernel, get(b"/"), b"", kind != "nothing", kind == "cut", is_stream=kind != "no stream")
        right = hand_over(kernel, get(b"/"))
        yield from settle(kernel)
        assert wrong.closed == (kind != "nothing")
        assert not wrong.received
        assert statuses(right) == [200]
        assert worker.counts.passed == worker.connections.live == 1

    perform(script, clock, passing=True)


def test_passed_when_the_table_is_full(clock):
    """It waits where it is; an idle connection makes room for it."""
    def script(kernel, worker):
        busy = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        waiting = hand_over(kernel, get(b"/"))
        yield from seconds(kernel, 2)
        assert not accepts(kernel, worker)
        assert not waiting.received
        busy.room = 10_000
        yield from settle(kernel)
        yield from seconds(kernel, 1)           # it is idle now
        assert statuses(waiting) == [200]
        assert busy.closed

    perform(script, clock, Limits(max_connections=1), passing=True)


def test_passed_and_parked(clock):
    """What was read before is not lost while it waits."""
    def script(kernel, worker):
        busy = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        busy.room = 0
        busy.incoming.append(get(b"/big"))
        stream = get(b"/") + get(b"/one")
        parked = hand_over(kernel, stream[:-20], stream[-20:])
        yield from settle(kernel)
        assert len(worker.acceptor.parked) == 1
        yield from seconds(kernel, 6)
        assert not parked.received
        busy.reset = True
        yield from settle(kernel)
        assert statuses(parked) == [200, 200]

    perform(script, clock, Limits(max_connections=1, header_timeout=3), passing=True)


def test_no_descriptor_left_for_what_is_passed(clock):
    """The kernel drops it then (MSG_CTRUNC); it is as if it had never come."""
    def script(kernel, worker):
        clients = [connect(kernel, get(b"/big"), room=0) for _ in range(2)]
        yield from settle(kernel)
        kernel.slots = 2
        lost = hand_over(kernel, get(b"/"))
        yield from settle(kernel)
        assert kernel.counts["passed in vain"]
        assert not lost.received
        assert worker.connections.live == 2
        kernel.slots = 4
        assert statuses(clients[0]) == []
        late = hand_over(kernel, get(b"/"))
        yield from settle(kernel)
        assert statuses(late) == [200]

    perform(script, clock, Limits(max_connections=3), passing=True)


# --- retiring

def test_retire_while_idle(clock):
    """A request that is on its way is answered, and told that it is the last."""
    def script(kernel, worker):
        client, fresh = connect(kernel, get(b"/")), connect(kernel)
        yield from settle(kernel)
        yield from retire(kernel)
        assert not accepts(kernel, worker)
        assert not worker.acceptor.listeners
        assert not client.closed
        assert not fresh.closed
        for waiting in (client, fresh):
            waiting.incoming.append(get(b"/one"))
        yield from settle(kernel)
        assert closes(client) == [False, True]
        assert closes(fresh) == [True]
        assert client.closed
        assert fresh.closed

    assert perform(script, clock)
    assert clock.now == 1000


def test_retire_without_anybody(clock):
    def script(kernel, worker):
        yield from settle(kernel)
        yield from retire(kernel)

    assert perform(script, clock, passing=True, log="json")
    assert clock.now == 1000


def test_retired_connections_stay_idle_as_long_as_there_is_time_to_drain(clock):
    def script(kernel, worker):
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from retire(kernel)
        yield from seconds(kernel, 5)
        assert not client.closed
        yield from seconds(kernel, 2)

    assert perform(script, clock, Limits(drain=5))


@pytest.mark.parametrize("times", (1, 5))
@pytest.mark.parametrize("pipelined", (0, 3))
def test_retire_during_a_response(clock, times, pipelined):
    """`times` 5: it comes from memory by then. What is behind it is answered until something says it is the last."""
    def script(kernel, worker):
        client = connect(kernel)
        yield from settle(kernel)
        for _ in range(times - 1):
            client.incoming.append(get(b"/"))
            yield from settle(kernel)
        client.room = 10
        client.incoming.append(get(b"/"))
        yield from settle(kernel)
        if pipelined:
            client.incoming.append(get(b"/one") * pipelined)
            yield from settle(kernel)
        yield from retire(kernel)
        client.room = 10_000
        yield from settle(kernel)
        assert closes(client) == [False] * times + [True] * bool(pipelined)
        if not pipelined:
            client.incoming.append(get(b"/"))
            yield from settle(kernel)
            assert closes(client) == [False] * times + [True]
        client.eof = True
        yield from settle(kernel)

    assert perform(script, clock)
    assert clock.now == 1000


@pytest.mark.parametrize("expects", (b"", b"Expect: 100-continue\r\n"))
def test_retire_during_a_request(clock, expects):
    def script(kernel, worker):
        request = get(b"/", b"Content-Length: 5\r\n" + expects)
        client, half = connect(kernel, request, room=1), connect(kernel, b"GET /on")
        yield from settle(kernel)
        yield from retire(kernel)
        client.room = 10_000
        half.incoming.append(b"e HTTP/1.1\r\nHost: a\r\n\r\n")
        yield from settle(kernel)
        client.incoming.append(b"12345")
        yield from settle(kernel)
        assert statuses(client) == [100] * bool(expects) + [200]
        assert closes(client)[-1]
        assert closes(half) == [True]

    assert perform(script, clock)


@each_version
@pytest.mark.parametrize("asks", (False, True))
def test_retire_during_the_handshake(clock, engine, version, asks):     # noqa: F811
    """It ends as ever, and one request is answered: with its end, or later."""
    def script(kernel, worker):
        client = call(kernel, version=version, hold=True)
        client.push()
        yield from settle(kernel)
        assert worker.connections.slots[client.slot].state is IN_HANDSHAKE
        yield from retire(kernel)
        if asks and version == "1.3":
            client.say(get(b"/"))
        client.push()
        yield from settle(kernel)
        assert client.closed == (asks and version == "1.3")
        if not client.closed:
            yield from seconds(kernel, 2)
            client.ask(get(b"/"))
            yield from settle(kernel)
        assert closes(client) == [True]
        assert client.notified
        assert ended(worker, client)

    assert perform_secure(script, clock, engine)


def test_retire_with_tls(clock, engine):        # noqa: F811
    """Idle connections get one more answer, or close_notify when their time is over."""
    clients = []

    def script(kernel, worker):
        client, silent, busy = (call(kernel) for _ in range(3))
        clients.extend((client, silent, busy))
        yield from settle(kernel)
        for each in (client, silent):
            each.ask(get(b"/"))
        yield from settle(kernel)
        busy.room = 100
        busy.ask(get(b"/large"), get(b"/one"), get(b"/one"))
        yield from settle(kernel)
        yield from retire(kernel)
        client.ask(get(b"/one"), get(b"/one"))
        yield from settle(kernel)
        assert closes(client) == [False, True]
        busy.room = 10 ** 6
        yield from settle(kernel)
        assert closes(busy) == [False, True]
        assert not silent.closed
        for _ in range(20):
            yield from seconds(kernel, 1)

    assert perform_secure(script, clock, engine, Limits(drain=5))
    assert all(client.notified for client in clients)


@pytest.mark.parametrize("numbers", ((signal.SIGUSR2, signal.SIGUSR2), (signal.SIGUSR1, signal.SIGUSR2),
                                     (signal.SIGUSR2, signal.SIGUSR1)))
def test_signals_of_which_each_says_the_same(clock, numbers):
    def script(kernel, worker):
        client = connect(kernel, get(b"/"))
        yield from settle(kernel)
        kernel.signals.extend(numbers)
        yield from settle(kernel)
        assert not client.closed
        client.incoming.append(get(b"/"))
        yield from settle(kernel)
        assert closes(client) == [False, True]

    assert perform(script, clock)


def test_stop_after_retiring(clock):
    """What is idle is closed, what is being sent is sent."""
    def script(kernel, worker):
        idle, busy = connect(kernel, get(b"/")), connect(kernel, get(b"/big"), room=10)
        yield from settle(kernel)
        yield from retire(kernel)
        yield from stop(kernel)
        assert idle.closed
        assert not busy.closed
        busy.room = 10_000
        yield from settle(kernel)
        assert statuses(busy) == [200]

    assert perform(script, clock)
    assert clock.now == 1000


@pytest.mark.parametrize("stops", (0, 1))
def test_the_end_at_once_after_retiring(clock, stops):
    def script(kernel, worker):
        connect(kernel, get(b"/big"), room=10)
        yield from settle(kernel)
        yield from retire(kernel)
        for _ in range(stops):
            yield from stop(kernel)
        yield from end_at_once(kernel)

    assert perform(script, clock)
    assert clock.now == 1000


def test_drain_has_an_end_after_retiring(clock):
    def script(kernel, worker):
        connect(kernel, get(b"/big"), room=10)
        yield from settle(kernel)
        yield from retire(kernel)
        yield from stop(kernel)
        yield from seconds(kernel, 4)
        assert worker.connections.live == 1
        yield from seconds(kernel, 3)

    assert perform(script, clock, Limits(drain=5))


def test_lame_duck(clock):
    """All goes on, but each response is the last of its connection."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/"), room=10)
        yield from settle(kernel)
        yield from tell(kernel, signal.SIGUSR1)
        client.room = 10_000
        yield from settle(kernel)
        assert not client.closed
        client.incoming.append(get(b"/"))
        for _ in range(5):
            late = connect(kernel, get(b"/"))
            yield from settle(kernel)
            assert closes(late) == [True]
            assert late.closed
        assert closes(client) == [False, True]
        yield from stop(kernel)

    assert perform(script, clock)
    assert clock.now == 1000


def test_what_waits_while_the_listeners_are_left_is_let_in(clock):
    """The kernel may have woken us for it, and nobody else."""
    clients = []

    def script(kernel, worker):
        yield from settle(kernel)
        kernel.stuck = linux.OP_ACCEPT, linux.OP_RECVMSG
        yield from retire(kernel)
        for accept in accepts(kernel, worker):
            assert accept.cancelled
        clients.extend((connect(kernel, get(b"/")), connect(kernel, get(b"/")), hand_over(kernel, get(b"/"))))
        kernel.stuck = ()
        yield from settle(kernel)

    assert perform(script, clock, passing=True)
    assert [closes(client) for client in clients] == [[True]] * 3


@pytest.mark.parametrize("passing", (False, True))
def test_a_connection_of_which_somebody_else_was_told_who_is_no_more(clock, passing):
    """It stays in the queue; but an accept that is armed anew takes it."""
    def script(kernel, worker):
        yield from settle(kernel)
        kernel.stuck = linux.OP_ACCEPT, linux.OP_RECVMSG
        clients = [connect(kernel, get(b"/")), *(hand_over(kernel, get(b"/")) for _ in range(passing))]
        yield from settle(kernel)
        assert not any(client.received for client in clients)
        yield from tell(kernel, clock_module.LOOK_AGAIN)
        for accept in accepts(kernel, worker):
            assert accept.cancelled
            kernel.go_on(accept)
        yield from settle(kernel)
        assert [closes(client) for client in clients] == [[False]] * len(clients)
        assert len(accepts(kernel, worker)) == 1 + passing

    perform(script, clock, passing=passing)


def test_a_full_table_leaves_others_to_others(clock):
    """Nothing is armed then, so nobody waits for us."""
    def script(kernel, worker):
        busy = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        waiting = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from retire(kernel)
        assert not worker.acceptor.listeners
        busy.room = 10_000
        busy.incoming.append(get(b"/one"))
        yield from settle(kernel)
        assert closes(busy) == [False, True]
        assert not waiting.received

    assert perform(script, clock, Limits(max_connections=1))


def test_leaving_comes_to_an_end_though_others_keep_coming(clock):
    """One waits whenever we look. They are let in by who has taken over, as it were, and not by us for ever."""
    def script(kernel, worker):
        [listener] = kernel.listeners.values()

        def on_enter(waiting):
            assert worker.counts.accepted < 1000, "it goes on and on"
            kernel.clock.now += 0.005
            while len(listener.queue) < 2:
                connect(kernel, get(b"/"))
            for operation in [operation for operation in kernel.operations if operation.code == linux.OP_TIMEOUT]:
                kernel.go_on(operation)

        yield from settle(kernel)
        kernel.on_enter = on_enter
        kernel.signals.append(signal.SIGUSR2)
        while worker.acceptor.listeners:
            kernel.go_on_all()
            yield
        kernel.on_enter = lambda waiting: None
        yield from settle(kernel)

    assert perform(script, clock)


def test_leaving_without_descriptors_comes_to_an_end(clock):
    """Somebody waits, and cannot be let in: that is for others to do, and no reason to try for ever."""
    def script(kernel, worker):
        busy = connect(kernel, get(b"/"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        kernel.stuck = (linux.OP_ACCEPT,)
        yield from retire(kernel)
        kernel.slots = 1
        connect(kernel, get(b"/"))
        kernel.stuck = ()
        for _ in range(10):
            kernel.go_on_all()
            yield
        assert worker.counts.accept_errors <= 2
        busy.eof = True
        yield from settle(kernel)

    assert perform(script, clock)


# --- archives that are not in memory

LAZY = {"lazy": True}


def populating(kernel):
    return [operation for operation in kernel.operations if operation.code == linux.OP_MADVISE]


def until_populating(kernel, client, count=1):
    """Let a client's request come to where pages are being brought in, and no further. In steps."""
    kernel.stuck = (linux.OP_MADVISE,)
    yield from settle(kernel)
    assert len(populating(kernel)) == count, populating(kernel)
    assert not client.received


def test_cold_pages_keep_nobody_else_waiting(clock):
    def script(kernel, worker):
        client, other = connect(kernel, get(b"/big")), connect(kernel)
        yield from until_populating(kernel, client)
        other.incoming.append(get(b"/no"))
        yield from settle(kernel)
        assert statuses(other) == [404]
        kernel.stuck = ()
        yield from settle(kernel)
        assert client.received.endswith(content(b"/big"))
        assert worker.counts.cold == 1
        other.incoming.append(get(b"/big", b"Range: bytes=0-9\r\n"))
        yield from settle(kernel)
        assert worker.counts.cold == 1, "they are in memory now"
        assert kernel.counts["in memory"]

    perform(script, clock, **LAZY)


def test_cold_pages_wait_for_room_first(clock):
    """What nobody takes need not be read."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        assert not populating(kernel)
        [poll] = kernel.in_flight(client.slot, (linux.OP_POLL_ADD,))
        assert [other.code for other in poll.behind] == [linux.OP_MADVISE, linux.OP_SENDMSG]
        client.room = 10_000
        yield from settle(kernel)
        assert statuses(client) == [200]

    perform(script, clock, **LAZY)


@pytest.mark.parametrize("known", (False, True))
def test_each_piece_is_looked_for(clock, known, monkeypatch):
    monkeypatch.setattr("plan.COLD_SEND_SIZE", 700)

    def script(kernel, worker):
        client = connect(kernel)
        for _ in range(4 if known else 1):
            kernel.warm.clear()
            kernel.assured.clear()
            worker.site.memo.forget_requests()
            client.incoming.append(get(b"/large"))
            yield from settle(kernel)
        assert client.received.endswith(content(b"/large"))
        assert kernel.counts["populated"] >= 20_000 // 700

    perform(script, clock, **LAZY)


def test_many_parts_are_one_chain(clock):
    """There is one completion for all of it."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/large", b"Range: bytes=%b\r\n" % b",".join(
            b"%d-%d" % (start, start + 9) for start in range(0, 16_000, 1000))))
        yield from settle(kernel)
        assert kernel.counts["populated"] == 16
        assert not kernel.counts["torn chain"]
        assert statuses(client) == [206]

    perform(script, clock, **LAZY)


@pytest.mark.parametrize("entries", (8, 16, 32))
def test_many_parts_and_a_small_queue(clock, entries):
    """A chain is one submission, and more than fits into the queue is none: the rest is read when it is sent."""
    def script(kernel, worker):
        calls, kernel.lasts = [], float("inf")

        def on_enter(waiting):
            calls.append(waiting)
            assert len(calls) < 1000, "the worker is stuck"

        kernel.on_enter = on_enter
        client = connect(kernel, get(b"/large", b"Range: bytes=%b\r\n" % b",".join(
            b"%d-%d" % (start, start + 9) for start in range(0, 16_000, 1000))))
        yield from settle(kernel)
        assert statuses(client) == [206]
        assert kernel.counts["populated"] == min(entries - 2, 16)

    perform(script, clock, entries=entries, **LAZY)


@pytest.mark.parametrize("when", ("waiting for room", "queued", "being read"))
@pytest.mark.parametrize("why", ("reset", "time", "stop"))
def test_cold_pages_are_not_waited_for_longer_than_anything(clock, when, why):
    """The connection is closed once nothing is in flight; what a disk is read for already comes to its end first."""
    def script(kernel, worker):
        client = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        if when != "waiting for room":
            client.room = 10_000
            yield from until_populating(kernel, client)
            populating(kernel)[0].started_work = when == "being read"
        if why == "reset":
            client.reset = True
            yield from settle(kernel)
        elif why == "time":
            yield from seconds(kernel, connection_module.SEND_GRACE + 5)
        else:
            yield from stop(kernel)
            assert worker.connections.live == 1
            yield from end_at_once(kernel)
            return
        assert client.closed == (when == "waiting for room")
        assert worker.connections.slots[client.slot].state is (FREE if client.closed else CLOSING)
        kernel.stuck = ()
        yield from settle(kernel)
        assert client.closed
        assert worker.connections.live == 0
        if when != "being read":
            assert not client.received

    assert perform(script, clock, **LAZY) == (why == "stop")


@pytest.mark.parametrize("error", (errno.EFAULT, errno.EAGAIN, errno.ENOMEM, errno.EIO))
def test_pages_that_cannot_be_had_cut_the_response_off(clock, error):
    def script(kernel, worker):
        client, other = connect(kernel, get(b"/big") + get(b"/one")), connect(kernel)
        yield from until_populating(kernel, client)
        kernel.end(populating(kernel)[0], error)
        kernel.stuck = ()
        yield from settle(kernel)
        assert client.closed
        assert not client.received
        assert worker.counts.faults == (error == errno.EFAULT)
        other.incoming.append(get(b"/big"))
        yield from settle(kernel)
        assert statuses(other) == [200]

    perform(script, clock, **LAZY)


def test_a_known_request_waits_for_cold_pages_like_the_first_one(clock):
    """It is known from its second time on; whoever asks then must not be sent what has not come yet."""
    def script(kernel, worker):
        clients = [connect(kernel) for _ in range(4)]
        yield from settle(kernel)
        kernel.stuck = (linux.OP_MADVISE,)
        for client in clients:
            client.incoming.append(get(b"/"))
            yield from settle(kernel)
        assert not any(client.received for client in clients)
        kernel.stuck = ()
        yield from settle(kernel)
        assert [statuses(client) for client in clients] == [[200]] * 4

    perform(script, clock, **LAZY)


def test_what_is_known_is_looked_for_again(clock):
    """What was in memory may have gone after a while."""
    def script(kernel, worker):
        kernel.lasts = WARM_SECONDS + 2
        client = connect(kernel)
        for second in range(3 * WARM_SECONDS):
            client.incoming.append(get(b"/"))
            yield from settle(kernel)
            yield from seconds(kernel, 1)
            if second == WARM_SECONDS:
                kernel.warm.clear()
        assert statuses(client) == [200] * 3 * WARM_SECONDS
        assert worker.counts.memo_hits > WARM_SECONDS
        assert worker.counts.cold == 2

    perform(script, clock, **LAZY)


@each_version
@pytest.mark.parametrize("path", (b"/", b"/big", b"/large"))
def test_cold_pages_over_tls(clock, engine, way, version, path):        # noqa: F811
    def script(kernel, worker):
        client, other = call(kernel, version=version), call(kernel, version=version)
        yield from settle(kernel)
        before = len(client.received)
        kernel.stuck = linux.OP_MADVISE, linux.OP_READ
        client.ask(get(path))
        yield from settle(kernel)
        assert len(client.received) == before
        other.ask(get(b"/no"))
        yield from settle(kernel)
        assert statuses(other) == [404]
        kernel.stuck = ()
        yield from settle(kernel)
        assert client.received.endswith(content(path))
        assert kernel.counts["read from the file" if way == "userspace" else "populated"]
        for _ in range(4):
            client.ask(get(path))
            yield from settle(kernel)
            yield from seconds(kernel, 4)
            kernel.warm.clear()
        assert statuses(client) == [200] * 5

    perform_secure(script, clock, engine, Limits(keepalive_timeout=60), **LAZY)


@pytest.mark.parametrize("when", ("queued", "being read"))
def test_going_while_cold_pages_are_brought_in_over_tls(clock, in_kernel, when):        # noqa: F811
    def script(kernel, worker):
        client = call(kernel)
        yield from settle(kernel)
        client.ask(get(b"/big"))
        yield from until_populating(kernel, client)
        populating(kernel)[0].started_work = when == "being read"
        client.reset = True
        yield from settle(kernel)
        assert not client.closed
        kernel.stuck = ()
        yield from settle(kernel)
        assert ended(worker, client)

    perform_secure(script, clock, in_kernel, **LAZY)


# --- the access log

LOGGED = {"log": "combined"}


def lines(kernel):
    return bytes(kernel.log).decode().splitlines()


def test_lines_are_written_each_second_and_at_the_end(clock):
    def script(kernel, worker):
        client = connect(kernel, get(b"/") * 5)
        yield from settle(kernel)
        assert not kernel.log
        yield from seconds(kernel, 1)
        assert len(lines(kernel)) == 5
        client.incoming.append(get(b"/one") * 3)
        yield from settle(kernel)
        assert len(lines(kernel)) == 5
        logs.append(kernel)
        yield from stop(kernel)

    logs = []
    assert perform(script, clock, **LOGGED)
    assert len(lines(logs[0])) == 8
    assert clock.now == 1001


def test_many_lines_do_not_wait_for_the_second(clock):
    def script(kernel, worker):
        connect(kernel, get(b"/") * 1000)
        yield from settle(kernel)
        assert len(lines(kernel)) > 500

    perform(script, clock, **LOGGED)


def test_lines_tell_of_what_was_sent(clock):
    """Of the same request again and again, and of responses cut off in the middle and before their beginning."""
    def script(kernel, worker):
        client = connect(kernel)
        for _ in range(4):
            client.incoming.append(get(b"/big"))
            yield from settle(kernel)
        head = len(client.received) // 4 - len(content(b"/big"))
        client.room = head + 100
        client.incoming.append(get(b"/big"))
        yield from settle(kernel)
        client.reset = True
        other = connect(kernel, get(b"/big"), room=0)
        yield from settle(kernel)
        other.reset = True
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        assert [line.split()[-3] for line in lines(kernel)] == ["2800"] * 4 + ["100", "-"]

    perform(script, clock, **LOGGED)


def test_each_line_tells_of_its_own_request(clock):
    """However they come: one by one, several at once, in pieces, and after 100 (Continue)."""
    def script(kernel, worker):
        stream = b"".join(get(b"/one", b"X: 1\r\nReferer: r%d\r\n" % i) + get(b"/") for i in range(3))
        stream += get(b"/", b"Content-Length: 3\r\nExpect: 100-continue\r\n")
        client = connect(kernel, stream)
        yield from settle(kernel)
        client.incoming.append(b"abc" + get(b"/one", b"User-Agent: a\r\n"))
        for byte in stream:
            client.incoming.append(bytes([byte]))
            yield from settle(kernel)
        yield from seconds(kernel, 1)
        fields = [line.split('"')[1::2] for line in lines(kernel)]
        round_ = [["GET / HTTP/1.1", "-", "-"]]
        for i in reversed(range(3)):
            round_ = [["GET /one HTTP/1.1", f"r{i}", "-"], ["GET / HTTP/1.1", "-", "-"], *round_]
        assert fields == [*round_, ["GET /one HTTP/1.1", "-", "a"], *round_[:-1]]

    perform(script, clock, **LOGGED)


@each_version
def test_each_line_tells_of_its_own_request_over_tls(clock, engine, version):       # noqa: F811
    def script(kernel, worker):
        client, other = call(kernel, version=version), call(kernel, version=version)
        yield from settle(kernel)
        asked = [b"/", b"/one", b"/", b"/large"] * 5
        for path in asked:
            for each in (client, other):
                each.ask(get(path))
                yield from settle(kernel)
        client.ask(get(b"/"), get(b"/one"), get(b"/"))
        yield from seconds(kernel, 1)
        yield from seconds(kernel, 1)
        wanted = [path for path in asked for _ in range(2)] + [b"/", b"/one", b"/"]
        assert [line.split()[6].encode() for line in lines(kernel)] == wanted
        assert [int(line.split()[9]) for line in lines(kernel)] == [FILES[path][1] for path in wanted]

    perform_secure(script, clock, engine, **LOGGED)


@pytest.mark.parametrize("size", (1, 50, 100))
def test_short_writes(clock, size):
    def script(kernel, worker):
        kernel.stuck = (linux.OP_WRITE,)
        connect(kernel, get(b"/") + get(b"/one") + get(b"/no"))
        yield from settle(kernel)
        yield from seconds(kernel, 1)
        while writes := [operation for operation in kernel.operations if operation.code == linux.OP_WRITE]:
            kernel.go_on(writes[0], size)
            yield
        assert [line.split()[8] for line in lines(kernel)] == ["200", "200", "404"]

    perform(script, clock, **LOGGED)


def failing_log(clock, error, after=0):
    """Run a worker whose log fails from the write behind its first `after` bytes on, until it is told to stop.

    Gives the worker and its kernel."""
    kept = []

    def script(kernel, worker):
        kept.extend((worker, kernel))
        kernel.stuck = (linux.OP_WRITE,)
        connect(kernel, get(b"/") * 3)
        yield from settle(kernel)
        yield from stop(kernel)
        for i in range(20):
            for write in [operation for operation in kernel.operations if operation.code == linux.OP_WRITE]:
                if i == 0 and after:
                    kernel.go_on(write, after)
                elif error:
                    kernel.end(write, error)
                yield
            yield from seconds(kernel, 1)

    assert perform(script, clock, **LOGGED)
    return kept


@pytest.mark.parametrize("after", (0, 10, 100))
def test_a_log_that_fails_at_the_end_holds_nobody_up(clock, after):
    """All is dropped, and counted, but for the rest of a line that was begun: that is tried for a while."""
    worker, kernel = failing_log(clock, errno.ENOSPC, after)
    assert len(kernel.log) == after
    begun = kernel.log.count(b"\n") + bool(after)
    assert worker.access_log.dropped == 3 - begun
    assert clock.now <= 1000 + (clock_module.LOG_GRACE + 1 if after else 1)


@pytest.mark.parametrize("error", (errno.EAGAIN, errno.EINTR, None))
def test_a_log_that_takes_nothing_at_the_end_is_waited_for_a_while(clock, error):
    """None: the write does not end."""
    worker, kernel = failing_log(clock, error)
    assert not kernel.log
    assert clock_module.LOG_GRACE <= clock.now - 1000 <= clock_module.LOG_GRACE + 2


@pytest.mark.parametrize("error", (errno.EAGAIN, errno.EINTR))
def test_a_log_that_has_no_room_at_the_end_is_tried_again(clock, error):
    def script(kernel, worker):
        kept.append(kernel)
        kernel.stuck = (linux.OP_WRITE,)
        connect(kernel, get(b"/") * 3)
        yield from settle(kernel)
        yield from stop(kernel)
        [write] = [operation for operation in kernel.operations if operation.code == linux.OP_WRITE]
        kernel.end(write, error)
        kernel.stuck = ()
        yield from settle(kernel)
        yield from seconds(kernel, 1)

    kept = []
    assert perform(script, clock, **LOGGED)
    assert len(lines(kept[0])) == 3
    assert clock.now == 1001


def test_a_log_that_works_again(clock):
    def script(kernel, worker):
        client = connect(kernel)
        for error in (errno.ENOSPC, errno.EIO, errno.EPIPE):
            kernel.stuck = (linux.OP_WRITE,)
            client.incoming.append(get(b"/"))
            yield from settle(kernel)
            yield from seconds(kernel, 1)
            [write] = [operation for operation in kernel.operations if operation.code == linux.OP_WRITE]
            kernel.end(write, error)
            kernel.stuck = ()
            client.incoming.append(get(b"/one"))
            yield from settle(kernel)
            yield from seconds(kernel, 1)
        assert ['"GET /one' in line for line in lines(kernel)] == [True] * 3
        assert worker.access_log.dropped == 3

    perform(script, clock, **LOGGED)
