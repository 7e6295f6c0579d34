"""Summaries against brute force: the same sums taken from inputs and gradients that hooks on the layers caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.models import open_model, walk
from tersor.models.model import Model
from tersor.observe import Collector, Summary, collect, unseen
from tersor.observe.collect import generator_of


def summaries(model: Model, batches: list[Any], gradients: bool = True) -> Collector:
    sites = walk(model.module, minimum=0).sites
    return collect(model, sites, model.batches(_data(batches), None, 0, 0), gradients=gradients, seed=0)


def _data(batches: list[Any]) -> Any:
    from tersor.data import Data

    return Data("test", batches=batches)


class Watched:
    """Inputs and output gradients of every call of the layers of a module, caught by hooks."""

    def __init__(self, module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        self.calls: dict[str, list[list[Tensor]]] = {}
        for name, layer in module.named_modules():
            if isinstance(layer, kinds):
                layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            call = [inputs[0].detach()]
            self.calls.setdefault(name, []).append(call)
            output.register_hook(lambda gradient: call.append(gradient))

        return hook


def by_hand(model: Model, batches: list[Any], kinds: tuple[type[nn.Module], ...]) -> Watched:
    """Run the same probes as `collect` with seed 0, watched from outside."""
    watched = Watched(model.module, kinds)
    model.module.eval()
    for number, batch in enumerate(model.batches(_data(batches), None, 0, 0), 1):
        model.divergence.probe(model.outputs(batch), generator_of(0, number, model.device)).backward()
    return watched


def assert_sums(summary: Summary, x: Tensor, g: Tensor) -> None:
    """`x` (n, in) and `g` (n, out) give the sums of the summary."""
    x, g = x.double(), g.double()
    size, strength = x.square().sum(1), g.square().sum(1)
    assert summary.positions == len(x)
    close = {"rtol": 1e-3, "atol": 1e-6}
    assert torch.allclose(summary.inputs.double(), x.T @ x, **close)
    assert torch.allclose(summary.input_sum.double(), x.sum(0), **close)
    assert torch.allclose(summary.weighted_inputs.double(), (x * strength[:, None]).T @ x, **close)
    assert torch.allclose(summary.weighted_gradients.double(), (g * size[:, None]).T @ g, **close)
    assert summary.mass == pytest.approx(float((size * strength).sum()), rel=1e-3)


def test_linear_layers() -> None:
    model = open_model(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    )
    batches = [torch.randn(7, 6) for _ in range(3)]
    found = summaries(model, batches)
    calls = by_hand(model, batches, (nn.Linear,)).calls
    assert len(found.summaries) == len(calls) == 3
    for name, seen in calls.items():
        x, g = (torch.cat([call[k] for call in seen]) for k in (0, 1))
        assert_sums(found.summaries[name, 0, "linear"], x, g)
        assert found.summaries[name, 0, "linear"].predictions == 21


CONVOLUTIONS = [
    (nn.Conv2d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 4, "stride": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "groups": 2}),
    (nn.Conv1d, {"kernel_size": 3, "padding": "valid", "dilation": 2}),
]


@pytest.mark.parametrize(("kind", "arguments"), CONVOLUTIONS, ids=str)
def test_convolutions(kind: Callable[..., nn.Module], arguments: dict[str, Any]) -> None:
    """The gradient of a kernel is the sum of `g x^T` over patches: autograd must agree with the unfolded rows."""
    layer: Any = kind(4, 8, **arguments)
    flat = nn.Flatten(1)
    model = open_model(nn.Sequential(layer, flat), divergence="mse")
    x = torch.randn(3, 4, *([9, 8] if kind is nn.Conv2d else [12]))
    collector = summaries(model, [x])
    summary = collector.summaries["0", 0, "linear"]
    calls = by_hand(model, [x], (kind,)).calls["0"]  # type: ignore[arg-type]
    groups = layer.groups
    output_gradient = calls[0][1].flatten(2).transpose(1, 2)  # (batch, positions, out)
    patches = patches_by_loop(layer, x)  # (batch, positions, groups, in)
    weight_gradient = torch.einsum("bpgo,bpgi->goi", output_gradient.unflatten(2, (groups, -1)), patches).reshape(
        layer.weight.shape
    )
    assert torch.allclose(weight_gradient, layer.weight.grad, rtol=1e-3, atol=1e-4)  # the patches are right
    g = torch.zeros(*patches.shape[:3], 8)
    for k in range(groups):
        span = slice(k * 8 // groups, (k + 1) * 8 // groups)
        g[:, :, k, span] = output_gradient[..., span]
    assert_sums(summary, patches.reshape(-1, patches.shape[-1]), g.reshape(-1, 8))


def patches_by_loop(layer: Any, x: Tensor) -> Tensor:
    """Patches from a convolution with one-hot kernels, an entry of the kernel at a time."""
    groups, size = layer.groups, layer.weight[0].numel()
    columns = []
    with torch.no_grad():
        for entry in range(size):
            kernel = torch.zeros(groups, size)
            kernel[:, entry] = 1
            kernel = kernel.view(groups, *layer.weight.shape[1:])
            kept, layer.weight.data, bias = layer.weight.data, kernel, layer.bias
            layer.bias = None
            columns.append(layer(x).flatten(2).transpose(1, 2))
            layer.weight.data, layer.bias = kept, bias
    return torch.stack(columns, -1)


class Tied(nn.Module):
    """A table whose transpose is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.middle(self.table(index)).tanh()).flatten(0, 1)


def test_tables_and_tied_heads() -> None:
    model = open_model(Tied())
    sites = walk(model.module, minimum=0).sites
    assert [s.name for s in sites] == ["table", "middle"] and len(sites[0].places) == 2
    batches = [torch.randint(0, 12, (3, 5)) for _ in range(2)]
    found = summaries(model, batches)
    calls = by_hand(model, batches, (nn.Linear, nn.Embedding)).calls
    x, g = (torch.cat([c[k].flatten(0, 1) for c in calls["head"]]) for k in (0, 1))
    head = found.summaries["table", 0, "linear"]
    assert_sums(head, x, g)
    table = found.summaries["table", 0, "table"]
    index = torch.cat([c[0].flatten() for c in calls["table"]])
    g = torch.cat([c[1].flatten(0, 1) for c in calls["table"]]).double()
    one_hot = nn.functional.one_hot(index, 12).double()
    assert torch.equal(table.inputs, one_hot.sum(0))
    assert torch.allclose(table.weighted_inputs, one_hot.T @ g.square().sum(1), rtol=1e-4)
    assert torch.allclose(table.weighted_gradients.double(), g.T @ g, rtol=1e-3, atol=1e-7)
    assert found.rows_are_inputs == {
        ("table", 0, "table"): True, ("table", 0, "linear"): False, ("middle", 0, "linear"): False
    }  # fmt: skip


def test_gpt2_layers_are_turned() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(8, 6)  # in 6, out 8; the weight is (in, out)
    model = open_model(nn.Sequential(layer))
    (site,) = walk(model.module, minimum=0).sites
    assert site.kind == "transposed" and site.shape == (8, 6)
    x = torch.randn(9, 6)
    found = summaries(model, [x])
    calls = by_hand(model, [x], (pytorch_utils.Conv1D,)).calls["0"]
    assert_sums(found.summaries["0", 0, "linear"], x, calls[0][1])
    assert not found.rows_are_inputs["0", 0, "linear"]


def test_without_gradients_inputs_alone_are_counted() -> None:
    model = open_model(nn.Sequential(nn.Linear(6, 4)))
    x = torch.randn(11, 6)
    summary = summaries(model, [x], gradients=False).summaries["0", 0, "linear"]
    assert torch.allclose(summary.inputs.double(), (x.T @ x).double(), rtol=1e-4)
    assert not summary.has_gradients and summary.mass == 0


def test_the_prediction_is_exact_where_the_product_is() -> None:
    """One layer, one input: the Fisher matrix is a Kronecker product, so the metric predicts the divergence itself."""
    model = open_model(nn.Sequential(nn.Linear(6, 5, bias=False)))
    x = torch.randn(1, 6).expand(20000, 6)
    metric = summaries(model, [x]).summaries["0", 0, "linear"].metric("kronecker")
    error = 0.01 * torch.randn(5, 6)
    with torch.no_grad():
        layer: Any = model.module[0]  # type: ignore[index]
        before, after = layer(x[:1]), x[:1] @ (layer.weight + error).T
    assert metric.distance(error) == pytest.approx(float(model.divergence.compare(before, after)), rel=0.05)


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    module[0].weight.requires_grad_(False)
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    model = open_model(module)
    module.train()
    state = torch.get_rng_state()
    summaries(model, [torch.randn(5, 6, generator=torch.Generator().manual_seed(0))])
    assert module.training and not module[0].weight.requires_grad and module[3].weight.requires_grad
    assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Odd(nn.Module):
    """One weight used in a way that is not watched, one not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.multiplied, self.idle = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) + torch.einsum("bi,oi->bo", x, self.multiplied.weight * 2)


def test_a_use_that_is_not_watched_is_told_from_no_use() -> None:
    model = open_model(Odd())
    batch = torch.randn(4, 6)
    missing = [s for s in walk(model.module, minimum=0).sites if (s.name, 0, "linear") not in
               summaries(model, [batch]).summaries]  # fmt: skip
    assert [s.name for s in missing] == ["multiplied", "idle"]
    (example,) = model.batches(_data([batch]), None, 0, 0)
    assert unseen(model, missing, example) == ["multiplied"]
