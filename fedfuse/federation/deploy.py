"""A run of real nodes, from the server operator's side: submitted, followed, gone on with.

submit    the bundle and the settings go to the SuperLink; it starts the server app, which finds
          its run folder by a ticket
follow    what the server app writes into the folder is told to an observer; attach begins anew
resume    a new run of Flower's in the old folder: the same run for the nodes and their ledgers,
          from the last finished round on; what was broken off stays spent
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError, FedfuseError, RunFolderError
from fedfuse.federation.bundle import write_bundle
from fedfuse.federation.journal import JOURNAL, is_event, replay
from fedfuse.federation.masking.peers import read_peers
from fedfuse.federation.observer import Observer
from fedfuse.federation.pinning import check_pinned
from fedfuse.federation.processes import Follower
from fedfuse.federation.superlink import SuperLink
from fedfuse.federation.tickets import flower_run_of, is_conducted, issue_ticket
from fedfuse.runfolder import RunFolder

__all__ = ["Started", "attach", "follow", "launch"]

_LOOK_S = 0.5
_ASK_S = 10.0
_START_S = 180.0


@dataclass(frozen=True, slots=True)
class Started:
    """A run that was submitted."""

    run: Path
    flower_run: int
    lines: Follower


def launch(link: SuperLink, config: RunConfig, run: Path, *, resume: bool) -> Started:
    """Submits `config`, to be run in the folder `run`, which lies in the server's runs.

    Raises FederationError where too few nodes are connected or the SuperLink does not take it,
    RunFolderError where the folder is another run's, or a server app is at work in it, ConfigError
    where what all sites must share is left open.
    """
    server = link.server
    if is_conducted(run):
        raise RunFolderError(
            "the run is still going on",
            where=str(run),
            hint=f"stop it: fedfuse server stop {server.folder} --run {run.name}",
        )
    check_pinned(config)
    RunFolder.check(run, config, resume=resume)
    nodes, among = link.nodes(), ""
    if config.federation.secure_aggregation:
        peers = read_peers(server.peers)
        nodes, among = [n for n in nodes if n["name"] in peers], f" named in {server.peers.name}"
    online = [node for node in nodes if node["status"] == "online"]
    if len(online) < config.federation.min_nodes:
        raise FederationError(
            f"{len(online)} of {len(nodes)} registered nodes{among} are connected, but "
            f"{config.federation.min_nodes} are needed",
            where="federation.min_nodes",
            hint="let the others be started, or lower federation.min_nodes",
        )
    lines = Follower(run / JOURNAL)
    with tempfile.TemporaryDirectory(dir=server.home) as temporary:
        bundle, settings = Path(temporary) / "bundle", Path(temporary) / "run.toml"
        write_bundle(bundle)
        settings.write_text(tomli_w.dumps(config.to_flat()))
        flower_run = link.submit(bundle, settings)
    issue_ticket(run, flower_run)
    return Started(run, flower_run, lines)


def attach(link: SuperLink, run: Path) -> Started:
    """A run that was submitted before, to be followed: what is going on, else its last attempt.

    Raises RunFolderError where it is no run of this server's.
    """
    flower_run = flower_run_of(run)
    if flower_run is None:
        raise RunFolderError(
            "no run of this server's",
            where=str(run),
            hint=f"fedfuse server status {link.server.folder} lists them",
        )
    going_on, place, begin = is_conducted(run), 0, 0
    path = run / JOURNAL
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not going_on and is_event(text, "prepared"):
            begin = place
        place += len(text)
        if going_on and is_event(text, "ended"):
            begin = place
    return Started(run, flower_run, Follower(path, place=begin))


def follow(
    link: SuperLink,
    started: Started,
    observer: Observer,
    each: Callable[[str], None] | None = None,
) -> Mapping[str, Any]:
    """Tells `observer` how the run goes, until it ends, and `each` every line; its summary.

    Raises the error that ended the run, or FederationError where the server app ended without a
    word: it was killed, or the SuperLink was.
    """
    run, begun, end, asked = started.run, False, time.monotonic() + _START_S, time.monotonic()
    while True:
        alive = is_conducted(run)  # before the lines are read: what it wrote is then all there
        for text in started.lines.lines():
            begun = True
            if each is not None:
                each(text)
            if (last := replay(text, observer)) is not None:
                return _outcome(link, run, last)
        begun = begun or alive
        if begun and not alive:
            raise _lost(link, run, "the server app was killed, or ended without a word")
        if not begun and time.monotonic() > asked + _ASK_S:
            asked = time.monotonic()
            status = link.run_status(started.flower_run)
            if status.startswith("finished") or asked > end:
                raise _lost(link, run, f"the server app did not begin: Flower says {status!r}")
        time.sleep(_LOOK_S)


def _outcome(link: SuperLink, run: Path, last: Mapping[str, Any]) -> Mapping[str, Any]:
    if last["status"] != "finished":
        begun = (run / "config.toml").exists()
        again = f"; go on with: fedfuse server run {link.server.folder} --resume {run.name}"
        error = FedfuseError(
            str(last.get("problem", "the run was stopped")),
            where=str(last.get("where") or run),
            hint=f"{last.get('hint') or f'see {link.server.log}'}{again if begun else ''}",
        )
        error.exit_code = int(last.get("code") or 130)
        raise error
    return RunFolder.open(run).summary() or {}


def _lost(link: SuperLink, run: Path, what: str) -> FederationError:
    again = f"fedfuse server run {link.server.folder} --resume {run.name}"
    if not link.answers():
        what += "; the SuperLink does not answer either"
        again = f"fedfuse server start {link.server.folder}, and then {again}"
    return FederationError(
        what,
        where=str(link.server.log),
        hint=f"its last lines may say why; nothing of the rounds before is lost: {again}",
    )
