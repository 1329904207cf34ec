"""A server's SuperLink: started, asked, stopped; and the nodes that it knows.

The SuperLink, what it starts, and what talks to it (`flwr`) are Flower's own programs; nothing here
speaks Flower's protocol. What they say is put into the words of an operator.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedfuse.errors import FederationError
from fedfuse.federation.knocks import failed_handshake
from fedfuse.federation.processes import Follower, Process, environment, program, wait_until
from fedfuse.federation.serverfile import ServerFile
from fedfuse.federation.tickets import (
    KEY_VARIABLE,
    NODES_VARIABLE,
    PEERS_VARIABLE,
    RUNS_VARIABLE,
    STORE_VARIABLE,
)
from fedfuse.privacy import disk

__all__ = ["SuperLink"]

_CONNECTION = "here"
_PIDS = "state/superlink.json"
_START_S, _STOP_S, _CALL_S = 120.0, 20.0, 120.0
_LOOK_S = 0.5
_SAYINGS = (
    ("public key already in use", "this key is registered already; one that was removed stays so"),
)


@dataclass(frozen=True, slots=True)
class SuperLink:
    """The SuperLink of one server's folder, running or not."""

    server: ServerFile

    # ---- the process

    def run(self, ready: Callable[[], None], turned_away: Callable[[str], None]) -> None:
        """Starts it, calls `ready` when it answers, and returns once `stop` was asked for.

        turned_away   is told in a sentence whose TLS handshake failed, and why

        Raises FederationError where it cannot start, or ends by itself; KeyboardInterrupt ends it.
        """
        self.check()
        server, link = self.server, self.server.settings.superlink
        server.home.mkdir(mode=0o700, exist_ok=True)
        server.runs.mkdir(mode=0o700, exist_ok=True)
        server.log.touch(mode=0o600)
        tls = server.settings.tls
        words: list[str | Path] = [
            *(sys.executable, "-P", "-m", "fedfuse.federation.handshakes"),
            program("flower-superlink"),
            *("--host", link.bind, "--port", str(link.port), "--database", server.database),
            *("--ssl-certfile", server.path(tls.certificate)),
            *("--ssl-keyfile", server.path(tls.key)),
            *("--ssl-ca-certfile", server.authority),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        settings = {
            STORE_VARIABLE: str(server.store),
            RUNS_VARIABLE: str(server.runs),
            KEY_VARIABLE: str(server.path(server.settings.keys.signing)),
            NODES_VARIABLE: str(server.registered),
            PEERS_VARIABLE: str(server.peers),
        }
        folder, log = server.home, server.log
        variables = environment(server.home, settings)
        pids = server.path(_PIDS)
        lines = Follower(log)
        with Process(
            words, environment=variables, folder=folder, log=log, name="the SuperLink"
        ) as process:
            disk.replace(pids, json.dumps({"pid": process.pid}).encode())
            wait_until(self.answers, _START_S, "the SuperLink does not answer", process)
            ready()
            while process.ended is None and pids.exists():
                for sentence in filter(None, map(failed_handshake, lines.lines())):
                    turned_away(sentence)
                time.sleep(_LOOK_S)
            asked = not pids.exists()
        pids.unlink(missing_ok=True)
        if not asked:
            raise FederationError(
                f"the SuperLink ended with code {process.ended}",
                where=str(log),
                hint="its last lines say why; when that is mended, start it again, and go on with "
                "a run that was broken off: fedfuse server run --resume",
            )

    def check(self) -> None:
        """Raises FederationError, ConfigError or PrivacyError where it could not start."""
        server, link = self.server, self.server.settings.superlink
        if self.pid is not None:
            raise FederationError(
                "the server is running already", where=str(server.folder), hint="stop it first"
            )
        server.certificate().refuse_dates(self._remedy)
        server.key()
        if not (server.store / "test").is_dir():
            raise FederationError(
                "there are no test records: a run could not be evaluated",
                where=str(server.store),
                hint=f"fedfuse server prepare {server.folder} MANIFEST",
            )
        _check_port(link.bind, link.port)
        _check_database(server.database)

    def stop(self) -> bool:
        """Ends it in order, with what it started; whether there was one."""
        pid = self.pid
        self.server.path(_PIDS).unlink(missing_ok=True)
        if pid is None:
            return False
        for number, seconds in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
            end = time.monotonic() + seconds
            while self._is_ours(pid) and time.monotonic() < end:
                time.sleep(_LOOK_S / 5)
        return True

    @property
    def pid(self) -> int | None:
        """Of the SuperLink's process; None where it does not run."""
        try:
            pid = int(json.loads(self.server.path(_PIDS).read_text())["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if self._is_ours(pid) else None

    @property
    def _remedy(self) -> str:
        return f"fedfuse server renew {self.server.folder}, and start the server anew"

    def _is_ours(self, pid: int) -> bool:
        """Whether it is a process that was given this server's database: numbers come again."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(self.server.database) in words

    def answers(self) -> bool:
        """Whether it says that it is well, and shows the certificate that this server has."""
        context = ssl.create_default_context(cafile=str(self.server.authority))
        try:
            address = f"https://{self.server.local}/health"
            with urllib.request.urlopen(address, timeout=5, context=context) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    # ---- what is asked through `flwr`

    def submit(self, bundle: Path, settings: Path) -> int:
        """Starts a run of the app in `bundle`, with the run config in the TOML file `settings`;
        Flower's number of it. Raises FederationError."""
        told = self._flwr("run", str(bundle), _CONNECTION, "--run-config", str(settings))
        return int(told["run-id"])

    def halt(self, flower_run: int) -> None:
        """Stops a run. Raises FederationError."""
        self._flwr("stop", str(flower_run), _CONNECTION)

    def run_status(self, flower_run: int) -> str:
        """As "running" or "finished:completed". Raises FederationError."""
        told = self._flwr("list", _CONNECTION, "--run-id", str(flower_run))
        return str(told["runs"][0]["status"])

    def nodes(self) -> list[dict[str, str]]:
        """Each registered node: "id", "name" as registered, "status" ("online", ...), "since".

        Raises FederationError.
        """
        known = self._registered()
        found = []
        for node in self._flwr("supernode", "list", _CONNECTION)["nodes"]:
            if node["status"] != "unregistered":
                since = node["online-at"] if node["status"] == "online" else node["offline-at"]
                name = known.get(node["node-id"], {}).get("name", "")
                found.append({"id": node["node-id"], "name": name} |
                             {"status": node["status"], "since": since})  # fmt: skip
        return found

    def register(self, key: Path, name: str) -> str:
        """Lets the node with the public key in the file `key` connect; its number.

        Raises FederationError: no such key, or one that is registered already, or the name is.
        """
        try:
            text = key.read_bytes()
            public = load_ssh_public_key(text)
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no OpenSSH public key"
            raise FederationError(
                f"the node's key cannot be read: {why}",
                where=str(key),
                hint="the node's operator gives the file supernode.pub: one line, ecdsa-sha2-...",
            ) from None
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise FederationError(
                "Flower takes keys on a NIST curve only", where=str(key),
                hint="ssh-keygen -t ecdsa -b 384",
            )  # fmt: skip
        known = self._registered()
        name = name or _comment(text) or f"node-{len(known) + 1}"
        if any(each["name"] == name for each in known.values()):
            raise FederationError(
                f"a node {name!r} is registered already", hint="give another --name, or remove it"
            )
        told = self._flwr("supernode", "register", str(key.absolute()), _CONNECTION, "--name", name)
        node = str(told["node-id"])
        self._keep(known | {node: {"name": name, "key": text.decode().strip()}})
        return node

    def unregister(self, node: str) -> str:
        """Lets a node, by its number or its name, connect no more; its number.

        Raises FederationError.
        """
        known = self._registered()
        number = next((n for n, each in known.items() if each["name"] == node), node)
        if not number.isdigit():
            raise FederationError(f"no node {node!r} is registered", hint="see --list")
        self._flwr("supernode", "unregister", number, _CONNECTION)
        self._keep({n: each for n, each in known.items() if n != number})
        return number

    def _registered(self) -> dict[str, dict[str, str]]:
        path = self.server.registered
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise FederationError("it cannot be read", where=str(path), hint="restore it") from None

    def _keep(self, nodes: dict[str, dict[str, str]]) -> None:
        disk.replace(self.server.registered, json.dumps(nodes, indent=1).encode())

    def _flwr(self, *words: str) -> dict[str, Any]:
        """What a command of Flower's says, as JSON. Raises FederationError."""
        self.server.certificate().refuse_dates(self._remedy)
        if not self.answers():
            raise FederationError(
                "the SuperLink does not answer",
                where=self.server.local,
                hint=f"fedfuse server start {self.server.folder}",
            )
        self._connection()
        try:
            done = subprocess.run(
                [program("flwr"), *words, "--format", "json"],
                env=environment(self.server.home) | {"NO_COLOR": "1"},
                cwd=self.server.home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FederationError(
                f"the SuperLink gave no answer within {_CALL_S:g} s", where=self.server.local
            ) from None
        try:
            told = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            told = {"success": False, "error-message": f"{done.stdout} {done.stderr}"}
        if not told.get("success", True) or done.returncode:
            raise FederationError(_said(str(told.get("error-message", ""))), where="flwr")
        return dict(told)

    def _connection(self) -> None:
        """Tells `flwr` where the SuperLink is."""
        tree = {
            "superlink": {
                "default": _CONNECTION,
                _CONNECTION: {
                    "address": self.server.local,
                    "root-certificates": str(self.server.authority),
                },
            }
        }
        disk.replace(self.server.home / "config.toml", tomli_w.dumps(tree).encode())


def _said(text: str) -> str:
    """What Flower says, in one line of an operator's words."""
    line = " ".join(
        re.sub(
            r"Using SuperLink: \S+ \(\S+\)|\x1b\[[0-9;]*m|[\U0001f000-\U0001ffff✅❌⚠️📄]", "", text
        ).split()
    )
    return next((ours for theirs, ours in _SAYINGS if theirs in line.lower()), line[-400:])


def _check_port(host: str, port: int) -> None:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(kind, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
    except OSError as error:
        raise FederationError(
            f"the server cannot listen there: {error.strerror or error}",
            where=f"{host}:{port}",
            hint="another program has this port, or the address is not this machine's: see "
            "superlink.bind and superlink.port in server.toml",
        ) from None


def _check_database(path: Path) -> None:
    """Raises FederationError where the database cannot be written, or another process has it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=2)) as database:
            database.execute("BEGIN EXCLUSIVE")
            database.rollback()
    except sqlite3.Error as error:
        raise FederationError(
            f"the database cannot be used: {error}",
            where=str(path),
            hint="another SuperLink has it open, or it is damaged: see docs/deploy/runbook.md",
        ) from None


def _comment(key: bytes) -> str:
    """What stands behind an OpenSSH public key: mostly whose it is."""
    return " ".join(key.decode("utf-8", "replace").split()[2:])
