"""Measures tarweb beside nginx, lighttpd and http.server, and writes RESULTS.md, results.json and results.png.

    python3 bench/run.py [--quick] [--rounds N] [--only CASE,CASE] [--python PYTHON] [--out DIRECTORY]

A full run writes into bench/; one with --quick or --only into .cache/bench/, so that a trial never replaces figures
that were taken with care. All traffic stays on 127.0.0.1. Exit status 2: something it cannot do without is missing.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cases
import content
import plot
import report
import special
from servers import CLIENT_CORE, HERE, SERVER_CORE, TARWEB, Failed, Site, advice, available, find

SYSTEM_PYTHON = "/usr/bin/python3"
NEEDS_TARWEB = ("startup", "memory", "steady")
TRIAL = HERE.parent / ".cache" / "bench"


def arguments():
    """The command line, with what --quick implies filled in."""
    names = [*cases.CASES, *special.SPECIAL]
    parser = argparse.ArgumentParser(description="Measure tarweb beside nginx, lighttpd and http.server.")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 second: a trial, not a measurement")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default: 5)")
    parser.add_argument("--only", metavar="CASES", help=f"some of: {','.join(names)}")
    parser.add_argument("--python", default=SYSTEM_PYTHON if Path(SYSTEM_PYTHON).exists() else sys.executable,
                        help="the interpreter that runs tarweb and http.server (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write (default: bench/, or .cache/bench/ for a trial)")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = 1 if options.quick else 3
    options.requests = 100_000 if options.quick else 1_000_000
    options.out = options.out or (TRIAL if options.quick or options.only else HERE)
    options.cases = options.only.split(",") if options.only else names
    if unknown := set(options.cases) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    return options


def require():
    """Exit with 2 unless there is what every case needs."""
    if not find("wrk"):
        print(advice("wrk"), file=sys.stderr)
        sys.exit(2)
    if not TARWEB.exists():
        print("tarweb.py is missing: measuring the others only", file=sys.stderr)


def prepare():
    """Room for many connections, this process and its clients on their core, and SIGTERM to clean up as ^C does."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {CLIENT_CORE})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def first_line(*command):
    """The first line that `command` prints, or None if there is no such program."""
    if not find(str(command[0])):
        return None
    said = subprocess.run([find(str(command[0])), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, cwd=HERE)
    return said.stdout.partition("\n")[0].strip()


def commit():
    """The commit that is measured, "-dirty" if files differ from it, or None outside a repository."""
    said = first_line("git", "describe", "--always", "--dirty")
    return None if not said or said.startswith("fatal") else said


def machine(options):
    """What the figures were taken on: {name: words}."""
    cpu = re.search(r"^(?:model name|Model|uarch|CPU part)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": f"{options.rounds} rounds of up to {options.seconds} s" + (", a quick trial" if options.quick else ""),
        "CPU": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores; servers on core {SERVER_CORE}, "
               f"client on core {CLIENT_CORE}",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME"),
        "Python": first_line(options.python, "--version"),
        "nginx": first_line("nginx", "-v"),
        "lighttpd": first_line("lighttpd", "-v"),
        "OpenSSL": first_line("openssl", "version"),
        "wrk": first_line("wrk", "-v"),
        "strace": first_line("strace", "-V"),
        "tarweb": commit(),
    }
    return {name: value for name, value in facts.items() if value}


def measure(options, site):
    """Run the chosen cases; one that fails is reported as such and the others go on."""
    results = {"machine": machine(options), "cases": {}, "special": {}}
    for name in options.cases:
        if name in NEEDS_TARWEB and "tarweb" not in available():
            continue
        kind = "cases" if name in cases.CASES else "special"
        print(f"{name} ...", file=sys.stderr)
        try:
            results[kind][name] = run_case(name, options, site)
        except (Failed, OSError, subprocess.SubprocessError) as failure:
            print(f"{name} failed: {failure}", file=sys.stderr)
            results[kind][name] = {"title": name, "failed": str(failure)}
    return results


def run_case(name, options, site):
    """The results of one case, as its module gives them."""
    if name in cases.CASES:
        return cases.measure(name, site, options.rounds, options.seconds)
    return special.SPECIAL[name](site, options)


def write(results, directory):
    """Write results.json, results.png and RESULTS.md to `directory`, and print the last."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.png").unlink(missing_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot.draw(directory)
    print(report.write(directory))


def main():
    options = arguments()
    require()
    prepare()
    with tempfile.TemporaryDirectory(prefix="tarweb-bench-") as temporary:
        site = Site(Path(temporary) / "site", Path(temporary) / "site.tar", options.python)
        site.directory.mkdir()
        content.write_site(site.directory, site.tar)
        results = measure(options, site)
    write(results, options.out)


if __name__ == "__main__":
    main()
