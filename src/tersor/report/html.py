"""One page of HTML about a run that needs no network and no other file: Plotly itself is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tersor import __version__
from tersor.build.layout import Layout
from tersor.curves.limit import Limit
from tersor.errors import TersorError
from tersor.models.files import write_text
from tersor.observe.store import captured_share, file_of
from tersor.report.account import Account, account_of_run, plan_to_show, study_facts
from tersor.report.quantities import (
    PERCENTAGES,
    bytes_text,
    count_text,
    estimate_text,
    number_text,
    share_text,
    times_text,
)
from tersor.run import Run
from tersor.steps import limit_of, plan_named, planner_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2f33; margin: 0 auto; max-width: 1020px; padding: 24px 20px }
h1 { font-size: 26px; margin: 8px 0 2px }
h2 { font-size: 19px; margin: 44px 0 2px; border-top: 1px solid #e3e6e9; padding-top: 18px }
p { margin: 4px 0 10px; color: #555c63; max-width: 780px }
.key { display: flex; gap: 36px; flex-wrap: wrap; margin: 18px 0 }
.key b { display: block; font-size: 24px; font-weight: 600 }
.key span { color: #6b737b; font-size: 13px }
table { border-collapse: collapse; margin: 10px 0; font-size: 13.5px; display: block; overflow-x: auto }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid #eceef0; text-align: right; white-space: nowrap }
th { font-weight: 600; color: #6b737b }
td { font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
tr.chosen td { font-weight: 600 }
footer { margin: 50px 0; color: #8a929a; font-size: 13px }
"""
LIMIT_WORDS = (
    "Dashed: the limit, the least divergence that could be predicted of any code of as many bytes if the weights of "
    "every site were independent Gaussians; weights that are not (sparse, clustered, of low rank) can lie below it."
)


def write_report(run: Run, out: Path) -> None:
    """Write the page of a run to `out`; raises TersorError where Plotly is not installed."""
    try:
        import plotly.offline
    except ImportError as error:
        raise TersorError("The report needs Plotly; install it with: pip install 'tersor[report]'.") from error
    if not out.parent.is_dir():
        raise TersorError(f"The folder {out.parent} of the report does not exist.")
    facts = study_facts(run)
    limit = limit_of(run)
    accounts = [account_of_run(run, name, limit) for name in run.plans()]
    shown = next((a for a in accounts if a.plan.name == plan_to_show(run)), None) if accounts else None
    body = [
        _head(facts, shown),
        *_sections(run, facts, accounts, shown, limit),
        f"<footer>Tersor {__version__}</footer>",
    ]
    title = escape(f"Tersor: {Path(facts['model']).name}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<script>{plotly.offline.get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>"
    )
    write_text(out, page)


def _head(facts: Mapping[str, Any], shown: Account | None) -> str:
    original, unit = facts["original_bytes"], facts["unit"]
    head = f"<h1>{escape(Path(facts['model']).name)}</h1><p>{facts['sites']} sites with {count_text(facts['weights'])} "
    head += f"weights; {facts['candidates']:,} candidates of {escape(', '.join(facts['forms']))} under the "
    head += f"{escape(facts['metric'])} metric.</p>"
    if shown is None:
        return head + _keys([(bytes_text(original), "bytes of the original")])
    judged = shown.judgement
    keys = [
        (f"{bytes_text(original)} → {bytes_text(shown.plan.stored)}", f"on disk, plan {shown.plan.name}"),
        (share_text(shown.plan.stored, original), "of the original"),
        (number_text(shown.plan.divergence), f"{unit} predicted"),
    ]
    if judged is not None:
        keys.append((estimate_text(judged["divergence"]), f"{unit} measured on held-out data"))
    return head + _keys(keys)


def _keys(items: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="key">'
        + "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in items)
        + "</div>"
    )


def _sections(
    run: Run, facts: Mapping[str, Any], accounts: Sequence[Account], shown: Account | None, limit: Limit | None
) -> list[str]:
    from tersor.report import figures

    ledger, unit, original = run.ledger(), facts["unit"], facts["original_bytes"]
    plans = [plan_named(run, name) for name in run.plans()]
    front = figures.front_figure(planner_of(run).front(), plans, ledger, original, unit, limit)
    words = "The least predicted divergence at every size, with the plans made so far."
    out = [_section("The front", words if limit is None else f"{words} {LIMIT_WORDS}", front)]
    if shown is not None:
        out += [
            _section("Plans", "The plan in bold is the one shown below.", _plans_table(accounts, shown, original)),
            _section("Where the bytes went", "By plan and form.", figures.plans_figure(accounts)),
            _section("", f"By site, plan {shown.plan.name}, in the order of the model.", figures.sites_figure(shown)),
            _section(
                "Damage by site",
                f"Predicted for every site alone, plan {shown.plan.name}; diamonds: measured (tersor judge --sites).",
                figures.damage_figure(shown, ledger),
            ),
        ]
    gains = run.facts("gain/")
    out.append(
        _section(
            "Predicted against measured",
            "A probe of every site on calibration data held back, before its gain; sites and plans on held-out data.",
            figures.ledger_figure(gains, ledger, unit),
        )
    )
    out += _damping(run.get("damping_evidence", []), facts["damping"])
    shares = _captured(run)
    if shares:
        words = "How much of the Fisher matrix of a site the product of its two moments captures (a cosine)."
        out.append(_section("Captured share", words, figures.shares_figure(shares)))
    out.append(_section("Time", "Seconds by step.", figures.seconds_figure(_seconds(run, facts["seconds"]))))
    return out


def _section(title: str, words: str, content: Any) -> str:
    shown = content
    if not isinstance(content, str):
        shown = content.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    return (f"<h2>{escape(title)}</h2>" if title else "") + f"<p>{escape(words)}</p>{shown}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], chosen: int | None = None) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = (
        f"<tr{' class=chosen' if number == chosen else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _plans_table(accounts: Sequence[Account], shown: Account, original: int) -> str:
    limits = ["the limit", "times the limit"] if any(a.limit is not None for a in accounts) else []
    names = list(dict.fromkeys(s["name"] for a in accounts if a.judgement for s in a.judgement["scores"]))
    rows = []
    for a in accounts:
        judged = a.judgement
        scores = {s["name"]: s for s in judged["scores"]} if judged else {}
        rows.append(
            [
                a.plan.name,
                bytes_text(a.plan.stored),
                share_text(a.plan.stored, original),
                number_text(a.plan.divergence),
                *([number_text(a.limit or math.nan), times_text(a.times_limit)] if limits else []),
                estimate_text(judged["divergence"]) if judged else "",
                *(_score_text(scores.get(name)) for name in names),
                f"{judged['latency']['ratio']:.2f}" if judged and judged["latency"] else "",
            ]
        )
    columns = ["plan", "bytes", "share", f"{shown.unit} predicted", *limits, "measured", *names, "latency ratio"]
    return _table(columns, rows, next(i for i, a in enumerate(accounts) if a is shown))


def _score_text(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    percent = score["name"] in PERCENTAGES
    text = estimate_text(score["new"], percent=percent)
    before = score["original"]
    return text if before is None else f"{text} from {estimate_text(before, percent=percent).split(' [')[0]}"


def _damping(evidence: Sequence[Mapping[str, Any]], chosen: Mapping[str, float]) -> list[str]:
    """The evidence for the damping as a figure and as a table."""
    if not evidence:
        words = "<p>The damping was given, so there is no evidence.</p>"
        return [_section("Damping", _damping_words(chosen), words)]
    from tersor.report.figures import damping_figure

    words = (
        f"{_damping_words(chosen)} Far above 1, a fit hid its error in directions that the fitted part saw little of."
    )
    return [_section("Damping", words, damping_figure(evidence, chosen)), _damping_table(evidence)]


def _damping_words(damping: Mapping[str, float] | None) -> str:
    chosen = ", ".join(f"{name} {value:g}" for name, value in (damping or {}).items())
    return f"Chosen: {chosen}. A few sites were fitted under each damping and judged on calibration data held back."


def _damping_table(evidence: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            "tables" if e["table"] else "others",
            *(f"{e[k]:g}" for k in ("inputs", "gradients", "frequencies")),
            number_text(e["fitted"]),
            number_text(e["held_back"]),
            f"{e['held_back'] / e['fitted']:.2f}" if e["fitted"] > 0 else "-",
        ]
        for e in evidence
    ]
    columns = ("sites", "inputs", "gradients", "frequencies", "on the fitted part", "held back", "held back / fitted")
    return _table(columns, rows)


def _captured(run: Run) -> dict[str, float]:
    sites = Layout.from_json(run.get("layout")).sites
    shares = {s.name: captured_share(run, s) for s in sites if run.has_tensors(file_of(s, "fit"))}
    return {name: share for name, share in shares.items() if math.isfinite(share)}


def _seconds(run: Run, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every step, and of the curves of every form, which ran side by side."""
    forms = {f"draw: {form} (all processes)": value for form, value in run.seconds_by_form().items()}
    out: dict[str, float] = {}
    for step, value in seconds.items():
        out[step] = value
        if step == "draw":
            out |= forms
    return out
