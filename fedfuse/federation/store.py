"""The data of a run: decoded once, into a folder that the server and all workers map from then on.

A copy of this process can do it, while this one loads what comes next; the decoded records then
never lie in this process's own memory.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fedfuse.allocator import keep_freed_memory
from fedfuse.batch import Schema
from fedfuse.config import RunConfig
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.reading import Reading
from fedfuse.errors import FederationError, FedfuseError, PrivacyError
from fedfuse.federation.tether import end_with
from fedfuse.privacy.spec import Unit

__all__ = ["Stored", "store", "store_apart"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What is known of the data, and the folder in which it lies, as `Prepared.write` made it."""

    folder: Path
    names: tuple[str, ...]
    """Of the nodes."""
    sizes: tuple[int, ...]
    """Their records."""
    subjects: int
    """How many the nodes have, all together; 0 where the unit is another."""
    schema: Schema
    reading: Reading
    has_valid: bool
    fingerprint: str
    notes: tuple[str, ...]


def store(config: RunConfig, temporary: Path, *, fingerprints: bool) -> Stored:
    """Decodes the data that `config` names, or makes a demo data set, into a folder in `temporary`.

    Raises DataError as `prepare` does, PrivacyError where the unit of the promise is not one
    person's data.
    """
    data = config.data
    if not data.manifest:
        from fedfuse.data.scenes import make

        manifest = make(data.demo, temporary / "demo", seed=config.seed)
        data = dataclasses.replace(data, manifest=str(manifest))
    prepared = prepare(data, seed=config.seed, fingerprints=fingerprints)
    _refuse_repeats(config, prepared)
    subjects = _subjects(prepared, config)
    folder = temporary / "store"
    prepared.write(folder)
    return Stored(
        folder=folder,
        names=tuple(shard.name for shard in prepared.shards),
        sizes=tuple(len(shard.rows) for shard in prepared.shards),
        subjects=subjects,
        schema=prepared.schema,
        reading=prepared.reading,
        has_valid=prepared.valid is not None,
        fingerprint=prepared.fingerprint,
        notes=prepared.notes,
    )


def store_apart(
    config: RunConfig, temporary: Path, load: Callable[[], object], *, fingerprints: bool
) -> Stored:
    """`store`, by a copy of this process, which must have one thread; `load` is called meanwhile.

    Raises what `store` raises, and FederationError where the copy was killed.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    gc.freeze()  # a collection would write to every object, and so copy the memory they share
    copy = context.Process(target=_work, args=(os.getpid(), there, config, temporary, fingerprints))
    copy.start()
    there.close()
    try:
        load()
        found = here.recv()
    except EOFError:
        copy.join()
        raise FederationError(
            f"the process that decodes the data was ended (exit code {copy.exitcode})",
            where="data.manifest",
            hint="was there too little memory? dmesg tells",
        ) from None
    finally:
        copy.kill()
        copy.join()
        here.close()
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, Stored)
    return found


def _work(
    parent: int, pipe: Connection, config: RunConfig, temporary: Path, fingerprints: bool
) -> None:
    """Sends what `store` gives or raises; ends with the parent, however that one ends."""
    end_with(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what is to be left
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    keep_freed_memory()
    try:
        found: object = store(config, temporary, fingerprints=fingerprints)
    except FedfuseError as error:
        found = error
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        found = RuntimeError(f"{type(error).__name__}: {error}")
        found.add_note(told)
    pipe.send(found)
    os._exit(0)


def _refuse_repeats(config: RunConfig, prepared: Prepared) -> None:
    privacy = config.privacy
    if privacy.unit == Unit.RECORD and prepared.repeated_subjects and not privacy.records_are_units:
        raise PrivacyError(
            f"{prepared.repeated_subjects} subjects have several records, so a promise for one "
            "record does not cover one person",
            where="data.manifest",
            hint="take --unit subject, or set privacy.records_are_units = true to protect a record",
        )


def _subjects(prepared: Prepared, config: RunConfig) -> int:
    """How many subjects the nodes have, all together; 0 where the unit is another.

    Raises PrivacyError where one has records at two nodes: its epsilons would compose.
    """
    if config.privacy.unit != Unit.SUBJECT:
        return 0
    numbers = prepared.train.subject_numbers()
    total = sum(len(np.unique(numbers[shard.rows])) for shard in prepared.shards)
    used = np.concatenate([numbers[shard.rows] for shard in prepared.shards])
    shared = total - len(np.unique(used))
    if shared:
        raise PrivacyError(
            f"{shared} subjects have records at several nodes, so a node's promise does not cover "
            "one person",
            where="data.partition",
            hint='take data.partition = "client", with each subject at one client',
        )
    return total
