"""What a server says of TLS handshakes that fail, with a server as Flower's SuperLink starts it."""

from __future__ import annotations

import os
import socket
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedfuse.federation import handshakes
from fedfuse.federation.certificates import issue, make_authority
from fedfuse.federation.handshakes import Refusals
from fedfuse.federation.knocks import failed_handshake, failed_handshakes
from fedfuse.federation.processes import Process, answers, free_port, wait_until

SERVER = """
import sys, uvicorn
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"well"})
loop, port, key, certificate = sys.argv[1:]
uvicorn.run(app, host="127.0.0.1", port=int(port), loop=loop, lifespan="off", log_level="debug",
            ssl_keyfile=key, ssl_certfile=certificate)
"""


@pytest.fixture(params=["uvloop", "asyncio"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, list[int]]]:
    """The folder of two servers, the second with a certificate that ran out, and their ports."""
    make_authority(tmp_path / "ca.key", tmp_path / "ca.pem", name="ours")
    make_authority(tmp_path / "other.key", tmp_path / "other.pem", name="another")
    (tmp_path / "server.py").write_text(SERVER)
    ports, running = [], []
    try:
        for name, days in (("good", 1.0), ("old", -0.01)):
            issue(
                tmp_path / f"{name}.key", tmp_path / f"{name}.pem", names=["localhost"],
                days=days, authority_key=tmp_path / "ca.key", authority=tmp_path / "ca.pem",
            )  # fmt: skip
            ports.append(port := free_port())
            words = [sys.executable, "-P", "-m", handshakes.__name__, tmp_path / "server.py",
                     request.param, str(port), f"{name}.key", f"{name}.pem"]  # fmt: skip
            running.append(Process(words, environment=os.environ, folder=tmp_path,
                                   log=tmp_path / "log"))  # fmt: skip
        for port, process in zip(ports, running, strict=True):
            wait_until(lambda port=port: answers("127.0.0.1", port), 60, "no server", process)
        yield tmp_path, ports
    finally:
        for process in running:
            process.stop()


def test_whose_handshake_failed_and_why_is_told_once(served: tuple[Path, list[int]]) -> None:
    folder, (port, old) = served
    ours = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    other = ssl.create_default_context(cafile=str(folder / "other.pem"))
    with urllib.request.urlopen(f"https://localhost:{port}/", timeout=20, context=ours) as answer:
        assert answer.read() == b"well"
    for _ in range(3):
        for context, name, where in (
            (other, "localhost", port),
            (ours, "elsewhere", port),
            (ours, "localhost", old),
        ):
            with (
                socket.create_connection(("127.0.0.1", where), timeout=20) as line,
                pytest.raises(ssl.SSLCertVerificationError),
            ):
                context.wrap_socket(line, server_hostname=name)
        for said in (b"POST /v1/fleet/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"PRI * HTTP/2.0\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
                line.sendall(said)
                with suppress(ConnectionError):
                    while line.recv(1000):
                        pass
    log, wanted = folder / "log", (
        "127.0.0.1 does not trust this server's certificate",
        "127.0.0.1 refuses this server's certificate",
        "127.0.0.1 says that this server's certificate ran out",
        "127.0.0.1 speaks without TLS: on a node",
        "127.0.0.1 speaks without TLS, or something else",
    )  # fmt: skip
    wait_until(lambda: len(failed_handshakes(log)) >= len(wanted), 20, "not all is told")
    told = [text for line in log.read_text().splitlines() if (text := failed_handshake(line))]
    assert sorted(told) == sorted(failed_handshakes(log))  # each once, and no other
    assert len(told) == len(wanted)
    for words in wanted:
        assert sum(text.startswith(words) for text in told) == 1, (words, told)
    # Who only looks whether somebody listens is not told of, and the server goes on.
    assert answers("127.0.0.1", port)
    with urllib.request.urlopen(f"https://localhost:{port}/", timeout=20, context=ours) as answer:
        assert answer.read() == b"well"


def test_who_goes_on_trying_is_told_of_seldom_and_a_flood_is_not_looked_at() -> None:
    time, said, looks = [0.0], list[str](), list[str]()
    refusals = Refusals(said.append, lambda: time[0])

    def knock(address: str, reason: str = "TLSV1_ALERT_UNKNOWN_CA") -> None:
        refusals.add(reason, lambda: looks.append(address) or address)

    for _ in range(601):
        knock("10.0.0.1")
        time[0] += 1.0
    assert [text.split(" ")[0] for text in said] == ["10.0.0.1"] * 2
    assert said[1].endswith("599 more times since it was last told)")
    knock("10.0.0.1", "NO_SHARED_CIPHER")
    assert said[2] == "10.0.0.1 fails in TLS (NO_SHARED_CIPHER)"
    looks.clear()
    for number in range(1000):
        knock(f"10.0.1.{number}")
    assert len(looks) <= 20
    for number in range(3000):
        time[0] += 1.0
        knock(f"10.0.2.{number}")
    assert len(refusals._told) <= 1000


def test_what_a_client_asks_for_is_not_taken_for_a_handshake() -> None:
    line = '2026-11-26T03:15:54.552Z INFO [uvicorn.access] 10.0.0.1 - "GET /a turned away: b" 404'
    assert failed_handshake(line) == ""
    assert failed_handshake("2026-11-26T03:15:54Z turned away: 10.0.0.1 x") == "10.0.0.1 x"
