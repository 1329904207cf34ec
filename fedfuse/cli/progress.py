"""What a run shows while it runs, on stderr: a live view on a terminal, else a line each round.

Both are the observer that `fedfuse.federation` reports to.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedfuse.privacy.accounting import shown

if TYPE_CHECKING:
    from fedfuse.federation.observer import Observer, RoundRecord, RunInfo

__all__ = ["LineView", "LiveView", "progress"]

BAR = 40
RECENT = 5
_POWERS = ("kB", "MB", "GB", "TB")


@contextmanager
def progress(*, quiet: bool, stream: TextIO | None = None) -> Iterator[Observer]:
    """The observer that fits: nothing, a line each round, or a live view on a terminal."""
    stream = stream or sys.stderr
    console = Console(file=stream)
    if quiet:
        from fedfuse.federation.observer import Silent

        yield Silent()
    elif console.is_interactive and console.is_terminal:
        view = LiveView()
        with Live(view, console=console, refresh_per_second=8):
            yield view
    else:
        yield LineView(stream)


class LineView:
    """One plain line for each round, one for each node that failed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clock = Clock()

    def prepared(self, info: RunInfo) -> None:
        self._write(headline(info))
        if not info.private:
            self._write("NOT PRIVATE: nothing in this run is protected")
        for text in (*info.assumptions, *info.notes):
            self._write(f"note: {text}")
        self._clock.start()

    def round_started(self, round: int) -> None: ...

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        if problem:
            self._write(f"round {round}: node {name} failed: {problem}")

    def round_finished(self, record: RoundRecord) -> None:
        self._clock.tick(record)
        width = len(str(record.rounds))
        nodes = f"{record.nodes_ok} node{'s' if record.nodes_ok != 1 else ''}"
        if record.failures:
            nodes += f", {len(record.failures)} failed"
        self._write(
            "  ".join(
                (
                    f"round {record.round:>{width}}/{record.rounds}",
                    *(f"{name} {value:.4g}" for name, value in in_order(record.metrics)[:2]),
                    spent(record),
                    nodes,
                    f"{size(record.bytes_received)} in, {size(record.bytes_sent)} out",
                    f"{record.seconds:.1f} s",
                    f"{duration(self._clock.left)} left",
                )
            )
        )

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveView:
    """A panel that is drawn again and again: rounds, nodes, loss, metrics, epsilon, time left."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._info: RunInfo | None = None
        self._record: RoundRecord | None = None
        self._first: RoundRecord | None = None
        self._round = 0
        self._finished: list[bool] = []

    def prepared(self, info: RunInfo) -> None:
        self._info = info
        self._clock.start()

    def round_started(self, round: int) -> None:
        self._round = round
        self._finished = []

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        self._finished.append(problem is None)

    def round_finished(self, record: RoundRecord) -> None:
        self._clock.tick(record)
        self._record = record
        self._first = self._first or record

    def __rich__(self) -> RenderableType:
        info = self._info
        if info is None:
            return Text("preparing: reading the data, starting the workers ...", style="dim")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", min_width=8)
        table.add_column()
        table.add_row("rounds", self._rounds(info))
        table.add_row("nodes", self._nodes(info))
        for name, value in in_order(self._record.metrics) if self._record else ():
            table.add_row(name.replace("_", " "), self._metric(name, value))
        if self._record is not None:
            sent, received = size(self._record.bytes_sent), size(self._record.bytes_received)
            table.add_row("bytes", f"{received} in, {sent} out a round")
        table.add_row("privacy", self._privacy(info))
        return Panel(table, title=headline(info), title_align="left", padding=(0, 1))

    def _rounds(self, info: RunInfo) -> RenderableType:
        done = self._record.round if self._record else info.first_round - 1
        return _bar(done, info.rounds, f"{done}/{info.rounds}, {duration(self._clock.left)} left")

    def _nodes(self, info: RunInfo) -> RenderableType:
        marks = Text()
        shown = self._finished[-BAR:]
        for fine in shown:
            marks.append("●" if fine else "✗", style="green" if fine else "bold red")
        waiting = max(0, min(len(info.nodes), BAR) - len(shown))
        marks.append("○" * waiting, style="dim")
        marks.append(f"  {len(self._finished)} of {len(info.nodes)} in round {self._round}")
        return marks

    def _metric(self, name: str, value: float) -> RenderableType:
        text = Text(f"{value:.4g}")
        before = self._first.metrics.get(name) if self._first else None
        if before is not None and self._first is not self._record and self._first:
            text.append(f"  from {before:.4g} after round {self._first.round}", style="dim")
        return text

    def _privacy(self, info: RunInfo) -> RenderableType:
        if not info.private:
            return Text("NOT PRIVATE", style="bold white on red")
        record = self._record
        if record is None or record.epsilon is None:
            return Text("nothing spent yet", style="dim")
        allowed = record.epsilon_allowed
        label = f"epsilon {shown(record.epsilon)}"
        return _bar(record.epsilon, allowed, f"{label} of {allowed:g}") if allowed else Text(label)


class Clock:
    """Time left, from how long the last rounds took: the first one is slower than the rest."""

    def __init__(self) -> None:
        self._ticks: deque[float] = deque(maxlen=RECENT + 1)
        self.left: float | None = None

    def start(self) -> None:
        """The first round starts now."""
        self._ticks.append(time.monotonic())

    def tick(self, record: RoundRecord) -> None:
        """A round is done."""
        self._ticks.append(time.monotonic())
        if len(self._ticks) > 1:
            mean = (self._ticks[-1] - self._ticks[0]) / (len(self._ticks) - 1)
            self.left = mean * (record.rounds - record.round)


def headline(info: RunInfo) -> str:
    """One line: what runs where."""
    count = len(info.nodes)
    nodes = f"{count} node{'s' if count != 1 else ''}"
    return (
        f"{info.name}: {nodes}, {info.rounds} rounds, {info.parameters:,} parameters,"
        f" engine {info.engine} on {info.device}"
    )


def in_order(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """The loss first, then the rest as they come: the headline before the others."""
    return sorted(metrics.items(), key=lambda item: item[0] != "loss")


def spent(record: RoundRecord) -> str:
    """What a round left of the budget, in words."""
    if record.epsilon is None:
        return "NOT PRIVATE"
    allowed = f" of {record.epsilon_allowed:g}" if record.epsilon_allowed else ""
    return f"epsilon {shown(record.epsilon)}{allowed}"


def size(count: int) -> str:
    """A number of bytes as a person says it.

    >>> size(999), size(4_360_000), size(12_000_000_000)
    ('999 B', '4.4 MB', '12 GB')
    """
    if count < 1000:
        return f"{count} B"
    value, power = count / 1000, 0
    while value >= 1000 and power < 3:
        value, power = value / 1000, power + 1
    return f"{value:.1f} {_POWERS[power]}" if value < 10 else f"{value:.0f} {_POWERS[power]}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them.

    >>> duration(8.2), duration(200), duration(8000), duration(None)
    ('8 s', '3:20 min', '2:13 h', '?')
    """
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _bar(done: float, whole: float, label: str) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_row(
        Bar(whole, 0, min(done, whole), width=BAR, color="cyan", bgcolor="grey23"), Text(label)
    )
    return row
