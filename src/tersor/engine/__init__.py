"""Running units of work: here, or in processes of this machine."""

from tersor.engine.local import map_units

__all__ = ["map_units"]
