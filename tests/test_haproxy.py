"""HAProxy in front of three instances, by the file that is shipped: a rolling deploy and a sudden death under load.

Of the file only addresses, ports and paths are changed. Needs haproxy; HTTP/2 needs curl.
"""

import collections
import contextlib
import csv
import http.client
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request

import pytest
from support import PATIENCE, ROOT, Client, build_tar, noise, prose, wait_until
from tlsclient import TlsClient, client_context

HAPROXY = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin")
pytestmark = pytest.mark.skipif(not HAPROXY, reason="needs haproxy")

FILE = ROOT / "deploy/haproxy.cfg"
PORTS = "80", "443", "8080", "8079", "8404"                 # in that file
INSTANCES = {"web1": "127.0.0.11", "web2": "127.0.0.12", "web3": "127.0.0.13"}
HERE = "127.0.0.1"                                          # where HAProxy connects from
VISITORS = 6


def version(number):
    """The files of one deploy: the same paths, and in each of them other bytes."""
    return {f"page/{i}.html": f"<!doctype html><title>version {number}, page {i}</title>".encode() + prose(300 * i)
            for i in range(20)} | {"picture.bin": noise(200_000, seed=number)}


VERSIONS = [version(number) for number in range(2)]
HUGE = {"huge.bin": noise(1 << 20, seed=9) * 64}            # more than all buffers between here and there


def free_ports(count):
    """Ports that are free on all addresses, below those that the kernel gives to clients."""
    found = []
    for port in random.sample(range(10_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no free ports")


class Front:
    """HAProxy with the shipped file, and how to get at it: `ports` are those it has in place of the file's. `change`:
    pairs of words in the file, and what to put there."""

    def __init__(self, folder, pair, passing_through=False, change=()):
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.context = client_context(pair.root)
        (folder / "site.pem").write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
        self.file = folder / "haproxy.cfg"
        text = FILE.read_text()
        for before, after in change:
            assert before in text
            text = text.replace(before, after)
        self.file.write_text(self.adapted(text, folder / "site.pem", passing_through))
        self.log = folder / "haproxy.log"

    def adapted(self, text, certificate, passing_through):
        if passing_through:                     # do as the file says
            text = re.sub(r"# --- TLS ends here\n.*?(?=# --- Or)", "", text, flags=re.S).replace("\n#|", "\n")
        if os.geteuid():
            text = re.sub(r"^    (user|group|chroot) .*\n", "", text, flags=re.M)
        text = text.replace(":::", "[::ffff:127.0.0.1]:").replace("10.0.0.", "127.0.0.")
        text = text.replace("/etc/haproxy/site.pem", str(certificate))
        return re.sub(r"(?<=[\]\d]:)(\d+)\b|(?<=check port )(\d+)\b", lambda found: str(self.ports[found[0]]), text)

    def __enter__(self):
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([HAPROXY, "-db", "-f", str(self.file)], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)
        try:
            wait_until(lambda: self.process.poll() is not None or self.answers())
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(PATIENCE)

    def answers(self):
        with contextlib.suppress(OSError):
            return bool(self.state())
        return False

    def state(self):
        """{instance: its row of the page of HAProxy's state}."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['8404']}/;csv", timeout=PATIENCE) as page:
            rows = csv.DictReader(page.read().decode().removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["svname"] in INSTANCES}

    def is_up(self, name, up=True):
        """Whether HAProxy sends requests to an instance; a change that it has not made up its mind about is neither."""
        return self.state()[name]["status"] == ("UP" if up else "DOWN")

    def sum(self, column):
        return sum(int(row[column] or 0) for row in self.state().values())

    def connect(self, source=HERE):
        """http.client's connection over TLS, from an address of this machine."""
        return http.client.HTTPSConnection("127.0.0.1", self.ports["443"], timeout=PATIENCE, context=self.context,
                                           source_address=(source, 0))

    def instance(self, name, lame_duck=30):
        """The flags of an instance."""
        return ("--proxy-from", HERE, "--status", f"{INSTANCES[name]}:{self.ports['8079']}",
                "--lame-duck", str(lame_duck)), f"{INSTANCES[name]}:{self.ports['8080']}"


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    return [build_tar(folder / f"{number}.tar", files) for number, files in enumerate([*VERSIONS, HUGE])]


@pytest.fixture
def front(tmp_path, pairs):
    with Front(tmp_path, pairs["p256"]) as front:
        yield front


@pytest.fixture
def launch(start):
    """launch(Front, name, tar, *more flags) -> the Server of that instance, once HAProxy sends requests there."""
    running = []

    def begin(front, name, tar, *more, **options):
        flags, listen = front.instance(name, **options)
        running.append(start(tar, *flags, *more, listen=listen))
        wait_until(lambda: front.is_up(name))
        return running[-1]

    yield begin
    for server in running:
        hurry(server)


def hurry(server):
    """End a server whose lame duck's time nobody has to wait for."""
    while server.process.poll() is None:
        server.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.2)


def get(connection, path):
    connection.request("GET", path)
    response = connection.getresponse()
    return response, response.read()


class Visitors:
    """Load: every other one keeps its connection (if `keeping`), the others have a new one for each request. `wrong`:
    all that was not as it should be; `seen`: how often which version was seen."""

    def __init__(self, connect, keeping=True):
        self.connect, self.keeping = connect, keeping
        self.wrong, self.seen = [], collections.Counter()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.visit, args=[seed]) for seed in range(VISITORS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def visit(self, seed):
        choose, keep = random.Random(seed), self.keeping and seed % 2
        connection = self.connect()
        while not self.over.wait(0.003):
            path = choose.choice(list(VERSIONS[0]))
            try:
                response, body = get(connection, "/" + path)
                version = [files[path] for files in VERSIONS].index(body)
                assert response.status == 200
                self.seen[version] += 1
            except Exception as error:          # whatever it is, the visitor has not got the page
                self.wrong.append((path, repr(error)))
                connection.close()
            if not keep:
                connection.close()              # it connects again by itself
        connection.close()

    def see(self, count, *versions):
        """Wait until so many more pages of these versions have been seen."""
        before = self.seen.copy()
        wait_until(lambda: self.wrong or all(self.seen[one] >= before[one] + count for one in versions))


# --- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passing_through", [False, True])
def test_the_file_has_no_fault(tmp_path, pairs, passing_through):
    """HAProxy has nothing to say about it, neither as it stands nor with its other half."""
    front = Front(tmp_path, pairs["p256"], passing_through)
    checked = subprocess.run([HAPROXY, "-c", "-f", str(front.file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_nothing_of_it_but_addresses_is_changed(tmp_path, pairs):
    ours, theirs = Front(tmp_path, pairs["p256"]).file.read_text(), FILE.read_text()
    assert len(ours.splitlines()) == len(theirs.splitlines()) - (3 if os.geteuid() else 0)
    assert len(set(theirs.splitlines()) - set(ours.splitlines())) <= 16


# --- requests ------------------------------------------------------------------------------------------------------


def test_pages_pass_and_the_log_has_who_asked(front, launch, tars, tmp_path):
    """From several addresses, IPv4 in IPv6 for HAProxy, on kept connections; HAProxy keeps its own, too."""
    server = launch(front, "web1", tars[0], "--access-log", str(tmp_path / "log"))
    clients = ["127.0.0.1", "127.0.0.5", "127.1.2.3"]
    connections = [front.connect(client) for client in clients]
    for number in range(20):
        for connection in connections:
            response, body = get(connection, f"/page/{number}.html")
            assert (response.status, body) == (200, VERSIONS[0][f"page/{number}.html"])
            assert response.headers["ETag"] and response.headers["Server"] == "tarweb"
    for connection in connections:
        connection.close()
    page = urllib.request.urlopen(f"http://{INSTANCES['web1']}:{front.ports['8079']}/metrics", timeout=PATIENCE)
    with page:
        accepted = int(re.search(rb"^tarweb_connections_accepted_total (\d+)$", page.read(), re.M)[1])
    assert accepted <= 10 * len(clients)        # of 20 requests each; one that is idle for long HAProxy lets go
    hurry(server)
    logged = collections.Counter(line.split()[0] for line in (tmp_path / "log").read_text().splitlines())
    assert logged == dict.fromkeys(clients, 20)


def test_methods_conditions_and_ranges_pass(front, launch, tars):
    launch(front, "web1", tars[0])
    with contextlib.closing(front.connect()) as connection:
        first, body = get(connection, "/picture.bin")
        for fields, status in (({"If-None-Match": first.headers["ETag"]}, 304), ({"Range": "bytes=5-9"}, 206),
                               ({"Range": "bytes=9999999-"}, 416), ({"If-Match": '"other"'}, 412)):
            connection.request("GET", "/picture.bin", headers=fields)
            response = connection.getresponse()
            assert (response.status, status != 206 or response.read() == body[5:10]) == (status, True)
            response.read()
        for method, status in (("HEAD", 200), ("OPTIONS", 204), ("POST", 405), ("DELETE", 405), ("BREW", 501)):
            connection.request(method, "/picture.bin", b"12345" if method == "POST" else None)
            response = connection.getresponse()
            assert (response.status, len(response.read()) > 0) == (status, status > 400)
        assert get(connection, "/no-such")[0].status == 404
    assert front.is_up("web1")


def test_plain_http_is_sent_to_https(front):
    with Client(("127.0.0.1", front.ports["80"])) as client:
        client.send(b"GET /page/1.html?a HTTP/1.1\r\nHost: example.com\r\n\r\n")
        response = client.response()
        assert (response.status, response["Location"]) == (301, "https://example.com/page/1.html?a")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_http_2(front, launch, tars, pairs, tmp_path):
    """Many pages at a time on one connection; tarweb is asked in HTTP/1.1."""
    if b"HTTP2" not in subprocess.run(["curl", "-V"], capture_output=True, check=True).stdout:
        pytest.skip("this curl does not speak HTTP/2")
    launch(front, "web1", tars[0])
    launch(front, "web2", tars[0])
    urls = [f"https://127.0.0.1:{front.ports['443']}/page/{i}.html" for i in range(20)]
    folder = tmp_path / "got"
    got = subprocess.run(["curl", "-sS", "-Z", "--http2", "--noproxy", "*", "--cacert", str(pairs["p256"].root),
                          "--create-dirs", "--output-dir", str(folder), "--remote-name-all",
                          "-w", "%{http_version} %{http_code}\n", *urls], capture_output=True, check=True)
    assert got.stdout.splitlines() == 20 * [b"2 200"]
    for i in range(20):
        assert (folder / f"{i}.html").read_bytes() == VERSIONS[0][f"page/{i}.html"]


TLVS = "crc32c,unique-id,authority,ssl,cert-cn,ssl-cipher,cert-sig,cert-key"


@pytest.mark.parametrize("change", [
    [("send-proxy-v2", "send-proxy")],
    [("send-proxy-v2", f"send-proxy-v2 proxy-v2-options {TLVS}"),
     ("option dontlognull", "option dontlognull\n    unique-id-format %[uuid()]")],
    [("check port 8079", "check"), ("/readyz", "/page/1.html")],
], ids=["version 1", "all TLVs", "checks with a header that says LOCAL"])
def test_other_headers_that_it_can_send(tmp_path, pairs, launch, tars, change):
    with Front(tmp_path, pairs["p256"], change=change) as front:
        server = launch(front, "web1", tars[0], "--access-log", str(tmp_path / "log"))
        with contextlib.closing(front.connect("127.0.0.5")) as connection:
            for i in range(3):
                assert get(connection, f"/page/{i}.html?visitor")[1] == VERSIONS[0][f"page/{i}.html"]
        hurry(server)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines if "visitor" in line] == 3 * ["127.0.0.5"]
    assert {line.split()[0] for line in lines if "visitor" not in line} <= {HERE}


# --- instances that come and go ------------------------------------------------------------------------------------


def test_who_is_not_ready_gets_no_request(front, launch, tars):
    """Nobody is: 503. One is, and has them all. It is a lame duck: 503 again, though it still serves who is there."""
    with contextlib.closing(front.connect()) as connection:
        wait_until(lambda: front.is_up("web1", False))
        assert get(connection, "/page/1.html")[0].status == 503
        server = launch(front, "web1", tars[0])
        assert get(connection, "/page/1.html")[1] == VERSIONS[0]["page/1.html"]
        server.signal(signal.SIGTERM)
        assert get(connection, "/page/2.html")[1] == VERSIONS[0]["page/2.html"]
        wait_until(lambda: front.is_up("web1", False))
        assert get(connection, "/page/1.html")[0].status == 503
        server.check()
        server.signal(signal.SIGTERM)
        server.wait()


def test_a_rolling_deploy_loses_no_request(front, launch, tars):
    """One instance after the other is stopped, by its lame duck's time, and started with the new archive."""
    servers = {name: launch(front, name, tars[0], lame_duck=2) for name in INSTANCES}
    with Visitors(front.connect) as visitors:
        visitors.see(20, 0)
        for name, server in servers.items():
            server.signal(signal.SIGTERM)
            server.wait()
            servers[name] = launch(front, name, tars[1], lame_duck=2)
            visitors.see(20, *((0, 1) if name != "web3" else (1,)))
    assert visitors.wrong == []
    assert visitors.seen[0] and visitors.seen[1]
    with contextlib.closing(front.connect()) as connection:
        for _ in range(6):
            assert get(connection, "/page/1.html")[1] == VERSIONS[1]["page/1.html"]
            connection.close()
    assert front.sum("eresp") == front.sum("cli_abrt") == front.sum("srv_abrt") == 0


def test_a_reload_needs_no_restart(front, launch, tmp_path):
    """As the file says of a new archive; HAProxy notices nothing but connections that end in good order."""
    moving = tmp_path / "site.tar"
    build_tar(moving, VERSIONS[0])
    servers = [launch(front, name, moving) for name in ("web1", "web2")]
    with Visitors(front.connect) as visitors:
        visitors.see(20, 0)
        for number in (1, 0):
            os.replace(build_tar(tmp_path / "new.tar", VERSIONS[number]), moving)
            for server in servers:
                server.process.send_signal(signal.SIGHUP)
                wait_until(lambda server=server, number=number: f"generation {3 - number} serves" in server.stderr())
            visitors.see(20, number)
    assert visitors.wrong == []
    assert [front.sum(column) for column in ("econ", "eresp", "wretr", "wredis")] == [0, 0, 0, 0]


def test_a_lame_duck_is_left_before_it_hurts(front, launch, tars):
    """Whoever waits for HAProxy to notice needs none of its retries."""
    launch(front, "web1", tars[0])
    server = launch(front, "web2", tars[0])
    with Visitors(front.connect) as visitors:
        visitors.see(20, 0)
        server.signal(signal.SIGTERM)
        wait_until(lambda: front.is_up("web2", False))
        server.signal(signal.SIGTERM)
        server.wait()
        visitors.see(20, 0)
    assert visitors.wrong == []
    assert [front.sum(column) for column in ("econ", "eresp", "wretr", "wredis")] == [0, 0, 0, 0]


def test_a_download_goes_on_while_its_instance_is_leaving(front, launch, tars):
    server = launch(front, "web1", tars[2])
    with contextlib.closing(front.connect()) as connection:
        connection.request("GET", "/huge.bin")
        response = connection.getresponse()
        beginning = response.read(1000)
        server.signal(signal.SIGTERM)
        wait_until(lambda: front.is_up("web1", False))
        server.signal(signal.SIGTERM)           # now it drains
        assert beginning + response.read() == HUGE["huge.bin"]
    server.wait()


def kill(server):
    """End the parent and its workers with no chance to say anything; none of the workers may outlive the parent's
    signal to them, so they cannot move meanwhile."""
    workers = server.workers
    for pid in (*workers, server.pid):
        os.kill(pid, signal.SIGSTOP)
    for pid in (server.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    server.process.communicate()


def test_a_sudden_death_costs_what_was_in_flight_at_most(front, launch, tars):
    servers = {name: launch(front, name, tars[0]) for name in INSTANCES}
    with Visitors(front.connect) as visitors:
        visitors.see(20, 0)
        kill(servers["web2"])
        visitors.see(20, 0)
        wait_until(lambda: front.is_up("web2", False))
        lost = len(visitors.wrong)
        assert lost <= VISITORS, visitors.wrong
        launch(front, "web2", tars[0])
        visitors.wrong, wrong = [], visitors.wrong
        visitors.see(50, 0)
        assert visitors.wrong == []
    assert all("IncompleteRead" in error for _, error in wrong), wrong      # begun, and visibly cut off


def test_downloads_from_the_dead_are_cut_and_those_from_others_are_not(front, launch, tars):
    servers = {name: launch(front, name, tars[2]) for name in INSTANCES}
    connections = [front.connect() for _ in INSTANCES]
    responses = []
    for connection in connections:              # each goes to the one that has the fewest
        connection.request("GET", "/huge.bin")
        responses.append(connection.getresponse())
    kill(servers["web2"])
    ends = []
    for response in responses:
        try:
            ends.append(response.read() == HUGE["huge.bin"])
        except http.client.IncompleteRead:
            ends.append("cut")
    assert sorted(map(str, ends)) == ["True", "True", "cut"]
    for connection in connections:
        connection.close()


# --- TLS passed through --------------------------------------------------------------------------------------------


@pytest.fixture
def passing(tmp_path, pairs):
    with Front(tmp_path, pairs["p256"], passing_through=True) as front:
        yield front


def test_tls_passed_through(passing, launch, tars, pairs, tmp_path):
    """It ends at the instance, which still knows who the client is. Instances come and go without a failed request
    on new connections, and kept ones are told that they end."""
    more = *pairs["p256"].flags, "--ktls", "off"
    servers = {"web1": launch(passing, "web1", tars[0], *more, "--access-log", str(tmp_path / "log"))}
    with contextlib.closing(passing.connect("127.0.0.5")) as connection:
        assert get(connection, "/picture.bin")[1] == VERSIONS[0]["picture.bin"]
    kept = TlsClient(("127.0.0.1", passing.ports["443"]), passing.context)
    assert kept.ask("/page/1.html").body == VERSIONS[0]["page/1.html"]
    servers["web2"] = launch(passing, "web2", tars[0], *more)
    with Visitors(passing.connect, keeping=False) as visitors:
        visitors.see(20, 0)
        for name, server in servers.items():
            server.signal(signal.SIGTERM)
            wait_until(lambda name=name: passing.is_up(name, False))
            if name == "web1":
                response = kept.ask("/page/1.html")
                assert (response.body, response.closes) == (VERSIONS[0]["page/1.html"], True)
                assert kept.at_end()
                kept.close()
            server.signal(signal.SIGTERM)
            server.wait()
            launch(passing, name, tars[1], *more)
            visitors.see(10, 1)
    assert visitors.wrong == []
    assert (tmp_path / "log").read_text().startswith("127.0.0.5 - - ")


def test_the_shipped_file_says_how_the_instances_are_started():
    """The flags in its first lines are flags that there are, and fit the server lines."""
    text = FILE.read_text()
    flags = re.search(r"^#   (-l .*)$", text, re.M)[1].split()
    assert flags[:2] == ["-l", "10.0.0.11:8080"] and flags[-1] == "site.tar"
    assert "server web1 10.0.0.11:8080" in text and "check port 8079" in text
    assert flags[flags.index("--status") + 1] == "10.0.0.11:8079"
