"""What the callbacks of all trainers share: how often, of which models, from which data."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bnstats.errors import InvalidTypeError, nearest
from bnstats.private import apart_from_other_readers
from bnstats.recomputation import Recalibration, recompute_population_stats
from bnstats.recomputation.methods import default_method, method_of
from bnstats.recomputation.options import Options, check_positive_int
from bnstats.traversal import Include, is_average, modes_kept

DEFAULTS = {"max_batches": 200, "tolerance": 0.01}
"""At most as many batches as fvcore and detectron2 take, and fewer where fewer are enough. A
prior takes no tolerance."""

Step: TypeAlias = Callable[[Any], Any]
"""What a trainer does to a batch."""


class Recalibrator:
    """The base of a trainer's callback, beside that of its framework.

    What it cannot do is an error here, where an epoch of training is not yet lost.

    Args:
        every_n_epochs: how often; None for at the end of training alone.
        loader: what to read in place of the trainer's own.
        averaged_models: averages of the model's weights, recalibrated with it.
        options: of :func:`bnstats.recompute_population_stats`.

    Attributes:
        result: of the last recalibration of the model itself; None before the first.

    Raises:
        InvalidTypeError: an unknown option, or a value of another type.
        InvalidValueError: a value that recompute_population_stats does not take.
    """

    def __init__(
        self,
        every_n_epochs: int | None = 1,
        *,
        loader: Iterable[Any] | None = None,
        averaged_models: Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        known = [*inspect.signature(recompute_population_stats).parameters][2:]
        for name in options:
            if name not in known:
                raise InvalidTypeError(
                    f"RecalibrateBatchNorm has no option {name!r}; the nearest is "
                    f"{nearest(name, known)!r}"
                )
        check_positive_int("every_n_epochs", every_n_epochs)
        prior, method = options.get("prior"), options.get("method")
        # The weight of a prior follows from the errors that a tolerance would cut short.
        defaults = DEFAULTS if prior is None else {**DEFAULTS, "tolerance": None}
        options = {**defaults, **options}
        method_of(
            Options(**{**options, "method": default_method(prior) if method is None else method})
        )
        self.every_n_epochs = every_n_epochs
        self.result: Recalibration | None = None
        self._loader = loader
        self._averaged_models = tuple(averaged_models)
        self._options = options
        self._state: Hashable = None
        self._modes: list[tuple[nn.Module, bool]] = []

    def _begin(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        without: Callable[..., Any] = nn.Module.forward,
    ) -> None:
        """Forget an earlier training, and refuse what cannot be called or read.

        Args:
            model: what will be trained.
            loader: the trainer's.
            without: the forward of a class that defines none.
        """
        self._state, self._modes = None, []
        if self._options.get("forward") is None and type(model).forward is without:
            raise InvalidTypeError(
                f"RecalibrateBatchNorm calls the module on a batch, and {type(model).__name__} "
                "has no forward: pass forward=lambda module, batch: module.net(batch[0]), for one"
            )
        self._batches(loader)

    def _batches(
        self, of_trainer: Any, steps: Iterable[Step] = (), limit: float = math.inf
    ) -> Batches:
        """Return the batches of the loader that was passed, or else of the trainer's only one.

        Args:
            of_trainer: the trainer's loader.
            steps: what the trainer does to each batch before the model takes it.
            limit: how many batches of its loader the trainer uses; infinity means all.
        """
        if self._loader is not None:
            return Batches(self._loader, steps)
        if isinstance(of_trainer, (Mapping, list, tuple)):
            raise InvalidTypeError(
                f"RecalibrateBatchNorm: the trainer has a {type(of_trainer).__name__} of "
                f"{len(of_trainer)} training loaders: pass loader=, and forward= where the model "
                "does not take its batches"
            )
        return Batches(of_trainer, steps, limit)

    def _before(self, later: Iterable[Any], callbacks: Iterable[Any]) -> list[Any]:
        """Return the callbacks in their order, but this one behind all except the later ones."""
        later = [*later]
        return sorted(callbacks, key=lambda x: 2 if x in later else int(x is self))

    def _remember_modes(self, model: nn.Module) -> None:
        """Note which modules train: one in evaluation mode during training is frozen."""
        self._modes = [(module, module.training) for module in model.modules()]

    @contextmanager
    def _modes_of_training(self, model: nn.Module) -> Iterator[None]:
        """Put the modules back to the modes that they train in, while a trainer validates."""
        with modes_kept(model):
            for module, mode in self._modes:
                module.training = mode
            yield

    def _is_due(self, epochs: int, *, ends: bool) -> bool:
        """Whether to recalibrate after this many epochs; always where the training ends."""
        return ends or (self.every_n_epochs is not None and epochs % self.every_n_epochs == 0)

    def _recalibrate(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        state: Hashable,
        callbacks: Iterable[Any] = (),
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Recalibrate the model and its averages, unless that was done in this state.

        Random numbers are drawn as if nothing had been read: the training goes on as without.

        Args:
            model: what is being trained.
            loader: the trainer's.
            state: identifies the state of the weights.
            callbacks: the trainer's; averages that they keep are recalibrated too.
            context: makes what a forward runs under, autocast for one.
        """
        kept = (value for callback in callbacks for value in vars(callback).values())
        averages = dict.fromkeys((*self._averaged_models, *filter(is_average, kept)))
        # AveragedModel counts what went into it; it may change while the weights do not.
        counts = [int(x.n_averaged) for x in averages if isinstance(x, AveragedModel)]
        if self._state == (state := (state, *counts)):
            return
        options = dict(self._options)
        with _random_numbers_kept(loader), context():
            self.result = recompute_population_stats(model, loader, **options)
            options["include"] = _leaving(self.result.after.frozen, options.get("include"))
            for average in averages:
                recompute_population_stats(average, loader, **options)
        self._state = state


class Batches:
    """A loader's batches, each as a trainer hands it to its model.

    Args:
        loader: the trainer's.
        steps: what the trainer does to a batch, one after the other.
        limit: how many batches of it the trainer uses, infinity for all.
    """

    def __init__(
        self, loader: Iterable[Any], steps: Iterable[Step] = (), limit: float = math.inf
    ) -> None:
        self.loader, self._steps, self._limit = loader, (*steps,), limit

    def __iter__(self) -> Iterator[Any]:
        limit = None if math.isinf(self._limit) else int(self._limit)
        for batch in islice(apart_from_other_readers(self.loader), limit):
            yield reduce(lambda value, step: step(value), self._steps, batch)

    def __len__(self) -> int:
        return int(min(len(self.loader), self._limit))  # type: ignore[arg-type]


def _leaving(frozen: tuple[str, ...], include: Include | None) -> Include:
    """Return a choice without these layers: an average does not know what trains and what not."""

    def chosen(name: str, module: nn.Module) -> bool:
        if name in frozen:
            return False
        return isinstance(module, _BatchNorm) if include is None else include(name, module)

    return chosen


@contextmanager
def _random_numbers_kept(loader: Any) -> Iterator[None]:
    """Put the generators that loaders and augmentations draw from back to where they were."""
    loader = loader.loader if isinstance(loader, Batches) else loader
    owners = (loader, getattr(loader, "sampler", None))
    own = [x for x in (getattr(owner, "generator", None) for owner in owners) if x is not None]
    states = [generator.get_state() for generator in own]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for generator, before in zip(own, states, strict=True):
            generator.set_state(before)
