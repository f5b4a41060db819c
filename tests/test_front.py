"""Behind another server, from outside: PROXY headers from those who may send them, and connections passed as
descriptors. The bytes of headers, good and bad, are gone through one by one in test_proxy.py."""

import contextlib
import grp
import os
import re
import select
import signal
import socket
import stat
import struct
import threading
from pathlib import Path

import pytest
from support import FILES, PATIENCE, Client, build_tar, request, run_tarweb, wait_until
from tlsclient import HANDSHAKE, TlsClient

import proxy

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21                   # proxy-protocol.txt, section 2.2
TCP4, TCP6 = 0x11, 0x21


def v1(client, server="192.0.2.254"):
    kind = "TCP6" if ":" in client else "TCP4"
    return f"PROXY {kind} {client} {server} 56324 443\r\n".encode()


def v2(client, server="192.0.2.254", command=PROXY, more=b""):
    """`more`: TLVs."""
    family, kind = (socket.AF_INET6, TCP6) if ":" in client else (socket.AF_INET, TCP4)
    rest = b"".join(socket.inet_pton(family, address) for address in (client, server)) + struct.pack("!HH", 56324, 443)
    return SIGNATURE + struct.pack("!BBH", command, kind, len(rest + more)) + rest + more


PEER = "127.0.0.1"
HEADERS = {  # name -> (header, who it says the client is)
    "v1 TCP4": (v1("192.0.2.1"), "192.0.2.1"),
    "v1 TCP6": (v1("2001:db8::1", "2001:db8::2"), "2001:db8::1"),
    "v1 TCP6 of an IPv4 client": (v1("::ffff:192.0.2.2", "::ffff:192.0.2.254"), "192.0.2.2"),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", PEER),
    "v1 UNKNOWN and more": (b"PROXY UNKNOWN ffff:: ffff:: 65535 65535\r\n", PEER),
    "v2 TCP4": (v2("192.0.2.3"), "192.0.2.3"),
    "v2 TCP6": (v2("2001:db8::3", "2001:db8::2"), "2001:db8::3"),
    "v2 with TLVs": (v2("192.0.2.4", more=b"\x01\0\x02h2" + b"\x04\0\x64" + bytes(100)), "192.0.2.4"),
    "v2 LOCAL": (SIGNATURE + bytes([LOCAL, 0, 0, 0]), PEER),
    "v2 LOCAL with addresses": (v2("192.0.2.5", command=LOCAL), PEER),
    "v2 AF_UNSPEC": (SIGNATURE + bytes([PROXY, 0, 0, 0]), PEER),
}
WRONG = {
    "no header": request("/next"),
    "v1 in lower case": b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + request("/next"),
    "v1 of another family": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n" + request("/next"),
    "v1 with LF alone": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n" + request("/next"),
    "v1 without an end": b"PROXY UNKNOWN " + b"x" * 200,
    "v2 of version 3": SIGNATURE + bytes([0x31, TCP4, 0, 12]) + bytes(12) + request("/next"),
    "v2 with another signature": SIGNATURE[:-1] + b"\r" + v2("192.0.2.1")[12:] + request("/next"),
    "v2 too short for its addresses": SIGNATURE + bytes([PROXY, TCP4, 0, 11]) + bytes(11) + request("/next"),
    "v2 much too long": SIGNATURE + bytes([PROXY, TCP4, 255, 255]) + bytes(5000),
    "a ClientHello": bytes.fromhex("1603010200010001fc0303") + bytes(100),
}
WAYS = {  # in which a header and what follows it can arrive
    "one after the other": lambda header, then: [header, then],
    "byte by byte": lambda header, then: [bytes([byte]) for byte in header + then],
    "together": lambda header, then: [header + then],
    "with a part of what follows": lambda header, then: [header + then[:20], then[20:]],
    "in two, the second with what follows": lambda header, then: [header[:9], header[9:] + then],
}
FROM_HERE = "--proxy-from", "127.0.0.0/8"


def status_port(server):
    """Read where its status listener is."""
    return int(re.search(r"status on http://127.0.0.1:(\d+)/", server.read_line(PATIENCE))[1])


def metric(port, name):
    """A number that the status listener tells."""
    with Client(("127.0.0.1", port)) as client:
        client.send(request("/metrics", connection="close"))
        return float(re.search(rf"^tarweb_{name} (\S+)$", client.response().body.decode(), re.M)[1])


def clients_in(log):
    """{target: the first word of its line} of an access log in the combined format."""
    return {target: word for word, target in re.findall(
        r'^(\S+) - - \[[^]]*\] "GET (\S+) HTTP/1.1" ', Path(log).read_text(), re.M)}


def descriptors(pid):
    """How many it has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def reload(server, number):
    """Have generation `number` take over."""
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: f"reloaded: generation {number} " in server.stderr())


def unix_client(path):
    """A Client connected to a unix socket."""
    client = Client.__new__(Client)
    client.sock, client.pending = socket.socket(socket.AF_UNIX), b""
    client.sock.settimeout(PATIENCE)
    client.sock.connect(str(path))
    return client


def ends_without_a_word(client):
    """Whether the server ends the connection, by a FIN or a reset, and has sent nothing before."""
    return client.rest() == b""


# --- PROXY headers -------------------------------------------------------------------------------------------------


def test_the_log_tells_of_the_client_in_the_header(start, site, tmp_path):
    """Each header in each delivery, and two requests behind it on the same connection."""
    server = start(site, *FROM_HERE, "--access-log", str(tmp_path / "log"))
    expected = {}
    for name, (header, client) in HEADERS.items():
        for how, pieces in WAYS.items():
            first, second = f"/next?{len(expected)}", f"/next?{len(expected) + 1}"
            with server.connect() as connection:
                connection.send(*pieces(header, request(first)))
                assert connection.response().body == FILES["next"], (name, how)
                assert connection.ask(second).body == FILES["next"], (name, how)
            expected |= {first: client, second: client}
    server.stop()
    assert clients_in(tmp_path / "log") == expected


def test_known_requests_of_several_clients_are_told_apart(start, site, tmp_path):
    """The part of a line that is remembered has nothing of the client in it."""
    server = start(site, *FROM_HERE, "--access-log", str(tmp_path / "log"))
    clients = [f"192.0.2.{i}" for i in range(1, 6)]
    connections = []
    for client in clients:
        connections.append(server.connect())
        connections[-1].send(v2(client))
    for _ in range(5):
        for connection in connections:
            assert connection.ask("/next").body == FILES["next"]
    for connection in connections:
        connection.close()
    server.stop()
    words = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(words) == sorted(5 * clients)


def test_a_wrong_header_ends_the_connection(start, site):
    server = start(site, *FROM_HERE, "--status", "127.0.0.1:0")
    port = status_port(server)
    for name, data in WRONG.items():
        for pieces in ([data], [bytes([byte]) for byte in data[:150]]):
            with server.connect() as client:
                with contextlib.suppress(ConnectionError):
                    client.send(*pieces)
                assert ends_without_a_word(client), name
    wait_until(lambda: metric(port, "proxy_refused_total") == 2 * len(WRONG))
    with server.connect() as client:
        client.send(v1("192.0.2.1"))
        assert client.ask("/next").status == 200


def test_a_second_header_is_a_bad_request(start, site):
    server = start(site, *FROM_HERE)
    with server.connect() as client:
        client.send(v1("192.0.2.1"), v1("192.0.2.2"), request("/next"))
        assert client.response().status == 400


def test_a_header_that_does_not_come_is_not_waited_for(start, site):
    """No byte, half a header of either version; and a whole one, whose request does not come."""
    server = start(site, *FROM_HERE, "--header-timeout", "1")
    clients = []
    for begun in (b"", v1("192.0.2.1")[:20], v2("192.0.2.1")[:14], SIGNATURE[:1]):
        clients.append(server.connect())
        clients[-1].send(begun)
    for client in clients:
        assert ends_without_a_word(client)
        client.close()
    with server.connect() as client:
        client.send(v2("192.0.2.1") + b"GET ")
        assert client.response().status == 408


def test_who_ends_within_a_header(start, site):
    """Also a LOCAL one and nothing behind it, which is how a proxy looks whether there is somebody."""
    server = start(site, *FROM_HERE)
    for begun in (b"", v1("192.0.2.1")[:20], v2("192.0.2.1")[:14], SIGNATURE + bytes([LOCAL, 0, 0, 0])):
        with server.connect() as client:
            client.send(begun)
            client.half_close()
            assert client.at_end()
    [worker] = server.workers
    with server.connect() as client:
        client.send(v2("192.0.2.1"))
        assert client.ask("/next").status == 200
        before = descriptors(worker)
        for _ in range(20):
            with server.connect() as other:
                other.send(b"PROXY")
        wait_until(lambda: descriptors(worker) == before)


@pytest.mark.parametrize("header", [v1("192.0.2.1"), v2("192.0.2.1")], ids=["v1", "v2"])
def test_strangers_may_not_send_one(start, site, tmp_path, header):
    server = start(site, "--proxy-from", "10.0.0.0/8", "--proxy-from", "::2", "--proxy-from", "unix",
                   "--access-log", str(tmp_path / "log"))
    with server.connect() as client:
        client.send(header, request("/next"))
        assert client.response().status == 400
        assert client.rest() == b""
    assert server.fetch("/next?plain").body == FILES["next"]
    server.stop()
    assert clients_in(tmp_path / "log") == {"/next?plain": PEER}
    assert {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()} == {PEER}


def test_the_network_decides(start, site, tmp_path):
    """Of two clients on the same listener, from 127.0.0.2 and 127.0.0.3, one is trusted."""
    server = start(site, "--proxy-from", "127.0.0.2/32", "--access-log", str(tmp_path / "log"))
    for source, first in (("127.0.0.2", v2("192.0.2.1")), ("127.0.0.3", b"")):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE, (source, 0)) as sock:
            sock.sendall(first + request(f"/next?{source}", connection="close"))
            assert sock.makefile("rb").read().endswith(FILES["next"])
    server.stop()
    assert clients_in(tmp_path / "log") == {"/next?127.0.0.2": "192.0.2.1", "/next?127.0.0.3": "127.0.0.3"}


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_ipv4_client_of_a_dual_stack_listener_is_in_an_ipv4_network(start, site, tmp_path):
    server = start(site, *FROM_HERE, "--access-log", str(tmp_path / "log"), listen="[::ffff:127.0.0.1]:0")
    with server.connect() as client:
        client.send(v1("192.0.2.1"))
        assert client.ask("/next?told").body == FILES["next"]
    with server.connect() as client:
        client.send(b"PROXY UNKNOWN\r\n")
        assert client.ask("/next?peer").body == FILES["next"]
    server.stop()
    assert clients_in(tmp_path / "log") == {"/next?told": "192.0.2.1", "/next?peer": PEER}


def test_a_unix_listener_behind_a_proxy(start, site, tmp_path):
    """`unix` is for its clients only: the other listener's are asked for no header."""
    path = tmp_path / "socket"
    server = start(site, "--listen", f"unix:{path}", "--proxy-from", "unix", "--access-log", str(tmp_path / "log"))
    for number, (header, _) in enumerate(HEADERS.values()):
        with unix_client(path) as client:
            client.send(header + request(f"/next?{number}"))
            assert client.response().body == FILES["next"]
    with unix_client(path) as client:
        client.send(request("/next"))
        assert ends_without_a_word(client)
    assert server.fetch("/next?tcp").body == FILES["next"]
    server.stop()
    told = ["unix:" if client == PEER else client for _, client in HEADERS.values()]
    assert clients_in(tmp_path / "log") == {
        "/next?tcp": PEER, **{f"/next?{number}": client for number, client in enumerate(told)}}


def test_a_unix_listener_without_trust(start, site, tmp_path):
    path = tmp_path / "socket"
    start(site, "--listen", f"unix:{path}", *FROM_HERE)
    with unix_client(path) as client:
        client.send(request("/next"))
        assert client.response().body == FILES["next"]
    with unix_client(path) as client:
        client.send(v1("192.0.2.1") + request("/next"))
        assert client.response().status == 400


def test_a_header_that_comes_over_a_reload(start, site):
    """The worker that has half of a header when it is told to retire sees that connection through."""
    server = start(site, *FROM_HERE)
    header = v2("192.0.2.1")
    clients = [server.connect() for _ in range(3)]
    for client, at in zip(clients, (0, 14, len(header)), strict=True):
        client.send(header[:at])
    with server.connect() as client:            # when it is answered, the others have been accepted
        client.send(header)
        assert client.ask("/next").status == 200
    reload(server, 2)
    for client, at in zip(clients, (0, 14, len(header)), strict=True):
        client.send(header[at:], request("/next"))
        response = client.response()
        assert (response.body, response.closes) == (FILES["next"], True)
        assert client.at_end()
        client.close()


def test_room_is_made_for_a_connection_with_a_header(start, site):
    server = start(site, *FROM_HERE, "--max-connections", "1")
    with server.connect() as idle, server.connect() as other:
        idle.send(v2("192.0.2.1"))
        assert idle.ask("/next").status == 200
        other.send(v2("192.0.2.2"))
        assert other.ask("/next").status == 200
        assert idle.at_end()


# --- PROXY headers and TLS -----------------------------------------------------------------------------------------


def in_front(header, pieces):
    """What TlsClient's `cut` is to be for `header` to go in front of the ClientHello, in these pieces."""
    flights = []

    def cut(data):
        flights.append(data)
        return pieces(header, data) if len(flights) == 1 else [data]
    return cut


def test_a_header_before_a_handshake(start_tls, site, tmp_path):
    """It is in plaintext, in front of the ClientHello, in each delivery."""
    server = start_tls(site, *FROM_HERE, "--access-log", str(tmp_path / "log"))
    expected = {}
    for name in ("v1 TCP4", "v2 TCP6", "v2 LOCAL"):
        header, client = HEADERS[name]
        for how, pieces in WAYS.items():
            target = f"/random.bin?{len(expected)}"
            with server.connect(cut=in_front(header, pieces)) as connection:
                assert connection.ask(target).body == FILES["random.bin"], (name, how)
                assert connection.ask("/next").body == FILES["next"], (name, how)
            expected[target] = client
    server.stop()
    logged = clients_in(tmp_path / "log")
    assert {target: client for target, client in logged.items() if target != "/next"} == expected


def test_no_header_before_a_handshake(start_tls, site):
    server = start_tls(site, *FROM_HERE)
    for name, header in {"none": b"", "wrong": b"PROXY TCP5\r\n", "within TLS": b""}.items():
        with pytest.raises((OSError, EOFError)), server.connect(cut=in_front(header, WAYS["together"])):
            pass
        server.check()
        assert name


def test_plain_listener_and_plain_http_behind_a_header(start_tls, site):
    """The redirecting listener takes a header too, and plain HTTP on the HTTPS port is told so behind one."""
    server = start_tls(site, *FROM_HERE, "--redirect-http", "127.0.0.1:0")
    with server.connect_raw(server.redirect_port) as client:
        client.send(v2("192.0.2.1") + request("/next"))
        assert client.response()["Location"].startswith("https://t")
    with server.connect_raw(server.redirect_port) as client:
        client.send(request("/next"))
        assert ends_without_a_word(client)
    with server.connect_raw() as client:
        client.send(v2("192.0.2.1") + request("/next"))
        assert client.response().status == 400


# --- connections that another process passes -----------------------------------------------------------------------


class Router:
    """What stands in front: accepts, reads with `take(connection)` what it wants to know, and passes both on."""

    def __init__(self, path, take=lambda connection: b""):
        self.path, self.take = str(path), take
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sender.connect(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.sender.close()

    def route(self):
        """Pass on the next connection. Our copy of it is closed at once."""
        connection, _ = self.listener.accept()
        with connection:
            self.send(self.take(connection), connection.fileno())

    def send(self, data, *fds):
        socket.send_fds(self.sender, [data], fds)

    def connect(self, first=b""):
        """A Client that has sent `first`, and has been passed on."""
        client = Client(self.address)
        client.send(first)
        self.route()
        return client


def takes(count):
    return lambda connection: connection.recv(count, socket.MSG_WAITALL) if count else b""


@pytest.fixture
def passing(start, site, tmp_path):
    """passing(*flags, ...) -> (server, path of its socket)."""
    def begin(*flags, begin=start, **options):
        path = tmp_path / "passing"
        return begin(site, "--passfd", str(path), *flags, **options), path
    return begin


WHOLE = request("/next")


@pytest.mark.parametrize("flags", [(), ("--no-liburing",), ("--sqpoll-ms", "50")], ids=" ".join)
def test_whatever_the_router_has_read(passing, flags):
    """Of three requests in a row: nothing, a byte, half a head, one and a half, all of them."""
    _, path = passing(*flags)
    asked = WHOLE + request("/n/001.txt") + request("/random.bin")
    for count in (0, 1, len(WHOLE) // 2, len(WHOLE), len(WHOLE) + 30, len(asked)):
        with Router(path, takes(count)) as router, router.connect(asked) as client:
            for name in ("next", "n/001.txt", "random.bin"):
                assert client.response().body == FILES[name], count
            assert client.ask("/dir/").body == FILES["dir/index.html"]


def test_a_request_that_comes_later(passing):
    _, path = passing()
    for begun in (b"", WHOLE[:1], WHOLE[:-1]):
        with Router(path, takes(len(begun))) as router, router.connect(begun) as client:
            assert not client.readable(0)
            client.send(WHOLE[len(begun):])
            assert client.response().body == FILES["next"]


def test_a_body_of_which_the_router_has_read_a_part(passing):
    _, path = passing()
    post = request("/next", "POST", body=bytes(1000), content_length=1000)
    for count in (len(post) - 1000, len(post) - 500, len(post)):
        with Router(path, takes(count)) as router, router.connect(post + WHOLE) as client:
            assert client.response().status == 405
            assert client.response().body == FILES["next"]


def test_as_much_as_a_datagram_may_hold(passing):
    _, path = passing()
    many = WHOLE * (proxy.LARGEST // len(WHOLE)) + WHOLE[:proxy.LARGEST % len(WHOLE)]
    with Router(path, takes(len(many))) as router, router.connect(many) as client:
        for _ in range(proxy.LARGEST // len(WHOLE)):
            assert client.response().body == FILES["next"]
        client.send(WHOLE[proxy.LARGEST % len(WHOLE):])
        assert client.response().body == FILES["next"]


def test_what_is_wrong_with_a_request_is_said_to_the_client(passing):
    _, path = passing()
    for bad, status in ((b"no request at all\r\n\r\n", 400), (b"GET /" + b"x" * 9000, 414)):
        with Router(path, takes(len(bad))) as router, router.connect(bad) as client:
            assert client.response().status == status
            assert client.rest() == b""


def test_the_last_request_of_a_client_that_has_ended(passing):
    """Its FIN, and perhaps its request, are behind it when the connection is passed."""
    _, path = passing()
    for count in (0, len(WHOLE)):
        with Router(path, takes(count)) as router, Client(router.address) as client:
            client.send(WHOLE)
            client.half_close()
            router.route()
            assert client.response().body == FILES["next"]
            assert client.at_end()


def test_a_socket_that_does_not_block(passing):
    """As a router's will be; the large response has to wait for its reader, and costs nothing meanwhile."""
    def take(connection):
        connection.setblocking(False)
        select.select([connection], [], [])
        return connection.recv(10)
    server, path = passing()
    [worker] = server.workers
    with Router(path, take) as router, router.connect(request("/large.bin")) as client:
        assert client.readable(PATIENCE)
        before = cpu_seconds(worker)
        with router.connect(request("/next")) as other:
            assert other.response().body == FILES["next"]
            assert not other.readable(1)                # both are waited for: one to read, the other to ask
        assert cpu_seconds(worker) - before < 0.5
        assert client.response().body == FILES["large.bin"]
        assert client.ask("/next").body == FILES["next"]


def cpu_seconds(pid):
    """What a process has used, for itself and in the kernel (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_connected_unix_socket(passing, tmp_path):
    server, path = passing("--access-log", str(tmp_path / "log"))
    ours, theirs = socket.socketpair()
    with Router(path) as router, ours:
        router.send(request("/next?pair", connection="close"), theirs.fileno())
        theirs.close()
        assert ours.makefile("rb").read().endswith(FILES["next"])
    server.stop()
    assert clients_in(tmp_path / "log") == {"/next?pair": "unix:"}


def test_the_log_and_the_counts_tell_of_those_who_were_passed(passing, tmp_path):
    server, path = passing("--access-log", str(tmp_path / "log"), "--status", "127.0.0.1:0")
    port = status_port(server)
    with Router(path, takes(10)) as router:
        for number in range(3):
            with router.connect(request(f"/next?{number}")) as client:
                assert client.response().body == FILES["next"]
    assert server.fetch("/next?3").status == 200
    wait_until(lambda: metric(port, "connections_passed_total") == 3)
    assert metric(port, "connections_accepted_total") == 4
    server.stop()
    assert clients_in(tmp_path / "log") == {f"/next?{number}": PEER for number in range(4)}


def test_a_proxy_header_of_a_passed_connection(passing, tmp_path):
    """Where its peer is trusted, it begins with one, whoever has read how much of it."""
    server, path = passing(*FROM_HERE, "--access-log", str(tmp_path / "log"))
    header = v2("192.0.2.1")
    expected = {}
    for count in (0, 5, len(header), len(header) + 20):
        target = f"/next?{count}"
        with Router(path, takes(count)) as router, router.connect(header + request(target)) as client:
            assert client.response().body == FILES["next"]
        expected[target] = "192.0.2.1"
    with Router(path, takes(10)) as router, router.connect(WHOLE) as client:
        assert ends_without_a_word(client)
    server.stop()
    assert clients_in(tmp_path / "log") == expected


# --- a router by server name ---------------------------------------------------------------------------------------


def client_hello_record(connection):
    """Read the record with the ClientHello, as one who routes by SNI does (RFC 8446 section 5.1)."""
    head = connection.recv(5, socket.MSG_WAITALL)
    assert head[0] == HANDSHAKE
    record = head + connection.recv(int.from_bytes(head[3:5], "big"), socket.MSG_WAITALL)
    assert b"\0\0\x09localhost" in record       # RFC 6066 section 3
    return record


@pytest.mark.parametrize("take", [takes(0), takes(1), takes(5), takes(100), client_hello_record],
                         ids=["nothing", "a byte", "a record's head", "a part", "the ClientHello"])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_handshake_of_which_the_router_has_read(passing, start_tls, take, version):
    server, path = passing(begin=start_tls)
    with Router(path, take) as router:
        routing = threading.Thread(target=router.route)
        routing.start()
        with TlsClient(router.address, server.context_of(version=version)) as client:
            routing.join()
            assert client.ask("/random.bin").body == FILES["random.bin"]
            assert client.ask("/next").body == FILES["next"]
    assert server.ended().failed == 0


def test_the_router_sees_to_one_host_and_passes_the_other(start_tls, site, tmp_path):
    """Two servers behind one address; each connection goes to the one that its name is for."""
    paths = {b"localhost": tmp_path / "one", b"127.0.0.1": tmp_path / "other"}
    other_site = build_tar(tmp_path / "other.tar", {"next": b"of the other"})
    one = start_tls(site, "--passfd", str(paths[b"localhost"]))
    start_tls(other_site, "--passfd", str(paths[b"127.0.0.1"]))
    with Router(paths[b"localhost"], client_hello_record) as router, Router(paths[b"127.0.0.1"], takes(100)) as second:
        for here, name, body in ((router, "localhost", FILES["next"]), (second, "127.0.0.1", b"of the other")):
            routing = threading.Thread(target=here.route)
            routing.start()
            with TlsClient(here.address, one.context_of(), name=name) as client:
                routing.join()
                assert client.ask("/next").body == body


# --- what cannot be served -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def unusable(tmp_path):
    """Datagrams that a Router ought not to send: name -> (bytes, files); and sockets that would have bytes to read if
    the worker took one of those for a connection."""
    with contextlib.ExitStack() as stack:
        def opened(file):
            return stack.enter_context(file)
        pair = [opened(end) for end in socket.socketpair()]
        listener, idle = opened(socket.create_server(("127.0.0.1", 0))), opened(socket.socket())
        bound = opened(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        bound.bind(str(tmp_path / "bound"))
        yield {
            "no descriptor": (WHOLE, []),
            "nothing at all": (b"", []),
            "two descriptors": (WHOLE, pair),
            "many descriptors": (WHOLE, 100 * pair),
            "a file": (WHOLE, [opened(Descriptor(__file__))]),
            "a directory": (b"", [opened(Descriptor(tmp_path))]),
            "a pipe": (WHOLE, [opened(os.fdopen(end)) for end in os.pipe()][:1]),
            "a device": (WHOLE, [opened(Descriptor(os.devnull))]),
            "an epoll": (WHOLE, [opened(select.epoll())]),
            "a UDP socket": (WHOLE, [opened(socket.socket(type=socket.SOCK_DGRAM))]),
            "a unix datagram socket": (WHOLE, [bound]),
            "packets": (WHOLE, [opened(end) for end in socket.socketpair(type=socket.SOCK_SEQPACKET)][:1]),
            "a listening socket": (b"", [listener]),
            "a listening socket and bytes": (WHOLE, [listener]),
            "an unconnected socket": (WHOLE, [idle]),
            "more bytes than are taken": (WHOLE + bytes(proxy.LARGEST + 1 - len(WHOLE)), pair[:1]),
            "far more bytes": (bytes(3 * proxy.LARGEST), pair[:1]),
        }, pair


class Descriptor:
    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)

    def fileno(self):
        return self.fd


def test_what_is_no_connection_is_dropped_and_closed(passing, tmp_path):
    server, path = passing()
    [worker] = server.workers
    with Router(path, takes(10)) as router, router.connect(WHOLE) as kept, unusable(tmp_path) as (datagrams, pair):
        assert kept.response().body == FILES["next"]
        before = descriptors(worker)
        for name, (data, files) in datagrams.items():
            for _ in range(3):
                router.send(data, *(file.fileno() for file in files))
            with router.connect(WHOLE) as client:       # the worker takes one after the other
                assert client.response().body == FILES["next"], name
            wait_until(lambda: descriptors(worker) == before)
            assert not select.select(pair, [], [], 0)[0], name
        assert kept.ask("/next").body == FILES["next"]
    server.check()
    assert server.workers == [worker]


def test_a_client_that_has_gone(passing):
    """Closed or reset before the worker looks at it."""
    server, path = passing()
    [worker] = server.workers
    with Router(path) as router:
        with router.connect(WHOLE) as client:
            assert client.response().body == FILES["next"]
            before = descriptors(worker)
        before -= 1
        for end in (Client.close, Client.reset):
            for taken in (b"", WHOLE, request("/large.bin")):
                client = Client(router.address)
                connection, _ = router.listener.accept()
                end(client)
                router.send(taken, connection.fileno())
                connection.close()
        wait_until(lambda: descriptors(worker) == before)
        with router.connect(WHOLE) as client:
            assert client.response().body == FILES["next"]
    server.check()


# --- room, several workers, reloads --------------------------------------------------------------------------------


def test_those_who_are_passed_are_let_in_as_others_are(passing):
    """Where all places are taken, who has waited longest for its client makes room, here one that owes a request."""
    _, path = passing("--max-connections", "2")
    with Router(path) as router, router.connect(b"GET ") as first, router.connect(b"GET ") as second:
        with router.connect(WHOLE) as third:
            assert third.response().body == FILES["next"]
            assert first.at_end()
        second.send(b"/next HTTP/1.1\r\nHost: t\r\n\r\n")
        assert second.response().body == FILES["next"]


def test_several_workers_share_the_socket(passing):
    """All are answered; and those that a stopped worker does not take are taken by the other."""
    server, path = passing("--threads", "2")
    with Router(path, takes(10)) as router:
        for stopped in (None, *server.workers):
            if stopped:
                os.kill(stopped, signal.SIGSTOP)
            try:
                clients = [router.connect(request(f"/n/{i:03}.txt")) for i in range(20)]
                for i, client in enumerate(clients):
                    if not stopped or client.readable(5):
                        assert client.response().body == FILES[f"n/{i:03}.txt"]
                        client.close()
            finally:
                if stopped:
                    os.kill(stopped, signal.SIGCONT)
            for i, client in enumerate(clients):
                if client.sock.fileno() >= 0:           # the stopped worker had taken it
                    assert client.response().body == FILES[f"n/{i:03}.txt"]
                    client.close()


def test_none_is_lost_over_reloads(passing):
    """One after the other is passed all the while; each is answered by one generation or the other."""
    server, path = passing("--threads", "2")
    reloaded, wrong, count = threading.Event(), [], 0

    def reload_again_and_again():
        try:
            for number in range(2, 8):
                reload(server, number)
        except AssertionError as failure:
            wrong.append(failure)
        finally:
            reloaded.set()

    reloading = threading.Thread(target=reload_again_and_again)
    reloading.start()
    with Router(path, takes(10)) as router:
        while not reloaded.is_set() or count < 100:
            clients = [router.connect(WHOLE) for _ in range(8)]
            for client in clients:
                assert client.response().body == FILES["next"]
                client.close()
            count += len(clients)
    reloading.join()
    assert not wrong


def test_those_in_the_queue_are_left_to_the_next_generation(passing):
    """The worker does not run when they come, and by the time that it does the next one has taken all but the first,
    which the kernel may have kept for it."""
    server, path = passing()
    [worker] = server.workers
    with Router(path, takes(10)) as router:
        os.kill(worker, signal.SIGSTOP)
        try:
            clients = [router.connect(WHOLE) for _ in range(5)]
            server.process.send_signal(signal.SIGHUP)
            assert all(client.readable(5) for client in clients[1:])
        finally:
            os.kill(worker, signal.SIGCONT)
        for client in clients:
            assert client.response().body == FILES["next"]
            client.close()
        wait_until(lambda: "reloaded: generation 2 " in server.stderr())


def test_those_in_the_queue_when_it_is_told_to_stop(passing):
    """Nobody but this server can answer them any more: it does, and ends them."""
    server, path = passing()
    [worker] = server.workers
    with Router(path, takes(10)) as router:
        os.kill(worker, signal.SIGSTOP)
        clients = [router.connect(WHOLE) for _ in range(5)]
        server.signal()
        wait_until(lambda: not path.exists())
        os.kill(worker, signal.SIGCONT)
        for client in clients:
            assert client.response().body == FILES["next"]
            assert client.at_end()
            client.close()
    server.wait()


def test_none_is_taken_while_it_drains(passing):
    """The router is told by an error, and can pass the connection to somebody else."""
    server, path = passing()
    with Router(path) as router, server.connect(rcvbuf=4096) as slow:
        slow.send(request("/large.bin"))
        assert slow.readable(PATIENCE)
        server.signal()
        wait_until(lambda: not path.exists())
        with pytest.raises(OSError):            # noqa: PT011  (EPIPE or ECONNREFUSED)
            for _ in range(100):
                router.connect(WHOLE).close()
        assert slow.response().body == FILES["large.bin"]
    server.wait()


# --- the socket's path, group and permissions ----------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_and_group(passing):
    group = next((group for group in grp.getgrall()
                  if group.gr_gid != os.getegid() and (os.geteuid() == 0 or group.gr_gid in os.getgroups())), None)
    name = group.gr_name if group else grp.getgrgid(os.getegid()).gr_name
    server, path = passing("--passfd-group-name", name, "--passfd-perms", "620")
    assert (mode(path), path.stat().st_gid) == (0o620, grp.getgrnam(name).gr_gid)
    server.stop()
    assert not path.exists()


def test_the_default_keeps_others_out(passing):
    _, path = passing()
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert (mode(path), path.stat().st_gid) == (0o660, os.getegid())


def test_a_path_that_was_left_behind_and_one_that_is_in_use(passing, site):
    server, path = passing()
    refused = run_tarweb("-l", "127.0.0.1:0", "--passfd", path, site)
    assert refused.returncode == 2
    assert "in use" in refused.stderr and str(path) in refused.stderr and "Traceback" not in refused.stderr
    with Router(path) as router, router.connect(WHOLE) as client:
        assert client.response().body == FILES["next"]
    server.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left_behind:
        left_behind.bind(str(path))
    _, path = passing()
    with Router(path) as router, router.connect(WHOLE) as client:
        assert client.response().body == FILES["next"]


@pytest.mark.parametrize(("flags", "about"), [
    (["--passfd", "PATH", "--passfd-group-name", "no-such-group"], "no-such-group"),
    (["--passfd", "PATH", "--passfd-perms", "rw"], "rw"),
    (["--passfd", "PATH", "--passfd-perms", "888"], "888"),
    (["--passfd", "FILE"], "no socket"),
    (["--passfd", ""], "--passfd"),
    (["--passfd", "/tmp/" + "x" * 110], "--passfd"),
    (["--passfd-group-name", "root"], "--passfd"),
    (["--proxy-from", "10.0.0.0/33"], "10.0.0.0/33"),
    (["--proxy-from", "10.0.0.1/8"], "10.0.0.1/8"),
    (["--proxy-from", "proxy.example"], "proxy.example"),
    (["--proxy-from", "fe80::1%eth0"], "fe80::1%eth0"),
    (["--proxy-from", ""], "--proxy-from"),
    (["--forwarded-from", "10.0.0.1/8", "--access-log", "-"], "--forwarded-from: '10.0.0.1/8' is not a network"),
    (["--forwarded-from", "10.0.0.0/8"], "--forwarded-from is about the access log, which needs --access-log"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_wrong_usage(site, tmp_path, flags, about):
    """Status 2, and a sentence that names what is wrong; nothing is left behind, nor taken away."""
    path, file = tmp_path / "passing", tmp_path / "file"
    file.write_text("precious")
    given = [flag.replace("PATH", str(path)).replace("FILE", str(file)) for flag in flags]
    ended = run_tarweb("-l", "127.0.0.1:0", *given, site)
    assert ended.returncode == 2, ended.stderr
    assert about in ended.stderr and "Traceback" not in ended.stderr
    assert file.read_text() == "precious"
    assert not path.exists()
