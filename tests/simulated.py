"""A kernel of our own behind the three system calls, for driving uring.Ring and the workers through any schedule.

`Kernel` stands where uring.Liburing and uring.Libc stand. Its memory is a real (anonymous) file, so uring.Ring maps
it, writes 64-byte entries into it and reads completions out of it as ever; only what the operations do is
decided here, and a test says which of them goes on, and when.

What the real kernel promises is kept, and what it asks of us is asserted:
  * operations are armed only on open slots; one receive, one send at a time for each
  * a slot is closed only when every operation on it has completed and the completion has been taken
  * accepted sockets get free slots only
  * msghdr and iovecs are read at submission, the bytes they point at when they are sent
  * a receive takes buffers in the ring's order, and none that was not given back
  * what is linked happens in turn, and not at all behind a failure; what is to be skipped on success says nothing then
  * of an archive that is in memory in part only, nothing is sent that has not been brought in or looked for before
  * what is written stays as it is until it is written
  * socket options are set, and sends that may not wait are done, while they are submitted
  * once a socket has TLS_TX and TLS_RX, records are really sealed and opened with the keys and numbers that were given
  * what does not fit into the completion queue is kept, in order, and told of when somebody enters to look for it
"""

import ctypes
import errno
import fcntl
import mmap
import os
import socket as sockets
import struct
from collections import Counter, deque

import tlskeys
from cryptography.exceptions import InvalidTag

import linux
import archive
import uring

RING_BYTES = 128            # heads, tails and flags, before the completion queue
SQ_HEAD, SQ_TAIL, SQ_FLAGS, CQ_HEAD, CQ_TAIL = 0, 1, 4, 16, 17        # places of the words, in words
NONEMPTY = 1 << 2           # of a receive: nothing that we look at
RECEIVES, SENDS = (linux.OP_RECV, linux.OP_RECVMSG), (linux.OP_SEND, linux.OP_SENDMSG)
STREAMS = RECEIVES + SENDS
BEFORE_SENDS = linux.OP_POLL_ADD, linux.OP_MADVISE      # what a send may be linked behind, with its tag
OPERATION = struct.Struct("=BBHiQQIIII24x")
NO_OFFSET = (1 << 64) - 1   # of a read from what has none
MAY_WAIT = (linux.SEND_FLAGS, linux.MSG_NOSIGNAL)
SOL_TCP, TCP_ULP, SOL_TLS, TLS_TX, TLS_RX = 6, 31, 282, 1, 2
SET_RECORD_TYPE, GET_RECORD_TYPE = 1, 2
CMSG = struct.Struct("=QiiB7x")
CMSG_RIGHTS = struct.Struct("=Qiii")
POLLERR, POLLHUP = 8, 16
FILES_FROM = 500            # numbers of descriptors: none of those that slots have
PAGE = 256                  # bytes: of the archives here, a few files each
ZERO_PAGE = 4096            # nothing is mapped below
END = -(1 << 16)            # no errno


# --- what programs and the kernel tell each other, read and written as the headers have it: <linux/io_uring.h>

U32, U64 = ctypes.c_uint32, ctypes.c_uint64


class Sqe(ctypes.Structure):
    """struct io_uring_sqe"""

    _fields_ = [("opcode", ctypes.c_uint8), ("flags", ctypes.c_uint8), ("ioprio", ctypes.c_uint16),
                ("fd", ctypes.c_int32), ("off", ctypes.c_uint64), ("addr", ctypes.c_uint64), ("len", ctypes.c_uint32),
                ("op_flags", ctypes.c_uint32), ("user_data", ctypes.c_uint32 * 2), ("buf_group", ctypes.c_uint16),
                ("personality", ctypes.c_uint16), ("file_index", ctypes.c_uint32), ("addr3", ctypes.c_uint64),
                ("pad", ctypes.c_uint64)]


class SqOffsets(ctypes.Structure):
    """struct io_sqring_offsets"""

    _fields_ = [("head", U32), ("tail", U32), ("ring_mask", U32), ("ring_entries", U32), ("flags", U32),
                ("dropped", U32), ("array", U32), ("resv1", U32), ("user_addr", U64)]


class CqOffsets(ctypes.Structure):
    """struct io_cqring_offsets"""

    _fields_ = [("head", U32), ("tail", U32), ("ring_mask", U32), ("ring_entries", U32), ("overflow", U32),
                ("cqes", U32), ("flags", U32), ("resv1", U32), ("user_addr", U64)]


class Params(ctypes.Structure):
    """struct io_uring_params"""

    _fields_ = [("sq_entries", U32), ("cq_entries", U32), ("flags", U32), ("sq_thread_cpu", U32),
                ("sq_thread_idle", U32), ("features", U32), ("wq_fd", U32), ("resv", U32 * 3),
                ("sq_off", SqOffsets), ("cq_off", CqOffsets)]


class Iovec(ctypes.Structure):
    """<sys/uio.h> struct iovec"""

    _fields_ = [("base", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class Msghdr(ctypes.Structure):
    """<sys/socket.h> struct msghdr, 64-bit"""

    _fields_ = [("name", ctypes.c_uint64), ("namelen", ctypes.c_uint32), ("iov", ctypes.c_uint64),
                ("iovlen", ctypes.c_uint64), ("control", ctypes.c_uint64), ("controllen", ctypes.c_uint64),
                ("flags", ctypes.c_int32)]


# --- the kernel

class Socket:
    """An accepted connection, and with it all that its client sends, takes and does."""

    def __init__(self):
        self.incoming = deque()     # pieces that the client has sent and nobody has received
        self.eof = False            # the client has sent all
        self.reset = False
        self.room = 0               # bytes that it would take now
        self.received = bytearray() # by the client
        self.delivered = 0          # bytes received from it
        self.opened = 0             # bytes on the wire of records that a receive has opened and not told of
        self.shut = False           # our side is
        self.closed = False
        self.excuse = None          # why it may miss a response
        self.ulp = False            # whether TLS may be set up in the kernel
        self.tx = self.rx = None    # a tlskeys.Direction each, once it has been
        self.queued = b""           # of `incoming`, where the kernel opens records
        self.records = deque()      # opened: [content, kind, bytes on the wire]
        self.unsaid = False         # something that could not wait found no room
        self.source = b"192.0.2.1"  # whom the connection comes from, says getpeername(2)
        self.is_stream = True

    def take(self, data):
        """The client takes what the server has sent."""
        self.received += data


class Datagram:
    """What another process passes: a Socket, or None, and bytes; `cut` where they did not fit."""

    def __init__(self, passed, data=b"", cut=False):
        self.passed, self.data, self.cut = passed, data, cut


class Listener:
    """A listening socket, or the one through which connections are passed; then `queue` is of Datagrams."""

    def __init__(self):
        self.queue = deque()
        self.shut = False


class Operation:
    """One operation in flight."""

    def __init__(self, entry, now):
        (self.code, self.flags, self.ioprio, self.slot, self.offset, self.address, self.length, self.message_flags,
         *self.user) = OPERATION.unpack(entry)
        self.entry, self.user, self.started = entry, tuple(self.user), now
        self.behind = []            # what is linked to it
        self.segments = ()          # of what moves bytes
        self.control = None         # of a send: the type of its record
        self.total = self.done = 0  # bytes
        self.started_work = False   # whether a worker thread has it: then it cannot be cancelled
        self.multishot = False
        self.cancelled = False
        self.due = 0.0              # of a timeout
        self.held = None            # of a receive: (buffer, bytes in it), taken and not yet told of
        self.steady = None          # of a send: its bytes, where they must not change

    @property
    def waits_for_all(self):
        return self.code in SENDS and bool(self.message_flags & linux.MSG_WAITALL)

    def fails(self, result):
        """Whether this result makes a failure of it."""
        return result < 0 or self.waits_for_all and result < self.total


class Kernel:
    """setup, enter and register, as uring.Liburing gives them. `clock` has `now`, in seconds.

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
        self.fails = lambda: 0              # the errno with which entering fails, nothing having been done
        self.sleeps = lambda: True          # whether a polling thread has to be woken
        self.fails_to_close = lambda: 0     # the errno that closing ends with; the descriptor is free all the same
        self.ends_when_full = False         # whether a multishot operation ends when the completion queue is full
        self.choose_slot = min
        self.most_completions = 65536       # that the completion queue holds
        self.sockets = {}           # slot -> Socket
        self.listeners = {}         # slot -> Listener
        self.operations = []        # in flight, oldest first
        self.unseen = deque()       # completions posted and not taken: (user, slot, result, flags)
        self.handing = deque()      # taken, and not yet told to the worker: kept by whoever does that one by one
        self.overflow = deque()
        self.signals = deque()      # their numbers
        self.passing = None         # the Listener's slot through which connections are passed
        self.passed = None          # the slot of the latest
        self.log = bytearray()      # what has been written
        self.log_file = None        # a descriptor for it, of the kind that it is to be taken for
        self.lazy = range(0)        # addresses of the archive that is in memory in part only
        self.warm = set()           # pages of it that are
        self.assured = {}           # page -> when it was last brought in, or found to be there
        self.lasts = 1e9            # seconds for which that is taken to hold
        self.damage = None          # the descriptor that can be read when an archive has been written to
        self.damaged = False        # whether it can
        self.begun = Counter()      # slot -> sends
        self.too_late = set()       # (tag, epoch) of what had been begun when it was to be cancelled
        self.over = False           # nobody takes completions any more
        self.stuck = ()             # codes of operations that do not go on with all others
        self.holds = lambda: False  # whether a receive takes its time between taking a buffer and completing
        self.chain = None           # what has been taken of one that is not complete
        self.refuses = lambda socket, level, name: 0    # the errno with which a socket option fails
        self.steady = lambda tag: False         # whether the bytes of such a send must not change while it is in flight
        self.closed = []            # Sockets in the order of their closing
        self.counts = Counter()     # what has happened, for a test to know that it was tested

    # the three system calls

    def setup(self, entries, address):
        params = Params.from_address(address)
        self.entries = params.sq_entries = 1 << (entries - 1).bit_length()
        self.cq_entries = params.cq_entries = min(1 << (params.cq_entries - 1).bit_length(), self.most_completions)
        params.features = 0xFFFFFFFF
        self.polled = bool(params.flags & uring.SETUP_SQPOLL)
        sq, cq = params.sq_off, params.cq_off
        sq.head, sq.tail, sq.flags, sq.array = 4 * SQ_HEAD, 4 * SQ_TAIL, 4 * SQ_FLAGS, RING_BYTES + 16 * self.cq_entries
        cq.head, cq.tail, cq.cqes, cq.overflow = 4 * CQ_HEAD, 4 * CQ_TAIL, RING_BYTES, 80
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, uring.OFF_SQES + 64 * self.entries)
        self.rings = mmap.mmap(self.fd, sq.array + 4 * self.entries)
        self.words = memoryview(self.rings).cast("I")
        self.sqes = mmap.mmap(self.fd, 64 * self.entries, offset=uring.OFF_SQES)
        self.sq_head = self.cq_head = self.cq_tail = 0
        self.words[SQ_FLAGS] = uring.SQ_NEED_WAKEUP if self.polled else 0
        return self.fd

    def register(self, fd, opcode, address, count):
        assert fd == self.fd
        if opcode == uring.REGISTER_PROBE:
            ctypes.memset(address, 1, 16 + 8 * count)
        elif opcode == uring.REGISTER_PBUF_RING:
            self.buffer_ring, self.buffers = struct.unpack("=QI", ctypes.string_at(address, 12))
            self.buffer_head = 0
        else:
            raise AssertionError(opcode)
        return 0

    def enter(self, fd, to_submit, min_complete, flags, _sigmask):
        assert fd == self.fd
        self.notice_taken()
        if flags & uring.ENTER_GETEVENTS:
            self.flush_overflow()
        self.on_enter(bool(min_complete))
        if error := self.fails():
            self.counts[f"{errno.errorcode[error]} on entering"] += 1
            return -error
        tail = self.words[SQ_TAIL]
        if self.polled:
            self.show(uring.SQ_NEED_WAKEUP, self.sleeps())
            assert to_submit == 0
            if not flags & (uring.ENTER_SQ_WAKEUP | uring.ENTER_SQ_WAIT | uring.ENTER_GETEVENTS):
                return 0
            to_submit = tail - self.sq_head
        assert flags & uring.ENTER_GETEVENTS or self.polled
        assert to_submit == tail - self.sq_head <= self.entries
        # A polling thread gets to all of it while the caller sleeps.
        count = to_submit if not to_submit or self.polled and min_complete else self.submits(to_submit)
        while 0 < count < to_submit and self.entry(self.sq_head + count - 1)[1] & linux.LINK:
            count += 1              # it might tear a chain, but that is asking too much of anybody
        for _ in range(count):
            self.take()
        if self.chain:              # it ends with the submission
            self.counts["torn chain"] += 1
            self.begin(self.chain.pop(0))
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
        if self.log_file is not None:
            os.close(self.log_file)

    def open_log(self, is_file):
        """A descriptor to write to: of a file, or of something like a pipe."""
        fd = os.memfd_create("log") if is_file else os.eventfd(0)
        self.log_file = fcntl.fcntl(fd, fcntl.F_DUPFD, FILES_FROM)
        os.close(fd)
        return self.log_file

    # completions

    def notice_taken(self):
        """Whatever has been taken from the queue is seen."""
        head = self.words[CQ_HEAD]
        while self.cq_head != head:
            self.cq_head += 1
            self.unseen.popleft()

    def flush_overflow(self):
        """What did not fit into the queue goes there as far as there is room now (io_cqring_do_overflow_flush)."""
        while self.overflow and self.has_room:
            self.put(self.overflow.popleft())
        self.show(uring.SQ_CQ_OVERFLOW, bool(self.overflow))

    @property
    def has_room(self):
        return self.cq_tail - self.cq_head < self.cq_entries

    def show(self, flag, is_set):
        """Set or clear a flag for the caller to see."""
        self.words[SQ_FLAGS] = self.words[SQ_FLAGS] & ~flag | flag * is_set

    def post(self, user, slot, result, flags=0):
        self.unseen.append((user, slot, result, flags))
        completion = uring.CQE.pack(*user, result, flags)
        if self.overflow or not self.has_room:
            self.counts["overflow"] += 1
            self.overflow.append(completion)
            self.show(uring.SQ_CQ_OVERFLOW, True)
        else:
            self.put(completion)

    def goes_on(self, operation, more):
        """CQE_MORE where a multishot operation is not over with this completion."""
        full = self.ends_when_full and (self.overflow or not self.has_room)
        return linux.CQE_MORE if operation.multishot and more and not full else 0

    def put(self, completion):
        at = RING_BYTES + 16 * (self.cq_tail & self.cq_entries - 1)
        self.rings[at:at + 16] = completion
        self.cq_tail += 1
        self.words[CQ_TAIL] = self.cq_tail

    def complete(self, operation, result, flags=0):
        """Post a completion; without CQE_MORE the operation has ended, and what is linked to it has its turn."""
        if not flags & linux.CQE_MORE and operation in self.operations:
            self.operations.remove(operation)
        failed, skips = operation.fails(result), operation.flags & linux.CQE_SKIP_SUCCESS
        if failed or not skips:
            awaited = not skips or operation.flags & linux.LINK       # else the slot may be closed before it is seen
            self.post(operation.user, operation.slot if awaited else None, result, flags)
        if operation.behind and failed:
            self.counts["broken chain"] += 1
            for other in operation.behind:      # io_fail_links
                if not skips:
                    self.post(other.user, other.slot, -errno.ECANCELED)
        elif operation.behind:
            following, *following.behind = operation.behind
            self.begin(following)
        return True

    # submissions

    def entry(self, position):
        """The bytes of an entry of the submission queue."""
        place = self.words[(RING_BYTES + 16 * self.cq_entries) // 4 + (position & self.entries - 1)]
        return self.sqes[64 * place:64 * place + 64]

    def take(self):
        """Begin the operation at the head of the submission queue, or put it into a chain."""
        operation = Operation(self.entry(self.sq_head), self.clock.now)
        self.sq_head += 1
        self.words[SQ_HEAD] = self.sq_head
        if self.chain:
            self.chain[0].behind.append(operation)
        elif operation.flags & linux.LINK:
            self.chain = [operation]
        else:
            self.begin(operation)
            return
        if not operation.flags & linux.LINK:
            self.begin(self.chain.pop())

    def begin(self, operation):
        """Do at once what is done at once; put the others among those in flight."""
        if operation.code not in (*SENDS, *BEFORE_SENDS, linux.OP_URING_CMD):
            assert not operation.flags & linux.LINK and not operation.behind, "never tried in a chain"
        self.BEGINNINGS[operation.code](self, operation)

    def begin_recv(self, operation):
        self.check_alone(operation, RECEIVES)
        assert operation.flags == linux.BUFFER_SELECT and operation.ioprio in (0, linux.RECV_MULTISHOT)
        operation.multishot = operation.ioprio == linux.RECV_MULTISHOT
        operation.total = operation.length or 1 << 30
        assert not operation.length or not operation.multishot
        self.operations.append(operation)

    def begin_recvmsg(self, operation):
        if operation.slot == self.passing:
            assert not self.in_flight(operation.slot, RECEIVES) and not operation.flags
            assert operation.message_flags == linux.MSG_CMSG_CLOEXEC
            self.operations.append(operation)
            self.try_at_once(operation)
            return
        self.check_alone(operation, RECEIVES)
        assert self.sockets[operation.slot].rx and not operation.flags and not operation.message_flags
        self.operations.append(operation)

    def check_alone(self, operation, codes):
        slot = operation.slot
        assert slot in self.sockets, f"{operation.code} on free slot {slot}"
        assert not self.in_flight(slot, codes), f"second {operation.code} on slot {slot}"

    def begin_poll(self, operation):
        if operation.slot == self.damage:
            assert operation.message_flags == linux.POLLIN and not operation.flags
            assert not self.in_flight(self.damage, (linux.OP_POLL_ADD,))
            self.operations.append(operation)
            return
        self.check_alone(operation, SENDS + BEFORE_SENDS)
        assert operation.message_flags == linux.POLLOUT and not operation.length
        self.sockets[operation.slot].sent_at = self.clock.now
        self.operations.append(operation)

    def begin_madvise(self, operation):
        operation.slot = operation.user[0] & (1 << 24) - 1
        self.check_alone(operation, SENDS + BEFORE_SENDS)
        start, size = operation.address, operation.length
        assert operation.message_flags == linux.MADV_POPULATE_READ and size and not start % PAGE
        assert operation.flags & linux.LINK and operation.behind, "nobody waits for it"
        assert not operation.behind[-1].message_flags & linux.MSG_WAITALL, "it may be gone when there is room"
        assert self.lazy.start <= start and start + size <= self.lazy.stop + PAGE
        self.operations.append(operation)

    def begin_write(self, operation):
        assert operation.slot == self.log_file and operation.offset == NO_OFFSET and not operation.flags
        operation.slot, operation.total = None, operation.length
        assert operation.total and not [1 for other in self.operations if other.code == linux.OP_WRITE]
        operation.segments = [(operation.address, operation.length)]
        operation.steady = read(operation.segments, 0, operation.total)
        self.operations.append(operation)

    def begin_send(self, operation):
        self.check_alone(operation, SENDS + BEFORE_SENDS)
        socket, flags = self.sockets[operation.slot], operation.message_flags
        if operation.code == linux.OP_SENDMSG:
            operation.segments, operation.control = message(operation.address)
        else:
            operation.segments = [(operation.address, operation.length)]
        operation.total = sum(length for _, length in operation.segments)
        assert operation.total
        assert flags in MAY_WAIT or flags == linux.LAST_WORDS
        assert operation.control is None or socket.tx
        self.check_warm(operation.segments)
        self.begun[operation.slot] += 1
        socket.sent_at = self.clock.now
        if socket.tx and flags & linux.MSG_WAITALL:
            self.counts["WAITALL refused"] += 1
            self.complete(operation, -errno.EOPNOTSUPP)
        elif any(address < ZERO_PAGE for address, _ in operation.segments):
            self.complete(operation, -errno.EFAULT)
        elif flags == linux.LAST_WORDS:
            self.send_at_once(operation, socket)
        else:
            if self.steady(operation.user[0]):
                operation.steady = read(operation.segments, 0, operation.total)
            self.operations.append(operation)

    def check_warm(self, segments):
        """A send that has to wait for a disk keeps all others waiting."""
        for page in {page for address, length in segments if address in self.lazy for page in pages(address, length)}:
            assert self.clock.now - self.assured.get(page, -1e9) <= self.lasts, "sent without a look"

    def in_memory(self, address, length):
        """Whether all of it is; what is then may be sent."""
        found = self.warm.issuperset(pages(address, length))
        if found:
            self.assured.update(dict.fromkeys(pages(address, length), self.clock.now))
        self.counts["in memory" if found else "not in memory"] += 1
        return found

    def send_at_once(self, operation, socket):
        self.send_step(operation, 1 << 30, False) or self.complete(operation, -errno.EAGAIN)
        if operation.done < operation.total:
            socket.unsaid = True
            self.counts["no room for last words"] += 1

    def begin_accept(self, operation):
        assert operation.slot in self.listeners and not operation.flags
        assert not self.in_flight(operation.slot, (operation.code,)), "second accept"
        operation.multishot = operation.ioprio == linux.ACCEPT_MULTISHOT
        self.counts["multishot accept" if operation.multishot else "accept"] += 1
        self.operations.append(operation)
        self.try_at_once(operation)

    def try_at_once(self, operation):
        """An accept takes what waits before it waits itself."""
        listener = self.listeners[operation.slot]
        while operation in self.operations and (listener.queue or listener.shut):
            self.go_on(operation)

    def begin_shutdown(self, operation):
        assert operation.slot in self.listeners or operation.slot in self.sockets
        operation.total = operation.length
        self.operations.append(operation)

    def begin_cancel(self, operation):
        assert operation.flags == linux.CQE_SKIP_SUCCESS
        self.cancel(operation, (operation.address & 0xFFFFFFFF, operation.address >> 32))

    def begin_close(self, operation):
        assert operation.flags == linux.CQE_SKIP_SUCCESS
        self.close_slot(operation.slot)
        if error := self.fails_to_close():
            self.counts[f"{errno.errorcode[error]} on closing"] += 1
            self.post(operation.user, None, -error)

    def begin_read(self, operation):
        if operation.offset == NO_OFFSET:
            assert operation.slot == self.signal_pipe and operation.length == 1
        else:                       # from a real file, whose number is no slot
            operation.fd, operation.slot = operation.slot, None
            operation.segments, operation.total = [(operation.address, operation.length)], operation.length
            assert operation.total
        self.operations.append(operation)

    def begin_timeout(self, operation):
        seconds, nanoseconds = struct.unpack("=qq", ctypes.string_at(operation.address, 16))
        operation.due = self.clock.now + seconds + nanoseconds / 1e9
        self.operations.append(operation)

    def begin_setsockopt(self, operation):
        (_, _, _, slot, command, level, name, *_, size, address) = uring.SQE_SOCKOPT.unpack(operation.entry)
        assert command == uring.SOCKET_URING_OP_SETSOCKOPT
        assert slot in self.sockets, f"an option for free slot {slot}"
        self.complete(operation, -self.set_option(slot, level, name, ctypes.string_at(address, size)))

    def set_option(self, slot, level, name, value):
        """0, or an errno: net/tls/tls_main.c."""
        socket = self.sockets[slot]
        if error := self.refuses(socket, level, name):
            self.counts[f"{errno.errorcode[error]} for option {level} {name}"] += 1
            return error
        if (level, name) == (SOL_TCP, TCP_ULP):
            assert value == b"tls"
            if socket.eof or socket.reset:
                return errno.ENOTCONN
            socket.ulp = True
            return 0
        assert level == SOL_TLS
        if not socket.ulp:
            return errno.ENOPROTOOPT
        direction = tlskeys.Direction.of_info(value)
        if name == TLS_TX:
            assert not socket.tx and not self.in_flight(slot, SENDS), "something is being sent in plaintext"
            socket.tx = direction
        else:
            assert not socket.rx and not self.in_flight(slot, RECEIVES), "a receive takes what is not for it"
            socket.rx = direction
        return 0

    BEGINNINGS = {
        linux.OP_RECV: begin_recv, linux.OP_RECVMSG: begin_recvmsg, linux.OP_SEND: begin_send,
        linux.OP_SENDMSG: begin_send,
        linux.OP_ACCEPT: begin_accept, linux.OP_SHUTDOWN: begin_shutdown, linux.OP_ASYNC_CANCEL: begin_cancel,
        linux.OP_CLOSE: begin_close, linux.OP_READ: begin_read, linux.OP_TIMEOUT: begin_timeout,
        linux.OP_URING_CMD: begin_setsockopt, linux.OP_POLL_ADD: begin_poll, linux.OP_MADVISE: begin_madvise,
        linux.OP_WRITE: begin_write,
    }

    def cancel(self, operation, target):
        for other in self.operations:
            if other.user == target and not other.cancelled:
                if other.started_work:
                    self.counts["cancel too late"] += 1
                    self.too_late.add(target)
                    self.post(operation.user, None, -errno.EALREADY)
                    return
                other.cancelled = True
                self.counts["cancelled"] += 1
                return
        self.counts["cancel missed"] += 1
        self.post(operation.user, None, -errno.ENOENT)

    def close_slot(self, slot):
        assert slot in self.sockets, f"close of free slot {slot}"
        left = [operation.code for operation in self.operations if operation.slot == slot]
        assert not left, f"slot {slot} closed under {left}"
        waiting = [1 for _, other, *_ in (*self.handing, *self.unseen) if other == slot]
        assert not waiting, f"slot {slot} closed before its completions"
        self.counts["closed"] += 1
        socket = self.sockets.pop(slot)
        socket.closed = True
        self.closed.append(socket)

    def in_flight(self, slot, codes):
        return [operation for operation in self.operations if operation.slot == slot and operation.code in codes]

    # what may happen next

    def go_on_all(self):
        """Let everything happen that can."""
        happens = True
        while happens:
            happens = False
            for operation in list(self.operations):
                while operation in self.operations and operation.code not in self.stuck and self.go_on(operation):
                    happens = True

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
        slot = self.place(listener.queue.popleft(), self.choose_slot(free))
        return self.complete(operation, slot, self.goes_on(operation, more))

    def place(self, socket, slot):
        """Give a descriptor to a socket."""
        self.sockets[slot] = socket
        socket.slot = slot
        return slot

    def recv_step(self, operation, size, more):
        socket = self.sockets[operation.slot]
        if operation.held:
            return self.received(operation, more)
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        if socket.reset:
            return self.complete(operation, -errno.ECONNRESET)
        readable = self.readable(socket)
        if readable <= 0:
            return readable < 0 and self.complete(operation, *((0, NONEMPTY) if readable == END else (readable,)))
        if not self.has_buffer:
            self.counts["no buffers"] += 1
            return self.complete(operation, -errno.ENOBUFS)
        address, length, buffer = self.buffer(self.buffer_head)
        self.buffer_head += 1
        piece = self.get(socket, min(size, length, operation.total))
        ctypes.memmove(address, piece, len(piece))
        operation.held = buffer, len(piece)
        return not self.holds() and self.received(operation, more)

    def received(self, operation, more):
        (buffer, size), operation.held = operation.held, None
        socket = self.sockets[operation.slot]
        socket.delivered += socket.opened if socket.rx else size
        socket.opened = 0
        flags = linux.CQE_BUFFER | buffer << linux.CQE_BUFFER_SHIFT | (NONEMPTY if socket.incoming else 0)
        return self.complete(operation, size, flags | self.goes_on(operation, more))

    def readable(self, socket):
        """1 where there are bytes, 0 where there will be, END where there are no more; or -errno."""
        if not socket.rx:
            return 1 if socket.incoming else END if socket.eof else 0
        error = self.open_records(socket, 1)
        if not socket.records:
            return error or (END if socket.eof else 0)
        return 1 if socket.records[0][1] == tlskeys.APPLICATION_DATA else -errno.EIO

    def get(self, socket, size):
        """At most `size` bytes of what has been sent."""
        if socket.rx:
            return self.get_opened(socket, size)
        piece = socket.incoming.popleft()
        if size < len(piece):
            socket.incoming.appendleft(piece[size:])
        return piece[:size]

    def open_records(self, socket, count):
        """Have `count` records opened that are not empty, if they are there: 0, or -errno of the one behind."""
        while len(socket.records) < count:
            while socket.incoming and not tlskeys.first_record(socket.queued):
                socket.queued += socket.incoming.popleft()
            record = tlskeys.first_record(socket.queued)
            if record is None:
                return 0
            try:
                content, kind = socket.rx.open(record)
            except InvalidTag:
                self.counts["EBADMSG"] += 1
                return -errno.EBADMSG
            socket.queued = socket.queued[len(record):]
            if content or kind != tlskeys.APPLICATION_DATA:
                socket.records.append([content, kind, len(record)])
        return 0

    def get_opened(self, socket, size):
        """Application data of one record, or of several that are there."""
        found = b""
        while len(found) < size and socket.records and socket.records[0][1] == tlskeys.APPLICATION_DATA:
            record = socket.records[0]
            piece, record[0] = record[0][:size - len(found)], record[0][size - len(found):]
            found += piece
            if not record[0]:
                socket.opened += socket.records.popleft()[2]
                self.open_records(socket, 1)
        return found

    def pass_step(self, operation):
        queue = self.listeners[operation.slot].queue
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        if not queue and not self.listeners[operation.slot].shut:
            return False
        datagram = queue.popleft() if queue else Datagram(None)     # unix(7): a socket that is shut gives no bytes
        header = Msghdr.from_address(operation.address)
        iovec = Iovec.from_address(header.iov)
        assert header.controllen == CMSG_RIGHTS.size and header.iovlen == 1 and not header.name
        header.flags = linux.MSG_CMSG_CLOEXEC | linux.MSG_TRUNC * datagram.cut
        header.controllen, self.passed = 0, None
        free = [slot for slot in range(self.slots) if slot not in self.sockets]
        if datagram.passed and not free:
            self.counts["passed in vain"] += 1
            header.flags |= linux.MSG_CTRUNC
            datagram.passed.excuse, datagram.passed.closed = "no room for it", True
        elif datagram.passed:
            self.passed = slot = self.place(datagram.passed, self.choose_slot(free))
            datagram.passed.delivered += len(datagram.data)
            ctypes.memmove(header.control, CMSG_RIGHTS.pack(20, sockets.SOL_SOCKET, sockets.SCM_RIGHTS, slot), 20)
            header.controllen = CMSG_RIGHTS.size
        piece = datagram.data[:iovec.len]
        ctypes.memmove(iovec.base, piece, len(piece))
        return self.complete(operation, len(piece))

    def close_at_once(self, slot):
        """close(2), of what has never been known to the ring."""
        socket = self.sockets.pop(slot)
        socket.closed = True
        socket.excuse = socket.excuse or "not let in"
        self.closed.append(socket)

    def recvmsg_step(self, operation, _size, _more):
        if operation.slot == self.passing:
            return self.pass_step(operation)
        socket = self.sockets[operation.slot]
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        if socket.reset:
            return self.complete(operation, -errno.ECONNRESET)
        readable = self.readable(socket)
        if readable not in (1, -errno.EIO):
            return bool(readable) and self.complete(operation, 0 if readable == END else readable)
        content, kind, _ = record = socket.records[0]
        header = Msghdr.from_address(operation.address)
        iovec = Iovec.from_address(header.iov)
        assert header.controllen >= CMSG.size and header.iovlen == 1
        ctypes.memmove(header.control, CMSG.pack(17, SOL_TLS, GET_RECORD_TYPE, kind), CMSG.size)
        piece, record[0] = content[:iovec.len], content[iovec.len:]
        ctypes.memmove(iovec.base, piece, len(piece))
        self.counts[f"record of type {kind}"] += 1
        if not record[0]:
            socket.delivered += socket.records.popleft()[2]
        return self.complete(operation, len(piece))

    @property
    def has_buffer(self):
        return self.buffer_head & 0xFFFF != ctypes.c_uint16.from_address(self.buffer_ring + 14).value

    def buffer(self, position):
        """(address, length, number) of the receive buffer at a position of the ring."""
        return struct.unpack("=QIH", ctypes.string_at(self.buffer_ring + 16 * (position & self.buffers - 1), 14))

    def send_step(self, operation, size, _more):
        socket = self.sockets[operation.slot]
        if operation.cancelled:
            return self.complete(operation, operation.done or -errno.ECANCELED)
        if socket.reset or socket.shut:
            return self.complete(operation, operation.done or -errno.EPIPE)
        size = min(size, max(socket.room, 0), operation.total - operation.done)
        if operation.control and size < operation.total:
            return False            # a record of its own is sent whole
        data = read(operation.segments, operation.done, size)
        if operation.steady is not None:
            assert data == operation.steady[operation.done:operation.done + size], "bytes changed while being sent"
        if size:
            socket.take(self.sealed(socket, operation, data))
        socket.room -= size
        operation.done += size
        ends = operation.done == operation.total or size and not operation.waits_for_all
        if ends and operation.done < operation.total:
            self.counts["short without WAITALL"] += 1
        return bool(ends) and self.complete(operation, operation.done)

    def poll_step(self, operation, _size, _more):
        if operation.slot == self.damage:
            return self.damaged and self.complete(operation, linux.POLLIN)
        socket = self.sockets[operation.slot]
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        if socket.reset:
            return self.complete(operation, linux.POLLOUT | POLLERR | POLLHUP)
        return socket.room > 0 and self.complete(operation, linux.POLLOUT)

    def madvise_step(self, operation, _size, _more):
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        brought = pages(operation.address, operation.length)
        self.warm.update(brought)
        self.assured.update(dict.fromkeys(brought, self.clock.now))
        self.counts["populated"] += 1
        return self.complete(operation, 0)

    def write_step(self, operation, size, _more):
        assert read(operation.segments, 0, operation.total) == operation.steady, "changed while being written"
        size = min(size, operation.total)
        self.log += operation.steady[:size]
        self.counts["short write" if size < operation.total else "write"] += 1
        return self.complete(operation, size)

    @staticmethod
    def sealed(socket, operation, data):
        """What goes over the wire."""
        if not socket.tx:
            return data
        return socket.tx.seal(data, operation.control) if operation.control else socket.tx.seal_all(data)

    def shutdown_step(self, operation, _size, _more):
        if operation.slot in self.listeners:
            self.listeners[operation.slot].shut = True
        else:
            assert operation.total == linux.SHUT_WR
            if self.sockets[operation.slot].reset:
                return self.complete(operation, -errno.ENOTCONN)
            self.sockets[operation.slot].shut = True
        return self.complete(operation, 0)

    def read_step(self, operation, size, _more):
        if operation.segments:
            return self.read_file_step(operation, size)
        if not self.signals:
            return False
        ctypes.memset(operation.address, self.signals.popleft(), 1)
        return self.complete(operation, 1)

    def read_file_step(self, operation, size):
        if operation.cancelled:
            return self.complete(operation, -errno.ECANCELED)
        data = os.pread(operation.fd, min(size, operation.length), operation.offset)
        ctypes.memmove(operation.address, data, len(data))
        self.counts["read from the file" if data else "read behind the end"] += 1
        return self.complete(operation, len(data))

    def timeout_step(self, operation, _size, _more):
        return self.clock.now >= operation.due and self.complete(operation, -errno.ETIME)

    STEPS = {linux.OP_ACCEPT: accept_step, linux.OP_RECV: recv_step, linux.OP_SEND: send_step,
             linux.OP_SENDMSG: send_step, linux.OP_RECVMSG: recvmsg_step,
             linux.OP_SHUTDOWN: shutdown_step, linux.OP_READ: read_step,
             linux.OP_TIMEOUT: timeout_step, linux.OP_POLL_ADD: poll_step, linux.OP_MADVISE: madvise_step,
             linux.OP_WRITE: write_step}

    def end(self, operation, result):
        """Let an operation fail with -`result` (or, a send, fall short where it has sent something)."""
        self.counts[errno.errorcode[result]] += 1
        return self.complete(operation, operation.done or -result)


def pages(address, length):
    return range(address // PAGE, (address + length - 1) // PAGE + 1)


def message(address):
    """(segments, type of the record or None) of the msghdr at `address`."""
    header = Msghdr.from_address(address)
    assert not header.name and not header.flags
    iovecs = (Iovec * header.iovlen).from_address(header.iov)
    kind = None
    if header.control:
        assert header.controllen == CMSG.size
        length, level, what, kind = CMSG.unpack(ctypes.string_at(header.control, CMSG.size))
        assert (length, level, what) == (17, SOL_TLS, SET_RECORD_TYPE)
    return [(iovec.base, iovec.len) for iovec in iovecs], kind


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


class Present:
    """Stands in for what asks the system directly; `kernel` is the latest that a ring was made on."""

    def __init__(self):
        self.kernel = None

    def peer_address(self, slot):
        return self.kernel.sockets[slot].source

    def bytes_acknowledged(self, slot):
        socket = self.kernel.sockets[slot]
        return len(socket.received) if socket.source else None

    def is_stream(self, slot):
        return self.kernel.sockets[slot].is_stream

    def close(self, slot):
        self.kernel.close_at_once(slot)

    def in_memory(self, _fd, offset, length):
        if length > archive.WHOLE_CHECK:
            return False
        return self.kernel.in_memory(self.kernel.lazy.start + offset, length)

    def poll(self):
        return Poller(self.kernel)


class Poller:
    """select.poll, for a listener."""

    def __init__(self, kernel):
        self.kernel = kernel

    def register(self, slot, events):
        self.slot = slot

    def poll(self, _timeout):
        listener = self.kernel.listeners[self.slot]
        return [self.slot] * bool(listener.queue or listener.shut)


present = Present()


def make_ring(kernel, connections, listeners, kind=uring.Ring, passing=False, **options):
    """A uring.Ring on `kernel`: slots for `connections`, then `listeners` listening ones, then one for signals and one
    for damage; `passing`: the last listener is the socket through which connections are passed."""
    kernel.slots = connections
    kernel.listeners = {connections + i: Listener() for i in range(listeners)}
    kernel.passing = connections + listeners - 1 if passing else None
    kernel.signal_pipe, kernel.damage = connections + listeners, connections + listeners + 1
    present.kernel = kernel
    original = uring.load_calls
    uring.load_calls = lambda use_liburing: kernel
    try:
        return kind(connections, **options)
    finally:
        uring.load_calls = original
