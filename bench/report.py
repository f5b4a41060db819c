"""Turns results.json into RESULTS.md: tables with both sides, ratios, and the targets met or missed. No measuring."""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import content

REFERENCE = "nginx"
ENOUGH = 64                    # KiB that memory may differ by and still count as not grown: 16 pages
ALLOCATING = ("mmap", "munmap", "brk", "mremap")


def valid(case, server):
    """Whether `server` took part in `case`, without an error in any round."""
    rounds = case.get("servers", {}).get(server)
    return bool(rounds) and not any(each["errors"] for each in rounds)


def median(case, server, figure):
    """Median over the rounds of one figure of `server`."""
    return statistics.median(each[figure] for each in case["servers"][server])


def ratios(case, server, base=REFERENCE, figures=("cpu",)):
    """CPU for each unit of `server` over that of `base`, round by round and sorted; [] unless both are valid.

    `figures`: what is summed, "cpu" (the server's) and perhaps "client".
    """
    if not (valid(case, server) and valid(case, base)):
        return []
    both = zip(case["servers"][server], case["servers"][base], strict=True)
    return sorted(sum(mine[figure] for figure in figures) / sum(theirs[figure] for figure in figures)
                  for mine, theirs in both)


def ratio(results, name, base=REFERENCE, server="tarweb"):
    """The median CPU ratio of `server` to `base` in case `name`, or None if it was not measured."""
    found = ratios(results["cases"].get(name, {}), server, base)
    return statistics.median(found) if found else None


def special(results, *path):
    """The value at `path` in the special cases, or None."""
    value = results["special"]
    for key in path:
        value = value.get(key) if value else None
    return value


def beyond_tar(results):
    """MB of tarweb beyond the mapped tar in the memory case, or None."""
    kib = special(results, "memory", "without_tar", "rss")
    return None if kib is None else kib * 1024 / 1e6


def start_seconds(results):
    """Median seconds of start-up with etags, or None."""
    seconds = special(results, "startup", "seconds", "etags")
    return statistics.median(seconds) if seconds else None


def cold_ratios(rounds):
    """p99 of small files while large ones are read from disk, over that when quiet, round by round and sorted."""
    return sorted(each["cold"]["p99"] / each["quiet"]["p99"] for each in rounds)


def cold_ratio(results):
    """The median of cold_ratios for tarweb, or None."""
    rounds = special(results, "cold", "servers", "tarweb")
    return statistics.median(cold_ratios(rounds)) if rounds else None


def grown(results):
    """KiB that tarweb grew in the steady case (its resident pages without the tar's), or None."""
    before, after = (special(results, "steady", "tarweb", when, "rss") for when in ("before", "after"))
    return None if after is None else after - before


def calls(results, mode, names=None):
    """System calls counted in a mode of the steady case, all or those named, or None."""
    counted = special(results, "steady", mode, "calls")
    if counted is None or not special(results, "steady", mode, "answers"):
        return None
    return sum(count for name, count in counted.items() if names is None or name in names)


@dataclass(frozen=True)
class Target:
    """A promise about speed or size: `measured(results)` is at most `limit`. `case` where it is a CPU ratio."""

    title: str
    limit: float
    unit: str
    measured: Callable
    case: str = ""


def cpu_target(title, case, limit):
    return Target(title, limit, "x nginx", lambda results: ratio(results, case), case)


def floor_target(title, case, limit):
    return Target(title, limit, "x floor.c", lambda results: ratio(results, case, "floor"))


def both_sides(results, name):
    """The median ratio of tarweb's CPU and the client's together to the same of nginx, or None."""
    found = ratios(results["cases"].get(name, {}), "tarweb", figures=("cpu", "client"))
    return statistics.median(found) if found else None


TARGETS = (
    cpu_target("1 KiB, as browsers ask: CPU/request", "mix", 1.0),
    cpu_target("TLS in userspace, 1 KiB, as browsers ask: CPU/request", "tls-mix", 1.3),
    cpu_target("1 KiB, no two URLs alike: CPU/request", "miss", 0.95),
    cpu_target("10,000 files of 1 KiB: CPU/request", "files", 0.95),
    cpu_target("1 KiB, keep-alive: CPU/request", "small", 0.77),
    floor_target("1 KiB, keep-alive: CPU/request", "small", 1.10),
    cpu_target("1 KiB, a browser's header block: CPU/request", "browser", 0.68),
    floor_target("1 KiB, a browser's header block: CPU/request", "browser", 1.10),
    cpu_target("a connection for each request: CPU/request", "newconn", 0.95),
    cpu_target("404s that differ: CPU/request", "missing", 1.1),
    cpu_target("conditional requests that differ: CPU/request", "conditional", 1.1),
    cpu_target("small ranges that differ: CPU/request", "ranges", 1.1),
    cpu_target("TLS in userspace, 1 KiB, keep-alive: CPU/request", "tls-small", 0.95),
    cpu_target("TLS in userspace, a full handshake for each request: CPU/request", "tls-handshake", 1.10),
    cpu_target("TLS in userspace, a resumed connection for each request: CPU/request", "tls-resume", 1.05),
    cpu_target("24 KiB: CPU/request", "24k", 1.0),
    cpu_target("1 MiB: CPU/byte", "1m", 0.9),
    Target("100 MiB: CPU/byte, the client's included", 0.8, "x nginx", lambda results: both_sides(results, "100m")),
    cpu_target("TLS in userspace, 24 KiB: CPU/request", "tls-24k", 1.1),
    cpu_target("TLS in userspace, 1 MiB: CPU/byte", "tls-1m", 1.0),
    cpu_target("15 KiB of header fields that differ: CPU/request", "bombs", 1.5),
    Target("access log, 1 KiB, keep-alive: CPU/request", 1.15, "x without",
           lambda results: ratio(results, "log", "tarweb", "tarweb, combined")),
    Target("small files while cold ones are read: p99", 3, "x quiet", cold_ratio),
    Target("10,000 files, 1,000 connections: memory beyond the tar", 40, "MB", beyond_tar),
    Target("100,000 files: start-up", 3, "s", start_seconds),
    Target("steady state: growth of resident memory", ENOUGH, "KiB", grown),
    Target("steady state: mmap, munmap, mremap, brk", 0, "calls",
           lambda results: calls(results, "tarweb", ALLOCATING)),
    Target("steady state with SQPOLL and busy loop: system calls", 0, "calls",
           lambda results: calls(results, "tarweb, sqpoll")),
)


def table(head, rows):
    """A Markdown table; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values):
    """'median (min - max)' of ratios, or a dash."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})" if values else "-"


def targets(results):
    """The table of targets, computed from the results."""
    rows = []
    for target in TARGETS:
        value = target.measured(results)
        verdict = "not measured" if value is None else "met" if value <= target.limit else "**missed**"
        tuned = ratio(results, target.case, "nginx-tuned") if target.case else None
        rows.append([target.title, f"{target.limit:g} {target.unit}", "-" if value is None else f"{value:.4g}",
                     verdict, "-" if tuned is None else f"{tuned:.2f}"])
    return table(["target", "at most", "measured", "", "x nginx-tuned"], rows)


def case_section(case):
    """One case as a heading, a table with a row for each server, and what went wrong."""
    if "failed" in case:
        return f"### {case['title']}\n\nFailed: {case['failed']}"
    per = case["per"]
    head = ["server", "requests/s", f"CPU us/{per}", "user", "system", f"client us/{per}",
            "CPU, as a ratio" if case.get("bases") else "CPU, x nginx", "with client"]
    rows = [case_row(case, server) for server in case["servers"]]
    spoken = f"All speak {case['tls']}." if case.get("tls") else ""
    parts = [f"### {case['title']} ({case['connections']} connections)", spoken, table(head, rows), case_errors(case)]
    return "\n\n".join(part for part in parts if part)


def case_row(case, server):
    """The row of one server: medians, or the word invalid."""
    if not valid(case, server):
        return [server, "invalid", *["-"] * 6]
    figures = [f"{median(case, server, figure):.2f}" for figure in ("cpu", "user", "system", "client")]
    base = case.get("bases", {}).get(server)
    alone, both = (ratios(case, server, base or REFERENCE, of) for of in (("cpu",), ("cpu", "client")))
    than = f" x {base}" if base and alone else ""
    return [server, f"{median(case, server, 'rate'):,.0f}", *figures, spread(alone) + than,
            f"{statistics.median(both):.2f}" if both else "-"]


def case_errors(case):
    """A line for each server whose rounds had errors."""
    lines = []
    for server, rounds in case["servers"].items():
        said = sorted({error for each in rounds for error in each["errors"]})
        if said:
            lines.append(f"{server} is invalid: {'; '.join(said)}.")
    return "  \n".join(lines)


def idle_section(case):
    """Memory of idle connections."""
    rows = []
    for server, figures in case.items():
        count, before, after = figures["connections"], figures["before"], figures["after"]
        rows.append([
            server, f"{figures['open']:,} of {count:,}", f"{before['pss']:,}", f"{after['pss']:,}",
            f"{(after['pss'] - before['pss']) * 1024 / count:,.0f}", f"{after['pss'] * 1024 / count:,.0f}",
            f"{(after['slab'] - before['slab']) * 1024 / count:,.0f}"])
    head = ["server", "still open", "KiB before", "KiB after", "bytes/connection: growth", "whole server", "kernel"]
    return (f"### Idle connections\n\n{table(head, rows)}\n\n"
            "Pss of all the server's processes without the tar's pages. Kernel: growth of unreclaimable slab in the "
            "whole machine, which holds the sockets of both ends (the same for all) and what epoll or io_uring keeps.")


def memory_section(case):
    """Memory with many files and connections."""
    rows = [[name, *(f"{case[name][figure]:,}" for figure in ("rss", "pss", "anon"))]
            for name in ("with_tar", "without_tar")]
    rows = [[row[0].replace("_", " the "), *row[1:]] for row in rows]
    return (f"### Memory: {case['files']:,} files served over {case['connections']:,} connections "
            f"({case['open']:,} still open)\n\n{table(['tarweb, KiB', 'Rss', 'Pss', 'anonymous'], rows)}")


def startup_section(case):
    """Seconds until a large archive is served."""
    rows = [[way, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}"]
            for way, seconds in case["seconds"].items()]
    head = ["", "median s", "min", "max"]
    return f"### Start-up: {case['files']:,} files, from exec to serving\n\n{table(head, rows)}"


def steady_section(case):
    """What a warmed-up server asks of the system."""
    rows = []
    for mode, seen in case.items():
        if "calls" in seen:
            counted = ", ".join(f"{name} {count:,}" for name, count in sorted(seen["calls"].items())) or "none"
            each = sum(seen["calls"].values()) / seen["answers"] if seen["answers"] else float("nan")
            rows.append([mode, f"{seen['answers']:,}", f"{each:.4f}", counted])
    parts = ["### Steady state"]
    if "requests" in (own := case["tarweb"]):
        parts.append(f"{own['requests']:,} requests: resident memory without the tar from {own['before']['rss']:,} to "
                     f"{own['after']['rss']:,} KiB, {own['faults'] / own['requests']:.6f} page faults/request.")
    if rows:
        parts.append(table(["seen by strace", "requests", "system calls/request", "which"], rows))
    return "\n\n".join(parts)


def cold_section(case):
    """Latency while a cold archive is read."""
    rows = []
    for server, rounds in case["servers"].items():
        middles = [f"{statistics.median(each[when][figure] for each in rounds):.2f}"
                   for when in ("quiet", "cold") for figure in ("p50", "p99", "p99.9", "max")]
        read = statistics.median(each["read"] for each in rounds) / 1e6
        rows.append([server, *middles, f"{read:.0f}", spread(cold_ratios(rounds))])
    head = ["server", "quiet, ms: p50", "p99", "p99.9", "longest", "cold, ms: p50", "p99", "p99.9", "longest",
            "MB/s read", "p99, x quiet"]
    size, memory, rate = (f"{case[name] / 1e6:,.0f} MB" for name in ("bytes", "memory", "rate"))
    return (f"### Cold archive: {content.HOT} small files, while large ones are read\n\n{table(head, rows)}\n\n"
            f"{size}, nothing of it in memory before a server starts; {memory} for the server and its page cache; "
            f"{case['readers']} readers, {rate}/s each. Medians of the rounds.")


def reload_section(case):
    """Latency while the server is reloaded."""
    rows = []
    for server, seen in case["servers"].items():
        served = sorted(each["served"] for each in seen["reloads"] if each["served"])
        worst = [each["max"] for each in seen["reloads"]]
        p99 = statistics.median(each["p99"] for each in seen["reloads"])
        rows.append([server, spread(served), f"{seen['quiet']['p99']:.2f}", f"{seen['quiet']['max']:.2f}",
                     f"{p99:.2f}", f"{statistics.median(worst):.2f}", f"{max(worst):.2f}", seen["lost"]])
    head = ["server", "s until the new archive is served", "quiet, ms: p99", "longest", "reload, ms: p99",
            "longest", f"longest of {len(worst)} reloads", "asked again"]
    return f"### Reload: {case['files']:,} files\n\n{table(head, rows)}"


SECTIONS = {"idle": idle_section, "memory": memory_section, "startup": startup_section, "steady": steady_section,
            "cold": cold_section, "reload": reload_section}

METHOD = """CPU us/request is the processor time of all processes of a server (io_uring's kernel threads included) over
the requests that the client counted. Servers take turns round by round, each pinned to one core, the client to another,
unless a case says otherwise; figures are medians of the rounds, ratios are taken within a round: median (min - max).
On loopback the kernel does part of the network's work on whichever side happens to run: the client's time stands
beside the server's, and "with client" is the ratio of both together. Absolute times mean little on a shared machine.
nginx is set up as usual for static files ([nginx.conf](nginx.conf)); nginx-tuned has the cheapest settings found for
each size ([nginx-tuned.conf](nginx-tuned.conf)); lighttpd: [lighttpd.conf](lighttpd.conf). http.server is Python's
own, for scale; floor is [floor.c](floor.c), which answers without looking at what is asked. The client is wrk, and for
full handshakes `openssl s_time`. A row with any error of the client's is invalid. Over TLS all servers have the same
certificate (ECDSA, P-256); tarweb runs with `--ktls off`, nginx with [nginx-tls.conf](nginx-tls.conf)."""


def special_section(name, case):
    """The section of a special case, or the reason that there is none."""
    return f"### {name}\n\nNot measured: {case['failed']}" if "failed" in case else SECTIONS[name](case)


def markdown(results, chart):
    """All of RESULTS.md. `chart`: whether results.png is there to be shown."""
    machine = [f"- {name}: {value}" for name, value in results["machine"].items()]
    parts = ["# Results", "Written by `make bench`.", "## Targets", targets(results)]
    parts += ["![CPU for each request, as a ratio to nginx](results.png)"] if chart else []
    parts += ["## Cases", METHOD, *map(case_section, results["cases"].values())]
    parts += [special_section(name, case) for name, case in results["special"].items()]
    return "\n\n".join([*parts, "## Machine", "\n".join(machine)]) + "\n"


def write(directory):
    """Write RESULTS.md beside the results.json of `directory`; gives its text."""
    results = json.loads((directory / "results.json").read_text())
    text = markdown(results, (directory / "results.png").exists())
    (directory / "RESULTS.md").write_text(text)
    return text


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
