"""Layers in the hands of torch.fx, which traces a model, and of TorchScript, which compiles it."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from bnstats.errors import InvalidTypeError


def call_in_graph(layer: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any | None:
    """Record the call of a layer as torch.fx records its own layers': as one node.

    A tracer asks whether a module is from torch.nn, and looks into all others; values decide
    what a layer does, and a graph has none.

    Args:
        layer: whose forward was called.
        input: what it was given, a ``torch.fx.Proxy``.
        args: what else it was given.
        kwargs: what else it was given, by name.

    Returns:
        The output, or None where the layer itself is what is traced, and not a part of it.
    """
    path = input.tracer.path_of_module(layer)
    return input.tracer.create_proxy("call_module", path, (input, *args), kwargs) if path else None


class Unscriptable:
    """A layer that TorchScript does not compile."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise InvalidTypeError(
            f"torch.jit.script: {type(self).__name__}: expected torch's own layers, got one of "
            "bnstats; call bnstats.revert_batchnorm(model) first, which evaluates the same, or "
            "use torch.jit.trace"
        )
