"""The form of every fact that a run may hold, and of a judgement: what is read is held against it before it is used."""

from __future__ import annotations

from typing import Any

from tersor.foreign import COUNT, NUMBER, POSITIVE, Row

ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
SIZES = {"stored": COUNT, "resident": COUNT, "peak": (COUNT, None), "flops": COUNT}
LATENCY = {"original": float, "new": float, "ratio": float}
JUDGEMENT = {
    "unit": str,
    "divergence": {"value": float, "low": float, "high": float},
    "predicted": (float, None),
    "samples": COUNT,
    "predictions": COUNT,
    "scores": [{"name": str, **dict.fromkeys(("original", "new", "difference"), (ESTIMATE, None))}],
    "original": SIZES,
    "new": SIZES,
    "latency": (LATENCY, None),
    "latency_of_one?": (LATENCY, None),
    "predicted_speed?": (float, None),
}
PLACES = [Row((str, str))]
UNTOUCHED_ROWS = [Row((str, COUNT, COUNT, str))]
_SITE = {
    "name": str, "kind": str, "places": PLACES, "parameter_shape": [POSITIVE], "dtype": str, "stack": POSITIVE,
    "shape": Row((POSITIVE, POSITIVE)),
}  # fmt: skip
_FACTS: dict[str, Any] = {
    "model": str,
    "divergence": str,
    "sites": [str],
    "layout": {"sites": [_SITE], "prefixes": [str], "tensors": [Row((str, [COUNT], str))]},
    "stored_bytes": POSITIVE,
    "untouched": UNTOUCHED_ROWS,
    "opening": (
        {"model": str, "weights": (str, None), "divergence": str, "include": [str], "exclude": [str]}, None,
    ),
    "calibration_data": str,
    "check_data": str,
    "settings": str,
    "metric": str,
    "seed": int,
    "source": str,
    "observed": bool,
    "spectra": (bool, None),
    "unseen_sites": [str],
    "unused_sites": [str],
    "studied": [str],
    "certainty": ({"temperature": float, "is_certain": bool}, None),
    "damping": ({str: float}, None),
    "damping_evidence": [{"inputs": float, "gradients": float, "frequencies": float, "table": bool}],
    "interaction": [Row((float, float))],
    "drawn_for": ({"resources": [str], "left_out": [str]}, None),
    "worth_probing": ({str: [str]}, None),
    "latencies": {"machine": str, "whole": float, "calls": {str: [str]}, "layers": {str: {str: float}}},
}  # fmt: skip
_BY_PREFIX: dict[str, Any] = {
    "gain/": {
        "gain?": float,
        "by_form?": {str: float},
        "borrowed?": {str: float},
        "predicted?": float,
        "measured?": float,
        "growth?": [Row((float, float))],
    },
    "observed/": bool,
    "seconds/": float,
    "judgement/": JUDGEMENT,
}
LASTING = ("model", "divergence", "sites", "layout", "stored_bytes", "untouched", "source", "metric")


def pattern_of(name: str) -> Any:
    """The form that the fact of a name must have; anything where it is none that a study puts."""
    return next((p for prefix, p in _BY_PREFIX.items() if name.startswith(prefix)), _FACTS.get(name, object))
