"""Running statistics: how a batch moves them, on the host and on a device."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from bnstats.layers import operators
from bnstats.layers.wide_buffers import WideBuffersBatchNorm
from bnstats.moments import Number, Weights, fold, fold_
from bnstats.private import intercepted

Count: TypeAlias = int | Tensor
"""A number of values, which the host may not know."""

HALF = (torch.float16, torch.bfloat16)


class TrackingBatchNorm(WideBuffersBatchNorm):
    """BatchNorm whose running statistics follow the core's recursion.

    A subclass defines by :meth:`_weigh` how a batch is weighed.
    """

    _counters: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)
    """Buffers that count training forwards, or values; :meth:`_weigh` gets what they hold."""

    num_batches_tracked: Tensor | None

    @abstractmethod
    def _weigh(self, counts: Sequence[Number], batch_values: Number) -> Weights:
        """Return the weights of a batch of this many values, for these counts before it."""

    def _increments(self, batch_values: Count) -> tuple[Count, ...]:  # noqa: ARG002
        """Return by how much a batch moves each of the counters."""
        return (1,)

    def _forgets(self) -> bool:
        """Whether a batch replaces all before it, so that counters of values start anew."""
        return False

    def _running_stats(self) -> tuple[Tensor, Tensor]:
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        assert mean is not None and var is not None  # else forward does not come here
        return mean, var

    def _state(self) -> tuple[Tensor, Tensor]:
        """Return the buffers of the recursion, mean and variance."""
        return self._running_stats()

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

    def _track_on_device(self, batch_mean: Tensor, batch_var: Tensor, batch_values: Count) -> None:
        """Do it by tensors alone: the host must not wait for the device."""
        state = self._state()  # first: it may find that others reset the counters
        counters = [self._buffers[name] for name in self._counters]
        wide = state[0].dtype == torch.float64  # weights are computed in the state's precision
        counts: list[Number] = [
            math.inf if x is None else x.double() if wide else x for x in counters
        ]
        n: Number = batch_values
        if isinstance(batch_values, Tensor):
            n = batch_values.to(torch.float64 if wide else torch.float32)
        rounds = self._half_dtype()
        mean, var = (x.float() if x.dtype in HALF else x for x in state)
        new = fold(mean, var, batch_mean, batch_var, self._weigh(counts, n))
        largest = new[1].max() if rounds is None else _largest_rounded(*new, rounds)
        compiled = torch.compiler.is_compiling() and not operators.is_exporting()
        counted = operators.counts(largest) if compiled else largest < torch.inf
        for buffer, value in zip(state, new, strict=True):
            replace_where(buffer, counted, value)
        for index, by in enumerate(self._increments(batch_values)):
            if (counter := counters[index]) is None:
                continue
            if index and self._forgets():
                value = by if isinstance(by, Tensor) else torch.full_like(counter, by)
                replace_where(counter, counted, value)
            elif isinstance(by, Tensor):
                counter.add_(counted * by)
            else:
                counter.add_(counted, alpha=by)
        self._publish()

    def _half_dtype(self) -> torch.dtype | None:
        """Return the dtype of the running statistics if it is a half one."""
        mean = self._buffers["running_mean"]
        return mean.dtype if mean is not None and mean.dtype in HALF else None


def _widened(x: Tensor) -> Tensor:
    """Return a copy in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _largest_rounded(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest of what is to be written, as it is in the dtype of the buffers."""
    return torch.maximum(mean.to(dtype).abs().max(), var.to(dtype).max())


def replace_where(buffer: Tensor, counted: Tensor, value: Tensor) -> None:
    """Write a value where a batch counted, in one operation where ``out=`` is taken."""
    if value.dtype == buffer.dtype and not is_traced():
        torch.where(counted, value, buffer, out=buffer)
    else:
        buffer.copy_(torch.where(counted, value, buffer))


def is_traced() -> bool:
    """Whether operators are recorded or transformed, which Python's decisions are not."""
    return torch.compiler.is_compiling() or intercepted()
