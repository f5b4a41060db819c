"""--check: what is wrong with a site, said by a process that reads all of it and serves nothing."""

import gzip
import json
import re
import subprocess
import tarfile

import brotli
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import FILES, PYTHON, TARWEB, build_tar, run_tarweb
from test_pack import fill

import check

GOOD = {"index.html": b"<!doctype html><title>home</title><a href='about.html'>about</a>", "404.html": b"none",
        "about.html": b"<link rel=stylesheet href=/a/style.css><a href=a/>a</a><a href=./a>a</a>",
        "a/index.html": b"<a href=../about.html?x#y>about</a><a href='/'>home</a><a href='#top'>up</a>",
        "a/style.css": b"@import 'more.css'; a { background: url(/dot.svg) }", "a/more.css": b"", "dot.svg": b"<svg/>"}


def checked(tmp_path, files, *flags, links=(), status=1):
    """What is found in a site: {(kind, file, line): messages}; hints are of kind "hint"."""
    path = build_tar(tmp_path / "site.tar", files, links)
    ended = run_tarweb("--check=json", *flags, path)
    assert ended.returncode == status, ended
    found = {}
    for line in ended.stdout.splitlines():
        one = json.loads(line)
        assert one.keys() == {"archive", "kind", "hint", "file", "line", "message"} and one["archive"] == str(path)
        kind = "hint" if one["hint"] else one["kind"]
        found.setdefault((kind, one["file"], one["line"]), []).append(one["message"])
    return found


LINK = re.compile(r"a link to (['\"])(.*)\1: (?:there is no such file|the answer is 410|a server refuses that: .)")


def dead(tmp_path, page, name="index.html", files=GOOD, *flags):
    """[(line, reference)] of the links in a page that lead nowhere."""
    found = checked(tmp_path, {**files, name: page}, *flags, status=1)
    assert all(kind == "link" and file == name for kind, file, _ in found), found
    return [(line, LINK.match(text)[2]) for (_, _, line), texts in found.items() for text in texts]


def test_a_site_without_faults(tmp_path):
    path = build_tar(tmp_path / "site.tar", GOOD)
    ended = run_tarweb("--check", path)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == f"tarweb: {path}: 7 files checked, nothing found\n"


def test_a_line_for_each_finding(tmp_path):
    bad = {"about.html": b"<p>\n<a\nhref=x>\n\n<img src='y z'>", "b\n.key": b""}
    path = build_tar(tmp_path / "site.tar", GOOD | bad)
    ended = run_tarweb("--check", path)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[:2] == [f"{path}: about.html, line 2: a link to 'x': there is no such file",
                                            f"{path}: about.html, line 5: a link to 'y z': there is no such file"]
    assert ended.stdout.splitlines()[2].startswith(f"{path}: b\\n.key: ")
    assert ended.stderr == f"tarweb: {path}: 8 files checked, 3 findings\n"


def test_where_it_is_written_to(tmp_path):
    """A pipe that nobody reads, a character set that lacks some, and nothing at all."""
    path = build_tar(tmp_path / "site.tar", GOOD | {"about.html": "<a href=caf\u00e9>\n".encode() * 9000})
    command = f"{PYTHON} {TARWEB} --check {path}"
    for line in (f"{command} | head -1; exit ${{PIPESTATUS[0]}}", f"{command} >&-",
                 f"PYTHONIOENCODING=ascii {command}"):
        ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=30)
        assert ended.returncode == 1 and "Traceback" not in ended.stderr and "Error" not in ended.stderr
    assert "'caf\\xe9'" in ended.stdout


def test_a_directory_and_several_sites(tmp_path):
    site = fill(tmp_path / "my-site", {"index.html": b"<a href=gone>", "404.html": b""})
    good = build_tar(tmp_path / "good.tar", GOOD)
    ended = run_tarweb("--site", f"www.example.com={good}", "--check", site)
    assert (ended.returncode, ended.stdout) == (1, f"{site}: index.html, line 1: a link to 'gone': there is no such "
                                                   "file\n")
    assert run_tarweb("--check", "--site", f"*.example.com={good}").returncode == 0


@pytest.mark.parametrize("arguments", [["--check"], ["--check", "nowhere.tar"], ["--check=xml", "{site}"],
                                       ["--check", __file__]])
def test_wrong_usage(tmp_path, arguments):
    site = build_tar(tmp_path / "site.tar", GOOD)
    ended = run_tarweb(*[word.format(site=site) for word in arguments])
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr and ended.stderr


# --- links

@pytest.mark.parametrize(("page", "expected"), [
    (b"<img src=no.png srcset='/dot.svg, a,b.png 2x,, c.png (1,2) 3x, data:x,y 4x,d.png'>",
     ["no.png", "a,b.png", "c.png", "d.png"]),
    (b"<base href=a/><a href=style.css></a><a href=index.html></a><a href=about.html></a>", ["about.html"]),
    (b"<base href=//other.example/><a href=x></a><a href=/y></a>", []),
    (b"<a href=mailto:x><a href=//other/x><a href=https:/x><a href='JAVASCRIPT:x'><a href=''><a name=x>", []),
    (b"<a href='\\a\\x'></a><a href=' ab\nout.html '></a><a href=a%2Findex.html></a>", ["\\\\a\\\\x"]),
    (b"<a href='a/../../../about.html'></a><a href='a/../gone'></a><a href=about.html/></a>",
     ["a/../gone", "about.html/"]),
    (b"<a href=100%></a><a href='/caf\xc3\xa9'></a><a href=&lt;x></a>", ["100%", "/caf\u00e9", "<x"]),
    (b"<meta http-equiv=Refresh content='0; url=gone'><meta http-equiv=refresh content=5><meta content='0;url=x'>",
     ["gone"]),
    (b"<object data=x></object><p data=y><video poster=z></video><svg><use xlink:href='s.svg#a'/></svg>",
     ["x", "z", "s.svg#a"]),
    (b"<script>'<a href=x>'</script><!-- <a href=y> --><![CDATA[ <a href=z>]]><a href=w>", ["w"]),
    (b"<p style='a: url(\"x\")'><style>/* url(a) */ p { content: 'url(b)'; a: URL( 'c d' ), url(e\\66) }</style>",
     ["x", "c d", "ef"]),
])
def test_links_in_pages(tmp_path, page, expected):
    found = checked(tmp_path, GOOD | {"index.html": b"<p>" + page}, status=1 if expected else 0)
    assert [LINK.match(text)[2] for texts in found.values() for text in texts] == expected


def test_the_lines_of_links(tmp_path):
    page = b"<p>\r\n<a href=x>\n<style>\n\n\na { b: url(y);\n /* \n */ c: url(z) }</style>\n<a title='\n' href=w>"
    assert dead(tmp_path, page) == [(2, "x"), (6, "y"), (8, "z"), (9, "w")]


def test_links_in_stylesheets(tmp_path):
    sheet = (b"@charset 'utf-8';\n@import 'x.css';@IMPORT url(y.css) print;\n"
             b"a { b: url(../dot.svg#x) url(data:z) url(i) }")
    assert dead(tmp_path, sheet, "a/style.css") == [(2, "x.css"), (2, "y.css"), (3, "i")]


def test_what_the_server_makes_of_a_link_counts(tmp_path):
    page = b"<a href=about><a href=a><a href=old><a href=kept/x/y><a href=secret><a href=//a><a href=gone>"
    rules = b"/old https://other.example/ 302\n/kept/* /about.html 200\n/secret /404.html 410\n"
    files = {**GOOD, "_redirects": rules}
    assert dead(tmp_path, page, "index.html", files) == [(1, "about"), (1, "secret"), (1, "gone")]
    assert dead(tmp_path, page, "index.html", files, "--clean-urls") == [(1, "secret"), (1, "gone")]
    assert checked(tmp_path, {**files, "index.html": page, "_redirects": b"/* /index.html 200"}, status=0) == {}


def test_a_page_for_which_a_rule_gives_another_type(tmp_path):
    files = {**GOOD, "x.txt": b"<a href=gone>", "_headers": b"/x.txt\n  Content-Type: text/html\n"}
    assert list(checked(tmp_path, files)) == [("charset", "x.txt", None), ("link", "x.txt", 1)]


def test_pages_that_are_not_utf_8(tmp_path):
    files = {**GOOD, "a.html": b"caf\xe9", "b.html": b"<meta charset=iso-8859-1>caf\xe9", "c.html": b"caf\xe9",
             "_headers": b"/c.html\n  Content-Type: text/html; charset=iso-8859-1\n",
             "d.html": "<a href='caf\u00e9'>".encode(), "caf\u00e9": b"", "_redirects": b"/caf%C3%A9x /about.html 301"}
    found = checked(tmp_path, files)
    assert set(found) == {("charset", "a.html", None), ("media-type", None, None)}


# --- rules

def test_rules_that_are_of_no_use(tmp_path):
    files = {**GOOD, "_redirects": b"/x /about.html 999\n/y/* /about.html 302\n/y/z /a/ 301\n/about.html /a/ 301\n"
                                   b"/w /nowhere 301\n/v https://other.example/nowhere 301\n",
             "_headers": b"/*\n  Content-Length: 5\n"}
    found = checked(tmp_path, files)
    assert set(found) == {("rule", "_redirects", 1), ("rule", "_redirects", 3), ("rule", "_redirects", 4),
                          ("link", "_redirects", 5), ("rule", "_headers", 1), ("rule", "_headers", 2)}
    assert "Cloudflare" in found["rule", "_redirects", 4][0]


def test_all_of_them_are_named(tmp_path):
    """Not the first few alone, as when a server starts; and each once."""
    bad = "".join(f"/{i} nowhere\n" for i in range(50)).encode()
    siblings = {f"{i}.css.gz": b"no gzip" for i in range(50)} | {f"{i}.css": b"p {}" for i in range(50)}
    found = checked(tmp_path, {**GOOD, **siblings, "_redirects": bad})
    assert sum(kind == "rule" for kind, _, _ in found) == 50
    assert len(found["sibling", None, None]) == 50 and len(found) == 51


def test_what_cloudflare_pages_does_otherwise_is_a_hint(tmp_path):
    files = {**GOOD, "_redirects": b"/old /about.html\n/b /a/ # 302\n/a/* https://other.example/:splat 302\n"}
    del files["404.html"]
    found = checked(tmp_path, files, status=0)
    assert set(found) == {("hint", "_redirects", 1), ("hint", "_redirects", 3), ("hint", None, None)}
    assert "like 1 other" in found["hint", "_redirects", 1][0] and "302!" in found["hint", "_redirects", 3][0]
    files["_redirects"] = b"/old /about.html 302\n/a/* https://other.example/:splat 302!\n/* /index.html 200\n"
    assert checked(tmp_path, files, status=0) == {}


def test_without_rules_they_are_files(tmp_path):
    files = {**GOOD, "_redirects": b"nonsense"}
    assert set(checked(tmp_path, files)) == {("rule", "_redirects", 1)}
    assert set(checked(tmp_path, files, "--no-site-rules")) == {("media-type", None, None)}


# --- siblings, names, types

def test_siblings_are_unpacked(tmp_path):
    text, other = b"a { b: c } " * 500, b"a { b: d } " * 500
    good = {"x.css": text, "x.css.gz": gzip.compress(text), "x.css.br": brotli.compress(text)}
    assert checked(tmp_path, GOOD | good, status=0) == {}
    forged = gzip.compress(other)[:-8] + gzip.compress(text)[-8:]       # what the server looks at is right
    bad = {"x.css.gz": forged, "x.css.br": brotli.compress(other)}
    found = checked(tmp_path, GOOD | good | bad)
    assert set(found) == {("sibling", "x.css", None)} and len(found["sibling", "x.css", None]) == 2
    cut = {"x.css.br": brotli.compress(text)[:-3], "x.css.gz": gzip.compress(text)}
    assert "br file" in checked(tmp_path, GOOD | good | cut)["sibling", "x.css", None][0]


def test_what_is_not_served(tmp_path):
    found = checked(tmp_path, {**GOOD, ".env": b"x"}, links=[("out", "/etc/passwd", tarfile.SYMTYPE)])
    assert set(found) == {("not-served", None, None)} and len(found["not-served", None, None]) == 2
    assert set(checked(tmp_path, {**GOOD, ".git/config.txt": b"x"}, "--dotfiles")) == {
        ("private", ".git/config.txt", None)}


@pytest.mark.parametrize("name", ["id_rsa", "a/server.KEY", "cert.pem", "dump.sql", "dump.sql.gz", "index.html~",
                                  "about.html.bak", ".env.local", "a/.git/x.txt", "site.kdbx/x.txt"])
def test_private_names(tmp_path, name):
    assert ("private", name, None) in checked(tmp_path, {**GOOD, name: b""}, "--dotfiles")


def test_names_that_are_not_private(tmp_path):
    names = ["monkey.txt", "key.html", "env.html", "sql.css", ".well-known/security.txt", "id_rsa.txt", ".gitx/a.txt"]
    assert checked(tmp_path, GOOD | dict.fromkeys(names, b""), "--dotfiles", status=0) == {}


def test_names_that_are_nearly_the_same(tmp_path):
    names = ["A/x.txt", "A/y.txt", "About.html", "caf\u00e9.txt", "cafe\u0301.txt", "b/x.txt", "c/X.txt"]
    found = checked(tmp_path, GOOD | dict.fromkeys(names, b""))
    assert set(found) == {("name", "A", None), ("name", "About.html", None), ("name", "cafe\u0301.txt", None)}
    assert "Unicode" in found["name", "cafe\u0301.txt", None][0] and "case" in found["name", "A", None][0]


def test_types_that_say_nothing(tmp_path):
    files = {**GOOD, "a.zzz": b"", "b.ZZZ": b"", "LICENSE": b"", "large.bin": b"", "c.yyy": b"", "a.zzz.gz": b"x",
             "_headers": b"/c.yyy\n  Content-Type: text/x-yyy\n"}
    texts = checked(tmp_path, files)["media-type", None, None]
    assert len(texts) == 2
    assert "the ending .zzz" in texts[0] and "'a.zzz', 'b.ZZZ';" in texts[0] and "'LICENSE'" in texts[1]


def test_no_index(tmp_path):
    found = checked(tmp_path, {"my-site/index.html": b"", "404.html": b""})
    assert set(found) == {("index", None, None)}
    assert set(checked(tmp_path, {"x/index.html": b"", "404.html": b"", "_redirects": b"/ /x/ 302"}, status=0)) == set()


def test_any_archive_of_the_tests(tmp_path):
    ended = run_tarweb("--check", build_tar(tmp_path / "site.tar", FILES))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "'random.bin'" not in ended.stdout and "'next'" in ended.stdout


# --- any bytes

HTML = st.lists(st.sampled_from([
    b"<a href=", b"<", b">", b"</", b"'", b'"', b"&#", b"9" * 5000, b"&#xD800;", b"<!", b"<![", b"<!--", b"-->", b"<?",
    b"<style>", b"</style", b"url(", b")", b"@import", b"\\", b"\\d800", b"\\0", b"srcset=", b"(", b",", b"//",
    b"http:", b"[", b"%", b"\0", b"\xff", b"\r\n", b"\n", b" ", b"=", b"base ", b"href",
    b"<meta http-equiv=refresh content=",
    b"<!DOCTYPE", b"]", b"<script>", b"/*"]) | st.binary(max_size=8)).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(HTML, st.booleans())
@example(b"<![foo", True)
@example(b"<a href='&#" + b"1" * 5000 + b";'>", True)
@example(b"url(\\d800)", False)
def test_any_bytes_can_be_looked_at(data, is_html):
    base, found = check.references(data, is_html)
    lines = data.count(b"\n") + 1
    for line, reference in found:
        assert 1 <= line <= lines
        target = check.resolve(reference, check.resolve(base or "", "/a/b") or "/a/b")
        assert target is None or target.startswith("/")
        if target:
            check.quote(target).encode()


@settings(max_examples=5, deadline=None)
@given(st.lists(HTML, min_size=20, max_size=20), st.lists(HTML, min_size=20, max_size=20))
def test_any_bytes_leave_no_traceback(tmp_path_factory, pages, sheets):
    files = {f"{i}.html": page for i, page in enumerate(pages)} | {f"{i}.css": one for i, one in enumerate(sheets)}
    ended = run_tarweb("--check=json", build_tar(tmp_path_factory.mktemp("any") / "site.tar", files))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert all(json.loads(line) for line in ended.stdout.splitlines())
