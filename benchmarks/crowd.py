"""A data set of many clients with a few records each, for the benchmarks and tests of scale."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

__all__ = ["write_crowd"]

_DECLARATION = """task = "classification"
classes = ["down", "up"]
[modalities.left]
kind = "vector"
shape = [4]
mean = 0.0
std = 1.0
[modalities.right]
kind = "vector"
shape = [3]
mean = 0.0
std = 1.0
"""


def write_crowd(
    folder: Path, clients: int, records: int, *, test: int = 200, seed: int = 0
) -> Path:
    """The manifest of `clients` with `records` train records each, and `test` test records.

    Two vectors that tell two classes apart; every seventh record lacks one of them.
    """
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.toml").write_text(_DECLARATION, encoding="utf-8")
    path, count = folder / "manifest.csv", clients * records + test
    up = draw.integers(0, 2, count)
    left = draw.normal(up[:, None] * 2.0 - 1, 1.0, (count, 4))
    right = draw.normal(1 - up[:, None] * 2.0, 1.0, (count, 3))
    width = len(str(clients))
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "split", "client", "subject", "label", "left", "right"])
        for i in range(count):
            rows.writerow(
                [
                    f"r{i}",
                    "train" if i < clients * records else "test",
                    f"c{i % clients:0{width}d}",
                    f"s{i}",
                    "up" if up[i] else "down",
                    " ".join(f"{x:.3f}" for x in left[i]),
                    "" if i % 7 == 0 else " ".join(f"{x:.3f}" for x in right[i]),
                ]
            )
    return path
