"""The server's side of one run: it conducts the rounds, keeps the books, and loses nothing."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedfuse.batch import Schema, TargetKind
from fedfuse.config import RunConfig
from fedfuse.conformal import Calibration
from fedfuse.data.dataset import Dataset
from fedfuse.data.reading import Reading
from fedfuse.errors import ConfigError
from fedfuse.evaluate import evaluate, predict, slices
from fedfuse.federation import spending
from fedfuse.federation.checking import check_trainer
from fedfuse.federation.features import with_features
from fedfuse.federation.gathering import Mean
from fedfuse.federation.masking.conduct import MESSAGE_TYPE, MaskedRound
from fedfuse.federation.masking.seat import lattice_of
from fedfuse.federation.masking.terms import Terms, threshold_for
from fedfuse.federation.node import new_trainer
from fedfuse.federation.observer import Observer, RoundRecord, RunInfo
from fedfuse.federation.released import describe
from fedfuse.federation.rounds import Outcome, expected_batch, federate, job_of
from fedfuse.federation.spending import Spent
from fedfuse.federation.strategy import build_strategy
from fedfuse.federation.wire import (
    TrainRequest,
    Weights,
    config_digest,
    encode,
    event_of,
    signed,
)
from fedfuse.models.answer import answer
from fedfuse.privacy.adaptive import next_clip_norm
from fedfuse.privacy.central import NoisyMean, noisy_count
from fedfuse.privacy.noise import NoiseStream, round_secret
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Event, Mechanism, Unit
from fedfuse.runfolder import Checkpoint, RunFolder
from fedfuse.tasks import Task

__all__ = ["Session"]


@dataclass(kw_only=True)
class Session:
    """One run, as its server sees it. A listener of `federate`, and a source for the summary."""

    announced: RunConfig
    """The configuration as it was written: what nodes have too, and compare by its digest."""
    config: RunConfig
    """The same with sigma and declared_records resolved; all of that is in what nodes are asked."""
    mechanism: Mechanism | None
    """Of the next round: its clip norm may adapt, nothing else changes."""
    folder: RunFolder
    schema: Schema
    test: Dataset
    observer: Observer
    valid: Dataset | None = None
    """The server's own: what sets and intervals are calibrated on at the end."""
    reading: Reading | None = None
    """How records are read; None where the prepared data does not say."""
    nodes: tuple[str, ...] = ()
    """All names, where the server knows them: in a simulation."""
    first: int = 1
    last: int = 1
    key: SigningKey | None = None
    """Signs what nodes are asked."""
    identities: Mapping[str, str] | None = None
    """By name, the public keys of nodes whose updates come masked; None: no masks."""
    listed: Mapping[int, str] | None = None
    """By number, the names of the nodes that may be asked; None: of all that are connected."""
    removable: bool = False
    """Whether real nodes make their noise from a seed that the server knows: NOT PRIVATE."""
    spent: Spent = field(default_factory=Spent)
    """What all nodes have reserved or spent so far."""
    names: dict[int, str] = field(default_factory=dict)
    record: RoundRecord | None = None
    """Of the last finished round."""
    done: int = 0
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()
    """What the check of the model found that is no danger to the promise."""

    def __post_init__(self) -> None:
        if self.config.federation.secure_aggregation and self.identities is None:
            raise ConfigError(
                "federation.secure_aggregation = true, but no node's identity is known",
                where="federation",
            )
        self.task = Task.of(self.schema.target, self.config.model)
        self._trainer = new_trainer(self.config, self.schema)
        found = check_trainer(self._trainer, self.config, self.schema, self.mechanism)
        self.remarks = tuple(f"{one.what} ({one.hint})" for one in found)
        self.test = self.featured(self.test)
        self._strategy = build_strategy(self.config.federation, self.config.private)
        self._weights = self._trainer.weights()
        self._told: set[str] = set()
        self.parameters = sum(
            p.numel() for p in self._trainer.model.parameters() if p.requires_grad
        )
        self.device = str(self._trainer.device)
        self.done = self.first - 1

    def featured(self, dataset: Dataset) -> Dataset:
        """`dataset` with the features of frozen encoders, computed if its store has none yet."""
        return with_features(dataset, self._trainer.model, self._trainer.device)

    def resume(self) -> tuple[str, ...]:
        """Goes on from the last checkpoint, the budget included; tells what became different.

        With a noise seed a round that is run again is the very same release, so what was booked
        of it is dropped. Otherwise it stays spent, and the run ends earlier by as much as that.
        """
        privacy = self.config.privacy
        checkpoint = self.folder.checkpoint()
        done = checkpoint.round if checkpoint else 0
        self.folder.forget_after(done, events=bool(privacy.noise_seed))
        self.spent = Spent(self.folder.events())
        if checkpoint is not None:
            self._weights = dict(checkpoint.weights)
            self._strategy.restore(dict(checkpoint.strategy))
            self.first, self.done = done + 1, done
            self.seconds = float(checkpoint.extra.get("seconds", 0.0))
            told = checkpoint.extra.get("names", {})
            self.names |= {int(node): str(name) for node, name in told.items()}
            if self.mechanism is not None and "clip_norm" in checkpoint.extra:
                self.mechanism = replace(
                    self.mechanism, clip_norm=float(checkpoint.extra["clip_norm"])
                )
        notes = [f"resumed after round {done}"]
        if self.mechanism is not None:
            left = spending.rounds_left(
                self.spent.histories(),
                self.mechanism,
                self.config.train.rounds - done,
                epsilon=privacy.epsilon,
                delta=privacy.delta,
            )
            if done + left < self.last:
                notes.append(
                    f"what was broken off stays spent, so the run ends after round {done + left} "
                    f"of {self.last}"
                )
            self.last = done + left
        return tuple(notes)

    def info(
        self,
        *,
        engine: str,
        nodes: tuple[str, ...],
        workers: int,
        assumptions: tuple[str, ...],
        notes: tuple[str, ...],
    ) -> RunInfo:
        """What is known before the first round that is left."""
        privacy, mechanism = self.config.privacy, self.mechanism
        return RunInfo(
            name=self.config.name,
            engine=engine,
            workers=workers,
            device=self.device,
            nodes=nodes,
            rounds=self.last,
            first_round=self.first,
            parameters=self.parameters,
            private=mechanism is not None and not self.removable,
            epsilon=privacy.epsilon if mechanism else None,
            delta=privacy.delta if mechanism else None,
            sigma=mechanism.noise_multiplier if mechanism else None,
            sample_rate=mechanism.sample_rate if mechanism else None,
            expected_batch=expected_batch(self.config),
            assumptions=assumptions,
            notes=notes,
        )

    def conduct(self, grid: Grid) -> None:
        """Runs the rounds that are left."""
        federate(
            grid,
            config=self.config,
            ask=self._ask,
            strategy=self._strategy,
            weights=self._weights,
            first=self.first,
            last=self.last,
            names=self.names,
            listener=self,
            connected=len(self.nodes) or self.config.federation.min_nodes,
            mean_of=self._mean_of,
            masks_of=self._masks_of if self.identities is not None else None,
            listed=self.listed,
        )

    def _ask(self, round: int, weights: Weights) -> TrainRequest:
        return signed(
            TrainRequest(
                run=self.folder.run_id(),
                request=secrets.token_hex(16),
                round=round,
                rounds=self.last,
                deadline=time.time() + self.config.federation.round_timeout_s,
                digest=config_digest(self.announced),
                task=self.schema.target.kind.value,
                modalities=self.schema.names,
                parameters=self.parameters,
                job=job_of(self.config, self.mechanism, round),
                arrays=encode(weights),
                compression=self.config.federation.compression,
                compression_keep=self.config.federation.compression_keep,
            ),
            self.key,
        )

    def round_starts(self, request: TrainRequest, asked: dict[int, str]) -> None:
        """Reserves for all that are asked: from here on it counts, whatever happens."""
        self._told = set()
        self._began = time.monotonic()
        if self.mechanism is not None:
            self.folder.begin_round(self._reserved(request.round, asked, set()))
        self.observer.round_started(request.round)

    def on_reply(self, node: int, message: Message) -> None:
        """Tells the observer of one node's reply as soon as it is there; nothing rests on it."""
        if message.metadata.message_type == MESSAGE_TYPE:
            return
        name, problem = self.names.get(node, f"node {node}"), None
        if message.has_error():
            problem = str(message.error.reason)
        else:
            config = dict(message.content.config_records.get("config") or {})
            if config.get("status") != "ok":
                problem = str(config.get("problem", "no answer that can be read"))
        self._tell(self.done + 1, name, problem)

    def round_ends(self, outcome: Outcome) -> None:
        """Evaluates, and puts everything of the round on the disk before the next one starts."""
        aggregate = outcome.aggregate
        self._weights = aggregate.weights
        self._trainer.load(aggregate.weights)
        metrics = evaluate(self._trainer.model, self.test, self.task, device=self._trainer.device)
        self._settle_names(outcome)
        events = self._spent(outcome)
        self.spent.add(events)
        heads = [
            {"round": outcome.round, "node": reply.node, "ledger": reply.ledger, "head": reply.head}
            for reply in aggregate.replies.values()
            if reply.ledger
        ]
        if heads:
            self.folder.append_heads(heads)
        self._adapt(outcome)
        for name, problem in aggregate.failures.items():
            self._tell(outcome.round, name, problem)
        for reply in aggregate.replies.values():
            self._tell(outcome.round, reply.node, None)
        privacy = self.config.privacy
        promised = self.mechanism is not None and not self.removable
        epsilon = spending.worst(self.spent.histories(), privacy.delta) if promised else None
        self.record = RoundRecord(
            round=outcome.round,
            rounds=self.last,
            metrics=metrics,
            epsilon=epsilon,
            epsilon_allowed=privacy.epsilon if promised else None,
            nodes_ok=sum(reply.status == "ok" for reply in aggregate.replies.values()),
            failures=aggregate.failures,
            seconds=time.monotonic() - self._began,
            bytes_sent=outcome.bytes_sent,
            bytes_received=outcome.bytes_received,
        )
        self.seconds += self.record.seconds
        self.folder.end_round(events, _row(self.record), self._checkpoint(outcome.round))
        self.done = outcome.round
        self.observer.round_finished(self.record)

    def _settle_names(self, outcome: Outcome) -> None:
        """What was broken off before a node had told its name is that node's."""
        named = {outcome.asked[node]: self.names.get(node, "") for node in outcome.asked}
        found = {old: new for old, new in named.items() if new and new != old}
        if found:
            self.folder.rename(found)
            self.spent = Spent(self.folder.booked())

    def release(self) -> None:
        """Writes the model as it stands after the last finished round."""
        if self.done:
            self.folder.write_model(self._weights, describe(self.schema, self.config))
            if self.reading is not None:
                self.folder.write_use(self.reading.as_dict(), self._calibration())

    def final_metrics(self) -> dict[str, float]:
        """The model's figures on the test records, as it stands after the last finished round."""
        if self.record is not None:
            return self.record.metrics
        self._trainer.load(self._weights)
        return evaluate(self._trainer.model, self.test, self.task, device=self._trainer.device)

    def final_slices(self) -> dict[str, dict[str, dict[str, float]]]:
        """The same figures by what is present and by client; see `evaluate.slices`."""
        self._trainer.load(self._weights)
        trainer, names = self._trainer, self.schema.names
        return slices(trainer.model, self.test, self.task, names, device=trainer.device)

    def _calibration(self) -> dict[str, Any] | None:
        """How well the model fits the valid records; None where there are none, or it diverged."""
        if self.valid is None:
            return None
        self._trainer.load(self._weights)
        outputs, truth = predict(self._trainer.model, self.valid, device=self._trainer.device)
        target = self.schema.target
        if target.kind is TargetKind.REGRESSION:
            truth = target.centre + target.scale * truth
        told = answer(outputs, target).double().numpy()
        if not np.isfinite(told).all():
            return None
        return Calibration.of(target.kind, told, truth.numpy()).as_dict()

    def abandon(self) -> None:
        """Enters a round that was broken off in the books: what was reserved counts."""
        reserved = self.folder.reserved()
        self.spent.add(reserved)
        if reserved:
            self.folder.append_events(reserved)

    def _mean_of(self, weights: Weights, round: int, asked: int) -> Mean | None:
        """Unit "node": the noised mean of a round's updates. Otherwise Flower's strategy means."""
        mechanism, privacy = self.mechanism, self.config.privacy
        if mechanism is None or mechanism.unit is not Unit.NODE:
            return None
        by_server = privacy.noise_by == "server"
        return NoisyMean(
            weights,
            self._trainer.trainable,
            asked=asked,
            clip_norm=mechanism.clip_norm,
            noise_multiplier=mechanism.sum_noise if by_server else 0.0,
            stream=NoiseStream(round_secret(privacy.noise_seed, "the server", round), "noise"),
        )

    def _masks_of(
        self, grid: Grid, request: TrainRequest, asked: dict[int, str], weights: Weights
    ) -> MaskedRound:
        """A round whose updates are known as a sum alone; with a promise its divisor is public."""
        names = tuple(sorted(asked.values()))
        federation = self.config.federation
        terms = Terms(
            request=request.request,
            digest=request.digest,
            nodes=names,
            threshold=max(threshold_for(len(names)), federation.min_nodes),
            length=self.parameters,
        )
        lattice = lattice_of(
            request.job,
            clip_norm=self.config.privacy.clip_norm,
            length=terms.length,
            nodes=len(names),
        )
        return MaskedRound(
            grid,
            terms,
            lattice,
            asked=asked,
            identities=self.identities or {},
            start=weights,
            trained=self._trainer.trainable,
            divisor=len(names) if self.mechanism is not None else 0,
            key=self.key,
        )

    def _adapt(self, outcome: Outcome) -> None:
        """Moves C for the next round, by what the nodes' noisy counts say; see `next_clip_norm`."""
        mechanism, privacy = self.mechanism, self.config.privacy
        if mechanism is None or not mechanism.count_noise:
            return
        counts = [c for reply in outcome.aggregate.replies.values() for c in reply.unclipped]
        total, units = sum(counts), expected_batch(self.config) * len(counts)
        if mechanism.unit is Unit.NODE:  # one count of one step from each
            units = float(len(outcome.asked))
            by_server = privacy.noise_by == "server"
            secret = round_secret(privacy.noise_seed, "the server", outcome.round)
            std = mechanism.count_noise if by_server else 0.0
            total = noisy_count(total, std, NoiseStream(secret, "count"))
        if not counts:
            return
        self.mechanism = replace(
            mechanism,
            clip_norm=next_clip_norm(
                mechanism.clip_norm,
                total / units + 0.5,
                quantile=privacy.clip_quantile,
                rate=privacy.clip_rate,
                first=privacy.clip_norm,
            ),
        )

    def _checkpoint(self, round: int) -> Checkpoint:
        return Checkpoint(
            round=round,
            weights=self._weights,
            strategy=self._strategy.state(),
            extra={"seconds": self.seconds}
            | ({} if self.nodes else {"names": {str(n): name for n, name in self.names.items()}})
            | ({"clip_norm": self.mechanism.clip_norm} if self.mechanism else {}),
        )

    def _spent(self, outcome: Outcome) -> list[Event]:
        """The books' lines for a round: a node whose answer is missing or unreadable counts too."""
        if self.mechanism is None:
            return []
        replies = outcome.aggregate.replies
        told = [reply.event for reply in replies.values() if reply.event is not None]
        silent = {node: name for node, name in outcome.asked.items() if node not in replies}
        heard = {reply.node for reply in replies.values()}
        return [*told, *self._reserved(outcome.round, silent, heard)]

    def _reserved(self, round: int, asked: dict[int, str], heard: set[str]) -> list[Event]:
        """Events for nodes that may spend, or may have spent.

        Where a name is not known yet, every node that was not `heard` of may be the one.
        """
        if self.mechanism is None or not asked:
            return []
        known = all(node in self.names for node in asked)
        names: Iterable[str] = (
            asked.values() if known or not self.nodes else set(self.nodes) - heard
        )
        return [
            event_of(self.mechanism, node=name, round=round, status="reserved")
            for name in sorted(names)
        ]

    def _tell(self, round: int, name: str, problem: str | None) -> None:
        if name not in self._told:
            self._told.add(name)
            self.observer.node_finished(round, name, problem)


def _row(record: RoundRecord) -> dict[str, object]:
    """The round's line; a figure that is not finite is null, as JSON has no other word for it."""
    row = asdict(record)
    row["metrics"] = {k: v if math.isfinite(v) else None for k, v in record.metrics.items()}
    if record.epsilon is None:
        del row["epsilon"], row["epsilon_allowed"]
    return row
