"""Write docs/figures.md, and parts of docs/forms.md and docs/memory.md: what was measured, and the commands for it.

From bench/results: python bench/figures.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from families_plot import draw
from models import NAMES

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[1] / "docs" / "figures.md"
FORMS_PAGE, MEMORY_PAGE = TARGET.with_name("forms.md"), TARGET.with_name("memory.md")
END = "<!-- end -->"
SCORES = {"minilm": "STS-B Spearman x 100", "babyllama": "perplexity", "pylm": "perplexity", "resnet56": "top-1 %"}
FORMS = ("int", "coded", "lowrank", "int+lowrank")
HEAD = """\
# Figures

Measured on two cores, each table in one run with its rivals. The models: all-MiniLM-L6-v2 (a sentence encoder),
BabyLlama and PyLM (language models of 0.9 and 4.6 M parameters), ResNet-56 for CIFAR-10. Shares are of the
original's weights file, everything counted, tables included. Divergence is on held-out data: KL in nats a token or
class, 1 - cosine for the encoder. Brackets are 95 % bootstrap intervals. Tersor's plans are from all forms, and, as
`fixed rates`, from those without entropy coding. Baselines put one setting at every site, tables included, the largest
that fits. The limit is the least divergence that a code of that size is predicted to have for Gaussian weights.
"""


def budget_table(found: dict[str, Any]) -> Iterator[str]:
    name = found["model"]
    yield f"\n## {name}: budgets\n"
    yield f"`script/bench budgets {name}`. The original: {SCORES[name]} {found['original']:.2f}.\n"
    yield f"| budget | tool | share | divergence | predicted | limit | {SCORES[name]} |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for cell in found["cells"]:
        for row in cell["rows"]:
            if row["bytes"] is None:
                yield f"| {cell['budget']} | {row['tool']} | cannot; {row['note']} | | | | |"
                continue
            d, s = row["divergence"], row["score"]
            tool = f"{row['tool']}, {row['setting']}" if "setting" in row else f"**{row['tool']}**"
            predicted = f"{row['predicted']:.4f}" if "predicted" in row else ""
            least = f"{row['limit']:.4f}" if row.get("limit") else ""
            yield (
                f"| {cell['budget']} | {tool} | {row['bytes'] / found['bytes']:.2%} | {d['value']:.4f} "
                f"[{d['low']:.4f}, {d['high']:.4f}] | {predicted} | {least} | {s['value']:.2f} "
                f"[{s['low']:.2f}, {s['high']:.2f}] |"
            )


def prediction_table(name: str, found: dict[str, Any]) -> Iterator[str]:
    rows = [r for r in found["single"] if r["measured"] > 1e-9]
    yield f"\n## {name}: predicted against measured\n"
    more = f" --samples {found['samples']}" if found.get("samples") else ""
    command = f"`script/bench prediction {name}{more}`"
    yield f"{command}. {len(rows)} candidates at single sites; ratio: measured / predicted.\n"
    yield f"| metric | rank correlation | median ratio | quartiles | {' | '.join(FORMS)} |"
    yield "| --- | --- | --- | --- |" + " --- |" * len(FORMS)
    for kind in rows[0]["predicted"]:
        measured = np.array([r["measured"] for r in rows])
        predicted = np.array([r["predicted"][kind] for r in rows])
        ratio = measured / np.maximum(predicted, 1e-30)
        low, middle, high = np.percentile(ratio, (25, 50, 75))
        by_form = [np.median(ratio[[r["form"] == form for r in rows]]) for form in FORMS]
        yield (
            f"| {kind} | {spearmanr(measured, predicted).statistic:.3f} | {middle:.2f} | {low:.2f} .. {high:.2f} | "
            + " | ".join(f"{v:.2f}" for v in by_form)
            + " |"
        )
    yield "\nWhole plans:\n"
    yield "| budget | bytes | predicted | measured | ratio |"
    yield "| --- | --- | --- | --- | --- |"
    for p in found["plans"]:
        ratio = p["measured"] / p["predicted"]
        yield f"| {p['budget']} | {p['bytes']:,} | {p['predicted']:.5f} | {p['measured']:.5f} | {ratio:.2f} |"


def coded_tables(found: dict[str, Any]) -> Iterator[str]:
    """Plans and one step by rate, then parts of the form, then probability models."""
    cells = found["cells"]
    rates = " | ".join(f"{cell['rate']}" for cell in cells)
    rule = "| --- " * (len(cells) + 1) + "|"
    yield f"\n## {found['model']}: integers at their entropy\n"
    yield (
        f"`script/bench coded`. The {found['weights']:,} weights of the blocks; bits a weight in the file, header "
        "entries counted. KL in nats a token on held-out data, and as predicted. `one step` is that of three fits "
        "within 1 % of the rate; plans come to the rate from below.\n"
    )
    yield f"| bits a weight | {rates} |\n{rule}"
    yield "| asked for | " + " | ".join(f"{cell['target']:g}" for cell in cells) + " |"
    names = list(dict.fromkeys(row["name"] for cell in cells for row in cell["rows"]))
    shown = [n for n in names if n.startswith("plan")] + ["one step"]
    for name in shown:
        yield f"| {name} | " + " | ".join(_measured(cell, name) for cell in cells) + " |"
    yield "| the limit, predicted | " + " | ".join(f"{cell['limit']:.5f}" for cell in cells) + " |"
    yield "\nOne step with one part changed: times the KL of one step at the same bits, on the same held-out windows.\n"
    yield f"| bits a weight | {rates} |\n{rule}"
    for name in names:
        if name not in shown:
            yield f"| {name} | " + " | ".join(_against(cell, name) for cell in cells) + " |"
    scatter = " | ".join(
        f"{np.mean([r['scatter'] for r in c['rows'] if len(r.get('bits', ())) > 1]):.1%}" for c in cells
    )
    yield f"| scatter of three fits, mean | {scatter} |"
    yield "\nBits a weight of the same codes, those of one step, under other probability models:\n"
    yield f"| bits a weight | {rates} |\n{rule}"
    for number, model in enumerate(cells[0]["models"]):
        values = " | ".join(f"{cell['models'][number]['bits']:.3f}" for cell in cells)
        yield f"| {model['name']} | {values} |"


def ablation_table(name: str, found: dict[str, Any]) -> Iterator[str]:
    """What a plan does without each lever, as a multiple of what it does with all of them."""
    every = found.get("every")
    command = f"`script/bench ablation {name}{f' --every {every}' if every else ''}`"
    of = f"one in {every} of the weights that are no tables" if every else "the original"
    yield f"\n## {name}: what each lever is worth\n"
    yield (
        f"{command}, at {found['budget']} of {of}, by bytes of the file and by bytes in "
        "memory. `x` is the divergence over that of the first row of its kind; the planner does its best without.\n"
    )
    yield "| bytes | plan | share | divergence | x |"
    yield "| --- | --- | --- | --- | --- |"
    for row in found["rows"]:
        if "divergence" not in row:
            yield f"| {row['family']} | {row['lever']} | cannot: {row['note']} | | |"
            continue
        d = row["divergence"]
        figures = f"{row['share']:.2%} | {d['value']:.4f} [{d['low']:.4f}, {d['high']:.4f}] | {row['times']:.2f}"
        yield f"| {row['family']} | {row['lever']} | {figures} |"


def runtime_table(found: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {found['model']}: at run time\n"
    yield (
        f"`script/bench runtime {found['model']}`, on {found['threads']} core(s). Plans of one budget, loaded again, "
        "and torchao's weight-only integers of linear layers, over the original: bytes resident, bytes at the peak of "
        "a batch of 32, latency of one sample, of 32 and of generating 64 tokens (medians of ratios, in turn).\n"
    )
    yield "| forms | on disk | resident | peak | latency of 1 | of 32 | of generating | tokens a second | s to load |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    columns = (("bytes", ".1%"), ("resident", ".1%"), ("peak", ".1%"), ("latency 1", ".2f"), ("latency 32", ".2f"),
               ("generating", ".2f"), ("tokens a second", ".0f"), ("load", ".2f"))  # fmt: skip
    for row in found["rows"]:
        if "failed" in row:
            yield f"| {row['forms']} | failed: {row['failed']} | | | | | | | |"
        else:
            yield f"| {row['forms']} | {' | '.join(format(row[k], f) if k in row else '' for k, f in columns)} |"


def speed_tables(found: dict[str, Any]) -> Iterator[str]:
    yield "\n## Speed of coding and of rounding\n"
    yield "`script/bench coding_speed`, one core.\n"
    yield "| matrices | bits a weight | million weights a second encoded | decoded |\n| --- | --- | --- | --- |"
    for row in found["coding"]:
        speeds = " | ".join(f"{row[k] / 1e6:.1f}" for k in ("encoded_a_second", "decoded_a_second"))
        yield f"| {row['name']} | {row['bits']:.2f} | {speeds} |"
    yield "\n| site | bits a weight | seconds to round | to fit in all |\n| --- | --- | --- | --- |"
    for row in found["fits"]:
        yield f"| {row['name']} | {row['bits']:.2f} | {row['rounding_seconds']:.1f} | {row['fit_seconds']:.1f} |"


def click_tables(found: dict[str, Any]) -> Iterator[str]:
    """AUC and divergence of every form of the table of the click model, a column a budget."""
    original, cells = found["original"], found["cells"]
    yield "\n## The click model: its table in every form\n"
    yield (
        f"`script/bench tables`. A click model on the census data with one table of {found['rows']:,} rows x "
        f"{found['columns']} for the values of all columns and of all pairs of categorical ones, half of them seen "
        "fewer than ten times; the layers stay as they are. AUC on "
        f"{found['held_out']:,} held-out rows with its 95 % interval, of the original {original['value']:.4f} "
        f"[{original['low']:.4f}, {original['high']:.4f}]. Of every form the setting that is predicted to do least "
        "within the bytes, all that is stored counted. In italics the nulls: the same forms blind to frequencies "
        "(and to gradients), the rows of the largest norms beside zeros, and rounding to the nearest.\n"
    )
    bits = " | ".join(f"{cell['bits']:g} bits" for cell in cells)
    for what, shown in (("AUC", _auc), ("AUC less the original's", _lost), ("divergence, 1000 x nats", _thousandths)):
        yield f"\n| {what} | {bits} |\n{'| --- ' * (len(cells) + 1)}|"
        for name in (row["name"] for row in cells[0]["rows"]):
            title = f"*{name}*" if "blind" in name or name in ("rows by magnitude", "round to nearest") else name
            yield f"| {title} | " + " | ".join(shown(_row(cell, name)) for cell in cells) + " |"


def _auc(row: dict[str, Any]) -> str:
    return "" if row["bytes"] is None else "{value:.4f} [{low:.4f}, {high:.4f}]".format(**row["auc"])


def _lost(row: dict[str, Any]) -> str:
    return "" if row["bytes"] is None else "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["difference"])


def _thousandths(row: dict[str, Any]) -> str:
    return "" if row["bytes"] is None else f"{1000 * row['divergence']['value']:.3f}"


def metrics_table(found: dict[str, Any]) -> Iterator[str]:
    more = "".join(f" --{k} {found[k]}" for k in ("every", "samples") if found[k] not in (None, 1))
    yield f"\n**{found['model']}**, {found['sites']} sites at once (`script/bench metrics {found['model']}{more}`):\n"
    yield "| form | setting of the first site | bits | identity | kronecker | ratio | difference |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in found["rows"]:
        if "note" in row:
            yield f"| {row['form']} | {row['note']} | | | | | |"
            continue
        bits, cells = [f"{row[k]['bits']:.2f}" for k in ("identity", "kronecker")], []
        for kind in ("identity", "kronecker"):
            d = row[kind]["divergence"]
            cells.append(f"{d['value']:.4f} [{d['low']:.4f}, {d['high']:.4f}]")
        gap = row["difference"]
        worse = "**" if gap["high"] >= 0 else ""
        yield (
            f"| {row['form']} | {row['setting']} | {' / '.join(dict.fromkeys(bits))} | {' | '.join(cells)} | "
            f"{worse}{row['ratio']['value']:.2f}{worse} | {gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}] |"
        )


def families_table(found: dict[str, Any]) -> Iterator[str]:
    """Measured divergence of the mixed plan and of every form alone at each budget, best forms first."""
    name, cells = found["model"], found["cells"]
    yield f"\n**{name}** (`script/bench families {name}`):\n"
    yield f"![{name}: the forms at one site, and in the best plans](assets/forms-{name}.svg)\n"
    yield f"| | {' | '.join(cell['budget'] for cell in cells)} |"
    yield f"| --- |{' --- |' * len(cells)}"
    yield f"| **all forms** | {' | '.join(_damage(cell['mixed']) for cell in cells)} |"

    def middle(form: str) -> float:
        row = cells[len(cells) // 2]["alone"].get(form) or {"predicted": "inf"}
        return float(row["divergence"]["value"] if "divergence" in row else row["predicted"])

    for form in sorted({form for cell in cells for form in cell["alone"]}, key=middle):
        yield f"| {form} | {' | '.join(_damage(cell['alone'][form]) for cell in cells)} |"
    if all("whole_predicted" in cell for cell in cells):
        whole = ", ".join(f"{c['mixed']['predicted'] / c['whole_predicted']:.3f}" for c in cells)
        yield f"\nPredicted for the mixed plans over what it is with these forms drawn everywhere: {whole}."
    yield from _beside_the_best(found)
    if "seconds" not in found:
        return
    yield f"\nThe study took:\n\n| {' | '.join(found['seconds'])} | all |\n|{' --- |' * (len(found['seconds']) + 1)}"
    values = found["seconds"].values()
    yield f"| {' | '.join(f'{v:.0f} s' for v in values)} | {sum(values) / 60:.1f} min |"
    most = sorted(found["drawn"].items(), key=lambda item: -item[1])
    yield "\nSeconds of the curves of each form, of all processes: " + ", ".join(f"{n} {s}" for n, s in most) + "."


def _beside_the_best(found: dict[str, Any]) -> Iterator[str]:
    """How far forms that were not run alone are behind the best at the scouts of a study."""
    budgets = [cell["budget"] for cell in found["cells"]]
    run = {form for cell in found["cells"] for form in cell["alone"]}
    others = {form: row for form, row in found.get("beside_the_best", {}).items() if form not in run}
    if not others:
        return
    yield "\nAt the scouts that are no tables the other forms do, over the best at as many bits a weight, at least:\n"
    yield f"| | {' | '.join(budgets)} |"
    yield f"| --- |{' --- |' * len(budgets)}"
    for form, row in sorted(others.items(), key=lambda item: item[1][len(budgets) // 2] or float("inf")):
        yield f"| {form} | {' | '.join('cannot' if ratio is None else f'{ratio:.2f}' for ratio in row)} |"


def _damage(row: dict[str, Any] | None) -> str:
    """The divergence of a plan; as predicted, in brackets, where it was not measured."""
    if row is None:
        return "cannot"
    if "divergence" not in row:
        return f"({row['predicted']:.4f})"
    return "{value:.4f} [{low:.4f}, {high:.4f}]".format(**row["divergence"])


def large_table(found: dict[str, Any]) -> Iterator[str]:
    """The steps of a model that does not fit, of one result."""
    blocks, size, metric = found["blocks"], found["bytes"] / 1e9, found["metric"]
    given = f"--blocks {blocks} --metric {metric} --memory {found['memory']}"
    yield f"\n{blocks} block{'s' * (blocks > 1)}, {size:.2f} GB (`script/bench large {given}`):\n"
    yield "| step | peak | time | a block | of which |"
    yield "| --- | --- | --- | --- | --- |"
    for row in found["rows"]:
        parts = ", ".join(f"{part} {row[part]:.0f} s" for part in ("observe", "limit", "draw") if part in row)
        parts += f"{row['original'] / 1e9:.2f} -> {row['bytes'] / 1e9:.2f} GB" if "bytes" in row else ""
        each = row["seconds"] / blocks
        yield f"| {row['step']} | {row['peak'] / 1e9:.2f} GB | {row['seconds'] / 60:.1f} min | {each:.0f} s | {parts} |"


def write_parts(page: Path, parts: dict[str, list[str]]) -> None:
    """Put lines between the marks that name them on a page, in place of those that were there."""
    text = page.read_text(encoding="utf8")
    for name, lines in parts.items():
        mark = f"<!-- {name}: from bench/figures.py -->"
        before, after = text.split(mark)
        text = "\n".join([before + mark, *lines, END]) + after.split(END, 1)[1]
    page.write_text(text, encoding="utf8")


def _known(kind: str) -> Iterator[dict[str, Any]]:
    """The results of a kind, in the order of the models."""
    for path in (RESULTS / f"{kind}-{name}.json" for name in NAMES):
        if path.exists():
            yield json.loads(path.read_text(encoding="utf8"))


def _row(cell: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in cell["rows"] if row["name"] == name)


def _measured(cell: dict[str, Any], name: str) -> str:
    row = _row(cell, name)
    if "note" in row:
        return "cannot"
    d = row["divergence"]
    digits = 5 if d["value"] < 0.02 else 4
    values = (d["value"], d["low"], d["high"], row["predicted"])
    value, low, high, predicted = (f"{v:.{digits}f}" for v in values)
    return f"{value} [{low}, {high}], predicted {predicted}"


def _against(cell: dict[str, Any], name: str) -> str:
    ratio = next((row["against_one_step"] for row in cell["rows"] if row["name"] == name), None)
    if ratio is None:
        return ""
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def main() -> None:
    lines = [HEAD.rstrip()]
    for name in NAMES:
        for kind in ("budgets", "prediction"):
            path = RESULTS / f"{kind}-{name}.json"
            if path.exists():
                found = json.loads(path.read_text(encoding="utf8"))
                lines += budget_table(found) if kind == "budgets" else prediction_table(name, found)
    for name in NAMES:
        path = RESULTS / f"ablation-{name}.json"
        if path.exists():
            lines += ablation_table(name, json.loads(path.read_text(encoding="utf8")))
    once = {"coded-babyllama": coded_tables, **{f"runtime-{n}": runtime_table for n in NAMES}}
    for name, table in {**once, "coding-speed": speed_tables, "tables": click_tables}.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += table(json.loads(path.read_text(encoding="utf8")))
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf8")
    families = list(_known("families"))
    for found in families:
        draw(found, TARGET.parent / "assets" / f"forms-{found['model']}.svg")
    write_parts(FORMS_PAGE, {
        "in one plan": [line for found in families for line in families_table(found)],
        "under both metrics": [line for found in _known("metrics") for line in metrics_table(found)],
    })  # fmt: skip
    large = [json.loads(path.read_text(encoding="utf8")) for path in sorted(RESULTS.glob("large-*.json"))]
    write_parts(MEMORY_PAGE, {"measured": [line for found in large for line in large_table(found)]})
    print(f"written to {TARGET.name}, {FORMS_PAGE.name} and {MEMORY_PAGE.name}")


if __name__ == "__main__":
    main()
