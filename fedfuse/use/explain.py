"""Why a model says what it says of a record: which modalities counted, and what within each.

Everything is computed on this machine, of one record at a time; other records of the manifest only
serve as what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.batch import Batch, Target, TargetKind
from fedfuse.conformal import likeliest
from fedfuse.data.reading import Unlabelled, read_records
from fedfuse.errors import UsageError
from fedfuse.models.answer import answer
from fedfuse.models.fusion.graph import GraphFusion
from fedfuse.use import shapley
from fedfuse.use.attribution import Attribution, attribute, check_captum, repeated
from fedfuse.use.predict import decided
from fedfuse.use.trained import Trained

__all__ = ["Explained", "Explanation", "Swap", "explain"]

_POOL = 64
"""The first so many records of the manifest serve as others."""
_OTHERS = 4
"""How many of them each record is compared with."""
_ORDERS = 100
_CONCEPTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """What happens where a modality is another record's."""

    change: float
    """Of what is explained, on average."""
    turned: float
    """The share of the others with which the prediction becomes another one."""
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One record's. Modalities that are absent from it have no part in anything."""

    number: int
    line: int
    id: str
    prediction: Any
    explained: str
    """What the figures are of, such as 'probability of "leak"'."""
    value: float
    base: float
    """The same where no modality is there: `shapley` sums to value - base."""
    shapley: Mapping[str, float]
    errors: Mapping[str, float]
    """Standard errors of `shapley` where orders were drawn; empty where it is exact."""
    absent: Mapping[str, float]
    """How `value` changes where one modality is absent."""
    swapped: Mapping[str, Swap]
    within: Mapping[str, Attribution]
    concepts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of a knowledge graph: by modality the concepts that it is nearest to, with their shares."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "number": self.number,
            "line": self.line,
            "id": self.id,
            "prediction": self.prediction,
            "explained": self.explained,
            "value": self.value,
            "base": self.base,
            "shapley": dict(self.shapley),
            "shapley_errors": dict(self.errors),
            "change_where_absent": dict(self.absent),
            "change_where_swapped": {
                name: {"change": one.change, "turned": one.turned, "others": one.others}
                for name, one in self.swapped.items()
            },
            "within": {
                name: {
                    "shape": list(one.values.shape),
                    "attributions": one.values.tolist(),
                    "moved": one.moved,
                    "gap": one.gap,
                    "baselines": one.baselines,
                }
                for name, one in self.within.items()
            },
            "concepts": {name: dict(one) for name, one in self.concepts.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Some records' explanations, and what they have in common."""

    records: Unlabelled
    explanations: tuple[Explanation, ...]
    training: str
    exact: bool
    """Whether Shapley values are exact; else `Explanation.errors` says how far they may be off."""

    def importance(self) -> dict[str, tuple[float, int]]:
        """By modality: the mean |Shapley value| over the records that have it, and how many."""
        found: dict[str, tuple[float, int]] = {}
        for name in self.records.dataset.schema.names:
            values = [abs(one.shapley[name]) for one in self.explanations if name in one.shapley]
            found[name] = (float(np.mean(values)) if values else 0.0, len(values))
        return found


def explain(
    trained: Trained, manifest: Path, *, records: int = 8, of: str = "", skip_bad: bool = False
) -> Explained:
    """The explanations of the first `records` records of `manifest`.

    of  a class or label; "" explains what is predicted (of labels: the likeliest)

    Explained is the probability of that class or label; of ordered classes the expected place among
    them; of numbers the value in its own units.

    Raises DataError as `read_records` does; UsageError where `of` is none of the classes;
    ModelError where captum is not installed.
    """
    check_captum()
    target = trained.reading.target
    if of and (of not in target.classes or target.kind is TargetKind.ORDINAL):
        raise UsageError(
            f"{of!r} is no class that can be explained alone",
            hint=", ".join(target.classes)
            if target.kind in (TargetKind.CLASSIFICATION, TargetKind.MULTILABEL)
            else "leave --of out: the target is one number",
        )
    found = read_records(trained.reading, manifest, skip_bad=skip_bad)
    count = min(records, len(found.dataset))
    pool = found.dataset.batch(np.arange(min(_POOL, len(found.dataset))))
    explanations = tuple(
        _explanation(trained, found, number, _without(pool, number), of) for number in range(count)
    )
    return Explained(
        records=found,
        explanations=explanations,
        training=trained.statement,
        exact=not any(one.errors for one in explanations),
    )


def _explanation(
    trained: Trained, found: Unlabelled, number: int, pool: Batch, of: str
) -> Explanation:
    model, reading = trained.model, trained.reading
    target, names = reading.target, reading.schema.names
    record = found.dataset.batch(np.array([number]))
    row = found.rows[number]
    with torch.no_grad():
        told = answer(model(record).float(), target)
    explained, quantity = _quantity(told, target, of)

    def said(batch: Batch) -> Tensor:
        return quantity(answer(model(batch).float(), target))

    there = [name for name in names if bool(record.present[name])]
    value = partial(_value, said, record, there)
    errors: dict[str, float] = {}
    if len(there) <= shapley.MOST_EXACT:
        shares = shapley.exact(value(shapley.coalitions(len(there))))
    else:
        shares, spread = shapley.sampled(value, len(there), _ORDERS, np.random.default_rng(0))
        errors = dict(zip(there, spread.tolist(), strict=True))
    everything = np.ones((1, len(there)), dtype=bool)
    whole, nothing = float(value(everything)[0]), float(value(~everything)[0])
    left_out = value(~np.eye(len(there), dtype=bool)) - whole
    kinds = {m.name: m.kind for m in reading.schema.modalities}
    return Explanation(
        number=number + 1,
        line=row.line,
        id=row.cells["id"],
        prediction=decided(told[0].numpy(), target),
        explained=explained,
        value=whole,
        base=nothing,
        shapley=dict(zip(there, shares.tolist(), strict=True)),
        errors=errors,
        absent=dict(zip(there, left_out.tolist(), strict=True)),
        swapped=_swapped(trained, said, record, there, pool, whole),
        within={
            name: attribute(model, said, record, name, kinds[name], _having(pool, name))
            for name in there
        },
        concepts=_concepts(trained, record, there),
    )


def _quantity(told: Tensor, target: Target, of: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What is explained of a record, in words, and as a function of (B, C) answers."""
    match target.kind:
        case TargetKind.REGRESSION:
            return "value", lambda p: p[:, 0]
        case TargetKind.ORDINAL:
            places = torch.arange(len(target.classes), dtype=told.dtype)
            first, last = target.classes[0], target.classes[-1]
            words = f'expected place from "{first}" (0) to "{last}" ({len(target.classes) - 1})'
            return words, lambda p: (p * places).sum(1)
        case _:
            place = (
                target.classes.index(of)
                if of
                else int(likeliest(TargetKind.CLASSIFICATION, told.double().numpy())[0])
            )
            return f'probability of "{target.classes[place]}"', lambda p: p[:, place]


def _value(
    said: Callable[[Batch], Tensor], record: Batch, there: list[str], rows: shapley.Coalitions
) -> shapley.Array:
    """(S, K) coalitions of the modalities that are there -> (S,), what is said of each."""
    batch = repeated(record, len(rows))
    present = dict(batch.present)
    for place, name in enumerate(there):
        present[name] = torch.from_numpy(np.ascontiguousarray(rows[:, place]))
    with torch.no_grad():
        return said(replace(batch, present=present)).double().numpy()


def _swapped(
    trained: Trained,
    said: Callable[[Batch], Tensor],
    record: Batch,
    there: list[str],
    pool: Batch,
    whole: float,
) -> dict[str, Swap]:
    target, found = trained.reading.target, {}
    before = decided(trained.tell(record)[1][0], target)
    for name in there:
        others = _having(pool, name).inputs[name]
        if not len(others):
            continue
        batch = repeated(record, len(others))
        batch = replace(batch, inputs={**batch.inputs, name: others})
        with torch.no_grad():
            change = float(said(batch).double().mean()) - whole
        after = [decided(told, target) for told in trained.tell(batch)[1]]
        # A number becomes another with every change, so none is said to turn.
        turned = float(np.mean([one != before for one in after])) if target.classes else 0.0
        found[name] = Swap(change=change, turned=turned, others=len(others))
    return found


def _concepts(trained: Trained, record: Batch, there: list[str]) -> dict[str, dict[str, float]]:
    fusion = trained.model.fusion
    if not isinstance(fusion, GraphFusion):
        return {}
    kept: list[tuple[Tensor, Tensor]] = []
    hook = fusion.register_forward_pre_hook(lambda module, given: kept.append(given))
    try:
        with torch.no_grad():
            trained.model(record)
            z, seen = kept[0]
            concepts = fusion.concepts.weight.unsqueeze(0)
            near = fusion.nearness(z, seen, concepts)[0].numpy()
    finally:
        hook.remove()
    found = {}
    for name in there:
        shares = near[trained.model.names.index(name)]
        best = np.argsort(-shares)[:_CONCEPTS]
        found[name] = {trained.concepts[k]: float(shares[k]) for k in best}
    return found


def _having(pool: Batch, name: str) -> Batch:
    """The first few records of `pool` that have the modality `name`."""
    return pool[torch.nonzero(pool.present[name]).flatten()[:_OTHERS]]


def _without(pool: Batch, number: int) -> Batch:
    """`pool` without the record `number`, the next ones first."""
    count = len(pool)
    order = (
        [k % count for k in range(number + 1, number + count)] if number < count else range(count)
    )
    return pool[torch.tensor(list(order), dtype=torch.int64)]
