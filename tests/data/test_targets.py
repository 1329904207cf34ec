"""Labels in sets and in an order: declared, decoded, and dealt out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfuse.batch import Target, TargetKind
from fedfuse.data.check import check
from fedfuse.data.prepare import open_split, prepare
from fedfuse.data.spec import DataConfig
from fedfuse.data.target import label_value

WriteCsv = Callable[..., Path]
HEADER = "id,split,client,label,text"


def rows_of(labels: list[str]) -> list[list[str]]:
    rows = [[f"r{i}", "train", "ab"[i % 2], label, "words"] for i, label in enumerate(labels)]
    return [*rows, ["t", "test", "a", labels[0], "words"]]


def test_labels_in_a_cell_become_a_row_of_zeros_and_ones(
    write_csv: WriteCsv, tmp_path: Path
) -> None:
    declared = 'task = "multi-label"\nclasses = ["edema", "fracture", "mass"]'
    path = write_csv(HEADER, rows_of(["mass", "fracture; edema", "-", "2;0"]), declared)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.schema.target.kind is TargetKind.MULTILABEL
    assert prepared.schema.target.outputs == 3
    expected = [[0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert prepared.train.labels.tolist() == expected
    batch = prepared.train.batch(np.array([1, 3]))
    assert batch.target.dtype.is_floating_point
    assert batch.target.tolist() == [expected[1], expected[3]]
    assert prepared.train.batch(np.array([], dtype=np.int64)).target.shape == (0, 3)
    prepared.write(tmp_path / "store")
    assert open_split(tmp_path / "store", "train").labels.tolist() == expected
    assert open_split(tmp_path / "store", "test").schema == prepared.schema


def test_labels_that_nobody_declared_are_gathered(write_csv: WriteCsv) -> None:
    path = write_csv(HEADER, rows_of(["b;a", "none", "c"]), 'task = "multilabel"')
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.schema.target.classes == ("a", "b", "c")
    assert prepared.train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_a_label_unknown_and_a_blank_cell_are_problems(write_csv: WriteCsv) -> None:
    declared = 'task = "multi-label"\nclasses = ["a", "b"]'
    path = write_csv(HEADER, rows_of(["a;b", "a;z", ""]), declared)
    found = [problem for problem in check(path, DataConfig()) if not problem.warning]
    assert [problem.line for problem in found] == [3, 4]
    assert all("its labels are not all among the 2 declared" in p.what for p in found)


def test_sets_of_labels_are_dealt_out_as_labels(write_csv: WriteCsv) -> None:
    declared = 'task = "multi-label"\nclasses = ["a", "b"]'
    path = write_csv(HEADER, rows_of(["a", "b", "a;b", "-"] * 10), declared)
    config = DataConfig(manifest=str(path), partition="dirichlet", nodes=3, alpha=0.5)
    shards = prepare(config, seed=0).shards
    assert sorted(np.concatenate([shard.rows for shard in shards]).tolist()) == list(range(40))


@pytest.mark.parametrize("said", ["ordinal", "ordinal regression", "Ordered classification"])
def test_an_ordinal_target_keeps_the_declared_order(write_csv: WriteCsv, said: str) -> None:
    declared = f'task = "{said}"\nclasses = ["mild", "bad", "awful"]\npriors = [0.5, 0.3, 0.2]'
    path = write_csv(HEADER, rows_of(["bad", "mild", "2"]), declared)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    target = prepared.schema.target
    assert (target.kind, target.outputs) == (TargetKind.ORDINAL, 2)
    assert target.priors == (0.5, 0.3, 0.2)
    assert prepared.train.labels.tolist() == [1, 0, 2]


def test_an_order_that_nobody_declared_is_said(write_csv: WriteCsv) -> None:
    path = write_csv(HEADER, rows_of(["3", "1", "10"]), 'task = "ordinal"')
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.schema.target.classes == ("1", "3", "10")
    assert any("sorted order" in note for note in prepared.notes)


def test_a_declared_range_of_a_number_is_kept(write_csv: WriteCsv) -> None:
    declared = 'task = "regression"\ntarget_range = [-3, 3]'
    path = write_csv(HEADER, rows_of(["-1.5", "3", "0"]), declared)
    target = prepare(DataConfig(manifest=str(path)), seed=0).schema.target
    assert (target.centre, target.scale, target.span) == (0.0, 3.0, (-3.0, 3.0))


def test_a_class_may_be_called_none() -> None:
    target = Target(kind=TargetKind.MULTILABEL, classes=("none", "some"))
    assert label_value("none", target) == (0,)
    assert label_value("-", target) == ()
