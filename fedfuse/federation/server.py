"""The ServerApp: a run's rounds, behind Flower's interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_split
from fedfuse.data.reading import open_reading
from fedfuse.errors import ConfigError
from fedfuse.federation.flower import PackedGrid
from fedfuse.federation.journal import Journal
from fedfuse.federation.masking.peers import listed_nodes, read_peers
from fedfuse.federation.pinning import check_pinned
from fedfuse.federation.session import Session
from fedfuse.federation.settle import masked_assumptions, settle
from fedfuse.federation.summary import summarise
from fedfuse.federation.tickets import (
    KEY_VARIABLE,
    NODES_VARIABLE,
    OUT_VARIABLE,
    PEERS_VARIABLE,
    RUNS_VARIABLE,
    STORE_VARIABLE,
    alone,
    folder_of,
    no_orphan,
)
from fedfuse.privacy.signing import SigningKey
from fedfuse.runfolder import RunFolder

__all__ = ["ENGINE", "make_server_app", "serve"]

ENGINE = "superlink"
"""What a real run says that it ran on."""


def make_server_app(
    config: RunConfig | None = None, conduct: Callable[[Grid], None] | None = None
) -> ServerApp:
    """The ServerApp of a run.

    config   a simulation's; None takes Flower's run config
    conduct  what to do with the grid; None serves a real federation, see `serve`, or simulates one
             where the nodes are Flower's virtual ones, see `virtual`
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if conduct is not None:
            conduct(grid)
            return
        ours = RunConfig.from_flat(context.run_config) if config is None else config
        from fedfuse.federation import virtual  # which knows how simulations are made

        if virtual.is_virtual(grid):
            virtual.conduct_virtual(grid, ours, context.run_id)
        else:
            serve(grid, ours, flower_run=context.run_id)

    return app


def serve(grid: Grid, config: RunConfig, *, flower_run: int = 0) -> None:
    """Conducts a run of real nodes. The server knows no record of theirs, and no count of them.

    flower_run: Flower's number of the run, where the folder is found by a ticket.

    Raises ConfigError where what must be public is not declared, RunFolderError where nobody says
    which folder the run is for, or another server app is at work in it.
    """
    store, out = os.environ.get(STORE_VARIABLE), os.environ.get(OUT_VARIABLE)
    runs = os.environ.get(RUNS_VARIABLE)
    if not store or not (out or runs):
        raise ConfigError(
            f"{STORE_VARIABLE} and {RUNS_VARIABLE} are not set",
            where="environment",
            hint="`fedfuse server start` sets them: the prepared test records, the run folders",
        )
    path = folder_of(Path(runs), flower_run) if runs else Path(str(out))
    with alone(path), no_orphan() if runs else nullcontext():
        journal = Journal(path)
        try:
            _serve(grid, config, path, Path(store), journal)
        except BaseException as error:
            if isinstance(error, Exception):
                journal.ended("failed", error)
            else:
                journal.ended("interrupted")
            raise
        journal.ended("finished")


def _serve(grid: Grid, config: RunConfig, path: Path, store: Path, journal: Journal) -> None:
    check_pinned(config)
    key = os.environ.get(KEY_VARIABLE)
    signer = SigningKey.load(Path(key)) if key else None
    settled = settle(config, mean_records=None)
    assumptions, identities, listed = settled.assumptions, None, None
    if config.federation.secure_aggregation:
        identities, listed = _members()
        assumptions += masked_assumptions(
            config, len(listed), least=min(max(config.federation.min_nodes, 2), len(listed))
        )
    test = open_split(store, "test")
    has_valid = (store / "valid").is_dir()
    resume = (path / "config.toml").exists()
    folder = RunFolder.create(path, config, resume=resume)
    session = Session(
        announced=config,
        config=settled.config,
        mechanism=settled.mechanism,
        folder=folder,
        schema=test.schema,
        test=test,
        valid=open_split(store, "valid") if has_valid else None,
        reading=open_reading(store),
        observer=journal,
        key=signer,
        identities=identities,
        listed=listed,
        removable=settled.config.private and bool(config.privacy.noise_seed),
        last=config.train.rounds,
    )
    notes = session.resume() if resume else ()
    connected = tuple(f"node {node}" for node in sorted(grid.get_node_ids()))
    journal.prepared(
        session.info(
            engine=ENGINE, nodes=connected, workers=1, assumptions=assumptions, notes=notes
        )
    )
    status, problem = "finished", ""
    try:
        if session.first <= session.last:
            session.conduct(PackedGrid(grid, at_a_time=config.federation.at_a_time))
    except Exception as error:
        status, problem = "failed", str(error)
        raise
    except BaseException:  # Flower ends a run that is stopped by SystemExit
        status = "interrupted"
        raise
    finally:
        session.abandon()
        session.release()
        folder.write_summary(
            summarise(
                session,
                status=status,
                problem=problem,
                assumptions=assumptions,
                notes=notes,
                engine=ENGINE,
            )
        )


def _members() -> tuple[dict[str, str], dict[int, str]]:
    """Of the nodes whose updates come under masks: identities by name, and names by number.

    Raises ConfigError where they are not known.
    """
    peers, nodes = os.environ.get(PEERS_VARIABLE), os.environ.get(NODES_VARIABLE)
    if not peers or not nodes:
        raise ConfigError(
            f"{PEERS_VARIABLE} and {NODES_VARIABLE} are not set, but updates are to come masked",
            where="environment",
            hint="`fedfuse server start` sets them: the nodes' identities, and who is registered",
        )
    identities = read_peers(Path(peers))
    return identities, listed_nodes(Path(nodes), identities)
