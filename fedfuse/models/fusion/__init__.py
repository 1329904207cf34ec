"""How modality tokens become one vector: one file for each family of operators."""

from __future__ import annotations

from torch import nn

from fedfuse.models.fusion.attention import AttentionFusion
from fedfuse.models.fusion.concat import ConcatFusion
from fedfuse.models.spec import ModelConfig

__all__ = ["build_fusion"]


def build_fusion(modalities: int, config: ModelConfig) -> tuple[nn.Module, int]:
    """The operator that `config` names, and the width of what it gives.

    Every operator maps z (B, M, D) and seen (B, M) bool to (B, width).
    """
    match config.fusion:
        case "attention":
            return (
                AttentionFusion(modalities, config.dim, config.fusion_heads, config.fusion_layers),
                config.dim,
            )
        case _:
            return ConcatFusion(), modalities * (config.dim + 1)
