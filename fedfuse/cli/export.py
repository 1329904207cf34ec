"""`fedfuse export`: a trained model as a file that runs without fedfuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedfuse.use.spec import FORMATS

if TYPE_CHECKING:
    from fedfuse.use.export import Exported


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    format: Annotated[
        str, typer.Option("--format", help="Of the file.", click_type=click.Choice(list(FORMATS)))
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Matrices of 8-bit whole numbers (onnx).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The file.  [default: RUN/model.onnx]", metavar="FILE")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Compare on these records too.", metavar="MANIFEST"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Write the model as ONNX or torch.export, compared with torch before it is written.

    The copy takes each modality's tensor and whether it is there, for any number of records, and
    gives logits and probabilities. It is compared on records in every pattern of absent modalities;
    where it differs by more than 1e-4 nothing is written. With --int8 the difference is printed.

    \b
    Examples:
      fedfuse export runs/quickstart --data demo/manifest.csv
      fedfuse export runs/quickstart --int8 --out edge.onnx
      fedfuse export runs/quickstart --format torch-export
    """
    from fedfuse.use.export import export as write
    from fedfuse.use.trained import open_trained

    name = "model.int8.onnx" if int8 else f"model{FORMATS[format]}"
    done = write(open_trained(run), out or run / name, format, int8=int8, data=data)
    if as_json:
        click.echo(json.dumps(done.as_dict(), indent=2))
        return
    for label, text in _lines(done):
        click.echo(f"{label:<11}  {text}")


def _lines(done: Exported) -> list[tuple[str, str]]:
    kind = f"{done.format}, int8" if done.int8 else done.format
    size = f"{done.bytes / 1e3:,.0f} kB"
    if done.int8:
        size += f" ({done.float_bytes / 1e3:,.0f} kB in floating point)"
    lines = [
        ("written", f"{done.path}  {kind}, {size}"),
        ("inputs", ", ".join(done.inputs)),
        ("outputs", ", ".join(done.outputs)),
    ]
    for name, gap in done.differences.items():
        what = "made records, all patterns" if name == "made" else "records of --data"
        lines.append(
            (
                "compared" if name == "made" else "",
                f"{gap.records} {what}: largest difference {gap.largest:.2g}, same prediction "
                f"{100 * gap.agreement:.4g} %",
            )
        )
    for place, (name, one) in enumerate(done.latency.items()):
        lines.append(
            (
                "" if place else "latency",
                f"{name}: p50 {one.p50_ms:.2f} ms, p99 {one.p99_ms:.2f} ms a record on this CPU, "
                f"{done.threads} thread{'s' if done.threads > 1 else ''}",
            )
        )
    lines.append(("training", done.training))
    return lines
