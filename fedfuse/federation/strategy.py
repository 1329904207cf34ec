"""Flower's strategies, guarded: only what the protocol allows reaches them.

Left alone, a Flower strategy lets one reply with other names end the run, takes NaN and negative
weights, adds in the order in which replies happen to come, turns float32 into float64, and keeps
the old weights without a word when every node fails. The guard checks each reply as it comes, folds
it into a sum that no order changes, restores types, and names who failed and why. Flower's strategy
then goes on from the one mean, as from a single node's update; the strategies that rank updates
(trimmed-mean, median) get all of them, sorted by node name.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
)

from fedfuse.config import FederationConfig
from fedfuse.errors import FederationError, WireError
from fedfuse.federation.flower import GridView
from fedfuse.federation.gathering import (
    ByMean,
    Everything,
    Fold,
    Gathering,
    Mean,
    RunningMean,
    in_type,
)
from fedfuse.federation.wire import (
    WEIGHT,
    Template,
    TrainReply,
    TrainRequest,
    Weights,
    decode,
    encode,
)

__all__ = ["Aggregate", "GuardedStrategy", "Mean", "build_strategy"]

Inner = FedAvg
_NEED_ALL = (FedMedian, FedTrimmedAvg)
"""What cannot be had from a running sum: these keep every update of a round in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """A round's outcome: the new weights, the replies that made them, and who failed why."""

    weights: Weights
    replies: dict[int, TrainReply]
    """All well-formed replies by sender, also those of nodes that refused or failed, without
    their arrays."""
    failures: dict[str, str]


def build_strategy(federation: FederationConfig, private: bool) -> GuardedStrategy:
    """The strategy that `federation` names. `private`: replies must all have weight 1."""
    common = {
        "fraction_train": 1.0,  # the guard draws the nodes itself, so that a seed repeats it
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "weighted_by_key": WEIGHT,
    }
    adaptive = common | {
        "eta": federation.server_learning_rate or 0.01,
        "beta_1": federation.server_momentum,
        "tau": federation.tau,
    }
    inner: Inner
    match federation.strategy:
        case "fedavg":
            inner = FedAvg(**common)  # type: ignore[arg-type]
        case "fedprox":
            inner = FedProx(proximal_mu=federation.proximal_mu, **common)  # type: ignore[arg-type]
        case "fedavgm":
            inner = FedAvgM(
                server_learning_rate=federation.server_learning_rate or 1.0,
                server_momentum=federation.server_momentum,
                **common,  # type: ignore[arg-type]
            )
        case "fedadam":
            inner = FedAdam(**adaptive)  # type: ignore[arg-type]
        case "fedyogi":
            inner = FedYogi(**adaptive)  # type: ignore[arg-type]
        case "trimmed-mean":
            inner = FedTrimmedAvg(beta=federation.trim, **common)  # type: ignore[arg-type]
        case "median":
            inner = FedMedian(**common)  # type: ignore[arg-type]
        case name:
            raise FederationError(f"strategy = {name!r} is unknown", where="federation")
    return GuardedStrategy(
        inner,
        fraction=federation.fraction,
        min_nodes=federation.min_nodes,
        counts=federation.weighting == "examples" and not private,
    )


class GuardedStrategy:
    """One of Flower's strategies behind the guard."""

    def __init__(self, inner: Inner, *, fraction: float, min_nodes: int, counts: bool) -> None:
        self._inner = inner
        self._fraction = fraction
        self._min_nodes = min_nodes
        self._counts = counts

    def configure_train(self, request: TrainRequest, grid: Grid, *, seed: int) -> list[Message]:
        """One message for each node drawn; which ones follows from `seed` and the round."""
        nodes = sorted(grid.get_node_ids())
        count = max(self._min_nodes, round(self._fraction * len(nodes)), 1)
        if len(nodes) < count:
            raise FederationError(
                f"{len(nodes)} nodes are connected, but {count} are needed",
                where=f"round {request.round}",
                hint="start more nodes, or lower federation.min_nodes",
            )
        drawn = random.Random(f"nodes {seed} {request.round}").sample(nodes, count)
        record = request.to_record()
        messages = self._inner.configure_train(
            request.round,
            record.array_records["arrays"],
            record.config_records["config"],
            GridView(grid, sorted(drawn)),
        )
        return sorted(messages, key=lambda message: message.metadata.dst_node_id)

    def gather(
        self,
        request: TrainRequest,
        *,
        asked: dict[int, str],
        template: Template,
        known: Mapping[int, str] | None = None,
        mean: Mean | None = None,
        masked: Fold | None = None,
    ) -> Gathering:
        """What takes the replies to `request`, one by one.

        `asked`: what to call each node that was asked. `known`: the names that nodes answered by
        before. `mean`: makes one model of the updates before Flower's strategy goes on from it
        (unit "node"). `masked`: takes updates that only their sum tells something of; `template` is
        then that of a masked update.
        """
        fold: Fold
        if masked is not None:
            fold = masked
        elif mean is not None:
            fold = ByMean(mean)
        elif isinstance(self._inner, _NEED_ALL):
            fold = Everything()
        else:
            fold = RunningMean(template)
        return Gathering(
            request,
            fold,
            asked=asked,
            known=known or {},
            template=template,
            counts=self._counts,
        )

    def conclude(self, gathering: Gathering, *, template: Template) -> Aggregate:
        """The new weights, once no more replies come.

        Raises FederationError where fewer than min_nodes replies are good, naming the failures.
        """
        gathering.close()
        round = gathering.request.round
        if gathering.good < self._min_nodes:
            raise FederationError(
                f"{gathering.good} of {len(gathering.asked)} nodes gave a good update, but "
                f"{self._min_nodes} are needed{_told(gathering.failures)}",
                where=f"round {round}",
                hint="see the nodes' own logs; nothing of the rounds before is lost",
            )
        updates = [_message(*update) for update in gathering.fold.updates()]
        arrays, _ = self._inner.aggregate_train(round, updates)
        if arrays is None:
            raise FederationError("aggregation gave nothing", where=f"round {round}")
        return Aggregate(
            weights=_restored(arrays, template),
            replies=gathering.replies,
            failures=gathering.failures,
        )

    def aggregate_train(
        self,
        request: TrainRequest,
        replies: Iterable[Message],
        *,
        asked: dict[int, str],
        template: Template,
        known: Mapping[int, str] | None = None,
        mean: Mean | None = None,
    ) -> Aggregate:
        """`gather`, all of `replies`, and `conclude`."""
        gathering = self.gather(request, asked=asked, template=template, known=known, mean=mean)
        for message in replies:
            gathering.take(message)
        return self.conclude(gathering, template=template)

    def state(self) -> dict[str, np.ndarray]:
        """The strategy's own arrays, by name: what a checkpoint needs beside the weights."""
        arrays: dict[str, np.ndarray] = {}
        for name in ("m_t", "v_t", "current_arrays"):
            value = getattr(self._inner, name, None)
            if isinstance(value, ArrayRecord):
                value = {key: array.numpy() for key, array in value.items()}
            arrays |= {f"{name}/{key}": array for key, array in (value or {}).items()}
        momentum = getattr(self._inner, "momentum_vector", None) or []
        return arrays | {f"momentum_vector/{i:06d}": array for i, array in enumerate(momentum)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Puts back what `state` gave."""
        groups: dict[str, dict[str, np.ndarray]] = {}
        for name in sorted(arrays):
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = arrays[name]
        inner = self._inner
        if isinstance(inner, FedAdam | FedYogi):
            inner.m_t, inner.v_t = groups.get("m_t"), groups.get("v_t")
            inner.current_arrays = groups.get("current_arrays")
        elif isinstance(inner, FedAvgM):
            inner.current_arrays = (
                ArrayRecord({k: Array(v) for k, v in groups["current_arrays"].items()})
                if "current_arrays" in groups
                else None
            )
            vector = groups.get("momentum_vector")
            inner.momentum_vector = list(vector.values()) if vector else None


def _message(weights: Weights, weight: float) -> Message:
    """A message for the strategy: it may take arrays out of it, and never sees another record.

    Sorted by name, as `encode` does: some strategies pair arrays by their place alone.
    """
    metrics = MetricRecord({WEIGHT: weight})
    return GridView.reply(RecordDict({"arrays": encode(weights), "metrics": metrics}))


def _restored(arrays: ArrayRecord, template: Template) -> Weights:
    """The aggregate in the model's own types. Raises FederationError if it is not finite."""
    weights = {}
    for name, (shape, dtype) in template.items():
        weights[name] = in_type(arrays[name].numpy(), dtype).reshape(shape)
    try:
        return decode(encode(weights), template)
    except WireError as error:
        raise FederationError(
            f"the aggregate cannot be used: {error.what}",
            where="federation.strategy",
            hint="lower federation.server_learning_rate",
        ) from None


def _told(failures: dict[str, str]) -> str:
    """The failures, the first few of them, as the end of a sentence."""
    if not failures:
        return ""
    shown = [f"{name}: {why}" for name, why in list(failures.items())[:5]]
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    return f" ({'; '.join(shown)}{more})"
