"""Measures this checkout beside another one, say of the parent commit, in turns within one run.

    TARWEB_BEFORE=../before/tarweb.py python3 bench/against.py [--rounds N] [--only CASE,CASE] [--python PYTHON]

Prints CPU for each request of both, and the ratio of this one to the other round by round: median (min - max). Then
the CPU that starting to serve a small site takes, with and without .pyc files.
"""

import dataclasses
import os
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import cases
import content
import procfs
import report
import run
from servers import BEFORE, TARWEBS, Site, serving

ROWS = ("small", "browser", "miss", "files", "mix", "missing", "conditional", "ranges", "bombs", "24k", "1m", "100m",
        "newconn", "log", "log-miss",
        "tls-small", "tls-browser", "tls-mix", "tls-24k", "tls-1m", "tls-handshake", "tls-resume")
STARTS = 15


def setups(case):
    """What `case` compares: both checkouts, with an access log where the case is about one."""
    logged = cases.LOGGED["tarweb, combined"].flags if case.setups is cases.LOGGED else ()
    return {name: cases.Setup(name, logged, "before") for name in TARWEBS}


def row(name, found):
    ratios = report.ratios(found, "tarweb", "before")
    cpu = [f"{report.median(found, server, 'cpu'):.4g}" for server in ("before", "tarweb")]
    return [found["title"], *cpu, report.spread(ratios) if ratios else "-"]


def starts(site, folder, cached):
    """A row for the CPU that starting takes until a small site is served, with .pyc files in `folder` or without."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    if cached:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    else:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    found = {name: [] for name in TARWEBS}
    for number in range(STARTS + 1):
        for name in TARWEBS:
            with serving(name, site) as server:
                found[name] += [procfs.cpu_seconds(server.pids) * 1000] * bool(number)      # the first one warms up
    ratios = sorted(now / then for then, now in zip(found["before"], found["tarweb"], strict=True))
    return [f"start of a small site, {'with' if cached else 'without'} .pyc (ms)",
            *(f"{statistics.median(found[name]):.4g}" for name in ("before", "tarweb")), report.spread(ratios)]


def main():
    options = run.arguments()
    if not BEFORE:
        sys.exit("TARWEB_BEFORE has to name the other checkout's tarweb.py")
    run.prepare()
    lines = []
    with tempfile.TemporaryDirectory(prefix="tarweb-bench-") as temporary:
        site = Site(Path(temporary) / "site", Path(temporary) / "site.tar", options.python)
        site.directory.mkdir()
        content.write_site(site.directory, site.tar)
        small = dataclasses.replace(site, tar=site.tar.parent / "small.tar")
        with tarfile.open(small.tar, "w") as tar:
            tar.add(site.directory / "small", "small")
        lines += [starts(small, Path(temporary) / "pyc", cached) for cached in (False, True)]
        for name in options.only.split(",") if options.only else ROWS:
            cases.CASES[name] = dataclasses.replace(cases.CASES[name], setups=setups(cases.CASES[name]))
            lines.append(row(name, cases.measure(name, site, options.rounds, options.seconds)))
    print(report.table(["case", "before", "now", "now / before"], lines))


if __name__ == "__main__":
    main()
