"""Fixed features: cosine terms of pictures and of time, with nothing to learn.

Cosine terms (Ahmed, Natarajan and Rao 1974; over the bands of a log-mel spectrogram: its mel
cepstrum, Davis and Mermelstein 1980) have no parameters, so they learn nothing of anybody and carry
no noise: with a promise, good fixed features are worth more than deep learned ones (Tramer and
Boneh 2021, arXiv:2011.11660v3).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cosine_terms", "cosines", "frame_terms", "over_time"]


def cosines(length: int, terms: int) -> Tensor:
    """(min(terms, length), length): the first rows of the orthogonal DCT-II, but for the scale of
    row 0. By numpy: where a model is only counted, on torch's device "meta", arithmetic of torch
    would first load sympy, which takes a second and 43 MB."""
    place = np.arange(length) + 0.5
    order = np.arange(min(terms, length))[:, None]
    rows = np.cos(math.pi * order * place / length) * math.sqrt(2 / length)
    return torch.from_numpy(rows.astype(np.float32))


def cosine_terms(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, C, H, W), (K, H), (L, W) -> (B, C K L), of a deviation of one half."""
    terms = torch.einsum("kh,bchw,lw->bckl", rows, x, columns).flatten(1)
    return 0.5 * F.layer_norm(terms, terms.shape[1:])


def frame_terms(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, T, C, H, W), (K, H), (L, W) -> (B, T, C K L), the cosine terms of each frame."""
    terms = cosine_terms(x.flatten(0, 1), rows, columns)
    return terms.view(*x.shape[:2], terms.shape[1])


def over_time(frames: Tensor, times: Tensor) -> Tensor:
    """(B, T, F), (K, T) cosines -> (B, K F): the mean of each feature, and how it goes up and down
    over time."""
    return torch.einsum("kt,btf->bkf", times, frames).flatten(1) / math.sqrt(2 * times.shape[1])
