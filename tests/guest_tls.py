"""What the server has to show over TLS, in the kernel and where the kernel cannot. guest_serve.py runs it."""

import collections
import os
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import time
from functools import partial

import guest_init
from guest_checks import (
    PATIENCE,
    SERVING,
    SITE,
    STARTING,
    Client,
    Server,
    crowd,
    drain,
    keep_alive,
    many_connections,
    open_sockets,
    patience,
    pipelining,
    refusal,
    request,
    same,
    terminate,
)
from guest_tlsclient import KEY_LOG, KEY_UPDATE, KEY_UPDATE_BOTH, ROOT, SIGALGS, TLS12, TLS13, Forger, Tls, context

PAIRS = tuple(f"--tls-{part}=/guest/{kind}.{part}" for kind in SIGALGS for part in ("cert", "key"))
MODULES = "/later"      # where those are that are not loaded before the script
KERNEL = r"tarweb: TLS in the kernel \(handshakes by OpenSSL 3\..*\)"
USERSPACE = r"tarweb: TLS in userspace \(OpenSSL 3\..*\): "
NO_MODULE = USERSPACE + r".*\bmodprobe tls\b.*"
IN_PART = KERNEL + r", but in part: .*\bmodprobe chacha20poly1305\b.*"
TOO_OLD = USERSPACE + r".*\bolder than 6\.7\b.*"
COUNTS = re.compile(r"tarweb: TLS connections: (\d+) in the kernel, (\d+) in userspace, (\d+) resumed, "
                    r"(\d+) failed handshakes, (\d+) truncated")
COUNTED = ("kernel", "userspace", "resumed", "failed", "truncated")
MEANWHILE = 0.06        # seconds in which the server takes what it was sent so far


def load(*without):
    """Load kernel TLS and its ciphers, but for the modules with one of these words in their names."""
    loaded = guest_init.load_modules(MODULES, without)
    failed = {name: error for name, error in loaded.items() if error not in ("", "File exists")}
    assert not failed, failed


def tls_stat():
    """/proc/net/tls_stat (Documentation/networking/tls.rst), or nothing where there is no kernel TLS."""
    if not os.path.exists("/proc/net/tls_stat"):
        return collections.Counter()
    with open("/proc/net/tls_stat") as table:
        return collections.Counter({name: int(count) for name, count in map(str.split, table)})


class TlsServer(Server):
    """The server with both kinds of certificate. `says`: what it must say on stderr at its start; `without`: words in
    the names of modules that are not loaded before; `polite`: whether clients close with close_notify."""

    SCHEME = "https"

    def __init__(self, *flags, says=KERNEL, without=(), polite=False):
        load(*without)
        self.says, self.polite = says, polite
        self.context = context()
        self.expected = collections.Counter()       # what it should have counted, by the names of COUNTED
        self.damaged = False                        # whether the kernel was given records that it cannot decrypt
        # So long, since the guest is slow: a connection may have to wait for a hundred others' handshakes.
        super().__init__(*PAIRS, "--header-timeout=60", *flags)
        self.before = tls_stat()                    # which has counted what the server tried out on itself

    def tls(self, context=None, session=None, rcvbuf=None):
        """A connection before its handshake."""
        return Tls(self.plug(rcvbuf), context or self.context, session, self.polite)

    def connect(self, rcvbuf=None, context=None, session=None):
        return Client(self.tls(context, session, rcvbuf).handshake())

    def read_report(self, said):
        first, *rest = said.splitlines()
        assert re.fullmatch(self.says, first), first
        found = [COUNTS.fullmatch(line) for line in rest]
        assert found and all(found), said
        sums = map(sum, zip(*(map(int, each.groups()) for each in found), strict=True))
        self.told = dict(zip(COUNTED, sums, strict=True))
        self.workers = [int(each[1]) + int(each[2]) for each in found]


def session(server, context):
    """A session to be resumed, taken from a connection that has been used: tickets come after the handshake."""
    with server.connect(context=context) as client:
        same(client.ask("n01.txt"), (200, SITE["n01.txt"]))
        taken = client.sock.tls.session
    assert taken.has_ticket
    return taken


# --- suites, keys, clients -----------------------------------------------------------------------------------------


def suites(server):
    """Each suite with each kind of key; 10 MB with one of them in turn."""
    for i, suite in enumerate(TLS13 + TLS12):
        for key, large in zip(SIGALGS, ("big.bin", "f300001.bin")[::1 - i % 2 * 2], strict=True):
            with server.connect(context=context(suite, key)) as client:
                tls = client.sock.tls
                assert tls.cipher()[0].endswith(suite), tls.cipher()
                assert tls.getpeercert(True) == certificate(key), f"not the {key} certificate"
                for name in ("n05.txt", "empty.txt", large, "f16385.bin", "one.bin"):
                    same(client.ask(name), (200, SITE[name]))


def certificate(kind):
    """The leaf in the server's file, as it is sent."""
    with open(f"/guest/{kind}.cert") as file:
        pem, end, _ = file.read().partition(ssl.PEM_FOOTER)
    return ssl.PEM_cert_to_DER_cert(pem + end)


def curl(server):
    """10 MB and a small file on one connection, in both versions."""
    address = f"https://localhost:{server.address[1]}"
    for suite in (TLS13[0], TLS12[1]):
        flags = (["--tlsv1.3", "--tls13-ciphers", suite] if suite in TLS13 else
                 ["--tls-max", "1.2", "--ciphers", f"ECDHE-RSA-{suite}"])
        done = subprocess.run(["curl", "-sS", "--cacert", ROOT, *flags, f"{address}/big.bin",
                               f"{address}/n05.txt"], capture_output=True, timeout=STARTING, check=False)
        same((done.returncode, done.stdout), (0, SITE["big.bin"] + SITE["n05.txt"]))
        assert not done.stderr, done.stderr


def s_client_command(server, *flags):
    return ["openssl", "s_client", "-connect", f"127.0.0.1:{server.address[1]}", "-servername", "localhost", "-CAfile",
            ROOT, "-verify_return_error", *flags]


def s_client(server):
    """10 MB in both versions, with other suites than curl."""
    for suite in (TLS13[2], TLS12[0]):
        flags = ["-ciphersuites", suite] if suite in TLS13 else ["-tls1_2", "-cipher", f"ECDHE-ECDSA-{suite}"]
        done = subprocess.run(s_client_command(server, "-quiet", *flags), capture_output=True, timeout=STARTING,
                              check=False, input=request("big.bin", connection="close"))
        same((done.returncode, done.stdout.partition(b"\r\n\r\n")[2]), (0, SITE["big.bin"]))


def offers(server):
    """Groups that take a HelloRetryRequest, the last of the server's alone, ALPN, padded records."""
    for offered in ({"groups": "P-521:X25519"}, {"groups": "P-521:P-256:P-384"}, {"groups": "P-384"},
                    {"alpn": ["h2", "http/1.1"]}, {"padding": 512}, {"padding": 16_000}):
        with server.connect(context=context(**offered)) as client:
            assert client.sock.tls.selected_alpn_protocol() == ("http/1.1" if "alpn" in offered else None)
            for name in ("n05.txt", "f65536.bin", "one.bin"):
                same(client.ask(name), (200, SITE[name]))


def thousands(server):
    """3,000 requests over 100 connections open at the same time: ten requests in one record, 30 on each."""
    resumed = session(server, server.context)
    clients = [server.connect(session=resumed) for _ in range(100)]
    for step in (1, 3, 7):
        names = [[f"n{(i + at * step) % 20:02}.txt" for at in range(10)] for i in range(100)]
        for client, asked in zip(clients, names, strict=True):
            client.sock.sendall(b"".join(map(request, asked)))
        for client, asked in zip(clients, names, strict=True):
            for name in asked:
                same(client.response(), (200, SITE[name]))
    for client in clients:
        with client:
            pass


# --- what comes right behind the handshake -------------------------------------------------------------------------


def records(data):
    """Where in `data` each TLS record starts, and its length with its header."""
    at = 0
    while at < len(data):
        length = 5 + int.from_bytes(data[at + 3:at + 5])
        yield at, length
        at += length


def cuts(data, first=0):
    """Places to cut the records of `data` at, from the record of that number on: before, in and behind the header, in
    the middle, before the last byte."""
    for start, length in list(records(data))[first:]:
        yield from (start, start + 1, start + 4, start + 5, start + length // 2, start + length - 1)


def deliver(sock, data, places):
    """Send `data` in pieces, each when the server has taken the one before."""
    for first, end in zip((0, *places), (*places, len(data)), strict=True):
        if first:
            time.sleep(MEANWHILE)
        sock.sendall(data[first:end])


def together(server, names, places=(), **how):
    """Ask for `names`, each in a record, in one piece with the client's last flight, or cut at these places (or those
    that the function `places` finds in the bytes). Gives a Client, and the bytes."""
    tls = server.tls(**how)
    data = tls.last_flight() + b"".join(tls.seal(request(name)) for name in names)
    deliver(tls.sock, data, places(data) if callable(places) else places)
    return Client(tls), data


def answered(client, names):
    """Read the responses; then ask for something else, which shows that both sides count their records alike."""
    with client:
        for name in names:
            same(client.response(), (200, SITE[name]))
        for name in ("one.bin", "f16385.bin", "n02.txt"):
            same(client.ask(name), (200, SITE[name]))


def last_flight(server):
    """Requests in the segment of the client's Finished, and that segment cut everywhere: TLS 1.3 (change_cipher_spec,
    Finished, two requests)."""
    names = ["n03.txt", "n17.txt"]
    client, data = together(server, names)
    answered(client, names)
    assert len(list(records(data))) == 4, list(records(data))
    for place in list(cuts(data))[1:]:
        answered(together(server, names, (place,))[0], names)
    answered(together(server, names, range(1, len(data), 7))[0], names)


def last_flight_resumed(server):
    """The same when a session is resumed, in both versions; in TLS 1.2 the client has the last word only then."""
    names = ["n03.txt", "n17.txt"]
    for suite in (TLS13[0], TLS12[2]):
        own = context(suite)
        how = {"context": own, "session": session(server, own)}
        client, data = together(server, names, **how)
        assert client.sock.tls.session_reused
        answered(client, names)
        for place in cuts(data, 2):
            answered(together(server, names, (place,), **how)[0], names)


def last_flight_long(server):
    """Many requests behind Finished, in many records, the last of them in pieces; and 10 MB."""
    names = [f"n{i % 20:02}.txt" if i % 9 else "f16385.bin" for i in range(300)]
    for places in ((), lambda data: list(cuts(data))[-3:], lambda data: range(4000, len(data), 4000)):
        answered(together(server, names, places)[0], names)
    answered(together(server, ["big.bin", "one.bin"])[0], ["big.bin", "one.bin"])


def last_words(server):
    """What ends a connection, in one piece with Finished and a request: the request is answered, but to a client that
    says it has failed. What is not data, behind the handshake, keeps a connection out of the kernel."""
    for ending in (Tls.farewell, Tls.key_update, Tls.fatal_alert, lambda _: b""):
        tls = server.tls()
        tls.sock.sendall(tls.last_flight() + tls.seal(request("f65536.bin")) + ending(tls))
        if ending is not Tls.key_update:
            tls.sock.shutdown(socket.SHUT_WR)
        with Client(tls) as client:
            if ending is Tls.fatal_alert:
                gone(tls.sock)
                continue
            same(client.response(), (200, SITE["f65536.bin"]))
            if ending is Tls.key_update:
                same(client.ask("n05.txt"), (200, SITE["n05.txt"]))
            else:
                assert client.stream.read() == b""
    server.expected["userspace"] += 2
    alive(server)


def alive(server):
    with server.connect() as client:
        same(client.ask("n04.txt"), (200, SITE["n04.txt"]))


def gone(sock):
    """Wait until the server has closed; what it sent until then."""
    received = []
    try:
        while data := sock.recv(1 << 16):
            received.append(data)
    except ConnectionResetError:
        pass
    return b"".join(received)


# --- records that are not data -------------------------------------------------------------------------------------


def in_use(server, **how):
    """A connection that the kernel has taken over, since it has answered."""
    client = server.connect(**how)
    same(client.ask("one.bin"), (200, b"1"))
    return client


def key_updates(server):
    """A client that changes its keys: what it asked before is answered, then the server says goodbye."""
    for kind in (KEY_UPDATE, KEY_UPDATE_BOTH):
        for before, behind in (((), ()), (["f300001.bin"], ()), (["n03.txt", "n04.txt"], ["n05.txt"])):
            with in_use(server) as client:
                tls = client.sock
                data = b"".join(tls.seal(request(name)) for name in before) + tls.key_update(kind)
                tls.sock.sendall(data + b"".join(tls.seal(request(name)) for name in behind))
                for name in before:
                    same(client.response(), (200, SITE[name]))
                assert client.stream.read() == b""
    alive(server)


def key_update_by_s_client(server):
    """Its line "K" changes the keys."""
    with subprocess.Popen(s_client_command(server, "-msg"), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdin.write(request("n05.txt"))
        process.stdin.flush()
        seen = b""
        while SITE["n05.txt"] not in seen:
            piece = os.read(process.stdout.fileno(), 1 << 16)
            assert piece, seen[-2000:]
            seen += piece
        process.stdin.write(b"K\n")
        process.stdin.flush()
        seen += process.stdout.read()
        assert b"KeyUpdate" in seen and b"close_notify" in seen.partition(b"KeyUpdate")[2], seen[-2000:]
    alive(server)


def goodbyes(server):
    """close_notify by the client, alone, behind requests, with and without FIN: answered by one of the server's."""
    for names in ((), ["n05.txt"], ["f300001.bin", "n06.txt"]):
        for fin in (False, True):
            with in_use(server) as client:
                tls = client.sock
                tls.sock.sendall(b"".join(tls.seal(request(name)) for name in names) + tls.farewell())
                if fin:
                    tls.sock.shutdown(socket.SHUT_WR)
                for name in names:
                    same(client.response(), (200, SITE[name]))
                assert client.stream.read() == b""
    with in_use(server) as client:
        client.send("nothing", method="G(T")
        assert client.response()[0] == 400
        assert client.stream.read() == b""


def truncations(server):
    """A FIN without close_notify, alone and behind requests: what was asked is answered, and counted."""
    for names in ((), ["n05.txt"], ["f300001.bin", "n06.txt"]):
        with in_use(server) as client:
            for name in names:
                client.send(name)
            client.sock.sock.shutdown(socket.SHUT_WR)
            for name in names:
                same(client.response(), (200, SITE[name]))
            assert client.stream.read() == b""
        server.expected["truncated"] += 1


def fatal_alerts(server):
    """A client that gives up, idle, asking, and being answered."""
    for names in ((), ["n05.txt"], ["big.bin"]):
        with in_use(server, rcvbuf=4096) as client:
            tls = client.sock
            tls.sock.sendall(b"".join(tls.seal(request(name)) for name in names) + tls.fatal_alert())
            gone(tls.sock)
    alive(server)


HARMLESS = ((23, b"", 0), (23, b"", 1000), (21, b"\1\x5a", 0))         # type, content, padding
HARMFUL = ((22, b"", 0), (22, bytes(16), 0), (22, b"\x18\0\0\1\7", 0), (22, bytes(5000), 0), (21, b"", 0),
           (21, b"\1", 0), (21, b"\1\0\1\0", 0), (20, b"\1", 0), (99, b"x", 0), (None, b"", 50), (None, b"", 0))


def strange_records(server):
    """Records that OpenSSL never sends. Empty ones, and the alert user_canceled, are passed over; the others may end
    the connection, but not otherwise."""
    for strange in HARMLESS + HARMFUL:
        own = context(TLS13[0])
        own.keylog_filename = KEY_LOG
        tls = server.tls(own).handshake()
        forger = Forger()
        time.sleep(MEANWHILE)       # now the kernel has taken over
        tls.sock.sendall(b"".join(forger.record(*record) for record in (
            strange, (23, request("n05.txt"), 0), strange, (23, request("n06.txt", connection="close"), 99))))
        with Client(tls) as client:
            if strange in HARMFUL:
                gone(tls.sock)
                continue
            for name in ("n05.txt", "n06.txt"):
                same(client.response(), (200, SITE[name]))
            assert client.stream.read() == b""
    alive(server)


def damage(server):
    """A record with one bit wrong, or that is too long: the connection ends without an answer."""
    for suite in TLS13 + TLS12:
        own = context(suite)
        for spoil in (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
                      lambda data: data[:3] + b"\x60" + data[4:]):
            tls = server.tls(own).handshake()
            with Client(tls) as client:
                same(client.ask("n05.txt"), (200, SITE["n05.txt"]))
                tls.sock.sendall(spoil(tls.seal(request("n06.txt"))) + bytes(30_000))
                assert len(gone(tls.sock)) < 100, "an answer"
    server.damaged = True
    alive(server)


# --- ends before the handshake's -----------------------------------------------------------------------------------


def refused_handshakes(server):
    """Handshakes that fail on either side."""
    for own, reason in ((context(alpn=["h2"]), "no application protocol"),
                        (context(groups="P-521"), "handshake failure"),
                        (ssl.create_default_context(), "certificate verify failed")):
        tls = server.tls(own)
        try:
            tls.handshake()
            tls.readinto(bytearray(1))
        except ssl.SSLError as error:
            assert reason in str(error), error
        else:
            raise AssertionError(f"no {reason}")
        gone(tls.sock)
        tls.close()
        server.expected["failed"] += 1
    alive(server)


def plain_http(server):
    with Client(server.plug()) as client:
        status, body = client.ask("one.bin")
        assert status == 400 and b"HTTPS" in body, (status, body)
        assert client.stream.read() == b""


def no_handshake(server):
    """Random bytes; half a ClientHello and FIN; and RST."""
    hello = server.tls().hello()
    for data in (b"", b"\x16", hello[:5], hello[:100], hello, random.Random(1).randbytes(5000),
                 b"\x16\x03\x01\x40" + bytes(50)):
        for reset in (False, True):
            sock = server.plug()
            sock.sendall(data)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sock.shutdown(socket.SHUT_WR)
                gone(sock)
            sock.close()
    alive(server)


def family(pid):
    """A process and its children."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [pid, *map(int, file.read().split())]


def gone_before_accept(server):
    """FIN and RST that are there before the server has accepted: those connections end, and no other does."""
    hello = server.tls().hello()
    stopped = family(server.process.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    closed = [server.plug() for _ in range(15)]
    for i, sock in enumerate(closed):
        sock.sendall((b"", hello, b"GET / HTTP/1.1\r\n\r\n")[i % 3])
        if i % 2:
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    for sock in closed[1::2]:
        gone(sock)
        sock.close()
    alive(server)
    deadline = time.monotonic() + PATIENCE
    while left := open_sockets(server.address[1]):
        assert time.monotonic() < deadline, f"{left} sockets left"
        time.sleep(0.05)


def handshake_deadline(server):
    """With a --header-timeout: who does not come to the end of the handshake is closed, without a word. So is who does
    not end the record behind it."""
    hello = server.tls().hello()
    socks = [server.plug() for _ in range(3)]
    for sock, data in zip(socks, (b"", hello[:5], hello[:-1]), strict=True):
        sock.sendall(data)
    tls = server.tls()
    data = tls.last_flight() + tls.seal(request("n05.txt"))
    tls.sock.sendall(data[:-10])
    for sock in socks:
        assert gone(sock) == b"", "a word"
        sock.close()
    gone(tls.sock)
    tls.sock.close()


# --- resumption ----------------------------------------------------------------------------------------------------


def resumption(server):
    """Tickets of either worker are good for both."""
    for suite in (TLS13[0], TLS12[0]):
        own = context(suite)
        taken = session(server, own)
        for i in range(12):
            with server.connect(context=own, session=taken) as client:
                assert client.sock.tls.session_reused, i
                server.expected["resumed"] += 1
                same(client.ask("n05.txt"), (200, SITE["n05.txt"]))
                same(client.ask("f65536.bin"), (200, SITE["f65536.bin"]))
                if i % 4 == 3:
                    taken = client.sock.tls.session


def idle_drain(server):
    """At SIGTERM idle connections get close_notify, and so does one whose handshake ends later."""
    idle = [server.connect() for _ in range(4)]
    same(idle[0].ask("one.bin"), (200, b"1"))
    late = server.tls()
    hello = late.hello()
    late.sock.sendall(hello[:50])
    same(idle[0].ask("one.bin"), (200, b"1"))           # so the other one has been accepted by now
    server.process.send_signal(signal.SIGTERM)
    for client in idle:
        with client:
            assert client.stream.read() == b""
    late.sock.sendall(hello[50:])
    with Client(late.handshake()) as client:
        assert client.stream.read() == b""
    server.end()


# --- what was counted ----------------------------------------------------------------------------------------------


def in_kernel(server):
    """After the end: each connection's both directions were the kernel's, and nothing is left of them."""
    after = tls_stat()
    grown = {name: after[name] - server.before[name] for name in after}
    told = server.told
    assert told["kernel"] > 0 and told["userspace"] == server.expected["userspace"], told
    assert grown["TlsTxSw"] == grown["TlsRxSw"] == told["kernel"], (grown, told)
    assert after["TlsCurrTxSw"] == after["TlsCurrRxSw"] == 0, after
    assert bool(grown["TlsDecryptError"]) == server.damaged, grown


def in_userspace(server):
    assert server.told["userspace"] > 0 and server.told["kernel"] == 0, server.told
    assert tls_stat()["TlsTxSw"] == server.before["TlsTxSw"]


def exact_counts(server):
    told = {name: server.told[name] for name in server.expected}
    assert told == dict(server.expected), (told, server.expected)
    assert all(server.workers), f"connections of each worker: {server.workers}"


# --- where the kernel cannot ---------------------------------------------------------------------------------------


def required(reason):
    """--ktls=require ends with exit status 1, and a sentence in which `reason` is found."""
    said = refusal(*PAIRS, "--ktls=require")
    assert said.startswith("tarweb: ") and re.search(reason, said) and said.count("\n") == 1, said


def without_module(_):
    """The tls module is not loaded: OpenSSL serves in userspace."""
    assert not os.path.exists("/proc/net/tls_stat")
    server = TlsServer(says=NO_MODULE, without=("",))
    smoke(server)
    drain(server)
    in_userspace(server)
    required(r"\bmodprobe tls\b")


def without_cipher(_):
    """The kernel has AES-GCM alone: what uses ChaCha20 is served in userspace."""
    server = TlsServer(says=IN_PART, without=("chacha", "poly1305"))
    smoke(server)
    drain(server)
    server.expected["userspace"] = 2
    in_kernel(server)
    required(r"\bmodprobe chacha20poly1305\b")


def too_old(_):
    """The module is there, but io_uring cannot set it up."""
    server = TlsServer(says=TOO_OLD)
    smoke(server)
    keep_alive(server)
    drain(server)
    in_userspace(server)
    required(r"\bolder than 6\.7\b")


def smoke(server):
    """Each suite, with some files."""
    for suite in TLS13 + TLS12:
        with server.connect(context=context(suite)) as client:
            for name in ("n05.txt", "f300001.bin", "one.bin"):
                same(client.ask(name), (200, SITE[name]))


KERNEL_TLS = partial(TlsServer, "--ktls=require")
BRIEFLY = (smoke, keep_alive, pipelining, last_words, drain, in_kernel)
RUNS = {
    "tls": (KERNEL_TLS, (*(check for check in SERVING if check not in (many_connections, drain)), suites, curl,
                         s_client, offers, thousands, last_flight, last_flight_resumed, last_flight_long, last_words,
                         key_updates, key_update_by_s_client, goodbyes, fatal_alerts, strange_records, plain_http,
                         no_handshake, gone_before_accept, drain, in_kernel)),
    "tls limits": (partial(KERNEL_TLS, "--header-timeout=4", "--keepalive-timeout=2", "--max-connections=8",
                           "--threads=2"),
                   (patience, crowd, handshake_deadline, damage, terminate, in_kernel)),
    "tls counts": (partial(KERNEL_TLS, "--threads=2", polite=True),
                   (resumption, truncations, refused_handshakes, idle_drain, in_kernel, exact_counts)),
    "tls libc": (partial(KERNEL_TLS, "--no-liburing"), BRIEFLY),
    "tls sqpoll": (partial(KERNEL_TLS, "--sqpoll-ms=20"), BRIEFLY),
    "tls smoke": (KERNEL_TLS, (smoke, terminate, in_kernel)),
    "tls without": (None, (without_module, without_cipher)),
    "tls too old": (None, (too_old,)),
}
