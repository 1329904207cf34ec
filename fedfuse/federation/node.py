"""One node's answer to one request, the same in a simulation and on a real node.

    1  the request is read strictly, and refused if it is late or of another run
    2  the node's own policy is asked about all but the cost: who asks, for what, how much; and,
       where updates leave under masks, whether those are there and protect it
    3  the model is counted before it is built, the weights are checked against it, and the model is
       seen to keep made-up records apart
    4  the round is entered in the books as reserved, if they and the rest of the run as announced
       keep the promise, and the round is not over by now
    5  records are read (with frozen pretrained encoders their features, made of them the first
       time), and the job is run
    6  the update is brought into the form asked for, the round is committed in the books, and the
       update leaves

Until step 4 has ended no record has been read and nothing is spent.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedfuse.batch import Schema
from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.prepare import open_node
from fedfuse.errors import FedfuseError, PrivacyError, WireError
from fedfuse.federation.books import Books
from fedfuse.federation.checking import check_trainer
from fedfuse.federation.compression import compress
from fedfuse.federation.features import with_features
from fedfuse.federation.masking.seat import Seat
from fedfuse.federation.pinning import check_pinned
from fedfuse.federation.policy import Policy, scrubbed
from fedfuse.federation.wire import (
    TrainReply,
    TrainRequest,
    config_digest,
    decode,
    event_of,
)
from fedfuse.models.auxiliary import training_loss
from fedfuse.models.model import build_model, count_parameters
from fedfuse.privacy.noise import NoiseStream, round_secret
from fedfuse.privacy.spec import Event, Unit
from fedfuse.stacked import Member, Stacked
from fedfuse.tasks import Task
from fedfuse.train import Job, Ran, Trainer, Weights, pick_device

__all__ = ["Site", "answer", "answers", "new_trainer", "refusal", "trainer_for"]

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
    name: str = ""
    """What servers call the node. Empty: as the prepared data does."""
    seat: Seat | None = None
    """Where updates leave under masks: the node's place among those that share them."""
    worker: int = 0
    """Which of several worker processes this is: it picks the GPU."""
    idle: int = 0
    """Cores that nothing else uses while the model trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """What is to be done once the books hold a round."""

    trainer: Trainer
    job: Job
    member: Member
    subjects: NDArray[np.int64] | None


_Trained: TypeAlias = tuple[Ran, Weights]
_Node: TypeAlias = Generator[_Training, _Trained, TrainReply]


def answer(record: RecordDict, site: Site, books: Books) -> TrainReply:
    """The reply to the request in `record`; never raises, and what it says of errors is scrubbed.

    Guarantees: the books have held the round as reserved since before a record was read; a reply
    with weights has its event marked as spent.
    """
    return answers([(record, site, books)])[0]


def answers(asked: Sequence[tuple[RecordDict, Site, Books]]) -> list[TrainReply]:
    """The replies of several nodes, in their order, each as `answer` gives it.

    Nodes that are to do the same job train together where their model can be stacked.
    """
    replies: list[TrainReply | None] = [None] * len(asked)
    waiting: dict[tuple[int, Job], list[tuple[int, _Node, _Training]]] = {}
    for place, (record, site, books) in enumerate(asked):
        node = _answering(record, site, books)
        try:
            training = next(node)
            kind = id(training.trainer), training.job
            waiting.setdefault(kind, []).append((place, node, training))
        except StopIteration as ended:
            replies[place] = ended.value
    for group in waiting.values():
        found = _trained([training for _, _, training in group])
        for (place, node, _), trained in zip(group, found, strict=True):
            try:
                if isinstance(trained, Exception):
                    node.throw(trained)
                else:
                    node.send(trained)
            except StopIteration as ended:
                replies[place] = ended.value
    return [reply for reply in replies if reply is not None]


def _trained(group: Sequence[_Training]) -> Iterator[_Trained | Exception]:
    """Runs the job of a group, all of it together or one node after the other."""
    trainer, job = group[0].trainer, group[0].job
    members = [training.member for training in group]
    try:
        stack = _stacked(trainer) if len(group) > 1 else None
        if stack is not None and stack.takes(members[0].records, job):
            yield from stack.run(members, job)
            return
    except Exception as error:
        yield from [error] * len(group)
        return
    for training in group:
        member = training.member
        try:
            trainer.load(member.weights)
            ran = trainer.run(member.records, job, secret=member.secret, subjects=training.subjects)
            yield ran, trainer.weights()
        except Exception as error:
            yield error


@lru_cache(maxsize=2)
def _stacked(trainer: Trainer) -> Stacked:
    return Stacked(trainer)


def _answering(record: RecordDict, site: Site, books: Books) -> _Node:
    """A node's answer in two halves: it asks for training in between, and is told what came of
    it."""
    name, round, event = site.name or f"node-{site.index}", 0, None
    try:
        request = TrainRequest.from_record(record)
        round = request.round
        known, dataset = _open(str(site.store), site.index)
        name = site.name or known
        _check_run(request, site.config)
        check_pinned(site.config)
        if site.config.federation.secure_aggregation and site.seat is None:
            raise PrivacyError("updates of this run leave under masks, and this node shares none")
        counts = site.config.federation.weighting == "examples"
        seat = site.seat
        mechanism = site.policy.check(
            request, dataset.schema, counts=counts, masked=seat is not None
        )
        if seat is not None:
            seat.check(request)
        if mechanism is not None:
            site.policy.check_seed(site.config.privacy.noise_seed)
        if not site.policy.records_are_units and mechanism and mechanism.unit is Unit.RECORD:
            _check_units(dataset)
        _check_size(request, site.config, dataset.schema)
        trainer = trainer_for(site.config, dataset.schema, worker=site.worker, idle=site.idle)
        weights = decode(request.arrays, trainer.template)
        check_trainer(trainer, site.config, dataset.schema, mechanism)
        commit = None
        if mechanism is not None:
            reserved = event_of(mechanism, node=name, round=round, status="reserved")
            commit = books.reserve(reserved, request, site.policy.afford(request, mechanism))
            event = reserved
        else:
            request.check_time()
            books.expose(name, request)
        dataset = with_features(dataset, trainer.model, trainer.device)
        job = request.job
        if seat is not None:  # clipped, but not noised: its noise is whole numbers
            job = dataclasses.replace(job, noise_by="server")
        secret = _secret(site, request, name)
        ran, trained = yield _Training(
            trainer=trainer,
            job=job,
            member=Member(records=dataset, weights=weights, secret=secret),
            subjects=dataset.subject_numbers() if _by_subject(request) else None,
        )
        if ran.signal_to_noise:
            told = ", ".join(f"{part} {value:.3g}" for part, value in ran.signal_to_noise.items())
            _log.info("%s, round %d: signal to noise of a step: %s", name, round, told)
        if seat is not None:
            arrays = seat.masked(request, weights, trained, trainer.trainable, secret)
        else:
            arrays = compress(
                trained,
                weights,
                form=request.compression,
                keep=request.compression_keep,
                stream=NoiseStream(secret, "compression"),
            )
        if commit is not None and event is not None:
            commit()
            event = dataclasses.replace(event, status="spent")
        promised = site.config.private or mechanism is not None
        ledger, head = books.head()
        return TrainReply(
            node=name,
            round=round,
            status="ok",
            weight=float(len(dataset)) if counts and not promised else 1.0,
            event=event,
            arrays=arrays,
            unclipped=ran.unclipped,
            ledger=ledger,
            head=head,
        )
    except Exception as error:
        # The whole story stays here, in the node's own log.
        _log.warning("%s, round %d: %s", name, round, error, exc_info=error)
        ledger, head = books.head()
        return dataclasses.replace(
            refusal(error, name, round=round, event=event), ledger=ledger, head=head
        )


def refusal(
    error: Exception, node: str, *, round: int = 0, event: Event | None = None
) -> TrainReply:
    """The reply that says `error`, scrubbed; `event`: what was reserved before it."""
    refused = isinstance(error, FedfuseError) and event is None
    return TrainReply(
        node=node,
        round=round,
        status="refused" if refused else "failed",
        problem=scrubbed(error),
        event=event,
    )


def trainer_for(config: RunConfig, schema: Schema, *, worker: int = 0, idle: int = 0) -> Trainer:
    """This process's trainer for a run: the model and its hooks are built once.

    Its weights are whatever the last round left; every round loads its own.
    """
    key = (config_digest(config), repr(schema), f"{config.train.device} {worker}")
    if key not in _trainers:
        _trainers[key] = new_trainer(config, schema, worker=worker, idle=idle)
        while len(_trainers) > _TRAINERS_KEPT:
            _trainers.popitem(last=False)
    return _trainers[key]


def new_trainer(config: RunConfig, schema: Schema, *, worker: int = 0, idle: int = 0) -> Trainer:
    """A trainer whose weights are the first ones of a run."""
    model = build_model(schema, config.model, vocabulary=config.data.vocabulary, seed=config.seed)
    device = pick_device(config.train.device, worker)
    task = Task.of(schema.target, config.model)
    loss = training_loss(task.loss, config.model.auxiliary, schema.target, len(schema.names))
    return Trainer(model, loss, device, idle=idle)


@lru_cache(maxsize=16)
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
    request.check_time()


def _check_size(request: TrainRequest, config: RunConfig, schema: Schema) -> None:
    """Refuses a model of another size than announced, before it takes any memory."""
    count = count_parameters(schema, config.model, vocabulary=config.data.vocabulary)
    if count != request.parameters:
        raise WireError(
            f"{request.parameters:,} parameters are announced, but the configuration's model "
            f"has {count:,}"
        )


def _check_units(dataset: Dataset) -> None:
    """Refuses unit "record" where a person has several records. Says no number: it is a count."""
    subjects = dataset.subjects[dataset.subjects != ""]
    if len(np.unique(subjects)) < len(subjects):
        raise PrivacyError(
            "subjects have several records here, so a promise for one record does not cover one "
            "person",
            hint='ask with unit = "subject"; policy.records_are_units = true lets it through',
        )


def _secret(site: Site, request: TrainRequest, name: str) -> bytes:
    """Keys sampling, noise and order. Where something is promised it is private: without a noise
    seed of the node's own it comes from the system's entropy, whatever the server configures."""
    if request.job.mechanism is not None or site.policy.noise_seed:
        return round_secret(site.policy.noise_seed, name, request.round)
    return round_secret(f"order {site.config.seed}", name, request.round)
