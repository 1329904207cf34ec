"""Encoders over time: their formula, and that padding is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedfuse.batch import Kind, Modality
from fedfuse.models.encoder import Encoder
from fedfuse.models.encoders import build_encoder
from fedfuse.models.spec import EncoderConfig, ModelConfig
from fedfuse.models.steps import STEPS, GruSteps, real_steps


def encoder_of(kind: Kind, name: str, shape: tuple[int, ...]) -> Encoder:
    config = ModelConfig(encoder=EncoderConfig(**{kind.value: name}), dim=6, steps_width=8)
    torch.manual_seed(0)
    return build_encoder(
        Modality(name="m", kind=kind, shape=shape), config, vocabulary=30, sequence=True
    ).double()


def test_the_gru_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = GruSteps(5, 2, 1).double(), nn.GRU(5, 5, 2, batch_first=True).double()
    for layer, (to_gates, from_state) in enumerate(zip(ours.inputs, ours.states, strict=True)):
        for which, made in (("ih", to_gates), ("hh", from_state)):
            for part in ("weight", "bias"):
                getattr(theirs, f"{part}_{which}_l{layer}").data = getattr(made, part).data
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    whole, parts = ours(x, torch.ones(3, 7, dtype=torch.bool))
    expected, last = theirs(x)
    torch.testing.assert_close(parts, expected)
    torch.testing.assert_close(whole, last[-1])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", [Kind.SERIES, Kind.AUDIO, Kind.TEXT])
def test_padding_changes_nothing(kind: Kind, name: str) -> None:
    """One record of three steps alone, and the same one in a place for nine."""
    torch.manual_seed(1)
    steps = torch.randint(1, 30, (2, 3)) if kind is Kind.TEXT else torch.randn(2, 3, 4).double()
    pads = torch.zeros(2, 6, *steps.shape[2:], dtype=steps.dtype)
    shape = () if kind is Kind.TEXT else (4,)

    def token(x: Tensor) -> Tensor:
        dims = (x.shape[1], *shape)
        x, dims = (x.transpose(1, 2), dims[::-1]) if kind is Kind.AUDIO else (x, dims)
        return encoder_of(kind, name, dims)(x)

    torch.testing.assert_close(token(torch.cat([steps, pads], 1)), token(steps))
    assert not torch.allclose(token(steps), token(steps.flip(1)))


@pytest.mark.parametrize("name", STEPS)
def test_a_record_without_a_step_gives_a_finite_token(name: str) -> None:
    encoder = encoder_of(Kind.SERIES, name, (5, 2))
    tokens, seen = encoder.sequence(torch.zeros(3, 5, 2).double())
    assert torch.isfinite(tokens).all()
    assert seen.tolist() == [[True] + [False] * 5] * 3
    assert encoder(torch.zeros(0, 5, 2).double()).shape == (0, 6)


def test_a_step_of_zeros_between_others_is_no_padding() -> None:
    x = torch.zeros(2, 4, 2)
    x[0, 2, 1] = -1
    assert real_steps(x).tolist() == [[True, True, True, False], [False] * 4]


def test_parts_of_a_long_series_are_at_most_sixteen() -> None:
    tokens, seen = encoder_of(Kind.SERIES, "gru", (50, 2)).sequence(torch.ones(2, 50, 2).double())
    assert tokens.shape == (2, 17, 6)
    assert seen.all()


@pytest.mark.parametrize("name", ["pool", *STEPS])
def test_a_video_is_told_from_itself_backwards_and_its_parts_are_frames(name: str) -> None:
    encoder = encoder_of(Kind.VIDEO, name, (5, 3, 8, 8))
    clip = torch.randn(2, 5, 3, 8, 8).double()
    assert not torch.allclose(encoder(clip), encoder(clip.flip(1)), atol=1e-3)
    tokens, seen = encoder.sequence(clip)
    assert tokens.shape == (2, 6, 6)
    assert seen.all()
