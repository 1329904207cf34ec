"""`fedfuse report privacy` and `fedfuse report verify`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedfuse.cli import budget
from fedfuse.errors import CertificateError, PrivacyError, RunFolderError, UsageError

if TYPE_CHECKING:
    from fedfuse.reports.facts import Facts

app = typer.Typer(
    help="What was promised and what was spent: a report, and certificates that others can check.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(epilog="Example: fedfuse report privacy runs/quickstart-20261123-164447")
def privacy(
    sources: Annotated[
        list[Path], typer.Argument(help="Run folders, or nodes' ledgers.", metavar="RUN|LEDGER...")
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="Where the page goes; of one run: RUN/privacy.html.", metavar="FILE"),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            help="Where the certificate goes; of one run: RUN/certificate.json.", metavar="FILE"
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Sign the certificate with this private key, in PEM.", metavar="KEY"),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="Of ledgers' figures; a run has its own.", metavar="D")
    ] = 1e-5,
    epsilon: Annotated[
        float | None, typer.Option(help="The most that a ledger's data may spend.", metavar="E")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what was promised, what was spent and what that means; write a page and a certificate.

    All figures are computed anew from the books. Several sources that are on the same data get a
    section on what they cost together. A run without a promise is said to be NOT PRIVATE, and
    gets no figure and no certificate.
    """
    from fedfuse.privacy.signing import SigningKey
    from fedfuse.reports.certificate import certify, text
    from fedfuse.reports.privacy_page import page

    _check_numbers(delta, epsilon)
    signer = SigningKey.load(key) if key else None
    sections = _gather(sources, delta, epsilon)
    private = all(section.private for section in sections)
    if len(sections) == 1 and sections[0].kind == "run":
        html = html or sources[0] / "privacy.html"
        if private:
            certificate = certificate or sources[0] / "certificate.json"
    if key and certificate is None:
        raise UsageError(
            "--key signs a certificate, but none is to be written",
            hint="say where: --certificate FILE" if private else "NOT PRIVATE: there is none",
        )
    now = datetime.now(UTC)
    written = []
    if certificate is not None:
        _write(certificate, text(certify(sections, now=now, key=signer)))
        by = f"signed with key {signer.public}" if signer else "UNSIGNED: --key KEY signs it"
        written.append(f"{certificate}  the certificate, {by}")
    if html is not None:
        _write(html, page(sections, now=now))
        written.append(f"{html}  the report as a page")
    if as_json:
        click.echo(
            json.dumps([budget.tree(section) for section in sections], indent=2, allow_nan=False)
        )
    else:
        for section in sections:
            for line in budget.describe(section):
                click.echo(line)
    for line in written:
        click.echo(f"written: {line}", err=True)


@app.command(epilog="Example: fedfuse report verify certificate.json --public-key clinic.pub")
def verify(
    certificate: Annotated[Path, typer.Argument(help="The certificate.", metavar="CERTIFICATE")],
    ledger: Annotated[
        Path | None,
        typer.Option(help="The releases must be those of this node's ledger.", metavar="LEDGER"),
    ] = None,
    public_key: Annotated[
        str,
        typer.Option(
            help="The signature must be of this key: 64 hexadecimal digits, or a PEM file.",
            metavar="KEY",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check a certificate: its signature, and each epsilon, derived anew by a second accountant.

    Exit code 0: it holds. 6: it does not; each fault is a line.
    """
    from fedfuse.privacy import signing
    from fedfuse.reports.examination import examine

    try:
        data = certificate.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"it cannot be read: {error.strerror}", where=str(certificate)
        ) from None
    wanted = signing.public_key(public_key) if public_key else ""
    found = examine(data, where=str(certificate), public_key=wanted, ledger=ledger)
    if as_json:
        click.echo(json.dumps(budget.findings(found), indent=2))
    else:
        for line in budget.verdict(found, certificate):
            click.echo(line)
    for fault in found.faults:
        click.echo(f"error: {certificate}: {budget.plain(fault)}", err=True)
    if found.faults:
        raise typer.Exit(CertificateError.exit_code)


def _gather(sources: Sequence[Path], delta: float, epsilon: float | None) -> tuple[Facts, ...]:
    from fedfuse.reports.budget import of_ledger, of_run
    from fedfuse.reports.together import together

    different = {source.resolve(): source for source in sources}
    sections: list[Facts] = []
    for source in different.values():
        if sys.stderr.isatty():
            click.echo(f"reading {source} ...", err=True)
        if source.is_dir():
            sections.append(of_run(source))
        elif source.exists():
            sections.append(of_ledger(source, delta=delta, allowed=epsilon))
        else:
            raise RunFolderError(
                "no run and no ledger is here",
                where=str(source),
                hint="give a run's folder, or a node's ledger file",
            )
    return (*sections, *together(sections))


def _check_numbers(delta: float, epsilon: float | None) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"--delta {delta} must lie between 0 and 1")
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        raise UsageError(f"--epsilon {epsilon} must be a positive number")


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise PrivacyError(f"cannot write it: {error.strerror}", where=str(path)) from None
