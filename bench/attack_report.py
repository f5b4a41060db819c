"""Turns attacks.json into ATTACKS.md. No measuring."""

import json
import statistics
import sys
from pathlib import Path

import attacks
import report
from attack_clients import ATTACKS, SOURCES

QUIET = {"none": "no attack", "none, TLS": "TLS: no attack"}

METHOD = """Visitors ask for a file of 1 KiB while an attack goes on: {rate} a second over a new connection each
("new"),
and as many over {kept} connections that are kept ("kept"). Answered: within {patience} seconds of when it was due,
however late it could be sent; what was not counts as {patience} seconds in p99. A kept connection that the server has
closed is opened anew, and the request repeated in the same time. Figures are of {rounds} rounds of {seconds} seconds
together, the servers taking turns; p99 and CPU (of one core, all processes of the server) are medians of the rounds.
MiB: memory (Pss) without the tar, before the attack, and half a second after the end of the first and of the last one.

One worker each, on core 0; visitors on core 1, beside the attackers, which have a lower priority. Both servers allow
{limit} connections, let {backlog} wait, and have 5 seconds for a request to arrive, 60 between requests; nginx gives up
on a reader that takes nothing for 10 seconds (`send_timeout`), tarweb on one slower than `--min-rate`; otherwise nginx
is set up as in the bench. Attackers come from {sources} addresses and open a new connection for each that ends. nginx
has nothing like `--max-per-ip` ({per_ip} here): its `limit_conn` counts a connection once a whole request head has
come."""


def title(name):
    """What an attack does, in words."""
    return QUIET.get(name) or ATTACKS[name].title


def answered(rounds, kind):
    """Per cent of visitors who got their answer, over all rounds."""
    asked = sum(each[kind]["asked"] for each in rounds)
    share = 100 * sum(each[kind]["answered"] for each in rounds) / asked
    return "100" if share == 100 else f"{min(share, 99.9):.1f}"


def row(server, seen):
    """The row of one server under one attack."""
    rounds, cells = seen["rounds"], []
    for kind in ("fresh", "kept"):
        cells += [answered(rounds, kind), f"{statistics.median(each[kind]['p99'] for each in rounds):,.1f}"]
    sizes = [seen["before"], rounds[0]["memory"], rounds[-1]["memory"]]
    cells += [f"{100 * statistics.median(each['cpu'] for each in rounds):.0f}", *(f"{kib / 1024:.1f}" for kib in sizes)]
    died = "" if all(each["survived"] for each in rounds) else " (a worker died)"
    return [f"{server}{died}", *cells]


def section(name, case):
    head = ["", "new: % answered", "p99, ms", "kept: % answered", "p99, ms", "CPU, %", "MiB before", "after one",
            "at last"]
    rows = [row(server, seen) for server, seen in case["servers"].items()]
    heading = case["title"] if name in QUIET else f"{name}: {case['title']}"
    return f"### {heading}\n\n{report.table(head, rows)}"


def overview(results):
    """Under which attacks each server answered all visitors."""
    rows = []
    for case in results["attacks"].values():
        cells = {server: f"{answered(seen['rounds'], 'fresh')} / {answered(seen['rounds'], 'kept')}"
                 for server, seen in case["servers"].items()}
        rows.append([case["title"], *(cells.get(server, "-") for server in attacks.SETUPS)])
    return report.table(["% of visitors answered, new / kept", *attacks.SETUPS], rows)


def markdown(results):
    """All of ATTACKS.md."""
    rounds = len(next(iter(next(iter(results["attacks"].values()))["servers"].values()))["rounds"])
    method = METHOD.format(rate=attacks.RATE, kept=attacks.KEPT, patience=attacks.PATIENCE, rounds=rounds,
                           seconds=attacks.SECONDS, limit=f"{attacks.LIMIT:,}", backlog=attacks.BACKLOG,
                           sources=len(SOURCES), per_ip=attacks.PER_IP)
    machine = [f"- {name}: {value}" for name, value in results["machine"].items()]
    parts = ["# Under attack", "Written by `.venv/bin/python bench/attacks.py`.", overview(results), method]
    parts += [section(name, case) for name, case in results["attacks"].items()]
    return "\n\n".join([*parts, "## Machine", "\n".join(machine)]) + "\n"


def write(directory):
    """Write ATTACKS.md beside the attacks.json of `directory`; gives its text."""
    text = markdown(json.loads((directory / "attacks.json").read_text()))
    (directory / "ATTACKS.md").write_text(text)
    return text


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
