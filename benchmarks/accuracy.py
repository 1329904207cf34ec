"""How good fusion is, against each modality alone, with and without the promise.

    python benchmarks/accuracy.py digits --data PATH/TO/digits-av/manifest_hard.csv
    python benchmarks/accuracy.py demo --seeds 3

Runs `fedfuse simulate simulations/NAME.toml` for each set of modalities, unit and seed, one after
the other, and prints a Markdown table: the mean of the test metric and its standard deviation over
the seeds (of data made, partition, first weights; noise is new in each run).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = {
    "demo": ("quickstart", ("image", "audio", "text")),
    "digits": ("digits", ("image", "audio", "text")),
    "har": ("har", ("phone", "watch")),
    "vqa": ("vqa", ("image", "text")),
}


def run(scenario: str, modalities: Sequence[str], unit: str, seed: int, data: str) -> Any:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedfuse", "simulate"]
        command += [str(ROOT / "simulations" / f"{scenario}.toml"), "--unit", unit]
        command += ["--seed", str(seed), "--out", f"{folder}/run", "--json"]
        if modalities:
            command += ["--modalities", ",".join(modalities)]
        if data:
            command += ["--data", data]
        done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return json.loads(done.stdout)


def main() -> None:
    """Prints the table of one scenario."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--data", default="", help="manifest; the demo makes its own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--units", default="none,record")
    chosen = parser.parse_args()
    scenario, names = SCENARIOS[chosen.name]
    print("| modalities | unit | test metric | sd | epsilon | seconds of rounds |")
    print("|---|---|---|---|---|---|")
    for unit in chosen.units.split(","):
        for modalities in ((), *((name,) for name in names)):
            found = [
                run(scenario, modalities, unit, seed, chosen.data) for seed in range(chosen.seeds)
            ]
            values = [summary["headline"]["value"] for summary in found]
            epsilon = max(summary["privacy"].get("epsilon_server", 0) for summary in found)
            print(
                f"| {' + '.join(modalities or names)} | {unit} | {statistics.mean(values):.3f} "
                f"| {statistics.stdev(values) if len(values) > 1 else 0:.3f} "
                f"| {f'{epsilon:.2f}' if epsilon else 'NOT PRIVATE'} "
                f"| {statistics.mean(summary['seconds'] for summary in found):.0f} |",
                flush=True,
            )
    print(f"\nbest constant answer: {found[0]['majority']:.3f} ({found[0]['headline']['name']})")


if __name__ == "__main__":
    main()
