"""Normalization by moments that come from the input itself, which its gradient knows.

With n values per channel, those of some positions and of some processes, and sums over all
positions and processes::

    z = (x - mean) / sqrt(var + eps);  output = weight z + bias
    g = weight grad;  grad_x = (g - valid (sum(g) + z sum(g z)) / n) / sqrt(var + eps)

Every position is normalized and has a gradient of its own; the moments depend on valid ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnstats.errors import InvalidValueError
from bnstats.layers.batch import Batch
from bnstats.layers.replicas import Replicas


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Normalize x, of shape (N, C, ...), by its own mean and biased variance."""
    arguments = (x, weight, bias, mean, var, eps, None, None, None)
    output: Tensor = _Normalize.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def normalize_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch: Batch,
    count: Tensor,
) -> Tensor:
    """Normalize x by the mean and biased variance of a batch of ``count`` values."""
    arguments = (x, weight, bias, mean, var, eps, batch.mask, count, batch.replicas)
    output: Tensor = _Normalize.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def by_definition(
    x: Tensor, eps: float, mask: Tensor | None
) -> tuple[Tensor, Tensor | int, Tensor, Tensor]:
    """Compute z by torch's operators alone, for what transforms or differentiates each of them.

    Returns:
        z, and the number, mean and biased variance of the valid values.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        mean = wide.mean(axes, keepdim=True)
        centered = wide - mean
        var = centered.square().mean(axes, keepdim=True)
        return centered * (var + eps).rsqrt(), x.numel() // x.shape[1], mean.view(-1), var.view(-1)
    count = mask.expand(x.shape[0], 1, *x.shape[2:]).sum()
    divisor = count.clamp(min=1)
    mean = torch.where(mask, wide, 0).sum(axes, keepdim=True) / divisor
    centered = wide - mean
    var = torch.where(mask, centered, 0).square().sum(axes, keepdim=True) / divisor
    return centered * (var + eps).rsqrt(), count, mean.flatten(), var.flatten()


def scale_and_shift(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``weight z + bias`` along the channels."""
    if weight is not None:
        z = z * _along_channels(weight, z)
    return z if bias is None else z + _along_channels(bias, z)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        mask: Tensor | None,
        count: Tensor | None,
        replicas: Replicas | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, mask, count)
        ctx.eps, ctx.replicas = eps, replicas
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, mask, count = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        if count is None:
            # The kernel of nn.BatchNorm, which has a derivative of its own.
            inverse = (var + ctx.eps).rsqrt_()
            grads = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, inverse, True, ctx.eps, needed
            )
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(ctx, grad, x, weight, mask)
        else:
            grads = _gradients(ctx, grad, x, weight, mean, var, mask, count)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 6


def _gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    factor = torch.ones_like(mean) if weight is None else weight
    inverse = (var + ctx.eps).rsqrt_()
    if x.numel():
        # CUDA's kernel takes mean and inverse in place of the statistics for some layouts of x.
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, factor, mean, var, mean, inverse, False, ctx.eps, [True] * 3
        )
    else:
        direct, grad_weight, grad_bias = grad, torch.zeros_like(mean), torch.zeros_like(mean)
    sums = torch.stack((grad_bias, grad_weight))
    if ctx.replicas is not None:
        sums = ctx.replicas.sum(sums)
    average, slope = sums * (factor * inverse / count.clamp(min=1))
    slope = slope * inverse
    through_moments = torch.addcmul(
        _along_channels(average - slope * mean, x), x, _along_channels(slope, x)
    )
    direct = direct.to(through_moments.dtype)
    if mask is None:
        grad_x = direct.sub_(through_moments)
    else:
        grad_x = direct.addcmul_(through_moments, mask.to(direct.dtype), value=-1)
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _differentiable_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return gradients that have gradients themselves: create_graph asks for that."""
    if ctx.replicas is not None:
        raise InvalidValueError(
            "create_graph: expected False for a synchronized layer, got True: the collective in "
            "its gradient has no derivative; use sync=None for second derivatives"
        )
    output = scale_and_shift(by_definition(x, ctx.eps, mask)[0], weight, None).to(x.dtype)
    inputs = [x] if weight is None else [x, weight]
    grads = torch.autograd.grad(output, inputs, grad, create_graph=True, allow_unused=True)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return grads[0], None if weight is None else grads[1], grad.sum(axes)


def _along_channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 2))
