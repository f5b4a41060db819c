"""The plain listener beside an HTTPS one: redirects, ACME's challenges; and Strict-Transport-Security on the other."""

import os
import socket

import pytest
from support import FILES, deliveries, request, wait_until
from tlsclient import TlsServer

REDIRECT = ("--redirect-http", "127.0.0.1:0")
CHALLENGE = "/.well-known/acme-challenge/"
TOKEN = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr_oA"
CONTENT = TOKEN.encode() + b".LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"


@pytest.fixture(scope="module")
def redirecting(site, pairs, tmp_path_factory):
    server = TlsServer(site, *REDIRECT, pairs=[pairs["p256"]], log=tmp_path_factory.mktemp("redirect") / "stderr")
    yield server
    server.check()
    server.stop()


def plain(server, *pieces, method="GET"):
    """One request to the plain listener, and its response."""
    with server.connect_raw(server.redirect_port) as client:
        client.send(*pieces)
        return client.response(method)


def head(target, host="example.com", method="GET", version="1.1"):
    lines = [f"{method} {target} HTTP/{version}"] + ([f"Host: {host}"] if host is not None else [])
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


# --- where to ------------------------------------------------------------------------------------------------------

LOCATIONS = {  # (target, Host) -> what follows https://; {} is the colon and the port
    ("/", "example.com"): "example.com{}/",
    ("/", "example.com:80"): "example.com{}/",
    ("/", "example.com:"): "example.com{}/",
    ("/", "EXAMPLE.com:8080"): "EXAMPLE.com{}/",
    ("/", "127.0.0.1:80"): "127.0.0.1{}/",
    ("/", "[::1]:80"): "[::1]{}/",
    ("/", "[2001:db8::1]"): "[2001:db8::1]{}/",
    ("/a/b.html", "example.com"): "example.com{}/a/b.html",
    ("/a?b=c&d=/e?f", "example.com:80"): "example.com{}/a?b=c&d=/e?f",
    ("/?", "example.com"): "example.com{}/?",
    ("/a%20b/r%C3%A9sum%C3%A9", "example.com"): "example.com{}/a%20b/r%C3%A9sum%C3%A9",
    ("/100%25", "example.com"): "example.com{}/100%25",
    ("//evil.example/x", "example.com"): "example.com{}//evil.example/x",
    ("//evil.example", "example.com"): "example.com{}//evil.example",
    ("/@evil.example/", "example.com"): "example.com{}/@evil.example/",
    ("/%0d%0aX-Evil:%201", "example.com"): "example.com{}/%0D%0AX-Evil:%201",
    ("/a?%0d%0aX-Evil:%201", "example.com"): "example.com{}/a?%0d%0aX-Evil:%201",
    ("/.well-known/acme-challenge/x", "example.com"): "example.com{}/.well-known/acme-challenge/x",
}


@pytest.mark.parametrize(("target", "host"), LOCATIONS)
def test_everything_is_redirected_to_its_https_address(redirecting, target, host):
    expected = "https://" + LOCATIONS[target, host].format(f":{redirecting.port}")
    for _, pieces in deliveries(head(target, host)):
        response = plain(redirecting, *pieces)
        assert response.status == 301
        assert response["Location"].lower() == expected.lower()      # %0D is %0d
        assert "x-evil" not in response.headers


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_every_method_is_redirected(redirecting, method):
    """301 and not 308, which lynx, w3m, Java and older Pythons do not follow; only GET and HEAD are served anyway."""
    response = plain(redirecting, head("/a", method=method), method=method)
    assert (response.status, response["Location"]) == (301, f"https://example.com:{redirecting.port}/a")


def test_absolute_form(redirecting):
    """RFC 9112 section 3.2.2: what the target names is meant, not what Host does; a proxy would send both alike."""
    response = plain(redirecting, head("http://example.com/a?b", "example.com"))
    assert response["Location"] == f"https://example.com:{redirecting.port}/a?b"


@pytest.mark.parametrize("host", [
    "evil.example/x", "u@evil.example", "a b", "[::1", "example.com:http", "a\tb", "example.com?x", "example.com#x",
    "exam\"ple.com", "example.com\\x", "<script>", "", None,
])
def test_what_is_no_host_is_not_sent_anywhere(redirecting, host):
    response = plain(redirecting, head("/", host))
    assert response.status == 400
    assert response.get("Location") is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_http_1_0_without_host_is_sent_to_the_first_certificate_s_name(redirecting, method):
    """HAProxy's default check asks like that, and takes a 400 for a server that is down."""
    response = plain(redirecting, head("/a", None, version="1.0", method=method), method=method)
    assert (response.status, response["Location"]) == (301, f"https://localhost:{redirecting.port}/a")
    assert response.closes


def test_http_1_0_without_any_name_is_not_sent_anywhere(start_tls, site, authority):
    server = start_tls(site, *REDIRECT, pairs=[authority.issue(names=("*.example.com", "127.0.0.1"))])
    response = plain(server, head("/", None, version="1.0"))
    assert (response.status, response.get("Location")) == (400, None)
    assert response.closes


def test_behind_a_mapping_of_ports(start_tls, site):
    for port, shown in ((443, ""), (4443, ":4443")):
        server = start_tls(site, *REDIRECT, "--https-port", str(port))
        assert plain(server, head("/a"))["Location"] == f"https://example.com{shown}/a"


def test_http_1_0_with_host_is_redirected(redirecting):
    response = plain(redirecting, head("/a", version="1.0"))
    assert (response.status, response["Location"]) == (301, f"https://example.com:{redirecting.port}/a")


def test_connections_are_kept_and_pipelined(redirecting):
    with redirecting.connect_raw(redirecting.redirect_port) as client:
        client.send(b"".join(head(f"/{i}") for i in range(300)))
        for i in range(300):
            assert client.response()["Location"].endswith(f"/{i}")
        client.send(request("/last", connection="close"))
        assert client.response().closes
        assert client.at_end()


def test_a_redirect_has_a_short_text_for_people(redirecting):
    response = plain(redirecting, head("/a"))
    assert response["Content-Type"].startswith("text/")
    assert f'<a href="{response["Location"]}">'.encode() in response.body
    assert 0 < len(response.body) < 500


def test_nothing_is_served_in_plain(redirecting):
    for name in ("/next", "/index.html", "/large.bin"):
        assert plain(redirecting, head(name)).status == 301


def test_tls_on_the_plain_port_is_not_understood(redirecting):
    with redirecting.connect_raw(redirecting.redirect_port) as client:
        client.send(b"\x16\3\1\0\4\1\0\0\0\r\n\r\n")
        assert client.rest().startswith(b"HTTP/1.1 400 ")


def test_both_are_told(redirecting):
    assert redirecting.redirect_line == f"tarweb: http://127.0.0.1:{redirecting.redirect_port}/ redirects to https\n"
    assert f"https://127.0.0.1:{redirecting.port}/" in redirecting.ready_line


def test_in_every_worker(start_tls, site):
    server = start_tls(site, *REDIRECT, "--threads", "2")
    for i in range(30):
        assert plain(server, head(f"/{i}"))["Location"] == f"https://example.com:{server.port}/{i}"
    assert server.fetch("/next").body == FILES["next"]


def test_port_443_is_left_out(start_tls, site):
    address = "127.0.0.43"      # of our own, so that nobody else's server is in the way
    with socket.socket() as probe:
        try:
            probe.bind((address, 443))
        except OSError as error:
            pytest.skip(f"port 443: {error.strerror}")
    server = start_tls(site, *REDIRECT, listen=f"{address}:443")
    assert plain(server, head("/a?b", "example.com:80"))["Location"] == "https://example.com/a?b"


# --- challenges ----------------------------------------------------------------------------------------------------


@pytest.fixture
def acme(start_tls, site, tmp_path):
    """(server, its --acme-dir, the folder in it that certbot writes to)"""
    folder = tmp_path / "acme"
    (folder / CHALLENGE.strip("/")).mkdir(parents=True)
    server = start_tls(site, *REDIRECT, "--acme-dir", str(folder))
    return server, folder, folder / CHALLENGE.strip("/")


def test_a_challenge_is_served_as_it_is(acme):
    """In either place, from when it is there until it is gone."""
    server, top, deep = acme
    for folder in (top, deep):
        assert plain(server, head(CHALLENGE + TOKEN)).status == 404
        for content in (CONTENT, CONTENT + b"\n", b"x"):
            (folder / TOKEN).write_bytes(content)
            for method, body in (("GET", content), ("HEAD", b"")):
                response = plain(server, head(CHALLENGE + TOKEN, method=method), method=method)
                assert (response.status, response.body) == (200, body)
                assert int(response["Content-Length"]) == len(content)
        (folder / TOKEN).unlink()
    assert plain(server, head(CHALLENGE + TOKEN)).status == 404


@pytest.mark.skipif(os.getuid() != 0, reason="workers are of the same user, unless root starts the server")
def test_a_challenge_that_workers_may_not_read(acme):
    server, top, deep = acme
    (top / TOKEN).write_bytes(CONTENT)
    (top / TOKEN).chmod(0o600)
    deep.chmod(0o700)
    for _ in range(3):
        assert plain(server, head(CHALLENGE + TOKEN)).status == 404
    wait_until(lambda: server.stderr().count("the workers' user may not read") == 1)
    (top / TOKEN).chmod(0o644)
    assert plain(server, head(CHALLENGE + TOKEN)).body == CONTENT
    server.stop()
    assert server.stderr().count("the workers' user may not read") == 1


def test_a_challenge_needs_no_host_of_ours(acme):
    """The certificate authority may ask by any name, and by HTTP/1.0."""
    server, top, _ = acme
    (top / TOKEN).write_bytes(CONTENT)
    for raw in (head(CHALLENGE + TOKEN, "whoever.example:80"), head(CHALLENGE + TOKEN, None, version="1.0"),
                head(CHALLENGE + TOKEN + "?x=1")):
        assert plain(server, raw).body == CONTENT


def test_all_else_is_still_redirected(acme):
    server, top, _ = acme
    (top / "index.html").write_bytes(b"not this")
    for target in ("/", "/index.html", "/.well-known/", "/.well-known/other", f"/{TOKEN}"):
        assert plain(server, head(target)).status == 301


NO_CHALLENGES = [
    "", "nowhere", "..%5csecret", "folder", "folder/token",
    "folder%2ftoken", "link", "linked/secret", "linked%2fsecret", "fifo", "large", "%00", "token%00", "/token",
    "%2ftoken", ".hidden", "token.txt", "token/", "~root", "t*", "token%0d%0aX-Evil:%201", "\xff", "%ff",
    "a" * 300, "a" * 5000,
]
OUT_OF_THERE = [".", "..", "../secret", "../../secret", "../../../secret", "%2e%2e/secret", "%2E./%2e%2e/secret",
                "..%2fsecret", "%2e%2e%2fsecret", "..%2f..%2fsecret"]


def test_only_tokens_are_challenges(acme, tmp_path):
    """Nothing outside, nothing below, nothing linked, nothing special, nothing large."""
    server, top, deep = acme
    for folder in (tmp_path, top, deep.parent, deep):
        (folder / "secret").write_bytes(b"confidential")
    for folder in (top, deep):
        (folder / "folder").mkdir()
        for name in (".hidden", "token.txt", "folder/token"):
            (folder / name).write_bytes(b"confidential")
        (folder / "link").symlink_to(tmp_path / "secret")
        (folder / "linked").symlink_to(tmp_path)
        os.mkfifo(folder / "fifo")
        with (folder / "large").open("wb") as large:
            large.truncate(1 << 30)
    for token in NO_CHALLENGES:
        response = plain(server, head(CHALLENGE + token))
        assert response.status in (404, 400), token
        assert b"confidential" not in response.body, token
    for token in OUT_OF_THERE:      # these are other paths, and redirected like any
        response = plain(server, head(CHALLENGE + token))
        assert response.status in (301, 404, 400), token
        assert b"confidential" not in response.body, token
    (top / "token").write_bytes(CONTENT)
    assert plain(server, head(CHALLENGE + "token")).body == CONTENT


def test_over_https_there_are_no_challenges(acme):
    server, top, deep = acme
    for folder in (top, deep):
        (folder / TOKEN).write_bytes(CONTENT)
    assert server.fetch(CHALLENGE + TOKEN).status == 404


# --- Strict-Transport-Security -------------------------------------------------------------------------------------


def test_hsts_is_on_every_response_over_tls(start_tls, site):
    server = start_tls(site, *REDIRECT, "--hsts", "31536000", "--header-timeout", "1")
    asked = {
        "/next": 200, "/dir": 301, "/nowhere": 404, "/%zz": 400, "/large.bin": 200, "/style.css": 200,
    }
    for target, status in asked.items():
        for method in ("GET", "HEAD"):
            response = server.fetch(target, method)
            assert (response.status, response["Strict-Transport-Security"]) == (status, "max-age=31536000"), target
    others = [server.fetch("/next", "POST"), server.fetch("/next", "OPTIONS"),
              server.fetch("/random.bin", range="bytes=1-2"),
              server.fetch("/next", if_none_match=server.fetch("/next")["ETag"])]
    with server.connect() as client:
        client.send(b"GET /")
        others.append(client.response())
    assert [response.status for response in others] == [405, 204, 206, 304, 408]
    assert {response["Strict-Transport-Security"] for response in others} == {"max-age=31536000"}
    # RFC 6797 section 7.2: never where there is no TLS.
    assert plain(server, head("/")).get("Strict-Transport-Security") is None
    with server.connect_raw() as client:
        client.send(request("/"))
        assert client.response().get("Strict-Transport-Security") is None


def test_hsts_can_be_taken_back(start_tls, site):
    """RFC 6797 section 6.1.1: a max-age of 0 makes browsers forget."""
    assert start_tls(site, "--hsts", "0").fetch("/next")["Strict-Transport-Security"] == "max-age=0"


def test_without_the_flag_there_is_no_hsts(tls_server):
    assert tls_server.fetch("/next").get("Strict-Transport-Security") is None
