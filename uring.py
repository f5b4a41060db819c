"""io_uring from Python: one ring and its receive buffers, the engine that a worker runs on.

Nothing here knows about HTTP. The caller arms operations and takes completions: one system call for each batch, and
otherwise reads and writes of memory that the ring shares with the kernel. The calls go through liburing where it is
installed, else through libc's syscall().

The contract: what the rest of tarweb uses of an engine, and all that another engine would have to provide
  * Each `arm_*` arms one operation. It ends with one completion; a multishot one has several, of which all but the
    last have CQE_MORE. What is armed with CQE_SKIP_SUCCESS completes only if it fails. What is armed with LINK is done
    before what is armed next; if it fails, what is linked behind it is not done.
  * `write` is what they arm with, and takes what SQE.pack_into takes (in the ring it is that function):
    engine.write(engine.queue, place, opcode, flags, ioprio, fd, off, addr, length, op_flags, tag, epoch).
    The place comes from `place()`. The loop saves that call and does the same: when `tail` equals `room`, it calls
    `flush()`; it writes at (tail & `mask`) << 6, and adds 1 to tail.
  * `tail` counts all entries armed so far, and `submitted` how many of them the kernel has consumed: it has copied
    these, and the msghdr to send, iovecs or timespec that they point at. The bytes to send, options to set and all
    memory to receive into (that msghdr, too) have to stay until the operation has completed.
  * `flush(count)` makes room for so many entries: flush(engine.entries) submits all there are. `reserve(count)` has the
    next so many, at most `entries`, submitted together, which linked ones have to be.
  * `wait()` submits what is armed, sleeps until something has completed, and gives the completions in their order:
    (tag, epoch, result, flags). Tag and epoch, 32 bits each, are those armed; the result is the system call's, or
    -errno. There are none if a signal came first. The caller deals with each completion, and gives its buffer back,
    before it takes the next.
  * Received bytes are in one of `buffer_count` buffers of `buffer_size` bytes each. If a completion has CQE_BUFFER, its
    flags >> CQE_BUFFER_SHIFT are the buffer's number i: the bytes begin at i * buffer_size in `pool`, which is at the
    address `buffer_address(i)`. `give_back(i)` lets the buffer be used again. The loop saves that call too: where
    `buffer_order` has i at place `buffer_tail` & `buffer_mask`, it only has to add 1 to buffer_tail.
  * `overflows` counts completions that the kernel has lost. `close()` releases an engine with nothing in flight.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import re
import threading
import time
from array import array
from collections import namedtuple
from functools import partialmethod

from linux import (
    ACCEPT_MULTISHOT, BUFFER_SELECT, CQE_SKIP_SUCCESS, LINK, OP_ACCEPT, OP_ASYNC_CANCEL, OP_CLOSE, OP_MADVISE,
    OP_POLL_ADD, OP_READ, OP_RECV, OP_RECVMSG, OP_SEND, OP_SENDMSG, OP_SHUTDOWN, OP_TIMEOUT, OP_URING_CMD, OP_WRITE,
    RECV_MULTISHOT, SEND_FLAGS, SYS_ENTER, SYS_REGISTER, SYS_SETUP, address_of, layout,
)

NEEDED = {"POLL_ADD": OP_POLL_ADD, "SENDMSG": OP_SENDMSG, "RECVMSG": OP_RECVMSG, "TIMEOUT": OP_TIMEOUT,
          "ACCEPT": OP_ACCEPT, "ASYNC_CANCEL": OP_ASYNC_CANCEL, "CLOSE": OP_CLOSE, "READ": OP_READ, "WRITE": OP_WRITE,
          "MADVISE": OP_MADVISE, "SEND": OP_SEND, "RECV": OP_RECV, "SHUTDOWN": OP_SHUTDOWN}
NEEDS = "tarweb needs Linux 6.1 or newer"
FORBIDDEN = errno.EPERM, errno.ENOSYS           # what seccomp profiles answer with

# <linux/io_uring.h>: io_uring_setup, io_uring_enter, io_uring_register
SETUP_SQPOLL, SETUP_CQSIZE, SETUP_R_DISABLED, SETUP_SUBMIT_ALL = 1 << 1, 1 << 3, 1 << 6, 1 << 7
SETUP_COOP_TASKRUN, SETUP_SINGLE_ISSUER, SETUP_DEFER_TASKRUN = 1 << 8, 1 << 12, 1 << 13
FEATURES = {"SINGLE_MMAP": 1 << 0, "NODROP": 1 << 1, "SUBMIT_STABLE": 1 << 2, "CQE_SKIP": 1 << 11}
OFF_SQ_RING, OFF_SQES, MAX_CQ_ENTRIES = 0, 0x10000000, 65536
ENTER_GETEVENTS, ENTER_SQ_WAKEUP, ENTER_SQ_WAIT = 1 << 0, 1 << 1, 1 << 2
SQ_NEED_WAKEUP, SQ_CQ_OVERFLOW = 1 << 0, 1 << 1
REGISTER_PROBE, REGISTER_RESTRICTIONS, REGISTER_ENABLE_RINGS, REGISTER_PBUF_RING = 8, 11, 12, 22
RESTRICTION_SQE_OP, RESTRICTION_SQE_FLAGS_ALLOWED = 1, 2
SOCKET_URING_OP_SETSOCKOPT = 3                  # enum io_uring_socket_op, Linux 6.7

# The layouts of its structures. struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, op_flags, and user_data
# as (tag, epoch); buf_group, personality, file_index and addr3 behind it are written as zeros
SQE = layout("=BBHiQQIIII24x", 0, 1, 2, 4, 8, 16, 24, 28, 32, 36, 64)
# The same where addr is the user_data of another operation
SQE_CANCEL = layout("=BBHiQIIIIII24x", 0, 1, 2, 4, 8, 16, 20, 24, 28, 32, 36, 64)
# and for a socket option: opcode, flags, ioprio, fd, cmd_op, level, optname, user_data, optlen, optval
SQE_SOCKOPT = layout("=BBHiI4xII8xII4xIQ8x", 0, 1, 2, 4, 8, 16, 20, 32, 36, 44, 48, 64)
CQE = layout("=IIiI", 0, 4, 8, 12, 16)          # struct io_uring_cqe: user_data as (tag, epoch), res, flags
BUF = layout("=QIH", 0, 8, 12, 14)              # struct io_uring_buf but for its last two bytes: entry 0's are the tail
BUFFER_TAIL = 14 // 2                           # struct io_uring_buf_ring: the tail, in 16-bit words
BUF_REG = layout("=QIHH24x", 0, 8, 12, 14, 40)  # struct io_uring_buf_reg: ring_addr, ring_entries, bgid, flags
RESTRICTION = layout("=HBx12x", 0, 2, 16)       # struct io_uring_restriction: opcode; operation or flags
# struct io_uring_params, and at its end io_sqring_offsets and io_cqring_offsets: of all of them what is used
PARAMS = layout("=3I4x2I16x2I8xI4xI12x2I8x2I16x", 0, 4, 8, 16, 20, 40, 44, 56, 64, 80, 84, 96, 100, 120)
Params = namedtuple("Params", "sq_entries cq_entries flags sq_thread_idle features "
                              "sq_head sq_tail sq_flags sq_array cq_head cq_tail cq_overflow cq_cqes")
U32 = 0xFFFFFFFF            # ring positions count modulo 2**32
NO_OFFSET = (1 << 64) - 1   # of a read or a write where the file's own position counts, or there is none


# --- the three system calls, two ways

class Liburing:
    """The calls as liburing >= 2.3 exports them: they give a result, or -errno."""

    def __init__(self):
        library = ctypes.PyDLL("liburing.so.2")
        self.setup, self.enter, self.register = (
            library.io_uring_setup, library.io_uring_enter, library.io_uring_register)
        self.setup.argtypes = [ctypes.c_uint, ctypes.c_void_p]
        # enter has no argtypes: all it is given are C ints and None, and ctypes takes half the time so.
        self.register.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]


class Libc:
    """The same calls through syscall(2), for where liburing is missing."""

    def __init__(self):
        self.syscall = ctypes.PyDLL(None, use_errno=True).syscall
        self.syscall.restype = ctypes.c_long
        self.syscall.argtypes = [ctypes.c_long] * 7

    def call(self, number, a, b, c=0, d=0, e=0, f=0):
        result = self.syscall(number, a, b, c, d, e, f)
        return result if result >= 0 else -ctypes.get_errno()

    setup, register = partialmethod(call, SYS_SETUP), partialmethod(call, SYS_REGISTER)

    def enter(self, fd, to_submit, min_complete, flags, _sigmask):
        return self.call(SYS_ENTER, fd, to_submit, min_complete, flags, 0, 8)


def load_calls(use_liburing=True):
    """Liburing() where it is installed and new enough, else Libc()."""
    with contextlib.suppress(OSError, AttributeError):
        if use_liburing:
            return Liburing()
    return Libc()


# --- where io_uring cannot be had

class RingError(Exception):
    """io_uring cannot be had here; the text says why and what to do."""


def explain(error, call):
    """Why `call`, one of the three, failed with `error` (an errno), and what to do about it: one sentence."""
    try:
        with open("/proc/sys/kernel/io_uring_disabled") as file:
            disabled = file.read().strip()
    except OSError:
        disabled = "0"                      # or it cannot be read any more, see sandbox.py
    release = platform.release()
    version = [int(number) for number in re.findall(r"\d+", release)[:2]]
    if error == errno.EPERM and disabled != "0" and call == "io_uring_setup":
        return (f"io_uring is switched off: kernel.io_uring_disabled is {disabled}; "
                "'sysctl kernel.io_uring_disabled=0' allows it")
    if error == errno.EINVAL and version < [6, 1] or error == errno.ENOSYS and version < [5, 1]:
        return f"this kernel ({release}) is too old: {NEEDS}"
    if error in FORBIDDEN:      # podman has ENOSYS as the answer to what its profile does not know, Docker has EPERM
        return (f"io_uring is forbidden to this process ({call}: {os.strerror(error)}), most likely by a container's "
                "seccomp profile: allow io_uring_setup, io_uring_enter and io_uring_register in it"
                + f" (or this kernel, {release}, was built without io_uring)" * (error == errno.ENOSYS))
    if error == errno.ENOMEM:
        return ("there is not enough memory for the ring: raise the limit of locked memory (ulimit -l) "
                "or lower --ring-size")
    return f"{call}: {os.strerror(error)}"


def permitted(result, call, detail=""):
    """Return `result` of one of the calls; RingError if the call itself is forbidden, OSError for any other failure."""
    if -result in FORBIDDEN:
        raise RingError(explain(-result, call))
    if result < 0:                          # errno itself may be stale: the calls give -errno
        raise OSError(-result, f"{call}{detail}: {os.strerror(-result)}")
    return result


# Facts about memory order
#   * Ring (DEFER_TASKRUN): completions are posted, and receive buffers taken, by our own task inside io_uring_enter.
#     One thread does everything, so program order is all the order there is to want.
#   * PolledRing (SQPOLL): a kernel thread on another CPU reads what we write. Between writing an entry and publishing
#     its tail, between reading a tail and its entries, and between publishing the tail and reading the flags there has
#     to be a fence. Python has none, but releasing and taking an uncontended threading.Lock is a release and then an
#     acquire of one atomic word: no access moves across the pair.
_lock = threading.Lock()
_lock.acquire()


def fence():
    """A full memory barrier: a release and an acquire of the same atomic word (glibc: sem_post, sem_trywait)."""
    _lock.release()
    _lock.acquire()


# --- the ring

class Ring:
    """One io_uring and its receive buffers, for about so many `connections` at a time. operations: the only ones (OP_*)
    that can ever be done with it, None for all; see `restrict`. Raises RingError where the kernel cannot do it."""

    # Facts about files: they are plain descriptors, not slots of a table registered with the ring. Before Linux 6.13 a
    # file taken out of such a table stays open until every operation armed before on any of its files has ended, and
    # multishot operations do not end: closed connections would never see the close. (Seen on 6.1 and 6.12; on 6.18
    # plain descriptors cost nothing that could be measured.)

    write = staticmethod(SQE.pack_into)
    mode = SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_COOP_TASKRUN
    fenced = False

    def __init__(self, connections, *, entries=1024, buffers=256, buffer_size=4096,
                 sqpoll_ms=0, busyloop=0.0, use_liburing=True, operations=None):
        self.calls = load_calls(use_liburing)
        self.system_enter = self.calls.enter
        self.busyloop = busyloop              # seconds to look for completions before sleeping
        self.fd = self.setup(entries, connections, sqpoll_ms, SETUP_R_DISABLED if operations else 0)
        try:
            self.probe()
            self.map_queues()
            self.register_buffers(buffers, buffer_size)
            if operations:
                self.restrict(operations)
        except BaseException:
            self.close()
            raise

    # start-up

    def setup(self, entries, connections, sqpoll_ms, more_flags=0):
        flags = SETUP_SUBMIT_ALL | SETUP_CQSIZE | self.mode | more_flags
        cq_entries = min(max(4 * entries, 2 * connections), MAX_CQ_ENTRIES)
        memory = bytearray(PARAMS.pack(0, cq_entries, flags, sqpoll_ms, *(0,) * 9))
        fd = self.calls.setup(entries, address_of(memory))
        if fd < 0:
            raise RingError(explain(-fd, "io_uring_setup"))
        self.params = Params._make(PARAMS.unpack(memory))
        return fd

    def map_queues(self):
        params = self.params
        self.entries, self.cq_entries = params.sq_entries, params.cq_entries
        array_end = params.sq_array + 4 * self.entries
        size = max(array_end, params.cq_cqes + CQE.size * self.cq_entries)
        shared = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.rings = mmap.mmap(self.fd, size, shared, offset=OFF_SQ_RING)
        self.queue = mmap.mmap(self.fd, self.entries * SQE.size, shared, offset=OFF_SQES)
        self.words = memoryview(self.rings)[:size & ~3].cast("I")
        self.words[params.sq_array // 4:array_end // 4] = array("I", range(self.entries))
        self.sq_head, self.sq_tail, self.sq_flags = params.sq_head // 4, params.sq_tail // 4, params.sq_flags // 4
        self.cq_head, self.cq_tail, self.cq_overflow = params.cq_head // 4, params.cq_tail // 4, params.cq_overflow // 4
        self.cqes = params.cq_cqes
        self.mask, self.cq_mask = self.entries - 1, self.cq_entries - 1
        self.tail = 0                         # of the submission queue, counted without end
        self.submitted = 0                    # how much of it the kernel has consumed, counted likewise
        self.room = self.entries              # where `tail` must stop for want of a free entry
        self.head = 0                         # of the completion queue, modulo 2**32

    def probe(self):
        """Raise RingError if this kernel's io_uring lacks something, or if one of the other two calls is forbidden."""
        missing = [name for name, bit in FEATURES.items() if not self.params.features & bit]
        if missing:
            raise RingError(f"this kernel's io_uring lacks {', '.join(missing)}: {NEEDS}")
        # struct io_uring_probe: 16 bytes, then 8 for each operation, bit 0 of its flags for `supported`
        found = bytearray(16 + 256 * 8)
        self.register(REGISTER_PROBE, "(PROBE)", found, 256)
        self.known = [op for op in range(256) if found[16 + op * 8 + 2] & 1]
        missing = [name for name, op in NEEDED.items() if op not in self.known]
        if missing:
            raise RingError(f"this kernel's io_uring cannot do {', '.join(missing)}: {NEEDS}")
        entered = self.system_enter(self.fd, 0, 0, ENTER_GETEVENTS, None)
        if entered != -errno.EBADFD:        # which is what a ring gives that is still disabled
            ignore_passing(entered)

    def register(self, opcode, name, argument=None, count=0):
        address = 0 if argument is None else address_of(argument)
        permitted(self.calls.register(self.fd, opcode, address, count), "io_uring_register", name)

    def register_buffers(self, count, size):
        """`count` (a power of two) receive buffers of `size` bytes, in a ring that the kernel takes them from."""
        self.buffer_count, self.buffer_size, self.buffer_mask = count, size, count - 1
        self.pool = mmap.mmap(-1, count * size)
        self.buffer_ring = mmap.mmap(-1, count * 16)
        self.pool_address = address_of(self.pool)
        self.buffer_tail_word = memoryview(self.buffer_ring).cast("H")
        self.register(REGISTER_PBUF_RING, "(PBUF_RING)", BUF_REG.pack(address_of(self.buffer_ring), count, 0, 0), 1)
        self.buffer_order, self.buffer_tail = [-1] * count, 0       # which buffer stands at each place of the ring
        for i in range(count):
            self.give_back(i)
        self.publish_buffers()

    def restrict(self, operations):
        """Start a ring that was set up as disabled, and have it do these operations only: nobody can lift that, nor
        change anything else about the ring (io_uring_register(2), IORING_REGISTER_RESTRICTIONS). All other operations
        are attempted. Raises RingError where one works."""
        # That operations be on registered files only is not among the restrictions: there are none, see above.
        rules = [RESTRICTION.pack(RESTRICTION_SQE_OP, op) for op in operations]
        rules.append(RESTRICTION.pack(RESTRICTION_SQE_FLAGS_ALLOWED, LINK | BUFFER_SELECT | CQE_SKIP_SUCCESS))
        self.register(REGISTER_RESTRICTIONS, "(RESTRICTIONS)", b"".join(rules), len(rules))
        self.register(REGISTER_ENABLE_RINGS, "(ENABLE_RINGS)")
        works = [op for op in self.known if op not in operations and self.attempt(op) != [-errno.EACCES]]
        if works or self.calls.register(self.fd, REGISTER_PROBE, 0, 0) != -errno.EACCES:
            raise RingError(f"the kernel does not hold the ring to its restrictions (operations {works}): "
                            "this is worth a report; --secure=off serves without them")

    def attempt(self, op):
        """The results of an operation on no file, in a list that is never empty."""
        self.write(self.queue, self.place(), op, 0, 0, -1, 0, 0, 0, 0, 0, 0)
        while not (found := [result for _, _, result, _ in self.wait()]):
            pass                            # a signal came first
        return found

    @property
    def overflows(self):
        """How many completions the kernel has lost for want of room or memory."""
        return self.words[self.cq_overflow]

    def close(self):
        os.close(self.fd)

    # receive buffers

    def buffer_address(self, i):
        """The address of receive buffer `i`."""
        return self.pool_address + i * self.buffer_size

    def give_back(self, i):
        """Put buffer `i` at the end of the ring; the kernel sees it after `publish_buffers`."""
        place = self.buffer_tail & self.buffer_mask
        if self.buffer_order[place] != i:       # the kernel takes buffers in order: it is nearly always there already
            self.buffer_order[place] = i
            BUF.pack_into(self.buffer_ring, place * 16, self.buffer_address(i), self.buffer_size, i)
        self.buffer_tail += 1

    def publish_buffers(self):
        self.buffer_tail_word[BUFFER_TAIL] = self.buffer_tail & 0xFFFF

    # arming: each puts one operation in the submission queue, and `wait` hands them to the kernel

    def place(self):
        """Where in `queue` the next entry goes."""
        if self.tail == self.room:
            self.flush()
        at = (self.tail & self.mask) << 6
        self.tail += 1
        return at

    def reserve(self, count):
        """Let the next `count` entries go to the kernel together: a chain of links ends with a submission."""
        if self.room - self.tail < count:
            self.flush(count)

    def arm_accept(self, tag, fd, multishot):
        self.write(self.queue, self.place(), OP_ACCEPT, 0, ACCEPT_MULTISHOT if multishot else 0, fd, 0, 0, 0, 0, tag, 0)

    def arm_recv(self, tag, epoch, fd, multishot=True, at_most=0):
        """Multishot: one completion for each piece received, until one comes without CQE_MORE. `at_most`: bytes of a
        single piece, 0 for as many as a buffer takes."""
        self.write(self.queue, self.place(), OP_RECV, BUFFER_SELECT,
                   RECV_MULTISHOT if multishot else 0, fd, 0, 0, at_most, 0, tag, epoch)

    def arm_recvmsg(self, tag, epoch, fd, msghdr, message_flags=0):
        """One message into what `msghdr` points at (kept alive by the caller)."""
        self.write(self.queue, self.place(), OP_RECVMSG, 0, 0, fd, 0, msghdr, 1, message_flags, tag, epoch)

    def arm_sendmsg(self, tag, epoch, fd, msghdr, message_flags=SEND_FLAGS, flags=0):
        self.write(self.queue, self.place(), OP_SENDMSG, flags, 0, fd, 0, msghdr, 1, message_flags, tag, epoch)

    def arm_send(self, tag, epoch, fd, address, length, message_flags=SEND_FLAGS, flags=0):
        self.write(self.queue, self.place(), OP_SEND, flags, 0, fd, 0, address, length, message_flags, tag, epoch)

    def arm_setsockopt(self, tag, epoch, fd, option, value, flags=0):
        """setsockopt(2) with `option` (level, name) and `value` (address, length), kept alive by the caller. Linux 6.7;
        before that it completes with -EOPNOTSUPP."""
        SQE_SOCKOPT.pack_into(self.queue, self.place(), OP_URING_CMD, flags, 0, fd, SOCKET_URING_OP_SETSOCKOPT,
                              *option, tag, epoch, value[1], value[0])

    def arm_shutdown(self, tag, epoch, fd, how):
        """shutdown(2). The kernel always gives this to a worker thread of its own: not for the common path."""
        self.write(self.queue, self.place(), OP_SHUTDOWN, 0, 0, fd, 0, 0, how, 0, tag, epoch)

    def arm_cancel(self, tag, target_tag, target_epoch):
        """Cancel what was armed with that tag and epoch: it ends with -ECANCELED. Completes only if it fails."""
        SQE_CANCEL.pack_into(self.queue, self.place(), OP_ASYNC_CANCEL, CQE_SKIP_SUCCESS, 0, -1,
                             0, target_tag, target_epoch, 0, 0, tag, 0)

    def arm_close(self, tag, epoch, fd):
        """Close. No completion unless it fails: the descriptor's next one is that of an accept."""
        self.write(self.queue, self.place(), OP_CLOSE, CQE_SKIP_SUCCESS, 0, fd, 0, 0, 0, 0, tag, epoch)

    def arm_read(self, tag, fd, buffer):
        """Read from a pipe into `buffer` (writable, kept alive by the caller)."""
        self.arm_pread(tag, 0, fd, address_of(buffer), len(buffer), NO_OFFSET)

    def arm_pread(self, tag, epoch, fd, address, length, offset):
        """Read from a file at `offset` into `length` bytes of memory at `address`."""
        self.write(self.queue, self.place(), OP_READ, 0, 0, fd, offset, address, length, 0, tag, epoch)

    def arm_write(self, tag, fd, address, length):
        """Write `length` bytes at `address`, kept alive by the caller, to the end of a file or into a pipe."""
        self.write(self.queue, self.place(), OP_WRITE, 0, 0, fd, NO_OFFSET, address, length, 0, tag, 0)

    def arm_madvise(self, tag, epoch, address, length, advice, flags=0):
        """madvise(2). The kernel always gives this to a worker thread of its own, so it may wait for a disk."""
        self.write(self.queue, self.place(), OP_MADVISE, flags, 0, -1, 0, address, length, advice, tag, epoch)

    def arm_poll(self, tag, epoch, fd, events, flags=0):
        """One completion when one of `events` (poll(2)) has come, which it gives."""
        self.write(self.queue, self.place(), OP_POLL_ADD, flags, 0, fd, 0, 0, 0, events, tag, epoch)

    def arm_timeout(self, tag, timespec):
        """One completion after `timespec` (struct __kernel_timespec in a bytearray, kept alive by the caller)."""
        self.write(self.queue, self.place(), OP_TIMEOUT, 0, 0, -1, 0, address_of(timespec), 1, 0, tag, 0)

    # submitting and completing

    def wait(self):
        """Submit what is armed, sleep until something has completed, return it; nothing where a signal came first."""
        self.buffer_tail_word[BUFFER_TAIL] = self.buffer_tail & 0xFFFF
        if not (self.busyloop and self.spin()):
            self.enter(1)
        return self.completions()

    def enter(self, min_complete):
        """Submit and run what is due of our own task's work. What passes by itself is left to the next call."""
        self.words[self.sq_tail] = self.tail & U32
        consumed = self.system_enter(self.fd, self.tail - self.submitted, min_complete, ENTER_GETEVENTS, None)
        if consumed < 0:
            ignore_passing(consumed)
        else:
            self.submitted += consumed
            self.room = self.submitted + self.entries

    def flush(self, count=1):
        """Make room for `count` entries in the submission queue."""
        while self.room - self.tail < count:
            self.enter(0)

    def spin(self):
        """Enter without sleeping until there is a completion, or `busyloop` has passed; tell which."""
        deadline = time.monotonic() + self.busyloop
        self.enter(0)
        while self.words[self.cq_tail] == self.head:
            if time.monotonic() >= deadline:
                return False
            self.enter(0)
        return True

    def completions(self):
        """All completions posted so far as (tag, epoch, result, flags), copied out: the queue is free again."""
        tail, head = self.words[self.cq_tail], self.head
        if tail == head:
            return ()
        if self.fenced:             # between the tail and what lies before it
            fence()
        start, end = head & self.cq_mask, ((tail - 1) & self.cq_mask) + 1
        rings, at = self.rings, self.cqes
        if start < end:
            found = rings[at + start * 16:at + end * 16]
        else:
            found = rings[at + start * 16:at + self.cq_entries * 16] + rings[at:at + end * 16]
        if self.fenced:             # between our copying and what may be written there now
            fence()
        self.head = self.words[self.cq_head] = tail
        return CQE.iter_unpack(found)


class PolledRing(Ring):
    """A Ring whose submissions a kernel thread takes (SQPOLL): system calls only to wake it, or to sleep ourselves."""

    mode = SETUP_SQPOLL
    fenced = True

    def publish_buffers(self):
        fence()
        super().publish_buffers()

    def wait(self):
        self.publish_buffers()
        self.publish()
        if self.words[self.sq_flags] & SQ_CQ_OVERFLOW:
            self.call(0, ENTER_GETEVENTS)
        if not self.spin():
            self.call(1, ENTER_GETEVENTS)
        return self.completions()

    def publish(self):
        """Show the kernel's thread what is armed; wake it where it sleeps."""
        words = self.words
        fence()
        words[self.sq_tail] = self.tail & U32
        fence()
        self.submitted = self.tail - ((self.tail - words[self.sq_head]) & U32)
        self.room = self.submitted + self.entries
        if words[self.sq_flags] & SQ_NEED_WAKEUP:
            self.call(0, ENTER_SQ_WAKEUP)

    def call(self, min_complete, flags):
        ignore_passing(self.system_enter(self.fd, 0, min_complete, flags, None))

    def flush(self, count=1):
        self.publish()
        while self.room - self.tail < count:
            self.call(0, ENTER_SQ_WAIT)
            self.publish()

    def spin(self):
        words, tail, head, deadline = self.words, self.cq_tail, self.head, 0.0
        while words[tail] == head:
            moment = time.monotonic()
            deadline = deadline or moment + self.busyloop
            if moment >= deadline:
                return False
        return True


def ignore_passing(result):
    """A signal, or no memory just now: the next call will do it. Any other error is raised."""
    if -result not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
        permitted(result, "io_uring_enter")
