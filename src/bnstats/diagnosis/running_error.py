"""How accurate a moving average can be, however long it runs."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

from torch import Tensor

from bnstats.arguments import warn_of_momentum
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.formatting import describe
from bnstats.recomputation import LayerStats, PopulationStats
from bnstats.recomputation.layer_stats import with_eps
from bnstats.recomputation.population import check_population
from bnstats.traversal import ByLayer


class RunningError(NamedTuple):
    """The standard error of a layer's moving averages while the weights are fixed.

    Attributes:
        mean_stderr: of running_mean, in its own unit, of shape (C,).
        var_stderr: of running_var, the same.
        effective_batches: how many batches the average is worth.
        mean_shift: the root mean square of :attr:`Drift.mean_shift` to be expected of this error
            alone, ``mean_stderr / sqrt(var + eps)``.
        var_ratio: the same of :attr:`Drift.var_ratio` - 1, ``var_stderr / (var + eps)``.

    Example:
        >>> import torch, bnstats
        >>> stats = bnstats.measure_population_stats(
        ...     torch.nn.BatchNorm1d(3), torch.randn(64, 3).split(8)
        ... )
        >>> bnstats.estimate_running_error(stats, momentum=0.5)[""].effective_batches
        3.0
    """

    mean_stderr: Tensor
    var_stderr: Tensor
    effective_batches: float
    mean_shift: Tensor
    var_ratio: Tensor

    def __repr__(self) -> str:
        return describe("RunningError", self._asdict())


def estimate_running_error(
    stats: PopulationStats, *, momentum: float = 0.1, num_batches: int | None = None
) -> dict[str, RunningError]:
    r"""Estimate how accurate running averages are, from the spread between batches.

    With fixed weights the batches' statistics are independent draws. A debiased average after t
    batches weighs the k-th last by ``a (1 - a)^k / (1 - (1 - a)^t)``, with a the momentum; the
    sum of the squared weights is one over its effective number of batches, which is ::

        (2 - a) / a  *  (1 - (1 - a)^t) / (1 + (1 - a)^t)

    and tends to ``(2 - a) / a``: 19 batches for momentum 0.1, however long it runs. Its standard
    error is that of one batch over the root of this number. The actual error, to which weights
    that still move contribute, is ``stats.drift_from(model)``.

    Args:
        stats: measured over at least two batches of the size that training uses; best by
            ``method="batch_average"``, whose variances are those that ``nn.BatchNorm`` averages.
        momentum: weight of the new batch, in (0, 1]; 1 asks for the error of a single batch.
        num_batches: t; by default infinite. ``nn.BatchNorm`` is not debiased: its initial
            value still weighs ``(1 - momentum)^t``.

    Returns:
        The standard errors by layer name; NaN where stats has a single batch.

    Raises:
        InvalidValueError: momentum outside (0, 1], num_batches below 1, or stats of a moving
            average, which do not determine the spread of single batches.
        InvalidTypeError: not PopulationStats.

    Warns:
        BnstatsWarning: a momentum above 0.5, which is the weight of the new batch.

    Example:
        >>> import torch, bnstats
        >>> loader = torch.randn(6400, 2).split(32)
        >>> stats = bnstats.measure_population_stats(torch.nn.BatchNorm1d(2), loader)
        >>> error = bnstats.estimate_running_error(stats, momentum=0.1)[""]
        >>> round(error.effective_batches), bool((error.mean_stderr < 0.1).all())
        (19, True)
    """
    check_population("stats", stats)
    if stats.method == "ema":
        raise InvalidValueError('stats: expected method "pooled" or "batch_average", got "ema"')
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise InvalidTypeError(f"momentum: expected a number, got {type(momentum).__name__}")
    if not 0 < momentum <= 1:
        raise InvalidValueError(f"momentum: expected a number in (0, 1], got {momentum}")
    if momentum < 1:  # the error of a single batch is a fair question
        warn_of_momentum("estimate_running_error", float(momentum))
    if num_batches is not None and num_batches < 1:
        raise InvalidValueError(f"num_batches: expected 1 or more, got {num_batches}")
    forgotten = 0.0 if num_batches is None else (1 - momentum) ** num_batches
    effective = (2 - momentum) / momentum * (1 - forgotten) / (1 + forgotten)
    return ByLayer((name, error_of_average(layer, effective)) for name, layer in stats.items())


def error_of_average(layer: LayerStats, effective_batches: float) -> RunningError:
    """Return the standard error of an average that is worth this many batches."""
    # The error of an average of B batches is that of one over the root of B.
    scale = (layer.num_batches / effective_batches) ** 0.5
    mean_stderr, var_stderr = layer.mean_stderr * scale, layer.var_stderr * scale
    square = with_eps(layer.var, layer.eps)
    return RunningError(
        mean_stderr, var_stderr, effective_batches, mean_stderr / square.sqrt(), var_stderr / square
    )
