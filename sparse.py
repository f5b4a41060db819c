"""Sparse members: files of which a tar has left out the zeros, and says in one of GNU's four ways where they were.

GNU tar, tarfile and libarchive agree on maps whose extents lie one behind the other, fill whole blocks but for the last
one, take all the data there is, and end where the file ends. All packers write such; others are refused (MapError).
"""

import re
import tarfile
from collections.abc import Callable

BLOCK = tarfile.BLOCKSIZE
PIECES_MAX = 500            # of a file: so that a response is one sendmsg still (UIO_MAXIOV: 1024), with 200 ranges too
HOLE_MAX = 256 << 20        # bytes of zeros that are in memory: a larger hole is several pieces
HOLE = -1                   # where the bytes of a hole are
FIELD = re.compile(rb" *[0-7]+ *(\0.*)?|[\x80\xff].*", re.DOTALL)
NUMBER, POSITIVE = re.compile(rb"[0-9]{1,19}"), re.compile(rb"0*[1-9][0-9]{0,17}")

Extents = list[tuple[int, int]]                 # (offset in the file, bytes), of what is in the tar
Pieces = tuple[tuple[int, int], ...]            # (place in the tar or HOLE, bytes): the whole file


NO_MAP = "sparse file whose map is wrong"
TOO_MANY = "sparse file of too many pieces (pack it without -S)"


class MapError(Exception):
    """str() is a kind of member that is not served: NO_MAP or TOO_MANY."""


def pieces(extents: Extents, size: int, start: int, stored: int) -> Pieces:
    """A file of `size` bytes, `stored` of which lie at `start` in the tar. Raises MapError."""
    if len(extents) > PIECES_MAX:           # old_gnu gives no more than one of those
        raise MapError(TOO_MANY)
    found: list[tuple[int, int]] = []
    at, place, whole_blocks = 0, start, True
    for offset, length in extents:
        if length < 0 or offset < at or offset + length > size or length and not whole_blocks:
            raise MapError(NO_MAP)
        if offset > at:
            _add_hole(found, offset - at)
        if length:
            found.append((place, length))
            place += length
            whole_blocks = not length % BLOCK
        at = offset + length
        if len(found) > PIECES_MAX:
            raise MapError(TOO_MANY)
    if at != size or place != start + stored:
        raise MapError(NO_MAP)
    return tuple(found)


def _add_hole(found: list[tuple[int, int]], length: int) -> None:
    """Add zeros, to those at the end if any: so almost every piece has a block of the tar. Raises MapError."""
    if found and found[-1][0] == HOLE:
        length += found.pop()[1]
    if length > HOLE_MAX * PIECES_MAX:
        raise MapError(TOO_MANY)
    while length > 0:
        found.append((HOLE, min(length, HOLE_MAX)))
        length -= HOLE_MAX


def old_gnu(header: bytes, read: Callable[[int], bytes]) -> tuple[Extents, int]:
    """(extents, size of the file) of a header of type S, behind which `read` gives more blocks of the map.

    GNU tar's tar.h, struct oldgnu_header and sparse_header. Raises tarfile.HeaderError where not even the end of the
    map is clear, without which nobody knows where the member ends.
    """
    extents: Extents = []
    block, at, count, more = header, 386, 4, 482
    while True:
        ended = False
        for start in range(at, at + 24 * count, 24):
            ended = ended or not block[start + 12]
            if not ended and len(extents) <= PIECES_MAX:
                extents.append((_field(block, start), _field(block, start + 12)))
        if not block[more]:
            return extents, _field(header, 483) if header[483] else 0
        if ended:
            raise tarfile.HeaderError("a map that has ended goes on")
        block, at, count, more = read(BLOCK), 0, 21, 504
        if len(block) < BLOCK:
            raise tarfile.HeaderError("a map that does not end")


def _field(block: bytes, start: int) -> int:
    if not FIELD.fullmatch(block, start, start + 12):
        raise tarfile.HeaderError("no number in a map")
    return tarfile.nti(block[start:start + 12])     # type: ignore[attr-defined]


def is_clear(records: dict[str, list[bytes]]) -> bool:
    """Whether it is clear what is data of a member with these records (see from_records).

    GNU tar needs the number of extents first, and an extent, else it takes the size of the file for that of the data.
    """
    sizes = records.get("size", []) + records.get("realsize", [])
    if records.keys().isdisjoint(("map", "numblocks", "major")):
        return False
    if not any(map(NUMBER.fullmatch, sizes)) or POSITIVE.fullmatch(records.get("major", [b""])[-1]):
        return True
    keys = [key for key in records if key in ("numblocks", "map", "offset", "numbytes")]
    if len(keys) < 2 or keys[0] != "numblocks" or len(records["numblocks"]) > 1:
        return False
    first = records[keys[1]][0].split(b",")[:2] if keys[1] == "map" else [records[key][0] for key in keys[1:3]]
    return bool(POSITIVE.fullmatch(records["numblocks"][0])) and len(list(filter(NUMBER.fullmatch, first))) == 2


def from_records(records: dict[str, list[bytes]], read: Callable[[int], bytes]) -> tuple[Extents, int, int]:
    """(extents, size of the file, bytes that the map takes of the data), of a pax header's records for sparse files.

    records: all values of each, without "GNU.sparse." before it. `read` gives the beginning of the data. Raises
    MapError. Version 0.0 has two records for each extent, 0.1 all in one, and 1.0 has the map in front of the data.
    """
    sizes = records.get("size", []) + records.get("realsize", [])
    keys = records.keys() - {"size", "realsize", "name", "numblocks"}
    if len(sizes) != 1:
        raise MapError(NO_MAP)
    if keys == {"major", "minor"} and (records["major"], records["minor"]) == ([b"1"], [b"0"]):
        numbers, used = _map_in_data(read)
    elif keys == {"map"} and len(records["map"]) == 1:
        if records["map"][0].count(b",") > 2 * PIECES_MAX:
            raise MapError(TOO_MANY)
        numbers, used = records["map"][0].split(b","), 0
    elif keys == {"offset", "numbytes"} and len(records["offset"]) == len(records["numbytes"]):
        numbers, used = [one for pair in zip(records["offset"], records["numbytes"], strict=True) for one in pair], 0
    else:
        raise MapError(NO_MAP)
    if len(numbers) % 2 or not all(NUMBER.fullmatch(number) for number in numbers + sizes):
        raise MapError(NO_MAP)
    if "numblocks" in records and records["numblocks"] != [b"%d" % (len(numbers) // 2)]:
        raise MapError(NO_MAP)
    return list(zip(map(int, numbers[::2]), map(int, numbers[1::2]), strict=True)), int(sizes[0]), used


def _map_in_data(read: Callable[[int], bytes]) -> tuple[list[bytes], int]:
    """The numbers of a map in lines, how many pairs there are in the first, filled up to whole blocks; its length."""
    data = read(20 * (2 * PIECES_MAX + 1) + BLOCK & -BLOCK)
    first, _, rest = data.partition(b"\n")
    if not NUMBER.fullmatch(first):
        raise MapError(NO_MAP)
    if int(first) > PIECES_MAX:
        raise MapError(TOO_MANY)
    lines = rest.split(b"\n", 2 * int(first))
    if len(lines) != 2 * int(first) + 1:
        raise MapError(NO_MAP)
    return lines[:-1], len(data) - len(lines[-1]) + BLOCK - 1 & -BLOCK
