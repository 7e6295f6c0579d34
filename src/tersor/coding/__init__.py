"""Entropy coding of integer matrices: the probability tables and the stream format (`docs/stream.md`)."""

from tersor.coding.stream import LARGEST, Coded, StreamError, code_costs, decode, encode

__all__ = ["LARGEST", "Coded", "StreamError", "code_costs", "decode", "encode"]
