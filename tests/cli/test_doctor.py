"""`fedfuse doctor`: what it finds, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata

import pytest

from fedfuse.cli import doctor
from fedfuse.kernels import library
from tests.cli.stand_ins import Result

Run = Callable[..., Result]


def test_a_complete_installation_is_fine_and_named(run: Run) -> None:
    result = run("doctor", "--json")
    found = {each["name"]: each for each in json.loads(result.out)}
    assert result.code == 0
    for name in ("python", "torch", "flwr", "opacus", "devices", "audio", "memory", "disk"):
        assert found[name]["state"] in ("ok", "note"), found[name]
    assert found["torch"]["found"] == metadata.version("torch")


def test_it_says_whether_the_kernels_are_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda source: "")
    assert "compiled for this processor" in run("doctor").out
    monkeypatch.setattr(library, "why_not", lambda source: "no C compiler" * (source == "normals"))
    result = run("doctor")
    assert "more slowly: no C compiler" in result.out
    assert result.code == 0


def test_what_is_missing_fails_and_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without_opacus_and_ray(name: str) -> str:
        if name in ("opacus", "ray"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_opacus_and_ray)
    result = run("doctor")
    assert result.code == 1
    assert "missing: opacus\n" in result.err
    assert "hint: python -m pip install 'opacus" in result.out
    assert "hint: python -m pip install 'fedfuse[ray]'" in result.out


def test_a_wrong_version_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "1.0" if name == "flwr" else version(name)
    )
    result = run("doctor")
    assert result.code == 1
    assert "1.0, but" in result.out
