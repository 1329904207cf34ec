"""A signature holds for one key, one message and one purpose; a private key stays private."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfuse.errors import PrivacyError
from fedfuse.privacy import signing
from fedfuse.privacy.signing import SigningKey


def pem(private: Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def write_key(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey.create(tmp_path / "key.pem")


def test_a_signature_holds_for_its_message_key_and_purpose_alone(
    key: SigningKey, tmp_path: Path
) -> None:
    signature = key.sign(b"message", purpose="line")
    other = SigningKey.create(tmp_path / "other.pem")
    assert signing.verify(key.public, b"message", signature, purpose="line")
    assert not signing.verify(key.public, b"Message", signature, purpose="line")
    assert not signing.verify(key.public, b"", signature, purpose="line")
    assert not signing.verify(other.public, b"message", signature, purpose="line")
    assert not signing.verify(key.public, b"message", signature, purpose="certificate")


def test_purpose_and_message_cannot_be_divided_anew(key: SigningKey) -> None:
    signature = key.sign(b"b c", purpose="a")
    assert not signing.verify(key.public, b"c", signature, purpose="a b")


def test_no_byte_of_a_signature_or_a_key_can_be_changed(key: SigningKey) -> None:
    signature = key.sign(b"message", purpose="line")
    for at in range(64):
        changed = bytearray.fromhex(signature)
        changed[at] ^= 1
        assert not signing.verify(key.public, b"message", changed.hex(), purpose="line")
    for at in range(32):
        changed = bytearray.fromhex(key.public)
        changed[at] ^= 1
        assert not signing.verify(changed.hex(), b"message", signature, purpose="line")


@pytest.mark.parametrize("text", ["", "zz", "0" * 127, "0" * 128, "0" * 129, "\n" * 128, "é" * 128])
def test_what_is_no_signature_does_not_hold(key: SigningKey, text: str) -> None:
    assert not signing.verify(key.public, b"message", text, purpose="line")


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 66, "F" * 64, "none"])
def test_what_is_no_key_verifies_nothing(key: SigningKey, text: str) -> None:
    signature = key.sign(b"message", purpose="line")
    assert not signing.verify(text, b"message", signature, purpose="line")


def test_signatures_are_plain_ed25519_over_purpose_and_message(key: SigningKey) -> None:
    """Who does not use fedfuse can check them; raises where they do not hold."""
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public))
    public.verify(bytes.fromhex(key.sign(b"m", purpose="line")), b"fedfuse line\0m")


def test_the_key_pair_is_that_of_rfc_8032(tmp_path: Path) -> None:
    """RFC 8032, section 7.1, test 1."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    path = write_key(tmp_path / "rfc.pem", pem(Ed25519PrivateKey.from_private_bytes(secret)))
    expected = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert SigningKey.load(path).public == expected


def test_a_key_comes_back_from_its_file(key: SigningKey, tmp_path: Path) -> None:
    again = SigningKey.load(tmp_path / "key.pem")
    assert again.public == key.public
    signature = again.sign(b"m", purpose="line")
    assert signing.verify(key.public, b"m", signature, purpose="line")


def test_a_key_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        SigningKey.create(tmp_path / "key.pem")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_a_key_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    SigningKey.create(path)
    path.chmod(mode)
    with pytest.raises(PrivacyError, match="chmod 600"):
        SigningKey.load(path)


def test_a_key_is_never_overwritten(key: SigningKey, tmp_path: Path) -> None:
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(PrivacyError, match="never overwritten"):
        SigningKey.create(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before


def test_keys_differ(tmp_path: Path) -> None:
    assert len({SigningKey.create(tmp_path / str(number)).public for number in range(20)}) == 20


def test_a_key_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: bytes, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedfuse.privacy.disk.os.pwrite", full)
    with pytest.raises(PrivacyError, match="No space left"):
        SigningKey.create(tmp_path / "key.pem")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["rsa", "ec", "locked", "text", "empty", "public"])
def test_only_a_plain_ed25519_key_is_taken(tmp_path: Path, kind: str) -> None:
    private = Ed25519PrivateKey.generate()
    data = {
        "rsa": lambda: pem(rsa.generate_private_key(65537, 1024)),
        "ec": lambda: pem(ec.generate_private_key(ec.SECP256R1())),
        "locked": lambda: private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        ),
        "text": lambda: b"-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n",
        "empty": lambda: b"",
        "public": lambda: private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    }[kind]()
    path = write_key(tmp_path / "key.pem", data)
    with pytest.raises(PrivacyError, match=r"key\.pem: it holds no Ed25519 private key"):
        SigningKey.load(path)


def test_a_missing_key_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"nosuch\.pem: the key cannot be read: No such file"):
        SigningKey.load(tmp_path / "nosuch.pem")


def test_a_public_key_is_taken_in_digits_or_from_either_file(
    key: SigningKey, tmp_path: Path
) -> None:
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public)).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "key.pub").write_bytes(public)
    for given in (
        key.public,
        f" {key.public.upper()}\n",
        tmp_path / "key.pub",
        tmp_path / "key.pem",
    ):
        assert signing.public_key(str(given)) == key.public


@pytest.mark.parametrize("text", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n"])
def test_what_is_no_public_key_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key.pub").write_bytes(text)
    with pytest.raises(PrivacyError, match="no Ed25519 public key"):
        signing.public_key(str(tmp_path / "key.pub"))


def test_the_secret_is_in_no_repr(key: SigningKey, tmp_path: Path) -> None:
    private = serialization.load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    assert private.private_bytes_raw().hex() not in repr(key) + str(key)
    assert key.public in repr(key)


@pytest.mark.parametrize(
    "module", ["signing", "ledger", "transfer", "verification", "anchor", "tally"]
)
def test_the_books_load_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, fedfuse.privacy.{module}\n"
        "heavy = ('torch', 'numpy', 'flwr', 'opacus', 'dp_accounting')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
