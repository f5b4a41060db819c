"""The architecture, held by a test: which module may import which, who touches C, and how long things may get."""

import ast
import sys

import pytest
from support import ROOT

MAY_IMPORT = {  # arrows run one way
    "http1": set(),
    "media": set(),
    "linux": set(),
    "counters": set(),
    "tar": set(),
    "archive": {"media", "tar"},
    "uring": {"linux"},
    "reply": {"http1", "archive"},
    "status": {"counters", "reply"},
    "plan": {"linux", "http1", "reply"},
    "proxy": {"connection", "linux"},
    "connection": {"linux"},
    "acceptor": {"connection", "linux", "proxy"},
    "clock": {"connection", "linux"},
    "worker": {"acceptor", "clock", "connection", "http1", "linux", "plan"},
    "transport": {"acceptor", "connection", "http1", "ktls", "linux", "plan", "tls", "worker"},
    "accesslog": {"linux"},
    "openssl": set(),
    "credentials": {"openssl"},
    "ktls": {"linux", "openssl", "uring"},
    "tls": {"linux", "ktls", "openssl"},
    "options": {"proxy"},
    "sandbox": {"linux", "options"},
    "sites": {"linux", "archive", "tar", "reply"},
    "listeners": {"acceptor", "linux", "options"},
    "generation": {"linux", "credentials", "ktls", "openssl", "options", "sites"},
    "workers": {"accesslog", "archive", "clock", "connection", "counters", "credentials", "linux", "options", "plan",
                "reply", "sites", "status", "tls", "transport", "uring", "worker"},
    "supervisor": {"clock", "linux"},
    "tarweb": {"counters", "credentials", "generation", "ktls", "listeners", "tar", "openssl", "options",
               "sandbox", "supervisor", "uring", "workers"},
}
MAY_USE_CTYPES = {"linux", "uring", "openssl", "credentials", "ktls", "tls"}  # the modules that bind C
LONGEST_FUNCTION = 60
LOOP, LONGEST_LOOP = ("worker", "run"), 70 # the way of nearly every request is written out in it, on one screen still
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


def test_no_inheritance_deeper_than_two():
    """Of the project's classes at most one stands between any class and what is not the project's."""
    bases = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
             for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.ClassDef)}
    for name, above in bases.items():
        assert not [base for base in above for further in bases.get(base, ()) if further in bases], name


@each_module
def test_length(name):
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            longest = LONGEST_LOOP if (name, node.name) == LOOP else LONGEST_FUNCTION
            assert node.end_lineno - node.lineno + 1 <= longest, node.name
