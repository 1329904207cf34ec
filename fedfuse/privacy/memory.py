"""How much memory a private step will take, before one is taken on records.

A step is run twice on made-up records, with few rows and with twice as many, and the bytes of all
tensors that are alive at once are counted at every operation: activations, per-record gradients by
the ways that the engine chooses, the sums, the optimizer's state. All of that is a constant and a
share for each record, so the peak at any number of rows is on a line through the two.

Not counted: what a kernel takes inside itself and gives back, what the allocator loses between
pieces, and the interpreter with its libraries (some 300 MB).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedfuse.batch import Batch
from fedfuse.privacy.dpsgd import Loss, PrivateOptimizer, prepare, private_step
from fedfuse.privacy.noise import NoiseStream

__all__ = ["ALLOCATOR", "Peak", "peak_of_step"]

ALLOCATOR = 1.7
"""The most by which a process grew beyond the peak of its tensors, measured with glibc's allocator;
with one that gives memory back at once it was 1.0 to 1.07."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Bytes of one private step, at their most."""

    fixed: int
    """The model, its sums and the optimizer's state, whatever the number of records."""
    per_record: int

    def at(self, rows: int) -> int:
        """With `rows` records passing through the model at once."""
        return self.fixed + rows * self.per_record


def peak_of_step(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    *,
    optimizer: str = "sgd",
    clipping: str = "bookkeeping",
) -> Peak:
    """The peak of a private step of `model`, from steps of a copy of it.

    batch  made-up records, an even number of them, 2 at least
    """
    few = len(batch) // 2
    small, large = (
        _measured(model, batch[:rows], loss, optimizer, clipping) for rows in (few, 2 * few)
    )
    share = max(0, large - small) // few
    return Peak(fixed=max(0, small - few * share), per_record=share)


def _measured(model: nn.Module, batch: Batch, loss: Loss, optimizer: str, clipping: str) -> int:
    with torch.random.fork_rng(devices=[]):
        tracker = _Tracker()
        model = copy.deepcopy(model)
        tracker.count(model.state_dict().values())
        tracker.count([*batch.inputs.values(), *batch.present.values(), batch.target])
        trained = [p for p in model.parameters() if p.requires_grad]
        tracker.count(trained)
        with tracker:
            ready = prepare(model, clipping)
            inner = (
                torch.optim.Adam(trained, lr=0.0, fused=True)
                if optimizer == "adam"
                else torch.optim.SGD(trained, lr=0.0, momentum=0.9, fused=True)
            )
            private = PrivateOptimizer(
                inner,
                noise_multiplier=1.0,
                clip_norm=1.0,
                expected_batch=1.0,
                stream=NoiseStream(bytes(32), "noise", idle=1),  # the most that noise may take
            )
            for _ in range(2):  # the optimizer's state comes with the first one
                private_step(ready, private, batch, loss, physical_batch=len(batch))
        return tracker.most


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Adds storages that were there before, or have just been made."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in self._alive:
                continue

            def gone(_: object, key: int = key, size: int = size) -> None:
                self._alive.pop(key, None)
                self.now -= size

            self._alive[key] = weakref.ref(storage, gone)
            self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count(value for value in tree_leaves(found) if isinstance(value, Tensor))
        return found
