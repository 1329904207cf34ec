"""How modalities become one vector: one file for each family of operators."""

from __future__ import annotations

from importlib import import_module

from fedfuse.errors import ModelError
from fedfuse.models.fusion.operator import EarlyFusion, Fusion, Place, SequenceFusion, TokenFusion
from fedfuse.models.spec import FUSIONS

__all__ = [
    "EarlyFusion",
    "Fusion",
    "Place",
    "SequenceFusion",
    "TokenFusion",
    "build_fusion",
    "operator",
]


def build_fusion(place: Place) -> Fusion:
    """The operator that the configuration names. Raises ModelError."""
    return operator(place.config.fusion).at(place)


def operator(name: str) -> type[Fusion]:
    """The class of an operator, from the place that FUSIONS tells. Raises ModelError."""
    if name not in FUSIONS:
        raise ModelError(
            f"model.fusion = {name!r} is unknown", hint=f"take one of {', '.join(FUSIONS)}"
        )
    file, _, kind = FUSIONS[name].partition(".")
    found: object = getattr(import_module(f"{__name__}.{file}"), kind)
    if not (isinstance(found, type) and issubclass(found, Fusion)):
        raise ModelError(f"{FUSIONS[name]} is no fusion operator", where="models/spec.py")
    return found
