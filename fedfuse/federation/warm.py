"""The process that workers are forked from: made once, with all that they need loaded in it.

Where this process has one thread, that process is a copy of it (`fork`): what is loaded here is
loaded there, in the same memory. Where it has more (numpy's products, CUDA, somebody's own), a copy
could inherit a lock that nobody would ever open, so a new process is begun, which loads everything
by itself.

Standard library and errors only, so that a new process can be begun before anything else is loaded.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from fedfuse.errors import FederationError

__all__ = ["context", "copy_of_this", "one_thread", "uninterrupted", "warm_up"]

_SOCKET = len("/listener-12345678")
_LONGEST = 107
"""Bytes of a Unix socket's name."""
_PRELOAD = ["fedfuse.federation.preload"]


def context() -> ForkServerContext:
    """Makes processes that are forked from one that has loaded everything once.

    Raises FederationError where the temporary folder's name leaves no room for a socket's.
    """
    _check_temporary()
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_PRELOAD)
    return found


def warm_up() -> None:
    """Begins to load what workers need, in a process of its own; returns at once."""
    context()
    forkserver.ensure_running()


def one_thread() -> bool:
    """Whether this process has one thread, so that a copy of it inherits no lock that is held."""
    return len(list(Path("/proc/self/task").glob("*"))) == 1


@contextmanager
def uninterrupted() -> Iterator[None]:
    """For a fork: SIGINT and SIGTERM wait until the end. Python's hooks around a fork would lose
    what is raised then, and leave the lock of `logging` shut: whoever logs next waits for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def copy_of_this() -> bool:
    """Makes the process that workers are forked from a copy of this one, which has loaded all that
    they need; whether that was possible. Does nothing where there is such a process."""
    if not one_thread():
        return False
    _check_temporary()
    multiprocessing.get_context("forkserver").set_forkserver_preload([])
    gc.freeze()  # a collection would write to every object, and so copy the memory they share
    resource_tracker.ensure_running()  # a small process of its own
    with _forking():
        forkserver.ensure_running()
    return True


def _check_temporary() -> None:
    folder = multiprocessing.util.get_temp_dir()
    if len(os.fsencode(folder)) + _SOCKET > _LONGEST:
        raise FederationError(
            "the name of the temporary folder is too long for the sockets of workers",
            where=str(Path(folder).parent),
            hint="set TMPDIR to a folder with a shorter name, such as /tmp",
        )


@contextmanager
def _forking() -> Iterator[None]:
    """Whatever multiprocessing would begin as a new Python, is begun as a copy of this one."""
    util: Any = multiprocessing.util
    before = util.spawnv_passfds

    def fork(_: object, words: Sequence[str], kept: Sequence[int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        with uninterrupted():
            pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            util.spawnv_passfds = before
            first = 3
            for number in sorted(kept):  # as in a new process; the pipe that says that the
                os.closerange(first, number)  # parent is there must be the parent's alone
                first = number + 1
            os.closerange(first, os.sysconf("SC_OPEN_MAX"))
            exec(words[-1], {})  # "-c", and what multiprocessing would have run
            status = 0
        finally:
            os._exit(status)

    util.spawnv_passfds = fork
    try:
        yield
    finally:
        util.spawnv_passfds = before
