"""What files in a content coding say of themselves, by the tools that make them."""

import gzip
import shutil
import subprocess
import zlib

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from media import CODING_HEAD as HEAD
from media import CODING_TAIL as TAIL
from media import tells_length
from media import wrong_coding as wrong

PAGE = b"<!doctype html><title>page</title>" + b"<p>It is the same, and the same again.</p>" * 400
SAMPLES = [b"", b"x", PAGE, PAGE[:1000], bytes(200_000), bytes(range(256)) * 300, PAGE * 20]


def said(coding, packed, plain):
    return wrong(coding, packed[:HEAD], packed[-TAIL:], len(plain), zlib.crc32(plain))


@pytest.mark.parametrize("plain", SAMPLES, ids=len)
@pytest.mark.parametrize("level", [0, 1, 9])
def test_gzip(plain, level):
    packed = gzip.compress(plain, level)
    assert said("gzip", packed, plain) == ""
    assert said("gzip", packed, plain + b"x") == "holds other bytes (its CRC-32 or length differs): compress it again"
    assert said("gzip", packed + b"\1", plain) != ""
    assert said("gzip", packed[:17], plain) == "is no gzip file"
    assert said("gzip", packed[:3] + b"\x80" + packed[4:], plain) == "is no gzip file"
    assert said("gzip", packed[:2] + b"\x07" + packed[3:], plain) == "is no gzip file"


@pytest.mark.parametrize("plain", SAMPLES, ids=len)
@pytest.mark.parametrize("window", [10, 16, 17, 18, 22, 24])
@pytest.mark.parametrize("quality", [0, 1, 5, 11])
def test_brotli(plain, window, quality):
    assert said("br", brotli.compress(plain, quality=quality, lgwin=window), plain) == ""


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 11), st.integers(10, 24))
def test_whatever_brotli_writes_passes(plain, quality, window):
    assert said("br", brotli.compress(plain, quality=quality, lgwin=window), plain) == ""


@pytest.mark.parametrize("text", [
    b"Demat (Breton)", b"<p>Degemer mat</p>", b"<!doctype html>", b"{}", b"// comment", b"body { margin: 0 }",
    b"\xff" * 9, b"\x1f\x8b\x08\0", b"version https://git-lfs.github.com/spec/v1", b"\xef\xbb\xbftext",
    b"\x11large window",
])
def test_what_is_no_brotli(text):
    assert said("br", text, PAGE[:1000]) == "is no brotli file, or holds other bytes"


def test_brotli_of_something_else():
    """As far as it shows: where all of it is one part."""
    packed = brotli.compress(PAGE)
    assert said("br", packed, PAGE + b"x") != ""
    assert said("br", packed, PAGE[1:]) != ""
    assert said("br", brotli.compress(b""), PAGE) != ""


def zstd(plain, *options):
    return subprocess.run(["zstd", "-q", "-c", *options], input=plain, capture_output=True, check=True).stdout


@pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is not installed")
@pytest.mark.parametrize("plain", SAMPLES, ids=len)
def test_zstd(plain, tmp_path):
    (tmp_path / "plain").write_bytes(plain)
    whole = zstd(b"", "-19", str(tmp_path / "plain"))
    assert tells_length("zstd", whole[:HEAD])
    assert said("zstd", whole, plain) == ""
    assert said("zstd", whole, plain + b"x") == "holds other bytes (its length differs): compress it again"
    piped = zstd(plain)
    assert tells_length("zstd", piped[:HEAD]) == (not plain)
    assert said("zstd", piped, plain) == ""
    large = zstd(plain, "--ultra", "-22", "--long=27")
    assert ("window of 128 MiB" in said("zstd", large, plain)) == bool(plain)


def test_zstd_that_takes_a_dictionary_or_is_not_whole():
    for head in (b"\x28\xb5\x2f\xfd\x01\x40\7\0\0\0\0", b"\x28\xb5\x2f\xfd\x08\x40\0\0\0\0", b"\x28\xb5\x2f\xfd",
                 b"\x28\xb5\x2f\xfe\0\x40\0\0\0\0", b"\x28\xb5\x2f\xfd\xe0\1\0\0\0\0\0"):
        assert said("zstd", head, b"x") == "is no zstd file, or one that takes a dictionary"


@pytest.mark.parametrize(("descriptor", "size", "plain"), [
    (0x20, b"\5", 5), (0x60, b"\5\0", 261), (0xA0, b"\5\0\1\0", 65541), (0xE0, b"\5\0\0\0\1\0\0\0", (1 << 32) + 5),
])
def test_lengths_in_zstd(descriptor, size, plain):
    head = b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + size + b"\1\0\0\0"
    assert wrong("zstd", head, b"", plain + 1, 0) == "holds other bytes (its length differs): compress it again"
    assert ("window" in wrong("zstd", head, b"", plain, 0)) == (plain > 8 << 20)


@settings(max_examples=300)
@given(st.sampled_from(["gzip", "zstd", "br"]), st.binary(max_size=60), st.integers(0, 1 << 40))
def test_anything(coding, packed, length):
    assert isinstance(wrong(coding, packed[:HEAD], packed[-TAIL:], length, 1), str)
    tells_length(coding, packed[:HEAD])
