"""`fedfuse models`: every operator and encoder with its cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfuse.models.spec import ENCODERS, FUSIONS
from tests.cli.stand_ins import Result

Run = Callable[..., Result]


@pytest.mark.slow
def test_all_operators_and_encoders_are_listed(run: Run, tmp_path: Path) -> None:
    triples = tmp_path / "triples.tsv"
    triples.write_text("pump\thas\tvalve\n")
    result = run("models", "--knowledge", str(triples), "--json")
    tree = json.loads(result.out)
    assert result.code == 0
    fusions = {each["name"]: each for each in tree["fusions"]}
    assert tuple(fusions) == tuple(FUSIONS)
    assert all(each["parameters"] > 0 and each["flops"] > 0 for each in fusions.values())
    assert all(each["paper"] for each in fusions.values())
    assert fusions["early"]["what"] == "early"
    assert fusions["cross-attention"]["flops"] > fusions["concat"]["flops"]
    encoders = {(each["what"], each["name"]): each for each in tree["encoders"]}
    assert {(kind, name) for kind, names in ENCODERS.items() for name in names} < set(encoders)
    assert all(each["parameters"] > 0 and each["flops"] > 0 for each in encoders.values())
    assert encoders["video", "transformer"]["flops"] > encoders["video", "pool"]["flops"]
    assert encoders["text", "gru"]["paper"] == "arXiv:1406.1078"


def test_shapes_come_from_a_manifest_and_widths_from_settings(run: Run, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    rows = [f"{i},{'test' if i % 2 else 'train'},a,{i // 2},1 2 3 {i}" for i in range(4)]
    manifest.write_text("id,split,client,label,v\n" + "\n".join(rows) + "\n")
    found = [
        json.loads(
            run("models", "--data", str(manifest), "--set", f"model.dim={dim}", "--json").out
        )
        for dim in (8, 16)
    ]
    assert found[0]["modalities"] == {"v": {"kind": "vector", "shape": [4]}}
    assert found[0]["fusions"][0]["parameters"] < found[1]["fusions"][0]["parameters"]


def test_the_table_says_what_is_missing(run: Run) -> None:
    result = run("models")
    assert result.code == 0
    assert "--knowledge names no file" in result.out
    assert "arXiv:1702.01992" in result.out


def test_a_setting_that_is_none_is_refused(run: Run) -> None:
    assert run("models", "--set", "model.dim").code == 2
    assert run("models", "--set", "model.dimm=3").code == 3
