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
from http1 import QUERY, essence, format_date, host_name, plain_fields, plain_request, split_head, without_conditions
from reply import NO_CACHE, FullResponse, Reply, error_reply, field_lines, text_reply

SEND_SIZE = 512 * 1024      # bytes in one send: large enough for few completions, small enough to time a slow reader
COLD_SEND_SIZE = 128 * 1024 # the same, where it may have to be read from a disk: others wait while it is copied
MEMO_PLANS = 8 << 20        # bytes of plans remembered: those of about 10,000 files
MEMO_REQUESTS = 2 << 20     # bytes of requests remembered as they came
MEMO_BLOCKS = 4 << 20       # bytes of header blocks and request lines remembered
# Bytes, roughly, that the objects in Python of these take: a plan, each header field and span in a Reply, a request, a
# header block and a request line.
PLAN_OVERHEAD, FIELD_OVERHEAD, SPAN_OVERHEAD = 320, 60, 130
REQUEST_OVERHEAD, BLOCK_OVERHEAD, LINE_OVERHEAD = 200, 900, 150
MEMO_REQUEST = 2048         # a request or header block longer than this is parsed each time
SEEN_BITS = 16              # 64 KiB to tell what has come before from what comes for the first time
EMPTY_SECONDS = 60          # a full memory is emptied as often as this
WARM_SECONDS = 5            # how long what was in memory is taken to be there still
LAZY_MEMO = 64 * 1024       # a response of more bytes from a lazy archive is not remembered
NEVER = float("inf")        # seconds since the epoch
NO_RESULT = 1 << 31         # what no operation returns: results are signed 32-bit, and errors are negative
STATUS_SLOT = 192           # bytes for each status line with the fields that go with all
SIMPLE_RANGE = re.compile(rb"Range: bytes=([0-9]{1,15})-([0-9]{1,15})")


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
    """A response in memory. `address` is its msghdr's, which covers the first `send_size` bytes of `total`."""

    __slots__ = ("address", "close", "content", "dated", "done", "file", "lazy", "memory", "plaintext", "segments",
                 "send_size", "status", "tally", "total")

    def __init__(self, status, header, body, status_head, tally, close=False, lazy=False):
        """One block of memory holds msghdr, iovecs and then every byte that is not in an archive.

        header: all that follows `status_head` up to the body (bytes). body: spans, as in Reply. tally: where responses
        with this status are counted. lazy: whether some of it may have to be read from a disk."""
        self.status, self.tally, self.close, self.lazy = status, tally, close, lazy
        self.send_size = COLD_SEND_SIZE if lazy else SEND_SIZE
        own = b"".join([header, *[span for span in body if isinstance(span, bytes)]])
        room = linux.message_size(len(body) + 2)
        self.memory = bytearray(bytes(room) + own)
        self.address = linux.address_of(self.memory)
        at = self.address + room
        segments, total = [status_head], status_head[1]         # (address, length) of all there is to send
        for span in (header, *body):
            if isinstance(span, bytes):
                span, at = (at, len(span)), at + len(span)
            if span[1]:
                segments.append(span)
                total += span[1]
        self.total, self.content = total, total - status_head[1] - len(header)      # content: bytes behind the header
        self.segments = segments if total > self.send_size else None
        linux.write_message(self.memory, self.address,
                            first_piece(segments, self.send_size) if self.segments else segments)
        self.file = None                        # the Representation all of which it has, with status 200
        self.plaintext = self.dated = None      # its Plaintext, and the Date in that, where OpenSSL encrypts it
        # What the first send returns when nothing more is to be done: then the connection waits for a request.
        self.done = NO_RESULT if close or self.segments else total

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


class RequestMemo(dict):
    """Plans by the bytes of requests, which take `size` bytes together at most.

    When it is full, each newcomer takes the latest one's place, so that a flood pushes out nothing that comes often.
    came_before: tells of a hash. on_gone: called with each request that has to go.
    """

    def __init__(self, size, came_before, on_gone):
        super().__init__()
        self.size = self.room = size
        self.came_before, self.on_gone = came_before, on_gone

    def remember(self, request, plan):
        """From its third time on, `request` (the bytes of one whole request without a body) gets `plan` at once."""
        if not self.came_before(hash(request)):         # as most have not, where they differ
            return
        if len(request) > min(MEMO_REQUEST, self.size) or plan.lazy and plan.total > LAZY_MEMO or request in self:
            return
        taken = REQUEST_OVERHEAD + len(request)
        if self.room < taken:
            gone, _ = self.popitem()
            self.on_gone(gone)
        else:
            self.room -= taken
        self[request] = plan

    def clear(self):
        super().clear()
        self.room = self.size


class Block(dict):
    """Plans by request line, for requests of the same header block, which says `fields`."""

    def __init__(self, fields):
        super().__init__()
        self.fields = fields


class BlockMemo(dict):
    """A Block for each header block. Blocks and request lines take `size` bytes together at most; when it is full, it
    takes no new ones. came_before: as in RequestMemo."""

    def __init__(self, size, came_before):
        super().__init__()
        self.size = self.room = size
        self.came_before = came_before

    def read(self, text):
        """The Block of a header block, remembered from its third time on; None where it is not plain."""
        fields = plain_fields(text)
        if fields is None:
            return None
        block = Block(fields)
        self.alias(text, block)
        return block

    def alias(self, text, block):
        """From its third time on, a header block that means the same is that Block, too."""
        taken = BLOCK_OVERHEAD + len(text)
        if len(text) <= MEMO_REQUEST and self.room >= taken and self.came_before(hash(text)):
            self.room -= taken
            self[text] = block

    def remember(self, block, line, plan):
        """From its third time on, that request line with that Block gets `plan`."""
        taken = LINE_OVERHEAD + len(line)
        if self.room >= taken and self.came_before(hash(line)):
            self.room -= taken
            block[line] = plan

    def clear(self):
        super().clear()
        self.room = self.size


class Memo:
    """What the sites of a worker share: the Date, counts, and plans, remembered by reply and by requests.

    All of it is bounded, for all sites together, and emptied now and then where it is full, for what is no longer asked
    for.
    """

    sizes = MEMO_REQUESTS, MEMO_BLOCKS

    def __init__(self, library, server, wall, more=()):
        """library: the archives (see archive.Library) that replies' spans are in. All else is as in StatusHeads."""
        self.library = library
        self.status_heads = StatusHeads(server, wall, more)
        self.tallies = [[0] for _ in range(6)]      # responses, by the first digit of their status
        self.plans = []                             # a dict for each site, since sites may answer differently
        self.newest = {}                            # that one of them which the latest plan is in
        self.lines: dict = {}                       # for some of `requests`: what the access log says of them
        self.seen = bytearray(1 << SEEN_BITS)       # for each hash's low bits, some others of the last that came
        requests, blocks = self.sizes
        self.requests = RequestMemo(requests, self.came_before, lambda request: self.lines.pop(request, None))
        self.blocks = BlockMemo(blocks, self.came_before)
        self.plan_room = MEMO_PLANS
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
        plan = self.lay_out(reply.status, header_section(reply), reply.body, reply.close, reply.bare)
        size = PLAN_OVERHEAD + len(plan.memory)
        if isinstance(key, FullResponse):
            plan.file = key.chosen
            size += SPAN_OVERHEAD * len(plan.segments or ())
        else:
            size += len(plan.memory) + FIELD_OVERHEAD * len(reply.fields) + SPAN_OVERHEAD * len(reply.body)
        if self.plan_room < size:
            self.newest.popitem()
        else:
            self.plan_room -= size
        plans[key] = plan
        self.newest = plans
        return plan

    def lay_out(self, status, header, body, close, bare=False):
        """A Plan, as its parameters say (`bare`: see Reply), that is not kept."""
        return Plan(status, header, body, self.status_heads.get(status, bare), self.tallies[status // 100], close,
                    self.library.lazy and self.library.is_lazy(body))

    def lay_out_part(self, whole, first, last):
        """206 with the bytes from `first` up to `last` of the file that the Plan `whole` has all of; None where that is
        not as simple as it nearly always is. It is not kept: the next one differs."""
        length, spans = whole.file.length, whole.spans()
        size = min(last + 1, length) - first
        if len(spans) != 3 or whole.file.coding or not 0 < size <= COLD_SEND_SIZE or whole.lazy:
            return None
        status_head, (header_at, header_size), (body_at, _) = spans
        at = header_at - whole.address
        before, found, after = whole.memory[at:at + header_size].partition(b"\r\nContent-Length: %d\r\n" % length)
        if not found:
            return None
        header = b"%b\r\nContent-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\n%b" % (
            before, first, first + size - 1, length, size, after)
        bare = status_head != self.status_heads.get(200)
        return self.lay_out(206, header, ((body_at + first, size),), whole.close, bare)

    def came_before(self, code):
        """Whether something of this hash came lately. Now and then wrong, which costs or saves one parsing."""
        place, mark = code & (1 << SEEN_BITS) - 1, code >> SEEN_BITS & 0xFF
        last, self.seen[place] = self.seen[place], mark
        return last == mark

    def tick(self, wall):
        """Once a second: the Date, and room for what is new."""
        self.status_heads.tick(wall)
        if wall < self.now or wall >= self.next_modified:       # what is later than Date has changed
            self.forget()
        self.now = int(wall)
        full = self.plan_room < MEMO_PLANS // 8 or any(
            memory.room < memory.size // 8 for memory in (self.requests, self.blocks))
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
        for memory in (self.requests, self.blocks, self.lines):
            memory.clear()


class ForgetfulMemo(Memo):
    """A Memo that remembers nothing: for sites that may answer otherwise the next time."""

    sizes = 0, 0

    def make(self, plans, key, reply):
        plan = super().make(plans, key, reply)
        self.forget()
        return plan


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
        self.memo, self.expand = memo, expand
        self.reply = self.persistent_reply = reply      # the same, until `close_all`
        self.by_reply: dict = {}
        self.turn = 0                           # counts header blocks that differ from known ones in what varies
        memo.plans.append(self.by_reply)
        self.known, self.remembers, self.lines = memo.requests.get, memo.requests.__contains__, memo.lines
        self.remember, self.forget, self.tick = memo.requests.remember, memo.forget, memo.tick
        self.blocks = memo.blocks
        self.tallies, self.status_heads = memo.tallies, memo.status_heads

    def answer(self, data):
        """The Plan for `data`, bytes that are not `known`, where this is one whole request that can be answered without
        a look for what is in memory, and not otherwise the next time; else None."""
        line, text = split_head(data)
        block = self.blocks.get(text)
        if block is None:
            return self.answer_text(line, text) if line and self.blocks.size else None
        plan = block.get(line)
        if plan is None:
            return self.answer_line(line, block)
        self.remember(data, plan)
        return plan

    def answer_text(self, line, text):
        """The Plan for a request line with a header block that is not known."""
        core = essence(text)
        block = self.blocks.get(core)
        if block is None:
            return self.answer_conditional(line, core)
        self.turn = self.turn + 1 & 7
        if not self.turn:                       # such a block seldom comes again: one in eight is considered
            self.blocks.alias(text, block)
        return block.get(line) or self.answer_line(line, block)

    def answer_line(self, line, block):
        """The Plan for a request line with that Block: a file's is the same for any query."""
        start, mark, _ = line.partition(b"?")
        if mark and QUERY.fullmatch(line, len(start)):
            general = start + b" HTTP/1.1"
            plan = block.get(general) or self.answer_line(general, block)
            if plan and plan.file:
                return plan
        request = plain_request(line, block.fields)
        plan = request and self.respond(request)
        if plan is None or plan.lazy:
            return None
        if self.memo.plan_room > MEMO_PLANS // 16:      # or it might not be kept, and so not be counted
            self.blocks.remember(block, line, plan)
        return plan

    def answer_conditional(self, line, text):
        """The Plan for a request line with a header block that may have lines of If-None-Match or Range, where those
        without are known."""
        general, conditions = without_conditions(text)
        block = self.blocks.get(general)
        if block is None:
            block = self.blocks.read(general)
        if block is None:
            return None
        plan = block.get(line) or self.answer_line(line, block)
        if not conditions or plan is None or plan.status == 404:
            return plan
        if plan.file is not None and not block.fields.conditional:
            ranges = simple_ranges(conditions, plan.file.etag)
            part = self.memo.lay_out_part(plan, *ranges[0]) if ranges else plan
            if part is not None and ranges is not None:
                return part
        block = self.blocks.read(text)
        return None if block is None else self.answer_line(line, block)

    def respond(self, request):
        """The Plan for a Request whose body, if any, has been read past."""
        return self.plan(self.reply(request))

    def refuse(self, status, reason, head_only=False):
        """The Plan of an error where there is no Request to answer. The connection ends with it."""
        return self.plan(text_reply(status, reason, (NO_CACHE,), head_only, b"close"))

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
        self.reply = lambda request: self.persistent_reply(request._replace(connection=b"close"))
        if self.over_tls:
            self.over_tls.close_all()

    def share_no_requests(self):
        """Neither remember requests by their bytes nor know those that other sites remember: it answers otherwise."""
        self.known = self.remembers = lambda head: None
        self.remember, self.lines = lambda head, plan: None, {}
        self.blocks = BlockMemo(0, self.memo.came_before)


def simple_ranges(conditions, etag):
    """What of a file with that entity tag lines of If-None-Match and Range ask for: [(first, last)], or [] for all of
    it; None where that takes a closer look."""
    ranges = []
    for line in conditions:
        if line.startswith(b"If-None-Match"):
            if etag in line or b"*" in line:        # else the client has something else
                return None
        elif match := SIMPLE_RANGE.fullmatch(line):
            ranges.append((int(match[1]), int(match[2])))
        else:
            return None
    return ranges if len(ranges) < 2 else None


class VirtualHosts(Site):
    """Has each request answered by the Site of its host. sites: by name, in lower case; "*.example.com" stands for all
    names with one more label, b"" for all others."""

    def __init__(self, memo, sites):
        super().__init__(memo, partial(error_reply, 421, "there is no such host here"))     # RFC 9110 section 15.5.20
        self.sites = sites

    def respond(self, request):
        site = self.find(request.fields.host)
        return site.respond(request) if site else super().respond(request)

    def find(self, host):
        """The Site for a Host field's value, or None."""
        name = host_name(host)
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
