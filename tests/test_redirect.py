"""Where the plain listener sends people, and the challenges that it answers: Redirector without a connection."""

import os
from functools import partial
from urllib.parse import quote

import pytest

import http1
from credentials import LARGEST_CHALLENGE, read_acme_challenge, tell_of_permissions
from plan import header_section
from reply import CHALLENGES, Redirector


def ask(redirector, target, host=b"a.example", method=b"GET", fields=b"", version=b"1.1"):
    """The Reply to a request, by way of the parser."""
    host_line = b"Host: %b\r\n" % host if host is not None else b""
    return redirector.reply(http1.parse_head(
        b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, target, version, host_line, fields)))


def location(reply):
    return dict(reply.fields).get(b"Location")


@pytest.mark.parametrize(("port", "host", "target", "to"), (
    (443, b"a.example", b"/", b"https://a.example/"),
    (443, b"a.example:80", b"/x?y=z", b"https://a.example/x?y=z"),
    (8443, b"a.example", b"/", b"https://a.example:8443/"),
    (8443, b"a.example:8080", b"/", b"https://a.example:8443/"),
    (443, b"127.0.0.1:8080", b"/", b"https://127.0.0.1/"),
    (443, b"[::1]", b"/", b"https://[::1]/"),
    (8443, b"[::1]:80", b"/a/", b"https://[::1]:8443/a/"),
    (443, b"a.example:", b"/", b"https://a.example/"),
    (443, b"a.example", b"/?", b"https://a.example/?"),
    (443, b"a.example", b"/a%20b/%C3%A4", b"https://a.example/a%20b/%C3%A4"),
    (443, b"a.example", b"/%0d%0aX:%20y", b"https://a.example/%0D%0AX:%20y"),
    (443, b"a.example", b"/@a%2Fb/%C3%A4?\xe4", b"https://a.example/@a/b/%C3%A4?%E4"),
    (443, b"a.example", b"/\xc3\xa4", b"https://a.example/%C3%A4"),
    (443, b"a.example", b"/%2fb.example/", b"https://a.example//b.example/"),
    (443, b"[v1.x]:80", b"/", b"https://[v1.x]/"),
    (443, b"a.example", b"//b.example/", b"https://a.example//b.example/"),
    (443, b"a.example", b"http://a.example/x", b"https://a.example/x"),
))
def test_redirects(port, host, target, to):
    reply = ask(Redirector(port), target, host)
    assert reply.status == 301
    assert location(reply) == to
    assert not reply.close


@pytest.mark.parametrize("method", (b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS"))
def test_every_method_is_redirected(method):
    """Whatever becomes of the method (RFC 9110 section 15.4.2): only GET and HEAD get anything there."""
    assert ask(Redirector(443), b"/x", method=method).status == 301


@pytest.mark.parametrize(("target", "host", "version", "status"), (
    (b"/", None, b"1.0", 400), (b"/", b"", b"1.1", 400), (b"*", b"a.example", b"1.1", 404)))
def test_nowhere_to_go(target, host, version, status):
    reply = ask(Redirector(443), target, host, method=b"OPTIONS" if target == b"*" else b"GET", version=version)
    assert reply.status == status
    assert location(reply) is None


def test_a_link_for_those_who_read_it():
    reply = ask(Redirector(443), b'/a%22%3E?b="><script>&c')
    assert dict(reply.fields)[b"Content-Type"] == b"text/html; charset=utf-8"
    assert dict(reply.fields)[b"Cache-Control"] == b"no-cache"
    link = "https://a.example/a%22%3E?b=&quot;&gt;&lt;script&gt;&amp;c"
    assert f'<a href="{link}">{link}</a>'.encode() in reply.body[0]


@pytest.mark.parametrize("method", (b"GET", b"HEAD", b"OPTIONS"))
def test_who_names_no_host_is_sent_to_the_one_that_is_meant(method):
    """In HTTP/1.0, as HAProxy's and Nagios' health checks do. In HTTP/1.1 a Host has to be there."""
    redirector = Redirector(8443, name=b"first.example")
    reply = ask(redirector, b"/a?b", None, method, version=b"1.0")
    assert (reply.status, location(reply)) == (301, b"https://first.example:8443/a?b")
    assert location(ask(redirector, b"/", b"b.example", method, version=b"1.0")) == b"https://b.example:8443/"
    assert ask(redirector, b"/", b"", method).status == 400


def test_the_connection_is_kept_or_not():
    assert ask(Redirector(443), b"/", fields=b"Connection: close\r\n").close
    assert not ask(Redirector(443), b"/").close


# --- challenges

TOKEN = b"evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr_oA"     # RFC 8555's own
ANSWER = TOKEN + b".9jg46WB3rR_AHD-EBXdN7cBkH1WOu0tA3M9fm21mqTI"


@pytest.fixture(params=("as certbot does", "in the directory itself"))
def folder(request, tmp_path):
    """The descriptor of a directory with the answer to a challenge, and the place where that is."""
    place = tmp_path / CHALLENGES.decode().strip("/") if request.param == "as certbot does" else tmp_path
    place.mkdir(parents=True, exist_ok=True)
    (place / TOKEN.decode()).write_bytes(ANSWER)
    directory = os.open(tmp_path, os.O_PATH)
    yield directory, place
    os.close(directory)


def answering(folder):
    """A Redirector that answers challenges with the files in `folder`."""
    return Redirector(443, partial(read_acme_challenge, folder[0]))


def test_challenge(folder):
    redirector = answering(folder)
    reply = ask(redirector, CHALLENGES + TOKEN)
    assert reply.status == 200
    assert reply.body == (ANSWER,)
    assert b"Content-Length: %d\r\n" % len(ANSWER) in header_section(reply)
    head = ask(redirector, CHALLENGES + TOKEN, method=b"HEAD")
    assert (head.status, head.fields, head.body) == (200, reply.fields, ())
    assert ask(redirector, CHALLENGES + TOKEN, fields=b"Connection: close\r\n").close


def test_what_reads_challenges_is_given():
    """With the token alone, each time, and for nothing else."""
    asked = []
    redirector = Redirector(443, lambda token: asked.append(token) or {b"x": b"content"}.get(token))
    assert ask(redirector, CHALLENGES + b"x").body == (b"content",)
    assert ask(redirector, CHALLENGES + b"y").status == 404
    assert ask(redirector, CHALLENGES + b"x", method=b"HEAD").status == 200
    assert ask(redirector, b"/x").status == ask(redirector, CHALLENGES[:-1]).status == 301
    assert asked == [b"x", b"y", b"x"]


def test_nothing_that_needs_an_archive():
    names = {name for name in dir(Redirector(443)) if not name.startswith("_")}
    assert names == {"challenge", "name", "port", "read_challenge", "reply"}


def test_a_challenge_that_may_not_be_read(folder, monkeypatch, caplog):
    """As when an ACME client writes it with umask 077: said once, and nothing is said of one that is not there."""
    def refuse(*_, **__):
        raise PermissionError

    tell_of_permissions.cache_clear()
    redirector = answering(folder)
    assert ask(redirector, CHALLENGES + b"missing").status == 404 and not caplog.records
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for token in (TOKEN, TOKEN, b"other"):
            assert ask(redirector, CHALLENGES + token).status == 404
    assert ask(redirector, CHALLENGES + TOKEN).body == (ANSWER,)
    [record] = caplog.records
    assert "the workers' user may not read" in record.message


def test_challenge_without_a_host(folder):
    """Who asks for one need not say where."""
    assert ask(answering(folder), CHALLENGES + b"x", host=None, version=b"1.0").status == 404


def test_challenges_come_and_go(folder):
    redirector, path = answering(folder), folder[1] / TOKEN.decode()
    path.unlink()
    assert ask(redirector, CHALLENGES + TOKEN).status == 404
    path.write_bytes(b"another")
    assert ask(redirector, CHALLENGES + TOKEN).body == (b"another",)


@pytest.mark.parametrize("method", (b"POST", b"OPTIONS", b"DELETE"))
def test_challenges_are_read_only(folder, method):
    reply = ask(answering(folder), CHALLENGES + TOKEN, method=method)
    assert reply.status == 405
    assert b"Allow: GET, HEAD\r\n" in header_section(reply)


@pytest.mark.parametrize("token", (
    b"", b"x", b".", b"...", b"x/../y", b"x%2f..%2fy", b"%2f" + TOKEN, TOKEN + b"/", TOKEN + b".", TOKEN + b"/x", b"~",
    b"%20", TOKEN + b"%0a", b"a" * 256, b"a" * 1000, b"%ff"))
def test_no_such_challenge(folder, token):
    """Never a redirect, and nothing but tokens is looked for."""
    reply = ask(answering(folder), CHALLENGES + token)
    assert (reply.status, location(reply)) == (404, None)


@pytest.mark.parametrize("out", (b"../", b"..%2f", b"%2e%2E%2F"))
def test_what_leads_out_of_the_challenges_is_another_path(folder, out):
    reply = ask(Redirector(443, folder[0]), CHALLENGES + out + TOKEN)
    assert (reply.status, location(reply)) == (301, b"https://a.example/.well-known/" + TOKEN)


@pytest.mark.parametrize("kind", ("link", "directory", "fifo", "large"))
def test_what_is_no_challenge(folder, kind):
    path = folder[1] / "special"
    if kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)             # opening one for reading would wait for a writer
    elif kind == "large":
        path.write_bytes(bytes(LARGEST_CHALLENGE + 1))
    assert ask(answering(folder), CHALLENGES + b"special").status == 404


@pytest.mark.parametrize("name", (".hidden", "a.html", "a b", "below/token", "\u00e4"))
def test_what_else_is_in_the_directory_stays_there(folder, name):
    path = folder[1] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"not for everybody")
    assert ask(answering(folder), CHALLENGES + quote(name).encode()).status == 404


@pytest.mark.parametrize("size", (0, 1, LARGEST_CHALLENGE))
def test_sizes(folder, size):
    (folder[1] / "sized").write_bytes(b"x" * size)
    assert ask(answering(folder), CHALLENGES + b"sized").body == (b"x" * size,)


def test_without_a_directory_challenges_are_redirected():
    assert location(ask(Redirector(443), CHALLENGES + TOKEN)) == b"https://a.example" + CHALLENGES + TOKEN


def test_no_descriptor_is_left_open(folder):
    redirector, before = answering(folder), len(os.listdir("/proc/self/fd"))
    for token in (TOKEN, b"no", b"x"):
        ask(redirector, CHALLENGES + token)
    assert len(os.listdir("/proc/self/fd")) == before
