"""What happens on one connection over time: pipelines, bodies, half-closing, and errors that reach a busy client."""

import select
import threading

import pytest
from support import FILES, PATIENCE, request

NUMBERED = [name for name in FILES if name.startswith("n/")]


def test_a_pipeline_is_answered_in_order(mode_server):
    targets = NUMBERED * 3
    with mode_server.connect() as client:
        sender = threading.Thread(target=client.send, args=[b"".join(request("/" + name) for name in targets)])
        sender.start()
        for name in targets:
            assert client.response().body == FILES[name], name
        sender.join()
    mode_server.check()


def test_a_pipeline_of_large_and_small_files(mode_server):
    targets = ["large.bin", "next", "empty.txt", "random.bin", "large.bin", "n/007.txt"]
    with mode_server.connect() as client:
        client.send(b"".join(request("/" + name) for name in targets))
        for name in targets:
            assert client.response().body == FILES[name], name


def fill(client, raw, seconds=0.5):
    """Send until the socket has taken nothing for that long; return how many bytes went."""
    client.sock.setblocking(False)
    sent = 0
    while sent < len(raw) and select.select([], [client.sock], [], seconds)[1]:
        sent += client.sock.send(raw[sent:sent + 65_536])
    client.sock.settimeout(PATIENCE)
    return sent


def test_a_client_that_only_sends_is_held_back(start, site):
    """Neither requests nor responses pile up in the server, others are served, and nothing is lost in the end."""
    server = start(site)
    count, one = 12_000, request("/n/199.txt", x_padding="p" * 2000)
    pipeline = one * count
    with server.connect() as warm_up:
        for _ in range(50):
            warm_up.ask("/n/199.txt")
    before = server.anonymous_memory()
    with server.connect(rcvbuf=16_384, sndbuf=65_536) as client:
        sent = fill(client, pipeline)
        assert sent < len(pipeline), "the server took in every request without one response being read"
        assert server.anonymous_memory() - before < 8 << 20
        assert server.fetch("/next").body == FILES["next"]

        sender = threading.Thread(target=client.send, args=[pipeline[sent:]])
        sender.start()
        for _ in range(count):
            assert client.response().body == FILES["n/199.txt"]
        sender.join()


def test_many_clients_that_only_send_leave_room_for_others(start, site):
    server = start(site)
    greedy = [server.connect(rcvbuf=16_384) for _ in range(50)]
    for client in greedy:
        fill(client, request("/random.bin") * 2000, seconds=0.02)
    assert server.fetch("/large.bin").body == FILES["large.bin"]
    for client in greedy:
        client.reset()
    assert server.fetch("/next").body == FILES["next"]


def test_a_client_that_half_closes_gets_all_its_responses(mode_server):
    with mode_server.connect() as client:
        client.send(request("/next") + request("/large.bin") + request("/n/003.txt"))
        client.half_close()
        assert client.response().body == FILES["next"]
        assert client.response().body == FILES["large.bin"]
        assert client.response().body == FILES["n/003.txt"]
        assert client.at_end()


@pytest.mark.parametrize("part", [
    b"", b"\r\n", b"G", b"GET / HTTP/1.1\r\nHost: t\r\n", b"GET / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n12"])
def test_half_a_request_and_then_the_end(server, part):
    """There is no request to answer: the connection ends, with an error at the most."""
    with server.connect() as client:
        client.send(request("/next") + part)
        client.half_close()
        assert client.response().body == FILES["next"]
        rest = client.rest()
        assert rest == b"" or (part.strip() and rest.startswith(b"HTTP/1.1 4"))


def test_clients_that_vanish_do_no_harm(mode_server):
    for raw in (b"", b"GET / HT", request("/next"), request("/large.bin"), request("/large.bin") * 10):
        for _ in range(10):
            client = mode_server.connect()
            client.send(raw)
            client.reset()
    assert mode_server.fetch("/large.bin").body == FILES["large.bin"]
    mode_server.check()


# --- bodies nobody asked for ---------------------------------------------------------------------------------------


def chunked(body, size):
    pieces = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 4096, 60_000])
def test_a_small_body_on_get_is_drained(server, size):
    body = b"\r\nGET /large.bin HTTP/1.1\r\n\r\n".ljust(size)[:size]
    with server.connect() as client:
        client.send(request("/next", content_length=size, body=body) + request("/n/001.txt"))
        assert client.response().body == FILES["next"]
        assert client.response().body == FILES["n/001.txt"]
        client.send(request("/next", transfer_encoding="chunked", body=chunked(body, 1000)) + request("/n/002.txt"))
        assert client.response().body == FILES["next"]
        assert client.response().body == FILES["n/002.txt"]


def test_a_large_body_on_get_ends_the_connection_after_the_response(server):
    """The response does not wait for a body that will not be read."""
    with server.connect() as client:
        client.send(request("/next", content_length=5 << 20))
        response = client.response()
        assert (response.status, response.body, response.closes) == (200, FILES["next"], True)
        client.send(bytes(5 << 20))
        assert client.at_end()


def test_a_large_chunked_body_on_get_ends_the_connection(server):
    with server.connect() as client:
        client.send(request("/next", transfer_encoding="chunked", body=chunked(bytes(5 << 20), 10_000)))
        response = client.response()
        assert response.closes
        assert client.at_end()


@pytest.mark.parametrize("declared", ["content_length", "transfer_encoding"])
def test_an_error_reaches_a_client_that_goes_on_sending(mode_server, declared):
    """Lingering close: without it the kernel answers the unread bytes with a reset, and the response is lost."""
    body = bytes(5 << 20)
    if declared == "content_length":
        raw = request("/next", "POST", content_length=len(body), body=body)
    else:
        raw = request("/next", "POST", transfer_encoding="chunked", body=chunked(body, 4000))
    for _ in range(5):
        with mode_server.connect() as client:
            client.send(raw)
            assert client.response().status == 405
            assert client.at_end()


def test_garbage_without_end_is_answered_and_cut_off(server):
    with server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\nbad line\r\n" + bytes(1 << 20))
        assert client.response().status == 400
        assert client.at_end()


# --- Expect --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["100-continue", "100-Continue"])
def test_100_continue_comes_before_the_body(server, value):
    with server.connect() as client:
        client.send(request("/next", content_length=5, expect=value))
        interim = client.sock.recv(4096)
        while not interim.endswith(b"\r\n\r\n"):
            interim += client.sock.recv(4096)
        assert interim.startswith(b"HTTP/1.1 100 Continue\r\n")
        assert interim.count(b"\r\n\r\n") == 1, "the response came before the body"
        client.send(b"12345")
        response = client.response()
        assert (response.status, response.body, response.closes) == (200, FILES["next"], False)
        assert client.ask("/n/001.txt").body == FILES["n/001.txt"]


def test_no_100_continue_for_a_body_that_is_not_wanted(server):
    with server.connect() as client:
        client.send(request("/next", "POST", content_length=5, expect="100-continue"))
        response = client.response()
        assert (response.status, response.interim) == (405, [])


def test_no_100_continue_for_http_1_0(server):
    with server.connect() as client:
        raw = request("/next", content_length=5, expect="100-continue", body=b"12345")
        client.send(raw.replace(b"HTTP/1.1", b"HTTP/1.0"))
        response = client.response()
        assert (response.status, response.interim) == (200, [])


def test_100_continue_without_a_body_is_just_answered(server):
    with server.connect() as client:
        response = client.ask("/next", expect="100-continue")
        assert (response.status, response.body) == (200, FILES["next"])


def test_http_1_0_has_no_100_continue(server):
    with server.connect() as client:
        client.send(b"GET /next HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello")
        response = client.response()
        assert (response.status, response.interim) == (200, [])
