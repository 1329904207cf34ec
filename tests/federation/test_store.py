"""The data is decoded by a copy of the process as it would be by the process itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedfuse.data.demo import make_demo
from fedfuse.federation.processes import wait_until
from tests.federation.deployment import running

_SAME = """
import multiprocessing, sys
from dataclasses import replace
from pathlib import Path
from fedfuse.config import RunConfig
from fedfuse.errors import DataError, FederationError
from fedfuse.federation.store import store, store_apart, storing

folder, manifest = Path(sys.argv[1]), sys.argv[2]
config = RunConfig().with_values({"data.manifest": manifest})

(folder / "here").mkdir(), (folder / "there").mkdir()
with store_apart(config, folder / "there", fingerprints=True) as stored:
    assert len(multiprocessing.active_children()) == 1
    there = stored()
assert not multiprocessing.active_children()
here = store(config, folder / "here", fingerprints=True)
assert replace(here, folder=there.folder) == there
files = sorted(p.relative_to(here.folder) for p in here.folder.rglob("*") if p.is_file())
assert len(files) > 10
for file in files:
    assert (here.folder / file).read_bytes() == (there.folder / file).read_bytes(), file
for apart in (True, False):
    with storing(config, fingerprints=True, apart=apart) as stored:
        found = stored()
        assert replace(found, folder=here.folder) == here
        assert found.folder.is_dir()
    assert not found.folder.parent.exists()
assert "torch" not in sys.modules

def killed():
    multiprocessing.active_children()[0].kill()

for problem, manifest, meanwhile in (
    (DataError, manifest + ".no", lambda: None),
    (FederationError, manifest, killed),
    (ZeroDivisionError, manifest, lambda: 1 / 0),
):
    wrong = config.with_values({"data.manifest": manifest})
    try:
        with store_apart(wrong, folder / "there", fingerprints=False) as stored:
            meanwhile()
            stored()
    except Exception as error:
        assert type(error) is problem, error
        print(str(error).splitlines()[0])
    assert not multiprocessing.active_children()
"""


def test_a_copy_stores_the_same_and_tells_what_is_wrong(tmp_path: Path) -> None:
    manifest = make_demo(tmp_path / "data", records=120, clients=3)
    words = [sys.executable, "-c", _SAME, str(tmp_path), str(manifest)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, killed, meanwhile = done.stdout.splitlines()
    assert missing.startswith(f"{manifest}.no: ")
    assert killed == ("data.manifest: the process that decodes the data was ended (exit code -9)")
    assert meanwhile == "division by zero"


_KILLED = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from fedfuse.config import RunConfig
from fedfuse.federation.store import store_apart

config = RunConfig().with_values({"data.manifest": sys.argv[2]})
with store_apart(config, Path(sys.argv[1]), fingerprints=False):
    (copy,) = multiprocessing.active_children()
    while True:  # until it ignores Ctrl-C, which it does when it is tied to this process
        lines = Path(f"/proc/{copy.pid}/status").read_text().splitlines()
        if int(next(line for line in lines if line.startswith("SigIgn")).split()[1], 16) & 2:
            break
        time.sleep(0.01)
    os.kill(copy.pid, signal.SIGSTOP)
    Path(sys.argv[1], "pid").write_text(str(copy.pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_copy_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    manifest = make_demo(tmp_path / "data", records=600, clients=3)
    words = [sys.executable, "-c", _KILLED, str(tmp_path), str(manifest)]
    assert subprocess.call(words) == -9
    copy = int((tmp_path / "pid").read_text())
    wait_until(lambda: not running(copy), 10, "the copy is left over")
