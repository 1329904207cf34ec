"""One node's answer to one request, the same in a simulation and on a real node.

    1  the request is read strictly, and refused if it is late or of another run
    2  the node's own policy weighs its books and the rest of the run against its promise
    3  the weights are checked against the node's own model
    4  the round is entered in the books as reserved
    5  records are read, and the job is run
    6  the round is marked as spent, and the update leaves

Until step 4 no record has been read and nothing is spent.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import RecordDict

from fedfuse.batch import Schema
from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.prepare import open_node
from fedfuse.errors import FedfuseError, WireError
from fedfuse.federation.books import Books
from fedfuse.federation.policy import Policy, scrubbed
from fedfuse.federation.wire import (
    TrainReply,
    TrainRequest,
    config_digest,
    decode,
    encode,
    event_of,
    template_of,
)
from fedfuse.models.model import build_model
from fedfuse.privacy.noise import round_secret
from fedfuse.privacy.spec import Unit
from fedfuse.tasks import Task
from fedfuse.train import Trainer, pick_device

__all__ = ["Site", "answer", "new_trainer", "trainer_for"]

_log = logging.getLogger("fedfuse.node")
_trainers: OrderedDict[tuple[str, str, str], Trainer] = OrderedDict()
_TRAINERS_KEPT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is the node's own: its promise, its data, its view of the run."""

    config: RunConfig
    policy: Policy
    store: Path
    index: int
    worker: int = 0
    """Which of several worker processes this is: it picks the GPU."""


def answer(record: RecordDict, site: Site, books: Books) -> TrainReply:
    """The reply to the request in `record`; never raises, and what it says of errors is scrubbed.

    Guarantees: the books have held the round as reserved since before a record was read; a reply
    with weights has its event marked as spent.
    """
    name, round, event = f"node-{site.index}", 0, None
    try:
        request = TrainRequest.from_record(record)
        round = request.round
        name, dataset = _open(str(site.store), site.index)
        _check_run(request, site.config)
        mechanism = site.policy.allow(request, books.events())
        trainer = trainer_for(site.config, dataset.schema, worker=site.worker)
        weights = decode(request.arrays, template_of(trainer.weights()))
        if mechanism is not None:
            reserved = event_of(mechanism, node=name, round=round, status="reserved")
            books.reserve(reserved)
            event = reserved
        trainer.load(weights)
        subjects = dataset.subject_numbers() if _by_subject(request) else None
        ran = trainer.run(
            dataset, request.job, secret=_secret(site, name, round), subjects=subjects
        )
        if ran.signal_to_noise:
            told = ", ".join(f"{part} {value:.3g}" for part, value in ran.signal_to_noise.items())
            _log.info("%s, round %d: signal to noise of a step: %s", name, round, told)
        arrays = encode(trainer.weights())
        if event is not None:
            books.spend(event)
            event = dataclasses.replace(event, status="spent")
        promised = site.config.private or mechanism is not None
        counts = site.config.federation.weighting == "examples" and not promised
        weight = len(dataset) if counts else 1
        return TrainReply(
            node=name, round=round, status="ok", weight=float(weight), event=event, arrays=arrays
        )
    except Exception as error:
        # The whole story stays here, in the node's own log.
        _log.warning("%s, round %d: %s", name, round, error, exc_info=error)
        refused = isinstance(error, FedfuseError) and event is None
        return TrainReply(
            node=name,
            round=round,
            status="refused" if refused else "failed",
            problem=scrubbed(error),
            event=event,
        )


def trainer_for(config: RunConfig, schema: Schema, *, worker: int = 0) -> Trainer:
    """This process's trainer for a run: the model and its hooks are built once.

    Its weights are whatever the last round left; every round loads its own.
    """
    key = (config_digest(config), repr(schema), f"{config.train.device} {worker}")
    if key not in _trainers:
        _trainers[key] = new_trainer(config, schema, worker=worker)
        while len(_trainers) > _TRAINERS_KEPT:
            _trainers.popitem(last=False)
    return _trainers[key]


def new_trainer(config: RunConfig, schema: Schema, *, worker: int = 0) -> Trainer:
    """A trainer whose weights are the first ones of a run."""
    model = build_model(schema, config.model, vocabulary=config.data.vocabulary, seed=config.seed)
    device = pick_device(config.train.device, worker)
    return Trainer(model, Task.of(schema.target, config.model).loss, device)


@lru_cache(maxsize=16)  # each holds some file descriptors
def _open(store: str, index: int) -> tuple[str, Dataset]:
    """A node's name and its data set; no record is read before `Dataset.batch`."""
    return open_node(Path(store), index)


def _by_subject(request: TrainRequest) -> bool:
    return request.job.mechanism is not None and request.job.mechanism.unit is Unit.SUBJECT


def _check_run(request: TrainRequest, config: RunConfig) -> None:
    if request.digest != config_digest(config):
        raise WireError(
            "the server runs another configuration than this node",
            hint="give both the same scenario",
        )
    if request.deadline and time.time() > request.deadline:
        raise WireError(f"round {request.round} is over: the request came after its deadline")


def _secret(site: Site, name: str, round: int) -> bytes:
    """Keys sampling, noise and order. Private without a noise seed: the system's entropy."""
    if site.config.private or site.policy.noise_seed:
        return round_secret(site.policy.noise_seed, name, round)
    return round_secret(f"order {site.config.seed}", name, round)
