"""Each made scenario with and without a promise, all modalities together and each alone.

    python benchmarks/scenarios.py
    python benchmarks/scenarios.py medical sentiment --seeds 3 --set train.rounds=10

Runs `simulations/NAME.toml` on its made data in one process, by the nodes' own training code, and
prints a Markdown table of the test headline: the mean over the seeds of data and first weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from together import federated

from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.data.scenes import SCENES, make
from fedfuse.tasks import Task

SIMULATIONS = Path(__file__).resolve().parent.parent / "simulations"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(SCENES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--units", default="none,record")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE")
    chosen = parser.parse_args()
    changes = dict(item.split("=", 1) for item in chosen.set)
    units = chosen.units.split(",")
    print(f"| scenario | figure | modalities | {' | '.join(units)} | best constant |")
    print("|---|---|---|" + "---|" * (len(units) + 1))
    for name in chosen.names:
        with tempfile.TemporaryDirectory() as folder:
            base = RunConfig.from_toml(SIMULATIONS / f"{name}.toml").with_values(changes)
            manifests = [
                str(make(name, Path(folder, str(seed)), seed=seed)) for seed in range(chosen.seeds)
            ]
            for alone in ("", *SCENES[name].modalities):
                print(_line(name, base, alone, units, manifests), flush=True)


def _line(name: str, base: RunConfig, alone: str, units: list[str], manifests: list[str]) -> str:
    means, constant, headline = [], [], ""
    for unit in units:
        found = []
        for seed, manifest in enumerate(manifests):
            config = base.with_values(
                {
                    "data.manifest": manifest,
                    "data.modalities": alone,
                    "privacy.unit": unit,
                    "seed": seed,
                }
            )
            prepared = prepare(config.data, seed=seed)
            task = Task.of(prepared.schema.target, config.model)
            headline = task.headline
            found.append(federated(config, prepared, {"test": prepared.test}).figures["test"])
            constant.append(task.baseline(prepared.test.labels))
        means.append(statistics.mean(figures[headline] for figures in found))
    names = " + ".join(prepared.schema.names)
    cells = " | ".join(f"{mean:.3f}" for mean in means)
    return f"| {name} | {headline} | {names} | {cells} | {statistics.mean(constant):.3f} |"


if __name__ == "__main__":
    main()
