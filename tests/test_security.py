"""docs/security.md and docs/deploy/ are true: each test and setting that they name is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml

from fedfuse.cli import app
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.processes import QUIET
from fedfuse.federation.running import WHOLE, supernode_words
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
    program = theirs.index("/opt/fedfuse/bin/flower-supernode")
    assert theirs[1:program] == list(WHOLE[1:])
    assert socket in (DEPLOY / "README.md").read_text(encoding="utf-8")


def test_a_supernode_is_started_again_and_a_vault_is_not() -> None:
    assert unit("fedfuse-vault")["Restart"] == ["no"]
    supernode = unit("fedfuse-supernode")
    assert supernode["Restart"] == ["on-failure"]
    assert supernode["StartLimitBurst"] == ["60"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.stem)
def test_systemd_understands_the_units(path: Path, tmp_path: Path) -> None:
    """With the programs of this installation in the place of /opt/fedfuse."""
    for each in DEPLOY.glob("*.service"):
        text = each.read_text().replace("/opt/fedfuse/bin", str(Path(sys.executable).parent))
        (tmp_path / each.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / path.name],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


def test_the_containers_are_of_the_flower_that_is_tested() -> None:
    tree = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    recipe = tree["services"]["superlink"]["build"]["dockerfile_inline"]
    assert f"FROM flwr/superlink:{version('flwr')}\n" in recipe
    assert set(tree["services"]["proxy"]["depends_on"]) <= set(tree["services"])


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="docker compose is not installed",
)
def test_docker_compose_understands_its_file() -> None:
    words = ["docker", "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "docs" / "server.md", ROOT / "docs" / "node.md", *sorted(DEPLOY.iterdir())]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_command_and_option_that_an_operator_is_told_is_there(path: Path) -> None:
    root = typer.main.get_command(app)
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    for words in re.findall(r"\bfedfuse (?=[a-z])([^`#\n;)]*)", text):
        group, *rest = words.split()
        command = root.commands.get(group)  # type: ignore[attr-defined]
        if command is None:  # a sentence about fedfuse
            continue
        if hasattr(command, "commands"):
            names = rest[0].split("|") if rest else []
            assert set(names) <= set(command.commands), words
            if len(names) != 1:
                continue
            command = command.commands[names[0]]
        options = {name for parameter in command.params for name in parameter.opts}
        used = {word.rstrip(",.:") for word in rest if word.startswith("--")}
        assert used <= options | {"--help"}, words
