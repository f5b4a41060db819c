"""The soak for a few seconds, in which everything happens once or twice; `make soak` is the hour."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import soak
from soak_clients import SMALL, Crowd, SiteVersions, Target, Visit, entity_tag
from support import ROOT, Response

SECONDS = 8


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """A site in its third version, the second of which is not to be seen any more."""
    site = SiteVersions(tmp_path_factory.mktemp("site"), "site", ["t"])
    site.write()
    site.write()
    return site


def answer(body, tag=None):
    return Response(200, {"etag": tag or entity_tag(body)}, body, "1.1")


def test_p14_p15_p17_a_short_soak():
    ended = subprocess.run([sys.executable, ROOT / "tests/soak.py", "--minutes", str(SECONDS / 60)],
                           capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "**Passed.**" in ended.stdout


# --- that it would notice ------------------------------------------------------------------------------------------


def test_what_is_right_passes(versions):
    for number in (2, 3):
        page = versions.files(number)["page/07.html"]
        assert versions.body("page/07.html", answer(page), 2) == page
    fixed = versions.fixed[f"const/{SMALL - 1:03}.txt"]
    assert versions.body(f"const/{SMALL - 1:03}.txt", answer(fixed), 3) == fixed


@pytest.mark.parametrize(("name", "number", "floor"), [("page/07.html", 2, 3), ("page/07.html", 4, 3),
                                                       ("page/08.html", 3, 3)])
def test_other_versions_and_other_files_are_noticed(versions, name, number, floor):
    page = versions.files(number)["page/07.html"]
    with pytest.raises(AssertionError):
        versions.body(name, answer(page), floor)


def test_other_bytes_are_noticed(versions):
    page = versions.files(3)["page/07.html"]
    visit = Visit(Crowd(), Target("t", [versions], {}), "kind", "127.0.0.1", None)
    client = SimpleNamespace(floors={"site": 3})
    visit.check(client, versions, "page/07.html", answer(page))
    with pytest.raises(AssertionError):
        visit.check(client, versions, "page/07.html", answer(page[:-1], entity_tag(page)))


@pytest.mark.parametrize(("opened", "killed", "error", "lost"), [
    (-2, -1, ConnectionResetError(), True),             # it was there when the worker was killed
    (-2, -3.5, ConnectionResetError(), False),          # it came later
    (-2, None, ConnectionResetError(), False),
    (-2, -1, AssertionError("other bytes"), False),
    (-2, -1, AssertionError("the connection ended within a response"), True),
])
def test_failures_are_excused_by_a_kill_alone(versions, opened, killed, error, lost):
    crowd, target, now = Crowd(), Target("t", [versions], {}), time.monotonic()
    target.kills += [] if killed is None else [now + killed]
    visit = Visit(crowd, target, "kind", "127.0.0.1", None)
    visit.opened.append(now + opened)
    crowd.failed(visit, error)
    assert (crowd.lost["t", "kind"], len(crowd.failures)) == ((1, 0) if lost else (0, 1))


@pytest.mark.parametrize(("name", "grown"), [("memory", 20_000), ("blocks", 60_000), ("fds", 30)])
def test_growth_is_noticed(tmp_path, name, grown):
    hour = soak.Soak(SimpleNamespace(minutes=60, seed=1, period=None), tmp_path)
    flat = [(at, soak.Sample(10_000, 50_000, 20)) for at in range(0, 3600, 10)]
    rising = [(at, sample._replace(**{name: getattr(sample, name) + grown * at // 3600})) for at, sample in flat]
    quiet, other = ({role: samples if role == "workers" else flat for role in soak.ROLES} for samples in (flat, rising))
    assert not [*hour.judge_growth(SimpleNamespace(samples=quiet))]
    found = [*hour.judge_growth(SimpleNamespace(samples=other))]
    assert len(found) == 1 and found[0].startswith(f"{name} of workers")


def test_p14_nobody_keeps_an_archive_that_has_been_replaced(tmp_path):
    """It would take disk space until the next reload, or for ever."""
    options = SimpleNamespace(minutes=1, seed=1, period=None)
    little = soak.Soak(options, tmp_path)
    subject = soak.Subject("small", tmp_path, [SiteVersions(tmp_path, "site", ["t"])], features=("reloads",))
    try:
        subject.begin()
        kept = [path for pid in [subject.server.pid, *subject.server.workers] for path in open_files(pid)
                if ".tar" in path and "deleted" in path]
    finally:
        little.stop(subject)
    assert not kept and not little.wrong


def open_files(pid):
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
