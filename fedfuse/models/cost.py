"""What a model costs: parameters, arithmetic, and bytes on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedfuse.batch import Batch, Kind, Modality, Schema, TargetKind
from fedfuse.models.model import FusionModel

__all__ = ["Cost", "cost_of", "cost_of_encoder", "one_record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one model or one part of it."""

    parameters: int
    """Trained numbers; under DP noise grows with their number."""
    flops: int
    """Floating-point operations of a forward pass of one record, a multiply and an add as two, in
    matrix products and convolutions, as `torch.utils.flop_counter` counts them."""
    bytes_per_round: int
    """A node's model down and up again, without the message around it."""


def cost_of(model: FusionModel, schema: Schema) -> dict[str, Cost]:
    """The cost of the whole ("all"), and of the operator with its head ("fusion")."""
    batch = one_record(schema)
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(batch)
    counts = counter.get_flop_counts()
    own = [model.fusion, model.head, *([model.absent] if model.absent is not None else [])]
    flops = sum(
        sum(found.values())
        for name, found in counts.items()
        if name in ("FusionModel.fusion", "FusionModel.head")
    )
    return {
        "all": _cost(model.state_dict().values(), model, counter.get_total_flops()),
        "fusion": _cost(
            (value for part in own for value in part.state_dict().values()),
            nn.ModuleList(own),
            flops,
        ),
    }


def cost_of_encoder(encoder: nn.Module, modality: Modality) -> Cost:
    """The cost of one encoder alone."""
    encoder.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        encoder(_zeros(modality))
    return _cost(encoder.state_dict().values(), encoder, counter.get_total_flops())


def one_record(schema: Schema) -> Batch:
    """A batch of one record that has everything, all zero (text: the first word)."""
    inputs = {modality.name: _zeros(modality) for modality in schema.modalities}
    present = {name: torch.ones(1, dtype=torch.bool) for name in schema.names}
    several = schema.target.kind is TargetKind.MULTILABEL
    target = torch.zeros(1, len(schema.target.classes)) if several else torch.zeros(1)
    return Batch(inputs, present, target)


def _zeros(modality: Modality) -> Tensor:
    if modality.kind is Kind.TEXT:
        return torch.ones((1, *modality.shape), dtype=torch.int64)
    return torch.zeros((1, *modality.shape))


def _cost(state: Iterable[Tensor], module: nn.Module, flops: int) -> Cost:
    return Cost(
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        flops=flops,
        bytes_per_round=2 * sum(value.numel() * value.element_size() for value in state),
    )
