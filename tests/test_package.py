"""`pip install .` gives a `tarweb` command that needs nothing but Python."""

import os
import re
import shutil
import subprocess
import sys

from support import ROOT


def test_an_installed_command_starts(tmp_path):
    source, prefix = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation",
                    "--disable-pip-version-check", "--target", prefix, source],
                   check=True, stdin=subprocess.DEVNULL, timeout=100)
    ended = subprocess.run([prefix / "bin/tarweb", "--version"], cwd=tmp_path, check=True, capture_output=True,
                           text=True, env={**os.environ, "PYTHONPATH": str(prefix)}, timeout=30)
    assert re.search(r"\d+\.\d+", ended.stdout)
    installed = {path.name for path in prefix.glob("*.py")}
    assert installed == {path.name for path in ROOT.glob("*.py")}, "py-modules in pyproject.toml is out of date"
