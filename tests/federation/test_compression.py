"""Updates in fewer bytes: how near they come, what they cost, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedfuse.config import COMPRESSIONS, RunConfig
from fedfuse.errors import ConfigError, WireError
from fedfuse.federation.compression import compress, expand
from fedfuse.federation.observer import Silent
from fedfuse.federation.simulate import simulate
from fedfuse.federation.wire import Weights, encode, template_of
from fedfuse.privacy.noise import NoiseStream
from fedfuse.runfolder import RunFolder

MakeConfig = Callable[..., RunConfig]
DRAW = np.random.default_rng(5)
START: Weights = {
    "a": DRAW.normal(size=(40, 30)).astype(np.float32),
    "b": np.array(0.25, dtype=np.float32),
    "count": np.array([7, 9], dtype=np.int64),
}
TEMPLATE = template_of(START)
SIZE = 1201


def stream(key: str = "x") -> NoiseStream:
    return NoiseStream(key.encode().ljust(32, b"."), "compression")


def moved(scale: float = 0.01) -> Weights:
    return {
        "a": START["a"] + (scale * DRAW.normal(size=(40, 30))).astype(np.float32),
        "b": np.array(0.3, dtype=np.float32),
        "count": np.array([8, 9], dtype=np.int64),
    }


def through(weights: Weights, form: str, keep: float = 0.1, key: str = "x") -> Weights:
    arrays = compress(weights, START, form=form, keep=keep, stream=stream(key))
    return expand(arrays, START, TEMPLATE, form=form, keep=keep)


def update(weights: Weights, name: str = "a") -> Any:
    return weights[name].astype(np.float64) - START[name]


def volume(arrays: ArrayRecord) -> int:
    return sum(len(array.data) for array in arrays.values())


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_what_comes_out_has_the_models_names_types_and_shapes(form: str) -> None:
    back = through(moved(), form)
    assert template_of(back) == TEMPLATE
    np.testing.assert_array_equal(back["count"], [8, 9])


@pytest.mark.parametrize(("form", "within"), [("none", 0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_rounding_to_nearest_is_as_near_as_its_type(form: str, within: float) -> None:
    after = moved()
    error = np.abs(update(through(after, form)) - update(after))
    # The weights themselves are float32, which adds half of their last place.
    assert (error <= np.abs(update(after)) * within + 3e-7).all()


def test_levels_are_never_further_than_one_and_right_on_average() -> None:
    after = moved()
    true = update(after)
    step = np.abs(true).max() / 127
    found = np.stack([update(through(after, "int8", key=str(k))) for k in range(400)])
    assert (np.abs(found - true) <= step + 3e-7).all()
    # A rounding's variance is at most step^2 / 4; 1200 means of 400, each beyond 5 with 6e-7.
    assert (np.abs(found.mean(0) - true) <= 5 * step / 2 / np.sqrt(400) + 3e-7).all()
    nearest = np.rint(true / step) * step
    assert np.abs(found.mean(0) - nearest).max() > 5 * step / 2 / np.sqrt(400)


def test_the_largest_arrive_and_the_others_are_zero() -> None:
    after = moved()
    back = through(after, "topk", keep=0.1)
    flat = np.abs(np.concatenate([update(after).ravel(), update(after, "b").ravel()]))
    kept = np.sort(flat)[-121:].min()
    reached = np.abs(update(after)) >= kept
    np.testing.assert_allclose(update(back)[reached], update(after)[reached], atol=3e-7)
    assert (update(back)[~reached] == 0).all()
    np.testing.assert_allclose(update(through(after, "topk", keep=1.0)), update(after), atol=3e-7)


def test_bytes_shrink_as_claimed() -> None:
    """Of 1201 numbers of 4 bytes; each array has a header of 128, and "count" 16 bytes."""
    sizes = {
        form: volume(compress(moved(), START, form=form, keep=0.1, stream=stream()))
        for form in COMPRESSIONS
    }
    assert sizes["none"] == 4 * SIZE + 16 + 3 * 128
    assert sizes["fp16"] == sizes["bf16"] == 2 * SIZE + 16 + 2 * 128
    assert sizes["int8"] == SIZE + 2 * 4 + 16 + 3 * 128
    assert sizes["topk"] == 8 * 121 + 16 + 3 * 128


@settings(max_examples=60)
@given(
    start=hnp.arrays(np.float32, (5,), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    end=hnp.arrays(np.float32, (5,), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    form=st.sampled_from(COMPRESSIONS),
    keep=st.floats(1e-6, 1.0),
)
def test_any_finite_update_comes_through_finite(
    start: Any, end: Any, form: str, keep: float
) -> None:
    arrays = compress({"w": end}, {"w": start}, form=form, keep=keep, stream=stream())
    back = expand(arrays, {"w": start}, {"w": ((5,), "float32")}, form=form, keep=keep)
    assert np.isfinite(back["w"]).all()


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_no_update_at_all_comes_through_as_none(form: str) -> None:
    back = through({name: value.copy() for name, value in START.items()}, form)
    for name, value in START.items():
        np.testing.assert_array_equal(back[name], value)


def good(form: str) -> Weights:
    """What `compress` lays down, as arrays."""
    arrays = compress(moved(), START, form=form, keep=0.1, stream=stream())
    return {name: array.numpy().copy() for name, array in arrays.items()}


def big(values: Any, kind: str) -> Any:
    return np.array(values, dtype=kind)


@pytest.mark.parametrize(
    ("form", "changes", "told"),
    [
        ("fp16", {"update": np.zeros(SIZE, np.float32)}, "type"),
        ("fp16", {"update": np.zeros(SIZE + 1, np.float16)}, "shape"),
        ("fp16", {"update": np.full(SIZE, np.nan, np.float16)}, "not finite"),
        ("fp16", {"more": np.zeros(1, np.float32)}, "not of this model"),
        ("fp16", {"whole/count": np.zeros(3, np.int64)}, "shape"),
        ("bf16", {"update": np.full(SIZE, 0x7F80, np.uint16)}, "not finite"),
        ("int8", {"update": np.full(SIZE, -128, np.int8)}, "level"),
        ("int8", {"scales": big([-1, 1], "float32")}, "negative"),
        ("int8", {"scales": big([np.inf, 1], "float32")}, "not finite"),
        ("int8", {"scales": big([3e38, 1], "float32"), "update": np.full(SIZE, 127, "i1")}, None),
        ("topk", {"places": np.arange(121, dtype=np.uint32)[::-1].copy()}, "rise"),
        ("topk", {"places": np.zeros(121, np.uint32)}, "rise"),
        ("topk", {"places": np.arange(SIZE - 120, SIZE + 1, dtype=np.uint32)}, "beyond"),
        ("topk", {"places": np.full(121, 2**32 - 1, np.uint32)}, "beyond"),
        ("topk", {"places": np.arange(121, dtype=np.int64)}, "type"),
        ("topk", {"values": np.zeros(120, np.float32)}, "shape"),
        ("topk", {"values": np.full(121, np.inf, np.float32)}, "not finite"),
    ],
)
def test_what_is_not_of_the_form_is_refused(form: str, changes: Weights, told: str | None) -> None:
    arrays = encode(good(form) | changes)
    if told is None:  # a large step, but a finite one
        back = expand(arrays, START, TEMPLATE, form=form, keep=0.1)
        assert np.isfinite(back["a"]).all()
        return
    with pytest.raises(WireError, match=told):
        expand(arrays, START, TEMPLATE, form=form, keep=0.1)


def test_steps_beyond_float32_are_refused() -> None:
    far = {"w": np.full(3, 3e38, np.float32)}
    arrays = encode({"places": np.arange(3, dtype=np.uint32), "values": far["w"]})
    with pytest.raises(WireError, match="not finite"):
        expand(arrays, far, template_of(far), form="topk", keep=1.0)


@pytest.mark.parametrize("asked", COMPRESSIONS)
@pytest.mark.parametrize("given", COMPRESSIONS)
def test_an_answer_in_another_form_is_refused(asked: str, given: str) -> None:
    arrays = compress(moved(), START, form=given, keep=0.1, stream=stream())
    if asked == given:
        expand(arrays, START, TEMPLATE, form=asked, keep=0.1)
        return
    with pytest.raises(WireError):
        expand(arrays, START, TEMPLATE, form=asked, keep=0.1)


def test_another_share_than_asked_for_is_refused() -> None:
    arrays = compress(moved(), START, form="topk", keep=0.2, stream=stream())
    with pytest.raises(WireError, match="shape"):
        expand(arrays, START, TEMPLATE, form="topk", keep=0.1)


@pytest.mark.slow
def test_training_still_learns_for_the_same_epsilon(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    outcomes, events = {}, {}
    for form in ("none", "int8", "topk"):
        config = make_config(
            federation__compression=form,
            federation__compression_keep=0.3,
            train__rounds=4,
            train__local_steps=4,
        )
        outcomes[form] = simulate(config, tmp_path / form, observer=Silent())
        events[form] = RunFolder.open(tmp_path / form).events()
    plain = outcomes["none"]
    for form in ("int8", "topk"):
        small = outcomes[form]
        assert small["metrics"]["accuracy"] > 0.75
        assert small["metrics"]["loss"] < plain["metrics"]["loss"] + 0.15
        assert small["privacy"]["epsilon_by_node"] == plain["privacy"]["epsilon_by_node"]
        assert small["bytes_sent"] == plain["bytes_sent"]
        assert small["bytes_received"] < plain["bytes_received"]
        assert events[form] == events["none"]


def test_noise_shared_out_among_nodes_takes_no_compression(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="plain sum"):
        make_config(privacy__unit="node", federation__compression="int8")
    make_config(privacy__unit="node", privacy__noise_by="server", federation__compression="int8")
