"""How the train records become nodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfuse.batch import TargetKind
from fedfuse.data.dataset import Dataset, Rows
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError

__all__ = ["DEFAULT_NODES", "NodeShard", "partition"]

DEFAULT_NODES = 8
"""Nodes of a simulated partition where the number is left at 0."""


@dataclass(frozen=True, slots=True)
class NodeShard:
    """One node: its name, its rows of the train split, the modalities that it lacks altogether."""

    name: str
    rows: Rows
    absent: tuple[str, ...] = ()


def partition(dataset: Dataset, config: DataConfig, seed: int) -> tuple[NodeShard, ...]:
    """The nodes of `dataset`; rows ascend, and no record is lost or given twice.

    - "client": the manifest's clients by name; config.nodes > 0 keeps the first so many.
    - "iid": equal shares at random.
    - "dirichlet": label skew as in Hsu et al. 2019 (arXiv:1909.06335), in the form of
      flwr-datasets: for each label the nodes' shares are drawn from Dirichlet(alpha). Continuous
      targets are cut into ten equally filled labels first; a set of labels counts as one label.
    - "quantity": shares of unequal size, drawn from Dirichlet(alpha), at least one record each.
    - "modality": equal shares, and each node keeps a modality with chance config.modality_keep,
      but always at least one.

    A Dirichlet node may get no record, then it is left out. Raises DataError where there are more
    nodes than records, or flwr-datasets is not installed.
    """
    if config.partition == "client":
        return _by_client(dataset, config.nodes)
    nodes = config.nodes or DEFAULT_NODES
    if nodes > len(dataset):
        raise DataError(
            f"{nodes} nodes, but only {len(dataset)} train records",
            hint=f"set data.nodes to at most {len(dataset)}",
        )
    rng = np.random.default_rng([seed, 0x5EED])
    split = {
        "iid": _iid,
        "dirichlet": _dirichlet,
        "quantity": _quantity,
        "modality": _iid,
    }.get(config.partition)
    if split is None:
        raise DataError(f"partition {config.partition!r} is unknown", hint="take iid or dirichlet")
    shares = split(dataset, nodes, config.alpha, rng)
    lacks: list[tuple[str, ...]] = [()] * nodes
    if config.partition == "modality":
        lacks = [_lacking(dataset.schema.names, config.modality_keep, rng) for _ in range(nodes)]
    width = len(str(nodes - 1))
    return tuple(
        NodeShard(f"node-{k:0{width}d}", np.sort(rows), absent)
        for k, (rows, absent) in enumerate(zip(shares, lacks, strict=True))
        if len(rows)
    )


def _by_client(dataset: Dataset, nodes: int) -> tuple[NodeShard, ...]:
    names, owner = np.unique(dataset.clients, return_inverse=True)
    kept = len(names) if nodes == 0 else min(nodes, len(names))
    return tuple(
        NodeShard(str(names[k]), np.flatnonzero(owner == k).astype(np.int64)) for k in range(kept)
    )


def _iid(dataset: Dataset, nodes: int, alpha: float, rng: np.random.Generator) -> list[Rows]:
    """As flwr-datasets' IidPartitioner, which loads pandas, matplotlib and more for it."""
    order = rng.permutation(len(dataset)).astype(np.int64)
    return [np.array(share) for share in np.array_split(order, nodes)]


def _quantity(dataset: Dataset, nodes: int, alpha: float, rng: np.random.Generator) -> list[Rows]:
    flwr = _flwr_partitioners()
    spare = len(dataset) - nodes
    sizes = 1 + rng.multinomial(spare, rng.dirichlet(np.full(nodes, alpha)))
    order = rng.permutation(len(dataset))
    return _apply(flwr.SizePartitioner(partition_sizes=sizes.tolist()), {"row": order}, nodes)


def _dirichlet(dataset: Dataset, nodes: int, alpha: float, rng: np.random.Generator) -> list[Rows]:
    flwr = _flwr_partitioners()
    labels = np.asarray(dataset.labels)
    if dataset.schema.target.kind is TargetKind.REGRESSION:
        labels = np.argsort(np.argsort(labels, kind="stable")) * 10 // len(labels)
    elif labels.ndim > 1:
        labels = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    order = rng.permutation(len(dataset))
    table = {"row": order, "label": labels[order]}

    def split(least: int) -> list[Rows]:
        seed = int(rng.integers(2**31))
        return _apply(
            flwr.DirichletPartitioner(
                nodes, partition_by="label", alpha=alpha, min_partition_size=least, seed=seed
            ),
            table,
            nodes,
        )

    try:
        return split(1)
    except ValueError:  # ten draws left some node without a record: so be it
        return split(0)


def _lacking(names: tuple[str, ...], keep: float, rng: np.random.Generator) -> tuple[str, ...]:
    kept = rng.random(len(names)) < keep
    if not kept.any():
        kept[rng.integers(len(names))] = True
    return tuple(name for name, has in zip(names, kept, strict=True) if not has)


def _apply(partitioner: Any, table: dict[str, Any], nodes: int) -> list[Rows]:
    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each Dirichlet draw that it repeats
        partitioner.dataset = datasets.Dataset.from_dict(table)
        load: Callable[[int], Any] = partitioner.load_partition
        return [np.array(load(k)["row"], dtype=np.int64).reshape(-1) for k in range(nodes)]


def _flwr_partitioners() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import flwr_datasets.partitioner
    except ImportError:
        raise DataError(
            "this partition needs flwr-datasets, which is not installed",
            hint="pip install fedfuse[partition]",
        ) from None
    return flwr_datasets.partitioner
