"""`fedfuse doctor`: what is installed here, what works, and how to get what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated

import click
import typer

from fedfuse import __version__

LOW_DISK_GB = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """"ok"; "note": it works, but read it; "optional": absent, and needed for extras only;
    "missing": fedfuse does not work without it."""
    found: str
    hint: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed, which devices there are, and how to get what is missing.

    Exit code 0: everything that fedfuse needs is there. 1: something is missing.

    Example: fedfuse doctor
    """
    findings = list(examine())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.state:<8}  {finding.name:<{width}}  {finding.found}")
            if finding.hint:
                click.echo(f"{'':<8}  {'':<{width}}  hint: {finding.hint}")
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing:
        click.echo(f"missing: {', '.join(missing)}", err=True)
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Each finding, in the order in which to mend them."""
    yield Finding(name="fedfuse", state="ok", found=f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding(
        name="python", state="ok", found=f"{platform.python_version()} ({sys.executable})"
    )
    yield from _packages()
    yield _devices()
    if "torch" in sys.modules:
        yield _kernels()
    yield _audio()
    yield _memory()
    yield _disk()


def _packages() -> Iterator[Finding]:
    """What the installed fedfuse declares that it needs, and what its extras add."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("fedfuse") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            name="packages",
            state="missing",
            found="fedfuse is not installed, only found",
            hint="python -m pip install -e .",
        )
        return
    for extra in ("", "ray", "partition", "video"):
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            of_extra = marker is not None and not marker.evaluate({"extra": ""})
            if of_extra != bool(extra) or (marker and not marker.evaluate({"extra": extra})):
                continue
            yield _package(requirement.name, str(requirement.specifier), extra)


def _package(name: str, wanted: str, extra: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    absent = "optional" if extra else "missing"
    install = f"python -m pip install 'fedfuse[{extra}]'" if extra else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(
            name=name,
            state=absent,
            found=f"not installed (wants {wanted})",
            hint=install or f"python -m pip install '{name}{wanted}'",
        )
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(
            name=name,
            state=absent,
            found=f"{version}, but {wanted} is wanted",
            hint=f"python -m pip install '{name}{wanted}'",
        )
    return Finding(name=name, state="ok", found=version)


def _devices() -> Finding:
    try:
        torch = import_module("torch")
    except Exception as error:
        return Finding(
            name="devices",
            state="missing",
            found=f"torch does not load: {_one_line(error)}",
            hint="install torch again: python -m pip install --force-reinstall torch",
        )
    cores = f"{os.cpu_count()} CPU cores"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Finding(name="devices", state="ok", found=f"{cores}, no GPU that torch can use")
    names = ", ".join(
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        f" ({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
        for index in range(count)
    )
    return Finding(name="devices", state="ok", found=f"{cores}, {names}")


def _kernels() -> Finding:
    """Whether private steps on a CPU take the compiled kernels, which are for some processors."""
    from fedfuse.kernels.compiling import SOURCES
    from fedfuse.kernels.library import why_not

    why = next((why for source in SOURCES if (why := why_not(source))), "")
    if not why:
        return Finding(name="kernels", state="ok", found="compiled for this processor")
    return Finding(
        name="kernels",
        state="note",
        found=f"torch and NumPy compute everything, more slowly: {why}",
    )


def _audio() -> Finding:
    """Whether spectrograms work: a torchaudio is bound to one build of torch."""
    try:
        from fedfuse.torchaudio_compat import load_torchaudio

        torch, torchaudio = import_module("torch"), load_torchaudio()
        mel = torchaudio.transforms.MelSpectrogram(sample_rate=8000, n_fft=256, n_mels=20)
        mel(torch.zeros(1, 1024))
    except Exception as error:
        return Finding(
            name="audio",
            state="missing",
            found=f"torchaudio makes no spectrogram: {_one_line(error)}",
            hint="install the torchaudio that fits your torch",
        )
    compiled = getattr(sys.modules.get("torchaudio._extension"), "__file__", None) is not None
    found = "torchaudio makes spectrograms"
    if compiled:
        return Finding(name="audio", state="ok", found=found)
    return Finding(
        name="audio",
        state="ok",
        found=f"{found}; its compiled part is for another torch, and is not needed",
    )


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return Finding(name="memory", state="note", found="not known on this system")
    return Finding(name="memory", state="ok", found=f"{total:.1f} GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    found = f"{free:.1f} GiB free in {Path.cwd()}"
    if free >= LOW_DISK_GB:
        return Finding(name="disk", state="ok", found=found)
    return Finding(name="disk", state="note", found=found, hint="runs go to --out on another disk")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
