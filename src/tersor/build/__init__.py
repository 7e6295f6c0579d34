"""Fitting a plan, putting it into the model, writing and loading the artifact."""

from tersor.build.artifact import read_record
from tersor.build.build import Built, build
from tersor.build.layers import decoded, operators_of
from tersor.build.load import load, register

__all__ = ["Built", "build", "decoded", "load", "operators_of", "read_record", "register"]
