"""Whose turn it is to make room for another, where all connections are taken (state.IdleConnections)."""

import pytest

from state import (
    BODY, CLOSING, FREE, HANDSHAKE, HEAD, IDLE, OWING, PREFACE, RESPONSE, SEND_GRACE, Connection, IdleConnections,
)


def table(*rows):
    """Connections from (state, whether answered before, when it came, the second since which it waits)."""
    connections = [Connection(slot) for slot in range(len(rows))]
    for connection, (state, answered, opened, since) in zip(connections, rows, strict=True):
        connection.state, connection.opened, connection.since = state, opened, since
        connection.plan = "a plan" if answered else None
    return connections


def first(now, *rows):
    """The number of the row that goes first at `now`, or None."""
    found = IdleConnections(table(*rows)).longest(int(now), now)
    return found and found.slot


@pytest.mark.parametrize("state", [IDLE, HEAD, BODY, HANDSHAKE, PREFACE])
def test_p12_who_owes_a_request_is_safe_for_a_moment(state):
    assert first(100 + OWING - 0.01, (state, False, 100, 100)) is None
    assert first(100 + OWING, (state, False, 100, 100)) == 0


def test_p12_who_does_not_read_is_safe_for_longer():
    assert first(100 + SEND_GRACE - 0.01, (RESPONSE, True, 50, 100)) is None
    assert first(100 + SEND_GRACE, (RESPONSE, True, 50, 100)) == 0


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
    idle = IdleConnections(connections)
    while (connection := idle.longest(102, 102.5)) is not None:
        gone.append(connection.slot)
        connection.state = CLOSING
    assert gone == list(range(30))
