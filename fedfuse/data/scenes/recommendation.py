"""Recommendation: what somebody did lately, what an article says, and a table about both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfuse.data.scenes.files import save_array
from fedfuse.data.scenes.scene import Factors, Rng, Scene, Shown, pick

__all__ = ["SCENE"]

STEPS = 30
OFFER = ("price", "rating", "stock", "hour")
_GOOD = ("made to last, well rated by friends", "the one that everybody asks for", "simply lovely",
         "better than its successor", "worth every minute")  # fmt: skip
_POOR = ("returned by many", "a copy of last year's", "feels cheap in the hand",
         "sent back twice", "not what the picture shows")  # fmt: skip
_ASIDE = ("ships in two days", "available in blue", "limited to two each", "also as a gift card")


def _rating(f: Factors) -> str:
    """One to four stars: how many of the three speak for it, and one."""
    return str(1 + int((f > 0).sum()))


def _behaviour(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Clicks, seconds and pages of the last visits: there is interest and it grows, or it fades."""
    way = (1 if f[0] > 0 else -1) * np.linspace(0, 1, STEPS)
    clicks = rng.poisson(np.exp(1.0 + 0.9 * way))
    seconds = np.exp(2.5 + 0.7 * way + rng.normal(0, 0.5, STEPS))
    pages = rng.poisson(2.0, STEPS)
    return (save_array(path, np.stack([clicks, seconds, pages], 1)),)


def _text(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    parts = [pick(_GOOD if f[1] > 0 else _POOR, rng), pick(_ASIDE, rng)]
    return (", ".join(parts[k] for k in rng.permutation(2)),)


def _offer(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """A low price and a good mean rating, or not; stock and hour tell nothing. Some are blank."""
    values = (
        np.exp(rng.normal(3.0 if f[2] > 0 else 4.2, 0.4)),
        np.clip(rng.normal(4.3 if f[2] > 0 else 3.0, 0.5), 1, 5),
        rng.integers(0, 100),
        rng.integers(0, 24),
    )
    return tuple("" if rng.random() < 0.1 else f"{value:.1f}" for value in values)


SCENE = Scene(
    about="Ratings that people give articles of four shops: behaviour, description, offer.",
    factors=("interest", "quality", "price"),
    modalities={
        "behaviour": Shown(show=_behaviour),
        "text": Shown(show=_text),
        "table": Shown(show=_offer, columns=OFFER),
    },
    target=_rating,
    records=1600,
    unclear={"behaviour": 0.05, "text": 0.05, "table": 0.05},
    declaration=f"""\
name = "recommendation"
task = "ordinal"
classes = ["1", "2", "3", "4"]

[modalities]
behaviour = {{ kind = "series", shape = [{STEPS}, 3], mean = [3, 14, 2], std = [3, 12, 1.5] }}
text = "inline sentence"

[modalities.table]
kind = "table"
columns = {list(OFFER)!r}
mean = [45, 3.7, 50, 12]
std = [30, 0.8, 29, 7]
""",
)
