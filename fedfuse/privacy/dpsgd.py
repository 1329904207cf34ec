"""One private step: per-record gradients clipped, summed, noised, divided.

The clipped sums come from one backward pass (`clipping/bookkeeping.py`), or from the per-record
gradients of Opacus's hooks (`GradSampleModule`). The order of a step is that of Opacus's
`DPOptimizer`, and without noise its numbers are the same (a test compares them). Opacus itself is
loaded where its hooks are asked for: it takes seconds and 100 MB. Three things are other than in
its step, each for a reason:

    clipping  a record whose gradient is not finite counts as zero, so that one broken record
              neither stops the step nor escapes the bound
    noise     from an AES-256 stream (see noise.py), not from torch's global generator
    divisor   the public expected batch size, never the number of records drawn

A unit is what the promise is about: a record, or all drawn records of a subject, whose gradients
are added up before they are clipped.

Guarantees (neighbours: add or remove one unit; adversary: sees every update)
    The sum before noise moves by at most C in L2 when one unit comes or goes. Noise has standard
    deviation sigma * C in each coordinate. An empty batch is a step like any other.
    With shares, each part of the model is clipped at its own bound; the squares of the bounds add
    up to the square of C, so the whole sum still moves by at most C.
    With an adaptive C, sum and count are one Gaussian mechanism of `noise_multiplier` together
    (Andrew et al. 2021, arXiv:1905.03871v5, theorem 1).
Not covered
    A model in which one record's output depends on another's (batch norm, in-batch contrast);
    `safety.py` refuses those that it can see.

| edge case            | what happens                                        |
|----------------------|-----------------------------------------------------|
| empty batch          | zero sum + noise                                    |
| zero gradient        | contributes zero                                    |
| NaN or inf gradient  | its whole unit contributes zero                     |
| batch above the cap  | clipped in parts, summed, noised once; the records  |
|                      | of a subject stay together, whatever the cap        |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfuse.allocator import keep_freed_memory
from fedfuse.batch import Batch
from fedfuse.errors import ModelError, PrivacyError
from fedfuse.privacy.clipping.bookkeeping import BookKeeping
from fedfuse.privacy.lengths import lengths
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.safety import check_model
from fedfuse.privacy.sums import Sums

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule

__all__ = [
    "Loss",
    "Part",
    "PrivateOptimizer",
    "RecordGradients",
    "prepare",
    "private_step",
    "set_hooks",
    "with_record_gradients",
]

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, C), target (B,)) -> loss of each record (B,)."""

RecordGradients: TypeAlias = "BookKeeping | GradSampleModule"
"""A model that gives the gradients of single records, by either way of `prepare`."""


def prepare(model: nn.Module, clipping: str = "bookkeeping") -> RecordGradients:
    """`model` made ready for private steps, `clipping` as in PrivacyConfig.

    The loss must give one number a record; a private step sums them. Raises ModelError where the
    model is one that this way of clipping is not right for.
    """
    keep_freed_memory()
    if clipping == "hooks":
        return with_record_gradients(model)
    check_model(model)
    return BookKeeping(model)


def with_record_gradients(model: nn.Module) -> GradSampleModule:
    """`model` with hooks of Opacus that leave per-record gradients in ``p.grad_sample``.

    The model's loss must be a sum over records, never a mean: a mean would scale each record's
    gradient by the number drawn.
    """
    from opacus.grad_sample import GradSampleModule

    check_model(model, clipping="hooks")
    # A first layer's inputs need no gradient; torch says so at each step, and it is no problem.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    return GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=True)


def set_hooks(model: RecordGradients, *, on: bool) -> None:
    """Turns hooks on or off; book-keeping has none, and leaves the model alone between steps."""
    if not isinstance(model, BookKeeping):
        (model.enable_hooks if on else model.disable_hooks)()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the parameters, by their places in the optimizer, and their share of C."""

    name: str
    places: tuple[int, ...]
    share: float = 1.0
    """The part is clipped at share * C; the squares of all shares add up to at most 1."""


class PrivateOptimizer:
    """An optimizer whose gradients are clipped sums with noise over a public divisor.

    ``p.grad_sample`` and ``p.summed_grad`` are as with Opacus's DPOptimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch: float,
        stream: NoiseStream,
        parts: Sequence[Part] = (),
        watched: Sequence[Part] = (),
        count_noise: float = 0.0,
    ) -> None:
        """`noise_multiplier`: of the sum alone. `parts`: clipped each by itself; none: all as one.
        `watched`: the parts whose signal `signal` tells; none: those that are clipped.
        `count_noise`: sigma_b of the count of unclipped units; 0: nothing is counted."""
        self.original_optimizer = optimizer
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, clip_norm
        self.divisor = expected_batch
        self.stream = stream
        self.params: list[Any] = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        """The parameters; `Part.places` count them."""
        self._sums = Sums(self.params)
        self.parts = tuple(parts) or (Part(name="all", places=tuple(range(len(self.params)))),)
        self.watched = tuple(watched) or self.parts
        if sorted(i for part in self.parts for i in part.places) != list(range(len(self.params))):
            raise ModelError("a parameter belongs to no part, or to several", where="model")
        if sum(part.share**2 for part in self.parts) > 1 + 1e-9:
            raise PrivacyError("the squares of the shares of C add up to more than 1")
        self.count_noise = count_noise
        self.unclipped: list[float] = []
        """A step's noisy count of unclipped units, less half of all units; for each step."""
        self._count = 0.0

    def begin(self) -> None:
        """Begins a step: all sums are zero; where it is of use, its noise begins to be made."""
        self._sums.clear()
        for p, view in zip(self.params, self._sums.views, strict=True):
            p.grad, p.grad_sample, p.summed_grad = None, None, view
        self._sums.make_noise(self.stream, self._std(), after=1 if self.count_noise else 0)

    def accumulate(self, owners: Tensor | None = None) -> None:
        """Adds the clipped sum of ``p.grad_sample`` to ``p.summed_grad`` and drops the former.

        owners  (B,) int64, ascending from 0: whose each record is; None: each is its own unit
        """
        if owners is not None:
            units = int(owners[-1]) + 1 if len(owners) else 0
            for p in self.params:
                whole = p.grad_sample.new_zeros((units, *p.shape))
                p.grad_sample = whole.index_add_(0, owners, p.grad_sample)
        norms = [
            torch.stack([lengths(self.params[i].grad_sample.flatten(1)) for i in part.places])
            for part in self.parts
        ]
        factors = self._factors(torch.stack([part.norm(dim=0) for part in norms]))
        finite = factors.gt(0).all(0)
        for part, factor in zip(self.parts, factors, strict=True):
            for i in part.places:
                p = self.params[i]
                if not bool(finite.all()):
                    p.grad_sample[~finite] = 0  # 0 x NaN would be NaN
                p.summed_grad += torch.einsum("i,i...", factor, p.grad_sample)
                p.grad_sample = None

    def accumulate_book(self, book: BookKeeping) -> None:
        """Adds the clipped sum of the gradients in `book` to ``p.summed_grad``."""
        book.expect(self.params)
        places = [part.places for part in self.parts]
        factors = self._factors(book.squares(places).sqrt_())
        book.add_sums(places, factors, self._sums.flat)

    def _factors(self, norms: Tensor) -> Tensor:
        """(P, U) factors for the norms (P, U) of each part of each unit; counts the unclipped."""
        bounds = norms.new_tensor([self.max_grad_norm * part.share for part in self.parts])
        factors = clip_factors(norms, bounds[:, None])
        if len(self.parts) > 1:  # a unit that is broken in one part counts as zero in all
            factors = torch.where(factors.gt(0).all(0), factors, 0.0)
        if self.count_noise:
            below = factors.ge(1).all(0)
            self._count += float(below.double().sum()) - 0.5 * below.numel()
        return factors

    def signal(self) -> dict[str, float]:
        """For each part, the squared norm of the clipped sum over that of the noise expected.

        It is computed from records without noise: it stays on the node.
        """
        std = self._std()
        norms = torch.stack(torch._foreach_norm([p.summed_grad for p in self.params]))
        power = norms.double().square().tolist()
        found = {}
        for part in self.watched:
            numbers = sum(self.params[i].numel() for i in part.places)
            found[part.name] = sum(power[i] for i in part.places) / (std**2 * max(1, numbers))
        return found

    def _std(self) -> float:
        """sigma C, the deviation of a step's noise."""
        return self.noise_multiplier * self.max_grad_norm

    def add_noise(self) -> None:
        """``p.grad = p.summed_grad + N(0, (sigma C)^2)``, in float64, cut to the model's dtype."""
        for p, view in zip(self.params, self._sums.views, strict=True):
            if p.summed_grad is not view:
                view.copy_(p.summed_grad)
        self._sums.add_noise(self.stream, self._std())
        for p, view in zip(self.params, self._sums.views, strict=True):
            p.grad, p.summed_grad = view, None

    def scale_grad(self) -> None:
        """Divides by the public expected batch size."""
        self._sums.divide(self.divisor)

    def pre_step(self) -> None:
        """Noise and division for sums that `accumulate` has made; clipping is already done."""
        if self.count_noise:
            noise = float(self.stream.normal(1, self.count_noise))
            self.unclipped.append(self._count + noise)
            self._count = 0.0
        self.add_noise()
        self.scale_grad()


def clip_factors(norms: Tensor, clip_norm: Tensor | float) -> Tensor:
    """min(1, C / norm) for each of `norms`; 0 where it is not finite.

    Abadi et al. 2016 (arXiv:1607.00133v2), algorithm 1. Norms in float32 carry a relative error
    of some 1e-7; C is shrunk by 1e-6 so that no contribution exceeds it.
    """
    factors = (clip_norm * (1 - 1e-6) / norms.clamp(min=1e-30)).clamp(max=1.0)
    return factors.nan_to_num_(nan=0.0)  # C / inf is 0 already


def private_step(
    model: RecordGradients,
    optimizer: PrivateOptimizer,
    batch: Batch,
    loss: Loss,
    *,
    physical_batch: int,
    owners: NDArray[np.int64] | None = None,
    adjust: Callable[[], None] | None = None,
    watch: Callable[[Mapping[str, float]], None] | None = None,
) -> None:
    """One step on `batch` (B may be 0), at most `physical_batch` records at once.

    model   as `prepare` gives it
    owners  (B,), ascending from 0: whose each record is; None: each record is its own unit
    adjust  may add to ``p.grad`` what does not depend on records (a proximal term)
    watch   is shown how strong the signal was, which must not leave the node
    """
    optimizer.begin()
    device = batch.target.device
    for rows, whose in _pieces(len(batch), owners, physical_batch):
        part = batch if rows.stop - rows.start >= len(batch) else batch[rows]
        owns = None if whose is None else torch.from_numpy(whose).to(device)
        if not isinstance(model, BookKeeping):
            loss(model(part), part.target).sum().backward()
            optimizer.accumulate(owns)
        elif len(part):
            model.backward(part, loss, owns)
            optimizer.accumulate_book(model)
    if watch is not None:
        watch(optimizer.signal())
    optimizer.pre_step()
    if adjust is not None:
        adjust()
    optimizer.original_optimizer.step()


def _pieces(
    count: int, owners: NDArray[np.int64] | None, most: int
) -> Iterator[tuple[slice, NDArray[np.int64] | None]]:
    """Slices of at most `most` rows, or of one unit where that is larger; a unit is never cut."""
    if owners is None:
        for start in range(0, max(1, count), most):
            yield slice(start, start + most), None
        return
    start = 0
    while True:
        stop = min(start + most, count)
        if stop < count and owners[stop] == owners[stop - 1]:
            first = int(np.searchsorted(owners, owners[stop]))
            stop = first if first > start else int(np.searchsorted(owners, owners[stop], "right"))
        piece = owners[start:stop]
        yield slice(start, stop), piece - piece[0] if len(piece) else piece
        start = stop
        if start >= count:
            return
