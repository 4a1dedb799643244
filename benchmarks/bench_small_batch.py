"""Digits with normalization over 32, 4 and 2 samples: BatchNorm against moving averages.

The gradient batch is 32 for all: it is normalized in parts of the normalization batch, each
with a forward and a backward of its own, whose gradients add up to one optimizer step. A
layer's windows and running averages move once per part.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import command
from benchmarks.machine import device
from benchmarks.rows import Row, Run
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
    """One row of the table; ``by_class`` sorts a gradient's samples, so that a part has few."""

    name: str
    batch: int
    make: Callable[[], nn.Module]
    by_class: bool = False


@dataclass
class Training:
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


def train(setting: Setting, digits: Digits, *, steps: int, seed: int) -> Training:
    """Train with one-cycle learning rates, and look at the test error every tenth of the way."""
    torch.manual_seed(seed)
    model, training = setting.make().to(device()), Training()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    images, labels = (tensor.to(device()) for tensor in digits.train.tensors)
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (GRADIENT_BATCH,), generator=order)
        if setting.by_class:
            chosen = chosen[digits.train.tensors[1][chosen].argsort(stable=True)]
        optimizer.zero_grad()
        loss = torch.zeros((), device=device())
        for part in chosen.split(setting.batch):
            part_loss = F.cross_entropy(model(images[part]), labels[part], reduction="sum")
            (part_loss / GRADIENT_BATCH).backward()
            loss += part_loss.detach() / GRADIENT_BATCH
        optimizer.step()
        schedule.step()
        training.losses.append(round(float(loss), 4))
        if step % max(steps // 10, 1) == 0:
            training.errors[step] = test_error(model, *digits.test.tensors)
    return training


@torch.no_grad()
def test_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of wrong answers in evaluation mode."""
    model.eval()
    wrong = (model(images.to(device())).argmax(1) != labels.to(device())).float().mean()
    model.train()
    return round(100 * float(wrong), 2)


def measure(run: Run) -> list[Row]:
    """Train every setting on a few seeds; keep each setting's first curves.

    The spread is the range of the seeds.
    """
    seeds, steps = (1, 2) if run.quick else (5, 400)
    digits = [Digits.load(seed) for seed in range(seeds)]
    work = f"test error on digits, {steps} steps, {seeds} seeds"
    measured = []
    for table, settings in TABLES.items():
        curves = {}
        for setting in settings:
            trained = [
                train(setting, data, steps=steps, seed=seed) for seed, data in enumerate(digits)
            ]
            errors = [training.error for training in trained]
            what = f"{setting.name}, batch {setting.batch}"
            summary = (statistics.median(errors), min(errors), max(errors))
            measured.append(Row(work, table, what, *summary, unit="%"))
            curves[what] = vars(trained[0])
        folder = run.folder / "curves"
        folder.mkdir(exist_ok=True)
        (folder / f"small_batch_{table}.json").write_text(json.dumps(curves))
    return measured


if __name__ == "__main__":
    command.main("small_batch")
