"""Exported copies answer as the model does, whatever is absent, for any number of records."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fedfuse.batch import Kind, Target, TargetKind
from fedfuse.cli import main
from fedfuse.data.audio import AudioSpec
from fedfuse.data.columns import Source
from fedfuse.data.declaration import DeclaredModality
from fedfuse.data.image import ImageSpec
from fedfuse.data.reading import Channel, Reading, read_records
from fedfuse.data.series import SeriesSpec
from fedfuse.data.text import TextSpec
from fedfuse.data.video import VideoSpec
from fedfuse.errors import ModelError, UsageError
from fedfuse.models.model import build_model
from fedfuse.models.spec import ENCODERS, FUSIONS, EncoderConfig, ModelConfig
from fedfuse.use import export as exporting
from fedfuse.use import onnxfile
from fedfuse.use.export import LIMIT, compare, export
from fedfuse.use.made import made_records, patterns
from fedfuse.use.onnxfile import feed, input_names, open_onnx, session_of
from fedfuse.use.predict import predict
from fedfuse.use.tracing import Plain, onnx_of, tensors, trace
from fedfuse.use.trained import open_trained
from tests.use.conftest import Made
from tests.use.runs import TARGETS, write_data, write_run

Make = Callable[[str], Made]
FEW = "note,vector,age"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run of three modalities without convolutions, which is quick to export."""
    folder = tmp_path_factory.mktemp("small")
    manifest = write_data(folder / "data", "classes", 60)
    prepared = write_run(
        folder / "run", manifest, private=True, data__modalities=FEW, model__fusion="gated"
    )
    return Made(folder / "run", manifest, prepared)


@pytest.fixture(scope="module")
def exported(small: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done = export(open_trained(small.run), path, data=small.manifest)
    assert done.differences["made"].records == 8
    assert done.differences["given"].records == 60
    assert max(one.largest for one in done.differences.values()) <= LIMIT
    assert all(one.agreement == 1 for one in done.differences.values())
    assert done.bytes == path.stat().st_size
    assert set(done.latency) == {"torch", "onnxruntime"}
    assert all(0 < one.p50_ms <= one.p99_ms for one in done.latency.values())
    return path


def test_the_file_says_what_it_is_and_what_was_promised(small: Made, exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model)
    told = {one.key: one.value for one in model.metadata_props}
    digest = hashlib.sha256((small.run / "model.safetensors").read_bytes()).hexdigest()
    assert told["fedfuse.weights_sha256"] == digest
    assert told["fedfuse.training"] == "(3.00, 1e-05)-differential privacy"
    assert json.loads(told["fedfuse.classes"]) == ["low", "mid", "high"]
    inputs = {one.name: one.type.tensor_type.shape.dim for one in model.graph.input}
    assert list(inputs) == [
        f"{a}.{b}" for a in ("input", "present") for b in FEW.replace("age", "table").split(",")
    ]
    assert {dims[0].dim_param for dims in inputs.values()} == {"batch"}
    assert [one.name for one in model.graph.output] == ["logits", "probabilities"]


def test_onnxruntime_alone_gives_the_models_outputs_in_a_process_of_its_own(
    small: Made, exported: Path, tmp_path: Path
) -> None:
    """numpy and onnxruntime only: what an edge device has."""
    trained = open_trained(small.run)
    batch = read_records(trained.reading, small.manifest).dataset.batch(np.arange(60))
    arrays = {f"input.{k}": v.numpy() for k, v in batch.inputs.items()}
    arrays |= {f"present.{k}": v.numpy() for k, v in batch.present.items()}
    np.savez(tmp_path / "records.npz", **arrays)
    code = (
        "import sys, numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(exported)!r})\n"
        f"records = dict(np.load({str(tmp_path / 'records.npz')!r}))\n"
        "whole = session.run(None, records)\n"
        "one = session.run(None, {k: v[:1] for k, v in records.items()})\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, *whole, *one)\n"
        "assert 'torch' not in sys.modules and 'fedfuse' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = np.load(tmp_path / "out.npz")
    for got, expected in zip((found["arr_0"], found["arr_1"]), trained.tell(batch), strict=True):
        assert np.abs(got - expected).max() <= 1e-4
    assert np.abs(found["arr_2"] - found["arr_0"][:1]).max() <= 1e-5


def test_predictions_from_the_file_are_those_of_the_run(
    small: Made, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = predict(open_trained(small.run), small.manifest)
    theirs = predict(open_onnx(exported), small.manifest)
    assert theirs.calibrated_on == ours.calibrated_on == 20
    assert theirs.statement == ours.statement
    for a, b in zip(ours.records, theirs.records, strict=True):
        assert {**a, "probabilities": None} == {**b, "probabilities": None}
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
    assert main(["predict", str(exported), str(small.manifest)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 61
    assert main(["predict", str(small.manifest), str(small.manifest)]) == 5
    assert "no model that fedfuse exported" in capsys.readouterr().err


def test_torch_export_is_reloaded_with_its_facts(small: Made, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    trained = open_trained(small.run)
    done = export(trained, path, "torch-export", data=small.manifest)
    assert max(one.largest for one in done.differences.values()) <= LIMIT
    extra = {"fedfuse.json": ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["fedfuse.json"])["fedfuse.weights_sha256"] == trained.digest
    batch = made_records(trained.reading, seed=7)
    told = loaded(*batch.inputs.values(), *batch.present.values())[1]
    assert np.abs(told.detach().numpy() - trained.tell(batch)[1]).max() <= 1e-4
    with pytest.raises(UsageError, match="no int8"):
        export(trained, path, "torch-export", int8=True)


@pytest.mark.slow
def test_int8_is_smaller_and_its_agreement_is_stated(
    small: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.onnx"
    words = ("export", small.run, "--int8", "--out", out, "--data", small.manifest)
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert "kB in floating point" in shown
    assert "onnxruntime int8: p50" in shown
    assert "training     (3.00, 1e-05)-differential privacy" in shown
    model = onnx.load(out)
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)
    assert any(one.key == "fedfuse.reading" for one in model.metadata_props)
    found = predict(open_onnx(out), small.manifest)
    ours = predict(open_trained(small.run), small.manifest)
    same = [
        a["prediction"] == b["prediction"] for a, b in zip(found.records, ours.records, strict=True)
    ]
    assert np.mean(same) > 0.9


def test_a_copy_that_differs_is_not_written(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exporting.onnx_of

    def spoiled(*words: Any) -> bytes:
        model = onnx.load_from_string(made(*words))
        for one in model.graph.initializer:
            if one.name.endswith("head.2.bias"):
                value = onnx.numpy_helper.to_array(one) + np.float32(3e-4)
                one.CopyFrom(onnx.numpy_helper.from_array(value, one.name))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(exporting, "onnx_of", spoiled)
    with pytest.raises(ModelError, match=r"differ by 0\.0003"):
        export(open_trained(small.run), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_gives_nan_or_looks_at_what_is_absent_is_told(small: Made) -> None:
    trained = open_trained(small.run)
    batch, target = made_records(trained.reading), trained.reading.target

    def blind(given: Any) -> Any:
        seen = {name: torch.ones_like(value) for name, value in given.present.items()}
        return trained.tell(type(given)(given.inputs, seen, given.target))

    def broken(given: Any) -> Any:
        outputs, told = trained.tell(given)
        return outputs * np.nan, told

    assert compare(trained.tell, trained.tell, batch, target, alone=False).largest < 1e-5
    assert compare(trained.tell, blind, batch, target, alone=False).largest > 1e-2
    assert not compare(trained.tell, broken, batch, target, alone=False).largest <= LIMIT


def test_without_the_extra_there_is_one_clear_error(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxfile, "find_spec", lambda name: None if name == "onnx" else object())
    assert main(["export", str(small.run)]) == 5
    shown = capsys.readouterr().err
    assert shown == (
        'error: the package onnx is not installed\nhint: pip install "fedfuse[export]"\n'
    )


def test_every_pattern_of_absent_modalities_is_made() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {tuple(row) for row in patterns(4, generator).tolist()}
    assert found == set(product((True, False), repeat=4))
    many = patterns(20, generator)
    assert len(many) == 256
    assert many[0].all()
    assert not many[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_operator_with_encoders_and_targets_in_turn(fusion: str, tmp_path: Path) -> None:
    place = list(FUSIONS).index(fusion)
    target = list(TARGETS)[place % 4]
    manifest = write_data(tmp_path / "data", target, 24)
    settings: dict[str, object] = {"data.text_tokens": 4}
    if fusion == "graph":
        triples = tmp_path / "triples.tsv"
        triples.write_text("a\tnear\tb\nb\tnear\tc\nc\tfar\ta\n")
        settings["model.knowledge"] = str(triples)
        settings["model.knowledge_sha256"] = hashlib.sha256(triples.read_bytes()).hexdigest()
    write_run(
        tmp_path / "run", manifest, steps=2, model__fusion=fusion, model__fusion_heads=2,
        model__encoder__text=ENCODERS["text"][place // 3 % 3],
        model__absent="learned" if place % 2 and fusion != "early" else "zero",
        model__learned_words=bool(place % 2),
        data__modalities=("image,note", "note,motion", "audio,age")[place % 3], **settings,
    )  # fmt: skip
    done = export(open_trained(tmp_path / "run"), tmp_path / "m.onnx", data=manifest)
    print(fusion, done.differences)
    assert max(one.largest for one in done.differences.values()) <= LIMIT


@pytest.mark.slow
def test_all_kinds_at_once(made: Make, tmp_path: Path) -> None:
    trained, manifest = open_trained(made("number").run), made("number").manifest
    done = export(trained, tmp_path / "m.onnx", data=manifest)
    assert done.differences["made"].records == 64
    assert max(one.largest for one in done.differences.values()) <= LIMIT
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [one.name for one in session.get_outputs()] == ["logits", "value"]


@pytest.mark.slow
def test_the_example_for_a_device_runs_as_it_stands(made: Make, tmp_path: Path) -> None:
    export(open_trained(made("classes").run), tmp_path / "model.onnx")
    text = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    check = "\nassert abs(probabilities.sum() - 1) < 1e-5\n"
    subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(3))
def test_every_encoder_of_every_kind(place: int) -> None:
    """The first encoders of all kinds in one model, then the second ones, then the third."""
    kinds: dict[str, Any] = {
        "image": ImageSpec(size=12, channels=3),
        "audio": AudioSpec(rate=8000, seconds=0.1, bands=8, frames=6),
        "video": VideoSpec(frames=3, size=12, channels=1),
        "series": SeriesSpec(steps=6, features=2),
        "text": TextSpec(tokens=4, vocabulary=32),
    }
    assert set(kinds) == set(ENCODERS)
    reading = Reading(
        channels=tuple(
            Channel(
                source=Source(
                    name=name,
                    kind=Kind(name),
                    columns=(name,),
                    declared=DeclaredModality(name=name),
                ),
                spec=spec,
                scale=None,
            )
            for name, spec in kinds.items()
        ),
        target=Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c")),
    )
    chosen = {name: names[min(place, len(names) - 1)] for name, names in ENCODERS.items()}
    config = ModelConfig(dim=8, encoder=EncoderConfig(**chosen))
    model = build_model(reading.schema, config, vocabulary=32).eval()
    batch, plain = made_records(reading), Plain(model, reading.schema)
    data = onnx_of(trace(plain, batch), plain, input_names(reading), {})
    session = session_of(data)
    with torch.inference_mode():
        expected = plain(*tensors(batch))
    for got, true in zip(session.run(None, feed(batch)), expected, strict=True):
        assert np.abs(got - true.numpy()).max() <= LIMIT
