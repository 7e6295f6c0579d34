"""Tersor at the bytes of a peer: of the whole file, and with everything alone that the peer left alone.

Each comes twice: at rest, from all forms, and resident, from the forms that need no decoding when they are loaded.
Where a model has biases, they are shifted at the end. One study serves them all; fits are kept in its run folder,
figures in the scratch folder. A plan measured before stands for peers of hardly more bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from judging import mean_of, ratio_of
from peers.subject import Subject
from recovering import Recovery
from tersor.build.fits import fits_of
from tersor.build.interaction import applied
from tersor.build.layout import Layout
from tersor.curves.limit import Limit
from tersor.errors import UnreachableBudget
from tersor.forms import USUAL
from tersor.plan import Limits, Plan, Planner
from tersor.steps import Study

DRAWN = (*USUAL, "trellis")
RESIDENT = tuple(name for name in DRAWN if name != "coded")
MENUS = {"at rest": None, "resident": RESIDENT}
NEAR, NEAR_BITS = 0.03, 0.15  # of a whole file, and bits a touched weight: by so much less a plan may stand for a peer


def source_digest() -> str:
    """The version of Tersor to the letter: a hash of its source."""
    import tersor

    folder, digest = Path(tersor.__file__).parent, hashlib.sha256()
    for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.toml"))):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def plan_at(planner: Planner, stored: int, touched: Collection[str] | None) -> Plan:
    """The plan of least predicted divergence within `stored` bytes; with `touched`, all but those stay as they are."""
    if touched is not None:
        menus = (
            m if site.parameter_name in touched else m[:1] for site, m in zip(planner.sites, planner.menus, strict=True)
        )
        planner = replace(planner, menus=tuple(menus))
    return planner.plan(Limits(stored=stored))


def limit_at(opened: Study, stored: int, touched: Collection[str] | None) -> float | None:
    """The limit at so many bytes, of all sites or of those touched."""
    layout = Layout.from_json(opened.run.get("layout"))
    sites = [s for s in layout.sites if touched is None or s.parameter_name in touched]
    bound = Limit.of(opened.run, sites, layout.file_bytes)
    return None if bound is None else bound.divergence(stored)


@dataclass(frozen=True)
class Ours:
    """Tersor's figures beside the rows of peers."""

    subject: Subject
    opened: Study
    folder: Path
    sizes: dict[frozenset[str] | None, list[int]] = field(default_factory=dict)  # measured, by what may change

    def beside(self, stored: int, touched: Collection[str] | None, others: np.ndarray) -> dict[str, Any]:
        """Tersor's plans at `stored` bytes, with their ratios to the divergences (samples,) of the peer.

        Peers are to come by size, the smallest first, for plans of the smaller ones may stand for the larger.
        """
        cells: dict[str, Any] = {"limit": limit_at(self.opened, stored, touched)}
        size = self.standing_for(stored, touched)
        for menu in MENUS:
            row, values = self.measured(size, menu, touched)
            cells[menu] = row if values is None else {**row, "ratio": ratio_of(values, others)}
        return cells

    def standing_for(self, stored: int, touched: Collection[str] | None) -> int:
        """A size that was asked for before and is at most a little smaller, else this one."""
        changing = None if touched is None else frozenset(touched)
        more = NEAR_BITS * self.subject.bytes_of(list(touched)) / 32 if touched is not None else None
        known = self.sizes.setdefault(changing, [])
        near = [size for size in known if 0 <= stored - size <= (NEAR * size if more is None else more)]
        if not near:
            known.append(stored)
        return max(near, default=stored)

    def measured(
        self, stored: int, menu: str, touched: Collection[str] | None
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """A plan built and judged, with its divergences (samples,); a note and None where no plan is so small."""
        names = sorted(touched) if touched is not None else None
        key = hashlib.sha256(json.dumps([stored, menu, MENUS[menu], names, "recovered"]).encode()).hexdigest()[:16]
        kept, array = self.folder / f"{key}.json", self.folder / f"{key}.npy"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf8")), np.load(array) if array.exists() else None
        values = None
        try:
            row, values = self._measure(plan_at(self._planners[menu], stored, touched), score=touched is None)
        except UnreachableBudget as error:
            row = {"note": str(error)}
        self.folder.mkdir(parents=True, exist_ok=True)
        if values is not None:
            np.save(array, values)
        kept.write_text(json.dumps(row), encoding="utf8")
        return row, values

    @cached_property
    def _planners(self) -> dict[str, Planner]:
        return {menu: self.opened.planner(forms) for menu, forms in MENUS.items()}

    @cached_property
    def _recovery(self) -> Recovery:
        return Recovery(self.subject.known, self.subject.model)

    def _measure(self, plan: Plan, score: bool) -> tuple[dict[str, Any], np.ndarray]:
        run, sites = self.opened.run, self.opened.sites
        for _ in fits_of(run, self.opened.model, sites, plan.choices):
            pass
        recovery = self._recovery  # of the model as it was
        with applied(run, self.subject.model, sites, plan.choices), recovery.shifted():
            values = self.subject.judge.divergences()
            found = {"score": self.subject.judge.score()} if score else {}
        forms = {f: sum(c.form == f for c in plan.choices) for f in sorted({c.form for c in plan.choices})}
        row = {
            "bytes": plan.stored,
            "biases": recovery.layers,
            "resident": plan.resident,
            "predicted": plan.divergence,
            "forms": forms,
        }
        return {**row, "divergence": mean_of(values), **found}, values
