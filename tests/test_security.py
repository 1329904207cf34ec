"""docs/security.md and docs/deploy/ are true: each test and setting that they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.processes import QUIET
from fedfuse.federation.running import supernode_words
from tests.federation.test_nodefile import written

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "docs" / "deploy"


def test_each_defence_names_a_test_that_is_there() -> None:
    pages = ("docs/security.md", "docs/deploy/network.md")
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in tests} == set()
    for path in re.findall(r"`(tests/[\w/.]+)[`:]", text):
        assert (ROOT / path).exists(), path


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit, each with its values."""
    found: dict[str, list[str]] = {}
    text = (DEPLOY / f"{name}.service").read_text(encoding="utf-8").replace("\\\n", " ")
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_the_units_say_what_the_commands_would(tmp_path: Path) -> None:
    vault, supernode = unit("fedfuse-vault"), unit("fedfuse-supernode")
    assert set(supernode["Environment"]) >= {f"{key}={value}" for key, value in QUIET.items()}
    assert vault["User"] != supernode["User"]
    assert vault["Group"] == supernode["SupplementaryGroups"]
    assert vault["RuntimeDirectoryMode"] == ["0750"]
    socket = f"/run/{vault['RuntimeDirectory'][0]}/vault.sock"
    settings = NodeFile.read(
        written(
            tmp_path,
            vault={"socket": socket},
            superlink={"address": "fedfuse.example.org:9092", "ca": "ca.pem", "key": "node.key"},
        )
    )
    ours, theirs = map(str, supernode_words(settings)), shlex.split(supernode["ExecStart"][0])
    assert {w for w in ours if w[:2] == "--"} == {w for w in theirs if w[:2] == "--"}
    assert f'vault="{socket}"' in theirs
    assert socket in (DEPLOY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["fedfuse-vault", "fedfuse-supernode"])
def test_nothing_is_started_again_by_itself(name: str) -> None:
    assert unit(name)["Restart"] == ["no"]
