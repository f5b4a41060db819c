"""What the tests of failing system calls share: strace has them fail, from the very moment on that a test wants.

The program is the real one. It stops itself before it begins, or a worker does before it does; then strace is attached
to that process alone, and counts its calls from there.
"""

import contextlib
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from support import PATIENCE, PYTHON, ROOT, Client, Server, children, request, run_tarweb, wait_until

STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(not STRACE or os.geteuid() != 0, reason="strace is not installed, or not for us")

# The real program, where the parent, or a worker, stops (SIGSTOP) before it does anything.
PAUSED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import tarweb
def after_a_pause(function):
    def run(*arguments):
        os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments)
    return run
if sys.argv.pop(1) == "worker":
    tarweb.make_worker = after_a_pause(tarweb.make_worker)
else:
    tarweb.run = after_a_pause(tarweb.run)
sys.exit(tarweb.main())
"""


def unconfined():
    """Flags with which strace may make calls fail: a sandbox would end the process for the call that stands for it."""
    return ("--secure=off",) if "--secure" in run_tarweb("--help").stdout else ()


UNCONFINED = unconfined()
OBSERVABLE = () if os.geteuid() == 0 else UNCONFINED    # so that we may look into the server's /proc/PID/fd


class Tracer:
    """strace, attached to process `pid`, has system calls fail: `faults` as `-e inject=` takes them, such as
    "socket:error=EMFILE:when=1". paths: only calls on these files count.
    """

    def __init__(self, pid, record, *faults, paths=()):
        self.record = Path(record)
        calls = ",".join(fault.partition(":")[0] for fault in faults)
        options = [word for path in paths for word in ("-P", str(path))]
        options += [word for fault in faults for word in ("-e", f"inject={fault}")]
        self.process = subprocess.Popen([STRACE, "-o", str(record), "-e", f"trace={calls}", *options, "-p", str(pid)],
                                        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = line = self.process.stderr.readline()
        while b" attached" not in line:
            line = self.process.stderr.readline()
            assert line, said
            said += line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate()

    @property
    def count(self):
        """How many calls have failed by our doing."""
        return self.record.read_text(errors="replace").count("(INJECTED)")


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "tT"


class Start:
    """A start of the paused program, until it serves or ends; then it is told to end, if need be.

    meanwhile(pid) is called with the process that waits, and gives a context to go on in. command: what it begins with.
    said: its messages. served: whether a request got its answer. status: how it ended. line: what it announced.
    """

    def __init__(self, who, folder, meanwhile, *flags, command=(PYTHON,)):
        self.log = folder / "stderr"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "-c", PAUSED, str(ROOT), who, "--listen", "127.0.0.1:0", *map(str, flags)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        try:
            with meanwhile(self.stopped(who)) as self.context:
                os.kill(self.pid, signal.SIGCONT)
                self.see()
        except BaseException:
            self.process.kill()
            raise
        self.said = self.log.read_text()
        assert "Traceback" not in self.said, self.said

    def stopped(self, who):
        """The process that waits."""
        self.pid = self.process.pid
        if who == "worker":
            wait_until(lambda: children(self.process.pid))
            self.pid = children(self.process.pid)[0]
        wait_until(lambda: is_stopped(self.pid))
        return self.pid

    def see(self):
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, f"nothing within {PATIENCE} s"
        self.line = os.read(self.process.stdout.fileno(), 1 << 16).decode()
        port = re.search(r"127\.0\.0\.1:(\d+)/", self.line)
        self.served = bool(port) and self.ask(int(port[1]))
        if port:
            self.process.terminate()
        self.process.communicate(timeout=PATIENCE)
        self.status = self.process.returncode

    def ask(self, port):
        with Client(("127.0.0.1", port)) as client:
            client.send(request("/next", connection="close"))
            return client.response().status == 200


# --- what a server is run in


def without(*paths):
    """Words that begin a command in a mount namespace in which there is nothing at these paths: an empty file, or an
    empty folder."""
    paths = sorted(paths, key=lambda path: (path == "/proc", path == "/dev"))       # what mounting itself needs: last
    mounts = [f"mount -t tmpfs -o size=4k none {path}" if Path(path).is_dir() else f"mount --bind /dev/null {path}"
              for path in paths]
    return ["unshare", "-m", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def can_mount():
    command = [*without("/sys"), "true"] if shutil.which("unshare") else ["false"]
    return os.geteuid() == 0 and not subprocess.run(command, capture_output=True, check=False).returncode


needs_mounts = pytest.mark.skipif(not can_mount(), reason="no file system may be mounted here")


def library(name):
    """Where the dynamic linker finds it."""
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    found = re.search(rf"^\s*{re.escape(name)} .* => (\S+)$", cache, re.M)
    if not found:
        pytest.skip(f"{name} is not installed")
    return os.path.realpath(found[1])


def closing(*fds):
    """A function for a child process."""
    def close():
        for fd in fds:
            os.close(fd)
    return close


class OnASocket(Server):
    """A server that announces itself nowhere: it is known by its unix socket."""

    def __init__(self, tar, *flags, folder, stdout=subprocess.DEVNULL, stderr=None, preexec_fn=None):
        self.path, self.log = folder / "socket", folder / "stderr"
        self.signalled = False
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [PYTHON, str(ROOT / "tarweb.py"), "--listen", f"unix:{self.path}", *map(str, flags), str(tar)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=log if stderr is None else stderr,
                preexec_fn=preexec_fn)
        self.pid = self.process.pid
        wait_until(lambda: self.process.poll() is not None or self.is_there())
        self.check()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """It has to end as it should, too."""
        self.process.terminate()
        try:
            assert self.process.wait(PATIENCE) == 0
        finally:
            self.process.kill()
        assert "Traceback" not in self.stderr()

    def is_there(self):
        with socket.socket(socket.AF_UNIX) as probe:
            return self.workers and not probe.connect_ex(str(self.path))

    def ask(self, target, path=None):
        """The whole of a response, of the site or of another socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(path or self.path))
            sock.sendall(request(target, connection="close"))
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))


@contextlib.contextmanager
def limited(pid, what, soft, hard=None):
    """Let a process have no more of a resource (setrlimit(2)) for a while; the hard limit stays unless it is given."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (soft, before[1] if hard is None else hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


def address_space(pid):
    """Bytes that a process has mapped."""
    return 1024 * int(re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])
