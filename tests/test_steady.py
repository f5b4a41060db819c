"""The steady state: what a server under load takes from the interpreter and from the system. Needs wrk and strace."""

import re
import shutil
import signal
import subprocess

import pytest
from support import ROOT

pytestmark = pytest.mark.skipif(not (shutil.which("wrk") and shutil.which("strace")), reason="needs wrk and strace")

# The real program, which besides prints at each tick of its clock how many blocks of memory Python holds.
COUNTING = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import clock, tarweb
tick = clock.Clock.on_tick
def counted(*arguments):
    tick(*arguments)
    os.write(1, b"%d\\n" % sys.getallocatedblocks())
clock.Clock.on_tick = counted
sys.exit(tarweb.main())
"""
BLOCKS = 50     # what a sample may differ by: objects of the moment


def load(server, seconds):
    """Keep the server busy with one request again and again; gives how many were answered."""
    output = subprocess.run(["wrk", "-t1", "-c16", f"-d{seconds}s", f"{server.url}/n/042.txt"],
                            check=True, capture_output=True, text=True).stdout
    assert "Non-2xx" not in output and "Socket errors" not in output
    return int(re.search(r"(\d+) requests in", output)[1])


def system_calls(server, seconds):
    """What strace counts while the server is under load: {name: calls}."""
    pids = [server.pid, *server.workers]
    tracer = subprocess.Popen(["strace", "-c", "-f", *(word for pid in pids for word in ("-p", str(pid)))],
                              stderr=subprocess.PIPE, text=True)
    try:
        for _ in pids:
            assert "attached" in tracer.stderr.readline()
        load(server, seconds)
    finally:
        tracer.send_signal(signal.SIGINT)
        counted = tracer.communicate()[1]
    rows = [row.split() for row in counted.splitlines() if re.match(r" *\d+\.\d+ ", row)]
    return {row[-1]: int(row[3]) for row in rows if row[-1] != "total"}


def blocks(server, samples):
    """The smallest of so many samples taken from now on, once a second."""
    while server.read_line(0):
        pass
    return min(int(server.read_line(10)) for _ in range(samples))


def test_p15_python_holds_no_more_after_many_requests(start, site):
    server = start(site, program=("-c", COUNTING, str(ROOT)))
    load(server, 1)
    before = blocks(server, 2)
    answered = load(server, 3)
    assert blocks(server, 2) - before <= BLOCKS < answered


def test_one_system_call_serves_many_requests(start, site):
    server = start(site)
    load(server, 1)
    assert set(system_calls(server, 1)) == {"io_uring_enter"}


def test_p15_no_system_call_at_all_with_sqpoll(start, site):
    server = start(site, "--sqpoll-ms", "2000")
    load(server, 1)
    assert system_calls(server, 1) == {}
