"""The engine "ray": the same two apps under Flower's own simulation runtime.

On this machine alone, or on the cluster that RAY_ADDRESS names, as Ray itself reads it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfuse.errors import FederationError
from fedfuse.federation.flower import GridView
from fedfuse.federation.processes import answers

__all__ = ["run_on_ray"]

_ADDRESS = "RAY_ADDRESS"
_KNOCK_S, _PULL_S = 5.0, 0.1


def run_on_ray(
    server: ServerApp, client: ClientApp, *, nodes: int, workers: int = 0, verbose: bool = False
) -> None:
    """Runs `server` with `nodes` nodes that answer by `client`.

    A KeyboardInterrupt reaches the server between two looks for replies, since Flower runs it in
    a thread of its own, and comes out here. On a cluster `workers` has no say: there are as many
    as it has cores.

    Raises FederationError where Ray is not installed, or its cluster does not answer.
    """
    if importlib.util.find_spec("ray") is None:
        raise FederationError(
            "Ray is not installed",
            where="federation.engine = ray",
            hint='pip install "fedfuse[ray]", or take federation.engine = "loopback"',
        )
    address = os.environ.get(_ADDRESS, "")
    _check_cluster(address)
    from flwr.simulation import run_simulation

    stop = threading.Event()
    failure: list[BaseException] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Any) -> None:
        try:
            server(_Stoppable(grid, stop), context)
        except BaseException as error:
            # Flower passes on an Exception only; this one is raised again below.
            failure.append(error)

    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": verbose}
    if workers and not address:
        settings["num_cpus"] = workers
    if not verbose:
        settings["logging_level"] = logging.ERROR
    gpus = _gpu_share(workers)
    with _environment(), _interrupts(stop):
        run_simulation(
            server_app=app,
            client_app=client,
            num_supernodes=nodes,
            backend_config={
                "init_args": settings,
                "client_resources": {"num_cpus": 1, "num_gpus": gpus},
            },
        )
    if failure:
        raise failure[0]


class _Stoppable(GridView):
    """A grid that looks for a stop while it waits for replies."""

    look_s = _PULL_S

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        super().__init__(grid, ())
        self._stop = stop

    def get_node_ids(self) -> Iterable[int]:
        """All the nodes of the grid behind it. Raises KeyboardInterrupt on a stop."""
        self._look()
        return self._grid.get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid behind it. Raises KeyboardInterrupt on a stop."""
        self._look()
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """The replies that came within `timeout` seconds. Raises KeyboardInterrupt on a stop."""
        return list(self.replies(messages, timeout=timeout))

    def _look(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt


def _check_cluster(address: str) -> None:
    """Raises FederationError where nobody answers there: Ray itself would wait for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal() and not answers(host, int(port), _KNOCK_S):
        raise FederationError(
            "the Ray cluster does not answer",
            where=f"{_ADDRESS} = {address}",
            hint="start it (ray start --head), or unset the variable to run on this machine alone",
        )


def _gpu_share(workers: int) -> float:
    """The part of a GPU that each of Ray's actors gets."""
    import torch

    gpus = torch.cuda.device_count()
    actors = workers or len(os.sched_getaffinity(0))
    return min(1.0, gpus / actors) if gpus else 0.0


@contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop` instead of breaking Flower's main loop in two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment() -> Iterator[None]:
    """Flower adds to PYTHONPATH for Ray's workers; afterwards it is as it was."""
    before = os.environ.get("PYTHONPATH")
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before
