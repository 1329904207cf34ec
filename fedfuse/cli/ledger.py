"""`fedfuse ledger`: make a node's ledger, read it, check it, hand on what was spent."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedfuse.errors import LedgerError, UsageError

if TYPE_CHECKING:
    from fedfuse.privacy.ledger import Account, Report
    from fedfuse.privacy.spec import Mechanism

app = typer.Typer(
    help="A node's ledger: what was spent on each of its data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

LedgerFile = Annotated[
    Path,
    typer.Argument(help="The node's ledger.", metavar="LEDGER", readable=False),  # Ledger tells
]
KeyFile = Annotated[
    Path | None, typer.Option("--key", help="The node's private key, in PEM.", metavar="KEY")
]
AnchorFile = Annotated[
    Path | None,
    typer.Option(
        "--anchor", help="The file in which the ledger's last line is noted.", metavar="FILE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    epilog="Example: fedfuse ledger init clinic.ledger --node clinic-a --key clinic.pem "
    "--anchor /mnt/other/clinic.anchor"
)
def init(
    ledger: LedgerFile,
    node: Annotated[str, typer.Option(help="The name of the node.", metavar="NAME")],
    key: Annotated[
        Path | None,
        typer.Option(
            help="Sign each line with this private key; it is made if it is not there.",
            metavar="KEY",
        ),
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="Note the last line in this file after each change; put it on another disk.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Make the ledger of a node on whose data nothing was spent yet."""
    from fedfuse.privacy.ledger import Ledger
    from fedfuse.privacy.signing import SigningKey

    if ledger.exists():  # before a key is made that would serve for nothing
        raise LedgerError(
            "a file is there already: a ledger is never overwritten", where=str(ledger)
        )
    if key is not None and not key.exists():
        SigningKey.create(key)
        click.echo(f"made the key {key}: keep a copy, and show it to nobody", err=True)
    made = Ledger.create(ledger, node=node, key=key, anchor=anchor)
    click.echo(f"ledger      {made.id}")
    click.echo(f"node        {made.node}")
    click.echo(f"public key  {made.public_key or 'none: lines are not signed'}")


@app.command(epilog="Example: fedfuse ledger show clinic.ledger --delta 1e-6")
def show(
    ledger: LedgerFile,
    delta: Annotated[float, typer.Option(help="Epsilon is told at this delta.")] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Say what was spent on each data set, by all runs and servers together."""
    from fedfuse.privacy.ledger import Ledger

    if not 0 < delta < 1:
        raise UsageError(f"--delta {delta:g}, but it must lie between 0 and 1")
    book = Ledger.open(ledger)
    rows = [_row(account, delta) for account in book.accounts()]
    if as_json:
        tree = {
            "ledger": book.id,
            "node": book.node,
            "public_key": book.public_key,
            "head": book.head,
            "delta": delta,
            "datasets": rows,
        }
        click.echo(json.dumps(tree, indent=2, allow_nan=False))
    else:
        for line in _table(rows, delta):
            click.echo(line)
    names = Counter(row["dataset"] for row in rows)
    mixed = [name for name, units in names.items() if units > 1]
    _note(ledger, book.problems)
    _note(ledger, [f"{name}: promises of different units do not add up" for name in mixed])


@app.command(epilog="Example: fedfuse ledger verify clinic.ledger --public-key clinic.pub --run r1")
def verify(
    ledger: LedgerFile,
    public_key: Annotated[
        str,
        typer.Option(
            "--public-key",
            "--key",
            help="The key that must have signed it: hexadecimal digits, or a PEM file.",
            metavar="KEY",
        ),
    ] = "",
    anchor: AnchorFile = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A line that it must have, by its hash; any number.", metavar="HASH"),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            help="A server's run folder, whose heads.jsonl tells what it saw; any number.",
            metavar="RUN",
        ),
    ] = None,
    every_signature: Annotated[
        bool,
        typer.Option(
            "--every-signature", help="Check each line's signature; the last one covers them all."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every line of a ledger, and that it is the one that anchor, key and servers know.

    Exit code 0: everything that was asked for holds. 6: something does not, and which line.
    """
    from fedfuse.privacy import signing
    from fedfuse.privacy.verification import Head, read_heads
    from fedfuse.privacy.verification import verify as report_of

    heads, notes = [Head(hash=given.lower(), where="--head") for given in head or ()], []
    for folder in run or ():
        found = read_heads(folder / "heads.jsonl") if (folder / "heads.jsonl").exists() else ()
        if not found:
            notes.append(f"{folder} keeps no heads: nothing was compared with it")
        heads += found
    with _bar(ledger, asked=every_signature) as seen:
        report = report_of(
            ledger,
            public_key=signing.public_key(public_key) if public_key else "",
            anchor=anchor,
            heads=heads,
            every_signature=every_signature,
            seen=seen,
        )
    if as_json:
        click.echo(json.dumps(asdict(report) | {"holds": report.holds}, indent=2))
    else:
        for line in _report_lines(report):
            click.echo(line)
    _note(ledger, [*report.notes, *notes])
    problems = len(report.problems)
    say = "it holds" if report.holds else f"{problems} problem{'' if problems == 1 else 's'}"
    click.echo(f"{ledger}: {say}", err=True)
    if not report.holds:
        raise typer.Exit(LedgerError.exit_code)


@app.command(epilog="Example: fedfuse ledger export clinic.ledger --out clinic.export.json")
def export(
    ledger: LedgerFile,
    out: Annotated[
        Path | None, typer.Option(help="Where to write it, instead of stdout.", metavar="FILE")
    ] = None,
) -> None:
    """Write a ledger as one JSON document, for another ledger to import."""
    from fedfuse.privacy import disk
    from fedfuse.privacy.transfer import exported

    text = exported(ledger)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        disk.create(out, text.encode())
    except OSError as error:
        raise LedgerError(
            f"cannot write it: {error.strerror}", where=str(out), hint=disk.remedy(error)
        ) from None


@app.command(
    "import", epilog="Example: fedfuse ledger import clinic.ledger old.export.json --key clinic.pem"
)
def import_(
    ledger: LedgerFile,
    document: Annotated[
        Path, typer.Argument(help="What another ledger exported.", metavar="EXPORT")
    ],
    key: KeyFile = None,
    anchor: AnchorFile = None,
    public_key: Annotated[
        str,
        typer.Option(help="The key that must have signed the document.", metavar="KEY"),
    ] = "",
) -> None:
    """Add what another ledger spent; what is here already is left out."""
    from fedfuse.privacy import signing
    from fedfuse.privacy.ledger import Ledger
    from fedfuse.privacy.transfer import imported

    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise LedgerError(f"it cannot be read: {error}", where=str(document)) from None
    wanted = signing.public_key(public_key) if public_key else ""
    entries = imported(text, name=str(document), public_key=wanted)
    added = Ledger.open(ledger, key=key, anchor=anchor).adopt(entries)
    spending = sum(entry.mechanism is not None for entry in entries)
    click.echo(f"{added} of {spending} entries were new, and are spent here too")


@app.command(
    epilog="Example: fedfuse ledger anchor clinic.ledger /mnt/other/clinic.anchor --key clinic.pem"
)
def anchor(
    ledger: LedgerFile,
    file: Annotated[Path, typer.Argument(help="A new file on another disk.", metavar="FILE")],
    key: KeyFile = None,
) -> None:
    """Note the last line of a ledger, which you know to be complete, in a new file."""
    from fedfuse.privacy.ledger import Ledger

    Ledger.open(ledger, key=key).anchor(file)


def _row(account: Account, delta: float) -> dict[str, Any]:
    from fedfuse.privacy.accounting import shown

    epsilon = math.inf if account.exposed else _epsilon(account.history, delta)
    row = asdict(account) | {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "epsilon_shown": "NOT PRIVATE" if account.exposed else shown(epsilon),
    }
    del row["history"]
    return row


def _epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """An upper bound, whatever the ledger holds: the fine account of absurd entries takes hours."""
    from fedfuse.privacy import accounting

    if any(mechanism.noise_multiplier < accounting.LEAST_SIGMA for mechanism in history):
        return math.inf
    try:
        above = accounting.epsilon_rdp(history, delta)
    except (ValueError, ArithmeticError):
        return math.inf
    if not above <= 1000:
        return above if above > 1000 else math.inf
    return accounting.epsilon(history, delta)


_COLUMNS = ("dataset", "unit", "runs", "servers", "rounds", "steps", "open")


def _table(rows: Sequence[Mapping[str, Any]], delta: float) -> Iterator[str]:
    if not rows:
        yield "nothing spent"
        return
    lines = [[*_COLUMNS, f"epsilon (delta = {delta:g})"]]
    lines += [[*(str(row[name]) for name in _COLUMNS), row["epsilon_shown"]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    if any(row["open"] for row in rows):
        yield "open: reserved and never committed; it is in the other figures too"


def _report_lines(report: Report) -> Iterator[str]:
    for problem in report.problems:
        yield f"error: {problem}"
    yield f"ledger      {report.ledger or 'unknown'}"
    yield f"node        {report.node or 'unknown'}"
    yield f"entries     {report.entries}"
    yield f"head        {report.head}"
    yield f"public key  {report.public_key or 'none'}"


@contextmanager
def _bar(ledger: Path, *, asked: bool) -> Iterator[Callable[[int], None]]:
    """What is told the size of each line: it shows how far it is, where somebody looks."""
    if not (asked and sys.stderr.isatty()):
        yield lambda size: None
        return
    size = ledger.stat().st_size if ledger.exists() else 0
    with click.progressbar(length=size, label="signatures", file=sys.stderr) as bar:
        yield bar.update


def _note(ledger: Path, texts: Iterable[str]) -> None:
    for text in texts:
        click.echo(f"{ledger}: note: {text}", err=True)
