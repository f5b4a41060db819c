"""Media types by name, whatever the host and the version of Python; and which text may be called UTF-8."""

import mimetypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import media
from media import PRESCAN, Utf8, declared, media_type

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
    # Clients act upon these, and Python's own table lacks them or has another type, depending on its version.
    ("a.3gp", "video/3gpp"),
    ("a.3g2", "video/3gpp2"),
    ("a.apng", "image/apng"),
    ("a.ass", "text/x-ssa; charset=utf-8"),
    ("a.crt", "application/x-x509-ca-cert"),
    ("a.docx", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
    ("a.geojson", "application/geo+json"),
    ("a.glb", "model/gltf-binary"),
    ("a.gltf", "model/gltf+json"),
    ("a.heic", "image/heic"),
    ("a.jfif", "image/jpeg"),
    ("a.jnlp", "application/x-java-jnlp-file"),
    ("a.jsonld", "application/ld+json"),
    ("a.kml", "application/vnd.google-earth.kml+xml; charset=utf-8"),
    ("a.m3u8", "application/vnd.apple.mpegurl"),
    ("a.m4s", "video/iso.segment"),
    ("a.mid", "audio/midi"),
    ("a.mobileconfig", "application/x-apple-aspen-config"),
    ("a.mpd", "application/dash+xml; charset=utf-8"),
    ("a.odp", "application/vnd.oasis.opendocument.presentation"),
    ("a.ods", "application/vnd.oasis.opendocument.spreadsheet"),
    ("a.odt", "application/vnd.oasis.opendocument.text"),
    ("a.pac", "application/x-ns-proxy-autoconfig"),
    ("a.pkpass", "application/vnd.apple.pkpass"),
    ("a.pmtiles", "application/vnd.pmtiles"),
    ("a.pptx", "application/vnd.openxmlformats-officedocument.presentationml.presentation"),
    ("a.rdf", "application/rdf+xml; charset=utf-8"),
    ("a.rpm", "application/x-rpm"),
    ("a.rst", "text/x-rst; charset=utf-8"),
    ("a.ts", "video/mp2t"),
    ("a.usdz", "model/vnd.usdz+zip"),
    ("a.wmv", "video/x-ms-wmv"),
    ("a.xlsx", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
    ("a.xpi", "application/x-xpinstall"),
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


def test_no_file_of_the_host_is_read_and_python_s_table_is_not_asked():
    """An audit hook sees every open() while the module is imported and used."""
    program = (
        "import sys\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None)\n"
        "open('/dev/null').close()\n"
        "import media; media.media_type(b'a.html')\n"
        "print(*seen, *sys.modules)\n"
    )
    opened = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    assert "/dev/null" in opened            # the hook does see
    assert "mime" not in opened


def table():
    """extension -> type, as the table has it."""
    lines = [line.split() for line in media.TYPES.strip().split("\n")]
    return {extension: value for value, *extensions in lines for extension in extensions}


def test_each_type_has_its_place_and_each_extension_one_type():
    lines = [line.split() for line in media.TYPES.strip().split("\n")]
    assert lines == sorted(lines)
    assert sum(len(extensions) for _, *extensions in lines) == len(table())
    for value, *extensions in lines:
        assert re.fullmatch(r"(application|audio|font|image|message|model|text|video)/[a-z0-9.+-]+", value)
        assert extensions == sorted(extensions)
        assert all(re.fullmatch("[a-z0-9]+", extension) for extension in extensions)


NO_TYPES = {".nws", ".src"}         # of Usenet news and of WAIS


def test_what_python_s_own_table_knows_is_known():
    known = {extension for extension, value in mimetypes.MimeTypes().types_map[True].items()
             if value != "application/octet-stream"}
    assert known - {f".{extension}" for extension in table()} <= NO_TYPES


# nginx's type where ours is another one: that of a later RFC or of IANA, or a plainer one.
NOT_AS_NGINX = {"bmp", "deb", "dmg", "iso", "js", "m4a", "m4v", "mml", "msi", "pdb", "pl", "pm", "prc", "ra", "rar",
                "rpm", "svgz", "xml"}


def test_types_are_those_of_nginx():
    path = Path("/etc/nginx/mime.types")
    if not path.exists():
        pytest.skip("nginx is not installed")
    entries = re.findall(r"^ +([a-z-]+/\S+) +([^;]+);", path.read_text(), re.M)
    theirs = {extension: value for value, extensions in entries for extension in extensions.split()}
    assert len(theirs) > 90
    ours = table()
    assert {extension for extension, value in theirs.items()
            if ours.get(extension, "application/octet-stream") != value} == NOT_AS_NGINX


# --- charset

HTML, XML, CSS = b"text/html", b"application/xml", b"text/css"
DECLARED = [
    (HTML, b"<!doctype html><p>", b""),
    (HTML, b"<meta charset=windows-1251>", b"windows-1251"),
    (HTML, b"<META\nCharSet = 'Shift_JIS' >", b"shift_jis"),
    (HTML, b'<meta charset=" UTF-8 "/>', b"utf-8"),
    (HTML, b"<meta/charset=koi8-r/>", b"koi8-r/"),
    (HTML, b'<meta name="a>b" charset="big5">', b"big5"),
    (HTML, b'<meta http-equiv="Content-Type" content="text/html; charset=EUC-KR">', b"euc-kr"),
    (HTML, b"<meta content='text/html;charset = \"gbk\" ;' http-equiv=content-type>", b"gbk"),
    (HTML, b'<meta http-equiv=content-type content=text/html>', b""),
    (HTML, b'<meta name=description content="charset=latin1">', b""),
    (HTML, b'<meta name=viewport content="width=1"><meta charset=latin1>', b"latin1"),
    (HTML, b"<!-- <meta charset=latin1> --><meta charset=utf-8>", b"utf-8"),
    (HTML, b"<!-- <meta charset=latin1>", b""),
    (HTML, b"<meta a='<meta charset=latin1>'><meta charset=utf-8>", b"utf-8"),
    (HTML, b"<metadata charset=latin1>", b""),
    (HTML, b"<meta charset=>", b""),
    (HTML, b"<meta ===\"'charset=x", b""),
    (HTML, b'<?xml version="1.0" encoding="ISO-8859-2"?><html>', b"iso-8859-2"),
    (HTML, b'<?xml version="1.0" encoding="ISO-8859-2"?><meta charset=utf-8>', b"utf-8"),
    (HTML, b"\xef\xbb\xbf<meta charset=latin1>", b"utf-8"),
    (XML, b'<?xml version="1.0" encoding="windows-1252" standalone="yes"?>', b"windows-1252"),
    (XML, b"<?xml version='1.0' encoding='UTF-8'?>", b"utf-8"),
    (XML, b"<?xml version='1.0'?><a encoding='latin1'/>", b""),
    (XML, b" <?xml version='1.0' encoding='latin1'?>", b""),
    (XML, b"<meta charset=latin1>", b""),
    (b"image/svg+xml", b'<?xml version="1.0"\n  encoding = "koi8-r" ?>', b"koi8-r"),
    (b"application/xhtml+xml", b"<meta charset=latin1>", b""),
    (CSS, b'@charset "iso-8859-15";', b"iso-8859-15"),
    (CSS, b"@charset 'latin1';", b""),
    (CSS, b'p{} @charset "latin1";', b""),
    (CSS, b'@charset "latin1', b""),
    (b"text/plain", b"<meta charset=latin1>", b""),
    (b"text/plain", b"", b""),
]


@pytest.mark.parametrize(("value", "head", "label"), DECLARED)
def test_what_a_document_declares(value, head, label):
    assert declared(value, head) == label


NOT_UTF8 = [
    (HTML, b"<meta charset=windows-1251><script src=old.js></script>"),
    (HTML, b"<!doctype html><meta charset=iso-2022-jp>" + "\u65e5\u672c".encode("iso-2022-jp")),
    (XML, b"<?xml version='1.0' encoding='us-ascii'?><a/>"),
    (XML, "<?xml version='1.0' encoding='UTF-16LE'?><a/>".encode("utf-16-le")),
    (XML, "<?xml version='1.0' encoding='UTF-16BE'?><a/>".encode("utf-16-be")),
    (CSS, b'@charset "windows-1252"; p::after { content: "x" }'),
    (b"text/plain", "plain".encode("utf-16")),
    (b"text/plain", "plain".encode("utf-32-be")),
    (b"text/plain", "\u65e5\u672c\n".encode("iso-2022-jp")),
    (b"text/plain", b"\x1b(I6E\x1b(B\n"),
    (b"text/plain", "\ud55c\uad6d\n".encode("iso-2022-kr")),
    (b"text/plain", "\u00e9".encode("latin-1")),
    (b"text/plain", b"\xe2\x82"),
]
UTF8 = [
    (HTML, b""),
    (HTML, b"<meta charset=utf8>" + "\u20ac".encode()),
    (HTML, b'<meta http-equiv=content-type content="text/html; charset=UTF-8">'),
    (HTML, b" " * PRESCAN + b"<meta charset=latin1>"),
    (HTML, b"\xef\xbb\xbf<meta charset=latin1>"),
    (XML, b"<?xml version='1.0' encoding='UTF-8'?><a/>"),
    (CSS, b'@charset "utf-8";'),
    (b"text/plain", b"\x1b[1;31mred\x1b(B\x1b[m"),             # colours of a terminal
    (b"text/javascript", "var euro = '\u20ac'".encode()),
]


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
@pytest.mark.parametrize(("value", "data", "expected"), [*((*case, False) for case in NOT_UTF8),
                                                         *((*case, True) for case in UTF8)])
def test_which_text_may_be_called_utf8(value, data, expected, size):
    """However it is cut, but for the beginning, which is read at once."""
    utf8 = Utf8(value)
    for start, end in [(0, PRESCAN), *((at, at + size) for at in range(PRESCAN, len(data), size))]:
        utf8.feed(data[start:end])
    assert utf8.finish() == expected


def test_all_of_it_counts():
    head = b"<p>" + b"a" * (1 << 20)
    for tail, expected in ((b"", True), ("\u20ac".encode(), True), (b"\xe2\x82", False), (b"\0", False),
                           ("\u65e5".encode("iso-2022-jp"), False)):
        utf8 = Utf8(HTML)
        for chunk in (head, b"\xc2", b"\xb5", head, tail):
            utf8.feed(chunk)
        assert utf8.finish() == expected, tail
