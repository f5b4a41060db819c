"""TLS without sockets: Python's ssl over memory BIOs as the client, and an Engine that is watched."""

import contextlib
import ctypes
import os
import ssl

import tlskeys

import ktls
from credentials import Credentials, TicketKeys
from openssl import OpenSSL
from openssl import TLS1_2 as LEAST
from tls import Engine

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
ALL_CIPHERS = frozenset(ktls.CIPHERS)


class ClientContext(ssl.SSLContext):
    """A client that believes every server, and whose secrets are known."""

    def __new__(cls, *_, **__):
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, version=None, suite="", alpn=()):
        """`suite`: of TLS 1.2. Those of TLS 1.3 are the server's to choose, see `TestEngine.insist`."""
        self.check_hostname, self.verify_mode = False, ssl.CERT_NONE
        self.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        if version:
            self.minimum_version = self.maximum_version = VERSIONS[version]
        if suite and not suite.startswith("TLS_"):
            self.set_ciphers(suite)
        if alpn:
            self.set_alpn_protocols(alpn)
        self.log, self.secrets = os.memfd_create("keys"), {}
        self.keylog_filename = f"/proc/self/fd/{self.log}"

    def __del__(self):
        os.close(self.log)

    def secret(self, label, random):
        """From the key log that OpenSSL writes, which goes by the client's random."""
        if (label, random) not in self.secrets:
            lines = os.pread(self.log, 1 << 24, 0).decode().splitlines()
            self.secrets = {(name, bytes.fromhex(who)): bytes.fromhex(secret) for name, who, secret in
                            (line.split() for line in lines if not line.startswith("#"))}
        return self.secrets[label, random]


class Peer:
    """A client; what it is given and what it says are bytes of the wire."""

    def __init__(self, context, name="localhost", session=None):
        self.context = context
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name, session=session)
        self.done = False           # with the handshake
        self.at_end = False         # the server has said close_notify
        self.said = self.heard = b""

    def handshake(self, data=b""):
        """Go on with it; gives what is to be sent."""
        self.heard += data
        self.incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
            self.done = True
        said = self.outgoing.read()
        self.said += said
        return said

    def directions(self):
        """(the client's Direction, the server's) under the keys that a handshake ends with."""
        suite, random, server_random = tlskeys.SUITES[self.tls.cipher()[0]], self.said[11:43], self.heard[11:43]
        if suite.version == tlskeys.TLS_1_3:
            return tuple(tlskeys.Direction.of_secret(suite, self.context.secret(f"{who}_TRAFFIC_SECRET_0", random))
                         for who in ("CLIENT", "SERVER"))
        master = self.context.secret("CLIENT_RANDOM", random)
        return tlskeys.Direction.both_of_master(suite, master, random, server_random)

    def encrypt(self, data):
        self.tls.write(data)
        return self.outgoing.read()

    def read(self, data=b""):
        """Plaintext of what the server has sent."""
        self.incoming.write(data)
        pieces = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self.read_piece():
                pieces.append(piece)
            self.at_end = True
        return b"".join(pieces)

    def read_piece(self):
        try:
            return self.tls.read(1 << 16)
        except ssl.SSLZeroReturnError:          # what the same end is called after our own close_notify
            return b""

    def close_notify(self):
        """The last that a client says."""
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        return self.outgoing.read()

    def hears_close_notify(self, data):
        """Whether that is what `data` is, and nothing else."""
        return self.read(data) == b"" and self.at_end and not self.incoming.pending


class CountingOpenSSL(OpenSSL):
    """OpenSSL that knows how many SSL objects there are."""

    def __init__(self):
        super().__init__()
        self.alive = set()
        new, free = self.SSL_new, self.SSL_free

        def count_new(context):
            ssl_pointer = new(context)
            self.alive.add(ssl_pointer)
            return ssl_pointer

        def count_free(pointer):
            self.alive.remove(pointer.value)        # a KeyError here is a second time
            free(pointer)

        self.SSL_new, self.SSL_free = count_new, count_free


class TestEngine(Engine):
    """An Engine that looks, before and after each call, whether anything is left in its BIOs or OpenSSL's error queue,
    where it would be taken for another session's."""

    __test__ = False

    def __init__(self, pairs, kernel_ciphers=ALL_CIPHERS, least=LEAST):
        openssl = CountingOpenSSL()
        credentials = Credentials(openssl, pairs, least, TicketKeys(openssl, 0), bool(kernel_ciphers))
        super().__init__(openssl, credentials, kernel_ciphers)

    def another(self, kernel_ciphers):
        """A new one with the same credentials."""
        other = object.__new__(TestEngine)
        Engine.__init__(other, self.openssl, self.credentials, kernel_ciphers)
        return other

    def insist(self, suite):
        """Let TLS 1.3 use one suite only: Python's client has no way to ask for it."""
        library = ctypes.PyDLL("libssl.so.3")
        library.SSL_CTX_set_ciphersuites.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        assert library.SSL_CTX_set_ciphersuites(self.credentials.context, suite.encode()) == 1

    def left(self):
        """What is left where nothing may be: bytes in each BIO, and the oldest error."""
        return (self.openssl.BIO_ctrl_pending(self.incoming), self.openssl.BIO_ctrl_pending(self.outgoing),
                PEEK_ERROR())


PEEK_ERROR = ctypes.PyDLL("libcrypto.so.3").ERR_peek_error
PEEK_ERROR.restype = ctypes.c_ulong


def watched(name):
    """A method of Engine, and nothing left before and after it."""
    def call(self, *arguments):
        assert self.left() == (0, 0, 0), f"before {name}"
        try:
            return getattr(Engine, name)(self, *arguments)
        finally:
            assert self.left() == (0, 0, 0), f"after {name}"
    return call


for _name in ("start", "free", "handshake", "derive_keys", "hand_over", "feed", "end", "seal"):
    setattr(TestEngine, _name, watched(_name))
