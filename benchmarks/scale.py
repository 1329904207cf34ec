"""How time and memory of a federation grow with its clients; whole processes.

    python benchmarks/scale.py                        # 10, 100, 1000, 10000 clients; an hour
    python benchmarks/scale.py --clients 10,100,1000 --runs 3
    python benchmarks/scale.py --quick                # 10, 100, 1000, once

Every client trains in every round and has the same number of records, so twice the clients are
twice the work: the slope of time over clients, in logarithms, should be 1, and memory should stay.
Two vectors, a model of some hundred parameters, unit "record": what is measured is the federation
around the training, not the training. A second table doubles the rounds and the model instead.

Time is the rounds' own, from the run folder: of all, and of one after the first, in which workers
and what the run's end needs are got ready, whatever the number of clients. Memory is the
highest sum of the proportional set sizes of all processes, data preparation included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from crowd import write_crowd
from measure import Measured, machine, measure, medians

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is varied."""

    clients: int
    rounds: int
    width: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a size took."""

    size: Size
    whole: Measured
    rounds_s: float
    later_s: float
    """A round after the first, the first where there is no other."""
    parameters: int


def run(size: Size, manifest: Path, out: Path, strategy: str) -> Found:
    """One `fedfuse simulate`."""
    settings = {
        "model.dim": size.width,
        "model.head_width": size.width,
        "model.vector_width": size.width,
        "train.rounds": size.rounds,
        "train.local_steps": 2,
        "train.learning_rate": 0.2,
        "train.device": "cpu",
        "privacy.sample_rate": 0.5,
        "privacy.noise_multiplier": 1.5,
        "privacy.epsilon": 200.0,
        "federation.strategy": strategy,
    }
    command = [sys.executable, "-m", "fedfuse", "simulate", "--quiet"]
    command += ["--data", str(manifest), "--out", str(out)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    whole = measure(command, env={"PYTHONPATH": path})
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [float(json.loads(line)["seconds"]) for line in lines]
    return Found(
        size=size,
        whole=whole,
        rounds_s=float(summary["seconds"]),
        later_s=statistics.median(seconds[1:] or seconds),
        parameters=int(summary["parameters"]),
    )


def slope(one: float, two: float, before: float, after: float) -> float:
    """Of a line in logarithms: 1 is proportional, 0 is flat."""
    return math.log(two / one) / math.log(after / before)


def compare(sizes: list[Size], records: int, runs: int, strategy: str, folder: Path) -> list[Found]:
    """Each size, in turn, `runs` times."""
    manifests = {
        clients: write_crowd(folder / f"crowd-{clients}", clients, records)
        for clients in {size.clients for size in sizes}
    }
    found: dict[Size, list[Found]] = {size: [] for size in sizes}
    for number in range(runs):
        for place, size in enumerate(sizes):
            out = folder / f"run-{place}-{number}"
            one = run(size, manifests[size.clients], out, strategy)
            found[size].append(one)
            print(
                f"{size.clients} clients, {size.rounds} rounds, width {size.width}: "
                f"{one.rounds_s:.1f} s of rounds, {one.later_s:.1f} s a later one, "
                f"{one.whole.wall_s:.1f} s in all, {one.whole.cpu_s:.1f} s CPU, "
                f"{one.whole.pss_mb:.0f} MB, load before {one.whole.load:.1f}",
                file=sys.stderr,
                flush=True,
            )
    return [
        Found(
            size=size,
            whole=medians([one.whole for one in some]),
            rounds_s=statistics.median(one.rounds_s for one in some),
            later_s=statistics.median(one.later_s for one in some),
            parameters=some[0].parameters,
        )
        for size, some in found.items()
    ]


def table(found: list[Found], about: str) -> None:
    """One line a size, each with the slopes from the line before."""
    print(
        "| clients | rounds | parameters | rounds, s | a later one, s | ms CPU a client and round "
        "| slope of rounds | of a later one | of CPU | peak memory MB | processes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    before: Found | None = None
    for one in found:
        size = one.size
        times = later = cpu = ""
        if before is not None:
            span = getattr(before.size, about), getattr(size, about)
            times = f"{slope(before.rounds_s, one.rounds_s, *span):.2f}"
            later = f"{slope(before.later_s, one.later_s, *span):.2f}"
            cpu = f"{slope(before.whole.cpu_s, one.whole.cpu_s, *span):.2f}"
        each = 1000 * one.whole.cpu_s / (size.clients * size.rounds)
        print(
            f"| {size.clients} | {size.rounds} | {one.parameters} | {one.rounds_s:.1f} "
            f"| {one.later_s:.2f} | {each:.1f} | {times} | {later} | {cpu} "
            f"| {one.whole.pss_mb:.0f} | {one.whole.processes} |"
        )
        before = one
    print()


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="10,100,1000,10000")
    parser.add_argument("--records", type=int, default=8, help="of each client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1, help="of each size, in turn")
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--quick", action="store_true", help="up to 1000 clients, once")
    parser.add_argument("--only-clients", action="store_true", help="leave the second table out")
    chosen = parser.parse_args()
    clients = [int(word) for word in chosen.clients.split(",")]
    if chosen.quick:
        clients = [count for count in clients if count <= 1000]
    runs = 1 if chosen.quick else chosen.runs
    with tempfile.TemporaryDirectory() as name:
        sizes = [Size(clients=count, rounds=chosen.rounds) for count in clients]
        print(f"{machine()}; {chosen.records} records a client; medians of {runs}\n")
        folder = Path(name) / "clients"
        table(compare(sizes, chosen.records, runs, chosen.strategy, folder), "clients")
        if chosen.only_clients:
            return
        few = min(100, *clients)
        more = [Size(clients=few, rounds=count) for count in (5, 10, 20, 40)]
        table(compare(more, chosen.records, runs, chosen.strategy, Path(name) / "r"), "rounds")
        wide = [Size(clients=few, rounds=2, width=width) for width in (8, 64, 512)]
        table(compare(wide, chosen.records, runs, chosen.strategy, Path(name) / "w"), "width")


if __name__ == "__main__":
    main()
