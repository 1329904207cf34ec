"""Tables of numbers and categories with blanks: what is declared of a column counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.data.check import check
from fedfuse.data.declaration import read_declaration
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError

WriteCsv = Callable[..., Path]
HEADER = "id,split,client,label,age,ward,crp"
ROWS = [
    ["a", "train", "x", "0", "30", "icu", "100"],
    ["b", "train", "x", "1", "", "er", ""],
    ["c", "train", "x", "1", "90", "home", "n/a"],
    ["d", "train", "x", "1", "60", "", "3"],
    ["v", "valid", "x", "1", "60", "icu", "10"],
    ["w", "valid", "x", "0", "60", "er", "30"],
    ["t", "test", "x", "0", "60", "icu", "20"],
]
WHOLE = """
[modalities.labs]
kind = "table"
[modalities.labs.columns]
age = { range = [0, 120] }
ward = { categories = ["er", "icu", "ward"] }
"""
APART = """
[modalities]
age = { kind = "table", mean = 60, std = 60 }
ward = { categories = ["er", "icu", "ward"] }
crp = "number"
"""


def ready(path: Path, **settings: Any) -> Prepared:
    return prepare(DataConfig(manifest=str(path), **settings), seed=0)


@pytest.mark.parametrize("toml", [WHOLE, APART])
def test_declared_ranges_and_categories_count_and_the_rest_is_measured(
    toml: str, write_csv: WriteCsv
) -> None:
    path = write_csv(HEADER, ROWS, toml)
    prepared = ready(path)
    (table,) = prepared.schema.modalities
    values = prepared.train.batch(np.arange(4)).inputs[table.name].numpy()
    assert table.shape == (10,)
    np.testing.assert_allclose(
        values,
        [
            [-0.5, 0, 1, 0, 8, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 1, 0, 0, 0, 1],
            [0.5, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, -1.7, 0, 1, 1, 1, 0],
        ],
        atol=1e-6,
    )
    assert [note for note in prepared.notes if "valid split" in note]
    (problem,) = check(path)
    assert problem.warning
    assert (problem.line, problem.what) == (
        4, "column ward holds a category that is none of the 3 known",
    )  # fmt: skip
    assert [note for note in prepared.notes if note.startswith("1 times: column ward")]


def test_a_wholly_declared_table_needs_no_valid_split(write_csv: WriteCsv) -> None:
    toml = WHOLE + "crp = { mean = 20, std = 10 }\n"
    rows = [row for row in ROWS if row[1] != "valid"]
    prepared = ready(write_csv(HEADER, rows, toml))
    assert prepared.train.batch(np.array([0])).inputs["labs"][0, 4] == 8
    assert not [note for note in prepared.notes if "asinh" in note or "valid split" in note]
    less = ready(write_csv(HEADER, rows, WHOLE))
    assert less.train.batch(np.array([0])).inputs["labs"][0, :5].tolist() == pytest.approx(
        [-0.5, 0, 1, 0, np.arcsinh(100)]
    )
    alone = ready(write_csv(HEADER, rows, WHOLE), modalities=("age",))
    assert alone.train.batch(np.array([0])).inputs["labs"].tolist() == [[-0.5, 0]]


def test_a_category_that_only_the_declaration_knows_is_no_other_shape(write_csv: WriteCsv) -> None:
    some, all_ = (ready(write_csv(HEADER, rows, WHOLE)) for rows in (ROWS[3:], ROWS))
    assert some.schema == all_.schema


@pytest.mark.parametrize(
    "columns",
    [
        {"age": {"range": [1]}},
        {"ward": {"categories": "icu"}},
        {"ward": {"categories": ["icu", "icu"]}},
        {"age": {"mean": [1, 2], "std": [1, 1]}},
    ],
)
def test_a_column_that_cannot_be_understood_is_one_clear_error(
    columns: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"modalities": {"t": {"kind": "table", "columns": columns}}}))
    with pytest.raises(DataError, match=r"age|ward") as error:
        read_declaration(path)
    assert "cannot be understood" in str(error.value)
    assert "hint" in str(error.value)
