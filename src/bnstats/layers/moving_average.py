"""BatchNorm for small batches: moving averages of forward and backward statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnstats.errors import InvalidValueError
from bnstats.layers.arguments import check_dtype, check_integer, check_limit
from bnstats.layers.batch import Batch
from bnstats.layers.moving_average_gradient import normalize_about_zero
from bnstats.layers.moving_average_state import MovingAverageState
from bnstats.layers.moving_average_step import Options, advance, take_step
from bnstats.layers.tracking import HALF
from bnstats.private import has_tangent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MovingAverageBatchNorm(MovingAverageState):
    r"""BatchNorm over (N, C, ...) of 2 to 5 dimensions, for batches of few values.

    Four statistics of a batch take part in batch normalization: mean and variance in the
    forward, two averages of the gradient in the backward. In a batch of two they are noise.
    This layer (MABN) does without the means, and replaces the other two by moving averages.
    The layers before it should be centered (:class:`CenteredConv2d`, :class:`CenteredLinear`),
    which does the means' work. Per channel, in training forward t = 1, 2, ..., with m = window::

        chi_t = mean(x^2)                                      into slot t mod m of a window
        var   = mean of the window if t > m and t >= warmup, else chi_t
        r     = sqrt((var + eps) / (running_var + eps)), within [1 / max_ratio, max_ratio],
                if t > max(renorm_warmup, warmup), else 1
        z     = x / sqrt(var + eps);  output = weight r z + bias
        running_var <- (1 - momentum) running_var + momentum var

    and in its backward, with g = weight r grad::

        psi_t  = mean(g z)                                     into slot t mod m of another
        Psi    = mean of that window under the same condition, else psi_t
        grad_x = (g - z Psi) / sqrt(var + eps)

    ``running_mean`` stays 0 and ``running_var`` is about zero: E[x^2]. This gradient is, on
    purpose, not the derivative of the output: the averages over the window stand for those
    over a large batch. In evaluation it is ``nn.BatchNorm``; one value per channel will do.

    How to choose, counting in training forwards, of which gradient accumulation makes several
    in an optimizer's step:

    - ``window``: window times batch is the batch that the statistics are worth; 32 samples are
      a good start. More gives little, and lags while the weights still move fast.
    - ``warmup``: until then the layer is a batch norm over few values. Long enough for the
      window to fill, short against the training: a quarter of it costs accuracy.
    - ``renorm_warmup``: from then on the output follows evaluation's, slowly. Give running_var
      time to settle, many times ``1 / momentum`` forwards: the defaults are 1000 and 50.
    - ``momentum``: evaluation averages over ``1 / momentum`` forwards; small batches need many.

    Where batch norm has many values (batches of 16 and more, many positions in an image) this
    layer has no advantage. Measurements are in ``benchmarks/results/cpu/small_batch.md``.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance before the square root.
        momentum: weight of the new value in running_var, in [0, 1]; None averages all of them;
            with 0 nothing moves, windows and counters included. Above 0.5 a warning says what
            Keras and Flax call so.
        affine: learn a weight and a bias per channel.
        track_running_stats: True; the windows cannot do without.
        device: of parameters and buffers.
        dtype: of parameters and running statistics; windows are float32 or wider.
        bias: with affine, learn a bias too.
        sync: whose values make up a batch in training: None for this process alone, True for
            all processes, or a process group. Without initialized processes there is only one.
        window: m, the number of forwards that are averaged over, at least 1.
        warmup: the first forward that may use the window, at least 0; those before it, and the
            first m in any case, are normalized by the batch's own statistics.
        renorm_warmup: forwards before the running variance takes part, at least 0.
        max_ratio: the limit of r, at least 1.

    Attributes:
        window_mean_squares: chi of the last m forwards, of shape (m, C).
        window_gradients: psi of the last m forwards, of shape (m, C).
        window_gradient_steps: the t that each slot of ``window_gradients`` belongs to, (m,).
        num_steps_tracked: t, since the windows were empty; int64.
        window_scales: var and r of the last m forwards, of shape (m, 2, C), for activation
            checkpointing; no part of the state dict.

    Raises:
        InvalidValueError: num_features or window below 1, eps not positive, momentum outside
            [0, 1], a negative warmup, max_ratio below 1, track_running_stats=False, an input
            or a mask of the wrong shape, forward-mode differentiation of a training forward;
            in a backward, ``create_graph=True``, or a forward to be run again that is more than
            m forwards ago.
        InvalidTypeError: an argument that is not a number, or an input of the wrong dtype.
        PeerError: with ``sync``, a forward failed in another process.

    Warns:
        BnstatsWarning: a plain checkpoint is loaded whose means are not near zero. The layer
            takes it over about zero, ``running_var + running_mean^2``, with the windows empty;
            a net that was not trained centered evaluates differently.

    Note:
        Several forwards may come before their backwards, in any order: each backward uses the
        var and r of its own forward, and its psi goes into that forward's slot. Several
        backwards through one forward add up to the backward of the summed losses. A slot
        without a psi of the last 2 m forwards does not count in Psi. A batch that is not
        finite is normalized by itself and changes nothing; a gradient that is not finite
        leaves the backward window alone.

        Under activation checkpointing a forward that runs again gets what it got the first
        time, found among the last m forwards by its mean squares; it moves nothing.
        A loss scale is in psi: when it changes, Psi is off for a window. bfloat16 needs none.
        ``torch.export`` keeps no backward: the gradient of an exported training forward is the
        derivative of its output, var and r being constants.

    Example:
        >>> import torch
        >>> from bnstats import MovingAverageBatchNorm1d
        >>> layer = MovingAverageBatchNorm1d(1, window=2, warmup=0, momentum=0.5)
        >>> [layer(torch.tensor([[x]])).item().__round__(3) for x in (1.0, 2.0, 3.0)]
        [1.0, 1.0, 1.177]
        >>> layer.running_var.item()
        4.5

    References:
        Yan, Wan, Zhang, Zhang, Wei, Sun (2020), "Towards Stabilizing Batch Statistics in
        Backward Propagation of Batch Normalization", ICLR, arXiv:2001.06838.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: ProcessGroup | bool | None = None,
        window: int = 16,
        warmup: int = 100,
        renorm_warmup: int = 1000,
        max_ratio: float = 5.0,
    ) -> None:
        name = type(self).__name__
        check_integer(name, "window", window, 1)
        check_integer(name, "warmup", warmup, 0)
        check_integer(name, "renorm_warmup", renorm_warmup, 0)
        check_limit(name, "max_ratio", max_ratio, 1)
        if not track_running_stats:
            raise InvalidValueError(
                f"{name}: track_running_stats: expected True, got {track_running_stats}: the "
                "windows are running statistics; nn.BatchNorm can do without"
            )
        super().__init__(
            *(num_features, eps, momentum, affine, True, device, dtype), bias=bias, sync=sync
        )
        self.window = int(window)
        self.warmup = int(warmup)
        self.renorm_warmup = int(renorm_warmup)
        self.max_ratio = float(max_ratio)
        self._register_ring_buffers(self.window)

    def last_normalization(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and ratio r by which the latest training forward normalized.

        Args:
            mean: of that forward's batch, of shape (C,), like all that is returned.
            var: of that batch, biased.
        """
        chi, options = (var + mean.square()).to(self.window_scales), self._options()
        if options.moves():
            slot = (self.num_steps_tracked % self.window).view(1)
            var, ratio = self.window_scales.index_select(0, slot).squeeze(0).unbind()
        else:  # no buffer has moved since
            _, (var, ratio, _) = advance(self._step_state(), chi, options)
        finite = chi.sum().isfinite()
        var, ratio = torch.where(finite, var, chi), torch.where(finite, ratio, 1)
        return torch.zeros_like(var), var, ratio

    def _options(self) -> Options:
        schedule = (self.warmup, self.renorm_warmup, self.max_ratio)
        return Options(self.eps, self.momentum, *schedule, self._held)

    def _forward_training(
        self, input: Tensor, running_mean: Tensor, batch: Batch | None = None
    ) -> Tensor:
        running_var = self._buffers["running_var"]
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        assert running_var is not None
        if input.numel() == 0 and (batch is None or batch.replicas is None):
            # No values, no statistics: what torch returns, and gradients of 0.
            return F.batch_norm(input, running_mean, running_var, weight, bias, eps=self.eps)
        wide = self.window_mean_squares.dtype
        if wide in HALF:
            self._widen()
            wide = self.window_mean_squares.dtype
        if input.dtype != wide:
            self._check_dtype(input)  # not left to torch: the state moves before it looks
        if has_tangent(input, weight, bias):
            raise InvalidValueError(
                f"{type(self).__name__}({self.num_features}): forward-mode differentiation: "
                "expected reverse mode in training, where its gradient is no derivative of its "
                "output; use evaluation mode or nn.BatchNorm"
            )
        # What is wide already is not asked to be: that costs microseconds.
        if weight is not None and weight.dtype != wide:
            weight = weight.to(wide)
        if bias is not None and bias.dtype != wide:
            bias = bias.to(wide)
        (var, ratio, step), count = take_step(self._step_state(), input, self._options(), batch)
        gradients = (self.window_gradients, self.window_gradient_steps)
        mask, replicas = (None, None) if batch is None else (batch.mask, batch.replicas)
        # One by one: torch 2.6 compiles no tuples of tensors here where a shape is dynamic.
        scale = (var, ratio, self.eps, step, *gradients, self.warmup)
        return normalize_about_zero(input, weight, bias, *scale, mask, count, replicas)

    def _check_dtype(self, input: Tensor) -> None:
        check_dtype(self, input, self.window_mean_squares.dtype)

    def extra_repr(self) -> str:
        """Return the options, those that ``nn.BatchNorm`` lacks last."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return (
            f"{plain}, window={self.window}, warmup={self.warmup}, "
            f"renorm_warmup={self.renorm_warmup}, max_ratio={self.max_ratio}"
        )


class MovingAverageBatchNorm1d(MovingAverageBatchNorm, nn.BatchNorm1d):
    """:class:`MovingAverageBatchNorm` over (N, C) or (N, C, L); also an ``nn.BatchNorm1d``."""

    _input_dims = (2, 3)


class MovingAverageBatchNorm2d(MovingAverageBatchNorm, nn.BatchNorm2d):
    """:class:`MovingAverageBatchNorm` over (N, C, H, W); also an ``nn.BatchNorm2d``."""

    _input_dims = (4,)


class MovingAverageBatchNorm3d(MovingAverageBatchNorm, nn.BatchNorm3d):
    """:class:`MovingAverageBatchNorm` over (N, C, D, H, W); also an ``nn.BatchNorm3d``."""

    _input_dims = (5,)
