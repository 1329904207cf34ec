"""A run on disk: what is in its folder, and writing that survives a crash at any moment.

    config.toml         the configuration, as given
    metrics.jsonl       a line for each round
    events.jsonl        the books: a line for each node and round, and every line counts
    heads.jsonl         where nodes keep ledgers: the last line's hash of each, round by round
    run.id              drawn at random: nodes' ledgers tell runs apart by it
    progress.jsonl      of a real run: what happened when, for whoever watches it
    reserved.json       only while a round runs: its events, which count from its beginning
    model.safetensors   the released weights
    model.toml          what is needed to build the model around them
    reading.json        how a record is read for it: columns, sizes, scales; all public
    calibration.json    how well it fits the server's valid records, for sets and intervals
    summary.json        the outcome
    checkpoint/         the last finished round: state.json names the arrays beside it
    run.log             what Flower, Ray and the nodes had to say

Whole files appear at once or not at all; lines are on the disk before the next step. A last line
that a crash cut off is left out on reading, and said so.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tomli_w
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedfuse.config import RunConfig
from fedfuse.errors import RunFolderError
from fedfuse.privacy.spec import Event

__all__ = ["Arrays", "Checkpoint", "RunFolder", "fresh_folder"]

Arrays = Mapping[str, NDArray[np.generic]]
_CONFIG, _SUMMARY = "config.toml", "summary.json"
_METRICS, _EVENTS, _RESERVED = "metrics.jsonl", "events.jsonl", "reserved.json"
_HEADS, _ID = "heads.jsonl", "run.id"
_WEIGHTS, _MODEL = "model.safetensors", "model.toml"
_READING, _CALIBRATION = "reading.json", "calibration.json"
_CHECKPOINT, _STATE = "checkpoint", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run as it stood after `round`."""

    round: int
    weights: Arrays
    strategy: Arrays
    """The strategy's own arrays."""
    extra: Mapping[str, Any]
    """Plain values that the run wants back."""


def fresh_folder(name: str, runs: Path) -> Path:
    """A folder in `runs` that does not exist yet, named after the run and the time."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    first = runs / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = first, 1
    while path.exists():
        count += 1
        path = first.with_name(f"{first.name}-{count}")
    return path


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        """What was wrong with the files read so far, and could be got round."""
        self._lines_booked: int | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig, *, resume: bool = False) -> RunFolder:
        """The folder for a run of `config`: a new one, or with `resume` the one to go on in.

        Raises RunFolderError where another run would be overwritten, and on resume where there is
        nothing to go on from, or `config` is not that run's.
        """
        cls.check(path, config, resume=resume)
        folder = cls(path)
        if resume:
            return folder
        with _telling(path):
            path.mkdir(parents=True, exist_ok=True)
        folder._replace(_ID, f"{secrets.token_hex(16)}\n".encode())
        folder._replace(_CONFIG, config.to_toml().encode())
        return folder

    @classmethod
    def check(cls, path: Path, config: RunConfig, *, resume: bool = False) -> None:
        """Raises RunFolderError where `create` would; writes nothing."""
        if resume:
            cls(path)._check_resumable(config)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(
                "it exists and is not empty",
                where=str(path),
                hint="take another folder, or resume the run in it",
            )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that holds a run. Raises RunFolderError."""
        if not (path / _CONFIG).is_file():
            raise RunFolderError(
                "no run is here", where=str(path), hint=f"a run folder holds a {_CONFIG}"
            )
        return cls(path)

    @property
    def log(self) -> Path:
        """Where Flower, Ray and the nodes write what they have to say."""
        return self.path / "run.log"

    # ---- reading

    def config(self) -> RunConfig:
        """The configuration of the run. Raises ConfigError."""
        return RunConfig.from_toml(self.path / _CONFIG)

    def promises(self) -> bool:
        """Whether the run keeps a promise.

        Noise from a seed is noise that the server takes off; only where the summary shows that
        the run was a simulation is it what the figures would be. Raises ConfigError.
        """
        config = self.config()
        simulated = bool((self.summary() or {}).get("data_fingerprint"))
        return config.private and (simulated or not config.privacy.noise_seed)

    def run_id(self) -> str:
        """32 hexadecimal digits, the same for as long as the run is gone on with.

        Raises RunFolderError where there are none: the run is older than this version.
        """
        try:
            found = (self.path / _ID).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise self._damaged(_ID, error) from None
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """A line for each round done."""
        return list(self._lines(_METRICS))

    def events(self) -> list[Event]:
        """All that counts as spent, a round in progress included."""
        return [*self.booked(), *self.reserved()]

    def reserved(self) -> list[Event]:
        """The events of the round in progress, or of one that was cut off, not yet in the books."""
        if not (self.path / _RESERVED).exists():
            return []
        tree = self._json(_RESERVED)
        booked = {(event.node, event.round) for event in self.booked()[int(tree["after"]) :]}
        events = [self._event(line, _RESERVED) for line in tree["events"]]
        return [event for event in events if (event.node, event.round) not in booked]

    def _count(self) -> int:
        """How many lines the books have. Read once: a run is the only one that writes them."""
        if self._lines_booked is None:
            self._lines_booked = len(self.booked())
        return self._lines_booked

    def booked(self) -> list[Event]:
        """What is entered in the books: of rounds that ended, or were broken off."""
        return [self._event(line, _EVENTS) for line in self._lines(_EVENTS)]

    def summary(self) -> dict[str, Any] | None:
        """The outcome; None while there is none."""
        return self._json(_SUMMARY) if (self.path / _SUMMARY).exists() else None

    def model(self) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
        """The released weights, and what is needed to build the model around them."""
        weights = self._arrays(self.path / _WEIGHTS)
        try:
            return weights, tomllib.loads((self.path / _MODEL).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(_MODEL, error) from None

    def reading(self) -> dict[str, Any]:
        """How a record is read for the model, as plain values. Raises RunFolderError."""
        return self._json(_READING)

    def calibration(self) -> dict[str, Any] | None:
        """How well the model fits the valid records; None where there were none."""
        return self._json(_CALIBRATION) if (self.path / _CALIBRATION).exists() else None

    def checkpoint(self) -> Checkpoint | None:
        """The last finished round; None before the first."""
        if not (self.path / _CHECKPOINT / _STATE).exists():
            return None
        state = self._json(f"{_CHECKPOINT}/{_STATE}")
        try:
            arrays = self._arrays(self.path / _CHECKPOINT / str(state["arrays"]))
            return Checkpoint(
                round=int(state["round"]),
                weights=_group(arrays, "weights"),
                strategy=_group(arrays, "strategy"),
                extra=dict(state["extra"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{_CHECKPOINT}/{_STATE}", error) from None

    # ---- writing

    def begin_round(self, reserved: Iterable[Event]) -> None:
        """Enters what the nodes of a round are about to spend: from now on it counts."""
        lines = [event.as_dict() for event in reserved]
        tree = {"after": self._count(), "events": lines}
        self._replace(_RESERVED, (json.dumps(tree, allow_nan=False) + "\n").encode())

    def end_round(
        self, events: Iterable[Event], row: Mapping[str, Any], checkpoint: Checkpoint
    ) -> None:
        """Enters what was spent, the round's line, and the checkpoint to go on from."""
        self.append_events(events)
        self._append(_METRICS, [dict(row)])
        self._write_checkpoint(checkpoint)

    def append_events(self, events: Iterable[Event]) -> None:
        """Adds lines to the books, and clears what was reserved for them."""
        lines = [event.as_dict() for event in events]
        before = self._count()
        self._append(_EVENTS, lines)
        self._lines_booked = before + len(lines)
        with _telling(self.path):
            (self.path / _RESERVED).unlink(missing_ok=True)

    def rename(self, names: Mapping[str, str]) -> None:
        """Enters under its own name what a node spent before that name was known."""
        lines = list(self._lines(_EVENTS))
        if any(line["node"] in names for line in lines):
            named = [line | {"node": names.get(line["node"], line["node"])} for line in lines]
            self._replace(_EVENTS, _jsonl(named))

    def append_heads(self, heads: Iterable[Mapping[str, Any]]) -> None:
        """Notes which line each node's ledger ended with: {"round", "node", "ledger", "head"}."""
        self._append(_HEADS, heads)

    def forget_after(self, round: int, *, events: bool) -> None:
        """Drops the lines of rounds after `round`, which will be run again.

        `events`: drop those of the books too. Only right where a round that is run again is the
        very same release; otherwise what was spent stays spent.
        """
        rows = [row for row in self._lines(_METRICS) if row["round"] <= round]
        self._replace(_METRICS, _jsonl(rows))
        self._lines_booked = None
        if events:
            lines = [line for line in self._lines(_EVENTS) if line["round"] <= round]
            self._replace(_EVENTS, _jsonl(lines))
            with _telling(self.path):
                (self.path / _RESERVED).unlink(missing_ok=True)
        else:
            self.append_events(event for event in self.reserved())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the outcome."""
        self._write_json(_SUMMARY, summary)

    def write_model(self, weights: Arrays, description: Mapping[str, Any]) -> None:
        """Writes the released weights and what is needed to build the model around them."""
        self._replace(_WEIGHTS, safetensors.numpy.save(_contiguous(weights)))
        self._replace(_MODEL, tomli_w.dumps(dict(description)).encode())

    def write_use(self, reading: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> None:
        """Writes what the use of the model needs: how records are read, how well it fits."""
        self._write_json(_READING, reading)
        if calibration is not None:
            self._write_json(_CALIBRATION, calibration)

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        name = f"round-{checkpoint.round:06d}.safetensors"
        arrays = {f"weights/{key}": value for key, value in checkpoint.weights.items()}
        arrays |= {f"strategy/{key}": value for key, value in checkpoint.strategy.items()}
        with _telling(self.path):
            (self.path / _CHECKPOINT).mkdir(exist_ok=True)
        self._replace(f"{_CHECKPOINT}/{name}", safetensors.numpy.save(_contiguous(arrays)))
        self._write_json(
            f"{_CHECKPOINT}/{_STATE}",
            {"round": checkpoint.round, "arrays": name, "extra": dict(checkpoint.extra)},
        )
        for old in (self.path / _CHECKPOINT).glob("round-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def _check_resumable(self, config: RunConfig) -> None:
        if not (self.path / _CONFIG).is_file():
            raise RunFolderError(
                "there is no run to resume", where=str(self.path), hint="start it without resume"
            )
        if (self.path / _CONFIG).read_text(encoding="utf-8") != config.to_toml():
            raise RunFolderError(
                "its config.toml is not the configuration given",
                where=str(self.path),
                hint="resume with that file, or start a new run in another folder",
            )
        summary = self.summary()
        if summary is not None and summary.get("status") == "finished":
            raise RunFolderError(
                "the run is finished",
                where=str(self.path),
                hint="start another run in another folder; its privacy budget is its own",
            )

    def _replace(self, name: str, data: bytes) -> None:
        """The file `name` with `data`: all of it, or as it was before."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.tmp")
        with _telling(self.path):
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync(path.parent)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        path = self.path / name
        with _telling(self.path):
            self._mend(path)
            with path.open("ab") as file:
                file.write(_jsonl(lines))
                file.flush()
                os.fsync(file.fileno())

    def _mend(self, path: Path) -> None:
        """Cuts off a last line that a crash left unfinished, so that the next is a line."""
        if not path.exists() or path.stat().st_size == 0:
            return
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            whole = file.read() == b"\n"
        if not whole:
            data = path.read_bytes()
            self._replace(path.name, data[: data.rfind(b"\n") + 1])

    def _write_json(self, name: str, tree: Mapping[str, Any]) -> None:
        self._replace(name, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())

    def _json(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from None
        if not isinstance(tree, dict):
            raise self._damaged(name, TypeError("not a table"))
        return tree

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return
        *whole, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if rest:
            self.problems.append(f"{name}: the last line was cut off, and is left out")
        for number, text in enumerate(whole, 1):
            try:
                line = json.loads(text)
                if not isinstance(line, dict) or "round" not in line:
                    raise ValueError("not a line of this file")
            except ValueError as error:
                raise self._damaged(f"{name}, line {number}", error) from None
            yield line

    def _event(self, line: Mapping[str, Any], name: str) -> Event:
        try:
            return Event(**line)
        except TypeError as error:
            raise self._damaged(name, error) from None

    def _arrays(self, path: Path) -> dict[str, NDArray[np.generic]]:
        try:
            return dict(safetensors.numpy.load_file(path))
        except (OSError, SafetensorError) as error:
            raise self._damaged(path.name, error) from None

    def _damaged(self, name: str, error: Exception) -> RunFolderError:
        return RunFolderError(
            f"{name} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}",
            where=str(self.path),
            hint="restore it, or start the run anew in another folder",
        )


def _jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def _group(arrays: Arrays, prefix: str) -> dict[str, NDArray[np.generic]]:
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}


def _contiguous(arrays: Arrays) -> dict[str, NDArray[np.generic]]:
    # Not np.ascontiguousarray, which turns a 0-d array into a 1-d one.
    return {key: np.array(value, order="C") for key, value in arrays.items()}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turns trouble with the disk into a RunFolderError."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            hint="free some space or take another folder; `resume` goes on from the last round",
        ) from None
