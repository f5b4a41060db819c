"""The same server on other kernels and another architecture, in virtual machines: see guest.py and guest_serve.py.

6.1 is the oldest kernel that the README promises, and the oldest that the server starts on.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import guest
import pytest

# What each kernel is put through: names of guest_serve.RUNS. The longest first: two machines run at a time.
SHOWS = {
    "6.1": ("liburing", "libc", "sqpoll", "limits"),
    "6.1 arm64": ("liburing", "libc"),
    "6.12": ("liburing", "sqpoll", "switched off"),
    "5.10": ("refused",),
}
pytestmark = pytest.mark.timeout(900)   # the first time, packages are downloaded


@pytest.fixture(scope="module")
def boots(request):
    """kernel -> a future of what guest_serve told, for each kernel that was selected."""
    wanted = {item.callspec.params["kernel"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        yield {kernel: pool.submit(serve, kernel, prepared(kernel)) for kernel in SHOWS if kernel in wanted}


def prepared(kernel):
    """Packages and images, or why there are none: the caches are shared, so one kernel after another."""
    try:
        return guest.prepare(kernel)
    except guest.Unavailable as reason:
        return reason


def serve(kernel, machine):
    if isinstance(machine, guest.Unavailable):
        raise machine
    result = guest.boot(machine, guest.TESTS / "guest_serve.py", *SHOWS[kernel], files=guest.project(), timeout=180)
    assert result.status == 0, result.output
    return json.loads(result.output.splitlines()[-1])


@pytest.mark.parametrize("kernel", SHOWS)
def test_kernel(boots, kernel):
    try:
        told = boots[kernel].result()
    except guest.Unavailable as reason:
        pytest.skip(f"no guest with Linux {kernel}: {reason}")
    assert told["kernel"].startswith(kernel.partition(" ")[0] + ".")
    assert set(told["runs"]) == set(SHOWS[kernel])
    failed = {f"{run}, {check}": error for run, checks in told["runs"].items() for check, error in checks.items()
              if error}
    assert not failed, "\n".join(f"--- {where}\n{error}" for where, error in failed.items())
