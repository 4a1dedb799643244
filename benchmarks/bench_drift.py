"""How far cumulative statistics stray from those of all values in a long training."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.rows import Row, Run
from bnstats import CumulativeBatchNorm1d

CHANNELS = 4
VALUES = 2
"""In a batch, the fewest that have a variance: the most batches for the values."""

MEAN = 1000.0
"""In standard deviations: float32's steps there are 6e-5 of them."""

DRIFTS = {"stationary": 0.0, "mean from 1000 to 1002": 2.0}
"""What moves within the training, in standard deviations; a mean that drifts is folded in by
steps that are all of one sign, and float32 buffers lose each in the same direction."""

CHUNK = 1_000
"""Batches that are drawn at once."""

AT_MOST = 1e-6


def measure(run: Run) -> list[Row]:
    """Train a layer on batches of two values; compare with the definitions, summed exactly."""
    batches = 4_000 if run.quick else 400_000
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a batch this small gains nothing by a second one
    try:
        return [row for drift in DRIFTS for row in _rows(drift, batches)]
    finally:
        torch.set_num_threads(threads)


def _rows(drift: str, batches: int) -> list[Row]:
    data = _data(batches, DRIFTS[drift])
    layer = CumulativeBatchNorm1d(CHANNELS, affine=False)
    start = time.perf_counter()
    with torch.no_grad():
        for x in data:
            layer(x)
    seconds = time.perf_counter() - start
    mean, var = _definitions(data.reshape(-1, CHANNELS))
    work, size = f"cumulative statistics, {drift}", f"{batches:,} batches"
    errors = {
        "mean": ((layer.get_buffer("exact_mean") - mean) / var.sqrt(), "standard deviations"),
        "variance": (layer.get_buffer("exact_var") / var - 1, "relative error"),
    }
    return [
        *(
            Row(work, size, what, float(error.abs().max()), unit=unit, at_most=AT_MOST)
            for what, (error, unit) in errors.items()
        ),
        Row(work, size, "one training forward", seconds / batches),
    ]


def _data(batches: int, drift: float) -> Tensor:
    """Return float32 batches, of shape (batches, values, C)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(batches, VALUES, CHANNELS)
    for start in range(0, batches, CHUNK):
        part = x[start : start + CHUNK]
        means = MEAN + drift * torch.arange(start, start + len(part)) / batches
        noise = torch.randn(part.shape, dtype=torch.float64, generator=generator)
        part.copy_(means.double().view(-1, 1, 1) + noise)
    return x


def _definitions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of every column, from sums that round once."""
    means, variances = [], []
    for column in x.T:
        values = column.tolist()
        mean = math.fsum(values) / len(values)
        means.append(mean)
        variances.append(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


if __name__ == "__main__":
    command.main("drift")
