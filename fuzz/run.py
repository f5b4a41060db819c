"""Coverage-guided fuzzing with atheris: python fuzz/run.py [--target NAME] [--seconds N] [--record] [--merge].

Prints a line for each target. An input that breaks an invariant is left in fuzz/crashes/, its traceback is shown, and
the exit status is 1. What has been found so far is listed in FINDINGS.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from targets import CORPUS, HERE, TARGETS, find, inputs

CRASHES = HERE / "crashes"
RECORDED, RESULTS = HERE / "results.json", HERE / "RESULTS.md"
WORK = HERE.parent / ".cache" / "fuzz"      # what each target's runs have found, beside the corpus in the repository
SLOWEST = 10                                # seconds for one input
LARGEST = 1024                              # MB of memory
MERGED = 120                                # inputs of a target that are kept in the repository
MERGED_SIZE, TARS_SIZE = 14_000, 120_000     # bytes of them
DONE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")
RUNS = re.compile(r"stat::number_of_executed_units: *(\d+)")
REPORT = re.compile(r"^ *===.*?(?=^==\d+==|\Z)", re.MULTILINE | re.DOTALL)


def main():
    arguments = parse()
    crashes = 0
    for name in arguments.target or TARGETS:
        report = fuzz(name, arguments)
        crashes += report["crashes"]
        if arguments.record:
            record(name, report)
        if arguments.merge:
            merge(name)
    sys.exit(crashes > 0)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=[*TARGETS, "all"],
                        help="only this one, or all in one process; repeatable")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--runs", type=int, default=-1, help="inputs for each target at most; 0: only those there are")
    parser.add_argument("--seed", type=int, default=0, help="of chance; with --runs a run can be had again")
    parser.add_argument("--fresh", action="store_true", help="begin with what is in the repository alone")
    parser.add_argument("--record", action="store_true", help="add the figures to RESULTS.md")
    parser.add_argument("--merge", action="store_true", help="keep the smallest inputs of all found in corpus/")
    return parser.parse_args()


# --- one target

def fuzz(name, arguments):
    """Fuzz one target; gives figures, and prints them."""
    with tempfile.TemporaryDirectory() as empty:
        folder = fill(Path(empty) if arguments.fresh else WORK / name, inputs(name))
        started = time.monotonic()
        output = run_worker(name, folder, f"-max_total_time={arguments.seconds}", f"-runs={arguments.runs}",
                            f"-seed={arguments.seed}", f"-max_len={find(name).longest}", dictionary(name))
    report = figures(output) | {"seconds": round(time.monotonic() - started)}
    print(f"{name:8} {report['runs']:>9,} runs in {report['seconds']} s, {report['coverage']} edges, "
          f"{report['features']} features, {report['corpus']} inputs kept, {report['crashes']} crashes", flush=True)
    if report["crashes"]:
        print(explanation(output), flush=True)
    return report


def fill(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(contents):
        (folder / f"seed-{number:04}").write_bytes(data)
    return folder


def run_worker(name, folder, *options):
    """libFuzzer's output."""
    CRASHES.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "run_target.py"), name, str(folder), "-print_final_stats=1",
               f"-timeout={SLOWEST}", f"-rss_limit_mb={LARGEST}",
               f"-artifact_prefix={CRASHES}/{name}-", *filter(None, options)]
    with tempfile.TemporaryDirectory() as scratch:          # libFuzzer ends without cleaning up
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, "TMPDIR": scratch})
    output = done.stdout.decode(errors="replace")
    if not RUNS.search(output) and "-merge=1" not in options:
        sys.exit(f"{name} could not be run:\n{output}")
    return output


def dictionary(name):
    """libFuzzer's option for a file of the target's words."""
    if not find(name).words:
        return ""
    path = fill(WORK / "words", ()) / name
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in find(name).words)
    path.write_text("".join(f'"{word}"\n' for word in words))
    return f"-dict={path}"


def figures(output):
    found = DONE.findall(output)
    coverage, features, corpus = map(int, found[-1]) if found else (0, 0, 0)
    return {"runs": int(RUNS.findall(output)[-1]), "coverage": coverage, "features": features, "corpus": corpus,
            "crashes": output.count("Test unit written to")}


def explanation(output):
    """The traceback, and where the input is."""
    traceback = REPORT.search(output)
    written = re.search(r"Test unit written to (.*)", output)
    return "\n".join(filter(None, (traceback and traceback[0].strip(), written and written[0])))


# --- what is kept

def record(name, report):
    """Add runs, seconds and crashes to those before; the rest is of the last run."""
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    sums = {figure: report[figure] + known.get(name, {}).get(figure, 0) for figure in ("runs", "seconds", "crashes")}
    known[name] = report | sums | {"date": datetime.date.today().isoformat()}
    known = {name: known[name] for name in TARGETS if name in known}
    RECORDED.write_text(json.dumps(known, indent=1) + "\n")
    RESULTS.write_text(as_page(known))


# Run once, since the parser that was replaced is gone.
COMPARISON = """
## The short way to an answer, compared

Compared once, on 2026-11-30, with the parser that it replaced, which remembered header lines: the same verdict, fields
and end of head for the corpora (4,684 inputs, with the heads within them), for the tables of the tests and the
smuggling cases (1,968), and for 10,000,000 mutations of these and of browsers' requests, with lines doubled, moved,
cut, joined and damaged. Of the mutations 3,543,407 were accepted, and 2,916,146 of these went the short way. Two
earlier forms of it were compared with 10,000,000 mutations each.

Whole answers, compared with what the parser and the responder say where nothing is remembered: the same status, header
section and spans for 300,000 requests to five kinds of site, three in ten of them repeated; 115,418 were answered the
short way. An earlier form was compared with 2,200,000. The targets `request` and `answer` go on with it.
"""


def as_page(reports):
    versions = ", ".join((f"Python {platform.python_version()}", f"atheris {importlib.metadata.version('atheris')}",
                          f"h11 {importlib.metadata.version('h11')}", " ".join(ssl.OPENSSL_VERSION.split()[:2]),
                          f"Linux {platform.release()}"))
    rows = [f"| {name} | {of['runs']:,} | {of['seconds']:,} | {of['coverage']} | {of['features']} | {of['corpus']} | "
            f"{of['crashes']} | {of['date']} |" for name, of in reports.items()]
    return "\n".join((
        "# What fuzzing has covered", "",
        "Written by `fuzz/run.py --record`. Runs, seconds and crashes are sums over all recorded runs; coverage is of",
        "the last one: edges of the server's code (and of `tarfile`) that were taken, and libFuzzer's features.",
        "What the crashes were is in [FINDINGS.md](FINDINGS.md).", "", f"{versions}.", "",
        "| target | runs | seconds | edges | features | inputs kept | crashes | last run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |", *rows, COMPARISON))


def merge(name):
    """Let the corpus be the smallest inputs that cover what all found so far do, or as many as are worth keeping: those
    whose names, which are hashes, come first."""
    with tempfile.TemporaryDirectory() as folder:
        least = fill(Path(folder) / "least", ())
        run_worker(name, least, "-merge=1", str(WORK / name))
        kept = sorted(least.iterdir())[:MERGED]
        shutil.rmtree(CORPUS / name, ignore_errors=True)
        fill(CORPUS / name, ())
        total = 0
        for file in kept:
            total += file.stat().st_size
            if total <= (TARS_SIZE if name == "tar" else MERGED_SIZE):
                shutil.copy(file, CORPUS / name)
    print(f"{name:8} {len(list((CORPUS / name).iterdir()))} inputs in the corpus")


if __name__ == "__main__":
    main()
