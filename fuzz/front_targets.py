"""What comes from programs in front of the server: PROXY headers, and connections passed in datagrams."""

import contextlib
import ctypes
import os
import socket
import struct

import test_proxy

import linux
import proxy as passing
from proxy import MAX_BLOCK, MAX_LINE, SIGNATURE, ProxyError, checksum, take_header

WORDS = (b"PROXY ", b"TCP4 ", b"TCP6 ", b"UNKNOWN", b"\r\n", b" ", b"65535", b"65536", b"0", b"::1 ",
         b"::ffff:1.2.3.4 ", b"192.0.2.1 ", SIGNATURE, SIGNATURE + b"\x21\x11\0\x0c", b"\x20", b"\x21", b"\x11",
         b"\x31",          b"\x03\0\4", b"%eth0")


# --- PROXY headers

REFUSED, MORE = "refused", "more"


def outcome(data):
    try:
        return take_header(data) or MORE
    except ProxyError:
        return REFUSED


def proxy(data):
    """A header, of which another reading says the same; the answer comes with its last byte, and never changes."""
    found = outcome(data)
    assert packed(found) == packed(as_specified(data))
    decided = None
    for size in range(len(data) + 1):
        now = outcome(data[:size])
        assert decided in (None, now), "it has changed its mind"
        decided = None if now == MORE else now
    if found not in (REFUSED, MORE):
        address, size = found
        assert 0 < size <= min(len(data), MAX_BLOCK)
        assert outcome(data[:size - 1]) == MORE
        assert outcome(data[:size] + b"\r\nPROXY UNKNOWN\r\n") == found
        assert address is None or is_canonical(address)


def packed(found):
    """The same with the address as a number: glibc writes ::1.2.3.4 where Python writes ::102:304."""
    if found in (REFUSED, MORE) or found[0] is None:
        return found
    return socket.inet_pton(socket.AF_INET6 if b":" in found[0] else socket.AF_INET, found[0].decode()), found[1]


def is_canonical(address):
    """Whether it is written as inet_ntop(3) does, and stands for itself."""
    family = socket.AF_INET6 if b":" in address else socket.AF_INET
    number = socket.inet_pton(family, address.decode())
    return not number.startswith(bytes(10) + b"\xff\xff") and number == socket.inet_pton(
        family, socket.inet_ntop(family, number))


def as_specified(data):
    """The same as `outcome`, from proxy-protocol.txt once more, and inet_pton(3)."""
    if data.startswith(SIGNATURE):
        return version_2(data)
    if data.startswith(b"PROXY "):
        return version_1(data)
    return MORE if SIGNATURE.startswith(data) or b"PROXY ".startswith(data) else REFUSED


def version_1(data):
    end = data.find(b"\r\n", 0, MAX_LINE)
    line = data[6:end] if end >= 0 else data[6:MAX_LINE]
    if not any(line[:len(kind)] == kind[:len(line)] for kind in (b"TCP4 ", b"TCP6 ", b"UNKNOWN")):
        return REFUSED
    if b"\n" in line or b"\r" in line[:-1] or end >= 0 and line.endswith(b"\r"):
        return REFUSED
    if end < 0:
        return REFUSED if len(data) >= MAX_LINE else MORE
    words = line.split(b" ")
    if words[0] == b"UNKNOWN":
        return None, end + 2
    family = socket.AF_INET if words[0] == b"TCP4" else socket.AF_INET6
    if len(words) != 5 or not all(map(is_port, words[3:])):
        return REFUSED
    with contextlib.suppress(OSError, ValueError):
        numbers = [socket.inet_pton(family, word.decode("ascii")) for word in words[1:3]]
        return written(numbers[0]), end + 2
    return REFUSED


def is_port(word):
    return word.isdigit() and str(int(word[:9])).encode() == word and int(word) < 65536


def written(number):
    """An address as text; a mapped one is the IPv4 address that it stands for."""
    number = number.removeprefix(bytes(10) + b"\xff\xff") if len(number) == 16 else number
    return socket.inet_ntop(socket.AF_INET if len(number) == 4 else socket.AF_INET6, number).encode()


def version_2(data):
    header = data[12:]
    if header[:1] not in (b"", b"\x20", b"\x21"):
        return REFUSED
    size = 16 + struct.unpack(">H", header[2:4])[0] if len(header) >= 4 else None
    if size is not None and size > MAX_BLOCK:
        return REFUSED
    if header[:1] == b"\x21" and len(header) > 1:
        family, protocol = divmod(header[1], 16)
        if family > 3 or protocol > 2:
            return REFUSED
        addresses = (0, 12, 36, 216)[family]
        if size is not None and size < 16 + addresses:
            return REFUSED
    if size is None or len(data) < size:
        return MORE
    if header[0] == 0x20 or not family:
        return None, size
    if not tlvs_are_right(data[:size], 16 + addresses):
        return REFUSED
    if not protocol or family == 3:
        return None, size
    return written(data[16:20] if family == 1 else data[16:32]), size


def tlvs_are_right(header, at):
    """Of the checksum only the server's own is known; the tests hold it against its definition."""
    while at < len(header):
        if at + 3 > len(header):
            return False
        kind, size = struct.unpack(">BH", header[at:at + 3])
        value, at = header[at + 3:at + 3 + size], at + 3 + size
        if at > len(header):
            return False
        if kind == 3 and value != checksum(header[:at - size] + bytes(4) + header[at:]):
            return False
    return True


def proxy_seeds():
    return (*(header + test_proxy.NEXT for header, _ in test_proxy.GOOD.values() if len(header) < 500),
            test_proxy.block(family=0x21, rest=bytes(12) + b"\1\2\3\4" + bytes(20)),
            *(header for header in test_proxy.BAD.values() if len(header) < 500))


# --- passed connections

LIBC = ctypes.CDLL(None, use_errno=True)
KINDS = 6


def passfd(data):
    """Datagrams with descriptors of all kinds: those that are as agreed are taken; of others nothing stays open."""
    envelope = passing.passed_message()
    with contextlib.ExitStack() as stack:
        sender, receiver = (stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        things = [stack.enter_context(thing) for thing in all_kinds()]
        before = spare_descriptor()
        for message in messages(data):
            if not send(sender, things, *message):
                continue
            size = LIBC.recvmsg(receiver.fileno(), ctypes.c_void_p(envelope.address), linux.MSG_CMSG_CLOEXEC)
            assert size >= 0
            fd, received = passing.take_passed(envelope, size)
            expected, content = message[0], message[-1]
            wanted = len(expected) == 1 and expected[0] % KINDS in (0, 1) and len(content) <= passing.LARGEST
            assert (fd >= 0) == wanted
            if wanted:
                assert received == content
                assert not os.get_inheritable(fd)
                os.close(fd)
            assert spare_descriptor() == before, "a descriptor has been left open"


def all_kinds():
    """Two that are connections (a pair), and others that are not."""
    yield from socket.socketpair()
    yield socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    yield open(os.devnull, "rb")                    # noqa: SIM115  # whoever asked closes them
    yield open(os.memfd_create("any"), "rb")        # noqa: SIM115


def messages(data):
    """([kinds of descriptors], whether credentials go with them, bytes) for each three bytes."""
    for at in range(0, len(data) - 2, 3):
        count, kind, size = data[at:at + 3]
        content = bytes(size) if size < 250 else bytes(passing.LARGEST - 252 + size)
        yield [kind + i for i in range(count % 5)], bool(count & 64), content


def send(sender, things, kinds, credentials, content):
    """Whether it has been sent: too long a datagram cannot be."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                  struct.pack(f"{len(kinds)}i", *(things[kind % KINDS].fileno() for kind in kinds)))] if kinds else []
    if credentials:
        ancillary.insert(0, (socket.SOL_SOCKET, 2, struct.pack("iII", os.getpid(), os.getuid(), os.getgid())))
    try:
        sender.sendmsg([content], ancillary)
    except OSError:
        return False
    return True


def spare_descriptor():
    """The lowest number that is free."""
    fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return fd


def passfd_seeds():
    return (b"\1\0\5", b"\1\1\0", b"\0\0\5", b"\2\0\5\1\0\5", b"\1\2\5\1\3\5\1\4\5\1\5\5", b"\x41\0\5",
            b"\1\0\xfc\1\0\xfd", b"\4\0\0\0\0\0\1\0\1")
