"""BatchNorm with the exact mean and variance of all values since the last reset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnstats.accumulators import cumulative
from bnstats.accumulators.exponential import averaging
from bnstats.layers.base import RunningStatsBatchNorm, count_
from bnstats.moments import Weights


class CumulativeBatchNorm(RunningStatsBatchNorm):
    r"""BatchNorm over (N, C, ...) of 2 to 5 dimensions, with cumulative statistics.

    Output and gradients in training are ``nn.BatchNorm``'s. ``running_mean`` and
    ``running_var`` are the mean and the unbiased variance of every value seen since the last
    ``reset_running_stats()``, whatever the sizes of the batches: for a batch of n values with
    mean m and unbiased variance s, after N values, ``d = m - running_mean`` and ``T = N + n``::

        running_mean <- running_mean + (n / T) d
        running_var  <- ((N - 1) running_var + (n - 1) s + (N n / T) d^2) / (T - 1)

    It is the layer for a pass over data with the weights fixed (reset, then forward in
    training mode); in training the weights move, and old values stay in the statistics for
    ever. For a trained model :func:`bnstats.recompute_population_stats` does the whole job.

    A batch whose statistics are not finite changes nothing; an empty one neither. Running
    statistics move once per training forward, also under activation checkpointing.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance before the square root.
        momentum: kept for the way back to ``nn.BatchNorm``, and of no effect but for 1.0, with
            which the statistics are those of the latest batch alone (fvcore's
            ``update_bn_stats`` asks for that).
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics; evaluation then uses the
            batch's, as in ``nn.BatchNorm``.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Attributes:
        num_values_tracked: the N above, int64. A plain checkpoint has none: it starts at 0,
            so that the statistics loaded serve evaluation until the first training batch
            replaces them.

    Raises:
        InvalidValueError: num_features below 1, eps not positive, momentum outside [0, 1], or
            an input of the wrong shape.
        InvalidTypeError: an argument that is not a number.

    Example:
        >>> import torch
        >>> from bnstats import CumulativeBatchNorm1d
        >>> layer = CumulativeBatchNorm1d(1)
        >>> for batch in torch.arange(10.0).reshape(10, 1).split([2, 5, 3]):
        ...     _ = layer(batch)
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4)
        (4.5, 9.1667)

    References:
        Chan, Golub, LeVeque (1983), "Algorithms for Computing the Sample Variance", The
        American Statistician 37(3).
    """

    num_values_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = None,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        counter = torch.tensor(0, device=device) if track_running_stats else None
        self.register_buffer("num_values_tracked", counter)

    def _weigh(self, batch_values: int, counted: Tensor | int) -> Weights:
        count_(self._buffers["num_batches_tracked"], 1, counted)
        counter = self._buffers["num_values_tracked"]
        if self.momentum == 1:
            assert counter is not None
            counter.mul_(1 - counted)
        num_values = count_(counter, batch_values, counted)
        if self.momentum == 1:
            return averaging(1, pooled=False)
        return cumulative(num_values - batch_values, batch_values)

    def reset_running_stats(self) -> None:
        """Forget all values: mean 0, variance 1, counters 0."""
        super().reset_running_stats()
        # nn.BatchNorm resets in its constructor, before this buffer is there.
        counter = getattr(self, "num_values_tracked", None)
        if counter is not None:
            counter.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch passes a copy of the caller's mapping, and completes it in the same way.
        key, mean = prefix + "num_values_tracked", state_dict.get(prefix + "running_mean")
        if isinstance(mean, Tensor) and self.num_values_tracked is not None:
            state_dict.setdefault(key, torch.tensor(0, device=mean.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class CumulativeBatchNorm1d(CumulativeBatchNorm, nn.BatchNorm1d):
    """:class:`CumulativeBatchNorm` over (N, C) or (N, C, L); also an ``nn.BatchNorm1d``.

    Example:
        >>> import torch
        >>> from bnstats import CumulativeBatchNorm1d
        >>> CumulativeBatchNorm1d(3)(torch.randn(8, 3)).shape
        torch.Size([8, 3])
    """

    _input_dims = (2, 3)


class CumulativeBatchNorm2d(CumulativeBatchNorm, nn.BatchNorm2d):
    """:class:`CumulativeBatchNorm` over (N, C, H, W); also an ``nn.BatchNorm2d``.

    Example:
        >>> import torch
        >>> from bnstats import CumulativeBatchNorm2d
        >>> CumulativeBatchNorm2d(3)(torch.randn(8, 3, 5, 5)).shape
        torch.Size([8, 3, 5, 5])
    """

    _input_dims = (4,)


class CumulativeBatchNorm3d(CumulativeBatchNorm, nn.BatchNorm3d):
    """:class:`CumulativeBatchNorm` over (N, C, D, H, W); also an ``nn.BatchNorm3d``.

    Example:
        >>> import torch
        >>> from bnstats import CumulativeBatchNorm3d
        >>> CumulativeBatchNorm3d(3)(torch.randn(2, 3, 4, 5, 5)).shape
        torch.Size([2, 3, 4, 5, 5])
    """

    _input_dims = (5,)
