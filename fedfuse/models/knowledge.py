"""A public graph of concepts: triples in a text file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfuse.errors import DataError

__all__ = ["Graph", "read_graph"]

_MOST_CONCEPTS = 4096
_MOST_TRIPLES = 65_536
_MOST_BYTES = 64 << 20
"""A server may name any path on a node, such as a device that never ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Concepts, relations, and triples (head, relation, tail) by their places in those."""

    concepts: tuple[str, ...]
    relations: tuple[str, ...]
    triples: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, triples: Iterable[Sequence[str]]) -> Graph:
        """The graph of named triples; concepts and relations in sorted order, repeats once.

        >>> Graph.of([("flu", "causes", "fever")]).concepts
        ('fever', 'flu')
        """
        named = sorted({(head, relation, tail) for head, relation, tail in triples})
        concepts = sorted({name for head, _, tail in named for name in (head, tail)})
        relations = sorted({relation for _, relation, _ in named})
        place = {name: k for k, name in enumerate(concepts)}
        kind = {name: k for k, name in enumerate(relations)}
        return cls(
            concepts=tuple(concepts),
            relations=tuple(relations),
            triples=tuple((place[head], kind[r], place[tail]) for head, r, tail in named),
        )

    def named(self) -> list[list[str]]:
        """The triples by name, as `of` takes them."""
        return [
            [self.concepts[head], self.relations[relation], self.concepts[tail]]
            for head, relation, tail in self.triples
        ]

    def columns(self) -> tuple[list[int], list[int], list[int]]:
        """Heads, relations, tails."""
        head, relation, tail = zip(*self.triples, strict=True)
        return list(head), list(relation), list(tail)


def read_graph(path: Path, sha256: str = "") -> Graph:
    """The graph in a UTF-8 file: head, relation and tail, parted by tabs, a triple a line.

    Blank lines and lines that start with # are passed over. `sha256`: what the file's digest must
    be; empty: anything. It is compared before a line is looked at: a server that names a path on
    a node learns nothing of a file that it does not know already.

    Raises DataError, with the line; of such an error only the class leaves a node.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise OSError
        raw = path.read_bytes()
        lines = raw.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(
            "is no file that can be read as text",
            where=str(path),
            hint="model.knowledge names a file of lines: head, tab, relation, tab, tail",
        ) from None
    found = hashlib.sha256(raw).hexdigest()
    if sha256 and found != sha256.lower():
        raise DataError(
            f"its SHA-256 is {found}, but model.knowledge_sha256 is another",
            where=str(path),
            hint="get the graph that the federation agreed on",
        )
    triples = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 3 or not all(cells):
            raise DataError(
                f"{len(cells)} cells, but a triple has three",
                where=f"{path}:{number}",
                hint="head, tab, relation, tab, tail",
            )
        triples.append(cells)
    graph = Graph.of(triples)
    for count, most, what in (
        (len(graph.concepts), _MOST_CONCEPTS, "concepts"),
        (len(graph.triples), _MOST_TRIPLES, "triples"),
    ):
        if not 0 < count <= most:
            raise DataError(
                f"{count} {what}, but it must be 1 to {most}",
                where=str(path),
                hint="each record has its own state of each concept: keep to what matters",
            )
    return graph
