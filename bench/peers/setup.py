"""Make the environments of the peers, bench/.envs/NAME, from the exact versions in bench/peers/requirements/NAME.txt.

    script/bench setup NAME | script/bench setup all

PyTorch is installed first and alone, so that nothing else pulls another build of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".envs"
PEERS = tuple(sorted(path.stem for path in (HERE / "requirements").glob("*.txt")))


def python_of(peer: str) -> Path:
    """The interpreter of the environment of a peer, which may not be there."""
    return ENVIRONMENTS / peer / "bin" / "python"


def requirements_of(peer: str) -> Path:
    return HERE / "requirements" / f"{peer}.txt"


def set_up(peer: str) -> str | None:
    """Make the environment of a peer unless it stands as asked; what went wrong in one line, None where nothing did."""
    wanted, stamp = requirements_of(peer), ENVIRONMENTS / peer / "ready.txt"
    if stamp.exists() and stamp.read_text(encoding="utf8") == wanted.read_text(encoding="utf8"):
        return None
    if not python_of(peer).exists():
        venv.create(ENVIRONMENTS / peer, with_pip=True)
    torch = next(line for line in wanted.read_text(encoding="utf8").splitlines() if line.startswith("torch=="))
    for asked in ([torch], ["--requirement", str(wanted)]):
        command = [str(python_of(peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *asked]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return (lines or done.stderr.splitlines() or ["pip failed"])[-1]
    stamp.write_text(wanted.read_text(encoding="utf8"), encoding="utf8")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("all", *PEERS))
    asked = parser.parse_args().peer
    failed = 0
    for peer in PEERS if asked == "all" else (asked,):
        print(f"{peer}: ", end="", flush=True)
        trouble = set_up(peer)
        print(trouble or "ready", flush=True)
        failed += trouble is not None
    sys.exit(failed and asked != "all")


if __name__ == "__main__":
    main()
