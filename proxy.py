"""What those in front of us say: PROXY headers, X-Forwarded-For, and connections that another process passes.

PROXY protocol, versions 1 and 2, as a receiver: who the proxy's client is. Sections: HAProxy's proxy-protocol.txt.

Passed connections, as with the Rust tarweb: a unix datagram socket (unix(7)), and in each datagram SCM_RIGHTS with
exactly one descriptor, of a connected stream socket, and those bytes that its sender has read from it, perhaps none.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import re
import socket
import sys
from functools import lru_cache

import linux
from connection import PREFACE

log = logging.getLogger("tarweb")

V1, SIGNATURE = b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"
MAX_LINE = 107                  # section 2.1: the longest line of version 1, CRLF included
MAX_BLOCK = 4096                # a header of version 2. Section 2 has senders keep to 536, but what they tell of
                                # certificates may take more; with 64 KiB, a proxy's mistake would be waited for
LINE = re.compile(rb"UNKNOWN(?: [^\r]*)?|TCP([46]) ([\dA-Fa-f:.]+) ([\dA-Fa-f:.]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})")

LOCAL, PROXY = 0x20, 0x21       # section 2.2: version and command
UNSPEC, INET, INET6 = 0, 1, 2
ADDRESSES = {UNSPEC: 0, INET: 12, INET6: 36, 3: 216}        # family: bytes of its addresses and ports
CRC32C, SSL = 0x03, 0x20        # types of TLVs
CLIENT_SSL = 1                  # section 2.2.6: in the first byte of an SSL one

KNOWN = 4096                    # addresses that Networks remembers


class ProxyError(Exception):
    """Not a PROXY header; the connection is to be closed."""


def take_header(data):
    """(the client's address as text, bytes that the header takes) from the first bytes of a connection.

    The address is None where the header tells none, and the peer's own stands. None where more bytes are needed: the
    details of a line, and TLVs, are looked at when they are whole. Raises ProxyError."""
    if data.startswith(V1):
        return take_line(data)
    if data.startswith(SIGNATURE):
        return take_block(data)
    if V1.startswith(data) or SIGNATURE.startswith(data):
        return None
    raise ProxyError("no PROXY header")


# --- version 1, section 2.1

def take_line(data):
    line, end, _ = data[:MAX_LINE].partition(b"\r\n")
    rest, size = line[len(V1):], len(line) + len(end)
    if not any(rest.startswith(kind[:len(rest)]) for kind in (b"TCP4 ", b"TCP6 ", b"UNKNOWN")):
        raise ProxyError("version 1: neither TCP4 nor TCP6 nor UNKNOWN")
    if b"\n" in line or b"\r" in line[:-1]:
        raise ProxyError("version 1: half a line end")
    if not end:
        if len(data) >= MAX_LINE:
            raise ProxyError(f"version 1: no line end in {MAX_LINE} bytes")
        return None
    match = LINE.fullmatch(rest)
    if not match:
        raise ProxyError("version 1: malformed line")
    family, source, destination, *ports = match.groups()
    if family is None:
        return None, size
    if any(int(port) > 65535 for port in ports):
        raise ProxyError("version 1: no such port")
    parse = ipaddress.IPv4Address if family == b"4" else ipaddress.IPv6Address
    try:
        parse(destination.decode())
        return str(without_mapping(parse(source.decode()))).encode(), size
    except ValueError:
        raise ProxyError(f"version 1: no TCP{family.decode()} address") from None


# --- version 2, section 2.2

def take_block(data):
    start, at = len(SIGNATURE), len(SIGNATURE) + 4      # of command and family; of what the length counts
    if len(data) > start and data[start] not in (LOCAL, PROXY):
        raise ProxyError("version 2: unknown version or command")
    relayed = len(data) > start + 1 and data[start] == PROXY        # of a LOCAL one nothing else counts
    family, protocol = divmod(data[start + 1], 16) if relayed else (UNSPEC, 0)
    if family not in ADDRESSES or protocol > 2:
        raise ProxyError("version 2: unknown address family or protocol")
    if len(data) < at:
        return None
    size = at + int.from_bytes(data[start + 2:at], "big")
    if size > MAX_BLOCK:
        raise ProxyError(f"version 2: more than {MAX_BLOCK} bytes")
    if size < at + ADDRESSES[family]:
        raise ProxyError("version 2: too short for its addresses")
    if len(data) < size:
        return None
    if family != UNSPEC:                # else how long the addresses are is not known, nor where TLVs begin
        check_tlvs(data[:size], at + ADDRESSES[family])
    if family not in (INET, INET6) or not protocol:
        return None, size
    address = ipaddress.ip_address(data[at:at + (4 if family == INET else 16)])
    return str(without_mapping(address)).encode(), size


def check_tlvs(header, at):
    """Section 2.2: from `at` on, type, length and value, one after the other; a checksum is right (2.2.3)."""
    for kind, value, end in tlvs(header, at):
        if end > len(header):
            raise ProxyError("version 2: a TLV that is cut off")
        if kind == CRC32C and header[value:end] != checksum(header[:value] + bytes(4) + header[end:]):
            raise ProxyError("version 2: wrong checksum")


def tells_tls(header):
    """Whether a whole, good header says that the client speaks TLS (section 2.2.6): only version 2 can."""
    at = len(SIGNATURE) + 4
    if not header.startswith(SIGNATURE) or header[at - 4] != PROXY or header[at - 3] >> 4 == UNSPEC:
        return False
    return any(kind == SSL and value < end and header[value] & CLIENT_SSL
               for kind, value, end in tlvs(header, at + ADDRESSES[header[at - 3] >> 4]))


def tlvs(header, at):
    """(type, where its value begins and ends) of each from `at` on; the last one may end behind the header."""
    while at < len(header):
        value = at + 3
        end = value + int.from_bytes(header[at + 1:value], "big")
        yield header[at], value, end
        at = end


def checksum(data):
    """CRC32c (RFC 9260 appendix A), in network byte order."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "big")


def crc_of_byte(crc):
    for _ in range(8):
        crc = crc >> 1 ^ (crc & 1) * 0x82F63B78
    return crc


CRC_TABLE = [crc_of_byte(byte) for byte in range(256)]


# --- addresses

class Networks:
    """Networks, as in ["10.0.0.0/8", "::1"]; "unix" stands for all unix sockets. Raises ValueError.
    hold(address): whether an address, as text in bytes, is in one of them; b"" is that of unix sockets."""

    def __init__(self, texts):
        self.unix = "unix" in texts
        self.networks = [network(text) for text in texts if text != "unix"]
        self.hold = lru_cache(KNOWN)(self.look_up)

    def look_up(self, address):
        if not address:
            return self.unix
        address = without_mapping(ipaddress.ip_address(address.decode()))
        return any(address in network for network in self.networks)


def network(text):
    """One network; one of mapped addresses is that of IPv4 which it stands for. Raises ValueError."""
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is no address or network: write 10.0.0.0/8, 10.0.0.1 or unix") from None
    if "/" in text and str(found.network_address) != str(ipaddress.ip_address(text.partition("/")[0])):
        raise ValueError(f"{text!r} is not a network: write {found}, or leave out the / for one address")
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which addresses of clients are looked at without")
    first = without_mapping(found.network_address)
    return found if first.version == found.version else ipaddress.ip_network((int(first), found.prefixlen - 96))


def without_mapping(address):
    """The address of IPv4 that one of IPv6 stands for (RFC 4291 section 2.5.5.2), or itself."""
    return getattr(address, "ipv4_mapped", None) or address


# --- what a proxy that speaks HTTP writes into each request

MAX_FORWARDED = 1024            # bytes looked at, from the end: what proxies append is there
X_FORWARDED_FOR, FORWARDED = (re.compile(rb"(?i)\r\n%b:([^\r\n]*)" % name)
                              for name in (b"x-forwarded-for", b"forwarded"))
NODE = re.compile(r"(?:\[(.+)\]|([\d.]+))(?::\d+)?")      # RFC 7239 section 6; IPv6 may also stand without brackets


def forwarded_for(head, networks, peer):
    """The client of a request with this head that has come from `peer`, one of `networks`: as text, in bytes.

    It is the last address that X-Forwarded-For, or else Forwarded (RFC 7239), names and that is not of `networks`, each
    of which has appended what it saw; the first one where all of them are; and that which named it, where something
    is no address ("unknown").
    """
    block, client = head.partition(b"\r\n\r\n")[0], peer
    if values := X_FORWARDED_FOR.findall(block):
        nodes = b",".join(values)[-MAX_FORWARDED:].split(b",")[::-1]
    else:
        nodes = list(map(for_of, elements(b",".join(FORWARDED.findall(block))[-MAX_FORWARDED:])))
    for node in filter(None, map(bytes.strip, nodes)):
        text = node.decode("latin-1")
        match = NODE.fullmatch(text)
        try:
            address = ipaddress.ip_address(match[1] or match[2] if match else text)
        except ValueError:
            break
        if getattr(address, "scope_id", None):          # any text could stand there
            break
        client = str(without_mapping(address)).encode()
        if not networks.hold(client):
            break
    return client


def elements(value):
    """Those of a Forwarded field, the last one first: quotes that are not closed are no harm to what is behind them."""
    return (element[::-1] for element in re.findall(rb'(?:[^,"]|"[^"]*")+', value[::-1]))


def for_of(element):
    """The node that an element's "for" names; b"?" where there is none."""
    for pair in re.findall(rb'(?:[^;"]|"[^"]*")+', element):
        name, _, node = pair.partition(b"=")
        if name.strip().lower() == b"for":
            return node.strip().strip(b'"')
    return b"?" if element.strip() else b""


# --- what connections from such a proxy begin with

class ProxyHeader:
    """The protocol of a connection until its PROXY header is whole."""

    def __init__(self, acceptor):
        self.acceptor = acceptor

    def on_data(self, connection, data):
        if connection.state is not PREFACE:         # it has been ended meanwhile
            connection.transport.go_on(connection)
            return
        connection.pending += data
        try:
            header = take_header(connection.pending)            # (address, size)
        except ProxyError as error:
            log.debug("PROXY header: %s", error)
            self.acceptor.counts.proxy_refused += 1
            self.acceptor.connections.end(connection)
            return
        if header is None:
            connection.transport.receive(connection, multishot=False)
        else:
            client, size = header
            data = connection.pending
            self.acceptor.on_proxied(connection, client, data[size:], tells_tls(data[:size]))


# --- connections passed by another process

LARGEST = 32 * 1024         # bytes that may have been read: more than a request head or a ClientHello takes


def passed_message():
    """A linux.Message for one datagram, to be received with MSG_CMSG_CLOEXEC."""
    return linux.Message(LARGEST, socket.CMSG_LEN(4))       # room for one descriptor; in CMSG_SPACE(4) there is for two


def take_passed(message, size):
    """(descriptor, bytes) of the datagram of `size` bytes that was received into passed_message(); the next may come.
    (-errno.ECONNABORTED, b"") for one that is not as it should be, and whatever was in it is closed."""
    data, control, flags = message.received(size, socket.SOL_SOCKET, socket.SCM_RIGHTS)
    if control:
        fd = int.from_bytes(control, sys.byteorder)
        if not flags & (linux.MSG_TRUNC | linux.MSG_CTRUNC) and is_stream(fd):
            return fd, data
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
                for option, value in linux.TCP_OPTIONS:
                    passed.setsockopt(socket.IPPROTO_TCP, option, value)
            return True
        finally:
            passed.detach()
    return False
