"""Operators of our own: what torch.compile, transforms and dispatch modes take as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bnstats.private import (
    constant,
    differentiated,
    functionalized,
    in_backward_pass,
    intercepted,
    outside_modes,
    recorded,
)

_NUMBERS = itertools.count()
_LIVING: WeakValueDictionary[int, Referable] = WeakValueDictionary()

_LIBRARY = torch.library.Library("bnstats", "IMPL")  # which unregisters when it goes
_WRITING: set[Callable[..., Any]] = set()
"""Operators that write to their arguments."""

_TAGS = [torch.Tag.pt2_compliant_tag]
_NOT_REPLAYED = (
    [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
)  # not in torch 2.6
"""Splits what ``torch.compile(mode="reduce-overhead")`` makes a CUDA graph of. A replay is the same
kernels again: it does not ask whether it is run in a backward, and finds no Python object anew."""


def register(
    name: str,
    function: Callable[..., Any],
    shapes: Callable[..., Any],
    *mutates: str,
    replayed: bool = False,
    backward: type[torch.autograd.Function] | None = None,
) -> Callable[..., Any]:
    """Make a function the operator ``torch.ops.bnstats.name``, and return that.

    Not by torch.library.custom_op, whose wrapper costs 40 microseconds in a call.

    Args:
        name: of the operator.
        function: what it does, with annotations; returns a tensor or a tuple of them.
        shapes: returns empty tensors like those that the function returns.
        mutates: names of the arguments that the function writes to.
        replayed: a CUDA graph may hold it, for it is a matter of its tensors alone.
        backward: whose setup_context and backward are the operator's; None for no gradient.
    """
    if not hasattr(torch.ops.bnstats, name):  # else the package is imported once more
        full_name = f"bnstats::{name}"
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        tags = _TAGS if replayed else [*_TAGS, *_NOT_REPLAYED]
        torch.library.define(full_name, schema, tags=tags)
        torch.library.impl(full_name, "default", function)
        torch.library.register_fake(full_name, shapes)
        torch.library.register_vmap(full_name, _one_by_one(name))
        defined = getattr(torch.ops.bnstats, name)
        kernel = constant(defined) if backward is None else differentiated(defined, backward)
        _LIBRARY.impl(name, kernel, "Autograd")
    operator: Callable[..., Any] = getattr(torch.ops.bnstats, name)
    if mutates:
        _WRITING.add(operator)
    return operator


def opaque(operator: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator where something sees each operator of torch's, else its function.

    An export keeps torch's operators, so that it runs where bnstats is not. So does functionalize,
    which takes no operator of others that writes to its arguments.
    """
    if torch.compiler.is_compiling():
        return function if is_exporting() else operator
    if not intercepted():
        return function
    return function if operator in _WRITING and functionalized() else operator


class Referable:
    """An object that an operator finds by a number, for it takes no objects."""

    def __init__(self) -> None:
        self._number = next(_NUMBERS)
        with outside_modes():
            # A tensor's value is no part of compiled code: each layer has another number, and
            # would be compiled by itself.
            self._number_tensor = torch.tensor(self._number, device="cpu")
        _LIVING[self._number] = self

    @property
    def reference(self) -> Tensor | int:
        """What stands for this object in a call of :func:`opaque`'s result."""
        if torch.compiler.is_compiling():
            return self._number if is_exporting() else self._number_tensor
        return torch.tensor(self._number, device="cpu") if intercepted() else self._number


def referred(reference: Tensor | int) -> Any:
    """Return the object, or None if it is gone."""
    return _LIVING.get(int(reference))


def is_exporting() -> bool:
    """Whether torch.export traces this."""
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())  # not in torch 2.6


def _one_by_one(name: str) -> Callable[..., Any]:
    """Return the rule for torch.vmap: the members of a batch in a loop, which write in place."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def member(index: int) -> Any:
            operator = getattr(torch.ops.bnstats, name)  # which another vmap may be around
            return operator(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )

        results = [member(index) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    return rule


def _counts(largest: Tensor) -> Tensor:
    """Whether a batch counts: it is finite, and no checkpoint runs its forward again."""
    return torch.zeros_like(largest).bool() if in_backward_pass() else largest < torch.inf


counts = register("counts", _counts, lambda largest: torch.empty_like(largest, dtype=torch.bool))


def _copy(x: Tensor) -> Tensor:
    return x.clone()  # an operator may not return its argument


_DETACH = register("detach", _copy, torch.empty_like, replayed=True)


def detached(x: Tensor) -> Tensor:
    """Return x without a gradient, also in a trace: make_fx of torch 2.14 keeps no detach."""
    without: Tensor = _DETACH(x) if recorded() else x.detach()
    return without
