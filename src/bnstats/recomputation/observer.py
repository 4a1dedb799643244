"""Observing the inputs of BatchNorm layers, and choosing what the layers normalize with.

The model runs in evaluation mode. A forward pre-hook passes each input to a callback, which takes
the moments and writes what the layer is to normalize with into its running statistics: one
mechanism for every method and every BatchNorm, subclasses with a forward of their own,
SyncBatchNorm on CPU and batches of one value per channel included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.errors import InvalidValueError
from bnstats.hooks import Hook, given_input
from bnstats.masked_reduction import masked_mean_and_m2
from bnstats.masks import Mask, given_mask
from bnstats.moments import Moments, merge_all
from bnstats.recomputation.eager import eager
from bnstats.recomputation.exclusive import check_not_of_loader
from bnstats.recomputation.samples import masked_moments_of_samples, moments_of_samples
from bnstats.recomputation.spread import center_near, merged_states, state_of_units
from bnstats.reduction import Expected, mean_and_m2, wide_dtype
from bnstats.traversal import is_about_zero, modes_kept, num_features


class LayerMoments(NamedTuple):
    """The moments of a layer's input: a number of values, and tensors of shape (C,).

    ``samples`` is the state of the spread between its samples, of shape (8, C), where it is taken.
    """

    num_values: int
    mean: Tensor
    m2: Tensor
    samples: Tensor | None = None

    def merge(self, other: LayerMoments) -> LayerMoments:
        """Return the moments of the values of both."""
        mine, theirs = (
            Moments(torch.tensor(x.num_values, device="cpu"), x.mean, x.m2) for x in (self, other)
        )
        merged = mine + theirs
        samples = None
        if self.samples is not None and other.samples is not None:
            samples = merged_states([self.samples, other.samples])
        return LayerMoments(self.num_values + other.num_values, merged.mean, merged.m2, samples)

    def to(self, device: torch.device) -> LayerMoments:
        """Return the same on a device."""
        samples = None if self.samples is None else self.samples.to(device)
        return LayerMoments(self.num_values, self.mean.to(device), self.m2.to(device), samples)

    def is_finite(self) -> bool:
        """Return whether all values are finite; the host waits for the device."""
        return bool((self.mean + self.m2).isfinite().all())


@dataclass(frozen=True, eq=False)
class ObservedLayer:
    """A BatchNorm layer whose input is observed.

    Attributes:
        name: its name in the unwrapped model.
        module: the layer.
        about_zero: whether its statistics are about zero: what its method
            ``statistics_about_zero()``, which any layer may have, returns.
        reference: the center of the spread between samples, of shape (C,), for batches that are
            not far from it; None where no spread is measured.
        stand_ins: running mean and variance that take the place of the layer's own while it is
            measured; empty where nothing takes it.
        unread: the last shape of an input that has no axis of channels where it is expected.
    """

    name: str
    module: _BatchNorm
    about_zero: bool
    reference: Tensor | None = None
    stand_ins: list[Tensor] = field(default_factory=list)
    unread: list[torch.Size] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, module: _BatchNorm, *, samples: bool = False) -> ObservedLayer:
        """Describe a module, by its own methods where it has them."""
        layer = cls(name, module, is_about_zero(module))
        if not samples:
            return layer
        mean = layer.running_mean.detach().to(wide_dtype(layer.running_mean.device))
        reference = torch.zeros_like(mean) if layer.about_zero else mean.nan_to_num(0, 0, 0)
        return replace(layer, reference=reference)

    @property
    def running_mean(self) -> Tensor:
        """What the layer normalizes with."""
        mean: Tensor = self.module.running_mean  # type: ignore[assignment]
        return mean

    @property
    def running_var(self) -> Tensor:
        """What the layer normalizes with."""
        var: Tensor = self.module.running_var  # type: ignore[assignment]
        return var

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return num_features(self.module)

    def moments_of(self, input: Tensor, expected: Expected | None = None) -> LayerMoments:
        """Return the moments of an input, about zero where the layer keeps its statistics so.

        Under a mask, they are those of the valid positions. What is expected makes it faster.
        """
        mask = _MASK.get()
        valid = None
        if mask is not None:
            valid = mask._replace(where=f"mask: layer '{self.name}'").fit(input)
        if self.reference is not None:
            return self._moments_with_samples(input.detach(), valid, self.reference)
        if valid is None:
            mean, m2 = mean_and_m2(input.detach(), expected)
            count = input.numel() // mean.numel()
        else:
            valid_values, mean, m2 = masked_mean_and_m2(input.detach(), valid)
            count = int(valid_values)
        if self.about_zero:
            return LayerMoments(count, torch.zeros_like(mean), m2.addcmul_(mean, mean, value=count))
        return LayerMoments(count, mean, m2)

    def _moments_with_samples(
        self, input: Tensor, valid: Tensor | None, reference: Tensor
    ) -> LayerMoments:
        """Return the moments of an input from those of its samples."""
        counts: int | Tensor = math.prod(input.shape[2:])
        if valid is None:
            means, m2s = moments_of_samples(input)
        else:
            counts, means, m2s = masked_moments_of_samples(input, valid)
        if self.about_zero:
            m2s = m2s + counts * means.square()
            means = torch.zeros_like(means)
        of_each = counts.squeeze(1) if isinstance(counts, Tensor) else counts
        count, mean, m2 = merge_all(of_each, means, m2s)
        reference = center_near(mean, m2 / count, reference.to(mean.device))
        samples = state_of_units(means, m2s, counts, reference)
        return LayerMoments(int(count), mean, m2, samples)

    def normalize_with_batch(self, moments: LayerMoments) -> None:
        """Let the layer normalize with the biased variance of these values, as in training."""
        mean, var = self._writable_stand_ins()
        mean.copy_(moments.mean)
        if moments.m2.device == var.device:
            torch.div(moments.m2, max(moments.num_values, 1), out=var)
        else:
            var.copy_(moments.m2 / max(moments.num_values, 1))

    def normalize_with(self, mean: Tensor, var: Tensor) -> None:
        """Let the layer normalize with these until the next call."""
        for stand_in, values in zip(self._writable_stand_ins(), (mean, var), strict=True):
            stand_in.copy_(values)

    def stand_in(self, mean: Tensor, var: Tensor) -> None:
        """Let these tensors take the place of the layer's own running statistics."""
        with _STAND_INS:
            self.stand_ins[:] = self.module.running_mean, self.module.running_var = mean, var

    def _writable_stand_ins(self) -> list[Tensor]:
        if torch.is_grad_enabled():
            # The model takes gradients itself: what its graph has saved must not change.
            self.stand_in(*map(torch.empty_like, self.stand_ins))
        return self.stand_ins

    def check_stand_ins(self) -> None:
        """Refuse a forward that runs the layer with other statistics, which are the caller's."""
        with _STAND_INS:
            now = self.running_mean, self.running_var
            others = any(x is not own for x, own in zip(now, self.stand_ins, strict=True))
        if others:
            raise InvalidValueError(
                f"layer '{self.name}' ({type(self.module).__name__}): expected a forward that runs "
                "the layer with its own running_mean and running_var, and got others in their "
                "place: pass the parameters, without the buffers, to torch.func.functional_call, "
                "or leave the layer out by include"
            )


# Held while stand-ins change: a forward may run a layer in several threads, which is refused later.
_STAND_INS = Lock()

OnInput = Callable[[ObservedLayer, Tensor], None]
"""Called with a layer and its input before the layer runs."""

# Of this thread's forward: several may run at the same time.
_MASK: ContextVar[Mask | None] = ContextVar("mask", default=None)


@contextmanager
def use_mask(mask: Mask | None) -> Iterator[None]:
    """Let the valid positions alone count in the inputs that this thread's forwards observe."""
    token = _MASK.set(mask)
    try:
        yield
    finally:
        _MASK.reset(token)


@contextmanager
def observed(
    model: nn.Module, layers: Iterable[ObservedLayer], on_input: OnInput
) -> Iterator[None]:
    """Observe the layers' inputs; on leaving, the model is as it was.

    The layers' own buffers are never written to: copies take their place meanwhile.
    """
    layers = list(layers)
    with modes_kept(model):
        buffers = [(x, x.running_mean, x.running_var) for x in layers]

        def checked(layer: ObservedLayer, input: Tensor) -> None:
            layer.check_stand_ins()
            check_not_of_loader(layer.name)
            on_input(layer, input)

        try:
            for module in model.modules():
                evaluate(module)
            for layer in layers:
                # A layer that is reached without its hooks is then what it is in evaluation.
                layer.stand_in(layer.running_mean.clone(), layer.running_var.clone())
            with (
                others_in_evaluation(model, layers),
                hooked(layers, checked, evaluating=True),
                torch.no_grad(),
                eager(),
            ):
                yield
        finally:
            for layer, mean, var in buffers:
                layer.module.running_mean, layer.module.running_var = mean, var
                layer.stand_ins.clear()


def evaluate(module: nn.Module, *_: object) -> None:
    """Put one module into evaluation mode."""
    if module.training:  # to set an attribute of a Module costs microseconds
        module.training = False


@contextmanager
def others_in_evaluation(model: nn.Module, layers: Iterable[ObservedLayer]) -> Iterator[None]:
    """Let other BatchNorm layers evaluate, also where a forward calls ``train()``."""
    chosen = {layer.module for layer in layers}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module not in chosen:
                stack.callback(module.register_forward_pre_hook(Hook(evaluate)).remove)
        yield


@contextmanager
def hooked(
    layers: Iterable[ObservedLayer], on_input: OnInput, *, evaluating: bool = False
) -> Iterator[None]:
    """Call back with each input of the layers; they may be kept in evaluation mode."""
    with ExitStack() as stack:
        for layer in layers:
            hook = Hook(_pre_hook(layer, on_input, evaluating))
            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _pre_hook(layer: ObservedLayer, on_input: OnInput, evaluating: bool) -> Callable[..., None]:
    channels = layer.num_features

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if evaluating:
            evaluate(module)
        x = given_input(args, kwargs)
        # The layer itself raises the error for an input that it cannot take.
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == channels:
            given = given_mask(module, args, kwargs)
            with nullcontext() if given is None else use_mask(given):
                on_input(layer, x)
        elif isinstance(x, Tensor):
            layer.unread[:] = [x.shape]

    return hook
