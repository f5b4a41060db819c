"""Numbers that all processes share, and the status listener's answers: to probes, to Prometheus, and a page for people.

A worker counts in attributes of its own (`Counts`) and writes them once a second into its row of the `Scoreboard`,
memory that was there before the workers were forked. A row has one writer, and each number is one 8-byte store, so no
lock is needed: a reader sees a number as it was or as it is. When a worker has ended, the parent adds what it counted
to the row of those that are no more, and the row is free; a reader of sums looks again if that has happened meanwhile.
"""

import base64
import contextlib
import hashlib
import html
import json
import mmap
import time
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from clock import COUNTERS, NUMBERS
from options import MAX_WORKERS
from reply import NO_STORE, READ_ONLY, content_reply, error_reply

# What the parent knows. Times are in seconds since the epoch; `ready` and `stopping` are 0 or 1.
SERVER = ("started", "generation", "reloads", "reloads_failed", "last_reload", "ready", "stopping",
          "workers", "draining", "restarts")
WORD = 8                        # bytes
ROWS = MAX_WORKERS + 1          # processes at a time: the one that answers the status listener has a row, too
PAST = ROWS                     # the row of those that are no more
TEXT_SIZE = 1024 * 1024         # bytes
TEXT, PAGE = b"text/plain; charset=utf-8", b"text/html; charset=utf-8"
EXPOSITION = b"text/plain; version=0.0.4; charset=utf-8"    # prometheus.io/docs/instrumenting/exposition_formats
REFRESH = 5                     # seconds after which the page asks again


# --- numbers

class Scoreboard:
    """Rows of numbers for the workers, a row for the server, and a text."""

    def __init__(self):
        self.server_at = (ROWS + 1) * len(NUMBERS)
        self.size_at = self.server_at + len(SERVER)
        self.folds_at = self.size_at + 1            # a count that is odd while a row is folded
        # Memory that is shared with all processes forked from now on.
        self.words = memoryview(mmap.mmap(-1, (self.folds_at + 1) * WORD)).cast("Q")
        self.text = mmap.mmap(-1, TEXT_SIZE)
        self.free = list(reversed(range(ROWS)))

    # the parent

    def take_row(self):
        """A row for a new worker; None where all are taken."""
        return self.free.pop() if self.free else None

    def free_row(self, row):
        """Its worker has ended: keep what it counted, drop what it had."""
        start, past = row * len(NUMBERS), PAST * len(NUMBERS)
        self.words[self.folds_at] += 1
        for i, name in enumerate(NUMBERS):
            self.words[past + i] += self.words[start + i] if name in COUNTERS else 0
            self.words[start + i] = 0
        self.words[self.folds_at] += 1
        self.free.append(row)

    def set(self, **values):
        for name, value in values.items():
            self.words[self.server_at + SERVER.index(name)] = int(value)

    def add(self, name):
        self.words[self.server_at + SERVER.index(name)] += 1

    def introduce(self, generation, number, urls):
        """Describe the generation that serves as the `number`-th."""
        sites = [{"host": host, "path": archive.path, "files": archive.files, "bytes": archive.bytes,
                  "size": archive.size, "mtime": archive.identity[3] // 10 ** 9, "etag": archive.digest,
                  "generation": number} for host, archive in zip(generation.layers, generation.newest, strict=True)]
        self.describe(json.dumps({"version": generation.options.version, "sites": sites, "listeners": urls,
                                  "tls": generation.tls.words if generation.tls else "",
                                  "error": generation.error or generation.log_error}))

    def describe(self, text):
        """Set the text, cut to TEXT_SIZE. A reader could see a mix of two; it is for people, and changes rarely."""
        data = text.encode()[:TEXT_SIZE]
        self.text[:len(data)] = data
        self.words[self.size_at] = len(data)

    # a worker

    def publish(self, row, counts):
        for i, name in enumerate(NUMBERS, row * len(NUMBERS)):
            self.words[i] = getattr(counts, name)

    # whoever asks

    def totals(self):
        """The sum over all workers of each of NUMBERS, those that are no more included for COUNTERS."""
        for _ in range(100):        # tries
            folds = self.words[self.folds_at]
            sums = {name: sum(self.words[i:self.server_at:len(NUMBERS)]) for i, name in enumerate(NUMBERS)}
            if not folds % 2 and folds == self.words[self.folds_at]:
                break
        return sums

    def server(self):
        """The numbers of SERVER."""
        return {name: self.words[self.server_at + i] for i, name in enumerate(SERVER)}

    def description(self):
        return self.text[:self.words[self.size_at]].decode(errors="replace")


# --- the table of metrics

class Metric(NamedTuple):
    """numbers: each name that it shows, of Scoreboard.totals() or server(), with its labels. A metric of the archives
    shows what the description has for each site, and its labels too say what of that."""

    name: str                   # behind tarweb_
    help: str
    numbers: dict[str, dict[str, str]]


def one(name, number, words):
    return Metric(name, words, {number: {}})


def by(label, name, words, **values):
    return Metric(name, words, {number: {label: value} for number, value in values.items()})


METRICS = {
    "Requests": (
        by("class", "responses_total", "Responses sent, in full or in part, by the class of their status.",
           **{f"responses_{status}xx": f"{status}xx" for status in range(1, 6)}),
        one("sent_bytes_total", "bytes_sent", "Bytes of responses sent, headers included, what TLS adds not."),
        by("result", "memo_lookups_total", "Requests looked up by their bytes. What comes often is a hit: not parsed.",
           memo_hits="hit", memo_misses="miss"),
        one("cold_reads_total", "cold", "Pieces of responses that were read from the disk before they were sent."),
        one("archive_faults_total", "faults", "Responses cut off because the archive could not be read. Should be 0."),
    ),
    "Connections": (
        by("state", "connections", "Open connections. Those that wait for room are in another state too.",
           **{state: state for state in ("handshake", "idle", "reading", "sending", "closing", "waiting")}),
        one("connections_stuck", "stuck", "Connections that cannot be closed: a cancelled operation does not end (a "
            "disk does not answer). Should be 0."),
        one("connections_accepted_total", "accepted", "Connections accepted, or passed by another process."),
        one("connections_passed_total", "passed", "Of these, connections passed by another process (--passfd)."),
        one("connections_reclaimed_total", "reclaimed", "Connections closed to make room for new ones."),
        one("connections_crowded_total", "over_limit", "Connections closed because of --max-per-ip."),
        one("connections_timed_out_total", "timed_out", "Connections closed by a limit in time, --min-rate included."),
        one("proxy_refused_total", "proxy_refused", "Connections closed because of their PROXY header."),
        one("accept_errors_total", "accept_errors", "Failures to accept, for want of memory or descriptors."),
        one("receive_retries_total", "no_buffers", "Receives that found all buffers taken, and were tried again."),
        one("ring_overflows_total", "overflows", "Completions that the ring had no room for. Should be 0."),
    ),
    "TLS": (
        Metric("handshakes_total", "TLS handshakes completed, by who encrypts then, and whether a session was resumed.",
               {f"{kind}_{how}": {"kind": kind, "resumed": resumed} for kind in ("kernel", "userspace")
                for how, resumed in (("full", "no"), ("resumed", "yes"))}),
        one("handshakes_failed_total", "handshakes_failed", "TLS handshakes that failed."),
        one("truncated_total", "truncated", "Connections that clients ended without TLS's close_notify."),
    ),
    "Access log": (
        one("log_lines_total", "log_lines", "Lines written to the access log."),
        one("log_lines_dropped_total", "log_dropped", "Lines dropped because the log took them too slowly, or not."),
    ),
    "Server": (
        one("start_time_seconds", "started", "When the server began to serve, in seconds since 1970."),
        one("ready", "ready", "1 while requests are served and no stop has been asked for, else 0."),
        one("stopping", "stopping", "1 once the server has been told to stop, else 0."),
        one("generation", "generation", "Which generation serves: 1 at first, and one more after each reload."),
        by("result", "reloads_total", "Reloads, by whether the new generation took over.",
           reloads="success", reloads_failed="failure"),
        one("last_reload_success", "reload_success", "0 if the last reload failed, else 1."),
        one("last_reload_time_seconds", "last_reload", "When the last reload was, in seconds since 1970, or 0."),
        by("state", "workers", "Worker processes that serve, or that finish what they were sending before a reload.",
           workers="serving", draining="draining"),
        one("worker_restarts_total", "restarts", "Processes that have died and been replaced. Should be 0."),
    ),
}
METRICS_OF_NUMBERS = [metric for metrics in METRICS.values() for metric in metrics]
OF_SITE = {"site": "host"}
ARCHIVES = (
    Metric("archive_info", "Always 1, for each archive: its host (none: any other), path and identity.",
           {"one": OF_SITE | {"path": "path", "etag": "etag"}}),
    Metric("archive_files", "Files in the archive that are served.", {"files": OF_SITE}),
    Metric("archive_bytes", "Bytes of these files.", {"bytes": OF_SITE}),
    Metric("archive_size_bytes", "Bytes of the tar.", {"size": OF_SITE}),
    Metric("archive_mtime_seconds", "When the tar was written, in seconds since 1970.", {"mtime": OF_SITE}),
)
INFO = Metric("info", "Always 1: the version, and where TLS is done.", {"one": {"version": "version", "tls": "tls"}})

STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { max-width: 72rem; margin: auto; padding: 0 1rem 1rem; }
h1, h2 { font-size: 1.1rem; margin: 0; padding: 1rem 0 .3rem; }
.state { padding: .5rem .8rem; border-left: .4rem solid #2a2; background: #8882; overflow-wrap: anywhere; }
.bad { border-color: #d33; }
.wide { overflow-x: auto; }
.groups { columns: 20rem; column-gap: 2rem; }
section { break-inside: avoid; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .1rem .8rem .1rem 0; border-top: 1px solid #8884; }
th { font-weight: normal; }
td { font-variant-numeric: tabular-nums; }
.wide td { white-space: nowrap; }
.groups td { text-align: right; padding-right: 0; }
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest())
CONTENT_SECURITY = b"Content-Security-Policy", (b"default-src 'none'; style-src 'sha256-%b'; base-uri 'none'; "
                                               b"form-action 'none'; frame-ancestors 'none'" % STYLE_HASH)


class StatusResponder:
    """Answers with what is on the Scoreboard at that moment."""

    def __init__(self, scoreboard):
        self.scoreboard = scoreboard
        self.about: dict = {}           # the description, as it could be read last

    def reply(self, request):
        path = request.path
        if request.method not in (b"GET", b"HEAD"):
            return error_reply(405, "this can be read, and nothing else", request, (READ_ONLY,), NO_STORE)
        if path == b"/healthz":
            return answer(request, 200, TEXT, "ok\n")
        if path == b"/readyz":
            hindrance = why_not_ready(self.scoreboard.server())
            return answer(request, 503 if hindrance else 200, TEXT, f"{hindrance or 'ready'}\n")
        if path == b"/metrics":
            return answer(request, 200, EXPOSITION, exposition(*self.look()))
        if path == b"/":
            return answer(request, 200, PAGE, page(time.time(), *self.look()), CONTENT_SECURITY)
        return error_reply(404, "", request, caching=NO_STORE)

    def look(self):
        """(numbers, description) of now."""
        with contextlib.suppress(ValueError):       # it is being written
            self.about = json.loads(self.scoreboard.description())
        success = {"reload_success": int(not self.about.get("error"))}
        return self.scoreboard.totals() | self.scoreboard.server() | success, self.about


def answer(request, status, media_type, text, *extra):
    content = text.encode(errors="replace")         # a path need not be UTF-8
    return content_reply(status, media_type, content, request, (NO_STORE, *extra))


def why_not_ready(numbers):
    """In a word or two; "" where it is ready."""
    if numbers["stopping"]:
        return "stopping"
    if not numbers["started"]:
        return "starting"
    return "" if numbers["ready"] and numbers["workers"] else "no worker"


# --- for Prometheus

ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})       # in labels


def series(metric, numbers, about):
    """(labels, value) of all that a metric shows."""
    if metric in METRICS_OF_NUMBERS:
        return [(labels, numbers[name]) for name, labels in metric.numbers.items()]
    things = about.get("sites", ()) if metric in ARCHIVES else (about,)
    return [({label: thing.get(key, "") for label, key in labels.items()}, thing.get(name, 1))
            for thing in things for name, labels in metric.numbers.items()]


def exposition(numbers, about):
    """All metrics in the text format."""
    lines: list[str] = []
    for metric in (*METRICS_OF_NUMBERS, *ARCHIVES, INFO):
        name, kind = f"tarweb_{metric.name}", "counter" if metric.name.endswith("_total") else "gauge"
        lines += f"# HELP {name} {metric.help}", f"# TYPE {name} {kind}"
        for labels, value in series(metric, numbers, about):
            pairs = ",".join(f'{label}="{text.translate(ESCAPES)}"' for label, text in labels.items())
            lines.append(f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}")
    return "".join(f"{line}\n" for line in lines)


# --- for people

def page(wall, numbers, about):
    """HTML that needs nothing else, and asks again by itself."""
    hindrance, error = why_not_ready(numbers), about.get("error")
    state = f"not ready: {hindrance}" if hindrance else "ready"
    failure = f"; the last reload failed: {error}" if error else ""
    sites = [[site["host"] or "any", site["path"], site["etag"], f"{site['files']:,}", f"{site['bytes']:,}",
              date(site["mtime"])] for site in about.get("sites", ())]
    groups = "".join(f"<section>\n<h2>{title}</h2>\n{table(rows(metrics, numbers))}</section>\n"
                     for title, metrics in METRICS.items() if title != "TLS" or about.get("tls"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="{REFRESH}">
<title>tarweb: {html.escape(state)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>tarweb {html.escape(about.get("version", ""))}</h1>
<p class="state{' bad' * bool(hindrance or error)}">{html.escape(state + failure)}</p>
<p>{html.escape(summary(wall, numbers, about))}</p>
<h2>Archives</h2>
<div class="wide">
{table(sites, ["host", "path", "identity", "files", "bytes", "changed"])}</div>
<div class="groups">
{groups}</div>
</body>
</html>
"""


def summary(wall, numbers, about):
    hits = numbers["memo_hits"]
    share = 100 * hits / max(1, hits + numbers["memo_misses"])
    uptime = timedelta(seconds=max(0, int(wall) - numbers["started"])) if numbers["started"] else "0"
    return (f"Up {uptime}; generation {numbers['generation']}; {numbers['reloads']} reloads and "
            f"{numbers['reloads_failed']} failed ones. Memo hits: {share:.1f} %. TLS: {about.get('tls') or 'none'}. "
            f"Listens on {', '.join(about.get('listeners', ()))}.")


def rows(metrics, numbers):
    """[what, how many] for each number of these metrics."""
    for metric in metrics:
        words = metric.name.removesuffix("_total").removesuffix("_seconds").replace("_", " ")
        for labels, value in series(metric, numbers, {}):
            label = ", ".join(labels.values() if len(labels) == 1 else map(" ".join, labels.items()))
            yield [f"{words}: {label}" if label else words,
                   date(value) if metric.name.endswith("time_seconds") else f"{value:,}"]


def table(lines, heads=()):
    """Of rows of texts, the first of which says what the row is about."""
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = "".join(f'<tr><th scope="row">{html.escape(what)}</th>' + "".join(
        f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>\n" for what, *texts in lines)
    return f"<table>\n{f'<tr>{top}</tr>{chr(10)}' if top else ''}{body}</table>\n"


def date(seconds):
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC" if seconds else "never"
