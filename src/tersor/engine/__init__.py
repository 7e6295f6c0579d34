"""Running units of work: here, or in processes of this machine."""

from tersor.engine.local import map_units, pool_of, threads

__all__ = ["map_units", "pool_of", "threads"]
