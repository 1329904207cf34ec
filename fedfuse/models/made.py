"""Made-up records of a schema, for looks at a model that must not take real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedfuse.batch import Batch, Kind, Schema, TargetKind
from fedfuse.models.backbone import PretrainedEncoder
from fedfuse.models.model import FusionModel

__all__ = ["made_batch"]


def made_batch(
    schema: Schema,
    rows: int,
    *,
    vocabulary: int,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Batch:
    """`rows` random records that have everything.

    model  what they are for: where it has frozen networks they come as features, as in training
    """
    draw = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for modality in schema.modalities:
        shape = (rows, *modality.shape)
        match modality.kind:
            case Kind.TEXT:
                inputs[modality.name] = torch.randint(1, vocabulary, shape, generator=draw)
            case Kind.IMAGE | Kind.VIDEO:
                inputs[modality.name] = torch.rand(shape, generator=draw)
            case _:
                inputs[modality.name] = torch.randn(shape, generator=draw)
    if isinstance(model, FusionModel):
        for name, encoder in zip(model.names, model.encoders, strict=True):
            features = encoder.made(rows, draw) if isinstance(encoder, PretrainedEncoder) else None
            inputs[name] = inputs[name] if features is None else features
    present = {name: torch.ones(rows, dtype=torch.bool) for name in schema.names}
    return Batch(inputs, present, _target(schema, rows, draw))


def _target(schema: Schema, rows: int, draw: torch.Generator) -> Tensor:
    target = schema.target
    match target.kind:
        case TargetKind.MULTILABEL:
            return torch.randint(0, 2, (rows, len(target.classes)), generator=draw).float()
        case TargetKind.REGRESSION:
            return torch.randn(rows, generator=draw)
        case _:
            return torch.randint(0, len(target.classes), (rows,), generator=draw)
