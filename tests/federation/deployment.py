"""A federation of real processes on one machine, by its operators' own commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedfuse.federation.newnode import Equipment, equip, prepared_store
from fedfuse.federation.nodefile import node_file
from fedfuse.federation.processes import Process, environment, free_port, program, wait_until
from fedfuse.federation.serverdata import prepare_store
from fedfuse.federation.serverfile import equip_server
from fedfuse.federation.superlink import SuperLink
from tests.federation.conftest import write_manifest

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = {
    "name": "small",
    "model": {"dim": 8, "head_width": 8, "vector_width": 8},
    "train": {"rounds": 2, "local_steps": 2},
    "privacy": {"declared_records": 30, "epsilon": 8.0},
    "federation": {"min_nodes": 3},
}


def fedfuse(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """One command line, to its end, which must be `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "fedfuse", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


class Federation:
    """A server and its nodes, three at first, that were made; nothing is started."""

    def __init__(
        self,
        folder: Path,
        *,
        scenario: Mapping[str, Any] = SCENARIO,
        letters: str = "abc",
        unit: str = "record",
    ) -> None:
        self.folder, self.srv, self.unit = folder, folder / "srv", unit
        self.scenario = folder / "small.toml"
        self.scenario.write_text(tomli_w.dumps(scenario))
        self.port = free_port()
        server = equip_server(self.srv, hosts=["localhost"], port=self.port, bind="127.0.0.1")
        self.link, self.public = SuperLink(server), server.key().public
        head, *rows = write_manifest(folder).read_text().splitlines(keepends=True)
        public = folder / "public.csv"
        public.write_text("".join([head, *(row for row in rows if ",test," in row)]))
        prepare_store(server, public, None)
        train = [row for row in rows if ",train," in row]
        self.nodes = [
            self._node(letter, [head, *train[place :: len(letters)]])
            for place, letter in enumerate(letters)
        ]

    def _node(self, letter: str, lines: list[str]) -> Path:
        node, own = self.folder / f"site-{letter}", self.folder / f"{letter}.csv"
        own.write_text("".join(lines))
        equip(
            node,
            Equipment(
                name=node.name,
                unit=self.unit,
                max_epsilon=8.0,
                delta=1e-5,
                servers=(str(self.srv / "server.pub"),),
                address=f"localhost:{self.port}",
                ca=self.link.server.authority,
                anchor=self.folder / f"anchor-{letter}",
            ),
        )
        prepared_store(node_file(node), own, None)
        return node

    def start_node(self, node: Path) -> Process:
        """Its vault and its SuperNode, by its operator's command."""
        return Process(
            [sys.executable, "-m", "fedfuse", "node", "start", str(node)],
            environment=environment(node / "flower"),
            folder=self.folder,
            log=node.with_suffix(".log"),
        )

    @contextmanager
    def served(self) -> Iterator[str]:
        """The server is started and knows all nodes meanwhile; what its start said."""
        try:
            told = fedfuse("server", "start", self.srv, "--detach").stderr
            for node in self.nodes:
                fedfuse("server", "register", self.srv, node / "supernode.pub")
            yield told
        finally:
            self.link.stop()

    def knock(self, folder: Path, trust: Sequence[object], port: int | None = None) -> Process:
        """A SuperNode that is nobody's, started in `folder` with these words about trust."""
        return Process(
            [
                program("flower-supernode"),
                *map(str, trust),
                *("--superlink", f"localhost:{port or self.port}"),
                *("--host", "127.0.0.1", "--port", str(free_port())),
            ],
            environment=environment(folder),
            folder=folder,
            log=folder / "supernode.log",
        )


def documented(page: str, **meant: object) -> list[list[str]]:
    """The commands of the first block of docs/`page`, in order, each as words without "fedfuse".

    `meant`: what stands for a word of the page; keys have "_" for what no name can hold.
    """
    text = (ROOT / "docs" / page).read_text()
    block = text.split("```")[1].replace("\\\n", " ")
    words = {re.sub(r"\W", "_", word): str(value) for word, value in meant.items()}
    found = []
    for line in block.strip().splitlines():
        program, *rest = shlex.split(line, comments=True)
        assert program == "fedfuse"
        found.append([words.get(re.sub(r"\W", "_", word), word) for word in rest])
    return found


def says(process: Process, text: str) -> None:
    """Returns once `process` has said `text`."""
    assert process.log is not None
    log = process.log
    wait_until(lambda: text in log.read_text(errors="replace"), 60, f"{log} has no {text!r}")


def wait_for_nodes(federation: Federation, nodes: list[Process]) -> None:
    """Returns once all three are connected."""
    wait_until(
        lambda: [each["status"] for each in federation.link.nodes()] == ["online"] * 3,
        120, "the nodes do not connect", *nodes,
    )  # fmt: skip


def processes(folder: Path) -> Iterator[int]:
    """Those of servers and nodes in `folder`: Flower's folder in their environment says so."""
    mark = b"FLWR_HOME=" + os.fsencode(folder)
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if any(word.startswith(mark) for word in path.read_bytes().split(b"\0")):
                yield int(path.parent.name)
        except OSError:
            continue


def running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
