from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfuse.batch import Kind, TargetKind
from fedfuse.data.prepare import open_node, open_split, prepare
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError

WriteCsv = Callable[..., Path]
SPLITS = ["train"] * 12 + ["valid"] * 4 + ["test"] * 4


def said(notes: tuple[str, ...], *words: str) -> bool:
    return any(all(word in note for word in words) for note in notes)


def test_image_notes_and_a_table_with_many_blanks(tmp_path: Path, write_csv: WriteCsv) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i, split in enumerate(SPLITS):
        image = f"{i}.png" if i % 3 else ""
        if image:
            Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(
                tmp_path / image
            )
        note = f"patient {i} was seen today with complaint number {i}" if i % 4 != 1 else ""
        age = "" if i % 2 else str(30 + i)
        sex = "" if i % 5 == 0 else "fm"[i % 2]
        pressure = "n/a" if i % 3 == 0 else f"{100 + i}.5"
        rows.append(
            [f"r{i}", split, "ab"[i % 2], "yes" if i % 2 else "no", image, note, age, sex, pressure]
        )
    path = write_csv("id,split,client,label,image,notes,age,sex,pressure", rows)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert [(m.name, m.kind, m.shape) for m in prepared.schema.modalities] == [
        ("image", Kind.IMAGE, (3, 64, 64)),
        ("notes", Kind.TEXT, (32,)),
        ("table", Kind.TABLE, (6,)),
    ]
    assert prepared.schema.target.classes == ("no", "yes")
    batch = prepared.train.batch(np.arange(12))
    table = batch.inputs["table"].numpy()
    assert batch.present["table"].tolist() == [i not in (15,) for i in range(12)]
    assert table[1, 3:].tolist() == [1, 0, 0]
    assert table[0, 3:].tolist() == [0, 1, 1]
    assert (table[1, 0], table[1, 1]) == (0, 1)
    assert not batch.present["image"][0]
    assert (batch.inputs["image"][0] == 0).all()
    assert 0 <= batch.inputs["image"].min() < batch.inputs["image"].max() <= 1
    for words in (("sex", "categories"), ("classes", "inferred"), ("table", "valid split")):
        assert said(prepared.notes, *words)
    one = prepare(DataConfig(manifest=str(path), modalities=("age", "image")), seed=0)
    assert [(m.name, m.shape) for m in one.schema.modalities] == [
        ("image", (3, 64, 64)),
        ("table", (2,)),
    ]


def test_a_row_blank_in_every_column_of_the_table_lacks_the_table(write_csv: WriteCsv) -> None:
    rows = [["a", "train", "x", "0", "some words here now", "", "n/a"]]
    rows += [["b", "train", "x", "1", "some more words here", "1", ""]]
    rows += [["c", "test", "x", "1", "and other words here", "2", "3"]]
    path = write_csv("id,split,client,label,note,age,weight", rows)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.train.present("table").tolist() == [False, True]
    assert prepared.train.batch(np.arange(2)).inputs["table"][0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "toml",
    [
        "",
        'task = "regression"\ntarget_range = [0, 100]\n[modalities]\ntext = "inline"\n'
        'audio = "npy float32 (6,) audio features"\n',
        'task = "continuous"\n[modalities]\ntext = "inline"\naudio = "npy 1-D"\n',
    ],
)
def test_text_and_feature_vectors_with_a_continuous_target(
    toml: str, tmp_path: Path, write_csv: WriteCsv
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i, split in enumerate(SPLITS):
        np.save(tmp_path / f"{i}.npy", rng.normal(5, 3, 6))
        rows.append(
            [f"r{i}", split, "ab"[i % 2], 40 + i * 1.25, f"{i}.npy", f"words {i} said aloud"]
        )
    path = write_csv("id,split,client,target,audio,text", rows, toml)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    target = prepared.schema.target
    assert target.kind is TargetKind.REGRESSION
    assert [(m.name, m.kind, m.shape) for m in prepared.schema.modalities] == [
        ("audio", Kind.VECTOR, (6,)),
        ("text", Kind.TEXT, (32,)),
    ]
    if "range" in toml:
        assert (target.centre, target.scale) == (50, 50)
    else:
        values = [40 + i * 1.25 for i in range(12, 16)]
        assert target.centre == pytest.approx(np.mean(values))
        assert target.scale == pytest.approx(np.std(values))
        assert said(prepared.notes, "target", "valid split")
    batch = prepared.train.batch(np.arange(12))
    unscaled = batch.target.numpy() * target.scale + target.centre
    assert np.allclose(unscaled, [40 + i * 1.25 for i in range(12)], atol=1e-3)
    assert prepared.valid is not None
    vectors = prepared.valid.batch(np.arange(4)).inputs["audio"]
    assert vectors.mean(dim=0).abs().max() < 1e-5


def test_many_fractions_in_a_label_column_mean_regression(write_csv: WriteCsv) -> None:
    rows = [[i, s, "x", i * 0.37, f"some words number {i} here"] for i, s in enumerate(SPLITS * 2)]
    prepared = prepare(DataConfig(manifest=str(write_csv("id,split,client,label,t", rows))), seed=0)
    assert prepared.schema.target.kind is TargetKind.REGRESSION
    assert said(prepared.notes, "regression, inferred")


def test_class_names_indices_and_whole_floats_are_labels(write_csv: WriteCsv) -> None:
    labels = ["yes", "1", "0.0", "no"]
    rows = [[i, "train", "x", label, "some words"] for i, label in enumerate(labels)]
    rows.append(["t", "test", "x", "1.0", "words"])
    path = write_csv("id,split,client,label,text", rows, 'classes = ["no", "yes"]')
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.train.labels.tolist() == [1, 1, 0, 0]
    assert prepared.test.labels.tolist() == [1]


def test_inferred_numeric_classes_keep_their_names(write_csv: WriteCsv) -> None:
    rows = [[i, "train", "x", 1 + i % 3, "some words"] for i in range(6)]
    rows.append(["t", "test", "x", 3, "words"])
    prepared = prepare(
        DataConfig(manifest=str(write_csv("id,split,client,label,text", rows))), seed=0
    )
    assert prepared.schema.target.classes == ("1", "2", "3")
    assert prepared.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_train_never_sets_the_scale(tmp_path: Path, write_csv: WriteCsv) -> None:
    """Changing train records moves no other record's values."""

    def values(shift: float, toml: str, valid: bool) -> np.ndarray:
        rows = [[i, "train", "x", i % 2, f"{i + shift} {2 * i}"] for i in range(6)]
        rows += [[f"v{i}", "valid" if valid else "test", "x", 0, f"{i} 3"] for i in range(3)]
        rows += [["t", "test", "x", 1, "5 6"]]
        prepared = prepare(
            DataConfig(manifest=str(write_csv("id,split,client,label,vec", rows, toml))), seed=0
        )
        return prepared.test.batch(np.array([len(prepared.test) - 1])).inputs["vec"].numpy()

    declared = '[modalities]\nvec = {kind = "vector", shape = [2], range = [0, 10]}\n'
    for toml, valid, expected in (
        ("", True, [[4 / np.std([0, 1, 2]), 3]]),
        ("", False, [[np.arcsinh(5), np.arcsinh(6)]]),
        (declared, True, [[0, 0.2]]),
    ):
        assert np.allclose(values(0, toml, valid), expected, atol=1e-5)
        assert (values(0, toml, valid) == values(1e6, toml, valid)).all()
        (tmp_path / "dataset.toml").unlink(missing_ok=True)


def test_values_are_clipped(write_csv: WriteCsv) -> None:
    rows = [["a", "train", "x", 0, "1e9 -1e9"], ["v", "valid", "x", 0, "0 0"]]
    rows += [["w", "valid", "x", 1, "1 1"], ["t", "test", "x", 1, "0 1"]]
    prepared = prepare(DataConfig(manifest=str(write_csv("id,split,client,label,v", rows))), seed=0)
    assert prepared.train.batch(np.array([0])).inputs["v"].tolist() == [[10, -10]]


def test_nan_in_a_declared_table_is_a_missing_value(tmp_path: Path, write_csv: WriteCsv) -> None:
    np.save(tmp_path / "a.npy", np.array([1, np.nan, 3], np.float32))
    rows = [["a", "train", "x", 0, "a.npy"], ["t", "test", "x", 1, "a.npy"]]
    path = write_csv("id,split,client,label,table", rows)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.schema.modalities[0].shape == (6,)
    assert prepared.train.batch(np.array([0])).inputs["table"][0, 3:].tolist() == [0, 1, 0]


def test_a_gap_in_a_list_of_numbers_is_a_missing_value(write_csv: WriteCsv) -> None:
    rows = [["a", "train", "x", 0, "1;;3"], ["t", "test", "x", 1, "1;2;3"]]
    prepared = prepare(
        DataConfig(manifest=str(write_csv("id,split,client,label,labs", rows))), seed=0
    )
    assert prepared.schema.modalities[0].kind is Kind.TABLE
    assert prepared.train.batch(np.array([0])).inputs["labs"][0, 3:].tolist() == [0, 1, 0]


def test_a_declared_table_is_made_of_its_columns(write_csv: WriteCsv) -> None:
    toml = '[modalities]\nvitals = {kind = "table", columns = ["hr", "bp"], mean = 5, std = 5}\n'
    rows = [["a", "train", "x", 0, 10, ""], ["t", "test", "x", 1, 0, 5]]
    path = write_csv("id,split,client,label,hr,bp", rows, toml)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert prepared.schema.names == ("vitals",)
    assert prepared.train.batch(np.array([0])).inputs["vitals"].tolist() == [[1, 0, 0, 1]]


def test_sizes_in_the_configuration_win(media: Path, write_csv: WriteCsv) -> None:
    rows = [
        ["a", "train", "x", 0, "a.png", "a.wav", "s.npy"],
        ["t", "test", "x", 1, "a.png", "a.wav", "s.npy"],
    ]
    path = write_csv("id,split,client,label,image,audio,ser", rows)
    auto = prepare(DataConfig(manifest=str(path)), seed=0)
    assert [m.shape for m in auto.schema.modalities] == [(1, 8, 8), (40, 32), (10, 3)]
    config = DataConfig(
        manifest=str(path), image_size=12, sample_rate=4000, audio_seconds=1.0, mel_bands=20,
        mel_frames=10, series_steps=5,
    )  # fmt: skip
    prepared = prepare(config, seed=0)
    assert [m.shape for m in prepared.schema.modalities] == [(1, 12, 12), (20, 10), (5, 3)]
    assert said(auto.notes, "audio", "length", "valid and test")


def test_unknown_modalities_are_refused_by_name(demo: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare(DataConfig(manifest=str(demo), modalities=("smell",)), seed=0)
    assert "smell" in str(error.value)
    assert "image, audio, text" in str(error.value)


def test_shared_files_and_repeated_subjects_are_counted(media: Path, write_csv: WriteCsv) -> None:
    rows = [[i, "train", "x", i % 2, "a.png", f"s{i // 2}"] for i in range(5)]
    rows += [["t", "test", "x", 0, "a.png", "s9"]]
    path = write_csv("id,split,client,label,image,subject", rows)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert (prepared.shared_files, prepared.repeated_subjects) == (1, 2)
    assert said(prepared.notes, "does not cover such a file")
    assert prepared.schema.names == ("image",)


def test_a_client_without_train_records_is_no_node(media: Path, write_csv: WriteCsv) -> None:
    rows = [["a", "train", "x", 0, "a.png"], ["b", "test", "y", 1, "a.png"]]
    path = write_csv("id,split,client,label,image", rows)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert [(shard.name, len(shard.rows)) for shard in prepared.shards] == [("x", 1)]
    assert said(prepared.notes, "no train record")


def test_prepared_data_is_stored_for_nodes(demo: Path, tmp_path: Path) -> None:
    prepared = prepare(DataConfig(manifest=str(demo), partition="modality", nodes=3), seed=1)
    folder = tmp_path / "store"
    prepared.write(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for number, shard in enumerate(prepared.shards):
        name, node = open_node(folder, number)
        assert name == shard.name
        assert node.ids.tolist() == prepared.node(number).ids.tolist()
        rows = np.arange(len(node))
        ours, theirs = prepared.node(number).batch(rows), node.batch(rows)
        for modality in prepared.schema.names:
            assert (ours.inputs[modality] == theirs.inputs[modality]).all()
            assert (ours.present[modality] == theirs.present[modality]).all()
    assert open_split(folder, "test").schema == prepared.schema
    assert len(open_split(folder, "valid")) == 8
    with pytest.raises(DataError):
        open_node(folder, 3)
    with pytest.raises(DataError):
        open_split(tmp_path, "test")


def test_the_fingerprint_knows_a_changed_file(media: Path, write_csv: WriteCsv) -> None:
    path = write_csv(
        "id,split,client,label,image",
        [["a", "train", "x", 0, "a.png"], ["t", "test", "x", 1, "a.png"]],
    )
    first = prepare(DataConfig(manifest=str(path)), seed=0).fingerprint
    assert prepare(DataConfig(manifest=str(path)), seed=1).fingerprint == first
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(media / "a.png")
    assert prepare(DataConfig(manifest=str(path)), seed=0).fingerprint != first


def test_no_manifest_is_refused() -> None:
    with pytest.raises(DataError, match="no manifest"):
        prepare(DataConfig(), seed=0)
