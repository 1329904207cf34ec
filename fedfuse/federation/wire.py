"""What goes between server and node, and nothing else.

    to the node     protocol, version          so that both run the same rules
                    compression                what form the answer must have
                    round, rounds, deadline    so that the node can refuse late work, and count
                                               the whole run against its budget
                    digest                     sha256 of the public configuration: both mean the
                                               same run
                    run, request               ids, so that runs are told apart, and nothing is
                                               answered twice
                    task, modalities,          what the run learns, from what, with how many
                    parameters                 weights: weighed by the node's policy
                    server, signature          who asks
                    job, mechanism             what to do; checked by the node, never trusted
                    weights                    the model so far: post-processing of past updates

    from the node   node, round, status        the name is public; the round was asked
                    weights                    the one release; what it costs is in the books
                    weight                     1.0, a constant. Only where nothing is protected
                                               (unit "none") may it be the number of records
                    event                      what was run, all of it public settings
                    unclipped                  where the clip norm adapts: noisy, and charged
                                               with the weights
                    ledger, head               which ledger it is in, and the hash of its last
                                               line
                    problem                    an error's class, and its text if that was made of
                                               public settings; no path, no trace

Where updates leave under masks, keys and shares of them go both ways too: see masking.messages.

No loss, no metric, no count of records or of present modalities leaves a private node: each would
be a release of its own. A message is read strictly: what is not named here is refused, and weights
must have the model's own names, shapes and types, and be finite.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedfuse import __version__
from fedfuse.config import COMPRESSIONS, OPTIMIZERS, RunConfig
from fedfuse.errors import PrivacyError, WireError
from fedfuse.privacy import signing
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Event, Mechanism, Unit
from fedfuse.train import Job

__all__ = [
    "PROTOCOL",
    "WEIGHT",
    "Template",
    "TrainReply",
    "TrainRequest",
    "Weights",
    "config_digest",
    "decode",
    "encode",
    "event_of",
    "signed",
    "template_of",
]

PROTOCOL = 2
ARRAYS, CONFIG, METRICS, WEIGHT = "arrays", "config", "metrics", "weight"
STATUSES = ("ok", "refused", "failed")
_FORMAT = "numpy.ndarray"
_MOST_HEADER = 4096
"""NumPy's headers of such arrays take 128 bytes; one that does not end here is refused."""
_ID = re.compile(r"[0-9a-f]{32}")
_KEY = re.compile(r"([0-9a-f]{64})?")
_SIGNATURE = re.compile(r"([0-9a-f]{128})?")
_PURPOSE = "train request"
# Flower's strategies write these into the configuration of a request.
_FLOWER_KEYS = frozenset({"server-round", "proximal-mu"})

T = TypeVar("T")
Weights = dict[str, NDArray[np.generic]]
Template = Mapping[str, tuple[tuple[int, ...], str]]
"""By name: the shape and the type ("float32") that a weight must have."""


def template_of(weights: Mapping[str, NDArray[np.generic]]) -> Template:
    """The names, shapes and types of `weights`."""
    return {name: (value.shape, str(value.dtype)) for name, value in weights.items()}


@lru_cache(maxsize=8)
def config_digest(config: RunConfig) -> str:
    """sha256 of what server and nodes must agree on: all but secrets and where things run."""
    tree = config.to_dict()
    del tree["privacy"]["noise_seed"], tree["train"]["device"]
    del tree["federation"]["engine"], tree["federation"]["workers"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def encode(weights: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """`weights` as Flower carries them (NumPy's own format, which has no bfloat16), by name."""
    record = ArrayRecord()
    for name in sorted(weights):
        value = np.asarray(weights[name])
        kind, shape = str(value.dtype), value.shape
        record[name] = Array(kind, shape, _FORMAT, _header(shape, kind) + value.tobytes())
    return record


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What NumPy's format has before the numbers of an array in C order."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream,
        {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        },
    )
    return stream.getvalue()


def decode(arrays: ArrayRecord, template: Template) -> Weights:
    """The weights in `arrays`. Raises WireError unless they fit `template` and are finite."""
    for name in sorted(set(template) ^ set(arrays)):
        fault = "is missing" if name in template else "is not of this model"
        raise WireError(f"weight {name[:80]!r} {fault}", hint="run the same model on both sides")
    return {name: _decode_one(name, arrays[name], *template[name]) for name in template}


def _decode_one(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    """Reads NumPy's header before anything is allocated: a header may claim any size."""
    kind = np.dtype(dtype)
    header = _header(shape, dtype)
    if array.data[: len(header)] == header:  # as nearly always; nothing of it is left to read
        found, fortran, found_kind, start = shape, False, kind, len(header)
    else:
        found, fortran, found_kind, start = _read_header(name, array)
    if tuple(found) != shape or tuple(array.shape) != shape:
        raise WireError(f"weight {name!r} has shape {tuple(found)}, but the model's is {shape}")
    if found_kind != kind or array.dtype != dtype:
        raise WireError(f"weight {name!r} has type {found_kind}, but the model's is {dtype}")
    body = memoryview(array.data)[start:]
    if len(body) != math.prod(shape) * kind.itemsize:
        raise WireError(f"weight {name!r} is cut short or too long")
    value = np.frombuffer(body, dtype=kind).reshape(shape, order="F" if fortran else "C")
    if kind.kind == "f" and not np.isfinite(value).all():
        raise WireError(f"weight {name!r} holds values that are not finite")
    return value.copy()


def _read_header(name: str, array: Array) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, type and length of a header that is not written as we write it."""
    stream = io.BytesIO(array.data[:_MOST_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        return (*read(stream), stream.tell())
    except (ValueError, KeyError, EOFError):
        raise WireError(f"weight {name!r} is not in NumPy's format") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What the server asks of a node in a round."""

    run: str
    """The run's id, 32 hexadecimal digits drawn by the server: the same in all its rounds."""
    request: str
    """This request's own id, 32 hexadecimal digits: a node answers it once."""
    round: int
    rounds: int
    deadline: float
    """Unix time after which the answer is thrown away; 0 is never."""
    digest: str
    task: str
    """What the run learns: a value of TargetKind."""
    modalities: tuple[str, ...]
    """What it learns from."""
    parameters: int
    """How many weights it trains."""
    job: Job
    arrays: ArrayRecord
    compression: str = "none"
    """What the answer must travel as: one of COMPRESSIONS."""
    compression_keep: float = 1.0
    """The share that "topk" keeps."""
    server: str = ""
    """The server's public key, 64 hexadecimal digits; empty where it has none."""
    signature: str = ""
    """Of `server`, over all else; see `signed`."""

    def to_record(self) -> RecordDict:
        """The message."""
        return RecordDict({ARRAYS: self.arrays, CONFIG: ConfigRecord(self._config())})

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "protocol": PROTOCOL,
            "version": __version__,
            "run": self.run,
            "request": self.request,
            "round": self.round,
            "rounds": self.rounds,
            "deadline": self.deadline,
            "digest": self.digest,
            "task": self.task,
            "modalities": list(self.modalities),
            "parameters": self.parameters,
            "compression": self.compression,
            "compression_keep": self.compression_keep,
            "server": self.server,
            "signature": self.signature,
            **_flat("job", self.job, leave="mechanism"),
        }
        if self.job.mechanism is not None:
            config |= _flat("mechanism", self.job.mechanism)
        return config

    def body(self) -> bytes:
        """What a signature covers: all but itself, the weights by their sha256."""
        config = self._config() | {"signature": ""}
        weights = hashlib.sha256()
        for name in sorted(self.arrays):
            array = self.arrays[name]
            head = json.dumps([name, array.dtype, list(array.shape), array.stype, len(array.data)])
            weights.update(head.encode() + b"\n")
            weights.update(array.data)
        text = json.dumps(config | {"weights": weights.hexdigest()}, sort_keys=True)
        return text.encode()

    def check_time(self) -> None:
        """Raises WireError where the answer would come after the deadline."""
        late = time.time() - self.deadline
        if self.deadline and late > 0:
            doubt = ", by more than an hour: is this node's clock right?" if late > 3600 else ""
            raise WireError(
                f"round {self.round} is over: the request came after its deadline{doubt}",
                hint="`fedfuse node check` compares the clocks",
            )

    def check_signature(self) -> None:
        """Raises WireError where the request names a server that did not sign it."""
        if self.server and not signing.verify(
            self.server, self.body(), self.signature, purpose=_PURPOSE
        ):
            raise WireError(
                f"the request names server {self.server[:12]}..., which did not sign it",
                hint="somebody changed it on its way, or the server signs with another key",
            )

    @classmethod
    def from_record(cls, record: RecordDict) -> TrainRequest:
        """The request in a message; its weights are not decoded yet. Raises WireError."""
        arrays, config = _parts(record)
        if record.metric_records:
            raise WireError("a request carries no metrics")
        config = {key: value for key, value in config.items() if key not in _FLOWER_KEYS}
        _check_versions(config)
        mechanism = _mechanism(config)
        job = _build(Job, "job", config, mechanism=mechanism)
        request = cls(
            run=_take(config, "run", str),
            request=_take(config, "request", str),
            round=_take(config, "round", int),
            rounds=_take(config, "rounds", int),
            deadline=_take(config, "deadline", float),
            digest=_take(config, "digest", str),
            task=_take(config, "task", str),
            modalities=_names(config),
            parameters=_take(config, "parameters", int),
            job=job,
            arrays=arrays,
            compression=_take(config, "compression", str),
            compression_keep=_take(config, "compression_keep", float),
            server=_take(config, "server", str),
            signature=_take(config, "signature", str),
        )
        _no_more(config)
        request._check()
        return request

    def _check(self) -> None:
        job = self.job
        for name, text, form in (
            ("run", self.run, _ID),
            ("request", self.request, _ID),
            ("server", self.server, _KEY),
            ("signature", self.signature, _SIGNATURE),
        ):
            if not form.fullmatch(text):
                raise WireError(f"{name} = {text[:140]!r} is not of the form that it must have")
        if len(self.task) > 40 or not self.task.isprintable():
            raise WireError("task must be a word of at most 40 characters")
        for name, value, low, high in (
            ("rounds", self.rounds, 1, 1_000_000),
            ("round", self.round, 1, self.rounds),
            ("parameters", self.parameters, 1, 10**13),
            ("compression_keep", self.compression_keep, 1e-6, 1.0),
            ("steps", job.steps, 1, 1_000_000),
            ("learning_rate", job.learning_rate, 0.0, 1e6),
            ("momentum", job.momentum, 0.0, 0.9999),
            ("weight_decay", job.weight_decay, 0.0, 1.0),
            ("proximal_mu", job.proximal_mu, 0.0, 1e6),
            ("physical_batch", job.physical_batch, 1, 1_000_000),
            ("batch_size", job.batch_size, 1, 1_000_000),
            ("expected_batch", job.expected_batch, 1e-9, 1e12),
            ("records_per_subject", job.records_per_subject, 1, 1_000_000),
            ("noise_nodes", job.noise_nodes, 1, 1_000_000),
        ):
            if not low <= value <= high:
                raise WireError(f"{name} = {value}, but it must be from {low:g} to {high:g}")
        if job.optimizer not in OPTIMIZERS:
            raise WireError(f"optimizer = {job.optimizer[:40]!r} is unknown")
        if self.compression not in COMPRESSIONS:
            raise WireError(f"compression = {self.compression[:40]!r} is unknown")
        if job.noise_by not in ("nodes", "server"):
            raise WireError(f"noise_by = {job.noise_by[:40]!r} is unknown")
        if job.mechanism is not None:
            self._check_steps(job.mechanism)

    def _check_steps(self, mechanism: Mechanism) -> None:
        """What is accounted must be what will be run."""
        if mechanism.unit is Unit.NODE:
            if mechanism.steps != 1 or mechanism.sample_rate != 1:
                raise WireError('unit "node" accounts a round as one release at rate 1')
        elif mechanism.steps != self.job.steps:
            raise WireError(
                f"{self.job.steps} steps are asked for, but {mechanism.steps} accounted",
            )


def signed(request: TrainRequest, key: SigningKey | None) -> TrainRequest:
    """`request` in the name of the holder of `key`, and with its signature; as it is without."""
    if key is None:
        return request
    named = replace(request, server=key.public, signature="")
    return replace(named, signature=key.sign(named.body(), purpose=_PURPOSE))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReply:
    """What a node answers. Only an "ok" carries weights; round 0 is a request not understood.

    Why each field may leave a node that promises something is in docs/privacy.md, and held by
    tests/federation/test_releases.py.
    """

    node: str
    round: int
    status: str
    weight: float = 1.0
    problem: str = ""
    event: Event | None = None
    arrays: ArrayRecord | None = None
    unclipped: tuple[float, ...] = ()
    """By step: the noisy count of unclipped units less half of all, where the clip norm adapts."""
    ledger: str = ""
    """The id of the node's ledger; empty where it keeps none."""
    head: str = ""
    """The hash of the ledger's last line, so that a rollback shows."""

    def to_record(self) -> RecordDict:
        """The message."""
        config: dict[str, Any] = {
            "protocol": PROTOCOL,
            "version": __version__,
            "node": self.node,
            "round": self.round,
            "status": self.status,
            "problem": self.problem,
            "unclipped": list(self.unclipped),
            "ledger": self.ledger,
            "head": self.head,
        }
        if self.event is not None:
            config |= _flat("event", self.event)
        record = RecordDict(
            {CONFIG: ConfigRecord(config), METRICS: MetricRecord({WEIGHT: self.weight})}
        )
        if self.arrays is not None:
            record[ARRAYS] = self.arrays
        return record

    @classmethod
    def from_record(
        cls, record: RecordDict, *, request: TrainRequest, template: Template, counts: bool
    ) -> TrainReply:
        """The reply to `request` in a message. Raises WireError on whatever must not be there.

        `counts`: a weight may be a number of records; otherwise it must be 1.
        """

        def plain(arrays: ArrayRecord) -> Weights:
            return decode(arrays, template)

        return cls.read(record, request=request, counts=counts, decoder=plain)[0]

    @classmethod
    def read(
        cls,
        record: RecordDict,
        *,
        request: TrainRequest,
        counts: bool,
        decoder: Callable[[ArrayRecord], Weights],
    ) -> tuple[TrainReply, Weights | None]:
        """`from_record`, and the reply's weights as `decoder` reads them: None without any."""
        ok = len(record.array_records) > 0
        arrays, config = _parts(record, needs_arrays=ok)
        _check_versions(config)
        event = _build(Event, "event", config) if "event.node" in config else None
        reply = cls(
            node=_take(config, "node", str),
            round=_take(config, "round", int),
            status=_take(config, "status", str),
            problem=_take(config, "problem", str),
            weight=_weight(record, counts=counts),
            event=event,
            arrays=arrays if ok else None,
            unclipped=_numbers(config, "unclipped"),
            ledger=_take(config, "ledger", str),
            head=_take(config, "head", str),
        )
        _no_more(config)
        reply._check(request)
        return reply, None if reply.arrays is None else decoder(reply.arrays)

    def _check(self, request: TrainRequest) -> None:
        if not (0 < len(self.node) <= 200 and self.node.isprintable()):
            raise WireError("a node's name must be 1 to 200 printable characters")
        if len(self.problem) > 1000 or not self.problem.isprintable():
            raise WireError("a problem must be told in one line of at most 1000 characters")
        if self.status not in STATUSES:
            raise WireError(
                f"status = {self.status[:40]!r}, but it must be {' or '.join(STATUSES)}"
            )
        if (self.status == "ok") != (self.arrays is not None):
            raise WireError('weights come with status "ok", and only with it')
        if self.round != request.round and (self.status == "ok" or self.round != 0):
            raise WireError(f"an answer to round {self.round} came in round {request.round}")
        if (self.ledger, self.head) != ("", "") and not (
            _ID.fullmatch(self.ledger) and _KEY.fullmatch(self.head) and self.head
        ):
            raise WireError("ledger and head are not of the form that they must have")
        mechanism = request.job.mechanism
        counted = self.status == "ok" and mechanism is not None and mechanism.count_noise > 0
        counts = mechanism.steps if counted and mechanism is not None else 0
        if len(self.unclipped) != counts:
            raise WireError(
                f"{len(self.unclipped)} counts of unclipped units, but {counts} are due"
            )
        if (self.status == "ok" and mechanism is not None) and self.event is None:
            raise WireError("a private update came without its event")
        if self.event is not None:
            status = "spent" if self.status == "ok" else "reserved"
            if mechanism is None or self.event != event_of(
                mechanism, node=self.node, round=self.round, status=status
            ):
                raise WireError("the event is not what was asked for")


def event_of(mechanism: Mechanism, *, node: str, round: int, status: str) -> Event:
    """The line in a node's books for `mechanism`."""
    return Event(node=node, round=round, status=status, **_plain(mechanism))


def _parts(record: RecordDict, *, needs_arrays: bool = True) -> tuple[ArrayRecord, dict[str, Any]]:
    if set(record) - {ARRAYS, CONFIG, METRICS}:
        raise WireError("a message holds records that the protocol does not know")
    if needs_arrays and (len(record.array_records) != 1 or ARRAYS not in record.array_records):
        raise WireError(f"{len(record.array_records)} array records, but exactly one is needed")
    if len(record.config_records) != 1 or CONFIG not in record.config_records:
        raise WireError("a message needs exactly one config record")
    arrays = record.array_records.get(ARRAYS, ArrayRecord())
    return arrays, dict(record.config_records[CONFIG])


def _check_versions(config: dict[str, Any]) -> None:
    protocol, version = _take(config, "protocol", int), _take(config, "version", str)
    if protocol != PROTOCOL:
        raise WireError(f"protocol {protocol}, but this side speaks {PROTOCOL}")
    if version != __version__:
        raise WireError(
            f"the other side runs fedfuse {version[:40]}, this side {__version__}",
            hint="install the same version on the server and on every node",
        )


def _mechanism(config: dict[str, Any]) -> Mechanism | None:
    if not any(key.startswith("mechanism.") for key in config):
        return None
    try:
        config["mechanism.unit"] = Unit(_take(config, "mechanism.unit", str))
        return _build(Mechanism, "mechanism", config)
    except (ValueError, PrivacyError) as error:
        raise WireError(f"not a mechanism: {error}") from None


def _names(config: dict[str, Any]) -> tuple[str, ...]:
    names = _take(config, "modalities", list)
    if not (0 < len(names) <= 64 and all(isinstance(n, str) and 0 < len(n) <= 200 for n in names)):
        raise WireError("modalities must be 1 to 64 names")
    return tuple(names)


def _numbers(config: dict[str, Any], key: str) -> tuple[float, ...]:
    numbers = _take(config, key, list)
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise WireError(f"{key} holds what is no finite number")
    return tuple(float(n) for n in numbers)


def _weight(record: RecordDict, *, counts: bool) -> float:
    metrics = record.metric_records.get(METRICS)
    if len(record.metric_records) != 1 or metrics is None or set(metrics) != {WEIGHT}:
        raise WireError("a reply carries its weight and no other metric")
    weight = metrics[WEIGHT]
    if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
        raise WireError(f"weight = {weight!r}, but it must be a positive number")
    if not counts and weight != 1:
        raise WireError(f"weight = {weight!r}, but all weights are equal here: 1.0")
    if weight > 2**53:
        raise WireError(f"weight = {weight!r} is too large")
    return float(weight)


def _flat(prefix: str, value: Any, *, leave: str = "") -> dict[str, Any]:
    return {f"{prefix}.{key}": item for key, item in _plain(value).items() if key != leave}


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as the wire carries them: what is a float there is one here too, so
    that both sides sign the same text."""
    kinds = {field.name: field.type for field in fields(value)}
    plain = {
        key: item.value if isinstance(item, Unit) else item for key, item in asdict(value).items()
    }
    return {key: float(item) if kinds[key] == "float" else item for key, item in plain.items()}


def _build(cls: type[T], prefix: str, config: dict[str, Any], **given: Any) -> T:
    kinds = {"int": int, "float": float, "str": str, "Unit": Unit}
    values = {
        field.name: _take(config, f"{prefix}.{field.name}", kinds[str(field.type)])
        for field in fields(cls)  # type: ignore[arg-type]
        if field.name not in given
    }
    return cls(**values, **given)


def _take(config: dict[str, Any], key: str, kind: type) -> Any:
    if key not in config:
        raise WireError(f"{key} is missing")
    value = config.pop(key)
    if type(value) is int and kind is float:
        value = float(value)
    if type(value) is not kind:
        raise WireError(f"{key} is of type {type(value).__name__}, but must be {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{key} = {value} is not finite")
    return value


def _no_more(config: Mapping[str, Any]) -> None:
    for key in sorted(config):
        raise WireError(f"{key[:80]!r} is not part of the protocol")
