"""The architecture, held by a test: which module may import which, who touches C, and how long things may get."""

import ast
import sys

import pytest
from support import ROOT

MAY_IMPORT = {  # arrows run one way
    "http1": set(),
    "mediatype": set(),
    "abi": set(),
    "state": set(),
    "counters": set(),
    "proxy": set(),
    "systemd": set(),
    "tree": set(),
    "members": {"tree"},
    "archive": {"mediatype", "members", "tree"},
    "uring": {"abi"},
    "reply": {"http1", "archive"},
    "redirect": {"archive", "reply"},
    "status": {"counters", "reply"},
    "plan": {"abi", "http1", "reply"},
    "passfd": {"abi"},
    "door": {"abi", "passfd", "proxy", "state"},
    "life": {"abi", "door", "state"},
    "accesslog": {"abi"},
    "conn": {"abi", "door", "http1", "life", "plan", "reply", "state"},
    "openssl": set(),
    "credentials": {"openssl"},
    "ktls": {"abi", "openssl", "uring"},
    "tls": {"abi", "ktls", "openssl"},
    "sealed": {"abi", "conn", "state", "tls"},
    "secure": {"abi", "conn", "door", "http1", "ktls", "sealed", "state", "tls"},
    "options": {"proxy"},
    "seccomp": set(),
    "sandbox": {"abi", "options", "passfd", "seccomp"},
    "sites": {"abi", "archive", "members", "reply"},
    "listeners": {"door", "options", "passfd", "systemd"},
    "generation": {"abi", "credentials", "ktls", "openssl", "options", "sites"},
    "workers": {"abi", "accesslog", "archive", "conn", "counters", "door", "life", "options", "plan", "redirect",
                "secure", "sites", "state", "status", "tls", "uring"},
    "supervisor": {"abi", "life"},
    "tarweb": {"counters", "credentials", "generation", "ktls", "listeners", "members", "openssl", "options",
               "sandbox", "supervisor", "systemd", "uring", "workers"},
}
MAY_USE_CTYPES = {"abi", "uring", "openssl", "credentials", "ktls", "tls"}  # the modules that bind C
LONGEST_FUNCTION = 60
LOOP, LONGEST_LOOP = ("conn", "run"), 70    # the way of nearly every request is written out in it, on one screen still
LONGEST_MODULE = 500

MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
each_module = pytest.mark.parametrize("name", MODULES)


def imports(name):
    """The top-level names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: there is no package to be relative to"
            found.add(node.module.partition(".")[0])
    return found


def test_every_module_has_its_place():
    assert set(MODULES) == set(MAY_IMPORT)


@each_module
def test_imports_run_one_way(name):
    ours = imports(name) & set(MODULES)
    assert ours <= MAY_IMPORT[name]


@each_module
def test_nothing_but_the_standard_library(name):
    assert imports(name) - set(MODULES) <= sys.stdlib_module_names


@each_module
def test_only_the_bindings_touch_c(name):
    assert "ctypes" not in imports(name) or name in MAY_USE_CTYPES


@each_module
def test_length(name):
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            longest = LONGEST_LOOP if (name, node.name) == LOOP else LONGEST_FUNCTION
            assert node.end_lineno - node.lineno + 1 <= longest, node.name
