"""SciPy without the notes that it adds to its own documentation while it is loaded.

SciPy 1.17 reads the documentation of some 650 functions then, to write below each which kinds of
arrays it takes: four tenths of the time that the accountant takes to load.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["undocumented"]


class _AsWritten(dict[str, list[str]]):
    """A function's documentation, unread: what SciPy's `FunctionDoc` is asked for."""

    def __init__(self, function: Any) -> None:
        super().__init__(Notes=[])
        self._text = function.__doc__ or ""

    def __str__(self) -> str:
        return f"\n{self._text}"  # the first line would be the signature


@contextmanager
def undocumented() -> Iterator[None]:
    """Inside, what is loaded of SciPy has the documentation that it was written with; nothing else
    of it is another. Does nothing where SciPy names its parts otherwise."""
    try:
        notes: Any = importlib.import_module("scipy._lib._array_api")
        before = notes.FunctionDoc
    except (ImportError, AttributeError):
        yield
        return
    notes.FunctionDoc = _AsWritten
    try:
        yield
    finally:
        notes.FunctionDoc = before
