"""The sums of the one backward pass are those of a loop over records, for every kind of layer.

`way` makes each layer take one way of computing its norm, whatever the cost model says: "gram", or
"whole" (instantiated, in a block of its own), or "slab" (instantiated, beside the others); by the
compiled kernels, where there are any, or by torch alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPGRU, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.kernels import norms, products, tokens
from fedfuse.privacy.clipping import book, convolution, layer, linear
from fedfuse.privacy.clipping.bookkeeping import BookKeeping
from fedfuse.privacy.clipping.linear import gram_squares
from fedfuse.privacy.dpsgd import Part, PrivateOptimizer, prepare, private_step
from fedfuse.privacy.noise import NoiseStream

NORMS = ("gram", "whole", "slab")
WAYS = (*NORMS, *(f"{way} by torch" for way in NORMS))
Build = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """`run` over the batch's only input, with the modules that it uses."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, batch: Batch) -> Tensor:
        return self.run(self, batch.inputs["x"])


def only(layer: nn.Module) -> Net:
    return Net(lambda net, x: net.layer(x), layer=layer)


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Not linear, and another one for each record."""
    flat = outputs.flatten(1)
    return (flat + 0.1 * target[:, None]).sin().sum(1) + 0.3 * flat.square().sum(1)


def batch_of(x: Tensor) -> Batch:
    return Batch({"x": x}, {"x": torch.ones(len(x), dtype=torch.bool)}, torch.arange(len(x)))


@contextmanager
def forced(way: str) -> Iterator[None]:
    norm, _, torch_alone = way.partition(" by ")
    small = 10**9 if norm == "slab" else 0
    with ExitStack() as stack:
        if torch_alone:
            for kernels in (norms, products, tokens):
                stack.enter_context(mock.patch.object(kernels, "fits", return_value=False))
        stack.enter_context(mock.patch.object(book, "SMALL", small))
        for module in (linear, convolution):
            gram = mock.patch.object(module, "gram_is_cheaper", return_value=norm == "gram")
            stack.enter_context(gram)
        yield


def step(
    model: nn.Module,
    batch: Batch,
    C: float,
    *,
    owners: Sequence[int] | None = None,
    physical: int = 64,
    parts: Sequence[Part] = (),
    way: str = "",
    book: BookKeeping | None = None,
) -> list[Tensor]:
    """The clipped sum, with so little noise that it is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with forced(way) if way else nullcontext():
        made = book or prepare(model)
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=1e-14 / C,
            clip_norm=C,
            expected_batch=1.0,
            stream=NoiseStream(bytes(32), "noise"),
            parts=parts,
        )
        whose = None if owners is None else np.array(owners, dtype=np.int64)
        private_step(made, optimizer, batch, loss, physical_batch=physical, owners=whose)
    return [p.grad for p in parameters]


def oracle(
    model: nn.Module, batch: Batch, C: float, owners: Sequence[int] | None = None
) -> list[Tensor]:
    """The sum of clipped gradients by plain autograd, one unit at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    of = list(range(len(batch))) if owners is None else list(owners)
    for unit in sorted(set(of)):
        rows = [i for i, owner in enumerate(of) if owner == unit]
        whole = [torch.zeros_like(p) for p in parameters]
        for row in rows:
            one = batch[slice(row, row + 1)]
            value = loss(model(one), one.target).sum()
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            for w, g in zip(whole, found, strict=True):
                if g is not None:
                    w += g
        norm = math.sqrt(sum(float(w.double().square().sum()) for w in whole))
        if math.isfinite(norm):
            for t, w in zip(total, whole, strict=True):
                t += w * min(1.0, C / max(norm, 1e-30))
    return total


def assert_same(
    found: Sequence[Tensor], expected: Sequence[Tensor], rel: float = 1e-5, least: float = 1e-6
) -> None:
    """`least`: where terms cancel, a sum is right to so much of them, not of what is left."""
    scale = math.sqrt(sum(float(e.double().square().sum()) for e in expected))
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).double().norm()) <= rel * max(scale, least)


def assert_exact(
    model: nn.Module, x: Tensor, way: str, owners: Sequence[int] | None = None
) -> None:
    batch = batch_of(x)
    # Of small layers, where terms can cancel, a Gram norm in float32 is raised by what rounding may
    # take from it; their gradients are instantiated but for the sake of a test.
    rel = 1e-3 if way.startswith("gram") and x.dtype is torch.float32 else 1e-5
    for C in (0.05, 1e4):
        found = step(model, batch, C, owners=owners, way=way)
        expected = oracle(model, batch, C, owners)
        assert_same(found, expected, rel if C < 1 else 1e-5, min(C, 1.0))
        length = math.sqrt(sum(float(f.double().square().sum()) for f in found))
        units = len(batch) if owners is None else len(set(owners))
        assert length <= C * max(1, units) * (1 + 1e-7)


def owners_of(data: st.DataObject, rows: int) -> list[int] | None:
    """Random, ascending owners of `rows` records, or none."""
    if not data.draw(st.booleans()):
        return None
    steps = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return (np.cumsum(steps) - int(steps[0])).tolist() if rows else []


dtypes = st.sampled_from([torch.float32, torch.float64])
ways = st.sampled_from(WAYS)
rows = st.integers(1, 5)
few = settings(max_examples=25, deadline=None)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), way=ways, dtype=dtypes, rows=rows, bias=st.booleans(),
    middle=st.lists(st.integers(1, 4), max_size=2), p=st.integers(1, 5), d=st.integers(1, 5),
)  # fmt: skip
def test_linear_of_any_shape(
    data: st.DataObject, way: str, dtype: torch.dtype, rows: int, bias: bool,
    middle: list[int], p: int, d: int,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    model = only(nn.Linear(p, d, bias=bias)).to(dtype)
    assert_exact(model, torch.randn(rows, *middle, p, dtype=dtype), way, owners_of(data, rows))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=100, deadline=None)
@given(
    data=st.data(), way=ways, dtype=dtypes, rows=rows, dims=st.integers(1, 3), bias=st.booleans(),
    groups=st.integers(1, 2), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    kernel=st.integers(1, 3), padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]),
    channels=st.integers(1, 3), out=st.integers(1, 3), before=st.booleans(),
)  # fmt: skip
def test_convolution_of_any_kind(
    data: st.DataObject, way: str, dtype: torch.dtype, rows: int, dims: int, bias: bool,
    groups: int, stride: int, dilation: int, kernel: int, padding: Any, mode: str,
    channels: int, out: int, before: bool,
) -> None:  # fmt: skip
    if padding == "same":
        stride = 1
    if isinstance(padding, int) and (dims == 3 or mode != "zeros"):
        padding = min(padding, 1)
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(
        groups * channels, groups * out, kernel, stride=stride, dilation=dilation, groups=groups,
        padding=padding, padding_mode=mode, bias=bias,
    )  # fmt: skip
    size = (7, 6, 5)[:dims]
    if before:  # a layer in front, so that input gradients are needed
        first = kind(1, groups * channels, 1)
        model: nn.Module = Net(
            lambda net, x: net.layer(net.first(x).tanh()), first=first, layer=layer
        )
        x = torch.randn(rows, 1, *size, dtype=dtype)
    else:
        model, x = only(layer), torch.randn(rows, groups * channels, *size, dtype=dtype)
    assert_exact(model.to(dtype), x, way, owners_of(data, rows))


@few
@given(
    data=st.data(), way=ways, dtype=dtypes, rows=rows,
    middle=st.lists(st.integers(1, 4), max_size=2),
    padding=st.sampled_from([None, 0, 3]),
)  # fmt: skip
def test_embedding_adds_up_equal_tokens(
    data: st.DataObject, way: str, dtype: torch.dtype, rows: int, middle: list[int],
    padding: int | None,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    layer = nn.Embedding(4, 3, padding_idx=padding)
    nn.init.normal_(layer.weight)
    if not middle:
        middle = [1]
    assert_exact(
        only(layer).to(dtype), torch.randint(0, 4, (rows, *middle)), way, owners_of(data, rows)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owners", [None, [0, 1, 1]])
def test_equal_tokens_of_long_texts_share_a_row(way: str, owners: Any) -> None:
    torch.manual_seed(0)
    assert_exact(only(nn.Embedding(9, 3)), torch.randint(0, 9, (3, 40)), way, owners)


@few
@given(
    data=st.data(), way=st.sampled_from(["whole", "slab"]), dtype=dtypes, rows=rows,
    middle=st.lists(st.integers(1, 3), max_size=2),
    kind=st.sampled_from(
        ["layer", "layer-2d", "layer-no-bias", "rms", "rms-eps", "group", "group-1"]
    ),
    last=st.booleans(),
)  # fmt: skip
def test_norms_of_any_kind(
    data: st.DataObject, way: str, dtype: torch.dtype, rows: int, middle: list[int], kind: str,
    last: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    shape: tuple[int, ...] = (rows, *middle, 4)
    layer: nn.Module
    match kind:
        case "layer":
            layer = nn.LayerNorm(4)
        case "layer-2d":
            layer, shape = nn.LayerNorm((2, 4)), (rows, *middle, 2, 4)
        case "layer-no-bias":
            layer = nn.LayerNorm(4, bias=False)
        case "rms":
            layer = nn.RMSNorm(4)
        case "rms-eps":
            layer = nn.RMSNorm(4, eps=1e-3)
        case _:
            layer, shape = nn.GroupNorm(1 if kind == "group-1" else 2, 4), (rows, 4, *middle)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape, dtype=dtype)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)

    def run(net: Any, x: Tensor) -> Tensor:
        size = net.scale(x.flatten(1)[:, :1])
        return net.layer(x * size.view(-1, *[1] * (x.dim() - 1)))

    model = Net(run, layer=layer, scale=nn.Linear(1, 1)).to(dtype)
    assert_exact(model, x, way, owners_of(data, rows))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owners", [None, [0, 0, 1, 2, 2, 2]])
def test_layer_called_several_times_counts_once(way: str, owners: list[int] | None) -> None:
    """A shared encoder: its gradient is the sum over its calls, before the norm."""
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.conv(net.norm(net.conv(x).tanh()))
        + net.linear(x) + net.linear(x.square()).sum(2, keepdim=True),
        conv=nn.Conv2d(2, 2, 3, padding=1), norm=nn.GroupNorm(1, 2), linear=nn.Linear(4, 4),
    ).double()  # fmt: skip
    assert_exact(model, torch.randn(6, 2, 4, 4, dtype=torch.float64), way, owners)


@pytest.mark.parametrize("way", WAYS)
def test_layer_in_a_loop_over_time(way: str) -> None:
    def run(net: Any, ids: Tensor) -> Tensor:
        state = net.words(ids[:, 0])
        for t in range(1, ids.shape[1]):
            state = net.cell(torch.cat([state, net.words(ids[:, t : t + 1])[:, 0]], 1)).tanh()
        return state

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return (
                self.table(ids.view(len(ids), -1)).squeeze(1) if ids.dim() == 1 else self.table(ids)
            )

    torch.manual_seed(0)
    model = Net(run, words=Words(), cell=nn.Linear(6, 3)).double()
    assert_exact(model, torch.randint(0, 5, (4, 6)), way)


@pytest.mark.parametrize("way", WAYS)
def test_layer_that_is_not_used_or_whose_output_is_not_contributes_zero(way: str) -> None:
    torch.manual_seed(0)

    def run(net: Any, x: Tensor) -> Tensor:
        net.a(2 * x)  # thrown away
        return net.a(x) + (net.b(x) if net.use else 0)

    model = Net(run, a=nn.Linear(3, 3), b=nn.Linear(3, 3)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    with forced(way):
        made = prepare(model)
    for use in (True, False, True):  # nothing is carried over from the batch before
        model.use = use  # type: ignore[assignment]
        found = step(model, batch_of(x), 0.5, way=way, book=made)
        assert_same(found, oracle(model, batch_of(x), 0.5))
        assert use or float(found[2].abs().max()) < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_batches_of_changing_size_on_one_engine(way: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.out(net.norm(net.conv(x).tanh()).flatten(1)),
        conv=nn.Conv1d(2, 3, 2), norm=nn.GroupNorm(1, 3), out=nn.Linear(9, 2),
    ).double()  # fmt: skip
    with forced(way):
        made = prepare(model)
    for size in (3, 0, 1, 5, 2):
        batch = batch_of(torch.randn(size, 2, 4, dtype=torch.float64))
        found = step(model, batch, 0.3, way=way, book=made, physical=4)
        assert_same(found, oracle(model, batch, 0.3))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owners", [None, [0, 0, 1, 1, 2, 3]])
def test_record_that_is_not_finite_takes_its_unit_with_it_and_no_other(
    broken: float, way: str, owners: list[int] | None
) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.out(net.norm(net.conv(x).tanh()).flatten(2)).sum(1),
        conv=nn.Conv2d(2, 3, 2), norm=nn.GroupNorm(1, 3), out=nn.Linear(9, 2),
    ).double()  # fmt: skip
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    x[2, 1, 0, 0] = broken
    x[5] = broken
    keep = [0, 1, 3, 4] if owners is None else [0, 1, 4]
    rest = None if owners is None else [0, 0, 1]
    kept = batch_of(x[keep])
    kept.target[:] = torch.tensor(keep)
    found = step(model, batch_of(x), 0.4, owners=owners, way=way)
    assert_same(found, oracle(model, kept, 0.4, rest))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pictures", [True, False])
def test_rows_without_a_gradient_are_left_out_exactly(
    way: str, dtype: torch.dtype, pictures: bool
) -> None:
    """Half the records lack the modality: their share of the work is skipped, the sum is not."""
    torch.manual_seed(0)
    here = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0], dtype=dtype)[:, None]

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.second(net.first(x).tanh()).tanh()
        h = h.mean((2, 3)) if pictures else h.mean(1)
        seen = here[: len(x)] if len(x) > 1 else (x.flatten(1)[:, :1] != 0).to(dtype)
        return net.out(torch.where(seen > 0, h, torch.zeros_like(h)))

    first, second = (
        (nn.Conv2d(2, 3, 3), nn.Conv2d(3, 8, 2)) if pictures else (nn.Linear(6, 5), nn.Linear(5, 8))
    )
    model = Net(run, first=first, second=second, out=nn.Linear(8, 2)).to(dtype)
    x = torch.randn(6, *((2, 6, 6) if pictures else (9, 6)), dtype=dtype)
    x = x * here.view(-1, *[1] * (x.dim() - 1))
    with mock.patch.object(layer, "_WORTH_A_LOOK", 0):
        for owners in (None, [0, 0, 1, 1, 2, 2]):
            assert_exact(model, x, way, owners)


@pytest.mark.parametrize("way", ["whole", "whole by torch"])
def test_a_row_whose_gradients_cancel_is_not_left_out(way: str) -> None:
    """Its sum over places is zero, its gradient is not."""
    g = torch.zeros(4, 2, 3)
    g[1] = torch.tensor([1.0, -1.0])[:, None]
    one = linear.LinearLayer("layer", nn.Linear(1, 3), {})
    one.begin(layer.Pass(book.Book([]), torch.device("cpu")))
    with mock.patch.object(layer, "_WORTH_A_LOOK", 0), forced(way):
        live = one.give_bias(g)
        assert live is None or live.tolist() == [1]
        g[1] = 0
        g[2, 0, 0] = float("nan")
        live = one.give_bias(g)
        assert live is not None
        assert live.tolist() == [2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owners", [None, [0, 1, 1]])
def test_tied_weights_give_the_gradient_of_all_their_uses(way: str, owners: Any) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, ids: net.read(net.middle(net.words(ids)).tanh()),
        words=nn.Embedding(5, 3), middle=nn.Linear(3, 3), read=nn.Linear(3, 5, bias=False),
    ).double()  # fmt: skip
    model.read.weight = model.words.weight  # type: ignore[union-attr,assignment]
    assert len(list(model.parameters())) == 3
    assert_exact(model, torch.randint(0, 5, (3, 4)), way, owners)


def test_parameter_used_outside_its_layer_is_refused() -> None:
    model = Net(
        lambda net, ids: F.linear(net.words(ids), net.words.weight), words=nn.Embedding(5, 3)
    )
    with pytest.raises(ModelError, match=r"'words\.weight' is used outside"):
        step(model, batch_of(torch.randint(0, 5, (3, 4))), 1.0)


def test_shares_and_micro_batches_and_subjects_together() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.b(net.norm(net.a(x)).tanh()).sum(1),
        a=nn.Linear(3, 40), norm=nn.LayerNorm(40), b=nn.Linear(40, 120),
    ).double()  # fmt: skip
    batch = batch_of(torch.randn(7, 5, 3, dtype=torch.float64))
    owners = [0, 0, 1, 2, 2, 2, 3]
    parts = [
        Part(name="a", places=(0, 3, 4), share=0.6),
        Part(name="b", places=(1, 2, 5), share=0.8),
    ]
    found = step(model, batch, 0.02, owners=owners, physical=3, parts=parts)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for unit in range(4):
        one = [step(model, batch[torch.tensor([i])], 1e9) for i in range(7) if owners[i] == unit]
        whole = [sum(g) for g in zip(*one, strict=True)]
        for part in parts:
            norm = math.sqrt(sum(float(whole[i].square().sum()) for i in part.places))
            for i in part.places:
                total[i] += whole[i] * min(1.0, 0.02 * part.share / norm)
    assert_same(found, total)


def test_frozen_parameters_stay_so_and_the_rest_is_exact() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.b(net.norm(net.a(x)).tanh()),
        a=nn.Linear(3, 4), norm=nn.LayerNorm(4), b=nn.Linear(4, 2),
    ).double()  # fmt: skip
    for p in (model.a.weight, model.norm.bias, model.b.weight):  # type: ignore[union-attr]
        p.requires_grad_(False)
    assert_exact(model, torch.randn(4, 3, dtype=torch.float64), "slab")
    assert model.a.weight.grad is None  # type: ignore[union-attr]


def test_optimizer_that_lacks_a_trained_parameter_is_refused() -> None:
    model = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.a.parameters(), lr=0.0),  # type: ignore[union-attr]
        noise_multiplier=1.0, clip_norm=1.0, expected_batch=1.0,
        stream=NoiseStream(bytes(32), "noise"),
    )  # fmt: skip
    with pytest.raises(ModelError, match="does not hold exactly"):
        private_step(prepare(model), optimizer, batch_of(torch.randn(2, 3)), loss, physical_batch=9)


def test_positions_that_all_records_share_are_each_records_own() -> None:
    """(1, T) ids, as Hugging Face's BERT has them, are expanded to (B, T)."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.out((x + net.where(torch.arange(x.shape[1])[None])).tanh())

    torch.manual_seed(0)
    model = Net(run, where=nn.Embedding(4, 3), out=nn.Linear(3, 2)).double()
    for way in WAYS:
        assert_exact(model, torch.randn(5, 4, 3, dtype=torch.float64), way)


@pytest.mark.parametrize("size", [3, 4])
def test_positions_for_rows_are_refused_also_where_the_sizes_agree(size: int) -> None:
    """Four positions and four records look alike; `probe` tells them apart."""
    model = Net(lambda net, x: x + net.where(torch.eye(4)[:, :3]), where=nn.Linear(3, 3))
    with pytest.raises(ModelError, match="one row for each record"):
        step(model, batch_of(torch.randn(size, 4, 3)), 1.0)


def test_only_the_present_rows_encoded_is_refused() -> None:
    model = Net(
        lambda net, x: torch.zeros(len(x), 2).index_add(
            0, torch.arange(len(x))[::2], net.layer(x[::2])
        ),
        layer=nn.Linear(3, 2),
    )
    with pytest.raises(ModelError, match="one row for each record"):
        step(model, batch_of(torch.randn(4, 3)), 1.0)


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_whose_gradient_depends_on_the_batch_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(setting))):
        prepare(only(nn.Embedding(4, 3, **setting)))


def gru(net: Any, x: Tensor) -> Tensor:
    return net.layer(x)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("owners", [None, [0, 0, 1]])
def test_gru_of_opacus(way: str, owners: Any) -> None:
    torch.manual_seed(0)
    model = Net(gru, layer=DPGRU(3, 4, batch_first=True)).double()
    assert_exact(model, torch.randn(3, 5, 3, dtype=torch.float64), way, owners)


def test_packed_sequences_are_refused() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return net.layer(packed)[1][0]

    with pytest.raises(ModelError, match="packed sequence"):
        step(Net(run, layer=DPGRU(3, 4, batch_first=True)), batch_of(torch.randn(4, 5, 3)), 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_attention_of_opacus(way: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.layer(x, x, x, need_weights=False)[0],
        layer=DPMultiheadAttention(4, 2, batch_first=True),
    ).double()
    assert_exact(model, torch.randn(3, 5, 4, dtype=torch.float64), way)


class Token(nn.Module):
    """A learned token in front of a sequence: a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


def attention(net: Any, x: Tensor) -> Tensor:
    return net.layer(x, x, value=x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, for bilinear
@pytest.mark.parametrize("owners", [None, [0, 1, 1]])
@pytest.mark.parametrize(
    ("run", "layer"),
    [
        (lambda net, x: net.layer(x), Token()),
        (attention, nn.MultiheadAttention(4, 2, batch_first=True)),
        (lambda net, x: net.layer(x.transpose(1, 2)), nn.ConvTranspose1d(4, 2, 3)),
        (lambda net, x: net.layer(x), nn.PReLU()),
        (lambda net, x: net.layer(x, x), nn.Bilinear(4, 4, 2)),
    ],
    ids=["token", "attention", "transposed", "prelu", "bilinear"],
)
def test_any_other_module_gets_its_gradients_by_vmap(
    run: Any, layer: nn.Module, owners: Any
) -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.out(run(net, net.first(x))), first=nn.Linear(4, 4),
                layer=layer, out=nn.Identity()).double()  # fmt: skip
    assert_exact(model, torch.randn(3, 5, 4, dtype=torch.float64), "whole", owners)


def test_module_whose_outputs_are_not_by_record_is_refused() -> None:
    """The last state of nn.GRU has layers first."""
    with pytest.raises(ModelError, match="one row for each record"):
        step(Net(gru, layer=nn.GRU(3, 4, batch_first=True)), batch_of(torch.randn(2, 5, 3)), 1.0)


def test_module_by_vmap_that_holds_dropout_is_refused() -> None:
    with pytest.raises(ModelError, match="holds dropout"):
        prepare(Net(attention, layer=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)))


def test_parameter_of_the_model_itself_is_refused() -> None:
    model = Net(lambda net, x: x + net.token)
    model.token = nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match="model itself holds parameter 'token'"):
        prepare(model)


@pytest.mark.parametrize("around", [False, True], ids=["forward", "step"])
def test_bf16_autocast_is_clipped_right(around: bool) -> None:
    """Products are in bf16, whose rounding is 2^-8; what a record contributes is C at most."""
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.out(net.norm(net.conv(x)).relu().flatten(2).transpose(1, 2)).sum(1),
        conv=nn.Conv2d(3, 8, 3, padding=1), norm=nn.GroupNorm(2, 8), out=nn.Linear(8, 40),
    )  # fmt: skip
    run = model.run
    model.run = lambda net, x: autocast(run, net, x)

    def autocast(run: Any, net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(net, x)

    batch = batch_of(torch.randn(5, 3, 6, 6))
    for way in WAYS:
        for C in (0.1, 1e4):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                found = step(model, batch, C, way=way)
            assert all(g.dtype == torch.float32 for g in found)
            assert_same(found, oracle(model, batch, C), rel=0.05)
        one = step(model, batch[slice(0, 1)], 0.1, way=way)
        assert math.sqrt(sum(float(g.double().square().sum()) for g in one)) <= 0.1


@pytest.mark.parametrize("way", ["gram", "gram by torch"])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 1e6), level=st.floats(-6, 0))
def test_rounding_never_makes_a_norm_too_small(
    way: str, seed: int, size: float, level: float
) -> None:
    """Equal inputs and gradients that add up to almost nothing: <a a^T, g g^T> cancels."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.ones(1, 16, 8) + 10**level * torch.randn(1, 16, 8, generator=rng)
    g = torch.randn(1, 16, 8, generator=rng)
    g = size * (g - g.mean(1, keepdim=True))
    true = torch.einsum("btd,btp->bdp", g.double(), a.double()).square().sum()
    with forced(way):
        found = float(gram_squares(a, g))
    assert found >= float(true) * (1 - 1e-5)


def test_the_model_is_untouched_between_passes() -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.b(net.norm(net.a(x))), a=nn.Linear(3, 4),
                norm=nn.LayerNorm(4), b=nn.Linear(4, 2)).double()  # fmt: skip
    batch = batch_of(torch.randn(4, 3, dtype=torch.float64))
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    made = prepare(model)
    expected = oracle(model, batch, 0.3)
    for _ in range(2):
        model(batch)  # a metric in train mode, without a backward pass
        assert_same(step(model, batch, 0.3, book=made), expected)
        model.zero_grad()
        loss(model(batch), batch.target).sum().backward()
        assert_same([p.grad for p in model.parameters()], oracle(model, batch, 1e9))
        twin = copy.deepcopy(model)
        assert_same(step(twin, batch, 0.3), expected)
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError):
        made.backward(batch, lambda outputs, target: outputs / (1 // 0))
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_sums_on_a_gpu_are_those_of_the_loop(way: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.out(net.norm(net.conv(x)).relu().flatten(2).transpose(1, 2)).sum(1),
        conv=nn.Conv2d(3, 8, 3, padding=1), norm=nn.GroupNorm(2, 8), out=nn.Linear(8, 40),
    ).double().cuda()  # fmt: skip
    batch = batch_of(torch.randn(5, 3, 6, 6, dtype=torch.float64)).to(torch.device("cuda"))
    for owners in (None, [0, 0, 1, 2, 2]):
        for C in (0.1, 1e4):
            assert_same(
                step(model, batch, C, owners=owners, way=way), oracle(model, batch, C, owners)
            )
