"""--max-per-ip, from outside: who is counted as whom, what happens to those beyond the limit, and that room comes back.

All of 127.0.0.0/8 is this machine, so a test can come from as many addresses as it likes.
"""

import contextlib
import socket

import pytest
from support import PATIENCE, request, wait_until
from test_front import FROM_HERE, metric, status_port, v1

STATUS = "--status", "127.0.0.1:0"


def come(server, source="127.0.0.1", first=b""):
    """A connection from an address; what its first request gets: "served", or "closed" at once."""
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE, source_address=(source, 0))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(first + request("/next"))
        if connection.recv(9, socket.MSG_WAITALL) == b"HTTP/1.1 ":
            return connection, "served"
    return connection, "closed"


@pytest.fixture
def visit(start, site):
    """visit(*flags) -> (the server, function as `come` that keeps connections open until the end of the test)."""
    with contextlib.ExitStack() as stack:
        def begin(*flags):
            server = start(site, *flags)

            def visitor(source="127.0.0.1", first=b""):
                connection, outcome = come(server, source, first)
                stack.enter_context(connection)
                return outcome
            return server, visitor
        yield begin


def test_p11_one_address_holds_so_many_connections_and_others_are_served(visit):
    server, visitor = visit("--max-per-ip", "3", *STATUS)
    port = status_port(server)
    assert [visitor() for _ in range(5)] == ["served"] * 3 + ["closed"] * 2
    assert [visitor("127.0.0.2") for _ in range(4)] == ["served"] * 3 + ["closed"]
    wait_until(lambda: metric(port, "connections_crowded_total") == 3)


def test_p11_the_limit_is_of_those_at_a_time(start, site):
    server = start(site, "--max-per-ip", "1")
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            connection.sendall(request("/next", connection="close"))
            assert b"".join(iter(lambda: connection.recv(4096), b"")).startswith(b"HTTP/1.1 200 ")


def test_p11_behind_a_proxy_it_is_the_client_that_counts(visit):
    _, visitor = visit("--max-per-ip", "2", *FROM_HERE)
    assert [visitor(first=v1("192.0.2.1")) for _ in range(3)] == ["served", "served", "closed"]
    assert [visitor(first=v1("192.0.2.2")) for _ in range(3)] == ["served", "served", "closed"]
    assert [visitor(first=b"PROXY UNKNOWN\r\n") for _ in range(4)] == ["served"] * 4       # a proxy's own


def test_p11_of_ipv6_the_network_of_64_bits_counts(visit):
    _, visitor = visit("--max-per-ip", "2", *FROM_HERE)
    clients = "2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:1:ffff::3", "2001:db8:0:2::1"
    assert [visitor(first=v1(client, "2001:db8::ff")) for client in clients] == ["served", "served", "closed", "served"]


def test_p11_unix_sockets_have_no_address(start, site, tmp_path):
    path = tmp_path / "socket"
    start(site, "--max-per-ip", "1", "--listen", f"unix:{path}")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(PATIENCE)
            connection.connect(str(path))
            connection.sendall(request("/next"))
            assert connection.recv(9, socket.MSG_WAITALL) == b"HTTP/1.1 "


def test_p11_who_is_turned_away_over_tls_costs_no_handshake(start_tls, site):
    server = start_tls(site, "--max-per-ip", "1")
    address = "127.0.0.1", server.port
    with socket.create_connection(address), socket.create_connection(address, PATIENCE) as second:
        assert second.recv(1) == b""
    server.check()
