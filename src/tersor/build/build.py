"""Building: fit every candidate of a plan, put the operators into the model, write the artifact.

Sites are fitted in the order of the forward pass; what was fitted once is kept in the run, so a second budget that
picks the same candidate, or a build that was killed, does not fit it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.build.activations import Activations
from tersor.build.artifact import RECORD, stored_dtypes, write_artifact
from tersor.build.calibrate import Rounded, round_inputs
from tersor.build.contents import StoredFits, contents_of
from tersor.build.cut import damages_of
from tersor.build.fits import Fit, fit_choice, fits_of
from tersor.build.layers import install
from tersor.build.layout import Layout
from tersor.curves.draw import site_metrics
from tersor.curves.limit import Limit
from tersor.errors import TersorError
from tersor.forms import as_values
from tersor.metrics import Metric, Side
from tersor.models.divergence import Divergence, softened
from tersor.models.files import Entry, copy_beside, file_bytes, shards_of, staged
from tersor.models.model import Batch, Model
from tersor.models.ondemand import is_on_demand
from tersor.models.sites import Site, block_of
from tersor.observe import collect
from tersor.observe.collect import outputs_of
from tersor.plan import UNTOUCHED, Choice, Interaction, Plan
from tersor.recover import means_of, shift_biases
from tersor.run import Run

Progress = Callable[[str, int, int], Any]
ON_DEMAND = "A model whose weights are read on demand cannot be sequential, have inputs rounded, or biases shifted."


@dataclass(frozen=True)
class Built:
    """What a build made: the plan with divergences as fitted, the bytes of its file."""

    plan: Plan
    weights_bytes: int


def build(
    run: Run,
    model: Model,
    sites: Sequence[Site],
    plan: Plan,
    out: Path,
    *,
    sequential: Sequence[Batch] | None = None,
    activations: Activations | None = None,
    calibration: Sequence[Batch] = (),
    recover: Batch | None = None,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress = lambda *_: None,
) -> Built:
    """Fit and write `plan` to the folder `out`; the model is changed in place and is the built one afterwards.

    One whose weights are read on demand stays as it is. `sequential` are calibration batches: the inputs of every block
    of sites are observed anew as the built prefix really produces them. With `activations` the inputs of the built
    layers are rounded, as is best for those that the batches of `calibration` bring. With a batch to `recover` on,
    biases are shifted at the end so that every layer gives its old means there. With `shard_bytes` no weights file is
    larger, unless a tensor alone is. Raises TersorError where `out` exists and is no artifact, or cannot be written.
    """
    check_target(out)
    on_demand = is_on_demand(model.module)
    if on_demand and any(given is not None for given in (sequential, activations, recover)):
        raise TersorError(ON_DEMAND)
    if activations is not None and not calibration:
        raise TersorError("To round activations, give calibration data: their inputs are measured on them.")
    means = {} if recover is None else _means(model, recover)
    chosen = {c.site: c for c in plan.choices if c.form != UNTOUCHED}
    targets = [s for s in sites if s.name in chosen]
    dtypes = stored_dtypes(model.module, getattr(model, "checkpoint", None))
    layout = Layout.of(model.module, sites, dtypes)
    fits: Mapping[str, Fit]
    if sequential is not None:
        fits = _fit_in_order(run, model, targets, chosen, sequential, progress)
    else:
        for number, (site, _) in enumerate(fits_of(run, model, sites, plan.choices, workers)):
            progress(site.name, number, len(targets))
        fits = StoredFits(run, targets, chosen)
    if not on_demand:
        fits = dict(fits)
        for site in targets:
            install(model.module, site, [op.to(model.device) for op in fits[site.name].operators])
    rounded: list[Rounded] = []
    if activations is not None:
        rounded = round_inputs(run, model, targets, activations, calibration, progress)
    if recover is not None:
        shift_biases(model.module, lambda: outputs_of(model, recover, 1), means, model.masks(recover))
    plan = _as_built(run, plan, fits, rounded)
    built = [c for c in plan.choices if c.form != UNTOUCHED]
    entries = layout.entries(built, _tensors_of(model, rounded))
    stored = sum(map(file_bytes, shards_of(entries, shard_bytes)))
    plan = replace(plan, stored=stored, resident=stored + sum(c.resident - c.stored for c in built))
    folder = getattr(model, "folder", None)
    with staged(out, last=RECORD) as target:
        if folder is not None:
            copy_beside(folder, target)
        record = _record(run, model, layout, plan) | {"cuts": damages_of(run, sites, built, fits)}
        if activations is not None:
            record["activations"] = {"asked": activations.label, "layers": {r.place: asdict(r) for r in rounded}}
        tensor_of = contents_of(model.module, run, layout, list(chosen.values()))
        size = write_artifact(target, entries, tensor_of, sites, built, _config(model), record, rounded, shard_bytes)
        if size != stored:
            raise TersorError(f"{out} takes {size} bytes, but {stored} were predicted; please report this as a bug.")
    return Built(plan, size)


def _means(model: Model, batch: Batch) -> dict[str, Tensor]:
    """What the layers with a bias give in the mean; raises TersorError where there are none."""
    found = means_of(model.module, lambda: outputs_of(model, batch, 1), model.masks(batch))
    if not found:
        raise TersorError(f"{model.identity.source} has no layer with a bias, so there is none to shift.")
    return found


def _tensors_of(model: Model, rounded: Sequence[Rounded]) -> list[Entry]:
    """What the roundings of layers keep in the file."""
    roundings = {f"{r.place}.rounding": model.module.get_submodule(f"{r.place}.rounding") for r in rounded}
    return [(f"{name}.{n}", tuple(b.shape), b.dtype) for name, r in roundings.items() for n, b in r.named_buffers()]


def _as_built(run: Run, plan: Plan, fits: Mapping[str, Fit], rounded: Sequence[Rounded]) -> Plan:
    """The plan with the divergences of its choices as they were fitted, those of rounded inputs in the whole."""

    def fitted(choice: Choice) -> Choice:
        if choice.site not in fits:
            return choice
        fit = fits[choice.site]
        return replace(
            choice,
            setting=as_values(fit.setting),
            stored=sum(operator.nbytes for operator in fit.operators),
            resident=sum(operator.resident for operator in fit.operators),
            divergence=fit.divergence * run.gain(choice.site, choice.form, fit.divergence),
        )

    choices = tuple(fitted(choice) for choice in plan.choices)
    divergence = Interaction.of(run).whole(sum(c.divergence for c in choices) + sum(r.divergence for r in rounded))
    return replace(plan, choices=choices, divergence=divergence)


def _fit_in_order(
    run: Run,
    model: Model,
    targets: Sequence[Site],
    chosen: Mapping[str, Choice],
    batches: Sequence[Batch],
    progress: Progress,
) -> dict[str, Fit]:
    """Fit site after site, each under the inputs that the sites before it, already replaced, really produce."""
    fits: dict[str, Fit] = {}
    observed: dict[str, list[Metric]] = {}
    for number, site in enumerate(targets):
        progress(site.name, number, len(targets))
        if site.name not in observed:
            observed.update(_observe_again(run, model, targets[number:], batches))
        parameter = site.parameter(model.module)
        fits[site.name] = fit_choice(site.matrices(model.module).cpu(), observed[site.name], chosen[site.name])
        parameter.data = site.to_parameter(fits[site.name].matrices()).to(parameter.data).contiguous()
    return fits


def check_target(out: Path) -> None:
    """Refuse to write over anything that is not an artifact."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).exists())):
        raise TersorError(f"{out} exists and is no artifact of Tersor; choose another folder.")


def _observe_again(run: Run, model: Model, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, list[Metric]]:
    """Metrics of the next block of sites with the inputs that the built prefix produces, output moments as before.

    The inputs keep the mean square of the study's, so that nats stay nats.
    """
    block = block_of(sites[0].name)
    members = [s for s in sites if block_of(s.name) == block and s.kind != "table" and s.stack == 1]
    gradients = run.get("metric") != "input"
    collector = collect(model, members, batches, gradients=gradients, seed=0, divergence=_as_studied(run, model))
    damping = run.get("damping")
    out: dict[str, list[Metric]] = {s.name: site_metrics(run, s) for s in sites if block_of(s.name) == block}
    for site in members:
        summary = collector.summaries.get((site.name, 0, "linear"))
        if summary is not None and len(site.places) == 1:
            known = out[site.name][0]
            seen = (summary.weighted_inputs if summary.has_gradients else summary.inputs).float().cpu()
            if float(Side(seen).diagonal.mean()) <= 0:  # nothing reaches it any more
                continue
            scale = (known.judged_by or known).columns.diagonal.mean() / Side(seen).diagonal.mean()
            inputs = Side(seen * scale).damped(damping["inputs"])
            out[site.name] = [Metric(known.kind, known.rows, inputs, known.scale, known.judged_by)]
    return out


def _as_studied(run: Run, model: Model) -> Divergence:
    """The divergence of the model with the temperature at which the study sampled its labels."""
    found = run.get("certainty")
    return model.divergence if found is None else softened(model.divergence, found["temperature"])


def _config(model: Model) -> dict[str, Any] | None:
    folder = getattr(model, "folder", None)
    if folder is None:
        return None
    from tersor.models.config import read_config

    return read_config(folder)


def _record(run: Run, model: Model, layout: Layout, plan: Plan) -> dict[str, Any]:
    from tersor import __version__

    identity = model.identity
    limit = Limit.of(run, layout.sites, layout.file_bytes)
    return {
        "model": {
            "kind": identity.kind,
            "source": Path(identity.source).name if identity.kind == "huggingface" else identity.source,
            "fingerprint": identity.fingerprint,
            "stored_bytes": identity.stored_bytes,
        },
        "divergence": model.divergence.name,
        "plan": plan.as_json(),
        "limit": None if limit is None else limit.divergence(plan.stored),
        "site_weights": {site.name: site.parameters for site in layout.sites},
        "untouched": run.get("untouched", []),
        "unused_sites": run.get("unused_sites", []),
        "versions": {"tersor": __version__, "torch": torch.__version__},
    }


__all__ = ["Built", "build", "check_target"]
