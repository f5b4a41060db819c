"""The end of a server, from outside: what is still answered, what is closed, what is waited for and how long."""

import contextlib
import os
import signal

import pytest
from support import FILES, Client, build_tar, noise, request, wait_until
from test_lifecycle import refused, running
from test_workers import connections_by_worker, holder, metrics, status_port

HUGE = noise(24 << 20, seed=5)
ENDING = signal.SIGTERM, signal.SIGQUIT, signal.SIGINT
each_ending = pytest.mark.parametrize("number", ENDING)


@pytest.fixture(scope="module")
def huge_site(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("huge") / "huge.tar", {"huge.bin": HUGE, "next": FILES["next"]})


def download(server):
    """A client that is being sent HUGE, and takes its time."""
    client = server.connect(rcvbuf=32_768)
    client.send(request("/huge.bin"))
    client.pending = client.sock.recv(1000)
    return client


def reads_to_its_end(client):
    with client:
        response = client.response()
        assert response.body == HUGE
        return client.at_end()


def is_cut_off(client):
    """Whether it gets less than Content-Length promises, and the end of the connection behind that."""
    with client:
        data = client.rest()
        assert f"Content-Length: {len(HUGE)}".encode() in data
        return len(data) < len(HUGE)


def wait_for_refusal(server):
    wait_until(lambda: refused(server.port))


def ask(port, target):
    """(status, body) from the status listener."""
    with Client(("127.0.0.1", port)) as client:
        client.send(request(target, connection="close"))
        response = client.response()
        return response.status, response.body.decode()


# --- what is answered, closed, finished ----------------------------------------------------------------------------


@each_ending
def test_the_end_of_all_kinds_of_connections(start, huge_site, number):
    server = start(huge_site, "--threads", "2", "--drain", "60")
    by_worker = connections_by_worker(server, 2).values()
    idle, asking = [clients[0] for clients in by_worker], [client for clients in by_worker for client in clients[1:]]
    for client in asking:
        client.send(request("/next")[:-2])
    downloads = [download(server) for _ in range(2)]
    server.signal(number)
    for client in idle:
        assert client.at_end()
    for client in asking:
        client.send(b"\r\n")
        response = client.response()
        assert (response.body, response["Connection"]) == (FILES["next"], "close")
        assert client.at_end()
    wait_for_refusal(server)
    assert server.process.poll() is None
    for client in downloads:
        assert reads_to_its_end(client)
    server.wait(10)
    assert server.stderr() == ""


def test_the_end_over_tls(start_tls, huge_site):
    """As above, and each connection ends with close_notify (or at_end would raise)."""
    server = start_tls(huge_site, "--drain", "60")
    idle, asking, reading = server.connect(), server.connect(), download(server)
    assert idle.ask("/next").body == FILES["next"]
    assert asking.ask("/next").body == FILES["next"]
    asking.send(request("/next")[:-2])
    server.signal()
    assert idle.at_end()
    asking.send(b"\r\n")
    response = asking.response()
    assert (response.body, response["Connection"]) == (FILES["next"], "close")
    assert asking.at_end()
    assert reads_to_its_end(reading)
    server.wait(10)


def test_a_first_request_that_is_on_its_way_is_answered(start, site):
    server = start(site, "--drain", "60")
    with server.connect() as client, server.connect() as idle:
        assert idle.ask("/next").status == 200
        wait_until(lambda: holder(server, client))
        server.signal()
        assert idle.at_end()
        client.send(request("/next"))
        response = client.response()
        assert (response.body, response["Connection"]) == (FILES["next"], "close")
        assert client.at_end()
    server.wait(10)


def test_what_is_not_finished_in_time_is_cut_off(start, huge_site):
    server = start(huge_site, "--threads", "2", "--drain", "1")
    clients = [download(server) for _ in range(4)]
    server.signal()
    server.wait(10)
    assert all(map(is_cut_off, clients))


def test_what_an_old_generation_sends_is_cut_off_too(start, huge_site):
    """A reload lets it take as long as it wants, the end does not."""
    server = start(huge_site, "--drain", "1")
    before, others = server.workers, [download(server)]
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: " in server.stderr())
    others.append(download(server))
    assert set(before) < set(server.workers)
    server.signal()
    server.wait(10)
    assert all(map(is_cut_off, others))
    assert not any(map(running, before))


@each_ending
def test_the_second_signal_ends_all_at_once(start, huge_site, number):
    server = start(huge_site, "--threads", "2", "--drain", "3600", "--min-rate", "1")
    client = download(server)
    server.signal()
    wait_for_refusal(server)        # also when the workers have not heard of the first signal yet
    assert server.process.poll() is None
    server.signal(number)
    server.wait(10)
    assert is_cut_off(client)


def test_a_reload_is_not_begun_at_the_end(start, huge_site):
    server = start(huge_site, "--drain", "60")
    workers, client = server.workers, download(server)
    server.signal()
    wait_for_refusal(server)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        server.process.send_signal(number)
    assert reads_to_its_end(client)
    server.wait(10)
    assert server.stderr() == ""
    assert not any(map(running, workers))


def test_the_signal_comes_to_the_workers_too(start, huge_site):
    """So it does by kill(1) with a process group, and by systemd with KillMode=control-group: that is one, not two."""
    server = start(huge_site, "--threads", "2", "--drain", "60")
    by_worker = connections_by_worker(server, 1).values()
    client = download(server)
    for worker in server.workers:
        os.kill(worker, signal.SIGTERM)
    assert all(idle.at_end() for clients in by_worker for idle in clients)
    server.signal()
    wait_for_refusal(server)
    assert reads_to_its_end(client)
    server.wait(10)


# --- readiness, and the lame duck ----------------------------------------------------------------------------------


def test_it_is_not_ready_while_it_drains(start, huge_site):
    server = start(huge_site, "--drain", "60", "--status", "127.0.0.1:0")
    port, client = status_port(server), download(server)
    assert ask(port, "/readyz") == (200, "ready\n")
    server.signal()
    wait_for_refusal(server)
    status, why = ask(port, "/readyz")
    assert (status, "stopping" in why) == (503, True)
    assert ask(port, "/healthz")[0] == 200
    found = metrics(port)
    assert (found["ready"], found["stopping"]) == (0, 1)
    assert reads_to_its_end(client)
    server.wait(10)
    wait_until(lambda: refused(port))


def test_a_lame_duck_serves_on_and_is_not_ready(start, huge_site):
    """Each response is the last of its connection, so a balancer's connections go elsewhere one by one."""
    server = start(huge_site, "--threads", "2", "--lame-duck", "2", "--drain", "60", "--status", "127.0.0.1:0")
    port = status_port(server)
    by_worker = connections_by_worker(server, 2, workers=2).values()
    assert ask(port, "/readyz") == (200, "ready\n")
    server.signal()
    wait_until(lambda: ask(port, "/readyz")[0] == 503)
    for client, *_ in by_worker:
        wait_until(lambda: client.ask("/next").closes)          # noqa: B023
        assert client.at_end()
    for _ in range(6):
        with server.connect() as client:
            response = client.ask("/next")
            assert (response.body, response["Connection"]) == (FILES["next"], "close")
            assert client.at_end()
    reading = download(server)
    for _, client, *_ in by_worker:
        assert client.at_end(), "idle connections are closed when the draining begins"
    wait_for_refusal(server)
    assert ask(port, "/healthz")[0] == 200
    assert reads_to_its_end(reading)
    server.wait(10)


def test_the_next_signals_cut_the_lame_duck_and_the_drain_short(start, huge_site):
    server = start(huge_site, "--lame-duck", "3600", "--drain", "3600", "--min-rate", "1",
                   "--status", "127.0.0.1:0")
    port, client = status_port(server), download(server)
    server.signal()
    wait_until(lambda: ask(port, "/readyz")[0] == 503)
    assert server.fetch("/next").status == 200
    server.signal()
    wait_for_refusal(server)
    assert server.process.poll() is None
    server.signal()
    server.wait(10)
    assert is_cut_off(client)


def test_a_lame_duck_goes_on_when_a_worker_dies(start, site):
    server = start(site, "--lame-duck", "3600", "--status", "127.0.0.1:0")
    port, worker = status_port(server), server.workers[0]
    server.signal()
    wait_until(lambda: ask(port, "/readyz")[0] == 503)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not running(worker))
    with server.connect() as client:
        response = client.ask("/next")
        assert (response.body, response["Connection"]) == (FILES["next"], "close")
    server.signal()
    server.wait(10)


# --- those that hang -----------------------------------------------------------------------------------------------


def test_a_worker_that_hangs_is_killed_in_the_end(start, huge_site):
    """The other one finishes what it sends."""
    server = start(huge_site, "--threads", "2", "--drain", "1")
    client = download(server)
    serving = holder(server, client)
    hanging, = set(server.workers) - {serving}
    os.kill(hanging, signal.SIGSTOP)
    server.signal()
    assert reads_to_its_end(client)
    wait_until(lambda: not running(serving))
    server.wait(20)
    assert not running(hanging)


def test_a_worker_that_hangs_does_not_hinder_a_reload(start, huge_site):
    server = start(huge_site, "--drain", "1")
    hanging, = server.workers
    os.kill(hanging, signal.SIGSTOP)
    try:
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded: generation 2 " in server.stderr())
        with contextlib.suppress(ConnectionError):      # the kernel may have given it to the one that hangs
            server.connect().close()
        assert server.fetch("/next").body == FILES["next"]
        server.signal()
        server.wait(20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(hanging, signal.SIGCONT)
