"""The released model, out of its run and back into memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedfuse import __version__
from fedfuse.batch import Schema
from fedfuse.config import RunConfig, typed
from fedfuse.errors import ConfigError, RunFolderError
from fedfuse.models.knowledge import Graph, read_graph
from fedfuse.models.model import FusionModel, build_model
from fedfuse.models.spec import ModelConfig
from fedfuse.runfolder import RunFolder
from fedfuse.tasks import Task
from fedfuse.train import Trainer, pick_device

__all__ = ["describe", "open_model"]


def describe(schema: Schema, config: RunConfig) -> dict[str, Any]:
    """What is needed to build the model again, as plain values."""
    target, model = schema.target, config.model
    known = model.fusion == "graph"
    graph = read_graph(Path(model.knowledge), model.knowledge_sha256) if known else None
    return {
        "fedfuse": __version__,
        "name": config.name,
        "private": config.private,
        "seed": config.seed,
        "vocabulary": config.data.vocabulary,
        "model": asdict(config.model),
        "target": {
            "kind": target.kind.value,
            "classes": list(target.classes),
            "centre": target.centre,
            "scale": target.scale,
            "priors": list(target.priors),
            "span": list(target.span),
        },
        "modality": [
            {"name": m.name, "kind": m.kind.value, "shape": list(m.shape)}
            for m in schema.modalities
        ],
        **({"knowledge": {"triples": graph.named()}} if graph else {}),
    }


def open_model(folder: RunFolder, device: str = "cpu") -> tuple[FusionModel, Schema]:
    """The released model, ready to predict, and what its records look like.

    Raises RunFolderError where the folder holds no such model.
    """
    weights, text = folder.model()
    try:
        schema = Schema.from_dict({"modalities": text["modality"], "target": text["target"]})
        config = typed(ModelConfig, text["model"], where=str(folder.path))
        model = build_model(
            schema,
            config,
            vocabulary=text["vocabulary"],
            seed=text["seed"],
            graph=Graph.of(text["knowledge"]["triples"]) if "knowledge" in text else None,
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise RunFolderError(
            f"model.toml does not describe a model: {error!r}",
            where=str(folder.path),
            hint=f"it was written by fedfuse {text.get('fedfuse', '?')}, this is {__version__}",
        ) from None
    Trainer(model, Task.of(schema.target, config).loss, pick_device(device)).load(weights)
    model.eval()
    return model, schema
