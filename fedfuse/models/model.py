"""The fusion model: an encoder for each modality, a fusion, a head."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedfuse.batch import Batch, Schema
from fedfuse.models.auxiliary import Auxiliary
from fedfuse.models.blocks import sinusoids
from fedfuse.models.encoder import Encoder
from fedfuse.models.encoders import build_encoder
from fedfuse.models.fusion import EarlyFusion, Place, SequenceFusion, build_fusion
from fedfuse.models.fusion.late import LateFusion
from fedfuse.models.fusion.operator import hide
from fedfuse.models.knowledge import Graph, read_graph
from fedfuse.models.raw import RawFeatures, raw_width
from fedfuse.models.shifts import shifts_of
from fedfuse.models.spec import ModelConfig
from fedfuse.uncompiled import Undrawn

__all__ = ["FusionModel", "build_model", "count_parameters"]


class FusionModel(nn.Module):
    """head(fusion(encoders)). Row i of the output depends on record i alone."""

    def __init__(
        self, schema: Schema, config: ModelConfig, vocabulary: int, graph: Graph | None = None
    ) -> None:
        super().__init__()
        self.names = schema.names
        self.modality_dropout = config.modality_dropout
        self.shifts = shifts_of(schema, config)
        outputs = schema.target.outputs
        fusion = build_fusion(
            Place(
                modalities=len(self.names),
                outputs=outputs,
                config=config,
                raw=[raw_width(modality, config) for modality in schema.modalities]
                if config.fusion == "early"
                else [],
                graph=graph,
            )
        )
        early, sequence = isinstance(fusion, EarlyFusion), isinstance(fusion, SequenceFusion)
        self.encoders = nn.ModuleList(
            RawFeatures(modality, config, vocabulary)
            if early
            else build_encoder(modality, config, vocabulary, sequence=sequence)
            for modality in schema.modalities
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in self.names if not early)
        # An Embedding and not a bare Parameter: per-record gradients are then exact.
        self.absent = (
            nn.Embedding(len(self.names), config.dim) if config.absent == "learned" else None
        )
        self.fusion = fusion
        self.head = _head(fusion.width, config.head_width, outputs)
        self.auxiliary = (
            Auxiliary(
                config.auxiliary,
                schema.target,
                len(self.names),
                config.dim,
                heads=not isinstance(fusion, LateFusion),
            )
            if config.auxiliary.any
            else None
        )

    def forward(self, batch: Batch) -> Tensor:
        """(B, outputs): logits, or the target in public units. In training, with auxiliary losses,
        the columns of `Auxiliary` come after them."""
        seen = torch.stack([batch.present[name] for name in self.names], 1)
        if isinstance(self.fusion, EarlyFusion):
            return self.head(self.fusion(self._raw(batch), seen))  # type: ignore[no-any-return]
        if isinstance(self.fusion, SequenceFusion):
            tokens, masks = self._sequences(batch, seen)
            fused = self.fusion(tokens, masks)
        else:
            z, visible = self._tokens(batch, seen)
            fused = self.fusion(z, visible)
        outputs: Tensor = self.head(fused)
        if self.auxiliary is None or not self.training:
            return outputs
        if isinstance(self.fusion, SequenceFusion):
            z = torch.stack([each[:, 0] for each in tokens], 1)
        own = None
        if isinstance(self.fusion, LateFusion) and self.auxiliary.config.unimodal:
            own = self.fusion.said(z)
        return torch.cat([outputs, self.auxiliary(z, seen, own)], 1)

    def part_of(self, parameter: str) -> str:
        """The modality that alone a parameter (by its name in the model) serves, or "rest"."""
        kind, number, *_ = parameter.split(".")
        return self.names[int(number)] if kind in ("encoders", "norms") else "rest"

    def _tokens(self, batch: Batch, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D), absent ones zero or learned, and which of them the operator may look at."""
        tokens = [
            hide(norm(encoder(batch.inputs[name])), batch.present[name])
            for name, encoder, norm in zip(self.names, self.encoders, self.norms, strict=True)
        ]
        z = torch.stack(tokens, 1)
        if self.absent is None:
            return z, seen
        return torch.where(seen.unsqueeze(-1), z, self._stand_ins(seen)), torch.ones_like(seen)

    def _sequences(self, batch: Batch, seen: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """M sequences (B, 1 + T_m, D) with positions, and which tokens of each are there."""
        stand_ins = None if self.absent is None else self._stand_ins(seen)
        sequences, masks = [], []
        for m, (name, encoder, norm) in enumerate(
            zip(self.names, self.encoders, self.norms, strict=True)
        ):
            assert isinstance(encoder, Encoder)
            tokens, real = encoder.sequence(batch.inputs[name])
            tokens = norm(tokens)
            tokens = hide(tokens + sinusoids(tokens.shape[1], tokens.shape[2], tokens), seen[:, m])
            real = real & seen[:, m, None]
            if stand_ins is not None:  # in the place of the whole
                first = torch.where(seen[:, m, None], tokens[:, 0], stand_ins[:, m])
                tokens = torch.cat([first.unsqueeze(1), tokens[:, 1:]], 1)
                real = torch.cat([torch.ones_like(real[:, :1]), real[:, 1:]], 1)
            sequences.append(tokens)
            masks.append(real)
        return sequences, masks

    def _raw(self, batch: Batch) -> list[Tensor]:
        return [
            hide(features(batch.inputs[name]), batch.present[name])
            for name, features in zip(self.names, self.encoders, strict=True)
        ]

    def _stand_ins(self, seen: Tensor) -> Tensor:
        """(B, M, D): the learned token of each modality."""
        assert self.absent is not None
        return self.absent(torch.arange(seen.shape[1], device=seen.device).expand_as(seen))  # type: ignore[no-any-return]


def build_model(
    schema: Schema,
    config: ModelConfig,
    *,
    vocabulary: int = 4096,
    seed: int = 0,
    graph: Graph | None = None,
) -> FusionModel:
    """The model that `config` describes for `schema`, with first weights that follow from `seed`.

    `graph` goes before the file that config.knowledge names. torch's global generator is left as
    it was. Raises DataError where the file cannot be used, ModelError where the operator cannot.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusionModel(schema, config, vocabulary, _graph(config, graph))


@lru_cache(maxsize=64)
def count_parameters(schema: Schema, config: ModelConfig, *, vocabulary: int = 4096) -> int:
    """How many weights of that model are trained. No memory is taken for them."""
    with torch.device("meta"), Undrawn():
        model = FusionModel(schema, config, vocabulary, _graph(config, None))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _graph(config: ModelConfig, graph: Graph | None) -> Graph | None:
    if graph is None and config.fusion == "graph":
        return read_graph(Path(config.knowledge), config.knowledge_sha256)
    return graph


def _head(width: int, hidden: int, outputs: int) -> nn.Module:
    """(B, width) -> (B, outputs); nothing where the operator gave the outputs itself."""
    if not width:
        return nn.Identity()
    if not hidden:
        return nn.Linear(width, outputs)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))
