"""`fedfuse plan`: what it finds, prints, draws and refuses; a run settles on what was planned."""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from fedfuse.cli.scenario import Flags, configuration
from fedfuse.config import RunConfig
from fedfuse.federation.settle import settle
from tests.cli.stand_ins import Fake, Result

Run = Callable[..., Result]
SCENARIOS = Path(__file__).parents[2] / "simulations"
QUICK = "--delta 1e-6 --sample-rate 0.02 --local-steps 2"
"""Settings whose account is quick."""
COST = f"--sigma 1.2 --rounds 30 --records 2000 {QUICK}"
"""What does it cost? With one answer for all tests that do not mind what is found."""


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def plan(run: Run) -> Callable[[str], Result]:
    return lambda line: run("plan", *shlex.split(line))


Plan = Callable[[str], Result]


def as_tree(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    assert result.err == ""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(result.out, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    accountant = PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("line", "solved"),
    [
        (f"--epsilon 1 --rounds 50 --records 2000 {QUICK}", "sigma"),
        (f"--epsilon 1 --sigma 1.2 --records 2000 {QUICK}", "rounds"),
        (f"--sigma 1.2 --rounds 50 --records 2000 {QUICK}", "epsilon"),
        ("--solve rate --epsilon 1 --sigma 1.2 --rounds 50 --local-steps 2", "sample_rate"),
        (
            f"--solve delta --epsilon 1 --sigma 1.2 --rounds 50 {QUICK}".replace(
                "--delta 1e-6 ", ""
            ),
            "delta",
        ),
    ],
)
@pytest.mark.slow
def test_the_quantity_that_is_left_out_is_found(plan: Plan, line: str, solved: str) -> None:
    found = as_tree(plan(f"{line} --json"))
    assert found["solved"] == solved
    assert found["sources"][solved] == "solved"
    exact = epsilon(found["sample_rate"], found["sigma"], found["steps"], found["delta"])
    assert found["spent"] == pytest.approx(exact, rel=1e-6)
    assert found["spent"] <= found["epsilon"]
    assert found["kept"] is True
    text = plan(line)
    assert text.code == 0
    name, value = text.out.splitlines()[0].split(" = ")
    assert name.replace("sample rate q", "sample_rate") == solved
    assert float(value) == found[solved]


def test_json_is_the_whole_plan_and_round_trips(plan: Plan) -> None:
    line = f"{COST} --nodes 6 --json"
    found = as_tree(plan(line))
    assert json.loads(json.dumps(found)) == found
    assert found["by_round"][-1] == {"round": 30, "epsilon": found["spent"]}
    assert [point["round"] for point in found["by_round"]] == list(range(1, 31))
    more = found["one_more_round"]
    assert more["rounds"] == 31
    exact = epsilon(0.02, found["sigma"], 62, 1e-6)
    assert more["epsilon"] == pytest.approx(exact, rel=1e-6)
    assert more["more"] == pytest.approx(exact - found["spent"], rel=1e-4)
    assert found["expected_batch"] == 40
    assert found["warnings"] == []
    again = RunConfig().with_values(found["settings"])
    assert again.privacy.noise_multiplier == found["sigma"]
    assert again.privacy.declared_records == 2000
    assert found == as_tree(plan(line))


def test_what_is_not_finite_is_null_in_json(plan: Plan) -> None:
    found = as_tree(plan(f"{COST.replace('--records 2000', '')} --json"))
    assert found["noise_of_run"] is found["noise_of_step"] is None
    assert found["units"] is found["expected_batch"] is None


def test_text_says_everything_that_the_json_does(plan: Plan) -> None:
    line = f"{COST} --nodes 6"
    found, text = as_tree(plan(f"{line} --json")), plan(line).out
    assert f"epsilon         {found['epsilon']}" in text
    assert "steps           60 = 30 rounds x 2, each on 40 of 2000 records expected" in text
    assert found["change"] in " ".join(text.split())
    assert "more than is allowed" in text
    assert "by RDP" in text
    rows = [line.split() for line in text.split("round  epsilon\n")[1].splitlines()[:10]]
    assert [int(row[0]) for row in rows] == list(range(3, 31, 3))
    spent = [float(row[1]) for row in rows]
    assert spent == sorted(spent)
    by_round = {point["round"]: point["epsilon"] for point in found["by_round"]}
    for row in rows:
        shown, bar = float(row[1]), len(row[2])
        exact = by_round[int(row[0])]
        assert exact <= shown <= exact + 1.01e-4
        assert bar == pytest.approx(40 * exact / found["epsilon"], abs=0.51)
    assert "warning" not in text


def test_the_command_that_is_printed_runs_the_plan(plan: Plan, run: Run, federation: Fake) -> None:
    out = plan(COST).out
    command = out.split("run it")[1].replace("\\\n", " ").split()
    assert command[:2] == ["fedfuse", "simulate"]
    assert run(*command[1:]).code == 0
    config = federation.asked[0][0]
    settled = settle(config, mean_records=77.0)
    assert settled.mechanism is not None
    assert settled.mechanism.steps * config.train.rounds == 60
    assert settled.mechanism.noise_multiplier == config.privacy.noise_multiplier > 0
    assert config.privacy.noise_multiplier == 1.2
    assert config.privacy.delta == 1e-6
    assert config.privacy.declared_records == 2000


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_text_is_as_wide_as_the_terminal(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = plan("--unit node --epsilon 8 --rounds 20 --nodes 3 --delta 0.05").out
    widest = max(map(len, out.splitlines()))
    assert widest <= min(max(columns, 60), 100)
    assert widest > 50
    assert "\N{NO-BREAK SPACE}" not in out
    assert "warning" in out


@pytest.mark.parametrize("unit", ["record", "subject", "node"])
def test_each_unit_is_planned_and_named(plan: Plan, unit: str) -> None:
    rest = "--sigma 5 --rounds 30 --nodes 1000" if unit == "node" else COST
    found = as_tree(plan(f"--unit {unit} {rest} --json"))
    assert found["unit"] == unit
    assert found["units"] == (1000 if unit == "node" else 2000)
    assert found["steps"] == (30 if unit == "node" else 60)
    key = {"record": "privacy.declared_records", "subject": "privacy.declared_subjects"}
    assert (key.get(unit) in found["settings"]) == (unit != "node")
    if unit == "node":
        assert found["sample_rate"] == 1
        mu = math.sqrt(30) / found["sigma"]
        assert found["gdp_mu"] == pytest.approx(mu)


def scenario(text: str) -> Path:
    path = Path("s.toml")
    path.write_text(text, encoding="utf-8")
    return path


SCENARIO = """
[train]
rounds = 30
local_steps = 2
[privacy]
epsilon = 2.0
delta = 1e-6
sample_rate = 0.02
declared_records = 2000
"""


@pytest.mark.parametrize(
    "text",
    [
        SCENARIO,
        SCENARIO + "noise_multiplier = 1.4\n",
        SCENARIO + 'unit = "subject"\ndeclared_subjects = 300\n',
        SCENARIO + 'unit = "node"\n',
        SCENARIO + 'unit = "node"\nnoise_by = "server"\n[data]\nnodes = 4\n',
    ],
    ids=["record", "sigma-set", "subject", "node", "node-server"],
)
def test_a_run_settles_on_the_sigma_that_is_planned(plan: Plan, text: str) -> None:
    path = scenario(text)
    found = as_tree(plan(f"--plan-for {path} --json"))
    settled = settle(configuration(Flags(scenario=path)), mean_records=500.0, mean_subjects=50.0)
    assert settled.mechanism is not None
    assert found["sigma"] == settled.mechanism.noise_multiplier
    assert found["sample_rate"] == settled.mechanism.sample_rate
    assert found["steps"] == settled.mechanism.steps * settled.config.train.rounds
    assert found["solved"] == ("epsilon" if "noise_multiplier" in text else "sigma")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in sorted(SCENARIOS.glob("*.toml")) if RunConfig.from_toml(path).private],
    ids=lambda path: path.stem,
)
def test_shipped_scenarios_are_planned_as_they_are_run(plan: Plan, path: Path) -> None:
    found = as_tree(plan(f"--plan-for {path} --json"))
    settled = settle(configuration(Flags(scenario=path)), mean_records=500.0, mean_subjects=50.0)
    assert settled.mechanism is not None
    assert found["sigma"] == settled.mechanism.noise_multiplier


def test_a_flag_beats_the_scenario_and_the_scenario_is_named(plan: Plan) -> None:
    path = scenario(SCENARIO + "noise_multiplier = 1.4\n[data]\nnodes = 7\n")
    line = f"--plan-for {path} --rounds 20 --solve delta"
    found = as_tree(plan(f"{line} --json"))
    assert (found["rounds"], found["epsilon"], found["units"]) == (20, 2.0, 2000)
    assert found["nodes"] == 7
    assert found["sources"]["rounds"] == "given"
    assert found["sources"]["epsilon"] == "scenario"
    out = plan(line).out
    assert "epsilon         2           from s.toml" in out
    assert "fedfuse simulate s.toml --set train.rounds=20" in out


def test_a_scenarios_sigma_with_fewer_rounds_asks_what_that_costs(plan: Plan) -> None:
    path = scenario(SCENARIO + "noise_multiplier = 1.4\n")
    found = as_tree(plan(f"--plan-for {path} --rounds 10 --json"))
    assert found["solved"] == "epsilon"
    assert found["spent"] == pytest.approx(epsilon(0.02, 1.4, 20, 1e-6), rel=1e-6)


def test_warnings_are_in_text_and_json(plan: Plan) -> None:
    line = "--sigma 2 --rounds 3 --records 20 --batch 0.5 --delta 0.05 --parameters 1000000"
    names = [warning["name"] for warning in as_tree(plan(f"{line} --json"))["warnings"]]
    assert names == ["delta-too-large", "batches-empty", "noise-hopeless"]
    out = plan(line).out
    assert out.count("\nwarning ") == out.count("\n  because ") == out.count("\n  so ") == 3


@pytest.mark.slow
def test_what_no_node_would_run_is_said_to_be_refused(plan: Plan) -> None:
    out = plan("--sigma 0.29 --rounds 1 --local-steps 1 --sample-rate 0.01 --records 900").out
    assert "NODES WOULD REFUSE IT" in out
    assert "every node refuses it" in out
    assert "run it" not in out


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


@pytest.mark.parametrize("suffix", ["png", "svg", "PNG"])
def test_a_picture_is_drawn_and_is_the_same_each_time(plan: Plan, suffix: str) -> None:
    line = f"{COST} --picture"
    result = plan(f"{line} a.{suffix}")
    assert result.code == 0
    assert result.err == f"epsilon by round is drawn in a.{suffix}\n"
    assert plan(f"{line} b.{suffix}").code == 0
    first = Path(f"a.{suffix}")
    if suffix.lower() == "png":
        width, height = size(first)
        assert width >= 1000
        assert height >= 600
    assert first.read_bytes() == Path(f"b.{suffix}").read_bytes()
    assert plan(COST).out.splitlines()[:15] == result.out.splitlines()[:15]


def words_of(svg: Path) -> str:
    """The text in a picture, which matplotlib leaves in a comment before its glyphs."""
    return "\n".join(
        line.strip() for line in svg.read_text(encoding="utf-8").splitlines() if "<!--" in line
    )


def test_the_picture_says_what_is_allowed_spent_and_next(plan: Plan) -> None:
    found = as_tree(plan(f"{COST} --json"))
    assert plan(f"{COST} --picture p.svg").code == 0
    words = words_of(Path("p.svg"))
    assert f"allowed: ε = {found['epsilon']:g}" in words
    assert "one more round: " in words
    assert "after 30 rounds, σ = 1.2" in words
    assert "ε at δ = 1e-06, for one record" in words


ERRORS = [
    ("", 2, "--epsilon, --rounds, --sigma are open"),
    ("--epsilon 8", 2, "--rounds, --sigma are open, but only one can be found"),
    ("--epsilon 8 --solve rate", 2, "are open"),
    ("--epsilon 8 --rounds 5 --sigma 2", 2, "epsilon, rounds and sigma are all given"),
    (
        "--epsilon 8 --rounds 5 --sigma 2 --delta 1e-5 --sample-rate 0.1",
        2,
        "nothing is left to find",
    ),
    ("--epsilon 8 --rounds 5 --solve epsilon", 2, "--solve epsilon, but --epsilon is given"),
    ("--epsilon 8 --sigma 2 --rounds 5 --sample-rate 0.1 --solve rate", 2, "but --sample-rate"),
    ("--epsilon 8 --rounds 5 --solve everything", 2, "'everything' is not one of"),
    ("--epsilon nan --rounds 5", 2, "--epsilon nan, but it must be from 0.001 to 1000"),
    ("--epsilon inf --rounds 5", 2, "--epsilon inf"),
    ("--epsilon -1 --rounds 5", 2, "--epsilon -1"),
    ("--epsilon 0 --rounds 5", 2, "--epsilon 0"),
    ("--epsilon eight --rounds 5", 2, "'eight' is not a valid float"),
    ("--epsilon 8 --rounds 5 --delta 0", 2, "--delta 0"),
    ("--epsilon 8 --rounds 5 --delta 0.5", 2, "--delta 0.5"),
    ("--epsilon 8 --rounds 5 --delta nan", 2, "--delta nan"),
    ("--epsilon 8 --rounds 0", 2, "--rounds 0"),
    ("--epsilon 8 --rounds 2.5", 2, "'2.5' is not a valid int"),
    ("--epsilon 8 --rounds -3", 2, "--rounds -3"),
    ("--epsilon 8 --rounds 5 --sample-rate 1.5", 2, "--sample-rate 1.5, but it must be from"),
    ("--epsilon 8 --rounds 5 --sample-rate nan", 2, "--sample-rate nan"),
    ("--epsilon 8 --sigma 0", 2, "--sigma 0"),
    ("--epsilon 8 --rounds 5 --records 0", 2, "--records 0"),
    ("--epsilon 8 --rounds 5 --nodes 0", 2, "--nodes 0"),
    ("--epsilon 8 --rounds 5 --parameters 0", 2, "--parameters 0"),
    ("--epsilon 8 --rounds 5 --clip -1", 2, "--clip -1"),
    ("--epsilon 8 --rounds 5 --local-steps 0", 2, "--local-steps 0"),
    ("--epsilon 8 --rounds 1000000 --local-steps 1000", 2, "at most 10000000 steps"),
    ("--epsilon 8 --rounds 5 --batch 10", 2, "--batch without --records"),
    ("--epsilon 8 --rounds 5 --batch 10 --records 5", 2, "there are 5 records"),
    ("--epsilon 8 --rounds 5 --batch 10 --records 50 --sample-rate 0.2", 2, "both say the rate"),
    ("--epsilon 8 --rounds 5 --sigma 2 --batch 9 --records 50 --solve rate", 2, "--batch with"),
    ("--epsilon 8 --rounds 5 --unit node --sample-rate 0.5", 2, '--sample-rate with unit "node"'),
    ("--epsilon 8 --rounds 5 --unit node --records 50", 2, '--records with unit "node"'),
    ("--epsilon 8 --rounds 5 --unit node --sigma 2 --solve rate", 2, "--solve rate with unit"),
    ("--epsilon 8 --rounds 5 --unit none", 2, "'none' is not one of"),
    ("--plan-for absent.toml", 3, "absent.toml"),
    ("--plan-for broken.toml", 3, "broken.toml"),
    ("--plan-for folder", 3, "folder"),
    ("--plan-for wrong.toml", 3, "wrong.toml: train.rounds = 0, but it must be from 1"),
    ("--plan-for none.toml", 2, 'none.toml: privacy.unit = "none" promises nothing'),
    ("--epsilon 8 --rounds 5 --picture p.jpg", 2, "it must end in .png or .svg"),
    ("--epsilon 8 --rounds 5 --picture p", 2, "it must end in .png or .svg"),
    (
        f"{COST} --picture absent/p.png",
        1,
        "absent/p.png: cannot be written",
    ),
    ("--epsilon 0.01 --sigma 1", 6, "one step at sample_rate = 0.25"),
    ("--epsilon 1 --sigma 0.2", 6, "nodes refuse less than 0.3"),
]


@pytest.mark.parametrize(("line", "code", "words"), ERRORS, ids=[line for line, _, _ in ERRORS])
def test_what_makes_no_sense_is_one_clear_error(
    plan: Plan, line: str, code: int, words: str
) -> None:
    Path("broken.toml").write_text("[train\n", encoding="utf-8")
    Path("wrong.toml").write_text("[train]\nrounds = 0\n", encoding="utf-8")
    Path("none.toml").write_text('[privacy]\nunit = "none"\n', encoding="utf-8")
    Path("folder").mkdir()
    result = plan(line)
    assert result.code == code, result.err
    assert result.out == ""
    first, *hint = result.err.splitlines()
    assert first.startswith("error: ")
    assert words in first
    assert len(hint) <= 1
    assert all(line.startswith("hint: ") for line in hint)
    assert hint or "but it must be" in first


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_scenario_that_may_not_be_read_is_an_error(plan: Plan) -> None:
    path = scenario(SCENARIO)
    path.chmod(0)
    result = plan(f"--plan-for {path}")
    assert result.code == 3
    assert result.err.startswith("error: s.toml: ")


def examples(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line.split("    ")[0] for line in lines if line.startswith("fedfuse plan")]


def test_help_has_examples_and_says_each_default(plan: Plan) -> None:
    out = plan("--help").out
    assert "Examples:" in out
    assert len(examples(out)) >= 3
    for default in ("1e-05", "0.25", "record", "4", "1", "100000, assumed"):
        assert f"[default: {default}]" in " ".join(out.split())


@pytest.mark.slow
def test_each_example_of_the_help_runs(plan: Plan) -> None:
    for line in examples(plan("--help").out):
        words = line.removeprefix("fedfuse plan ").replace("simulations/", f"{SCENARIOS}/")
        assert plan(words).code == 0
