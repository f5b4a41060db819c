#!/usr/bin/env python3
"""tarweb: serves a whole web site straight out of one tar file.

Reads like a sequence: take the flags, listen, open the archives, fork, serve.
"""

import contextlib
import gc
import logging
import os
import sys
import time
import traceback
from functools import partial

import workers
from generation import Generation
from listeners import Listeners, Notifier, url
from options import LEVELS, StartError, UsageError, import_group, parse_arguments
from sandbox import Sandbox
from supervisor import STATUS, Supervisor
from tar import ArchiveError
from uring import Ring, RingError

__version__ = "0.1.0"

EXIT_FAILURE, EXIT_USAGE = 1, 2
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
NO_MEMORY = "there is not enough memory: raise its limit (ulimit -v, or that of the control group)"

log = logging.getLogger("tarweb")


def run(options):
    """Limit, listen, load, fork, serve. The exit status; raises what main explains."""
    started = time.monotonic()
    gc.disable()        # indexing makes no cycles, but so many objects that the collector would take a fifth of it
    workers.raise_limits(options)
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

    def on_ready(generation):
        words = "".join(f"{line}\n" for line in announce(generation, listeners, sandbox, started))
        with contextlib.suppress(OSError):          # a full disk, a reader that has gone: pages are served all the same
            os.write(STANDARD_ERROR if options.access_log == "-" else STANDARD_OUTPUT, os.fsencode(words))

    try:
        return Supervisor(options, listeners, scoreboard, notifier, partial(Generation, options, tls),
                          partial(serve, options, listeners, scoreboard, sandbox), on_ready).run()
    finally:
        listeners.close()


def serve(options, listeners, scoreboard, sandbox, generation, number, row, ready, left):
    """The whole life of a child process; its exit status."""
    try:
        if number == STATUS:
            worker = workers.make_status_worker(listeners, scoreboard, options, sandbox)
        else:
            if options.cpu_affinity:
                cpus = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            worker = workers.make_worker(generation, listeners, number, scoreboard, row, options, sandbox)
        workers.run(worker, sandbox, ready, left)
        return 0
    except (RingError, StartError, UsageError) as error:
        log.error("%s", error)
    except OSError as error:                        # the machine refuses something; -v debug tells where
        log.error("worker: %s", error.strerror or error)
        log.debug("%s", trace(error))
    except MemoryError:
        log.error("worker: %s", NO_MEMORY)
    except BaseException as error:
        log.error("worker\n%s", trace(error))
    return EXIT_FAILURE


def trace(error):
    """Where an exception comes from. Without the lines of the sources: a worker can open no file."""
    frames = (f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
              for frame, line in traceback.walk_tb(error.__traceback__))
    return "\n".join(["Traceback (most recent call last):", *frames, f"{type(error).__name__}: {error}"])


def announce(generation, listeners, sandbox, started):
    """What is said once requests are taken: a line, one more for each further listener, and what has been given up."""
    first, *others = listeners.urls(generation.scheme)
    seconds = time.monotonic() - started
    yield f"tarweb {__version__}: {first} serves {generation.words()} (ready in {seconds:.2f} s)"
    for other in others:
        yield f"tarweb: also {other}"
    for sockets in listeners.redirect:
        yield f"tarweb: {url(sockets[0], 'http')} redirects to https"
    for listener in listeners.status:
        yield f"tarweb: status on {url(listener, 'http')}"
    yield f"tarweb: {sandbox.words()}"


def hold_standard_descriptors():
    """Where one of them is closed, let /dev/null take its place: a socket that did would be sent error messages."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
            pass
        os.close(fd)


def main(argv=None):
    hold_standard_descriptors()
    logging.raiseExceptions = False     # a line that cannot be written is lost, and nothing else
    logging.basicConfig(format="tarweb: %(message)s")
    try:
        options = parse_arguments(argv, __version__)
        log.setLevel(LEVELS[options.verbose])
        return run(options)
    except (ArchiveError, UsageError) as error:
        log.error("%s", error)
        return EXIT_USAGE
    except (RingError, StartError) as error:
        log.error("%s", error)
    except OSError as error:
        log.error("%s", error.strerror or error)
    except MemoryError:
        log.error("%s", NO_MEMORY)
    return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
