"""Reloads, from outside: new archives and certificates under load, and no response that fails or mixes two of them."""

import base64
import contextlib
import hashlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import httpx
import pytest
from support import PATIENCE, PYTHON, TARWEB, build_tar, noise, request, wait_until
from test_workers import metrics, status_port
from tlsclient import VERSIONS

needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")

RELOADS = 100           # of the storm
TLS_RELOADS = 20
LINES = {"/small.txt": 40, "/page.html": 400, "/large.bin": 60_000}     # in each file of a version
MANY = 60_000          # files of an archive that takes a while to load
HUGE = noise(24 << 20, seed=9)


# --- sites with a version ------------------------------------------------------------------------------------------


def content(target, version):
    """What `target` holds in that version. No two versions have the same length, or a line in common."""
    return b"%s, version %06d\n" % (target.encode(), version) * LINES[target] + b"." * (version % 1000)


def version_of(body):
    return int(re.search(rb"version (\d+)", body)[1])


def etag_of(body):
    """As archive.py describes it: the first 96 bits of SHA-256."""
    return f'"{base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:12]).decode()}"'


class Deployment:
    """A site that is deployed again and again, and what has been deployed."""

    def __init__(self, folder):
        self.path = folder / "site.tar"
        self.draft = folder / "new.tar"
        self.meant = {}             # (target, entity tag): version
        self.floor = 0              # the least version that a new connection may see
        self.deploy(1)

    def deploy(self, version):
        files = {target: content(target, version) for target in LINES}
        self.meant |= {(target, etag_of(body)): version for target, body in files.items()}
        build_tar(self.draft, {target[1:]: body for target, body in files.items()} | {f"only-{version}": b"here"})
        self.draft.rename(self.path)

    def check(self, target, status, etag, body, floor=0):
        """Fail unless this is, whole, what one of the versions has; gives the version."""
        assert status == 200, f"{target}: {status}"
        version = self.meant[target, etag]
        assert body == content(target, version), f"{target}: not version {version}, which its entity tag names"
        assert version >= floor, f"{target}: version {version}, {floor} had been there when the connection was made"
        return version


def reload(server, number=signal.SIGHUP):
    """Send that signal, and wait for what comes of it; gives the line that says so."""
    before = len(reports(server))
    server.process.send_signal(number)
    wait_until(lambda: len(reports(server)) > before)
    return reports(server)[before]


def reports(server):
    return re.findall(r"^tarweb: (reload.*)$", server.stderr(), re.M)


def renew(server, deployment, version):
    deployment.deploy(version)
    assert re.match(r"reloaded: generation \d+ serves 4 files, ", reload(server))
    deployment.floor = version


def bytes_read(pid):
    """What a process has read, from files and otherwise (proc_pid_io(5))."""
    return int(re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[1])


def descriptors(pid):
    """Where those lead that a process has open, sorted; numbers of pipes and sockets left out."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(re.sub(r"\[\d+\]", "", os.readlink(fd)))
    return sorted(links)


def settled(server, workers, sockets):
    """Once what former generations had is gone: `descriptors` of the supervisor. To each worker it has a socket."""
    wait_until(lambda: len(server.workers) == workers and descriptors(server.pid).count("socket:") == sockets)
    return descriptors(server.pid)


def has_open(pid, path):
    """Whether a process has this very file open, whatever its name is by now."""
    wanted = path.stat()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = fd.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


# --- clients that never stop ---------------------------------------------------------------------------------------


class Checkers:
    """Clients, each in a thread of its own, that ask one request after the other and check each response.

    A way is called as way(server, deployment, targets) and yields a version for each response that it has checked.
    """

    def __init__(self, server, deployment, ways):
        self.server, self.deployment = server, deployment
        self.stopped = threading.Event()
        self.failures, self.versions = [], [[] for _ in ways]
        self.threads = [threading.Thread(target=self.run, args=pair) for pair in zip(ways, self.versions, strict=True)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join(PATIENCE)

    def run(self, way, versions):
        try:
            for version in way(self.server, self.deployment, self.targets()):
                versions.append(version)
        except Exception as error:      # whatever it is, the test is to fail by it, and not the thread alone
            self.failures.append(f"{way.__name__}, after {len(versions)} responses: {error!r}")

    def targets(self):
        """Mostly small ones."""
        while not self.stopped.is_set():
            yield from ("/small.txt", "/page.html", "/small.txt", "/large.bin")
            time.sleep(0.001)           # leave the processors to the server and to wrk

    def verdict(self):
        assert self.failures == []
        assert all(self.versions), "a client has not got a single response"
        return sorted({version for versions in self.versions for version in versions})


def over_httpx(server, deployment, targets):
    """A pool with keep-alive."""
    with httpx.Client(verify=context_of(server), timeout=PATIENCE, trust_env=False) as client:
        for target in targets:
            response = client.get(server.url + target)
            yield deployment.check(target, response.status_code, response.headers["ETag"], response.content)


def over_new_connections(server, deployment, targets):
    with httpx.Client(verify=context_of(server), timeout=PATIENCE, trust_env=False) as client:
        for target in targets:
            floor = deployment.floor
            response = client.get(server.url + target, headers={"Connection": "close"})
            yield deployment.check(target, response.status_code, response.headers["ETag"], response.content, floor)


def over_kept_connections(server, deployment, targets):
    """One connection as long as the server keeps it: all of its responses are from one archive."""
    client = None
    for target in targets:
        if client is None:
            floor, seen = deployment.floor, set()
            client = server.connect()
        response = client.ask(target)
        version = deployment.check(target, response.status, response["ETag"], response.body, floor)
        seen.add(version)
        assert len(seen) == 1, f"responses from several archives on one connection: {seen}"
        yield version
        if response.closes:
            assert client.at_end()
            client.close()
            client = None
    if client is not None:
        client.close()


def over_pipelines(server, deployment, targets):
    """Three requests at once; the server may end the connection behind any of them, and says so."""
    for first in targets:
        floor, batch = deployment.floor, [first, "/small.txt", "/page.html"]
        with server.connect() as client:
            client.send(b"".join(map(request, batch)))
            for target in batch:
                response = client.response()
                yield deployment.check(target, response.status, response["ETag"], response.body, floor)
                if response.closes:
                    break


def context_of(server):
    return getattr(server, "context", True)


@contextlib.contextmanager
def wrk(url, connections=6):
    """Load as long as it is wanted; fails if one response of it has."""
    process = subprocess.Popen(["wrk", "-t1", f"-c{connections}", "-d300s", url], stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)      # stop, and say how it was
        output = process.communicate(timeout=PATIENCE)[0]
    assert "Non-2xx" not in output and "Socket errors" not in output, output
    assert int(re.search(r"(\d+) requests in", output)[1]) > 0


# --- taking up what is new -----------------------------------------------------------------------------------------


@pytest.fixture
def deployment(tmp_path):
    return Deployment(tmp_path)


def test_a_new_archive_is_taken_up(start, deployment):
    server = start(deployment.path)
    before = server.fetch("/small.txt")
    renew(server, deployment, 2)
    after = server.fetch("/small.txt")
    assert deployment.check("/small.txt", before.status, before["ETag"], before.body) == 1
    assert deployment.check("/small.txt", after.status, after["ETag"], after.body) == 2
    assert server.fetch("/only-1").status == 404
    assert server.fetch("/only-2").body == b"here"
    revalidated = server.fetch("/small.txt", If_None_Match=before["ETag"])
    assert (revalidated.status, version_of(revalidated.body)) == (200, 2)


def test_workers_change_and_the_supervisor_does_not(start, deployment):
    server = start(deployment.path, "--threads", "2")
    before = server.workers
    renew(server, deployment, 2)
    wait_until(lambda: len(server.workers) == 2)
    assert not set(server.workers) & set(before)
    server.check()


@needs_wrk
def test_p14_a_storm_of_reloads_under_load(start, deployment):
    """No response fails, none mixes two archives, and a connection made after a reload never sees what was before."""
    server = start(deployment.path, "--threads", "2")
    ways = over_httpx, over_new_connections, over_kept_connections, over_pipelines
    with wrk(f"{server.url}/small.txt"), Checkers(server, deployment, ways) as checkers:
        for version in range(2, RELOADS + 2):
            renew(server, deployment, version)
            assert not checkers.failures, checkers.failures
    assert len(checkers.verdict()) > RELOADS // 4, "hardly a version was seen"
    assert len(reports(server)) == RELOADS
    wait_until(lambda: len(server.workers) == 2)
    assert server.stderr().count("\n") == RELOADS, "more was said than that it reloaded"


@needs_wrk
def test_p14_a_storm_of_reloads_under_load_over_tls(start_tls, deployment):
    server = start_tls(deployment.path, "--threads", "2")
    ways = over_httpx, over_new_connections, over_kept_connections
    with wrk(f"{server.url}/page.html"), Checkers(server, deployment, ways) as checkers:
        for version in range(2, TLS_RELOADS + 2):
            renew(server, deployment, version)
            assert not checkers.failures, checkers.failures
    assert len(checkers.verdict()) > 2
    assert server.stderr().count("reloaded: ") == TLS_RELOADS


def test_p14_who_comes_alone_during_a_reload_is_not_forgotten(start, deployment):
    """The kernel wakes one of those who wait at a socket: it must not be one that is just about to leave."""
    server = start(deployment.path)
    for number in range(25):
        server.process.send_signal(signal.SIGHUP)
        while len(reports(server)) == number:
            assert server.fetch("/small.txt").status == 200
        assert server.fetch("/small.txt").status == 200


def test_idle_connections_are_answered_once_more(start, deployment):
    server = start(deployment.path, "--threads", "2")
    clients = [server.connect() for _ in range(40)]
    for client in clients[:20]:                         # half of them have asked before, half have only connected
        assert client.ask("/small.txt").status == 200
    for client in clients[30:]:                         # and some are in the middle of asking
        client.send(request("/small.txt")[:20])
    renew(server, deployment, 2)
    for number, client in enumerate(clients):
        client.send(request("/small.txt")[20:] if number >= 30 else request("/small.txt"))
        response = client.response()
        assert deployment.check("/small.txt", response.status, response["ETag"], response.body) == 1, number
        assert response.closes, number
        assert client.at_end()
        client.close()
    wait_until(lambda: len(server.workers) == 2)        # that was all the old ones had to do


def test_connections_that_stay_idle_are_closed_at_the_end_of_the_drain(start, deployment):
    server = start(deployment.path, "--drain", "1")
    with server.connect() as client:
        assert client.ask("/small.txt").status == 200
        renew(server, deployment, 2)
        assert len(server.workers) == 2, "the old worker did not wait for it"
        assert client.at_end()
    wait_until(lambda: len(server.workers) == 1)


def test_a_download_goes_on_beyond_the_drain(start, tmp_path):
    site = build_tar(tmp_path / "site.tar", {"huge.bin": HUGE})
    server = start(site, "--drain", "1")
    with server.connect(rcvbuf=32_768) as client, server.connect() as clock:
        client.send(request("/huge.bin"))
        client.pending = client.sock.recv(1000)
        assert clock.ask("/huge.bin", method="HEAD").status == 200
        build_tar(tmp_path / "new.tar", {"huge.bin": b"another one"}).rename(site)
        assert reload(server).startswith("reloaded: ")
        assert clock.at_end(), "idle connections are closed at the end of the drain"
        assert client.response().body == HUGE
        assert client.at_end()
    assert server.fetch("/huge.bin").body == b"another one"


def test_unix_sockets_outlive_generations(start, deployment, tmp_path):
    """One socket for all workers, old and new: none of those who connect meanwhile waits in vain."""
    path = tmp_path / "socket"
    server = start(deployment.path, "--listen", f"unix:{path}", "--threads", "2")

    def over_unix_sockets(_, deployment, targets):
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=PATIENCE) as client:
            for target in targets:
                floor = deployment.floor
                response = client.get(f"http://t{target}", headers={"Connection": "close"})
                yield deployment.check(target, response.status_code, response.headers["ETag"], response.content, floor)

    with Checkers(server, deployment, [over_unix_sockets, over_unix_sockets]) as checkers:
        for version in range(2, 17):
            renew(server, deployment, version)
    assert len(checkers.verdict()) > 2


# --- what is wrong is not taken up ---------------------------------------------------------------------------------


def pieces(data, count):
    """`data` in pieces, slowly, as a copy over a network comes; never as slowly as if it were over."""
    size, last = -(-len(data) // count), time.monotonic()
    for at in range(0, len(data), size):
        if time.monotonic() - last > 0.9:
            pytest.skip("this machine is so busy that a copy under way looks as if it were over")
        last = time.monotonic()
        yield data[at:at + size]
        time.sleep(0.25)


def no_tar(path):
    path.with_suffix(".new").write_bytes(b"<html>" * 1000)
    path.with_suffix(".new").rename(path)


def test_what_was_refused_is_let_go(start, deployment):
    """Neither its descriptor nor its mapping is left in the parent, however often that happens."""
    server = start(deployment.path)

    def left():
        mapped = Path(f"/proc/{server.pid}/maps").read_text().count(f"{deployment.path.parent}/")
        return mapped, len(os.listdir(f"/proc/{server.pid}/fd"))

    before = left()
    for _ in range(3):
        truncated(deployment.path)
        assert reload(server).startswith("reload failed, generation 1 still serves: ")
    assert left() == before


def truncated(path):
    """As a copy that was broken off leaves it."""
    path.with_suffix(".new").write_bytes(path.read_bytes()[:5000])
    path.with_suffix(".new").rename(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


def bad_header(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").rename(path)


WRONG = {
    "missing": (Path.unlink, "No such file"),
    "no tar": (no_tar, "tar"),
    "truncated": (truncated, "ends|truncated|short"),
    "a folder": (a_folder, "directory|regular|folder"),
    "a bad checksum": (bad_header, "checksum|tar"),
}


@pytest.mark.parametrize("name", WRONG)
def test_p14_a_bad_archive_leaves_the_old_one(start, deployment, name):
    spoil, why = WRONG[name]
    server = start(deployment.path, "--threads", "2")
    workers = server.workers
    spoil(deployment.path)
    line = reload(server)
    assert line.startswith("reload failed, generation 1 still serves: ")
    assert str(deployment.path) in line
    assert re.search(why, line, re.I), line
    assert server.stderr().count("\n") == 1
    assert server.workers == workers
    for _ in range(4):
        response = server.fetch("/small.txt")
        assert deployment.check("/small.txt", response.status, response["ETag"], response.body) == 1
    if deployment.path.is_dir():
        deployment.path.rmdir()
    deployment.deploy(2)
    assert reload(server).startswith("reloaded: generation 2 ")
    assert version_of(server.fetch("/small.txt").body) == 2


def test_a_lack_of_memory_leaves_the_old_one(start, deployment):
    server = start(deployment.path)
    before = resource.prlimit(server.pid, resource.RLIMIT_AS)
    taken = int(re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())[1]) * 1024
    resource.prlimit(server.pid, resource.RLIMIT_AS, (taken + (32 << 20), before[1]))
    build_tar(deployment.draft, {"huge.bin": HUGE, "zeros.bin": bytes(40 << 20)}).rename(deployment.path)
    size = deployment.path.stat().st_size
    assert reload(server).startswith(
        f"reload failed, generation 1 still serves: the archive of {size} bytes cannot be ")
    assert version_of(server.fetch("/small.txt").body) == 1
    resource.prlimit(server.pid, resource.RLIMIT_AS, before)
    assert reload(server).startswith("reloaded: generation 2 serves 2 files, ")
    assert server.fetch("/huge.bin").body == HUGE


def test_metrics_tell_of_reloads(start, deployment):
    server = start(deployment.path, "--status", "127.0.0.1:0")
    port = status_port(server)
    renew(server, deployment, 2)
    found = metrics(port)
    assert (found["generation"], found['reloads_total{result="success"}'], found["last_reload_success"]) == (2, 1, 1)
    no_tar(deployment.path)
    reload(server)
    found = metrics(port)
    assert (found["generation"], found['reloads_total{result="failure"}'], found["last_reload_success"]) == (2, 1, 0)
    renew(server, deployment, 3)
    found = metrics(port)
    assert (found["generation"], found['reloads_total{result="success"}'], found["last_reload_success"]) == (3, 2, 1)


class Live:
    """A certificate in the way that certbot has it: links from one folder to files in another."""

    def __init__(self, folder, pair):
        self.folder, self.root = folder, pair.root
        self.cert, self.key = folder / "fullchain.pem", folder / "privkey.pem"
        folder.mkdir()
        self.lead_to(pair)

    def lead_to(self, pair):
        for link, target in ((self.cert, pair.cert), (self.key, pair.key)):
            new = link.with_suffix(".new")
            new.symlink_to(target)
            new.rename(link)

    flags = property(lambda self: ("--tls-cert", str(self.cert), "--tls-key", str(self.key)))


@pytest.fixture
def live(tmp_path, pairs):
    return Live(tmp_path / "live", pairs["p256"])


def presented(server):
    """The certificate that a new client is shown."""
    with server.connect() as client:
        return client.tls.getpeercert(binary_form=True)


def test_a_new_certificate_is_taken_up(start_tls, deployment, live, authority, pairs):
    server = start_tls(deployment.path, "--threads", "2", pairs=[live])
    assert presented(server) == pairs["p256"].der
    new = authority.issue("rsa")
    live.lead_to(new)
    assert reload(server).startswith("reloaded: generation 2 ")
    assert {presented(server) for _ in range(6)} == {new.der}


def cert_missing(live, _pairs):
    live.cert.unlink()


def key_missing(live, _pairs):
    live.key.unlink()


def cert_no_pem(live, _pairs):
    live.cert.unlink()
    live.cert.write_text("-----BEGIN CERTIFICATE-----\nnot at all\n-----END CERTIFICATE-----\n")


def key_of_another(live, pairs):
    live.key.unlink()
    live.key.symlink_to(pairs["p384"].key)


def cert_empty(live, _pairs):
    live.cert.unlink()
    live.cert.touch()


@pytest.mark.parametrize("spoil", [cert_missing, key_missing, cert_no_pem, cert_empty, key_of_another])
def test_p14_a_bad_certificate_leaves_the_old_one(start_tls, deployment, live, authority, pairs, spoil):
    """And the archive too, though that is good: a generation is taken up whole."""
    server = start_tls(deployment.path, pairs=[live])
    said = server.stderr().count("\n")
    spoil(live, pairs)
    deployment.deploy(2)
    line = reload(server)
    assert line.startswith("reload failed, generation 1 still serves: ")
    assert str(live.folder) in line
    assert server.stderr().count("\n") == said + 1
    assert presented(server) == pairs["p256"].der
    assert version_of(server.fetch("/small.txt").body) == 1
    new = authority.issue()
    for link in (live.cert, live.key):
        link.unlink(missing_ok=True)
    live.lead_to(new)
    assert reload(server).startswith("reloaded: generation 2 ")
    assert presented(server) == new.der
    assert version_of(server.fetch("/small.txt").body) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_tickets_are_good_after_reloads(start_tls, deployment, live, authority, version):
    """Also with another certificate: whatever worker of whatever generation resumes the session that a client has."""
    server = start_tls(deployment.path, "--threads", "2", pairs=[live])
    context = server.context_of(version=version)
    with server.connect(context) as client:
        assert client.ask("/small.txt").status == 200
        session = client.tls.session
    for number in range(2, 5):
        live.lead_to(authority.issue())
        renew(server, deployment, number)
        with server.connect(context, session=session) as client:
            assert version_of(client.ask("/small.txt").body) == number
            assert client.tls.session_reused
            session = client.tls.session


# --- --watch -------------------------------------------------------------------------------------------------------


def test_watch_takes_up_what_is_moved_there(start, deployment):
    server = start(deployment.path, "--watch")
    for version in (2, 3):
        deployment.deploy(version)
        wait_until(lambda: len(reports(server)) == version - 1)     # noqa: B023
        assert version_of(server.fetch("/small.txt").body) == version
    assert all(report.startswith("reloaded: ") for report in reports(server))


def test_watch_takes_up_a_certificate_behind_a_link(start_tls, deployment, live, authority):
    server = start_tls(deployment.path, "--watch", pairs=[live])
    new = authority.issue()
    live.lead_to(new)
    wait_until(lambda: reports(server))
    assert reports(server)[0].startswith("reloaded: generation 2 ")
    assert presented(server) == new.der


def test_watch_waits_until_a_copy_is_whole(start, deployment):
    """A file that is there already, and still being written to."""
    server = start(deployment.path, "--watch")
    old = deployment.path.read_bytes()
    deployment.deploy(2)
    data = deployment.path.read_bytes()
    deployment.draft.write_bytes(old)
    deployment.draft.rename(deployment.path)        # as if nothing had been
    with deployment.draft.open("wb", buffering=0) as file:
        deployment.draft.rename(deployment.path)
        for piece in pieces(data, 16):              # altogether longer than a change has to be stable for
            file.write(piece)
            assert version_of(server.fetch("/small.txt").body) == 1
    assert [report for report in reports(server) if "failed" in report] == []
    wait_until(lambda: "generation 2 " in server.stderr() and version_of(server.fetch("/small.txt").body) == 2)
    assert all(report.startswith("reloaded: ") for report in reports(server))


def test_watch_says_once_what_is_wrong(start, deployment):
    server = start(deployment.path, "--watch")
    no_tar(deployment.path)
    wait_until(lambda: reports(server))
    time.sleep(2.5)                                 # two more looks
    assert len(reports(server)) == 1
    assert reports(server)[0].startswith("reload failed, generation 1 still serves: ")
    deployment.deploy(2)
    wait_until(lambda: len(reports(server)) == 2)
    assert version_of(server.fetch("/small.txt").body) == 2


# --- --keep, and several sites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_former_archives_answer_for_what_is_gone(start, deployment, keep):
    server = start(deployment.path, "--keep", str(keep), "--threads", "2")
    for version in range(2, 6):
        renew(server, deployment, version)
        for other in range(1, version + 1):
            kept = other >= version - keep
            response = server.fetch(f"/only-{other}")
            assert (response.status, response.body == b"here") == ((200, True) if kept else (404, False)), other
        assert version_of(server.fetch("/small.txt").body) == version


def test_a_reload_of_the_same_archive_keeps_no_copy_of_it(start, deployment):
    """It would push the one before out."""
    server = start(deployment.path, "--keep", "1")
    renew(server, deployment, 2)
    for _ in range(3):
        assert reload(server).startswith("reloaded: ")
    assert server.fetch("/only-1").body == b"here"


def test_kept_archives_are_let_go(start, deployment):
    server = start(deployment.path, "--keep", "1")
    sockets = descriptors(server.pid).count("socket:")
    for version in range(2, 5):
        renew(server, deployment, version)
    before = settled(server, 1, sockets)
    for version in range(5, 12):
        renew(server, deployment, version)
    assert settled(server, 1, sockets) == before


def ask_host(server, host, target):
    with server.connect() as client:
        client.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return client.response()


def test_only_the_archive_that_has_changed_is_read(start, tmp_path):
    large = noise(16 << 20, seed=3)
    changing = build_tar(tmp_path / "a.tar", {"name": b"a, first"})
    same = build_tar(tmp_path / "b.tar", {"name": b"b", "large.bin": large})
    server = start(changing, "--site", f"b.example={same}", "--site", f"*.b.example={same}", "--threads", "2")
    before = bytes_read(server.pid)
    build_tar(tmp_path / "new.tar", {"name": b"a, second"}).rename(changing)
    assert reload(server).startswith("reloaded: generation 2 ")
    assert bytes_read(server.pid) - before < 1 << 20
    assert ask_host(server, "a.example", "/name").body == b"a, second"
    for host in ("b.example", "www.b.example"):
        assert ask_host(server, host, "/name").body == b"b"
        assert ask_host(server, host, "/large.bin").body == large
    build_tar(tmp_path / "new.tar", {"name": b"b, second"}).rename(same)
    assert reload(server).startswith("reloaded: generation 3 ")
    assert [ask_host(server, host, "/name").body for host in ("a.example", "b.example", "www.b.example")] == [
        b"a, second", b"b, second", b"b, second"]
    assert not any("deleted" in link for link in descriptors(server.pid)), "former archives are still open"


def test_one_bad_archive_of_several_leaves_all(start, tmp_path):
    first = build_tar(tmp_path / "a.tar", {"name": b"a, first"})
    second = build_tar(tmp_path / "b.tar", {"name": b"b, first"})
    server = start(first, "--site", f"b.example={second}")
    build_tar(tmp_path / "new.tar", {"name": b"a, second"}).rename(first)
    no_tar(second)
    line = reload(server)
    assert line.startswith("reload failed, ") and str(second) in line
    assert ask_host(server, "a.example", "/name").body == b"a, first"
    assert ask_host(server, "b.example", "/name").body == b"b, first"


# --- nothing grows -------------------------------------------------------------------------------------------------


def test_nothing_grows_over_fifty_reloads(start_tls, deployment, live, authority, tmp_path):
    """Those that fail included, with certificates, a log and a former archive to be kept."""
    server = start_tls(deployment.path, "--threads", "2", "--keep", "1", "--access-log", str(tmp_path / "log"),
                       pairs=[live])
    pairs = [authority.issue(kind) for kind in ("p256", "rsa")]
    sockets = descriptors(server.pid).count("socket:")

    def reloads(first, count):
        for version in range(first, first + count):
            live.lead_to(pairs[version % 2])
            if version % 5 == 0:
                no_tar(deployment.path)
                assert reload(server).startswith("reload failed, ")
            elif version % 5 == 1:
                assert reload(server, signal.SIGUSR1).startswith("reloaded: ")
            renew(server, deployment, version)
            assert server.fetch("/small.txt").status == 200
        return settled(server, 2, sockets), anonymous_memory(server.pid)

    reloads(2, 10)
    files, memory = reloads(12, 10)
    files_after, memory_after = reloads(22, 50)
    assert files_after == files
    assert memory_after - memory < 2 << 20


def anonymous_memory(pid):
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


# --- signals while it loads ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_site(tmp_path_factory):
    """An archive of so many files that it takes a while to load."""
    path = tmp_path_factory.mktemp("slow") / "slow.tar"
    with path.open("wb") as file:
        for i in range(MANY):
            file.write(tarfile.TarInfo(f"{i:06}").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    return path


def deploy_slow(server, slow_site, path):
    """Have it loaded; returns when that is under way."""
    draft = path.with_name("slow.tar")
    shutil.copy(slow_site, draft)
    draft.rename(path)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: has_open(server.pid, path))
    assert reports(server) == []


def test_a_reload_is_asked_for_while_one_is_under_way(start, deployment, slow_site):
    """The last archive that was there when it was asked for is served in the end."""
    server = start(deployment.path)
    deploy_slow(server, slow_site, deployment.path)
    deployment.deploy(2)
    for _ in range(3):
        server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(reports(server)) >= 2)
    assert reports(server)[0].startswith(f"reloaded: generation 2 serves {MANY} files")
    assert version_of(server.fetch("/small.txt").body) == 2


def test_requests_are_answered_while_a_load_is_under_way(start, deployment, slow_site):
    server = start(deployment.path)
    with server.connect() as client:
        deploy_slow(server, slow_site, deployment.path)
        assert version_of(client.ask("/small.txt").body) == 1
        assert reports(server) == [], "the load was over too soon for this to mean anything"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_an_end_is_asked_for_while_a_reload_is_under_way(start, deployment, slow_site, number):
    server = start(deployment.path)
    deploy_slow(server, slow_site, deployment.path)
    server.signal(number)
    server.wait(10)
    assert reports(server) == [], "it went on loading"


def test_an_end_is_asked_for_while_it_starts(slow_site):
    process = subprocess.Popen([PYTHON, str(TARWEB), "-l", "127.0.0.1:0", str(slow_site)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: has_open(process.pid, slow_site))
    process.terminate()
    assert process.communicate(timeout=PATIENCE) == ("", "")
    assert process.returncode == 0


def test_a_reopened_log_does_not_make_good_a_reload_that_failed(start, tmp_path):
    """Else the nightly rotation would end the alert on last_reload_success."""
    site, status = build_tar(tmp_path / "site.tar", {"a": b"a"}), tmp_path / "status"
    server = start(site, "--access-log", tmp_path / "access.log", "--status", f"unix:{status}")

    def last_reload():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(status))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()
        return re.findall(r"^tarweb_last_reload_(?:success|time_seconds) (\S+)", text, re.M)

    os.replace(build_tar(tmp_path / "good.tar", {"a": b"a"}), site)
    site.write_bytes(b"junk" * 1000)
    assert reload(server).startswith("reload failed, generation 1 still serves: ")
    failed = last_reload()
    assert failed[0] == "0"
    assert reload(server, signal.SIGUSR1).startswith("reloaded: generation 2 has the access log opened anew")
    assert last_reload() == failed
    os.replace(build_tar(tmp_path / "good.tar", {"a": b"a"}), site)
    assert reload(server).startswith("reloaded: generation 3 serves ")
    assert last_reload()[0] == "1"


def test_the_log_is_reopened_and_the_archive_is_not_read(start, tmp_path):
    site = build_tar(tmp_path / "site.tar", {"huge.bin": HUGE, "a": b"a"})
    log, old = tmp_path / "access.log", tmp_path / "access.log.1"
    server = start(site, "--access-log", str(log), "--threads", "2")
    assert server.fetch("/a?before").body == b"a"
    log.rename(old)
    before = bytes_read(server.pid)
    assert reload(server, signal.SIGUSR1).startswith("reloaded: generation 2 ")
    assert bytes_read(server.pid) - before < 1 << 20
    assert server.fetch("/a?after").body == b"a"
    server.stop()
    assert re.findall(r"GET (\S+)", old.read_text()) == ["/a?before"]
    assert re.findall(r"GET (\S+)", log.read_text()) == ["/a?after"]
