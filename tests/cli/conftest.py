"""Runs a command line in this process, on stand-ins for the parts below it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedfuse.cli import main
from tests.cli.stand_ins import Fake, Result, make_demo


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command line in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDFUSE_DEBUG", raising=False)

    def command(*words: object) -> Result:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return command


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Takes the place of `fedfuse.federation.simulate.simulate` and of the demo data."""
    fake = Fake()
    federate: Any = ModuleType("fedfuse.federation.simulate")
    federate.simulate = fake
    monkeypatch.setitem(sys.modules, "fedfuse.federation.simulate", federate)
    scenes: Any = ModuleType("fedfuse.data.scenes")
    scenes.make = lambda name, folder, **_: make_demo(folder)
    monkeypatch.setitem(sys.modules, "fedfuse.data.scenes", scenes)
    return fake
