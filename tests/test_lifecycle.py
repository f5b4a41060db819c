"""From ready line to exit: listening, draining, signals, workers."""

import os
import re
import signal
import socket
import tarfile
from pathlib import Path

import pytest
from support import FILES, MODES, Client, build_tar, noise, request, wait_until

HUGE = noise(24 << 20, seed=5)


@pytest.fixture(scope="module")
def huge_site(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("huge") / "huge.tar", {"huge.bin": HUGE, "next": b"the next one"})


def refused(port):
    """True once nothing listens on that port any more."""
    try:
        Client(("127.0.0.1", port)).close()
    except ConnectionError:
        return True
    return False


def running(pid):
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- ready ---------------------------------------------------------------------------------------------------------


def test_one_line_says_what_is_served_and_where_and_another_what_is_given_up(start, tmp_path):
    server = start(build_tar(tmp_path / "site.tar", {"a": b"1", "b": b"22", "c/d": b"333"}))
    assert re.search(r"\b3 files\b", server.ready_line)
    assert re.search(r"\b\d+([.,]\d+)? ?(ms|s)\b", server.ready_line), "no start-up time"
    server.signal()
    assert re.fullmatch("tarweb: (not )?locked down.*\n", server.wait()), "more than two lines on stdout"
    assert server.stderr() == ""


def test_what_is_not_served_is_reported(start, tmp_path):
    tar = build_tar(tmp_path / "site.tar", {"a": b"1"}, [("pipe", "", tarfile.FIFOTYPE), ("null", "", tarfile.CHRTYPE)])
    server = start(tar)
    assert server.fetch("/pipe").status == 404
    assert server.fetch("/null").status == 404
    said = (server.ready_line + server.stderr()).lower()
    assert "not served" in said
    assert re.search(r"\b1 fifo\b", said)
    assert re.search(r"\b1 (character )?device\b", said)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_both_address_families(start, site):
    server = start(site, listen="[::]:0")
    for host in ("127.0.0.1", "::1"):
        with Client((host, server.port)) as client:
            assert client.ask("/next").body == FILES["next"], host


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6_alone(start, site):
    server = start(site, listen="[::1]:0")
    assert "[::1]" in server.ready_line
    with Client(("::1", server.port)) as client:
        assert client.ask("/next").body == FILES["next"]
    assert refused(server.port), "reached over IPv4 although only ::1 was asked for"


def test_without_flags_it_listens_on_8080(start, site):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", 8080))
        except OSError:
            pytest.skip("port 8080 is taken by something else")
    server = start(site, listen=None)
    assert server.port == 8080
    hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
    for host in hosts:
        with Client((host, 8080)) as client:
            assert client.ask("/next").body == FILES["next"]


def test_a_port_is_free_again_at_once(start, site):
    first = start(site)
    assert first.fetch("/next").status == 200
    first.stop()
    second = start(site, listen=f"127.0.0.1:{first.port}")
    assert second.fetch("/next").status == 200


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", MODES)
def test_an_idle_server_ends_at_once(start, site, mode, number):
    server = start(site, *MODES[mode], "--drain", "60")
    with server.connect() as idle, server.connect():
        assert idle.ask("/next").status == 200
        server.signal(number)
        server.wait(10)
        assert idle.at_end()


@pytest.mark.parametrize("mode", MODES)
def test_a_download_in_flight_is_finished_first(start, huge_site, mode):
    server = start(huge_site, *MODES[mode], "--drain", "60")
    with server.connect(rcvbuf=32_768) as client:
        client.send(request("/huge.bin"))
        client.pending = client.sock.recv(1000)
        server.signal()
        wait_until(lambda: refused(server.port))
        assert server.process.poll() is None, "did not wait for the download"
        assert client.response().body == HUGE
        assert client.at_end()
        server.wait(10)


def test_what_was_asked_behind_a_download_is_answered_too(start, huge_site):
    server = start(huge_site, "--drain", "60")
    with server.connect(rcvbuf=32_768) as client:
        client.send(request("/huge.bin") + request("/nothing"))
        client.pending = client.sock.recv(1000)
        server.signal()
        wait_until(lambda: refused(server.port))
        assert client.response().body == HUGE
        last = client.response()
        assert (last.status, last.headers["connection"]) == (404, "close")
        assert client.at_end()
        server.wait(10)


def test_draining_ends_even_when_a_client_does_not_read(start, huge_site):
    server = start(huge_site, "--drain", "1", "--min-rate", "1")
    with server.connect(rcvbuf=32_768) as client:
        client.send(request("/huge.bin"))
        client.pending = client.sock.recv(1000)
        server.signal()
        server.wait(15)


def test_half_a_request_does_not_delay_the_end_beyond_the_drain(start, site):
    server = start(site, "--drain", "1", "--header-timeout", "60")
    with server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nHost:")
        server.signal()
        server.wait(15)


# --- workers -------------------------------------------------------------------------------------------------------


def test_workers_serve_and_all_end(start, site):
    server = start(site, "--threads", "3")
    workers = server.workers
    assert len(workers) == 3
    for i in range(60):
        assert server.fetch(f"/n/{i:03}.txt").body == FILES[f"n/{i:03}.txt"]
    server.signal()
    server.wait()
    wait_until(lambda: not any(running(worker) for worker in workers))
    wait_until(lambda: refused(server.port))


def test_interrupt_from_the_keyboard_reaches_every_worker_only_once(start, site):
    """A terminal sends SIGINT to the whole process group: parent and workers get it at the same moment."""
    server = start(site, "--threads", "3")
    workers = server.workers
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    server.signal(signal.SIGINT)
    server.wait()
    wait_until(lambda: not any(running(worker) for worker in workers))
