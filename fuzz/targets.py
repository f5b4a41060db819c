"""What is fuzzed: for each target a function that looks at any bytes, and what helps to find bytes worth looking at.

A check gives nothing, and fails (AssertionError, or whatever should not have come out of the server's code) where an
invariant does not hold. It depends on its input alone, so that each input of the corpus can be looked at again.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
for folder in (HERE, HERE.parent / "tests", HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import front_targets  # noqa: E402
import host_targets  # noqa: E402
import http_targets  # noqa: E402
import rules_targets  # noqa: E402
import tar_targets  # noqa: E402
import tls_targets  # noqa: E402
import worker_targets  # noqa: E402


class Target(NamedTuple):
    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]        # to begin with, beside the corpus
    words: tuple[bytes, ...] = ()               # a dictionary: what is worth being put somewhere
    longest: int = 1000                         # bytes of an input
    mutate: Callable | None = None              # (bytes, greatest size, Random) -> bytes, beside libFuzzer's own


TARGETS = {
    "request": Target(http_targets.request, http_targets.request_seeds, http_targets.WORDS),
    "body": Target(http_targets.body, http_targets.body_seeds, http_targets.CHUNK_WORDS, 400),
    "path": Target(http_targets.path, http_targets.path_seeds, http_targets.PATH_WORDS, 200),
    "reply": Target(http_targets.reply, http_targets.reply_seeds, http_targets.FIELD_WORDS, 400),
    "answer": Target(http_targets.answer, http_targets.answer_seeds, http_targets.ANSWER_WORDS),
    "ranges": Target(http_targets.ranges, http_targets.ranges_seeds, http_targets.RANGE_WORDS, 120),
    "host": Target(host_targets.host, host_targets.host_seeds, host_targets.WORDS, 600),
    "log": Target(http_targets.log, http_targets.log_seeds, http_targets.WORDS, 2500),
    "proxy": Target(front_targets.proxy, front_targets.proxy_seeds, front_targets.WORDS, 600),
    "passfd": Target(front_targets.passfd, front_targets.passfd_seeds, (), 40),
    "tar": Target(tar_targets.tar, tar_targets.tar_seeds, tar_targets.WORDS, 16384, tar_targets.mutate),
    "links": Target(tar_targets.links, tar_targets.links_seeds, (), 100),
    "rules": Target(rules_targets.rules, rules_targets.rules_seeds, rules_targets.WORDS, 600),
    "connection": Target(worker_targets.connection, worker_targets.connection_seeds, worker_targets.WORDS, 1500),
    "tls": Target(tls_targets.tls, tls_targets.tls_seeds, (), 200),
    "hello": Target(tls_targets.hello, tls_targets.hello_seeds, tls_targets.WORDS, 2000),
}


def one_of_all(data):
    """The target that the first byte chooses looks at the rest: for a short look at all of them in one process."""
    choose(data).check(data[1:])


def choose(data):
    return [*TARGETS.values()][(data[0] if data else 0) % len(TARGETS)]


def mutate_one(data, longest, rnd):
    """None where libFuzzer has to do it itself."""
    change = choose(data).mutate
    return change and data[:1] + change(data[1:], longest - 1, rnd)


def seeds_of_all():
    return [bytes([number]) + data for number, name in enumerate(TARGETS) for data in inputs(name)]


ALL = Target(one_of_all, seeds_of_all, longest=4000, mutate=mutate_one)


def find(name):
    return ALL if name == "all" else TARGETS[name]


def inputs(name):
    """Seeds and corpus of a target, each once, in an order that is always the same."""
    files = sorted((CORPUS / name).iterdir()) if (CORPUS / name).is_dir() else []
    return list(dict.fromkeys((*find(name).seeds(), *(file.read_bytes() for file in files))))
