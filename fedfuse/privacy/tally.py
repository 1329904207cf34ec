"""What the lines of a ledger add up to: for each data set, everything that counts as spent."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.errors import LedgerError
from fedfuse.privacy.chain import Entry, Kind
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = ["Account", "Tally"]

_Same = tuple[Unit, float, float, float, float]
"""unit, q, sigma, C, sigma_b: steps of mechanisms that agree in these are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What was spent on one data set under one unit."""

    dataset: str
    unit: Unit
    runs: int
    servers: int
    rounds: int
    """Different pairs of run and round."""
    steps: int
    open: int
    """Reservations without a commit: they count as spent like all others."""
    exposed: bool = False
    """The data set was also read for a run that promises nothing: whatever was spent, there is no
    guarantee. Such runs themselves are an account of unit "none"."""
    history: tuple[Mechanism, ...]


class Tally:
    """The sums over all entries taken so far."""

    def __init__(self, name: str) -> None:
        """`name`: what messages call the ledger."""
        self.name = name
        self.requests: dict[str, bool] = {}
        """The ids of all requests that something was spent on: whether it was committed here."""
        self.servers: dict[str, str] = {}
        """Of each run: the server that used its id first."""
        self.last: dict[str, int] = {}
        """Of each run: the last of its rounds that something was spent on."""
        self.open: dict[int, Entry] = {}
        """By number: the reservations without a commit."""
        self.exposed: set[str] = set()
        """The data sets that a run without a promise has read."""
        self._steps: dict[str, dict[_Same, int]] = {}
        self._rounds: dict[tuple[str, Unit], dict[str, set[int]]] = {}
        self._served: dict[tuple[str, Unit], set[str]] = {}

    def take(self, entry: Entry) -> None:
        """Adds an entry. Raises LedgerError where it contradicts those before it."""
        if entry.kind is Kind.COMMITTED:
            self._commit(entry)
        elif entry.mechanism is not None:
            if entry.kind is Kind.RESERVED:
                if entry.request in self.requests:
                    raise self._wrong(entry, "it spends on a request for a second time")
                self.open[entry.number] = entry
            self._spend(entry, entry.mechanism)
        elif entry.kind is Kind.EXPOSED:
            self._count(entry, Unit.NONE)
            self.exposed.add(entry.dataset)

    def history(self, dataset: str) -> tuple[Mechanism, ...]:
        """All that was spent on `dataset`; equal mechanisms are one, with their steps summed."""
        return tuple(
            Mechanism(
                unit=unit,
                sample_rate=q,
                noise_multiplier=sigma,
                clip_norm=C,
                steps=steps,
                count_noise=sigma_b,
            )
            for (unit, q, sigma, C, sigma_b), steps in self._steps.get(dataset, {}).items()
        )

    def datasets(self) -> tuple[str, ...]:
        """The names of all data sets that something was spent on, sorted."""
        return tuple(sorted(self._steps.keys() | self.exposed))

    def accounts(self) -> tuple[Account, ...]:
        """Each data set and unit, sorted by name."""
        return tuple(
            Account(
                dataset=dataset,
                unit=unit,
                runs=len(rounds),
                servers=len(self._served[dataset, unit]),
                rounds=sum(map(len, rounds.values())),
                steps=sum(mechanism.steps for mechanism in history),
                open=sum(
                    entry.dataset == dataset
                    and entry.mechanism is not None
                    and entry.mechanism.unit is unit
                    for entry in self.open.values()
                ),
                exposed=dataset in self.exposed,
                history=history,
            )
            for (dataset, unit), rounds in sorted(self._rounds.items())
            for history in [tuple(m for m in self.history(dataset) if m.unit is unit)]
        )

    def _commit(self, entry: Entry) -> None:
        reserved = self.open.get(entry.of)
        if reserved is None or _asked(reserved) != _asked(entry):
            raise self._wrong(entry, f"it commits entry {entry.of}, which was not open")
        del self.open[entry.of]
        self.requests[entry.request] = True

    def _spend(self, entry: Entry, mechanism: Mechanism) -> None:
        steps = self._steps.setdefault(entry.dataset, {})
        same = (
            mechanism.unit,
            mechanism.sample_rate,
            mechanism.noise_multiplier,
            mechanism.clip_norm,
            mechanism.count_noise,
        )
        steps[same] = steps.get(same, 0) + mechanism.steps
        self._count(entry, mechanism.unit)

    def _count(self, entry: Entry, unit: Unit) -> None:
        self.requests.setdefault(entry.request, False)
        self.servers.setdefault(entry.run, entry.server)
        self.last[entry.run] = max(self.last.get(entry.run, 0), entry.round)
        account = entry.dataset, unit
        self._rounds.setdefault(account, {}).setdefault(entry.run, set()).add(entry.round)
        self._served.setdefault(account, set()).add(entry.server)

    def _wrong(self, entry: Entry, what: str) -> LedgerError:
        return LedgerError(what, where=f"{self.name}, line {entry.number + 1}")


def _asked(entry: Entry) -> tuple[str, str, str, str, int, str]:
    return entry.dataset, entry.run, entry.server, entry.node, entry.round, entry.request
