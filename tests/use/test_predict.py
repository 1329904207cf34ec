"""Predictions of a stored model: those of the model in memory, for any manifest that fits."""

from __future__ import annotations

import csv
import io
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from fedfuse.batch import TargetKind
from fedfuse.cli import main
from fedfuse.conformal import Calibration
from fedfuse.data.prepare import prepare
from fedfuse.data.reading import Reading, open_reading, read_records
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError, RunFolderError, UsageError
from fedfuse.federation.observer import Silent
from fedfuse.federation.simulate import simulate
from fedfuse.models.answer import answer
from fedfuse.use.predict import Predictions, as_text, predict, write
from fedfuse.use.trained import open_trained
from tests.use.conftest import Made
from tests.use.runs import KINDS, TARGETS, write_data, write_run

Make = Callable[[str], Made]


def cut(manifest: Path, name: str, change: Callable[[list[dict[str, str]]], Any]) -> Path:
    """Another manifest beside `manifest`, with rows that `change` made of its rows."""
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = change(rows)
    path = manifest.with_name(name)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    return path


def without(*names: str) -> Callable[[list[dict[str, str]]], list[dict[str, str]]]:
    return lambda rows: [{k: v for k, v in row.items() if k not in names} for row in rows]


@pytest.mark.parametrize("target", TARGETS)
def test_a_manifest_is_read_as_in_training_and_predicted_by_the_same_model(
    target: str, made: Make
) -> None:
    one = made(target)
    only = cut(one.manifest, "new.csv", without("split", "client", "label"))
    trained = open_trained(one.run)
    records = read_records(trained.reading, only)
    assert records.dataset.ids.tolist() == [f"r{k}" for k in range(90)]
    for split, dataset in (("train", one.prepared.train), ("test", one.prepared.test)):
        rows = np.arange(0 if split == "train" else 2, 90, 3)
        ours, theirs = records.dataset.batch(rows), dataset.batch(np.arange(30))
        for name in dataset.schema.names:
            assert torch.equal(ours.inputs[name], theirs.inputs[name])
            assert torch.equal(ours.present[name], theirs.present[name])
    with torch.inference_mode():
        outputs = trained.model(one.prepared.test.batch(np.arange(30)))
        told = answer(outputs, one.prepared.schema.target).numpy()
    found = predict(trained, only).records[2::3]
    for row, p, k in zip(found, told, range(30), strict=True):
        assert row["id"] == f"r{3 * k + 2}"
        assert row["line"] == 3 * k + 4
        there = [m for m in records.dataset.schema.names if one.prepared.test.present(m)[k]]
        assert row["modalities"] == there
        if target == "number":
            assert row["prediction"] == pytest.approx(p[0], abs=1e-5)
        else:
            assert list(row["probabilities"].values()) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_predictions_agree_with_the_metrics_and_sets_hold_the_truth(
    target: str, made: Make
) -> None:
    one = made(target)
    found = predict(open_trained(one.run), one.manifest, coverage=0.9)
    assert found.why_none == ""
    assert found.calibrated_on == 30
    labels = [row["label"] for row in csv.DictReader(io.StringIO(one.manifest.read_text()))]
    rows = list(zip(found.records, labels, strict=True))[2::3]
    match one.prepared.schema.target.kind:
        case TargetKind.REGRESSION:
            held = [row["interval"][0] <= float(label) <= row["interval"][1] for row, label in rows]
            right = [abs(row["prediction"] - float(label)) < 10 for row, label in rows]
        case TargetKind.MULTILABEL:
            truth = [set(label.split(";")) for _, label in rows]
            held = [
                set(row["certain"]) <= t <= set(row["possible"])
                for (row, _), t in zip(rows, truth, strict=True)
            ]
            right = [set(row["prediction"]) == t for (row, _), t in zip(rows, truth, strict=True)]
        case _:
            held = [label in row["set"] for row, label in rows]
            right = [row["prediction"] == label for row, label in rows]
            assert all(row["prediction"] in row["set"] for row, _ in rows)
    assert np.mean(right) > 0.7
    assert np.mean(held) > 0.6  # of 30 records; tests/test_conformal.py has the statistics


def test_a_whole_modality_may_be_missing_and_others_may_be_there(made: Make) -> None:
    one = made("classes")
    fewer = cut(
        one.manifest,
        "fewer.csv",
        lambda rows: [{"id": row["id"], "note": row["note"], "spare": "x"} for row in rows[:9]],
    )
    found = predict(open_trained(one.run), fewer)
    assert all(row["modalities"] in (["note"], []) for row in found.records)
    assert "no column image: absent from every record" in found.notes
    assert "not of the model, so not used: spare" in found.notes


def test_records_without_an_id_have_their_line(made: Make, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"note": "it was loud"}\n\n{"vector": [1, 1, 1], "note": null}\n')
    found = predict(open_trained(made("classes").run), path)
    assert [(row["line"], row["id"]) for row in found.records] == [(1, ""), (3, "")]
    assert [row["modalities"] for row in found.records] == [["note"], ["vector"]]


def test_bad_records_are_one_error_or_are_counted(made: Make) -> None:
    one = made("classes")

    def spoil(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        rows[1] |= {"image": "nowhere.png"}
        rows[4] |= {"vector": "1 2"}
        rows[5] |= {"age": "secret words"}
        return rows[:9]

    path = cut(one.manifest, "spoiled.csv", spoil)
    trained = open_trained(one.run)
    with pytest.raises(DataError, match="3 problems found") as caught:
        predict(trained, path)
    assert "line 3, id r1, column image" in caught.value.what
    assert "secret" not in str(caught.value)
    assert "--skip-bad" in caught.value.hint
    found = predict(trained, path, skip_bad=True)
    assert found.skipped == 3
    assert [row["id"] for row in found.records] == ["r0", "r2", "r3", "r6", "r7", "r8"]


def test_a_manifest_of_something_else_is_refused(made: Make, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,height\na,3\n")
    with pytest.raises(DataError, match="no column is one of the model's") as caught:
        predict(open_trained(made("classes").run), path)
    assert "image, audio, note, motion, vector, age" in caught.value.hint
    path.write_text("id,split\na,test\n")
    with pytest.raises(DataError, match="no modality column"):
        predict(open_trained(made("classes").run), path)


@pytest.mark.parametrize(
    ("count", "why"), [(0, "no valid records"), (5, "5 valid records are too")]
)
def test_without_enough_valid_records_there_is_no_interval(
    count: int, why: str, made: Make
) -> None:
    one = made("number")
    trained = open_trained(one.run)
    assert trained.calibration is not None
    few = Calibration(kind=TargetKind.REGRESSION, scores=trained.calibration.scores[:count])
    object.__setattr__(trained, "calibration", few if count else None)
    found = predict(trained, one.manifest)
    assert why in found.why_none
    assert {row["interval"] for row in found.records} == {None}
    assert found.as_dict()["coverage"] is None
    assert as_text(found).decode().splitlines()[0] == "line,id,prediction,low,high,modalities"
    assert ",,," in as_text(found).decode().splitlines()[1].replace(KINDS[0], "")


def test_a_coverage_of_one_is_no_coverage(made: Make) -> None:
    for coverage in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="not between 0 and 1"):
            predict(open_trained(made("classes").run), made("classes").manifest, coverage=coverage)


def test_each_format_holds_the_same_and_only_its_owner_may_read_it(
    made: Make, tmp_path: Path
) -> None:
    found: Predictions = predict(open_trained(made("labels").run), made("labels").manifest)
    for name in ("p.csv", "p.jsonl", "p.parquet"):
        write(found, tmp_path / name)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    cells = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == list(found.records)
    for cell, row, line in zip(cells, table, lines, strict=True):
        assert float(cell["p(mid)"]) == row["p(mid)"] == line["probabilities"]["mid"]
        assert cell["prediction"] == row["prediction"] == ";".join(line["prediction"])
        assert cell["possible"] == ";".join(line["possible"])
    with pytest.raises(UsageError, match="none of"):
        write(found, tmp_path / "p.txt")


def test_what_a_reading_says_comes_back_from_json(made: Make, tmp_path: Path) -> None:
    reading = made("classes").prepared.reading
    assert Reading.from_dict(json.loads(json.dumps(reading.as_dict()))) == reading
    reading.write(tmp_path)
    assert open_reading(tmp_path) == reading
    for text in ("{}", "[", '{"channels": [{"spec": {"type": "os"}}], "target": {}}'):
        (tmp_path / "reading.json").write_text(text)
        with pytest.raises(DataError, match=r"reading\.json cannot be understood"):
            open_reading(tmp_path)


def test_a_damaged_run_is_one_error(made: Make, tmp_path: Path) -> None:
    manifest = write_data(tmp_path / "d", "classes", 12)
    write_run(tmp_path / "run", manifest, steps=0)
    other = made("number").run / "reading.json"
    for text in ("", "{}", other.read_text().replace('"steps": 20', '"steps": 21')):
        (tmp_path / "run" / "reading.json").write_text(text)
        with pytest.raises(RunFolderError):
            open_trained(tmp_path / "run")
    (tmp_path / "run" / "reading.json").unlink()
    with pytest.raises(RunFolderError, match=r"reading\.json cannot be read"):
        open_trained(tmp_path / "run")


@pytest.mark.slow
def test_a_federated_run_is_predicted_from_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The whole way: simulate, leave, come back."""
    manifest = write_data(tmp_path / "data", "classes")
    from fedfuse.config import RunConfig

    config = RunConfig().with_values(
        {"data.manifest": str(manifest), "train.rounds": "1", "privacy.unit": "none",
         "train.local_steps": "3", "federation.workers": "1"}
    )  # fmt: skip
    simulate(config, tmp_path / "run", observer=Silent())
    words = ("-m", "fedfuse", "predict", tmp_path / "run", manifest, "--json")
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=True
    )
    tree = json.loads(done.stdout)
    assert "NOT PRIVATE" in tree["training"]
    assert tree["calibrated_on"] == 30
    trained = open_trained(tmp_path / "run")
    test = prepare(DataConfig(manifest=str(manifest)), seed=0).test
    _, told = trained.tell(test.batch(np.arange(30)))
    there = [list(row["probabilities"].values()) for row in tree["records"][2::3]]
    np.testing.assert_allclose(there, told, atol=1e-6)
    with torch.inference_mode():
        outputs = trained.model(test.batch(np.arange(30)))
    right = outputs.argmax(1).numpy() == test.labels
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] == pytest.approx(right.mean())


def test_the_command_prints_csv_and_says_what_it_rests_on(
    made: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = made("classes")
    assert main(["predict", str(one.run), str(one.manifest)]) == 0
    shown = capsys.readouterr()
    head, first = shown.out.splitlines()[:2]
    assert head == "line,id,prediction,p(low),p(mid),p(high),set,modalities"
    assert first.startswith("2,r0,")
    assert "coverage 0.9, calibrated on 30 valid records\n" in shown.err
    assert "training: NOT PRIVATE" in shown.err
    out = tmp_path / "p.csv"
    assert main(["predict", str(one.run), str(one.manifest), "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    assert "records" not in json.loads(shown.out)
    assert out.read_text().startswith(head)
    assert main(["predict", str(one.run), str(one.manifest), "--out", "p.txt"]) == 2
    assert main(["predict", str(tmp_path), str(one.manifest)]) == 8
    assert main(["predict", str(one.run), str(one.manifest), "--coverage", "0.999"]) == 0
    assert "no interval: 30 valid records are too few" in capsys.readouterr().err
