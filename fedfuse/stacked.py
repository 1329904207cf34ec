"""Several nodes' training as one program: their weights stacked, their steps taken together.

Where nodes and model are small, a step is mostly the calling of kernels. Here a step of K nodes is
one call of each: torch.func maps the model over nodes, and in private steps over their records too,
which gives each record's gradient by its node's own weights (per-example gradients by vectorised
mapping: Subramani, Vadivelu and Kamath 2021, arXiv:2010.09063v2).

What each node gets is what `Trainer.run` would give it, to float rounding: its own records, drawn
by its own stream, clipped one by one, with noise from its own stream.

Guarantees (as in `privacy/dpsgd.py`, for each node by itself)
    Row k of everything depends on node k alone: a map over nodes mixes nothing.
    Rows that fill a node's batch up to the largest one have the factor 0.
Not covered
    Unit "subject", and losses that couple a batch: `Stacked.takes` says no to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedfuse.batch import Batch
from fedfuse.privacy.dpsgd import clip_factors
from fedfuse.privacy.lengths import lengths
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.sampling import poisson_batches, shuffled_batches
from fedfuse.privacy.spec import Unit
from fedfuse.train import Job, Ran, Records, Trainer, Weights, optimizer_of

__all__ = ["MOST_TOGETHER", "Member", "Stacked", "together"]

MOST_TOGETHER = 12
"""Nodes in one program. More gain little, and a worker that dies takes all of them with it."""
_ROOM = 1 << 24
"""The most numbers of per-record gradients at once, over all nodes: 64 MB."""
_WORTH_PRIVATE, _WORTH_PLAIN = 1_700_000, 3_400_000
"""Parameters times records of a step, up to which stacking pays. Above, most of a step is
arithmetic, and in a private one book-keeping, which writes no gradients out, has less of it."""

Pile: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
"""inputs (K, b, ...), present (K, b), target (K, b, ...) of K nodes."""


def together(job: Job, parameters: int, nodes: int) -> int:
    """How many of `nodes` are best trained together; 1: one after the other.

    It follows from public sizes alone. The constants were measured on a CPU
    (benchmarks/stacked.py); on a GPU, where calls are dearer, more would pay.

    >>> from dataclasses import replace
    >>> job = Job(steps=4, optimizer="sgd", learning_rate=0.1, momentum=0.9)
    >>> together(job, 10_000, 100), together(job, 10_000, 3), together(job, 10_000_000, 100)
    (12, 3, 1)
    """
    if job.mechanism is not None and job.mechanism.unit is Unit.SUBJECT:
        return 1
    rows, worth = (
        (job.expected_batch, _WORTH_PRIVATE) if _by_record(job) else (job.batch_size, _WORTH_PLAIN)
    )
    return max(1, min(MOST_TOGETHER, nodes)) if parameters * rows <= worth else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the nodes that train together."""

    records: Records
    weights: Mapping[str, NDArray[np.generic]]
    """What it starts from."""
    secret: bytes
    """32 bytes, which key sampling, noise and order, as `Trainer.run` takes them."""


class Stacked:
    """A trainer's model, for several nodes at once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
        ends = np.cumsum([0, *(p.numel() for _, p in self._named)]).tolist()
        self._places = [slice(a, b) for a, b in pairwise(ends)]
        self._size = ends[-1]
        self._known: dict[bool, bool] = {}

    def takes(self, like: Records, job: Job) -> bool:
        """Whether the model can be trained so: it is tried out once, on made-up records."""
        if job.mechanism is not None and job.mechanism.unit is Unit.SUBJECT:
            return False
        by_record = _by_record(job)
        if by_record not in self._known:
            self._known[by_record] = self._tried(like, by_record)
        return self._known[by_record]

    def _tried(self, like: Records, by_record: bool) -> bool:
        model, device = self._trainer.model, self._trainer.device
        couples = any(getattr(module, "mixes_records", False) for module in model.modules())
        if couples or {p.dtype for _, p in self._named} != {torch.float32}:
            return False
        made = like.batch(np.zeros(0, dtype=np.int64)).blank(2)
        model.train()
        weights = torch.cat([p.detach().flatten() for _, p in self._named]).repeat(2, 1)
        try:
            pile, mask = _pile([made, made], slice(0, 2), device)
            self._gradients(by_record)(self._views(weights), *pile, mask)
        except Exception:  # whatever torch.func cannot map, of which there is no list
            return False
        return True

    def run(self, members: Sequence[Member], job: Job) -> list[tuple[Ran, Weights]]:
        """Trains each of `members` as `job` says: what it learned of its own round, its weights.

        Raises ModelError where weights are not this model's.
        """
        trainer = self._trainer
        trainer.hooks_off()
        trainer.model.train()
        start = self._rows(members)
        stack = nn.Parameter(start.clone(), requires_grad=False)
        optimizer = optimizer_of([stack], job)

        def step(gradient: Tensor) -> None:
            if job.proximal_mu:
                gradient.add_(stack - start, alpha=job.proximal_mu)
            stack.grad = gradient
            optimizer.step()

        if _by_record(job):
            ran = self._private(members, job, stack, step)
        else:
            self._plain(members, job, stack, step)
            ran = [Ran() for _ in members]
        found = []
        for one, row, member in zip(ran, stack.detach().cpu().numpy(), members, strict=True):
            begun: Weights = {name: np.asarray(value) for name, value in member.weights.items()}
            ended = dict(begun)
            for (name, p), place in zip(self._named, self._places, strict=True):
                ended[name] = row[place].reshape(p.shape)
            if job.mechanism is not None and job.mechanism.unit is Unit.NODE:
                one, ended = trainer.private_update(begun, ended, job, member.secret)
            found.append((one, ended))
        return found

    def _private(
        self,
        members: Sequence[Member],
        job: Job,
        stack: Tensor,
        step: Callable[[Tensor], None],
    ) -> list[Ran]:
        """The steps of unit "record"."""
        mechanism = job.mechanism
        assert mechanism is not None
        C, sigma = mechanism.clip_norm, mechanism.sum_noise
        cut, watched = self._trainer.parts(job.clip_shares)
        parts = [list(part.places) for part in cut] or [list(range(len(self._places)))]
        bounds = stack.new_tensor([C * part.share for part in cut] or [C])
        noise = [NoiseStream(member.secret, "noise") for member in members]
        counts: list[list[float]] = [[] for _ in members]
        power = {part.name: np.zeros(len(members)) for part in watched}
        gradients, sums = self._gradients(by_record=True), torch.empty_like(stack)
        for batches in self._drawn(members, job):
            sums.zero_()
            below = np.zeros(len(members))
            for rows in self._pieces(batches, job.physical_batch):
                pile, mask = _pile(batches, rows, stack.device)
                found = gradients(self._views(stack.detach()), *pile, mask)
                grads = [found[name].flatten(2) for name, _ in self._named]
                factors = _factors(grads, mask, parts, bounds)
                unclipped = factors.ge(1).all(0).double() - 0.5 * mask.double()
                below += unclipped.sum(1).cpu().numpy()
                for places, factor in zip(parts, factors, strict=True):
                    for i in places:
                        sum_of = torch.bmm(factor.unsqueeze(1), grads[i]).squeeze(1)
                        sums[:, self._places[i]] += sum_of
            for part in watched:
                power[part.name] += self._power(sums, part.places) / (sigma * C) ** 2
            for k, stream in enumerate(noise):
                if mechanism.count_noise:
                    drawn = float(stream.normal(1, mechanism.count_noise))
                    counts[k].append(float(below[k]) + drawn)
                stream.add_normal(sums[k], sigma * C)
            step(sums.div_(job.expected_batch))
        return [
            Ran(
                signal_to_noise={
                    name: math.sqrt(value[k] / job.steps) for name, value in power.items()
                },
                unclipped=tuple(counts[k]),
            )
            for k in range(len(members))
        ]

    def _drawn(self, members: Sequence[Member], job: Job) -> Iterator[list[Batch]]:
        """The batches of all members, step by step."""
        varied = [self._trainer.variation(member.secret) for member in members]
        rows = [_rows(member, job) for member in members]
        for step in zip(*rows, strict=True):
            yield [
                vary(member.records.batch(own))
                for vary, member, own in zip(varied, members, step, strict=True)
            ]

    def _power(self, sums: Tensor, places: Sequence[int]) -> NDArray[np.float64]:
        """(K,): the mean square of each node's sum, of some parameters."""
        columns = [self._places[i] for i in places]
        numbers = sum(place.stop - place.start for place in columns)
        squares = torch.stack([sums[:, place].double().square().sum(1) for place in columns])
        return np.asarray(squares.sum(0).cpu().numpy() / max(1, numbers))

    def _plain(
        self,
        members: Sequence[Member],
        job: Job,
        stack: Tensor,
        step: Callable[[Tensor], None],
    ) -> None:
        """Steps that promise nothing by themselves. A node without records stays as it is."""
        gradients = self._gradients(by_record=False)
        start = stack.detach().clone()
        empty = [k for k, member in enumerate(members) if len(member.records) == 0]
        for batches in self._drawn(members, job):
            if not any(len(batch) for batch in batches):
                return
            longest = max(map(len, batches))
            pile, mask = _pile(batches, slice(0, longest), stack.device)
            mask = mask / mask.sum(1, keepdim=True).clamp(min=1)
            found = gradients(self._views(stack.detach()), *pile, mask)
            step(torch.cat([found[name].flatten(1) for name, _ in self._named], 1))
            if empty:
                stack.data[empty] = start[empty]

    def _pieces(self, batches: Sequence[Batch], most: int) -> Iterator[slice]:
        """Rows of all batches that fit into memory at once."""
        longest = max(map(len, batches))
        size = max(1, min(most, _ROOM // (len(batches) * self._size)))
        for start in range(0, longest, size):
            yield slice(start, min(start + size, longest))

    def _rows(self, members: Sequence[Member]) -> Tensor:
        """(K, P): the weights that each member starts from."""
        rows = []
        for member in members:
            self._trainer.load(member.weights)
            rows.append(torch.cat([p.detach().flatten() for _, p in self._named]))
        return torch.stack(rows)

    def _views(self, stack: Tensor) -> dict[str, Tensor]:
        """(K, *shape) for each parameter."""
        return {
            name: stack[:, place].view(len(stack), *p.shape)
            for (name, p), place in zip(self._named, self._places, strict=True)
        }

    def _gradients(self, by_record: bool) -> Callable[..., dict[str, Tensor]]:
        """(views, pile, mask (K, b)) -> by name (K, b, *shape), each record's gradient; or
        (K, *shape), of the sum of each node's losses times `mask`."""
        model, loss = self._trainer.model, self._trainer.loss

        def total(
            weights: dict[str, Tensor],
            inputs: dict[str, Tensor],
            present: dict[str, Tensor],
            target: Tensor,
            mask: Tensor,
        ) -> Tensor:
            outputs = functional_call(model, weights, (Batch(inputs, present, target),))
            return (loss(outputs, target) * mask).sum()

        def alone(
            weights: dict[str, Tensor],
            inputs: dict[str, Tensor],
            present: dict[str, Tensor],
            target: Tensor,
            mask: Tensor,
        ) -> Tensor:
            return total(
                weights,
                {name: x.unsqueeze(0) for name, x in inputs.items()},
                {name: x.unsqueeze(0) for name, x in present.items()},
                target.unsqueeze(0),
                torch.ones_like(mask).unsqueeze(0),
            )

        if by_record:
            return vmap(vmap(grad(alone), in_dims=(None, 0, 0, 0, 0)))
        return vmap(grad(total))


def _by_record(job: Job) -> bool:
    return job.mechanism is not None and job.mechanism.unit is Unit.RECORD


def _rows(member: Member, job: Job) -> Iterator[NDArray[np.int64]]:
    """The records of a member's steps: drawn at the mechanism's rate, or one after the other."""
    count = len(member.records)
    if job.mechanism is not None and _by_record(job):
        stream = NoiseStream(member.secret, "sampling")
        return poisson_batches(count, job.mechanism.sample_rate, job.steps, stream)
    return shuffled_batches(count, job.batch_size, job.steps, NoiseStream(member.secret, "order"))


def _factors(
    grads: Sequence[Tensor], mask: Tensor, parts: Sequence[Sequence[int]], bounds: Tensor
) -> Tensor:
    """(P, K, b): min(1, C_p / norm) by part, and 0 for rows that are no record, and for records
    that are broken in any part, whose numbers become zeros in `grads`.

    grads  by parameter (K, b, n); mask (K, b); bounds (P,)
    """
    norms = torch.stack([lengths(x) for x in grads])
    by_part = torch.stack([torch.linalg.vector_norm(norms[part], dim=0) for part in parts])
    factors = clip_factors(by_part, bounds[:, None, None])
    sound = factors.gt(0).all(0) & (mask > 0)
    if not bool((sound | (mask == 0)).all()):
        for x in grads:
            x[~sound] = 0
    return torch.where(sound, factors, 0.0)


def _pile(batches: Sequence[Batch], rows: slice, device: torch.device) -> tuple[Pile, Tensor]:
    """Some rows of all batches, filled up with zeros; and (K, b) 1 where there is a record."""
    size = rows.stop - rows.start

    def whole(parts: list[Tensor]) -> Tensor:
        out = parts[0].new_zeros((len(parts), size, *parts[0].shape[1:]))
        for k, part in enumerate(parts):
            out[k, : len(part)] = part
        return out.to(device)

    names = list(batches[0].inputs)
    mask = torch.zeros(len(batches), size)
    for k, batch in enumerate(batches):
        mask[k, : max(0, min(len(batch), rows.stop) - rows.start)] = 1
    pile = (
        {name: whole([batch.inputs[name][rows] for batch in batches]) for name in names},
        {name: whole([batch.present[name][rows] for batch in batches]) for name in names},
        whole([batch.target[rows] for batch in batches]),
    )
    return pile, mask.to(device)
