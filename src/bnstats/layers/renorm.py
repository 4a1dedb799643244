"""BatchNorm that trains with what it evaluates with: Batch Renormalization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnstats.layers.arguments import check_integer, check_limit
from bnstats.layers.batch import Batch
from bnstats.layers.ema import EMABatchNorm
from bnstats.layers.recall import REMEMBERED, Recall
from bnstats.layers.tracking import HALF
from bnstats.moments import Number
from bnstats.private import in_backward_pass, on_host, unseen
from bnstats.reduction import mean_and_m2

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RenormBatchNorm(EMABatchNorm):
    r"""BatchNorm over (N, C, ...) of 2 to 5 dimensions, whose training follows its evaluation.

    Batch Renormalization: the batch's statistics normalize, as in ``nn.BatchNorm``, and a scale
    and a shift, through which no gradient goes, make the output that of the running statistics.
    With sd the square root of variance plus eps, of the batch and of the running statistics
    before it, and z the normalized value before weight and bias::

        r = clip(sd / running_sd, 1 / rmax, rmax)
        d = clip((mean - running_mean) / running_sd, -dmax, dmax)
        z = (x - mean) / sd * r + d

    In the first ``warmup`` forwards it is ``nn.BatchNorm``: rmax is 1, dmax 0; to the bit for small
    inputs, to float32 rounding for large ones and under a mask. In the ``ramp`` forwards after
    those they go to ``max_ratio`` and ``max_shift``, evenly. Where nothing is clipped the training
    output is the evaluation output, to rounding.

    It is for batches whose statistics are noisy or not those of the whole data, of some 4 to 16
    samples; for smaller ones see :class:`MovingAverageBatchNorm`. Running statistics are
    :class:`EMABatchNorm`'s, and so is the state dict: ``nn.BatchNorm``'s, both ways. Forwards are
    counted by ``num_batches_tracked``; a checkpoint's count goes on.

    Args:
        num_features: C, the number of channels.
        eps: added to the variances before the square roots.
        momentum: weight of the new batch in the limit, in [0, 1]; None weighs batch t by 1/t. 1
            keeps the latest batch alone. Above 0.5 a warning says what Keras and Flax call so.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics, and there is nothing to follow:
            it is ``nn.BatchNorm`` then.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with affine, learn a bias too.
        sync: whose values make up a batch in training: None for this process alone, True for
            all processes, or a process group. Without initialized processes there is only one.
        warmup: forwards as ``nn.BatchNorm``, at least 0.
        ramp: forwards in which the limits open, at least 0.
        max_ratio: the limit of r in the end, at least 1.
        max_shift: the limit of d in the end, at least 0.
        debias: take the initial state out of the averages, as in :class:`EMABatchNorm`.
        pooled: count the variance between batches, as there.

    Raises:
        InvalidValueError: num_features below 1, eps not positive, momentum outside [0, 1], a
            negative warmup or ramp, max_ratio below 1, max_shift below 0, an input or a mask of
            the wrong shape, or a training batch of one value per channel; in a backward, a
            forward to be run again that is more than 16 ago.
        InvalidTypeError: an argument that is not a number.
        PeerError: with ``sync``, a forward failed in another process.

    Note:
        Under activation checkpointing a forward that runs again gets the r and d of the first
        time, found among the last 16 forwards by its batch's mean.

    Example:
        >>> import torch
        >>> from bnstats import RenormBatchNorm1d
        >>> layer = RenormBatchNorm1d(1, warmup=0, ramp=0, momentum=0.5)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> [round(layer(x).max().item(), 3) for _ in range(2)]  # running_var was 1, then 2
        [3.0, 0.707]

    References:
        Ioffe (2017), "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models", NeurIPS, arXiv:1702.03275, Algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: ProcessGroup | bool | None = None,
        warmup: int = 1000,
        ramp: int = 4000,
        max_ratio: float = 3.0,
        max_shift: float = 5.0,
        debias: bool = True,
        pooled: bool = True,
    ) -> None:
        name = type(self).__name__
        check_integer(name, "warmup", warmup, 0)
        check_integer(name, "ramp", ramp, 0)
        check_limit(name, "max_ratio", max_ratio, 1)
        check_limit(name, "max_shift", max_shift, 0)
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            sync=sync,
            debias=debias,
            pooled=pooled,
        )
        self.warmup = int(warmup)
        self.ramp = int(ramp)
        self.max_ratio = float(max_ratio)
        self.max_shift = float(max_shift)
        self._corrections = Recall()

    def _forward_training(
        self, input: Tensor, running_mean: Tensor, batch: Batch | None = None
    ) -> Tensor:
        if batch is None and (self._count_values(input) == 0 or self._warms_up(input)):
            return super()._forward_training(input, running_mean)
        moves = self.momentum != 0 and not self._held
        return self._forward_batch(input, Batch() if batch is None else batch, tracks=moves)

    def _warms_up(self, input: Tensor) -> bool:
        """Whether this forward, or the one that it repeats, is one of nn.BatchNorm's."""
        counter = self._buffers["num_batches_tracked"]
        with unseen():
            if counter is None or not on_host(counter):
                return False
            num_batches, repeats = int(counter), in_backward_pass()
            if num_batches + REMEMBERED < self.warmup or repeats == (num_batches < self.warmup):
                return num_batches < self.warmup
            self._check_dtype(input)
            mean = mean_and_m2(input.detach())[0]
            mean = mean.to(torch.float32 if input.dtype in HALF else input.dtype)
            if repeats:
                return self._corrections.repeats_plain(mean)
            # The last ones may run again when the warm-up is over.
            identity = torch.stack((torch.ones_like(mean), torch.zeros_like(mean)))
            self._corrections.remember(mean, identity, plain=True)
            return True

    def _weights_of(self, mean: Tensor, var: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias for ``r z + d`` in place of z."""
        weight, bias = self._wide_parameters()
        if self._buffers["running_mean"] is None or not self.track_running_stats:
            return weight, bias  # nothing to follow
        with unseen():
            r, d = self._corrections.same(mean, self._correction(mean, var)).unbind()
        if weight is None:
            return r, d
        return weight * r, weight * d if bias is None else torch.addcmul(bias, weight, d)

    def _correction(self, mean: Tensor, var: Tensor) -> Tensor:
        """Return r and d, of shape (2, C), of a batch with these moments."""
        running_mean, running_var = (x.to(mean.dtype) for x in self._running_stats())
        counter = self._buffers["num_batches_tracked"]
        num_batches: Number = math.inf
        if counter is not None:
            num_batches = int(counter) if on_host(counter) else counter
        max_ratio, max_shift = self._limits(num_batches)
        inverse = (running_var + self.eps).rsqrt()
        r = ((var + self.eps).sqrt() * inverse).clamp(1 / max_ratio, max_ratio)
        d = ((mean - running_mean) * inverse).clamp(-max_shift, max_shift)
        return torch.stack((r, d))

    def last_normalization(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and ratio by which the latest training forward normalized.

        The ratio is r, and the mean ``mean - d sd / r``.

        Args:
            mean: of that forward's batch, of shape (C,), like all that is returned.
            var: of that batch, biased.
        """
        counter, last = self._buffers["num_batches_tracked"], self._corrections.last
        moved = self.momentum != 0 and not self._held
        warm = counter is None or not on_host(counter) or int(counter) >= self.warmup + moved
        if last is None or not warm:
            return mean, var, torch.ones_like(mean)
        r, d = last.unbind()
        return mean - d * (var + self.eps).sqrt() / r, var, r

    def _limits(self, num_batches: Number) -> tuple[Any, Any]:
        """Return rmax and dmax of the forward after this many batches."""
        part = (num_batches + 1 - self.warmup) / max(self.ramp, 1e-30)
        part = part.clamp(0, 1) if isinstance(part, Tensor) else min(max(part, 0), 1)
        return 1 + part * (self.max_ratio - 1), part * self.max_shift

    def extra_repr(self) -> str:
        """Return the options, those that ``nn.BatchNorm`` lacks last."""
        return (
            f"{super().extra_repr()}, warmup={self.warmup}, ramp={self.ramp}, "
            f"max_ratio={self.max_ratio}, max_shift={self.max_shift}"
        )


class RenormBatchNorm1d(RenormBatchNorm, nn.BatchNorm1d):
    """:class:`RenormBatchNorm` over (N, C) or (N, C, L); also an ``nn.BatchNorm1d``."""

    _input_dims = (2, 3)


class RenormBatchNorm2d(RenormBatchNorm, nn.BatchNorm2d):
    """:class:`RenormBatchNorm` over (N, C, H, W); also an ``nn.BatchNorm2d``."""

    _input_dims = (4,)


class RenormBatchNorm3d(RenormBatchNorm, nn.BatchNorm3d):
    """:class:`RenormBatchNorm` over (N, C, D, H, W); also an ``nn.BatchNorm3d``."""

    _input_dims = (5,)
