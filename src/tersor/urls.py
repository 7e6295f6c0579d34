"""URLs where a folder could stand: `s3://bucket/run`, or what is left of it as a path, `s3:/bucket/run`."""

from __future__ import annotations

import re
from pathlib import Path

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")  # a drive of Windows has one letter


def url_of(place: str | Path) -> str | None:
    """The URL that a place is, None where it is a path."""
    found = _URL.fullmatch(str(place))
    if found is None:
        return None
    root = "/" if found[1] in ("file", "local") else ""
    return f"{found[1]}://{root}{found[2]}"
