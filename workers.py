"""A worker process from the inside: its limit of open files, its ring, and the Worker that it runs."""

import contextlib
import gc
import logging
import os
import resource
import time
from functools import partial

from archive import Library
from clock import signal_pipe
from connection import LOG, Limits
from counters import Counts
from generation import hide_lost
from linux import (
    OP_ACCEPT, OP_ASYNC_CANCEL, OP_CLOSE, OP_MADVISE, OP_POLL_ADD, OP_READ, OP_RECV, OP_RECVMSG, OP_SEND, OP_SENDMSG,
    OP_SHUTDOWN, OP_TIMEOUT, OP_URING_CMD, OP_WRITE, lock_program, open_inotify, report_writes,
)
from options import UsageError
from plan import ForgetfulMemo, Memo, Site, make_site
from reply import Redirector
from uring import PolledRing, Ring
from worker import Worker

SERVER = b"tarweb"
DEFAULT_CONNECTIONS = 4096
STATUS_CONNECTIONS = 64
MAX_OPEN_AT_START = 4096        # descriptors looked at for those that are open: two for each worker, and a few
SERVING = {OP_ACCEPT, OP_RECV, OP_SEND, OP_SENDMSG, OP_SHUTDOWN, OP_CLOSE, OP_ASYNC_CANCEL, OP_TIMEOUT, OP_READ}

log = logging.getLogger("tarweb")


# --- the limit of open files

def raise_limits(options):
    """Those of open files and of locked memory (which rings are), while we may: in a worker it would be too late."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):      # the hard limit is more than fs.nr_open is by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = MAX_OPEN_AT_START + (options.max_connections or DEFAULT_CONNECTIONS)
    for which, limit in ((resource.RLIMIT_NOFILE, wanted), (resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)):
        _, hard = resource.getrlimit(which)
        if hard not in (resource.RLIM_INFINITY, limit) and (limit > hard or limit == resource.RLIM_INFINITY):
            with contextlib.suppress(OSError, ValueError):      # not root's to raise, or more than fs.nr_open
                resource.setrlimit(which, (limit, limit))


def limit_connections(wanted):
    """How many connections there may be: `wanted`, or where that is None the default or what the machine allows.

    Gives (connections, slots), and sets the limit of open files to `slots`: no descriptor will be as large as that.
    Whatever else is to be open has to be by now. Raises UsageError.
    """
    others = [fd for fd in range(MAX_OPEN_AT_START) if is_open(fd)]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = wanted or DEFAULT_CONNECTIONS
    try:
        return connections, limit_files(others[-1] + 1 + connections + 1, hard)
    except (OSError, ValueError):               # more than `hard`, and not root's to raise; or more than fs.nr_open
        if wanted:
            raise UsageError(f"--max-connections {wanted} is more than the limit of open files ({hard}) allows: "
                             "raise it (ulimit -n, and sysctl fs.nr_open) or ask for fewer") from None
    connections = hard - len(others) - 1         # the kernel gives the lowest free number
    if connections < 1:
        raise UsageError(f"the limit of open files ({hard}) leaves none for connections: raise it (ulimit -n)")
    log.warning("the limit of open files (ulimit -n) allows for %d connections only", connections)
    return connections, limit_files(hard, hard)


def limit_files(slots, hard):
    """Let no descriptor reach `slots`, which it gives back; the hard limit is raised to it, never lowered."""
    highest = hard if hard == resource.RLIM_INFINITY else max(hard, slots)
    resource.setrlimit(resource.RLIMIT_NOFILE, (slots, highest))
    return slots


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- workers

def make_ring(options, connections, operations):
    kind = PolledRing if options.sqpoll_ms else Ring
    return kind(connections, entries=options.ring_size, sqpoll_ms=options.sqpoll_ms, operations=operations,
                busyloop=options.busyloop, use_liburing=not options.no_liburing)


def operations(options, tls, lazy):
    """What a worker's ring has to do: no more than that. None with --secure=off, for all."""
    if options.secure == "off":
        return None
    return (SERVING | {OP_POLL_ADD}                                 # that an archive is written to
            | ({OP_MADVISE} if lazy else set())
            | ({OP_WRITE} if options.access_log else set())
            | ({OP_RECVMSG} if options.passfd else set())
            | ({OP_RECVMSG, OP_URING_CMD} if tls and tls.kernel_ciphers else set()))        # kernel TLS


def make_worker(generation, listeners, number, scoreboard, row, options, sandbox):
    """The Worker of a generation that accepts on the `number`-th of each of `listeners`, in a process that has dropped
    what a Sandbox drops first."""
    served, redirect = ([listener.fileno() for listener in sockets] for sockets in listeners.of(number))
    counts, signals = Counts(), signal_pipe()
    library = generation.library()
    hsts = () if options.hsts is None else ((b"Strict-Transport-Security", b"max-age=%d" % options.hsts),)
    if library.lazy:
        lock_program()
    site = make_site(Memo(library, SERVER, time.time(), hsts), generation.responders())
    damage = watch(library)
    directory = os.open(options.acme_dir, os.O_PATH | os.O_CLOEXEC) if options.acme_dir else None
    sandbox.drop(directory)
    ring = make_ring(options, options.max_connections or DEFAULT_CONNECTIONS,
                     operations(options, generation.tls, library.lazy))
    connections, slots = limit_connections(options.max_connections)
    access_log = None
    if generation.log_fd >= 0:
        from accesslog import AccessLog
        access_log = AccessLog(ring, generation.log_fd, options.log_format, LOG)
    passing = listeners.passing.fileno() if listeners.passing else None
    limits = Limits(connections, options.header_timeout, options.keepalive_timeout, options.min_rate, options.drain,
                    options.max_per_ip)
    publish = (lambda: scoreboard.publish(row, counts)) if scoreboard else None
    worker = Worker(ring, slots, limits, counts, library, site, served + redirect, signals, passing, options.trusted,
                    access_log, publish, damage)
    if generation.tls:
        secure(worker, generation.tls, redirect, listeners.https_port(), directory)
    return worker


def secure(worker, tls, redirect, https_port, directory):
    """Have a Worker speak TLS, and redirect to it on the listeners in `redirect` (descriptors), where ACME's challenges
    are answered from a `directory` (its descriptor, or None)."""
    from credentials import read_acme_challenge
    from tls import Engine
    from transport import add_tls
    tls.credentials.renew_tickets(time.time())
    redirector = Redirector(https_port, None if directory is None else partial(read_acme_challenge, directory))
    plain_site = Site(ForgetfulMemo(worker.library, SERVER, time.time()), redirector.reply)
    add_tls(worker, Engine(tls.openssl, tls.credentials, tls.kernel_ciphers), redirect, plain_site)


def watch(library):
    """What Clock takes to see that archives are written to; None where the system allows no more of that."""
    inotify = open_inotify()
    for archive in library.archives:
        report_writes(inotify, archive.fd)
    return (inotify, partial(on_damage, inotify, library)) if inotify >= 0 else None


def on_damage(inotify, library):
    with contextlib.suppress(BlockingIOError):
        while os.read(inotify, 4096):
            pass
    hide_lost(library)


def make_status_worker(listeners, scoreboard, options, sandbox):
    """The Worker that answers on the status listener; as make_worker."""
    from metrics import StatusResponder
    signals, library = signal_pipe(), Library([])
    site = Site(ForgetfulMemo(library, SERVER, time.time()), StatusResponder(scoreboard).reply)
    sandbox.drop()
    ring = Ring(STATUS_CONNECTIONS, entries=STATUS_CONNECTIONS, buffers=16, use_liburing=not options.no_liburing,
                operations=None if options.secure == "off" else SERVING)
    connections, slots = limit_connections(STATUS_CONNECTIONS)
    return Worker(ring, slots, Limits(connections, drain=1), Counts(), library, site,
                  [listener.fileno() for listener in listeners.status], signals)


def run(worker, sandbox, ready, left):
    """Lock a Sandbox, and serve until a signal ends it. `ready` is called when it can take requests, `left` when it
    accepts no more."""
    worker.acceptor.on_left = left
    gc.freeze()                 # nothing in the loop makes reference cycles, so the collector stays off
    sandbox.lock()
    ready()
    worker.run()
    if worker.handshake:
        counts = worker.counts
        log.info("TLS connections: %d in the kernel, %d in userspace, %d resumed, %d failed handshakes, %d truncated",
                 counts.kernel_full + counts.kernel_resumed, counts.userspace_full + counts.userspace_resumed,
                 counts.kernel_resumed + counts.userspace_resumed, counts.handshakes_failed, counts.truncated)
