"""Pooled recalibration against the bare training-mode forward, torch's and fvcore's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import nn

import bnstats
from benchmarks import command
from benchmarks.machine import device
from benchmarks.peers import (
    FVCORE,
    UPDATE_BN,
    fvcore_update_bn_stats,
    import_timm,
    torch_update_bn,
)
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import (
    COPY_INPUTS,
    batches,
    copy_of_inputs,
    forward,
    torchvision_model,
)

TRAINING = "bare forward, training mode"
EVALUATION = "bare forward, evaluation mode"
OURS = "recompute_population_stats"
PEERS = {UPDATE_BN: torch_update_bn, FVCORE: fvcore_update_bn_stats}
MODELS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0",
    "mobilenetv3_small_100": "timm's MobileNetV3",  # whose layers activate too
}


class _Case(NamedTuple):
    """A model, number and shape of the batches, and what is promised against the bare forward."""

    model: str
    batches: tuple[int, ...]
    at_most: float | None
    rounds: int = 9


_CASES = [
    # What the models are made for.
    _Case("resnet18", (4, 8, 3, 224, 224), 0.95),
    _Case("resnet50", (4, 8, 3, 224, 224), 0.95),
    _Case("mobilenet_v2", (4, 8, 3, 224, 224), 0.95),
    # Small images, where small operations weigh more.
    _Case("resnet18", (8, 64, 3, 32, 32), 0.97),
    _Case("resnet18", (8, 16, 3, 96, 96), 0.97),
    _Case("densenet121", (8, 4, 3, 128, 128), 0.97),
    _Case("mobilenetv3_small_100", (8, 8, 3, 128, 128), 0.97),
    _Case("efficientnet_b0", (8, 8, 3, 128, 128), 0.97),
    _Case("mobilenet_v2", (8, 16, 3, 96, 96), 0.97),
]

AGAINST_PEERS = 1.0


def measure(run: Run) -> list[Row]:
    """Measure every model at its sizes."""
    quick = [_Case(name, (2, 2, 3, 64, 64), None, 1) for name in ("resnet18", "mobilenet_v2")]
    measured = []
    for case in quick if run.quick else _CASES:
        measured += _measure(_model(case.model), MODELS[case.model], case)
    return measured


def _model(name: str) -> nn.Module:
    if name.startswith("mobilenetv3"):
        model: nn.Module = import_timm().create_model(name)
        return model.to(device())
    return torchvision_model(name)


def _measure(model: nn.Module, name: str, case: _Case) -> list[Row]:
    data = batches(*case.batches)
    recalibrations = {OURS: bnstats.recompute_population_stats, **PEERS}
    timings = compare(
        {
            TRAINING: forward(model, data, training=True),
            EVALUATION: forward(model, data, training=False),
            **{what: partial(function, model, data) for what, function in recalibrations.items()},
            COPY_INPUTS: copy_of_inputs(model, data),
        },
        rounds=case.rounds,
    )
    # whatever recalibrates runs the forward, and reads the input of every layer once more
    limit = timings[EVALUATION].median + timings[COPY_INPUTS].median / 2
    measured = rows(
        f"recalibration, {len(data)} batches of {tuple(data[0].shape)}",
        name,
        timings,
        TRAINING,
        at_most={} if case.at_most is None else {OURS: case.at_most},
        limits=dict.fromkeys(recalibrations, limit),
    )
    (ours,) = (row for row in measured if row.what == OURS)
    at_most = None if case.at_most is None else AGAINST_PEERS
    return measured + [
        replace(ours, against=peer, base=timings[peer].median, at_most=at_most) for peer in PEERS
    ]


if __name__ == "__main__":
    command.main("recompute")
