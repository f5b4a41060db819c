"""Virtual hosts: which archive a request is answered from, and that no byte of another one gets into the answer."""

import os
import random
import re
import signal

import pytest
from support import MTIME, Server, build_tar, prose, run_tarweb, wait_until

HOSTS = ("one.test", "two.test", "*.wild.test", "deep.wild.test", "[::1]", "127.0.0.1")
DEFAULT = "the default"


def pages(name):
    """Files of the same names, sizes and places in the tar for each site; what is in them names the site."""
    def page(what, size=400):
        return (f"<!doctype html><title>{what} of {name.ljust(20, '.')}</title>".encode() + prose(size))[:size]
    return {"index.html": page("home"), "same.txt": page("the same", 5000), "404.html": page("no such page"),
            "dir/index.html": page("dir"), f"only/{name.strip('*[].')}.txt": b"here and nowhere else"}


SITES = {name: pages(name) for name in (*HOSTS, DEFAULT)}


def ask(target="/", host=None, method="GET", version="1.1", **headers):
    """The bytes of a request to `host` (None: no Host field)."""
    lines = [f"{method} {target} HTTP/{version}", *([] if host is None else [f"Host: {host}"])]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answer(server, *arguments, method="GET", **options):
    with server.connect() as client:
        client.send(ask(*arguments, method=method, **options))
        return client.response(method)


def site_of(response):
    """The name of the site that a page is of."""
    return re.search(rb" of (.{20})</title>", response.body)[1].decode().rstrip(".")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """name -> tar. Nothing but what is in their files tells them apart."""
    folder = tmp_path_factory.mktemp("hosts")
    built = {name: build_tar(folder / f"{number}.tar", files) for number, (name, files) in enumerate(SITES.items())}
    for path in built.values():
        os.utime(path, (MTIME, MTIME))
    return built


@pytest.fixture(scope="module")
def flags(tars):
    return [word for host in HOSTS for word in ("--site", f"{host}={tars[host]}")]


@pytest.fixture(scope="module")
def shared(tars, flags, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    both = [Server(tars[DEFAULT], *flags, log=logs / "default"), Server(flags[-1], *flags[:-1], log=logs / "none")]
    yield both
    for server in both:
        server.stop()


@pytest.fixture
def server(shared):
    """All sites, and a default."""
    yield shared[0]
    shared[0].check()


@pytest.fixture
def strict(shared):
    """All sites, and no default."""
    yield shared[1]
    shared[1].check()


# --- which site ----------------------------------------------------------------------------------------------------


KNOWN = {  # Host field: the site that it names
    "one.test": "one.test", "two.test": "two.test",
    "one.test:80": "one.test", "one.test:": "one.test", "one.test:65535": "one.test",
    "ONE.test": "one.test", "One.Test:8080": "one.test",
    "one.test.": "one.test", "ONE.TEST.:8080": "one.test",
    "a.wild.test": "*.wild.test", "A.Wild.Test.:1": "*.wild.test", "a-b_c.wild.test": "*.wild.test",
    "xn--bcher-kva.wild.test": "*.wild.test", "*.wild.test": "*.wild.test",
    "deep.wild.test": "deep.wild.test", "DEEP.wild.test:80": "deep.wild.test",
    "[::1]": "[::1]", "[::1]:8080": "[::1]", "127.0.0.1": "127.0.0.1", "127.0.0.1:80": "127.0.0.1",
}
UNKNOWN = ["", "three.test", "wild.test", "a.b.wild.test", "one.test.two.test", "xone.test", "one.tes", "test", ".",
           ".test", ".wild.test", "one.test..", "[::2]", "127.0.0.2", "[::1", "wild.test.", "one%2etest",
           "one.test:80.", ":80"]


@pytest.mark.parametrize("host", KNOWN)
def test_the_host_decides(server, strict, host):
    for one in (server, strict):
        assert site_of(answer(one, "/", host)) == KNOWN[host]
        assert answer(one, "/same.txt", host).body == SITES[KNOWN[host]]["same.txt"]


@pytest.mark.parametrize("host", UNKNOWN, ids=repr)
def test_an_unknown_host(server, strict, host):
    """The default; where there is none 421 (RFC 9110 section 15.5.20). What is no host at all may be refused."""
    lenient, refusal = answer(server, "/", host), answer(strict, "/", host)
    if lenient.status == 400:
        assert refusal.status == 400
        return
    assert site_of(lenient) == DEFAULT
    assert (refusal.status, refusal.get("ETag")) == (421, None)


def test_a_host_that_breaks_the_grammar_is_refused(server):
    for host in ("one.test/", "one test", "user@one.test", "one.test\\", 'one"test', "one.test?x", "one.test:80x"):
        assert answer(server, "/", host).status == 400, host


def test_no_host_field(server, strict):
    """HTTP/1.1 insists on one (RFC 9112 section 3.2); an HTTP/1.0 request is for whoever answers unnamed hosts."""
    assert answer(server, "/").status == answer(strict, "/").status == 400
    for fields in ({}, {"Connection": "keep-alive"}):
        assert site_of(answer(server, "/", version="1.0", **fields)) == DEFAULT
        assert answer(strict, "/", version="1.0", **fields).status == 421
    for one in (server, strict):
        assert site_of(answer(one, "/", "two.test", version="1.0")) == "two.test"


def test_the_target_wins_over_the_field(server, strict):
    """RFC 9112 section 3.2.2: of an absolute-form target the field is ignored."""
    for one in (server, strict):
        for target in ("http://one.test/", "http://ONE.test:80/", "HTTP://one.test", "https://one.test./"):
            for host in ("two.test", "three.test", "a.wild.test", ""):
                assert site_of(answer(one, target, host)) == "one.test", (target, host)
            assert site_of(answer(one, target, version="1.0")) == "one.test"
    assert answer(strict, "http://three.test/", "one.test").status == 421
    assert site_of(answer(server, "http://three.test/", "one.test")) == DEFAULT
    assert answer(server, "http:///", "one.test").status == 400


def test_421_is_an_answer_like_others(strict):
    """HEAD without content, the connection kept, also after a body; and OPTIONS * asks a host too."""
    with strict.connect() as client:
        client.send(ask("/", "three.test", "HEAD"), ask("/", "one.test"))
        refusal = client.response("HEAD")
        assert (refusal.status, refusal.body, refusal.closes) == (421, b"", False)
        assert site_of(client.response()) == "one.test"
        client.send(ask("/", "three.test", "POST", **{"Content-Length": 5}), b"12345", ask("/", "two.test"))
        assert client.response("POST").status == 421
        assert site_of(client.response()) == "two.test"
        client.send(ask("*", "three.test", "OPTIONS"))
        assert client.response("OPTIONS").status == 421
    assert answer(strict, "/same.txt", "three.test", **{"If-None-Match": "*"}).status == 421
    assert answer(strict, "/same.txt", "three.test", Range="bytes=0-9").status == 421


def test_options(server, strict):
    for one in (server, strict):
        for host in ("one.test", "a.wild.test"):
            for target in ("*", "/", "/same.txt", f"http://{host}"):
                answered = answer(one, target, host, method="OPTIONS")
                assert (answered.status, answered["Allow"]) == (204, "GET, HEAD, OPTIONS")
            assert answer(one, "/no-such", host, method="OPTIONS").status == 404


# --- what of it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "name"), [("one.test", "one.test"), ("a.wild.test", "*.wild.test"),
                                            ("[::1]:80", "[::1]"), ("three.test", DEFAULT)])
def test_each_site_is_its_own(server, host, name):
    """Its own pages, also those for what is missing; a directory leads to itself; what others have, it lacks."""
    missing = answer(server, "/no-such", host)
    assert (missing.status, site_of(missing)) == (404, name)
    assert missing.body == SITES[name]["404.html"]
    directory = answer(server, "/dir?a=b", host)
    assert (directory.status, directory["Location"]) == (301, "./dir/?a=b")
    assert site_of(answer(server, "/dir/", host)) == name
    for other in SITES:
        there = answer(server, f"/only/{other.strip('*[].').replace(' ', '%20')}.txt", host)
        assert there.status == (200 if other == name else 404)


def test_a_site_with_no_page_for_what_is_missing(start, tars, tmp_path):
    """It does not borrow that of another one."""
    bare = build_tar(tmp_path / "bare.tar", {"index.html": b"bare"})
    server = start(tars[DEFAULT], "--site", f"bare.test={bare}")
    assert answer(server, "/no-such", "bare.test").body == b"404 Not Found\n"
    assert answer(server, "/no-such", "three.test").body == SITES[DEFAULT]["404.html"]


def test_one_archive_for_several_hosts(start, tars):
    one = tars["one.test"]
    server = start(f"*.c.test={one}", "--site", f"a.test={one}", "--site", f"b.test={one}", "--site")
    for host in ("a.test", "b.test", "x.c.test"):
        assert site_of(answer(server, "/", host)) == "one.test"
    assert answer(server, "/", "c.test").status == 421
    assert server.stderr() == ""


# --- nothing mixes -------------------------------------------------------------------------------------------------


VARIED = {"one.test": "one.test", "two.test": "two.test", "x.wild.test": "*.wild.test", "y.wild.test": "*.wild.test",
          "deep.wild.test": "deep.wild.test", "three.test": DEFAULT}
TARGETS = {"/": "index.html", "/same.txt": "same.txt", "/dir/": "dir/index.html", "/no-such": "404.html"}


@pytest.mark.parametrize("more", [(), ("--etags", "off"), ("--keep", "2"), ("--hugepages", "0", "--preload")],
                         ids=lambda more: " ".join(more) or "default")
def test_archives_that_look_alike_never_mix(start, tars, flags, more):
    """All is asked so often that it is remembered, in any order, on one connection after another's response; by Host
    and by absolute target."""
    server = start(tars[DEFAULT], *flags, *more)
    choose = random.Random(5)
    asked = [(host, target, how) for host in VARIED for target in TARGETS for how in ("field", "target")] * 4
    choose.shuffle(asked)
    with server.connect() as client:
        for i in range(0, len(asked), 8):
            some = asked[i:i + 8]
            client.send(b"".join(ask(target, host) if how == "field" else ask(f"http://{host}{target}", "one.test")
                                 for host, target, how in some))
            for host, target, how in some:
                assert client.response().body == SITES[VARIED[host]][TARGETS[target]], (host, target, how)


def test_validators_are_of_a_site(server):
    """An entity tag of one site's page is no other's, though size and date are equal; ranges are of the site's own."""
    one, two = (answer(server, "/same.txt", host) for host in ("one.test", "two.test"))
    assert one["Last-Modified"] == two["Last-Modified"]
    assert one["ETag"] != two["ETag"]
    for _ in range(4):
        assert answer(server, "/same.txt", "one.test", **{"If-None-Match": one["ETag"]}).status == 304
        assert answer(server, "/same.txt", "two.test", **{"If-None-Match": one["ETag"]}).body == two.body
        assert answer(server, "/same.txt", "one.test", Range="bytes=10-99").body == one.body[10:100]
        assert answer(server, "/same.txt", "two.test", Range="bytes=10-99").body == two.body[10:100]
        again = answer(server, "/same.txt", "two.test", Range="bytes=10-99", **{"If-Range": one["ETag"]})
        assert (again.status, again.body) == (200, two.body)


def test_one_site_is_deployed_and_the_others_stay(start, tars, tmp_path):
    """The new archive has the size and the dates of the one before; on a connection that stays, too."""
    moving = tmp_path / "moving.tar"
    build_tar(moving, SITES["one.test"])
    server = start(tars[DEFAULT], "--site", f"one.test={moving}", "--site", f"two.test={tars['two.test']}")
    hosts = {"one.test": "one.test", "two.test": "two.test", "three.test": DEFAULT}
    for generation, there in enumerate(("one.test", "deep.wild.test", "[::1]", "one.test"), 1):
        if generation > 1:
            os.replace(build_tar(tmp_path / "new.tar", SITES[there]), moving)
            os.utime(moving, (MTIME, MTIME))
            server.signal(signal.SIGHUP)
            server.signalled = False
            wait_until(lambda number=generation: f"generation {number} serves" in server.stderr())
        with server.connect() as client:
            for host in list(hosts) * 4:
                client.send(ask("/same.txt", host))
                assert client.response().body == SITES[there if host == "one.test" else hosts[host]]["same.txt"]


def test_a_bad_archive_of_one_site_changes_nothing(start, tars, tmp_path):
    moving = tmp_path / "moving.tar"
    build_tar(moving, SITES["one.test"])
    server = start(tars[DEFAULT], "--site", f"one.test={moving}")
    (tmp_path / "bad").write_bytes(b"not a tar at all" * 100)
    os.replace(tmp_path / "bad", moving)
    server.signal(signal.SIGHUP)
    server.signalled = False
    wait_until(lambda: "reload failed, generation 1 still serves" in server.stderr())
    assert str(moving) in server.stderr()
    for host, name in (("one.test", "one.test"), ("three.test", DEFAULT)):
        assert site_of(answer(server, "/", host)) == name


# --- TLS -----------------------------------------------------------------------------------------------------------


def test_a_certificate_for_one_host_and_a_request_for_another(start_tls, authority, tars, flags):
    """SNI chooses the certificate, Host the site: whoever is responsible for a host is so on each connection
    (RFC 9110 section 7.4)."""
    pairs = [authority.issue("p256", ("one.test",)), authority.issue("rsa", ("*.wild.test",))]
    server = start_tls(flags[-1], *flags[:-1], pairs=pairs)
    for name, pair in (("one.test", pairs[0]), ("x.wild.test", pairs[1])):
        with server.connect(name=name) as client:
            assert client.tls.getpeercert(binary_form=True) == pair.der
            for host, site in VARIED.items():
                for _ in range(4):
                    client.send(ask("/", host))
                    response = client.response()
                    if site == DEFAULT:
                        assert response.status == 421
                    else:
                        assert site_of(response) == site


def test_the_redirect_to_https_keeps_the_host(start_tls, tars):
    server = start_tls(tars[DEFAULT], "--site", f"one.test={tars['one.test']}", "--redirect-http", "127.0.0.1:0")
    with server.connect_raw(server.redirect_port) as client:
        for host in ("one.test", "three.test:80"):
            client.send(ask("/same.txt?x", host))
            assert client.response()["Location"] == f"https://{host.partition(':')[0]}:{server.port}/same.txt?x"


# --- the command line ----------------------------------------------------------------------------------------------


WRONG = [  # (arguments, what the sentence names); TAR is an archive
    ([], "SITE.tar"),
    (["--site"], "--site"),
    (["--site", "one.test"], "one.test"),
    (["--site", "one.test="], "one.test="),
    (["--site", "=TAR"], "=TAR"),
    (["--site", "one.test=TAR", "--site", "one.test=TAR"], "one.test"),
    (["--site", "one.test=TAR", "--site", "ONE.test.=TAR", "TAR"], "one.test"),
    (["--site", "*.one.test=TAR", "--site", "*.One.Test=TAR"], "*.one.test"),
    (["--site", "*=TAR"], "*=TAR"),
    (["--site", "*one.test=TAR"], "*one.test"),
    (["--site", "a.*.test=TAR"], "a.*.test"),
    (["--site", "one.test:80=TAR"], "one.test:80"),
    (["--site", "http://one.test=TAR"], "http://one.test"),
    (["--site", "one.test/a=TAR"], "one.test/a"),
    (["--site", "one test=TAR"], "one test"),
    (["--site", "b\u00fccher.test=TAR"], "b\u00fccher.test"),
    (["--site", "::1=TAR"], "::1"),
    (["--site", ".=TAR"], ".=TAR"),
    (["--site", "..=TAR", "TAR"], "..=TAR"),
    (["--site", ".one.test=TAR"], ".one.test"),
    (["--site", "one..test=TAR"], "one..test"),
    (["--site", "one.test=TAR", "--site", "two.test=/no/such.tar"], "/no/such.tar"),
    (["--site", "one.test=TEXT", "TAR"], "TEXT"),
    (["--site", "one.test=TAR", "/no/such.tar"], "/no/such.tar"),
]


@pytest.mark.parametrize(("arguments", "about"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_usage(tars, tmp_path, arguments, about):
    """Status 2, and a sentence that names what is wrong."""
    text = tmp_path / "text"
    text.write_text("no tar" * 1000)
    paths = {"TAR": str(tars["one.test"]), "TEXT": str(text)}

    def filled(words):
        return re.sub("TAR$|TEXT$", lambda name: paths[name[0]], words) if words != "SITE.tar" else words
    ended = run_tarweb("-l", "127.0.0.1:0", *map(filled, arguments), seconds=10)
    assert ended.returncode == 2, ended.stderr
    assert filled(about) in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stdout == ""
