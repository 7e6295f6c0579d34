"""Telling transformers of Tersor's quantiser, whichever of the two is imported first.

`import tersor` must stay light, so it imports neither torch nor transformers: it leaves a finder that waits for the one
module of transformers where quantisers are registered, registers then, and is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AWAITED = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    """Finds nothing but the awaited module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads the awaited module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        from tersor.build.load import register

        register()


def register_when_imported() -> None:
    """Register now where transformers has its quantisers loaded, else as soon as it loads them."""
    if AWAITED in sys.modules:
        from tersor.build.load import register

        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
