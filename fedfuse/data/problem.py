"""One thing that is wrong with a data set, said without the content of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfuse.errors import DataError

__all__ = ["Problem", "refuse"]

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong, where, and what to do.

    `line` is the manifest's line (1 is the header of a CSV; 0: the manifest as a whole), `id` the
    record's, `column` the column's. A `warning` does not make the record bad.
    """

    line: int
    id: str
    column: str
    what: str
    hint: str = ""
    warning: bool = False

    def __str__(self) -> str:
        places = [f"line {self.line}"] if self.line else []
        places += [f"id {self.id}"] if self.id else []
        places += [f"column {self.column}"] if self.column else []
        return f"{', '.join(places)}: {self.what}" if places else self.what


def refuse(problems: Sequence[Problem], manifest: str, *, hint: str = "") -> DataError:
    """The error that tells of `problems`: how many, and the first few."""
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return DataError(
        f"{count} found{':' if shown else ''}{shown}{more}",
        where=manifest,
        hint=hint
        or f"fedfuse data check {manifest} lists them all; --skip-bad leaves such records out",
    )
