"""A TLS client for guests that decides what goes into which segment: Python's ssl over memory (SSLContext.wrap_bio),
with settings of OpenSSL's that Python does not pass on.
"""

import contextlib
import ctypes
import hmac
import io
import socket
import ssl
import struct

ROOT = "/guest/root.pem"        # the certificate that is believed
TLS13 = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
TLS12 = ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")     # behind ECDHE-RSA- or ECDHE-ECDSA-
SIGALGS = {"rsa": "RSA-PSS+SHA256:RSA+SHA256", "ecdsa": "ECDSA+SHA256"}     # what a client with such a key accepts
SET_GROUPS_LIST, SET_SIGALGS_LIST = 92, 98          # <openssl/ssl.h>: SSL_CTRL_...
KEY_UPDATE, KEY_UPDATE_BOTH = 0, 1                  # SSL_KEY_UPDATE_NOT_REQUESTED, SSL_KEY_UPDATE_REQUESTED

KEY_LOG = "/tmp/keys"
EVP_CTRL_GCM_GET_TAG = 0x10                         # <openssl/evp.h>

libssl, libcrypto = ctypes.CDLL("libssl.so.3"), ctypes.CDLL("libcrypto.so.3")
libssl.SSL_CTX_ctrl.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p
libssl.SSL_CTX_set_ciphersuites.argtypes = ctypes.c_void_p, ctypes.c_char_p
libssl.SSL_CTX_set_block_padding.argtypes = ctypes.c_void_p, ctypes.c_size_t
libssl.SSL_key_update.argtypes = ctypes.c_void_p, ctypes.c_int
for function in (libcrypto.EVP_CIPHER_CTX_new, libcrypto.EVP_aes_128_gcm):
    function.restype = ctypes.c_void_p


def pointer(thing, words):
    """The pointer that many machine words into a Python object: in CPython 3.11's _ssl.c, SSL_CTX * is the first field
    behind the two of every object, and SSL * the second."""
    return ctypes.c_void_p.from_address(id(thing) + words * ctypes.sizeof(ctypes.c_void_p)).value


def context(suite=None, key=None, groups=None, padding=0, alpn=()):
    """A client's ssl.SSLContext that offers just this: a suite of TLS13 or TLS12, signatures by this kind of key,
    groups in this order; that pads its records to multiples of `padding`."""
    made = ssl.create_default_context(cafile=ROOT)
    made.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF       # which Python sets, and which takes any FIN for close_notify
    openssl = pointer(made, 2)
    if suite in TLS12:
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.set_ciphers(f"ECDHE-{(key or 'ecdsa').upper()}-{suite}")
    elif suite:
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        assert libssl.SSL_CTX_set_ciphersuites(openssl, suite.encode()) == 1, suite
    if key:
        assert libssl.SSL_CTX_ctrl(openssl, SET_SIGALGS_LIST, 0, SIGALGS[key].encode()) == 1, key
    if groups:
        assert libssl.SSL_CTX_ctrl(openssl, SET_GROUPS_LIST, 0, groups.encode()) == 1, groups
    if padding:
        assert libssl.SSL_CTX_set_block_padding(openssl, padding) == 1
    if alpn:
        made.set_alpn_protocols(alpn)
    return made


class Tls:
    """A connection, with those methods of a socket's that the checks use. A FIN without close_notify is an error.

    `polite`: whether close() says close_notify, which Python's own ssl does not.
    """

    def __init__(self, sock, context, session=None, polite=False):
        self.sock, self.polite = sock, polite
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost", session=session)

    def hello(self):
        """The ClientHello, unsent."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def last_flight(self):
        """Handshake up to the client's last flight, which is given, not sent. Whether it ends the handshake depends on
        the version."""
        self.drive()
        return self.outgoing.read()

    def handshake(self):
        """Handshake to the end."""
        self.drive()
        self.flush()
        return self

    def drive(self):
        while True:
            try:
                self.tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.flush()
                self.fetch()
            except ssl.SSLError:
                self.flush()        # the alert
                raise

    def flush(self):
        if self.outgoing.pending:
            self.sock.sendall(self.outgoing.read())

    def fetch(self):
        if data := self.sock.recv(1 << 17):
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def seal(self, data):
        """The records that carry `data`, unsent."""
        self.tls.write(data)
        return self.outgoing.read()

    def sendall(self, data):
        self.tls.write(data)
        self.flush()

    def readinto(self, buffer):
        """Bytes of application data put into `buffer`; 0 after a close_notify."""
        while True:
            try:
                return self.tls.read(len(buffer), buffer)
            except ssl.SSLWantReadError:
                self.flush()
                self.fetch()
            except ssl.SSLZeroReturnError:
                return 0

    def makefile(self, _mode, size):
        return io.BufferedReader(Records(self), size)

    def farewell(self):
        """A close_notify, unsent."""
        with contextlib.suppress(ssl.SSLError):     # it waits for the server's
            self.tls.unwrap()
        return self.outgoing.read()

    def key_update(self, kind=KEY_UPDATE):
        """A KeyUpdate, unsent. What is sealed from now on is sealed with the new key."""
        assert libssl.SSL_key_update(pointer(self.tls._sslobj, 3), kind) == 1
        self.tls.do_handshake()
        return self.outgoing.read()

    def fatal_alert(self):
        """An encrypted fatal alert, unsent: what a client says to a record that makes no sense."""
        self.incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        try:
            self.tls.read(1)
        except ssl.SSLError:
            return self.outgoing.read()
        raise AssertionError("no error from a record of zeros")

    def setsockopt(self, *option):
        self.sock.setsockopt(*option)

    def shutdown(self, how):
        """End the sending direction, as well in TLS as in TCP."""
        self.sock.sendall(self.farewell())
        self.sock.shutdown(how)

    def close(self):
        if self.polite:
            with contextlib.suppress(OSError):      # the server may have gone
                self.sock.sendall(self.farewell())
        self.sock.close()


class Records(io.RawIOBase):
    """What is received, for io.BufferedReader."""

    def __init__(self, tls):
        self.tls = tls

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.tls.readinto(buffer)


class Forger:
    """Makes records of any type and content for a TLS 1.3 connection with AES-128-GCM whose handshake was the last one,
    and which has sent nothing since. Its context must have KEY_LOG as keylog_filename."""

    def __init__(self):
        with open(KEY_LOG) as log:
            lines = [line.split() for line in log if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")]
        secret = bytes.fromhex(lines[-1][2])
        self.key, self.iv = expand_label(secret, b"key", 16), expand_label(secret, b"iv", 12)
        self.sequence = 0

    def record(self, kind, content, padding=0):
        """RFC 8446 section 5.2; `kind` None: nothing but padding."""
        inner = content + (b"" if kind is None else bytes([kind])) + bytes(padding)
        header = struct.pack(">BHH", 23, 0x0303, len(inner) + 16)
        nonce = (int.from_bytes(self.iv, "big") ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return header + seal_gcm(self.key, nonce, header, inner)


def expand_label(secret, label, length):
    """HKDF-Expand-Label with SHA-256 (RFC 8446 section 7.1), of no more than 32 bytes."""
    info = struct.pack(">HB", length, 6 + len(label)) + b"tls13 " + label + b"\0\1"
    return hmac.digest(secret, info, "sha256")[:length]


def seal_gcm(key, nonce, header, data):
    """AES-128-GCM: ciphertext and tag."""
    cipher = ctypes.c_void_p(libcrypto.EVP_CIPHER_CTX_new())
    out, size = ctypes.create_string_buffer(len(data) + 16), ctypes.c_int()
    steps = (libcrypto.EVP_EncryptInit_ex(cipher, ctypes.c_void_p(libcrypto.EVP_aes_128_gcm()), None, key, nonce),
             libcrypto.EVP_EncryptUpdate(cipher, None, ctypes.byref(size), header, len(header)),
             libcrypto.EVP_EncryptUpdate(cipher, out, ctypes.byref(size), data, len(data)),
             libcrypto.EVP_EncryptFinal_ex(cipher, ctypes.byref(out, len(data)), ctypes.byref(size)),
             libcrypto.EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_GCM_GET_TAG, 16, ctypes.byref(out, len(data))))
    libcrypto.EVP_CIPHER_CTX_free(cipher)
    assert steps == (1,) * 5, steps
    return out.raw
