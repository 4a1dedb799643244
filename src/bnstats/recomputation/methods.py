"""The methods of measuring, and the checks of what a caller asks of them."""

from __future__ import annotations

from typing import Any

from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.recomputation.collector import one_pass
from bnstats.recomputation.estimators import Pooled, averaged, moving_average
from bnstats.recomputation.layerwise import layerwise
from bnstats.recomputation.options import Options, check_options
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.sweeps import sweeps
from bnstats.recomputation.task import Method

METHODS = {
    method.name: method
    for method in (
        Method("pooled", one_pass, Pooled, samples=True),
        Method("batch_average", one_pass, averaged),
        Method("ema", one_pass, moving_average, merges=False),
        Method("layerwise", layerwise, Pooled, holds_inputs=True, samples=True, in_order=True),
        Method("sweeps", sweeps, Pooled, rereads=True, samples=True, in_order=True),
    )
}
"""The one table of methods."""


def default_method(prior: PopulationStats | None) -> str:
    """Return the method of a caller who names none."""
    return "pooled" if prior is None else "layerwise"


def method_of(options: Options) -> Method:
    """Return the method, once all options are known to be valid together.

    No model and no data are needed: a callback asks before a training begins.

    Raises:
        InvalidValueError: an unknown method or value, or options that exclude each other.
        InvalidTypeError: a value of another type.
    """
    name: Any = options.method
    if not isinstance(name, str) or name not in METHODS:
        raise InvalidValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    check_options(options)
    _check_prior(method, options)
    if options.memory_limit is not None and not method.holds_inputs:
        raise InvalidValueError(
            f'memory_limit: only method="layerwise" holds activations, got it for "{name}"'
        )
    return method


def _check_prior(method: Method, options: Options) -> None:
    """Refuse what is no prior, or cannot be done together with one."""
    prior: Any = options.prior
    if prior is None:
        return
    if not isinstance(prior, PopulationStats):
        raise InvalidTypeError(
            f"prior: expected PopulationStats of the training data, got {type(prior).__name__}; "
            "measure_population_stats(model, train_loader) returns them, and "
            "PopulationStats.load reads a file of them"
        )
    if not method.in_order:
        raise InvalidValueError(
            "prior: each layer is to be measured behind layers that are adapted already: expected "
            f'method="layerwise" (the default with a prior) or "sweeps", got "{method.name}"'
        )
    if options.tolerance is not None:
        raise InvalidValueError(
            "tolerance: expected None with a prior, whose weight already follows from the errors; "
            "limit what is read by max_batches"
        )
