"""What the plain listener beside an HTTPS one answers: redirects, and ACME's challenges (RFC 8555 section 8.3)."""

import os
import re
import stat
from urllib.parse import quote_from_bytes

from archive import PATH_SAFE
from reply import Reply, Responder, connection_field

CHALLENGES = b"/.well-known/acme-challenge/"
TOKEN = re.compile(rb"[A-Za-z0-9_-]{1,255}")            # RFC 8555 section 8.3: the alphabet of base64url
LARGEST_CHALLENGE = 4096                                # bytes: a token, a dot and a thumbprint take about 90
HOST_AND_PORT = re.compile(rb"(\[[^\]]+\]|[^:]+)(?::[0-9]*)?")


class Redirector(Responder):
    """Answers every request with its address on `port` over HTTPS, and challenges from a `directory` (its descriptor).

    A challenge is looked for in .well-known/acme-challenge below that directory, where `certbot --webroot` puts it, and
    in the directory itself, where others do. The files come and go, so nothing of them is remembered.
    """

    def __init__(self, port, directory=None):
        self.port = b"" if port == 443 else b":%d" % port
        self.directory = directory

    def reply(self, request):
        """The Reply for a Request."""
        method, path, query, connection, _, fields = request
        if self.directory is not None and path.startswith(CHALLENGES):
            return self.challenge(path[len(CHALLENGES):], method, connection)
        if not path.startswith(b"/"):
            return self.error(404, "", connection, method)
        host = HOST_AND_PORT.fullmatch(fields.host or b"")
        if not host:
            return self.error(400, "without a Host nobody can be sent to https", connection, method)
        location = b"https://%b%b%b%b" % (host[1], self.port, quote_from_bytes(path, PATH_SAFE).encode(), query)
        return self.error(308, "", connection, method, b"Location: %b\r\n" % location)

    def challenge(self, token, method, connection):
        if method not in (b"GET", b"HEAD"):
            return self.error(405, "a file can be read, and nothing else", connection, method, b"Allow: GET, HEAD\r\n")
        places = (folder + token for folder in (CHALLENGES[1:], b"") if TOKEN.fullmatch(token))
        found = (read_small(place, self.directory) for place in places)
        content = next((content for content in found if content is not None), None)
        if content is None:
            return self.error(404, "there is no such challenge", connection, method)
        head = (b"Content-Type: application/octet-stream\r\nContent-Length: %d\r\nCache-Control: no-store\r\n%b\r\n"
                % (len(content), connection_field(connection)))
        return Reply(200, head, () if method == b"HEAD" else (content,), connection == b"close")


def read_small(path, directory):
    """The contents of a regular file, or None where there is none, or a link, or something large or special."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_CHALLENGE:
            return None
        return os.read(fd, LARGEST_CHALLENGE)
    except OSError:
        return None
    finally:
        os.close(fd)
