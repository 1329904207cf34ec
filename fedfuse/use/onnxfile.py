"""A model in an ONNX file: run by onnxruntime, without the model's own code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedfuse import __version__
from fedfuse.batch import Batch
from fedfuse.conformal import Calibration
from fedfuse.data.reading import Reading
from fedfuse.errors import ModelError
from fedfuse.use.trained import Array, Trained

__all__ = ["OnnxModel", "facts_of", "feed", "input_names", "need", "open_onnx", "session_of"]

_PREFIX = "fedfuse."


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """A session over a file that export wrote, and what the file says of itself."""

    session: Any
    reading: Reading
    calibration: Calibration | None
    statement: str

    def tell(self, batch: Batch) -> tuple[Array, Array]:
        """See `Predictor`."""
        outputs, told = self.session.run(None, feed(batch))
        return outputs, told


def need(*packages: str) -> None:
    """Raises ModelError where one of the optional `packages` is not installed."""
    for name in packages:
        if find_spec(name) is None:
            raise ModelError(
                f"the package {name} is not installed", hint='pip install "fedfuse[export]"'
            )


def input_names(reading: Reading) -> list[str]:
    """Of the model's tensors, in order: of each modality its content, then which are there."""
    names = reading.schema.names
    return [f"{what}.{name}" for what in ("input", "present") for name in names]


def feed(batch: Batch) -> dict[str, Any]:
    """A batch as onnxruntime takes it."""
    values = {f"input.{name}": value.numpy() for name, value in batch.inputs.items()}
    return values | {f"present.{name}": value.numpy() for name, value in batch.present.items()}


def facts_of(trained: Trained) -> dict[str, str]:
    """What the file says of itself, by key; texts, some of them JSON."""
    calibration, target = trained.calibration, trained.reading.target
    facts = {
        "version": __version__,
        "weights_sha256": trained.digest,
        "training": trained.statement,
        "target": target.kind.value,
        "classes": json.dumps(target.classes),
        "reading": json.dumps(trained.reading.as_dict()),
    }
    if calibration is not None:
        facts["calibration"] = json.dumps(calibration.as_dict())
    return {_PREFIX + key: value for key, value in facts.items()}


def open_onnx(path: Path) -> OnnxModel:
    """The model in a file that export wrote. Raises ModelError where it is none."""
    need("onnxruntime")
    try:
        session = session_of(str(path))
        told = session.get_modelmeta().custom_metadata_map
        reading = Reading.from_dict(json.loads(told[f"{_PREFIX}reading"]), where=str(path))
        found = told.get(f"{_PREFIX}calibration")
        calibration = None if found is None else Calibration.from_dict(json.loads(found))
        statement = told[f"{_PREFIX}training"]
    except Exception as error:  # onnxruntime raises many types, all mean the same here
        raise ModelError(
            f"it is no model that fedfuse exported ({type(error).__name__})",
            where=str(path),
            hint="fedfuse export RUN writes one",
        ) from None
    return OnnxModel(session=session, reading=reading, calibration=calibration, statement=statement)


def session_of(model: str | bytes) -> Any:
    """An onnxruntime session on the CPU, with as many threads as torch has."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
