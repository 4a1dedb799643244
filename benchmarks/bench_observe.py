"""What observing a forward costs it, and holding or freezing its statistics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import COPY_INPUTS, Work, batches, copy_of_inputs, torchvision_model

BARE = "bare forward"
OBSERVED = "the same, observed"
HELD = "the same, held"
FROZEN = "frozen, in training mode"

AT_MOST = {OBSERVED: 1.05, HELD: 1.01, FROZEN: 1.01}

Context = Callable[[nn.Module], AbstractContextManager[object]]


def measure(run: Run) -> list[Row]:
    """Measure a forward of ResNet-50 in either mode, with statistics that it would have."""
    size = (2, 3, 32, 32) if run.quick else (8, 3, 224, 224)
    model = torchvision_model("resnet50")
    data = batches(2, *size)
    # As it is initialized, its running statistics are far from anything that a model has.
    bnstats.recompute_population_stats(model, data)
    contexts: dict[str, Context] = {BARE: lambda _: nullcontext(), OBSERVED: bnstats.observe}
    measured = []
    for training in (False, True):
        if training:
            contexts[HELD] = bnstats.hold_statistics
        functions = {
            what: _forward(model, data, context, training=training)
            for what, context in contexts.items()
        }
        functions[COPY_INPUTS] = copy_of_inputs(model, data)
        measured += _rows(f"ResNet-50 forward, {_mode(training)}", str(size), functions, run)
    frozen = bnstats.freeze_statistics(torchvision_model("resnet50"))
    functions = {
        BARE: _forward(model, data, contexts[BARE], training=False),
        FROZEN: _forward(frozen, data, contexts[BARE], training=True),
    }
    return measured + _rows("ResNet-50 forward, with running statistics", str(size), functions, run)


def _mode(training: bool) -> str:
    return "training mode" if training else "evaluation mode"


def _forward(
    model: nn.Module, data: list[torch.Tensor], context: Context, *, training: bool
) -> Work:
    def run() -> None:
        model.train(training)
        with torch.no_grad(), context(model):
            for x in data:
                model(x)

    return run


def _rows(work: str, size: str, functions: dict[str, Work], run: Run) -> list[Row]:
    timings = compare(functions, rounds=1 if run.quick else 15)
    at_most = {} if run.quick else {k: v for k, v in AT_MOST.items() if k in timings}
    limits = {}
    if COPY_INPUTS in timings:  # to observe is to read the input of every layer once more
        limits[OBSERVED] = timings[BARE].median + timings[COPY_INPUTS].median / 2
    return rows(work, size, timings, BARE, at_most=at_most, limits=limits)


if __name__ == "__main__":
    command.main("observe")
