"""What the nodes of a run have spent, from the books alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Event, Mechanism, Unit
from fedfuse.privacy.views import History, of_sum

__all__ = ["Spent", "epsilons", "rounds_left", "worst"]

_Kind = tuple[Unit, float, float, float, float]


class Spent:
    """What all events of a run come to, without a line for each node and round.

    Of each node the mechanisms, equal ones with their steps added up. Nodes that did the same share
    one history, so a round of ten thousand nodes makes one new one.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.nodes: dict[str, History] = {}
        self._next: dict[tuple[int, _Kind, int], History] = {}
        self._kept: list[History] = []  # so that no id in `_next` is given twice
        self._of_kind: dict[tuple[str, float, float, float, int, float], Mechanism] = {}
        self._rounds: dict[int, tuple[int, Mechanism]] = {}
        self.add(events)

    def __bool__(self) -> bool:
        return bool(self.nodes)

    def add(self, events: Iterable[Event]) -> None:
        """Enters events, reserved or spent: both count."""
        for event in events:
            mechanism = self._mechanism(event)
            past = self.nodes.get(event.node, ())
            self.nodes[event.node] = self._after(past, mechanism)
            if mechanism.unit is Unit.NODE:
                spent, quietest = self._rounds.get(event.round, (0, mechanism))
                self._rounds[event.round] = (
                    spent + (event.status == "spent"),
                    min(quietest, mechanism, key=lambda m: m.noise_multiplier),
                )

    def histories(self) -> list[History]:
        """The different histories of all nodes."""
        return list({id(past): past for past in self.nodes.values()}.values())

    def of_model(self, noise_nodes: int) -> History:
        """What the rounds' sums release, with unit "node"; see `views.of_model`."""
        return tuple(
            of_sum(self._rounds[round][1], self._rounds[round][0], noise_nodes)
            for round in sorted(self._rounds)
        )

    def _mechanism(self, event: Event) -> Mechanism:
        key = (
            event.unit,
            event.sample_rate,
            event.noise_multiplier,
            event.clip_norm,
            event.steps,
            event.count_noise,
        )
        if key not in self._of_kind:
            self._of_kind[key] = event.mechanism
        return self._of_kind[key]

    def _after(self, past: History, mechanism: Mechanism) -> History:
        """`past` and `mechanism`, the same object for all nodes that come from the same `past`."""
        key = id(past), _kind(mechanism), mechanism.steps
        if key not in self._next:
            merged, found = [], False
            for one in past:
                if _kind(one) == _kind(mechanism):
                    one, found = replace(one, steps=one.steps + mechanism.steps), True
                merged.append(one)
            self._next[key] = tuple(merged if found else [*merged, mechanism])
            self._kept.append(past)
        return self._next[key]


def _kind(mechanism: Mechanism) -> _Kind:
    return (
        mechanism.unit,
        mechanism.sample_rate,
        mechanism.noise_multiplier,
        mechanism.clip_norm,
        mechanism.count_noise,
    )


def epsilons(nodes: Mapping[str, History], delta: float) -> dict[str, float]:
    """The epsilon of each node. Equal histories are computed once."""
    return {name: accounting.epsilon(past, delta) for name, past in nodes.items()}


def worst(histories: Iterable[History], delta: float) -> float:
    """The epsilon of the node that spent most, on the coarse grid, for a look while it runs.

    Still an upper bound, and at most some percent above the statement in the summary.
    """
    return max(
        (
            accounting.epsilon(past, delta, grid=accounting.CALIBRATION_GRID)
            for past in _largest(histories)
        ),
        default=0.0,
    )


def rounds_left(
    pasts: Iterable[History], ahead: Mechanism, most: int, *, epsilon: float, delta: float
) -> int:
    """How many rounds of `ahead`, at most `most`, every node can still afford."""
    histories = _largest(pasts) or [()]
    for count in range(most, 0, -1):
        if all(accounting.within([*past, *[ahead] * count], epsilon, delta) for past in histories):
            return count
    return 0


def _largest(histories: Iterable[History]) -> list[History]:
    """The histories that none of the others contains: theirs are the largest epsilons."""
    found: dict[tuple[tuple[float, float], ...], dict[int, History]] = {}
    for past in histories:
        kinds = tuple(sorted({(m.sample_rate, m.noise_multiplier) for m in past}))
        found.setdefault(kinds, {})[_steps(past)] = past
    kept: list[History] = []
    for kinds, by_steps in found.items():
        # Of one kind of mechanism, the most steps cost most; of several, all must be asked.
        kept += [by_steps[max(by_steps)]] if len(kinds) == 1 else list(by_steps.values())
    return kept


def _steps(past: Sequence[Mechanism]) -> int:
    return sum(mechanism.steps for mechanism in past)
