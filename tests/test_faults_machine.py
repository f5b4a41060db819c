"""Operations that the kernel ends with an error, each kind with each error, on the simulated ring: what that costs is
the connection or the log line concerned, and nothing else changes.

In reality most of these need a kernel without memory at the very moment, so they can be had here alone.
"""

import errno

import pytest
from machine import connect, get, make_small, perform, seconds, settle, statuses

import linux
from connection import FREE

PASSING = "ENOMEM", "EINTR", "EAGAIN", "ECANCELED"
OF_A_SOCKET = *PASSING, "ECONNRESET", "EPIPE", "ETIMEDOUT", "ENOBUFS"
# kind -> (code of its operations, errors); those of connections, and those of a worker.
THEIRS = {
    "receive": (linux.OP_RECV, OF_A_SOCKET), "first part": (linux.OP_SENDMSG, (*OF_A_SOCKET, "EFAULT")),
    "next part": (linux.OP_SEND, (*OF_A_SOCKET, "EFAULT")), "wait for room": (linux.OP_POLL_ADD, PASSING),
    "read from the disk": (linux.OP_MADVISE, (*PASSING, "EFAULT", "EIO", "EBADF")),
    "end of our side": (linux.OP_SHUTDOWN, (*PASSING, "ENOTCONN")),
}
OURS = {
    "accept": (linux.OP_ACCEPT, (*PASSING, "ENFILE", "EMFILE", "ENOBUFS", "ECONNABORTED", "EPROTO", "EPERM")),
    "tick": (linux.OP_TIMEOUT, PASSING), "signal": (linux.OP_READ, PASSING),
    "write of the log": (linux.OP_WRITE, (*PASSING, "ENOSPC", "EIO", "EDQUOT", "EFBIG", "EPIPE")),
}
LAZY = "wait for room", "read from the disk"
UNREAD = get(b"/one", b"Content-Length: 5000\r\n", method=b"POST")     # answered, and listened to for a while


@pytest.fixture
def clock(monkeypatch):
    return make_small(monkeypatch)


def each(kinds):
    return [(kind, error) for kind, (_, errors) in kinds.items() for error in errors]


def find(kernel, code, slot=None):
    return next((one for one in kernel.operations if one.code == code and slot in (None, one.slot)), None)


def goes_on(kernel, worker, kept):
    """Whoever is there is served, and who comes now."""
    newcomer = connect(kernel, get(b"/one"))
    before = len(statuses(kept))
    kept.incoming.append(get(b"/more"))
    yield from seconds(kernel, 3)
    assert (statuses(kept)[before:], statuses(newcomer)) == ([200], [200])
    assert worker.clock.stop_at is None and not worker.stale


def reach(kernel, kind, code, client):
    """Have such an operation in flight for a client."""
    kernel.stuck = (code,)
    client.incoming.append({"receive": get(b"/one"), "end of our side": UNREAD}.get(kind, get(b"/big")))
    yield from settle(kernel)


@pytest.mark.parametrize(("kind", "error"), each(THEIRS))
def test_p16_an_operation_of_a_connection_fails(clock, kind, error):
    code, _ = THEIRS[kind]

    def script(kernel, worker):
        kept, client = connect(kernel, get(b"/one")), connect(kernel)
        yield from settle(kernel)
        yield from reach(kernel, kind, code, client)
        slot = client.slot
        operation = find(kernel, code, slot)
        kernel.stuck = ()
        kernel.complete(operation, -getattr(errno, error))
        yield from goes_on(kernel, worker, kept)
        if kind == "end of our side":               # it is listened to a little longer
            yield from seconds(kernel, 4)
            assert client.closed
        if client.closed:
            assert worker.connections.slots[slot].state is FREE or kernel.sockets[slot] is not client
        else:
            yield from goes_on(kernel, worker, client)

    perform(script, clock, lazy=kind in LAZY)


@pytest.mark.parametrize(("kind", "error"), each(OURS))
def test_p16_an_operation_of_a_worker_fails(clock, kind, error):
    code, _ = OURS[kind]

    def script(kernel, worker):
        kernel.stuck = (linux.OP_WRITE,)
        kept = connect(kernel)
        for _ in range(3):
            kept.incoming.append(get(b"/one"))
            yield from seconds(kernel, 2)           # what has failed is tried again within one
            kernel.complete(find(kernel, code), -getattr(errno, error))
            yield from settle(kernel)
        kernel.stuck = ()
        yield from goes_on(kernel, worker, kept)
        yield from goes_on(kernel, worker, kept)
        assert worker.access_log.written >= 4 and worker.access_log.written + worker.access_log.dropped == 7

    perform(script, clock, log="combined")
