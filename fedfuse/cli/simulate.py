"""`fedfuse simulate`: a whole federation on this machine."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import click
import typer

from fedfuse.cli.scenario import Flags, configuration
from fedfuse.cli.summary import say
from fedfuse.config import ENGINES, RunConfig
from fedfuse.errors import DataError, RunFolderError, UsageError
from fedfuse.privacy.spec import Unit

UNITS = tuple(unit.value for unit in (Unit.RECORD, Unit.SUBJECT, Unit.NODE, Unit.NONE))


def simulate(
    scenario: Annotated[
        Path | None, typer.Argument(help="See simulations/.", metavar="[SCENARIO.toml]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The manifest; without one, a demo data set is made.", metavar="MANIFEST"
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes.", metavar="N")] = None,
    rounds: Annotated[int | None, typer.Option(help="How many rounds.", metavar="N")] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="The most that a node may spend.", metavar="E")
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="What is protected.", click_type=click.Choice(UNITS)),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="What runs the nodes.", click_type=click.Choice(ENGINES)),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of weights and partition, never of privacy noise.", metavar="N"),
    ] = None,
    modalities: Annotated[
        str | None, typer.Option(help="Only these modalities.", metavar="A,B")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count records with an error.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting, as train.rounds=5; repeatable.", metavar="KEY=VALUE"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder.  [default: runs/<name>-<date>-<time>]", metavar="DIR"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")
    ] = None,
    ledgers: Annotated[
        Path | None,
        typer.Option(
            help="Keep a ledger for each node here: what other runs spent there counts.",
            metavar="DIR",
        ),
    ] = None,
    demo_dir: Annotated[
        Path | None, typer.Option(help="Keep the demo data set here.", metavar="DIR")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the run folder's path and nothing else.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
) -> None:
    """Train a fusion model across simulated nodes, privately unless you say otherwise.

    \b
    Examples:
      fedfuse simulate                                   demo data, epsilon 8
      fedfuse simulate simulations/medical.toml          makes its data, too
      fedfuse simulate simulations/digits.toml --data digits/manifest.csv
      fedfuse simulate --data m.csv --epsilon 3 --rounds 40 --set model.fusion=attention
      fedfuse simulate --unit none                       NOT PRIVATE, to compare with
      fedfuse simulate --resume runs/demo-20250131-101500
    """
    # Before numpy is loaded: its threads are of no use here, and keep `copy_of_this` from copying.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    flags = Flags(
        scenario=scenario,
        data=data,
        nodes=nodes,
        rounds=rounds,
        epsilon=epsilon,
        unit=unit,
        engine=engine,
        seed=seed,
        modalities=modalities,
        skip_bad=skip_bad,
        settings=tuple(settings or ()),
    )
    if resume is not None:
        config, run = _resumed(resume, flags, out), resume
    else:
        from fedfuse.runfolder import fresh_folder

        config = configuration(flags)
        run = out or fresh_folder(config.name, Path("runs"))
    _run(
        config,
        run,
        demo_dir=demo_dir,
        ledgers=ledgers,
        resume=resume is not None,
        quiet=quiet,
        as_json=as_json,
    )


def _run(
    config: RunConfig,
    run: Path,
    *,
    demo_dir: Path | None,
    ledgers: Path | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from fedfuse.federation.pinning import pin
    from fedfuse.federation.store import storing

    ready = pin(_with_data(config, demo_dir))
    try:
        # From here on a copy of this process decodes the data, so it is begun before torch.
        with storing(ready, fingerprints=ledgers is not None, apart=True) as stored:
            gc.disable()  # what is loaded stays: to look through it over and over takes 0.4 s
            from fedfuse.cli.progress import progress
            from fedfuse.federation.simulate import simulate as federate

            gc.freeze()
            gc.enable()
            with progress(quiet=quiet) as view:
                summary = federate(
                    ready,
                    run,
                    observer=view,
                    resume=resume,
                    ledgers=ledgers,
                    stored=stored,
                    load=partial(_load_workers, ready),
                    meanwhile=_load_drawing,
                )
    except KeyboardInterrupt:
        _say_what_is_saved(config, run)
        raise typer.Exit(130) from None
    finally:
        draw(run)
    say(summary, run, as_json=as_json, quiet=quiet)
    if summary["status"] == "interrupted":
        _say_what_is_saved(config, run)
        raise typer.Exit(130)


def _load_workers(config: RunConfig) -> None:
    """What workers are forked from, once all that they need is loaded, and what the promise asks of
    the accountant is known: they ask the same."""
    from fedfuse.federation.settle import settle
    from fedfuse.federation.warm import copy_of_this, warm_up
    from fedfuse.undocumented import undocumented

    if config.private:
        with undocumented():
            settle(config, mean_records=1.0, mean_subjects=1.0)  # sigma rests on no node's size
    if not copy_of_this():
        warm_up()


def _resumed(run: Path, flags: Flags, out: Path | None) -> RunConfig:
    """The configuration that an interrupted run was started with."""
    given = (*flags.given, *(("--out",) if out else ()))
    if given:
        raise UsageError(
            f"--resume goes on with the run as it was, so it takes no {given[0]}",
            hint=f"fedfuse simulate --resume {run}",
        )
    from fedfuse.runfolder import RunFolder

    return RunFolder.open(run).config()


def _with_data(config: RunConfig, demo_dir: Path | None) -> RunConfig:
    """The configuration with a manifest that exists, or with none, which means the demo data."""
    if config.data.manifest and demo_dir is not None:
        raise UsageError("--demo-dir, but the data is given", hint="leave one of them out")
    if config.data.manifest and not Path(config.data.manifest).is_file():
        raise DataError(
            "no such manifest",
            where=config.data.manifest,
            hint="check data.manifest or --data; without one, a demo data set is made",
        )
    if demo_dir is None:
        return config
    manifest = demo_dir / "manifest.csv"
    if not manifest.is_file():
        from fedfuse.data.scenes import make

        manifest = make(config.data.demo, demo_dir, seed=config.seed)
    return config.with_values({"data.manifest": str(manifest.absolute())})


def _load_drawing() -> None:
    from fedfuse.reports.curves import load

    load()


def draw(run: Path) -> None:
    """The run's curves, as far as it came. A picture that fails costs a line, never the run."""
    if not (run / "metrics.jsonl").is_file():
        return
    from fedfuse.reports.curves import write_curves

    try:
        write_curves(run)
    except Exception as error:
        click.echo(f"note: no curves were drawn: {error}", err=True)


def _say_what_is_saved(config: RunConfig, run: Path) -> None:
    from fedfuse.runfolder import RunFolder

    try:
        folder = RunFolder.open(run)
        done, summary = len(folder.metrics()), folder.summary() or {}
    except RunFolderError:
        click.echo("interrupted before the first round; nothing was saved", err=True)
        return
    if summary.get("status") == "finished":
        click.echo(f"interrupted when all was done: the run in {run} is finished", err=True)
        return
    click.echo(f"interrupted; {done} of {config.train.rounds} rounds are saved in {run}", err=True)
    click.echo(f"hint: go on with: fedfuse simulate --resume {run}", err=True)
