"""The peers and what each is asked for, from 8 bits down to 2, wherever it offers them; all else is its own default.

Groups are those that the widths of a model allow: 32 divides all of BabyLlama's and PyLM's, 128 all of MiniLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GROUPS = {"babyllama": (32,), "pylm": (32,), "minilm": (128, 32)}
Settings = list[dict[str, Any]]


def settings_of(peer: str, model: str) -> Settings:
    """The settings to run a peer at on a model, largest first; none where it has nothing for such a model.

    tensorly-torch takes more than half an hour a setting for MiniLM, so it is not asked.
    """
    if model == "resnet56":
        return _IMAGES.get(peer, [])
    if (peer, model) == ("tensorly-torch", "minilm"):
        return []
    found = _TEXT[peer](GROUPS[model])
    if model == "minilm":  # llmcompressor's AWQ finds nothing to scale there; nncf's scales activations, not weights
        found = [{**s, "awq": False} if "awq" in s else s for s in found if s.get("method") != "awq"]
    return found


def label_of(setting: dict[str, Any]) -> str:
    """A setting as it is printed: `gptq int4 g32 asymmetric`."""
    known = dict(setting)
    parts = [str(known.pop(key)) for key in ("method", "mode", "factorization") if key in known]
    if "bits" in known:
        parts.append(f"int{known.pop('bits')}")
    if "effective_bits" in known:
        parts.append(f"{known.pop('effective_bits')} effective bits of " + "/".join(map(str, known.pop("formats"))))
    if "group" in known:
        parts.append(f"g{known.pop('group')}")
    if "symmetric" in known:
        parts.append("symmetric" if known.pop("symmetric") else "asymmetric")
    words = (f"{key} {value}" if value is not True else key.replace("_", " ") for key, value in known.items())
    return " ".join([*parts, *words])


def _grid(bits: tuple[int, ...], groups: tuple[int, ...], **fixed: Any) -> Settings:
    return [{**fixed, "bits": b, "group": g} for b in bits for g in groups]


def _llmcompressor(groups: tuple[int, ...]) -> Settings:
    """AWQ at 4 bits, what it is for: its search takes ten times as long as GPTQ."""
    gptq = _grid((8, 4), groups, method="gptq", symmetric=False) + _grid((3, 2), (32,), method="gptq", symmetric=False)
    return gptq + _grid((4,), (32,), method="awq", symmetric=False)


def _gptqmodel(groups: tuple[int, ...]) -> Settings:
    corrected = [{"method": "gptq", "bits": bits, "group": 32, "eora": 8} for bits in (3, 2)]
    return _grid((8,), groups, method="gptq") + _grid((4, 3, 2), (32,), method="gptq") + corrected


def _auto_round(groups: tuple[int, ...]) -> Settings:
    return [{"bits": bits, "group": 32, "symmetric": bits > 2} for bits in (4, 3, 2)]


def _modelopt(groups: tuple[int, ...]) -> Settings:
    return [{"formats": [8, 4, 3, 2], "group": 32, "effective_bits": bits} for bits in (8.0, 6.0, 4.0, 3.0, 2.5)]


def _nncf(groups: tuple[int, ...]) -> Settings:
    mixed = {"mode": "int4_asym", "group": 32, "awq": True, "scale_estimation": True}
    return [{"mode": "int8_asym"}, *({**mixed, "ratio": ratio} for ratio in (0.5, 0.8, 1.0))]


_TEXT: dict[str, Callable[[tuple[int, ...]], Settings]] = {
    "auto-round": _auto_round,
    "gptqmodel": _gptqmodel,
    "hqq": lambda groups: _grid((8, 4, 3, 2), (64, 32)),
    "llmcompressor": _llmcompressor,
    "modelopt": _modelopt,
    "nncf": _nncf,
    "quanto": lambda groups: [{"bits": bits} for bits in (8, 4, 2)],
    "tensorly-torch": lambda groups: [{"factorization": "cp", "rank": rank} for rank in (0.5, 0.25)],
    "torchao": lambda groups: [{"bits": 8}, *_grid((4,), groups)],
}
_IMAGES: dict[str, Settings] = {
    "modelopt": [{"formats": [8, 4, 3, 2], "effective_bits": bits} for bits in (8.0, 6.0, 4.0, 3.0, 2.5)],
    "nncf": [{"mode": "int8_asym"}, {"mode": "int4_asym", "ratio": 1.0, "group": 32}],
    "quanto": [{"bits": bits} for bits in (8, 4, 2)],
    "tensorly-torch": [{"factorization": kind, "rank": rank} for kind in ("tucker", "cp") for rank in (0.5, 0.25)],
    "torchao": [{"bits": 8}],
}
