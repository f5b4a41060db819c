"""TLS connections without I/O: ciphertext in, plaintext out, and the other way round, by OpenSSL.

A Session is one connection's; what all of a worker's share is in the Engine. Nothing here waits or calls the system:
OpenSSL reads from one memory BIO and writes to another, and the caller carries bytes between these and the ring.
"""

import ctypes
import mmap

import linux
from ktls import INFO_SIZE, SUITES, KeySchedule, info_size
from openssl import TLS1_3, wipe

RECORD_HEADER = 5               # bytes: type, version (2), length (2) (RFC 8446 section 5.1)
LARGEST_PLAINTEXT = 1 << 14     # bytes of one record
DRAIN_SIZE = 1 << 16            # bytes taken out of a BIO at a time
SECRET = 48                     # bytes of the largest traffic secret
CLIENT_SECRET, SERVER_SECRET = b"CLIENT_TRAFFIC_SECRET_0 ", b"SERVER_TRAFFIC_SECRET_0 "
HEX_RANDOM = 64 + 1             # what stands in a key log line between label and secret
MOST_OUTPUT = 4096              # bytes that wait for the next response: a ticket, and answers to KeyUpdate of 27 each


class TlsError(Exception):
    """The peer broke TLS, or cannot agree with us on how to speak it; the text says how."""


class Session:
    """One TLS connection's state."""

    output = b""                # ciphertext to be sent before any other
    established = False         # whether the handshake is done
    modern = False              # whether it is TLS 1.3
    resumed = False             # whether it took up an earlier session
    broken = False              # whether OpenSSL can do no more with it
    tail = b""                  # of what was fed behind the handshake: the part of a record at its end
    at_end = False              # whether the peer has said close_notify
    ended = False               # whether we have, or need not
    # The hand-over to the kernel
    in_kernel = False           # whether it has taken over
    secrets = None              # traffic secrets, the client's and the server's
    keys = None                 # what TLS_TX and TLS_RX take, until they have been set
    sequences = (0, 0)          # numbers of the records to be sent and received next
    # What is in flight, kept for those who send and receive it
    flight = b""                # of a handshake
    control = None              # where the kernel puts a record that is no application data
    buffer = None               # what plaintext is brought to, and ciphertext sent from
    filled = 0                  # bytes of plaintext in it
    sealed = unsent = 0         # bytes of ciphertext in it, and of that not sent yet

    def __init__(self, ssl, to_kernel):
        self.ssl = ssl                  # SSL *, as c_void_p; None once the kernel has taken over, or all is over
        self.to_kernel = to_kernel      # whether the kernel is to take over
        if to_kernel:
            self.secrets = bytearray(2 * SECRET)

    @property
    def can_wait(self):
        """Whether `output` may go with the first response: after TLS 1.3's handshake it is session tickets."""
        return self.established and self.modern and not self.to_kernel

    @property
    def wanted(self):
        """How many bytes are missing, before the kernel can take over, from a record that has begun or its header."""
        return record_size(self.tail) - len(self.tail) if self.tail and self.to_kernel else 0


def record_size(record):
    """Bytes of the record that begins with `record`; of its header alone where that is not there as a whole."""
    return RECORD_HEADER + (int.from_bytes(record[3:RECORD_HEADER], "big") if len(record) >= RECORD_HEADER else 0)


def split_records(data):
    """(how many whole records are at the front of `data`, the rest of it)."""
    count = at = 0
    while (end := at + record_size(data[at:at + RECORD_HEADER])) <= len(data):
        count, at = count + 1, end
    return count, data[at:]


# Facts about the two BIOs
#   * All sessions of a worker use the same pair, because between calls both are empty: what was put in has been read
#     into OpenSSL's record buffers or is taken back, what came out is taken at once.
#   * OpenSSL reads a record's header, then exactly the rest of it, never more: what lies behind the record that ends a
#     handshake stays in the BIO, untouched, and can still be given to the kernel to count.
#   * So whether a BIO will be empty can be told from the records' lengths, which `Session.tail` keeps count of. (Not
#     from SSL_has_pending: it knows nothing of a header that has been read alone.)
#   * A record that gives plaintext never makes OpenSSL write. One that does not (KeyUpdate, an alert) may.
class Engine:
    """What the sessions of one worker share. `kernel_ciphers`: those that the kernel takes over."""

    def __init__(self, openssl, credentials, kernel_ciphers=frozenset()):
        self.openssl, self.credentials, self.kernel_ciphers = openssl, credentials, kernel_ciphers
        self.incoming, self.outgoing = (ctypes.c_void_p(openssl.BIO_new(openssl.BIO_s_mem())) for _ in range(2))
        self.plain = mmap.mmap(-1, LARGEST_PLAINTEXT)
        self.plain_at = ctypes.c_void_p(linux.address_of(self.plain))
        self.drained = mmap.mmap(-1, DRAIN_SIZE)
        self.drained_at = ctypes.c_void_p(linux.address_of(self.drained))
        self.schedule = KeySchedule(openssl)
        self.handshaking: Session | None = None     # whose secrets are being told
        credentials.on_secret, credentials.callbacks.current = self.on_secret, credentials

    def start(self, to_kernel):
        """A new Session; `to_kernel`: whether its socket is ready for the kernel to take over. Raises TlsError."""
        openssl, ssl = self.openssl, self.openssl.SSL_new(self.credentials.context)
        if not ssl:
            raise TlsError(f"no new session: {openssl.reason()}")
        openssl.BIO_up_ref(self.incoming)       # SSL_free lets go of one reference to each
        openssl.BIO_up_ref(self.outgoing)
        openssl.SSL_set_bio(ssl, self.incoming, self.outgoing)
        openssl.SSL_set_accept_state(ssl)
        return Session(ctypes.c_void_p(ssl), to_kernel and bool(self.kernel_ciphers))

    def free(self, session):
        """Let go of all that OpenSSL has of a session, and of its secrets."""
        if session.ssl:
            self.openssl.SSL_free(session.ssl)
            session.ssl = None
        self.forget_secrets(session)

    def forget_secrets(self, session):
        for memory in filter(None, (session.secrets, session.keys)):
            wipe(memory)
        session.secrets = session.keys = None

    # handshake

    def handshake(self, session, data):
        """Go on with a handshake. Gives the plaintext that stands behind its end, once it is done. `session.output` is
        to be sent then, also where TlsError is raised."""
        openssl = self.openssl
        openssl.BIO_write(self.incoming, data, len(data))
        self.handshaking = session
        result = openssl.SSL_do_handshake(session.ssl)
        self.handshaking = None
        output = self.drain()
        session.output += output
        if result != 1:
            if openssl.SSL_get_error(session.ssl, result) == openssl.ERROR_WANT_READ:
                return b""
            raise self.failure(session)
        session.established, session.resumed = True, bool(openssl.SSL_session_reused(session.ssl))
        if session.to_kernel:
            session.to_kernel = SUITES.get(self.suite(session)) in self.kernel_ciphers
        # Under the last keys we have sent TLS 1.3's session tickets, or TLS 1.2's Finished, and received no more than
        # TLS 1.2's Finished.
        session.modern = openssl.SSL_version(session.ssl) == TLS1_3
        session.sequences = (split_records(output)[0], 0) if session.modern else (1, 1)
        behind = openssl.BIO_ctrl_pending(self.incoming)
        return self.read_behind(session, data[-behind:]) if behind else b""

    def read_behind(self, session, data):
        """Plaintext of `data`, which the BIO holds and which came behind the handshake."""
        count, session.tail = split_records(session.tail + data)
        plaintext, given = self.read(session)
        if session.to_kernel:
            # Until the kernel takes over, each whole record counts one in its sequence number. All have to be
            # application data: of these alone OpenSSL tells one by one. If not, the session stays in userspace.
            sent, received = session.sequences
            session.sequences = sent, received + count
            session.to_kernel = given == count and not session.at_end
        return plaintext

    def suite(self, session):
        return self.openssl.SSL_CIPHER_get_protocol_id(self.openssl.SSL_get_current_cipher(session.ssl))

    # hand-over

    def on_secret(self, line):
        """Keep a traffic secret, from a line of the key log at address `line`."""
        label = ctypes.string_at(line, len(CLIENT_SECRET))
        place = {CLIENT_SECRET: 0, SERVER_SECRET: SECRET}.get(label)
        if place is not None and self.handshaking and self.handshaking.secrets:
            self.openssl.OPENSSL_hexstr2buf_ex(linux.address_of(self.handshaking.secrets) + place, SECRET, None,
                                               line + len(label) + HEX_RANDOM, b"\0")

    def derive_keys(self, session):
        """Fill `session.keys`: what TLS_TX takes, and INFO_SIZE behind it what TLS_RX does; gives their size."""
        openssl, suite = self.openssl, self.suite(session)
        session.keys = bytearray(2 * INFO_SIZE)
        send, receive = linux.address_of(session.keys), linux.address_of(session.keys) + INFO_SIZE
        secrets = linux.address_of(session.secrets)
        if session.modern:
            self.schedule.tls13(send, suite, secrets + SECRET, session.sequences[0])
            self.schedule.tls13(receive, suite, secrets, session.sequences[1])
        else:
            randoms = ctypes.create_string_buffer(64)
            openssl.SSL_get_server_random(session.ssl, randoms, 32)
            openssl.SSL_get_client_random(session.ssl, ctypes.byref(randoms, 32), 32)
            openssl.SSL_SESSION_get_master_key(openssl.SSL_get_session(session.ssl), secrets, SECRET)
            self.schedule.tls12(send, receive, suite, secrets, randoms.raw, session.sequences)
        wipe(self.schedule.scratch)
        wipe(session.secrets)
        return info_size(SUITES[suite])

    def hand_over(self, session):
        """The kernel has taken over: nothing more is needed here."""
        session.in_kernel = True
        self.free(session)

    # data

    def feed(self, session, data):
        """Plaintext of some more ciphertext. Raises TlsError; `session.output` is to be sent then, and first of all
        with the next response otherwise."""
        self.openssl.BIO_write(self.incoming, data, len(data))
        return self.read_behind(session, data)

    def read(self, session):
        """(all plaintext that the BIO's contents give, in how many records). Raises TlsError."""
        openssl, ssl, pieces = self.openssl, session.ssl, []
        while (size := openssl.SSL_read(ssl, self.plain_at, LARGEST_PLAINTEXT)) > 0:
            pieces.append(self.plain[:size])
        self.after_read(session, size)
        return b"".join(pieces), len(pieces)

    def after_read(self, session, result):
        """No plaintext (b""), since SSL_read gave `result` instead: all has been read, or the peer said something about
        TLS itself. Raises TlsError."""
        openssl = self.openssl
        why = openssl.SSL_get_error(session.ssl, result)
        if why == openssl.ERROR_ZERO_RETURN:
            session.at_end = True
            self.discard()
        elif why != openssl.ERROR_WANT_READ:
            raise self.failure(session)
        said = self.drain()
        session.output += said
        if said and not session.modern:
            raise TlsError("it wanted to renegotiate")      # and has its answer, the alert no_renegotiation
        if len(session.output) > MOST_OUTPUT:
            raise TlsError("it wanted new keys too often")
        return b""

    def seal(self, session, source, size, target, room):
        """Encrypt `size` bytes at pointer `source` into `room` bytes at pointer `target` (c_void_p); gives how many
        that makes. Raises TlsError."""
        openssl = self.openssl
        if openssl.SSL_write(session.ssl, source, size) != size:
            raise self.failure(session)
        if not session.output:
            return openssl.BIO_read(self.outgoing, target, room)
        first, session.output = session.output, b""
        ctypes.memmove(target, first, len(first))
        return len(first) + openssl.BIO_read(self.outgoing, linux.pointer(target.value + len(first)), room - len(first))

    def end(self, session):
        """The ciphertext of close_notify, or of the alert that tells what was wrong; b"" where neither can be said."""
        session.ended = True
        if session.established and not session.broken:
            if self.openssl.SSL_shutdown(session.ssl) < 0:
                self.openssl.ERR_clear_error()
            session.output += self.drain()
        return session.output

    def end_behind(self, session, target):
        """The same, put to address `target`, behind what else is sent; gives how many bytes that makes."""
        words, session.output = self.end(session), b""
        linux.copy(target, words, len(words))
        return len(words)

    # the BIOs

    def drain(self):
        """All that OpenSSL has written."""
        size = self.openssl.BIO_read(self.outgoing, self.drained_at, DRAIN_SIZE)
        if size < DRAIN_SIZE:
            return self.drained[:size] if size > 0 else b""
        return self.drained[:] + self.drain()

    def discard(self):
        """Drop what OpenSSL has not read."""
        self.openssl.BIO_ctrl(self.incoming, self.openssl.BIO_CTRL_RESET, 0, None)

    def failure(self, session):
        """A TlsError for what OpenSSL says is wrong; both BIOs are empty then."""
        reason, session.broken = self.openssl.reason(), True
        self.discard()
        session.output += self.drain()
        return TlsError(reason)
