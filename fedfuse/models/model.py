"""The fusion model: an encoder for each modality, a fusion, a head."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from fedfuse.batch import Batch, Schema
from fedfuse.models.encoders import build_encoder
from fedfuse.models.fusion import build_fusion
from fedfuse.models.spec import ModelConfig

__all__ = ["FusionModel", "build_model", "count_parameters"]


class FusionModel(nn.Module):
    """head(fusion(encoders)). Row i of the output depends on record i alone."""

    def __init__(self, schema: Schema, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.names = schema.names
        self.encoders = nn.ModuleList(
            build_encoder(modality, config, vocabulary) for modality in schema.modalities
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in schema.modalities)
        self.fusion, width = build_fusion(len(self.names), config)
        outputs = schema.target.outputs
        self.head: nn.Module = (
            nn.Sequential(
                nn.Linear(width, config.head_width),
                nn.GELU(),
                nn.Linear(config.head_width, outputs),
            )
            if config.head_width
            else nn.Linear(width, outputs)
        )

    def forward(self, batch: Batch) -> Tensor:
        """(B, outputs): logits, or the target in public units."""
        tokens = []
        for name, encoder, norm in zip(self.names, self.encoders, self.norms, strict=True):
            token = norm(encoder(batch.inputs[name]))
            # where, not a product: an absent modality's gradient is then exactly zero.
            tokens.append(torch.where(batch.present[name][:, None], token, torch.zeros_like(token)))
        seen = torch.stack([batch.present[name] for name in self.names], 1)
        return self.head(self.fusion(torch.stack(tokens, 1), seen))  # type: ignore[no-any-return]

    def part_of(self, parameter: str) -> str:
        """The modality that alone a parameter (by its name in the model) serves, or "rest"."""
        kind, number, *_ = parameter.split(".")
        return self.names[int(number)] if kind in ("encoders", "norms") else "rest"


def build_model(
    schema: Schema, config: ModelConfig, *, vocabulary: int = 4096, seed: int = 0
) -> FusionModel:
    """The model that `config` describes for `schema`, with first weights that follow from `seed`.

    torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusionModel(schema, config, vocabulary)


@lru_cache(maxsize=64)
def count_parameters(schema: Schema, config: ModelConfig, *, vocabulary: int = 4096) -> int:
    """How many weights of that model are trained. No memory is taken for them."""
    with torch.device("meta"):
        model = FusionModel(schema, config, vocabulary)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
