"""LayerNorm, RMSNorm and GroupNorm: few parameters, so their gradients are instantiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.kernels import norms
from fedfuse.kernels.library import Room
from fedfuse.privacy.clipping.book import Book
from fedfuse.privacy.clipping.layer import Layer

__all__ = ["GroupNormLayer", "LayerNormLayer", "RmsNormLayer"]


class _NormLayer(Layer):
    """Each call keeps the per-record gradients themselves: (weight's, bias's), both (B, n)."""

    def run(self, x: Tensor) -> Any:
        return super().run(_full(x))

    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        for call in kept:
            for key, grads in zip(("weight", "bias"), call, strict=False):
                if key in self.places:
                    book.instantiate(self.places[key], grads)

    def backward(self, kernel: Callable[..., Any], g: Tensor, *saved: Tensor, back: bool) -> Any:
        """The gradient of the input by a `kernel`; those of weight and bias go into the book."""
        weight = self.module.weight
        rooms, grads = self.claim("weight", "bias"), None
        if rooms is None:
            grads = g.new_empty((2, len(g), weight.numel()))
            rooms = [Room.of(part) for part in grads]
        by_x = kernel(g, *saved, weight, rooms, back=back)
        if grads is not None:
            self.keep(*grads)
        return by_x, None, None


class LayerNormLayer(_NormLayer):
    """``nn.LayerNorm``, with or without a bias."""


class RmsNormLayer(_NormLayer):
    """``nn.RMSNorm``."""


class GroupNormLayer(_NormLayer):
    """``nn.GroupNorm``."""

    def run(self, x: Tensor) -> Any:
        x, last = _full(x), _channels_last(x)
        dense = last and x.is_contiguous(memory_format=torch.channels_last)
        if dense and norms.fits(x, self.module.weight):
            return _CompiledGroupNorm.apply(x, self.now.anchor, self)  # type: ignore[no-untyped-call]
        if last and x.shape[1] < _WIDE * self.module.num_groups:
            return _NarrowGroupNorm.apply(x, self.now.anchor, self)  # type: ignore[no-untyped-call]
        return super().run(x)


def _full(x: Tensor) -> Tensor:
    """Under autocast, norms are computed in float32."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def _by_record(x: Tensor, size: int) -> Tensor:
    """(B, ..., n) -> (B, T, n), for a norm over the last `size` numbers."""
    return x.reshape(x.shape[0], -1, size)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: LayerNormLayer) -> Tensor:
        m: Any = layer.module
        x = x.contiguous()
        y, mean, rstd = torch.native_layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, mean, rstd = ctx.saved_tensors
        m: Any = ctx.layer.module
        g = g.contiguous()
        if len(m.normalized_shape) == 1 and norms.fits(g, x, m.weight):
            back = ctx.needs_input_grad[0]
            return ctx.layer.backward(norms.layer_backward, g, x, mean, rstd, back=back)
        size = math.prod(m.normalized_shape)
        by_record = _by_record(g, size)
        if by_record.shape[1] == 1:
            weight = (x - mean).mul_(rstd).mul_(g)
            ctx.layer.keep(weight, by_record.squeeze(1))
        else:
            centred = _by_record((x - mean).mul_(g), size)
            weight = torch.bmm(rstd.reshape(len(x), 1, -1), centred)
            ctx.layer.keep(weight, by_record.sum(1))
        back = None
        if ctx.needs_input_grad[0]:
            back = torch.ops.aten.native_layer_norm_backward(
                g, x, m.normalized_shape, mean, rstd, m.weight, m.bias, [True, False, False]
            )[0]
        return back, None, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: RmsNormLayer) -> Tensor:
        m: Any = layer.module
        over = tuple(range(-len(m.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if m.eps is None else m.eps
        rstd = (x.square().mean(over, keepdim=True) + eps).rsqrt_()
        ctx.layer, ctx.over = layer, over
        ctx.save_for_backward(x, rstd)
        return (x * rstd).mul_(m.weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, rstd = ctx.saved_tensors
        m: Any = ctx.layer.module
        unit = x * rstd
        size = math.prod(m.normalized_shape)
        ctx.layer.keep(_by_record(g * unit, size).sum(1))
        back = None
        if ctx.needs_input_grad[0]:
            slope = g * m.weight
            shared = (slope * unit).mean(ctx.over, keepdim=True)
            back = (slope - unit.mul_(shared)).mul_(rstd)
        return back, None, None


class _GroupNorm(torch.autograd.Function):
    """B records of G groups are one record of B G groups: torch's own backward kernel then gives
    the gradient of each record's copy of weight and bias, in the pass that gives the input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: GroupNormLayer) -> Tensor:
        m: Any = layer.module
        ctx.last = _channels_last(x)
        x = x if ctx.last else x.contiguous()
        rows, channels = x.shape[:2]
        area = x.numel() // max(1, rows * channels)
        y, mean, rstd = torch.native_group_norm(
            x, m.weight, m.bias, rows, channels, area, m.num_groups, m.eps
        )
        ctx.layer, ctx.sizes = layer, (rows, channels, area, m.num_groups)
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, mean, rstd = ctx.saved_tensors
        m: Any = ctx.layer.module
        rows, channels, area, groups = ctx.sizes
        kernel = torch.ops.aten.native_group_norm_backward
        if ctx.last:
            g = g.contiguous(memory_format=torch.channels_last)
            bias = g.sum((2, 3))
            weight = (g * x).sum((2, 3)).view(rows, groups, -1)
            weight = (weight - bias.view_as(weight) * mean.unsqueeze(2)) * rstd.unsqueeze(2)
            ctx.layer.keep(weight.view(rows, channels), bias)
            if not ctx.needs_input_grad[0]:
                return None, None, None
            which = [True, False, False]
            back = kernel(g, x, mean, rstd, m.weight, rows, channels, area, groups, which)[0]
            return back, None, None
        back, weight, bias = kernel(
            g.contiguous().view(1, rows * channels, area),
            x.view(1, rows * channels, area),
            mean.view(1, -1),
            rstd.view(1, -1),
            m.weight.repeat(rows),
            1,
            rows * channels,
            area,
            rows * groups,
            [ctx.needs_input_grad[0], True, True],
        )
        ctx.layer.keep(weight.view(rows, channels), bias.view(rows, channels))
        return (None if back is None else back.view_as(x)), None, None


class _CompiledGroupNorm(torch.autograd.Function):
    """Pictures with their channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: GroupNormLayer) -> Tensor:
        m: Any = layer.module
        y, moments = norms.group_forward(x, m.num_groups, m.weight, m.bias, m.eps)
        ctx.layer = layer
        ctx.save_for_backward(x, moments)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        g = g.contiguous(memory_format=torch.channels_last)
        back = ctx.needs_input_grad[0]
        return ctx.layer.backward(norms.group_backward, g, *ctx.saved_tensors, back=back)


_WIDE = 8
"""Channels of a group from which on torch's kernel for channels last is the faster one."""


class _NarrowGroupNorm(torch.autograd.Function):
    """Pictures with their channels last and few channels in a group, where torch's kernel is slow:
    by sums over places, (B, L, C) -> (B, C), and of them by group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: GroupNormLayer) -> Tensor:
        m: Any = layer.module
        places = _places(x)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.numbers = places.shape[1] * (places.shape[2] // m.num_groups)
        mean = _by_group(places.sum(1), m.num_groups).div_(ctx.numbers)
        centred = places - _to_channels(mean, places)
        spread = _by_group(centred.square().sum(1), m.num_groups).div_(ctx.numbers)
        rstd = _to_channels(spread.add_(m.eps).rsqrt_(), places)
        ctx.save_for_backward(centred, rstd)
        return _pictures(torch.addcmul(m.bias, centred, rstd * m.weight), x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        centred, rstd = ctx.saved_tensors
        m: Any = ctx.layer.module
        g = _places(g.contiguous(memory_format=torch.channels_last))
        bias, weight = g.sum(1), (g * centred).sum(1).mul_(rstd.squeeze(1))
        ctx.layer.keep(weight, bias)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        shift, slope = (
            _to_channels(_by_group(sums * m.weight, m.num_groups) / -ctx.numbers, g) * rstd
            for sums in (bias, weight)
        )
        back = torch.addcmul(shift, centred, slope * rstd).addcmul_(g, rstd * m.weight)
        return _pictures(back, ctx.shape), None, None


def _places(x: Tensor) -> Tensor:
    """(B, C, H, W), channels last -> (B, H W, C), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pictures(places: Tensor, shape: torch.Size) -> Tensor:
    """(B, H W, C) -> (B, C, H, W), channels last, the same memory."""
    return places.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _by_group(sums: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, G), summed up."""
    total: Tensor = sums.unflatten(1, (groups, -1)).sum(2)
    return total


def _to_channels(values: Tensor, like: Tensor) -> Tensor:
    """(B, G) -> (B, 1, C) for `like` (B, L, C): each channel has its group's."""
    channels = like.shape[2] // values.shape[1]
    wide: Tensor = values.unsqueeze(2).expand(-1, -1, channels).reshape(len(values), 1, -1)
    return wide


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


LayerNormLayer.node, RmsNormLayer.node, GroupNormLayer.node = _LayerNorm, _RmsNorm, _GroupNorm

NORMS: dict[type[nn.Module], type[Layer]] = {
    nn.LayerNorm: LayerNormLayer,
    nn.RMSNorm: RmsNormLayer,
    nn.GroupNorm: GroupNormLayer,
}
