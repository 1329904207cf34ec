"""Each operator against its formula, written out for one record at a time from its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.errors import ModelError
from fedfuse.models.blocks import CrossBlock, TransformerBlock, masked_mean
from fedfuse.models.fusion import Fusion, Place, build_fusion, operator
from fedfuse.models.fusion.bottleneck import BottleneckFusion
from fedfuse.models.fusion.concat import MlpFusion, RawFusion
from fedfuse.models.fusion.crossmodal import CoAttentionFusion, CrossAttentionFusion
from fedfuse.models.fusion.film import FilmFusion
from fedfuse.models.fusion.graph import GraphFusion
from fedfuse.models.fusion.late import ExpertsFusion, LateFusion
from fedfuse.models.fusion.tensor import LowRankFusion, MultiplicativeFusion, TensorFusion
from fedfuse.models.fusion.weighted import GatedFusion, SumFusion
from fedfuse.models.knowledge import Graph
from fedfuse.models.spec import FUSIONS, ModelConfig

M, D = 3, 4
GRAPH = Graph.of([("a", "near", "b"), ("b", "near", "c"), ("a", "near", "c"), ("c", "far", "d")])
# Every way in which three modalities can be there or not.
SEEN = torch.tensor(list(product([False, True], repeat=M)))


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(SEEN), M, D, generator=generator, dtype=torch.float64)
    return torch.where(SEEN[..., None], z, torch.zeros_like(z))


def scrambled(module: Fusion) -> Fusion:
    """In double, with every weight and bias drawn, so that none is zero by its start."""
    generator = torch.Generator().manual_seed(1)
    for p in module.double().parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2
    return module


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    out = layer.weight @ x
    return out if layer.bias is None else out + layer.bias


def weighted_sum(f: SumFusion, z: Tensor, here: list[int]) -> Tensor:
    if not here:
        return z.new_zeros(D)
    share = torch.stack([f.logit.weight[m].exp() for m in here])
    return sum(w * z[m] for w, m in zip(share / share.sum(0), here, strict=True))


def gated(f: GatedFusion, z: Tensor, here: list[int]) -> Tensor:
    flags = torch.tensor([float(m in here) for m in range(M)], dtype=z.dtype)
    gate = linear(f.gate, torch.cat([*z, flags])).sigmoid().view(M, D)
    parts = [gate[m] * linear(f.own[m], z[m]).tanh() for m in here]
    return sum(parts, z.new_zeros(D))


def multiplicative(f: MultiplicativeFusion, z: Tensor, here: list[int]) -> Tensor:
    flags = torch.tensor([float(m in here) for m in range(M)], dtype=z.dtype)
    out = linear(f.linear, torch.cat([*z, flags]))
    for (a, b), layer in zip(f.pairs, f.matrix, strict=True):
        if a in here and b in here:
            low_a, low_b = linear(f.down[a], z[a]), linear(f.down[b], z[b])
            three_way = layer.weight.view(f.rank, f.width, f.rank)  # [b, out, a]
            out = out + torch.einsum("bwa,a,b->w", three_way, low_a, low_b)
    return out


def tensor(f: TensorFusion, z: Tensor, here: list[int]) -> Tensor:
    out = np.ones(1)
    for m in range(M):
        own = linear(f.down[m], z[m]).detach() if m in here else torch.zeros(f.down[m].out_features)
        out = np.kron(out, np.append(own.numpy(), 1.0))
    return torch.from_numpy(out)


def low_rank(f: LowRankFusion, z: Tensor, here: list[int]) -> Tensor:
    terms = []
    for r in range(f.rank):
        term = torch.ones(f.width, dtype=z.dtype)
        for m in here:
            term = term * linear(f.factor[m], z[m]).view(f.rank, f.width)[r]
        terms.append(term)
    return linear(f.sum, torch.cat(terms))


def film(f: FilmFusion, z: Tensor, here: list[int]) -> Tensor:
    out = []
    for m in range(M):
        others = [k for k in here if k != m]
        shown = [z[k] if k in others else torch.zeros_like(z[k]) for k in range(M)]
        flags = torch.tensor([float(k in others) for k in range(M)], dtype=z.dtype)
        gamma, beta = linear(f.generate[m], torch.cat([*shown, flags])).chunk(2)
        if m not in here:
            out.append(torch.zeros_like(z[m]))
        else:
            out.append((1 + gamma) * z[m] + beta if others else z[m])
    return torch.cat([*out, torch.tensor([float(m in here) for m in range(M)], dtype=z.dtype)])


def experts(f: ExpertsFusion, z: Tensor, here: list[int]) -> Tensor:
    """The product of the densities on a grid, and its mean."""
    means, precisions = [torch.zeros(D)], [torch.ones(D)]
    for m in here:
        mean, raw = linear(f.experts[m], z[m]).detach().chunk(2)
        means.append(mean)
        precisions.append(F.softplus(raw))
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None]
    log = sum(-0.5 * p * (x - m) ** 2 for m, p in zip(means, precisions, strict=True))
    density = (log - log.max(0).values).exp()
    return (x * density).sum(0) / density.sum(0)


def late(f: LateFusion, z: Tensor, here: list[int]) -> Tensor:
    said = [linear(h[2], F.gelu(linear(h[0], z[m]))) for m, h in enumerate(f.heads) if m in here]
    return sum(said, z.new_zeros(2))


def graph(f: GraphFusion, z: Tensor, here: list[int]) -> Tensor:
    """Messages one edge at a time, as equation 2 of Schlichtkrull et al. says."""
    e = f.concepts.weight
    near = {m: (e @ linear(f.query, z[m]) / math.sqrt(D)).softmax(0) for m in here}
    h = e + sum((near[m][:, None] * linear(f.write, z[m]) for m in here), torch.zeros_like(e))
    edges = [(s, r, t) for s, r, t in GRAPH.triples]
    edges += [(t, r + len(GRAPH.relations), s) for s, r, t in GRAPH.triples]
    for norm, own, talk, mix in zip(f.norms, f.own, f.talk, f.mix, strict=True):
        x = norm(h)
        bases = talk.weight.view(f.bases, D, D)
        new = []
        for i in range(len(e)):
            heard = torch.zeros(D, dtype=z.dtype)
            for s, r, t in edges:
                if t == i:
                    count = sum(1 for _, r2, t2 in edges if (r2, t2) == (r, i))
                    matrix = torch.einsum("b,bij->ij", mix.weight[r], bases)
                    heard = heard + matrix @ x[s] / count
            new.append(h[i] + F.gelu(linear(own, x[i]) + heard))
        h = torch.stack(new)
    read = [near[m] @ h if m in here else torch.zeros(D, dtype=z.dtype) for m in range(M)]
    flags = torch.tensor([float(m in here) for m in range(M)], dtype=z.dtype)
    return torch.cat([*z, *read, flags])


FORMULAS: list[tuple[Fusion, Callable[..., Tensor]]] = [
    (SumFusion(M, D), weighted_sum),
    (GatedFusion(M, D), gated),
    (MultiplicativeFusion(M, D, rank=3, width=5), multiplicative),
    (TensorFusion(M, D, rank=2), tensor),
    (LowRankFusion(M, D, rank=3, width=5), low_rank),
    (FilmFusion(M, D), film),
    (ExpertsFusion(M, D), experts),
    (LateFusion(M, D, hidden=6, outputs=2), late),
    (GraphFusion(M, D, layers=2, graph=GRAPH), graph),
]


@pytest.mark.parametrize(("module", "formula"), FORMULAS, ids=lambda x: getattr(x, "__name__", ""))
def test_operator_is_its_formula_whatever_is_missing(
    module: Fusion, formula: Callable[..., Tensor]
) -> None:
    module = scrambled(module)
    z = tokens()
    found = module(z, SEEN)
    assert found.shape[1] == (module.width or 2)
    for row in range(len(SEEN)):
        expected = formula(module, z[row], SEEN[row].nonzero().flatten().tolist())
        torch.testing.assert_close(found[row], expected.to(found), rtol=1e-6, atol=1e-7)


def test_attention_leaves_out_what_is_not_seen() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2).double()
    x, other = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    seen = torch.tensor([[True, False, True, False, True]])
    found = block(x, other, seen)
    kept = other[:, seen[0]]
    q = block.query(block.norm(x)).view(1, 3, 2, 4).transpose(1, 2)
    k, v = block.key_value(block.norm_other(kept)).view(1, 3, 2, 2, 4).permute(2, 0, 3, 1, 4)
    told = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 3, 8)
    h = x + block.out(told)
    torch.testing.assert_close(found, h + block.down(F.gelu(block.up(block.norm2(h)))))


def test_attention_to_nothing_changes_nothing() -> None:
    block = CrossBlock(8, 2).double()
    x, other = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    found = block(x, other, torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(found, x + block.down(F.gelu(block.up(block.norm2(x)))))


def sequences(seen: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Three sequences of 1 + m tokens; modality m is there where seen[:, m]."""
    generator = torch.Generator().manual_seed(2)
    xs, masks = [], []
    for m in range(M):
        x = torch.randn(len(seen), 1 + m, D, generator=generator, dtype=torch.float64)
        mask = seen[:, m, None].expand(-1, 1 + m)
        xs.append(torch.where(mask[..., None], x, torch.zeros_like(x)))
        masks.append(mask)
    return xs, masks


def test_bottleneck_is_the_mean_of_what_the_modalities_that_are_there_made_of_it() -> None:
    fusion = scrambled(BottleneckFusion(M, D, heads=2, layers=2, tokens=3))
    xs, masks = sequences(SEEN)
    found = fusion(xs, masks)
    for row in range(len(SEEN)):
        here = SEEN[row].nonzero().flatten().tolist()
        shared = fusion.start.weight[None]
        now = {m: xs[m][row : row + 1] for m in here}
        for layer in range(2):
            made = {}
            for m in here:
                both = torch.cat([shared, now[m]], 1)
                block = fusion.blocks[layer * M + m]
                made[m] = block(both, torch.ones(both.shape[:2], dtype=torch.bool))
            if here:
                shared = torch.stack([made[m][:, :3] for m in here]).mean(0)
            now = {m: made[m][:, 3:] for m in here}
        first = [now[m][0, 0] if m in here else torch.zeros(D).double() for m in range(M)]
        flags = SEEN[row].double()
        torch.testing.assert_close(found[row], torch.cat([*first, flags, shared[0].mean(0)]))


@pytest.mark.parametrize("kind", [CrossAttentionFusion, CoAttentionFusion])
def test_an_absent_sequence_might_as_well_have_no_tokens(kind: type[Fusion]) -> None:
    fusion = scrambled(kind(M, D, heads=2, layers=1))  # type: ignore[call-arg]
    everything = torch.ones(2, M, dtype=torch.bool)
    everything[:, 2] = False
    xs, masks = sequences(everything)
    longer = [*xs[:2], torch.zeros(2, 9, D).double()]
    more = [*masks[:2], torch.zeros(2, 9, dtype=torch.bool)]
    before = fusion(xs, masks)
    torch.testing.assert_close(before, fusion(longer, more))
    changed = [-2.0 * xs[0].flip(2), *xs[1:]]  # what is there is asked: the others' outputs move
    assert not torch.allclose(before[:, D : 2 * D], fusion(changed, masks)[:, D : 2 * D])


def test_cross_attention_asks_each_other_modality_by_a_stack_of_its_own() -> None:
    fusion = scrambled(CrossAttentionFusion(2, D, heads=2, layers=2))
    xs, masks = sequences(torch.ones(1, M, dtype=torch.bool))
    a, b = xs[1], xs[2]
    seen = masks[1:]
    blocks = list(fusion.pairs)
    told_a = blocks[1](blocks[0](a, b, seen[1]), b, seen[1])
    told_b = blocks[3](blocks[2](b, a, seen[0]), a, seen[0])
    expected = [
        fusion.own[m](x + fusion.join[m](told), seen[m])[:, 0]
        for m, (x, told) in enumerate(((a, told_a), (b, told_b)))
    ]
    ones = torch.ones(1, 2).double()
    torch.testing.assert_close(fusion([a, b], list(seen)), torch.cat([*expected, ones], 1))


def test_hidden_layers_see_tokens_and_flags() -> None:
    for fusion, features in (
        (MlpFusion(M, D, width=6, layers=2), None),
        (RawFusion([D] * M, width=6, layers=2), M),
    ):
        scrambled(fusion)
        z = tokens()
        x = torch.cat([z.flatten(1), SEEN.double()], 1)
        for k in (0, 3):
            first, norm = fusion.layers[k], fusion.layers[k + 1]
            x = F.gelu(norm(x @ first.weight.T + first.bias))
        found = fusion(z if features is None else list(z.unbind(1)), SEEN)
        torch.testing.assert_close(found, x)


def test_self_attention_over_modalities_is_a_mean_over_those_there() -> None:
    fusion = scrambled(build_fusion(place("attention")))
    z = tokens()
    assert isinstance(fusion.blocks[0], TransformerBlock)
    x = z + fusion.mark.weight
    expected = masked_mean(fusion.norm(fusion.blocks[0](x, SEEN)), SEEN)
    torch.testing.assert_close(fusion(z, SEEN), expected)


def place(name: str, **changes: int) -> Place:
    config = ModelConfig(fusion=name, dim=D, fusion_heads=2, fusion_rank=2, **changes)
    return Place(modalities=M, outputs=2, config=config, raw=(3, 1, 2), graph=GRAPH)


def test_each_name_has_an_operator_of_its_own() -> None:
    assert len({operator(name) for name in FUSIONS}) == len(FUSIONS)
    levels = {name: build_fusion(place(name)).level for name in FUSIONS}
    assert {name for name, level in levels.items() if level == "late"} == {"late"}
    assert {name for name, level in levels.items() if level == "early"} == {"early"}


def test_an_outer_product_too_large_is_refused_with_a_remedy() -> None:
    with pytest.raises(ModelError, match="outer product of 7 modalities") as caught:
        TensorFusion(7, D, rank=8)
    assert "fusion_rank" in caught.value.hint


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(ModelError, match="'addition' is unknown"):
        build_fusion(place("addition"))


def test_a_place_that_holds_no_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, "wrong", "tensor.combinations")
    with pytest.raises(ModelError, match=r"tensor\.combinations is no fusion operator"):
        build_fusion(place("wrong"))


@pytest.mark.parametrize("name", ["attention", "cross-attention", "co-attention", "bottleneck"])
def test_heads_that_do_not_divide_a_token_are_refused(name: str) -> None:
    config = ModelConfig(fusion=name, dim=6, fusion_heads=4)
    with pytest.raises(ModelError, match="multiple of its 4 heads"):
        build_fusion(Place(modalities=M, outputs=2, config=config))
