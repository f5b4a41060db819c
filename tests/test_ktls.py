"""What the kernel is told: keys worked out as the RFCs say, in the layouts of its headers; and what is said where it
cannot."""

import ctypes
import errno
import platform
import shutil
import struct
import subprocess

import pytest
import tlskeys
from simulated import Iovec, Msghdr
from tlskeys import SUITES, TLS_1_2, TLS_1_3, Direction

import linux
import ktls
from ktls import AES_GCM_128, AES_GCM_256, ATTACH, CHACHA20_POLY1305, INFO_SIZE, RECEIVE_KEYS, SEND_KEYS
from openssl import OpenSSL, wipe

CIPHERS = (AES_GCM_128, AES_GCM_256, CHACHA20_POLY1305)
SEQUENCES = (0, 1, 255, 256, (1 << 64) - 1)
SECRET, RANDOMS = bytes(range(1, 49)), bytes(range(100, 164))
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(scope="module")
def openssl():
    return OpenSSL()


@pytest.fixture
def schedule(openssl):
    return ktls.KeySchedule(openssl)


def suites_of(version):
    suites = [suite for suite in SUITES.values() if suite.version == version]
    return pytest.mark.parametrize("suite", suites, ids=[suite.name for suite in suites])


def told(info, suite):
    """The Direction that the kernel takes from a struct of ours."""
    return Direction.of_info(bytes(info[:ktls.info_size(ktls.SUITES[suite.number])]))


def parts(direction):
    return direction.key, direction.iv, direction.sequence


# --- what the keys are held against is right

@pytest.mark.parametrize(("secret", "key", "iv"), (
    ("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643",
     "9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"),
    ("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5",
     "17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"),
), ids=("server", "client"))
def test_traffic_keys_of_rfc_8448(schedule, secret, key, iv):
    """Section 3: "derive write traffic keys for application data", which is TLS_AES_128_GCM_SHA256."""
    suite = SUITES["TLS_AES_128_GCM_SHA256"]
    info, secret = bytearray(INFO_SIZE), bytes.fromhex(secret)
    schedule.tls13(linux.address_of(info), suite.number, linux.address_of(secret), 0)
    for direction in (told(info, suite), Direction.of_secret(suite, secret)):
        assert (direction.key.hex(), direction.iv.hex()) == (key, iv)


def test_pseudo_random_function():
    """The test vector for P_SHA256 that went over the TLS working group's list."""
    assert tlskeys.pseudo_random("sha256", bytes.fromhex("9bbe436ba940f017b17652849a71db35"), b"test label",
                                 bytes.fromhex("a0ba9f936cda311827a6f796ffd5198c"), 100).hex() == (
        "e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a6b301791e90d35c9c9a46b4e14baf9af0fa022f7077def17"
        "abfd3797c0564bab4fbc91666e9def9b97fce34f796789baa48082d122ee42c5a72e5a5110fff70187347b66")


# --- keys

def test_every_suite_is_known():
    assert {suite.number for suite in SUITES.values()} == set(ktls.SUITES)


@pytest.mark.parametrize("sequence", SEQUENCES)
@suites_of(TLS_1_3)
def test_tls_1_3(schedule, suite, sequence):
    secret = SECRET[:ktls.HASH_SIZE[ktls.CIPHERS[ktls.SUITES[suite.number]].digest]]
    info = bytearray(INFO_SIZE)
    schedule.tls13(linux.address_of(info), suite.number, linux.address_of(secret), sequence)
    assert parts(told(info, suite)) == parts(Direction.of_secret(suite, secret, sequence))


@pytest.mark.parametrize("sequences", ((1, 1), (1, 7), ((1 << 64) - 1, 0x0102030405060708)))
@suites_of(TLS_1_2)
def test_tls_1_2(schedule, suite, sequences):
    send, receive = bytearray(INFO_SIZE), bytearray(INFO_SIZE)
    schedule.tls12(linux.address_of(send), linux.address_of(receive), suite.number, linux.address_of(SECRET), RANDOMS,
                   sequences)
    client, server = Direction.both_of_master(suite, SECRET, client_random=RANDOMS[32:], server_random=RANDOMS[:32])
    server.sequence, client.sequence = sequences
    assert parts(told(send, suite)) == parts(server)
    assert parts(told(receive, suite)) == parts(client)


@suites_of(TLS_1_3)
def test_one_schedule_serves_all(schedule, suite):
    """Nothing of a former connection's keys gets into the next one's."""
    for number in (0x1302, 0xC02F, 0x1301):
        info = bytearray(2 * INFO_SIZE)
        if number < 0xC000:
            schedule.tls13(linux.address_of(info), number, linux.address_of(SECRET[::-1]), 5)
        else:
            schedule.tls12(linux.address_of(info), linux.address_of(info) + INFO_SIZE, number, linux.address_of(SECRET),
                           RANDOMS, (1, 1))
    test_tls_1_3(schedule, suite, 0)


def test_scratch_is_wiped(schedule):
    info = bytearray(INFO_SIZE)
    schedule.tls13(linux.address_of(info), 0x1302, linux.address_of(SECRET), 0)
    assert any(schedule.scratch)
    wipe(schedule.scratch)
    assert not any(schedule.scratch)
    assert schedule.at == linux.address_of(schedule.scratch), "what was wiped is not where the keys were"


@pytest.mark.parametrize("size", (1, 48, 1 << 20))
def test_wipe_overwrites_in_place(size):
    memory = bytearray(b"s" * size)
    at = linux.address_of(memory)
    wipe(memory)
    assert ctypes.string_at(at, size) == bytes(size)
    assert memory == bytes(size)


def test_wipe_ends_where_the_memory_does():
    memory = bytearray(b"s" * 30)
    wipe(memoryview(memory)[10:20])
    assert memory == b"s" * 10 + bytes(10) + b"s" * 10


# --- layouts

@pytest.mark.parametrize(("cipher", "size"), ((AES_GCM_128, 40), (AES_GCM_256, 56), (CHACHA20_POLY1305, 56)))
def test_sizes(cipher, size):
    assert ktls.info_size(cipher) == size <= INFO_SIZE


def written(cipher):
    """What write_info writes for a key of "k"s, an IV of "0123..." and a sequence number of "s"s; 0xEE behind it."""
    info = bytearray(b"\xee" * (INFO_SIZE + 8))
    key, iv = b"k" * 32, b"0123456789ab"
    ktls.write_info(linux.address_of(info), TLS_1_2, cipher, linux.address_of(key), linux.address_of(iv),
                    int.from_bytes(b"ssssssss"))
    return bytes(info)


@pytest.mark.parametrize(("cipher", "fields"), (
    (AES_GCM_128, b"456789ab" + b"k" * 16 + b"0123" + b"s" * 8),
    (AES_GCM_256, b"456789ab" + b"k" * 32 + b"0123" + b"s" * 8),
    (CHACHA20_POLY1305, b"0123456789ab" + b"k" * 32 + b"s" * 8),
))
def test_info(cipher, fields):
    """AES-GCM: the salt is the front of the IV (networking/tls.rst). And not a byte too many is written."""
    info = written(cipher)
    assert info[:4] == struct.pack("=HH", TLS_1_2, cipher)
    assert info[4:ktls.info_size(cipher)] == fields
    assert not info[ktls.info_size(cipher):].strip(b"\xee")


STRUCTS = {AES_GCM_128: "aes_gcm_128", AES_GCM_256: "aes_gcm_256", CHACHA20_POLY1305: "chacha20_poly1305"}
MARKS = {"iv": b"4", "key": b"k", "salt": b"0", "rec_seq": b"s"}      # by which the fields of `written` are found


def expressions():
    """C expression -> the value that it has to have."""
    found = {"SOL_TLS": ktls.SOL_TLS, "TCP_ULP": ktls.TCP_ULP, "IPPROTO_TCP": ktls.SOL_TCP, "TLS_TX": ktls.TLS_TX,
             "TLS_RX": ktls.TLS_RX, "TLS_SET_RECORD_TYPE": ktls.SET_RECORD_TYPE,
             "TLS_GET_RECORD_TYPE": ktls.GET_RECORD_TYPE, "TLS_1_2_VERSION": TLS_1_2, "TLS_1_3_VERSION": TLS_1_3,
             "CMSG_SPACE(1)": ktls.record_message(0).control_size, "CMSG_LEN(1)": 17, "CMSG_LEN(0)": 16,
             "offsetof(struct cmsghdr, cmsg_level)": 8, "offsetof(struct cmsghdr, cmsg_type)": 12}
    for cipher, name in STRUCTS.items():
        struct = f"struct tls12_crypto_info_{name}"
        found |= {f"TLS_CIPHER_{name.upper()}": cipher, f"sizeof({struct})": ktls.info_size(cipher)}
        for field, mark in MARKS.items():
            if field != "salt" or cipher != CHACHA20_POLY1305:
                mark = b"0" if (field, cipher) == ("iv", CHACHA20_POLY1305) else mark
                found[f"offsetof({struct}, {field})"] = written(cipher).index(mark, 4)
    return found


HEADERS = ("stddef.h", "stdio.h", "netinet/in.h", "sys/socket.h", "linux/tcp.h", "linux/tls.h")


def header_can_do():
    """Whether <linux/tls.h> is there, with ChaCha20-Poly1305 (Linux 5.11)."""
    source = ("#include <linux/tls.h>\n#include <sys/socket.h>\n"
              "struct tls12_crypto_info_chacha20_poly1305 x; int y = SOL_TLS;")
    return COMPILER and subprocess.run([COMPILER, "-fsyntax-only", "-x", "c", "-"], input=source, text=True,
                                       capture_output=True).returncode == 0


@pytest.mark.skipif(not header_can_do(), reason="no C compiler with <linux/tls.h>")
def test_layouts_are_those_of_the_headers(tmp_path):
    wanted = expressions()
    lines = [f"#include <{header}>" for header in HEADERS]
    lines.append("int main(void) {")
    lines += [f'printf("%lld\\n", (long long)({expression}));' for expression in wanted] + ["}"]
    source, program = tmp_path / "tls.c", tmp_path / "tls"
    source.write_text("\n".join(lines))
    subprocess.run([COMPILER, source, "-o", program], check=True, timeout=60)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert dict(zip(wanted, map(int, printed), strict=True)) == wanted


# --- control messages

def control_of(message):
    """(level, type, data) of a linux.Message's cmsg, and its record, by way of the pointers in its msghdr."""
    header = Msghdr.from_address(message.address)
    assert (header.name, header.namelen, header.flags, header.iovlen) == (0, 0, 0, 1)
    iovec = Iovec.from_address(header.iov)
    length, level, kind = struct.unpack("=Qii", ctypes.string_at(header.control, 16))
    assert length <= header.controllen == 24
    data = ctypes.string_at(header.control + 16, max(length - 16, 0))
    return (level, kind, data), ctypes.string_at(iovec.base, iovec.len)


def test_close_notify():
    """networking/tls.rst, "Send TLS control messages"; RFC 8446 section 6.1: an alert (21), warning, close_notify."""
    assert control_of(ktls.close_notify()) == ((282, 1, b"\x15"), b"\1\0")


def test_room_for_a_record():
    message = ktls.record_message(64)
    assert control_of(message) == ((0, 0, b""), bytes(64))


@pytest.mark.parametrize("size", (0, 1, 2, 64))
def test_received_record(size):
    """As the kernel writes it: through the pointers."""
    message = ktls.record_message(64)
    header = Msghdr.from_address(message.address)
    control = struct.pack("=QiiB", 17, 282, 2, 22)
    ctypes.memmove(header.control, control, len(control))
    ctypes.memmove(Iovec.from_address(header.iov).base, b"x" * size, size)
    assert ktls.received_record(message, size) == (22, b"x" * size)


@pytest.mark.parametrize(("level", "kind"), ((0, 0), (1, 1), (282, 1), (6, 2)))
def test_another_control_message_is_no_record_type(level, kind):
    message = ktls.record_message(64)
    control = struct.pack("=QiiB", 17, level, kind, 21)
    ctypes.memmove(Msghdr.from_address(message.address).control, control, len(control))
    assert ktls.received_record(message, 2) == (0, bytes(2))


# --- what is said where the kernel cannot

@pytest.mark.parametrize(("error", "option", "cipher", "says"), (
    (errno.ENOENT, ATTACH, AES_GCM_128,
     "this kernel has not loaded its tls module: 'modprobe tls' does, a line 'tls' in /etc/modules does at every boot"),
    (errno.ENOENT, SEND_KEYS, CHACHA20_POLY1305,
     "this kernel has no ChaCha20-Poly1305: 'modprobe chacha20poly1305' loads it"),
    (errno.ENOENT, RECEIVE_KEYS, AES_GCM_256, "this kernel has no AES-256-GCM: 'modprobe gcm' loads it"),
    (errno.EOPNOTSUPP, ATTACH, AES_GCM_128, f"this kernel ({platform.release()}) is older than 6.7"),
    (errno.EINVAL, ATTACH, AES_GCM_128, f"this kernel ({platform.release()}) is older than 6.7"),
    (errno.EINVAL, SEND_KEYS, AES_GCM_256, "this kernel refuses AES-256-GCM: Invalid argument"),
    (errno.EPERM, ATTACH, AES_GCM_128, "Operation not permitted"),
))
def test_a_refusal_is_explained(error, option, cipher, says):
    sentence = ktls.explain(error, option, cipher)
    assert says in sentence
    assert "\n" not in sentence


class Refusing:
    """A ring whose setsockopt gives what is left of `results`, then 0."""

    def __init__(self, results):
        self.results, self.closed, self.asked = results, False, []

    def arm_setsockopt(self, tag, epoch, fd, option, value, flags=0):
        self.asked.append((option, ctypes.string_at(*value)))

    def wait(self):
        return [(0, 0, self.results.pop(0) if self.results else 0, 0)]

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("results", "able", "says"), (
    ((), set(CIPHERS), ""),
    ((-errno.ENOENT,) * 3, set(), "modprobe tls"),
    ((-errno.EOPNOTSUPP,) * 3, set(), "older than 6.7"),
    ((0, 0, 0, 0, 0, 0, 0, -errno.ENOENT), {AES_GCM_128, AES_GCM_256}, "modprobe chacha20poly1305"),
    ((0, -errno.ENOENT, 0, 0, -errno.ENOENT), {CHACHA20_POLY1305}, "modprobe gcm"),
))
def test_probe(monkeypatch, results, able, says):
    ring = Refusing(list(results))
    monkeypatch.setattr(ktls, "Ring", lambda *_, **__: ring)
    found, reason = ktls.probe(True)
    assert found == able
    assert says in reason
    assert bool(reason) == bool(says)
    assert ring.closed


def test_probe_tries_all_that_connections_will_ask_for(monkeypatch):
    ring = Refusing([])
    monkeypatch.setattr(ktls, "Ring", lambda *_, **__: ring)
    ktls.probe(True)
    assert [option for option, _ in ring.asked] == [ATTACH, SEND_KEYS, RECEIVE_KEYS] * 3
    assert {value for option, value in ring.asked if option == ATTACH} == {b"tls"}
    sizes = [len(value) for option, value in ring.asked if option == SEND_KEYS]
    assert sizes == [40, 56, 56]


def test_probe_without_a_ring(monkeypatch):
    def no_ring(*_, **__):
        raise ktls.RingError("io_uring is switched off")

    monkeypatch.setattr(ktls, "Ring", no_ring)
    assert ktls.probe(True) == (frozenset(), "io_uring is switched off")


def test_probe_without_a_network(monkeypatch):
    def no_network(*_):
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    ring = Refusing([])
    monkeypatch.setattr(ktls, "Ring", lambda *_, **__: ring)
    monkeypatch.setattr(ktls.socket, "create_server", no_network)
    able, reason = ktls.probe(True)
    assert not able
    assert "127.0.0.1: Cannot assign requested address" in reason
    assert ring.closed


@pytest.mark.parametrize("use_liburing", (True, False))
def test_probe_of_this_kernel(use_liburing):
    """Whatever it can: a reason for what it cannot, and none for what it can."""
    able, reason = ktls.probe(use_liburing)
    assert able <= set(CIPHERS)
    assert bool(reason) == (able != set(CIPHERS))
