"""The status listener: what its responder makes of a Scoreboard, and what a server that runs says of itself."""

import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
from html.parser import HTMLParser

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import FILES, build_tar, children, noise, request, run_tarweb, wait_until

from clock import GAUGES, NUMBERS, Counts
from http1 import parse_head
from metrics import METRICS_OF_NUMBERS, REFRESH, SERVER, Scoreboard, StatusResponder
from metrics import page as page_of
from plan import header_section

LEFT_OUT: set[str] = set()      # numbers that are deliberately not shown
ABOUT = {
    "version": "0.1.0", "tls": "", "listeners": ["http://localhost:8080/"], "error": "",
    "sites": [{"host": "", "path": "site.tar", "files": 3, "bytes": 1234, "size": 10240, "mtime": 1600000000,
               "etag": "0123456789abcdef", "generation": 1}],
}
HUGE = {"huge.bin": noise(16 << 20, seed=6), "next": b"the next one"}


# --- a Scoreboard, and what is made of it --------------------------------------------------------------------------


@pytest.fixture
def board():
    """That of a server which has just begun."""
    board = Scoreboard()
    board.describe(json.dumps(ABOUT))
    board.set(started=1_700_000_000, ready=1, workers=2, generation=1)
    return board


def ask(board, target="/metrics", method="GET", responder=None, **headers):
    """(status, fields, text) of the answer to a request."""
    reply = (responder or StatusResponder(board)).reply(parse_head(request(target, method, **headers)))
    head = header_section(reply)
    assert head.endswith(b"\r\n\r\n")
    lines = head.decode().removesuffix("\r\n\r\n").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(fields) == len(lines), "a field appears twice"
    text = b"".join(reply.body).decode()
    if method != "HEAD":
        assert int(fields["Content-Length"]) == len(text.encode())
    assert reply.close == (fields.get("Connection") == "close")
    return reply.status, fields, text


def parse(text):
    """{(name, its labels): value}, as Prometheus's own library reads it."""
    return {(sample.name, *(f"{name}={value}" for name, value in sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def publish(board, **numbers):
    row, counts = board.take_row(), Counts()
    for name, value in numbers.items():
        setattr(counts, name, value)
    board.publish(row, counts)
    return row


def test_every_number_is_shown_once():
    shown = [number for metric in METRICS_OF_NUMBERS for number in metric.numbers]
    assert len(shown) == len(set(shown))
    assert set(shown) - {"reload_success"} == {*NUMBERS, *SERVER} - LEFT_OUT


def test_every_number_has_its_own_value(board):
    numbers = {name: 1000 + i for i, name in enumerate(NUMBERS)}
    others = {name: 2000 + i for i, name in enumerate(SERVER)}
    publish(board, **numbers)
    board.set(**others)
    values = list(parse(ask(board)[2]).values())
    for name, value in (numbers | others).items():
        assert values.count(value) == 1, name


def test_labels(board):
    publish(board, responses_2xx=2, responses_4xx=4, idle=5, sending=6, kernel_full=7, kernel_resumed=8,
            userspace_full=9, userspace_resumed=10, memo_hits=11, memo_misses=12, bytes_sent=2 ** 63)
    board.set(reloads=13, reloads_failed=14, workers=15, draining=16)
    found = parse(ask(board)[2])
    assert found["tarweb_responses_total", "class=2xx"] == 2
    assert found["tarweb_responses_total", "class=4xx"] == 4
    assert found["tarweb_connections", "state=idle"] == 5
    assert found["tarweb_connections", "state=sending"] == 6
    assert found["tarweb_handshakes_total", "kind=kernel", "resumed=no"] == 7
    assert found["tarweb_handshakes_total", "kind=kernel", "resumed=yes"] == 8
    assert found["tarweb_handshakes_total", "kind=userspace", "resumed=no"] == 9
    assert found["tarweb_handshakes_total", "kind=userspace", "resumed=yes"] == 10
    assert found["tarweb_memo_lookups_total", "result=hit"] == 11
    assert found["tarweb_memo_lookups_total", "result=miss"] == 12
    assert found["tarweb_reloads_total", "result=success"] == 13
    assert found["tarweb_reloads_total", "result=failure"] == 14
    assert found["tarweb_workers", "state=serving"] == 15
    assert found["tarweb_workers", "state=draining"] == 16
    assert found["tarweb_sent_bytes_total",] == 2 ** 63
    assert found["tarweb_start_time_seconds",] == 1_700_000_000


def test_rules_of_the_format(board):
    """What `promtool check metrics` looks at, and the order of lines in a family."""
    _, fields, text = ask(board)
    assert fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert text.endswith("\n")
    seen, family, kind = set(), None, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, family, words = line.split(" ", 3)
            assert re.fullmatch(r"tarweb_[a-z_]+", family)
            assert family not in seen, "a family in two pieces"
            assert words.endswith(".")
            assert "\\" not in words
            seen.add(family)
            kind = None
        elif line.startswith("# TYPE "):
            assert kind is None
            _, _, name, kind = line.split(" ")
            assert name == family
            assert kind == ("counter" if family.endswith("_total") else "gauge")
            assert not re.search("_(count|sum|bucket)$", family), "what histograms have"
        else:
            name, pairs = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})? [0-9]+', line).groups()
            assert name == family
            assert kind
            assert (name, pairs) not in seen, "a series twice"
            seen.add((name, pairs))
    families = list(text_string_to_metric_families(text))
    assert len(families) == text.count("# HELP")
    assert all(family.samples for family in families)


def test_archives(board):
    other = ABOUT["sites"][0] | {"host": "*.example.com", "path": "b.tar", "files": 9, "etag": "ff"}
    board.describe(json.dumps(ABOUT | {"sites": [*ABOUT["sites"], other]}))
    found = parse(ask(board)[2])
    assert found["tarweb_archive_info", "site=", "path=site.tar", "etag=0123456789abcdef"] == 1
    assert found["tarweb_archive_info", "site=*.example.com", "path=b.tar", "etag=ff"] == 1
    assert found["tarweb_archive_files", "site="] == 3
    assert found["tarweb_archive_files", "site=*.example.com"] == 9
    assert found["tarweb_archive_bytes", "site="] == 1234
    assert found["tarweb_archive_size_bytes", "site="] == 10240
    assert found["tarweb_archive_mtime_seconds", "site="] == 1600000000
    assert found["tarweb_info", "version=0.1.0", "tls="] == 1


@pytest.mark.parametrize("name", ['"', "\\", "\\n", "\n", 'a="b"}', "\\\\", "\\\"", "d\u00e9j\u00e0", "\r", "a\u2028b",
                                  "</style><script>alert(1)</script>", "'&amp;<b>"])
def test_names_that_try_to_break_out(board, name):
    board.describe(json.dumps(ABOUT | {"sites": [ABOUT["sites"][0] | {"path": name}], "tls": name, "error": name}))
    found = parse(ask(board)[2])
    assert ("tarweb_archive_info", "site=", f"path={name}", "etag=0123456789abcdef") in found
    assert ("tarweb_info", "version=0.1.0", f"tls={name}") in found
    page = Page(ask(board, "/")[2])
    assert name.replace("\r", "\n") in page.cells           # as HTML has it
    assert page.state == f"ready; the last reload failed: {name}".replace("\r", "\n")


def test_a_path_that_is_not_utf8(board):
    path = os.fsdecode(b"caf\xe9.tar")
    board.describe(json.dumps(ABOUT | {"sites": [ABOUT["sites"][0] | {"path": path}]}))
    assert ("tarweb_archive_info", "site=", "path=caf?.tar", "etag=0123456789abcdef") in parse(ask(board)[2])
    assert "caf?.tar" in Page(ask(board, "/")[2]).cells


def test_a_description_that_is_being_written(board):
    """The last one that could be read stands."""
    responder = StatusResponder(board)
    before = parse(ask(board, responder=responder)[2])
    board.describe(json.dumps(ABOUT)[:-20] + "}}}}")
    assert parse(ask(board, responder=responder)[2]) == before
    assert "site.tar" in Page(ask(board, "/", responder=responder)[2]).cells
    board.describe(json.dumps(ABOUT | {"version": "0.2.0"}))
    assert ("tarweb_info", "version=0.2.0", "tls=") in parse(ask(board, responder=responder)[2])


@pytest.mark.parametrize("target", ["/", "/metrics"])
def test_before_there_is_a_description(target):
    code, _, text = ask(Scoreboard(), target)
    assert code == 200
    assert text


# --- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numbers", "code", "word"), [
    ({}, 200, "ready"),
    ({"ready": 0, "stopping": 1}, 503, "stopping"),
    ({"ready": 0, "stopping": 1, "workers": 0}, 503, "stopping"),
    ({"ready": 0, "started": 0, "workers": 0}, 503, "starting"),
    ({"ready": 0, "workers": 0}, 503, "no worker"),
    ({"workers": 0}, 503, "no worker"),
])
def test_readiness(board, numbers, code, word):
    board.set(**numbers)
    status, fields, text = ask(board, "/readyz")
    assert (status, text) == (code, word + "\n")
    assert fields["Cache-Control"] == "no-store"
    assert ask(board, "/healthz")[::2] == (200, "ok\n"), "it lives in any case"
    page = Page(ask(board, "/")[2])
    assert page.state == ("ready" if code == 200 else f"not ready: {word}")
    assert ("bad" in page.state_class) == (code != 200)


@pytest.mark.parametrize("target", ["/", "/healthz", "/readyz", "/metrics", "/favicon.ico"])
def test_head_is_get_without_a_body(board, target):
    get, head = ask(board, target), ask(board, target, "HEAD")
    assert head[:2] == get[:2]
    assert get[2]
    assert not head[2]


@pytest.mark.parametrize("target", ["/", "/healthz", "/metrics", "/nothing"])
@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "BREW"])
def test_other_methods(board, method, target):
    status, fields, _ = ask(board, target, method)
    assert status == 405
    assert fields["Allow"] == "GET, HEAD"
    assert fields["Cache-Control"] == "no-store"


def test_nothing_that_needs_an_archive(board):
    """Methods for files were inherited once, `not_found` among them, and each failed: there is no archive here."""
    names = {name for name in dir(StatusResponder(board)) if not name.startswith("_")}
    assert names == {"about", "scoreboard", "look", "reply"}


@pytest.mark.parametrize("target", ["/metrics/", "/index.html", "/healthz/x", "/Metrics", "//"])
def test_nothing_else_is_there(board, target):
    status, fields, _ = ask(board, target)
    assert status == 404
    assert fields["Cache-Control"] == "no-store"


def test_queries_are_ignored(board):
    assert ask(board, "/metrics?name[]=up")[0] == 200


@pytest.mark.parametrize("target", ["/", "/healthz", "/readyz", "/metrics", "/nothing"])
def test_connections_are_kept_or_closed_as_asked(board, target):
    assert "Connection" not in ask(board, target)[1]
    assert ask(board, target, connection="close")[1]["Connection"] == "close"


# --- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Reads a page, and fails where elements are not closed in order."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.cells, self.meta = [], [], [], {}
        self.state = self.state_class = self.style = ""
        assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">\n")
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not {"src", "href", "style", "onload"} & set(attributes)
        self.names.append(tag)
        if tag == "meta":
            self.meta[attributes.get("name") or attributes.get("http-equiv") or "charset"] = (
                attributes.get("content") or attributes["charset"])
        elif tag not in self.VOID:
            self.open.append((tag, attributes.get("class", "")))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        data = data.replace("\r", "\n")
        tag, name = self.open[-1] if self.open else ("", "")
        if tag in ("td", "th"):
            self.cells[-1] += data
        elif tag == "style":
            self.style += data
        elif "state" in name:
            self.state += data
            self.state_class = name

    def number(self, what):
        return self.cells[self.cells.index(what) + 1]


def test_the_page(board):
    publish(board, responses_2xx=1_234_567, idle=7, memo_hits=3, memo_misses=1)
    board.set(last_reload=1_700_000_000)
    status, fields, text = ask(board, "/")
    page = Page(text)
    assert status == 200
    assert fields["Content-Type"] == "text/html; charset=utf-8"
    assert page.number("responses: 2xx") == "1,234,567"
    assert page.number("connections: idle") == "7"
    assert page.number("last reload time") == "2023-11-14 22:13:20 UTC"
    assert page.number("site.tar") == "0123456789abcdef"
    assert "Memo hits: 75.0 %" in text
    assert "http://localhost:8080/" in text
    assert int(page.meta["refresh"]) == REFRESH
    assert page.meta["viewport"] == "width=device-width"
    assert page.meta["charset"] == "utf-8"
    assert "light dark" in page.style


def test_the_page_loads_nothing_and_its_policy_allows_nothing_but_its_style(board):
    _, fields, text = ask(board, "/")
    page = Page(text)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    policy = [directive.strip() for directive in fields["Content-Security-Policy"].split(";")]
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert not {"script", "img", "link", "iframe", "form"} & set(page.names)
    assert "url(" not in page.style and "@import" not in page.style


def test_the_page_shows_every_number_that_matters(board):
    plain = Page(ask(board, "/")[2])
    board.describe(json.dumps(ABOUT | {"tls": "in userspace"}))
    secure = Page(ask(board, "/")[2])
    assert not any("handshakes: " in cell for cell in plain.cells)
    assert "handshakes: kind kernel, resumed no" in secure.cells
    shown = [labels for metric in METRICS_OF_NUMBERS for labels in metric.numbers]
    assert secure.names.count("tr") == len(shown) + 2, "a row for each number, the archive and its heading"


def test_uptime(board):
    assert "Up 1 day, 1:01:01;" in page_of(1_700_000_000 + 90_061.5, *StatusResponder(board).look())


# --- a server that runs --------------------------------------------------------------------------------------------


class Status:
    """The status listener of a Server."""

    def __init__(self, server):
        self.line = server.read_line(10)
        where = re.fullmatch(r"tarweb: status on (http://\S+/|unix:\S+)\n", self.line)[1]
        if where.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=where.removeprefix("unix:"))
            self.client = httpx.Client(transport=transport, base_url="http://status")
        else:
            self.client = httpx.Client(base_url=where, trust_env=False)

    def get(self, target):
        return self.client.get(target, headers={"Connection": "close"})

    def metrics(self):
        return parse(self.get("/metrics").raise_for_status().text)

    def value(self, name, *labels):
        return self.metrics()["tarweb_" + name, *labels]

    def classes(self):
        found = self.metrics()
        return {n: found["tarweb_responses_total", f"class={n}xx"] for n in range(1, 6)}

    def wait_for(self, expected):
        """Until all of these {(name, labels...): value} hold at the same time; numbers come once a second."""
        seen = {}

        def agree():
            found = self.metrics()
            seen.update({key: found["tarweb_" + key[0], *key[1:]] for key in expected})
            return seen == expected

        try:
            wait_until(agree, 10)
        except AssertionError:
            assert seen == expected
            raise


@pytest.fixture
def begin(start, site):
    """begin(*flags) -> (a Server, its Status)."""
    def begin(*flags, tar=site, begin=start, **options):
        server = begin(tar, "--status", "127.0.0.1:0", *flags, **options)
        return server, Status(server)
    return begin


def exchange(server, *requests):
    """Send these on connections of their own, to the end; the bytes that came back."""
    size = 0
    for one in requests:
        with server.connect() as client:
            client.send(one)
            client.half_close()
            size += len(client.rest())
    return size


def test_requests_are_counted_by_class_and_to_the_byte(begin):
    server, status = begin()
    etag = server.fetch("/next")["ETag"]
    status.wait_for({("responses_total", "class=2xx"): 1})
    before = status.value("sent_bytes_total")
    size = exchange(
        server,
        request("/"), request("/next"), request("/next"), request("/large.bin"), request("/empty.txt"),    # 200
        request("/random.bin", "HEAD"), request("/missing", "HEAD"),                                       # 200, 404
        request("/random.bin", range="bytes=0-99"), request("/random.bin", range="bytes=0-1,9000-9001"),   # 206
        request("/", "OPTIONS"),                                                                           # 204
        request("/dir"), request("/next", if_none_match=etag), request("/next", if_none_match="*"),        # 301, 304
        request("/missing"), request("/next", if_match='"x"'),                                             # 404, 412
        request("/next", range="bytes=99-"),                                                               # 416
        request("/next", "POST", content_length=0), b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",        # 405, 400
        request("/next", expect="something"),                                                              # 417
        request("/next", "BREW"), request("/next", "PROPFIND"), b"GET / HTTP/2.0\r\nHost: t\r\n\r\n",      # 501, 505
        request("/next", "GET", b"hello", content_length=5),                                               # 200
        request("/next") + request("/next") + request("/missing"),                                         # pipelined
    )
    status.wait_for({
        ("responses_total", "class=1xx"): 0, ("responses_total", "class=2xx"): 1 + 5 + 1 + 2 + 1 + 1 + 2,
        ("responses_total", "class=3xx"): 3, ("responses_total", "class=4xx"): 1 + 3 + 3 + 1 + 1,
        ("responses_total", "class=5xx"): 3, ("sent_bytes_total",): before + size,
        ("connections_accepted_total",): 26, ("connections", "state=idle"): 0, ("connections_timed_out_total",): 0,
    })


def test_an_interim_response_is_one_of_its_class(begin):
    server, status = begin()
    with server.connect() as client:
        client.send(request("/next", expect="100-continue", content_length=5))
        assert client.readable(10)
        client.send(b"hello")
        assert client.response().interim == [100]
    status.wait_for({("responses_total", "class=1xx"): 1, ("responses_total", "class=2xx"): 1})


def test_the_memo(begin, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")   # whether something was asked before it knows by hashes
    server, status = begin()
    with server.connect() as client:
        for _ in range(10):
            client.ask("/next")                 # known from the fifth time on: first its header block, then its line
        for number in range(20):
            client.ask(f"/n/{number:03}.txt")
        client.ask("/next")
    status.wait_for({("memo_lookups_total", "result=hit"): 7, ("memo_lookups_total", "result=miss"): 24})


def test_connections_by_state(begin, tmp_path):
    server, status = begin(tar=build_tar(tmp_path / "huge.tar", HUGE))
    with contextlib.ExitStack() as stack:
        def connect(*pieces, **options):
            client = stack.enter_context(server.connect(**options))
            client.send(*pieces)
            return client

        for _ in range(3):
            connect(request("/next")).response()
        connect(b"GET /next HT")
        connect(request("/next", "POST", content_length=10) + b"half")
        for _ in range(2):
            connect(request("/huge.bin"), rcvbuf=4096)          # and does not read
        connect(request("/next", "POST", content_length=1 << 20)).response()
        connect()                                               # has not said anything
        status.wait_for({("connections", f"state={state}"): number for state, number in {
            "handshake": 0, "idle": 4, "reading": 2, "sending": 2, "closing": 1, "waiting": 0}.items()})
    status.wait_for({("connections_stuck",): 0}
                    | {("connections", f"state={state}"): 0 for state in GAUGES if state != "stuck"}
                    | {("connections_accepted_total",): 9})


def test_connections_beyond_the_limit(begin, tmp_path):
    server, status = begin("--max-connections", "2", tar=build_tar(tmp_path / "huge.tar", HUGE))
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(server.connect()) for _ in range(2))
        for client in (first, second):
            client.ask("/next")
        for number in (1, 2):
            stack.enter_context(server.connect(rcvbuf=4096)).send(request("/huge.bin"))
            status.wait_for({("connections_reclaimed_total",): number, ("connections", "state=sending"): number,
                             ("connections", "state=idle"): 2 - number, ("connections_accepted_total",): 2 + number})


def test_time_outs(begin):
    server, status = begin("--keepalive-timeout", "1")
    with server.connect() as client:
        client.ask("/next")
        assert client.at_end()
    status.wait_for({("connections_timed_out_total",): 1, ("connections", "state=idle"): 0})


def test_refused_proxies(begin):
    server, status = begin("--proxy-from", "127.0.0.0/8")
    assert exchange(server, request("/next"), b"PROXY nonsense\r\n") == 0
    assert exchange(server, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + request("/next")) > 0
    status.wait_for({("proxy_refused_total",): 2, ("connections_accepted_total",): 3,
                     ("responses_total", "class=2xx"): 1})


def test_passed_connections(begin, tmp_path):
    server, status = begin("--passfd", tmp_path / "passing")
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as router:
        router.connect(str(tmp_path / "passing"))
        socket.send_fds(router, [request("/next")], [theirs.fileno()])
        assert ours.recv(1 << 16).endswith(FILES["next"])
    exchange(server, request("/next"))
    status.wait_for({("connections_passed_total",): 1, ("connections_accepted_total",): 2,
                     ("responses_total", "class=2xx"): 2})


def test_lines_of_the_access_log(begin, tmp_path):
    server, status = begin("--access-log", tmp_path / "log")
    exchange(server, *[request("/next")] * 7, request("/missing"))
    status.wait_for({("log_lines_total",): 8, ("log_lines_dropped_total",): 0})
    assert (tmp_path / "log").read_text().count("\n") == 8


def test_what_the_status_listener_answers_is_not_the_sites(begin):
    server, status = begin()
    for target in ("/", "/metrics", "/nothing", "/healthz", "/readyz"):
        status.get(target)
    exchange(server, request("/next"))
    status.wait_for({("responses_total", "class=2xx"): 1, ("responses_total", "class=4xx"): 0,
                     ("connections_accepted_total",): 1})
    assert server.fetch("/metrics").status == server.fetch("/healthz").status == 404


def test_two_workers_add_up(begin):
    server, status = begin("--threads", "2")
    size = exchange(server, *[request("/next"), request("/missing"), request("/random.bin")] * 20)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.connect()).ask("/next")
        status.wait_for({
            ("responses_total", "class=2xx"): 60, ("responses_total", "class=4xx"): 20,
            ("connections_accepted_total",): 80, ("connections", "state=idle"): 20, ("workers", "state=serving"): 2,
        })
    found = status.metrics()
    assert found["tarweb_sent_bytes_total",] > size
    assert sum(found["tarweb_memo_lookups_total", f"result={result}"] for result in ("hit", "miss")) == 80


# --- the server's life ---------------------------------------------------------------------------------------------


def test_a_reload_keeps_what_was_counted(begin, tmp_path):
    tar = build_tar(tmp_path / "site.tar", {"next": b"the next one"})
    server, status = begin("--threads", "2", tar=tar)
    [before] = [key for key in status.metrics() if key[0] == "tarweb_archive_info"]
    size = exchange(server, *[request("/next")] * 5)
    os.replace(build_tar(tmp_path / "new.tar", {"next": b"another one", "more": b"!"}), tar)
    server.process.send_signal(signal.SIGHUP)
    status.wait_for({("reloads_total", "result=success"): 1, ("workers", "state=draining"): 0})
    status.wait_for({
        ("responses_total", "class=2xx"): 5, ("sent_bytes_total",): size, ("connections_accepted_total",): 5,
        ("generation",): 2, ("reloads_total", "result=failure"): 0, ("last_reload_success",): 1, ("ready",): 1,
        ("workers", "state=serving"): 2, ("worker_restarts_total",): 0, ("archive_files", "site="): 2,
    })
    found = status.metrics()
    [after] = [key for key in found if key[0] == "tarweb_archive_info"]
    assert after[:3] == before[:3]
    assert after[3] != before[3], "another archive, and the same identity"
    assert found["tarweb_last_reload_time_seconds",] >= found["tarweb_start_time_seconds",]
    exchange(server, request("/more"))
    status.wait_for({("responses_total", "class=2xx"): 6})


def test_a_failed_reload_is_shown(begin, tmp_path):
    tar = build_tar(tmp_path / "site.tar", {"next": b"the next one"})
    server, status = begin(tar=tar)
    (tmp_path / "bad.tar").write_bytes(b"<script>" * 1000)
    os.replace(tmp_path / "bad.tar", tar)
    server.process.send_signal(signal.SIGHUP)
    status.wait_for({("reloads_total", "result=failure"): 1, ("reloads_total", "result=success"): 0,
                     ("last_reload_success",): 0, ("generation",): 1, ("ready",): 1})
    reason = re.search(r"reload failed, generation 1 still serves: (.*)\n", server.stderr())[1]
    page = Page(status.get("/").text)
    assert page.state == f"ready; the last reload failed: {reason}"
    assert "bad" in page.state_class
    assert status.get("/readyz").status_code == 200, "the old generation serves"
    assert server.fetch("/next").body == b"the next one"
    os.replace(build_tar(tmp_path / "good.tar", {"next": b"better"}), tar)
    server.process.send_signal(signal.SIGHUP)
    status.wait_for({("reloads_total", "result=failure"): 1, ("reloads_total", "result=success"): 1,
                     ("last_reload_success",): 1, ("generation",): 2})
    assert Page(status.get("/").text).state == "ready"


def test_a_killed_worker_loses_nothing_that_was_published(begin):
    server, status = begin("--threads", "2")
    workers = server.workers[:2]            # the process that answers here was forked after them
    size = exchange(server, *[request("/next")] * 20)
    expected = {("responses_total", "class=2xx"): 20, ("sent_bytes_total",): size,
                ("connections_accepted_total",): 20}
    status.wait_for(expected)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    status.wait_for(expected | {("worker_restarts_total",): 2, ("workers", "state=serving"): 2, ("ready",): 1})
    assert not set(workers) & set(server.workers)
    exchange(server, *[request("/next")] * 3)
    status.wait_for({("responses_total", "class=2xx"): 23})


def test_the_status_process_is_replaced_too(begin):
    server, status = begin()
    exchange(server, request("/next"))
    status.wait_for({("responses_total", "class=2xx"): 1})
    worker, answering = server.workers
    os.kill(answering, signal.SIGKILL)
    wait_until(lambda: len(set(children(server.pid)) - {worker, answering}) == 1)
    status.wait_for({("responses_total", "class=2xx"): 1, ("worker_restarts_total",): 1})
    assert worker in server.workers


def test_it_is_not_ready_once_it_is_to_stop(begin):
    server, status = begin("--lame-duck", "60")
    assert (status.get("/readyz").status_code, status.get("/readyz").text) == (200, "ready\n")
    assert (status.get("/healthz").status_code, status.get("/healthz").text) == (200, "ok\n")
    server.signal()
    wait_until(lambda: status.get("/readyz").status_code == 503)
    assert status.get("/readyz").text == "stopping\n"
    assert status.get("/healthz").status_code == 200
    assert status.value("stopping") == 1
    assert status.value("ready") == 0
    assert Page(status.get("/").text).state == "not ready: stopping"
    response = server.fetch("/next")
    assert response.body == FILES["next"], "meanwhile it serves"
    assert response.closes
    server.signal()                         # cuts the lame duck's time short
    server.wait()


def test_a_unix_socket(start, site, tmp_path):
    path = tmp_path / "status.sock"
    server = start(site, "--status", f"unix:{path},600")
    status = Status(server)
    assert status.line == f"tarweb: status on unix:{path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert status.get("/readyz").text == "ready\n"
    exchange(server, request("/next"))
    status.wait_for({("responses_total", "class=2xx"): 1})
    server.stop()
    assert not path.exists()


@pytest.mark.parametrize("where", ["nonsense", "unix:", "127.0.0.1:99999"])
def test_bad_addresses(site, where):
    ended = run_tarweb("--status", where, site)
    assert ended.returncode == 2
    assert "--status" in ended.stderr


def test_a_port_that_is_taken(site, server):
    ended = run_tarweb("-l", "127.0.0.1:0", "--status", f"127.0.0.1:{server.port}", site)
    assert ended.returncode == 1
    assert str(server.port) in ended.stderr


def test_handshakes_by_kind(start_tls, begin):
    server, status = begin(begin=start_tls)
    assert status.get("/readyz").text == "ready\n", "the status listener speaks plain HTTP"
    context = server.context_of(version="1.3")
    session = None
    for _ in range(3):
        with server.connect(context, session=session) as client:
            client.ask("/next")
            assert client.tls.session_reused == (session is not None)
            session = session or client.tls.session
            client.half_close()
            assert client.at_end()
    with server.connect() as client:
        client.ask("/next")
        client.truncate()
        client.rest()
    with server.connect_raw() as client:
        client.send(b"\x16\x03\x01\x00\x05nonse")
        client.rest()
    kind = "kernel" if re.search("TLS in the kernel", server.stderr()) else "userspace"
    other = {"kernel": "userspace", "userspace": "kernel"}[kind]
    status.wait_for({
        ("handshakes_total", f"kind={kind}", "resumed=no"): 2, ("handshakes_total", f"kind={kind}", "resumed=yes"): 2,
        ("handshakes_total", f"kind={other}", "resumed=no"): 0, ("handshakes_total", f"kind={other}", "resumed=yes"): 0,
        ("handshakes_failed_total",): 1, ("truncated_total",): 1, ("responses_total", "class=2xx"): 4,
        ("connections", "state=handshake"): 0,
    })
    with server.connect_raw() as client:
        client.send(b"\x16\x03")
        status.wait_for({("connections", "state=handshake"): 1})
    assert "handshakes: kind kernel, resumed no" in Page(status.get("/").text).cells
