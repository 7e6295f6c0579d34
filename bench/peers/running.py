"""Running one peer at one setting on one model, in its own environment, and judging what it hands back.

What was run before with the same versions on the same tensors is read from the scratch folder; a failure is kept as a
row with its reason, in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from judging import mean_of
from peers.equal import whole_bytes
from peers.processes import watched
from peers.settings import label_of
from peers.setup import ENVIRONMENTS, HERE, python_of, requirements_of
from peers.subject import Subject

SECONDS = 1800
LEAST = 0.1  # of the file; a peer that touches less has not compressed the model


def row_of(subject: Subject, peer: str, setting: dict[str, Any], again: bool = False) -> dict[str, Any]:
    """The row of a peer at a setting; with `again`, what failed before is tried once more."""
    row = {"tool": peer, "setting": setting, "label": label_of(setting)}
    if not python_of(peer).exists():
        return {**row, "failed": f"no environment; run script/bench setup {peer}"}
    adapter = HERE / "adapters" / f"with_{peer.replace('-', '_')}.py"
    key = _key(subject, setting, requirements_of(peer), adapter, adapter.parent / "task.py")
    folder = subject.scratch / f"{peer}-{key}"
    kept = folder / "row.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf8"))
        if not (again and "failed" in found):
            return {**found, "label": row["label"]}
    folder.mkdir(parents=True, exist_ok=True)
    task = {
        "model": subject.description(), "setting": setting, "seed": 0, "batch_size": subject.known.batch_size,
        "calibration": str(subject.calibration),
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task, indent=1), encoding="utf8")
    trouble, peak = _run([str(python_of(peer)), str(adapter), str(folder)], folder)
    row |= {"failed": trouble} if trouble else {**_judged(subject, folder), "peak_memory": peak}
    row["folder"] = folder.name
    kept.write_text(json.dumps(row, indent=1), encoding="utf8")
    return row


def divergences_of(subject: Subject, row: dict[str, Any]) -> np.ndarray:
    """The divergence of every held-out sample under the weights of a row."""
    found: np.ndarray = np.load(subject.scratch / row["folder"] / "divergences.npy")
    return found


def _judged(subject: Subject, folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text(encoding="utf8"))
    with subject.holding(load_file(folder / "weights.safetensors")):
        values, score = subject.judge.divergences(), subject.judge.score()
    if not np.isfinite(values).all():
        return {"failed": "its weights make outputs that are not finite"}
    np.save(folder / "divergences.npy", values)
    (folder / "weights.safetensors").unlink()
    touched = subject.bytes_of(result["touched"])
    if touched < LEAST * subject.file_bytes:
        return {"failed": f"it quantised {touched / subject.file_bytes:.1%} of the weights only"}
    return {
        **result,
        "touched_bytes": touched,
        "bytes": whole_bytes(subject.file_bytes, touched, result["stored"]),
        "divergence": mean_of(values),
        "score": score,
    }


def _key(subject: Subject, setting: dict[str, Any], *files: Path) -> str:
    digest = hashlib.sha256(f"{subject.fingerprint}{json.dumps(setting, sort_keys=True)}".encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _run(command: list[str], folder: Path) -> tuple[str | None, int]:
    """Run an adapter: what went wrong in one line, or None, and its peak memory. Its output is kept in the folder."""
    (folder / "result.json").unlink(missing_ok=True)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": "2",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "",
    }  # fmt: skip
    binaries, log = Path(command[0]).parent, folder / "log.txt"
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    code, peak = watched(command, folder, environment, log, SECONDS)
    if code is None:
        return f"took longer than {SECONDS} seconds", peak
    if code == 0 and (folder / "result.json").exists():
        return None, peak
    return reason_in(log.read_text(encoding="utf8", errors="replace"), code), peak


def reason_in(log: str, code: int) -> str:
    """The last line of a log that names an error, without the paths of this machine."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception", "Exit"))]
    reason = (named or lines or [f"ended with {code}"])[-1]
    return reason.replace(f"{ENVIRONMENTS}/", "").replace(str(Path.home()), "~")[:300]
