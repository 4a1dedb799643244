"""Statistics of forwards that the user runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, local
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bnstats.arguments import check_has_values
from bnstats.contexts import Context
from bnstats.distributed import Peers
from bnstats.errors import InvalidTypeError, InvalidValueError, warn
from bnstats.formatting import counted
from bnstats.hooks import Hook
from bnstats.interrupts import Interrupts
from bnstats.private import in_backward_pass, intercepted
from bnstats.recomputation.batches import BatchCounts
from bnstats.recomputation.collector import Collector, one_pass
from bnstats.recomputation.eager import eager
from bnstats.recomputation.estimators import Pooled
from bnstats.recomputation.observer import LayerMoments, ObservedLayer, hooked
from bnstats.recomputation.options import Options
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.results import population_stats
from bnstats.recomputation.task import Method, Task
from bnstats.traversal import Include, named_batchnorms, no_batchnorm, unwrap

_METHOD = Method("pooled", one_pass, Pooled)


def observe(model: nn.Module, include: Include | None = None) -> Context[Observation]:
    """Take the statistics of what BatchNorm layers are given in forwards that you run.

    For forwards that no loader describes: a serving loop, an optimizer with a pass of its own
    (schedule-free ones), a trainer that runs the model its own way. The moments are those of
    every value of each layer's input, in training and in evaluation mode, under autocast and
    ``torch.inference_mode``. Nothing else changes, and nothing is written to the model.

    What a layer is given depends on the layers before it: in evaluation mode on their running
    statistics, in training mode on their batches. ``seen.stats().drift_from(model)`` shows how far
    this traffic is from what the model normalizes with; :func:`recompute_population_stats` with
    ``method="layerwise"`` finds statistics that agree with what they bring about.

    The standard errors come from the spread between forwards of the model. If only parts of it are
    called, a forward ends where a layer runs again. A forward with a value that is not finite
    counts for no layer, and neither does one that fails. Of activation checkpointing's two
    forwards the first counts.

    Any number of contexts may be open, in several threads. A forward reads each layer's input
    twice more, for its sum and its squares; ``benchmarks/results/cpu/observe.md`` has it for a
    ResNet-50.

    Args:
        model: any Module; wrappers are seen through. Inside the context compiled parts run
            eagerly, because compiled code does not notice new hooks.
        include: ``include(name, module) -> bool`` chooses layers; by default all BatchNorm layers
            with running statistics. Frozen ones are observed too.

    Returns:
        A context manager, whose value has ``stats()``, in the context and after it. Entered again,
        it has a new one.

    Raises:
        InvalidTypeError: not a Module, or a lazy layer not yet materialized.
        InvalidValueError: a layer on the meta device, where nothing has values.

    Warns:
        BnstatsWarning: there is no such layer.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
        >>> with bnstats.observe(model) as seen:
        ...     for request in torch.randn(10, 8, 4):
        ...         _ = model(request)
        >>> seen.stats()["1"].count, seen.stats()["1"].num_batches
        (80, 10)
    """
    inner = unwrap(model)
    layers = named_batchnorms(inner, include)
    if not layers:
        warn(f"{no_batchnorm(inner, include)}: nothing to observe")
    check_has_values(layers)
    observed = [ObservedLayer.of(name, layer) for name, layer in layers.items()]
    return Context("observe", lambda: _open(Observation(inner, observed)))


@contextmanager
def _open(observation: Observation) -> Iterator[Observation]:
    with ExitStack() as stack:
        observation.attach(stack)
        yield observation


class Observation:
    """What :func:`bnstats.observe` has seen.

    Example:
        >>> import torch, bnstats
        >>> with bnstats.observe(torch.nn.BatchNorm1d(2)) as seen:
        ...     pass
        >>> seen.num_batches
        0
    """

    def __init__(self, model: nn.Module, layers: list[ObservedLayer]) -> None:
        self._task = _task(model, tuple(layers))
        self._collector = Collector(self._task, layers) if layers else None
        self._lock = Lock()
        self._thread = _Thread()
        self._num_batches = 0
        self._num_hidden = 0

    def __repr__(self) -> str:
        forwards = counted(self.num_batches, "forward")
        return f"Observation({forwards} of {counted(len(self._task.layers), 'layer')})"

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError(
            "Observation: expected no copy and no pickle of what watches a model: take those of "
            "its statistics, seen.stats()"
        )

    @property
    def num_batches(self) -> int:
        """Number of forwards so far, those that were not finite included."""
        return self._num_batches

    def stats(self) -> PopulationStats:
        """Return the pooled statistics of what was seen so far.

        They are this process's; :meth:`PopulationStats.merge` puts several together.

        Raises:
            InvalidValueError: no forward was observed.
            NonFiniteStatisticsError: no forward was finite.
            TooFewValuesError: a single value per channel was seen.

        Warns:
            BnstatsWarning: no forward reached some layers, which are then not in the result; some
                forwards were left out as they were not finite, or ran under a function transform
                or a trace, where there is nothing to observe.
        """
        collector = self._collector
        if collector is None:
            return PopulationStats({})
        self._end_batch()
        if self._num_hidden:
            warn(
                f"{self._num_hidden} inputs of layers were not observed: inside of torch.func "
                "transforms, torch.jit.trace and the like they have no values"
            )
        if not self._num_batches:
            raise InvalidValueError(
                "observe: expected at least one forward of the model inside of the context, and "
                f"none reached its {len(self._task.layers)} BatchNorm layers; code that was "
                "compiled inside of the context cannot be observed: compile before"
            )
        with self._lock, _outside_of_autograd():
            num_skipped = int(collector.num_skipped)
            estimate = collector.estimate()
        if 0 < num_skipped < self._num_batches:
            warn(
                f"{num_skipped} of {self._num_batches} forwards had values that are not finite, "
                "and count for no layer"
            )
        counts = BatchCounts(self._num_batches, num_skipped, math.nan, 0)
        stats = population_stats(self._task, counts, estimate)
        self._task.give_warnings()
        return stats

    def attach(self, stack: ExitStack) -> None:
        """Observe until the stack is closed."""
        model = self._task.model
        stack.callback(self._end_batch)
        stack.enter_context(eager())
        stack.callback(model.register_forward_pre_hook(Hook(self._begin_forward)).remove)
        ends = model.register_forward_hook(Hook(self._end_forward), always_call=True)
        stack.callback(ends.remove)
        stack.enter_context(hooked(self._task.layers, self._on_input))

    def _begin_forward(self, *_: Any) -> None:
        self._thread.in_forward = True
        self._thread.handled = sys.exc_info()[1]

    def _end_forward(self, _: nn.Module, __: Any, output: object) -> None:
        # Not an error that was being handled before, by the code that runs the forward.
        if output is None and sys.exc_info()[1] is not self._thread.handled:
            self._thread.moments.clear()  # it failed
        self._end_batch()
        self._thread.in_forward = False
        self._thread.handled = None  # else it would be kept, with all the frames that it came from

    def _on_input(self, layer: ObservedLayer, input: Tensor) -> None:
        if torch.compiler.is_compiling() or in_backward_pass():
            return
        if intercepted():
            self._num_hidden += 1
            return
        moments = self._thread.moments
        if layer in moments and not self._thread.in_forward:
            self._end_batch()
        with _outside_of_autograd():
            # What it normalizes with is near to what comes.
            expected = layer.running_mean, layer.running_var
            new, before = layer.moments_of(input, expected), moments.get(layer)
            moments[layer] = new if before is None else before.merge(new)

    def _end_batch(self) -> None:
        """Merge in what this thread has seen."""
        moments, collector = self._thread.moments, self._collector
        if not moments or collector is None:
            return
        with self._lock, _outside_of_autograd():
            for layer, seen in moments.items():
                collector.add(layer, seen)
            if self._task.like.is_cpu:
                collector.end_batch()
            else:
                collector.end_batch_unasked()
            self._num_batches += 1
        moments.clear()


class _Thread(local):
    """What one thread has yet to merge in."""

    def __init__(self) -> None:
        self.in_forward = False
        self.handled: BaseException | None = None
        self.moments: dict[ObservedLayer, LayerMoments] = {}


@contextmanager
def _outside_of_autograd() -> Iterator[None]:
    """Compute without gradients, and nothing that inference mode would keep for itself."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _task(model: nn.Module, layers: tuple[ObservedLayer, ...]) -> Task:
    """Return the measurement that this is, but for a loader."""
    options = Options(method=_METHOD.name, on_nonfinite="skip", sync=False, writes=False)
    return Task(
        model=model,
        layers=layers,
        frozen=(),
        loader=(),
        forward=model,
        device=None,
        method=_METHOD,
        options=options,
        peers=Peers.of(False),
        interrupts=Interrupts(),
    )
