"""Why running statistics are off: from each layer's distance to one verdict with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.diagnosis import verdict
from bnstats.diagnosis.drifted import MATERIAL, Distance, Explained
from bnstats.formatting import counted
from bnstats.traversal import first_names

_NOISY_BATCH = 0.5
"""Standard error of one batch's statistics from which on it normalizes by noise: of 4 values."""

_NOT_RANDOM = 2.0
"""Ratio of the spread between batches to what random samples would have, from which on the loader
is taken to be not shuffled."""

_HIGH_MOMENTUM = 0.5
"""Momentum from which on an average is worth three batches or fewer."""

_FEW_UPDATES = 0.05
"""What the initial statistics still weigh, from which on they are too heavy."""


class Case(NamedTuple):
    """What is known of one layer."""

    layer: _BatchNorm
    distance: Distance
    explained: Explained
    frozen: str  # why its statistics do not move; empty where they do
    under_dropout: Distance | None = None  # with dropout as in training, where that was measured

    @property
    def is_of_dropout(self) -> bool:
        """Whether it is off in evaluation alone, as dropout is off there."""
        under = self.under_dropout
        return under is not None and self.distance.is_material and not under.is_material


Finding = tuple[str, str]
"""A verdict and a sentence of evidence."""


def why_frozen(name: str, layers: Mapping[str, _BatchNorm], model: nn.Module) -> str:
    """Say why a layer's statistics do not move in training; nothing where they do."""
    layer = layers[name]
    if model.training and not layer.training:
        return "it is in evaluation mode while the model trains"
    if layer.momentum == 0:
        return "its momentum is 0"
    if layer.num_batches_tracked is None:
        return ""
    own = int(layer.num_batches_tracked)
    counters = (x.num_batches_tracked for x in layers.values())
    most = max(int(x) for x in counters if x is not None)
    # A layer that is called twice in a forward counts twice.
    return f"it has counted {own} batches, and others {most}" if own < most / 2 else ""


def find_cause(cases: Mapping[str, Case]) -> Finding | None:
    """Return why running statistics are off, or about to be; None where they are not."""
    off = {name: case for name, case in cases.items() if case.distance.is_material}
    checks: tuple[Callable[[Mapping[str, Case], Mapping[str, Case]], Finding | None], ...] = (
        _frozen,
        _too_few_updates,
        _not_shuffled,
        _batch_too_small,
        _momentum_too_high,
        _lag,
    )
    return next((found for check in checks if (found := check(off, cases)) is not None), None)


def _frozen(off: Mapping[str, Case], _: Mapping[str, Case]) -> Finding | None:
    frozen = {name: case for name, case in off.items() if case.frozen}
    if not frozen:
        return None
    worst = _worst(frozen)
    return verdict.FROZEN, (
        f"{len(frozen)} of {len(off)} layers that are off do not follow the data, the worst is "
        f"'{worst}': {frozen[worst].frozen}, and it is {frozen[worst].distance} off"
    )


def _too_few_updates(off: Mapping[str, Case], _: Mapping[str, Case]) -> Finding | None:
    few = {n: case for n, case in off.items() if case.explained.initial_weight > _FEW_UPDATES}
    if not few:
        return None
    worst = _worst(few)
    explained = few[worst].explained
    return verdict.TOO_FEW_UPDATES, (
        f"{_layers(few)}: after {explained.num_updates} updates at momentum "
        f"{explained.momentum:g} the initial mean 0 and variance 1 still weigh "
        f"{explained.initial_weight:.0%}; '{worst}' is {few[worst].distance} off"
    )


def _not_shuffled(_: Mapping[str, Case], cases: Mapping[str, Case]) -> Finding | None:
    unlike = {
        name: case.explained
        for name, case in cases.items()
        if case.explained.of_one_batch > _NOISY_BATCH
        and case.explained.of_one_batch > _NOT_RANDOM * case.explained.of_its_samples
    }
    if not unlike:
        return None
    worst = max(unlike, key=lambda name: unlike[name].of_one_batch)
    return verdict.CANNOT_TELL, (
        f"{_layers(unlike)}: the loader's batches are of different data, in '{worst}' "
        f"{unlike[worst].of_one_batch:.2f} sd from each other, where batches of random samples "
        f"would be {unlike[worst].of_its_samples:.2f}: shuffle the loader, and diagnose again; "
        "batches as these spoil the training too"
    )


def _batch_too_small(_: Mapping[str, Case], cases: Mapping[str, Case]) -> Finding | None:
    noise = {
        name: case.explained.of_one_batch
        for name, case in cases.items()
        if not hasattr(case.layer, "last_normalization")  # which normalizes by something else
    }
    noisy = [name for name, error in noise.items() if error > _NOISY_BATCH]
    if not noisy:
        return None
    worst = max(noisy, key=lambda name: noise[name])
    return verdict.BATCH_TOO_SMALL, (
        f"{_layers(noisy)}: in training each batch is normalized by its own statistics, and those "
        f"of one batch in '{worst}' have a standard error of {noise[worst]:.2f} sd (evaluation is "
        f"off by {cases[worst].distance})"
    )


def _momentum_too_high(_: Mapping[str, Case], cases: Mapping[str, Case]) -> Finding | None:
    high = {
        name: case
        for name, case in cases.items()
        if (case.explained.momentum or 0) >= _HIGH_MOMENTUM
        and case.explained.expected > max(MATERIAL / 2, 2 * case.explained.at_default)
    }
    if not high:
        return None
    worst = max(high, key=lambda name: high[name].explained.expected)
    explained = high[worst].explained
    return verdict.MOMENTUM_TOO_HIGH, (
        f"{_layers(high)}: with momentum {explained.momentum:g} the averages of '{worst}' "
        f"have a standard error of {explained.expected:.2f} sd, by the spread between batches; "
        f"with 0.1 it would be {explained.at_default:.2f} (it is {high[worst].distance} off now)"
    )


def _lag(off: Mapping[str, Case], _: Mapping[str, Case]) -> Finding | None:
    off = {name: case for name, case in off.items() if not case.is_of_dropout}
    if not off:
        return None
    worst = _worst(off)
    under_dropout = off[worst].under_dropout
    dropout = (
        "of other data than the loader's, or of values under dropout or stochastic depth"
        if under_dropout is None
        else "or of other data than the loader's (with dropout as in training it is "
        f"{under_dropout} off)"
    )
    return verdict.AVERAGES_LAG, (
        f"{_layers(off)}: '{worst}' is {off[worst].distance} off, where the spread between batches "
        f"explains {off[worst].explained.expected:.2f}: its averages are of earlier weights, "
        f"{dropout}"
    )


def about_dropout(cases: Mapping[str, Case]) -> str:
    """Say which layers are off in evaluation alone; nothing where none are."""
    found = {name: case for name, case in cases.items() if case.is_of_dropout}
    if not found:
        return ""
    worst = _worst(found)
    return (
        f"{_layers(found)}: '{worst}' is {found[worst].distance} off in evaluation, and "
        f"{found[worst].under_dropout} with dropout, or stochastic depth, as in training: averages "
        "that do not lag, of other values than evaluation has"
    )


def _worst(cases: Mapping[str, Case]) -> str:
    return max(cases, key=lambda name: cases[name].distance.size)


def _layers(names: Iterable[str]) -> str:
    names = list(names)
    return f"{counted(len(names), 'layer')} ({first_names(names)})"
