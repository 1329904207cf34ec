"""What a real run tells whoever watches it, as lines of JSON in its folder: progress.jsonl.

The server app writes them, in a process of Flower's; `fedfuse server run` reads them, and shows
them as a simulation is shown. Each has "time" and "event":

    prepared        the fields of RunInfo
    round-started   round
    node            round, name, problem
    round-finished  the fields of RoundRecord
    ended           status, and of what went wrong: problem, where, hint, code

Nothing in them is private: it is what nodes were asked, and what their answers may say.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from fedfuse.errors import FedfuseError
from fedfuse.federation.observer import Observer, RoundRecord, RunInfo

__all__ = ["JOURNAL", "Journal", "is_event", "line", "replay"]

JOURNAL = "progress.jsonl"
T = TypeVar("T")


def line(event: str, **more: object) -> str:
    """One line: a JSON object with the time."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "event": event} | more, allow_nan=False)


class Journal:
    """An observer that writes lines to a file. What cannot be written is lost: a run goes on."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL

    def prepared(self, info: RunInfo) -> None:
        """The data is there, the first round is about to start."""
        self._write("prepared", **asdict(info))

    def round_started(self, round: int) -> None:
        """A round starts."""
        self._write("round-started", round=round)

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        """A node answered, or is known not to."""
        self._write("node", round=round, name=name, problem=problem)

    def round_finished(self, record: RoundRecord) -> None:
        """A round is done, and on the disk."""
        tree = asdict(record)
        tree["metrics"] = {k: v if math.isfinite(v) else None for k, v in record.metrics.items()}
        self._write("round-finished", **tree)

    def ended(self, status: str, error: BaseException | None = None) -> None:
        """The run ends: "finished", "failed" or "interrupted"."""
        more: dict[str, object] = {}
        if isinstance(error, FedfuseError):
            more = {"problem": error.what, "where": error.where, "hint": error.hint}
            more["code"] = error.exit_code
        elif error is not None:
            more = {"problem": type(error).__name__, "where": "", "hint": "", "code": 1}
        self._write("ended", status=status, **more)

    def _write(self, event: str, **more: object) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line(event, **more) + "\n")
        except OSError:
            pass


def is_event(text: bytes, event: str) -> bool:
    """Whether a line tells of such an event."""
    try:
        return bool(json.loads(text)["event"] == event)
    except (ValueError, KeyError, TypeError):
        return False


def replay(text: str, observer: Observer) -> Mapping[str, Any] | None:
    """Tells `observer` what a line says; gives the line back where it is the run's last."""
    try:
        tree = json.loads(text)
        match tree["event"]:
            case "prepared":
                observer.prepared(_of(RunInfo, tree))
            case "round-started":
                observer.round_started(tree["round"])
            case "node":
                observer.node_finished(tree["round"], tree["name"], tree["problem"])
            case "round-finished":
                metrics = {k: math.nan if v is None else v for k, v in tree["metrics"].items()}
                observer.round_finished(_of(RoundRecord, tree | {"metrics": metrics}))
            case "ended":
                return dict(tree)
    except (ValueError, KeyError, TypeError):
        pass  # a line that a crash cut off, or that a later version wrote
    return None


def _of(cls: type[T], tree: Mapping[str, Any]) -> T:
    values = {each.name: tree[each.name] for each in fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
