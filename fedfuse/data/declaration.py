"""What a data set says about itself: `dataset.toml` or `dataset.json` beside the manifest.

Everything in it is public. Modalities are told in free text ("png L 28x28", "wav 8kHz mono int16",
"npy float32 (64,6)", "inline") or as a table (``kind = "vector", shape = [12], mean = [...]``).
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfuse.batch import Kind, TargetKind
from fedfuse.data.kinds import KINDS
from fedfuse.data.table import TableColumn
from fedfuse.errors import DataError

__all__ = ["Declaration", "DeclaredModality", "find_declaration", "read_declaration"]

_TASKS = {  # the more special word of a text goes first: "ordinal regression"
    "multi-label": TargetKind.MULTILABEL,
    "multilabel": TargetKind.MULTILABEL,
    "tags": TargetKind.MULTILABEL,
    "ordinal": TargetKind.ORDINAL,
    "ordered": TargetKind.ORDINAL,
    "classification": TargetKind.CLASSIFICATION,
    "multiclass": TargetKind.CLASSIFICATION,
    "multi-class": TargetKind.CLASSIFICATION,
    "binary": TargetKind.CLASSIFICATION,
    "class": TargetKind.CLASSIFICATION,
    "regression": TargetKind.REGRESSION,
    "continuous": TargetKind.REGRESSION,
    "real": TargetKind.REGRESSION,
    "score": TargetKind.REGRESSION,
}
_USED = {
    "name", "task", "classes", "class_names", "labels", "num_classes", "modalities", "target",
    "target_range", "target_mean", "target_std", "target_min", "target_max", "label_range",
    "label_mean", "label_std", "label_min", "label_max", "range", "description", "license",
    "source", "version", "client", "manifests", "priors", "class_priors", "label_priors",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredModality:
    """What is said of one modality; 0, () and None mean: not said."""

    name: str
    kind: Kind | None = None
    shape: tuple[int, ...] = ()
    image_size: int = 0
    channels: int = 0
    sample_rate: int = 0
    seconds: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()
    inner: tuple[TableColumn, ...] = ()
    """Of a table: what is said of single columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What is said of a data set. `classes` are names in index order."""

    path: Path
    name: str = ""
    task: TargetKind | None = None
    classes: tuple[str, ...] = ()
    num_classes: int = 0
    target_column: str = ""
    centre: float | None = None
    scale: float | None = None
    span: tuple[float, ...] = ()
    """(lowest, highest) of a real target, where a range is declared."""
    priors: tuple[float, ...] = ()
    """The public share of each class or label, in the order of `classes`."""
    modalities: Mapping[str, DeclaredModality] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def find_declaration(folder: Path) -> Path | None:
    """The declaration in `folder`, TOML before JSON, or None."""
    for name in ("dataset.toml", "dataset.json"):
        if (folder / name).is_file():
            return folder / name
    return None


def read_declaration(path: Path) -> Declaration:
    """The declaration at `path`. Raises DataError where it cannot be understood."""
    tree = _parse(path)
    classes = _classes(tree, path)
    target = tree.get("target")
    facts = dict(target) if isinstance(target, Mapping) else {}
    for key in ("range", "mean", "std", "min", "max"):
        for name in (f"label_{key}", f"target_{key}"):
            if name in tree:
                facts[key] = tree[name]
    if "range" in tree:
        facts.setdefault("range", tree["range"])
    mean, std = _mean_std(facts, path, "target")
    num_classes = tree.get("num_classes", 0)
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
        raise DataError("num_classes must be a whole number", where=str(path))
    if classes and num_classes and len(classes) != num_classes:
        raise DataError(
            f"num_classes = {num_classes}, but {len(classes)} classes are named",
            where=str(path),
            hint="make the two agree, or leave num_classes out",
        )
    return Declaration(
        path=path,
        name=str(tree.get("name", "")),
        task=_task(tree.get("task"), path),
        classes=classes,
        num_classes=num_classes or len(classes),
        target_column=_target_column(target),
        centre=mean[0] if mean else None,
        scale=std[0] if std else None,
        span=_span(facts),
        priors=_priors(tree, classes, num_classes, path),
        modalities=_modalities(tree.get("modalities", {}), path),
        unused=tuple(sorted(set(tree) - _USED)),
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), hint="mend it") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"cannot be read ({type(error).__name__})", where=str(path), hint="must be UTF-8 text"
        ) from None
    if not isinstance(tree, dict):
        raise DataError("must hold named fields", where=str(path), hint="see docs: dataset.toml")
    return tree


def _task(value: Any, path: Path) -> TargetKind | None:
    if value is None or value == "":
        return None
    words = re.findall(r"[a-z]+(?:-[a-z]+)*", str(value).lower().replace("_", "-"))
    for name, kind in _TASKS.items():
        if any(word == name or word.endswith(f"-{name}") for word in words):
            return kind
    raise DataError(
        f"task = {str(value)!r} is not known",
        where=str(path),
        hint='task = "classification", "multi-label", "ordinal" or "regression"',
    )


def _classes(tree: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    value = tree.get("classes", tree.get("class_names", tree.get("labels", ())))
    if isinstance(value, Mapping):  # {"0": "no", "1": "yes"}
        try:
            value = [value[key] for key in sorted(value, key=int)]
        except ValueError:
            value = list(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = range(value)
    elif not isinstance(value, list | tuple):
        raise DataError("classes must be a list of names", where=str(path))
    names = tuple(str(name) for name in value)
    if len(set(names)) != len(names):
        raise DataError("classes names one class twice", where=str(path))
    return names


def _priors(
    tree: Mapping[str, Any], classes: tuple[str, ...], count: int, path: Path
) -> tuple[float, ...]:
    """The declared shares, by place or by name. () where there are none."""
    value = next((tree[k] for k in ("priors", "class_priors", "label_priors") if k in tree), ())
    try:
        if isinstance(value, Mapping):
            if set(map(str, value)) != set(classes):
                raise ValueError
            value = [value[name] for name in classes]
        shares = tuple(float(share) for share in value)
        if shares and (
            len(shares) != (len(classes) or count) or not all(0 < s < 1 for s in shares)
        ):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            "priors cannot be understood",
            where=str(path),
            hint="a share between 0 and 1 for each class: priors = [0.7, 0.3], or by name",
        ) from None
    return shares


def _span(facts: Mapping[str, Any]) -> tuple[float, ...]:
    """(lowest, highest) where `facts` have a range; `_mean_std` has checked it."""
    if "mean" in facts and "std" in facts and "range" not in facts:
        return ()
    if "range" in facts:
        low, high = facts["range"]
    elif "min" in facts and "max" in facts:
        low, high = facts["min"], facts["max"]
    else:
        return ()
    return (_floats(low)[0], _floats(high)[0])


def _target_column(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, Mapping):
        return str(target.get("column", target.get("name", "")))
    return ""


def _modalities(value: Any, path: Path) -> dict[str, DeclaredModality]:
    if isinstance(value, list | tuple):
        entries: dict[str, Any] = {}
        for item in value:
            name = str(item.get("name", "")) if isinstance(item, Mapping) else str(item)
            entries[name] = item if isinstance(item, Mapping) else ""
        value = entries
    if not isinstance(value, Mapping):
        raise DataError("modalities must be a table", where=str(path))
    return {str(name): _modality(str(name), said, path) for name, said in value.items()}


def _modality(name: str, said: Any, path: Path) -> DeclaredModality:
    if not isinstance(said, Mapping):
        return _from_text(name, str(said))
    text = " ".join(
        str(said[key])
        for key in ("kind", "type", "format", "description", "modality")
        if isinstance(said.get(key), str)
    )
    told = _from_text(name, text)
    shape = said.get("shape", told.shape)
    if isinstance(shape, int):
        shape = (shape,)
    size = said.get("image_size", said.get("size", told.image_size))
    mean, std = _mean_std(said, path, name)
    columns = said.get("columns", ())
    facts = columns if isinstance(columns, Mapping) else {}
    if "categories" in said:
        facts = {**facts, name: {"categories": said["categories"]}}
    try:
        shape = tuple(int(n) for n in shape)
        kind = told.kind
        if kind is None and facts:
            kind = Kind.TABLE
        if kind is None and len(shape) in (1, 2) and "sample_rate" not in said:
            kind = Kind.VECTOR if len(shape) == 1 else Kind.SERIES
        return DeclaredModality(
            name=name,
            kind=kind,
            shape=shape,
            image_size=int(size if isinstance(size, int | float) else max(size)),
            channels=int(said.get("channels", told.channels)),
            sample_rate=int(said.get("sample_rate", said.get("rate", told.sample_rate))),
            seconds=float(said.get("seconds", said.get("duration", told.seconds))),
            mean=mean,
            std=std,
            columns=tuple(str(column) for column in columns),
            inner=tuple(_column(str(column), about, path) for column, about in facts.items()),
        )
    except (TypeError, ValueError):
        raise DataError(
            f"modalities.{name} cannot be understood",
            where=str(path),
            hint='for example {kind = "vector", shape = [12], range = [0, 1]}',
        ) from None


def _column(name: str, said: Any, path: Path) -> TableColumn:
    """A column of a table: `{range = [0, 120]}`, `{mean = 60, std = 20}` or `{categories = [...]}`.

    Raises DataError, also where it says nothing that can be used.
    """
    facts = said if isinstance(said, Mapping) else {}
    categories = facts.get("categories", ())
    mean, std = _mean_std(facts, path, name)
    named = isinstance(categories, list | tuple)
    if not named or len(set(map(str, categories))) != len(categories) or len(mean) > 1:
        raise DataError(
            f"column {name} cannot be understood",
            where=str(path),
            hint='for example {range = [0, 120]} or {categories = ["a", "b"]}',
        )
    return TableColumn(
        name=name,
        categories=tuple(map(str, categories)),
        mean=mean[0] if mean else 0.0,
        std=std[0] if std else 0.0,
    )


_TABLE = re.compile(r"\b(table|tabular|categor\w*)\b")
_DIMS = re.compile(r"\b([12])\s*-?\s*d\b")
_SHAPE = re.compile(r"[(\[]\s*(\d+(?:\s*[,x×]\s*\d+)*)\s*,?\s*[)\]]")
_SIZE = re.compile(r"(\d+)\s*[x×]\s*(\d+)")
_WIDTH = re.compile(r"\b(\d+)\s*-?\s*(?:d|dims?|dimension\w*|features?|values|numbers|floats?)\b")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(k?)hz")
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|sec|secs|seconds?)\b")


def _from_text(name: str, text: str) -> DeclaredModality:
    """What can be read out of free text; whatever cannot is left unsaid."""
    text = text.lower()
    shape = _shape(text)
    kind = _kind(name.lower(), text, shape)
    pictures = kind in (Kind.IMAGE, Kind.VIDEO)
    size = _SIZE.search(text) if pictures else None
    rate = _RATE.search(text) if kind is Kind.AUDIO else None
    seconds = _SECONDS.search(text) if kind is Kind.AUDIO else None
    channels = 0
    if pictures:
        if re.search(r"\b(rgba?|colou?r)\b", text):
            channels = 3
        elif re.search(r"\b(l|gr[ae]y\w*|monochrome)\b", text):
            channels = 1
    return DeclaredModality(
        name=name,
        kind=kind,
        shape=shape if kind in (Kind.VECTOR, Kind.SERIES, Kind.TABLE, None) else (),
        image_size=max(int(size[1]), int(size[2])) if size else 0,
        channels=channels,
        sample_rate=round(float(rate[1]) * (1000 if rate[2] else 1)) if rate else 0,
        seconds=float(seconds[1]) * (0.001 if seconds[2] == "ms" else 1) if seconds else 0.0,
    )


def _shape(text: str) -> tuple[int, ...]:
    found = _SHAPE.search(text)
    if found:
        return tuple(int(n) for n in re.findall(r"\d+", found[1]))
    width = _WIDTH.search(_DIMS.sub(" ", text))  # "1-D" is no length
    return (int(width[1]),) if width else ()


def _kind(name: str, text: str, shape: tuple[int, ...]) -> Kind | None:
    """The kind that `text` tells. File types first: an .npy of audio features is a vector."""
    suffixes = {f".{word}" for word in re.findall(r"\w+", text)} - {".txt"}
    for kind, decoder in KINDS.items():
        if suffixes & decoder.suffixes:
            return kind
    if _TABLE.search(text) or name in ("table", "tabular"):
        return Kind.TABLE
    if "npy" in text or "numpy" in text:
        if re.search(r"\bnan\b", text):
            return Kind.TABLE
        dims = _DIMS.search(text)
        return {1: Kind.VECTOR, 2: Kind.SERIES}.get(len(shape) or int(dims[1] if dims else 0))
    for kind, words in (
        (Kind.SERIES, r"time.?series|series|sensor|imu|sequence"),
        (Kind.VECTOR, r"vectors?|embeddings?|features?"),
        (Kind.VIDEO, r"videos?|films?"),
        (Kind.IMAGE, r"images?|pictures?|photos?"),
        (Kind.AUDIO, r"audio|sounds?|speech"),
    ):
        if re.search(rf"\b({words})\b", text):
            return kind
    if re.search(r"\b(numbers?|numeric\w*|floats?\d*|ints?\d*|integers?|scalars?)\b", text):
        return None  # the cells tell: one number each is a table, many a vector
    for kind in Kind:
        if re.search(rf"\b{kind}\b", text):
            return kind
    if re.search(r"\b(text|inline|strings?|sentences?|notes?|words?|questions?)\b", text):
        return Kind.TEXT
    return None


def _mean_std(
    said: Mapping[str, Any], path: Path, name: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Declared centre and spread; a range [lo, hi] becomes its middle and half its width."""
    try:
        if "mean" in said and "std" in said:
            mean, std = _floats(said["mean"]), _floats(said["std"])
        elif "range" in said or ("min" in said and "max" in said):
            low, high = said["range"] if "range" in said else (said["min"], said["max"])
            lows, highs = _floats(low), _floats(high)
            mean = tuple((b + a) / 2 for a, b in zip(lows, highs, strict=True))
            std = tuple((b - a) / 2 for a, b in zip(lows, highs, strict=True))
        else:
            return (), ()
        if len(mean) != len(std) or not mean:
            raise ValueError
        if not all(
            math.isfinite(m) and math.isfinite(s) and s >= 0 for m, s in zip(mean, std, strict=True)
        ):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"{name}: mean and std, or range, cannot be understood",
            where=str(path),
            hint="mean = 3.0, std = 1.5 or range = [0, 6]; one number, or one for each feature",
        ) from None
    return mean, tuple(s if s > 0 else 1.0 for s in std)


def _floats(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(float(v) for v in value)
    return (float(value),)
