"""What is promised (`PrivacyConfig`), what is run for it (`Mechanism`), and what was run (`Event`).

Standard library only: reading the books needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fedfuse.errors import PrivacyError

__all__ = ["CLIPPINGS", "Event", "Mechanism", "PrivacyConfig", "Unit", "clip_shares"]

CLIPPINGS = ("bookkeeping", "hooks")


class Unit(StrEnum):
    """What one change of the neighbouring data set is."""

    NONE = "none"
    """Nothing is protected: NOT PRIVATE."""
    RECORD = "record"
    """One record is added or removed."""
    SUBJECT = "subject"
    """All records of one subject (a patient, a speaker, a user) are added or removed."""
    NODE = "node"
    """A node's whole training set is there, or it is empty and its update zero."""

    @property
    def change(self) -> str:
        """What one change of the neighbouring data set is, in words."""
        return _CHANGES[self.value]


_CHANGES = {
    "none": "nothing",
    "record": "one record added to or removed from any one node's training data",
    "subject": "all records of one subject added to or removed from any one node's training data",
    "node": "all training data of any one node kept or left out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """The promise, and the public knobs of the mechanism that keeps it."""

    unit: str = "record"
    """A value of Unit."""
    epsilon: float = 8.0
    """The most that any node may spend, at `delta`."""
    delta: float = 1e-5
    clip_norm: float = 1.0
    """C, the bound on one unit's contribution to a step's sum, in L2."""
    clipping: str = "bookkeeping"
    """How a step's clipped sum is computed, one of CLIPPINGS; the sums are the same. "hooks" is
    Opacus's way, slower and with more memory."""
    clip_shares: str = ""
    """How C is shared out: "" clips the whole gradient at C; "equal" gives each modality's
    encoder, and the rest of the model, the same share; "image=2,audio=1,rest=1" gives shares in
    that proportion. The squares of the parts add up to the square of C."""
    adaptive_clip: bool = False
    """C follows a quantile of the gradients' norms, by a noisy count of those below it that is
    paid for with the sum (Andrew et al. 2021, arXiv:1905.03871v5); it begins at `clip_norm`."""
    clip_quantile: float = 0.5
    """gamma: the share of units that C is to leave unclipped."""
    clip_rate: float = 0.2
    """eta_C: C goes by a factor of up to exp(eta_C) from round to round."""
    count_noise: float = 0.0
    """sigma_b, the noise of that count. 0: a twentieth of the expected batch, or of min_nodes
    with unit "node", and at least twice the noise multiplier."""
    sample_rate: float = 0.25
    """q, the chance that a record is in a step's batch; declared, never derived from data."""
    noise_multiplier: float = 0.0
    """sigma, the noise's standard deviation in units of C. 0: calibrated from epsilon."""
    declared_records: int = 0
    """The public size of a node's training data; q times this is the divisor of a step's sum.
    0 in a simulation: the mean size, rounded to one digit, and the run says so."""
    declared_subjects: int = 0
    """The same for unit "subject": the public number of subjects in a node's training data."""
    records_per_subject: int = 16
    """Unit "subject": the most records that one subject contributes to a step, drawn anew."""
    noise_by: str = "nodes"
    """Unit "node": "nodes" each add a share of the noise, so that the sum of `noise_nodes`
    updates carries all of it; "server" adds it after clipping, and is trusted with the updates."""
    noise_nodes: int = 1
    """Unit "node", noise by nodes: over how many updates the noise is shared out. With 1 each
    update keeps the promise by itself; with more, only sums do, and the server is trusted to
    look at nothing else. At most federation.min_nodes."""
    records_are_units: bool = False
    """Go on with unit "record" though subjects repeat in the manifest."""
    noise_seed: str = ""
    """Makes sampling and noise repeatable, and so removable by whoever knows the seed: for
    simulations. Real nodes refuse it, but in trials that say NOT PRIVATE. Empty: the operating
    system's entropy."""


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
    count_noise: float = 0.0
    """sigma_b, the noise of the count of unclipped units that is released beside each sum where
    the clip norm adapts (Andrew et al. 2021, arXiv:1905.03871v5); 0: there is no such count.
    `noise_multiplier` is that of sum and count together: what is accounted."""

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
        counted = math.isfinite(self.count_noise) and self.count_noise > self.noise_multiplier / 2
        if self.count_noise and not counted:
            raise PrivacyError(
                f"count_noise = {self.count_noise}, but it must be above half the noise_multiplier",
                where="privacy",
            )

    @property
    def sum_noise(self) -> float:
        """z_delta, the noise of the sum alone, in units of C: more than `noise_multiplier` where a
        count is released too (Andrew et al. 2021, arXiv:1905.03871v5, theorem 1)."""
        z = self.noise_multiplier
        if not self.count_noise:
            return z
        return float((z**-2 - (2 * self.count_noise) ** -2) ** -0.5)


REST = "rest"
"""The part of a model that belongs to no single modality."""


def clip_shares(text: str, names: tuple[str, ...]) -> dict[str, float]:
    """The share of C of each modality in `names` and of the "rest"; {} where C is not shared out.

    `text` is a value of PrivacyConfig.clip_shares. The squares of the shares add up to 1.

    >>> clip_shares("a=3,rest=4", ("a",))
    {'a': 0.6, 'rest': 0.8}

    Raises PrivacyError where a name or a number is wrong.
    """
    if not text:
        return {}
    known = (*names, REST)
    weights = dict.fromkeys(known, 1.0) if text == "equal" else {}
    for item in () if text == "equal" else text.split(","):
        name, _, number = (piece.strip() for piece in item.partition("="))
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if name not in known or not 0 < weights[name] < 1e6:
            raise PrivacyError(
                f"clip_shares = {text!r}: {item.strip()!r} is no share",
                where="privacy",
                hint=f'write "equal", or a positive number for each of {", ".join(known)}',
            )
    if missing := [name for name in known if name not in weights]:
        raise PrivacyError(
            f"clip_shares = {text!r} gives no share to {missing[0]}", where="privacy"
        )
    length = math.sqrt(sum(weight**2 for weight in weights.values()))
    return {name: weights[name] / length for name in known}


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
    count_noise: float = 0.0

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism that the line stands for. Raises PrivacyError where it is none."""
        try:
            unit = Unit(self.unit)
        except ValueError:
            raise PrivacyError(f"unit = {self.unit!r} is unknown", where="books") from None
        return Mechanism(
            unit=unit,
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            steps=self.steps,
            count_noise=self.count_noise,
        )

    def as_dict(self) -> dict[str, Any]:
        """The line as plain values, ready for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}
