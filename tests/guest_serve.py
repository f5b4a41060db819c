"""What a kernel has to show that it carries the server; runs in a guest, with nothing but Python's own modules.

    python3 guest_serve.py RUN...       # of RUNS below and of guest_tls.RUNS

Prints one line of JSON: {"kernel": release, "runs": {run: {check: "" or what went wrong}}}.
"""

import json
import os
import re
import sys
from functools import partial

import guest_tls
from guest_checks import SERVING, Server, crowd, pack_site, patience, perform, refusal, terminate

SWITCH = "/proc/sys/kernel/io_uring_disabled"       # Linux 6.6


def switched_off(_):
    """Where the kernel has the switch, the server names it."""
    if not os.path.exists(SWITCH):
        return
    with open(SWITCH, "w") as file:
        file.write("2")
    try:
        said = refusal()
        assert said.startswith("tarweb: io_uring is switched off: kernel.io_uring_disabled is 2;"), said
    finally:
        with open(SWITCH, "w") as file:
            file.write("0")


def refused(_):
    said = refusal()
    assert re.fullmatch(r"tarweb: this kernel \(\S+\) is too old: tarweb needs Linux 6.1 or newer\n", said), said


RUNS = {        # how the server is started (None: the checks start their own), and the checks
    "liburing": (Server, SERVING),
    "libc": (partial(Server, "--no-liburing"), SERVING),
    "sqpoll": (partial(Server, "--sqpoll-ms", "20"), SERVING),
    "limits": (partial(Server, "--header-timeout", "1", "--keepalive-timeout", "1", "--max-connections", "8",
                       "--threads", "2"), (patience, crowd, terminate)),
    "switched off": (None, (switched_off,)),
    "refused": (None, (refused,)),
} | guest_tls.RUNS


def main():
    pack_site()
    outcomes = {run: perform(*RUNS[run]) for run in sys.argv[1:]}
    print(json.dumps({"kernel": os.uname().release, "runs": outcomes}))


main()
