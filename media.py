"""Media types by file name (RFC 9110 section 8.3, RFC 6838).

The same name gets the same type on every host: the table below, over what the `mimetypes` module itself knows;
the files that module likes to read (/etc/mime.types and the like) are never opened.
"""

import mimetypes
from typing import NamedTuple


class MediaType(NamedTuple):
    """Content-Type values: `value`, and `utf8` for content known to be UTF-8 (the same where no charset is defined)."""
    value: bytes
    utf8: bytes

    @property
    def is_text(self) -> bool:
        """Whether the type has a charset parameter, so that it is worth knowing if the content is UTF-8."""
        return self.value != self.utf8


# What the web uses today and Python 3.11's own table has differently or not at all.
# Compressed files are what they are: a file somebody asks for by this name is not to be unpacked on the way.
_OWN = {
    ".7z": "application/x-7z-compressed",
    ".apk": "application/vnd.android.package-archive",
    ".atom": "application/atom+xml",                    # RFC 4287
    ".avif": "image/avif",
    ".br": "application/x-brotli",
    ".bz2": "application/x-bzip2",
    ".cjs": "text/javascript",
    ".conf": "text/plain",
    ".deb": "application/vnd.debian.binary-package",
    ".eot": "application/vnd.ms-fontobject",
    ".epub": "application/epub+zip",
    ".flac": "audio/flac",                              # RFC 9639
    ".geojson": "application/geo+json",                 # RFC 7946
    ".gz": "application/gzip",                          # RFC 6713
    ".ico": "image/x-icon",
    ".ics": "text/calendar",                            # RFC 5545
    ".ini": "text/plain",
    ".iso": "application/x-iso9660-image",
    ".jar": "application/java-archive",
    ".js": "text/javascript",                           # RFC 9239
    ".json": "application/json",
    ".jsonld": "application/ld+json",
    ".jxl": "image/jxl",
    ".log": "text/plain",
    ".m4a": "audio/mp4",
    ".m4v": "video/mp4",
    ".map": "application/json",                         # source maps, ECMA-426
    ".markdown": "text/markdown",
    ".md": "text/markdown",                             # RFC 7763
    ".mjs": "text/javascript",
    ".mkv": "video/matroska",                           # RFC 9559
    ".oga": "audio/ogg",                                # RFC 5334
    ".ogg": "audio/ogg",
    ".ogv": "video/ogg",
    ".opus": "audio/ogg",                               # RFC 7845 section 9: in an Ogg container
    ".otf": "font/otf",                                 # RFC 8081, as the next ones
    ".ttf": "font/ttf",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".rar": "application/vnd.rar",
    ".rss": "application/rss+xml",
    ".rtf": "application/rtf",
    ".sh": "text/x-shellscript",
    ".srt": "text/plain",
    ".svgz": "application/gzip",                        # image/svg+xml only with Content-Encoding, which is not sent
    ".tgz": "application/gzip",
    ".toml": "application/toml",
    ".ts": "video/mp2t",                                # RFC 8216 section 4: HTTP Live Streaming
    ".vtt": "text/vtt",
    ".wasm": "application/wasm",
    ".webm": "video/webm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",                              # RFC 9649
    ".xhtml": "application/xhtml+xml",
    ".xml": "application/xml",                          # RFC 7303
    ".xsl": "application/xslt+xml",
    ".xslt": "application/xslt+xml",
    ".xz": "application/x-xz",
    ".yaml": "application/yaml",                        # RFC 9512
    ".yml": "application/yaml",
    ".zst": "application/zstd",                         # RFC 8878
    ".zstd": "application/zstd",
}


def _built_in() -> dict[str, str]:
    """The mimetypes module's own table. Its init(), which adds the host's files to types_map, is not called."""
    if mimetypes.inited:                                # somebody did: a new MimeTypes starts from the built-in table
        return mimetypes.MimeTypes().types_map[True]
    return mimetypes.types_map


def _has_charset(value: str) -> bool:
    """Text (RFC 6838 section 4.2.1) and XML (RFC 7303 section 3) have a charset parameter, JSON has none (RFC 8259)."""
    return value.startswith("text/") or value.endswith(("/xml", "+xml"))


def _entry(value: str) -> MediaType:
    plain = value.encode()
    return MediaType(plain, plain + b"; charset=utf-8" if _has_charset(value) else plain)


_TABLE = {extension.encode(): _entry(value) for extension, value in {**_built_in(), **_OWN}.items()}
_UNKNOWN = _entry("application/octet-stream")


def media_type(name: bytes) -> MediaType:
    """The type for a file's name, or its whole path, by the last extension: a name's leading dots begin none."""
    stem, dot, extension = name.rpartition(b"/")[2].lstrip(b".").rpartition(b".")
    return _TABLE.get(dot + extension.lower(), _UNKNOWN) if stem else _UNKNOWN
