"""Whatever is damaged, the answer is a problem or a DataError, never another exception."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from fedfuse.data.check import check
from fedfuse.data.demo import make_demo
from fedfuse.data.prepare import prepare
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes_never_give_a_traceback(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    path = make_demo(tmp_path / "whole", records=16, clients=2)
    files = sorted(p for p in path.parent.rglob("*") if p.is_file())
    for turn in range(4):
        folder = shutil.copytree(path.parent, tmp_path / str(turn))
        for whole in [path, *random.sample(files, 3)]:
            damaged = folder / whole.relative_to(path.parent)
            damaged.write_bytes(_damage(whole.read_bytes(), random))
        check(folder / "manifest.csv")
        with suppress(DataError):
            prepare(DataConfig(manifest=str(folder / "manifest.csv"), skip_bad=True), seed=0)


def _damage(data: bytes, random: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.randint(0, 6)):
        place = random.randrange(len(damaged) or 1)
        match random.randrange(4):
            case 0:
                damaged[place : place + 1] = bytes([random.randrange(256)])
            case 1:
                del damaged[place : place + random.randint(1, 40)]
            case 2:
                damaged[place:place] = random.choice([b",", b'"', b"\n", b"nan", b"\0", b"../"])
            case _:
                del damaged[max(place, len(damaged) - 300) :]
    return bytes(damaged)
