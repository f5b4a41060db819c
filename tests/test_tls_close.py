"""How a connection ends: close_notify from the server where it is whole, none where it was cut off; and the client's.

Client.at_end() and Client.rest() raise Truncated here if the server closes without close_notify.
"""

import itertools
import os
import shutil
import signal

import pytest
from support import FILES, build_tar, noise, request, wait_until
from tlsclient import VERSIONS, Truncated, client_hello

each_version = pytest.mark.parametrize("version", VERSIONS)
HUGE = noise(24 << 20, seed=9)
LAST_WORDS = ["next"], ["next", "n/001.txt"], ["large.bin"], ["large.bin", "next"]
NO_HURRY = ("--header-timeout", "60", "--keepalive-timeout", "60")


@pytest.fixture(scope="module")
def huge_site(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("huge") / "huge.tar", {"huge.bin": HUGE, "next": b"the next one"})


def stalled(server, **options):
    """A client in the middle of a download that it does not read any more."""
    client = server.connect(rcvbuf=16_384, **options)
    client.send(request("/huge.bin"))
    client.pending = client.sock.recv(1000)
    assert client.pending.startswith(b"HTTP/1.1 200 ")
    return client


# --- the server's end ----------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("target", ["/next", "/nowhere", "/large.bin", "/%zz"])
def test_after_the_last_response(tls_server, version, target):
    with tls_server.connect(tls_server.context_of(version=version)) as client:
        response = client.ask(target, connection="close")
        assert response.closes
        assert client.at_end()


def test_after_a_response_that_fills_every_buffer(start_tls, huge_site):
    """When the last of it is sent, there is hardly room for more on the way to a client that reads slowly."""
    server = start_tls(huge_site)
    clients = [server.connect(rcvbuf=size) for size in (2_304, 4_096, 16_384, 65_536)]
    for client in clients:
        client.send(request("/huge.bin", connection="close"))
    for client in clients:
        assert client.response().body == HUGE
        assert client.at_end()
        client.close()


def test_after_a_time_of_silence(start_tls, site):
    """Of one client that was served, of one that never asked, and of one that did not finish asking."""
    server = start_tls(site, "--header-timeout", "1", "--keepalive-timeout", "1")
    with server.connect() as served, server.connect() as silent, server.connect() as halfway:
        assert served.ask("/next").status == 200
        halfway.send(b"GET / HT")
        response = halfway.response()
        assert (response.status, response.closes) == (408, True)
        for client in (served, silent, halfway):
            assert client.at_end()


def test_when_the_server_stops(start_tls, huge_site):
    """An idle connection at once, a busy one after its response."""
    server = start_tls(huge_site, *NO_HURRY, "--drain", "60")
    with server.connect() as idle, server.connect() as silent:
        assert idle.ask("/next").status == 200
        busy = stalled(server)
        server.signal()
        assert idle.at_end()
        assert silent.at_end()
        assert busy.response().body == HUGE
        assert busy.at_end()
        busy.close()
        server.wait(10)


def test_when_its_place_is_needed(start_tls, site):
    server = start_tls(site, *NO_HURRY, "--max-connections", "2")
    with server.connect() as first, server.connect() as second:
        assert first.ask("/next").status == second.ask("/next").status == 200
        with server.connect() as third:
            assert third.ask("/next").status == 200
            wait_until(lambda: first.readable(0) or second.readable(0))
            given_up = first if first.readable(0) else second
            assert given_up.at_end()


# --- no clean end --------------------------------------------------------------------------------------------------


def test_a_response_cut_off_by_the_end_of_the_server(start_tls, huge_site):
    server = start_tls(huge_site, *NO_HURRY, "--drain", "1", "--min-rate", "1")
    clients = [stalled(server, context=server.context_of(version=version)) for version in VERSIONS]
    server.signal()
    server.wait(15)
    for client in clients:
        assert len(client.cut_off()) < len(HUGE)
        client.close()


def test_a_response_cut_off_because_nobody_reads_it(start_tls, huge_site):
    """Seen by a place becoming free: the next client is answered without this one having gone."""
    flags = *NO_HURRY, "--max-connections", "1", "--min-rate", "1000000"
    servers = {version: start_tls(huge_site, *flags) for version in VERSIONS}
    dead = [stalled(server, context=server.context_of(version=version)) for version, server in servers.items()]
    for server in servers.values():
        assert server.fetch("/next").body == b"the next one"
    for client in dead:
        assert len(client.cut_off()) < len(HUGE)
        client.close()


@each_version
@pytest.mark.parametrize("target", ["/random.bin", "/n/001.txt"])
def test_a_response_whose_file_has_been_cut_short(start_tls, site, tmp_path, version, target):
    """Of the archive nothing is left when it is asked for: the head may still come, the end of the body never."""
    tar = shutil.copy(site, tmp_path / "cut.tar")
    server = start_tls(tar)
    os.truncate(tar, 4096)
    with server.connect(server.context_of(version=version)) as client:
        client.send(request(target))
        assert len(client.cut_off()) < len(FILES[target[1:]])
    assert server.fetch("/dir").status == 301      # of which nothing is in the archive


def test_half_a_handshake_does_not_delay_the_end_beyond_the_drain(start_tls, site):
    server = start_tls(site, *NO_HURRY, "--drain", "1")
    with server.connect_raw() as client:
        client.send(client_hello(server.context))
        assert client.sock.recv(1 << 16)
        server.signal()
        server.wait(15)


# --- the client's end ----------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("fin", [False, True], ids=["close_notify", "close_notify and FIN"])
def test_what_was_asked_before_close_notify_is_answered(start_tls, site, version, fin):
    server = start_tls(site)
    with server.connect(server.context_of(version=version)) as client:
        client.send(request("/next") + request("/large.bin") + request("/n/003.txt"))
        client.half_close() if fin else client.sock.close_notify()
        for name in ("next", "large.bin", "n/003.txt"):
            assert client.response().body == FILES[name]
        assert client.at_end()
    assert server.ended().truncated == 0


@each_version
@pytest.mark.parametrize("fin", [False, True], ids=["close_notify", "close_notify and FIN"])
def test_what_was_asked_in_the_same_segment_as_close_notify(start_tls, site, version, fin):
    """On a new connection, and on one that was served before; and nobody else is disturbed."""
    server = start_tls(site)
    context = server.context_of(version=version)
    with server.connect(context) as other:
        for served, names in itertools.product((0, 1, 2) * 2, LAST_WORDS):
            with server.connect(context) as client:
                for _ in range(served):
                    assert client.ask("/next").status == 200
                client.sock.say_last(b"".join(request("/" + name) for name in names))
                if fin:
                    client.truncate()
                for name in names:
                    assert client.response().body == FILES[name]
                assert client.at_end()
            assert other.ask("/next").body == FILES["next"]
        other.half_close()
        assert other.at_end()
    assert server.ended().truncated == 0


@each_version
@pytest.mark.parametrize("asked", [b"", b"GET / HTTP/1.1\r\nHos"], ids=["nothing", "half a request"])
def test_close_notify_of_an_idle_client_is_answered(start_tls, site, version, asked):
    server = start_tls(site, *NO_HURRY)
    with server.connect(server.context_of(version=version)) as client:
        assert client.ask("/next").status == 200
        client.send(asked)
        client.sock.close_notify()
        assert client.at_end()
    assert server.ended().truncated == 0


@each_version
def test_a_fin_without_close_notify_is_counted_and_what_was_asked_is_answered(start_tls, site, version):
    server = start_tls(site, "-v", "debug")
    context = server.context_of(version=version)
    with server.connect(context) as idle, server.connect(context) as busy, server.connect(context) as halfway:
        assert idle.ask("/next").status == 200
        idle.truncate()
        busy.send(request("/large.bin") + request("/next"))
        busy.truncate()
        assert busy.response().body == FILES["large.bin"]
        assert busy.response().body == FILES["next"]
        halfway.send(b"GET / HT")
        halfway.truncate()
        for client in (idle, busy, halfway):
            assert client.at_end()
    assert server.ended().truncated == 3


def test_a_truncated_record_is_no_request(start_tls, site):
    """All but the last byte of a record, then a FIN: what is in it was never vouched for."""
    server = start_tls(site)
    with server.connect() as client:
        client.sock.raw.sendall(client.sock.encrypt(request("/next"))[:-1])
        client.truncate()
        assert client.rest() == b""
    assert server.ended().truncated == 1


def test_nothing_after_close_notify_counts(start_tls, site):
    """What stands behind a close_notify was never said (RFC 8446 section 6.1)."""
    server = start_tls(site)
    with server.connect() as client:
        client.send(request("/next"))
        client.sock.close_notify()
        client.sock.raw.sendall(b"\x17\3\3\0\x20" + noise(32))
        assert client.response().body == FILES["next"]
        assert client.at_end()
    assert server.ended().truncated == 0


@each_version
def test_a_reset_disturbs_nobody(start_tls, huge_site, version):
    server = start_tls(huge_site)
    context = server.context_of(version=version)
    with server.connect(context) as other:
        for _ in range(20):
            stalled(server, context=context).reset()
            server.connect(context).reset()
            assert other.ask("/next").body == b"the next one"


def test_truncated_is_what_the_tests_would_see(start_tls, site):
    """That an end without close_notify is told from one with it, lest all of the above prove nothing."""
    server = start_tls(site, *NO_HURRY)
    with server.connect() as client:
        assert client.ask("/next").status == 200
        for worker in server.workers:
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(Truncated):
            client.at_end()
