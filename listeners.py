"""The sockets that connections come in by: opened once, by the parent, and kept over all reloads.

A TCP address has a socket for each worker (SO_REUSEPORT), over which the kernel spreads connections; the workers of
the next generation take up the same ones, so what waits in a queue is not lost. Unix sockets, and those that systemd
opened, are one for all workers.

What systemd and a service say to each other, inherited sockets and notifications, stands here too: no library of its
is needed.
"""

import contextlib
import errno
import grp
import itertools
import os
import re
import socket
import stat
import time

from acceptor import BACKLOG
from linux import TCP_OPTIONS
from options import Tcp, Unix, UsageError

class Listeners:
    """All that one server listens on.

    site, redirect: for each address a list of sockets, one for each worker or one for all. status: a list of sockets.
    passing: a datagram socket or None. Raises UsageError, OSError.
    """

    def __init__(self, options):
        self.options = options
        self.site: list[list[socket.socket]] = []
        self.redirect: list[list[socket.socket]] = []
        self.status: list[socket.socket] = []
        self.passing: socket.socket | None = None
        self.inherited: list[socket.socket] = []
        self.paths: dict[socket.socket, str] = {}       # of unix sockets, to be removed at the end
        self.ipv4_ports = {address.port for address in options.listen
                           if isinstance(address, Tcp) and re.fullmatch("[0-9.]+", address.host)} - {0}
        try:
            self.open_all()
        except BaseException:
            self.close()
            raise

    def open_all(self):
        options = self.options
        for fd, name in listen_fds(os.environ, os.getpid()):        # what systemd has opened, named for what it is for
            listener = inherited(fd, name)
            self.inherited.append(listener)
            if name == "status":
                self.status.append(listener)
            else:
                (self.redirect if name == "redirect" else self.site).append([listener])
        if not self.site:                       # else systemd has the say
            self.site = ([self.open(address, "--listen") for address in options.listen]
                         or [self.open_default(8443 if options.tls_cert else 8080)])
        if self.redirect and not options.tls_cert:
            raise UsageError("systemd passed a socket named redirect: that needs --tls-cert and --tls-key")
        if options.redirect_http and not self.redirect:
            self.redirect = [self.open(options.redirect_http, "--redirect-http")]
        if options.status and not self.status:
            self.status = self.open(options.status, "--status", 1)
        if options.passfd:
            self.passing = self.open_unix(Unix(options.passfd, options.passfd_perms), "--passfd", socket.SOCK_DGRAM)
        if options.passfd_group_name:
            try:
                os.chown(options.passfd, -1, grp.getgrnam(options.passfd_group_name).gr_gid)
            except KeyError:
                raise UsageError(f"--passfd-group-name: there is no group {options.passfd_group_name!r}") from None
            except OSError as error:
                raise UsageError(f"--passfd-group-name {options.passfd_group_name}: {error.strerror}") from None

    # opening

    def open(self, address, flag, count=None):
        """Sockets that listen on a Tcp or Unix address, which was given with `flag`."""
        if isinstance(address, Unix):
            return [self.open_unix(address, flag, socket.SOCK_STREAM)]
        return open_tcp(address, count or self.options.threads, flag, address.port in self.ipv4_ports)

    def open_default(self, port):
        """All addresses; where there is no IPv6, those of IPv4."""
        try:
            return self.open(Tcp("", port), "--listen")
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
        return self.open(Tcp("0.0.0.0", port), "--listen")

    def open_unix(self, address, flag, kind):
        """A socket at a path. One that nobody listens on any more is replaced."""
        path, mode = address
        remove_stale(path, flag, kind)
        umask = os.umask(0o777 & ~mode)
        try:
            listener = socket.socket(socket.AF_UNIX, kind)
            listener.bind(path)
            self.paths[listener] = path
            if kind == socket.SOCK_STREAM:
                listener.listen(BACKLOG)
        except OSError as error:
            raise OSError(error.errno, f"{flag}: cannot listen on {path}: {error.strerror}") from None
        finally:
            os.umask(umask)
        return listener

    # using

    def of(self, worker):
        """(site, redirect): the sockets that the worker of this number accepts from."""
        return [[sockets[worker % len(sockets)] for sockets in addresses] for addresses in (self.site, self.redirect)]

    def close_site(self):
        """Have nobody come in any more, by those that are ours; but leave the status listener."""
        self.close_all([*itertools.chain(*self.site, *self.redirect), *filter(None, [self.passing])])

    def close(self):
        self.close_site()
        self.close_all([*self.status, *self.paths])

    def close_all(self, sockets):
        for listener in sockets:
            if listener not in self.inherited:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                with contextlib.suppress(OSError, KeyError):        # no path, or removed before
                    os.unlink(self.paths.pop(listener))

    def https_port(self):
        """Where a redirect to HTTPS leads."""
        return next((sockets[0].getsockname()[1] for sockets in self.site if sockets[0].family != socket.AF_UNIX), 443)

    def urls(self, scheme):
        return [url(sockets[0], scheme) for sockets in self.site]


def inherited(fd, name):
    """The listening socket that systemd has passed as descriptor `fd`. Raises UsageError."""
    with contextlib.suppress(OSError):
        listener = socket.socket(fileno=fd)
        if listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.setblocking(True)
            tune(listener)
            return listener
    raise UsageError(f"descriptor {fd} ({name}) passed by systemd is no listening stream socket")


def open_tcp(address, count, flag, only_ipv6=False):
    """`count` listening TCP sockets, over which the kernel spreads connections. Raises UsageError, OSError.

    only_ipv6: whether [::] is without the addresses of IPv4, for which there is another socket.

    The first one is bound without SO_REUSEPORT, so that a port at which another process listens is an error, even where
    that process has set the option. It is set then, so that the others can be bound to the same port (socket(7)).
    """
    host, port = address
    try:
        found = socket.getaddrinfo(host or "::", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"{flag}: {host!r} is no address of this machine: {error.strerror}") from None
    family, _, _, _, where = found[0]
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, len(sockets) > 0)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
            tune(listener)
            listener.bind(where)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, count > 1)
            listener.listen(BACKLOG)
            where = listener.getsockname()
            sockets.append(listener)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host or '::'} port {port}: {error.strerror}") from None
    return sockets


def tune(listener):
    """Accepted sockets inherit it."""
    if listener.family != socket.AF_UNIX:
        for option, value in TCP_OPTIONS:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def remove_stale(path, flag, kind):
    """Remove a socket that its process has left behind. Raises UsageError where something else is in the way."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{flag}: {path} is there already, and no socket: move it away, or take another path")
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.connect(path)
        raise UsageError(f"{flag}: {path} is in use by another process")
    except ConnectionRefusedError:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}") from None


def url(listener, scheme):
    """What to type into a browser on this machine."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    host = "localhost" if host in ("::", "0.0.0.0") else f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}/"


# --- systemd

FIRST_FD = 3                    # sd_listen_fds(3): SD_LISTEN_FDS_START


class Notifier:
    """Tells the service manager how we are (sd_notify(3)). Where there is none, or it does not listen, nobody is told:
    nothing raises, nothing waits. watchdog_seconds: how often to call `watchdog`, which is half the time after which
    the service manager would take us for dead; None where it does not look (sd_watchdog_enabled(3)).
    """

    def __init__(self, environ):
        path = environ.pop("NOTIFY_SOCKET", "")
        self.address = "\0" + path[1:] if path.startswith("@") else path
        self.watchdog_seconds: float | None = None
        self.socket: socket.socket | None = None
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", None)
        if is_number(microseconds) and pid in (None, str(os.getpid())):
            self.watchdog_seconds = int(microseconds) / 2_000_000 or None
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


def listen_fds(environ, pid):
    """[(descriptor, its name)] of the sockets passed to process `pid` (sd_listen_fds(3)); close-on-exec from now on.

    What tells of them is removed from `environ`: it is for one process only. Raises UsageError.
    """
    for_pid, count, names = (environ.pop(name, None) for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if for_pid is None or count is None:
        return []
    if not is_number(for_pid) or not is_number(count):
        raise UsageError(f"LISTEN_PID={for_pid!r} and LISTEN_FDS={count!r} in the environment ought to be numbers")
    if int(for_pid) != pid:
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise UsageError(f"LISTEN_FDS={count} in the environment, but descriptor {fd}: {error.strerror}") from None
    found = names.split(":") if names else ["unknown"] * len(fds)       # "unknown" as in sd_listen_fds_with_names(3)
    if len(found) != len(fds):
        raise UsageError(f"LISTEN_FDNAMES={names!r} in the environment has not {count} names, one for each descriptor")
    return list(zip(fds, found, strict=True))


def is_number(text):
    return text.isascii() and text.isdigit() and len(text) < 20
