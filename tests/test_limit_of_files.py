"""How many connections the limit of open files allows for."""

import resource

import pytest

import tarweb
from options import UsageError

FIRST = 10      # the highest descriptor open at start, plus one


@pytest.fixture
def limit(monkeypatch):
    """limit(hard, root) makes that the limit; gives the list that every new limit is appended to."""
    def begin(hard, root=False):
        now = []

        def setrlimit(_, both):
            if both[1] > hard != resource.RLIM_INFINITY and not root:
                raise ValueError("not allowed to raise maximum limit")
            now.append(both)

        monkeypatch.setattr(tarweb, "is_open", lambda fd: fd < FIRST)
        monkeypatch.setattr(tarweb.resource, "getrlimit", lambda _: (hard, hard))
        monkeypatch.setattr(tarweb.resource, "setrlimit", setrlimit)
        return now
    return begin


@pytest.mark.parametrize(("hard", "root", "wanted", "connections", "becomes"), (
    (20000, False, None, 4096, (FIRST + 4097, 20000)),
    (20000, False, 100, 100, (FIRST + 101, 20000)),
    (resource.RLIM_INFINITY, False, 100, 100, (FIRST + 101, resource.RLIM_INFINITY)),
    (1024, False, None, 1024 - FIRST - 1, (1024, 1024)),                    # the default gives way
    (1024, True, None, 4096, (FIRST + 4097, FIRST + 4097)),                 # root raises the limit
    (1024, True, 5000, 5000, (FIRST + 5001, FIRST + 5001)),
))
def test_connections_and_slots(limit, hard, root, wanted, connections, becomes):
    now = limit(hard, root)
    assert tarweb.limit_connections(wanted) == (connections, becomes[0])
    assert now == [becomes]


def test_a_high_descriptor_costs_one_place(limit, monkeypatch):
    limit(1024)
    monkeypatch.setattr(tarweb, "is_open", lambda fd: fd < FIRST or fd == 900)
    assert tarweb.limit_connections(None) == (1024 - FIRST - 1 - 1, 1024)


def test_what_was_asked_for_does_not_give_way(limit):
    limit(1024)
    with pytest.raises(UsageError, match=r"--max-connections 5000 .*1024.*ulimit -n"):
        tarweb.limit_connections(5000)


@pytest.mark.parametrize("error", (OSError, ValueError))
def test_what_the_system_refuses_is_explained(limit, monkeypatch, error):
    def refuse(*_):
        raise error

    limit(1024, root=True)
    monkeypatch.setattr(tarweb.resource, "setrlimit", refuse)
    with pytest.raises(UsageError, match=r"--max-connections 2000000 .*fs\.nr_open"):
        tarweb.limit_connections(2_000_000)
