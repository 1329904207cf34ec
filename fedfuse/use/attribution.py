"""What counted within one modality: integrated gradients, from other records to this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfuse.batch import Batch, Kind
from fedfuse.errors import ModelError
from fedfuse.models.model import FusionModel

__all__ = ["STEPS", "Attribution", "attribute", "check_captum", "repeated"]

STEPS = 48
"""Points on the way from a baseline to the record (Gauss-Legendre)."""
Said = Callable[[Batch], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """How much each part of a modality moved what is explained, against other records."""

    values: NDArray[np.float32]
    """As the modality's record: (C, H, W), (bands, frames), (T, F) or (F,); of words (L,)."""
    moved: float
    """What is explained, less its mean over the baselines: what `values` should sum to."""
    baselines: int
    """How many other records; 0: a blank one."""

    @property
    def gap(self) -> float:
        """How far the sum is from that: the error of the integral."""
        return float(self.values.sum()) - self.moved


def check_captum() -> None:
    """Raises ModelError where captum is not installed."""
    from importlib.util import find_spec

    if find_spec("captum") is None:
        raise ModelError(
            "the package captum is not installed", hint='pip install "fedfuse[explain]"'
        )


def attribute(
    model: FusionModel, said: Said, record: Batch, name: str, kind: Kind, others: Batch
) -> Attribution:
    """Integrated gradients of `said`, what is explained, (B,) of a batch, along one modality
    (Sundararajan, Taly and Yan 2017, arXiv:1703.01365v2, equation 1, by captum).

    record  one record that has the modality `name`
    others  records that have it too, which are the baselines: encoders bring records to one scale,
            so that a blank baseline shows little but the first step away from it. The mean over
            them is expected gradients (Erion et al. 2021, arXiv:1906.10670v2, equation 3). With
            none, a blank record.

    Of text the way leads from the other records' word vectors to this one's.
    """
    from captum.attr import IntegratedGradients

    own, base = record.inputs[name], others.inputs[name]
    if not own.is_floating_point():
        encoder = model.encoders[model.names.index(name)]
        layer = _embedding(encoder, own)
        own, base = (_vectors(encoder, layer, ids) for ids in (own, base))
    count = len(base)
    if not count:
        base = torch.zeros_like(own)

    def forward(x: Tensor) -> Tensor:
        batch = repeated(record, len(x))
        if record.inputs[name].is_floating_point():
            return said(replace(batch, inputs={**batch.inputs, name: x}))
        with _replaced(layer, x):
            return said(batch)

    whole = own.expand(len(base), *own.shape[1:]).contiguous()
    found = IntegratedGradients(forward).attribute(
        whole, base, n_steps=STEPS, method="gausslegendre", internal_batch_size=512
    )
    with torch.no_grad():
        moved = float((forward(whole) - forward(base)).mean())
    values = found.detach().mean(0)
    if kind is Kind.TEXT:
        values = values.sum(-1)
    return Attribution(values=values.float().numpy(), moved=moved, baselines=count)


def repeated(record: Batch, count: int) -> Batch:
    """One record, `count` times."""
    return record[torch.zeros(count, dtype=torch.int64)]


def _embedding(encoder: nn.Module, ids: Tensor) -> nn.Module:
    """The first layer that makes vectors (B, L, W) of ids (B, L)."""
    found: list[nn.Module] = []

    def look(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        first = _first(made)
        if given and torch.is_tensor(given[0]) and given[0].shape == ids.shape:
            words = not given[0].is_floating_point() and torch.is_tensor(first)
            if words and first.dim() == 3 and first.is_floating_point():
                found.append(module)

    hooks = [module.register_forward_hook(look) for module in encoder.modules()]
    try:
        with torch.no_grad():
            encoder(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ModelError(f"{type(encoder).__name__} has no layer that makes vectors of words")
    return found[0]


def _vectors(encoder: nn.Module, layer: nn.Module, ids: Tensor) -> Tensor:
    """What `layer` makes of ids (B, L): (B, L, W)."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, given, made: kept.append(_first(made)))
    try:
        with torch.no_grad():
            encoder(ids)
    finally:
        hook.remove()
    return kept[0].detach()


@contextmanager
def _replaced(layer: nn.Module, vectors: Tensor) -> Iterator[None]:
    """While it is entered, `layer` gives `vectors` whatever it gets."""

    def instead(module: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
        return (vectors, *made[1:]) if isinstance(made, tuple) else vectors

    hook = layer.register_forward_hook(instead)
    try:
        yield
    finally:
        hook.remove()


def _first(made: Any) -> Any:
    return made[0] if isinstance(made, tuple) else made
