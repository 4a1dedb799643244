"""Training-mode batch norm on CPU, and its batch's statistics.

For large inputs torch's own kernel computes the statistics several times slower than memory
allows. There they come from the sums over rows of :mod:`bnstats.reduction`; torch's kernels for
given statistics do the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnstats.layers.given_moments import normalize
from bnstats.private import only_reverse_mode
from bnstats.reduction import SHORTEST_ROW, Expected, from_rows, mean_and_m2

_FEWEST_VALUES = 2**18
"""Values of an input from which on the sums over rows are faster than torch's kernel."""


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, expected: Expected
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x, of shape (N, C, ...), by its own statistics.

    Returns:
        The output, and the batch's mean and unbiased variance: vectors like the expected ones.
    """
    like, _ = expected
    fast = _fast_moments(x, like.dtype, expected)
    if fast is not None:
        mean, var = fast
        count = x.numel() // x.shape[1]
        output = normalize(x, weight, bias, mean, var, eps)
        return output, mean, var * (count / (count - 1))
    # With momentum 1 the kernel leaves the batch's own statistics here: no second pass over x.
    # Autograd keeps them, so they are not written to afterwards. F.batch_norm calls the same
    # kernel, after checks that are done: they cost 2 microseconds.
    mean, var = torch.zeros_like(like), torch.zeros_like(like)
    output = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)[0]
    return output, mean, var


@torch.no_grad()
def moments(x: Tensor, dtype: torch.dtype, expected: Expected) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel, on any device."""
    if x.is_cpu:
        fast = _fast_moments(x, dtype, expected)
        return torch.batch_norm_update_stats(x.to(dtype), None, None, 0.0) if fast is None else fast
    mean, m2 = mean_and_m2(x)
    return mean.to(dtype), (m2 / (x.numel() // x.shape[1])).to(dtype)


def normalize_whole(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Normalize x by its own moments, on any device."""
    if x.is_cpu and x.numel() < _FEWEST_VALUES:
        # It takes the moments again, and costs less than an autograd function of Python's.
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0]
    return normalize(x, weight, bias, mean, var, eps)


def _fast_moments(
    x: Tensor, dtype: torch.dtype, expected: Expected
) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`moments` does from sums over rows, where they are faster."""
    if x.numel() < _FEWEST_VALUES or not _has_fast_sums(x, dtype):
        return None
    with torch.no_grad():  # entered for large inputs only: it costs microseconds
        sums = from_rows(x, expected)
    if sums is None:
        return None
    mean, m2 = sums
    return mean.to(dtype), m2.div_(x.numel() // x.shape[1]).to(dtype)


def _has_fast_sums(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.dim() > 2
        and x.numel() >= SHORTEST_ROW * x.shape[0] * x.shape[1]
        and x.dtype == dtype
        and x.is_contiguous()
        and only_reverse_mode()
    )
