"""One node, one round: a job's steps on the node's own records."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedfuse.allocator import keep_freed_memory
from fedfuse.batch import Batch
from fedfuse.errors import ModelError, PrivacyError
from fedfuse.models.missing import drop_modalities
from fedfuse.models.shifts import shift_records
from fedfuse.privacy.central import noisy_count, private_update, unclipped
from fedfuse.privacy.dpsgd import (
    Loss,
    Part,
    PrivateOptimizer,
    RecordGradients,
    prepare,
    private_step,
    set_hooks,
)
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.sampling import poisson_batches, poisson_subjects, shuffled_batches
from fedfuse.privacy.spec import REST, Mechanism, Unit, clip_shares
from fedfuse.uncompiled import SGD, AdamW

__all__ = [
    "Job",
    "Ran",
    "Records",
    "Trainer",
    "Weights",
    "idle_cores",
    "optimizer_of",
    "pick_device",
]

Weights = dict[str, NDArray[np.generic]]
"""By name, as they travel."""


class Records(Protocol):
    """What a trainer needs of a data set."""

    def __len__(self) -> int: ...

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The records of `rows`, which may be empty."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a node is asked to do in a round. Every field is public."""

    steps: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float = 0.0
    """L2 on the weights with SGD, decoupled with Adam (Loshchilov and Hutter 2019,
    arXiv:1711.05101v3)."""
    proximal_mu: float = 0.0
    """FedProx's mu (Li et al. 2020, arXiv:1812.06127v5); 0 is without."""
    physical_batch: int = 256
    batch_size: int = 32
    """Records in a step that is not private."""
    expected_batch: float = 1.0
    """q x declared records: the divisor of a private step's sum."""
    mechanism: Mechanism | None = None
    """The private mechanism of this round; None is NOT PRIVATE."""
    clipping: str = "bookkeeping"
    """How clipped sums are computed; see PrivacyConfig."""
    clip_shares: str = ""
    """How C is shared out among the model's parts; see PrivacyConfig."""
    records_per_subject: int = 16
    """Unit "subject": the most records of one subject in a step."""
    noise_by: str = "nodes"
    """Unit "node": whether the node adds noise to its update, or leaves that to the server."""
    noise_nodes: int = 1
    """Unit "node", noise by nodes: over how many updates the noise is shared out."""


def pick_device(name: str, index: int = 0) -> torch.device:
    """The device of a setting: "auto" is GPU `index` modulo their number, or the CPU.

    Raises ModelError where the device named is not there.
    """
    if name == "auto":
        count = torch.cuda.device_count()
        return torch.device("cuda", index % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}",
            where="train.device",
            hint='take "auto" or "cpu"; `fedfuse doctor` lists what is there',
        ) from None
    return device


def idle_cores() -> int:
    """Cores that torch's threads leave idle, if this process has the machine to itself."""
    return max(0, len(os.sched_getaffinity(0)) - torch.get_num_threads())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a node learns of its own round. None of it leaves the node by itself."""

    signal_to_noise: Mapping[str, float] = field(default_factory=dict)
    """By part of the model: the clipped sums' norm over that of the noise, root mean square over
    steps. It is computed without noise, so it is for the node's own eyes."""
    unclipped: tuple[float, ...] = ()
    """By step: the noisy count of unclipped units less half of all; charged with the sum."""


class Trainer:
    """A model ready for private steps, made once in a process and used for every node and round.

    Nothing of one run stays for the next: weights are loaded, optimizers are made anew.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, device: torch.device, *, idle: int = 0
    ) -> None:
        """`idle`: cores that nothing else uses meanwhile; the noise of a step is made there."""
        self._idle = idle
        self.model = model.to(device)
        self.loss = loss
        self.device = device
        self._ready: dict[str, RecordGradients] = {}
        keep_freed_memory()
        # By name in the model itself, so that the hooks' wrapper doesn't show on the wire.
        frozen = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        self._state = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=False).items()
            if name not in frozen
        }
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def load(self, weights: Mapping[str, NDArray[np.generic]]) -> None:
        """Copies `weights` into the model. Raises ModelError on another set of names or shapes."""
        if set(weights) != set(self._state):
            raise ModelError("the weights are not those of this model", where="model")
        with torch.no_grad():
            for name, tensor in self._state.items():
                value = np.asarray(weights[name])
                if value.shape != tensor.shape:
                    raise ModelError(
                        f"weight {name} has shape {value.shape}, "
                        f"but the model's is {tuple(tensor.shape)}"
                    )
                if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
                    np.copyto(tensor.numpy(), value, casting="unsafe")
                else:
                    tensor.copy_(torch.from_numpy(value.copy()))

    def weights(self) -> Weights:
        """A copy of the model's weights, by name: trained ones and buffers, no frozen ones."""
        return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in self._state.items()}

    @cached_property
    def template(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """By name: the shape and the type ("float32") of each weight."""
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    @cached_property
    def trainable(self) -> frozenset[str]:
        """The names of the weights that training changes."""
        return frozenset(n for n, p in self.model.named_parameters() if p.requires_grad)

    def run(
        self,
        records: Records,
        job: Job,
        *,
        secret: bytes,
        subjects: NDArray[np.int64] | None = None,
    ) -> Ran:
        """Trains on `records` as `job` says; `secret` (32 bytes) keys sampling, noise and order.

        subjects  (N,) for unit "subject": the number of each record's subject, 0 to S - 1

        Raises PrivacyError where the unit needs subjects and there are none.
        """
        self.model.train()
        optimizer = optimizer_of(self._parameters, job)
        pull = self._proximal(job.proximal_mu)
        mechanism = job.mechanism
        if mechanism is None or mechanism.unit is Unit.NODE:
            start = self.weights()
            self.hooks_off()
            self._run_plain(records, job, optimizer, pull, secret)
            if mechanism is None:
                return Ran()
            ran, bounded = self.private_update(start, self.weights(), job, secret)
            self.load(bounded)
            return ran
        if mechanism.unit is Unit.SUBJECT and subjects is None:
            raise PrivacyError('unit "subject" needs to know whose each record is')
        whose = subjects if mechanism.unit is Unit.SUBJECT else None
        return self._run_private(records, job, mechanism, optimizer, pull, secret, whose)

    def private_update(
        self, start: Weights, end: Weights, job: Job, secret: bytes
    ) -> tuple[Ran, Weights]:
        """Unit "node": the weights that a round from `start` to `end` may give, which are bounded
        and have this node's share of noise."""
        mechanism = job.mechanism
        assert mechanism is not None
        share = 0.0 if job.noise_by == "server" else job.noise_nodes**-0.5
        C = mechanism.clip_norm
        bounded = private_update(
            start,
            end,
            self.trainable,
            clip_norm=C,
            noise_multiplier=mechanism.sum_noise * share,
            stream=NoiseStream(secret, "noise", threads=torch.get_num_threads()),
        )
        if not mechanism.count_noise:
            return Ran(), bounded
        own = float(unclipped(start, end, self.trainable, C)) - 0.5
        stream = NoiseStream(secret, "count")
        count = noisy_count(own, mechanism.count_noise * share, stream)
        return Ran(unclipped=(count,)), bounded

    def parts(self, shares: str) -> tuple[list[Part], list[Part]]:
        """The parts to clip by (none where C is not shared out), and all parts of the model."""
        part_of = getattr(self.model, "part_of", None)
        if part_of is None:
            if shares:
                raise ModelError("this model has no parts to share C among", where="model")
            return [], []
        places: dict[str, list[int]] = {}
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for place, name in enumerate(names):
            places.setdefault(part_of(name), []).append(place)
        share = clip_shares(shares, tuple(name for name in places if name != REST))
        parts = [
            Part(name=name, places=tuple(rows), share=share.get(name, 1.0))
            for name, rows in places.items()
        ]
        return (parts if share else []), parts

    def _run_private(
        self,
        records: Records,
        job: Job,
        mechanism: Mechanism,
        optimizer: torch.optim.Optimizer,
        pull: Callable[[], None] | None,
        secret: bytes,
        subjects: NDArray[np.int64] | None,
    ) -> Ran:
        model = self._prepared(job.clipping)
        parts, watched = self.parts(job.clip_shares)
        private = PrivateOptimizer(
            optimizer,
            noise_multiplier=mechanism.sum_noise,
            clip_norm=mechanism.clip_norm,
            expected_batch=job.expected_batch,
            stream=NoiseStream(secret, "noise", threads=torch.get_num_threads(), idle=self._idle),
            parts=parts,
            watched=watched,
            count_noise=mechanism.count_noise,
        )
        sampling, rate = NoiseStream(secret, "sampling"), mechanism.sample_rate
        varied = self.variation(secret)
        drawn: Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]] = (
            ((rows, None) for rows in poisson_batches(len(records), rate, job.steps, sampling))
            if subjects is None
            else poisson_subjects(subjects, rate, job.steps, job.records_per_subject, sampling)
        )
        seen: list[Mapping[str, float]] = []
        for rows, owners in drawn:
            private_step(
                model,
                private,
                varied(records.batch(rows)).to(self.device),
                self.loss,
                physical_batch=job.physical_batch,
                owners=owners,
                adjust=pull,
                watch=seen.append,
            )
        return Ran(
            signal_to_noise={
                name: math.sqrt(sum(step[name] for step in seen) / len(seen)) for name in seen[0]
            },
            unclipped=tuple(private.unclipped),
        )

    def _run_plain(
        self,
        records: Records,
        job: Job,
        optimizer: torch.optim.Optimizer,
        pull: Callable[[], None] | None,
        secret: bytes,
    ) -> None:
        order, varied = NoiseStream(secret, "order"), self.variation(secret)
        for rows in shuffled_batches(len(records), job.batch_size, job.steps, order):
            if len(rows) == 0:
                return
            batch = varied(records.batch(rows)).to(self.device)
            optimizer.zero_grad()
            self.loss(self.model(batch), batch.target).mean().backward()
            if pull is not None:
                pull()
            optimizer.step()

    def variation(self, secret: bytes) -> Callable[[Batch], Batch]:
        """Modality dropout and shifts as the model asks for, each from a stream of its own."""
        chance = float(getattr(self.model, "modality_dropout", 0.0))
        shifts = getattr(self.model, "shifts", ())
        coins, places = NoiseStream(secret, "modality dropout"), NoiseStream(secret, "shifts")

        def varied(batch: Batch) -> Batch:
            if chance:
                uniform = coins.uniform(len(batch) * len(batch.present))
                batch = drop_modalities(batch, chance, uniform)
            if shifts:
                batch = shift_records(batch, shifts, places.uniform(len(batch) * len(shifts)))
            return batch

        return varied

    def _prepared(self, clipping: str) -> RecordGradients:
        """The model ready for private steps, which it is made once for each way of clipping."""
        if clipping not in self._ready:
            self._ready[clipping] = prepare(self.model, clipping)
        self.hooks_off()
        set_hooks(self._ready[clipping], on=True)
        return self._ready[clipping]

    def hooks_off(self) -> None:
        """The model as it is without private steps."""
        if not self._ready:
            return
        for ready in self._ready.values():
            set_hooks(ready, on=False)

    def _proximal(self, mu: float) -> Callable[[], None] | None:
        """Adds mu (w - w_0) to each gradient: it depends on no record, so it costs nothing."""
        if mu == 0.0:
            return None
        start = [p.detach().clone() for p in self._parameters]

        def pull() -> None:
            for p, origin in zip(self._parameters, start, strict=True):
                if p.grad is not None:
                    p.grad.add_(p.detach() - origin, alpha=mu)

        return pull


def optimizer_of(parameters: Sequence[nn.Parameter], job: Job) -> torch.optim.Optimizer:
    """The optimizer of a round, without any state of the one before."""
    if job.optimizer == "adam":
        betas = (job.momentum, 0.999)
        return AdamW(
            parameters,
            lr=job.learning_rate,
            betas=betas,
            weight_decay=job.weight_decay,
            fused=True,
        )
    return SGD(
        parameters,
        lr=job.learning_rate,
        momentum=job.momentum,
        weight_decay=job.weight_decay,
        fused=True,
    )
