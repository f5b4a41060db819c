"""The model check of a connection's life: schedules of chance, millions of steps, and a look at everything after each.

    python tests/model.py --steps 5000000 --record      # writes tests/MODEL.md
    python tests/model.py --seed 17 --steps 1           # one schedule, as it is printed where one fails
"""

import argparse
import platform
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import machine  # noqa: E402
import securemachine  # noqa: E402
from certificates import Authority  # noqa: E402
from harsh import HarshSecureWorld, HarshWorld  # noqa: E402
from stepwise import ELSEWHERE, OPERATIONS, STATES, TABLE, TAKEN  # noqa: E402
from tlsmemory import TestEngine  # noqa: E402

import acceptor  # noqa: E402
import clock  # noqa: E402
import connection  # noqa: E402
import transport  # noqa: E402
import worker  # noqa: E402

RECORD = ROOT / "tests/MODEL.md"
BEGIN, END = "<!-- record: python tests/model.py --record -->", "<!-- /record -->"
MODULES = acceptor, clock, worker, transport, connection
TRACED = 10             # one of so many schedules has its lines noted
SECURE = 3              # one of so many is over TLS
EVERY = 250_000         # steps between two lines about how far it is
FUNCTION = 2            # CO_NEWLOCALS (inspect(3py)): no class body


class Lines:
    """Which lines of the handlers have not been run yet."""

    def __init__(self, modules=MODULES):
        self.missing = {}           # (file, first line of a function) -> lines
        self.names = {}
        for module in modules:
            self.look(compile(Path(module.__file__).read_text(), module.__file__, "exec"))

    def look(self, code):
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                if inner.co_flags & FUNCTION and inner.co_name != "__init__":
                    lines = {line for *_, line in inner.co_lines() if line}
                    self.missing[inner.co_filename, inner.co_firstlineno] = lines - {inner.co_firstlineno}
                    self.names[inner.co_filename, inner.co_firstlineno] = inner.co_name
                self.look(inner)

    def trace(self, frame, _event, _argument):
        """For sys.settrace: functions of which all has been seen go at full speed."""
        code = frame.f_code
        return self.note if self.missing.get((code.co_filename, code.co_firstlineno)) else None

    def note(self, frame, _event, _argument):
        self.missing[frame.f_code.co_filename, frame.f_code.co_firstlineno].discard(frame.f_lineno)
        return self.note

    def left(self):
        """[(module, function, the text of a line)] of those that have never been run, in the order of the files."""
        found = []
        for (path, start), lines in sorted(self.missing.items()):
            text = Path(path).read_text().splitlines()
            found += [(Path(path).name, self.names[path, start], text[line - 1].strip()) for line in sorted(lines)]
        return found


class Seen:
    """What the schedules so far have come to."""

    def __init__(self):
        self.steps = self.schedules = 0
        self.table = Counter()      # (state, event): rows of the table in connection.py
        self.moves = Counter()      # (state, what completed, how, state after it)
        self.counts = Counter()     # the rest, by name
        self.lines = Lines()

    def unreached(self):
        """The rows of the table that have not been taken."""
        return [row for row in TABLE if not self.table[row]]


def look_up(row, event):
    """State.__getitem__ that notes what is looked up."""
    TAKEN.append((row, event))
    return dict.__getitem__(row, event)


class Model:
    """Runs schedules, and keeps what they have come to in `seen`. `engine`: see SecureWorld.

    traced: one of so many schedules has its lines noted, which takes longer; 0 for none.
    """

    def __init__(self, monkeypatch, engine, traced=0):
        for path, where in securemachine.LARGE.items():
            monkeypatch.setitem(machine.FILES, path, where)
        monkeypatch.setattr(transport, "Buffer", securemachine.Buffer)
        monkeypatch.setattr(connection.State, "__getitem__", look_up)
        self.clock = machine.make_small(monkeypatch, securemachine.SMALL)
        self.engine, self.traced, self.seen = engine, traced, Seen()
        self.interrupted = False    # whether to stop behind the present schedule

    def world(self, seed):
        self.clock.now = 1000.0
        if seed % SECURE == SECURE - 1:
            return HarshSecureWorld(seed, self.clock, self.seen, engine=self.engine)
        return HarshWorld(seed, self.clock, self.seen, listeners=1 + seed % SECURE)

    def play(self, seed):
        """One schedule."""
        world = self.world(seed)
        try:
            if self.traced and seed % self.traced == 0:
                sys.settrace(self.seen.lines.trace)
            world.run()
        except BaseException:
            print(f"step {self.seen.steps}: python tests/model.py --seed {seed} --steps 1", file=sys.stderr)
            raise
        finally:
            sys.settrace(None)

    def run_schedules(self, count):
        for seed in range(count):
            self.play(seed)

    def run(self, steps, seed=0, tell=None):
        """Schedules from `seed` on until they have made so many steps; gives the next seed."""
        until = self.seen.steps + steps
        while self.seen.steps < until:
            before = self.seen.steps
            self.play(seed)
            seed += 1
            if self.interrupted:
                break
            if tell and before // EVERY != self.seen.steps // EVERY:
                tell(seed)
        return seed


# --- the record

def table(head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def matrix(moves):
    """What completed, and how, by the state that it came to."""
    found, order = {}, [*OPERATIONS.values(), ELSEWHERE[0]]
    for (before, operation, how, _), count in moves.items():
        found.setdefault((operation, how), Counter())[before] += count
    return table(["completion", *STATES], [
        [f"{operation}: {how}", *(f"{found[operation, how][name]:,}" if found[operation, how][name] else ""
                                  for name in STATES)]
        for operation, how in sorted(found, key=lambda key: (order.index(key[0]), key[1]))])


def record(seen, seeds, seconds):
    """The part of MODEL.md that a run writes."""
    counts = {name: count for name, count in seen.counts.items() if not name.startswith("answered ")}
    lines = seen.lines.left()
    left = ", ".join(f"({name}, {event})" for name, event in seen.unreached()) or "none"
    return "\n\n".join((
        f"{seen.steps:,} steps in {seen.schedules:,} schedules, of seeds {seeds[0]} to {seeds[1] - 1}, one of {SECURE} "
        f"over TLS, in {seconds / 60:.0f} minutes of CPU; Python {platform.python_version()}. No invariant failed.",
        "## Rows of the table in `connection.py`, and how often they were taken",
        table(["state", "event", "next", "times"], [
            [name, event, name[event], f"{seen.table[name, event]:,}"] for name, event in TABLE]),
        f"Never taken: {left}.",
        "## What completed, by the state that it came to",
        "For ticks, signals, accepts and what others caused: only the connections whose state it changed.",
        matrix(seen.moves),
        "## What else happened",
        table(["what", "times"], [[name, f"{count:,}"] for name, count in sorted(counts.items()) if count]),
        f"## Lines of the handlers that were never run, in one of {TRACED} schedules",
        table(["where", "line"], [[f"`{module}`, `{name}`", f"`{text}`"] for module, name, text in lines])
        if lines else "None."))


def write(text):
    """Put a record between its marks."""
    before, _, rest = RECORD.read_text().partition(BEGIN)
    RECORD.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000, help="completions handed to workers (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    arguments = parser.parse_args()
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        pair = Authority(folder).issue("ed25519")
        model = Model(monkeypatch, TestEngine([(pair.cert, pair.key)]), TRACED)
        seen = model.seen
        signal.signal(signal.SIGINT, lambda *_: setattr(model, "interrupted", True))
        last = model.run(arguments.steps, arguments.seed,
                         lambda seed: print(f"{seen.steps:,} steps, seed {seed}", flush=True))
        text = record(seen, (arguments.seed, last), time.process_time())
    if arguments.record:
        write(text)
    print(text)


if __name__ == "__main__":
    main()
