"""What every layer of the family shares: checks, the training forward, the guarded update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnstats.arguments import describe_channels_last, warn_of_momentum
from bnstats.errors import InvalidValueError
from bnstats.layers import batch_norm_cpu, operators
from bnstats.layers.arguments import check_dtype, check_eps, check_integer, check_momentum
from bnstats.layers.batch import Batch, batch_variance
from bnstats.layers.functionalized import forward_below
from bnstats.layers.given_moments import by_definition, normalize, scale_and_shift
from bnstats.layers.mask_recall import MaskRecall, mask_of_forward
from bnstats.layers.replicas import Replicas, check_reverse_mode, check_tensor
from bnstats.layers.symbolic import Unscriptable, call_in_graph
from bnstats.layers.sync_converter import Unset
from bnstats.layers.tracking import HALF, TrackingBatchNorm, is_traced
from bnstats.masks import Mask
from bnstats.private import (
    functionalized_around,
    in_backward_pass,
    intercepted,
    on_host,
    only_reverse_mode,
    unseen,
)
from bnstats.reduction import Expected

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RunningStatsBatchNorm(Unscriptable, TrackingBatchNorm):
    """BatchNorm with running statistics of its own; everything else is torch's.

    Evaluation normalizes by the running statistics and training by the batch's own: with torch's
    kernel, or where it is faster by :mod:`bnstats.layers.batch_norm_cpu`. A batch of some
    positions, or of several processes, is normalized by :mod:`bnstats.layers.given_moments`.
    """

    _input_dims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    _mask: Mask | None = None
    """What :func:`bnstats.masked` has given the layer."""

    _mask_recall: MaskRecall | None = None
    """What it gave the last forwards, once one was checkpointed."""

    _replicas: Replicas | None = None

    _transient: ClassVar[tuple[str, ...]] = ("_held", "_mask", "_mask_recall")
    """Attributes that a copy of the layer does not get."""

    _held = False
    """Whether training forwards move nothing; set by :func:`bnstats.hold_statistics`."""

    qconfig = Unset()

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
    ) -> None:
        name = type(self).__name__
        check_integer(name, "num_features", num_features, 1)
        check_eps(name, eps)
        check_momentum(name, momentum)
        warn_of_momentum(name, momentum)
        # torch.compile does not take numpy's numbers.
        eps, momentum = float(eps), None if momentum is None else float(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self.sync = sync

    @property
    def sync(self) -> ProcessGroup | bool | None:
        """The processes whose batches count as one: a group, True for all, None for its own."""
        return None if self._replicas is None else self._replicas.sync

    @sync.setter
    def sync(self, sync: ProcessGroup | bool | None) -> None:
        where = f"{type(self).__name__}: sync"
        self._replicas = None if sync in (None, False) else Replicas(sync, where)

    def statistics_about_zero(self) -> bool:
        """Whether running_mean is always 0, and running_var about zero."""
        return False

    def adopt_statistics(self) -> None:
        """Go on from running statistics that came without a history of this layer's.

        Conversion asks for it when they have become this layer's.
        """
        mean, var = self.running_mean, self.running_var
        if self.statistics_about_zero() and mean is not None and var is not None:
            var.addcmul_(mean, mean)
            mean.zero_()

    def hold_running_stats(self, held: bool) -> None:
        """Let training forwards move no buffer, or let them again.

        :func:`bnstats.hold_statistics` asks for it; several of its contexts count there.
        """
        vars(self).pop("_held", None)
        if held:
            self._held = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave out that the layer is held: a copy is not."""
        return {key: value for key, value in vars(self).items() if key not in self._transient}

    def reset_parameters(self) -> None:
        """Reset the running statistics; weight 1, bias 0."""
        self.reset_running_stats()
        # torch before 2.13 expects a bias wherever there is a weight.
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def _check_input_dim(self, input: Tensor) -> None:
        expected = self._input_dims
        if input.dim() not in expected or input.shape[1] != self.num_features:
            dims = " or ".join(f"{n}d" for n in expected)
            raise InvalidValueError(
                f"{type(self).__name__}({self.num_features}): expected a {dims} input with "
                f"{self.num_features} channels in axis 1, got shape {tuple(input.shape)}"
                + describe_channels_last(tuple(input.shape), self.num_features)
            )

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normalized input; in training also move the running statistics.

        Args:
            input: of shape (N, C, ...).
            mask: boolean, of the input's shape without its channel axis, or broadcastable to
                it; True for the positions whose values count. Every position is normalized.
        """
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            given = (input,) if mask is None else (input, mask)
            if (output := call_in_graph(self, *given)) is not None:
                return output
        # Attribute access on a module is slow, and every forward comes through here.
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if not self.training and mean is not None:
            self._check_input_dim(input)
            return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if mean is not None and (functionalize := functionalized_around(mean)) is not None:
            return forward_below(functionalize, self, input, mask)
        masked = mask is not None or self._mask is not None or self._mask_recall is not None
        batch = self._batch(input, mask) if masked or self._replicas is not None else None
        if mean is not None and self.track_running_stats:
            self._check_input_dim(input)
            return self._forward_training(input, mean, batch)
        return super().forward(input) if batch is None else self._forward_batch(input, batch)

    def _batch(self, input: Tensor, mask: Tensor | None) -> Batch | None:
        """Return the positions and processes of a batch, or None for all of its own."""
        replicas = self._replicas if self.training else None
        if replicas is not None and replicas.alone:
            replicas = None
        where = f"{type(self).__name__}({self.num_features})"
        given = mask_of_forward(self, input) if mask is None else Mask(mask, where=where)
        if replicas is None:
            self._check_input_dim(input)
            return None if given is None else Batch(given.fit(input), where=given.where)
        # The others send from the layer's device; this input may be on another.
        device = getattr(self.running_mean if self.weight is None else self.weight, "device", None)
        try:
            check_tensor(where, input, device)
            self._check_input_dim(input)
            self._check_dtype(input)
            valid = None if given is None else given.fit(input)
        except Exception:
            replicas.tell_of_failure(self.num_features, device)
            raise
        return Batch(valid, replicas, where if given is None else given.where)

    def _check_dtype(self, input: Tensor) -> None:
        """Refuse what torch's kernel would not take once the moments are there."""
        wide = input.dtype if self.weight is None else self.weight.dtype
        check_dtype(self, input, torch.float32 if wide in HALF else wide)

    def _forward_training(
        self, input: Tensor, running_mean: Tensor, batch: Batch | None = None
    ) -> Tensor:
        if batch is not None:
            return self._forward_batch(input, batch, tracks=self.momentum != 0 and not self._held)
        count = self._count_values(input)
        like = running_mean
        if like.dtype in HALF:
            like = like.float()
        weight, bias = self._wide_parameters()
        # A batch of no values has no statistics.
        moves = count > 0 and self.momentum != 0 and not self._held
        if count > 0 and on_host(input):
            expected: Expected = like, self._buffers["running_var"]  # type: ignore[assignment]
            output, mean, var = batch_norm_cpu.batch_norm(input, weight, bias, self.eps, expected)
            # In a backward pass activation checkpointing runs a forward again.
            if moves and not in_backward_pass():
                self._track_on_host(mean, var, count)
            return output
        # As on the host: with momentum 1 the kernel leaves the batch's own statistics here.
        with unseen():
            # (Not as two rows of one tensor: torch.vmap's rule writes to a copy of a row.)
            mean, var = torch.zeros_like(like), torch.zeros_like(like)
        x, use_cudnn = input, torch.backends.cudnn.enabled
        if x.dtype in HALF and intercepted():  # torch.vmap's rule takes no wider statistics
            x = x.to(like.dtype)
        output = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, self.eps, use_cudnn)
        if moves and not in_backward_pass():
            with unseen():
                track = self._track_on_host if on_host(mean) else self._track_on_device
                track(mean, var, count)
        return output.to(input.dtype)

    def _wide_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias, half ones in float32.

        The batch's statistics come out in the parameters' dtype; half is too coarse.
        """
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if weight is not None and weight.dtype in HALF:
            weight = weight.float()
        if bias is not None and bias.dtype in HALF:
            bias = bias.float()
        return weight, bias

    def _count_values(self, input: Tensor) -> int:
        """Return the number of values per channel; one has no variance."""
        count = input.numel() // self.num_features
        if count == 1:
            raise InvalidValueError(
                f"{type(self).__name__}({self.num_features}): expected more than 1 value per "
                f"channel when training, got shape {tuple(input.shape)}: one has no variance; "
                "leave such a batch out, or use MovingAverageBatchNorm"
            )
        return count

    def _forward_batch(self, input: Tensor, batch: Batch, *, tracks: bool = False) -> Tensor:
        """Normalize by the values that a mask leaves, and by those of other processes."""
        if batch.replicas is None:  # else it was checked before the exchange
            self._check_dtype(input)
        elif not torch.compiler.is_compiling():
            check_reverse_mode(type(self).__name__)
        dtype = torch.float32 if input.dtype in HALF else input.dtype
        count: int | Tensor
        plain = type(input) is Tensor and not is_traced() and only_reverse_mode()
        if batch.replicas is None and not plain:
            centered, inverse, count, mean, var = by_definition(input, self.eps, batch.mask)
            mean, var = operators.detached(mean), operators.detached(var)
            weight, bias = self._weights_of(mean, var)
            output = scale_and_shift(centered, inverse, weight, bias).to(input.dtype)
        elif batch.is_whole():
            count = input.numel() // self.num_features
            mean, var = batch_norm_cpu.moments(input.detach(), dtype, self._running_stats())
            weight, bias = self._weights_of(mean, var)
            output = batch_norm_cpu.normalize_whole(input, weight, bias, mean, var, self.eps)
        else:
            count, mean, m2 = batch.moments(input)
            if on_host(count):
                batch.check_count(input, int(count), 2)
            mean, var = mean.to(dtype), batch_variance(m2, count).to(dtype)
            weight, bias = self._weights_of(mean, var)
            output = normalize(input, weight, bias, mean, var, self.eps, batch, count)
        if tracks and not in_backward_pass():
            with unseen():
                self._track(mean, var, count)
        return output

    def _track(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """Move the running statistics by a batch's mean and biased variance."""
        if not isinstance(count, Tensor):
            track = self._track_on_host if on_host(mean) else self._track_on_device
            track(mean, var * (count / max(count - 1, 1)), count)
            return
        unbiased = torch.where(count > 1, var * count / (count - 1), torch.nan)
        if not on_host(count):
            self._track_on_device(mean, unbiased, count)
        elif count > 0:
            self._track_on_host(mean, unbiased, int(count))

    def _weights_of(self, mean: Tensor, var: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ARG002
        """Return weight and bias for a batch with this mean and biased variance."""
        return self._wide_parameters()
