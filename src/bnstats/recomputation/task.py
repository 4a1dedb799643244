"""A measurement with its arguments checked and resolved: the input of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bnstats.arguments import check_has_values, check_module, check_writable
from bnstats.distributed import Peers, communicates, is_dtensor
from bnstats.errors import InvalidTypeError, InvalidValueError, warn
from bnstats.freezing import frozen_layers
from bnstats.interrupts import Interrupts
from bnstats.recomputation.batches import Reader, default_device
from bnstats.recomputation.estimators import Estimator, Pooled
from bnstats.recomputation.forwards import BatchForward, DefaultForward, MaskedForward
from bnstats.recomputation.loaders import check_loader
from bnstats.recomputation.observer import ObservedLayer
from bnstats.recomputation.options import Options
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.prior import Prior
from bnstats.reduction import wide_dtype
from bnstats.traversal import named_batchnorms, unwrap


@dataclass(frozen=True)
class Method:
    """A way to measure.

    Attributes:
        name: what the caller passes as ``method``.
        measure: runs it.
        estimator: makes the estimator of the layers' statistics from (correction, like).
        rereads: the loader is read more than once.
        holds_inputs: inputs of layers are held in memory until all batches have come.
        merges: what several processes measure can be merged.
        samples: the spread between samples is known, about the statistics that are found.
        in_order: a layer is measured behind layers that normalize with their own statistics.
    """

    name: str
    measure: Callable[[Task], PopulationStats]
    estimator: Callable[[Tensor, Tensor], Estimator]
    rereads: bool = False
    holds_inputs: bool = False
    merges: bool = True
    samples: bool = False
    in_order: bool = False


@dataclass(frozen=True, eq=False)
class Task:
    """One measurement.

    Attributes:
        model: the unwrapped model.
        layers: the chosen layers.
        frozen: names of layers left alone: frozen, or in evaluation mode while the model trains.
        loader: gives batches.
        forward: from a batch to a forward of the model.
        device: where batches go.
        method: how.
        options: what else the caller asked for.
        peers: the processes that measure together.
        interrupts: what runs the loader and, in this thread, the forward.
        prior: statistics of another data set, toward which those of the loader are drawn.
        own_forward: what ``forward`` runs, under a mask or not; None where the caller runs it.
        warnings: what to warn of at the end: a warning that is an error must not come where other
            processes wait for this one.
    """

    model: nn.Module
    layers: tuple[ObservedLayer, ...]
    frozen: tuple[str, ...]
    loader: Iterable[Any]
    forward: Callable[[Any], Any]
    device: torch.device | str | None
    method: Method
    options: Options
    peers: Peers
    interrupts: Interrupts
    prior: Prior | None = None
    own_forward: BatchForward | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and on the device of the measurement."""
        device = self.layers[0].running_mean.device
        return torch.empty(0, dtype=wide_dtype(device), device=device)

    @property
    def devices(self) -> set[torch.device]:
        """Where the model computes."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        devices = {tensor.device for tensor in tensors}
        # A device without an index means the current one; a tensor's device has an index.
        return devices if self.device is None else {*devices, _with_index(self.device)}

    @property
    def description(self) -> dict[str, object]:
        """The values that must be equal in all processes that measure together."""
        options = ("method", "tolerance", "correction", "on_nonfinite")
        return {
            **{name: getattr(self.options, name) for name in options},
            "function": "recompute" if self.options.writes else "measure",
            "layers": tuple(
                (x.name, x.num_features, str(x.running_mean.dtype), x.about_zero)
                for x in self.layers
            ),
            "dtype of the measurement": str(self.like.dtype) if self.layers else None,
            "prior": None if self.prior is None else self.prior.description,
        }

    def reader(self, *, progress: bool = False) -> Reader:
        """Begin to read the loader, from its start if it has one."""
        return Reader(
            self.loader,
            max_batches=self.options.max_batches,
            progress=progress,
            device=self.device,
            call=self.interrupts.call,
        )

    def read(self, reader: Reader, until: float) -> Iterator[Any]:
        """Yield batches until this many have been read in all, or there are no more.

        Raises:
            InvalidValueError: the forwards wait for those of the other processes, and some
                processes have no batch left.
        """
        batches = reader.read(until)
        if self.peers.alone or not communicates(self.model):
            yield from batches
            return
        while True:
            with self.peers.exchange(torch.tensor(0.0, device="cpu")) as exchange:
                batch = next(batches, _NO_MORE)
                exchange.send(torch.tensor(float(batch is _NO_MORE), device="cpu"))
            if exchange.results.all():
                return
            if exchange.results.any():
                ranks = ", ".join(map(str, exchange.results.nonzero().flatten().tolist()))
                raise InvalidValueError(
                    f"loader: the process of rank {ranks} has no batch left where others have "
                    "one: the forwards of a sharded model wait for each other, and need the same "
                    "number of batches in every process"
                )
            yield batch

    def give_warnings(self) -> None:
        """Warn of what there is to warn of."""
        while self.warnings:
            warn(self.warnings.pop(0))

    def correction_of(self, layer: ObservedLayer) -> int:
        """Return a layer's correction: about zero no mean is estimated, and none corrected for.

        With a prior it is the mean's error between samples that is corrected for.
        """
        return 0 if layer.about_zero or self.prior is not None else int(self.options.correction)

    def new_estimator(self, correction: Tensor, like: Tensor) -> Estimator:
        """Return the method's estimator; with the spread between samples, where that is taken."""
        if self.layers[0].reference is not None:
            return Pooled(correction, like, samples=True)
        return self.method.estimator(correction, like)


def _with_index(device: torch.device | str) -> torch.device:
    return torch.empty(0, device=device).device


_NO_MORE = object()


def prepare(
    model: nn.Module,
    loader: Iterable[Any],
    method: Method,
    options: Options,
    peers: Peers,
    interrupts: Interrupts,
) -> Task:
    """Check the model and the loader, and return a task."""
    check_module(model, loader, "model, loader")
    inner = unwrap(model)
    check_loader(loader, method.name, rereads=method.rereads)
    check_mergeable(method, peers)
    chosen, frozen = choose_layers(inner, method, options)
    own = BatchForward(
        DefaultForward(inner) if options.forward is None else partial(options.forward, inner)
    )
    forward: Callable[[Any], Any] = own
    if options.mask is not None:
        forward = MaskedForward(own, options.mask, options.downsample)
    return Task(
        model=inner,
        layers=chosen,
        frozen=frozen,
        loader=loader,
        forward=forward,
        device=default_device(inner) if options.device is None else options.device,
        method=method,
        options=options,
        prior=None if options.prior is None else Prior(options.prior, chosen),
        peers=peers,
        interrupts=interrupts,
        own_forward=own,
    )


def choose_layers(
    model: nn.Module, method: Method, options: Options
) -> tuple[tuple[ObservedLayer, ...], tuple[str, ...]]:
    """Return the layers to measure, and the names of those left alone."""
    samples = method.samples and not (options.writes and options.prior is None)
    layers = named_batchnorms(model, options.include)
    check_has_values(layers)
    frozen = frozen_layers(model, layers)
    chosen = tuple(
        ObservedLayer.of(n, x, samples=samples) for n, x in layers.items() if n not in frozen
    )
    check_sharding(model, chosen, method)
    check_own_statistics(chosen)
    if options.writes:
        for layer in chosen:
            check_writable(layer.name, layer.module, layer.module.buffers(recurse=False))
    return chosen, frozen


def check_own_statistics(layers: Iterable[ObservedLayer]) -> None:
    """Refuse layers that keep their statistics in one tensor, of which each needs others."""
    names: dict[int, str] = {}
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            first = names.setdefault(statistic.data_ptr(), layer.name)
            if first != layer.name and statistic.numel():
                raise InvalidValueError(
                    f"layers '{first}' and '{layer.name}' share a tensor of running statistics: "
                    "expected each layer to have its own; clone those of one, or choose one by "
                    "include"
                )


def check_sharding(model: nn.Module, layers: Iterable[ObservedLayer], method: Method) -> None:
    """Refuse methods that cannot run while forwards have collectives of their own."""
    for layer in layers:
        if is_dtensor(layer.running_mean) or is_dtensor(layer.running_var):
            raise InvalidTypeError(
                f"layer '{layer.name}' keeps its running statistics in DTensors: expected plain "
                "tensors, as fully_shard leaves them"
            )
    if method.holds_inputs and communicates(model):
        raise InvalidValueError(
            f'method: "{method.name}" runs several forwards side by side, and those of a sharded '
            "model (fully_shard, FullyShardedDataParallel, DTensor parameters) wait for other "
            'processes; use method="sweeps", which finds the same statistics'
        )


def check_mergeable(method: Method, peers: Peers) -> None:
    """Refuse a method whose results cannot be merged over processes."""
    if peers.size > 1 and not method.merges:
        raise InvalidValueError(
            'sync: moving averages of several processes do not merge; method="pooled" and '
            '"batch_average" do, and sync=False keeps to this process'
        )
