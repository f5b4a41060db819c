"""What clients may do to TLS: records of any kind in any order, cut anywhere, spoilt, or never any.

Beside the session that is looked at there is another one over the same BIOs, which has to go on working: its records
must not be lost, and no error of the other's may reach it.
"""

import contextlib
import functools
import itertools
import os
import ssl
import tempfile

import tlskeys
from certificates import Authority
from tlskeys import ALERT, APPLICATION_DATA, CLOSE_NOTIFY, HANDSHAKE, KEY_UPDATE, KEY_UPDATE_ASKED, USER_CANCELED
from tlsmemory import ClientContext, Peer, TestEngine

import linux
import ktls
from tls import LARGEST_PLAINTEXT, MOST_OUTPUT, TlsError, record_size, split_records

ROOM = LARGEST_PLAINTEXT + MOST_OUTPUT + 4096       # for a sealed record, and what goes before it
VERSIONS = "1.2", "1.3"
SOME_WARNINGS, MANY_EMPTY = 5, 32       # in a row: more than OpenSSL takes of what is allowed once
WORDS = (b"\x16\3\1", b"\x16\3\3", b"\3\3", b"\3\4", b"\1\0", b"\0\0", b"\0\x10", b"\0\x2b", b"\x02h2", b"\x08http/1.1",
         b"\x08http/1.0", b"localhost", b"a.example.org", b"\0\x33", b"\0\x2d", b"\0\x0d", b"\x13\1", b"\xc0\x2b",
         b"\x15\3\3\0\2\1\0", b"\x14\3\3\0\1\1", b"\x17\3\3", b"\x80\x2e\1", b"GET / HTTP/1.1\r\n")


@functools.cache
def engine():
    """One for all inputs, with two certificates; and a session over it that is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(folder)
        pairs = [authority.issue(), authority.issue(names=("*.example.org",))]
        made = TestEngine([(pair.cert, pair.key) for pair in pairs])
    return made, Talk(made, "1.3", False)


@functools.cache
def context(version):
    return ClientContext(version, alpn=("h2", "http/1.1"))


class Talk:
    """A session, and a client whose records are made by hand once the handshake is over."""

    def __init__(self, made, version, to_kernel, size=1 << 16):
        """`size`: of the pieces that the client's words come in."""
        self.engine, self.version = made, version
        os.ftruncate(context(version).log, 0)
        self.session, self.peer = made.start(to_kernel), Peer(context(version), "a.example.org")
        self.sent = self.received = b""         # plaintext that has been sealed, and has come out
        said = self.peer.handshake()
        while said:
            for piece in pieces_of(said, size):
                assert not self.session.established
                assert made.handshake(self.session, piece) == b""
            said = b"" if self.peer.done and self.session.established else self.peer.handshake(self.take_output())
        assert self.peer.done
        assert self.session.established
        assert self.session.modern == (version == "1.3")
        self.client, self.server = self.peer.directions()
        self.held = b""                         # what the client has said and not sent yet
        self.updates = self.warnings = self.empty = 0
        self.closed = False

    def take_output(self):
        output, self.session.output = self.session.output, b""
        return output

    def say(self, content, kind=APPLICATION_DATA):
        self.held += self.client.seal(content, kind)
        if kind == APPLICATION_DATA:
            self.sent += content

    def give(self, size):
        """Send on the first `size` bytes of what is held back."""
        piece, self.held = self.held[:size], self.held[size:]
        if piece:
            self.received += self.engine.feed(self.session, piece)

    def answer(self, size):
        """The server says something, and it arrives."""
        content = bytes(i & 0xFF for i in range(size))
        memory, source = bytearray(ROOM), bytearray(content)
        sealed = self.engine.seal(self.session, at(source), size, at(memory), ROOM)
        assert self.session.output == b""
        assert self.peer.read(bytes(memory[:sealed])) == content

    def works(self):
        self.say(b"ping")
        self.give(len(self.held))
        self.answer(4)
        return self.received == self.sent


def pieces_of(data, size):
    return [data[start:start + size] for start in range(0, len(data), size)]


def at(memory):
    return linux.pointer(linux.address_of(memory))


# --- a connection after its handshake

class Spoilt(Exception):
    """From here on the client is not to be understood."""


def send_data(talk, argument):
    talk.empty += not argument
    talk.say(bytes([argument]) * (argument if argument < 200 else argument * 64))


def send_some(talk, argument):
    talk.give(argument if argument < 100 else len(talk.held) - argument + 100)


def send_all(talk, _):
    talk.give(len(talk.held))


def hear(talk, argument):
    """In userspace, and so for good: of what OpenSSL sends nobody counts the records."""
    send_all(talk, argument)
    talk.session.to_kernel = False
    talk.answer(1 + argument * 64)


def new_keys(talk, argument):
    """TLS 1.3 only; asked for an answer or not, in one record or two (which RFC 8446 section 5.1 allows)."""
    if talk.version == "1.3" and talk.updates < 8:
        message, cut = (KEY_UPDATE_ASKED if argument & 1 else KEY_UPDATE), argument >> 1 & 3
        for part in (message[:cut], message[cut:]) if cut else (message,):
            talk.say(part, HANDSHAKE)
        talk.client = talk.client.next()
        talk.updates += 1


def warn(talk, _):
    if talk.version == "1.3":
        talk.say(USER_CANCELED, ALERT)
        talk.warnings += 1


def spoil(talk, argument):
    """A bit of what is on its way."""
    if talk.held:
        send_some(talk, 0)
        place = argument * 7 % len(talk.held)
        whole = bytearray(talk.held)
        whole[place] ^= 1 << argument % 8
        talk.held = bytes(whole)
        raise Spoilt


def send_noise(talk, argument):
    """A record of any type and length that nobody has sealed."""
    kind, size = (20, 21, 22, 23, 24, 0, 128, 255)[argument % 8], argument >> 3
    talk.held += bytes([kind, 3, 3, 0, size]) + bytes([argument]) * size
    raise Spoilt


def send_odd(talk, argument):
    """A record that is sealed well, with something in it that does not belong there."""
    kind = (APPLICATION_DATA, HANDSHAKE, ALERT, 0, 24, 20)[argument % 6]
    talk.say(bytes([argument, argument >> 4]) * (argument >> 5), kind)
    raise Spoilt


def drop(talk, argument):
    """A record is lost on the way."""
    first, talk.held = talk.held, b""
    if first:
        talk.client.seal(b"")
        talk.held = talk.client.seal(bytes([argument]))
        raise Spoilt


def close(talk, _):
    talk.say(CLOSE_NOTIFY, ALERT)
    talk.closed = True


STEPS = (send_data, send_data, send_some, send_some, send_all, hear, new_keys, warn, spoil, send_noise, send_odd, drop,
         close)


def tls(data):
    """Steps of a client: all that it seals comes out once and in order, and nothing that it does not."""
    made, other = engine()
    flags, size, steps = (data[0] if data else 0), (data[1] if len(data) > 1 else 0), data[2:]
    talk = Talk(made, VERSIONS[flags & 1], bool(flags & 2), 1 << 16 if size > 128 else size + 16)
    talk.session.to_kernel = False if flags & 4 else talk.session.to_kernel
    try:
        play(talk, steps)
    finally:
        made.free(talk.session)
    assert other.works(), "the other session has been harmed"
    assert made.openssl.alive == {other.session.ssl.value}, "a session has not been let go"


def play(talk, steps):
    try:
        take(talk, steps)
        assert talk.session.at_end == talk.closed
    except Spoilt:
        with contextlib.suppress(TlsError):
            send_all(talk, 0)
        assert talk.sent.startswith(talk.received)
        say_goodbye(talk)
        return
    except TlsError:
        warned = talk.warnings + talk.closed >= SOME_WARNINGS
        assert talk.updates or warned or talk.empty >= MANY_EMPTY, "nothing was wrong"
        assert talk.sent.startswith(talk.received)
        return
    assert talk.received == talk.sent
    if talk.session.to_kernel and not talk.session.at_end:
        hand_over(talk)
    else:
        say_goodbye(talk)



def take(talk, steps):
    for step, argument in zip(steps[::2], steps[1::2], strict=False):
        if not talk.closed:
            STEPS[step % len(STEPS)](talk, argument)
            check(talk)
    send_all(talk, 0)


def check(talk):
    """What has come out is a beginning of what went in; no more waits than may, and the record at the end is known."""
    session = talk.session
    assert talk.sent.startswith(talk.received)
    assert len(session.output) <= MOST_OUTPUT
    assert record_is_begun(session.tail)
    if not talk.held:
        assert session.tail == b""
        assert talk.received == talk.sent


def record_is_begun(tail):
    return len(tail) < 5 or len(tail) < record_size(tail)


def hand_over(talk):
    """The kernel is told the keys that the client has, and the numbers of the records that are next."""
    session = talk.session
    size = talk.engine.derive_keys(session)
    send, receive = (tlskeys.Direction.of_info(bytes(session.keys[start:start + size]))
                     for start in (0, ktls.INFO_SIZE))
    assert (receive.key, receive.iv, receive.sequence) == (talk.client.key, talk.client.iv, session.sequences[1])
    assert (send.key, send.iv, send.sequence) == (talk.server.key, talk.server.iv, session.sequences[0])
    assert receive.open(talk.client.seal(b"next")) == (b"next", APPLICATION_DATA)
    assert talk.peer.read(talk.take_output() + send.seal(b"answer")) == b"answer"
    talk.engine.hand_over(session)


def say_goodbye(talk):
    """The last words are whole records, of which a client makes an end."""
    session = talk.session
    said = talk.engine.end(session)
    assert split_records(said)[1] == b""
    with contextlib.suppress(ssl.SSLError):             # an alert
        assert talk.peer.read(said) == b""
        assert talk.peer.at_end or session.broken


def tls_seeds():
    step = {function.__name__: number for number, function in enumerate(STEPS)}
    whole = [("send_data", 5), ("send_all", 0), ("hear", 3)]
    plans = ([], whole[:2], whole, [("send_data", 250), ("send_some", 3), ("send_some", 99), ("hear", 200)],
             [("send_data", 9), ("close", 0)], [("new_keys", 1), *whole, ("new_keys", 4), *whole],
             [("send_data", 9), ("spoil", 77)], [("send_noise", 0x7B)], [*whole, ("send_odd", 0xE2)],
             [("send_data", 0), ("send_data", 1), ("send_some", 101), ("warn", 0), *whole],
             [("send_data", 1), ("drop", 1)], [("warn", 0)] * 6, [*[("warn", 0)] * 4, ("close", 0)],
             [("send_odd", 0x60)])
    for flags, plan in itertools.product(range(4), plans):
        yield bytes((flags, 255 if flags < 2 else flags * 20)) + bytes(
            byte for name, argument in plan for byte in (step[name], argument))


# --- a handshake that is none

def hello(data):
    """Any bytes from the first one on: an alert and an end, or silence until there are more; no handshake is done."""
    made, other = engine()
    size, words = 1 + (data[0] if data else 0) * 8, data[1:]
    session = made.start(True)
    try:
        for piece in pieces_of(words, size):
            assert made.handshake(session, piece) == b""
        assert not session.established
    except TlsError as error:
        assert str(error).isprintable()
        assert session.broken
    check_answer(session, words)
    assert made.end(session) == session.output
    made.free(session)
    assert session.secrets is None
    assert other.works(), "the other session has been harmed"
    assert made.openssl.alive == {other.session.ssl.value}


def check_answer(session, words):
    """Whole records; an alert only where all is over, and no handshake with what is no TLS at all."""
    records = tlskeys.split(session.output)
    assert all(record[0] in (tlskeys.CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA) for record in records)
    assert len(session.output) < 1 << 14
    if not session.broken:
        assert not any(record[0] == ALERT for record in records)
    if words[:1] not in (b"", b"\x16", b"\x80"):
        assert not any(record[0] == HANDSHAKE for record in records)


def hello_seeds():
    for version in VERSIONS:
        said = Peer(ClientContext(version, alpn=("http/1.1",)), "a.example.org").handshake()
        yield b"\xff" + said
        yield b"\5" + said[:100]
    yield from (b"\1GET / HTTP/1.1\r\n\r\n", b"\1\x15\3\1\0\2\2\x28", b"\1\x80\x2e\1\0\2", b"\1\x16\3\1\0\0", b"\1",
                b"\0\x17\3\3\0\0")


