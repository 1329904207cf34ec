"""The clipped sum is what a loop over single records gives, whatever is missing or broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from torch import nn

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.errors import ModelError
from fedfuse.models.knowledge import Graph
from fedfuse.models.model import FusionModel, build_model
from fedfuse.models.spec import ABSENT, ENCODERS, FUSIONS, EncoderConfig, ModelConfig
from fedfuse.privacy.clipping.bookkeeping import BookKeeping
from fedfuse.privacy.dpsgd import (
    Loss,
    PrivateOptimizer,
    clip_factors,
    prepare,
    private_step,
    with_record_gradients,
)
from fedfuse.privacy.lengths import lengths
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.safety import check_model
from fedfuse.privacy.spec import CLIPPINGS
from fedfuse.tasks import Task

SCHEMA = Schema(
    modalities=(
        Modality(name="image", kind=Kind.IMAGE, shape=(3, 9, 11)),
        Modality(name="audio", kind=Kind.AUDIO, shape=(8, 7)),
        Modality(name="text", kind=Kind.TEXT, shape=(5,)),
        Modality(name="series", kind=Kind.SERIES, shape=(12, 3)),
        Modality(name="table", kind=Kind.TABLE, shape=(6,)),
    ),
    target=Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c")),
)
SMALL = ModelConfig(
    dim=8, fusion_heads=2, head_width=6, image_width=2, image_depth=2, audio_width=2,
    audio_depth=2, series_width=4, vector_width=5, text_width=6, text_heads=2,
)  # fmt: skip
TASK = Task.of(SCHEMA.target)
GRAPH = Graph.of([("a", "near", "b"), ("b", "near", "c"), ("a", "far", "c")])


def model_with(**changes: object) -> FusionModel:
    values = {field: getattr(SMALL, field) for field in SMALL.__dataclass_fields__} | changes
    config = ModelConfig(**values)
    return build_model(SCHEMA, config, vocabulary=20, seed=1, graph=GRAPH).double()


def batch_of(size: int, seed: int, chance_present: float = 0.6) -> Batch:
    rng = np.random.default_rng(seed)
    inputs, present = {}, {}
    for modality in SCHEMA.modalities:
        here = torch.from_numpy(rng.random(size) < chance_present)
        if modality.kind is Kind.TEXT:
            value = torch.from_numpy(rng.integers(0, 20, (size, *modality.shape)))
        else:
            value = torch.from_numpy(3 * rng.standard_normal((size, *modality.shape)))
        mask = here.view(-1, *[1] * len(modality.shape))
        inputs[modality.name] = torch.where(mask, value, torch.zeros_like(value))
        present[modality.name] = here
    return Batch(inputs, present, torch.from_numpy(rng.integers(0, 3, size)))


def oracle(
    model: FusionModel, batch: Batch, clip_norm: float, loss_of: Loss = TASK.loss
) -> list[torch.Tensor]:
    """The sum of clipped gradients by plain autograd, one record at a time."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row in range(len(batch)):
        one = batch[slice(row, row + 1)]
        loss = loss_of(model(one), one.target).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        norm = float(torch.stack([g.norm() for g in grads]).norm())
        if np.isfinite(norm):
            for part, g in zip(total, grads, strict=True):
                part += g * min(1.0, clip_norm / max(norm, 1e-30))
    return total


def clipped_sum(
    model: nn.Module,
    batch: Batch,
    clip_norm: float,
    physical_batch: int = 64,
    clipping: str = "bookkeeping",
    loss_of: Loss = TASK.loss,
) -> list[torch.Tensor]:
    """What a private step adds up, seen with sigma so small that noise is nothing."""
    ready = prepare(model, clipping)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=0.0),
        noise_multiplier=1e-14,
        clip_norm=clip_norm,
        expected_batch=1.0,
        stream=NoiseStream(bytes(32), "noise"),
    )
    private_step(ready, optimizer, batch, loss_of, physical_batch=physical_batch)
    if not isinstance(ready, BookKeeping):
        ready.remove_hooks()
    return [p.grad for p in parameters]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(float(torch.stack([e.norm() for e in expected]).norm()), 1e-6)
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).norm()) <= 1e-5 * scale


SLOW = pytest.mark.slow


class Wide(nn.Module):
    """A layer of a million weights, for which gradients are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1000, 1000, bias=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.layer(batch.inputs["x"]).square().mean((1, 2))[:, None]


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_no_contribution_of_a_million_numbers_exceeds_the_clip_norm(clipping: str) -> None:
    """In float32: torch's own norm of so many is 1e-5 too small."""
    torch.manual_seed(0)
    batch = Batch(
        {"x": torch.randn(1, 700, 1000)}, {"x": torch.ones(1, dtype=torch.bool)}, torch.zeros(1)
    )
    model = Wide()
    total = clipped_sum(model, batch, 1e-3, clipping=clipping, loss_of=lambda y, _: y.squeeze(1))
    length = float(total[0].double().norm())
    assert 1e-3 * (1 - 3e-6) <= length <= 1e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3_000_000), st.integers(0, 2**31))
def test_lengths_are_right_however_many_numbers_there_are(count: int, seed: int) -> None:
    x = torch.randn(2, count, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(lengths(x).double(), x.double().norm(dim=1), rtol=5e-7)


@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_a_step_is_that_of_opacus_but_for_the_noise(clip_norm: float) -> None:
    """DPOptimizer over GradSampleModule, with sigma 0, from the same weights and records."""
    batch = batch_of(6, seed=3)
    theirs = model_with()
    sampled = with_record_gradients(theirs)
    stepper = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=0.5),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=8,
        loss_reduction="sum",
    )
    TASK.loss(sampled(batch), batch.target).sum().backward()
    stepper.step()
    for p in theirs.parameters():
        p.grad /= 8  # "sum" leaves the division to the user
    for clipping in CLIPPINGS:
        ours = model_with()
        found = clipped_sum(ours, batch, clip_norm, clipping=clipping)
        assert_same([g / 8 for g in found], [p.grad for p in theirs.parameters()])


@pytest.mark.parametrize("fusion", ["concat", "co-attention", "early"])
@pytest.mark.parametrize("text", ENCODERS["text"])
@pytest.mark.parametrize("learned_words", [False, True])
def test_clipped_sum_equals_a_loop_over_records(
    fusion: str, text: str, learned_words: bool
) -> None:
    model = model_with(fusion=fusion, encoder=EncoderConfig(text=text), learned_words=learned_words)
    batch = batch_of(6, seed=3)
    for clip_norm in (0.05, 100.0):
        expected = oracle(model, batch, clip_norm)
        for clipping in CLIPPINGS:
            assert_same(clipped_sum(model, batch, clip_norm, clipping=clipping), expected)


@pytest.mark.parametrize(
    "absent", [name if name == "zero" else pytest.param(name, marks=SLOW) for name in ABSENT]
)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_clipped_sum_equals_a_loop_in_every_fusion(fusion: str, absent: str) -> None:
    absent = "zero" if fusion == "early" else absent
    model = model_with(fusion=fusion, absent=absent, fusion_layers=2)
    batch = batch_of(6, seed=3)
    for clip_norm in (0.05, 1.0, 100.0):
        assert_same(clipped_sum(model, batch, clip_norm), oracle(model, batch, clip_norm))


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
    present=st.floats(0.0, 1.0),
    physical=st.integers(1, 8),
    fusion=st.sampled_from(sorted(FUSIONS)),
    clipping=st.sampled_from(CLIPPINGS),
    absent=st.sampled_from(ABSENT),
    text=st.sampled_from(ENCODERS["text"]),
)
def test_clipped_sum_holds_for_any_size_mask_and_split(
    size: int,
    seed: int,
    present: float,
    physical: int,
    fusion: str,
    clipping: str,
    absent: str,
    text: str,
) -> None:
    absent = "zero" if fusion == "early" else absent
    model = model_with(fusion=fusion, absent=absent, encoder=EncoderConfig(text=text))
    batch = batch_of(size, seed, present)
    found = clipped_sum(model, batch, 0.3, physical, clipping)
    assert_same(found, oracle(model, batch, 0.3))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_empty_batch_gives_a_zero_sum(fusion: str) -> None:
    for text in ENCODERS["text"]:
        found = clipped_sum(
            model_with(fusion=fusion, encoder=EncoderConfig(text=text)), batch_of(0, 0), 1.0
        )
        assert all(float(g.abs().max()) < 1e-12 for g in found)


@pytest.mark.parametrize("stand_in", ABSENT)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("absent", SCHEMA.names)
def test_absent_modality_contributes_zero_gradient(fusion: str, absent: str, stand_in: str) -> None:
    early = fusion == "early"
    model = model_with(fusion=fusion, absent="zero" if early else stand_in, learned_words=early)
    batch = batch_of(5, seed=4, chance_present=1.0)
    batch.present[absent][:] = False
    model.zero_grad()
    TASK.loss(model(batch), batch.target).sum().backward()
    which = SCHEMA.names.index(absent)
    own = [p for name, p in model.named_parameters() if model.part_of(name) == absent]
    assert own or early
    assert all(float(p.grad.abs().max()) == 0.0 for p in own)
    others = [p for i, e in enumerate(model.encoders) if i != which for p in e.parameters()]
    assert any(float(p.grad.abs().max()) > 0 for p in others) or (early and absent == "text")
    if not early and stand_in == "learned":
        assert float(model.absent.weight.grad[which].abs().max()) > 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_absent_modality_says_nothing_about_its_content(fusion: str) -> None:
    model = model_with(fusion=fusion).eval()
    for name in ("image", "text"):
        batch = batch_of(4, seed=5, chance_present=1.0)
        batch.present[name][:] = False
        before = model(batch)
        batch.inputs[name].copy_(batch.inputs[name].flip(0) * 2 % 17)
        assert torch.equal(before, model(batch))


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_record_counts_as_zero(broken: float, clipping: str) -> None:
    model = model_with()
    batch = batch_of(4, seed=6, chance_present=1.0)
    batch.inputs["table"][2, 0] = broken
    found = clipped_sum(model, batch, 0.5, clipping=clipping)
    rest = batch[torch.tensor([0, 1, 3])]
    assert_same(found, oracle(model, rest, 0.5))


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(1e-20, 1e20), clip_norm=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_no_contribution_exceeds_the_clip_norm(scale: float, clip_norm: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    samples = [
        scale * torch.randn(3, 4, 5, generator=rng),
        scale * torch.randn(3, 2, generator=rng),
    ]
    norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples]).norm(dim=0)
    factors = clip_factors(norms, clip_norm)
    for row in range(3):
        parts = torch.cat([s[row].flatten().double() for s in samples]) * factors[row].double()
        assert float(parts.nan_to_num().norm()) <= clip_norm


def test_permuted_records_leave_the_sum_unchanged() -> None:
    model = model_with(fusion="attention")
    batch = batch_of(6, seed=8)
    shuffled = batch[torch.tensor([3, 1, 5, 0, 4, 2])]
    assert_same(clipped_sum(model, shuffled, 0.2), clipped_sum(model, batch, 0.2))


@pytest.mark.parametrize(
    ("layer", "says"),
    [(nn.BatchNorm1d(3), "mixes records"), (nn.InstanceNorm1d(3), "mixes records")],
)
def test_layer_that_mixes_records_is_refused(layer: nn.Module, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        check_model(nn.Sequential(nn.Linear(3, 3), layer))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Embedding(4, 3, padding_idx=0), "padding_idx"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (nn.LayerNorm(3, bias=False), "bias=False"),
    ],
)
def test_layer_with_wrong_gradients_is_refused(layer: nn.Module, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        check_model(nn.Sequential(layer), clipping="hooks")


def test_bare_parameter_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))

    with pytest.raises(ModelError, match="no per-record gradient"):
        check_model(Bare(), clipping="hooks")
    with pytest.raises(ModelError, match="no per-record gradient"):
        prepare(Bare())
