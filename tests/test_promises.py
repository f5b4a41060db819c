"""README numbers what is promised, and each number has tests that bear it; no test bears one that is not there."""

import re

from support import ROOT

README = (ROOT / "README.md").read_text()
TESTS = {name: path.name for path in sorted((ROOT / "tests").glob("test_*.py"))
         for name in re.findall(r"^def (test_p\d\d_\w+)", path.read_text(), re.M)}


def promised():
    return [int(number) for number in re.findall(r"^\| P(\d+) \| ", README, re.M)]


def proved():
    """The numbers in the names of tests: test_p02_p03_... has two."""
    return {int(number) for name in TESTS for number in re.findall(r"p(\d\d)_", name)}


def test_promises_are_numbered_one_after_the_other():
    assert promised() == list(range(1, len(promised()) + 1)) and promised()


def test_each_promise_has_a_test_and_each_number_a_promise():
    assert proved() == set(promised())
