"""Whether a model may be trained with a promise: what would break it, where, and what to write.

Two looks. `problems` goes through the layers; it needs no record. `check` also runs the model on
made-up records and watches:

    buffers   that a forward pass changes: they keep statistics of records, and no noise covers them
    rows      another record in row j must change neither the output nor the gradient of row i
    one       a record alone must give what it gives in a batch
    engine    each record's gradient norm, and the sum of all, against a loop over single records
              (book-keeping; Opacus's hooks are refused by layer where they were seen to be off)

What the second look finds is where the first cannot look: a mean over the batch in somebody's
forward, a loss that couples records, a parameter that is used outside its layer. It looks at a few
random records, so it can miss what happens to others; it never takes a fault for the lack of one.

    >>> from fedfuse.batch import Batch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(2, 1)
    ...     def forward(self, batch):
    ...         x = batch.inputs["x"]
    ...         return self.layer(x - x.mean(0))
    >>> made = Batch({"x": torch.randn(4, 2)}, {"x": torch.ones(4, dtype=torch.bool)},
    ...              torch.zeros(4))
    >>> [finding.where for finding in check(Net(), made)]
    ['model']
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.privacy.clipping.bookkeeping import BookKeeping
from fedfuse.privacy.clipping.fallback import FallbackLayer
from fedfuse.privacy.lengths import lengths
from fedfuse.privacy.sums import Sums

__all__ = ["Finding", "check", "check_model", "problems", "refuse"]

_CROSS_RECORD = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_Seen = tuple[list[Tensor], Tensor]
"""A layer's inputs and its output, of some rows."""
_CLOSE = 1e-4
"""Of the largest output or gradient: what the same record may differ by from run to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a model, or worth knowing."""

    where: str
    """The module's path, or "model"."""
    what: str
    hint: str
    fatal: bool = True
    """False: the promise holds, but the run may cost or learn less than it could."""


def refuse(findings: Sequence[Finding]) -> None:
    """Raises ModelError, with all that is fatal, where anything is."""
    fatal = [finding for finding in findings if finding.fatal]
    if fatal:
        raise ModelError(
            "; ".join(finding.what for finding in fatal),
            where="model",
            hint="; ".join(dict.fromkeys(f.hint for f in fatal if f.hint)),
        )


def check_model(model: nn.Module, clipping: str = "bookkeeping") -> None:
    """Raises ModelError on a layer that mixes records, or one that `clipping` is not right for."""
    refuse([*problems(model, clipping)][:1])


def problems(model: nn.Module, clipping: str = "bookkeeping") -> Iterator[Finding]:
    """What the layers alone show to be wrong under a way of clipping."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _CROSS_RECORD):
            yield Finding(
                where=name,
                what=f"layer {name!r} is a {kind}, which mixes records or keeps statistics of them",
                hint="use nn.GroupNorm or nn.LayerNorm",
            )
        if getattr(module, "mixes_records", False):
            yield Finding(
                where=name,
                what=f"part {name!r} has a loss over the whole batch, in which one record's "
                "gradient depends on others",
                hint="take model.auxiliary.anchors or alignment",
            )
        own = [key for key, value in module.named_parameters(recurse=False) if value.requires_grad]
        if own and (wrong := _depends_on_the_batch(module)):
            yield Finding(
                where=name,
                what=f"layer {name!r} is a {kind} with {wrong}, which makes one record's gradient "
                "depend on others",
                hint="leave that setting out",
            )
        if own and (better := _rows_are_not_first(module)):
            yield Finding(
                where=name,
                what=f"layer {name!r} is a {kind} that does not give one row for each record, for "
                "which there is no per-record gradient",
                hint=better,
            )
        if own and clipping == "hooks":
            yield from _hooks(name, module, own[0])


def _depends_on_the_batch(module: nn.Module) -> str:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm"
    return "scale_grad_by_freq" if getattr(module, "scale_grad_by_freq", False) else ""


def _rows_are_not_first(module: nn.Module) -> str:
    """What to write instead of a layer whose outputs are not by record, or ""."""
    if type(module) in (nn.GRU, nn.LSTM, nn.RNN):
        return f"take opacus.layers.DP{type(module).__name__} with batch_first=True"
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        return "set batch_first=True"
    return ""


def _hooks(name: str, module: nn.Module, parameter: str) -> Iterator[Finding]:
    if wrong := _wrong_under_hooks(module):
        yield Finding(
            where=name,
            what=f"layer {name!r} is a {type(module).__name__} with {wrong}, for which Opacus 1.6 "
            "gives wrong per-record gradients or none",
            hint='leave that setting out, or take privacy.clipping = "bookkeeping"',
        )
    from opacus.grad_sample import GradSampleModule

    if type(module) not in GradSampleModule.GRAD_SAMPLERS:
        yield Finding(
            where=name or "model",
            what=f"layer {name or 'model'!r} ({type(module).__name__}) holds parameter "
            f"{parameter!r}, for which there is no per-record gradient",
            hint="build it from Linear, Conv, Embedding, GroupNorm and LayerNorm",
        )


def _wrong_under_hooks(module: nn.Module) -> str:
    """The setting of a layer under which Opacus's hooks were seen to be off, or ""."""
    if getattr(module, "padding_idx", None) is not None:
        return "padding_idx"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "a padding_mode other than zeros"
    if isinstance(module, nn.LayerNorm) and "bias" not in dict(module.named_parameters()):
        return "bias=False"
    return ""


def check(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    clipping: str = "bookkeeping",
) -> tuple[Finding, ...]:
    """All that was found, the fatal ones first; the model stays as it is.

    batch  made-up records, three at least, with all that records of this kind may hold
    loss   (outputs (B, ...), target (B, ...)) -> (B,); None: a fixed sum of each row's outputs
    """
    found = [*problems(model, clipping)]
    if found:
        return tuple(found)  # what follows would only show the same again, less clearly
    work = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        found += _by_running(work, batch, loss or _fixed_sum, clipping)
    return tuple(sorted(found, key=lambda finding: not finding.fatal))


def _by_running(model: nn.Module, batch: Batch, loss: Any, clipping: str) -> Iterator[Finding]:
    model.train()
    try:
        yield from _buffers(model, batch)
        losses = loss(model(batch), batch.target)
    except ModelError:
        raise
    except Exception as error:
        yield _fails("a batch", error)
        return
    if losses.shape != (len(batch),):
        yield Finding(
            where="loss",
            what=f"the loss of {len(batch)} records has the shape {tuple(losses.shape)}",
            hint="give one number for each record, and no mean over the batch",
        )
        return
    mixed = _mixed_rows(model, batch, loss)
    if mixed is not None:
        yield mixed
        return
    _without_chance(model, batch)
    try:
        alone = torch.cat([_as_rows(model(batch[slice(i, i + 1)])) for i in range(len(batch))])
    except Exception as error:
        yield _fails("one record alone", error)
        return
    if _apart(alone, _as_rows(model(batch))):
        yield Finding(
            where="model",
            what="a record alone gives another output than in a batch",
            hint="let no shape or statistic of the whole batch reach a record's output",
        )
        return
    if clipping != "hooks":
        wrong = [*_engine(model, batch, loss)]
        yield from wrong or _taken_whole(model)
    yield from _idle(model, batch, loss)


def _without_chance(model: nn.Module, batch: Batch) -> None:
    """Takes dropout off and leaves the model in training; in eval mode where chance is left."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(model(batch))
    if _apart(*outputs):
        model.eval()


def _fails(what: str, error: Exception) -> Finding:
    return Finding(
        where="model",
        what=f"the model fails on {what} ({type(error).__name__}: {error})",
        hint="squeeze and reshape with explicit dimensions, the batch first",
    )


def _buffers(model: nn.Module, batch: Batch) -> Iterator[Finding]:
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(batch)
    for name, value in model.named_buffers():
        if not torch.equal(value, before[name]):
            yield Finding(
                where=name.rpartition(".")[0] or "model",
                what=f"buffer {name!r} is changed by a forward pass: it keeps what it saw of "
                "records, and no noise covers it",
                hint="compute it from public numbers once, or from each record alone",
            )


def _mixed_rows(model: nn.Module, batch: Batch, loss: Any) -> Finding | None:
    """Whether another record in one row changes what the others give."""
    for j in (0, len(batch) - 1):
        other = _with_another(batch, j)
        rest = [i for i in range(len(batch)) if i != j]
        first, paths = _run(model, batch, rest, loss)
        second, others = _run(model, other, rest, loss)
        if _apart(first[0], second[0]):
            where = _where(paths, others)
            return Finding(
                where=where,
                what=("the model's own forward" if where == "model" else f"layer {where!r}")
                + " lets one record's output depend on another's",
                hint="let no operation go over the batch's dimension: normalise, compare and sort "
                "within a record",
            )
        if any(_apart(a, b) for a, b in zip(first[1], second[1], strict=True)):
            return Finding(
                where="loss",
                what="the loss lets one record's gradient depend on another's",
                hint="each record's loss is of its own outputs and target alone; contrast between "
                "records of a batch has no bound C",
            )
    return None


def _where(first: dict[str, _Seen], second: dict[str, _Seen]) -> str:
    """The first layer whose inputs are the same for the other rows and whose outputs are not."""
    for name, (given, output) in first.items():
        if name in second:
            others, other = second[name]
            same = len(given) == len(others) and not any(
                _apart(a, b) for a, b in zip(given, others, strict=True)
            )
            if given and same and _apart(output, other):
                return name
    return "model"


def _run(
    model: nn.Module, batch: Batch, rows: list[int], loss: Any
) -> tuple[tuple[Tensor, list[Tensor]], dict[str, _Seen]]:
    """(outputs and gradients of `rows` together, what each layer saw by its path, in order)."""
    seen: dict[str, _Seen] = {}

    def some(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(batch)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if some(output):
                inputs = [value.detach()[rows].clone() for value in given if some(value)]
                seen.setdefault(name, (inputs, output.detach()[rows].clone()))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        torch.manual_seed(0)  # the same dropout both times
        outputs = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    trained = [p for p in model.parameters() if p.requires_grad]
    total = loss(outputs, batch.target)[rows].sum()
    grads = torch.autograd.grad(total, trained, allow_unused=True) if total.requires_grad else []
    return (
        outputs.detach()[rows],
        [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(trained, grads, strict=False)
        ],
    ), seen


def _with_another(batch: Batch, row: int) -> Batch:
    """`batch` with the contents of another record in `row`, further from it where it is numbers."""
    away = (row + 1) % len(batch)
    inputs = {}
    for name, value in batch.inputs.items():
        value = value.clone()
        value[row] = value[away] if not value.is_floating_point() else 3 - 2 * value[away]
        inputs[name] = value
    target = batch.target.clone()
    target[row] = target[away]
    present = {name: value.clone() for name, value in batch.present.items()}
    return Batch(inputs, present, target)


def _engine(model: nn.Module, batch: Batch, loss: Any) -> Iterator[Finding]:
    """The engine's norms and sum against a loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    try:
        book = BookKeeping(model)
        book.backward(batch, loss)
        places = [range(len(trained))]
        squares = book.squares(places)[0]
        sums = Sums(trained)
        book.add_sums(places, torch.ones(1, len(batch)).to(squares), sums)
    except ModelError as error:
        yield Finding(where=error.where or "model", what=error.what, hint=error.hint)
        return
    total = [torch.zeros_like(p) for p in trained]
    norms = []
    for i in range(len(batch)):
        one = batch[slice(i, i + 1)]
        grads = torch.autograd.grad(loss(model(one), one.target).sum(), trained, allow_unused=True)
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)]
        norms.append(torch.stack([lengths(g.flatten()) for g in own]).norm())
        for part, g in zip(total, own, strict=True):
            part += g
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    scale = max(float(torch.stack(norms).max()), 1e-12)
    wrong = [
        name
        for name, a, b in zip(names, sums.views, total, strict=True)
        if float((a - b).norm()) > 10 * _CLOSE * scale
    ]
    if wrong or _apart(squares.sqrt(), torch.stack(norms), 10 * _CLOSE):
        yield Finding(
            where=wrong[0] if wrong else "model",
            what="the per-record gradients of the engine are not those of a loop over records"
            + (f", first in {wrong[0]!r}" if wrong else ""),
            hint="does a layer give the same for the same input, and is each parameter used in its "
            "own layer's call? otherwise build it from Linear, Conv, Embedding and LayerNorm",
        )


def _taken_whole(model: nn.Module) -> Iterator[Finding]:
    for layer in BookKeeping(model).layers:
        if isinstance(layer, FallbackLayer):
            yield Finding(
                where=layer.name,
                what=f"layer {layer.name!r} ({type(layer.module).__name__}) is taken as one whole: "
                "its per-record gradients are exact, but written out",
                hint="built from Linear, Conv, Embedding and LayerNorm it takes less memory",
                fatal=False,
            )


def _idle(model: nn.Module, batch: Batch, loss: Any) -> Iterator[Finding]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = loss(model(batch), batch.target).sum()
    if not total.requires_grad:
        return
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        total, list(trained.values()), allow_unused=True
    )
    for name, grad in zip(trained, grads, strict=True):
        if grad is None:
            yield Finding(
                where=name,
                what=f"parameter {name!r} is trained, but no output rests on it: it gets nothing "
                "but noise",
                hint="leave it out, or freeze it with requires_grad = False",
                fatal=False,
            )


def _fixed_sum(outputs: Tensor, target: Tensor) -> Tensor:
    rows = _as_rows(outputs)
    return rows @ torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype, device=rows.device)


def _as_rows(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), -1)


def _apart(a: Tensor, b: Tensor, close: float = _CLOSE) -> bool:
    if a.shape != b.shape:
        return True
    a, b = a.detach().double(), b.detach().double()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-12) if a.numel() else 1.0
    return bool(((a - b).abs() > close * scale).any())
