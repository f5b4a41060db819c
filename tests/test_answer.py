"""Site.answer, the short way from bytes to a plan, against the long way: the head is parsed, the reply is made of it,
and nothing is remembered. Whatever came before, the two may not differ.

The examples are the same on every run. TARWEB_EXAMPLES=100000 looks further, at others each time.
"""

import random

import pytest
import smuggling
import test_http1
import test_http1_properties as properties
import test_reply as replies
from hypothesis import example, given
from hypothesis import strategies as st
from test_http1 import head

import http1
from archive import Library, Redirect, Resource
from http1 import MAX_LINE, HttpError
from plan import COLD_SEND_SIZE, SEND_SIZE, ForgetfulMemo, Memo, Site, VirtualHosts, header_section, make_site
from reply import CHALLENGES, FullResponse, Redirector, Responder

NOW = 1_700_000_000
LATER = 10              # seconds from then on until /later has a date that may be told
HTML = replies.stored(7000, 70, kind=b"text/html", etag=b'"html"')
CONTENTS = {
    **replies.SITE,
    b"/": Resource(HTML, (replies.stored(7100, 30, "gzip", b"text/html"),)),
    b"/next": Resource(replies.stored(7200, 4), ()),
    b"/big": Resource(replies.stored(100_000, COLD_SEND_SIZE + 1), ()),
    b"/huge": Resource(replies.stored(1_000_000, SEND_SIZE + 1), ()),
    b"/later": Resource(replies.PLAIN._replace(mtime=NOW + LATER), ()),
    b"/sparse": Resource(replies.PLAIN._replace(pieces=((600, 20_000), (1000, 30_000))), ()),
    b"/packed/": Redirect(b"/packed"),
}
ONE = Responder(replies.Contents(CONTENTS), b"max-age=60")
OTHER = Responder(replies.Contents({**replies.SITE, b"/404.html": replies.PAGE}), b"")
CHALLENGE = CHALLENGES + b"token"
SEVERAL = {b"t": ONE, b"*.two.test": OTHER}


def memo(kind=Memo):
    return kind(Library([]), b"tarweb", NOW)


def closing():
    site = make_site(memo(), {b"": ONE})
    site.close_all()
    return site


SITES = {
    "one archive": lambda: make_site(memo(), {b"": ONE}),
    "one with a page for what is missing": lambda: make_site(memo(), {b"": OTHER}),
    "several hosts": lambda: make_site(memo(), SEVERAL),
    "a server that ends": closing,
    "redirects": lambda: Site(memo(ForgetfulMemo), Redirector(8443, {b"token": b"here"}.get, b"name").reply),
}


# --- both ways

def long_way(site, data):
    """(status, whether it is the last, [header section, spans of the body]) of the response to `data`, where this is
    one request in whole and has no body; else None."""
    try:
        if http1.find_head(data, 0) != len(data):
            return None
        request = http1.parse_head(data)
    except HttpError:
        return None
    if request.has_body:
        return None
    site = isinstance(site, VirtualHosts) and site.find(request.fields.host or b"") or site
    reply = site.reply(request)
    reply = site.expand(reply) if isinstance(reply, FullResponse) else reply
    if reply.modified > site.memo.now:
        reply = reply._replace(modified=0)
    spans = (span for span in reply.body if (span if isinstance(span, bytes) else span[1]))
    return reply.status, reply.close, [header_section(reply), *spans]


def spelled(site, plan):
    """The same of a Plan, as the kernel would send it."""
    first, *spans = plan.spans()
    assert first == site.status_heads.get(plan.status)
    assert plan.tally is site.tallies[plan.status // 100]
    assert plan.total == sum(length for _, length in (first, *spans))
    assert plan.done == plan.total or plan.close or plan.total > plan.send_size
    own = range(plan.address, plan.address + len(plan.memory))
    return plan.status, plan.close, [
        bytes(plan.memory[address - plan.address:][:length]) if address in own else (address, length)
        for address, length in spans]


def check(site, history):
    """Answer all requests of `history` in this order, each the short way where it has one. Gives those that have."""
    wanted = {data: long_way(site, data) for data in history}
    answered = set()
    for data in history:
        known, plan = site.known(data), site.answer(data)
        for short in filter(None, (known, plan)):
            assert spelled(site, short) == wanted[data]
            answered.add(data)
        if plan is None and wanted[data] is not None:       # as the server goes on
            site.remember(data, site.respond(http1.parse_head(data)))
    return answered


def check_often(site, datas, seed=0):
    """As `check`, with each of `datas` three times and in other orders; then again when it has become later."""
    chance = random.Random(seed)
    answered = set()
    for seconds in (0, LATER):
        site.tick(NOW + seconds)
        history = [data for data in datas for _ in range(3)]
        answered |= check(site, history)
        chance.shuffle(history)
        answered |= check(site, history)
    return answered


# --- what is answered the short way, and what is not

FIREFOX = (b"User-Agent: Mozilla/5.0", b"Accept: */*", b"Accept-Encoding: gzip, br", b"Referer: http://t/",
           b"Connection: keep-alive", b"Cookie: a=b")
DATES = [b"If-Modified-Since: " + date.encode() for date in (replies.DATE, replies.BEFORE, replies.AFTER)]
TAG, SAME, OTHER_TAG = b'If-None-Match: "tag"', b'If-None-Match: W/"tag"', b'If-None-Match: "x"'
SLICE = b"Range: bytes=10-19"
WANTED = [b"Want-Repr-Digest: " + value for value in (b"sha-256=10", b"sha-512=3,sha-256=1", b"sha-256=0", b"sha-512=9",
                                                      b"sha-256", b"", b"x y")]
SHORT = {
    "a file": head(target=b"/plain"),
    "a browser": head(*FIREFOX, target=b"/packed"),
    "a directory": head(target=b"/dir/"),
    "a redirect": head(target=b"/dir"),
    "an empty file": head(target=b"/empty"),
    "without an entity tag": head(target=b"/untagged"),
    "in several pieces": head(target=b"/sparse"),
    "in several sends": head(target=b"/huge"),
    "what is not there": head(target=b"/nowhere"),
    "slashes": head(target=b"//plain"),
    "an escape": head(target=b"/%70lain"),
    "an escaped slash": head(target=b"/dir%2f"),
    "dot segments": head(target=b"/a/../plain"),
    "a name that begins with a dot": head(target=b"/.plain"),
    "HEAD": head(target=b"/plain", method=b"HEAD"),
    "OPTIONS": head(target=b"/plain", method=b"OPTIONS"),
    "POST": head(target=b"/plain", method=b"POST"),
    "a method in lower case": head(target=b"/plain", method=b"get"),
    "Connection: close": head(b"Connection: close", target=b"/plain"),
    "Expect": head(b"Expect: 100-continue", target=b"/plain"),
    "Expect of something else": head(b"Expect: x", target=b"/plain"),
    "no coding is acceptable": head(b"Accept-Encoding: *;q=0", target=b"/plain"),
    "Content-Length: 0": head(b"Content-Length: 0", target=b"/plain"),
    "another host": head(target=b"/plain", host=b"Host: a.two.test:80"),
    **{f"query {query!r} on {path!r}": head(target=path + query)
       for query in (b"?", b"?a=b", b"?a?b", b"?%zz")
       for path in (b"/plain", b"/dir", b"/nowhere", b"//dir", b"//plain")},
    **{f"{lines!r}": head(*lines, target=b"/plain") for lines in (
        [TAG], [SAME], [OTHER_TAG], [b"If-None-Match: *"], [b"If-None-Match:"], [b'If-None-Match: "x", "tag"'],
        [b'If-None-Match: "x" , W/"y"'], [b"If-None-Match: tag"], [b'If-None-Match: "tag'], [b'if-none-match: "tag"'],
        [b'if-none-match: "x"'], [b'If-None-Match:"tag"'], [b'If-None-Match:\t"x" \t'],
        [TAG, OTHER_TAG], [OTHER_TAG, TAG], [OTHER_TAG, OTHER_TAG], [OTHER_TAG, b'if-none-match: "tag"'],
        [b'if-none-match: "x"', TAG], [OTHER_TAG, b"Cookie: x", TAG],
        *([date] for date in DATES), *([OTHER_TAG, date] for date in DATES), *([date, OTHER_TAG] for date in DATES),
        *([TAG, date] for date in DATES), *([OTHER_TAG, b"X-Y: z", date] for date in DATES),
        *([date, OTHER_TAG, date] for date in DATES), [OTHER_TAG, *DATES[:2]], [OTHER_TAG, b"Accept: x", DATES[0]],
        [b"If-Modified-Since: x"], [DATES[0], DATES[0]],
        *([b"Range: bytes=" + value] for value in (
            b"0-0", b"0-999", b"0-5000", b"999-999", b"1000-1000", b"5000-6000", b"9-3", b"0-", b"-5", b"-0", b"-",
            b"0-1,500-501", b"0-1,3-4", b"5-6, 0-1", b"x", b"0-9 ", b"00-01", b"0-999999999999999",
            b"0-9999999999999999", b"9999999999999999-9999999999999999", b"1-2-3", b"")),
        [b"Range: Bytes=0-1"], [b"Range: lines=0-1"], [b"Range: bytes =0-1"], [b"Range:bytes=0-1"],
        [b"range: bytes=0-1"], [b"Range:\tbytes=0-1"], [SLICE, SLICE], [SLICE, b"range: bytes=0-1"],
        [b"range: bytes=0-1", SLICE], [SLICE, b"Range: x"], [b"Range: x", SLICE],
        [SLICE, TAG], [SLICE, OTHER_TAG], [TAG, SLICE], [OTHER_TAG, SLICE], [OTHER_TAG, SLICE, OTHER_TAG],
        [OTHER_TAG, SLICE, b"Range: bytes=0-1"], [OTHER_TAG, DATES[0], SLICE], [SLICE, DATES[0]], [DATES[1], SLICE],
        *([b"If-Range: " + value, SLICE] for value in (b'"tag"', b'"x"', replies.DATE.encode(), b"x", b'W/"tag"')),
        [SLICE, b'If-Range: "tag"'], [SLICE, b'if-range: "x"'], [b'If-Range: "x"'],
        *([b"If-Match: " + value, line] for value in (b'"tag"', b'"x"', b"*") for line in (OTHER_TAG, TAG, SLICE)),
        [OTHER_TAG, b'If-Match: "x"'], [b"If-Unmodified-Since: " + replies.BEFORE.encode(), SLICE],
        [OTHER_TAG, b"If-Unmodified-Since: " + replies.BEFORE.encode()],
        *([*before, one, *behind] for one in WANTED for before, behind in (
            ([], []), ([], [SLICE]), ([SLICE], []), ([], [OTHER_TAG]), ([TAG], []), ([OTHER_TAG, SLICE], []),
            ([SLICE], [b'If-Range: "tag"']))),
        [WANTED[2], WANTED[0]], [WANTED[0], WANTED[2]], [WANTED[0].lower()], [b"X-Y: z", WANTED[0], SLICE, DATES[1]])},
    **{f"{line!r} of {method!r} {path!r} beside {more!r}": head(line, *more, target=path, method=method)
       for method, path in ((b"HEAD", b"/plain"), (b"GET", b"/packed"), (b"GET", b"/empty"), (b"GET", b"/untagged"),
                            (b"GET", b"/later"), (b"GET", b"/sparse"), (b"GET", b"/big"), (b"GET", b"/huge"),
                            (b"GET", b"/dir"), (b"GET", b"/nowhere"), (b"OPTIONS", b"/plain"), (b"POST", b"/plain"))
       for line in (SLICE, OTHER_TAG, WANTED[0], b'If-None-Match: "2000-500"', b'If-None-Match: "2500-100"',
                    b"If-None-Match: *", b"Range: bytes=0-999999999", DATES[0])
       for more in ((), (b"Accept-Encoding: gzip, br",), (b"Connection: close",), (WANTED[1],))},
    "a query, and a digest": head(WANTED[0], target=b"/plain?a=b"),
}
LONG = {
    "HTTP/1.0": head(target=b"/plain", version=b"HTTP/1.0"),
    "HTTP/1.0 that stays": head(b"Connection: keep-alive", target=b"/plain", version=b"HTTP/1.0"),
    "HTTP/1.2": head(target=b"/plain", version=b"HTTP/1.2"),
    "absolute-form": head(target=b"http://t/plain"),
    "absolute-form with a query": head(target=b"http://t/plain?a=b"),
    "asterisk-form": head(target=b"*", method=b"OPTIONS"),
    "authority-form": head(target=b"t:443", method=b"CONNECT"),
    "bytes over 127": head(target=b"/\xc3\xa9"),
    "bytes over 127 in the query": head(target=b"/plain?\xff"),
    "a body": head(b"Content-Length: 3", target=b"/plain"),
    "chunks": head(b"Transfer-Encoding: chunked", target=b"/plain"),
    "an empty line in front": b"\r\n" + head(target=b"/plain"),
    "too long": head(b"Cookie: " + b"x" * MAX_LINE, target=b"/plain"),
    "a query too long": head(target=b"/plain?" + b"x" * MAX_LINE),
    **{f"the first {size} bytes": head(*FIREFOX)[:size] for size in range(1, len(head(*FIREFOX)))},
    **{f"{behind!r} behind": head(*FIREFOX) + behind for behind in (
        b"\r\n", b"x", b"Cookie: x\r\n", b"Cookie: x\r\n\r\n", b"X-A: b\r\n\r\n", b"Range: x\r\n\r\n", head())},
    **{name: raw for name, (raw, *_) in test_http1.REFUSED.items()},
}


@pytest.mark.parametrize("kind", SITES)
def test_what_has_a_short_way_gets_the_same(kind):
    answered = check_often(SITES[kind](), [*SHORT.values()])
    assert answered == (set() if kind == "redirects" else {*SHORT.values()}), "a Memo that forgets has no short way"


@pytest.mark.parametrize("kind", SITES)
def test_what_has_none_gets_none_whatever_is_remembered(kind):
    site = SITES[kind]()
    check_often(site, [*SHORT.values()])
    check_often(site, [*LONG.values()])
    for raw in LONG.values():
        assert site.answer(raw) is None


@pytest.mark.parametrize("kind", SITES)
def test_each_alone_and_among_a_few(kind):
    """What is remembered may be of the very request, of the one without its query or conditions, or of none."""
    for raw in SHORT.values():
        line, block = http1.split_head(raw)
        path, query, _ = line.partition(b"?")
        bare = (path + b" HTTP/1.1" if query else line) + b"\r" + http1.without_conditions(http1.essence(block))[0]
        for raws in ([raw], [bare, raw]):
            assert check_often(SITES[kind](), raws) == (set() if kind == "redirects" else {*raws})


def with_lines(raw, *lines):
    """`raw` with more header lines behind its request line."""
    first, end, rest = raw.partition(b"\r\n")
    return first + end + b"".join(line + b"\r\n" for line in lines) + rest


@pytest.mark.parametrize("line", [line.rstrip(b"\r\n") for line in properties.WRONG_LINES if line.strip(b"\r\n")]
                         + [b"Host: u", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Content-Length: x"])
def test_no_wrong_line_is_lost_beside_those_that_are_taken_out(line):
    taken = b"Cookie: a", b"X-A: b", b'If-None-Match: "x"', b"Range: bytes=0-1"
    for lines in (*((one, line) for one in taken), *((line, one) for one in taken), (*taken, line, *taken)):
        site, raw = SITES["one archive"](), with_lines(head(target=b"/plain"), *lines)
        check_often(site, [head(target=b"/plain"), with_lines(head(target=b"/plain"), *taken[:2])])
        assert (site.answer(raw) is None) == (long_way(site, raw) is None)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\r\n\n", b"\n\n", b"\0\r\n", b" \r\n", b"\r\n "])
@pytest.mark.parametrize("line", [b"Cookie: a", b"x-a:", b"Range: bytes=0-1", b'If-None-Match: "x"', DATES[0]])
def test_no_wrong_line_end_is_lost(line, end):
    """Before, behind and between lines that are taken out."""
    good = head(line, line, target=b"/plain?q")
    site = SITES["one archive"]()
    check_often(site, [good, head(target=b"/plain")])
    places = [at for at in range(len(good)) if good.startswith(b"\r\n", at)]
    raws = {good[:at] + end + good[at + 2:] for at in places} | {good[:at] + end + good[at:] for at in places}
    check_often(site, sorted(raws))


def test_smuggling_has_no_short_way():
    """Whatever is remembered of the same requests without what is odd about them."""
    targets = smuggling.OUTER, smuggling.INNER, b"/dir?o0000", b"/gone?o0000"
    plain = [head(*FIREFOX, target=target) for target in targets]
    plain += [head(target=smuggling.OUTER), smuggling.SMUGGLED]
    heads = [case.raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" for case in smuggling.CASES.values()]
    mixed = [with_lines(raw, *FIREFOX) for raw in heads]
    site = SITES["one archive"]()
    answered = check_often(site, [*plain, *(case.raw for case in smuggling.CASES.values()), *heads, *mixed])
    assert answered.issuperset(plain)
    for name, case in smuggling.CASES.items():
        if site.answer(case.raw) is not None:
            assert case.raw.endswith(b"\r\n\r\n") and len(case.statuses) == 1, name
    assert not any(site.answer(case.raw) for case in (
        *smuggling.TWO_LENGTHS.values(), *smuggling.CHUNK_LINES.values(), *smuggling.CHUNK_ENDS.values(),
        *smuggling.TRAILERS.values()))


# --- any bytes

PATHS = st.sampled_from([*[b"/plain", b"/packed", b"/"] * 6, *CONTENTS, CHALLENGE, b"/nowhere", b"//plain", b"//dir",
                         b"/a/../plain", b"/%70lain", b"*", b"http://t/plain"])
METHODS = st.sampled_from([*[b"GET"] * 8, b"HEAD", b"HEAD", b"OPTIONS", b"POST", b"BREW"])
QUERIES = st.sampled_from([*[b""] * 4, b"?", b"?a=b", b"?a?b", b"?%", b"?#", b"?\xff"])
VERSIONS = st.sampled_from([*[b"HTTP/1.1"] * 8, b"HTTP/1.0"])
TAGS = [b'"tag"', b'W/"tag"', b'"x"', b'"y"', b'"x", "tag"', b'"x","y"', b"*", b'"x", *', b"tag", b'"x', b"", b'"html"',
        b'"2000-500"', b'"2500-100"', b'"x""tag"', b'\xff"tag"']
RANGES = [b"bytes=0-9", b"bytes=10-19", b"bytes=990-5000", b"bytes=5000-6000", b"bytes=9-3", b"bytes=0-", b"bytes=-5",
          b"bytes=0-1,500-501", b"bytes=0-1, 3-4", b"Bytes=0-1", b"lines=0-1", b"bytes=x", b"bytes=00-01", b"",
          b"bytes=0-999999999999999", b"bytes=0-9999999999999999999999"]
WHEN = [replies.DATE.encode(), replies.BEFORE.encode(), replies.AFTER.encode(), http1.format_date(NOW + LATER), b"x"]
VALUES = {
    b"If-None-Match": TAGS, b"Range": RANGES, b"If-Modified-Since": WHEN, b"If-Range": [*TAGS[:4], *WHEN],
    b"Want-Repr-Digest": [b"sha-256=10", b"sha-512=3, sha-256=1", b"sha-256=0", b"x=1", b"x="],
    b"If-Match": TAGS, b"If-Unmodified-Since": WHEN, b"Cookie": [b"a", b"\xff"], b"Referer": [b"", b"/"],
    b"User-Agent": [b"x", b"y\tz"], b"X-A": [b"b"], b"x-": [b""], b"Via": [b"1.1 p"], b"Forwarded": [b"for=x"],
    b"traceparent": [b"0"], b"Accept": [b"*/*"], b"Accept-Encoding": [b"gzip", b"br, gzip", b"*;q=0", b"gzip, *;q=0"],
    b"Connection": [b"close", b"keep-alive", b"Cookie"], b"Host": [b"t", b"a.two.test", b"u v"],
    b"Expect": [b"100-continue", b"x", b""], b"Content-Length": [b"0", b"3", b"x"], b"Transfer-Encoding": [b"chunked"]}
OFTEN = [b"If-None-Match", b"Range", b"Want-Repr-Digest", b"If-Modified-Since", b"Cookie", b"X-A", b"Referer"]


@st.composite
def line(draw):
    name = draw(st.sampled_from(OFTEN) | st.sampled_from([*VALUES]))
    value, colon = draw(st.sampled_from(VALUES[name])), draw(st.sampled_from([*[b": "] * 6, b":", b":\t", b" :"]))
    return (name.lower() if draw(st.integers(0, 9)) == 0 else name) + colon + value + b"\r\n"


@st.composite
def relatives(draw):
    """Requests that have much in common."""
    method, path, version = draw(METHODS), draw(PATHS), draw(VERSIONS)
    common = draw(st.sampled_from([b"Host: t\r\n"] * 8 + [b"host: a.two.test\r\n", b""]))
    common += draw(st.sampled_from([b"", b"", b"Accept-Encoding: gzip, br\r\n", b"Connection: close\r\n"]))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        lines = [common, *draw(st.lists(line(), max_size=4))]
        if draw(st.integers(0, 5)) == 0:
            lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(properties.WRONG_LINES)))
        behind = draw(st.sampled_from([*[b""] * 12, b"\r\n", b"Cookie: x\r\n\r\n", b"X-A: b\r\n"]))
        target = path + draw(QUERIES)
        found.append(b"%b %b %b\r\n%b\r\n%b" % (method, target, version, b"".join(lines), behind))
    return found


@properties.examples(1000)
@given(st.sampled_from([*SITES]), relatives(), st.lists(properties.of_lines() | properties.mutated(), max_size=2),
       st.integers(0, 1 << 30))
@example("one archive", [SHORT["a file"], SHORT["a browser"], LONG["a body"]], [], 0)
def test_any_bytes_get_the_same_whatever_came_before(kind, some, others, seed):
    check_often(SITES[kind](), [*some, *others], seed)


def test_what_the_strategies_make_often_has_a_short_way():
    """So that the property above means something."""
    found = []

    @properties.examples(200)
    @given(relatives())
    def collect(some):
        found.append(bool(check_often(SITES["one archive"](), some)))

    collect()
    assert sum(found) > len(found) / 3
