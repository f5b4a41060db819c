"""The kernel and libc, for Python: what an engine is told to do, libc's calls, memory that the kernel reads.

Layouts are those of the headers named beside them, and held to their offsets at import. Byte order is native
throughout, so any 64-bit Linux will do.
"""

import contextlib
import ctypes
import errno
import functools
import itertools
import mmap
import os
import re
import socket
import struct
import sys

# What an engine's `write` and completions are made of (uring.py). <linux/io_uring.h> enum io_uring_op
OP_POLL_ADD, OP_SENDMSG, OP_RECVMSG, OP_TIMEOUT, OP_ACCEPT, OP_ASYNC_CANCEL = 6, 9, 10, 11, 13, 14
OP_CLOSE, OP_READ, OP_WRITE, OP_MADVISE, OP_SEND, OP_RECV, OP_SHUTDOWN, OP_URING_CMD = 19, 22, 23, 25, 26, 27, 34, 46
# sqe.flags, sqe.ioprio, cqe.flags
LINK, BUFFER_SELECT, CQE_SKIP_SUCCESS = 1 << 2, 1 << 5, 1 << 6
ACCEPT_MULTISHOT, RECV_MULTISHOT = 1 << 0, 1 << 1
CQE_BUFFER, CQE_MORE, CQE_BUFFER_SHIFT = 1 << 0, 1 << 1, 16

# <linux/socket.h>. WAITALL: the kernel itself goes on with a send that found too little room.
MSG_TRUNC, MSG_CTRUNC, MSG_DONTWAIT, MSG_WAITALL, MSG_NOSIGNAL = 0x20, 0x08, 0x40, 0x100, 0x4000
MSG_CMSG_CLOEXEC = 0x40000000
SEND_FLAGS = MSG_WAITALL | MSG_NOSIGNAL
LAST_WORDS = MSG_DONTWAIT | MSG_NOSIGNAL        # for what is not worth waiting for
SHUT_WR = 1
# <poll.h>; poll32_events has its halves swapped where byte order is the other one
POLLIN, POLLOUT = (1, 4) if sys.byteorder == "little" else (1 << 16, 4 << 16)


def layout(form, *offsets):
    """struct.Struct(`form`) of a C structure, whose fields have to lie at these offsets; the last is its size."""
    found = struct.unpack("<" + form[1:], bytes(range(offsets[-1])))    # each field's lowest byte is its own offset
    assert [value & 0xFF for value in found] == [*offsets[:-1]], form
    return struct.Struct(form)


# --- calls

libc = ctypes.PyDLL(None)       # PyDLL keeps the interpreter lock: there is one thread, and nobody to hand it to
_with_errno = ctypes.PyDLL(None, use_errno=True)
for _library in libc, _with_errno:
    _library.mmap.restype = ctypes.c_void_p
    _library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                              ctypes.c_int64]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

SYS_SETUP, SYS_ENTER, SYS_REGISTER = 425, 426, 427      # io_uring's; <asm-generic/unistd.h>: the same everywhere


def libc_call(name, *arguments, what=""):
    """The result of libc's function `name`, given whole numbers. Raises OSError where that is -1, and names `what`."""
    result = getattr(_with_errno, name)(*map(ctypes.c_long, arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{what or name}: {os.strerror(ctypes.get_errno())}")
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


pointer = ctypes.c_void_p       # of an address: an argument for functions that are not told their argument types
copy = ctypes.memmove           # (target, source, size): addresses


def map_memory(length, protection, flags, fd=-1):
    """The address of a new mapping of `length` bytes (mmap(2)). Raises OSError with the kernel's reason."""
    address = _with_errno.mmap(None, length, protection, flags, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        reason = os.strerror(number) + "; is the address space too small (ulimit -v)?" * (number == errno.ENOMEM)
        raise OSError(number, f"{length} bytes cannot be mapped: {reason}")
    return address


def map_file(fd, length):
    """The address of `length` bytes of file `fd`, mapped for reading by the kernel alone. Raises OSError."""
    # No Python object is laid over it: should the file be truncated, a send fails with EFAULT, while a read from Python
    # would be a SIGBUS.
    if not length:
        return 0
    try:
        return map_memory(length, mmap.PROT_READ, mmap.MAP_SHARED, fd)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        # FUSE does not share pages of files that it reads with direct_io (mergerfs, sshfs, rclone), but it maps them.
        return map_memory(length, mmap.PROT_READ, mmap.MAP_PRIVATE, fd)


@functools.cache
def zeros(length):
    """The address of `length` bytes of zeros, for reading alone: one page of the kernel's is all that they take.

    The same ones each time: they stay for good. Raises OSError.
    """
    return map_memory(length, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def hide(address, length):
    """Let there be nothing at these pages of a mapping: who reads them, gets EFAULT or SIGBUS, no zeros."""
    libc.mmap(address, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED, -1, 0)


def unmap_file(address, length):
    libc.munmap(address, length)


def map_huge(fd, length, bits):
    """The address of a copy of a file's `length` bytes in huge pages of 2**`bits` bytes. Raises OSError."""
    page = 1 << bits
    room = -(-length // page) * page
    try:
        address = map_memory(room, mmap.PROT_READ | mmap.PROT_WRITE,
                             mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB | bits << MAP_HUGE_SHIFT)
    except OSError as error:
        reason = f"there are not enough free huge pages of {page} bytes for {length} bytes: {error.strerror}"
        raise OSError(error.errno, reason) from None
    memory, done = memoryview((ctypes.c_char * length).from_address(address)), 0
    while done < length:
        read = os.preadv(fd, [memory[done:done + (1 << 30)]], done)
        if not read:
            libc.munmap(address, room)
            raise OSError("the archive was cut short while it was read")
        done += read
    return address


MAP_FIXED, MAP_HUGETLB, MAP_HUGE_SHIFT = 0x10, 0x40000, 26      # <asm-generic/mman.h>, <linux/mman.h>
MADV_POPULATE_READ = 22                         # <asm-generic/mman-common.h>, Linux 5.14
POPULATED_AT_ONCE = 64 << 20                    # bytes: some seconds of a memory card


def populate(address, length):
    """Bring a mapping's pages in now, so that no request waits for a page fault. True if it was done."""
    end = address + length          # in pieces: while one is read from the disk, no handler of a signal runs
    return all(libc.madvise(at, min(POPULATED_AT_ONCE, end - at), MADV_POPULATE_READ) == 0
               for at in range(address, end, POPULATED_AT_ONCE))


def lock_program():
    """Keep the interpreter and its libraries in memory, as far as the limit of locked memory allows (mlock(2)).

    Where archives do not fit into memory, their pages push out what they can, and these would be missed the most.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:         # perhaps there is no /proc
        for start, end in re.findall(r"^(\w+)-(\w+)(?: \S+){3} [1-9]\d* +\S*(?:/python3|\.so\b)", file.read(), re.M):
            libc.mlock(int(start, 16), int(end, 16) - int(start, 16))


# --- messages, as sendmsg and recvmsg take them

# <sys/socket.h> struct msghdr, 64-bit: name, namelen, iov, iovlen, control, controllen, flags
MSGHDR = layout("=QI4xQQQQi4x", 0, 8, 16, 24, 32, 40, 48, 56)
IOVEC = layout("=QQ", 0, 8, 16)                 # <sys/uio.h> struct iovec: base, len
CMSGHDR = layout("=Qii", 0, 8, 12, 16)          # <sys/socket.h> struct cmsghdr: len, level, type; its data follow


def message_size(segments):
    """Bytes that a msghdr and its iovecs take, for so many segments."""
    return MSGHDR.size + IOVEC.size * segments


@functools.lru_cache
def message_layout(segments):
    """A msghdr and so many iovecs."""
    return struct.Struct(MSGHDR.format + IOVEC.format.removeprefix("=") * segments)


def write_message(memory, address, segments, control=(0, 0)):
    """Write a msghdr over `segments` of (address, length), then its iovecs, to the front of `memory` at `address`.
    control: address and size of its control message."""
    message_layout(len(segments)).pack_into(
        memory, 0, 0, 0, address + MSGHDR.size, len(segments), *control, 0, *itertools.chain.from_iterable(segments))


def read_message(memory):
    """The segments that `write_message` wrote."""
    count = MSGHDR.unpack_from(memory)[3]
    return [*IOVEC.iter_unpack(memory[MSGHDR.size:MSGHDR.size + IOVEC.size * count])]


class Message:
    """Memory for a message of up to `size` bytes with one control message (cmsg(3)), to send or to receive. address: of
    the msghdr. control_size: CMSG_SPACE or CMSG_LEN of the control message's data, 4 bytes at most."""

    CONTROL = message_size(1)
    DATA = CONTROL + socket.CMSG_SPACE(4)

    def __init__(self, size, control_size):
        self.memory, self.size, self.control_size = bytearray(self.DATA + size), size, control_size
        self.address = address_of(self.memory)
        self.prepare()

    def prepare(self):
        """Make it ready to receive: the kernel has written lengths and flags of the last message into it."""
        write_message(self.memory, self.address, [(self.address + self.DATA, self.size)],
                      (self.address + self.CONTROL, self.control_size))

    def fill(self, level, kind, control, data):
        """Have it send `data`, as many bytes as it has room for, with a control message of this level and type."""
        CMSGHDR.pack_into(self.memory, self.CONTROL, CMSGHDR.size + len(control), level, kind)
        at = self.CONTROL + CMSGHDR.size
        self.memory[at:at + len(control)] = control
        self.memory[self.DATA:] = data

    def received(self, size, level, kind):
        """(data, control, flags) of a received message of `size` bytes, which makes room for the next. control: the
        data of its control message, b"" where it has none of this level and type. flags: MSG_TRUNC ..."""
        *_, control_size, flags = MSGHDR.unpack_from(self.memory)
        length, *what = CMSGHDR.unpack_from(self.memory, self.CONTROL)
        end = self.CONTROL + min(length, control_size)
        control = bytes(self.memory[self.CONTROL + CMSGHDR.size:end]) if what == [level, kind] else b""
        data = bytes(self.memory[self.DATA:self.DATA + size])
        self.prepare()
        return data, control, flags


# --- files, sockets and processes

IN_MODIFY = 2                                   # <sys/inotify.h>
IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


def open_inotify():
    """A descriptor that can be read when a file has been written to that `report_writes` was called for (inotify(7));
    -1 where there cannot be another one."""
    return libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)


def report_writes(inotify, fd):
    """Have an inotify descriptor tell when the file `fd` is written to; the number that it has there, -1 if not."""
    return libc.inotify_add_watch(inotify, b"/proc/self/fd/%d" % fd, IN_MODIFY)


# Of each connection, tcp(7). A response is one send, and the next must not wait for its acknowledgement. And where it
# is not read, no more than so many bytes wait in the kernel for their turn: it would take 4 MiB.
UNSENT = 256 * 1024
TCP_OPTIONS = (socket.TCP_NODELAY, 1), (socket.TCP_NOTSENT_LOWAT, UNSENT)

SOCKADDR = ctypes.create_string_buffer(128)     # struct sockaddr_storage
MAPPED = bytes(10) + b"\xff\xff"                # in front of an IPv4 address in IPv6 (RFC 4291 section 2.5.5.2)
PR_SET_PDEATHSIG = 1                            # <linux/prctl.h>


def peer_address(fd):
    """Who is connected to socket `fd` (getpeername(2)), as text: b"192.0.2.1"; b"" where it is no internet address."""
    if libc.getpeername(fd, SOCKADDR, ctypes.byref(ctypes.c_uint32(len(SOCKADDR)))):
        return b""
    family, raw = int.from_bytes(SOCKADDR.raw[:2], sys.byteorder), SOCKADDR.raw
    if family == socket.AF_INET:
        return socket.inet_ntop(family, raw[4:8]).encode()
    if family == socket.AF_INET6 and raw.startswith(MAPPED, 8):
        return socket.inet_ntop(socket.AF_INET, raw[20:24]).encode()
    return socket.inet_ntop(family, raw[8:24]).encode() if family == socket.AF_INET6 else b""


TCP_INFO_HEAD = ctypes.create_string_buffer(128)        # <linux/tcp.h> struct tcp_info, up to tcpi_bytes_acked


def bytes_acknowledged(fd):
    """How many bytes the client of TCP connection `fd` has acknowledged, of all that were sent; None where it is none
    (tcp(7), TCP_INFO)."""
    size = ctypes.byref(ctypes.c_uint32(len(TCP_INFO_HEAD)))
    if libc.getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_HEAD, size):
        return None
    return int.from_bytes(TCP_INFO_HEAD.raw[120:], sys.byteorder)


def cpus():
    """The numbers of the CPUs that this process may use; of all, where a container does not let it ask."""
    try:
        return sorted(os.sched_getaffinity(0))
    except OSError:
        return list(range(os.cpu_count() or 1))


def die_with_parent(number, parent):
    """Have the kernel send us signal `number` when the parent process ends (prctl(2)); if it has already, end."""
    libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
