"""What a node allows, whoever asks: its own promise, and which error texts may leave.

The server is never trusted here. What it announces only decides how much the run would cost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedfuse.errors import BudgetExceeded, ConfigError, DataError, FedfuseError, PrivacyError
from fedfuse.federation.wire import TrainRequest
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Event, Mechanism, PrivacyConfig, Unit

__all__ = ["Policy", "scrubbed"]

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:~|\.{0,2})[/\\][^\s'\",;:()]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One node's own promise. `noise_seed` is for simulations only."""

    unit: Unit
    epsilon: float
    delta: float
    noise_seed: str = ""
    trust_server: bool = False
    """Unit "node": that the server adds the noise, or looks at sums only, is taken on trust."""

    @classmethod
    def of(cls, privacy: PrivacyConfig) -> Policy:
        """The promise in a configuration that the node itself wrote."""
        return cls(
            unit=Unit(privacy.unit),
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_seed=privacy.noise_seed,
            trust_server=privacy.noise_by == "server" or privacy.noise_nodes > 1,
        )

    @classmethod
    def of_node(cls, settings: Mapping[str, object]) -> Policy:
        """The promise in a real node's own settings. Raises ConfigError where there is none."""
        if settings.get("not-private") is True:
            return cls(unit=Unit.NONE, epsilon=0.0, delta=0.0)
        epsilon, delta = settings.get("max-epsilon"), settings.get("delta")
        if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
            raise ConfigError(
                "the node's settings hold no promise",
                where="node config",
                hint="set max-epsilon and delta, or not-private=true",
            )
        unit = str(settings.get("unit", Unit.RECORD.value))
        if unit not in (Unit.RECORD, Unit.SUBJECT, Unit.NODE):
            raise ConfigError(
                f"unit = {unit!r}, but it must be record, subject or node", where="node config"
            )
        return cls(
            unit=Unit(unit),
            epsilon=float(epsilon),
            delta=float(delta),
            trust_server=settings.get("trust-server") is True,
        )

    def allow(self, request: TrainRequest, history: Iterable[Event]) -> Mechanism | None:
        """The mechanism to run, if the node may; None where nothing is promised.

        All that the node has run or reserved, and the whole rest of the run as announced, must
        stay within the promise: a run that cannot be finished is not begun.

        Raises BudgetExceeded, or PrivacyError where another promise is asked for.
        """
        mechanism = request.job.mechanism
        if self.unit is Unit.NONE and mechanism is None:
            return None
        if mechanism is None or mechanism.unit is not self.unit:
            asked = Unit.NONE if mechanism is None else mechanism.unit
            raise PrivacyError(
                f'this node promises unit "{self.unit}", but "{asked}" was asked for'
            )
        job = request.job
        if (
            mechanism.unit is Unit.NODE
            and (job.noise_by == "server" or job.noise_nodes > 1)
            and not self.trust_server
        ):
            raise PrivacyError(
                "this node does not trust the server with updates that carry too little noise",
                hint="ask with noise_by = nodes and noise_nodes = 1",
            )
        ahead = request.rounds - request.round + 1
        rest = dataclasses.replace(mechanism, steps=mechanism.steps * ahead)
        past = [event.mechanism for event in history]
        if not accounting.within([*past, rest], self.epsilon, self.delta):
            raise BudgetExceeded(
                f"{ahead} rounds of {mechanism.steps} steps (q = {mechanism.sample_rate:g}, "
                f"sigma = {mechanism.noise_multiplier:g}), after {len(past)} rounds before, would "
                f"spend more than epsilon = {self.epsilon:g} (delta = {self.delta:g})",
                hint="ask for fewer rounds or steps, or for more noise",
            )
        return mechanism


def scrubbed(error: BaseException) -> str:
    """What may leave about `error`: its class, and a text that was made of public settings.

    Texts of other libraries can quote records and paths, and texts about data can quote counts,
    so of those only the class leaves.
    """
    kind = type(error).__name__
    if not isinstance(error, FedfuseError) or isinstance(error, DataError):
        return kind
    text = " ".join(_PATH.sub("<path>", error.what).split())
    return f"{kind}: {text[:400]}"
