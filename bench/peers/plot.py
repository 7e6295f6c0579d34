"""One plot a model: divergence against the bytes of the file, every tool a line, Tersor and the limit beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# A colour and a marker for every tool, the same in all plots; told apart without colours too.
STYLES = {
    "llmcompressor gptq": ("#0072b2", "o"),
    "llmcompressor awq": ("#56b4e9", "v"),
    "gptqmodel gptq": ("#009e73", "s"),
    "auto-round": ("#cc79a7", "D"),
    "hqq": ("#e69f00", "^"),
    "modelopt": ("#882255", "X"),
    "nncf": ("#999933", "<"),
    "quanto": ("#b8860b", ">"),
    "torchao": ("#6a5acd", "*"),
    "tensorly-torch": ("#d55e00", "P"),
    "low rank, best recipe": ("#aaaaaa", "."),
}


def line_of(row: dict[str, Any]) -> str:
    """The line that a row is a point of: its tool, and its method where it has several."""
    method = row.get("setting", {}).get("method")
    return f"{row['tool']} {method}" if method else str(row["tool"])


def draw(found: dict[str, Any], target: Path) -> None:
    """Draw the plot of a model's results as an SVG, the same bytes for the same results."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    matplotlib.rcParams.update({"svg.hashsalt": found["model"], "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    known = [row for row in found["rows"] if "failed" not in row]
    for name, (colour, marker) in STYLES.items():
        rows = _best_recipes(found) if name.startswith("low rank") else [r for r in known if line_of(r) == name]
        points = sorted({(row["bytes"], row["divergence"]["value"]) for row in rows})
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.1, label=name)
    for menu, style in (("at rest", "-"), ("resident", "--")):
        cells = [row["whole"][menu] for row in known if "divergence" in row["whole"][menu]]
        points = sorted({(cell["bytes"], cell["divergence"]["value"]) for cell in cells})
        if points:
            axes.plot(*zip(*points, strict=True), color="black", ls=style, lw=2, label=f"Tersor, {menu}")
    points = sorted({(row["bytes"], row["whole"]["limit"]) for row in known if row["whole"]["limit"]})
    if points:
        axes.plot(*zip(*points, strict=True), color="black", ls=":", lw=1.2, label="the limit, predicted")
    axes.set(xscale="log", yscale="log", xlabel="stored, share of the original file")
    axes.set_ylabel(f"divergence, {found['divergence_unit']}")
    sizes = [row["bytes"] for row in known]
    ticks = _ticks(min(sizes) / found["bytes"], max(sizes) / found["bytes"])
    axes.set_xticks([tick * found["bytes"] for tick in ticks], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value / found['bytes']:.3g} %"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{found['model']}: divergence against stored bytes", loc="left")
    figure.legend(loc="outside right center", frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _best_recipes(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the low-rank recipes, the best at every size."""
    best: dict[int, dict[str, Any]] = {}
    for row in found["low_rank"]:
        if "failed" not in row:
            known = best.get(row["bytes"])
            if known is None or row["divergence"]["value"] < known["divergence"]["value"]:
                best[row["bytes"]] = row
    return list(best.values())


def _ticks(low: float, high: float) -> list[float]:
    """Round shares from just below `low` to just above `high`."""
    shares = [m * 10**e for e in (-3, -2, -1) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)] + [1.0]
    return [share for share in shares if 0.8 * low <= share <= 1.25 * high]
