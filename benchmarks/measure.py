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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "machine", "measure", "medians"]

_LOOK_S = 0.1
_PSS_EVERY = 3
_MARK = "FEDFUSE_BENCHMARK"
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
    watch = _Watch(f"{_MARK}={mark}".encode())
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


def machine() -> str:
    """What this is measured on, in a line."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{time.strftime('%Y-%m-%d')}, {cores} cores, CPU, {memory:.0f} GiB of memory"


class _Watch(threading.Thread):
    def __init__(self, mark: bytes) -> None:
        super().__init__(daemon=True)
        self._mark = mark
        self._end = threading.Event()
        self._ours: dict[tuple[int, str], bool] = {}
        self._ticks: dict[tuple[int, str], int] = {}
        self.peak = 0
        self.most = 0

    @property
    def cpu(self) -> float:
        """Seconds."""
        return sum(self._ticks.values()) / _TICKS

    def stop(self) -> None:
        """Ends it."""
        self._end.set()
        self.join()

    def run(self) -> None:
        looks = 0
        while not self._end.is_set():
            there = self._look()
            if looks % _PSS_EVERY == 0:
                self.peak = max(self.peak, sum(_pss(number) for number in there))
            self.most = max(self.most, len(there))
            looks += 1
            self._end.wait(_LOOK_S)

    def _look(self) -> list[int]:
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
                there.append(key[0])
        return there


def _pss(number: int) -> int:
    try:
        text = Path(f"/proc/{number}/smaps_rollup").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
