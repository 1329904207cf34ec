"""`fedfuse check`: says that a model is safe, or what is wrong with it, and what a step takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedfuse.privacy import safety
from fedfuse.privacy.safety import Finding
from tests.cli.stand_ins import Result
from tests.tiny import VOCABULARY, weights

Run = Callable[..., Result]


def test_a_scenario_that_is_safe_says_so_and_what_it_takes(run: Run) -> None:
    result = run("check")
    assert result.code == 0
    assert "safe " in result.out
    assert "MB of tensors at the peak" in result.out
    small = json.loads(run("check", "--set", "train.physical_batch=16", "--json").out)
    large = json.loads(run("check", "--set", "train.physical_batch=64", "--json").out)
    assert small["safe"]
    assert small["findings"] == []
    assert small["peak_bytes"] < large["peak_bytes"] < 4 * small["peak_bytes"]


def test_pretrained_encoders_tell_what_real_nodes_must_have(run: Run, tmp_path: Path) -> None:
    name = weights(tmp_path, "bert")
    settings = ("--set", f"model.encoder.text={name}", "--set", "model.encoder.tuning=full")
    tree = json.loads(run("check", *settings, "--json").out)
    assert tree["safe"]
    assert len(tree["pinned"].pop("model.encoder.text_sha256")) == 64
    assert tree["pinned"] == {"data.tokenizer": name[3:], "data.vocabulary": VOCABULARY + 1}


def test_what_is_wrong_is_listed_and_ends_with_the_code_of_models(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Finding(where="encoders.0", what="it mixes records", hint="do not")

    def found(*given: Any, **named: Any) -> tuple[Finding, ...]:
        return (wrong,)

    monkeypatch.setattr(safety, "check", found)
    result = run("check")
    assert result.code == 5
    assert "REFUSED  encoders.0: it mixes records" in result.out
    assert "-> do not" in result.out
    assert "safe " not in result.out
