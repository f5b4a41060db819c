"""P7 behind nginx and HAProxy: no stream of bytes through them, over connections to tarweb that all clients share,
makes anybody else get a wrong response, or tarweb see a request that the front end did not send.

The streams are those of smuggling.py and the refused heads of other tests. Each front end is asked as it is usually
set up, HAProxy by the file that is shipped, and as laxly as it can be. Needs nginx, haproxy.
"""

import collections
import contextlib
import json
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
from smuggling import CASES, SMUGGLED, identified
from support import FILES, PATIENCE, Client, Server, build_tar, request, wait_until
from test_haproxy import HAPROXY, Front, free_ports
from test_smuggling import HEADS
from test_workers import metrics, status_port

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
HERE = "127.0.0.1"
PAGES = 200                             # of FILES: what the victims ask for
PAGE = b"number "                       # how they begin
UNANSWERED = -1                         # in place of a status
SITE = {name: FILES[name] for name in ("next", "dir/index.html", *(f"n/{i:03}.txt" for i in range(PAGES)))}
STREAMS = [*(case.raw for case in CASES.values()), *(raw + SMUGGLED for raw, _ in HEADS.values())]

# Connections are kept for requests to come, as many as there are at a time; the log has what was sent on.
NGINX_CONF = """
daemon off; user root; worker_processes 1; pid nginx.pid; error_log nginx.log warn;
events { }
http {
    log_format sent escape=json '{"request":"$request","statuses":"$upstream_status"}';
    access_log access.log sent;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    upstream tarweb { server 127.0.0.1:@TARWEB@; keepalive 8; }
    server {
        listen 127.0.0.1:@PORT@;
        listen 127.0.0.1:@H2@ http2;
        @MORE@
        location / {
            proxy_pass http://tarweb;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_ignore_client_abort on;
        }
    }
}
"""


class Nginx:
    """nginx in front of a tarweb. `more`: directives; where it listens: `address`, and `h2` for HTTP/2 without TLS."""

    def __init__(self, folder, _, more=""):
        self.folder = folder
        self.address, self.h2 = ((HERE, port) for port in free_ports(2))
        self.values = {"MORE": more, "PORT": str(self.address[1]), "H2": str(self.h2[1])}

    def instance(self):
        """The flags of tarweb, and where it listens."""
        return ("--status", f"{HERE}:0"), f"{HERE}:0"

    @contextlib.contextmanager
    def before(self, server):
        """nginx runs in front of a Server."""
        self.status = status_port(server)
        self.values["TARWEB"] = str(server.port)
        text = re.sub("@([A-Z0-9]+)@", lambda word: self.values[word[1]], NGINX_CONF)
        (self.folder / "nginx.conf").write_text(text)
        process = subprocess.Popen([NGINX, "-p", self.folder, "-e", "nginx.log", "-c", "nginx.conf"])
        try:
            wait_until(lambda: process.poll() is not None or self.answers())
            assert process.poll() is None, (self.folder / "nginx.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)

    def answers(self):
        with contextlib.suppress(OSError):
            Client(self.address).close()
            return True
        return False

    def connections(self):
        """How many there have been to tarweb."""
        return metrics(self.status)["connections_accepted_total"]

    def sent(self):
        """(status, request line) for each request that was sent to tarweb; UNANSWERED: perhaps, or a part of it."""
        lines = map(json.loads, (self.folder / "access.log").read_text("latin-1").splitlines())
        return [(int(status), line["request"]) for line in lines
                for status in re.findall(r"-1|\d+", line["statuses"].replace("-", str(UNANSWERED)))]


class HAProxy:
    """HAProxy with the shipped file, but for TLS and PROXY headers, with which clients share no connections."""

    CHANGE = (("send-proxy-v2 ", ""), ("http-reuse safe", "http-reuse always"),
              # One thread: of two that tell of something at once, one does not.
              ("log /dev/log", "nbthread 1\n    log stdout len 65535 format raw"),
              ("server web2 10.0.0.12:8080", ""), ("server web3 10.0.0.13:8080", ""),
              ("option httplog", 'log-format "sent %s %ST %ts %{+Q}r"\n    no option dontlognull'))

    def __init__(self, folder, pair, more=()):
        self.h2 = HERE, free_ports(1)[0]
        bind = (" ssl crt /etc/haproxy/site.pem alpn h2,http/1.1", f"\n    bind localhost:{self.h2[1]} proto h2")
        self.front = Front(folder, pair, change=(*self.CHANGE, *more, bind))
        self.address = HERE, int(self.front.ports["443"])

    def instance(self):
        (_, _, *flags), listen = self.front.instance("web1", lame_duck=0)
        return flags, listen

    @contextlib.contextmanager
    def before(self, _):
        with self.front:
            wait_until(lambda: self.front.is_up("web1"))
            yield

    def connections(self):
        return self.front.sum("connect")

    def sent(self):
        lines = re.findall(r'^sent web1 (-?\d+) (\S+) "(.*)"$', self.front.log.read_text("latin-1"), re.M)
        return [(int(status) if end == "--" else UNANSWERED, line) for status, end, line in lines]


LAX_NGINX = """proxy_request_buffering off; ignore_invalid_headers off; underscores_in_headers on; merge_slashes off;
        client_max_body_size 0; large_client_header_buffers 8 64k;"""
LAX_HAPROXY = (("no option dontlognull", "option accept-invalid-http-request"),)
FRONTS = {
    "nginx": Nginx,
    "nginx, lax": lambda folder, pair: Nginx(folder, pair, LAX_NGINX),
    "HAProxy": HAProxy,
    "HAProxy, lax": lambda folder, pair: HAProxy(folder, pair, LAX_HAPROXY),
}


# --- the attacks ---------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What there was to see while all streams went through a front end."""

    wrong: list                 # of (stream, what went wrong for somebody else)
    sent: list                  # of (status, request line), as the front end says; UNANSWERED where it gave up
    logged: list                # of (status, target), as tarweb says
    connections: int            # between the two


class Attack:
    """Sends streams to a front end, and is its victim, too."""

    def __init__(self, address):
        self.address, self.wrong, self.victims = address, [], 0

    def run(self, *pieces):
        """Send a stream, each piece when the one before it could have been sent on."""
        with Client(self.address) as client:
            for piece in pieces:
                with contextlib.suppress(OSError):      # it may have been refused already
                    client.send(piece)
                self.be_victim(pieces)
            with contextlib.suppress(OSError):
                client.half_close()
            self.check(pieces, client.rest())
        self.be_victim(pieces)

    def check(self, attack, received):
        if PAGE in received:
            self.wrong.append((attack, "a victim's page came to the attacker"))

    def be_victim(self, attack):
        """Ask for a page on a connection of its own; there is no other who asks for it."""
        page = self.victims % PAGES
        self.victims += 1
        with Client(self.address) as client:
            client.send(request(f"/n/{page:03}.txt?victim"))
            response = client.response()
        if (response.status, response.body) != (200, FILES[f"n/{page:03}.txt"]):
            self.wrong.append((attack, response))


def attacked(name, folder, pair, run):
    """What is Seen when `run`, called with an Attack and the front end of that name, does what it does."""
    if not (HAPROXY if "HAProxy" in name else NGINX):
        pytest.skip(f"needs {name.split(',')[0].lower()}")
    front, log = FRONTS[name](folder, pair), folder / "log"
    flags, listen = front.instance()
    tar = build_tar(folder / "site.tar", SITE)
    with contextlib.ExitStack() as stack:
        server = Server(tar, *flags, "--access-log", str(log), "--log-format", "json", listen=listen,
                        log=folder / "stderr")
        stack.callback(server.stop)
        stack.enter_context(front.before(server))
        attack = Attack(front.address)
        run(attack, front)
        with Client(front.address) as client:       # a front end tells of a request only after it was answered
            client.send(request("/n/000.txt?last"))
            assert client.response().status == 200
        wait_until(lambda: any("?last" in line for _, line in front.sent()))
        connections = front.connections()
    logged = [(line["status"], line["target"]) for line in map(json.loads, log.read_text().splitlines())]
    return Seen(attack.wrong, front.sent(), logged, connections)


def in_two(raw):
    end = raw.find(b"\r\n\r\n") + 4
    return raw[:end], raw[end:]


@pytest.fixture(scope="module", params=FRONTS)
def seen(request, tmp_path_factory, pairs):
    def run(attack, _):
        for number, raw in enumerate(STREAMS):
            raw = identified(raw, number)
            attack.run(raw)
            if number < len(CASES):
                attack.run(*in_two(re.sub(rb"^GET(?= )", b"POST", raw)))

    return attacked(request.param, tmp_path_factory.mktemp("front"), pairs["p256"], run)


def by_stream(lines):
    """{the ID of a stream, or None: how often which status}."""
    found = collections.defaultdict(collections.Counter)
    for status, text in lines:
        number = re.search(r"\?[oi](\d{4})", text)
        found[number and int(number[1])][status] += 1
    return found


def test_p07_everybody_gets_the_response_to_their_own_request(seen):
    assert seen.wrong == []


def test_p07_tarweb_sees_the_requests_that_the_front_end_sends(seen):
    check_counts(seen)


def check_counts(seen):
    """One by one, and with the statuses that the front end got; more where it did not wait for the response."""
    sent, logged = by_stream(seen.sent), by_stream(seen.logged)
    for number in sent | logged:
        unanswered = sent[number].pop(UNANSWERED, 0)
        assert sent[number] <= logged[number], number
        assert (logged[number] - sent[number]).total() <= unanswered, number


def test_p07_the_streams_meet_the_victims_on_shared_connections(seen):
    """What was sent on went over few connections, and not all of it was in order."""
    assert seen.connections < len(seen.sent) / 5
    assert len(by_stream(seen.sent)) > len(CASES) / 3
    assert sum(status == 400 for status, _ in seen.logged) > 50
