"""One node, one round: a job's steps on the node's own records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.privacy.dpsgd import (
    Loss,
    PrivateOptimizer,
    RecordGradients,
    private_step,
    with_record_gradients,
)
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.sampling import poisson_batches, shuffled_batches
from fedfuse.privacy.spec import Mechanism

__all__ = ["Job", "Records", "Trainer", "pick_device"]


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
    proximal_mu: float = 0.0
    """FedProx's mu (Li et al. 2020, arXiv:1812.06127v5); 0 is without."""
    physical_batch: int = 256
    batch_size: int = 32
    """Records in a step that is not private."""
    expected_batch: float = 1.0
    """q x declared records: the divisor of a private step's sum."""
    mechanism: Mechanism | None = None
    """The private mechanism of this round; None is NOT PRIVATE."""


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


class Trainer:
    """A model with its hooks, made once in a process and used for every node and round.

    Nothing of one run stays for the next: weights are loaded, optimizers are made anew.
    """

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device) -> None:
        self.model = model.to(device)
        self.loss = loss
        self.device = device
        self._hooked: RecordGradients | None = None
        # By name in the model itself, so that the hooks' wrapper doesn't show on the wire.
        self._state = self.model.state_dict(keep_vars=False)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def load(self, weights: Mapping[str, NDArray[np.generic]]) -> None:
        """Copies `weights` into the model. Raises ModelError on another set of names or shapes."""
        if set(weights) != set(self._state):
            raise ModelError("the weights are not those of this model", where="model")
        with torch.no_grad():
            for name, tensor in self._state.items():
                value = torch.from_numpy(np.array(weights[name]))
                if value.shape != tensor.shape:
                    raise ModelError(
                        f"weight {name} has shape {tuple(value.shape)}, "
                        f"but the model's is {tuple(tensor.shape)}"
                    )
                tensor.copy_(value)

    def weights(self) -> dict[str, NDArray[np.generic]]:
        """A copy of the model's weights, by name."""
        return {name: tensor.cpu().numpy().copy() for name, tensor in self._state.items()}

    def run(self, records: Records, job: Job, *, secret: bytes) -> None:
        """Trains on `records` as `job` says; `secret` (32 bytes) keys sampling, noise and order."""
        self.model.train()
        optimizer = _optimizer(self._parameters, job)
        pull = self._proximal(job.proximal_mu)
        if job.mechanism is None:
            self._hooks_off()
            self._run_plain(records, job, optimizer, pull, NoiseStream(secret, "order"))
        else:
            self._run_private(records, job, job.mechanism, optimizer, pull, secret)

    def _run_private(
        self,
        records: Records,
        job: Job,
        mechanism: Mechanism,
        optimizer: torch.optim.Optimizer,
        pull: Callable[[], None] | None,
        secret: bytes,
    ) -> None:
        model = self._hooks_on()
        private = PrivateOptimizer(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            clip_norm=mechanism.clip_norm,
            expected_batch=job.expected_batch,
            stream=NoiseStream(secret, "noise"),
        )
        sampling = NoiseStream(secret, "sampling")
        for rows in poisson_batches(len(records), mechanism.sample_rate, job.steps, sampling):
            private_step(
                model,
                private,
                records.batch(rows).to(self.device),
                self.loss,
                physical_batch=job.physical_batch,
                adjust=pull,
            )

    def _run_plain(
        self,
        records: Records,
        job: Job,
        optimizer: torch.optim.Optimizer,
        pull: Callable[[], None] | None,
        order: NoiseStream,
    ) -> None:
        for rows in shuffled_batches(len(records), job.batch_size, job.steps, order):
            if len(rows) == 0:
                return
            batch = records.batch(rows).to(self.device)
            optimizer.zero_grad()
            self.loss(self.model(batch), batch.target).mean().backward()
            if pull is not None:
                pull()
            optimizer.step()

    def _hooks_on(self) -> RecordGradients:
        """The model under Opacus's hooks, which are put on once."""
        if self._hooked is None:
            self._hooked = with_record_gradients(self.model)
        self._hooked.enable_hooks()
        return self._hooked

    def _hooks_off(self) -> None:
        if self._hooked is not None:
            self._hooked.disable_hooks()

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


def _optimizer(parameters: list[nn.Parameter], job: Job) -> torch.optim.Optimizer:
    if job.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=job.learning_rate, betas=(job.momentum, 0.999))
    return torch.optim.SGD(parameters, lr=job.learning_rate, momentum=job.momentum)
