"""Who learns what from a run's books: each node's releases, and the model's.

Torch-free. Two adversaries are told apart:

    whoever sees a node's updates   learns from that node's own releases, all of them
    whoever gets the model          learns from sums over nodes

With units "record" and "subject", and without secure aggregation, the server sees the updates, and
the model is computed from them: one figure holds for both, and no gain from summing is claimed.
With unit "node" the two differ, see `of_model`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from fedfuse.privacy.spec import Event, Mechanism, Unit

__all__ = ["History", "by_node", "of_model", "of_sum"]

History = tuple[Mechanism, ...]


def by_node(events: Iterable[Event]) -> dict[str, History]:
    """Each node's mechanisms, reserved or spent: both count."""
    nodes: dict[str, list[Mechanism]] = {}
    for event in events:
        nodes.setdefault(event.node, []).append(event.mechanism)
    return {node: tuple(nodes[node]) for node in sorted(nodes)}


def of_model(events: Iterable[Event], noise_nodes: int = 1) -> History:
    """Unit "node", noise by nodes: what the rounds' sums are, to whoever sees sums only.

    In a round with n good updates, each with noise sigma C / sqrt(noise_nodes), the sum carries
    sigma C sqrt(n / noise_nodes), while a node that comes or goes moves it by C at most.
    Only nodes that answered (status "spent") are counted for noise; every round that was begun
    counts as a release, one without a good update with the noise of one node.

    Assumes that every node that answered added its share.
    """
    rounds: dict[int, list[Event]] = {}
    for event in events:
        if event.unit == Unit.NODE:
            rounds.setdefault(event.round, []).append(event)
    views = []
    for number in sorted(rounds):
        spent = sum(event.status == "spent" for event in rounds[number])
        quietest = min((event.mechanism for event in rounds[number]), key=_noise)
        views.append(of_sum(quietest, spent, noise_nodes))
    return tuple(views)


def of_sum(quietest: Mechanism, spent: int, noise_nodes: int) -> Mechanism:
    """What one round's sum releases; see `of_model`."""
    more = math.sqrt(max(spent, 1) / noise_nodes)
    return dataclasses.replace(
        quietest,
        noise_multiplier=quietest.noise_multiplier * more,
        count_noise=quietest.count_noise * more,
    )


def _noise(mechanism: Mechanism) -> float:
    return mechanism.noise_multiplier
