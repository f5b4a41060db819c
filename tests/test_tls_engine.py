"""TLS without I/O: the engine against Python's ssl in memory, bytes cut and mixed in every way, and records by hand."""

import contextlib
import itertools
import random
import ssl

import pytest
import tlskeys
from tlskeys import ALERT, APPLICATION_DATA, HANDSHAKE, KEY_UPDATE, KEY_UPDATE_ASKED, LARGEST, SUITES, USER_CANCELED
from tlsmemory import ALL_CIPHERS, ClientContext, Peer, TestEngine

import linux
import ktls
from openssl import TLS1_3
from tls import MOST_OUTPUT, Session, TlsError, record_size, split_records

CONTEXTS = {version: ClientContext(version) for version in ("1.2", "1.3")}
ROOM = LARGEST + 4096               # for a sealed record, and what goes before it
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"

each_version = pytest.mark.parametrize("version", CONTEXTS)
each_suite = pytest.mark.parametrize("suite", [suite for suite in SUITES if "ECDSA" not in suite])


@pytest.fixture(scope="module")
def files(pairs):
    return [(pairs["rsa"].cert, pairs["rsa"].key)]


@pytest.fixture
def engine(files):
    return TestEngine(files)


@pytest.fixture
def userspace(files):
    return TestEngine(files, kernel_ciphers=frozenset())


def pieces_of(data, size):
    return [data[at:at + size] for at in range(0, len(data), size)]


def deliver(engine, session, data, size):
    """Feed in pieces of `size` bytes; gives the plaintext."""
    return b"".join((engine.feed if session.established else engine.handshake)(session, piece)
                    for piece in pieces_of(data, size))


def take_output(session):
    output, session.output = session.output, b""
    return output


def begin(engine, peer, to_kernel=True):
    """A session that has all but the client's last flight; gives (session, that flight)."""
    session = engine.start(to_kernel)
    assert engine.handshake(session, peer.handshake()) == b""
    last = peer.handshake(take_output(session))
    assert not session.established
    return session, last


def establish(engine, version="1.3", to_kernel=True, context=None, session=None):
    """(session, peer) after a handshake; in the session's output is what it has to say behind it."""
    peer = Peer(context or CONTEXTS[version], session=session)
    tls_session, last = begin(engine, peer, to_kernel)
    engine.handshake(tls_session, last)
    if not peer.done:           # TLS 1.2's client waits for our Finished
        peer.handshake(take_output(tls_session))
    assert tls_session.established
    assert peer.done
    return tls_session, peer


def at(memory):
    return linux.pointer(linux.address_of(memory))


def seal(engine, session, data):
    memory = bytearray(ROOM)
    source = bytearray(data)
    size = engine.seal(session, at(source), len(data), at(memory), ROOM)
    return bytes(memory[:size])


def works(engine, session, peer):
    """Whether both ends can still talk."""
    peer.read(take_output(session))
    return (engine.feed(session, peer.encrypt(GET)) == GET and peer.read(seal(engine, session, b"answer")) == b"answer"
            and not session.output)


# --- records

@pytest.mark.parametrize(("records", "count", "rest"), (
    (b"", 0, b""),
    (b"\x17", 0, b"\x17"),
    (b"\x17\3\3\0", 0, b"\x17\3\3\0"),
    (b"\x17\3\3\0\0", 1, b""),
    (b"\x17\3\3\0\2a", 0, b"\x17\3\3\0\2a"),
    (b"\x17\3\3\0\2ab", 1, b""),
    (b"\x17\3\3\0\2ab\x15", 1, b"\x15"),
    (b"\x17\3\3\0\2ab" * 3 + b"\x17\3\3\1\0", 3, b"\x17\3\3\1\0"),
    (b"\x17\3\3\1\2" + bytes(258) + b"x", 1, b"x"),
))
def test_split_records(records, count, rest):
    assert split_records(records) == (count, rest)


@pytest.mark.parametrize(("tail", "wanted"), (
    (b"", 0), (b"\x17", 4), (b"\x17\3", 3), (b"\x17\3\3\0", 1), (b"\x17\3\3\0\2", 2), (b"\x17\3\3\0\2a", 1),
    (b"\x17\3\3\x40\0", 16384), (b"\x17\3\3\x40\0" + bytes(16383), 1)))
def test_wanted(tail, wanted):
    session = Session(None, True)
    session.tail = tail
    assert session.wanted == wanted


def test_record_size():
    assert record_size(b"\x17\3\3\1\2") == 5 + 258


# --- handshakes

@each_version
@pytest.mark.parametrize("size", (1, 2, 5, 100, 1 << 14))
def test_handshake_in_pieces(userspace, version, size):
    """From the client and from the server."""
    peer, session = Peer(CONTEXTS[version]), userspace.start(False)
    said = peer.handshake()
    while said:
        assert deliver(userspace, session, said, size) == b""
        said = b"".join(peer.handshake(piece) for piece in pieces_of(take_output(session), size))
    assert peer.done
    assert session.established
    assert session.modern == (version == "1.3")
    assert not session.resumed
    assert works(userspace, session, peer)


@each_version
def test_handshake_cut_anywhere(userspace, version):
    """The client's hello, and its last flight, in two pieces."""
    hello_size = len(Peer(CONTEXTS[version]).handshake())
    for at in (*range(1, 12), *range(12, hello_size, 23), hello_size - 1):
        peer, session = Peer(CONTEXTS[version]), userspace.start(False)
        hello = peer.handshake()
        userspace.handshake(session, hello[:at])
        userspace.handshake(session, hello[at:])
        last = peer.handshake(take_output(session))
        at = min(at, len(last) - 1)
        userspace.handshake(session, last[:at])
        assert not session.established
        userspace.handshake(session, last[at:])
        assert session.established
        if not peer.done:
            peer.handshake(take_output(session))
        assert works(userspace, session, peer), at
        userspace.free(session)


@each_suite
def test_every_suite(userspace, suite):
    session, peer = with_suite(userspace, suite, to_kernel=False)
    assert works(userspace, session, peer)


def context_of(suite):
    return ClientContext("1.3" if SUITES[suite].version == TLS1_3 else "1.2", suite)


def with_suite(engine, suite, **options):
    if SUITES[suite].version == TLS1_3:
        engine.insist(suite)
    session, peer = establish(engine, context=context_of(suite), **options)
    assert peer.tls.cipher()[0] == suite
    return session, peer


@each_version
def test_resumption(userspace, version):
    context = ClientContext(version)
    _, first = establish_and_talk(userspace, context)
    session, peer = establish_and_talk(userspace, context, session=first.tls.session)
    assert session.resumed
    assert peer.tls.session_reused
    assert works(userspace, session, peer)


@each_version
def test_a_ticket_of_another_server(files, userspace, version):
    """It is a full handshake, and nothing is left of the attempt."""
    context = ClientContext(version)
    _, first = establish_and_talk(TestEngine(files, frozenset()), context)
    session, peer = establish(userspace, to_kernel=False, context=context, session=first.tls.session)
    assert not session.resumed
    assert not peer.tls.session_reused
    assert works(userspace, session, peer)


def establish_and_talk(engine, context, session=None):
    """(session, peer) of which the peer has got the server's tickets."""
    peer = Peer(context, session=session)
    tls_session = engine.start(False)
    said = peer.handshake()
    while said:
        engine.handshake(tls_session, said)
        said = peer.handshake(take_output(tls_session)) if not peer.done else b""
    assert tls_session.established
    assert engine.feed(tls_session, peer.encrypt(GET)) == GET
    assert peer.read(seal(engine, tls_session, b"answer")) == b"answer"
    return tls_session, peer


@each_version
def test_output_that_can_wait(engine, version):
    """TLS 1.3's tickets need not be sent by themselves; but the kernel has to know that they have been, and the client
    of TLS 1.2 waits for the server's Finished."""
    for to_kernel in (False, True):
        peer = Peer(CONTEXTS[version])
        session, last = begin(engine, peer, to_kernel)
        assert not session.can_wait
        engine.handshake(session, last)
        assert session.output
        assert session.can_wait == (version == "1.3" and not to_kernel)


def test_output_goes_with_the_first_response(userspace):
    session, peer = establish(userspace, to_kernel=False)
    tickets = session.output
    sealed = seal(userspace, session, b"answer")
    assert sealed.startswith(tickets)
    assert session.output == b""
    assert peer.read(sealed) == b"answer"


# --- what comes behind the end of a handshake

def all_but_the_last(engine, version, suite=None):
    """(session, peer, last flight): a handshake that lacks nothing but the client's last flight, behind which the
    client may send what it likes. In TLS 1.2 that takes a resumed session, whose client has the last word."""
    context = ClientContext(version, suite)
    if version == "1.3":
        peer = Peer(context)
    else:
        _, former = establish_and_talk(engine, context)
        peer = Peer(context, session=former.tls.session)
    session, last = begin(engine, peer)
    assert peer.done
    return session, peer, last


def first_sequences(session, version):
    """RFC 8446 section 5.3: each key counts from 0; under TLS 1.2's first one Finished has been sent."""
    return (len(tlskeys.split(session.output)), 0) if version == "1.3" else (1, 1)


PAYLOADS = {
    "nothing": [], "one": [GET], "several": [GET, b"b", b"c" * 100], "large": [b"l" * LARGEST],
    "as many as come": [b"%d" % i for i in range(40)],
}


@each_version
@pytest.mark.parametrize("case", PAYLOADS)
def test_data_behind_the_last_flight(engine, version, case):
    """All at once: it is read, and counted."""
    session, peer, last = all_but_the_last(engine, version)
    records = [peer.encrypt(payload) for payload in PAYLOADS[case]]
    assert engine.handshake(session, last + b"".join(records)) == b"".join(PAYLOADS[case])
    sent, received = first_sequences(session, version)
    assert session.sequences == (sent, received + len(records))
    assert session.to_kernel
    assert not session.wanted
    check_hand_over(engine, session, peer)


def check_hand_over(engine, session, peer, on_its_way=b""):
    """The keys and numbers are those with which the client goes on, in both directions."""
    assert session.to_kernel
    size = engine.derive_keys(session)
    send, receive = (tlskeys.Direction.of_info(bytes(session.keys[at:at + size])) for at in (0, ktls.INFO_SIZE))
    client, server = peer.directions()
    assert (send.key, send.iv, send.sequence) == (server.key, server.iv, session.sequences[0])
    assert (receive.key, receive.iv, receive.sequence) == (client.key, client.iv, session.sequences[1])
    for record in tlskeys.split(on_its_way):
        receive.open(record)
    for _ in range(2):
        assert receive.open(peer.encrypt(GET)) == (GET, APPLICATION_DATA)
    output = take_output(session)
    for answer in (b"answer", b"a" * LARGEST, b"another"):
        assert peer.read(output + send.seal(answer)) == answer
        output = b""
    engine.hand_over(session)
    assert session.in_kernel


@each_version
@pytest.mark.parametrize("before", (0, 2))
def test_data_behind_the_last_flight_cut_anywhere(engine, version, before):
    """The missing bytes of the record that has begun, and no others, are what is received next."""
    size = len(all_but_the_last(engine, version)[1].encrypt(GET))
    for at in range(size + 1):
        session, peer, last = all_but_the_last(engine, version)
        whole = b"".join(peer.encrypt(b"whole") for _ in range(before))
        record = peer.encrypt(GET)
        assert engine.handshake(session, last + whole + record[:at]) == b"whole" * before + GET * (at == size)
        missing = record[at:] + peer.encrypt(b"next")
        assert session.wanted == (0 if at in (0, size) else size - at if at >= 5 else 5 - at)
        while session.wanted:
            wanted = session.wanted
            plaintext = engine.feed(session, missing[:wanted])
            missing = missing[wanted:]
            assert plaintext == (b"" if session.wanted else GET)
        sent, received = first_sequences(session, version)
        assert session.sequences == (sent, received + before + (at > 0))
        check_hand_over(engine, session, peer, missing)


def test_a_large_record_behind_the_last_flight_in_small_pieces(engine):
    """Piece by piece as the receives bring it: never more than is wanted."""
    session, peer, last = all_but_the_last(engine, "1.3")
    record = peer.encrypt(b"r" * LARGEST)
    plaintext = engine.handshake(session, last + record[:3])
    record = record[3:]
    while session.wanted:
        size = min(session.wanted, 4096)
        plaintext += engine.feed(session, record[:size])
        record = record[size:]
    assert plaintext == b"r" * LARGEST
    assert record == b""
    check_hand_over(engine, session, peer)


@each_suite
def test_hand_over_in_every_suite(engine, suite):
    session, peer = with_suite(engine, suite)
    check_hand_over(engine, session, peer)


@each_version
def test_hand_over_of_a_resumed_session(engine, version):
    """It gives one ticket fewer, or has none: that too is counted."""
    context = ClientContext(version)
    _, former = establish_and_talk(engine, context)
    session, peer = establish(engine, context=context, session=former.tls.session)
    assert session.resumed
    assert session.sequences == first_sequences(session, version)
    check_hand_over(engine, session, peer)


@pytest.mark.parametrize("count", (1, 3))
def test_false_start(engine, count):
    """RFC 7918: a client of TLS 1.2 that does not wait for our Finished; its records are made by hand."""
    peer = Peer(CONTEXTS["1.2"])
    session, last = begin(engine, peer)
    client, _ = peer.directions()
    assert engine.handshake(session, last + b"".join(client.seal(GET) for _ in range(count))) == GET * count
    assert session.sequences == (1, 1 + count)
    peer.handshake(take_output(session))
    peer.encrypt = client.seal
    check_hand_over(engine, session, peer)


# What else may come behind it, by hand: [(content, type)], plaintext of it, and what becomes of the session.
KEEPS, STAYS, ENDS, BREAKS = "goes to the kernel", "stays in userspace", "is at its end", "is broken"
ODD = {
    "nothing in a record": ([(b"", APPLICATION_DATA)], b"", STAYS),
    "nothing in one of them": ([(GET, APPLICATION_DATA), (b"", APPLICATION_DATA)], GET, STAYS),
    "close_notify": ([(tlskeys.CLOSE_NOTIFY, ALERT)], b"", ENDS),
    "data and close_notify": ([(GET, APPLICATION_DATA), (tlskeys.CLOSE_NOTIFY, ALERT)], GET, ENDS),
    "close_notify and data": ([(tlskeys.CLOSE_NOTIFY, ALERT), (GET, APPLICATION_DATA)], b"", ENDS),
    "a fatal alert": ([(b"\2\x28", ALERT)], b"", BREAKS),
}
MODERN = {
    "data": ([(GET, APPLICATION_DATA)], GET, KEEPS),
    "new keys": ([(KEY_UPDATE, HANDSHAKE)], b"", STAYS),
    "new keys for both": ([(KEY_UPDATE_ASKED, HANDSHAKE)], b"", STAYS),
    "data, then new keys": ([(GET, APPLICATION_DATA), (KEY_UPDATE, HANDSHAKE)], GET, STAYS),
    "user_canceled": ([(USER_CANCELED, ALERT)], b"", STAYS),
    "a hello": ([(b"\1\0\0\0", HANDSHAKE)], b"", BREAKS),
    "an empty handshake message": ([(b"", HANDSHAKE)], b"", BREAKS),
}


@pytest.mark.parametrize(("version", "case"), [*itertools.product(CONTEXTS, ODD), *(("1.3", case) for case in MODERN)])
def test_other_records_behind_the_last_flight(engine, version, case):
    """What is not all application data is not for the kernel, whose count would be wrong."""
    records, plaintext, fate = (ODD | MODERN)[case]
    session, peer, last = all_but_the_last(engine, version)
    client, _ = peer.directions()
    flight = last + b"".join(client.seal(*record) for record in records)
    if fate is BREAKS:
        with pytest.raises(TlsError):
            engine.handshake(session, flight)
        assert session.broken
    else:
        assert engine.handshake(session, flight) == plaintext
        assert session.to_kernel == (fate is KEEPS)
        assert session.at_end == (fate is ENDS)
        assert not session.wanted
    if fate is STAYS:
        client = client.next() if "new keys" in case else client
        assert engine.feed(session, client.seal(GET)) == GET
        assert peer.read(seal(engine, session, b"answer")) == b"answer"


@pytest.mark.parametrize("cut", range(1, 6))
def test_new_keys_behind_the_last_flight_in_two_pieces(engine, cut):
    session, peer, last = all_but_the_last(engine, "1.3")
    client, _ = peer.directions()
    record = client.seal(KEY_UPDATE, HANDSHAKE)
    engine.handshake(session, last + record[:cut])
    while session.wanted:
        assert session.to_kernel
        record = record[cut:]
        cut = session.wanted
        assert engine.feed(session, record[:cut]) == b""
    assert not session.to_kernel
    assert engine.feed(session, client.next().seal(GET)) == GET


@pytest.mark.parametrize(("ciphers", "taken"), (
    (ALL_CIPHERS, True), ({ktls.AES_GCM_256}, True), ({ktls.AES_GCM_128}, False)))
def test_only_what_the_kernel_can_goes_to_the_kernel(files, ciphers, taken):
    engine = TestEngine(files, kernel_ciphers=frozenset(ciphers))
    session, peer = with_suite(engine, "TLS_AES_256_GCM_SHA384")
    assert session.to_kernel == taken
    assert works(engine, session, peer)


@each_version
@pytest.mark.parametrize("asked", (False, True))
def test_no_kernel(files, version, asked):
    """Where the kernel can nothing, or the socket could not be made ready, no secret is kept."""
    engine = TestEngine(files, kernel_ciphers=frozenset() if asked else ALL_CIPHERS)
    session, peer = establish(engine, version, to_kernel=asked)
    assert not session.to_kernel
    assert session.secrets is None
    assert engine.openssl.alive
    assert works(engine, session, peer)


# --- secrets

@each_version
def test_secrets_do_not_outlive_their_use(engine, version):
    session, peer = establish(engine, version)
    secrets = session.secrets
    assert any(secrets) == (version == "1.3")
    engine.derive_keys(session)
    keys = session.keys
    assert any(keys)
    assert not any(secrets)
    assert not any(engine.schedule.scratch)
    engine.hand_over(session)
    assert not any(keys)
    assert session.keys is session.secrets is session.ssl is None
    assert not engine.openssl.alive


def test_secrets_of_a_handshake_given_up_are_wiped(engine):
    session, last = begin(engine, Peer(CONTEXTS["1.3"]))
    secrets = session.secrets
    assert any(secrets)
    engine.free(session)
    assert not any(secrets)
    assert not engine.openssl.alive
    engine.free(session)                # and a second time is no harm


def test_secrets_go_to_their_own_session(engine):
    """Handshakes that take turns."""
    peers = [Peer(CONTEXTS["1.3"]) for _ in range(3)]
    begun = [begin(engine, peer) for peer in peers]
    for (session, last), peer in [*zip(begun, peers, strict=True)][::-1]:
        engine.handshake(session, last)
        check_hand_over(engine, session, peer)


# --- data

@each_version
@pytest.mark.parametrize("size", (1, 2, 5, 7, 100, 1 << 16))
def test_data_in_pieces(userspace, version, size):
    session, peer = establish(userspace, version, to_kernel=False)
    payloads = [b"%d" % i * i for i in range(1, 60)] + [b"l" * LARGEST]
    wire = b"".join(map(peer.encrypt, payloads))
    assert deliver(userspace, session, wire, size) == b"".join(payloads)
    assert not session.tail


@each_version
def test_tail_tells_whether_a_record_has_begun(userspace, version):
    """Also where it is a header alone, of which OpenSSL's SSL_has_pending knows nothing."""
    session, peer = establish(userspace, version, to_kernel=False)
    for _ in range(2):
        record = peer.encrypt(GET)
        for at in range(len(record) - 1):
            assert userspace.feed(session, record[at:at + 1]) == b""
            assert session.tail == record[:at + 1]
            assert not session.wanted, "nobody waits for it in userspace"
        assert userspace.feed(session, record[-1:]) == GET
        assert session.tail == b""


@each_version
@pytest.mark.parametrize("size", (1, 100, LARGEST))
def test_seal(userspace, version, size):
    session, peer = establish(userspace, version, to_kernel=False)
    for _ in range(3):
        assert peer.read(seal(userspace, session, b"a" * size)) == b"a" * size


def test_seal_of_several_records(userspace):
    session, peer = establish(userspace, to_kernel=False)
    peer.read(take_output(session))
    source, target = bytearray(random.Random(1).randbytes(4 * LARGEST)), bytearray(5 * LARGEST)
    size = userspace.seal(session, linux.pointer(linux.address_of(source)), len(source),
                          linux.pointer(linux.address_of(target)), len(target))
    records = tlskeys.split(bytes(target[:size]))
    assert len(records) == 4
    assert peer.read(b"".join(records)) == source


@pytest.mark.parametrize("times", (1, 2, 5, 64))
def test_new_keys_asked_for_go_out_with_the_next_response(userspace, times):
    session, peer = establish(userspace, to_kernel=False)
    client, _ = peer.directions()
    peer.read(take_output(session))
    for _ in range(times):
        assert userspace.feed(session, client.seal(KEY_UPDATE_ASKED, HANDSHAKE)) == b""
        client = client.next()
    assert userspace.feed(session, client.seal(GET)) == GET
    sealed = seal(userspace, session, b"answer")
    assert len(tlskeys.split(sealed)) == 1 + times
    assert peer.read(sealed) == b"answer"
    assert session.output == b""


def test_a_flood_of_wishes_for_new_keys(userspace):
    """What waits for the next response is bounded, and after that the client is told to go."""
    session, peer = establish(userspace, to_kernel=False)
    client, _ = peer.directions()
    answered = 0
    with pytest.raises(TlsError, match="new keys"):
        for _ in range(200):
            userspace.feed(session, client.seal(KEY_UPDATE_ASKED, HANDSHAKE))
            assert len(session.output) <= MOST_OUTPUT
            client = client.next()
            answered += 1
    assert answered > 5
    assert len(session.output) <= 2 * MOST_OUTPUT


@pytest.mark.parametrize("seed", range(12))
def test_sessions_take_turns(files, seed):
    """Many at once through the same two BIOs, in any order, cut anywhere: none gets what is another's."""
    rnd = random.Random(seed)
    engine = TestEngine(files, kernel_ciphers=rnd.choice((frozenset(), ALL_CIPHERS)))
    conversations = [Conversation(engine, rnd, number) for number in range(6)]
    while unfinished := [conversation for conversation in conversations if not conversation.finished]:
        rnd.choice(unfinished).step()
    for conversation in conversations:
        assert conversation.received == conversation.payload
        engine.free(conversation.session)
    assert not engine.openssl.alive


class Conversation:
    """One client that shakes hands and then sends a payload of its own, in steps."""

    def __init__(self, engine, rnd, number):
        self.engine, self.rnd = engine, rnd
        self.peer = Peer(CONTEXTS[rnd.choice(("1.2", "1.3"))])
        self.session = engine.start(True)
        self.wire = self.peer.handshake()
        self.payload = b"%d" % number * rnd.choice((10, 1000, 20_000))
        self.received, self.sent = b"", False

    @property
    def finished(self):
        return self.sent and not self.wire

    def step(self):
        """Some bytes to the server; what it says at once back to the client; and data once the handshake is done."""
        engine, session, rnd = self.engine, self.session, self.rnd
        size = rnd.choice((1, 10, 100, 5000))
        piece, self.wire = self.wire[:size], self.wire[size:]
        if piece:
            self.received += (engine.feed if session.established else engine.handshake)(session, piece)
        if session.output and rnd.random() < 0.7:
            output = take_output(session)
            if self.peer.done:
                self.peer.read(output)
            else:
                self.wire += self.peer.handshake(output)
        if self.peer.done and not self.sent:
            self.sent = True
            for piece in pieces_of(self.payload, rnd.choice((7, 3000, 1 << 14))):
                self.wire += self.peer.encrypt(piece)


# --- what goes wrong

def alert_of(peer, output):
    """What a client says of the alert in `output`."""
    with pytest.raises(ssl.SSLError) as caught:
        (peer.read if peer.done else peer.handshake)(output)
    return str(caught.value)


def other_session(engine):
    session, peer = establish(engine, to_kernel=False)
    peer.read(take_output(session))
    return session, peer


@pytest.mark.parametrize("garbage", (
    b"\x16\3\1\0\5hello", b"\x16\3\1\xff\xffaaaa", b"\x17\3\3\0\1a", b"\x15\3\1\0\2\2\x28", b"\0" * 300, b"\xff" * 300,
    b"\x14\3\3\0\1\1", b"SSH-2.0-OpenSSH_9.2\r\n"))
def test_garbage_instead_of_a_hello(engine, garbage):
    """An alert at the most is said to that, and nothing is left of it."""
    bystander, its_peer = other_session(engine)
    session = engine.start(True)
    with pytest.raises(TlsError) as caught:
        engine.handshake(session, garbage)
    assert str(caught.value)
    assert session.broken
    assert [record[0] for record in tlskeys.split(session.output)] in ([], [ALERT])
    assert engine.end(session) == session.output
    assert works(engine, bystander, its_peer)
    engine.free(session)
    assert len(engine.openssl.alive) == 1


@each_version
@pytest.mark.parametrize("at", (0, 3, 5, 20, -1))
def test_a_changed_last_flight(engine, version, at):
    """It is no end of a handshake, whichever byte has changed; and nothing is left of it in the BIOs."""
    bystander, its_peer = other_session(engine)
    session, last = begin(engine, Peer(CONTEXTS[version]))
    last = bytearray(last)
    last[at] ^= 1
    with contextlib.suppress(TlsError):         # a record that is longer now has not come to its end
        engine.handshake(session, bytes(last))
    assert not session.established
    engine.end(session)
    engine.free(session)
    assert works(engine, bystander, its_peer)


@each_version
@pytest.mark.parametrize("whole", (True, False))
def test_a_changed_record(userspace, version, whole):
    """bad_record_mac, under our keys; then the session can do no more, and others can."""
    bystander, its_peer = other_session(userspace)
    session, peer = establish(userspace, version, to_kernel=False)
    peer.read(take_output(session))
    record = bytearray(peer.encrypt(GET))
    record[-1] ^= 1
    with pytest.raises(TlsError):
        deliver(userspace, session, bytes(record), 1 << 16 if whole else 7)
    assert session.broken
    assert "alert bad record mac" in alert_of(peer, userspace.end(session))
    assert works(userspace, bystander, its_peer)
    userspace.free(session)
    assert len(userspace.openssl.alive) == 1


def test_what_came_with_a_changed_record_is_dropped(userspace):
    """A good one before it, and one behind: all of that piece, since nobody can tell what the client meant."""
    session, peer = establish(userspace, to_kernel=False)
    records = [bytearray(peer.encrypt(GET)) for _ in range(3)]
    records[1][-1] ^= 1
    with pytest.raises(TlsError):
        userspace.feed(session, b"".join(map(bytes, records)))
    assert session.broken


@each_version
def test_a_record_twice(userspace, version):
    session, peer = establish(userspace, version, to_kernel=False)
    record = peer.encrypt(GET)
    assert userspace.feed(session, record) == GET
    with pytest.raises(TlsError):
        userspace.feed(session, record)


@each_version
def test_plaintext_where_a_record_should_be(userspace, version):
    session, _ = establish(userspace, version, to_kernel=False)
    with pytest.raises(TlsError):
        userspace.feed(session, GET)


@pytest.mark.parametrize(("offered", "chosen"), (
    (["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), (["http/1.0", "http/1.1"], "http/1.1"),
    (["http/1.0"], "http/1.0"), (["h2", "http/1.0"], "http/1.0"), ([], None)))
def test_alpn(userspace, offered, chosen):
    context = ClientContext(alpn=offered)
    session, peer = establish(userspace, to_kernel=False, context=context)
    assert peer.tls.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("offered", (
    ["h2"], ["http/0.9", "h2"], ["http/1.1x"], ["xhttp/1.1"], ["x\x08http/1.1"], ["x" * 255]))
def test_alpn_without_what_we_speak(userspace, offered):
    peer, session = Peer(ClientContext(alpn=offered)), userspace.start(False)
    with pytest.raises(TlsError, match="no application protocol"):
        userspace.handshake(session, peer.handshake())
    assert "alert no application protocol" in alert_of(peer, userspace.end(session))


@each_version
def test_least_version(files, version):
    engine = TestEngine(files, least=TLS1_3)
    if version == "1.3":
        assert works(engine, *establish(engine, to_kernel=False))
        return
    peer, session = Peer(CONTEXTS["1.2"]), engine.start(False)
    with pytest.raises(TlsError):
        engine.handshake(session, peer.handshake())
    assert "alert protocol version" in alert_of(peer, engine.end(session))


# --- the end

@each_version
def test_our_close_notify(userspace, version):
    session, peer = establish(userspace, version, to_kernel=False)
    assert works(userspace, session, peer)
    words = userspace.end(session)
    assert session.ended
    assert peer.hears_close_notify(words)


def test_tickets_that_waited_go_before_close_notify(userspace):
    session, peer = establish(userspace, to_kernel=False)
    tickets = session.output
    words = userspace.end(session)
    assert words.startswith(tickets)
    assert peer.hears_close_notify(words)


@each_version
def test_close_notify_behind_a_response(userspace, version):
    """In the same memory, as it is sent."""
    session, peer = establish(userspace, version, to_kernel=False)
    peer.read(take_output(session))
    memory = bytearray(ROOM)
    at, source = linux.address_of(memory), bytearray(b"the last answer")
    size = userspace.seal(session, linux.pointer(linux.address_of(source)), len(source), linux.pointer(at), ROOM)
    size += userspace.end_behind(session, at + size)
    assert session.ended
    assert peer.read(bytes(memory[:size])) == b"the last answer"
    assert peer.hears_close_notify(b"")


@each_version
def test_their_close_notify(userspace, version):
    """What came before it counts, what comes behind it does not (RFC 8446 section 6.1); and ours can still be said."""
    session, peer = establish(userspace, version, to_kernel=False)
    assert works(userspace, session, peer)
    client, _ = peer.directions()
    client.sequence += 1
    wire = client.seal(GET) + client.seal(tlskeys.CLOSE_NOTIFY, ALERT) + client.seal(b"too late") + b"\x17\3"
    assert userspace.feed(session, wire) == GET
    assert session.at_end
    assert peer.read(seal(userspace, session, b"answer")) == b"answer"
    assert peer.hears_close_notify(userspace.end(session))


def test_the_end_of_a_handshake_that_has_none(engine):
    for step in range(2):
        peer, session = Peer(CONTEXTS["1.3"]), engine.start(True)
        if step:
            engine.handshake(session, peer.handshake())
            take_output(session)
        assert engine.end(session) == b""
        assert session.ended
        engine.free(session)


@pytest.mark.parametrize("size", (1, 4))
def test_the_end_within_a_message(userspace, size):
    """Of a KeyUpdate in two records the first has come: then OpenSSL has no last words, and leaves nothing else."""
    session, peer = establish(userspace, to_kernel=False)
    client, _ = peer.directions()
    userspace.feed(session, client.seal(KEY_UPDATE[:size], HANDSHAKE))
    assert peer.read(userspace.end(session)) == b""
    userspace.free(session)


def test_half_a_record_is_no_end(userspace):
    """A FIN within a record is the caller's to see; nothing of it has come out."""
    session, peer = establish(userspace, to_kernel=False)
    assert userspace.feed(session, peer.encrypt(GET)[:-1]) == b""
    assert not session.at_end


def test_every_ssl_is_freed(engine):
    sessions = [establish(engine, version)[0] for version in ("1.2", "1.3") for _ in range(3)]
    sessions.append(engine.start(True))
    assert len(engine.openssl.alive) == 7
    for session in sessions:
        engine.free(session)
    assert not engine.openssl.alive
