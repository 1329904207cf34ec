"""Flower's own processes: found, started with a safe environment, watched, and ended whole.

For both operators: a node's SuperNode, a server's SuperLink.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedfuse.errors import FederationError

__all__ = ["Follower", "Process", "answers", "environment", "free_port", "program", "wait_until"]

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Nothing goes to anybody else's server, and nothing is installed while a run is going on."""
HASTE = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
"""How often Flower looks whether there is an app to start, in seconds: else once in a second. What
the operator's environment says goes before."""
_SECRET = "FEDFUSE_"
_TETHER = Path(__file__).with_name("tether.py")
_LOOK_S = 0.1


def program(name: str) -> Path:
    """A program that was installed beside this Python, such as "flower-supernode".

    Never one from the PATH: that could be of another installation. Raises FederationError.
    """
    path = Path(sys.executable).parent / name
    if not os.access(path, os.X_OK):
        raise FederationError(
            f"{name} is not installed beside this Python",
            where=str(path),
            hint="install fedfuse with its dependencies: python -m pip install fedfuse",
        )
    return path


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a process of Flower's gets: this process's environment without fedfuse's own settings,
    Flower's folder `home`, no telemetry, no installations, little waiting; and `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET)}
    programs = Path(sys.executable).parent  # Flower starts programs of its own by name
    path = f"{programs}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return HASTE | kept | QUIET | {"FLWR_HOME": str(home), "PATH": path} | dict(more or {})


class Process:
    """A running program, with all that it starts in a session of its own; a context manager.

    It is told to end when the thread that started it does, also where this process is killed.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path | None = None,
        name: str = "",
    ) -> None:
        """Starts it in `folder`; what it says is added to `log`. None: to this process's terminal.
        `name`: what messages call it, if not by its program.

        Raises FederationError.
        """
        self.name = name or Path(words[0]).name
        self.log = log
        _check_program(words[0])
        out = None if log is None else log.open("ab")
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", _TETHER, str(os.getpid())),
                    *(str(word) for word in words),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=None if log is None else subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                # Ctrl-C at the terminal is for the one who started it, who then ends it in order.
                start_new_session=True,
            )
        except OSError as error:
            raise FederationError(
                f"it cannot be started: {error.strerror}", where=str(words[0])
            ) from None
        finally:
            if out is not None:
                out.close()

    @property
    def pid(self) -> int:
        """Its process id, and that of its session."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it is running."""
        return self._process.poll()

    def stop(self, seconds: float = 20.0) -> int:
        """Ends it and all that it started: SIGTERM, and SIGKILL for what is left after `seconds`.

        Returns its exit code. Does nothing where it has ended.
        """
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._signal(signal.SIGKILL)
        return self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _check_program(path: str | Path) -> None:
    """Raises FederationError where it cannot be run."""
    if not os.access(path, os.X_OK):
        raise FederationError("it cannot be started: no such program", where=str(path))


def answers(host: str, port: int, seconds: float = 1.0) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as one:
        one.bind((host, 0))
        port: int = one.getsockname()[1]
        return port


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str, *processes: Process
) -> None:
    """Returns as soon as `condition` holds.

    Raises FederationError with `what` did not come about after so many seconds, or as soon as one
    of `processes` has ended.
    """
    end = time.monotonic() + seconds
    while not condition():
        for process in processes:
            if process.ended is not None:
                raise FederationError(
                    f"{process.name} ended with code {process.ended}: {what}",
                    where=str(process.log or ""),
                    hint="its last lines say why",
                )
        if time.monotonic() > end:
            raise FederationError(f"{what} within {seconds:g} s")
        time.sleep(_LOOK_S)


class Follower:
    """The lines that are added to a file from now on, or after a byte; it may not be there yet.

    >>> list(Follower(Path("/nowhere/log")).lines())
    []
    """

    def __init__(self, path: Path, *, place: int | None = None) -> None:
        """`place`: where a line begins; None is the end of what is there."""
        self._path, self._rest = path, b""
        self._place = (path.stat().st_size if path.exists() else 0) if place is None else place

    def lines(self) -> Iterator[str]:
        """The whole lines that were added since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                data = file.read()
        except OSError:
            return
        self._place += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
