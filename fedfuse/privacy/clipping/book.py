"""What one backward pass leaves for each parameter: the norms, and the clipped sum.

A parameter's per-record gradients lie in the book in one of two forms: *instantiated*, as rows of
numbers, or as an *entry*, which knows its squared norms and its weighted sum without them. Small
instantiated ones lie side by side in one slab, so that a model's many biases and norms take one
reduction and one product together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from fedfuse.kernels.library import Room, plain
from fedfuse.privacy.clipping.costs import SMALL
from fedfuse.privacy.lengths import lengths
from fedfuse.privacy.sums import Sums

__all__ = ["Book", "Entry", "Owners", "stored"]


@dataclass(frozen=True, slots=True)
class Owners:
    """Whose each record is.

    of     (B,) int64, ascending from 0
    place  (B,) int64, a record's number among its owner's
    units  how many owners there are
    most   the most records of one owner
    """

    of: Tensor
    place: Tensor
    units: int
    most: int

    @classmethod
    def from_ids(cls, owners: Tensor) -> Owners:
        """From (B,) int64, ascending from 0 without gaps."""
        if len(owners) == 0:
            return cls(owners, owners, 0, 0)
        counts = torch.bincount(owners)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(owners), device=owners.device) - first[owners]
        return cls(owners, place, len(counts), int(counts.max()))

    def only(self, rows: Tensor | None) -> Owners:
        """The same of some records, in their order; units keep their numbers."""
        if rows is None:
            return self
        return replace(self, of=self.of[rows], place=self.place[rows])

    def side_by_side(self, x: Tensor) -> Tensor:
        """(B, T, n) -> (U, most T, n): a unit's records one after the other, then zeros."""
        out = x.new_zeros((self.units, self.most, *x.shape[1:]))
        out[self.of, self.place] = x
        return out.flatten(1, 2)


class Entry(Protocol):
    """The per-record gradients of one weight, not written out."""

    place: int

    def squares(self, owners: Owners | None) -> Tensor:
        """(U,) squared norms of the units' gradients; rounded up, never down."""
        ...

    def add_sum(self, factors: Tensor, broken: Tensor | None, out: Tensor) -> None:
        """Adds to `out` (n,), the weight's numbers, the sum of factors[i] times gradient i.

        factors (B,), 0 for each record of `broken` (B,) bool, whose numbers may be anything.
        """
        ...


@dataclass(slots=True)
class _Run:
    """Neighbours in the slab that are of one part."""

    part: int
    columns: slice
    places: list[int]
    sums: Sums | None = None
    joined: list[Tensor] = field(default_factory=list)
    """What the places have in `sums`."""


class Book:
    """One pass over B records. Made once for a model; `open` clears it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.rows = 0
        self._entries: list[tuple[Entry, Tensor | None]] = []
        self._large: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._order: dict[int, tuple[int, ...] | None] = {}
        self._found: dict[int, Tensor] = {}
        """Squared norms that are known already, of rows of `_large`."""
        self._written: set[int] = set()
        self._columns: dict[int, slice] = {}
        stop = 0
        for place, p in enumerate(self.parameters):
            if p.numel() <= SMALL:
                self._columns[place] = slice(stop, stop + p.numel())
                stop += p.numel()
        self._width = stop
        self._kept: Tensor | None = None
        self._now: Tensor | None = None
        self._parts: Sequence[Sequence[int]] = ()
        self._arrangement: tuple[dict[int, int], list[_Run]] = ({}, [])

    def open(self, rows: int) -> None:
        """Begins a pass over `rows` records."""
        self.rows = rows
        self._now = None
        self.close()

    def close(self) -> None:
        """Drops what the pass left, and with it the activations that entries hold."""
        self._entries.clear()
        self._large.clear()
        self._order.clear()
        self._found.clear()
        self._written.clear()

    def room(self, place: int) -> Tensor:
        """(B, n) to write the gradients of a parameter of n numbers to, before `instantiate`.

        That of a large one is made anew: in the backward pass it takes the place of activations
        that are no longer needed, where memory kept from the step before would add to the peak.
        """
        p = self.parameters[place]
        columns = self._columns.get(place)
        if columns is not None:
            return self._rows_of_slab().narrow(1, columns.start, p.numel())
        return torch.empty((self.rows, p.numel()), dtype=p.dtype, device=p.device)

    def claim(self, *places: int) -> list[Room] | None:
        """Where in the slab a kernel writes each of these parameters' gradients (B, n) at once.

        None where gradients have to be given to `instantiate`: those of a large parameter, those
        that are added to others, and those in a dtype that there are no kernels for.
        """
        if not all(place in self._columns and place not in self._written for place in places):
            return None
        slab = self._rows_of_slab()
        if not plain(slab):
            return None
        self._written.update(places)
        whole = Room.of(slab)
        return [whole.column(self._columns[place].start) for place in places]

    def _rows_of_slab(self) -> Tensor:
        """(B, S), kept from step to step."""
        if self._now is not None:
            return self._now
        if self._kept is None or len(self._kept) < self.rows:
            some = [self.parameters[place] for place in self._columns]
            dtype = max((p.dtype for p in some), key=lambda kind: kind.itemsize)
            size = (self.rows, self._width)
            self._kept = torch.empty(size, dtype=dtype, device=some[0].device)
        self._now = self._kept[: self.rows]
        return self._now

    def enter(self, entry: Entry, live: Tensor | None = None) -> None:
        """Adds an entry, of all records or of those that `live` (n,) numbers."""
        self._entries.append((entry, live))

    def instantiate(
        self,
        place: int,
        grads: Tensor,
        live: Tensor | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        """Adds `grads` (B, *shape), or (B, n), to a parameter's per-record gradients.

        With `live` (n,) the rows are those records'; the others' gradients are zero. With `order`
        a record's gradient is ``grads[i].permute(order)``.
        """
        if order is not None and (place in self._columns or place in self._written):
            grads = grads.permute(0, *(1 + i for i in order))
            order = None
        if place in self._written:
            grads = grads.flatten(1)
            if place in self._large:
                grads = _all(grads, live, self.rows) + self._in_order(place)
                self._large[place], self._order[place] = (grads, None), None
            elif live is None:
                self.room(place).add_(grads)
            else:
                self.room(place).index_add_(0, live, grads)
            return
        self._written.add(place)
        if place not in self._columns:
            self._large[place], self._order[place] = (grads.flatten(1), live), order
            return
        room, grads = self.room(place), grads.flatten(1)
        if live is None:
            room.copy_(grads)
        else:
            room.zero_().index_copy_(0, live, grads)

    def write(
        self,
        place: int,
        live: Tensor | None,
        order: tuple[int, ...] | None,
        to: Callable[[Room, Tensor | None], Tensor],
    ) -> None:
        """As `instantiate`, once for a parameter in a pass, with gradients that `to` writes.

        to(out, rows)   writes the gradient (n,) of its record i to row rows[i] of out, or to row i
                        where there are no rows, and gives the squared norms
        """
        assert self.fresh(place)
        rooms = self.claim(place)
        if rooms is not None:
            self._order[place] = order
            if live is not None:
                self.room(place).zero_()
            to(rooms[0], live)
            return
        p = self.parameters[place]
        rows = self.rows if live is None else len(live)
        grads = torch.empty((rows, p.numel()), dtype=p.dtype, device=p.device)
        squares = to(Room.of(grads), None)
        shape = p.shape if order is None else stored(p.shape, order)
        self.instantiate(place, grads.view(-1, *shape), live, order)
        if place in self._large:
            self._found[place] = squares

    def _in_order(self, place: int) -> Tensor:
        """(B, n) of a large parameter, as its own numbers lie."""
        grads = _all(*self._large[place], self.rows)
        order = self._order.get(place)
        if order is None:
            return grads
        whole = grads.view(-1, *stored(self.parameters[place].shape, order))
        return whole.permute(0, *(1 + i for i in order)).flatten(1)

    def is_small(self, place: int) -> bool:
        """Whether a parameter's gradients lie in the slab, if they are instantiated."""
        return place in self._columns

    def fresh(self, place: int) -> bool:
        """Whether nothing is instantiated yet for a parameter, so that `room` is free."""
        return place not in self._written

    def _slab(self) -> Tensor | None:
        """(B, S), zero for parameters that the pass did not reach."""
        missing = self._columns.keys() - self._written
        if len(missing) == len(self._columns):
            return None
        for place in missing:
            self.room(place).zero_()
        return self._rows_of_slab()

    def squares(self, parts: Sequence[Sequence[int]], owners: Owners | None) -> Tensor:
        """(P, U): by part (places of parameters) and unit, the squared norm of the gradient.

        With owners, instantiated gradients are added up by unit on the way.
        """
        like = self.parameters[0]
        units = self.rows if owners is None else owners.units
        table = like.new_zeros((len(parts), units))
        part_of, runs = self._arranged(parts)
        of_part = table.unbind()
        for entry, live in self._entries:
            found = entry.squares(None if owners is None else owners.only(live))
            _add(of_part[part_of[entry.place]], found, live if owners is None else None)
        if owners is not None:
            self._add_up(owners)
        slab = self._slab()
        if slab is not None:
            for run in runs:
                of_part[run.part].add_(_squares(slab[:units, run.columns]))
        for place, (grads, live) in self._large.items():
            known = self._found.get(place)
            _add(of_part[part_of[place]], _squares(grads) if known is None else known, live)
        return table

    def _add_up(self, owners: Owners) -> None:
        def whole(grads: Tensor, live: Tensor | None) -> Tensor:
            of = owners.only(live).of
            return grads.new_zeros((owners.units, grads.shape[1])).index_add_(0, of, grads)

        slab = self._slab()
        if slab is not None:
            slab[: owners.units] = whole(slab, None)
        self._found.clear()  # of records; now it is units
        for place, (grads, live) in self._large.items():
            self._large[place] = (whole(grads, live), None)

    def _arranged(self, parts: Sequence[Sequence[int]]) -> tuple[dict[int, int], list[_Run]]:
        """Which part a place is in, and the slab by parts; made once, while parts stay the same."""
        if parts != self._parts:
            part_of = {place: number for number, part in enumerate(parts) for place in part}
            runs = []
            for part, some in groupby(self._columns, part_of.__getitem__):
                places = list(some)
                columns = slice(self._columns[places[0]].start, self._columns[places[-1]].stop)
                runs.append(_Run(part, columns, places))
            self._parts, self._arrangement = [tuple(part) for part in parts], (part_of, runs)
        return self._arrangement

    def add_sums(
        self,
        parts: Sequence[Sequence[int]],
        factors: Tensor,
        sums: Sums,
        owners: Owners | None,
    ) -> None:
        """Adds to each parameter's `sums` the sum of factor times gradient.

        factors  (P, U); a unit with factor 0 contributes nothing, whatever its numbers are
        """
        units = factors.shape[1]
        broken = (factors == 0).any(0)
        any_broken = bool(broken.any())
        part_of, runs = self._arranged(parts)
        of_part = factors.unbind()
        slab = self._slab()
        if slab is not None:
            slab = slab[:units]
            if any_broken:
                slab[broken] = 0
            for run in runs:
                self._add_columns(run, of_part[run.part] @ slab[:, run.columns], sums)
        for place, (grads, live) in self._large.items():
            mine = of_part[part_of[place]]
            if any_broken:
                grads[_some(broken, live)] = 0
            if self._order.get(place) is None:
                sums.flat[place].addmv_(grads.t(), _some(mine, live))
            else:
                total = torch.mv(grads.t(), _some(mine, live))
                sums.views[place].add_(self._shaped(place, total))
        if owners is not None:
            of_part = factors[:, owners.of].unbind()
            broken = broken[owners.of]
        for entry, live in self._entries:
            mine = _some(of_part[part_of[entry.place]], live)
            lost = _some(broken, live) if any_broken else None
            entry.add_sum(mine, lost, sums.flat[entry.place])

    def _add_columns(self, run: _Run, total: Tensor, sums: Sums) -> None:
        """Adds `total`, of the run's columns, to its parameters' sums."""
        for place in run.places:
            if self._order.get(place) is not None:
                columns = self._columns[place]
                mine = total[columns.start - run.columns.start : columns.stop - run.columns.start]
                mine.copy_(self._shaped(place, mine).reshape(-1))
        if run.sums is not sums:
            run.sums, run.joined = sums, sums.joined(run.places)
        torch._foreach_add_(run.joined, list(total.split([len(part) for part in run.joined])))

    def _shaped(self, place: int, numbers: Tensor) -> Tensor:
        """(n,) numbers of a parameter, as they are kept, in its shape."""
        shape, order = self.parameters[place].shape, self._order.get(place)
        if order is None:
            return numbers.view(shape)
        return numbers.view(stored(shape, order)).permute(order)


def stored(shape: torch.Size, order: tuple[int, ...]) -> list[int]:
    """The shape of which ``permute(order)`` has `shape`."""
    stored = [0] * len(shape)
    for i, size in zip(order, shape, strict=True):
        stored[i] = size
    return stored


def _some(values: Tensor, live: Tensor | None) -> Tensor:
    return values if live is None else values[live]


def _add(total: Tensor, values: Tensor, live: Tensor | None) -> None:
    if live is None:
        total.add_(values)
    else:
        total.index_add_(0, live, values)


def _all(grads: Tensor, live: Tensor | None, rows: int) -> Tensor:
    """(n, k) gradients of `live` records as (B, k)."""
    if live is None:
        return grads
    return grads.new_zeros((rows, grads.shape[1])).index_copy_(0, live, grads)


def _squares(grads: Tensor) -> Tensor:
    """(U, n) -> (U,)."""
    return lengths(grads).square_()
