"""tarweb.pyz: the whole server in one file. The same bytes wherever it is made, and the same server."""

import os
import shutil
import signal
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from groups import GROUPS, run_http_tests
from support import FILES, PYTHON, ROOT, run_tarweb, wait_until

NOBODY = 65534
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"__main__"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def become_nobody():
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def copy_sources(folder):
    """What it is made of, in another folder, with other times and modes."""
    (folder / "deploy").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "deploy" / "pyz.py", ROOT / "Makefile"]:
        copied = Path(shutil.copyfile(path, folder / path.relative_to(ROOT)))
        copied.chmod(0o400)
        os.utime(copied, (1, 1))
    return folder


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    """As `make tarweb.pyz` makes it."""
    folder = copy_sources(tmp_path_factory.mktemp("pyz") / "sources")
    subprocess.run(["make", "-C", folder, "tarweb.pyz", f"PYTHON={PYTHON}"], check=True, capture_output=True,
                   timeout=60)
    return folder / "tarweb.pyz"


def origins(python, path):
    """{module: the file inside tarweb.pyz that a Python loads it from}"""
    code = "import sys, zipimport; found = zipimport.zipimporter(sys.argv[1]).get_filename\n" \
           "for name in sys.argv[2:]: print(name, found(name))"
    ended = subprocess.run([python, "-c", code, path, *MODULES], check=True, capture_output=True, text=True,
                           timeout=30)
    return {name: Path(file).name for name, file in (line.split(" ", 1) for line in ended.stdout.splitlines())}


def other_pythons():
    """The Pythons here that are not of the version that the tests run with, but new enough."""
    for name in ("python3.11", "python3.12", "python3.13", "python3.14", "python3.15"):
        found = shutil.which(name)
        if found and magic_number(found) not in (None, magic_number(PYTHON)):
            yield found


def magic_number(python):
    """What .pyc files of a Python begin with; None where it does not run."""
    code = "import importlib.util; print(importlib.util.MAGIC_NUMBER.hex())"
    ended = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    return None if ended.returncode else bytes.fromhex(ended.stdout)


# --- the file ------------------------------------------------------------------------------------------------------


def test_the_same_sources_give_the_same_bytes(pyz, tmp_path):
    """Whatever the folder, the umask, the time zone, the locale, the seed of hashes, and the times of the sources."""
    made = tmp_path / "elsewhere.pyz"
    for zone, locale, seed, umask in (("Asia/Kathmandu", "C", "1", 0o077), ("America/St_Johns", "C.UTF-8", "2", 0o002)):
        subprocess.run([PYTHON, ROOT / "deploy" / "pyz.py", made], cwd=tmp_path, check=True, timeout=60, umask=umask,
                       env={**os.environ, "TZ": zone, "LC_ALL": locale, "PYTHONHASHSEED": seed})
        assert made.read_bytes() == pyz.read_bytes()
        assert made.stat().st_mode & 0o777 == 0o777 & ~umask
        assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_a_python_that_has_imported_much_gives_the_same_bytes(pyz, tmp_path):
    """Although it shares strings and numbers with the modules compiled."""
    code = "import asyncio, decimal, http.server, json, runpy, sys, unittest.mock\n" \
           "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    subprocess.run([PYTHON, "-c", code, ROOT / "deploy" / "pyz.py", tmp_path / "again.pyz"], check=True, timeout=60)
    assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_each_module_is_in_it_as_source_and_compiled(pyz):
    with zipfile.ZipFile(pyz) as zipped:
        members = zipped.infolist()
        for path in ROOT.glob("*.py"):
            assert zipped.read(path.name) == path.read_bytes()
    assert {member.filename for member in members} == {f"{name}{end}" for name in MODULES for end in (".py", ".pyc")}
    assert [member.filename for member in members] == sorted(member.filename for member in members)
    assert {(member.date_time, member.external_attr, member.compress_type) for member in members} \
        == {((1980, 1, 1, 0, 0, 0), 0o100644 << 16, zipfile.ZIP_STORED)}


def test_the_python_that_made_it_uses_what_is_compiled(pyz):
    assert origins(PYTHON, pyz) == {name: f"{name}.pyc" for name in MODULES}


def test_another_python_uses_the_sources(pyz, site, start, tmp_path):
    """Here with compiled modules of a version that never was."""
    beginning = b"\1\0\0\0"                             # of what follows the magic number
    other = tmp_path / "other.pyz"
    other.write_bytes(pyz.read_bytes().replace(magic_number(PYTHON) + beginning, b"\1\1\r\n" + beginning))
    assert origins(PYTHON, other) == {name: f"{name}.py" for name in MODULES}
    assert start(site, program=(other,)).fetch("/next").body == FILES["next"]


def test_pythons_of_other_versions_serve_too(pyz, site, start):
    others = list(other_pythons()) or pytest.skip("there is no Python here of another version that is new enough")
    for python in others:
        assert origins(python, pyz) == {name: f"{name}.py" for name in MODULES}
        assert start(site, python=(python,), program=(pyz,)).fetch("/next").body == FILES["next"]


# --- the server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "arguments"), [
    (0, ["--help"]), (0, ["--version"]), (2, []), (2, ["--nonesuch", "{site}"]), (2, ["nowhere.tar"]), (2, ["{pyz}"]),
    (2, ["--tls-cert", "none.pem", "--tls-key", "none.pem", "{site}"]), (2, ["--user", "nosuchuser", "{site}"]),
    (1, ["--listen", "{taken}", "{site}"]),
])
def test_it_says_what_the_flat_files_say(pyz, site, server, tmp_path, status, arguments):
    words = [word.format(pyz=pyz, site=site, taken=f"127.0.0.1:{server.port}") for word in arguments]
    expected = run_tarweb(*words, cwd=tmp_path)
    ended = run_tarweb(*words, cwd=tmp_path, program=pyz)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, expected.stdout, expected.stderr)


@pytest.mark.parametrize("name", GROUPS)
def test_all_that_is_needed_is_imported_before_anything_is_served(pyz, start, pairs, tmp_path, monkeypatch, name):
    """Workers may not read the file, and later another takes its place: the server goes on, reloads, and replaces
    processes that die."""
    folder = tmp_path / "private"
    folder.mkdir(0o700)
    os.chmod(shutil.copy(pyz, folder), 0o400)
    monkeypatch.chdir(folder)
    group = GROUPS[name]
    flags = "--threads", "2", *group.flags(tmp_path, pairs["p256"])
    server = start(group.site(tmp_path), *flags, program=("tarweb.pyz",))
    group.check(server, tmp_path, pairs["p256"])
    (folder / "tarweb.pyz").unlink()
    (folder / "tarweb.pyz").write_bytes(b"another version")
    before = server.workers
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2 " in server.stderr())
    group.check(server, tmp_path, pairs["p256"])
    wait_until(lambda: len(server.workers) == len(before))
    before = server.workers
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(server.workers) == len(before) and not set(server.workers) & set(before))
    group.check(server, tmp_path, pairs["p256"])


def test_the_tests_of_http(pyz):
    run_http_tests(pyz)


@pytest.mark.parametrize("flags", [("-I",), ("-I", "-S"), ("-P",), ("-O",), ("-X", "frozen_modules=off")], ids=" ".join)
def test_flags_of_python(pyz, site, start, flags):
    assert start(site, python=(PYTHON, *flags), program=(pyz,)).fetch("/next").body == FILES["next"]


def test_it_is_a_program(pyz, site, start):
    assert start(site, python=(), program=(pyz,)).fetch("/next").body == FILES["next"]


@as_root
def test_started_by_somebody_else(pyz, site, start):
    """Who may read it, and not write to it."""
    with tempfile.TemporaryDirectory() as folder:           # pytest's own are for root alone
        os.chmod(folder, 0o755)
        copied = shutil.copy(pyz, folder)
        os.chmod(copied, 0o444)
        server = start(shutil.copy(site, folder), program=(copied,), preexec_fn=become_nobody)
    assert server.fetch("/next").body == FILES["next"]
