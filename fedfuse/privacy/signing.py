"""Ed25519 signatures, each made for one purpose, with a key that lies in a file of its own.

    private key   PEM (PKCS 8, not encrypted), readable by its owner alone
    public key    64 hexadecimal digits
    signature     128 hexadecimal digits

A signature covers its purpose too, so that one of a ledger's line is worth nothing on a
certificate. Torch-free.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedfuse.errors import PrivacyError
from fedfuse.privacy import disk

__all__ = ["SigningKey", "public_key", "verify"]

_PUBLIC = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


class SigningKey:
    """A private key. Its secret is in no repr and no message."""

    __slots__ = ("_private", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw().hex()
        """The public key, in hexadecimal digits."""

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """A new key, in a new file that only its owner can read. Raises PrivacyError."""
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            disk.create(path, pem)
        except FileExistsError:
            raise PrivacyError(
                "a file is there already: a key is never overwritten",
                where=str(path),
                hint="take the key that is there, or another path",
            ) from None
        except OSError as error:
            raise PrivacyError(
                f"the key cannot be written: {error.strerror}",
                where=str(path),
                hint=disk.remedy(error),
            ) from None
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key in a file. Raises PrivacyError, also where others may read the file."""
        data = _read(path)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise PrivacyError(
                "others may read this private key", where=str(path), hint=f"chmod 600 {path}"
            )
        try:
            private = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            raise PrivacyError(
                "it holds no Ed25519 private key in plain PEM",
                where=str(path),
                hint="openssl genpkey -algorithm ed25519 makes one",
            )
        return cls(private)

    def sign(self, message: bytes, *, purpose: str) -> str:
        """The signature of `message` for `purpose`."""
        return self._private.sign(_framed(message, purpose)).hex()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public!r})"


def verify(public: str, message: bytes, signature: str, *, purpose: str) -> bool:
    """Whether the holder of `public` signed `message` for `purpose`."""
    if not (_PUBLIC.fullmatch(public) and _SIGNATURE.fullmatch(signature)):
        return False
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    try:
        key.verify(bytes.fromhex(signature), _framed(message, purpose))
    except InvalidSignature:
        return False
    return True


def public_key(given: str) -> str:
    """The public key that `given` is (64 hexadecimal digits) or names (a PEM file, of a public
    key or of a private one). Raises PrivacyError."""
    if _PUBLIC.fullmatch(given.strip().lower()):
        return given.strip().lower()
    path = Path(given)
    data = _read(path)
    if b"PRIVATE KEY" in data:
        return SigningKey.load(path).public
    try:
        public = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        public = None
    if not isinstance(public, Ed25519PublicKey):
        raise PrivacyError("it holds no Ed25519 public key in PEM", where=str(path))
    return public.public_bytes_raw().hex()


def _framed(message: bytes, purpose: str) -> bytes:
    return b"fedfuse " + purpose.encode() + b"\0" + message


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PrivacyError(f"the key cannot be read: {error.strerror}", where=str(path)) from None
