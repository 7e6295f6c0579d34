"""The run folder."""

from tersor.run.folder import Run, fingerprint_of

__all__ = ["Run", "fingerprint_of"]
