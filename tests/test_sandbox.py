"""What processes give up, from outside: what the kernel says of them; what happens to a worker that does something
else; and that a server does not serve where one thing has not been given up. strace(1) plays the kernels that lack
something, or that say yes and do nothing."""

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest
from support import (
    FILES, PATIENCE, PYTHON, ROOT, TARWEB, Client, build_tar, children, request, run_tarweb, wait_until,
)

import linux
import sandbox
from sandbox import supported
from uring import PolledRing, Ring

NOBODY = 65534
INTRUDER = (str(ROOT / "tests" / "intruder.py"),)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
filters = pytest.mark.skipif(not supported(), reason="no filters of system calls for this machine")


def landlock_is_here():
    with contextlib.suppress(OSError):
        return sandbox.libc_call("syscall", sandbox.SYS_CREATE_RULESET, 0, 0, sandbox.CREATE_RULESET_VERSION) > 0
    return False


landlock = pytest.mark.skipif(not landlock_is_here(), reason="this kernel has no Landlock")


def status(pid):
    """/proc/PID/status as a dictionary."""
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def capabilities(pid):
    found = status(pid)
    return {name: int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}


def traced(*rules):
    """A Python that strace starts; the server is the process that was started, not strace (-D)."""
    strace = shutil.which("strace") or pytest.skip("needs strace")
    return [strace, "-D", "-f", "-qq", "-o", "/dev/null", "-e", "signal=none",
            *[word for rule in rules for word in ("-e", rule)], PYTHON]


def refused(site, *rules, flags=()):
    """What a server says that does not start under these rules of strace's, and its exit status."""
    ended = subprocess.run([*traced(*rules), str(TARWEB), "--listen", "127.0.0.1:0", *flags, str(site)],
                           capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in ended.stderr and not ended.stdout
    return ended.stderr, ended.returncode


def status_answers(server):
    port = int(re.search(r"status on http://127.0.0.1:(\d+)/", server.read_line(PATIENCE))[1])
    with Client(("127.0.0.1", port)) as client:
        return client.ask("/healthz").status == 200


def announced(server):
    return next(line for line in iter(lambda: server.read_line(PATIENCE), "") if "locked down" in line)


# --- P1: before the first byte

HELD = """if True:
    import os, sys
    sys.path.insert(0, sys.argv.pop(1))
    import sandbox, tarweb
    put_filter, put = sandbox.put_filter, []
    def held(program):
        put.append(program)
        if len(put) == 3:                   # the parent's, the one that is tried, the one that kills
            os.read(0, 1)
        put_filter(program)
    sandbox.put_filter = held
    sys.exit(tarweb.main())
"""


def unaccepted(port):
    """How many bytes lie unread in each connection to a port of this machine that nobody has accepted (proc(5))."""
    found = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(queues.split(":")[1], 16) for _, local, _, state, queues, *_, inode in
            [(*fields[:5], fields[9]) for fields in found]
            if local.endswith(f":{port:04X}") and state == "01" and inode == "0"]


@filters
def test_p01_nobody_is_let_in_before_all_is_given_up(site):
    """A worker is held up at its last step; a client has connected by then, and asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with subprocess.Popen([PYTHON, "-c", HELD, str(ROOT), "--listen", f"127.0.0.1:{port}", str(site)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            wait_until(lambda: children(process.pid) and status(children(process.pid)[0])["Seccomp_filters"] == "2")
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall(request("/next"))
                wait_until(lambda: unaccepted(port) == [len(request("/next"))])
                assert status(children(process.pid)[0])["Seccomp_filters"] == "2"       # still there, and held
                process.stdin.write(b"1")
                process.stdin.flush()
                assert client.recv(12) == b"HTTP/1.1 200"
                assert status(children(process.pid)[0])["Seccomp_filters"] == "3"
        finally:
            process.terminate()


# --- P2: what the kernel says of the processes

FLAGS = {
    "plain": (),
    "everything": ("--access-log", "/dev/null", "--status", "127.0.0.1:0", "--max-per-ip", "9", "--threads", "2"),
    "sqpoll": ("--sqpoll-ms", "50"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_p02_all_processes_are_without_privileges(start, site, name):
    server = start(site, *FLAGS[name])
    assert server.fetch("/next").status == 200
    if "--status" in FLAGS[name]:               # its process is forked after the others are ready
        assert status_answers(server)
    for pid in server.workers:
        found = status(pid)
        assert found["NoNewPrivs"] == "1"
        assert set(capabilities(pid).values()) == {0}
        assert not supported() or (found["Seccomp"], found["Seccomp_filters"]) == ("2", "3")
        if os.geteuid() == 0:
            assert set((found["Uid"] + "\t" + found["Gid"]).split()) == {str(NOBODY)}
            assert found["Groups"].strip() == ""
    assert status(server.pid)["NoNewPrivs"] == "1"
    assert not supported() or status(server.pid)["Seccomp"] == "2"


@as_root
def test_p02_the_parent_keeps_what_reloads_take(start, site, tmp_path):
    kept = (1 << sandbox.CAP_SETUID | 1 << sandbox.CAP_SETGID | 1 << sandbox.CAP_SETPCAP | 1 << sandbox.CAP_KILL)
    with_log = start(site, "--access-log", str(tmp_path / "log"))
    for server, files in ((start(site), sandbox.CAP_DAC_READ_SEARCH), (with_log, sandbox.CAP_DAC_OVERRIDE)):
        found = capabilities(server.pid)
        assert found == {"CapInh": 0, "CapAmb": 0, **dict.fromkeys(("CapPrm", "CapEff", "CapBnd"), kept | 1 << files)}


@filters
@pytest.mark.parametrize("deed", sandbox.AGAINST_FILTER)
def test_p02_a_worker_that_does_something_else_dies_and_is_replaced(start, site, deed):
    server = start(site, program=INTRUDER)
    before = server.workers
    with server.connect() as client:
        client.send(request(f"/intrude/{quote(deed)}"))
        assert client.sock.recv(1) == b""
    wait_until(lambda: server.workers and server.workers != before)
    assert server.fetch("/next").body == FILES["next"]
    assert "SIGSYS, a system call that it may not make" in server.stderr()


def test_p02_with_secure_off_the_same_deeds_are_done(start, site):
    """Else the test above would show nothing."""
    server = start(site, "--secure=off", program=INTRUDER)
    # A traced process stops at signals, and a worker that gets one for a child that has ended takes it for a stop.
    for deed in sandbox.AGAINST_FILTER.keys() - {"trace a process", "start a process"}:
        assert server.fetch(f"/intrude/{quote(deed)}").status == 404
    assert server.stderr() == ""
    assert "not locked down" in announced(server)
    assert {status(pid)["Seccomp"] for pid in (server.pid, *server.workers)} == {"0"}


def test_an_exception_is_told_though_no_source_can_be_read(start, site, tmp_path):
    """And then nothing is in the log that `Server.check` would not forgive."""
    server = start(site, program=INTRUDER)
    with server.connect() as client:
        client.send(request("/stumble"))
        assert client.sock.recv(1) == b""
    wait_until(lambda: "another one takes its place" in server.stderr())
    told = server.stderr()
    assert "LookupError: stumbled" in told and "in intruded" in told and "exit status 1" in told
    server.log.write_bytes(b"")


# --- P2: each is tried, and the server does not serve where one works

LYING = """if True:
    import sys
    sys.path.insert(0, sys.argv.pop(1))
    import os, sandbox, tarweb, uring
    lie = sys.argv.pop(1)
    libc_call, register = sandbox.libc_call, uring.Ring.register
    if lie == "setresuid":
        os.setresuid = lambda *_: None
    elif lie == "landlock":
        sandbox.libc_call = lambda *call, **more: (
            0 if sandbox.SYS_RESTRICT_SELF in call else libc_call(*call, **more))
    elif lie == "filter":
        sandbox.put_filter = lambda _: None
    elif lie == "restrictions":
        uring.Ring.register = lambda ring, opcode, *more: (
            0 if opcode == uring.REGISTER_RESTRICTIONS else register(ring, opcode, *more))
    sys.exit(tarweb.main())
"""


@pytest.mark.parametrize(("lie", "found"), [
    pytest.param("setresuid", "the sandbox does not hold: a process that serves tried to become root, and: it works",
                 marks=as_root),
    pytest.param("landlock", "tried to open a file, and: it works", marks=landlock),
    pytest.param("filter", "tried to start a program, and: Not a directory", marks=filters),
    ("restrictions", "the kernel does not hold the ring to its restrictions (operations [0, 1, 2, "),
])
def test_p02_p03_where_a_thing_only_seems_to_be_given_up_nothing_is_served(site, lie, found):
    ended = subprocess.run([PYTHON, "-c", LYING, str(ROOT), lie, "--listen", "127.0.0.1:0", str(site)],
                           capture_output=True, text=True, timeout=60, check=False)
    assert found in ended.stderr
    assert ended.returncode == 1 and not ended.stdout


CALLS = {   # deed -> the call that it takes, and its numbers, as in sandbox.NUMBERS
    "start a program": ("execve", (59, 221)), "make a socket": ("socket", (41, 198)), "connect": ("connect", (42, 203)),
    "listen": ("bind", (49, 200)), "trace a process": ("ptrace", (101, 117)), "mount": ("mount", (165, 40)),
    "enter a namespace": ("unshare", (272, 97)), "open a file": ("openat", (257, 56)),
    "remove a file": ("unlink", (87, None)), "start a process": ("clone", (56, 220)),
    "signal the parent": ("kill", (62, 129)), "become another user": ("setuid", (105, 146)),
    "raise a limit": ("prlimit64", (302, 261)), "have executable memory": ("mmap", (9, 222)),
    "make a ring": ("io_uring_setup", (425, 425)), "change a ring": ("io_uring_register", (427, 427)),
}
HOLE = """if True:
    import sys
    sys.path.insert(0, sys.argv.pop(1))
    name, x86_64, others = sys.argv.pop(1).split()
    import sandbox, tarweb
    sandbox.NUMBERS[name] = int(x86_64), None if others == "None" else int(others)
    assemble = sandbox.assemble
    def holed(calls, meant, otherwise):
        return assemble(calls | {name: sandbox.ALWAYS} if meant == sandbox.ALLOW else calls, meant, otherwise)
    sandbox.assemble = holed
    sys.exit(tarweb.main())
"""


@filters
@pytest.mark.parametrize("deed", sandbox.AGAINST_FILTER)
def test_p02_a_filter_with_a_hole_is_noticed(site, deed):
    """Each of the deeds in turn is let through."""
    name, (x86_64, others) = CALLS[deed]
    ended = subprocess.run([PYTHON, "-c", HOLE, str(ROOT), f"{name} {x86_64} {others}", "--listen", "127.0.0.1:0",
                            str(site)], capture_output=True, text=True, timeout=60, check=False)
    assert f"the sandbox does not hold: a process that serves tried to {deed}, and: " in ended.stderr
    assert ended.returncode == 1 and not ended.stdout


# --- P3: the ring

@pytest.mark.parametrize("kind", [Ring, PolledRing])
def test_p03_a_restricted_ring_does_nothing_else(kind):
    """Every operation that this kernel knows, every flag, and every way to change the ring."""
    allowed = {linux.OP_TIMEOUT, linux.OP_READ}
    ring = kind(8, entries=8, buffers=1, sqpoll_ms=1000 if kind is PolledRing else 0, operations=allowed)
    for op in range(max(ring.known) + 1):
        if op not in allowed:
            assert ring.attempt(op) == [-errno.EACCES], op
    for flag in (1 << bit for bit in range(7)):
        if not flag & (linux.LINK | linux.BUFFER_SELECT | linux.CQE_SKIP_SUCCESS):
            ring.write(ring.queue, ring.place(), linux.OP_READ, flag, 0, -1, 0, 0, 0, 0, 1, 0)
            assert [result for _, _, result, _ in ring.wait()] == [-errno.EACCES], flag
    for opcode in range(40):
        assert ring.calls.register(ring.fd, opcode, 0, 0) in (-errno.EACCES, -errno.EINVAL), opcode
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")
    buffer = bytearray(1)
    ring.arm_read(7, read_end, buffer)          # what is allowed still works
    assert [(tag, result) for tag, _, result, _ in ring.wait()] == [(7, 1)] and buffer == b"x"
    for fd in (read_end, write_end, ring.fd):
        os.close(fd)


# --- P4: keys

@as_root
def test_p04_nobody_of_the_same_user_can_look_into_a_worker(start_tls, site):
    server = start_tls(site)
    spy = """if True:
        import ctypes, os, sys
        pid = int(sys.argv[1])
        for path in ("mem", "maps", "environ", "fd/0", "root/etc"):
            try:
                os.stat(f"/proc/{pid}/{path}") if "/" in path else os.open(f"/proc/{pid}/{path}", os.O_RDONLY)
                print("can read", path)
            except PermissionError:
                pass
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(16, pid, 0, 0) != -1:                    # PTRACE_ATTACH
            print("can trace")
    """
    for pid in server.workers:
        spied = subprocess.run([sys.executable, "-S", "-c", spy, str(pid)], user=NOBODY, group=NOBODY, extra_groups=[],
                               capture_output=True, text=True, check=True, timeout=PATIENCE, cwd="/")
        assert spied.stdout == "" and spied.stderr == ""


def test_p04_there_are_no_core_dumps(start_tls, site):
    server = start_tls(site)
    for pid in (server.pid, *server.workers):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)


# --- the flags

def test_without_landlock_it_says_so(start, site):
    server = start(site, python=traced("trace=landlock_create_ruleset",
                                       "inject=landlock_create_ruleset:error=EOPNOTSUPP"))
    assert "without Landlock (lsm= at boot leaves it out)" in announced(server)
    assert server.fetch("/next").status == 200


def test_where_it_cannot_be_locked_in_it_says_why(site):
    said, code = refused(site, "trace=landlock_restrict_self", "inject=landlock_restrict_self:error=EPERM")
    assert said == ("tarweb: this process cannot be locked in: landlock_restrict_self: Operation not permitted; "
                    "--secure=off serves without\n") and code == 1


def test_require_is_not_content_without_landlock(site):
    said, code = refused(site, "trace=landlock_create_ruleset", "inject=landlock_create_ruleset:error=ENOSYS",
                         flags=("--secure=require",))
    assert said == "tarweb: --secure=require: Landlock (Function not implemented)\n" and code == 1


@landlock
@filters
def test_require_is_content_here(start, site):
    assert "locked down" in announced(start(site, "--secure=require"))


@as_root
def test_another_user(start, site):
    server = start(site, "--user", "daemon")
    assert {status(pid)["Uid"].split()[0] for pid in server.workers} == {"1"}
    assert "workers as daemon" in announced(server)


@as_root
def test_root_if_one_insists(start, site):
    server = start(site, "--user", "root")
    for pid in server.workers:
        assert status(pid)["Uid"].split()[0] == "0" and set(capabilities(pid).values()) == {0}
    assert capabilities(server.pid)["CapPrm"] == 1 << sandbox.CAP_SETPCAP | 1 << sandbox.CAP_DAC_READ_SEARCH
    assert "workers as root" in announced(server)


@as_root
def test_started_by_somebody_else(start, site):
    with tempfile.TemporaryDirectory() as folder:           # pytest's own are for root alone
        os.chmod(folder, 0o755)
        server = start(shutil.copy(site, folder), preexec_fn=become_nobody)
    assert "workers as nobody" in announced(server)
    assert server.fetch("/next").status == 200


@as_root
@pytest.mark.parametrize(("flags", "said", "somebody"), [
    (("--user", "nosuchuser"), "--user: there is no user 'nosuchuser'", None),
    (("--user", "daemon", "--secure=off"), "--user is of no use with --secure=off", None),
    (("--user", "daemon"), "--user daemon: only root can become somebody else", "nobody"),
])
def test_what_cannot_be(site, flags, said, somebody):
    ended = run_tarweb("-l", "127.0.0.1:0", *flags, site, preexec_fn=become_nobody if somebody else None)
    assert ended.stderr == f"tarweb: {said}\n" and ended.returncode == 2


@as_root
@pytest.mark.parametrize("lacking", ["-setuid,-setgid", "-kill"])
def test_where_root_may_not_become_another_it_stays_without_capabilities(start, site, lacking):
    server = start(site, python=(shutil.which("setpriv"), f"--bounding-set={lacking}", PYTHON))
    words = announced(server)
    assert "workers as root" in words and "without another user (root lacks" in words
    assert {value for pid in server.workers for value in capabilities(pid).values()} == {0}


@as_root
@pytest.mark.parametrize("proc", [True, False])
def test_where_a_user_namespace_has_no_other_user(start, tmp_path, proc):
    """As in a container that maps root alone, perhaps without /proc; with --user that is an error."""
    site = build_tar(tmp_path / "site.tar", {"next": FILES["next"]})
    namespace = [shutil.which("unshare"), "--user", "--map-root-user", "--mount", "sh", "-c",
                 f'{"" if proc else "mount -t tmpfs none /proc && "}exec "$0" "$@"', PYTHON]
    server = start(site, python=namespace)
    said = announced(server)
    assert "locked down: workers as root, " in said and "without another user (this user namespace has no " in said
    assert server.fetch("/next").body == FILES["next"]
    ended = subprocess.run([*namespace, TARWEB, "-l", "127.0.0.1:0", "--user", "daemon", site], capture_output=True,
                           text=True, timeout=PATIENCE, check=False)
    assert ended.stderr == "tarweb: --user daemon: this user namespace has no daemon\n" and ended.returncode == 2


def become_nobody():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
