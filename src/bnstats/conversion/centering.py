"""The layers before a moving-average batch norm: which to center, and the way back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnstats.arguments import check_writable
from bnstats.conversion.families import CENTERED, FAMILIES, PLAIN, change_class, target_class
from bnstats.errors import InvalidValueError
from bnstats.layers.centered import CenteredForward, centered
from bnstats.traversal import Include, check_layer, named_layers, unwrap

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CENTERED = (
    *(cls for cls in FAMILIES[CENTERED] if issubclass(cls, (*_CONVOLUTIONS, nn.Linear))),
    CenteredForward,
)


@dataclass(frozen=True)
class Recentering:
    """One layer's change to a centered one, or back.

    Attributes:
        module: the layer.
        cls: what its class becomes.
        fold: center the weight itself, for a class that does not.
    """

    module: nn.Module
    cls: type[nn.Module]
    fold: bool

    @torch.no_grad()
    def apply(self) -> None:
        """Change the layer."""
        if self.fold:
            weight = self.module.weight
            assert isinstance(weight, nn.Parameter)
            weight.copy_(centered(weight))
        change_class(self.module, self.cls)


def plan_centering(
    model: nn.Module, include: Include | None, batchnorms: Collection[nn.Module]
) -> list[Recentering]:
    """Find the convolutions, and the linear layers that directly feed one of the batch norms."""
    feeding = _linears_before(model, batchnorms)
    changes = []
    for name, module in named_layers(model):
        if not isinstance(module, _CONVOLUTIONS) and module not in feeding:
            continue
        if include is None or include(name, module):
            check_layer(name, module)
            if isinstance(module.weight, Tensor) and module.weight[0].numel() == 1:
                continue  # centered, a single weight is 0
            cls = target_class(f"layer '{name}' ({type(module).__name__})", module, CENTERED)
            changes.append(Recentering(module, cls, fold=False))
    return changes


def plan_folding(model: nn.Module) -> list[Recentering]:
    """Find the centered layers, to put their centering into the weights.

    Raises:
        InvalidValueError: a weight that is no Parameter of the layer's alone.
    """
    layers: dict[nn.Module, str] = {
        module: name for name, module in named_layers(model) if isinstance(module, _CENTERED)
    }
    _check_untied(model, layers)
    changes = []
    for module, name in layers.items():
        where = f"layer '{name}' ({type(module).__name__})"
        weight = module._parameters.get("weight")
        if weight is None:
            raise InvalidValueError(
                f"{where}: expected a weight that is a Parameter to fold the centering into, got "
                "one that is computed: remove its parametrization, weight norm or pruning first"
            )
        check_writable(name, module, [weight])
        changes.append(Recentering(module, target_class(where, module, PLAIN), fold=True))
    return changes


def _check_untied(model: nn.Module, layers: dict[nn.Module, str]) -> None:
    """Refuse a weight that a layer that is not centered uses too."""
    owners = {id(module._parameters.get("weight")): module for module in layers}
    for name, module in named_layers(model):
        for parameter in module._parameters.values():
            owner = None if parameter is None else owners.get(id(parameter))
            if owner is not None and module not in layers:
                raise InvalidValueError(
                    f"layer '{layers[owner]}' ({type(owner).__name__}): expected a weight of its "
                    f"own to fold the centering into, got one that is also '{name}''s, which is "
                    "not centered: give one of them a copy"
                )


def _linears_before(model: nn.Module, batchnorms: Collection[nn.Module]) -> set[nn.Module]:
    """Return the linear layers whose output is the input of one of the batch norms."""
    # Over (N, C, H, W) and more, axis 1 is not a linear layer's output axis.
    fed = {m for m in batchnorms if not isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d))}
    widths = {module.num_features for module in fed}
    linears = {m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in widths}
    if not linears:
        return set()
    pairs = _traced_pairs(unwrap(model), linears | fed)
    return {first for first, second in pairs if first in linears and second in fed}


def _traced_pairs(
    model: nn.Module, leaves: Collection[nn.Module]
) -> list[tuple[nn.Module, nn.Module]]:
    """Return which module's output goes into which, by torch.fx, else by nn.Sequential."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return model.get_submodule(qualified_name) in leaves or super().is_leaf_module(
                m, qualified_name
            )

        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
            # Without the module's hooks: a copy shares what they write to.
            return super().call_module(m, m.forward, args, kwargs)

    try:
        # The model's own code runs on symbols: it may warn, draw random numbers, and store them.
        # So it runs on a copy, which shares only the parameters.
        shared = {id(parameter): parameter for parameter in model.parameters()}
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            graph = Tracer().trace(copy.deepcopy(model, shared))
    except Exception:  # the model's code may raise anything on a symbol
        return list(_sequential_pairs(model))
    return [
        (model.get_submodule(source.target), model.get_submodule(node.target))
        for node in graph.find_nodes(op="call_module", sort=False)
        for source in node.all_input_nodes
        if source.op == "call_module"
    ]


def _sequential_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        if _is_sequential(module):
            yield from pairwise(_flat(module))


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if _is_sequential(module):
        for child in module.children():
            yield from _flat(child)
    else:
        yield module


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
