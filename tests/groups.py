"""The groups of files in the README's table: which files, which flags need them, and whether these do what they say."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import httpx
from support import FILES, ROOT, Client, build_tar, request, wait_until
from tlsclient import TlsClient, client_context

BASE = "base"
RULES = "rules"         # needed by a file in the site, not by a flag
HTTP_TESTS = "test_files.py", "test_http.py", "test_conditional.py", "test_ranges.py", "test_connection.py"


def files_of_groups():
    """{group: names of its files}, as the README has them."""
    table = (ROOT / "README.md").read_text().partition("### Reading order")[2].partition("\n## ")[0]
    groups = {}
    for name, group in re.findall(r"^\| `(\w+\.py)` \| .* \| ([\w ]+) \|$", table, re.M):
        groups.setdefault(group, []).append(name)
    return groups


class Group(NamedTuple):
    """flags(folder, pair): for a server that needs the group, which keeps files in `folder`; the one to be named in
    messages comes first. check(server, folder, pair): assert that such a server does what they ask for. files: what the
    site needs to have for that, beside FILES."""

    flags: Callable
    check: Callable
    files: dict = {}

    def site(self, folder):
        return build_tar(folder / "group.tar", {**FILES, **self.files})


def plain_http(server, *_):
    assert server.fetch("/next").body == FILES["next"]


def https(server, _, pair):
    with TlsClient(("127.0.0.1", server.port), client_context(pair.root)) as client:
        assert client.ask("/next").body == FILES["next"]


def logged(server, folder, _):
    target = f"/next?{time.monotonic_ns()}"
    assert server.fetch(target).status == 200
    wait_until(lambda: f'"GET {target} HTTP/1.1" 200 ' in (folder / "log").read_text())


def status_pages(server, folder, _):
    plain_http(server)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(folder / "status")), base_url="http://status") as status:
        assert status.get("/healthz").status_code == 200
        assert "tarweb_info" in status.get("/metrics").text


def behind_another(server, folder, _):
    """With a PROXY header, and passed as a descriptor."""
    begun = b"PROXY TCP4 192.0.2.1 192.0.2.254 56324 443\r\n" + request("/next")
    with server.connect() as client:
        client.send(begun)
        assert client.response().body == FILES["next"]
    with socket.create_server(("127.0.0.1", 0)) as listener, Client(listener.getsockname()) as client, \
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as front:
        accepted, _ = listener.accept()
        front.connect(str(folder / "passed"))
        with accepted:
            socket.send_fds(front, [begun], [accepted.fileno()])
        assert client.response().body == FILES["next"]


def ruled(server, *_):
    plain_http(server)
    answer = server.fetch("/old")
    assert (answer.get("Location"), answer.get("X-Rules")) == ("/next", "yes")


def directory(folder, _):
    """As flags: a site that is a directory."""
    (folder / "my-site").mkdir(exist_ok=True)
    (folder / "my-site" / "page.html").write_bytes(FILES["dir/page.html"])
    return ["--site", f"packed.example={folder / 'my-site'}"]


def packed_directory(server, folder, _):
    plain_http(server)
    with server.connect() as client:
        client.send(request("/page.html").replace(b"Host: t", b"Host: packed.example"))
        assert client.response().body == FILES["dir/page.html"]


GROUPS = {
    BASE: Group(lambda folder, pair: [], plain_http),
    "TLS": Group(lambda folder, pair: [*pair.flags], https),
    "access log": Group(lambda folder, pair: ["--access-log", f"{folder / 'log'}"], logged),
    "metrics": Group(lambda folder, pair: ["--status", f"unix:{folder / 'status'}"], status_pages),
    "PROXY": Group(lambda folder, pair: ["--proxy-from", "127.0.0.0/8", "--passfd", f"{folder / 'passed'}"],
                   behind_another),
    RULES: Group(lambda folder, pair: [], ruled, {"_redirects": b"/old /next\n", "_headers": b"/*\n  X-Rules: yes\n"}),
    "tools": Group(directory, packed_directory),
}


# Files of a group that serving does not need, with the flags that need them.
COMMANDS = {"check.py": ["--check"], "explain.py": ["--explain", "GET /"]}


def run_http_tests(program):
    """Run the tests of HTTP with another copy of the server."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                            "-k", "not TLS", *(ROOT / "tests" / name for name in HTTP_TESTS)], cwd=ROOT,
                           stdin=subprocess.DEVNULL,
                           env=outer | {"TARWEB_PROGRAM": str(program)}, capture_output=True, text=True, timeout=110,
                           check=False)
    assert ended.returncode == 0, ended.stdout
