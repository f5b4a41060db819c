"""Connections over TLS, from the handshake to close_notify: a Worker that OpenSSL or the kernel encrypts for.

Once a handshake is done and the kernel has its keys, a connection is served like one in plaintext: by the loop in
`conn.py`, with the same plans and the same operations. Where the kernel does not take over, `sealed.py` stands between.

Facts about the hand-over to the kernel
  * While OpenSSL reads, there is a single receive in flight at the most, so that none can take, undecrypted, what the
    kernel is to decrypt. What has come behind the handshake's end is read by OpenSSL, and counted; if it ends within a
    record, exactly the missing bytes are received.
  * OpenSSL's last bytes, TLS_TX and TLS_RX are linked: one submission, and each happens only if the one before it
    has succeeded completely (MSG_WAITALL makes a failure of a short send). There is one completion for all: those that
    are to be skipped on success make none, and when one of these fails, those linked behind it make none either.
"""

import collections
import errno
import logging
import time

import linux
import ktls
from linux import CQE_BUFFER_SHIFT, CQE_SKIP_SUCCESS, LAST_WORDS, LINK, MSG_NOSIGNAL, SEND_FLAGS
from conn import PASSING
from door import CANCEL, RECV, SEND
from http1 import HttpError
from ktls import ALERT, CLOSE_NOTIFY, INFO_SIZE, ULP, USER_CANCELED
from sealed import LOAD, SEALED, WRAPPED, SealedWorker
from state import ACCEPTED, BYTES, CLOSING, HANDSHAKE, IDLE, LINGER, SECURED, UNSECURED
from tls import TlsError

log = logging.getLogger("tarweb")

# Tags, as in conn.py and sealed.py.
FLIGHT, KEYS, CONTROL, GOODBYE, ATTACH = (operation << 24 for operation in range(11, 16))

ROOM_AT_ONCE = 8 * 1024         # bytes of a response behind which there is sure to be room for some more at once
CONTROL_SIZE = 64               # bytes of a record that is no application data: the rest of it is of no interest
PLAIN_HTTP = "this port speaks HTTPS: write https:// in front of the address"


class SecureWorker(SealedWorker):
    """A Worker that speaks TLS on its listeners, but on those in `plain` plain HTTP, where `plain_site` answers."""

    def __init__(self, plain, plain_site, **more):
        super().__init__(**more)
        self.plain, self.plain_site = plain, plain_site
        self.sites.append(plain_site)
        self.ulp = linux.address_of(ULP), len(ULP)
        self.close_notify = ktls.close_notify()
        self.last_words: collections.deque = collections.deque()    # (the ring's tail behind it, what is to be sent)

    def run(self):
        super().run()
        counts = self.counts
        log.info("TLS connections: %d in the kernel, %d in userspace, %d resumed, %d failed handshakes, %d truncated",
                 counts.kernel_full + counts.kernel_resumed, counts.userspace_full + counts.userspace_resumed,
                 counts.kernel_resumed + counts.userspace_resumed, counts.handshakes_failed, counts.truncated)

    def on_tick(self):
        super().on_tick()
        self.engine.credentials.renew_tickets(time.time())

    def on_other(self, operation, slot, generation, result, flags):
        """The completions that TLS adds to those of `conn.py`."""
        if not WRAPPED <= operation <= ATTACH:
            super().on_other(operation, slot, generation, result, flags)
            return
        connection = self.connections[slot]
        if generation != connection.generation:
            self.on_stale(flags)
        elif operation == WRAPPED:
            self.on_wrapped(connection, result, flags)
        elif operation == SEALED:
            self.on_sealed(connection, result)
        elif operation == LOAD:
            self.on_loaded(connection, result)
        elif operation in (FLIGHT, KEYS):
            self.on_flight(connection, operation, result)
        elif operation == CONTROL:
            self.on_control(connection, result)
        elif operation == GOODBYE:
            self.on_goodbye(connection)
        elif operation == ATTACH:           # it completes only if it has failed
            connection.attached = False

    # the handshake

    def welcome(self, connection, listener):
        connection.reads, connection.sends, connection.message_flags = WRAPPED, SEND, SEND_FLAGS
        if listener in self.plain:
            connection.site = self.plain_site
            self.move(connection, ACCEPTED)
            return
        connection.site = self.site
        self.move(connection, UNSECURED)
        connection.attached = bool(self.engine.kernel_ciphers)
        if connection.attached:
            self.ring.arm_setsockopt(ATTACH | connection.slot, connection.generation, connection.slot, ktls.ATTACH,
                                     self.ulp, CQE_SKIP_SUCCESS)

    def on_wrapped(self, connection, result, flags):
        """Bytes that are no request yet: of a handshake, or encrypted. (Those for the plain listener are one.)"""
        if result <= 0:
            self.on_receive_end(connection, result, flags)
            return
        i, session = flags >> CQE_BUFFER_SHIFT, connection.tls
        if session is not None and connection.state is not HANDSHAKE and not (session.at_end or session.ended):
            self.on_ciphertext(connection, session, i, result, flags)
            return
        data = self.ring.pool[i * self.ring.buffer_size:i * self.ring.buffer_size + result]
        self.ring.give_back(i)
        self.on_bytes(connection, data, flags)

    def on_bytes(self, connection, data, flags):
        if connection.state is not HANDSHAKE:
            self.on_data(connection, data, flags)
            return
        connection.receiving = False
        if connection.tls is None and data[:1].isalpha():      # RFC 8446 section 5.1: a handshake record begins with 22
            connection.site = self.plain_site
            self.refuse(connection, HttpError(400, PLAIN_HTTP))
            self.go_on(connection)
        else:
            self.on_handshake(connection, data)

    def on_handshake(self, connection, data):
        """Bytes for OpenSSL, in order: those of the handshake, then those that came before the kernel took over."""
        try:
            if connection.tls is None:
                connection.tls = self.engine.start(connection.attached)
            session = connection.tls
            if session.established:
                connection.pending += self.engine.feed(session, data)
            else:
                connection.pending += self.engine.handshake(session, data)
        except TlsError as error:
            self.on_handshake_failure(connection, error)
        else:
            self.proceed(connection, session)

    def on_handshake_failure(self, connection, reason):
        self.count_failure(reason)
        self.end(connection)

    def count_failure(self, reason):
        self.counts.handshakes_failed += 1
        log.debug("handshake failed: %s", reason)

    def proceed(self, connection, session):
        """Do what a handshake needs next, unless a send is in flight: its completion comes here again."""
        if not connection.sending:
            if session.established and session.to_kernel and not session.wanted:
                self.hand_over(connection, session)
            elif session.output and not session.can_wait:
                self.arm_flight(connection, session)
            elif session.established and not session.to_kernel:
                self.establish(connection, session)
                return
        self.go_on(connection)

    def arm_flight(self, connection, session, flags=0):
        """Send what OpenSSL has to say."""
        session.flight, session.output = session.output, b""
        connection.sending, connection.sends = True, FLIGHT
        self.ring.arm_send(FLIGHT | connection.slot, connection.generation, connection.slot,
                           linux.address_of(session.flight), len(session.flight), SEND_FLAGS, flags)

    def hand_over(self, connection, session):
        """Give the kernel the keys: the facts above say how the parts of this depend on each other."""
        self.ring.reserve(3)
        size = self.engine.derive_keys(session)
        connection.sending, connection.sends = True, KEYS
        if session.output:
            self.arm_flight(connection, session, LINK | CQE_SKIP_SUCCESS)
        at = linux.address_of(session.keys)
        for option, address, flags in ((ktls.SEND_KEYS, at, LINK | CQE_SKIP_SUCCESS),
                                       (ktls.RECEIVE_KEYS, at + INFO_SIZE, 0)):
            self.ring.arm_setsockopt(KEYS | connection.slot, connection.generation, connection.slot, option,
                                     (address, size), flags)

    def on_flight(self, connection, operation, result):
        """What OpenSSL had to say is sent (a FLIGHT alone), or the kernel has its keys (KEYS), or something failed."""
        session = connection.tls
        connection.sending = False
        if connection.state is CLOSING:
            self.free_if_ended(connection)
        elif operation == KEYS and result == 0:
            self.engine.hand_over(session)
            self.establish(connection, session)
        elif operation == FLIGHT and result == len(session.flight):
            self.proceed(connection, session)
        else:
            session.ended = True            # it cannot be known what the client would make of more bytes
            self.on_handshake_failure(connection, errno.errorcode.get(-result, "a send fell short"))

    def establish(self, connection, session):
        """Both sides are done with the handshake; what has come behind it is a request, or the beginning of one."""
        connection.sends = SEND
        counts = self.counts
        if session.in_kernel:
            connection.reads, connection.message_flags = RECV, MSG_NOSIGNAL     # MSG_WAITALL is refused
            counts.kernel_resumed += session.resumed
            counts.kernel_full += not session.resumed
        else:
            self.engine.forget_secrets(session)
            counts.userspace_resumed += session.resumed
            counts.userspace_full += not session.resumed
        self.move(connection, SECURED)
        if connection.pending:
            self.move(connection, BYTES)
            self.advance(connection)
        if session.at_end:
            self.on_last_data(connection)
        elif connection.state is IDLE:
            self.receive(connection, multishot=False)       # as for any first request
        else:
            self.go_on(connection)

    # receiving

    def go_on(self, connection):
        """As ever; but in a handshake receive piece by piece, and only while OpenSSL is to have what comes."""
        if connection.state is not HANDSHAKE:
            super().go_on(connection)
        elif not connection.receiving:
            session = connection.tls
            if session is None or not session.established or session.wanted:
                connection.receiving = True
                self.ring.arm_recv(WRAPPED | connection.slot, connection.generation, connection.slot, False,
                                   session.wanted if session else 0)

    def on_receive_end(self, connection, result, flags):
        session = connection.tls
        if session is not None and connection.state is not CLOSING:
            if session.in_kernel and result == -errno.EIO:
                self.receive_control(connection, session)
                return
            if result == 0:
                self.on_fin(session)
                if connection.state is HANDSHAKE and session.established:
                    self.stay_in_userspace(connection, session)
                    return
            elif -result not in PASSING:
                session.ended = True        # there is nobody left to say it to
                if not session.established:
                    self.count_failure(errno.errorcode.get(-result, result))
        super().on_receive_end(connection, result, flags)

    def on_fin(self, session):
        """The client's last byte has come; whether it said before that it would be the last (RFC 8446 section 6.1)."""
        if not session.established:
            self.count_failure("the client has gone")
        elif not (session.at_end or session.ended):
            self.counts.truncated += 1
            log.debug("a client has gone without close_notify")

    def stay_in_userspace(self, connection, session):
        """The rest of a record that the kernel was waiting for will not come; what came before it is still answered."""
        connection.receiving = session.to_kernel = False
        session.at_end = True
        self.proceed(connection, session)

    def receive_control(self, connection, session):
        """The kernel has a record that is no application data: fetch it."""
        session.control = ktls.record_message(CONTROL_SIZE)
        connection.receiving, connection.reads = True, CONTROL
        self.ring.arm_recvmsg(CONTROL | connection.slot, connection.generation, connection.slot,
                              session.control.address)

    def on_control(self, connection, result):
        """An alert; or a KeyUpdate or the wish to renegotiate, after which the kernel can receive no more."""
        session = connection.tls
        connection.receiving, connection.reads = False, RECV
        kind, content = ktls.received_record(session.control, max(result, 0))
        if result <= 0 or connection.state is CLOSING:
            self.on_receive_end(connection, result, 0)
        elif kind == ALERT and content[1:] == USER_CANCELED:    # RFC 8446 section 6.1: close_notify follows
            self.go_on(connection)
        elif kind == ALERT and content[1:] != CLOSE_NOTIFY:
            log.debug("a client sent alert %s", content[1:].hex())
            session.ended = True
            self.end(connection)
        else:
            session.at_end = True
            self.on_last_data(connection)

    # ending

    def on_timeout(self, connection):
        if connection.state is HANDSHAKE:
            self.count_failure("it took too long")
        super().on_timeout(connection)

    def on_send_failure(self, connection, result):
        if connection.tls is not None:
            connection.tls.ended = True     # close_notify would say that the response was whole
        super().on_send_failure(connection, result)

    def finish(self, connection, linger=False):
        """Linger where the kernel may have no room left for close_notify behind the last response."""
        session = connection.tls
        in_kernel = session is not None and session.in_kernel
        super().finish(connection, linger or in_kernel and connection.plan.total > ROOM_AT_ONCE)

    def close_our_side(self, connection):
        """After close_notify, where that has not gone with the last response; then `on_goodbye` goes on."""
        if self.arm_last_words(connection, GOODBYE | connection.slot, connection.generation, MSG_NOSIGNAL, 0):
            connection.sending, connection.sends = True, GOODBYE
        else:
            super().close_our_side(connection)

    def on_goodbye(self, connection):
        connection.sending = False
        if connection.state is LINGER and (connection.at_end or self.stopping and not connection.unread):
            self.end(connection)
            return
        if connection.state is LINGER:
            super().close_our_side(connection)
        self.go_on(connection)

    def say_goodbye(self, connection):
        """Where there is room at once (MSG_DONTWAIT), as there is when nothing has been sent for a while.

        So it is over when the kernel takes what is armed next, closing the socket perhaps. It completes only if it
        fails, which is as uninteresting as that a cancel does.
        """
        self.arm_last_words(connection, CANCEL, 0, LAST_WORDS, CQE_SKIP_SUCCESS)

    def arm_last_words(self, connection, tag, generation, message_flags, flags):
        """Send close_notify (RFC 8446 section 6.1), or the alert that OpenSSL has for the client; tell whether there is
        anything to be said."""
        session, ring = connection.tls, self.ring
        if session is None or session.ended:
            return False
        if session.in_kernel:
            session.ended = True
            ring.arm_sendmsg(tag, generation, connection.slot, self.close_notify.address, message_flags, flags)
            return True
        session.flight = words = self.engine.end(session)
        if words:
            ring.arm_send(tag, generation, connection.slot, linux.address_of(words), len(words), message_flags, flags)
            self.keep_until_taken(words)
        return bool(words)

    def keep_until_taken(self, words):
        """Keep what was armed last until the kernel has taken the entry, and so copied it: the session may be gone."""
        self.last_words.append((self.ring.tail, words))
        while self.last_words[0][0] <= self.ring.submitted:
            self.last_words.popleft()

    def let_go(self, connection):
        if connection.tls is not None:
            self.engine.free(connection.tls)
        super().let_go(connection)
