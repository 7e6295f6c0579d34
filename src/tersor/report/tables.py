"""Tables for the terminal, made of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tersor.export import Exported
from tersor.judge.verify import Verified
from tersor.plan import UNTOUCHED, Plan
from tersor.report.account import Account
from tersor.report.front import Point
from tersor.report.quantities import (
    PERCENTAGES,
    age_text,
    bytes_text,
    count_text,
    estimate_text,
    number_text,
    seconds_text,
    share_text,
    times_text,
)
from tersor.run.listing import Listed

NAMES_SHOWN, SITES_SHOWN = 3, 10


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are words and the rest numbers."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def judgement_table(judgement: Mapping[str, Any]) -> Table:
    """What the judge measured of both models, bytes and damage first."""
    before, after, time = judgement["original"], judgement["new"], judgement["latency"]
    title = f"Judged on {judgement['samples']:,} held-out samples ({judgement['predictions']:,} predictions)"
    table = _table(title, "", "original", "small", "difference")
    stored = before["stored"], after["stored"]
    _row(table, "bytes on disk", *map(bytes_text, stored), share_text(stored[1], stored[0]))
    found, predicted = judgement["divergence"], judgement["predicted"]
    _row(table, f"divergence ({judgement['unit']})", "", "", estimate_text(found, between="\n"))
    if predicted is not None:
        _row(table, "  as predicted", "", "", number_text(predicted))
        _row(table, "  measured / predicted", "", "", f"{found['value'] / predicted:.2f}" if predicted > 0 else "-")
    for score in judgement["scores"]:
        percent = score["name"] in PERCENTAGES
        cells = [estimate_text(score[k], percent=percent, between="\n") for k in ("original", "new")]
        _row(
            table, score["name"], *cells, estimate_text(score["difference"], percent=percent, signed=True, between="\n")
        )
    for name, key in (("bytes resident", "resident"), ("bytes at the peak", "peak")):
        if before[key] is not None and after[key] is not None:
            _row(table, name, bytes_text(before[key]), bytes_text(after[key]), share_text(after[key], before[key]))
    flops = before["flops"], after["flops"]
    _row(table, "FLOPs a position", *map(count_text, flops), share_text(flops[1], flops[0]))
    one, speed = judgement.get("latency_of_one"), judgement.get("predicted_speed")
    for name, found in (("latency of a batch", time), ("latency of a sample", one)):
        if found is not None:
            _row(table, name, *(seconds_text(found[k]) for k in ("original", "new")), f"{found['ratio']:.2f} times")
    if speed is not None:
        _row(table, "  as predicted", "", "", f"{speed:.2f} times")
    return table


def account_tables(account: Account) -> list[Any]:
    """Bytes and predicted damage of a plan, its forms, its worst sites, and what was left alone."""
    plan, unit = account.plan, account.unit
    head = Text.assemble(
        (f"{bytes_text(account.original_bytes)} → {bytes_text(plan.stored)}", "bold"),
        f" ({share_text(plan.stored, account.original_bytes)} of the original), predicted divergence ",
        (f"{number_text(plan.divergence)} {unit}", "bold"),
        f", {_measured(account)}plan {plan.name}"
        + _latency(plan)
        + (f", within {100 * plan.gap:.2g} % of the best" if plan.gap > 0.001 else ""),
    )
    forms = _table(
        "Bytes by form", "form", "sites", "weights", "bytes", "of the file", "bits a weight", f"{unit} alone"
    )
    for f in account.forms():
        sizes = bytes_text(f.stored), share_text(f.stored, plan.stored), f"{f.bits:.2f}"
        _row(forms, f.form, str(f.sites), count_text(f.weights), *sizes, number_text(f.divergence))
    worst = _table("Most damage", "site", "setting", "bytes", f"{unit} alone", "of all", left=2)
    alone = sum(c.divergence for c in plan.choices)  # sites interact, so the whole may be more
    for c in account.worst():
        if c.divergence > 0:
            cells = bytes_text(c.stored), number_text(c.divergence), share_text(c.divergence, alone)
            _row(worst, c.site, c.label, *cells)
    return [
        head,
        *_limit_line(account),
        *_activations_line(account),
        forms,
        *([worst] if worst.row_count else []),
        *_left_alone(account),
    ]


def _latency(plan: Plan) -> str:
    if plan.latency is None or plan.latency_share is None:
        return ""
    return f", {seconds_text(plan.latency)} a sample ({share_text(plan.latency_share, 1)})"


def _limit_line(account: Account) -> list[Any]:
    if account.limit is None:
        return []
    distance = (
        "" if account.times_limit is None else f"; distance to the limit: {times_text(account.times_limit)} times"
    )
    return [Text(f"Limit at these bytes: {number_text(account.limit)} {account.unit}{distance}")]


def _activations_line(account: Account) -> list[Any]:
    if account.activations is None:
        return []
    layers = account.activations["layers"].values()
    kept = ((sum(r["setting"][word] for r in layers), word) for word in ("shift", "dither"))
    extras = "".join(f", {word} kept at {many}" for many, word in kept if word in account.activations["asked"])
    alone = number_text(sum(r["divergence"] for r in layers))
    rounded = f"Inputs of {len(layers)} layers rounded ({account.activations['asked']}{extras}): "
    return [Text(f"{rounded}{alone} {account.unit} alone, in all")]


def _measured(account: Account) -> str:
    judged = account.judgement
    return "" if judged is None else f"measured {number_text(judged['divergence']['value'])}, "


def _left_alone(account: Account) -> list[Any]:
    share = share_text(account.untouched_bytes, account.plan.stored)
    known = account.reasons()
    rest = account.untouched_bytes - sum(size for *_, size in known)
    parts = [f"{bytes_text(size)} in {count} tensors, {why}" for why, count, size in known]
    reasons = "; ".join([*parts, f"{bytes_text(rest)} in buffers and the header"])
    lines: list[Any] = [
        Text.assemble(
            ("\nLeft untouched: ", "bold"), f"{bytes_text(account.untouched_bytes)}, {share} of the file ({reasons})"
        )
    ]
    kept = [c.site for c in account.plan.choices if c.form == UNTOUCHED]
    if kept:
        lines.append(Text.assemble(("Sites left as they are: ", "bold"), _named(kept)))
    if account.unused_sites:
        lines.append(
            Text.assemble(("Not used by the calibration data: ", "bold"), f"{_named(account.unused_sites)} (4 bits)")
        )
    return lines


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def study_table(facts: Mapping[str, Any]) -> Table:
    """What a study found."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    original, unit = facts["original_bytes"], facts["unit"]
    smallest = facts["smallest"]
    untouched = sum(row[2] for row in facts["untouched"])
    rows = [
        ("model", f"{facts['model']}, {bytes_text(original)}"),
        ("sites", f"{facts['sites']} with {count_text(facts['weights'])} weights, {bytes_text(facts['site_bytes'])}"),
        ("untouched", f"{bytes_text(untouched)}, {share_text(untouched, original)} of the original"),
        ("curves", f"{facts['candidates']:,} candidates of {', '.join(facts['forms'])} under {facts['metric']}"),
        (
            "smallest",
            f"{bytes_text(smallest['stored_bytes'])}, {share_text(smallest['stored_bytes'], original)} of the "
            f"original, {number_text(smallest['divergence'])} {unit} predicted",
        ),
        ("time", ", ".join(f"{step} {seconds_text(value)}" for step, value in facts["seconds"].items())),
    ]
    if (facts["certainty"] or {}).get("is_certain"):
        rows.append(
            ("caution", "the model is certain of all these data, so hardly any damage shows: give --check-data")
        )
    if facts["unused_sites"]:
        rows.append(("unused", f"{_named(facts['unused_sites'])}: the calibration data did not reach them"))
    rows += [(f"plan {p['name']}", _plan_line(p, original, unit)) for p in facts["plans"]]
    rows.append(("next", f"tersor front {facts['run']}"))
    for name, text in rows:
        table.add_row(Text(name, "bold"), Text(text))
    return table


def _plan_line(plan: Mapping[str, Any], original: int, unit: str) -> str:
    stored = plan["stored_bytes"]
    line = f"{bytes_text(stored)}, {share_text(stored, original)}, {number_text(plan['predicted'])} {unit} predicted"
    return line if plan["measured"] is None else f"{line}, {number_text(plan['measured'])} measured"


def front_table(points: Sequence[Point], unit: str) -> Table:
    """Points of the front, the smallest first, with the limit at the same bytes where there is one."""
    columns = "bytes", "of the original", "bits a weight", unit
    limits = ("the limit", "times the limit") if any(p.limit is not None for p in points) else ()
    table = _table("The front, as predicted", *columns, *limits, "weights by form", left=0)
    table.columns[-1].justify = "left"
    for p in points:
        forms = ", ".join(f"{form} {100 * share:.0f} %" for form, share in p.forms.items() if share >= 0.005)
        cells = bytes_text(p.stored), f"{100 * p.share:.3g} %", f"{p.bits:.2f}", number_text(p.divergence)
        least = (number_text(p.limit), times_text(p.times_limit)) if limits and p.limit is not None else ()
        _row(table, *cells, *least, forms)
    for column in table.columns[:-1]:  # a narrow terminal folds words, not numbers
        column.min_width = max((len(str(cell)) for cell in column.cells), default=0)
    return table


def ledger_table(rows: Sequence[tuple[str, float, float, float, float]], unit: str) -> Table:
    """Predicted and measured divergence of the worst sites, of (site, predicted, measured, low, high)."""
    ratios = sorted(value / predicted for _, predicted, value, *_ in rows if predicted > 0)
    title = f"{len(rows)} sites alone, in {unit}"
    if ratios:
        title += f"; the median of measured / predicted is {median(ratios):.2f}"
    table = _table(title, "site", "predicted", "measured", "ratio")
    for site, predicted, value, low, high in sorted(rows, key=lambda r: -r[2])[:SITES_SHOWN]:
        measured = estimate_text({"value": value, "low": low, "high": high})
        _row(table, site, number_text(predicted), measured, f"{value / predicted:.2f}" if predicted > 0 else "-")
    return table


def export_table(found: Exported) -> Table:
    """The bytes of an export beside those of the original and of the artifact, and how sites are held."""
    table = _table(f"Exported to {found.target}", "", "bytes on disk", "of the original")
    sizes = ("original", found.original_bytes), ("small", found.artifact_bytes), (found.target, found.exported_bytes)
    for name, size in sizes:
        _row(table, name, bytes_text(size), share_text(size, found.original_bytes))
    if found.packed:
        table.caption = f"{len(found.packed)} sites packed, {len(found.dense)} dense"
    return table


def verified_table(out: str, found: Sequence[Verified]) -> Table:
    """All that holds of an artifact."""
    table = _table(f"What holds of {escape(out)}", "", "found", left=2)
    for one in found:
        _row(table, one.name, one.found)
    return table


def methods_table(methods: Sequence[Mapping[str, Any]]) -> Table:
    """All methods, a line each."""
    table = _table(f"{len(methods)} methods", "method", "paper", "form", "metric", "allocation", "title", left=6)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for m in methods:
        words = m["name"], ", ".join(m["papers"]), m["form"], m["metric"], m["allocation"]
        table.add_row(*map(Text, words), Text(m["title"], no_wrap=True, overflow="ellipsis"))
    return table


def forms_table(forms: Sequence[Mapping[str, Any]]) -> Table:
    """All forms, a line each; those that a study draws unless told otherwise are marked."""
    table = _table(f"{len(forms)} forms, * drawn by default", "form", "stores", "wins", left=3)
    table.columns[0].no_wrap = True
    for f in forms:
        table.add_row(Text(f["name"] + (" *" if f["by_default"] else "")), Text(f["stores"]), Text(f["wins"]))
    return table


def runs_table(runs: Sequence[Listed], now: float) -> Table:
    """Run folders, a line each, with their ages at `now`."""
    table = _table(f"{len(runs)} run folders", "folder", "model", "state", "plans", "changed", "bytes", left=3)
    for run in runs:
        state = run.state if run.worker is None else f"{run.state}, {run.worker.lower()} at work"
        _row(
            table, str(run.folder), run.model, state, str(run.plans), age_text(now - run.changed), bytes_text(run.size)
        )
    return table


def record_table(record: Mapping[str, Any]) -> Table:
    """Everything about one method or form."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in record.items():
        if value:
            text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else value
            text = ", ".join(f"{k} {_values(v)}" for k, v in text.items()) if isinstance(text, Mapping) else text
            table.add_row(Text(name.replace("_", " "), "bold"), Text(str(text)))
    return table


def _values(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
