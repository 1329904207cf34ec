"""The build backend's step that compiles the kernels; without a compiler it says so."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["KernelsHook"]


class KernelsHook(BuildHookInterface[Any]):
    """Runs before a wheel is put together, also an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """A wheel that holds compiled kernels is one for this platform."""
        folder = Path(self.root) / "fedfuse" / "kernels"
        why = runpy.run_path(str(folder / "compiling.py"))["compile_all"](folder)
        if why:
            self.app.display_warning(f"fedfuse is slower without its kernels: {why}")
            return
        build_data["artifacts"].append("fedfuse/kernels/*.so")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
