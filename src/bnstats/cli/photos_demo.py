"""``bnstats demo --photos``: fine-tuning a pretrained network, before and after recalibration."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bnstats import (
    Recalibration,
    convert_batchnorm,
    plot_drift,
    recompute_population_stats,
)
from bnstats.cli import photos
from bnstats.cli.photos import GRADIENT_BATCH, Photos

EPOCHS = 3


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


_ema: Callable[[nn.Module], nn.Module] = partial(convert_batchnorm, to="ema", momentum=0.1)

_TRAININGS: list[tuple[str, Callable[[nn.Module], nn.Module], int]] = [
    ("batch norm, 16", _as_it_is, 16),
    ("batch norm, 2", _as_it_is, 2),
    ("EMABatchNorm, momentum 0.1, 16", _ema, 16),
    ("EMABatchNorm, momentum 0.1, 2", _ema, 2),
]
"""The label of each run, how the network is changed, and the normalization batch."""


@dataclass(frozen=True)
class Outcome:
    """A training's accuracy on the held-out pictures, before and after recalibration."""

    title: str
    running: float
    population: float
    result: Recalibration


def run(options: argparse.Namespace) -> None:
    """Fine-tune, recalibrate, print, draw."""
    data = Photos.load(options.photos)
    network = partial(photos.efficientnet_lite0, len(data.classes))
    epochs = EPOCHS if options.epochs is None else options.epochs
    steps = epochs * max(len(data.train) // GRADIENT_BATCH, 1)
    outcomes = []
    with tqdm(total=steps * len(_TRAININGS), desc="fine-tuning") as bar:
        for title, change, batch in _TRAININGS:
            bar.set_postfix_str(title)
            torch.manual_seed(options.seed)
            model = change(network())
            photos.fine_tune(
                model,
                data.train,
                steps=steps,
                seed=options.seed,
                normalization_batch=batch,
                after_step=lambda _: bar.update(),
            )
            outcomes.append(_outcome(title, model, data))
    _tell(outcomes, data, steps)
    plot_drift(outcomes[0].result).savefig(options.output, dpi=150)
    print(f"\nfigure of the first's statistics saved to {options.output}")


def _outcome(title: str, model: nn.Module, data: Photos) -> Outcome:
    running = photos.accuracy(model, data.test)
    images = data.train.tensors[0]
    order = torch.randperm(len(images))  # they come class by class
    result = recompute_population_stats(model, images[order].split(32))
    return Outcome(title, running, photos.accuracy(model, data.test), result)


def _tell(outcomes: list[Outcome], data: Photos, steps: int) -> None:
    print(
        f"\nEfficientNet-Lite0, fine-tuned for {steps} steps of {GRADIENT_BATCH} pictures, which "
        f"are normalized\n{GRADIENT_BATCH} or 2 at a time. Right answers on {len(data.test)} "
        f"held-out pictures of {len(data.classes)} classes, with\n\n"
        f"{'':>30}  {'running averages':>16}  {'population statistics':>21}"
    )
    for outcome in outcomes:
        print(f"{outcome.title:>30}  {outcome.running:>16.1%}  {outcome.population:>21.1%}")
    print(f"\n{_how_sure(outcomes[0].population, len(data.test))}")
    print(f"\nThe first's running averages, worst layer first:\n\n{_first_lines(outcomes[0])}")


def _how_sure(share: float, pictures: int) -> str:
    error = (share * (1 - share) / pictures) ** 0.5
    return (
        f"On {pictures} pictures {share:.1%} has a standard error of {100 * error:.1f} points, and "
        "another --seed changes as much:\ndifferences of that size mean nothing."
    )


def _first_lines(outcome: Outcome, layers: int = 10) -> str:
    lines: Any = str(outcome.result).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    return "\n".join(lines[header : header + 2 + layers])
