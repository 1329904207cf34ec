"""Audio: a file to a log-mel spectrogram or its cepstrum, on one scale by its own frames."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fedfuse.data.decoder import AT_ONCE, Decoder, Read
from fedfuse.data.media import media_path, read_bytes
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = ["AudioSpec", "audio_facts", "log_mel", "padded_waves", "read_waveform"]

WINDOW_S = 0.032
HOP_S = 0.016
_USUAL_S = 10.0
"""Seconds, at most, where neither a setting nor a declaration says more."""
_SAMPLES = 1 << 23
"""Read at once at most, so that memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioSpec(Decoder):
    """`rate` in samples a second, length `seconds`, `bands` mel bands, `frames` spectra; of each
    spectrum so many cepstral `coefficients` (MFCC), 0: the bands themselves."""

    rate: int
    seconds: float
    bands: int
    frames: int
    coefficients: int = 0
    features: str = "mel"
    """As data.audio_features."""

    suffixes: ClassVar = frozenset({".wav", ".wave", ".flac", ".ogg", ".mp3", ".aiff", ".aif"})

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """The usual rate and the longest sound, at most ten seconds."""
        said = source.declared
        rate = config.sample_rate or said.sample_rate
        seconds = config.audio_seconds or said.seconds
        if not rate or not seconds:
            what = "sample rate and length" if not rate and not seconds else (
                "length" if rate else "sample rate"
            )  # fmt: skip
            facts, held = probe.look_at_files(source, audio_facts, what)
            facts = facts or [(8000, 1.0)]  # nothing readable: each record becomes a problem
            rate = rate or Counter(fact[0] for fact in facts).most_common(1)[0][0]
            if not seconds:
                seconds = min(max(fact[1] for fact in facts), _USUAL_S) if held else 1.0
        return cls(
            rate=rate,
            seconds=seconds,
            bands=config.mel_bands,
            frames=config.mel_frames or max(1, math.ceil(round(seconds / HOP_S, 6))),
            coefficients=config.mfcc if config.audio_features == "mfcc" else 0,
            features=config.audio_features,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(bands, frames), (coefficients, frames), or (samples,)."""
        if self.features == "wave":
            return (self.samples,)
        return self.coefficients or self.bands, self.frames

    @property
    def at_once(self) -> int:
        """Few, where sounds are long."""
        return max(1, min(AT_ONCE, _SAMPLES // self.samples))

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The waveform. Raises DataError."""
        wave, rate = read_waveform(media_path(root, cells[0]), self)
        differs = said.sample_rate and rate != said.sample_rate
        what = f"{rate} samples a second, but {said.sample_rate} are declared: it is resampled"
        return Read(wave, what if differs else "")

    def stack(self, values: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """Waveforms become spectra together."""
        waves = [np.asarray(wave, dtype=np.float32) for wave in values]
        return padded_waves(waves, self) if self.features == "wave" else log_mel(waves, self)

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
        mono = _resampled(mono, rate, spec.rate)
    return mono[: spec.samples], rate


def padded_waves(waves: Sequence[NDArray[np.float32]], spec: AudioSpec) -> NDArray[np.float32]:
    """B waveforms of up to spec.samples to (B, samples), 0 after each one's end."""
    padded = np.zeros((len(waves), spec.samples), dtype=np.float32)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave
    return padded


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
    padded = padded_waves(waves, spec)
    heard = np.zeros((len(waves), 1, spec.frames), dtype=np.float32)
    for row, wave in enumerate(waves):
        heard[row, 0, : max(1, math.ceil(len(wave) / spec.hop))] = 1
    level = np.log10(_power(padded, spec) + 1e-6)
    level = np.pad(level, ((0, 0), (0, 0), (0, spec.frames - level.shape[-1])))
    over: tuple[int, ...] = (1, 2)
    if spec.coefficients:
        level, over = _cosines(spec) @ level, (2,)
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


def _resampled(wave: NDArray[np.float32], source: int, target: int) -> NDArray[np.float32]:
    import torch  # for other rates only: most sounds are read without it

    found: NDArray[np.float32] = _resampler(source, target)(torch.from_numpy(wave)).numpy()
    return found


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> Any:
    from fedfuse.torchaudio_compat import load_torchaudio

    # The kernel grows with both terms of the ratio: 44101 to 8000 Hz would take a gigabyte. A
    # nearby ratio of small terms changes the pitch by less than one part in a thousand.
    ratio = Fraction(target, source).limit_denominator(2000)
    return load_torchaudio().transforms.Resample(ratio.denominator, max(1, ratio.numerator))


def _power(padded: NDArray[np.float32], spec: AudioSpec) -> NDArray[np.float32]:
    """(B, samples) to (B, bands, T): the mel power spectra of the first T <= spec.frames frames,
    of which frame t is centred at t * spec.hop. What torchaudio's MelSpectrogram gives,
    normalized by the window, without loading it."""
    window, filters = _window(spec), _filters(spec)
    around = np.pad(padded, ((0, 0), (len(window) // 2, len(window) // 2)))
    frames = sliding_window_view(around, len(window), axis=1)[:, :: spec.hop][:, : spec.frames]
    spectra = np.fft.rfft(frames * window)
    return np.swapaxes((spectra.real**2 + spectra.imag**2) @ filters, 1, 2)


@lru_cache(maxsize=16)
def _window(spec: AudioSpec) -> NDArray[np.float32]:
    """(n_fft,) Hann's, of energy 1, in the middle of zeros."""
    length = max(16, round(WINDOW_S * spec.rate))
    n_fft = 1 << (length - 1).bit_length()
    while spec.rate / n_fft > _narrowest_band(spec) and n_fft < 1 << 15:
        n_fft *= 2  # otherwise the lowest mel bands would hold no frequency at all
    hann = np.sin(np.pi * np.arange(length) / length) ** 2
    left = (n_fft - length) // 2
    hann = np.pad(hann / np.linalg.norm(hann), (left, n_fft - length - left))
    return hann.astype(np.float32)


@lru_cache(maxsize=16)
def _filters(spec: AudioSpec) -> NDArray[np.float32]:
    """(n_fft / 2 + 1, bands): triangles, evenly over the mel scale m = 2595 log10(1 + f / 700)
    from 0 to half the rate (O'Shaughnessy 1987), as torchaudio's melscale_fbanks makes them."""
    top = spec.rate // 2
    edges = 700 * ((1 + top / 700) ** np.linspace(0, 1, spec.bands + 2) - 1)
    at = np.linspace(0, top, len(_window(spec)) // 2 + 1)[:, None]
    rising = (at - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - at) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


@lru_cache(maxsize=16)
def _cosines(spec: AudioSpec) -> NDArray[np.float32]:
    """(coefficients, bands): the orthogonal DCT-II."""
    angles = np.arange(spec.coefficients)[:, None] * (np.arange(spec.bands) + 0.5)
    cosines = np.cos(np.pi / spec.bands * angles) * math.sqrt(2 / spec.bands)
    cosines[0] /= math.sqrt(2)
    return cosines.astype(np.float32)


def _narrowest_band(spec: AudioSpec) -> float:
    """Hz between the lowest two mel bands (HTK scale)."""
    step = math.log10(1 + spec.rate / 2 / 700) / (spec.bands + 1)
    return float(700 * (10**step - 1))
