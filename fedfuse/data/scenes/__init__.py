"""Data sets made on the spot, by the names of `spec.DEMOS`: the machine inspections of `demo.py`,
and one for each scenario of `simulations/` that needs other shapes."""

from __future__ import annotations

from pathlib import Path

from fedfuse.data.demo import make_demo
from fedfuse.data.scenes import (
    interactive,
    medical,
    multimedia,
    recommendation,
    security,
    sentiment,
)
from fedfuse.data.scenes.scene import Scene, make_scene

__all__ = ["SCENES", "make"]

SCENES: dict[str, Scene] = {
    "multimedia": multimedia.SCENE,
    "interactive": interactive.SCENE,
    "medical": medical.SCENE,
    "security": security.SCENE,
    "recommendation": recommendation.SCENE,
    "sentiment": sentiment.SCENE,
}


def make(name: str, folder: Path, *, records: int = 0, clients: int = 0, seed: int = 0) -> Path:
    """Writes the data set `name`, one of `spec.DEMOS`, into `folder`; its manifest's path.

    records, clients  0: as many as the data set is meant to have
    """
    if name == "inspection":
        return make_demo(folder, records=records or 2400, clients=clients or 6, seed=seed)
    scene = SCENES[name]
    return make_scene(
        scene,
        folder,
        records=records or scene.records,
        clients=clients or scene.clients,
        seed=seed,
    )
