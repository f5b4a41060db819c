"""TLS for the black-box tests: a client that decides which bytes go out when, and a server that is told to speak TLS.

The client's TLS is Python's ssl over memory BIOs, so between it and the socket every byte passes through our hands.
"""

import contextlib
import os
import re
import select
import socket
import ssl
import subprocess
import threading
import time
from typing import NamedTuple

from support import PATIENCE, Client, Server

# What to pass as --ktls: set it to `auto` to run the same tests in the kernel where that is possible.
KTLS = os.environ.get("TARWEB_KTLS", "off")

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23     # RFC 8446 section 5.1
ALERTS = {  # RFC 8446 section 6
    "unexpected_message": 10, "bad_record_mac": 20, "record_overflow": 22, "handshake_failure": 40,
    "illegal_parameter": 47, "decode_error": 50, "protocol_version": 70, "no_application_protocol": 120,
}


def client_context(root, version=None, ciphers=None, alpn=(), curve=None):
    """What a client that trusts `root` brings to a handshake; `version` is the only one it speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(root)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF    # with it, an end without close_notify would look like one
    if version:
        context.minimum_version = context.maximum_version = VERSIONS[version]
    if ciphers:
        context.set_ciphers(ciphers)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if curve:
        context.set_ecdh_curve(curve)
    return context


class Truncated(ConnectionError):
    """The connection ended, and no close_notify said that it would."""


class TlsSocket:
    """TLS on a connected socket, with as much of a socket's interface as support.Client needs.

    `cut` is called with all bytes that are to go out together and gives the pieces in which they go.
    """

    def __init__(self, raw, context, name, session=None, cut=lambda data: [data]):
        self.raw, self.cut, self.held = raw, cut, False
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name, session=session)

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def handshake(self, hold=False):
        """Do it. With `hold`, the client's last flight stays here, to leave with the first data that is sent."""
        try:
            self.advance(self.tls.do_handshake)
        finally:
            self.held = hold
            self.flush()

    def advance(self, operation, *arguments):
        """Call until it no longer wants bytes of the server; what the client has to say in between is sent."""
        while True:
            try:
                return operation(*arguments)
            except ssl.SSLWantReadError:
                self.flush()
                self.fill()

    def flush(self):
        data = b"" if self.held else self.outgoing.read()
        for piece in self.cut(data) if data else ():
            self.raw.sendall(piece)

    def fill(self):
        data = self.raw.recv(1 << 18)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def encrypt(self, data):
        """The bytes that would go out for this one, with what is held back before them."""
        self.tls.write(data)
        return self.outgoing.read()

    def sendall(self, data):
        self.held = False
        self.tls.write(data)
        self.flush()

    def recv(self, size):
        """Bytes, or b"" after close_notify. Raises Truncated when the connection ends without one."""
        try:
            return self.advance(self.tls.read, size)
        except ssl.SSLZeroReturnError:      # what the same end is called after our own close_notify
            return b""
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING":
                raise Truncated from None
            raise

    def close_notify(self):
        """Say that nothing more will be sent; the server's words can still be read."""
        self.say_last(b"")

    def say_last(self, data):
        """Send this and close_notify together."""
        if data:
            self.tls.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.flush()


class TlsClient(Client):
    """support.Client over TLS. Its at_end() is true only if the server says close_notify before it closes."""

    def __init__(self, address, context, name="localhost", session=None, cut=lambda data: [data], hold=False,
                 **options):
        super().__init__(address, **options)
        try:
            self.sock = TlsSocket(self.sock, context, name, session, cut)
            self.sock.handshake(hold)
        except BaseException:
            self.close()
            raise

    @property
    def tls(self):
        return self.sock.tls

    @contextlib.contextmanager
    def sending(self, data):
        """Meanwhile another thread sends this. It is encrypted before, since Python's ssl is not for two threads."""
        sender = threading.Thread(target=send_until_closed, args=[self.sock.raw, self.sock.encrypt(data)])
        sender.start()
        yield
        sender.join()

    def half_close(self):
        self.sock.close_notify()
        self.sock.raw.shutdown(socket.SHUT_WR)

    def truncate(self):
        """End our side as an attacker would: a FIN, and no close_notify before it."""
        self.sock.raw.shutdown(socket.SHUT_WR)

    def readable(self, seconds):
        """Whether bytes of HTTP (or the end) come within that time; other records do not count."""
        deadline = time.monotonic() + seconds
        while not self.pending:
            try:
                self.pending = self.tls.read(1 << 18)
                return True
            except ssl.SSLWantReadError:
                if not select.select([self.sock.raw], [], [], max(0, deadline - time.monotonic()))[0]:
                    return False
                self.sock.fill()
            except ssl.SSLError:        # no clean end, and an end
                return True
        return True

    def cut_off(self):
        """Read to the end of a response that the server gave up; the bytes that still came."""
        received = [self.pending]
        try:
            while piece := self.sock.recv(1 << 18):
                received.append(piece)
        except (Truncated, ConnectionResetError):
            return b"".join(received)
        raise AssertionError("the server said close_notify after a response that it had cut off")


def send_until_closed(sock, data):
    with contextlib.suppress(OSError):
        sock.sendall(data)


class Counts(NamedTuple):
    """What the servers' last lines add up to."""

    kernel: int
    userspace: int
    resumed: int
    failed: int
    truncated: int

    @property
    def connections(self):
        return self.kernel + self.userspace


LAST_LINE = re.compile(r"^tarweb: TLS connections: (\d+) in the kernel, (\d+) in userspace, (\d+) resumed, "
                       r"(\d+) failed handshakes, (\d+) truncated$", re.M)


class TlsServer(Server):
    """The real process with --tls-cert. `pairs` are its certificates, the first one the default."""

    def __init__(self, tar, *flags, pairs, ktls=KTLS, **options):
        certificates = [flag for pair in pairs for flag in pair.flags]
        mode = ("--ktls", ktls) if ktls else ()
        self.root = str(pairs[0].root)
        self.context = client_context(self.root)
        super().__init__(tar, *certificates, *mode, *flags, **options)
        self.redirect_port = None
        if "--redirect-http" in flags:
            self.redirect_line = self.read_line(10)
            self.redirect_port = int(re.search(r"http://[^/]+:(\d+)/ redirects", self.redirect_line)[1])

    def context_of(self, **options):
        return client_context(self.root, **options)

    def connect(self, context=None, **options):
        return TlsClient(("127.0.0.1", self.port), context or self.context, **options)

    def connect_raw(self, port=None, **options):
        """Plain TCP to the same port, for what is no TLS (or to `port`)."""
        return Client(("127.0.0.1", port or self.port), **options)

    def ended(self):
        """Stop it, and give the sum of its workers' last lines."""
        self.stop()
        lines = LAST_LINE.findall(self.stderr())
        assert lines, self.stderr()
        return Counts(*(sum(map(int, column)) for column in zip(*lines, strict=True)))


def client_hello(context, name="localhost"):
    """The first bytes that a client with this context sends."""
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=name).do_handshake()
    return hello.read()


def records(data):
    """[(content type, fragment)] of bytes that are whole TLS records (RFC 8446 section 5.1)."""
    found = []
    while data:
        size = int.from_bytes(data[3:5])
        assert len(data) >= 5 + size, f"half a record: {data[:20]!r}"
        found.append((data[0], data[5:5 + size]))
        data = data[5 + size:]
    return found


def s_client(server, *flags, name="localhost", say=b""):
    """Run openssl s_client to its end, with `say` as its input; all that it printed."""
    ended = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-servername", name, "-CAfile", server.root,
         *flags], input=say, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE, check=False)
    return ended.stdout.decode(errors="replace")


def alert_of(client):
    """Read until the server ends the connection; the alert by which it did, or None where it only closed."""
    try:
        while client.sock.recv(1 << 16):
            pass
    except Truncated:
        return None
    except ssl.SSLError as error:
        return alert_name(error)
    return "close_notify"


def alert_name(error):
    """What RFC 8446 calls the alert that OpenSSL reports as `tlsv1 alert bad record mac` or the like."""
    found = re.search(r"\balert ([a-z ]+)\b", str(error))
    return found[1].strip().replace(" ", "_") if found else None
