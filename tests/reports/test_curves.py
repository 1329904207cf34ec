"""The curves of a run folder: there, valid, the same each time, and honest about privacy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from fedfuse.errors import RunFolderError
from fedfuse.reports.curves import write_curves

Write = Callable[..., Path]
NAMES = ["metrics.png", "metrics.svg", "privacy.png", "privacy.svg"]


@pytest.mark.parametrize("unit", ["record", "none"])
@pytest.mark.parametrize("rounds", [1, 20])
def test_curves_are_valid_pictures(write_run: Write, unit: str, rounds: int) -> None:
    run = write_run(unit=unit, rounds=rounds)
    paths = write_curves(run)
    assert sorted(path.relative_to(run / "plots").as_posix() for path in paths) == NAMES
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 500
                assert len(image.convert("RGB").getcolors(2**24) or ()) > 2
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_an_unprotected_run_is_painted_red(write_run: Write) -> None:
    def share_of_red(run: Path) -> float:
        write_curves(run)
        with Image.open(run / "plots" / "privacy.png") as image:
            pixels = image.convert("RGB").get_flattened_data()
        red = sum(r > 150 and g < 80 and b < 80 for r, g, b in pixels)
        return red / len(pixels)

    assert share_of_red(write_run(unit="none")) > 0.01 > share_of_red(write_run())


def test_the_same_folder_gives_the_same_bytes(write_run: Write) -> None:
    run = write_run(rounds=3)
    first = [path.read_bytes() for path in write_curves(run)]
    assert [path.read_bytes() for path in write_curves(run)] == first


def test_a_stopped_run_is_drawn_as_far_as_it_came(write_run: Write) -> None:
    assert len(write_curves(write_run(rounds=2, finished=False))) == 4


def test_no_finished_round_draws_nothing(write_run: Write) -> None:
    run = write_run(rounds=0, finished=False)
    assert write_curves(run) == ()
    assert not (run / "plots").exists()


def test_a_round_without_figures_leaves_a_gap(write_run: Write) -> None:
    run = write_run(rounds=2)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8")
    gap = lines.replace('"epsilon": 2.5298221281347035', '"epsilon": null')
    assert gap != lines
    (run / "metrics.jsonl").write_text(gap, encoding="utf-8")
    assert len(write_curves(run)) == 4


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run is here"):
        write_curves(tmp_path)


def test_curves_load_no_torch_and_no_matplotlib_before_they_draw() -> None:
    code = (
        "import sys, fedfuse.reports.curves\n"
        "print([name for name in ('torch', 'flwr', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
