"""What one run of the protocol is about: all of it public, and the same for all.

Everything that is signed or sealed covers the digest of these terms, so that a node which was told
something else than another has nothing to do with it.

    n   nodes that were asked
    t   threshold: so many must be there at each stage, and so many shares give a secret
    c   nodes that work together with the server

Adversary: a server that may lie, send different things to different nodes and drop whom it will,
together with c nodes that do all it says. It learns the sum of all honest nodes that are in the
result and nothing else of them where

    2 t > n + c

Bonawitz et al. 2017, section 6: each secret of a node is given up in two ways, one of them by each
honest node. To have both the server needs t of either, and the honest nodes can give n - c in all,
while each of the c gives both: 2 t - 2 c <= n - c. The security is computational (X25519, HKDF,
ChaCha20, Ed25519), and the identities of nodes must have come to each node by another way.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from fedfuse.errors import FederationError

__all__ = ["MOST_NODES", "Terms", "colluders", "threshold_for"]

MOST_NODES = 1000
"""Each node shares a secret with each other: what that costs grows with the square."""
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A run of the protocol. Raises FederationError where it could protect nobody."""

    request: str
    """The id of the round's request, 32 hexadecimal digits: a run of the protocol for each."""
    digest: str
    """sha256 of the run's public configuration."""
    nodes: tuple[str, ...]
    """The names of those that were asked, sorted."""
    threshold: int
    length: int
    """How many numbers a vector has."""

    def __post_init__(self) -> None:
        n = len(self.nodes)
        if not _ID.fullmatch(self.request):
            raise FederationError("request is not 32 hexadecimal digits", where="masking")
        if list(self.nodes) != sorted(set(self.nodes)) or not 2 <= n <= MOST_NODES:
            raise FederationError(
                f"{n} nodes, but masks need 2 to {MOST_NODES} with names of their own, sorted",
                where="masking",
            )
        if not (2 <= self.threshold <= n and colluders(n, self.threshold) >= 0):
            raise FederationError(
                f"threshold {self.threshold} of {n} nodes, but it must be above half of them",
                where="masking",
            )
        if not 1 <= self.length <= 10**10:
            raise FederationError(f"vectors of {self.length} numbers", where="masking")

    def hash(self) -> bytes:
        """sha256 of the terms."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def place(self, node: str) -> int:
        """Where a node's share lies on the polynomial: from 1."""
        return self.nodes.index(node) + 1


def threshold_for(nodes: int) -> int:
    """The smallest threshold above two thirds: up to a third may be lost, a third may collude.

    >>> [threshold_for(n) for n in (2, 3, 5, 9, 100)]
    [2, 3, 4, 7, 67]
    """
    return 2 * nodes // 3 + 1


def colluders(nodes: int, threshold: int, noise_nodes: int = 0) -> int:
    """c: how many nodes at most may work together with a server that lies; below 0: not even none.

    noise_nodes  so many honest nodes' noise must be in the sum

    >>> colluders(9, 7), colluders(9, 7, noise_nodes=5)
    (4, 2)
    """
    return min(2 * threshold - nodes - 1, threshold - max(noise_nodes, 1))
