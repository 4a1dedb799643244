"""BatchNorm with a debiased, pooled exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnstats.accumulators import exponential, per_batch
from bnstats.layers.base import RunningStatsBatchNorm
from bnstats.moments import Number, Weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class EMABatchNorm(RunningStatsBatchNorm):
    r"""BatchNorm over (N, C, ...) of 2 to 5 dimensions, with a better moving average.

    Output and gradients in training are ``nn.BatchNorm``'s. The running statistics differ: for
    batch t of n values with mean m and unbiased variance s, ``d = m - running_mean`` and weight
    a, with Q the sum over the batches before of their squared weights, over n::

        a  = momentum / (1 - (1 - momentum)^t)                           debiased, else momentum
        Q' = (1 - a)^2 Q + a^2 / n
        running_mean <- running_mean + a d
        running_var  <- ((1 - a) (1 - Q) running_var + a (n - 1) / n s + a (1 - a) d^2) / (1 - Q')
                                                        pooled, else (1 - a) running_var + a s

    Debiased, the initial 0 and 1 have no part in the averages: they are right from the first
    batch on, where ``nn.BatchNorm`` needs some ``3 / momentum`` batches. Pooled, running_var
    counts the variance between batch means too, as the variance over all values does; an
    average of within-batch variances misses it, and small batches of unlike data miss most.
    Q takes out what batch means differ by chance alone: for batches of one size from one
    distribution the expectation of running_var is their variance, for every n, t and momentum.

    An empty batch, a batch whose statistics are not finite, and any batch with momentum 0 change
    nothing. Running statistics move once per training forward, also under activation
    checkpointing. After ``module.half()`` the buffers are half, as ``nn.BatchNorm``'s; each
    update is computed in float32, and a batch that they cannot hold changes nothing either.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance before the square root.
        momentum: weight of the new batch in the limit, in [0, 1]; None weighs batch t by 1/t. 1
            keeps the latest batch alone. Above 0.5 a warning says what Keras and Flax call so.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics; evaluation then uses the
            batch's, as in ``nn.BatchNorm``.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with affine, learn a bias too.
        sync: whose values make up a batch in training: None for this process alone, True for
            all processes, or a process group. Without initialized processes there is only one.
        debias: take the initial state out of the average.
        pooled: count the variance between batches.

    Raises:
        InvalidValueError: num_features below 1, eps not positive, momentum outside [0, 1], an
            input or a mask of the wrong shape, or a training batch of one value per channel.
        InvalidTypeError: an argument that is not a number.
        PeerError: with ``sync``, a forward failed in another process.

    Note:
        ``num_batches_tracked`` is the t above. A checkpoint from before torch 0.4.1 has none
        (torchvision's first ImageNet weights are such), or one of 0 if torch saved it again.
        Averages that are loaded or converted so, and are not the initial ones, are taken to
        have long forgotten their start.

    Example:
        >>> import torch
        >>> from bnstats import EMABatchNorm1d
        >>> layer = EMABatchNorm1d(2)
        >>> _ = layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> layer.running_mean.tolist(), layer.running_var.tolist()
        ([2.0, 20.0], [2.0, 200.0])

    References:
        Ioffe and Szegedy (2015), "Batch Normalization", arXiv:1502.03167; for the debiasing,
        Kingma and Ba (2015), "Adam", arXiv:1412.6980, section 3; for the pooled variance, Wu
        and Johnson (2021), "Rethinking Batch in BatchNorm", arXiv:2105.07576, appendix.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: ProcessGroup | bool | None = None,
        debias: bool = True,
        pooled: bool = True,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            sync=sync,
        )
        self.debias = debias
        self.pooled = pooled

    def _weigh(self, counts: Sequence[Number], batch_values: Number) -> Weights:
        (num_batches,) = counts
        if self.momentum is None:
            return per_batch(num_batches, batch_values, pooled=self.pooled)
        return exponential(
            num_batches, self.momentum, batch_values, debias=self.debias, pooled=self.pooled
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self.adopt_statistics()

    def adopt_statistics(self) -> None:
        """Keep statistics that no batch was counted for; a debiased average would drop them.

        ``nn.BatchNorm`` counts a checkpoint from before torch 0.4.1 as 0 batches. Its
        averages are assumed to be free of their start, and ``num_batches_tracked`` is set so.
        """
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.debias or mean is None or var is None or counter is None:
            return
        if any(x.is_meta for x in (mean, var, counter)):  # part of a checkpoint was assigned
            return
        if self.momentum and counter == 0 and (mean.any() or (var != 1).any()):
            # So many that the debiased weight equals momentum to float32 rounding.
            counter.fill_(math.ceil(-math.log(torch.finfo(torch.float32).eps) / self.momentum))

    def extra_repr(self) -> str:
        """Return the options, those that ``nn.BatchNorm`` lacks last."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, debias={self.debias}, pooled={self.pooled}"


class EMABatchNorm1d(EMABatchNorm, nn.BatchNorm1d):
    """:class:`EMABatchNorm` over (N, C) or (N, C, L); also an ``nn.BatchNorm1d``.

    Example:
        >>> import torch
        >>> from bnstats import EMABatchNorm1d
        >>> EMABatchNorm1d(3)(torch.randn(8, 3)).shape
        torch.Size([8, 3])
    """

    _input_dims = (2, 3)


class EMABatchNorm2d(EMABatchNorm, nn.BatchNorm2d):
    """:class:`EMABatchNorm` over (N, C, H, W); also an ``nn.BatchNorm2d``.

    Example:
        >>> import torch
        >>> from bnstats import EMABatchNorm2d
        >>> EMABatchNorm2d(3)(torch.randn(8, 3, 5, 5)).shape
        torch.Size([8, 3, 5, 5])
    """

    _input_dims = (4,)


class EMABatchNorm3d(EMABatchNorm, nn.BatchNorm3d):
    """:class:`EMABatchNorm` over (N, C, D, H, W); also an ``nn.BatchNorm3d``.

    Example:
        >>> import torch
        >>> from bnstats import EMABatchNorm3d
        >>> EMABatchNorm3d(3)(torch.randn(2, 3, 4, 5, 5)).shape
        torch.Size([2, 3, 4, 5, 5])
    """

    _input_dims = (5,)
