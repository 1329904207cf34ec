"""A node's own books: the events of all its rounds, in the state that Flower keeps for the node.

A round is entered as "reserved" before a record is read, and becomes "spent" once its update is
ready to leave. Whatever happens in between, the entry counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict, UserConfig

from fedfuse.errors import PrivacyError
from fedfuse.privacy.spec import Event

__all__ = ["Books", "DurableContext"]

_KEY = "fedfuse.books"
_LINES = "events"


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


class Books:
    """The events of one node."""

    def __init__(self, context: Context, opening: Iterable[Event] = ()) -> None:
        """`opening`: the events of earlier runs, entered if the books are new."""
        self._context = context
        if _KEY not in context.state:
            self._write([event.as_dict() for event in opening])

    def events(self) -> tuple[Event, ...]:
        """All that the node has reserved or spent."""
        return tuple(Event(**line) for line in self._read())

    def reserve(self, event: Event) -> None:
        """Enters `event` as reserved, and puts the books in safety where that can be done."""
        lines = self._read()
        lines.append(dataclasses.replace(event, status="reserved").as_dict())
        self._write(lines)
        if isinstance(self._context, DurableContext):
            self._context.keep()

    def spend(self, event: Event) -> None:
        """Marks the last entry, which must be `event`, as spent."""
        lines = self._read()
        spent = dataclasses.replace(event, status="spent").as_dict()
        if not lines or lines[-1] | {"status": "spent"} != spent:
            raise PrivacyError("an update was spent that was never reserved", where="books")
        lines[-1] = spent
        self._write(lines)

    def _read(self) -> list[dict[str, Any]]:
        text = self._context.state.config_records[_KEY][_LINES]
        return list(json.loads(str(text)))

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._context.state[_KEY] = ConfigRecord({_LINES: json.dumps(lines)})
