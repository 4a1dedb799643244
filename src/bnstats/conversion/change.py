"""What else changes in a layer when its class changes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.arguments import check_writable
from bnstats.conversion.families import (
    CENTERED,
    FAMILIES,
    PLAIN,
    change_class,
    family_of,
    known_class,
    target_class,
)
from bnstats.distributed import is_group
from bnstats.errors import BnstatsError, InvalidTypeError, nearest
from bnstats.holding import held_anew
from bnstats.layers.arguments import check_momentum
from bnstats.layers.base import RunningStatsBatchNorm


@dataclass(frozen=True)
class Change:
    """One layer's change, checked and ready.

    Attributes:
        module: the layer.
        cls: what its class becomes.
        donor: a new layer of that family; the layer gets the attributes that it lacks from it.
        options: names of the attributes that it always takes from the donor.
    """

    module: nn.Module
    cls: type[nn.Module]
    donor: nn.Module
    options: frozenset[str]

    @torch.no_grad()
    def apply(self) -> None:
        """Change the layer."""
        with held_anew(self.module):
            self._apply()

    def _apply(self) -> None:
        module, donor = self.module, self.donor
        if self._starts_anew():
            for name in _additions(family_of(module)):
                if name in vars(module) or name in module._buffers:
                    delattr(module, name)
        for name, value in vars(donor).items():
            vars(module).setdefault(name, value)
        for name, buffer in donor._buffers.items():
            if getattr(module, name, None) is None:
                persistent = name not in donor._non_persistent_buffers_set
                module.register_buffer(name, buffer, persistent)
        change_class(module, self.cls)
        for name in self.options:
            setattr(module, name, getattr(donor, name))
        if isinstance(module, RunningStatsBatchNorm):
            module.adopt_statistics()

    def _starts_anew(self) -> bool:
        """Whether the layer's state beyond torch's is another family's, or of another size."""
        family = family_of(self.donor)
        if family_of(self.module) != family:
            return True
        own, new = self.module._buffers, self.donor._buffers
        sizes = [(own.get(name), new.get(name)) for name in _additions(family)]
        return any(a is not None and b is not None and a.shape != b.shape for a, b in sizes)


def plan(name: str, module: _BatchNorm, to: str, options: dict[str, Any]) -> Change:
    """Check that a layer can become one of the family ``to``, and plan its change.

    Raises:
        BnstatsError: it cannot; the message names the layer.
    """
    where = f"layer '{name}' ({type(module).__name__})"
    cls = target_class(where, module, to)
    mean = module.running_mean
    if to != PLAIN:
        check_writable(name, module, [mean])
    arguments: dict[str, Any] = {
        "eps": module.eps,
        # The layer keeps its own parameters: the donor needs none.
        "affine": False,
        "track_running_stats": mean is not None,
        "device": None if mean is None else mean.device,
        "dtype": None if mean is None else mean.dtype,
    }
    known = known_class(cls)
    assert known is not None
    if known is nn.SyncBatchNorm or to != PLAIN:
        options = {**_processes(module, to), **options}
    momentum = options.get("momentum", module.momentum)
    try:
        if to != PLAIN:
            check_momentum(known.__name__, momentum)
        # The constructor would warn of an unusual value, for every layer again.
        donor = known(module.num_features, **{**arguments, **options, "momentum": None})
        donor.momentum = momentum  # type: ignore[assignment]
    except BnstatsError as error:
        raise type(error)(f"{where}: {error}") from None
    return Change(module, cls, donor, own_options(to) | options.keys())


def _processes(module: _BatchNorm, to: str) -> dict[str, Any]:
    """Return the option for the processes that a layer synchronizes over already."""
    sync = getattr(module, "sync", None)
    if isinstance(module, nn.SyncBatchNorm):
        sync = module.process_group or True
    if to == PLAIN:
        return {"process_group": sync if is_group(sync) else None}
    return {"sync": sync}


def check_options(to: str, options: dict[str, Any]) -> None:
    """Refuse options that the family ``to`` does not have, or whose values it refuses."""
    expected = [*sorted(own_options(to)), "momentum", *(["center"] if to == CENTERED else [])]
    for name in options:
        if name not in expected:
            raise InvalidTypeError(
                f"{name}: {to!r} has no such option, the nearest is {nearest(name, expected)!r}; "
                f"it has {', '.join(expected)}"
            )
    FAMILIES[to][0](1, **options)


@cache
def own_options(family: str) -> frozenset[str]:
    """Return the keyword-only arguments of a family's class that torch's classes lack."""
    own, plain = FAMILIES[family][0], nn.BatchNorm1d
    # torch before 2.13 lacks ``bias``; the layer keeps its own parameters all the same.
    return frozenset(_keyword_only(own) - _keyword_only(plain) - {"bias"})


def _keyword_only(cls: type) -> set[str]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@cache
def _additions(family: str | None) -> frozenset[str]:
    """Return the attributes and buffers that a family adds to torch's layers."""
    if family is None or family == PLAIN:
        return frozenset({"process_group"})  # SyncBatchNorm's, which sync stands for elsewhere
    layer, plain = FAMILIES[family][0](1), nn.BatchNorm1d(1)
    own = {*vars(layer), *layer._buffers} - {*vars(plain), *plain._buffers}
    return frozenset(own)
