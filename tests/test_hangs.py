"""What hangs: a worker that does not get ready, a load that does not move on, the parent's loop; and what systemd's
watchdog hears of each."""

import os
import re
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
from support import PATIENCE, PYTHON, ROOT, build_tar, wait_until
from test_systemd import Manager, as_service

import linux
import supervisor

PAGES = {"page.html": b"a page"}
WAIT = 2                        # seconds for a worker to be ready, in these tests
EACH = 0.05                     # seconds from one ping to the next
SAYS = rf"worker \d+ was not ready within {WAIT} s: killed\n"

# The real program, in which something hangs as long as there is a file.
HANGING = f"""
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import generation, supervisor, tarweb
supervisor.START_WITHIN = {WAIT}
what, path = sys.argv.pop(1), sys.argv.pop(1)
def hangs(function, hang):
    def run(*arguments, **options):
        if os.path.exists(path):
            hang()
        return function(*arguments, **options)
    return run
if what == "worker":
    tarweb.make_worker = hangs(tarweb.make_worker, lambda: os.kill(os.getpid(), signal.SIGSTOP))
elif what == "load":
    generation.open_archive = hangs(generation.open_archive, lambda: time.sleep(3600))
else:
    supervisor.Supervisor.on_time = hangs(supervisor.Supervisor.on_time, lambda: time.sleep(3600))
sys.exit(tarweb.main())
"""


@pytest.fixture
def site(tmp_path):
    return build_tar(tmp_path / "site.tar", PAGES)


@pytest.fixture
def manager(tmp_path):
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


@pytest.fixture
def begin(start, site, tmp_path, manager):
    """begin(what, *flags) -> a server in which `what` hangs while there is a file `hang`, under a watchdog."""
    def server(what, *flags):
        server = start(site, *flags, python=as_service(environ=manager.environ, WATCHDOG_USEC=int(2e6 * EACH)),
                       program=("-c", HANGING, str(ROOT), what, str(tmp_path / "hang")))
        manager.pings_until("READY")
        return server
    return server


def pings(manager, seconds):
    """How many come within so many seconds, and nothing else."""
    until, count = time.monotonic() + seconds, 0
    manager.socket.settimeout(seconds)
    try:
        while time.monotonic() < until:
            assert manager.receive() == {"WATCHDOG": "1"}
            count += 1
    except TimeoutError:
        pass
    return count


def test_a_worker_that_hangs_is_the_end_of_the_start(site, tmp_path):
    (tmp_path / "hang").touch()
    ended = subprocess.run([PYTHON, "-c", HANGING, str(ROOT), "worker", str(tmp_path / "hang"), "--threads", "2",
                            "--listen", "127.0.0.1:0", str(site)], stdin=subprocess.DEVNULL, capture_output=True,
                           text=True, timeout=PATIENCE, check=False)
    assert re.fullmatch(f"(tarweb: {SAYS}){{2}}", ended.stderr)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_a_worker_that_hangs_is_the_end_of_a_reload(begin, manager, tmp_path):
    """Those before it serve on, the watchdog is fed, and the next reload works."""
    server = begin("worker", "--threads", "2")
    before = server.workers
    (tmp_path / "hang").touch()
    os.kill(server.pid, signal.SIGHUP)
    manager.pings_until("RELOADING")
    wait_until(lambda: len(server.workers) == 4)
    assert server.fetch("/page.html").body == PAGES["page.html"]
    count, message = manager.pings_until("READY")
    assert message["STATUS"] == "reload failed: its workers did not start"
    assert count >= WAIT / EACH / 2
    assert len(re.findall(SAYS, server.stderr())) == 2
    assert "reload failed, generation 1 still serves: its workers did not start" in server.stderr()
    wait_until(lambda: server.workers == before)
    (tmp_path / "hang").unlink()
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2 " in server.stderr())
    assert server.fetch("/page.html").body == PAGES["page.html"]


@pytest.mark.parametrize("what", ["load", "loop"])
def test_what_does_not_move_does_not_feed_the_watchdog(begin, manager, tmp_path, what):
    server = begin(what)
    assert pings(manager, 10 * EACH) >= 5
    build_tar(tmp_path / "new.tar", {"new.html": b"new"}).rename(tmp_path / "site.tar")
    (tmp_path / "hang").touch()
    if what == "load":
        os.kill(server.pid, signal.SIGHUP)
        manager.pings_until("RELOADING")
    pings(manager, 4 * EACH)                            # until then it may have moved
    assert pings(manager, 10 * EACH) == 0
    assert server.fetch("/page.html").body == PAGES["page.html"]
    server.process.kill()                               # as systemd would
    server.process.wait()


def test_one_that_dies_without_taking_its_new_log_has_given_an_answer():
    """Its end of the channel is closed with something unread, which is ECONNRESET at the other end."""
    ours, its = socket.socketpair()
    with ours:
        ours.send(b"n")
        its.close()
        process = supervisor.Process(1, 0, 0, None, ours)
        waiting = SimpleNamespace(waits_until=0.0)
        assert supervisor.Supervisor.wait_for(waiting, [process], PATIENCE, (b"",)) == {process: b""}


@pytest.mark.parametrize(("length", "pieces"), [
    (1, [(0, 1)]), (8192, [(0, 8192)]), (8193, [(0, 8192), (8192, 1)]),
    (20_000, [(0, 8192), (8192, 8192), (16_384, 3616)]),
])
def test_pages_are_brought_in_piece_by_piece(monkeypatch, length, pieces):
    """Between two calls the handlers of signals run, so a large archive that comes from a disk starves no watchdog."""
    calls, start = [], 1 << 30
    monkeypatch.setattr(linux, "libc", SimpleNamespace(madvise=lambda *call: calls.append(call) or 0))
    monkeypatch.setattr(linux, "POPULATED_AT_ONCE", 8192)
    assert linux.populate(start, length)
    assert calls == [(start + at, size, linux.MADV_POPULATE_READ) for at, size in pieces]


def test_pages_that_cannot_be_brought_in(monkeypatch):
    answers = iter((0, -1))
    monkeypatch.setattr(linux, "libc", SimpleNamespace(madvise=lambda *_: next(answers)))
    monkeypatch.setattr(linux, "POPULATED_AT_ONCE", 8192)
    assert not linux.populate(1 << 30, 20_000)
