"""Which layers a layer's input was computed from, watched while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dataflow(TorchDispatchMode):
    """Marks every tensor with the sources that it was computed from.

    Marks are kept per storage, and every new storage is some operator's result, which sets its
    mark: an address that is used again never keeps an old one. Views and in-place results share
    a storage and add to its mark, which can only claim too much. What passes through the host
    (``.item()``, numpy) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: dict[int, frozenset[Any]] = {}

    def mark(self, tensor: Tensor, sources: frozenset[Any]) -> None:
        """Say what a tensor was computed from."""
        self._marks[_address(tensor)] = sources

    def sources(self, tensor: Tensor) -> frozenset[Any]:
        """Return what a tensor was computed from."""
        return self._marks.get(_address(tensor), frozenset())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator, and mark its results with the sources of its arguments."""
        result = func(*args, **(kwargs or {}))
        given = _addresses((args, kwargs))
        sources = frozenset().union(*(self._marks.get(a, frozenset()) for a in given))
        changed = given if func._schema.is_mutable else ()  # type: ignore[attr-defined]
        for address in {*_addresses(result), *changed}:
            self._marks[address] = sources
        return result


def _addresses(values: Any) -> set[int]:
    # A tensor of no values has no address of its own, and carries nothing.
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return {address for tensor in tensors if (address := _address(tensor))}


def _address(tensor: Tensor) -> int:
    # Sparse tensors and the like have no storage.
    strided = tensor.layout == torch.strided
    return tensor.untyped_storage().data_ptr() if strided else id(tensor)
