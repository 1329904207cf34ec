"""A node's part in the protocol, and what it refuses.

    announce  draws two key pairs and a seed for its own mask; signs the public keys
    share     of keys that their owners signed, t or more: shares its seed and its mask key, and
              seals a share of each for each of the others
    open      opens what the others sealed for it
    mask      adds its own mask, and one for each of those
    agree     signs who is left of those it masked with: itself among them, t or more
    reveal    once t of those who are left signed the same: for each node one share, of the seed
              if it is left, of the mask key if not

Guarantees (against the adversary of `terms`)
    A node gives up one share for each other node, never both: it answers each stage once, and
    after a refusal nothing more. What it masked is only unmasked together with t - 1 others.
Not covered
    A node that sends a wrong vector; who was asked, who is lost and when.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from fedfuse.errors import WireError
from fedfuse.federation.masking.keys import KEY_BYTES, KeyPair, seal, unseal
from fedfuse.federation.masking.masks import Masked, add_mask, pair_sign
from fedfuse.federation.masking.messages import (
    ANNOUNCEMENT_BYTES,
    BOX_BYTES,
    SIGNATURE_BYTES,
    STAGES,
    Announcement,
    Parts,
    check_parts,
    sign_set,
    signed_set,
    view_of,
)
from fedfuse.federation.masking.shares import SHARE_BYTES, split
from fedfuse.federation.masking.terms import Terms
from fedfuse.privacy.signing import SigningKey

__all__ = ["MASK", "Member"]

MASK, _SHARES = b"mask", b"shares"
_OVER = "over"


class Member:
    """One node in one run of the protocol. Its methods are called once each, in their order.

    Each raises WireError where the server or another node breaks a rule; then all is over.
    """

    def __init__(
        self, terms: Terms, name: str, key: SigningKey, identities: Mapping[str, str]
    ) -> None:
        """
        key         the node's own identity
        identities  by name, the public keys of all nodes that were asked: known to this node by
                    another way than the server
        """
        if identities.get(name) != key.public or not set(terms.nodes) <= set(identities):
            raise WireError(
                "the identities of nodes that masks are shared with are not all known here",
                hint="every node must know the public key of every other",
            )
        self._terms = terms
        self._name = name
        self._key = key
        self._identities = {node: identities[node] for node in terms.nodes}
        self._share_pair, self._mask_pair = KeyPair(), KeyPair()
        self._seed = secrets.token_bytes(KEY_BYTES)
        self._next = STAGES[0]
        self._view = b""
        self._announced: dict[str, Announcement] = {}
        self._own_shares = b""
        self._announcement = b""
        self._shares: dict[str, bytes] = {}
        self._left: frozenset[str] = frozenset()

    @property
    def terms(self) -> Terms:
        """What this run of the protocol is about."""
        return self._terms

    @property
    def next(self) -> str:
        """The stage that it waits for: one of STAGES, or "over"."""
        return self._next

    def save(self) -> bytes:
        """All that `load` needs, secrets included: it stays with the node."""
        return json.dumps(
            {
                "terms": asdict(self._terms),
                "next": self._next,
                "secrets": [
                    self._share_pair.secret.hex(),
                    self._mask_pair.secret.hex(),
                    self._seed.hex(),
                ],
                "own": [self._view.hex(), self._announcement.hex(), self._own_shares.hex()],
                "announced": {n: a.pack().hex() for n, a in self._announced.items()},
                "shares": {n: both.hex() for n, both in self._shares.items()},
                "left": sorted(self._left),
            }
        ).encode()

    @classmethod
    def load(
        cls, saved: bytes, name: str, key: SigningKey, identities: Mapping[str, str]
    ) -> Member:
        """The node where it was when it was saved."""
        tree = json.loads(saved)
        terms = Terms(**tree["terms"] | {"nodes": tuple(tree["terms"]["nodes"])})
        member = cls(terms, name, key, identities)
        share, mask, seed = map(bytes.fromhex, tree["secrets"])
        member._share_pair, member._mask_pair, member._seed = KeyPair(share), KeyPair(mask), seed
        view, announcement, own = map(bytes.fromhex, tree["own"])
        member._view, member._announcement, member._own_shares = view, announcement, own
        member._next = tree["next"]
        member._announced = {
            n: Announcement.unpack(bytes.fromhex(packed)) for n, packed in tree["announced"].items()
        }
        member._shares = {n: bytes.fromhex(both) for n, both in tree["shares"].items()}
        member._left = frozenset(tree["left"])
        return member

    def announce(self) -> bytes:
        """The node's announcement, packed."""
        self._begin("announce")
        announcement = Announcement(
            share_key=self._share_pair.public,
            mask_key=self._mask_pair.public,
            seed_hash=hashlib.sha256(self._seed).digest(),
        )
        self._announcement = announcement.signed(self._terms, self._name, self._key).pack()
        self._done("announce")
        return self._announcement

    def share(self, announcements: Parts) -> dict[str, bytes]:
        """By node, a sealed box with its shares of this node's two secrets."""
        self._begin("share")
        self._check_there(announcements, "announcements", of=self._terms.nodes)
        check_parts(
            announcements, names=set(announcements), size=ANNOUNCEMENT_BYTES, what="announcements"
        )
        if announcements[self._name] != self._announcement:
            raise WireError("this node's own announcement was changed on its way")
        self._announced = {
            node: Announcement.read(packed, self._terms, node, self._identities[node])
            for node, packed in sorted(announcements.items())
        }
        self._view = view_of(self._terms, announcements)
        nodes = sorted(self._announced)
        places = [self._terms.place(node) for node in nodes]
        threshold = self._terms.threshold
        pairs = {
            node: seed + mask
            for node, seed, mask in zip(
                nodes,
                split(self._seed, places, threshold),
                split(self._mask_pair.secret, places, threshold),
                strict=True,
            )
        }
        self._own_shares = pairs.pop(self._name)
        boxes = {
            node: seal(self._box_key(self._name, node), both, self._view)
            for node, both in pairs.items()
        }
        self._done("share")
        return boxes

    def open(self, boxes: Parts) -> None:
        """Takes the `boxes` that others sealed for this node, by sender."""
        self._begin("open")
        self._check_there({*boxes, self._name}, "boxes", of=self._announced)
        check_parts(boxes, names=set(boxes) - {self._name}, size=BOX_BYTES, what="boxes")
        self._shares = {
            node: unseal(self._box_key(node, self._name), box, self._view)
            for node, box in boxes.items()
        } | {self._name: self._own_shares}
        self._done("open")

    def mask(self, steps: NDArray[np.int64]) -> Masked:
        """`steps` (d,) modulo 2^32 under this node's mask and those that it shares."""
        self._begin("mask")
        if steps.shape != (self._terms.length,):
            raise WireError(f"a vector of {steps.size} numbers, but {self._terms.length} are due")
        masked = steps.astype(np.uint32)
        add_mask(masked, self._seed, +1)
        for node in sorted(set(self._shares) - {self._name}):
            key = self._mask_pair.agreed(
                self._announced[node].mask_key, purpose=MASK, context=self._view
            )
            add_mask(masked, key, pair_sign(self._name, node))
        self._done("mask")
        return masked

    def agree(self, left: Collection[str]) -> bytes:
        """The node's signature that these are left; it has masked with each of them."""
        self._begin("agree")
        self._check_there(left, "nodes that are left", of=self._shares)
        self._left = frozenset(left)
        signature = sign_set(self._view, self._shares, self._left, self._key)
        self._done("agree")
        return signature

    def reveal(self, signatures: Parts) -> dict[str, bytes]:
        """By node, one share: of its seed if it is left, of its mask key if it was lost."""
        self._begin("reveal")
        self._check_there({*signatures, self._name}, "signatures", of=self._left)
        check_parts(signatures, names=set(signatures), size=SIGNATURE_BYTES, what="signatures")
        for node, signature in signatures.items():
            if not signed_set(
                self._view,
                self._shares,
                self._left,
                identity=self._identities[node],
                signature=signature,
            ):
                raise WireError(f"{node[:80]!r} was told of other nodes that are left")
        revealed = {
            node: both[:SHARE_BYTES] if node in self._left else both[SHARE_BYTES:]
            for node, both in self._shares.items()
        }
        self._done("reveal")
        return revealed

    def _box_key(self, sender: str, receiver: str) -> bytes:
        """The key of the one box from `sender` to `receiver`; this node is one of the two."""
        other = receiver if sender == self._name else sender
        return self._share_pair.agreed(
            self._announced[other].share_key,
            purpose=_SHARES + self._terms.place(sender).to_bytes(8, "big"),
            context=self._view,
        )

    def _check_there(self, nodes: Collection[str], what: str, *, of: Collection[str]) -> None:
        """Raises WireError unless `nodes` are t or more `of` those, this one among them."""
        known = set(nodes) & set(of)
        if len(known) != len(nodes):
            raise WireError(f"{what}: one is of a node that was not there before")
        if self._name not in known:
            raise WireError(f"{what}: this node is not among them")
        if len(known) < self._terms.threshold:
            raise WireError(f"{what}: {len(known)}, but {self._terms.threshold} are needed")

    def _begin(self, stage: str) -> None:
        """Nothing is done twice; until `_done` this run counts as over."""
        there, self._next = self._next, _OVER
        if there != stage:
            raise WireError(f"stage {stage} was asked for, but this run of masks is at {there}")

    def _done(self, stage: str) -> None:
        self._next = (*STAGES, _OVER)[STAGES.index(stage) + 1]
