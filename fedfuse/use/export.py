"""A trained model as a file that runs without fedfuse, compared with the model it is a copy of.

1  the model becomes a function of plain tensors: of each modality its content, then whether it
   is there; it gives the outputs and what they say
2  it is traced, with the number of records left open, and brought into the format; int8: its
   matrices become whole numbers
3  the copy and the model answer made records in every pattern of absent modalities, all at once
   and one by one, and the records of a manifest where one is given
4  only a copy that agrees is written, with what it is and what was promised inside
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedfuse.batch import Batch, Target
from fedfuse.data.reading import read_records
from fedfuse.errors import ModelError, UsageError
from fedfuse.use.made import made_records
from fedfuse.use.onnxfile import facts_of, feed, input_names, need, session_of
from fedfuse.use.predict import decided
from fedfuse.use.spec import FORMATS
from fedfuse.use.tracing import Plain, int8_of, onnx_of, outputs_of, pt2_of, tensors, trace
from fedfuse.use.trained import Array, Trained

__all__ = ["LIMIT", "Difference", "Exported", "Latency", "export"]

LIMIT = 1e-4
"""The largest difference between the copy's outputs and the model's."""
_MOST_GIVEN = 256
_WARM, _TIMED = 20, 200

Run = Callable[[Batch], tuple[Array, Array]]


class Latency(NamedTuple):
    """Milliseconds for one record alone, after warming up."""

    p50_ms: float
    p99_ms: float


class Difference(NamedTuple):
    """How a copy answers some records, against the model."""

    records: int
    largest: float
    """Over all outputs and what they say; a number in public units."""
    agreement: float
    """The share of records with the same prediction; of numbers within 1e-4 in public units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and how it compares with the model."""

    path: Path
    format: str
    int8: bool
    bytes: int
    float_bytes: int
    """The size of the copy in floating point; the same where it is that one."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    differences: Mapping[str, Difference]
    """Of "made" records, one for each pattern of absent modalities, and "given" ones."""
    threads: int
    latency: Mapping[str, Latency]
    """By what ran it."""
    training: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "path": str(self.path),
            "differences": {name: one._asdict() for name, one in self.differences.items()},
            "latency": {name: one._asdict() for name, one in self.latency.items()},
        }


def export(
    trained: Trained,
    path: Path,
    format: str = "onnx",
    *,
    int8: bool = False,
    data: Path | None = None,
) -> Exported:
    """Writes the model to `path` as one of FORMATS, and says how the copy compares.

    data  a manifest whose first 256 records are compared too

    Raises ModelError where the fusion cannot be exported, or a copy in floating point differs by
    more than LIMIT: nothing is written then. UsageError where the format has no int8.
    """
    if format not in FORMATS:
        raise UsageError(f"no format {format!r}", hint=f"take one of {', '.join(FORMATS)}")
    if int8 and format != "onnx":
        raise UsageError(f"format {format!r} has no int8", hint="leave --int8 out, or take onnx")
    if format == "onnx":
        need("onnx", "onnxruntime", "onnxscript")
    reading = trained.reading
    batches = {"made": made_records(reading)}
    if data is not None:
        given = read_records(reading, data).dataset
        batches["given"] = given.batch(np.arange(min(len(given), _MOST_GIVEN)))
    plain = Plain(trained.model, reading.schema).eval()
    program, facts = trace(plain, batches["made"]), facts_of(trained)
    runs: dict[str, Run] = {"torch": _eager(plain)}
    if format == "onnx":
        whole = content = onnx_of(program, plain, input_names(reading), facts)
        runs["onnxruntime"] = _in_session(whole)
        if int8:
            content = int8_of(whole, facts)
            runs["onnxruntime int8"] = _in_session(content)
    else:
        whole = content = pt2_of(program, facts)
        runs["torch.export"] = _eager(torch.export.load(io.BytesIO(content)).module())
    copy = list(runs.values())[-1]
    differences = {
        name: compare(runs["torch"], copy, batch, reading.target, alone=int8)
        for name, batch in batches.items()
    }
    worst = max(one.largest for one in differences.values())
    if not int8 and not worst <= LIMIT:
        raise ModelError(
            f"the copy's outputs differ by {worst:.3g}, but at most {LIMIT:g} is allowed",
            where=str(path),
            hint="nothing was written; fedfuse predict runs the model as it is",
        )
    _write(path, content)
    return Exported(
        path=path,
        format=format,
        int8=int8,
        bytes=len(content),
        float_bytes=len(whole),
        inputs=tuple(input_names(reading)),
        outputs=outputs_of(reading.schema),
        differences=differences,
        threads=torch.get_num_threads(),
        latency={name: latency(run, batches["made"]) for name, run in runs.items()},
        training=trained.statement,
    )


def compare(model: Run, copy: Run, batch: Batch, target: Target, *, alone: bool) -> Difference:
    """How `copy` answers `batch`: all at once and each record by itself, or `alone` only so.

    int8 is compared alone: the range of what meets its matrices is that of a whole batch, so that
    records answered together change each other a little.
    """
    outputs, told = model(batch)
    singles = [copy(batch[slice(k, k + 1)]) for k in range(len(batch))]
    ours = [tuple(np.concatenate(parts) for parts in zip(*singles, strict=True))]
    if not alone:
        ours.append(copy(batch))
    largest = 0.0
    for other, said in ours:
        gaps = (np.abs(other - outputs).max(), np.abs(said - told).max() / target.scale)
        # not max(): a NaN must not get lost
        largest = float(np.max([largest, *gaps]))
    same = [
        decided(a, target) == decided(b, target)
        if target.classes
        else bool(abs(a[0] - b[0]) <= LIMIT * target.scale)
        for a, b in zip(told, ours[0][1], strict=True)
    ]
    return Difference(len(batch), largest, float(np.mean(same)))


def latency(run: Run, batch: Batch) -> Latency:
    """Of the records of `batch` in turn."""
    singles = [batch[slice(k, k + 1)] for k in range(len(batch))]
    taken = []
    for k in range(_WARM + _TIMED):
        start = time.perf_counter()
        run(singles[k % len(singles)])
        taken.append(1e3 * (time.perf_counter() - start))
    half, most = np.percentile(taken[_WARM:], (50, 99))
    return Latency(float(half), float(most))


def _eager(module: nn.Module) -> Run:
    def run(batch: Batch) -> tuple[Array, Array]:
        with torch.inference_mode():
            outputs, told = module(*tensors(batch))
        return outputs.numpy(), told.numpy()

    return run


def _in_session(content: bytes) -> Run:
    session = session_of(content)

    def run(batch: Batch) -> tuple[Array, Array]:
        outputs, told = session.run(None, feed(batch))
        return outputs, told

    return run


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write it: {error.strerror}", where=str(path), hint="take another path"
        ) from None
