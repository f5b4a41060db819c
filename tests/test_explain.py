"""--explain: prints what a request gets, and why, as the server would answer it."""

import gzip
import re

import pytest
from support import Server, build_tar, run_tarweb

PAGE = b"a page that compresses\n" * 100
FILES = {"index.html": b"home", "page.html": PAGE, "page.html.gz": gzip.compress(PAGE, mtime=0),
         "404.html": b"not found", "dir/index.html": b"dir", "logo.bin": b"\0" * 100,
         "_redirects": b"# moved\n/old /page.html\n/blog/* /dir/:splat 302\n/app /index.html 200\n"
                       b"/self/* /self/:splat\nhttps://one.test/secure /page.html 303\n",
         "_headers": b"/*\n  X-All: yes\n\n/page*\n  Cache-Control: max-age=5\n"}
OTHER = {"index.html": b"other"}
GZIP, SLICE = "Accept-Encoding: gzip", "Range: bytes=2-5"


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    return build_tar(folder / "site.tar", FILES), build_tar(folder / "other.tar", OTHER)


def explain(request, *arguments):
    """(what is printed of the request, of the response's head, of its body; [(label, text)])."""
    ended = run_tarweb("--explain", request, *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    asked, head, rest = ended.stdout.split("\n\n", 2)
    body, _, facts = rest.rpartition("\n\n")
    return asked, head, body, re.findall(r"^(\w+(?: \w+)?) +(.*)$", facts.strip("\n"), re.M)


def header_arguments(lines):
    return [word for line in lines for word in ("-H", line)]


def all_of(facts, label):
    return [text for name, text in facts if name == label]


def without_date(head):
    return re.sub(r"(?m)^Date: .*$|boundary=\w+$", "", head)


@pytest.mark.parametrize(("request_line", "lines"), [
    ("GET / HTTP/1.1", ()), ("GET /page.html HTTP/1.1", (GZIP,)), ("HEAD /page.html HTTP/1.1", ()),
    ("GET /page.html HTTP/1.1", (SLICE,)), ("GET /page.html HTTP/1.1", ("Range: bytes=2-5,900-",)),
    ("GET /page.html HTTP/1.1", ("If-None-Match: *",)), ("GET /old?x=y HTTP/1.1", ()), ("GET /blog/x HTTP/1.1", ()),
    ("GET /app HTTP/1.1", ()), ("GET /dir HTTP/1.1", ()), ("GET /nowhere HTTP/1.1", ()), ("GET /x y HTTP/1.1", ()),
    ("OPTIONS * HTTP/1.1", ()), ("GET /logo.bin HTTP/1.0", ()), ("GET / HTTP/2.0", ()),
    ("POST / HTTP/1.1", ("Content-Length: 5", "Expect: 100-continue")), ("GET / HTTP/1.1", ("Content-Length: 99999",)),
    ("GET / HTTP/1.1", ("Bad Name: x",)),
])
def test_the_head_is_that_which_the_server_sends(tars, tmp_path, request_line, lines):
    lines = ("Host: one.test", *lines)
    asked, head, _, _ = explain(request_line, *header_arguments(lines), tars[0])
    assert asked.splitlines() == [request_line, *lines]
    server = Server(tars[0], log=tmp_path / "stderr")
    with server.connect() as client:
        client.send("".join(f"{line}\r\n" for line in (request_line, *lines, "")).encode())
        client.half_close()
        sent, _, _ = client.rest().partition(b"\r\n\r\n")
    server.stop()
    assert without_date(head) == without_date(sent.decode().replace("\r\n", "\n"))


def test_representation_lookups_and_rules_are_told(tars):
    _, _, body, facts = explain("GET /page.html", "-H", GZIP, tars[0])
    size = len(FILES["page.html.gz"])
    assert body == f"({size} bytes of the archive)"
    assert facts == [
        ("site", f"{tars[0]}, by http"), ("looked up", f"'/page.html': {len(PAGE)} bytes or {size} bytes in gzip"),
        ("representation", f"'/page.html.gz', {size} bytes in gzip"),
        ("rule", "_headers, line 1: /*"), ("rule", "_headers, line 4: /page*"),
        ("remembered", "yes: once it has come a few times, its bytes lead to this response at once")]


@pytest.mark.parametrize(("path", "rules"), [
    ("/old", ["_redirects, line 2: /old /page.html", "_headers, line 1: /*"]),
    ("/blog/x", ["_redirects, line 3: /blog/* /dir/:splat 302", "_headers, line 1: /*"]),
    ("/app", ["_redirects, line 4: /app /index.html 200", "_headers, line 1: /*"]),
    ("/self/x", ["_redirects, line 5: /self/* /self/:splat (matches, but does not count here)",
                 "_headers, line 1: /*"]),
    ("/nowhere", ["_headers, line 1: /*"]),
])
def test_rules_are_named_by_their_lines(tars, path, rules):
    assert all_of(explain(f"GET {path}", tars[0])[3], "rule") == rules


def test_an_error_page_is_looked_up(tars):
    _, _, _, facts = explain("GET /dir/nowhere", tars[0])
    assert all_of(facts, "looked up") == ["'/dir/nowhere': nothing", "'/404.html': 9 bytes"]
    assert all_of(facts, "representation") == ["'/404.html', 9 bytes"]


def test_a_bad_request_is_told_why(tars):
    _, head, body, facts = explain("GET /x%zz", tars[0])
    assert head.startswith("HTTP/1.1 400 Bad Request\n")
    assert body == "400 Bad Request: bad percent-encoding in the path"
    assert facts == [("remembered", "the response, not the request: that is read each time")]


@pytest.mark.parametrize(("lines", "words"), [
    (("User-Agent: x", "Cookie: a=b"), "yes"), ((SLICE,), "no"), (("Cookie: " + "x" * 3000,), "the response, not")])
def test_whether_it_is_remembered(tars, lines, words):
    [text] = all_of(explain("GET /page.html", *header_arguments(lines), tars[0])[3], "remembered")
    assert text.startswith(words)


def test_the_host_decides(tars):
    flags = "--site", f"one.test={tars[0]}", "--site", f"two.test={tars[1]}"
    for host, tar in (("one.test", tars[0]), ("TWO.test:80", tars[1])):
        assert all_of(explain("GET /", "-H", f"Host: {host}", *flags)[3], "site") == [f"{tar}, by http"]
    _, head, _, facts = explain("GET /", *flags)
    assert head.startswith("HTTP/1.1 421 ")
    assert not all_of(facts, "site")


def test_with_a_certificate_the_scheme_is_https(tars):
    """Which need not be there: nothing is encrypted."""
    flags = "-H", "Host: one.test", "-C", "cert.pem", "-P", "key.pem", "--hsts", "60", tars[0]
    _, head, _, facts = explain("GET /secure", *flags)
    assert head.startswith("HTTP/1.1 303 ")
    assert "\nStrict-Transport-Security: max-age=60\n" in head
    assert all_of(facts, "site") == [f"{tars[0]}, by https"]
    assert explain("GET /secure", *flags[:2], tars[0])[1].startswith("HTTP/1.1 404 ")


def test_nothing_else_is_touched(tars, tmp_path):
    explain("GET /", "--access-log", tmp_path / "log", "-l", f"unix:{tmp_path / 'socket'}", tars[0])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--explain", "GET"), "'GET' is no request: write 'GET /path'"), (("--explain", ""), "'' is no request"),
    (("-H", "A: b"), "--header is a line of the request that --explain is about")])
def test_wrong_usage(tars, arguments, words):
    ended = run_tarweb(*arguments, tars[0])
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr


def test_an_archive_that_is_not_there():
    ended = run_tarweb("--explain", "GET /", "nowhere.tar")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "nowhere.tar" in ended.stderr
