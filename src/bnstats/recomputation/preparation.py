"""Checking the model and the loader of a measurement, and resolving all into a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from bnstats.arguments import check_has_values, check_module, check_writable
from bnstats.distributed import Peers, communicates, is_dtensor
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.freezing import frozen_layers
from bnstats.interrupts import Interrupts
from bnstats.recomputation.batches import default_device
from bnstats.recomputation.forwards import BatchForward, DefaultForward, MaskedForward
from bnstats.recomputation.loaders import check_loader
from bnstats.recomputation.observer import ObservedLayer
from bnstats.recomputation.options import Options
from bnstats.recomputation.prior import Prior
from bnstats.recomputation.task import Method, Task
from bnstats.traversal import check_materialized, named_batchnorms, named_layers, unwrap


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
    check_all_materialized(inner)
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


def check_all_materialized(model: nn.Module) -> None:
    """Refuse lazy layers of any class: the first batch would give them random weights."""
    for name, module in named_layers(model):
        if isinstance(module, LazyModuleMixin):
            check_materialized(name, module)


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
