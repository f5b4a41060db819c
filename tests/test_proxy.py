"""The PROXY protocol: headers good and bad in every delivery, any bytes at all, and which networks are trusted.

Sections are those of HAProxy's proxy-protocol.txt.
"""

import contextlib
import ipaddress
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import (
    CLIENT_SSL, CRC32C, KNOWN, MAX_BLOCK, MAX_FORWARDED, MAX_LINE, SIGNATURE, SSL, Networks, ProxyError, checksum,
    forwarded_for, take_header, tells_tls,
)

EXPLORING = int(os.environ.get("TARWEB_EXAMPLES", 0))       # how many, other ones each time; as in the other tests

NEXT = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"
LOCAL, PROXY = 0x20, 0x21
TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM = 0x11, 0x12, 0x21, 0x22, 0x31, 0x32
IPV4 = bytes([192, 0, 2, 1, 10, 0, 0, 1, 0xDC, 4, 1, 0xBB])         # 192.0.2.1 port 56324, to 10.0.0.1 port 443
IPV6 = (socket.inet_pton(socket.AF_INET6, "2001:db8::1") + socket.inet_pton(socket.AF_INET6, "2001:db8::2")
        + IPV4[8:])
UNIX = b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")


def block(command=PROXY, family=TCP4, rest=IPV4, length=None):
    """A header of version 2; `length`: what its length field says, if not the truth."""
    length = len(rest) if length is None else length
    return SIGNATURE + bytes([command, family]) + length.to_bytes(2, "big") + rest


def tlv(kind, value):
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def summed(before=b"", after=b"", wrong=0):
    """A header with the checksum of section 2.2.3 between other TLVs; `wrong` is added to it."""
    header = block(rest=IPV4 + before + tlv(CRC32C, bytes(4)) + after)
    at = len(header) - len(after) - 4
    return header[:at] + (bit_by_bit(header) + wrong).to_bytes(4, "big") + header[at + 4:]


def summed_in_five_bytes():
    """A checksum that is right as a number, but has a zero in front."""
    crc = bit_by_bit(block(rest=IPV4 + bytes([CRC32C, 0, 5]) + bytes(4), length=len(IPV4) + 8))
    return block(rest=IPV4 + tlv(CRC32C, b"\0" + crc.to_bytes(4, "big")))


def bit_by_bit(data):
    """CRC32c by its definition, a division of polynomials (RFC 9260 appendix A), to hold `checksum` against."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# The longest of each kind are those that section 2.1 counts.
LONG6 = b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
GOOD = {
    "the specification's example": (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", b"192.168.0.1"),
    "the longest TCP4": (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", b"255.255.255.255"),
    "the shortest TCP4": (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", b"0.0.0.0"),
    "the longest TCP6": (b"PROXY TCP6 %b %b 65535 65535\r\n" % (LONG6, LONG6), LONG6),
    "the shortest TCP6": (b"PROXY TCP6 :: :: 0 0\r\n", b"::"),
    "TCP6 in capitals, all zeros written": (b"PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:000A ::1 1 2\r\n",
                                            b"2001:db8::a"),
    "TCP6 with a mapped address": (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:10.0.0.1 1 2\r\n", b"192.0.2.1"),
    "UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "UNKNOWN with a space": (b"PROXY UNKNOWN \r\n", None),
    "UNKNOWN with anything": (b"PROXY UNKNOWN \0\xff whatever 1.2.3.4\r\n", None),
    "the longest UNKNOWN": (b"PROXY UNKNOWN %b %b 65535 65535\r\n" % (LONG6, LONG6), None),
    "TCP over IPv4": (block(), b"192.0.2.1"),
    "UDP over IPv4, as of HTTP/3": (block(family=UDP4), b"192.0.2.1"),
    "TCP over IPv6": (block(family=TCP6, rest=IPV6), b"2001:db8::1"),
    "UDP over IPv6": (block(family=UDP6, rest=IPV6), b"2001:db8::1"),
    "IPv6 with a mapped address": (block(family=TCP6, rest=bytes(10) + b"\xff\xff" + IPV4[:4] + bytes(20)),
                                   b"192.0.2.1"),
    "unix stream": (block(family=UNIX_STREAM, rest=UNIX), None),
    "unix datagram": (block(family=UNIX_DATAGRAM, rest=UNIX), None),
    "unspecified": (block(family=0, rest=b""), None),
    "unspecified with something": (block(family=0, rest=b"whatever"), None),
    "IPv4 over something unspecified": (block(family=0x10), None),
    "local": (block(LOCAL, 0, b""), None),
    "local with addresses": (block(LOCAL, TCP4, IPV4), None),
    "local, of whose family nothing counts": (block(LOCAL, 0xFF, b"whatever"), None),
    "TLVs": (block(rest=IPV4 + tlv(1, b"h2") + tlv(4, b"") + tlv(0xEE, bytes(300))), b"192.0.2.1"),
    "TLVs after unix addresses": (block(family=UNIX_STREAM, rest=UNIX + tlv(5, b"id")), None),
    "a checksum": (summed(), b"192.0.2.1"),
    "a checksum between others": (summed(tlv(1, b"h2"), tlv(4, b"padding")), b"192.0.2.1"),
    "the longest block": (block(rest=IPV4 + tlv(4, bytes(MAX_BLOCK - 16 - 12 - 3))), b"192.0.2.1"),
}
assert len(GOOD["the longest UNKNOWN"][0]) == MAX_LINE
assert len(GOOD["the longest block"][0]) == MAX_BLOCK

BAD = {
    "HTTP": NEXT,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    "a line end before it": b"\r\nPROXY UNKNOWN\r\n",
    "small letters": b"proxy UNKNOWN\r\n",
    "no space": b"PROXY\r\n",
    "two spaces": b"PROXY  UNKNOWN\r\n",
    "a tab": b"PROXY\tUNKNOWN\r\n",
    "nothing": b"PROXY \r\n",
    "no family": b"PROXY TCP 192.0.2.1 10.0.0.1 1 2\r\n",
    "another family": b"PROXY UDP4 192.0.2.1 10.0.0.1 1 2\r\n",
    "TCP5": b"PROXY TCP5 192.0.2.1 10.0.0.1 1 2\r\n",
    "more than UNKNOWN": b"PROXY UNKNOWNS\r\n",
    "UNKNOWN and a tab": b"PROXY UNKNOWN\t1\r\n",
    "only LF": b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2\n",
    "only LF after UNKNOWN": b"PROXY UNKNOWN\nGET / HTTP/1.1\r\n",
    "only CR": b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2\r",
    "CR within UNKNOWN": b"PROXY UNKNOWN a\rb\r\n",
    "two CR": b"PROXY UNKNOWN\r\r\n",
    "two CR behind something": b"PROXY UNKNOWN x\r\r\n",
    "family alone": b"PROXY TCP4 \r\n",
    "an address less": b"PROXY TCP4 192.0.2.1 1 2\r\n",
    "a port less": b"PROXY TCP4 192.0.2.1 10.0.0.1 1\r\n",
    "a field more": b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2 3\r\n",
    "space at the end": b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2 \r\n",
    "two spaces between fields": b"PROXY TCP4 192.0.2.1  10.0.0.1 1 2\r\n",
    "IPv6 in TCP4": b"PROXY TCP4 ::1 ::1 1 2\r\n",
    "IPv4 in TCP6": b"PROXY TCP6 192.0.2.1 10.0.0.1 1 2\r\n",
    "IPv6 source, IPv4 destination": b"PROXY TCP6 ::1 10.0.0.1 1 2\r\n",
    "IPv4 source, IPv6 destination": b"PROXY TCP4 10.0.0.1 ::1 1 2\r\n",
    "256": b"PROXY TCP4 192.0.2.256 10.0.0.1 1 2\r\n",
    "256 in the destination": b"PROXY TCP4 192.0.2.1 10.0.0.256 1 2\r\n",
    "three numbers": b"PROXY TCP4 192.0.2 10.0.0.1 1 2\r\n",
    "five numbers": b"PROXY TCP4 192.0.2.1.1 10.0.0.1 1 2\r\n",
    "a zero in front": b"PROXY TCP4 192.0.2.01 10.0.0.1 1 2\r\n",
    "hexadecimal": b"PROXY TCP4 192.0.2.a 10.0.0.1 1 2\r\n",
    "a name": b"PROXY TCP4 localhost 10.0.0.1 1 2\r\n",
    "a scope": b"PROXY TCP6 fe80::1%1 ::1 1 2\r\n",
    "a scope in the destination": b"PROXY TCP6 ::1 fe80::1%1 1 2\r\n",
    "brackets": b"PROXY TCP6 [::1] ::1 1 2\r\n",
    "two gaps": b"PROXY TCP6 1::2::3 ::1 1 2\r\n",
    "nine groups": b"PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n",
    "seven groups": b"PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2\r\n",
    "five digits": b"PROXY TCP6 2001:0db80::1 ::1 1 2\r\n",
    "a prefix": b"PROXY TCP4 10.0.0.0/8 10.0.0.1 1 2\r\n",
    "port 65536": b"PROXY TCP4 192.0.2.1 10.0.0.1 65536 2\r\n",
    "destination port 65536": b"PROXY TCP4 192.0.2.1 10.0.0.1 1 65536\r\n",
    "port 00": b"PROXY TCP4 192.0.2.1 10.0.0.1 00 2\r\n",
    "port 080": b"PROXY TCP4 192.0.2.1 10.0.0.1 1 080\r\n",
    "port -1": b"PROXY TCP4 192.0.2.1 10.0.0.1 -1 2\r\n",
    "port +1": b"PROXY TCP4 192.0.2.1 10.0.0.1 +1 2\r\n",
    "port with an underscore": b"PROXY TCP4 192.0.2.1 10.0.0.1 1_0 2\r\n",
    "digits that are not ASCII": "PROXY TCP4 192.0.2.1 10.0.0.1 1 \u0662\r\n".encode(),
    "a null byte": b"PROXY TCP4 192.0.2.1\0 10.0.0.1 1 2\r\n",
    "a line end after 107 bytes": b"PROXY UNKNOWN ".ljust(MAX_LINE - 1, b"x") + b"\r\n",
    "no line end": b"PROXY UNKNOWN ".ljust(MAX_LINE, b"x"),
    "a signature that goes wrong": SIGNATURE[:11] + b"\r",
    "version 1 in version 2": SIGNATURE + b"\x11\x11\0\x0c" + IPV4,
    "version 3": SIGNATURE + b"\x31\x11\0\x0c" + IPV4,
    "command 2": block(0x22),
    "command 15": block(0x2F),
    "family 4": block(family=0x41),
    "protocol 3": block(family=0x13),
    "too short for IPv4": block(rest=IPV4[:-1]),
    "too short for IPv6": block(family=TCP6, rest=IPV4),
    "too short for unix": block(family=UNIX_STREAM, rest=IPV6),
    "too long": block(length=MAX_BLOCK - 15),
    "much too long": block(length=0xFFFF),
    "TLV of one byte": block(rest=IPV4 + b"\x04"),
    "TLV of two bytes": block(rest=IPV4 + b"\x04\0"),
    "TLV longer than the header": block(rest=IPV4 + b"\x04\0\x02x"),
    "second TLV longer than the header": block(rest=IPV4 + tlv(1, b"h2") + b"\x04\xff\xff"),
    "a wrong checksum": summed(wrong=1),
    "a checksum of 3 bytes": block(rest=IPV4 + tlv(CRC32C, bytes(3))),
    "a checksum of 5 bytes": block(rest=IPV4 + tlv(CRC32C, bytes(5))),
    "a checksum of 5 bytes, the first of which is zero": summed_in_five_bytes(),
    "a second checksum that is wrong": summed(after=tlv(CRC32C, bytes(4))),
}


def feed(data, step=1):
    """What the growing data gives as soon as it gives anything: (result, bytes there were)."""
    for size in range(0, len(data) + 1, step):
        if (found := take_header(data[:size])) is not None:
            return found, size
    return None, len(data)


@pytest.mark.parametrize(("header", "address"), GOOD.values(), ids=list(GOOD))
def test_good(header, address):
    whole = address, len(header)
    assert take_header(header) == whole
    assert take_header(header + NEXT) == whole, "with the request behind it"
    assert take_header(header + header) == whole, "with another header behind it"
    assert feed(header + NEXT) == (whole, len(header)), "byte by byte: neither refused nor taken before its end"


@pytest.mark.parametrize(("header", "said"), [
    (block(rest=IPV4 + tlv(SSL, bytes([CLIENT_SSL]) + bytes(4))), True),
    (block(rest=IPV4 + tlv(4, b"") + tlv(SSL, bytes([CLIENT_SSL | 6]) + bytes(4) + tlv(0x21, b"TLSv1.3"))), True),
    (block(family=TCP6, rest=IPV6 + tlv(SSL, bytes([CLIENT_SSL]) + bytes(4))), True),
    (block(family=UNIX_STREAM, rest=UNIX + tlv(SSL, bytes([CLIENT_SSL]) + bytes(4))), True),
    (block(rest=IPV4 + tlv(SSL, bytes([6]) + bytes(4))), False), (block(rest=IPV4 + tlv(SSL, b"")), False),
    (block(rest=IPV4 + tlv(4, tlv(SSL, bytes([CLIENT_SSL])))), False), (block(), False),
    (block(command=LOCAL, rest=IPV4 + tlv(SSL, bytes([CLIENT_SSL]) + bytes(4))), False),
    (block(family=0, rest=tlv(SSL, bytes([CLIENT_SSL]) + bytes(4))), False),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", False), (b"PROXY UNKNOWN\r\n", False),
])
def test_whether_the_client_speaks_tls(header, said):
    assert take_header(header)[1] == len(header)
    assert tells_tls(header) == said


@pytest.mark.parametrize("data", BAD.values(), ids=list(BAD))
def test_bad(data):
    for raw in (data, data + NEXT):
        with pytest.raises(ProxyError):
            take_header(raw + bytes(MAX_BLOCK))
    with pytest.raises(ProxyError):
        feed(data + bytes(MAX_BLOCK))


EARLY = {       # data -> the bytes after which it is clear that nothing good can come
    b"GET / HTTP/1.1": 1, b"PROXIES": 5, b"PROXY TCP5": 10, b"PROXY X": 7, b"PROXY UNKNOWN\n": 14,
    b"PROXY TCP4 1\rx": 14, SIGNATURE + b"\x31": 13, SIGNATURE + b"\x22": 13, SIGNATURE + b"\x21\x41": 14,
    SIGNATURE + b"\x21\x11\0\x0b": 16, SIGNATURE + b"\x21\x11\xff\xff": 16, SIGNATURE + b"\x20\x00\xff\xff": 16,
}


@pytest.mark.parametrize(("data", "size"), EARLY.items())
def test_refused_at_once(data, size):
    assert take_header(data[:size - 1]) is None
    with pytest.raises(ProxyError):
        take_header(data[:size])


def test_nothing_yet():
    assert take_header(b"") is None


def test_checksum():
    assert checksum(b"123456789").hex() == "e3069283"       # the check value in catalogues of CRCs
    assert checksum(bytes(32)).hex() == "8a9136aa"          # RFC 7143 appendix A.4, where the bytes are reversed
    assert checksum(b"") == bytes(4)


# --- any bytes at all

def examples(count):
    return settings(max_examples=EXPLORING or count, derandomize=not EXPLORING, deadline=None, database=None)


def beginnings():
    return st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN ", SIGNATURE,
                            SIGNATURE + b"\x21\x11", SIGNATURE + b"\x21\x21\0\x40", block()[:16],
                            block(length=30)])


def text():
    return st.text("0123456789abcdefABCDEF:. \r\n").map(str.encode)


@examples(500)
@given(beginnings(), st.binary(max_size=100) | text())
def test_any_bytes(start, more):
    """A header, not yet a header, or a ProxyError; and that a verdict once given stays, whatever follows."""
    verdicts = set()
    for size in range(len(start + more) + 1):
        try:
            found = take_header((start + more)[:size])
        except ProxyError:
            found = ProxyError
        if found not in (None, ProxyError):
            address, taken = found
            assert 0 < taken <= size
            assert address is None or str(ipaddress.ip_address(address.decode())).encode() == address
            assert tells_tls((start + more)[:taken]) in (False, True)
        if verdicts:
            assert found in verdicts
        if found is not None:
            verdicts.add(found)


@examples(200)
@given(beginnings(), st.binary(max_size=200) | text())
def test_bound(start, more):
    """Nobody is waited for beyond the bound."""
    data = (start + more).ljust(MAX_LINE if start.startswith(b"PROXY") else MAX_BLOCK, b"x")
    with contextlib.suppress(ProxyError):
        assert take_header(data) is not None


def pairs():
    """A source and a destination of one family."""
    return st.one_of(st.tuples(st.ip_addresses(v=v), st.ip_addresses(v=v)) for v in (4, 6))


def tlvs():
    kinds = st.integers(0, 255).filter(lambda kind: kind != CRC32C)
    return st.lists(st.builds(tlv, kinds, st.binary(max_size=40)), max_size=5).map(b"".join)


ports = st.integers(0, 65535)


def expected(address):
    mapped = address.version == 6 and address.ipv4_mapped
    return str(mapped or address).encode()


@examples(200)
@given(pairs(), st.booleans(), ports, ports)
def test_round_trip_1(pair, exploded, source_port, destination_port):
    source, destination = pair
    texts = [address.exploded if exploded else address.compressed for address in (source, destination)]
    line = f"PROXY TCP{source.version} {' '.join(texts)} {source_port} {destination_port}\r\n".encode()
    assert take_header(line) == (expected(source), len(line))
    assert feed(line) == (take_header(line), len(line))


@examples(200)
@given(pairs(), st.binary(min_size=4, max_size=4), tlvs(), st.sampled_from([1, 2]))
def test_round_trip_2(pair, both_ports, rest, protocol):
    source, destination = pair
    header = block(family=(source.version == 6) + 1 << 4 | protocol,
                   rest=source.packed + destination.packed + both_ports + rest)
    assert take_header(header) == (expected(source), len(header))
    assert feed(header) == (take_header(header), len(header))


def test_checksum_finds_any_changed_byte():
    good, of_type = summed(tlv(1, b"h2")), len(summed(tlv(1, b"h2"))) - 7
    assert good[of_type] == CRC32C
    for at in set(range(len(good))) - {of_type}:
        for change in (1, 2, 0x10, 0x80, 0xFF):
            header = bytearray(good)
            header[at] ^= change
            with contextlib.suppress(ProxyError):
                found = take_header(bytes(header))
                # A longer one is waited for; or by family and command there is no address, and no TLV.
                assert found is None or found[0] is None, (at, change)


# --- networks

def test_networks():
    networks = Networks(["10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "::1"])
    for address in (b"10.0.0.0", b"10.255.255.255", b"192.0.2.1", b"2001:db8::", b"2001:db8:ffff::1", b"::1"):
        assert networks.hold(address), address
        assert networks.hold(address), "the second time"
    for address in (b"9.255.255.255", b"11.0.0.0", b"192.0.2.0", b"192.0.2.2", b"2001:db7::", b"2001:db9::", b"::"):
        assert not networks.hold(address), address
        assert not networks.hold(address), "the second time"


def test_unix_sockets():
    assert Networks(["unix"]).hold(b"")
    assert not Networks(["unix"]).hold(b"127.0.0.1")
    assert not Networks(["0.0.0.0/0", "::/0"]).hold(b"")


def test_mapped_addresses_are_those_of_ipv4():
    assert Networks(["10.0.0.0/8"]).hold(b"::ffff:10.1.2.3")
    assert Networks(["::ffff:10.0.0.0/104"]).hold(b"10.1.2.3")
    assert not Networks(["::ffff:10.0.0.0/104"]).hold(b"11.1.2.3")
    assert Networks(["::ffff:0:0/96"]).hold(b"203.0.113.7")
    assert not Networks(["::/0"]).hold(b"::ffff:10.1.2.3"), "all of IPv6 is none of IPv4"


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "10.0.0", "256.0.0.1", "localhost", "2001:db8::1/32",
                                  "::/129", "fe80::1%eth0", "Unix", "10.0.0.0/8,::1", "/8", "10.0.0.0/-1", " ::1"])
def test_bad_network(text):
    with pytest.raises(ValueError, match=".") as caught:
        Networks(["::1", text])
    assert str(caught.value)[:2] == repr(text)[:2] or str(caught.value).startswith(text), "it says which"


def test_memory_of_addresses_is_bounded():
    networks = Networks(["10.0.0.0/16"])
    for number in range(2 * KNOWN + 10):
        address = str(ipaddress.ip_address(0x0A000000 + number * 16)).encode()
        assert networks.hold(address) == (number * 16 < 1 << 16)
        assert networks.hold.cache_info().currsize <= KNOWN
    assert networks.hold(b"10.0.255.255")


# --- X-Forwarded-For, and Forwarded (RFC 7239)

OURS = Networks(["10.0.0.0/8", "2001:db8:a::/48", "unix"])
PEER = b"10.0.0.1"


def client(*lines, peer=PEER, rest=b""):
    """Who sends a request with these header lines, as text."""
    head = b"".join(line.encode("latin-1") + b"\r\n" for line in ("GET /x HTTP/1.1", "Host: t", *lines))
    return forwarded_for(head + b"\r\n" + rest, OURS, peer).decode()


@pytest.mark.parametrize(("value", "expected"), (
    ("192.0.2.7", "192.0.2.7"), ("  192.0.2.7\t", "192.0.2.7"), ("2001:db8::7", "2001:db8::7"),
    ("::ffff:192.0.2.7", "192.0.2.7"), ("2001:DB8:0::7", "2001:db8::7"),
    ("192.0.2.7:1234", "192.0.2.7"), ("[2001:db8::7]:1234", "2001:db8::7"), ("[2001:db8::7]", "2001:db8::7"),
    ("192.0.2.9, 192.0.2.7", "192.0.2.7"),                      # what the client itself has said is not believed
    ("192.0.2.7, 10.2.3.4, 2001:db8:a::1", "192.0.2.7"), ("192.0.2.9, 192.0.2.7,10.1.1.1", "192.0.2.7"),
    ("192.0.2.7, , ,", "192.0.2.7"),                            # RFC 9110 section 5.6.1
    ("10.7.7.7, 10.2.3.4", "10.7.7.7"),                         # all of them ours: the first
    ("", "10.0.0.1"), (",", "10.0.0.1"), ("unknown", "10.0.0.1"), ("192.0.2.7, unknown, 10.2.3.4", "10.2.3.4"),
    ("192.0.2.7, 1.2.3", "10.0.0.1"), ("192.0.2.7 192.0.2.8", "10.0.0.1"), ("1.2.3.4.5", "10.0.0.1"),
    ("fe80::1%eth0", "10.0.0.1"), ('fe80::1%" 200', "10.0.0.1"), ('"', "10.0.0.1"), ("\xe4\xff\x01", "10.0.0.1"),
    ("[]", "10.0.0.1"), ("[::1", "10.0.0.1"), (":80", "10.0.0.1"), ("\xb2.1.1.1", "10.0.0.1"),
    ("192.0.2.7" + ", 10.0.0.9" * 50, "192.0.2.7"), ("192.0.2.7" + ", 10.0.0.9" * 5000, "10.0.0.9"),
))
def test_x_forwarded_for(value, expected):
    assert client(f"X-Forwarded-For: {value}") == expected
    assert client(f"x-forwarded-for:{value}", "Other: 1", peer=b"") == (
        "" if expected == "10.0.0.1" else expected), "by a unix socket"


def test_several_lines_are_one_list():
    assert client("X-Forwarded-For: 192.0.2.9", "A: b", "X-Forwarded-For: 192.0.2.7", "X-Forwarded-For: 10.2.2.2"
                  ) == "192.0.2.7"
    assert client("Forwarded: for=192.0.2.9", "forwarded: for=192.0.2.7;by=x") == "192.0.2.7"


@pytest.mark.parametrize(("value", "expected"), (
    ("for=192.0.2.7", "192.0.2.7"), ("For=192.0.2.7;proto=http;by=203.0.113.43", "192.0.2.7"),      # section 4
    ('for="[2001:db8:cafe::17]:4711"', "2001:db8:cafe::17"), ('for="192.0.2.7:80"', "192.0.2.7"),
    ("by=10.0.0.1; for = 192.0.2.7", "192.0.2.7"), ("for=192.0.2.9, for=192.0.2.7", "192.0.2.7"),
    ('for=192.0.2.7,for="[2001:db8:a::1]",for=10.1.1.1', "192.0.2.7"), ("for=192.0.2.7,,", "192.0.2.7"),
    ('host="a,b;for=192.0.2.9";for=192.0.2.7', "192.0.2.7"), ('for=192.0.2.7;host="a,for=192.0.2.9"', "192.0.2.7"),
    ("for=unknown", "10.0.0.1"), ("for=_hidden, for=10.2.2.2", "10.2.2.2"), ("for=192.0.2.7, by=10.1.1.1", "10.0.0.1"),
    ("192.0.2.7", "10.0.0.1"), ("", "10.0.0.1"), ("for=", "10.0.0.1"), ('for=""', "10.0.0.1"), (";", "10.0.0.1"),
    # quotes that a client has not closed
    ('for=192.0.2.9;x=", for=192.0.2.7', "192.0.2.7"), ('for=192.0.2.9;x=", for="[2001:db8::7]"', "2001:db8::7"),
    ('for="192.0.2.9, for=192.0.2.7;by="10.1.1.1"', "192.0.2.7"), ('for=192.0.2.9;x="\\", for=192.0.2.7', "192.0.2.7"),
))
def test_forwarded(value, expected):
    assert client(f"Forwarded: {value}") == expected


def test_which_field_counts():
    assert client("Forwarded: for=192.0.2.9", "X-Forwarded-For: 192.0.2.7") == "192.0.2.7"
    assert client("X-Forwarded-For-Not: 192.0.2.9", "Not-Forwarded: for=192.0.2.9") == "10.0.0.1"
    assert client("A: X-Forwarded-For: 192.0.2.9") == "10.0.0.1"
    assert client(rest=b"\r\nX-Forwarded-For: 192.0.2.9\r\n\r\n") == "10.0.0.1", "it is in what follows the head"


@settings(max_examples=EXPLORING or 300, deadline=None)
@given(st.text("0123456789abcdef.:[]%,;=\"\\ forunkw\x7f\xff", max_size=60), st.booleans())
def test_whatever_stands_there_an_address_comes_out(text, old):
    ipaddress.ip_address(client(f"{'X-Forwarded-For' if old else 'Forwarded'}: {text}"))


@pytest.mark.parametrize("piece", ("10.0.0.1,", 'for="', "for=10.0.0.1,", '"', ",", ";", '",', "[", "1" * 50))
def test_long_values_take_no_time(piece):
    assert len(piece) * 20000 > MAX_FORWARDED
    for name in ("X-Forwarded-For", "Forwarded"):
        ipaddress.ip_address(client(f"{name}: {piece * 20000}"))
