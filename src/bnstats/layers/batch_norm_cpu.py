"""Training-mode batch norm on CPU by the fast sums of :mod:`bnstats.reduction`.

torch's own kernel computes the statistics on CPU several times slower than memory allows. Here
they come from :func:`~bnstats.reduction.from_rows`; torch's kernels for given statistics do
the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnstats.private import only_reverse_mode
from bnstats.reduction import SHORTEST_ROW, from_rows

_FEWEST_VALUES = 2**18
"""Values of an input from which on this pays: below, small operations cost more than it saves."""


class Normalized(NamedTuple):
    """The output of batch norm, and its batch's mean and unbiased variance, each (C,)."""

    output: Tensor
    mean: Tensor
    var: Tensor


def is_faster(x: Tensor, running_mean: Tensor) -> bool:
    """Whether an input is one that this is made for; all others are torch's kernel's."""
    return (
        x.numel() >= _FEWEST_VALUES
        and x.is_cpu
        and type(x) is Tensor  # no subclass, which may be no more than a shape
        and x.dim() > 2
        and x.numel() >= SHORTEST_ROW * x.shape[0] * x.shape[1]
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == running_mean.dtype
        and x.is_contiguous()
        and only_reverse_mode()
    )


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalized | None:
    """Normalize x, of shape (N, C, ...), by its own statistics; None if that did not pay."""
    with torch.no_grad():
        moments = from_rows(x)
        if moments is None:
            return None
        wide_mean, m2 = moments
        count = x.numel() // x.shape[1]
        mean, var = wide_mean.to(x.dtype), m2.div_(count).to(x.dtype)
    output: Tensor = _Normalize.apply(x, weight, bias, mean, var, eps)  # type: ignore[no-untyped-call]
    return Normalized(output, mean, var * (count / (count - 1)))


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
