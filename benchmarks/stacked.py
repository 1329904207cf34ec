"""What a step of a node costs when nodes are trained together, over one after the other.

    python benchmarks/stacked.py
    python benchmarks/stacked.py --models small conv --rows 4 32 --unit none

Made records, one thread, processor time of `Stacked.run` and of as many `Trainer.run`, in turn; the
medians of --repeat. A ratio below 1 means that training together pays. What `together` in
fedfuse/stacked.py takes for worth it is set by this table.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.models.model import build_model
from fedfuse.models.spec import EncoderConfig, ModelConfig
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.stacked import Member, Stacked, together
from fedfuse.tasks import Task
from fedfuse.train import Job, Trainer

IMAGE = Modality(name="image", kind=Kind.IMAGE, shape=(1, 16, 16))
AUDIO = Modality(name="audio", kind=Kind.AUDIO, shape=(40, 32))
TEXT = Modality(name="text", kind=Kind.TEXT, shape=(32,))
TABLE = Modality(name="table", kind=Kind.TABLE, shape=(24,))
VECTOR = Modality(name="vector", kind=Kind.VECTOR, shape=(16,))
PHONE = Modality(name="phone", kind=Kind.SERIES, shape=(64, 6))
WATCH = Modality(name="watch", kind=Kind.SERIES, shape=(64, 6))
MODELS: dict[str, tuple[tuple[Modality, ...], ModelConfig]] = {
    "small": ((TABLE, VECTOR), ModelConfig()),
    "series": ((PHONE, WATCH), ModelConfig()),
    "conv": ((IMAGE, AUDIO, TEXT), ModelConfig()),
    "wide": ((IMAGE, AUDIO, TEXT), ModelConfig(image_width=16, audio_width=16)),
    "transformer": (
        (IMAGE, AUDIO, TEXT),
        ModelConfig(encoder=EncoderConfig(text="transformer"), fusion="attention"),
    ),
}
VOCABULARY, STEPS = 4096, 2


class Made:
    """`count` records, a fifth of each modality missing."""

    def __init__(self, modalities: tuple[Modality, ...], count: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        inputs, present = {}, {}
        for m in modalities:
            size = (count, *m.shape)
            text = m.kind is Kind.TEXT
            x = (
                torch.randint(1, VOCABULARY, size, generator=rng)
                if text
                else torch.randn(size, generator=rng)
            )
            here = torch.rand(count, generator=rng) < 0.8
            x[~here] = 0
            inputs[m.name], present[m.name] = x, here
        self.all = Batch(inputs, present, torch.randint(0, 10, (count,), generator=rng))

    def __len__(self) -> int:
        return len(self.all)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The records of `rows`."""
        return self.all[torch.from_numpy(rows)]


def timed(calls: list[Callable[[], None]], repeat: int) -> list[float]:
    """Median seconds of processor time of each, in turn."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(repeat + 1):
        for call, times in zip(calls, spent, strict=True):
            start = time.process_time()
            call()
            if turn:  # the first one warms up
                times.append(time.process_time() - start)
    return [statistics.median(times) for times in spent]


def row(name: str, rows: int, unit: str, sizes: list[int], repeat: int) -> list[str]:
    """Cells of one line."""
    modalities, config = MODELS[name]
    target = Target(kind=TargetKind.CLASSIFICATION, classes=tuple("abcdefghij"))
    model = build_model(Schema(modalities=modalities, target=target), config, vocabulary=VOCABULARY)
    trainer = Trainer(model, Task.of(target).loss, torch.device("cpu"))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mechanism = Mechanism(
        unit=Unit.RECORD, sample_rate=0.16, noise_multiplier=1.0, clip_norm=1.0, steps=STEPS
    )
    job = Job(
        steps=STEPS, optimizer="sgd", learning_rate=0.1, momentum=0.9, batch_size=rows,
        expected_batch=rows, mechanism=mechanism if unit == "record" else None,
    )  # fmt: skip
    start, stack = trainer.weights(), Stacked(trainer)
    records = [Made(modalities, round(rows / 0.16), n) for n in range(max(sizes))]
    members = [
        Member(records=each, weights=start, secret=bytes([n]) * 32)
        for n, each in enumerate(records)
    ]
    if not stack.takes(records[0], job):
        return [name, str(rows), f"{count:,}", "-", *["-"] * len(sizes), "-"]

    def alone() -> None:
        for member in members[:2]:
            trainer.load(start)
            trainer.run(member.records, job, secret=member.secret)

    def stacked(size: int) -> Callable[[], None]:
        return lambda: (stack.run(members[:size], job), None)[1]

    single, *others = timed([alone, *map(stacked, sizes)], repeat)
    single /= 2 * STEPS
    ratios = [found / size / STEPS / single for found, size in zip(others, sizes, strict=True)]
    return [
        name, str(rows), f"{count:,}", f"{1e3 * single:.2f} ms",
        *(f"**{ratio:.2f}**" for ratio in ratios), str(together(job, count, 1000)),
    ]  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 16, 32, 64])
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 10, 16])
    parser.add_argument("--unit", choices=("record", "none"), default="record")
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.machine()}, CPU, one thread, unit {chosen.unit}\n")
    heads = [f"{size} together" for size in chosen.sizes]
    print(f"| model | batch | parameters | a step alone | {' | '.join(heads)} | taken |")
    print("|---|---|---|---|" + "---|" * (len(heads) + 1))
    for name in chosen.models:
        for rows in chosen.rows:
            cells = row(name, rows, chosen.unit, chosen.sizes, chosen.repeat)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
