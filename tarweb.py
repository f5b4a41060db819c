#!/usr/bin/env python3
"""tarweb: serves a whole web site straight out of one tar file.

Reads like a sequence: take the flags, listen, open the archives, fork, serve.
"""

import contextlib
import gc
import logging
import os
import resource
import sys
import time
import traceback
from functools import partial

# Python 3.8 can still parse this file, and is told so rather than that another module has a syntax error.
if sys.version_info < (3, 11) or sys.maxsize < 1 << 32:     # noqa: UP036
    sys.exit(f"tarweb needs Python 3.11 or newer, for 64 bits; this is Python {sys.version.split()[0]} "
             f"for {sys.maxsize.bit_length() + 1} bits")
if sys.flags.safe_path:         # python3 -P, -I: Python has not put our directory there
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

import linux
from archive import Library
from clock import Counts, signal_pipe
from connection import LOG, Limits
from generation import Generation, watch
from listeners import Listeners, Notifier, url
from options import LEVELS, StartError, UsageError, import_group, parse_arguments
from plan import ForgetfulMemo, Memo, Site, make_site
from reply import Redirector
from sandbox import Sandbox
from supervisor import STATUS, Supervisor
from tar import ArchiveError
from uring import PolledRing, Ring, RingError
from worker import Worker

__version__ = "0.1.0"

EXIT_FAILURE, EXIT_USAGE = 1, 2
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
SERVER = b"tarweb"
DEFAULT_CONNECTIONS = 4096
STATUS_CONNECTIONS = 64
MAX_OPEN_AT_START = 4096        # descriptors looked at for those that are open: two for each worker, and a few
SERVING = {linux.OP_ACCEPT, linux.OP_RECV, linux.OP_SEND, linux.OP_SENDMSG, linux.OP_SHUTDOWN, linux.OP_CLOSE,
           linux.OP_ASYNC_CANCEL, linux.OP_TIMEOUT, linux.OP_READ}
NO_MEMORY = "there is not enough memory: raise its limit (ulimit -v, or that of the control group)"

log = logging.getLogger("tarweb")


def run(options):
    """Limit, listen, load, fork, serve. The exit status; raises what main explains."""
    started = time.monotonic()
    gc.disable()        # indexing makes no cycles, but so many objects that the collector would take a fifth of it
    raise_limits(options)
    notifier = Notifier(os.environ)
    sandbox = Sandbox(options, notifier.address.startswith("\0"))
    listeners = Listeners(options)
    scoreboard = tls = None
    if listeners.status:
        import_group("status")          # systemd may have opened it, without a flag
        from metrics import Scoreboard
        scoreboard = Scoreboard()
    Ring(8, entries=8, buffers=1, use_liburing=not options.no_liburing).close()      # or say why not, at once
    if options.tls_cert:
        from credentials import prepare_tls
        tls = prepare_tls(options)
    sandbox.confine_parent(options.access_log, *listeners.paths.values())

    try:
        return Supervisor(options, listeners, scoreboard, notifier, partial(Generation, options, tls),
                          partial(serve, options, listeners, scoreboard, sandbox),
                          partial(announce, options, listeners, sandbox, started)).run()
    finally:
        listeners.close()


# --- the limit of open files

def raise_limits(options):
    """Those of open files and of locked memory (which rings are), while we may: in a worker it would be too late.

    Raises StartError where a container's profile, or a service's filter, lets nobody ask or set.
    """
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):      # the hard limit is more than fs.nr_open is by now
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        resource.setrlimit(resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE))
    except (OSError, ValueError):
        raise StartError("this process may not look at its limits, or not set them: have the container's seccomp "
                         "profile, or the service's SystemCallFilter=, allow prlimit64") from None
    if options.cpu_affinity:
        try:
            os.sched_setaffinity(0, os.sched_getaffinity(0))
        except OSError as error:
            raise StartError(f"--cpu-affinity: this process may not choose its CPUs: {error.strerror}") from None
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
    with contextlib.suppress(OSError):
        os.fstat(fd)
        return True
    return False


# --- a child process, from the inside

def serve(options, listeners, scoreboard, sandbox, generation, number, row, ready, left):
    """The whole life of a child process; its exit status. `ready` is called when it can take requests, `left` when it
    accepts no more."""
    def make_and_run():
        if number == STATUS:
            worker = make_status_worker(listeners, scoreboard, options, sandbox)
        else:
            if options.cpu_affinity:
                own = linux.cpus()
                os.sched_setaffinity(0, {own[number % len(own)]})
            worker = make_worker(generation, listeners, number, scoreboard, row, options, sandbox)
        worker.acceptor.on_left = left
        gc.freeze()                 # nothing in the loop makes reference cycles, so the collector stays off
        sandbox.lock()
        ready()
        worker.run()
        if worker.handshake:
            tell_of_handshakes(worker.counts)
        return 0
    try:
        return explained(make_and_run, "worker: ")
    except BaseException as error:
        log.error("worker\n%s", trace(error))
        return EXIT_FAILURE


def explained(function, who=""):
    """What `function` gives; where it cannot go on, the reason is logged, and an exit status is given."""
    try:
        return function()
    except (ArchiveError, UsageError) as error:
        log.error("%s", error)
        return EXIT_USAGE
    except (RingError, StartError) as error:
        log.error("%s", error)
    except OSError as error:                        # the machine refuses something; -v debug tells where
        log.error("%s%s", who, error.strerror or error)
        log.debug("%s", trace(error))
    except MemoryError:
        log.error("%s%s", who, NO_MEMORY)
    return EXIT_FAILURE


def operations(options, tls, lazy):
    """What a worker's ring has to do: no more than that. None with --secure=off, for all."""
    if options.secure == "off":
        return None
    return (SERVING | {linux.OP_POLL_ADD}                           # that an archive is written to
            | ({linux.OP_MADVISE} if lazy else set())
            | ({linux.OP_WRITE} if options.access_log else set())
            | ({linux.OP_RECVMSG} if options.passfd else set())
            | ({linux.OP_RECVMSG, linux.OP_URING_CMD} if tls and tls.kernel_ciphers else set()))        # kernel TLS


def make_memo(options, library):
    """The Memo of a worker, and of whatever is to answer like one."""
    hsts = () if options.hsts is None else ((b"Strict-Transport-Security", b"max-age=%d" % options.hsts),)
    return Memo(library, SERVER, time.time(), hsts)


def make_worker(generation, listeners, number, scoreboard, row, options, sandbox):
    """The Worker of a generation that accepts on the `number`-th of each of `listeners`, in a process that has dropped
    what a Sandbox drops first."""
    served, redirect = ([listener.fileno() for listener in sockets] for sockets in listeners.of(number))
    counts, signals = Counts(), signal_pipe()
    library, tls = generation.library(), generation.tls
    if library.lazy:
        linux.lock_program()
    memo = make_memo(options, library)
    site = make_site(memo, generation.responders(generation.scheme))
    if options.trusted and generation.scheme == "http" and generation.tell_schemes_apart():
        site.over_tls = make_site(memo, generation.responders("https"))
        site.over_tls.share_no_requests()
    damage = watch(library)
    directory = os.open(options.acme_dir, os.O_PATH | os.O_CLOEXEC) if options.acme_dir else None
    sandbox.drop(directory)
    ring = (PolledRing if options.sqpoll_ms else Ring)(
        options.max_connections or DEFAULT_CONNECTIONS, entries=options.ring_size, sqpoll_ms=options.sqpoll_ms,
        operations=operations(options, tls, library.lazy), busyloop=options.busyloop,
        use_liburing=not options.no_liburing)
    access_log = None
    if generation.log_fd >= 0:
        from accesslog import AccessLog
        access_log = AccessLog(ring, generation.log_fd, options.log_format, LOG, generation.channel,
                               options.forwarders)
    connections, slots = limit_connections(options.max_connections)
    passing = listeners.passing.fileno() if listeners.passing else None
    limits = Limits(connections, options.header_timeout, options.keepalive_timeout, options.min_rate, options.drain,
                    options.max_per_ip)
    publish = (lambda: scoreboard.publish(row, counts)) if scoreboard else None
    worker = Worker(ring, slots, limits, counts, library, site, served + redirect, signals, passing, options.trusted,
                    access_log, publish, damage)
    if tls:
        from credentials import read_acme_challenge
        from tls import Engine
        from transport import add_tls
        tls.credentials.renew_tickets(time.time())
        challenges = None if directory is None else partial(read_acme_challenge, directory)
        redirector = Redirector(options.https_port or listeners.https_port(), challenges, tls.credentials.first_name())
        plain_site = Site(ForgetfulMemo(library, SERVER, time.time()), redirector.reply)
        add_tls(worker, Engine(tls.openssl, tls.credentials, tls.kernel_ciphers), redirect, plain_site)
    return worker


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


def tell_of_handshakes(counts):
    log.info("TLS connections: %d in the kernel, %d in userspace, %d resumed, %d failed handshakes, %d truncated",
             counts.kernel_full + counts.kernel_resumed, counts.userspace_full + counts.userspace_resumed,
             counts.kernel_resumed + counts.userspace_resumed, counts.handshakes_failed, counts.truncated)


def trace(error):
    """Where an exception comes from. Without the lines of the sources: a worker can open no file."""
    frames = (f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
              for frame, line in traceback.walk_tb(error.__traceback__))
    return "\n".join(["Traceback (most recent call last):", *frames, f"{type(error).__name__}: {error}"])


def announce(options, listeners, sandbox, started, generation):
    """Say, once requests are taken, where; and what has been given up."""
    first, *others = listeners.urls(generation.scheme)
    seconds = time.monotonic() - started
    lines = [f" {__version__}: {first} serves {generation.words()} (ready in {seconds:.2f} s)",
             *[f": also {other}" for other in others],
             *[f": {url(sockets[0], 'http')} redirects to https" for sockets in listeners.redirect],
             *[f": status on {url(listener, 'http')}" for listener in listeners.status], f": {sandbox.words()}"]
    words = "".join(f"tarweb{line}\n" for line in lines)
    with contextlib.suppress(OSError):              # a full disk, a reader that has gone: pages are served all the same
        os.write(STANDARD_ERROR if options.access_log == "-" else STANDARD_OUTPUT, os.fsencode(words))


def hold_standard_descriptors():
    """Where one of them is closed, let /dev/null take its place: a socket that did would be sent error messages."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
            pass
        os.close(fd)


def main(argv=None):
    def parse_and_run():
        arguments = sys.argv[1:] if argv is None else argv
        if arguments[:1] == ["--pack"]:
            import_group("pack")
            import pack
            return pack.main(arguments[1:], "tarweb --pack")
        options = parse_arguments(arguments, __version__)
        log.setLevel(LEVELS[options.verbose])
        if options.check:
            import check
            return check.run(options)
        if options.explain:
            from explain import explain
            return explain(options, partial(make_memo, options))
        return run(options)
    hold_standard_descriptors()
    logging.raiseExceptions = False     # a line that cannot be written is lost, and nothing else
    logging.basicConfig(format="tarweb: %(message)s")
    return explained(parse_and_run)


if __name__ == "__main__":
    sys.exit(main())
