"""The ServerApp: a run's rounds, behind Flower's interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_split
from fedfuse.data.reading import open_reading
from fedfuse.errors import ConfigError
from fedfuse.federation.observer import Silent
from fedfuse.federation.session import Session
from fedfuse.federation.settle import settle
from fedfuse.federation.summary import summarise
from fedfuse.privacy.signing import SigningKey
from fedfuse.runfolder import RunFolder

__all__ = ["KEY_VARIABLE", "OUT_VARIABLE", "STORE_VARIABLE", "make_server_app", "serve"]

STORE_VARIABLE = "FEDFUSE_STORE"
"""Where a real server's prepared test records lie."""
OUT_VARIABLE = "FEDFUSE_OUT"
"""A real server's run folder; one that holds an unfinished run is gone on with."""
KEY_VARIABLE = "FEDFUSE_KEY"
"""A real server's private key, in PEM: nodes answer servers whose public keys they know."""


def make_server_app(
    config: RunConfig | None = None, conduct: Callable[[Grid], None] | None = None
) -> ServerApp:
    """The ServerApp of a run.

    config   a simulation's; None takes Flower's run config
    conduct  what to do with the grid; None serves a real federation, see `serve`
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if conduct is not None:
            conduct(grid)
        else:
            serve(grid, RunConfig.from_flat(context.run_config) if config is None else config)

    return app


def serve(grid: Grid, config: RunConfig) -> None:
    """Conducts a run of real nodes. The server knows no record of theirs, and no count of them.

    Raises ConfigError where what must be public is not declared.
    """
    store, out = os.environ.get(STORE_VARIABLE), os.environ.get(OUT_VARIABLE)
    if not store or not out:
        raise ConfigError(
            f"{STORE_VARIABLE} and {OUT_VARIABLE} are not set",
            where="environment",
            hint="the first names the prepared test records, the second the run folder",
        )
    key = os.environ.get(KEY_VARIABLE)
    signer = SigningKey.load(Path(key)) if key else None
    settled = settle(config, mean_records=None)
    test = open_split(Path(store), "test")
    has_valid = (Path(store) / "valid").is_dir()
    resume = (Path(out) / "config.toml").exists()
    folder = RunFolder.create(Path(out), config, resume=resume)
    session = Session(
        announced=config,
        config=settled.config,
        mechanism=settled.mechanism,
        folder=folder,
        schema=test.schema,
        test=test,
        valid=open_split(Path(store), "valid") if has_valid else None,
        reading=open_reading(Path(store)),
        observer=Silent(),
        key=signer,
        last=config.train.rounds,
    )
    if resume:
        session.resume()
    status = "failed"
    try:
        session.conduct(grid)
        status = "finished"
    finally:
        session.abandon()
        session.release()
        folder.write_summary(
            summarise(session, status=status, assumptions=settled.assumptions, notes=())
        )
