"""The scoreboard: numbers that all processes share."""

import os

import pytest
from clock import COUNTERS, GAUGES, NUMBERS, Counts
from metrics import PAST, ROWS, SERVER, TEXT_SIZE, Scoreboard


@pytest.fixture
def board():
    return Scoreboard()


def counts_of(start):
    """Counts in which each number is another one."""
    counts = Counts()
    for i, name in enumerate(NUMBERS):
        setattr(counts, name, start + i)
    return counts


def in_child(action):
    """Run `action` in a forked process, to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_names_are_said_once():
    assert len({*NUMBERS, *SERVER}) == len(NUMBERS) + len(SERVER)


def test_all_begins_at_zero(board):
    assert board.totals() == dict.fromkeys(NUMBERS, 0) == {name: getattr(Counts(), name) for name in NUMBERS}
    assert board.server() == dict.fromkeys(SERVER, 0)
    assert board.description() == ""


def test_counts_are_those_that_there_are():
    with pytest.raises(AttributeError):
        Counts().misspelt = 1


# --- rows ----------------------------------------------------------------------------------------------------------


def test_totals_are_sums_over_rows(board):
    rows = [board.take_row() for _ in range(3)]
    for row, start in zip(rows, (10, 200, 3000), strict=True):
        board.publish(row, counts_of(start))
    assert board.totals() == {name: 3210 + 3 * i for i, name in enumerate(NUMBERS)}


def test_publishing_replaces(board):
    row = board.take_row()
    board.publish(row, counts_of(100))
    board.publish(row, counts_of(7))
    assert board.totals() == {name: 7 + i for i, name in enumerate(NUMBERS)}


def test_what_a_worker_counted_outlives_it_and_what_it_had_does_not(board):
    first, second = board.take_row(), board.take_row()
    board.publish(first, counts_of(100))
    board.publish(second, counts_of(1000))
    board.free_row(first)
    totals = board.totals()
    assert {name: totals[name] for name in COUNTERS} == {name: 1100 + 2 * i for i, name in enumerate(COUNTERS)}
    assert {name: totals[name] for name in GAUGES} == {
        name: 1000 + i for i, name in enumerate(GAUGES, len(COUNTERS))}
    board.free_row(second)
    totals = board.totals()
    assert {name: totals[name] for name in COUNTERS} == {name: 1100 + 2 * i for i, name in enumerate(COUNTERS)}
    assert not any(totals[name] for name in GAUGES)


def test_a_row_is_empty_for_its_next_worker(board):
    row = board.take_row()
    board.publish(row, counts_of(5))
    board.free_row(row)
    before = board.totals()
    assert board.take_row() == row
    assert board.totals() == before
    board.publish(row, counts_of(0))
    assert board.totals()[COUNTERS[3]] == 8 + 3


def test_rows_are_distinct_and_run_out(board):
    rows = {board.take_row() for _ in range(ROWS)}
    assert rows == set(range(ROWS))
    assert PAST not in rows, "the row of those that are no more is nobody's"
    assert board.take_row() is None
    board.free_row(7)
    assert board.take_row() == 7
    assert board.take_row() is None


def test_neighbours_do_not_touch(board):
    """The last row, that of the past, the server's numbers and the text lie one behind the other."""
    rows = [board.take_row() for _ in range(ROWS)]
    for row in (rows[0], rows[1], rows[-1]):
        board.publish(row, counts_of(1))
    board.set(**{name: 50 + i for i, name in enumerate(SERVER)})
    board.describe("a text")
    board.free_row(rows[-1])
    board.publish(rows[-2], counts_of(2))
    totals = board.totals()
    assert [totals[name] for name in COUNTERS] == [5 + 4 * i for i in range(len(COUNTERS))]
    assert board.server() == {name: 50 + i for i, name in enumerate(SERVER)}
    assert board.description() == "a text"


@pytest.mark.parametrize("value", [0, 1, 2 ** 32, 2 ** 63, 2 ** 64 - 1])
def test_numbers_of_all_sizes(board, value):
    row, counts = board.take_row(), Counts()
    counts.bytes_sent = value
    board.publish(row, counts)
    board.free_row(row)
    assert board.totals()["bytes_sent"] == value


# --- the server's own numbers, and the text ----------------------------------------------------------------------


def test_the_servers_numbers(board):
    board.set(started=1_700_000_000.9, ready=True, stopping=False)
    board.add("reloads")
    board.add("reloads")
    assert board.server() == dict.fromkeys(SERVER, 0) | {"started": 1_700_000_000, "ready": 1, "reloads": 2}


@pytest.mark.parametrize("name", ["misspelt", "bytes_sent"])
def test_the_server_has_no_other_numbers(board, name):
    with pytest.raises(ValueError):
        board.add(name)


def test_a_text_replaces_a_longer_one(board):
    board.describe("a text that is rather long")
    board.describe("d\u00e9j\u00e0")
    assert board.description() == "d\u00e9j\u00e0"


def test_a_text_that_is_too_long_is_cut(board):
    board.describe("\u20ac" * TEXT_SIZE)
    assert len(board.description().encode(errors="replace")) <= TEXT_SIZE + 3
    assert board.description().startswith("\u20ac" * (TEXT_SIZE // 3))
    assert board.totals() == dict.fromkeys(NUMBERS, 0)


# --- processes -----------------------------------------------------------------------------------------------------


def test_what_children_publish_is_seen_by_the_parent_and_by_each_other(board):
    first, second = board.take_row(), board.take_row()
    in_child(lambda: board.publish(first, counts_of(10)))
    in_child(lambda: board.publish(second, counts_of(2000)))
    assert board.totals() == {name: 2010 + 2 * i for i, name in enumerate(NUMBERS)}

    def look():
        assert board.totals()[COUNTERS[0]] == 2010

    in_child(look)


def test_a_child_sees_what_the_parent_says_after_the_fork(board):
    say, hear = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(say[0], 1)
        heard = board.description() == "later" and board.server()["generation"] == 3
        os._exit(0 if heard else 1)
    board.describe("later")
    board.set(generation=3)
    os.write(say[1], b"1")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (*say, *hear):
        os.close(end)


def test_a_child_that_is_killed_leaves_what_it_published(board):
    row = board.take_row()
    pid = os.fork()
    if pid == 0:
        counts = counts_of(40)
        board.publish(row, counts)
        counts.accepted += 5            # not published any more
        os.kill(os.getpid(), 9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    board.free_row(row)
    assert board.totals()["accepted"] == 40 + NUMBERS.index("accepted")


class Meddled:
    """Words of a Scoreboard; `action` happens, once, when part of them has been read."""

    def __init__(self, words, action):
        self.words, self.action = words, action

    def __getitem__(self, key):
        found = self.words[key]
        if isinstance(key, slice):
            found, action, self.action = found.tolist(), self.action, lambda: None
            action()
        return found

    def __setitem__(self, key, value):
        self.words[key] = value


def test_no_sum_counts_a_worker_twice_when_it_ends_meanwhile(board):
    """Else the next sum would be smaller, which Prometheus takes for a new beginning."""
    reader, row, ended = board, board.take_row(), []
    board.publish(row, counts_of(1000))
    parents_words = reader.words

    def end():
        reader.words = parents_words
        board.free_row(row)
        reader.words = meddled
        ended.append(row)

    meddled = reader.words = Meddled(parents_words, end)
    totals = reader.totals()
    assert ended == [row]
    assert {name: totals[name] for name in COUNTERS} == {name: 1000 + i for i, name in enumerate(COUNTERS)}
