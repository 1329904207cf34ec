"""The data of a run: decoded once, into a folder that the server and all workers map from then on.

A copy of this process can do it, begun before anything large is loaded; the decoded records then
never lie in this process's own memory. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import numpy as np

from fedfuse.allocator import keep_freed_memory
from fedfuse.batch import Schema
from fedfuse.config import RunConfig
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.reading import Reading
from fedfuse.errors import FederationError, FedfuseError, PrivacyError
from fedfuse.federation.tether import end_with
from fedfuse.federation.warm import one_thread, uninterrupted
from fedfuse.privacy.spec import Unit

__all__ = ["Stored", "store", "store_apart", "storing"]


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


@contextmanager
def storing(
    config: RunConfig, *, fingerprints: bool, apart: bool = False
) -> Iterator[Callable[[], Stored]]:
    """`store` in a private temporary folder that is removed in the end, also on SIGTERM, which is
    a KeyboardInterrupt inside. Gives what is to be called once, for what is known of the data.

    apart  a copy of this process begins at once, where this one has one thread
    """
    _sweep()
    with _terminable(), tempfile.TemporaryDirectory(prefix=f"fedfuse-{os.getpid()}-") as name:
        temporary = Path(name)
        if apart and one_thread():
            with store_apart(config, temporary, fingerprints=fingerprints) as stored:
                yield stored
        else:
            yield lambda: store(config, temporary, fingerprints=fingerprints)


@contextmanager
def store_apart(
    config: RunConfig, temporary: Path, *, fingerprints: bool
) -> Iterator[Callable[[], Stored]]:
    """`store`, begun by a copy of this process, which must have one thread; gives what waits for
    the end of it. The copy ends with the context, whatever it is at.

    What waits raises what `store` raises, and FederationError where the copy was killed.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    gc.freeze()  # a collection would write to every object, and so copy the memory they share
    copy = context.Process(target=_work, args=(os.getpid(), there, config, temporary, fingerprints))

    def stored() -> Stored:
        try:
            found = here.recv()
        except EOFError:
            copy.join()
            raise FederationError(
                f"the process that decodes the data was ended (exit code {copy.exitcode})",
                where="data.manifest",
                hint="was there too little memory? dmesg tells",
            ) from None
        copy.join()
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Stored)
        return found

    try:
        with uninterrupted():
            copy.start()
        there.close()
        yield stored
    finally:
        if copy.pid is not None:
            copy.kill()
            copy.join()
        here.close()


def _work(
    parent: int, pipe: Connection, config: RunConfig, temporary: Path, fingerprints: bool
) -> None:
    """Sends what `store` gives or raises; ends with the parent, however that one ends."""
    end_with(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what is to be left
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
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


def _sweep() -> None:
    """Removes decoded data that a run left behind when it was killed outright."""
    for folder in Path(tempfile.gettempdir()).glob("fedfuse-*-*"):
        number = folder.name.split("-")[1]
        try:
            ours = folder.stat().st_uid == os.getuid()
        except OSError:  # another run has just removed it
            continue
        if ours and number.isdigit() and not _runs(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that no decoded record stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
