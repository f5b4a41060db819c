"""Whose turn it is to make room for another, where all connections are taken (acceptor.Eviction)."""

import pytest

from acceptor import OWING, PACE, STALL, Eviction
from connection import (
    BODY, CLOSING, FREE, HANDSHAKE, HEAD, IDLE, INTERIM, PREFACE, RESPONSE, SEND_GRACE, Connection,
)


def table(*rows):
    """Connections from (state, whether answered before, when it came, the second since which it waits)."""
    connections = [Connection(slot) for slot in range(len(rows))]
    for connection, (state, answered, opened, since) in zip(connections, rows, strict=True):
        connection.state, connection.opened, connection.since = state, opened, since
        connection.plan = "a plan" if answered else None
    return connections


def first(now, *rows, acknowledged=lambda slot: 0):
    """The number of the row that goes first at `now`, or None."""
    found = Eviction(table(*rows), acknowledged).victim(int(now), now)
    return found and found.slot


@pytest.mark.parametrize("state", [IDLE, HEAD, BODY, HANDSHAKE, PREFACE])
def test_p12_who_owes_a_request_is_safe_for_a_moment(state):
    assert first(100 + OWING - 0.01, (state, False, 100, 100)) is None
    assert first(100 + OWING, (state, False, 100, 100)) == 0


@pytest.mark.parametrize("state", [RESPONSE, INTERIM])
def test_p12_who_does_not_read_is_safe_for_longer(state):
    assert first(100 + STALL - 0.01, (state, True, 50, 100)) is None
    assert first(100 + STALL, (state, True, 50, 100)) == 0


def test_p12_who_reads_is_safe():
    taken = [0]
    eviction = Eviction(table((RESPONSE, True, 50, 100)), taken.__getitem__)
    for now in range(101, 130):
        taken[0] = (now - 100) * PACE
        assert eviction.victim(now, now + 0.5) is None
    taken[0] += PACE - 1
    assert eviction.victim(130, 130 + STALL + 0.5).slot == 0, "it has not taken as much for longer than a second"


def test_p12_who_reads_again_is_safe_again():
    """Though it was found, in the same pass as another, while it did not read."""
    taken = [0, 0]
    connections = table((RESPONSE, True, 50, 100), (RESPONSE, True, 50, 101))
    eviction = Eviction(connections, taken.__getitem__)
    assert eviction.victim(110, 110).slot == 0
    connections[0].state = CLOSING
    taken[1] = PACE
    assert eviction.victim(111, 111) is None


def test_p12_what_need_not_be_known_is_not_asked():
    """Of those whose send is new, and of those that are not sent to."""
    rows = (RESPONSE, True, 50, 100), (HEAD, False, 50, 99)
    assert first(100 + STALL - 0.01, *rows, acknowledged=None) == 1


def test_p12_where_nobody_knows_whether_it_reads_it_has_more_time():
    """A unix socket."""
    row = RESPONSE, True, 50, 100
    assert first(100 + SEND_GRACE - 0.01, row, acknowledged=lambda slot: None) is None
    assert first(100 + SEND_GRACE, row, acknowledged=lambda slot: None) == 0


def test_p12_those_who_would_lose_a_response_go_behind_those_who_would_not_but_in_front_of_those_in_use():
    unread, silent, idle, in_use = (RESPONSE, True, 50, 60), (IDLE, False, 90, 90), (IDLE, True, 50, 80), (
        IDLE, True, 50, 100)
    assert first(100.5, unread, in_use) == 0
    assert first(100.5, unread, in_use, silent) == 2
    assert first(100.5, unread, in_use, idle) == 2


def test_p12_a_slot_is_not_judged_by_its_former_connection():
    taken = [10 * PACE]
    connections = table((RESPONSE, True, 50, 100))
    eviction = Eviction(connections, taken.__getitem__)
    assert eviction.victim(102, 102) is None
    connections[0].forget()
    connections[0].opened = connections[0].since = 110
    taken[0] = PACE
    assert eviction.victim(120, 120) is None
    assert eviction.victim(122, 122).slot == 0


def test_p12_who_was_answered_can_go_at_once_but_behind_those_that_say_nothing():
    """Its second is the one in which it was answered, which lies behind."""
    in_use, silent, new = (IDLE, True, 50, 100), (IDLE, False, 100.1, 100), (IDLE, False, 100.8, 100)
    assert first(100.9, in_use) == 0
    assert first(100.9, in_use, silent, new) == 1
    assert first(100.9, in_use, new) == 0
    assert first(103, (IDLE, True, 50, 99), silent, new) == 0


def test_p12_nobody_else_goes():
    assert first(1000, (FREE, False, 0, 0), (CLOSING, True, 0, 0)) is None


def test_p12_they_go_one_after_the_other():
    rows = [(IDLE, False, 100 + i / 100, 100) for i in range(30)]
    connections, gone = table(*rows), []
    eviction = Eviction(connections, None)
    while (connection := eviction.victim(102, 102.5)) is not None:
        gone.append(connection.slot)
        connection.state = CLOSING
    assert gone == list(range(30))
