"""Sites with rules of their own, served: flags, reloads, hosts and schemes."""

import os
import signal

import pytest
from support import FILES, build_tar, request, wait_until
from test_proxy import block, tlv
from tlsclient import TlsClient, client_context

PAGES = {"index.html": b"<title>home</title>", "about.html": b"about", "404.html": b"not found",
         "docs/404.html": b"not in the docs", "assets/app.1.js": b"1"}
TO_APP = b"/* /index.html 200\n"
CLIENT_SSL = tlv(0x20, b"\1\0\0\0\0")      # PP2_TYPE_SSL, with PP2_CLIENT_SSL
CLIENT_PLAIN = tlv(0x20, b"\0\0\0\0\0")    # and without
ADDRESSES = bytes([192, 0, 2, 1, 10, 0, 0, 1, 0xDC, 4, 1, 0xBB])


def pack(path, redirects=None, headers=None, files=PAGES):
    own = {name: content for name, content in (("_redirects", redirects), ("_headers", headers)) if content is not None}
    return build_tar(path, {**files, **own})


def replace(server, path, *arguments, **options):
    """Have a server reload another archive."""
    os.replace(pack(path.with_suffix(".new"), *arguments, **options), path)
    before = server.stderr().count("reloaded: generation")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.stderr().count("reloaded: generation") > before)


def test_a_site_with_headers_redirects_and_one_page_for_all_else(start, tmp_path):
    server = start(pack(tmp_path / "site.tar", b"/old/* /new/:splat 302\n/short /about.html 200\n" + TO_APP,
                        b"/*\n  X-Frame-Options: DENY\n"
                        b"/assets/*\n  Cache-Control: public, max-age=31536000, immutable\n"))
    with server.connect() as client:
        for _ in range(4):                  # known by their bytes from the third time on
            assert client.ask("/old/a?b").get("Location") == "/new/a?b"
            assert client.ask("/short").body == b"about"
            page = client.ask("/any/route")
            assert (page.status, page.body, page["X-Frame-Options"]) == (200, PAGES["index.html"], "DENY")
            script = client.ask("/assets/app.1.js")
            assert (script["Cache-Control"], script["X-Frame-Options"]) == (
                "public, max-age=31536000, immutable", "DENY")
            assert client.ask("/assets/app.1.js", if_none_match=script["ETag"])["X-Frame-Options"] == "DENY"
            preflight = client.ask("/any/route", "OPTIONS")
            assert (preflight.status, preflight["X-Frame-Options"]) == (204, "DENY")
            assert client.ask("/_redirects").body == PAGES["index.html"]
    assert "_redirects" not in server.stderr()


def test_lines_that_cannot_be_used_are_named_at_the_start_and_the_others_count(start, tmp_path):
    path = pack(tmp_path / "site.tar", b"/a /b Country=at\n/c /about.html\n",
                b"/*\n  Basic-Auth: a:b\n  Server: x\n  X: y")
    server = start(path)
    for note in ("_redirects, line 1: conditions (Country, ", "_headers, line 2: BASIC-AUTH PROTECTS NOTHING HERE",
                 "_headers, line 3: 'Server' is the server's own business"):
        assert f"tarweb: {path}: {note}" in server.stderr()
    assert server.fetch("/c").get("Location") == "/about.html"
    answer = server.fetch("/about.html")
    assert (answer["X"], answer["Server"], answer.get("Basic-Auth")) == ("y", "tarweb", None)


def test_files_like_any_other(start, tmp_path):
    server = start(pack(tmp_path / "site.tar", b"bad\n", b"bad\n"), "--no-site-rules")
    assert server.fetch("/_redirects").body == server.fetch("/_headers").body == b"bad\n"
    assert "line 1" not in server.stderr()


def test_clean_urls_and_the_nearest_404_page(start, tmp_path):
    server = start(pack(tmp_path / "site.tar"), "--clean-urls")
    assert server.fetch("/about").body == server.fetch("/about.html").body == b"about"
    assert (server.fetch("/docs/x").status, server.fetch("/docs/x").body) == (404, b"not in the docs")
    assert server.fetch("/x").body == b"not found"


# --- generations

def test_rules_are_reloaded_with_their_archive(start, tmp_path):
    path = pack(tmp_path / "site.tar", b"/a /b\n", b"/*\n X: 1\n")
    server = start(path)
    with server.connect() as client:
        assert (client.ask("/a").get("Location"), client.ask("/about.html")["X"]) == ("/b", "1")
    replace(server, path, b"/a /c\n", b"/*\n X: 2\n")
    with server.connect() as client:
        assert (client.ask("/a").get("Location"), client.ask("/about.html")["X"]) == ("/c", "2")
    replace(server, path)
    with server.connect() as client:
        assert (client.ask("/a").status, client.ask("/about.html").get("X")) == (404, None)


def test_a_kept_script_goes_before_the_page_for_all_else(start, tmp_path):
    """Somebody has the page of before, which asks for a script that the new archive lacks."""
    path = pack(tmp_path / "site.tar", TO_APP, b"/*\n X: old\n")
    server = start(path, "--keep", "1")
    for number in (2, 3):
        replace(server, path, TO_APP + b"/gone.js /gone 302!\n", b"/assets/*\n X: new\n",
                files={"index.html": b"new", f"assets/app.{number}.js": b"%d" % number})
        kept = server.fetch(f"/assets/app.{number - 1}.js")
        assert (kept.body, kept["X"]) == (b"%d" % (number - 1), "new")
        assert server.fetch("/any/route").body == b"new"
    assert server.fetch("/assets/app.1.js").body == b"new", "only one is kept"


# --- hosts and schemes

def test_each_site_has_its_own_rules(start, tmp_path):
    one, two = pack(tmp_path / "one.tar", b"/a /one\n"), pack(tmp_path / "two.tar", b"http://two/a /two\n/a /other\n")
    sites = (word for site in (f"one={one}", f"two={two}", f"three={two}") for word in ("--site", site))
    server = start(pack(tmp_path / "rest.tar"), *sites)
    with server.connect() as client:
        for _ in range(4):
            for host, location in (("one", "/one"), ("TWO:80", "/two"), ("three", "/other"), ("four", None)):
                client.send(request("/a").replace(b"Host: t", b"Host: " + host.encode()))
                assert client.response().get("Location") == location


BY_SCHEME = (b"https://t/* https://www.example.com/:splat 301!\nhttp://t/plain /about.html 302\n"
             b"/* https://t/:splat 307!\n")


def test_the_scheme_is_the_listeners(start, start_tls, tmp_path, pairs):
    path = pack(tmp_path / "site.tar", BY_SCHEME, b"https://t/*\n X: y\n")
    server = start(path)
    assert server.fetch("/plain").get("Location") == "/about.html"
    assert server.fetch("/about.html").get("Location") == "https://t/about.html"
    secure = start_tls(path)
    with TlsClient(("127.0.0.1", secure.port), client_context(pairs["p256"].root)) as client:
        answer = client.ask("/about.html")
        assert (answer.get("Location"), answer["X"]) == ("https://www.example.com/about.html", "y")


def test_or_what_a_proxy_header_says_of_tls(start, tmp_path):
    """Requests are the same bytes on both kinds of connections, and known by them."""
    log = tmp_path / "log"
    server = start(pack(tmp_path / "site.tar", BY_SCHEME), "--proxy-from", "127.0.0.0/8", "--access-log", str(log))
    expected = {b"PROXY TCP4 192.0.2.1 10.0.0.1 1 2\r\n": ("/about.html", 302),
                block(rest=ADDRESSES + CLIENT_PLAIN): ("/about.html", 302),
                block(rest=ADDRESSES + tlv(0x04, b"x") + CLIENT_SSL): ("https://www.example.com/plain", 301)}
    for _ in range(2):
        for header, (location, status) in expected.items():
            with server.connect() as client:
                client.send(header)
                for _ in range(5):
                    answer = client.ask("/plain")
                    assert (answer.get("Location"), answer.status) == (location, status)
    wait_until(lambda: log.read_text().count("\n") == 30)
    assert [log.read_text().count(f'"GET /plain HTTP/1.1" {status} ') for status in (302, 301)] == [20, 10]


def test_a_connection_by_a_proxy_with_tls_ends_when_the_server_does(start, tmp_path):
    server = start(pack(tmp_path / "site.tar", BY_SCHEME), "--proxy-from", "127.0.0.0/8", "--lame-duck", "30")
    with server.connect() as client:
        client.send(block(rest=ADDRESSES + CLIENT_SSL))
        assert not client.ask("/plain").closes
        server.signal()
        wait_until(lambda: client.ask("/plain").closes)
        assert client.at_end()
    server.signal()


def test_rules_replace_strict_transport_security(start_tls, tmp_path, pairs):
    path = pack(tmp_path / "site.tar", None, b"/about.html\n Strict-Transport-Security: max-age=1\n/assets/*\n"
                                             b" ! Strict-Transport-Security\n")
    server = start_tls(path, "--hsts", "5")
    with TlsClient(("127.0.0.1", server.port), client_context(pairs["p256"].root)) as client:
        for _ in range(4):
            assert [client.ask(target).get("Strict-Transport-Security")
                    for target in ("/about.html", "/", "/assets/app.1.js", "/nowhere")] == [
                        "max-age=1", "max-age=5", None, "max-age=5"]


# --- the whole of HTTP's tests stays true with rules in force

@pytest.fixture(scope="module")
def dressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dressed")
    return pack(folder / "site.tar", b"/old /next\n/x/:y /z\n", b"/*\n X-Rules: 1\n", files=FILES)


def test_all_files_are_served_with_rules_in_force(start, dressed):
    server = start(dressed)
    with server.connect() as client:
        for name, content in FILES.items():
            if name.isascii() and name.isprintable() and not set(name) & set(" %?()"):
                answer = client.ask("/" + name)
                assert (answer.status, answer.body, answer["X-Rules"]) == (200, content, "1")
        assert client.ask("/x/1").get("Location") == "/z"
