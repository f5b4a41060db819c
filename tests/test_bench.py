"""The benchmark measures what it says: answers other than those that a case is about make a round invalid."""

import random
import sys
from dataclasses import replace

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import cases
import content
import load
import report
from servers import FLOOR_PATH, Site, find, serving

VARIED = ("missing", "conditional", "ranges", "bombs")
needs_wrk = pytest.mark.skipif(not find("wrk"), reason="wrk is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Those files of the benchmark's that these tests ask for."""
    folder = tmp_path_factory.mktemp("bench")
    made = Site(folder / "site", folder / "site.tar", sys.executable)
    names = ["small/1k.bin", "large/1m.bin", *(f"pages/f{number}.html" for number in range(content.PAGES))]
    sizes = [(name, content.SIZES.get(name, 1 << 10)) for name in names]
    content.write_files(made.directory, made.tar, sizes, random.Random(content.SEED))
    return made


@pytest.fixture(scope="module", params=["tarweb", "nginx"])
def server(site, request):
    if not find("nginx") and request.param == "nginx":
        pytest.skip("nginx is not installed")
    with serving(request.param, site, cores=cases.CORES) as running:
        yield running


@needs_wrk
@pytest.mark.parametrize("name", VARIED)
def test_requests_that_differ_get_the_answers_they_are_to_get(server, name):
    assert cases.one_round(server, cases.CASES[name], 1)["errors"] == []


@needs_wrk
@pytest.mark.parametrize("name, asks, said", [
    ("missing", (), "answers that are no errors"),
    ("conditional", cases.CASES["mix"].asks, "bytes on average"),
    ("ranges", (), "bytes on average"),
])
def test_other_answers_make_a_round_invalid(server, name, asks, said):
    """Here all of them are whole files."""
    assert said in cases.one_round(server, replace(cases.CASES[name], asks=asks), 1)["errors"][0]


@pytest.mark.skipif(not find("cc"), reason="there is no C compiler")
def test_the_floor_sends_the_response_of_tarweb(site):
    with serving("tarweb", site) as tarweb, load.connected(tarweb.port, 1) as (client,):
        expected = load.ask(client, load.get(FLOOR_PATH, tarweb.port))
    with serving("floor", site) as floor, load.connected(floor.port, 2) as clients:
        for client in (*clients, *clients):
            assert load.ask(client, load.get(FLOOR_PATH, floor.port)) == expected


def test_every_target_has_a_case():
    asked = set()

    class Cases(dict):
        def get(self, name, default):
            asked.add(name)
            return default

    for target in report.TARGETS:
        target.measured({"cases": Cases(), "special": {}})
    assert {"mix", "small", *VARIED} <= asked <= set(cases.CASES)
