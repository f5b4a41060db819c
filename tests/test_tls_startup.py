"""Flags, files and libraries of TLS: what is wrong with one is told in one sentence, and what is secret never."""

import base64
import os
import platform
import re
import socket
import ssl
import subprocess


import pytest
from certificates import KINDS, private_pem
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from support import FILES, PYTHON, ROOT, TARWEB, Client, request, run_tarweb
from test_startup import refusal
from tlsclient import VERSIONS, TlsServer

LISTEN = ("--listen", "127.0.0.1:0")


# --- files ---------------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_bytes(content)
    return path


def key_of(pair):
    return load_pem_private_key(pair.key.read_bytes(), None)


def weak_pair(folder):
    """A certificate with an RSA key of 512 bits, by openssl: other tools refuse to make one."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:512", "-nodes", "-keyout", folder / "weak.key",
                    "-out", folder / "weak.pem", "-subj", "/CN=localhost"], check=True, capture_output=True)
    return folder / "weak.pem", folder / "weak.key"


# what is wrong -> (what makes (certificate, key) out of a folder and a good Pair, which of them is to be named)
WRONG_FILES = {
    "no certificate there": (lambda at, good: (at / "nowhere.pem", good.key), 0),
    "no key there": (lambda at, good: (good.cert, at / "nowhere.key"), 1),
    "a directory for a certificate": (lambda at, good: (at, good.key), 0),
    "a directory for a key": (lambda at, good: (good.cert, at), 1),
    "an empty certificate": (lambda at, good: (write(at / "empty.pem", b""), good.key), 0),
    "an empty key": (lambda at, good: (good.cert, write(at / "empty.key", b"")), 1),
    "a certificate that is no PEM": (lambda at, good: (write(at / "text.pem", b"hello\n" * 9), good.key), 0),
    "a key that is no PEM": (lambda at, good: (good.cert, write(at / "text.key", b"hello\n" * 9)), 1),
    "a certificate in DER": (lambda at, good: (write(at / "der.pem", good.der), good.key), 0),
    "a key in DER": (lambda at, good: (good.cert, write(at / "der.key", key_of(good).private_bytes(
        Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))), 1),
    "a damaged certificate": (
        lambda at, good: (write(at / "bad.pem", good.cert.read_bytes().replace(b"M", b"N", 5)), good.key), 0),
    "half a certificate": (lambda at, good: (write(at / "half.pem", good.cert.read_bytes()[:300]), good.key), 0),
    "a damaged chain": (
        lambda at, good: (write(at / "chain.pem", good.cert.read_bytes()[:-200]), good.key), 0),
    "half a key": (lambda at, good: (good.cert, write(at / "half.key", good.key.read_bytes()[:90])), 1),
    "a key for a certificate": (lambda at, good: (good.key, good.key), 0),
    "a certificate for a key": (lambda at, good: (good.cert, good.cert), 1),
    "an encrypted key": (lambda at, good: (good.cert, write(at / "locked.key", private_pem(key_of(good), b"pw"))), 1),
    "another key": (lambda at, good: (good.cert, write(at / "other.key", private_pem(KINDS["p256"]()))), 1),
    "a key of another kind": (lambda at, good: (good.cert, write(at / "rsa.key", private_pem(KINDS["rsa"]()))), 1),
    "a key too weak": (lambda at, good: weak_pair(at), 0),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_unusable_files_are_named(site, tmp_path, pairs, case):
    make, named = WRONG_FILES[case]
    files = make(tmp_path, pairs["p256"])
    message = refusal(2, *LISTEN, "--tls-cert", files[0], "--tls-key", files[1], site)
    assert str(files[named]) in message
    assert message.startswith("tarweb: ")
    assert len(message.strip().splitlines()) == 1


def test_an_encrypted_key_is_not_asked_a_password_for(site, tmp_path, pairs):
    """With a terminal too: a server that starts at boot would wait for ever."""
    key = write(tmp_path / "locked.key", private_pem(key_of(pairs["p256"]), b"pw"))
    leader, terminal = os.openpty()
    ended = subprocess.run(
        [PYTHON, TARWEB, *LISTEN, "-C", pairs["p256"].cert, "-P", key, site],
        stdin=terminal, capture_output=True, text=True, timeout=20, check=False, start_new_session=True)
    os.close(leader)
    os.close(terminal)
    assert ended.returncode == 2
    assert re.search("encrypted|password|passphrase", ended.stderr)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_may_not_be_read(site, tmp_path, pairs, which):
    files = [pairs["p256"].cert, pairs["p256"].key]
    files[which] = write(tmp_path / "secret", files[which].read_bytes())
    files[which].chmod(0)
    assert "secret" in refusal(2, "-C", files[0], "-P", files[1], site)


# --- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    ["--redirect-http", "127.0.0.1:0"], ["--hsts", "1"], ["--acme-dir", "/tmp"], ["--ktls", "require"],
    ["--tls-cert", "CERT", "--tls-key", "KEY", "--https-port", "443"],
    ["--tls-key", "KEY"], ["--tls-cert", "CERT"], ["--tls-cert", "CERT", "--tls-key", "KEY", "--tls-key", "KEY"],
    ["--tls-cert", "CERT", "--tls-key", "KEY", "--tls-cert", "CERT"],
], ids=" ".join)
def test_flags_that_need_each_other(site, pairs, wrong):
    files = {"CERT": pairs["p256"].cert, "KEY": pairs["p256"].key}
    message = refusal(2, *LISTEN, *(files.get(word, word) for word in wrong), site)
    assert "--tls-cert" in message or "--redirect-http" in message
    assert re.search(r"--(redirect-http|https-port|hsts|acme-dir|ktls|tls-key)\b", message)


@pytest.mark.parametrize("wrong", [
    ["--tls-min", "1.1"], ["--tls-min", "1.0"], ["--tls-min", "x"], ["--ktls", "maybe"], ["--hsts", "-1"],
    ["--hsts", "soon"], ["--redirect-http", "nonsense"], ["--redirect-http", "127.0.0.1:99999"],
    ["--redirect-http", "not.a.host.invalid:80"], ["--https-port", "0"], ["--https-port", "https"],
], ids=" ".join)
def test_wrong_values_are_named(site, pairs, wrong):
    assert wrong[0] in refusal(2, *LISTEN, *pairs["p256"].flags, *wrong, site)


def test_help_tells_every_flag():
    said = run_tarweb("--help").stdout
    flags = ["--tls-cert", "--tls-key", "-C", "-P", "--tls-min", "--ktls", "--redirect-http", "--acme-dir", "--hsts",
             "--https-port"]
    assert [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}\b", said)] == []


def test_short_flags(start, site, pairs):
    pair = pairs["p256"]
    server = start(site, "-C", str(pair.cert), "-P", str(pair.key))
    assert server.ready_line.startswith("tarweb ") and f"https://127.0.0.1:{server.port}/ serves" in server.ready_line


def test_a_redirecting_port_in_use(site, pairs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in refusal(1, *LISTEN, *pairs["p256"].flags, "--redirect-http", f"127.0.0.1:{port}", site)


def test_without_listen_it_is_port_8443(start_tls, site):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", 8443))
        except OSError:
            pytest.skip("port 8443 is taken by something else")
    server = start_tls(site, listen=None)
    assert server.port == 8443
    assert server.fetch("/next").body == FILES["next"]


# --- what the start says -------------------------------------------------------------------------------------------


def first_line(server):
    return server.stderr().splitlines()[0]


def test_userspace_is_told_with_the_reason(start_tls, site):
    line = first_line(start_tls(site, ktls="off"))
    assert re.fullmatch(r"tarweb: TLS in userspace \(OpenSSL 3\.\d+\.\d+.*\): --ktls=off", line)


def kernel_has_tls():
    """Whether a connection can be given the upper-layer protocol `tls`: <linux/tcp.h> TCP_ULP."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Client(listener.getsockname()) as client:
        try:
            client.sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
        except FileNotFoundError:
            return False
        return True


@pytest.mark.parametrize("mode", [None, "auto"])
def test_where_the_kernel_cannot_the_start_says_why(start_tls, site, mode):
    line = first_line(start_tls(site, ktls=mode))
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 7):
        assert re.fullmatch(r"tarweb: TLS in userspace \(OpenSSL .*\): .*6\.7.*", line)
    elif not kernel_has_tls():
        assert re.fullmatch(r"tarweb: TLS in userspace \(OpenSSL .*\): .*modprobe tls.*", line)
    else:
        assert re.fullmatch(r"tarweb: TLS in the kernel \(handshakes by OpenSSL .*\).*", line)


@pytest.mark.skipif(kernel_has_tls(), reason="this kernel has the tls module")
def test_ktls_require_ends_where_the_kernel_cannot(site, pairs):
    message = refusal(1, *LISTEN, *pairs["p256"].flags, "--ktls", "require", site)
    assert "--ktls" in message
    assert re.search("modprobe tls|6\\.7", message)


@pytest.mark.parametrize(("valid", "says"), [((-30, -1), "expired"), ((1, 30), "not valid yet|not yet valid")])
def test_a_certificate_out_of_its_time_is_served_with_a_warning(start_tls, site, authority, valid, says):
    pair = authority.issue("p256", valid=valid)
    server = start_tls(site, pairs=[pair])
    warning = next(line for line in server.stderr().splitlines() if str(pair.cert) in line)
    assert re.search(says, warning)
    context = server.context_of()
    with pytest.raises(ssl.SSLCertVerificationError):
        server.connect(context)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with server.connect(context) as client:
        assert client.ask("/next").body == FILES["next"]


def test_a_certificate_in_its_time_has_no_warning(start_tls, site):
    server = start_tls(site)
    assert len(server.stderr().splitlines()) == 1


# The real program on a machine where neither libssl nor libcrypto can be loaded.
WITHOUT_OPENSSL = """
import ctypes, sys
sys.path.insert(0, sys.argv.pop(1))
load = ctypes.CDLL.__init__
def refuse(self, name, *arguments, **options):
    if "ssl" in str(name) or "crypto" in str(name):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")
    load(self, name, *arguments, **options)
ctypes.CDLL.__init__ = refuse
import tarweb
sys.exit(tarweb.main())
"""


def test_a_missing_libssl_is_named(site, pairs):
    ended = subprocess.run(
        [PYTHON, "-c", WITHOUT_OPENSSL, ROOT, *LISTEN, *pairs["p256"].flags, site],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.search(r"lib(ssl|crypto)\.so\.3", ended.stderr)
    assert re.search(r"libssl3|openssl", ended.stderr), "no package is named"
    assert len(ended.stderr.strip().splitlines()) == 1


def test_plain_http_needs_no_libssl(start, site):
    server = start(site, program=("-c", WITHOUT_OPENSSL, str(ROOT)))
    assert server.fetch("/next").body == FILES["next"]


# --- what must not be said -----------------------------------------------------------------------------------------


def spellings(secret):
    """The ways in which bytes could have found their way into a log."""
    yield secret.hex()
    yield secret.hex(" ")
    yield secret.hex(":")
    yield repr(secret)[2:-1]
    yield base64.b64encode(secret).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_logged(start_tls, site, tmp_path, pairs, kind):
    pair, keylog = pairs[kind], tmp_path / "keylog"
    server = start_tls(site, "-v", "trace", pairs=[pair], ktls="auto")
    for version in VERSIONS:
        context = server.context_of(version=version)
        context.keylog_filename = str(keylog)
        for _ in range(2):
            with server.connect(context) as client:
                assert client.ask("/next").status == 200
        with server.connect_raw() as client:
            client.send(b"\x16\3\1\0\4\1\0\0\0")
            client.rest()
    server.stop()
    said = server.stderr()
    assert "TLS connections: " in said
    secrets = {bytes.fromhex(line.split()[2]) for line in keylog.read_text().splitlines() if line[0] != "#"}
    assert len(secrets) >= 2 * (1 + 4)
    key = key_of(pair).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    secrets |= {key[at:at + 24] for at in range(len(key) - 24)}     # any part of it
    for secret in secrets:
        assert not any(spelling.lower() in said.lower() for spelling in spellings(secret))
    assert not re.search(r"PRIVATE KEY|TRAFFIC_SECRET|CLIENT_RANDOM", said)


def test_no_key_log_is_written_for_the_asking(site, pairs, tmp_path, monkeypatch):
    """SSLKEYLOGFILE is for clients; a server that obeyed it would give away all that its visitors do."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keylog"))
    server = TlsServer(site, pairs=[pairs["p256"]], log=tmp_path / "stderr")
    with Client(("127.0.0.1", server.port)) as client:
        client.send(request("/next"))
        assert client.response().status == 400
    assert server.fetch("/next").status == 200
    server.stop()
    assert not (tmp_path / "keylog").exists()
