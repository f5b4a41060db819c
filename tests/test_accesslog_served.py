"""The access log of the real server: what is in it, and that it is whole whatever becomes of its file."""

import grp
import gzip
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import threading
from datetime import UTC, datetime

import apachelogs
import pytest
from support import FILES, PATIENCE, PYTHON, ROOT, TARWEB, Client, Server, request, run_tarweb, wait_until
from test_per_ip import come
from test_smuggling_fronts import NGINX, Nginx

COMBINED = apachelogs.LogParser(apachelogs.COMBINED)
FULL = "access log: No space left on device: lines are dropped until it can be written to"
STATUS = ("--status", "127.0.0.1:0")


def read(line):
    """What Apache's tools read out of a line: (status, bytes, request line)."""
    entry = COMBINED.parse(line)
    return entry.final_status, entry.bytes_sent or 0, entry.request_line


def lines_of(path):
    """The lines of a log, all of which have to be whole."""
    text = path.read_bytes().decode("ascii")
    assert text[-1:] in ("", "\n"), f"a part of a line: {text[-200:]!r}"
    return text.splitlines()


def numbers_in(lines):
    """Of requests made by `numbered`: which there are, in the log's order. Each line has to be whole."""
    numbers = []
    for line in lines:
        status, size, what = read(line)
        found = re.fullmatch(r"GET /next\?(\d+)(\.*) HTTP/1\.1", what)
        assert found and (status, size) == (200, len(FILES["next"])), line
        numbers.append(int(found[1]))
    return numbers


def numbered(number, padding=0):
    return request(f"/next?{number}{'.' * padding}")


def ask_numbered(server, numbers, padding=0):
    """One connection on which all of these are asked for, some at a time."""
    numbers = list(numbers)
    with server.connect() as client:
        for start in range(0, len(numbers), 20):
            some = numbers[start:start + 20]
            client.send(b"".join(numbered(number, padding) for number in some))
            for _ in some:
                assert client.response().body == FILES["next"]


class Piped(Server):
    """A server whose log is its standard output: all else that it says is on standard error."""

    def read_line(self, seconds):
        wait_until(lambda: "(ready in" in self.stderr() or self.process.poll() is not None, seconds)
        return self.stderr()


def metrics(server):
    """{name: value} of what the status listener says that has no labels."""
    said = server.stderr()
    if "status on" not in said:
        if not hasattr(server, "status_line"):
            server.status_line = server.read_line(10)
        said = server.status_line
    port = int(re.search(r"status on http://127\.0\.0\.1:(\d+)/", said)[1])
    with Client(("127.0.0.1", port)) as client:
        text = client.ask("/metrics", connection="close").body.decode()
    return {name: float(value) for name, value in re.findall(r"^(tarweb_\w+) (\S+)$", text, re.M)}


def logged(server):
    """(lines written, lines dropped)"""
    found = metrics(server)
    return int(found["tarweb_log_lines_total"]), int(found["tarweb_log_lines_dropped_total"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "access.log"


# --- what is in it -------------------------------------------------------------------------------------------------


def test_a_line_for_each_response(start, site, path):
    server = start(site, "--access-log", path)
    with server.connect() as client:
        etag = client.ask("/next")["ETag"]
        assert client.ask("/next", if_none_match=etag).status == 304
        assert client.ask("/random.bin", method="HEAD").status == 200
        assert client.ask("/random.bin", range="bytes=10-109").status == 206
        assert client.ask("/missing", referer="http://a/b\\c", user_agent='a "b"').status == 404
        assert client.ask("/large.bin").body == FILES["large.bin"]
        assert client.ask("/next", method="DELETE").status == 405
    with server.connect() as client:
        client.send(b'GET /a"b\x01 HTTP/1.1\r\nBroken\r\n\r\n')
        refusal = client.response()
    server.stop()
    lines = lines_of(path)
    page = len(FILES["404.html"])
    assert [read(line) for line in lines[:6]] == [
        (200, len(FILES["next"]), "GET /next HTTP/1.1"), (304, 0, "GET /next HTTP/1.1"),
        (200, 0, "HEAD /random.bin HTTP/1.1"), (206, 100, "GET /random.bin HTTP/1.1"),
        (404, page, "GET /missing HTTP/1.1"), (200, len(FILES["large.bin"]), "GET /large.bin HTTP/1.1")]
    assert lines[4].endswith(rf'"GET /missing HTTP/1.1" 404 {page} "http://a/b\x5Cc" "a \x22b\x22"')
    assert read(lines[6])[::2] == (405, "DELETE /next HTTP/1.1")
    assert read(lines[7]) == (400, len(refusal.body), 'GET /a"b\x01 HTTP/1.1')
    assert len(lines) == 8


def test_who_and_when(start, site, path):
    before = datetime.now(UTC).replace(microsecond=0)
    server = start(site, "--access-log", path)
    server.fetch("/next")
    server.stop()
    [entry] = [COMBINED.parse(line) for line in lines_of(path)]
    assert entry.remote_host == "127.0.0.1"
    assert before <= entry.request_time <= datetime.now(UTC)


def test_json(start, site, path):
    server = start(site, "--access-log", path, "--log-format", "json")
    server.fetch("/next?\u00e9", referer="http://\u00fc/", user_agent='"')
    server.stop()
    [line] = lines_of(path)
    found = json.loads(line)
    datetime.strptime(found.pop("time"), "%Y-%m-%dT%H:%M:%SZ")
    # the client sends Latin-1, which is no UTF-8: shown as it is
    expected = {"remote": "127.0.0.1", "host": "t", "referer": "http://\\xfc/", "agent": '"'}
    assert found.items() >= expected.items()
    assert (found["method"], found["protocol"]) == ("GET", "HTTP/1.1") and found["target"].startswith("/next?")


def test_the_same_request_again_and_again(start, site, path):
    """From the third time on its line is remembered: it has to be the same, but for who and when."""
    server = start(site, "--access-log", path)
    with server.connect() as client:
        for _ in range(10):
            client.ask("/next", user_agent="same")
            client.ask("/missing")
    server.stop()
    ends = [line.partition("] ")[2] for line in lines_of(path)]
    assert len(ends) == 20 and len(set(ends[::2])) == len(set(ends[1::2])) == 1
    assert read(lines_of(path)[-2])[0] == 200 and read(lines_of(path)[-1])[0] == 404


def test_pipelined(start, site, path):
    server = start(site, "--access-log", path)
    ask_numbered(server, range(100))
    server.stop()
    assert numbers_in(lines_of(path)) == list(range(100))


def test_a_download_that_is_cut_off(start, site, path):
    """As many bytes as were sent, not as many as there are."""
    server = start(site, "--access-log", path)
    client = server.connect(rcvbuf=32_768)
    client.send(request("/large.bin"))
    assert client.sock.recv(20_000)
    client.reset()
    wait_until(lambda: lines_of(path))
    server.stop()
    [(status, size, what)] = [read(line) for line in lines_of(path)]
    assert (status, what) == (200, "GET /large.bin HTTP/1.1")
    assert 10_000 < size < len(FILES["large.bin"])


def test_a_request_that_never_comes_whole(start, site, path):
    server = start(site, "--access-log", path, "--header-timeout", "1")
    with server.connect() as client:
        client.send(b"GET /half HTTP/1.1\r\nUser-Agent: slow\r\nHo")
        assert client.response().status == 408
    with server.connect():                      # nothing was asked, so nothing is logged
        pass
    server.stop()
    [line] = lines_of(path)
    assert read(line)[::2] == (408, "GET /half HTTP/1.1") and line.endswith('"-" "slow"')


def test_tls(start_tls, site, path):
    server = start_tls(site, "--access-log", path)
    with server.connect() as client:
        for target in ("/next", "/missing", "/large.bin"):
            client.ask(target)
        client.send(numbered(1), numbered(2))
        client.response(), client.response()
    server.stop()
    assert [read(line)[:2] for line in lines_of(path)] == [
        (200, len(FILES["next"])), (404, len(FILES["404.html"])), (200, len(FILES["large.bin"])),
        *[(200, len(FILES["next"]))] * 2]


def test_a_unix_socket(start, site, path, tmp_path):
    server = start(site, "--listen", f"unix:{tmp_path}/socket", "--access-log", path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(f"{tmp_path}/socket")
        sock.sendall(request("/next", connection="close"))
        while sock.recv(1 << 16):
            pass
    server.stop()
    assert [COMBINED.parse(line).remote_host for line in lines_of(path)] == ["unix:"]


def test_the_client_that_a_proxy_names(start, site, path):
    server = start(site, "--proxy-from", "127.0.0.1", "--access-log", path)
    for header in (b"PROXY TCP4 192.0.2.7 192.0.2.1 5 80\r\n", b"PROXY TCP6 2001:db8::7 2001:db8::1 5 80\r\n"):
        with server.connect() as client:
            client.send(header + request("/next"))
            assert client.response().body == FILES["next"]
    server.stop()
    assert [COMBINED.parse(line).remote_host for line in lines_of(path)] == ["192.0.2.7", "2001:db8::7"]


def remotes(path):
    return [COMBINED.parse(line).remote_host for line in lines_of(path)]


def test_the_client_that_an_http_proxy_names(start, site, path):
    """Of each request anew, also where it is known; nothing that stands there breaks a line."""
    server = start(site, "--forwarded-from", "127.0.0.1", "--access-log", path)
    values = ("192.0.2.7", "192.0.2.8, 127.0.0.1", "2001:db8::1", None, 'a" 200 1', 'fe80::1%" \xe4')
    expected = ("192.0.2.7", "192.0.2.8", "2001:db8::1", "127.0.0.1", "127.0.0.1", "127.0.0.1")
    with server.connect() as client:
        for _ in range(4):
            for value in values:
                fields = {} if value is None else {"X-Forwarded-For": value}
                client.send(request("/next", **fields))
                assert client.response().status == 200
        for value in values[:3]:
            client.send(request("/next", x_forwarded_for=value) * 5)
            for _ in range(5):
                client.response()
        client.send(request("/next", forwarded='for="[2001:db8::2]:80"', body=b"body"))
        client.response()
    server.stop()
    assert remotes(path) == [*expected * 4, *sorted(expected[:3] * 5, key=expected.index), "2001:db8::2"]


def test_nobody_else_is_believed(start, site, path):
    server = start(site, "--forwarded-from", "127.0.0.2", "--access-log", path, "--max-per-ip", "1")
    for source, times in (("127.0.0.1", 3), ("127.0.0.2", 3)):
        with server.connect(source=source) as client:
            for _ in range(times):
                client.ask("/next", x_forwarded_for="192.0.2.7")
            other, outcome = come(server, source)
            other.close()
            assert outcome == "closed"          # as ever: by connection
    server.stop()
    assert remotes(path) == ["127.0.0.1"] * 3 + ["192.0.2.7"] * 3


def test_a_proxy_in_front_of_a_proxy(start, site, path):
    """A balancer names the HTTP proxy by a PROXY header, and that one its client; over TLS as well."""
    server = start(site, "--proxy-from", "127.0.0.1", "--forwarded-from", "192.0.2.1", "--access-log", path)
    for proxy in ("192.0.2.1", "192.0.2.2"):
        with server.connect() as client:
            client.send(f"PROXY TCP4 {proxy} 192.0.2.1 5 80\r\n".encode() + request("/next", x_forwarded_for="::7"))
            client.response()
    server.stop()
    assert remotes(path) == ["::7", "192.0.2.2"]


def test_the_client_that_a_proxy_names_over_tls(start_tls, site, path):
    server = start_tls(site, "--forwarded-from", "127.0.0.1", "--access-log", path, "--log-format", "json")
    with server.connect() as client:
        for number in range(8):
            client.ask("/next", x_forwarded_for=f"192.0.2.{number % 2}")
    server.stop()
    assert [json.loads(line)["remote"] for line in lines_of(path)] == ["192.0.2.0", "192.0.2.1"] * 4


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
def test_behind_nginx(start, site, path, tmp_path):
    """As one sets it up; its connections to us are shared by all clients, one of which says that it is another one."""
    server = start(site, "--forwarded-from", "127.0.0.1", "--access-log", path, *STATUS)
    (tmp_path / "nginx").mkdir()
    front = Nginx(tmp_path / "nginx", None, """
        location = /next {
            proxy_pass http://tarweb;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }""")
    sources = ("127.0.0.5", "127.0.0.6", "127.0.0.7")
    with front.before(server):
        for _ in range(4):
            for source in sources:
                with Client(front.address, source=source) as client:
                    assert client.ask("/next", x_forwarded_for="192.0.2.9").body == FILES["next"]
        assert front.connections() < 12
    server.stop()
    assert remotes(path) == [*sources] * 4


def test_nothing_is_logged_unless_asked_for(start, site, path):
    server = start(site)
    server.fetch("/next")
    server.stop()
    assert server.stderr() == "" and not path.exists()


# --- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_two_workers_and_one_file(start, site, path):
    """No line is torn, and there is one for each request."""
    server = start(site, "--threads", "2", "--access-log", path, *STATUS)
    said = subprocess.run(["wrk", "-t1", "-c32", "-d2s", f"{server.url}/next?{'x' * 50}"], capture_output=True,
                          text=True, timeout=60, check=True).stdout
    asked = int(re.search(r"(\d+) requests in", said)[1])
    wait_until(lambda: sum(logged(server)) >= asked)    # known a second later
    _, dropped = logged(server)
    server.stop()
    pattern = re.compile(r'127\.0\.0\.1 - - \[[^]]{26}\] "GET /next\?x{50} HTTP/1\.1" 200 12 "-" "-"')
    lines = lines_of(path)
    assert all(map(pattern.fullmatch, lines)) and len(set(lines)) < 10
    assert asked <= len(lines) + dropped <= asked + 32, "wrk leaves at most one request on each connection"


def test_two_workers_and_no_request_lost(start, site, path):
    server = start(site, "--threads", "2", "--access-log", path)
    threads = [threading.Thread(target=ask_numbered, args=(server, range(first, first + 1000), 300))
               for first in range(0, 8000, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    assert sorted(numbers_in(lines_of(path))) == list(range(8000))


# --- slow and full -------------------------------------------------------------------------------------------------


def test_a_reader_that_does_not_read(start, site):
    """Serving goes on; what there is no room for is dropped, and counted; what is written is whole."""
    server = start(site, "--access-log", "-", *STATUS, kind=Piped)
    ask_numbered(server, range(2000), padding=1000)     # 2 MB: a pipe has 64 KiB, and 1 MiB may wait
    wait_until(lambda: logged(server)[1] > 0)
    assert server.fetch("/next?2000").status == 200
    received = []
    reader = threading.Thread(target=lambda: received.append(server.process.stdout.read()))
    reader.start()
    wait_until(lambda: sum(logged(server)) >= 2001)
    ask_numbered(server, range(3000, 3050))
    wait_until(lambda: sum(logged(server)) == 2051)
    written, dropped = logged(server)
    server.signal()
    reader.join()
    numbers = numbers_in(b"".join(received).decode("ascii").splitlines())
    assert received[0].endswith(b"\n") and numbers == sorted(set(numbers))
    assert len(numbers) == written == 2051 - dropped
    assert numbers[-50:] == list(range(3000, 3050)), "after it, lines are written again"


def test_a_reader_that_goes_away(start, site):
    server = start(site, "--access-log", "-", *STATUS, kind=Piped)
    server.process.stdout.close()
    ask_numbered(server, range(10))
    wait_until(lambda: logged(server) == (0, 10))
    ask_numbered(server, range(10))
    wait_until(lambda: logged(server) == (0, 20))
    assert server.stderr().count("access log: Broken pipe") == 1


def test_the_end_waits_for_a_slow_reader(start, site):
    server = start(site, "--access-log", "-", kind=Piped)
    ask_numbered(server, range(600), padding=300)       # more than a pipe has room for
    server.signal()
    numbers = numbers_in(server.wait().splitlines())
    assert numbers == list(range(600))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB, and nobody else's."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, but):
    """A file that leaves no more than about `but` bytes there."""
    ballast = disk / "ballast"
    state = os.statvfs(disk)
    ballast.write_bytes(b"x" * (state.f_bavail * state.f_frsize - but))
    return ballast


def test_a_full_disk(small_disk, start, site):
    """Serving goes on; lines are dropped, and counted, until there is room again; each of those written is whole."""
    path = small_disk / "access.log"
    server = start(site, "--access-log", path, *STATUS)
    ballast, asked = fill(small_disk, 20_000), 0
    for round_number in (1, 2):
        ask_numbered(server, range(asked, asked + 500), padding=101)
        asked += 500
        wait_until(lambda: logged(server)[1] > 0)
        wait_until(lambda: server.stderr().count(FULL) >= round_number)    # noqa: B023  used within the turn
        assert path.read_bytes()[-1:] != b"\n", "nothing was begun: this test tries less than it should"
        ballast.unlink()
        ask_numbered(server, range(asked, asked + 10))
        asked += 10
        wait_until(lambda: sum(logged(server)) == asked)                   # noqa: B023
        numbers = numbers_in(lines_of(path))
        assert numbers == sorted(set(numbers)) and numbers[-10:] == list(range(asked - 10, asked))
        assert len(numbers) == logged(server)[0]
        ballast = fill(small_disk, 12_000)
    assert server.stderr().count(FULL) == 2, "said more than once for each time that it was so"
    ballast.unlink()


# --- another file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_rotation_under_load(start, site, path, workers):
    """mv, SIGUSR1: nothing is lost, and what is asked afterwards is in the new file."""
    server = start(site, "--access-log", path, "--threads", workers)
    old, done, asked = path.with_name("access.log.1"), threading.Event(), [0]

    def go_on():
        while not done.is_set():
            with server.connect() as client:
                closes = False
                while not closes and not done.is_set():     # the old workers close, but never without an answer
                    client.send(numbered(asked[0]))
                    closes = client.response().closes
                    asked[0] += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    wait_until(lambda: asked[0] > 200)
    path.rename(old)
    server.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    since = asked[0]
    wait_until(lambda: asked[0] > since + 200)
    done.set()
    thread.join()
    server.stop()
    before, after = numbers_in(lines_of(old)), numbers_in(lines_of(path))
    assert sorted(before + after) == list(range(asked[0]))
    assert after and set(range(since + 2, asked[0])) <= set(after)


def test_those_who_retire_go_on_in_the_new_file(start, site, path):
    """Also over several rotations, and reloads between them: each connection's next response is in the newest file."""
    server = start(site, "--access-log", path, "--threads", "2", *STATUS)
    clients = [[server.connect() for _ in range(4)] for _ in range(4)]
    ask(clients, "first")
    wait_until(lambda: len(lines_of(path)) == 16)
    for number in range(1, 4):
        path.rename(path.with_name(f"access.log.{number}"))
        server.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: f"reloaded: generation {2 * number} " in server.stderr())            # noqa: B023
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: f"reloaded: generation {2 * number + 1} " in server.stderr())        # noqa: B023
        ask([clients[number]], f"after{number}")
        wait_until(lambda: len(lines_of(path)) == 4)
        assert {read(line)[2] for line in lines_of(path)} == {f"GET /next?after{number} HTTP/1.1"}
    wait_until(lambda: logged(server) == (28, 0))


def ask(clients, word):
    for client in itertools.chain(*clients):
        client.send(request(f"/next?{word}"))
        assert client.response().body == FILES["next"]


LOGROTATE = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.mark.skipif(not LOGROTATE, reason="logrotate is not installed")
@pytest.mark.parametrize("delay", (True, False))
def test_logrotate(start, site, path, tmp_path, delay):
    """By the configuration in deploy/ nothing is lost, whenever it is; and without its delaycompress, nothing of what
    is asked a moment later."""
    server = start(site, "--access-log", path)
    text = (ROOT / "deploy" / "tarweb.logrotate").read_text()
    owner, tell = f"{pwd.getpwuid(os.getuid()).pw_name} {grp.getgrgid(os.getgid()).gr_name}", "systemctl kill --signal="
    for old, new in (("/var/log/tarweb/access.log", str(path)), ("tarweb tarweb", owner),
                     (f"{tell}USR1 --kill-who=main tarweb.service", f"kill -USR1 {server.process.pid}"),
                     *[("    delaycompress\n", "")] * (not delay)):
        assert text.count(old) == 1
        text = text.replace(old, new)
    configuration = tmp_path / "logrotate.conf"
    configuration.write_text(text)
    configuration.chmod(0o644)
    clients = [server.connect() for _ in range(8)]
    for number in range(3):
        for client in clients if number < 2 else [server.connect() for _ in range(8)]:
            client.send(numbered(number))
            client.response()
        wait_until(lambda: len(lines_of(path)) == 8)
        subprocess.run([LOGROTATE, "-f", "-s", tmp_path / "state", configuration], check=True, timeout=60)
        wait_until(lambda: f"reloaded: generation {number + 2}" in server.stderr())            # noqa: B023
    server.fetch("/next?3")
    server.stop()
    found = sorted(tmp_path.glob("access.log.*"))
    assert [file.name for file in found] == ["access.log.1" if delay else "access.log.1.gz", "access.log.2.gz",
                                             "access.log.3.gz"]
    lines = [line for file in found
             for line in (gzip.open if file.suffix == ".gz" else open)(file, "rt").read().splitlines()]
    assert sorted(numbers_in(lines + lines_of(path))) == sorted([*range(3)] * 8 + [3])


def test_a_new_file_that_cannot_be_opened_leaves_the_old_one(start, site, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    server = start(site, "--access-log", folder / "log")
    server.fetch("/next?1")
    folder.rename(tmp_path / "elsewhere")
    server.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "reload failed, generation 1 still serves: " in server.stderr())
    assert f"--access-log {folder / 'log'}: No such file or directory" in server.stderr()
    server.fetch("/next?2")
    server.stop()
    assert [read(line)[2] for line in lines_of(tmp_path / "elsewhere" / "log")] == [
        "GET /next?1 HTTP/1.1", "GET /next?2 HTTP/1.1"]


def test_a_reader_that_is_away_keeps_no_reload_from_happening(start, site, path):
    """A FIFO cannot be opened then. Whoever comes back to read it finds what is asked from then on."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    server = start(site, "--access-log", path)
    os.close(reader)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    assert (f"--access-log {path}: No such device or address: lines go to where they went before the reload"
            in server.stderr())
    server.process.send_signal(signal.SIGUSR1)      # this one has nothing else to do
    wait_until(lambda: "reload failed, generation 2 still serves: " in server.stderr())
    with path.open() as reader:
        server.fetch("/next?1")
        assert read(reader.readline().rstrip())[2] == "GET /next?1 HTTP/1.1"


@pytest.mark.parametrize(("make", "reason"), [
    (lambda path: None, "No such file or directory"),
    (lambda path: path.mkdir(parents=True), "Is a directory"),
    (lambda path: (path.parent.mkdir(), os.mkfifo(path)), "No such device or address"),
])
def test_a_file_that_cannot_be_opened(site, tmp_path, make, reason):
    path = tmp_path / "folder" / "log"
    make(path)
    ended = run_tarweb("--listen", "127.0.0.1:0", "--access-log", path, site)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"tarweb: --access-log {path}: {reason}\n")


def test_appended_to_what_is_there(start, site, path):
    path.write_bytes(b"what was there\n")
    server = start(site, "--access-log", path)
    server.fetch("/next")
    server.stop()
    assert lines_of(path)[0] == "what was there" and len(lines_of(path)) == 2


def test_standard_output_that_is_a_file(start, site, path):
    """Two workers write to the end of it, however it was opened."""
    redirecting = ("sh", "-c", f'exec "$0" "$@" >{path}', PYTHON)
    server = start(site, "--threads", "2", "--access-log", "-", kind=Piped, python=redirecting)
    for first in range(0, 400, 40):
        ask_numbered(server, range(first, first + 40))
    server.stop()
    assert sorted(numbers_in(lines_of(path))) == list(range(400))


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_that_is_a_socket(site, name):
    """As journald's, which nobody can open by a path; not at a reload either."""
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen([PYTHON, TARWEB, "--listen", "127.0.0.1:0", "--access-log", name, site], stdout=theirs,
                                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        theirs.close()
        port = int(re.search(r":(\d+)/ serves", process.stderr.readline())[1])
        process.send_signal(signal.SIGHUP)
        assert any("reloaded" in line for line in iter(process.stderr.readline, ""))
        with Client(("127.0.0.1", port)) as client:
            assert client.ask("/next").status == 200
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert re.fullmatch(rb'127.0.0.1 - - .* "GET /next HTTP/1.1" 200 12 "-" "-"\n', ours.recv(4096))
