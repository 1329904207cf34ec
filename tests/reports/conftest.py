"""A run folder written by hand, private or not, of any length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfuse.config import RunConfig

Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """Writes a run folder and returns it: `write_run(unit="none", rounds=3, finished=False)`."""

    def write(*, unit: str = "record", rounds: int = 20, finished: bool = True) -> Path:
        run = tmp_path / f"run-{unit}-{rounds}"
        run.mkdir()
        config = RunConfig(name="clinics").with_values({"privacy.unit": unit})
        (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        lines = [
            {
                "round": number,
                "rounds": 20,
                "metrics": {
                    "loss": 1.8 * math.exp(-number / 9),
                    "accuracy": 1 - 0.8 * math.exp(-number / 6),
                },
                "epsilon": 8 * math.sqrt(number / 20) if unit != "none" else None,
                "epsilon_allowed": 8.0 if unit != "none" else None,
            }
            for number in range(1, rounds + 1)
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (run / "metrics.jsonl").write_text(text, encoding="utf-8")
        if finished:
            summary = {"headline": {"name": "accuracy", "value": 0.9}, "majority": 0.25}
            (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return run

    return write
