"""`tersor front`: what every size would cost, from a run alone."""

from __future__ import annotations

from dataclasses import asdict

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor front demo/small.run"


def front(run: o.RunFolder, forms: o.Forms = None, as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Show the front of a study: what every size is predicted to cost."""
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor.report.account import study_facts
        from tersor.report.front import front_points
        from tersor.report.tables import front_table
        from tersor.steps import limit_of, open_run, planner_of

        opened = open_run(run)
        progress("plan", "the front", 0, 0)
        planner = planner_of(opened, o.names_of(forms))
        points = front_points(planner, opened.get("stored_bytes"), limit=limit_of(opened))
    facts = study_facts(opened)
    value = {"unit": facts["unit"], "original_bytes": facts["original_bytes"], "front": [asdict(p) for p in points]}
    give(value, front_table(points, facts["unit"]), as_json=as_json, quiet=quiet)
