"""Which file a target means, and what is said about it: lookup, links, redirects, variants, types."""

import gzip
import posixpath
import re
import tarfile
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from hostile_archives import END, old_sparse, sparse_1_0
from support import FILES, LAST_MODIFIED, build_tar, prose

FOUND = {
    "/": "index.html",
    "/index.html": "index.html",
    "/dir/": "dir/index.html",
    "/dir/?query": "dir/index.html",
    "/dir/page.html": "dir/page.html",
    "/literal%2541.txt": "literal%41.txt",
    "/100%25/r%C3%A9sum%C3%A9%20(1)%3F.txt": "100%/r\u00e9sum\u00e9 (1)?.txt",
    "/with%20space/d%c3%a9j%c3%a0/": "with space/d\u00e9j\u00e0/index.html",
    "/../next": "next",
    "/%2e%2e/%2E./next": "next",
    "/a/b/../../next": "next",
    "/dir/.": "dir/index.html",
    "/dir/..": "index.html",
    "/style.css.gz": "style.css.gz",
    # an encoded slash is a slash, before dot segments are removed
    "/dir%2Fpage.html": "dir/page.html",
    "/dir%2fpage.html": "dir/page.html",
    "/dir%2F": "dir/index.html",
    "/100%25%2Fr%C3%A9sum%C3%A9%20(1)%3F.txt": "100%/r\u00e9sum\u00e9 (1)?.txt",
    "/..%2fnext": "next",
    "/dir/..%2f..%2fnext": "next",
    # bytes above 0x7F count as if they were percent-encoded
    "/100%25/r\xc3\xa9sum%C3\xa9%20(1)%3F.txt": "100%/r\u00e9sum\u00e9 (1)?.txt",
    "/with%20space/d%c3%a9j\xc3\xa0/?q=\xd0\xbf": "with space/d\u00e9j\u00e0/index.html",
}

NOT_FOUND = [
    "/nowhere", "/nowhere/", "/dir%2Fnowhere", "/..%2fdir%2fnext", "/..%2f..%2fetc%2fpasswd", "/dir%252Fpage.html",
    "/..%5cnext", "/next/", "/index.html/", "/Next", "/literal%41.txt", "/next%20", "/%ff%fe", "/etc/passwd",
    "/../../../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/dir/../../../etc/passwd",
    "/.%252e/next", "/dir/page.html%0d%0aX-Evil:%201",
]


@pytest.mark.parametrize("target", FOUND)
def test_a_target_finds_its_file(server, target):
    response = server.fetch(target)
    assert (response.status, response.body) == (200, FILES[FOUND[target]])


@pytest.mark.parametrize("target", NOT_FOUND)
def test_what_is_not_in_the_archive_gets_the_archive_s_own_page(server, target):
    response = server.fetch(target)
    assert (response.status, response.body) == (404, FILES["404.html"])
    assert response["Content-Type"].startswith("text/html")


def test_without_such_a_page_a_404_is_short_text(start, tmp_path):
    response = start(build_tar(tmp_path / "bare.tar", {"a": b"a"})).fetch("/b")
    assert response.status == 404
    assert response["Content-Type"].startswith("text/plain")
    assert 0 < len(response.body) < 200


def test_prefix_is_taken_off_the_names(start, tmp_path):
    tar = build_tar(tmp_path / "site.tar", {"blog/index.html": b"home", "blog/a/b.txt": b"deep"})
    server = start(tar, "--prefix", "blog/")
    assert server.fetch("/").body == b"home"
    assert server.fetch("/a/b.txt").body == b"deep"
    assert server.fetch("/blog/a/b.txt").status == 404


def test_names_that_begin_with_a_dot_take_a_flag(start, tmp_path):
    names = (".env", ".git/config", "a/._b", ".well-known/security.txt")
    tar = build_tar(tmp_path / "site.tar", {"index.html": b"home", **{name: name.encode() for name in names}})
    server = start(tar)
    assert [server.fetch(f"/{name}").status for name in names] == [404, 404, 404, 200]
    assert server.fetch("/.git").status == 404
    assert "'.env', '.git/', 'a/._b'; see --dotfiles" in server.stderr()
    server = start(tar, "--dotfiles")
    assert [server.fetch(f"/{name}").body for name in names] == [name.encode() for name in names]


def test_links_inside_the_archive_work_and_others_do_not(start, tmp_path):
    symlink, hardlink = tarfile.SYMTYPE, tarfile.LNKTYPE
    tar = build_tar(tmp_path / "links.tar", {"./a/file.txt": b"the file", "./a/index.html": b"index"}, [
        ("./b/relative.txt", "../a/file.txt", symlink),
        ("./b/twice.txt", "relative.txt", symlink),
        ("./b/hard.txt", "./a/file.txt", hardlink),
        ("./b/outside.txt", "../../../../../../../../etc/passwd", symlink),
        ("./b/absolute.txt", "/etc/passwd", symlink),
        ("./b/one.txt", "two.txt", symlink),
        ("./b/two.txt", "one.txt", symlink),
        ("./b/dangling.txt", "nothing.txt", symlink),
    ])
    server = start(tar)
    for name in ("relative", "twice", "hard"):
        assert server.fetch(f"/b/{name}.txt").body == b"the file", name
    for name in ("outside", "absolute", "one", "two", "dangling"):
        assert server.fetch(f"/b/{name}.txt").status == 404, name
    assert "outside.txt" in server.stderr()
    assert "one.txt" in server.stderr()


def test_of_two_members_with_one_name_the_last_is_served(start, tmp_path):
    path = build_tar(tmp_path / "twice.tar", {"a.txt": b"the first"})
    with tarfile.open(build_tar(tmp_path / "other.tar", {"a.txt": b"the second one"})) as other, \
            tarfile.open(path, "a") as tar:
        member = other.getmember("a.txt")
        tar.addfile(member, other.extractfile(member))
    assert start(path).fetch("/a.txt").body == b"the second one"


# --- files with holes ----------------------------------------------------------------------------------------------

DATA = bytes(range(256)) * 2
HOLE = 300 << 20            # more zeros than there are in memory
HOLED = DATA + bytes(700_000) + DATA
LARGE = len(DATA) + HOLE + len(DATA)


@pytest.fixture
def holed(tmp_path):
    """A site of sparse files."""
    path = tmp_path / "holed.tar"
    path.write_bytes(sparse_1_0(b"a.bin", [(0, 512), (700_512, 512)], len(HOLED), DATA * 2)
                     + sparse_1_0(b"large.bin", [(0, 512), (512 + HOLE, 512)], LARGE, DATA * 2)
                     + old_sparse(b"zeros.bin", [(100_000, 0)], 100_000, b"") + END)
    return path


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "over TLS"])
def test_files_with_holes(start, start_tls, holed, tls):
    """In userspace, TLS reads what is in the file from the file, and zeros from memory."""
    server = start_tls(holed, "--ktls=off") if tls else start(holed)
    response = server.fetch("/a.bin")
    assert (response.status, response.body) == (200, HOLED)
    assert server.fetch("/zeros.bin").body == bytes(100_000)
    assert server.fetch("/a.bin", if_none_match=response["ETag"]).status == 304
    assert server.fetch("/a.bin", "HEAD")["Content-Length"] == str(len(HOLED))
    for first, last in ((0, 0), (500, 600), (511, 512), (600, 9000), (0, len(HOLED) - 1), (700_000, 700_520)):
        part = server.fetch("/a.bin", range=f"bytes={first}-{last}")
        assert (part.status, part.body) == (206, HOLED[first:last + 1])
        assert part["Content-Range"] == f"bytes {first}-{last}/{len(HOLED)}"
    parts = server.fetch("/a.bin", range="bytes=500-520,5000-5010,-20")
    assert parts.status == 206
    assert all(b"\r\n\r\n" + part + b"\r\n--" in parts.body for part in (HOLED[500:521], bytes(11), HOLED[-20:]))


def test_a_hole_that_is_larger_than_the_zeros_in_memory(start, holed):
    server = start(holed)
    part = server.fetch("/large.bin", range=f"bytes={LARGE - 600}-")
    assert part.body == bytes(88) + DATA
    assert part["Content-Range"] == f"bytes {LARGE - 600}-{LARGE - 1}/{LARGE}"
    whole = server.fetch("/large.bin").body
    assert (len(whole), whole[:512], whole[-512:], whole.count(b"\0")) == (LARGE, DATA, DATA, HOLE + 4)


# --- redirects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("target", "location"), [
    ("/dir", "./dir/"),
    ("/dir?a=b&c=/d", "./dir/?a=b&c=/d"),
    ("/./nowhere/../dir", "./dir/"),
    ("/nowhere%2F../dir", "./dir/"),
    ("/nowhere/..%2Fdir", "/dir/"),
    ("/with%20space/d%C3%A9j%C3%A0", "./d%C3%A9j%C3%A0/"),
    ("/with%20space%2fd%C3%A9j%C3%A0", "./with%20space/d%C3%A9j%C3%A0/"),
    ("/with%20space/d\xc3\xa9j\xc3\xa0?\xc3\xa9", "./d%C3%A9j%C3%A0/?%C3%A9"),
    ("http://t/with%20space/d%C3%A9j%C3%A0?x", "./d%C3%A9j%C3%A0/?x"),
])
def test_a_directory_without_its_slash_is_redirected(server, method, target, location):
    response = server.fetch(target, method)
    assert response.status == 301
    assert response["Location"] == location
    assert response["Cache-Control"] == "no-cache"
    assert response["Content-Type"] == "text/html; charset=utf-8"
    if method == "GET":
        assert f'<a href="{location.replace("&", "&amp;")}">'.encode() in response.body


@pytest.mark.parametrize("target", [
    "/dir", "/dir?a", "/./dir", "/nowhere/../dir", "/nowhere%2F../dir", "/nowhere/..%2Fdir", "/nowhere/%2e%2e/dir",
    "/with%20space/d%C3%A9j%C3%A0", "/with%20space%2fd%C3%A9j%C3%A0", "/nowhere/.%2F../with%20space/d%C3%A9j%C3%A0",
    "//dir", "/dir//", "//dir//index.html?x", "/%2Fdir", "/.%2Fdir", "/..//dir",
])
def test_a_redirect_leads_to_the_page_at_once(server, target):
    """As a browser follows it, from the URL that it has asked for."""
    response = server.fetch(target)
    assert response.status == 301
    to = urlsplit(urljoin(f"http://t{target}", response["Location"]))
    assert to.netloc == "t"
    assert server.fetch(to.path).status == 200
    name = posixpath.normpath(unquote(to.path)).strip("/").removesuffix("/index.html")
    assert server.fetch(to.path).body == FILES[f"{name}/index.html"]
    assert to.query == urlsplit(target).query


@pytest.mark.parametrize(("target", "location"), [
    ("//next", "/next"), ("///next?a=//b", "/next?a=//b"), ("/dir//", "/dir/"),
    ("/dir///index.html", "/dir/index.html"),
    ("//with%20space//d%C3%A9j%C3%A0", "/with%20space/d%C3%A9j%C3%A0/"), ("/%2fnext", "/next"), ("//./dir", "/dir/"),
    ("//nowhere", None), ("//evil.example/next", None), ("//", "/")])
def test_repeated_slashes_lead_to_one_each(server, target, location):
    for method in ("GET", "HEAD"):
        response = server.fetch(target, method)
        assert (response.status, response.get("Location")) == (301 if location else 404, location)
    assert server.fetch(target, "POST", content_length=0).status == 405


@pytest.mark.parametrize("target", [
    "//evil.example", "//evil.example?x", "///evil.example", "/.//evil.example", "//evil.example/%2e",
    "/dir/..//evil.example", "/%2e//evil.example", "/%2fevil.example", "/%5cevil.example", "/\\evil.example",
    "http://evil.example/dir", "http://evil.example//evil.example", "/%09/evil.example", "//evil.example/%2e%2e/dir",
    "//dir/../evil.example",
])
def test_no_redirect_leads_to_another_host(server, target):
    response = server.fetch(target)
    assert response.status in (200, 301, 400, 404)
    if response.status == 301:
        location = response["Location"]
        assert re.match(r"\./|/(?!/)", location)
        assert urlsplit(urljoin("http://t/", location.replace("\\", "/"))).netloc == "t"


def test_a_line_end_in_a_name_cannot_add_a_header(server):
    response = server.fetch("/split%0d%0aX-Evil:%201")
    assert response.status == 301
    assert "x-evil" not in response.headers
    assert response["Location"].lower().startswith("./split%0d%0ax-evil")


# --- variants ------------------------------------------------------------------------------------------------------

VARIANTS = {None: "style.css", "br": "style.css.br", "gzip": "style.css.gz", "zstd": "style.css.zst"}
NEGOTIATED = {
    "": None,
    "gzip": "gzip",
    "GZip": "gzip",
    "x-gzip": "gzip",
    "br": "br",
    "zstd": "zstd",
    "gzip, deflate, br, zstd": "br",
    "gzip,zstd": "zstd",
    "gzip, br;q=0.1": "br",          # the smallest acceptable one, whatever the weights
    "br;q=0, gzip": "gzip",
    "br;q=0.000, gzip;q=1.000": "gzip",
    "gzip;q=0": None,
    "gzip ; q=0": None,
    "*": "br",
    "br;q=0, *": "zstd",
    "*;q=0, gzip": "gzip",
    "identity;q=0, gzip;q=0.001": "gzip",
    "deflate, compress": None,
    "identity": None,
    "gzipped, brr": None,
}


@pytest.mark.parametrize("accepted", NEGOTIATED)
def test_the_smallest_acceptable_variant_is_sent(server, accepted):
    coding = NEGOTIATED[accepted]
    response = server.fetch("/style.css", accept_encoding=accepted)
    assert (response.status, response.body) == (200, FILES[VARIANTS[coding]])
    assert response.get("Content-Encoding") == coding
    assert response["Content-Type"].startswith("text/css")
    assert response["Vary"].lower() == "accept-encoding"


def test_each_variant_has_its_own_etag(server):
    tags = [server.fetch("/style.css", accept_encoding=coding or "identity")["ETag"] for coding in VARIANTS]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("accepted", ["*;q=0", "identity;q=0", "identity;q=0, *;q=0", "br;q=0, identity;q=0"])
def test_nothing_acceptable(server, accepted):
    assert server.fetch("/next", accept_encoding=accepted).status == 406
    if "br" not in accepted:
        assert server.fetch("/style.css", accept_encoding=accepted).status == 406


@pytest.mark.parametrize("target", ["/packed/", "/packed/index.html"])
def test_an_index_has_variants_too(server, target):
    response = server.fetch(target, accept_encoding="gzip")
    assert response["Content-Encoding"] == "gzip"
    assert gzip.decompress(response.body) == prose(9000)
    assert response["Content-Type"].startswith("text/html")


def test_a_variant_larger_than_the_plain_file_is_not_sent(server):
    response = server.fetch("/larger.txt", accept_encoding="gzip")
    assert response.body == FILES["larger.txt"]
    assert response.get("Content-Encoding") is None


def test_both_endings_of_zstd(server):
    response = server.fetch("/zstd.txt", accept_encoding="zstd")
    assert (response.body, response["Content-Encoding"]) == (FILES["zstd.txt.zstd"], "zstd")


def test_a_variant_by_its_own_name_is_a_plain_file(server):
    response = server.fetch("/style.css.gz", accept_encoding="gzip")
    assert response.body == FILES["style.css.gz"]
    assert response.get("Content-Encoding") is None
    assert response["Content-Type"] == "application/gzip"


# --- what else is said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "kind"), [
    ("/", "text/html; charset=utf-8"), ("/style.css", "text/css; charset=utf-8"), ("/app.wasm", "application/wasm"),
    ("/app.mjs", "text/javascript; charset=utf-8"), ("/empty.txt", "text/plain; charset=utf-8"),
    ("/random.bin", "application/octet-stream"), ("/next", "application/octet-stream"),
])
def test_content_type(server, target, kind):
    response = server.fetch(target)
    assert response["Content-Type"].lower() == kind
    assert response["X-Content-Type-Options"] == "nosniff"


def test_headers_of_a_file(server):
    response = server.fetch("/random.bin")
    assert response["Last-Modified"] == LAST_MODIFIED
    assert response["ETag"].startswith('"')
    assert response["Accept-Ranges"] == "bytes"
    assert response["Server"].startswith("tarweb")
    assert response["Content-Length"] == str(len(FILES["random.bin"]))


def test_cache_control_is_what_the_flag_says(start, site):
    server = start(site, "--cache-control", "public, max-age=60")
    assert server.fetch("/next")["Cache-Control"] == "public, max-age=60"
    assert server.fetch("/style.css", accept_encoding="br")["Cache-Control"] == "public, max-age=60"
    tag = server.fetch("/next")["ETag"]
    assert server.fetch("/next", if_none_match=tag)["Cache-Control"] == "public, max-age=60"


def test_the_same_content_has_the_same_etag_and_other_content_another(start, tmp_path):
    one = start(build_tar(tmp_path / "one.tar", {"a": b"1", "b": b"1", "c": b"2"}))
    two = start(build_tar(tmp_path / "two.tar", {"x": b"x", "a": b"1"}))
    assert one.fetch("/a")["ETag"] == two.fetch("/a")["ETag"]
    assert one.fetch("/a")["ETag"] != one.fetch("/c")["ETag"]
