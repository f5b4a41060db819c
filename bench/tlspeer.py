"""What TLS adds to the bench: one certificate for all servers, a client, and what the servers agree to speak."""

import socket
import ssl
import subprocess

import load
from servers import HOST, Failed, advice, find

# ECDSA over P-256, self-signed: the certificate that certbot asks for, without its chain.
CERTIFICATE = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
               "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=IP:{HOST}")


def write_certificate(site):
    """Write a new key and a certificate for it where `site` says; raises Failed."""
    if not find("openssl"):
        raise Failed(advice("openssl"))
    said = subprocess.run([find("openssl"), *CERTIFICATE, "-keyout", site.key, "-out", site.certificate],
                          capture_output=True, text=True)
    if said.returncode:
        raise Failed(f"openssl: {said.stderr[-500:]}")


def context():
    """A client's settings: OpenSSL's own choice of what to offer, as wrk does, and no verification."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    return made


def connect(server, settings=None, session=None):
    """A socket connected to `server`, over TLS where it speaks that, perhaps resuming `session`; raises OSError."""
    connection = socket.create_connection((HOST, server.port), load.TIMEOUT)
    if not server.tls:
        return connection
    return (settings or context()).wrap_socket(connection, server_hostname=HOST, session=session)


def agreement(servers, site):
    """Version and cipher that all `servers` choose of what a client offers: "TLSv1.3, TLS_AES_256_GCM_SHA384".

    Raises Failed where they differ, or where one shows another certificate than that of `site`: their CPU times
    would not be those of the same work.
    """
    expected = ssl.PEM_cert_to_DER_cert(site.certificate.read_text())
    chosen = {}
    for server in servers:
        with connect(server) as connection:
            chosen[server.name] = f"{connection.version()}, {connection.cipher()[0]}"
            if connection.getpeercert(binary_form=True) != expected:
                raise Failed(f"{server.name} shows another certificate")
    if len(set(chosen.values())) > 1:
        raise Failed("; ".join(f"{name} speaks {words}" for name, words in chosen.items()))
    return next(iter(chosen.values()), "")


def check_resumption(server, path):
    """Raise Failed unless a client that comes to `server` again may resume the session of its last connection."""
    settings = context()
    with connect(server, settings) as connection:
        load.ask(connection, load.get(path, server.port))      # in TLS 1.3 a session's ticket comes with the answer
        session = connection.session
    with connect(server, settings, session) as connection:
        if not connection.session_reused:
            raise Failed(f"{server.name} does not resume sessions")
