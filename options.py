"""The command line: its flags, their types, and which of them go together."""

import argparse
import logging
import os
import re
from collections import namedtuple

from linux import cpus

LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG, "trace": 5}
MAX_WORKERS = 1024              # at a time, those that finish what they were sending included

DESCRIPTION = """\
Serves every file in a tar over HTTP/1.1, through io_uring. Without flags it listens on port 8080 of all
addresses and prints the URL. NAME.br, NAME.zst and NAME.gz in the tar are sent instead of NAME to clients that
accept them; /dir/ is /dir/index.html; the nearest 404.html upwards, if there is one, is what a missing page
looks like; _headers and _redirects are the site's own rules."""

EPILOG = """\
examples:
  python3 tarweb.py site.tar                          http://localhost:8080/
  python3 tarweb.py -l 127.0.0.1:8000 site.tar        this machine only
  python3 tarweb.py --pack my-site site.tar           makes site.tar out of a directory
  python3 tarweb.py --explain 'GET /path' site.tar    why a request gets what it gets
  python3 tarweb.py --threads auto --watch --access-log access.log --status 127.0.0.1:8081 site.tar
  python3 tarweb.py --site example.com=a.tar --site '*.example.org=b.tar'
  python3 tarweb.py -C fullchain.pem -P privkey.pem -l [::]:443 --redirect-http [::]:80 site.tar
SIGHUP reloads archives and certificates, SIGUSR1 reopens the access log, SIGTERM, SIGINT and SIGQUIT end it
once what is being sent is sent. Exit status: 0 ended so, 1 failed, 2 wrong usage."""


HOST = r"(?:\*\.)?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?|\[[0-9A-Fa-f:.]+\]"


# The groups of modules that a server can do without: each is needed by a flag (here as its field of the options), and
# imported only where that is given. Without the flag their files need not be there.
GROUPS = {"pack": ("codings", "folder", "packed", "pack"), "check": ("codings", "folder", "check"),
          "explain": ("explain",),
          "tls_cert": ("openssl", "credentials", "ktls", "tls", "transport"),
          "access_log": ("accesslog",), "status": ("metrics",),
          "proxy_from": ("proxy",), "forwarded_from": ("proxy",), "passfd": ("proxy",)}


class UsageError(Exception):
    """What was given on the command line cannot be used; the text names it and says what to do."""


class StartError(Exception):
    """This machine lacks something that a flag asks for; the text says what, and what to do."""


Tcp = namedtuple("Tcp", "host port")            # an address to listen on; an empty host is all of them
Unix = namedtuple("Unix", "path mode")          # the path of a socket to listen on, and its permissions


# --- types

def matched(pattern, text, otherwise):
    """The match of all of `text`. Where there is none, raises an error: the text, and what is wrong with it."""
    match = re.fullmatch(pattern, text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} {otherwise}")
    return match


def duration(text):
    """Seconds in "1.5s" or "500ms"."""
    match = matched(r"([0-9]+(?:\.[0-9]+)?)(ms|s)", text, "is no duration: write 1.5s or 500ms")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def number(low, high):
    """An argparse type: a whole number in [low, high]."""
    def whole(text):
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return whole


def threads(text):
    """A number of workers; "auto" is one for each CPU that this process may use."""
    return len(cpus()) if text == "auto" else number(1, MAX_WORKERS)(text)


def tcp_address(text):
    """Tcp of ADDR:PORT, [ADDR]:PORT or :PORT."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDR:PORT: write 127.0.0.1:8080 or [::]:8080")
    return Tcp(match[1] or match[2] or "", int(match[3]))


def listen_address(text):
    """Tcp, or Unix of unix:PATH or unix:PATH,MODE."""
    if not text.startswith("unix:"):
        return tcp_address(text)
    path, comma, mode = text.removeprefix("unix:").partition(",")
    return Unix(socket_path(path), permissions(mode) if comma else 0o660)


def socket_path(text):
    if not text or len(os.fsencode(text)) > 107:        # <sys/un.h>: 108 bytes, the last is NUL
        raise argparse.ArgumentTypeError(f"{text!r} is no path of at most 107 bytes: write /run/tarweb.sock")
    return text


def permissions(text):
    return int(matched("0?[0-7]{3}", text, "are no permissions: write 660")[0], 8)


def log_file(text):
    """A path, or "-": standard output. It is open; where it is a socket, as journald's, none of its paths can be."""
    return "-" if text in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") else text


def site(text):
    """(host, path) of HOST=FILE.tar."""
    match = matched(f"(?s)({HOST})=(.+)", text,
                    "is not HOST=FILE.tar: write www.example.com=site.tar, or '*.example.com=site.tar'")
    return match[1].lower().removesuffix("."), match[2]


def request_line(text):
    return matched(r"(?s)\S+ .+", text, "is no request: write 'GET /path'")[0]


def field_value(text):
    return matched(r"[!-~](?:[\t -~]*[!-~])?|", text, "cannot stand in a header field")[0].encode()


# --- flags

def parse_arguments(argv, version):
    """The options: a field for each flag, and `version`, `sites` ((host, path) of each), `directories` (those of
    the paths that are directories), `trusted` and `forwarders` (proxy.Networks or None). Nobody changes them. Ends the
    program where they make no sense; raises UsageError."""
    parser = argparse.ArgumentParser("tarweb", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tarfile", metavar="SITE.tar", nargs="?",
        help="an uncompressed tar, or, to try things out, a directory; with --site, for all other hosts")
    add_tools(add)
    add("-l", "--listen", metavar="ADDR", type=listen_address, action="append", default=[],
        help="ADDR:PORT or unix:PATH[,MODE], where to listen, repeatable; port 0 takes a free one; [::] takes IPv4 "
             "too, unless an IPv4 address is given with the same port (default: [::]:8080; with TLS [::]:8443)")
    add("--site", metavar="HOST=FILE.tar", type=site, action="append", default=[],
        help="the site of a host, or of *.example.com; repeatable. Other hosts get SITE.tar, or 421 without it")
    add("--prefix", metavar="PATH", default="", help="strip this from the front of names in the tar")
    add("--dotfiles", action="store_true",
        help="serve names that begin with a dot, too (default: /.well-known/ alone)")
    add("--clean-urls", action="store_true",
        help="/about is about.html, too, where nothing else has that name (default: not)")
    add("--no-site-rules", dest="site_rules", action="store_false",
        help="serve _headers and _redirects like other files (default: they are the site's own rules)")
    add("--etags", choices=("on", "off"), default="on",
        help="entity tags from file contents; off starts faster (default: on)")
    add("--cache-control", metavar="VALUE", type=field_value, default="no-cache",
        help='Cache-Control of every file; "" for none (default: no-cache, which is: keep, but ask if it has changed)')
    add("--threads", metavar="N", type=threads, default=1,
        help="worker processes, each with a ring; auto: one for each CPU (default: 1)")
    add("--max-connections", metavar="N", type=number(1, 1 << 20),
        help="connections at a time, for each worker; beyond it idle and silent ones are closed, or new ones wait "
             "(default: 4096)")
    add("--max-per-ip", metavar="N", type=number(1, 1 << 20),
        help="connections at a time from one address (of IPv6: one /64), for each worker; those beyond are closed at "
             "once. Behind a proxy it takes --proxy-from (default: as many as there is room for)")
    add("--secure", choices=("auto", "require", "off"), default="auto",
        help="whether processes lock themselves in before they read a request (default: auto, by all means that this "
             "kernel has; require: not without all of them)")
    add("--user", metavar="NAME", help="where root starts it, who workers are to be (default: nobody)")
    add("-v", dest="verbose", metavar="LEVEL", choices=LEVELS, default="info",
        help="error, warn, info, debug or trace (default: info)")
    add("--version", action="version", version=f"tarweb {version}")
    add_running(parser.add_argument_group("running it").add_argument)
    add_tls(parser.add_argument_group("TLS").add_argument)
    add_front(parser.add_argument_group("behind another server").add_argument)
    add_patience_and_tuning(parser)
    argv = ["--check=text" if word == "--check" else word for word in argv]     # its value is no word of its own
    flags = parser.parse_args(argv, argparse.Namespace(version=version))
    for name in GROUPS:
        if getattr(flags, name):
            import_group(name)
    check(parser, flags)
    flags.directories = {path: f"--site {host}={path}" if host else path
                         for host, path in flags.sites if os.path.isdir(path)}
    for given in flags.directories.values():
        import_group("pack", given)
    return namedtuple("Options", vars(flags))(**vars(flags))


def import_group(name, given=""):
    """Import the modules of a group, before a process is locked in that uses them. given: what needs it, if that is not
    its flag. Raises UsageError."""
    for module in GROUPS[name]:
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            if error.name not in GROUPS[name]:
                raise
            needing = f"{given} is a directory, which" if given else "--" + name.replace("_", "-")
            raise UsageError(f"{needing} needs {error.name}.py, which is not beside tarweb.py") from None


def add_tools(add):
    """Flags of what serves nothing."""
    add("--pack", metavar=("DIRECTORY", "SITE.tar"), nargs=2,
        help="serve nothing, but make an archive of a directory; to be given first, and --pack --help says more")
    add("--check", metavar="=json", nargs="?", const="text", choices=("text", "json"),
        help="serve nothing, but read everything and say what is wrong with the site: a line for each finding, or, for "
             "programs, a JSON object. Exit status: 0 nothing found, 1 findings, 2 wrong usage")
    add("--explain", metavar="REQUEST", type=request_line,
        help="serve nothing, but print what a request like 'GET /path' gets, and why")
    add("-H", "--header", metavar="LINE", action="append", default=[],
        help="a header line of that request, 'Name: value'; repeatable (default: Host: localhost)")


def add_running(add):
    add("--watch", action="store_true",
        help="reload when a tar, a certificate or a key has changed and stayed so for a second")
    add("--keep", metavar="N", type=number(0, 1000), default=0,
        help="after a reload, the last N tars still answer for paths that the new one lacks (default: 0)")
    add("--access-log", metavar="FILE", type=log_file,
        help="a line for each response; - is standard output (default: none)")
    add("--log-format", choices=("combined", "json"), default="combined", help="of the access log (default: combined)")
    add("--status", metavar="ADDR", type=listen_address,
        help="ADDR:PORT or unix:PATH[,MODE] for a page of its state, and /healthz, /readyz and /metrics (Prometheus)")


def add_tls(add):
    add("-C", "--tls-cert", metavar="FILE", action="append", default=[],
        help="speak HTTPS, with this certificate and its chain (PEM); with several, the client's choice of host "
             "decides, and the first is the default")
    add("-P", "--tls-key", metavar="FILE", action="append", default=[],
        help="its private key (PEM); one for each --tls-cert, in the same order")
    add("--tls-min", choices=("1.2", "1.3"), default="1.2", help="the oldest version spoken (default: 1.2)")
    add("--ktls", choices=("auto", "require", "off"), default="auto",
        help="whether the kernel encrypts; else OpenSSL does, in userspace (default: auto, where the kernel can)")
    add("--redirect-http", metavar="ADDR:PORT", type=tcp_address,
        help="listen here too, for plain HTTP, and redirect it to HTTPS")
    add("--https-port", metavar="N", type=number(1, 65535),
        help="where the redirect leads, if clients see another port than the one listened on")
    add("--acme-dir", metavar="DIR", help="answer ACME challenges there from DIR: certbot --webroot -w DIR")
    add("--hsts", metavar="SECONDS", type=number(0, 1 << 31),
        help="have browsers insist on HTTPS so long: Strict-Transport-Security (default: not sent)")


def add_front(add):
    add("--proxy-from", metavar="CIDR", action="append", default=[],
        help="connections from this network (or unix: from unix sockets) begin with a PROXY header, v1 or v2, which "
             "says who the client is; repeatable")
    add("--forwarded-from", metavar="CIDR", action="append", default=[],
        help="the access log names the client that X-Forwarded-For, or else Forwarded, names in requests from this "
             "network (or unix: from unix sockets); repeatable")
    add("--passfd", metavar="PATH", type=socket_path,
        help="take connections from another process, at this unix datagram socket: a descriptor (SCM_RIGHTS) and the "
             "bytes read from it already")
    add("--passfd-group-name", metavar="NAME", help="the group that owns it")
    add("--passfd-perms", metavar="MODE", type=permissions, default=0o660, help="its permissions (default: 660)")
    add("--lame-duck", metavar="SECONDS", type=number(0, 86400), default=0,
        help="at SIGTERM first serve on this long, while /readyz says no, so that a balancer goes elsewhere "
             "(default: 0)")


def add_patience_and_tuning(parser):
    add = parser.add_argument_group("patience").add_argument
    add("--header-timeout", metavar="SECONDS", type=number(1, 86400), default=10,
        help="for a TLS handshake, and for a request to arrive (default: 10)")
    add("--keepalive-timeout", metavar="SECONDS", type=number(1, 86400), default=75,
        help="between requests; more than a balancer's, which mostly is 60 (default: 75)")
    add("--min-rate", metavar="BYTES", type=number(1, 1 << 30), default=1024,
        help="cut off who reads fewer bytes than this each second (default: 1024)")
    add("--drain", metavar="SECONDS", type=number(0, 86400), default=10,
        help="for sending to end after SIGTERM (default: 10)")

    add = parser.add_argument_group("tuning").add_argument
    add("--cpu-affinity", action="store_true", help="keep each worker on a CPU of its own")
    add("--preload", action="store_true", help="read the whole tar into memory at start, however large it is")
    add("--hugepages", metavar="BITS", type=number(0, 30), default=0,
        help="copy the tar into huge pages of 2^BITS bytes: 21 for 2 MiB, 30 for 1 GiB (default: 0, off)")
    add("--ring-size", metavar="N", type=number(8, 32768), default=1024,
        help="submission queue entries (default: 1024)")
    add("--sqpoll-ms", metavar="N", type=number(0, 60000), default=0,
        help="let a kernel thread take submissions, and sleep after N idle ms: under load no system calls, "
             "at the price of a busy second core (default: 0, off)")
    add("--busyloop", metavar="TIME", type=duration,
        help="look for completions this long before sleeping: 1.5s, 500ms (default: 0s; with --sqpoll-ms as long)")
    add("--no-liburing", action="store_true", help="use syscall(2) even where liburing is installed")


# --- what goes together

def check(parser, flags):
    """Each flag with those that it makes sense with; ends the program where not. Adds what follows from them."""
    hosts = [host for host, _ in flags.site]
    about_tls = {"--redirect-http": flags.redirect_http, "--hsts": flags.hsts is not None,
                 "--ktls=require": flags.ktls == "require", "--tls-min": flags.tls_min != "1.2"}
    for wrong, words in (
        (flags.pack, "--pack has to be the first argument: tarweb --pack DIRECTORY SITE.tar, then flags of its own"),
        (flags.header and not flags.explain, "--header is a line of the request that --explain is about"),
        (not flags.tarfile and not flags.site, "what is to be served? Give SITE.tar, or --site HOST=FILE.tar"),
        *((hosts.count(host) > 1, f"--site {host}=... is given twice") for host in hosts),
        (0 < flags.hugepages < 12,
         f"--hugepages {flags.hugepages}: that is less than an ordinary page; 21 is for 2 MiB"),
        (flags.forwarded_from and not flags.access_log,
         "--forwarded-from is about the access log, which needs --access-log"),
        (flags.passfd_group_name and not flags.passfd, "--passfd-group-name is about --passfd"),
        (len(flags.tls_cert) != len(flags.tls_key),
         f"{len(flags.tls_cert)} --tls-cert and {len(flags.tls_key)} --tls-key: "
         "each certificate needs its key, in the same order"),
        *((given and not flags.tls_cert, f"{flag} is about HTTPS, which needs --tls-cert and --tls-key")
          for flag, given in about_tls.items()),
        (flags.https_port and not flags.redirect_http, "--https-port is for the redirect of --redirect-http"),
        (flags.acme_dir and not os.path.isdir(flags.acme_dir),
         f"--acme-dir {flags.acme_dir}: there is no such directory"),
        (flags.acme_dir and not flags.redirect_http,
         "--acme-dir is for the plain listener, which needs --redirect-http: ACME asks on port 80"),
    ):
        if wrong:
            parser.error(words)
    if flags.busyloop is None:
        flags.busyloop = flags.sqpoll_ms / 1000
    flags.sites = [*flags.site, ("", flags.tarfile)] if flags.tarfile else flags.site
    flags.trusted = networks(parser, "--proxy-from", flags.proxy_from)
    flags.forwarders = networks(parser, "--forwarded-from", flags.forwarded_from)


def networks(parser, flag, texts):
    """The proxy.Networks that a flag gives; None where it is not given. Ends the program where one is none."""
    if not texts:
        return None
    from proxy import Networks
    try:
        return Networks(texts)
    except ValueError as error:
        parser.error(f"{flag}: {error}")
