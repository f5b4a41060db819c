"""python fuzz/run_target.py TARGET [libFuzzer's arguments]: fuzzes one target, in a process of its own (see run.py)."""

import random
import sys

import atheris

# What coverage is measured in: the modules that strangers' bytes come through, and the standard library's for tar.
MODULES = ["http1", "reply", "accesslog", "proxy", "tarfile", "tar", "archive", "tls", "ktls", "credentials",
           "acceptor", "clock", "connection", "worker", "plan", "uring"]

with atheris.instrument_imports(include=MODULES):
    sys.modules.pop("tarfile", None)        # atheris has come with it
    from targets import find


def main(name, *arguments):
    target = find(name)
    options = {"custom_mutator": mutator(target)} if target.mutate else {}
    command = f"{sys.executable} {sys.argv[0]} {name}"       # what libFuzzer starts to merge, through a shell
    atheris.Setup([command, *arguments], target.check, internal_libfuzzer=True, **options)
    atheris.Fuzz()


def mutator(target):
    """One mutation in four is libFuzzer's own."""
    def mutate(data, longest, seed):
        rnd = random.Random(seed)
        if rnd.random() < 0.25:
            return atheris.Mutate(data, longest)
        return target.mutate(data, longest, rnd) or atheris.Mutate(data, longest)
    return mutate


if __name__ == "__main__":
    main(*sys.argv[1:])
