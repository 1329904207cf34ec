"""The loopback engine: a Flower Grid whose nodes are answered by worker processes on this machine.

No sockets, no Ray. The workers live as long as the grid, so a model is built once in each. What all
nodes get in a round is laid once in memory that all workers map; large replies come back the same
way. Tasks go to whichever worker is free, several at a time where they are short or where nodes
train together, and a reply is passed on as soon as it is there, so that nothing of it needs to be
kept. A node's state stays with the parent, and goes along with each task, so it does not matter
which worker answers.

A worker that dies takes with it the task that it was at, or the group of them that it had begun:
those nodes' replies are errors, the tasks behind go to others, and a new worker takes its place.
One that is still busy when the time is up is stopped, so that no stale work goes on.
"""

from __future__ import annotations

import math
import os
import pickle
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from flwr.app import Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run

from fedfuse.errors import FederationError
from fedfuse.federation.flower import RUN_ID, MessageGrid, take_identity, with_id
from fedfuse.federation.shared import Packed, Sheet, owned
from fedfuse.federation.warm import context
from fedfuse.federation.worker import FAILED, REPLY_SHEETS, Answer, Task, work

__all__ = ["LoopbackGrid", "OnReply", "threads_of", "worker_count"]

OnReply = Callable[[int, Message], None]
_FALSE_STARTS = 3
"""So many workers in a row that end before they are ready are no accident."""
_DIED = "the worker process died"
_AHEAD_S = 0.2
"""A worker is given work for about so long at once: enough that it never waits for more."""
_MOST_AHEAD = 16
_AHEAD_BYTES = 1 << 15
"""Tasks with larger states than this together are not given ahead: a pipe could fill up."""


def worker_count(asked: int, nodes: int, gpus: int = 0) -> int:
    """How many workers to start: as asked, else one for each GPU or core; never more than nodes.

    Workers beyond the number of GPUs share them.
    """
    return max(1, min(asked or gpus or _cores(), nodes))


def threads_of(number: int, workers: int, cores: int) -> int:
    """The threads of worker `number` of so many: all cores are shared out, none twice.

    >>> [threads_of(n, 3, 8) for n in range(3)], [threads_of(n, 3, 2) for n in range(3)]
    ([3, 3, 2], [1, 1, 1])
    """
    return max(1, cores // workers + (number < cores % workers))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    content: int = 0
    """Which content it has been told of."""
    tasks: deque[Message] = field(default_factory=deque)
    """What it has been given and has not answered, in order."""
    groups: deque[int] = field(default_factory=deque)
    """How many of them are answered in one go: the first ones, the next ones, and so on."""
    sheets: tuple[Sheet, ...] = ()
    """Where its large replies lie."""
    since: float = 0.0
    """When its first task began."""


@dataclass(frozen=True, slots=True)
class _Request:
    """What nodes are asked, and where it lies."""

    content: RecordDict
    """Kept alive, so that identity tells contents apart."""
    number: int
    sheet: Sheet
    packed: Packed


class LoopbackGrid(MessageGrid):
    """A Grid over worker processes. Nodes are 1 to N.

    make_app   makes a worker's ClientApp; it is pickled
    nodes      the settings of each node, in order
    together   how many nodes train together where there are enough
    on_reply   called with the node's id and its reply, as soon as that is there
    """

    def __init__(
        self,
        make_app: Callable[[], ClientApp],
        nodes: Sequence[UserConfig],
        *,
        workers: int = 0,
        together: int = 1,
        on_reply: OnReply | None = None,
        log: str = "",
    ) -> None:
        take_identity()
        self._together = together
        self._group = 1
        self._make_app = make_app
        self._nodes = nodes
        self._fresh = pickle.dumps(RecordDict())
        self._states: dict[int, bytes] = {}
        self._count = worker_count(workers, len(nodes))
        self._on_reply = on_reply
        self._log = log
        self._run = Run.create_empty(RUN_ID)
        self._false_starts = 0
        self._outbox: list[Message] = []
        self._inbox: dict[str, Message] = {}
        self._waiting: deque[Message] = deque()
        self._task_s = math.inf
        """How long a task takes, about."""
        self._request: _Request | None = None
        self._selector = selectors.DefaultSelector()
        self._context = context()
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
        return range(1, len(self._nodes) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; they are answered when replies are pulled."""
        added = [with_id(message) for message in messages]
        self._outbox += added
        return [message.metadata.message_id for message in added]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to all of `message_ids`, once they are there."""
        return self._gathered(message_ids, None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """The replies that came within `timeout` seconds."""
        return self._gathered(self.push_messages(messages), timeout)

    # ---- beyond Flower

    def replies(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """The replies that come within `timeout` seconds, each as soon as it is there.

        A reply's arrays are good until the next reply is asked for.
        """
        self.push_messages(messages)
        yield from self._answers(timeout)

    def state(self, node: int) -> RecordDict:
        """A copy of the state of `node`."""
        state: RecordDict = pickle.loads(self._states.get(node, self._fresh))
        return state

    @property
    def pids(self) -> tuple[int, ...]:
        """The workers' process ids."""
        return tuple(worker.process.pid or 0 for worker in self._workers)

    def close(self) -> None:
        """Ends all workers; those that are idle end by themselves, the others are killed."""
        for worker in self._workers:
            self._selector.unregister(worker.pipe)
            worker.pipe.close()
            if worker.tasks or not worker.ready:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            self._let_go(worker)
        self._workers = []
        self._selector.close()
        if self._request is not None:
            self._request.sheet.close()
            self._request = None

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

    def _gathered(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """The replies to `message_ids`, in that order, with arrays of their own."""
        for reply in self._answers(timeout):
            if reply.has_content():
                owned(reply.content)
            self._inbox[reply.metadata.reply_to_message_id] = reply
        return [self._inbox.pop(number) for number in message_ids if number in self._inbox]

    def _answers(self, timeout: float | None) -> Iterator[Message]:
        """Hands out all that is in the outbox, and passes on the replies."""
        end = None if timeout is None else time.monotonic() + timeout
        self._waiting.extend(self._outbox)
        self._outbox = []
        self._group = max(1, min(self._together, math.ceil(len(self._waiting) / self._count)))
        try:
            while self._waiting or any(worker.tasks for worker in self._workers):
                for worker in list(self._workers):
                    if worker.ready and self._waiting:
                        self._hand_out(worker)
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    break
                for key, _ in self._selector.select(left):
                    yield from self._listen(key.data)
        finally:  # all are answered, or the time is up, or nobody wants the rest
            self._waiting.clear()
            for worker in list(self._workers):
                if worker.tasks:
                    self._replace(worker)

    def _hand_out(self, worker: _Worker) -> None:
        """Tops up what `worker` has to do. The fewer tasks are left, the fewer at a time, so that
        all workers end together (Polychronopoulos and Kuck 1987, guided self-scheduling)."""
        if grouped := self._group > 1:
            most = self._group
        else:
            share = math.ceil(len(self._waiting) / (4 * self._count))
            most = max(1, min(share, int(_AHEAD_S / self._task_s), _MOST_AHEAD))
        if worker.tasks and len(worker.tasks) > most // 2:
            return
        request = self._request_of(self._waiting[0])
        if worker.tasks and worker.content != request.number:
            return  # it may still read what it has
        given = self._next(most if grouped else most - len(worker.tasks), request)
        if not worker.tasks:
            worker.since = time.monotonic()
        try:
            if worker.content != request.number:
                worker.pipe.send(("content", request.packed))
                reduction.send_handle(worker.pipe, request.sheet.descriptor, worker.process.pid)
                worker.content = request.number
            tasks = [self._task(message) for message in given]
            worker.pipe.send(("tasks", tasks, grouped))
        except (BrokenPipeError, ConnectionResetError):
            worker.ready = False  # what it said before it died is read first
            self._waiting.extendleft(reversed(given))
            return
        worker.tasks.extend(given)
        worker.groups.extend([len(given)] if grouped else [1] * len(given))

    def _next(self, most: int, request: _Request) -> list[Message]:
        """The next tasks for one worker, all of one request."""
        given, size = [self._waiting.popleft()], 0
        while self._waiting and len(given) < most:
            message = self._waiting[0]
            size += len(self._states.get(message.metadata.dst_node_id, b""))
            if message.content is not request.content or size > _AHEAD_BYTES:
                break
            given.append(self._waiting.popleft())
        return given

    def _task(self, message: Message) -> Task:
        node = message.metadata.dst_node_id
        return message.metadata, self._states.get(node, self._fresh), self._nodes[node - 1]

    def _request_of(self, message: Message) -> _Request:
        """What `message` asks, in shared memory; what all nodes get is laid down once."""
        last = self._request
        if last is None or last.content is not message.content:
            sheet = Sheet()
            packed = sheet.put(message.content)
            number = last.number + 1 if last else 1
            self._request = _Request(message.content, number, sheet, packed)
            if last is not None:
                last.sheet.close()
        assert self._request is not None
        return self._request

    def _listen(self, worker: _Worker) -> Iterator[Message]:
        """One thing that `worker` says; a reply is passed on."""
        try:
            said = worker.pipe.recv()
            if said[0] == "ready":
                worker.sheets = tuple(
                    Sheet(reduction.recv_handle(worker.pipe)) for _ in range(REPLY_SHEETS)
                )
        except (EOFError, OSError, pickle.UnpicklingError):
            yield from self._lost(worker)
            return
        match said:
            case ("ready",):
                worker.ready, self._false_starts = True, 0
            case ("state", node, state):
                self._states[node] = state
            case ("done", node, answer, state):
                if state is not None:
                    self._states[node] = state
                self._clock(worker)
                worker.groups[0] -= 1
                if not worker.groups[0]:
                    worker.groups.popleft()
                yield self._reply(worker, worker.tasks.popleft(), answer)
                if isinstance(answer, tuple):
                    # Where it has died meanwhile, the next look at its pipe tells.
                    with suppress(BrokenPipeError, ConnectionResetError):
                        worker.pipe.send(("free", answer[0]))

    def _clock(self, worker: _Worker) -> None:
        now = time.monotonic()
        took, worker.since = now - worker.since, now
        self._task_s = took if math.isinf(self._task_s) else 0.8 * self._task_s + 0.2 * took

    def _reply(self, worker: _Worker, task: Message, answer: Answer) -> Message:
        if isinstance(answer, tuple):
            place, packed = answer
            answer = worker.sheets[place].get(packed)
        reply = with_id(Message(answer, reply_to=task))
        if self._on_reply is not None:
            self._on_reply(task.metadata.dst_node_id, reply)
        return reply

    def _lost(self, worker: _Worker) -> Iterator[Message]:
        """A worker died: what it had begun is answered with an error, the others go back, and
        another worker takes its place."""
        begun = [worker.tasks.popleft() for _ in range(worker.groups[0] if worker.groups else 0)]
        self._waiting.extendleft(reversed(worker.tasks))
        worker.tasks.clear()
        worker.groups.clear()
        if not worker.sheets:  # it never was ready
            self._false_starts += 1
        if self._false_starts >= _FALSE_STARTS:
            raise FederationError(
                "worker processes end while they are starting",
                where="federation.engine = loopback",
                hint='a script that starts a run needs `if __name__ == "__main__":`; '
                "the run folder's log may tell more",
            )
        self._replace(worker)
        for task in begun:
            yield self._reply(worker, task, Error(FAILED, _DIED))

    def _replace(self, worker: _Worker) -> None:
        place = self._workers.index(worker)
        worker.process.kill()
        worker.process.join()
        self._let_go(worker)
        self._workers[place] = self._start(place)

    def _let_go(self, worker: _Worker) -> None:
        """Frees what the parent holds for a worker that has ended."""
        if not worker.pipe.closed:
            self._selector.unregister(worker.pipe)
            worker.pipe.close()
        for sheet in worker.sheets:
            sheet.close()
        worker.process.close()

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        threads = threads_of(number, self._count, _cores())
        process = self._context.Process(
            target=work,
            args=(theirs, self._make_app, number, threads, self._log),
            name=f"fedfuse-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker
