"""The sum that no order changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.privacy.summation import RunningSum

numbers = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40)


def summed(values: list[float], factors: list[float] | None = None) -> float:
    total = RunningSum({"x": ()})
    for value, factor in zip(values, factors or [1.0] * len(values), strict=True):
        total.add({"x": np.array(value, np.float32)}, factor)
    return float(total.total()["x"])


@given(values=numbers, order=st.randoms(use_true_random=False))
def test_the_order_changes_nothing_that_float32_could_show(
    values: list[float], order: object
) -> None:
    shuffled = list(values)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    exact = math.fsum(values)
    bound = 1e-28 * math.fsum(map(abs, values)) + abs(exact) * 2**-52
    assert abs(summed(values) - exact) <= bound
    assert abs(summed(shuffled) - exact) <= bound


def test_what_cancels_leaves_the_rest() -> None:
    values = [2.0**90, 1.0, -(2.0**90), 2.0**-20] * 3
    assert summed(values) == 3 + 3 * 2.0**-20
    plain = 0.0
    for value in values:
        plain += value
    assert plain != summed(values)


def test_arrays_come_back_under_their_names_and_shapes() -> None:
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"b": (3, 5000), "a": (), "none": (0, 4)}
    total = RunningSum(shapes)
    updates = [
        {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(7)
    ]
    for weight, update in enumerate(updates, 1):
        total.add(update, float(weight))
    for name, shape in shapes.items():
        expected = sum(w * u[name].astype(np.float64) for w, u in enumerate(updates, 1))
        assert total.total()[name].shape == shape
        np.testing.assert_allclose(total.total()[name], expected, rtol=1e-14)


def test_a_name_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError):
        RunningSum({"a": (2,), "b": (2,)}).add({"a": np.zeros(2)})
