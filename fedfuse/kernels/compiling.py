"""Compiles the C sources of this folder, once for each instruction set.

    python -m fedfuse.kernels.compiling

does it after an installation without a compiler. Nothing but the standard library is imported: the
build backend runs this file before there is anything else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["LEVELS", "SOURCES", "compile_all", "fingerprint", "library_path"]

_ANY_ORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")

SOURCES = {
    "normals": ("-ffp-contract=off",),
    "norms": ("-ffp-contract=fast", *_ANY_ORDER),
    "products": ("-ffp-contract=fast",),
    "tokens": ("-ffp-contract=fast", *_ANY_ORDER),
}
"""What is compiled, and what liberty is taken with the order of operations in it."""

LEVELS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-DWIDTH=16"),
    "AVX2": ("-march=x86-64-v3", "-DWIDTH=8"),
}
"""By torch's name for what a processor can do; elsewhere there is nothing to gain."""

_COMMON = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-shared",
)


def library_path(folder: Path, source: str, level: str) -> Path:
    """Where the compiled `source` lies."""
    return folder / f"{source}-{level.lower()}.so"


def fingerprint(folder: Path, source: str) -> str:
    """Of the C source; it is compiled into the library, so that neither can be newer."""
    return hashlib.sha256((folder / f"{source}.c").read_bytes()).hexdigest()


def compile_all(folder: Path) -> str:
    """Compiles everything in `folder`. Returns why it was left; an empty text: it was not."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"there are none for {sys.platform} on {platform.machine()}"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return "no C compiler was found (cc, gcc, or CC in the environment)"
    for source, how in SOURCES.items():
        said = f'-DSOURCE="{fingerprint(folder, source)}"'
        for level, flags in LEVELS.items():
            path = library_path(folder, source, level)
            made = path.with_suffix(f".{os.getpid()}")
            command = [*compiler.split(), *_COMMON, *how, *flags, said]
            command += [str(folder / f"{source}.c"), "-o", str(made), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                return f"{compiler}: {error}"
            if done.returncode:
                made.unlink(missing_ok=True)
                return f"{' '.join(command)}: {(done.stderr or 'failed').strip()[:500]}"
            made.replace(path)  # a library that a process has mapped is never written to
    return ""


if __name__ == "__main__":
    why = compile_all(Path(__file__).parent)
    sys.exit(f"fedfuse's kernels are not compiled: {why}" if why else 0)
