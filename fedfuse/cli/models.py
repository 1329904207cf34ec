"""`fedfuse models`: the operators and encoders there are, with what each costs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedfuse.errors import ModelError

if TYPE_CHECKING:
    from fedfuse.batch import Modality, Schema
    from fedfuse.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An operator in a whole model, or an encoder alone."""

    name: str
    what: str
    """Of an operator its level, "early", "intermediate" or "late"; of an encoder its modality."""
    paper: str
    parameters: int | None
    """None: it cannot be made here, and `note` says why."""
    flops: int | None
    bytes_per_round: int | None
    note: str = ""


def models(
    scenario: Annotated[
        Path | None, typer.Argument(help="Widths and depths from here.", metavar="[SCENARIO.toml]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For the shapes of this manifest.", metavar="MANIFEST")
    ] = None,
    knowledge: Annotated[
        Path | None, typer.Option(help='Triples, for the operator "graph".', metavar="FILE")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting.", metavar="KEY=VALUE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List fusion operators and encoders with parameters, arithmetic and bytes on the wire.

    Shapes are those of the demo data, unless --data names a manifest. An operator's line is a whole
    model around it; FLOP are counted of one record's forward pass, a multiply and an add as two,
    in matrix products and convolutions; bytes are a node's, down and up, in one round.

    Example: fedfuse models --set model.dim=64
    """
    from fedfuse.config import RunConfig
    from fedfuse.federation.pinning import pin

    config = RunConfig.from_toml(scenario) if scenario else RunConfig()
    for change in changes or ():
        key, sign, value = change.partition("=")
        if not sign:
            raise click.BadParameter(f"--set {change}", param_hint="such as --set model.dim=64")
        config = config.with_values({key: value})
    config = pin(config)
    schema, others = schema_of(config, data), _others(config, data)
    fusions = list(_fusions(config, schema, knowledge))
    encoders = list(_encoders(config, (*schema.modalities, *others)))
    if as_json:
        tree = {
            "modalities": {
                m.name: {"kind": m.kind, "shape": m.shape} for m in (*schema.modalities, *others)
            },
            "fusions": [asdict(each) for each in fusions],
            "encoders": [asdict(each) for each in encoders],
        }
        click.echo(json.dumps(tree, indent=2))
        return
    click.echo(f"models for {_shapes(schema.modalities)}")
    if others:
        click.echo(f"encoders also for {_shapes(others)}")
    click.echo("")
    peak = _peak(config, schema, knowledge) / 1e6
    click.echo(
        f"a private step of this scenario's model ({config.model.fusion}), "
        f"{config.train.physical_batch} records at once, takes {peak:,.0f} MB of tensors\n"
    )
    for title, listed in (("fusion", fusions), ("encoder", encoders)):
        click.echo(f"{title:<16}{'':<14}{'parameters':>11}{'kFLOP':>9}{'kB/round':>10}  source")
        for each in listed:
            click.echo(_line(each))
        click.echo("")


def _shapes(modalities: Sequence[Modality]) -> str:
    return ", ".join(f"{m.name} {' x '.join(map(str, m.shape))}" for m in modalities)


def _line(each: Listed) -> str:
    if each.parameters is None:
        return f"{each.name:<16}{each.what:<14}{'':>30}  {each.note}"
    flops, size = (each.flops or 0) / 1e3, (each.bytes_per_round or 0) / 1e3
    numbers = f"{each.parameters:>11,}{flops:>9,.0f}{size:>10,.0f}"
    return f"{each.name:<16}{each.what:<14}{numbers}  {each.paper}".rstrip()


def schema_of(config: RunConfig, data: Path | None) -> Schema:
    """What records look like: as in a manifest, or as in the demo data."""
    from fedfuse.batch import Kind, Modality, Schema, Target, TargetKind
    from fedfuse.data.layout import plan
    from fedfuse.data.manifest import read_manifest

    manifest = data or (Path(config.data.manifest) if config.data.manifest else None)
    if manifest is not None:
        layout = plan(read_manifest(manifest), config.data)
        return layout.schema(layout.target)
    if config.data.demo != "inspection":
        from fedfuse.data.scenes import make

        with tempfile.TemporaryDirectory() as folder:
            made = make(config.data.demo, Path(folder), records=20)
            layout = plan(read_manifest(made), config.data)
            return layout.schema(layout.target)
    from fedfuse.data.audio import HOP_S
    from fedfuse.data.demo import CLASSES, RATE, SAMPLES, SIZE

    frames = config.data.mel_frames or round(SAMPLES / RATE / HOP_S + 0.49)
    return Schema(
        modalities=(
            Modality(name="image", kind=Kind.IMAGE, shape=(3, SIZE, SIZE)),
            Modality(name="audio", kind=Kind.AUDIO, shape=(config.data.mel_bands, frames)),
            Modality(name="text", kind=Kind.TEXT, shape=(config.data.text_tokens,)),
        ),
        target=Target(kind=TargetKind.CLASSIFICATION, classes=CLASSES),
    )


def _peak(config: RunConfig, schema: Schema, knowledge: Path | None) -> int:
    """Bytes at the peak of a private step, at most physical_batch records at once."""
    from fedfuse.models.knowledge import read_graph
    from fedfuse.models.made import made_batch
    from fedfuse.models.model import build_model
    from fedfuse.privacy.memory import peak_of_step
    from fedfuse.tasks import Task

    vocabulary, train = config.data.vocabulary, config.train
    graph = read_graph(knowledge) if knowledge else None
    model = build_model(schema, config.model, vocabulary=vocabulary, graph=graph)
    peak = peak_of_step(
        model,
        made_batch(schema, 4, vocabulary=vocabulary, model=model),
        Task.of(schema.target, config.model).loss,
        optimizer=train.optimizer,
        clipping=config.privacy.clipping,
    )
    return peak.at(train.physical_batch)


def _others(config: RunConfig, data: Path | None) -> tuple[Modality, ...]:
    """A modality of each kind that the demo data does not have."""
    from fedfuse.batch import Kind, Modality

    if data is not None or config.data.manifest:
        return ()
    size = config.data.video_size or 64
    return (
        Modality(name="video", kind=Kind.VIDEO, shape=(config.data.video_frames, 3, size, size)),
        Modality(name="series", kind=Kind.SERIES, shape=(config.data.series_steps or 64, 6)),
        Modality(name="vector", kind=Kind.VECTOR, shape=(64,)),
        Modality(name="table", kind=Kind.TABLE, shape=(32,)),
    )


def _fusions(config: RunConfig, schema: Schema, knowledge: Path | None) -> Iterator[Listed]:
    from fedfuse.models.cost import cost_of
    from fedfuse.models.knowledge import read_graph
    from fedfuse.models.model import build_model
    from fedfuse.models.spec import FUSIONS

    graph = read_graph(knowledge) if knowledge else None
    for name in FUSIONS:
        model = replace(
            config.model, fusion=name, absent="zero" if name == "early" else config.model.absent
        )
        try:
            if name == "graph" and graph is None:
                raise ModelError("--knowledge names no file of triples")
            built = build_model(schema, model, vocabulary=config.data.vocabulary, graph=graph)
        except ModelError as error:
            yield Listed(
                name=name, what="", paper="", parameters=None, flops=None, bytes_per_round=None,
                note=error.what,
            )  # fmt: skip
            continue
        paper = _paper(type(built.fusion).__doc__)
        cost = asdict(cost_of(built, schema)["all"])
        yield Listed(name=name, what=built.fusion.level, paper=paper, **cost)


def _encoders(config: RunConfig, modalities: Sequence[Modality]) -> Iterator[Listed]:
    from fedfuse.models.cost import cost_of_encoder
    from fedfuse.models.encoders import build_encoder
    from fedfuse.models.spec import ENCODERS

    for modality in modalities:
        kind = modality.kind.value
        names = ENCODERS.get(kind, (kind,))
        if config.model.encoder.pretrained(kind):
            names = (getattr(config.model.encoder, kind), *names)
        for name in names:
            choice: dict[str, Any] = {kind: name} if kind in ENCODERS else {}
            model = replace(config.model, encoder=replace(config.model.encoder, **choice))
            encoder = build_encoder(modality, model, config.data.vocabulary)
            cost = asdict(cost_of_encoder(encoder, modality))
            docs = " ".join(part.__doc__ or "" for part in encoder.modules())
            yield Listed(name=name, what=modality.name, paper=_paper(docs), **cost)


def _paper(doc: str | None) -> str:
    """The first source that a docstring cites."""
    found = re.search(r"arXiv:\d+\.\d+|doi:\S+?(?=[,;)\s])|\bICLR\b|\bICML\b", doc or "")
    return found[0] if found else ""
