"""`tersor plan`: the best plan of a study under a budget, from a run alone."""

from __future__ import annotations

from tersor.cli import options as o
from tersor.cli.console import give, progress_shown

EXAMPLE = "tersor plan demo/small.run --budget 10%"


def plan(
    run: o.RunFolder,
    budget: o.Budget = None,
    divergence: o.DivergenceLimit = None,
    memory_budget: o.MemoryBudget = None,
    flops_budget: o.FlopsBudget = None,
    latency_budget: o.LatencyBudget = None,
    forms: o.Forms = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Choose a form and setting for every site within a budget, and keep the plan in the run under its name."""
    with progress_shown(as_json=as_json, quiet=quiet) as progress:
        from tersor.steps import open_run, plan_run

        opened = open_run(run)
        progress("plan", "", 0, 0)
        limits = o.given(
            memory_budget=memory_budget,
            flops_budget=flops_budget,
            latency_budget=latency_budget,
            divergence=divergence,
        )
        made = plan_run(opened, budget, forms=o.names_of(forms), **limits)
    from tersor.report.account import account_of_run
    from tersor.report.tables import account_tables

    account = account_of_run(opened, made.name)
    give(account.as_json(), *account_tables(account), as_json=as_json, quiet=quiet)
