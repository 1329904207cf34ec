from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfuse.batch import Kind, Modality, Schema, Target, TargetKind
from fedfuse.data.dataset import Column, Dataset
from fedfuse.data.partition import DEFAULT_NODES, partition
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError


def records(count: int, *, regression: bool = False, clients: int = 3) -> Dataset:
    """Records with two present vectors, and classes 0, 1, 2 in turn."""
    kind = TargetKind.REGRESSION if regression else TargetKind.CLASSIFICATION
    modalities = tuple(Modality(name=name, kind=Kind.VECTOR, shape=(1,)) for name in "uv")
    column = Column(np.ones((count, 1), np.float32), np.arange(count))
    target = np.linspace(-1, 1, count, dtype=np.float32) if regression else np.arange(count) % 3
    names = np.array([str(i) for i in range(count)], dtype=np.str_)
    owners = np.array([f"c{i % clients}" for i in range(count)], dtype=np.str_)
    schema = Schema(modalities=modalities, target=Target(kind=kind, classes=("a", "b", "c")))
    return Dataset(schema, {"u": column, "v": column}, target, names, owners, names)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    count=st.integers(1, 120),
    nodes=st.integers(1, 12),
    how=st.sampled_from(["client", "iid", "dirichlet", "quantity", "modality"]),
    alpha=st.sampled_from([0.01, 0.5, 100.0]),
    regression=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_no_record_is_lost_or_given_twice(
    count: int, nodes: int, how: str, alpha: float, regression: bool, seed: int
) -> None:
    dataset = records(count, regression=regression, clients=nodes)
    config = DataConfig(partition=how, nodes=min(nodes, count), alpha=alpha)
    shards = partition(dataset, config, seed)
    rows = np.concatenate([shard.rows for shard in shards])
    assert np.sort(rows).tolist() == list(range(count))
    assert all(len(shard.rows) and len(shard.absent) < 2 for shard in shards)
    assert len({shard.name for shard in shards}) == len(shards)
    again = partition(dataset, config, seed)
    assert [shard.rows.tolist() for shard in again] == [shard.rows.tolist() for shard in shards]


def test_clients_are_nodes_and_the_first_may_be_kept() -> None:
    shards = partition(records(9), DataConfig(), 0)
    assert [(s.name, s.rows.tolist()) for s in shards] == [
        ("c0", [0, 3, 6]), ("c1", [1, 4, 7]), ("c2", [2, 5, 8]),
    ]  # fmt: skip
    assert [s.name for s in partition(records(9), DataConfig(nodes=2), 0)] == ["c0", "c1"]
    assert len(partition(records(9), DataConfig(nodes=50), 0)) == 3


def test_iid_shares_are_equal_and_random() -> None:
    shards = partition(records(100), DataConfig(partition="iid"), 0)
    assert len(shards) == DEFAULT_NODES
    assert {len(shard.rows) for shard in shards} == {12, 13}
    assert (
        shards[0].rows.tolist()
        != partition(records(100), DataConfig(partition="iid"), 1)[0].rows.tolist()
    )


@pytest.mark.parametrize("regression", [False, True])
def test_a_small_alpha_skews_the_labels(regression: bool) -> None:
    dataset = records(3000, regression=regression)

    def skew(alpha: float) -> float:
        config = DataConfig(partition="dirichlet", nodes=6, alpha=alpha)
        shards = partition(dataset, config, 0)
        label = np.digitize(dataset.labels, [-0.4, 0.4]) if regression else dataset.labels
        shares = [np.bincount(label[s.rows], minlength=3) / len(s.rows) for s in shards]
        return float(np.std(shares, axis=0).mean())

    assert skew(0.1) > 3 * skew(100.0)


def test_quantity_skew_makes_unequal_nodes() -> None:
    sizes = [len(s.rows) for s in partition(records(1000), DataConfig(partition="quantity"), 0)]
    assert max(sizes) > 3 * min(sizes)


def test_modality_skew_takes_whole_modalities() -> None:
    config = DataConfig(partition="modality", nodes=20, modality_keep=0.5)
    dataset = records(100)
    shards = partition(dataset, config, 0)
    lacking = [shard for shard in shards if shard.absent]
    assert 5 <= len(lacking) < 20
    batch = dataset.take(lacking[0].rows, absent=lacking[0].absent).batch(np.arange(3))
    (gone,) = lacking[0].absent
    assert not batch.present[gone].any()
    assert (batch.inputs[gone] == 0).all()


def test_more_nodes_than_records_are_refused() -> None:
    with pytest.raises(DataError, match="9 nodes, but only 8"):
        partition(records(8), DataConfig(partition="iid", nodes=9), 0)


@pytest.fixture
def without_flwr_datasets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    return


@pytest.mark.usefixtures("without_flwr_datasets")
def test_flwr_datasets_is_only_needed_for_simulated_skew() -> None:
    assert partition(records(9), DataConfig(), 0)
    with pytest.raises(DataError, match="flwr-datasets") as error:
        partition(records(9), DataConfig(partition="dirichlet", nodes=2), 0)
    assert "pip install fedfuse[partition]" in str(error.value)
