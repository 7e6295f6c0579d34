"""Running a model over many batches a stretch at a time: from the end of one of its blocks to the end of the next.

What the blocks hand on lies in files, so that memory holds the weights of one stretch and what one batch makes of it.
The gradients of an output go the same way back: every stretch is run again from what the one before handed on. The
blocks of a chain that run once, one after another, are found by watching one batch.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tersor.models.files import read_tensors, write_safetensors
from tersor.models.ondemand import held
from tersor.models.prefix import Enough, spans_of, stubbed

Run = Callable[[int], Tensor]


class Passage:
    """The stretches of a module that `run(number)` puts through batch `number` of `count`; `smallest` is one of them.

    Files lie in `folder`, which `close` removes.
    """

    def __init__(self, module: nn.Module, run: Run, count: int, smallest: int, folder: Path) -> None:
        self._module, self._run, self.count = module, run, count
        self._spool = _Spool(folder)
        with torch.no_grad():
            spans = spans_of(module, lambda: run(smallest))
        self._blocks = _in_turn(module, spans)
        self.stretches = len(self._blocks) + 1

    def close(self) -> None:
        self._spool.close()

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Inside, the weights of the block that ends stretch `number` stay in memory."""
        if number == len(self._blocks):
            yield
            return
        with held(self._module.get_submodule(self._blocks[number])):
            yield

    def forward(self, number: int, batch: int, begun: Callable[[], Any] = lambda: None) -> Any:
        """Put a batch through stretch `number`, `begun()` at its beginning; keeps and returns what it hands on.

        That of the last stretch is the output of the model. The stretches before must have been run.
        """
        output, _ = self._through(number, batch, begun, leaves=False)
        if number < len(self._blocks):
            self._spool.put(f"out|{self._blocks[number]}", batch, output)
        return output

    def backward(self, number: int, batch: int, begun: Callable[[], Any], loss: Callable[[Tensor], Tensor]) -> None:
        """Take the gradients of a loss of the output back through stretch `number`, from the last stretch to the first.

        `loss` is of the output of the model and called by the last stretch. All stretches must have been run.
        """
        with torch.enable_grad():
            output, given = self._through(number, batch, begun, leaves=True)
            if number == len(self._blocks):
                loss(output).backward()
            else:
                known = self._spool.get(f"gradient|{self._blocks[number]}", batch)
                pairs = zip(tree_flatten(output)[0], tree_flatten(known)[0], strict=True)
                reached = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
                if reached:
                    torch.autograd.backward([o for o, _ in reached], [g for _, g in reached])
                self._spool.drop(f"gradient|{self._blocks[number]}", batch)
        for name, leaves in given.items():
            self._add(f"gradient|{name}", batch, leaves)

    def forget(self, number: int) -> None:
        """Remove what no stretch after `number` reads."""
        needed = self._last_of(number + 1)
        for name in set(self._last_of(number)) - set(needed):
            for batch in range(self.count):
                self._spool.drop(f"out|{name}", batch)

    def _through(
        self, number: int, batch: int, begun: Callable[[], Any], leaves: bool
    ) -> tuple[Any, dict[str, list[Any]]]:
        """What stretch `number` hands on, and the tensors that it was given, by the block that gave them."""
        given: dict[str, list[Any]] = {}
        trees: dict[str, TreeSpec] = {}
        for name in self._last_of(number):
            found, trees[name] = tree_flatten(self._spool.get(f"out|{name}", batch))
            given[name] = [_leaf(value, leaves) for value in found]

        def start(*_: Any) -> None:
            begun()

        done = self._blocks[:number]
        with ExitStack() as stack:
            stack.enter_context(
                stubbed(self._module, done, given, lambda last: tree_unflatten(given[last], trees[last]))
            )
            if done:
                stack.callback(self._module.get_submodule(done[-1]).register_forward_hook(start).remove)
            else:
                start()
            if number == len(self._blocks):
                return self._run(batch), given
            return self._until(self._blocks[number], batch), given

    def _until(self, name: str, batch: int) -> Any:
        found = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise Enough

        hook = self._module.get_submodule(name).register_forward_hook(keep)
        try:
            self._run(batch)
        except Enough:
            pass
        finally:
            hook.remove()
        return found[0]

    def _last_of(self, number: int) -> list[str]:
        """The last block of every chain that is done before stretch `number`."""
        last: dict[str, str] = {}
        for name in self._blocks[:number]:
            last[name.rpartition(".")[0]] = name
        return list(last.values())

    def _add(self, name: str, batch: int, leaves: list[Any]) -> None:
        """Add the gradients of these tensors to those that later stretches left."""
        gradients = [leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves]
        if self._spool.has(name, batch):
            pairs = zip(gradients, self._spool.get(name, batch), strict=True)
            gradients = [b if a is None else a if b is None else a + b for a, b in pairs]
        self._spool.put(name, batch, gradients)


class _Spool:
    """Trees of tensors in files; what is no tensor stays in memory."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        self._folder = folder
        self._kept: dict[tuple[str, int], tuple[list[Any], TreeSpec]] = {}

    def put(self, name: str, batch: int, tree: Any) -> None:
        leaves, spec = tree_flatten(tree)
        tensors = {str(i): leaf.detach().clone() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        if tensors:
            write_safetensors(self._file(name, batch), tensors)
        self._kept[name, batch] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec

    def get(self, name: str, batch: int) -> Any:
        kept, spec = self._kept[name, batch]
        path = self._file(name, batch)
        tensors = read_tensors(path) if path.exists() else {}
        return tree_unflatten([tensors.get(str(i), leaf) for i, leaf in enumerate(kept)], spec)

    def has(self, name: str, batch: int) -> bool:
        return (name, batch) in self._kept

    def drop(self, name: str, batch: int) -> None:
        if self._kept.pop((name, batch), None) is not None:
            self._file(name, batch).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str, batch: int) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{batch}.safetensors"


def _leaf(value: Any, requires_grad: bool) -> Any:
    """A tensor of its own that gathers gradients, if it can."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())


def _in_turn(module: nn.Module, spans: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    """The blocks of the chains of a module that run once, in the order in which they end; none within another."""
    found: list[str] = []

    def look(owner: nn.Module, name: str) -> None:
        for child_name, child in owner.named_children():
            full = f"{name}.{child_name}".removeprefix(".")
            if isinstance(owner, nn.ModuleList | nn.Sequential):
                found.append(full)
            else:
                look(child, full)

    look(module, "")
    ran = sorted((name for name in found if name in spans), key=lambda name: spans[name][1])
    apart = all(spans[a][1] < spans[b][0] for a, b in pairwise(ran))
    return tuple(ran) if apart else ()
