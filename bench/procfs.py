"""What the kernel knows of a server's processes: CPU time, memory, page faults (proc(5))."""

import contextlib
import re
import time
from pathlib import Path

# A mapping's first line in /proc/PID/smaps: address range, permissions, offset, device, inode, path.
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")
SIZES = "Rss", "Pss", "Private_Clean", "Private_Dirty", "Anonymous"      # lines of it that are of interest


def family(pid):
    """Process ids of `pid` and all its descendants."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):       # it, or a thread, has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def cpu_seconds(pids):
    """CPU seconds, user and system together, that these processes have used so far.

    Read from each process's own clock (clock_getcpuclockid(3): the id is ~pid << 3 | 2), which counts
    nanoseconds, threads that have ended, and io_uring's kernel threads (iou-sqp, iou-wrk: they belong to the
    thread group). /proc/PID/stat says the same in ticks of 10 ms; /proc/PID/task/*/schedstat forgets ended threads.
    """
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def stat(pids, *names):
    """Sums over `pids` of the named fields of /proc/PID/stat: "minflt" (page faults), "utime", "stime" (ticks)."""
    index = {"minflt": 7, "utime": 11, "stime": 12}   # counted from the state, the first field after "(comm)"
    rows = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return [sum(int(row[index[name]]) for row in rows) for name in names]


def memory(pids, but=None):
    """KiB of memory of a family of processes as {"rss", "pss", "anon"}, without the mappings of the file `but`.

    Pss divides a page by the number of processes that share it, so it adds up over processes, but depends on strangers
    that use the same libraries. "rss" and "anon" do not: all of the first process, which has forked the others, and of
    those what is theirs alone, so that what they still share with it (copy on write) counts once.
    """
    total = {"rss": 0, "pss": 0, "anon": 0}
    for pid in pids:
        for path, sizes in mappings(pid):
            if path != str(but):
                own = sizes["Rss"] if pid == pids[0] else sizes["Private_Clean"] + sizes["Private_Dirty"]
                total["rss"] += own
                total["pss"] += sizes["Pss"]
                total["anon"] += min(own, sizes["Anonymous"])
    return total


def mappings(pid):
    """Yield (path, {name: KiB for each of SIZES}) of each mapping of process `pid`."""
    path, sizes = "", dict[str, int]()
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := MAPPING.fullmatch(line):
            path, sizes = head[1], {}
            continue
        name, _, value = line.partition(":")
        if name in SIZES:
            sizes[name] = int(value.split()[0])
        if name == "VmFlags":      # the last line of each mapping
            yield path, sizes


def kernel_slab():
    """KiB of unreclaimable slab in the whole machine: sockets, epoll entries, io_uring requests."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("SUnreclaim:"))
