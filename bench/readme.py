"""Writes into README.md what a program can print: flags, as --help gives them; metrics; the figures of results.json;
and into docs/DESIGN.md the diagram of a connection's states.

    python3 bench/readme.py
"""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import metrics  # noqa: E402
from connection import FREE, STATES  # noqa: E402

SHOWN = ("small", "browser", "miss", "files", "mix", "missing", "conditional", "ranges", "24k", "1m", "100m", "newconn",
         "log", "two", "tls-small", "tls-mix", "tls-24k", "tls-1m", "tls-handshake", "tls-resume")
PAIRS = {"log": ("tarweb, combined", "nginx, combined"), "two": ("tarweb, 2 workers", "nginx, 2 workers")}


def help_block():
    """The output of --help, 100 columns wide."""
    environment = os.environ | {"COLUMNS": "100"}
    text = subprocess.run([sys.executable, ROOT / "tarweb.py", "--help"], env=environment, check=True,
                          capture_output=True, text=True).stdout
    return f"```\n{text}```"


def figures_block(results):
    """A table of CPU time for each request, tarweb's over nginx's, and where it comes from."""
    rows = []
    for name in SHOWN:
        case = results["cases"].get(name, {})
        pair = PAIRS.get(name, ("tarweb", report.REFERENCE))
        found = report.ratios(case, *pair)
        if found:
            medians = [report.median(case, server, "cpu") for server in pair]
            cpu = [f"{median:#.3g}" if median < 100 else f"{median:,.0f}" for median in medians]
            rows.append([case["title"], *cpu, report.spread(found)])
    machine = results["machine"]
    source = f"Smaller is better. One worker each but for the row of two ({machine['CPU']}; {machine['kernel']}; " \
        f"{machine['Python']}).\n" \
        "All cases, the other servers and the targets: [bench/RESULTS.md](bench/RESULTS.md);\n" \
        "what falls short of them, and why: [bench/README.md](bench/README.md)."
    head = ["CPU µs for each request", "tarweb", "nginx", "ratio (min - max)"]
    return f"{report.table(head, rows)}\n\n{sentences(results)}{source}"


def sentences(results):
    """A line for each of the other promises that were measured."""
    lines = []
    if log := report.ratio(results, "log", "tarweb", "tarweb, combined"):
        lines.append(f"With an access log tarweb takes {log:.2f} of the CPU that it takes without.")
    servers = report.special(results, "cold", "servers") or {}
    if servers.get("tarweb"):
        found = [f"{report.spread(report.cold_ratios(rounds))} with {name}" for name, rounds in servers.items()]
        lines.append(f"While a cold archive is read, p99 of small files, as a multiple of the quiet one: "
                     f"{', '.join(found)}.")
    served = [each["served"] for each in report.special(results, "reload", "servers", "tarweb", "reloads") or ()]
    if served:
        lines.append(f"A new archive of {report.special(results, 'reload', 'files'):,} files is served "
                     f"{statistics.median(served):.2f} s after SIGHUP.")
    return "".join(f"{line}\n" for line in lines) + "\n" * bool(lines)


def metrics_block():
    """A table of what /metrics shows."""
    rows = [["metric", "labels", "meaning"], ["---"] * 3]
    for metric in (*metrics.METRICS_OF_NUMBERS, *metrics.ARCHIVES, metrics.INFO):
        values = {}         # label -> the values that it can have, where they are known
        for labels in metric.numbers.values():
            for label, value in labels.items():
                values.setdefault(label, {})[value] = None
        known = metric in metrics.METRICS_OF_NUMBERS
        labels = "; ".join(f"`{label}`" + f": {', '.join(found)}" * known for label, found in values.items())
        rows.append([f"`tarweb_{metric.name}`", labels, metric.help])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def states_block():
    """A connection's states and the events that lead from one to the next, as a diagram."""
    steps = [f"    {state} --> {after}: {event}" for state in STATES for event, after in state.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {FREE}", *steps, "```"])


def replace(text, name, block):
    """`text` with `block` between the marks <!-- name --> and <!-- /name -->."""
    return re.sub(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", lambda mark: f"{mark[1]}{block}\n{mark[2]}",
                  text, flags=re.DOTALL)


def main():
    readme, results = ROOT / "README.md", ROOT / "bench" / "results.json"
    text = replace(readme.read_text(), "help", help_block())
    text = replace(text, "metrics", metrics_block())
    if results.exists():
        text = replace(text, "figures", figures_block(json.loads(results.read_text())))
    readme.write_text(text)
    design = ROOT / "docs" / "DESIGN.md"
    design.write_text(replace(design.read_text(), "states", states_block()))


if __name__ == "__main__":
    main()
