"""Which layers' inputs are computed from which layers, watched while the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnstats.recompute.collector import Collector
from bnstats.recompute.observer import ObservedLayer
from bnstats.recompute.task import Task


class DependencyLevel(NamedTuple):
    """Layers whose inputs depend on layers of earlier levels only, or on each other.

    Attributes:
        layers: how often each runs in a forward, at most.
        circular: some depend on each other or on themselves: sweeps must be repeated.
    """

    layers: Mapping[ObservedLayer, int]
    circular: bool


class DependencySurvey:
    """Watches the forwards of all batches, while a collector takes the layers' moments."""

    def __init__(self, task: Task, collector: Collector) -> None:
        self._task = task
        self._collector = collector
        self._flow = Dataflow()
        self._calls_in_forward: Counter[ObservedLayer] = Counter()
        self._position = {layer: i for i, layer in enumerate(task.layers)}
        size = len(task.layers)
        self._depends = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        self._calls = torch.zeros(size, dtype=torch.float64, device="cpu")

    def forward(self, batch: Any) -> None:
        """Run one forward and watch it."""
        self._calls_in_forward.clear()
        self._flow = Dataflow()
        with self._flow:
            self._task.forward(batch)
        for layer, calls in self._calls_in_forward.items():
            position = self._position[layer]
            self._calls[position] = max(float(self._calls[position]), calls)

    def on_input(self, layer: ObservedLayer, input: Tensor) -> None:
        """Note what the layer's input depends on; the layer normalizes with its batch's own."""
        sources = self._flow.sources(input)
        self._depends[self._position[layer], [self._position[s] for s in sources]] = 1
        self._calls_in_forward[layer] += 1
        self._collector.on_input(layer, input)
        # Its output depends on what it normalizes with, and so on what that was taken from.
        for statistic in (layer.running_mean, layer.running_var):
            self._flow.mark(statistic, sources | {layer})

    def levels(self) -> list[DependencyLevel]:
        """Return the layers that were reached, each after all that its input depends on."""
        table = torch.cat([self._depends, self._calls[:, None]], dim=1).to(self._task.like)
        with self._task.peers.exchange(table) as exchange:
            exchange.send(table)
        # Over all processes: a batch elsewhere may have gone another way.
        table = exchange.results.amax(0).cpu()
        depends, calls = table[:, :-1] > 0, table[:, -1]
        for through in range(len(depends)):
            depends |= depends[:, through, None] & depends[through]
        together = depends & depends.T
        remaining = calls > 0
        levels = []
        while remaining.any():
            ready = remaining & ~(depends & ~together & remaining).any(1)
            layers = {self._task.layers[i]: int(calls[i]) for i in ready.nonzero().flatten()}
            levels.append(DependencyLevel(layers, circular=bool(together[ready].any())))
            remaining &= ~ready
        return levels


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
        """Set what a tensor was computed from."""
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
