"""A kernel of our own behind the three system calls, for driving uring.Ring and conn.Worker through any schedule.

`Kernel` stands where abi.Liburing and abi.Libc stand. Its memory is a real (anonymous) file, so uring.Ring maps
it, writes 64-byte entries into it and reads completions out of it as ever; only what the operations do is
decided here, and a test says which of them goes on, and when.

What the real kernel promises is kept, and what it asks of us is asserted:
  * operations are armed only on open slots; one receive, one send at a time for each
  * a slot is closed only when every operation on it has completed and the completion has been taken
  * accepted sockets get free slots only
  * msghdr and iovecs are read at submission, the bytes they point at when they are sent
  * a receive takes buffers in the ring's order, and none that was not given back
"""

import ctypes
import errno
import mmap
import os
import struct
from collections import Counter, deque

import abi
import uring

RING_BYTES = 128            # heads, tails and flags, before the completion queue
SQ_HEAD, SQ_TAIL, SQ_FLAGS, CQ_HEAD, CQ_TAIL = 0, 1, 4, 16, 17        # places of the words, in words
NONEMPTY = 1 << 2           # of a receive: nothing that we look at
STREAMS = (abi.OP_RECV, abi.OP_SEND, abi.OP_SENDMSG)
OPERATION = struct.Struct("=BBHiQQIIII24x")


class Socket:
    """An accepted connection, and with it all that its client sends, takes and does."""

    def __init__(self):
        self.incoming = deque()     # pieces that the client has sent and nobody has received
        self.eof = False            # the client has sent all
        self.reset = False
        self.room = 0               # bytes that it would take now
        self.received = bytearray() # by the client
        self.delivered = 0          # bytes received from it
        self.shut = False           # our side is
        self.closed = False
        self.excuse = None          # why it may miss a response


class Listener:
    def __init__(self):
        self.queue = deque()
        self.shut = False


class Operation:
    """One operation in flight."""

    def __init__(self, code, slot, user, now):
        self.code, self.slot, self.user, self.started = code, slot, user, now
        self.segments = ()          # of a send
        self.total = self.done = 0  # bytes
        self.multishot = False
        self.cancelled = False
        self.due = 0.0              # of a timeout
        self.address = 0            # of a read
        self.held = None            # of a receive: (buffer, bytes in it), taken and not yet told of


class Kernel:
    """setup, enter and register, as abi.Liburing gives them. `clock` has `now`, in seconds.

    `on_enter(waiting)` is called before anything is submitted, `on_wait()` when the caller would sleep: it lets
    things happen (`go_on`, `end`), or leaves the queue empty as a signal would. `submits(count)` says how many
    of the entries are taken.
    """

    name = "simulated"

    def __init__(self, clock):
        self.clock = clock
        self.on_enter = lambda waiting: None
        self.on_wait = self.go_on_all
        self.submits = lambda count: count
        self.choose_slot = min
        self.most_completions = 65536       # that the completion queue holds
        self.sockets = {}           # slot -> Socket
        self.listeners = {}         # slot -> Listener
        self.operations = []        # in flight, oldest first
        self.unseen = deque()       # completions posted and not taken: (user, slot, result, flags)
        self.overflow = deque()
        self.signals = 0
        self.holds = lambda: False  # whether a receive takes its time between taking a buffer and completing
        self.closed = []            # Sockets in the order of their closing
        self.counts = Counter()     # what has happened, for a test to know that it was tested

    # the three system calls

    def setup(self, entries, address):
        params = abi.Params.from_address(address)
        self.entries = params.sq_entries = 1 << (entries - 1).bit_length()
        self.cq_entries = params.cq_entries = min(1 << (params.cq_entries - 1).bit_length(), self.most_completions)
        params.features = 0xFFFFFFFF
        self.polled = bool(params.flags & abi.SETUP_SQPOLL)
        sq, cq = params.sq_off, params.cq_off
        sq.head, sq.tail, sq.flags, sq.array = 4 * SQ_HEAD, 4 * SQ_TAIL, 4 * SQ_FLAGS, RING_BYTES + 16 * self.cq_entries
        cq.head, cq.tail, cq.cqes, cq.overflow = 4 * CQ_HEAD, 4 * CQ_TAIL, RING_BYTES, 80
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, abi.OFF_SQES + 64 * self.entries)
        self.rings = mmap.mmap(self.fd, sq.array + 4 * self.entries)
        self.words = memoryview(self.rings).cast("I")
        self.sqes = mmap.mmap(self.fd, 64 * self.entries, offset=abi.OFF_SQES)
        self.sq_head = self.cq_head = self.cq_tail = 0
        self.words[SQ_FLAGS] = abi.SQ_NEED_WAKEUP if self.polled else 0
        return self.fd

    def register(self, fd, opcode, address, count):
        assert fd == self.fd
        if opcode == abi.REGISTER_PROBE:
            ctypes.memset(address, 1, 16 + 8 * count)
        elif opcode == abi.REGISTER_PBUF_RING:
            self.buffer_ring, self.buffers = struct.unpack("=QI", ctypes.string_at(address, 12))
            self.buffer_head = 0
        else:
            raise AssertionError(opcode)
        return 0

    def enter(self, fd, to_submit, min_complete, flags, _sigmask):
        assert fd == self.fd
        self.notice_taken()
        self.on_enter(bool(min_complete))
        tail = self.words[SQ_TAIL]
        if self.polled:
            assert to_submit == 0
            if not flags & (abi.ENTER_SQ_WAKEUP | abi.ENTER_SQ_WAIT | abi.ENTER_GETEVENTS):
                return 0
            to_submit = tail - self.sq_head
        assert flags & abi.ENTER_GETEVENTS or self.polled
        assert to_submit == tail - self.sq_head <= self.entries
        # A polling thread gets to all of it while the caller sleeps.
        count = to_submit if not to_submit or self.polled and min_complete else self.submits(to_submit)
        for _ in range(count):
            self.take()
        if count < to_submit and not self.polled:
            return count or -errno.EAGAIN
        posted = self.cq_tail
        if min_complete and not self.unseen:
            self.on_wait()
        if not count and min_complete and posted == self.cq_tail and not self.unseen:
            return -errno.EINTR
        return 0 if self.polled else count

    def close(self):
        """Let go of the memory."""
        os.close(self.fd)

    # completions

    def notice_taken(self):
        """What the caller has taken from the queue makes room for what did not fit in it."""
        head = self.words[CQ_HEAD]
        while self.cq_head != head:
            self.cq_head += 1
            self.unseen.popleft()
        while self.overflow and self.cq_tail - self.cq_head < self.cq_entries:
            self.put(self.overflow.popleft())

    def post(self, user, slot, result, flags=0):
        self.unseen.append((user, slot, result, flags))
        completion = abi.CQE.pack(*user, result, flags)
        if self.overflow or self.cq_tail - self.cq_head == self.cq_entries:
            self.counts["overflow"] += 1
            self.overflow.append(completion)
        else:
            self.put(completion)

    def put(self, completion):
        at = RING_BYTES + 16 * (self.cq_tail & self.cq_entries - 1)
        self.rings[at:at + 16] = completion
        self.cq_tail += 1
        self.words[CQ_TAIL] = self.cq_tail

    def complete(self, operation, result, flags=0):
        """Post a completion; without CQE_MORE the operation has ended."""
        if not flags & abi.CQE_MORE:
            self.operations.remove(operation)
        self.post(operation.user, operation.slot, result, flags)
        return True

    # submissions

    def take(self):
        """Begin the operation at the head of the submission queue."""
        place = self.words[(RING_BYTES + 16 * self.cq_entries) // 4 + (self.sq_head & self.entries - 1)]
        code, flags, ioprio, slot, off, address, length, op_flags, tag, generation = OPERATION.unpack_from(
            self.sqes, 64 * place)
        self.sq_head += 1
        self.words[SQ_HEAD] = self.sq_head
        operation = Operation(code, slot, (tag, generation), self.clock.now)
        if code in STREAMS:
            assert slot in self.sockets, f"{code} on free slot {slot}"
            receives = code == abi.OP_RECV
            assert not self.in_flight(slot, (code,) if receives else STREAMS[1:]), f"second {code} on slot {slot}"
            if receives:
                assert flags & abi.BUFFER_SELECT and ioprio in (0, abi.RECV_MULTISHOT) and not length
                operation.multishot = ioprio == abi.RECV_MULTISHOT
            else:
                assert op_flags == abi.SEND_FLAGS
                operation.segments = message(address) if code == abi.OP_SENDMSG else [(address, length)]
                operation.total = sum(length for _, length in operation.segments)
                assert operation.total
                self.sockets[slot].sent_at = self.clock.now
            self.operations.append(operation)
        elif code == abi.OP_ACCEPT:
            assert slot in self.listeners and not flags
            assert not self.in_flight(slot, (code,)), "second accept"
            self.counts["multishot accept" if ioprio == abi.ACCEPT_MULTISHOT else "accept"] += 1
            operation.multishot = ioprio == abi.ACCEPT_MULTISHOT
            self.operations.append(operation)
        elif code == abi.OP_SHUTDOWN:
            assert slot in self.listeners or slot in self.sockets
            operation.total = length
            self.operations.append(operation)
        elif code == abi.OP_ASYNC_CANCEL:
            assert flags == abi.CQE_SKIP_SUCCESS
            self.cancel(operation, (address & 0xFFFFFFFF, address >> 32))
        elif code == abi.OP_CLOSE:
            assert flags == abi.CQE_SKIP_SUCCESS
            self.close_slot(slot)
        elif code == abi.OP_READ:
            assert slot == self.signal_pipe and length == 1 and off == (1 << 64) - 1
            operation.address = address
            self.operations.append(operation)
        elif code == abi.OP_TIMEOUT:
            seconds, nanoseconds = struct.unpack("=qq", ctypes.string_at(address, 16))
            operation.due = self.clock.now + seconds + nanoseconds / 1e9
            self.operations.append(operation)
        else:
            raise AssertionError(f"operation {code}")

    def cancel(self, operation, target):
        for other in self.operations:
            if other.user == target and not other.cancelled:
                other.cancelled = True
                self.counts["cancelled"] += 1
                return
        self.counts["cancel missed"] += 1
        self.post(operation.user, None, -errno.ENOENT)

    def close_slot(self, slot):
        assert slot in self.sockets, f"close of free slot {slot}"
        left = [operation.code for operation in self.operations if operation.slot == slot]
        assert not left, f"slot {slot} closed under {left}"
        assert not [1 for _, other, *_ in self.unseen if other == slot], f"slot {slot} closed before its completions"
        socket = self.sockets.pop(slot)
        socket.closed = True
        self.closed.append(socket)

    def in_flight(self, slot, codes):
        return [operation for operation in self.operations if operation.slot == slot and operation.code in codes]

    # what may happen next

    def go_on_all(self):
        """Let everything happen that can."""
        for operation in list(self.operations):
            if operation in self.operations:
                while self.go_on(operation) and operation in self.operations:
                    pass

    def go_on(self, operation, size=1 << 30, more=True):
        """Let an operation do its next step, if it can; tell whether something completed.

        `size` bounds the bytes moved. `more` False ends a multishot operation with this success.
        """
        return self.STEPS[operation.code](self, operation, size, more)

    def accept_step(self, operation, _size, more):
        listener = self.listeners[operation.slot]
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        if listener.shut:
            return self.complete(operation, -errno.EINVAL)
        if not listener.queue:
            return False
        free = [slot for slot in range(self.slots) if slot not in self.sockets]
        if not free:
            self.counts["table full"] += 1
            return self.complete(operation, -errno.ENFILE)
        slot = self.choose_slot(free)
        socket = self.sockets[slot] = listener.queue.popleft()
        socket.slot = slot
        return self.complete(operation, slot, abi.CQE_MORE if operation.multishot and more else 0)

    def recv_step(self, operation, size, more):
        socket = self.sockets[operation.slot]
        if operation.held:
            return self.received(operation, more)
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        if socket.reset:
            return self.complete(operation, -errno.ECONNRESET)
        if not socket.incoming:
            return self.complete(operation, 0, NONEMPTY) if socket.eof else False
        tail = ctypes.c_uint16.from_address(self.buffer_ring + 14).value
        if self.buffer_head & 0xFFFF == tail:
            self.counts["no buffers"] += 1
            return self.complete(operation, -errno.ENOBUFS)
        address, length, buffer = self.buffer(self.buffer_head)
        self.buffer_head += 1
        piece = socket.incoming.popleft()
        size = min(size, length, len(piece))
        if size < len(piece):
            socket.incoming.appendleft(piece[size:])
        ctypes.memmove(address, piece, size)
        operation.held = buffer, size
        return not self.holds() and self.received(operation, more)

    def received(self, operation, more):
        (buffer, size), operation.held = operation.held, None
        socket = self.sockets[operation.slot]
        socket.delivered += size
        flags = abi.CQE_BUFFER | buffer << abi.CQE_BUFFER_SHIFT | (NONEMPTY if socket.incoming else 0)
        return self.complete(operation, size, flags | (abi.CQE_MORE if operation.multishot and more else 0))

    def buffer(self, position):
        """(address, length, number) of the receive buffer at a position of the ring."""
        return struct.unpack("=QIH", ctypes.string_at(self.buffer_ring + 16 * (position & self.buffers - 1), 14))

    def send_step(self, operation, size, _more):
        socket = self.sockets[operation.slot]
        if operation.cancelled:
            return self.complete(operation, operation.done or -errno.ECANCELED)
        if socket.reset or socket.shut:
            return self.complete(operation, operation.done or -errno.EPIPE)
        size = min(size, socket.room, operation.total - operation.done)
        socket.received += read(operation.segments, operation.done, size)
        socket.room -= size
        operation.done += size
        return operation.done == operation.total and self.complete(operation, operation.total)

    def shutdown_step(self, operation, _size, _more):
        if operation.slot in self.listeners:
            self.listeners[operation.slot].shut = True
        else:
            assert operation.total == abi.SHUT_WR
            self.sockets[operation.slot].shut = True
        return self.complete(operation, 0)

    def read_step(self, operation, _size, _more):
        if not self.signals:
            return False
        self.signals -= 1
        ctypes.memset(operation.address, 15, 1)
        return self.complete(operation, 1)

    def timeout_step(self, operation, _size, _more):
        return self.clock.now >= operation.due and self.complete(operation, -errno.ETIME)

    STEPS = {abi.OP_ACCEPT: accept_step, abi.OP_RECV: recv_step, abi.OP_SEND: send_step, abi.OP_SENDMSG: send_step,
             abi.OP_SHUTDOWN: shutdown_step, abi.OP_READ: read_step, abi.OP_TIMEOUT: timeout_step}

    def end(self, operation, result):
        """Let an operation fail with -`result` (or, a send, fall short where it has sent something)."""
        self.counts[errno.errorcode[result]] += 1
        return self.complete(operation, operation.done or -result)


def message(address):
    """The segments of the msghdr at `address`."""
    header = abi.Msghdr.from_address(address)
    assert not header.name and not header.control and not header.flags
    iovecs = (abi.Iovec * header.iovlen).from_address(header.iov)
    return [(iovec.base, iovec.len) for iovec in iovecs]


def read(segments, start, size):
    """`size` bytes of memory from the `start`-th of `segments` on."""
    found = b""
    for base, length in segments:
        if start < length and size:
            found += ctypes.string_at(base + start, min(length - start, size))
            size -= min(length - start, size)
            start = length
        start -= length
    return found


def make_ring(kernel, connections, listeners, kind=uring.Ring, **options):
    """A uring.Ring on `kernel`: slots for `connections`, then `listeners` listening ones, then one for signals."""
    kernel.slots = connections
    kernel.listeners = {connections + i: Listener() for i in range(listeners)}
    kernel.signal_pipe = connections + listeners
    original = uring.load_calls
    uring.load_calls = lambda use_liburing: kernel
    try:
        return kind(connections, **options)
    finally:
        uring.load_calls = original
