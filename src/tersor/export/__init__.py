"""Writing a built model in the formats that others read."""

from tersor.export.export import TARGETS, Exported, export

__all__ = ["TARGETS", "Exported", "export"]
