"""Which layers' inputs are computed from which layers, watched while the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from bnstats.private import TorchDispatchMode, is_mutable, tree_leaves
from bnstats.recomputation.collector import Collector
from bnstats.recomputation.observer import ObservedLayer
from bnstats.recomputation.task import Task


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
        self._own_tensors = [*task.model.parameters(), *task.model.buffers()]
        self._calls_in_forward: Counter[ObservedLayer] = Counter()
        self._position = {layer: i for i, layer in enumerate(task.layers)}
        size = len(task.layers)
        self._depends = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        self._calls = torch.zeros(size, dtype=torch.float64, device="cpu")

    def forward(self, batch: Any) -> None:
        """Run one forward and watch it."""
        self._calls_in_forward.clear()
        known = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
        self._flow = Dataflow([*known, *self._own_tensors])
        for layer in self._task.layers:  # a model may read them before the layer runs
            self._flow.begin_with(layer.running_mean, layer)
            self._flow.begin_with(layer.running_var, layer)
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
        self._flow.paused = True  # the host reads the moments, the model does not
        self._collector.on_input(layer, input)
        self._flow.paused = False
        # Its output depends on the statistics it normalizes with, hence on their sources.
        for statistic in (layer.running_mean, layer.running_var):
            self._flow.mark(statistic, sources | {layer})

    def levels(self) -> list[DependencyLevel]:
        """Return the layers that were reached, each after all that its input depends on."""
        table = torch.cat([self._depends, self._calls[:, None]], dim=1).to(self._task.like)
        with self._task.peers.exchange(table) as exchange:
            exchange.send(table)
        # Over all processes: a batch of another process may have taken another path.
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

    Marks are kept per storage: views and in-place results add to that of what they share, which
    can only claim too much. What the operators do not show depends on every source so far:
    memory that was made elsewhere (numpy), or that was made to be filled, which a kernel that is
    no operator may do. Once the host has read a value, all that comes after depends on it.

    Args:
        known: tensors that depend on nothing: parameters, buffers, the batch.

    Attributes:
        paused: nothing is marked meanwhile.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        self._marks: dict[Hashable, frozenset[Any]] = {}
        self._all: frozenset[Any] = frozenset()
        self._read_by_host: frozenset[Any] = frozenset()
        self._without_storage: list[Tensor] = []
        self._host_reads = _HostReads(self)
        for tensor in known:
            self._marks[self._key(tensor)] = frozenset()

    def begin_with(self, tensor: Tensor, source: object) -> None:
        """Let a tensor be a source, which nothing else depends on so far."""
        self._marks[self._key(tensor)] = frozenset([source])

    def mark(self, tensor: Tensor, sources: frozenset[Any]) -> None:
        """Set what a tensor was computed from."""
        self._marks[self._key(tensor)] = sources
        self._all |= sources

    def sources(self, tensor: Tensor) -> frozenset[Any]:
        """Return what a tensor was computed from."""
        return self._marks.setdefault(self._key(tensor), self._all)

    def read_by_host(self, sources: frozenset[Any]) -> None:
        """Let all that comes after depend on these."""
        self._read_by_host |= sources

    def __enter__(self) -> Dataflow:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._host_reads.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._host_reads.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator, and mark its results with the sources of its arguments."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = frozenset().union(*map(self.sources, given))
        result = func(*args, **(kwargs or {}))
        results = tree_leaves(result)
        operator: Any = func
        # A value, or a shape that depends on values.
        if torch.Tag.dynamic_output_shape in operator.tags or any(
            isinstance(leaf, (bool, int, float, complex)) for leaf in results
        ):
            self.read_by_host(sources)
        if operator.__name__.removeprefix("new_").startswith(_FILLED_LATER):
            sources = self._all
        changed = given if is_mutable(operator) else []
        for leaf in [*results, *changed]:
            if isinstance(leaf, Tensor):
                self._marks[self._key(leaf)] = sources | self._read_by_host
        return result

    def _key(self, tensor: Tensor) -> Hashable:
        if tensor.layout != torch.strided:  # sparse, for one: it has no storage
            self._without_storage.append(tensor)  # alive, so that the id stays its own
            return id(tensor)
        # Unlike an address, a weak reference is never that of another storage later.
        return StorageWeakRef(tensor.untyped_storage())


_FILLED_LATER = ("empty", "zeros", "ones", "full")


class _HostReads(TorchFunctionMode):
    """Notes the reads of tensors by the host that are no operators."""

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _READS and not self._flow.paused:
            self._flow.read_by_host(self._flow.sources(args[0]))
        return func(*args, **(kwargs or {}))


_READS = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.__dlpack__)
