"""What a finished run says at its end: how good, how private, and where everything is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

__all__ = ["describe", "say"]

WIDTH = 100
INDENT = 11

FILES = {
    "summary.json": "this summary, for scripts",
    "config.toml": "the whole configuration: fedfuse simulate config.toml runs it again",
    "metrics.jsonl": "one line a round",
    "events.jsonl": "the books: what each node spent in each round",
    "heads.jsonl": "what each node's ledger ended with, round by round",
    "progress.jsonl": "what happened when",
    "model.safetensors": "the trained weights",
    "model.toml": "what they are the weights of",
    "reading.json": "how a record is read for them: fedfuse predict uses it",
    "calibration.json": "what its sets and intervals rest on",
    "plots/metrics.png": "metric and loss by round",
    "plots/privacy.png": "epsilon by round",
}


def say(summary: Mapping[str, Any], run: Path, *, as_json: bool, quiet: bool) -> None:
    """Prints what is asked for: JSON, or where the run lies, or all that `describe` has."""
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        click.echo(run if quiet else describe(summary, run))


def describe(summary: Mapping[str, Any], run: Path) -> str:
    """The end of a run as text, from its summary and its folder."""
    return "\n".join(_lines(summary, run))


def _lines(summary: Mapping[str, Any], run: Path) -> Iterator[str]:
    headline = summary["headline"]
    yield ""
    if headline["value"] is not None:
        result = f"{headline['value']:.4g}"
        if summary.get("majority") is not None:
            result += f"  (the best constant answer: {summary['majority']:.4g})"
        yield _row(headline["name"], result)
    others = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in summary["metrics"].items()
        if name != headline["name"] and isinstance(value, int | float)
    ]
    if others:
        yield _row("", ", ".join(others))
    privacy = summary["privacy"]
    if not privacy["private"]:
        why = privacy["statement"].removeprefix("NOT PRIVATE: ")
        yield _row("privacy", f"*** NOT PRIVATE ***  {why}")
    else:
        yield _row("privacy", privacy["statement"])
    if summary.get("bytes_received"):
        from fedfuse.cli.progress import size

        sent, received = size(summary["bytes_sent"]), size(summary["bytes_received"])
        yield _row("bytes", f"{received} from the nodes, {sent} to them, all rounds together")
    for name in ("assumptions", "notes"):
        for index, text in enumerate(summary.get(name) or ()):
            yield _row(name if not index else "", f"- {text}")
    yield _row("run", str(run))
    there = {name: about for name, about in FILES.items() if (run / name).is_file()}
    width = max(map(len, there), default=0)
    for name, about in there.items():
        yield f"{'':{INDENT}}  {name:<{width}}  {about}"


def _row(name: str, text: str) -> str:
    """`name` in the left column, `text` wrapped in the right one."""
    label = name.replace("_", " ")
    first = f"{label:<{INDENT}}  "
    return textwrap.fill(
        text,
        width=WIDTH,
        initial_indent=first,
        subsequent_indent=" " * (INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
