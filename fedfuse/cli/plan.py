"""`fedfuse plan`: of epsilon, delta, rounds, sample rate and sigma, the one that is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import click
import typer

from fedfuse.errors import UsageError
from fedfuse.privacy.spec import Unit

UNITS = (Unit.RECORD.value, Unit.SUBJECT.value, Unit.NODE.value)
SOLVE = {
    "epsilon": "epsilon",
    "delta": "delta",
    "rounds": "rounds",
    "rate": "sample_rate",
    "sigma": "sigma",
}
"""What --solve takes -> the term of a plan."""
POINTS, MOST_POINTS = 10, 100
"""At how many rounds epsilon is printed, and at how many it is given at most."""


def plan(
    epsilon: Annotated[
        float | None, typer.Option(help="The most that a node may spend.", metavar="E")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Of the promise.  [default: 1e-05]", metavar="D")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="How many rounds.", metavar="N")] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option(
            help="q, the chance of a record to be in a step's batch.  [default: 0.25]", metavar="Q"
        ),
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="The noise multiplier, in units of C.", metavar="S")
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            help="Which of the five to find.  [default: the one that is left out]",
            click_type=click.Choice(tuple(SOLVE)),
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="What one change is.  [default: record]", click_type=click.Choice(UNITS)),
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(
            help="The public number of records of a node; with unit subject, of subjects.",
            metavar="N",
        ),
    ] = None,
    batch: Annotated[
        float | None,
        typer.Option(help="The expected batch: the sample rate is batch / records.", metavar="B"),
    ] = None,
    local_steps: Annotated[
        int | None, typer.Option(help="Steps a round.  [default: 4]", metavar="N")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(help="Over how many updates is averaged.  [default: 1]", metavar="N"),
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option(help="How many are trained.  [default: 100000, assumed]", metavar="N"),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="C, the clip norm.  [default: 1]", metavar="C")
    ] = None,
    plan_for: Annotated[
        Path | None,
        typer.Option(help="Take what no flag says from this scenario.", metavar="SCENARIO.toml"),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw epsilon by round.", metavar="FILE.png|FILE.svg"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Find the noise, the rounds, the rate, or what they cost, before a run is started.

    Leave out one of --epsilon, --rounds and --sigma, or say with --solve what to find. No data is
    looked at. Warnings say what is wrong with a plan that is private on paper.

    \b
    Examples:
      fedfuse plan --epsilon 8 --rounds 50 --records 2000 --nodes 6    how much noise?
      fedfuse plan --epsilon 8 --sigma 2 --records 2000                how many rounds?
      fedfuse plan --sigma 2 --rounds 50 --records 2000 --batch 100    what does it cost?
      fedfuse plan --plan-for simulations/quickstart.toml --records 300
    """
    if picture is not None and picture.suffix.lower() not in (".png", ".svg"):
        raise UsageError(
            f"--picture {picture}, but it must end in .png or .svg",
            hint="for example: --picture plan.png",
        )
    from fedfuse.cli import forecast
    from fedfuse.cli.terms import Given, asked
    from fedfuse.privacy.planner import make_plan

    wanted = asked(
        Given(
            epsilon=epsilon,
            delta=delta,
            rounds=rounds,
            sample_rate=sample_rate,
            sigma=sigma,
            solve=SOLVE[solve] if solve else None,
            unit=unit,
            records=records,
            batch=batch,
            local_steps=local_steps,
            nodes=nodes,
            parameters=parameters,
            clip=clip,
            scenario=plan_for,
        )
    )
    points = MOST_POINTS if as_json or picture is not None else POINTS
    found = make_plan(wanted.terms, solve=wanted.solve, points=points)
    if picture is not None:
        from fedfuse.reports.plan import draw_plan

        draw_plan(found, picture)
        click.echo(f"epsilon by round is drawn in {picture}", err=True)
    if as_json:
        tree = forecast.tree(found, wanted)
        click.echo(json.dumps(tree, indent=2, allow_nan=False))
    else:
        for line in forecast.describe(found, wanted):
            click.echo(line)
