"""Long runs of fuzzing readers by coverage, with Atheris.

    python tests/hostile/long_fuzz.py READER[,READER...] SECONDS [options of libFuzzer]

`all` are all of `readers.py`, one after the other, so many seconds each. Every reader begins with its sound files; JSON
and headers of safetensors are changed as such, too. What is no TersorError of one sentence ends the run of a reader,
and the input that did it is kept in the current folder. A line a reader says how many inputs were read.
"""

from __future__ import annotations

import os
import random
import re
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["tersor"]):
    from changing import CHANGES, refused_or_read
    from readers import READERS, made

LARGEST = 1 << 17  # bytes of an input
OPTIONS = (f"-max_len={LARGEST}", "-timeout=60", "-rss_limit_mb=6000", "-print_final_stats=1")


def run_apart(name: str, seconds: str, options: list[str]) -> bool:
    """Fuzz a reader in a process of its own, as a crash ends it; whether there was none."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        process = os.fork()
        if process == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            run(name, Path(folder), [*OPTIONS, f"-max_total_time={seconds}", *options])
        _, status = os.waitpid(process, 0)
        log.seek(0)
        said = log.read()
    found = re.search(r"number_of_executed_units: (\d+)", said)
    print(f"{name}: {int(found[1]) if found else 0:,} inputs, {'a crash' if status else 'no crash'}", flush=True)
    if status:
        print(said[-4000:], flush=True)
    return status == 0


def run(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz a reader until the time is over; never returns."""
    reader, seeds = made(name, folder / "reader"), folder / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(reader.seeds):
        (seeds / str(number)).write_bytes(seed)
    change = CHANGES.get(reader.kind)

    def one(content: bytes) -> None:
        with refused_or_read():
            reader.read(content)

    def mutated(content: bytes, largest: int, seed: int) -> bytes:
        """Changed as what it is, or else as bytes."""
        choose = random.Random(seed)
        try:
            if change is None or choose.random() < 0.3:
                raise ValueError
            return change(choose.choice, content)[:largest]
        except (ValueError, RecursionError):
            return bytes(atheris.Mutate(content, largest))

    atheris.Setup(["fuzz", *options, str(seeds)], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    names = list(READERS) if sys.argv[1] == "all" else sys.argv[1].split(",")
    sound = [run_apart(name, sys.argv[2], sys.argv[3:]) for name in names]
    sys.exit(not all(sound))
