"""The errors a user may meet.

Every error of Tersor is a `TersorError` whose message is one sentence: what was wrong, where, and what to do.
The command line prints that sentence and exits with status 2; from Python it is raised as it is.
"""


class TersorError(Exception):
    """Something the user can put right: a file, a site, an option or a budget."""


class UnreachableBudget(TersorError):
    """No plan fits within the limits; the message names the smallest reachable size."""
