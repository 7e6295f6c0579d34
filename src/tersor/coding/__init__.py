"""Entropy coding of integer matrices: the probability tables and the stream format (`docs/stream.md`)."""

from tersor.coding.stream import Coded, StreamError, code_costs, decode, encode

__all__ = ["Coded", "StreamError", "code_costs", "decode", "encode"]
