"""Plans as the kernel sees them: memory is read back through the addresses it would be given."""

import ctypes
import email.utils
import gc
import random
import struct
import tracemalloc
import weakref
from http import HTTPStatus

import pytest

import linux
import plan as module
from archive import Archive, Library, Representation
from http1 import format_date
from plan import (
    EMPTY_SECONDS, LAZY_MEMO, LAZY_PIECE, MEMO_PLANS, MEMO_REQUEST, MEMO_REQUESTS, PIECE, PLAN_OVERHEAD,
    REQUEST_OVERHEAD, SEEN_BITS, WARM_SECONDS, ForgetfulPlanner, Plan, Planner, StatusHeads,
)
from reply import Reply, Whole
from tarweb import __version__

NOW = 1_700_000_000
SERVER = b"tarweb/1"
ARCHIVE = random.Random(5).randbytes(3 * PIECE + 17)
BASE = linux.address_of(ARCHIVE)
LIBRARY = Library([Archive("site.tar", -1, len(ARCHIVE), BASE)])
TALLY = [0]
STATUS = b"HTTP/1.1 200 OK\r\nServer: tarweb/1\r\nDate: " + format_date(NOW) + b"\r\n"


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
        assert 0 < length <= PIECE
        sends.append(ctypes.string_at(address, length))
        sent += length
    return sends


def spelled(reply, status=STATUS):
    """The bytes of a Reply, put together the simple way."""
    spans = (span if isinstance(span, bytes) else ARCHIVE[span[0] - BASE:span[0] - BASE + span[1]]
             for span in reply.body)
    return b"".join((status, reply.head, *spans))


@pytest.fixture
def heads():
    return StatusHeads(SERVER, NOW)


def at(offset, length):
    """A span of the archive."""
    return BASE + offset, length


HEAD = b"Content-Type: text/plain\r\n\r\n"
REPLIES = {
    "a head alone": Reply(200, b"\r\n", (), False),
    "a text": Reply(200, HEAD, (b"text\n",), False),
    "a file": Reply(200, HEAD, (at(1000, 500),), False),
    "the first and the last byte": Reply(200, HEAD, (at(0, 1), at(len(ARCHIVE) - 1, 1)), False),
    "an empty file": Reply(200, HEAD, (at(1000, 0),), False),
    "parts": Reply(200, HEAD, (b"one", at(10, 20), b"two", at(5, 10), b"three"), False),
    "parts, some of them empty": Reply(200, HEAD, (b"one", at(10, 0), b"two", at(5, 10), at(7, 0), b"three"), True),
    "sixteen parts": Reply(200, HEAD, tuple(
        span for i in range(16) for span in (b"part %d" % i, at(i * 1000, 100 + i))), False),
    "a large file": Reply(200, HEAD, (at(17, len(ARCHIVE) - 17),), False),
    "large parts": Reply(200, HEAD, (b"one", at(3, PIECE), b"two", at(0, 2 * PIECE), b"three"), True),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_plan_is_the_reply(heads, case):
    reply = REPLIES[case]
    plan = Plan(reply, heads.get(200), TALLY)
    raw = spelled(reply)
    assert plan.total == len(raw)
    assert b"".join(all_sends(plan)) == raw
    assert first_send(plan) == raw[:PIECE]


@pytest.mark.parametrize("case", REPLIES)
def test_a_plan_owns_just_what_is_not_in_the_archive(heads, case):
    reply = REPLIES[case]
    plan = Plan(reply, heads.get(200), TALLY)
    places = range(plan.address, plan.address + len(plan.memory)), range(BASE, BASE + len(ARCHIVE))
    segments = message(plan.address)
    assert segments[0] == heads.get(200)
    for address, length in segments[1:]:
        assert any(address in place and address + length - 1 in place for place in places)
    assert all(length for _, length in segments)


@pytest.mark.parametrize("case", REPLIES)
def test_where_to_go_on_after_any_part_was_sent(heads, case):
    plan = Plan(REPLIES[case], heads.get(200), TALLY)
    raw = spelled(REPLIES[case])
    edges = {edge + i for edge in (0, len(STATUS), PIECE, 2 * PIECE, 3 * PIECE, len(raw)) for i in range(-700, 700)}
    for sent in range(len(raw)) if len(raw) < 10_000 else sorted(edge for edge in edges if 0 <= edge < len(raw)):
        address, length = plan.locate(sent)
        assert 0 < length <= PIECE
        assert ctypes.string_at(address, min(length, 64)) == raw[sent:sent + min(length, 64)], sent
        assert sent + length <= len(raw)
    for sent in (len(raw), len(raw) + 1):
        with pytest.raises(IndexError):
            plan.locate(sent)


def test_a_piece_is_as_long_as_it_may_be(heads):
    plan = Plan(Reply(200, HEAD, (at(0, len(ARCHIVE)),), False), heads.get(200), TALLY)
    sizes = list(map(len, all_sends(plan)))
    assert sizes == [PIECE, PIECE, PIECE, plan.total - 3 * PIECE]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_around_one_piece(heads, extra):
    length = PIECE - len(STATUS) - len(HEAD) + extra
    plan = Plan(Reply(200, HEAD, (at(7, length),), False), heads.get(200), TALLY)
    assert plan.total == PIECE + extra
    assert list(map(len, all_sends(plan))) == ([plan.total] if extra <= 0 else [PIECE, extra])
    assert plan.done == (module.NO_RESULT if extra > 0 else plan.total)


@pytest.mark.parametrize("at", ["in the head", "at a segment's end", "in a later segment"])
def test_a_piece_may_end_anywhere(monkeypatch, heads, at):
    reply = REPLIES["parts"]
    raw = spelled(reply)
    size = {"in the head": len(STATUS) + 3, "at a segment's end": len(STATUS) + len(HEAD) + 3,
            "in a later segment": len(raw) - 7}[at]
    monkeypatch.setattr(module, "PIECE", size)
    plan = Plan(reply, heads.get(200), TALLY)
    assert first_send(plan) == raw[:size]
    assert ctypes.string_at(*plan.locate(size)) == raw[size:][:plan.locate(size)[1]]
    assert plan.done == module.NO_RESULT


def test_when_a_send_is_all_there_is_to_do(heads):
    for close, length, done in ((False, 100, True), (True, 100, False), (False, PIECE, False), (True, PIECE, False)):
        plan = Plan(Reply(200, HEAD, (at(0, length),), close), heads.get(200), TALLY)
        assert plan.close == close
        assert plan.done == (plan.total if done else module.NO_RESULT)


def test_plans_keep_their_memory_where_it_is(heads):
    plans = [Plan(reply, heads.get(200), TALLY) for reply in REPLIES.values()]
    gc.collect()
    churn = [bytearray(500) for _ in range(1000)]
    assert [first_send(plan) for plan in plans] == [spelled(reply)[:PIECE] for reply in REPLIES.values()]
    del churn


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
    plan = Plan(reply, heads.get(200), TALLY)
    heads.tick(MIDNIGHT + 86400)
    assert first_send(plan) == spelled(reply, expected_head(200, MIDNIGHT + 86400))


# --- memory of plans

def spell_out(whole):
    """A stand-in for the Responder's."""
    return Reply(200, whole.chosen.media_type + HEAD, ((whole.chosen.offset, whole.chosen.length),), False)


@pytest.fixture
def planner():
    return Planner(LIBRARY, spell_out, SERVER, NOW)


def whole(offset, kind=b"X: y\r\n"):
    return Whole(Representation(BASE + offset, 100, NOW, "", kind, b'"x"'), False, b"", False)


def reply(number, size=0):
    return Reply(404, b"X: %d\r\n\r\n" % number, (b"x" * size,) if size else (), False)


def test_equal_replies_get_one_plan(planner):
    for make in (whole, reply):
        assert planner.plan(make(1)) is planner.plan(make(1))
        assert planner.plan(make(1)) is not planner.plan(make(2))
    assert planner.plan(Reply(404, b"\r\n", (), False)) is not planner.plan(Reply(404, b"\r\n", (), True))
    assert planner.plan(Reply(404, b"\r\n", (), False)) is not planner.plan(Reply(405, b"\r\n", (), False))


def test_a_whole_is_spelled_out(planner):
    assert first_send(planner.plan(whole(77))) == spelled(spell_out(whole(77)))
    assert first_send(planner.plan(reply(1))) == expected_head(404, NOW) + b"X: 1\r\n\r\n"


def test_a_status_has_one_head_for_all_plans(planner):
    segments = {message(planner.plan(make(i)).address)[0] for make in (whole, reply) for i in range(10)}
    assert segments == {planner.status_heads.get(200), planner.status_heads.get(404)}


def unseen(planner, start=b"GET /"):
    """Requests whose hash has never come, each in a place of its own: what is taken for seen by chance is left out."""
    places = set()
    for number in range(1 << 30):
        request = start + b"%d HTTP/1.1\r\n\r\n" % number
        place, mark = hash(request) % (1 << SEEN_BITS), hash(request) >> SEEN_BITS & 0xFF
        if mark and place not in places:
            places.add(place)
            yield request


def test_a_request_is_remembered_from_its_second_time_on(planner):
    request, other = (next_one for next_one, _ in zip(unseen(planner), range(2), strict=False))
    plan = planner.plan(whole(1))
    planner.remember(request, plan)
    assert planner.by_request == {}
    planner.remember(other, plan)
    planner.remember(request, plan)
    assert planner.by_request == {request: plan}
    assert planner.request_room == MEMO_REQUESTS - REQUEST_OVERHEAD - len(request)


def test_what_comes_once_is_not_remembered(planner):
    plan = planner.plan(whole(1))
    for request, _ in zip(unseen(planner), range(2000), strict=False):
        planner.remember(request, plan)
    assert planner.by_request == {}
    assert planner.request_room == MEMO_REQUESTS


def test_two_requests_of_one_place_are_told_apart(planner):
    code = 5 | 7 << SEEN_BITS
    assert not planner.came_before(code)
    assert planner.came_before(code)
    assert not planner.came_before(code + (1 << SEEN_BITS))     # the same place, another mark: takes it over
    assert not planner.came_before(code)
    assert not planner.came_before(code + 1)
    assert planner.came_before(code)
    assert not planner.came_before(-code)                       # hashes may be negative


@pytest.mark.parametrize(("extra", "remembered"), [(-1, True), (0, True), (1, False)])
def test_a_long_request_is_not_remembered(planner, extra, remembered):
    request = next(request for request in unseen(planner, b"GET /".ljust(MEMO_REQUEST + extra - 14, b"x"))
                   if len(request) == MEMO_REQUEST + extra)
    for _ in range(3):
        planner.remember(request, planner.plan(whole(1)))
    assert (request in planner.by_request) == remembered


def size_of(make, plan):
    return PLAN_OVERHEAD + len(plan.memory) * (1 if make is whole else 2)


@pytest.mark.parametrize("make", [whole, reply])
def test_room_is_spent_once_for_each_plan(planner, make):
    plan = planner.plan(make(1))
    assert planner.plan_room == MEMO_PLANS - size_of(make, plan)
    planner.plan(make(1))
    assert planner.plan_room == MEMO_PLANS - size_of(make, plan)
    other = planner.plan(make(2))
    assert planner.plan_room == MEMO_PLANS - size_of(make, plan) - size_of(make, other)


def test_the_memory_of_plans_is_bounded(planner):
    count = MEMO_PLANS // 2000
    for i in range(2 * count):
        planner.plan(reply(i, size=1000))
    assert 0 <= planner.plan_room < 3000
    kept = len(planner.by_reply)
    spent = sum(size_of(reply, plan) for plan in planner.by_reply.values())
    assert spent <= MEMO_PLANS
    for i in range(2 * count, 2 * count + 100):
        planner.plan(reply(i, size=1000))
    assert len(planner.by_reply) == kept
    assert reply(0, size=1000) in planner.by_reply, "a newcomer has pushed out the first"
    assert list(planner.by_reply)[-1] == reply(2 * count + 99, size=1000), "a newcomer takes the latest one's place"


def test_the_memory_of_requests_is_bounded(planner):
    plan = planner.plan(whole(1))
    requests = []
    for request, _ in zip(unseen(planner, b"GET /" + b"x" * 1900), range(4000), strict=False):
        requests.append(request)
        planner.remember(request, plan)
        planner.remember(request, plan)
    spent = sum(REQUEST_OVERHEAD + len(request) for request in planner.by_request)
    assert MEMO_REQUESTS - 3000 < spent <= MEMO_REQUESTS
    assert planner.request_room < 3000
    assert requests[0] in planner.by_request
    assert requests[-1] in planner.by_request
    assert len(planner.by_request) < len(requests)


def test_the_memory_that_plans_really_take_is_about_what_is_counted(planner):
    """What plans take of Python's memory, their keys included, against PLAN_OVERHEAD and their own bytes."""
    for make in (whole, reply):
        room = planner.plan_room
        tracemalloc.start()
        for i in range(2000):
            planner.plan(make(i))
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken < 1.5 * (room - planner.plan_room)


def test_forgetting_empties_all(planner):
    request = next(unseen(planner))
    for _ in range(3):
        planner.remember(request, planner.plan(whole(1)))
    planner.forget()
    assert (planner.by_reply, planner.by_request) == ({}, {})
    assert (planner.plan_room, planner.request_room) == (MEMO_PLANS, MEMO_REQUESTS)


class Watched(bytearray):
    """Memory that can be seen to be freed."""


def test_a_plan_outlives_its_being_forgotten_while_it_is_sent(planner, monkeypatch):
    monkeypatch.setattr(module, "bytearray", Watched, raising=False)
    plan = planner.plan(whole(3))
    freed = weakref.ref(plan.memory)
    planner.remember(b"GET /", plan)
    planner.forget()
    gc.collect()
    churn = [bytearray(len(plan.memory)) for _ in range(100)]
    planner.tick(NOW + 5)
    assert freed() is plan.memory
    assert first_send(plan) == spelled(spell_out(whole(3)), expected_head(200, NOW + 5))
    assert planner.plan(whole(3)) is not plan
    del plan, churn
    assert freed() is None, "it ought to go with the last reference, without a collector"


@pytest.mark.parametrize("room", ["plan_room", "request_room"])
def test_a_full_memory_is_emptied_now_and_then(planner, room):
    for start in (NOW, NOW + EMPTY_SECONDS + 1):
        planner.plan(whole(1))
        setattr(planner, room, 0)
        planner.tick(start + EMPTY_SECONDS)
        assert planner.by_reply, "too early"
        planner.tick(start + EMPTY_SECONDS + 1)
        assert planner.by_reply == {}


def test_a_memory_that_is_not_full_stays(planner):
    plan = planner.plan(whole(1))
    planner.tick(NOW + 10_000)
    assert planner.plan(whole(1)) is plan
    assert first_send(plan).startswith(expected_head(200, NOW + 10_000))


# --- what is counted, and what the access log says

@pytest.mark.parametrize("case", REPLIES)
def test_content_is_what_lies_behind_the_header(heads, case):
    reply = REPLIES[case]
    plan = Plan(reply, heads.get(200), TALLY)
    assert plan.content == len(spelled(reply)) - len(STATUS) - len(reply.head)


def test_responses_are_counted_by_the_first_digit_of_their_status(planner):
    for status in (100, 200, 206, 304, 404, 503):
        plan = planner.plan(Reply(status, b"\r\n", (), False))
        assert plan.status == status
        assert plan.tally is planner.tallies[status // 100]


def test_lines_go_with_the_requests_that_they_are_for(planner):
    """When one is pushed out by another, and when all are forgotten."""
    plan, requests = planner.plan(whole(1)), unseen(planner)
    first, second = next(requests), next(requests)
    for request in (first, first):
        planner.remember(request, plan)
    planner.lines[first] = b"line"
    planner.request_room = 0
    for request in (second, second):
        planner.remember(request, plan)
    assert set(planner.by_request) == {second}
    assert planner.lines == {}
    planner.lines[second] = b"line"
    planner.forget()
    assert planner.lines == {}


# --- archives that are not in memory

@pytest.fixture
def lazy():
    """A Planner for one."""
    archive = Archive("site.tar", -1, len(ARCHIVE), BASE)
    archive.lazy = True
    return Planner(Library([archive]), spell_out, SERVER, NOW)


@pytest.mark.parametrize("case", REPLIES)
def test_smaller_pieces_are_the_same_reply(heads, case):
    plan = Plan(REPLIES[case], heads.get(200), TALLY, lazy=True)
    raw = spelled(REPLIES[case])
    assert b"".join(all_sends(plan)) == raw
    assert first_send(plan) == raw[:LAZY_PIECE]
    sent, found = 0, []
    while sent < plan.total:
        piece = plan.piece(sent)
        found += [ctypes.string_at(*span) for span in piece]
        assert sum(length for _, length in piece) <= LAZY_PIECE
        sent += sum(length for _, length in piece)
    assert b"".join(found) == raw


def test_only_what_is_in_such_an_archive_is_lazy(lazy, planner):
    assert lazy.plan(whole(1)).lazy
    assert not lazy.plan(reply(1)).lazy
    assert not planner.plan(whole(1)).lazy


@pytest.mark.parametrize(("size", "remembered"), ((1000, True), (LAZY_MEMO - 1000, True), (LAZY_MEMO, False)))
def test_large_responses_are_not_remembered(lazy, size, remembered):
    request = next(unseen(lazy))
    for _ in range(3):
        lazy.remember(request, lazy.plan(Reply(200, HEAD, (at(5, size),), False)))
    assert (request in lazy.by_request) == remembered


def test_requests_are_forgotten_after_a_while(lazy):
    """So that it is looked again whether pages are there; plans stay."""
    request = next(unseen(lazy))
    for now in (NOW, NOW + WARM_SECONDS + 1):
        for _ in range(2):
            lazy.remember(request, lazy.plan(whole(1)))
        lazy.tick(now + WARM_SECONDS)
        assert lazy.by_request
        lazy.tick(now + WARM_SECONDS + 1)
        assert not lazy.by_request
        assert lazy.by_reply
        assert lazy.request_room == MEMO_REQUESTS


def test_a_forgetful_planner_keeps_nothing():
    planner = ForgetfulPlanner(LIBRARY, lambda whole: whole, SERVER, NOW)
    plan = planner.plan(Reply(200, b"\r\n", (b"a page",), False))
    assert planner.plan(Reply(200, b"\r\n", (b"a page",), False)) is not plan
    assert not planner.by_reply and planner.plan_room == MEMO_PLANS
