"""Recurrent layers. Opacus's DPGRU, DPLSTM and DPRNN are linear layers in a loop; of them only
packed sequences need a look, since packing puts the records in another order.

A model that has one of them has loaded Opacus; for one that has not, it is not loaded here.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fedfuse.errors import ModelError

__all__ = ["RecurrentGuard", "is_recurrent", "is_recurrent_linear"]

_OPACUS = "opacus.layers.dp_rnn"


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is one of Opacus's recurrent layers."""
    layers = sys.modules.get(_OPACUS)
    return layers is not None and isinstance(module, layers.DPRNNBase)


def is_recurrent_linear(module: nn.Module) -> bool:
    """Whether a module is the linear layer of which those are made."""
    layers = sys.modules.get(_OPACUS)
    return layers is not None and type(module) is layers.RNNLinear


class RecurrentGuard:
    """Stands before a recurrent layer's forward and refuses packed sequences."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.original = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives. Raises ModelError on a packed sequence."""
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            raise ModelError(
                f"layer {self.name!r} is given a packed sequence, which puts the records in "
                "another order",
                where="model",
                hint="pad the sequences, and mask what comes after their end",
            )
        return self.original(*args, **kwargs)
