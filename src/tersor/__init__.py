"""Tersor: replace a trained network by something cheaper, within a budget, at the least loss, and say what was lost."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tersor.registration import register_when_imported

__version__ = "0.1.0"

_PUBLIC = {
    "TersorError": "tersor.errors",
    "compress": "tersor.steps",
    "study": "tersor.steps",
    "open_study": "tersor.steps",
    "mirrored": "tersor.run.mirror",
    "build_plan": "tersor.steps",
    "judge_artifact": "tersor.steps",
    "load": "tersor.build.load",
    "export": "tersor.export.export",
    "open_model": "tersor.models",
    "custom_divergence": "tersor.models",
    "FORMS": "tersor.forms",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import tersor` costs next to nothing."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])


register_when_imported()
