"""What the commands offer, for whoever needs no torch."""

from __future__ import annotations

__all__ = ["FORMATS"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
"""Of exported models: each format, and how its files end."""
