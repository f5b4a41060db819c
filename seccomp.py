"""Filters of system calls (seccomp(2)): what may be called, by name, assembled into the program that the kernel runs.

A program looks at struct seccomp_data: the number of the call at byte 0, the architecture at 4, and six arguments of
8 bytes from 16 on, of which the lower half is looked at. It begins with the architecture, because numbers differ
between them (and, on x86_64, with the numbers of its x32 variant), then compares one name after the other.
"""

import platform
import struct
import sys

# <linux/audit.h>
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3, "loongarch64": 0xC0000102}
# What is done about a call: <linux/seccomp.h>. REFUSE: plus the errno that it fails with.
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000

# name: (its number in <asm/unistd_64.h> of x86_64, that in <asm-generic/unistd.h> of the others); None: not there
NUMBERS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "poll": (7, None), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "getpid": (39, 172), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "getsockname": (51, 204), "getpeername": (52, 205), "setsockopt": (54, 208),
    "getsockopt": (55, 209), "execve": (59, 221), "exit": (60, 93), "fcntl": (72, 25), "gettimeofday": (96, 169),
    "ptrace": (101, 117), "pivot_root": (155, 41), "prctl": (157, 167), "chroot": (161, 51),
    "mount": (165, 40), "umount2": (166, 39), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "init_module": (175, 105),
    "delete_module": (176, 106), "futex": (202, 98), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "exit_group": (231, 94), "kexec_load": (246, 104), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "openat": (257, 56), "newfstatat": (262, 79), "ppoll": (271, 73), "unshare": (272, 97),
    "preadv": (295, 69), "perf_event_open": (298, 241), "open_by_handle_at": (304, 265), "setns": (308, 268),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "finit_module": (313, 273),
    "getrandom": (318, 278), "kexec_file_load": (320, 294), "bpf": (321, 280), "execveat": (322, 281),
    "userfaultfd": (323, 282), "preadv2": (327, 286), "io_uring_enter": (426, 426), "move_mount": (429, 429),
    "pidfd_getfd": (438, 438),
}
X32 = 0x40000000            # <asm/unistd.h> of x86_64: the bit in the numbers of its 32-bit variant

# Under which conditions a call is meant: all those of one of these sets. A condition is (which argument, a mask, what
# these bits of it have to be).
Conditions = tuple[tuple[tuple[int, int, int], ...], ...]
ALWAYS: Conditions = ((),)
PROT_EXEC, FIONBIO, AT_EMPTY_PATH = 4, 0x5421, 0x1000       # <sys/mman.h>, <asm-generic/ioctls.h>, <fcntl.h>
ALL_BITS = 0xFFFFFFFF
NOT_EXECUTABLE: Conditions = (((2, PROT_EXEC, 0),),)

# <linux/filter.h> struct sock_filter: code, jump if true, jump if false, k
INSTRUCTION = struct.Struct("=HBBI")
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06       # <linux/bpf_common.h>
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
LOWER_HALF = 0 if sys.byteorder == "little" else 4


def supported():
    """Whether the numbers of this machine's system calls are known here."""
    return platform.machine() in ARCHITECTURES


def assemble(calls, meant, otherwise, machine=None):
    """The program that does `meant` about `calls` ({name: conditions}) and `otherwise` about all others."""
    machine = machine or platform.machine()
    column = 0 if machine == "x86_64" else 1
    code = [(LOAD, 0, 0, ARCHITECTURE_AT), (EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL),
            (LOAD, 0, 0, NUMBER_AT)]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for name, conditions in calls.items():
        number = NUMBERS[name][column]
        if number is not None:
            body = about(conditions, meant, otherwise)
            code += [(EQUAL, 0, len(body), number), *body]
    return b"".join(INSTRUCTION.pack(*line) for line in [*code, (RETURN, 0, 0, otherwise)])


def about(conditions, meant, otherwise):
    """The part of a program for one call: it always ends with a RETURN."""
    code = []
    for every in conditions:
        for left, (argument, mask, value) in zip(reversed(range(len(every))), every, strict=True):
            to_the_next = 3 * left + 1
            code += [(LOAD, 0, 0, ARGUMENTS_AT + 8 * argument + LOWER_HALF), (AND, 0, 0, mask),
                     (EQUAL, 0, to_the_next, value)]
        code.append((RETURN, 0, 0, meant))
    return code if () in conditions else [*code, (RETURN, 0, 0, otherwise)]
