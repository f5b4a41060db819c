"""How files are compressed, and what they hold: gzip by zlib, br and zstd by modules of Python or by commands.

Compressors release the interpreter's lock or are programs of their own, so threads keep all cores busy.
"""

import contextlib
import importlib
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

import media
from folder import PackError
from tar import CHUNK

BROTLI_WINDOWS = 16, 24         # bits (RFC 7932 section 9.1): the least and the most that is asked for
ZSTD_LEVEL = 19                 # the highest whose window is within 8 MiB (RFC 9659)


SUFFIXES = {"br": b".br", "gzip": b".gz", "zstd": b".zst"}

# Types that compress, and are not compressed in themselves.
COMPRESSES = re.compile(
    rb"text/.*|.*[/+](?:xml|json)|font/(?:ttf|otf|collection)|image/(?:bmp|x-icon|x-portable-.*|x-xbitmap|x-xpixmap)|"
    rb"model/(?:mtl|obj|step|stl|vrml|iges)|application/(?:wasm|json5|rtf|sql|toml|yaml|trig|n-quads|n-triples|"
    rb"postscript|sparql-query|x-ndjson|x-latex|x-tex|x-texinfo|x-csh|x-tcl|xml-dtd|mbox|vnd.apple.mpegurl|"
    rb"vnd.ms-fontobject|x-x509-ca-cert|x-ns-proxy-autoconfig|vnd.mapbox-vector-tile)")


def compresses(name: bytes) -> bool:
    """Whether files of this name are worth compressing."""
    return COMPRESSES.fullmatch(media.media_type(name).value) is not None


def spelled(name: bytes, coding: str) -> list[bytes]:
    """The names that a sibling of `name` in this coding may have."""
    return [name + b"." + suffix for suffix, one in media.CODING_SUFFIXES.items() if one == coding]


class Tool(NamedTuple):
    """How files are compressed. version: changes when the bytes that it makes may. compress(chunks, size, out): writes
    them compressed. expand(file): the bytes that a compressed file holds; raises one error or another."""
    version: str
    compress: Callable[[Iterable[bytes], int, IO[bytes]], None]
    expand: Callable[[IO[bytes]], Iterator[bytes]]


def find_tools(wanted: Iterable[str]) -> dict[str, Tool]:
    """The Tool of each of these codings that can be made here."""
    finders = {"br": _brotli, "gzip": _gzip, "zstd": _zstd}
    found = {coding: finders[coding]() for coding in sorted(wanted)}
    return {coding: tool for coding, tool in found.items() if tool}


def _gzip() -> Tool:
    """With a header that says neither name nor date (RFC 1952): always the same bytes."""
    def start(_size):
        made = zlib.compressobj(9, zlib.DEFLATED, 31)
        return made.compress, made.flush

    def expand(file):
        made = zlib.decompressobj(31)
        while not made.eof and (data := made.unconsumed_tail or file.read(CHUNK)):
            yield made.decompress(data, CHUNK)
        if not made.eof or made.unused_data or file.read(1):
            raise ValueError("cut short, or more behind it")
    return Tool(f"zlib-{zlib.ZLIB_RUNTIME_VERSION}", _stream(start), expand)


def _stream(start: Callable[[int], tuple[Callable, Callable]]) -> Callable[[Iterable[bytes], int, IO[bytes]], None]:
    """Tool.compress, given what starts to compress so many bytes: (step, finish)."""
    def compress(chunks, size, out):
        step, finish = start(size)
        for chunk in chunks:
            out.write(step(chunk))
        out.write(finish())
    return compress


def brotli_window(size: int) -> int:
    least, most = BROTLI_WINDOWS
    return max(least, min(size.bit_length(), most))


def _brotli() -> Tool | None:
    if brotli := _module("brotli"):
        def start(size):
            made = brotli.Compressor(quality=11, lgwin=brotli_window(size))
            return made.process, made.finish

        def expand(file):
            made = brotli.Decompressor()
            while data := file.read(CHUNK >> 4):
                yield made.process(data)
            if not made.is_finished():
                raise ValueError("cut short")
        return Tool(f"module-{brotli.__version__}", _stream(start), expand)
    return _command("brotli", lambda size: ["-q", "11", "-w", str(brotli_window(size)), "-c"])


def _zstd() -> Tool | None:
    if zstd := _module("compression.zstd"):         # Python 3.14
        def start(size):
            made = zstd.ZstdCompressor(ZSTD_LEVEL)
            made.set_pledged_input_size(size)
            return made.compress, made.flush

        def expand(file):
            with zstd.open(file) as opened:
                yield from iter(lambda: opened.read(CHUNK), b"")
        return Tool(f"module-{zstd.zstd_version}", _stream(start), expand)
    # Its size has to be known: else small files would get tables for large ones. With several threads, or one beside
    # that which reads, other bytes come out.
    return _command("zstd", lambda size: [f"-{ZSTD_LEVEL}", "--single-thread", f"--stream-size={size}", "-q", "-c"])


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _command(name: str, flags: Callable[[int], list[str]]) -> Tool | None:
    """The Tool that is a program, if it is installed."""
    path = shutil.which(name)
    if not path:
        return None

    def compress(chunks, size, out):
        _run([path, *flags(size)], chunks, out)

    def expand(file):
        with tempfile.TemporaryFile() as out:
            _run([path, "-d", "-c"], iter(lambda: file.read(CHUNK), b""), out)
            out.seek(0)
            yield from iter(lambda: out.read(CHUNK), b"")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    version = re.search(r"[0-9]+(?:\.[0-9]+)+", said.stdout + said.stderr)
    return Tool(f"command-{version[0]}", compress, expand) if version else None


def _run(command: list[str], chunks: Iterable[bytes], out: IO[bytes]) -> None:
    """Feed a program, which writes to `out`. It ends with us, for then there is no more to read. Raises PackError."""
    with tempfile.TemporaryFile() as errors, \
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=errors) as process:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            for chunk in chunks:
                process.stdin.write(chunk)
            process.stdin.close()
        if process.wait():
            errors.seek(0)
            said = errors.read(200).decode(errors="replace").strip()
            raise PackError(f"{command[0]} has failed with status {process.returncode}: {said}")
