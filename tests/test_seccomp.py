"""Filters of system calls: the programs, run by an interpreter of our own for each architecture, and by the kernel;
and the numbers, by libseccomp's tool."""

import errno
import os
import platform
import shutil
import subprocess

import pytest

import sandbox
from linux import libc_call
from sandbox import ALLOW, ALWAYS, ARCHITECTURES, INSTRUCTION, KILL, NUMBERS, REFUSE, X32, assemble

EVERYTHING = dict(sandbox.LOOP)
for calls in sandbox.CALLS_OF_FLAGS.values():
    EVERYTHING |= calls
HIGHEST = 500           # above all numbers of system calls so far
# uretprobe and uprobe of x86_64: not for programs to call, so the kernel lets them past filters, and ends who does.
PROBES = {335, 336} if platform.machine() == "x86_64" else set()
here = pytest.mark.skipif(not sandbox.supported(), reason="no filters of system calls for this machine")


def column(machine):
    return 0 if machine == "x86_64" else 1


def run(program, number, architecture, *arguments):
    """What a program returns about a call (<linux/bpf_common.h>; the kernel's Documentation/networking/filter.rst)."""
    data = (number.to_bytes(4, "little") + architecture.to_bytes(4, "little") + bytes(8)
            + b"".join(argument.to_bytes(8, "little") for argument in (*arguments, *[0] * (6 - len(arguments)))))
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = INSTRUCTION.unpack_from(program, at * INSTRUCTION.size)
        at += 1
        if code == sandbox.LOAD:
            accumulator = int.from_bytes(data[k:k + 4], "little")
        elif code == sandbox.AND:
            accumulator &= k
        elif code == sandbox.EQUAL:
            at += if_true if accumulator == k else if_false
        elif code == sandbox.AT_LEAST:
            at += if_true if accumulator >= k else if_false
        else:
            assert code == sandbox.RETURN
            return k


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_only_what_is_named_is_allowed(machine):
    program = assemble(EVERYTHING, ALLOW, KILL, machine)
    allowed = {NUMBERS[name][column(machine)] for name, conditions in EVERYTHING.items() if conditions == ALWAYS}
    limited = {NUMBERS[name][column(machine)] for name, conditions in EVERYTHING.items() if conditions != ALWAYS}
    for number in set(range(HIGHEST)) - limited:
        assert run(program, number, ARCHITECTURES[machine]) == (ALLOW if number in allowed else KILL), number


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("otherwise", [ALLOW, KILL])
def test_another_architecture_is_death(machine, otherwise):
    """The numbers of 32-bit programs, which a 64-bit one can call, are others."""
    i386, arm = 0x40000003, 0x40000028
    program = assemble(sandbox.LOOP, ALLOW, otherwise, machine)
    for architecture in {i386, arm, *ARCHITECTURES.values()} - {ARCHITECTURES[machine]}:
        assert {run(program, number, architecture) for number in range(HIGHEST)} == {KILL}


def test_x32_is_death():
    program = assemble(dict.fromkeys(sandbox.DENIED, ALWAYS), REFUSE | errno.EPERM, ALLOW, "x86_64")
    assert {run(program, X32 | number, ARCHITECTURES["x86_64"]) for number in range(HIGHEST)} == {KILL}
    assert run(program, 1, ARCHITECTURES["x86_64"]) == ALLOW


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize(("name", "arguments", "allowed"), [
    ("mmap", (0, 4096, 3), True), ("mmap", (0, 4096, 7), False), ("mmap", (0, 4096, 4), False),
    ("mprotect", (0, 4096, 1), True), ("mprotect", (0, 4096, 5), False),
    ("mprotect", (0, 4096, 1 << 32 | 1), True),         # the kernel takes the lower half of what is an int
    ("ioctl", (3, 0x5421), True), ("ioctl", (3, 0x5413), False),
    ("setsockopt", (3, 6, 1), True), ("setsockopt", (3, 6, 25), True), ("setsockopt", (3, 6, 31), False),
    ("setsockopt", (3, 1, 1), False),
    ("newfstatat", (3, 0, 0, 0x1000), True), ("newfstatat", (3, 0, 0, 0x100), False),
])
def test_conditions(machine, name, arguments, allowed):
    program = assemble(EVERYTHING, ALLOW, KILL, machine)
    found = run(program, NUMBERS[name][column(machine)], ARCHITECTURES[machine], *arguments)
    assert found == (ALLOW if allowed else KILL)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_the_loop_may_ask_of_a_socket(machine):
    """Whether its client reads, and nothing else."""
    program, number = assemble(sandbox.LOOP, ALLOW, KILL, machine), NUMBERS["getsockopt"][column(machine)]
    for level, option, answer in ((6, 11, ALLOW), (6, 12, KILL), (1, 11, KILL)):
        assert run(program, number, ARCHITECTURES[machine], 3, level, option) == answer


def test_one_of_several_sets_of_conditions_is_enough():
    either = (((0, 0xFFFFFFFF, 1), (1, 0xF, 2)), ((0, 0xFFFFFFFF, 5),))
    program = assemble({"write": either}, ALLOW, KILL, "x86_64")
    found = [run(program, 1, ARCHITECTURES["x86_64"], *arguments) for arguments in ((1, 2), (1, 0x32), (1, 3), (5, 0))]
    assert found == [ALLOW, ALLOW, KILL, ALLOW]


@pytest.mark.skipif(not shutil.which("scmp_sys_resolver"), reason="needs libseccomp's tool")
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_numbers_are_those_of_libseccomp(machine):
    for name, numbers in NUMBERS.items():
        said = subprocess.run(["scmp_sys_resolver", "-a", machine, name], capture_output=True, text=True, check=False)
        number = int(said.stdout)
        assert (number if number >= 0 else None) == numbers[column(machine)], name


# --- by the kernel

def in_a_child(function):
    """How a child ends that runs `function`, as os.waitstatus_to_exitcode says it."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@here
def test_p02_the_kernel_refuses_every_call_that_is_not_named():
    """All numbers there are, one after the other; those that are named are left out here."""
    index = column(platform.machine())
    named = {NUMBERS[name][index] for name in sandbox.LOOP}

    def attempt():
        sandbox.keep_to_ourselves()
        sandbox.put_filter(assemble(sandbox.LOOP, ALLOW, REFUSE | sandbox.TRIED))
        for number in set(range(HIGHEST)) - named - PROBES:
            try:
                libc_call("syscall", number, 0, 0, 0, 0, 0, 0)
                return 1
            except OSError as error:
                if error.errno != sandbox.TRIED:
                    return 2
        return 0

    assert in_a_child(attempt) == 0


@here
@pytest.mark.parametrize("name", ["openat", "execve", "socket", "ptrace"])
def test_p02_the_kernel_ends_who_calls_something_else(name):
    number = NUMBERS[name][column(platform.machine())]

    def attempt():
        sandbox.keep_to_ourselves()
        sandbox.put_filter(assemble(sandbox.LOOP, ALLOW, KILL))
        libc_call("syscall", number, -1, 0, 0, 0, 0, 0)
        return 0

    assert in_a_child(attempt) == -31           # SIGSYS
