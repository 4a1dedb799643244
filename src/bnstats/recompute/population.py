"""What a pass over data finds: population statistics per layer, as a value of its own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import (
    InvalidTypeError,
    InvalidValueError,
    LayerMismatchError,
    UnknownLayerError,
)
from bnstats.moments import Moments
from bnstats.recompute import files
from bnstats.recompute.drift import Drift, RunningStats, compare, write_all
from bnstats.traversal import named_batchnorms


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Population statistics of one layer's input; tensors are float64, of shape (C,).

    Attributes:
        count: values per channel.
        num_batches: batches in which the layer saw values.
        mean: mean per channel; 0 for a layer that keeps its statistics about zero.
        var: variance per channel, divided by ``count - correction``; the mean square for a
            layer that keeps its statistics about zero.
        mean_stderr: standard error of ``mean`` in its own unit, from the spread between
            batches; NaN with fewer than two batches.
        var_stderr: the same of ``var``.
        correction: 1 where ``var`` is unbiased, 0 where it is not.

    Example:
        >>> import torch, bnstats
        >>> data = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> stats = bnstats.measure_population_stats(torch.nn.BatchNorm1d(1), data.split(2))[""]
        >>> stats.count, stats.num_batches, stats.mean.item(), stats.mean_stderr.item()
        (4, 2, 3.0, 1.5)
    """

    count: int
    num_batches: int
    mean: Tensor
    var: Tensor
    mean_stderr: Tensor
    var_stderr: Tensor
    correction: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.shape != (self.num_features,):
                raise InvalidValueError(
                    f"LayerStats: {field.name}: expected shape ({self.num_features},), got "
                    f"{tuple(value.shape)}"
                )

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return self.mean.numel()

    @property
    def moments(self) -> Moments:
        """The statistics as mergeable moments; meant for pooled ones."""
        return Moments(
            torch.tensor(self.count), self.mean, self.var * (self.count - self.correction)
        )

    def merge(self, other: LayerStats) -> LayerStats:
        """Return the pooled statistics of the values of both.

        The standard errors are combined as those of two strata: exact where each was measured
        on its own share of the data.
        """
        total = self.moments + other.moments
        count = int(total.count)
        mean_error, var_error = torch.zeros_like(self.mean), torch.zeros_like(self.var)
        for part in (self, other):
            share = part.count / max(count, 1)
            shift = part.mean - total.mean
            mean_error += (share * part.mean_stderr).square()
            var_error += share**2 * (
                part.var_stderr.square() + (2 * shift * part.mean_stderr).square()
            )
        return replace(
            self,
            count=count,
            num_batches=self.num_batches + other.num_batches,
            mean=total.mean,
            var=total.var(self.correction),
            mean_stderr=mean_error.sqrt(),
            var_stderr=var_error.sqrt(),
        )


class PopulationStats(Mapping[str, LayerStats]):
    """A mapping from layer name to :class:`LayerStats`, in the order of the model.

    Args:
        layers: the statistics by layer name.
        method: how they were taken; see :func:`bnstats.recompute_population_stats`.
        num_skipped: batches left out because their statistics were not finite.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> stats = bnstats.measure_population_stats(model, list(torch.randn(8, 16, 2)))
        >>> stats["0"].count, stats["0"].num_batches
        (128, 8)
    """

    def __init__(
        self, layers: Mapping[str, LayerStats], *, method: str = "pooled", num_skipped: int = 0
    ) -> None:
        self._layers = dict(layers)
        self.method = method
        self.num_skipped = num_skipped

    def __getitem__(self, name: str) -> LayerStats:
        if name not in self._layers:
            raise UnknownLayerError(name, self._layers)
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {stats.count:,} values" for name, stats in self.items())
        return f"PopulationStats(method={self.method!r}, {{{counts}}})"

    def apply_to(self, model: nn.Module) -> None:
        """Write the statistics into the model's running_mean and running_var.

        Layers of the model that are not named here keep theirs, and so does every counter.

        Raises:
            LayerMismatchError: a layer is not in the model, or has other channels; nothing is
                written.
        """
        layers = layers_of(self, model)
        write_all(layers, self, {name: RunningStats.of(layer) for name, layer in layers.items()})

    def drift_from(self, model: nn.Module) -> dict[str, Drift]:
        """Return how far the model's running statistics are from these, per layer.

        Raises:
            LayerMismatchError: a layer is not in the model, or has other channels.
        """
        running = {name: RunningStats.of(layer) for name, layer in layers_of(self, model).items()}
        return compare(running, self)

    def merge(self, other: PopulationStats) -> PopulationStats:
        """Return the statistics over the data of both, for example of two shards.

        A layer that only one of them has is taken as it is; statistics of no layers change
        nothing.

        Raises:
            InvalidValueError: not both are pooled: averages over batches do not merge.
            LayerMismatchError: there is no layer in common, or one has other channels or another
                correction in the other.
        """
        if not isinstance(other, PopulationStats):
            raise InvalidTypeError(f"merge: expected PopulationStats, got {type(other).__name__}")
        if (self.method, other.method) != ("pooled", "pooled"):
            raise InvalidValueError(
                'merge: expected statistics of method "pooled", got '
                f'"{self.method}" and "{other.method}", which do not merge'
            )
        if self and other and self.keys().isdisjoint(other):
            raise LayerMismatchError(
                "merge: expected statistics of the same layers, got no layer in common: "
                f"{_first(self)} here and {_first(other)} in the other"
            )
        merged = {**self, **other}
        for name in self.keys() & other.keys():
            mine, theirs = self[name], other[name]
            if (mine.num_features, mine.correction) != (theirs.num_features, theirs.correction):
                raise LayerMismatchError(
                    f"merge: layer '{name}' has {mine.num_features} channels (correction "
                    f"{mine.correction}) here and {theirs.num_features} (correction "
                    f"{theirs.correction}) in the other"
                )
            merged[name] = mine.merge(theirs)
        return PopulationStats(merged, num_skipped=self.num_skipped + other.num_skipped)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a versioned npz file (no pickle), whole or not at all."""
        header = {"method": self.method, "num_skipped": self.num_skipped}
        files.save(path, header, {name: vars(stats) for name, stats in self.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PopulationStats:
        """Read what ``save`` wrote.

        Raises:
            StatsFileError: the file is damaged, or something else.
            FileNotFoundError: there is no such file.
        """
        header, layers = files.load(path, [field.name for field in fields(LayerStats)])
        with files.malformed(path):
            stats = {name: LayerStats(**values) for name, values in layers.items()}  # type: ignore[arg-type]
            return cls(stats, method=str(header["method"]), num_skipped=int(header["num_skipped"]))


def _first(names: Collection[str]) -> str:
    """Return the first few names, to be read by a user."""
    shown = ", ".join(repr(name) for name in islice(names, 3))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def layers_of(stats: PopulationStats, model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the model's layers that these statistics are of.

    Raises:
        LayerMismatchError: a layer is not in the model, or has other channels.
    """
    layers = named_batchnorms(model)
    missing = [name for name in stats if name not in layers]
    if missing:
        raise LayerMismatchError(
            f"these layers are not among the model's {len(layers)} BatchNorm layers with "
            f"running statistics: {', '.join(map(repr, missing))}"
        )
    for name, layer in stats.items():
        if layers[name].num_features != layer.num_features:
            raise LayerMismatchError(
                f"layer '{name}': the statistics have {layer.num_features} channels, the "
                f"model's layer has {layers[name].num_features}"
            )
    return {name: layers[name] for name in stats}
