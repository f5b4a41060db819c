"""What a worker counts, by name."""

# What a worker counts up, and what it has at the moment.
COUNTERS = (
    "responses_1xx", "responses_2xx", "responses_3xx", "responses_4xx", "responses_5xx", "bytes_sent",
    "accepted", "accept_errors", "passed", "proxy_refused", "memo_hits", "memo_misses", "reclaimed", "over_limit",
    "timed_out",
    "kernel_full", "kernel_resumed", "userspace_full", "userspace_resumed", "handshakes_failed", "truncated",
    "log_lines", "log_dropped", "no_buffers", "overflows", "cold", "faults",
)
GAUGES = ("handshake", "idle", "reading", "sending", "closing", "waiting", "stuck")
NUMBERS = COUNTERS + GAUGES


class Counts:
    """What one worker counts: an attribute for each of NUMBERS."""

    __slots__ = NUMBERS

    def __init__(self):
        for name in NUMBERS:
            setattr(self, name, 0)
