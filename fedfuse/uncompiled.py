"""torch without its compiler, which nothing here uses: to load it takes a second and 43 MB.

torch loads it (`torch._dynamo`, and sympy with it) at an optimizer's first step, to mark what is
not to be compiled; and where normals are drawn on the device "meta".
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["SGD", "AdamW", "Undrawn"]

_MARKED = ("add_param_group", "step", "zero_grad")


def _uncompiled(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """`kind`, whose methods are the same but for the marks that tell the compiler where to stop."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _MARKED}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(methods["step"])})


SGD: type[torch.optim.SGD] = _uncompiled(torch.optim.SGD)
AdamW: type[torch.optim.AdamW] = _uncompiled(torch.optim.AdamW)


class Undrawn(TorchFunctionMode):
    """Inside, normals are not drawn: what is made on the device "meta" has no numbers anyway."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args)
        return func(*args, **kwargs)
