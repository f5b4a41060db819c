"""TLS's key schedules and records, written out from the RFCs: what the server's own are held against.

A Direction is one side's sending: it seals and opens records by hand. It can be had from a traffic secret, or from what
the kernel is told by TLS_TX and TLS_RX, which makes of the simulated kernel one that can do TLS.
"""

import hashlib
import hmac
import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

TLS_1_2, TLS_1_3 = 0x0303, 0x0304
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23     # RFC 8446 section 5.1
CLOSE_NOTIFY, USER_CANCELED = b"\1\0", b"\1\x5a"                            # section 6, both as warnings
KEY_UPDATE_ASKED, KEY_UPDATE = b"\x18\0\0\1\1", b"\x18\0\0\1\0"             # section 4.6.3: with an answer, without
LARGEST = 1 << 14                                                           # bytes of plaintext in one record


class Suite(NamedTuple):
    name: str           # OpenSSL's
    number: int
    version: int
    digest: str
    aead: type
    key_size: int

    @property
    def explicit(self):
        """How many bytes of each nonce stand in the record (RFC 5288 section 3)."""
        return 8 if self.version == TLS_1_2 and self.aead is AESGCM else 0


SUITES = {suite.name: suite for suite in (
    Suite("TLS_AES_128_GCM_SHA256", 0x1301, TLS_1_3, "sha256", AESGCM, 16),
    Suite("TLS_AES_256_GCM_SHA384", 0x1302, TLS_1_3, "sha384", AESGCM, 32),
    Suite("TLS_CHACHA20_POLY1305_SHA256", 0x1303, TLS_1_3, "sha256", ChaCha20Poly1305, 32),
    Suite("ECDHE-ECDSA-AES128-GCM-SHA256", 0xC02B, TLS_1_2, "sha256", AESGCM, 16),
    Suite("ECDHE-ECDSA-AES256-GCM-SHA384", 0xC02C, TLS_1_2, "sha384", AESGCM, 32),
    Suite("ECDHE-ECDSA-CHACHA20-POLY1305", 0xCCA9, TLS_1_2, "sha256", ChaCha20Poly1305, 32),
    Suite("ECDHE-RSA-AES128-GCM-SHA256", 0xC02F, TLS_1_2, "sha256", AESGCM, 16),
    Suite("ECDHE-RSA-AES256-GCM-SHA384", 0xC030, TLS_1_2, "sha384", AESGCM, 32),
    Suite("ECDHE-RSA-CHACHA20-POLY1305", 0xCCA8, TLS_1_2, "sha256", ChaCha20Poly1305, 32),
)}


def expand_label(digest, secret, label, size):
    """HKDF-Expand-Label with an empty context (RFC 8446 section 7.1, RFC 5869 section 2.3)."""
    label = b"tls13 " + label
    info = struct.pack(">HB", size, len(label)) + label + b"\0"
    block = expanded = b""
    for i in range(1, -(-size // hashlib.new(digest).digest_size) + 1):
        block = hmac.digest(secret, block + info + bytes([i]), digest)
        expanded += block
    return expanded[:size]


def pseudo_random(digest, secret, label, seed, size):
    """TLS 1.2's PRF (RFC 5246 section 5)."""
    seed = label + seed
    a, output = seed, b""
    while len(output) < size:
        a = hmac.digest(secret, a, digest)
        output += hmac.digest(secret, a + seed, digest)
    return output[:size]


class Direction:
    """The records that one side sends. `iv`: 12 bytes, or 4 where the rest of each nonce stands in the record."""

    def __init__(self, suite, key, iv, sequence=0, secret=b""):
        self.suite, self.key, self.iv, self.sequence, self.secret = suite, key, iv, sequence, secret
        self.aead = suite.aead(key)

    @classmethod
    def of_secret(cls, suite, secret, sequence=0):
        """TLS 1.3 (RFC 8446 section 7.3)."""
        return cls(suite, expand_label(suite.digest, secret, b"key", suite.key_size),
                   expand_label(suite.digest, secret, b"iv", 12), sequence, secret)

    @classmethod
    def both_of_master(cls, suite, master, client_random, server_random, sequence=1):
        """(the client's, the server's) of TLS 1.2 (RFC 5246 section 6.3)."""
        iv_size = 12 - suite.explicit
        block = pseudo_random(suite.digest, master, b"key expansion", server_random + client_random,
                              2 * (suite.key_size + iv_size))
        keys, ivs = block[:2 * suite.key_size], block[2 * suite.key_size:]
        return tuple(cls(suite, keys[i * suite.key_size:][:suite.key_size], ivs[i * iv_size:][:iv_size], sequence)
                     for i in (0, 1))

    @classmethod
    def of_info(cls, info):
        """From a struct tls12_crypto_info_* (<linux/tls.h>): bytes."""
        version, cipher = struct.unpack_from("=HH", info)
        aead, shape = INFOS[cipher]
        assert struct.calcsize(shape) == len(info), "the kernel says EINVAL"
        iv, key, salt, sequence = struct.unpack_from(shape, info)[2:]
        suite = next(suite for suite in SUITES.values()
                     if (suite.version, suite.aead, suite.key_size) == (version, aead, len(key)))
        assert not suite.explicit or iv == sequence, "any nonce would do; but this is what we mean to say"
        return cls(suite, key, salt + (b"" if suite.explicit else iv), int.from_bytes(sequence))

    def next(self):
        """TLS 1.3: the same side's with its next keys, after a KeyUpdate (RFC 8446 section 7.2)."""
        size = hashlib.new(self.suite.digest).digest_size
        return self.of_secret(self.suite, expand_label(self.suite.digest, self.secret, b"traffic upd", size))

    def nonce(self, explicit):
        if self.suite.explicit:
            return self.iv + explicit
        return (int.from_bytes(self.iv) ^ self.sequence).to_bytes(12)

    def additional(self, kind, size):
        """What is protected beside the plaintext of `size` bytes (RFC 5246 section 6.2.3.3, RFC 8446 section 5.2)."""
        if self.suite.version == TLS_1_3:
            return struct.pack(">BHH", APPLICATION_DATA, TLS_1_2, size + 16)
        return struct.pack(">QBHH", self.sequence, kind, TLS_1_2, size)

    def seal(self, content, kind=APPLICATION_DATA, padding=0):
        """One record of at most LARGEST bytes."""
        explicit = self.sequence.to_bytes(8)[:self.suite.explicit]
        if self.suite.version == TLS_1_3:
            content, kind = content + bytes([kind]) + bytes(padding), APPLICATION_DATA
        sealed = self.aead.encrypt(self.nonce(explicit), content, self.additional(kind, len(content)))
        self.sequence += 1
        return struct.pack(">BHH", kind, TLS_1_2, len(explicit + sealed)) + explicit + sealed

    def seal_all(self, content):
        """As many records as it takes."""
        return b"".join(self.seal(content[at:at + LARGEST]) for at in range(0, len(content), LARGEST))

    def open(self, record):
        """(content, kind) of one record. Raises InvalidTag where it is none of ours, or out of turn."""
        kind, _, size = struct.unpack_from(">BHH", record)
        assert len(record) == 5 + size
        explicit, sealed = record[5:5 + self.suite.explicit], record[5 + self.suite.explicit:]
        if len(sealed) < 16:
            raise InvalidTag
        content = self.aead.decrypt(self.nonce(explicit), sealed, self.additional(kind, len(sealed) - 16))
        self.sequence += 1
        if self.suite.version == TLS_1_3:
            content = content.rstrip(b"\0")
            content, kind = content[:-1], content[-1]
        return content, kind


INFOS = {   # cipher -> its function, and version, cipher, iv, key, salt, sequence
    51: (AESGCM, "=HH8s16s4s8s"), 52: (AESGCM, "=HH8s32s4s8s"), 54: (ChaCha20Poly1305, "=HH12s32s0s8s"),
}


def first_record(data):
    """The whole record at the front of `data`, or None."""
    size = 5 + int.from_bytes(data[3:5])
    return data[:size] if len(data) >= 5 and len(data) >= size else None


def split(data):
    """The records that `data` consists of."""
    found = []
    while data:
        record = first_record(data)
        assert record, f"half a record: {data[:20]!r}"
        found.append(record)
        data = data[len(record):]
    return found
