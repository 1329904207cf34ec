"""The process that workers are forked from, begun early: it loads torch while others do something.

Standard library only, so that it can be begun before anything else is loaded.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

__all__ = ["context", "warm_up"]

_PRELOAD = ["fedfuse.federation.preload"]


def context() -> ForkServerContext:
    """Makes processes that are forked from one that has loaded everything once."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_PRELOAD)
    return found


def warm_up() -> None:
    """Begins to load what workers need, in a process of its own; returns at once."""
    context()
    forkserver.ensure_running()
