#!/usr/bin/env python3
"""Makes tarweb.pyz: the whole server in one file, which any Python from 3.11 on runs.

    python3 deploy/pyz.py [tarweb.pyz]

Each module is in it twice: as source, and compiled for the Python that makes it. A Python with another magic number
passes over the compiled one and uses the source (zipimport.py, _get_module_code).

The same sources and the same version of Python give the same bytes, wherever and whenever. Therefore
- compiled modules have no time in them, but a hash that is not checked (PEP 552): zipimport compares times in the
  local time zone;
- they are written in version 2 of marshal's format: in later ones it shows how many references an object has had;
- nothing is compressed: what zlib makes differs between its versions. It starts faster so, too.
"""

import importlib.util
import io
import marshal
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = b"""\
import sys

import tarweb

sys.exit(tarweb.main())
"""
SHEBANG = b"#!/usr/bin/env python3\n"
LONG_AGO = 1980, 1, 1, 0, 0, 0          # the first second that a zip file can name
REGULAR_FILE = 0o100644 << 16           # ZipInfo.external_attr
UNIX = 3                                # ZipInfo.create_system
UNCHECKED_HASH = 1                      # PEP 552: the flags of a .pyc
MARSHAL_VERSION = 2


def compiled(name, source):
    """The bytes of a .pyc for this Python. Tracebacks show the module as a file `name` in tarweb.pyz."""
    code = compile(source, f"tarweb.pyz/{name}", "exec", dont_inherit=True, optimize=0)
    return (importlib.util.MAGIC_NUMBER + UNCHECKED_HASH.to_bytes(4, "little") + importlib.util.source_hash(source)
            + marshal.dumps(code, MARSHAL_VERSION))


def archive(sources):
    """The bytes of tarweb.pyz, given {name of a file: source}."""
    members = {}
    for name, source in sources.items():
        members[name], members[f"{name}c"] = source, compiled(name, source)
    out = io.BytesIO()
    out.write(SHEBANG)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as zipped:
        for name in sorted(members):
            member = zipfile.ZipInfo(name, LONG_AGO)
            member.create_system, member.external_attr = UNIX, REGULAR_FILE
            zipped.writestr(member, members[name])
    return out.getvalue()


def main(path="tarweb.pyz"):
    """Make the file, which whoever may read it may run, in place of another one: a server may be running from that."""
    sources = {source.name: source.read_bytes() for source in ROOT.glob("*.py")}
    made = Path(f"{path}.new")
    made.write_bytes(archive(sources | {"__main__.py": MAIN}))
    mode = made.stat().st_mode
    made.chmod(mode | (mode & 0o444) >> 2)
    made.replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
