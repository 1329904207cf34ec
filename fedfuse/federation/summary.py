"""The outcome of a run, as plain values: what was learned, and what was promised and kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fedfuse import __version__
from fedfuse.federation import spending
from fedfuse.federation.session import Session
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = ["NOT_PRIVATE", "summarise"]

NOT_PRIVATE = (
    "NOT PRIVATE: nothing is promised about any record; updates leave the nodes as they are."
)

SEEDED = (
    "NOT PRIVATE: the noise follows from privacy.noise_seed, so the server can take it off, and "
    "nothing is promised about any record."
)


def summarise(
    session: Session,
    *,
    status: str,
    assumptions: tuple[str, ...],
    notes: tuple[str, ...],
    fingerprint: str = "",
    problem: str = "",
    engine: str = "",
) -> dict[str, Any]:
    """`status` is "finished", "interrupted" or "failed". `engine`: empty is the configuration's."""
    task, config = session.task, session.config
    rows = session.folder.metrics()
    metrics = {
        name: value if math.isfinite(value) else None
        for name, value in session.final_metrics().items()
    }
    return {
        "status": status,
        **({"problem": problem} if problem else {}),
        "name": config.name,
        "fedfuse": __version__,
        "engine": engine or config.federation.engine,
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
        "slices": _plain(session.final_slices()),
        "privacy": _privacy(session),
        "data_fingerprint": fingerprint,
        "assumptions": list(assumptions),
        "notes": list(notes),
        "bytes_sent": sum(row["bytes_sent"] for row in rows),
        "bytes_received": sum(row["bytes_received"] for row in rows),
        "seconds": round(session.seconds, 3),
    }


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with null in place of what is not finite."""
    return {
        key: _plain(value) if isinstance(value, dict) else (value if math.isfinite(value) else None)
        for key, value in tree.items()
    }


def _privacy(session: Session) -> dict[str, Any]:
    """What was promised and what was spent. Where there is no mechanism there is no number."""
    mechanism, privacy = session.mechanism, session.config.privacy
    if mechanism is None:
        return {"private": False, "unit": "none", "statement": NOT_PRIVATE}
    delta = privacy.delta
    nodes = session.spent.nodes
    histories = session.spent.histories()
    spent = spending.epsilons(nodes, delta)
    most = max(spent.values(), default=0.0)
    largest = max(histories, key=lambda past: sum(m.steps for m in past), default=())
    rdp = max((accounting.epsilon_rdp(past, delta) for past in histories), default=0.0)
    opacus = max((accounting.epsilon_opacus(past, delta) for past in histories), default=0.0)
    server, model, why = _views(session, most)
    shared = server is None or server > most
    whom = (
        "whoever gets the model"
        if shared
        else ("the server, the other nodes and whoever gets the model")
    )
    if session.config.federation.secure_aggregation:
        whom = "a server that sees only sums, the other nodes and whoever gets the model"
    beyond = ""
    if shared:
        found = "there is no guarantee" if server is None else f"it is {accounting.shown(server)}"
        beyond = f" Against the server, which is trusted here, {found}."
    statement = (
        f"({accounting.shown(most)}, {delta:g})-differential privacy for "
        f"{mechanism.unit.change}, against {whom}.{beyond}"
    )
    if session.removable:
        statement = f"{SEEDED} With noise that only its node knows it would be: {statement}"
    return {
        "private": not session.removable,
        "statement": statement,
        "unit": mechanism.unit.value,
        "neighbouring_relation": (
            "a node's data kept or left out"
            if mechanism.unit is Unit.NODE
            else f"add or remove one {mechanism.unit.value}"
        ),
        "delta": delta,
        "epsilon_allowed": privacy.epsilon,
        "epsilon_server": server,
        "epsilon_model": model,
        "epsilon_model_why": why,
        "epsilon_by_node": spent,
        "epsilon_rdp": rdp,
        "epsilon_opacus": opacus,
        "sigma": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "steps": sum(m.steps for m in largest),
        "steps_per_round": mechanism.steps,
        "clip_norm": mechanism.clip_norm,
        "declared_records": privacy.declared_records,
        "declared_subjects": privacy.declared_subjects,
        "records_per_subject": privacy.records_per_subject,
        "clip_shares": privacy.clip_shares,
        "noise_by": privacy.noise_by,
        "noise_nodes": privacy.noise_nodes,
        "secure_aggregation": session.config.federation.secure_aggregation,
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


def _views(session: Session, most: float) -> tuple[float | None, float, str]:
    """(epsilon against the server, against whoever gets the model, why the latter).

    None: the server sees updates without noise.
    """
    mechanism, privacy = session.mechanism, session.config.privacy
    assert mechanism is not None
    if mechanism.unit is not Unit.NODE:
        return most, most, "post-processing of the updates; no amplification is claimed"
    if privacy.noise_by == "server":
        return None, most, "the server adds the noise to each round's sum"
    sums = session.spent.of_model(privacy.noise_nodes)
    model = min(most, accounting.epsilon(sums, privacy.delta)) if sums else 0.0
    if session.config.federation.secure_aggregation:
        # Nodes that work together with the server may take off all noise but that of noise_nodes.
        return most, model, "each round's sum carries the noise of all nodes that answered"
    own = max(
        (
            accounting.epsilon([_quieter(m, privacy.noise_nodes) for m in past], privacy.delta)
            for past in session.spent.histories()
        ),
        default=0.0,
    )
    return own, model, "each round's sum carries the noise of all nodes that answered"


def _quieter(mechanism: Mechanism, noise_nodes: int) -> Mechanism:
    """What one node's update is by itself where the noise is shared out."""
    return dataclasses.replace(
        mechanism, noise_multiplier=mechanism.noise_multiplier * noise_nodes**-0.5
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
