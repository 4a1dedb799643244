"""Normalization about zero with a given variance, and the backward of moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnstats.accumulators import ring_buffer
from bnstats.errors import InvalidValueError
from bnstats.layers.given_moments import with_finite_padding
from bnstats.layers.operators import opaque, referred, register
from bnstats.layers.tracking import replace_where
from bnstats.private import intercepted, is_batch_of_gradients, on_host, only_reverse_mode
from bnstats.reduction import along_channels

_SMALLEST_FACTOR = 1e-20
"""What stands for a smaller factor where one is divided by: far below rounding."""


def normalize_about_zero(*arguments: Any) -> Tensor:
    """Normalize x about zero; in the backward let the window stand in for the batch's average.

    With n values per channel::

        z = x / sqrt(var + eps);  output = weight ratio z + bias
        g = weight ratio grad;  psi = sum(g z) / n;  Psi = mean of psi over the window of gradients
        grad_x = (g - z Psi) / sqrt(var + eps)

    Only x and vectors of one number per channel are kept for the backward.

    Args:
        arguments: x, weight, bias, var, ratio, eps; for the backward step, gradients,
            gradient_steps, warmup; and of a batch that is not all of x and no more, mask, number
            of values, replicas. An autograd function takes no keywords.
    """
    output: Tensor
    if intercepted():
        *others, replicas = arguments
        output = _NORMALIZE(*others, None if replicas is None else replicas.reference)
    else:
        output = _AboutZero.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    ratio: Tensor,
    eps: float,
    *_: Any,
) -> Tensor:
    factor = ratio if weight is None else weight * ratio
    return F.batch_norm(x, torch.zeros_like(var), var, factor, bias, False, 0.0, eps)


def _keep(ctx: Any, *arguments: Any) -> None:
    """Keep what the backward needs."""
    x, weight, _, var, ratio, ctx.eps, step, gradients, gradient_steps, ctx.warmup = arguments[:10]
    mask, count, ctx.replicas = arguments[10:]
    ctx.save_for_backward(x, weight, var, ratio, step, mask, count)
    # Not saved but held: other forwards may write to them before this backward does.
    ctx.gradients, ctx.gradient_steps = gradients, gradient_steps
    # Where a function transform is at work, each gradient is one of a graph.
    ctx.in_graph = torch.compiler.is_compiling() or not only_reverse_mode()


class _AboutZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _keep(ctx, *arguments)
        return _normalize(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not ctx.in_graph:
            raise InvalidValueError(
                "MovingAverageBatchNorm: create_graph: expected False, got True: its gradient "
                "is no derivative of its output, and has none itself; use evaluation mode or "
                "nn.BatchNorm for second derivatives"
            )
        if is_batch_of_gradients(grad):
            raise InvalidValueError(
                "MovingAverageBatchNorm: is_grads_batched (or jacobian's vectorize): expected "
                "False, got True: its window takes one gradient for each forward; loop over the "
                "gradients with retain_graph=True, or use evaluation mode"
            )
        x, weight, var, ratio, step, mask, count = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        factor = ratio if weight is None else weight * ratio
        # SyncBatchNorm's operators take no mask, and the compiler has no rule for them.
        if x.is_cuda and mask is None and x.numel() and not torch.compiler.is_compiling():
            grad_z, grad_bias, input_gradient = _on_cuda(grad, x, factor, var, ctx.eps)
        else:
            grad_z, grad_bias, input_gradient = _anywhere(grad, x, factor, var, ctx.eps, mask)

        psi = (grad_z * factor).detach()
        if ctx.replicas is not None:
            psi = ctx.replicas.sum(psi)
        psi = psi / (x.numel() // x.shape[1] if count is None else count.clamp(min=1))
        add = opaque(_OPERATOR, _add_gradient)
        mean = add(ctx.gradients, ctx.gradient_steps, step, psi, ctx.warmup)
        grad_x = input_gradient(mean) if needs_x else None
        grad_weight = grad_z * ratio if needs_weight else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, *[None] * 10


class _AboutZeroInOperator(_AboutZero):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *others, reference = inputs
        _keep(ctx, *others, None if reference is None else referred(reference))


def _normalize_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    var: Tensor,
    ratio: Tensor,
    eps: float,
    step: Tensor,
    gradients: Tensor,
    gradient_steps: Tensor,
    warmup: int,
    mask: Tensor | None,
    count: Tensor | None,
    replicas: Tensor | None,
) -> Tensor:
    kept = step, gradients, gradient_steps, warmup, mask, count, replicas
    return _normalize(x, weight, bias, var, ratio, eps, *kept)


# An autograd function is no operator: torch.func.functionalize has no rule for one.
_NORMALIZE = register(
    "moving_average_normalize",
    _normalize_operator,
    lambda x, *_: torch.empty_like(x),
    backward=_AboutZeroInOperator,
)


def _add_gradient(
    gradients: Tensor, gradient_steps: Tensor, step: Tensor, psi: Tensor, warmup: int
) -> Tensor:
    """Take a backward's psi into the window, and return its part in the window's mean."""
    psi = psi.detach()  # a traced step is given weights that require a gradient
    if on_host(psi):
        arrays = (gradients.numpy(), gradient_steps.numpy(), int(step), psi.numpy())
        # Torch does not warn of what is not finite either. (No decorator: export traces none.)
        with np.errstate(all="ignore"):
            return torch.from_numpy(ring_buffer.add_on_host(*arrays, warmup))
    ring, owners, mean = ring_buffer.add_on_device(gradients, gradient_steps, step, psi, warmup)
    moves = step > 0
    replace_where(gradients, moves, ring)
    replace_where(gradient_steps, moves, owners)
    return mean


def _operator(
    gradients: Tensor, gradient_steps: Tensor, step: Tensor, psi: Tensor, warmup: int
) -> Tensor:
    mean = _add_gradient(gradients, gradient_steps, step, psi, warmup)
    return mean.clone()  # for what an operator returns may be no argument of its


def _operator_shape(gradients: Tensor, *_: object) -> Tensor:
    return gradients.new_empty(gradients.shape[1])


_OPERATOR = register(
    "moving_average_gradient",
    _operator,
    _operator_shape,
    *("gradients", "gradient_steps"),
    replayed=True,
)


Fused: TypeAlias = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""Per channel ``sum(grad z)`` and ``sum(grad)``, and the function from Psi to grad_x."""


def _anywhere(
    grad: Tensor, x: Tensor, factor: Tensor, var: Tensor, eps: float, mask: Tensor | None
) -> Fused:
    """Use the backward of evaluation-mode batch norm: the sums and ``g / sqrt(var + eps)``."""
    zeros = torch.zeros_like(var)
    if x.numel() == 0:  # a share of no values, which the kernel does not take
        return zeros, zeros, lambda _: torch.zeros_like(x)
    # torch.vmap has no rule for addcmul_.
    transformed, dtype, square = intercepted(), grad.dtype, var + eps
    if transformed:  # and its rule does not take half inputs with wider statistics
        grad, x = grad.to(var.dtype), x.to(var.dtype)
    # In evaluation mode the kernel on CPU does not read what training saves. Those of CUDA and
    # torch.vmap's rule ask for it, and may take it in place of the running statistics.
    saved = (zeros, square.rsqrt()) if transformed or not x.is_cpu else (None, None)
    x, (partial, grad_z, grad_bias) = with_finite_padding(
        lambda x: torch.ops.aten.native_batch_norm_backward(
            grad, x, factor, zeros, var, *saved, False, eps, [True, True, True]
        ),
        x,
        grad,
        mask,
    )

    def input_gradient(mean: Tensor) -> Tensor:
        factor_z = along_channels(mean / square, x)
        add = torch.addcmul if transformed else Tensor.addcmul_
        own = x if mask is None else torch.where(mask, x, 0)  # others have no part in the variance
        return add(partial, own, factor_z, value=-1).to(dtype)

    return grad_z, grad_bias, input_gradient


def _on_cuda(grad: Tensor, x: Tensor, factor: Tensor, var: Tensor, eps: float) -> Fused:
    """Use SyncBatchNorm's operators, which take any statistics: two passes, as one BatchNorm."""
    grad, x = _same_layout(grad, x)
    zeros, inverse = torch.zeros_like(var), (var + eps).rsqrt()
    grad_bias, grad_xz, _, _ = torch.batch_norm_backward_reduce(
        grad, x, zeros, inverse, factor, True, False, False
    )

    def input_gradient(mean: Tensor) -> Tensor:
        # The operator computes ``(grad - x inverse^2 total / count) inverse factor``. A factor
        # of 0, a weight's start in many a residual branch, would leave Psi out.
        safe = torch.where(factor.abs() < _SMALLEST_FACTOR, _SMALLEST_FACTOR, factor)
        count = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            grad, x, zeros, inverse, safe, zeros, mean / (inverse * safe), count
        )

    return grad_xz * inverse, grad_bias, input_gradient


def _same_layout(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both contiguous, or both channels_last."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout):
            return grad.contiguous(memory_format=layout), x
    return grad.contiguous(), x.contiguous()
