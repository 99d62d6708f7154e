"""Checks what make needs from the machine before anything is installed; one sentence per missing thing."""

import os
import shutil
import sys
import sysconfig


def missing():
    """What this machine lacks, each with its fix."""
    if sys.version_info < (3, 10):  # noqa: UP036  (run by whatever Python there is)
        found = ".".join(map(str, sys.version_info[:3]))
        yield f"Python 3.10 or newer is needed, got {found} ({sys.executable}): make PYTHON=python3.11 ..."
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield "Python's venv and ensurepip are missing: install them (Debian and Ubuntu: python3-venv)"
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        yield "Python's headers (Python.h) are missing: install them (Debian and Ubuntu: python3-dev)"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        yield f"no C++ compiler ({compiler}): install one (Debian and Ubuntu: g++) or set CXX"


if __name__ == "__main__":
    problems = list(missing())
    for problem in problems:
        print(f"moka: {problem}", file=sys.stderr)
    sys.exit(bool(problems))
