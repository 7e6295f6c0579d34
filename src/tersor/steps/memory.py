"""What fits into memory: how many processes at once, and under a limit how many samples a batch may have.

What units of work take was measured and is rounded up; what a model makes of a token is reckoned from the widths of its
sites. A limit that the largest site alone does not allow is refused at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tersor.errors import TersorError
from tersor.models import Batch, Site
from tersor.models.model import size_of
from tersor.models.sites import block_of
from tersor.observe.collector import LARGEST_MOMENT
from tersor.plan.budget import parse_size

PROCESS = 512 << 20  # of a process with its libraries and kernels
FITTING = 32  # times a weight in 32 bits, while it is fitted
INTEGERS, BY_ROWS = 12, 4  # for those that are STRIPPED: at once, or some rows at a time
MOMENTS = 9  # times its moments, with their factors in 64 bits
STRIPPED = ("int", "portable")  # forms that take less, and are fitted by rows where these do not feel one another
LOGITS = 6  # times the outputs of a model, while they are compared or probed
MODELS = 2  # that are judged together: what lies around their blocks stays in memory
ACTIVATIONS = 2  # times what goes through the weights of a block; gradients as much again
OBSERVING = 0.5  # of the memory of this machine, which observing in several processes may take
WORTH = 1e11  # numbers in the data times weights: less is observed before a process has started


@dataclass(frozen=True)
class Memory:
    """So many bytes for a command and all of its workers."""

    limit: int

    @classmethod
    def of(cls, text: str) -> Memory:
        """A number with a unit, such as `6GB`."""
        return cls(parse_size(text, "memory"))

    def workers(self, sites: Sequence[Site], asked: int | None, forms: Iterable[str], metric: str) -> int:
        """The most processes, of those asked for, that fit the largest sites at once in these forms.

        Raises TersorError where the limit is too small for one.
        """
        are_integers = set(forms) <= set(STRIPPED)

        def unit_of(site: Site) -> int:
            """Bytes that fitting a site takes, one matrix of its stack at a time."""
            apart = metric not in ("output", "kronecker") or site.kind == "table" or site.shape[0] > LARGEST_MOMENT
            times = (BY_ROWS if apart else INTEGERS) if are_integers else FITTING
            return 4 * site.parameters + times * 4 * site.shape[0] * site.shape[1] + MOMENTS * _moments(site)

        given, unit = max(map(_given, sites)), max(map(unit_of, sites))
        if PROCESS + unit > self.limit:
            most = max(sites, key=unit_of)
            raise TersorError(
                f"--memory allows {self.limit / 1e9:.1f} GB, but fitting {most.name} takes up to "
                f"{(PROCESS + unit) / 1e9:.1f} GB."
            )
        number = asked or os.cpu_count() or 1
        while number > 1 and PROCESS + 2 * (number + 1) * given + number * (PROCESS + unit) > self.limit:
            number -= 1
        return number

    def batch_size(self, sites: Sequence[Site], asked: int, sequence_length: int, gradients: bool) -> int:
        """The most samples of so many tokens in a batch, of those asked for, beside the weights of a block."""
        block = max(sum(s.shape[0] + s.shape[1] for s in part) for part in _blocks(sites))
        weights = max(sum(4 * s.parameters for s in part) for part in _blocks(sites))
        weights += MODELS * sum(4 * s.parameters for s in sites if not _is_in_block(s))
        summaries = max(sum(_moments(s) for s in part) for part in _blocks(sites)) * (3 if gradients else 1)
        widest = max(s.shape[0] for s in sites)
        token = 4 * (ACTIVATIONS * (2 if gradients else 1) * block + LOGITS * widest)
        left = self.limit - PROCESS - weights - summaries
        fitting = int(left // (token * sequence_length))
        if fitting < 1:
            raise TersorError(
                f"--memory allows {self.limit / 1e9:.1f} GB, but a block of this model takes "
                f"{(self.limit - left + token * sequence_length) / 1e9:.1f} GB for one sample."
            )
        return min(asked, fitting)


def observers(sites: Sequence[Site], batches: Sequence[Batch], asked: int | None, gradients: bool) -> int | None:
    """The workers to observe with, of those asked for; None where two do not fit, whatever was asked.

    A worker has the model, as it came and opened, and its summaries, as they are, sent, and waiting for their turn; the
    process in charge has their sum, twice while it grows.
    """
    weights = sum(4 * site.parameters for site in sites)
    summaries = sum(site.stack * _moments(site) for site in sites) * (1.5 if gradients else 0.5)
    fitting = int((OBSERVING * _memory_of_machine() - 2 * summaries) // (2 * weights + 3 * summaries))
    if fitting < 2:
        return None
    if sum(map(size_of, batches)) * weights / 4 < WORTH:
        return 1
    return min(asked or os.cpu_count() or 1, fitting)


def _memory_of_machine() -> int:
    """Bytes of physical memory; none where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _moments(site: Site) -> int:
    """Bytes of the two moments of a site."""
    return sum(4 * n * (n if n <= LARGEST_MOMENT else 1) for n in site.shape)


def _given(site: Site) -> int:
    """Bytes of a weight with its metric."""
    return 4 * site.parameters + _moments(site)


def _is_in_block(site: Site) -> bool:
    return any(part.isdigit() for part in site.name.split("."))


def _blocks(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of every block; each of the others is a block of its own."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(block_of(site.name), []).append(site)
    return list(found.values())
