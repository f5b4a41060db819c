"""The handshake: versions, suites, groups, certificates, names, ALPN, resumption, and who is refused."""

import re
import ssl
import warnings

import pytest
from certificates import KINDS
from support import FILES, request
from tlsclient import ALERT, ALERTS, VERSIONS, TlsServer, alert_name, client_context, client_hello, records, s_client

ONLY = {"1.2": "-tls1_2", "1.3": "-tls1_3"}
each_version = pytest.mark.parametrize("version", VERSIONS)


def certificate(server, name="localhost", **options):
    """The certificate (DER) that a client asking for `name` is shown; it need not match the name."""
    context = server.context_of(**options)
    context.check_hostname = False
    with server.connect(context, name=name) as client:
        assert client.ask("/next").body == FILES["next"]
        return client.tls.getpeercert(True)


def refused(server, context, **options):
    """Shake hands in vain; give the alert."""
    with pytest.raises(ssl.SSLError) as caught:
        server.connect(context, **options)
    return alert_name(caught.value)


# --- versions, suites, keys ----------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key_in_both_versions(tls_servers, pairs, kind, version):
    server = tls_servers[kind]
    with server.connect(server.context_of(version=version)) as client:
        assert client.tls.version() == f"TLSv{version}"
        assert client.tls.getpeercert(True) == pairs[kind].der
        assert client.ask("/large.bin").body == FILES["large.bin"]


@pytest.mark.parametrize(("kind", "suite"), [
    (kind, f"ECDHE-{name}-{cipher}")
    for kind, name in (("p256", "ECDSA"), ("rsa", "RSA"))
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")])
def test_every_suite_of_tls_1_2(tls_servers, kind, suite):
    server = tls_servers[kind]
    with server.connect(server.context_of(version="1.2", ciphers=suite)) as client:
        assert client.tls.cipher()[0] == suite
        assert client.ask("/random.bin").body == FILES["random.bin"]


@pytest.mark.parametrize(("kind", "suite"), [
    ("p256", "ECDHE-ECDSA-AES128-SHA256"), ("p256", "ECDHE-ECDSA-AES128-CCM"), ("rsa", "AES128-GCM-SHA256"),
    ("rsa", "DHE-RSA-AES128-GCM-SHA256"), ("rsa", "ECDHE-RSA-AES256-SHA")])
def test_suites_of_old_are_refused(tls_servers, kind, suite):
    """CBC, CCM, and key exchanges without elliptic curves."""
    server = tls_servers[kind]
    assert refused(server, server.context_of(version="1.2", ciphers=suite)) == "handshake_failure"


@each_version
@pytest.mark.parametrize(("group", "shown"), [("X25519", "X25519"), ("P-256", "prime256v1"), ("P-384", "secp384r1")])
def test_every_group(tls_servers, group, shown, version):
    """The key is RSA: in TLS 1.2 the curve of an ECDSA key has to be among the client's groups too."""
    server = tls_servers["rsa"]
    said = s_client(server, "-ign_eof", "-groups", group, ONLY[version], say=request("/next", connection="close"))
    assert re.search(rf"Server Temp Key: .*{shown}", said)
    assert FILES["next"].decode() in said


def test_a_group_that_is_not_served_is_refused(tls_server):
    assert "handshake failure" in s_client(tls_server, "-groups", "P-521")


def test_a_hello_retry_request(tls_server):
    """Its first key share is for a group that the server has not, so there are two ClientHellos."""
    said = s_client(tls_server, "-msg", "-ign_eof", "-groups", "P-521:P-384", "-tls1_3",
                    say=request("/next", connection="close"))
    assert said.count("ClientHello") == 2
    assert "Verify return code: 0 (ok)" in said
    assert FILES["next"].decode() in said


# --- who is refused ------------------------------------------------------------------------------------------------


def test_tls_1_1_is_refused(tls_server):
    context = client_context(tls_server.root, ciphers="ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    hello = client_hello(context)
    assert hello[9:11] == b"\x03\x02"
    with tls_server.connect_raw() as client:
        client.send(hello)
        assert records(client.rest()) == [(ALERT, bytes([2, ALERTS["protocol_version"]]))]


@pytest.mark.parametrize("flags", [(), ("--tls-min", "1.2")])
def test_tls_1_2_is_served_unless_told_otherwise(start_tls, site, flags):
    server = start_tls(site, *flags)
    for version in VERSIONS:
        with server.connect(server.context_of(version=version)) as client:
            assert client.ask("/next").status == 200


def test_tls_min_1_3_refuses_1_2(start_tls, site):
    server = start_tls(site, "--tls-min", "1.3", "-v", "debug")
    assert refused(server, server.context_of(version="1.2")) == "protocol_version"
    with server.connect(server.context_of(version="1.3")) as client:
        assert client.ask("/next").status == 200
    assert re.search(r"^tarweb: handshake failed: \S", server.stderr(), re.M)
    counts = server.ended()
    assert (counts.connections, counts.failed) == (1, 1)


def test_no_renegotiation(start_tls, site):
    """At `R` s_client asks for a second handshake; it is told no at once, not when some time is over."""
    server = start_tls(site, "--header-timeout", "60", "--keepalive-timeout", "60")
    said = s_client(server, "-tls1_2", "-msg", say=b"R\n")
    assert "RENEGOTIATING" in said
    assert len(re.findall(r"ServerHello\b", said)) == 1
    assert "no renegotiation" in said


# --- certificates and names ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(authority):
    return {
        "default": authority.issue("p256", ["localhost", "first.example"]),
        "other": authority.issue("rsa", ["other.example", "www.other.example"]),
        "wildcard": authority.issue("p384", ["*.wild.example"]),
    }


NAMES = {
    "localhost": "default", "first.example": "default",
    "other.example": "other", "www.other.example": "other", "OTHER.Example": "other",
    "a.wild.example": "wildcard", "A-b.WILD.example": "wildcard",
    # A wildcard is one label, neither none nor two; and what nobody has a certificate for gets the first.
    "wild.example": "default", "a.b.wild.example": "default", ".wild.example": "default",
    "unknown.example": "default", "example": "default", "xother.example": "default", None: "default",
}


@pytest.fixture(scope="module")
def named_server(site, named, tmp_path_factory):
    server = TlsServer(site, pairs=list(named.values()), log=tmp_path_factory.mktemp("named") / "stderr")
    yield server
    server.stop()


@each_version
def test_the_name_asked_for_chooses_the_certificate(named_server, named, version):
    for name, expected in NAMES.items():
        if name is None or not name.startswith("."):
            assert certificate(named_server, name, version=version) == named[expected].der, name


@each_version
@pytest.mark.parametrize("name", ["localhost", "second.example", "a.both.example"])
def test_two_kinds_of_key_for_one_name(start_tls, site, authority, version, name):
    """The client's abilities choose; nothing else than the key differs, and that for the default and for others."""
    names = [["localhost"], ["second.example", "*.both.example"]]
    pairs = [authority.issue(kind, of) for of in names for kind in ("p256", "rsa")]
    server = start_tls(site, pairs=pairs)
    if version == "1.2":
        shown = {kind: certificate(server, name, version="1.2", ciphers=f"ECDHE+{word}")
                 for kind, word in (("p256", "ECDSA"), ("rsa", "aRSA"))}
    else:
        shown = {kind: by_signature(server, name, word)
                 for kind, word in (("p256", "ECDSA+SHA256"), ("rsa", "RSA-PSS+SHA256"))}
    possible = pairs[:2] if name == "localhost" else pairs[2:]
    assert shown == {"p256": possible[0].der, "rsa": possible[1].der}


def by_signature(server, name, algorithm):
    """The certificate shown to a TLS 1.3 client that can verify only this."""
    said = s_client(server, "-tls1_3", "-sigalgs", algorithm, name=name)
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", said, re.S)
    return ssl.PEM_cert_to_DER_cert(found[0])


# --- ALPN ----------------------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize(("offered", "chosen"), [
    (["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), (["h3", "http/1.1", "h2"], "http/1.1"), ([], None),
    (["http/1.0", "http/1.1"], "http/1.1"), (["http/1.0"], "http/1.0"),
])
def test_alpn_chooses_http_1(tls_server, version, offered, chosen):
    with tls_server.connect(tls_server.context_of(version=version, alpn=offered)) as client:
        assert client.tls.selected_alpn_protocol() == chosen
        assert client.ask("/next").body == FILES["next"]


@each_version
@pytest.mark.parametrize("offered", [["h2"], ["http/0.9"], ["h2", "spdy/3", "HTTP/1.1", "http/1.11"]])
def test_alpn_without_http_1_is_refused(tls_server, version, offered):
    context = tls_server.context_of(version=version, alpn=offered)
    assert refused(tls_server, context) == "no_application_protocol"


# --- resumption ----------------------------------------------------------------------------------------------------


def session_of(server, context, **options):
    """A session that the server has given to a client."""
    with server.connect(context, **options) as client:
        assert client.ask("/next").status == 200
        assert not client.tls.session_reused
        return client.tls.session


def resumed(server, context, session):
    with server.connect(context, session=session) as client:
        assert client.ask("/n/042.txt").body == FILES["n/042.txt"]
        return client.tls.session_reused


@each_version
def test_sessions_resume_in_every_worker(start_tls, site, version):
    server = start_tls(site, "--threads", "2")
    context = server.context_of(version=version)
    session = session_of(server, context)
    assert session.has_ticket
    assert all(resumed(server, context, session) for _ in range(20))
    counts = server.ended()
    assert (counts.connections, counts.resumed) == (21, 20)
    assert min(int(n) for n in re.findall(r"(\d+) resumed", server.stderr())) > 0, "only one worker had a visitor"


def test_a_connection_gives_a_client_one_ticket(tls_server):
    """Of TLS 1.3: as many as it can have used up (RFC 8446 appendix C.4: each is to be used once)."""
    said = s_client(tls_server, "-tls1_3", "-msg", "-ign_eof", say=request("/next", connection="close"))
    assert said.count("NewSessionTicket") == 1


@each_version
def test_another_server_does_not_resume(start_tls, site, version):
    first, second = start_tls(site), start_tls(site)
    context = first.context_of(version=version)
    session = session_of(first, context)
    assert not resumed(second, context, session)
    assert resumed(first, context, session)
    assert (second.ended().resumed, first.ended().resumed) == (0, 1)
