"""The clients of the soak: kinds of visits, well-behaved and hostile, and what each response is held against.

A kind is a function of a Visit that does one thing with a server, from connecting to the end; what is not as it should
be raises. Bodies are checked against the version of the site that their entity tag names: the tag is the digest of the
contents, so each names one file of one version, or of several where that file has stayed the same.
"""

import base64
import collections
import contextlib
import gzip
import hashlib
import os
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

import brotli
from support import PATIENCE, ROOT, Client, build_tar, noise, prose
from test_ranges import SIZE, parts
from tlsclient import TlsClient, TlsSocket, Truncated

HEADER_TIMEOUT, KEEPALIVE_TIMEOUT, MIN_RATE, DRAIN = 5, 12, 16384, 5        # the servers' flags
PER_ADDRESS = 40                # connections of one address, where the server has a limit for that
STALL = 10 + (512 << 10) // MIN_RATE + 10   # seconds without reading after which a client must have been cut off
PAGES, SMALL = 30, 300          # files of a site that change with each version, and that never do
LARGE = 3 << 20
SUFFIXES = {None: "", "gzip": ".gz", "br": ".br"}
TRUSTED, CLAIMED = "127.9.0.1", "203.0.113."        # who sends PROXY headers, and for whom
NEVER_SEEN = '"AAAAAAAAAAAAAAAA"'


# --- what is served ------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """Contents of a file, and the last version of the site that has had them."""

    body: bytes
    last: int


def entity_tag(body):
    return '"' + base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:12]).decode() + '"'


class SiteVersions:
    """A site whose archive is replaced time and again. `number`: of the newest version that may be served; `floor`: of
    the oldest that a connection from now on may get."""

    def __init__(self, folder, name, hosts):
        self.path, self.name, self.hosts = folder / f"{name}.tar", name, hosts
        self.number, self.floor = 0, 1
        self.known = {}                 # (name, entity tag): Stored
        self.fixed = {f"const/{i:03}.txt": b"%d of %b\n" % (i, name.encode()) + prose(40 * i) for i in range(SMALL)}
        self.write()
        self.place()

    def files(self, number):
        """What a version holds: name -> bytes."""
        stamp = f"<!doctype html><title>{self.name}, version {number}, %s</title>"
        pages = {f"page/{i:02}.html": (stamp % i).encode() + prose(1 + i * i * 40) for i in range(PAGES)}
        css = f"/* {self.name} {number} */".encode() + prose(20_000)
        return self.fixed | pages | {
            "index.html": (stamp % "home").encode(), "dir/index.html": (stamp % "dir").encode() + prose(5000),
            "404.html": (stamp % "nothing here").encode(),
            "style.css": css, "style.css.gz": gzip.compress(css, 1, mtime=0),
            "style.css.br": brotli.compress(css, quality=4),
            "data.bin": noise(SIZE, seed=f"{self.name} {number}"),
            "large.bin": noise(LARGE, seed=f"large {self.name} {number}"),
        }

    def write(self):
        """Write the next version, beside the present one."""
        number, files = self.number + 1, self.files(self.number + 1)
        for name, body in files.items():
            self.known.setdefault((name, entity_tag(body)), Stored(body, number)).last = number
        for key in [key for key, stored in list(self.known.items()) if stored.last < number - 3]:
            del self.known[key]
        build_tar(self.path.with_suffix(".new"), files)
        self.number = number

    def place(self):
        os.replace(self.path.with_suffix(".new"), self.path)

    def spoil(self, how):
        """Put something in place that cannot be served."""
        whole = self.path.read_bytes()
        broken = {"cut": whole[:len(whole) // 2 & -512 | 100], "noise": noise(50_000), "gzip": gzip.compress(whole, 1)}
        self.path.with_suffix(".new").write_bytes(broken[how])
        self.place()

    def body(self, name, response, floor):
        """The bytes of the representation that a response is about."""
        stored = self.known.get((name + SUFFIXES[response.get("Content-Encoding")], response["ETag"]))
        assert stored, f"no version of {name} has {response['ETag']}"
        assert stored.last >= floor, f"{name} of version {stored.last}, when {floor} had taken over already"
        return stored.body

    def missing(self, body, floor):
        """Whether this is the page for what is not there."""
        return any(name == "404.html" and stored.body == body and stored.last >= floor
                   for (name, _), stored in list(self.known.items()))


BROKEN = "cut", "noise", "gzip"


# --- who asks ------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A server as clients see it. `places`: kind of socket -> address. `features`: what it does that others do not."""

    name: str
    sites: list
    places: dict
    context: object = None
    features: frozenset = frozenset()
    kills: list = field(default_factory=list)       # when a worker of it was killed

    @property
    def secure(self):
        return self.context is not None


class Visitor(TlsClient):
    """support.Client from a given address, over TCP, TLS or a unix socket. `floors`: the versions below which it must
    get nothing."""

    def __init__(self, target, place, source, rcvbuf=None, context=None, session=None):
        self.pending = b""
        self.floors = {site.name: site.floor for site in target.sites}
        address = target.places[place]
        self.sock = socket.socket(socket.AF_UNIX if place == "unix" else socket.AF_INET)
        self.sock.settimeout(PATIENCE)
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        try:
            if place != "unix":
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.sock.bind((source, 0))
            self.sock.connect(address)
            if context:
                self.sock = TlsSocket(self.sock, context, "localhost", session)
                self.sock.handshake()
        except BaseException:
            self.close()
            raise

    def half_close(self):
        (TlsClient if isinstance(self.sock, TlsSocket) else Client).half_close(self)

    def slow_down(self, visit):
        """From now on, read 16 KiB at a time, 20 times a second."""
        self.sock = Unhurried(self.sock, visit)


class Unhurried:
    """A socket whose owner takes its time."""

    def __init__(self, sock, visit):
        self.sock, self.visit = sock, visit

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def recv(self, _size):
        self.visit.pause(0.05)
        return self.sock.recv(1 << 14)


class Over(Exception):
    """The soak ends; a visit that is not finished does not count."""


class Crowd:
    """All visitors, and what they have seen: `visits` by (server, kind), those `lost` to workers that were killed,
    `failures` as texts."""

    def __init__(self):
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.visits, self.lost = collections.Counter(), collections.Counter()
        self.failures = []
        self.threads = []
        self.invited = collections.defaultdict(list)        # server: kinds
        self.tallies = collections.Counter()        # what is compared with a server's own numbers in the end

    def send_in(self, target, seed):
        """Let every kind that has something to do with this server do it, again and again."""
        for number, (kind, every) in enumerate(KINDS.items()):
            if kind.needs <= target.features | {"tls" if target.secure else "plain"}:
                chooser = random.Random(f"{seed} {target.name} {kind.__name__}")
                self.invited[target.name].append(kind.__name__)
                arguments = target, kind, every, f"127.1.{len(self.threads) % 250}.{number + 1}", chooser
                self.threads.append(threading.Thread(target=self.keep_visiting, args=arguments))

    def start(self):
        for thread in self.threads:
            thread.start()

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def keep_visiting(self, target, kind, every, source, chooser):
        while not self.over.wait(chooser.uniform(0.2, 1) * every):
            visit = Visit(self, target, kind.__name__, source, chooser)
            try:
                kind(visit)
            except Over:
                return
            except Exception as error:          # whatever it is, it has not gone as it should
                self.failed(visit, error)
            finally:
                visit.close()
                with self.lock:
                    self.visits[target.name, kind.__name__] += 1

    def failed(self, visit, error):
        """A visit to a worker that was killed may fail; no other."""
        now, begun = time.monotonic(), max(visit.opened, default=float("inf"))
        ended = isinstance(error, OSError) or "the connection ended" in str(error)
        killed = any(kill <= now <= kill + 2 * PATIENCE and begun <= kill + 1 for kill in visit.target.kills)
        with self.lock:
            if ended and killed:
                self.lost[visit.target.name, visit.kind] += 1
            else:
                text = "".join(traceback.format_exception(error)).replace(f"{ROOT}/", "")
                self.failures.append(f"{time.strftime('%H:%M:%S')} {visit.target.name}: {visit.kind}\n{text}")
                print(self.failures[-1], file=sys.stderr)


class Visit:
    """One visit of a kind to a server: its connections, and its checks."""

    def __init__(self, crowd, target, kind, source, chooser):
        self.crowd, self.target, self.kind, self.source, self.random = crowd, target, kind, source, chooser
        self.clients = []
        self.opened = []                # when each of them was begun

    def connect(self, place="tcp", secure=True, source=None, context=None, **options):
        """A Visitor; where the server speaks TLS, after the handshake, if it is to be `secure`."""
        context = (context or self.target.context) if secure else None
        self.opened.append(time.monotonic())
        self.clients.append(Visitor(self.target, place, source or self.source, context=context, **options))
        return self.clients[-1]

    def close(self):
        for client in self.clients:
            client.close()

    def pause(self, seconds):
        if self.crowd.over.wait(seconds):
            raise Over

    def tally(self, name, count=1):
        with self.crowd.lock:
            self.crowd.tallies[self.target.name, name] += count

    def choose_site(self):
        """(a host's name, the SiteVersions that it is)."""
        site = self.random.choice(self.target.sites)
        return self.random.choice(site.hosts).replace("*", f"h{self.random.randrange(9)}"), site

    def choose_page(self):
        """(path, the name of its file)."""
        path = self.random.choice(("/", "/dir/", f"/page/{self.random.randrange(PAGES):02}.html",
                                   f"/const/{self.random.randrange(SMALL):03}.txt"))
        return path, path[1:] + "index.html" if path.endswith("/") else path[1:]

    def send(self, client, path, host, method="GET", body=b"", **fields):
        client.send(message(path, host, method, body, **fields))

    def ask(self, client, path, host, method="GET", body=b"", **fields):
        """One request, and its response."""
        self.send(client, path, host, method, body, **fields)
        return client.response(method)

    def get_page(self, client, query="", **fields):
        """A page of some site, checked; tells whether the connection stays open."""
        (host, site), (path, name) = self.choose_site(), self.choose_page()
        response = self.ask(client, path + query, host, **fields)
        self.check(client, site, name, response)
        return not response.closes

    def check(self, client, site, name, response):
        """A whole file."""
        assert response.status == 200, f"{response.status} for {name}"
        assert response.body == site.body(name, response, client.floors[site.name]), f"other bytes for {name}"

    def ended(self, client, seconds):
        """Everything that comes until the server ends the connection, which it must within that time. How it ends does
        not matter if something has come."""
        client.sock.settimeout(0.5)
        received, until = [client.pending], time.monotonic() + seconds
        while received[-1] or len(received) == 1:
            try:
                received.append(client.sock.recv(1 << 18))
            except TimeoutError:
                assert time.monotonic() < until, f"not ended within {seconds} s"
                self.pause(0)
            except ConnectionError:
                if not any(received):
                    raise
                break
        return b"".join(received)

    def refused(self, client, status, seconds=2 * PATIENCE):
        """The server says so, and ends the connection."""
        got = self.ended(client, seconds)
        assert got.startswith(b"HTTP/1.1 %d " % status), f"the connection ended with {got[:100]}, not with {status}"


def message(path, host, method="GET", body=b"", **fields):
    """The bytes of a request; names of fields are written with _ for -."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


KINDS = {}                      # kind: seconds between two visits, roughly


def kind(every, *needs):
    """A kind of visit; `needs`: "plain", "tls", or features of a server."""
    def add(function):
        function.needs = frozenset(needs)
        KINDS[function] = every
        return function
    return add


# --- those who behave ----------------------------------------------------------------------------------------------


@kind(2)
def keeps_its_connection(visit):
    client = visit.connect()
    for _ in range(20):
        if not visit.get_page(client):
            return
        visit.pause(visit.random.uniform(0, 0.4))


@kind(1)
def connects_for_each_request(visit):
    for _ in range(3):
        client = visit.connect()
        assert not visit.get_page(client, Connection="close")
        assert client.at_end()


@kind(3)
def says_that_nothing_follows(visit):
    client = visit.connect()
    host, site = visit.choose_site()
    visit.send(client, "/data.bin", host, Connection="close")
    client.half_close()
    visit.check(client, site, "data.bin", client.response())
    assert client.at_end()


@kind(2)
def asks_only_for_heads(visit):
    client = visit.connect()
    for _ in range(5):
        (host, site), (path, name) = visit.choose_site(), visit.choose_page()
        response = visit.ask(client, path, host, "HEAD")
        body = site.body(name, response, client.floors[site.name])
        assert (response.status, response["Content-Length"], response.body) == (200, str(len(body)), b"")
        if response.closes:
            return
    assert visit.ask(client, "*", host, "OPTIONS").status in (200, 204)


@kind(1.5)
def asks_for_ranges(visit):
    client = visit.connect()
    host, site = visit.choose_site()
    for _ in range(6):
        first = visit.random.randrange(SIZE)
        last = min(first + visit.random.randrange(20_000), SIZE - 1)
        asked = visit.random.choice((f"{first}-{last}", f"{first}-", f"-{SIZE - first}", f"0-9,{first}-{last},-7"))
        response = visit.ask(client, "/data.bin", host, Range=f"bytes={asked}")
        check_ranges(response, site.body("data.bin", response, client.floors[site.name]))
        if response.closes:
            return
    assert visit.ask(client, "/data.bin", host, Range=f"bytes={SIZE}-").status == 416


def check_ranges(response, whole):
    """A response to a Range that can be met: the parts that it is of."""
    assert response.status == 206
    if response["Content-Type"].startswith("multipart"):
        got = [(first, last, body) for first, last, body, _ in parts(response)]
    else:
        first, last, size = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response["Content-Range"]).groups())
        assert size == len(whole)
        got = [(first, last, response.body)]
    for first, last, body in got:
        assert body == whole[first:last + 1], f"other bytes at {first}-{last}"


@kind(2)
def asks_again_on_conditions(visit):
    client = visit.connect()
    (host, site), (path, name) = visit.choose_site(), visit.choose_page()
    first = visit.ask(client, path, host)
    visit.check(client, site, name, first)
    again = visit.connect() if first.closes else client
    second = visit.ask(again, path, host, If_None_Match=first["ETag"])
    if second.status == 304:
        assert second["ETag"] == first["ETag"] and site.body(name, second, again.floors[site.name]) == first.body
    else:
        visit.check(again, site, name, second)          # a newer version
        assert second["ETag"] != first["ETag"]
    last = visit.connect() if second.closes else again
    assert visit.ask(last, path, host, If_Match=NEVER_SEEN).status == 412


@kind(2)
def asks_for_the_rest_if_it_is_the_same(visit):
    client = visit.connect()
    host, site = visit.choose_site()
    first = visit.ask(client, "/data.bin", host, "HEAD")
    client = visit.connect() if first.closes else client
    for tag in (first["ETag"], NEVER_SEEN):
        response = visit.ask(client, "/data.bin", host, Range="bytes=100000-", If_Range=tag)
        whole = site.body("data.bin", response, client.floors[site.name])
        same = response["ETag"] == tag
        assert (response.status, response.body) == ((206, whole[100_000:]) if same else (200, whole))
        client = visit.connect() if response.closes else client


@kind(2)
def sends_bodies(visit):
    """They are read past: what comes behind them is the next request."""
    client = visit.connect()
    host, _ = visit.choose_site()
    body = visit.random.randbytes(visit.random.randrange(60_000))
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (b"first", body or b"second", b"")]
    for sent, fields in ((body, {"Content_Length": len(body)}), (b"".join(chunks), {"Transfer_Encoding": "chunked"})):
        response = visit.ask(client, "/", host, "POST", sent, **fields)
        assert (response.status, "GET" in response["Allow"]) == (405, True)
        if response.closes or not visit.get_page(client):
            return
    visit.send(client, "/", host, Expect="100-continue", Content_Length=5)
    client.pending = client.sock.recv(1 << 16)
    client.send(b"12345")
    response = client.response()
    assert (response.status, response.interim) == (200, [100])


@kind(3)
def sends_a_body_that_is_too_long(visit):
    client = visit.connect()
    host, _ = visit.choose_site()
    response = visit.ask(client, "/", host, "POST", visit.random.randbytes(70_000), Content_Length=100_000_000)
    assert response.status in (405, 413) and response.closes
    with contextlib.suppress(ConnectionError):
        visit.ended(client, 2 * PATIENCE)


@kind(2)
def asks_for_many_at_once(visit):
    """Pipelining: the answers come in the same order."""
    client = visit.connect()
    asked = [(visit.choose_site(), visit.choose_page()) for _ in range(visit.random.randrange(2, 25))]
    client.send(b"".join(message(path, host) for (host, _), (path, _) in asked))
    for (_, site), (_, name) in asked:
        response = client.response()
        visit.check(client, site, name, response)
        if response.closes:             # it has retired, and the rest was not answered
            return


@kind(2)
def sends_in_pieces(visit):
    client = visit.connect()
    host, site = visit.choose_site()
    whole = message("/page/07.html", host, User_Agent="slow typist")
    cuts = sorted(visit.random.sample(range(1, len(whole)), 5))
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        client.send(whole[start:end])
        visit.pause(0.02)
    visit.check(client, site, "page/07.html", client.response())


@kind(2)
def accepts_codings(visit):
    client = visit.connect()
    for accepted, got in (("gzip", {"gzip"}), ("br;q=0.5, gzip;q=0", {"br"}), ("identity", {None}),
                          ("gzip, br, zstd", {"br", "gzip"})):
        host, site = visit.choose_site()
        response = visit.ask(client, "/style.css", host, Accept_Encoding=accepted)
        visit.check(client, site, "style.css", response)
        assert response.get("Content-Encoding") in got
        if response.closes:
            return


@kind(4)
def downloads(visit):
    client = visit.connect()
    host, site = visit.choose_site()
    visit.check(client, site, "large.bin", visit.ask(client, "/large.bin", host))


@kind(5)
def downloads_slowly(visit):
    client = visit.connect(rcvbuf=1 << 16)
    client.slow_down(visit)
    host, site = visit.choose_site()
    visit.check(client, site, "large.bin", visit.ask(client, "/large.bin", host))


@kind(2)
def asks_for_what_is_not_there(visit):
    client = visit.connect()
    host, site = visit.choose_site()
    for path in (f"/no/{visit.random.random()}", "/page/", "/../../etc/passwd", "/page/%2e%2e/%2e%2e/etc", "/a%00b"):
        response = visit.ask(client, path, host)
        assert response.status in (404, 400), response.status
        assert response.status == 400 or site.missing(response.body, client.floors[site.name])
        if response.closes:
            return


@kind(3, "hosts")
def asks_for_another_host(visit):
    client = visit.connect()
    assert visit.ask(client, "/", "stranger.invalid").status in (200, 421)


@kind(2, "unix")
def comes_by_a_unix_socket(visit):
    client = visit.connect("unix", secure=False)
    for _ in range(5):
        if not visit.get_page(client):
            return


@kind(1.5, "proxy")
def comes_through_a_proxy(visit):
    """With a PROXY header of either version; the access log must name who is behind it."""
    client = visit.connect(source=TRUSTED)
    behind = CLAIMED + str(visit.random.randrange(1, 250))
    if visit.random.random() < 0.5:
        header = f"PROXY TCP4 {behind} 127.0.0.1 4321 80\r\n".encode()
    else:
        header = (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + socket.inet_aton(behind) + socket.inet_aton("127.0.0.1")
                  + struct.pack(">HH", 4321, 80))
    client.send(header)
    for _ in range(4):
        stays = visit.get_page(client)
        visit.tally("proxied")
        if not stays:
            return


@kind(4, "proxy")
def is_no_proxy_but_says_so(visit):
    """From an address that must send a header: something else; and from one that must not: a header."""
    client = visit.connect(source=TRUSTED)
    client.send(message("/", "t"))
    assert visit.ended(client, 2 * PATIENCE) == b""
    client = visit.connect()
    client.send(b"PROXY TCP4 203.0.113.1 127.0.0.1 4321 80\r\n" + message("/", "t"))
    visit.refused(client, 400)


# --- TLS -----------------------------------------------------------------------------------------------------------


@kind(3, "tls")
def resumes_its_session(visit):
    """Tickets are good for all workers, and after a reload too."""
    session = None
    for _ in range(4):
        client = visit.connect(session=session)
        if session:
            visit.tally("resumed", client.tls.session_reused)
            visit.tally("to resume")
        visit.get_page(client, Connection="close")
        assert client.at_end()
        session = client.tls.session
        visit.pause(visit.random.uniform(0, 1))


@kind(3, "tls")
def speaks_tls_1_2(visit):
    client = visit.connect(context=visit.target.old_context)
    assert client.tls.version() == "TLSv1.2"
    for _ in range(3):
        if not visit.get_page(client):
            return


@kind(3, "tls")
def leaves_without_a_word(visit):
    client = visit.connect()
    visit.get_page(client)
    client.truncate()
    with contextlib.suppress(Truncated):
        visit.ended(client, 2 * PATIENCE)


@kind(2, "tls")
def speaks_no_tls(visit):
    """Noise in place of a handshake, plain HTTP, or a handshake that is left half done."""
    client = visit.connect(secure=False)
    what = visit.random.choice(("noise", "http", "half"))
    if what == "http":
        client.send(message("/", "localhost"))
        visit.refused(client, 400)
        return
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        visit.target.context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    record = hello.read()
    noise = b"\x16\3\1" + visit.random.randbytes(300)
    client.send(noise if what == "noise" else record[:visit.random.randrange(1, len(record))])
    assert not visit.ended(client, HEADER_TIMEOUT + PATIENCE).startswith(b"HTTP")


@kind(3, "redirect")
def comes_by_the_plain_port(visit):
    client = visit.connect("redirect", secure=False)
    response = visit.ask(client, "/page/01.html?a", "localhost")
    assert response.status == 301 and response["Location"].endswith("/page/01.html?a")


# --- those who do not ----------------------------------------------------------------------------------------------


@kind(2)
def hangs_up(visit):
    """With an RST, at some point of a visit."""
    client = visit.connect(rcvbuf=1 << 14)
    host, _ = visit.choose_site()
    stage = visit.random.randrange(6)
    if stage:
        whole = message("/large.bin" if stage > 2 else "/", host)
        client.send(whole[:20] if stage == 1 else whole * stage)
    if stage > 3:
        client.sock.recv(100)
    visit.pause(visit.random.choice((0, 0.01, 0.3)))
    client.reset()


@kind(4)
def types_for_ever(visit):
    """Slow heads: each ends with a 408, however busily something comes."""
    clients = [visit.connect() for _ in range(4)]
    for client in clients:
        client.send(b"GET / HTTP/1.1\r\nHost: t\r\n")
    for number in range(4 * (HEADER_TIMEOUT - 1)):
        visit.pause(0.25)
        for client in clients:
            with contextlib.suppress(ConnectionError):      # the 408 has come already, on a machine that is slow
                client.send(b"X-%d: a\r\n" % number)
    for client in clients:
        visit.refused(client, 408, HEADER_TIMEOUT + PATIENCE)


@kind(4)
def sends_a_body_for_ever(visit):
    client = visit.connect()
    client.send(message("/", "t", "POST", b"a", Content_Length=1000))
    for _ in range(2 * (HEADER_TIMEOUT - 1)):
        visit.pause(0.5)
        with contextlib.suppress(ConnectionError):
            client.send(b"a")
    visit.refused(client, 408, HEADER_TIMEOUT + PATIENCE)


@kind(4)
def says_nothing(visit):
    clients = [visit.connect(secure=False) for _ in range(4)]
    for client in clients:
        assert not visit.ended(client, HEADER_TIMEOUT + PATIENCE).startswith(b"HTTP")


@kind(4)
def falls_silent(visit):
    client = visit.connect()
    visit.get_page(client)
    assert visit.ended(client, KEEPALIVE_TIMEOUT + PATIENCE) == b""


@kind(5)
def stops_reading(visit):
    """It has long been cut off when it looks again: not all that it asked for is there."""
    client = visit.connect(rcvbuf=1 << 14)
    host, _ = visit.choose_site()
    client.send(6 * message("/large.bin", host))
    visit.pause(STALL)
    assert len(visit.ended(client, PATIENCE)) < 6 * LARGE


@kind(1.5)
def sends_garbage(visit):
    client = visit.connect()
    garbage = bytearray(message("/page/01.html", "t", Range="bytes=0-5", Accept_Encoding="gzip"))
    for _ in range(visit.random.randrange(1, 9)):
        garbage[visit.random.randrange(len(garbage))] = visit.random.randrange(256)
    client.send(visit.random.choice((visit.random.randbytes(500), bytes(garbage), b"\n" * 1000, b"A" * 20_000)))
    with contextlib.suppress(OSError):          # it may have been refused, and ended, already
        client.half_close()
    got = visit.ended(client, 2 * PATIENCE)
    assert not got or got.startswith(b"HTTP/1.1 "), got[:100]


@kind(1)
def asks_for_what_nobody_has_asked_for(visit):
    """To fill what the server remembers: requests that come three times and never again, and ranges that come once."""
    client = visit.connect()
    for _ in range(10):
        host, site = visit.choose_site()
        cookie = f"{visit.random.getrandbits(64):016x}" * 64
        for _ in range(3):
            response = visit.ask(client, "/const/002.txt", host, Cookie=cookie)
            visit.check(client, site, "const/002.txt", response)
            if response.closes:
                return
    ranges = [visit.random.randrange(SIZE - 10) for _ in range(20)]
    client.send(b"".join(message("/data.bin", host, Range=f"bytes={first}-{first + 9}") for first in ranges))
    for _ in ranges:
        response = client.response()
        check_ranges(response, site.body("data.bin", response, client.floors[site.name]))
        if response.closes:
            return


@kind(3)
def asks_for_too_much(visit):
    host, _ = visit.choose_site()
    ranges = ",".join(f"{i}-{i}" for i in range(200))
    for path, fields, statuses in (("/" + 9000 * "a", {}, (414,)), ("/", {"X_Long": 17_000 * "b"}, (431,)),
                                   ("/data.bin", {"Range": f"bytes={ranges}"}, (206,)),
                                   ("/", {"Transfer_Encoding": "gzip"}, (400, 501)), ("/", {"HOST": "t"}, (400,))):
        client = visit.connect()
        assert visit.ask(client, path, host, **fields).status in statuses


@kind(6, "limit")
def comes_too_often(visit):
    """More connections from one address than are allowed: those beyond get no answer, the others theirs."""
    answered, until = 0, time.monotonic() + KEEPALIVE_TIMEOUT - 2
    for _ in range(PER_ADDRESS + 10):
        client = visit.connect()
        with contextlib.suppress(OSError):
            visit.send(client, "/", "t")
            answered += client.sock.recv(100).startswith(b"HTTP/1.1 200")
    assert answered and (answered <= PER_ADDRESS or time.monotonic() > until)    # by then the first ones are closed
