"""The picture of a plan: epsilon by round, what is allowed, and what one more round would cost.

Torch-free; matplotlib is loaded when the picture is drawn. One plan gives the same bytes each time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.errors import FedfuseError, PrivacyError
from fedfuse.privacy.planner import Plan, figure
from fedfuse.reports.curves import GREEN, ORANGE, RED, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_plan"]

METADATA: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}
"""What would differ from one drawing to the next."""


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture to `path`, a .png or .svg.

    Raises PrivacyError where epsilon is not finite, FedfuseError where `path` can't be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not math.isfinite(plan.spent_next):
        raise PrivacyError("epsilon is not finite, so there is nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
        FigureCanvasAgg(figure)
        _draw(figure.subplots(), plan)
        try:
            figure.savefig(path, metadata=METADATA[path.suffix.lower()])
        except OSError as error:
            raise FedfuseError(
                f"cannot be written: {error.strerror}", where=str(path), hint="check the folder"
            ) from None


def _draw(axes: Axes, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator

    terms = plan.terms
    rounds = [0, *(number for number, _ in plan.by_round)]
    spent = [0.0, *(epsilon for _, epsilon in plan.by_round)]
    # In steps: between two points epsilon is at most that of the later one, never the chord's.
    axes.plot(rounds, spent, color=GREEN, drawstyle="steps-pre")
    axes.fill_between(rounds, spent, step="pre", color=GREEN, alpha=0.12, linewidth=0)
    axes.axhline(terms.epsilon, color=RED, linestyle=(0, (4, 3)), linewidth=1.5)
    axes.annotate(
        f"allowed: ε = {terms.epsilon:g}",
        xy=(0, terms.epsilon),
        xycoords=("axes fraction", "data"),
        xytext=(6, 4),
        textcoords="offset points",
        color=RED,
        fontsize=9,
    )
    extra, last = terms.rounds + 1, (terms.rounds, plan.spent)
    axes.plot(
        [last[0], last[0], extra],
        [last[1], plan.spent_next, plan.spent_next],
        color=ORANGE,
        linestyle=":",
        linewidth=1.5,
    )
    axes.plot([extra], [plan.spent_next], color=ORANGE, marker="D", markersize=7, linestyle="")
    axes.annotate(
        f"one more round: {figure(plan.spent_next)}",
        xy=(extra, plan.spent_next),
        xytext=(2, 8),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
    )
    axes.set_xlabel("round")
    axes.set_ylabel(f"ε at δ = {terms.delta:g}, for one {terms.unit}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0, extra + max(0.5, extra * 0.03))
    axes.set_ylim(0, max(terms.epsilon, plan.spent_next) * 1.12)
    rounds_in_words = f"{terms.rounds} round{'' if terms.rounds == 1 else 's'}"
    title = f"plan: ε = {figure(plan.spent)} of {terms.epsilon:g} after {rounds_in_words}"
    if plan.kept:
        axes.set_title(f"{title}, σ = {terms.sigma:g}")
    else:
        axes.set_title(f"{title}: NODES REFUSE σ = {terms.sigma:g}", color=RED)
