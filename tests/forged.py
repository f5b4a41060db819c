"""Records that no well-behaved client sends: sealed by hand, with the keys of an honest TLS 1.3 handshake."""

import ssl

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from tlsclient import APPLICATION_DATA, HANDSHAKE

SUITES = {  # RFC 8446 section B.4: name -> (hash, cipher, bytes of its key)
    "TLS_AES_128_GCM_SHA256": (SHA256(), AESGCM, 16),
    "TLS_AES_256_GCM_SHA384": (SHA384(), AESGCM, 32),
    "TLS_CHACHA20_POLY1305_SHA256": (SHA256(), ChaCha20Poly1305, 32),
}
KEY_UPDATE = 24                                     # RFC 8446 section 4


class Forger:
    """The sending side of a client, taken over after its handshake: it must not send by itself any more.

    It goes on reading, and so sees what the server answers, with the server's new keys too.
    """

    def __init__(self, client, keylog):
        assert client.tls.version() == "TLSv1.3"
        self.send = client.sock.raw.sendall
        self.hash, self.cipher, self.key_size = SUITES[client.tls.cipher()[0]]
        self.take(secrets(keylog)["CLIENT_TRAFFIC_SECRET_0"])

    def take(self, secret):
        """Begin to use a traffic secret (section 7.3)."""
        self.secret, self.sequence = secret, 0
        self.aead = self.cipher(self.expand(b"key", self.key_size))
        self.iv = int.from_bytes(self.expand(b"iv", 12))

    def expand(self, label, size):
        """HKDF-Expand-Label without context (section 7.1)."""
        label = b"tls13 " + label
        info = size.to_bytes(2) + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self.hash, size, info).derive(self.secret)

    def seal(self, content, kind=APPLICATION_DATA, padding=0):
        """One record (section 5.2) with this content and this type inside."""
        return self.seal_inner(content + bytes([kind]) + bytes(padding))

    def seal_inner(self, inner, outer=APPLICATION_DATA):
        header = bytes([outer, 3, 3]) + (len(inner) + 16).to_bytes(2)
        nonce = (self.iv ^ self.sequence).to_bytes(12)
        self.sequence += 1
        return header + self.aead.encrypt(nonce, inner, header)

    def key_update(self, request, cut=0):
        """A KeyUpdate (section 4.6.3), in two records if cut; from then on the next keys are in use."""
        message = bytes([KEY_UPDATE, 0, 0, 1, request])
        sealed = self.seal(message[:cut], HANDSHAKE) if cut else b""
        sealed += self.seal(message[cut:], HANDSHAKE)
        self.take(self.expand(b"traffic upd", self.hash.digest_size))
        return sealed


def secrets(keylog):
    """label -> secret: the last lines of a file that Python's ssl wrote, so those of the last handshake."""
    lines = [line.split() for line in keylog.read_text().splitlines() if not line.startswith("#")]
    return {label: bytes.fromhex(secret) for label, _, secret in lines}


def forge(server, keylog, **options):
    """(client, forger): a connection whose records are written by hand from now on."""
    context = server.context_of(version="1.3", **options)
    context.options |= ssl.OP_NO_TICKET
    context.keylog_filename = str(keylog)
    client = server.connect(context)
    return client, Forger(client, keylog)
