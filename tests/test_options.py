"""Options are values; and each group of modules can be left out, until a flag needs it."""

import shutil
import subprocess
import sys

import pytest
from support import PYTHON, ROOT
from test_systemd import as_service

from options import GROUPS, parse_arguments

NEEDED = [(name, module) for name, modules in GROUPS.items() for module in modules]
VALUES = {"pack": ("my-site",), "check": (), "explain": ("GET /",), "tls_cert": ("cert.pem", "--tls-key", "key.pem"),
          "access_log": ("-",), "status": ("127.0.0.1:0",), "proxy_from": ("127.0.0.1",),
          "forwarded_from": ("127.0.0.1", "--access-log", "-"), "passfd": ("socket",)}


def flag_of(name):
    return "--" + name.replace("_", "-")


def run_without(module, folder, *arguments, python=(PYTHON,)):
    """Run a copy of the program that lacks a module, to its end."""
    for path in ROOT.glob("*.py"):
        if path.stem != module:
            shutil.copy(path, folder)
    return subprocess.run([*python, folder / "tarweb.py", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=30, check=False, cwd=folder)


@pytest.mark.parametrize(("name", "module"), NEEDED)
def test_a_module_that_was_left_out_is_named(tmp_path, name, module):
    ended = run_without(module, tmp_path, "-l", "127.0.0.1:0", flag_of(name), *VALUES[name], "site.tar")
    assert ended.stderr == f"tarweb: {flag_of(name)} needs {module}.py, which is not beside tarweb.py\n"
    assert (ended.returncode, ended.stdout) == (2, "")


def test_a_status_socket_of_systemds_needs_metrics_too(tmp_path, site):
    sockets = as_service("--socket", "site=127.0.0.1:0", "--socket", "status=127.0.0.1:0")
    ended = run_without("metrics", tmp_path, str(site), python=sockets)
    assert ended.stderr == "tarweb: --status needs metrics.py, which is not beside tarweb.py\n"
    assert (ended.returncode, ended.stdout) == (2, "")


def test_what_is_not_used_is_not_imported():
    """Not for the program, and not for its workers."""
    code = "import sys, tarweb; tarweb.parse_arguments(['site.tar'], ''); print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not set(imported.split()) & {module for _, module in NEEDED}


def test_nobody_changes_options():
    options = parse_arguments(["--threads", "3", "site.tar"], "1.2")
    with pytest.raises(AttributeError):
        options.threads = 2
    assert (options.threads, options.version) == (3, "1.2")


def test_what_follows_from_flags():
    options = parse_arguments(["--site", "A.b.=a.tar", "--sqpoll-ms", "50", "--proxy-from", "::1", "site.tar"], "")
    assert options.sites == [("a.b", "a.tar"), ("", "site.tar")]
    assert options.busyloop == 0.05 and options.trusted.hold(b"::1")
    options = parse_arguments(["--busyloop", "2s", "--sqpoll-ms", "50", "site.tar"], "")
    assert options.busyloop == 2 and options.trusted is None


def test_networks_that_are_none(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--proxy-from", "10.0.0.1/8", "site.tar"], "")
    assert ended.value.code == 2
    assert ("--proxy-from: '10.0.0.1/8' is not a network: write 10.0.0.0/8, or leave out the / for one address"
            in capsys.readouterr().err)


def test_connections_are_kept_longer_than_by_balancers():
    """Theirs are closed after 60 s mostly: a request must not meet a connection that we are just closing."""
    assert parse_arguments(["site.tar"], "").keepalive_timeout == 75
    shown = (ROOT / "deploy/haproxy.cfg").read_text()
    assert shown.count("90s") == 2 and "75s" not in shown, "more than that"
