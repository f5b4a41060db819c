"""What the processes of a server give up before the first byte of a request is read, and the proof that it is gone.

A worker gives up, in this order:
  * its user, where it was started by root, and all capabilities, those that it could get back by exec included;
  * the file system, TCP, and signals to others (Landlock, landlock(7));
  * by way of its ring, all operations but those that serving needs (`Ring.restrict` in uring.py);
  * all system calls but those of the loop (seccomp(2)): any other one ends the process.
Each forbidden thing is then attempted, and a worker for which one works does not serve. The filter is put on twice for
that: first with an errno of its own as the answer to everything else, then with death.

The parent reads archives and keys anew at each reload and forks workers. It keeps the right to do these, to write where
the access log is, and to open nothing else for writing, start no program, and listen and connect nowhere.

Why both Landlock and restrictions of the ring: what goes through an io_uring passes no filter of system calls, so a
filter alone would be theatre.
"""

import contextlib
import errno
import mmap
import os
import platform
import pwd
import resource
import signal
import socket
import struct
import sys
from types import SimpleNamespace

import linux
from linux import TCP_OPTIONS, address_of, libc_call
from options import StartError, UsageError

# --- filters of system calls (seccomp(2)): what may be called, by name, assembled into the program that the kernel runs
#
# A program looks at struct seccomp_data: the number of the call at byte 0, the architecture at 4, and six arguments of
# 8 bytes from 16 on, of which the lower half is looked at. It begins with the architecture, because numbers differ
# between them (and, on x86_64, with the numbers of its x32 variant), then compares one name after the other.

# <linux/audit.h>
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3, "loongarch64": 0xC0000102}
# What is done about a call: <linux/seccomp.h>. REFUSE: plus the errno that it fails with.
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000

# name: (its number in <asm/unistd_64.h> of x86_64, that in <asm-generic/unistd.h> of the others); None: not there
NUMBERS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "poll": (7, None), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "getpid": (39, 172), "socket": (41, 198), "connect": (42, 203), "recvmsg": (47, 212),
    "bind": (49, 200), "listen": (50, 201), "getsockname": (51, 204), "getpeername": (52, 205), "setsockopt": (54, 208),
    "getsockopt": (55, 209), "execve": (59, 221), "exit": (60, 93), "fcntl": (72, 25), "gettimeofday": (96, 169),
    "ptrace": (101, 117), "pivot_root": (155, 41), "prctl": (157, 167), "chroot": (161, 51), "mount": (165, 40),
    "umount2": (166, 39), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "init_module": (175, 105),
    "delete_module": (176, 106), "futex": (202, 98), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "exit_group": (231, 94), "kexec_load": (246, 104), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "openat": (257, 56), "newfstatat": (262, 79), "ppoll": (271, 73), "unshare": (272, 97),
    "dup3": (292, 24), "preadv": (295, 69), "perf_event_open": (298, 241), "open_by_handle_at": (304, 265),
    "setns": (308, 268), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "finit_module": (313, 273),
    "getrandom": (318, 278), "kexec_file_load": (320, 294), "bpf": (321, 280), "execveat": (322, 281),
    "userfaultfd": (323, 282), "preadv2": (327, 286), "io_uring_enter": (426, 426), "move_mount": (429, 429),
    "pidfd_getfd": (438, 438),
}
X32 = 0x40000000            # <asm/unistd.h> of x86_64: the bit in the numbers of its 32-bit variant

# Under which conditions a call is meant: all those of one of these sets. A condition is (which argument, a mask, what
# these bits of it have to be).
Conditions = tuple[tuple[tuple[int, int, int], ...], ...]
Calls = dict[str, Conditions]
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


# --- what is given up

NOBODY = SimpleNamespace(pw_name="nobody", pw_uid=65534, pw_gid=65534)

# <linux/prctl.h>
PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 21, 22, 24, 38
SECCOMP_MODE_FILTER = 2

# <linux/capability.h>
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP = 1, 2, 5, 6, 7, 8
CHANGING_USER = {CAP_SETUID, CAP_SETGID, CAP_KILL}          # the last to tell the others something still
CAPABILITIES = range(64)
CAPABILITY_VERSION_3 = 0x20080522

# <linux/landlock.h>; rights to files by the first version of the interface (ABI) that has them
SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446     # the same number on every architecture
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
TCP_RIGHTS, TCP_ABI = 0b11, 4                   # bind, connect
SCOPE_ABSTRACT, SCOPE_SIGNAL, SCOPE_ABI = 1, 2, 6

# What a worker may call, and what for.
LOOP: Calls = {
    "io_uring_enter": ALWAYS,                   # everything
    "read": ALWAYS,                             # that an archive has been written to
    "write": ALWAYS,                            # messages; to the parent, and to itself from a signal handler
    "close": ALWAYS,                            # the end of accepting
    "poll": ALWAYS, "ppoll": ALWAYS,            # the same: whether somebody waits
    "lseek": ALWAYS,                            # how long an archive is now
    "preadv2": ALWAYS, "preadv": ALWAYS,        # what of it is in memory, and what of it OpenSSL is to encrypt
    "mmap": NOT_EXECUTABLE, "mprotect": NOT_EXECUTABLE,     # memory
    "munmap": ALWAYS, "mremap": ALWAYS, "madvise": ALWAYS, "brk": ALWAYS,
    "futex": ALWAYS, "sched_yield": ALWAYS,     # locks that somebody holds
    "rt_sigreturn": ALWAYS, "rt_sigprocmask": ALWAYS, "restart_syscall": ALWAYS,
    "clock_gettime": ALWAYS, "gettimeofday": ALWAYS,        # where the clock cannot be read without
    "getpid": ALWAYS,                           # logging, OpenSSL
    "getsockopt": (((1, ALL_BITS, socket.IPPROTO_TCP), (2, ALL_BITS, socket.TCP_INFO)),),   # whether a client reads
    "exit": ALWAYS, "exit_group": ALWAYS,
}
PEER_ADDRESS: Calls = {"getpeername": ALWAYS}
CALLS_OF_FLAGS: dict[str, Calls] = {            # what more it may call where a field of the options is set
    "access_log": PEER_ADDRESS | {"recvmsg": ALWAYS, "dup3": ALWAYS},       # when it has been opened anew
    "trusted": PEER_ADDRESS, "max_per_ip": PEER_ADDRESS, "tls_cert": {"getrandom": ALWAYS},
    "passfd": {
        "getsockname": ALWAYS, "getsockopt": ALWAYS, "ioctl": (((1, ALL_BITS, FIONBIO),),),
        "setsockopt": tuple(((1, ALL_BITS, socket.IPPROTO_TCP), (2, ALL_BITS, option)) for option, _ in TCP_OPTIONS)},
    "acme_dir": {"openat": ALWAYS, "fstat": ALWAYS, "newfstatat": (((3, AT_EMPTY_PATH, AT_EMPTY_PATH),),)},
}

# What the parent may not, and all that it forks.
DENIED = ("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "socket", "bind",
          "listen", "connect", "unshare", "setns", "mount", "umount2", "move_mount", "pivot_root", "chroot", "swapon",
          "swapoff", "reboot", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "bpf",
          "perf_event_open", "userfaultfd", "open_by_handle_at", "add_key", "request_key", "keyctl")

NOT_PERMITTED = errno.EPERM, errno.EACCES
TRIED = errno.EXFULL            # what the first filter answers: nothing else ever does


@contextlib.contextmanager
def explained():
    """Raises StartError where the system refuses something."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(f"this process cannot be locked in: {reason}; --secure=off serves without") from error


class Sandbox:
    """What can be given up here. abstract: whether the parent talks to an abstract unix socket.

    Raises UsageError for a --user that cannot be had, StartError for --secure=require; its methods raise StartError
    where something cannot be given up, or works after it was.
    """

    def __init__(self, options, abstract=False):
        self.options, self.abstract = options, abstract
        self.off = options.secure == "off"
        self.missing: list[str] = []            # what is not given up, and why
        self.sockets: tuple = ()                # to try connecting and listening with
        self.user = find_user(options.user)
        self.landlock, self.filters = 0, False
        if self.off:
            if options.user:
                raise UsageError("--user is of no use with --secure=off")
            return
        self.sockets = socket.socket(), socket.socket()
        reason = self.user and why_not_become(self.user)
        if reason and options.user:
            raise UsageError(f"--user {options.user}: {reason}")
        if reason:
            self.user = None
            self.missing.append(f"another user ({reason})")
        try:
            self.landlock = libc_call("syscall", SYS_CREATE_RULESET, 0, 0, CREATE_RULESET_VERSION)
        except OSError as error:
            advice = "lsm= at boot leaves it out" if error.errno == errno.EOPNOTSUPP else os.strerror(error.errno or 0)
            self.missing.append(f"Landlock ({advice})")
        with contextlib.suppress(OSError):
            libc_call("prctl", PR_GET_SECCOMP, 0, 0, 0, 0)
            self.filters = supported()
        if not self.filters:
            self.missing.append("seccomp (not for this kernel or architecture)")
        if options.secure == "require" and self.missing:
            raise StartError(f"--secure=require: {'; '.join(self.missing)}")

    def words(self):
        """What is in force."""
        if self.off:
            return "not locked down (--secure=off)"
        name = self.user.pw_name if self.user else who_we_are()
        given_up = [f"workers as {name}", "no capabilities", "restricted rings",
                    *[f"Landlock (ABI {self.landlock})"] * bool(self.landlock), *["seccomp"] * self.filters]
        return f"locked down: {', '.join(given_up)}" + "".join(f"; without {what}" for what in self.missing)

    # the parent

    @explained()
    def confine_parent(self, *written):
        """Give up what reloads do not take. `written`: paths of the access log, or None, and of sockets."""
        if self.off:
            return
        names = [name for path in written if path for name in (os.path.abspath(path), os.path.realpath(path))]
        folders = set(filter(os.path.isdir, map(os.path.dirname, names)))
        kept = {CAP_SETPCAP, CAP_DAC_OVERRIDE if folders else CAP_DAC_READ_SEARCH}
        if self.user:
            kept |= CHANGING_USER
        keep_capabilities(kept & permitted())
        keep_to_ourselves()
        if self.landlock:
            scopes = SCOPE_SIGNAL | (0 if self.abstract else SCOPE_ABSTRACT)
            writing = WRITE_FILE | READ_FILE | READ_DIR | MAKE_REG | REMOVE_FILE
            restrict_files(self.landlock, scopes, {"/": READ_FILE | READ_DIR} | dict.fromkeys(folders, writing))
        if self.filters:
            put_filter(assemble(dict.fromkeys(DENIED, ALWAYS), REFUSE | errno.EPERM, ALLOW))
            expect(NOT_PERMITTED, AGAINST_PARENTS_FILTER)

    # a worker

    @explained()
    def drop(self, directory=None):
        """Become somebody who may do nothing that others may not, and give up files, but those in a `directory` (its
        descriptor, or None)."""
        if self.off:
            return
        parent = os.getppid()
        drop_bounding(set())
        if self.user:
            become(self.user)
        keep_capabilities(set())
        keep_to_ourselves()
        linux.die_with_parent(signal.SIGTERM, parent)         # forgotten where a user changes, prctl(2)
        if self.user:
            expect(NOT_PERMITTED, {"become root": lambda: os.setuid(0)})
        if directory is not None:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.stat("tarweb", dir_fd=directory)
            except PermissionError:
                raise StartError("--acme-dir: the workers' user cannot look into it: chmod o+x, or "
                                 "see --user") from None
        if self.landlock:
            readable = {} if directory is None else {directory: READ_FILE}
            restrict_files(self.landlock, SCOPE_ABSTRACT | SCOPE_SIGNAL, readable)
            expect(NOT_PERMITTED, dict(against_landlock(self.landlock, *self.sockets)))
        for unused in self.sockets:
            unused.close()

    @explained()
    def lock(self):
        """Give up all system calls but those of the loop."""
        if not self.filters:
            return
        calls, attempts = dict(LOOP), dict(AGAINST_FILTER)
        for flag, more in CALLS_OF_FLAGS.items():
            if getattr(self.options, flag):
                calls |= more
        if "openat" in calls:
            del attempts[OPEN]
        another_filter: Calls = {"prctl": (((0, ALL_BITS, PR_SET_SECCOMP),),)}
        put_filter(assemble(calls | another_filter, ALLOW, REFUSE | TRIED))
        expect([TRIED], attempts)
        put_filter(assemble(calls, ALLOW, KILL))


# --- what is attempted

OPEN = "open a file"


def against_landlock(version, first, second):
    """(what, how) for what has to be stopped without a filter, given two sockets."""
    yield OPEN, lambda: os.open("/", os.O_RDONLY)
    if os.path.exists(os.devnull):              # to look is nothing that Landlock restricts
        yield "open a file for writing", lambda: os.open(os.devnull, os.O_WRONLY)
    if version >= TCP_ABI:
        yield "connect", lambda: first.connect(("127.0.0.1", 9))
        yield "listen", lambda: second.bind(("127.0.0.1", 0))
    if version >= SCOPE_ABI:
        yield "signal the parent", lambda: os.kill(os.getppid(), 0)


AGAINST_PARENTS_FILTER = {          # what: how
    "start a program": lambda: os.execv("/dev/null/tarweb", ["tarweb"]),
    "make a socket": socket.socket,
    "connect": lambda: libc_call("connect", -1, 0, 0),
    "listen": lambda: libc_call("bind", -1, 0, 0),
    "trace a process": lambda: libc_call("ptrace", 0, 0, 0, 0),
    "enter a namespace": lambda: libc_call("unshare", 0),
    "mount": lambda: libc_call("mount", 0, 0, 0, 0, 0),
}
AGAINST_FILTER = {
    **AGAINST_PARENTS_FILTER,
    OPEN: lambda: os.open("/", os.O_RDONLY),
    "remove a file": lambda: os.unlink("/dev/null/tarweb"),
    "start a process": lambda: os.fork() or os._exit(0),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "become another user": lambda: os.setuid(os.getuid()),
    "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    "have executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "make a ring": lambda: libc_call("syscall", linux.SYS_SETUP, 0, 0),
    "change a ring": lambda: libc_call("syscall", linux.SYS_REGISTER, -1, 0, 0, 0),
}


def expect(refusals, attempts):
    """Attempt what has to fail with one of these errnos ({what: how}). Raises StartError."""
    for words, attempt in attempts.items():
        try:
            attempt()
            outcome = "it works"
        except OSError as error:
            if error.errno in refusals:
                continue
            outcome = error.strerror or str(error)
        raise StartError(f"the sandbox does not hold: a process that serves tried to {words}, and: {outcome}. "
                           "This is worth a report; --secure=off serves without it")


# --- the pieces

def find_user(name):
    """The user (passwd(5)) that workers are to become; None where they stay who we are. Raises UsageError."""
    if os.geteuid():
        if name:
            raise UsageError(f"--user {name}: only root can become somebody else")
        return None
    try:
        found = pwd.getpwnam(name or NOBODY.pw_name)
    except KeyError:
        if name:
            raise UsageError(f"--user: there is no user {name!r}") from None
        return NOBODY
    return found if found.pw_uid else None


def why_not_become(user):
    """Why root cannot become `user` here, or ""."""
    if CHANGING_USER - permitted():
        return "root lacks CAP_SETUID, CAP_SETGID or CAP_KILL here"
    with socket.socket() as mine:
        try:                # /proc/self/uid_map would say it, too, but need not be there
            os.fchown(mine.fileno(), user.pw_uid, user.pw_gid)
        except OSError as error:
            if error.errno == errno.EINVAL:             # chown(2), user_namespaces(7)
                return f"this user namespace has no {user.pw_name}"
    return ""


def become(user):
    """In no group but that to which io_uring is left where it is switched off for most (kernel.io_uring_group)."""
    group = -1
    with contextlib.suppress(OSError), open("/proc/sys/kernel/io_uring_group") as file:
        group = int(file.read())
    os.setgroups([group] if group >= 0 else [])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


def who_we_are():
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def keep_to_ourselves():
    """No core dump; and no other process can look into this one, or trace it, not even one of the same user."""
    libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc_call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def permitted():
    """The capabilities that we have, as a set of numbers (capget(2))."""
    header, data = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytearray(24)
    libc_call("capget", address_of(header), address_of(data))
    _, low, _, _, high, _ = struct.unpack("=6I", data)
    return {number for number in CAPABILITIES if (low | high << 32) >> number & 1}


def keep_capabilities(kept):
    """Have these and no others, and no way to get others (capset(2))."""
    drop_bounding(kept)
    if permitted() == kept:
        return                          # a service's own filter of system calls may leave no capset
    bits = sum(1 << number for number in kept)
    low, high = bits & ALL_BITS, bits >> 32
    header, data = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), struct.pack("=6I", low, low, 0, high, high, 0)
    libc_call("capset", address_of(header), address_of(data))


def drop_bounding(kept):
    """Where we may (CAP_SETPCAP); who may not has none of them to begin with, and gets none by exec any more."""
    if CAP_SETPCAP in permitted():
        with contextlib.suppress(OSError):          # beyond the last that this kernel has
            for number in sorted({*CAPABILITIES} - kept):
                libc_call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)


def restrict_files(version, scopes, allowed):
    """Have no rights to files, TCP and what `scopes` says, as far as this version of the interface restricts them, but
    `allowed` ({path or descriptor: rights})."""
    rights = sum(bits for since, bits in FILE_RIGHTS.items() if since <= version)
    attributes = struct.pack("=QQQ", rights, TCP_RIGHTS, scopes)
    attributes = attributes[:24 if version >= SCOPE_ABI else 16 if version >= TCP_ABI else 8]
    ruleset = libc_call("syscall", SYS_CREATE_RULESET, address_of(attributes), len(attributes), 0,
                        what="landlock_create_ruleset")
    for place, granted in allowed.items():
        fd = os.open(place, os.O_PATH | os.O_CLOEXEC) if isinstance(place, str) else place
        rule = struct.pack("=Qi", granted & rights, fd)
        libc_call("syscall", SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, address_of(rule), 0, what="landlock_add_rule")
        if fd is not place:
            os.close(fd)
    libc_call("syscall", SYS_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
    os.close(ruleset)


def put_filter(program):
    """Have the kernel run a program of `assemble` at each system call from now on."""
    header = struct.pack("=H6xQ", len(program) // 8, address_of(program))          # <linux/filter.h> struct sock_fprog
    libc_call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, address_of(header), 0, 0)
