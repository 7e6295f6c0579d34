"""Published methods as data: a form, a metric, an allocation. A paper is a row of `methods.toml`, not a module."""

from tersor.methods.method import ALLOCATIONS, METHODS, Method, method_named, read_methods
from tersor.methods.run import allocate, run_method

__all__ = ["ALLOCATIONS", "METHODS", "Method", "allocate", "method_named", "read_methods", "run_method"]
