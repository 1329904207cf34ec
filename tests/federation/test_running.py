"""A SuperNode that ends is started again, as long as there is hope; the vault stays as it is."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

from fedfuse.errors import FederationError
from fedfuse.federation import running
from fedfuse.federation.newnode import Equipment, equip, prepared_store
from fedfuse.federation.nodefile import node_file
from fedfuse.federation.processes import Process, environment, free_port, program, wait_until
from fedfuse.federation.running import Restarts, run_node
from tests.federation.conftest import write_manifest
from tests.federation.deployment import processes, words_of

SUPERNODE = """
import os, sys, threading, time
from pathlib import Path
count = Path("count")
number = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (number + 1))
def fails():
    raise ValueError("a thread failed")
match number:
    case 0:
        print("SuperNode ID: 7")
        sys.exit(3)
    case 1:
        os.kill(os.getpid(), 9)
    case 2:  # as Flower's, where the SuperLink answers 500: nothing is asked for any more
        threading.Thread(target=time.sleep, args=(60,)).start()
        print("Server error '500 Internal Server Error' for url 'https://...'")
    case 3:
        threading.Thread(target=fails).start()
        time.sleep(60)
    case _:
        print("[code: 2004] Attempted with public key")
        sys.exit(1)
"""


def test_who_watches_a_node_loads_no_torch() -> None:
    code = "import sys, fedfuse.federation.running; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_pauses_grow_and_end_where_nothing_helps() -> None:
    restarts = Restarts()
    pauses = [restarts.pause_s(5.0) for _ in range(20)]
    assert pauses[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert pauses[9:] == [300] * 10 + [None]
    restarts = Restarts()
    pauses = [restarts.pause_s(5.0, forgotten=True) for _ in range(16)]
    assert pauses == [1, 2, 4] + [8] * 12 + [None]
    restarts = Restarts()
    for _ in range(100):  # each had been at work before it ended
        assert (restarts.pause_s(5.0), restarts.pause_s(5.0), restarts.pause_s(61.0)) == (1, 2, 1)
        restarts = Restarts()
    assert [Restarts().pause_s(3600.0) for _ in range(100)] == [1] * 100


def test_a_supernode_is_started_again_until_it_is_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, told, vaults = tmp_path / "site", list[str](), set[int]()
    equip(node, Equipment(name="site", unit="record", max_epsilon=8.0, delta=1e-5, servers=("any",),
                          address="localhost:1", insecure=True))  # fmt: skip
    prepared_store(node_file(node), write_manifest(tmp_path), None)
    ledger = (node / "ledger").read_bytes()
    script = tmp_path / "supernode.py"
    script.write_text(SUPERNODE)
    monkeypatch.setattr(running, "supernode_words", lambda settings: [script])
    monkeypatch.setattr(running, "_FIRST_S", 0.01)
    monkeypatch.setattr(running, "_LOOK_S", 0.05)

    def tell(text: str) -> None:
        told.append(text)
        vaults.update(pid for pid in processes(node) if b"--only\0vault" in words_of(pid))

    with pytest.raises(FederationError, match="does not know this node's key") as caught:
        run_node(node_file(node), tell)
    assert "as 16 did soon after their start, so the vault was stopped too" in caught.value.what
    again = [text for text in told if "started again" in text]
    assert [text.partition("; it is")[0] for text in again[:4]] == [
        "the SuperNode ended with code 3",
        "the SuperNode was ended by signal 9",
        "the SuperNode ended with code 1 (the server answers with an error of its own: its "
        "superlink.log says which)",
        "the SuperNode ended with code 1",
    ]
    assert len(again) == 15
    assert all("which passes in a minute" in text for text in again[4:])
    assert "ValueError: a thread failed" in (node / "supernode.log").read_text()
    assert len(vaults) == 1
    assert (node / "ledger").read_bytes() == ledger
    assert list(processes(node)) == []


@pytest.mark.parametrize("said", running._REFUSALS)
def test_a_node_that_never_got_through_is_not_started_again(said: str, tmp_path: Path) -> None:
    log, told = tmp_path / "log", list[str]()
    words = ["/bin/sh", "-c", f"echo '{said}'; exit 1"]
    with Process(words, environment=os.environ, folder=tmp_path, log=log) as supernode:
        wait_until(lambda: supernode.ended is not None, 20, "it goes on")
        with pytest.raises(FederationError, match="the SuperNode ended with code 1"):
            running._pause_after(supernode, 0, Restarts(), 5.0, told.append)
    assert told == []


class Failing(http.server.BaseHTTPRequestHandler):
    """Lets a node in, and answers 500 to `what`."""

    what = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = self.path.rpartition("/")[2]
        body = {
            "activate-node": ActivateNodeResponse(node_id=7).SerializeToString(),
            "send-node-heartbeat": SendNodeHeartbeatResponse(success=True).SerializeToString(),
        }.get(call, b"")
        self.send_response(500 if call == self.what else 200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *what: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pull-messages", "send-node-heartbeat"])
def test_a_supernode_ends_where_its_server_fails(what: str, tmp_path: Path) -> None:
    """Flower's own program by itself stays, and asks for nothing any more, or seems to be gone."""
    log = tmp_path / "log"
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("FailsAt", (Failing,), {"what": what})
    )
    with server, ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever)
        words = [
            *(*running.WHOLE, program("flower-supernode"), "--insecure"),
            *("--superlink", f"127.0.0.1:{server.server_address[1]}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ]
        with Process(
            words, environment=environment(tmp_path), folder=tmp_path, log=log
        ) as supernode:
            try:
                wait_until(lambda: supernode.ended is not None, 60, "it stays")
            finally:
                server.shutdown()
            assert supernode.ended == 1
    assert re.search(rf"Server error '500 .*/v1/fleet/{what}'", log.read_text())
