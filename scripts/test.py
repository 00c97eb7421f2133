"""Everything a change has to pass: ruff, pyright on the torch-free floors, pytest. Sets up what it needs first.

Arguments go to pytest (`python3 scripts/test.py -k plan`); `--slow` takes in the tests that need minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _venv

CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"])
PLUGINS = ("-p", "xdist", "-p", "hypothesispytest")  # and no others that the interpreter below .venv may bring


def main(arguments: list[str]) -> int:
    """All checks run even when one fails, so that one call shows everything; pytest's summary comes last."""
    _venv.enter()
    os.chdir(_venv.ROOT)
    import _trec

    _trec.prepare(Path("data/trec"))
    os.environ["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # the pinned version is meant
    failed = [check for check in CHECKS if run(check)]
    marks = ["-m", "slow or not slow"] if "--slow" in arguments else []
    rest = [argument for argument in arguments if argument != "--slow"]
    if failed:
        print("failed: " + ", ".join(" ".join(check) for check in failed), flush=True)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return run(["pytest", *PLUGINS, "-n", "2", *marks, *rest]) or int(bool(failed))


def run(command: list[str]) -> int:
    """Prints a command, runs it, returns its exit code."""
    print(f"$ {' '.join(command)}", flush=True)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
