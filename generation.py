"""A generation: what one load makes for workers to serve, and whether the files that it was made of have changed."""

import contextlib
import fcntl
import json
import logging
import os
import stat
import time

import linux
from credentials import Callbacks, Credentials, TicketKeys
from ktls import KernelTlsError, probe
from openssl import TLS1_2, TLS1_3, OpenSSL
from options import UsageError
from sites import Identity, Sites

STANDARD_OUTPUT = 1

log = logging.getLogger("tarweb")


class Generation:
    """Archives, TLS and the access log, as the command line asks for them.

    prepared: what prepare_tls gave. sites: Sites. tls: what an Engine takes, or None. log_fd: of the access log, or
    None. Of a `previous` Generation, what has not changed is taken over; with `same_sites` all but the access log.
    Raises ArchiveError, CredentialsError, UsageError, OpenSSLError, OSError.
    """

    def __init__(self, arguments, prepared=None, previous=None, same_sites=False):
        self.arguments = arguments
        self.error = ""                     # why the last attempt to replace this one failed
        self.log_fd = open_log(arguments.access_log)
        self.tls = None
        try:
            if same_sites:
                self.sites, self.tls, self.tls_words = previous.sites, previous.tls, previous.tls_words
                self.credentials_were = previous.credentials_were
            else:
                self.credentials_were = [Identity.of(path) for path in (*arguments.tls_cert, *arguments.tls_key)]
                self.tls, self.tls_words = open_tls(arguments, prepared)
                if self.tls and not previous:
                    log.info("TLS %s", self.tls_words)
                self.sites = Sites(arguments, previous and previous.sites)
                for archive in self.sites.opened:
                    for note in archive.notes:
                        log.warning("%s: %s", archive.path, note)
        except BaseException:
            self.close_tls_but(previous)
            close_log(self.log_fd)
            raise
        self.loaded = [archive.identity for _, archive in self.sites.newest()] + self.credentials_were
        self.seen = self.tried = self.loaded
        self.spoilt = False                 # whether an archive has been written to in place
        self.inotify = linux.open_inotify()
        for _, archive in self.sites.newest():
            if not archive.copied:
                linux.report_writes(self.inotify, archive.fd)

    @property
    def scheme(self):
        return "https" if self.tls else "http"

    def close_all_but(self, other):
        """Let go of what this generation has and the `other`, if any, has not."""
        if other is None or self.sites is not other.sites:
            self.sites.close_all_but(other and other.sites)
        self.close_tls_but(other)
        close_log(self.log_fd)
        if self.inotify >= 0:
            os.close(self.inotify)

    def close_tls_but(self, other):
        if self.tls and not (other and self.tls is other.tls):
            self.tls[1].close()

    # the files

    def look(self):
        """What the files are now: with --watch those of this name, else those that are open."""
        archives = [archive for _, archive in self.sites.newest()]
        if not self.arguments.watch:
            return [Identity.of(archive.fd) for archive in archives] + self.credentials_were
        paths = self.arguments.tls_cert + self.arguments.tls_key
        return [Identity.of(path) for path in [archive.path for archive in archives] + paths]

    def changed(self):
        """To be asked once a second: whether a file has changed, has stayed so for a second, and has not been tried to
        be loaded like that."""
        before, self.seen = self.seen, self.look()
        if not self.spoilt:
            self.look_for_damage()
        return self.seen == before and self.seen not in (self.loaded, self.tried)

    def in_flux(self):
        """Whether an archive has been written to since this was asked last."""
        try:
            return bool(os.read(self.inotify, 4096))
        except OSError:
            return False

    def look_for_damage(self):
        for _, archive in self.sites.newest():
            if Identity.of(archive.fd) != archive.identity and not archive.copied:
                self.spoilt = True
                log.error("%s has been written to in place, so responses from it may be wrong; it will be read anew. "
                          "To replace an archive, write another file and mv it there", archive.path)

    def failed(self, reason):
        """It could not be replaced."""
        self.tried, self.error = self.seen, reason

    # in words

    def words(self):
        """3 files, 12.3 kB, from site.tar"""
        archives = [archive for _, archive in self.sites.newest()]
        count, length = sum(archive.files for archive in archives), sum(archive.bytes for archive in archives)
        return f"{count} files, {size(length)}, from {', '.join(dict.fromkeys(a.path for a in archives))}"

    def as_json(self, version, number, urls):
        """What the status page tells of it."""
        sites = [{"host": host, "path": archive.path, "files": archive.files, "bytes": archive.bytes,
                  "size": archive.size, "mtime": archive.identity.mtime // 10 ** 9, "etag": archive.digest,
                  "generation": number} for host, archive in self.sites.newest()]
        return json.dumps({"version": version, "sites": sites, "tls": self.tls_words, "listeners": urls,
                           "error": self.error})


def prepare_tls(arguments):
    """What all generations share: (OpenSSL, the ciphers that the kernel takes over, where TLS is done, TicketKeys,
    Callbacks); None without --tls-cert. Whether the kernel can is tried on a connection. Raises OpenSSLError,
    KernelTlsError."""
    if not arguments.tls_cert:
        return None
    openssl = OpenSSL()
    ciphers, words = where_to_encrypt(arguments, openssl)
    return openssl, ciphers, words, TicketKeys(time.time()), Callbacks()


def open_tls(arguments, prepared):
    """(what an Engine takes: OpenSSL, the Credentials, the ciphers that the kernel takes over; where TLS is done).

    (None, "") without --tls-cert. Raises CredentialsError.
    """
    if prepared is None:
        return None, ""
    openssl, ciphers, words, tickets, callbacks = prepared
    tickets.advance(time.time())
    credentials = Credentials(openssl, list(zip(arguments.tls_cert, arguments.tls_key, strict=True)),
                              TLS1_3 if arguments.tls_min == "1.3" else TLS1_2, tickets, bool(ciphers), callbacks)
    for warning in credentials.warnings:
        log.warning("%s", warning)
    return (openssl, credentials, ciphers), words


def where_to_encrypt(arguments, openssl):
    """(the ciphers that the kernel takes over, where TLS is done and why)."""
    ciphers: frozenset = frozenset()
    reason = "--ktls=off"
    if arguments.ktls != "off":
        ciphers, reason = probe(not arguments.no_liburing)
    if arguments.ktls == "require" and reason:
        raise KernelTlsError(f"--ktls=require: {reason}")
    if ciphers:
        return ciphers, f"in the kernel (handshakes by {openssl.version})" + f", but in part: {reason}" * bool(reason)
    return ciphers, f"in userspace ({openssl.version}): {reason}"


def open_log(path):
    """A descriptor for the access log; None without one. Raises UsageError."""
    if path is None:
        return None
    if path == "-":
        if stat.S_ISREG(os.fstat(STANDARD_OUTPUT).st_mode):     # or workers would write over each other's lines
            flags = fcntl.fcntl(STANDARD_OUTPUT, fcntl.F_GETFL)
            fcntl.fcntl(STANDARD_OUTPUT, fcntl.F_SETFL, flags | os.O_APPEND)
        return STANDARD_OUTPUT
    try:        # O_NONBLOCK: a FIFO that nobody reads is an error, not a wait
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)
    except OSError as error:
        raise UsageError(f"--access-log {path}: {error.strerror}") from None
    os.set_blocking(fd, True)
    return fd


def close_log(fd):
    if fd not in (None, STANDARD_OUTPUT):
        with contextlib.suppress(OSError):
            os.close(fd)


def size(count):
    """`count` bytes for people: 45.6 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000 ** power:.1f} {' kMG'[power]}B"
