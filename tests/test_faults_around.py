"""What a server stands on is missing, closed, full or too small: it says so in one sentence, or serves all the same.

And processes that die: nobody but those that they served notices.
"""

import os
import pty
import re
import resource
import signal
import struct
import subprocess
import time
from functools import partial

import pytest
from faults import (
    OBSERVABLE, UNCONFINED, OnASocket, Start, address_space, closing, library, limited, needs_mounts, without,
)
from support import FILES, PYTHON, ROOT, build_tar, request, wait_until
from test_damage import WITHOUT_MEMORY
from test_reload import Deployment, reload, reports, version_of
from test_workers import connections_by_worker, control_group, ends, join, metrics, status_port

SMALL = {name: FILES[name] for name in ("index.html", "next", "random.bin")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("small") / "small.tar", SMALL)


# --- what is not there

LIBRARIES = "liburing.so.2", "libssl.so.3", "libcrypto.so.3"


@pytest.fixture(params=["/proc", "/sys", "/dev", "/dev/urandom", "liburing.so.2", "all of these, and OpenSSL"])
def missing(request):
    """Paths at which there is nothing."""
    if request.param.startswith("all"):
        return ["/sys", "/dev", *map(library, LIBRARIES), "/proc"]
    return [request.param if request.param.startswith("/") else library(request.param)]


@needs_mounts
def test_p16_it_serves_and_reloads_without(start, small, missing):
    server = start(small, python=[*without(*missing), PYTHON])
    for name, body in SMALL.items():
        assert server.fetch(f"/{name}").body == body
    assert reload(server).startswith("reloaded: ")
    assert server.fetch("/next").body == FILES["next"]
    server.check()


@needs_mounts
def test_p16_an_archive_is_cut_short_where_there_is_no_proc(start, small, tmp_path):
    """Nothing tells the worker then; the kernel cuts responses off all the same."""
    archive = build_tar(tmp_path / "site.tar", {"next": FILES["next"], "large.bin": FILES["large.bin"]})
    server = start(archive, python=[*without("/proc"), PYTHON])
    worker, = server.workers
    os.truncate(archive, 1 << 20)
    with server.connect() as client:
        client.send(request("/large.bin"))
        received = client.rest()
        assert len(received) < len(FILES["large.bin"])
    assert server.fetch("/next").body == FILES["next"]
    assert server.workers == [worker]


@needs_mounts
@pytest.mark.parametrize("name", ["libssl.so.3", "libcrypto.so.3"])
def test_p16_openssl_is_missed_only_where_it_is_needed(small, pairs, name, tmp_path):
    ended = subprocess.run([*without(library(name)), PYTHON, str(ROOT / "tarweb.py"), "--listen", "127.0.0.1:0",
                            *map(str, pairs["p256"].flags), str(small)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"tarweb: TLS needs OpenSSL 3, and lib\w+\.so\.3 is not there: .*\n", ended.stderr)


# --- standard input, output and error


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_p16_descriptors_that_are_closed(small, tmp_path, closed):
    """Nothing else takes their numbers: what is written there goes to nobody."""
    with OnASocket(small, *OBSERVABLE, "--access-log", "-", folder=tmp_path, preexec_fn=closing(*closed)) as server:
        assert server.ask("/next").endswith(FILES["next"])
        for pid in (server.pid, *server.workers):
            where = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)]
            assert set(where) <= {"/dev/null", str(server.log)}
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: 2 in closed or reports(server))
        assert server.ask("/next").endswith(FILES["next"])


def full():
    return os.open("/dev/full", os.O_WRONLY)


def without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def hung_up():
    """A terminal that is no more: a write fails with EIO."""
    master, slave = pty.openpty()
    os.close(master)
    return slave


@pytest.mark.parametrize(("which", "kind"), [
    ("stdout", full), ("stdout", without_reader), ("stdout", hung_up), ("stderr", full), ("stderr", without_reader)])
def test_p16_output_that_cannot_be_written(small, tmp_path, which, kind):
    """Its messages are lost, the lines of an access log are counted; pages are served."""
    to, status = kind(), tmp_path / "status"
    with OnASocket(small, "--access-log", "-", "--status", f"unix:{status}", folder=tmp_path, **{which: to}) as server:
        os.close(to)
        for _ in range(3):
            assert server.ask("/next").endswith(FILES["next"])
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: which == "stderr" or reports(server))
        assert server.ask("/next").endswith(FILES["next"])
        if which == "stdout":
            wait_until(lambda: server.stderr().count("access log: ") == 2)     # once for each generation
            wait_until(lambda: b"\ntarweb_log_lines_dropped_total 4\n" in server.ask("/metrics", status))


def test_p16_a_log_that_cannot_be_written(start, small):
    server = start(small, "--access-log", "/dev/full", "--status", "127.0.0.1:0")
    port = status_port(server)
    for _ in range(5):
        assert server.fetch("/next").status == 200
    wait_until(lambda: metrics(port)["log_lines_dropped_total"] == 5)
    assert server.stderr().count("No space left on device") == 1


def test_p16_a_log_that_may_not_grow(start, small, tmp_path):
    """RLIMIT_FSIZE: EFBIG, and a signal that is of no consequence."""
    log = tmp_path / "log"
    server = start(small, *UNCONFINED, "--access-log", log, "--status", "127.0.0.1:0")
    port, worker = status_port(server), server.workers[0]
    with limited(worker, resource.RLIMIT_FSIZE, 300):
        for i in range(20):
            assert server.fetch(f"/next?{i}").status == 200
        wait_until(lambda: metrics(port)["log_lines_dropped_total"] > 0)
        assert log.stat().st_size == 300
    assert server.fetch("/next?again").status == 200
    wait_until(lambda: "/next?again" in log.read_text())
    assert (server.workers[0], server.stderr().count("File too large")) == (worker, 1)


# --- limits


def outcome(begun):
    """Fail unless a start has come to one of the two good ends; gives which."""
    if begun.served:
        assert begun.status == 0, begun.said
        return "served"
    assert begun.status in (1, 2) and begun.line == "", begun.said
    assert re.fullmatch("tarweb: .+\n", begun.said), begun.said
    return "refused"


# As root would, without the privilege to raise a limit.
UNPRIVILEGED = "setpriv", "--bounding-set", "-sys_resource", PYTHON


def starts(who, folder, tar, limit, amounts):
    """What comes of starts under a limit, for each of the amounts."""
    command = UNPRIVILEGED if os.geteuid() == 0 else (PYTHON,)
    return [outcome(Start(who, folder, partial(limit, amount), tar, command=command)) for amount in amounts]


def few_descriptors(count, pid):
    return limited(pid, resource.RLIMIT_NOFILE, count, count)       # it goes by the hard limit


def little_memory(more, pid):
    return limited(pid, resource.RLIMIT_AS, address_space(pid) + (more << 10))


@pytest.mark.parametrize("who", ["parent", "worker"])
def test_p16_a_start_with_few_descriptors(small, tmp_path, who):
    found = starts(who, tmp_path, small, few_descriptors, (4, 9, 14, 40))
    assert found == sorted(found) and set(found) == {"refused", "served"}


@pytest.mark.parametrize("who", ["parent", "worker"])
def test_p16_a_start_with_little_memory(small, tmp_path, who):
    """So many KiB more than the program has before it begins."""
    found = starts(who, tmp_path, small, little_memory, (0, 1300, 2500, 80_000))
    assert (found[0], found[-1]) == ("refused", "served")


def open_files(pid):
    """One more than its highest descriptor."""
    return 1 + max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))


RELOADS = {
    "descriptors": (resource.RLIMIT_NOFILE, lambda pid, more: open_files(pid) + more, range(0, 12, 2)),
    "memory": (resource.RLIMIT_AS, lambda pid, more: address_space(pid) + (more << 10),
               (0, 200, 500, 2000, 8000, 80_000)),
}


@pytest.mark.parametrize("lack", RELOADS)
def test_p14_a_reload_with_too_little(start, tmp_path, lack):
    """More each time, until it is enough; a reload that fails changes nothing."""
    what, limit, amounts = RELOADS[lack]
    deployment = Deployment(tmp_path)
    server, served, found = start(deployment.path, *OBSERVABLE, "--threads", "2"), 1, []
    for version, more in enumerate(amounts, 2):
        deployment.deploy(version)
        with limited(server.pid, what, limit(server.pid, more)):
            found.append(reload(server).split()[1])
        served = version if found[-1].startswith("gen") else served
        assert version_of(server.fetch("/small.txt").body) == served
        server.check()
    assert set(found) == {"failed,", "generation"}, found
    assert reload(server).startswith("reloaded: ")
    assert version_of(server.fetch("/small.txt").body) == version


def test_p16_a_worker_that_can_have_no_more_memory(start, small):
    """All that it needs for requests it has from the beginning, those included that it has to remember."""
    server = start(small, *UNCONFINED)
    worker, = server.workers
    with limited(worker, resource.RLIMIT_AS, address_space(worker)), server.connect() as client:
        for batch in range(50):
            client.send(*(request(f"/next?{batch}-{i}", X="x" * 300) for i in range(40)))
            for _ in range(40):
                assert client.response().body == FILES["next"]
    assert server.workers == [worker]
    server.check()


# --- threads of the kernel's


@pytest.fixture
def pids():
    """A control group that counts processes and threads."""
    with control_group("pids") as group:
        yield group


def test_p16_the_kernel_can_start_no_thread(pids, start, small):
    """io_uring has one for a file that may not be in memory, and for the end of a response to a request that is not
    read to its end: that costs these connections at most."""
    server = start(small, program=("-c", WITHOUT_MEMORY, str(ROOT)), preexec_fn=partial(join, pids))
    worker, = server.workers
    with server.connect() as kept:
        assert kept.ask("/next").status == 200
        (pids / "pids.max").write_text((pids / "pids.current").read_text())
        with server.connect() as client:
            client.send(request("/random.bin"))
            assert client.rest() == b""
        with server.connect() as client:
            client.send(request("/next", "POST", content_length=200_000))
            assert client.response("POST").status == 405
        assert kept.ask("/next").body == FILES["next"]
        (pids / "pids.max").write_text("max")
        assert kept.ask("/random.bin").body == FILES["random.bin"]
    assert server.workers == [worker]
    server.check()


# --- time

# The real program, whose clock is so many seconds ahead as a file says.
CLOCK = """
import mmap, struct, sys, time
sys.path.insert(0, sys.argv.pop(1))
with open(sys.argv.pop(1), "rb") as file:
    ahead = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
def moved(function, unit):
    return lambda: function() + unit * struct.unpack("=q", ahead)[0]
time.time, time.time_ns = moved(time.time, 1), moved(time.time_ns, 10 ** 9)
import tarweb
sys.exit(tarweb.main())
"""
YEAR = 365 * 86400


@pytest.mark.parametrize("tls", [False, True])
def test_p16_the_clock_jumps(start, start_tls, small, tmp_path, tls):
    """Date follows; nothing waits for a time that has been or will be long gone."""
    path, log = tmp_path / "ahead", tmp_path / "log"
    path.write_bytes(bytes(8))
    begin = partial(start_tls, small, "--ktls", "off") if tls else partial(start, small)
    server = begin("--access-log", log, program=("-c", CLOCK, str(ROOT), str(path)))
    for years in (40, -3):
        with server.connect() as kept, path.open("r+b") as file:
            file.write(struct.pack("=q", years * YEAR))
            file.flush()
            year = str(time.gmtime(time.time() + years * YEAR).tm_year)
            wait_until(lambda: year in kept.ask("/next")["Date"])       # noqa: B023
        assert reload(server).startswith("reloaded: ")
        assert year in server.fetch("/next")["Date"]
        wait_until(lambda: f"/{year}:" in log.read_text())              # noqa: B023
    server.check()


# --- deaths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSYS])
def test_p17_a_worker_that_dies(start, small, number):
    """Another one takes its place. What the others have goes on."""
    no_core = partial(resource.setrlimit, resource.RLIMIT_CORE, (0, 0))
    server = start(small, *OBSERVABLE, "--threads", "2", preexec_fn=no_core)
    connections = connections_by_worker(server, 2)
    victim, other = server.workers
    os.kill(victim, number)
    for client in connections[other]:
        assert client.ask("/random.bin").body == FILES["random.bin"]
    assert all(client.rest() == b"" for client in connections[victim])
    wait_until(lambda: len(server.workers) == 2 and ends(server))
    (pid, how, then), = ends(server)
    assert (pid, how.split(",")[0], then.endswith("another one takes its place in 0.1 s")) == (
        victim, signal.Signals(number).name, True)
    connections_by_worker(server, 1)
    assert other in server.workers
    server.check()
