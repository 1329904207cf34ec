"""Encoders of video: frames (B, T, C, H, W), each through the same convolutions, then time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.models.blocks import groups_for
from fedfuse.models.cosines import cosines, frame_terms, over_time
from fedfuse.models.encoder import Encoder, Features
from fedfuse.models.spec import ModelConfig
from fedfuse.models.steps import StepsEncoder

__all__ = ["TIMES", "Frames", "VideoPool", "VideoSteps", "as_clip"]

TIMES = 3
"""Cosine terms over time: the mean, a trend, a bend."""


class Frames(nn.Module):
    """(B, T, C, H, W) -> (B, T, width): strided 3 x 3 convolutions over each frame alone, beside
    fixed cosine terms of it.

    The same layers see all frames, as convolutions over (T, H, W) with a kernel that is one frame
    long, so that each layer has one row a record. A normalisation takes in all frames of a record.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, shape: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__()
        _, channels, height, width = shape
        inner, side = channels, min(height, width)
        layers: list[nn.Module] = []
        for layer in range(config.video_depth):
            out, stride = config.video_width * 2**layer, 2 if side >= 4 else 1
            layers += [
                nn.Conv3d(inner, out, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1)),
                nn.GroupNorm(groups_for(out), out),
                nn.GELU(),
            ]
            inner, side = out, -(-side // stride)
        self.convolutions = nn.Sequential(*layers)
        grid = min(2, side)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.register_buffer("rows", cosines(height, config.video_terms), persistent=False)
        self.register_buffer("columns", cosines(width, config.video_terms), persistent=False)
        self.width = inner * grid * grid + channels * len(self.rows) * len(self.columns)

    def forward(self, x: Tensor) -> Tensor:
        """What is seen in each frame."""
        x = as_clip(x)
        h = self.convolutions(x.transpose(1, 2))  # (B, W, T, H, W)
        # Frame by frame in two dimensions: ONNX knows no pooling of three to a given size.
        grid = self.pool(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        seen: Tensor = grid.transpose(1, 2).flatten(2)
        if not len(self.rows):
            return seen
        return torch.cat([seen, frame_terms(x, self.rows, self.columns)], 2)


class VideoPool(Encoder):
    """Frames put together by fixed weights: the mean over time, and two cosine terms that tell
    what changes (segments of a clip by one network and a fixed consensus, Wang et al. 2016,
    arXiv:1608.00859v1)."""

    times: Tensor

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, *, sequence: bool) -> None:
        super().__init__()
        self.frames = Frames(shape, config)
        self.register_buffer("times", cosines(shape[0], TIMES), persistent=False)
        width = self.frames.width
        self._ends(len(self.times) * width, width, config.dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, T, C, H, W) -> all of it, and its frames."""
        frames = self.frames(x)
        return Features(over_time(frames, self.times), frames)


class VideoSteps(StepsEncoder):
    """Frames put together by what is learned about time, after each was seen alone (the factorised
    encoder of Arnab et al. 2021, ViViT, arXiv:2103.15691v2, section 3.3)."""

    def __init__(
        self, shape: tuple[int, ...], name: str, config: ModelConfig, *, sequence: bool
    ) -> None:
        pictures = Frames(shape, config)
        super().__init__(pictures.width, name, config, sequence=sequence)
        self.pictures = pictures

    def frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C, H, W) -> (B, T, F); no frame is padding."""
        return self.pictures(x), x.new_ones(x.shape[:2], dtype=torch.bool)


def as_clip(x: Tensor) -> Tensor:
    """(B, T, C, H, W) with each record brought to zero mean and unit variance by its own frames."""
    return F.layer_norm(x, x.shape[1:], eps=1e-4)
