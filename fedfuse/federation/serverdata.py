"""A server's public test records: decoded once, for all runs on the same data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedfuse.config import RunConfig
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.federation.serverfile import ServerFile

__all__ = ["prepare_store"]


def prepare_store(server: ServerFile, manifest: Path, scenario: Path | None) -> Prepared:
    """Decodes the test and valid records, and puts them into the server's store, in the place of
    others. Training records in the manifest are left out.

    scenario  the run's configuration, whose section data says how records are decoded

    Raises DataError. A run that is going on keeps the records that it opened.
    """
    config = RunConfig() if scenario is None else RunConfig.from_toml(scenario)
    named = dataclasses.replace(config.data, manifest=str(manifest))
    prepared = prepare(named, seed=config.seed, part="server")
    prepared.replace(server.store)
    return prepared
