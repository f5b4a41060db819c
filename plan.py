"""Plans: replies laid out in memory that the kernel can send as they stand.

A plan is a msghdr over [status line, Server, Date][header fields][body spans in the mapped archive]. It holds
nothing of the connection, so one plan serves any number of connections at once, and it never changes: only the
Date does, in the piece that all plans of one status share.

Lifetime: whoever has sent a plan keeps a reference to it until the send has completed. Python's own reference
count then frees its memory, never earlier.
"""

import mmap
import sys
from http import HTTPStatus

import linux
from http1 import format_date
from reply import Whole

PIECE = 512 * 1024          # bytes in one send: large enough for few completions, small enough to time a slow reader
LAZY_PIECE = 128 * 1024     # the same, where it may have to be read from a disk: others wait while it is copied
MEMO_PLANS = 8 << 20        # bytes of plans remembered: those of about 10,000 files
MEMO_REQUESTS = 6 << 20     # bytes of requests remembered
PLAN_OVERHEAD = 320         # bytes for a plan's objects in Python, roughly
REQUEST_OVERHEAD = 200      # bytes for a request's, likewise
MEMO_REQUEST = 2048         # a request longer than this is parsed each time
SEEN_BITS = 16              # 64 KiB to tell what has come before from what comes for the first time
EMPTY_SECONDS = 60          # a full memory is emptied as often as this
WARM_SECONDS = 5            # how long what was in memory is taken to be there still
LAZY_MEMO = 64 * 1024       # a response of more bytes from a lazy archive is not remembered
NO_RESULT = 1 << 31         # what no operation returns: results are signed 32-bit, and errors are negative
STATUS_SLOT = 192           # bytes for each status line with the fields that go with all


class StatusHeads:
    """Status line, Server, Date and perhaps `more` fields for each status, in memory where the Date is patched.

    "HH:MM:SS" is 8 bytes and lies on an 8-byte boundary: it changes in one store, so that a kernel thread
    (SQPOLL) that sends it meanwhile takes the old time or the new one. (The date before it changes at
    midnight only, and there a reader could in principle see a mix.)
    """

    def __init__(self, server, now, more=b""):
        self.memory = mmap.mmap(-1, STATUS_SLOT * len(HTTPStatus))
        self.words = memoryview(self.memory).cast("Q")
        self.base = linux.address_of(self.memory)
        self.server, self.more = server, more
        self.heads = {}             # status -> (address, length)
        self.date_places = []       # offsets in `memory`
        self.date = format_date(now)

    def get(self, status):
        """(address, length) of the head of a response with `status`."""
        return self.heads.get(status) or self.make(status)

    def make(self, status):
        before = b"HTTP/1.1 %d %b\r\nServer: %b\r\nDate: " % (status, HTTPStatus(status).phrase.encode(), self.server)
        time_at = len(before) + len(b"Mon, 01 Jan 2024 ")
        start = STATUS_SLOT * len(self.heads) + -time_at % 8
        head = before + self.date + b"\r\n" + self.more
        assert -time_at % 8 + len(head) <= STATUS_SLOT
        self.memory[start:start + len(head)] = head
        self.date_places.append(start + len(before))
        self.heads[status] = self.base + start, len(head)
        return self.heads[status]

    def tick(self, now):
        """Let the Date of all be `now` (seconds since the epoch)."""
        date = format_date(now)
        day, time = date[:17], int.from_bytes(date[17:25], sys.byteorder)
        for place in self.date_places:
            if day != self.date[:17]:
                self.memory[place:place + 17] = day
            self.words[(place + 17) // 8] = time
        self.date = date


class Plan:
    """A Reply in memory. `address` is its msghdr's, which covers the first `room` bytes of `total`."""

    __slots__ = ("address", "close", "content", "dated", "done", "lazy", "memory", "plaintext", "room", "segments",
                 "status", "tally", "total")

    def __init__(self, reply, status_head, tally, lazy=False):
        """One block of memory holds msghdr, iovecs and then every byte that is not in an archive.

        tally: where responses with this status are counted. lazy: whether some of it may have to be read from a disk.
        """
        self.status, self.tally, self.lazy = reply.status, tally, lazy
        self.room = LAZY_PIECE if lazy else PIECE
        spans = [span for span in (reply.head, *reply.body) if isinstance(span, bytes) or span[1]]
        own = b"".join(span for span in spans if isinstance(span, bytes))
        self.memory = bytearray(linux.message_size(len(spans) + 1) + len(own))
        self.address = linux.address_of(self.memory)
        at = self.address + len(self.memory) - len(own)
        self.memory[-len(own):] = own
        segments = [status_head]                # (address, length) of all there is to send
        for span in spans:
            if isinstance(span, bytes):
                segments.append((at, len(span)))
                at += len(span)
            else:
                segments.append(span)
        self.total = sum(length for _, length in segments)
        self.content = self.total - status_head[1] - len(reply.head)        # bytes behind the header
        self.segments = segments if self.total > self.room else None
        linux.write_message(self.memory, self.address, first_piece(segments, self.room))
        self.close = reply.close
        self.plaintext = self.dated = None      # all of it in one piece, and of when, where it is encrypted by OpenSSL
        # What the first send returns when nothing more is to be done: then the connection waits for a request.
        self.done = NO_RESULT if self.close or self.segments else self.total

    def spans(self):
        """All there is to send, as (address, length)."""
        return self.segments or linux.read_message(self.memory)

    def piece(self, sent):
        """The segments of what is sent next, after `sent` bytes."""
        return [self.locate(sent)] if sent else first_piece(self.spans(), self.room)

    def locate(self, sent):
        """(address, length) of what to send after `sent` bytes, at most one piece."""
        for address, length in self.spans():
            if sent < length:
                return address + sent, min(length - sent, self.room)
            sent -= length
        raise IndexError(sent)


def first_piece(segments, room):
    """The segments that lie in the first `room` bytes."""
    piece = []
    for address, length in segments:
        if room:
            piece.append((address, min(length, room)))
            room -= min(length, room)
    return piece


class Planner:
    """Makes plans and remembers them: by reply, and by the exact bytes of the request that got it.

    Both memories are bounded. When one is full, each newcomer takes the place of the latest one, so that a flood of
    requests that come once pushes out nothing that comes again and again; and what was full is emptied now and then,
    so that what is no longer asked for goes too.
    """

    def __init__(self, library, spell_out, server, now, more=b""):
        """library: the archives (see archive.Library) that replies' spans are in. spell_out: a Whole's Reply."""
        self.library, self.spell_out = library, spell_out
        self.tallies = [[0] for _ in range(6)]      # responses, by the first digit of their status
        self.lines = {}                             # for some of `by_request`: what the access log says of it
        self.warmed = now
        self.status_heads = StatusHeads(server, now, more)
        self.by_reply = {}
        self.by_request = {}
        self.seen = bytearray(1 << SEEN_BITS)       # for each hash's low bits, some others of the last that came
        self.plan_room, self.request_room = MEMO_PLANS, MEMO_REQUESTS
        self.emptied = now

    def plan(self, reply):
        """The Plan of a Reply or Whole."""
        return self.by_reply.get(reply) or self.make(reply)

    def make(self, reply):
        spelled = self.spell_out(reply) if isinstance(reply, Whole) else reply
        plan = Plan(spelled, self.status_heads.get(spelled.status), self.tallies[spelled.status // 100],
                    self.library.lazy and self.library.is_lazy(spelled.body))
        size = PLAN_OVERHEAD + len(plan.memory) * (2 if spelled is reply else 1)
        if self.plan_room < size:
            self.by_reply.popitem()
        else:
            self.plan_room -= size
        self.by_reply[reply] = plan
        return plan

    def remember(self, request, plan):
        """From its third time on, `request` (the bytes of one whole request without a body) gets `plan` at once."""
        size = REQUEST_OVERHEAD + len(request)
        if len(request) > MEMO_REQUEST or plan.lazy and plan.total > LAZY_MEMO or not self.came_before(hash(request)):
            return
        if self.request_room < size:
            gone, _ = self.by_request.popitem()
            self.lines.pop(gone, None)
        else:
            self.request_room -= size
        self.by_request[request] = plan

    def came_before(self, code):
        """Whether a request of this hash came lately. Now and then wrong, which costs or saves one parsing."""
        place, mark = code & (1 << SEEN_BITS) - 1, code >> SEEN_BITS & 0xFF
        if self.seen[place] == mark:
            return True
        self.seen[place] = mark
        return False

    def tick(self, now):
        """Once a second: the Date, and room for what is new."""
        self.status_heads.tick(now)
        full = self.plan_room < MEMO_PLANS // 8 or self.request_room < MEMO_REQUESTS // 8
        if full and now - self.emptied > EMPTY_SECONDS:
            self.forget()
            self.emptied = now
        if self.library.lazy and now - self.warmed > WARM_SECONDS:
            self.forget_requests()          # so that it is looked again whether what they get is in memory
            self.warmed = now

    def forget(self):
        """Drop all plans; those being sent live until they are."""
        self.by_reply.clear()
        self.plan_room = MEMO_PLANS
        self.forget_requests()

    def forget_requests(self):
        self.by_request.clear()
        self.lines.clear()
        self.request_room = MEMO_REQUESTS


class ForgetfulPlanner(Planner):
    """A Planner for what may be answered otherwise the next time: nothing that it has made is given again."""

    def make(self, reply):
        plan = super().make(reply)
        self.forget()
        return plan

    def remember(self, request, plan):
        pass
