"""Other kernels, other machines: a script run inside a virtual machine that boots a kernel of Debian's in seconds.

    result = guest.boot(guest.prepare("6.1"), "tests/guest_serve.py", files=guest.project())

Kernels and what runs on them are packages, downloaded with package lists of their own and unpacked into .cache/guest;
nothing is installed and nothing of this machine's own apt or dpkg is changed. The root file system is an initial
ramdisk: uncompressed cpio archives one behind another, which the kernel unpacks in order: Python; the tools, where
asked for; then the modules, the project and the script. `guest_init.py` is process 1; it runs the script and reports
over the serial console.

Uncompressed, because the guest's processor is simulated and unpacks more slowly than qemu copies.
"""

import fcntl
import hashlib
import json
import lzma
import os
import platform
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from certificates import Authority

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
CACHE = ROOT / ".cache" / "guest"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
USERLAND = "bookworm"       # the Debian release whose programs run in the guest, whatever the kernel


class Unavailable(Exception):
    """This machine cannot run the guest; the text says what is missing. A reason to skip, not to fail."""


class GuestFailed(AssertionError):
    """The guest ended without a report, or its kernel complained; the text has the end of its console."""


@dataclass(frozen=True)
class Kernel:
    """A kernel package of Debian's: the newest whose name matches."""

    arch: str               # as Debian names it
    release: str            # of Debian
    package: str            # a regular expression


KERNELS = {
    "5.10": Kernel("amd64", "bullseye", r"linux-image-5\.10\.[0-9.-]+-cloud-amd64-unsigned"),
    "6.1": Kernel("amd64", "bookworm", r"linux-image-6\.1\.[0-9.-]+-cloud-amd64-unsigned"),
    "6.12": Kernel("amd64", "bookworm", r"linux-image-6\.12\.[0-9.]+\+deb12-cloud-amd64-unsigned"),
    "6.1 arm64": Kernel("arm64", "bookworm", r"linux-image-6\.1\.[0-9.-]+-cloud-arm64-unsigned"),
    "6.12 arm64": Kernel("arm64", "bookworm", r"linux-image-6\.12\.[0-9.]+\+deb12-cloud-arm64-unsigned"),
}
# The machine, the processor, and the serial port that is the console.
MACHINES = {
    "amd64": ("qemu-system-x86_64", ("-M", "pc", "-cpu", "max"), "ttyS0"),
    "arm64": ("qemu-system-aarch64", ("-M", "virt", "-cpu", "cortex-a72"), "ttyAMA0"),
}
# One processor: with two, a guest in qemu 7.2 has ended with a panic at a breakpoint that Linux sets while it patches
# its own code (arch/x86/kernel/alternative.c), and that was no longer there. Two guests on two cores are as fast so.
PLAIN = ("-accel", "tcg", "-smp", "1")
COUNTING = (*PLAIN, "-icount", "shift=0")
NO_IRQ_TIME = "tsc=noirqtime"       # what interrupts do is charged to the process that they interrupt
# Packages of an image, and what of them the guest can do without.
PACKAGES = {
    "python": ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libexpat1",
               "zlib1g", "libbz2-1.0", "liblzma5", "libffi8", "libssl3", "liburing2"),
    "tools": ("openssl", "curl", "libcurl4", "libbrotli1", "libcom-err2", "libgmp10", "libgnutls30", "libgssapi-krb5-2",
              "libhogweed6", "libidn2-0", "libk5crypto3", "libkeyutils1", "libkrb5-3", "libkrb5support0",
              "libldap-2.5-0", "libnettle8", "libnghttp2-14", "libp11-kit0", "libpsl5", "librtmp1", "libsasl2-2",
              "libssh2-1", "libtasn1-6", "libunistring2", "libzstd1"),
    "peers": ("nginx", "libcrypt1", "libpcre2-8-0", "strace", "libunwind8"),
}
DISPENSABLE = re.compile(r"usr/share/|usr/lib/[^/]+/(gconv|perl|sasl2|engines-3|audit)/|usr/lib/python3\.11/"
                         r"(ensurepip|idlelib|lib2to3|pydoc_data|test|tkinter|turtledemo|unittest|config-)")
# What kernel TLS needs, each with its dependencies: the protocol, then ciphers plain and as fast as they come.
TLS_MODULES = {
    "amd64": ("tls", "gcm", "ghash_generic", "ccm", "seqiv", "chacha20poly1305", "aesni_intel", "ghash_clmulni_intel",
              "chacha_x86_64", "poly1305_x86_64"),
    "arm64": ("tls", "gcm", "ghash_generic", "ccm", "seqiv", "chacha20poly1305", "aes_ce_blk", "ghash_ce",
              "chacha_neon", "poly1305_neon"),
}


# --- packages ------------------------------------------------------------------------------------------------------


def run(*command, **options):
    """Run a command; its output. Raises Unavailable with its last words."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def sources(arch, release):
    """Lines of a sources.list for another architecture and release of the Debian this machine has its packages from."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    output = run("apt-get", "indextargets", "--format", "$(CREATED_BY) $(RELEASE) $(REPO_URI)")
    found = [line.split() for line in output.splitlines() if line.startswith("Packages ")]
    addresses = {suite: address for _, suite, address in found}
    lines = [f"deb [arch={arch} signed-by={KEYRING} target=Packages] {addresses[codename + part]} {release}{part} main"
             for part in ("", "-security") if codename + part in addresses]
    if not lines or not os.path.exists(KEYRING):
        raise Unavailable("no package lists of Debian's here (apt-get update makes them)")
    return lines[:1] if release == "bullseye" else lines


class Packages:
    """apt with a state of its own, for one architecture and release."""

    def __init__(self, arch, release):
        state = CACHE / "apt" / f"{arch}-{release}"
        for folder in ("lists/partial", "archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "sources.list").write_text("\n".join(sources(arch, release)) + "\n")
        (state / "apt.conf").write_text(
            f'APT::Architecture "{arch}"; APT::Architectures {{ "{arch}"; }}; APT::Sandbox::User "root";\n'
            f'Dir::State "{state}"; Dir::State::status "{state}/status"; Dir::Cache "{state}";\n'
            f'Dir::Etc::sourcelist "{state}/sources.list"; Dir::Etc::sourceparts "-"; Acquire::Languages "none";\n')
        self.environment = os.environ | {"APT_CONFIG": str(state / "apt.conf")}
        with (state / "update.lock").open("w") as lock:         # tests run side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.run("apt-get", "-q", "update")

    def run(self, *command, **options):
        return run(*command, env=self.environment, **options)

    def newest(self, pattern):
        """The name of the newest package whose name matches: the one with the greatest numbers in it."""
        names = self.run("apt-cache", "pkgnames", "linux-image-").split()
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            raise Unavailable(f"no package like {pattern}")
        return max(found, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])

    def unpack(self, names, into):
        """Download packages and unpack them below `into`, complete or not at all; a list of them beside it."""
        into.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            self.run("apt-get", "-q", "download", *names, cwd=scratch)
            debs = sorted(Path(scratch).glob("*.deb"))
            for deb in debs:
                run("dpkg", "-x", deb, Path(scratch) / "root")
            compile_modules(Path(scratch) / "root")
            os.replace(Path(scratch) / "root", into)
        list_of(into).write_text(json.dumps([names, [deb.name for deb in debs]]))


def list_of(unpacked):
    return unpacked.with_name(unpacked.name + ".json")


def compile_modules(root):
    """Python's own modules as bytecode, where this Python makes what the guest's reads: compiling is slow there."""
    if sys.version_info[:2] == (3, 11):
        for path in root.glob("usr/lib/python3.11/**/*.py"):
            if not DISPENSABLE.match(str(path.relative_to(root))):
                py_compile.compile(path, dfile=f"/{path.relative_to(root)}", quiet=2,
                                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


# --- images --------------------------------------------------------------------------------------------------------


def cpio_entry(name, mode, content=b""):
    """One member of a "newc" archive: 13 numbers in hexadecimal, the name, the content, each padded to four bytes."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def cpio(members):
    """An archive of (name, mode, content), with the directories they lie in."""
    made, parts = set(), []
    for name, mode, content in members:
        for above in reversed(Path(name).parents[:-1]):
            if str(above) not in made:
                made.add(str(above))
                parts.append(cpio_entry(str(above), stat.S_IFDIR | 0o755))
        parts.append(cpio_entry(name, mode, content))
    return b"".join(parts) + cpio_entry("TRAILER!!!", 0)


def tree(root):
    """The members of an unpacked package that a guest needs."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            yield name, stat.S_IFLNK | 0o777, os.readlink(path).encode()
        elif path.is_file() and not DISPENSABLE.match(name):
            yield name, stat.S_IFREG | stat.S_IMODE(path.stat().st_mode), path.read_bytes()


def image(arch, what):
    """The path of an archive of PACKAGES[what], made anew when the packages or this file have changed."""
    unpacked = CACHE / arch / what
    names = list(PACKAGES[what])
    if not list_of(unpacked).exists() or json.loads(list_of(unpacked).read_text())[0] != names:
        shutil.rmtree(unpacked, ignore_errors=True)
        Packages(arch, USERLAND).unpack(names, unpacked)
    key = hashlib.sha256(list_of(unpacked).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    made = unpacked.with_name(f"{what}-{key}.cpio")
    if not made.exists():
        for old in made.parent.glob(f"{what}-*.cpio"):
            old.unlink()
        made.with_suffix(".new").write_bytes(cpio(tree(unpacked)))
        os.replace(made.with_suffix(".new"), made)
    return made


def project():
    """Guest path -> file, of the server."""
    return {f"guest/{path.name}": path for path in ROOT.glob("*.py")}


def scripts():
    """Guest path -> file, of what runs in guests and what it imports."""
    return {f"guest/{path.name}": path for path in TESTS.glob("guest_*.py")}


def credentials(folder):
    """Guest path -> file: a certificate of each kind with its key, and the root that vouches for them."""
    authority = Authority(folder)
    files = {"guest/root.pem": authority.root}
    for name, kind in (("rsa", "rsa"), ("ecdsa", "p256")):
        pair = authority.issue(kind)
        files |= {f"guest/{name}.cert": pair.cert, f"guest/{name}.key": pair.key}
    return files


# --- kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Everything on disk that a boot needs."""

    arch: str
    unpacked: Path          # of the kernel's package
    images: tuple

    @property
    def vmlinuz(self):
        return next(self.unpacked.glob("boot/vmlinuz-*"))


def prepare(name, *more):
    """Download, unpack and build what KERNELS[name] needs, unless it is there: Python, and `more` of PACKAGES.
    Raises Unavailable."""
    kernel = KERNELS[name]
    for program in (MACHINES[kernel.arch][0], "apt-get", "apt-cache", "dpkg"):
        if not shutil.which(program):
            raise Unavailable(f"{program} is not installed")
    folder = CACHE / kernel.arch / "kernels"
    unpacked = [path for path in folder.glob("linux-image-*") if re.fullmatch(kernel.package, path.name)]
    if not unpacked:
        packages = Packages(kernel.arch, kernel.release)
        package = packages.newest(kernel.package)
        unpacked = [folder / package]
        packages.unpack([package], unpacked[0])
    images = [image(kernel.arch, what) for what in ("python", *more)]
    return Prepared(kernel.arch, unpacked[0], tuple(images))


def modules(prepared, names):
    """The contents of these modules and of those they depend on, in the order of loading. A missing one is left out:
    what is a module in one kernel is built into another."""
    found = {path.name.partition(".")[0].replace("-", "_"): path for path in prepared.unpacked.rglob("*.ko*")}
    order = {}

    def add(name):
        if name in order or name not in found:
            return
        path = found[name]
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for listed in re.findall(rb"\0depends=([^\0]*)\0", content):
            for dependency in listed.decode().split(","):
                add(dependency.replace("-", "_"))
        order[name] = content

    for name in names:
        add(name)
    return order


# --- running -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    status: int             # the script's exit status
    output: str             # what it printed, both streams
    seconds: float          # from the kernel's start to the script's end
    modules: dict           # name -> "" or why it could not be loaded


def boot(prepared, script, *arguments, files=None, load=(), later=(), timeout=60, memory=1024, counting=False):
    """Boot, load the modules `load`, run `script` in /guest; `files` maps guest paths to files; the modules `later`
    lie in /later. `timeout`: seconds for the script, which a boot precedes. `counting`: a processor's nanosecond is
    one instruction. Raises GuestFailed."""
    program, machine, console = MACHINES[prepared.arch]
    order = {"script": Path(script).name, "arguments": arguments, "timeout": timeout}
    members = [("init", stat.S_IFREG | 0o755, (TESTS / "guest_init.py").read_bytes()),
               ("order.json", stat.S_IFREG | 0o644, json.dumps(order).encode())]
    for path, source in ((files or {}) | {f"guest/{Path(script).name}": script}).items():
        members.append((path, stat.S_IFREG | 0o644, Path(source).read_bytes()))
    for folder, names in (("modules", load), ("later", later)):
        for i, (name, content) in enumerate(modules(prepared, names).items()):
            members.append((f"{folder}/{i:02}-{name}.ko", stat.S_IFREG | 0o644, content))
    with tempfile.NamedTemporaryFile(dir=CACHE, prefix="initrd-") as initrd:
        for part in prepared.images:
            initrd.write(part.read_bytes())
        initrd.write(cpio(members))
        initrd.flush()
        command = [program, *machine, *(COUNTING if counting else PLAIN), "-m", str(memory), "-display", "none",
                   "-no-reboot", "-nodefaults", "-nic", "none", "-monitor", "none", "-serial", "stdio",
                   "-kernel", prepared.vmlinuz, "-initrd", initrd.name,
                   "-append", f"console={console} quiet panic=-1 {NO_IRQ_TIME * counting}"]
        try:
            seen = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=timeout + 60, check=False).stdout
        except subprocess.TimeoutExpired as expired:
            raise GuestFailed(f"no end after {timeout + 60} s; console:\n{tail(expired.stdout)}") from None
    return report(seen)


def report(seen):
    """Find what guest_init reports in the console's output."""
    found = re.search(rb"@@report (.*) report@@", seen)
    if not found:
        raise GuestFailed(f"the guest ended without a report; console:\n{tail(seen)}")
    told = json.loads(found[1])
    if told.pop("late"):
        raise GuestFailed(f"the script took too long; its output:\n{told['output'][-4000:]}\nconsole:\n{tail(seen)}")
    if complaints := told.pop("complaints"):
        raise GuestFailed(f"the guest's kernel complained:\n{complaints}\noutput:\n{told['output'][-4000:]}")
    return Result(**told)


def tail(seen):
    return (seen or b"").decode(errors="replace").replace("\r", "")[-4000:]


if __name__ == "__main__":
    for each in sys.argv[1:] or KERNELS:
        print(each, prepare(each).vmlinuz)
