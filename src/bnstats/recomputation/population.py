"""What a pass over data finds: population statistics per layer, as a value of its own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.arguments import check_has_values, check_writable
from bnstats.errors import (
    InvalidTypeError,
    InvalidValueError,
    LayerMismatchError,
    UnknownLayerError,
    nearest,
)
from bnstats.formatting import MAX_ROWS, counted, extent, html_table, remainder, text_table
from bnstats.recomputation import files
from bnstats.recomputation.drift import DriftReport, compare
from bnstats.recomputation.layer_stats import LayerStats, RunningStats, write_all
from bnstats.traversal import check_center, first_names, named_batchnorms, num_features

_TITLES = ["layer", "channels", "values", "batches", "mean", "variance"]


class PopulationStats(Mapping[str, LayerStats]):
    """A mapping from layer name to :class:`LayerStats`, in the order of the model.

    Args:
        layers: the statistics by layer name.
        method: how they were taken; see :func:`bnstats.recompute_population_stats`.
        num_skipped: batches left out because their statistics were not finite.
        frozen: names of layers that were left alone, as they were frozen, or in evaluation mode
            in a model that trains.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> stats = bnstats.measure_population_stats(model, list(torch.randn(8, 16, 2)))
        >>> stats["0"].count, stats["0"].num_batches
        (128, 8)
    """

    def __init__(
        self,
        layers: Mapping[str, LayerStats],
        *,
        method: str = "pooled",
        num_skipped: int = 0,
        frozen: Iterable[str] = (),
    ) -> None:
        self._layers = dict(layers)
        self.method = method
        self.num_skipped = num_skipped
        self.frozen = tuple(frozen)

    def __getitem__(self, name: str) -> LayerStats:
        if name not in self._layers:
            raise UnknownLayerError(name, self._layers)
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def stderr_is_conditional(self) -> bool:
        """Whether standard errors are those given the statistics of earlier layers.

        True for ``"layerwise"`` and ``"sweeps"``: their standard errors describe how other
        batches would change a layer's statistics if the earlier layers kept theirs. With other
        batches the earlier layers' statistics would change too, and normalizing by them removes
        much of that change. The unconditional error is usually smaller, down to a tenth for means
        and a third for variances (see the tests); to estimate it takes more than one pass. With
        the other methods each batch is normalized by itself, and the errors are unconditional.
        """
        return self.method in ("layerwise", "sweeps")

    @property
    def _heading(self) -> str:
        layers = counted(len(self), "BatchNorm layer")
        return f"population statistics of {layers}, method {self.method!r}"

    def __str__(self) -> str:
        """Return a table of the layers, in the order of the model."""
        rows = [_row(name, stats) for name, stats in self.items()]
        return "\n".join([self._heading, "", text_table(_TITLES, rows)]) if self else self._heading

    def __repr__(self) -> str:
        if not self:
            return self._heading
        rows = [_row(name, self[name]) for name in [*self][:MAX_ROWS]]
        note = remainder(len(self), "; print() shows all")
        return "\n".join([self._heading, "", text_table(_TITLES, rows), *note])

    def _repr_html_(self) -> str:
        rows = [_row(name, self[name]) for name in [*self][:MAX_ROWS]]
        note = "".join(remainder(len(self), "; print() shows all"))
        return html_table(self._heading, _TITLES, rows, note)

    def apply_to(self, model: nn.Module) -> None:
        """Write the statistics into the model's running_mean and running_var.

        Layers of the model that are not named here keep theirs, and so does every counter.

        Raises:
            LayerMismatchError: a layer is not in the model, has other channels, or keeps its
                statistics about zero, which these are not.
            NonFiniteStatisticsError: a half buffer cannot hold a value.
            InvalidValueError: buffers on the meta device, or made in inference mode.

        After an error nothing is written.
        """
        layers = layers_of(self, model)
        for name, layer in layers.items():
            check_writable(name, layer, layer.buffers(recurse=False))
        write_all(layers, self, {name: RunningStats.of(layer) for name, layer in layers.items()})

    def drift_from(self, model: nn.Module) -> DriftReport:
        """Return how far the model's running statistics are from these, per layer.

        In what the model's own layers divide by: their eps is in every variance. Printed, it
        is a table, worst layer first.

        Raises:
            LayerMismatchError: a layer is not in the model, has other channels, or keeps its
                statistics about zero, which these are not.
        """
        layers = layers_of(self, model)
        running = {name: RunningStats.of(layer) for name, layer in layers.items()}
        stats = {name: replace(self[name], eps=layer.eps) for name, layer in layers.items()}
        return compare(running, stats)

    def merge(self, other: PopulationStats) -> PopulationStats:
        """Return the statistics over the data of both, for example of two shards.

        A layer that only one of them has is taken as it is; statistics of no layers change
        nothing.

        Raises:
            InvalidTypeError: not PopulationStats.
            InvalidValueError: not both are pooled: averages over batches do not merge.
            LayerMismatchError: there is no layer in common, or one has other channels, another
                correction or another eps in the other.
        """
        check_population("merge", other)
        if (self.method, other.method) != ("pooled", "pooled"):
            raise InvalidValueError(
                'merge: expected statistics of method "pooled", got '
                f'"{self.method}" and "{other.method}", which do not merge'
            )
        if self and other and self.keys().isdisjoint(other):
            raise LayerMismatchError(
                "merge: expected statistics of the same layers, got no layer in common: "
                f"{first_names(self)} here and {first_names(other)} in the other"
            )
        merged = {**self, **other}
        for name in filter(other.__contains__, self):  # in order: the first speaks
            mine, theirs = self[name], other[name]
            if (mine.num_features, mine.correction) != (theirs.num_features, theirs.correction):
                raise LayerMismatchError(
                    f"merge: layer '{name}' has {mine.num_features} channels (correction "
                    f"{mine.correction}) here and {theirs.num_features} (correction "
                    f"{theirs.correction}) in the other"
                )
            if mine.eps != theirs.eps:
                raise LayerMismatchError(
                    f"merge: layer '{name}' has eps {mine.eps:g} here and {theirs.eps:g} in the "
                    "other: expected statistics of the same layer; set the eps of one by "
                    "dataclasses.replace(stats[name], eps=...)"
                )
            merged[name] = mine.merge(theirs)
        # Without repetitions, in order, and without what the other one has measured.
        frozen = dict.fromkeys(x for x in self.frozen + other.frozen if x not in merged)
        num_skipped = self.num_skipped + other.num_skipped
        return PopulationStats(merged, num_skipped=num_skipped, frozen=frozen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a versioned npz file (no pickle), whole or not at all.

        If the path is a link, the file that it points to is replaced.

        Raises:
            InvalidValueError: an impossible value, for example a negative variance.
        """
        for stats in self.values():
            stats.check_values()
        header = {"method": self.method, "num_skipped": self.num_skipped, "frozen": self.frozen}
        files.save(path, header, {name: vars(stats) for name, stats in self.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PopulationStats:
        """Read a file that ``save`` wrote, also by an earlier version.

        Raises:
            StatsFileError: the file is damaged, or something else.
            FileNotFoundError: there is no such file.
        """
        optional = [field.name for field in fields(LayerStats) if field.kw_only]
        required = [field.name for field in fields(LayerStats) if not field.kw_only]
        header, layers = files.load(path, required, optional)
        with files.malformed(path):
            stats = {name: LayerStats(**values) for name, values in layers.items()}  # type: ignore[arg-type]
            for layer in stats.values():
                layer.check_values()
            method, num_skipped = header["method"], header["num_skipped"]
            if not isinstance(method, str) or not isinstance(num_skipped, int) or num_skipped < 0:
                raise ValueError(f"method {method!r}, num_skipped {num_skipped!r}")
            frozen = header.get("frozen", [])
            if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen):
                raise ValueError(f"frozen {frozen!r}")
            return cls(stats, method=method, num_skipped=num_skipped, frozen=frozen)


def check_population(argument: str, stats: object) -> None:
    """Refuse what is not PopulationStats."""
    if not isinstance(stats, PopulationStats):
        held = isinstance(getattr(stats, "after", None), PopulationStats)
        raise InvalidTypeError(
            f"{argument}: expected PopulationStats, got {type(stats).__name__}"
            + ("; its statistics are result.after" if held else "")
        )


def _row(name: str, stats: LayerStats) -> list[str]:
    numbers = [str(stats.num_features), f"{stats.count:,}", str(stats.num_batches)]
    return [name, *numbers, extent(stats.mean), extent(stats.var)]


def layers_of(stats: PopulationStats, model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the model's layers that these statistics are of.

    Raises:
        LayerMismatchError: a layer is not in the model, has other channels, or keeps its
                statistics about zero, which these are not.
    """
    layers = named_batchnorms(model, lambda *_: True)
    check_has_values({name: layer for name, layer in layers.items() if name in stats})
    missing = [name for name in stats if name not in layers]
    if missing:
        raise LayerMismatchError(
            f"these layers are not among the model's {len(layers)} BatchNorm layers with "
            f"running statistics: {_missing(missing, stats, layers)}"
        )
    for name, layer in stats.items():
        channels = num_features(layers[name])
        if channels != layer.num_features:
            raise LayerMismatchError(
                f"layer '{name}': the statistics have {layer.num_features} channels, the "
                f"model's layer has {channels}"
            )
        check_center(name, layers[name], layer.mean)
    return {name: layers[name] for name in stats}


def _missing(missing: list[str], stats: Collection[str], layers: Collection[str]) -> str:
    """Return the names that a model lacks, with the nearest or the prefix that was meant."""
    for candidate in layers:
        mine, theirs = _prefixes(missing[0], candidate)
        if all(x.startswith(mine) and theirs + x.removeprefix(mine) in layers for x in stats):
            return f"{first_names(missing)}; {_remedy(mine, theirs)}"
    if not layers:
        return first_names(missing)
    return ", ".join(f"{name!r} (nearest: {nearest(name, layers)!r})" for name in missing)


def _prefixes(mine: str, theirs: str) -> tuple[str, str]:
    """Return two paths without their common last keys, each with its final dot."""
    a, b = mine.split("."), theirs.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(f"{key}." for key in a), "".join(f"{key}." for key in b)


def _remedy(mine: str, theirs: str) -> str:
    if not mine:
        return (
            f"the model has all of them under the prefix {theirs!r}: pass "
            f"model.get_submodule({theirs[:-1]!r})"
        )
    where = f"under the prefix {theirs!r} in place of" if theirs else "without the prefix"
    name = f"{theirs!r} + name" if theirs else "name"
    return (
        f"the model has all of them {where} {mine!r}: use PopulationStats({{"
        f"{name}.removeprefix({mine!r}): layer for name, layer in stats.items()}})"
    )
