"""Runs a command as systemd would: with sockets that are open already, and kept from what a unit file takes from it.

    unitrun.py [--socket NAME=ADDRESS]... [--confine UNIT [--writable DIR]] COMMAND ...

ADDRESS is HOST:PORT or a path. Of a unit file's lines those are tried that can be without systemd and by anybody: user
and network namespaces, a read-only file system, limits, capabilities, and the filter of system calls with what systemd
does by means of it. It ends with exec: the process stays the one that was started.
"""

import argparse
import ctypes
import fcntl
import os
import resource
import socket
import struct
import subprocess
import sys

libc = ctypes.CDLL(None, use_errno=True)
FIRST_FD, ASIDE = 3, 100

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000      # <linux/sched.h>
ALL_NAMESPACES = 0x7E020080
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18                             # <sys/mount.h>
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, LAST_CAPABILITY = 24, 38, 40                 # <linux/prctl.h>
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
ALLOW, ERRNO = 0x7FFF0000, 0x00050000                                               # <seccomp.h>
EQUAL, MASKED_EQUAL = 4, 7
EPERM, ENOSYS = 1, 38


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", action="append", default=[])
    parser.add_argument("--confine")
    parser.add_argument("--writable")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.socket:
        pass_sockets(arguments.socket)
    if arguments.confine:
        confine(directives(arguments.confine), arguments.writable)
    os.execvp(arguments.command[0], arguments.command)


# --- sockets, sd_listen_fds(3)

def pass_sockets(texts):
    names, aside = [], []
    for text in texts:
        name, address = text.split("=", 1)
        names.append(name)
        with listen(address) as listener:
            aside.append(fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, ASIDE))
    for i, fd in enumerate(aside):
        os.dup2(fd, FIRST_FD + i)
        os.close(fd)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))


def listen(address):
    """As systemd's are: the address may be used again, and they do not block."""
    if address.startswith("/"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
    else:
        host, port = address.rsplit(":", 1)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
    listener.listen()
    listener.setblocking(False)
    return listener


# --- unit files, systemd.syntax(7)

def directives(path):
    """name -> its values in order."""
    found = {}
    with open(path) as file:
        text = file.read().replace("\\\n", " ")
    for line in text.splitlines():
        if "=" in line and line[0] not in "#;[":
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value.strip())
    return found


def calls_of(values):
    """The names of system calls that lines of SystemCallFilter= allow, the first of which is a list of allowed ones."""
    allowed = set()
    for value in values:
        names = {name for word in value.lstrip("~").split() for name in expand(word)}
        allowed = allowed - names if value.startswith("~") else allowed | names
    return allowed


def expand(word):
    if not word.startswith("@"):
        yield word
        return
    listing = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines()[1:]:
        if line.strip() and not line.strip().startswith("#"):
            yield from expand(line.strip())


# --- confinement

def confine(unit, writable):
    calls = calls_of(unit["SystemCallFilter"])      # while programs can still be run
    assert unit["PrivateUsers"] == unit["PrivateNetwork"] == ["yes"] and unit["ProtectSystem"] == ["strict"]
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS))
    loopback_up()
    read_only_but(writable)
    for name, limit in (("LimitNOFILE", resource.RLIMIT_NOFILE), ("LimitMEMLOCK", resource.RLIMIT_MEMLOCK)):
        number = int(unit[name][0].replace("M", "000000"))
        resource.setrlimit(limit, [min(number, resource.getrlimit(limit)[1])] * 2)
    assert unit["CapabilityBoundingSet"] == [""]
    for capability in range(LAST_CAPABILITY + 1):
        check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    filter_calls(calls, [getattr(socket, name) for name in unit["RestrictAddressFamilies"][0].split()])


def loopback_up():
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def read_only_but(writable):
    """ProtectSystem=strict, with a directory as LogsDirectory= is."""
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    if writable:
        check(libc.mount(writable.encode(), writable.encode(), None, MS_BIND, None))
    set_attributes(b"/", READ_ONLY, 0)
    if writable:
        set_attributes(writable.encode(), 0, READ_ONLY)


def set_attributes(path, add, remove):
    """mount_setattr(2)."""
    attributes = struct.pack("4Q", add, remove, 0, 0)
    check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, len(attributes)))


class Compare(ctypes.Structure):
    """<seccomp.h> struct scmp_arg_cmp."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def filter_calls(calls, families):
    """SystemCallFilter=, RestrictAddressFamilies=, RestrictNamespaces= and LockPersonality=."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(ERRNO | EPERM))

    def add(name, *comparison, action=ALLOW):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        compare = (Compare * 1)(Compare(*comparison)) if comparison else None
        if number >= 0:                         # else this architecture has none of that name
            result = seccomp.seccomp_rule_add_array(context, action, number, len(comparison) and 1, compare)
            assert result == 0, (name, os.strerror(-result))

    for family in families:
        add("socket", 0, EQUAL, family, 0)
    add("clone", 0, MASKED_EQUAL, ALL_NAMESPACES, 0)
    add("clone3", action=ERRNO | ENOSYS)        # its flags are out of a filter's sight
    for name in sorted(calls - {"socket", "clone", "clone3", "unshare", "setns", "personality"}):
        add(name)
    result = seccomp.seccomp_load(context)
    assert result == 0, os.strerror(-result)


if __name__ == "__main__":
    sys.exit(main())
