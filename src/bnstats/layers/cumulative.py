"""BatchNorm with the exact mean and variance of all values since the last reset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnstats.accumulators import cumulative, separate
from bnstats.layers.base import RunningStatsBatchNorm
from bnstats.layers.tracking import HALF, Count, is_traced
from bnstats.layers.versions import Versions
from bnstats.moments import Number, Weights
from bnstats.reduction import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done to a tensor becomes part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class CumulativeBatchNorm(RunningStatsBatchNorm):
    r"""BatchNorm over (N, C, ...) of 2 to 5 dimensions, with cumulative statistics.

    Output and gradients in training are ``nn.BatchNorm``'s. ``running_mean`` and
    ``running_var`` are the mean and the unbiased variance of every value seen since the last
    ``reset_running_stats()``, for batches of any sizes: for a batch of n values with
    mean m and unbiased variance s, after N values, ``d = m - running_mean`` and ``T = N + n``::

        running_mean <- running_mean + (n / T) d
        running_var  <- ((N - 1) running_var + (n - 1) s + (N n / T) d^2) / (T - 1)

    It is the layer for a pass over data with the weights fixed (reset, then forward in
    training mode); in training the weights move, and old values never leave the statistics.
    For a trained model :func:`bnstats.recompute_population_stats` does the whole job.

    The recursion runs in ``exact_mean`` and ``exact_var``, in float64: a float32 average of
    many batches stops following them. The running statistics are rounded from there after each
    batch. What others write to them counts: the recursion goes on from it (not from what comes by
    ``.data`` or a numpy view, which torch does not count as a write). A ``num_batches_tracked``
    that others set to 0 starts it anew.

    An empty batch, a batch whose statistics are not finite, and any batch with momentum 0 change
    nothing. Running statistics move once per training forward, also under activation
    checkpointing.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance before the square root.
        momentum: kept for the way back to ``nn.BatchNorm``, and of no effect but for 1.0, with
            which the statistics are those of the latest batch alone (fvcore's
            ``update_bn_stats`` sets the attribute so), and 0.0, with which nothing moves. Above
            0.5 a warning says what Keras and Flax call so.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics; evaluation then uses the
            batch's, as in ``nn.BatchNorm``.
        device: of parameters and buffers.
        dtype: of parameters and running statistics.
        bias: with affine, learn a bias too.
        sync: whose values make up a batch in training: None for this process alone, True for
            all processes, or a process group. Without initialized processes there is only one.

    Attributes:
        num_values_tracked: the N above, int64.
        exact_mean: running_mean before rounding, float64 where the device has it.
        exact_var: running_var before rounding, of the same dtype.

    Note:
        A plain checkpoint loads with ``strict=True`` and N = 0: the statistics loaded serve
        evaluation until the first training batch replaces them. This layer's own checkpoint has
        three keys more than a plain one; ``revert_batchnorm`` takes them away.

    Raises:
        InvalidValueError: num_features below 1, eps not positive, momentum outside [0, 1], an
            input or a mask of the wrong shape, or a training batch of one value per channel.
        InvalidTypeError: an argument that is not a number.
        PeerError: with ``sync``, a forward failed in another process.

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

    _counters = ("num_batches_tracked", "num_values_tracked")
    _wide_buffers = ("exact_mean", "exact_var")

    num_values_tracked: Tensor | None
    exact_mean: Tensor | None
    exact_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = None,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            sync=sync,
        )
        for name in ("num_values_tracked", *self._wide_buffers):
            self.register_buffer(name, None)
        for name, value in self._start(self.running_mean, self.running_var).items():
            self._buffers[name] = value
        self._versions = Versions()

    def _start(self, mean: Tensor | None, var: Tensor | None) -> dict[str, Tensor]:
        """Return this layer's own buffers beside running statistics of no known values."""
        if mean is None or var is None:
            return {}
        wide, counter = self._wide_dtype(mean), torch.tensor(0, device=mean.device)
        exact = (x.to(wide, copy=True) for x in (mean, var))
        return {"num_values_tracked": counter, **dict(zip(self._wide_buffers, exact, strict=True))}

    def _weigh(self, counts: Sequence[Number], batch_values: Number) -> Weights:
        if self._forgets():
            return separate(1)
        _, num_values = counts
        return cumulative(num_values, batch_values)

    def _increments(self, batch_values: Count) -> tuple[Count, ...]:
        return 1, batch_values

    def _forgets(self) -> bool:
        return self.momentum == 1

    def _state(self) -> tuple[Tensor, Tensor]:
        exact_mean, exact_var = self._buffers["exact_mean"], self._buffers["exact_var"]
        assert exact_mean is not None and exact_var is not None
        if exact_mean.dtype in HALF:
            self._widen()
            return self._state()
        again = is_traced() or is_captured(exact_mean)  # what is decided here is replayed
        if again or not self._versions.know(self._shown()):
            self._reconcile()
        return exact_mean, exact_var

    def _shown(self) -> list[Tensor]:
        """Return the buffers of torch's layer, which others may write to."""
        num_batches = self._buffers["num_batches_tracked"]
        return [*self._running_stats(), *([] if num_batches is None else [num_batches])]

    def _publish(self) -> None:
        mean, var, *_ = shown = self._shown()
        traced = is_traced()
        for running, name in ((mean, "exact_mean"), (var, "exact_var")):
            exact = self._buffers[name]
            assert exact is not None
            # An exported program does not decompose where two buffers get one value.
            running.copy_(exact.to(running.dtype, copy=True) if traced else exact)
        if not traced:
            self._versions.remember(shown)

    def _reconcile(self) -> None:
        """Go on from what others have written to the running statistics and the counter."""
        mean, var, *num_batches = self._shown()
        for name, shown in (("exact_mean", mean), ("exact_var", var)):
            exact = self._buffers[name]
            assert exact is not None
            # Where both agree, the exact one has more digits of the same number.
            exact.copy_(torch.where(exact.to(shown.dtype) == shown, exact, shown.to(exact.dtype)))
        if num_batches and self.num_values_tracked is not None:
            # Lightning's weight averaging resets torch's counter, and knows of no other.
            self.num_values_tracked.mul_(num_batches[0] != 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Others may have taken the running statistics away (torch.func's patch of batch norm).
        running = (self.exact_mean, self.running_mean, self.running_var)
        tracks = all(buffer is not None for buffer in running)
        if tracks and not self._versions.know(self._shown()):
            self._reconcile()
        module = super()._apply(fn, recurse)
        if tracks:  # a layer that was half shows every digit again
            self._publish()
        return module

    def _wide_dtype(self, running: Tensor) -> torch.dtype:
        return wide_dtype(running.device)

    def adopt_statistics(self) -> None:
        """Go on from them; where no values were counted, the first batch replaces them."""
        if self.exact_mean is not None:
            self._reconcile()

    def reset_running_stats(self) -> None:
        """Forget all values: mean 0, variance 1, counters 0."""
        super().reset_running_stats()
        # nn.BatchNorm resets in its constructor, before these buffers are there.
        counter = getattr(self, "num_values_tracked", None)
        if counter is not None and self.exact_mean is not None and self.exact_var is not None:
            counter.zero_()
            self.exact_mean.zero_()
            self.exact_var.fill_(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch passes a copy of the caller's mapping, and completes it in the same way.
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if isinstance(mean, Tensor) and isinstance(var, Tensor) and self.exact_mean is not None:
            waits = self.running_mean is not None and self.running_mean.is_meta
            for name, value in self._start(mean, var).items():
                own = self._buffers[name]
                # An earlier part of the checkpoint was assigned, on meta, before the rest.
                assigned = waits and own is not None and not own.is_meta
                state_dict.setdefault(prefix + name, own if assigned else value)
        super()._load_from_state_dict(state_dict, prefix, *args)
        mean, var = self.running_mean, self.running_var
        if mean is not None and var is not None and not (mean.is_meta or var.is_meta):
            for name, value in self._start(mean, var).items():  # they came one by one
                own = self._buffers[name]
                if own is not None and own.is_meta:
                    self._buffers[name] = value


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
