"""Real nodes on one machine, and what they cost: SuperLink with TLS, nodes with keys and ledgers.

    python benchmarks/deployed.py rounds     # 3 nodes, 8 rounds, and the same on loopback
    python benchmarks/deployed.py large      # 2 nodes, 2 rounds, a model of 100 MB
    python benchmarks/deployed.py crowd      # 64 nodes, 3 rounds, eight at a time

Each node has a folder with data, policy, ledger, anchor and keys of its own, as `fedfuse node init`
and `fedfuse node prepare` make it, and is registered by its operator's command. In `rounds` and
`large` it is started by `fedfuse node start`.

Sixty-four such nodes take some 45 GB, and their apps, which all start at once and must be there
within Flower's 30 s, some 90 CPU seconds. So in `crowd` a node's processes (vault, SuperNode,
SuperExec, and an app anew for each message; each with its own command line) are forked from two
that have loaded torch, or Flower, once: what these loaded is shared, all else is their own.

Memory is proportional (PSS), CPU is user and system time of all processes, seen twice a second: the
last half second of each may be missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import tomli_w
from crowd import write_crowd
from measure import Watch, machine

from fedfuse.federation.newnode import Equipment, equip, prepared_store
from fedfuse.federation.nodefile import NodeFile, node_file
from fedfuse.federation.processes import Process, environment, free_port, wait_until
from fedfuse.federation.running import supernode_words
from fedfuse.federation.serverdata import prepare_store
from fedfuse.federation.serverfile import equip_server
from fedfuse.federation.superlink import SuperLink

ROOT = Path(__file__).resolve().parent.parent
RECORDS = 30
"""Of each node, as declared."""
_BRINGS = {
    "fedfuse": ("fedfuse.federation.preload", "fedfuse.cli.node", "fedfuse.federation.vault"),
    "flower": (
        "flwr.supernode.cli",
        "flwr.supernode.main",
        "flwr.supercore.cli",
        "flwr.supernode.runtime.run_clientapp",
    ),
}
"""What the processes that others are forked from load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run."""

    nodes: int
    rounds: int
    width: int = 8
    forked: bool = False
    at_a_time: int = 0

    def settings(self) -> dict[str, Any]:
        """The run's configuration."""
        return {
            "name": "deployed",
            "model": dict.fromkeys(("dim", "head_width", "vector_width"), self.width),
            "train": {"rounds": self.rounds, "local_steps": 2, "device": "cpu"},
            "privacy": {"declared_records": RECORDS, "epsilon": 8.0},
            "federation": {"min_nodes": self.nodes, "at_a_time": self.at_a_time},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a deployed run left behind."""

    case: Case
    parameters: int
    rounds: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    events: list[dict[str, Any]]
    """The lines of progress.jsonl."""
    vault_s: list[float]
    """What vaults said that each answer took."""
    database_mb: float
    """The most that the SuperLink's database took on the disk."""
    watch: Watch

    @property
    def lost(self) -> int:
        """Answers that were asked for and did not come, or were no good."""
        return sum(self.case.nodes - line["nodes_ok"] for line in self.rounds)

    def server_s(self) -> list[float]:
        """Of each round but the last: from its last answer to the request of the next one."""
        found, last = [], 0.0
        for event in self.events:
            at = time.mktime(time.strptime(event["time"][:19], "%Y-%m-%dT%H:%M:%S"))
            at += float(event["time"][19:23])
            if event["event"] == "node":
                last = at
            elif event["event"] == "round-started" and event["round"] > 1:
                found.append(at - last)
        return found


class Deployment:
    """A server that answers, and nodes that it knows."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case, self.srv = folder, case, folder / "srv"
        self.port = free_port()
        server = equip_server(self.srv, hosts=["localhost"], port=self.port, bind="127.0.0.1")
        self.link = SuperLink(server)
        self.scenario = folder / "scenario.toml"
        self.scenario.write_text(tomli_w.dumps(case.settings()))
        self.manifest = write_crowd(folder / "data", case.nodes, RECORDS)
        head, *rows = self.manifest.read_text().splitlines(keepends=True)
        prepare_store(server, self._manifest("public", head, rows, ",test,"), None)
        names = sorted({row.split(",")[2] for row in rows if ",train," in row})
        self.nodes = [self._node(name, head, rows) for name in names]

    def _manifest(self, name: str, head: str, rows: Sequence[str], kept: str) -> Path:
        path = self.folder / "data" / f"{name}.csv"
        path.write_text("".join([head, *(row for row in rows if kept in row)]))
        return path

    def _node(self, name: str, head: str, rows: Sequence[str]) -> Path:
        node = self.folder / name
        equip(
            node,
            Equipment(
                name=name,
                unit="record",
                max_epsilon=8.0,
                delta=1e-5,
                servers=(str(self.srv / "server.pub"),),
                address=f"localhost:{self.port}",
                ca=self.link.server.authority,
                anchor=self.folder / f"{name}.anchor",
            ),
        )
        manifest = self._manifest(name, head, rows, f",train,{name},")
        prepared_store(node_file(node), manifest, None)
        return node

    @contextmanager
    def running(self) -> Iterator[None]:
        """All nodes are started and connected meanwhile; what was started is ended."""
        fedfuse("server", "start", self.srv, "--detach")
        try:
            for node in self.nodes:
                self.link.register(node / "supernode.pub", node.name)
            with ExitStack() as stack:
                started = self._forked(stack) if self.case.forked else self._started(stack)
                wait_until(self._connected, 900, "the nodes do not connect", *started)
                yield
        finally:
            self.link.stop()

    def _connected(self) -> bool:
        time.sleep(2)  # each look is a process of Flower's
        return [node["status"] for node in self.link.nodes()].count("online") == self.case.nodes

    def _started(self, stack: ExitStack) -> list[Process]:
        return [
            stack.enter_context(
                Process(
                    [sys.executable, "-m", "fedfuse", "node", "start", node],
                    environment=environment(node / "flower"),
                    folder=self.folder,
                    log=node.with_suffix(".log"),
                )
            )
            for node in self.nodes
        ]

    def _forked(self, stack: ExitStack) -> list[Process]:
        vaults, flower, programs = [], [], self.folder / "bin"
        programs.mkdir()
        app = programs / "flwr-clientapp"
        app.write_text(_FORKED_APP.format(python=sys.executable, door=self.folder / "flower.sock"))
        app.chmod(0o755)
        path = f"{programs}{os.pathsep}{environment(self.folder)['PATH']}"
        for node, port in zip(self.nodes, free_ports(len(self.nodes)), strict=True):
            log, home = str(node.with_suffix(".log")), {"FLWR_HOME": str(node / "flower")}
            words = ["fedfuse", "node", "start", str(node_file(node)), "--only", "vault"]
            vaults.append({"words": words, "log": log, "environment": home})
            program, *rest = map(str, supernode_words(NodeFile.read(node_file(node))))
            address = f"127.0.0.1:{port}"
            for words in (  # of a setting that is given twice the last one counts
                [Path(program).name, *rest, "--port", str(port), "--isolation", "process"],
                ["flower-superexec", "--insecure", "--runtime-api-address", address],
            ):
                flower.append({"words": words, "log": log, "environment": home | {"PATH": path}})
        started = [self._fork(stack, "fedfuse", vaults)]
        doors = [node / "door" / "vault.sock" for node in self.nodes]
        wait_until(lambda: all(map(Path.exists, doors)), 600, "no vaults", *started)
        return [*started, self._fork(stack, "flower", flower)]

    def _fork(self, stack: ExitStack, brings: str, wanted: list[dict[str, Any]]) -> Process:
        path = self.folder / f"{brings}.json"
        path.write_text(json.dumps(wanted))
        return stack.enter_context(
            Process(
                [sys.executable, __file__, "fork", brings, path],
                environment=environment(self.folder / "flower"),
                folder=self.folder,
                log=path.with_suffix(".log"),
            )
        )

    def run(self) -> Path:
        """A run, to its end; its folder."""
        fedfuse("server", "run", self.srv, self.scenario)
        (run,) = (path for path in (self.srv / "runs").iterdir() if path.name[0] != ".")
        return run

    def database_mb(self) -> float:
        """What the SuperLink's database takes on the disk now."""
        files = self.link.server.database.parent.glob(self.link.server.database.name + "*")
        return sum(path.stat().st_size for path in files) / 1e6


def deployed(folder: Path, case: Case) -> Told:
    """Makes a deployment in `folder`, runs `case` on it, and ends it."""
    os.environ.setdefault(MARK, f"{os.getpid()}")
    deployment = Deployment(folder, case)
    most = 0.0

    def look() -> None:
        nonlocal most
        most = max(most, deployment.database_mb())

    watch = Watch(f"{MARK}={os.environ[MARK]}".encode(), look_s=0.5, kind=kind_of, each=look)
    with deployment.running():
        watch.start()
        try:
            run = deployment.run()
        finally:
            watch.stop()
    logs = [node.with_suffix(".log").read_text() for node in deployment.nodes]
    summary = json.loads((run / "summary.json").read_text())
    return Told(
        case=case,
        parameters=summary["parameters"],
        rounds=lines_of(run / "metrics.jsonl"),
        events=lines_of(run / "progress.jsonl"),
        vault_s=[float(s) for log in logs for s in re.findall(r": ok, ([\d.]+) s;", log)],
        database_mb=most,
        watch=watch,
    )


MARK = "BENCHMARK_OF"
"""In the environment of all that is started."""


def kind_of(words: Sequence[str], name: str) -> str:
    """What a process is, by its command line, or by its own name where it was forked."""
    text = " ".join(words)
    for part, kind in (
        ("--only vault", "vault"),
        ("flower-supernode", "SuperNode"),
        ("flwr-clientapp", "app of a message"),
        ("flwr-serverapp", "server app"),
        ("flower-superlink", "SuperLink"),
        ("flower-superexec", "SuperExec"),
        ("node start", "node start"),
    ):
        if part in text:
            return kind
    if " fork " in text:
        names = {"node-start": "vault", "flower-supernod": "SuperNode"}
        names |= {"flower-superexe": "SuperExec", "flwr-clientapp": "app of a message"}
        return names.get(name, "forked from")
    return "commands"


def fedfuse(*words: object) -> None:
    """One command line, to its end. Raises SystemExit with what it said where it fails."""
    command = [sys.executable, "-m", "fedfuse", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def free_ports(count: int) -> list[int]:
    """As many ports that nobody listens on, all different."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in held]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def fork_all(brings: str, path: Path) -> None:
    """Loads what `brings` names, then forks a process for each command in the file `path`, and
    then one for whatever comes through its socket; SIGTERM, which reaches all of them, ends it.

    Vaults take what is left of the cores: each of their nodes would have some of its own, and
    Flower gives an app up that has not begun within 30 s.
    """
    if brings == "fedfuse":
        os.nice(5)
    for module in _BRINGS[brings]:
        importlib.import_module(module)
    gc.freeze()  # or each process's own collector would touch, and so copy, all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path.with_suffix(".sock")))
        door.listen(128)
        for each in json.loads(path.read_text()):
            _fork(door, each)
        while True:
            line, _ = door.accept()
            with line, line.makefile() as file:
                wanted = json.loads(file.read())
            _fork(door, wanted)


def _fork(door: socket.socket, wanted: dict[str, Any]) -> None:
    if not os.fork():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        door.close()
        _become(wanted["words"], Path(wanted["log"]), wanted["environment"])


def _become(words: list[str], log: Path, variables: dict[str, str]) -> None:
    """This process runs a command of an installed program from here on."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(variables)
    name = "node-start" if words[0] == "fedfuse" else words[0]
    Path("/proc/self/comm").write_text(name)
    sys.argv = words
    (program,) = entry_points(group="console_scripts", name=words[0])
    sys.exit(program.load()())


_FORKED_APP = """#!{python} -ISs
import json, os, socket, sys
wanted = {{"words": ["flwr-clientapp", *sys.argv[1:]], "log": os.readlink("/proc/self/fd/1"),
          "environment": {{"FLWR_HOME": os.environ["FLWR_HOME"]}}}}
with socket.socket(socket.AF_UNIX) as door:
    door.connect("{door}")
    door.sendall(json.dumps(wanted).encode())
"""
"""What a SuperExec finds in the place of the app: it asks for one that is forked."""

# ---- what is shown


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def shown(told: Told) -> str:
    """The figures of a run."""
    case, watch = told.case, told.watch
    seconds = [line["seconds"] for line in told.rounds]
    sent = sum(line["bytes_received"] for line in told.rounds) / 1e6
    head = ("nodes", "rounds", "lost answers", "parameters", "MB from and to nodes",
            "s, first round", "s, others (median)", "CPU s a round", "processes",
            "memory MB", "database MB")  # fmt: skip
    row = (case.nodes, len(told.rounds), told.lost, f"{told.parameters:,}", f"{sent:.1f}, "
           f"{sum(line['bytes_sent'] for line in told.rounds) / 1e6:.1f}", f"{seconds[0]:.1f}",
           f"{statistics.median(seconds[1:]):.1f}", f"{watch.cpu / len(told.rounds):.1f}",
           watch.most, f"{watch.peak / 1e6:.0f}", f"{told.database_mb:.0f}")  # fmt: skip
    kinds = [
        (kind, found.most, f"{found.peak / 1e6:.0f}", f"{found.cpu:.1f}",
         f"{found.cpu / len(told.rounds) / max(case.nodes, 1):.2f}")
        for kind, found in sorted(watch.kinds().items())
    ]  # fmt: skip
    parts = ("process", "most at once", "largest, MB", "CPU s in all", "CPU s a node and round")
    return f"{table(head, [row])}\n\n{table(parts, kinds)}"


def spans(told: Told, loopback: Sequence[float]) -> str:
    """Where the seconds of a round go."""
    whole = statistics.median(line["seconds"] for line in told.rounds[1:])
    vault = statistics.median(told.vault_s[told.case.nodes :])
    server, app = statistics.median(told.server_s()), forwarder_s()
    rows = [
        ("the round on loopback", f"{statistics.median(loopback[1:]):.3f}"),
        ("the round on real nodes", f"{whole:.3f}"),
        ("in the vault: policy, ledger, training", f"{vault:.3f}"),
        ("in the app: what fedfuse loads and does there", f"{app:.3f}"),
        ("in the server app: last answer to next request", f"{server:.3f}"),
        ("looking for answers, half a look", "0.250"),
        ("Flower: the rest", f"{whole - vault - server - app - 0.25:.3f}"),
    ]
    return table(("what, medians of rounds but the first", "s"), rows)


def forwarder_s() -> float:
    """Seconds that the bundle's app takes to load, where Flower has been loaded."""
    code = (
        "import flwr.supernode.runtime.run_clientapp, time; began = time.perf_counter()\n"
        "import clients.app; print(time.perf_counter() - began)"
    )
    found = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                             text=True, check=True).stdout.split()[-1])
        for _ in range(5)
    ]  # fmt: skip
    return statistics.median(found)


def loopback_s(folder: Path, told: Told) -> list[float]:
    """The seconds of the same rounds on loopback."""
    words = ["--data", folder / "data" / "manifest.csv", "--out", folder / "loopback", "--quiet"]
    fedfuse("simulate", folder / "scenario.toml", *words)
    return [line["seconds"] for line in lines_of(folder / "loopback" / "metrics.jsonl")]


CASES = {
    "rounds": Case(nodes=3, rounds=8),
    "large": Case(nodes=2, rounds=2, width=2500),
    "crowd": Case(nodes=64, rounds=3, forked=True, at_a_time=8),
}


def main() -> None:
    """Runs a case and prints its figures."""
    if sys.argv[1:2] == ["fork"]:
        return fork_all(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--keep", type=Path, help="leave all in this new folder")
    given = parser.parse_args()
    asked = {k: v for k in ("nodes", "rounds", "width") if (v := getattr(given, k)) is not None}
    case = dataclasses.replace(CASES[given.case], **asked)
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    print(f"{machine()}; a load of {os.getloadavg()[0]:.1f} before", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary) / "deployed"
        folder.mkdir(parents=True)
        told = deployed(folder, case)
        print(shown(told), flush=True)
        if given.case == "rounds":
            print(f"\n{spans(told, loopback_s(folder, told))}")
    return None


if __name__ == "__main__":
    main()
