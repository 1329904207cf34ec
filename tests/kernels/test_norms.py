"""The compiled norms are those of autograd in float64, record for record."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedfuse.kernels import norms
from fedfuse.kernels import threads as threads_of
from fedfuse.kernels.library import Room


def assert_near(found: Tensor, true: Tensor, raised: float = 1.0) -> None:
    """To some roundings of the largest number, and of what they are `raised` to."""
    assert found.shape == true.shape
    assert float((found - true).abs().max()) <= 5e-6 * raised * max(1.0, float(true.abs().max()))


def gradients(
    kernel: Callable[..., Tensor | None], g: Tensor, *saved: Tensor, back: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of x, weight and bias, the latter two between other columns of a matrix, which stay."""
    channels = len(saved[-1])
    whole = torch.full((len(g), 2, channels + 5), 7.0)
    room = whole[:, :, 2:-3]
    by_x = kernel(g, *saved, [Room.of(room[:, i]) for i in (0, 1)], back=back)
    assert bool((whole[:, :, :2] == 7).all())
    assert bool((whole[:, :, -3:] == 7).all())
    return by_x, room[:, 0], room[:, 1]


@settings(max_examples=60, deadline=None)
@given(
    records=st.integers(1, 4), groups=st.integers(1, 4), each=st.integers(1, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)), off=st.sampled_from([0.0, 30.0]),
    threads=st.integers(1, 3),
)  # fmt: skip
def _groups_agree(
    records: int, groups: int, each: int, size: tuple[int, int], off: float, threads: int
) -> None:
    torch.manual_seed(0)
    channels = groups * each
    x = (torch.randn(records, channels, *size) + off).contiguous(memory_format=torch.channels_last)
    g = torch.randn(records, channels, *size).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels)
    exact = x.double().requires_grad_()
    # Each record has a weight and a bias of its own.
    weights, biases = (
        w.double().expand(records, -1).clone().requires_grad_() for w in (weight, bias)
    )
    by_group = exact.reshape(records, groups, -1)
    unit = F.layer_norm(by_group, by_group.shape[2:], eps=1e-3).reshape(exact.shape)
    y = unit * weights[..., None, None] + biases[..., None, None]
    true = torch.autograd.grad(y, (exact, weights, biases), g.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(threads_of, "_WORTH_SHARING", 0)
        found, moments = norms.group_forward(x, groups, weight, bias, 1e-3)
        grads = gradients(norms.group_backward, g, x, moments, weight, back=True)
        less = gradients(norms.group_backward, g, x, moments, weight, back=False)
    # Roundings of x and of a mean count as many times as a deviation goes into one.
    raised = max(1.0, float(x.abs().max() * moments[1].max()))
    assert_near(found, y.detach(), raised)
    for mine, wanted in zip(grads, true, strict=True):
        assert mine is not None
        assert_near(mine, wanted, raised)
    assert less[0] is None
    assert torch.equal(less[1], grads[1])
    assert torch.equal(less[2], grads[2])


def test_group_norm_is_that_of_autograd(level: str) -> None:
    _groups_agree()


@settings(max_examples=60, deadline=None)
@given(
    records=st.integers(1, 4), middle=st.lists(st.integers(1, 9), max_size=2),
    channels=st.integers(1, 70), back=st.booleans(),
)  # fmt: skip
def _layers_agree(records: int, middle: list[int], channels: int, back: bool) -> None:
    torch.manual_seed(0)
    shape = (records, *middle, channels)
    x, g = torch.randn(2, *shape)
    weight, bias = torch.randn(2, channels)
    exact = x.double().requires_grad_()
    weights, biases = (
        w.double().expand(records, -1).clone().requires_grad_() for w in (weight, bias)
    )
    ones = [1] * len(middle)
    unit = F.layer_norm(exact, (channels,), eps=1e-3)
    y = unit * weights.view(records, *ones, -1) + biases.view(records, *ones, -1)
    true = torch.autograd.grad(y, (exact, weights, biases), g.double())
    _, mean, rstd = torch.native_layer_norm(x, (channels,), weight, bias, 1e-3)
    grads = gradients(norms.layer_backward, g, x, mean, rstd, weight, back=back)
    assert (grads[0] is not None) == back
    raised = max(1.0, float(x.abs().max() * rstd.max()))
    for mine, wanted in zip(grads, true, strict=True):
        if mine is not None:
            assert_near(mine, wanted, raised)


def test_layer_norm_backwards_is_that_of_autograd(level: str) -> None:
    _layers_agree()


@pytest.mark.parametrize("places", [63, 64, 65, 5000])
def test_long_sums_keep_their_digits(level: str, places: int) -> None:
    """Far from zero, and over many places."""
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 1, places) + 100).contiguous(memory_format=torch.channels_last)
    ones = torch.ones(3)
    _, (mean, rstd) = norms.group_forward(x, 3, ones, ones, 0.0)
    exact = x.double().flatten(2)
    assert torch.allclose(mean.double(), exact.mean(2), rtol=1e-7)
    assert torch.allclose(rstd.double(), exact.var(2, correction=0).rsqrt(), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (4, 70, 12, 9)]), threads=st.integers(1, 3),
    pictures=st.booleans(), silent=st.booleans(),
)  # fmt: skip
def _places_add_up(
    shape: tuple[int, int, int, int], threads: int, pictures: bool, silent: bool
) -> None:
    torch.manual_seed(0)
    g = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    true = g.double().sum((2, 3))
    if not pictures:
        g = g.permute(0, 2, 3, 1).flatten(1, 2)
    if silent:
        g[0], true[0] = 0, 0
    out = torch.full((shape[0], shape[1] + 5), 7.0)
    assert norms.can_add_up(g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(threads_of, "_WORTH_SHARING", 0)
        loud = norms.place_sums(g, Room.of(out[:, 2:-3]))
    assert_near(out[:, 2:-3], true, shape[2] * shape[3])
    assert loud is not None
    assert loud.tolist() == list(range(int(silent), shape[0]))
    assert bool((out[:, :2] == 7).all())
    assert bool((out[:, -3:] == 7).all())


def test_sums_over_places_are_those_of_torch(level: str) -> None:
    _places_add_up()


def test_a_record_is_silent_where_all_its_numbers_are_zero(level: str) -> None:
    g = torch.zeros(6, 3, 4, 2)
    g[0, 2, 3, 1], g[2, 0, 0, 0], g[4] = 1e-40, float("nan"), -0.0
    g[5, 1, 0] = torch.tensor([1.0, -1.0])
    g = g.contiguous(memory_format=torch.channels_last)
    for some in (g, g[0:0], g.permute(0, 2, 3, 1).flatten(1, 2)):
        loud = norms.place_sums(some, Room.of(torch.empty(len(some), 3)))
        assert loud is not None
        assert loud.tolist() == ([0, 2, 5] if len(some) else [])
        assert norms.place_sums(some, Room.of(torch.empty(len(some), 3)), listen=False) is None


def test_sums_of_other_layouts_are_left_to_torch(level: str) -> None:
    g = torch.zeros(2, 3, 4, 2).contiguous(memory_format=torch.channels_last)
    assert norms.can_add_up(g)
    assert not norms.can_add_up(g.contiguous())
    assert not norms.can_add_up(g.double())
    assert not norms.can_add_up(g.flatten(2))
    assert not norms.can_add_up(g[0, 0])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_touches_no_other(level: str, broken: float) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, 3, 8, 4, 4).contiguous().unbind()
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    ones = torch.ones(8)
    clean = norms.group_forward(x, 2, ones, ones, 1e-5)
    whole = gradients(norms.group_backward, g, x, clean[1], ones, back=True)
    x[1, 3, 2, 2] = broken
    y, moments = norms.group_forward(x, 2, ones, ones, 1e-5)
    grads = gradients(norms.group_backward, g, x, moments, ones, back=True)
    assert not bool(torch.isfinite(grads[1][1]).all())
    for found, true in zip((y, *grads), (clean[0], *whole), strict=True):
        assert found is not None
        assert true is not None
        assert torch.equal(found[[0, 2]], true[[0, 2]])


def test_other_numbers_are_left_to_torch(level: str) -> None:
    assert norms.fits(torch.ones(2))
    assert not norms.fits(torch.ones(2), torch.ones(2, dtype=torch.float64))
