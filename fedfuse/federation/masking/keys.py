"""Keys for one run of the protocol: agreed on in pairs, and boxes sealed with them.

    agreement   X25519 (RFC 7748), then HKDF with SHA-256 (RFC 5869) over purpose and context
    sealed box  ChaCha20-Poly1305 (RFC 8439), a key for one box in one direction

A key pair is drawn from the operating system, and used in one run of the protocol only.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedfuse.errors import WireError

__all__ = ["KEY_BYTES", "KeyPair", "seal", "unseal"]

KEY_BYTES = 32
_ONE_BOX = bytes(12)
"""A key is for one box, so a fixed nonce repeats nothing."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key of 32 bytes, in no repr."""

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)

    @property
    def public(self) -> bytes:
        """32 bytes."""
        return self._private().public_key().public_bytes_raw()

    def agreed(self, other: bytes, *, purpose: bytes, context: bytes) -> bytes:
        """32 bytes that only this pair and that of `other` can have.

        Raises WireError where `other` is no public key, or one that agrees on nothing.
        """
        try:
            point = self._private().exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:
            raise WireError("a public key of another node is none") from None
        return HKDF(SHA256(), KEY_BYTES, salt=context, info=b"fedfuse " + purpose).derive(point)

    def _private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.secret)


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """A box that only the holder of `key` opens, and only as being `about` this."""
    return ChaCha20Poly1305(key).encrypt(_ONE_BOX, content, about)


def unseal(key: bytes, box: bytes, about: bytes) -> bytes:
    """What is in a box. Raises WireError where it was not sealed with `key`, about this."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONE_BOX, box, about)
    except InvalidTag:
        raise WireError("a share was changed on its way, or is of another run") from None
