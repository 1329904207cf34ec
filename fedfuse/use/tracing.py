"""From a fusion model to the bytes of a file: a trace for any number of records, ONNX, int8."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.batch import Batch, Schema
from fedfuse.errors import ModelError
from fedfuse.models.answer import answer
from fedfuse.models.model import FusionModel

__all__ = ["FACTS", "Plain", "int8_of", "onnx_of", "outputs_of", "pt2_of", "tensors", "trace"]

FACTS = "fedfuse.json"
"""What a .pt2 file says of itself, beside the program."""


class Plain(nn.Module):
    """A fusion model as a function of plain tensors, in the order that `tensors` gives."""

    def __init__(self, model: FusionModel, schema: Schema) -> None:
        super().__init__()
        self.model = model
        self.schema = schema

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        """M tensors (B, *shape), M masks (B,) bool -> outputs (B, K), and what they say (B, C)."""
        names = self.schema.names
        inputs, present = given[: len(names)], given[len(names) :]
        batch = Batch(
            dict(zip(names, inputs, strict=True)),
            dict(zip(names, present, strict=True)),
            present[0],  # there is no target, and no model looks at one
        )
        outputs = self.model(batch).float()
        return outputs, answer(outputs, self.schema.target)


def tensors(batch: Batch) -> tuple[Tensor, ...]:
    """Of each modality its content, then of each whether it is there."""
    return (*batch.inputs.values(), *batch.present.values())


def outputs_of(schema: Schema) -> tuple[str, str]:
    """The names of the two outputs: a number has no probabilities, but its own units."""
    return "logits", "probabilities" if schema.target.classes else "value"


def trace(plain: Plain, example: Batch) -> torch.export.ExportedProgram:
    """`plain` as a graph, for any number of records. Raises ModelError where it has none."""
    given = tensors(example[slice(0, 2)])
    count = torch.export.Dim("batch")
    shapes = (tuple({0: count} for _ in given),)
    # A contraction order that is chosen by size would fix the number of records.
    with _quiet(), torch.backends.opt_einsum.flags(enabled=False):
        try:
            return torch.export.export(plain, given, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # of many types, and each means that there is no graph
            raise _impossible(plain, "traced", error) from None


def onnx_of(
    program: torch.export.ExportedProgram, plain: Plain, names: list[str], facts: Mapping[str, str]
) -> bytes:
    """The graph in ONNX operators, with `facts` as its metadata; `names` of its inputs."""
    outputs = list(outputs_of(plain.schema))
    with _quiet():
        try:
            made = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=outputs, verbose=False
            )
        except Exception as error:  # of many types
            raise _impossible(plain, "written in ONNX operators", error) from None
    assert made is not None
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return _with_facts(model, facts)


def int8_of(data: bytes, facts: Mapping[str, str]) -> bytes:
    """The ONNX file `data` with matrices of 8-bit whole numbers; what meets them is brought to 8
    bits as it comes (onnxruntime's dynamic quantisation)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="fedfuse-export-") as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(onnx.load_from_string(data), path, weight_type=QuantType.QInt8)
        return _with_facts(onnx.load(path), facts)


def pt2_of(program: torch.export.ExportedProgram, facts: Mapping[str, str]) -> bytes:
    """The graph as torch.export stores it, with `facts` beside it."""
    file = io.BytesIO()
    with _quiet():
        torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
    return file.getvalue()


def _with_facts(model: Any, facts: Mapping[str, str]) -> bytes:
    del model.metadata_props[:]
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())


def _impossible(plain: Plain, how: str, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [""]
    return ModelError(
        f"the fusion {type(plain.model.fusion).__name__} cannot be {how}: "
        f"{type(error).__name__}: {lines[0]}",
        where="export",
        hint="FEDFUSE_DEBUG=1 shows where; fedfuse predict runs the model as it is",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what the exporters say of their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
