"""What goes into the weights file of an artifact, tensor by tensor: from the module as built, or from the run.

A module whose weights are read on demand is not changed by a build: its operators are those that the run keeps, the
rest is read from its own files, and memory holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from tersor.build.fits import Fit, load_fit, stored_fit
from tersor.build.layout import Layout, distinct_state
from tersor.models.ondemand import is_on_demand, values_of
from tersor.models.sites import Site
from tersor.plan import Choice
from tersor.run import Run


class StoredFits(Mapping[str, Fit]):
    """The fits of some choices by site, each read from the run when it is asked for."""

    def __init__(self, run: Run, sites: Sequence[Site], chosen: Mapping[str, Choice]) -> None:
        self._run, self._chosen = run, chosen
        self._sites = {site.name: site for site in sites if site.name in chosen}

    def __getitem__(self, name: str) -> Fit:
        return load_fit(self._run, self._sites[name], self._chosen[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def contents_of(module: nn.Module, run: Run, layout: Layout, planned: Sequence[Choice]) -> Callable[[str], Tensor]:
    """The tensors of the file by name; fits are found by the choices as they were `planned`."""
    state = distinct_state(module)
    if not is_on_demand(module):
        return state.__getitem__
    of_fits = {f"{prefix}.": (choice, number) for prefix, choice, number in layout.operators(planned)}
    parameters = dict(module.named_parameters())

    def tensor_of(name: str) -> Tensor:
        for prefix, (choice, number) in of_fits.items():
            if name.startswith(prefix):
                return stored_fit(run, choice)[f"{number}|{name.removeprefix(prefix)}"]
        return values_of(parameters[name]) if name in parameters else state[name]

    return tensor_of
