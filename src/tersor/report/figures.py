"""The figures of the report, as Plotly figures made of a run's values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tersor.curves.limit import Limit
from tersor.forms import FORMS
from tersor.plan import UNTOUCHED, Plan
from tersor.report.account import Account
from tersor.report.quantities import bytes_text, number_text, seconds_text, share_text

COLOURS = (
    "#2f6f9f", "#d9822b", "#4f9d69", "#8e5ea2", "#c0504d", "#7a8b99", "#b59f3b", "#3fa7a3",
    "#9fc3de", "#f2bf85", "#a5d3b3", "#c9aed4", "#e39d99", "#4a5560", "#7d6b1f", "#1f6b68",
)  # fmt: skip
GREY, INK = "#b8bfc6", "#2b2f33"
Ledger = Sequence[tuple[str, str, float, float, float, float]]


def colours_of(forms: Iterable[str]) -> dict[str, str]:
    """A colour a form, the same in every figure; what is untouched is grey."""
    names = sorted({*FORMS, *forms} - {UNTOUCHED, "everything else"})
    found = {form: COLOURS[number % len(COLOURS)] for number, form in enumerate(names)}
    return {**found, UNTOUCHED: GREY, "everything else": "#dfe3e6"}


def _figure(x: str, y: str, height: int = 420, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "traceorder": "normal", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis_title=x,
        yaxis_title=y,
        **layout,
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def front_figure(
    front: Sequence[tuple[int, float]],
    plans: Sequence[Plan],
    ledger: Ledger,
    original: int,
    unit: str,
    limit: Limit | None = None,
) -> go.Figure:
    """The front with the plans on it, what was measured of them, and the limit below."""
    figure = _figure("bytes on disk", f"divergence ({unit})")
    figure.update_xaxes(type="log", tickformat="~s", ticksuffix="B", dtick="D2")
    figure.update_yaxes(type="log", exponentformat="power")
    points = [(size, damage) for size, damage in front if damage > 0]
    figure.add_scatter(
        x=[p[0] for p in points],
        y=[p[1] for p in points],
        mode="lines",
        name="front, as predicted",
        line={"color": COLOURS[0], "width": 2},
        text=[f"{bytes_text(s)}, {share_text(s, original)}<br>{number_text(d)} {unit}" for s, d in points],
        hoverinfo="text",
    )
    if limit is not None and points:
        _limit(figure, limit, points, unit)
    known = [p for p in plans if p.divergence > 0]
    figure.add_scatter(
        x=[p.stored for p in known],
        y=[p.divergence for p in known],
        mode="markers+text",
        name="plans, as predicted",
        text=[p.name for p in known],
        textposition="top right",
        marker={"size": 9, "color": COLOURS[0]},
        hovertext=[f"{p.name}: {bytes_text(p.stored)}, {number_text(p.divergence)} {unit}" for p in known],
        hoverinfo="text",
    )
    sizes = {p.name: p.stored for p in plans}
    measured = [row for row in ledger if row[1] == "*" and row[0] in sizes and row[3] > 0]
    if measured:
        _measured(figure, [sizes[row[0]] for row in measured], measured, "measured on held-out data", unit)
    return figure


def _limit(figure: go.Figure, limit: Limit, front: Sequence[tuple[int, float]], unit: str) -> None:
    """The limit over the sizes of a front, down to a hundredth of its least divergence."""
    least = min(divergence for _, divergence in front) / 100
    shown = [p for p in limit.front(80, front[0][0], front[-1][0]) if p[1] >= least]
    figure.add_scatter(
        x=[p[0] for p in shown],
        y=[p[1] for p in shown],
        mode="lines",
        name="the limit",
        line={"color": INK, "width": 1.5, "dash": "dash"},
        text=[f"the limit at {bytes_text(s)}<br>{number_text(d)} {unit}" for s, d in shown],
        hoverinfo="text",
    )


def _measured(figure: go.Figure, x: Sequence[Any], rows: Ledger, name: str, unit: str) -> None:
    """Measured values with their intervals, at `x`."""
    figure.add_scatter(
        x=x,
        y=[row[3] for row in rows],
        mode="markers",
        name=name,
        marker={"size": 10, "color": COLOURS[1], "symbol": "diamond"},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [row[5] - row[3] for row in rows],
            "arrayminus": [row[3] - row[4] for row in rows],
            "color": COLOURS[1],
        },
        text=[f"{row[0] if row[1] == '*' else row[1]}: {number_text(row[3])} {unit}" for row in rows],
        hoverinfo="text",
    )


def plans_figure(accounts: Sequence[Account]) -> go.Figure:
    """The bytes of every plan, a stacked bar each."""
    figure = _figure("bytes on disk", "", height=110 + 34 * len(accounts), barmode="stack")
    figure.update_xaxes(tickformat="~s", ticksuffix="B")
    figure.update_yaxes(autorange="reversed", type="category")
    forms = dict.fromkeys(f.form for a in accounts for f in a.forms())
    colours = colours_of(forms)
    for form in [*sorted(forms, key=lambda f: f == UNTOUCHED), "everything else"]:
        sizes = [
            sum(f.stored for f in a.forms() if f.form == form)
            if form != "everything else"
            else a.plan.stored - sum(c.stored for c in a.plan.choices)
            for a in accounts
        ]
        _bars(figure, sizes, [a.plan.name for a in accounts], form, colours[form], [bytes_text(s) for s in sizes])
    return figure


def _bars(figure: go.Figure, x: Sequence[float], y: Sequence[str], name: str, colour: str, text: Sequence[str]) -> None:
    figure.add_bar(
        x=x,
        y=y,
        orientation="h",
        name=name,
        marker_color=colour,
        hovertext=[f"{site}<br>{name}: {t}" for site, t in zip(y, text, strict=True)],
        hoverinfo="text",
    )


def sites_figure(account: Account) -> go.Figure:
    """The bytes of every site of a plan, coloured by form, in the order of the model."""
    choices = account.plan.choices
    figure = _site_bars("bytes in the file", len(choices))
    figure.update_xaxes(tickformat="~s", ticksuffix="B")
    colours = colours_of(c.form for c in choices)
    for form in dict.fromkeys(c.form for c in choices):
        mine = [c for c in choices if c.form == form]
        text = [f"{c.label}, {bytes_text(c.stored)}, {8 * c.stored / account.weights[c.site]:.2f} bits" for c in mine]
        _bars(figure, [c.stored for c in mine], [c.site for c in mine], form, colours[form], text)
    return _ordered(figure, [c.site for c in choices])


def damage_figure(account: Account, ledger: Ledger) -> go.Figure:
    """The predicted damage of every site of a plan, coloured by form, with what was measured of sites alone."""
    choices = [c for c in account.plan.choices if c.divergence > 0]
    figure = _site_bars(f"divergence ({account.unit})", len(choices))
    colours = colours_of(c.form for c in account.plan.choices)
    for form in dict.fromkeys(c.form for c in choices):
        mine = [c for c in choices if c.form == form]
        text = [f"{c.label}, {number_text(c.divergence)} {account.unit}" for c in mine]
        _bars(figure, [c.divergence for c in mine], [c.site for c in mine], form, colours[form], text)
    sites = {c.site for c in choices}
    alone = [row for row in ledger if row[0] == account.plan.name and row[1] in sites]
    if alone:
        figure.add_scatter(
            x=[row[3] for row in alone],
            y=[row[1] for row in alone],
            mode="markers",
            name="measured alone",
            marker={"color": INK, "symbol": "diamond", "size": 7},
        )
    return _ordered(figure, [c.site for c in choices])


def _site_bars(x: str, count: int) -> go.Figure:
    figure = _figure(x, "", height=130 + 17 * max(count, 3), barmode="stack", bargap=0.25)
    figure.update_yaxes(type="category", tickfont={"size": 11}, dtick=1)
    return figure


def _ordered(figure: go.Figure, sites: Sequence[str]) -> go.Figure:
    figure.update_yaxes(categoryorder="array", categoryarray=list(sites), autorange="reversed")
    return figure


def ledger_figure(gains: Mapping[str, Mapping[str, float]], ledger: Ledger, unit: str) -> go.Figure:
    """Predicted against measured: the probe of every site before its gain, sites alone, and whole plans."""
    figure = _figure(f"predicted ({unit})", f"measured ({unit})", height=480)
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    known = [(name, gain.get("predicted", 0.0), gain.get("measured", 0.0)) for name, gain in gains.items()]
    probes = [row for row in known if row[1] > 0 and row[2] > 0]
    alone = [(row[1], row[2], row[3]) for row in ledger if row[1] != "*" and row[2] > 0 and row[3] > 0]
    whole = [row for row in ledger if row[1] == "*" and row[2] > 0 and row[3] > 0]
    values = [v for _, a, b in probes + alone for v in (a, b)] + [v for row in whole for v in row[2:4]]
    if values:
        ends = [10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", name="equal", line={"color": GREY, "dash": "dot"}, hoverinfo="skip"
        )
    for points, name, colour in ((probes, "probe of a site, before its gain", GREY), (alone, "site alone", COLOURS[0])):
        if points:
            figure.add_scatter(
                x=[p[1] for p in points],
                y=[p[2] for p in points],
                mode="markers",
                name=name,
                marker={"color": colour, "size": 7, "line": {"width": 1, "color": "#7a8b99"}},
                text=[f"{n}<br>measured / predicted {b / a:.2f}" for n, a, b in points],
                hoverinfo="text",
            )
    if whole:
        _measured(figure, [row[2] for row in whole], whole, "whole plan", unit)
    return figure


def damping_figure(evidence: Sequence[Mapping[str, Any]], chosen: Mapping[str, float]) -> go.Figure:
    """Held back over fitted against every damping, the others fixed; a diamond marks the one chosen."""
    figure = _figure("damping", "held back / fitted", height=320)
    figure.update_xaxes(type="log", tickvals=sorted({e[name] for e in evidence for name in chosen}))
    for number, name in enumerate(chosen):
        sweep = [e for e in _sweep(evidence, name) if e["fitted"] > 0]
        if not sweep:
            continue
        figure.add_scatter(
            x=[e[name] for e in sweep],
            y=[e["held_back"] / e["fitted"] for e in sweep],
            mode="lines+markers",
            name=name,
            line={"color": COLOURS[number]},
            marker={
                "size": [12 if e[name] == chosen[name] else 6 for e in sweep],
                "symbol": ["diamond" if e[name] == chosen[name] else "circle" for e in sweep],
            },
            text=[
                f"{name} {e[name]:g}<br>held back {number_text(e['held_back'])}, fitted {number_text(e['fitted'])}"
                for e in sweep
            ],
            hoverinfo="text",
        )
    return figure


def _sweep(evidence: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The evidence in which one damping ran and the others stood: most of it by their values, sorted, each value once.

    `frequencies` are those of tables, the other two are of all other sites.
    """

    def others(e: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(e[k] for k in ("inputs", "gradients", "frequencies") if k != name)

    members = [e for e in evidence if e["table"] == (name == "frequencies")]
    common = Counter(others(e) for e in members).most_common(1)
    by_value = {e[name]: e for e in members if others(e) == common[0][0]}
    return [by_value[value] for value in sorted(by_value)]


def shares_figure(shares: Mapping[str, float]) -> go.Figure:
    """How much of the Fisher matrix of every site its Kronecker product captures."""
    figure = _site_bars("captured share", len(shares))
    figure.update_layout(showlegend=False)
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    _bars(
        figure,
        list(shares.values()),
        list(shares),
        "captured",
        COLOURS[2],
        [f"{100 * s:.0f} %" for s in shares.values()],
    )
    return _ordered(figure, list(shares))


def seconds_figure(seconds: Mapping[str, float]) -> go.Figure:
    """Seconds spent by step."""
    figure = _figure("seconds", "", height=110 + 28 * len(seconds))
    figure.update_layout(showlegend=False)
    figure.update_yaxes(autorange="reversed", type="category")
    text = [seconds_text(s) for s in seconds.values()]
    _bars(figure, list(seconds.values()), list(seconds), "time", COLOURS[0], text)
    return figure
