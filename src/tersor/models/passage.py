"""Running a model over many batches a stretch at a time: from the end of one of its blocks to the end of the next.

What the blocks hand on lies in files, so that memory holds the weights of one stretch and what one batch makes of it.
The gradients of an output go the same way back: every stretch is run again from what the one before handed on. The
blocks of a chain that run once, one after another, are found by watching one batch. What a stretch that was not
finished wrote is written again, so a passage whose process was killed goes on at its stretch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from tersor.foreign import check, read_header, read_json, understood
from tersor.models.files import read_tensors, write_safetensors, write_text
from tersor.models.model import Batch, Model, size_of
from tersor.models.ondemand import held, is_on_demand, units_of
from tersor.models.prefix import CLOSE, Enough, spans_of, stubbed

Run = Callable[[int], Tensor]


class Passage:
    """The stretches of a module that `run(number)` puts through the batch of that number.

    Files lie in `folder`. Those that a passage of the same `key`, which did not come to its end, left there are used.
    """

    def __init__(self, module: nn.Module, run: Run, batches: Sequence[Batch], folder: Path, key: str = "") -> None:
        self._module, self._run, self.count = module, run, len(batches)
        self.smallest = min(range(self.count), key=lambda number: size_of(batches[number]))
        self.spool = Spool(folder, key)
        with torch.no_grad():
            spans = spans_of(module, lambda: run(self.smallest))
        self._blocks = _in_turn(module, spans)
        self.stretches = len(self._blocks) + 1
        names = {id(child): name for name, child in module.named_modules()}
        units = [(names[id(unit)], whole) for unit, whole in units_of(module)] if is_on_demand(module) else []
        self._around = [(n, whole, spans.get(n, (0, 0))[0]) for n, whole in units if n not in self._blocks]
        self._ends = [*(spans[block][1] for block in self._blocks), spans[""][1]]

    def close(self) -> None:
        """Remove all files."""
        self.spool.close()

    def leave(self) -> None:
        """Remove all files but those that another process can go on with."""
        if not self.spool.is_begun:
            self.spool.close()

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Inside, weights of the block that ends stretch `number`, and of what runs around blocks, stay in memory."""
        with ExitStack() as stack:
            for name in self._blocks[number : number + 1]:
                stack.enter_context(held(self._module.get_submodule(name)))
            for name, whole, begun in self._around:
                if begun < self._ends[number]:
                    stack.enter_context(held(self._module.get_submodule(name), whole))
            yield

    def forward(self, number: int, batch: int, begun: Callable[[], Any] = lambda: None) -> Any:
        """Put a batch through stretch `number`, `begun()` at its beginning; keeps and returns what it hands on.

        That of the last stretch is the output of the model. The stretches before must have been run.
        """
        output, _ = self._through(number, batch, begun, leaves=False)
        if number < len(self._blocks):
            self.spool.put(f"out|{self._blocks[number]}", batch, output)
        return output

    def advance(self, number: int) -> None:
        """Put all batches through stretch `number`."""
        with torch.no_grad(), self.holding(number):
            for batch in range(self.count):
                self.forward(number, batch)

    def backward(self, number: int, batch: int, begun: Callable[[], Any], loss: Callable[[Tensor], Tensor]) -> None:
        """Take the gradients of a loss of the output back through stretch `number`, from the last stretch to the first.

        `loss` is of the output of the model and called by the last stretch. All stretches must have been run.
        """
        with torch.enable_grad():
            output, given = self._through(number, batch, begun, leaves=True)
            if number == len(self._blocks):
                loss(output).backward()
            else:
                known = self._gradients(number, batch)
                pairs = zip(tree_flatten(output)[0], known, strict=True)
                reached = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
                if reached:
                    torch.autograd.backward([o for o, _ in reached], [g for _, g in reached])
        for name, leaves in given.items():
            gradients = [leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves]
            self.spool.put(f"gradient|{name}|{number}", batch, gradients)

    def forget(self, number: int) -> None:
        """Remove what no stretch after `number`, on the way forward, reads."""
        needed = self._last_of(number + 1)
        self._drop(f"out|{name}" for name in set(self._last_of(number)) - set(needed))

    def forget_gradients(self, number: int) -> None:
        """Remove what no stretch before `number` reads, on the way back."""
        if number < len(self._blocks):
            name = self._blocks[number]
            self._drop([f"out|{name}", *(f"gradient|{name}|{later}" for later in range(number + 1, self.stretches))])

    def _gradients(self, number: int, batch: int) -> list[Any]:
        """The gradients of what stretch `number` hands on, leaf by leaf: the sum of those from all later stretches."""
        total: list[Any] = []
        for later in range(self.stretches - 1, number, -1):
            name = f"gradient|{self._blocks[number]}|{later}"
            if self.spool.has(name, batch):
                pairs = zip_longest(total, self.spool.get(name, batch))
                total = [b if a is None else a if b is None else a + b for a, b in pairs]
        return total

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            for batch in range(self.count):
                self.spool.drop(name, batch)

    def _through(
        self, number: int, batch: int, begun: Callable[[], Any], leaves: bool
    ) -> tuple[Any, dict[str, list[Any]]]:
        """What stretch `number` hands on, and the tensors that it was given, by the block that gave them."""
        given: dict[str, list[Any]] = {}
        trees: dict[str, TreeSpec] = {}
        for name in self._last_of(number):
            found, trees[name] = tree_flatten(self.spool.get(f"out|{name}", batch))
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


@contextmanager
def by_stretches(
    model: Model, batches: Sequence[Batch], folder: Path, progress: Callable[[int, int], Any] = lambda *_: None
) -> Iterator[Model]:
    """Inside, the model it yields gives its outputs for these batches by the last stretch alone; others as ever.

    All batches have gone through the other stretches by then, so that every weight but the last is read once for all of
    them. Files lie in `folder`, which is removed. Where the stretches do not make the outputs of the model, it stays as
    it is.
    """
    number_of = {id(batch): number for number, batch in enumerate(batches)}
    norms: list[float] = []

    def run(number: int) -> Tensor:
        output = model.outputs(batches[number])
        norms.append(float(output.norm()))
        return output

    passage = Passage(model.module, run, batches, folder)
    last, changed = passage.stretches - 1, copy.copy(model)

    def outputs(batch: Batch) -> Tensor:
        number = number_of.get(id(batch))
        return model.outputs(batch) if number is None else passage.forward(last, number)

    try:
        for stretch in range(last):
            progress(stretch, last)
            passage.advance(stretch)
            passage.forget(stretch)
        with passage.holding(last):
            with torch.no_grad():
                passage.forward(last, passage.smallest)
            if abs(norms[-1] - norms[0]) <= CLOSE * norms[0]:  # not where it is NaN
                changed.outputs = outputs  # type: ignore[method-assign]
            yield changed
    finally:
        passage.close()


class Spool:
    """Trees of tensors in files of a folder, and which steps are done; `key` says of what.

    What is no tensor stays in memory, and in the files too where JSON has it; else a killed process cannot go on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._done = folder, folder / "done.json"
        self._kept: dict[tuple[str, int], tuple[list[Any], TreeSpec]] = {}
        self._lasts = True
        known = check(read_json(self._done), {"key": str, "done": [str]}, self._done) if self._done.exists() else {}
        self._state: dict[str, Any] = known if known.get("key") == key else {"key": key, "done": []}
        if not self.is_begun:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed, or of something else

    @property
    def is_begun(self) -> bool:
        """Whether another process could go on: a step is done, and files tell all."""
        return bool(self._state["done"]) and self._lasts

    def is_done(self, step: str) -> bool:
        return step in self._state["done"]

    def mark(self, step: str) -> None:
        """Say that a step is done; it is so for other processes, too, if they can read all that there is."""
        self._state["done"].append(step)
        if self._lasts:
            write_text(self._done, json.dumps(self._state))

    def put(self, name: str, batch: int, tree: Any) -> None:
        leaves, spec = tree_flatten(tree)
        tensors = {str(i): leaf.detach().clone() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        kept = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            metadata = {"tree": treespec_dumps(spec), "leaves": json.dumps(kept)}
            _refuse_code(json.loads(metadata["tree"])[1])
        except (NotImplementedError, TypeError, ValueError):  # by PyTorch or JSON: a tree that text cannot tell
            metadata, self._lasts = {}, False
            self._done.unlink(missing_ok=True)
        write_safetensors(self._file(name, batch), tensors, metadata)
        self._kept[name, batch] = kept, spec

    def get(self, name: str, batch: int) -> Any:
        path = self._file(name, batch)
        kept, spec = self._kept.get((name, batch)) or _tree_of(path)
        tensors = read_tensors(path)
        return tree_unflatten([tensors.get(str(i), leaf) for i, leaf in enumerate(kept)], spec)

    def has(self, name: str, batch: int) -> bool:
        return self._file(name, batch).exists()

    def drop(self, name: str, batch: int) -> None:
        self._kept.pop((name, batch), None)
        self._file(name, batch).unlink(missing_ok=True)

    def close(self) -> None:
        self._state["done"].clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str, batch: int) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{batch}.safetensors"


def _tree_of(path: Path) -> tuple[list[Any], TreeSpec]:
    """What another process kept beside the tensors of a file."""
    read_header(path)
    with understood(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        leaves, tree = json.loads(metadata["leaves"]), metadata["tree"]
        _refuse_code(json.loads(tree)[1])
        spec = treespec_loads(tree)
        if not isinstance(leaves, list) or len(leaves) != spec.num_leaves:
            raise ValueError("its tree has other leaves")
        return leaves, spec


def _refuse_code(node: dict[str, Any]) -> None:
    """Raise ValueError for a tree that names modules, which PyTorch would import: of enumerations and default dicts.

    They stand in objects; other trees have lists of keys, or names.
    """
    if "{" in str(node["context"]):
        raise ValueError("its tree names code")
    for child in node["children_spec"]:
        _refuse_code(child)


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
