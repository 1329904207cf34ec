"""Finds the compiled kernels: those of this source, for this processor, unless they are declined.

FEDFUSE_KERNELS=0    in the environment: torch and NumPy compute everything
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fedfuse.kernels.compiling import LEVELS, fingerprint, library_path

__all__ = ["Room", "library", "plain", "why_not"]

FOLDER = Path(__file__).parent


class Room(NamedTuple):
    """Rows of float32 that a kernel writes to: where they begin, floats from row to row, and the
    tensor that they are a part of, which is held with them."""

    at: int
    line: int
    memory: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Room:
        """Of (B, n), numbers of a row side by side."""
        return cls(rows.data_ptr(), rows.stride(0), rows)

    def column(self, start: int) -> Room:
        """The same rows from this number on."""
        return Room(self.at + 4 * start, self.line, self.memory)


@lru_cache(maxsize=8)
def _found(source: str) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("FEDFUSE_KERNELS") == "0":
        return None, "declined by FEDFUSE_KERNELS=0"
    level = torch.backends.cpu.get_cpu_capability()
    if level not in LEVELS:
        return None, f"none for a processor with {level}"
    path = library_path(FOLDER, source, level)
    if not path.exists():
        return None, "not compiled; python -m fedfuse.kernels.compiling does it, or says why not"
    try:
        found = ctypes.CDLL(str(path))
        said = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(found, "source")))
        expected = fingerprint(FOLDER, source)
    except (OSError, ValueError) as error:
        return None, f"{path} can't be loaded: {error}"
    if said.decode() != expected:
        return (
            None,
            "compiled from another source; python -m fedfuse.kernels.compiling mends it",
        )
    return found, ""


def library(source: str) -> ctypes.CDLL | None:
    """The kernels of `source`; None where there are none."""
    return _found(source)[0]


def why_not(source: str) -> str:
    """Why there are none; empty where there are."""
    return _found(source)[1]


def plain(*tensors: torch.Tensor) -> bool:
    """Whether they hold what kernels take: float32, in this machine's own memory."""
    for t in tensors:  # noqa: SIM110 - a loop is fast, and this is asked for each product of a step
        if t.dtype != torch.float32 or not t.is_cpu:
            return False
    return True
