"""What every command does at the terminal: progress on stderr, results on stdout, errors in a sentence.

Heavy libraries are imported by the commands themselves, under a progress line, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import typer

from tersor.errors import TersorError
from tersor.urls import url_of

P = ParamSpec("P")
Progress = Callable[[str, str, int, int], Any]
REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # what the user gave, what happened on the way, what the user stopped
STEPS = {
    "start": "Starting",
    "observe": "Observing the model",
    "damping": "Choosing the damping",
    "limit": "Finding the limit",
    "draw": "Drawing curves",
    "probe": "Measuring a gain a site",
    "time": "Timing every site",
    "plan": "Planning",
    "build": "Fitting the plan",
    "probe plans": "Measuring whole plans",
    "judge": "Judging on held-out data",
    "judge sites": "Judging every site alone",
    "verify": "Verifying",
    "report": "Writing the report",
    "export": "Exporting",
}


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """The command with its errors told in one sentence on stderr, and the exit status that goes with them."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _silence()
        try:
            with _run_here(kwargs):
                command(*args, **kwargs)
        except KeyboardInterrupt:
            _fail("Interrupted; the same command goes on from what the run folder holds.", INTERRUPTED)
        except typer.Exit:
            raise
        except Exception as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise
            refused = isinstance(error, TersorError) and not _is_full(error)
            _fail(sentence_of(error), REFUSED if refused else FAILED)

    return run


@contextmanager
def _run_here(options: dict[str, Any]) -> Iterator[None]:
    """Inside, a run that is a URL is a folder here that is sent there."""
    url = url_of(options.get("run") or "")
    if url is None:
        yield
        return
    from tersor.run.mirror import mirrored

    with mirrored(url) as folder:
        options["run"] = folder
        yield
    if not options.get("quiet"):
        typer.echo(f"The run is in {url}; its copy here is {folder}.", err=True)


def _fail(sentence: str, status: int) -> None:
    typer.secho(sentence, err=True, fg=typer.colors.RED)
    raise typer.Exit(status) from None


def sentence_of(error: Exception) -> str:
    """One sentence for the user; what nobody foresaw leaves its traceback in a file for a report."""
    text = _printable(" ".join(str(error).split()))
    if _is_full(error):
        where = f" ({text})" if isinstance(error, TersorError) else ""
        return f"The disk is full; free some space and give the same command again, it goes on where it stopped{where}."
    if isinstance(error, TersorError):
        return text
    if isinstance(error, MemoryError) or any(words in text for words in ("out of memory", "can't allocate memory")):
        return "Memory ran out; try a smaller --batch-size or --sequence-length, or fewer --workers."
    with tempfile.NamedTemporaryFile("w", prefix="tersor-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    first = text[:200].rstrip(".") or "no message"
    return f"{type(error).__name__}: {first}. This was not foreseen; please report it with {file.name}."


def _is_full(error: Exception) -> bool:
    """Whether the disk is full."""
    chain = list(_causes(error))
    return any(e.errno == errno.ENOSPC for e in chain if isinstance(e, OSError)) or any(
        words in str(e) for e in chain for words in ("No space left", "disk is full")
    )


def _printable(text: str) -> str:
    """Text without what would steer a terminal: names come from files of strangers."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _silence() -> None:
    """Keep other libraries from writing to the user's terminal, in this process and in its workers."""
    warnings.filterwarnings("ignore")
    for name, value in (
        ("PYTHONWARNINGS", "ignore"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("DATASETS_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def give(value: Any, *shown: Any, as_json: bool, quiet: bool) -> None:
    """The result of a command on stdout: `value` as JSON, or what is `shown`, or nothing."""
    if as_json:
        typer.echo(json.dumps(_plain(value), indent=2))
    elif not quiet:
        from rich.console import Console

        console = Console(highlight=False)
        for renderable in shown:
            console.print(renderable)


def _plain(value: Any) -> Any:
    """`value` for JSON, which knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextmanager
def progress_shown(*, as_json: bool, quiet: bool) -> Iterator[Progress]:
    """A callback that shows the step at work with the time left, and leaves a line for every step that is done."""
    if as_json or quiet:
        yield lambda step, what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Bars(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600
    ) as bars:
        steps = _Steps(bars, console)
        yield steps
        steps.close()


class _Steps:
    """Turns calls of the steps into one bar at a time."""

    def __init__(self, bars: Any, console: Any) -> None:
        self.bars, self.console = bars, console
        self.step, self.part, self.began = "", ("", 0), time.monotonic()
        self.task: Any = None
        self("start", "loading libraries", 0, 0)

    def __call__(self, step: str, what: str, done: int, total: int) -> None:
        if step != self.step:
            self.close()
            if what == "done":  # of a command of several steps
                return
            self.step, self.part, self.began = step, ("", -1), time.monotonic()
        part = (what if step == "observe" else "", total)
        if part != self.part:
            self._drop()
            self.part = part
            known = total if total > 1 else None
            self.task = self.bars.add_task(STEPS.get(step, step), total=known, count="", what="")
        count = f"{done}/{total}" if total > 1 else ""
        self.bars.update(self.task, completed=done, count=count, what=what)

    def _drop(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def close(self) -> None:
        """End the step at work; it leaves its line if it took a second or more."""
        self._drop()
        seconds = time.monotonic() - self.began
        if self.step not in ("", "start") and seconds >= 1:
            self.console.print(f"[green]✓[/] {STEPS.get(self.step, self.step)} [dim]{seconds:.0f} s[/]")
        self.step = ""
