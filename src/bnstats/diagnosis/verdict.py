"""A diagnosis as a value: what is wrong, the evidence, and the fix."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from bnstats.recomputation import Drift

HEALTHY = "healthy"
CANNOT_TELL = "cannot tell"
NOT_FINITE = "not finite"
FROZEN = "layers frozen"
TOO_FEW_UPDATES = "too few updates"
MOMENTUM_TOO_HIGH = "momentum too high"
BATCH_TOO_SMALL = "batch too small"
AVERAGES_LAG = "averages lag"
OTHER_DATA = "other data"
NOT_BATCH_NORM = "not the batch norm"

REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        HEALTHY: "the batch norm's statistics need no fix",
        CANNOT_TELL: "diagnose again with a metric, or with more data in the loader or the metric",
        NOT_FINITE: "bnstats.recompute_population_stats(model, loader); in training, "
        'bnstats.convert_batchnorm(model, "ema"), whose layers leave out such batches',
        FROZEN: "bnstats.recompute_population_stats(model.eval(), loader); train them on with "
        "layer.train() and a momentum above 0, if they were not frozen on purpose",
        TOO_FEW_UPDATES: "bnstats.recompute_population_stats(model, loader); in training, "
        'bnstats.convert_batchnorm(model, "ema"), whose averages are right from the first batch on',
        MOMENTUM_TOO_HIGH: "bnstats.recompute_population_stats(model, loader); in training, "
        "momentum=0.1: it is the weight of the new batch",
        BATCH_TOO_SMALL: "bnstats.recompute_population_stats(model, loader) for the averages; in "
        'training, larger batches, bnstats.convert_batchnorm(model, "renorm") or, from the start '
        'of a training, "moving_average"',
        AVERAGES_LAG: "bnstats.recompute_population_stats(model, loader)",
        OTHER_DATA: "bnstats.recompute_population_stats(model, target, "
        "prior=bnstats.measure_population_stats(model, loader))",
        NOT_BATCH_NORM: "check the weights, the labels and how inputs are prepared",
    }
)
"""The fix for each fault: one line."""


class Measured(NamedTuple):
    """A metric's mean over samples, and its standard error.

    Example:
        >>> from bnstats.diagnosis.verdict import Measured
        >>> print(Measured(0.91, 0.012, 500))
        0.91 ± 0.012
    """

    mean: float
    stderr: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.stderr:.2g}"


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis:
    """The result of :func:`bnstats.diagnose`; ``print`` shows all of it.

    Attributes:
        verdict: one of ``"healthy"``, ``"cannot tell"``, ``"not finite"``, ``"layers frozen"``,
            ``"too few updates"``, ``"momentum too high"``, ``"batch too small"``,
            ``"averages lag"``, ``"other data"``, ``"not the batch norm"``.
        evidence: what it rests on, a sentence each.
        remedy: the line that fixes it.
        drift: by layer name, how far the running statistics are from the loader's population.
        metrics: the metric with the statistics that are named: ``"running"``, ``"population"`` of
            the loader, ``"target"``; empty without a metric.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> diagnosis = bnstats.diagnose(model, torch.randn(256, 4).split(32))
        >>> diagnosis.verdict
        'too few updates'
    """

    verdict: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""
    drift: Mapping[str, Drift] = field(default_factory=dict)
    metrics: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether the batch norm's statistics need no fix."""
        return self.verdict == HEALTHY

    def __str__(self) -> str:
        """Return the verdict, the evidence and the remedy, a line each or wrapped."""
        lines = [f"verdict: {self.verdict}"]
        for sentence in self.evidence:
            lines.append(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))
        return "\n".join([*lines, f"remedy: {self.remedy}"])

    def __repr__(self) -> str:
        return str(self)
