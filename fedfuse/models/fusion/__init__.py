"""How modalities become one vector: one file for each family of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedfuse.errors import ModelError
from fedfuse.models.fusion.attention import AttentionFusion
from fedfuse.models.fusion.bottleneck import BottleneckFusion
from fedfuse.models.fusion.concat import ConcatFusion, MlpFusion, RawFusion
from fedfuse.models.fusion.crossmodal import CoAttentionFusion, CrossAttentionFusion
from fedfuse.models.fusion.film import FilmFusion
from fedfuse.models.fusion.graph import GraphFusion
from fedfuse.models.fusion.late import ExpertsFusion, LateFusion
from fedfuse.models.fusion.operator import EarlyFusion, Fusion, SequenceFusion, TokenFusion
from fedfuse.models.fusion.tensor import LowRankFusion, MultiplicativeFusion, TensorFusion
from fedfuse.models.fusion.weighted import GatedFusion, SumFusion
from fedfuse.models.knowledge import Graph
from fedfuse.models.spec import ModelConfig

__all__ = [
    "OPERATORS",
    "EarlyFusion",
    "Fusion",
    "Place",
    "SequenceFusion",
    "TokenFusion",
    "build_fusion",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an operator stands in a model."""

    modalities: int
    outputs: int
    """Of the whole model, for an operator that needs no head."""
    config: ModelConfig
    raw: Sequence[int] = ()
    """The widths of the raw features, for early fusion."""
    graph: Graph | None = None

    @property
    def dim(self) -> int:
        """D, the width of a token."""
        return self.config.dim

    @property
    def width(self) -> int:
        """What the operators give that can choose."""
        return self.config.fusion_width or self.config.dim

    @property
    def layers(self) -> int:
        """Layers of the operators that have layers."""
        return self.config.fusion_layers

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.config.fusion_heads

    @property
    def rank(self) -> int:
        """Of products between modalities."""
        return self.config.fusion_rank


def _graph(place: Place) -> GraphFusion:
    if place.graph is None:
        raise ModelError(
            "there is no graph", where="model.knowledge", hint="name a file of triples"
        )
    return GraphFusion(place.modalities, place.dim, place.layers, place.graph)


OPERATORS: dict[str, Callable[[Place], Fusion]] = {
    "concat": lambda p: ConcatFusion(p.modalities, p.dim),
    "sum": lambda p: SumFusion(p.modalities, p.dim),
    "gated": lambda p: GatedFusion(p.modalities, p.dim),
    "mlp": lambda p: MlpFusion(p.modalities, p.dim, p.width, p.layers),
    "multiplicative": lambda p: MultiplicativeFusion(p.modalities, p.dim, p.rank, p.width),
    "tensor": lambda p: TensorFusion(p.modalities, p.dim, p.rank),
    "low-rank": lambda p: LowRankFusion(p.modalities, p.dim, p.rank, p.width),
    "film": lambda p: FilmFusion(p.modalities, p.dim),
    "attention": lambda p: AttentionFusion(p.modalities, p.dim, p.heads, p.layers),
    "cross-attention": lambda p: CrossAttentionFusion(p.modalities, p.dim, p.heads, p.layers),
    "co-attention": lambda p: CoAttentionFusion(p.modalities, p.dim, p.heads, p.layers),
    "bottleneck": lambda p: BottleneckFusion(
        p.modalities, p.dim, p.heads, p.layers, p.config.fusion_tokens
    ),
    "experts": lambda p: ExpertsFusion(p.modalities, p.dim),
    "graph": _graph,
    "late": lambda p: LateFusion(p.modalities, p.dim, p.config.head_width, p.outputs),
    "early": lambda p: RawFusion(p.raw, p.width, p.layers),
}
"""Each operator by its name in the configuration; the names alone are in `spec.FUSIONS`."""


def build_fusion(place: Place) -> Fusion:
    """The operator that the configuration names. Raises ModelError."""
    name = place.config.fusion
    if name not in OPERATORS:
        raise ModelError(
            f"model.fusion = {name!r} is unknown", hint=f"take one of {', '.join(OPERATORS)}"
        )
    return OPERATORS[name](place)
