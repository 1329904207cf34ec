"""The ClientApp of a real node: it carries each message to the node's vault, and the answer back.

It runs in the process of the app bundle, which a server can replace: it holds nothing, decides
nothing and is trusted with nothing. It is started anew for each message, so it loads little.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfuse.errors import ConfigError, FederationError, WireError
from fedfuse.federation.framing import Letter, connect, receive, send
from fedfuse.federation.packing import packed, record_bytes, unpacked

__all__ = ["forwarded", "make_forwarder"]

_TRIES_S = 20.0
"""How long to look for a vault that is being started, or busy."""
_PAUSE_S = 0.5
_SEND_S = 120.0
_BEYOND_S = 60.0
"""So long after a round's deadline an answer may still come; it is a refusal then."""
_MOST_REPLY = 1 << 40
"""The vault is trusted with the size of its reply."""


def make_forwarder() -> ClientApp:
    """The ClientApp; the node's setting `vault` says where the vault's socket lies. A virtual node
    of Flower's simulation, which has no such setting, trains by itself: see `virtual`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if "vault" not in context.node_config and "partition-id" in context.node_config:
            from fedfuse.federation.virtual import virtual_node  # a simulated node trains here

            return virtual_node(context.run_id)(message, context)
        return _carried("train", message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _carried("evaluate", message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _carried("query", message, context)

    return app


def forwarded(path: Path, letter: Letter, *, tries_s: float = _TRIES_S) -> Letter:
    """The vault's answer to `letter`.

    Raises WireError where it gives none to such a letter, and FederationError where there is no
    vault; neither says where it would be, since what is raised here reaches the server.
    """
    end = time.monotonic() + tries_s
    while True:
        try:
            door = connect(path, seconds=tries_s)
            break
        except PermissionError:
            raise FederationError("the node's vault is not open to this user") from None
        except OSError:
            if time.monotonic() > end:
                raise FederationError("the node's vault does not answer") from None
            time.sleep(min(_PAUSE_S, tries_s))
    with door:
        try:
            send(door, letter, seconds=_SEND_S)
        except OSError:
            size = record_bytes(letter.record)
            raise WireError(
                f"the node's vault broke off within a request of {size:,} bytes: "
                "vault.max_megabytes, or policy.max_parameters, in its node.toml says how many it "
                "takes, its log why"
            ) from None
        try:
            return receive(door, most_bytes=_MOST_REPLY, head_s=_patience(letter), rate=1e6)
        except TimeoutError:
            raise WireError("the node's vault gave no answer before the round was over") from None
        except OSError:
            raise WireError("the node's vault broke off: it says why in its log") from None


def _carried(kind: str, message: Message, context: Context) -> Message:
    path = context.node_config.get("vault")
    if not isinstance(path, str) or not path:
        raise ConfigError(
            "the node's settings lack vault, the path of its vault's socket", where="node config"
        )
    letter = Letter(kind=kind, record=unpacked(message.content), settings=context.run_config)
    return Message(packed(forwarded(Path(path), letter).record), reply_to=message)


def _patience(letter: Letter) -> float:
    """Seconds to wait for an answer."""
    config = letter.record.config_records.get("config")
    deadline = config.get("deadline") if config is not None else None
    if isinstance(deadline, int | float) and deadline > 0:
        return max(0.0, deadline - time.time()) + _BEYOND_S
    return 1e6
