"""Identities of simulated nodes: made for one run, and known to all of them from its beginning.

A simulation has all keys on one machine, so they protect nobody; that nodes know each other's
public keys by another way than the server is what a real federation has to bring.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from fedfuse.config import RunConfig
from fedfuse.federation.masking.keys import KEY_BYTES
from fedfuse.federation.masking.seat import Seat
from fedfuse.federation.masking.unfinished import InState
from fedfuse.federation.wire import config_digest
from fedfuse.privacy.signing import SigningKey

__all__ = ["Roster"]


@dataclass(frozen=True, slots=True)
class Roster:
    """The names of all nodes, and a private key for each."""

    names: tuple[str, ...]
    secrets: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def drawn(cls, names: tuple[str, ...]) -> Roster:
        """New keys for these nodes."""
        return cls(names, tuple(secrets.token_bytes(KEY_BYTES) for _ in names))

    @property
    def identities(self) -> dict[str, str]:
        """By name, the public keys."""
        return {name: _key(one).public for name, one in zip(self.names, self.secrets, strict=True)}

    def seat(self, index: int, config: RunConfig, state: RecordDict) -> Seat:
        """The place of node `index`, whose state is `state`."""
        name, key, identities = self.names[index], _key(self.secrets[index]), self.identities
        return Seat(
            name=name,
            key=key,
            identities=identities,
            digest=config_digest(config),
            clip_norm=config.privacy.clip_norm,
            unfinished=InState(state, name, key, identities),
        )


def _key(secret: bytes) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
