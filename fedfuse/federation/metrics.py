"""Figures of a server for Prometheus, from its run folders: nothing that nodes did not release.

Text format 0.0.4 (prometheus.io, exposition formats): a name, labels, a number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedfuse.errors import FederationError, RunFolderError
from fedfuse.federation.superlink import SuperLink
from fedfuse.federation.tickets import is_conducted
from fedfuse.runfolder import RunFolder

__all__ = ["exposition", "serving"]

_HELP = {
    "fedfuse_up": ("gauge", "1 if the SuperLink answers"),
    "fedfuse_certificate_seconds": ("gauge", "until the server's certificate ends"),
    "fedfuse_run_active": ("gauge", "1 while the run's server app is at work"),
    "fedfuse_rounds_total": ("counter", "rounds done"),
    "fedfuse_round_nodes": ("gauge", "nodes that gave a good update in the last round"),
    "fedfuse_node_failures_total": ("counter", "nodes asked that gave no good update"),
    "fedfuse_round_seconds_total": ("counter", "spent in rounds"),
    "fedfuse_sent_bytes_total": ("counter", "weights sent to nodes"),
    "fedfuse_received_bytes_total": ("counter", "updates received from nodes"),
    "fedfuse_epsilon": ("gauge", "of the node that spent most, after the last round"),
}


def exposition(link: SuperLink) -> str:
    """All figures, as text."""
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in _HELP}
    found["fedfuse_up"].append(("", float(link.answers())))
    with suppress(FederationError):
        left = link.server.certificate().days_left * 86400
        found["fedfuse_certificate_seconds"].append(("", round(left)))
    for path in sorted(link.server.runs.glob("*/config.toml")):
        label = f'{{run="{_escaped(path.parent.name)}"}}'
        with suppress(RunFolderError):
            rows = RunFolder(path.parent).metrics()
            for name, value in _of_run(rows):
                found[name].append((label, value))
            found["fedfuse_run_active"].append((label, float(is_conducted(path.parent))))
    return "".join(_lines(found))


@contextmanager
def serving(link: SuperLink) -> Iterator[None]:
    """While it lasts, /metrics and /health on this machine's own address, if a port is set.

    /health is 200 while the SuperLink answers, else 503. Raises FederationError.
    """
    port = link.server.settings.metrics.port
    if not port:
        yield
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text, status = "", 404
            if self.path == "/metrics":
                text, status = exposition(link), 200
            elif self.path == "/health":
                status = 200 if link.answers() else 503
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise FederationError(
            f"the figures cannot be served: {error.strerror}",
            where=f"127.0.0.1:{port}",
            hint="see metrics.port in server.toml",
        ) from None
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def _of_run(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    yield "fedfuse_rounds_total", len(rows)
    yield "fedfuse_node_failures_total", sum(len(row["failures"]) for row in rows)
    yield "fedfuse_round_seconds_total", round(sum(row["seconds"] for row in rows), 3)
    yield "fedfuse_sent_bytes_total", sum(row["bytes_sent"] for row in rows)
    yield "fedfuse_received_bytes_total", sum(row["bytes_received"] for row in rows)
    if rows:
        yield "fedfuse_round_nodes", rows[-1]["nodes_ok"]
    if rows and "epsilon" in rows[-1]:
        yield "fedfuse_epsilon", rows[-1]["epsilon"]


def _lines(found: dict[str, list[tuple[str, float]]]) -> Iterable[str]:
    for name, (kind, about) in _HELP.items():
        if found[name]:
            yield f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
            for label, value in found[name]:
                yield f"{name}{label} {value:.15g}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
