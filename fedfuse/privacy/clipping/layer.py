"""What the engine asks of a layer, and how a layer takes part in a private pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.errors import ModelError
from fedfuse.kernels import norms
from fedfuse.kernels.library import Room
from fedfuse.privacy.clipping.book import Book

__all__ = ["Layer", "Pass", "compute_dtype"]


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
        self.kept.append(tuple(x.detach() if x.requires_grad else x for x in tensors))
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

    def claim(self, *keys: str) -> list[Room] | None:
        """As `Book.claim` has it, for small parameters to which this call alone gives gradients."""
        places = [self.places[key] for key in keys if key in self.places]
        if self.calls != 1 or not self.alone or len(places) < len(keys):
            return None
        return self.now.book.claim(*places)

    def give_bias(self, g: Tensor) -> Tensor | None:
        """Puts the gradients of a bias into the book: the sums of g (B, T, d), or of pictures g
        (B, d, H, W), over their places.

        Returns the records (n,) whose g is not exactly zero, or None: most. A record without a
        modality has zero gradients throughout that modality's encoder: its share of the work can
        be left out, and the result is the same number.
        """
        look = g.numel() >= _WORTH_A_LOOK
        loud = (self._add_up if norms.can_add_up(g) else self._sum)(g, look)
        return None if loud is None or (len(g) - len(loud)) * 4 < len(g) else loud

    def _add_up(self, g: Tensor, look: bool) -> Tensor | None:
        rooms = self.claim("bias")
        if rooms is not None:
            return norms.place_sums(g, rooms[0], listen=look)
        sums = g.new_empty((len(g), g.shape[2 if g.dim() == 3 else 1]))
        loud = norms.place_sums(g, Room.of(sums), listen=look)
        self._emit_bias(sums)
        return loud

    def _sum(self, g: Tensor, look: bool) -> Tensor | None:
        sums = g.sum(1 if g.dim() == 3 else (2, 3))
        self._emit_bias(sums)
        if not look:
            return None
        silent = torch.eq(sums, 0).all(1)
        return None if bool(g[silent].any()) else torch.nonzero(~silent).squeeze(1)

    def _emit_bias(self, sums: Tensor) -> None:
        place, book = self.places.get("bias"), self.now.book
        if place is not None:
            book.instantiate(place, sums.to(book.parameters[place].dtype))


_WORTH_A_LOOK = 1 << 16
"""Below so many numbers, looking for rows to leave out costs more than it saves."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with `x` is computed in, under autocast or not."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
