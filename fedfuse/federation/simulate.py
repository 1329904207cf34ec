"""A whole federated run on this machine: data, nodes, rounds, run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict, UserConfig

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_split
from fedfuse.federation.ahead import Ahead
from fedfuse.federation.client import make_client_app
from fedfuse.federation.flower import RUN_ID, SERVER_ID, quiet
from fedfuse.federation.ledgers import check_ledgers, open_ledgers
from fedfuse.federation.loopback import LoopbackGrid, worker_count
from fedfuse.federation.masking.roster import Roster
from fedfuse.federation.observer import Observer
from fedfuse.federation.pinning import pin
from fedfuse.federation.rounds import job_of
from fedfuse.federation.server import make_server_app
from fedfuse.federation.session import Session
from fedfuse.federation.settle import masked_assumptions, settle
from fedfuse.federation.store import Stored, storing
from fedfuse.federation.summary import summarise
from fedfuse.federation.warm import warm_up
from fedfuse.privacy.advice import NOISE_LIMIT
from fedfuse.privacy.planner import Terms
from fedfuse.privacy.spec import Event, Unit
from fedfuse.runfolder import RunFolder
from fedfuse.stacked import together

__all__ = ["simulate"]


def simulate(
    config: RunConfig,
    out: Path,
    *,
    observer: Observer,
    resume: bool = False,
    ledgers: Path | None = None,
    verbose: bool = False,
    conduct: Callable[[Session, Path], None] | None = None,
    stored: Callable[[], Stored] | None = None,
    load: Callable[[], object] = warm_up,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs `config` with simulated nodes into the folder `out`; the summary, as written there.

    1. decode the data into a private temporary folder, which is removed in the end
    2. settle what was left open: the declared size of a node's data, and sigma
    3. run the rounds; after each, all of it is on the disk
    4. write the model and the summary

    A KeyboardInterrupt (or SIGTERM) during the rounds comes out again, after what is done was kept
    with a summary whose status is "interrupted"; after the last round the run is finished all the
    same. `resume` goes on from there, with the budget as it stands. `ledgers`: a folder with a
    ledger for each node, made if it is not there; what other runs spent on the same records then
    counts. `conduct` runs the rounds, with the data in a store, in the place of the engine.
    `stored` gives the data where `storing` has begun to decode it already; with the loopback engine
    `load` is called before, and loads what workers need.
    `meanwhile` is called by a thread while the first round runs: what the caller needs afterwards.

    Raises a FedfuseError that says what is wrong; the folder then holds the rounds done.
    """
    config = pin(config)
    RunFolder.check(out, config, resume=resume)
    if ledgers is not None:
        check_ledgers(ledgers, config)
    loopback = config.federation.engine == "loopback"
    with ExitStack() as stack:
        if loopback:
            load()
        if stored is None:
            stored = stack.enter_context(storing(config, fingerprints=ledgers is not None))
        data = stored()
        names = data.names
        settled = settle(
            config,
            mean_records=sum(data.sizes) / len(names),
            mean_subjects=data.subjects / len(names),
        )
        roster = None
        assumptions = settled.assumptions
        if config.federation.secure_aggregation:
            roster = Roster.drawn(names)
            assumptions += masked_assumptions(config, len(names))
        notes = data.notes
        books = open_ledgers(ledgers, names) if ledgers is not None else ()
        folder = RunFolder.create(out, config, resume=resume)
        with quiet(folder.log, verbose=verbose or conduct is not None):
            session = Session(
                announced=config,
                config=settled.config,
                mechanism=settled.mechanism,
                folder=folder,
                schema=data.schema,
                test=open_split(data.folder, "test"),
                valid=open_split(data.folder, "valid") if data.has_valid else None,
                reading=data.reading,
                observer=observer,
                nodes=names,
                last=config.train.rounds,
                names=dict(enumerate(names, 1)) if loopback else {},
                identities=roster.identities if roster is not None else None,
            )
            if resume:
                notes += session.resume()
            notes += session.remarks + _hopeless(session)
            session.featured(open_split(data.folder, "train"))  # once here, not in each worker
            observer.prepared(
                session.info(
                    engine=config.federation.engine,
                    nodes=names,
                    workers=_workers(session),
                    assumptions=assumptions,
                    notes=notes,
                )
            )
            status, problem, ahead = "finished", "", Ahead(session, meanwhile)
            try:
                if conduct is not None:
                    conduct(session, data.folder)
                else:
                    _run(session, data.folder, books, roster, verbose=verbose)
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt)
                if not interrupted or session.done < session.last:
                    status = "interrupted" if interrupted else "failed"
                    problem = str(error)
                    raise
            finally:
                session.abandon()
                session.release()
                if status == "finished":
                    ahead.wait()
                summary = summarise(
                    session,
                    status=status,
                    problem=problem,
                    assumptions=assumptions,
                    notes=notes,
                    fingerprint=data.fingerprint,
                )
                folder.write_summary(summary)
        return summary


def _run(
    session: Session,
    store: Path,
    books: Sequence[Path],
    roster: Roster | None,
    *,
    verbose: bool,
) -> None:
    """Hands the session to the engine that the configuration names."""
    if session.first > session.last:
        return
    config = session.announced
    server = make_server_app(config, session.conduct)
    ledgers = tuple(str(path.absolute()) for path in books)
    history = {} if ledgers else _history(session)
    make_client = partial(
        make_client_app, config, str(store), history=history, ledgers=ledgers, roster=roster
    )
    if config.federation.engine == "ray":
        from fedfuse.federation.ray import run_on_ray

        run_on_ray(
            server,
            make_client(),
            nodes=len(session.nodes),
            workers=config.federation.workers,
            verbose=verbose,
        )
        return
    count = len(session.nodes)
    nodes: list[UserConfig] = [
        {"partition-id": index, "num-partitions": count} for index in range(count)
    ]
    with LoopbackGrid(
        make_client,
        nodes,
        workers=_workers(session),
        together=_together(session),
        on_reply=session.on_reply,
        log=str(session.folder.log),
    ) as grid:
        server(grid, Context(RUN_ID, SERVER_ID, {}, RecordDict(), {}))


def _together(session: Session) -> int:
    """How many nodes a worker trains as one program."""
    asked = session.config.federation.together
    job = job_of(session.config, session.mechanism, 1)
    return asked or together(job, session.parameters, len(session.nodes))


def _history(session: Session) -> dict[int, tuple[Event, ...]]:
    """What each node has spent before, for its own books."""
    if not session.spent:
        return {}
    places = {name: index for index, name in enumerate(session.nodes)}
    found: dict[int, list[Event]] = {}
    for event in session.folder.events():
        if event.node in places:
            found.setdefault(places[event.node], []).append(event)
    return {index: tuple(events) for index, events in found.items()}


def _workers(session: Session) -> int:
    asked, gpus = session.config.federation.workers, 0
    if session.device.startswith("cuda"):
        import torch

        gpus = torch.cuda.device_count()
    return worker_count(asked, len(session.nodes), gpus)


def _hopeless(session: Session) -> tuple[str, ...]:
    """A note where noise will move the weights farther than the data can; see `fedfuse plan`."""
    mechanism, config = session.mechanism, session.config
    if mechanism is None:
        return ()
    privacy, federation = config.privacy, config.federation
    by_server = mechanism.unit is Unit.NODE and privacy.noise_by == "server"
    asked = max(federation.min_nodes, round(federation.fraction * len(session.nodes)), 1)
    terms = Terms(
        unit=mechanism.unit,
        rounds=config.train.rounds,
        sample_rate=mechanism.sample_rate,
        sigma=mechanism.sum_noise,
        local_steps=mechanism.steps,
        units=privacy.declared_subjects or privacy.declared_records,
        parameters=session.parameters,
        nodes=asked,
        noise_shared=asked if by_server else privacy.noise_nodes,
    )
    ratio = terms.noise_of_run
    if ratio is None or ratio <= NOISE_LIMIT:
        return ()
    return (
        f"the noise of the run is {ratio:.3g} times the most that its signal can be: expect that "
        "little or nothing is learned; more units or nodes, fewer parameters or a larger epsilon "
        "would help",
    )
