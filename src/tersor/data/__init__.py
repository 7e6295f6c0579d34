"""Reading calibration and held-out data from files: texts, pairs of texts with a score, images with labels."""

from tersor.data.read import Data, read_data, read_pairs

__all__ = ["Data", "read_data", "read_pairs"]
