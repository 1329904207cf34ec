"""A worker process of the loopback engine: waits for tasks, and answers each as a node would.

Between parent and worker go tuples, pickled, over a pipe that only these two hold. Weights do not:
they lie in shared memory (see `shared`), whose descriptor goes over the pipe once.

    parent -> worker   ("content", packed), descriptor    what all nodes get in a round
                       ("tasks", [(metadata, state, config), ...], together)    whose content
                                                      came before; `together`: in one go
                       ("free", place)                a reply was read: its sheet may be written on
    worker -> parent   ("ready",), two descriptors    where large replies lie
                       ("state", node, state)         books that must outlive a crash
                       ("done", node, answer, state)  state None: as it was

An answer is a record, or where it is large (place, packed), or an Error. Tasks are answered in
their order, also those in one go. The pipe ends when the parent does, however it dies, and then
the worker ends too.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch
from flwr.app import Error, Message, Metadata, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedfuse.federation.books import DurableContext
from fedfuse.federation.client import WORKER_VARIABLE, SimulatedApp
from fedfuse.federation.flower import RUN_ID, received, take_identity
from fedfuse.federation.packing import record_bytes
from fedfuse.federation.shared import Packed, Sheet

__all__ = ["FAILED", "REPLY_SHEETS", "Answer", "Task", "work"]

FAILED = 2
"""Flower's code for a ClientApp that raised."""
REPLY_SHEETS = 2
"""While the parent reads one, the worker writes the other."""
_LARGE = 1 << 16
"""Replies with so many bytes of arrays go through shared memory; a pipe takes as many at once."""

Task = tuple[Metadata, bytes, UserConfig]
Answer = RecordDict | tuple[int, Packed] | Error


def work(
    pipe: Connection,
    make_app: Callable[[], ClientApp],
    number: int,
    threads: int,
    log: str,
) -> None:
    """Answers tasks until the parent closes the pipe."""
    # Ctrl-C goes to the whole process group; the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[WORKER_VARIABLE] = str(number)
    torch.set_num_threads(threads)
    _log_to(log)
    take_identity()
    try:
        _Worker(pipe, make_app()).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Worker:
    def __init__(self, pipe: Connection, app: ClientApp) -> None:
        self._pipe = pipe
        self._app = app
        self._tasks: deque[list[Task]] = deque()
        """In groups that are answered in one go."""
        self._request: tuple[Sheet, Packed] | None = None
        self._sheets = [Sheet() for _ in range(REPLY_SHEETS)]
        self._free = set(range(REPLY_SHEETS))

    def run(self) -> None:
        self._pipe.send(("ready",))
        for sheet in self._sheets:
            reduction.send_handle(self._pipe, sheet.descriptor, os.getppid())
        while True:
            while not self._tasks:
                self._hear()
            self._answer(self._tasks.popleft())

    def _hear(self) -> None:
        match self._pipe.recv():
            case ("content", packed):
                if self._request is not None:
                    self._request[0].close()
                self._request = Sheet(reduction.recv_handle(self._pipe)), packed
            case ("tasks", tasks, together):
                self._tasks.extend([tasks] if together else [[task] for task in tasks])
            case ("free", place):
                self._free.add(place)

    def _answer(self, tasks: list[Task]) -> None:
        """Runs the app on its own copy of the content and of each node's state."""
        asked = [self._asked(task) for task in tasks]
        try:
            if len(asked) > 1 and isinstance(self._app, SimulatedApp):
                replies = self._app.together(asked)
            else:
                replies = [self._app(message, context) for message, context in asked]
        except Exception as error:
            # The class alone: the text of an unforeseen error may quote a record.
            logging.getLogger("fedfuse.node").warning("%s", error, exc_info=error)
            failure = Error(FAILED, type(error).__name__)
            replies = [Message(failure, reply_to=message) for message, _ in asked]
        for reply, (_, context), (metadata, state, _) in zip(replies, asked, tasks, strict=True):
            answer = reply.error if reply.has_error() else self._packed(reply.content)
            after = pickle.dumps(context.state)
            changed = None if after == state else after
            self._pipe.send(("done", metadata.dst_node_id, answer, changed))

    def _asked(self, task: Task) -> tuple[Message, DurableContext]:
        metadata, state, config = task
        node = metadata.dst_node_id
        assert self._request is not None
        sheet, packed = self._request
        context = DurableContext(
            run_id=RUN_ID,
            node_id=node,
            node_config=config,
            state=pickle.loads(state),
            keep=lambda books: self._pipe.send(("state", node, pickle.dumps(books))),
        )
        return received(sheet.get(packed), metadata), context

    def _packed(self, record: RecordDict) -> Answer:
        if record_bytes(record) < _LARGE:
            return record
        while not self._free:
            self._hear()
        place = self._free.pop()
        return place, self._sheets[place].put(record)


def _log_to(path: str) -> None:
    for name in ("flwr", "fedfuse.node"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = False
        logger.setLevel(logging.INFO)
        if path:
            handler = logging.FileHandler(path, encoding="utf-8", delay=True)
            handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
            logger.addHandler(handler)
