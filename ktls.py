"""Kernel TLS: what the kernel has to be told of a connection, where it comes from, and whether this kernel can.

Layouts and numbers: <linux/tls.h>, <linux/tcp.h>; networking/tls.rst in the kernel's documentation.
"""

import contextlib
import ctypes
import errno
import os
import platform
import socket
import struct
from collections import namedtuple
from functools import partial

import linux
from openssl import TLS1_2, TLS1_3
from options import StartError
from uring import Ring, RingError

# Facts about kernel TLS
#   * The ULP is attached right after accept: it wants an established connection (ENOTCONN once the client has sent FIN)
#     and changes nothing until keys are set.
#   * A send is encrypted from the moment TLS_TX is set, so what OpenSSL has still to say is sent before; what is
#     received is decrypted from the moment TLS_RX is set, whenever it came.
#   * MSG_WAITALL is refused, so a large send may come back short.
#   * A receive ends with EIO at a record that is no application data. The record stays queued until a recvmsg with room
#     for a control message takes it.
#   * Keys cannot be replaced before Linux 6.14: after a client's KeyUpdate nothing more can be received.
SOL_TCP, TCP_ULP, SOL_TLS, TLS_TX, TLS_RX = 6, 31, 282, 1, 2
ATTACH, SEND_KEYS, RECEIVE_KEYS = (SOL_TCP, TCP_ULP), (SOL_TLS, TLS_TX), (SOL_TLS, TLS_RX)
ULP = b"tls"
AES_GCM_128, AES_GCM_256, CHACHA20_POLY1305 = 51, 52, 54
# struct tls12_crypto_info_*: version, cipher; IV, key and salt, whose sizes Cipher has; record sequence number
INFO = struct.Struct("=HH")
Cipher = namedtuple("Cipher", "name module digest iv_size key_size salt_size")
CIPHERS = {
    AES_GCM_128: Cipher("AES-128-GCM", "gcm", "EVP_sha256", 8, 16, 4),
    AES_GCM_256: Cipher("AES-256-GCM", "gcm", "EVP_sha384", 8, 32, 4),
    CHACHA20_POLY1305: Cipher("ChaCha20-Poly1305", "chacha20poly1305", "EVP_sha256", 12, 32, 0),
}
SEQUENCE_SIZE = 8
INFO_SIZE = 56              # of the largest

# Cipher suites (their numbers in TLS) -> kernel's cipher. Each goes with one hash function. TLS 1.3, then ECDHE for
# ECDSA and RSA.
SUITES = {
    0x1301: AES_GCM_128, 0x1302: AES_GCM_256, 0x1303: CHACHA20_POLY1305,
    0xC02B: AES_GCM_128, 0xC02C: AES_GCM_256, 0xCCA9: CHACHA20_POLY1305,
    0xC02F: AES_GCM_128, 0xC030: AES_GCM_256, 0xCCA8: CHACHA20_POLY1305,
}
HASH_SIZE = {"EVP_sha256": 32, "EVP_sha384": 48}


class KernelTlsError(StartError):
    """Kernel TLS was asked for and is not to be had; the text says why and what to do."""


# --- keys

class KeySchedule:
    """Works out the keys of connections in memory of its own: no secret ever becomes a Python object."""

    BLOCK, ITERATION = 0, 256       # where in `scratch` keys, and the input of the next HMAC, are

    def __init__(self, openssl):
        self.openssl = openssl
        self.scratch = bytearray(512)
        self.at = linux.address_of(self.scratch)

    def tls13(self, info, suite, secret, sequence):
        """Write to address `info` what the kernel has to know for one direction, from the traffic secret at address
        `secret` (RFC 8446 section 7.3)."""
        number, cipher = SUITES[suite], CIPHERS[SUITES[suite]]
        key, iv = self.at + self.BLOCK, self.at + self.BLOCK + 64
        for label, length, out in ((b"key", cipher.key_size, key), (b"iv", 12, iv)):
            # HKDF-Expand-Label without context (RFC 8446 section 7.1): the first `length` of the bytes at `out`
            expansion = struct.pack(">HB", length, 6 + len(label)) + b"tls13 " + label + b"\0\1"
            self.openssl.hmac(cipher.digest, secret, HASH_SIZE[cipher.digest], expansion, len(expansion), out)
        write_info(info, TLS1_3, number, key, iv, sequence)

    def tls12(self, send_info, receive_info, suite, master, randoms, sequences):
        """Both directions, from the master secret at address `master` (RFC 5246 section 6.3). `randoms`: the server's
        and the client's, 64 bytes. `sequences`: of the next record to send, to receive."""
        cipher = SUITES[suite]
        self.pseudo_random(CIPHERS[cipher].digest, master, b"key expansion" + randoms)
        key_size, iv_size = CIPHERS[cipher].key_size, 12 if cipher == CHACHA20_POLY1305 else 4
        block, nonce = self.at + self.BLOCK, self.at + self.ITERATION
        for info, which, sequence in ((receive_info, 0, sequences[1]), (send_info, 1, sequences[0])):
            ctypes.memmove(nonce + 4, sequence.to_bytes(8, "big"), 8)       # what AES-GCM's nonce goes on with
            ctypes.memmove(nonce, block + 2 * key_size + which * iv_size, iv_size)
            write_info(info, TLS1_2, cipher, block + which * key_size, nonce, sequence)

    def pseudo_random(self, digest, master, seed):
        """P_hash(master secret, seed) to BLOCK (RFC 5246 section 5): 96 bytes, where 88 are the most that is wanted."""
        size, hmac = HASH_SIZE[digest], partial(self.openssl.hmac, digest, master, 48)
        a = self.at + self.ITERATION
        hmac(seed, len(seed), a)
        ctypes.memmove(a + size, seed, len(seed))
        for i in range(96 // size):
            hmac(a, size + len(seed), self.at + self.BLOCK + i * size)
            hmac(a, size, a)


def write_info(info, version, cipher, key, iv, sequence):
    """Write a struct tls12_crypto_info_* to address `info`; `key` and `iv` (12 bytes) are addresses."""
    # What AES-GCM calls salt is the front of the IV; its `iv` is the rest.
    *_, iv_size, key_size, salt_size = CIPHERS[cipher]
    ctypes.memmove(info, INFO.pack(version, cipher), INFO.size)
    at = info + INFO.size
    for source, size in ((iv + salt_size, iv_size), (key, key_size), (iv, salt_size)):
        ctypes.memmove(at, source, size)
        at += size
    ctypes.memmove(at, sequence.to_bytes(SEQUENCE_SIZE, "big"), SEQUENCE_SIZE)


def info_size(cipher):
    return INFO.size + sum(CIPHERS[cipher][3:]) + SEQUENCE_SIZE


# --- records that are no application data

SET_RECORD_TYPE, GET_RECORD_TYPE = 1, 2
ALERT = 21                              # RFC 8446 section 5.1
CLOSE_NOTIFY, USER_CANCELED = b"\0", bytes((90,))      # RFC 8446 section 6
WARNING = b"\1"


def record_message(size):
    """A linux.Message for a record of up to `size` bytes, with a control message that tells its type."""
    return linux.Message(size, socket.CMSG_SPACE(1))


def close_notify():
    """A linux.Message whose sending says that no more will be sent."""
    message = record_message(2)
    message.fill(SOL_TLS, SET_RECORD_TYPE, bytes((ALERT,)), WARNING + CLOSE_NOTIFY)
    return message


def received_record(message, size):
    """(type, content) of a record of `size` bytes that was received into a linux.Message; 0 where none is told."""
    content, record_type, _ = message.received(size, SOL_TLS, GET_RECORD_TYPE)
    return record_type[0] if record_type else 0, content


# --- whether this kernel can

def probe(use_liburing):
    """(the ciphers that this kernel takes over from the ring, why not all of them or "")."""
    try:
        ring = Ring(8, entries=8, buffers=1, buffer_size=64, use_liburing=use_liburing)
    except RingError as error:
        return frozenset(), str(error)
    except OSError as error:
        return frozenset(), f"a ring to try it with cannot be set up: {error.strerror}"
    try:
        refused = {cipher: try_cipher(ring, cipher) for cipher in CIPHERS}
    except OSError as error:
        return frozenset(), f"it cannot be tried on a connection to 127.0.0.1: {error.strerror}"
    finally:
        ring.close()
    return (frozenset(cipher for cipher, reason in refused.items() if not reason),
            next(filter(None, refused.values()), ""))


def try_cipher(ring, cipher):
    """Have the kernel take over a connection of our own with keys of zeros; "" or why that fails. Raises OSError."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.enter_context(socket.create_connection(listener.getsockname()))
        accepted = stack.enter_context(listener.accept()[0])
        info = bytearray(INFO_SIZE)
        INFO.pack_into(info, 0, TLS1_3, cipher)
        keys = linux.address_of(info), info_size(cipher)
        for option, value in ((ATTACH, (linux.address_of(ULP), len(ULP))), (SEND_KEYS, keys), (RECEIVE_KEYS, keys)):
            ring.arm_setsockopt(0, 0, accepted.fileno(), option, value)
            while not (completions := list(ring.wait())):
                pass                            # a signal came first
            if completions[0][2] < 0:
                return explain(-completions[0][2], option, cipher)
    return ""


def explain(error, option, cipher):
    """Why the kernel refused `option` with `error` (an errno), and what to do about it: one sentence."""
    if error == errno.ENOENT and option == ATTACH:
        return ("this kernel has not loaded its tls module: 'modprobe tls' does, "
                "a line 'tls' in /etc/modules does at every boot")
    if error == errno.ENOENT:
        return f"this kernel has no {CIPHERS[cipher].name}: 'modprobe {CIPHERS[cipher].module}' loads it"
    if error in (errno.EOPNOTSUPP, errno.EINVAL) and option == ATTACH:
        return f"this kernel ({platform.release()}) is older than 6.7 and sets no socket options from io_uring"
    return f"this kernel refuses {CIPHERS[cipher].name}: {os.strerror(error)}"
