"""Every fusion operator on one data set: its figure next to its cost.

    python benchmarks/operators.py simulations/digits.toml --data PATH/TO/manifest_hard.csv
    python benchmarks/operators.py simulations/digits.toml --data ... --unit record
    python benchmarks/operators.py ... --fusions late,film --set train.rounds=60

Runs each operator and seed as `together.federated` does and prints a Markdown table of the headline
metric on the valid split, by which settings may be chosen, and on the test split: mean and standard
deviation over the seeds of first weights. Seconds are of processor time.
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
    chosen = parser.parse_args()
    changes = dict(item.split("=", 1) for item in chosen.set)
    changes |= {"data.manifest": chosen.data, "privacy.unit": chosen.unit}
    if chosen.modalities:
        changes["data.modalities"] = chosen.modalities
    base = RunConfig.from_toml(chosen.scenario).with_values(changes)
    prepared = prepare(base.data, seed=0)
    sets = {"valid": prepared.valid or prepared.test, "test": prepared.test}
    headline = Task.of(prepared.schema.target, base.model).headline
    print(
        f"| operator | {headline}, valid | sd | {headline}, test | sd "
        "| parameters | MFLOP a record | MB a round | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for fusion in chosen.fusions.split(","):
        began = time.process_time()
        found = [
            federated(base.with_values({"model.fusion": fusion, "seed": seed}), prepared, sets)
            for seed in range(chosen.seeds)
        ]
        cells = [fusion]
        for name in sets:
            values = [each.figures[name][headline] for each in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells += [f"{statistics.mean(values):.3f}", f"{spread:.3f}"]
        cost = found[0].cost
        cells += [
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:.2f}",
            f"{cost.bytes_per_round / 1e6:.2f}",
            f"{(time.process_time() - began) / chosen.seeds:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
