"""What the nodes of a run have spent, from the books alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism
from fedfuse.privacy.views import History

__all__ = ["epsilons", "rounds_left", "worst"]


def epsilons(nodes: Mapping[str, History], delta: float) -> dict[str, float]:
    """The epsilon of each node. Equal histories are computed once."""
    return {name: accounting.epsilon(past, delta) for name, past in nodes.items()}


def worst(nodes: Mapping[str, History], delta: float) -> float:
    """The epsilon of the node that spent most, on the coarse grid, for a look while it runs.

    Still an upper bound, and at most some percent above the statement in the summary.
    """
    return max(
        (
            accounting.epsilon(past, delta, grid=accounting.CALIBRATION_GRID)
            for past in _largest(nodes.values())
        ),
        default=0.0,
    )


def rounds_left(
    nodes: Mapping[str, History], ahead: Mechanism, most: int, *, epsilon: float, delta: float
) -> int:
    """How many rounds of `ahead`, at most `most`, every node can still afford."""
    histories = _largest(nodes.values()) or [()]
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
