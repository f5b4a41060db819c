#!/usr/bin/env python3
"""tarweb: serves a whole web site straight out of one tar file.

Reads like a sequence: take the flags, open the archive, bind, fork, serve.
"""

import argparse
import contextlib
import errno
import gc
import logging
import os
import re
import resource
import signal
import socket
import sys
import time

from abi import map_file, populate
from archive import ArchiveError, open_archive
from conn import BACKLOG, Worker
from credentials import Credentials, CredentialsError
from ktls import KernelTlsError, probe
from openssl import TLS1_2, TLS1_3, OpenSSL, OpenSSLError
from plan import ForgetfulPlanner, Planner
from redirect import Redirector
from reply import Responder
from secure import SecureWorker
from state import Limits, Site
from tls import Engine
from uring import PolledRing, Ring, RingError

__version__ = "0.1.0"

LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG, "trace": 5}
EXIT_FAILURE, EXIT_USAGE = 1, 2
SERVER = b"tarweb"
DEFAULT_CONNECTIONS = 4096
MAX_OPEN_AT_START = 4096        # descriptors looked at for those that are open: two for each worker, and a few

log = logging.getLogger("tarweb")


class UsageError(Exception):
    """What was given on the command line cannot be used; the text names it and says what to do."""


# --- the command line

DESCRIPTION = """\
Serves every file in a tar over HTTP/1.1, through io_uring. Without flags it listens on port 8080 of all
addresses and prints the URL. NAME.br, NAME.zst and NAME.gz in the tar are sent instead of NAME to clients that
accept them; /dir/ is /dir/index.html; /404.html, if there, is what a missing page looks like."""

EPILOG = """\
examples:
  python3 tarweb.py site.tar                          http://localhost:8080/
  python3 tarweb.py -l 127.0.0.1:8000 site.tar        this machine only
  python3 tarweb.py --threads 4 --prefix www/ site.tar
  python3 tarweb.py -C fullchain.pem -P privkey.pem -l [::]:443 --redirect-http [::]:80 site.tar
SIGTERM and SIGINT end it once what is being sent is sent. Exit status: 0 ended so, 1 failed, 2 wrong usage."""


def duration(text):
    """Seconds in "1.5s" or "500ms"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 1.5s or 500ms")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def number(low, high):
    """An argparse type: a whole number in [low, high]."""
    def whole(text):
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return whole


def listen_address(text):
    """(host, port) of ADDR:PORT, [ADDR]:PORT or :PORT."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDR:PORT: write 127.0.0.1:8080 or [::]:8080")
    return match[1] or match[2] or "", int(match[3])


def field_value(text):
    if not re.fullmatch(r"[!-~](?:[\t -~]*[!-~])?|", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot stand in a header field")
    return text.encode()


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser("tarweb", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tarfile", metavar="SITE.tar", help="an uncompressed tar")
    add("-l", "--listen", metavar="ADDR:PORT", type=listen_address,
        help="where to listen; port 0 takes a free one (default: [::]:8080, IPv4 too; with TLS [::]:8443)")
    add("--prefix", metavar="PATH", default="", help="strip this from the front of names in the tar")
    add("--etags", choices=("on", "off"), default="on",
        help="entity tags from file contents; off starts faster (default: on)")
    add("--cache-control", metavar="VALUE", type=field_value, default="no-cache",
        help='Cache-Control of every file; "" for none (default: no-cache, which is: keep, but ask if it has changed)')
    add("--threads", metavar="N", type=number(1, 1024), default=1,
        help="worker processes, each with a ring (default: 1)")
    add("--max-connections", metavar="N", type=number(1, 1 << 20),
        help="connections at a time, for each worker; beyond it idle ones are closed, or new ones wait (default: 4096)")
    add_tls_arguments(parser.add_argument_group("TLS").add_argument)
    limits = parser.add_argument_group("patience")
    add = limits.add_argument
    add("--header-timeout", metavar="SECONDS", type=number(1, 86400), default=10,
        help="for a TLS handshake, and for a request to arrive (default: 10)")
    add("--keepalive-timeout", metavar="SECONDS", type=number(1, 86400), default=60,
        help="between requests (default: 60)")
    add("--min-rate", metavar="BYTES", type=number(1, 1 << 30), default=1024,
        help="cut off who reads fewer bytes than this each second (default: 1024)")
    add("--drain", metavar="SECONDS", type=number(0, 86400), default=10,
        help="for sending to end after SIGTERM (default: 10)")
    tuning = parser.add_argument_group("tuning")
    add = tuning.add_argument
    add("--ring-size", metavar="N", type=number(8, 32768), default=1024,
        help="submission queue entries (default: 1024)")
    add("--sqpoll-ms", metavar="N", type=number(0, 60000), default=0,
        help="let a kernel thread take submissions, and sleep after N idle ms: under load no system calls, "
             "at the price of a busy second core (default: 0, off)")
    add("--busyloop", metavar="TIME", type=duration,
        help="look for completions this long before sleeping: 1.5s, 500ms (default: 0s; with --sqpoll-ms as long)")
    add("--no-liburing", action="store_true", help="use syscall(2) even where liburing is installed")
    add = parser.add_argument
    add("-v", dest="verbose", metavar="LEVEL", choices=LEVELS, default="info",
        help="error, warn, info, debug or trace (default: info)")
    add("--version", action="version", version=f"tarweb {__version__}")
    arguments = parser.parse_args(argv)
    if arguments.busyloop is None:
        arguments.busyloop = arguments.sqpoll_ms / 1000
    check_tls_arguments(parser, arguments)
    return arguments


def add_tls_arguments(add):
    add("-C", "--tls-cert", metavar="FILE", action="append", default=[],
        help="speak HTTPS, with this certificate and its chain (PEM); with several, the client's choice of host "
             "decides, and the first is the default")
    add("-P", "--tls-key", metavar="FILE", action="append", default=[],
        help="its private key (PEM); one for each --tls-cert, in the same order")
    add("--tls-min", choices=("1.2", "1.3"), default="1.2", help="the oldest version spoken (default: 1.2)")
    add("--ktls", choices=("auto", "require", "off"), default="auto",
        help="whether the kernel encrypts; else OpenSSL does, in userspace (default: auto, where the kernel can)")
    add("--redirect-http", metavar="ADDR:PORT", type=listen_address,
        help="listen here too, for plain HTTP, and redirect it to HTTPS")
    add("--acme-dir", metavar="DIR", help="answer ACME challenges there from DIR: certbot --webroot -w DIR")
    add("--hsts", metavar="SECONDS", type=number(0, 1 << 31),
        help="have browsers insist on HTTPS so long: Strict-Transport-Security (default: not sent)")


def check_tls_arguments(parser, arguments):
    """Each flag with those that it makes sense with; ends the program where not."""
    if len(arguments.tls_cert) != len(arguments.tls_key):
        parser.error(f"{len(arguments.tls_cert)} --tls-cert and {len(arguments.tls_key)} --tls-key: "
                     "each certificate needs its key, in the same order")
    for flag, given in (("--redirect-http", arguments.redirect_http), ("--hsts", arguments.hsts is not None),
                        ("--ktls=require", arguments.ktls == "require"), ("--tls-min", arguments.tls_min != "1.2")):
        if given and not arguments.tls_cert:
            parser.error(f"{flag} is about HTTPS, which needs --tls-cert and --tls-key")
    if arguments.acme_dir and not os.path.isdir(arguments.acme_dir):
        parser.error(f"--acme-dir {arguments.acme_dir}: there is no such directory")
    if arguments.acme_dir and not arguments.redirect_http:
        parser.error("--acme-dir is for the plain listener, which needs --redirect-http: ACME asks on port 80")


# --- sockets

def open_listeners(address, count, flag):
    """`count` listening TCP sockets on (host, port), over which the kernel spreads connections.

    `flag`: that the address was given with. Raises UsageError, OSError.
    """
    host, port = address
    try:
        found = socket.getaddrinfo(host or "::", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"{flag}: {host!r} is no address of this machine: {error.strerror}") from None
    family, _, _, _, where = found[0]
    sockets = []
    for _ in range(count):
        sockets.append(listen(family, where, share=count > 1))
        where = (where[0], sockets[0].getsockname()[1], *where[2:])
    return sockets


def listen(family, where, share):
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # Accepted sockets inherit it: a response is one send, and the next must not wait for its acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(where)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {where[0]} port {where[1]}: {error.strerror}") from None
    listener.listen(BACKLOG)
    return listener


def bind(arguments):
    """The listeners for --listen, one for each worker, and those for --redirect-http, as two lists.

    Without --listen it is all addresses, where there is no IPv6 only those of IPv4. Raises UsageError, OSError.
    """
    count, port = arguments.threads, 8443 if arguments.tls_cert else 8080
    try:
        listeners = open_listeners(arguments.listen or ("::", port), count, "--listen")
    except OSError as error:
        if arguments.listen or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        listeners = open_listeners(("0.0.0.0", port), count, "--listen")
    if not arguments.redirect_http:
        return listeners, []
    return listeners, open_listeners(arguments.redirect_http, count, "--redirect-http")


def url(listener, scheme):
    """What to type into a browser on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("::", "0.0.0.0"):
        host = "localhost"
    return f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"


# --- serving

def raise_file_limit():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit_connections(wanted):
    """How many connections there may be: `wanted`, or where that is None the default or what the machine allows.

    Gives (connections, slots), and sets the limit of open files to `slots`: no descriptor will be as large as that.
    Raises UsageError.
    """
    taken = [fd for fd in range(MAX_OPEN_AT_START) if is_open(fd)]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = wanted or DEFAULT_CONNECTIONS
    try:
        return connections, limit_files(taken[-1] + 1 + connections + 1, hard)
    except (OSError, ValueError):               # more than `hard`, and not root's to raise; or more than fs.nr_open
        if wanted:
            raise UsageError(f"--max-connections {wanted} is more than the limit of open files ({hard}) allows: "
                             "raise it (ulimit -n, and sysctl fs.nr_open) or ask for fewer") from None
    connections = hard - len(taken) - 1         # the kernel gives the lowest free number
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


def signal_pipe():
    """The end of a pipe at which a byte comes out for each SIGTERM or SIGINT: a read of it is one more operation."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return read_end


def open_tls(arguments):
    """What TLS takes, for `Engine`: OpenSSL, the credentials, and the ciphers that the kernel takes over.

    None without --tls-cert. Says where TLS will be done. Raises OpenSSLError, CredentialsError, KernelTlsError.
    """
    if not arguments.tls_cert:
        return None
    openssl = OpenSSL()
    ciphers: frozenset = frozenset()
    reason = "--ktls=off"
    if arguments.ktls != "off":
        ciphers, reason = probe(not arguments.no_liburing)
    if arguments.ktls == "require" and reason:
        raise KernelTlsError(f"--ktls=require: {reason}")
    credentials = Credentials(openssl, list(zip(arguments.tls_cert, arguments.tls_key, strict=True)),
                              TLS1_3 if arguments.tls_min == "1.3" else TLS1_2, log_secrets=bool(ciphers))
    for warning in credentials.warnings:
        log.warning("%s", warning)
    if ciphers:
        log.info("TLS in the kernel (handshakes by %s)%s", openssl.version, f", but in part: {reason}" * bool(reason))
    else:
        log.info("TLS in userspace (%s): %s", openssl.version, reason)
    return openssl, credentials, ciphers


def serve(site, listeners, arguments, ready):
    """One worker: its ring, then requests on `listeners` until a signal ends it.

    `site`: archive, address of its mapping, what `open_tls` gave. `ready` is called when it can take requests.
    """
    signals = signal_pipe()
    kind = PolledRing if arguments.sqpoll_ms else Ring
    ring = kind(arguments.max_connections or DEFAULT_CONNECTIONS, entries=arguments.ring_size,
                sqpoll_ms=arguments.sqpoll_ms, busyloop=arguments.busyloop, use_liburing=not arguments.no_liburing)
    connections, slots = limit_connections(arguments.max_connections)
    limits = Limits(connections, arguments.header_timeout, arguments.keepalive_timeout, arguments.min_rate,
                    arguments.drain)
    worker = make_worker(site, ring, limits, listeners, signals, slots, arguments)
    # Nothing in the loop makes reference cycles, so the collector stays off. Frozen pages stay shared between workers.
    gc.collect()
    gc.freeze()
    ready()
    worker.run()


def make_worker(site, ring, limits, listeners, signals, slots, arguments):
    archive, address, tls = site
    responder = Responder(archive, arguments.cache_control)
    hsts = b"" if arguments.hsts is None else b"Strict-Transport-Security: max-age=%d\r\n" % arguments.hsts
    planner = Planner(address, responder.spell_out, SERVER, time.time(), hsts)
    common = ring, responder, planner, limits, [listener.fileno() for listener in listeners], signals, slots
    if tls is None:
        return Worker(*common)
    redirector = Redirector(listeners[0].getsockname()[1], arguments.acme_dir)
    plain_site = Site(redirector, ForgetfulPlanner(address, None, SERVER, time.time()))
    return SecureWorker(*common, engine=Engine(*tls), archive=archive, archive_address=address,
                        plain={listener.fileno() for listener in listeners[1:]}, plain_site=plain_site)


def serve_in_processes(site, listeners, arguments, ready):
    """A worker process for each list of listeners. When one ends, so do the others; give the exit status for all."""
    workers = {}
    pipes = []
    for its_listeners in listeners:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os._exit(run_worker(site, its_listeners, arguments, write_end))
        os.close(write_end)
        workers[pid] = read_end
        pipes.append(read_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop(workers))
    if sum(len(os.read(pipe, 1)) for pipe in pipes) == len(pipes):
        ready()
    status = 0
    while workers:
        pid, ended = os.wait()
        if workers.pop(pid, None) is not None and ended:
            log.error("worker %d ended: %s; stopping the others", pid, describe(ended))
            status = EXIT_FAILURE
            stop(workers)
    return status


def run_worker(site, listeners, arguments, write_end):
    """The whole life of a worker process; its exit status."""
    try:
        serve(site, listeners, arguments, lambda: os.write(write_end, b"1"))
        return 0
    except (RingError, UsageError) as error:
        log.error("%s", error)
    except BaseException:
        log.exception("worker")
    return EXIT_FAILURE


def stop(workers):
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def describe(ended):
    """What os.wait says of a process's end, in words."""
    code = os.waitstatus_to_exitcode(ended)
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def size(count):
    """`count` bytes for people: 45.6 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000 ** power:.1f} {' kMG'[power]}B"


def run(arguments):
    """Limit, open, bind, fork, serve. The exit status; raises what main explains."""
    started = time.monotonic()
    gc.disable()        # indexing makes no cycles, but so many objects that the collector would take a fifth of it
    raise_file_limit()
    archive = open_archive(arguments.tarfile, arguments.prefix, arguments.etags == "on")
    for note in archive.notes:
        log.warning("%s: %s", arguments.tarfile, note)
    address = map_file(archive.fd, archive.size)
    if archive.size < available_memory() // 2:
        populate(address, archive.size)
    tls = open_tls(arguments)
    listeners, redirecting = bind(arguments)

    def ready():
        scheme = "https" if tls else "http"
        print(f"tarweb {__version__}: {url(listeners[0], scheme)} serves {archive.files} files, {size(archive.bytes)}, "
              f"from {arguments.tarfile} (ready in {time.monotonic() - started:.2f} s)", flush=True)
        if redirecting:
            print(f"tarweb: {url(redirecting[0], 'http')} redirects to https", flush=True)

    site = archive, address, tls
    by_worker = list(zip(listeners, redirecting, strict=True) if redirecting else zip(listeners, strict=True))
    if arguments.threads == 1:
        serve(site, by_worker[0], arguments, ready)
        return 0
    return serve_in_processes(site, by_worker, arguments, ready)


def available_memory():
    """Bytes that can be used without swapping, as the kernel reckons; 0 where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"MemAvailable: *([0-9]+) kB", file.read())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0


def main(argv=None):
    arguments = parse_arguments(argv)
    logging.basicConfig(format="tarweb: %(message)s", level=LEVELS[arguments.verbose])
    try:
        return run(arguments)
    except (ArchiveError, CredentialsError, UsageError) as error:
        log.error("%s", error)
        return EXIT_USAGE
    except (RingError, OpenSSLError, KernelTlsError) as error:
        log.error("%s", error)
    except OSError as error:
        log.error("%s", error.strerror or error)
    return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
