"""Writes into README.md what a program can print: the flags, as --help gives them, and the figures of results.json.

    python3 bench/readme.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("small", "browser", "miss", "files", "24k", "1m", "100m", "newconn",
         "tls-small", "tls-1m", "tls-handshake", "tls-resume")


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
        found = report.ratios(case, "tarweb")
        if found:
            cpu = [f"{report.median(case, server, 'cpu'):.3g}" for server in ("tarweb", report.REFERENCE)]
            rows.append([case["title"], *cpu, report.spread(found)])
    machine = results["machine"]
    source = f"Smaller is better. One worker each ({machine['CPU']}; {machine['kernel']}; {machine['Python']}).\n" \
        "All cases, the other servers and the targets: [bench/RESULTS.md](bench/RESULTS.md);\n" \
        "what falls short of them, and why: [bench/README.md](bench/README.md)."
    return f"{report.table(['CPU µs for each request', 'tarweb', 'nginx', 'ratio (min - max)'], rows)}\n\n{source}"


def replace(text, name, block):
    """`text` with `block` between the marks <!-- name --> and <!-- /name -->."""
    return re.sub(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", lambda mark: f"{mark[1]}{block}\n{mark[2]}",
                  text, flags=re.DOTALL)


def main():
    readme, results = ROOT / "README.md", ROOT / "bench" / "results.json"
    text = replace(readme.read_text(), "help", help_block())
    if results.exists():
        text = replace(text, "figures", figures_block(json.loads(results.read_text())))
    readme.write_text(text)


if __name__ == "__main__":
    main()
