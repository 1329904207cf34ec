"""`fedfuse simulate`: what it asks of the federation, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError
from tests.cli.stand_ins import Fake, Result, make_demo

Run = Callable[..., Result]
SCENARIOS = Path(__file__).parents[2] / "simulations"


def test_without_data_the_demo_is_meant(run: Run, federation: Fake) -> None:
    assert run("simulate", "--out", "r").code == 0
    ((config, out, resume),) = federation.asked
    assert (config.data.manifest, config.name) == ("", "demo")
    assert (out, resume) == (Path("r"), False)


def test_demo_dir_keeps_the_demo(run: Run, federation: Fake) -> None:
    for _ in range(2):
        assert run("simulate", "--demo-dir", "d").code == 0
    manifest = Path("d/manifest.csv").absolute()
    assert manifest.is_file()
    assert [config.data.manifest for config, _, _ in federation.asked] == [str(manifest)] * 2


def test_a_bare_manifest_is_enough(run: Run, federation: Fake) -> None:
    make_demo(Path("clinic"))
    assert run("simulate", "--data", "clinic/manifest.csv").code == 0
    config, out, _ = federation.asked[0]
    assert config.data.manifest == str(Path("clinic/manifest.csv").absolute())
    assert config.name == "clinic"
    assert out.parent == Path("runs")
    assert out.name.startswith("clinic-2")


def test_flags_beat_settings_and_settings_beat_the_scenario(run: Run, federation: Fake) -> None:
    Path("s.toml").write_text(
        "[train]\nrounds = 7\nlocal_steps = 2\nbatch_size = 9\n[privacy]\nepsilon = 3.0\n",
        encoding="utf-8",
    )
    words = ("--set", "train.rounds=8", "--set", "train.local_steps=3", "--rounds", 5)
    assert run("simulate", "s.toml", *words, "--modalities", "image, text").code == 0
    config = federation.asked[0][0]
    assert (config.train.rounds, config.train.local_steps, config.train.batch_size) == (5, 3, 9)
    assert config.privacy.epsilon == 3.0
    assert config.data.modalities == ("image", "text")
    assert config.name == "s"


def test_each_flag_reaches_its_setting(run: Run, federation: Fake) -> None:
    words = "--nodes 4 --rounds 2 --epsilon 1.5 --unit record --engine ray --seed 9 --skip-bad"
    assert run("simulate", *words.split()).code == 0
    config = federation.asked[0][0]
    assert config.data.nodes == 4
    assert config.train.rounds == 2
    assert (config.privacy.epsilon, config.privacy.unit) == (1.5, "record")
    assert config.federation.engine == "ray"
    assert (config.seed, config.data.skip_bad) == (9, True)


def test_a_scenarios_manifest_is_relative_to_the_scenario(run: Run, federation: Fake) -> None:
    make_demo(Path("there/data"))
    Path("there/s.toml").write_text('[data]\nmanifest = "data/manifest.csv"\n', encoding="utf-8")
    assert run("simulate", "there/s.toml").code == 0
    manifest = Path(federation.asked[0][0].data.manifest)
    assert manifest.is_absolute()
    assert manifest.is_file()


def test_an_error_in_a_scenario_names_the_file(run: Run, federation: Fake) -> None:
    Path("s.toml").write_text("[train]\nrounds = 0\n", encoding="utf-8")
    result = run("simulate", "s.toml")
    assert result.code == 3
    assert result.err.startswith("error: s.toml: train.rounds = 0")


def test_progress_is_a_plain_line_each_round_and_leaves_stdout_alone(
    run: Run, federation: Fake
) -> None:
    result = run("simulate", "--json")
    lines = result.err.splitlines()
    assert "\x1b" not in result.err
    assert [line.split("  ")[0] for line in lines if line.startswith("round ")] == [
        "round 1/3",
        "round 2: node beta failed: OSError",
        "round 2/3",
        "round 3/3",
    ]
    assert (
        "loss 0.5  accuracy 0.4  epsilon 4.00 of 8  1 node, 1 failed  1.0 kB in, 1.0 kB out  0.5 s"
        in result.err
    )
    assert json.loads(result.out)["headline"]["value"] == 0.6


def test_the_end_says_how_good_how_private_and_where(run: Run, federation: Fake) -> None:
    result = run("simulate", "--out", "r")
    assert "accuracy     0.6  (the best constant answer: 0.25)" in result.out
    assert "epsilon = 6 at delta = 1e-05" in result.out
    assert "NOT PRIVATE" not in result.out + result.err
    for name in ("summary.json", "metrics.jsonl", "plots/privacy.png"):
        assert name in result.out
        assert Path("r", name).is_file()


def test_without_a_promise_it_says_so_loudly(run: Run, federation: Fake) -> None:
    result = run("simulate", "--unit", "none")
    assert "NOT PRIVATE: nothing in this run is protected" in result.err
    assert "*** NOT PRIVATE ***" in result.out
    assert result.err.count("NOT PRIVATE") == 1 + federation.rounds


def test_quiet_prints_the_run_folder_only(run: Run, federation: Fake) -> None:
    assert run("simulate", "--quiet", "--out", "r") == Result(0, "r\n", "")


def test_interruption_says_what_is_saved_and_how_to_go_on(run: Run, federation: Fake) -> None:
    federation.stop_with = KeyboardInterrupt()
    result = run("simulate", "--out", "r", "--rounds", "3")
    assert result.code == 130
    assert "interrupted; 2 of 3 rounds are saved in r\n" in result.err
    assert result.err.endswith("hint: go on with: fedfuse simulate --resume r\n")
    assert Path("r/plots/metrics.png").is_file()


def test_interruption_after_the_last_round_says_that_the_run_is_finished(
    run: Run, federation: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Fake.__call__

    def stop(*given: Any, **named: Any) -> None:
        whole(*given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Fake, "__call__", stop)
    result = run("simulate", "--out", "r", "--quiet")
    assert result == Result(130, "", "interrupted when all was done: the run in r is finished\n")


def test_interruption_before_the_first_round_says_that_nothing_is_saved(
    run: Run, federation: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fake, "__call__", stop)
    result = run("simulate", "--out", "r")
    assert result == Result(130, "", "interrupted before the first round; nothing was saved\n")


def test_resume_goes_on_with_the_same_configuration(run: Run, federation: Fake) -> None:
    federation.stop_with = KeyboardInterrupt()
    run("simulate", "--out", "r", "--seed", "5")
    federation.stop_with = None
    assert run("simulate", "--resume", "r").code == 0
    (before, _, _), (after, out, resume) = federation.asked
    assert (after, out, resume) == (before, Path("r"), True)


def test_a_failed_run_keeps_its_error_and_its_curves(run: Run, federation: Fake) -> None:
    federation.stop_with = FederationError("no good update", hint="see events.jsonl")
    result = run("simulate", "--out", "r", "--quiet")
    assert result == Result(7, "", "error: no good update\nhint: see events.jsonl\n")
    assert Path("r/plots/metrics.png").is_file()


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_scenarios_are_valid_and_described(path: Path) -> None:
    config = RunConfig.from_toml(path)
    assert config.name == path.stem
    assert f"fedfuse simulate simulations/{path.name}" in path.read_text(encoding="utf-8")
    assert f"`{path.name}`" in (SCENARIOS / "README.md").read_text(encoding="utf-8")
