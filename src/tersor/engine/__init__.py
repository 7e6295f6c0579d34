"""Running units of work: here, in processes of this machine, or on a Ray cluster."""

from tersor.engine.units import ENGINES, map_units, pool_of, threads

__all__ = ["ENGINES", "map_units", "pool_of", "threads"]
