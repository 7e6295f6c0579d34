"""The run folder."""

from tersor.run.folder import Run, fingerprint_of
from tersor.run.gains import Gains

__all__ = ["Gains", "Run", "fingerprint_of"]
