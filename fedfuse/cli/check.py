"""`fedfuse check`: whether a scenario's model can keep its promise, and what a step will take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedfuse.cli.scenario import Flags, configuration

if TYPE_CHECKING:
    from fedfuse.config import RunConfig

MB = 1e6


def check(
    scenario: Annotated[
        Path | None, typer.Argument(help="See simulations/.", metavar="[SCENARIO.toml]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For the shapes of this manifest.", metavar="MANIFEST")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> int:
    """Check before a run that the model keeps records apart, and how much memory a step takes.

    Layers, a probe on made-up records, and the engine against a loop over records; no record is
    read. Pretrained weights are fetched, and what real nodes must have in their configuration is
    told. Exit code 5 where the model would break the promise.

    Example: fedfuse check simulations/quickstart.toml
    """
    from fedfuse.cli.models import schema_of
    from fedfuse.federation.pinning import pin
    from fedfuse.models.made import made_batch
    from fedfuse.models.model import build_model
    from fedfuse.privacy.memory import ALLOCATOR, peak_of_step
    from fedfuse.privacy.safety import check as look
    from fedfuse.tasks import Task

    given = configuration(Flags(scenario=scenario, data=data, settings=tuple(settings or ())))
    config = pin(given)
    schema = schema_of(config, None)
    vocabulary = config.data.vocabulary
    model = build_model(schema, config.model, vocabulary=vocabulary, seed=config.seed)
    loss = Task.of(schema.target, config.model).loss
    made = made_batch(schema, 4, vocabulary=vocabulary, model=model)
    findings = look(model, made, loss, clipping=config.privacy.clipping)
    fatal = [finding for finding in findings if finding.fatal]
    clipping = config.privacy.clipping
    peak = (
        None
        if fatal
        else peak_of_step(model, made, loss, optimizer=config.train.optimizer, clipping=clipping)
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = config.train.physical_batch
    if as_json:
        tree = {
            "safe": not fatal,
            "findings": [asdict(finding) for finding in findings],
            "parameters": trained,
            "physical_batch": rows,
            "peak_bytes": None if peak is None else peak.at(rows),
            "pinned": _pinned(given, config),
        }
        click.echo(json.dumps(tree, indent=2))
        return 5 if fatal else 0
    for finding in findings:
        click.echo(f"{'REFUSED' if finding.fatal else 'note':<9}{finding.where}: {finding.what}")
        click.echo(f"{'':<9}-> {finding.hint}")
    if not fatal:
        click.echo("safe     each record's gradient is its own, and as a loop over records has it")
    click.echo(f"trained  {trained:,} parameters; all that is noised, and all that is sent")
    if peak is not None:
        click.echo(
            f"memory   {peak.at(rows) / MB:,.0f} MB of tensors at the peak of a private step of "
            f"{rows} records ({peak.fixed / MB:,.1f} MB + {peak.per_record / MB:,.3f} MB each); "
            f"allow for {ALLOCATOR:g} times that, as allocators lose some; "
            "train.physical_batch bounds it"
        )
    for key, value in _pinned(given, config).items():
        click.echo(f"pinned   {key} = {json.dumps(value)}")
    return 5 if fatal else 0


def _pinned(given: RunConfig, config: RunConfig) -> dict[str, Any]:
    """What pretrained encoders fill in: real nodes need it written in their scenario."""
    before, after = given.to_flat(), config.to_flat()
    return {key: value for key, value in after.items() if before[key] != value}
