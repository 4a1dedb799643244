"""Digits with normalization over 32, 4 and 2 samples: BatchNorm against moving averages.

The gradient batch is 32 for all: it is normalized in parts of the normalization batch, each
with a forward and a backward of its own, whose gradients add up to one optimizer step. A
layer's windows and running averages move once per part.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import RESULTS, machine
from bnstats import (
    CenteredConv2d,
    CenteredLinear,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
)
from bnstats.cli.digits import Digits, multilayer_perceptron

GRADIENT_BATCH = 32
LEARNING_RATE = 0.1


def conv_net(norm: Callable[[int], nn.Module], conv: type[nn.Conv2d]) -> nn.Sequential:
    """Return a net of three convolutions, normalized before each ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [conv(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    batch: int
    make: Callable[[], nn.Module]


@dataclass
class Run:
    """What one training gave: loss per step, and test error in % now and then."""

    losses: list[float] = field(default_factory=list)
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The test error at the end."""
        return self.errors[max(self.errors)]


def comparison(kind: str) -> list[Setting]:
    """Return the rows that compare the layers, in the MLP or the convolutional net."""
    if kind == "mlp":
        make = lambda: multilayer_perceptron(nn.BatchNorm1d, nn.Linear)  # noqa: E731
    else:
        make = lambda: conv_net(nn.BatchNorm2d, nn.Conv2d)  # noqa: E731
    return [
        *(Setting("BatchNorm", batch, make) for batch in (32, 4, 2)),
        moving_average(kind, 4, window=8),
        moving_average(kind, 2, window=16),
    ]


def moving_average(kind: str, batch: int, **options: float) -> Setting:
    """Return a row with moving averages; warm-up 100 unless the options say else."""
    name = "moving average, " + ", ".join(f"{key} {value:g}" for key, value in options.items())
    options = {"warmup": 100, **options}
    if kind == "mlp":
        norm = partial(MovingAverageBatchNorm1d, **options)
        return Setting(name, batch, lambda: multilayer_perceptron(norm, CenteredLinear))
    norm = partial(MovingAverageBatchNorm2d, **options)
    return Setting(name, batch, lambda: conv_net(norm, CenteredConv2d))


OPTIONS: list[dict[str, float]] = [
    {"window": 4},
    {"window": 64},
    {"window": 256},
    {"window": 16, "warmup": 0},
    {"window": 16, "warmup": 1600},
    {"window": 16, "renorm_warmup": 100},
    {"window": 16, "renorm_warmup": 10**6},
    {"window": 16, "momentum": 0.002},
    {"window": 16, "momentum": 0.2},
]
"""One at a time, at a batch of 2: 16 forwards to an optimizer step."""

TABLES = {
    "mlp": comparison("mlp"),
    "conv": comparison("conv"),
    "mlp_options": [moving_average("mlp", 2, **options) for options in OPTIONS],
    "conv_options": [moving_average("conv", 2, **options) for options in OPTIONS],
}


def train(setting: Setting, digits: Digits, *, steps: int, seed: int) -> Run:
    """Train with one-cycle learning rates, and look at the test error every tenth of the way."""
    torch.manual_seed(seed)
    model, run = setting.make(), Run()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    images, labels = digits.train.tensors
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (GRADIENT_BATCH,), generator=order)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for part in chosen.split(setting.batch):
            part_loss = F.cross_entropy(model(images[part]), labels[part], reduction="sum")
            (part_loss / GRADIENT_BATCH).backward()
            loss += part_loss.detach() / GRADIENT_BATCH
        optimizer.step()
        schedule.step()
        run.losses.append(round(float(loss), 4))
        if step % max(steps // 10, 1) == 0:
            run.errors[step] = test_error(model, *digits.test.tensors)
    return run


@torch.no_grad()
def test_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of wrong answers in evaluation mode."""
    model.eval()
    wrong = (model(images).argmax(1) != labels).float().mean()
    model.train()
    return round(100 * float(wrong), 2)


def table(name: str, *, quick: bool) -> None:
    """Print a table of test errors; keep it and each row's first curves, unless quick."""
    seeds, steps = (1, 20) if quick else (5, 400)
    curves = {}
    lines = [
        f"`python -m benchmarks.bench_small_batch {name}` on {machine()}.",
        f"{steps} steps, {seeds} seeds; test error in %.",
        "",
        "| normalization | batch | median | range |",
        "| --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for setting in TABLES[name]:
        runs = [train(setting, Digits.load(seed), steps=steps, seed=seed) for seed in range(seeds)]
        errors = [run.error for run in runs]
        spread = f"{statistics.median(errors):.1f} | {min(errors):.1f} to {max(errors):.1f}"
        lines.append(f"| {setting.name} | {setting.batch} | {spread} |")
        print(lines[-1], flush=True)
        curves[f"{setting.name}, batch {setting.batch}"] = vars(runs[0])
    if not quick:
        (RESULTS / f"small_batch_{name}.md").write_text("\n".join([*lines, ""]))
        (RESULTS / f"small_batch_{name}.json").write_text(json.dumps(curves))


def main(quick: bool = False, names: Sequence[str] = ()) -> None:
    """Measure the tables of these names, or all."""
    for name in names or TABLES:
        table(name, quick=quick)


if __name__ == "__main__":
    main("--quick" in sys.argv, [name for name in sys.argv[1:] if name in TABLES])
