"""`fedfuse data check` and `fedfuse data demo`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedfuse.data.spec import DEMOS, PARTITIONS, DataConfig
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.problem import Problem

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
    partition: Annotated[
        str, typer.Option(help="How records become nodes.", click_type=click.Choice(PARTITIONS))
    ] = "client",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Read every record of a manifest, list each problem with its line, and say what is there.

    Exit code 0: no errors, though there may be warnings. 4: at least one error.
    """
    from fedfuse.config import RunConfig
    from fedfuse.data.check import check as problems_of

    if not manifest.is_file():
        raise DataError("no such manifest", where=str(manifest), hint="give the path of a file")
    config = RunConfig().with_values({"data.modalities": modalities, "data.partition": partition})
    problems = problems_of(manifest, config.data)
    contents = _contents(manifest, config.data)
    if as_json:
        tree = {
            "manifest": str(manifest),
            "contents": asdict(contents) if contents else None,
            "problems": [asdict(problem) for problem in problems],
        }
        click.echo(json.dumps(tree, indent=2))
    else:
        for line in (*_problem_lines(manifest, problems), *_content_lines(contents)):
            click.echo(line)
    errors = sum(not problem.warning for problem in problems)
    warnings = len(problems) - errors
    click.echo(f"{manifest}: {_count(errors, 'error')}, {_count(warnings, 'warning')}", err=True)
    if errors:
        raise typer.Exit(DataError.exit_code)


@app.command(epilog="Example: fedfuse data demo demo && fedfuse simulate --data demo/manifest.csv")
def demo(
    directory: Annotated[Path, typer.Argument(help="Where to write it.", metavar="DIR")],
    scenario: Annotated[
        str, typer.Option(help="Which one.", click_type=click.Choice(DEMOS))
    ] = "inspection",
    records: Annotated[int, typer.Option(min=0, help="How many records; 0: its own size.")] = 0,
    clients: Annotated[
        int, typer.Option(min=0, help="How many nodes they belong to; 0: its own number.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
) -> None:
    """Write a demo data set: made-up records with their files, no download."""
    from fedfuse.data.scenes import make

    click.echo(make(scenario, directory, records=records, clients=clients, seed=seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a manifest holds, as far as it can be read."""

    records: int
    splits: dict[str, int]
    clients: dict[str, int]
    modalities: tuple[Found, ...]
    target: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One modality: what it is, the shape of one record, how many records have it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    present: int


def _contents(path: Path, config: DataConfig) -> Contents | None:
    """What the manifest holds; None where it cannot be read at all, which is a problem listed."""
    from fedfuse.data.inline import BLANKS
    from fedfuse.data.layout import plan
    from fedfuse.data.manifest import read_manifest

    try:
        layout = plan(read_manifest(path), config)
    except DataError:
        return None
    rows = layout.manifest.rows

    def present(columns: Sequence[str]) -> int:
        return sum(
            any(row.cells.get(name, "").strip().lower() not in BLANKS for name in columns)
            for row in rows
        )

    def by(column: str) -> dict[str, int]:
        counts = Counter(row.cells.get(column, "").strip() for row in rows)
        return {name: counts[name] for name in sorted(counts) if name}

    return Contents(
        records=len(rows),
        splits=by("split"),
        clients=by("client"),
        modalities=tuple(
            Found(
                name=source.name,
                kind=source.kind.value,
                shape=tuple(spec.shape),
                present=present(source.columns),
            )
            for source, spec in zip(layout.sources, layout.specs, strict=True)
        ),
        target=layout.target.kind.value,
        classes=layout.target.classes,
        notes=layout.notes,
    )


def _problem_lines(manifest: Path, problems: Sequence[Problem]) -> Iterator[str]:
    for problem in problems:
        level = "warning" if problem.warning else "error"
        yield f"{manifest}: {level}: {problem}"
        if problem.hint:
            yield f"    hint: {problem.hint}"


def _content_lines(contents: Contents | None) -> Iterator[str]:
    if contents is None:
        return
    splits = ", ".join(f"{count} {name}" for name, count in contents.splits.items())
    yield f"records     {contents.records}" + (f": {splits}" if splits else "")
    if contents.clients:
        sizes = contents.clients.values()
        yield f"clients     {len(sizes)}, with {min(sizes)} to {max(sizes)} records"
    for found in contents.modalities:
        share = found.present / max(1, contents.records)
        shape = " x ".join(map(str, found.shape))
        yield f"modality    {found.name}: {found.kind}, {shape}, in {share:.0%} of the records"
    classes = f", {len(contents.classes)} classes" if contents.classes else ""
    yield f"target      {contents.target}{classes}"
    for note in contents.notes:
        yield f"note        {note}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
