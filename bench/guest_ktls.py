"""Kernel TLS, tarweb and nginx side by side, in a virtual machine: system calls and instructions for each request.

    .venv/bin/python bench/guest_ktls.py

Few kernels at hand have kernel TLS, so this boots one that has (tests/guest.py), with a simulated processor on which an
instruction takes a nanosecond: CPU time counts instructions, the kernel's and the server's own.
Instructions are not time: one of them may encrypt 16 bytes, and none ever waits for memory. Writes guest-ktls.json and
GUEST-KTLS.md. Takes some minutes.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import guest        # noqa: E402  # from tests/

CONFIGURATIONS = ("nginx.conf", "nginx-tls.conf", "nginx-tuned.conf")
HEADLINE = """# Kernel TLS: tarweb and nginx

What one request for a file of 1 KiB takes of the server, over TLS in the kernel (AES-128-GCM) on keep-alive
connections, of which all ask at once: instructions (the server's and the kernel's together) and system calls.
Made by `guest_ktls.py` in a virtual machine of one processor on which instructions can be counted. They are not time:
one may encrypt 16 bytes, and none waits for memory. Linux {kernel}, {openssl}, nginx {nginx}, Python {python}.

"""


def measure():
    """What guest_requests.py tells."""
    prepared = guest.prepare("6.12", "peers")
    with tempfile.TemporaryDirectory() as folder:
        files = guest.project() | guest.scripts() | guest.credentials(folder)
        files |= {f"guest/{name}": HERE / name for name in CONFIGURATIONS}
        result = guest.boot(prepared, HERE / "guest_requests.py", files=files, later=guest.TLS_MODULES[prepared.arch],
                            timeout=1800, counting=True)
    if result.status:
        sys.exit(result.output)
    return json.loads(result.output.splitlines()[-1])


def where(figures):
    """Which directions of the connections the kernel has."""
    done = [word for word in ("sends", "receives") if figures[f"kernel {word}"]]
    return " and ".join(done) or "nothing"


def table(told):
    """Markdown: a row for each case and server."""
    lines = ["| TLS | connections | server | in the kernel | instructions | system calls | of these |",
             "| --- | ---: | --- | --- | ---: | ---: | --- |"]
    cases = range(len(next(iter(told["servers"].values()))))
    for i in cases:
        for name, measured in told["servers"].items():
            figures = measured[i]
            calls = ", ".join(f"{call} {count:.2f}" for call, count in figures["by call"].items() if count >= 0.005)
            lines.append(f"| {figures['version']} | {figures['connections']} | {name} | {where(figures)} | "
                         f"{figures['instructions']:,.0f} | {figures['calls']:.2f} | {calls} |")
    return "\n".join(lines) + "\n"


def main():
    told = measure()
    (HERE / "guest-ktls.json").write_text(json.dumps(told, indent=1) + "\n")
    text = HEADLINE.format(**told) + table(told)
    (HERE / "GUEST-KTLS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
