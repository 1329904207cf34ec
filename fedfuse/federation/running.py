"""A node at work: its vault and its SuperNode, started together, watched, and ended together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fedfuse.errors import ConfigError, FederationError
from fedfuse.federation.door import is_guarded
from fedfuse.federation.inspection import superlink
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.processes import Process, environment, free_port, program, wait_until
from fedfuse.federation.vault import LOG

__all__ = ["FLOWER", "SUPERNODE_LOG", "run_node", "supernode_words", "turned_away"]

FLOWER, SUPERNODE_LOG = "flower", "supernode.log"
"""Beside node.toml: Flower's own folder, and what the SuperNode says."""
_SAYINGS = {
    "[code: 2004]": "the server does not know this node's key: have supernode.pub registered",
    "SuperNode authentication is enabled": "the server wants a key: set superlink.key",
    "certificate has expired": "the server's certificate ran out; its operator renews it",
    "certificate verify failed": "superlink.ca does not vouch for the server that answers",
    "Connection attempt failed": "the server is down, its address is another one, or it speaks TLS "
    "and this node does not",
}
_MOST_LOG = 1 << 16
_START_S = 120.0
_LOOK_S = 0.5


def supernode_words(settings: NodeFile) -> list[str | Path]:
    """The command line of the SuperNode. Raises ConfigError where a setting is missing."""
    link, door = settings.superlink, settings.vault.socket
    superlink(link.address)
    if '"' in door:
        raise ConfigError('vault.socket has a " in its path, which Flower cannot be told')
    if link.insecure:
        trust: list[str | Path] = ["--insecure"]
    elif link.ca and link.key:
        trust = ["--root-certificates", link.ca, "--auth-supernode-private-key", link.key]
    else:
        raise ConfigError(
            "superlink.ca and superlink.key are needed",
            hint="without TLS and a key whoever is on the way reads and changes everything",
        )
    return [
        program("flower-supernode"),
        *trust,
        *("--superlink", link.address),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        *("--node-config", f'vault="{door}"'),
    ]


def turned_away(log: Path, since: int = 0) -> str:
    """Why the SuperNode did not get through, as its log says from byte `since` on, in an operator's
    words. Empty where it says nothing of the kind."""
    with log.open("rb") as file:
        file.seek(since)
        text = file.read(_MOST_LOG).decode("utf-8", "replace")
    return next((ours for theirs, ours in _SAYINGS.items() if theirs in text), "")


def run_node(path: Path, tell: Callable[[str], None]) -> None:
    """Runs the node by `path` until Ctrl-C, or until one of its two processes ends.

    Neither is started again by itself: why it ended is for the operator to see.
    Raises FederationError where one ended.
    """
    settings, folder = NodeFile.read(path), path.absolute().parent
    words = supernode_words(settings)
    door = Path(settings.vault.socket)
    if os.geteuid() not in settings.clients():
        raise ConfigError(
            "the vault is open to another user, who must run the SuperNode",
            where=f"{path}: vault.clients",
            hint="start the vault with --only vault, and see docs/deploy/ for the other half",
        )
    if is_guarded(door.parent):
        raise FederationError("the node is running already", where=str(path))
    variables = environment(folder / FLOWER)
    own = [sys.executable, "-P", "-m", "fedfuse", "node", "start", str(path.absolute())]
    with Process(
        [*own, "--only", "vault"], environment=variables, folder=folder, name="the vault"
    ) as vault:
        wait_until(
            lambda: is_guarded(door.parent) and door.exists(),
            _START_S,
            "it does not open",
            vault,
        )
        (folder / FLOWER).mkdir(mode=0o700, exist_ok=True)
        log = folder / SUPERNODE_LOG
        log.touch(mode=0o600)
        began = log.stat().st_size
        with Process(words, environment=variables, folder=folder, log=log) as supernode:
            tell(f"SuperNode {supernode.pid} asks {settings.superlink.address}; log: {log}")
            why = ""
            while vault.ended is None and supernode.ended is None:
                time.sleep(_LOOK_S)
                if not why and (why := turned_away(log, began)):
                    tell(f"the SuperNode does not get through: {why}")
            ended = vault if vault.ended is not None else supernode
        last = max(began, log.stat().st_size - _MOST_LOG)
        why = turned_away(log, last) if ended is supernode else ""
    raise FederationError(
        f"the {'vault' if ended is vault else 'SuperNode'} ended with code {ended.ended}"
        f"{f' ({why})' if why else ''}, so the other one was stopped too",
        where=str(ended.log or door.with_name(LOG)),
        hint="its last lines say why; start the node again when that is mended",
    )
