"""The loopback engine: a Flower Grid whose nodes are answered by worker processes on this machine.

No sockets, no Ray. The workers live as long as the grid, so a model is built once in each; tasks
go to whichever worker is free. What all nodes get in a round is pickled once and sent once to
each worker, which gives every node its own copy. A node's state stays with the parent, and goes
along with each task, so it does not matter which worker answers.

A worker that dies takes one task with it: that node's reply is an error, and a new worker takes
its place. One that is still busy when the time is up is stopped, so that no stale work goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from flwr.app import Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run

from fedfuse.errors import FederationError
from fedfuse.federation.flower import RUN_ID, MessageGrid, take_identity, with_id
from fedfuse.federation.worker import FAILED, work

__all__ = ["LoopbackGrid", "OnReply", "warm_up", "worker_count"]

OnReply = Callable[[int, Message], None]
_PRELOAD = ["fedfuse.federation.preload"]
_FALSE_STARTS = 3
"""So many workers in a row that end before they are ready are no accident."""
_DIED = "the worker process died"


def worker_count(asked: int, nodes: int, gpus: int = 0) -> int:
    """How many workers to start: as asked, else one for each GPU or core; never more than nodes."""
    return max(1, min(asked or gpus or _cores(), nodes))


def warm_up() -> None:
    """Begins to load torch where workers are forked from, while the caller does something else."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    content: int = 0
    """Which round's content it holds."""
    task: Message | None = None


class LoopbackGrid(MessageGrid):
    """A Grid over worker processes. Nodes are 1 to N.

    make_app   makes a worker's ClientApp; it is pickled
    nodes      the settings of each node, in order
    on_reply   called with the node's id and its reply, as soon as that is there
    """

    def __init__(
        self,
        make_app: Callable[[], ClientApp],
        nodes: Sequence[UserConfig],
        *,
        workers: int = 0,
        on_reply: OnReply | None = None,
        log: str = "",
    ) -> None:
        take_identity()
        self._make_app = make_app
        self._nodes = {number: dict(config) for number, config in enumerate(nodes, 1)}
        self._states = {number: pickle.dumps(RecordDict()) for number in self._nodes}
        self._count = worker_count(workers, len(nodes))
        self._on_reply = on_reply
        self._log = log
        self._run = Run.create_empty(RUN_ID)
        self._false_starts = 0
        self._outbox: list[Message] = []
        self._inbox: dict[str, Message] = {}
        # Forked from a process that has loaded torch once: no worker loads it again.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._workers = [self._start(number) for number in range(self._count)]

    # ---- what Flower asks of a grid

    def set_run(self, run: Run) -> None:
        """Takes `run` as the grid's run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The grid's one run."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """1 to N."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; they are answered when replies are pulled."""
        added = [with_id(message) for message in messages]
        self._outbox += added
        return [message.metadata.message_id for message in added]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to all of `message_ids`, once they are there."""
        self._answer(None)
        return [self._inbox.pop(number) for number in message_ids if number in self._inbox]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """The replies that came within `timeout` seconds."""
        numbers = list(self.push_messages(messages))
        self._answer(timeout)
        return [self._inbox.pop(number) for number in numbers if number in self._inbox]

    # ---- beyond Flower

    def state(self, node: int) -> RecordDict:
        """A copy of the state of `node`."""
        state: RecordDict = pickle.loads(self._states[node])
        return state

    @property
    def pids(self) -> tuple[int, ...]:
        """The workers' process ids."""
        return tuple(worker.process.pid or 0 for worker in self._workers)

    def close(self) -> None:
        """Ends all workers; those that are idle end by themselves, the others are killed."""
        for worker in self._workers:
            worker.pipe.close()
            if worker.task is not None or not worker.ready:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers = []

    def __enter__(self) -> LoopbackGrid:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- the round

    def _answer(self, timeout: float | None) -> None:
        """Hands out all that is in the outbox, and gathers the replies."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting = deque(self._outbox)
        self._outbox = []
        blobs = _Blobs()
        while waiting or any(worker.task is not None for worker in self._workers):
            for worker in list(self._workers):
                if worker.ready and worker.task is None and waiting:
                    self._hand_out(worker, waiting.popleft(), blobs)
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            pipes = [worker.pipe for worker in self._workers]
            for pipe in wait(pipes, left):
                self._listen(next(w for w in self._workers if w.pipe is pipe))
        for worker in list(self._workers):  # the time was up
            if worker.task is not None:
                self._replace(worker)

    def _hand_out(self, worker: _Worker, message: Message, blobs: _Blobs) -> None:
        number, blob = blobs.of(message.content)
        worker.task = message
        node = message.metadata.dst_node_id
        try:
            if worker.content != number:
                worker.pipe.send(("content", blob))
                worker.content = number
            worker.pipe.send(
                (
                    "task",
                    node,
                    message.metadata,
                    self._states[node],
                    self._nodes[node],
                )
            )
        except (BrokenPipeError, ConnectionResetError):
            self._lost(worker)

    def _listen(self, worker: _Worker) -> None:
        try:
            said = worker.pipe.recv()
        except (EOFError, ConnectionResetError, pickle.UnpicklingError):
            self._lost(worker)
            return
        match said:
            case ("ready",):
                worker.ready, self._false_starts = True, 0
            case ("state", node, state):
                self._states[node] = state
            case ("done", node, reply, state):
                self._states[node] = state
                task, worker.task = worker.task, None
                if task is not None:
                    self._deliver(task, reply)

    def _deliver(self, task: Message, reply: Message) -> None:
        self._inbox[task.metadata.message_id] = with_id(reply)
        if self._on_reply is not None:
            self._on_reply(task.metadata.dst_node_id, reply)

    def _lost(self, worker: _Worker) -> None:
        """A worker died: its task is answered with an error, and another takes its place."""
        task, worker.task = worker.task, None
        if not worker.ready:
            self._false_starts += 1
        if self._false_starts >= _FALSE_STARTS:
            raise FederationError(
                "worker processes end while they are starting",
                where="federation.engine = loopback",
                hint='a script that starts a run needs `if __name__ == "__main__":`; '
                "the run folder's log may tell more",
            )
        self._replace(worker)
        if task is not None:
            self._deliver(task, Message(Error(FAILED, _DIED), reply_to=task))

    def _replace(self, worker: _Worker) -> None:
        place = self._workers.index(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()
        worker.process.close()
        self._workers[place] = self._start(place)

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work,
            args=(theirs, self._make_app, number, max(1, _cores() // self._count), self._log),
            name=f"fedfuse-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


class _Blobs:
    """Each distinct content of a round, pickled once.

    Numbers are never given twice, so that a worker knows whether it holds one already. The
    contents are kept alive, so that `id` tells them apart.
    """

    _last = 0

    def __init__(self) -> None:
        self._known: dict[int, tuple[RecordDict, int, bytes]] = {}

    def of(self, content: RecordDict) -> tuple[int, bytes]:
        """The number and the bytes of `content`."""
        if id(content) not in self._known:
            _Blobs._last += 1
            self._known[id(content)] = (content, _Blobs._last, pickle.dumps(content, protocol=5))
        _, number, blob = self._known[id(content)]
        return number, blob
