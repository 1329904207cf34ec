"""Run folders and ledgers with books of any kind, written as a run and a node write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfuse.config import RunConfig
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.spec import Event, Mechanism, Unit
from fedfuse.runfolder import RunFolder

STEP = Mechanism(unit=Unit.RECORD, sample_rate=0.25, noise_multiplier=1.5, clip_norm=1.0, steps=4)
"""What a node does in a round."""
FINGERPRINT = "f" * 64


def event(node: str, round: int, one: Mechanism = STEP, status: str = "spent") -> Event:
    """A line of a run's books."""
    return Event(
        node=node,
        round=round,
        status=status,
        unit=one.unit.value,
        sample_rate=one.sample_rate,
        noise_multiplier=one.noise_multiplier,
        clip_norm=one.clip_norm,
        steps=one.steps,
        count_noise=one.count_noise,
    )


def rounds(count: int, *nodes: str, one: Mechanism = STEP) -> list[Event]:
    """The books of `count` rounds in which all `nodes` took part."""
    return [event(node, n, one) for n in range(1, count + 1) for node in nodes]


def write_run(
    path: Path,
    events: Sequence[Event],
    *,
    fingerprint: str = FINGERPRINT,
    privacy: dict[str, Any] | None = None,
    summary: bool = True,
    **changes: Any,
) -> Path:
    """A run folder. `changes` are settings, as privacy__delta; `privacy` is the summary's table."""
    settings = {"privacy.declared_records": 300} | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    config = dataclasses.replace(RunConfig().with_values(settings), name=path.name)
    folder = RunFolder.create(path, config)
    folder.append_events(events)
    last = max((one.round for one in events), default=0)
    lines = "".join(
        f'{{"round": {n}, "metrics": {{"accuracy": 0.5}}, "failures": {{}}}}\n'
        for n in range(1, last + 1)
    )
    (path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"weights")
    if summary:
        folder.write_summary(
            {
                "status": "finished",
                "headline": {"name": "accuracy", "value": 0.5},
                "majority": 0.25,
                "privacy": privacy or {},
                "data_fingerprint": fingerprint,
                "assumptions": ["which nodes were asked, and which answered, is public"],
            }
        )
    return path


def write_ledger(
    path: Path,
    spending: Sequence[tuple[str, Mechanism]],
    *,
    node: str = "clinic-a",
    key: Path | None = None,
    broken_off: int = 0,
) -> Ledger:
    """A ledger that spent on data sets, in this order; the last `broken_off` were not committed."""
    ledger = (
        Ledger.open(path, key=key) if path.exists() else Ledger.create(path, node=node, key=key)
    )
    start = sum(1 for _ in ledger.entries())
    for number, (dataset, one) in enumerate(spending):
        entry = ledger.reserve(
            dataset,
            one,
            run=f"run-{(start + number) // 4}",
            server="server-a",
            node=node,
            round=start + number,
            request=f"request-{start + number}",
            allow=lambda _: None,
        )
        if number < len(spending) - broken_off:
            ledger.commit(entry)
    return ledger


def expose(path: Path, dataset: str, *, node: str = "clinic-a") -> None:
    """A run that promises nothing reads a data set of the ledger."""
    ledger = Ledger.open(path)
    number = sum(1 for _ in ledger.entries())
    ledger.expose(
        dataset, run="bare", server="server-a", node=node, round=0, request=f"request-{number}"
    )
