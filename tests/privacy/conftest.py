"""Ledgers, keys and anchors to try things on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey
from tests.privacy.ledgers import (
    fill,
)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    SigningKey.create(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.ledger"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    """Without a key and without an anchor."""
    return Ledger.create(path, node="clinic-a")


@pytest.fixture(params=["unsigned", "signed"])
def any_ledger(path: Path, request: pytest.FixtureRequest) -> Ledger:
    """Of six lines."""
    key = request.getfixturevalue("key") if request.param == "signed" else None
    ledger = Ledger.create(path, node="clinic-a", key=key)
    fill(ledger)
    return ledger


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere" / "anchor"
