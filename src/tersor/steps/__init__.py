"""The steps, as a user calls them from Python or from the shell: study, plan, build, judge, and compress, all in one.

Each step reads what the step before left in the run folder and does nothing that stands there already.
"""

from tersor.judge.artifact import adopt, judge_artifact, judge_sites
from tersor.plan import UNTOUCHED
from tersor.steps.compressing import Result, build_plan, compress
from tersor.steps.opening import (
    Study,
    limit_of,
    open_run,
    open_study,
    plan_name,
    plan_named,
    plan_run,
    planner_of,
    reopen,
)
from tersor.steps.studying import study

__all__ = [
    "UNTOUCHED",
    "Result",
    "Study",
    "adopt",
    "build_plan",
    "compress",
    "judge_artifact",
    "judge_sites",
    "limit_of",
    "open_run",
    "open_study",
    "plan_name",
    "plan_named",
    "plan_run",
    "planner_of",
    "reopen",
    "study",
]
