"""Explanations tell what counted: on models of which that is known, and on a trained one."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.cli import main
from fedfuse.errors import ModelError, UsageError
from fedfuse.use import attribution
from fedfuse.use.explain import explain
from fedfuse.use.shapley import exact
from fedfuse.use.trained import open_trained
from tests.reports.browser import CHROMIUM, browser
from tests.use.conftest import Made
from tests.use.runs import TARGETS, write_data, write_run

Make = Callable[[str], Made]


@pytest.mark.parametrize("target", TARGETS)
def test_values_sum_up_and_absent_modalities_have_no_part(target: str, made: Make) -> None:
    one = made(target)
    trained = open_trained(one.run)
    found = explain(trained, one.manifest, records=4)
    assert found.exact
    for explanation in found.explanations:
        row = found.records.rows[explanation.number - 1]
        assert explanation.id == row.cells["id"]
        batch = found.records.dataset.batch(np.array([explanation.number - 1]))
        there = {name for name, value in batch.present.items() if bool(value)}
        assert set(explanation.shapley) == set(explanation.within) == there
        total = explanation.value - explanation.base
        assert sum(explanation.shapley.values()) == pytest.approx(total, rel=1e-5, abs=1e-6)
        for name, change in explanation.absent.items():
            present = {**batch.present, name: torch.tensor([False])}
            told = trained.tell(replace(batch, present=present))[1][0]
            if target == "number":
                assert explanation.value + change == pytest.approx(told[0], abs=1e-4)
        for name, within in explanation.within.items():
            shape = dict(zip(trained.model.names, batch.inputs.values(), strict=True))[name].shape[
                1:
            ]
            assert within.values.shape == tuple(shape)
            assert within.baselines == 4
            scale = np.abs(within.values).sum() + abs(within.moved)
            assert abs(within.gap) < 0.05 * scale + 1e-3


def test_a_linear_model_has_the_gradients_that_its_weights_say(made: Make) -> None:
    """Of an output that is linear in a modality, a part's share is its weight times its distance
    from the baselines, whatever the way."""
    one = made("number")
    trained = open_trained(one.run)
    pool = one.prepared.train.batch(np.arange(30))
    both = torch.nonzero(pool.present["vector"]).flatten()
    record, others = pool[both[:1]], pool[both[1:5]]
    weight = torch.tensor([2.0, -1.0, 0.5])
    found = attribution.attribute(
        trained.model, lambda batch: batch.inputs["vector"] @ weight, record, "vector",
        trained.reading.schema.modalities[4].kind, others,
    )  # fmt: skip
    away = record.inputs["vector"][0] - others.inputs["vector"].mean(0)
    np.testing.assert_allclose(found.values, (weight * away).numpy(), atol=1e-5)
    assert abs(found.gap) < 1e-5


def test_words_are_judged_by_their_own_vectors(made: Make) -> None:
    one = made("classes")
    trained = open_trained(one.run)
    pool = one.prepared.train.batch(np.arange(30))
    both = torch.nonzero(pool.present["note"]).flatten()
    record, others = pool[both[:1]], pool[both[1:1]]
    encoder = trained.model.encoders[2]

    def third(batch: object) -> torch.Tensor:
        vectors, _ = encoder.words(batch.inputs["note"])
        return vectors[:, 2].sum(1)

    found = attribution.attribute(
        trained.model, third, record, "note", trained.reading.schema.modalities[2].kind, others
    )
    assert found.baselines == 0
    assert found.values.shape == (8,)
    assert np.abs(np.delete(found.values, 2)).max() == 0
    assert found.values[2] == pytest.approx(found.moved, abs=1e-5)
    assert found.moved != 0


def test_more_than_six_modalities_are_sampled_with_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"v{k}" for k in range(8)]
    lines = [",".join(["id", "split", "client", "label", *names])]
    for k in range(30):
        cells = [f"{x:.3f} {y:.3f}" for x, y in rng.normal(size=(8, 2))]
        lines.append(
            ",".join([str(k), ("train", "valid", "test")[k % 3], "a", "nm"[k % 2], *cells])
        )
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    write_run(tmp_path / "run", tmp_path / "m.csv", steps=5)
    trained = open_trained(tmp_path / "run")
    found = explain(trained, tmp_path / "m.csv", records=1)
    assert not found.exact
    (one,) = found.explanations
    assert sum(one.shapley.values()) == pytest.approx(one.value - one.base, abs=1e-6)
    batch = found.records.dataset.batch(np.zeros(256, dtype=np.int64))
    rows = (np.arange(256)[:, None] >> np.arange(8)) % 2 == 1
    present = {name: torch.from_numpy(rows[:, k].copy()) for k, name in enumerate(names)}
    place = trained.reading.target.classes.index(one.prediction)
    true = exact(trained.tell(replace(batch, present=present))[1][:, place].astype(np.float64))
    for k, name in enumerate(names):
        assert abs(one.shapley[name] - true[k]) <= 4.5 * one.errors[name] + 1e-7


def test_concepts_of_a_graph_are_named_with_their_shares(tmp_path: Path) -> None:
    import hashlib

    manifest = write_data(tmp_path / "data", "classes", 18)
    triples = tmp_path / "t.tsv"
    triples.write_text("flu\tcauses\tfever\nflu\thas\tcough\n")
    write_run(
        tmp_path / "run", manifest, steps=2, model__fusion="graph", model__knowledge=str(triples),
        model__knowledge_sha256=hashlib.sha256(triples.read_bytes()).hexdigest(),
        data__modalities="vector,age",
    )  # fmt: skip
    found = explain(open_trained(tmp_path / "run"), manifest, records=6)
    for one in found.explanations:
        assert set(one.concepts) == set(one.shapley)
        for shares in one.concepts.values():
            assert set(shares) == {"flu", "fever", "cough"}
            assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


def test_a_class_may_be_asked_for(made: Make) -> None:
    one = made("classes")
    trained = open_trained(one.run)
    (found,) = explain(trained, one.manifest, records=1, of="high").explanations
    assert found.explained == 'probability of "high"'
    with pytest.raises(UsageError, match="no class that can be explained"):
        explain(trained, one.manifest, of="nothing")
    with pytest.raises(UsageError, match="no class"):
        explain(open_trained(made("ordered").run), made("ordered").manifest, of="high")


def test_without_captum_there_is_one_clear_error(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="captum is not installed") as caught:
        explain(open_trained(made("classes").run), made("classes").manifest)
    assert "fedfuse[explain]" in caught.value.hint


def test_the_page_and_its_files_are_private_and_hold_no_link(
    made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = made("classes"), tmp_path / "out"
    words = ("explain", one.run, one.manifest, "--records", 3, "--out", out, "--json")
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((out / "summary.json").read_text())
    assert "PRIVATE" in shown.err
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    records = [f"record-000{k}.{kind}" for k in (1, 2, 3) for kind in ("json", "png")]
    assert set(names) == {"index.html", "summary.json", "summary.png", *records}
    assert set(names.values()) == {0o600}
    page = (out / "index.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert page.count('src="data:image/png;base64,') == 4
    assert "PRIVATE: this page shows the content of records" in page
    assert "NOT PRIVATE" in page
    first = json.loads((out / "record-0001.json").read_text())
    assert sum(first["shapley"].values()) == pytest.approx(first["value"] - first["base"], abs=1e-5)


def test_a_records_id_cannot_write_into_the_page(made: Make, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('id,note\n<script>alert(1)</script>,"<img src=x> $x$ calm"\nb,\n')
    words = ("explain", made("classes").run, path, "--out", tmp_path / "out")
    assert main([str(word) for word in words]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "there is nothing to explain" in page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_the_page_fits_screens_and_asks_for_nothing(made: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("explain", made("labels").run, made("labels").manifest, "--records", 3, "--out", out)
    assert main([str(word) for word in words]) == 0
    with browser(tmp_path / "profile") as page:
        for width in (1280, 390, 320):
            page.open(out / "index.html", width=width, dark=width < 600)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.requests[0] == (out / "index.html").resolve().as_uri()
            assert all(one.startswith("data:image/png") for one in page.requests[1:])
            assert page.complaints == []
            drawn = "[...document.images].every(one => one.complete && one.naturalWidth > 300)"
            assert page.evaluate(drawn)
