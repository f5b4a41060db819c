"""README.md keeps in step with the program."""

import re
import sys

from support import ROOT

import accesslog
import acceptor
import archive
import connection
import credentials
import http1
import linux
import options
import plan
import reply
import rules
import transport
import worker

sys.path.insert(0, str(ROOT / "bench"))

import readme  # noqa: E402

TEXT = (ROOT / "README.md").read_text()


def said(text):
    """The flags and defaults in a help text, however it is laid out (that differs between versions of Python)."""
    return re.findall(r"--[a-z-]+|\(default: [^)]*\)", " ".join(text.split()))


def test_flags_are_those_of_help():
    shown = TEXT.partition("<!-- help")[2].partition("<!-- /help")[0].partition("\n")[2]
    assert said(shown) == said(readme.help_block()), "run bench/readme.py"


def test_metrics_are_those_of_the_status_listener():
    assert readme.metrics_block() in TEXT, "run bench/readme.py"


def test_the_diagram_of_states_is_that_of_the_table():
    assert readme.states_block() in (ROOT / "docs/DESIGN.md").read_text(), "run bench/readme.py"


def test_every_module_has_its_place_in_the_reading_order():
    order = TEXT.partition("### Reading order")[2].partition("Arrows")[0]
    assert set(re.findall(r"`(\w+\.py)`", order)) == {path.name for path in ROOT.glob("*.py")}


def test_links_lead_somewhere():
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for target in re.findall(r"\]\(([^)]*)\)", TEXT):
        assert target[1:] in anchors if target.startswith("#") else (ROOT / target).exists(), target


def test_limits_are_those_of_the_code():
    kib, mib = 1 << 10, 1 << 20
    for said in (f"| {http1.MAX_LINE // kib} KiB, {http1.MAX_HEAD // kib} KiB |", f"| {http1.MAX_BODY // kib} KiB |",
                 f"pieces of {plan.SEND_SIZE // kib} KiB, after {connection.SEND_GRACE} s of grace",
                 f"counts after {acceptor.OWING} s",
                 f"taken {acceptor.PACE // kib} KiB of a response within {acceptor.STALL} s",
                 f"| {worker.MAX_PENDING // kib} KiB for each connection |",
                 f"| {linux.UNSENT // kib} KiB in the kernel",
                 f"| {reply.MAX_RANGES} |",
                 f"| {archive.OWN_MAX // kib} KiB for each file, {rules.LINE_MAX:,} bytes for a line, "
                 f"{rules.EXACT_MAX:,} rules with a fixed path, {rules.PATTERNS_MAX} with",
                 f"put into one response | {rules.FILLED_MAX // kib} KiB |",
                 f"a buffer of {-(-transport.LARGE_BUFFER // kib)} KiB for each connection |",
                 f"| {transport.MEMO_PLAINTEXT // mib} MiB, for each worker |",
                 f"| {plan.COLD_SEND_SIZE // kib} KiB |", f"| {accesslog.MAX_WAITING // mib} MiB, for each worker |",
                 f"| {options.MAX_WORKERS} | no further reload |",
                 f"every\n  {credentials.TICKET_PERIOD // 3600} hours",
                 f"| {plan.MEMO_PLANS // mib} MiB and {plan.MEMO_REQUESTS // mib} MiB, for each worker |",
                 f"| {plan.MEMO_BLOCKS // mib} MiB, for each worker |"):
        assert said in TEXT
