"""All batches through the model together, layer by layer: the exact fixed point in one pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from bnstats.errors import (
    InvalidValueError,
    MemoryLimitError,
    NonFiniteStatisticsError,
    RepeatedLayerError,
)
from bnstats.moments import Moments
from bnstats.recomputation.batches import BatchCounts, Reader
from bnstats.recomputation.collector import FIRST_CHECK, within_tolerance
from bnstats.recomputation.estimators import Estimate, Pooled, pooled_state
from bnstats.recomputation.forward_threads import ForwardThread, ForwardThreads
from bnstats.recomputation.observer import LayerMoments, ObservedLayer, observed
from bnstats.recomputation.own_tensors import OwnTensors
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.results import check_enough_values, population_stats
from bnstats.recomputation.task import Task


def layerwise(task: Task) -> PopulationStats:
    """Measure with ``"layerwise"``."""
    with closing(task.reader()) as reader:
        for batches in _portions(task, reader):
            counts, estimate = _LayerwisePass(task, reader).run(batches)
            if counts.num_exhausted == task.peers.size:
                break
            if within_tolerance(estimate, task.layers, task.options.tolerance):
                break
    return population_stats(task, counts, estimate)


def _portions(task: Task, reader: Reader) -> Iterator[Iterable[Any]]:
    """Yield all batches; with a tolerance the first few, then twice as many, until it is met.

    Statistics of later layers need those of earlier ones complete: more batches mean to start
    over with all of them.
    """
    if task.options.tolerance is None:
        yield reader.read()
        return
    kept: list[Any] = []
    while True:
        kept.extend(reader.read(max(FIRST_CHECK, 2 * len(kept))))
        yield kept


class _Waiting(NamedTuple):
    """The input of a layer at which a batch waits."""

    layer: ObservedLayer
    moments: LayerMoments
    num_bytes: int


class _Candidate(NamedTuple):
    """The layer that a process would complete next; the smallest candidate of all processes wins.

    Attributes:
        since: number of layers that were complete when the first batch started to wait there;
            infinite where no batch waits.
        position: the layer's position in the task.
    """

    since: float = math.inf
    position: float = -1


class _LayerwisePass:
    """One pass of batches that are held at each layer until its statistics are complete.

    When no batch can run, the layer that has waited longest is completed with those that have
    reached it, and they go on; of several that have waited equally long, the one that the model
    names first. The decision is taken when all are held, and depends on where they are held, not on
    their order of arrival: two runs give the same bits.
    """

    def __init__(self, task: Task, reader: Reader) -> None:
        self._task = task
        self._reader = reader
        # One forward keeps a GPU busy. On CPU, forwards with one thread each beat one
        # forward with many, and one more than threads computes where another waits for Python's
        # lock. Who allows a single thread wants no second core used.
        cores = torch.get_num_threads() if task.like.device.type == "cpu" else 1
        self._max_running = cores + 1 if cores > 1 else 1
        self._threads = ForwardThreads(self._max_running, task.devices, task.interrupts)
        self._tensors = OwnTensors(task.model, task.layers)
        self._completed: dict[ObservedLayer, Tensor] = {}  # what estimators give as their state
        self._combined: dict[ObservedLayer, Estimate] = {}  # with the prior, if there is one
        self._passed: set[tuple[ObservedLayer, int]] = set()
        self._waits_since: dict[ObservedLayer, int] = {}
        self._num_completed = self._num_skipped = self._bytes_held = 0
        self._lock = threading.Lock()
        # Processes exchange states of one shape, the widest layer's.
        width = 1 if task.peers.alone else max(layer.num_features for layer in task.layers)
        self._num_rows = len(self._estimator(task.layers[:1], []).state())
        self._empty_state = task.like.new_zeros(self._num_rows, width)

    def run(self, batches: Iterable[Any]) -> tuple[BatchCounts, Estimate]:
        """Let the batches through."""
        task = self._task
        bar = tqdm(
            total=len(task.layers), desc="layers complete", disable=not task.options.progress
        )
        with observed(task.model, task.layers, self._on_input), self._tensors.side_by_side(), bar:
            try:
                counts = self._advance(partial(self._start, iter(batches)), bar.update)
            finally:
                self._threads.close()
        return counts, self._estimate(counts.fraction)

    def _estimate(self, fraction: float) -> Estimate:
        """Return the estimates of all layers, which take as many operations as that of one."""
        layers = self._task.layers
        # What several processes have merged is on CPU.
        device = self._task.like.device if self._task.peers.alone else torch.device("cpu")
        zeros = self._empty_state.new_zeros(self._num_rows, 1, device=device)
        states = [self._completed.get(x, zeros.expand(-1, x.num_features)) for x in layers]
        estimate = self._estimator(layers, [torch.cat(states, dim=1)]).estimate(fraction)
        if not self._combined:
            return estimate
        channels = [layer.num_features for layer in layers]
        columns = zip(*(part.split(channels) for part in estimate), strict=True)
        parts = [self._combined.get(x, Estimate(*c)) for x, c in zip(layers, columns, strict=True)]
        return Estimate(*map(torch.cat, zip(*parts, strict=True)))

    def _start(self, batches: Iterator[Any]) -> None:
        """Start a forward of every batch."""
        first = list(islice(batches, self._max_running))
        self._threads.share_cores(len(first))
        for batch in chain(first, batches):
            self._threads.start(partial(self._task.forward, batch))

    def _advance(self, step: Callable[[], None], progress: Callable[[], object]) -> BatchCounts:
        """Take the first step, and complete layer after layer until no batch waits.

        All that may fail in one process alone is done inside of an exchange.
        """
        width = len(BatchCounts._fields)
        empty = self._pack(BatchCounts(0, 0, 0, 0), _Candidate())
        while True:
            with self._task.peers.exchange(empty) as exchange:
                step()
                self._threads.run()
                exchange.send(self._report())
            reports = exchange.results
            candidates = [_Candidate(*row) for row in reports[:, width : width + 2].tolist()]
            chosen = min(candidates)
            if chosen == _Candidate():
                return BatchCounts(*reports[:, :width].sum(0).tolist())
            layer = self._task.layers[int(chosen.position)]
            states = reports[:, width + 2 :]
            if {c.position for c in candidates} - {chosen.position, _Candidate().position}:
                # Another process had another candidate, and has sent the state of that layer.
                with self._task.peers.exchange(self._empty_state.flatten()) as exchange:
                    exchange.send(self._state(layer))
                states = exchange.results
            self._num_completed += 1
            step = partial(self._complete, layer, states.unflatten(1, (self._num_rows, -1)))
            progress()

    def _on_input(self, layer: ObservedLayer, input: Tensor) -> None:
        """Hold a batch, called in its own thread, until the layer can normalize it."""
        thread = self._threads.current
        if thread is None:
            raise InvalidValueError(
                f"layer '{layer.name}' runs in a thread that the forward of a batch has started: "
                'expected the forward to stay in one thread; use method="sweeps"'
            )
        if (layer, thread.index) in self._passed:
            error = RepeatedLayerError(
                f"layer '{layer.name}' runs more than once in one forward: no order of its "
                'calls completes its statistics in one pass; use method="sweeps", which repeats '
                "them until nothing moves"
            )
            self._threads.fail(error)
        self._passed.add((layer, thread.index))
        self._tensors.check(layer)
        # A batch that comes after the layer was completed is normalized, and no longer counts.
        if layer not in self._completed:
            self._count_bytes(layer, input.nbytes)
            self._waits_since.setdefault(layer, self._num_completed)
            self._threads.wait(_Waiting(layer, layer.moments_of(input), input.nbytes))

    def _count_bytes(self, layer: ObservedLayer, num_bytes: int) -> None:
        """Count a batch that is going to be held, against the limit."""
        limit = self._task.options.memory_limit
        with self._lock:
            self._bytes_held += num_bytes
            if limit is None or self._bytes_held <= limit:
                return
        error = MemoryLimitError(
            f"layer '{layer.name}': {len(self._threads.waiting) + 1} batches hold "
            f"{self._bytes_held:,} bytes of activations, more than memory_limit={limit:,}; "
            'use method="sweeps", which holds none, or fewer batches (max_batches)'
        )
        self._threads.fail(error)

    def _report(self) -> Tensor:
        """Return the counts, the candidate and its state as one vector."""
        positions = {layer: i for i, layer in enumerate(self._task.layers)}
        waiting = {thread.waiting_with.layer for thread in self._threads.waiting}
        candidate = min(
            (_Candidate(self._waits_since[x], positions[x]) for x in waiting), default=None
        )
        if candidate is None:
            return self._pack(BatchCounts.of(self._reader, self._num_skipped), _Candidate())
        state = self._state(self._task.layers[int(candidate.position)])
        return self._pack(BatchCounts.of(self._reader, self._num_skipped), candidate, state)

    def _pack(
        self, counts: BatchCounts, candidate: _Candidate, state: Tensor | None = None
    ) -> Tensor:
        state = self._empty_state if state is None else state
        return torch.cat([self._task.like.new_tensor([*counts, *candidate]), state.flatten()])

    def _state(self, layer: ObservedLayer) -> Tensor:
        """Return the state of this process's batches at a layer, in their order, padded."""
        threads, like = self._waiting_at(layer), self._task.like
        padding = max(0, self._empty_state.shape[1] - layer.num_features)
        if not threads:
            return like.new_zeros(self._num_rows, layer.num_features + padding)
        moments = [thread.waiting_with.moments for thread in threads]
        counts = like.new_tensor([[x.num_values] for x in moments])
        means = torch.stack([x.mean.to(like) for x in moments])
        m2s = torch.stack([x.m2.to(like) for x in moments])
        samples = [x.samples.to(like) for x in moments if x.samples is not None]
        state = pooled_state(counts, means, m2s, samples or None)
        if not state.isfinite().all():
            self._refuse_nonfinite(layer, threads)
            return self._state(layer)
        return F.pad(state, (0, padding))

    def _complete(self, layer: ObservedLayer, states: Tensor) -> None:
        """Complete a layer, and let the batches that wait there go on."""
        of_processes = states[:, :, : layer.num_features].unbind()
        state = of_processes[0]
        if len(of_processes) > 1:
            state = self._estimator([layer], of_processes).state()
        if count := int(state[0, 0]):
            correction = self._task.correction_of(layer)
            check_enough_values(layer, count, correction)
            if self._task.prior is None:
                total = Moments(*state[:3])
                layer.normalize_with(total.mean, total.var(correction))
            else:
                own = self._estimator([layer], [state]).estimate()
                self._combined[layer] = combined = self._task.prior.combine(layer, own)
                layer.normalize_with(combined.mean, combined.var)
            self._completed[layer] = state
        self._threads.release(self._count_out(self._waiting_at(layer)))
        self._waits_since.pop(layer, None)

    def _refuse_nonfinite(self, layer: ObservedLayer, threads: list[ForwardThread]) -> None:
        """Raise an error for batches that are not finite at a layer, or drop them from the pass."""
        bad = [thread for thread in threads if not thread.waiting_with.moments.is_finite()]
        if self._task.options.on_nonfinite == "raise" or not bad:
            indices = ", ".join(str(thread.index) for thread in bad or threads)
            raise NonFiniteStatisticsError(
                f"batch {indices} (counted from 0) has non-finite statistics in layer "
                f"'{layer.name}'; repair the data or pass on_nonfinite=\"skip\"; the model is as "
                "it was"
            )
        self._num_skipped += len(bad)
        self._threads.cancel(self._count_out(bad))

    def _count_out(self, threads: list[ForwardThread]) -> list[ForwardThread]:
        self._bytes_held -= sum(thread.waiting_with.num_bytes for thread in threads)
        return threads

    def _waiting_at(self, layer: ObservedLayer) -> list[ForwardThread]:
        return [thread for thread in self._threads.waiting if thread.waiting_with.layer is layer]

    def _estimator(self, layers: Sequence[ObservedLayer], states: Sequence[Tensor]) -> Pooled:
        """Return the estimator of these layers, end to end, with all that has these states."""
        channels = sum(layer.num_features for layer in layers)
        like = self._task.like.new_zeros(channels, device=states[0].device if states else None)
        corrections = [
            like.new_full((x.num_features,), self._task.correction_of(x)) for x in layers
        ]
        estimator = Pooled(torch.cat(corrections), like, samples=layers[0].reference is not None)
        for state in states:
            estimator.merge_state(state)
        return estimator
