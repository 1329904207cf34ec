"""Knowledge-graph fusion: tokens meet the concepts of a public graph, which talk and answer."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.errors import ModelError
from fedfuse.models.fusion.operator import Place, TokenFusion, flags, hide
from fedfuse.models.knowledge import Graph

__all__ = ["GraphFusion"]

_BASES = 4


class GraphFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, 2 M D + M): modality features meet a graph of N concepts.

    1. each token that is there is spread over the concepts by attention, and adds to their states
    2. `layers` rounds of message passing (Schlichtkrull et al. 2018, R-GCN, arXiv:1703.06103v4,
       equations 2 and 3: a matrix for each relation and its inverse, mixed of four bases; each
       relation's messages averaged), with a residual connection
    3. each token reads its own concepts again, by the same attention

    The graph is public: the same in every record and at every site. Learned are the concepts'
    vectors, an Embedding, and the matrices. Every record has its own states (B, N, D), so no
    operation mixes records.
    """

    source: Tensor
    target: Tensor
    relation: Tensor
    weight: Tensor

    def __init__(self, modalities: int, dim: int, layers: int, graph: Graph) -> None:
        super().__init__()
        self.width = modalities * (2 * dim + 1)
        source, target, relation, weight = _edges(graph)
        for name, value in (
            ("source", source), ("target", target), ("relation", relation), ("weight", weight),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)
        relations = 2 * len(graph.relations)
        self.bases = min(_BASES, relations)
        self.concepts = nn.Embedding(len(graph.concepts), dim)
        self.query = nn.Linear(dim, dim)
        self.write = nn.Linear(dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.own = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.talk = nn.ModuleList(
            nn.Linear(dim, self.bases * dim, bias=False) for _ in range(layers)
        )
        mixes = [nn.Embedding(relations, self.bases) for _ in range(layers)]
        for mix in mixes:
            nn.init.normal_(mix.weight, std=self.bases**-0.5)
        self.mix = nn.ModuleList(mixes)

    @classmethod
    def at(cls, place: Place) -> Self:
        if place.graph is None:
            raise ModelError(
                "there is no graph", where="model.knowledge", hint="name a file of triples"
            )
        return cls(place.modalities, place.dim, place.layers, place.graph)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, 2 M D + M)."""
        rows, dim, edges = z.shape[0], z.shape[2], len(self.source)
        which = torch.arange(self.concepts.num_embeddings, device=z.device).expand(rows, -1)
        concepts = self.concepts(which)
        near = self.nearness(z, seen, concepts)
        h = concepts + torch.einsum("bmn,bmd->bnd", near, self.write(z))
        for norm, own, talk, mix in zip(self.norms, self.own, self.talk, self.mix, strict=True):
            x = norm(h)
            said = talk(x)[:, self.source].view(rows, edges, self.bases, dim)
            share = mix(self.relation.expand(rows, -1)) * self.weight[:, None]
            message = torch.einsum("bek,bekd->bed", share.to(said.dtype), said)
            heard = torch.zeros_like(x).index_add(1, self.target, message)
            h = h + F.gelu(own(x) + heard)
        read = torch.einsum("bmn,bnd->bmd", near, h)
        return torch.cat([z.flatten(1), read.flatten(1), flags(seen, z)], 1)

    def nearness(self, z: Tensor, seen: Tensor, concepts: Tensor) -> Tensor:
        """z (B, M, D), concepts (B, N, D) -> (B, M, N): how each token that is there is spread over
        the concepts; the shares of one sum to 1, and are zero where it is absent."""
        score = torch.einsum("bmd,bnd->bmn", self.query(z), concepts) / math.sqrt(z.shape[2])
        return hide(score.softmax(2), seen)


def _edges(graph: Graph) -> tuple[Tensor, ...]:
    """Each edge and its inverse: from, to, relation (E,) int64; 1 / c_(i,r) (E,) float32."""
    head, kind, tail = (np.array(column, dtype=np.int64) for column in graph.columns())
    source, target = np.concatenate([head, tail]), np.concatenate([tail, head])
    relation = np.concatenate([kind, kind + len(graph.relations)])
    place = target * (2 * len(graph.relations)) + relation
    _, inverse, count = np.unique(place, return_inverse=True, return_counts=True)
    weight = (1.0 / count[inverse.reshape(-1)]).astype(np.float32)
    return tuple(torch.from_numpy(value) for value in (source, target, relation, weight))
