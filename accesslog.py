"""The access log: a line for each response, gathered, and written in batches through the ring.

A line has three parts: who asked, when the response was sent, and the rest, which depends on request and response
alone and can be remembered with them. No byte of a client's can break a line or leave its field.
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import stat
import sys
import time
from functools import lru_cache

from linux import address_of
from options import UsageError

log = logging.getLogger("tarweb")

MAX_WAITING = 1 << 20           # bytes that wait to be written; beyond that new lines are dropped
LARGEST_WRITE = 256 * 1024      # bytes written at once to a file
PIPE_BUF = 4096                 # bytes that are written at once to a pipe, or not at all (pipe(7)): a line's limit
MAX_TARGET, MAX_FIELD = 1500, 700               # bytes of a request line and of each field in a line, escaped
ENOUGH = 900                    # parts of lines that are worth a write
MEMO_BLOCK, MEMO_BLOCKS = 2048, 1024            # bytes of a header block that is remembered, and how many are
STANDARD_OUTPUT = 1
RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC

FIELDS = [re.compile(rb"(?i)\r\n%b:[ \t]*([^\r\n]*)" % name) for name in (b"host", b"referer", b"user-agent")]
UNSAFE = re.compile(rb'[^ !#-\[\]-~]')          # control characters, quote, backslash, all that is not ASCII


def open_log(path):
    """A descriptor for the access log. Raises UsageError."""
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


class AccessLog:
    """Writes to descriptor `fd` in `style`, "combined" or "json"; writes complete with `tag`: then `on_written`.
    `channel`: the socket through which the parent passes another file for it, or None. `forwarders`: the proxy.Networks
    whose requests say who has sent them, or None.

    The loop adds to `lines` three parts for each response, and calls `flush` when there are more than `enough`.
    written, dropped: lines. busy: whether something is being written, or waits to be.
    """

    enough = ENOUGH

    def __init__(self, ring, fd, style, tag, channel=None, forwarders=None):
        self.ring, self.fd, self.tag, self.channel = ring, fd, tag, channel
        self.spare = os.dup(fd) if channel else -1      # keeps room for the descriptor of another file
        self.json, self.forwarders = style == "json", forwarders
        if forwarders is not None:
            from proxy import forwarded_for
            self.forwarded_for = forwarded_for
        self.at_once = largest_write(fd)
        self.lines: list[bytes] = []
        self.known_fields = lru_cache(MEMO_BLOCKS)(self.fields)
        self.waiting = bytearray()      # whole lines, but perhaps for the first, of which a part is written
        self.in_flight = b""            # kept alive for the kernel
        self.begun = self.failing = False       # whether `waiting` begins with the rest of a line; no write succeeds
        self.renewed = False                    # whether another file has come since the last write
        self.written = self.dropped = 0
        self.set_date(time.time())

    # lines

    def client(self, address):
        """The first part, for a client's address as text; b"" stands for a unix socket's."""
        return (b'{"remote":"%b","time":"' if self.json else b"%b - - [") % (address or b"unix:")

    def forwarded(self, connection):
        """The first part, as the head of a connection's request says."""
        return self.client(self.forwarded_for(connection.head, self.forwarders, connection.peer))

    def set_date(self, now):
        # %b is in English: nothing calls setlocale(3), and what Python sets at its start is LC_CTYPE alone.
        layout = '%Y-%m-%dT%H:%M:%SZ",' if self.json else "%d/%b/%Y:%H:%M:%S +0000] "
        self.date = time.strftime(layout, time.gmtime(now)).encode()

    def describe(self, head, status, size):
        """The third part, for a request head as it came, perhaps cut off, and `size` bytes of content sent."""
        line, _, block = head.partition(b"\r\n")
        host, tail = (self.known_fields if len(block) <= MEMO_BLOCK else self.fields)(block)
        if not self.json:
            return b'"%b" %d %b%b' % (clean(line, MAX_TARGET) or b"-", status, b"%d" % size if size else b"-", tail)
        method, _, rest = line.partition(b" ")
        target, _, protocol = rest.rpartition(b" ")
        if not target:                          # malformed: all of it is taken for the target
            method, target, protocol = b"", line, b""
        return b'"method":%b,"target":%b,"protocol":%b%b,"status":%d,"bytes":%d%b' % (
            quoted(method, 40), quoted(target, MAX_TARGET), quoted(protocol, 40), host, status, size, tail)

    def fields(self, block):
        """(host, the end of a line) for a header block: the same for all that a given client asks."""
        fields = b"\r\n" + block
        host, *others = [match[1] if (match := pattern.search(fields)) else None for pattern in FIELDS]
        if self.json:
            return (b',"host":%b' % quoted(host, 260),
                    b',"referer":%b,"agent":%b}\n' % tuple(quoted(value, MAX_FIELD) for value in others))
        return b"", b' "%b" "%b"\n' % tuple(b"-" if value is None else clean(value, MAX_FIELD) for value in others)

    # writing

    @property
    def busy(self):
        return bool(self.in_flight or self.waiting)

    def tick(self, now):
        self.set_date(now)
        self.flush()

    def flush(self):
        """Write what there is, unless that is being done: then it waits, or as many lines as there is room for."""
        if self.lines:
            data, room = b"".join(self.lines), max(0, MAX_WAITING - len(self.waiting))
            self.lines.clear()
            if len(data) > room:
                kept = data.rfind(b"\n", 0, room) + 1
                self.dropped += data.count(b"\n", kept)
                data = data[:kept]
            self.waiting += data
        if self.waiting and not self.in_flight:
            self.write()

    def write(self):
        """As many whole lines as go at once."""
        if self.renewed and self.begun:         # the rest of a line in another file
            del self.waiting[:self.waiting.find(b"\n") + 1]
            self.dropped += 1
            self.begun = False
        self.renewed = False
        size = len(self.waiting)
        if not size:
            return
        if size > self.at_once:
            size = self.waiting.rfind(b"\n", 0, self.at_once) + 1 or self.waiting.find(b"\n") + 1
        self.in_flight = bytes(self.waiting[:size])
        del self.waiting[:size]
        self.ring.arm_write(self.tag, self.fd, address_of(self.in_flight), size)

    def on_written(self, result):
        data, self.in_flight = self.in_flight, b""
        self.waiting[:0] = data[max(0, result):]
        if result > 0:
            self.written += data.count(b"\n", 0, result)
            self.begun = data[result - 1:result] != b"\n"
            self.failing = False
            if self.waiting:                # `lines` wait for more of them
                self.write()
        elif -result not in (errno.EAGAIN, errno.EINTR, errno.ECANCELED):       # else the next tick tries again
            if not self.failing:
                log.warning("access log: %s: lines are dropped until it can be written to",
                            os.strerror(-result or errno.EIO))
            self.failing = True
            # Drop what waits, but for the rest of a line that has been begun: it comes first, if anything ever does.
            kept = self.waiting.find(b"\n") + 1 if self.begun else 0
            self.dropped += self.waiting.count(b"\n", kept)
            del self.waiting[kept:]


    def take_file(self):
        """The log has been opened anew: the file that the parent has passed takes the place of the one before, which
        still gets what has been gathered."""
        self.flush()
        self.ring.flush(self.ring.entries)      # or it would be written to the new one
        os.close(self.spare)
        try:
            _, [(_, _, passed)], *_ = self.channel.recvmsg(1, socket.CMSG_LEN(4), RECEIVE_FLAGS)
        except (OSError, ValueError):           # nothing has been passed
            os.dup2(self.fd, self.spare, inheritable=False)
            return
        self.spare = int.from_bytes(passed, sys.byteorder)
        os.dup2(self.spare, self.fd, inheritable=False)
        self.at_once, self.renewed = largest_write(self.fd), True


def largest_write(fd):
    """Bytes that may be written at once. A worker may ask where a descriptor is, but not for its type."""
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return PIPE_BUF
    return LARGEST_WRITE


def clean(value, limit):
    """`value` in at most `limit` bytes of ASCII, none of which ends a quoted field; what is cut is cut between two."""
    value = value[:limit]
    if not UNSAFE.search(value):
        return value
    escaped = UNSAFE.sub(lambda match: b"\\x%02X" % match[0][0], value)
    last = escaped.rfind(b"\\", 0, limit)
    return escaped[:last if last > limit - 4 else limit]


def quoted(value, limit):
    """`value` as a string in JSON, of at most `limit` bytes; null for None."""
    if value is None:
        return b"null"
    value = value[:limit]
    if not UNSAFE.search(value):
        return b'"%b"' % value
    text = value.decode("utf-8", "backslashreplace")
    while len(json.dumps(text)) > limit + len('""'):
        text = text[:len(text) * 3 // 4]
    return json.dumps(text).encode()
