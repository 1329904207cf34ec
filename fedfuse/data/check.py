"""Everything that is wrong with a data set, found before anything is trained on it."""

from __future__ import annotations

from pathlib import Path

from fedfuse.data.decode import decode
from fedfuse.data.layout import plan
from fedfuse.data.manifest import read_manifest
from fedfuse.data.problem import Problem
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError

__all__ = ["Problem", "check"]


def check(manifest_path: Path, config: DataConfig | None = None) -> tuple[Problem, ...]:
    """All problems of the manifest and of every file that it names, by line; none: it is good.

    Decodes everything, as a run would. Never raises DataError: what makes the whole manifest
    unreadable is a problem of line 0. No message holds the content of a record.

    >>> [str(problem) for problem in check(Path("nowhere.csv"))]
    ['no such file']
    """
    config = config or DataConfig()
    need_client = config.partition == "client"
    problems: list[Problem] = []
    found: tuple[Problem, ...] = ()
    try:
        manifest = read_manifest(manifest_path)
        found = manifest.problems
        if need_client and "client" not in manifest.columns:
            problems.append(_whole("no column client", "client", "name each record's client"))
            need_client = False
        decoded = decode(plan(manifest, config), need_client=need_client)
    except DataError as error:
        return (*problems, _whole(error.what, "", error.hint), *found)
    for split in ("train", "test"):
        if split not in decoded.splits:
            hint = "the column split needs train and test"
            problems.append(_whole(f"no good {split} record", "split", hint))
    return (*problems, *decoded.problems)


def _whole(what: str, column: str, hint: str) -> Problem:
    return Problem(line=0, id="", column=column, what=what, hint=hint)
