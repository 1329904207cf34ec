"""Errors: one tree, an exit code each, and they survive the way between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from fedfuse import errors
from fedfuse.errors import FedfuseError

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_errors_keep_their_parts_between_processes(kind: type[FedfuseError], again: object) -> None:
    error = again(kind("what", where="where", hint="hint"))  # type: ignore[operator]
    assert type(error) is kind
    assert (error.what, error.where, error.hint) == ("what", "where", "hint")
    assert str(error) == "where: what\nhint: hint"


def test_what_alone_is_enough() -> None:
    assert str(FedfuseError("what")) == "what"


def test_the_tree_is_the_one_that_is_drawn() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    drawn = {line.split()[0]: line for line in _drawing()}
    assert drawn.keys() == codes.keys()
    for name, line in drawn.items():
        assert f" {codes[name]} " in line, line


def _drawing() -> list[str]:
    lines = (errors.__doc__ or "").splitlines()
    return [line.strip("├└─│ ") for line in lines if line.startswith("    ")]
