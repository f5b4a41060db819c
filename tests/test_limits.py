"""What a client may take: time, connections, patience. Each bound is a flag, and each is reached here."""

import time

import pytest
from support import FILES, Client, build_tar, noise, request

from acceptor import PACE, STALL

# Nothing else cuts a connection while one bound is tested.
NO_HURRY = ("--header-timeout", "60", "--keepalive-timeout", "60")
LARGE = noise(8 << 20, seed=3)


@pytest.fixture(scope="module")
def large_site(tmp_path_factory):
    """One file that is larger than what the kernel buffers between a server and a client that does not read."""
    return build_tar(tmp_path_factory.mktemp("large") / "large.tar", {
        "huge.bin": noise(32 << 20, seed=4), "large.bin": LARGE, "next": b"the next one"})


def stalled(server, target="/huge.bin"):
    """A client in the middle of a download: it has the head and some of the body, and then reads no more."""
    client = server.connect(rcvbuf=32_768)
    client.send(request(target))
    client.pending = client.sock.recv(1000)
    assert client.pending.startswith(b"HTTP/1.1 200 ")
    return client


# --- deadlines for a request ---------------------------------------------------------------------------------------


def test_an_idle_connection_is_closed_silently(start, site):
    server = start(site, "--keepalive-timeout", "1", "--header-timeout", "60")
    with server.connect() as client:
        assert client.ask("/next").status == 200
        begin = time.monotonic()
        assert client.at_end(), client.pending
        assert time.monotonic() - begin > 0.5


def test_a_connection_that_never_says_anything_is_closed_silently(start, site):
    server = start(site, "--keepalive-timeout", "1", "--header-timeout", "1")
    with server.connect() as client:
        assert client.at_end(), client.pending


@pytest.mark.parametrize("part", [b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: t\r\nX-A: 1\r\n",
                                  b"GET / HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n1234"])
def test_half_a_request_is_told_that_it_took_too_long(start, site, part):
    server = start(site, "--header-timeout", "1", "--keepalive-timeout", "60")
    with server.connect() as client:
        client.send(part)
        response = client.response()
        assert (response.status, response.closes) == (408, True)
        assert client.at_end()


def test_a_second_request_has_its_own_deadline(start, site):
    server = start(site, "--header-timeout", "1", "--keepalive-timeout", "60")
    with server.connect() as client:
        client.send(request("/next") + b"GET /n")
        assert client.response().status == 200
        assert client.response().status == 408
        assert client.at_end()


@pytest.mark.parametrize("lines", ["head", "body"])
def test_a_trickle_of_bytes_does_not_move_the_deadline(start, site, lines):
    server = start(site, "--header-timeout", "1", "--keepalive-timeout", "60")
    with server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\n" + (b"" if lines == "head" else b"Content-Length: 9999\r\n\r\n"))
        sent = 0
        while not client.readable(0.05):
            client.send(b"a")
            sent += 1
            assert sent < 400, "twenty seconds of single bytes, and still no end"
        assert client.response().status == 408
        assert client.at_end()


# --- slow and dead readers -----------------------------------------------------------------------------------------


def test_a_slow_but_steady_reader_gets_everything(start, large_site):
    """It takes longer than every deadline for a request: only its rate counts."""
    server = start(large_site, "--header-timeout", "1", "--keepalive-timeout", "1", "--min-rate", "100000")
    with server.connect(rcvbuf=65_536) as client:
        client.send(request("/large.bin", connection="close"))
        received, begin = bytearray(), time.monotonic()
        while piece := client.sock.recv(65_536):
            received += piece
            time.sleep(0.02)  # the slowness that is tested: 3 MB/s at the most
        assert time.monotonic() - begin > 2, "too fast to prove anything"
    assert received.endswith(LARGE)


def test_a_reader_that_stops_is_cut_off(start, large_site):
    """Seen by its places becoming free: the fifth client is answered without any of the four having gone."""
    server = start(large_site, *NO_HURRY, "--max-connections", "4", "--min-rate", "1000000")
    dead = [stalled(server) for _ in range(4)]
    with server.connect() as fifth:
        assert fifth.ask("/next").body == b"the next one"
    assert any(len(client.rest()) < 32 << 20 for client in dead)
    for client in dead:
        client.close()


# --- the number of connections -------------------------------------------------------------------------------------


def test_a_full_table_gives_up_the_longest_idle_connection(start, site):
    server = start(site, *NO_HURRY, "--max-connections", "4")
    idle = [server.connect() for _ in range(4)]
    for client in idle:
        assert client.ask("/next").status == 200
    time.sleep(2.5)  # so that a clock of whole seconds tells the second one from the others
    for client in (idle[0], idle[2], idle[3]):
        assert client.ask("/next").status == 200
    with server.connect() as fifth:
        assert fifth.ask("/next").body == FILES["next"]
        assert idle[1].at_end(), "the second one had been idle for the longest"
        for client in (idle[0], idle[2], idle[3], fifth):
            assert client.ask("/n/001.txt").body == FILES["n/001.txt"]
    for client in idle:
        client.close()


def test_busy_connections_are_not_given_up_and_newcomers_wait(start, large_site):
    server = start(large_site, *NO_HURRY, "--max-connections", "3", "--min-rate", "1")
    busy = [stalled(server) for _ in range(3)]
    with server.connect() as waiting:
        waiting.send(request("/next"))
        begin, pieces = time.monotonic(), {client: [client.pending] for client in busy}
        while time.monotonic() - begin < 2 * STALL:
            for client in busy:
                pieces[client].append(client.sock.recv(PACE))
            assert not waiting.readable(0.1), "served although every place was taken"
        while sum(map(len, pieces[busy[1]])) < 32 << 20:        # of its response; and the others read on
            for client in (busy[1], busy[0], busy[1], busy[2]):
                pieces[client].append(client.sock.recv(PACE))
        for client in busy:
            client.pending = b"".join(pieces[client])
        assert len(busy[1].response().body) == 32 << 20
        assert waiting.response().body == b"the next one"
        for client in (busy[0], busy[2]):
            assert len(client.response().body) == 32 << 20
    for client in busy:
        client.close()


def test_many_more_clients_than_places_are_all_served(start, site):
    server = start(site, *NO_HURRY, "--max-connections", "5")
    clients = [server.connect() for _ in range(60)]
    for client in clients:
        client.send(request("/n/042.txt", connection="close"))
    for client in clients:
        assert client.response().body == FILES["n/042.txt"]
        assert client.at_end()
        client.close()


def test_places_are_reused_for_a_long_time(start, site):
    """More connections than places many times over, ended in every way; each newcomer sees its own data alone."""
    server = start(site, *NO_HURRY, "--max-connections", "8")
    for i in range(400):
        client = Client(("127.0.0.1", server.port))
        name = f"n/{i % 200:03}.txt"
        client.send(request("/" + name) + request("/large.bin") * (i % 3))
        assert client.response().body == FILES[name]
        client.reset() if i % 2 else client.close()
    assert server.fetch("/large.bin").body == FILES["large.bin"]
