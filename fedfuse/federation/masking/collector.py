"""The server's part in the protocol: it passes on what nodes say, and ends with a sum.

    announced  a node's signed keys           -> announcements   to all that announced
    shared     its sealed boxes               -> boxes           to each, those sealed for it
    masked     its masked vector, added up    -> left            to all that sent one
    agreed     its signature of who is left   -> signatures      to all that signed
    revealed   its shares                     -> total           the sum of the vectors

A stage is closed by what comes out of it: raises FederationError where fewer than t nodes are left,
and then there is no sum. A message that breaks a rule raises WireError, and counts as not sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from fedfuse.errors import FederationError, WireError
from fedfuse.federation.masking.keys import KeyPair
from fedfuse.federation.masking.masks import Masked, add_mask, pair_sign
from fedfuse.federation.masking.member import MASK
from fedfuse.federation.masking.messages import (
    ANNOUNCEMENT_BYTES,
    BOX_BYTES,
    SIGNATURE_BYTES,
    Announcement,
    check_parts,
    signed_set,
    view_of,
)
from fedfuse.federation.masking.shares import SHARE_BYTES, combine
from fedfuse.federation.masking.terms import Terms

__all__ = ["Collector"]


class Collector:
    """A run of the protocol as the server sees it; its memory is that of one vector."""

    def __init__(self, terms: Terms, identities: Mapping[str, str]) -> None:
        """identities: by name, the public keys of the nodes that were asked"""
        self._terms = terms
        self._identities = identities
        self._packed: dict[str, bytes] = {}
        self._announced: dict[str, Announcement] = {}
        self._boxes: dict[str, dict[str, bytes]] = {}
        self._sum = np.zeros(terms.length, np.uint32)
        self._left: set[str] = set()
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, dict[str, bytes]] = {}

    def announced(self, node: str, packed: bytes) -> None:
        """Takes an announcement."""
        self._check_new(node, self._terms.nodes, self._packed)
        check_parts({node: packed}, names=[node], size=ANNOUNCEMENT_BYTES, what="announcement")
        self._announced[node] = Announcement.read(packed, self._terms, node, self._identities[node])
        self._packed[node] = packed

    def announcements(self) -> dict[str, bytes]:
        """All announcements, for each node that made one."""
        self._check_enough(self._packed, "announced their keys")
        return dict(self._packed)

    def shared(self, node: str, boxes: Mapping[str, bytes]) -> None:
        """Takes a node's boxes, by the node that each is sealed for."""
        self._check_new(node, self._packed, self._boxes)
        others = set(self._packed) - {node}
        check_parts(boxes, names=others, size=BOX_BYTES, what="boxes")
        self._boxes[node] = dict(boxes)

    def boxes(self) -> dict[str, dict[str, bytes]]:
        """For each node that shared its secrets, the boxes sealed for it, by sender."""
        self._check_enough(self._boxes, "shared their secrets")
        return {
            node: {sender: boxes[node] for sender, boxes in self._boxes.items() if sender != node}
            for node in self._boxes
        }

    def masked(self, node: str, vector: Masked) -> None:
        """Takes a masked vector, and keeps nothing of it but the sum."""
        self._check_new(node, self._boxes, self._left)
        if vector.dtype != np.uint32 or vector.shape != (self._terms.length,):
            raise WireError("a masked vector is not of the length and type that was asked for")
        self._sum += vector
        self._left.add(node)

    def left(self) -> tuple[str, ...]:
        """Who sent a masked vector: the sum will be theirs."""
        self._check_enough(self._left, "sent their masked vectors")
        return tuple(sorted(self._left))

    def agreed(self, node: str, signature: bytes) -> None:
        """Takes a node's word on who is left."""
        self._check_new(node, self._left, self._signatures)
        check_parts({node: signature}, names=[node], size=SIGNATURE_BYTES, what="signature")
        if not signed_set(
            view_of(self._terms, self._packed),
            self._boxes,
            self._left,
            identity=self._identities[node],
            signature=signature,
        ):
            raise WireError(f"{node[:80]!r} did not sign who is left")
        self._signatures[node] = signature

    def signatures(self) -> dict[str, bytes]:
        """All signatures, for each node that signed."""
        self._check_enough(self._signatures, "signed who is left")
        return dict(self._signatures)

    def revealed(self, node: str, shares: Mapping[str, bytes]) -> None:
        """Takes a node's shares: of seeds of those that are left, of keys of those that are not."""
        self._check_new(node, self._signatures, self._shares)
        check_parts(shares, names=self._boxes, size=SHARE_BYTES, what="shares")
        self._shares[node] = dict(shares)

    def total(self) -> Masked:
        """(d,) the sum of the vectors of all that are left, modulo 2^32. Called once."""
        self._check_enough(self._shares, "revealed their shares")
        view = view_of(self._terms, self._packed)
        for node in sorted(self._boxes):
            secret = self._secret(node)
            announced = self._announced[node]
            if node in self._left:
                if hashlib.sha256(secret).digest() != announced.seed_hash:
                    raise self._wrong(node)
                add_mask(self._sum, secret, -1)
                continue
            pair = KeyPair(secret)
            if pair.public != announced.mask_key:
                raise self._wrong(node)
            for other in sorted(self._left):
                key = pair.agreed(self._announced[other].mask_key, purpose=MASK, context=view)
                add_mask(self._sum, key, -pair_sign(other, node))
        return self._sum

    def _secret(self, node: str) -> bytes:
        shares = {self._terms.place(giver): given[node] for giver, given in self._shares.items()}
        try:
            return combine(shares, self._terms.threshold)
        except WireError:
            raise self._wrong(node) from None

    def _wrong(self, node: str) -> FederationError:
        return FederationError(
            f"the shares of a secret of {node[:80]!r} do not give it back: there is no sum",
            where="masking",
            hint="a node gave a wrong share, now or when it shared its secrets",
        )

    def _check_new(self, node: str, may: Collection[str], seen: Collection[str]) -> None:
        if node not in may:
            raise WireError(f"{node[:80]!r} was not there at the stage before")
        if node in seen:
            raise WireError(f"{node[:80]!r} answers twice")

    def _check_enough(self, nodes: Collection[str], what: str) -> None:
        if len(nodes) < self._terms.threshold:
            raise FederationError(
                f"{len(nodes)} of {len(self._terms.nodes)} nodes {what}, but "
                f"{self._terms.threshold} are needed: there is no sum",
                where="masking",
            )
