"""Media types by name: the table, charsets, odd names, and independence from the host's files."""

import mimetypes
import subprocess
import sys
from pathlib import Path

import pytest

from media import _built_in, media_type

TYPES = [
    ("index.html", "text/html; charset=utf-8"),
    ("index.htm", "text/html; charset=utf-8"),
    ("a.css", "text/css; charset=utf-8"),
    ("a.js", "text/javascript; charset=utf-8"),
    ("a.mjs", "text/javascript; charset=utf-8"),
    ("a.js.map", "application/json"),
    ("a.json", "application/json"),
    ("a.wasm", "application/wasm"),
    ("a.avif", "image/avif"),
    ("a.webp", "image/webp"),
    ("a.jxl", "image/jxl"),
    ("a.png", "image/png"),
    ("a.jpg", "image/jpeg"),
    ("a.gif", "image/gif"),
    ("favicon.ico", "image/x-icon"),
    ("a.svg", "image/svg+xml; charset=utf-8"),
    ("a.svgz", "application/gzip"),
    ("a.xml", "application/xml; charset=utf-8"),
    ("a.xhtml", "application/xhtml+xml; charset=utf-8"),
    ("a.atom", "application/atom+xml; charset=utf-8"),
    ("a.rss", "application/rss+xml; charset=utf-8"),
    ("a.woff", "font/woff"),
    ("a.woff2", "font/woff2"),
    ("a.ttf", "font/ttf"),
    ("a.otf", "font/otf"),
    ("a.webmanifest", "application/manifest+json"),
    ("a.txt", "text/plain; charset=utf-8"),
    ("a.md", "text/markdown; charset=utf-8"),
    ("a.csv", "text/csv; charset=utf-8"),
    ("a.ics", "text/calendar; charset=utf-8"),
    ("a.vtt", "text/vtt; charset=utf-8"),
    ("a.py", "text/x-python; charset=utf-8"),
    ("a.sh", "text/x-shellscript; charset=utf-8"),
    ("a.webm", "video/webm"),
    ("a.mp4", "video/mp4"),
    ("a.m4a", "audio/mp4"),
    ("a.mp3", "audio/mpeg"),
    ("a.opus", "audio/ogg"),
    ("a.flac", "audio/flac"),
    ("a.pdf", "application/pdf"),
    ("a.epub", "application/epub+zip"),
    ("a.apk", "application/vnd.android.package-archive"),
    ("a.zip", "application/zip"),
    ("a.7z", "application/x-7z-compressed"),
    ("a.tar", "application/x-tar"),
    ("a.gz", "application/gzip"),
    ("a.tar.gz", "application/gzip"),
    ("a.tgz", "application/gzip"),
    ("a.html.br", "application/x-brotli"),
    ("a.zst", "application/zstd"),
    ("a.toml", "application/toml"),
    ("a.yaml", "application/yaml"),
    ("a.yml", "application/yaml"),
]


@pytest.mark.parametrize(("name", "expected"), TYPES)
def test_type_and_charset(name, expected):
    found = media_type(name.encode())
    assert found.utf8 == expected.encode()
    assert found.value == expected.partition(";")[0].encode()
    assert found.is_text == ("charset" in expected)


@pytest.mark.parametrize(("name", "like"), [
    (b"INDEX.HTML", b"index.html"),
    (b"Photo.JpEg", b"a.jpg"),
    (b"/docs/v1.2/page.html", b"a.html"),
    (b"/.well-known/security.txt", b"a.txt"),
    (b".hidden.css", b"a.css"),
    (b"\xff\xfe.css", b"a.css"),
])
def test_extension_is_found(name, like):
    assert media_type(name) == media_type(like)


@pytest.mark.parametrize("name", [
    b"", b"README", b"a.", b"a.unknown", b".gz", b".html", b"..html", b"/.html", b"/site.html/file",
    b"/.well-known/acme-challenge/token", b"a.html/", b"a.\xff", b"html",
])
def test_no_known_extension_is_octet_stream(name):
    assert media_type(name) == (b"application/octet-stream", b"application/octet-stream")


def test_no_file_of_the_host_is_read():
    """An audit hook sees every open() while the module is imported and used."""
    program = (
        "import sys, mimetypes\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None)\n"
        "open('/dev/null').close()\n"
        "import media; media.media_type(b'a.html')\n"
        "print(*seen)\n"
    )
    opened = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent,
                            capture_output=True, text=True, check=True).stdout
    assert "/dev/null" in opened            # the hook does see
    assert "mime.types" not in opened


def test_types_that_were_added_to_the_module_do_not_count(monkeypatch):
    """Whether or not something else has made `mimetypes` read the host's files."""
    before = _built_in().copy()
    mimetypes.init()
    monkeypatch.setitem(mimetypes.types_map, ".html", "text/of-this-host")
    assert _built_in() == before
    assert _built_in()[".html"] == "text/html"
