"""Certificates and keys: which goes with which name, what a client gets, and what is said of files that will not do."""

import contextlib
import copy
import ctypes
import hmac
import os
import ssl
import subprocess
import sys
import threading

import pytest
from certificates import KINDS, Pair, private_pem
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from support import ROOT
from tlsmemory import ClientContext, Peer, TestEngine

import credentials
from credentials import SECRET, TICKET_KEYS, TICKET_PERIOD, Credentials, CredentialsError, TicketKeys
from openssl import TLS1_2, OpenSSL
from tls import Engine


@pytest.fixture(scope="module")
def openssl():
    return OpenSSL()


def load(openssl, *pairs):
    return Credentials(openssl, [(pair.cert, pair.key) for pair in pairs], TLS1_2, TicketKeys(openssl, 0))


def certificate_for(engine, name, context=None):
    """What a client that asks for `name` is shown, in DER."""
    peer, session = Peer(context or ClientContext(), name=name), engine.start(False)
    said = peer.handshake()
    while not peer.done:
        engine.handshake(session, said)
        said, session.output = peer.handshake(session.output), b""
    engine.free(session)
    return peer.tls.getpeercert(binary_form=True)


# --- names

@pytest.mark.parametrize(("names", "found"), (
    (("a.example",), {b"a.example"}),
    (("a.example", "b.example", "*.c.example"), {b"a.example", b"b.example", b"*.c.example"}),
    (("A.Example",), {b"a.example"}),
    (("a.example", "127.0.0.1"), {b"a.example"}),
    (("127.0.0.1",), set()),
    ((), set()),
))
def test_names(openssl, authority, names, found):
    """Those of hosts in subjectAltName, and nothing else: not the common name, and no address."""
    loaded = load(openssl, authority.issue(names=names))
    assert set(loaded.by_name) == found


@pytest.mark.parametrize(("certificates", "first"), (
    ([("b.example", "a.example", "c.example")], b"b.example"),
    ([("*.example", "Z.Example", "a.example")], b"z.example"),
    ([("127.0.0.1",), ("*.b.example",), ("c.example",)], b"c.example"),
    ([("*.b.example",)], b""), ([()], b"")))
def test_the_first_name(openssl, authority, certificates, first):
    loaded = load(openssl, *(authority.issue(names=names) for names in certificates))
    assert loaded.first_name() == first


@pytest.fixture(scope="module")
def named(openssl, authority):
    return load(openssl, *(authority.issue(names=names) for names in (
        ("default.example",), ("a.example", "www.a.example"), ("*.b.example",),
        ("deep.b.example", "*.default.example"))))


@pytest.mark.parametrize(("host", "owner"), (
    (b"default.example", b"default.example"), (b"a.example", b"a.example"), (b"www.a.example", b"a.example"),
    (b"WWW.A.Example", b"a.example"), (b"a.example.", b"a.example"), (b"A.EXAMPLE.", b"a.example"),
    (b"x.b.example", b"*.b.example"), (b"X.B.Example.", b"*.b.example"),
    (b"deep.b.example", b"deep.b.example"),             # a name of its own goes before a wildcard
    (b"b.example", None), (b"x.y.b.example", None),     # RFC 6125 section 6.4.3: one label, no more and no fewer
    (b"x.deep.b.example", None), (b"x.default.example", b"deep.b.example"),
    (b"c.example", None), (b"example", None), (b"", None), (b".", None), (b"..", None), (b"a.example..", None),
    (b"127.0.0.1", None), (b"\xff\xfe", None), (b"a" * 255, None),
))
def test_find(named, host, owner):
    assert named.find(host) == (owner and named.by_name[owner])


def test_the_first_of_a_name_wins(openssl, authority):
    pairs = [authority.issue(names=("both.example", f"{i}.example")) for i in range(2)]
    loaded = load(openssl, *pairs)
    assert loaded.find(b"both.example") == loaded.find(b"0.example") == loaded.context
    assert loaded.find(b"1.example") != loaded.context


# --- which certificate a client gets

@pytest.mark.parametrize("asked", (0, 1, 2, None, "unknown"))
def test_the_name_decides(authority, asked):
    pairs = [authority.issue(names=(f"{i}.example",)) for i in range(3)]
    engine = TestEngine([(pair.cert, pair.key) for pair in pairs])
    name = f"{asked}.example" if isinstance(asked, int) else asked and "unknown.example"
    assert certificate_for(engine, name) == pairs[asked if isinstance(asked, int) else 0].der


@pytest.mark.parametrize("first", ("rsa", "p256"))
@pytest.mark.parametrize(("suite", "kind"), (("ECDHE-RSA-AES128-GCM-SHA256", "rsa"),
                                            ("ECDHE-ECDSA-AES128-GCM-SHA256", "p256")))
def test_two_kinds_of_key_for_the_same_names(authority, first, suite, kind):
    """One context with both, whichever came first; the client's abilities choose."""
    kinds = sorted(("rsa", "p256"), key=lambda kind: kind != first)
    pairs = {kind: authority.issue(kind, names=("b.example", "a.example")) for kind in kinds}
    engine = TestEngine([(pair.cert, pair.key) for pair in pairs.values()])
    assert set(engine.credentials.by_name.values()) == {engine.credentials.context}
    for name in ("a.example", None):
        assert certificate_for(engine, name, ClientContext("1.2", suite)) == pairs[kind].der


def test_two_kinds_of_key_for_other_names(authority):
    pairs = [authority.issue(kind, names=(f"{kind}.example",)) for kind in ("rsa", "p256")]
    engine = TestEngine([(pair.cert, pair.key) for pair in pairs])
    assert len(set(engine.credentials.by_name.values())) == 2
    for pair, kind in zip(pairs, ("rsa", "p256"), strict=True):
        assert certificate_for(engine, f"{kind}.example") == pair.der


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key(authority, kind):
    pair = authority.issue(kind)
    assert certificate_for(TestEngine([(pair.cert, pair.key)]), "localhost") == pair.der


@pytest.mark.parametrize("kinds", (["p256"], ["rsa", "p256"]))
def test_the_chain_is_sent_in_its_order(authority, kinds):
    """A client that knows the root alone believes it; with two kinds of key each has its own."""
    pairs = [authority.issue(kind) for kind in kinds]
    engine = TestEngine([(pair.cert, pair.key) for pair in pairs])
    context = ClientContext()
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    context.load_verify_locations(authority.root)
    assert certificate_for(engine, "localhost", context)


# --- files

def write(folder, cert, key):
    """A Pair of files with these contents."""
    pair = Pair(folder / "a.pem", folder / "a.key", folder)
    pair.cert.write_bytes(cert)
    pair.key.write_bytes(key)
    return pair


GARBAGE = b"-----BEGIN CERTIFICATE-----\nTm8gY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n"
GARBAGE_KEY = b"-----BEGIN PRIVATE KEY-----\nTm8ga2V5\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(("case", "names", "says"), (
    ("nothing in the certificate", "a.pem", "holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"),
    ("nothing in the key", "a.key", "holds no private key in PEM (-----BEGIN PRIVATE KEY-----)"),
    ("DER", "a.pem", "holds no certificate in PEM"),
    ("garbage in the certificate", "a.pem", "damaged"),
    ("garbage in the key", "a.key", "holds no private key in PEM"),
    ("the wrong way round", "a.pem", "holds no certificate in PEM"),
    ("a certificate for a key", "a.key", "holds no private key in PEM"),
    ("an encrypted key", "a.key", "is encrypted: 'openssl pkey -in "),
    ("another's key", "a.key", "is not the key of "),
    ("another kind of key", "a.key", "is not the key of "),
    ("a chain from its other end", "a.key", "is not the key of "),
    ("a chain from its other end", "a.key", "that of certificate 2 in it, and the server's own certificate has to be "),
    ("another's key", "a.key", "give --tls-key for each --tls-cert"),
))
def test_files_that_will_not_do(openssl, tmp_path, pairs, case, names, says):
    cert, key = pairs["p256"].cert.read_bytes(), pairs["p256"].key.read_bytes()
    encrypted = private_pem(KINDS["p256"](), b"secret")
    chain = cert.split(b"-----BEGIN")
    contents = {
        "nothing in the certificate": (b"", key), "nothing in the key": (cert, b""), "DER": (pairs["p256"].der, key),
        "garbage in the certificate": (GARBAGE, key), "garbage in the key": (cert, GARBAGE_KEY),
        "the wrong way round": (key, cert), "a certificate for a key": (cert, cert),
        "an encrypted key": (cert, encrypted), "another's key": (cert, private_pem(KINDS["p256"]())),
        "another kind of key": (cert, pairs["rsa"].key.read_bytes()),
        "a chain from its other end": (b"-----BEGIN".join([b"", *chain[:0:-1]]), key),
    }[case]
    pair = write(tmp_path, *contents)
    with pytest.raises(CredentialsError) as caught:
        load(openssl, pair)
    sentence = str(caught.value)
    assert str(tmp_path / names) in sentence
    assert says in sentence
    assert "\n" not in sentence
    assert openssl.reason() == "no reason given", "an error is left for the first connection"


@pytest.mark.parametrize("which", ("cert", "key"))
@pytest.mark.parametrize(("place", "says"), (("missing", "No such file or directory"), ("", "Is a directory")))
def test_files_that_cannot_be_read(openssl, tmp_path, pairs, which, place, says):
    paths = {"cert": pairs["p256"].cert, "key": pairs["p256"].key, "root": None} | {which: tmp_path / place}
    with pytest.raises(CredentialsError) as caught:
        load(openssl, Pair(**paths))
    assert str(caught.value) == f"cannot read {tmp_path / place}: {says}"


def test_a_weak_key(openssl, authority):
    """Which OpenSSL decides, not we."""
    pair = authority.issue("rsa", key=rsa.generate_private_key(65537, 1024))
    with pytest.raises(CredentialsError) as caught:
        load(openssl, pair)
    assert str(pair.cert) in str(caught.value)
    assert "too small" in str(caught.value)


def test_the_second_pair_is_looked_at_as_well(openssl, tmp_path, pairs):
    with pytest.raises(CredentialsError, match=str(tmp_path)):
        load(openssl, pairs["p256"], write(tmp_path, b"", b""))


def test_other_words_in_a_file_are_no_harm(openssl, tmp_path, pairs):
    """As `openssl x509 -text` and some authorities write them."""
    words = b"Certificate:\n    Data: ...\n\n"
    cert = pairs["p256"].cert.read_bytes().replace(b"-----BEGIN", words + b"-----BEGIN").replace(b"\n", b"\r\n")
    key = b"Bag Attributes\n" + pairs["p256"].key.read_bytes() + b"\nmore"
    assert load(openssl, write(tmp_path, cert, key)).context


def test_both_in_one_file(openssl, tmp_path, pairs):
    both = pairs["p256"].key.read_bytes() + pairs["p256"].cert.read_bytes()
    assert load(openssl, write(tmp_path, both, both)).context


@pytest.mark.parametrize("step", (1, 100, 1 << 20))
def test_pipes(openssl, pairs, step):
    """As a shell makes of <(pass show key): they give it in pieces, and once only."""
    with contextlib.ExitStack() as stack:
        paths = []
        for path in (pairs["p256"].cert, pairs["p256"].key):
            read_end, write_end = os.pipe()
            stack.callback(os.close, read_end)
            writer = threading.Thread(target=feed, args=(write_end, path.read_bytes(), step))
            writer.start()
            stack.callback(writer.join)
            paths.append(f"/proc/self/fd/{read_end}")
        assert load(openssl, Pair(*paths, None)).context


def feed(fd, data, step):
    for at in range(0, len(data), step):
        os.write(fd, data[at:at + step])
    os.close(fd)


def test_a_file_without_end(openssl, pairs):
    """It is not read to its end."""
    with pytest.raises(CredentialsError, match=r"/dev/zero holds no certificate"):
        load(openssl, Pair("/dev/zero", pairs["p256"].key, None))


def test_contents_are_wiped(openssl, pairs, monkeypatch):
    seen = []

    def wipe(memory):
        seen.append(bytes(memory[:10_000]))
        original(memory)
        seen.append(bytes(memory))

    original = credentials.wipe
    monkeypatch.setattr(credentials, "wipe", wipe)
    load(openssl, pairs["p256"])
    assert b"BEGIN CERTIFICATE" in seen[0]
    assert b"BEGIN PRIVATE KEY" in seen[2]
    assert not any(seen[1])
    assert not any(seen[3])


# --- warnings

@pytest.mark.parametrize(("valid", "says"), (
    ((-30, -1), "has expired: browsers will refuse it"), ((1, 30), "is not valid yet: browsers will refuse it"),
    ((-1, 30), None)))
def test_times(openssl, authority, valid, says):
    pair = authority.issue(valid=valid)
    loaded = load(openssl, pair)
    assert loaded.warnings == ([f"the certificate in {pair.cert} {says}"] if says else [])


def test_a_certificate_that_nobody_will_get(openssl, authority):
    """The first is for whoever asks for no other; of any but that, the names are all there is to it."""
    nameless, named = authority.issue(names=("127.0.0.1",)), authority.issue()
    assert load(openssl, nameless).warnings == []
    assert load(openssl, nameless, named).warnings == []
    [warning] = load(openssl, named, nameless).warnings
    assert warning.startswith(f"{nameless.cert} names no host")


def test_a_chain_that_is_out_of_order(openssl, authority, tmp_path):
    """The server's own certificate is the first, but not every other one has issued the one before it."""
    pair = authority.issue()
    leaf, lower = (b"-----BEGIN" + part for part in pair.cert.read_bytes().split(b"-----BEGIN")[1:])
    root, key = authority.root.read_bytes(), pair.key.read_bytes()
    for chain, expected in (((leaf, lower, root), []), ((leaf,), []), ((leaf, root, lower), [(2, 1)]),
                            ((leaf, lower, lower), [(3, 2)])):
        warnings = load(openssl, write(tmp_path, b"".join(chain), key)).warnings
        assert [warning.partition(": the server's own")[0] for warning in warnings] == [
            f"{tmp_path}/a.pem: certificate {issuer} in it has not issued certificate {issued}"
            for issuer, issued in expected]
    assert openssl.reason() == "no reason given"


@pytest.mark.parametrize(("key", "sort"), (
    (lambda: ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
    (lambda: ec.generate_private_key(ec.BrainpoolP256R1()), "brainpoolP256r1"),
    (lambda: dsa.generate_private_key(2048), "DSA"),
    (lambda: ec.generate_private_key(ec.SECP521R1()), None), (KINDS["p384"], None), (KINDS["rsa"], None),
    (KINDS["ed25519"], None),
))
def test_a_key_that_no_client_can_use(openssl, authority, key, sort):
    """RFC 8446 section 4.2.3 has no signatures by it; and that is no reason not to serve with another one."""
    pair = authority.issue(key=key())
    loaded = load(openssl, pair)
    assert [warning.partition(" made (")[0] for warning in loaded.warnings] == ([
        f"the key in {pair.key} is of {sort}, which no client can use: have one of P-256"] if sort else [])
    assert openssl.reason() == "no reason given"


# --- session tickets

NOW = 1_700_000_000


def resume(engine, context, session=None):
    """(whether a client with this session was spared the full handshake, its session from now on)."""
    peer, ours = Peer(context, session=session), engine.start(False)
    said = peer.handshake()
    while not peer.done:
        engine.handshake(ours, said)
        said, ours.output = peer.handshake(ours.output), b""
    if said:                                    # TLS 1.3: the tickets come behind the client's last flight
        engine.handshake(ours, said)
        peer.read(ours.output)
    engine.free(ours)
    return peer.tls.session_reused, peer.tls.session


def twin(tickets):
    """What another process has that was forked from one with these TicketKeys."""
    other = copy.copy(tickets)
    other.secret = ctypes.create_string_buffer(tickets.secret.raw, SECRET)
    return other


def block(tickets):
    return bytes(tickets.keys()[:TICKET_KEYS])


def processes(openssl, pair, *tickets):
    """Engines of processes that have these TicketKeys."""
    return [Engine(openssl, Credentials(openssl, [(pair.cert, pair.key)], TLS1_2, keys)) for keys in tickets]


@pytest.mark.parametrize("version", ("1.2", "1.3"))
def test_tickets_are_good_in_all_processes_for_their_time(openssl, pairs, version):
    tickets, context = TicketKeys(openssl, NOW), ClientContext(version)
    one, two, stranger = processes(openssl, pairs["p256"], tickets, twin(tickets), TicketKeys(openssl, NOW))
    reused, session = resume(one, context)
    assert not reused
    assert resume(two, context, session)[0]
    assert not resume(stranger, context, session)[0]
    later = NOW + TICKET_PERIOD
    two.credentials.renew_tickets(NOW + 1)
    assert resume(two, context, session)[0]
    two.credentials.renew_tickets(later)
    reused, session = resume(two, context, session)
    assert not reused
    assert not resume(one, context, session)[0]
    one.credentials.renew_tickets(later)
    assert resume(one, context, session)[0]


def test_ticket_keys_go_by_the_clock(openssl):
    """Whoever looks more often, or has begun later, has the same; and none of what was before can be made of it."""
    often = TicketKeys(openssl, NOW)
    seldom, seen = twin(often), [block(often)]
    for hour in range(1, 100):
        if often.advance(NOW + 3600 * hour):
            seen.append(block(often))
    assert len(set(seen)) == len(seen) == 1 + (NOW + 3600 * 99) // TICKET_PERIOD - NOW // TICKET_PERIOD
    assert seldom.advance(NOW + 3600 * 99)
    assert block(seldom) == block(often) == seen[-1]
    assert not seldom.advance(NOW)              # a clock that is set back does not bring old ones back
    assert block(seldom) == seen[-1]
    assert len(seen[0]) == TICKET_KEYS
    assert block(TicketKeys(openssl, NOW)) != block(TicketKeys(openssl, NOW))


def test_how_secrets_follow(openssl):
    """As HMAC-SHA256 has it, by Python's own."""
    tickets = TicketKeys(openssl, NOW)
    secret = tickets.secret.raw
    assert len(secret) == SECRET
    assert bytes(tickets.keys()) == b"".join(hmac.digest(secret, b"keys %d" % i, "sha256") for i in range(3))
    tickets.advance(NOW + TICKET_PERIOD)
    assert tickets.secret.raw == hmac.digest(secret, b"next", "sha256")


def test_ticket_keys_are_as_many_as_openssl_takes(openssl, pairs):
    loaded = load(openssl, pairs["p256"])
    assert openssl.SSL_CTX_ctrl(loaded.context, openssl.CTRL_TICKET_KEYS, 0, None) == TICKET_KEYS


# A process that says, with all bits turned over, what secrets it has; then takes a step each time it is told to.
STEPS = """
import ctypes, sys
from credentials import Credentials, TicketKeys
from openssl import TLS1_2, OpenSSL, wipe

def say(memory):
    print(bytes(255 - byte for [byte] in memory).hex(), flush=True)
    sys.stdin.readline()

openssl = OpenSSL()
tickets = TicketKeys(openssl, {now})
loaded = Credentials(openssl, [{pair}], TLS1_2, tickets)
say(tickets.secret)
keys = tickets.keys()
say(keys)
wipe(keys)
say(b"")
loaded.renew_tickets({now} + {period})
keys = tickets.keys()
say(keys)
wipe(keys)
loaded.close()
say(b"")
"""


def test_former_ticket_secrets_are_in_no_memory_of_the_process(pairs):
    """Neither a secret after the next one has taken its place, nor keys of OpenSSL's, also of contexts let go of.

    LD_BIND_NOW: a linker that looks functions up at their first call saves the processor's registers on the stack for
    that, and with them, by chance, what was copied last.
    """
    steps = STEPS.format(now=NOW, period=TICKET_PERIOD, pair=(str(pairs["p256"].cert), str(pairs["p256"].key)))
    with subprocess.Popen([sys.executable, "-c", steps], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT), "LD_BIND_NOW": "1"},
                          ) as process:
        def secret():
            return bytes(255 - byte for byte in bytes.fromhex(process.stdout.readline()))

        def go_on():
            process.stdin.write("\n")
            process.stdin.flush()

        def places(needle):
            return sum(memory.count(needle) for memory in memory_of(process.pid))

        first = secret()
        assert places(first) == 1
        go_on()
        former = secret()
        keys = [former[16:48], former[48:80]]
        assert [places(key) for key in keys] == [2, 2]
        go_on()
        secret()
        assert [places(key) for key in keys] == [1, 1], "what the context was given is still there"
        go_on()
        block = secret()
        present = [block[16:48], block[48:80]]
        assert [places(key) for key in present] == [2, 2]
        assert [places(key) for key in (first, *keys)] == [0, 0, 0]
        go_on()
        secret()
        assert [places(key) for key in present] == [0, 0]
        go_on()
        assert process.wait() == 0


def memory_of(pid):
    """The contents of a process' writable memory, by its parts."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            bounds, mode, *_ = line.split()
            if mode.startswith("rw"):
                start, end = (int(bound, 16) for bound in bounds.split("-"))
                memory.seek(start)
                yield memory.read(end - start)
