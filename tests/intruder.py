"""tarweb with a hole: whoever asks for /intrude/NAME has the worker do what sandbox.py calls by that name, and for
/stumble has it meet an exception."""

import contextlib
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reply  # noqa: E402
import sandbox  # noqa: E402
import tarweb  # noqa: E402

DOOR = b"/intrude/"
honest = reply.Responder.reply


def intruded(self, request):
    if request.path.startswith(DOOR):
        with contextlib.suppress(OSError):
            sandbox.AGAINST_FILTER[unquote_to_bytes(request.path[len(DOOR):]).decode()]()
    if request.path == b"/stumble":
        raise LookupError("stumbled")
    return honest(self, request)


reply.Responder.reply = intruded
if __name__ == "__main__":
    sys.exit(tarweb.main())
