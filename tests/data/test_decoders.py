from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedfuse.data.audio import AudioSpec, audio_facts, log_mel, read_waveform
from fedfuse.data.image import ImageSpec, image_facts, read_image
from fedfuse.data.inline import number, numbers
from fedfuse.data.media import media_path, read_array
from fedfuse.data.series import SeriesSpec, fit_series
from fedfuse.data.table import TableColumn, TableSpec, fit_table, read_cells, unknown_in, with_flags
from fedfuse.data.text import TextSpec, load_tokenizer, token_ids
from fedfuse.data.vector import VectorSpec, fit_vector
from fedfuse.errors import DataError
from fedfuse.torchaudio_compat import load_torchaudio

GRAY8 = ImageSpec(size=8, channels=1)
SOUND = AudioSpec(rate=8000, seconds=0.5, bands=40, frames=32)


def test_gray_pixels_come_back_as_they_are(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", GRAY8)[0] == pixels).all()
    assert image_facts(tmp_path / "a.png") == (8, 1)


def test_colour_is_channels_first_and_resized(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (255, 0, 10)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", ImageSpec(size=8, channels=3))
    assert pixels.shape == (3, 8, 8)
    assert pixels[:, 4, 4].tolist() == [255, 0, 10]
    assert image_facts(tmp_path / "a.png") == (20, 3)


def test_sixteen_bit_images_keep_their_shades(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", GRAY8) == 128).all()


def test_an_image_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for length in (0, 7, 30, len(data) // 2, len(data) - 14, len(data) - 9):
        (tmp_path / "b.png").write_bytes(data[:length])
        with pytest.raises(DataError):
            read_image(tmp_path / "b.png", GRAY8)


def test_a_waveform_is_cut(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(9000, 0.5), 8000)
    assert read_waveform(tmp_path / "a.wav", SOUND)[0].shape == (4000,)


def test_a_waveform_is_mixed_to_mono(tmp_path: Path) -> None:
    stereo = np.stack([np.full(2000, 0.5), np.full(2000, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 8000, subtype="FLOAT")
    wave, rate = read_waveform(tmp_path / "a.wav", SOUND)
    assert rate == 8000
    assert wave.shape == (2000,)
    assert np.allclose(wave, 0.125)
    assert audio_facts(tmp_path / "a.wav") == (8000, 0.25)


def test_resampling_keeps_the_pitch(tmp_path: Path) -> None:
    t = np.arange(22050) / 44100
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * t), 44100)
    wave, rate = read_waveform(tmp_path / "a.wav", SOUND)
    assert rate == 44100
    spectrum = np.abs(np.fft.rfft(wave))
    assert spectrum.argmax() * 8000 / 4000 == pytest.approx(440, abs=2)
    assert np.abs(wave[500:3500]).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("rate", [7999, 44101, 500])
def test_odd_rates_are_resampled(rate: int, tmp_path: Path) -> None:
    soundfile.write(
        tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 100 * np.arange(rate) / rate), rate
    )
    wave, _ = read_waveform(tmp_path / "a.wav", SOUND)
    assert np.abs(np.fft.rfft(wave)).argmax() * 2 == pytest.approx(100, abs=2)


@pytest.mark.parametrize("rate", [1, 2_000_000_000])
def test_an_absurd_rate_is_refused(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(100), rate)
    with pytest.raises(DataError, match="samples a second"):
        read_waveform(tmp_path / "a.wav", SOUND)
    with pytest.raises(DataError, match="samples a second"):
        audio_facts(tmp_path / "a.wav")


def test_log_mel_is_on_its_own_scale_and_finds_the_pitch() -> None:
    t = np.arange(4000) / 8000
    tones = [np.zeros(4000), np.sin(2 * np.pi * 300 * t), 0.01 * np.sin(2 * np.pi * 2000 * t)]
    mel = log_mel([tone.astype(np.float32) for tone in tones], SOUND)
    assert mel.shape == (3, 40, 32)
    assert np.allclose(mel[0], 0)
    low, high = mel[1, :, 16].argmax(), mel[2, :, 16].argmax()
    assert 2 <= low < high <= 38
    assert np.allclose(mel[1:].std((1, 2)), 1, atol=0.01)
    assert np.allclose(mel.mean((1, 2)), 0, atol=1e-4)
    assert log_mel([], SOUND).shape == (0, 40, 32)


@pytest.mark.parametrize(("rate", "bands"), [(8000, 40), (11025, 128), (44100, 8)])
def test_spectra_are_those_of_torchaudio(rate: int, bands: int) -> None:
    spec = AudioSpec(rate=rate, seconds=0.3, bands=bands, frames=20)
    waves = np.random.default_rng(0).standard_normal((2, spec.samples)).astype(np.float32)
    fft = {8000: 256, 11025: 1024, 44100: 2048}[rate]  # no band without a frequency
    mel = load_torchaudio().transforms.MelSpectrogram(
        rate, fft, round(rate * 0.032), spec.hop, n_mels=bands, normalized=True, pad_mode="constant"
    )
    level = np.log10(mel(torch.from_numpy(waves))[..., :20].numpy() + 1e-6)
    spread = level.std((1, 2), keepdims=True) + 1e-3
    expected = (level - level.mean((1, 2), keepdims=True)) / spread
    np.testing.assert_allclose(log_mel(list(waves), spec), expected, atol=1e-4)


def test_silence_after_a_short_sound_is_zero_and_does_not_shift_it() -> None:
    noise = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    short, alone = log_mel([noise[:1000], noise], SOUND)
    assert (short[:, 8:] == 0).all()
    assert np.isclose(short[:, :8].std(), 1, atol=0.01)
    assert not (alone[:, 8:] == 0).any()


@pytest.mark.parametrize("bands", [8, 40, 128])
@pytest.mark.parametrize(("rate", "seconds"), [(8000, 0.01), (16000, 1.0), (44100, 0.3)])
def test_log_mel_has_the_promised_shape(bands: int, rate: int, seconds: float) -> None:
    for frames in (1, 7, 64):
        spec = AudioSpec(rate=rate, seconds=seconds, bands=bands, frames=frames)
        mel = log_mel([np.full(spec.samples, 0.1, np.float32)], spec)
        assert mel.shape == (1, bands, frames)
        assert np.isfinite(mel).all()


def test_broken_audio_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 8000)
    data = (tmp_path / "a.wav").read_bytes()
    nan = np.full(100, np.nan)
    soundfile.write(tmp_path / "nan.wav", nan, 8000, subtype="FLOAT")
    for content in (b"", b"RIFF", data[:30], data[:44], data[: len(data) // 2], b"x" * 500):
        (tmp_path / "b.wav").write_bytes(content)
        with pytest.raises(DataError):
            read_waveform(tmp_path / "b.wav", SOUND)
    with pytest.raises(DataError, match="NaN"):
        read_waveform(tmp_path / "nan.wav", SOUND)


def test_words_hash_alike_whatever_their_case() -> None:
    spec = TextSpec(tokens=6, vocabulary=100)
    ids = token_ids("Is there a PNEUMOTHORAX? there", spec).tolist()
    assert ids[1] == ids[4]
    assert ids[5] == 0
    assert all(1 <= k < 100 for k in ids[:5])
    assert token_ids("is there a pneumothorax there", spec).tolist() == ids
    assert token_ids("", spec).tolist() == [0] * 6
    assert len(token_ids("many " * 50, spec)) == 6
    assert set(token_ids("any word at all", TextSpec(tokens=4, vocabulary=2)).tolist()) == {1}


def test_a_series_is_cut_and_padded() -> None:
    spec = SeriesSpec(steps=4, features=2)
    assert (fit_series(np.ones((9, 2), np.float32), spec) == 1).all()
    short = fit_series(np.ones((3, 2), np.float32), spec)
    assert np.isnan(short[3]).all()
    for wrong in (np.ones((4, 3)), np.ones(4), np.ones((0, 2)), np.full((4, 2), np.inf)):
        with pytest.raises(DataError):
            fit_series(wrong.astype(np.float32), spec)


def test_a_vector_has_one_length_and_is_finite() -> None:
    spec = VectorSpec(features=3)
    assert fit_vector(np.ones((1, 3), np.float32), spec).shape == (3,)
    for wrong in (np.ones(4), np.ones((3, 3)), np.array([1, np.nan, 2])):
        with pytest.raises(DataError):
            fit_vector(wrong.astype(np.float32), spec)


def test_a_table_codes_categories_and_flags_what_is_missing() -> None:
    spec = TableSpec(
        columns=(
            TableColumn(name="age"),
            TableColumn(name="sex", categories=("f", "m")),
            TableColumn(name="ward", categories=("a", "b", "c")),
        )
    )
    assert spec.shape == (10,)
    assert read_cells(("40", "m", "b"), spec).tolist() == [40, 1, 0, 1, 0]
    assert read_cells(("40", "f", "1.0"), spec).tolist() == [40, -1, 0, 0, 0]
    assert unknown_in(("40", "f", "c"), spec) == unknown_in(("x", "", "n/a"), spec) == ""
    assert unknown_in(("1", "x", "d"), spec).count("none of the") == 2
    values = with_flags(
        np.stack([read_cells(("", "f", "c"), spec), read_cells(("1", "", ""), spec)])
    )
    assert values[0].tolist() == [0, -1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert values[1].tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    for wrong in (("old", "m", "a"), ("inf", "m", "a"), ("1e300", "m", "a")):
        with pytest.raises(DataError):
            read_cells(wrong, spec)
    array = TableSpec(features=2)
    assert np.isnan(fit_table(np.array([np.nan, 1], np.float32), array)[0])
    with pytest.raises(DataError):
        fit_table(np.array([np.inf, 1], np.float32), array)


def test_inline_numbers() -> None:
    for cell in ("1 2 3", "1;2;3", "[1, 2, 3]", "1, 2, 3", "1\t2  3"):
        found = numbers(cell)
        assert found is not None
        assert found.tolist() == [1, 2, 3]
    for cell in ("a b", "[1, [2]]", '["x"]', "[]", "{}"):
        assert numbers(cell) is None
    null = numbers("[1, null]")
    assert null is not None
    assert math.isnan(null[1])
    assert number("1_000") is None


def test_an_array_file_must_hold_real_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(3))
    good = path.read_bytes()
    assert read_array(path).dtype == np.float32
    for array in (np.array(["x"]), np.array([1j])):
        np.save(path, array)
        with pytest.raises(DataError, match="real numbers"):
            read_array(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_array(path)
    for content in (b"", b"\x93NUMPY", good[:-4], b"garbage"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_array(path)


def test_paths_stay_inside_the_data_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "in.png").write_bytes(b"x")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert media_path(root, "in.png") == root / "in.png"
    for cell in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "a/../../secret.png"):
        with pytest.raises(DataError, match="leaves the data folder"):
            media_path(root, cell)
    for cell in ("no.png", ".", "a\0b", "x" * 5000, "loop.png"):
        with pytest.raises(DataError, match="missing"):
            media_path(root, cell)


def test_a_cell_that_is_no_path_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        media_path(tmp_path, "patient is positive")
    assert "positive" not in str(error.value)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A tokenizer of five words in a folder, as save_pretrained writes it."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "oil": 1, "leaks": 2, "no": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
        tmp_path / "tok"
    )
    return str(tmp_path / "tok")


def test_a_named_tokenizer_takes_the_place_of_the_hash(tokenizer: str) -> None:
    spec = TextSpec(tokens=4, vocabulary=5, tokenizer=tokenizer)
    assert token_ids("oil leaks", spec).tolist() == [2, 3, 0, 0]
    assert token_ids("no unknown oil leaks here", spec).tolist() == [4, 1, 2, 3]
    few = TextSpec(tokens=2, vocabulary=3, tokenizer=tokenizer)
    assert token_ids("no oil", few).tolist() == [2, 2]


def test_a_tokenizer_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded") as error:
        load_tokenizer(str(tmp_path / "none"))
    assert "save_pretrained" in str(error.value)


def test_cepstra_are_those_of_torchaudio_each_coefficient_on_its_own_scale() -> None:
    spec = AudioSpec(rate=8000, seconds=0.5, bands=40, frames=32, coefficients=13)
    noise = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    found, short = log_mel([noise, noise[:1000]], spec)
    assert found.shape == spec.shape == (13, 32)
    mel = {"n_fft": 256, "win_length": 256, "hop_length": 125, "n_mels": 40, "normalized": True,
           "pad_mode": "constant"}  # fmt: skip
    torchaudio = load_torchaudio()
    reference = torchaudio.transforms.MFCC(8000, 13, log_mels=True, melkwargs=mel)
    expected = reference(torch.from_numpy(noise))[:, :32].numpy()
    expected = (expected - expected.mean(1, keepdims=True)) / expected.std(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert np.allclose(short[:, 8:], 0)
    assert np.allclose(short[:, :8].mean(1), 0, atol=1e-4)
