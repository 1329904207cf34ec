"""The curves of a run: how the model got better (`metrics`), and what that spent (`privacy`).

Torch-free; matplotlib is loaded when the first curve is drawn. One run folder gives the same bytes
each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.privacy.accounting import shown
from fedfuse.runfolder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["load", "write_curves"]

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#C4221B", "#6B7280"

SHARES = ("accuracy", "balanced_accuracy", "macro_f1")
"""Metrics from 0 to 1, drawn on that whole scale, so that two runs can be laid side by side."""

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#1F2937",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E7EB",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#1F2937",
    "ytick.labelcolor": "#1F2937",
    "lines.linewidth": 2,
    "svg.hashsalt": "fedfuse",
    "svg.fonttype": "path",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The numbers behind the pictures, one entry a round."""

    name: str
    private: bool
    unit: str
    delta: float
    epsilon_allowed: float
    rounds: tuple[int, ...]
    metrics: dict[str, tuple[float, ...]]
    epsilon: tuple[float, ...]
    headline: str
    baseline: float | None
    """The headline of the best constant answer."""


def load() -> None:
    """Loads matplotlib, which the first curve would do otherwise."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


def write_curves(run: Path) -> tuple[Path, ...]:
    """Draw `plots/metrics` and `plots/privacy`, each as PNG and SVG; returns the files.

    A run that was stopped is drawn as far as it came; without a finished round nothing is written.

    Raises RunFolderError where the folder holds no run.
    """
    curves = _read(run)
    if not curves.rounds:
        return ()
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    for name, draw in (("metrics", _metrics), ("privacy", _privacy)):
        with _figure() as figure:
            draw(figure, curves)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}.{kind}"
                figure.savefig(path, metadata=metadata)
                paths.append(path)
    return tuple(paths)


def _read(run: Path) -> Curves:
    folder = RunFolder.open(run)
    config, lines, summary = folder.config(), folder.metrics(), folder.summary() or {}
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    headline = summary.get("headline", {})
    others = [name for name in names if name != "loss"]
    return Curves(
        name=config.name,
        private=folder.promises(),
        unit=config.privacy.unit,
        delta=config.privacy.delta,
        epsilon_allowed=config.privacy.epsilon,
        rounds=tuple(line["round"] for line in lines),
        metrics={
            name: tuple(_number(line["metrics"].get(name)) for line in lines) for name in names
        },
        epsilon=tuple(_number(line.get("epsilon")) for line in lines),
        headline=headline.get("name") or (others or ["loss"])[0],
        baseline=summary.get("majority"),
    )


def _number(value: float | None) -> float:
    """`value`, or NaN, which leaves a gap, where it is absent or no number."""
    return value if value is not None and math.isfinite(value) else math.nan


@contextmanager
def _figure() -> Iterator[Figure]:
    """An empty figure in the house style; closed afterwards, and no window system is touched."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
        FigureCanvasAgg(figure)
        yield figure


def _metrics(figure: Figure, curves: Curves) -> None:
    """The headline metric above, the loss below, over the same rounds."""
    shown = [name for name in dict.fromkeys((curves.headline, "loss")) if name in curves.metrics]
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, colour in zip(panels, shown, (BLUE, ORANGE), strict=False):
        values = curves.metrics[name]
        _line(axes, curves.rounds, values, colour)
        axes.set_ylabel(_label(name))
        if name in SHARES:
            axes.set_ylim(0, 1.03)
        if name == curves.headline and curves.baseline is not None:
            axes.axhline(curves.baseline, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
            _note(axes, curves.baseline, "the best constant answer", GREY)
    last = curves.metrics[shown[0]][-1]
    title = f"{curves.name}: {_words(shown[0])} {last:.3f}"
    panels[0].set_title(title if curves.private else f"{title}, NOT PRIVATE")
    _round_axis(panels[-1], curves.rounds)


def _privacy(figure: Figure, curves: Curves) -> None:
    """Epsilon after each round against what is allowed, or NOT PRIVATE across the whole picture."""
    axes = figure.subplots()
    _round_axis(axes, curves.rounds)
    axes.set_ylabel(f"ε at δ = {curves.delta:g}, for one {curves.unit}")
    if not curves.private:
        axes.set_ylabel("ε is unbounded")
        axes.set_title(f"{curves.name}: NOT PRIVATE", color=RED)
        axes.set_yticks([])
        axes.set_ylim(0, 1)
        axes.grid(visible=False)
        axes.text(
            0.5,
            0.55,
            "NOT PRIVATE",
            transform=axes.transAxes,
            ha="center",
            va="center",
            fontsize=46,
            fontweight="bold",
            color=RED,
        )
        axes.text(
            0.5,
            0.4,
            'privacy.unit = "none": nothing in this run is protected',
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=RED,
        )
        return
    spent = curves.epsilon
    _line(axes, curves.rounds, spent, GREEN)
    axes.fill_between(curves.rounds, spent, color=GREEN, alpha=0.12, linewidth=0)
    axes.axhline(curves.epsilon_allowed, color=RED, linestyle=(0, (4, 3)), linewidth=1.5)
    _note(axes, curves.epsilon_allowed, f"allowed: ε = {curves.epsilon_allowed:g}", RED)
    seen = [value for value in spent if math.isfinite(value)]
    axes.set_ylim(0, max([curves.epsilon_allowed, *seen]) * 1.12)
    axes.set_title(f"{curves.name}: ε = {shown(spent[-1])} of {curves.epsilon_allowed:g} spent")


def _line(axes: Axes, rounds: tuple[int, ...], values: Any, colour: str) -> None:
    marker = "o" if len(rounds) <= 40 else ""
    axes.plot(rounds, values, color=colour, marker=marker, markersize=4)


def _note(axes: Axes, height: float, text: str, colour: str) -> None:
    """A few words on a horizontal line, at its right end."""
    axes.annotate(
        text,
        xy=(1, height),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=colour,
        fontsize=9,
    )


def _round_axis(axes: Axes, rounds: tuple[int, ...]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)


def _label(name: str) -> str:
    """A metric's name with its unit, as an axis shows it."""
    if name in SHARES:
        return f"{_words(name)} (0 to 1)"
    return f"{_words(name)} (mean per test record)" if name == "loss" else _words(name)


def _words(name: str) -> str:
    return "mean absolute error" if name == "mae" else name.replace("_", " ")
