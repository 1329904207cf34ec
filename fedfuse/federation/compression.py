"""An update in fewer bytes. What a node sends is computed from its update after the noise, so the
guarantee is what it was: post-processing (Dwork and Roth 2014, proposition 2.1).

With `u = w_i - w`, the way from the round's weights to the node's, all floating-point weights one
after the other in the order of their names, n numbers in p arrays:

    fp16   update: n float16, rounded to nearest; what is beyond its range becomes its largest
    bf16   update: n upper halves of float32 as uint16, rounded to nearest, ties to even
    int8   update: n int8; scales: p float32, each array's largest |u|. A number is rounded up or
           down at random so that its mean is right: QSGD with 127 levels, by the largest instead of
           the 2-norm (Alistarh et al. 2017, arXiv:1610.02132v4, section 3.1)
    topk   places: k rising uint32; values: k float32, the k = ceil(keep n) largest |u|; the others
           count as zero (Stich, Cordonnier, Jaggi 2018, arXiv:1809.07599v2, definition 2.1; without
           their memory, so it is biased)

Weights of other types travel whole, as "whole/NAME". Nothing is taken on trust: the form is the
request's, every shape follows from it and from the model, and an answer in another one is refused.

Not for unit "node" with noise by nodes: there the model's epsilon counts on the noise of a sum of
updates, and a sum of compressed updates is not computed from that sum. With noise by the server the
clipping comes after what is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedfuse.errors import WireError
from fedfuse.federation.wire import Template, Weights, decode, encode
from fedfuse.privacy.noise import NoiseStream

__all__ = ["compress", "expand"]

_LEVELS = 127
_MOST_FP16 = 65504.0
_MOST_BF16 = float(np.uint32(0x7F7F0000).view(np.float32))
_WHOLE = "whole/"
Floats = NDArray[np.float32]


def compress(
    weights: Mapping[str, NDArray[np.generic]],
    start: Mapping[str, NDArray[np.generic]],
    *,
    form: str,
    keep: float,
    stream: NoiseStream,
) -> ArrayRecord:
    """What travels of `weights`, to somebody who has `start`.

    form    one of config.COMPRESSIONS; "none" sends the weights themselves
    keep    the share that "topk" keeps, from 0 to 1
    stream  draws the roundings of "int8"; used for nothing else
    """
    if form == "none":
        return encode(weights)
    names = _floating(start)
    update = np.concatenate(
        [np.zeros(0), *((weights[n].astype("f8") - start[n]).reshape(-1) for n in names)]
    )
    sizes = [start[name].size for name in names]
    parts: dict[str, NDArray[np.generic]] = {}
    match form:
        case "fp16":
            parts["update"] = np.clip(update, -_MOST_FP16, _MOST_FP16).astype(np.float16)
        case "bf16":
            parts["update"] = _upper_half(np.clip(update, -_MOST_BF16, _MOST_BF16))
        case "int8":
            parts["update"], parts["scales"] = _levels(update, sizes, stream)
        case "topk":
            parts["places"], parts["values"] = _largest(update.astype(np.float32), keep)
        case _:
            raise WireError(f"compression = {form!r} is unknown")
    others = {_WHOLE + name: value for name, value in weights.items() if name not in set(names)}
    return encode(parts | others)


def expand(
    arrays: ArrayRecord, start: Weights, template: Template, *, form: str, keep: float
) -> Weights:
    """The weights that `compress` was given, as near as its form comes.

    Raises WireError unless `arrays` are of this form, of the shapes that follow from `template`,
    and lead from `start` to finite weights.
    """
    if form == "none":
        return decode(arrays, template)
    names = _floating(start)
    sizes = [start[name].size for name in names]
    read = decode(arrays, _template(form, keep, template, names, sizes))
    match form:
        case "fp16":
            update: NDArray[np.generic] = read["update"].astype(np.float32)
        case "bf16":
            update = (read["update"].astype(np.uint32) << 16).view(np.float32)
        case "int8":
            update = _from_levels(read["update"], read["scales"], sizes)
        case _:
            update = _from_places(read["places"], read["values"], sum(sizes))
    ends = np.cumsum(sizes)[:-1]
    moved = {name: read[_WHOLE + name] for name in template if _WHOLE + name in read}
    for name, part in zip(names, np.split(update, ends), strict=True):
        first = start[name]
        with np.errstate(over="ignore", invalid="ignore"):
            value = (first + part.reshape(first.shape).astype("f8")).astype(first.dtype)
        if not np.isfinite(value).all():
            raise WireError(f"the update of weight {name!r} leads to values that are not finite")
        moved[name] = value
    return moved


def _template(
    form: str, keep: float, template: Template, names: list[str], sizes: list[int]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The names, shapes and types that an answer of `form` must have."""
    whole = sum(sizes)
    kept: tuple[int, ...] = (_kept(whole, keep),)
    parts: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
        "fp16": {"update": ((whole,), "float16")},
        "bf16": {"update": ((whole,), "uint16")},
        "int8": {"update": ((whole,), "int8"), "scales": ((len(sizes),), "float32")},
        "topk": {"places": (kept, "uint32"), "values": (kept, "float32")},
    }
    floating = set(names)
    return parts[form] | {_WHOLE + n: shape for n, shape in template.items() if n not in floating}


def _floating(start: Mapping[str, NDArray[np.generic]]) -> list[str]:
    return sorted(name for name, value in start.items() if value.dtype.kind == "f")


def _upper_half(update: NDArray[np.float64]) -> NDArray[np.uint16]:
    bits = update.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def _levels(
    update: NDArray[np.float64], sizes: list[int], stream: NoiseStream
) -> tuple[NDArray[np.int8], Floats]:
    parts = np.split(update, np.cumsum(sizes)[:-1])
    scales = np.array([np.abs(part).max(initial=0.0) for part in parts], np.float32)
    # A scale that was rounded down would leave the largest beyond the last level.
    low = np.array([np.abs(part).max(initial=0.0) for part in parts]) > scales
    scales[low] = np.nextafter(scales[low], np.float32(np.inf))
    share = np.repeat(np.where(scales > 0, scales, 1).astype("f8"), sizes)
    levels = np.floor(update / share * _LEVELS + stream.uniform(len(update)))
    return np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8), scales


def _from_levels(
    levels: NDArray[np.generic], scales: NDArray[np.generic], sizes: list[int]
) -> NDArray[np.generic]:
    each, widths = levels.astype(np.float64), scales.astype(np.float64)
    if (widths < 0).any():
        raise WireError("a scale is negative")
    if (each < -_LEVELS).any():
        raise WireError(f"a level is below {-_LEVELS}")
    return each * np.repeat(widths, sizes) / _LEVELS


def _kept(whole: int, keep: float) -> int:
    return min(whole, math.ceil(keep * whole))


def _largest(update: Floats, keep: float) -> tuple[NDArray[np.uint32], Floats]:
    kept = _kept(len(update), keep)
    if not kept:
        return np.zeros(0, np.uint32), update
    places = np.sort(np.argpartition(np.abs(update), len(update) - kept)[len(update) - kept :])
    return places.astype(np.uint32), update[places]


def _from_places(
    places: NDArray[np.generic], values: NDArray[np.generic], whole: int
) -> NDArray[np.generic]:
    where = places.astype(np.int64)
    if len(where) and (where[-1] >= whole or (np.diff(where) <= 0).any()):
        raise WireError("the places of an update do not rise, or lie beyond it")
    update = np.zeros(whole, np.float32)
    update[where] = values
    return update
