"""What a run needs at its end, got ready by a thread while the workers train and its process waits.

The first evaluation loads scikit-learn, and the summary states epsilon on the finest grid: a second
and a half in which nobody else had anything to do.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from fedfuse.federation.session import Session
from fedfuse.privacy import accounting
from fedfuse.privacy.views import History

__all__ = ["Ahead"]


class Ahead:
    """The thread. What goes wrong in it goes wrong again where it is needed, and is told there."""

    def __init__(self, session: Session, also: Callable[[], None]) -> None:
        """`also`: what the caller needs at the end."""
        mechanism, rounds = session.mechanism, session.last - session.first + 1
        self._also, self._delta = also, session.config.privacy.delta
        self._history: History = ()
        if mechanism is not None and rounds > 0:
            # Where all nodes take part throughout, this is what each of them will have spent.
            past = next(iter(session.spent.histories()), ())
            self._history = (*past, replace(mechanism, steps=mechanism.steps * rounds))
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is ready, which is at most as long as it would take now."""
        self._thread.join()

    def _run(self) -> None:
        with suppress(Exception):
            importlib.import_module("sklearn.metrics")
            self._also()
            if self._history:
                accounting.epsilon(self._history, self._delta)
