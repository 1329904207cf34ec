from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.data.dataset import Dataset
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.spec import DataConfig


@pytest.fixture(scope="module")
def prepared(demo: Path) -> Prepared:
    return prepare(DataConfig(manifest=str(demo)), seed=0)


def test_an_absent_modality_is_a_zero_row(prepared: Prepared) -> None:
    batch = prepared.train.batch(np.arange(len(prepared.train)))
    for name, values in batch.inputs.items():
        absent = ~batch.present[name]
        assert 0 < absent.sum() < len(batch)
        assert (values[absent] == 0).all()
        assert torch.isfinite(values).all()


def test_types_and_shapes_are_those_of_the_schema(prepared: Prepared) -> None:
    for size in (0, 1, 7):
        batch = prepared.train.batch(np.arange(size))
        assert len(batch) == size
        assert batch.target.dtype == torch.int64
        for modality in prepared.schema.modalities:
            values = batch.inputs[modality.name]
            assert values.shape == (size, *modality.shape)
            assert values.dtype == (torch.int64 if modality.name == "text" else torch.float32)
            assert batch.present[modality.name].shape == (size,)


def test_views_of_views_gather_the_right_rows(prepared: Prepared) -> None:
    view = prepared.train.take(np.array([5, 3, 9, 3])).take(np.array([3, 0]))
    assert view.ids.tolist() == prepared.train.ids[[3, 5]].tolist()
    whole = prepared.train.batch(np.array([3, 5]))
    part = view.batch(np.arange(2))
    assert all((part.inputs[name] == whole.inputs[name]).all() for name in part.inputs)
    assert view.labels.tolist() == part.target.tolist()


def test_a_view_can_lack_a_modality(prepared: Prepared) -> None:
    view = prepared.train.take(np.arange(20), absent=("audio",))
    batch = view.batch(np.arange(20))
    assert not batch.present["audio"].any()
    assert (batch.inputs["audio"] == 0).all()
    assert batch.present["image"].any()


def test_a_saved_view_comes_back_and_pickles_cheaply(prepared: Prepared, tmp_path: Path) -> None:
    view = prepared.train.take(np.array([8, 2, 4]), absent=("text",))
    view.save(tmp_path)
    opened = Dataset.open(tmp_path)
    assert opened.schema == view.schema
    again = pickle.loads(pickle.dumps(opened.take(np.array([2, 1]))))
    assert len(pickle.dumps(opened)) < 2000
    assert again.ids.tolist() == view.ids[[2, 1]].tolist()
    ours, theirs = view.batch(np.array([2, 1])), again.batch(np.arange(2))
    for name in ours.inputs:
        assert (ours.inputs[name] == theirs.inputs[name]).all()
        assert (ours.present[name] == theirs.present[name]).all()
    in_memory = pickle.loads(pickle.dumps(view))
    assert in_memory.ids.tolist() == view.ids.tolist()
    assert in_memory.absent == {"text"}


def test_an_empty_view_can_be_saved(prepared: Prepared, tmp_path: Path) -> None:
    prepared.train.take(np.arange(0)).save(tmp_path)
    assert len(Dataset.open(tmp_path).batch(np.arange(0))) == 0
