"""The compiled products are those of autograd in float64, for every shape, layout and processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfuse.kernels import products
from fedfuse.kernels import threads as threads_of
from fedfuse.kernels.library import Room
from fedfuse.kernels.products import Pairs, Windows


def expected(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """(n, kernel height, kernel width, C, O) in float64, one record after the other."""
    found = []
    for one, slope in zip(x.double(), g.double(), strict=True):
        out = layer(one[None])
        (grad,) = torch.autograd.grad(out, layer.weight, slope[None])
        found.append(grad.permute(2, 3, 1, 0))
    return torch.stack(found)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), records=st.integers(1, 4), channels=st.integers(1, 40), out=st.integers(1, 70),
    size=st.tuples(st.integers(1, 9), st.integers(1, 30)), kernel=pairs, stride=pairs,
    dilation=pairs, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    last=st.tuples(st.booleans(), st.booleans()), chosen=st.booleans(), threads=st.integers(1, 3),
)  # fmt: skip
def _agree(
    data: st.DataObject, records: int, channels: int, out: int, size: tuple[int, int],
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int],
    padding: tuple[int, int], last: tuple[bool, bool], chosen: bool, threads: int,
) -> None:  # fmt: skip
    seen = [
        n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)
    ]
    assume(min(seen) > 0)
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=False).double()
    x = torch.randn(records + 2, channels, *size)
    with torch.no_grad():
        g = torch.randn_like(layer(x[:records].double()).float())
    rows = to = None
    if chosen:
        rows, to = torch.randperm(records + 2)[:records], torch.randperm(records + 1)[:records]
    if rows is None:
        x, mine, slopes = x[:records], x[:records], g
    else:
        mine, slopes = x[rows], g
        g = torch.full((records + 2, *g.shape[1:]), float("nan")).index_copy(0, rows, g)
    if last[0]:
        x = x.contiguous(memory_format=torch.channels_last)
    if last[1]:
        g = g.contiguous(memory_format=torch.channels_last)
    windows = Windows(kernel=kernel, stride=stride, dilation=dilation, padding=padding)
    room = torch.full((records + 1, layer.weight.numel() + 5), 7.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(threads_of, "_WORTH_SHARING", 0)
        made = Pairs(x, g, windows, rows)
        squares = made.write(Room.of(room[:, 2:-3]), to)
        again = made.squares()
        factors = torch.rand(records)
        factors[0] = 0
        total = torch.ones(layer.weight.numel())
        made.add_sum(factors, total)
    true = expected(layer, mine, slopes).flatten(1)
    # Each number to some roundings of the largest that could stand there.
    scale = float(true.abs().max()) + 1e-30
    taken = torch.arange(records) if to is None else to
    assert float((room[taken, 2:-3] - true).abs().max()) <= 1e-5 * scale
    left = torch.ones(records + 1, dtype=torch.bool)
    left[taken] = False
    assert bool((room[left] == 7).all())
    assert bool((room[:, :2] == 7).all())
    assert bool((room[:, -3:] == 7).all())
    wanted = 1 + (factors[:, None] * true).sum(0)
    assert float((total - wanted).abs().max()) <= 1e-5 * max(1.0, records * scale)
    lengths = true.square().sum(1)
    most = float(lengths.max()) + 1e-30
    assert float((squares - lengths).abs().max()) <= 1e-5 * most
    # Raised by what rounding could take, never lowered.
    assert bool((again >= lengths * (1 - 1e-6)).all())
    assert float((again - lengths).max()) <= 1e-3 * most


def test_outer_products_are_those_of_autograd(level: str) -> None:
    _agree()


@pytest.mark.parametrize("places", [1, 511, 512, 513, 1300])
def test_long_sums_are_added_up_in_parts(level: str, places: int) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(2, 50, 1, places), torch.randn(2, 40, 1, places)
    out = torch.full((2, 50 * 40), float("nan"))
    squares = Pairs(a, g).write(Room.of(out))
    true = torch.einsum("bphw,bdhw->bpd", a.double(), g.double())
    assert float((out.view(2, 50, 40) - true).abs().max()) <= 2e-6 * float(true.abs().max())
    assert torch.allclose(squares.double(), true.square().sum((1, 2)), rtol=1e-6)


def test_gram_squares_are_the_squares_of_what_outer_products_writes(level: str) -> None:
    torch.manual_seed(0)
    for places, p, d in ((2, 5, 3), (9, 64, 192), (40, 100, 33)):
        a, g = torch.randn(3, p, 1, places), torch.randn(3, d, 1, places)
        out = torch.empty(3, p * d)
        squares = Pairs(a, g).write(Room.of(out))
        assert torch.allclose(squares, out.square().sum(1), rtol=1e-5)
        assert torch.allclose(Pairs(a, g).squares(), squares, rtol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_has_no_finite_norm_and_touches_no_other(
    level: str, broken: float
) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(3, 20, 1, 9), torch.randn(3, 35, 1, 9)
    clean = Pairs(a, g).squares()
    for x in (a, g):
        x[1, 2, 0, 3] = broken
        out = torch.empty(3, 20 * 35)
        for found in (Pairs(a, g).write(Room.of(out)), Pairs(a, g).squares()):
            assert not torch.isfinite(found[1])
            assert torch.allclose(found[[0, 2]], clean[[0, 2]], rtol=1e-5)
        x[1, 2, 0, 3] = 1.0


def test_a_record_with_factor_0_adds_nothing_whatever_its_numbers_are(level: str) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(3, 20, 1, 9), torch.randn(3, 35, 1, 9)
    a[1], g[1, :, 0, 2] = float("nan"), float("inf")
    total = torch.zeros(20 * 35)
    Pairs(a, g).add_sum(torch.tensor([2.0, 0.0, 0.5]), total)
    whole = torch.einsum("bphw,bdhw->bpd", a, g)
    assert torch.allclose(total.view(20, 35), 2 * whole[0] + 0.5 * whole[2], rtol=1e-5, atol=1e-5)


def some(
    layer: nn.Conv2d, records: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Windows, Tensor]:
    """Inputs, output gradients, windows, and the gradients of a layer's weight in float64."""
    torch.manual_seed(0)
    x = torch.randn(records, layer.in_channels, *size)
    with torch.no_grad():
        g = torch.randn_like(layer.double()(x.double()).float())
    windows = Windows(kernel=layer.kernel_size, dilation=layer.dilation, padding=layer.padding)  # type: ignore[arg-type]
    return x, g, windows, expected(layer, x, g).flatten(1)


def test_a_patch_is_cut_into_blocks_of_any_height(level: str) -> None:
    for p in range(1, 31):
        near = nn.Conv2d(p, 49, 1, bias=False)
        far = nn.Conv2d(1, 49, (1, p), dilation=(1, 2), bias=False)
        for layer in (near, far):
            x, g, windows, true = some(layer, 2, (1, 70))
            out = torch.empty(2, p * 49)
            Pairs(x, g, windows).write(Room.of(out))
            assert float((out - true).abs().max()) <= 2e-6 * float(true.abs().max())


@pytest.mark.parametrize(("kernel", "size"), [(1, (1, 3)), (1, (1, 40)), (3, (4, 5))])
def test_many_records_are_added_up_but_for_those_with_factor_0(
    level: str, kernel: int, size: tuple[int, int]
) -> None:
    layer = nn.Conv2d(21, 50, kernel, padding=kernel // 2, bias=False)
    x, g, windows, true = some(layer, 60, size)
    factors = torch.rand(60)
    factors[::7] = 0
    factors[-1] = 0
    x[factors == 0], g[factors == 0] = float("nan"), float("inf")
    for rows in (None, torch.randperm(60)[:45]):
        total = torch.ones(true.shape[1])
        some_factors = factors if rows is None else factors[rows]
        Pairs(x, g, windows, rows).add_sum(some_factors, total)
        wanted = 1 + some_factors.double() @ (true if rows is None else true[rows])
        assert float((total - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


@pytest.mark.parametrize(("kernel", "size"), [(1, (1, 33)), (3, (4, 5))])
def test_a_product_and_its_norms_are_the_same_among_other_records(
    level: str, kernel: int, size: tuple[int, int]
) -> None:
    layer = nn.Conv2d(32, 48, kernel, padding=kernel // 2, bias=False)
    x, g, windows, true = some(layer, 5, size)
    together, alone = torch.empty(5, true.shape[1]), torch.empty(1, true.shape[1])
    squares = Pairs(x, g, windows).write(Room.of(together))
    gram = Pairs(x, g, windows).squares()
    for i in range(5):
        one = Pairs(x[i : i + 1], g[i : i + 1], windows)
        assert torch.equal(one.write(Room.of(alone)), squares[i : i + 1])
        assert torch.equal(alone[0], together[i])
        assert torch.equal(one.squares(), gram[i : i + 1])


@settings(max_examples=60, deadline=None)
@given(
    records=st.integers(1, 5), places=st.integers(1, 40), p=st.integers(1, 40),
    d=st.integers(1, 40), turned=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def _sequences_agree(records: int, places: int, p: int, d: int, turned: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(records, places, p), torch.randn(records, places, d)
    true = torch.einsum("btp,btd->bpd", a.double(), g.double()).flatten(1)
    a, g = (
        x.transpose(1, 2).contiguous().transpose(1, 2) if turn else x
        for x, turn in zip((a, g), turned, strict=True)
    )
    out, total = torch.empty(records, p * d), torch.zeros(p * d)
    made = Pairs(a, g)
    squares = made.write(Room.of(out))
    made.add_sum(torch.ones(records), total)
    near = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(out.double(), true, **near)
    assert torch.allclose(total.double(), true.sum(0), **near)
    assert torch.allclose(squares.double(), true.square().sum(1), rtol=1e-5, atol=1e-5)
    # Terms of a gram matrix may cancel: it is right to so much of them.
    reach = torch.einsum("bt,bt->b", a.norm(dim=2), g.norm(dim=2)).square()
    assert bool(((made.squares() - squares).abs() <= 1e-5 * squares + 1e-6 * reach).all())


def test_sequences_are_lines_of_pictures(level: str) -> None:
    _sequences_agree()


def test_no_record_is_no_work(level: str) -> None:
    a, g = torch.randn(0, 3, 1, 4), torch.randn(0, 2, 1, 4)
    assert Pairs(a, g).write(Room.of(torch.empty(0, 6))).shape == (0,)
    assert Pairs(a, g).squares().shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_left_to_torch(dtype: torch.dtype, level: str) -> None:
    assert products.fits(torch.ones(2))
    assert not products.fits(torch.ones(2), torch.ones(2, dtype=dtype))


def test_memory_that_is_missing_is_an_error(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> int:
        return 1

    monkeypatch.setattr(products, "_call", lambda name: refuses)
    a = torch.randn(1, 3, 1, 4)
    with pytest.raises(MemoryError, match="no memory for the arithmetic"):
        Pairs(a, a).write(Room.of(torch.empty(1, 9)))
