"""Certificates of a server's own: what they hold, and what is refused."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from fedfuse.errors import FederationError
from fedfuse.federation.certificates import LOCAL, Certificate, issue, make_authority


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_authority(tmp_path / "ca.key", tmp_path / "ca.pem", name="an authority")
    sign(tmp_path)
    return tmp_path


def sign(folder: Path, *, days: float = 100) -> None:
    issue(
        folder / "key",
        folder / "pem",
        authority_key=folder / "ca.key",
        authority=folder / "ca.pem",
        names=["fl.example.org", "10.0.0.7"],
        days=days,
    )


def read(folder: Path) -> Certificate:
    return Certificate.read(folder / "pem", key=folder / "key", authority=folder / "ca.pem")


def handshake(folder: Path, authority: Path, name: str) -> None:
    """One TLS connection to a server that shows the certificate. Raises ssl.SSLError."""
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(folder / "pem", folder / "key")
    outside = ssl.create_default_context(cafile=str(authority))
    outside.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            one, _ = listening.accept()
            try:
                inside.wrap_socket(one, server_side=True).close()
            except (ssl.SSLError, OSError):
                one.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname()) as one,
                outside.wrap_socket(one, server_hostname=name),
            ):
                pass
        finally:
            thread.join()


def test_the_certificate_holds_for_its_names_and_this_machine(made: Path) -> None:
    found = read(made)
    assert found.names == ("fl.example.org", "localhost", "10.0.0.7", "127.0.0.1", "::1")
    assert 99 < found.days_left <= 100
    found.refuse_dates("")
    for name in ("fl.example.org", "10.0.0.7", *LOCAL):
        handshake(made, made / "ca.pem", name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(made, made / "ca.pem", "other.example.org")


def test_keys_are_for_their_owner_alone(made: Path) -> None:
    for name in ("ca.key", "key"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600


def test_a_new_certificate_leaves_the_authority_as_it_was(made: Path) -> None:
    before, key = (made / "ca.pem").read_bytes(), (made / "key").read_bytes()
    sign(made, days=50)
    assert (made / "ca.pem").read_bytes() == before
    assert (made / "key").read_bytes() != key
    assert read(made).days_left <= 50
    handshake(made, made / "ca.pem", "localhost")


def test_one_that_ran_out_is_refused_on_both_sides(made: Path) -> None:
    sign(made, days=-0.01)
    with pytest.raises(FederationError, match="ran out on") as caught:
        read(made).refuse_dates("renew it")
    assert caught.value.hint == "renew it"
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(made, made / "ca.pem", "localhost")


def test_another_key_and_another_authority_are_refused(made: Path) -> None:
    other = made / "other"
    other.mkdir()
    make_authority(other / "ca.key", other / "ca.pem", name="an authority")
    with pytest.raises(FederationError, match="did not sign"):
        Certificate.read(made / "pem", key=made / "key", authority=other / "ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, other / "ca.pem", "localhost")
    shutil.copy(made / "key", other / "key")
    sign(made)
    with pytest.raises(FederationError, match="another key"):
        Certificate.read(made / "pem", key=other / "key", authority=made / "ca.pem")
    with pytest.raises(FederationError, match="cannot be read"):
        Certificate.read(made / "nothing", key=made / "key", authority=made / "ca.pem")


def test_without_the_authoritys_key_nothing_is_signed(made: Path) -> None:
    (made / "ca.key").unlink()
    before = (made / "pem").read_bytes()
    with pytest.raises(FederationError, match="is not here"):
        sign(made)
    assert (made / "pem").read_bytes() == before


def test_the_authority_signs_servers_only(made: Path) -> None:
    authority = x509.load_pem_x509_certificate((made / "ca.pem").read_bytes())
    held = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (held.ca, held.path_length) == (True, 0)
