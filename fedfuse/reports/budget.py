"""What runs and ledgers have spent: every fact of the privacy report in one structure.

Torch-free. Each figure is computed anew from the mechanisms in the books; what a summary claims is
only compared with that.

Guarantees
    Unit: that of the books. Neighbouring relation: add or remove one unit; what replacing one
    costs stands beside it.
    Not covered: releases that are in none of the books given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfuse.config import RunConfig
from fedfuse.errors import PrivacyError, RunFolderError
from fedfuse.privacy import views
from fedfuse.privacy.accounting import shown
from fedfuse.privacy.ledger import Entry, Ledger
from fedfuse.privacy.spec import Event, Unit
from fedfuse.reports import assumptions
from fedfuse.reports.facts import (
    Account,
    Facts,
    History,
    LedgerMark,
    Outcome,
    detail_of,
    mixed,
    ranked,
)
from fedfuse.reports.statement import Role, Statement, printable
from fedfuse.runfolder import RunFolder

__all__ = ["of_ledger", "of_run"]

SERVER = "the server, and whoever else sees a node's updates"
PUBLIC = "whoever gets the model"
_KINDS = {"node": (str,), "status": (str,), "unit": (str,), "round": (int,), "steps": (int,)}
"""The types of an event's fields; the others are numbers."""


def of_run(path: Path) -> Facts:
    """The facts of the run in a folder, finished or not.

    Raises RunFolderError, ConfigError, or PrivacyError where the books make no sense.
    """
    folder = RunFolder.open(path)
    config, summary = folder.config(), folder.summary() or {}
    events, rows = folder.events(), folder.metrics()
    claims = summary.get("privacy")
    claims = claims if isinstance(claims, dict) else {}
    if config.private:
        _check_books(folder, events, rows, summary)
    fingerprint = summary.get("data_fingerprint")
    bare = Facts(
        kind="run",
        name=_named(config.name, path),
        private=folder.promises(),
        delta=config.privacy.delta,
        statements=(),
        accounts=(),
        detail=None,
        assumptions=(),
        problems=(),
        data=(fingerprint,) if fingerprint and isinstance(fingerprint, str) else (),
        outcome=_outcome(config, rows, summary),
        config=config,
        hashes=_hashes(path),
    )
    if not bare.private and config.private:
        return replace(
            bare,
            problems=(
                *folder.problems,
                "NOT PRIVATE: the noise follows from privacy.noise_seed, which the server knows: "
                "it can take the noise off",
            ),
        )
    if not config.private:
        problems = ["the books have lines, though nothing was promised"] if events else []
        if claims.get("private"):
            problems.append("summary.json claims privacy, though config.toml promises none")
        return replace(bare, problems=(*folder.problems, *problems))
    unit = Unit(config.privacy.unit)
    foreign = sorted({event.unit for event in events} - {unit.value})
    if foreign:
        raise PrivacyError(
            f"the books are about unit {foreign[0]!r}, the promise about {unit.value!r}",
            where=str(path),
            hint="one run has one unit: these books belong to another configuration",
        )
    accounts = _run_accounts(config, events)
    statements = _run_statements(config, accounts) if accounts else ()
    said = summary.get("assumptions")
    return replace(
        bare,
        statements=statements,
        accounts=accounts,
        detail=detail_of(accounts, bare.delta),
        assumptions=(
            *assumptions.of_run(config, events, rows, said if isinstance(said, list) else ()),
            *assumptions.of_figures(accounts),
        ),
        problems=(*folder.problems, *_contradictions(config, claims, statements, accounts)),
    )


def of_ledger(path: Path, *, delta: float, allowed: float | None) -> Facts:
    """The facts of a node's ledger, an account for each data set and unit.

    A ledger holds mechanisms only, so `delta` and what is `allowed` are the reader's.
    Raises LedgerError.
    """
    ledger = Ledger.open(path)
    entries = tuple(ledger.entries())
    done = {entry.of for entry in entries}
    spent: dict[tuple[str, Unit], list[Entry]] = {}
    exposed = sorted({entry.dataset for entry in entries if entry.kind == "exposed"})
    for entry in entries:
        if entry.mechanism is not None and entry.dataset not in exposed:
            spent.setdefault((entry.dataset, entry.mechanism.unit), []).append(entry)
    accounts = ranked(
        Account.of(
            "dataset",
            dataset,
            [(n, e.mechanism) for n, e in enumerate(lines, 1) if e.mechanism is not None],
            reserved=sum(e.kind == "reserved" and e.number not in done for e in lines),
            allowed=allowed,
            delta=delta,
        )
        for (dataset, _), lines in spent.items()
    )
    mark = LedgerMark(
        id=ledger.id,
        node=ledger.node,
        head=entries[-1].hash,
        lines=len(entries),
        public_key=ledger.public_key,
    )
    return Facts(
        kind="ledger",
        name=ledger.node,
        private=bool(accounts) or not exposed,
        delta=delta,
        statements=_dataset_statements(accounts),
        accounts=accounts,
        detail=detail_of(accounts, delta),
        assumptions=(
            *assumptions.of_ledger(
                signed=bool(mark.public_key),
                lines=mark.lines,
                reserved=sum(account.reserved for account in accounts),
            ),
            *assumptions.of_figures(accounts),
        ),
        problems=(
            *ledger.problems,
            *mixed(accounts),
            *(
                f"NOT PRIVATE: {name} was read for a run that promises nothing, so no figure holds "
                "for it, whatever else was spent"
                for name in exposed
            ),
        ),
        data=tuple(sorted({account.name for account in accounts}.union(exposed))),
        ledgers=(mark,),
        exposed=tuple(exposed),
    )


def _check_books(
    folder: RunFolder,
    events: Sequence[Event],
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    """Raises RunFolderError where the books lack a line, or one is none: every figure would then
    be too small."""
    hint = "restore events.jsonl; without it nobody knows what was spent"
    # A line that a crash cut off is in reserved.json still.
    if not folder.reserved() and any(text.startswith("events.jsonl") for text in folder.problems):
        raise RunFolderError(
            "the last line of the books is cut off, and what it was is not known",
            where=str(folder.path),
            hint=hint,
        )
    for number, event in enumerate(events, 1):
        for name, value in event.as_dict().items():
            kinds = _KINDS.get(name, (float, int))
            if type(value) not in kinds:
                raise RunFolderError(
                    f"the books, entry {number}: {name} = {value!r} is of the wrong type",
                    where=str(folder.path),
                    hint=hint,
                )
        try:
            _ = event.mechanism
        except PrivacyError as error:
            raise PrivacyError(
                f"the books, entry {number}: {error.what}",
                where=str(folder.path),
                hint="no epsilon holds for such a release",
            ) from None
    said = summary.get("rounds_done")
    done = set(range(1, said + 1)) if type(said) is int and said < 10**6 else set()
    done |= {row["round"] for row in rows if type(row["round"]) is int}
    if lost := sorted(done - {event.round for event in events}):
        raise RunFolderError(
            f"round {lost[0]} was done, but the books have no line of it",
            where=str(folder.path),
            hint=hint,
        )


def _run_accounts(config: RunConfig, events: Sequence[Event]) -> tuple[Account, ...]:
    """An account for each node; and with unit "node" and noise by nodes, one for the model, and
    where the noise is shared out, one for each node's updates by themselves."""
    privacy = config.privacy
    by_node: dict[str, list[Event]] = {}
    for event in events:
        by_node.setdefault(event.node, []).append(event)

    def account(
        role: Role, name: str, history: History, reserved: int, allowed: float | None
    ) -> Account:
        return Account.of(
            role, name, history, reserved=reserved, allowed=allowed, delta=privacy.delta
        )

    accounts = []
    for node, lines in by_node.items():
        history = tuple((event.round, event.mechanism) for event in lines)
        reserved = sum(event.status != "spent" for event in lines)
        accounts.append(account("node", node, history, reserved, privacy.epsilon))
        if _alone(config):
            share = privacy.noise_nodes**-0.5
            alone = tuple(
                (n, replace(m, noise_multiplier=m.noise_multiplier * share)) for n, m in history
            )
            with suppress(PrivacyError):  # too little noise: nothing is said against the server
                accounts.append(account("update", node, alone, reserved, None))
    if _shared(config) and events:
        numbers = sorted({event.round for event in events})
        sums = views.of_model(events, privacy.noise_nodes)
        history = tuple(zip(numbers, sums, strict=True))
        accounts.append(account("model", "the model", history, 0, None))
    return ranked(accounts)


def _run_statements(config: RunConfig, accounts: Sequence[Account]) -> tuple[Statement, ...]:
    unit = Unit(config.privacy.unit)
    most = {
        role: max((a.figures.epsilon for a in accounts if a.role == role), default=0.0)
        for role in ("node", "update", "model")
    }

    def statement(against: str, role: Role, why: str) -> Statement:
        return Statement(against=against, unit=unit, role=role, epsilon=most[role], why=why)

    own = "all releases of the node that spent most; no amplification is claimed"
    if unit is not Unit.NODE:
        after = "the model is computed from the updates, and tells no more than they do"
        return statement(SERVER, "node", own), statement(PUBLIC, "node", after)
    if not _shared(config):
        trusted = "the server adds the noise: it sees updates without any, and is trusted with them"
        return (
            Statement(against=SERVER, unit=unit, role="node", epsilon=None, why=trusted),
            statement(PUBLIC, "node", "all sums that the node was part of"),
        )
    single = "each update carries a share of the noise, and is taken by itself"
    summed = (
        "the model shows sums over nodes, with the noise of all that answered; a node that took "
        "part knows its own share of it"
    )
    shares = _alone(config)
    if config.federation.secure_aggregation:
        own = (
            "all releases of the node that spent most; the server sees sums alone, and of their "
            f"noise the figure counts {config.privacy.noise_nodes} shares"
        )
    loud = {a.name for a in accounts if a.role == "update"}
    alone = statement(SERVER, "update" if shares else "node", single if shares else own)
    if shares and any(a.name not in loud for a in accounts if a.role == "node"):
        little = "single updates carry so little noise that no figure is worth stating"
        alone = replace(alone, role="node", epsilon=None, why=little)
    return (
        alone,
        # A round that was broken off counts as a release of the model, though none was made: the
        # nodes' own figures hold for the model too, and may be the smaller ones.
        statement(PUBLIC, "model" if most["model"] <= most["node"] else "node", summed),
    )


def _shared(config: RunConfig) -> bool:
    """Whether the model shows sums that carry the noise of several nodes."""
    return config.privacy.unit == Unit.NODE and config.privacy.noise_by == "nodes"


def _alone(config: RunConfig) -> bool:
    """Whether somebody sees single updates that carry a share of the noise."""
    masked = config.federation.secure_aggregation
    return _shared(config) and config.privacy.noise_nodes > 1 and not masked


def _dataset_statements(accounts: Sequence[Account]) -> tuple[Statement, ...]:
    return tuple(
        Statement(
            against="whoever sees all that was released from the data set",
            unit=unit,
            role="dataset",
            epsilon=max(a.figures.epsilon for a in accounts if a.unit is unit),
            why="all runs, of all servers, together; of the data set that spent most",
        )
        for unit in sorted({account.unit for account in accounts})
    )


def _contradictions(
    config: RunConfig,
    claims: Mapping[str, Any],
    statements: Sequence[Statement],
    accounts: Sequence[Account],
) -> list[str]:
    """What summary.json says that configuration and books do not bear out."""
    said: list[tuple[str, Any, float | None]] = []
    privacy = config.privacy
    terms = {
        "private": True,
        "unit": privacy.unit,
        "delta": privacy.delta,
        "epsilon_allowed": privacy.epsilon,
    }
    wrong = [
        f"summary.json says {key} = {printable(str(claims[key]))[:40]}, config.toml {value}"
        for key, value in terms.items()
        if key in claims and claims[key] != value
    ]
    found = [one.epsilon for one in statements] or [0.0, 0.0]
    for key, epsilon in zip(("epsilon_server", "epsilon_model"), found, strict=True):
        said.append((key, claims.get(key), epsilon))
    by_node = claims.get("epsilon_by_node")
    nodes = {a.name: a.figures.epsilon for a in accounts if a.role == "node"}
    for name, value in (by_node if isinstance(by_node, dict) else {}).items():
        said.append((f"epsilon_by_node of {name!r}", value, nodes.get(name, 0.0)))
    return wrong + [
        f"summary.json says {key} = {_figure(value)}, the books give "
        f"{'no guarantee' if known is None else shown(known)}"
        for key, value, known in said
        if value is not None and not _agree(value, known)
    ]


def _agree(claim: Any, found: float | None) -> bool:
    if found is None or isinstance(claim, bool) or not isinstance(claim, int | float):
        return False
    return abs(claim - found) <= 1e-4 * max(found, 1e-3)


def _figure(value: Any) -> str:
    """A figure as somebody else wrote it: to so many digits that a difference shows."""
    return f"{value:.6g}" if isinstance(value, int | float) else printable(str(value))[:40]


def _named(name: str, path: Path) -> str:
    """A run's name, with its folder's where that says more."""
    folder = path.resolve().name
    return folder if name in folder else f"{name} ({folder})"


def _outcome(
    config: RunConfig, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Outcome:
    headline = summary.get("headline")
    headline = headline if isinstance(headline, dict) else {}
    return Outcome(
        status=str(summary.get("status", "not finished")),
        engine=str(summary.get("engine") or config.federation.engine),
        rounds=config.train.rounds,
        done=len(rows),
        headline=str(headline.get("name", "")),
        value=_number(headline.get("value")),
        baseline=_number(summary.get("majority")),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _hashes(path: Path) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, hashlib.sha256((path / name).read_bytes()).hexdigest())
        for name in ("config.toml", "model.safetensors")
        if (path / name).is_file()
    )
