"""Lines of the access log, read back by others' parsers; and their writing, by a ring that does all a kernel may."""

import ctypes
import errno
import json
import logging
import os
import re
import socket
import stat
import time
from datetime import UTC, datetime

import accesslog
import apachelogs
import pytest
from accesslog import LARGEST_WRITE, MAX_WAITING, PIPE_BUF, AccessLog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

EXPLORING = int(os.environ.get("TARWEB_EXAMPLES", 0))
TAG = 0x11000000
COMBINED = apachelogs.LogParser(apachelogs.COMBINED, encoding="bytes")
STYLES = pytest.mark.parametrize("style", ["combined", "json"])
FULL = f"access log: {os.strerror(errno.ENOSPC)}: lines are dropped until it can be written to"


def examples(count, **more):
    return settings(max_examples=EXPLORING or count, derandomize=not EXPLORING, deadline=None, database=None, **more)


class Ring:
    """Keeps what is armed; `complete` ends it, and the log's file is then what has been written."""

    def __init__(self):
        self.armed = None           # (address, length), and what was there when it was armed
        self.file = b""
        self.sizes = []

    def arm_write(self, tag, fd, address, length):
        assert tag == TAG and self.armed is None, "a second write in flight"
        assert length > 0
        self.armed = address, length, ctypes.string_at(address, length)
        self.sizes.append(length)

    entries = 8

    def flush(self, count):
        """All that is armed is on its way then."""
        assert count == self.entries

    def complete(self, log, result=None):
        """End it with `result`: an error, or as many of its bytes; None for all of them."""
        address, length, data = self.armed
        assert ctypes.string_at(address, length) == data, "changed while being written"
        result = length if result is None else min(result, length)
        self.file += data[:max(result, 0)]
        self.armed = None
        log.on_written(result)

    def complete_all(self, log):
        while self.armed:
            self.complete(log)


@pytest.fixture
def files(tmp_path):
    """kind -> a descriptor of that kind."""
    read_end, write_end = os.pipe()
    pair = socket.socketpair()
    regular = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    yield {"file": regular, "pipe": write_end, "socket": pair[0].fileno()}
    for fd in (read_end, write_end, regular):
        os.close(fd)
    for end in pair:
        end.close()


@pytest.fixture
def make(files):
    return lambda style="combined", kind="file": AccessLog(Ring(), files[kind], style, TAG)


def formatter(style):
    """An AccessLog that only makes lines."""
    with open(os.devnull, "wb") as null:
        return AccessLog(None, null.fileno(), style, TAG)


LOGS = {style: formatter(style) for style in ("combined", "json")}


def line_of(style, head, status=200, size=1024, address=b"192.0.2.1", now=1795634220):
    log = LOGS[style]
    log.set_date(now)
    return log.client(address) + log.date + log.describe(head, status, size)


def read(style, line):
    """What others read out of a line, as a dict of bytes, numbers and None."""
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and len(line) < PIPE_BUF
    assert re.fullmatch(rb"[ -~]+\n", line), "not printable"
    if style == "json":
        found = json.loads(line)
        assert list(found) == ["remote", "time", "method", "target", "protocol", "host", "status", "bytes", "referer",
                               "agent"]
        return found
    entry = COMBINED.parse(line.decode())
    return {"remote": entry.remote_host, "time": entry.request_time, "line": entry.request_line,
            "status": entry.final_status, "bytes": entry.bytes_sent or 0,
            "referer": entry.headers_in["Referer"], "agent": entry.headers_in["User-Agent"]}


HEAD = (b"GET /x?q HTTP/1.1\r\nHost: example.org\r\nuser-AGENT: \t agent/1.0 (X11)\r\nAccept: */*\r\n"
        b"REFERER:https://example.org/\r\n\r\n")


# --- lines ---------------------------------------------------------------------------------------------------------


def test_a_combined_line():
    assert line_of("combined", HEAD) == (
        b'192.0.2.1 - - [25/Nov/2026:19:17:00 +0000] "GET /x?q HTTP/1.1" 200 1024 "https://example.org/" '
        b'"agent/1.0 (X11)"\n')


def test_a_json_line():
    assert line_of("json", HEAD) == (
        b'{"remote":"192.0.2.1","time":"2026-11-25T19:17:00Z","method":"GET","target":"/x?q","protocol":"HTTP/1.1",'
        b'"host":"example.org","status":200,"bytes":1024,"referer":"https://example.org/",'
        b'"agent":"agent/1.0 (X11)"}\n')


def test_combined_is_what_others_read():
    assert read("combined", line_of("combined", HEAD)) == {
        "remote": b"192.0.2.1", "time": datetime(2026, 11, 25, 19, 17, tzinfo=UTC), "line": b"GET /x?q HTTP/1.1",
        "status": 200, "bytes": 1024, "referer": b"https://example.org/", "agent": b"agent/1.0 (X11)"}


def test_what_is_not_there():
    head = b"HEAD / HTTP/1.0\r\n\r\n"
    assert line_of("combined", head, 304, 0).endswith(b'] "HEAD / HTTP/1.0" 304 - "-" "-"\n')
    found = read("json", line_of("json", head, 304, 0))
    assert (found["bytes"], found["host"], found["referer"], found["agent"]) == (0, None, None, None)


@pytest.mark.parametrize(("head", "line", "parts"), [
    (b"", b"-", ("", "", "")),
    (b"\r\n", b"-", ("", "", "")),
    (b"GET", b"GET", ("", "GET", "")),
    (b"GET /", b"GET /", ("", "GET /", "")),
    (b"GET / HTTP/1.1", b"GET / HTTP/1.1", ("GET", "/", "HTTP/1.1")),
    (b"GET /a b HTTP/1.1\r\nHo", b"GET /a b HTTP/1.1", ("GET", "/a b", "HTTP/1.1")),
    (b"\x16\x03\x01\x02", rb"\x16\x03\x01\x02", ("", "\x16\x03\x01\x02", "")),
    (b"GET / HTTP/1.1\nHost: t\n\n", rb"GET / HTTP/1.1\x0AHost: t\x0A\x0A", ("GET", "/ HTTP/1.1\nHost:", "t\n\n")),
])
def test_heads_that_are_cut_or_are_none(head, line, parts):
    assert b'] "' + line + b'" 400 17 "-" "-"\n' in line_of("combined", head, 400, 17)
    found = read("json", line_of("json", head, 400, 17))
    assert (found["method"], found["target"], found["protocol"]) == parts


def test_fields_that_only_look_like_those_asked_for():
    head = (b"GET /?\rreferer:x HTTP/1.1\r\nX-Referer: a\r\nReferers: b\r\nX: \nUser-Agent: c\r\n"
            b"User-Agent : d\r\n\r\n")
    for style in LOGS:
        found = read(style, line_of(style, head))
        assert found["referer"] is found["agent"] is None


def test_an_empty_field_is_empty():
    head = b"GET / HTTP/1.1\r\nReferer:\r\nUser-Agent: \r\nHost: \r\n\r\n"
    assert line_of("combined", head).endswith(b' "" ""\n')
    found = read("json", line_of("json", head))
    assert found["referer"] == found["agent"] == found["host"] == ""


def test_no_byte_leaves_its_field():
    """Quote, backslash, control characters, all that is not ASCII: the format's own bytes are never a client's."""
    nasty = bytes(set(range(256)) - set(b"\r\n"))
    head = b"GET /%b HTTP/1.1\r\nReferer: r%b\r\nUser-Agent: a%b\r\n\r\n" % (nasty, nasty[:128], nasty[128:])
    found = read("combined", line_of("combined", head))
    assert found["line"] == b"GET /%b HTTP/1.1" % nasty
    assert found["referer"] == b"r" + nasty[:128].rstrip(b"\r\n")
    assert found["agent"] == b"a" + nasty[128:][:len(found["agent"]) - 1] and len(found["agent"]) > 100


def test_json_keeps_text_and_shows_what_is_none():
    head = 'GET /d\u00e9j\u00e0 HTTP/1.1\r\nUser-Agent: \u732b"\\\r\n\r\n'.encode() + b"Referer: none\r\n"
    found = read("json", line_of("json", head.replace(b"GET", b"G\xff\x00T")))
    assert found["target"] == "/d\u00e9j\u00e0"
    assert found["agent"] == '\u732b"\\'
    assert found["method"] == "G\\xff\0T"


@STYLES
@pytest.mark.parametrize("filler", [b"a", b'"', b"\\", b"\xff", b"\x00", "\u00e9".encode(), "\U0001f600".encode(),
                                    b"a\xff"])
def test_the_longest_lines(style, filler):
    long = filler * (32_768 // len(filler))
    head = b"%b /%b HTTP/1.1\r\nHost: %b\r\nReferer: %b\r\nUser-Agent: %b\r\n\r\n" % (
        filler * 60, long, long, long, long)
    line = line_of(style, head, 431, 10 ** 15, b"2001:db8:1111:2222:3333:4444:5555:6666")
    read(style, line)
    assert len(line) > PIPE_BUF // 3, "cut more than it needs to be"


@pytest.mark.parametrize("lead", range(8))
def test_no_escape_is_cut_in_two(lead):
    line = line_of("combined", b"GET /" + b"a" * (1480 + lead) + b"\xff" * 20 + b" HTTP/1.1\r\n\r\n")
    quoted = line.split(b'"')[1]
    assert re.fullmatch(rb"GET /a+(\\xFF)+", quoted) and 1497 <= len(quoted) <= 1500


@STYLES
def test_clients_addresses(style):
    for address, remote in {b"": "unix:", b"192.0.2.1": "192.0.2.1", b"2001:db8::1": "2001:db8::1"}.items():
        found = read(style, line_of(style, HEAD, address=address))["remote"]
        assert found in (remote, remote.encode())


@pytest.mark.parametrize("now", [0, 951_782_399.999, 951_782_400, 1_709_164_800, 4_102_444_799])
def test_dates(now):
    when = datetime.fromtimestamp(int(now), UTC)
    assert read("combined", line_of("combined", HEAD, now=now))["time"] == when
    assert read("json", line_of("json", HEAD, now=now))["time"] == when.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_the_date_is_utc_and_english_wherever_this_runs(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        LOGS["combined"].set_date(1_735_689_599)
        assert LOGS["combined"].date == b"31/Dec/2024:23:59:59 +0000] "
    finally:
        monkeypatch.undo()
        time.tzset()


FRAGMENTS = [
    b"GET ", b"/", b" HTTP/1.1", b"\r\n", b"\n", b"\r", b'"', b"\\", b"\\x", b"\\u", b"Referer: ", b"User-Agent:",
    b"Host:", b"\t", b" ", b"\0", b"\x1b[2J", b"\x7f", b"\x80", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80",
    b"\xe2\x80\xa8", b"{", b"}", b",", b'"}', b"a" * 700, b'"' * 400, b"\xc3\xa9" * 800,
]
NEARLY = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=40))).map(b"".join)


@given(NEARLY, st.integers(100, 599), st.integers(0, 1 << 50))
@example(b"GET / HTTP/1.1\r\nUser-Agent: " + b"a" * 695 + b'\\"', 200, 1)
@examples(500)
def test_no_head_breaks_a_line(head, status, size):
    """Exactly one newline, at the end; short enough for a pipe; read by others, who find status and size in it."""
    for style in LOGS:
        found = read(style, line_of(style, head, status, size))
        assert (found["status"], found["bytes"]) == (status, size)


@given(st.binary(max_size=200).map(lambda data: data.replace(b"\r", b"").replace(b"\n", b"")),
       st.binary(max_size=150).map(lambda data: data.replace(b"\r", b"").replace(b"\n", b"").strip(b" \t")))
@examples(300)
def test_what_is_read_is_what_came(target, agent):
    head = b"GET /%b HTTP/1.1\r\nUser-Agent: a%b\r\n\r\n" % (target, agent)
    found = read("combined", line_of("combined", head))
    assert found["line"] == b"GET /%b HTTP/1.1" % target
    assert found["agent"] == b"a" + agent
    found = read("json", line_of("json", head))
    assert found["target"] == ("/" + target.decode("utf-8", "backslashreplace"))
    assert found["agent"] == ("a" + agent.decode("utf-8", "backslashreplace"))


# --- writing -------------------------------------------------------------------------------------------------------


def add(log, *numbers, size=0):
    """Lines that say which they are, `size` bytes longer than that."""
    for number in numbers:
        log.lines += (b"%d " % number, b"x" * size, b".\n")


def numbers_in(data):
    """Which lines there are in `data`; all have to be whole."""
    assert data[-1:] in (b"", b"\n")
    assert all(re.fullmatch(rb"\d+ x*\.", line) for line in data.splitlines())
    return [int(line.split()[0]) for line in data.splitlines()]


def test_lines_wait_for_a_flush_and_then_go_together(make):
    log = make()
    add(log, 1, 2, 3)
    assert log.ring.armed is None
    log.flush()
    assert log.ring.sizes == [len(b"1 .\n2 .\n3 .\n")] and not log.lines and log.busy
    log.ring.complete(log)
    assert log.ring.file == b"1 .\n2 .\n3 .\n" and (log.written, log.dropped, log.busy) == (3, 0, False)


def test_nothing_is_written_when_there_is_nothing(make):
    log = make()
    log.flush()
    log.tick(0)
    assert log.ring.armed is None and not log.busy


def test_a_tick_writes_what_there_is(make):
    log = make()
    before = log.date
    add(log, 1)
    log.tick(1)
    assert log.date != before and log.ring.armed


def test_one_write_at_a_time_and_what_comes_meanwhile_goes_next(make):
    log = make()
    for number in range(5):
        add(log, number)
        log.flush()
    assert log.ring.sizes == [4]
    log.ring.complete(log)
    assert log.ring.sizes == [4, 16]
    log.ring.complete_all(log)
    assert numbers_in(log.ring.file) == [0, 1, 2, 3, 4]


def test_the_end_of_a_write_does_not_write_the_few_lines_that_have_come_since(make):
    """Else a fast disk would have a write for each turn of the loop."""
    log = make()
    add(log, 1)
    log.flush()
    add(log, 2)
    log.ring.complete(log)
    assert log.ring.armed is None and log.lines


def test_as_many_lines_as_are_worth_a_write(make):
    assert make().enough % 3 == 0 and 100 <= make().enough // 3 <= 1000


@pytest.mark.parametrize(("kind", "limit"), [("file", LARGEST_WRITE), ("pipe", PIPE_BUF), ("socket", PIPE_BUF)])
def test_writes_are_of_whole_lines_and_as_large_as_the_file_bears(make, kind, limit):
    log = make(kind=kind)
    add(log, *range(1000), size=777)
    log.flush()
    while log.ring.armed:
        assert log.ring.armed[2].endswith(b"\n") and log.ring.armed[2].startswith(b"%d " % log.written)
        log.ring.complete(log)
    assert max(log.ring.sizes) <= limit and min(log.ring.sizes[:-1]) > limit - 800
    assert numbers_in(log.ring.file) == list(range(1000)) and log.written == 1000


def test_kinds_are_what_they_are(files):
    assert stat.S_ISREG(os.fstat(files["file"]).st_mode) and stat.S_ISFIFO(os.fstat(files["pipe"]).st_mode)
    assert os.fpathconf(files["pipe"], "PC_PIPE_BUF") == PIPE_BUF


def test_a_short_write_goes_on_with_the_rest(make):
    log = make()
    add(log, 100, 200)
    log.flush()
    log.ring.complete(log, 2)
    assert log.written == 0 and log.ring.armed[2] == b"0 .\n200 .\n"
    log.ring.complete(log, 6)
    assert log.written == 1 and log.ring.armed[2] == b"0 .\n"
    log.ring.complete(log)
    assert numbers_in(log.ring.file) == [100, 200] and log.written == 2


def test_a_slow_file_drops_lines_and_counts_them(make):
    log = make()
    add(log, 0)
    log.flush()
    for number in range(1, 1300):
        add(log, number, size=1000)
        log.flush()
    waiting = MAX_WAITING // 1010
    assert len(log.waiting) <= MAX_WAITING and 1299 - waiting - 10 < log.dropped <= 1299 - waiting + 10
    log.ring.complete_all(log)
    assert numbers_in(log.ring.file) == list(range(1300 - log.dropped)) and log.written == 1300 - log.dropped
    add(log, 5000)
    log.flush()
    log.ring.complete(log)
    assert numbers_in(log.ring.file)[-1] == 5000


def test_of_too_many_lines_at_once_those_are_kept_that_there_is_room_for(make):
    """One turn of the loop can bring more than may wait, even where the disk is fast."""
    log = make()
    add(log, *range(2000), size=1000)
    log.flush()
    log.ring.complete_all(log)
    assert numbers_in(log.ring.file) == list(range(log.written)) and len(log.ring.file) > MAX_WAITING - 1100
    assert log.written + log.dropped == 2000


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EDQUOT, errno.EFBIG, 0])
def test_an_error_drops_what_waits_and_says_so_once(make, error, caplog):
    log = make()
    for number in range(3):
        add(log, number)
        log.flush()
    for expected in (3, 4):
        log.ring.complete(log, -error)
        assert (log.written, log.dropped, log.busy) == (0, expected, False)
        add(log, 7)
        log.flush()
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert os.strerror(error or errno.EIO) in caplog.text and "access log" in caplog.text
    log.ring.complete(log)
    assert numbers_in(log.ring.file) == [7] and log.written == 1
    add(log, 8)
    log.flush()
    log.ring.complete(log, -errno.ENOSPC)
    assert len(caplog.records) == 2 and caplog.messages[1] == FULL


def test_a_line_that_has_been_begun_is_ended_first_when_there_is_room_again(make):
    log = make()
    add(log, 1, 2, 3)
    log.flush()
    log.ring.complete(log, 6)                   # the second line's first two bytes
    log.ring.complete(log, -errno.ENOSPC)
    assert (log.written, log.dropped, log.busy) == (1, 1, True)
    add(log, 4)
    log.flush()
    log.ring.complete(log, -errno.ENOSPC)
    assert (log.written, log.dropped, log.busy) == (1, 2, True)
    add(log, 5)
    log.flush()
    log.ring.complete_all(log)
    assert numbers_in(log.ring.file) == [1, 2, 5] and (log.written, log.dropped) == (3, 2)


@pytest.fixture
def renewed(files, tmp_path):
    """(an AccessLog, what passes it another file)"""
    ours, theirs = socket.socketpair()
    log = AccessLog(Ring(), files["file"], "combined", TAG, theirs)

    def renew(fd):
        socket.send_fds(ours, [b"1"], [fd])
        log.take_file()

    with ours, theirs:
        yield log, renew
        os.close(log.spare)


def test_another_file_takes_the_place_of_the_one_before(renewed, tmp_path):
    """Under the same number, so that a write that is armed already is not lost."""
    log, renew = renewed
    number, descriptors = log.fd, len(os.listdir("/proc/self/fd"))
    for name in ("first", "second"):
        with open(tmp_path / name, "ab") as file:
            renew(file.fileno())
        assert os.path.samefile(f"/proc/self/fd/{log.fd}", tmp_path / name)
        assert log.fd == number and len(os.listdir("/proc/self/fd")) == descriptors
        assert not os.get_inheritable(log.fd) and not os.get_inheritable(log.spare)


def test_a_signal_without_another_file(renewed, tmp_path):
    log, renew = renewed
    log.take_file()
    assert os.path.samefile(f"/proc/self/fd/{log.fd}", tmp_path / "log")
    test_another_file_takes_the_place_of_the_one_before((log, renew), tmp_path)


def test_another_file_of_another_kind(renewed, files, tmp_path):
    log, renew = renewed
    assert log.at_once > PIPE_BUF
    renew(files["pipe"])
    assert log.at_once == PIPE_BUF
    renew(files["socket"])
    assert log.at_once == PIPE_BUF


@pytest.mark.parametrize("meanwhile", (True, False))
def test_the_rest_of_a_line_does_not_go_to_another_file(renewed, tmp_path, meanwhile):
    """It is counted as dropped; also where it turns out only then that it was not whole."""
    log, renew = renewed
    log.lines += [b"one\n", b"two\n", b"three\n"]
    log.flush()
    with open(tmp_path / "other", "ab") as other:
        if meanwhile:
            renew(other.fileno())
            log.ring.complete(log, 6)
        else:
            log.ring.complete(log, 6)
            log.ring.complete(log, -errno.ENOSPC)
            renew(other.fileno())
            log.ring.complete(log, -errno.ENOSPC)
            log.tick(1)
            assert not log.busy and not log.ring.armed
            log.lines += [b"three\n"]
            log.flush()
    log.ring.complete_all(log)
    assert log.ring.file == b"one\ntwthree\n"
    assert (log.written, log.dropped, log.begun) == (2, 1 if meanwhile else 2, False)


def test_a_line_that_has_been_begun_is_ended_by_a_tick_alone(make):
    log = make()
    add(log, 1)
    log.flush()
    log.ring.complete(log, 2)
    log.ring.complete(log, -errno.EIO)
    assert not log.ring.armed
    log.tick(1)
    log.ring.complete(log)
    assert numbers_in(log.ring.file) == [1] and not log.busy


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EINTR, errno.ECANCELED])
def test_what_passes_is_tried_again_at_the_next_tick(make, error, caplog):
    log = make(kind="pipe")
    add(log, 1)
    log.flush()
    log.ring.complete(log, -error)
    assert log.ring.armed is None and log.busy and not caplog.records, "again at once would be for ever"
    log.tick(1)
    log.ring.complete(log)
    assert numbers_in(log.ring.file) == [1] and (log.written, log.dropped) == (1, 0)


class Writing(RuleBasedStateMachine):
    """Whatever a kernel does, and whenever: whole lines, in order, each of them written, dropped or waiting."""

    LARGEST, PIECE, WAITING = 150, 64, 400
    kind = "file"

    def __init__(self):
        super().__init__()
        with open(os.devnull, "wb") as null:
            self.log = AccessLog(Ring(), null.fileno(), "combined", TAG)
        self.log.at_once = self.LARGEST if self.kind == "file" else self.PIECE
        self.added = 0

    @rule(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=14))
    def respond(self, sizes):
        for size in sizes:
            add(self.log, self.added, size=size)
            self.added += 1

    @rule()
    def flush(self):
        self.log.flush()
        assert not self.log.lines

    @rule()
    def tick(self):
        self.log.tick(1)
        assert not self.log.busy or self.log.ring.armed

    @precondition(lambda self: self.log.ring.armed)
    @rule(result=st.one_of(st.none(), st.integers(1, 160)))
    def write(self, result):
        self.log.ring.complete(self.log, result)

    @precondition(lambda self: self.log.ring.armed)
    @rule(error=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EAGAIN, errno.EINTR, 0]))
    def fail(self, error):
        self.log.ring.complete(self.log, -error)

    @invariant()
    def lines_are_whole_but_for_the_last(self):
        whole, newline, begun = self.log.ring.file.rpartition(b"\n")
        numbers = numbers_in(whole + newline)
        assert numbers == sorted(set(numbers)) and len(numbers) == self.log.written
        rest = self.log.in_flight or self.log.waiting
        assert not begun or rest and re.fullmatch(rb"\d+ x*\.", begun + rest.partition(b"\n")[0])

    @invariant()
    def each_line_is_somewhere(self):
        log = self.log
        waits = len(log.lines) // 3 + (log.in_flight + log.waiting).count(b"\n")
        assert log.written + log.dropped + waits == self.added

    @invariant()
    def bounds_are_kept(self):
        log = self.log
        assert len(log.waiting) <= self.WAITING + self.LARGEST
        assert log.ring.armed is None or log.ring.armed[1] <= log.at_once
        assert bool(log.in_flight) == bool(log.ring.armed)
        assert log.busy == bool(log.in_flight or log.waiting)

    def teardown(self):
        """Once all is well again, so is the log."""
        for _ in range(2):
            self.log.tick(1)
            self.log.ring.complete_all(self.log)
        numbers_in(self.log.ring.file)
        assert not self.log.busy and self.log.written + self.log.dropped == self.added


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_any_schedule(kind, monkeypatch):
    monkeypatch.setattr(accesslog, "MAX_WAITING", Writing.WAITING)
    monkeypatch.setattr(logging.getLogger("tarweb"), "disabled", True)
    run_state_machine_as_test(type("Case", (Writing,), {"kind": kind}), settings=examples(
        150, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]))


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_a_real_file_and_a_real_pipe(make, files, kind, tmp_path):
    """What is at the address that is armed is what os.write would be given."""
    log = make("json", kind)
    log.lines += (log.client(b"192.0.2.1"), log.date, log.describe(HEAD, 200, 5))
    log.flush()
    address, length, data = log.ring.armed
    assert os.write(files[kind], ctypes.string_at(address, length)) == length
    assert read("json", data)["bytes"] == 5
