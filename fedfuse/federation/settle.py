"""What a configuration leaves open, settled before the first round: nothing is decided later."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError
from fedfuse.federation.masking.terms import MOST_NODES, colluders, threshold_for
from fedfuse.federation.pinning import declaration
from fedfuse.federation.rounds import expected_batch
from fedfuse.privacy.adaptive import count_noise_for
from fedfuse.privacy.plan import plan
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = ["Settled", "settle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A configuration with nothing left open, and what that rests on."""

    config: RunConfig
    mechanism: Mechanism | None
    """Of one round in every node; None promises nothing."""
    assumptions: tuple[str, ...]
    """What the promise takes as given."""


def settle(
    config: RunConfig, *, mean_records: float | None, mean_subjects: float | None = None
) -> Settled:
    """`config` with learning rate, steps, declared size and sigma filled in.

    mean_records   the nodes' mean size in a simulation, which takes it, rounded, as the declared
                   one where none is given; None with real nodes, whose size nobody may count
    mean_subjects  the same, counted in subjects

    Raises ConfigError where what must be public is not declared, PrivacyError where the promise
    cannot be kept.
    """
    config = config.with_defaults()
    if not config.private:
        return Settled(config=config, mechanism=None, assumptions=())
    privacy, train = config.privacy, config.train
    assumptions = [
        "the valid and test splits belong to the server: the promise covers training records only",
        "the configuration is public and was not chosen by looking at the training records",
        *declaration(config),
    ]
    if privacy.unit == Unit.RECORD and not privacy.declared_records:
        declared = _declared("declared_records", mean_records, assumptions)
        privacy = dataclasses.replace(privacy, declared_records=declared)
    if privacy.unit == Unit.SUBJECT:
        assumptions.append("no subject has records at two nodes; if one has, its epsilons compose")
        if not privacy.declared_subjects:
            declared = _declared("declared_subjects", mean_subjects, assumptions)
            privacy = dataclasses.replace(privacy, declared_subjects=declared)
    if privacy.unit == Unit.NODE:
        assumptions.append("which nodes were asked, and which answered, is public")
        if privacy.noise_by == "server":
            assumptions.append("the server is trusted: it sees the updates, and adds the noise")
        elif privacy.noise_nodes > 1 and not config.federation.secure_aggregation:
            assumptions.append(
                f"the server looks at nothing but sums, and {privacy.noise_nodes} nodes in each "
                "round add their share of the noise"
            )
    if privacy.noise_seed:
        assumptions.append("the noise follows from a seed: whoever knows it can remove the noise")
    a_round = 1 if privacy.unit == Unit.NODE else train.local_steps
    whole = plan(privacy, steps=train.rounds * a_round)
    assert whole is not None  # private
    privacy = dataclasses.replace(privacy, noise_multiplier=whole.noise_multiplier)
    config = dataclasses.replace(config, privacy=privacy)
    mechanism = dataclasses.replace(whole, steps=a_round)
    if privacy.adaptive_clip:
        by_node = privacy.unit == Unit.NODE
        units = config.federation.min_nodes if by_node else expected_batch(config)
        noise = privacy.count_noise or count_noise_for(units, whole.noise_multiplier)
        mechanism = dataclasses.replace(mechanism, count_noise=noise)
        privacy = dataclasses.replace(privacy, count_noise=noise)
        config = dataclasses.replace(config, privacy=privacy)
    return Settled(
        config=config,
        mechanism=mechanism,
        assumptions=tuple(assumptions),
    )


def masked_assumptions(config: RunConfig, nodes: int, *, least: int = 0) -> tuple[str, ...]:
    """What masks take as given, where `nodes` are connected; or from `least` to so many, each of
    which is then covered. Raises ConfigError for too few."""
    federation, privacy = config.federation, config.privacy
    rounds = []
    for there in range(least or nodes, nodes + 1):
        asked = max(federation.min_nodes, round(federation.fraction * there), 1)
        if not 2 <= asked <= min(there, MOST_NODES):
            raise ConfigError(
                f"{asked} nodes are asked in a round, but masks need 2 to {min(there, MOST_NODES)}",
                where="federation.secure_aggregation",
                hint="take more nodes, or another federation.fraction",
            )
        threshold = max(threshold_for(asked), federation.min_nodes)
        shares = privacy.noise_nodes if config.private else 0
        rounds.append((asked, threshold, colluders(asked, threshold, shares)))
    few, many = min(rounds)[0], max(rounds)[0]
    asked_text = f"{few}" if few == many else f"{few} to {many}"
    threshold, bad = min(t for _, t, _ in rounds), min(c for _, _, c in rounds)
    noise = "each adds its share of the noise, and " if config.private else ""
    return (
        f"the server, though it may lie, sees only sums of {threshold} or more of the {asked_text} "
        f"updates of a round, as long as it works together with at most {bad} of these nodes; "
        f"{noise}they know each other's public keys by another way than the server",
        "the masks are computationally secure: X25519, HKDF-SHA256, ChaCha20, Ed25519",
    )


def _declared(name: str, mean: float | None, assumptions: list[str]) -> int:
    """The mean, to one digit, taken as public in a simulation. Raises ConfigError without one."""
    if mean is None:
        raise ConfigError(
            f"privacy.{name} = 0, but with real nodes nobody may count them",
            hint="declare the public size of a node's training data",
        )
    declared = _rounded(mean)
    assumptions.append(
        f"privacy.{name} = {declared}: the nodes' mean size, to one digit, is taken as public"
    )
    return declared


def _rounded(value: float) -> int:
    """`value` to one significant digit, at least 1.

    >>> [_rounded(x) for x in (0.4, 37.4, 149.0, 951.0)]
    [1, 40, 100, 1000]
    """
    if value < 1:
        return 1
    return int(round(value, -math.floor(math.log10(value))))
