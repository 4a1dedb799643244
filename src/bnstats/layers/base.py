"""What every layer of the family shares: checks, the training forward, the guarded update."""

from __future__ import annotations

import math
from abc import abstractmethod
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.layers import fast_moments, operators
from bnstats.moments import Number, Weights, fold, fold_
from bnstats.private import in_backward_pass
from bnstats.reduction import wide_dtype


class RunningStatsBatchNorm(_BatchNorm):
    """BatchNorm whose running statistics follow the core's recursion.

    A subclass says with :meth:`_weigh` how a batch is weighed. Evaluation normalizes by the
    running statistics and training by the batch's own, as ``nn.BatchNorm`` does: with torch's
    kernel, or where it pays by :mod:`bnstats.layers.fast_moments`.
    """

    _input_dims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        check_count(name, "num_features", num_features, 1)
        _check_eps(name, eps)
        _check_momentum(name, momentum)
        # torch.compile does not take numpy's numbers.
        eps, momentum = float(eps), None if momentum is None else float(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)

    @abstractmethod
    def _weigh(self, batch_values: int, counted: Tensor | int) -> Weights:
        """Count a batch of so many values, and return the weights that it has.

        ``counted`` is 1 where the host knows that the batch counts. Elsewhere it is a tensor,
        0 for one that does not; its weights are those that it would have.
        """

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

    def _check_input_dim(self, input: Tensor) -> None:
        expected = self._input_dims
        if input.dim() not in expected or input.shape[1] != self.num_features:
            dims = " or ".join(f"{n}d" for n in expected)
            raise InvalidValueError(
                f"{type(self).__name__}({self.num_features}): expected a {dims} input with "
                f"{self.num_features} channels in axis 1, got shape {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; in training also move the running statistics."""
        # A module finds its attributes slowly, and this is asked in every forward.
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or (self.training and not self.track_running_stats):
            return super().forward(input)
        self._check_input_dim(input)
        if self.training:
            return self._forward_training(input, mean)
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _forward_training(self, input: Tensor, running_mean: Tensor) -> Tensor:
        count = input.numel() // self.num_features
        if count == 1:
            raise InvalidValueError(
                f"{type(self).__name__}({self.num_features}): expected more than 1 value per "
                f"channel when training, got shape {tuple(input.shape)}: one has no variance; "
                "leave such a batch out, or use MovingAverageBatchNorm"
            )
        normalized: fast_moments.Normalized | None = None
        if not torch.compiler.is_compiling() and fast_moments.pays_for(input, running_mean):
            normalized = fast_moments.batch_norm(input, self.weight, self.bias, self.eps)
        output, mean, var = normalized or self._normalize(input, running_mean)
        # A batch of no values has no statistics; a recomputed one has been counted.
        if count > 0 and not in_backward_pass():
            self._track(mean, var, count)
        return output

    def _normalize(self, input: Tensor, running_mean: Tensor) -> fast_moments.Normalized:
        """Normalize by torch's kernel."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        like = running_mean
        if like.dtype in (torch.float16, torch.bfloat16):
            # The batch's statistics come out in the parameters' dtype; half is too coarse.
            like = like.float()
            weight = None if weight is None else weight.float()
            bias = None if bias is None else bias.float()
        # With momentum 1 the fused kernel leaves the batch's own statistics here: no second
        # pass over the input. Autograd keeps them, so they are not written to afterwards.
        mean, var = torch.zeros_like(like), torch.zeros_like(like)
        # What F.batch_norm calls after checks that are done: they cost a microsecond.
        use_cudnn = torch.backends.cudnn.enabled
        output = torch.batch_norm(input, weight, bias, mean, var, True, 1.0, self.eps, use_cudnn)
        return fast_moments.Normalized(output, mean, var)

    def _track(self, batch_mean: Tensor, batch_var: Tensor, batch_values: int) -> None:
        """Fold a batch's mean and unbiased variance in, unless they are not finite."""
        buffers = self._buffers
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
        if mean.dtype != batch_mean.dtype:  # half buffers: the step is taken wide
            mean, var = mean.to(batch_mean.dtype), var.to(batch_var.dtype)
        # Where the mean is not finite, neither is the variance about it.
        largest = batch_var.max()
        if on_host(batch_var):
            # Numbers are cheaper than small tensors.
            if not math.isfinite(largest):
                return
            fold_(mean, var, batch_mean, batch_var, self._weigh(batch_values, 1))
        else:
            # The host must not wait for the device: the choice is made there.
            counted = operators.counts(largest) if _in_compiled_code() else largest.isfinite()
            weights = self._weigh(batch_values, counted.long())
            new_mean, new_var = fold(mean, var, batch_mean, batch_var, weights)
            mean, var = torch.where(counted, new_mean, mean), torch.where(counted, new_var, var)
        if mean is not running_mean:
            running_mean.copy_(mean)
            running_var.copy_(var)


def _in_compiled_code() -> bool:
    """Whether this is traced to be run here: what is exported has torch's operators alone."""
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6
    return torch.compiler.is_compiling() and not exporting()


def on_host(tensor: Tensor) -> bool:
    """Whether the host knows a tensor's numbers without waiting: no device, no tracing."""
    return tensor.is_cpu and type(tensor) is Tensor and not torch.compiler.is_compiling()


def count_(counter: Tensor | None, by: int, counted: Tensor | int) -> Number:
    """Add to a counter what counts, and return what it is with this batch, as a wide number."""
    assert counter is not None
    if isinstance(counted, int):
        number = int(counter) + by
        counter.fill_(number)  # at half the cost of adding
        return number
    # Weights are computed from it without rounding to half or float.
    number_there = counter.to(wide_dtype(counter.device)) + by
    counter.add_(counted * by)
    return number_there


def check_count(name: str, argument: str, value: Any, least: int) -> None:
    """Refuse an argument that is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{name}: {argument}: expected an int, got {type(value).__name__}")
    if value < least:
        raise InvalidValueError(f"{name}: {argument}: expected {least} or more, got {value}")


def check_number(name: str, argument: str, value: Any) -> None:
    """Refuse an argument that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name}: {argument}: expected a number, got {type(value).__name__}")


def _check_eps(name: str, eps: float) -> None:
    check_number(name, "eps", eps)
    if not 0 < eps < math.inf:
        raise InvalidValueError(f"{name}: eps: expected a positive number, got {eps}")


def _check_momentum(name: str, momentum: float | None) -> None:
    if momentum is None:
        return
    check_number(name, "momentum", momentum)
    if not 0 <= momentum <= 1:
        raise InvalidValueError(
            f"{name}: momentum: expected a number in [0, 1], the weight of the new batch "
            f"(PyTorch's convention), got {momentum}"
        )
