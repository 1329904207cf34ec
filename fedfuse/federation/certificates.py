"""What vouches for a server: an authority of its own, and the certificate that it signs.

    authority.key, authority.pem   made once; nodes get the second, and trust what it signed
    server.key, server.pem         what the SuperLink shows; signed anew each year, by `renew`

Whoever has a real PKI brings a certificate, a key and the authority's certificate of their own, and
names them in server.toml. Keys are P-256, files are for their owner's eyes alone.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfuse.errors import FederationError
from fedfuse.privacy import disk

__all__ = ["LOCAL", "Certificate", "issue", "make_authority"]

LOCAL = ("localhost", "127.0.0.1", "::1")
"""In every certificate: the SuperLink's own processes on its machine check it too."""
AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
_BACK = datetime.timedelta(hours=1)
"""Valid from a little before now: clocks differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a certificate says."""

    path: Path
    names: tuple[str, ...]
    starts: datetime.datetime
    ends: datetime.datetime

    @classmethod
    def read(cls, path: Path, *, key: Path, authority: Path) -> Certificate:
        """The certificate in `path`; it belongs to `key`, and `authority` vouches for it.

        Raises FederationError. Says nothing about its dates, see `refuse_dates`.
        """
        found = _load(path)
        try:
            private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no plain PEM"
            raise FederationError(f"the key cannot be read: {why}", where=str(key)) from None
        if private.public_key() != found.public_key():
            raise FederationError(
                "the certificate was made for another key", where=str(path), hint=f"see {key}"
            )
        try:
            found.verify_directly_issued_by(_load(authority))
        except (ValueError, TypeError, InvalidSignature):
            raise FederationError(
                f"{authority.name} did not sign this certificate",
                where=str(path),
                hint="name the authority whose certificate nodes get; a chain must lead to it "
                "in one step",
            ) from None
        try:
            held = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            raise FederationError(
                "the certificate names no host (subjectAltName)", where=str(path)
            ) from None
        hosts = held.get_values_for_type(x509.DNSName)
        addresses = held.get_values_for_type(x509.IPAddress)
        return cls(
            path=path,
            names=(*hosts, *map(str, addresses)),
            starts=found.not_valid_before_utc,
            ends=found.not_valid_after_utc,
        )

    @property
    def days_left(self) -> float:
        """Until it ends; below 0 when it has."""
        return (self.ends - _now()) / datetime.timedelta(days=1)

    def refuse_dates(self, hint: str) -> None:
        """Raises FederationError where it does not hold at this moment."""
        if self.days_left < 0:
            what = f"the certificate ran out on {self.ends:%Y-%m-%d %H:%M} UTC: no node connects"
        elif self.starts > _now():
            what = f"the certificate holds from {self.starts:%Y-%m-%d %H:%M} UTC on, not before"
        else:
            return
        raise FederationError(what, where=str(self.path), hint=hint)


def make_authority(key: Path, certificate: Path, *, name: str) -> None:
    """A new authority, in new files. Raises OSError, FileExistsError too."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public = private.public_key()
    made = (
        _dated(subject, AUTHORITY_DAYS)
        .issuer_name(subject)
        .public_key(public)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(private, hashes.SHA256())
    )
    disk.create(key, _pem(private))
    disk.create(certificate, made.public_bytes(serialization.Encoding.PEM))


def issue(
    key: Path,
    certificate: Path,
    *,
    authority_key: Path,
    authority: Path,
    names: Sequence[str],
    days: float = SERVER_DAYS,
) -> None:
    """A new key and a certificate for the hosts `names`, in the place of what is there.

    Raises FederationError where the authority cannot be read, OSError.
    """
    signer = _load(authority)
    try:
        held = serialization.load_pem_private_key(authority_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        held = None
    if not isinstance(held, ec.EllipticCurvePrivateKey):
        raise FederationError(
            "the authority's key is not here, so it cannot sign",
            where=str(authority_key),
            hint="bring it back for this moment, or bring a certificate of your own",
        )
    private = ec.generate_private_key(ec.SECP256R1())
    hosts = dict.fromkeys((*names, *LOCAL))
    public = private.public_key()
    made = (
        _dated(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]), days)
        .issuer_name(signer.subject)
        .public_key(public)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(held.public_key()), critical=False
        )
        .sign(held, hashes.SHA256())
    )
    disk.replace(key, _pem(private))
    disk.replace(certificate, made.public_bytes(serialization.Encoding.PEM))


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not in PEM"
        raise FederationError(f"the certificate cannot be read: {why}", where=str(path)) from None


def _dated(subject: x509.Name, days: float) -> x509.CertificateBuilder:
    start = _now() - _BACK
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(max(_now() + datetime.timedelta(days=days), start + _BACK / 2))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
