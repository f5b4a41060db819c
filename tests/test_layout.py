"""The architecture, held by a test: which module may import which, who touches C, and how long things may get."""

import ast
import sys

import pytest
from support import ROOT

MAY_IMPORT = {  # arrows run one way
    "http1": set(),
    "media": set(),
    "linux": set(),
    "state": set(),
    "counters": set(),
    "tar": set(),
    "archive": {"media", "tar"},
    "uring": {"linux"},
    "reply": {"http1", "archive"},
    "status": {"counters", "reply"},
    "plan": {"linux", "http1", "reply"},
    "proxy": {"linux"},
    "door": {"linux", "plan", "proxy", "state"},
    "life": {"linux", "door", "plan", "state"},
    "accesslog": {"linux"},
    "conn": {"linux", "door", "http1", "life", "plan", "state"},
    "openssl": set(),
    "credentials": {"openssl"},
    "ktls": {"linux", "openssl", "uring"},
    "tls": {"linux", "ktls", "openssl"},
    "sealed": {"linux", "conn", "plan", "state", "tls"},
    "secure": {"linux", "conn", "door", "http1", "ktls", "sealed", "state", "tls"},
    "options": {"proxy"},
    "sandbox": {"linux", "options"},
    "sites": {"linux", "archive", "tar", "reply"},
    "listeners": {"door", "linux", "options"},
    "generation": {"linux", "credentials", "ktls", "openssl", "options", "sites"},
    "workers": {"linux", "accesslog", "archive", "conn", "counters", "credentials", "door", "life", "options", "plan",
                "reply", "secure", "sites", "state", "status", "tls", "uring"},
    "supervisor": {"linux", "life"},
    "tarweb": {"counters", "credentials", "generation", "ktls", "listeners", "tar", "openssl", "options",
               "sandbox", "supervisor", "uring", "workers"},
}
MAY_USE_CTYPES = {"linux", "uring", "openssl", "credentials", "ktls", "tls"}  # the modules that bind C
LONGEST_FUNCTION = 60
LOOP, LONGEST_LOOP = ("conn", "run"), 70    # the way of nearly every request is written out in it, on one screen still
LONGEST_MODULE = 700

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
