"""Running a command in a session of its own, and watching the most memory that all its processes hold at once.

What a process reports of itself will not do: its greatest size includes that of the process that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

EVERY = 0.2  # seconds between two looks


def watched(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path | None, seconds: float
) -> tuple[int | None, int]:
    """Run a command in `folder`: its exit code, None where it took longer than `seconds`, and its peak in bytes."""
    output = None if log is None else log.open("w", encoding="utf8")
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT if output else None, cwd=folder, env=dict(environment),
        start_new_session=True,
    )  # fmt: skip
    peak, start = 0, time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - start < seconds:
            peak = max(peak, resident_of(process.pid))
            time.sleep(EVERY)
        return process.poll(), peak
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if output is not None:
            output.close()


def resident_of(session: int) -> int:
    """Bytes resident of all processes of a session, pages that they share counted for each."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf8").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session:
            pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")
