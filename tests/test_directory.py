"""A directory in place of an archive: packed into memory, and with --watch again when something in it changes."""

import gzip
import os
import re
import signal
import urllib.request
from pathlib import Path

import pytest
from support import FILES, MTIME, build_tar, request, run_tarweb, wait_until
from test_pack import fill

PAGES = {"index.html": b"<!doctype html>home", "a/b.txt": b"b" * 5000, ".env": b"secret", "style.css": b"p {}" * 900}


@pytest.fixture
def site(tmp_path):
    return fill(tmp_path / "my-site", PAGES)


def test_it_is_served(site, start):
    (site / "out").symlink_to("/etc/passwd")
    os.mkfifo(site / "fifo")
    server = start(f"{site}/")
    assert re.search(r"serves 3 files, 8\.6 kB, from .*/my-site/ \(ready", server.ready_line)
    assert "locked down: workers as" in server.read_line(10)
    assert f"{site}/ is a directory: it is packed into memory" in server.stderr()
    assert "--pack" in server.stderr()
    assert "the link 'out' leads out of the directory" in server.stderr() and "'fifo'" in server.stderr()
    for name, content in PAGES.items():
        response = server.fetch(f"/{name}", accept_encoding="gzip, br")
        assert (response.status, response.body) == ((404, response.body) if name == ".env" else (200, content))
    assert server.fetch("/")["Last-Modified"] == "Sun, 13 Sep 2020 12:26:40 GMT"
    assert server.fetch("/out").status == 404


def test_siblings_that_are_there_are_sent(site, start):
    fill(site, {"style.css.gz": gzip.compress(PAGES["style.css"])})
    response = start(site).fetch("/style.css", accept_encoding="gzip")
    assert gzip.decompress(response.body) == PAGES["style.css"] and response["Content-Encoding"] == "gzip"


@pytest.mark.parametrize("change", ["content", "new", "gone", "renamed", "link", "deep"])
def test_with_watch_it_is_what_it_becomes(site, start, change):
    server = start(site, "--watch")
    with server.connect() as client:
        assert client.ask("/style.css").body == PAGES["style.css"]
    if change == "content":
        (site / "style.css").write_bytes(b"P" + PAGES["style.css"][1:])         # of the same size
    elif change == "gone":
        (site / "style.css").unlink()
    elif change == "renamed":
        (site / "style.css").rename(site / "new.css")
    elif change == "link":
        (site / "new.css").symlink_to("style.css")
    else:
        fill(site, {{"new": "new.css", "deep": "x/y/new.css"}[change]: b"new"})
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    target = {"content": "/style.css", "gone": "/style.css", "deep": "/x/y/new.css"}.get(change, "/new.css")
    response = server.fetch(target)
    assert response.status == (404 if change == "gone" else 200)
    if change != "gone":
        assert response.body == (site / target[1:]).read_bytes()


def test_without_watch_it_stays_until_sighup(site, start):
    server = start(site, "--threads", "2")
    fill(site, {"new.txt": b"new"}, MTIME + 5)
    assert server.fetch("/new.txt").status == 404
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    assert server.fetch("/new.txt").body == b"new"
    server.process.send_signal(signal.SIGHUP)               # nothing has changed
    wait_until(lambda: "reloaded: generation 3" in server.stderr())
    assert server.fetch("/new.txt").body == b"new"
    assert server.stderr().count("is a directory") == 1


def test_with_watch_nothing_is_done_while_nothing_changes(site, tmp_path, start):
    """Not for what is not served, either. What comes after it is seen at the same time as a change would be."""
    fill(tmp_path / "other", {"x.txt": b"x"})
    server = start(site, "--watch", "--site", f"other.example={tmp_path / 'other'}")
    fill(site, {".env": b"another secret", ".git/index": b"x"}, MTIME + 7)
    fill(tmp_path / "other", {"x.txt": b"another x"}, MTIME + 7)
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    fill(tmp_path / "other", {"x.txt": b"the last x"}, MTIME + 9)
    wait_until(lambda: "reloaded: generation 3" in server.stderr())
    assert "generation 4" not in server.stderr()


def test_what_is_gone_is_served_on(site, start):
    """And is served anew once it is there again."""
    server = start(site, "--watch")
    site.rename(site.with_name("away"))
    wait_until(lambda: "reload failed, generation 1 still serves" in server.stderr())
    assert server.fetch("/").body == PAGES["index.html"]
    fill(site, {"index.html": b"back"}, MTIME + 5)
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    assert server.fetch("/").body == b"back"


def test_an_archive_can_take_its_place(site, tmp_path, start):
    server = start(site, "--watch")
    build_tar(tmp_path / "new.tar", {"index.html": b"from a tar"})
    site.rename(site.with_name("away"))
    (tmp_path / "new.tar").rename(site)
    wait_until(lambda: "reloaded: generation 2" in server.stderr())
    assert server.fetch("/").body == b"from a tar"


@pytest.mark.parametrize("flags", [("--preload",), ("--etags", "off"), ("--keep", "1"),
                                   ("--secure", "off"), ("--prefix", "a"), ("--dotfiles",)], ids=" ".join)
def test_flags_go_together_with_it(site, start, flags):
    server = start(site, *flags)
    assert server.fetch("/b.txt" if "--prefix" in flags else "/a/b.txt").body == PAGES["a/b.txt"]
    assert server.fetch("/.env").status == (200 if "--dotfiles" in flags else 404)


def test_too_large_a_one_is_refused(site):
    with (site / "large.bin").open("wb") as file:
        file.truncate(2 << 30)
    ended = run_tarweb("-l", "127.0.0.1:0", site)
    assert (ended.returncode, ended.stdout) == (2, "")
    sentence = ended.stderr.splitlines()[-1]
    assert re.search(r"my-site is a directory that takes 2\.1 GB, and at most .* are packed into memory", sentence)
    assert "--pack" in sentence


def test_over_tls(site, start_tls):
    assert start_tls(site).fetch("/a/b.txt").body == PAGES["a/b.txt"]
    assert start_tls(site, "--ktls", "off").fetch("/a/b.txt").body == PAGES["a/b.txt"]


def test_its_state_is_told(site, start, tmp_path):
    server = start(site, "--status", "127.0.0.1:0")
    url = re.search(r"status on (http://\S+)", "".join(server.read_line(10) for _ in range(1)))[1]
    with urllib.request.urlopen(f"{url}metrics", timeout=10) as answer:
        assert f'path="{site}"'.encode() in answer.read()


def test_nobody_can_write_to_the_memory(site, start):
    """Sealed (memfd_create(2)), and open for reading alone."""
    server = start(site)
    for pid in (server.pid, *server.workers):
        found = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "memfd:site" in os.readlink(fd)]
        assert len(found) == 1
        for flags in re.findall(r"^flags:\s+([0-7]+)$", Path(f"/proc/{pid}/fdinfo/{found[0].name}").read_text(), re.M):
            assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError):
            found[0].write_bytes(b"x")
    assert server.fetch("/").body == PAGES["index.html"]


def test_archives_are_served_beside_it(site, tmp_path, start):
    archive = build_tar(tmp_path / "site.tar", FILES)
    server = start(archive, "--site", f"packed.example={site}")
    with server.connect() as client:
        client.send(request("/").replace(b"Host: t", b"Host: packed.example"), request("/next"))
        assert client.response().body == PAGES["index.html"]
        assert client.response().body == FILES["next"]
