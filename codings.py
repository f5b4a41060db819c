"""Whether a file is another one in a content coding (RFC 9110 section 8.4.1), as its first and last bytes tell.

    gzip (RFC 1952)    its trailer has the other file's CRC-32 and length
    zstd (RFC 8878)    its first header may have the other's length, and says how much memory it takes to unpack
    br (RFC 7932)      it has no magic number, but its first header does not let it pass for everything
"""

# What a file's name ends in, and the coding that its contents should then be in.
SUFFIXES = {b"br": "br", b"zst": "zstd", b"zstd": "zstd", b"gz": "gzip"}

HEAD, TAIL = 32, 8          # bytes looked at
GZIP_MIN = 18               # bytes of a gzip file's header and trailer
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_WINDOW = 8 << 20       # RFC 9659: nobody has to unpack what takes more, and browsers do not
OLDER = 2                   # seconds that a sibling may be older than its file: tools round dates


def wrong(coding: str, head: bytes, tail: bytes, length: int, crc: int) -> str:
    """What is wrong with a file of these first HEAD and last TAIL bytes as the `coding` of `length` bytes with this
    CRC-32: to be said after its name; "" for nothing."""
    if coding == "gzip":
        return _wrong_gzip(head, tail, length, crc)
    return _wrong_zstd(head, length) if coding == "zstd" else _wrong_brotli(head, length)


def tells_length(coding: str, head: bytes) -> bool:
    """Whether wrong() had a length to compare, so that an older sibling of a file that is another one by now shows."""
    return coding == "gzip" or coding == "zstd" and _zstd_header(head)[1] is not None


def _wrong_gzip(head: bytes, tail: bytes, length: int, crc: int) -> str:
    """RFC 1952 section 2.3: ID1, ID2, CM (8: deflate), FLG with three reserved bits; at the end CRC32 and ISIZE."""
    if len(head) < GZIP_MIN or not head.startswith(b"\x1f\x8b\x08") or head[3] & 0xE0:
        return "is no gzip file"
    if tail != crc.to_bytes(4, "little") + (length & 0xFFFFFFFF).to_bytes(4, "little"):
        return "holds other bytes (its CRC-32 or length differs)"
    return ""


def _wrong_zstd(head: bytes, length: int) -> str:
    window, content = _zstd_header(head)
    if window is None:
        return "is no zstd file, or one that takes a dictionary"
    if content not in (None, length):
        return "holds other bytes (its length differs)"
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
