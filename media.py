"""What bytes are: media types by file name (RFC 9110 section 8.3, RFC 6838); whether text may be called UTF-8; whether
a file is another one in a content coding.

The same name gets the same type on every host and with every Python: the table below is all there is. It was compared
with those of IANA, Apache httpd and nginx. Where they differ, the type that clients act upon is taken.
"""

import codecs
import re
from typing import NamedTuple


class MediaType(NamedTuple):
    """Content-Type values: `value`, and `utf8` for content known to be UTF-8 (the same where no charset is defined)."""
    value: bytes
    utf8: bytes

    @property
    def is_text(self) -> bool:
        """Whether the type has a charset parameter, so that it is worth knowing if the content is UTF-8."""
        return self.value != self.utf8


# A type and its extensions on each line. Compressed files are what they are: a file somebody asks for by this name is
# not to be unpacked on the way; so .svgz, which is an image only with the Content-Encoding that is not sent, is gzip.
# Source code is text/plain, or browsers would save it rather than show it. What is not here is octet-stream.
TYPES = """
application/appinstaller appinstaller
application/appx appx
application/appxbundle appxbundle
application/atom+xml atom
application/cbor cbor
application/dash+xml mpd
application/dicom dcm
application/epub+zip epub
application/geo+json geojson
application/gml+xml gml
application/gpx+xml gpx
application/gzip gz svgz tgz
application/java-archive ear jar war
application/java-vm class
application/json json map topojson
application/json5 json5
application/ld+json jsonld
application/mac-binhex40 hqx
application/manifest+json webmanifest
application/mathml+xml mathml mml
application/mbox mbox
application/metalink+xml metalink
application/metalink4+xml meta4
application/msix msix
application/msixbundle msixbundle
application/msword doc dot wiz
application/mxf mxf
application/n-quads nq
application/n-triples nt
application/oda oda
application/ogg ogx
application/pdf pdf
application/pgp-encrypted pgp
application/pgp-signature asc sig
application/pkcs10 p10
application/pkcs7-mime p7c p7m
application/pkcs7-signature p7s
application/pkix-cert cer
application/pkix-crl crl
application/postscript ai eps ps
application/rdf+xml rdf
application/rss+xml rss
application/rtf rtf
application/smil+xml smi smil
application/sparql-query rq
application/sql sql
application/toml toml
application/trig trig
application/ttml+xml dfxp ttml
application/vnd.amazon.ebook azw
application/vnd.android.package-archive apk
application/vnd.apache.arrow.file arrow
application/vnd.apache.parquet parquet
application/vnd.apple.installer+xml mpkg
application/vnd.apple.mpegurl m3u m3u8
application/vnd.apple.pkpass pkpass
application/vnd.apple.pkpasses pkpasses
application/vnd.debian.binary-package deb udeb
application/vnd.google-earth.kml+xml kml
application/vnd.google-earth.kmz kmz
application/vnd.iccprofile icc icm
application/vnd.mapbox-vector-tile mvt
application/vnd.mif mif
application/vnd.mozilla.xul+xml xul
application/vnd.ms-cab-compressed cab
application/vnd.ms-excel xla xlb xls xlt
application/vnd.ms-excel.sheet.binary.macroenabled.12 xlsb
application/vnd.ms-excel.sheet.macroenabled.12 xlsm
application/vnd.ms-excel.template.macroenabled.12 xltm
application/vnd.ms-fontobject eot
application/vnd.ms-htmlhelp chm
application/vnd.ms-outlook msg
application/vnd.ms-powerpoint pot ppa pps ppt pwz
application/vnd.ms-powerpoint.presentation.macroenabled.12 pptm
application/vnd.ms-powerpoint.slideshow.macroenabled.12 ppsm
application/vnd.ms-project mpp
application/vnd.ms-word.document.macroenabled.12 docm
application/vnd.ms-word.template.macroenabled.12 dotm
application/vnd.ms-xpsdocument xps
application/vnd.oasis.opendocument.chart odc
application/vnd.oasis.opendocument.database odb
application/vnd.oasis.opendocument.formula odf
application/vnd.oasis.opendocument.graphics odg
application/vnd.oasis.opendocument.graphics-template otg
application/vnd.oasis.opendocument.image odi
application/vnd.oasis.opendocument.presentation odp
application/vnd.oasis.opendocument.presentation-template otp
application/vnd.oasis.opendocument.spreadsheet ods
application/vnd.oasis.opendocument.spreadsheet-template ots
application/vnd.oasis.opendocument.text odt
application/vnd.oasis.opendocument.text-master odm
application/vnd.oasis.opendocument.text-template ott
application/vnd.openxmlformats-officedocument.presentationml.presentation pptx
application/vnd.openxmlformats-officedocument.presentationml.slideshow ppsx
application/vnd.openxmlformats-officedocument.presentationml.template potx
application/vnd.openxmlformats-officedocument.spreadsheetml.sheet xlsx
application/vnd.openxmlformats-officedocument.spreadsheetml.template xltx
application/vnd.openxmlformats-officedocument.wordprocessingml.document docx
application/vnd.openxmlformats-officedocument.wordprocessingml.template dotx
application/vnd.palm pdb
application/vnd.pmtiles pmtiles
application/vnd.rar rar
application/vnd.sqlite3 sqlite sqlite3
application/vnd.tcpdump.pcap cap pcap
application/vnd.visio vsd vst
application/vnd.wap.wmlc wmlc
application/wasm wasm
application/wsdl+xml wsdl
application/x-7z-compressed 7z
application/x-apple-aspen-config mobileconfig
application/x-apple-diskimage dmg
application/x-bcpio bcpio
application/x-bittorrent torrent
application/x-brotli br
application/x-bzip2 bz2
application/x-chrome-extension crx
application/x-cocoa cco
application/x-cpio cpio
application/x-csh csh
application/x-dvi dvi
application/x-gtar gtar
application/x-hdf hdf
application/x-hdf5 h5
application/x-iso9660-image iso
application/x-java-archive-diff jardiff
application/x-java-jnlp-file jnlp
application/x-latex latex
application/x-lz4 lz4
application/x-lzip lz
application/x-lzma lzma
application/x-makeself run
application/x-mobipocket-ebook mobi prc
application/x-ms-application application
application/x-msi msi
application/x-ndjson jsonl ndjson
application/x-netcdf cdf nc
application/x-ns-proxy-autoconfig pac
application/x-pkcs12 p12 pfx
application/x-python-code pyc pyo
application/x-rpm rpm
application/x-sea sea
application/x-shar shar
application/x-shockwave-flash swf
application/x-stuffit sit
application/x-sv4cpio sv4cpio
application/x-sv4crc sv4crc
application/x-tar tar
application/x-tcl tcl tk
application/x-tex tex
application/x-texinfo texi texinfo
application/x-ustar ustar
application/x-x509-ca-cert crt der pem
application/x-xpinstall xpi
application/x-xz xz
application/xhtml+xml xht xhtml
application/xml plist rng xml xpdl xsd
application/xml-dtd dtd
application/xslt+xml xsl xslt
application/xspf+xml xspf
application/yaml yaml yml
application/zip zip
application/zstd zst zstd
audio/aac aac adts loas
audio/ac3 ac3
audio/amr amr
audio/basic au snd
audio/flac flac
audio/matroska mka
audio/midi kar mid midi rmi
audio/mp4 cmfa m4a m4b mp4a
audio/mpeg m2a m3a mp2 mp3 mpa mpga
audio/ogg oga ogg opus spx
audio/vnd.dts dts
audio/webm weba
audio/x-aiff aif aifc aiff
audio/x-caf caf
audio/x-ms-wma wma
audio/x-pn-realaudio ra ram
audio/x-scpls pls
audio/x-wav wav
font/collection ttc
font/otf otf
font/ttf ttf
font/woff woff
font/woff2 woff2
image/apng apng
image/avif avif avifs
image/bmp bmp dib
image/emf emf
image/gif gif
image/heic heic
image/heic-sequence heics
image/heif heif
image/ief ief
image/jp2 jp2 jpg2
image/jpeg jfif jpe jpeg jpg pjp pjpeg
image/jpx jpf jpx
image/jxl jxl
image/ktx ktx
image/ktx2 ktx2
image/png png
image/svg+xml svg
image/tiff tif tiff
image/vnd.adobe.photoshop psd
image/vnd.djvu djv djvu
image/vnd.dwg dwg
image/vnd.dxf dxf
image/vnd.ms-dds dds
image/vnd.ms-photo wdp
image/vnd.radiance hdr
image/vnd.wap.wbmp wbmp
image/webp webp
image/wmf wmf
image/x-cmu-raster ras
image/x-icon cur ico
image/x-jng jng
image/x-portable-anymap pnm
image/x-portable-bitmap pbm
image/x-portable-graymap pgm
image/x-portable-pixmap ppm
image/x-rgb rgb
image/x-tga tga
image/x-xbitmap xbm
image/x-xpixmap xpm
image/x-xwindowdump xwd
message/rfc822 eml mht mhtml mime
model/3mf 3mf
model/gltf+json gltf
model/gltf-binary glb
model/iges iges igs
model/mtl mtl
model/obj obj
model/step step stp
model/stl stl
model/vnd.collada+xml dae
model/vnd.usdz+zip usdz
model/vrml vrml wrl
model/x3d+xml x3d
text/cache-manifest appcache
text/calendar ics ifb
text/css css
text/csv csv
text/html htm html shtml
text/javascript cjs js mjs
text/markdown markdown md
text/n3 n3
text/plain bat c cc cfg conf cpp def diff go h hpp in ini java ksh list log md5 nfo patch pl pm rs
text/plain sha1 sha256 sha512 srt text txt
text/richtext rtx
text/sgml sgm sgml
text/tab-separated-values tsv
text/troff man me ms roff t tr
text/turtle ttl
text/uri-list uri uris
text/vcard vcard vcf
text/vnd.graphviz gv
text/vnd.sun.j2me.app-descriptor jad
text/vnd.wap.wml wml
text/vtt vtt
text/x-component htc
text/x-opml opml
text/x-python py
text/x-rst rst
text/x-setext etx
text/x-shellscript sh
text/x-ssa ass ssa
text/x-vcalendar vcs
video/3gpp 3gp 3gpp
video/3gpp2 3g2 3gpp2
video/iso.segment m4s
video/matroska mk3d mkv
video/mj2 mj2
video/mp2t m2t m2ts mts ts
video/mp4 cmfv m4v mp4 mp4v mpg4
video/mpeg m1v m2v mpe mpeg mpg
video/ogg ogv
video/quicktime mov qt
video/webm webm
video/x-f4v f4v
video/x-flv flv
video/x-mng mng
video/x-ms-asf asf asx
video/x-ms-vob vob
video/x-ms-wmv wmv
video/x-msvideo avi
video/x-sgi-movie movie
"""


def _has_charset(value: str) -> bool:
    """Text (RFC 6838 section 4.2.1) and XML (RFC 7303 section 3) have a charset parameter, JSON has none (RFC 8259)."""
    return value.startswith("text/") or value.endswith(("/xml", "+xml"))


def _entry(value: str) -> MediaType:
    plain = value.encode()
    return MediaType(plain, plain + b"; charset=utf-8" if _has_charset(value) else plain)


def _table() -> dict[bytes, MediaType]:
    lines = [line.split() for line in TYPES.split("\n") if line]
    return {extension.encode(): entry for value, *extensions in lines for entry in [_entry(value)]
            for extension in extensions}


_TABLE = _table()
_UNKNOWN = _entry("application/octet-stream")


def media_type(name: bytes) -> MediaType:
    """The type for a file's name, or its whole path, by the last extension: a name's leading dots begin none."""
    stem, _, extension = name.rpartition(b"/")[2].lstrip(b".").rpartition(b".")
    return _TABLE.get(extension.lower(), _UNKNOWN) if stem else _UNKNOWN


# --- Charset

# Bytes in which a document may declare its encoding: HTML's standard has it so ("prescan a byte stream"), and CSS's
# (css-syntax-3, "determine the fallback encoding"). XML's declaration is the first thing there is.
PRESCAN = 1024
UTF8_LABELS = (b"utf-8", b"utf8", b"unicode-1-1-utf-8", b"unicode11utf8", b"unicode20utf8", b"x-unicode20utf8")
XML = re.compile(rb"""<\?xml\s[^>]*?encoding\s*=\s*["']([^"'>]*)""")
CSS = re.compile(rb'@charset "([^"]*)";')
COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
META = re.compile(rb"<meta[\s/]", re.IGNORECASE)
ATTRIBUTE = re.compile(rb"""[\s/]*([^\s/>=]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>"']*)))?""")
CHARSET = re.compile(rb"""charset\s*=\s*["']?([^\s"';]+)""", re.IGNORECASE)

# What switches to characters of two bytes, or to katakana, in ISO-2022-JP, -KR and -CN (RFC 1468, 1557, 1922). Not
# "ESC ( B" alone: terminals' ways to end colours have it, too.
ISO_2022 = re.compile(rb"\x1b(?:\$[@AB]|\$[()*+][A-Z]|\([IJ])")


def declared(value: bytes, head: bytes) -> bytes:
    """The encoding that a document of type `value` which begins with `head` declares, in lower case; b"" for none."""
    if head.startswith(codecs.BOM_UTF8):        # goes before all that is declared (WHATWG Encoding, "BOM sniff")
        return b"utf-8"
    label = _declared_by_meta(head) if value == b"text/html" else b""
    found = None if label else XML.match(head) or CSS.match(head)
    return (found[1] if found else label).strip().lower()


def _declared_by_meta(head: bytes) -> bytes:
    """<meta charset=...>, or <meta http-equiv=content-type content="...; charset=...">; b"" for none."""
    head = COMMENT.sub(b"", head)
    at = 0
    while meta := META.search(head, at):        # behind the attributes of the one before: each byte is looked at once
        attributes: dict[bytes, bytes] = {}
        at = meta.end()
        while found := ATTRIBUTE.match(head, at):
            attributes.setdefault(found[1].lower(), found[2] or found[3] or found[4] or b"")
            at = found.end()
        if attributes.get(b"charset"):
            return attributes[b"charset"]
        content = CHARSET.search(attributes.get(b"content", b""))
        if content and attributes.get(b"http-equiv", b"").lower() == b"content-type":
            return content[1]
    return b""


class Utf8:
    """Whether the chunks fed to it, of a document of type `value`, are UTF-8 (RFC 3629) and nothing says otherwise.

    What says otherwise: another encoding declared in the first PRESCAN bytes; NUL, which UTF-16 and UTF-32 are full of;
    and the ESC sequences of ISO-2022, whose bytes would be valid UTF-8.
    """

    def __init__(self, value: bytes):
        self.value = value
        self.valid = True
        self.begun = False
        self.decoder: codecs.IncrementalDecoder | None = None      # once there is a byte that is not ASCII

    def feed(self, chunk: bytes) -> None:
        if not self.begun:
            self.begun = True
            self.valid = declared(self.value, chunk[:PRESCAN]) in (b"", *UTF8_LABELS)
        if self.valid and (b"\0" in chunk or b"\x1b" in chunk and ISO_2022.search(chunk)):
            self.valid = False
        within_character = self.decoder is not None and self.decoder.getstate()[0]
        if self.valid and not (chunk.isascii() and not within_character):
            self._decode(chunk)                 # of few: isascii() is far cheaper

    def _decode(self, chunk: bytes, final: bool = False) -> None:
        self.decoder = self.decoder or codecs.getincrementaldecoder("utf-8")()
        try:
            self.decoder.decode(chunk, final)
        except UnicodeDecodeError:
            self.valid = False

    def finish(self) -> bool:
        if self.valid and self.decoder:
            self._decode(b"", final=True)
        return self.valid


# --- whether a file is another one in a content coding (RFC 9110 section 8.4.1), as its first and last bytes tell
#
#     gzip (RFC 1952)    its trailer has the other file's CRC-32 and length
#     zstd (RFC 8878)    its first header may have the other's length, and says how much memory it takes to unpack
#     br (RFC 7932)      it has no magic number, but its first header does not let it pass for everything

# What a file's name ends in, and the coding that its contents should then be in.
CODING_SUFFIXES = {b"br": "br", b"zst": "zstd", b"zstd": "zstd", b"gz": "gzip"}

CODING_HEAD, CODING_TAIL = 32, 8          # bytes looked at
GZIP_MIN = 18               # bytes of a gzip file's header and trailer
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_WINDOW = 8 << 20       # RFC 9659: nobody has to unpack what takes more, and browsers do not
OLDER = 2                   # seconds that a sibling may be older than its file: tools round dates


def wrong_coding(coding: str, head: bytes, tail: bytes, length: int, crc: int) -> str:
    """What is wrong with a file of these first CODING_HEAD and last CODING_TAIL bytes as the `coding` of `length` bytes
    with this CRC-32: to be said after its name; "" for nothing."""
    if coding == "gzip":
        return _wrong_gzip(head, tail, length, crc)
    return _wrong_zstd(head, length) if coding == "zstd" else _wrong_brotli(head, length)


def tells_length(coding: str, head: bytes) -> bool:
    """Whether wrong_coding() had a length to compare, so that an older sibling of a file that is another one by now
    shows."""
    return coding == "gzip" or coding == "zstd" and _zstd_header(head)[1] is not None


def _wrong_gzip(head: bytes, tail: bytes, length: int, crc: int) -> str:
    """RFC 1952 section 2.3: ID1, ID2, CM (8: deflate), FLG with three reserved bits; at the end CRC32 and ISIZE."""
    if len(head) < GZIP_MIN or not head.startswith(b"\x1f\x8b\x08") or head[3] & 0xE0:
        return "is no gzip file"
    if tail != crc.to_bytes(4, "little") + (length & 0xFFFFFFFF).to_bytes(4, "little"):
        return "holds other bytes (its CRC-32 or length differs): compress it again"
    return ""


def _wrong_zstd(head: bytes, length: int) -> str:
    window, content = _zstd_header(head)
    if window is None:
        return "is no zstd file, or one that takes a dictionary"
    if content not in (None, length):
        return "holds other bytes (its length differs): compress it again"
    if window > ZSTD_WINDOW:
        return f"takes a window of {window >> 20} MiB, and browsers allow for {ZSTD_WINDOW >> 20} (RFC 9659)"
    return ""


def _zstd_header(head: bytes) -> tuple[int | None, int | None]:
    """(window, length of the contents or None) in bytes, of a file that begins like this; (None, None) for none.

    RFC 8878 section 3.1.1.1: a descriptor, then window, dictionary and length, as far as it says that they are there.
    """
    if not head.startswith(ZSTD_MAGIC) or len(head) < 9:
        return None, None
    descriptor = head[4]
    single_segment = bool(descriptor & 0x20)
    if descriptor & 0x0B:                       # a reserved bit, or a dictionary
        return None, None
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    at = 5 if single_segment else 6
    if len(head) < at + size:
        return None, None
    content = int.from_bytes(head[at:at + size], "little") + (256 if size == 2 else 0) if size else None
    if single_segment:
        return content, content
    base = 1 << 10 + (head[5] >> 3)
    return base + base // 8 * (head[5] & 7), content


def _wrong_brotli(head: bytes, length: int) -> str:
    """RFC 7932 sections 9.1 and 9.2: WBITS, then of the first meta-block ISLAST, ISLASTEMPTY, MNIBBLES and MLEN.

    A text that is called .br does not pass: the lengths that it would have there are nearly never possible ones.
    """
    wrong, bits = "is no brotli file, or holds other bytes", int.from_bytes(head, "little")
    window_bits = 1 if not bits & 1 else 4 if bits >> 1 & 7 else 7
    if window_bits == 7 and bits >> 4 & 7 == 1:     # a pattern that is not used, but for windows that nobody takes
        return wrong
    bits >>= window_bits
    is_last = bits & 1
    bits >>= 1
    if is_last and bits & 1:
        return wrong if length else ""
    bits >>= is_last
    nibbles, bits = 4 + (bits & 3), bits >> 2
    if nibbles == 7:                                # metadata, which says nothing of what follows; a reserved bit is 0
        return wrong if bits & 1 else ""
    size = (bits & (1 << 4 * nibbles) - 1) + 1
    if nibbles > 4 and size <= 1 << 4 * nibbles - 4 or size > length or is_last and size < length:
        return wrong
    return ""
