"""What a record looks like (`Schema`), and a batch of records (`Batch`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Batch", "Kind", "Modality", "Schema", "Target", "TargetKind"]


class Kind(StrEnum):
    """What a modality is, and so how it is decoded and encoded."""

    IMAGE = "image"
    """(C, H, W) float32 in [0, 1]."""
    AUDIO = "audio"
    """(n_mels, frames) float32 log-mel spectrogram, or its cepstrum: each record to mean 0 and
    deviation 1 by its own frames, 0 after its end. For pretrained encoders (samples,) float32, the
    waveform."""
    VIDEO = "video"
    """(T, C, H, W) float32 in [0, 1]: T frames, evenly over the record."""
    TEXT = "text"
    """(L,) int64 token ids, 0 is padding."""
    SERIES = "series"
    """(T, F) float32 sensor readings."""
    VECTOR = "vector"
    """(F,) float32 features."""
    TABLE = "table"
    """(2F,) float32: F values (0 where missing), then F flags (1 where missing)."""


class TargetKind(StrEnum):
    """What is predicted."""

    CLASSIFICATION = "classification"
    """One of C classes: target (B,) int64. Two classes are a binary task."""
    MULTILABEL = "multi-label"
    """Any of C labels: target (B, C) float32, 1 where a label holds and 0 where not."""
    ORDINAL = "ordinal"
    """One of C classes in an order: target (B,) int64."""
    REGRESSION = "regression"
    """A real number: target (B,) float32, scaled to public units (see `Target`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One modality: its name, its kind, and the public shape of one record of it."""

    name: str
    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is predicted, with the public facts about it.

    For regression the model works on ``(y - centre) / scale``, both of them public numbers.
    """

    kind: TargetKind
    classes: tuple[str, ...] = ()
    centre: float = 0.0
    scale: float = 1.0
    priors: tuple[float, ...] = ()
    """The declared share of each class or label; () where nothing is declared. Never counted."""
    span: tuple[float, ...] = ()
    """The declared (lowest, highest) of a regression target, in its own units; or ()."""

    @property
    def outputs(self) -> int:
        """The number of outputs of the model's head: an ordinal target has C - 1 thresholds."""
        match self.kind:
            case TargetKind.CLASSIFICATION | TargetKind.MULTILABEL:
                return len(self.classes)
            case TargetKind.ORDINAL:
                return len(self.classes) - 1
            case TargetKind.REGRESSION:
                return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What every node must agree on: the modalities, in order, and the target. All public."""

    modalities: tuple[Modality, ...]
    target: Target

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Schema:
        """The schema of which `dataclasses.asdict` gave `tree`, also after JSON or TOML.

        Raises KeyError, TypeError or ValueError where it is no schema's.
        """
        target = tree["target"]
        return cls(
            modalities=tuple(
                Modality(name=m["name"], kind=Kind(m["kind"]), shape=tuple(m["shape"]))
                for m in tree["modalities"]
            ),
            target=Target(
                kind=TargetKind(target["kind"]),
                classes=tuple(target["classes"]),
                centre=float(target["centre"]),
                scale=float(target["scale"]),
                priors=tuple(map(float, target.get("priors", ()))),
                span=tuple(map(float, target.get("span", ()))),
            ),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities' names, in order."""
        return tuple(modality.name for modality in self.modalities)


@dataclass(frozen=True, slots=True)
class Batch:
    """B records, B may be 0.

    An absent modality is a zero row with ``present = False``, never a dropped row, so that row i
    is record i in every tensor.

    inputs[m]: (B, *shape_m), finite. present[m]: (B,) bool. target: (B,), or (B, C)
    of labels.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    target: Tensor

    def __len__(self) -> int:
        return int(self.target.shape[0])

    def blank(self, rows: int) -> Batch:
        """So many records of the same shapes that have every modality, and zeros in all."""
        return Batch(
            {name: x.new_zeros((rows, *x.shape[1:])) for name, x in self.inputs.items()},
            {name: x.new_ones(rows) for name, x in self.present.items()},
            self.target.new_zeros((rows, *self.target.shape[1:])),
        )

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        """The records of `rows`."""
        return Batch(
            {name: value[rows] for name, value in self.inputs.items()},
            {name: value[rows] for name, value in self.present.items()},
            self.target[rows],
        )

    def to(self, device: torch.device) -> Batch:
        """The same records on `device`."""
        return Batch(
            {name: value.to(device) for name, value in self.inputs.items()},
            {name: value.to(device) for name, value in self.present.items()},
            self.target.to(device),
        )
