"""What systemd and a service say to each other: inherited sockets, and notifications. No library of its is needed."""

import contextlib
import os
import socket
import time

FIRST_FD = 3                    # sd_listen_fds(3): SD_LISTEN_FDS_START


class Notifier:
    """Tells the service manager how we are (sd_notify(3)). Where there is none, or it does not listen, nobody is told:
    nothing raises, nothing waits.

    watchdog_seconds: how often to call `watchdog`, or None (sd_watchdog_enabled(3)).
    """

    def __init__(self, environ):
        path = environ.pop("NOTIFY_SOCKET", "")
        self.address = "\0" + path[1:] if path.startswith("@") else path
        self.watchdog_seconds = watchdog_seconds(environ)
        self.socket = None
        if path.startswith(("/", "@")):
            with contextlib.suppress(OSError):
                self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def notify(self, *lines):
        if self.socket:
            with contextlib.suppress(OSError):
                self.socket.sendto("\n".join(lines).encode(errors="replace"), self.address)

    def ready(self, status):
        """What is loaded serves; `status`: a line about it."""
        self.notify("READY=1", "STATUS=" + " ".join(status.splitlines()))

    def reloading(self):
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self):
        self.notify("STOPPING=1")

    def watchdog(self):
        self.notify("WATCHDOG=1")


def watchdog_seconds(environ):
    """Half the time after which the service manager would take us for dead; None where it does not look."""
    microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", None)
    if not is_number(microseconds) or pid not in (None, str(os.getpid())):
        return None
    return int(microseconds) / 2_000_000 or None


def listen_fds(environ, pid):
    """[(descriptor, its name)] of the sockets passed to process `pid` (sd_listen_fds(3)); close-on-exec from now on.

    What tells of them is removed from `environ`: it is for one process only. Raises ValueError.
    """
    for_pid, count = environ.pop("LISTEN_PID", None), environ.pop("LISTEN_FDS", None)
    names = environ.pop("LISTEN_FDNAMES", None)
    if for_pid is None or count is None:
        return []
    if not is_number(for_pid) or not is_number(count):
        raise ValueError(f"LISTEN_PID={for_pid!r} and LISTEN_FDS={count!r} in the environment ought to be numbers")
    if int(for_pid) != pid:
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ValueError(f"LISTEN_FDS={count} in the environment, but descriptor {fd}: {error.strerror}") from None
    found = names.split(":") if names else ["unknown"] * len(fds)       # "unknown" as in sd_listen_fds_with_names(3)
    if len(found) != len(fds):
        raise ValueError(f"LISTEN_FDNAMES={names!r} in the environment has not {count} names, one for each descriptor")
    return list(zip(fds, found, strict=True))


def is_number(text):
    return text.isascii() and text.isdigit() and len(text) < 20
