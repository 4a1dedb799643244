"""How far a million merges, one after the other, stray from the moments of all values."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.rows import Row, Run
from bnstats import Moments

CHANNELS = 4
VALUES = 3
"""In a piece: of these the pieces' own moments are exact to rounding."""

MEAN = 1e4
"""In standard deviations: where E[x^2] - E[x]^2 would have lost half of its digits."""

AT_MOST = 1e-12


def measure(run: Run) -> list[Row]:
    """Merge pieces of a few values; compare with the definitions, summed without rounding."""
    pieces = 1_000 if run.quick else 1_000_000
    generator = torch.Generator().manual_seed(0)
    x = MEAN + torch.randn(pieces, VALUES, CHANNELS, dtype=torch.float64, generator=generator)
    start = time.perf_counter()
    total = _merged(x)
    seconds = time.perf_counter() - start
    mean, var = _definitions(x.reshape(-1, CHANNELS))
    work, size = "sequential merges in float64", f"{pieces:,} merges"
    return [
        _error(work, size, "mean", total.mean, mean),
        _error(work, size, "variance", total.var(correction=0), var),
        Row(work, size, "one merge", seconds / pieces),
    ]


def _error(work: str, size: str, what: str, measured: Tensor, exact: Tensor) -> Row:
    error = float((measured / exact - 1).abs().max())
    return Row(work, size, what, error, unit="relative error", at_most=AT_MOST)


def _merged(x: Tensor) -> Moments:
    """Merge the moments of x[0], x[1], ..., each of shape (values, C), from the first on."""
    means = x.mean(1)
    m2s = (x - means[:, None]).square().sum(1)
    count, total = torch.tensor(VALUES), Moments.empty(CHANNELS)
    for mean, m2 in zip(means, m2s, strict=True):
        total = total.merge(Moments(count, mean, m2))
    return total


def _definitions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every column, from sums that round once."""
    means, variances = [], []
    for column in x.T:
        values = column.tolist()
        mean = math.fsum(values) / len(values)
        means.append(mean)
        variances.append(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


if __name__ == "__main__":
    command.main("merges")
