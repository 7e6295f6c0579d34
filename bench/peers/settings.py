"""The peers and what each is asked for, from 8 bits down to 2, wherever it offers them; all else is its own default.

Groups are those that the widths of a model allow: 32 divides all of BabyLlama's and PyLM's, 128 all of MiniLM's.
"""

from __future__ import annotations

from typing import Any

from peers.setup import PEERS

GROUPS = {"babyllama": (32,), "pylm": (32,), "minilm": (128, 32)}
ANY_MODULE = ("torchao", "modelopt", "quanto", "nncf")  # of them, what quantises convolutions is asked for ResNet-56


def settings_of(peer: str, model: str) -> list[dict[str, Any]]:
    """The settings to run a peer at on a model, largest first; none where it has nothing for such a model."""
    if peer not in PEERS:
        return []
    if model == "resnet56":
        return _IMAGES.get(peer, [])
    return [s for bits_and_groups in (_TEXT[peer],) for s in bits_and_groups(GROUPS[model], model)]


def label_of(setting: dict[str, Any]) -> str:
    """A setting as it is printed: `gptq int4 g32`."""
    known = {k: v for k, v in setting.items() if v is not None}
    parts = [str(known.pop("method"))] if "method" in known else []
    if "bits" in known:
        parts.append(f"int{known.pop('bits')}")
    if "group" in known:
        parts.append(f"g{known.pop('group')}")
    return " ".join([*parts, *(f"{k} {v}" for k, v in known.items())])


def _grid(bits: tuple[int, ...], groups: tuple[int, ...], **fixed: Any) -> list[dict[str, Any]]:
    return [{**fixed, "bits": b, "group": g} for b in bits for g in groups]


def _hqq(groups: tuple[int, ...], model: str) -> list[dict[str, Any]]:
    return _grid((8, 4, 3, 2), (64, 32))


_TEXT = {"hqq": _hqq}
_IMAGES: dict[str, list[dict[str, Any]]] = {}
