"""Epsilon by dp-accounting alone, from a ledger's file as docs/ledger.md describes it.

Nothing of fedfuse is used for what is compared with: neither its ledger, nor its accountant.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from fedfuse.cli import main
from fedfuse.privacy.spec import Mechanism, Unit
from tests.reports.books import write_ledger

DELTA = 1e-5


def by_hand(path: Path) -> dict[str, tuple[float, float]]:
    """Bounds from below and above on the epsilon of each data set, of all that was reserved or
    imported, committed or not."""
    kinds: dict[str, Counter[tuple[float, float]]] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        entry = json.loads(line)
        if entry["kind"] in ("reserved", "imported"):
            one = entry["mechanism"]
            steps = kinds.setdefault(entry["dataset"], Counter())
            steps[one["sample_rate"], one["noise_multiplier"]] += one["steps"]
    found = {}
    for name, steps in kinds.items():
        above, below = PLDAccountant(), None
        for (q, sigma), count in steps.items():
            above.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
            part = from_gaussian_mechanism(
                sigma,
                sampling_prob=q,
                pessimistic_estimate=False,
                use_connect_dots=False,
                value_discretization_interval=1e-3,
            ).self_compose(count)
            below = part if below is None else below.compose(part)
        assert below is not None
        # What it truncates of tails, 1e-15 each time, it counts from above here too.
        least = float(below.get_epsilon_for_delta(DELTA + 1e-12))
        found[name] = least, float(above.get_epsilon(DELTA))
    return found


def history(seed: int) -> list[tuple[str, Mechanism]]:
    """A few data sets, each with releases of several kinds: some often, some once."""
    draw = random.Random(seed)
    kinds = [
        Mechanism(
            unit=Unit.RECORD,
            sample_rate=draw.choice((1.0, *(round(10 ** draw.uniform(-2.5, -0.05), 4),) * 6)),
            noise_multiplier=round(10 ** draw.uniform(-0.05, 0.7), 3),
            clip_norm=round(10 ** draw.uniform(-1, 1), 2),
            steps=draw.randint(1, 20),
        )
        for _ in range(draw.randint(1, 3))
    ]
    names = [f"set-{n}" for n in range(draw.randint(1, 2))]
    return [(draw.choice(names), draw.choice(kinds)) for _ in range(draw.randint(1, 8))]


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def compare(seed: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "ledger"
    spending = history(seed)
    write_ledger(path, spending, broken_off=min(seed % 3, len(spending)))
    known = by_hand(path)
    (facts,) = printed(capsys, "report", "privacy", path, "--json", "--delta", DELTA)
    reported = {one["name"]: one["epsilon"] for one in facts["accounts"]}
    book = printed(capsys, "ledger", "show", path, "--json", "--delta", DELTA)
    booked = {one["dataset"]: one["epsilon"] for one in book["datasets"]}
    assert set(reported) == set(booked) == set(known)
    for name, (least, epsilon) in known.items():
        for said in (reported[name], booked[name]):
            assert least <= said, (seed, name)
            # Two upper bounds on one grid, that truncate tails at other places.
            assert said == pytest.approx(epsilon, rel=1e-3, abs=1e-6), (seed, name)
            assert said >= epsilon * (1 - 1e-6), (seed, name)
    largest = max(epsilon for _, epsilon in known.values())
    assert max(one["epsilon"] for one in facts["statements"]) == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_reports_agree_with_who_reads_the_file_without_fedfuse(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(seed, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20 if os.environ.get("FEDFUSE_ALL") else 2))
def test_two_hundred_more_agree(
    block: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(100 + 10 * block, 110 + 10 * block):
        folder = tmp_path / str(seed)
        folder.mkdir()
        compare(seed, folder, capsys)
