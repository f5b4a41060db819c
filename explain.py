"""--explain: what a request gets, and why. Nothing is sent, and nothing listens.

The request goes the way of one that has come in: through worker.Http1, a Site and a Responder. The transport keeps what
it is to send; the Responder is of a class that notes what it looks up, and which of the site's rules match.
"""

import os
import sys
from copy import copy
from typing import Any

from archive import Library, Redirect, Resource
from clock import Counts
from connection import ACCEPTED, Connection, Connections, Limits
from generation import Generation
from linux import address_of
from plan import make_site
from reply import FullResponse, Responder
from tar import shown
from worker import Http1

TIMES = 32      # often enough for any request that can be remembered: some header blocks have their turn each 8th time


class Explained(Responder):
    """A Responder that notes what it does for its latest request. It stands in for the archive that it asks.

    looked_up: {path: what was found there}. redirects, headers: {number: whether it counts} of the lines of these files
    that match. latest: the Reply or FullResponse; None before the first request."""

    def __init__(self, archive, cache_control, rules, *more):
        super().__init__(archive, cache_control, copy(rules), *more)
        self.files, self.archive, self.latest = archive, self, None
        self.stored = self.look_up(archive.stored if rules else archive.find)
        self.find = self.look_up(archive.find)
        self.sha256 = archive.sha256
        if rules:
            self.rules.of_origin = self.note_matches

    def look_up(self, find):
        def noted(path):
            found = find(path)
            self.looked_up.setdefault(path, found)
            return found
        return noted

    def note_matches(self, *arguments):
        for match in type(self.rules).of_origin(self.rules, *arguments):
            self.note(match[0])
            yield match

    def note(self, line):
        (self.redirects if hasattr(line, "status") else self.headers)[line.line] = True      # a Rule has one

    def reply(self, request):
        self.looked_up, self.redirects, self.headers = {}, {}, {}
        found = self.files.find(request.path)
        if self.rules and isinstance(found, Resource):      # what the rules say of it is in the index already
            rule = self.rules.leading(request.path, self.files.stored(request.path))
            for line in ((rule,) if rule else ()) + found.blocks:
                self.note(line)
        self.latest = super().reply(request)
        return self.latest

    def by_rule(self, request, existing, rule):
        if rule:
            self.note(rule)
        reply = super().by_rule(request, existing, rule)
        if reply is None:                       # a rule may match, and not count
            self.redirects = dict.fromkeys(self.redirects, False)
        return reply


class Client:
    """Has requests answered by a Site, each on a connection of its own, whose transport keeps what it is to send."""

    def __init__(self, site, library):
        self.site, self.sent = site, None
        self.connections = Connections(None, 0, Limits(), Counts())
        self.http = Http1(self.connections, library)

    def ask(self, data):
        """The Plan for the bytes of a request. A body that is announced and missing is made up."""
        if plan := self.site.known(data) or self.site.answer(data):         # as Worker.run does
            return plan
        connection: Any = Connection(0)
        connection.site, connection.known, connection.answer = self.site, self.site.known, self.site.answer
        connection.transport, self.sent = self, None
        self.connections.move(connection, ACCEPTED)
        self.http.on_data(connection, data)
        if self.sent and self.sent.status != 100:
            return self.sent
        fields = connection.request.fields
        return self.ask(data + (b"0\r\n\r\n" if fields.transfer_encoding else bytes(fields.content_length)))

    def send(self, _connection, plan):
        self.sent = plan

    def go_on(self, connection):
        """There is nothing more to receive."""


def explain(options, make_memo):
    """Print what the request of --explain gets. make_memo: gives the Memo for a Library. The exit status; raises what
    main explains."""
    generation = Generation(options._replace(access_log=None, hugepages=0))
    try:
        library = Library(generation.archives())
        memo = make_memo(library)
        responders = generation.responders("https" if options.tls_cert else "http", Explained)
        client, data = Client(make_site(memo, responders), library), request_bytes(options.explain, options.header)
        head, body = spelled(memo, client.ask(data))
        asked = next((responder for responder in responders.values() if responder.latest), None)
        facts = [*(facts_of(asked) if asked else ()), ("remembered", remembered(client, data))]
    finally:
        generation.close_all_but(None)
    told = b"".join([b"%-16b%b\n" % (label.encode(), os.fsencode(text)) for label, text in facts])
    sys.stdout.buffer.write((data + head).replace(b"\r\n", b"\n") + body + b"\n" + told)
    return 0


def request_bytes(line, fields):
    """The bytes of a request with that request line, whose version may be left out, and these header lines; with a
    Host, where there is none."""
    if not line.rpartition(" ")[2].startswith("HTTP/"):
        line += " HTTP/1.1"
    if line.endswith("/1.1") and not any(field.lower().startswith("host:") for field in fields):
        fields = ["Host: localhost", *fields]
    return os.fsencode("".join(f"{text}\r\n" for text in (line, *fields, "")))


def spelled(memo, plan):
    """(the head of a Plan, what is said of its body: what is made for it as it is, of files how much)."""
    (head_at, head_size), *spans = plan.spans()
    head_at -= address_of(memo.status_heads.memory)
    own, pieces = range(plan.address, plan.address + len(plan.memory)), []
    for address, length in spans:
        start = address - plan.address
        pieces.append(bytes(plan.memory[start:start + length]) if address in own
                      else b"(%d bytes of the archive)\n" % length)
    header, *body = pieces
    return memo.status_heads.memory[head_at:head_at + head_size] + header, b"".join(body)


def remembered(client, data):
    """Whether the same request is answered without a look at what it says when it comes again."""
    plans = [client.ask(data) for _ in range(TIMES)]
    if client.site.known(data):
        return "yes: once it has come a few times, its bytes lead to this response at once"
    if plans[-1] is plans[-2]:
        return "the response, not the request: that is read each time"
    return "no: the response is made each time"


def facts_of(explained):
    """(label, text) of each thing that an Explained has done for its latest request."""
    archive = explained.files
    yield "site", f"{archive.path}, by {explained.scheme.decode()}"
    for path, found in explained.looked_up.items():
        yield "looked up", f"{shown(path)}: {what(found)}"
    if chosen := representation(explained):
        names = [path for path, found in archive.items()
                 if isinstance(found, Resource) and found.plain.offset == chosen.offset]
        yield "representation", f"{shown(min(names, key=len))}, {words(chosen)}"
    for file, lines in (("_redirects", explained.redirects), ("_headers", explained.headers)):
        for number, counts in lines.items():
            text = os.fsdecode(archive.own[file].split(b"\n")[number - 1].strip())
            yield "rule", f"{file}, line {number}: {text}{' (matches, but does not count here)' * (not counts)}"


def what(found):
    """What was found at a path, in words."""
    if found is None:
        return "nothing"
    if isinstance(found, Redirect):
        return "a directory"
    if isinstance(found, Resource):
        return " or ".join(map(words, (found.plain, *found.variants)))
    return f"{what(found.existing)}, and the site's rules are asked"


def words(one):
    """A Representation in words."""
    return f"{one.length} bytes{' in ' * bool(one.coding)}{one.coding}"


def representation(explained):
    """The Representation that is sent, in whole or in part, or asked for again; None where there is none."""
    reply = explained.latest
    if isinstance(reply, FullResponse):
        return reply.chosen
    tag = dict(reply.fields).get(b"ETag")
    sent = {span for span in reply.body if not isinstance(span, bytes)}
    for found in explained.looked_up.values():
        found = getattr(found, "existing", found)
        for one in (found.plain, *found.variants) if isinstance(found, Resource) else ():
            if one.etag == tag if tag else sent & {*one.spans()}:
                return one
    return None
