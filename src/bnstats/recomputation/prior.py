"""Statistics of another data set, toward which those of few samples are drawn."""

from __future__ import annotations

from collections.abc import Iterable

from bnstats.errors import InvalidValueError, LayerMismatchError
from bnstats.recomputation.estimators import Estimate
from bnstats.recomputation.observer import ObservedLayer
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.shrinkage import shrink
from bnstats.traversal import check_center, first_names

_FEWEST_SAMPLES = 8
"""With fewer samples, their spread is too uncertain to judge them by."""

_NARROW = 0.4
"""Spread, over the source's, of samples that are of one kind: those of one digit have some 0.25 in
the last layer, of all ten from 0.6 on (benchmarks/bench_prior.py)."""


class Prior:
    """The source's statistics, and what the layers of one measurement make of them.

    Args:
        source: what the caller passed as ``prior``.
        layers: the layers that are measured.

    Raises:
        InvalidValueError: it has no spread between samples.
        LayerMismatchError: it is of another model.
    """

    def __init__(self, source: PopulationStats, layers: Iterable[ObservedLayer]) -> None:
        self._source = source
        self._spreads: dict[str, tuple[int, float]] = {}
        for layer in layers:
            self._check(layer)

    def _check(self, layer: ObservedLayer) -> None:
        if layer.name not in self._source:
            raise LayerMismatchError(
                f"prior: expected statistics of every layer that is measured, got none of layer "
                f"'{layer.name}', but of {first_names(self._source)}; measure them with this "
                "model, or choose layers by include"
            )
        stats = self._source[layer.name]
        if stats.num_features != layer.num_features:
            raise LayerMismatchError(
                f"prior: layer '{layer.name}' has {stats.num_features} channels in the prior, and "
                f"{layer.num_features} in the model"
            )
        check_center(layer.name, layer.module, stats.mean)
        if stats.num_samples < 2:
            raise InvalidValueError(
                f"prior: layer '{layer.name}' comes without the spread between samples, from which "
                "the weight is measured; expected what measure_population_stats(model, "
                'train_loader) returns for two samples or more, by method="pooled", "layerwise" or '
                '"sweeps", and without a prior'
            )

    @property
    def description(self) -> str:
        """A text that differs between priors."""
        sums = (float(x.mean.sum() + x.var.sum()) for x in self._source.values())
        return f"{len(self._source)} layers, {sum(sums):.17g}"

    def combine(self, layer: ObservedLayer, estimate: Estimate) -> Estimate:
        """Return what the layer is to normalize with, from the estimate of the loader's data."""
        combined, relative_spread = shrink(self._source[layer.name], estimate, layer.module.eps)
        self._spreads.pop(layer.name, None)  # the layer completed last is to be the last one
        self._spreads[layer.name] = (int(estimate.num_samples[0]), relative_spread)
        return combined

    def about_one_kind(self) -> list[str]:
        """Tell where the samples differ much less than the source's in the deepest layer."""
        if len(self._spreads) < 2:
            return []  # the input's own contrast is the first layer's spread
        name, (num_samples, relative_spread) = list(self._spreads.items())[-1]
        if num_samples < _FEWEST_SAMPLES or relative_spread >= _NARROW:
            return []
        return [
            f"prior: the loader's {num_samples} samples differ little from each other: in "
            f"layer '{name}' their variance is {relative_spread:.2f} of the prior's. If they "
            "are of one class, or scene, their statistics are those of the class, and "
            "adapting to them removes what distinguishes it; give samples of all kinds"
        ]
