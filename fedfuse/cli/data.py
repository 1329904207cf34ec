"""`fedfuse data check` and `fedfuse data demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedfuse.data.check import Problem

app = typer.Typer(
    help="Look at a manifest, or make one to play with.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(epilog="Example: fedfuse data check clinic/manifest.csv")
def check(
    manifest: Annotated[
        Path, typer.Argument(help="CSV, JSON Lines or Parquet.", metavar="MANIFEST")
    ],
    modalities: Annotated[
        str, typer.Option(help="Only these modalities, by column name.", metavar="A,B")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Read every record of a manifest and list each problem with its line number.

    Exit code 0: none found. 4: at least one.
    """
    from fedfuse.config import RunConfig
    from fedfuse.data.check import check as problems_of
    from fedfuse.errors import DataError

    if not manifest.is_file():
        raise DataError("no such manifest", where=str(manifest), hint="give the path of a file")
    config = RunConfig().with_values({"data.modalities": modalities}).data
    problems = problems_of(manifest, config)
    if as_json:
        click.echo(json.dumps(_as_dict(manifest, problems), indent=2))
    else:
        for problem in problems:
            click.echo(_line(manifest, problem))
        click.echo(_verdict(manifest, problems), err=True)
    if problems:
        raise typer.Exit(DataError.exit_code)


@app.command(epilog="Example: fedfuse data demo demo && fedfuse simulate --data demo/manifest.csv")
def demo(
    directory: Annotated[Path, typer.Argument(help="Where to write it.", metavar="DIR")],
    records: Annotated[int, typer.Option(min=1, help="How many records.")] = 2400,
    clients: Annotated[int, typer.Option(min=1, help="How many nodes they belong to.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
) -> None:
    """Write the demo data set: made-up images, sounds and texts, no download."""
    from fedfuse.data.demo import make_demo

    click.echo(make_demo(directory, records=records, clients=clients, seed=seed))


def _as_dict(manifest: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "manifest": str(manifest),
        "problems": [
            {
                "line": problem.line,
                "id": problem.id,
                "column": problem.column,
                "what": problem.what,
                "hint": problem.hint,
            }
            for problem in problems
        ],
    }


def _line(manifest: Path, problem: Problem) -> str:
    where = f"{manifest}:{problem.line}" if problem.line else str(manifest)
    about = " ".join(
        part
        for part in (
            f"record {problem.id}" if problem.id else "",
            f"column {problem.column}" if problem.column else "",
        )
        if part
    )
    text = f"{where}: {about}: {problem.what}" if about else f"{where}: {problem.what}"
    return f"{text}\n    hint: {problem.hint}" if problem.hint else text


def _verdict(manifest: Path, problems: Sequence[Problem]) -> str:
    if not problems:
        return f"{manifest}: no problems"
    count = len(problems)
    return f"{manifest}: {count} problem{'s' if count > 1 else ''}"
