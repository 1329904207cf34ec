"""What to mind about a plan: each warning with its reason and what to do. Torch-free.

A warning changes nothing about the promise: it says that the promise is worth little, that nodes
would refuse it, or that it leaves nothing to learn. All limits are here, each with its source.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedfuse.privacy import accounting
from fedfuse.privacy.accounting import shown
from fedfuse.privacy.planner import Plan
from fedfuse.privacy.spec import Unit

__all__ = ["Caution", "cautions"]

WEAK_EPSILON = 10.0
"""Beyond it: "weak to no formal guarantees" (Ponomareva et al. 2023, arXiv:2303.00654v3, the tiers
of section 5; up to 1 is its strong tier, up to 10 its reasonable one)."""
HIGH_RATE = 0.5
"""Above it a unit is in most of the batches, so that not knowing in which hides little."""
NOISE_LIMIT = 1.0
"""Of `Plan.noise_of_run`. At 1 the noise has moved the weights as far as the data could have with
each gradient of norm C and all of them pointing one way, which no real data do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """One thing to mind."""

    name: str
    """For scripts: it does not change."""
    what: str
    why: str
    do: str


def cautions(plan: Plan) -> tuple[Caution, ...]:
    """What to mind about `plan`, the gravest first."""
    return (*_about_sigma(plan), *_about_delta(plan), *_about_epsilon(plan), *_about_use(plan))


def _about_sigma(plan: Plan) -> Iterator[Caution]:
    least = accounting.LEAST_SIGMA
    if plan.terms.sigma < least:
        yield Caution(
            name="sigma-refused",
            what=f"sigma = {plan.terms.sigma:g} is below {least:g}: every node refuses it",
            why="so little noise hides next to nothing",
            do=f"take sigma = {least:g} at least",
        )


def _about_delta(plan: Plan) -> Iterator[Caution]:
    delta, units = plan.terms.delta, plan.terms.units
    nouns = f"{plan.terms.unit}s"
    if units is None:
        node = plan.terms.unit is Unit.NODE
        yield Caution(
            name="units-unknown",
            what=f"without the public number of {nouns}, delta cannot be judged"
            + ("" if node else ", nor the noise"),
            why=f"delta has to be far below 1 / {nouns}"
            + ("" if node else ", and noise is divided by the expected batch"),
            do=f"give {'--nodes' if node else '--records'}",
        )
        return
    enough = f"take delta = {10.0 ** math.floor(math.log10(0.1 / units)):g} at most"
    if delta * units >= 1:
        yield Caution(
            name="delta-too-large",
            what=f"delta = {delta:g} is not below 1 / {units} {nouns}",
            # Dwork and Roth 2014, Algorithmic Foundations of Differential Privacy, section 2.3.
            why=f"handing out one of the {units} {nouns} whole would keep that promise",
            do=enough,
        )
    elif delta * units * 10 > 1:
        yield Caution(
            name="delta-large",
            what=f"delta = {delta:g} is more than a tenth of 1 / {units} {nouns}",
            # Well below 1 / n: Ponomareva et al. 2023 (arXiv:2303.00654v3), section 5.
            why=f"handing out one of the {units} {nouns} whole, with a chance of "
            f"{delta * units:.2g}, would keep that promise",
            do=enough,
        )


def _about_epsilon(plan: Plan) -> Iterator[Caution]:
    terms = plan.terms
    if terms.epsilon > WEAK_EPSILON:
        yield Caution(
            name="epsilon-weak",
            what=f"epsilon = {terms.epsilon:g} is weak",
            why=f"above {WEAK_EPSILON:g} the formal guarantee says little",
            do="take more noise, fewer rounds or a lower sample rate",
        )
    if plan.at_end:
        yield Caution(
            name="at-end",
            what=f"{plan.solved} stands at the end of its range: the run spends "
            f"epsilon = {shown(plan.spent)}, not {terms.epsilon:g}",
            why="the other terms leave room that it cannot use",
            do="ask for a smaller epsilon, or use the room for another of the terms",
        )
    if terms.unit is not Unit.NODE and terms.sample_rate > HIGH_RATE:
        full = dataclasses.replace(terms.mechanism(), sample_rate=1.0)
        most = accounting.epsilon([full], terms.delta, grid=accounting.CALIBRATION_GRID)
        yield Caution(
            name="rate-high",
            what=f"sample rate q = {terms.sample_rate:g}: the amplification by sampling is lost",
            why=f"each {terms.unit} is in most batches: with all {terms.unit}s in each batch the "
            f"run would cost epsilon = {shown(most)}, not much more than {shown(plan.spent)}",
            do="take a lower rate, or q = 1 and fewer steps, and compare the noise of the run",
        )


def _about_use(plan: Plan) -> Iterator[Caution]:
    terms, batch = plan.terms, plan.terms.expected_batch
    if terms.unit is not Unit.NODE and batch is not None and batch < 1:
        assert terms.units is not None
        empty = (1 - terms.sample_rate) ** terms.units
        yield Caution(
            name="batches-empty",
            what=f"a batch holds {batch:.2g} {terms.unit}s on average: {empty:.0%} are empty",
            why="an empty batch adds noise and costs privacy like any other",
            do=f"take a sample rate above 1 / {terms.units}, better many times that",
        )
    ratio = plan.noise_of_run
    if ratio is not None and ratio > NOISE_LIMIT:
        yield Caution(
            name="noise-hopeless",
            what=f"the noise of the run is {ratio:.3g} times the most that its signal can be",
            why="sigma sqrt(parameters) / (expected batch x sqrt(nodes x steps)) is above "
            f"{NOISE_LIMIT:g}: noise moves the weights farther than the data can",
            # At one epsilon sigma / (q sqrt(T)) hardly moves: Sander et al. 2023
            # (arXiv:2210.03403v2). So rate and rounds are no way out; n, d and epsilon are.
            do=f"plan for more {'' if terms.unit is Unit.NODE else f'{terms.unit}s or '}nodes, "
            "fewer parameters or a larger epsilon; rate and rounds hardly change it",
        )
