"""A node's own books: what it has reserved and spent, in a ledger, or in Flower's state.

A round is entered before a record is read, and committed once its update is ready to leave.
Whatever happens in between, the entry counts.

    LedgerBooks   a file of the node's own, see `fedfuse.privacy.ledger`: outlives every run, and is
                  shared by all servers and runs that use the data
    SeededBooks   of trials whose noise the server knows: what the ledger enters is no promise
    StateBooks    in the state that Flower keeps for the node: for simulations, where a run's
                  nodes end with it
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, RecordDict, UserConfig

from fedfuse.errors import LedgerError, PrivacyError
from fedfuse.federation.wire import TrainRequest
from fedfuse.privacy.ledger import Allow, Entry, Ledger
from fedfuse.privacy.spec import Event, Mechanism

__all__ = ["UNSIGNED", "Books", "DurableContext", "LedgerBooks", "SeededBooks", "StateBooks"]

UNSIGNED = "unsigned"
"""In a ledger: the server of a request that nobody signed."""

_KEY = "fedfuse.books"


class Books(Protocol):
    """Where a node enters what it spends."""

    def reserve(self, event: Event, request: TrainRequest, allow: Allow) -> Callable[[], None]:
        """Enters `event`, on the disk or in safety, if `allow` lets it; gives what commits it.

        `allow` gets all that was spent on the same data before, and raises where no more may be.
        Raises PrivacyError where the request was answered before. Nothing is entered then.
        """
        ...

    def expose(self, node: str, request: TrainRequest) -> None:
        """Enters that a run without a promise reads the data: no figure holds for it any more."""
        ...

    def head(self) -> tuple[str, str]:
        """(the ledger's id, the hash of its last line); ("", "") where there is no ledger."""
        ...


class LedgerBooks:
    """Books in a ledger, for one data set."""

    def __init__(self, ledger: Ledger, dataset: str, *, alone: bool) -> None:
        """`alone`: refuse to spend while the ledger knows another data set: `dataset` was made
        from the records, so it is another name as soon as one of them changes."""
        self._ledger, self._dataset, self._alone = ledger, dataset, alone

    def reserve(self, event: Event, request: TrainRequest, allow: Allow) -> Callable[[], None]:
        """As `Books.reserve`. Raises LedgerError where the ledger cannot be used or trusted."""

        def decide(history: tuple[Mechanism, ...]) -> None:
            others = set(self._ledger.datasets()) - {self._dataset}
            if self._alone and others:
                raise LedgerError(
                    "this node's records are not those that its ledger knows",
                    where=str(self._ledger.path),
                    hint="if records were added or changed, set data.dataset in node.toml to "
                    f"{min(others)!r}, so that what was spent goes on counting; give other data "
                    "a ledger or a name of its own",
                )
            self._check_round(request)
            allow(history)

        entry = self._ledger.reserve(
            self._dataset,
            event.mechanism,
            run=request.run,
            server=request.server or UNSIGNED,
            node=event.node,
            round=event.round,
            request=f"{request.request}/{event.node}",
            allow=decide,
        )
        return lambda: self._commit(entry)

    def expose(self, node: str, request: TrainRequest) -> None:
        """As `Books.expose`. Raises LedgerError as `reserve`."""
        self._check_round(request)
        self._ledger.expose(
            self._dataset,
            run=request.run,
            server=request.server or UNSIGNED,
            node=node,
            round=request.round,
            request=f"{request.request}/{node}",
        )

    def _check_round(self, request: TrainRequest) -> None:
        """Raises PrivacyError where the run is further already. A round may come again: its server
        may have been stopped in it."""
        last = self._ledger.last_round(request.run)
        if request.round < last:
            raise PrivacyError(
                f"round {request.round} is over: round {last} of this run was answered before"
            )

    def _commit(self, entry: Entry) -> None:
        self._ledger.commit(entry)

    def head(self) -> tuple[str, str]:
        """As `Books.head`."""
        return self._ledger.id, self._ledger.head


class SeededBooks:
    """Books of a node whose noise the server knows: each round is one without a promise."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def reserve(self, event: Event, request: TrainRequest, allow: Allow) -> Callable[[], None]:
        """Enters that the data is read without a promise; `allow` sees no history, since no figure
        holds."""
        allow(())
        self._books.expose(event.node, request)
        return lambda: None

    def expose(self, node: str, request: TrainRequest) -> None:
        """As `Books.expose`."""
        self._books.expose(node, request)

    def head(self) -> tuple[str, str]:
        """As `Books.head`."""
        return self._books.head()


class DurableContext(Context):
    """A context whose state can be put in safety before its message is answered."""

    def __init__(
        self,
        *,
        run_id: int,
        node_id: int,
        node_config: UserConfig,
        state: RecordDict,
        keep: Callable[[RecordDict], None],
    ) -> None:
        super().__init__(run_id, node_id, node_config, state, {})
        self._keep = keep

    def keep(self) -> None:
        """Hands the state to whoever outlives this process."""
        self._keep(self.state)


class StateBooks:
    """The events of one simulated node, in Flower's state.

    What a round costs does not grow with the rounds before it: equal events are one kind, with
    their number, and a line for each is put behind the others and never read again:

        kinds    JSON: each kind's fields but round and status
        counts   how many events are of each kind
        lines    "request round status kind", the last one the newest
    """

    def __init__(self, context: Context, opening: Iterable[Event] = ()) -> None:
        """`opening`: the events of earlier runs, entered if the books are new."""
        self._context = context
        if _KEY not in context.state:
            self._write([], [], "")
            for event in opening:
                self._enter(event, "-")

    def events(self) -> tuple[Event, ...]:
        """All that the node has reserved or spent."""
        kinds, _, lines = self._read()
        found = []
        for line in lines.splitlines():
            _, round, status, kind = line.split()
            found.append(Event(round=int(round), status=status, **kinds[int(kind)]))
        return tuple(found)

    def reserve(self, event: Event, request: TrainRequest, allow: Allow) -> Callable[[], None]:
        """As `Books.reserve`; the state is put in safety where that can be done."""
        kinds, counts, lines = self._read()
        if f"\n{request.request} " in f"\n{lines}":
            raise PrivacyError(
                f"request {request.request} was answered before: what was spent on it stays spent"
            )
        allow(
            tuple(
                dataclasses.replace(mechanism, steps=mechanism.steps * count)
                for kind, count in zip(kinds, counts, strict=True)
                for mechanism in [Event(round=0, status="", **kind).mechanism]
            )
        )
        self._enter(dataclasses.replace(event, status="reserved"), request.request)
        if isinstance(self._context, DurableContext):
            self._context.keep()
        return lambda: self._commit(request.request)

    def _enter(self, event: Event, request: str) -> None:
        kinds, counts, lines = self._read()
        kind = event.as_dict()
        round, status = kind.pop("round"), kind.pop("status")
        if kind not in kinds:
            kinds, counts = [*kinds, kind], [*counts, 0]
        place = kinds.index(kind)
        counts[place] += 1
        self._write(kinds, counts, f"{lines}{request} {round} {status} {place}\n")

    def _commit(self, request: str) -> None:
        kinds, counts, lines = self._read()
        start = lines.rfind("\n", 0, -1) + 1
        last, round, status, kind = lines[start:].split() if lines else ("", "", "", "")
        if last != request or status != "reserved":
            raise PrivacyError("an update was spent that was never reserved", where="books")
        self._write(kinds, counts, f"{lines[:start]}{request} {round} spent {kind}\n")

    def expose(self, node: str, request: TrainRequest) -> None:
        """Nothing to enter: a simulated node ends with its run, which says NOT PRIVATE."""

    def head(self) -> tuple[str, str]:
        """No ledger."""
        return "", ""

    def _read(self) -> tuple[list[dict[str, Any]], list[int], str]:
        state = self._context.state.config_records[_KEY]
        counts: Any = state["counts"]
        return json.loads(str(state["kinds"])), list(counts), str(state["lines"])

    def _write(self, kinds: list[dict[str, Any]], counts: list[int], lines: str) -> None:
        self._context.state[_KEY] = ConfigRecord(
            {"kinds": json.dumps(kinds), "counts": counts, "lines": lines}
        )
