"""What `pip install` brings: a `tarweb` command that needs nothing but Python, and no name that others use."""

import os
import re
import shutil
import subprocess
import sys
import venv

import pytest
from groups import GROUPS
from support import FILES, ROOT, run_tarweb

MODULES = {path.name for path in ROOT.glob("*.py")}
# Modules that other projects have put into site-packages under the names of ours.
OTHERS = dict.fromkeys(MODULES - {"tarweb.py"} | {"systemd.py"},
                       'raise SystemExit("the module of another project was imported")\n')
PIP = sys.executable, "-m", "pip", "--disable-pip-version-check"
OFFLINE = "-q", "--no-index", "--no-deps", "--no-build-isolation"


def run(*command, **options):
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
                          **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what it is built from: building leaves files there."""
    source = tmp_path_factory.mktemp("package") / "source"
    (source / "deploy").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE",
                 ROOT / "deploy" / "tarweb_start.py"]:
        shutil.copy(path, source / path.relative_to(ROOT))
    return source


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """The site-packages of a virtual environment that has OTHERS, and tarweb from a wheel, built from a source
    distribution."""
    folder = tmp_path_factory.mktemp("installed")
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=source)
    (sdist,) = folder.glob("tarweb-*.tar.gz")
    run(*PIP, "wheel", *OFFLINE, "-w", folder, sdist)
    (wheel,) = folder.glob("tarweb-*.whl")
    venv.create(folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    for name, contents in OTHERS.items():
        (packages / name).write_text(contents)
    run(*PIP, "--python", folder / "venv/bin/python", "install", *OFFLINE, wheel)
    return packages


@pytest.fixture(scope="module")
def command(installed):
    return str(installed.parents[2] / "bin" / "tarweb")


def test_only_names_that_begin_with_tarweb_are_installed(source, tmp_path):
    run(*PIP, "install", *OFFLINE, "--target", tmp_path, source)
    assert all(path.name.startswith("tarweb") for path in tmp_path.iterdir() if path.name not in ("bin", "__pycache__"))
    assert [path.name for path in tmp_path.glob("bin/*")] == ["tarweb"]
    assert [path.name.split(".")[0] for path in tmp_path.glob("__pycache__/*")] == ["tarweb_start"]
    assert {path.name for path in tmp_path.glob("tarweb_files/*")} - {"__pycache__"} == MODULES
    ended = run(tmp_path / "bin/tarweb", "--version", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert re.search(r"\d+\.\d+", ended.stdout)


@pytest.mark.parametrize("name", GROUPS)
def test_the_command_serves(command, start, pairs, tmp_path, name):
    """Although others have modules of the same names."""
    group = GROUPS[name]
    server = start(group.site(tmp_path), *group.flags(tmp_path, pairs["p256"]), python=(), program=(command,))
    group.check(server, tmp_path, pairs["p256"])


@pytest.mark.parametrize(("status", "arguments"), [(0, ["--help"]), (0, ["--version"]), (2, ["--nonesuch"]), (2, [])])
def test_it_says_what_the_flat_files_say(command, status, arguments):
    expected = run_tarweb(*arguments)
    ended = subprocess.run([command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, expected.stdout, expected.stderr)


def test_it_is_a_module_too(command, site, start):
    python = os.path.join(os.path.dirname(command), "python")
    assert start(site, python=(python, "-I"), program=("-m", "tarweb_start")).fetch("/next").body == FILES["next"]


def test_modules_of_others_stay_as_they_were(installed):
    assert {path.name: path.read_text() for path in installed.glob("*.py") if path.name != "tarweb_start.py"} == OTHERS
