"""The check finds what would break a promise, says where, and lets exact models pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.models.made import made_batch
from fedfuse.models.spec import FUSIONS
from fedfuse.privacy import noise
from fedfuse.privacy.clipping.bookkeeping import BookKeeping
from fedfuse.privacy.memory import peak_of_step
from fedfuse.privacy.safety import Finding, check, refuse
from tests.privacy.test_clipping import SCHEMA, TASK, model_with


class Net(nn.Module):
    """`run` of this module and the input; its modules are named."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, batch: Batch) -> Tensor:
        return self.run(self, batch.inputs["x"])


class MeanOff(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Counting(nn.Module):
    """Keeps the mean of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.level.copy_(0.9 * self.level + 0.1 * x.detach().mean())
        return x


class Gain(nn.Module):
    """A bare parameter, with a gradient that the engine gets by vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def batch_of(*shape: int) -> Batch:
    torch.manual_seed(0)
    rows = shape[0]
    return Batch({"x": torch.randn(shape)}, {"x": torch.ones(rows, dtype=torch.bool)},
                 torch.randint(0, 3, (rows,)))  # fmt: skip


def fatal(model: nn.Module, *shape: int, **options: Any) -> Finding:
    """The one fatal finding."""
    findings = [one for one in check(model, batch_of(*shape), **options) if one.fatal]
    assert len(findings) == 1
    assert findings[0].hint
    return findings[0]


def linear(net: Any, x: Tensor) -> Tensor:
    return net.out(net.layer(net.first(x)))


def with_layer(layer: nn.Module) -> Net:
    return Net(linear, first=nn.Linear(4, 4), layer=layer, out=nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.BatchNorm1d(4), "mixes records"),
        (nn.BatchNorm1d(4, affine=False), "mixes records"),
        (nn.SyncBatchNorm(4), "mixes records"),
        (nn.GRU(4, 4), "one row for each record"),
        (nn.MultiheadAttention(4, 2), "one row for each record"),
        (MeanOff(), "another's"),
        (Counting(), "buffer 'layer.level' is changed"),
    ],
)
def test_layer_is_found_by_its_path(layer: nn.Module, said: str) -> None:
    found = fatal(with_layer(layer), 4, 4)
    assert found.where == "layer"
    assert said in found.what


@pytest.mark.parametrize(
    ("run", "modules", "said"),
    [
        (lambda n, x: n.out(x - x.mean(0)), {"out": nn.Linear(4, 3)}, "own forward lets"),
        (lambda n, x: n.out(x)[x[:, 0].argsort()], {"out": nn.Linear(4, 3)}, "own forward lets"),
        (lambda n, x: n.out(x).softmax(0), {"out": nn.Linear(4, 3)}, "own forward lets"),
        (lambda n, x: n.out(x * (1 + (len(x) > 1))), {"out": nn.Linear(4, 3)}, "alone gives"),
        (lambda n, x: n.out(x.unsqueeze(1).squeeze()), {"out": nn.Linear(4, 3)}, "alone"),
        (lambda n, x: n.out(x) @ n.out.weight.sum(), {"out": nn.Linear(4, 3)}, "fails on a batch"),
        (
            lambda n, x: n.out(x) + n.out.weight.sum(),
            {"out": nn.Linear(4, 3)},
            "used outside its own layer",
        ),
        (lambda n, x: n.out(x[x[:, 0] > -9][:3]), {"out": nn.Linear(4, 3)}, "shape (3,)"),
    ],
    ids=["mean", "sort", "softmax", "size", "squeeze", "fails", "outside", "rows"],
)
def test_operation_in_somebodys_forward_is_found(
    run: Callable[[Any, Tensor], Tensor], modules: dict[str, nn.Module], said: str
) -> None:
    assert said in fatal(Net(run, **modules), 4, 4).what


def test_loss_that_couples_records_is_found() -> None:
    model = Net(lambda n, x: n.out(x), out=nn.Linear(4, 3))

    def contrast(outputs: Tensor, target: Tensor) -> Tensor:
        return -(outputs @ outputs.t()).log_softmax(1).diagonal()

    found = fatal(model, 4, 4, loss=contrast)
    assert found.where == "loss"
    assert "gradient depend" in found.what
    mean = fatal(model, 4, 4, loss=lambda outputs, target: outputs.mean())
    assert "one number for each record" in mean.hint


def test_engine_that_is_not_right_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda n, x: n.out(x), out=nn.Linear(4, 3))
    assert check(model, batch_of(4, 4)) == ()
    squares = BookKeeping.squares
    monkeypatch.setattr(BookKeeping, "squares", lambda self, parts: 0.9 * squares(self, parts))
    assert "not those of a loop" in fatal(model, 4, 4).what


@pytest.mark.parametrize("size", [(3, 4), (4, 6, 4)])
def test_exact_models_pass_and_stay_as_they_are(size: tuple[int, ...]) -> None:
    shared = nn.Linear(4, 4)
    model = Net(
        lambda n, x: n.out(n.norm(n.drop(n.second(n.first(x))))),
        first=shared, second=shared, drop=nn.Dropout(0.5), norm=nn.LayerNorm(4),
        out=nn.Linear(4, 3),
    )  # fmt: skip
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    made = batch_of(*size)
    chance = torch.get_rng_state()
    assert check(model, made) == ()
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_wide_layer_passes() -> None:
    """torch's norm of its 36 million gradients, in float32, is 0.2 % too small."""
    model = Net(lambda n, x: n.out(n.wide(x)), wide=nn.Linear(4, 6000), out=nn.Linear(6000, 6000))
    made = batch_of(2, 4)
    batch = Batch(made.inputs, made.present, made.target * 1000)
    assert check(model, batch) == ()


def test_notes_are_no_refusals() -> None:
    idle = Net(
        lambda n, x: n.out(n.gain(x)), gain=Gain(), idle=nn.Linear(2, 2), out=nn.Linear(4, 3)
    )
    found = check(idle, batch_of(4, 4))
    assert [one.where for one in found] == ["gain", "idle.weight", "idle.bias"]
    refuse(found)


def test_refusal_says_all_that_is_wrong() -> None:
    model = Net(linear, first=nn.BatchNorm1d(4), layer=nn.Embedding(3, 4, max_norm=1.0),
                out=nn.Linear(4, 3))  # fmt: skip
    with pytest.raises(ModelError, match=r"'first' is a BatchNorm1d.*; layer 'layer'.*max_norm"):
        refuse(check(model, batch_of(4, 4)))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_operator_passes(fusion: str) -> None:
    model = model_with(fusion=fusion).float()
    made = made_batch(SCHEMA, 3, vocabulary=20)
    assert [one for one in check(model, made, TASK.loss) if one.fatal] == []


def test_peak_of_a_step_is_what_its_tensors_take() -> None:
    """Of one wide layer everything is known: weights, sums, momentum, and each record's row."""
    width = 300
    model = Net(lambda n, x: n.out(x).square().sum(2), out=nn.Linear(width, width, bias=False))
    peak = peak_of_step(model, batch_of(8, 4, width), lambda outputs, target: outputs.sum(1))
    numbers = width * width
    assert 3 * 4 * numbers <= peak.fixed <= 8 * 4 * numbers  # noise is drawn in float64
    held = 4 * width * 4
    assert 2 * held <= peak.per_record <= 8 * held
    assert peak.at(100) == peak.fixed + 100 * peak.per_record


def test_noise_that_is_made_ahead_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float64 a parameter, for as long as the node trains."""
    width = 400
    model = Net(lambda n, x: n.out(x).square().sum(2), out=nn.Linear(width, width, bias=False))
    found = []
    for worth in (width * width, width * width + 1):
        monkeypatch.setattr(noise, "_WORTH", worth)
        peak = peak_of_step(model, batch_of(8, 4, width), lambda outputs, target: outputs.sum(1))
        found.append(peak.fixed)
    assert found[0] - found[1] == 8 * width * width
