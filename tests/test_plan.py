"""Plans as the kernel sees them: memory is read back through the addresses it would be given."""

import ctypes
import email.utils
import gc
import random
import struct
import tracemalloc
import weakref
from http import HTTPStatus
from types import SimpleNamespace

import pytest

import linux
import plan as module
from archive import Archive, Library, Redirect, Representation, Resource
from http1 import MAX_LINE, format_date, parse_head
from plan import (
    COLD_SEND_SIZE, EMPTY_SECONDS, FIELD_OVERHEAD, LAZY_MEMO, MEMO_PLANS, MEMO_REQUEST, MEMO_REQUESTS, PLAN_OVERHEAD,
    REQUEST_OVERHEAD, SEEN_BITS, SEND_SIZE, SPAN_OVERHEAD, WARM_SECONDS, ForgetfulMemo, Memo, Plan, Site, StatusHeads,
    VirtualHosts, header_section, make_site,
)
from reply import FullResponse, Reply, Responder, error_reply
from tarweb import __version__

NOW = 1_700_000_000
SERVER = b"tarweb/1"
ARCHIVE = random.Random(5).randbytes(3 * SEND_SIZE + 17)
BASE = linux.address_of(ARCHIVE)
LIBRARY = Library([Archive("site.tar", -1, len(ARCHIVE), BASE)])
TALLY = [0]
STATUS = b"HTTP/1.1 200 OK\r\nServer: tarweb/1\r\nDate: " + format_date(NOW) + b"\r\n"


def plan_of(reply, status_head, tally, lazy=False):
    return Plan(reply.status, header_section(reply), reply.body, status_head, tally, reply.close, lazy)


# --- reading as the kernel does: <sys/socket.h> struct msghdr, <sys/uio.h> struct iovec

MSGHDR, IOVEC = struct.Struct("@PI4xPNPNi4x"), struct.Struct("@PN")


def message(address):
    """[(address, length)] of the segments of the msghdr at `address`."""
    name, name_length, vector, count, control, control_length, flags = MSGHDR.unpack(
        ctypes.string_at(address, MSGHDR.size))
    assert (name, name_length, control, control_length, flags) == (0, 0, 0, 0, 0)
    assert 1 <= count <= 1024                                   # UIO_MAXIOV
    return list(IOVEC.iter_unpack(ctypes.string_at(vector, IOVEC.size * count)))


def first_send(plan):
    """The bytes that the first send of a plan sends."""
    return b"".join(ctypes.string_at(*segment) for segment in message(plan.address))


def all_sends(plan):
    """Each send that it takes to get all of a plan out, as bytes; sends after the first go as `locate` says."""
    sends = [first_send(plan)]
    sent = len(sends[0])
    while sent < plan.total:
        address, length = plan.locate(sent)
        assert 0 < length <= SEND_SIZE
        sends.append(ctypes.string_at(address, length))
        sent += length
    return sends


def spelled(reply, status=STATUS):
    """The bytes of a Reply, put together the simple way."""
    spans = (span if isinstance(span, bytes) else ARCHIVE[span[0] - BASE:span[0] - BASE + span[1]]
             for span in reply.body)
    return b"".join((status, head_of(reply), *spans))


def head_of(reply):
    """The header fields of a Reply and the empty line."""
    head = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in reply.fields)
    return head.encode() + {b"": b"", b"close": b"Connection: close\r\n"}[reply.connection] + b"\r\n"


@pytest.fixture
def heads():
    return StatusHeads(SERVER, NOW)


def at(offset, length):
    """A span of the archive."""
    return BASE + offset, length


FIELDS = (b"Content-Type", b"text/plain"),
HEAD = b"Content-Type: text/plain\r\n\r\n"
REPLIES = {
    "a head alone": Reply(200, (), ()),
    "a text": Reply(200, FIELDS, (b"text\n",)),
    "a file": Reply(200, FIELDS, (at(1000, 500),)),
    "the first and the last byte": Reply(200, FIELDS, (at(0, 1), at(len(ARCHIVE) - 1, 1))),
    "an empty file": Reply(200, FIELDS, (at(1000, 0),)),
    "parts": Reply(200, FIELDS, (b"one", at(10, 20), b"two", at(5, 10), b"three")),
    "parts, some of them empty": Reply(
        200, FIELDS, (b"one", at(10, 0), b"two", at(5, 10), at(7, 0), b"three"), b"close"),
    "sixteen parts": Reply(200, FIELDS, tuple(
        span for i in range(16) for span in (b"part %d" % i, at(i * 1000, 100 + i)))),
    "a large file": Reply(200, FIELDS, (at(17, len(ARCHIVE) - 17),)),
    "large parts": Reply(200, FIELDS, (b"one", at(3, SEND_SIZE), b"two", at(0, 2 * SEND_SIZE), b"three"), b"close"),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_plan_is_the_reply(heads, case):
    reply = REPLIES[case]
    plan = plan_of(reply, heads.get(200), TALLY)
    raw = spelled(reply)
    assert plan.total == len(raw)
    assert b"".join(all_sends(plan)) == raw
    assert first_send(plan) == raw[:SEND_SIZE]


@pytest.mark.parametrize("case", REPLIES)
def test_a_plan_owns_just_what_is_not_in_the_archive(heads, case):
    reply = REPLIES[case]
    plan = plan_of(reply, heads.get(200), TALLY)
    places = range(plan.address, plan.address + len(plan.memory)), range(BASE, BASE + len(ARCHIVE))
    segments = message(plan.address)
    assert segments[0] == heads.get(200)
    for address, length in segments[1:]:
        assert any(address in place and address + length - 1 in place for place in places)
    assert all(length for _, length in segments)


@pytest.mark.parametrize("case", REPLIES)
def test_where_to_go_on_after_any_part_was_sent(heads, case):
    plan = plan_of(REPLIES[case], heads.get(200), TALLY)
    raw = spelled(REPLIES[case])
    ends = 0, len(STATUS), SEND_SIZE, 2 * SEND_SIZE, 3 * SEND_SIZE, len(raw)
    edges = {end + i for end in ends for i in range(-700, 700)}
    for sent in range(len(raw)) if len(raw) < 10_000 else sorted(edge for edge in edges if 0 <= edge < len(raw)):
        address, length = plan.locate(sent)
        assert 0 < length <= SEND_SIZE
        assert ctypes.string_at(address, min(length, 64)) == raw[sent:sent + min(length, 64)], sent
        assert sent + length <= len(raw)
    for sent in (len(raw), len(raw) + 1):
        with pytest.raises(IndexError):
            plan.locate(sent)


def test_a_piece_is_as_long_as_it_may_be(heads):
    plan = plan_of(Reply(200, FIELDS, (at(0, len(ARCHIVE)),)), heads.get(200), TALLY)
    sizes = list(map(len, all_sends(plan)))
    assert sizes == [SEND_SIZE, SEND_SIZE, SEND_SIZE, plan.total - 3 * SEND_SIZE]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_around_one_piece(heads, extra):
    length = SEND_SIZE - len(STATUS) - len(HEAD) + extra
    plan = plan_of(Reply(200, FIELDS, (at(7, length),)), heads.get(200), TALLY)
    assert plan.total == SEND_SIZE + extra
    assert list(map(len, all_sends(plan))) == ([plan.total] if extra <= 0 else [SEND_SIZE, extra])
    assert plan.done == (module.NO_RESULT if extra > 0 else plan.total)


@pytest.mark.parametrize("at", ["in the head", "at a segment's end", "in a later segment"])
def test_a_piece_may_end_anywhere(monkeypatch, heads, at):
    reply = REPLIES["parts"]
    raw = spelled(reply)
    size = {"in the head": len(STATUS) + 3, "at a segment's end": len(STATUS) + len(HEAD) + 3,
            "in a later segment": len(raw) - 7}[at]
    monkeypatch.setattr(module, "SEND_SIZE", size)
    plan = plan_of(reply, heads.get(200), TALLY)
    assert first_send(plan) == raw[:size]
    assert ctypes.string_at(*plan.locate(size)) == raw[size:][:plan.locate(size)[1]]
    assert plan.done == module.NO_RESULT


def test_when_a_send_is_all_there_is_to_do(heads):
    size = SEND_SIZE
    for close, length, done in ((False, 100, True), (True, 100, False), (False, size, False), (True, size, False)):
        plan = plan_of(Reply(200, FIELDS, (at(0, length),), b"close" * close), heads.get(200), TALLY)
        assert plan.close == close
        assert plan.done == (plan.total if done else module.NO_RESULT)


def test_plans_keep_their_memory_where_it_is(heads):
    plans = [plan_of(reply, heads.get(200), TALLY) for reply in REPLIES.values()]
    gc.collect()
    churn = [bytearray(500) for _ in range(1000)]
    assert [first_send(plan) for plan in plans] == [spelled(reply)[:SEND_SIZE] for reply in REPLIES.values()]
    del churn


@pytest.mark.parametrize(("connection", "line"), (
    (b"", b""), (b"close", b"Connection: close\r\n"), (b"keep-alive", b"Connection: keep-alive\r\n")))
def test_connection_is_the_last_field(connection, line):
    reply = Reply(204, ((b"Allow", b"GET"), (b"X", b"y")), (), connection)
    assert header_section(reply) == b"Allow: GET\r\nX: y\r\n" + line + b"\r\n"
    assert reply.close == (connection == b"close")


# --- Date

def read_head(heads, status):
    return ctypes.string_at(*heads.get(status))


def expected_head(status, now, server=SERVER):
    return b"HTTP/1.1 %d %b\r\nServer: %b\r\nDate: %b\r\n" % (
        status, HTTPStatus(status).phrase.encode(), server, format_date(now))


def test_every_status_has_its_head_however_long_the_servers_name_is():
    for server in (SERVER, b"tarweb/" + __version__.encode(), *(b"s" * n for n in range(1, 9))):
        heads = StatusHeads(server, NOW)
        for status in HTTPStatus:
            heads.get(status)
        heads.tick(NOW + 1)
        for status in HTTPStatus:
            assert read_head(heads, status) == expected_head(status, NOW + 1, server)


def test_the_time_lies_on_an_8_byte_boundary():
    for server in (b"s" * n for n in range(1, 9)):
        heads = StatusHeads(server, NOW)
        for status in HTTPStatus:
            address, _ = heads.get(status)
            at = read_head(heads, status).index(format_date(NOW)[17:25])
            assert (address + at) % 8 == 0, status


def test_more_fields_go_with_each_head():
    heads = StatusHeads(SERVER, NOW, ((b"X", b"y"), (b"Z", b"z")))
    heads.tick(NOW + 1)
    assert read_head(heads, 404) == expected_head(404, NOW + 1) + b"X: y\r\nZ: z\r\n"


def test_a_head_is_made_once(heads):
    assert heads.get(200) == heads.get(200)
    assert heads.get(HTTPStatus.OK) == heads.get(200) != heads.get(404)


MIDNIGHT = NOW - NOW % 86400
TIMES = {
    "a second": (NOW, NOW + 1),
    "a minute": (NOW - NOW % 60 - 1, NOW - NOW % 60),
    "a part of a second": (NOW, NOW + 0.5, NOW + 1.5),
    "midnight": (MIDNIGHT - 1, MIDNIGHT, MIDNIGHT + 1),
    "the same time of another day": (NOW, NOW + 86400),
    "new year": (1_704_067_199, 1_704_067_200),
    "the clock is set back over midnight": (MIDNIGHT + 1, MIDNIGHT - 2, MIDNIGHT + 5),
    "a leap day": (1_709_164_799, 1_709_164_800, 1_709_251_200),
}


@pytest.mark.parametrize("case", TIMES)
def test_the_date_is_patched_in_place(case):
    first, *later = TIMES[case]
    heads = StatusHeads(SERVER, first)
    early = [200, 404, 308]
    places = {status: heads.get(status) for status in early}
    for now in later:
        heads.tick(now)
        for status in early:
            assert heads.get(status) == places[status]
            assert read_head(heads, status) == expected_head(status, now)
    assert read_head(heads, 206) == expected_head(206, later[-1])        # made after the clock has moved
    assert email.utils.parsedate_to_datetime(heads.date.decode()).timestamp() == int(later[-1])


def test_a_plan_takes_part_in_it(heads):
    reply = REPLIES["a file"]
    plan = plan_of(reply, heads.get(200), TALLY)
    heads.tick(MIDNIGHT + 86400)
    assert first_send(plan) == spelled(reply, expected_head(200, MIDNIGHT + 86400))


# --- memory of plans

def expand(full):
    """A stand-in for the Responder's."""
    fields = (b"X", full.chosen.media_type), *FIELDS
    return Reply(200, fields, ((full.chosen.offset, full.chosen.length),))


@pytest.fixture
def site():
    return Site(Memo(LIBRARY, SERVER, NOW), None, expand)


def full(offset, kind=b"y"):
    return FullResponse(Representation(BASE + offset, 100, NOW, "", kind, b'"x"'), False, b"", False)


def reply(number, size=0):
    return Reply(404, ((b"X", b"%d" % number),), (b"x" * size,) if size else ())


def not_modified(number):
    """A Reply with as many fields as most have, none of them shared with another one."""
    return Reply(304, tuple((b"Name-%d" % i, b"the value of %d" % number) for i in range(6)), ())


def of_many_spans(number):
    """The Reply for a range of a sparse file."""
    return Reply(206, (), tuple([(BASE + number + i * 1000, 500 + i) for i in range(400)]))


def test_equal_replies_get_one_plan(site):
    for make in (full, reply):
        assert site.plan(make(1)) is site.plan(make(1))
        assert site.plan(make(1)) is not site.plan(make(2))
    assert site.plan(Reply(404, (), ())) is not site.plan(Reply(404, (), (), b"close"))
    assert site.plan(Reply(404, (), ())) is not site.plan(Reply(405, (), ()))


def test_a_full_response_is_expanded(site):
    assert first_send(site.plan(full(77))) == spelled(expand(full(77)))
    assert first_send(site.plan(reply(1))) == expected_head(404, NOW) + b"X: 1\r\n\r\n"


def test_a_status_has_one_head_for_all_plans(site):
    segments = {message(site.plan(make(i)).address)[0] for make in (full, reply) for i in range(10)}
    assert segments == {site.status_heads.get(200), site.status_heads.get(404)}


def unseen(site, start=b"GET /"):
    """Requests whose hash has never come, each in a place of its own: what is taken for seen by chance is left out."""
    places = set()
    for number in range(1 << 30):
        request = start + b"%d HTTP/1.1\r\n\r\n" % number
        place, mark = hash(request) % (1 << SEEN_BITS), hash(request) >> SEEN_BITS & 0xFF
        if mark and place not in places:
            places.add(place)
            yield request


def test_a_request_is_remembered_from_its_second_time_on(site):
    request, other = (next_one for next_one, _ in zip(unseen(site), range(2), strict=False))
    plan = site.plan(full(1))
    site.remember(request, plan)
    assert site.memo.requests == {}
    site.remember(other, plan)
    site.remember(request, plan)
    assert site.memo.requests == {request: plan}
    assert site.memo.requests.room == MEMO_REQUESTS - REQUEST_OVERHEAD - len(request)


def test_what_comes_once_is_not_remembered(site):
    plan = site.plan(full(1))
    for request, _ in zip(unseen(site), range(2000), strict=False):
        site.remember(request, plan)
    assert site.memo.requests == {}
    assert site.memo.requests.room == MEMO_REQUESTS


def test_two_requests_of_one_place_are_told_apart(site):
    code = 5 | 7 << SEEN_BITS
    assert not site.memo.came_before(code)
    assert site.memo.came_before(code)
    assert not site.memo.came_before(code + (1 << SEEN_BITS))     # the same place, another mark: takes it over
    assert not site.memo.came_before(code)
    assert not site.memo.came_before(code + 1)
    assert site.memo.came_before(code)
    assert not site.memo.came_before(-code)                       # hashes may be negative


@pytest.mark.parametrize(("extra", "remembered"), [(-1, True), (0, True), (1, False)])
def test_a_long_request_is_not_remembered(site, extra, remembered):
    request = next(request for request in unseen(site, b"GET /".ljust(MEMO_REQUEST + extra - 14, b"x"))
                   if len(request) == MEMO_REQUEST + extra)
    for _ in range(3):
        site.remember(request, site.plan(full(1)))
    assert (request in site.memo.requests) == remembered


def size_of(make, plan):
    if make is full:
        return PLAN_OVERHEAD + len(plan.memory)
    kept = FIELD_OVERHEAD + SPAN_OVERHEAD * (plan.content > 0)      # of the Reply: one field, and one span at most
    return PLAN_OVERHEAD + kept + 2 * len(plan.memory)


@pytest.mark.parametrize("make", [full, reply])
def test_room_is_spent_once_for_each_plan(site, make):
    plan = site.plan(make(1))
    assert site.memo.plan_room == MEMO_PLANS - size_of(make, plan)
    site.plan(make(1))
    assert site.memo.plan_room == MEMO_PLANS - size_of(make, plan)
    other = site.plan(make(2))
    assert site.memo.plan_room == MEMO_PLANS - size_of(make, plan) - size_of(make, other)


def test_the_memory_of_plans_is_bounded(site):
    count = MEMO_PLANS // 2000
    for i in range(2 * count):
        site.plan(reply(i, size=1000))
    assert 0 <= site.memo.plan_room < 3000
    kept = len(site.by_reply)
    spent = sum(size_of(reply, plan) for plan in site.by_reply.values())
    assert spent <= MEMO_PLANS
    for i in range(2 * count, 2 * count + 100):
        site.plan(reply(i, size=1000))
    assert len(site.by_reply) == kept
    assert reply(0, size=1000) in site.by_reply, "a newcomer has pushed out the first"
    assert list(site.by_reply)[-1] == reply(2 * count + 99, size=1000), "a newcomer takes the latest one's place"


def test_the_memory_of_requests_is_bounded(site):
    plan = site.plan(full(1))
    requests = []
    for request, _ in zip(unseen(site, b"GET /" + b"x" * 1900), range(4000), strict=False):
        requests.append(request)
        site.remember(request, plan)
        site.remember(request, plan)
    spent = sum(REQUEST_OVERHEAD + len(request) for request in site.memo.requests)
    assert MEMO_REQUESTS - 3000 < spent <= MEMO_REQUESTS
    assert site.memo.requests.room < 3000
    assert requests[0] in site.memo.requests
    assert requests[-1] in site.memo.requests
    assert len(site.memo.requests) < len(requests)


def test_the_memory_that_plans_really_take_is_about_what_is_counted(site):
    """What plans take of Python's memory, their keys included, against PLAN_OVERHEAD and their own bytes."""
    for make, count in ((full, 2000), (reply, 2000), (not_modified, 2000), (of_many_spans, 50)):
        room = site.memo.plan_room
        tracemalloc.start()
        for i in range(count):
            site.plan(make(i))
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken < 1.5 * (room - site.memo.plan_room)


def test_forgetting_empties_all(site):
    request = next(unseen(site))
    for _ in range(3):
        site.remember(request, site.plan(full(1)))
    site.forget()
    assert (site.by_reply, site.memo.requests) == ({}, {})
    assert (site.memo.plan_room, site.memo.requests.room) == (MEMO_PLANS, MEMO_REQUESTS)


class Watched(bytearray):
    """Memory that can be seen to be freed."""


def test_a_plan_outlives_its_being_forgotten_while_it_is_sent(site, monkeypatch):
    monkeypatch.setattr(module, "bytearray", Watched, raising=False)
    plan = site.plan(full(3))
    freed = weakref.ref(plan.memory)
    site.remember(b"GET /", plan)
    site.forget()
    gc.collect()
    churn = [bytearray(len(plan.memory)) for _ in range(100)]
    site.tick(NOW + 5)
    assert freed() is plan.memory
    assert first_send(plan) == spelled(expand(full(3)), expected_head(200, NOW + 5))
    assert site.plan(full(3)) is not plan
    del plan, churn
    assert freed() is None, "it ought to go with the last reference, without a collector"


@pytest.mark.parametrize("where", [("plan_room",), ("requests", "room"), ("blocks", "room")], ids=".".join)
def test_a_full_memory_is_emptied_now_and_then(site, where):
    *parts, room = where
    memory = getattr(site.memo, *parts) if parts else site.memo
    for start in (NOW, NOW + EMPTY_SECONDS + 1):
        site.plan(full(1))
        setattr(memory, room, 0)
        site.tick(start + EMPTY_SECONDS)
        assert site.by_reply, "too early"
        site.tick(start + EMPTY_SECONDS + 1)
        assert site.by_reply == {}


def test_a_memory_that_is_not_full_stays(site):
    plan = site.plan(full(1))
    site.tick(NOW + 10_000)
    assert site.plan(full(1)) is plan
    assert first_send(plan).startswith(expected_head(200, NOW + 10_000))


# --- what is counted, and what the access log says

@pytest.mark.parametrize("case", REPLIES)
def test_content_is_what_lies_behind_the_header(heads, case):
    reply = REPLIES[case]
    plan = plan_of(reply, heads.get(200), TALLY)
    assert plan.content == len(spelled(reply)) - len(STATUS) - len(head_of(reply))


def test_responses_are_counted_by_the_first_digit_of_their_status(site):
    for status in (100, 200, 206, 304, 404, 503):
        plan = site.plan(Reply(status, (), ()))
        assert plan.status == status
        assert plan.tally is site.tallies[status // 100]


def test_lines_go_with_the_requests_that_they_are_for(site):
    """When one is pushed out by another, and when all are forgotten."""
    plan, requests = site.plan(full(1)), unseen(site)
    first, second = next(requests), next(requests)
    for request in (first, first):
        site.remember(request, plan)
    site.lines[first] = b"line"
    site.memo.requests.room = 0
    for request in (second, second):
        site.remember(request, plan)
    assert set(site.memo.requests) == {second}
    assert site.lines == {}
    site.lines[second] = b"line"
    site.forget()
    assert site.lines == {}


# --- sites

PAGE = Resource(Representation(BASE, 100, NOW, "", b"text/html", b'"x"'), ())


def parsed(path=b"/", host=b"one.test", fields=b""):
    return parse_head(b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (path, host, fields))


@pytest.fixture
def memo():
    return Memo(LIBRARY, SERVER, NOW)


@pytest.fixture
def hosts(memo):
    """Two hosts, which answer differently, and no other."""
    return make_site(memo, {b"one.test": responder(b"max-age=1"), b"*.two.test": responder(b"max-age=2")})


def responder(cache_control):
    return Responder(SimpleNamespace(find={b"/": PAGE}.get), cache_control)


def sent(plan):
    return b"".join(all_sends(plan))


def test_a_request_gets_the_plan_of_its_reply(memo):
    site = make_site(memo, {b"": responder(b"max-age=1")})
    plan = site.respond(parsed())
    assert sent(plan).startswith(STATUS + b"Content-Type: text/html\r\n")
    assert sent(plan).endswith(b"\r\n\r\n" + ARCHIVE[:100])
    assert b"Cache-Control: max-age=1\r\n" in sent(plan)
    assert site.respond(parsed(host=b"other.test")) is plan
    assert site.respond(parsed(b"/no")).status == 404
    assert site.respond(parsed(b"/no")) is site.respond(parsed(b"/no"))


def get(target=b"/", *lines, method=b"GET"):
    return b"".join(line + b"\r\n" for line in (method + b" %b HTTP/1.1" % target, b"Host: t", *lines, b""))


@pytest.fixture
def asked(memo, monkeypatch):
    """A site with one file and the list of what it had to find a Reply for."""
    site = make_site(memo, {b"": responder(b"max-age=1")})
    asked = []
    monkeypatch.setattr(site, "reply", lambda request: asked.append(request) or site.persistent_reply(request))
    return site, asked


def test_requests_that_differ_in_nothing_that_counts_get_one_plan(asked):
    site, asked = asked
    plan = site.answer(get())
    assert plan.status == 200
    for _ in range(2):
        assert site.answer(get()) is plan
    del asked[:]
    for number in range(50):
        more = [b"Cookie: a=%d" % number, b"User-Agent: b%d" % number, b"Referer: http://c/%d" % number,
                b"X-Request-Id: %d" % number, b"user-agent: d%d" % number][:number % 5 + 1]
        assert site.answer(get(b"/", *more)) is plan
        assert site.answer(get(b"/?%d" % number, *more)) is plan
        assert site.answer(get(b"/", *more, b'If-None-Match: "%d"' % number)) is plan
    assert not asked


def test_other_conditions_are_looked_at(asked):
    site, asked = asked
    for _ in range(3):
        site.answer(get())
    tag, other = b"If-None-Match: " + PAGE.plain.etag, b'If-None-Match: "no"'
    for lines, status in ([[tag], 304], [[b"If-None-Match: *"], 304], [[other, tag], 304], [[other, other], 200],
                          [[other, b"If-Match: y"], 412], [[b"Range: bytes=0-1"], 206], [[b"Range: bytes=999-"], 416],
                          [[b"Range: bytes=0-1", other], 206], [[b"Range: bytes=0-1", tag], 304],
                          [[b"Range: bytes=0-1", b'If-Range: "no"'], 200], [[b"Range: bytes=2-1"], 200],
                          [[b"Range: bytes=0-1", b"Range: bytes=2-3"], 200], [[b"Expect: x"], 417]):
        for _ in range(4):
            assert site.answer(get(b"/", *lines)).status == status
    assert asked


def test_a_part_is_what_its_reply_would_be(asked, heads):
    site, asked = asked
    for _ in range(3):
        site.answer(get())
    del asked[:]
    for first, last in ((0, 0), (0, 1), (5, 50), (99, 99), (99, 100), (0, 10 ** 14)):
        plan = site.answer(get(b"/", b"Range: bytes=%d-%d" % (first, last), b"Cookie: %d" % first))
        assert not asked
        request = parsed(fields=b"Range: bytes=%d-%d\r\n" % (first, last))
        assert sorted(sent(plan).split(b"\r\n")) == sorted(sent(site.respond(request)).split(b"\r\n"))
        assert (plan.status, plan.close, plan.content) == (206, False, min(100, last + 1) - first)
        del asked[:]
    assert all(plan.status != 206 for plan in site.memo.requests.values()), "it would be kept without being counted"


def test_what_is_not_there_is_so_for_any_condition(asked):
    site, asked = asked
    plan = site.answer(get(b"/no"))
    assert plan.status == 404
    for lines in ([b'If-None-Match: "x"'], [b"Range: bytes=0-1"], [b"If-None-Match: *"]):
        assert site.answer(get(b"/no", *lines)) is plan


def test_a_redirect_takes_its_query_along(memo):
    index = {b"/": PAGE, b"/dir": Redirect(b"/dir/")}
    site = make_site(memo, {b"": Responder(SimpleNamespace(find=index.get), b"")})
    for _ in range(4):
        assert b"\r\nLocation: ./dir/\r\n" in sent(site.answer(get(b"/dir")))
        assert b"\r\nLocation: ./dir/?q\r\n" in sent(site.answer(get(b"/dir?q")))


@pytest.mark.parametrize("data", [
    b"", b"x", get()[:-1], get()[:-2], get() + b"x", get() + get(), get() + b"Cookie: x\r\n", b"\r\n" + get(),
    get(b"/", b"Cookie: x\ny"), get(b"/", b"Cookie: x\ry"), get(b"/", b"X: a\nCookie: x"), get(b"/", b"", b"Cookie: x"),
    get(b"/", b"Content-Length: 3"), get(b"/", b"Transfer-Encoding: chunked"), get(b"/", b"Host: u"),
    get(b"/" + b"x" * MAX_LINE)])
def test_what_the_parser_has_to_read_is_left_to_it(asked, data):
    site, _ = asked
    for _ in range(3):
        site.answer(get())
        assert site.answer(data) is None


def test_a_forgetful_memo_remembers_no_request():
    site = make_site(ForgetfulMemo(LIBRARY, SERVER, NOW), {b"": responder(b"")})
    assert [site.answer(get()) for _ in range(20)] == [None] * 20
    assert len({site.respond(parsed()) for _ in range(20)}) == 20
    assert not site.memo.requests and not site.memo.blocks


def test_when_all_is_to_close_no_request_is_answered_otherwise(memo):
    site = make_site(memo, {b"": responder(b"")})
    assert [site.respond(parsed()).close for _ in range(2)] == [False] * 2
    site.close_all()
    assert [site.respond(parsed()).close for _ in range(2)] == [True] * 2


# --- Last-Modified is never later than Date (RFC 9110 section 8.8.2.1)

def dated(memo, mtime):
    """What is asked of a site with one file of that date: for all of it, for a part, and whether it has changed."""
    page = PAGE._replace(plain=PAGE.plain._replace(mtime=mtime))
    site = make_site(memo, {b"": Responder(SimpleNamespace(find={b"/": page}.get), b"")})
    for fields in (b"", b"Range: bytes=0-1\r\n", b"If-None-Match: *\r\n"):
        yield lambda fields=fields: site.respond(parsed(fields=fields))


@pytest.mark.parametrize(("mtime", "clock"), (
    (NOW + 5, {0: False, 1: False, 4.9: False, 5: True, 6: True}),
    (NOW, {0: True, 1: True, -0.1: False, 0.5: True}),
    (NOW + 10 ** 9, {0: False, 2: False, 2 * 10 ** 9: True}),
    (NOW - 10 ** 9, {0: True, -2 * 10 ** 9: False, 7: True})),
    ids=("later", "now", "a board without a clock", "a clock that is set back"))
def test_a_date_later_than_the_clock_is_left_out_while_it_is(memo, mtime, clock):
    for ask in dated(memo, mtime):
        memo.tick(NOW)
        for seconds, told in clock.items():
            if seconds:
                memo.tick(NOW + seconds)
            plan = ask()
            assert (b"Last-Modified: %b\r\n" % format_date(mtime) in sent(plan)) == told
            assert (b"Last-Modified" in sent(plan)) == told
            assert ask() is plan


def test_only_dates_that_are_left_out_have_plans_forgotten(memo):
    early, late = (next(dated(memo, NOW + seconds)) for seconds in (-1, 3))
    plan = early()
    for seconds in range(5):
        memo.tick(NOW + seconds)
        assert early() is plan
    memo.forget()
    plan, other = early(), late()
    memo.tick(NOW + 5)
    assert early() is plan and late() is other
    memo.tick(NOW + 4)
    assert early() is not plan
    memo.tick(NOW)
    plan, other = early(), late()
    memo.tick(NOW + 2)
    assert early() is plan and late() is other
    memo.tick(NOW + 3)
    assert early() is not plan and late() is not other


def test_a_request_that_is_remembered_gets_the_date_once_it_is_there(memo):
    ask = next(dated(memo, NOW + 1))
    for _ in range(3):
        memo.requests.remember(b"GET / HTTP/1.1\r\n\r\n", ask())
    assert b"Last-Modified" not in sent(memo.requests[b"GET / HTTP/1.1\r\n\r\n"])
    memo.tick(NOW + 1)
    assert not memo.requests
    assert b"Last-Modified" in sent(ask())


@pytest.mark.parametrize("kind", (Memo, ForgetfulMemo))
def test_refusals_and_continue(kind):
    site = Site(kind(LIBRARY, SERVER, NOW), lambda request: None)
    for one in (site, VirtualHosts(site.memo, {b"": site})):
        refusal = one.refuse(408, "too slow")
        assert sent(refusal) == spelled(error_reply(408, "too slow"), expected_head(408, NOW))
        assert refusal.close
        assert sent(one.interim()) == expected_head(100, NOW) + b"\r\n"
        assert not one.interim().close


def test_equal_replies_of_two_hosts_are_two_plans(hosts):
    """Since what goes with them may differ."""
    one, two = (hosts.respond(parsed(host=host)) for host in (b"one.test", b"x.two.test"))
    assert b"Cache-Control: max-age=1\r\n" in sent(one)
    assert b"Cache-Control: max-age=2\r\n" in sent(two)
    assert hosts.respond(parsed(host=b"One.test:80")) is one
    assert hosts.respond(parsed(host=b"y.two.test")) is two
    assert one.tally is two.tally is hosts.tallies[2]
    assert message(one.address)[0] == message(two.address)[0] == hosts.status_heads.get(200)


def test_an_unknown_host(hosts):
    for host in (b"two.test", b"three.test", b""):
        plan = hosts.respond(parsed(host=host))
        assert plan.status == 421
        assert not plan.close
        assert hosts.respond(parsed(host=host)) is plan
    assert hosts.respond(parsed(host=b"three.test", fields=b"Connection: close\r\n")).close


def test_one_host_needs_no_look_at_it(memo):
    assert type(make_site(memo, {b"": responder(b"")})) is Site
    assert type(make_site(memo, {b"one.test": responder(b"")})) is VirtualHosts


def test_requests_are_remembered_for_all_hosts_in_one_place(hosts):
    """Whichever site answers; and what was taken from it once stays what it was, also when all is forgotten."""
    known, remembers, lines = hosts.known, hosts.remembers, hosts.lines
    for site, request in zip((hosts, *hosts.sites.values()), unseen(hosts), strict=False):
        plan = site.refuse(404, "")
        for _ in range(2):
            assert known(request) is None
            assert not remembers(request)
            site.remember(request, plan)
        lines[request] = b"line"
        assert known(request) is hosts.known(request) is site.known(request) is plan
        assert remembers(request)
        hosts.forget()
        assert known(request) is site.known(request) is None
        assert not remembers(request)
        assert not lines


def test_the_memory_of_plans_is_bounded_for_all_hosts_together(hosts):
    """One that has had its share first leaves the others a place, but no room."""
    one, two = hosts.sites.values()
    count = MEMO_PLANS // 2000
    for site in (one, two, one, hosts):
        for i in range(2 * count):
            site.plan(reply(i, size=1000))
    kept = [size_of(reply, plan) for site in (hosts, one, two) for plan in site.by_reply.values()]
    assert MEMO_PLANS - 3000 < sum(kept) <= MEMO_PLANS
    assert reply(0, size=1000) in one.by_reply
    assert list(hosts.by_reply) == [reply(2 * count - 1, size=1000)], "a newcomer takes the latest one's place"
    hosts.forget()
    assert not (hosts.by_reply or one.by_reply or two.by_reply)
    assert hosts.memo.plan_room == MEMO_PLANS
    for site in (two, one):
        site.plan(reply(1))
        assert list(site.by_reply) == [reply(1)]


@pytest.mark.parametrize("times", (1, 2))
def test_from_then_on_each_response_is_the_last(hosts, times):
    request = next(unseen(hosts))
    for _ in range(2):
        hosts.remember(request, hosts.respond(parsed()))
    for _ in range(times):
        hosts.close_all()
    assert not hosts.remembers(request)
    for host, status in ((b"one.test", 200), (b"x.two.test", 200), (b"three.test", 421)):
        plan = hosts.respond(parsed(host=host))
        assert (plan.status, plan.close) == (status, True)
        assert b"\r\nConnection: close\r\n" in sent(plan)


# --- archives that are not in memory

@pytest.fixture
def lazy():
    """A Site of one."""
    archive = Archive("site.tar", -1, len(ARCHIVE), BASE)
    archive.lazy = True
    return Site(Memo(Library([archive]), SERVER, NOW), None, expand)


@pytest.mark.parametrize("case", REPLIES)
def test_smaller_pieces_are_the_same_reply(heads, case):
    plan = plan_of(REPLIES[case], heads.get(200), TALLY, lazy=True)
    raw = spelled(REPLIES[case])
    assert b"".join(all_sends(plan)) == raw
    assert first_send(plan) == raw[:COLD_SEND_SIZE]
    sent, found = 0, []
    while sent < plan.total:
        piece = plan.piece(sent)
        found += [ctypes.string_at(*span) for span in piece]
        assert sum(length for _, length in piece) <= COLD_SEND_SIZE
        sent += sum(length for _, length in piece)
    assert b"".join(found) == raw


def test_only_what_is_in_such_an_archive_is_lazy(lazy, site):
    assert lazy.plan(full(1)).lazy
    assert not lazy.plan(reply(1)).lazy
    assert not site.plan(full(1)).lazy


@pytest.mark.parametrize(("size", "remembered"), ((1000, True), (LAZY_MEMO - 1000, True), (LAZY_MEMO, False)))
def test_large_responses_are_not_remembered(lazy, size, remembered):
    request = next(unseen(lazy))
    for _ in range(3):
        lazy.remember(request, lazy.plan(Reply(200, FIELDS, (at(5, size),))))
    assert (request in lazy.memo.requests) == remembered


def test_requests_are_forgotten_after_a_while(lazy):
    """So that it is looked again whether pages are there; plans stay."""
    request = next(unseen(lazy))
    for now in (NOW, NOW + WARM_SECONDS + 1):
        for _ in range(2):
            lazy.remember(request, lazy.plan(full(1)))
        lazy.tick(now + WARM_SECONDS)
        assert lazy.memo.requests
        lazy.tick(now + WARM_SECONDS + 1)
        assert not lazy.memo.requests
        assert lazy.by_reply
        assert lazy.memo.requests.room == MEMO_REQUESTS


def test_a_forgetful_memo_keeps_nothing():
    site = Site(ForgetfulMemo(LIBRARY, SERVER, NOW), None)
    plan = site.plan(Reply(200, (), (b"a page",)))
    assert site.plan(Reply(200, (), (b"a page",))) is not plan
    for _ in range(3):
        site.remember(b"GET /", plan)
    assert not site.by_reply and site.memo.plan_room == MEMO_PLANS
    assert not site.remembers(b"GET /")
