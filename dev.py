"""Set-up and the two things a newcomer does, on a machine with Python >= 3.11 and nothing else.

    python3 dev.py demo [options of `qhyvit quantize`]     quantize, export and run the net that ships with the package
    python3 dev.py test [options of pytest]                run the tests

Both make a virtual environment in .venv and install the package with all it needs, once.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if sys.platform == "win32" else "bin")


def set_up() -> None:
    """Make the environment, or bring it up to date if pyproject.toml has changed."""
    stamp, wanted = VENV / "installed", hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("Setting up .venv (PyTorch is large: a few minutes) ...", flush=True)
    if not (BIN / "python").exists() and not (BIN / "python.exe").exists():
        venv.create(VENV, with_pip=True)
    subprocess.run([BIN / "python", "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[dev]"], check=True)
    stamp.write_text(wanted)


def main() -> int:
    """Set up, then run one of the two."""
    if sys.version_info < (3, 11):  # noqa: UP036  (nobody has checked yet: pip comes later)
        print(f"qhyvit needs Python 3.11 or newer; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 2
    jobs = {
        "demo": [BIN / "qhyvit", "quantize", "-o", "demo-out", "--force"],
        "test": [BIN / "python", "-m", "pytest"],
    }
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(__doc__)
        return 2
    set_up()
    return subprocess.run([*jobs[sys.argv[1]], *sys.argv[2:]], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
