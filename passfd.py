"""Connections passed by another process: a datagram for each, with its descriptor and what was read from it already.

The wire is that of the Rust tarweb: a unix datagram socket (unix(7)), SCM_RIGHTS with exactly one descriptor, of a
connected stream socket; the datagram's bytes are those that its sender has read from it, perhaps none.
"""

import contextlib
import errno
import os
import socket
import struct

import abi

# Of each connection, tcp(7). A response is one send, and the next must not wait for its acknowledgement. And where it
# is not read, no more than so many bytes wait in the kernel for their turn: it would take 4 MiB.
UNSENT = 256 * 1024
TCP_OPTIONS = (socket.TCP_NODELAY, 1), (socket.TCP_NOTSENT_LOWAT, UNSENT)
LARGEST = 32 * 1024         # bytes that may have been read: more than a request head or a ClientHello takes
# <sys/socket.h> struct cmsghdr (len, level, type), then one descriptor. Not CMSG_SPACE, in which there is room for two.
CMSG = struct.Struct("=Qiii")
assert CMSG.size == socket.CMSG_LEN(4)


class Envelope:
    """Memory for a msghdr, its iovec, one control message with a descriptor, and the bytes read."""

    IOV = abi.MSGHDR.size
    CONTROL = IOV + abi.IOVEC.size
    DATA = CONTROL + socket.CMSG_SPACE(4)
    flags = abi.MSG_CMSG_CLOEXEC

    def __init__(self):
        self.memory = bytearray(self.DATA + LARGEST)
        self.address = abi.address_of(self.memory)
        self.prepare()

    def prepare(self):
        """Make it ready for the next message: the kernel writes lengths and flags into it."""
        at = self.address
        abi.MSGHDR.pack_into(self.memory, 0, 0, 0, at + self.IOV, 1, at + self.CONTROL, CMSG.size, 0)
        abi.IOVEC.pack_into(self.memory, self.IOV, at + self.DATA, LARGEST)

    def open(self, size):
        """(descriptor, bytes) of the message of `size` bytes that has come; (-errno.ECONNABORTED, b"") for one that is
        not as it should be, and whatever was in it is closed."""
        _, _, _, _, _, control_size, flags = abi.MSGHDR.unpack_from(self.memory)
        data = bytes(self.memory[self.DATA:self.DATA + size])
        _, level, kind, fd = CMSG.unpack_from(self.memory, self.CONTROL)
        passed = control_size >= CMSG.size and (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        self.prepare()
        if passed and not flags & (abi.MSG_TRUNC | abi.MSG_CTRUNC) and is_stream(fd):
            return fd, data
        if passed:
            os.close(fd)
        return -errno.ECONNABORTED, b""


def is_stream(fd):
    """Whether `fd` is a stream socket; it is made ready for the ring, as an accepted one would be."""
    with contextlib.suppress(OSError):
        passed = socket.socket(fileno=fd)
        try:
            if passed.type != socket.SOCK_STREAM:
                return False
            os.set_blocking(fd, True)           # or the ring would not wait for it
            if passed.family in (socket.AF_INET, socket.AF_INET6):
                for option, value in TCP_OPTIONS:
                    passed.setsockopt(socket.IPPROTO_TCP, option, value)
            return True
        finally:
            passed.detach()
    return False
