"""Every kind of bad input is found, by line, and told without the content of a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from fedfuse.data.check import check
from fedfuse.data.prepare import prepare
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError

WriteCsv = Callable[..., Path]

HEADER = "id,split,client,label,image,audio,vec,ser,note"
GOOD = [
    ["a", "train", "x", "0", "a.png", "a.wav", "v.npy", "s.npy", "short note"],
    ["b", "val", "x", "1", "a.png", "a.wav", "v.npy", "s.npy", "another note"],
    ["c", "test", "y", "1", "a.png", "a.wav", "v.npy", "s.npy", "third note"],
]


def with_row(**changes: str) -> list[list[str]]:
    cells = dict(zip(HEADER.split(","), GOOD[0], strict=True)) | {"id": "bad"} | changes
    return [*GOOD, list(cells.values())]


def make_bad_files(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:600])
    (folder / "empty.png").write_bytes(b"")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "bad.wav").write_bytes(b"RIFF1234WAVEgarbage" * 9)
    np.save(folder / "nan.npy", np.array([1, np.nan, 2, 3], np.float32))
    np.save(folder / "five.npy", np.zeros(5, np.float32))
    np.save(folder / "inf.npy", np.full((10, 3), np.inf, np.float32))
    np.save(folder / "wide.npy", np.zeros((10, 4), np.float32))
    (folder / "pickled.npy").write_bytes(b"")


@pytest.mark.parametrize(
    ("changes", "column", "what"),
    [
        ({"image": "../a.png"}, "image", "leaves the data folder"),
        ({"image": "/etc/hostname"}, "image", "leaves the data folder"),
        ({"image": "link.png"}, "image", "leaves the data folder"),
        ({"image": "none.png"}, "image", "none.png is missing"),
        ({"image": "cut.png"}, "image", "cannot be decoded"),
        ({"image": "empty.png"}, "image", "is empty"),
        ({"image": "a.wav"}, "image", "cannot be decoded"),
        ({"audio": "bad.wav"}, "audio", "cannot be decoded"),
        ({"audio": "empty.wav"}, "audio", "is empty"),
        ({"vec": "nan.npy"}, "vec", "NaN or inf"),
        ({"vec": "five.npy"}, "vec", r"shape \(5,\), but \(4,\)"),
        ({"ser": "inf.npy"}, "ser", "NaN or inf"),
        ({"ser": "wide.npy"}, "ser", r"shape \(10, 4\)"),
        ({"ser": "pickled.npy"}, "ser", "cannot be read"),
        ({"label": "7"}, "label", "none of the 2 classes"),
        ({"label": ""}, "label", "none of the 2 classes"),
        ({"label": "dog"}, "label", "none of the 2 classes"),
        ({"split": "holdout"}, "split", "split is unknown"),
        ({"id": "a"}, "id", "that of line 2"),
        ({"id": ""}, "id", "id is blank"),
        ({"client": ""}, "client", "client is blank"),
    ],
)
def test_a_bad_record_is_found_refused_or_left_out(
    changes: dict[str, str], column: str, what: str, media: Path, write_csv: WriteCsv
) -> None:
    make_bad_files(media)
    outside = media.parent / "outside.png"
    outside.write_bytes((media / "a.png").read_bytes())
    (media / "link.png").symlink_to(outside)
    path = write_csv(HEADER, with_row(**changes), toml="classes = ['no', 'yes']\n")
    (problem,) = check(path)
    assert (problem.line, problem.column, problem.warning) == (5, column, False)
    assert problem.id == changes.get("id", "bad")
    assert problem.hint
    with pytest.raises(DataError, match=what) as error:
        prepare(DataConfig(manifest=str(path)), seed=0)
    assert "line 5" in str(error.value)
    prepared = prepare(DataConfig(manifest=str(path), skip_bad=True), seed=0)
    assert (prepared.skipped, len(prepared.train)) == (1, 1)


def test_a_record_with_nothing_but_its_label_is_kept_with_a_warning(
    media: Path, write_csv: WriteCsv
) -> None:
    blank = {"image": "", "audio": "", "vec": "", "ser": "", "note": ""}
    path = write_csv(HEADER, with_row(**blank), toml="classes = ['no', 'yes']\n")
    (problem,) = check(path)
    assert (problem.line, problem.warning) == (5, True)
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert (prepared.skipped, len(prepared.train)) == (0, 2)
    assert not any(prepared.train.present(name)[1] for name in prepared.schema.names)


def test_a_good_data_set_has_no_problems(media: Path, write_csv: WriteCsv) -> None:
    assert check(write_csv(HEADER, GOOD)) == ()


def test_all_problems_are_found_at_once(media: Path, write_csv: WriteCsv) -> None:
    make_bad_files(media)
    bad = with_row(image="cut.png", audio="bad.wav", label="nine", split="?")[-1]
    path = write_csv(HEADER, [*GOOD, *([f"bad{k}", *bad[1:]] for k in range(8))])
    problems = check(path, DataConfig())
    assert len(problems) >= 8 * 3
    with pytest.raises(DataError) as error:
        prepare(DataConfig(manifest=str(path)), seed=0)
    text = str(error.value)
    assert text.count("\n  line ") == 5
    assert "fedfuse data check" in text
    assert "--skip-bad" in text


def test_a_data_set_with_no_readable_file_names_each(tmp_path: Path, write_csv: WriteCsv) -> None:
    rows = [
        ["a", "train", "x", "0", "a.png", "a.wav", "v.npy"],
        ["b", "test", "x", "1", "b.png", "", ""],
    ]
    problems = check(write_csv("id,split,client,label,image,audio,vec", rows))
    assert sorted((p.line, p.column) for p in problems if p.line) == [
        (2, "audio"), (2, "image"), (2, "vec"), (3, "image"),
    ]  # fmt: skip


def test_another_sample_rate_is_a_warning(media: Path, write_csv: WriteCsv) -> None:
    soundfile.write(media / "b.wav", np.zeros(8000), 16000)
    toml = '[modalities]\naudio = "wav 8kHz"\n'
    rows = [["a", "train", "x", "0", "a.wav"], ["b", "test", "x", "1", "b.wav"]]
    path = write_csv("id,split,client,label,audio", rows, toml)
    (problem,) = check(path)
    assert problem.warning
    assert "16000 samples a second, but 8000 are declared" in problem.what
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    assert any("resampled" in note for note in prepared.notes)


def test_an_undeclared_column_is_a_warning_and_not_used(media: Path, write_csv: WriteCsv) -> None:
    rows = [["a", "train", "x", "0", "a.wav", "42"], ["b", "test", "x", "1", "a.wav", "43"]]
    path = write_csv("id,split,client,label,audio,age", rows, '[modalities]\naudio = "wav"\n')
    (problem,) = check(path)
    assert (problem.column, problem.warning) == ("age", True)
    assert prepare(DataConfig(manifest=str(path)), seed=0).schema.names == ("audio",)


@pytest.mark.parametrize(
    "content", ["", "id,split,client,label,note\n", "id,note\n1,x\n", "\x00\x00"]
)
def test_an_unusable_manifest_is_one_problem(content: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text(content)
    assert len(check(path)) == 1


def test_a_missing_client_column_is_a_problem(media: Path, write_csv: WriteCsv) -> None:
    path = write_csv(
        "id,split,label,image", [["a", "train", "0", "a.png"], ["b", "test", "1", "a.png"]]
    )
    assert [problem.column for problem in check(path)] == ["client"]
    with pytest.raises(DataError, match="client"):
        prepare(DataConfig(manifest=str(path)), seed=0)
    assert (
        len(prepare(DataConfig(manifest=str(path), partition="iid", nodes=1), seed=0).shards) == 1
    )


@pytest.mark.parametrize("splits", [("train", "train"), ("test", "test"), ("valid", "valid")])
def test_a_split_without_records_is_refused(
    splits: Sequence[str], media: Path, write_csv: WriteCsv
) -> None:
    rows = [[str(k), split, "x", str(k), "a.png"] for k, split in enumerate(splits)]
    path = write_csv("id,split,client,label,image", rows)
    assert any("no good" in problem.what for problem in check(path))
    with pytest.raises(DataError, match="no good"):
        prepare(DataConfig(manifest=str(path)), seed=0)


def test_messages_never_hold_the_content_of_a_record(media: Path, write_csv: WriteCsv) -> None:
    secret = "SECRET diagnosis"
    rows = [
        *(
            [str(k), split, "x", str(k % 2), "a.png", "1.5"]
            for k, split in enumerate(["train", "test"] * 9)
        ),
        ["p", "train", "x", secret, secret, secret],
        ["q", secret, "x", "0", "a.png", secret],
    ]
    path = write_csv("id,split,client,label,image,age", rows, "classes = ['no', 'yes']")
    problems = check(path)
    assert len(problems) >= 5
    assert not any("SECRET" in f"{problem} {problem.hint}" for problem in problems)
    with pytest.raises(DataError) as error:
        prepare(DataConfig(manifest=str(path)), seed=0)
    assert "SECRET" not in str(error.value)


def test_arrays_in_place_of_sounds_or_texts_are_features_of_them(
    media: Path, write_csv: WriteCsv
) -> None:
    toml = '[modalities]\naudio = "audio"\ntext = "text"\nvideo = { kind = "video" }\n'
    rows = [
        ["a", "train", "x", "0", "v.npy", "v.npy", "s.npy"],
        ["b", "test", "x", "1", "v.npy", "v.npy", "s.npy"],
    ]
    path = write_csv("id,split,client,label,audio,text,video", rows, toml)
    assert check(path) == ()
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    found = {m.name: (m.kind.value, m.shape) for m in prepared.schema.modalities}
    assert found == {
        "audio": ("vector", (4,)),
        "text": ("vector", (4,)),
        "video": ("series", (10, 3)),
    }
    assert sum("its cells are arrays" in note for note in prepared.notes) == 3
