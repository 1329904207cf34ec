"""Audio: a file to a log-mel spectrogram or its cepstrum, on one scale by its own frames."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedfuse.data.media import read_bytes
from fedfuse.data.torchaudio_compat import load_torchaudio
from fedfuse.errors import DataError

__all__ = ["SUFFIXES", "AudioSpec", "audio_facts", "log_mel", "read_waveform"]

SUFFIXES = frozenset({".wav", ".wave", ".flac", ".ogg", ".mp3", ".aiff", ".aif"})
WINDOW_S = 0.032
HOP_S = 0.016


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioSpec:
    """`rate` in samples a second, length `seconds`, `bands` mel bands, `frames` spectra; of each
    spectrum so many cepstral `coefficients` (MFCC), 0: the bands themselves."""

    rate: int
    seconds: float
    bands: int
    frames: int
    coefficients: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(bands or coefficients, frames)."""
        return self.coefficients or self.bands, self.frames

    @property
    def samples(self) -> int:
        """The length in samples."""
        return max(1, round(self.rate * self.seconds))

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return max(1, math.ceil(self.samples / self.frames))


def read_waveform(path: Path, spec: AudioSpec) -> tuple[NDArray[np.float32], int]:
    """(mono samples in [-1, 1], cut to at most spec.samples; the file's own rate).

    Raises DataError where the file is empty, no audio, cut off, or holds NaN or inf.
    """
    samples, rate = _read(path)
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise DataError(f"audio {path.name} holds NaN or inf", hint="export it again")
    if rate != spec.rate:
        resample = _resampler(rate, spec.rate)
        mono = resample(torch.from_numpy(mono)).numpy()
    return mono[: spec.samples], rate


def log_mel(waves: Sequence[NDArray[np.float32]], spec: AudioSpec) -> NDArray[np.float32]:
    """B waveforms of up to spec.samples to (B, *spec.shape): the log10 mel power spectrum.

    Each record is brought to mean 0 and standard deviation 1 by its own frames, and the frames
    after its end are 0. Nothing of it rests on other records; a short sound's silence neither
    fills the scale nor tells how loud the recording was.

    With `spec.coefficients` it is the mel cepstrum (Davis and Mermelstein 1980), the orthogonal
    DCT-II of each spectrum, and each coefficient has mean 0 and deviation 1 over the record.
    """
    if not len(waves):
        return np.zeros((0, *spec.shape), dtype=np.float32)
    padded = np.zeros((len(waves), spec.samples), dtype=np.float32)
    heard = np.zeros((len(waves), 1, spec.frames), dtype=np.float32)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave
        heard[row, 0, : max(1, math.ceil(len(wave) / spec.hop))] = 1
    with torch.no_grad():
        power = _mel(spec)(torch.from_numpy(padded))[..., : spec.frames]
        level = torch.log10(power + 1e-6).numpy()
    level = np.pad(level, ((0, 0), (0, 0), (0, spec.frames - level.shape[-1])))
    over: tuple[int, ...] = (1, 2)
    if spec.coefficients:
        basis = load_torchaudio().functional.create_dct(spec.coefficients, spec.bands, "ortho")
        level, over = np.einsum("bmt,mk->bkt", level, basis.numpy()), (2,)
    count = np.broadcast_to(heard, level.shape).sum(over, keepdims=True)
    centred = (level - (level * heard).sum(over, keepdims=True) / count) * heard
    spread = np.sqrt((centred**2).sum(over, keepdims=True) / count)
    return np.asarray(centred / (spread + 1e-3), dtype=np.float32)


def audio_facts(path: Path) -> tuple[int, float]:
    """(rate in samples a second, length in seconds) of a file. Raises DataError."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(read_bytes(path)))
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError):
        raise _undecodable(path) from None
    rate = _plausible(path, int(info.samplerate))
    return rate, float(info.frames) / rate


def _read(path: Path) -> tuple[NDArray[np.float32], int]:
    import soundfile

    data = read_bytes(path)
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, MemoryError):
        raise _undecodable(path) from None
    if not len(samples):
        raise DataError(f"audio {path.name} holds no samples", hint="copy it again")
    if _wav_cut_off(data):
        raise DataError(f"audio {path.name} is cut off", hint="copy it again")
    return samples, _plausible(path, int(rate))


def _plausible(path: Path, rate: int) -> int:
    if not 100 <= rate <= 768_000:
        raise DataError(
            f"audio {path.name} says that it has {rate} samples a second", hint="export it again"
        )
    return rate


def _undecodable(path: Path) -> DataError:
    return DataError(
        f"audio {path.name} cannot be decoded", hint="is it complete? WAV, FLAC and OGG are read"
    )


def _wav_cut_off(data: bytes) -> bool:
    """Whether a WAV file announces more samples than it has; libsndfile reads on silently."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return False
    place = 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"data":
            streamed = length in (0, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000)
            return not streamed and place + 8 + length > len(data)
        place += 8 + length + length % 2
    return True


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> Any:
    # The kernel grows with both terms of the ratio: 44101 to 8000 Hz would take a gigabyte. A
    # nearby ratio of small terms changes the pitch by less than one part in a thousand.
    ratio = Fraction(target, source).limit_denominator(2000)
    return load_torchaudio().transforms.Resample(ratio.denominator, max(1, ratio.numerator))


@lru_cache(maxsize=16)
def _mel(spec: AudioSpec) -> Any:
    window = max(16, round(WINDOW_S * spec.rate))
    n_fft = 1 << (window - 1).bit_length()
    while spec.rate / n_fft > _narrowest_band(spec) and n_fft < 1 << 15:
        n_fft *= 2  # otherwise the lowest mel bands would hold no frequency at all
    return load_torchaudio().transforms.MelSpectrogram(
        sample_rate=spec.rate,
        n_fft=n_fft,
        win_length=window,
        hop_length=spec.hop,
        n_mels=spec.bands,
        normalized=True,
        pad_mode="constant",
    )


def _narrowest_band(spec: AudioSpec) -> float:
    """Hz between the lowest two mel bands (HTK scale)."""
    step = math.log10(1 + spec.rate / 2 / 700) / (spec.bands + 1)
    return float(700 * (10**step - 1))
