"""A corpus of damaged and hostile checkpoints, artifacts, runs and data files, each with the command that reads it.

    python tests/hostile/corpus.py FOLDER

writes one folder a case, made from a tiny random model. A case is a function that spoils a copy of what `make_base`
wrote; its docstring says what is wrong, and it returns the command to be given there and a word that its refusal names.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where the tiny models are, when this is run as a script

import spoilt_artifacts
import spoilt_configs
import spoilt_data
import spoilt_runs
import spoilt_weights
from spoiling import CASES, make_base

KINDS = (spoilt_weights, spoilt_configs, spoilt_artifacts, spoilt_runs, spoilt_data)  # each adds its cases as it loads


def make(base: Path, folder: Path, name: str) -> tuple[str, str]:
    """A copy of the base in `folder`, spoiled as the case of this name has it; its command and what it names."""
    shutil.copytree(base, folder, symlinks=True)
    return CASES[name](folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_base(target / "base")
    for case_name in CASES:
        line, _ = make(target / "base", target / case_name, case_name)
        print(f"{case_name}: tersor {line}")
