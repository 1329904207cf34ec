"""What a made data set is: hidden factors, what each modality shows of them, what is predicted."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Factors", "Rng", "Scene", "Shown", "make_scene", "pick"]

Rng = np.random.Generator
Factors = NDArray[np.float64]
"""(H,): of one record, in -1 to 1. A hidden bit is -1 or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One modality: what it shows of a record's factors."""

    show: Callable[[Factors, Path, Rng], Sequence[str]]
    """Writes what it needs under the given path, which lacks its suffix; the cells, in which a file
    is named by its suffix alone: ".png"."""
    columns: tuple[str, ...] = ()
    """Of the manifest; without any it is one, by the modality's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A made data set, whose clients differ in size, in how common each factor is, and in what
    they lack."""

    about: str
    factors: tuple[str, ...]
    modalities: Mapping[str, Shown]
    target: Callable[[Factors], str]
    declaration: str
    """dataset.toml."""
    records: int = 1200
    clients: int = 4
    bits: bool = True
    """Whether factors are bits; otherwise they are real numbers."""
    subjects: int = 0
    """Persons behind the records; those of test are seen nowhere else. 0: each record its own."""
    lacking: float = 0.1
    """The share of records that lack a modality, for each; the last client lacks half of one."""
    unclear: Mapping[str, float] = field(default_factory=dict)
    """The share of records of which a modality shows factors of chance."""


def make_scene(scene: Scene, folder: Path, *, records: int, clients: int, seed: int) -> Path:
    """Writes the data set into `folder`; its manifest's path. The same arguments give the same
    records. Three quarters are train, 5 % valid, 20 % test."""
    rng = np.random.default_rng(seed)
    shares = np.linspace(1.5, 0.7, clients)
    owner = rng.choice(clients, size=records, p=shares / shares.sum())
    factors = _factors(scene, owner, clients, rng)
    subjects = owner + clients * rng.integers(0, max(1, scene.subjects // clients), records)
    splits = _splits(subjects if scene.subjects else np.arange(records), rng)
    present = _present(scene, owner == clients - 1, rng)
    for name in scene.modalities:
        (folder / name).mkdir(parents=True, exist_ok=True)
    columns = [c for name, m in scene.modalities.items() for c in m.columns or (name,)]
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        person = ("subject",) if scene.subjects else ()
        writer.writerow(("id", "split", "client", *person, "label", *columns))
        for i in range(records):
            name, cells = f"r{i:05d}", []
            for k, (modality, shown) in enumerate(scene.modalities.items()):
                if not present[i, k]:
                    cells += [""] * max(1, len(shown.columns))
                    continue
                other = rng.random() < scene.unclear.get(modality, 0.0)
                seen = factors[rng.integers(records) if other else i]
                found = shown.show(seen, folder / modality / name, rng)
                cells += [f"{modality}/{name}{c}" if c.startswith(".") else c for c in found]
            person = (f"person-{subjects[i] + 1}",) if scene.subjects else ()
            label = scene.target(factors[i])
            writer.writerow((name, splits[i], f"site-{owner[i] + 1}", *person, label, *cells))
    (folder / "dataset.toml").write_text(scene.declaration, encoding="utf-8")
    (folder / "README.md").write_text(_readme(folder.name, scene), encoding="utf-8")
    return path


def pick(phrases: Sequence[str], rng: Rng) -> str:
    """One of them."""
    return phrases[int(rng.integers(len(phrases)))]


def _factors(scene: Scene, owner: NDArray[np.int64], clients: int, rng: Rng) -> Factors:
    """(N, H): of each client some factors are commoner than of others."""
    count = len(scene.factors)
    common = rng.beta(4, 4, (clients, count))[owner]
    if scene.bits:
        return np.where(rng.random(common.shape) < common, 1.0, -1.0)
    return np.clip(rng.normal(common - 0.5, 0.5), -1, 1)


def _splits(units: NDArray[np.int64], rng: Rng) -> list[str]:
    """Of each record; all records of a unit are in the same."""
    names = np.unique(units)
    rank = rng.permutation(len(names))[np.searchsorted(names, units)] / len(names)
    return ["test" if r < 0.2 else "valid" if r < 0.25 else "train" for r in rank]


def _present(scene: Scene, last: NDArray[np.bool_], rng: Rng) -> NDArray[np.bool_]:
    """(N, M): never none. The last client lacks half of its second modality."""
    present = rng.random((len(last), len(scene.modalities))) >= scene.lacking
    present[:, 1] &= ~(last & (rng.random(len(last)) < 0.5))
    present[~present.any(axis=1), 0] = True
    return present


def _readme(name: str, scene: Scene) -> str:
    return (
        f"# {name}\n\n{scene.about}\n\nMade by `fedfuse data demo`; no real data. A blank cell is "
        "a missing modality; each\nmodality shows a part of what the label depends on. "
        "`manifest.csv` has a row for each record,\n`dataset.toml` what every site may know.\n"
    )
