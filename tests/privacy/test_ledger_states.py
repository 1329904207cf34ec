"""Random sequences of what happens to a ledger; `python -m tests.privacy.storm` runs more."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.privacy.books import CLAIMS, SEEN, Means, explore

ROOT = Path(__file__).resolve().parents[2]


def test_random_sequences_never_overspend_or_forget_and_tampering_shows() -> None:
    SEEN.clear()
    explore(60)
    assert SEEN["sequences"] >= 60
    claims, number = {f"seen: {claim}" for claim in CLAIMS}, 0
    while not claims <= set(SEEN) and number < 5:  # which ones come up changes with Hypothesis
        number += 1
        explore(30, number=number)
    assert claims <= set(SEEN)  # each was tried
    assert SEEN["kill"] > 10


@pytest.mark.slow
def test_hundreds_of_random_sequences() -> None:
    explore(1000 if os.environ.get("FEDFUSE_ALL") else 300, number=1)


def test_the_table_of_the_page_is_what_the_sequences_check() -> None:
    page = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    found = {row[0]: Means(*(cell.startswith("yes") for cell in row[1:])) for row in rows[1:]}
    assert {claim: found.get(claim) for claim in CLAIMS} == CLAIMS
