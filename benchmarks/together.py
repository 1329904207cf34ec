"""A federated run in one process: the nodes' own training code and the same rounds, without an
engine, books or a run folder around it, so that many settings can be compared on a small machine.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfuse.config import RunConfig
from fedfuse.data.prepare import Prepared
from fedfuse.evaluate import evaluate
from fedfuse.federation.node import new_trainer
from fedfuse.federation.rounds import job_of
from fedfuse.federation.settle import settle
from fedfuse.models.cost import Cost, cost_of
from fedfuse.stacked import Member, Stacked, together
from fedfuse.tasks import Task
from fedfuse.train import Records

__all__ = ["Found", "federated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Figures on each set of records that was asked for, and the model's cost."""

    figures: dict[str, dict[str, float]]
    cost: Cost


def federated(config: RunConfig, prepared: Prepared, sets: Mapping[str, Records]) -> Found:
    """FedAvg with equal weights over all nodes, as `config` says; the last model's figures."""
    sizes = [len(shard.rows) for shard in prepared.shards]
    settled = settle(config, mean_records=sum(sizes) / len(sizes), mean_subjects=0)
    config = settled.config
    trainer = new_trainer(config, prepared.schema)
    task = Task.of(prepared.schema.target, config.model)
    nodes = [prepared.node(number) for number in range(len(prepared.shards))]
    weights, stack = trainer.weights(), Stacked(trainer)
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    for round in range(1, config.train.rounds + 1):
        job = job_of(config, settled.mechanism, round)
        updates = []
        size = together(job, count, len(nodes)) if stack.takes(nodes[0], job) else 1
        for first in range(0, len(nodes), size):
            members = [
                Member(records=node, weights=weights, secret=secrets.token_bytes(32))
                for node in nodes[first : first + size]
            ]
            if size > 1:
                updates += [ended for _, ended in stack.run(members, job)]
                continue
            trainer.load(weights)
            trainer.run(members[0].records, job, secret=members[0].secret)
            updates.append(trainer.weights())
        weights = {
            name: np.mean([update[name] for update in updates], axis=0, dtype=np.float64).astype(
                value.dtype
            )
            for name, value in weights.items()
        }
    trainer.load(weights)
    return Found(
        figures={
            name: evaluate(trainer.model, records, task, device=trainer.device)
            for name, records in sets.items()
        },
        cost=cost_of(trainer.model, prepared.schema)["all"],
    )
