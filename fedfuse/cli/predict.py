"""`fedfuse predict`: what a trained model says of the records of a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

if TYPE_CHECKING:
    from fedfuse.use.trained import Predictor


def predict(
    run: Annotated[
        Path, typer.Argument(help="A run folder, or a model that export wrote.", metavar="RUN")
    ],
    manifest: Annotated[
        Path, typer.Argument(help="CSV, JSON Lines or Parquet.", metavar="MANIFEST")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv, .jsonl or .parquet file, rights 0600.  [default: CSV on stdout]",
            metavar="FILE",
        ),
    ] = None,
    coverage: Annotated[
        float, typer.Option(help="How often a set or interval holds the truth.", metavar="SHARE")
    ] = 0.9,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count records with an error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON on stdout.")
    ] = False,
) -> None:
    """Predict the target of each record, with probabilities and a set or interval.

    The manifest is read as the run's own was; it needs the columns of at least one modality. Labels
    and clients may be missing, and any modality of any record. Nothing leaves this machine.

    \b
    Examples:
      fedfuse predict runs/quickstart new.csv --out predictions.csv
      fedfuse predict model.onnx new.csv --coverage 0.95 --json
    """
    from fedfuse.use.predict import as_text, check_format, write
    from fedfuse.use.predict import predict as predict_all

    if out is not None:
        check_format(out)
    model = _open(run)
    found = predict_all(model, manifest, coverage=coverage, skip_bad=skip_bad)
    if out is not None:
        write(found, out)
    if as_json:
        tree = found.as_dict()
        if out is not None:
            del tree["records"]
        click.echo(json.dumps(tree, indent=2, allow_nan=False))
    elif out is None:
        click.echo(as_text(found).decode(), nl=False)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if found.skipped:
        click.echo(f"note: {found.skipped} bad records left out, as asked", err=True)
    if found.why_none:
        click.echo(f"no interval: {found.why_none}", err=True)
    else:
        click.echo(
            f"coverage {found.coverage:g}, calibrated on {found.calibrated_on} valid records",
            err=True,
        )
    click.echo(f"training: {found.statement}", err=True)
    if out is not None:
        click.echo(f"written: {out}  {len(found.records)} predictions", err=True)


def _open(path: Path) -> Predictor:
    if path.is_file():
        from fedfuse.use.onnxfile import open_onnx

        return open_onnx(path)
    from fedfuse.use.trained import open_trained

    return open_trained(path)
