"""What a run tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Observer", "RoundRecord", "RunInfo", "Silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is known before the first round."""

    name: str
    engine: str
    workers: int
    device: str
    nodes: tuple[str, ...]
    rounds: int
    first_round: int
    """1, or the round that a resumed run goes on with."""
    parameters: int
    """Trained parameters of the model."""
    private: bool
    epsilon: float | None
    delta: float | None
    sigma: float | None
    sample_rate: float | None
    expected_batch: float
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What is known after a round."""

    round: int
    rounds: int
    metrics: dict[str, float]
    """On the server's test records."""
    epsilon: float | None
    """What the node that spent most has spent so far; None where nothing is promised."""
    epsilon_allowed: float | None
    nodes_ok: int
    failures: dict[str, str]
    seconds: float
    bytes_sent: int
    bytes_received: int


class Observer(Protocol):
    """Is told as things happen, in the process and thread that conducts the run."""

    def prepared(self, info: RunInfo) -> None:
        """The data is there, the first round is about to start."""
        ...

    def round_started(self, round: int) -> None:
        """A round starts."""
        ...

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        """A node answered, or is known not to; `problem` is None for a good update."""
        ...

    def round_finished(self, record: RoundRecord) -> None:
        """A round is done, and on the disk."""
        ...


class Silent:
    """Watches nothing."""

    def prepared(self, info: RunInfo) -> None:
        """Does nothing."""

    def round_started(self, round: int) -> None:
        """Does nothing."""

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        """Does nothing."""

    def round_finished(self, record: RoundRecord) -> None:
        """Does nothing."""
