"""How values of JSON are changed by chance, and what may come of reading them; whoever chooses is given."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tersor.errors import TersorError

Choose = Callable[[Sequence[Any]], Any]  # one of several
LEAVES = (
    None, True, -1, 0, 1, 2, 3, 1000, 1 << 40, 1 << 62, 1 << 70, -(1 << 63), 10**400, 0.5, -1.5, 1e308, float("nan"),
    float("inf"), "", "a", "../a", "\x1b[2J", "\u00e9", "int", "F32", [], {}, [[]], [1], {"a": {}},
)  # fmt: skip


@contextlib.contextmanager
def refused_or_read() -> Iterator[None]:
    """Inside, nothing may go wrong but in a sentence."""
    try:
        yield
    except TersorError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 700, text


def places(value: Any) -> list[tuple[Any, ...]]:
    """The ways to everything inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *rest) for key, child in items for rest in [(), *places(child)]]


def changed(choose: Choose, value: Any) -> Any:
    """A JSON value in which something is another, or missing."""
    value = copy.deepcopy(value)
    for _ in range(choose((1, 2))):
        found = places(value)
        if not found:
            break
        *way, last = choose(found)
        parent = value
        for key in way:
            parent = parent[key]
        if isinstance(parent, dict) and choose((True, False)):
            del parent[last]
        else:
            parent[last] = copy.deepcopy(choose(LEAVES))
    return value


def changed_json(choose: Choose, text: bytes) -> bytes:
    return json.dumps(changed(choose, json.loads(text))).encode()


def changed_header(choose: Choose, whole: bytes) -> bytes:
    """A safetensors file whose header is another; raises ValueError where there is none."""
    end = 8 + int.from_bytes(whole[:8], "little")
    text = changed_json(choose, whole[8:end])
    return len(text).to_bytes(8, "little") + text + whole[end:]


CHANGES = {"json": changed_json, "safetensors": changed_header}
