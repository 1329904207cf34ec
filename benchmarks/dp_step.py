"""What a private step costs against a plain one, by the way of clipping.

    python benchmarks/dp_step.py                                  # all of it, some ten minutes
    python benchmarks/dp_step.py --models conv --batches 32 128 --ways plain bookkeeping
    python benchmarks/dp_step.py --wall --ways bookkeeping ahead
    python benchmarks/dp_step.py --device cuda --batches 256 512 2048

A plain step is forward, backward, optimizer; a private one also clips, sums, adds noise and
divides. All ways take the same model and batch, in turn in one process on one thread, `--repeat`
times after one step that is not counted. Times are CPU seconds of the process, so that what else
the machine does counts less; the ratio is of medians, and the ratio of minima stands beside it.
With `--wall` they are seconds on the clock, of plain steps too: for `ahead`, which takes a second
core beside torch's one thread, and gains nothing where that has work. `--threads`: torch's own.
Memory is the peak of resident memory above model and batch, each way in a process of its own.
On a GPU a step is over when the GPU is done, times are seconds on the clock, memory is the card's.

    bookkeeping, hooks   fedfuse with privacy.clipping set so; noise from its stream cipher
    ahead                book-keeping with the noise made on another core during the step
    ghost                Opacus's fast gradient clipping, two backward passes; noise from torch
    functorch, ew        Opacus's GradSampleModule with functorch, its expanded weights
    vmap                 torch.func: vmap(grad), clipped and noised by hand
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.errors import ModelError
from fedfuse.models.model import build_model
from fedfuse.models.spec import EncoderConfig, ModelConfig
from fedfuse.privacy.dpsgd import PrivateOptimizer, prepare, private_step
from fedfuse.privacy.noise import NoiseStream
from fedfuse.tasks import Task
from fedfuse.train import pick_device

IMAGE = Modality(name="image", kind=Kind.IMAGE, shape=(3, 32, 32))
AUDIO = Modality(name="audio", kind=Kind.AUDIO, shape=(40, 64))
TEXT = Modality(name="text", kind=Kind.TEXT, shape=(32,))
TABLE = Modality(name="table", kind=Kind.TABLE, shape=(64,))
SERIES = Modality(name="series", kind=Kind.SERIES, shape=(128, 9))
MODELS: dict[str, tuple[tuple[Modality, ...], ModelConfig]] = {
    "conv": (
        (IMAGE, AUDIO, TEXT),
        ModelConfig(
            dim=64, head_width=128, image_width=32, audio_width=32, learned_words=True
        ),
    ),
    "transformer": (
        (IMAGE, AUDIO, TEXT),
        ModelConfig(
            dim=64, head_width=128, image_width=16, audio_width=16, learned_words=True,
            encoder=EncoderConfig(text="transformer"), text_layers=2, fusion="attention",
        ),
    ),
    "table": ((TABLE,), ModelConfig(dim=256, head_width=512, vector_width=512)),
    "series": ((SERIES,), ModelConfig(dim=128, head_width=128, series_width=32, series_depth=3)),
}  # fmt: skip
WAYS = ("plain", "bookkeeping", "ahead", "hooks", "ghost", "functorch", "ew", "vmap")
SIGMA, C, RATE = 1.0, 1.0, 0.01
VOCABULARY = 4096


def made(name: str, rows: int, device: torch.device) -> tuple[nn.Module, Batch, Task]:
    """A model with its first weights, and a batch in which a fifth of each modality is missing."""
    modalities, config = MODELS[name]
    target = Target(kind=TargetKind.CLASSIFICATION, classes=tuple("abcdefghij"))
    schema = Schema(modalities=modalities, target=target)
    rng = torch.Generator().manual_seed(1)
    inputs, present = {}, {}
    for modality in modalities:
        here = torch.rand(rows, generator=rng) < 0.8
        if modality.kind is Kind.TEXT:
            value = torch.randint(1, VOCABULARY, (rows, *modality.shape), generator=rng)
        else:
            value = torch.randn(rows, *modality.shape, generator=rng)
        mask = here.view(-1, *[1] * len(modality.shape))
        inputs[modality.name] = torch.where(mask, value, torch.zeros_like(value))
        present[modality.name] = here
    batch = Batch(inputs, present, torch.randint(0, 10, (rows,), generator=rng))
    model = build_model(schema, config, vocabulary=VOCABULARY)
    return model.to(device), batch.to(device), Task.of(target)


class Tensors(nn.Module):
    """The model as a function of tensors alone, for what knows no batches of several."""

    def __init__(self, model: nn.Module, like: Batch) -> None:
        super().__init__()
        self.model, self.names = model, tuple(like.inputs)

    def forward(self, *values: Tensor) -> Tensor:
        n = len(self.names)
        inputs, present = values[:n], values[n:]
        return self.model(  # type: ignore[no-any-return]
            Batch(
                dict(zip(self.names, inputs, strict=True)),
                dict(zip(self.names, (p > 0 for p in present), strict=True)),
                torch.zeros(len(inputs[0]), device=inputs[0].device),
            )
        )


def tensors_of(batch: Batch) -> tuple[Tensor, ...]:
    return (*batch.inputs.values(), *(p.float() for p in batch.present.values()))


CPU = torch.device("cpu")


def step_of(way: str, name: str, rows: int, device: torch.device = CPU) -> Callable[[], None]:
    """One whole step, to be called again and again."""
    model, batch, task = made(name, rows, device)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)

    def plain() -> None:
        sgd.zero_grad()
        task.loss(model(batch), batch.target).mean().backward()
        sgd.step()

    if way == "plain":
        return plain
    if way in ("bookkeeping", "ahead", "hooks"):
        fused = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, fused=True)
        ready = prepare(model, "hooks" if way == "hooks" else "bookkeeping")
        private = PrivateOptimizer(
            fused, noise_multiplier=SIGMA, clip_norm=C, expected_batch=rows,
            stream=NoiseStream(
                os.urandom(32), "noise", threads=torch.get_num_threads(),
                idle=1 if way == "ahead" else 0,
            ),
        )  # fmt: skip
        return lambda: private_step(ready, private, batch, task.loss, physical_batch=rows)
    common = {"noise_multiplier": SIGMA, "max_grad_norm": C, "expected_batch_size": rows}
    if way == "vmap":
        return _by_vmap(model, batch, task, sgd)
    if way == "ghost":
        ghost = GradSampleModuleFastGradientClipping(
            model, batch_first=True, loss_reduction="mean", max_grad_norm=C
        )
        optimizer = DPOptimizerFastGradientClipping(sgd, **common)
        criterion = DPLossFastGradientClipping(ghost, optimizer, nn.CrossEntropyLoss())

        def by_ghost() -> None:
            optimizer.zero_grad()
            criterion(ghost(batch), batch.target).backward()
            optimizer.step()

        return by_ghost
    wrapped: nn.Module
    values = tensors_of(batch)
    if way == "ew":
        wrapped = GradSampleModuleExpandedWeights(Tensors(model, batch), loss_reduction="mean")
    else:
        wrapped = GradSampleModule(Tensors(model, batch), batch_first=True, force_functorch=True)
    whole = DPOptimizer(sgd, **common)

    def by_opacus() -> None:
        whole.zero_grad()
        F.cross_entropy(wrapped(*values), batch.target).backward()
        whole.step()

    return by_opacus


def _by_vmap(
    model: nn.Module, batch: Batch, task: Task, sgd: torch.optim.Optimizer
) -> Callable[[], None]:
    flat = Tensors(model, batch)
    values = tensors_of(batch)

    def loss(parameters: dict[str, Tensor], one: tuple[Tensor, ...], target: Tensor) -> Tensor:
        outputs = functional_call(flat, parameters, tuple(v.unsqueeze(0) for v in one))
        return task.loss(outputs, target.unsqueeze(0)).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def by_vmap() -> None:
        parameters = {name: p.detach() for name, p in flat.named_parameters()}
        grads = each(parameters, values, batch.target)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        factors = (C / norms.clamp(min=1e-9)).clamp(max=1.0)
        for name, p in flat.named_parameters():
            total = torch.einsum("i,i...", factors, grads[name])
            p.grad = (total + SIGMA * C * torch.randn_like(total)) / len(batch)
        sgd.step()

    return by_vmap


def peak(way: str, name: str, rows: int, device: torch.device) -> float:
    """MB that three steps take above model and batch, in a fresh process."""
    command = [sys.executable, __file__, "--peak", way, "--models", name, "--batches", str(rows)]
    command += ["--device", str(device)]
    found = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return float(found)


def _peak_here(way: str, name: str, rows: int, device: torch.device) -> float:
    step = step_of(way, name, rows, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def clock_of(device: torch.device, wall: bool) -> Callable[[], float]:
    """Seconds, when all is done that was begun on `device`."""
    if device.type != "cuda":
        return time.perf_counter if wall else time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def row(
    name: str, rows: int, ways: list[str], repeat: int, device: torch.device,
    clock: Callable[[], float],
) -> list[str]:  # fmt: skip
    """Cells of one line: ratio of medians, of minima, memory; "-" where a way does not run."""
    steps, spent = {}, {}
    for way in ways:
        try:
            steps[way] = step_of(way, name, rows, device)
            steps[way]()
            spent[way] = []
        except Exception as error:  # a way that does not run is a finding, not a failure
            steps.pop(way, None)
            print(f"<!-- {name} {rows} {way}: {type(error).__name__} -->", flush=True)
    for _ in range(repeat):
        for way, step in steps.items():
            start = clock()
            step()
            spent[way].append(clock() - start)
    memory = {way: peak(way, name, rows, device) for way in steps}
    middle = {way: statistics.median(times) for way, times in spent.items()}
    cells = [name, str(rows)]
    for way in ways:
        if way not in steps:
            cells.append("-")
        elif way == "plain":
            cells.append(f"{1e3 * middle[way]:.1f} ms, {memory[way]:.0f} MB")
        else:
            least = min(spent[way]) / min(spent["plain"])
            ratio = middle[way] / middle["plain"]
            cells.append(f"**{ratio:.2f}** ({least:.2f}), {memory[way]:.0f} MB")
    return cells


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--wall", action="store_true", help="seconds on the clock, not of the CPU")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    try:
        device = pick_device(chosen.device)
    except ModelError as error:
        parser.error(str(error))
    if chosen.peak:
        print(_peak_here(chosen.peak, chosen.models[0], chosen.batches[0], device))
        return
    ways = ["plain", *(way for way in chosen.ways if way != "plain")]
    on_gpu = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    clock, kind = clock_of(device, chosen.wall), "wall-clock" if chosen.wall or on_gpu else "CPU"
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {chip}, "
        f"threads of torch: {chosen.threads}; {kind} time;"
    )
    print(f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f} at the start\n")
    for name in chosen.models:
        count = sum(p.numel() for p in made(name, 1, CPU)[0].parameters())
        print(f"- {name}: {count:,} parameters")
    print("\n| model | batch | " + " | ".join(ways) + " |")
    print("|---|---|" + "---|" * len(ways))
    for name in chosen.models:
        for rows in chosen.batches:
            cells = row(name, rows, ways, chosen.repeat, device, clock)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
