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
MODELS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}


class _Size(NamedTuple):
    """Number and shape of the batches, rounds, and whether the promises are of these."""

    batches: tuple[int, ...]
    rounds: int
    promised: bool


_SIZES = [_Size((4, 8, 3, 224, 224), 9, True), _Size((24, 8, 3, 96, 96), 9, False)]
"""What the models are made for, and small images, where small operations weigh more."""

AGAINST_BARE = 0.95
AGAINST_PEERS = 1.0


def measure(run: Run) -> list[Row]:
    """Measure the models of the promises, and one of timm's, whose layers activate too."""
    measured = []
    for size in [_Size((2, 2, 3, 64, 64), 1, False)] if run.quick else _SIZES:
        models = {name: torchvision_model(model) for model, name in MODELS.items()}
        if not size.promised:
            timm_model = import_timm().create_model("mobilenetv3_small_100")
            models["timm's MobileNetV3"] = timm_model.to(device())
        for name, model in models.items():
            measured += _measure(model, name, size)
    return measured


def _measure(model: nn.Module, name: str, size: _Size) -> list[Row]:
    data = batches(*size.batches)
    recalibrations = {OURS: bnstats.recompute_population_stats, **PEERS}
    timings = compare(
        {
            TRAINING: forward(model, data, training=True),
            EVALUATION: forward(model, data, training=False),
            **{what: partial(function, model, data) for what, function in recalibrations.items()},
            COPY_INPUTS: copy_of_inputs(model, data),
        },
        rounds=size.rounds,
    )
    # whatever recalibrates runs the forward, and reads the input of every layer once more
    limit = timings[EVALUATION].median + timings[COPY_INPUTS].median / 2
    measured = rows(
        f"recalibration, {len(data)} batches of {tuple(data[0].shape)}",
        name,
        timings,
        TRAINING,
        at_most={OURS: AGAINST_BARE} if size.promised else {},
        limits=dict.fromkeys(recalibrations, limit),
    )
    (ours,) = (row for row in measured if row.what == OURS)
    at_most = AGAINST_PEERS if size.promised else None
    return measured + [
        replace(ours, against=peer, base=timings[peer].median, at_most=at_most) for peer in PEERS
    ]


if __name__ == "__main__":
    command.main("recompute")
