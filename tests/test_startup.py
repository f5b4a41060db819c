"""The command line, and every way of not starting: one clear message, the right exit status, never a traceback."""

import ast
import ctypes
import gzip
import os
import platform
import re
import socket
import struct
import subprocess

import pytest
from support import FILES, PYTHON, ROOT, TARWEB, build_tar, noise, run_tarweb

FLAGS = ["--listen", "--prefix", "--threads", "--max-connections", "--ring-size", "--sqpoll-ms", "--busyloop",
         "--etags", "--header-timeout", "--keepalive-timeout", "--min-rate", "--drain", "--cache-control",
         "--no-liburing", "--version", "--help", "-l", "-v"]

# <asm/unistd_64.h> of x86_64, <asm-generic/unistd.h> of the others
PRLIMIT, SET_AFFINITY, GET_AFFINITY = (302, 203, 204) if platform.machine() == "x86_64" else (261, 122, 123)
IO_URING_SETUP = 425            # everywhere


def refusal(status, *arguments, **options):
    """Run, expect that exit status and nothing on stdout; return the message."""
    ended = run_tarweb(*arguments, **options)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip()
    return ended.stderr


@pytest.mark.parametrize(("name", "value"), [("version_info", "(3, 10, 13)"), ("version_info", "(3, 8)"),
                                             ("maxsize", "(1 << 31) - 1")])
def test_a_python_that_will_not_do_is_told_in_a_sentence(site, name, value):
    code = f"import runpy, sys; sys.{name} = {value}; runpy.run_path({str(TARWEB)!r}, run_name='__main__')"
    ended = subprocess.run([PYTHON, "-O", "-c", code, site], capture_output=True, text=True, timeout=30, check=False)
    bits = 32 if name == "maxsize" else 64
    assert re.fullmatch("tarweb needs Python 3.11 or newer, for 64 bits; this is Python [0-9.+a-z]+ "
                        f"for {bits} bits\n", ended.stderr)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_older_pythons_can_read_that_sentence():
    ast.parse(TARWEB.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("python", [(PYTHON, "-I"), (PYTHON, "-P"), ("env", "PYTHONSAFEPATH=1", PYTHON)])
def test_a_python_that_looks_for_modules_nowhere_else(start, site, tmp_path, python):
    """By a link, too: it is next to the file itself that the other modules are."""
    link = tmp_path / "tarweb"
    link.symlink_to(TARWEB)
    server = start(site, python=python, program=(str(link),))
    assert server.fetch("/next").body == FILES["next"]


def test_help_tells_every_flag():
    ended = run_tarweb("--help")
    assert ended.returncode == 0
    missing = [flag for flag in FLAGS if not re.search(rf"(?<![\w-]){flag}\b", ended.stdout)]
    assert not missing
    assert ended.stderr == ""


def test_version_is_that_of_the_package():
    ended = run_tarweb("--version")
    stated = re.search(r'^__version__ = "([^"]+)"', (ROOT / "tarweb.py").read_text(), re.M)[1]
    assert (ended.returncode, ended.stdout.split()[-1]) == (0, stated)


@pytest.mark.parametrize("wrong", [
    ["--nonesuch"], ["--listen", "nonsense"], ["--listen", "127.0.0.1"], ["--listen", "127.0.0.1:99999"],
    ["--listen", "127.0.0.1:-1"], ["--listen", "::1:8080"], ["--listen", "not.a.host.invalid:80"],
    ["--threads", "0"], ["--threads", "many"], ["--threads", "-1"],
    ["--max-connections", "0"], ["--max-connections", "-5"], ["--ring-size", "0"], ["--ring-size", "x"],
    ["--sqpoll-ms", "-1"], ["--sqpoll-ms", "1s"], ["--busyloop", "5"], ["--busyloop", "soon"], ["--busyloop", "-1s"],
    ["--etags=maybe"], ["--header-timeout", "-1"], ["--header-timeout", "x"], ["--keepalive-timeout", "nan"],
    ["--min-rate", "-1"], ["--min-rate", "fast"], ["--drain", "-1"], ["-v", "loud"],
    ["--cache-control", "a\r\nX-Evil: 1"], ["--listen"],
], ids=" ".join)
def test_wrong_flags_are_named(site, wrong):
    message = refusal(2, str(site), *wrong) if wrong == ["--listen"] else refusal(2, *wrong, str(site))
    assert wrong[0].split("=")[0] in message


def test_an_archive_has_to_be_named(site):
    refusal(2)
    refusal(2, site, site)


def bad_archives(tmp_path):
    """name -> a path that is no usable tar."""
    good = build_tar(tmp_path / "good.tar", {"a.txt": b"a", "b.bin": noise(100_000)}).read_bytes()
    contents = {
        "empty": b"",
        "text": b"This is not an archive.\n" * 100,
        "noise": noise(20_480),
        "gzipped": gzip.compress(good),
        "cut-in-a-file": good[:50_000],
        "cut-in-a-header": good[:1024 + 100],
        "damaged-header": good[:1024] + b"\xff" * 512 + good[1536:],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    return {name: tmp_path / f"{name}.tar" for name in [*contents, "missing"]}


@pytest.mark.parametrize("kind", ["empty", "text", "noise", "gzipped", "cut-in-a-file", "cut-in-a-header",
                                  "damaged-header", "missing"])
def test_unusable_archives_are_named(tmp_path, kind):
    path = bad_archives(tmp_path)[kind]
    message = refusal(2, "--listen", "127.0.0.1:0", path)
    assert f"{kind}.tar" in message
    assert len(message.strip().splitlines()) == 1
    if kind == "gzipped":
        assert re.search("compressed|gzip", message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_archive_that_may_not_be_read(site, tmp_path):
    path = tmp_path / "secret.tar"
    path.write_bytes(site.read_bytes())
    path.chmod(0)
    assert "secret.tar" in refusal(2, path)


@pytest.mark.parametrize("flags", [(), ("--threads", "2")])
def test_a_port_in_use(site, flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in refusal(1, "--listen", f"127.0.0.1:{port}", *flags, site)


def test_a_second_server_does_not_share_the_port_of_the_first(start, site):
    server = start(site)
    assert str(server.port) in refusal(1, "--listen", f"127.0.0.1:{server.port}", site)
    assert server.fetch("/next").body == FILES["next"]


@pytest.mark.parametrize("first", [(), ("--threads", "2")])
def test_a_second_server_with_several_workers_does_not_share_the_port(start, site, first):
    """All of its sockets but the first have SO_REUSEPORT, as those of the other server may have."""
    server = start(site, *first)
    said = refusal(1, "--listen", f"127.0.0.1:{server.port}", "--threads", "2", site)
    assert said == f"tarweb: cannot listen on 127.0.0.1 port {server.port}: Address already in use\n"
    for _ in range(10):
        assert server.fetch("/next").body == FILES["next"]


def forbid(errno, *numbers, but_asking=False):
    """In the child: answer these system calls with an error, as a container's seccomp profile does. but_asking: not
    those whose third argument, a pointer, is null."""
    # <linux/filter.h> struct sock_filter {u16 code; u8 jt, jf; u32 k}; <linux/seccomp.h> struct seccomp_data: nr at 0
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    allow, fail, third_argument = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | errno), 32
    refuse = [(load, 0, 0, third_argument), (equal, 1, 0, 0), fail, allow] if but_asking else [fail]
    code = b"".join(struct.pack("HBBI", *line) for line in [(load, 0, 0, 0), *(
        line for number in numbers for line in ((equal, 0, len(refuse), number), *refuse)), allow])
    program = ctypes.create_string_buffer(code, len(code))
    libc = ctypes.CDLL(None, use_errno=True)

    class Fprog(ctypes.Structure):
        """<linux/filter.h> struct sock_fprog"""
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    def apply():
        no_new_privs, set_seccomp, filter_mode = 38, 22, 2
        argument = Fprog(len(code) // 8, ctypes.addressof(program))
        if libc.prctl(no_new_privs, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, ctypes.byref(argument)):
            raise OSError(ctypes.get_errno(), "prctl")

    return apply


CALLS = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}     # the same on every architecture


@pytest.mark.parametrize("flags", [(), ("--no-liburing",), ("--sqpoll-ms=20", "--threads=2"), ("--secure=off",)],
                         ids=" ".join)
@pytest.mark.parametrize("errno", [1, 38], ids=["EPERM", "ENOSYS"])
@pytest.mark.parametrize("call", CALLS)
def test_a_profile_without_io_uring_is_explained(site, call, errno, flags):
    """Docker's answers EPERM, podman's ENOSYS; some allow only part of the calls."""
    message = refusal(1, "--listen", "127.0.0.1:0", *flags, site, preexec_fn=forbid(errno, CALLS[call]))
    assert re.fullmatch(r"tarweb: io_uring is (forbidden to this process|switched off).*\n", message)
    if "switched off" not in message:
        assert f"({call}: {os.strerror(errno)})" in message
        assert all(name in message for name in (*CALLS, "seccomp", "container"))


@pytest.mark.parametrize("flags", [(), ("--secure=off",), ("--max-connections", "100")])
@pytest.mark.parametrize("but_asking", [False, True])
def test_limits_that_nobody_may_set_are_explained(site, flags, but_asking):
    profile = forbid(1, PRLIMIT, but_asking=but_asking)
    message = refusal(1, "--listen", "127.0.0.1:0", *flags, site, preexec_fn=profile)
    assert re.fullmatch("tarweb: this process may not look at its limits, .* allow prlimit64\n", message)


@pytest.mark.parametrize("refused", [(SET_AFFINITY,), (SET_AFFINITY, GET_AFFINITY)])
def test_affinity_that_nobody_may_set_is_explained(site, refused):
    message = refusal(1, "--listen", "127.0.0.1:0", "--cpu-affinity", "--threads", "2", site,
                      preexec_fn=forbid(1, *refused))
    assert message == "tarweb: --cpu-affinity: this process may not choose its CPUs: Operation not permitted\n"


def test_where_nobody_may_ask_for_cpus_there_is_a_worker_for_each(start, site):
    server = start(site, "--threads", "auto", preexec_fn=forbid(1, SET_AFFINITY, GET_AFFINITY))
    assert len(server.workers) == os.cpu_count()
    assert server.fetch("/next").body == FILES["next"]
