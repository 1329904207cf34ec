"""Kernels are compiled at installation where they can be, and used only where they belong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedfuse.kernels import compiling, library
from fedfuse.kernels.compiling import compile_all, library_path

compiles = pytest.mark.skipif(
    shutil.which("cc") is None or os.uname().machine != "x86_64", reason="no C compiler for x86-64"
)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sources, with nothing compiled, where the kernels are looked for."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(library.FOLDER, tmp_path / "kernels", ignore=left_out)
    monkeypatch.setattr(library, "FOLDER", tmp_path / "kernels")
    yield tmp_path / "kernels"
    library._found.cache_clear()


def said() -> str:
    """Why a fresh process would have no kernels."""
    library._found.cache_clear()
    return library.why_not("products")


@compiles
def test_they_are_used_once_compiled_until_their_source_changes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.backends.cpu.get_cpu_capability() not in compiling.LEVELS:
        pytest.skip("this processor has no use for them")
    assert "not compiled" in said()
    subprocess.run([sys.executable, copy / "compiling.py"], check=True)
    made = sorted(path.name for path in copy.glob("*.so"))
    assert made == sorted(
        library_path(copy, source, level).name
        for source in compiling.SOURCES
        for level in compiling.LEVELS
    )
    assert said() == ""
    with monkeypatch.context() as patch:
        patch.setenv("FEDFUSE_KERNELS", "0")
        assert "declined" in said()
    source = copy / "products.c"
    source.write_text(source.read_text() + "/* changed */\n")
    assert "another source" in said()


def test_a_file_that_is_no_library_is_said_to_be_so(copy: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in compiling.LEVELS:
        pytest.skip("this processor has no use for them")
    for level in compiling.LEVELS:
        library_path(copy, "products", level).write_bytes(b"not a library")
    assert "can't be loaded" in said()


def test_without_a_compiler_it_is_said_and_nothing_is_left(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(copy))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in compile_all(copy) or "there are none for" in compile_all(copy)
    monkeypatch.setenv("CC", str(copy / "absent"))
    assert "absent" in compile_all(copy) or "there are none for" in compile_all(copy)
    assert not list(copy.glob("*.so*"))


@compiles
def test_a_source_that_does_not_compile_leaves_what_was_there(copy: Path) -> None:
    (copy / "products.c").write_text("int outer(void) { return missing; }\n")
    assert "missing" in compile_all(copy)
    left = [*copy.glob("products*.so"), *copy.glob(f"*.{os.getpid()}")]
    assert not left
