"""What depends on the host that a request names: which site answers it, and where the plain port sends it."""

import atexit
import functools
import os
import re
import shutil
import tempfile
from urllib.parse import unquote_to_bytes, urlsplit

from http_targets import read_by_h11

import http1
from archive import Library
from credentials import read_acme_challenge
from http1 import HttpError
from plan import Memo, VirtualHosts, header_section
from reply import CHALLENGES, Redirector

WORDS = (b"Host: ", b"\r\nHost: a.example.org", b"[::1]", b":80", b":443", b"example.org.", b"A.EXAMPLE.ORG",
         b"x.example.org", b"http://", b"https://", CHALLENGES, CHALLENGES + b"token", CHALLENGES + b"link", b"../",
         b"%2f", b"%0d%0a", b"?", b"//", b"@", b"HEAD ", b"POST ", b".", b"*.", b"%2e%2e/")


@functools.cache
def directory():
    """The descriptor of one with a challenge, and with what must not be read."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    challenges = os.path.join(os.fsencode(folder), CHALLENGES[1:])
    os.makedirs(challenges + b"folder")
    beside = os.path.join(os.fsencode(folder), b"")
    for place, content in ((challenges + b"token", b"here"), (beside + b"secret", FILES[CHALLENGES + b"secret"]),
                           (beside + b"large", bytes(5000))):
        with open(place, "wb") as file:
            file.write(content)
    os.symlink("/proc/version", challenges + b"link")
    return os.open(folder, os.O_PATH | os.O_DIRECTORY)


FILES = {CHALLENGES + b"token": b"here", CHALLENGES + b"secret": b"in the directory itself"}
LOCATION = re.compile(rb"\r\nLocation: (https://[!-~]+)\r\n")
NAMES = {b"": "default", b"a.example.org": "exact", b"*.example.org": "wildcard", b"[::1]": "address"}
HOSTS = VirtualHosts(Memo(Library([]), b"tarweb", 0), NAMES)


def host(data):
    """A whole head: the site is that of its host, and the redirect leads to the same host and path over HTTPS."""
    port, head = (443, 8443)[data[:1] > b"\x7f"], data[1:]
    try:
        end = http1.find_head(head, 0)
        if end < 0:
            return
        asked = http1.parse_head(head[:end])
    except HttpError:
        return
    assert HOSTS.find(asked.fields.host or b"") == expected_site(asked.fields.host or b"")
    made = Redirector(port, functools.partial(read_acme_challenge, directory())).reply(asked)
    body = read_by_h11(asked, made)
    if made.status == 301:
        check_location(LOCATION.search(b"\r\n" + header_section(made))[1].decode(), asked, port)
    elif made.status == 200:
        assert FILES[asked.path] == (body or FILES[asked.path])
        assert body or asked.method == b"HEAD"
    else:
        assert made.status in (400, 404, 405)


def expected_site(value):
    name = value[:value.index(b"]") + 1] if value.startswith(b"[") else value.split(b":")[0]
    labels = name.lower().split(b".")
    if labels[-1] == b"" and len(labels) > 1:
        labels.pop()
    name, above = b".".join(labels), b".".join([b"*", *labels[1:]])
    return NAMES.get(name) or labels[0] and len(labels) > 1 and NAMES.get(above) or NAMES[b""]


def check_location(location, asked, port):
    """As a browser takes it apart, which refuses what is in brackets and no address."""
    try:
        parts = urlsplit(location)
    except ValueError:
        assert "://[" in location
        return
    name, colon, _ = asked.fields.host.rpartition(b":") if not asked.fields.host.endswith(b"]") else (b"", b"", b"")
    name = name if colon else asked.fields.host
    assert parts.scheme == "https"
    assert parts.netloc.encode() == name + (b"" if port == 443 else b":%d" % port)
    assert "@" not in parts.netloc
    assert unquote_to_bytes(parts.path) == asked.path
    assert location.encode().endswith(asked.query)


def host_seeds():
    for start in (b"\0", b"\xff"):
        yield start + b"GET /a%20b?c HTTP/1.1\r\nHost: a.example.org:80\r\n\r\n"
        yield start + b"HEAD http://x.example.org./ HTTP/1.1\r\nHost: t\r\n\r\n"
        yield start + b"GET // HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n"
        yield start + b"GET " + CHALLENGES + b"token HTTP/1.1\r\nHost: a\r\n\r\n"
        yield start + b"HEAD " + CHALLENGES + b"secret HTTP/1.0\r\n\r\n"
        yield start + b"GET " + CHALLENGES + b"..%2fx HTTP/1.1\r\nHost: a\r\n\r\n"
        yield start + b"GET " + CHALLENGES + b"link HTTP/1.1\r\nHost: a\r\n\r\n"
    yield b"\0POST / HTTP/1.0\r\nHost:\r\n\r\n"
    yield b"\0OPTIONS * HTTP/1.1\r\nHost: :80\r\n\r\n"
