"""Whole nodes that are killed: nothing of them goes on, and what they had reserved stays spent."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fedfuse.federation.door import is_guarded
from fedfuse.federation.processes import Follower, Process, wait_until
from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Account, Ledger, verify
from fedfuse.privacy.verification import read_heads
from fedfuse.runfolder import RunFolder
from tests.federation.deployment import Federation, processes, wait_for_nodes, words_of

pytestmark = pytest.mark.slow
RUN = {
    "train.rounds": 1,
    "train.local_steps": 800,  # some time, so that it can be killed in the middle
    "privacy.epsilon": 2.0,
    "federation.min_nodes": 2,
    "federation.round_timeout_s": 60.0,
}


def test_nothing_of_a_node_outlives_its_command(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    node = federation.nodes[0]

    def at_work() -> list[int]:
        return list(processes(node))

    with federation.start_node(node) as command:
        wait_until(
            lambda: (
                is_guarded(node / "door")
                and any(b"flower-supernode" in words_of(pid) for pid in at_work())
            ),
            120, "it does not start", command,
        )  # fmt: skip
        assert len(at_work()) >= 3
        os.kill(command.pid, signal.SIGKILL)
        wait_until(lambda: not at_work(), 60, "something of the node goes on")
    assert not is_guarded(node / "door")
    assert verify(node / "ledger", anchor=federation.folder / "anchor-a").holds


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Its server is started and knows three nodes, which are not started."""
    if not os.environ.get("FEDFUSE_ALL"):
        pytest.skip("takes a minute for each; FEDFUSE_ALL=1 runs it")
    made = Federation(tmp_path_factory.mktemp("federation"))
    with made.served():
        yield made


def asked(before: list[Account], now: list[Account]) -> bool:
    """As soon as the round is announced."""
    return True


def training(before: list[Account], now: list[Account]) -> bool:
    """As soon as the node has reserved."""
    return now != before and now[0].open > (before[0].open if before else 0)


def done(before: list[Account], now: list[Account]) -> bool:
    """As soon as the node has committed."""
    return now != before and now[0].open == (before[0].open if before else 0)


def start_run(
    stack: ExitStack, federation: Federation, name: str, more: dict[str, object]
) -> tuple[Process, Path]:
    """A run of `RUN` and `more`, by its operator's command, and its folder."""
    words = [sys.executable, "-m", "fedfuse", "server", "run", str(federation.srv)]
    changes = [f"--set={key}={value}" for key, value in (RUN | more).items()]
    log = federation.folder / f"{name}.log"
    run = Process([*words, str(federation.scenario), *changes], environment=os.environ,
                  folder=federation.folder, log=log)  # fmt: skip
    stack.enter_context(run)
    wait_until(lambda: "Flower's run" in log.read_text(), 120, "no run", run)
    return run, Path(re.findall(r"^Flower's run \d+, in (.+)$", log.read_text(), re.M)[0])


@pytest.mark.parametrize("when", [asked, training, done])
def test_a_run_goes_on_without_a_node_that_is_killed(
    federation: Federation, when: Callable[[list[Account], list[Account]], bool]
) -> None:
    victim, *others = federation.nodes
    spent = {node: accounts(node) for node in federation.nodes}
    with ExitStack() as stack:
        nodes = [stack.enter_context(federation.start_node(node)) for node in federation.nodes]
        wait_for_nodes(federation, nodes)
        run, folder = start_run(stack, federation, when.__name__, {})
        lines = Follower(folder / "progress.jsonl", place=0)
        wait_until(
            lambda: any(json.loads(x)["event"] == "round-started" for x in lines.lines()),
            120, "no round", run,
        )  # fmt: skip
        wait_until(lambda: when(spent[victim], accounts(victim)), 120, "it is not there yet", run)
        for pid in processes(victim):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: run.ended is not None, 200, "the run does not end")
        assert run.ended == 0, run.log and run.log.read_text()
    written, heads = RunFolder.open(folder), read_heads(folder / "heads.jsonl")
    summary = written.summary()
    assert summary is not None
    assert (summary["status"], summary["rounds_done"]) == ("finished", 1)
    booked = {event.node: event.status for event in written.events()}
    assert {booked[node.name] for node in others} == {"spent"}
    for node in federation.nodes:
        seen = [head for head in heads if head.node == node.name]
        assert verify(node / "ledger", anchor=federation.folder / f"anchor-{node.name[-1]}",
                      heads=seen).holds  # fmt: skip
        old, new = spent[node], accounts(node)
        rounds = (new[0].rounds if new else 0) - (old[0].rounds if old else 0)
        left = (new[0].open if new else 0) - (old[0].open if old else 0)
        if node in others:
            assert (rounds, left) == (1, 0)
        else:  # what it reserved is what is spent; whoever does not know better counts it too
            assert (rounds, left) == {asked: (0, 0), training: (1, 1), done: (1, 0)}[when]
        if new:
            total = accounting.epsilon(new[0].history, 1e-5)
            assert total <= 8.0
    # The server does not know a name that never answered; it counts one more node of which none is
    # sure, as long as it was not told.
    assert len(booked) == len(federation.nodes)


def test_a_node_whose_supernode_is_killed_comes_back_in_the_same_run(
    federation: Federation,
) -> None:
    """Its vault goes on, what was reserved is spent once, and it takes part in what is left."""
    victim, *others = federation.nodes
    spent = {node: accounts(node) for node in federation.nodes}

    def of_victim(words: bytes) -> list[int]:
        return [pid for pid in processes(victim) if words in words_of(pid)]

    with ExitStack() as stack:
        nodes = [stack.enter_context(federation.start_node(node)) for node in federation.nodes]
        wait_for_nodes(federation, nodes)
        vault = of_victim(b"--only\0vault")
        # The first round goes on until the SuperLink notices that the killed one is gone: a minute.
        more = {"train.rounds": 4, "federation.round_timeout_s": 240.0}
        run, folder = start_run(stack, federation, "comes_back", more)
        wait_until(
            lambda: training(spent[victim], accounts(victim)), 120, "it is not there yet", run
        )
        for pid in of_victim(b"flower-supernode"):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: run.ended is not None, 400, "the run does not end")
        assert run.ended == 0, run.log and run.log.read_text()
        assert of_victim(b"--only\0vault") == vault
    said = victim.with_suffix(".log").read_text()
    assert "the SuperNode was ended by signal 9; it is started again in 1 s" in said
    written, heads = RunFolder.open(folder), read_heads(folder / "heads.jsonl")
    summary = written.summary()
    assert summary is not None
    assert (summary["status"], summary["rounds_done"]) == ("finished", 4)
    taken = {
        node: {event.round for event in written.events()
               if event.node == node.name and event.status == "spent"}
        for node in federation.nodes
    }  # fmt: skip
    assert all(taken[node] == {1, 2, 3, 4} for node in others)
    assert 4 in taken[victim]
    for node in federation.nodes:
        seen = [head for head in heads if head.node == node.name]
        anchor = federation.folder / f"anchor-{node.name[-1]}"
        assert verify(node / "ledger", anchor=anchor, heads=seen).holds
        old, new = spent[node], accounts(node)
        before = (old[0].rounds, old[0].open) if old else (0, 0)
        assert new[0].rounds - before[0] == len(
            taken[node] | {1}
        )  # the first is spent, though lost
        assert new[0].open == before[1]
        stated = summary["privacy"]["epsilon_by_node"][node.name]
        assert stated <= accounting.epsilon(new[0].history, 1e-5) + 1e-9 <= 8.0


def accounts(node: Path) -> list[Account]:
    return list(Ledger.open(node / "ledger").accounts())
