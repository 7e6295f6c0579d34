"""The form `dictionary`: a dense dictionary of atoms, and for every row or column of the weight a few of them.

`W_hat = S D` (atoms lie along the columns, every row takes a few) or `W_hat = D S` (the other way round), which is a
union of many low-rank subspaces where `lowrank` has one (P460 CoSpaDi). The atoms' side of the metric is whitened
away exactly; the other enters by its diagonal while supports and atoms are found, and whole in the least squares after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.forms.base import Candidate, Operator, Shape, bits_of, cost_of, from_bits
from tersor.forms.conjugate import conjugate_gradients
from tersor.forms.integers import IntForm, IntOperator, IntSetting
from tersor.forms.lowrank import factorise
from tersor.forms.packing import pack, packed_width, unpack
from tersor.forms.products import HalfOperator, ProductOperator
from tersor.metrics import Metric, Side

Sample = tuple[Tensor | None, Tensor]  # rows that atoms are learned from, None for all, and for how many each stands
ROUNDS = 40  # of K-SVD at most
SETTLED = 0.03  # a round that wins less than this share of the error is the last
TWIN = 0.99  # atoms with a larger product are one
MANY, DENSE = 512, 48  # atoms, and atoms in a signal, at most where nobody names a setting
STEPS = 6  # of conjugate gradients
CHUNK = 4096  # signals pursued at a time


@dataclass(frozen=True)
class DictionarySetting:
    """`atoms` in the dictionary, of which every row (`side` columns) or column (`side` rows) uses a share `density`.

    `side` is where atoms lie: along the `columns`, as inputs of a layer do, or along the `rows`. `atom_bits` None keeps
    atoms in 16-bit floats; values are 16-bit floats or integers with a 16-bit scale for each row or column.
    """

    atoms: int
    density: float
    side: str = "columns"
    atom_bits: int | None = None
    value_bits: int = 16
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if self.atoms < 1:
            raise TersorError(f"dictionary: atoms is {self.atoms}, but must be at least 1.")
        if not 0 < self.density <= 1:
            raise TersorError(f"dictionary: density is {self.density}, but must be above 0 and at most 1.")
        for name, allowed in (("side", ("columns", "rows")), ("value_bits", (4, 8, 16))):
            if getattr(self, name) not in allowed:
                raise TersorError(f"dictionary: {name} is {getattr(self, name)!r}, but must be one of {allowed}.")
        if self.atom_bits is not None:
            self.of_atoms()

    @property
    def entries(self) -> int:
        """How many atoms a row or column uses."""
        return max(1, round(self.density * self.atoms))

    @property
    def label(self) -> str:
        atoms = "f16" if self.atom_bits is None else f"int{self.atom_bits}"
        values = "f16" if self.value_bits == 16 else f"int{self.value_bits}"
        marks = (" by rows" if self.side == "rows" else "") + (" orthogonal" if self.orthogonal else "")
        return f"dictionary k{self.atoms} s{self.entries} {atoms}/{values}{marks}"

    def of_atoms(self) -> IntSetting:
        """How integer atoms are stored: in groups along the atoms, in either orientation."""
        assert self.atom_bits is not None
        axis = "columns" if self.side == "columns" else "rows"
        return IntSetting(self.atom_bits, 128, axis, symmetric=True, rounding="two-sided")


class SparseOperator(Operator):
    """A matrix (signals, atoms) with as many entries in every row as the setting says, or its transpose.

    Where they stand takes the fewer bytes of two: packed indices of `ceil(log2 atoms)` bits, or a mask.
    """

    setting: DictionarySetting
    places: Tensor
    values: Tensor
    scale: Tensor

    def __init__(self, signals: int, setting: DictionarySetting) -> None:
        self.turned = setting.side == "rows"
        super().__init__((setting.atoms, signals) if self.turned else (signals, setting.atoms), setting)
        entries = setting.entries
        self.index_bits = max(1, (setting.atoms - 1).bit_length())
        self.masked = setting.atoms <= entries * self.index_bits
        width = -(-min(setting.atoms, entries * self.index_bits) // 8)
        self.register_buffer("places", torch.zeros(signals, width, dtype=torch.uint8))
        if setting.value_bits == 16:
            self.register_buffer("values", torch.zeros(signals, entries, dtype=torch.int16))
        else:
            width = packed_width(entries, setting.value_bits)
            self.register_buffer("values", torch.zeros(signals, width, dtype=torch.uint8))
            self.register_buffer("scale", torch.zeros(signals, dtype=torch.int16))

    def set(self, index: Tensor, values: Tensor) -> None:
        """Store the entries (signals, entries) of the atoms `index`, all different within a row."""
        index, order = index.sort(1)
        values, setting = values.gather(1, order), self.setting
        if self.masked:
            bits = torch.zeros(len(index), setting.atoms, dtype=torch.uint8).scatter_(1, index, 1)
        else:
            bits = ((index[..., None] >> torch.arange(self.index_bits)) & 1).flatten(1)
        self.places = pack(bits, 1)
        if setting.value_bits == 16:
            self.values = bits_of(values)
            return
        top = 2 ** (setting.value_bits - 1) - 1
        self.scale = bits_of((values.abs().amax(1) / top).clamp_min(6e-8))
        codes = (values / from_bits(self.scale)[:, None]).round().clamp(-top, top)
        self.values = pack(codes + top, setting.value_bits)

    def signals(self, rows: Tensor | None = None) -> Tensor:
        """The signals of all rows or of some, dense (signals, atoms)."""
        setting, buffers = self.setting, (self.places, self.values)
        places, stored = buffers if rows is None else (b[rows] for b in buffers)
        if setting.value_bits == 16:
            values = from_bits(stored)
        else:
            scale = from_bits(self.scale if rows is None else self.scale[rows])
            codes = unpack(stored, setting.value_bits, setting.entries).float()
            values = (codes - (2 ** (setting.value_bits - 1) - 1)) * scale[:, None]
        if self.masked:
            mask = unpack(places, 1, setting.atoms)
            return values.gather(1, (mask.cumsum(1) - 1).clamp_min(0)) * mask
        bits = unpack(places, 1, setting.entries * self.index_bits).reshape(len(places), -1, self.index_bits)
        index = (bits.long() << torch.arange(self.index_bits, device=bits.device)).sum(2)
        return values.new_zeros(len(places), setting.atoms).scatter_(1, index, values)

    def decode(self) -> Tensor:
        return self.signals().T if self.turned else self.signals()

    def take(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.turned or self._decoded is not None:
            return super().take(index, dtype)
        return self.signals(index.reshape(-1)).reshape(*index.shape, -1).to(dtype)


@dataclass(frozen=True)
class Problem:
    """Signals (signals, n) whitened on the atoms' side, in float32, and the moment that couples them."""

    signals: Tensor
    coupling: Side

    def distance(self, error: Tensor) -> float:
        """`tr(E^T B E)` of an error (signals, n)."""
        return float((self.coupling.apply(error) * error).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Code:
    """Which atoms every signal takes (signals, entries), and how much of each."""

    index: Tensor
    values: Tensor

    def dense(self, atoms: int) -> Tensor:
        """The matrix (signals, atoms)."""
        return self.values.new_zeros(len(self.values), atoms).scatter_(1, self.index, self.values)


class DictionaryForm:
    """Dictionaries of atoms along the shorter side, and sparse combinations of them."""

    name = "dictionary"
    stores = "atoms, and a few places and values a row or column"
    wins = "beside low rank, in 16-bit factors; nowhere beside integers"

    def settings(self, shape: Shape) -> Iterable[DictionarySetting]:
        """A quarter, half and as many atoms as they are long, in few bits, at a few densities."""
        side = "columns" if shape[1] <= shape[0] else "rows"
        for share, density in ((0.25, 0.125), (0.25, 0.25), (0.5, 0.125), (0.5, 0.25), (1.0, 0.125)):
            atoms = max(4, min(MANY, int(share * min(shape))))
            setting = DictionarySetting(atoms, min(density, DENSE / atoms), side, 3, 4)
            if cost_of(self, shape, setting).stored < 4 * shape[0] * shape[1]:
                yield setting

    def setting(self, values: Mapping[str, Any]) -> DictionarySetting:
        return DictionarySetting(**values)

    def probe(self, shape: Shape, curve: Sequence[Candidate]) -> DictionarySetting | None:
        ladder = list(self.settings(shape))
        return ladder[len(ladder) // 2] if ladder else None

    def empty(self, shape: Shape, setting: DictionarySetting) -> ProductOperator:
        signals, length = shape if setting.side == "columns" else shape[::-1]
        size = (setting.atoms, length) if setting.side == "columns" else (length, setting.atoms)
        atoms = HalfOperator(size) if setting.atom_bits is None else IntOperator(size, setting.of_atoms())
        return _product(atoms, SparseOperator(signals, setting), setting)

    def curve(
        self, weight: Tensor, metric: Metric, settings: Iterable[DictionarySetting] | None = None
    ) -> list[Candidate]:
        shape: Shape = (weight.shape[0], weight.shape[1])
        ladder, sample = self.settings(shape) if settings is None else settings, metric.sampled_rows()
        if sample is not None:
            weight, metric = weight[sample[0]], metric.of_rows(*sample)
        candidates = []
        for setting in ladder:
            error = weight.float() - self._best(weight, metric, setting, sample and (None, sample[1])).dense()
            candidates.append(Candidate(self.name, setting, cost_of(self, shape, setting), metric.distance(error)))
        return candidates

    def fit(self, weight: Tensor, metric: Metric, setting: DictionarySetting) -> Operator:
        return self._best(weight, metric, setting, metric.sampled_rows())

    def _best(self, weight: Tensor, metric: Metric, setting: DictionarySetting, sample: Sample | None) -> Operator:
        """The better of two fits: under the metric, and under none, which no pursuit can promise to be worse."""
        values = weight.detach().float().cpu()
        if setting.side == "rows":
            sample = None
        metrics = (metric,) if metric.kind == "identity" else (metric, metric.coarsened("identity"))
        fits = [_fit(values, m, setting, sample) for m in metrics]
        return min(fits, key=lambda operator: metric.distance(values - operator.dense())).to(weight.device)


def _product(atoms: Operator, sparse: Operator, setting: DictionarySetting) -> ProductOperator:
    first, second = (atoms, sparse) if setting.side == "rows" else (sparse, atoms)
    return ProductOperator(first, second, setting)


def _fit(weight: Tensor, metric: Metric, setting: DictionarySetting, sample: Sample | None) -> ProductOperator:
    """Whiten the atoms' side, learn atoms with the diagonal of the other as weights, pursue, refit, store."""
    by_columns = setting.side == "columns"
    signals = weight if by_columns else weight.T
    along, across = (metric.columns, metric.rows) if by_columns else (metric.rows, metric.columns)
    whitened = along.whiten(signals.T).T
    unit = float(whitened.square().mean().sqrt()) or 1.0
    problem = Problem((whitened / unit).float().contiguous(), Side((across.moment / across.diagonal.mean()).float()))
    weights = problem.coupling.diagonal
    if sample is None:
        atoms = learn(problem.signals, weights, setting)
    else:
        index, counts = sample
        some = slice(None) if index is None else index
        atoms = learn(problem.signals[some].contiguous(), weights[some] * counts, setting)
    code = _coded(problem.signals, atoms, setting)
    if not problem.coupling.is_diagonal:
        atoms = refitted_atoms(problem, atoms, code)
        code = refitted_values(problem, atoms, code)
    return _stored(problem, atoms, code, along, unit, setting)


def _stored(
    problem: Problem, atoms: Tensor, code: Code, along: Side, unit: float, setting: DictionarySetting
) -> ProductOperator:
    """Round the values, refit atoms to them and round these; then refit and round the values, if that is better."""
    span = float(along.unwhiten(atoms.T).abs().amax())
    balance = (float(code.values.abs().amax()) / max(unit * span, 1e-30)) ** 0.5 or 1.0
    sparse = SparseOperator(len(problem.signals), setting)
    sparse.set(code.index, code.values / balance)
    rounded = sparse.signals() * balance
    code = Code(code.index, rounded.gather(1, code.index))
    atoms = refitted_atoms(problem, atoms, code)
    gram = Side(rounded.double().T @ problem.coupling.apply(rounded.double())).damped(1e-6)
    by_columns = setting.side == "columns"
    free = (along.unwhiten(atoms.T) * (unit * balance)).float()  # (n, atoms)
    free, sides = (free.T.contiguous(), (gram, along)) if by_columns else (free, (along, gram))
    if setting.atom_bits is None:
        stored: Operator = HalfOperator.of(free)
    else:
        stored = IntForm().fit(free, Metric("kronecker", *sides), setting.of_atoms())
    made = stored.dense().T if by_columns else stored.dense()  # as `free` was first
    atoms = (along.whiten(made).T / (unit * balance)).float().contiguous()
    again = SparseOperator(len(problem.signals), setting)
    again.set(code.index, refitted_values(problem, atoms, code).values / balance)
    left = [problem.distance(problem.signals - s.signals() * balance @ atoms) for s in (sparse, again)]
    return _product(stored, sparse if left[0] <= left[1] else again, setting)


def learn(signals: Tensor, weights: Tensor, setting: DictionarySetting) -> Tensor:
    """Atoms (atoms, n) by K-SVD for signals (signals, n), whose squared errors count by `weights` (signals,).

    Begins with the singular vectors and with some of the signals, and goes on from the better after two rounds.
    """
    atoms, weights = setting.atoms, (weights / weights.mean().clamp_min(1e-300)).float()
    generator = torch.Generator().manual_seed(0)
    principal = factorise(weights.sqrt()[:, None] * signals).right[:atoms].float()
    if setting.orthogonal:
        principal = torch.nn.functional.pad(principal, (0, 0, 0, atoms - len(principal)))
        return _rounds(signals, weights, principal, setting, ROUNDS)[1]
    drawn = signals[torch.randperm(len(signals), generator=generator)[:atoms]]
    drawn = torch.cat([drawn, torch.randn(atoms - len(drawn), signals.shape[1], generator=generator)])
    mixed = torch.cat([principal, drawn[: atoms - len(principal)]])
    begun = [_rounds(signals, weights, start, setting, 2) for start in (mixed, drawn)]
    _, best = min(begun, key=lambda one: one[0])
    return _rounds(signals, weights, best, setting, ROUNDS)[1]


def _rounds(
    signals: Tensor, weights: Tensor, atoms: Tensor, setting: DictionarySetting, most: int
) -> tuple[float, Tensor]:
    """Alternate codes and atoms until a round wins little; the error that the last one began with, and the atoms."""
    before, atoms = float("inf"), atoms if setting.orthogonal else torch.nn.functional.normalize(atoms)
    for _ in range(most):
        code = _coded(signals, atoms, setting)
        error = signals - code.dense(len(atoms)) @ atoms
        left = float(weights.double() @ error.square().sum(1, dtype=torch.float64))
        if left >= (1 - SETTLED) * before:
            break
        before = left
        if setting.orthogonal:
            atoms = _procrustes(signals, weights, atoms, code)
        else:
            atoms = _ksvd(signals, weights, atoms, code, error)
    return before, atoms


def _procrustes(signals: Tensor, weights: Tensor, atoms: Tensor, code: Code) -> Tensor:
    """The orthogonal atoms nearest to the signals: the polar factor of `S^T diag(w) Y`; unused ones stay zero."""
    used = atoms.square().sum(1) > 0
    product = code.dense(len(atoms)).T[used].double() @ (weights[:, None] * signals).double()
    left, _, right = torch.linalg.svd(product, full_matrices=False)
    return torch.zeros_like(atoms).masked_scatter(used[:, None], (left @ right).float())


def _ksvd(signals: Tensor, weights: Tensor, atoms: Tensor, code: Code, error: Tensor) -> Tensor:
    """One sweep; then atoms that nobody uses, or that are as another, become the signals that are served worst."""
    from tersor.forms import dictionary_kernels as kernels

    atoms, flat, values = atoms.clone(), code.index.flatten(), code.values
    starts = torch.nn.functional.pad(torch.bincount(flat, minlength=len(atoms)).cumsum(0), (1, 0))
    kernels.sweep(*(t.numpy() for t in (error, atoms, values, weights, flat.argsort(stable=True), starts)))
    energy = torch.bincount(flat, values.square().flatten(), len(atoms))
    twins = (atoms @ atoms.T).abs().triu(1).amax(0) > TWIN
    useless = ((energy == 0) | twins).nonzero().flatten()[: len(signals)]
    if len(useless):
        worst = (weights * error.square().sum(1)).argsort(descending=True, stable=True)[: len(useless)]
        atoms[useless] = torch.nn.functional.normalize(signals[worst])
    return atoms


def _coded(signals: Tensor, atoms: Tensor, setting: DictionarySetting) -> Code:
    return (thresholded if setting.orthogonal else pursued)(signals, atoms, setting.entries)


def thresholded(signals: Tensor, atoms: Tensor, entries: int) -> Code:
    """The best code where atoms are orthogonal: the largest products."""
    products = signals @ atoms.T
    index = products.abs().topk(entries).indices
    return Code(index, products.gather(1, index))


def pursued(signals: Tensor, atoms: Tensor, entries: int) -> Code:
    """Codes by orthogonal matching pursuit, which takes the atom that lessens the error most with all before it."""
    from tersor.forms import dictionary_kernels as kernels

    index, values = torch.empty(len(signals), entries, dtype=torch.int64), torch.empty(len(signals), entries)
    _by_parts(kernels.pursue, signals, atoms, index, values)
    return Code(index, values)


def _by_parts(kernel: Any, signals: Tensor, atoms: Tensor, index: Tensor, values: Tensor) -> None:
    """Call a kernel with the products of some signals at a time and all atoms."""
    gram = (atoms @ atoms.T).numpy()
    for some, places, entries in zip(signals.split(CHUNK), index.split(CHUNK), values.split(CHUNK), strict=True):
        kernel((some @ atoms.T).numpy(), gram, places.numpy(), entries.numpy())


def refitted_atoms(problem: Problem, atoms: Tensor, code: Code) -> Tensor:
    """The best atoms for a code: `D + (S^T B S)^-1 S^T B E`, whatever the moment of the atoms' side."""
    sparse = code.dense(len(atoms)).double()
    felt = problem.coupling.apply(sparse)
    gram = Side(sparse.T @ felt).damped(1e-9).moment
    error = problem.signals.double() - sparse @ atoms.double()
    change: Tensor = torch.linalg.solve(gram, felt.T @ error)
    return (atoms + change).float()


def refitted_values(problem: Problem, atoms: Tensor, code: Code) -> Code:
    """The best values on their supports: exactly where signals are not coupled, else by conjugate gradients."""
    from tersor.forms import dictionary_kernels as kernels

    gram, values = atoms @ atoms.T, code.values.clone()
    if problem.coupling.is_diagonal:
        _by_parts(kernels.least_squares, problem.signals, atoms, code.index, values)
        return Code(code.index, values)

    def felt(error: Tensor) -> Tensor:
        """What an error in the coefficients (signals, atoms) does to the gradient of the entries."""
        return problem.coupling.apply(error).gather(1, code.index)

    error = problem.signals - code.dense(len(atoms)) @ atoms
    curvature = torch.outer(problem.coupling.diagonal.float(), gram.diagonal()).gather(1, code.index).clamp_min(1e-20)

    def moved(change: Tensor) -> Tensor:
        return felt(Code(code.index, change).dense(len(atoms)) @ gram)

    return Code(code.index, conjugate_gradients(values, felt(error @ atoms.T), moved, STEPS, curvature))
