"""P5, P6: archives at random. What is served is what GNU tar extracts; what is damaged is refused or served in part."""

import tempfile
import tracemalloc
from pathlib import Path

from hostile_archives import (
    BLOCK, END, GNU, KINDS, NO_MAGIC, USTAR, base256, file, gnu_tar, link, long_name, octal, overwrite, pax,
    refusal, served,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tar import EXTENSION_MAX

# The same ones each time: a search for more (derandomize=False, max_examples=9000) takes its time, and may find some.
EXAMPLES = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- archives at random --------------------------------------------------------------------------------------------

FOLDERS = st.sampled_from([b"", b"d/", b"d/e/", b"./", b"f/", b"long" * 30 + b"/", b"s1/", b"d/s2/"])
FILES = st.builds(bytes.__add__, FOLDERS, st.sampled_from([b"a", b"b", b"index.html", b"\xff\r\n", b"n" * 101]))
DATA = st.binary(max_size=1100) | st.just(file(b"inner", b"INNER"))


def gnu_file(name, data):
    return (long_name(name) if len(name) > 99 else b"") + file(name, data, magic=GNU)


def pax_file(name, data):
    return pax((b"path", name), (b"size", b"%d" % len(data)), (b"comment", b"x")) + file(b"x", data, size=octal(0))


def pax_name(name, data):
    return pax((b"path", name)) + file(b"x", data)


def plain_file(name, data):
    return gnu_file(name, data) if len(name) > 99 else file(name, data, size=base256(len(data)), kind=b"\0")


def directory(name):
    return file(name, kind=KINDS["directory"])


def symbolic(name, target):
    return link(name, target, KINDS["symlink"])


def hard(name, target):
    return link(name, target, KINDS["link"])


def other(block):
    return block


STORED = st.tuples(st.sampled_from([gnu_file, pax_file, pax_name, plain_file]), FILES, DATA)
HARD = st.tuples(st.just(hard), st.sampled_from([b"h1", b"d/h2", b"h3"]), FILES | st.just(b"h1"))
SOFT = st.tuples(st.just(symbolic), st.sampled_from([b"s1", b"d/s2", b"d/e/s3", b"s4"]), FILES | st.sampled_from(
    [b"..", b".", b"d", b"../d", b"../../d/e", b"e", b"s1", b"../s4", b"/etc/passwd", b"s1/a", b"../s1/../a", b"h1"]))
OTHERS = st.tuples(st.just(other), st.sampled_from(
    [directory(b"d/"), directory(b"./"), pax((b"comment", b"x"), kind=b"g"), file(b"fifo", kind=KINDS["fifo"])]))
# Nor does a name stand for two symbolic links: GNU tar puts those that lead outside in place last of all.
MEMBERS = st.lists(STORED | STORED | HARD | SOFT | OTHERS, max_size=10,
                   unique_by=lambda member: member[1] if member[0] is symbolic else object())


def blocks(members):
    return b"".join(write(*arguments) for write, *arguments in members) + END


def compare(path, folder):
    """Where GNU tar has no complaint, what is served at each path is what it has put there. Returns both."""
    extracted, found = gnu_tar(path, folder), served(path)
    if not extracted.status:
        assert {name: extracted.at(name) for name in found} == found
    return extracted, found


@EXAMPLES
@given(MEMBERS)
def test_p06_what_is_served_is_what_gnu_tar_extracts(members):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.tar"
        path.write_bytes(blocks(members))
        extracted, found = compare(path, f"{folder}/extracted")
        assert extracted.status or extracted.files.items() <= found.items()


# --- headers at random ---------------------------------------------------------------------------------------------

PATHS = [b"r", b"q/r", b"", b"r/", b"./r"]        # none of them below another: GNU tar could not have both
PAX_SIZES = [b"0", b"5", b"512", b"1024", b"2048", b"x", b"", b"+5", b"1_0", b"-1"]
PAX_SPARSE = [b"GNU.sparse." + word for word in (b"realsize", b"size", b"major", b"map", b"numblocks")]
RECORDS = st.one_of(
    st.tuples(st.just(b"path"), st.sampled_from(PATHS)),
    st.tuples(st.just(b"size"), st.sampled_from(PAX_SIZES)),
    st.tuples(st.sampled_from(PAX_SPARSE), st.sampled_from([b"0", b"1", b"1024", b"0,512", b"0,1024"])),
    st.tuples(st.sampled_from([b"mtime", b"comment", b"linkpath", b"hdrcharset"]), st.sampled_from([b"1", b"x", b"a"])))
EXTENSIONS = st.one_of(
    st.builds(lambda records: pax(*records), st.lists(RECORDS, max_size=3)),
    st.builds(lambda records: pax(*records, kind=b"g"), st.lists(RECORDS, max_size=1)),
    st.sampled_from([long_name(b"l"), long_name(b"l" * 120), long_name(b"l/"), long_name(b"a", b"K")]))
INNER = file(b"inner", b"INNER")
USTAR_SIZES = [*map(octal, [0, 5, 512, 1024]), base256(1024), b"+2000", b"2000", b"0o2000", b" " * 12]
BARE = st.builds(
    file, st.sampled_from([b"a", b"b", b"d/", b"c"]), st.sampled_from([b"", b"x", INNER, INNER + INNER]),
    size=st.sampled_from(USTAR_SIZES), kind=st.sampled_from([bytes([kind]) for kind in b"0000\00075216SQ"]),
    magic=st.sampled_from([USTAR, GNU, NO_MAGIC]), prefix=st.sampled_from([b"", b"", b"p"]), link=st.just(b"a"))
HEADERS = st.lists(st.tuples(st.lists(EXTENSIONS, max_size=2), BARE), min_size=1, max_size=3)


@settings(EXAMPLES, max_examples=150)       # most are refused
@given(HEADERS)
def test_p05_p06_whatever_headers_say_there_are_no_two_meanings(headers):
    """Not even where GNU tar complains: nobody can hide a member in another one's contents."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.tar"
        path.write_bytes(b"".join(b"".join(extensions) + bare for extensions, bare in headers) + END)
        if not refusal(path):
            extracted, found = gnu_tar(path, f"{folder}/extracted"), served(path)
            assert {name: extracted.at(name) for name in found} == found


# --- damage at random ----------------------------------------------------------------------------------------------

WHOLE = blocks([
    (directory, b"d/"), (gnu_file, b"d/a", b"contents"), (other, pax((b"comment", b"x"), (b"mtime", b"5"), kind=b"g")),
    (pax_file, b"d/b", INNER), (gnu_file, b"long/" * 30 + b"c", b"c" * 600), (hard, b"h", b"d/a"),
    (symbolic, b"s", b"d"), (symbolic, b"t", b"../up"), (other, file(b"fifo", kind=KINDS["fifo"])),
    (plain_file, b"e", b""), (pax_name, b"f", b"x" * 512), (other, link(b"l" * 120, b"d/a")),
])
COUNT = len(WHOLE) // BLOCK
SIZES = [0, 1, 5, 511, 512, 513, 1024, 5120, 1 << 20, 1 << 24, 8**11 - 1]
NASTY = {
    "size": [*map(octal, SIZES), *map(base256, [1, -1, -512, -1024, 1 << 40, 1 << 62, 1 << 63, (1 << 88) - 1]), b"",
             b" ", b"+5", b"-5", b"1_0", b"0o5", b"9", b"5 ", b"\x80", b"\xff" * 12],
    "kind": [bytes([kind]) for kind in b"\0001234567LKxgXSDMNVAZ"],
    "name": [b"", b"/", b".", b"..", b"../x", b"/x", b"d", b"d/", b"d/a", b"./d//a", b"s/x", b"\xff\n", b"n" * 100,
             b"a/.."],
    "link": [b"", b"/", b".", b"..", b"/etc", b"s", b"d", b"d/a", b"s/a", b"../..", b"h", b"n" * 100],
    "magic": [USTAR, GNU, NO_MAGIC, b"ustar\0zz", b"USTAR"],
    "prefix": [b"", b"p", b"..", b"/", b"d", b"p/" * 77, b"\xff"],
    "mtime": [b"zz", base256(-1), base256(1 << 80), b""], "mode": [b"zz", b"\xff"], "uid": [b"zz", base256(-1)],
    "devmajor": [b"zz"], "uname": [b"\xff"],
}
PLACE = st.integers(0, COUNT - 1)
FIELD = st.sampled_from([(field, value) for field, values in NASTY.items() for value in values])


def put(data, place, new, removed=BLOCK):
    start = place * BLOCK
    return data[:start] + new + data[start + removed:]


def cut(data, size):
    return data[:size]


def set_byte(data, place, value):
    return data[:place] + bytes([value]) + data[place + 1:]


def set_field(data, place, field):
    """Wrong in one field and right in its checksum."""
    block = data[place * BLOCK:(place + 1) * BLOCK]
    return put(data, place, overwrite(block.ljust(BLOCK, b"\0"), **dict([field])))


def remove(data, place, count):
    return put(data, place, b"", count * BLOCK)


def repeat(data, place, source):
    return put(data, place, data[source * BLOCK:(source + 1) * BLOCK], 0)


def zero(data, place):
    return put(data, place, bytes(BLOCK))


FIELD_DAMAGE = st.tuples(st.just(set_field), PLACE, FIELD)
DAMAGE = FIELD_DAMAGE | FIELD_DAMAGE | FIELD_DAMAGE | st.one_of(
    st.tuples(st.just(cut), st.integers(1, len(WHOLE))),
    st.tuples(st.just(set_byte), st.integers(0, len(WHOLE) - 1), st.integers(0, 255)),
    st.tuples(st.just(remove), PLACE, st.integers(1, 3)),
    st.tuples(st.just(repeat), PLACE, PLACE),
    st.tuples(st.just(zero), PLACE))


def damaged(damages):
    data = WHOLE
    for damage, *arguments in damages:
        data = damage(data, *arguments)
    return data or WHOLE


@EXAMPLES
@given(st.lists(DAMAGE, min_size=1, max_size=4))
def test_p05_p06_damage_is_refused_or_read_as_gnu_tar_reads_it(damages):
    """Where GNU tar complains, it has guessed: then only what is served has to lie in the archive, each on its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.tar"
        path.write_bytes(damaged(damages))
        if said := refusal(path):
            assert said.startswith(str(path)) and "\n" not in said
        else:
            compare(path, f"{folder}/extracted")


def test_p06_cut_short_anywhere(tmp_path):
    """At each block's end, and a byte before and after: either refused, or what is served is whole."""
    path = tmp_path / "site.tar"
    path.write_bytes(WHOLE)
    whole = served(path)
    for size in {at + around for at in range(BLOCK, len(WHOLE), BLOCK) for around in (-1, 0, 1)}:
        path.write_bytes(WHOLE[:size])
        if not refusal(path):
            assert served(path).items() <= whole.items()


@EXAMPLES
@given(st.lists(FIELD_DAMAGE, min_size=1, max_size=9))
def test_p06_damage_takes_no_memory(damages):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "site.tar"
        path.write_bytes(damaged(damages))
        tracemalloc.start()
        try:
            refusal(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 * EXTENSION_MAX + (1 << 20)
