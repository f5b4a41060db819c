"""The steady state over TLS: what connections, requests and handshakes leave behind in a server, which is nothing."""

import shutil
import ssl

import pytest
from support import FILES, ROOT, request
from test_steady import BLOCKS, COUNTING, blocks, load
from tlsclient import VERSIONS, alert_of, client_hello

each_version = pytest.mark.parametrize("version", VERSIONS)
needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
IDLE = 300
EACH = 64 << 10         # bytes of memory that an idle connection may take
ROUNDS = 60            # of connections in WAYS
LEAK = 1 << 20          # bytes: less than ROUNDS sessions of OpenSSL's that are not freed would take


@needs_wrk
def test_nothing_grows_under_load(start_tls, site):
    server = start_tls(site, program=("-c", COUNTING, str(ROOT)))
    load(server, 1)
    before = blocks(server, 1), server.anonymous_memory()
    answered = load(server, 2)
    after = blocks(server, 1), server.anonymous_memory()
    assert after[0] - before[0] <= BLOCKS < answered
    assert after[1] - before[1] < LEAK


@each_version
def test_idle_connections_are_small(start_tls, site, version):
    """Each has been served a large file, and so has had all the buffers that it could need."""
    server = start_tls(site)
    context = server.context_of(version=version)
    with server.connect(context) as client:
        assert client.ask("/large.bin").status == 200
    before = server.anonymous_memory()
    idle = [server.connect(context) for _ in range(IDLE)]
    for client in idle:
        assert client.ask("/random.bin").body == FILES["random.bin"]
    assert server.anonymous_memory() - before < IDLE * EACH
    for client in idle:
        client.close()


def resumption(server, context):
    with server.connect(context) as client:
        assert client.ask("/next").status == 200
        session = client.tls.session
    with server.connect(context, session=session) as client:
        assert client.ask("/next").status == 200


def without_tickets(server, context):
    """Of TLS 1.2, a server may keep the sessions of such clients."""
    context = server.context_of(version=context.maximum_version.name[-3:].replace("_", "."))
    context.options |= ssl.OP_NO_TICKET
    with server.connect(context) as client:
        assert client.ask("/next").status == 200


def failure(server, _):
    with server.connect_raw() as client:
        client.send(b"\x16\3\1\0\4\1\0\0\0")
        client.rest()


def half(server, context):
    with server.connect_raw() as client:
        client.send(client_hello(context))
        client.half_close()
        client.rest()


def broken(server, context):
    with server.connect(context) as client:
        sealed = client.sock.encrypt(request("/next"))
        client.sock.raw.sendall(sealed[:-1] + bytes([sealed[-1] ^ 1]))
        assert alert_of(client) == "bad_record_mac"


def reset(server, context):
    client = server.connect(context)
    client.send(request("/random.bin"))
    client.reset()


def plain_http(server, _):
    with server.connect_raw() as client:
        client.send(request("/next"))
        assert client.response().status == 400


WAYS = [resumption, without_tickets, failure, half, broken, reset, plain_http]


@each_version
def test_connections_leave_nothing_behind(start_tls, site, version):
    """However they end."""
    server = start_tls(site, program=("-c", COUNTING, str(ROOT)))
    context = server.context_of(version=version)

    def rounds(count):
        for _ in range(count):
            for way in WAYS:
                way(server, context)
        return blocks(server, 1), server.anonymous_memory()

    rounds(ROUNDS)                  # until all caches and free lists are full
    before, after = rounds(ROUNDS), rounds(ROUNDS)
    assert after[0] - before[0] < BLOCKS
    assert after[1] - before[1] < LEAK
