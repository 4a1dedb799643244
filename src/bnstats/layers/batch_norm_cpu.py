"""Training-mode batch norm on CPU, and its batch's statistics.

For large inputs torch's own kernel computes the statistics several times slower than memory
allows. There they come from the sums over rows of :mod:`bnstats.reduction`; torch's kernels for
given statistics do the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnstats.private import only_reverse_mode
from bnstats.reduction import SHORTEST_ROW, from_rows

_FEWEST_VALUES = 2**18
"""Values of an input from which on the sums over rows are faster than torch's kernel."""


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x, of shape (N, C, ...), by its own statistics.

    Returns:
        The output, and the batch's mean and unbiased variance: vectors like the one given.
    """
    if x.numel() >= _FEWEST_VALUES and _has_fast_sums(x, like.dtype):
        with torch.no_grad():
            moments = from_rows(x)
        if moments is not None:
            return _by_given_moments(x, weight, bias, eps, *moments)
    # With momentum 1 the kernel leaves the batch's own statistics here: no second pass over x.
    # Autograd keeps them, so they are not written to afterwards. F.batch_norm calls the same
    # kernel, after checks that are done: they cost 2 microseconds.
    mean, var = torch.zeros_like(like), torch.zeros_like(like)
    output = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)[0]
    return output, mean, var


def _has_fast_sums(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.dim() > 2
        and x.numel() >= SHORTEST_ROW * x.shape[0] * x.shape[1]
        and x.dtype == dtype
        and x.is_contiguous()
        and only_reverse_mode()
    )


def _by_given_moments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    wide_mean: Tensor,
    m2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[1]
    mean, var = wide_mean.to(x.dtype), m2.div_(count).to(x.dtype)
    output: Tensor = _Normalize.apply(x, weight, bias, mean, var, eps)  # type: ignore[no-untyped-call]
    return output, mean, var * (count / (count - 1))


class _Normalize(torch.autograd.Function):
    """Batch norm with the statistics of x, which the gradient knows to depend on x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt_())
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        # The kernel of nn.BatchNorm, which has a derivative of its own.
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *grads, None, None, None
