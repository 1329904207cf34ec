"""What the engine asks of a layer, and how a layer takes part in a private pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.errors import ModelError
from fedfuse.kernels import norms
from fedfuse.privacy.clipping.book import Book

__all__ = ["Layer", "Pass", "compute_dtype", "summed"]


class Pass:
    """What the layers share in a pass: the rows that each must see, and the book.

    `anchor` requires a gradient, so that a layer is in the graph also where its inputs need none
    (the first one), and no parameter has to be.
    """

    def __init__(self, book: Book, device: torch.device) -> None:
        self.book = book
        self.rows = 0
        self.probing = False
        self.anchor = torch.zeros((), device=device, requires_grad=True)


class Layer(ABC):
    """One module, whose `forward` is exchanged for this object's while a private pass runs.

    `forward` gives what the module would give, in a graph in which the module's parameters are
    constants; in the backward pass the layer keeps (input, output gradient) of each call, and
    `emit` turns those of all calls into per-record gradients in the book.
    """

    node: Any = None
    """The autograd Function of `run`: apply(x, anchor, layer)."""

    def __init__(self, name: str, module: nn.Module, places: Mapping[str, int]) -> None:
        """`places`: of the module's own trained parameters, by attribute name."""
        self.name = name
        self.module: Any = module
        self.places = dict(places)
        self.alone = True
        """Whether no other layer has a parameter of this one."""
        self.shared = False
        """Whether a call gets one row that all records share."""
        self.calls = 0
        self.kept: list[tuple[Tensor, ...]] = []
        """One tuple a call; what is in it is the subclass's affair."""
        self.now: Pass
        self.original: Any = module.forward

    def begin(self, now: Pass) -> None:
        """Before a forward pass."""
        self.now = now
        self.calls = 0
        self.kept.clear()

    def end(self) -> None:
        """After the backward pass: calls whose output was used, though not all outputs were."""
        if self.kept:
            self.emit(self.now.book, self.kept)
            self.kept.clear()

    def keep(self, *tensors: Tensor) -> None:
        """One call's input and output gradient. With the last call, the gradients are made."""
        # Detached: an input that stays in the book must not hold the graph that led to it.
        self.kept.append(tuple(x.detach() for x in tensors))
        if len(self.kept) == self.calls:
            self.emit(self.now.book, self.kept)
            self.kept.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives."""
        x = args[0] if args else kwargs["input"]
        x = self.whole(x)
        if not torch.is_grad_enabled():
            return self.original(x)
        self.calls += 1
        return self.run(x)

    def whole(self, x: Tensor) -> Tensor:
        """`x` with one row a record; one row alone (position ids) is every record's.

        Raises ModelError where it has another number of rows.
        """
        rows = self.now.rows
        if x.dim() > 1 and x.shape[0] == rows:
            return x
        self.shared |= self.now.probing
        if x.dim() > 1 and x.shape[0] == 1 and self.shared:
            return x.expand(rows, *x.shape[1:])
        raise ModelError(
            f"layer {self.name!r} is not given one row for each record",
            where="model",
            hint="the batch comes first in every layer's input, all records of it in their order: "
            "expand ids that all records share to (B, ...), encode absent rows too, pack nothing",
        )

    def run(self, x: Tensor) -> Any:
        """The module's output for `x` (B, ...)."""
        return self.node.apply(x, self.now.anchor, self)

    @abstractmethod
    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        """Puts the per-record gradients of all calls into the book."""

    def claim(self, *keys: str) -> list[Tensor] | None:
        """As `Book.claim` has it, for small parameters to which this call alone gives gradients."""
        places = [self.places[key] for key in keys if key in self.places]
        if self.calls != 1 or not self.alone or len(places) < len(keys):
            return None
        return self.now.book.claim(*places)

    def give_bias(self, g: Tensor) -> Tensor | None:
        """Puts the gradients of a bias into the book, and gives the rows that count: `summed` g."""
        place, rooms = self.places.get("bias"), self.claim("bias")
        sums, live = summed(g, rooms[0] if rooms else None)
        if place is not None and not rooms:
            book = self.now.book
            book.instantiate(place, sums.to(book.parameters[place].dtype))
        return live


_WORTH_A_LOOK = 1 << 16
"""Below so many numbers, looking for rows to leave out costs more than it saves."""


def summed(g: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The sums of g (B, T, d), or of pictures g (B, d, H, W), over their places: (B, d), in `out`
    if it is given; and the records (n,) whose g is not exactly zero, or None: most.

    A record without a modality has zero gradients throughout that modality's encoder: its share
    of the work can be left out, and the result is the same number.
    """
    found = norms.place_sums(g, out)
    if found is not None:
        sums, silent = found
    else:
        sums = g.sum(1 if g.dim() == 3 else (2, 3))
        if out is not None:
            sums = out.copy_(sums)
    if g.numel() < _WORTH_A_LOOK:
        return sums, None
    if found is None:
        silent = (sums == 0).all(1)
    if int(silent.sum()) * 4 < len(g) or (found is None and bool(g[silent].any())):
        return sums, None
    return sums, torch.nonzero(~silent).squeeze(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with `x` is computed in, under autocast or not."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
