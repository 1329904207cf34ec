"""Encoders over time: steps (B, T, F) one after the other through a GRU, or all at once through a
Transformer. Words, readings, spectra and frames go the same way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedfuse.models.blocks import TransformerBlock, masked_mean, sinusoids
from fedfuse.models.encoder import Encoder, Features
from fedfuse.models.spec import ModelConfig

__all__ = ["STEPS", "GruSteps", "SoundSteps", "StepsEncoder", "TransformerSteps", "real_steps"]

_PARTS = 16


class GruSteps(nn.Module):
    """A GRU (Cho et al. 2014, arXiv:1406.1078v3) built from Linear layers, whose per-record
    gradients are exact; padding leaves the state as it is."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.states = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, W), (B, T) bool -> the last state (B, W), and the state after each step."""
        for to_gates, from_state in zip(self.inputs, self.states, strict=True):
            x = _gru_layer(x, seen, to_gates, from_state)
        return x[:, -1], x


def _gru_layer(x: Tensor, seen: Tensor, to_gates: nn.Module, from_state: nn.Module) -> Tensor:
    """(B, T, W) -> (B, T, W): the state after each step."""
    gates = to_gates(x)
    state = x.new_zeros(x.shape[0], x.shape[2])
    states = []
    for t in range(x.shape[1]):
        reset_in, update_in, new_in = gates[:, t].chunk(3, 1)
        reset_s, update_s, new_s = from_state(state).chunk(3, 1)
        reset, update = torch.sigmoid(reset_in + reset_s), torch.sigmoid(update_in + update_s)
        new = torch.tanh(new_in + reset * new_s)
        state = torch.where(seen[:, t : t + 1], (1 - update) * new + update * state, state)
        states.append(state)
    return torch.stack(states, 1)


class TransformerSteps(nn.Module):
    """A small Transformer with fixed sinusoidal positions (Vaswani et al. 2017,
    arXiv:1706.03762v7), then the mean."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, W), (B, T) bool -> the mean (B, W), and each step in its context (B, T, W)."""
        x = x + sinusoids(x.shape[1], x.shape[2], x)
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        return masked_mean(x, seen), x


STEPS: dict[str, type[GruSteps] | type[TransformerSteps]] = {
    "gru": GruSteps,
    "transformer": TransformerSteps,
}
"""By the name in the configuration."""


class StepsEncoder(Encoder):
    """A series (T, F), reading by reading."""

    def __init__(self, features: int, name: str, config: ModelConfig, *, sequence: bool) -> None:
        super().__init__()
        width = config.steps_width
        self.enter = nn.Linear(features, width)
        self.steps = STEPS[name](width, config.steps_layers, config.steps_heads)
        self._ends(width, width, config.dim, sequence=sequence)

    def frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *shape) -> steps (B, T, F), and which of them are no padding (B, T)."""
        return x, real_steps(x)

    def features(self, x: Tensor) -> Features:
        """(B, *shape) -> the whole (B, W), and at most 16 steps in their context."""
        frames, seen = self.frames(x)
        whole, parts = self.steps(self.enter(frames), seen)
        count = parts.shape[1]
        places = torch.arange(min(count, _PARTS), device=x.device) * count // min(count, _PARTS)
        return Features(whole, parts[:, places], seen[:, places])


class SoundSteps(StepsEncoder):
    """A sound (bands, frames), spectrum by spectrum."""

    def frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, bands, frames) -> (B, frames, bands), and which frames come before the end."""
        return super().frames(x.transpose(1, 2))


def real_steps(x: Tensor) -> Tensor:
    """(B, T, F) -> (B, T) bool: the steps up to the last one that is not zero throughout, as
    decoders leave what comes after a record's end."""
    return x.ne(0).any(2).flip(1).cumsum(1).gt(0).flip(1)
