"""A node at work: its vault and its SuperNode, started together, watched, and ended together.

The SuperNode is Flower's, and ends at some errors of its server's: it is started again. The vault
ends where somebody has to look: it is not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fedfuse.errors import ConfigError, FederationError
from fedfuse.federation.door import LOG, is_guarded
from fedfuse.federation.nodefile import NodeFile, superlink
from fedfuse.federation.processes import Process, environment, free_port, program, wait_until

__all__ = [
    "FLOWER",
    "SUPERNODE_LOG",
    "WHOLE",
    "Restarts",
    "run_node",
    "supernode_words",
    "turned_away",
]

FLOWER, SUPERNODE_LOG = "flower", "supernode.log"
"""Beside node.toml: Flower's own folder, and what the SuperNode says."""
_FORGOTTEN = "[code: 2004]"
"""So Flower answers to a key that is not registered, and to one that is while it takes another
SuperNode with it for connected: for a minute after one was killed."""
_REFUSALS = {
    _FORGOTTEN: "the server does not know this node's key: have supernode.pub registered; or it "
    "takes one that was killed for connected, which passes in a minute",
    "SuperNode authentication is enabled": "the server wants a key: set superlink.key",
    "certificate has expired": "the server's certificate ran out; its operator renews it",
    "certificate verify failed": "superlink.ca does not vouch for the server that answers",
}
"""What a SuperNode says that ends it, and would end the next one."""
_FAILURES = {
    "Server error '5": "the server answers with an error of its own: its superlink.log says which",
    "Connection attempt failed": "the server is down, its address is another one, or it speaks TLS "
    "and this node does not",
}
"""What it says that may pass."""
_CONNECTED = b"SuperNode ID: "
"""What it says once it has got through."""
WHOLE = sys.executable, "-P", "-m", "fedfuse.federation.whole"
"""What the SuperNode runs under, see there."""
_MOST_LOG = 1 << 16
_START_S = 120.0
_LOOK_S = 0.5
_FIRST_S, _LONGEST_S = 1.0, 300.0
_QUICK_S = 60.0


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
    return _saying(log, since)[1]


def _saying(log: Path, since: int) -> tuple[str, str]:
    """The same, and first what of it Flower says."""
    with log.open("rb") as file:
        file.seek(since)
        text = file.read(_MOST_LOG).decode("utf-8", "replace")
    known = _REFUSALS | _FAILURES | {"": ""}
    return next((theirs, ours) for theirs, ours in known.items() if theirs in text)


class Restarts:
    """How long to wait before a SuperNode is started again, and when to give up.

    One second, twice as long each time, at most five minutes; from the beginning where it had run
    for a minute. The twentieth in a row that ended within a minute is the last, after some hour of
    tries. Where the server seems to have forgotten the node, at most eight seconds, and the
    sixteenth is the last, after two minutes: that passes in one, or not at all.
    """

    def __init__(self) -> None:
        self.quick = 0
        """How many in a row ended soon after their start."""
        self._pause = _FIRST_S

    def pause_s(self, lasted_s: float, *, forgotten: bool = False) -> float | None:
        """Before the next start, of one that ended after so long; None: there is none."""
        if lasted_s >= _QUICK_S:
            self.quick, self._pause = 0, _FIRST_S
        else:
            self.quick += 1
        longest, most = (8 * _FIRST_S, 16) if forgotten else (_LONGEST_S, 20)
        if self.quick >= most:
            return None
        pause, self._pause = min(self._pause, longest), min(2 * self._pause, longest)
        return pause


def run_node(path: Path, tell: Callable[[str], None]) -> None:
    """Runs the node by `path` until Ctrl-C, or until it cannot go on.

    A SuperNode that ends is started again after a pause, see `Restarts`; the vault runs all the
    while, so budget, keys and data are as they were. Not so where the server refused it for what
    stays so until somebody mends it, nor where the vault ended: why is for the operator to see.

    Raises FederationError where it cannot go on.
    """
    settings, folder = NodeFile.read(path), path.absolute().parent
    supernode_words(settings)  # what is missing is told before anything is started
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
        restarts = Restarts()
        while vault.ended is None:
            began, start = log.stat().st_size, time.monotonic()
            with Process(
                [*WHOLE, *supernode_words(settings)],
                environment=variables,
                folder=folder,
                log=log,
                name="the SuperNode",
            ) as supernode:
                tell(f"SuperNode {supernode.pid} asks {settings.superlink.address}; log: {log}")
                told = False
                while vault.ended is None and supernode.ended is None:
                    time.sleep(_LOOK_S)
                    why = "" if told else _FAILURES.get(_saying(log, began)[0], "")
                    if why and supernode.ended is None:
                        tell(f"the SuperNode does not get through: {why}")
                        told = True
            if vault.ended is None:
                pause = _pause_after(supernode, began, restarts, time.monotonic() - start, tell)
                end = time.monotonic() + pause
                while vault.ended is None and time.monotonic() < end:
                    time.sleep(min(_LOOK_S, pause))
    raise FederationError(
        f"the vault ended with code {vault.ended}, so the SuperNode was stopped too",
        where=str(door.with_name(LOG)),
        hint="its last lines say why; start the node again when that is mended",
    )


def _pause_after(
    supernode: Process,
    began: int,
    restarts: Restarts,
    lasted_s: float,
    tell: Callable[[str], None],
) -> float:
    """How long to wait before a SuperNode is started in the place of this one, whose log began at
    byte `began`. Raises FederationError where none is."""
    log, code = supernode.log or Path(), supernode.ended or 0
    if code < 0:
        how, pause = f"the SuperNode was ended by signal {-code}", restarts.pause_s(lasted_s)
    else:
        said, reason = _saying(log, max(began, log.stat().st_size - _MOST_LOG))
        how = f"the SuperNode ended with code {code}{f' ({reason})' if reason else ''}"
        if said not in _REFUSALS:
            pause = restarts.pause_s(lasted_s)
        elif said == _FORGOTTEN and _CONNECTED in log.read_bytes()[:began]:
            pause = restarts.pause_s(lasted_s, forgotten=True)
        else:
            pause = None
    if pause is None:
        times = f", as {restarts.quick} did soon after their start" if restarts.quick else ""
        raise FederationError(
            f"{how}{times}, so the vault was stopped too",
            where=str(log),
            hint="its last lines say why; start the node again when that is mended",
        )
    tell(f"{how}; it is started again in {pause:g} s")
    return pause
