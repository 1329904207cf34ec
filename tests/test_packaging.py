"""What is shipped: a wheel with fedfuse alone, a Flower app bundle without it, one version."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fedfuse
from fedfuse.config import RunConfig

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv", "runs", "build", "dist", "__pycache__", ".*_cache", ".hypo*", "*.so")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is, in a folder with a name that Flower accepts."""
    folder = tmp_path_factory.mktemp("copy") / "fedfuse"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


def test_the_version_is_the_same_in_both_places(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == fedfuse.__version__


def test_flower_is_told_of_each_setting_and_its_default(project: dict[str, Any]) -> None:
    from flwr.common.config import flatten_dict

    declared = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    defaults = RunConfig().to_flat()
    assert declared == defaults
    assert {k: type(v) for k, v in declared.items()} == {k: type(v) for k, v in defaults.items()}


def test_the_wheel_holds_only_fedfuse(copy: Path, tmp_path: Path) -> None:
    words = ("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy)
    subprocess.run(
        [sys.executable, *map(str, words)], check=True, capture_output=True, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    dist_info = f"fedfuse-{fedfuse.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"fedfuse", dist_info}
    assert {"fedfuse/py.typed", "fedfuse/cli/__init__.py", f"{dist_info}/licenses/LICENSE"} <= {
        *names
    }
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]
    compiled = {name for name in names if name.endswith(".so")}
    assert wheel.stem.endswith("-linux_x86_64" if compiled else "-none-any")
    if shutil.which("cc") and platform.machine() == "x86_64":
        assert "fedfuse/kernels/products-avx512.so" in compiled


def test_the_app_bundle_holds_only_the_two_apps(
    copy: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [flwr, "build", "--app", copy],
        cwd=tmp_path,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
    assert {"pyproject.toml", ".info/CONTENT"} <= names
    apps = names - {"pyproject.toml", ".info/CONTENT"}
    assert {name.split("/")[0] for name in apps} == {"server", "clients"}
    components = project["tool"]["flwr"]["app"]["components"]
    for target in (components["serverapp"], components["clientapp"]):
        module, name = target.split(":")
        path = f"{module.replace('.', '/')}.py"
        assert path in apps
        # Flower looks for the assignment in the file's text, without running it.
        assert re.search(rf"^{name} = ", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_constraints_pin_what_make_installs_first() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert f" {pinned.group()}\n" in makefile
