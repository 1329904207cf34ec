"""Where a step's sums lie: side by side in memory, so that noise and division are one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedfuse.privacy.noise import NoiseStream

__all__ = ["Sums"]


class Sums:
    """One tensor of each parameter's shape, in one flat block for each dtype and device."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for p in parameters:
            key = (p.dtype, p.device)
            sizes[key] = sizes.get(key, 0) + p.numel()
        blocks = {
            (dtype, device): torch.zeros(size, dtype=dtype, device=device)
            for (dtype, device), size in sizes.items()
        }
        self.blocks = list(blocks.values())
        self.views: list[Tensor] = []
        """In the parameters' shapes."""
        self.flat: list[Tensor] = []
        """The same memory, (n,) each."""
        self._lies: list[tuple[Tensor, int, int]] = []
        """In which block each is, from where to where."""
        start = dict.fromkeys(blocks, 0)
        for p in parameters:
            key = (p.dtype, p.device)
            stop = start[key] + p.numel()
            self.flat.append(blocks[key][start[key] : stop])
            self.views.append(self.flat[-1].view(p.shape))
            self._lies.append((blocks[key], start[key], stop))
            start[key] = stop

    def joined(self, places: Sequence[int]) -> list[Tensor]:
        """The numbers of these parameters, in one tensor where they lie side by side."""
        found: list[tuple[Tensor, int, int]] = []
        for place in places:
            block, start, stop = self._lies[place]
            if found and found[-1][0] is block and found[-1][2] == start:
                start = found.pop()[1]
            found.append((block, start, stop))
        return [block[start:stop] for block, start, stop in found]

    def clear(self) -> None:
        """All zero."""
        for block in self.blocks:
            block.zero_()

    def make_noise(self, stream: NoiseStream, std: float, *, after: int = 0) -> None:
        """Lets `stream` make ahead what `add_noise` will add, once `after` normals are drawn.

        Does nothing where parameters are of several dtypes or devices.
        """
        if len(self.blocks) == 1:
            stream.make_ahead(self.blocks[0], std, after=after)

    def add_noise(self, stream: NoiseStream, std: float) -> None:
        """Adds N(0, std^2) to each number, in float64, cut to its dtype."""
        for block in self.blocks:
            stream.add_normal(block, std)

    def divide(self, divisor: float) -> None:
        """Divides each number."""
        for block in self.blocks:
            block.div_(divisor)
