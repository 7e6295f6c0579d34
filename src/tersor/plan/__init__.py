"""Budgets, the solver, plans."""

from tersor.plan.budget import Limits, parse_bytes, parse_limits, parse_shard_size
from tersor.plan.latency import Latencies
from tersor.plan.plan import PLAN, UNTOUCHED, Choice, Interaction, Plan, Planner, fixed_bytes
from tersor.plan.solve import Option, Solution, front, hull, solve

__all__ = [
    "PLAN",
    "UNTOUCHED",
    "Choice",
    "Interaction",
    "Latencies",
    "Limits",
    "Option",
    "Plan",
    "Planner",
    "Solution",
    "fixed_bytes",
    "front",
    "hull",
    "parse_bytes",
    "parse_limits",
    "parse_shard_size",
    "solve",
]
