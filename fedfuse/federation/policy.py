"""What a node allows, whoever asks: its own promise, its limits, and which texts may leave.

The server is never trusted here. What it announces only decides how much the run would cost, and
each limit that is not met is a refusal: nothing was read, and nothing is spent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedfuse.errors import BudgetExceeded, DataError, FedfuseError, PrivacyError
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, PrivacyConfig, Unit

if TYPE_CHECKING:
    from fedfuse.batch import Schema
    from fedfuse.federation.wire import TrainRequest

__all__ = [
    "ALLOWED",
    "MASKS",
    "OUTPUTS",
    "RECORD_COUNT",
    "REFUSED",
    "REQUIRED",
    "UPDATE",
    "Policy",
    "scrubbed",
]

UPDATE, RECORD_COUNT = "update", "record-count"
OUTPUTS = (UPDATE, RECORD_COUNT)
"""What may leave a node at all. Losses, metrics and norms never do."""
ALLOWED, REQUIRED, REFUSED = "allowed", "required", "refused"
MASKS = (ALLOWED, REQUIRED, REFUSED)
"""Whether updates may, must or must not leave under masks."""

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:~|\.{0,2})[/\\][^\s'\",;:()]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One node's own promise, and the limits of what may be asked. None: any."""

    unit: Unit
    epsilon: float
    delta: float
    noise_seed: str = ""
    """The one seed that sampling and noise may follow from. Simulations, and trials that say NOT
    PRIVATE."""
    trust_server: bool = False
    """Unit "node": that the server adds the noise, or looks at sums only, is taken on trust."""
    records_are_units: bool = False
    """Unit "record": go on though subjects have several records."""
    min_noise_multiplier: float = 0.0
    max_sample_rate: float = 1.0
    max_clip_norm: float = 1e9
    max_rounds: int = 1_000_000
    max_steps: int = 10**12
    """Of one run, all its rounds together."""
    max_parameters: int = 10**13
    tasks: frozenset[str] | None = None
    modalities: frozenset[str] | None = None
    servers: frozenset[str] | None = None
    """Public keys; a request must be signed by one of them."""
    outputs: frozenset[str] = frozenset({UPDATE})
    secure_aggregation: str = ALLOWED
    """One of MASKS."""

    @classmethod
    def of(cls, privacy: PrivacyConfig) -> Policy:
        """The promise in a configuration that the node itself wrote."""
        unit = Unit(privacy.unit)
        return cls(
            unit=unit,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_seed=privacy.noise_seed,
            trust_server=privacy.noise_by == "server" or privacy.noise_nodes > 1,
            records_are_units=True,  # a simulation has looked already
            outputs=frozenset(OUTPUTS if unit is Unit.NONE else (UPDATE,)),
        )

    def check(
        self, request: TrainRequest, schema: Schema, *, counts: bool, masked: bool = False
    ) -> Mechanism | None:
        """The mechanism to run, if all but its cost is allowed; None where nothing is promised.

        schema  what this node's records are
        counts  whether the answer would carry the number of records
        masked  whether it leaves under masks: then the server need not be trusted with a share of
                the noise, since it sees sums alone

        Raises PrivacyError: another promise, or a limit. Looks at no record.
        """
        request.check_signature()
        for what, hint in self._faults(request, schema, counts, masked):
            raise PrivacyError(what, hint=hint)
        mechanism = request.job.mechanism
        if self.unit is Unit.NONE and mechanism is None:
            return None
        if mechanism is None or mechanism.unit is not self.unit:
            asked = Unit.NONE if mechanism is None else mechanism.unit
            raise PrivacyError(
                f'this node promises unit "{self.unit}", but "{asked}" was asked for'
            )
        for name, value, low, high in (
            ("sigma", mechanism.noise_multiplier, self.min_noise_multiplier, float("inf")),
            ("q", mechanism.sample_rate, 0.0, self.max_sample_rate),
            ("C", mechanism.clip_norm, 0.0, self.max_clip_norm),
        ):
            if not low <= value <= high:
                bound = f"at least {low:g}" if value < low else f"at most {high:g}"
                raise PrivacyError(f"{name} = {value:g} is asked for, but this node allows {bound}")
        bare = self._leaves_noise(request, masked)
        if mechanism.unit is Unit.NODE and bare and not self.trust_server:
            raise PrivacyError(
                "this node does not trust the server with updates that carry too little noise",
                hint="ask with noise_by = nodes, and noise_nodes = 1 or secure_aggregation",
            )
        return mechanism

    def check_seed(self, announced: str) -> None:
        """Raises PrivacyError where the run's noise is to follow from a seed that its server knows,
        and this node does not allow it."""
        if announced and announced != self.noise_seed:
            raise PrivacyError(
                "privacy.noise_seed is set: the server could take such noise off, and this node "
                "allows none",
                hint="leave it out; policy.seeded_noise = true is for trials, and NOT PRIVATE",
            )

    def afford(
        self, request: TrainRequest, mechanism: Mechanism
    ) -> Callable[[Iterable[Mechanism]], None]:
        """What decides, from all that was spent before, whether the run can be paid for.

        All that was run or reserved on the data, and the whole rest of the run as announced, must
        stay within the promise: a run that cannot be finished is not begun. Nor is a round that is
        over by then: the request may have waited, and to account takes a while.

        Raises BudgetExceeded, or WireError.
        """
        ahead = request.rounds - request.round + 1
        rest = dataclasses.replace(mechanism, steps=mechanism.steps * ahead)

        def decide(history: Iterable[Mechanism]) -> None:
            past = tuple(history)
            if not accounting.within([*past, rest], self.epsilon, self.delta):
                before = ", after all that was spent before," if past else ""
                raise BudgetExceeded(
                    f"{ahead} rounds of {mechanism.steps} steps (q = {mechanism.sample_rate:g}, "
                    f"sigma = {mechanism.noise_multiplier:g}){before} would spend more than "
                    f"epsilon = {self.epsilon:g} (delta = {self.delta:g})",
                    hint="ask for fewer rounds or steps, or for more noise",
                )
            request.check_time()

        return decide

    def _faults(
        self, request: TrainRequest, schema: Schema, counts: bool, masked: bool
    ) -> Iterator[tuple[str, str]]:
        """(what, hint) of each limit that the request does not keep, besides the mechanism's."""
        if self.servers is not None and request.server not in self.servers:
            who = f"server {request.server[:12]}..." if request.server else "an unsigned request"
            yield f"{who} is not one that this node answers", "ask the node's operator"
        learns = schema.target.kind.value
        if request.task != learns:
            yield f"task {request.task!r}, but this node's records are for {learns!r}", ""
        if self.tasks is not None and request.task not in self.tasks:
            yield f"task {request.task!r} is not allowed here", f"allowed: {_list(self.tasks)}"
        if request.modalities != schema.names:
            yield "the run's modalities are not those of this node's records", ""
        if self.modalities is not None and (more := set(request.modalities) - self.modalities):
            yield f"modality {min(more)!r} is not allowed here", ""
        steps = request.job.steps * request.rounds
        for name, value, most in (
            ("rounds", request.rounds, self.max_rounds),
            ("steps in all rounds", steps, self.max_steps),
            ("parameters", request.parameters, self.max_parameters),
        ):
            if value > most:
                yield f"{value:,} {name}, but this node allows {most:,}", ""
        needed = {UPDATE, *((RECORD_COUNT,) if counts else ())}
        if missing := needed - self.outputs:
            yield f"{min(missing)} is not allowed to leave this node", ""
        if self.secure_aggregation == (REFUSED if masked else REQUIRED):
            yield (
                f"updates leave this node {'without' if masked else 'under'} masks only",
                f"ask with federation.secure_aggregation = {'false' if masked else 'true'}",
            )

    def _leaves_noise(self, request: TrainRequest, masked: bool) -> bool:
        return request.job.noise_by == "server" or (request.job.noise_nodes > 1 and not masked)


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


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
