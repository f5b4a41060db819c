"""Plans: replies laid out in memory as the kernel sends them; and sites, which answer requests with plans.

A plan is a msghdr over [status line, Server, Date][header fields][body spans in the mapped archive]. It holds nothing
of a connection, so it serves any number at once; only the Date changes, in the piece that plans of one status share.

Lifetime: whoever has sent a plan keeps a reference to it until the send has completed; with the last one it is freed.
"""

import mmap
import re
import sys
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

import linux
from http1 import format_date
from reply import FullResponse, Reply, error_reply, field_lines

SEND_SIZE = 512 * 1024      # bytes in one send: large enough for few completions, small enough to time a slow reader
COLD_SEND_SIZE = 128 * 1024 # the same, where it may have to be read from a disk: others wait while it is copied
MEMO_PLANS = 8 << 20        # bytes of plans remembered: those of about 10,000 files
MEMO_REQUESTS = 6 << 20     # bytes of requests remembered
# What the objects in Python take of a plan, of a request, of each header field and span in a Reply, and of a path that
# leads to a plan; bytes, roughly.
PLAN_OVERHEAD, REQUEST_OVERHEAD, FIELD_OVERHEAD, SPAN_OVERHEAD, PATH_OVERHEAD = 320, 200, 60, 130, 400
MEMO_REQUEST = 2048         # a request longer than this is parsed each time
SEEN_BITS = 16              # 64 KiB to tell what has come before from what comes for the first time
EMPTY_SECONDS = 60          # a full memory is emptied as often as this
WARM_SECONDS = 5            # how long what was in memory is taken to be there still
LAZY_MEMO = 64 * 1024       # a response of more bytes from a lazy archive is not remembered
NEVER = float("inf")        # seconds since the epoch
NO_RESULT = 1 << 31         # what no operation returns: results are signed 32-bit, and errors are negative
STATUS_SLOT = 192           # bytes for each status line with the fields that go with all
PORT = re.compile(rb":[0-9]*$")         # of a Host field


class StatusHeads:
    """Status line, Server, Date and `more` fields for each status, in memory where the Date is patched.

    "HH:MM:SS" is 8 bytes and lies on an 8-byte boundary: it changes in one store, so a kernel thread (SQPOLL) takes the
    old time or the new one. (The day before it changes at midnight only; there it could in principle see a mix.)
    """

    def __init__(self, server, wall, more=()):
        """server: bytes. wall: seconds since the epoch. more: (name, value) pairs."""
        self.memory = mmap.mmap(-1, STATUS_SLOT * len(HTTPStatus) * 2)
        self.words = memoryview(self.memory).cast("Q")
        self.server, self.more = server, more
        self.heads = {}             # what `get` has given
        self.date_places = []       # offsets in `memory`
        self.date = format_date(wall)

    def get(self, status, bare=False):
        """(address, length) of the head of a response with `status`; `bare`: without `more`."""
        key = -status if bare else status
        if key in self.heads:
            return self.heads[key]
        before = b"HTTP/1.1 %d %b\r\nServer: %b\r\nDate: " % (status, HTTPStatus(status).phrase.encode(), self.server)
        time_at = len(before) + len(b"Mon, 01 Jan 2024 ")
        start = STATUS_SLOT * len(self.heads) + -time_at % 8
        head = before + self.date + b"\r\n" + field_lines(() if bare else self.more)
        assert -time_at % 8 + len(head) <= STATUS_SLOT
        self.memory[start:start + len(head)] = head
        self.date_places.append(start + len(before))
        self.heads[key] = linux.address_of(self.memory) + start, len(head)
        return self.heads[key]

    def tick(self, wall):
        """Let the Date of all be `wall` (seconds since the epoch)."""
        date = format_date(wall)
        day, time = date[:17], int.from_bytes(date[17:25], sys.byteorder)
        for place in self.date_places:
            if day != self.date[:17]:
                self.memory[place:place + 17] = day
            self.words[(place + 17) // 8] = time
        self.date = date


def header_section(reply):
    """All that follows the status line in HTTP/1.1 (RFC 9112 section 2.1), but for what StatusHeads adds."""
    modified = ((b"Last-Modified", format_date(reply.modified)),) if reply.modified else ()
    lines = field_lines((*reply.fields, *modified))
    return b"%bConnection: %b\r\n\r\n" % (lines, reply.connection) if reply.connection else lines + b"\r\n"


class Plaintext(NamedTuple):
    """All of a small plan in one piece of memory, for TLS in userspace."""

    memory: bytearray
    pointer: object         # to its first byte, as OpenSSL takes it
    head_address: int       # of the status head in StatusHeads: it is copied from there again when the Date has changed
    head_length: int


class Plan:
    """A Reply in memory. `address` is its msghdr's, which covers the first `send_size` bytes of `total`."""

    __slots__ = ("address", "close", "content", "dated", "done", "lazy", "memory", "plaintext", "segments",
                 "send_size", "status", "tally", "total")

    def __init__(self, reply, status_head, tally, lazy=False):
        """One block of memory holds msghdr, iovecs and then every byte that is not in an archive. tally: where
        responses with this status are counted. lazy: whether some of it may have to be read from a disk."""
        self.status, self.tally, self.lazy = reply.status, tally, lazy
        self.send_size = COLD_SEND_SIZE if lazy else SEND_SIZE
        header = header_section(reply)
        own = b"".join([header, *[span for span in reply.body if isinstance(span, bytes)]])
        room = linux.message_size(len(reply.body) + 2)
        self.memory = bytearray(bytes(room) + own)
        self.address = linux.address_of(self.memory)
        at = self.address + room
        segments = [status_head]                # (address, length) of all there is to send
        for span in (header, *reply.body):
            if isinstance(span, bytes):
                span, at = (at, len(span)), at + len(span)
            if span[1]:
                segments.append(span)
        self.total = sum(length for _, length in segments)
        self.content = self.total - status_head[1] - len(header)        # bytes behind the header
        self.segments = segments if self.total > self.send_size else None
        linux.write_message(self.memory, self.address, first_piece(segments, self.send_size))
        self.close = reply.close
        self.plaintext = self.dated = None      # its Plaintext, and the Date in that, where OpenSSL encrypts it
        # What the first send returns when nothing more is to be done: then the connection waits for a request.
        self.done = NO_RESULT if self.close or self.segments else self.total

    def spans(self):
        """All there is to send, as (address, length)."""
        return self.segments or linux.read_message(self.memory)

    def piece(self, sent):
        """The segments of what is sent next, after `sent` bytes."""
        return [self.locate(sent)] if sent else first_piece(self.spans(), self.send_size)

    def locate(self, sent):
        """(address, length) of what to send after `sent` bytes, at most one piece."""
        for address, length in self.spans():
            if sent < length:
                return address + sent, min(length - sent, self.send_size)
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


class Memo:
    """What the sites of a worker share: the Date, counts, and plans, remembered by reply and by the bytes of a request.

    Both are bounded, for all sites together. When one is full, each newcomer takes the latest one's place, so requests
    that come once push out nothing that comes often; and it is emptied now and then, for what is no longer asked for.
    """

    def __init__(self, library, server, wall, more=()):
        """library: the archives (see archive.Library) that replies' spans are in. All else is as in StatusHeads."""
        self.library = library
        self.status_heads = StatusHeads(server, wall, more)
        self.tallies = [[0] for _ in range(6)]      # responses, by the first digit of their status
        self.plans = []                             # of each site two dicts, since sites may answer differently
        self.newest = {}                            # that one of them which the latest plan is in
        self.by_request = {}
        self.lines = {}                             # for some of `by_request`: what the access log says of it
        self.seen = bytearray(1 << SEEN_BITS)       # for each hash's low bits, some others of the last that came
        self.plan_room, self.request_room = MEMO_PLANS, MEMO_REQUESTS
        self.emptied = self.warmed = wall
        self.now = int(wall)                        # as Date says
        self.next_modified = NEVER                  # the earliest date that a plan does not tell, because it is later

    def make(self, plans, key, reply):
        """Make the Plan of a Reply; keep it in a site's `plans` under `key`, the Reply again or its FullResponse.

        Last-Modified is left out while it would be later than Date (RFC 9110 section 8.8.2.1): see `tick`."""
        modified = reply.modified
        if modified > self.now:
            self.next_modified = min(self.next_modified, modified)
            reply = reply._replace(modified=0)
        plan = Plan(reply, self.status_heads.get(reply.status, reply.bare), self.tallies[reply.status // 100],
                    self.library.lazy and self.library.is_lazy(reply.body))
        size = PLAN_OVERHEAD + len(plan.memory)
        if isinstance(key, Reply):
            size += len(plan.memory) + FIELD_OVERHEAD * len(reply.fields) + SPAN_OVERHEAD * len(reply.body)
        else:
            size += SPAN_OVERHEAD * len(plan.segments or ())
        if self.plan_room < size:
            self.newest.popitem()
        else:
            self.plan_room -= size
        plans[key] = plan
        self.newest = plans
        return plan

    def keep(self, plans, key, plan):
        """Keep a Plan that `make` has made in a site's `plans` under one more `key`, which begins with a path; but only
        while half of the room is left, because for many files it is better used for their plans."""
        if self.plan_room > MEMO_PLANS // 2:
            self.plan_room -= PATH_OVERHEAD + len(key[0])
            plans[key] = plan

    def remember(self, request, plan):
        """From its third time on, `request` (the bytes of one whole request without a body) gets `plan` at once."""
        if not self.came_before(hash(request)):         # as most have not, where they differ
            return
        if len(request) > MEMO_REQUEST or plan.lazy and plan.total > LAZY_MEMO or request in self.by_request:
            return
        size = REQUEST_OVERHEAD + len(request)
        if self.request_room < size:
            gone, _ = self.by_request.popitem()
            self.lines.pop(gone, None)
        else:
            self.request_room -= size
        self.by_request[request] = plan

    def came_before(self, code):
        """Whether a request of this hash came lately. Now and then wrong, which costs or saves one parsing."""
        place, mark = code & (1 << SEEN_BITS) - 1, code >> SEEN_BITS & 0xFF
        last, self.seen[place] = self.seen[place], mark
        return last == mark

    def tick(self, wall):
        """Once a second: the Date, and room for what is new."""
        self.status_heads.tick(wall)
        if wall < self.now or wall >= self.next_modified:       # what is later than Date has changed
            self.forget()
        self.now = int(wall)
        full = self.plan_room < MEMO_PLANS // 8 or self.request_room < MEMO_REQUESTS // 8
        if full and wall - self.emptied > EMPTY_SECONDS:
            self.forget()
            self.emptied = wall
        if self.library.lazy and wall - self.warmed > WARM_SECONDS:
            self.forget_requests()          # so that it is looked again whether what they get is in memory
            self.warmed = wall

    def forget(self):
        """Drop all plans; those being sent live until they are."""
        for plans in self.plans:
            plans.clear()
        self.plan_room, self.next_modified = MEMO_PLANS, NEVER
        self.forget_requests()

    def forget_requests(self):
        self.by_request.clear()
        self.lines.clear()
        self.request_room = MEMO_REQUESTS


class ForgetfulMemo(Memo):
    """A Memo that remembers nothing: for sites that may answer otherwise the next time."""

    def make(self, plans, key, reply):
        plan = super().make(plans, key, reply)
        self.forget()
        return plan

    def keep(self, plans, key, plan):
        pass

    def remember(self, request, plan):
        pass


class Site:
    """Answers the requests for one host with plans.

    reply: gives the Reply or FullResponse for a Request. expand: gives the Reply that a FullResponse stands for.
    What the Memo does for all sites is here too, so that a connection has to know its site only: `known` gives the Plan
    for the exact bytes of a request, or None; `lines` has for some of these what the access log says of them.
    over_tls: the Site that answers in its place where a PROXY header says that the client speaks TLS, if it does not
    itself.
    """

    over_tls: "Site | None" = None

    def __init__(self, memo, reply, expand=None):
        self.memo, self.answer, self.expand = memo, reply, expand
        self.reply = reply                      # the same, until `close_all`
        self.by_reply: dict = {}
        self.by_path: dict = {}                 # plans of whole files, by all that they depend on in a request
        memo.plans += [self.by_reply, self.by_path]
        self.known, self.remembers, self.lines = memo.by_request.get, memo.by_request.__contains__, memo.lines
        self.remember, self.forget, self.tick = memo.remember, memo.forget, memo.tick
        self.tallies, self.status_heads = memo.tallies, memo.status_heads

    def respond(self, request):
        """The Plan for a Request whose body, if any, has been read past."""
        method, path, _, connection, _, fields = request
        if fields.conditional or fields.expect is not None:
            return self.plan(self.reply(request))
        key = path, method, connection, fields.codings
        return self.by_path.get(key) or self.respond_anew(key, request)

    def respond_anew(self, key, request):
        reply = self.reply(request)
        plan = self.plan(reply)
        if isinstance(reply, FullResponse):
            self.memo.keep(self.by_path, (bytes(key[0]), *key[1:]), plan)       # without the `raw` of a Decoded
        return plan

    def refuse(self, status, reason):
        """The Plan of an error where there is no Request to answer. The connection ends with it."""
        return self.plan(error_reply(status, reason))

    def interim(self):
        return self.plan(Reply(100, (), ()))        # Continue

    def plan(self, reply):
        """The Plan of a Reply or FullResponse."""
        return self.by_reply.get(reply) or self.make(reply)

    def make(self, reply):
        return self.memo.make(self.by_reply, reply, self.expand(reply) if isinstance(reply, FullResponse) else reply)

    def close_all(self):
        """From now on each response is the last on its connection."""
        self.forget()
        self.reply = lambda request: self.answer(request._replace(connection=b"close"))
        if self.over_tls:
            self.over_tls.close_all()

    def share_no_requests(self):
        """Neither remember requests by their bytes nor know those that other sites remember: it answers otherwise."""
        self.known = self.remembers = lambda head: None
        self.remember, self.lines = lambda head, plan: None, {}


class VirtualHosts(Site):
    """Has each request answered by the Site of its host. sites: by name, in lower case; "*.example.com" stands for all
    names with one more label, b"" for all others."""

    def __init__(self, memo, sites):
        super().__init__(memo, partial(error_reply, 421, "there is no such host here"))     # RFC 9110 section 15.5.20
        self.sites = sites

    def respond(self, request):
        site = self.find(request.fields.host or b"")
        return site.respond(request) if site else super().respond(request)

    def find(self, host):
        """The Site for a Host field's value, or None."""
        name = PORT.sub(b"", host).lower().removesuffix(b".")
        label, _, rest = name.partition(b".")
        return self.sites.get(name) or label and self.sites.get(b"*." + rest) or self.sites.get(b"")

    def close_all(self):
        super().close_all()
        for site in self.sites.values():
            site.close_all()


def make_site(memo, responders):
    """The Site, or VirtualHosts, for reply.Responders by host: b"" stands for all others."""
    made = {responder: Site(memo, responder.reply, responder.expand) for responder in responders.values()}
    sites = {host: made[responder] for host, responder in responders.items()}
    return sites[b""] if list(sites) == [b""] else VirtualHosts(memo, sites)
