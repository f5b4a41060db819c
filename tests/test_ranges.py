"""Range requests: RFC 9110 section 14, compared byte for byte with the content."""

import re

import pytest
from support import FILES, LAST_MODIFIED

DATA = FILES["random.bin"]
SIZE = len(DATA)

SINGLE = {  # the header -> (first, last) of what comes
    "bytes=0-0": (0, 0),
    "bytes=0-99": (0, 99),
    "bytes=100-": (100, SIZE - 1),
    "bytes=0-": (0, SIZE - 1),
    "bytes=-1": (SIZE - 1, SIZE - 1),
    "bytes=-1000": (SIZE - 1000, SIZE - 1),
    f"bytes=-{SIZE}": (0, SIZE - 1),
    f"bytes=-{SIZE + 5}": (0, SIZE - 1),
    f"bytes={SIZE - 1}-": (SIZE - 1, SIZE - 1),
    f"bytes=10-{SIZE}": (10, SIZE - 1),
    "bytes=7-99999999999999999999999": (7, SIZE - 1),
    "bytes=-99999999999999999999999": (0, SIZE - 1),
    "bytes=0000000005-0000000009": (5, 9),
    "Bytes=0-4": (0, 4),                        # RFC 9110 14.1: range units are case-insensitive
    "bytes=0-4,": (0, 4),                       # empty list elements are ignored
    "bytes=, ,3-4 ,": (3, 4),
    f"bytes=0-4,{SIZE}-": (0, 4),               # of two only one can be satisfied
    "bytes=-0,2-3": (2, 3),
}

IGNORED = ["bytes=", "bytes=-", "bytes=a-b", "bytes=5-4", "bytes=1", "bytes=1-2-3", "bytes 0-1", "items=0-1", "0-1",
           "bytes=0x0-1", "bytes=+1-2", "bytes=1_0-20", "bytes=0-1,9-3", "bytes=0-1;2-3", "bytes=--1", "bytes=\xb2-3"]

UNSATISFIABLE = [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0", "bytes=99999999999999999999-",
                 f"bytes={SIZE}-,{SIZE + 1}-", "bytes=-0,-0"]


@pytest.mark.parametrize("value", SINGLE)
def test_one_range(server, value):
    first, last = SINGLE[value]
    with server.connect() as client:
        response = client.ask("/random.bin", range=value)
        assert response.status == 206
        assert response["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
        assert response.body == DATA[first:last + 1]
        assert client.ask("/next").body == FILES["next"]


@pytest.mark.parametrize("value", IGNORED)
def test_what_is_no_range_is_ignored(server, value):
    response = server.fetch("/random.bin", range=value)
    assert (response.status, response.body) == (200, DATA)


@pytest.mark.parametrize("value", UNSATISFIABLE)
def test_no_range_can_be_satisfied(server, value):
    with server.connect() as client:
        response = client.ask("/random.bin", range=value)
        assert response.status == 416
        assert response["Content-Range"] == f"bytes */{SIZE}"
        assert client.ask("/next").body == FILES["next"]


@pytest.mark.parametrize("value", ["bytes=0-", "bytes=0-1048575", "bytes=-1"])
def test_a_range_of_an_empty_file_is_the_file(server, value):
    response = server.fetch("/empty.txt", range=value)
    assert (response.status, response["Content-Length"], response.body) == (200, "0", b"")


def parts(response):
    """Take a multipart/byteranges body apart: [(first, last, bytes, headers)], all of it accounted for."""
    boundary = re.fullmatch(r'multipart/byteranges;\s*boundary="?([^"]{1,70})"?', response["Content-Type"])[1].encode()
    assert "content-range" not in response.headers  # RFC 9110 15.3.7.2
    assert "content-encoding" not in response.headers
    assert response.body.startswith(b"\r\n--")     # RFC 2046 5.1.1 allows the line end, and zsync needs it
    found, rest = [], response.body.removeprefix(b"\r\n")
    while rest.startswith(b"--" + boundary + b"\r\n"):
        head, _, rest = rest.removeprefix(b"--" + boundary + b"\r\n").partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        where = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers["Content-Range"])
        first, last, size = map(int, where.groups())
        assert size == SIZE
        content, rest = rest[:last - first + 1], rest[last - first + 1:]
        assert rest.startswith(b"\r\n--" + boundary)
        rest = rest.removeprefix(b"\r\n")
        found.append((first, last, content, headers))
    assert rest.strip() == b"--" + boundary + b"--"
    return found


@pytest.mark.parametrize(("value", "expected"), [
    ("bytes=0-9,1000-1999", [(0, 9), (1000, 1999)]),
    ("bytes=0-0,-1", [(0, 0), (SIZE - 1, SIZE - 1)]),
    ("bytes=1000-1999, 50-99", [(1000, 1999), (50, 99)]),
    (f"bytes=0-9,{SIZE}-,5000-150000,299000-", [(0, 9), (5000, 150_000), (299_000, SIZE - 1)]),
])
def test_several_ranges(server, value, expected):
    with server.connect() as client:
        response = client.ask("/random.bin", range=value)
        assert response.status == 206
        found = parts(response)
        assert sorted(part[:2] for part in found) == sorted(expected)
        for first, last, content, headers in found:
            assert content == DATA[first:last + 1]
            assert headers["Content-Type"] == "application/octet-stream"
        assert client.ask("/next").body == FILES["next"]


@pytest.mark.parametrize("value", [
    "bytes=0-100,50-200", "bytes=50-200,0-100", "bytes=0-100,101-200", "bytes=0-200,0-200"])
def test_overlapping_ranges_are_sent_once(server, value):
    response = server.fetch("/random.bin", range=value)
    assert response.status == 206
    if "multipart" in response["Content-Type"]:
        found = parts(response)
    else:
        first, last = map(int, re.match(r"bytes (\d+)-(\d+)/", response["Content-Range"]).groups())
        found = [(first, last, response.body, None)]
    covered = [position for first, last, _, _ in found for position in range(first, last + 1)]
    asked = max(int(number) for number in re.findall(r"\d+", value))
    assert sorted(covered) == list(range(asked + 1))
    assert all(content == DATA[first:last + 1] for first, last, content, _ in found)


@pytest.mark.parametrize("value", [
    "bytes=" + ",".join(f"{i}-" for i in range(1500)),
    "bytes=" + ",".join(f"{2 * i}-{2 * i}" for i in range(1200)),
    "bytes=" + ",".join(["0-"] * 2000),
    "bytes=" + "," * 10_000 + "0-1",
], ids=["overlapping", "single bytes", "the same", "empty"])
def test_many_ranges_cannot_cost_more_than_the_file(server, value):
    response = server.fetch("/random.bin", range=value)
    assert response.status in (200, 206, 400, 416)
    assert len(response.body) < SIZE + 100_000


def test_head_ignores_ranges(server):
    """RFC 9110 14.2: Range is defined for GET alone."""
    response = server.fetch("/random.bin", "HEAD", range="bytes=0-9")
    assert (response.status, response["Content-Length"]) == (200, str(SIZE))
    assert "content-range" not in response.headers


def test_other_answers_ignore_ranges(server):
    response = server.fetch("/nowhere", range="bytes=0-0")
    assert (response.status, response.body) == (404, FILES["404.html"])
    assert server.fetch("/dir", range="bytes=0-0").status == 301


def test_two_hundred_ranges_are_sent(server):
    """As many as Apache sends; zsync asks for 20 at a time."""
    for count, status in ((20, 206), (200, 206), (201, 200)):
        asked = ",".join(f"{i * 1000}-{i * 1000}" for i in range(count))
        response = server.fetch("/random.bin", range=f"bytes={asked}")
        assert response.status == status
        if status == 206:
            assert [part[:3] for part in parts(response)] == [
                (i * 1000, i * 1000, DATA[i * 1000:i * 1000 + 1]) for i in range(count)]
        else:
            assert response.body == DATA


def test_a_range_is_of_the_plain_file(server):
    """Clients that ask for ranges take gzip by default, but few can decode a slice of it."""
    data = FILES["style.css"]
    for accepted in ("gzip", "gzip, deflate, br, zstd", "*"):
        response = server.fetch("/style.css", accept_encoding=accepted, range="bytes=10-29")
        assert (response.status, response.body) == (206, data[10:30])
        assert "content-encoding" not in response.headers
        assert response["Content-Range"] == f"bytes 10-29/{len(data)}"
        assert response["ETag"] == server.fetch("/style.css")["ETag"]
        assert response["Vary"].lower() == "accept-encoding"


@pytest.mark.parametrize("more", [{"if_range": "{tag}"}, {"accept_encoding": "gzip, identity;q=0"}])
def test_a_range_is_of_the_variant_that_the_client_has_or_needs(server, more):
    packed = FILES["style.css.gz"]
    tag = server.fetch("/style.css", accept_encoding="gzip")["ETag"]
    headers = {"accept_encoding": "gzip", **{name: value.format(tag=tag) for name, value in more.items()}}
    response = server.fetch("/style.css", range="bytes=10-29", **headers)
    assert (response.status, response.body) == (206, packed[10:30])
    assert response["Content-Encoding"] == "gzip"
    assert response["Content-Range"] == f"bytes 10-29/{len(packed)}"
    assert response["ETag"] == tag
    assert response["Vary"].lower() == "accept-encoding"
    whole = server.fetch("/style.css", range="bytes=0-0,200-200", **headers)
    assert (whole.status, whole["Content-Encoding"], whole.body) == (200, "gzip", packed)


def test_a_date_that_variants_share_is_no_reason_for_a_range(server):
    response = server.fetch("/style.css", accept_encoding="gzip", if_range=LAST_MODIFIED, range="bytes=10-29")
    assert (response.status, response.body) == (200, FILES["style.css.gz"])


# {tag}: the ETag -> whether the range counts. A date is a strong validator here: the member is years old.
IF_RANGE = {"{tag}": True, LAST_MODIFIED: True, "W/{tag}": False, '"x"': False, "*": False, "nonsense": False,
            "Mon, 14 Sep 2020 12:26:40 GMT": False, "Sat, 12 Sep 2020 12:26:40 GMT": False}


@pytest.mark.parametrize("value", IF_RANGE)
def test_if_range(server, value):
    tag = server.fetch("/random.bin")["ETag"]
    response = server.fetch("/random.bin", range="bytes=5-9", if_range=value.format(tag=tag))
    if IF_RANGE[value]:
        assert (response.status, response.body) == (206, DATA[5:10])
    else:
        assert (response.status, response.body) == (200, DATA)


def test_if_range_that_fails_does_not_even_say_416(server):
    response = server.fetch("/random.bin", range=f"bytes={SIZE}-", if_range='"x"')
    assert (response.status, response.body) == (200, DATA)


def test_conditions_come_before_ranges(server):
    tag = server.fetch("/random.bin")["ETag"]
    assert server.fetch("/random.bin", range="bytes=0-9", if_none_match=tag).status == 304
    assert server.fetch("/random.bin", range="bytes=0-9", if_match='"x"').status == 412
    assert server.fetch("/random.bin", range="bytes=0-9", if_match=tag).status == 206
    assert server.fetch("/random.bin", range=f"bytes={SIZE}-", if_none_match=tag).status == 304


def test_large_ranges_in_every_mode(mode_server):
    data = FILES["large.bin"]
    with mode_server.connect() as client:
        for first, last in [(1, len(data) - 2), (1_048_575, 2_097_153), (4096, 3_000_000)]:
            response = client.ask("/large.bin", range=f"bytes={first}-{last}")
            assert (response.status, response.body) == (206, data[first:last + 1])
        response = client.ask("/large.bin", range="bytes=0-1500000,3000000-4500000")
        assert data[:1_500_001] in response.body
        assert data[3_000_000:4_500_001] in response.body
        assert client.ask("/next").body == FILES["next"]
