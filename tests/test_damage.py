"""Archives that are cut short, overwritten, deleted, on a failing disk, or larger than memory, while they are served.

What is lost is never made up for: a response that cannot be completed ends before its Content-Length is met.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import struct
import subprocess
import tarfile
import threading
import time

import pytest
from support import ROOT, build_tar, noise, request, run_tarweb, wait_until
from test_reload import pieces, reports
from test_workers import control_group, join, metrics, status_port

LARGE = 8 << 20
FILES = {
    "front.txt": noise(1000, seed=1),
    "first.bin": noise(LARGE, seed=2),
    **{f"small/{i:02}.txt": b"%02d " % i + noise(300, seed=100 + i) for i in range(40)},
    "second.bin": noise(LARGE, seed=3),
    "back.txt": noise(1000, seed=4),
}
WRITTEN = "has been written to in place"
CUT_OFF = "responses from the lost part are cut off"

# The real program, on a machine that has no memory to keep an archive in.
WITHOUT_MEMORY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import generation, tarweb
generation.available_memory = lambda: 0
sys.exit(tarweb.main())
"""


@pytest.fixture
def archive(tmp_path):
    return build_tar(tmp_path / "site.tar", FILES)


@pytest.fixture(params=["plain", "piece by piece", "TLS", "TLS, piece by piece"])
def begin(request, start, start_tls):
    """begin(tar, *flags): a server in each of the ways in which contents get from an archive to a client."""
    def server(tar, *flags):
        more = {"program": ("-c", WITHOUT_MEMORY, str(ROOT))} if "piece" in request.param else {}
        return (start_tls if "TLS" in request.param else start)(tar, *flags, **more)
    return server


two_ways = pytest.mark.parametrize("begin", ["plain", "TLS"], indirect=True)


def offset_of(archive, name):
    with tarfile.open(archive) as tar:
        return tar.getmember(name).offset_data


def is_whole(server, name):
    response = server.fetch(f"/{name}")
    return (response.status, response.body) == (200, FILES[name])


def rest_of(client):
    """All that still comes. Over TLS there must be no close_notify behind it."""
    return client.cut_off() if hasattr(client, "cut_off") else client.rest()


def is_cut_off(client, name):
    """Whether a response on this connection, asked for by now, breaks off; what it has before is right."""
    received = rest_of(client)
    if not received:
        return True
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Length: %d\r\n" % len(FILES[name]) in head + b"\r\n"
    right = len(body) // 4096 * 4096 - 4096     # what was of a page that has gone in part may be lost
    assert right <= 0 or body[:right] == FILES[name][:right]
    return len(body) < len(FILES[name])


def ask_in_vain(server, name):
    with server.connect() as client:
        client.send(request(f"/{name}", connection="close"))
        return is_cut_off(client, name)


def count(server, words):
    return server.stderr().count(words)


# --- cut short -----------------------------------------------------------------------------------------------------


def test_an_archive_is_cut_short(begin, archive):
    """In the middle of its first large file, that several clients are being sent."""
    server = begin(archive)
    workers = server.workers
    before = server.connect()
    assert before.ask("/front.txt").body == FILES["front.txt"]
    reading = [server.connect(rcvbuf=32_768) for _ in range(3)]
    for client in reading:
        client.send(request("/first.bin"))
        client.pending = client.sock.recv(1000)
    end = offset_of(archive, "first.bin") + LARGE // 2 + 123
    os.truncate(archive, end)
    for client in reading:
        with client:
            assert is_cut_off(client, "first.bin")
    for name in ("first.bin", "second.bin", "back.txt", *(name for name in FILES if name.startswith("small/"))):
        assert ask_in_vain(server, name), name
    assert before.ask("/front.txt").body == FILES["front.txt"]
    part = before.ask("/first.bin", Range=f"bytes=0-{LARGE // 4}")
    assert (part.status, part.body) == (206, FILES["first.bin"][:LARGE // 4 + 1])
    before.close()
    assert is_whole(server, "front.txt")
    wait_until(lambda: reports(server))
    assert reports(server)[0].startswith(f"reload failed, generation 1 still serves: {archive} ")
    assert is_whole(server, "front.txt")
    assert (count(server, CUT_OFF), count(server, WRITTEN), len(reports(server))) == (1, 1, 1)
    assert server.workers == workers


def test_what_of_a_page_is_lost_is_not_taken_for_zeros(begin, archive):
    """The kernel fills the last page of a file up with them, and does not say where the file ends."""
    server = begin(archive)
    names = [name for name in FILES if name.startswith("small/")]
    page = next(name for name in names if offset_of(archive, name) % 4096 < 600)    # several files begin in its page
    end = offset_of(archive, page) + 10
    lost = [name for name in names if offset_of(archive, name) + len(FILES[name]) > end]
    assert any(offset_of(archive, name) // 4096 == end // 4096 for name in lost[1:])
    os.truncate(archive, end)
    wait_until(lambda: ask_in_vain(server, lost[1]))    # once the worker knows
    assert [name for name in lost if not ask_in_vain(server, name)] == []
    for name in set(names) - set(lost):
        assert is_whole(server, name)


@two_ways
def test_an_archive_is_emptied(begin, archive):
    server = begin(archive)
    workers = server.workers
    os.truncate(archive, 0)
    wait_until(lambda: WRITTEN in server.stderr())
    for name in FILES:
        assert ask_in_vain(server, name), name
    assert server.fetch("/no/such/file").status == 404
    wait_until(lambda: reports(server))
    assert server.workers == workers


@two_ways
def test_an_archive_is_cut_short_and_mended(begin, archive):
    server = begin(archive)
    data = archive.read_bytes()
    os.truncate(archive, offset_of(archive, "second.bin"))
    assert ask_in_vain(server, "back.txt")
    with archive.open("r+b") as file:
        file.write(data)
    wait_until(lambda: count(server, "reloaded: generation 2 "))
    for name in FILES:
        assert is_whole(server, name)
    assert count(server, WRITTEN) == 1
    assert "mv" in server.stderr()
    assert all(report.startswith("reload") for report in reports(server))


def test_faults_are_counted(start, archive):
    server = start(archive, "--status", "127.0.0.1:0")
    port = status_port(server)
    os.truncate(archive, offset_of(archive, "second.bin"))
    for _ in range(3):
        assert ask_in_vain(server, "second.bin")
    wait_until(lambda: metrics(port)["archive_faults_total"] == 3)


# --- overwritten, deleted ------------------------------------------------------------------------------------------


NEW = {"front.txt": b"another one", "other.bin": noise(LARGE, seed=5)}


@two_ways
def test_an_archive_is_overwritten(begin, archive):
    """As cp does it: it is said once that this is not the way, and the new one is served once it is whole."""
    server = begin(archive, "--threads", "2")
    build_tar(archive.with_suffix(".new"), NEW)
    inode = archive.stat().st_ino
    shutil.copyfile(archive.with_suffix(".new"), archive)
    assert archive.stat().st_ino == inode
    wait_until(lambda: count(server, "reloaded: generation 2 "))
    for name, content in NEW.items():
        assert server.fetch(f"/{name}").body == content
    assert server.fetch("/back.txt").status == 404
    line, = (line for line in server.stderr().splitlines() if WRITTEN in line)
    assert str(archive) in line and "mv" in line


def test_an_archive_is_overwritten_slowly(start, archive):
    """Nothing is taken up before it is whole."""
    server = start(archive)
    new = build_tar(archive.with_suffix(".new"), NEW).read_bytes()
    with archive.open("wb", buffering=0) as file:
        for piece in pieces(new, 12):       # altogether longer than a change has to be stable for
            assert reports(server) == []
            file.write(piece)
    wait_until(lambda: reports(server))
    assert reports(server)[0].startswith("reloaded: generation 2 serves 2 files, ")
    assert (len(reports(server)), count(server, WRITTEN)) == (1, 1)
    assert server.fetch("/other.bin").body == NEW["other.bin"]


def test_an_archive_is_overwritten_again_and_again(start, archive):
    """The second time is noticed as the first was, in a generation of its own."""
    server = start(archive)
    for number in (2, 3):
        shutil.copyfile(build_tar(archive.with_suffix(".new"), {"front.txt": b"%d" % number}), archive)
        wait_until(lambda: count(server, f"reloaded: generation {number} "))    # noqa: B023
        assert server.fetch("/front.txt").body == b"%d" % number
        assert count(server, WRITTEN) == number - 1


# The real program where inotify tells nothing: there is no more of it, or another machine writes (NFS).
WITHOUT_INOTIFY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import linux, tarweb
linux.open_inotify = lambda: -1
sys.exit(tarweb.main())
"""
SILENT = {"program": ("-c", WITHOUT_INOTIFY, str(ROOT))}


def rewrite(archive, old, new):
    """Write to an archive in place, so that its size and date are as they were."""
    status = archive.stat()
    data = archive.read_bytes()
    with archive.open("r+b") as file:
        file.write(data.replace(old, new))
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (archive.stat().st_size, archive.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize(("flags", "options"), [((), {}), (("--watch",), {}), (("--watch",), SILENT)],
                         ids=["", "watch", "watch without inotify"])
def test_a_write_that_keeps_size_and_date_is_noticed(start, tmp_path, flags, options):
    archive = build_tar(tmp_path / "site.tar", {"a": b"<p>one", "b": b"b"})
    server = start(archive, *flags, **options)
    tag = server.fetch("/a")["ETag"]
    for number, (old, new) in enumerate(((b"<p>one", b"<p>two"), (b"<p>two", b"<p>six")), 2):
        rewrite(archive, old, new)
        wait_until(lambda: count(server, f"reloaded: generation {number} "))    # noqa: B023
        response = server.fetch("/a", if_none_match=tag)
        assert (response.status, response.body) == (200, new)
        assert (len(reports(server)), count(server, WRITTEN)) == (number - 1, number - 1)
        tag = response["ETag"]


@pytest.mark.parametrize("options", [{}, SILENT], ids=["", "without inotify"])
def test_a_write_that_keeps_size_and_date_is_noticed_at_sighup(start, tmp_path, options):
    archive = build_tar(tmp_path / "site.tar", {"a": b"<p>one", "b": b"b"})
    server = start(archive, **options)
    tag = server.fetch("/a")["ETag"]
    rewrite(archive, b"<p>one", b"<p>two")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: reports(server))
    response = server.fetch("/a", if_none_match=tag)
    assert (response.status, response.body) == (200, b"<p>two")


@pytest.mark.parametrize("options", [{}, SILENT], ids=["", "without inotify"])
def test_links_names_and_modes_are_no_writes(start, tmp_path, options):
    """They change ctime, too."""
    archive = build_tar(tmp_path / "site.tar", {"a": b"a", "b": b"b"})
    server = start(archive, "--watch", **options)
    os.link(archive, tmp_path / "link")
    archive.chmod(0o604)
    os.replace(archive, tmp_path / "other")
    os.replace(tmp_path / "other", archive)
    if options:
        rewrite(archive, b"a", b"a")            # the same bytes are no news
    time.sleep(3.5)
    assert server.fetch("/a").body == b"a"
    assert (reports(server), count(server, WRITTEN)) == ([], 0)


@pytest.mark.parametrize("flags", [(), ("--watch",)])
def test_an_archive_is_deleted(start, archive, flags):
    """It is there as long as somebody has it open."""
    server = start(archive, *flags)
    archive.unlink()
    if flags:
        wait_until(lambda: reports(server))
        assert reports(server)[0].startswith(f"reload failed, generation 1 still serves: {archive} ")
    for name in FILES:
        assert is_whole(server, name)
    assert server.stderr().count("\n") == len(flags)
    build_tar(archive, NEW)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2 " in server.stderr())
    assert server.fetch("/other.bin").body == NEW["other.bin"]


# --- a disk that fails ---------------------------------------------------------------------------------------------


class FailingDisk:
    """A file system (FUSE, <linux/fuse.h>) that holds one file, and fails to read a part of it when told to."""

    LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, BATCH_FORGET = 1, 2, 3, 14, 15, 18, 25, 26, 42
    INVALIDATE = 2          # FUSE_NOTIFY_INVAL_INODE
    ROOT, FILE = 1, 2       # node ids
    KEEP_CACHE, DIRECT_IO = 2, 1        # FOPEN_KEEP_CACHE, FOPEN_DIRECT_IO
    FOREVER = 1 << 30       # seconds that names and attributes are valid

    def __init__(self, folder, data, flags=KEEP_CACHE):
        self.data, self.folder, self.path, self.flags = data, folder, folder / "site.tar", flags
        self.broken = range(0)
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        folder.mkdir()
        options = f"fd={self.fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        try:
            subprocess.run(["mount", "-i", "-t", "fuse", "-o", options, "failing-disk", folder],
                           pass_fds=[self.fd], check=True, capture_output=True)
        except BaseException:
            os.close(self.fd)
            raise
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def close(self):
        subprocess.run(["umount", "-l", self.folder], check=True)
        self.thread.join()
        os.close(self.fd)

    def lose(self, part):
        """From now on these bytes cannot be read; nothing that has been read is remembered."""
        self.broken = part
        body = struct.pack("=QqQ", self.FILE, 0, 0)
        with contextlib.suppress(FileNotFoundError):        # nobody has read anything yet
            os.write(self.fd, struct.pack("=IiQ", 16 + len(body), self.INVALIDATE, 0) + body)

    def run(self):
        while True:
            try:
                message = os.read(self.fd, 1 << 20)
            except OSError as error:
                if error.errno == errno.ENODEV:         # unmounted
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                raise
            _, operation, unique, node = struct.unpack_from("=IIQQ", message)
            if operation in (self.FORGET, self.BATCH_FORGET):
                continue
            reply = self.answer(operation, node, message[40:])
            body, failure = (b"", -reply) if isinstance(reply, int) else (reply, 0)
            with contextlib.suppress(FileNotFoundError):        # whoever asked has gone
                os.write(self.fd, struct.pack("=IiQ", 16 + len(body), failure, unique) + body)

    def answer(self, operation, node, body):
        """Bytes, or an error number."""
        if operation == self.INIT:
            major, minor, ahead = struct.unpack_from("=III", body)
            return struct.pack("=IIIIHHIIHHI28x", major, min(minor, 31), ahead, 0, 12, 10, 4096, 1, 0, 0, 0)
        if operation == self.LOOKUP:
            if body.rstrip(b"\0") != b"site.tar":
                return errno.ENOENT
            return struct.pack("=QQQQII", self.FILE, 0, self.FOREVER, self.FOREVER, 0, 0) + self.attributes(self.FILE)
        if operation == self.GETATTR:
            return struct.pack("=QII", self.FOREVER, 0, 0) + self.attributes(node)
        if operation == self.OPEN:
            return struct.pack("=QII", 0, self.flags, 0)
        if operation == self.READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            asked = range(offset, offset + size)
            if max(asked.start, self.broken.start) < min(asked.stop, self.broken.stop):
                return errno.EIO
            return self.data[offset:offset + size]
        return b"" if operation in (self.FLUSH, self.RELEASE) else errno.ENOSYS

    def attributes(self, node):
        mode, size = (0o100644, len(self.data)) if node == self.FILE else (0o40755, 0)
        return struct.pack("=6Q10I", node, size, -(-size // 512), 0, 1, 1, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@pytest.fixture
def failing_disk(tmp_path, request):
    """FailingDisk of the archive of FILES."""
    data = build_tar(tmp_path / "whole.tar", FILES).read_bytes()
    try:
        disk = FailingDisk(tmp_path / "disk", data, getattr(request, "param", FailingDisk.KEEP_CACHE))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system of our own (FUSE) cannot be mounted here: {error}")
    yield disk
    disk.close()


@pytest.mark.parametrize("failing_disk", [FailingDisk.DIRECT_IO], indirect=True)
def test_a_file_system_that_shares_no_pages(failing_disk, begin):
    """As mergerfs, sshfs, rclone and s3fs may be mounted: it refuses MAP_SHARED."""
    server = begin(failing_disk.path)
    for name in FILES:
        assert is_whole(server, name)


def part_of(archive, name):
    """Where the pages of a file are that it shares with no other one."""
    start = offset_of(archive, name) + 8192 & -4096
    return range(start, start + (len(FILES[name]) - 16384 & -4096))


def test_a_disk_that_fails(failing_disk, begin, tmp_path):
    server = begin(failing_disk.path)
    workers = server.workers
    for name in FILES:
        assert is_whole(server, name)
    with server.connect(rcvbuf=32_768) as reading:
        reading.send(request("/first.bin"))
        reading.pending = reading.sock.recv(1000)
        failing_disk.lose(part_of(tmp_path / "whole.tar", "first.bin"))
        assert is_cut_off(reading, "first.bin")
    for _ in range(3):
        assert ask_in_vain(server, "first.bin")
    for name in FILES:
        if name != "first.bin":
            assert is_whole(server, name), name
    assert count(server, CUT_OFF) == 1
    failing_disk.lose(range(0))
    assert is_whole(server, "first.bin"), "the disk is well again"
    assert server.workers == workers
    assert server.stderr().rstrip().endswith(CUT_OFF), "it was neither cut short nor written to"


def test_a_disk_that_fails_while_an_archive_is_read(failing_disk, start, archive, tmp_path):
    failing_disk.lose(part_of(tmp_path / "whole.tar", "first.bin"))
    ended = run_tarweb("--listen", "127.0.0.1:0", failing_disk.path)
    assert ended.returncode == 2
    said = rf"tarweb: {failing_disk.path} cannot be read at byte \d+: Input/output error; .*\n"
    assert re.fullmatch(said, ended.stderr)
    link = tmp_path / "link.tar"
    link.symlink_to(archive)
    server = start(link)
    link.with_suffix(".new").symlink_to(failing_disk.path)
    link.with_suffix(".new").rename(link)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: reports(server))
    assert reports(server)[0].startswith(f"reload failed, generation 1 still serves: {link} cannot be read at byte ")
    assert is_whole(server, "first.bin")


# --- larger than memory --------------------------------------------------------------------------------------------

ROOM = 96 << 20
BIG, BIG_FILES = 10 << 20, 12


@pytest.fixture
def narrow():
    """A function for a child process, that puts it into a control group with ROOM bytes of memory."""
    with control_group("memory") as group:
        (group / "memory.limit_in_bytes").write_text(str(ROOM))
        yield lambda: join(group)


@pytest.fixture(scope="module")
def big_site(tmp_path_factory):
    """(tar, {target: SHA-256 of its contents}), none of which is in memory."""
    path = tmp_path_factory.mktemp("big") / "big.tar"
    files = {f"big/{i}": noise(BIG, seed=i) for i in range(BIG_FILES)} | {
        f"small/{i}": noise(1000 + i, seed=1000 + i) for i in range(200)}
    build_tar(path, files)
    with path.open("rb") as file:               # what is cached now would not be counted in the group
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path, {f"/{name}": hashlib.sha256(data).digest() for name, data in files.items()}


@pytest.mark.parametrize("tls", [False, True])
def test_an_archive_larger_than_memory(narrow, start, start_tls, big_site, tls):
    """Right to the byte for several clients at a time, at the price of reading from the disk."""
    path, expected = big_site
    server = (start_tls if tls else start)(path, "--threads", "2", "--status", "127.0.0.1:0", preexec_fn=narrow)
    port, workers = status_port(server), server.workers
    wrong = []

    def read_all(first):
        targets = list(expected)
        with server.connect() as client:
            for target in targets[first:] + targets[:first]:
                response = client.ask(target)
                if (response.status, hashlib.sha256(response.body).digest()) != (200, expected[target]):
                    wrong.append(target)

    threads = [threading.Thread(target=read_all, args=[4 * i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    if not tls:
        wait_until(lambda: metrics(port)["cold_reads_total"] > 100)
    assert metrics(port)["archive_faults_total"] == metrics(port)["worker_restarts_total"] == 0
    wait_until(lambda: metrics(port)['responses_total{class="2xx"}'] == len(threads) * len(expected))
    assert server.workers == workers
