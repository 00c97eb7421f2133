"""`accelerate launch engine/run.py recipe.yaml [key=value ...]`: the same as `frostline run`, on every device."""

import sys
from pathlib import Path

# A script's own folder comes first on the path; here that would be `engine/` itself and not the folder it lies in.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
