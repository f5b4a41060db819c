"""The kernel's side of io_uring, for Python: numbers, structures, the three system calls, memory that the kernel reads.

Layouts are those of <linux/io_uring.h>, checked at import, and byte order is native throughout, so any 64-bit
Linux will do. The system calls go through liburing where it is installed, else through libc's syscall().
"""

import contextlib
import ctypes
import mmap
import os
import re
import socket
import struct
import sys

# <linux/io_uring.h> enum io_uring_op
OP_POLL_ADD, OP_SENDMSG, OP_RECVMSG, OP_TIMEOUT, OP_ACCEPT, OP_ASYNC_CANCEL = 6, 9, 10, 11, 13, 14
OP_CLOSE, OP_READ, OP_WRITE, OP_MADVISE, OP_SEND, OP_RECV, OP_SHUTDOWN, OP_URING_CMD = 19, 22, 23, 25, 26, 27, 34, 46
NEEDED = {"POLL_ADD": OP_POLL_ADD, "SENDMSG": OP_SENDMSG, "RECVMSG": OP_RECVMSG, "TIMEOUT": OP_TIMEOUT,
          "ACCEPT": OP_ACCEPT, "ASYNC_CANCEL": OP_ASYNC_CANCEL, "CLOSE": OP_CLOSE, "READ": OP_READ, "WRITE": OP_WRITE,
          "MADVISE": OP_MADVISE, "SEND": OP_SEND, "RECV": OP_RECV, "SHUTDOWN": OP_SHUTDOWN}

# sqe.flags, sqe.ioprio, cqe.flags
LINK, BUFFER_SELECT, CQE_SKIP_SUCCESS = 1 << 2, 1 << 5, 1 << 6
ACCEPT_MULTISHOT, RECV_MULTISHOT = 1 << 0, 1 << 1
CQE_BUFFER, CQE_MORE, CQE_BUFFER_SHIFT = 1 << 0, 1 << 1, 16

# io_uring_setup, io_uring_enter, io_uring_register
SETUP_SQPOLL, SETUP_CQSIZE, SETUP_R_DISABLED, SETUP_SUBMIT_ALL = 1 << 1, 1 << 3, 1 << 6, 1 << 7
SETUP_COOP_TASKRUN, SETUP_SINGLE_ISSUER, SETUP_DEFER_TASKRUN = 1 << 8, 1 << 12, 1 << 13
FEATURES = {"SINGLE_MMAP": 1 << 0, "NODROP": 1 << 1, "SUBMIT_STABLE": 1 << 2, "CQE_SKIP": 1 << 11}
OFF_SQ_RING, OFF_SQES = 0, 0x10000000
ENTER_GETEVENTS, ENTER_SQ_WAKEUP, ENTER_SQ_WAIT = 1 << 0, 1 << 1, 1 << 2
SQ_NEED_WAKEUP, SQ_CQ_OVERFLOW = 1 << 0, 1 << 1
REGISTER_PROBE, REGISTER_RESTRICTIONS, REGISTER_ENABLE_RINGS, REGISTER_PBUF_RING = 8, 11, 12, 22
RESTRICTION = struct.Struct("=HBx12x")          # struct io_uring_restriction: opcode; operation or flags
RESTRICTION_SQE_OP, RESTRICTION_SQE_FLAGS_ALLOWED = 1, 2

# <linux/socket.h>. WAITALL: the kernel itself goes on with a send that found too little room.
MSG_TRUNC, MSG_CTRUNC, MSG_DONTWAIT, MSG_WAITALL, MSG_NOSIGNAL = 0x20, 0x08, 0x40, 0x100, 0x4000
MSG_CMSG_CLOEXEC = 0x40000000
SEND_FLAGS = MSG_WAITALL | MSG_NOSIGNAL
LAST_WORDS = MSG_DONTWAIT | MSG_NOSIGNAL        # for what is not worth waiting for
SHUT_WR = 1
# <poll.h>; poll32_events has its halves swapped where byte order is the other one
POLLIN, POLLOUT = (1, 4) if sys.byteorder == "little" else (1 << 16, 4 << 16)
SOCKET_URING_OP_SETSOCKOPT = 3                  # enum io_uring_socket_op, Linux 6.7

MAX_CQ_ENTRIES = 65536


class Sqe(ctypes.Structure):
    """struct io_uring_sqe. Written through SQE below; here to pin what that says to the header."""

    _fields_ = [("opcode", ctypes.c_uint8), ("flags", ctypes.c_uint8), ("ioprio", ctypes.c_uint16),
                ("fd", ctypes.c_int32), ("off", ctypes.c_uint64), ("addr", ctypes.c_uint64), ("len", ctypes.c_uint32),
                ("op_flags", ctypes.c_uint32), ("user_data", ctypes.c_uint32 * 2), ("buf_group", ctypes.c_uint16),
                ("personality", ctypes.c_uint16), ("file_index", ctypes.c_uint32), ("addr3", ctypes.c_uint64),
                ("pad", ctypes.c_uint64)]


U32, U64 = ctypes.c_uint32, ctypes.c_uint64


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


for _struct, _size in ((Sqe, 64), (SqOffsets, 40), (CqOffsets, 40), (Params, 120), (Iovec, 16), (Msghdr, 56)):
    assert ctypes.sizeof(_struct) == _size, _struct
for _name, _at in {"fd": 4, "off": 8, "addr": 16, "len": 24, "op_flags": 28, "user_data": 32,
                   "buf_group": 40, "file_index": 44, "addr3": 48}.items():
    assert getattr(Sqe, _name).offset == _at, _name

# opcode, flags, ioprio, fd, off, addr, len, op_flags, user_data as (tag, generation); the pad is written as zeros
SQE = struct.Struct("=BBHiQQIIII24x")
SQE_CANCEL = struct.Struct("=BBHiQIIIIII24x")  # as SQE, where addr is the user_data of another operation
# The same for a socket option: opcode, flags, ioprio, fd, cmd_op, level, optname, user_data, optlen, optval
SQE_SOCKOPT = struct.Struct("=BBHiI4xII8xII4xIQ8x")
CQE = struct.Struct("=IIiI")                   # struct io_uring_cqe: user_data as (tag, generation), res, flags
BUF = struct.Struct("=QIH")                    # struct io_uring_buf but for its last two bytes: entry 0's are the tail
MSGHDR = struct.Struct("=QI4xQQQQi4x")         # name, namelen, iov, iovlen, control, controllen, flags
IOVEC = struct.Struct("=QQ")
assert (SQE.size, SQE_CANCEL.size, SQE_SOCKOPT.size, CQE.size, MSGHDR.size, IOVEC.size) == (64, 64, 64, 16, 56, 16)

libc = ctypes.PyDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# --- the three system calls, two ways

SYS_SETUP, SYS_ENTER, SYS_REGISTER = 425, 426, 427      # <asm-generic/unistd.h>: the same number on every architecture


class Liburing:
    """The calls as liburing >= 2.3 exports them: they give a result, or -errno."""

    name = "liburing"

    def __init__(self):
        # PyDLL keeps the interpreter lock: there is one thread, and nobody to hand it to.
        library = ctypes.PyDLL("liburing.so.2")
        self.setup = library.io_uring_setup
        self.enter = library.io_uring_enter
        self.register = library.io_uring_register
        self.setup.argtypes = [ctypes.c_uint, ctypes.c_void_p]
        # enter has no argtypes: all it is given are C ints and None, and ctypes takes half the time so.
        self.register.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]


class Libc:
    """The same calls through syscall(2), for where liburing is missing."""

    name = "syscall(2)"

    def __init__(self):
        self.syscall = ctypes.PyDLL(None, use_errno=True).syscall
        self.syscall.restype = ctypes.c_long
        self.syscall.argtypes = [ctypes.c_long] * 7

    def call(self, number, a, b, c=0, d=0, e=0, f=0):
        result = self.syscall(number, a, b, c, d, e, f)
        return result if result >= 0 else -ctypes.get_errno()

    def setup(self, entries, params):
        return self.call(SYS_SETUP, entries, params)

    def enter(self, fd, to_submit, min_complete, flags, _sigmask):
        return self.call(SYS_ENTER, fd, to_submit, min_complete, flags, 0, 8)

    def register(self, fd, opcode, argument, count):
        return self.call(SYS_REGISTER, fd, opcode, argument, count)


def load_calls(use_liburing=True):
    """Liburing() where it is installed and new enough, else Libc()."""
    if use_liburing:
        try:
            return Liburing()
        except (OSError, AttributeError):
            pass
    return Libc()


_with_errno = ctypes.PyDLL(None, use_errno=True)


def libc_call(name, *arguments, what=""):
    """The result of libc's function `name`, given whole numbers. Raises OSError where that is -1, and names `what`."""
    result = getattr(_with_errno, name)(*map(ctypes.c_long, arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{what or name}: {os.strerror(ctypes.get_errno())}")
    return result


def check(result, what):
    """Return `result`, or raise OSError: the calls give -errno, and errno itself may be stale."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


# --- memory that the kernel reads

# Where in an object of CPython's type bytes its contents are: three times as fast to add as to ask ctypes.
BYTES_CONTENTS = bytes.__basicsize__ - 1
assert ctypes.string_at(id(b"tarweb") + BYTES_CONTENTS, 7) == b"tarweb\0"


def address_of(buffer):
    """The address of `buffer`: bytes (kept alive by the caller) or anything writable."""
    if isinstance(buffer, bytes):
        return id(buffer) + BYTES_CONTENTS
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def pointer(address):
    """`address` as an argument for functions that are called without being told their argument types."""
    return ctypes.c_void_p(address)


def copy(target, source, size):
    """Copy `size` bytes between addresses."""
    ctypes.memmove(target, source, size)


def map_file(fd, length):
    """The address of `length` bytes of file `fd`, mapped for reading by the kernel alone.

    No Python object is laid over it: should the file be truncated, a send fails with EFAULT, while a read
    from Python would be a SIGBUS. Raises OSError.
    """
    if not length:
        return 0
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(f"cannot map {length} bytes of the archive: the address space (ulimit -v) is too small")
    return address


def hide(address, length):
    """Let there be nothing at these pages of a mapping: who reads them, gets EFAULT or SIGBUS, no zeros."""
    libc.mmap(address, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED, -1, 0)


def unmap_file(address, length):
    if length:
        libc.munmap(address, length)


def map_huge(fd, length, bits):
    """The address of a copy of a file's `length` bytes in huge pages of 2**`bits` bytes. Raises OSError."""
    page = 1 << bits
    address = libc.mmap(None, -(-length // page) * page, mmap.PROT_READ | mmap.PROT_WRITE,
                        mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB | bits << MAP_HUGE_SHIFT, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(f"there are not enough free huge pages of {page} bytes for {length} bytes")
    memory, done = (ctypes.c_char * length).from_address(address), 0
    while done < length:
        read = os.preadv(fd, [memoryview(memory)[done:done + (1 << 30)]], done)
        if not read:
            libc.munmap(address, -(-length // page) * page)
            raise OSError("the archive was cut short while it was read")
        done += read
    return address


MAP_FIXED, MAP_HUGETLB, MAP_HUGE_SHIFT = 0x10, 0x40000, 26      # <asm-generic/mman.h>, <linux/mman.h>
MADV_POPULATE_READ = 22                         # <asm-generic/mman-common.h>, Linux 5.14


def populate(address, length):
    """Bring a mapping's pages in now, so that no request waits for a page fault. True if it was done."""
    return libc.madvise(address, length, MADV_POPULATE_READ) == 0


def lock_program():
    """Keep the interpreter and its libraries in memory, as far as the limit of locked memory allows (mlock(2)).

    Where archives do not fit into memory, their pages push out what they can, and these would be missed the most.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:         # perhaps there is no /proc
        for line in file:
            bounds, _, _, _, inode, *path = line.split()
            if inode != "0" and path and re.search(r"/python3|\.so\b", path[0]):
                start, end = (int(bound, 16) for bound in bounds.split("-"))
                libc.mlock(start, end - start)


def message_size(segments):
    """Bytes that a msghdr and its iovecs take, for so many segments."""
    return MSGHDR.size + IOVEC.size * segments


def write_message(memory, address, segments):
    """Write a msghdr over `segments` of (address, length), then its iovecs, to the front of `memory` at `address`."""
    MSGHDR.pack_into(memory, 0, 0, 0, address + MSGHDR.size, len(segments), 0, 0, 0)
    for i, (base, length) in enumerate(segments):
        IOVEC.pack_into(memory, MSGHDR.size + IOVEC.size * i, base, length)


def read_message(memory):
    """The segments that `write_message` wrote."""
    count = MSGHDR.unpack_from(memory)[3]
    return [IOVEC.unpack_from(memory, MSGHDR.size + IOVEC.size * i) for i in range(count)]


# --- files, sockets and processes

IN_MODIFY = 2                                   # <sys/inotify.h>
IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


def open_inotify():
    """A descriptor that can be read when a file has been written to that `report_writes` was called for (inotify(7)).

    -1 where there cannot be another one.
    """
    return libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)


def report_writes(inotify, fd):
    libc.inotify_add_watch(inotify, b"/proc/self/fd/%d" % fd, IN_MODIFY)


# Of each connection, tcp(7). A response is one send, and the next must not wait for its acknowledgement. And where it
# is not read, no more than so many bytes wait in the kernel for their turn: it would take 4 MiB.
UNSENT = 256 * 1024
TCP_OPTIONS = (socket.TCP_NODELAY, 1), (socket.TCP_NOTSENT_LOWAT, UNSENT)

SOCKADDR = ctypes.create_string_buffer(128)     # struct sockaddr_storage
SOCKADDR_SIZE = ctypes.c_uint32()
MAPPED = bytes(10) + b"\xff\xff"                # in front of an IPv4 address in IPv6 (RFC 4291 section 2.5.5.2)
PR_SET_PDEATHSIG = 1                            # <linux/prctl.h>


def peer_address(fd):
    """Who is connected to socket `fd` (getpeername(2)), as text: b"192.0.2.1"; b"" where it is no internet address."""
    SOCKADDR_SIZE.value = len(SOCKADDR)
    if libc.getpeername(fd, SOCKADDR, ctypes.byref(SOCKADDR_SIZE)):
        return b""
    raw = SOCKADDR.raw
    family = int.from_bytes(raw[:2], sys.byteorder)
    if family == socket.AF_INET:
        return socket.inet_ntop(family, raw[4:8]).encode()
    if family != socket.AF_INET6:
        return b""
    if raw.startswith(MAPPED, 8):
        return socket.inet_ntop(socket.AF_INET, raw[20:24]).encode()
    return socket.inet_ntop(family, raw[8:24]).encode()


TCP_INFO_HEAD = ctypes.create_string_buffer(128)        # <linux/tcp.h> struct tcp_info, up to tcpi_bytes_acked
TCP_INFO_SIZE = ctypes.c_uint32()


def bytes_acknowledged(fd):
    """How many bytes the client of TCP connection `fd` has acknowledged, of all that were sent; None where it is none
    (tcp(7), TCP_INFO)."""
    TCP_INFO_SIZE.value = len(TCP_INFO_HEAD)
    if libc.getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_HEAD, ctypes.byref(TCP_INFO_SIZE)):
        return None
    return int.from_bytes(TCP_INFO_HEAD.raw[120:], sys.byteorder)


def die_with_parent(number, parent):
    """Have the kernel send us signal `number` when the parent process ends (prctl(2)); if it has already, end."""
    libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
