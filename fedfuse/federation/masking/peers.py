"""Whose masks real nodes share: public identities, in a file that their operators exchanged.

    "clinic-a" = "9fb0b60b00d4f1a521eb379dba82326ae4275517c2bfac44c0598c6d0adc3ee3"
    "clinic-b" = "..."

Each line is what `fedfuse node identity` prints at its node. The lines must reach every node by
another way than the server: one that could put in keys of its own would be in every pair. The same
file serves all, the server too, which only sees by it who keeps to the protocol.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from fedfuse.config import toml
from fedfuse.errors import ConfigError
from fedfuse.privacy.signing import SigningKey

__all__ = ["identity_line", "known_to", "listed_nodes", "read_peers"]

_KEY = re.compile(r"[0-9a-f]{64}")


def identity_line(name: str, public: str) -> str:
    """The line of a node in a file of peers."""
    return f"{json.dumps(name, ensure_ascii=False)} = {json.dumps(public)}"


def read_peers(path: Path) -> dict[str, str]:
    """By name, the public keys in a file of peers. Raises ConfigError: a key stands for one node,
    or one node could count as many."""
    tree = toml(
        path, missing="put the lines that `fedfuse node identity` prints at each node in it"
    )
    for name, key in tree.items():
        if not (0 < len(name) <= 200 and name.isprintable()):
            raise ConfigError("a node's name is 1 to 200 printable characters", where=str(path))
        if not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise ConfigError(
                f"the key of {name!r} is not 64 hexadecimal digits",
                where=str(path),
                hint="each line is what `fedfuse node identity` prints",
            )
    _check_once(tree, str(path))
    return tree


def known_to(name: str, key: SigningKey, peers: Mapping[str, str], *, where: str) -> dict[str, str]:
    """All identities that the node `name` knows, its own among them. Raises ConfigError where the
    others know this node by another key, or under another name."""
    if peers.get(name, key.public) != key.public:
        raise ConfigError(
            f"the key of {name!r}, this node, is not its own",
            where=where,
            hint="`fedfuse node identity` prints the right line; the others need it too",
        )
    known = {**peers, name: key.public}
    _check_once(known, where)
    return known


def listed_nodes(registered: Path, peers: Mapping[str, str]) -> dict[int, str]:
    """By Flower's number, the names of the registered nodes that are among `peers`.

    registered   what `fedfuse server register` keeps

    Raises ConfigError where it cannot be read.
    """
    try:
        tree = json.loads(registered.read_text(encoding="utf-8"))
        names = {int(number): str(each["name"]) for number, each in tree.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            "which nodes are registered cannot be read",
            where=str(registered),
            hint="register nodes with `fedfuse server register`",
        ) from None
    return {number: name for number, name in names.items() if name in peers}


def _check_once(keys: Mapping[str, str], where: str) -> None:
    names: dict[str, str] = {}
    for name, key in keys.items():
        if key in names:
            raise ConfigError(f"{names[key]!r} and {name!r} have the same key", where=where)
        names[key] = name
