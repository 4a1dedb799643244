"""Torch's layers with weights of mean zero: what lets a batch norm do without the batch's mean.

In every forward the mean of the weight over everything but the output axis is taken out
(weight centralization). Inputs that share one mean then give outputs of mean 0, up to the bias:
:class:`~bnstats.MovingAverageBatchNorm` has no mean of its own, and wants such a layer before
it. Arguments, parameters, state-dict keys and initialization are torch's; the parameter itself
is left as it is. A weight of one number per output is its own mean: nothing is left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnstats.layers.symbolic import Unscriptable, call_in_graph


def centered(weight: Tensor) -> Tensor:
    """Return a weight, of shape (out, ...), minus its mean over all axes but the first.

    Example:
        >>> import torch
        >>> from bnstats.layers.centered import centered
        >>> centered(torch.tensor([[1.0, 3.0], [4.0, 4.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    mean = weight.mean(dim=tuple(range(1, weight.dim())), keepdim=True)
    return weight - mean


class CenteredLinear(Unscriptable, nn.Linear):
    """``nn.Linear`` with centered weights: ``x (w - mean(w))^T + bias``, one mean per output.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's.
        bias: learn a bias per output.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> import torch
        >>> from bnstats import CenteredLinear
        >>> layer = CenteredLinear(4, 3, bias=False)
        >>> bool(layer(torch.full((2, 4), 7.0)).abs().max() < 1e-5)
        True

    References:
        Yan et al. (2020), arXiv:2001.06838, section 4.3.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centered weight."""
        if isinstance(input, fx.Proxy) and (output := call_in_graph(self, input)) is not None:
            return output
        return F.linear(input, centered(self.weight), self.bias)


class _CenteredConv(Unscriptable, nn.Module):
    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centered weight."""
        if isinstance(input, fx.Proxy) and (output := call_in_graph(self, input)) is not None:
            return output
        return self._conv_forward(input, centered(self.weight), self.bias)


class CenteredConv1d(_CenteredConv, nn.Conv1d):
    """``nn.Conv1d`` with centered weights; see :class:`CenteredConv2d`."""


class CenteredConv2d(_CenteredConv, nn.Conv2d):
    """``nn.Conv2d`` with centered weights: one mean per output channel, over all other axes.

    Arguments are those of ``nn.Conv2d``, groups and padding modes included. Zeros of the
    padding have a mean of their own: only away from the edges does a constant input give 0.

    Example:
        >>> import torch
        >>> from bnstats import CenteredConv2d
        >>> layer = CenteredConv2d(4, 3, kernel_size=3, bias=False)
        >>> bool(layer(torch.full((2, 4, 5, 5), 7.0)).abs().max() < 1e-5)
        True

    References:
        Yan et al. (2020), arXiv:2001.06838, section 4.3.
    """


class CenteredConv3d(_CenteredConv, nn.Conv3d):
    """``nn.Conv3d`` with centered weights; see :class:`CenteredConv2d`."""


class CenteredForward(Unscriptable, nn.Module):
    """A layer whose class has a forward of its own, which reads a centered weight there.

    Outside of the forward ``weight`` is the parameter, as with the layers above, so that
    optimizers, initializations and state dicts see the plain layer. In the forward a stand-in
    takes the layer's place: an object with the same attributes, the very same ``__dict__``,
    whose class has a property ``weight``. Nothing is put into the layer and taken out again, so
    that forwards in several threads do not see each other.
    """

    plain_class: ClassVar[type[nn.Module]]
    _stand_in_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Also for the class that torch derives when the layer is parametrized.
        if "_stand_in_class" not in vars(cls):
            body = {"weight": property(_read_centered), "_stand_in_class": None}
            cls._stand_in_class = type(cls.__name__, (cls,), body)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the layer's class with the centered weight."""
        if args and isinstance(args[0], fx.Proxy):
            output = call_in_graph(self, *args, **kwargs)
            if output is not None:
                return output
        stand_in: Any = object.__new__(self._stand_in_class)
        stand_in.__dict__ = self.__dict__
        return super(CenteredForward, stand_in).forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle would look for the derived class by its name.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_centered, (self.plain_class,), *reduced[2:])


def centered_subclass(cls: type[nn.Module]) -> type[CenteredForward]:
    """Derive from a layer's class the one whose forward reads the weight centered."""
    known = _SUBCLASSES.get(cls)
    if known is None:
        body = {"plain_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        known = _SUBCLASSES[cls] = type(f"Centered{cls.__name__}", (CenteredForward, cls), body)
    return known


_SUBCLASSES: dict[type[nn.Module], type[CenteredForward]] = {}


def _new_centered(cls: type[nn.Module]) -> nn.Module:
    subclass = centered_subclass(cls)
    return subclass.__new__(subclass)


def _read_centered(stand_in: nn.Module) -> Tensor:
    """Return the weight, centered: a parameter, or what a parametrization computes."""
    computed = getattr(type(stand_in).__base__, "weight", None)
    if isinstance(computed, property):
        return centered(computed.__get__(stand_in))
    weight = stand_in._parameters.get("weight")
    # Pruning and the old weight norm compute a plain attribute before the forward.
    return centered(vars(stand_in)["weight"] if weight is None else weight)
