"""What is left of each operator when modalities are missing.

    python benchmarks/missing.py
    python benchmarks/missing.py --data PATH/TO/manifest.csv --fusions concat,late --seeds 3

Trains on the records as they are (the demo data lack a tenth of each modality), with and without
modality dropout and learned stand-ins, and tests with more of each modality taken away at random,
though never all of a record. Prints a Markdown table of the test metric, the mean over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from together import federated

from fedfuse.batch import Batch
from fedfuse.config import RunConfig
from fedfuse.data.demo import make_demo
from fedfuse.data.prepare import prepare
from fedfuse.models.missing import drop_modalities
from fedfuse.tasks import Task
from fedfuse.train import Records

RATES = (0.0, 0.3, 0.5, 0.7)
WAYS = {
    "as it is": {},
    "modality dropout 0.3": {"model.modality_dropout": 0.3},
    "dropout 0.3, learned stand-ins": {"model.modality_dropout": 0.3, "model.absent": "learned"},
}


@dataclass(frozen=True)
class Thinned:
    """Records of which each modality is missing at a rate, the same ones in each pass."""

    records: Records
    uniform: NDArray[np.float64]
    rate: float

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The records of `rows`."""
        return drop_modalities(self.records.batch(rows), self.rate, self.uniform[rows].reshape(-1))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="manifest; without it the demo is made")
    parser.add_argument("--fusions", default="concat,attention,gated,late,bottleneck")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--unit", default="none")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE")
    chosen = parser.parse_args()
    changes = dict(item.split("=", 1) for item in chosen.set) | {"privacy.unit": chosen.unit}
    with tempfile.TemporaryDirectory() as folder:
        manifest = chosen.data or str(make_demo(Path(folder), seed=0))
        base = RunConfig().with_values({**changes, "data.manifest": manifest})
        prepared = prepare(base.data, seed=0)
        headline = Task.of(prepared.schema.target, base.model).headline
        shape = (len(prepared.test), len(prepared.schema.names))
        uniform = np.random.default_rng(0).random(shape)
        sets = {f"{rate:.0%}": Thinned(prepared.test, uniform, rate) for rate in RATES}
        print(f"| operator | training | {' | '.join(f'{headline}, {name}' for name in sets)} |")
        print("|---|---|" + "---|" * len(sets))
        for fusion in chosen.fusions.split(","):
            for way, settings in WAYS.items():
                found = [
                    federated(
                        base.with_values({**settings, "model.fusion": fusion, "seed": seed}),
                        prepared,
                        sets,
                    ).figures
                    for seed in range(chosen.seeds)
                ]
                means = [statistics.mean(each[name][headline] for each in found) for name in sets]
                print(f"| {fusion} | {way} | {' | '.join(f'{m:.3f}' for m in means)} |", flush=True)


if __name__ == "__main__":
    main()
