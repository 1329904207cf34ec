"""Clipped sums of per-record gradients by book-keeping: one backward pass, no second one.

Bu, Wang, Zha and Karypis 2022 (arXiv:2210.00038v2), algorithm 1, in four moves:

    1  forward: each layer with parameters runs as a graph node in which they are constants, so
       that autograd makes input gradients only
    2  backward: each layer keeps its input and output gradient, or makes of them the gradients of
       its few parameters for each record (`costs.py` chooses, from shapes)
    3  each record's norm, over all layers, and from it the factor min(1, C / norm)
    4  one weighted product for each layer gives the clipped sum

The model is as it was between passes: no hooks stay on it, `requires_grad` is untouched, and a
forward pass outside of `backward` is a plain one.

| edge case                              | what happens                                        |
|----------------------------------------|-----------------------------------------------------|
| empty batch                            | nothing to run: the sum is zero                     |
| layer called several times (a shared   | its calls are one longer sequence, or their         |
| encoder, a loop over time)             | gradients are added up, before the norm             |
| layer not used, or only for some calls | it, or that call, contributes zero                  |
| parameter in several layers (tied)     | gradients of all uses are instantiated and added    |
| parameter used outside its layer       | ModelError                                          |
| NaN or inf in a record                 | its norm is not finite: factor 0, and its numbers   |
|                                        | are replaced by zeros before any product            |
| equal tokens in a record               | their rows are added up before the norm             |
| `padding_idx`                          | its row gets no gradient                            |
| padding modes of convolutions          | padded first, so that all are exact                 |
| an input shared by all records (1, T)  | expanded to (B, T)                                  |
| an input with another number of rows   | ModelError; see `probe`                             |
| packed sequences                       | ModelError: records come in another order           |
| bf16 autocast                          | products as autocast has them; norms and sums in    |
|                                        | the parameters' own dtype                           |
| trained parameters not in the optimizer| ModelError                                          |
| batch of another size, or another mask | nothing is carried over from the pass before        |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.privacy.clipping.book import Book, Owners
from fedfuse.privacy.clipping.convolution import ConvLayer
from fedfuse.privacy.clipping.embedding import EmbeddingLayer
from fedfuse.privacy.clipping.fallback import FallbackLayer
from fedfuse.privacy.clipping.layer import Layer, Pass
from fedfuse.privacy.clipping.linear import LinearLayer
from fedfuse.privacy.clipping.norms import NORMS
from fedfuse.privacy.clipping.recurrent import (
    RecurrentGuard,
    is_recurrent,
    is_recurrent_linear,
)
from fedfuse.privacy.sums import Sums

__all__ = ["BookKeeping"]

_LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.Embedding: EmbeddingLayer,
    **NORMS,
}
"""By exact type: a subclass may compute something else."""


def _layer_type(module: nn.Module) -> type[Layer] | None:
    return LinearLayer if is_recurrent_linear(module) else _LAYERS.get(type(module))


class BookKeeping:
    """A model, and the norms and clipped sums of its per-record gradients."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ModelError where a trained parameter has no layer to give its gradient."""
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.layers: list[Layer] = []
        self._guarded: list[tuple[nn.Module, RecurrentGuard]] = []
        self._owners: Owners | None = None
        self._probed = False
        self._find_layers()
        self._exchange = [(layer.module.__dict__, layer.forward) for layer in self.layers] + [
            (module.__dict__, guard.forward) for module, guard in self._guarded
        ]
        self._bind(self.parameters)

    def _find_layers(self) -> None:
        places = {id(p): place for place, p in enumerate(self.parameters)}
        users: dict[int, int] = {}

        def visit(name: str, module: nn.Module) -> None:
            if module in seen:
                return
            seen.add(module)
            own = {
                key: places[id(p)]
                for key, p in module.named_parameters(recurse=False)
                if id(p) in places
            }
            if is_recurrent(module):
                self._guarded.append((module, RecurrentGuard(name, module)))
                own = {}  # the parameters are its cells', under other names
            kind = _layer_type(module)
            if own and kind is not None:
                self.layers.append(kind(name, module, own))
            elif own:
                if module is self.model:
                    raise ModelError(
                        f"the model itself holds parameter {next(iter(own))!r}, for which there "
                        "is no per-record gradient",
                        where="model",
                        hint="put it into a module of its own that is called with a tensor "
                        "(B, ...), or take an nn.Embedding",
                    )
                own = {k: places[id(p)] for k, p in module.named_parameters() if id(p) in places}
                self.layers.append(FallbackLayer(name, module, own))
                seen.update(module.modules())
            if own:
                for place in own.values():
                    users[place] = users.get(place, 0) + 1
                return
            for key, child in module.named_children():
                visit(f"{name}.{key}".lstrip("."), child)

        seen: set[nn.Module] = set()
        visit("", self.model)
        for layer in self.layers:
            layer.alone &= all(users[place] == 1 for place in layer.places.values())

    def _bind(self, parameters: Sequence[nn.Parameter]) -> None:
        device = parameters[0].device if parameters else torch.device("cpu")
        self._pass = Pass(Book(parameters), device)

    @property
    def book(self) -> Book:
        """What the last backward pass left."""
        return self._pass.book

    def backward(
        self,
        batch: Batch,
        loss: Callable[[Tensor, Tensor], Tensor],
        owners: Tensor | None = None,
    ) -> None:
        """Runs the model and its backward pass; the book then holds each record's gradients.

        batch   of one record at least
        owners  (B,) int64, ascending from 0: whose each record is; None: each is its own unit

        Raises ModelError where a layer does not see one row a record, or a parameter is used
        outside its layer.
        """
        if not self._probed:
            self.probe(batch)
        self._owners = None if owners is None else Owners.from_ids(owners)
        for p in self.parameters:
            p.grad = None
        with self._recording(len(batch)):
            losses = loss(self.model(batch), batch.target)
        with torch.autocast(batch.target.device.type, enabled=False):
            if losses.requires_grad:
                losses.sum().backward()
            with torch.no_grad():
                for layer in self.layers:
                    layer.end()
        for p in self.parameters:
            if p.grad is not None:
                self._refuse_outside(p)

    def expect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raises ModelError unless these are the trained parameters, in the model's order."""
        if len(parameters) != len(self.parameters) or any(
            p is not q for p, q in zip(parameters, self.parameters, strict=True)
        ):
            raise ModelError(
                "the optimizer does not hold exactly the trained parameters of the model, in order",
                where="model",
                hint="freeze the others with requires_grad = False before the engine is made",
            )

    @torch.no_grad()
    def squares(self, parts: Sequence[Sequence[int]]) -> Tensor:
        """(P, U): by part (places of parameters) and unit, the squared norm of the gradient."""
        with torch.autocast(self.parameters[0].device.type, enabled=False):
            return self.book.squares(parts, self._owners)

    @torch.no_grad()
    def add_sums(self, parts: Sequence[Sequence[int]], factors: Tensor, sums: Sums) -> None:
        """Adds to `sums` the units' gradients times `factors` (P, U), and closes the book."""
        with torch.autocast(self.parameters[0].device.type, enabled=False):
            self.book.add_sums(parts, factors, sums, self._owners)
        self.book.close()

    def probe(self, batch: Batch) -> None:
        """Runs the model on made-up batches of three and of four records, without gradients.

        A layer that gets positions for rows, or another fixed number, is found out here, also
        where by chance a real batch has as many records; a layer that gets one row in both is
        taken to get what all records share. Raises ModelError.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self._pass.probing = True
            for rows in (3, 4):
                with self._recording(rows):
                    self.model(batch.blank(rows))
            self._pass.probing = False
        self._probed = True

    @contextmanager
    def _recording(self, rows: int) -> Iterator[None]:
        """Each layer's forward pass is its own inside."""
        self._pass.rows = rows
        self.book.open(rows)
        for layer in self.layers:
            layer.begin(self._pass)
        before = [own.get("forward") for own, _ in self._exchange]
        try:
            for own, forward in self._exchange:
                own["forward"] = forward
            yield
        finally:
            for (own, _), forward in zip(self._exchange, before, strict=True):
                if forward is None:
                    del own["forward"]
                else:
                    own["forward"] = forward

    def _refuse_outside(self, p: nn.Parameter) -> Any:
        name = next(n for n, q in self.model.named_parameters() if q is p)
        raise ModelError(
            f"parameter {name!r} is used outside its own layer's call, where there is no "
            "per-record gradient",
            where="model",
            hint="call the layer, or give each use a layer of its own",
        )
