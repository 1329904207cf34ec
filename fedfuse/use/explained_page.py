"""Explanations as one HTML page in the style of the privacy report, and as files beside it.

The page needs no script and no network. It shows private records, so everything here is readable by
its owner only.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse import __version__
from fedfuse.data.reading import Channel
from fedfuse.data.table import TableSpec
from fedfuse.data.text import TextSpec, text_of, words_of
from fedfuse.reports.statement import printable
from fedfuse.use.drawings import Content, draw_record, draw_summary
from fedfuse.use.explain import Explained, Explanation
from fedfuse.use.files import private_folder, write_private
from fedfuse.use.trained import Trained

__all__ = ["PRIVATE", "write_explanations"]

PRIVATE = (
    "PRIVATE: this page shows the content of records, their words and pictures among it. It was "
    "made on this machine and nothing of it was sent anywhere. Keep it where the records may be "
    "kept; no privacy budget covers it."
)
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)

_STYLE = (
    "img { max-width: 100%; height: auto; border-radius: 4px; }\n"
    "@media (max-width: 34rem) { .released tr { grid-template-columns: 1fr; } }\n"
)
_HEADS = ("adds", "absent", "another's", "turns", "gap")


def write_explanations(trained: Trained, found: Explained, folder: Path) -> tuple[Path, ...]:
    """Writes index.html, summary.json and summary.png, and of each record record-0001.json and
    .png into `folder`; the files. Rights 0700 and 0600. Raises UsageError where it cannot."""
    private_folder(folder)
    written: dict[str, bytes] = {"summary.png": draw_summary(found)}
    pictures = []
    for one in found.explanations:
        name = f"record-{one.number:04d}"
        picture = draw_record(one, _contents(trained, found, one))
        pictures.append(picture)
        written[f"{name}.png"] = picture
        written[f"{name}.json"] = _json(one.as_dict())
    written["summary.json"] = _json(summary(found))
    html = "".join(_page(found, written["summary.png"], pictures))
    written["index.html"] = html.encode()
    for name, data in written.items():
        write_private(folder / name, data)
    return tuple(folder / name for name in written)


def summary(found: Explained) -> dict[str, Any]:
    """What the records have in common, as plain values."""
    return {
        "private": PRIVATE,
        "training": found.training,
        "records": len(found.explanations),
        "shapley": "exact" if found.exact else "sampled orders, with standard errors",
        "mean_absolute_shapley": {
            name: {"value": value, "records": count}
            for name, (value, count) in found.importance().items()
        },
    }


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode()


def _contents(trained: Trained, found: Explained, one: Explanation) -> dict[str, Content]:
    batch = found.records.dataset.batch(np.array([one.number - 1]))
    channels = {channel.source.name: channel for channel in trained.reading.channels}
    return {
        name: Content(
            kind=channels[name].source.kind,
            values=batch.inputs[name][0].numpy(),
            names=_part_names(found, channels[name], one.number - 1),
        )
        for name in one.within
    }


def _part_names(found: Explained, channel: Channel, place: int) -> list[str]:
    """Of words, or of a table's columns; none where parts have no names."""
    match channel.spec:
        case TextSpec() as spec:
            cell = found.records.rows[place].cells[channel.source.columns[0]]
            return words_of(text_of(found.records.root, cell), spec)
        case TableSpec(columns=columns):
            return [
                name if column.width == 1 else f"{name} = {category}"
                for column in columns
                for name, category in zip(
                    [column.name] * column.width,
                    column.categories if column.width > 1 else ("",),
                    strict=True,
                )
            ]
        case _:
            return []


def _page(found: Explained, overview: bytes, pictures: list[bytes]) -> Iterator[str]:
    css = files("fedfuse.reports").joinpath("privacy.css").read_text(encoding="utf-8")
    how = (
        "exact: every set of modalities was looked at"
        if found.exact
        else "from drawn orders; bars have standard errors"
    )
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<title>Explanations</title>\n'
        f"<style>\n{css}{_STYLE}</style>\n"
        "</head>\n<body>\n<h1>Explanations</h1>\n"
        f'<p class="soft">Why the model said what it said of {len(found.explanations)} records. '
        f"Made by fedfuse {__version__}.</p>\n"
        f'<p class="caution bad">{_e(PRIVATE)}</p>\n'
        f'<p class="caution">Training: {_e(found.training)}</p>\n'
        "<section>\n<h2>All records</h2>\n"
        f"<figure>{_image(overview, 'mean absolute Shapley value of each modality')}"
        "<figcaption>How much each modality moves the answer, whichever way, on average over "
        f"the records that have it. Shapley values are {how}.</figcaption></figure>\n"
        "<h3>How to read it</h3>\n<ul>\n"
        "<li>A modality's Shapley value is what it adds to the answer, on average over all orders "
        "in which the modalities could come in. A record's values sum to its answer less the "
        "answer where nothing is there.</li>\n"
        "<li>Within a modality: integrated gradients, from other records of this manifest to this "
        "one. Blue speaks for what is explained, red against it. The gap is the error of the sum."
        "</li>\n"
        "<li>They tell what the model looked at, not what is so, and not what caused it.</li>\n"
        "</ul>\n</section>\n"
    )
    for one, picture in zip(found.explanations, pictures, strict=True):
        yield from _record(one, picture)
    yield "</body>\n</html>\n"


def _record(one: Explanation, picture: bytes) -> Iterator[str]:
    said = ", ".join(one.prediction) if isinstance(one.prediction, list) else one.prediction
    said = f"{said:.4g}" if isinstance(said, float) else said
    name = one.id or f"line {one.line}"
    yield (
        f'<section id="record-{one.number}">\n<h2>{_e(name)}</h2>\n'
        f'<p class="promise">{_e(str(said) or "none of the labels")}; {_e(one.explained)} '
        f"{one.value:.3g}, and {one.base:.3g} where nothing is there</p>\n"
    )
    if not one.within:
        yield "<p>It has none of the modalities: there is nothing to explain.</p>\n</section>\n"
        return
    yield f"<figure>{_image(picture, f'what counted in record {one.number}')}</figure>\n"
    yield (
        '<table class="released">\n<thead><tr><th>modality</th>'
        + "".join(f'<th class="number">{head}</th>' for head in _HEADS)
        + "</tr></thead>\n<tbody>\n"
    )
    for modality in one.within:
        swap = one.swapped.get(modality)
        error = f" ± {one.errors[modality]:.2g}" if one.errors else ""
        cells = (
            f"{one.shapley[modality]:+.3g}{error}",
            f"{one.absent[modality]:+.3g}",
            f"{swap.change:+.3g}" if swap else "none",
            f"{100 * swap.turned:.0f} %" if swap else "none",
            f"{one.within[modality].gap:+.1g}",
        )
        yield (
            f'<tr><td class="name">{_e(modality)}</td>'
            + "".join(
                f'<td class="number" data-label="{_e(head)}">{cell}</td>'
                for head, cell in zip(_HEADS, cells, strict=True)
            )
            + "</tr>\n"
        )
    yield (
        '</tbody></table>\n<p class="why">Absent, another\'s: how the answer changes where the '
        "modality is left out, or is that of other records; turns: with how many of them the "
        "prediction becomes another one.</p>\n"
    )
    if one.concepts:
        yield "<h3>Concepts</h3>\n<dl>\n"
        for modality, shares in one.concepts.items():
            near = ", ".join(f"{concept} {100 * share:.1f} %" for concept, share in shares.items())
            yield f"<dt>{_e(modality)}</dt><dd>{_e(near)}</dd>\n"
        yield "</dl>\n"
    yield "</section>\n"


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{_e(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _e(text: str) -> str:
    return escape(printable(text))
