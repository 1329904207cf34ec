"""Stand-ins for the parts below the command line, so that its tests start no training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedfuse.config import RunConfig
from fedfuse.federation.observer import RoundRecord, RunInfo
from fedfuse.federation.store import Stored


@dataclass
class Result:
    """What one command line did."""

    code: int
    out: str
    err: str


@dataclass
class Fake:
    """A federation that only reports: what it was asked for, and what it should do."""

    asked: list[tuple[RunConfig, Path, bool]] = field(default_factory=list)
    rounds: int = 3
    stop_with: BaseException | None = None
    stop_after: int = 2

    def __call__(
        self,
        config: RunConfig,
        out: Path,
        *,
        observer: Any,
        resume: bool = False,
        ledgers: Path | None = None,
        stored: Callable[[], Stored],
        load: Callable[[], object],
        meanwhile: Callable[[], None],
    ) -> dict[str, Any]:
        meanwhile()
        self.asked.append((config, out, resume))
        self.ledgers = ledgers
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        observer.prepared(info_of(config, rounds=self.rounds))
        for number in range(1, self.rounds + 1):
            if self.stop_with and number > self.stop_after:
                if isinstance(self.stop_with, KeyboardInterrupt):
                    return summary_of(config, status="interrupted")
                raise self.stop_with
            observer.round_started(number)
            observer.node_finished(number, "alpha", None)
            observer.node_finished(number, "beta", "OSError" if number == 2 else None)
            record = record_of(config, number, self.rounds)
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(record)) + "\n")
            observer.round_finished(record)
        summary = summary_of(config)
        (out / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return summary


def make_demo(directory: Path, **_: object) -> Path:
    """An empty manifest where the demo's would be."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = directory / "manifest.csv"
    manifest.write_text("id,split,client,label\n", encoding="utf-8")
    return manifest


def info_of(config: RunConfig, *, rounds: int) -> RunInfo:
    """What `prepared` is told."""
    private = config.private
    return RunInfo(
        name=config.name,
        engine=config.federation.engine,
        workers=2,
        device="cpu",
        nodes=("alpha", "beta"),
        rounds=rounds,
        first_round=1,
        parameters=12345,
        private=private,
        epsilon=config.privacy.epsilon if private else None,
        delta=config.privacy.delta if private else None,
        sigma=1.5 if private else None,
        sample_rate=config.privacy.sample_rate if private else None,
        expected_batch=32.0,
        assumptions=(),
        notes=("the sizes of image were inferred",),
    )


def record_of(config: RunConfig, number: int, rounds: int) -> RoundRecord:
    """What `round_finished` is told."""
    return RoundRecord(
        round=number,
        rounds=rounds,
        metrics={"accuracy": 0.2 * number, "loss": 1 / number, "macro_f1": 0.1 * number},
        epsilon=2.0 * number if config.private else None,
        epsilon_allowed=config.privacy.epsilon if config.private else None,
        nodes_ok=1 if number == 2 else 2,
        failures={"beta": "OSError"} if number == 2 else {},
        seconds=0.5,
        bytes_sent=1000,
        bytes_received=1000,
    )


def summary_of(config: RunConfig, *, status: str = "finished") -> dict[str, Any]:
    """What a run says at its end."""
    private = config.private
    return {
        "status": status,
        "name": config.name,
        "headline": {"name": "accuracy", "value": 0.6},
        "majority": 0.25,
        "metrics": {"accuracy": 0.6, "loss": 0.3333},
        "privacy": {
            "private": private,
            "statement": (
                "Against the server, one record of a node: epsilon = 6 at delta = 1e-05."
                if private
                else "nothing in this run is protected."
            ),
        },
        "assumptions": ["Every record is one person's only record."],
        "notes": [],
    }
