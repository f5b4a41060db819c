"""Groups of files can be left out, as the README's table says: the rest serves, and tells what is missing."""

import re
import shutil
import signal

import pytest
from groups import BASE, COMMANDS, GROUPS, RULES, files_of_groups, run_http_tests
from support import FILES, PYTHON, ROOT, TARWEB, run_tarweb, wait_until

FILES_OF = files_of_groups()
OTHERS = [name for name in GROUPS if name != BASE]
BY_FLAG = [name for name in OTHERS if name != RULES]
ALL = {path.name for path in ROOT.glob("*.py")}


def copy(folder, names):
    """The program in a folder that has these of our files and nothing else."""
    folder.mkdir()
    for name in names:
        shutil.copy(ROOT / name, folder)
    return folder / "tarweb.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The base alone."""
    return copy(tmp_path_factory.mktemp("base") / "files", FILES_OF[BASE])


def test_each_file_is_in_one_group():
    assert set(FILES_OF) == set(GROUPS)
    assert sorted(name for names in FILES_OF.values() for name in names) == sorted(ALL)


# --- the base alone ------------------------------------------------------------------------------------------------


def test_the_base_passes_the_tests_of_http(base):
    run_http_tests(base)


def test_the_base_reloads_and_replaces_workers(base, site, start):
    server = start(site, "--threads", "2", program=(base,))
    assert server.fetch("/next").body == FILES["next"]
    before = server.workers
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2 " in server.stderr())
    wait_until(lambda: len(server.workers) == 2 and not set(server.workers) & set(before))
    assert server.fetch("/next").body == FILES["next"]


@pytest.mark.parametrize(("status", "arguments"), [
    (0, ["--help"]), (0, ["--version"]), (2, []), (2, ["--nonesuch", "{site}"]), (2, ["nowhere.tar"]),
    (1, ["--listen", "{taken}", "{site}"]),
])
def test_the_base_says_what_all_files_say(base, site, server, status, arguments):
    words = [word.format(site=site, taken=f"127.0.0.1:{server.port}") for word in arguments]
    expected = run_tarweb(*words)
    ended = run_tarweb(*words, program=base)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, expected.stdout, expected.stderr)


# --- groups beside it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_the_base_and_one_group_serve(start, pairs, tmp_path, name):
    program = copy(tmp_path / "files", FILES_OF[BASE] + FILES_OF[name])
    server = start(GROUPS[name].site(tmp_path), *GROUPS[name].flags(tmp_path, pairs["p256"]), program=(program,))
    GROUPS[name].check(server, tmp_path, pairs["p256"])


def refusal(program, site, flags):
    """The last line of what is said, and nothing is served."""
    ended = run_tarweb("--listen", "127.0.0.1:0", *flags, site, program=program)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("missing", [name for group in BY_FLAG for name in FILES_OF[group]])
def test_a_missing_file_is_named_and_what_needs_it(site, pairs, tmp_path, missing):
    (group,) = (group for group, names in FILES_OF.items() if missing in names)
    program = copy(tmp_path / "files", ALL - {missing})
    flags = COMMANDS.get(missing) or GROUPS[group].flags(tmp_path, pairs["p256"])
    sentence = refusal(program, site, flags)
    assert missing in sentence
    assert flags[0] in sentence


@pytest.mark.parametrize("name", BY_FLAG)
def test_each_flag_that_needs_a_missing_group_says_so(base, site, pairs, tmp_path, name):
    flags = GROUPS[name].flags(tmp_path, pairs["p256"])
    together = len(flags) if name == "TLS" else 2           # a certificate and its key; a flag and its value
    for given in (flags[i:i + together] for i in range(0, len(flags), together)):
        sentence = refusal(base, site, given)
        assert given[0] in sentence
        assert any(file in sentence for file in FILES_OF[name])


def test_without_rules_a_sites_own_are_files_like_any_other(base, site, start, tmp_path):
    (tmp_path / "packages" / "rules").mkdir(parents=True)       # somebody else's
    (tmp_path / "packages" / "rules" / "__init__.py").touch()
    python = ("env", f"PYTHONPATH={tmp_path / 'packages'}", PYTHON)
    group = GROUPS[RULES]
    server = start(group.site(tmp_path), program=(base,), python=python)
    assert server.fetch("/_redirects").body == group.files["_redirects"]
    assert server.fetch("/old").status == 404
    assert "_headers and _redirects are files like any other, because rules.py" in server.stderr()
    for quiet in (start(site, program=(base,)), start(group.site(tmp_path), "--no-site-rules", program=(base,))):
        assert "rules.py" not in quiet.stderr()


def imported(server):
    """Our modules that a server and its processes have imported, by what `-X importtime` has printed."""
    found = re.findall(r"^import time: +\d+ \| +\d+ \| +(\w+)$", server.stderr(), re.M)
    return {f"{name}.py" for name in found} & ALL


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_not_used_is_not_imported(start, pairs, tmp_path, name):
    """Nor after a reload, when other processes serve."""
    server = start(GROUPS[name].site(tmp_path), *GROUPS[name].flags(tmp_path, pairs["p256"]),
                   python=(PYTHON, "-X", "importtime"))
    GROUPS[name].check(server, tmp_path, pairs["p256"])
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded: generation 2 " in server.stderr())
    server.stop()
    assert imported(server) == {*FILES_OF[BASE], *FILES_OF[name], *FILES_OF[RULES]} - {TARWEB.name, *COMMANDS}


def test_rules_are_not_imported_where_they_are_not_wanted(site, start):
    server = start(site, "--no-site-rules", python=(PYTHON, "-X", "importtime"))
    server.stop()
    assert imported(server) == {*FILES_OF[BASE]} - {TARWEB.name}
