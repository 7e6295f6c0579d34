"""Running only what a model computes from a site on, where nothing before the site has changed.

A change at one site leaves all that was computed before it as it was. Of a chain of blocks (a `ModuleList`, a
`Sequential`) that run one after another, those that are done before the site hand on what they gave the first time.
Only the last of them need know what that was: the others hand on NaN, which nothing may read. Whether a model is so,
one batch shows before it is relied on; where it is not, all of the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.models.sites import Site

CLOSE = 1e-3  # of the norm of an output: sums may be taken in another order, and what is lost is NaN
Run = Callable[[int], Tensor]


class Enough(Exception):
    """All that was asked for is recorded."""


class Prefix:
    """What lies before a site, for a module that `run(number)` puts through batch `number` of `count`.

    Holds the outputs of one block a chain for all batches, and of one place in the model at a time.
    """

    def __init__(self, module: nn.Module, run: Run, count: int) -> None:
        self._module, self._run, self._count = module, run, count
        self._outputs: dict[str, list[Any]] = {}  # of the last block done of every chain, batch by batch
        self._skipped: tuple[str, ...] = ()  # all blocks that are done
        self._refused: set[tuple[str, ...]] = set()

    @contextmanager
    def skipped(self, site: Site, expected: Tensor) -> Iterator[Callable[[int], None]]:
        """Inside, a run of the module does nothing that is done before `site`; call what it yields before each.

        `expected` is the output of the module for the first batch.
        """
        last, done = self._before(site)
        if done != self._skipped and done not in self._refused:
            self._record(last, done)
            if done not in self._refused and not self._serves(done, expected):
                self._refused.add(done)
        with self._stubs(() if done in self._refused else done) as select:
            yield select

    def _serves(self, done: tuple[str, ...], expected: Tensor) -> bool:
        """Whether the module gives what it should with stubs in the place of these blocks."""
        with self._stubs(done) as select:
            select(0)
            try:
                found = self._run(0).to(expected)
            except Exception:  # whatever a module makes of NaN of another shape
                return False
        return bool((found - expected).norm() <= CLOSE * expected.norm())

    def _before(self, site: Site) -> tuple[list[str], tuple[str, ...]]:
        """The last block of every chain that is done before a site runs, and all of these blocks.

        A `ModuleList` inside a block of another one is no chain: its modules may be experts.
        """
        spans = self._spans
        start = min(spans[self._ran(module)][0] for module, _ in site.places)
        last: list[str] = []
        done: list[str] = []
        lists: list[str] = []
        for name, module in self._module.named_modules():
            outer = [*done, *lists] if isinstance(module, nn.ModuleList) else done
            if not isinstance(module, nn.ModuleList | nn.Sequential) or any(
                f"{name}.".startswith(f"{o}.") for o in outer
            ):
                continue
            blocks = [f"{name}.{child}".removeprefix(".") for child, _ in module.named_children()]
            lists += [name] if isinstance(module, nn.ModuleList) else []
            before = [block for block in blocks if block in spans and spans[block][1] < start]
            if before:
                last.append(max(before, key=lambda block: spans[block][1]))
                done += before
        return last, tuple(done)

    def _ran(self, module: str) -> str:
        """The module, or the nearest around it that is called: the root is."""
        while module not in self._spans:
            module = module.rpartition(".")[0]
        return module

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        return spans_of(self._module, lambda: self._run(0))

    def _record(self, last: list[str], done: tuple[str, ...]) -> None:
        """Run every batch up to the end of the last block done, from where the outputs of before end if they serve."""
        serves = self._skipped not in self._refused and set(self._skipped) <= set(done)
        known = self._outputs if serves else {}
        found: dict[str, list[Any]] = {name: [] for name in last if name not in known}
        final = max(last, key=lambda name: self._spans[name][1], default=None)
        with self._stubs(self._skipped if serves else ()) as select, ExitStack() as hooks:

            def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
                found[name].append(tree_map(_detached, output))
                if name == final:
                    raise Enough

            for name in found:
                module = self._module.get_submodule(name)
                hooks.callback(module.register_forward_hook(_named(keep, name)).remove)
            for number in range(self._count if found else 0):
                select(number)
                try:
                    self._run(number)
                except Enough:
                    continue
        kept = {name: found[name] if name in found else known[name] for name in last}
        whole = all(len(outputs) == self._count for outputs in kept.values())
        self._outputs, self._skipped = kept, done
        if not whole:
            self._refused.add(done)

    @contextmanager
    def _stubs(self, done: tuple[str, ...]) -> Iterator[Callable[[int], None]]:
        """Put stubs in the place of these blocks; yields what says which batch comes."""
        at = 0

        def select(number: int) -> None:
            nonlocal at
            at = number

        with stubbed(self._module, done, self._outputs, lambda last: self._outputs[last][at]):
            yield select


@contextmanager
def stubbed(
    module: nn.Module, done: Iterable[str], last: Iterable[str], output_of: Callable[[str], Any]
) -> Iterator[None]:
    """Inside, blocks that are `done` do nothing but hand on: the `last` of every chain what `output_of` it is.

    The others hand on NaN of the same kind, for the blocks of a chain give things of one kind.
    """
    last_of = {name.rpartition(".")[0]: name for name in last}

    def give(name: str) -> Any:
        known = last_of[name.rpartition(".")[0]]
        return tree_map(_copied if name == known else lost, output_of(known))

    with ExitStack() as replaced:
        for name in done:
            attributes = module.get_submodule(name).__dict__
            if "forward" in attributes:
                replaced.callback(attributes.__setitem__, "forward", attributes["forward"])
            else:
                replaced.callback(attributes.pop, "forward")
            attributes["forward"] = lambda *_, name=name, **__: give(name)
        yield


def spans_of(module: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[int, int]]:
    """When the submodules that are called once in a run of a module begin and end, by name; the module itself is ``."""
    clock = 0
    begun: dict[str, int] = {}
    ended: dict[str, int] = {}
    calls: dict[str, int] = {}

    def before(name: str, *_: Any) -> None:
        nonlocal clock
        clock += 1
        begun[name], calls[name] = clock, calls.get(name, 0) + 1

    def after(name: str, *_: Any) -> None:
        nonlocal clock
        clock += 1
        ended[name] = clock

    with ExitStack() as hooks:
        for name, child in module.named_modules():
            hooks.callback(child.register_forward_pre_hook(_named(before, name)).remove)
            hooks.callback(child.register_forward_hook(_named(after, name)).remove)
        run()
    spans = {name: (begun[name], ended[name]) for name, many in calls.items() if many == 1 and name in ended}
    return {"": (0, clock + 1), **spans}


def _named(hook: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda *args: hook(name, *args)


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    """A copy, for what comes next may work in place, which it may not do to a leaf either."""
    return value.clone() if isinstance(value, Tensor) else value


def lost(value: Any) -> Any:
    """NaN in the place of floating-point values."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.new_full((), float("nan")).expand(value.shape)
    return value
