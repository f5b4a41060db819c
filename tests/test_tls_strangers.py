"""Whoever does not complete a handshake: plain HTTP, other protocols, noise, and those who stop halfway."""

import contextlib
import random
import re

import pytest
from support import FILES, noise, request
from tlsclient import ALERT, ALERTS, HANDSHAKE, VERSIONS, Truncated, client_hello, records

FUZZED = 2500

# --- plain HTTP ----------------------------------------------------------------------------------------------------

PLAIN = {
    "GET": request("/next"),
    "POST": request("/next", "POST", body=b"12345", content_length=5),
    "OPTIONS": b"OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n",
    "PUT": request("/next", "PUT", content_length=0),
    "DELETE": request("/next", "DELETE"),
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "only the method": b"GET /",
    "a long request": request("/next", x_padding="p" * 15_000),
    "a body": request("/next", "POST", body=bytes(20_000), content_length=20_000),
    "a pipeline": request("/next") * 100,
    "absolute-form": b"GET http://t/next HTTP/1.1\r\nHost: t\r\n\r\n",
}


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "byte by byte"])
def test_plain_http_is_told_about_https(tls_server, case, bytewise):
    """All that the client sends is taken, so that no reset overtakes the response."""
    raw = PLAIN[case]
    with tls_server.connect_raw() as client:
        client.send(*([raw[i:i + 1] for i in range(len(raw))] if bytewise else [raw]))
        response = client.response()
        assert (response.status, response.closes) == (400, True)
        assert response["Content-Type"].startswith("text/plain")
        assert re.search(rb"HTTPS", response.body, re.I)
        assert client.at_end()


def test_plain_http_head_gets_no_body(tls_server):
    with tls_server.connect_raw() as client:
        client.send(request("/next", "HEAD"))
        assert client.response("HEAD").status == 400


# --- what is no TLS at all -----------------------------------------------------------------------------------------

NO_TLS = {
    "SSL 2": b"\x80\x22\1\0\2\0\x09\0\0\0\x10\1\0\x80\7\0\xc0\3\0\x80" + bytes(16),
    "SSH": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "SMTP": b"EHLO example.com\r\n",
    "PROXY v2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\1\x7f\0\0\1\xd0\0\1\xbb",
    "line ends": b"\r\n\r\n\r\n\r\n",
    "zeros": bytes(100),
    "noise": b"\xee" + noise(1000),
    "a lower-case method": b"get / http/1.1\r\n\r\n",
    "a record of version 0": b"\x16\0\0\0\x10" + bytes(16),
    "an endless record": b"\x16\3\1\xff\xff" + bytes(100),
    "an empty record": b"\x16\3\1\0\0" * 50,
    "a heartbeat": b"\x18\3\3\0\3\1\x40\0",
    "application data first": b"\x17\3\3\0\x20" + noise(32),
    "ChangeCipherSpec first": b"\x14\3\3\0\1\1",
    "an alert first": b"\x15\3\3\0\2\2\x28",
    "close_notify first": b"\x15\3\3\0\2\1\0",
    "a ServerHello": b"\x16\3\3\0\x2a\2\0\0\x26\3\3" + bytes(36),
    "a Finished": b"\x16\3\3\0\x24\x14\0\0\x20" + bytes(32),
    "a handshake message of 16 MB": b"\x16\3\1\0\x10\1\xff\xff\xff" + bytes(12),
    "an empty ClientHello": b"\x16\3\1\0\4\1\0\0\0",
    "a heartbeat within a record of TLS 1.0": b"\x18\3\1\0\3\1\xff\xff",
}


def test_other_protocols_are_sent_away(start_tls, site):
    """With an alert or without a word, and counted; and somebody else's connection is not touched."""
    server = start_tls(site, "--header-timeout", "60")
    failed = 0
    with server.connect() as other:
        for case, raw in NO_TLS.items():
            with server.connect_raw() as client:
                client.send(raw)
                client.half_close()
                said = client.rest()
            failed += no_http(said)
            assert not no_http(said) or {kind for kind, _ in records(said)} <= {ALERT}, case
            assert other.ask("/next").body == FILES["next"], case
    assert server.ended().failed == failed > 15


def no_http(said):
    """False for what answers plain HTTP, which is no failed handshake."""
    return not said.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(("case", "alert"), [
    ("an endless record", "record_overflow"), ("application data first", "unexpected_message"),
    ("ChangeCipherSpec first", "unexpected_message"), ("a ServerHello", "unexpected_message"),
    ("a Finished", "unexpected_message"), ("a handshake message of 16 MB", "illegal_parameter"),
    ("an empty ClientHello", "decode_error"),
])
def test_the_alert_fits(tls_server, case, alert):
    """The client keeps its side open: the server ends it by itself, and at once."""
    with tls_server.connect_raw() as client:
        client.send(NO_TLS[case])
        assert records(client.rest()) == [(ALERT, bytes([2, ALERTS[alert]]))]


def test_a_client_that_goes_at_once_is_not_worth_a_word(start_tls, site):
    server = start_tls(site)
    for _ in range(20):
        server.connect_raw().close()
        server.connect_raw().reset()
    assert server.fetch("/next").status == 200
    server.stop()
    assert "Traceback" not in server.stderr()
    assert len(server.stderr().splitlines()) == 2, "more than the first line and the last"


# --- halfway -------------------------------------------------------------------------------------------------------


def test_half_a_handshake_has_a_deadline(start_tls, site):
    """Wherever it stops, the connection is closed without a word when its time is over."""
    server = start_tls(site, "--header-timeout", "1", "--keepalive-timeout", "60")
    hello = {version: client_hello(server.context_of(version=version)) for version in VERSIONS}
    silent = [b"", hello["1.3"][:1], hello["1.3"][:5], hello["1.3"][:100], hello["1.3"][:-1]]
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(server.connect())
        assert other.ask("/next").status == 200
        clients = [stack.enter_context(server.connect_raw()) for _ in silent]
        for client, start in zip(clients, silent, strict=True):
            client.send(start)
        old = stack.enter_context(server.connect_raw())
        old.send(hello["1.2"])
        new = stack.enter_context(server.connect(server.context_of(version="1.3"), hold=True))
        assert [client.rest() for client in clients] == [b""] * len(silent)
        assert {kind for kind, _ in records(old.rest())} == {HANDSHAKE}
        with pytest.raises(Truncated):
            new.sock.recv(1)
        assert other.ask("/next").body == FILES["next"]
    assert server.ended().failed == len(silent) + 2


def test_a_trickle_of_bytes_does_not_move_the_deadline(start_tls, site):
    server = start_tls(site, "--header-timeout", "1")
    hello = client_hello(server.context)
    with server.connect_raw() as client:
        for i in range(len(hello)):
            if client.readable(0.05):
                break
            client.send(hello[i:i + 1])
        assert i < 400, "twenty seconds of single bytes, and still no end"
        assert client.rest() == b""  # or a reset: one more byte may meet the close, and nothing is owed


def test_half_handshakes_do_not_keep_others_out(start_tls, site):
    """They take places like anyone, and lose them like anyone: by the deadline, if not before."""
    server = start_tls(site, "--header-timeout", "1", "--max-connections", "10")
    hello = client_hello(server.context)
    squatters = [server.connect_raw() for _ in range(15)]
    for client in squatters:
        client.send(hello[:50])
    assert server.fetch("/next").body == FILES["next"]
    for client in squatters:
        client.close()


# --- noise ---------------------------------------------------------------------------------------------------------


def mutations(hello, choose):
    """Damaged copies of a ClientHello without end, each in another way; lengths in records are mostly kept right."""
    while True:
        damaged = bytearray(hello)
        for _ in range(choose.randint(1, 4)):
            at = choose.randrange(len(damaged))
            kind = choose.randrange(6)
            if kind == 0:
                damaged[at] ^= 1 << choose.randrange(8)
            elif kind == 1:
                damaged[at] = choose.choice((0, 1, 127, 128, 255))
            elif kind == 2:
                del damaged[at:at + choose.randint(1, 20)]
            elif kind == 3:
                damaged[at:at] = choose.randbytes(choose.randint(1, 20))
            elif kind == 4:
                other = choose.randrange(len(damaged))
                damaged[at:at] = damaged[other:other + choose.randint(1, 40)]
            else:
                damaged[at:] = choose.randbytes(choose.randint(0, 40))
            damaged = damaged or bytearray(b"\x16")
        if choose.random() < 0.8 and len(damaged) > 9:
            damaged[:1] = b"\x16"
            damaged[3:5] = (len(damaged) - 5).to_bytes(2)
            damaged[5:9] = b"\1" + (len(damaged) - 9).to_bytes(3)
        yield bytes(damaged)


def test_thousands_of_damaged_client_hellos(start_tls, site):
    """Each one is refused or comes to nothing, and is counted; one who does it right is served all the while."""
    server = start_tls(site, "-v", "debug")
    choose = random.Random(2026)
    hellos = [client_hello(server.context_of(version=version, alpn=["h2", "http/1.1"]), name="localhost")
              for version in (*VERSIONS, None)]
    sources = [mutations(hello, choose) for hello in hellos]
    failed = 0
    with server.connect() as other:
        for i in range(FUZZED):
            with server.connect_raw() as client:
                client.send(next(sources[i % 3]))
                client.half_close()
                said = client.rest()
            failed += no_http(said)
            assert not no_http(said) or len(records(said)) < 10      # whole records, and none of HTTP
            if i % 50 == 0:
                assert other.ask("/next").body == FILES["next"]
                assert server.fetch("/n/001.txt").body == FILES["n/001.txt"]
    assert server.fetch("/large.bin").body == FILES["large.bin"]
    counts = server.ended()
    assert counts.failed == failed > FUZZED * 0.9
    assert len(re.findall("^tarweb: handshake failed: ", server.stderr(), re.M)) == failed


def test_noise_in_the_middle_of_a_handshake(start_tls, site):
    """After a good ClientHello, whatever: it never gets further."""
    server = start_tls(site)
    choose = random.Random(2027)
    hellos = [client_hello(server.context_of(version=version)) for version in VERSIONS]
    tries = 400
    with server.connect() as other:
        for i in range(tries):
            body = choose.randbytes(choose.randint(1, 100))
            kind = choose.choice((20, 21, 22, 23, 23, 24))
            with server.connect_raw() as client:
                client.send(hellos[i % 2] + bytes([kind, 3, 3]) + len(body).to_bytes(2) + body)
                client.half_close()
                client.rest()
            if i % 50 == 0:
                assert other.ask("/next").body == FILES["next"]
    assert server.ended().failed == tries
