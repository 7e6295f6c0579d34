"""The picture of a model's forms: the hull of every family at one site, and what the best plans are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")  # in order of merit
DASHES = ("-", "--", "-.", ":")


def draw(found: dict[str, Any], target: Path) -> None:
    """Draw the picture of what `families.py` found as an SVG, the same bytes for the same results."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": found["model"], "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(2, 1))
    hulls = found["hulls"]
    shares = [cell["mixed"]["weights"] for cell in found["cells"]]
    used = sorted({name for share in shares for name in share}, key=lambda n: -sum(s.get(n, 0) for s in shares))
    order = list(dict.fromkeys([*used, *_by_merit(hulls["forms"])]))  # so that no two bars have one colour
    styles = {name: (COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS)]) for k, name in enumerate(order)}
    for name in _by_merit(hulls["forms"]):
        colour, dashes = styles[name]
        left.plot(*zip(*hulls["forms"][name], strict=True), lw=1.4, label=name, color=colour, ls=dashes)
    left.set(xscale="log", yscale="log", xlim=(0.5, 9), xlabel="stored bits a weight", ylabel="predicted nats")
    left.set_xticks([0.5, 1, 2, 3, 4, 6, 8], ["0.5", "1", "2", "3", "4", "6", "8"], minor=False)
    left.set_xticks([], minor=True)
    within = [d for points in hulls["forms"].values() for bits, d in points if 0.5 <= bits <= 9 and d > 0]
    left.set_ylim(min(within) / 2, max(within) * 2)
    left.grid(True, which="major", color="#dddddd", lw=0.6)
    left.set_title(f"{hulls['site']} ({' x '.join(map(str, hulls['shape']))})", loc="left")
    left.legend(loc="lower left", frameon=False, ncols=2)
    budgets = [cell["budget"] for cell in found["cells"]]
    below = [0.0] * len(budgets)
    for name in used:
        heights = [100 * share.get(name, 0) / sum(share.values()) for share in shares]
        right.bar(budgets, heights, bottom=below, color=styles[name][0], width=0.7, label=name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    right.set(ylim=(0, 100), xlabel="budget, share of the original file", ylabel="% of the weights")
    right.set_title("what the best plans use", loc="left")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, ncols=3)
    for axes in (left, right):
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(target, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _by_merit(forms: dict[str, list[tuple[float, float]]]) -> list[str]:
    """The forms by what they do at two bits a weight, best first."""

    def at_two(name: str) -> float:
        return min((d for bits, d in forms[name] if bits <= 2.1), default=float("inf"))

    return sorted(forms, key=at_two)
