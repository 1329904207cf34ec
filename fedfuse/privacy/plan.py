"""From the promise (epsilon) to the mechanism (sigma) that keeps it over a whole run."""

from __future__ import annotations

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, PrivacyConfig, Unit

__all__ = ["plan"]


def plan(privacy: PrivacyConfig, *, steps: int) -> Mechanism | None:
    """The mechanism of all `steps` steps that one node takes in the run; None for unit "none".

    With unit "node" a step is a round's one release, and every round counts in full: q = 1.

    sigma is `privacy.noise_multiplier` if that is set, else calibrated.

    Raises PrivacyError if a set sigma does not keep epsilon, or none would.
    """
    unit = Unit(privacy.unit)
    if unit is Unit.NONE:
        return None
    rate = 1.0 if unit is Unit.NODE else privacy.sample_rate
    sigma = privacy.noise_multiplier or accounting.calibrate(
        privacy.epsilon, privacy.delta, rate, steps
    )
    mechanism = Mechanism(
        unit=unit,
        sample_rate=rate,
        noise_multiplier=sigma,
        clip_norm=privacy.clip_norm,
        steps=steps,
    )
    if not accounting.within([mechanism], privacy.epsilon, privacy.delta):
        raise PrivacyError(
            f"noise_multiplier = {sigma:g} over {steps} steps at rate {rate:g} "
            f"does not keep epsilon = {privacy.epsilon:g} at delta = {privacy.delta:g}",
            where="privacy",
            hint="raise noise_multiplier, or set it to 0 to have it calibrated",
        )
    return mechanism
