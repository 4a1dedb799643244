"""What every layer of the family shares: checks, the training forward, the guarded update."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidValueError
from bnstats.layers import batch_norm_cpu, operators
from bnstats.layers.arguments import check_eps, check_integer, check_momentum
from bnstats.moments import Number, Weights, fold, fold_
from bnstats.private import in_backward_pass, intercepted, on_host, unseen

HALF = (torch.float16, torch.bfloat16)


class RunningStatsBatchNorm(_BatchNorm):
    """BatchNorm whose running statistics follow the core's recursion.

    A subclass says with :meth:`_weigh` how a batch is weighed. Evaluation normalizes by the
    running statistics and training by the batch's own, as ``nn.BatchNorm`` does: with torch's
    kernel, or where it is faster by :mod:`bnstats.layers.batch_norm_cpu`.
    """

    _input_dims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    _counters: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)
    """Buffers that count training forwards, or values; :meth:`_weigh` gets what they hold."""

    _wide_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that keep their precision when the layer becomes half."""

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
        *,
        bias: bool = True,
    ) -> None:
        name = type(self).__name__
        check_integer(name, "num_features", num_features, 1)
        check_eps(name, eps)
        check_momentum(name, momentum)
        # torch.compile does not take numpy's numbers.
        eps, momentum = float(eps), None if momentum is None else float(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)

    @abstractmethod
    def _weigh(self, counts: Sequence[Number], batch_values: int) -> Weights:
        """Return the weights of a batch of so many values, for these counts before it."""

    def _increments(self, batch_values: int) -> tuple[int, ...]:  # noqa: ARG002
        """Return by how much a batch moves each of the counters."""
        return (1,)

    def _forgets(self) -> bool:
        """Whether a batch replaces all before it, so that counters of values start anew."""
        return False

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
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        like = running_mean
        if like.dtype in HALF:
            # The batch's statistics come out in the parameters' dtype; half is too coarse.
            like = like.float()
            weight = None if weight is None else weight.float()
            bias = None if bias is None else bias.float()
        # A batch of no values has no statistics.
        moves = count > 0 and self.momentum != 0
        if count > 0 and on_host(input):
            output, mean, var = batch_norm_cpu.batch_norm(input, weight, bias, self.eps, like)
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

    def _state(self) -> tuple[Tensor, Tensor]:
        """Return the buffers of the recursion, mean and variance."""
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        assert mean is not None and var is not None  # else forward does not come here
        return mean, var

    def _publish(self) -> None:
        """Write the running statistics where the recursion has buffers of its own."""

    def _track_on_host(self, batch_mean: Tensor, batch_var: Tensor, batch_values: int) -> None:
        """Fold a batch's mean and unbiased variance in, unless what comes of it is not finite."""
        mean, var = state = self._state()  # first: it may find that others reset the counters
        counters = [self._buffers[name] for name in self._counters]
        counts = [math.inf if counter is None else int(counter) for counter in counters]
        rounds = self._half_dtype()
        if rounds is not None:  # half is too coarse for a step: it is taken on a copy
            mean, var = _widened(mean), _widened(var)
        if not fold_(mean, var, batch_mean, batch_var, self._weigh(counts, batch_values)):
            return
        if rounds is not None:
            if not math.isfinite(_largest_rounded(mean, var, rounds)):
                return
            for buffer, value in zip(state, (mean, var), strict=True):
                buffer.copy_(value)
        for index, by in enumerate(self._increments(batch_values)):
            counter, count = counters[index], counts[index]
            if counter is not None:
                # At half the cost of adding.
                counter.fill_(by if index and self._forgets() else count + by)
        self._publish()

    def _track_on_device(self, batch_mean: Tensor, batch_var: Tensor, batch_values: int) -> None:
        """Do it by tensors alone: the host must not wait for the device."""
        counters = [self._buffers[name] for name in self._counters]
        counts = [math.inf if counter is None else counter for counter in counters]
        state = self._state()
        rounds = self._half_dtype()
        mean, var = (x.float() if x.dtype in HALF else x for x in state)
        new = fold(mean, var, batch_mean, batch_var, self._weigh(counts, batch_values))
        largest = new[1].max() if rounds is None else _largest_rounded(*new, rounds)
        compiled = torch.compiler.is_compiling() and not operators.is_exporting()
        counted = operators.counts(largest) if compiled else largest < torch.inf
        for buffer, value in zip(state, new, strict=True):
            _replace(buffer, counted, value)
        for index, by in enumerate(self._increments(batch_values)):
            if (counter := counters[index]) is None:
                continue
            if index and self._forgets():
                _replace(counter, counted, torch.full_like(counter, by))
            else:
                counter.add_(counted, alpha=by)
        self._publish()

    def _half_dtype(self) -> torch.dtype | None:
        """Return the dtype of the running statistics if it is a half one."""
        mean = self._buffers["running_mean"]
        return mean.dtype if mean is not None and mean.dtype in HALF else None

    def _wide_dtype(self, running: Tensor) -> torch.dtype:
        """Return the dtype of the wide buffers beside these running statistics."""
        return torch.promote_types(running.dtype, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        order = list(self._buffers)
        wide = {name: self._buffers.pop(name) for name in self._wide_buffers}
        module: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        running = self._buffers["running_mean"]
        for name, buffer in wide.items():
            if buffer is not None and running is not None:
                # Before and after fn: a device may not have this dtype, half has too few digits.
                source = buffer.to(self._wide_dtype(running))
                buffer = fn(source)
                if buffer.dtype != source.dtype:
                    lost = source.is_meta and not buffer.is_meta
                    buffer = (buffer if lost else source).to(buffer.device, source.dtype)
            self._buffers[name] = buffer
        for name in order:
            self._buffers[name] = self._buffers.pop(name)
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        for name in self._wide_buffers:  # assigned as the checkpoint has them
            buffer, running = self._buffers[name], self._buffers["running_mean"]
            if buffer is not None and running is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(self._wide_dtype(running))


def _widened(x: Tensor) -> Tensor:
    """Return a copy in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _largest_rounded(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest of what is to be written, as it is in the dtype of the buffers."""
    return torch.maximum(mean.to(dtype).abs().max(), var.to(dtype).max())


def _replace(buffer: Tensor, counted: Tensor, value: Tensor) -> None:
    """Write a value where a batch counted, in one operation where ``out=`` is taken."""
    if value.dtype == buffer.dtype and not is_traced():
        torch.where(counted, value, buffer, out=buffer)
    else:
        buffer.copy_(torch.where(counted, value, buffer))


def is_traced() -> bool:
    """Whether operators are recorded or transformed, which Python's decisions are not."""
    return torch.compiler.is_compiling() or intercepted()
