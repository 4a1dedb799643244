"""When to stop early: standard errors small enough, looked at now and then."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bnstats.recompute.estimators import Estimate
from bnstats.recompute.layer_stats import with_eps
from bnstats.recompute.stage import StagedLayer

FIRST_LOOK = 8
"""Batches before the first look: the spread of fewer says little of their standard error."""


def looks(tolerance: float | None) -> Iterator[float]:
    """Yield after how many batches to look: every fourth at first, then an eighth part more.

    A look costs as much as taking in some ten batches' moments; so seldom, it is not felt.
    """
    if tolerance is not None:
        look = FIRST_LOOK
        while True:
            yield look
            look += max(4, look // 8)
    yield math.inf


def precise(estimate: Estimate, layers: Sequence[StagedLayer], tolerance: float | None) -> bool:
    """Whether the standard errors of every layer are at most the tolerance.

    Of the mean in standard deviations, of the variance relative, both with eps in the variance
    as in :class:`bnstats.Drift`, and each as its root mean square over the layer's channels.
    Layers that no batch has reached yet do not count.

    Args:
        estimate: of the layers, their channels laid end to end.
        layers: the layers.
        tolerance: the largest standard error that will do; with None none will.
    """
    if tolerance is None:
        return False
    channels = [layer.num_features for layer in layers]
    eps = torch.tensor([layer.module.eps for layer in layers], dtype=estimate.var.dtype)
    eps = eps.repeat_interleave(torch.tensor(channels)).to(estimate.var.device)
    square = with_eps(estimate.var, eps)
    of_mean = estimate.mean_stderr.square() / square
    of_var = (estimate.var_stderr / square).square()
    squares = torch.where(estimate.num_values == 0, 0, torch.stack([of_mean, of_var]))
    # NaN, from a single batch, compares as not precise.
    return bool((_mean_by_layer(squares, channels) <= tolerance**2).all())


def _mean_by_layer(values: Tensor, channels: list[int]) -> Tensor:
    sizes = torch.tensor(channels, device=values.device)
    layer = torch.arange(len(channels), device=values.device).repeat_interleave(sizes)
    sums = values.new_zeros(len(values), len(channels)).index_add_(1, layer, values)
    return sums / sizes
