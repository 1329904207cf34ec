"""Whole runs with pretrained encoders: what is computed once, what is declared, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.demo import make_demo
from fedfuse.data.prepare import open_node, open_split, prepare
from fedfuse.errors import ConfigError, ModelError
from fedfuse.federation import node
from fedfuse.federation.features import with_features
from fedfuse.federation.node import new_trainer
from fedfuse.federation.observer import Silent
from fedfuse.federation.pinning import check_pinned, pin
from fedfuse.federation.released import open_model
from fedfuse.federation.settle import settle
from fedfuse.federation.simulate import simulate
from fedfuse.federation.wire import config_digest
from fedfuse.models.backbone import Backbone, PretrainedEncoder
from fedfuse.models.model import FusionModel
from fedfuse.reports.assumptions import Verdict
from fedfuse.reports.budget import of_run
from fedfuse.runfolder import RunFolder
from tests.federation.clinic import Clinic
from tests.tiny import weights

NAMES = {"text": "bert", "image": "vit", "audio": "wav2vec2"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The demo data, with all three encoders pretrained, in a run of a few steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    values: dict[str, Any] = {
        "data.manifest": str(make_demo(folder / "demo", records=160, seed=0)),
        "data.partition": "iid",
        "data.nodes": 2,
        "data.text_tokens": 12,
        "data.audio_seconds": 0.2,
        "model.dim": 8,
        "model.head_width": 8,
        "model.encoder.lora_rank": 2,
        "train.rounds": 1,
        "train.local_steps": 2,
        "train.device": "cpu",
        "privacy.declared_records": 100,
        "privacy.sample_rate": 0.05,
        "privacy.noise_multiplier": 1.2,
        "privacy.noise_seed": "test",
        "federation.workers": 1,
    }
    values |= {f"model.encoder.{kind}": weights(folder, name) for kind, name in NAMES.items()}
    return RunConfig().with_values(values)


@pytest.mark.parametrize(
    "tuning", [pytest.param(t, marks=pytest.mark.slow) for t in ("frozen", "lora")]
)
def test_private_run_over_loopback(config: RunConfig, tuning: str, tmp_path: Path) -> None:
    config = config.with_values({"model.encoder.tuning": tuning})
    summary = simulate(config, tmp_path / "run", observer=Silent())
    assert summary["status"] == "finished"
    folder = RunFolder.open(tmp_path / "run")
    assert not any(row["failures"] for row in folder.metrics())
    sent, _ = folder.model()
    assert sum(value.size for value in sent.values()) == summary["parameters"]
    assert all("lora_" in name for name in sent if ".network." in name)
    said = [text for text in summary["assumptions"] if "public weights" in text]
    encoder = folder.config().model.encoder
    for text, kind in zip(said, ("text", "image", "audio"), strict=True):
        digest = getattr(encoder, f"{kind}_sha256")
        assert len(digest) == 64
        assert digest in text
        assert f"({kind}, {tuning}" in text
    shown = [one for one in of_run(folder.path).assumptions if "public weights" in one.text]
    assert [one.verdict for one in shown] == [Verdict.TRUSTED] * 3
    assert all(encoder.image_sha256 in one.evidence for one in shown if "image" in one.text)
    model, _ = open_model(folder)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == summary["parameters"]


@pytest.fixture(scope="module")
def store(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare(pin(config).data, seed=0).write(folder)
    return folder


def test_features_are_computed_once_and_stay_in_the_store(
    config: RunConfig, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    forward = Backbone.forward

    def counting(self: Backbone, x: torch.Tensor) -> Any:
        ran.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Backbone, "forward", counting)
    dataset = open_node(store, 0)[1]
    trainer = new_trainer(pin(config), dataset.schema)
    different = sum(dataset.different(name) for name in dataset.schema.names)
    rows = np.arange(8)
    with torch.no_grad():
        raw = trainer.model(dataset.batch(rows))
    ran.clear()
    featured = with_features(dataset, trainer.model, trainer.device)
    assert sum(ran) == different
    with torch.no_grad():
        assert torch.allclose(trainer.model(featured.batch(rows)), raw, atol=1e-5)
    again = with_features(open_node(store, 1)[1], trainer.model, trainer.device)
    trainer.model(again.batch(rows))
    assert sum(ran) == different  # those of all nodes in the store are there now
    kept = sorted((store / "train").glob("features-*"))
    assert len(kept) == 3
    assert {path.stat().st_mode & 0o077 for path in kept} == {0}
    batch = featured.batch(np.arange(len(featured)))
    assert not all(here.all() for here in batch.present.values())
    for name, here in batch.present.items():
        assert not batch.inputs[name][~here].any()


def test_features_of_other_weights_are_not_taken(config: RunConfig, store: Path) -> None:
    dataset = open_split(store, "test")
    model = new_trainer(pin(config), dataset.schema).model
    with_features(dataset, model, torch.device("cpu"))
    before = set((store / "test").glob("features-*"))
    for encoder in model.encoders:
        assert isinstance(encoder, PretrainedEncoder)
        object.__setattr__(encoder.weights, "sha256", "0" * 64)
    with_features(dataset, model, torch.device("cpu"))
    assert len(set((store / "test").glob("features-*")) - before) == 3


def test_store_that_cannot_be_written_to_keeps_features_in_memory(
    config: RunConfig, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_split(store, "valid")
    model = new_trainer(pin(config), dataset.schema).model
    monkeypatch.setattr("fedfuse.federation.features.os.open", _refuse)
    first = with_features(dataset, model, torch.device("cpu"))
    monkeypatch.setattr(Backbone, "forward", None)
    second = with_features(dataset, model, torch.device("cpu"))
    for name, value in first.batch(np.arange(4)).inputs.items():
        assert torch.equal(value, second.batch(np.arange(4)).inputs[name])
    assert not list((store / "valid").glob("features-*"))


def _refuse(*given: object) -> int:
    raise PermissionError


def test_real_node_reads_no_record_before_its_books_say_so(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = pin(config).with_values({"privacy.noise_seed": ""})
    clinic = Clinic.open(tmp_path, pinned)
    monkeypatch.setattr("fedfuse.federation.features.Dataset.contents", _seen(clinic))
    assert clinic.answer(clinic.request()).config_records["config"]["status"] == "ok"
    assert list((tmp_path / "store" / "train").glob("features-*"))
    assert not list((tmp_path / "store" / "test").glob("features-*"))


def _seen(clinic: Clinic) -> Any:
    contents = Dataset.contents

    def reading(self: Dataset, name: str, places: slice) -> torch.Tensor:
        assert "reserve" in (clinic.folder / "ledger").read_text()
        return contents(self, name, places)

    return reading


def test_real_node_refuses_weights_that_are_not_pinned_or_others(
    config: RunConfig, tmp_path: Path
) -> None:
    clinic = Clinic.open(tmp_path / "node", pin(config).with_values({"privacy.noise_seed": ""}))
    request = clinic.request()
    for digest, said in (("", "text_sha256 is empty"), ("0" * 64, "DataError")):
        other = clinic.config.with_values({"model.encoder.text_sha256": digest})
        asked = Clinic(clinic.folder, other, clinic.server)
        told = asked.said(clinic.request(digest=config_digest(other), arrays=request.arrays), other)
        assert told.startswith("refused")
        assert said in told
    assert "reserve" not in (clinic.folder / "ledger").read_text()


def test_settling_for_real_nodes_declares_the_weights(config: RunConfig) -> None:
    settled = settle(pin(config), mean_records=None)
    assert sum("public weights" in text for text in settled.assumptions) == 3
    assert not any(
        "public weights" in text for text in settle(RunConfig(), mean_records=9.0).assumptions
    )
    with pytest.raises(ConfigError, match="is empty"):
        check_pinned(config)


def test_model_that_mixes_records_is_refused_before_anything_is_reserved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic = Clinic.open(tmp_path, pin(config).with_values({"privacy.noise_seed": ""}))
    request = clinic.request()
    forward = FusionModel.forward

    def mixing(self: FusionModel, batch: Any) -> torch.Tensor:
        outputs = forward(self, batch)
        return outputs - outputs.mean(0)

    monkeypatch.setattr(FusionModel, "forward", mixing)
    node._trainers.clear()
    assert "lets one record's output depend" in clinic.said(request)
    assert "reserve" not in (tmp_path / "ledger").read_text()
    node._trainers.clear()
    with pytest.raises(ModelError, match="lets one record's output depend"):
        simulate(config, tmp_path / "run", observer=Silent())
