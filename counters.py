"""Numbers that all processes of a server share: each worker counts for itself, whoever asks gets the sums.

A worker counts in attributes of its own (`Counts`) and writes them once a second into its row of the `Board`, memory
that was there before the workers were forked. A row has one writer, and each number is one 8-byte store, so no lock is
needed: a reader sees a number as it was or as it is. When a worker has ended, the parent adds what it counted to the
row of those that are no more, and the row is free; a reader of sums looks again if that has happened meanwhile.
"""

import mmap

# What a worker counts up, and what it has at the moment.
COUNTERS = (
    "responses_1xx", "responses_2xx", "responses_3xx", "responses_4xx", "responses_5xx", "bytes_sent",
    "accepted", "accept_errors", "passed", "proxy_refused", "memo_hits", "memo_misses", "reclaimed", "over_limit",
    "timed_out",
    "kernel_full", "kernel_resumed", "userspace_full", "userspace_resumed", "handshakes_failed", "truncated",
    "log_lines", "log_dropped", "no_buffers", "overflows", "cold", "faults",
)
GAUGES = ("handshake", "idle", "reading", "sending", "closing", "waiting", "stuck")
# What the parent knows. Times are in seconds since the epoch; `ready` and `stopping` are 0 or 1.
SERVER = (
    "started", "generation", "reloads", "reloads_failed", "last_reload", "ready", "stopping",
    "workers", "draining", "restarts",
)

NUMBERS = COUNTERS + GAUGES
WORD = 8                        # bytes
ROWS = 1024                     # workers at a time, those that are draining included
PAST = ROWS                     # the row of those that are no more
TEXT = 1024 * 1024              # bytes for the text
TRIES = 100                     # of a sum


class Counts:
    """What one worker counts: an attribute for each of NUMBERS."""

    __slots__ = NUMBERS

    def __init__(self):
        for name in NUMBERS:
            setattr(self, name, 0)


class Board:
    """Rows of numbers for the workers, a row for the server, and a text."""

    def __init__(self):
        words = (ROWS + 1) * len(NUMBERS) + len(SERVER) + 2
        self.memory = mmap.mmap(-1, words * WORD + TEXT)            # shared with all processes forked from now on
        self.words = memoryview(self.memory)[:words * WORD].cast("Q")
        self.server_at = (ROWS + 1) * len(NUMBERS)
        self.size_at = self.server_at + len(SERVER)
        self.folds_at = self.size_at + 1            # a count that is odd while a row is folded
        self.text = memoryview(self.memory)[words * WORD:]
        self.free = list(reversed(range(ROWS)))

    # the parent

    def take_row(self):
        """A row for a new worker; None where all are taken."""
        return self.free.pop() if self.free else None

    def free_row(self, row):
        """Its worker has ended: keep what it counted, drop what it had."""
        start, past = row * len(NUMBERS), PAST * len(NUMBERS)
        self.words[self.folds_at] += 1
        for i in range(len(COUNTERS)):
            self.words[past + i] += self.words[start + i]
        for i in range(len(NUMBERS)):
            self.words[start + i] = 0
        self.words[self.folds_at] += 1
        self.free.append(row)

    def set(self, **values):
        """Set numbers of SERVER."""
        for name, value in values.items():
            self.words[self.server_at + SERVER.index(name)] = int(value)

    def add(self, name):
        self.words[self.server_at + SERVER.index(name)] += 1

    def describe(self, text):
        """Set the text, cut to TEXT bytes. A reader could see a mix of two; it is for people, and changes rarely."""
        data = text.encode()[:TEXT]
        self.text[:len(data)] = data
        self.words[self.size_at] = len(data)

    # a worker

    def publish(self, row, counts):
        start = row * len(NUMBERS)
        for i, name in enumerate(NUMBERS):
            self.words[start + i] = getattr(counts, name)

    # whoever asks

    def totals(self):
        """The sum over all workers of each of NUMBERS, those that are no more included for COUNTERS."""
        for _ in range(TRIES):
            folds, sums = self.words[self.folds_at], self.sum()
            if not folds % 2 and folds == self.words[self.folds_at]:
                break
        return dict(zip(NUMBERS, sums, strict=True))

    def sum(self):
        sums = [0] * len(NUMBERS)
        for row in range(ROWS + 1):
            start = row * len(NUMBERS)
            for i, value in enumerate(self.words[start:start + len(NUMBERS)]):
                sums[i] += value
        return sums

    def server(self):
        """The numbers of SERVER."""
        return {name: self.words[self.server_at + i] for i, name in enumerate(SERVER)}

    def description(self):
        return bytes(self.text[:self.words[self.size_at]]).decode(errors="replace")
