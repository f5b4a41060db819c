"""Certificates and keys, and the contexts that OpenSSL keeps them in: read and checked once, before anything is served.
Also what ACME needs for getting certificates: the answers to its challenges.

There is a context for each set of names. A certificate of another key type for the same names goes into the same
context, and OpenSSL takes the one that a client can verify.
"""

import contextlib
import ctypes
import itertools
import logging
import os
import re
import stat
import time
from functools import cache
from typing import NamedTuple

from ktls import KernelTlsError, probe
from options import UsageError
from openssl import (
    TLS1_2, TLS1_3, AlpnCallback, KeylogCallback, OpenSSL, PasswordCallback, ServernameCallback, wipe,
)

# Mozilla's "intermediate" suites for TLS 1.2, those with ECDHE: DHE costs a server far more than the client that asks
# for it (CVE-2002-20001), and who cannot do ECDHE cannot do much. TLS 1.3 has its own three, all of them good.
CIPHERS = b":".join(b"ECDHE-%b-%b" % (key, cipher) for cipher in (
    b"AES128-GCM-SHA256", b"AES256-GCM-SHA384", b"CHACHA20-POLY1305") for key in (b"ECDSA", b"RSA"))
GROUPS = b"X25519MLKEM768:X25519:P-256:P-384", b"X25519:P-256:P-384"        # the first of them that OpenSSL knows
# Keys for which clients have a signature algorithm (RFC 8446 section 4.2.3), by OpenSSL's names.
USABLE_KEYS = {"RSA", "RSA-PSS", "prime256v1", "secp384r1", "secp521r1", "ED25519", "ED448"}
PROTOCOLS = b"\x08http/1.1\x08http/1.0"     # each behind its length, the better one first (RFC 7301 sections 3.1 and 6)
SESSION_ID_CONTEXT = b"tarweb"
NO_MORE = "no start line"   # what OpenSSL says of a file in which it finds nothing that it is looking for
LARGEST_FILE = 1 << 20      # bytes of a PEM file: a chain is a few KiB
TICKET_PERIOD = 12 * 3600   # seconds that session tickets are sealed with the same keys
TICKET_KEYS = 80            # bytes of them
SECRET = 32                 # bytes: of SHA-256
ACME_FOLDER = b".well-known/acme-challenge/"            # where `certbot --webroot` puts challenges
ACME_TOKEN = re.compile(rb"[A-Za-z0-9_-]{1,255}")       # RFC 8555 section 8.3: the alphabet of base64url
LARGEST_CHALLENGE = 4096    # bytes: a token, a dot and a thumbprint take about 90


log = logging.getLogger("tarweb")


class CredentialsError(UsageError):
    """A certificate or key cannot be used; the text names the file and says what to do."""


class TicketKeys:
    """The keys that session tickets are sealed with: the same in all processes, and others every TICKET_PERIOD.

    Each follows from a secret, and each secret from the one before, which it overwrites in memory: whoever takes a
    process over cannot read what was resumed in earlier periods. Processes go on by the clock, so nobody has to tell
    the others. No secret or key ever becomes a Python object.
    """

    def __init__(self, openssl, wall):
        self.openssl, self.secret = openssl, ctypes.create_string_buffer(SECRET)
        openssl.check(openssl.RAND_priv_bytes(self.secret, SECRET), "random bytes")
        self.period = int(wall) // TICKET_PERIOD

    def advance(self, wall):
        """Go on to the period of `wall` (seconds since the epoch); tell whether that is another one."""
        before = self.period
        while self.period < int(wall) // TICKET_PERIOD:
            self.derive(b"next", self.secret)
            self.period += 1
        return self.period != before

    def keys(self):
        """TICKET_KEYS bytes as SSL_CTX_set_tlsext_ticket_keys(3) takes them (a name, keys for HMAC and AES), and some
        more, in memory that the caller wipes."""
        block = ctypes.create_string_buffer(3 * SECRET)
        for i in range(3):
            self.derive(b"keys %d" % i, ctypes.byref(block, i * SECRET))
        return block

    def derive(self, label, target):
        """Write what follows from the secret by this label to `target`, which may be the secret: SECRET bytes."""
        self.openssl.hmac("EVP_sha256", self.secret, SECRET, label, len(label), target)


class Callbacks:
    """What OpenSSL calls: made once, before any process is forked, and passed on to the `current` Credentials."""

    # Memory for callbacks may be shared by parent and children (libffi, where memory that is writable must not be
    # executable, as with systemd's MemoryDenyWriteExecute=yes or SELinux): a process that made some after a fork would
    # spoil those of others.
    current: "Credentials"

    def __init__(self):
        self.encrypted = False          # whether a password has been asked for
        self.alpn = AlpnCallback(lambda *arguments: self.current.select_protocol(*arguments))
        self.servername = ServernameCallback(lambda *arguments: self.current.select_host(*arguments))
        self.keylog = KeylogCallback(lambda _, line: self.current.on_secret(line))
        self.password = PasswordCallback(self.no_password)

    def no_password(self, *_):
        """An encrypted key cannot be read, and nothing is asked on the terminal."""
        self.encrypted = True
        return -1


class Credentials:
    """The contexts for (certificate file, key file) pairs, the first of which is for clients that name no other host.

    `context` is what new connections start from. `on_secret(address of a key log line)` is called with each secret
    where `log_secrets` was asked for. `tickets`: TicketKeys. `warnings` are for the log. Raises CredentialsError.
    """

    def __init__(self, openssl, pairs, least_version, tickets, log_secrets=False, callbacks=None):
        self.openssl, self.least_version, self.tickets = openssl, least_version, tickets
        self.callbacks, self.log_secrets = callbacks or Callbacks(), log_secrets
        self.on_secret = lambda line: None
        self.contexts, self.warnings = [], []
        self.by_name = {}           # DNS name, perhaps "*.": context
        contexts: dict = {}         # names: (context, the types of its keys)
        try:
            for certificate_file, key_file in pairs:
                self.load(contexts, certificate_file, key_file)
        except BaseException:
            self.close()
            raise
        self.seal_tickets(tickets.keys())
        self.context = next(iter(contexts.values()))[0]
        if len(contexts) > 1:
            for context, _ in contexts.values():
                openssl.SSL_CTX_callback_ctrl(context, openssl.CTRL_SERVERNAME_CALLBACK, self.callbacks.servername)

    def close(self):
        self.seal_tickets(ctypes.create_string_buffer(os.urandom(TICKET_KEYS)))     # SSL_CTX_free wipes no keys
        for context in self.contexts:
            self.openssl.SSL_CTX_free(context)
        self.contexts = []

    def renew_tickets(self, wall):
        """Once in a while, with the time in seconds since the epoch."""
        if self.tickets.advance(wall):
            self.seal_tickets(self.tickets.keys())

    def seal_tickets(self, keys):
        """Have all contexts seal tickets with these TICKET_KEYS bytes from now on, which are wiped."""
        openssl = self.openssl
        for context in self.contexts:
            openssl.check(openssl.SSL_CTX_ctrl(context, openssl.CTRL_TICKET_KEYS, TICKET_KEYS, keys), "ticket keys")
        wipe(keys)

    # one context

    def load(self, contexts, certificate_file, key_file):
        """Put a certificate with its key into the context of its names, which is made where it is the first."""
        openssl = self.openssl
        chain, key = self.read_chain(certificate_file), self.read_key(key_file)
        names, kind = self.names(chain[0]), openssl.EVP_PKEY_get_base_id(key)
        group = frozenset(names) or certificate_file
        context, kinds = contexts.get(group) or (self.make_context(), set())
        if kind in kinds:
            context, kinds = self.make_context(), set()
            self.warnings.append(f"{certificate_file} has the names and the type of key of one before it, "
                                 "so no client will get it")
        kinds.add(kind)
        sort = self.sort(key)
        if sort not in USABLE_KEYS:
            self.warnings.append(f"the key in {key_file} is of {sort}, which no client can use: have one of P-256 made "
                                 "(openssl genpkey -algorithm ec -pkeyopt ec_paramgen_curve:P-256), and a certificate")
        self.use(context, chain, key, certificate_file, key_file)
        if contexts and not names:
            self.warnings.append(f"{certificate_file} names no host, so no client will get it: "
                                 "it has no DNS name in subjectAltName")
        contexts.setdefault(group, (context, kinds))
        for name in names:
            self.by_name.setdefault(name, context)
        for certificate in chain:
            openssl.X509_free(certificate)      # the context has its own reference
        openssl.EVP_PKEY_free(key)

    def make_context(self):
        openssl = self.openssl
        context = openssl.check(openssl.SSL_CTX_new(openssl.TLS_server_method()), "SSL_CTX_new")
        self.contexts.append(context)
        control = openssl.SSL_CTX_ctrl
        openssl.check(control(context, openssl.CTRL_MIN_PROTO_VERSION, self.least_version, None), "least TLS version")
        openssl.check(openssl.SSL_CTX_set_cipher_list(context, CIPHERS), "cipher list")
        if not any(control(context, openssl.CTRL_GROUPS_LIST, 0, ctypes.c_char_p(groups)) == 1 for groups in GROUPS):
            raise CredentialsError(f"this OpenSSL ({openssl.version}) has no X25519: {openssl.reason()}")
        openssl.ERR_clear_error()
        # Tickets hold all that resuming takes, sealed with a key that all workers have from the context they share.
        control(context, openssl.CTRL_SESS_CACHE_MODE, openssl.SESS_CACHE_OFF, None)
        openssl.SSL_CTX_set_session_id_context(context, SESSION_ID_CONTEXT, len(SESSION_ID_CONTEXT))
        # A connection can use up one ticket and gives one back: with HTTP/1.1 nobody needs more.
        openssl.SSL_CTX_set_num_tickets(context, 1)
        # Without it an idle connection would keep 34 KiB of buffers.
        control(context, openssl.CTRL_MODE, openssl.MODE_RELEASE_BUFFERS, None)
        openssl.SSL_CTX_set_options(context, openssl.OP_NO_COMPRESSION | openssl.OP_NO_RENEGOTIATION)
        openssl.SSL_CTX_set_alpn_select_cb(context, self.callbacks.alpn, None)
        if self.log_secrets:
            openssl.SSL_CTX_set_keylog_callback(context, self.callbacks.keylog)
        return context

    def use(self, context, chain, key, certificate_file, key_file):
        openssl = self.openssl
        if openssl.SSL_CTX_use_certificate(context, chain[0]) != 1:
            raise CredentialsError(f"{certificate_file}: OpenSSL refuses the certificate: {openssl.reason()}")
        if openssl.SSL_CTX_use_PrivateKey(context, key) != 1 or openssl.SSL_CTX_check_private_key(context) != 1:
            fits = [i for i, other in enumerate(chain, 1) if openssl.X509_check_private_key(other, key) == 1]
            openssl.ERR_clear_error()
            advice = (f"it is that of certificate {fits[0]} in it, and the server's own certificate has to be the first"
                      if fits else "give --tls-key for each --tls-cert, in the same order")
            raise CredentialsError(f"{key_file} is not the key of {certificate_file}: {advice}")
        for certificate in chain[1:]:
            if openssl.SSL_CTX_ctrl(context, openssl.CTRL_CHAIN_CERT, 1, certificate) != 1:
                raise CredentialsError(f"{certificate_file}: OpenSSL refuses a certificate of the chain: "
                                       f"{openssl.reason()}")

    # files

    @contextlib.contextmanager
    def opened(self, path):
        """A BIO over the contents of a file, which are wiped afterwards."""
        try:
            with open(path, "rb", buffering=0) as file:
                contents, size = bytearray(LARGEST_FILE), 0
                while got := file.readinto(memoryview(contents)[size:]):    # a pipe gives it in pieces
                    size += got
        except OSError as error:
            raise CredentialsError(f"cannot read {path}: {error.strerror}") from None
        bio = self.openssl.BIO_new_mem_buf(ctypes.byref(ctypes.c_char.from_buffer(contents)), size)
        try:
            yield bio
        finally:
            self.openssl.BIO_free(bio)
            self.openssl.ERR_clear_error()
            wipe(contents)

    def read_chain(self, path):
        """The certificates (X509 pointers) in a PEM file, the server's own first."""
        openssl, chain = self.openssl, []
        with self.opened(path) as bio:
            while certificate := openssl.PEM_read_bio_X509(bio, None, None, None):
                chain.append(certificate)
            reason = openssl.reason()
        if reason != NO_MORE:
            raise CredentialsError(f"{path}: certificate {len(chain) + 1} in it is damaged: {reason}")
        if not chain:
            raise CredentialsError(f"{path} holds no certificate in PEM (-----BEGIN CERTIFICATE-----)")
        if openssl.X509_cmp_current_time(openssl.X509_get0_notAfter(chain[0])) < 0:
            self.warnings.append(f"the certificate in {path} has expired: browsers will refuse it")
        if openssl.X509_cmp_current_time(openssl.X509_get0_notBefore(chain[0])) > 0:
            self.warnings.append(f"the certificate in {path} is not valid yet: browsers will refuse it")
        for i, (certificate, issuer) in enumerate(itertools.pairwise(chain), 1):
            if openssl.X509_check_issued(issuer, certificate) != openssl.X509_V_OK:
                self.warnings.append(f"{path}: certificate {i + 1} in it has not issued certificate {i}: the server's "
                                     "own has to be the first, and behind each the one that has issued it")
                break
        return chain

    def read_key(self, path):
        """The private key (EVP_PKEY pointer) in a PEM file."""
        self.callbacks.encrypted = False
        with self.opened(path) as bio:
            key = self.openssl.PEM_read_bio_PrivateKey(bio, None, self.callbacks.password, None)
        if key:
            return key
        if self.callbacks.encrypted:
            raise CredentialsError(f"the key in {path} is encrypted: 'openssl pkey -in {path} -out FILE' decrypts it")
        raise CredentialsError(f"{path} holds no private key in PEM (-----BEGIN PRIVATE KEY-----)")

    def sort(self, key):
        """The curve of a key of ECDSA, else its algorithm, as OpenSSL calls them."""
        name = ctypes.create_string_buffer(64)
        if self.openssl.EVP_PKEY_get_group_name(key, name, len(name), None) == 1:
            return name.value.decode()
        self.openssl.ERR_clear_error()
        return self.openssl.EVP_PKEY_get0_type_name(key).decode()

    # names

    def names(self, certificate):
        """The DNS names in subjectAltName, in lower case and in order (RFC 6125 section 6.4: nothing else counts)."""
        openssl, found = self.openssl, []
        names = openssl.X509_get_ext_d2i(certificate, openssl.NID_SUBJECT_ALT_NAME, None, None)
        kind = ctypes.c_int()
        for i in range(openssl.OPENSSL_sk_num(names) if names else 0):
            value = openssl.GENERAL_NAME_get0_value(openssl.OPENSSL_sk_value(names, i), ctypes.byref(kind))
            if kind.value == openssl.GEN_DNS:
                name = ctypes.string_at(openssl.ASN1_STRING_get0_data(value), openssl.ASN1_STRING_length(value))
                found.append(name.lower())
        openssl.GENERAL_NAMES_free(names)
        return found

    def first_name(self):
        """The host that is meant where a client names none: the first one in the first certificate that has any; b""
        where all are wildcards."""
        return next((name for name in self.by_name if not name.startswith(b"*.")), b"")

    def find(self, host):
        """The context for a host's name (bytes), or None: its own, or that of a wildcard for its first label."""
        host = host.lower().removesuffix(b".")
        return self.by_name.get(host) or self.by_name.get(b"*." + host.partition(b".")[2])

    # what OpenSSL asks during a handshake; an exception could not leave a callback, so none may begin in one

    def select_host(self, ssl, _alert, _argument):
        """RFC 6066 section 3: the context of the host that the client names; where there is none, the default."""
        host = self.openssl.SSL_get_servername(ssl, 0)
        context = self.find(host) if host else None
        if context:
            self.openssl.SSL_set_SSL_CTX(ssl, context)
        return self.openssl.TLSEXT_OK if context else self.openssl.TLSEXT_NOACK

    def select_protocol(self, _ssl, chosen, length, offered, size, _argument):
        """RFC 7301 section 3.2: what is spoken here and offered, else the alert no_application_protocol."""
        openssl = self.openssl
        found = openssl.SSL_select_next_proto(chosen, length, PROTOCOLS, len(PROTOCOLS), offered, size)
        return openssl.TLSEXT_OK if found == openssl.NPN_NEGOTIATED else openssl.TLSEXT_ALERT_FATAL


# --- ACME (RFC 8555 section 8.3): how a certificate authority sees that a host is ours

def read_acme_challenge(directory, token):
    """The content for a challenge's `token` (bytes), None where no small regular file has it.

    It is in ACME_FOLDER below `directory` (a descriptor), or in the directory itself, where other clients put it.
    """
    for folder in (ACME_FOLDER, b"") if ACME_TOKEN.fullmatch(token) else ():
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = open_challenge(folder + token, directory)
            stack.callback(os.close, fd)
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_CHALLENGE:
                return os.read(fd, LARGEST_CHALLENGE)
    return None


def open_challenge(path, directory):
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except PermissionError:
        tell_of_permissions()
        raise


@cache              # said once: strangers can ask for challenges as often as they like
def tell_of_permissions():
    log.warning("--acme-dir: there is a challenge, or a folder of challenges, that the workers' user may not read: run "
                "the ACME client with umask 022, or see --user")


# --- TLS as a server has it

class Tls(NamedTuple):
    """What connections over TLS take: made once, and for each generation with `credentials` of its own."""
    openssl: OpenSSL
    kernel_ciphers: frozenset[int]      # those that the kernel takes over
    words: str                          # where TLS is done, and why there
    tickets: TicketKeys
    callbacks: Callbacks
    credentials: Credentials | None = None


def prepare_tls(options):
    """The Tls that all generations share. Whether the kernel can encrypt is tried on a connection. Raises OpenSSLError,
    KernelTlsError."""
    openssl = OpenSSL()
    ciphers, reason = (frozenset(), "--ktls=off") if options.ktls == "off" else probe(not options.no_liburing)
    if options.ktls == "require" and reason:
        raise KernelTlsError(f"--ktls=require: {reason}")
    words = f"in userspace ({openssl.version}): {reason}"
    if ciphers:
        words = f"in the kernel (handshakes by {openssl.version})" + f", but in part: {reason}" * bool(reason)
    return Tls(openssl, ciphers, words, TicketKeys(openssl, time.time()), Callbacks())


def load_credentials(options, tls):
    """`tls` with the certificates and keys as they are in their files now. Raises CredentialsError."""
    tls.tickets.advance(time.time())
    pairs = list(zip(options.tls_cert, options.tls_key, strict=True))
    credentials = Credentials(tls.openssl, pairs, TLS1_3 if options.tls_min == "1.3" else TLS1_2, tls.tickets,
                              bool(tls.kernel_ciphers), tls.callbacks)
    for warning in credentials.warnings:
        log.warning("%s", warning)
    return tls._replace(credentials=credentials)
