"""The record layer: bytes cut at every place, damaged, forged, unfinished and random, and nobody else notices."""

import contextlib
import os
import random
import re
import ssl
import subprocess

import pytest
from certificates import KINDS
from forged import KEY_UPDATE, forge
from support import FILES, request
from tlsclient import APPLICATION_DATA, CHANGE_CIPHER_SPEC, HANDSHAKE, KTLS, VERSIONS, alert_of, client_hello

each_version = pytest.mark.parametrize("version", VERSIONS)
in_userspace = pytest.mark.skipif(KTLS != "off", reason="in the kernel there is another answer to this")


# --- cut at every place --------------------------------------------------------------------------------------------


def single_bytes(data):
    return [data[i:i + 1] for i in range(len(data))]


@each_version
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_in_a_segment_of_its_own(tls_servers, kind, version):
    server = tls_servers[kind]
    with server.connect(server.context_of(version=version), cut=single_bytes) as client:
        for name in ("next", "random.bin", "n/001.txt"):
            assert client.ask("/" + name).body == FILES[name]


@each_version
def test_a_handshake_cut_in_two_at_every_place(tls_server, version):
    """Each flight is cut at the same distance from its start, and the request too, and all of them are seen."""
    context = tls_server.context_of(version=version)
    longest = len(client_hello(context))
    for at in range(1, longest, 3):
        with tls_server.connect(context, cut=lambda data, at=at: [data[:at], data[at:]]) as client:
            assert client.ask("/next").body == FILES["next"], at


@each_version
def test_a_request_in_the_segment_that_ends_the_handshake(tls_server, version):
    """In TLS 1.2 only a client that resumes is the last to speak."""
    context = tls_server.context_of(version=version)
    with tls_server.connect(context) as first:
        assert first.ask("/next").body == FILES["next"]
        session = first.tls.session
    for resume in ([None] if version == "1.3" else []) + [session]:
        with tls_server.connect(context, session=resume, hold=True) as client:
            client.send(request("/random.bin") + request("/next"))
            assert client.response().body == FILES["random.bin"]
            assert client.response().body == FILES["next"]


@each_version
def test_a_request_behind_the_end_of_the_handshake_at_every_place(tls_server, version):
    """Finished and request together, cut once, wherever: also within the one and within the other."""
    context = tls_server.context_of(version=version)
    with tls_server.connect(context) as first:
        assert first.ask("/next").body == FILES["next"]
        session = first.tls.session
    flight = 150 if version == "1.3" else 200
    for at in range(1, flight, 2):
        with tls_server.connect(context, session=session, hold=True) as client:
            flying = client.sock.encrypt(request("/next"))
            client.sock.raw.sendall(flying[:at])
            client.sock.raw.sendall(flying[at:])
            assert client.response().body == FILES["next"], at


@each_version
def test_many_records_in_one_segment(tls_server, version):
    with tls_server.connect(tls_server.context_of(version=version)) as client:
        names = list(FILES)[-100:]
        client.sock.raw.sendall(b"".join(client.sock.encrypt(request("/" + name)) for name in names))
        for name in names:
            assert client.response().body == FILES[name]


def test_many_clients_cut_at_random(tls_server):
    """Twenty handshakes and their requests at once, each in segments of its own length, from one byte on."""
    choose = random.Random(2028)
    names = [name for name in FILES if name.startswith("n/")]

    def anywhere(data):
        places = sorted(choose.sample(range(len(data) + 1), min(len(data), choose.randrange(6))))
        return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]

    clients = [tls_server.connect(tls_server.context_of(version=choose.choice(list(VERSIONS))), cut=anywhere, hold=True)
               for _ in range(20)]
    for _ in range(20):
        asked = [(client, choose.choices(names, k=choose.randint(1, 5))) for client in choose.sample(clients, 10)]
        for client, some in asked:
            client.send(b"".join(request("/" + name) for name in some))
        for client, some in asked:
            for name in some:
                assert client.response().body == FILES[name]
    for client in clients:
        client.close()


@each_version
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_client_hello_in_many_records(tls_server, version, size):
    """RFC 8446 5.1: a handshake message may be spread over several records."""
    def spread(data):
        if (data[0], data[5]) != (HANDSHAKE, 1):        # not the ClientHello
            return [data]
        message = data[5:]
        pieces = [message[i:i + size] for i in range(0, len(message), size)]
        return [b"".join(record(HANDSHAKE, piece) for piece in pieces)]
    with tls_server.connect(tls_server.context_of(version=version), cut=spread) as client:
        assert client.ask("/next").body == FILES["next"]


def record(kind, fragment, version=b"\3\3"):
    return bytes([kind]) + version + len(fragment).to_bytes(2) + fragment


# --- damaged -------------------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("at", [5, 20, -17, -1])
def test_one_changed_bit_ends_the_connection(tls_server, version, at):
    """In the nonce of TLS 1.2, in the text, or in the tag: the record is not what the client sealed."""
    with tls_server.connect() as other, tls_server.connect(tls_server.context_of(version=version)) as client:
        assert client.ask("/next").status == 200
        sealed = bytearray(client.sock.encrypt(request("/next")))
        sealed[at] ^= 1
        client.sock.raw.sendall(sealed)
        assert alert_of(client) == "bad_record_mac"
        assert other.ask("/next").status == 200


@each_version
def test_a_record_sent_twice_ends_the_connection(tls_server, version):
    with tls_server.connect(tls_server.context_of(version=version)) as client:
        sealed = client.sock.encrypt(request("/next"))
        client.sock.raw.sendall(sealed)
        assert client.response().body == FILES["next"]
        client.sock.raw.sendall(sealed)
        assert alert_of(client) == "bad_record_mac"


@each_version
def test_a_finished_that_is_wrong_ends_the_handshake(start_tls, site, version):
    server = start_tls(site)
    flights = []

    def damage(data):
        flights.append(data)
        return [data if len(flights) == 1 else data[:-1] + bytes([data[-1] ^ 1])]
    with pytest.raises(ssl.SSLError), server.connect(server.context_of(version=version), cut=damage) as client:
        client.sock.recv(1)
    assert (server.ended().failed, len(flights)) == (1, 2)


@pytest.mark.parametrize(("head", "alert"), [
    (b"\x17\x03\x03\x41\x01", "record_overflow"),       # one more than RFC 8446 5.2 allows
    (b"\x17\x03\x03\xff\xff", "record_overflow"),
    (b"\x18\x03\x03\x00\x20", "unexpected_message"),    # a heartbeat
    (b"\x16\x03\x03\x00\x20", "unexpected_message"),    # a handshake message in the clear
    (b"GET / HTTP/1.1\r\n\r\n", "protocol_version"),
], ids=repr)
def test_a_record_is_refused_by_its_first_five_bytes(tls_server, head, alert):
    with tls_server.connect(tls_server.context_of(version="1.3")) as client:
        assert client.ask("/next").status == 200
        client.sock.raw.sendall(head)
        assert alert_of(client) == alert


# --- forged --------------------------------------------------------------------------------------------------------


NEXT = request("/next")
ROOM = 16_384 - len(request("/next", content_length=16_000))
FULL = request("/next", body=bytes(ROOM), content_length=ROOM)
UPDATE = bytes([KEY_UPDATE, 0, 0, 1])

GOOD = {  # odd, and allowed by RFC 8446 section 5: these records together ask for /next
    "empty records": lambda by: [by.seal(b""), by.seal(b""), by.seal(NEXT), by.seal(b"")],
    "an empty record within": lambda by: [by.seal(NEXT[:9]), by.seal(b""), by.seal(NEXT[9:])],
    "padding": lambda by: [by.seal(NEXT, padding=1000)],
    "nothing but padding": lambda by: [by.seal(b"", padding=16_384), by.seal(NEXT)],
    "a byte a record": lambda by: [by.seal(bytes([byte])) for byte in NEXT],
    "the largest record": lambda by: [by.seal(FULL)],
    "new keys": lambda by: [by.key_update(0), by.seal(NEXT)],
    "new keys for both": lambda by: [by.key_update(1), by.seal(NEXT)],
    "new keys within a request": lambda by: [by.seal(NEXT[:9]), by.key_update(1), by.seal(NEXT[9:])],
    "new keys again and again": lambda by: [by.key_update(i % 2) for i in range(20)] + [by.seal(NEXT)],
    "new keys for both, 64 times": lambda by: [by.key_update(1) for _ in range(64)] + [by.seal(NEXT)],
    "new keys, told in two records": lambda by: [by.key_update(1, cut=2), by.seal(NEXT)],
}

BAD = {  # records -> the alert that ends the connection
    "no content type": (lambda by: by.seal_inner(bytes(50)), "unexpected_message"),
    "an unknown content type": (lambda by: by.seal(NEXT, 99), "unexpected_message"),
    "ChangeCipherSpec, sealed": (lambda by: by.seal(b"\1", CHANGE_CIPHER_SPEC), "unexpected_message"),
    "an empty handshake record": (lambda by: by.seal(b"", HANDSHAKE), "unexpected_message"),
    "a text too long": (lambda by: by.seal(bytes(16_385)), "record_overflow"),
    "a sequence number left out": (lambda by: by.seal(b"") and by.seal(NEXT), "bad_record_mac"),
    "an outer type that is not application_data": (
        lambda by: by.seal_inner(NEXT + bytes([APPLICATION_DATA]), HANDSHAKE), "unexpected_message"),
    "a second ClientHello": (lambda by: by.seal(b"\1\0\0\x26" + b"\3\3" + bytes(36), HANDSHAKE), "unexpected_message"),
    "a ticket from the client": (lambda by: by.seal(b"\4\0\0\5" + bytes(5), HANDSHAKE), "unexpected_message"),
    "a certificate nobody asked for": (lambda by: by.seal(b"\x0b\0\0\4" + bytes(4), HANDSHAKE), "unexpected_message"),
    "a second Finished": (lambda by: by.seal(b"\x14\0\0\x20" + bytes(32), HANDSHAKE), "unexpected_message"),
    "a KeyUpdate of neither kind": (lambda by: by.seal(UPDATE + b"\2", HANDSHAKE), "illegal_parameter"),
    "a KeyUpdate without a kind": (lambda by: by.seal(bytes([KEY_UPDATE, 0, 0, 0]), HANDSHAKE), "decode_error"),
    "a KeyUpdate and more in its record": (lambda by: by.seal((UPDATE + b"\0") * 2, HANDSHAKE), "unexpected_message"),
    "old keys after a KeyUpdate": (lambda by: by.seal(UPDATE + b"\0", HANDSHAKE) + by.seal(NEXT), "bad_record_mac"),
}


WAYS = {
    "each by itself": lambda sealed: sealed,
    "in one segment": lambda sealed: [b"".join(sealed)],
    "byte by byte": lambda sealed: single_bytes(b"".join(sealed)),
}


@in_userspace
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", GOOD)
def test_odd_records_are_understood(tls_server, tmp_path, case, way):
    client, forger = forge(tls_server, tmp_path / "keys")
    with client:
        for _ in range(2):
            for piece in WAYS[way](GOOD[case](forger)):
                forger.send(piece)
            assert client.response().body == FILES["next"]


@pytest.mark.parametrize("case", BAD)
def test_forbidden_records_end_the_connection(tls_server, tmp_path, case):
    make, alert = BAD[case]
    with tls_server.connect() as other:
        client, forger = forge(tls_server, tmp_path / "keys")
        with client:
            assert other.ask("/next").status == 200
            forger.send(forger.seal(NEXT))
            assert client.response().body == FILES["next"]
            forger.send(make(forger))
            assert alert_of(client) == alert
        assert other.ask("/next").body == FILES["next"]


@in_userspace
def test_new_keys_while_a_response_is_sent(tls_server, tmp_path):
    """The server's own KeyUpdate has to go between two records of the response."""
    client, forger = forge(tls_server, tmp_path / "keys")
    with client:
        forger.send(forger.seal(request("/large.bin") * 3))
        for _ in range(20):
            forger.send(forger.key_update(1))
        for _ in range(3):
            assert client.response().body == FILES["large.bin"]
        forger.send(forger.seal(NEXT))
        assert client.response().body == FILES["next"]


def test_a_flood_of_wishes_for_new_keys(start_tls, site, tmp_path):
    """Each would have an answer, and the client reads none: the server may give up on it, but holds back nothing."""
    server = start_tls(site)
    before = server.anonymous_memory()
    client, forger = forge(server, tmp_path / "keys")
    with server.connect() as other, client:
        with contextlib.suppress(ConnectionError):
            for i in range(5000):
                forger.send(forger.key_update(1))
                if i % 500 == 0:
                    assert other.ask("/next").body == FILES["next"]
        assert server.anonymous_memory() - before < 2 << 20
        assert other.ask("/next").body == FILES["next"]


@in_userspace
@pytest.mark.parametrize(("letter", "answers"), [(b"k\n", 0), (b"K\n", 1)])
def test_openssl_asks_for_new_keys(tls_server, letter, answers):
    """At `k` s_client changes its own keys, at `K` it asks the server to change its keys too."""
    program = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{tls_server.port}", "-tls1_3", "-msg"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with program:
        os.write(program.stdin.fileno(), letter)
        said = b""
        while b"KEYUPDATE" not in said:
            said += (piece := os.read(program.stdout.fileno(), 1 << 16))
            assert piece, said
        os.write(program.stdin.fileno(), request("/next", connection="close"))
        said += program.stdout.read()
    assert len(re.findall(rb">>> .*KeyUpdate", said)) == 1
    assert len(re.findall(rb"<<< .*KeyUpdate", said)) == answers
    assert FILES["next"] in said
