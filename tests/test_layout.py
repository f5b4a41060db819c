"""The architecture, held by a test: which module may import which, which touch C, what is used of an engine, and how
long things may get."""

import ast
import ctypes
import importlib
import re
import sys
from types import ModuleType

import pytest
from support import ROOT

import openssl
import uring
from options import GROUPS

MAY_IMPORT = {  # arrows run one way
    "http1": set(),
    "media": set(),
    "linux": set(),
    "sparse": set(),
    "tar": {"sparse"},
    "archive": {"linux", "media", "sparse", "tar"},
    "rules": {"archive", "http1", "tar"},
    "uring": {"linux"},
    "reply": {"http1", "archive"},
    "metrics": {"clock", "options", "reply"},
    "plan": {"linux", "http1", "reply"},
    "proxy": {"connection", "linux"},
    "connection": {"linux"},
    "acceptor": {"connection", "linux", "proxy"},
    "clock": {"connection", "linux"},
    "worker": {"acceptor", "clock", "connection", "http1", "linux", "plan"},
    "transport": {"acceptor", "connection", "http1", "ktls", "linux", "plan", "tls", "worker"},
    "accesslog": {"linux", "options", "proxy"},
    "openssl": {"options"},
    "credentials": {"ktls", "openssl", "options"},
    "ktls": {"linux", "openssl", "options", "uring"},
    "tls": {"linux", "ktls", "openssl"},
    "options": {"linux", "proxy"},
    "sandbox": {"linux", "options"},
    "listeners": {"acceptor", "linux", "options"},
    "generation": {"accesslog", "archive", "credentials", "linux", "options", "pack", "reply", "rules", "tar"},
    "supervisor": {"clock", "linux", "options"},
    "folder": {"media", "tar"},
    "codings": {"folder", "media", "tar"},
    "packed": {"codings", "folder", "media", "tar"},
    "explain": {"archive", "clock", "connection", "generation", "linux", "plan", "reply", "tar", "worker"},
    "pack": {"codings", "folder", "linux", "media", "options", "packed", "tar"},
    "check": {"archive", "codings", "generation", "http1", "media", "reply", "tar"},
    "tarweb": {"accesslog", "archive", "check", "clock", "connection", "credentials", "explain", "generation",
               "linux",
               "listeners", "metrics", "options", "pack", "plan", "reply", "sandbox", "supervisor", "tar", "tls",
               "transport", "uring", "worker"},
}
BIND_C = {"linux", "uring", "openssl", "credentials", "ktls", "tls"}    # these have ctypes, and call what they like
# What others call of C by way of these six: OpenSSL's functions, and such of ours as do what they are told with any
# address. (One that does one thing only, as linux.map_file, is a call of linux.py's own.)
LENT = {"linux": {"libc_call", "pointer", "copy"}, "uring": {"Liburing", "Libc", "load_calls"}}
CALL_C = {"sandbox": {"libc_call"}, "transport": {"pointer", "copy", "BIO_read", "BIO_write", "SSL_read", "SSL_write"}}
ENGINE = "engine"       # what engines are called where they are used
LONGEST_FUNCTION = 60
LOOP, LONGEST_LOOP = ("worker", "run"), 74 # the way of nearly every request is written out in it, on one screen still
LONGEST_MODULE = 700

MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
each_module = pytest.mark.parametrize("name", MODULES)


def imports(name):
    """The top-level names that a module imports, wherever in it."""
    return imported_by(ast.parse(MODULES[name].read_text()))


def imported_by(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "there is no package to be relative to"
            found.add(node.module.partition(".")[0])
    return found


def test_every_module_has_its_place():
    assert set(MODULES) == set(MAY_IMPORT)


@each_module
def test_imports_run_one_way(name):
    ours = imports(name) & set(MODULES)
    assert ours <= MAY_IMPORT[name]


@each_module
def test_what_can_be_left_out_is_imported_where_it_is_needed(name):
    """By functions: a module that belongs to no group starts without those that do."""
    groups = {"rules", *(module for modules in GROUPS.values() for module in modules)}
    if name not in groups:
        begin = ast.Module([node for node in ast.parse(MODULES[name].read_text()).body
                            if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert not imported_by(begin) & groups


@each_module
def test_nothing_but_the_standard_library(name):
    assert imports(name) - set(MODULES) <= sys.stdlib_module_names


# --- who touches C

C_OBJECT = ctypes.c_int.__mro__[-2]         # what all of ctypes' objects are, functions included; libraries are CDLL
OPENSSL = {*openssl.FUNCTIONS, *openssl.HOT}


def nodes(name, kind):
    return [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, kind)]


def borrowed(name):
    """What a module has of our other modules, as (module, name): imported from there, or named by way of it."""
    modules = {alias.asname or alias.name: alias.name for node in nodes(name, ast.Import) for alias in node.names}
    return {(node.module, alias.name) for node in nodes(name, ast.ImportFrom) for alias in node.names} | {
        (modules[node.value.id], node.attr) for node in nodes(name, ast.Attribute)
        if isinstance(node.value, ast.Name) and node.value.id in modules}


def touches_c(module, name):
    """Whether this is an object of ctypes, or a way to one: another module, or what LENT has."""
    value = getattr(importlib.import_module(module), name)
    kind = value if isinstance(value, type) else type(value)
    return name in LENT.get(module, ()) or issubclass(kind, C_OBJECT | ctypes.CDLL | ModuleType)


@each_module
def test_only_the_bindings_touch_c(name):
    """Nor does anything else by way of them, but what CALL_C has: neither ctypes' objects, nor OpenSSL's functions."""
    if name not in BIND_C:
        assert "ctypes" not in imports(name)
        found = {lent for module, lent in borrowed(name) if module in MODULES and touches_c(module, lent)}
        found |= OPENSSL.intersection(node.attr for node in nodes(name, ast.Attribute))
        assert found == CALL_C.get(name, set())


@pytest.mark.parametrize("source", ("import linux as l; l.libc.mlock(0, 1)", "import linux; linux.SOCKADDR.raw",
                                    "from openssl import c_void_p", "from linux import libc_call",
                                    "from linux import libc", "import openssl; openssl.ctypes",
                                    "import sites, linux; linux.ctypes.memmove(1, 2, 3)",
                                    "openssl.SSL_read(ssl, 0, 1)", "import ctypes", "from ctypes import memmove",
                                    "from uring import load_calls"))
def test_a_touch_of_c_is_found(source, monkeypatch, tmp_path):
    (tmp_path / "media.py").write_text(source)
    monkeypatch.setitem(MODULES, "media", tmp_path / "media.py")
    with pytest.raises(AssertionError):
        test_only_the_bindings_touch_c("media")


# --- engines

def used_of_an_engine(name):
    return {node.attr for node in nodes(name, ast.Attribute)
            if getattr(node.value, "id", getattr(node.value, "attr", None)) == ENGINE}


def test_nothing_is_used_of_an_engine_but_its_contract():
    """Which is what the docstring of uring.py names."""
    text = uring.__doc__.partition("The contract")[2].partition("Memory order")[0]
    contract = set(re.findall(r"(?:`|engine\.)(\w+)", text))
    used = set().union(*(used_of_an_engine(name) for name in MODULES if name != "uring"))
    assert {"wait", "write", "arm_sendmsg"} <= used, "engines are called something else by now"
    assert {name for name in used if not name.startswith("arm_")} <= contract
    ring = uring.Ring(8, entries=8, buffers=1)
    assert not [name for name in used | contract - {"arm_"} if not hasattr(ring, name)]
    ring.close()


# --- how long things get


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
