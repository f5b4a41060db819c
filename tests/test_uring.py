"""The ring, on the real kernel: each operation, both queues at their ends, and what is said when it fails."""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import linux
import simulated
import uring
from linux import Message
from uring import PolledRing, Ring, RingError

SLOTS = 4                   # connections at a time
NO_FILE = 1 << 20           # a descriptor that is not open
EXTREMES = (0, 1, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@pytest.fixture(params=[(Ring, True), (Ring, False), (PolledRing, True), (PolledRing, False)],
                ids=["liburing", "syscall", "sqpoll-liburing", "sqpoll-syscall"])
def make(request):
    """make(**options) -> a ring of each kind in turn."""
    kind, use_liburing = request.param
    if use_liburing and load_name() != "Liburing":
        pytest.skip("liburing is not installed")
    rings = []

    def begin(**options):
        options = {"entries": 8, "buffers": 4, "buffer_size": 64, "sqpoll_ms": 20, **options}
        ring = kind(SLOTS, use_liburing=use_liburing, **options)
        rings.append(ring)
        return ring

    yield begin
    for ring in rings:
        os.close(ring.fd)


def load_name():
    return type(uring.load_calls()).__name__


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(10)
        yield sock


@pytest.fixture
def ring(make):
    return make()


def connect(listener):
    client = socket.create_connection(listener.getsockname(), timeout=10)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def take(ring, count, seconds=10):
    """`count` completions, or as many as come in time."""
    found, deadline = [], time.monotonic() + seconds
    timespec = bytearray(struct.pack("=qq", 0, 50_000_000))
    ring.arm_timeout(0xABCDEF, timespec)        # so that waiting for what never comes is not forever
    while len(found) < count and time.monotonic() < deadline:
        for completion in ring.wait():
            if completion[0] == 0xABCDEF:
                ring.arm_timeout(0xABCDEF, timespec)
            else:
                found.append(completion)
    ring.arm_cancel(0xABCDEF, 0xABCDEF, 0)
    over = False
    while not over:
        for completion in ring.wait():
            over = over or completion[0] == 0xABCDEF
            if completion[0] != 0xABCDEF:       # it came at the last moment
                found.append(completion)
    return found


def accept(ring, listener):
    """(client, slot) of one connection."""
    client = connect(listener)
    ring.arm_accept(9, listener.fileno(), False)
    [(tag, _, slot, flags)] = take(ring, 1)
    assert tag == 9
    assert not flags & linux.CQE_MORE
    assert slot >= 0, os.strerror(-slot)
    return client, slot


def piece(ring, result, flags):
    """What a receive got, its buffer given back."""
    assert flags & linux.CQE_BUFFER
    i = flags >> linux.CQE_BUFFER_SHIFT
    data = ring.pool[i * ring.buffer_size:i * ring.buffer_size + result]
    ring.give_back(i)
    return data


# --- operations

def test_multishot_accept_takes_all(ring, listener):
    ring.arm_accept(5, listener.fileno(), True)
    clients = [connect(listener) for _ in range(SLOTS)]
    completions = take(ring, len(clients))
    assert [(tag, epoch) for tag, epoch, _, _ in completions] == [(5, 0)] * SLOTS
    assert all(os.fstat(result) for _, _, result, _ in completions)
    assert all(flags & linux.CQE_MORE for *_, flags in completions)


def test_accept_stays_below_the_limit_of_files(ring, listener):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(listener):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            ring.arm_accept(5, listener.fileno(), True)
            [(_, _, result, flags)] = take(ring, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result == -errno.EMFILE
    assert not flags & linux.CQE_MORE


def test_closed_slot_is_used_again(ring, listener):
    first, slot = accept(ring, listener)
    ring.arm_close(7, 1, slot)
    others = {accept(ring, listener)[1] for _ in range(SLOTS)}
    assert slot in others
    assert first.recv(1) == b""


def test_close_of_a_free_slot_completes(ring):
    ring.arm_close(7, 3, NO_FILE)
    assert take(ring, 1) == [(7, 3, -errno.EBADF, 0)]


def test_single_accept_takes_one(ring, listener):
    accept(ring, listener)
    with connect(listener):
        assert take(ring, 1, seconds=0.2) == []


def test_multishot_receive_in_pieces(ring, listener):
    client, slot = accept(ring, listener)
    ring.arm_recv(slot, 77, slot)
    for data in (b"one", b"two", b"x" * 64):
        client.sendall(data)
        [(tag, epoch, result, flags)] = take(ring, 1)
        assert (tag, epoch) == (slot, 77)
        assert flags & linux.CQE_MORE
        assert piece(ring, result, flags) == data
    client.shutdown(socket.SHUT_WR)
    [(tag, epoch, result, flags)] = take(ring, 1)
    assert (tag, epoch, result) == (slot, 77, 0)
    assert not flags & (linux.CQE_MORE | linux.CQE_BUFFER)      # but others: that there is more to read, the end of it


def test_receive_that_is_not_multishot_ends_with_its_data(ring, listener):
    client, slot = accept(ring, listener)
    ring.arm_recv(slot, 1, slot, multishot=False)
    client.sendall(b"hello")
    [(_, _, result, flags)] = take(ring, 1)
    assert not flags & linux.CQE_MORE
    assert piece(ring, result, flags) == b"hello"


def test_receive_of_a_reset_connection(ring, listener):
    client, slot = accept(ring, listener)
    ring.arm_recv(slot, 1, slot)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert take(ring, 1) == [(slot, 1, -errno.ECONNRESET, 0)]


def test_receive_goes_on_after_it_was_out_of_buffers(ring, listener):
    """More than all buffers hold; given back in any order, they carry the bytes in theirs."""
    rnd = random.Random(1)
    client, slot = accept(ring, listener)
    sent = rnd.randbytes(20_000)
    client.sendall(sent)
    ring.arm_recv(slot, 1, slot)
    received, ends = b"", 0
    while len(received) < len(sent):
        held = []
        more = True
        while more:
            for _, _, result, flags in take(ring, 1):
                more = flags & linux.CQE_MORE
                if result > 0:
                    i = flags >> linux.CQE_BUFFER_SHIFT
                    received += ring.pool[i * ring.buffer_size:i * ring.buffer_size + result]
                    held.append(i)
                else:
                    assert result == -errno.ENOBUFS
                    ends += 1
            if len(received) == len(sent):
                break
        rnd.shuffle(held)
        for i in held:
            ring.give_back(i)
        if not more:
            ring.arm_recv(slot, 1, slot)
    assert received == sent
    assert ends >= len(sent) // (4 * 64) - 1


def test_buffers_are_taken_in_the_order_they_were_given_back(ring, listener):
    client, slot = accept(ring, listener)
    ring.arm_recv(slot, 1, slot)
    held = []
    for _ in range(4):
        client.sendall(b"a")
        [(_, _, _, flags)] = take(ring, 1)
        held.append(flags >> linux.CQE_BUFFER_SHIFT)
    assert held == [0, 1, 2, 3]
    for i in (2, 0, 3, 1):
        ring.give_back(i)
    ring.publish_buffers()      # `wait` does, but a polling kernel may look before
    again = []
    for i in range(4):
        client.sendall(b"%d" % i)
        [(_, _, result, flags)] = take(ring, 1)
        again.append(flags >> linux.CQE_BUFFER_SHIFT)
        assert piece(ring, result, flags) == b"%d" % i
    assert again == [2, 0, 3, 1]


def test_sendmsg_gathers(ring, listener):
    client, slot = accept(ring, listener)
    parts = [b"HTTP/1.1 200 OK\r\n", b"\r\n", b"x" * 50_000]
    memory = bytearray(linux.message_size(len(parts)))
    segments = [(linux.address_of(part), len(part)) for part in parts]
    linux.write_message(memory, linux.address_of(memory), segments)
    assert linux.read_message(memory) == segments
    ring.arm_sendmsg(1, 2, slot, linux.address_of(memory))
    assert take(ring, 1) == [(1, 2, sum(map(len, parts)), 0)]
    assert read_exactly(client, 50_019) == b"".join(parts)


def read_exactly(client, count):
    data = b""
    while len(data) < count:
        more = client.recv(count - len(data))
        assert more
        data += more
    return data


def test_send_goes_on_by_itself_when_there_is_room(ring, listener):
    """MSG_WAITALL: one completion, however slowly the client reads."""
    client, slot = accept(ring, listener)
    data = bytes(8 << 20)
    ring.arm_send(1, 2, slot, linux.address_of(data), len(data))
    assert take(ring, 1, seconds=0.2) == []
    client.setblocking(False)
    left, completions = len(data), []
    while left:
        try:
            left -= len(client.recv(1 << 20))
        except BlockingIOError:
            completions += take(ring, 1, seconds=0.05)
    assert completions + take(ring, 1 - len(completions)) == [(1, 2, len(data), 0)]


def test_cancelled_send_tells_how_far_it_got(ring, listener):
    _client, slot = accept(ring, listener)
    data = bytes(8 << 20)
    ring.arm_send(1, 2, slot, linux.address_of(data), len(data))
    assert take(ring, 1, seconds=0.1) == []
    ring.arm_cancel(3, 1, 2)
    [(tag, epoch, result, _)] = take(ring, 1)
    assert (tag, epoch) == (1, 2)
    assert 0 < result < len(data)


def test_send_to_who_has_gone(ring, listener):
    client, slot = accept(ring, listener)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    results = set()
    for _ in range(2):
        ring.arm_send(1, 2, slot, linux.address_of(b"x"), 1)
        results.add(take(ring, 1)[0][2])
    assert results <= {-errno.ECONNRESET, -errno.EPIPE, 1}
    assert -errno.EPIPE in results


def test_send_from_a_truncated_file(ring, listener, tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(bytes(65536))
    with path.open("r+b") as file:
        address = linux.map_file(file.fileno(), 65536)
        assert linux.populate(address, 65536)
        _client, slot = accept(ring, listener)
        ring.arm_send(1, 2, slot, address, 65536)
        assert take(ring, 1) == [(1, 2, 65536, 0)]
        file.truncate(0)
        ring.arm_send(1, 3, slot, address, 65536)
        assert take(ring, 1) == [(1, 3, -errno.EFAULT, 0)]


def test_shutdown_of_one_side(ring, listener):
    client, slot = accept(ring, listener)
    ring.arm_recv(slot, 1, slot)
    ring.arm_shutdown(2, 3, slot, linux.SHUT_WR)
    assert take(ring, 1) == [(2, 3, 0, 0)]
    assert client.recv(1) == b""
    client.sendall(b"still here")
    [(_, _, result, flags)] = take(ring, 1)
    assert piece(ring, result, flags) == b"still here"


def test_shutdown_of_a_listener_ends_its_accept(ring, listener):
    ring.arm_accept(5, listener.fileno(), True)
    assert take(ring, 1, seconds=0.1) == []
    ring.arm_shutdown(6, 0, listener.fileno(), socket.SHUT_RD)
    assert sorted(take(ring, 2)) == [(5, 0, -errno.EINVAL, 0), (6, 0, 0, 0)]


def test_cancel_needs_the_epoch(ring, listener):
    client, slot = accept(ring, listener)
    ring.arm_recv(slot, 8, slot)
    ring.arm_cancel(3, slot, 7)
    assert take(ring, 1) == [(3, 0, -errno.ENOENT, 0)]
    ring.arm_cancel(3, slot, 8)
    assert take(ring, 2, seconds=0.2) == [(slot, 8, -errno.ECANCELED, 0)]
    client.sendall(b"x")
    ring.arm_recv(slot, 9, slot)
    assert take(ring, 1)[0][:3] == (slot, 9, 1)


def test_cancel_of_an_accept(ring, listener):
    ring.arm_accept(5, listener.fileno(), True)
    ring.arm_cancel(6, 5, 0)
    assert take(ring, 2, seconds=0.2) == [(5, 0, -errno.ECANCELED, 0)]


def test_timeout(ring):
    started = time.monotonic()
    timespec = bytearray(struct.pack("=qq", 0, 100_000_000))
    ring.arm_timeout(4, timespec)
    timespec[:] = bytes(16)                     # the kernel has to have its own copy once it is submitted
    struct.pack_into("=qq", timespec, 0, 0, 100_000_000)
    assert take(ring, 1) == [(4, 0, -errno.ETIME, 0)]
    assert 0.09 < time.monotonic() - started < 5


def test_read_from_a_pipe(make):
    read_end, write_end = os.pipe()
    ring = make()
    buffer = bytearray(1)
    for value in b"xyz":
        ring.arm_read(7, read_end, buffer)
        assert take(ring, 1, seconds=0.06) == []
        os.write(write_end, bytes((value,)))
        assert take(ring, 1) == [(7, 0, 1, 0)]
        assert buffer[0] == value
    os.close(write_end)
    os.close(read_end)


# --- operations that TLS adds

NODELAY = socket.IPPROTO_TCP, socket.TCP_NODELAY
NO_OPTION = socket.IPPROTO_TCP, 12345
ON, OFF = bytearray(struct.pack("=i", 1)), bytearray(4)
SKIP, LINKED = linux.CQE_SKIP_SUCCESS, linux.LINK | linux.CQE_SKIP_SUCCESS


def set_option(ring, tag, slot, option, value=ON, flags=0):
    ring.arm_setsockopt(tag, 5, slot, option, (linux.address_of(value), len(value)), flags)


def all_of(ring, count):
    """`count` completions, and no more than these."""
    found = take(ring, count)
    assert take(ring, 1, seconds=0.06) == []
    return found


def nodelay(slot):
    """What the kernel says of a slot's TCP_NODELAY."""
    with socket.socket(fileno=os.dup(slot)) as sock:
        return bool(sock.getsockopt(*NODELAY))


@pytest.fixture
def slot(ring, listener):
    """An accepted connection without TCP_NODELAY, on a kernel that sets socket options from the ring."""
    client, slot = accept(ring, listener)
    with client:
        set_option(ring, 1, slot, NODELAY, OFF)
        [(_, _, result, _)] = take(ring, 1)
        if result == -errno.EOPNOTSUPP:
            pytest.skip("this kernel is older than 6.7")
        yield slot
    os.close(slot)


@pytest.mark.parametrize("at_most", (1, 7, 63, 64, 1000))
def test_receive_of_at_most(ring, listener, at_most):
    """And no byte is lost: the next receive has the rest."""
    client, slot = accept(ring, listener)
    client.sendall(bytes(range(100)))
    received = b""
    for limit in (at_most, 0, 0):
        if len(received) < 100:
            ring.arm_recv(3, 4, slot, multishot=False, at_most=limit)
            [(tag, epoch, result, flags)] = take(ring, 1)
            assert (tag, epoch) == (3, 4)
            assert result == min(limit or 64, 64, 100 - len(received))
            received += piece(ring, result, flags)
    assert received == bytes(range(100))[:len(received)]
    client.close()
    os.close(slot)


def test_recvmsg_brings_a_control_message(ring):
    """A descriptor over a Unix socket stands in for the type of a record: both are a cmsg with an int or less."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = Message(16, socket.CMSG_SPACE(4))
        ring.arm_recvmsg(3, 4, ours.fileno(), message.address)
        assert take(ring, 1, seconds=0.06) == []
        socket.send_fds(theirs, [b"with it"], [theirs.fileno()])
        assert take(ring, 1) == [(3, 4, 7, 0)]
        assert message.memory[message.DATA:message.DATA + 7] == b"with it"
        length, level, kind = struct.unpack_from("=Qii", message.memory, message.CONTROL)
        assert (length, level, kind) == (20, socket.SOL_SOCKET, socket.SCM_RIGHTS)
        [fd] = struct.unpack_from("=i", message.memory, message.CONTROL + 16)
        assert os.path.sameopenfile(fd, theirs.fileno())
        os.close(fd)


def test_a_message_is_received_into_again(ring):
    """Nothing of the last one is taken for part of the next."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS
    with ours, theirs:
        message = Message(8, socket.CMSG_LEN(4))
        for count, data, flags in ((1, b"first", 0), (0, b"", 0), (2, b"two are one too many", linux.MSG_CTRUNC),
                                   (1, b"again", 0), (0, b"9 bytes..", 0)):
            socket.send_fds(theirs, [data], [theirs.fileno()] * count)
            ring.arm_recvmsg(3, 4, ours.fileno(), message.address)
            [(_, _, size, _)] = take(ring, 1)
            received, control, received_flags = message.received(size, *rights)
            assert received == data[:8]
            assert received_flags == flags | linux.MSG_TRUNC * (len(data) > 8)
            assert len(control) == 4 * bool(count)
            if control:
                [fd] = struct.unpack("=i", control)
                assert os.path.sameopenfile(fd, theirs.fileno())
                os.close(fd)


def test_a_control_message_of_another_kind_is_none():
    message = Message(3, socket.CMSG_SPACE(1))
    message.fill(1, 2, b"x", b"abc")
    for level, kind in ((1, 1), (2, 2), (2, 1)):
        assert message.received(3, level, kind) == (b"abc", b"", 0)
    assert message.received(3, 1, 2) == (b"abc", b"x", 0)


def test_recvmsg_is_cancelled(ring):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = Message(16, socket.CMSG_SPACE(4))
        ring.arm_recvmsg(3, 4, ours.fileno(), message.address)
        ring.arm_cancel(5, 3, 4)
        assert all_of(ring, 1) == [(3, 4, -errno.ECANCELED, 0)]


@pytest.mark.parametrize(("offset", "length", "got"), (
    (0, 10, b"0123456789"), (3, 4, b"3456"), (8, 10, b"89"), (10, 5, b""), (99, 5, b""), (1 << 33, 1, b"")))
def test_read_from_a_file(ring, tmp_path, offset, length, got):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    memory = bytearray(b"." * 20)
    with path.open("rb") as file:
        ring.arm_pread(3, 4, file.fileno(), linux.address_of(memory) + 5, length, offset)
        assert take(ring, 1) == [(3, 4, len(got), 0)]
        assert file.tell() == 0
    assert memory == (b"." * 5 + got).ljust(20, b".")


def test_read_behind_four_gigabytes(ring, tmp_path):
    """The offset has 64 bits."""
    path = tmp_path / "file"
    with path.open("w+b") as file:
        file.seek(1 << 32)
        file.write(b"far away")
        file.flush()
        memory = bytearray(8)
        ring.arm_pread(3, 4, file.fileno(), linux.address_of(memory), 8, 1 << 32)
        assert take(ring, 1) == [(3, 4, 8, 0)]
    assert memory == b"far away"


def test_setsockopt(ring, slot):
    for value, on in ((ON, True), (OFF, False), (ON, True)):
        set_option(ring, 6, slot, NODELAY, value)
        assert take(ring, 1) == [(6, 5, 0, 0)]
        assert nodelay(slot) == on


@pytest.mark.parametrize("flags", (0, SKIP))
def test_failing_setsockopt(ring, slot, flags):
    set_option(ring, 6, slot, NO_OPTION, flags=flags)
    set_option(ring, 7, NO_FILE, NODELAY, flags=flags)
    assert all_of(ring, 2) == [(6, 5, -errno.ENOPROTOOPT, 0), (7, 5, -errno.EBADF, 0)]


def test_setsockopt_that_says_nothing_when_it_succeeds(ring, slot):
    set_option(ring, 6, slot, NODELAY, flags=SKIP)
    nothing(ring, 7)
    assert [completion[0] for completion in all_of(ring, 1)] == [7]
    assert nodelay(slot)


def test_an_option_of_two_bytes_too_few_is_refused(ring, slot):
    """That the length gets there."""
    set_option(ring, 6, slot, NODELAY, ON[:2])
    assert take(ring, 1) == [(6, 5, -errno.EINVAL, 0)]


def test_an_option_of_a_name(ring, slot):
    """Not an int, and without a zero at its end: as TCP_ULP takes its name."""
    name = bytearray(b"reno")
    set_option(ring, 6, slot, (socket.IPPROTO_TCP, socket.TCP_CONGESTION), name)
    assert take(ring, 1) == [(6, 5, 0, 0)]
    with socket.socket(fileno=os.dup(slot)) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"


# --- what an archive that is not in memory stands on: poll, madvise and a send in one chain

@pytest.fixture
def mapped(tmp_path):
    """(address, path) of three pages of a file, two of which are there no more."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (3 * mmap.PAGESIZE // 256))
    with path.open("rb") as file:
        address = linux.map_file(file.fileno(), 3 * mmap.PAGESIZE)
    os.truncate(path, mmap.PAGESIZE)
    yield address, path
    linux.unmap_file(address, 3 * mmap.PAGESIZE)


def test_poll(ring, slot):
    ring.arm_poll(3, 4, slot, linux.POLLOUT)
    [(tag, epoch, events, flags)] = take(ring, 1)
    assert (tag, epoch, flags) == (3, 4, 0)
    assert events & linux.POLLOUT


def test_poll_waits_and_is_cancelled(ring):
    end, other = os.pipe()
    try:
        ring.arm_poll(3, 4, end, linux.POLLIN)
        assert take(ring, 1, seconds=0.06) == []
        os.write(other, b"x")
        assert take(ring, 1) == [(3, 4, linux.POLLIN, 0)]
        os.read(end, 1)
        ring.arm_poll(3, 4, end, linux.POLLIN)
        ring.arm_cancel(5, 3, 4)
        assert all_of(ring, 1) == [(3, 4, -errno.ECANCELED, 0)]
    finally:
        os.close(end)
        os.close(other)


@pytest.mark.parametrize(("page", "result"), ((0, 0), (1, -errno.EFAULT)))
def test_madvise_brings_pages_in(ring, mapped, page, result):
    """Or tells where the file has none any more; and that is no SIGBUS."""
    ring.arm_madvise(3, 4, mapped[0] + page * mmap.PAGESIZE, mmap.PAGESIZE, linux.MADV_POPULATE_READ)
    assert take(ring, 1) == [(3, 4, result, 0)]


def warm(ring, slot, address, length):
    """What Worker.warm and send_piece arm."""
    ring.reserve(3)
    ring.arm_poll(3, 4, slot, linux.POLLOUT, LINKED)
    ring.arm_madvise(3, 4, address & -mmap.PAGESIZE, address % mmap.PAGESIZE + length, linux.MADV_POPULATE_READ, LINKED)
    ring.arm_send(3, 4, slot, address, length, linux.MSG_NOSIGNAL)


@pytest.mark.parametrize("page", (0, 1))
def test_pages_and_then_a_send_complete_once(ring, listener, mapped, page):
    client, slot = accept(ring, listener)
    with client:
        warm(ring, slot, mapped[0] + page * mmap.PAGESIZE + 7, 100)
        assert take(ring, 2, seconds=0.2) == [(3, 4, -errno.EFAULT if page else 100, 0)]
        os.close(slot)
        assert client.recv(200) == (b"" if page else bytes(range(7, 107)))


def test_a_chain_that_waits_for_room_is_cancelled_once(ring, listener, mapped):
    client, slot = accept(ring, listener)
    with client, socket.socket(fileno=os.dup(slot)) as ours:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(1 << 20))
        ours.setblocking(True)
        warm(ring, slot, mapped[0], 100)
        assert take(ring, 1, seconds=0.06) == []
        ring.arm_cancel(5, 3, 4)
        assert take(ring, 2, seconds=0.2) == [(3, 4, -errno.ECANCELED, 0)]
    os.close(slot)


# --- what the access log stands on

def test_write_goes_to_the_end_of_a_file(ring, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    for line in (b"one\n", b"two\n"):
        ring.arm_write(3, fd, linux.address_of(line), len(line))
        assert take(ring, 1) == [(3, 0, len(line), 0)]
    os.close(fd)
    assert path.read_bytes() == b"before\none\ntwo\n"


def test_write_into_a_pipe_waits_for_room(ring):
    end, other = os.pipe()
    os.set_blocking(other, False)
    size = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(other, bytes(1 << 16))
    os.set_blocking(other, True)
    line = b"line\n"
    ring.arm_write(3, other, linux.address_of(line), len(line))
    assert take(ring, 1, seconds=0.06) == []
    while size:
        size -= len(os.read(end, size))
    assert take(ring, 1) == [(3, 0, 5, 0)]
    assert os.read(end, 100) == line
    os.close(end)
    ring.arm_write(3, other, linux.address_of(line), len(line))
    assert take(ring, 1) == [(3, 0, -errno.EPIPE, 0)]
    os.close(other)


# --- what leaving a listener stands on

def test_an_accept_with_its_cancel_takes_what_waits(ring, listener):
    """It is tried when it is submitted; only where nobody waits is there anything to cancel."""
    with connect(listener):
        ring.arm_accept(3, listener.fileno(), False)
        ring.arm_cancel(5, 3, 0)
        found = {tag: result for tag, _, result, _ in take(ring, 2)}
        assert found[5] == -errno.ENOENT
        os.close(found[3])
    ring.arm_accept(3, listener.fileno(), False)
    ring.arm_cancel(5, 3, 0)
    assert take(ring, 2, seconds=0.1) == [(3, 0, -errno.ECANCELED, 0)]


# --- chains: the facts that the hand-over to the kernel's TLS stands on

def option_of(slot, option):
    with socket.socket(fileno=os.dup(slot)) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, option)


RESULTS = {socket.SO_KEEPALIVE: "first", socket.SO_OOBINLINE: "second", socket.SO_BROADCAST: "third"}


def chain(ring, slot, failing=None):
    """Three options in a chain, of which one fails; gives (completions, which of the others have been set)."""
    for i, option in enumerate(RESULTS):
        wrong = failing == i
        set_option(ring, 10 + i, slot, NO_OPTION if wrong else (socket.SOL_SOCKET, option),
                   flags=LINKED if i < 2 else 0)
    nothing(ring, 99)
    found = all_of(ring, 2)
    assert [completion for completion in found if completion[0] == 99]
    return ([completion for completion in found if completion[0] != 99],
            [name for option, name in RESULTS.items() if option_of(slot, option)])


@pytest.mark.parametrize(("failing", "completion", "set_before"), (
    (None, (12, 5, 0, 0), ["first", "second", "third"]),
    (0, (10, 5, -errno.ENOPROTOOPT, 0), []),
    (1, (11, 5, -errno.ENOPROTOOPT, 0), ["first"]),
    (2, (12, 5, -errno.ENOPROTOOPT, 0), ["first", "second"]),
))
def test_a_chain_completes_once(ring, slot, failing, completion, set_before):
    """Where all succeed, at its end; else where it failed, and nothing behind that happens."""
    assert chain(ring, slot, failing) == ([completion], set_before)


def test_a_chain_behind_a_send(ring, listener, slot):
    client, other = accept(ring, listener)
    with client:
        ring.arm_send(9, 5, other, linux.address_of(b"words"), 5, flags=LINKED)
        assert chain(ring, other) == ([(12, 5, 0, 0)], ["first", "second", "third"])
        assert client.recv(10) == b"words"
    os.close(other)


LONG = bytes(16 << 20)      # more than any socket takes before somebody reads


def behind_a_long_send(ring, slot):
    """A chain whose head, tag 9, is under way and does not get on by itself; tags 10 and 11 set options."""
    ring.arm_send(9, 5, slot, linux.address_of(LONG), len(LONG), flags=LINKED)
    set_option(ring, 10, slot, (socket.SOL_SOCKET, socket.SO_KEEPALIVE), flags=LINKED)
    set_option(ring, 11, slot, (socket.SOL_SOCKET, socket.SO_OOBINLINE))
    assert take(ring, 1, seconds=0.1) == []


def test_a_chain_waits_for_a_send_that_takes_its_time(ring, listener, slot):
    """And needs nothing more of the submission queue, whose places are filled anew meanwhile."""
    client, other = accept(ring, listener)
    with client:
        behind_a_long_send(ring, other)
        for number in range(3 * ring.entries):
            nothing(ring, 100 + number)
        completions = take(ring, 3 * ring.entries)
        assert {tag for tag, *_ in completions} == set(range(100, 100 + 3 * ring.entries))
        assert not option_of(other, socket.SO_KEEPALIVE)
        client.setblocking(False)
        left, completions = len(LONG), []
        while left:
            try:
                left -= len(client.recv(1 << 20))
            except BlockingIOError:
                completions += take(ring, 1, seconds=0.05)
        assert completions + all_of(ring, 1 - len(completions)) == [(11, 5, 0, 0)]
        assert option_of(other, socket.SO_KEEPALIVE)
        assert option_of(other, socket.SO_OOBINLINE)
    os.close(other)


def test_a_chain_behind_a_send_that_falls_short(ring, listener, slot):
    """MSG_WAITALL makes a failure of it: it completes, and nothing behind it happens."""
    client, other = accept(ring, listener)
    with client:
        behind_a_long_send(ring, other)
        ring.arm_cancel(8, 9, 5)
        [(tag, epoch, result, _)] = all_of(ring, 1)
        assert (tag, epoch) == (9, 5)
        assert 0 < result < len(LONG)
        assert not option_of(other, socket.SO_KEEPALIVE)
        assert not option_of(other, socket.SO_OOBINLINE)
    os.close(other)


def test_a_chain_behind_a_send_that_fails(ring, slot):
    with socket.socket(fileno=os.dup(slot)) as sock:
        sock.shutdown(socket.SHUT_WR)
    ring.arm_send(9, 5, slot, linux.address_of(b"words"), 5, flags=LINKED)
    assert chain(ring, slot) == ([(9, 5, -errno.EPIPE, 0)], [])


def test_what_waits_in_a_chain_is_not_found_by_a_cancel(ring, listener, slot):
    """Only its head is: so that is what a cancel has to name."""
    client, other = accept(ring, listener)
    with client:
        behind_a_long_send(ring, other)
        for tag in (10, 11):
            ring.arm_cancel(8, tag, 5)
            assert all_of(ring, 1) == [(8, 0, -errno.ENOENT, 0)]
    os.close(other)


def test_a_chain_ends_where_its_submission_does(listener, slot, make):
    """Of a chain that the submission queue has no room for, the halves know nothing of each other."""
    ring = make()
    if isinstance(ring, PolledRing):
        pytest.skip("there the kernel's thread decides where a submission ends")
    for number in range(ring.entries - 1):
        nothing(ring, 100 + number)
    set_option(ring, 10, slot, NO_OPTION, flags=LINKED)
    set_option(ring, 11, slot, NODELAY)
    completions = take(ring, ring.entries + 1)
    assert (10, 5, -errno.ENOPROTOOPT, 0) in completions
    assert (11, 5, 0, 0) in completions
    assert nodelay(slot)


@pytest.mark.parametrize("armed", range(6, 9))
def test_room_for_a_chain_is_reserved(ring, slot, armed):
    """However full the queue is, what is armed next goes with one submission."""
    for number in range(armed):
        nothing(ring, 100 + number)
    ring.reserve(3)
    assert ring.room - ring.tail >= 3
    set_option(ring, 10, slot, NO_OPTION, flags=LINKED)
    set_option(ring, 11, slot, NODELAY, flags=LINKED)
    set_option(ring, 12, slot, NODELAY)
    completions = all_of(ring, armed + 1)
    assert [completion for completion in completions if completion[0] < 100] == [(10, 5, -errno.ENOPROTOOPT, 0)]
    assert not nodelay(slot)


@pytest.mark.parametrize("message_flags", (linux.LAST_WORDS, linux.MSG_DONTWAIT | linux.MSG_WAITALL))
def test_a_send_that_may_not_wait(ring, listener, message_flags):
    """It is over when it has been submitted, whether there was room or not."""
    client, slot = accept(ring, listener)
    with client:
        ring.arm_send(1, 2, slot, linux.address_of(LONG), len(LONG), message_flags)
        [(_, _, result, _)] = take(ring, 1)
        assert 0 < result < len(LONG)
        for _ in range(100):            # the receiver's window goes on opening for a while
            ring.arm_send(1, 2, slot, linux.address_of(LONG), len(LONG), message_flags)
            [(_, _, result, _)] = take(ring, 1)
            if result < 0:
                break
        assert result == -errno.EAGAIN
    os.close(slot)


def test_close_lets_go_of_the_ring(make):
    ring = make()
    kept = os.dup(ring.fd)              # for the fixture to have something to close
    ring.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ring.fd)
    os.dup2(kept, ring.fd)
    os.close(kept)


# --- the contract: what the loop does by itself

def test_write_is_the_function_itself(ring):
    """The loop calls it for most responses: nothing may be wrapped around it."""
    assert ring.write == uring.SQE.pack_into
    ring.write(ring.queue, ring.place(), linux.OP_CLOSE, 0, 0, NO_FILE, 0, 0, 0, 0, 7, 8)
    assert ring.tail > ring.submitted
    assert take(ring, 1) == [(7, 8, -errno.EBADF, 0)]


def test_what_is_flushed_has_been_submitted(ring):
    for number in range(5):
        nothing(ring, number)
    ring.flush(ring.entries)
    assert ring.submitted == ring.tail == ring.room - ring.entries
    assert len(take(ring, 5)) == 5
    assert ring.overflows == 0


def test_buffers_are_where_their_addresses_say(ring, listener):
    client, slot = accept(ring, listener)
    assert ring.buffer_count == 4
    with client:
        for i in range(ring.buffer_count):
            assert ring.buffer_order[ring.buffer_tail & ring.buffer_mask] == i      # where giving it back is adding 1
            ring.arm_recv(3, 4, slot, multishot=False)
            client.sendall(b"in buffer %d" % i)
            [(_, _, result, flags)] = take(ring, 1)
            assert flags >> linux.CQE_BUFFER_SHIFT == i
            assert ctypes.string_at(ring.buffer_address(i), result) == piece(ring, result, flags) == b"in buffer %d" % i
    os.close(slot)


# --- user_data

@pytest.mark.parametrize("epoch", EXTREMES)
def test_tag_and_epoch_come_back(ring, epoch):
    message = bytearray(linux.message_size(0))
    for tag in EXTREMES:
        ring.arm_recv(tag, epoch, NO_FILE)
        ring.arm_send(tag, epoch, NO_FILE, 0, 1)
        ring.arm_sendmsg(tag, epoch, NO_FILE, linux.address_of(message))
        ring.arm_shutdown(tag, epoch, NO_FILE, 1)
        ring.arm_close(tag, epoch, NO_FILE)
        assert take(ring, 5) == [(tag, epoch, -errno.EBADF, 0)] * 5


@pytest.mark.parametrize("epoch", EXTREMES)
def test_cancel_finds_every_tag_and_epoch(ring, listener, epoch):
    _client, slot = accept(ring, listener)
    for tag in EXTREMES:
        ring.arm_recv(tag, epoch, slot)
        ring.arm_cancel(123, tag, epoch)
        assert take(ring, 1) == [(tag, epoch, -errno.ECANCELED, 0)]


# --- the queues

def nothing(ring, number):
    """An operation that completes at once: a cancel of what is not there."""
    ring.arm_cancel(number, 0xFFFFFFFF, 0xFFFFFFFF)


def test_completion_queue_wraps_around(ring):
    rnd, sent, seen = random.Random(2), 0, []
    while sent < 5000:
        for _ in range(rnd.randrange(1, 30)):
            nothing(ring, sent)
            sent += 1
        seen += [completion[0] for completion in ring.wait()]
    while len(seen) < sent:
        seen += [completion[0] for completion in ring.wait()]
    assert seen == list(range(sent))
    assert ring.head > 100 * ring.cq_entries


def test_positions_wrap_at_32_bits(ring):
    """A ring counts its entries modulo 2**32; our own count of the submission queue has no end."""
    assert ring.words[ring.sq_tail] == ring.tail & 0xFFFFFFFF
    for number in range(3 * ring.entries):
        nothing(ring, number)
        assert [completion[0] for completion in ring.wait()] == [number]
    assert ring.head == ring.words[ring.cq_tail] == ring.words[ring.cq_head]
    assert ring.tail == ring.submitted or isinstance(ring, PolledRing)


@pytest.mark.parametrize("count", (9, 64, 1000))
def test_full_submission_queue_is_flushed_and_full_completion_queue_overflows(ring, count):
    """Far more than either queue holds, without a look at the completions: none is lost."""
    assert ring.entries == 8
    assert ring.cq_entries == 32
    for number in range(count):
        nothing(ring, number)
    assert sorted(completion[0] for completion in take(ring, count)) == list(range(count))


def test_operations_in_flight_beyond_the_completion_queue(make):
    """Many that complete at one moment."""
    pipes = [os.pipe() for _ in range(100)]
    ring = make()
    buffers = [bytearray(1) for _ in pipes]
    for i, buffer in enumerate(buffers):
        ring.arm_read(i, pipes[i][0], buffer)
    assert take(ring, 1, seconds=0.1) == []
    for _, write_end in pipes:
        os.write(write_end, b"z")
    assert sorted(take(ring, 100)) == [(i, 0, 1, 0) for i in range(100)]
    assert buffers == [b"z"] * 100
    for fd in sum(pipes, ()):
        os.close(fd)


def test_batch_stays_whole_while_more_is_armed(ring):
    """Completions are copied out: what is armed and flushed while they are gone through cannot touch them."""
    for number in range(8):
        nothing(ring, number)
    seen = []
    for tag, *_ in ring.wait():
        seen.append(tag)
        for _ in range(8):
            nothing(ring, 1000)
    assert seen == list(range(8))
    assert len(take(ring, 64)) == 64


def test_signal_ends_a_wait_with_nothing(ring):
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert list(ring.wait()) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits == [1]
    nothing(ring, 1)
    assert [completion[0] for completion in ring.wait()] == [1]


def test_busy_loop_finds_what_comes_in_time(make):
    read_end, write_end = os.pipe()
    ring = make(busyloop=5.0)
    buffer = bytearray(1)
    ring.arm_read(7, read_end, buffer)
    os.write(write_end, b"x")
    started = time.monotonic()
    assert [*ring.wait()] == [(7, 0, 1, 0)]
    assert time.monotonic() - started < 4
    os.close(write_end)
    os.close(read_end)


def test_busy_loop_ends_in_sleep(make, listener):
    ring = make(busyloop=0.05)
    timespec = bytearray(struct.pack("=qq", 0, 200_000_000))
    ring.arm_timeout(1, timespec)
    started = time.process_time()
    assert [*ring.wait()] == [(1, 0, -errno.ETIME, 0)]
    assert time.process_time() - started < 0.15


def test_polling_thread_is_woken(listener):
    ring = PolledRing(SLOTS, entries=8, sqpoll_ms=1)
    for number in range(3):
        while not ring.words[ring.sq_flags] & uring.SQ_NEED_WAKEUP:
            time.sleep(0.01)
        nothing(ring, number)
        assert [completion[0] for completion in ring.wait()] == [number]
    os.close(ring.fd)


# --- the calls

def test_both_calls_give_the_same():
    calls = [uring.Libc(), *([uring.Liburing()] if load_name() == "Liburing" else [])]
    for call in calls:
        assert call.enter(-1, 0, 0, 0, None) == -errno.EBADF
        assert call.register(-1, uring.REGISTER_PROBE, 0, 0) in (-errno.EBADF, -errno.EINVAL)
        params = simulated.Params()
        assert call.setup(0, ctypes.addressof(params)) == -errno.EINVAL
        params.flags = 1 << 31
        assert call.setup(8, ctypes.addressof(params)) == -errno.EINVAL
        params = simulated.Params()
        fd = call.setup(8, ctypes.addressof(params))
        assert fd >= 0
        assert call.enter(fd, 0, 0, uring.ENTER_GETEVENTS, None) == 0
        os.close(fd)


def no_liburing(name, *args, **kwargs):
    if name is not None:
        raise OSError("liburing.so.2: cannot open shared object file")
    return ctypes.CDLL(None, *args, **kwargs)


def old_liburing(name, *args, **kwargs):
    return SimpleNamespace(io_uring_setup=None) if name is not None else ctypes.CDLL(None, *args, **kwargs)


@pytest.mark.parametrize("library", (no_liburing, old_liburing))
def test_without_liburing_the_calls_go_through_libc(monkeypatch, library):
    monkeypatch.setattr(uring.ctypes, "PyDLL", library)
    assert isinstance(uring.load_calls(), uring.Libc)


def test_liburing_can_be_refused():
    assert isinstance(uring.load_calls(use_liburing=False), uring.Libc)


def test_check():
    assert uring.permitted(3, "x") == 3
    with pytest.raises(OSError, match="x: Permission denied") as caught:
        uring.permitted(-errno.EACCES, "x")
    assert caught.value.errno == errno.EACCES


# --- what goes wrong

def refusing(**results):
    """Calls that give these results: setup, enter or register."""
    class Calls:
        name = "refusing"

        def __init__(self):
            self.real = uring.Libc()

        def setup(self, *args):
            return results.get("setup") or self.real.setup(*args)

        def enter(self, *args):
            return results.get("enter") or self.real.enter(*args)

        def register(self, fd, opcode, argument, count):
            return results.get("register", {}).get(opcode) or self.real.register(fd, opcode, argument, count)

    return lambda use_liburing: Calls()


def sysctl(value):
    """Stands in for open() of kernel.io_uring_disabled."""
    def opened(path):
        if value is None:
            raise FileNotFoundError(path)
        return io.StringIO(value)
    return opened


FORBIDDEN = "allow io_uring_setup, io_uring_enter and io_uring_register in it"
OLD, NEW = "5.0.21-rt", "6.18.4-1-generic"


@pytest.mark.parametrize(("error", "release", "disabled", "says"), (
    (errno.ENOSYS, OLD, None, f"this kernel ({OLD}) is too old: tarweb needs Linux 6.1 or newer"),
    (errno.ENOSYS, "4.4.0", None, "too old"),
    (errno.ENOSYS, "5.1.0", None, "seccomp"),
    (errno.ENOSYS, NEW, "0\n", f"(io_uring_setup: Function not implemented), most likely by a container's seccomp "
                               f"profile: {FORBIDDEN} (or this kernel, {NEW}, was built without io_uring)"),
    (errno.ENOSYS, NEW, "2\n", "seccomp"),
    (errno.EINVAL, "5.10.0-28-amd64", None, "too old"),
    (errno.EINVAL, "6.0.19", "0\n", "too old"),
    (errno.EINVAL, "6.1.0", "0\n", "io_uring_setup: Invalid argument"),
    (errno.EPERM, NEW, "0\n", "seccomp"),
    (errno.EPERM, OLD, None, f"seccomp profile: {FORBIDDEN}"),
    (errno.EPERM, NEW, "2\n", "kernel.io_uring_disabled is 2; 'sysctl kernel.io_uring_disabled=0' allows it"),
    (errno.EPERM, "5.14.0-503.el9", "1\n", "kernel.io_uring_disabled is 1"),
    (errno.ENOMEM, NEW, "0\n", "ulimit -l"),
    (errno.EMFILE, NEW, "0\n", "io_uring_setup: Too many open files"),
))
def test_failing_setup_is_explained(monkeypatch, error, release, disabled, says):
    monkeypatch.setattr(uring, "open", sysctl(disabled), raising=False)
    monkeypatch.setattr(uring.platform, "release", lambda: release)
    monkeypatch.setattr(uring, "load_calls", refusing(setup=-error))
    with pytest.raises(RingError) as caught:
        Ring(SLOTS)
    assert says in str(caught.value)
    assert ("too old" in says) == ("too old" in str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("operations", (None, {linux.OP_READ}))
@pytest.mark.parametrize("kind", (Ring, PolledRing))
@pytest.mark.parametrize("error", (errno.EPERM, errno.ENOSYS))
@pytest.mark.parametrize(("call", "results"), (
    ("io_uring_enter", lambda error: {"enter": -error}),
    ("io_uring_register", lambda error: {"register": dict.fromkeys(range(40), -error)}),
    ("io_uring_register", lambda error: {"register": {uring.REGISTER_PBUF_RING: -error}}),
))
def test_a_profile_that_allows_one_call_and_forbids_another(monkeypatch, call, results, error, kind, operations):
    """Whatever kernel.io_uring_disabled is: io_uring_setup is allowed."""
    monkeypatch.setattr(uring, "open", sysctl("1\n"), raising=False)
    monkeypatch.setattr(uring, "load_calls", refusing(**results(error)))
    before = os.dup(0)
    os.close(before)
    with pytest.raises(RingError) as caught:
        kind(SLOTS, sqpoll_ms=20, operations=operations)
    assert f"({call}: {os.strerror(error)})" in str(caught.value)
    assert FORBIDDEN in str(caught.value)
    assert "\n" not in str(caught.value)
    del caught
    after = os.dup(0)
    os.close(after)
    assert after == before, "the ring's descriptor is left open"


def test_missing_operations_are_named(monkeypatch):
    monkeypatch.setattr(uring, "NEEDED", {"RECV": linux.OP_RECV, "FLY": 200, "SWIM": 201})
    with pytest.raises(RingError, match=r"cannot do FLY, SWIM: tarweb needs Linux 6\.1"):
        Ring(SLOTS)


def test_missing_features_are_named(monkeypatch):
    monkeypatch.setattr(uring, "FEATURES", {"NODROP": 2, "TELEPATHY": 1 << 31})
    with pytest.raises(RingError, match=r"lacks TELEPATHY: tarweb needs Linux 6\.1"):
        Ring(SLOTS)


@pytest.mark.parametrize("opcode", (uring.REGISTER_PROBE, uring.REGISTER_PBUF_RING))
def test_failing_registration_is_an_os_error(monkeypatch, opcode):
    monkeypatch.setattr(uring, "load_calls", refusing(register={opcode: -errno.ENOMEM}))
    with pytest.raises(OSError, match="io_uring_register"):
        Ring(SLOTS)


def test_passing_errors_of_enter_are_tried_again(ring, monkeypatch):
    real, errors = ring.system_enter, [-errno.EINTR, -errno.EAGAIN, -errno.EBUSY]

    def enter(fd, to_submit, min_complete, flags, sigmask):
        waits = flags & uring.ENTER_GETEVENTS     # a call that only wakes the polling thread cannot fail
        return errors.pop() if waits and errors else real(fd, to_submit, min_complete, flags, sigmask)

    monkeypatch.setattr(ring, "system_enter", enter)
    nothing(ring, 1)
    found = []
    while not found:
        found += ring.wait()
    assert [completion[0] for completion in found] == [1]


def test_other_errors_of_enter_are_raised(monkeypatch):
    ring = Ring(SLOTS, entries=8)
    monkeypatch.setattr(ring, "system_enter", lambda *_: -errno.EFAULT)
    with pytest.raises(OSError, match="io_uring_enter: Bad address"):
        ring.wait()
    os.close(ring.fd)


# --- memory

def test_mapping(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        assert linux.map_file(file.fileno(), 0) == 0
        assert ctypes.string_at(linux.map_file(file.fileno(), 7), 7) == b"content"
        with pytest.raises(OSError, match="ulimit -v"):
            linux.map_file(file.fileno(), 1 << 62)
    ends = os.pipe()
    with pytest.raises(OSError, match="7 bytes cannot be mapped: No such device"):
        linux.map_file(ends[0], 7)
    for end in ends:
        os.close(end)


class NothingShared:
    """mmap(2) as FUSE does it for files with direct_io."""

    def __init__(self, mmap):
        self.really = mmap

    def mmap(self, address, length, protection, flags, *file):
        if flags & mmap.MAP_SHARED:
            ctypes.set_errno(errno.ENODEV)
            return ctypes.c_void_p(-1).value
        return self.really(address, length, protection, flags, *file)


def test_mapping_where_the_file_system_shares_no_pages(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setattr(linux, "_with_errno", NothingShared(linux._with_errno.mmap))
    with path.open("rb") as file:
        assert ctypes.string_at(linux.map_file(file.fileno(), 7), 7) == b"content"


def test_zeros():
    size = 10 << 20
    address = linux.zeros(size)
    assert linux.zeros(size) == address
    assert ctypes.string_at(address, size) == bytes(size)


def test_address_of():
    for buffer in (b"abc", bytearray(b"abc"), memoryview(bytearray(b"abc"))):
        assert ctypes.string_at(linux.address_of(buffer), 3) == b"abc"


# --- the kernel's own header

CONSTANTS = {
    **{f"IORING_OP_{name}": value for name, value in uring.NEEDED.items()},
    **{f"IORING_FEAT_{name}": value for name, value in uring.FEATURES.items()},
    "IORING_OP_RECVMSG": linux.OP_RECVMSG, "IORING_OP_URING_CMD": linux.OP_URING_CMD, "IOSQE_IO_LINK": linux.LINK,
    "IOSQE_BUFFER_SELECT": linux.BUFFER_SELECT,
    "IOSQE_CQE_SKIP_SUCCESS": linux.CQE_SKIP_SUCCESS, "IORING_ACCEPT_MULTISHOT": linux.ACCEPT_MULTISHOT,
    "IORING_RECV_MULTISHOT": linux.RECV_MULTISHOT,
    "IORING_CQE_F_BUFFER": linux.CQE_BUFFER, "IORING_CQE_F_MORE": linux.CQE_MORE,
    "IORING_CQE_BUFFER_SHIFT": linux.CQE_BUFFER_SHIFT,
    **{f"IORING_{name}": getattr(uring, name) for name in (
        "SETUP_SQPOLL", "SETUP_CQSIZE", "SETUP_SUBMIT_ALL", "SETUP_COOP_TASKRUN", "SETUP_SINGLE_ISSUER",
        "SETUP_DEFER_TASKRUN", "OFF_SQ_RING", "OFF_SQES", "ENTER_GETEVENTS", "ENTER_SQ_WAKEUP", "ENTER_SQ_WAIT",
        "SQ_NEED_WAKEUP", "SQ_CQ_OVERFLOW", "REGISTER_PROBE",
        "REGISTER_PBUF_RING", "SETUP_R_DISABLED", "REGISTER_RESTRICTIONS", "REGISTER_ENABLE_RINGS",
        "RESTRICTION_SQE_OP", "RESTRICTION_SQE_FLAGS_ALLOWED")},
    "MSG_WAITALL": linux.MSG_WAITALL, "MSG_DONTWAIT": linux.MSG_DONTWAIT, "MSG_NOSIGNAL": linux.MSG_NOSIGNAL,
    "SHUT_WR": linux.SHUT_WR, "MSG_TRUNC": linux.MSG_TRUNC, "MSG_CTRUNC": linux.MSG_CTRUNC,
    "MSG_CMSG_CLOEXEC": linux.MSG_CMSG_CLOEXEC, "IN_MODIFY": linux.IN_MODIFY, "IN_NONBLOCK": linux.IN_NONBLOCK,
    "IN_CLOEXEC": linux.IN_CLOEXEC, "PR_SET_PDEATHSIG": linux.PR_SET_PDEATHSIG, "MAP_HUGETLB": linux.MAP_HUGETLB,
    "MAP_HUGE_SHIFT": linux.MAP_HUGE_SHIFT,
    "__NR_io_uring_setup": linux.SYS_SETUP, "__NR_io_uring_enter": linux.SYS_ENTER,
    "__NR_io_uring_register": linux.SYS_REGISTER, "MADV_POPULATE_READ": linux.MADV_POPULATE_READ,
    "IO_URING_OP_SUPPORTED": 1,
}
STRUCTS = {     # C name -> ours, and how fields of ours are called there where they differ
    "io_uring_sqe": (simulated.Sqe, {"op_flags": "msg_flags", "pad": "__pad2"}),
    "io_sqring_offsets": (simulated.SqOffsets, {"resv1": "", "user_addr": ""}),    # resv2 before Linux 6.5
    "io_cqring_offsets": (simulated.CqOffsets, {"resv1": "", "user_addr": ""}),
    "io_uring_params": (simulated.Params, {}),
    "iovec": (simulated.Iovec, {"base": "iov_base", "len": "iov_len"}),
    "msghdr": (simulated.Msghdr, {name: f"msg_{name}" for name, _ in simulated.Msghdr._fields_}),
}
PACKED = {      # what is packed by hand: C name -> (format, fields in its order)
    "io_uring_cqe": ("=QiI", ("user_data", "res", "flags")),
    "io_uring_buf": (uring.BUF.format + "H", ("addr", "len", "bid", "resv")),
    "io_uring_buf_reg": (uring.BUF_REG.format, ("ring_addr", "ring_entries", "bgid")),
    "io_uring_params": (uring.PARAMS.format, [re.sub("^([sc]q)_(?!entries|thread)", r"\1_off.", name)
                                              for name in uring.Params._fields]),
    "io_uring_restriction": (uring.RESTRICTION.format, ("opcode", "sqe_op")),
    "msghdr": (linux.MSGHDR.format, [f"msg_{name}" for name, _ in simulated.Msghdr._fields_]),
    "cmsghdr": (linux.CMSGHDR.format, ("cmsg_len", "cmsg_level", "cmsg_type")),
    "iovec": (linux.IOVEC.format, ("iov_base", "iov_len")),
    "io_uring_rsrc_register": ("=IIQQQ", ("nr", "flags", "resv2", "data", "tags")),
    "io_uring_files_update": ("=IIQ", ("offset", "resv", "fds")),
    "io_uring_file_index_range": ("=IIQ", ("off", "len", "resv")),
    "io_uring_probe_op": ("=BBHI", ("op", "resv", "flags", "resv2")),
}


# What uring.SQE, SQE_CANCEL and SQE_SOCKOPT pack. Headers older than Linux 6.7 know these places by other names only.
PLAIN = ("opcode", "flags", "ioprio", "fd", "off", "addr", "len", "msg_flags", "user_data", "user_data + 4")
CANCEL = (*PLAIN[:5], "addr", "addr + 4", *PLAIN[6:])
SOCKOPT = ("opcode", "flags", "ioprio", "fd", "cmd_op", "level", "optname", "user_data", "user_data_high", "optlen",
           "optval")
OLD_NAMES = {"level": "addr", "optname": "addr + 4", "user_data_high": "user_data + 4", "optlen": "file_index",
             "optval": "addr3"}


def expressions_of(name, packed, fields, names=None):
    """As expressions(), for a format of the whole of struct `name`; `names` of its fields where they differ."""
    found = {f"sizeof(struct {name})": packed.size}
    for field, offset in offsets(packed.format, fields).items():
        field, _, more = (names or {}).get(field, field).partition(" + ")
        found[f"offsetof(struct {name}, {field}) + {more or 0}"] = offset
    return found


def offsets(form, fields):
    """field -> offset in a packed format."""
    form = re.sub(r"(\d+)([A-Z])", lambda repeated: int(repeated[1]) * repeated[2], form)
    codes = re.findall(r"\d*x|[A-Za-z]", form)
    ends = [struct.calcsize("=" + "".join(codes[:i + 1])) for i, code in enumerate(codes) if not code.endswith("x")]
    sizes = [struct.calcsize("=" + code) for code in codes if not code.endswith("x")]
    return {field: end - size for field, end, size in zip(fields, ends, sizes, strict=False)}


def expressions():
    """C expression -> the value that it has to have."""
    found = {f"(long long)({name})": value for name, value in CONSTANTS.items()}
    for name, (ours, renamed) in STRUCTS.items():
        found[f"sizeof(struct {name})"] = ctypes.sizeof(ours)
        for field, *_ in ours._fields_:
            if renamed.get(field, field):
                found[f"offsetof(struct {name}, {renamed.get(field, field)})"] = getattr(ours, field).offset
    for name, (form, fields) in PACKED.items():
        found[f"sizeof(struct {name})"] = struct.calcsize(form)
        for field, offset in offsets(form, fields).items():
            found[f"offsetof(struct {name}, {field})"] = offset
    for packed, fields in ((uring.SQE, PLAIN), (uring.SQE_CANCEL, CANCEL), (uring.SQE_SOCKOPT, SOCKOPT)):
        found |= expressions_of("io_uring_sqe", packed, fields, OLD_NAMES)
    found |= expressions_of("io_uring_cqe", uring.CQE, ("user_data", "user_data + 4", "res", "flags"))
    found["offsetof(struct io_uring_buf_ring, tail)"] = 14
    found["offsetof(struct io_uring_probe, ops)"] = 16
    return found


HEADERS = ("stddef.h", "stdio.h", "sys/inotify.h", "sys/mman.h", "sys/socket.h", "sys/syscall.h", "sys/uio.h",
           "linux/mman.h", "linux/prctl.h", "linux/io_uring.h")


def header_can_do(compiler, name="IORING_SETUP_DEFER_TASKRUN"):
    """Whether <linux/io_uring.h> is there, and so new as to have `name` (of Linux 6.1)."""
    source = f"#include <linux/io_uring.h>\nint x = {name};"
    return compiler and subprocess.run([compiler, "-fsyntax-only", "-x", "c", "-"], input=source, text=True,
                                       capture_output=True).returncode == 0


@pytest.mark.parametrize(("form", "offsets"), (
    ("=IQ", (0, 8, 16)), ("=I4xQ", (0, 8, 24)), ("=QI", (0, 4, 12)), ("=IIiI", (0, 4, 8, 12, 20))))
def test_a_wrong_layout_fails(form, offsets):
    """At import: a field elsewhere than it should be, a structure of another size."""
    with pytest.raises((AssertionError, struct.error)):
        linux.layout(form, *offsets)


def test_a_right_layout_is_a_format():
    assert linux.layout("=I4xQ", 0, 8, 16).pack(1, 2) == struct.pack("=QQ", 1, 2)


COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.mark.skipif(not header_can_do(COMPILER), reason="no C compiler with the io_uring header of Linux 6.1 or newer")
def test_layouts_are_those_of_the_header(tmp_path):
    assert not differing(expressions(), tmp_path)


@pytest.mark.skipif(not header_can_do(COMPILER, "SOCKET_URING_OP_SETSOCKOPT"), reason="an io_uring header before 6.7")
def test_setsockopt_is_that_of_the_header(tmp_path):
    wanted = {"(long long)(SOCKET_URING_OP_SETSOCKOPT)": uring.SOCKET_URING_OP_SETSOCKOPT}
    wanted |= expressions_of("io_uring_sqe", uring.SQE_SOCKOPT, SOCKOPT, {"user_data_high": "user_data + 4"})
    assert not differing(wanted, tmp_path)


def differing(wanted, folder):
    """expression -> (our value, the compiler's) of those that are not the same."""
    lines = [f"#include <{header}>" for header in HEADERS if header != "linux/io_uring.h"]
    lines += ["#include <linux/io_uring.h>", "int main(void) {"]
    lines += [f'printf("%lld\\n", (long long)({expression}));' for expression in wanted] + ["}"]
    source, program = Path(folder / "linux.c"), folder / "abi"
    source.write_text("\n".join(lines))
    subprocess.run([COMPILER, source, "-o", program], check=True, timeout=60)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    return {expression: (value, int(real) & (1 << 64) - 1)
            for (expression, value), real in zip(wanted.items(), printed, strict=True)
            if value & (1 << 32) - 1 != int(real) & (1 << 32) - 1}
