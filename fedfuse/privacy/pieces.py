"""Work in pieces, done by other threads while the caller does something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait

from fedfuse.kernels.threads import pool

__all__ = ["Pieces"]


class Pieces:
    """Calls of `make`, one for each of `starts`, that so many `helpers` begin at once.

    After a fork no piece is sure to be made in the child, which has none of these threads.
    """

    def __init__(self, make: Callable[[int], None], starts: Iterable[int], helpers: int) -> None:
        self._make, self._left = make, deque(starts)
        self._helpers: list[Future[None]] = []
        self._begin(helpers)

    def finish(self, helpers: int = 0) -> None:
        """Returns when all are made, by the caller's thread too and so many more `helpers`.

        Raises what `make` raised; then, as when it is interrupted, no piece is being made any more.
        """
        try:
            self._begin(helpers)
            self._work()
            for helper in self._helpers:
                helper.result()
        except BaseException:
            self.cancel()
            wait(self._helpers)
            raise

    def cancel(self) -> None:
        """Lets no further piece begin."""
        self._left.clear()

    def _begin(self, helpers: int) -> None:
        self._helpers += [pool().submit(self._work) for _ in range(min(helpers, len(self._left)))]

    def _work(self) -> None:
        while True:
            try:
                start = self._left.popleft()
            except IndexError:
                return
            self._make(start)
