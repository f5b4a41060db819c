"""Starts the servers that are compared, and ends them again, each by its own process id."""

import contextlib
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import procfs

HERE = Path(__file__).resolve().parent
TARWEB = HERE.parent / "tarweb.py"
BEFORE = os.environ.get("TARWEB_BEFORE")         # another tarweb.py, which against.py compares this one with
TARWEBS = ("tarweb", "before")
HOST = "127.0.0.1"
CONNECTIONS = 16_000           # slots of nginx and lighttpd: more than any case opens
START = 60                     # seconds that a server may take to start
PACKAGES = {"nginx": "nginx-light", "lighttpd": "lighttpd", "wrk": "wrk", "strace": "strace", "openssl": "openssl",
            "cc": "gcc libc6-dev"}
ACCESS_LOG = "access.log"      # in the server's temporary directory, where flags ask for it
TLS_SERVERS = ("tarweb", "before", "nginx", "nginx-tuned")
PROGRAMS = (*TLS_SERVERS, "lighttpd")            # those that do all that the cases ask for
ALL = (*PROGRAMS, "http.server")
FLOOR_PATH = "/small/1k.bin"   # the one file that floor.c can be said to serve

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[1 % len(CORES)]


class Failed(Exception):
    """A server or a tool did not do its part; the message says which and how."""


@dataclass
class Site:
    """What is served: the same files as a directory and as a tar, and the interpreter that runs tarweb."""

    directory: Path
    tar: Path
    python: str

    @property
    def certificate(self):
        """Where tlspeer.write_certificate puts the certificate of all servers."""
        return self.tar.parent / "certificate.pem"

    @property
    def key(self):
        """Where tlspeer.write_certificate puts the key of that certificate."""
        return self.tar.parent / "key.pem"


@dataclass
class Server:
    """A running server: its main process, where it listens, whether it speaks TLS, where an access log of it is."""

    name: str
    process: subprocess.Popen
    port: int
    tls: bool = False
    log: Path = Path(ACCESS_LOG)

    @property
    def pids(self):
        """Process ids of the server, workers included."""
        return procfs.family(self.process.pid)

    def url(self, path):
        """The URL of `path`, which begins with a slash."""
        return f"{'https' if self.tls else 'http'}://{HOST}:{self.port}{path}"


def find(program):
    """The path of `program`, or None. Debian keeps servers in /usr/sbin, which few users have in PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")


def advice(program):
    """The command that installs a missing program."""
    return f"{program} is missing: apt install {PACKAGES[program]}"


def available():
    """Names of the servers that can be measured here; says on stderr what is missing."""
    present = []
    if TARWEB.exists():
        present += TARWEBS if BEFORE else ["tarweb"]
    for program, names in (("nginx", ["nginx", "nginx-tuned"]), ("lighttpd", ["lighttpd"]), ("cc", ["floor"])):
        if find(program):
            present += names
        else:
            print(advice(program), file=sys.stderr)
    return [*present, "http.server"]


def fill(template, into, values):
    """Write bench/`template` to the path `into` with its @WORDS@ replaced; gives `into`."""
    text = (HERE / template).read_text()
    into.write_text(re.sub("@([A-Z]+)@", lambda word: str(values[word[1]]), text))
    return into


def configuration(site, temporary, port, tls=False, changes=()):
    """The values of the @WORDS@ in the configurations; `changes` are "WORD=value", for nginx alone."""
    values = {
        "DIR": temporary,
        "SITE": site.directory,
        "PORT": port,
        "SSL": "ssl" if tls else "",
        "CERTIFICATE": site.certificate,
        "KEY": site.key,
        "FILES": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "CONNECTIONS": CONNECTIONS,
        "WORKERS": 1,
        "LOG": "off",
        "USER": "user root;" if os.getuid() == 0 else "",     # all servers run as the user who started the bench
    }
    return values | dict(change.split("=", 1) for change in changes)


# Each of these gives the command line of one server, after writing its configuration into `temporary`.
# Only tarweb and nginx have flags, nginx's being changes of its configuration; "@DIR@" in them is `temporary` already.
# tarweb chooses its own port. Only TLS_SERVERS are ever asked for TLS.

def tarweb(site, _temporary, _port, flags, tls, program=TARWEB):
    if tls:
        flags = ["--tls-cert", site.certificate, "--tls-key", site.key, "--ktls", "off", *flags]
    return [site.python, program, "--listen", f"{HOST}:0", *flags, site.tar]


def before(*arguments):
    return tarweb(*arguments, program=BEFORE)


def nginx(site, temporary, port, flags, tls):
    values = configuration(site, temporary, port, tls, flags)
    if tls:
        fill("nginx-tls.conf", temporary / "tls.conf", values)
    written = fill("nginx.conf", temporary / "nginx.conf", values)
    return [find("nginx"), "-p", temporary, "-e", temporary / "nginx.log", "-c", written]


def nginx_tuned(site, temporary, port, flags, tls):
    shutil.copy(HERE / "nginx-tuned.conf", temporary / "locations.conf")
    return nginx(site, temporary, port, flags, tls)


def lighttpd(site, temporary, port, _flags, _tls):
    written = fill("lighttpd.conf", temporary / "lighttpd.conf", configuration(site, temporary, port))
    return [find("lighttpd"), "-D", "-f", written]


def http_server(site, _temporary, port, _flags, _tls):
    return [site.python, "-m", "http.server", "--bind", HOST, "--protocol", "HTTP/1.1",
            "--directory", site.directory, str(port)]


def floor(site, temporary, port, _flags, _tls):
    """It is compiled here, and repeats a response of tarweb's."""
    program, response = temporary / "floor", temporary / "response"
    said = subprocess.run([find("cc"), "-O2", "-o", program, HERE / "floor.c"], capture_output=True, text=True)
    if said.returncode:
        raise Failed(f"floor.c: {said.stderr[:500]}")
    with serving("tarweb", site) as server, socket.create_connection((HOST, server.port), START) as connection:
        connection.sendall(f"GET {FLOOR_PATH} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        response.write_bytes(connection.recv(1 << 16))      # it comes in one piece; the cases compare it with the file
    return [program, str(port), response]


COMMANDS = {"tarweb": tarweb, "before": before, "nginx": nginx, "nginx-tuned": nginx_tuned,
            "lighttpd": lighttpd, "http.server": http_server, "floor": floor}


@contextlib.contextmanager
def serving(name, site, flags=(), cores=(SERVER_CORE,), tls=False, group=None):
    """Run the server `name` on `cores` while the block runs; gives a Server that answers already.

    With `tls` it speaks TLS only, by the certificate that tlspeer.write_certificate has made for `site`. `group`: the
    directory of a control group to run it in.
    """
    with tempfile.TemporaryDirectory(prefix="tarweb-bench-") as temporary:
        port = 0 if name in TARWEBS else free_port()
        flags = [str(flag).replace("@DIR@", temporary) for flag in flags]
        command = COMMANDS[name](site, Path(temporary), port, flags, tls)
        log = Path(temporary) / "stderr"
        server = Server(name, launch(command, log, cores, group), port, tls, Path(temporary) / ACCESS_LOG)
        try:
            wait_ready(server, log)
            yield server
        finally:
            end(server)


def launch(command, log, cores, group):
    """Start `command` on `cores` and in `group`, its stderr to the file `log`, its stdout to a pipe."""
    def prepare():
        os.sched_setaffinity(0, cores)
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    # http.server writes a line for each request: not to be kept, and not to be paid for in disk space.
    with open(os.devnull if "http.server" in command else log, "wb") as stderr:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, preexec_fn=prepare)


def free_port():
    """A TCP port of HOST that nobody uses at this moment."""
    with socket.create_server((HOST, 0)) as probe:
        return probe.getsockname()[1]


def wait_ready(server, log):
    """Return when `server` answers, its port set; if it does not, shows the end of its log and raises Failed."""
    try:
        if server.name in TARWEBS:
            server.port = announced_port(server.process)
        else:
            wait_port(server)
    except Failed as failure:
        if log.exists():
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
        raise Failed(f"{server.name}: {failure}") from None


def announced_port(process):
    """The port in the first URL that `process` prints on its stdout."""
    deadline = time.monotonic() + START
    said = b""
    while not (url := re.search(rb"https?://\S+:(\d+)/", said)):
        ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 4096) if ready else b""
        if not piece:
            raise Failed(f"did not announce a URL, printed {said!r}")
        said += piece
    return int(url[1])


def wait_port(server):
    """Return when somebody accepts connections on the server's port."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, server.port), 1):
            return
        time.sleep(0.02)
    raise Failed("did not start")


def end(server):
    """End `server` and every process it started."""
    pids = server.pids if server.process.poll() is None else []
    server.process.terminate()
    try:
        server.process.wait(10)
    except subprocess.TimeoutExpired:
        for pid in reversed(pids):          # workers first: an orphan would be nobody's to end
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()
    server.process.stdout.close()
