"""A worker process of the loopback engine: waits for tasks, and answers each as a node would.

Between parent and worker goes one tuple at a time, pickled, over a pipe that only these two hold:

    parent -> worker   ("content", bytes)                       once a round: what all nodes get
                       ("task", number, metadata, state, config)  whose content came before
    worker -> parent   ("ready",)
                       ("state", number, state)                 books that must outlive a crash
                       ("done", number, reply, state)

The pipe ends when the parent does, however it dies, and then the worker ends too.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from flwr.app import Error, Message, Metadata, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedfuse.federation.books import DurableContext
from fedfuse.federation.client import WORKER_VARIABLE
from fedfuse.federation.flower import RUN_ID, received, take_identity

__all__ = ["FAILED", "work"]

FAILED = 2
"""Flower's code for a ClientApp that raised."""


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
        app = make_app()
        pipe.send(("ready",))
        content = b""
        while True:
            task = pipe.recv()
            if task[0] == "content":
                content = task[1]
            else:
                _answer(pipe, app, content, *task[1:])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(
    pipe: Connection,
    app: ClientApp,
    content: bytes,
    number: int,
    metadata: Metadata,
    state: bytes,
    node_config: UserConfig,
) -> None:
    """Runs the app on its own copy of the content and of the node's state."""
    record: RecordDict = pickle.loads(content)
    message = received(record, metadata)
    context = DurableContext(
        run_id=RUN_ID,
        node_id=metadata.dst_node_id,
        node_config=node_config,
        state=pickle.loads(state),
        keep=lambda books: pipe.send(("state", number, pickle.dumps(books))),
    )
    try:
        reply = app(message, context)
    except Exception as error:
        # The class alone: the text of an unforeseen error may quote a record.
        logging.getLogger("fedfuse.node").warning("%s", error, exc_info=error)
        reply = Message(Error(FAILED, type(error).__name__), reply_to=message)
    pipe.send(("done", number, reply, pickle.dumps(context.state)))


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
