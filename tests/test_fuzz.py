"""What the fuzzers have found worth keeping, looked at again; that they would notice a fault; and a short run of them.

`make fuzz` goes on searching. Names that begin with p05 to p08 are the promises of the README.
"""

import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "fuzz"))

import targets
import tls_targets

import accesslog
import archive
import http1
import proxy
import reply
import rules
import tls
import worker
import tar

ARCHIVES, FRAMING = ("tar", "links", "rules"), ("request", "body", "connection")
OTHERS = [name for name in targets.TARGETS if name not in ARCHIVES + FRAMING]
RUNS = 2000             # new inputs in the short search
LARGEST_CORPUS = 300_000


# --- the corpus

def look_at_all(name):
    for data in targets.inputs(name):
        targets.TARGETS[name].check(data)


@pytest.mark.parametrize("name", ARCHIVES)
def test_p05_p06_archives(name):
    look_at_all(name)


@pytest.mark.parametrize("name", FRAMING)
def test_p07_where_requests_end(name):
    look_at_all(name)


@pytest.mark.parametrize("name", OTHERS)
def test_p08_all_other_bytes(name):
    look_at_all(name)


def test_every_target_has_a_corpus_and_it_is_small():
    assert {folder.name for folder in targets.CORPUS.iterdir()} == set(targets.TARGETS)
    assert sum(file.stat().st_size for file in targets.CORPUS.rglob("*") if file.is_file()) < LARGEST_CORPUS


# --- faults that are put in: the corpus has to show each of them

FAULTS = {
    "request: two lengths": ("request", http1, "WANTED", {**http1.WANTED, b"content-length": -1}),
    "body: a chunk's end is not looked at": ("body", http1.Body, "chunk_end",
                                             lambda self, line: setattr(self, "expects", http1.Body.chunk_size)),
    "path: dot segments stay": ("path", http1, "remove_dot_segments", lambda path: path),
    "reply: no entity tag is another's": ("reply", reply, "matches", lambda *_, **__: False),
    "answer: codings mean nothing": ("answer", http1, "VARYING",
                                     re.compile(rb"\n(?:Cookie|Accept-Encoding): [^\r\n]*\r(?=\n)")),
    "answer: a line feed is no line end": ("answer", http1, "VARYING", re.compile(rb"\nCookie: [^\r]*\r(?=\n)")),
    "ranges: nothing is joined": ("ranges", reply, "joined", lambda ranges: ranges),
    "log: quotes are left alone": ("log", accesslog, "clean", lambda value, limit: value[:limit]),
    "host: the port stays": ("host", reply, "HOST_AND_PORT", re.compile(rb"(.+)")),
    "proxy: checksums are not looked at": ("proxy", proxy, "check_tlvs", lambda *_: None),
    "passfd: a file is taken": ("passfd", proxy, "is_stream", lambda fd: True),
    "tar: any name": ("tar", tar, "_wrong_name", lambda name: ""),
    "tar: tags of something else": ("tar", archive, "_read_batch",
                                    lambda fd, path, batch: [archive.Content(b'"x"', True, 0, b"")] * len(batch)),
    "links: a way out": ("links", tar, "_parent", lambda name: name.rpartition(b"/")[0]),
    "rules: two slashes are left": ("rules", rules, "PATH_START", re.compile(rb"(?!)")),
    "rules: framing can be changed": ("rules", rules, "UNTOUCHED", frozenset()),
    "rules: what is put in is not encoded": ("rules", rules, "quote_from_bytes",
                                             lambda value, safe: value.decode("latin-1")),
    "connection: it goes on after the last": ("connection", worker.Plain, "is_last", lambda *_: False),
    "tls: records are not counted": ("tls", tls, "split_records", lambda data: (2, b"")),
    "hello: what was not read is left": ("hello", tls.Engine, "discard", lambda self: None),
}


@pytest.mark.parametrize("case", FAULTS)
def test_the_corpus_shows_a_fault(case, monkeypatch):
    name, where, attribute, fault = FAULTS[case]
    try:
        monkeypatch.setattr(where, attribute, fault)
        with pytest.raises(Exception):      # noqa: B017, PT011  # whatever the fault leads to
            look_at_all(name)
    finally:
        tls_targets.engine.cache_clear()


# --- the fuzzers themselves

def fuzz(root, *arguments):
    return subprocess.run([sys.executable, str(root / "fuzz" / "run.py"), "--fresh", "--seed", "1", *arguments],
                          capture_output=True, text=True, timeout=100, check=False)


def test_p08_a_short_search_finds_nothing():
    """All targets in one process, since it takes longer to begin than to search."""
    pytest.importorskip("atheris")
    done = fuzz(ROOT, "--target", "all", "--runs", str(RUNS + len(targets.inputs("all"))))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 crashes" in done.stdout


def test_what_is_found_is_kept_and_told(tmp_path):
    pytest.importorskip("atheris")
    shutil.copytree(ROOT / "fuzz", tmp_path / "fuzz", ignore=shutil.ignore_patterns("crashes", "corpus"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    for module in ROOT.glob("*.py"):
        shutil.copy(module, tmp_path)
    spoilt = (ROOT / "proxy.py").read_text().replace("if size > MAX_BLOCK:", "if size == MAX_BLOCK:")
    assert spoilt != (ROOT / "proxy.py").read_text()
    (tmp_path / "proxy.py").write_text(spoilt)
    done = fuzz(tmp_path, "--target", "proxy", "--runs", "20000")
    assert done.returncode == 1
    assert "AssertionError" in done.stdout
    [kept] = (tmp_path / "fuzz" / "crashes").iterdir()
    assert targets.front_targets.SIGNATURE in kept.read_bytes()
    assert str(kept) in done.stdout
