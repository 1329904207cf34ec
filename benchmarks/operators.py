"""Every fusion operator on one data set: its figure next to its cost.

    python benchmarks/operators.py simulations/digits.toml --data PATH/TO/manifest_hard.csv
    python benchmarks/operators.py simulations/digits.toml --data ... --unit record
    python benchmarks/operators.py ... --fusions late,film --set train.rounds=60 --valid

Runs each operator and seed as `together.federated` does and prints a Markdown table of the test
metric, mean and standard deviation over the seeds of first weights; with --valid that of the valid
split instead, on which settings may be chosen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from together import federated

from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.models.spec import FUSIONS
from fedfuse.tasks import Task


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--data", required=True, help="manifest")
    parser.add_argument("--fusions", default=",".join(f for f in FUSIONS if f != "graph"))
    parser.add_argument("--modalities", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--unit", default="none")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE")
    parser.add_argument("--valid", action="store_true")
    chosen = parser.parse_args()
    changes = dict(item.split("=", 1) for item in chosen.set)
    changes |= {"data.manifest": chosen.data, "privacy.unit": chosen.unit}
    if chosen.modalities:
        changes["data.modalities"] = chosen.modalities
    base = RunConfig.from_toml(chosen.scenario).with_values(changes)
    prepared = prepare(base.data, seed=0)
    records = (prepared.valid if chosen.valid else None) or prepared.test
    headline = Task.of(prepared.schema.target, base.model).headline
    print(f"| operator | {headline} | sd | parameters | MFLOP a record | MB a round | seconds |")
    print("|---|---|---|---|---|---|---|")
    for fusion in chosen.fusions.split(","):
        values, began = [], time.monotonic()
        for seed in range(chosen.seeds):
            config = base.with_values({"model.fusion": fusion, "seed": seed})
            found = federated(config, prepared, {"held": records})
            values.append(found.figures["held"][headline])
        cost, seconds = found.cost, (time.monotonic() - began) / chosen.seeds
        print(
            f"| {fusion} | {statistics.mean(values):.3f} "
            f"| {statistics.stdev(values) if len(values) > 1 else 0:.3f} | {cost.parameters:,} "
            f"| {cost.flops / 1e6:.2f} | {cost.bytes_per_round / 1e6:.2f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
