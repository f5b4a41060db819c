"""The same server on the next Debian's Python and OpenSSL (3.5), which has a key exchange that this one's has not.

The packages are unpacked, not installed, and run by their own dynamic loader.
"""

import platform
import re
import subprocess

import guest
import pytest
from support import FILES
from tlsclient import VERSIONS

RELEASE = "trixie"
PACKAGES = ("python3.13-minimal", "libpython3.13-minimal", "libpython3.13-stdlib", "libc6", "libgcc-s1", "libexpat1",
            "zlib1g", "libbz2-1.0", "liblzma5", "libffi8", "libssl3t64", "libzstd1", "liburing2", "openssl")
pytestmark = [pytest.mark.skipif(platform.machine() != "x86_64", reason="unpacks packages for amd64"),
              pytest.mark.timeout(300)]     # the first time, packages are downloaded


@pytest.fixture(scope="module")
def userland():
    """run(program) -> the words of a command that runs a program of that release."""
    root = guest.CACHE / "amd64" / RELEASE
    try:
        if not guest.list_of(root).exists():
            guest.Packages("amd64", RELEASE).unpack(list(PACKAGES), root)
    except guest.Unavailable as reason:
        pytest.skip(f"no packages of {RELEASE}: {reason}")
    libraries = root / "usr/lib/x86_64-linux-gnu"

    def run(program):
        return ("/usr/bin/env", f"PYTHONHOME={root}/usr", "OPENSSL_CONF=/dev/null", f"{libraries}/ld-linux-x86-64.so.2",
                "--library-path", str(libraries), str(root / "usr/bin" / program))
    return run


def test_newer_python_and_openssl(start_tls, site, userland):
    server = start_tls(site, python=userland("python3.13"))
    assert "OpenSSL 3.5" in server.stderr()
    for version in VERSIONS:
        with server.connect(server.context_of(version=version)) as client:
            for name in ("large.bin", "next", "n/100.txt"):
                assert client.ask(f"/{name}").body == FILES[name]


@pytest.mark.parametrize("group", ["X25519MLKEM768", "X25519", "P-256"])
def test_key_exchange(start_tls, site, userland, group):
    server = start_tls(site, python=userland("python3.13"))
    said = subprocess.run([*userland("openssl"), "s_client", "-connect", f"127.0.0.1:{server.port}", "-groups", group],
                          input=b"", capture_output=True, timeout=30, check=False).stdout.decode()
    assert re.search(r"(Negotiated TLS1\.3 group|(Peer|Server) Temp Key): (\w+, )?"
                     + {"P-256": "(prime256v1|secp256r1)"}.get(group, group), said), said


def test_hybrid_key_exchange_is_preferred(start_tls, site, userland):
    server = start_tls(site, python=userland("python3.13"))
    said = subprocess.run([*userland("openssl"), "s_client", "-connect", f"127.0.0.1:{server.port}"],
                          input=b"", capture_output=True, timeout=30, check=False).stdout.decode()
    assert "Negotiated TLS1.3 group: X25519MLKEM768" in said
