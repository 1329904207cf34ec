"""Small data sets, written as files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

WriteCsv = Callable[..., Path]


@pytest.fixture
def write_csv(tmp_path: Path) -> WriteCsv:
    """Writes a header and rows as `manifest.csv`, and a declaration where one is given."""

    def write(header: str, rows: Sequence[Sequence[object]], toml: str = "") -> Path:
        path = tmp_path / "manifest.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header.split(","), *rows])
        if toml:
            (tmp_path / "dataset.toml").write_text(toml)
        return path

    return write


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a good file of each kind: a.png a.wav v.npy s.npy."""
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(4000)), 8000)
    np.save(tmp_path / "v.npy", np.arange(4, dtype=np.float32))
    np.save(tmp_path / "s.npy", np.ones((10, 3), np.float32))
    return tmp_path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small demo data set."""
    from fedfuse.data.demo import make_demo

    return make_demo(tmp_path_factory.mktemp("demo"), records=160, clients=4)
