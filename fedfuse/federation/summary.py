"""The outcome of a run, as plain values: what was learned, and what was promised and kept."""

from __future__ import annotations

import math
from typing import Any

from fedfuse import __version__
from fedfuse.federation import spending
from fedfuse.federation.session import Session
from fedfuse.privacy import accounting

__all__ = ["NOT_PRIVATE", "summarise"]

NOT_PRIVATE = (
    "NOT PRIVATE: nothing is promised about any record; updates leave the nodes as they are."
)


def summarise(
    session: Session,
    *,
    status: str,
    assumptions: tuple[str, ...],
    notes: tuple[str, ...],
    fingerprint: str = "",
    problem: str = "",
) -> dict[str, Any]:
    """`status` is "finished", "interrupted" or "failed"."""
    task, config = session.task, session.config
    metrics = {
        name: value if math.isfinite(value) else None
        for name, value in session.final_metrics().items()
    }
    return {
        "status": status,
        **({"problem": problem} if problem else {}),
        "name": config.name,
        "fedfuse": __version__,
        "engine": config.federation.engine,
        "strategy": config.federation.strategy,
        "device": session.device,
        "nodes": len(session.nodes) or len(session.names),
        "rounds": config.train.rounds,
        "rounds_done": session.done,
        "parameters": session.parameters,
        "headline": {
            "name": task.headline,
            "value": metrics.get(task.headline),
            "higher_is_better": task.higher_is_better,
        },
        "majority": task.baseline(session.test.labels),
        "metrics": metrics,
        "privacy": _privacy(session),
        "data_fingerprint": fingerprint,
        "assumptions": list(assumptions),
        "notes": list(notes),
        "seconds": round(session.seconds, 3),
    }


def _privacy(session: Session) -> dict[str, Any]:
    """What was promised and what was spent. Where nothing is promised there is no number."""
    mechanism, privacy = session.mechanism, session.config.privacy
    if mechanism is None:
        return {"private": False, "unit": "none", "statement": NOT_PRIVATE}
    delta = privacy.delta
    nodes = spending.by_node(session.events)
    spent = spending.epsilons(nodes, delta)
    most = max(spent.values(), default=0.0)
    largest = max(nodes.values(), key=lambda past: sum(m.steps for m in past), default=())
    rdp = max((accounting.epsilon_rdp(past, delta) for past in set(nodes.values())), default=0.0)
    opacus = max(
        (accounting.epsilon_opacus(past, delta) for past in set(nodes.values())), default=0.0
    )
    return {
        "private": True,
        "statement": (
            f"({accounting.shown(most)}, {delta:g})-differential privacy for one "
            f"{mechanism.unit.value} added to or removed from any one node's training data, "
            "against the server, the other nodes and whoever gets the model."
        ),
        "unit": mechanism.unit.value,
        "neighbouring_relation": "add or remove one record",
        "delta": delta,
        "epsilon_allowed": privacy.epsilon,
        "epsilon_server": most,
        "epsilon_model": most,
        "epsilon_model_why": "post-processing of the updates; no amplification is claimed",
        "epsilon_by_node": spent,
        "epsilon_rdp": rdp,
        "epsilon_opacus": opacus,
        "sigma": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "steps": sum(m.steps for m in largest),
        "steps_per_round": mechanism.steps,
        "clip_norm": mechanism.clip_norm,
        "declared_records": privacy.declared_records,
        "accountant": {
            "name": "PLD (dp-accounting), pessimistic",
            "version": _version("dp-accounting"),
            "grid": accounting.STATEMENT_GRID,
        },
        "noise_source": (
            "seeded: removable by whoever knows the seed"
            if privacy.noise_seed
            else "operating system"
        ),
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
