"""Recovery: what is done after building to win fidelity back, without a byte more."""

from tersor.recover.means import means_of, shift_biases

__all__ = ["means_of", "shift_biases"]
