"""Weights in int8, with a scale for each row."""

from ppo_fast.ops.quantize_rows.api import QuantizedRows, quantize_rows

__all__ = ["QuantizedRows", "quantize_rows"]
