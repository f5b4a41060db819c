"""Fixtures: one site and one server for everything that only reads, and a factory for tests that need their own."""

import itertools

import pytest
from support import FILES, MODES, Server, build_tar


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

    def begin(tar, *flags, **options):
        server = Server(tar, *flags, log=tmp_path / f"stderr-{next(number)}", **options)
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
