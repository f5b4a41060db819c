"""Repr-Digest (RFC 9530): SHA-256 of the representation, where Want-Repr-Digest asks for it."""

import base64
import gzip
import hashlib
import os
import sys

import pytest
from support import build_tar, noise, wait_until

from archive import REST_SIZE, Content, Digests
from http1 import wants_sha256

PAGE = b"a page that compresses\n" * 100
FILES = {"page.html": PAGE, "page.html.gz": gzip.compress(PAGE, mtime=0), "big": noise(1 << 20), "empty": b"",
         "404.html": b"not found", "_redirects": b"/app /page.html 200\n/old /page.html\n",
         "_headers": b"/page.html\n  X-Rule: yes\n"}
WANTED = {"Want_Repr_Digest": "sha-256=10"}


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return build_tar(tmp_path_factory.mktemp("digest") / "site.tar", FILES)


@pytest.fixture
def served(start, tar):
    return start(tar)


def digest(name, files=FILES):
    return f"sha-256=:{base64.b64encode(hashlib.sha256(files[name]).digest()).decode()}:"


@pytest.mark.parametrize("name", ["page.html", "page.html.gz", "big", "empty"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_it_is_of_the_file(served, name, method):
    for _ in range(4):                          # as it is read, and as it is remembered
        response = served.fetch(f"/{name}", method, **WANTED)
        assert (response.status, response.get("Repr-Digest")) == (200, digest(name))
        assert served.fetch(f"/{name}", method).get("Repr-Digest") is None


def test_it_is_of_the_coding_that_is_sent(served):
    response = served.fetch("/page.html", accept_encoding="gzip", **WANTED)
    assert (response["Content-Encoding"], response["Repr-Digest"]) == ("gzip", digest("page.html.gz"))
    assert response["X-Rule"] == "yes"
    assert response["Vary"] == "Accept-Encoding"


@pytest.mark.parametrize("asked", ["bytes=10-19", "bytes=-5", "bytes=0-1,1000-1001", "bytes=0-"])
def test_a_part_comes_with_that_of_the_whole(served, asked):
    for _ in range(4):
        with served.connect() as client:
            assert client.ask("/big", range=asked).get("Repr-Digest") is None
            response = client.ask("/big", range=asked, **WANTED)
            assert (response.status, response["Repr-Digest"]) == (206, digest("big"))
            assert client.ask("/big", range=asked, if_range='"x"', **WANTED)["Repr-Digest"] == digest("big")


def test_what_a_rule_serves_has_that_of_what_is_sent(served):
    assert served.fetch("/app", **WANTED)["Repr-Digest"] == digest("page.html")


def test_responses_without_the_representation_have_none(served):
    tag = served.fetch("/big")["ETag"]
    for status, target, headers in ((304, "/big", {"if_none_match": tag}), (412, "/big", {"if_match": '"x"'}),
                                    (416, "/big", {"range": "bytes=9999999-"}), (404, "/nowhere", {}),
                                    (301, "/old", {})):
        response = served.fetch(target, **headers, **WANTED)
        assert (response.status, response.get("Repr-Digest")) == (status, None)
    assert served.fetch("/big", if_none_match='"x"', **WANTED)["Repr-Digest"] == digest("big")


def test_without_entity_tags_there_is_none(start, tar):
    response = start(tar, "--etags", "off").fetch("/big", **WANTED)
    assert (response.status, response.get("Repr-Digest")) == (200, None)


def test_kept_archives_have_their_own(start, tmp_path):
    """At the same place in the tar as another file of the newest one."""
    old, new = {"old": b"the old one", "both": b"before"}, {"new": b"the new one", "both": b"after"}
    server = start(build_tar(tmp_path / "site.tar", old), "--watch", "--keep", "1")
    os.replace(build_tar(tmp_path / "next.tar", new), tmp_path / "site.tar")
    wait_until(lambda: "reloaded: generation 2 " in server.stderr())
    wait_until(lambda: server.fetch("/new").status == 200)
    assert server.fetch("/old", **WANTED)["Repr-Digest"] == digest("old", old)
    for name in new:
        assert server.fetch(f"/{name}", **WANTED)["Repr-Digest"] == digest(name, new)


@pytest.mark.parametrize("value", [
    b"sha-256=1", b"sha-256=10", b"sha-512=3, sha-256=1", b"sha-256=1,\tsha-512=10", b"sha-256=0, sha-256=5",
    b"unixsum=0 , sha-256=5", b"sha-256=5;a;b=1; c=*x", b"*x, sha-256=01"])
def test_it_is_wanted(value):
    assert wants_sha256(value)


@pytest.mark.parametrize("value", [
    b"", b"sha-256", b"sha-256=0", b"sha-256=11", b"sha-256=-1", b"sha-256=1.0", b"sha-256=x", b"SHA-256=1",
    b"sha-256 = 1", b"sha-256=1,", b",sha-256=1", b"sha-256=1;", b"sha-256=1 sha-512=1", b"sha-256=5, sha-256=0",
    b"sha-512=5", b"sha-256=1, SHA-512=2", b'sha-256=1, x="', b"sha-256=1, x=(1 2)", b"sha-256=" + b"1" * 16,
    b"\xff", b"sha-256=?1"])
def test_it_is_not_wanted(value):
    assert not wants_sha256(value)


def test_what_is_kept_for_each_file_is_small():
    found = {512 * i: Content(b'"tag"', True, 0, b"", i.to_bytes(REST_SIZE, "big")) for i in range(1, 10_001)}
    digests = Digests(found)
    assert sys.getsizeof(digests.offsets) + sys.getsizeof(digests.rests) < 30 * len(found)
    assert all(digests.find(offset) == content.rest for offset, content in found.items())
    assert [digests.find(offset) for offset in (0, 511, 513, 512 * 10_001)] == [b""] * 4
