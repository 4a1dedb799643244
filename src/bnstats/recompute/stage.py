"""Running a model so that chosen BatchNorm layers normalize with what a visitor says.

Everything is in evaluation mode. A forward pre-hook tells the visitor of a layer's input; the
visitor takes its moments and puts what the layer shall normalize with in place of its running
statistics. One mechanism for every method and every BatchNorm: subclasses with a
forward of their own, SyncBatchNorm on CPU, batches of one value per channel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.moments import Moments
from bnstats.reduction import mean_and_m2
from bnstats.traversal import num_features


class Seen(NamedTuple):
    """The moments of what a layer saw: a number of values, and tensors of shape (C,)."""

    num_values: int
    mean: Tensor
    m2: Tensor

    def merge(self, other: Seen) -> Seen:
        """Return the moments of the values of both."""
        mine, theirs = (Moments(torch.tensor(x.num_values), x.mean, x.m2) for x in (self, other))
        merged = mine + theirs
        return Seen(self.num_values + other.num_values, merged.mean, merged.m2)


@dataclass(frozen=True, eq=False)
class StagedLayer:
    """A BatchNorm layer on the stage.

    Attributes:
        name: its name in the unwrapped model.
        module: the layer.
        about_zero: it keeps its statistics about zero, and says so by a method
            ``statistics_about_zero()``, which any layer may have.
    """

    name: str
    module: _BatchNorm
    about_zero: bool

    @classmethod
    def of(cls, name: str, module: _BatchNorm) -> StagedLayer:
        """Ask the module what it says of itself."""
        says = getattr(module, "statistics_about_zero", None)
        return cls(name, module, bool(says is not None and says()))

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return num_features(self.module)

    def observe(self, input: Tensor) -> Seen:
        """Return the moments of an input, about what the layer takes them about."""
        mean, m2 = mean_and_m2(input.detach())
        count = input.numel() // self.num_features
        if self.about_zero:
            return Seen(count, torch.zeros_like(mean), m2.addcmul_(mean, mean, value=count))
        return Seen(count, mean, m2)

    def normalize_with(self, mean: Tensor, var: Tensor) -> None:
        """Let the layer normalize with these until told otherwise."""
        self.module.running_mean.copy_(mean)  # type: ignore[union-attr]
        self.module.running_var.copy_(var)  # type: ignore[union-attr]


Visitor = Callable[[StagedLayer, Tensor], None]
"""Is told of every call of a staged layer, and of its input, before the layer runs."""


@contextmanager
def staged(model: nn.Module, layers: Iterable[StagedLayer], visit: Visitor) -> Iterator[None]:
    """Put a model on the stage; whatever happens, it leaves as it came.

    The layers' own buffers are not written to: others stand in for them meanwhile.
    """
    layers = list(layers)
    training = [(module, module.training) for module in model.modules()]
    buffers = [(s.module, s.module.running_mean, s.module.running_var) for s in layers]
    hooks = []
    try:
        for module, _ in training:
            module.training = False
        for layer, (module, mean, var) in zip(layers, buffers, strict=True):
            module.running_mean = torch.zeros_like(mean)  # type: ignore[arg-type]
            module.running_var = torch.ones_like(var)  # type: ignore[arg-type]
            hook = module.register_forward_pre_hook(_observer(layer, visit), with_kwargs=True)
            hooks.append(hook)
        with torch.no_grad(), _eager():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mean, var in buffers:
            module.running_mean, module.running_var = mean, var
        for module, was_training in training:
            module.training = was_training


def _observer(layer: StagedLayer, visit: Visitor) -> Callable[..., None]:
    def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        # What the layer cannot take, it refuses itself, in its own words.
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == layer.num_features:
            visit(layer, x)

    return observe


def _eager() -> AbstractContextManager[Any]:
    """Let compiled parts run as written: compiled code need not notice new hooks."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
