"""System calls that fail, by strace, in the real server: at its start, at a reload, and while it serves.

A start says in one sentence what is wrong, or does without. A reload that fails leaves all as it was. Meanwhile a
failure costs one connection at most; what a worker cannot survive costs that worker, and another one takes its place.
"""

import errno
import os
import re
import shutil
import signal

import pytest
from faults import UNCONFINED, Start, Tracer, needs_strace
from support import FILES, ROOT, Server, build_tar, request, wait_until
from test_damage import WITHOUT_MEMORY, WRITTEN
from test_reload import reload, settled
from test_workers import connections_by_worker, ends

pytestmark = needs_strace
SOCKETS = 4     # of a server with two workers: to each, and two that listen
SMALL = {name: FILES[name] for name in ("index.html", "next", "random.bin")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("small") / "small.tar", SMALL)


# --- at the start


@pytest.fixture
def begin(small, tmp_path):
    """begin(who, fault, *flags): a start in which that has failed. paths: only calls on these do."""
    def start(who, fault, *flags, paths=()):
        def attach(pid):
            return Tracer(pid, tmp_path / "calls", *fault.split(), paths=paths)
        begun = Start(who, tmp_path, attach, *UNCONFINED, *flags, small)
        assert begun.context.count >= len(fault.split()), f"{fault}: not all of it has failed"
        return begun
    return start


def sentence(begun, status):
    """The one line with which a start has ended so."""
    assert (begun.served, begun.line, begun.status) == (False, "", status), begun.said
    line, = begun.said.splitlines()
    return line.removeprefix("tarweb: ")


def words(fault):
    """What the system calls the error in `fault`."""
    return re.escape(os.strerror(getattr(errno, re.search("error=([A-Z]+)", fault)[1])))


NOT_LISTENING = r"cannot listen on 127\.0\.0\.1 port 0: "
REFUSED = {
    **{f"{call}:error={error}": NOT_LISTENING for call, error in (
        ("socket", "EMFILE"), ("socket", "ENOBUFS"), ("setsockopt", "ENOMEM"), ("bind", "EACCES"),
        ("listen", "EADDRINUSE"))},
    "pipe2:error=EMFILE": "", "socketpair:error=ENFILE": "cannot start a worker: ",
    "clone:error=EAGAIN": "cannot start a worker: ", "clone:error=ENOMEM": "cannot start a worker: ",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_p16_a_start_that_the_machine_refuses(begin, fault):
    assert re.fullmatch(REFUSED[fault] + words(fault), sentence(begin("parent", fault), 1))


@pytest.mark.parametrize("fault", [
    "openat:error=EMFILE", "openat:error=EIO", "mmap:error=ENOMEM", "read:error=EIO",
    "pread64:error=EIO", "%fstat:error=ESTALE:when=1", "%fstat:error=ESTALE:when=3",
])
def test_p16_an_archive_that_cannot_be_read(begin, small, fault):
    """It is named, unless it is memory that there is not enough of."""
    said = sentence(begin("parent", fault, paths=[small]), 2)
    assert ("mmap" in fault or said.startswith(f"{small} ")) and " cannot be " in said


@pytest.mark.parametrize("fault", [
    "openat:error=EINTR:when=1+2 read:error=EINTR:when=1+2 pread64:error=EINTR:when=1+2", "clone3:error=EAGAIN",
    "inotify_init1:error=EMFILE", "inotify_add_watch:error=ENOSPC madvise:error=EFAULT", "prlimit64:error=EPERM:when=2",
])
def test_p16_a_start_that_does_without(begin, fault):
    begun = begin("parent", fault)
    assert (begun.served, begun.status, begun.said) == (True, 0, "")


@pytest.mark.parametrize("fault", [
    "pipe2:error=EMFILE", "fcntl:error=EMFILE", "io_uring_setup:error=EMFILE", "io_uring_setup:error=ENOMEM",
    "io_uring_register:error=ENOMEM:when=1", "io_uring_register:error=EINVAL:when=2", "mmap:error=ENOMEM:when=1",
    "mmap:error=ENOMEM:when=3",
])
def test_p16_a_worker_that_cannot_start(begin, fault):
    assert re.search(f"{words(fault)}|enough memory", sentence(begin("worker", fault, "--no-liburing"), 1))


@pytest.mark.parametrize("fault", ["inotify_init1:error=EMFILE", "inotify_add_watch:error=ENOSPC madvise:error=ENOMEM"])
def test_p16_a_worker_that_does_without(begin, fault):
    begun = begin("worker", fault)
    assert (begun.served, begun.status, begun.said) == (True, 0, "")


# --- at a reload


@pytest.fixture(scope="module")
def live(tmp_path_factory, small):
    """live(): a server that serves a copy of `small`, the same as long as it lives."""
    folder, servers = tmp_path_factory.mktemp("live"), []
    path = folder / "live.tar"

    def one():
        if not servers or servers[-1].process.poll() is not None:
            shutil.copyfile(small, path)
            servers.append(Server(path, *UNCONFINED, "--threads", "2", log=folder / f"stderr-{len(servers)}"))
            servers[-1].path = path
        settled(servers[-1], 2, SOCKETS)
        return servers[-1]
    yield one
    servers[-1].stop()


def deploy(server):
    """Put another archive, with the same files, in the place of the one that is served."""
    new = server.path.with_suffix(".new")
    shutil.copyfile(server.path, new)
    new.rename(server.path)


FAILS = {
    **{f"openat:error={error}": "cannot be opened: " for error in ("EMFILE", "ENOMEM")},
    **{f"{call}:error=EIO": "cannot be read at byte [0-9]+: " for call in ("%fstat", "read", "pread64")},
    "mmap:error=ENOMEM": "cannot be brought into memory: ",
}
NO_WORKER = "its workers did not start"
WITHOUT_WORKERS = {
    "socketpair:error=EMFILE": "cannot start a worker: ", "socketpair:error=EMFILE:when=2": "cannot start a worker: ",
    "clone:error=EAGAIN": "cannot start a worker: ", "clone:error=ENOMEM:when=2": "cannot start a worker: ",
}


def reload_with(server, fault, record, paths=()):
    """What comes of a reload with that fault: nobody has noticed, and nothing is left of it after the next one."""
    before = settled(server, 2, SOCKETS)
    with server.connect() as kept, Tracer(server.pid, record, *fault.split(), paths=paths) as tracer:
        assert kept.ask("/next").status == 200
        deploy(server)
        said = reload(server)
        assert tracer.count >= len(fault.split()), f"{fault}: not all of it has failed"
        assert kept.ask("/next").body == FILES["next"]
    assert server.fetch("/next").status == 200
    assert reload(server).startswith("reloaded: ")
    assert settled(server, 2, SOCKETS) == before
    server.check()
    return said


@pytest.mark.parametrize("fault", FAILS)
def test_p14_a_reload_that_cannot_read_the_archive(live, tmp_path, fault):
    server = live()
    said = reload_with(server, fault, tmp_path / "calls", [server.path])
    assert re.match(r"reload failed, generation \d+ still serves: .*" + FAILS[fault], said)


@pytest.mark.parametrize("fault", WITHOUT_WORKERS)
def test_p14_a_reload_that_can_start_no_worker(live, tmp_path, fault):
    """None, or only one of two."""
    server = live()
    said = reload_with(server, fault, tmp_path / "calls")
    assert re.fullmatch(rf"reload failed, generation \d+ still serves: {NO_WORKER}", said)
    assert re.search(WITHOUT_WORKERS[fault] + words(fault), server.stderr())


@pytest.mark.parametrize("fault", ["clone3:error=EAGAIN", "inotify_init1:error=EMFILE read:error=EINTR:when=1+2",
                                   "madvise:error=ENOMEM inotify_add_watch:error=ENOSPC"])
def test_p16_a_reload_that_does_without(live, tmp_path, fault):
    assert reload_with(live(), fault, tmp_path / "calls").startswith("reloaded: ")


@pytest.mark.parametrize("fault", ["poll:error=ENOMEM:when=1", "wait4:error=EINTR:when=1", "read:error=EINTR:when=1"])
def test_p16_the_parent_goes_on(live, tmp_path, fault):
    """Whatever becomes of the signal, nobody is served any worse, and the next one counts."""
    server = live()
    workers = server.workers
    with Tracer(server.pid, tmp_path / "calls", fault) as tracer:
        os.kill(server.pid, signal.SIGCHLD)
        wait_until(lambda: tracer.count)
    assert server.fetch("/next").status == 200
    assert server.workers == workers
    assert reload(server).startswith("reloaded: ")
    server.check()


def test_p17_no_descriptor_for_the_one_that_takes_a_dead_ones_place(live, tmp_path):
    """It comes as soon as there is one; the other worker serves meanwhile."""
    server = live()
    victim, other = server.workers
    before = len(server.stderr())
    with Tracer(server.pid, tmp_path / "calls", "socketpair:error=EMFILE:when=1"):
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(server.workers) == 2 and victim not in server.workers)
    assert server.stderr()[before:].count("cannot start a worker: Too many open files") == 1
    assert other in server.workers
    assert server.fetch("/next").status == 200
    server.check()


# --- while it serves


def ask_all(server, count):
    """On a kept connection, and on one for each request."""
    with server.connect() as kept:
        for i in range(count):
            assert kept.ask(f"/next?{i}").body == server.fetch("/next").body == FILES["next"]


@pytest.mark.parametrize(("error", "flags"), [("EINTR", ()), ("EAGAIN", ()), ("EBUSY", ("--no-liburing",))])
def test_p16_the_ring_refuses_for_a_moment(start, small, tmp_path, error, flags):
    """A signal, no memory for an entry, an overflowing completion queue: io_uring_enter(2). Nobody notices."""
    server = start(small, *UNCONFINED, *flags)
    worker, = server.workers
    with Tracer(worker, tmp_path / "calls", f"io_uring_enter:error={error}:when=1..60+2") as tracer:
        ask_all(server, 30)
        wait_until(lambda: tracer.count == 30)
    assert server.workers == [worker]


@pytest.mark.parametrize("error", ["EBADR", "ENOMEM"])
def test_p17_a_ring_that_is_lost(start, small, tmp_path, error):
    """EBADR: completions have been dropped. The worker says so, and what it had is all that is lost."""
    server = start(small, *UNCONFINED, "--threads", "2")
    connections = connections_by_worker(server, 2)
    victim, other = server.workers
    with Tracer(victim, tmp_path / "calls", f"io_uring_enter:error={error}:when=3"):
        wait_until(lambda: ends(server))
        for client in connections[other]:
            assert client.ask("/next").body == FILES["next"]
    assert ends(server) == [(victim, "exit status 1", "another one takes its place in 0.1 s")]
    assert f"io_uring_enter: {os.strerror(getattr(errno, error))}" in server.stderr()
    for client in connections[victim]:
        assert client.rest() == b""
    wait_until(lambda: len(server.workers) == 2)
    ask_all(server, 8)
    server.check()


def test_p16_who_is_there_cannot_be_told(start, small, tmp_path):
    """getpeername(2), for the access log."""
    log = tmp_path / "log"
    server = start(small, *UNCONFINED, "--access-log", log)
    with Tracer(server.workers[0], tmp_path / "calls", "getpeername:error=ENOBUFS:when=1+2"):
        ask_all(server, 10)
        wait_until(lambda: log.read_text().count("\n") == 20)
    server.check()


def test_p16_what_has_become_of_the_archive_cannot_be_told(start, small, tmp_path):
    """It has been written to, and the worker cannot see its new length; what has not changed is served."""
    path = shutil.copyfile(small, tmp_path / "site.tar")
    server = start(path, *UNCONFINED)
    worker, = server.workers
    with server.connect() as kept, Tracer(worker, tmp_path / "calls", "lseek:error=EIO") as tracer:
        assert kept.ask("/next").status == 200
        with path.open("ab") as file:
            file.write(bytes(512))
        wait_until(lambda: tracer.count)
        assert kept.ask("/next").body == FILES["next"]
    wait_until(lambda: WRITTEN in server.stderr())
    server.check()


@pytest.mark.parametrize("error", ["EIO", "EOPNOTSUPP"])
def test_p16_what_is_in_memory_cannot_be_told(start, small, tmp_path, error):
    """preadv2(2) with RWF_NOWAIT: then everything may have to be read from the disk."""
    server = start(small, *UNCONFINED, program=("-c", WITHOUT_MEMORY, str(ROOT)))
    with Tracer(server.workers[0], tmp_path / "calls", f"preadv2:error={error}") as tracer, server.connect() as client:
        for name, body in SMALL.items():
            assert client.ask(f"/{name}").body == body
        assert tracer.count > 0
    server.check()


def test_p16_a_challenge_that_cannot_be_read(start_tls, small, tmp_path):
    """One for ACME, in the directory for them: 404, and as soon as it can be, its contents."""
    token = tmp_path / "abcdefghijklmnop"
    token.write_bytes(b"answer")
    server = start_tls(small, *UNCONFINED, "--redirect-http", "127.0.0.1:0", "--acme-dir", tmp_path)

    def answer():
        with server.connect_raw(server.redirect_port) as client:
            client.send(request(f"/.well-known/acme-challenge/{token.name}", connection="close"))
            return client.response()
    for fault in ("openat:error=EMFILE", "openat:error=EIO", "%fstat:error=EIO", "read:error=EIO"):
        with Tracer(server.workers[0], tmp_path / "calls", fault) as tracer:
            assert answer().status == 404
            assert tracer.count > 0
        assert answer().body == b"answer"
    server.check()
