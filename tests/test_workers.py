"""Workers and listeners, from outside: who serves, who takes the place of those that die, and where to reach them."""

import contextlib
import errno
import os
import random
import re
import resource
import signal
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import FILES, PATIENCE, PYTHON, ROOT, TARWEB, Client, request, run_tarweb, wait_until
from test_lifecycle import refused, running

import supervisor as supervisor_module
from options import parse_arguments
from supervisor import Process, Supervisor

CPUS = os.sched_getaffinity(0)
MANY = 10_000           # connections
SOURCES = [f"127.0.0.{i}" for i in range(2, 6)]     # an address has too few ports for so many
ROUNDS = 6              # of killing a worker under load
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def status_port(server):
    """Read where its status listener is, from the lines behind the first one."""
    for line in iter(lambda: server.read_line(PATIENCE), ""):
        if found := re.search(r"status on http://127\.0\.0\.1:(\d+)/", line):
            return int(found[1])
    raise AssertionError("no line tells where the status listener is")


def metrics(port):
    """{name with its labels: number}, as the status listener tells."""
    with Client(("127.0.0.1", port)) as client:
        client.send(request("/metrics", connection="close"))
        text = client.response().body.decode()
    return {name: float(value) for name, value in re.findall(r"^tarweb_(\S+) (\S+)$", text, re.M)}


def inode_of(server, client):
    """That of the server's end of a connection, as proc_net_tcp(5) has it."""
    port = client.sock.getsockname()[1]
    row = re.search(rf": \w+:{server.port:04X} \w+:{port:04X} 01 .*", Path("/proc/net/tcp").read_text())
    assert row, "there is no such connection"
    return int(row[0].split()[9])


def holder(server, client):
    """The worker that a connection of `client` is with; None while there is none."""
    link = f"socket:[{inode_of(server, client)}]"
    for pid in server.workers:
        with contextlib.suppress(OSError):
            if link in {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}:
                return pid
    return None


def connections_by_worker(server, each, workers=None):
    """{pid: at least `each` connections that have asked once}, of the first `workers` children, or of all."""
    found = {pid: [] for pid in server.workers[:workers]}
    while min(map(len, found.values())) < each:
        client = server.connect()
        assert client.ask("/next").body == FILES["next"]
        found[holder(server, client)].append(client)
    return found


def ends(server):
    """[(pid, how it ended, what is done about it)] for the workers that have died."""
    return [(int(pid), how, then) for pid, how, then in
            re.findall(r"^tarweb: worker (\d+) ended: (.*?); (.*)$", server.stderr(), re.M)]


# --- how many, and where -------------------------------------------------------------------------------------------


def test_auto_is_one_for_each_cpu(start, site):
    assert len(start(site, "--threads", "auto").workers) == len(CPUS)


def test_auto_heeds_the_cpus_that_are_allowed(start, site):
    server = start(site, "--threads", "auto", preexec_fn=lambda: os.sched_setaffinity(0, {min(CPUS)}))
    assert len(server.workers) == 1


def test_all_workers_get_connections(start, site):
    server = start(site, "--threads", "3")
    for clients in connections_by_worker(server, 3).values():
        for client in clients:
            assert client.ask("/next").body == FILES["next"]
            client.close()


def test_cpu_affinity(start, site):
    """One CPU for each, in turn, in later generations too."""
    server = start(site, "--threads", "2", "--cpu-affinity")
    expected = sorted({cpu} for cpu in sorted(CPUS)[:2]) if len(CPUS) > 1 else [CPUS, CPUS]
    assert [os.sched_getaffinity(pid) for pid in server.workers] == expected
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: " in server.stderr() and len(server.workers) == 2)
    assert [os.sched_getaffinity(pid) for pid in server.workers] == expected
    assert os.sched_getaffinity(server.pid) == CPUS


def test_without_cpu_affinity_they_go_where_they_like(start, site):
    assert [os.sched_getaffinity(pid) for pid in start(site, "--threads", "2").workers] == [CPUS, CPUS]


# --- those that die ------------------------------------------------------------------------------------------------


class Askers:
    """Clients that keep their connections, and make others only where the worker behind one has been killed by us."""

    def __init__(self, server, count):
        self.server = server
        self.killed, self.kills = set(), 0
        self.answers, self.failures = 0, []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(PATIENCE)

    def kill(self, pid):
        self.kills += 1
        self.killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def run(self):
        while not self.stopped.is_set() and not self.failures:
            kills, pid = self.kills, None
            try:
                with self.server.connect() as client:
                    while not self.stopped.is_set():
                        assert client.ask("/next").body == FILES["next"]
                        self.answers += 1
                        pid = pid or holder(self.server, client)
                        time.sleep(0.002)
            except (OSError, AssertionError) as error:
                if pid not in self.killed and not (pid is None and self.kills > kills):
                    self.failures.append(f"a connection with worker {pid}: {error!r}")


def test_p17_killed_workers_are_replaced_and_others_do_not_notice(start, site):
    server = start(site, "--threads", "2", "--status", "127.0.0.1:0")
    port = status_port(server)
    status_process = server.workers[2]
    askers = Askers(server, 8)
    try:
        for number in range(ROUNDS):
            victim = next(pid for pid in server.workers[number % 2:] if pid != status_process)
            answers = askers.answers
            askers.kill(victim)
            wait_until(lambda: len(ends(server)) == number + 1 and len(server.workers) == 3)    # noqa: B023
            wait_until(lambda: askers.answers > answers + 100)                                  # noqa: B023
        askers.stop()
        assert askers.failures == []
    finally:
        askers.stop()
    assert [(how, then.startswith("another one takes its place")) for _, how, then in ends(server)] == [
        ("SIGKILL", True)] * ROUNDS
    assert {pid for pid, _, _ in ends(server)} == askers.killed
    assert metrics(port)["worker_restarts_total"] == ROUNDS
    assert metrics(port)['workers{state="serving"}'] == 2
    wait_until(lambda: metrics(port)['responses_total{class="2xx"}'] > 0)


def test_who_comes_while_there_is_no_worker_waits_for_the_next(start, site):
    """The listening sockets are the supervisor's."""
    server = start(site)
    for number in range(4):                         # the next one comes in 0.8 s
        wait_until(lambda: server.workers)
        os.kill(server.workers[0], signal.SIGKILL)
        wait_until(lambda: len(ends(server)) == number + 1)     # noqa: B023
    clients = [server.connect() for _ in range(20)]
    for client in clients:
        client.send(request("/next"))
    assert server.workers == [], "it came too soon for this to mean anything"
    for client in clients:
        with client:
            assert client.response().body == FILES["next"]


def test_one_that_keeps_dying_comes_back_later_and_later(start, site):
    server = start(site, "--threads", "2")
    _, other = server.workers
    for number in range(4):
        victim, = set(server.workers) - {other}
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(ends(server)) == number + 1 and len(server.workers) == 2)    # noqa: B023
    assert [then for _, _, then in ends(server)] == [
        f"another one takes its place in {seconds} s" for seconds in (0.1, 0.2, 0.4, 0.8)]
    assert other in server.workers
    os.kill(other, signal.SIGKILL)
    wait_until(lambda: len(ends(server)) == 5 and len(server.workers) == 2)
    assert ends(server)[-1][2] == "another one takes its place in 0.1 s", "each has a while of its own"
    assert server.fetch("/next").status == 200


def test_who_dies_while_it_waits_to_be_replaced_does_not_hinder_the_end(start, site):
    server = start(site, "--threads", "2")
    for pid in server.workers:
        os.kill(pid, signal.SIGKILL)
    server.signal()
    server.wait(10)


def test_a_reload_replaces_the_dead_at_once(start, site):
    server = start(site)
    for number in range(6):                         # the next one would come after 3.2 s
        wait_until(lambda: server.workers)
        os.kill(server.workers[0], signal.SIGKILL)
        wait_until(lambda: len(ends(server)) == number + 1)     # noqa: B023
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: " in server.stderr())
    assert len(server.workers) == 1
    assert server.fetch("/next").status == 200


def test_a_retired_worker_that_dies_is_not_replaced(start, site):
    server = start(site)
    old, = server.workers
    with server.connect() as client:
        assert client.ask("/next").status == 200
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded: " in server.stderr())
        assert len(server.workers) == 2
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: len(server.workers) == 1)
    wait_until(lambda: "which was to end, ended: SIGKILL" in server.stderr())
    assert ends(server) == []
    assert server.fetch("/next").status == 200


def test_p17_the_status_process_is_replaced(start, site):
    server = start(site, "--status", "127.0.0.1:0")
    port = status_port(server)
    serving, status = server.workers
    os.kill(status, signal.SIGKILL)
    wait_until(lambda: len(ends(server)) == 1 and len(server.workers) == 2)
    assert metrics(port)["worker_restarts_total"] == 1
    assert server.workers[0] == serving


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_workers_end_with_their_supervisor(start, site, number):
    """Those that retire, and the status process, too. What they are sending they still send."""
    server = start(site, "--threads", "2", "--status", "127.0.0.1:0")
    with server.connect() as idle, server.connect(rcvbuf=32_768) as reader:
        assert idle.ask("/next").status == 200
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded: " in server.stderr())
        reader.send(request("/large.bin"))
        reader.pending = reader.sock.recv(1000)
        family = server.workers
        assert len(family) > 3
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE) == -number
        assert idle.at_end()
        assert reader.response().body == FILES["large.bin"]
        wait_until(lambda: not any(map(running, family)))
    assert refused(server.port)


# --- many connections ----------------------------------------------------------------------------------------------


@pytest.fixture
def many_files():
    """Let this process open more files than MANY."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 1000, max(MANY + 1000, before[1])))
    except (OSError, ValueError):
        pytest.skip(f"the limit of open files ({before[1]}) does not allow for {MANY} connections")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def open_from(source, port):
    sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.bind((source, 0))
    sock.connect(("127.0.0.1", port))
    return sock


def test_p09_ten_thousand_connections_with_two_workers(start, site, many_files):
    server = start(site, "--threads", "2", "--max-connections", str(MANY), "--status", "127.0.0.1:0")
    port, asked = status_port(server), request("/next")
    sockets = [open_from(SOURCES[i % len(SOURCES)], server.port) for i in range(MANY)]
    try:
        for _ in range(2):
            for sock in sockets:
                sock.sendall(asked)
            assert all(sock.recv(4096).endswith(b"\r\n\r\n" + FILES["next"]) for sock in sockets)
        wait_until(lambda: metrics(port)['connections{state="idle"}'] == MANY)
        found = metrics(port)
        assert found["connections_accepted_total"] == MANY
        assert found["connections_reclaimed_total"] == found["accept_errors_total"] == 0
        assert found["ring_overflows_total"] == 0
        server.check()
    finally:
        for sock in sockets:
            sock.close()
    wait_until(lambda: metrics(port)['connections{state="idle"}'] == 0)
    assert server.fetch("/next").status == 200


# --- accept fails --------------------------------------------------------------------------------------------------


def test_p16_no_descriptor_for_a_new_connection(start, site):
    """EMFILE: those that are there are served, those that wait are let in once that is possible.

    io_uring looks at the limit when an accept is armed, and one is armed for each connection where few are allowed.
    """
    ours = ("--user", "root") if os.geteuid() == 0 else ()      # whose limits we may change
    server = start(site, "--status", "127.0.0.1:0", "--max-connections", "100", *ours)
    port, worker = status_port(server), server.workers[0]
    limit = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    there = [server.connect() for _ in range(3)]
    for client in there:
        assert client.ask("/next").status == 200
    highest = max(int(fd) for fd in os.listdir(f"/proc/{worker}/fd"))
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 1, limit[1]))
    waiting = [server.connect() for _ in range(8)]
    for client in waiting:
        client.send(request("/next"))
    wait_until(lambda: "accept: EMFILE" in server.stderr())
    for client in there:
        assert client.ask("/next").body == FILES["next"]
    wait_until(lambda: metrics(port)["accept_errors_total"] > 0)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, limit)
    for client in waiting:
        assert client.response().body == FILES["next"]
        client.close()
    for client in there:
        assert client.ask("/next").body == FILES["next"]
        client.close()
    assert server.workers[0] == worker


@contextlib.contextmanager
def control_group(controller):
    """A control group of version 1 of our own. Whoever is put into it (`join`) has to end before it."""
    group = Path("/sys/fs/cgroup") / controller / f"tarweb-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").read_text()
    except OSError as error:
        pytest.skip(f"no control group of version 1 for {controller} can be made here: {error.strerror}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def join(group):
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def memory():
    with control_group("memory") as group:
        yield group


@pytest.fixture
def pids():
    with control_group("pids") as group:
        yield group


def exhaust(group):
    """Let there be no more memory than is in use; who needs more has to wait, or is told so by the kernel."""
    (group / "memory.oom_control").write_text("1")
    for _ in range(100):                # it does not go below what is in use, which changes
        with contextlib.suppress(OSError):
            (group / "memory.limit_in_bytes").write_text((group / "memory.usage_in_bytes").read_text())
            return
    pytest.skip("what the group uses cannot be made its limit")


def test_p16_no_memory_for_a_new_connection(memory, start, site):
    """ENFILE or ENOMEM, by what cannot be had; the worker waits for memory too, and goes on once there is some."""
    server = start(site, "--max-connections", "2000", preexec_fn=lambda: join(memory))
    workers, there = server.workers, [server.connect() for _ in range(5)]
    for client in there:
        assert client.ask("/next").status == 200
    try:
        exhaust(memory)
        waiting = [server.connect() for _ in range(400)]
        for client in waiting:
            client.send(request("/next"))
        wait_until(lambda: "under_oom 1" in (memory / "memory.oom_control").read_text())
    finally:
        (memory / "memory.limit_in_bytes").write_text("-1")
    answered = 0
    for client in waiting:              # for want of memory the kernel may have dropped one or the other
        with client, contextlib.suppress(ConnectionError):
            answered += client.response().body == FILES["next"]
    assert answered > 350
    for client in there:
        assert client.ask("/next").body == FILES["next"]
        client.close()
    assert server.workers == workers
    server.check()
    if not re.search(r"accept: E(NFILE|NOMEM|NOBUFS)", server.stderr()):
        pytest.skip("all has gone well, but no accept has failed for want of memory")


def test_no_process_for_a_new_worker(pids, start, site):
    """Neither for those of a new generation, nor for one that takes a dead one's place, until there can be another."""
    server = start(site, "--threads", "2", preexec_fn=lambda: join(pids))
    workers = server.workers
    (pids / "pids.max").write_text((pids / "pids.current").read_text())
    try:
        server.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "reload failed, generation 1 still serves: its workers did not start" in server.stderr())
        assert "cannot start a worker: " in server.stderr()
        wait_until(lambda: server.workers == workers)
        assert server.fetch("/next").status == 200
        (pids / "pids.max").write_text("1")
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: server.workers == workers[1:])
        wait_until(lambda: server.stderr().count("cannot start a worker: ") > 2)
    finally:
        (pids / "pids.max").write_text("max")
    wait_until(lambda: len(server.workers) == 2)
    for clients in connections_by_worker(server, 1).values():
        for client in clients:
            client.close()


# --- listeners -----------------------------------------------------------------------------------------------------


def ask_unix(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        sock.sendall(request("/next", connection="close"))
        received = b""
        while piece := sock.recv(1 << 16):
            received += piece
    return received.partition(b"\r\n\r\n")[2]


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


def test_every_listener_is_told_and_answers(start, site, tmp_path):
    path = tmp_path / "socket"
    hosts = ["127.0.0.1", "127.0.0.2"] + ["::1"] * socket.has_dualstack_ipv6()
    flags = [flag for host in hosts for flag in ("--listen", f"[{host}]:0" if ":" in host else f"{host}:0")]
    server = start(site, *flags, "--listen", f"unix:{path}", "--threads", "2", listen=None)
    found = [(hosts[0], server.port)]
    for host in hosts[1:]:
        line = server.read_line(PATIENCE)
        match = re.fullmatch(r"tarweb: also http://(\[[^]]*\]|[^:]*):(\d+)/\n", line)
        assert match and match[1].strip("[]") == host, line
        found.append((host, int(match[2])))
    assert server.read_line(PATIENCE) == f"tarweb: also unix:{path}\n"
    assert len({port for _, port in found} - {0}) == len(hosts)
    for address in found:
        for _ in range(8):
            with Client(address) as client:
                assert client.ask("/next").body == FILES["next"], address
    assert all(ask_unix(path) == FILES["next"] for _ in range(8))
    server.signal()
    assert server.wait().count("\n") == 1               # what has been given up: see test_sandbox.py


def test_ipv4_alone(start, site):
    server = start(site, listen="0.0.0.0:0")
    assert server.fetch("/next").status == 200
    if socket.has_dualstack_ipv6():
        with pytest.raises(ConnectionRefusedError):
            Client(("::1", server.port))


def free_port():
    """A port that is nobody's, below those that the kernel gives to clients (ip_local_port_range in ip(7))."""
    while True:
        address = "", random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True):
            return address[1]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6")
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("hosts", [("0.0.0.0", "[::]"), ("[::]", "0.0.0.0"), ("127.0.0.1", "[::]")])
def test_ipv4_and_ipv6_at_one_port(start, site, hosts, threads):
    """As one writes it for nginx: `listen 80; listen [::]:80`."""
    port = free_port()
    first, second = (f"{host}:{port}" for host in hosts)
    start(site, "--listen", second, "--threads", threads, listen=first)
    for address in ("127.0.0.1", "::1"):
        with Client((address, port)) as client:
            assert client.ask("/next").body == FILES["next"]


# The real program, on a machine without IPv6 (ipv6.disable=1), whose default port is free.
WITHOUT_IPV6 = """
import errno, os, socket, sys
sys.path.insert(0, sys.argv.pop(1))
class Socket(socket.socket):
    def __init__(self, family=socket.AF_INET, *more, **named):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *more, **named)
socket.socket = Socket
import listeners, tarweb
default = listeners.Listeners.open_default
listeners.Listeners.open_default = lambda self, port: default(self, 0)
sys.exit(tarweb.main())
"""


def test_without_ipv6_it_listens_on_ipv4(start, site):
    server = start(site, listen=None, program=("-c", WITHOUT_IPV6, str(ROOT)))
    assert server.fetch("/next").body == FILES["next"]
    with socket.socket() as sock, pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        sock.bind(("0.0.0.0", server.port))


@pytest.mark.parametrize(("mode", "becomes"), [("", 0o660), (",600", 0o600), (",0666", 0o666)])
def test_a_unix_socket_has_its_mode_and_goes_at_the_end(start, site, tmp_path, mode, becomes):
    path = tmp_path / "socket"
    server = start(site, "--listen", f"unix:{path}{mode}", preexec_fn=lambda: os.umask(0o077))
    assert mode_of(path) == becomes
    assert ask_unix(path) == FILES["next"]
    server.stop()
    assert not path.exists()


def test_a_unix_socket_alone(site, tmp_path):
    """The first line tells where, also when there is no port."""
    path = tmp_path / "socket"
    with subprocess.Popen([PYTHON, str(TARWEB), "--listen", f"unix:{path}", str(site)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert f": unix:{path} serves " in process.stdout.readline()
            assert ask_unix(path) == FILES["next"]
            process.terminate()
            assert process.communicate(timeout=PATIENCE) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 0
    assert not path.exists()


def test_a_socket_that_was_left_behind_is_replaced(start, site, tmp_path):
    path = tmp_path / "socket"
    first = start(site, "--listen", f"unix:{path}")
    first.process.kill()
    first.process.wait()
    wait_until(lambda: not can_connect(path))
    assert path.is_socket()
    server = start(site, "--listen", f"unix:{path}")
    assert ask_unix(path) == FILES["next"]
    server.stop()
    assert not path.exists()


def can_connect(path):
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def test_a_socket_in_use_is_refused_and_left_alone(start, site, tmp_path):
    path = tmp_path / "socket"
    server = start(site, "--listen", f"unix:{path}")
    ended = run_tarweb("--listen", f"unix:{path}", site)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"tarweb: .*{re.escape(str(path))}.* in use .*\n", ended.stderr)
    assert ask_unix(path) == FILES["next"]
    server.stop()


def test_a_file_is_not_taken_for_a_socket(site, tmp_path):
    path = tmp_path / "notes"
    path.write_text("keep me")
    ended = run_tarweb("--listen", f"unix:{path}", site)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"tarweb: .*{re.escape(str(path))}.*\n", ended.stderr)
    assert path.read_text() == "keep me"


def test_nowhere_to_put_a_socket(site, tmp_path):
    ended = run_tarweb("--listen", f"unix:{tmp_path}/no/such/folder", site)
    assert ended.returncode in (1, 2)
    assert re.fullmatch(r"tarweb: .*No such file or directory\n", ended.stderr)


def test_there_are_no_more_workers_than_1024(caplog):
    """Those that still send what they were asked for before many reloads count, too."""
    supervisor = Supervisor(parse_arguments(["site.tar"], ""), *[None] * 6)
    supervisor.processes = {pid: Process(pid, 0, None, None, -1) for pid in range(1024)}
    assert supervisor.fork(None, 0) is None
    assert caplog.messages == ["too many workers are still finishing what they were sending: no new one"]
    for end in (supervisor.pipe, supervisor.wake_end):
        os.close(end)


def test_the_parent_lets_secrets_of_session_tickets_go_with_time(monkeypatch):
    """It makes no tickets, but workers that it forks later get what it knows; it looks each hour."""
    waited, told = [], []
    poller = SimpleNamespace(register=lambda *_: None, poll=waited.append)
    monkeypatch.setattr(supervisor_module, "select", SimpleNamespace(poll=lambda: poller, POLLIN=1))
    supervisor = Supervisor(parse_arguments(["site.tar"], ""), *[None] * 6)
    tickets = SimpleNamespace(advance=told.append)
    supervisor.generation = SimpleNamespace(inotify=-1, tls=SimpleNamespace(tickets=tickets), in_flux=lambda: False)
    supervisor.report = lambda ready: None
    before = time.time()
    supervisor.wait()
    assert 0 < waited[0] < 1000 * 3600 + 2      # a millisecond more, as a float
    assert before <= told[0] <= time.time()
    for end in (supervisor.pipe, supervisor.wake_end):
        os.close(end)
