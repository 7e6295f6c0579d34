"""The run folders under a folder: what each is of, how far it got, its age and its size; and removing them.

A run is found by its `run.db`; one that cannot be read is listed as damaged. Nothing in a run is opened but that.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.run.folder import Run

STATES = ("damaged", "begun", "observed", "studied", "built", "judged")


@dataclass(frozen=True)
class Listed:
    """A run folder: its model, how far it got (of `STATES`), its plans, bytes, the time of its last change, and who
    works there."""

    folder: Path
    model: str
    state: str
    plans: int
    size: int
    changed: float  # seconds since the epoch
    worker: str | None

    @property
    def is_finished(self) -> bool:
        """Whether its study is whole."""
        return STATES.index(self.state) >= STATES.index("studied")

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def runs_under(folder: Path) -> list[Listed]:
    """All runs in a folder and below, the last changed first; raises TersorError where there is no such folder."""
    if not folder.is_dir():
        raise TersorError(f"{folder} is no folder.")
    return sorted((_listed(path.parent) for path in folder.rglob("run.db")), key=lambda run: -run.changed)


def remove(run: Listed) -> None:
    """Delete a run folder; raises TersorError where a process works in it, or it cannot be deleted."""
    if run.worker is not None:
        raise TersorError(f"{run.worker} works in {run.folder}; it was left alone.")
    try:
        shutil.rmtree(run.folder)
    except OSError as error:
        raise TersorError(f"{run.folder} could not be removed: {error}.") from error


def _listed(folder: Path) -> Listed:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    changed = (folder / "run.db").stat().st_mtime
    try:
        run = Run(folder)
        try:
            source = Path(str(run.get("source", "?"))).name
            return Listed(folder, source, _state(run), len(run.plans()), size, changed, run.worker())
        finally:
            run.close()
    except TersorError:
        return Listed(folder, "?", "damaged", 0, size, changed, None)


def _state(run: Run) -> str:
    if run.facts("judgement/"):
        return "judged"
    if any("out" in (run.plan(name) or {}) for name in run.plans()):
        return "built"
    if run.get("studied") is not None:
        return "studied"
    return "observed" if run.get("observed") else "begun"
