"""Videos of any container become evenly spread frames; each broken one is one clear error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from fedfuse.batch import Kind
from fedfuse.data.check import check
from fedfuse.data.prepare import prepare
from fedfuse.data.spec import DataConfig
from fedfuse.data.video import VideoSpec, read_video, video_facts
from fedfuse.errors import DataError
from tests.data.videos import brightening, write_video

WriteCsv = Callable[..., Path]
FOUR = VideoSpec(frames=4, size=16, channels=3)
HEADER = "id,split,client,label,clip"


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "mpeg4", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mkv", "ffv1", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
    ],
)
def test_any_container_gives_frames_spread_evenly(
    name: str, codec: str, pixels: str, tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, brightening(20), codec=codec, pixels=pixels)
    frames = read_video(path, FOUR)
    assert frames.shape == FOUR.shape
    assert frames.dtype == np.uint8
    expected = np.linspace(0, 255, 20)[[2, 7, 12, 17]]
    np.testing.assert_allclose(frames.mean((1, 2, 3)), expected, atol=6)
    assert video_facts(path) == (32, 3)


def test_a_long_video_is_thinned_out_as_it_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", brightening(200, 16), codec="ffv1")
    found = read_video(path, FOUR).mean((1, 2, 3)) / 255
    np.testing.assert_allclose(found, [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=1 / 16)


def test_a_video_of_fewer_frames_repeats_them(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", brightening(2), codec="ffv1")
    np.testing.assert_allclose(read_video(path, FOUR).mean((1, 2, 3)), [0, 0, 255, 255], atol=1)


def test_a_frame_is_resized_as_an_image_is(tmp_path: Path) -> None:
    wide = np.zeros((3, 20, 40, 3), np.uint8)
    wide[:, :, 20:, 1] = 255
    path = write_video(tmp_path / "a.mkv", wide, codec="ffv1")
    frame = read_video(path, VideoSpec(frames=1, size=8, channels=3))[0]
    assert frame.shape == (3, 8, 8)
    assert frame[1, 4, 1] < 10
    assert frame[1, 4, 6] > 245
    gray = read_video(path, VideoSpec(frames=1, size=8, channels=1))
    assert gray.shape == (1, 1, 8, 8)
    shades = write_video(tmp_path / "b.mkv", brightening(3), codec="ffv1", pixels="gray")
    assert video_facts(shades) == (32, 1)


def test_sound_beside_the_pictures_does_no_harm(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        path = write_video(tmp_path / name, brightening(10), sound_s=4.0)
        assert read_video(path, FOUR).shape == FOUR.shape


def broken(folder: Path) -> dict[str, str]:
    """Files that are no whole video, and what is said of each."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    whole = {
        name: write_video(folder / name, noise, codec=codec).read_bytes()
        for name, codec in (("w.mp4", "libx264"), ("w.mkv", "ffv1"), ("w.webm", "libvpx"))
    }
    says = {}
    for name, data in whole.items():
        for share in (0.02, 0.5, 0.8):
            cut = folder / f"cut-{share}-{name}"
            cut.write_bytes(data[: int(share * len(data))])
            says[cut.name] = "cut off|cannot be decoded|holds no frame"
    (folder / "empty.mp4").write_bytes(b"")
    says["empty.mp4"] = "is empty"
    (folder / "noise.mp4").write_bytes(noise.tobytes()[:5000])
    (folder / "text.mp4").write_text("this is no video at all\n" * 40)
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    soundfile.write(folder / "sound.wav", np.zeros(4000), 8000)
    (folder / "sound.wav").rename(folder / "sound.mp4")
    (folder / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nw.mp4\n")
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile 'w.mp4'\n")
    for name in ("noise", "text", "picture", "sound", "list", "concat"):
        says[f"{name}.mp4"] = "cannot be decoded"
    write_video(folder / "only-sound.mp4", noise[:0], sound_s=1.0)
    says["only-sound.mp4"] = "holds no pictures, only audio"
    return says


def test_what_is_no_whole_video_is_one_problem_each(tmp_path: Path, write_csv: WriteCsv) -> None:
    says = broken(tmp_path)
    write_video(tmp_path / "good.mp4", brightening(8))
    rows = [["g", "train", "x", "0", "good.mp4"], ["t", "test", "x", "1", "good.mp4"]]
    bad = [[name, "train", "x", "0", name] for name in says]
    path = write_csv(HEADER, rows + bad)
    found = {problem.id: problem for problem in check(path)}
    assert set(found) == set(says)
    for name, what in says.items():
        with pytest.raises(DataError, match=what):
            read_video(tmp_path / name, FOUR)
        assert name in found[name].what
        assert found[name].hint
        assert not found[name].warning
    prepared = prepare(DataConfig(manifest=str(path), skip_bad=True), seed=0)
    assert (prepared.skipped, len(prepared.train)) == (len(says), 1)


@pytest.mark.parametrize(
    ("toml", "shape"),
    [
        ("", (8, 3, 32, 32)),
        ('[modalities]\nclip = "mp4 gray 24x24"\n', (8, 1, 24, 24)),
        ('[modalities]\nclip = {kind = "video", size = 20, channels = 3}\n', (8, 3, 20, 20)),
    ],
)
def test_kind_and_size_are_inferred_or_declared(
    toml: str, shape: tuple[int, ...], tmp_path: Path, write_csv: WriteCsv
) -> None:
    write_video(tmp_path / "a.mp4", brightening(8))
    rows = [
        ["a", "train", "x", "0", "a.mp4"],
        ["b", "train", "x", "1", ""],
        ["c", "test", "x", "1", "a.mp4"],
    ]
    path = write_csv(HEADER, rows, toml)
    assert all(problem.warning for problem in check(path))
    prepared = prepare(DataConfig(manifest=str(path)), seed=0)
    (clip,) = prepared.schema.modalities
    assert (clip.kind, clip.shape) == (Kind.VIDEO, shape)
    batch = prepared.train.batch(np.arange(2))
    assert batch.present["clip"].tolist() == [True, False]
    values = batch.inputs["clip"]
    assert 0.9 < float(values[0, -1].mean()) <= 1
    assert not values[1].any()
    small = DataConfig(manifest=str(path), video_frames=3, video_size=10)
    assert prepare(small, seed=0).schema.modalities[0].shape == (3, shape[1], 10, 10)


def test_without_pyav_one_error_says_how_to_get_it(
    tmp_path: Path, write_csv: WriteCsv, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", brightening(4))
    rows = [["a", "train", "x", "0", "a.mp4"], ["c", "test", "x", "1", "a.mp4"]]
    path = write_csv(HEADER, rows)
    monkeypatch.setitem(sys.modules, "av", None)
    (problem,) = check(path)
    assert "PyAV" in problem.what
    assert 'pip install "fedfuse[video]"' in problem.hint
    with pytest.raises(DataError, match="PyAV"):
        prepare(DataConfig(manifest=str(path)), seed=0)
