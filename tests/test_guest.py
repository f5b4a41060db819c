"""The same server on other kernels and another architecture, in virtual machines: see guest.py and guest_serve.py.

6.1 is the oldest kernel that the README promises, and the oldest that the server starts on. TLS in the kernel starts
with 6.7.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import guest
import pytest

# What each machine is put through: its kernel, and names of guest_serve.RUNS. The longest first: two run at a time.
SHOWS = {
    "TLS": ("6.12", ("tls without", "tls", "tls counts")),
    "6.12": ("6.12", ("liburing", "sqpoll", "switched off", "tls limits", "tls libc", "tls sqpoll")),
    "6.1": ("6.1", ("liburing", "libc", "sqpoll", "limits", "tls too old")),
    "arm64": ("6.1 arm64", ("liburing", "libc")),
    "TLS, arm64": ("6.12 arm64", ("tls smoke",)),
    "5.10": ("5.10", ("refused",)),
}
TOOLS = ("TLS",)                        # the machines that need other programs than Python
pytestmark = pytest.mark.timeout(1200)  # the first time, packages are downloaded


@pytest.fixture(scope="module")
def boots(request, tmp_path_factory):
    """machine -> a future of what guest_serve told, for each machine that was selected."""
    wanted = {item.callspec.params["machine"] for item in request.session.items if item.path == request.path}
    files = guest.project() | guest.scripts() | guest.credentials(tmp_path_factory.mktemp("certificates"))
    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        yield {machine: pool.submit(serve, machine, prepared(machine), files) for machine in SHOWS if machine in wanted}


def prepared(machine):
    """Packages and images, or why there are none: the caches are shared, so one after another."""
    try:
        return guest.prepare(SHOWS[machine][0], *["tools"] * (machine in TOOLS))
    except guest.Unavailable as reason:
        return reason


def serve(machine, prepared, files):
    if isinstance(prepared, guest.Unavailable):
        raise prepared
    result = guest.boot(prepared, guest.TESTS / "guest_serve.py", *SHOWS[machine][1], files=files,
                        later=guest.TLS_MODULES[prepared.arch], timeout=800)
    assert result.status == 0, result.output
    return json.loads(result.output.splitlines()[-1])


@pytest.mark.parametrize("machine", SHOWS)
def test_machine(boots, machine):
    kernel, runs = SHOWS[machine]
    try:
        told = boots[machine].result()
    except guest.Unavailable as reason:
        pytest.skip(f"no guest with Linux {kernel}: {reason}")
    assert told["kernel"].startswith(kernel.partition(" ")[0] + ".")
    assert set(told["runs"]) == set(runs)
    failed = {f"{run}, {check}": error for run, checks in told["runs"].items() for check, error in checks.items()
              if error}
    assert not failed, "\n".join(f"--- {where}\n{error}" for where, error in failed.items())
