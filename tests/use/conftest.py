"""One run of each kind of target, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from fedfuse.data.prepare import Prepared
from tests.use.runs import write_data, write_run


class Made(NamedTuple):
    """A run folder, the manifest that it is of, and its prepared data."""

    run: Path
    manifest: Path
    prepared: Prepared


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The run of one of TARGETS."""

    @cache
    def make(target: str) -> Made:
        folder = tmp_path_factory.mktemp(target)
        manifest = write_data(folder / "data", target)
        return Made(folder / "run", manifest, write_run(folder / "run", manifest))

    return make
