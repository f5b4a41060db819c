"""Fixtures: one site and one server for everything that only reads, and a factory for tests that need their own."""

import itertools

import pytest
from certificates import KINDS, Authority
from support import FILES, MODES, Server, build_tar
from tlsclient import TlsServer


# What takes longest is begun first: files are spread over processes, most of which wait for clocks and sockets.
FIRST = ("test_guest.py", "test_next_debian.py", "test_reload.py", "test_haproxy.py", "test_damage.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The tar of `support.FILES`."""
    return build_tar(tmp_path_factory.mktemp("site") / "site.tar", FILES)


@pytest.fixture(scope="session")
def shared_server(site, tmp_path_factory):
    server = Server(site, log=tmp_path_factory.mktemp("shared") / "stderr")
    yield server
    server.stop()


@pytest.fixture
def server(shared_server):
    """A server of `support.FILES` with default flags, shared by the whole run."""
    yield shared_server
    shared_server.check()


@pytest.fixture
def start(tmp_path):
    """start(tar, *flags) -> a Server of the test's own, stopped (and its end checked) after the test."""
    running, number = [], itertools.count()

    def begin(tar, *flags, kind=Server, **options):
        server = kind(tar, *flags, log=tmp_path / f"stderr-{next(number)}", **options)
        running.append(server)
        return server

    yield begin
    failures = []
    for server in running:
        try:
            server.stop()
        except AssertionError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


@pytest.fixture(scope="session", params=MODES)
def mode_server(request, site, tmp_path_factory):
    """The same site from each engine mode in turn."""
    server = Server(site, *MODES[request.param], log=tmp_path_factory.mktemp(request.param) / "stderr")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def pairs(authority):
    """kind of key -> a certificate for localhost."""
    return {kind: authority.issue(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def shared_tls_servers(site, pairs, tmp_path_factory):
    logs = tmp_path_factory.mktemp("shared-tls")
    servers = {kind: TlsServer(site, pairs=[pair], log=logs / kind) for kind, pair in pairs.items()}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture
def tls_servers(shared_tls_servers):
    """kind of key -> a server; for what looks neither at the counts in the last line nor at what is logged."""
    yield shared_tls_servers
    for server in shared_tls_servers.values():
        server.check()


@pytest.fixture
def tls_server(tls_servers):
    """`server` over TLS."""
    return tls_servers["p256"]


@pytest.fixture
def start_tls(start, pairs):
    """As `start`, over TLS; `pairs` are the server's certificates."""
    def begin(tar, *flags, pairs=(pairs["p256"],), **options):
        return start(tar, *flags, kind=TlsServer, pairs=pairs, **options)
    return begin
