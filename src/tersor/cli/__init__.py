"""The shell: `tersor` and its commands, one file a command."""

from __future__ import annotations

import typer

from tersor.cli.build import EXAMPLE as BUILD
from tersor.cli.build import build
from tersor.cli.compress import EXAMPLE as COMPRESS
from tersor.cli.compress import compress
from tersor.cli.console import guarded
from tersor.cli.export import EXAMPLE as EXPORT
from tersor.cli.export import export
from tersor.cli.forms import EXAMPLE as FORMS
from tersor.cli.forms import forms
from tersor.cli.front import EXAMPLE as FRONT
from tersor.cli.front import front
from tersor.cli.judge import EXAMPLE as JUDGE
from tersor.cli.judge import judge
from tersor.cli.methods import EXAMPLE as METHODS
from tersor.cli.methods import methods
from tersor.cli.plan import EXAMPLE as PLAN
from tersor.cli.plan import plan
from tersor.cli.report import EXAMPLE as REPORT
from tersor.cli.report import report
from tersor.cli.runs import CLEAN_EXAMPLE as CLEAN
from tersor.cli.runs import EXAMPLE as RUNS
from tersor.cli.runs import ListedByDefault, clean, runs
from tersor.cli.show import EXAMPLE as SHOW
from tersor.cli.show import show
from tersor.cli.study import EXAMPLE as STUDY
from tersor.cli.study import study
from tersor.cli.verify import EXAMPLE as VERIFY
from tersor.cli.verify import verify

COMMANDS = (
    (compress, COMPRESS),
    (study, STUDY),
    (front, FRONT),
    (plan, PLAN),
    (build, BUILD),
    (judge, JUDGE),
    (verify, VERIFY),
    (export, EXPORT),
    (show, SHOW),
    (report, REPORT),
    (methods, METHODS),
    (forms, FORMS),
)


def _epilog(example: str) -> str:
    return f"Example:\n\n{example}"


settings = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="tersor",
    help="Make a trained network smaller within a budget, and say what that costs.",
    epilog=_epilog(COMPRESS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=settings,
)
for command, example in COMMANDS:
    app.command(epilog=_epilog(example), context_settings=settings)(guarded(command))
folders = typer.Typer(cls=ListedByDefault, help="List run folders, or remove some.", context_settings=settings)
folders.command("list", epilog=_epilog(RUNS), context_settings=settings)(guarded(runs))
folders.command("clean", epilog=_epilog(CLEAN), context_settings=settings)(guarded(clean))
app.add_typer(folders, name="runs", epilog=_epilog(f"{RUNS}\n\n{CLEAN}"))


def main() -> None:
    """The entry point of the command `tersor`."""
    app()


__all__ = ["COMMANDS", "app", "main"]
