"""All batches through the model together, layer by layer: the exact fixed point in one pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
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
from bnstats.recompute.batches import Reader
from bnstats.recompute.crew import Crew, Runner
from bnstats.recompute.estimators import Estimate, Pooled
from bnstats.recompute.population import PopulationStats
from bnstats.recompute.results import check_enough_values, population_stats
from bnstats.recompute.stage import Seen, StagedLayer, staged
from bnstats.recompute.stopping import FIRST_LOOK, precise
from bnstats.recompute.task import Tally, Task


def layerwise(task: Task) -> PopulationStats:
    """Measure with ``"layerwise"``."""
    with closing(task.reader()) as reader:
        for batches in _portions(task, reader):
            tally, estimate = _Procession(task, reader).run(batches)
            if tally.num_exhausted == task.peers.size:
                break
            if precise(estimate, task.layers, task.tolerance):
                break
    return population_stats(task, tally, estimate)


def _portions(task: Task, reader: Reader) -> Iterator[Iterable[Any]]:
    """Yield all batches; with a tolerance the first few, then twice as many, until it is met.

    Statistics of later layers need those of earlier ones complete: more batches mean to start
    over with all of them.
    """
    if task.tolerance is None:
        yield reader.read()
        return
    kept: list[Any] = []
    until = FIRST_LOOK
    while True:
        kept.extend(reader.read(until))
        yield kept
        until *= 2


class _Held(NamedTuple):
    """What a batch waits with at a layer."""

    layer: StagedLayer
    seen: Seen
    num_bytes: int


class _Candidate(NamedTuple):
    """Which layer a process would complete next: the least of all is completed.

    Attributes:
        since: the round in which a batch came to wait there; infinite where none waits.
        position: the layer's position in the task.
    """

    since: float = math.inf
    position: float = -1


class _Procession:
    """One pass of batches that are held at each layer until its statistics are complete.

    When no batch can run, the layer that has waited longest is completed with those that have
    reached it, and they go on; of several that have waited equally long, the one that the model
    names first. That is decided when all are held, from where they are held and not from which
    came first: two runs give the same bits.
    """

    def __init__(self, task: Task, reader: Reader) -> None:
        self._task = task
        self._reader = reader
        # The device of a GPU is kept busy by one; on CPU, forwards with one thread each beat
        # one forward with many.
        on_cpu = task.like.device.type == "cpu"
        self._places = torch.get_num_threads() if on_cpu else 1
        self._crew = Crew(self._places)
        self._complete: dict[StagedLayer, Pooled] = {}
        self._passed: set[tuple[StagedLayer, int]] = set()
        self._since: dict[StagedLayer, int] = {}
        self._num_rounds = 0
        self._num_skipped = 0
        self._bytes_held = 0
        self._lock = threading.Lock()
        widest = max(layer.num_features for layer in task.layers)
        self._blank = task.like.new_zeros(len(self._new_estimator(task.layers[0]).state()), widest)

    def run(self, batches: Iterable[Any]) -> tuple[Tally, Estimate]:
        """Let the batches through."""
        task = self._task
        bar = tqdm(total=len(task.layers), desc="layers complete", disable=not task.progress)
        with staged(task.model, task.layers, self._visit), bar:
            try:
                tally, completed = self._round(partial(self._start, iter(batches)))
                while completed:
                    bar.update()
                    tally, completed = self._round(self._crew.settle)
            finally:
                self._crew.close()
        estimators = (self._complete.get(x) or self._new_estimator(x) for x in task.layers)
        columns = zip(*(x.estimate(tally.fraction) for x in estimators), strict=True)
        return tally, Estimate(*map(torch.cat, columns))

    def _start(self, batches: Iterator[Any]) -> None:
        """Start a forward of every batch, and go on until each is held or done."""
        first = list(islice(batches, self._places))
        self._crew.share_threads(len(first))
        for batch in chain(first, batches):
            self._crew.start(partial(self._task.forward, batch))
        self._crew.settle()

    def _visit(self, layer: StagedLayer, input: Tensor) -> None:
        """Hold a batch, called in its own thread, until the layer can normalize it."""
        runner = self._crew.current
        if runner is None:
            raise InvalidValueError(
                f"layer '{layer.name}' runs in a thread that the forward of a batch has started: "
                'expected the forward to stay in its thread; use method="sweeps"'
            )
        if (layer, runner.index) in self._passed:
            error = RepeatedLayerError(
                f"layer '{layer.name}' runs more than once in one forward: no order of its "
                'calls completes its statistics in one pass; use method="sweeps", which repeats '
                "them until nothing moves"
            )
            self._crew.fail(error)
        self._passed.add((layer, runner.index))
        # A batch that comes after the layer was completed is normalized, and no longer counts.
        if layer not in self._complete:
            self._count_bytes(layer, input.nbytes)
            self._since.setdefault(layer, self._num_rounds)
            self._crew.hold(_Held(layer, layer.observe(input), input.nbytes))

    def _count_bytes(self, layer: StagedLayer, num_bytes: int) -> None:
        """Count a batch that is going to be held, against the limit."""
        limit = self._task.memory_limit
        with self._lock:
            self._bytes_held += num_bytes
            if limit is None or self._bytes_held <= limit:
                return
        error = MemoryLimitError(
            f"layer '{layer.name}': {len(self._crew.held) + 1} batches hold "
            f"{self._bytes_held:,} bytes of activations, more than memory_limit={limit:,}; "
            'use method="sweeps", which holds none, or fewer batches (max_batches)'
        )
        self._crew.fail(error)

    def _round(self, run: Callable[[], None]) -> tuple[Tally, bool]:
        """Run until all batches are held or done, and complete a layer; False if none waits."""
        peers, width = self._task.peers, len(Tally._fields)

        def report() -> Tensor:
            run()
            return self._report()

        reports = peers.gather(report, like=self._pack(Tally(0, 0, 0, 0), _Candidate()))
        tally = Tally(*reports[:, :width].sum(0).tolist())
        candidates = [_Candidate(*row) for row in reports[:, width : width + 2].tolist()]
        chosen = min(candidates)
        if chosen == _Candidate():
            return tally, False
        layer = self._task.layers[int(chosen.position)]
        states = reports[:, width + 2 :]
        if {c.position for c in candidates} - {chosen.position, _Candidate().position}:
            # Some process would have completed another one, and told of that.
            states = peers.gather(lambda: self._state(layer).flatten(), like=self._blank.flatten())
        self._finish(layer, states.unflatten(1, self._blank.shape)[..., : layer.num_features])
        self._num_rounds += 1
        return tally, True

    def _report(self) -> Tensor:
        """Return the tally, the candidate and its state as one vector."""
        positions = {layer: i for i, layer in enumerate(self._task.layers)}
        waiting = {runner.held.layer for runner in self._crew.held}
        candidate = min((_Candidate(self._since[x], positions[x]) for x in waiting), default=None)
        if candidate is None:
            return self._pack(Tally.of(self._reader, self._num_skipped), _Candidate())
        state = self._state(self._task.layers[int(candidate.position)])
        return self._pack(Tally.of(self._reader, self._num_skipped), candidate, state)

    def _pack(self, tally: Tally, candidate: _Candidate, state: Tensor | None = None) -> Tensor:
        state = self._blank if state is None else state
        return torch.cat([self._task.like.new_tensor([*tally, *candidate]), state.flatten()])

    def _state(self, layer: StagedLayer) -> Tensor:
        """Return the state of this process's batches at a layer, in their order, padded."""
        runners = self._held_at(layer)
        estimator = self._new_estimator(layer)
        for runner in runners:
            count, mean, m2 = runner.held.seen
            mean, m2 = mean.to(self._task.like), m2.to(self._task.like)
            estimator.add(Moments(torch.full_like(mean, float(count)), mean, m2))
        state = estimator.state()
        if not state.isfinite().all():
            self._refuse_nonfinite(layer, runners)
            return self._state(layer)
        return F.pad(state, (0, self._blank.shape[1] - layer.num_features))

    def _finish(self, layer: StagedLayer, states: Tensor) -> None:
        """Complete a layer, and let the batches that wait there go on."""
        estimator = self._new_estimator(layer)
        for state in states:
            estimator.absorb(state)
        count = int(states[:, 0, 0].sum())
        if count:
            check_enough_values(layer, count, self._task.correction_of(layer))
            layer.normalize_with(*estimator.mean_and_var())
            self._complete[layer] = estimator
        self._crew.release(self._leave(self._held_at(layer)))
        self._since.pop(layer, None)

    def _refuse_nonfinite(self, layer: StagedLayer, runners: list[Runner]) -> None:
        """Raise for the batches that are not finite at a layer, or take them out of the pass."""
        seen = [runner.held.seen for runner in runners]
        finite = [bool((x.mean + x.m2).isfinite().all()) for x in seen]
        bad = [runner for runner, is_finite in zip(runners, finite, strict=True) if not is_finite]
        if not self._task.skip_nonfinite or not bad:
            indices = ", ".join(str(runner.index) for runner in bad or runners)
            raise NonFiniteStatisticsError(
                f"batch {indices} (counted from 0) has non-finite statistics in layer "
                f"'{layer.name}'; mend the data or pass on_nonfinite=\"skip\"; the model is as "
                "it was"
            )
        self._num_skipped += len(bad)
        self._crew.dismiss(self._leave(bad))

    def _leave(self, runners: list[Runner]) -> list[Runner]:
        self._bytes_held -= sum(runner.held.num_bytes for runner in runners)
        return runners

    def _held_at(self, layer: StagedLayer) -> list[Runner]:
        return [runner for runner in self._crew.held if runner.held.layer is layer]

    def _new_estimator(self, layer: StagedLayer) -> Pooled:
        like = self._task.like.new_zeros(layer.num_features)
        return Pooled(torch.full_like(like, self._task.correction_of(layer)), like)
