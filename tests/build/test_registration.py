"""transformers learns of Tersor's artifacts whichever of the two is imported first, and `import tersor` stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'tersor' in known"


@pytest.mark.parametrize("first", ["import tersor, transformers", "import transformers.quantizers.auto, tersor"])
def test_either_may_be_imported_first(first: str) -> None:
    subprocess.run([sys.executable, "-c", f"{first}; {KNOWN}"], check=True, timeout=120)


def test_importing_tersor_is_light_and_leaves_transformers_alone() -> None:
    code = (
        "import sys, tersor; "
        "assert not {'torch', 'numpy', 'scipy', 'transformers'} & set(sys.modules), 'heavy'; "
        "import importlib.util; assert importlib.util.find_spec('transformers') is not None; "
        "import transformers.quantizers.auto as auto; assert auto.__loader__ is auto.__spec__.loader; "
        "assert not any(type(f).__module__.startswith('tersor') for f in sys.meta_path), 'finder left behind'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
