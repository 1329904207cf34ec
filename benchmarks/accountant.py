"""The epsilon of long histories: fedfuse, dp-accounting event by event, and Opacus.

    python benchmarks/accountant.py
    python benchmarks/accountant.py --rounds 10,100 --quick

A node's history of 10 to 10,000 rounds of a few steps; alike, or with sampling rate and noise that
change from round to round (a handful of settings in turn). Asked is the epsilon at delta = 1e-5
after the last round, and what asking after every round would come to.

    fedfuse statement   PLD on the fine grid, equal kinds merged: the figure that is printed
    fedfuse look        PLD on the coarse grid: the figure of the progress line, still above the
                        true one
    fedfuse check       the node's own question before a round: is all of it within the promise
    dp-accounting       PLDAccountant, each event composed as it comes, grid 1e-4
    Opacus RDP, PRV     its accountants, each step entered as an engine would

Each is measured in a process of its own, in which nothing is cached yet; imports are left out. A
method that takes longer than the limit is stopped and says so.
"""

from __future__ import annotations

import argparse
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).resolve().parent.parent
DELTA, STEPS, PROMISE = 1e-5, 4, 1000.0
ALIKE = ((0.02, 1.0),)
CHANGING = ((0.02, 1.0), (0.01, 0.9), (0.05, 1.5), (0.02, 1.2), (0.1, 3.0))
METHODS = (
    "fedfuse statement",
    "fedfuse look",
    "fedfuse check",
    "dp-accounting",
    "Opacus RDP",
    "Opacus PRV",
)


def history(rounds: int, kind: str) -> list[tuple[float, float]]:
    """(q, sigma) of each round."""
    settings = ALIKE if kind == "alike" else CHANGING
    return [settings[round % len(settings)] for round in range(rounds)]


def prepare(method: str, past: list[tuple[float, float]]) -> Callable[[], float]:
    """What is measured; whatever it imports is imported here."""
    if method.startswith("fedfuse"):
        from fedfuse.privacy import accounting
        from fedfuse.privacy.spec import Mechanism, Unit

        # One question about something else: the libraries load on first use.
        made = [
            Mechanism(
                unit=Unit.RECORD, sample_rate=q, noise_multiplier=sigma, clip_norm=1.0, steps=STEPS
            )
            for q, sigma in past
        ]
        other = [
            Mechanism(
                unit=Unit.RECORD, sample_rate=0.5, noise_multiplier=20.0, clip_norm=1.0, steps=1
            )
        ]
        accounting.within(other, 1.0, DELTA)
        if method.endswith("statement"):
            return lambda: accounting.epsilon(made, DELTA)
        if method.endswith("look"):
            return lambda: accounting.epsilon(made, DELTA, grid=accounting.CALIBRATION_GRID)
        return lambda: float(accounting.within(made, PROMISE, DELTA))
    if method == "dp-accounting":
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant

        def compose() -> float:
            accountant = PLDAccountant(value_discretization_interval=1e-4)
            for q, sigma in past:
                accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), STEPS)
            return float(accountant.get_epsilon(DELTA))

        return compose
    from opacus.accountants import PRVAccountant, RDPAccountant

    def step() -> float:
        accountant: Any = RDPAccountant() if method.endswith("RDP") else PRVAccountant()
        for q, sigma in past:
            for _ in range(STEPS):
                accountant.step(noise_multiplier=sigma, sample_rate=q)
        return float(accountant.get_epsilon(delta=DELTA))

    return step


def ask(method: str, rounds: int, kind: str, limit: float) -> tuple[str, str]:
    """(seconds, epsilon) as words, from a fresh process."""
    command = [sys.executable, __file__, "--ask", method, "--rounds", str(rounds), "--kind", kind]
    command += ["--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"> {limit:.0f}", ""
    if done.returncode:
        return "fails", done.stderr.strip().splitlines()[-1][:60]
    seconds, value = done.stdout.split()
    return f"{float(seconds):.3g}", "yes" if method.endswith("check") else f"{float(value):.4g}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default="10,100,1000,10000")
    parser.add_argument("--quick", action="store_true", help="10 and 100 rounds")
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds for one answer")
    parser.add_argument("--ask", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="alike", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.ask:
        answer = prepare(chosen.ask, history(int(chosen.rounds), chosen.kind))
        began = time.process_time()
        most = int(began + chosen.limit) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
        value = answer()
        print(time.process_time() - began, value)
        return
    counts = [int(word) for word in chosen.rounds.split(",")]
    if chosen.quick:
        counts = [10, 100]
    print(f"{machine()}; CPU seconds for one answer, epsilon behind it; {STEPS} steps a round\n")
    print("| history | rounds | " + " | ".join(METHODS) + " |")
    print("|---|---|" + "---|" * len(METHODS))
    for kind in ("alike", "changing"):
        for rounds in counts:
            cells = []
            for method in METHODS:
                seconds, value = ask(method, rounds, kind, chosen.limit)
                cells.append(f"{seconds} ({value})" if value else seconds)
            print(f"| {kind} | {rounds} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
