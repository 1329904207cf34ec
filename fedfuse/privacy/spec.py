"""What is promised (`PrivacyConfig`), what is run for it (`Mechanism`), and what was run (`Event`).

Standard library only: reading the books needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fedfuse.errors import PrivacyError

__all__ = ["Event", "Mechanism", "PrivacyConfig", "Unit"]


class Unit(StrEnum):
    """What one change of the neighbouring data set is."""

    NONE = "none"
    """Nothing is protected: NOT PRIVATE."""
    RECORD = "record"
    """One record is added or removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """The promise, and the public knobs of the mechanism that keeps it."""

    unit: str = "record"
    """A value of Unit."""
    epsilon: float = 8.0
    """The most that any node may spend, at `delta`."""
    delta: float = 1e-5
    clip_norm: float = 1.0
    """C, the bound on one record's gradient in L2."""
    sample_rate: float = 0.25
    """q, the chance that a record is in a step's batch; declared, never derived from data."""
    noise_multiplier: float = 0.0
    """sigma, the noise's standard deviation in units of C. 0: calibrated from epsilon."""
    declared_records: int = 0
    """The public size of a node's training data; q times this is the divisor of a step's sum.
    0 in a simulation: the mean size, rounded to one digit, and the run says so."""
    records_are_units: bool = False
    """Go on with unit "record" though subjects repeat in the manifest."""
    noise_seed: str = ""
    """Simulations only: makes sampling and noise repeatable, and so removable by whoever knows
    the seed. Empty: the operating system's entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """A Poisson-sampled Gaussian mechanism, run `steps` times. Every field is public.

    Raises PrivacyError where a field is out of range.
    """

    unit: Unit
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int

    def __post_init__(self) -> None:
        if self.unit is Unit.NONE:
            raise PrivacyError("unit = none is not a private mechanism")
        for name, value, low, high in (
            ("sample_rate", self.sample_rate, 0.0, 1.0),
            ("noise_multiplier", self.noise_multiplier, 0.0, 1e6),
            ("clip_norm", self.clip_norm, 0.0, 1e9),
        ):
            if not (math.isfinite(value) and low < value <= high):
                raise PrivacyError(
                    f"{name} = {value}, but it must be above {low:g} and at most {high:g}",
                    where="privacy",
                )
        if self.steps < 1:
            raise PrivacyError(f"steps = {self.steps}, but at least 1 is needed", where="privacy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a node's books: what a node ran in a round.

    `status` is "spent" once the update left the node, and "reserved" from before a record was
    read until then; both count.
    """

    node: str
    round: int
    status: str
    unit: str
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """The line as plain values, ready for JSON."""
        return asdict(self)
