"""`fedfuse explain`: which modalities counted for a prediction, and what within each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import click
import typer


def explain(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    manifest: Annotated[
        Path, typer.Argument(help="CSV, JSON Lines or Parquet.", metavar="MANIFEST")
    ],
    records: Annotated[
        int, typer.Option(min=1, help="The first so many records.", metavar="N")
    ] = 8,
    of: Annotated[
        str,
        typer.Option(help="Explain this class or label, not the predicted one.", metavar="NAME"),
    ] = "",
    out: Annotated[
        Path, typer.Option(help="The folder to write into, rights 0700.", metavar="DIR")
    ] = Path("explanations"),
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count records with an error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
) -> None:
    """Explain predictions: a page, and of each record a picture and the figures as JSON.

    Shapley values of the modalities, exact up to six and sampled above; what happens where one is
    absent or another record's; integrated gradients within each. What is written shows private
    records: it is made here, for its owner to read, and is sent nowhere.

    Example: fedfuse explain runs/quickstart demo/manifest.csv --records 4
    """
    from fedfuse.use.explain import explain as explain_all
    from fedfuse.use.explained_page import PRIVATE, summary, write_explanations
    from fedfuse.use.trained import open_trained

    trained = open_trained(run)
    found = explain_all(trained, manifest, records=records, of=of, skip_bad=skip_bad)
    write_explanations(trained, found, out)
    tree = summary(found)
    if as_json:
        click.echo(json.dumps(tree, indent=2, allow_nan=False))
    else:
        click.echo(f"{tree['records']} records, Shapley values: {tree['shapley']}")
        for name, one in tree["mean_absolute_shapley"].items():
            click.echo(f"{name:<12} {one['value']:.4f}  of {one['records']} records that have it")
    for note in found.records.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(PRIVATE, err=True)
    click.echo(f"written: {out / 'index.html'}", err=True)
