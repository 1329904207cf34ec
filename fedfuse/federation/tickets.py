"""How a server app of Flower's finds its place: variables, which folder its run is for, its lock.

Flower gives a run its number when it is submitted. Whoever submits it then writes a ticket: a file
under that number, with the name of the run's folder. The server app waits for it, and holds a lock
while it works; the lock goes with its process, however that ends. Without torch and Flower.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedfuse.errors import RunFolderError
from fedfuse.federation.locks import hold, is_held
from fedfuse.privacy import disk

__all__ = [
    "KEY_VARIABLE",
    "NODES_VARIABLE",
    "OUT_VARIABLE",
    "PEERS_VARIABLE",
    "RUNS_VARIABLE",
    "STORE_VARIABLE",
    "alone",
    "flower_run_of",
    "folder_of",
    "is_conducted",
    "issue_ticket",
    "no_orphan",
]

STORE_VARIABLE = "FEDFUSE_STORE"
"""Where a real server's prepared test records lie."""
RUNS_VARIABLE = "FEDFUSE_RUNS"
"""Where its run folders are, each with a ticket. `fedfuse server start` sets it."""
OUT_VARIABLE = "FEDFUSE_OUT"
"""The folder of the one run, where a SuperLink is started by hand for one run."""
KEY_VARIABLE = "FEDFUSE_KEY"
"""A real server's private key, in PEM: nodes answer servers whose public keys they know."""
NODES_VARIABLE = "FEDFUSE_NODES"
"""Which nodes are registered, by Flower's number: masks need names before a node is asked."""
PEERS_VARIABLE = "FEDFUSE_PEERS"
"""The identities of nodes whose updates come under masks."""
_FOLDER = ".flower"
_TICKET_S, _LOCK_S, _LOOK_S = 60.0, 2.0, 0.2
_ORPHAN_S = 20.0


def issue_ticket(run: Path, flower_run: int) -> None:
    """Says that Flower's run `flower_run` is for the folder `run`."""
    folder = run.parent / _FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    disk.replace(folder / str(flower_run), run.name.encode())


def folder_of(runs: Path, flower_run: int) -> Path:
    """The folder in `runs` that Flower's run is for. Raises RunFolderError where nobody says it."""
    path, end = runs / _FOLDER / str(flower_run), time.monotonic() + _TICKET_S
    while not path.exists():
        if time.monotonic() > end:
            raise RunFolderError(
                f"nobody said within {_TICKET_S:g} s which folder this run is for",
                where=str(path),
                hint="start runs with `fedfuse server run`",
            )
        time.sleep(_LOOK_S)
    return runs / path.read_text(encoding="utf-8")


def flower_run_of(run: Path) -> int | None:
    """The newest of Flower's runs that is for this folder; None where there is none."""
    tickets = [path for path in (run.parent / _FOLDER).glob("*") if path.name.isdigit()]
    for path in sorted(tickets, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if path.read_text(encoding="utf-8") == run.name:
            return int(path.name)
    return None


def is_conducted(run: Path) -> bool:
    """Whether a server app is at work in the run folder at this moment."""
    return is_held(_lock_file(run))


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Keeps any other server app out of the run folder. Raises RunFolderError."""
    _lock_file(run).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = hold(_lock_file(run), _LOCK_S)
    except BlockingIOError:
        raise RunFolderError(
            "another server app is at work in it", where=str(run), hint="stop that run first"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def no_orphan() -> Iterator[None]:
    """Ends this process some seconds after the one that started it, if it has not ended by then.

    Flower 1.41 ends a server app whose SuperLink is gone by a signal, whose handler waits for ever
    where the signal comes in the middle of a retry: for a lock that the same thread holds. Such a
    process would keep its run folder's lock. What it had reserved stays reserved.
    """
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if os.getppid() != parent:
                if not over.wait(_ORPHAN_S):
                    os._exit(1)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _lock_file(run: Path) -> Path:
    return run.parent / _FOLDER / f"{run.name}.lock"
