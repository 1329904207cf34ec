"""A graph is read with its line numbers, and must be the one agreed on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedfuse.errors import DataError
from fedfuse.federation.policy import scrubbed
from fedfuse.models.knowledge import Graph, read_graph


def test_triples_are_read_in_any_order_and_once(tmp_path: Path) -> None:
    path = tmp_path / "graph.tsv"
    path.write_text("# a comment\nflu\tcauses\tfever\n\ncold\tis a\tillness\nflu\tcauses\tfever\n")
    graph = read_graph(path)
    assert graph.concepts == ("cold", "fever", "flu", "illness")
    assert graph.named() == [["cold", "is a", "illness"], ["flu", "causes", "fever"]]
    assert Graph.of(graph.named()) == graph


@pytest.mark.parametrize(
    ("text", "says"),
    [("a\tb\n", ":1: 2 cells"), ("a\tb\tc\na\t\tc\n", ":2: 3 cells"), ("", "0 concepts")],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "graph.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_graph(path)


def test_a_missing_file_and_another_digest_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.tsv"
    with pytest.raises(DataError, match="no file that can be read"):
        read_graph(path)
    path.write_text("a\tb\tc\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_graph(path, digest.upper()).relations == ("b",)
    with pytest.raises(DataError, match="knowledge_sha256 is another"):
        read_graph(path, "0" * 64)


@pytest.mark.parametrize("path", ["/dev/zero", "/proc", "/dev/null"])
def test_a_path_that_never_ends_is_refused(path: str) -> None:
    with pytest.raises(DataError, match="no file that can be read"):
        read_graph(Path(path))


def test_what_is_in_a_file_on_a_node_does_not_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("smith;flu\n")
    for digest in ("", "0" * 64):
        with pytest.raises(DataError) as caught:
            read_graph(path, digest)
        assert scrubbed(caught.value) == "DataError"
    path.write_text("no triple")  # the digest goes first: not even the shape of a line is told
    with pytest.raises(DataError, match="SHA-256"):
        read_graph(path, "0" * 64)
