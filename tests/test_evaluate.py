"""Figures by what is present and by client are those of the records in question."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.data.dataset import Column, Dataset
from fedfuse.evaluate import evaluate, slices
from fedfuse.tasks import Task

TARGET = Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b"))


class Sum(nn.Module):
    """Says class 1 where the two numbers add up to more than 0."""

    def forward(self, batch: Batch) -> torch.Tensor:
        total = batch.inputs["u"] + batch.inputs["v"]
        return torch.cat([-total, total], 1)


def records() -> Dataset:
    names = ("u", "v")
    schema = Schema(
        modalities=tuple(Modality(name=n, kind=Kind.VECTOR, shape=(1,)) for n in names),
        target=TARGET,
    )
    values = np.array([[1.0], [-1.0], [1.0], [2.0], [-2.0], [1.0]], dtype=np.float32)
    index = np.arange(6)
    return Dataset(
        schema,
        {
            "u": Column(values, np.where([1, 1, 0, 0, 1, 0], index, -1)),
            "v": Column(values, np.where([1, 1, 1, 1, 0, 0], index, -1)),
        },
        np.array([1, 1, 1, 1, 0, 0]),
        np.array([str(i) for i in index]),
        np.array(["x", "x", "y", "y", "y", ""]),
        np.array([""] * 6),
    )


def test_each_record_is_in_one_slice_of_each_kind() -> None:
    dataset, task = records(), Task.of(TARGET)
    found = slices(Sum(), dataset, task, ("u", "v"), device=torch.device("cpu"), batch_size=4)
    assert {name: figures["records"] for name, figures in found["present"].items()} == {
        "nothing": 1, "u": 1, "u + v": 2, "v": 2,
    }  # fmt: skip
    assert found["present"]["u + v"]["accuracy"] == pytest.approx(1 / 2)
    assert found["present"]["v"]["accuracy"] == 1.0
    assert set(found["client"]) == {"x", "y"}  # one record does not say whose it is
    assert found["client"]["x"]["accuracy"] == pytest.approx(1 / 2)
    assert found["client"]["y"]["accuracy"] == 1.0
    whole = evaluate(Sum(), dataset, task, device=torch.device("cpu"))["accuracy"]
    parts = found["present"].values()
    assert sum(p["records"] * p["accuracy"] for p in parts) / 6 == pytest.approx(whole)
