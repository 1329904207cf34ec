"""Numbers that stand in the manifest itself: "0.5", "1 2 3", "1;2;3" or a JSON list."""

from __future__ import annotations

import json
import math
import re

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLANKS", "number", "numbers"]

BLANKS = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "?"})
"""How a missing number is written, in lower case."""


def number(cell: str) -> float | None:
    """The number in `cell`: NaN where it is blank, None where it is something else.

    >>> number("3.5"), number("n/a"), number("abc")
    (3.5, nan, None)
    """
    text = cell.strip()
    if text.lower() in BLANKS:
        return math.nan
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def numbers(cell: str) -> NDArray[np.float64] | None:
    """The numbers in `cell`, shape (F,) or (T, F); NaN where one is blank; None where it has none.

    >>> numbers("1;2;;4")
    array([ 1.,  2., nan,  4.])
    """
    text = cell.strip()
    if text.startswith("["):
        return _from_json(text)
    parts = text.split(";") if ";" in text else re.split(r"[,\s]+", text)
    values = [number(part) for part in parts]
    if any(value is None for value in values):
        return None
    return np.array(values, dtype=np.float64)


def _from_json(text: str) -> NDArray[np.float64] | None:
    try:
        array = np.array(json.loads(text), dtype=np.float64)  # null becomes NaN
    except (ValueError, TypeError, RecursionError):
        return None
    return array if array.ndim in (1, 2) and array.size else None
