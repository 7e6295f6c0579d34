"""Options that several commands share, with their help, and the files that the examples in the help speak of.

`script/demo` makes those files, so every example runs as written in a clone where the demo has run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

BUDGET, CALIBRATION, CHOICE, OUTPUT = "Budget", "Calibration", "What may be chosen", "Output"

ModelSource = Annotated[str, typer.Argument(help="A Hugging Face folder, FILE.py:FACTORY or PACKAGE.MODULE:FACTORY.")]
RunFolder = Annotated[Path, typer.Argument(help="The run folder of a study, or its URL, such as s3://bucket/run.")]
Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="Weights of a FACTORY's module, as safetensors.")
]
Calibration = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE[:COLUMN]",
        help="Calibration data: .txt, .jsonl, .csv, .parquet, .npz, .safetensors, images or a saved dataset.",
        rich_help_panel=CALIBRATION,
    ),
]
CheckData = Annotated[
    str | None,
    typer.Option(
        "--check-data",
        metavar="FILE[:COLUMN]",
        help="Data the model was not trained on, to scale predictions by (default: a fifth of --data).",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="How many windows, texts or images to use (128 windows, 512 of the others).",
        rich_help_panel=CALIBRATION,
    ),
]
SequenceLength = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens of a window or text.", rich_help_panel=CALIBRATION)
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Samples of a batch.", rich_help_panel=CALIBRATION)]
Seed = Annotated[int, typer.Option(metavar="N", help="Fixes every result.", rich_help_panel=CALIBRATION)]
MetricName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="identity, diagonal, input (no backward pass), output or kronecker (the default).",
        rich_help_panel=CALIBRATION,
    ),
]
Gains = Annotated[
    bool,
    typer.Option(
        "--gains/--no-gains",
        help="Scale predictions by probes measured at every site, or leave them as the metric has them.",
        rich_help_panel=CALIBRATION,
    ),
]
DivergenceName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What counts as damage: kl, cosine, mse or bce; by default as the model's head has it.",
        rich_help_panel=CALIBRATION,
    ),
]
Forms = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Forms to choose from; by default all but trellis (for memory budgets) and portable (for exports).",
        rich_help_panel=CHOICE,
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT,...",
        help="Round the inputs of layers too: int8, fp8, fp4 or e5m2; then token or tensor, shift, dither.",
        rich_help_panel=CHOICE,
    ),
]
Recover = Annotated[
    bool,
    typer.Option(
        "--recover",
        help="Shift biases at the end, so that every layer gives its old means on calibration data.",
        rich_help_panel=CHOICE,
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Write several weight files, none larger than this, such as 2GB."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Only sites that match; may be repeated.", rich_help_panel=CHOICE),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="No sites that match; may be repeated.", rich_help_panel=CHOICE),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="LIMIT",
        help="Most bytes on disk: 35% of the original, 120MB, 4.25bits a weight; or most time: 40ms, 2x-faster.",
        rich_help_panel=BUDGET,
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Most bytes resident: 35% or 120MB.", rich_help_panel=BUDGET),
]
FlopsBudget = Annotated[
    str | None,
    typer.Option(metavar="NUMBER", help="Most FLOPs of a position: 60% or 2e9.", rich_help_panel=BUDGET),
]
LatencyBudget = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Most time of one sample on this machine: 40ms, 2x-faster or 70%.", rich_help_panel=BUDGET
    ),
]
DivergenceLimit = Annotated[
    float | None,
    typer.Option(
        "--divergence",
        metavar="LIMIT",
        help="The smallest model whose predicted divergence stays under this.",
        rich_help_panel=BUDGET,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Most memory to take, such as 6GB: weights are read as they are needed, and fewer processes run.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes that fit; by default one a core.")]
Engine = Annotated[str, typer.Option(metavar="NAME", help="Where fits run: local (processes here) or ray.")]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Ray cluster, such as ray://host:10001; by default one made here."),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=OUTPUT)]


def names_of(text: str | None) -> tuple[str, ...] | None:
    """`a,b` as names; None where nothing was given."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the rest is left to the steps."""
    return {name: value for name, value in options.items() if value is not None}
