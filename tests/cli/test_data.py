"""`fedfuse data`: the demo it writes is clean, and each problem is listed with its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.stand_ins import Result

Run = Callable[..., Result]


@pytest.fixture
def demo(run: Run) -> Path:
    result = run("data", "demo", "demo", "--records", 60, "--clients", 2)
    assert result == Result(0, "demo/manifest.csv\n", "")
    return Path("demo/manifest.csv")


def break_lines(manifest: Path, changes: dict[int, dict[str, str]]) -> None:
    """Changes cells of a CSV by line number; line 1 is the header."""
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for line, cells in changes.items():
        rows[line - 2].update(cells)
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_another_demo_is_made_by_its_name(run: Run) -> None:
    result = run("data", "demo", "clinic", "--scenario", "medical", "--records", 40)
    assert result == Result(0, "clinic/manifest.csv\n", "")
    shown = run("data", "check", "clinic/manifest.csv")
    assert shown.code == 0
    assert "modality    vitals: series, 48 x 3" in shown.out
    assert "clients     4" in shown.out


def test_a_clean_manifest_passes_and_is_summed_up(run: Run, demo: Path) -> None:
    result = run("data", "check", demo)
    assert result.code == 0
    assert "records     60: 12 test, 45 train, 3 valid" in result.out
    assert "clients     2" in result.out
    for name in ("image: image, 3 x 32 x 32", "audio: audio", "text: text"):
        assert f"modality    {name}" in result.out
    assert "classification, 8 classes" in result.out
    assert result.err == "demo/manifest.csv: 0 errors, 0 warnings\n"


def test_all_problems_are_listed_with_their_lines(run: Run, demo: Path) -> None:
    break_lines(demo, {3: {"image": "image/nowhere.png"}, 7: {"label": "99"}})
    result = run("data", "check", demo)
    assert result.code == 4
    listed = [line for line in result.out.splitlines() if ": error: " in line]
    assert [line.split(": error: ")[1].split(",")[0] for line in listed] == ["line 3", "line 7"]
    assert "demo/manifest.csv: 2 errors" in result.err


def test_problems_as_json(run: Run, demo: Path) -> None:
    break_lines(demo, {3: {"image": "image/nowhere.png"}})
    result = run("data", "check", demo, "--json")
    assert result.code == 4
    tree = json.loads(result.out)
    (problem,) = tree["problems"]
    assert (problem["line"], problem["column"]) == (3, "image")
    assert tree["contents"]["records"] == 60


def test_a_manifest_that_cannot_be_read_is_one_problem(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    result = run("data", "check", "m.csv")
    assert result.code == 4
    assert "m.csv: error: " in result.out
    assert "Traceback" not in result.err


def test_another_partition_needs_no_client(run: Run, demo: Path) -> None:
    text = demo.read_text(encoding="utf-8").replace("id,split,client,", "id,split,site,")
    demo.write_text(text, encoding="utf-8")
    assert run("data", "check", demo).code == 4
    assert "no column client" not in run("data", "check", demo, "--partition", "iid").out
