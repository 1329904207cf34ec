"""One private step: per-record gradients by Opacus, clipped, summed, noised, divided.

Opacus gives the per-record gradients (`GradSampleModule`, hooks) and the order of a step
(`DPOptimizer`). Three things are replaced, each for a reason:

    clipping  a record whose gradient is not finite counts as zero, so that one broken record
              neither stops the step nor escapes the bound
    noise     from a ChaCha20 stream (see noise.py), not from torch's global generator
    divisor   the public expected batch size, never the number of records drawn

Guarantees (unit: one record; neighbours: add or remove it; adversary: sees every update)
    The sum before noise moves by at most C in L2 when one record comes or goes. Noise has
    standard deviation sigma * C in each coordinate. An empty batch is a step like any other.
Not covered
    A model in which one record's output depends on another's (batch norm, in-batch contrast);
    `check_model` refuses those that it can see.

| edge case            | what happens                                        |
|----------------------|-----------------------------------------------------|
| empty batch          | zero sum + noise                                    |
| zero gradient        | contributes zero                                    |
| NaN or inf gradient  | that record contributes zero                        |
| batch above the cap  | clipped in parts, summed, noised once               |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.privacy.noise import NoiseStream

__all__ = [
    "Loss",
    "PrivateOptimizer",
    "RecordGradients",
    "check_model",
    "private_step",
    "with_record_gradients",
]

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, C), target (B,)) -> loss of each record (B,)."""

RecordGradients = GradSampleModule
"""A model whose parameters get ``p.grad_sample`` (B, *p.shape) in the backward pass."""

_CROSS_RECORD = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def check_model(model: nn.Module) -> None:
    """Raises ModelError on a layer that mixes records, or a parameter that hooks can't see."""
    for name, module in model.named_modules():
        if isinstance(module, _CROSS_RECORD):
            raise ModelError(
                f"layer {name!r} is a {type(module).__name__}, which mixes records or keeps "
                "statistics of them",
                where="model",
                hint="use nn.GroupNorm or nn.LayerNorm",
            )
        own = [key for key, value in module.named_parameters(recurse=False) if value.requires_grad]
        if own and (wrong := _wrong_gradients(module)):
            raise ModelError(
                f"layer {name!r} is a {type(module).__name__} with {wrong}, for which Opacus 1.6 "
                "gives wrong per-record gradients or none",
                where="model",
                hint="leave that setting out",
            )
        if own and type(module) not in GradSampleModule.GRAD_SAMPLERS:
            raise ModelError(
                f"layer {name or 'model'!r} ({type(module).__name__}) holds parameter {own[0]!r}, "
                "for which there is no per-record gradient",
                where="model",
                hint="build it from Linear, Conv, Embedding, GroupNorm and LayerNorm",
            )


def _wrong_gradients(module: nn.Module) -> str:
    """The setting of a layer under which Opacus's hooks were seen to be off, or ""."""
    if getattr(module, "padding_idx", None) is not None:
        return "padding_idx"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "a padding_mode other than zeros"
    if isinstance(module, nn.LayerNorm) and "bias" not in dict(module.named_parameters()):
        return "bias=False"
    return ""


def with_record_gradients(model: nn.Module) -> GradSampleModule:
    """`model` with hooks that leave each parameter's per-record gradients in ``p.grad_sample``.

    The model's loss must be a sum over records, never a mean: a mean would scale each record's
    gradient by the number drawn.
    """
    check_model(model)
    # A first layer's inputs need no gradient; torch says so at each step, and it is no problem.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    return GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=True)


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's DPOptimizer with our clipping, noise stream and public divisor."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch: float,
        stream: NoiseStream,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=1,  # scale_grad below divides
            loss_reduction="sum",
        )
        self.divisor = expected_batch
        self.stream = stream

    def accumulate(self) -> None:
        """Adds the clipped sum of ``p.grad_sample`` to ``p.summed_grad`` and drops the former."""
        factors = clip_factors([p.grad_sample for p in self.params], self.max_grad_norm)
        broken = (factors == 0).nonzero().squeeze(1)
        for p in self.params:
            if len(broken):
                p.grad_sample[broken] = 0  # 0 x NaN would be NaN
            part = torch.einsum("i,i...", factors, p.grad_sample)
            p.summed_grad = part if p.summed_grad is None else p.summed_grad + part
            p.grad_sample = None

    def add_noise(self) -> None:
        """``p.grad = p.summed_grad + N(0, (sigma C)^2)``, in float64, cut to the model's dtype."""
        std = self.noise_multiplier * self.max_grad_norm
        noise = self.stream.normal(sum(p.numel() for p in self.params), std)
        for p, part in zip(self.params, noise.split([p.numel() for p in self.params]), strict=True):
            noisy = p.summed_grad.double() + part.to(p.device).view_as(p)
            p.grad = noisy.to(p.dtype)

    def scale_grad(self) -> None:
        """Divides by the public expected batch size."""
        for p in self.params:
            p.grad /= self.divisor

    def pre_step(self, closure: Any = None) -> bool:
        """Noise and division for sums that `accumulate` has made; clipping is already done."""
        self.add_noise()
        self.scale_grad()
        return True


def clip_factors(grad_samples: list[Tensor], clip_norm: float) -> Tensor:
    """(B,) factors min(1, C / norm) of each record over all parameters; 0 where not finite.

    Abadi et al. 2016 (arXiv:1607.00133v2), algorithm 1. Norms in float32 carry a relative error
    of some 1e-7; C is shrunk by 1e-6 so that no contribution exceeds it.
    """
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grad_samples]).norm(dim=0)
    factors = (clip_norm * (1 - 1e-6) / norms.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def private_step(
    model: GradSampleModule,
    optimizer: PrivateOptimizer,
    batch: Batch,
    loss: Loss,
    *,
    physical_batch: int,
    adjust: Callable[[], None] | None = None,
) -> None:
    """One step on `batch` (B may be 0), at most `physical_batch` records at once.

    `adjust` may add to ``p.grad`` what does not depend on records (a proximal term).
    """
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, max(1, len(batch)), physical_batch):
        part = batch[slice(start, start + physical_batch)]
        loss(model(part), part.target).sum().backward()
        optimizer.accumulate()
    optimizer.pre_step()
    if adjust is not None:
        adjust()
    optimizer.original_optimizer.step()
