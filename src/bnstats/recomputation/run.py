"""The public functions: measure population statistics, and write them into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bnstats.distributed import Sync
from bnstats.interrupts import Interrupts
from bnstats.masks import Downsample
from bnstats.recomputation.drift import compare
from bnstats.recomputation.forwards import Forward
from bnstats.recomputation.layer_stats import RunningStats, write_all
from bnstats.recomputation.measurement import measured, prepared, transaction
from bnstats.recomputation.methods import default_method
from bnstats.recomputation.options import Options
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.recalibration import Recalibration
from bnstats.recomputation.task import Task
from bnstats.traversal import ByLayer, Include

MethodName: TypeAlias = Literal["pooled", "batch_average", "ema", "layerwise", "sweeps"]
OnNonfinite: TypeAlias = Literal["raise", "skip"]

_NOTHING = torch.empty(0, device="cpu")  # the result of a step that has none


def recompute_population_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: MethodName | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    tolerance: float | None = None,
    include: Include | None = None,
    correction: int = 1,
    on_nonfinite: OnNonfinite = "raise",
    sync: Sync = None,
    progress: bool = False,
    memory_limit: int | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    downsample: Downsample = None,
    prior: PopulationStats | None = None,
) -> Recalibration:
    """Replace running statistics by the population statistics of the loader's data.

    A pass over the data with the weights fixed. It is a transaction: if anything fails, the
    model is bit for bit as it was; the running statistics are written at the end, in place.
    During the pass only the chosen BatchNorm layers use batch statistics; all others are in
    evaluation mode (no dropout), without gradients. Counters and momentum stay as they are.
    A layer that is frozen, by :func:`bnstats.freeze_statistics` or as it is in evaluation mode
    while the model trains, is left alone, and the result names it in ``frozen``.

    What each layer normalizes with while its statistics are taken is the method's choice:

    - ``"pooled"``: each batch by itself, as in training; the statistics are the exact mean and
      variance over every value, uneven batches included.
    - ``"batch_average"``: the same, but the plain average of batch means and unbiased batch
      variances (Algorithm 2 of the BatchNorm paper); the variance between batches is missing.
    - ``"ema"``: the same with a debiased moving average of momentum 0.1: what ``nn.BatchNorm``
      would end with on this data.
    - ``"layerwise"``: the complete statistics of every layer before it, as in evaluation: what
      the model will normalize with, and what its layers then see, agree exactly. All batches go
      through the model together, each in a thread that is held at every layer until the layer
      has seen them all. It computes one forward of the data and holds the activations of all
      its batches: about the largest layer's input, and what skips over it, times the number of
      batches. As other batches run in between, the forward must not keep anything on the model
      from one layer to the next, replace its parameters (``functional_call``) or hold a lock, and
      random numbers that it draws come in any order. Nor may it enter a context of the whole
      process around a layer (flags of ``torch.backends``, ``warnings.catch_warnings``), which the
      batches would leave in another order than they entered it, or read a layer's running
      statistics before the layer runs, as ``torch.ao``'s ConvBn2d does: use ``"sweeps"``. A layer
      that only some batches reach is completed with those, once no batch can go on otherwise. A
      sharded model is refused.
    - ``"sweeps"``: the same fixed point with constant memory. The loader is read again and
      again, and each forward ends as soon as nothing is left to measure: at most about
      one half of a forward per layer, fewer where layers do not depend on each other. (Where a
      module around a layer is sharded or has forward hooks, forwards run to their end.) Layers
      that do, for example a layer that is called twice, are swept until nothing changes. A
      loader may shuffle or augment: each layer is then measured on another draw of the data.
      What a model keeps from batch to batch is as the sweeps before have left it, not as in one
      reading of the data.

    A layer's statistics are those of what it is called with: a subclass that changes its input
    before ``super().forward`` is measured on the input as it came.

    Args:
        model: any Module; DistributedDataParallel, DataParallel, FullyShardedDataParallel,
            torch.compile and averages of weights (AveragedModel, timm's, ema-pytorch's) are
            seen through. Layers are every BatchNorm with running statistics.
        loader: an iterable of batches, for example a DataLoader. A batch is a tensor; a tuple or
            list, of which the first element goes in, by the same rules; a mapping of keyword
            arguments. What has a ``to`` method moves to the device, at any depth. A first
            element of several tensors (two views, for example) is refused, but for tensors of
            whole numbers with one axis, such as labels or lengths.
        method: see above; by default ``"pooled"``, with a prior ``"layerwise"``.
        forward: ``forward(model, batch)`` for everything else, for example under autocast; with
            ``torch.func.functional_call`` it may bring parameters, and no buffers.
        device: where batches go; by default where the model's first parameter is that is not on
            the meta device.
        max_batches: stop after this many batches.
        tolerance: stop reading as soon as, in every layer that was reached, the
            root-mean-square over channels of the standard error of the mean (in standard
            deviations) and that of the variance (relative) are at most this, both with eps in
            the variance, as evaluation has it. Checked after 8 batches, then at every fourth,
            later at every eighth part more (``"layerwise"`` starts over with twice as many).
            The errors come from the spread between batches, which should be shuffled; where
            the loader has a length and was not read whole, they are those of a sample of its
            batches (finite population correction). With ``"layerwise"`` and ``"sweeps"`` they
            are conditional on the statistics of earlier layers, usually larger than without (see
            ``PopulationStats.stderr_is_conditional``): more batches are read than needed.
        include: ``include(name, module) -> bool`` chooses layers; the others normalize as in
            evaluation. It is also asked for modules of other classes that have a BatchNorm's
            running statistics, as torchvision's FrozenBatchNorm2d; by default these keep theirs.
        correction: 1 for unbiased variances, 0 for biased; with a prior, or about zero, always 0.
        on_nonfinite: ``"raise"`` an error for a batch whose statistics are not finite in some
            layer, or ``"skip"`` it for all layers (with ``"layerwise"`` and ``"sweeps"`` from the
            layer on where it is not finite: earlier ones may have counted it).
        sync: with whom to merge by torch.distributed: a process group, all processes (True),
            no other (False), or all if there are several (None). Every process ends with the
            same bits, with any numbers of batches (except for a sharded model, whose forwards
            wait for each other: uneven numbers are an error); one that fails makes all fail, before
            the first batch or while it writes included. One collective, or one for each layer,
            sweep, or check of the tolerance; a small one before, by which the processes find
            that they measure the same layers in the same way, and one after writing.
        progress: show a progress bar.
        memory_limit: for ``"layerwise"``, how many bytes the inputs that wait at layers may
            take in this process; what the model keeps beside them is not counted.
        mask: ``mask(batch)``, for a batch on the device, returns a boolean tensor, True for the
            positions whose values count; of the shape of the layers' inputs without their
            channel axis, or broadcastable to it.
        downsample: for layers with fewer positions than the mask: ``"any"``, ``"all"`` or a
            function, see :func:`bnstats.masked`; None: such a layer is an error.
        prior: statistics of the training data, from :func:`measure_population_stats`, for a loader
            of few samples of other data. Each layer's statistics, behind layers that have theirs,
            are a weighted mean of the prior's and the loader's (of variances, in logarithms). The
            weight is measured, ``t^2 / (t^2 + e^2)``: e is the standard error of the loader's, by
            the spread between samples, t how far the layer's channels have moved beyond it. One
            value per channel leaves the prior as it is. Take samples of all kinds.

    Returns:
        What was before and is after, how far it moved, and ``undo()``. Printed, it is a table.

    Raises:
        InvalidValueError: an unknown method or option, an empty loader, an iterator with
            ``"sweeps"``, ``"ema"`` over several processes, a model that is being measured already.
        InvalidTypeError: not a Module, not a loader, a batch that needs ``forward``, a lazy
            layer not yet materialized.
        NonFiniteStatisticsError: a batch with NaN or infinity, unless skipped.
        TooFewValuesError: fewer values than the variance needs.
        RepeatedLayerError: with ``"layerwise"``, a layer called twice in one forward.
        MemoryLimitError: more bytes wait than ``memory_limit``.
        LayerMismatchError: the prior is of another model.
        PeerError: another process failed.

    Warns:
        BnstatsWarning: no BatchNorm layers, or some that no batch reached; those keep theirs.
            Sweeps of layers that depend on each other did not converge. The loader's samples are
            much more alike than the prior's.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> loader = torch.randn(100, 4).split(32)
        >>> result = bnstats.recompute_population_stats(model, loader)
        >>> result.after["1"].count
        100
        >>> result.undo()

    References:
        Ioffe and Szegedy (2015), "Batch Normalization", arXiv:1502.03167, Algorithm 2; Wu and
        Johnson (2021), "Rethinking Batch in BatchNorm", arXiv:2105.07576, section 3. With a prior
        of fixed weight: Schneider et al. (2020), arXiv:2006.16971; measured: Efron and Morris
        (1973), "Stein's Estimation Rule and Its Competitors".
    """
    options = Options(
        method=default_method(prior) if method is None else method,
        forward=forward,
        device=device,
        max_batches=max_batches,
        tolerance=tolerance,
        include=include,
        correction=correction,
        on_nonfinite=on_nonfinite,
        sync=sync,
        progress=progress,
        memory_limit=memory_limit,
        mask=mask,
        downsample=downsample,
        prior=prior,
    )
    with Interrupts() as interrupts:
        task = prepared(model, loader, options, interrupts)
        with transaction(task):
            return _write(task, measured(task))


def _write(task: Task, after: PopulationStats) -> Recalibration:
    """Write what was measured, in all processes or in none."""
    layers = {x.name: x.module for x in task.layers if x.name in after}
    before: ByLayer[RunningStats] = ByLayer()
    try:
        with task.peers.exchange(_NOTHING) as exchange:
            task.give_warnings()
            before.update((name, RunningStats.of(layer)) for name, layer in layers.items())
            drift = compare(before, after)
            write_all(layers, after, before)
            task.interrupts.check()
            exchange.send(_NOTHING)
    except BaseException:
        # An error here or in another process: either all are written, or none.
        for name, running in before.items():
            running.write_to(layers[name])
        raise
    return Recalibration(before, after, drift, layers)


def measure_population_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: MethodName | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    tolerance: float | None = None,
    include: Include | None = None,
    correction: int = 1,
    on_nonfinite: OnNonfinite = "raise",
    sync: Sync = None,
    progress: bool = False,
    memory_limit: int | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    downsample: Downsample = None,
    prior: PopulationStats | None = None,
) -> PopulationStats:
    """Measure the population statistics of the loader's data, and write nothing.

    Arguments, warnings and errors are those of :func:`recompute_population_stats`. These
    statistics, but not averages over batches, have the spread between samples: what a prior needs.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> stats = bnstats.measure_population_stats(model, torch.randn(64, 3).split(16))
        >>> drift = stats.drift_from(model)["0"]
        >>> bool(drift.mean_shift.abs().max() < 1)
        True
    """
    options = Options(
        method=default_method(prior) if method is None else method,
        forward=forward,
        device=device,
        max_batches=max_batches,
        tolerance=tolerance,
        include=include,
        correction=correction,
        on_nonfinite=on_nonfinite,
        sync=sync,
        progress=progress,
        memory_limit=memory_limit,
        mask=mask,
        downsample=downsample,
        prior=prior,
        writes=False,
    )
    with Interrupts() as interrupts:
        task = prepared(model, loader, options, interrupts)
        with transaction(task):
            stats = measured(task)
            interrupts.check()
    task.give_warnings()
    return stats
