"""`flwr run` without nodes: a simulation in Flower's own runtime, by the two apps of the bundle.

The server app decodes the data, as `fedfuse simulate` does, and says under the run's number where
it lies; the virtual nodes' app, in processes of Flower's on the same machine, looks there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError
from fedfuse.federation.client import make_client_app
from fedfuse.federation.journal import Journal
from fedfuse.federation.observer import RoundRecord, RunInfo
from fedfuse.federation.session import Session
from fedfuse.federation.simulate import simulate
from fedfuse.federation.tickets import OUT_VARIABLE
from fedfuse.runfolder import fresh_folder

__all__ = ["conduct_virtual", "is_virtual", "virtual_node"]

_CONFIG = "config.toml"


def is_virtual(grid: Grid) -> bool:
    """Whether the nodes behind `grid` are those of Flower's simulation."""
    return isinstance(grid, InMemoryGrid)


def conduct_virtual(grid: Grid, config: RunConfig, flower_run: int) -> None:
    """Runs `config` with the virtual nodes behind `grid`, into runs/ where Flower was started, or
    the folder that FEDFUSE_OUT names.

    Raises FederationError where Flower has not as many nodes as the data, and as `simulate` does.
    """
    count = len(list(grid.get_node_ids()))
    settings = {"federation.engine": "ray"} | ({} if config.data.nodes else {"data.nodes": count})
    out = Path(os.environ.get(OUT_VARIABLE) or fresh_folder(config.name, Path("runs"))).absolute()

    def conduct(session: Session, store: Path) -> None:
        if len(session.nodes) != count:
            raise FederationError(
                f"Flower simulates {count} nodes, but the data has {len(session.nodes)}",
                hint=f"flwr federation simulation-config @none/default local --num-supernodes "
                f"{len(session.nodes)}",
            )
        with _told(flower_run, store, session.announced):
            session.conduct(grid)

    simulate(config.with_values(settings), out, observer=_Teller(out), conduct=conduct)


@lru_cache(maxsize=2)
def virtual_node(flower_run: int) -> ClientApp:
    """The app of the virtual nodes of a run. Raises FederationError where there is no such run."""
    place = _place(flower_run)
    if not place.is_symlink() or place.lstat().st_uid != os.getuid():
        raise FederationError(
            "the node's settings lack vault, and no simulation of this run is on this machine",
            where="node config",
        )
    return make_client_app(RunConfig.from_toml(place / _CONFIG), str(place / "store"))


@contextmanager
def _told(flower_run: int, store: Path, config: RunConfig) -> Iterator[None]:
    """Says where the run's data lies, for as long as it is there."""
    (store.parent / _CONFIG).write_text(config.to_toml(), encoding="utf-8")
    place = _place(flower_run)
    place.symlink_to(store.parent)
    try:
        yield
    finally:
        place.unlink()


def _place(flower_run: int) -> Path:
    return Path(tempfile.gettempdir()) / f"fedfuse-flower-{flower_run}"


class _Teller(Journal):
    """Says in a few lines, which Flower shows, what it writes into the run's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def prepared(self, info: RunInfo) -> None:
        super().prepared(info)
        kind = f"epsilon {info.epsilon:g}" if info.private else "NOT PRIVATE"
        _say(f"fedfuse: {len(info.nodes)} nodes, {info.rounds} rounds, {kind}; in {self._folder}")

    def round_finished(self, record: RoundRecord) -> None:
        super().round_finished(record)
        told = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        _say(f"fedfuse: round {record.round} of {record.rounds}: {told}")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
