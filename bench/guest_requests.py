"""What a request over kernel TLS takes, tarweb and nginx, in system calls and in instructions. Runs in a guest whose
processor's nanosecond is one instruction: see guest_ktls.py.

Prints one line of JSON.
"""

import contextlib
import ctypes
import io
import json
import mmap
import os
import platform
import re
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import guest_init
from guest_tlsclient import TLS12, TLS13, Tls, context

PATH, SIZE = "small/1k.bin", 1024
SUITES = {"1.3": TLS13[0], "1.2": TLS12[0]}     # AES-128-GCM
CASES = ((64, 40), (1, 400))                    # connections, and how often each asks, all at once
ASKED = f"GET /{PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
WARM = 5                                        # rounds that are not counted
QUIET = 0.05                                    # seconds in which the server has answered all
CERTIFICATE, KEY = "/guest/ecdsa.cert", "/guest/ecdsa.key"
TARWEB = [sys.executable, "tarweb.py", "--listen=127.0.0.1:8443", f"--tls-cert={CERTIFICATE}", f"--tls-key={KEY}",
          "--ktls=require"]
NGINX = ["/usr/sbin/nginx", "-c", "/tmp/nginx.conf"]
SERVERS = {"tarweb": [*TARWEB, "/tmp/site.tar"], "tarweb, no liburing": [*TARWEB, "--no-liburing", "/tmp/site.tar"],
           "nginx": NGINX, "nginx-tuned": NGINX}
WORDS = {"DIR": "/tmp", "SITE": "/tmp/www", "PORT": 8443, "SSL": "ssl", "CERTIFICATE": CERTIFICATE, "KEY": KEY,
         "FILES": 1024, "CONNECTIONS": 512, "USER": "user root;", "WORKERS": 1, "LOG": "off"}


# --- counting ------------------------------------------------------------------------------------------------------


def cpu(pids):
    """Nanoseconds, which are instructions, that processes have run for: clock_getcpuclockid(3)."""
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)


def calibrate(rounds=20_000_000):
    """Nanoseconds for each instruction of a loop of two, which ought to be 1."""
    code = b"\xb9" + rounds.to_bytes(4, "little") + b"\xff\xc9\x75\xfc\xc3"     # mov ecx, N; dec ecx; jnz; ret
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    function = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    began = cpu([os.getpid()])
    function()
    return (cpu([os.getpid()]) - began) / (2 * rounds)


def family(pid):
    """A process and its children."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [pid, *map(int, file.read().split())]


@contextlib.contextmanager
def counted_calls(pids):
    """Gives a dictionary that afterwards has the system calls that the processes have made, by name."""
    calls = {}
    with tempfile.NamedTemporaryFile() as table:
        flags = [word for pid in pids for word in ("-p", str(pid))]
        tracer = subprocess.Popen(["strace", "-c", "-f", "-o", table.name, *flags], stderr=subprocess.PIPE)
        for _ in pids:
            tracer.stderr.readline()            # "Process ... attached"
        yield calls
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
        for line in table.read().decode().splitlines():
            words = line.split()
            if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
                calls[words[-1]] = int(words[3])


# --- servers and clients -------------------------------------------------------------------------------------------


def fill(template):
    text = Path("/guest", template).read_text()
    return re.sub("@([A-Z]+)@", lambda word: str(WORDS[word[1]]), text)


def write_site():
    content = os.urandom(SIZE)
    path = Path("/tmp/www", PATH)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with tarfile.open("/tmp/site.tar", "w") as tar:
        member = tarfile.TarInfo(PATH)
        member.size = SIZE
        tar.addfile(member, io.BytesIO(content))
    Path("/etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    Path("/etc/group").write_text("root:x:0:\n")
    Path("/var/lib/nginx").mkdir(parents=True, exist_ok=True)
    Path("/var/log/nginx").mkdir(parents=True, exist_ok=True)
    return content


def configure(name):
    """nginx as bench/servers.py runs it, and with kernel TLS."""
    Path("/tmp/nginx.conf").write_text(fill("nginx.conf"))
    Path("/tmp/tls.conf").write_text(fill("nginx-tls.conf") + "ssl_conf_command Options KTLS;\n")
    Path("/tmp/locations.conf").write_text(fill("nginx-tuned.conf") if name == "nginx-tuned" else "")


@contextlib.contextmanager
def running(name):
    """Gives the processes of a server that listens."""
    configure(name)
    process = subprocess.Popen(SERVERS[name], stdout=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 8443)):
                break
            time.sleep(0.1)
        time.sleep(0.5)                         # nginx listens before its worker runs
        yield family(process.pid)
    finally:
        process.terminate()
        process.wait()


def ask(clients, content):
    """One request on each connection, all at once, and their answers."""
    for client in clients:
        client.sendall(ASKED)
    if len(clients) > 1:
        time.sleep(QUIET)
    for client in clients:
        head, body = b"", client.stream
        while (line := body.readline()) != b"\r\n":
            head += line
        assert head.startswith(b"HTTP/1.1 200") and body.read(SIZE) == content, head


def connect(suite):
    client = Tls(socket.create_connection(("127.0.0.1", 8443)), suite).handshake()
    client.stream = client.makefile("rb", 1 << 16)
    return client


def tls_stat():
    with open("/proc/net/tls_stat") as table:
        counts = dict(line.split() for line in table)
    return int(counts["TlsTxSw"]), int(counts["TlsRxSw"])


def measure(pids, version, connections, rounds, content):
    """One case: {figure: value}, the counts for each request."""
    suite, before = context(SUITES[version]), tls_stat()
    clients = [connect(suite) for _ in range(connections)]
    for _ in range(WARM):
        ask(clients, content)
    sent, received = (now - then for now, then in zip(tls_stat(), before, strict=True))
    began = cpu(pids)
    for _ in range(rounds):
        ask(clients, content)
    instructions = cpu(pids) - began
    with counted_calls(pids) as calls:
        for _ in range(rounds):
            ask(clients, content)
    for client in clients:
        client.close()
    requests = rounds * connections
    return {"version": version, "connections": connections, "requests": requests,
            "kernel sends": sent == connections, "kernel receives": received == connections,
            "instructions": instructions / requests, "calls": sum(calls.values()) / requests,
            "by call": {name: count / requests for name, count in sorted(calls.items())}}


def main():
    guest_init.load_modules("/later")
    content, results = write_site(), {}
    # Before the servers, or one would begin with the first request and never see many at once.
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    for name in SERVERS:
        with running(name) as pids:
            results[name] = [measure(pids, version, *case, content) for version in SUITES for case in CASES]
        print(name, "done", flush=True)
    said = subprocess.run(["/usr/sbin/nginx", "-v"], capture_output=True, text=True, check=False).stderr
    print(json.dumps({"kernel": platform.release(), "openssl": ssl.OPENSSL_VERSION, "python": platform.python_version(),
                      "nginx": said.split("/")[-1].strip(), "ns for each instruction": calibrate(),
                      "servers": results}))


main()
