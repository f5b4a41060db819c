"""HTTP over TLS is HTTP: every file, the whole grammar, and bodies both ways, in every suite and every engine mode."""

import itertools
import re
import shutil
import subprocess
from urllib.parse import quote

import pytest
import test_http
import test_ranges
from support import FILES, MODES, build_tar, noise, request
from tlsclient import VERSIONS, TlsServer

each_version = pytest.mark.parametrize("version", VERSIONS)
SUITES = {  # how curl is told to offer only this one -> what it is
    "TLS_AES_128_GCM_SHA256": "--tls13-ciphers",
    "TLS_AES_256_GCM_SHA384": "--tls13-ciphers",
    "TLS_CHACHA20_POLY1305_SHA256": "--tls13-ciphers",
    "ECDHE-ECDSA-AES128-GCM-SHA256": "--ciphers",
    "ECDHE-ECDSA-AES256-GCM-SHA384": "--ciphers",
    "ECDHE-ECDSA-CHACHA20-POLY1305": "--ciphers",
}
HUGE = noise(24 << 20, seed=6)


@pytest.fixture(scope="module", params=MODES)
def tls_mode_server(request, site, pairs, tmp_path_factory):
    """`mode_server` over TLS."""
    server = TlsServer(site, *MODES[request.param], pairs=[pairs["p256"]],
                       log=tmp_path_factory.mktemp(request.param) / "stderr")
    yield server
    server.stop()


# --- every byte ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("suite", SUITES)
def test_every_file_in_every_suite(tls_server, tmp_path, suite):
    """By curl, on one connection: Python's ssl cannot choose a suite of TLS 1.3."""
    wanted = [f'url = "{tls_server.url}/{quote(name)}"\noutput = "{tmp_path}/{i}"\n' for i, name in enumerate(FILES)]
    version = ["--tlsv1.3"] if "13" in SUITES[suite] else ["--tls-max", "1.2"]
    ended = subprocess.run(
        ["curl", "-sS", "-v", "--noproxy", "*", "--cacert", tls_server.root, *version, SUITES[suite], suite, "-K", "-"],
        input="".join(wanted), capture_output=True, text=True, check=True, timeout=60)
    assert re.search(rf"SSL connection using TLSv1.[23] / {suite}\b", ended.stderr)
    assert len(re.findall(r"SSL connection using", ended.stderr)) == 1
    for i, name in enumerate(FILES):
        assert (tmp_path / str(i)).read_bytes() == FILES[name], name


@each_version
def test_every_file_in_every_mode(tls_mode_server, version):
    """All of them as one pipeline, then most again one by one."""
    with tls_mode_server.connect(tls_mode_server.context_of(version=version)) as client:
        with client.sending(b"".join(request("/" + quote(name)) for name in FILES)):
            for name in FILES:
                assert client.response().body == FILES[name], name
        for name in list(FILES)[:60]:
            assert client.ask("/" + quote(name)).body == FILES[name], name
    tls_mode_server.check()


# --- the grammar of HTTP/1.1, with each byte in a record of its own at worst -----------------------------------------


@pytest.mark.parametrize("case", test_http.ALLOWED)
def test_well_formed_requests_are_answered(tls_server, case):
    test_http.test_well_formed_requests_are_answered(tls_server, case)


@pytest.mark.parametrize("case", test_http.REFUSED)
def test_malformed_requests_are_refused_and_end_the_connection(tls_server, case):
    test_http.test_malformed_requests_are_refused_and_end_the_connection(tls_server, case)


@pytest.mark.parametrize("method", test_http.METHODS)
def test_methods(tls_server, method):
    test_http.test_methods(tls_server, method)


@pytest.mark.parametrize("value", test_ranges.SINGLE)
def test_one_range(tls_server, value):
    test_ranges.test_one_range(tls_server, value)


@pytest.mark.parametrize("target", ["/next", "/style.css", "/nowhere"])
def test_head_has_the_headers_of_get(tls_server, target):
    test_http.test_head_has_the_headers_of_get(tls_server, target)


def test_several_ranges_at_once(tls_server):
    data = FILES["random.bin"]
    response = tls_server.fetch("/random.bin", range="bytes=0-9,100000-200000,-5")
    assert response.status == 206
    boundary = response["Content-Type"].partition("boundary=")[2].encode()
    parts = [part.partition(b"\r\n\r\n")[2][:-2] for part in response.body.split(b"--" + boundary)[1:-1]]
    assert parts == [data[:10], data[100_000:200_001], data[-5:]]


# --- bodies of requests --------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("size", [1, 16_384, 16_385, 60_000])
def test_a_body_is_read_past(tls_server, version, size):
    with tls_server.connect(tls_server.context_of(version=version)) as client:
        for _ in range(3):
            client.send(request("/next", body=noise(size), content_length=size))
            assert client.response().body == FILES["next"]


def test_a_client_that_waits_for_100_continue(tls_server):
    with tls_server.connect() as client:
        client.send(request("/next", content_length=5, expect="100-continue"))
        assert client.readable(20)
        assert client.pending.startswith(b"HTTP/1.1 100 Continue\r\n")
        client.send(b"12345")
        response = client.response()
        assert (response.interim, response.body) == ([100], FILES["next"])
        assert client.ask("/n/001.txt").body == FILES["n/001.txt"]


def test_a_body_too_long_is_refused_and_the_client_sees_why(tls_server):
    """It goes on sending after the response: a reset then could overtake the response."""
    with tls_server.connect() as client:
        client.send(request("/next", "POST", content_length=50 << 20))
        with client.sending(bytes(8 << 20)):
            response = client.response()
            assert (response.status, response.closes) == (405, True)
            assert client.at_end()
            client.close()


# --- slow and fast clients -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge_site(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("huge") / "huge.tar", {"huge.bin": HUGE, "next": b"the next one"})


@each_version
def test_a_reader_with_a_small_window(tls_mode_server, version):
    with tls_mode_server.connect(tls_mode_server.context_of(version=version), rcvbuf=16_384) as client:
        client.send(request("/random.bin") + request("/large.bin") + request("/next"))
        for name in ("random.bin", "large.bin", "next"):
            assert client.response().body == FILES[name]


@each_version
def test_small_requests_are_served_between_the_pieces_of_large_ones(start_tls, huge_site, version):
    """Two downloads that always have more to come, and another client answered again and again meanwhile."""
    server = start_tls(huge_site)
    context = server.context_of(version=version)
    with server.connect(context) as first, server.connect(context) as second, server.connect(context) as other:
        for busy in (first, second):
            busy.send(request("/huge.bin"))
        received, asked = {first: bytearray(), second: bytearray()}, 0
        while min(map(len, received.values())) < len(HUGE):
            for busy, body in received.items():
                if len(body) < len(HUGE):
                    body += busy.sock.recv(1 << 18)
            if min(map(len, received.values())) > asked << 20:
                assert other.ask("/next").body == b"the next one"
                asked += 1
        assert asked > 20
        for busy, body in received.items():
            busy.pending = bytes(body)
            assert busy.response().body == HUGE


def test_readers_that_stop_cost_little_memory(start_tls, huge_site):
    """A response is encrypted as the client takes it, not as a whole."""
    server = start_tls(huge_site)
    with server.connect() as client:
        assert len(client.ask("/huge.bin").body) == len(HUGE)
    before = server.anonymous_memory()
    stalled = [server.connect(rcvbuf=16_384) for _ in range(20)]
    for client in stalled:
        client.send(request("/huge.bin") * 10)
    with server.connect() as client:
        assert client.ask("/huge.bin").body == HUGE
    assert server.anonymous_memory() - before < len(stalled) * (1 << 20)
    for client in stalled:
        client.reset()


def test_a_client_that_only_sends_is_held_back(start_tls, site):
    """Requests in their hundreds of thousands do not pile up in a server whose responses nobody reads."""
    server = start_tls(site)
    pipeline = request("/n/199.txt", x_padding="p" * 2000) * 200
    with server.connect(rcvbuf=16_384, sndbuf=65_536) as client:
        before = server.anonymous_memory()
        client.sock.raw.settimeout(0.5)         # nothing was taken for that long: the server holds back
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                client.sock.raw.sendall(client.sock.encrypt(pipeline))
        assert server.anonymous_memory() - before < 8 << 20
        assert server.fetch("/next").body == FILES["next"]
        client.reset()


@each_version
def test_many_clients_at_once(tls_mode_server, version):
    """In all stages of their lives, and asked in turn."""
    names = itertools.cycle([name for name in FILES if name.startswith("n/")])
    context = tls_mode_server.context_of(version=version)
    clients = []
    for _ in range(40):
        clients.append(tls_mode_server.connect(context))
        asked = [(client, next(names)) for client in clients[::7]]
        for client, name in asked:
            client.send(request("/" + name))
        for client, name in asked:
            assert client.response().body == FILES[name]
    for client in clients:
        client.close()
