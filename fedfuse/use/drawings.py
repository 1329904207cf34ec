"""Pictures of explanations, as PNG: what each modality adds, and what counted within each."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Kind
from fedfuse.use.explain import Explained, Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Content", "draw_record", "draw_summary"]

FOR, AGAINST = "#0B6BCB", "#B3261E"
_MOST_BARS = 24
_ACROSS = 3
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a record has of one modality, for its panel."""

    kind: Kind
    values: Array
    """As the model gets it."""
    names: Sequence[str] = ()
    """Of its parts, where they have any: words, columns."""


def draw_record(one: Explanation, contents: Mapping[str, Content]) -> bytes:
    """A picture of a record: `contents` are its modalities, in order."""
    panels = 1 + len(one.within)
    across = min(_ACROSS, panels)
    down = -(-panels // across)

    def fill(figure: Figure) -> None:
        axes = figure.subplots(down, across, squeeze=False).ravel()
        title = f"what each modality adds to the {one.explained}"
        _bars(axes[0], "\n".join(textwrap.wrap(title, 40)), one.shapley, errors=one.errors)
        for place, (name, within) in enumerate(one.within.items(), 1):
            content = contents[name]
            axes[place].set_title(f"{name}: {one.shapley[name]:+.3g}", fontsize=10)
            _within(axes[place], content, within.values)
        for empty in axes[panels:]:
            empty.set_axis_off()

    return _png((4.4 * across, 3.3 * down), fill)


def draw_summary(found: Explained) -> bytes:
    """The mean |Shapley value| of each modality, over the records that have it."""
    importance = found.importance()
    labels = {f"{name} (n = {count})": value for name, (value, count) in importance.items()}

    def fill(figure: Figure) -> None:
        _bars(figure.subplots(), "mean |Shapley value|", labels, errors={})

    return _png((6.4, 1.2 + 0.42 * len(labels)), fill)


def _within(axes: Axes, content: Content, values: Array) -> None:
    match content.kind:
        case Kind.AUDIO:
            _map(axes, values, origin="lower")
            axes.set_xlabel("frame")
            axes.set_ylabel("band")
        case Kind.SERIES:
            _map(axes, values.T, origin="lower")
            axes.set_xlabel("time step")
            axes.set_ylabel("channel")
        case Kind.TABLE:
            half = len(values) // 2
            _parts(axes, values[:half] + values[half:], content.names)
        case _ if values.ndim == 1:
            _parts(axes, values, content.names)
        case _:  # pictures, and whatever else has more than one axis
            heat, back = values, content.values
            while heat.ndim > 2:
                heat, back = heat.sum(0), back.mean(0)
            axes.imshow(back, cmap="gray", interpolation="nearest")
            _map(axes, heat, origin="upper", alpha=0.6)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])


def _map(axes: Axes, heat: Array, *, origin: str, alpha: float = 1.0) -> None:
    """Blue speaks for, red against."""
    from matplotlib.ticker import MaxNLocator

    end = float(np.abs(heat).max()) or 1.0
    axes.imshow(
        heat, cmap="RdBu", vmin=-end, vmax=end, alpha=alpha, aspect="auto",
        interpolation="nearest", origin=origin,  # type: ignore[arg-type]
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _parts(axes: Axes, values: Array, names: Sequence[str]) -> None:
    """A bar for each part: of words in their order, of numbers those that count most."""
    if names:
        values = values[: len(names)]
    labels = [names[k] if k < len(names) else str(k + 1) for k in range(len(values))]
    kept = np.sort(np.argsort(-np.abs(values), kind="stable")[:_MOST_BARS])
    _bars(
        axes, axes.get_title(), {f"{labels[k]}\u200b{k}": float(values[k]) for k in kept}, errors={}
    )


def _bars(
    axes: Axes, title: str, values: Mapping[str, float], *, errors: Mapping[str, float]
) -> None:
    places = np.arange(len(values))
    heights = list(values.values())
    colours = [FOR if value >= 0 else AGAINST for value in heights]
    spread = [errors[name] for name in values] if errors else None
    axes.barh(places, heights, height=0.6, color=colours, xerr=spread)
    axes.set_ylim(-0.6, max(2, len(values) - 1) + 0.6)  # a single bar does not fill the panel
    axes.set_yticks(places, [_label(name) for name in values], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#374151", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(name: str) -> str:
    """A part's name as a picture shows it: without the number that makes repeats differ."""
    shown = name.partition("\u200b")[0].replace("$", r"\$")
    return shown if len(shown) <= 28 else f"{shown[:27]}…"


def _png(size: tuple[float, float], fill: Callable[[Figure], None]) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": "sans-serif", "savefig.facecolor": "white"}):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
