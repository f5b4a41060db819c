"""Dates over reloads: whoever asks by date gets what has come in place of what it has."""

import io
import os
import signal
import tarfile
import time

import pytest
from support import wait_until

from archive import Redirect, Representation, Resource
from generation import renew_dates, with_later_dates
from http1 import format_date, parse_date

NOW, OLD = 1_800_000_000, 1_600_000_000


def one(tag, mtime, coding=""):
    return Representation(0, 10, mtime, coding, b"text/plain", tag and b'"%b"' % tag)


# (tag, date) that was there, (tag, date) that takes its place -> the date that this has from then on
PAIRS = {
    "the same": ((b"a", OLD), (b"a", OLD), OLD),
    "the same bytes, later": ((b"a", OLD), (b"a", OLD + 1), OLD + 1),
    "the same bytes, earlier": ((b"a", OLD), (b"a", OLD - 1), OLD),
    "the same bytes, without a date": ((b"a", OLD), (b"a", 0), OLD),
    "other bytes, later": ((b"a", OLD), (b"b", OLD + 1), OLD + 1),
    "other bytes of the same date": ((b"a", OLD), (b"b", OLD), NOW),
    "a roll-back": ((b"a", OLD), (b"b", OLD - 86400), NOW),
    "other bytes, without a date": ((b"a", OLD), (b"b", 0), NOW),
    "never a date": ((b"a", 0), (b"b", 0), 0),
    "the first date": ((b"a", 0), (b"b", OLD), OLD),
    "a reload in the same second": ((b"a", NOW), (b"b", OLD), NOW + 1),
    "a clock that is behind": ((b"a", NOW + 9), (b"b", NOW + 9), NOW + 10),
    "without tags": ((b"", OLD), (b"", OLD), NOW),
    "without tags, later": ((b"", OLD), (b"", OLD + 1), OLD + 1),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_date_is_that_of_one_content(case):
    was, after, date = PAIRS[case]
    was, after = Resource(one(*was), ()), Resource(one(*after), ())
    got = with_later_dates(after, was, NOW)
    assert got == Resource(after.plain._replace(mtime=date), ())
    assert (got is after) == (date == after.plain.mtime)


def test_a_date_that_was_given_stays_over_further_reloads():
    first, second = Resource(one(b"a", OLD), ()), Resource(one(b"b", OLD), ())
    renewed = with_later_dates(second, first, NOW)
    for _ in range(3):
        renewed = with_later_dates(second, renewed, NOW + 1000)
        assert renewed.plain.mtime == NOW
    assert with_later_dates(first, renewed, NOW + 2000).plain.mtime == NOW + 2000


# What was there, what takes its place -> dates. All of a path share what has changed: the client may have any of them.
VARIANTS = {
    "nothing changed": ([one(b"a", OLD), one(b"g", OLD, "gzip")], [one(b"a", OLD), one(b"g", OLD, "gzip")], [OLD, OLD]),
    "a new variant": ([one(b"a", OLD)], [one(b"a", OLD), one(b"g", OLD, "gzip")], [OLD, OLD]),
    "a new variant of what was renewed": (
        [one(b"a", NOW - 5)], [one(b"a", OLD), one(b"g", OLD, "gzip")], [NOW - 5, NOW - 5]),
    "a variant less": ([one(b"a", OLD), one(b"g", OLD + 5, "gzip")], [one(b"a", OLD)], [OLD]),
    "packed anew": (
        [one(b"a", OLD), one(b"g", OLD, "gzip")], [one(b"a", OLD), one(b"h", OLD, "gzip")], [NOW, NOW]),
    "other bytes, and a new variant of the old date": (
        [one(b"a", OLD)], [one(b"b", OLD + 5), one(b"g", OLD, "gzip")], [OLD + 5, NOW]),
    "a variant that was later": (
        [one(b"a", OLD), one(b"g", OLD + 5, "gzip")], [one(b"b", OLD + 5)], [NOW]),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_dates_of_variants(case):
    was, after, dates = VARIANTS[case]
    got = with_later_dates(Resource(after[0], tuple(after[1:])), Resource(was[0], tuple(was[1:])), NOW)
    assert [each.mtime for each in (got.plain, *got.variants)] == dates
    assert [each._replace(mtime=0) for each in (got.plain, *got.variants)] == [each._replace(mtime=0) for each in after]


class Index(dict):
    stored = dict.get


def test_only_what_was_there_before_is_compared():
    was = Index({b"/a": Resource(one(b"a", OLD), ()), b"/b": Redirect(b"/b/"), b"/c": Resource(one(b"c", OLD), ())})
    after = Index({b"/a": Resource(one(b"x", OLD), ()), b"/b": Resource(one(b"b", OLD), ()), b"/c": Redirect(b"/c/"),
                   b"/d": Resource(one(b"d", OLD), ())})
    expected = {**after, b"/a": Resource(one(b"x", NOW), ())}
    renew_dates(after, was, NOW)
    assert after == expected


def deploy(path, content, mtime):
    with tarfile.open(f"{path}.new", "w") as tar:
        for name, data in (("a.txt", content), ("b.txt", b"always the same")):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            tar.addfile(member, io.BytesIO(data))
    os.replace(f"{path}.new", path)


@pytest.mark.parametrize("flags", [(), ("--keep", "1"), ("--etags", "off")], ids=" ".join)
def test_nobody_who_asks_by_date_keeps_what_is_replaced(start, tmp_path, flags):
    path, told = tmp_path / "site.tar", format_date(OLD).decode()
    deploy(path, b"first", OLD)
    server = start(path, *flags)
    assert server.fetch("/a.txt")["Last-Modified"] == told
    dates, workers = {told}, len(server.workers)
    for content, mtime in ((b"SECOND", OLD), (b"third", OLD - 5), (b"first", OLD)):
        deploy(path, content, mtime)
        began = int(time.time())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda content=content: server.fetch("/a.txt").body == content)
        wait_until(lambda: len(server.workers) == workers)      # a retiring one still answers who had come to it
        wait_until(lambda: "last-modified" in server.fetch("/a.txt").headers)       # once it is not later than Date
        date = server.fetch("/a.txt")["Last-Modified"]
        assert parse_date(date.encode()) >= began
        for known in dates:
            assert server.fetch("/a.txt", if_modified_since=known).status == 200
            assert server.fetch("/a.txt", if_range=known, range="bytes=0-1").status == 200
        assert server.fetch("/a.txt", if_modified_since=date).status == 304
        if "off" not in flags:
            assert server.fetch("/b.txt", if_modified_since=told).status == 304
        dates.add(date)
