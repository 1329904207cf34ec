from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedfuse.batch import Kind, TargetKind
from fedfuse.data.declaration import read_declaration
from fedfuse.errors import DataError


def declare(tmp_path: Path, **fields: Any) -> Any:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(fields))
    return read_declaration(path)


@pytest.mark.parametrize(
    ("name", "text", "kind", "facts"),
    [
        ("image", "png L 28x28", Kind.IMAGE, {"image_size": 28, "channels": 1}),
        ("scan", "jpg RGB 160 x 120", Kind.IMAGE, {"image_size": 160, "channels": 3}),
        ("audio", "wav 8kHz mono int16", Kind.AUDIO, {"sample_rate": 8000, "channels": 0}),
        ("s", "flac 44100 Hz 2.5 s", Kind.AUDIO, {"sample_rate": 44100, "seconds": 2.5}),
        ("text", "inline", Kind.TEXT, {}),
        ("text", "inline question", Kind.TEXT, {}),
        ("text", "inline, missing in a tenth", Kind.TEXT, {}),
        ("phone", "npy float32 (64,6) acc xyz m/s2 @50Hz", Kind.SERIES, {"shape": (64, 6)}),
        ("audio", "npy float32 (74,) audio features", Kind.VECTOR, {"shape": (74,)}),
        ("audio", "npy float32 74-d features", Kind.VECTOR, {"shape": (74,)}),
        ("audio", "npy 1-D", Kind.VECTOR, {"shape": ()}),
        ("labs", "npy float32 (12,), NaN where missing", Kind.TABLE, {"shape": (12,)}),
        ("table", "npy float32 (12,)", Kind.TABLE, {"shape": (12,)}),
        ("labs", "tabular", Kind.TABLE, {}),
        ("age", "inline float", None, {}),
        ("x", "something else", None, {}),
    ],
)
def test_free_text_is_understood(
    name: str, text: str, kind: Kind | None, facts: dict[str, object], tmp_path: Path
) -> None:
    said = declare(tmp_path, modalities={name: text}).modalities[name]
    assert said.kind is kind
    assert {key: getattr(said, key) for key in facts} == facts


def test_the_table_form_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "dataset.toml"
    path.write_text(
        'task = "continuous"\n'
        "target = {range = [0, 10]}\n"
        "[modalities]\n"
        'v = {kind = "vector", shape = [2], mean = [1, 2], std = [3, 0]}\n'
        'a = {kind = "audio", sample_rate = 16000, seconds = 2}\n'
        't = {kind = "table", columns = ["age", "sex"], range = [0, 100]}\n'
    )
    said = read_declaration(path)
    assert said.task is TargetKind.REGRESSION
    assert (said.centre, said.scale) == (5, 5)
    assert (said.modalities["v"].mean, said.modalities["v"].std) == ((1, 2), (3, 1))
    assert (said.modalities["a"].sample_rate, said.modalities["a"].seconds) == (16000, 2)
    assert said.modalities["t"].columns == ("age", "sex")
    assert (said.modalities["t"].mean, said.modalities["t"].std) == ((50,), (50,))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("multiclass", TargetKind.CLASSIFICATION),
        ("binary classification", TargetKind.CLASSIFICATION),
        ("Regression", TargetKind.REGRESSION),
        ("continuous", TargetKind.REGRESSION),
        ("multi-label classification", TargetKind.MULTILABEL),
        ("classification, multi_label", TargetKind.MULTILABEL),
        ("ordinal regression", TargetKind.ORDINAL),
    ],
)
def test_synonyms_of_the_task(task: str, kind: TargetKind, tmp_path: Path) -> None:
    assert declare(tmp_path, task=task).task is kind


def test_unknown_fields_are_named_not_refused(tmp_path: Path) -> None:
    said = declare(tmp_path, name="x", manifests=[], client="ward", colour="red", age=3)
    assert said.unused == ("age", "colour")


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "segmentation"},
        {"classes": ["a", "b"], "num_classes": 3},
        {"classes": ["a", "a"]},
        {"classes": True},
        {"modalities": 3},
        {"modalities": {"v": {"shape": "wide"}}},
        {"modalities": {"v": {"mean": [1, 2], "std": [1]}}},
        {"modalities": {"v": {"range": 5}}},
        {"num_classes": "many"},
        {"classes": ["a", "b"], "priors": [0.5]},
        {"classes": ["a", "b"], "priors": [0.5, 1.5]},
        {"classes": ["a", "b"], "priors": {"a": 0.5, "z": 0.5}},
        {"classes": ["a", "b"], "priors": 3},
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        declare(tmp_path, **fields)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dataset.toml"
    path.write_text("name = ")
    with pytest.raises(DataError, match="cannot be read"):
        read_declaration(path)


def test_shares_of_classes_are_read_by_place_or_by_name(tmp_path: Path) -> None:
    by_place = declare(tmp_path, classes=["a", "b"], priors=[0.9, 0.1])
    by_name = declare(tmp_path, classes=["a", "b"], class_priors={"b": 0.1, "a": 0.9})
    assert by_place.priors == by_name.priors == (0.9, 0.1)
    assert declare(tmp_path).priors == ()
