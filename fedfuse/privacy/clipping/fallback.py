"""Any other module with parameters of its own: Opacus's rule for it, or a gradient by vmap.

The whole module, with what it contains, counts as one layer. Its forward pass runs again in the
backward pass, so it must give the same twice: dropout inside is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedfuse.errors import ModelError
from fedfuse.privacy.clipping.book import Book
from fedfuse.privacy.clipping.layer import Layer

__all__ = ["FallbackLayer"]


class FallbackLayer(Layer):
    """A module whose tensor arguments and outputs all have one row a record."""

    def __init__(self, name: str, module: nn.Module, places: Any) -> None:
        """Raises ModelError where the module gives another result each time."""
        from opacus.grad_sample import GradSampleModule

        super().__init__(name, module, places)
        self.alone = False
        self.sampler = GradSampleModule.GRAD_SAMPLERS.get(type(module))
        for inner in module.modules():
            chance = inner.p if isinstance(inner, nn.modules.dropout._DropoutNd) else 0.0
            chance = chance or getattr(inner, "dropout", 0.0)
            if isinstance(chance, int | float) and chance > 0:
                raise ModelError(
                    f"layer {name!r} ({type(module).__name__}) holds dropout, which its "
                    "per-record gradients cannot repeat",
                    where="model",
                    hint="set its dropout to 0, or build it from Linear, Conv and LayerNorm",
                )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(self.whole(v) if isinstance(v, Tensor) else v for v in args)
        kwargs = {k: self.whole(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        if not torch.is_grad_enabled():
            outputs = self.original(*args, **kwargs)
            _tensors(outputs, self)
            return outputs
        self.calls += 1
        flat = [*args, *kwargs.values()]
        tensors = [v for v in flat if isinstance(v, Tensor)]
        call = _Call(self, len(args), tuple(kwargs), flat)
        found = self.node.apply(self.now.anchor, call, *tensors)
        return call.as_given(found)

    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        """Each call is the gradients of `places`, in order, each (B, *shape)."""
        for call in kept:
            for place, grads in zip(self.places.values(), call, strict=True):
                book.instantiate(place, grads)


class _Call:
    """How a module was called, and what it gave."""

    def __init__(
        self, layer: FallbackLayer, positional: int, names: tuple[str, ...], flat: list[Any]
    ) -> None:
        self.layer, self.positional, self.names = layer, positional, names
        self.constants = [None if isinstance(v, Tensor) else v for v in flat]
        self.is_tensor = [isinstance(v, Tensor) for v in flat]
        self.outputs: Any = None

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = iter(tensors)
        flat = [
            next(rest) if is_tensor else constant
            for is_tensor, constant in zip(self.is_tensor, self.constants, strict=True)
        ]
        n = self.positional
        return tuple(flat[:n]), dict(zip(self.names, flat[n:], strict=True))

    def as_given(self, found: Any) -> Any:
        """The outputs in the form in which the module gave them."""
        if isinstance(self.outputs, Tensor):
            return found[0]
        rest = iter(found)
        return tuple(next(rest) if isinstance(v, Tensor) else v for v in self.outputs)


def _tensors(outputs: Any, layer: FallbackLayer) -> tuple[Tensor, ...]:
    """The tensors among a module's outputs. Raises ModelError where they can't be told by row."""
    flat = outputs if isinstance(outputs, tuple) else (outputs,)
    found = tuple(v for v in flat if isinstance(v, Tensor))
    if not found or any(isinstance(v, list | dict | tuple) for v in flat):
        raise ModelError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) gives no tensor or a nested "
            "result, for which there is no per-record gradient",
            where="model",
        )
    if any(value.dim() < 1 or len(value) != layer.now.rows for value in found):
        raise ModelError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) does not give one row for each "
            "record, for which there is no per-record gradient",
            where="model",
            hint="instead of nn.GRU or nn.LSTM take opacus.layers.DPGRU or DPLSTM",
        )
    return found


class _Fallback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *tensors: Tensor) -> Any:
        args, kwargs = call.arguments(list(tensors))
        call.outputs = call.layer.original(*args, **kwargs)
        found = _tensors(call.outputs, call.layer)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(v for v in found if not v.is_floating_point()))
        return tuple(v.view_as(v) if any(v is t for t in tensors) else v for v in found)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        call, tensors = ctx.call, list(ctx.saved_tensors)
        layer: FallbackLayer = call.layer
        module = layer.module
        trained = {key: module.get_parameter(key).detach() for key in layer.places}
        fixed = {k: p.detach() for k, p in module.named_parameters() if k not in trained}
        movable = [i for i, t in enumerate(tensors) if t.is_floating_point()]

        def dot(parameters: Any, inputs: list[Tensor], others: list[Tensor], g: Any) -> Tensor:
            """<outputs, g> of one record, whose rows have no batch dimension."""
            whole = [t.unsqueeze(0) for t in others]
            for i, value in zip(movable, inputs, strict=True):
                whole[i] = value.unsqueeze(0)
            args, kwargs = call.arguments(whole)
            outputs = functional_call(module, {**parameters, **fixed}, args, kwargs)
            flat = _flat(outputs)
            parts = [(o * h.unsqueeze(0)).sum() for o, h in zip(flat, g, strict=True)]
            return torch.stack(parts).sum()

        with torch.enable_grad():
            inputs = [tensors[i] for i in movable]
            own, back = vmap(grad(dot, argnums=(0, 1)), in_dims=(None, 0, 0, 0))(
                trained, inputs, tensors, gs
            )
        if layer.sampler is not None:
            by_opacus = layer.sampler(module, tensors, gs[0])
            own = {key: by_opacus[module.get_parameter(key)] for key in trained}
        layer.keep(*(own[key].detach() for key in layer.places))
        found: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(movable, back, strict=True):
            found[i] = value.detach()
        return (None, None, *found)


def _flat(outputs: Any) -> list[Tensor]:
    flat = outputs if isinstance(outputs, tuple) else (outputs,)
    return [v for v in flat if isinstance(v, Tensor)]


FallbackLayer.node = _Fallback
