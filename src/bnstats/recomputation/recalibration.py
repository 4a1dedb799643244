"""What a recalibration did: the statistics before and after, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidValueError
from bnstats.formatting import counted
from bnstats.recomputation.drift import DriftReport, html, shortened, table
from bnstats.recomputation.layer_stats import LayerStats, RunningStats
from bnstats.recomputation.population import PopulationStats
from bnstats.traversal import first_names


@dataclass(frozen=True, eq=False, repr=False)
class Recalibration:
    """The result of :func:`bnstats.recompute_population_stats`; ``print`` shows a table.

    Attributes:
        before: the running statistics that each layer had.
        after: the population statistics that it has now, with their standard errors.
        drift: how far the former were from the latter.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> result = bnstats.recompute_population_stats(model, [torch.tensor([[3.0], [5.0]])])
        >>> result.before["0"].mean.item(), result.after["0"].mean.item()
        (0.0, 4.0)
        >>> result.undo()
        >>> model[0].running_mean.item()
        0.0
    """

    before: Mapping[str, RunningStats]
    after: PopulationStats
    drift: DriftReport
    _layers: Mapping[str, _BatchNorm]
    _undone: bool = field(default=False, init=False)

    def undo(self) -> None:
        """Put the running statistics from before back, bit for bit, once.

        Raises:
            InvalidValueError: a layer has none any more, or they were put back already; nothing
                is written.
        """
        if self._undone:  # what the model has learned since would be lost
            raise InvalidValueError(
                "undo: expected one call, and this recalibration is undone already; to write "
                "statistics again, use result.after.apply_to(model), or recalibrate"
            )
        for name, layer in self._layers.items():
            if layer.running_mean is None or layer.running_var is None:
                raise InvalidValueError(
                    f"undo: layer '{name}' ({type(layer).__name__}): expected a running_mean and a "
                    "running_var, as when it was recalibrated, got None"
                )
        for name, running in self.before.items():
            running.write_to(self._layers[name])
        object.__setattr__(self, "_undone", True)  # the rest of it is frozen

    def worst_first(self) -> list[str]:
        """Return the layers' names by their mean divergence, the largest first."""
        return self.drift.worst_first()

    @property
    def _heading(self) -> str:
        skipped = self.after.num_skipped
        layers = counted(len(self.after), "BatchNorm layer")
        head = f"{layers} recalibrated, method {self.after.method!r}"
        if skipped:
            batches = counted(skipped, "batch", "batches")
            head += f", {batches} with non-finite statistics skipped"
        if frozen := self.after.frozen:
            head += (
                "\nleft alone, frozen or in evaluation mode while the model trains: "
                f"{first_names(frozen)}"
            )
        if self.after.stderr_is_conditional:
            head += "\nstandard errors are given the statistics of earlier layers"
        if weights := _weights(self.after):
            head += f"\n{weights}"
        return head

    def __str__(self) -> str:
        """Return a table of the layers, the one with the largest divergence first."""
        table_of = f"\n\n{table(self.after, self.drift)}" if self.after else ""
        return f"{self._heading}{table_of}"

    def __repr__(self) -> str:
        return shortened(self._heading, self.after, self.drift)

    def _repr_html_(self) -> str:
        return html(self._heading, self.after, self.drift)


def _weights(stats: Mapping[str, LayerStats]) -> str:
    """Return what weights the loader's own statistics have; nothing where there is no prior."""
    means = [layer.mean_weight for layer in stats.values()]
    variances = [layer.var_weight for layer in stats.values()]
    if all(weight == 1 for weight in means + variances):
        return ""
    return (
        f"weights of the loader's own statistics, the rest is the prior's: means "
        f"{min(means):.2f} to {max(means):.2f}, variances {min(variances):.2f} to "
        f"{max(variances):.2f}"
    )
