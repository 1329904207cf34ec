"""What goes between nodes and server, stage by stage.

    stage     to a node                            from it
    announce  the terms                            an announcement
    share     everybody's announcements            a box with two shares for each of the others
    open      the boxes for it, by sender          that it opened them
    mask      what it is to compute                its masked vector
    agree     who sent one                         its signature of that
    reveal    the signatures                       one share for each node that shared

Beside the vector a message is named byte strings of known lengths: `Parts`. It is read strictly,
and names the request that it belongs to. The terms are signed by the server, if it has a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ConfigRecord

from fedfuse.errors import FederationError, WireError
from fedfuse.federation.masking.keys import KEY_BYTES
from fedfuse.federation.masking.shares import SHARE_BYTES
from fedfuse.federation.masking.terms import Terms
from fedfuse.privacy import signing
from fedfuse.privacy.signing import SigningKey

__all__ = [
    "ANNOUNCEMENT_BYTES",
    "BOX_BYTES",
    "SIGNATURE_BYTES",
    "STAGES",
    "Announcement",
    "Parts",
    "check_parts",
    "from_config",
    "sign_set",
    "signed_set",
    "terms_from_config",
    "terms_to_config",
    "to_config",
    "view_of",
]

STAGES = ("announce", "share", "open", "mask", "agree", "reveal")
SIGNATURE_BYTES = 64
ANNOUNCEMENT_BYTES = 3 * KEY_BYTES + SIGNATURE_BYTES
BOX_BYTES = 2 * SHARE_BYTES + 16
_ANNOUNCEMENT, _SURVIVORS, _TERMS = "masking announcement", "masking survivors", "masking terms"

Parts = Mapping[str, bytes]
"""By the name of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A node's keys for one run of the protocol, signed by its identity."""

    share_key: bytes
    """Public: shares for the node are sealed with it."""
    mask_key: bytes
    """Public: pairwise masks are made with it."""
    seed_hash: bytes
    """sha256 of the seed of the node's own mask, so that a wrong one shows."""
    signature: bytes = b""

    def signed(self, terms: Terms, node: str, key: SigningKey) -> Announcement:
        """The same, with the signature of `node`, which holds `key`."""
        signature = key.sign(self._body(terms, node), purpose=_ANNOUNCEMENT)
        return Announcement(
            share_key=self.share_key,
            mask_key=self.mask_key,
            seed_hash=self.seed_hash,
            signature=bytes.fromhex(signature),
        )

    def pack(self) -> bytes:
        """ANNOUNCEMENT_BYTES bytes."""
        return self.share_key + self.mask_key + self.seed_hash + self.signature

    @classmethod
    def unpack(cls, packed: bytes) -> Announcement:
        """What `pack` gave; its signature is not looked at."""
        fields = [packed[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(3)]
        return cls(
            share_key=fields[0],
            mask_key=fields[1],
            seed_hash=fields[2],
            signature=packed[3 * KEY_BYTES :],
        )

    @classmethod
    def read(cls, packed: bytes, terms: Terms, node: str, identity: str) -> Announcement:
        """What `node`, whose public key is `identity`, signed for these terms. Raises WireError."""
        announced = cls.unpack(packed)
        told = announced.signature.hex()
        if not signing.verify(identity, announced._body(terms, node), told, purpose=_ANNOUNCEMENT):
            raise WireError(
                f"{node[:80]!r} did not sign the keys that came in its name",
                hint="somebody changed them, or the node has another identity than is known here",
            )
        return announced

    def _body(self, terms: Terms, node: str) -> bytes:
        name = node.encode()
        return terms.hash() + name + self.share_key + self.mask_key + self.seed_hash


def view_of(terms: Terms, announcements: Parts) -> bytes:
    """sha256 of the terms and of who announced which keys: what nodes must agree on."""
    return hashlib.sha256(terms.hash() + _listed(sorted(announcements.items()))).digest()


def sign_set(view: bytes, shared: Collection[str], left: Collection[str], key: SigningKey) -> bytes:
    """A node's word that of those that shared their secrets these are left, in this view."""
    signature = key.sign(_sets(view, shared, left), purpose=_SURVIVORS)
    return bytes.fromhex(signature)


def signed_set(
    view: bytes, shared: Collection[str], left: Collection[str], *, identity: str, signature: bytes
) -> bool:
    """Whether the holder of `identity` gave that word."""
    body = _sets(view, shared, left)
    return signing.verify(identity, body, signature.hex(), purpose=_SURVIVORS)


def check_parts(parts: Parts, *, names: Collection[str], size: int, what: str) -> None:
    """Raises WireError unless there is one part of `size` bytes under each of `names`."""
    if set(parts) != set(names):
        raise WireError(f"{what}: {len(parts)} nodes are told of, which are not those expected")
    if any(type(part) is not bytes or len(part) != size for part in parts.values()):
        raise WireError(f"{what}: a part is not {size} bytes long")


def to_config(stage: str, request: str, parts: Parts) -> ConfigRecord:
    """`parts` of the run of the protocol for `request`, as Flower carries them."""
    names = sorted(parts)
    told = [bytes(parts[name]) for name in names]
    return ConfigRecord({"stage": stage, "request": request, "names": names, "parts": told})


def from_config(config: Mapping[str, Any], stage: str, terms: Terms) -> dict[str, bytes]:
    """The parts of a message of `stage`. Raises WireError where it is anything else."""
    if set(config) != {"stage", "request", "names", "parts"}:
        raise WireError("a message of masks: stage, request, names and parts, and nothing else")
    if config["stage"] != stage:
        raise WireError(f"a message of stage {str(config['stage'])[:40]!r} came in stage {stage}")
    if config["request"] != terms.request:
        raise WireError("a message of masks for another request")
    names, parts = config["names"], config["parts"]
    if not (isinstance(names, list) and isinstance(parts, list) and len(names) == len(parts)):
        raise WireError("names and parts must be two lists of one length")
    known = all(isinstance(name, str) and name in terms.nodes for name in names)
    if not known or names != sorted(set(names)):
        raise WireError("names must be those of nodes that were asked, sorted, none twice")
    if not all(type(part) is bytes for part in parts):
        raise WireError("parts must be bytes")
    return dict(zip(names, parts, strict=True))


def terms_to_config(terms: Terms, key: SigningKey | None = None) -> ConfigRecord:
    """`terms` as Flower carries them: what a node is told in stage "announce"; `key`: who asks."""
    signed = {"server": "", "signature": ""}
    if key is not None:
        signature = key.sign(terms.hash(), purpose=_TERMS)
        signed = {"server": key.public, "signature": signature}
    told = asdict(terms) | {"nodes": list(terms.nodes)}
    return ConfigRecord({"stage": "announce"} | told | signed)


def terms_from_config(config: Mapping[str, Any]) -> tuple[Terms, str]:
    """The terms in a message, and the public key of the server that signed them, or "".

    Raises WireError where it is anything else, or names a server that did not sign it.
    """
    kinds = {
        "stage": str,
        "request": str,
        "digest": str,
        "nodes": list,
        "threshold": int,
        "length": int,
        "server": str,
        "signature": str,
    }
    if {key: type(value) for key, value in config.items()} != kinds:
        raise WireError("terms of masks must have their fields, and nothing else")
    nodes = config["nodes"]
    if not all(isinstance(node, str) and 0 < len(node) <= 200 for node in nodes):
        raise WireError("terms of masks: nodes must be names")
    try:
        terms = Terms(
            request=config["request"],
            digest=config["digest"],
            nodes=tuple(nodes),
            threshold=config["threshold"],
            length=config["length"],
        )
    except FederationError as error:
        raise WireError(f"terms of masks: {error.what}") from None
    server, signature = config["server"], config["signature"]
    if server and not signing.verify(server, terms.hash(), signature, purpose=_TERMS):
        raise WireError(f"terms of masks: server {server[:12]!r} did not sign them")
    return terms, server


def _sets(view: bytes, shared: Collection[str], left: Collection[str]) -> bytes:
    return (
        view
        + _listed((name, b"") for name in sorted(shared))
        + _listed((name, b"") for name in sorted(left))
    )


def _listed(items: Iterable[tuple[str, bytes]]) -> bytes:
    """`items` so that no two lists look alike: each length comes before what it is of."""
    listed = list(items)
    out = len(listed).to_bytes(8, "big")
    for name, part in listed:
        text = name.encode()
        out += len(text).to_bytes(8, "big") + text + len(part).to_bytes(8, "big") + part
    return out
