"""Updates as whole numbers modulo 2^32, with discrete noise, and the sum of them as an update.

    update   of norm C at most, times `scale`, each number rounded up or down by chance: unbiased
    reach    S: no rounded update is longer than S steps. Rounding moves a number by less than 1,
             so a vector of d by less than sqrt(d); scale = (S - sqrt(d)) / C leaves room for that
    noise    discrete Gaussian of deviation `sigma` steps from each node, so that what
             `noise_nodes` of them add is a Gaussian of sigma_declared S steps, or more
    modulus  2^32: n S and 12 deviations of the noise of n nodes stay below half of it. Noise that
             went beyond would wrap, which is post-processing: wrong, not less private

Kairouz, Liu and Steinke 2021 (arXiv:2102.06387), without their rotation: with 32 bits a step is so
fine that what rounding adds to C is a small part of it (`Lattice.coarseness`), in any direction.

Guarantees (unit: a node; neighbours: its update, or zero)
    Sensitivity S in steps, whatever is rounded; noise as in `privacy.discrete`. Together: no more
    than a Gaussian of the declared noise multiplier, accounted exactly.
Not covered
    Who sees fewer than `noise_nodes` honest nodes' sum: that is for masks to prevent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfuse.errors import PrivacyError
from fedfuse.federation.masking.masks import Masked
from fedfuse.privacy.discrete import MOST_SIGMA, deviation, discrete_gaussian
from fedfuse.privacy.noise import NoiseStream

__all__ = ["Lattice"]

_HALF = 2**31
_MOST_REACH = 1 << 22
_TAIL = 12.0
_COARSEST = 1 / 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """How fine updates are cut. All of it is public, and the same in all nodes."""

    clip_norm: float
    length: int
    """d"""
    reach: int
    """S, in steps."""
    sigma: int
    """Of each node's noise, in steps; 0: none."""

    @classmethod
    def of(
        cls,
        *,
        clip_norm: float,
        length: int,
        nodes: int,
        noise_multiplier: float = 0.0,
        noise_nodes: int = 1,
    ) -> Lattice:
        """The finest lattice on which sums of `nodes` updates do not wrap.

        noise_multiplier  that of the sum of `noise_nodes`, in units of C; 0: no noise

        Raises PrivacyError where so many weights, nodes or so much noise leave it too coarse.
        """
        share = noise_multiplier / math.sqrt(noise_nodes)
        # 2 for the slack of `deviation`, and for its rounding up.
        room = (_HALF - 2 * _TAIL * math.sqrt(nodes) - nodes) / (
            nodes + _TAIL * share * math.sqrt(nodes)
        )
        reach = int(min(_MOST_REACH, room, (MOST_SIGMA - 8) / max(share, 1e-9)))
        if reach < 1 or math.sqrt(length) / reach > _COARSEST:
            raise PrivacyError(
                f"sums of {nodes} updates of {length} numbers with noise_multiplier = "
                f"{noise_multiplier:g} leave {max(reach, 0)} steps for an update: too coarse",
                where="federation.secure_aggregation",
                hint="ask fewer nodes, train fewer weights, or lower the noise",
            )
        sigma = deviation(noise_multiplier * reach, noise_nodes) if noise_multiplier else 0
        return cls(clip_norm=clip_norm, length=length, reach=reach, sigma=sigma)

    @property
    def scale(self) -> float:
        """Steps in one unit of an update; the last factor is for rounding in float64."""
        return (self.reach - math.sqrt(self.length)) / self.clip_norm * (1 - 1e-9)

    @property
    def coarseness(self) -> float:
        """By what part noise is more than declared, since rounding takes of the reach."""
        return self.reach / (self.scale * self.clip_norm) - 1

    def whole(
        self, update: NDArray[np.float64], *, rounding: NoiseStream, noise: NoiseStream
    ) -> NDArray[np.int64]:
        """(d,) steps of an update (d,), rounded by chance and noised: a stream for each.

        Raises PrivacyError where the update is longer than C, or not finite.
        """
        length = float(np.linalg.norm(update))
        if update.shape != (self.length,) or not length <= self.clip_norm * (1 + 1e-10):
            raise PrivacyError("an update must be clipped before it is cut into steps")
        steps = np.floor(update * self.scale + rounding.uniform(self.length)).astype(np.int64)
        if self.sigma:
            steps += discrete_gaussian(self.length, self.sigma, noise)
        return steps

    def real(self, total: Masked) -> NDArray[np.float64]:
        """(d,) the sum of updates that steps modulo 2^32 stand for."""
        return np.asarray(total.view(np.int32) / self.scale, np.float64)
