"""What is to be measured, checked and resolved: the argument of every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnstats.distributed import Peers
from bnstats.recompute.batches import Reader
from bnstats.recompute.stage import StagedLayer
from bnstats.reduction import wide_dtype


@dataclass(frozen=True, eq=False)
class Task:
    """One measurement.

    Attributes:
        model: the unwrapped model.
        layers: the chosen layers, at least one.
        loader: gives batches.
        forward: from a batch to a forward of the model.
        method: its name.
        correction: as the caller asked.
        skip_nonfinite: leave a batch out that is not finite somewhere, instead of raising.
        max_batches: read no more than so many.
        tolerance: stop when the standard errors are no larger.
        memory_limit: bytes that may wait at layers.
        device: where batches go.
        progress: show a progress bar.
        peers: the processes that measure together.
    """

    model: nn.Module
    layers: tuple[StagedLayer, ...]
    loader: Iterable[Any]
    forward: Callable[[Any], Any]
    method: str
    correction: int
    skip_nonfinite: bool
    max_batches: int | None
    tolerance: float | None
    memory_limit: int | None
    device: torch.device | str | None
    progress: bool
    peers: Peers

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and on the device of the measurement."""
        device = self.layers[0].module.running_mean.device  # type: ignore[union-attr]
        return torch.empty(0, dtype=wide_dtype(device), device=device)

    def reader(self, *, progress: bool = False) -> Reader:
        """Begin to read the loader, from its start if it has one."""
        return Reader(
            self.loader,
            max_batches=self.max_batches,
            progress=progress,
            device=self.device,
        )

    def correction_of(self, layer: StagedLayer) -> int:
        """Return a layer's correction: about zero no mean is estimated, and none corrected for."""
        return 0 if layer.about_zero else self.correction


class Tally(NamedTuple):
    """How many batches were read; over all processes, once their tallies are summed.

    Attributes:
        num_read: batches read.
        num_skipped: of these, left out because their statistics were not finite.
        length: batches that there are; NaN where a loader does not say.
        num_exhausted: processes that have no more.
    """

    num_read: float
    num_skipped: float
    length: float
    num_exhausted: float

    @classmethod
    def of(cls, reader: Reader, num_skipped: int) -> Tally:
        """Return what one process has read."""
        length = math.nan if reader.length is None else reader.length
        return cls(reader.num_read, num_skipped, length, reader.exhausted)

    @property
    def fraction(self) -> float:
        """Which part of a finite population was sampled; 0 where that is not known.

        All of it is no sample: what standard errors still speak of then is whatever the
        population itself was drawn from.
        """
        return self.num_read / self.length if self.num_read < self.length else 0
