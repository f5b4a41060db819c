#!/usr/bin/python3.11
"""Process 1 of a guest: makes the machine fit to run in, runs the script it was given, reports, and ends the machine.

The report is one line of JSON between two marks on the console, for kernel messages may stand around it.
"""

import ctypes
import fcntl
import glob
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1      # <linux/sockios.h>, <linux/if.h>
LINUX_REBOOT_CMD_RESTART = 0x01234567                       # <linux/reboot.h>
SYSLOG_ACTION_READ_ALL = 3                                  # syslog(2)
COMPLAINT = re.compile(r"WARNING:|BUG:|Oops|Call Trace|blocked for more than|rcu.*stall|refcount_t")


def mount(kind, where):
    os.makedirs(where, exist_ok=True)
    if libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), f"mount {where}")


def bring_up_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def load_modules(folder, without=()):
    """Load NN-name.ko in the order of their numbers, but for names with one of the words `without` in them:
    name -> "" or the error."""
    loaded = {}
    for path in sorted(glob.glob(f"{folder}/*.ko")):
        if any(word in path for word in without):
            continue
        with open(path, "rb") as file:
            content = file.read()
        failed = libc.init_module(content, ctypes.c_ulong(len(content)), b"")
        loaded[os.path.basename(path)[3:-3]] = os.strerror(ctypes.get_errno()) if failed else ""
    return loaded


def run(order):
    """The script's exit status (None when it took too long) and its output. A file takes the output, because a pipe
    would be held open by what the script leaves running."""
    with open("/output", "w+b") as output:
        process = subprocess.Popen([sys.executable, order["script"], *order["arguments"]], cwd="/guest", stdout=output,
                                   stdin=subprocess.DEVNULL, stderr=output)
        try:
            status = process.wait(order["timeout"])
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        return status, output.read().decode(errors="replace")


def complaints():
    """Lines of the kernel's log that tell of a fault in it, with some of those behind."""
    buffer = ctypes.create_string_buffer(1 << 20)
    lines = buffer.raw[:libc.klogctl(SYSLOG_ACTION_READ_ALL, buffer, len(buffer))].decode(errors="replace").splitlines()
    first = next((i for i, line in enumerate(lines) if COMPLAINT.search(line)), len(lines))
    return "\n".join(lines[first:first + 40])


def main():
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")):
        mount(kind, where)
    bring_up_loopback()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 524288))     # as systemd sets it
    os.environ.update(PATH="/usr/bin:/usr/sbin:/bin:/sbin", HOME="/tmp", LANG="C.UTF-8")
    with open("/order.json") as file:
        order = json.load(file)
    loaded = load_modules("/modules")
    status, output = run(order)
    report = {"status": status, "output": output, "late": status is None, "modules": loaded,
              "seconds": round(time.monotonic(), 2), "complaints": complaints()}
    print(f"\n@@report {json.dumps(report)} report@@", flush=True)
    libc.reboot(LINUX_REBOOT_CMD_RESTART)                          # which is the end, under qemu's -no-reboot


if __name__ == "__main__":
    main()
