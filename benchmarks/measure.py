"""A whole process and all that it starts: wall time, CPU time, peak memory.

Processes are found by a mark in their environment, which every child inherits, also the daemons
that put themselves into another session. Memory is the sum of the proportional set sizes (PSS), in
which a page that n processes share counts 1/n in each, so that the sum is what is really taken.
"""

from __future__ import annotations

import os
import secrets
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Kind", "Measured", "Watch", "machine", "measure", "medians"]

_LOOK_S = 0.1
_PSS_EVERY = 3
_MARK = "BENCHMARK"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run took."""

    wall_s: float
    cpu_s: float
    """User and system, of all processes; the last tenth of a second of each may be missing."""
    pss_mb: float
    """The highest sum seen."""
    processes: int
    """The most at once."""
    load: float
    """Processes that wanted a core when it began, the machine's other work: 0 is a quiet one."""
    stdout: str


def measure(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Measured:
    """Runs `command` to its end. Raises SystemExit with its messages where it fails."""
    mark = secrets.token_hex(8)
    load = os.getloadavg()[0]
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, **(env or {}), _MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = Watch(f"{_MARK}={mark}".encode())
    watch.start()
    out, told = process.communicate()
    wall = time.perf_counter() - began
    watch.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{told[-4000:]}")
    return Measured(
        wall_s=wall,
        cpu_s=watch.cpu,
        pss_mb=watch.peak / 1e6,
        processes=watch.most,
        load=load,
        stdout=out,
    )


def medians(runs: Sequence[Measured]) -> Measured:
    """The median of each figure."""

    def middle(name: str) -> float:
        return statistics.median(getattr(run, name) for run in runs)

    return Measured(
        wall_s=middle("wall_s"),
        cpu_s=middle("cpu_s"),
        pss_mb=middle("pss_mb"),
        processes=int(middle("processes")),
        load=middle("load"),
        stdout=runs[-1].stdout,
    )


def machine(device: str = "cpu") -> str:
    """What this is measured on, in a line."""
    chip = "CPU"
    if device != "cpu":
        import torch

        chip = torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{time.strftime('%Y-%m-%d')}, {cores} cores, {chip}, {memory:.0f} GiB of memory"


@dataclass(slots=True)
class Kind:
    """What processes of one kind took."""

    most: int = 0
    """At once."""
    peak: int = 0
    """The highest PSS of one of them, in bytes."""
    cpu: float = 0.0
    """Seconds, of all."""


class Watch(threading.Thread):
    """Looks at all processes with `mark` in their environment until `stop`.

    look_s  seconds between looks; memory is seen at each third one
    kind    from a command line and a name to what a process is called in `kinds`
    each    called with each look at memory
    """

    def __init__(
        self,
        mark: bytes,
        *,
        look_s: float = _LOOK_S,
        kind: Callable[[Sequence[str], str], str] = lambda words, name: "",
        each: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(daemon=True)
        self._mark, self._look_s, self._kind, self._each = mark, look_s, kind, each
        self._end = threading.Event()
        self._ours: dict[tuple[int, str], bool] = {}
        self._ticks: dict[tuple[int, str], int] = {}
        self._first: dict[tuple[int, str], int] = {}
        self._names: dict[tuple[int, str], str] = {}
        self._kinds: dict[str, Kind] = {}
        self.peak = 0
        self.most = 0

    @property
    def cpu(self) -> float:
        """Seconds, since the first look."""
        return sum(self._ticks[key] - self._first[key] for key in self._ticks) / _TICKS

    def kinds(self) -> dict[str, Kind]:
        """What each kind of process took since the first look."""
        for found in self._kinds.values():
            found.cpu = 0.0
        for key, name in self._names.items():
            ticks = self._ticks[key] - self._first[key]
            self._kinds.setdefault(name, Kind()).cpu += ticks / _TICKS
        return self._kinds

    def stop(self) -> None:
        """Ends it."""
        self._end.set()
        self.join()

    def run(self) -> None:
        looks = 0
        while not self._end.is_set():
            there = self._look(first=looks == 0)
            if looks % _PSS_EVERY == 0:
                self._weigh(there)
                self._each()
            self.most = max(self.most, len(there))
            looks += 1
            self._end.wait(self._look_s)

    def _weigh(self, there: Sequence[tuple[int, str]]) -> None:
        sizes = {key: _pss(key[0]) for key in there}
        self.peak = max(self.peak, sum(sizes.values()))
        counts: dict[str, int] = {}
        for key, size in sizes.items():
            name = self._names[key] = self._kind(*_called(key[0])) if size else self._names[key]
            counts[name] = counts.get(name, 0) + 1
            found = self._kinds.setdefault(name, Kind())
            found.peak, found.most = max(found.peak, size), max(found.most, counts[name])

    def _look(self, *, first: bool) -> list[tuple[int, str]]:
        there = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                # pid (name) state ppid ...; the name may hold anything, also brackets
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                key = int(folder.name), fields[19]
                if key not in self._ours:
                    marks = (folder / "environ").read_bytes().split(b"\0")
                    self._ours[key] = self._mark in marks
            except (OSError, IndexError):
                continue
            if self._ours[key]:
                self._ticks[key] = int(fields[11]) + int(fields[12])
                self._first.setdefault(key, self._ticks[key] if first else 0)
                if key not in self._names:
                    self._names[key] = self._kind(*_called(key[0]))
                there.append(key)
        return there


def _called(number: int) -> tuple[list[str], str]:
    """A process's command line, and its name."""
    folder = Path(f"/proc/{number}")
    try:
        words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return words, (folder / "comm").read_text().strip()
    except OSError:
        return [], ""


def _pss(number: int) -> int:
    try:
        text = Path(f"/proc/{number}/smaps_rollup").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
