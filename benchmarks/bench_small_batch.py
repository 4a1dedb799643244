"""Digits with normalization over 32, 4 and 2 samples: BatchNorm against moving averages.

The gradient batch is 32 for all: it is normalized in parts of the normalization batch, each
with a forward and a backward of its own, whose gradients add up to one optimizer step. A
layer's windows and running averages move once per part.

Run with ``python -m benchmarks.bench_small_batch [--quick] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnstats import (
    CenteredConv2d,
    CenteredLinear,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
)
from bnstats.cli.digits import Digits

GRADIENT_BATCH = 32
LEARNING_RATE = 0.1


def mlp(norm: Callable[[int], nn.Module], linear: type[nn.Linear]) -> nn.Sequential:
    """Return a 64-128-128-128-128-10 net, normalized before each ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 128, 128, 128):
        layers += [linear(inputs, 128, bias=False), norm(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


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


def settings(kind: str) -> list[Setting]:
    """Return the rows for the MLP or the convolutional net."""
    if kind == "mlp":
        build, plain, layer = mlp, nn.BatchNorm1d, MovingAverageBatchNorm1d
        before, centered = nn.Linear, CenteredLinear
    else:
        build, plain, layer = conv_net, nn.BatchNorm2d, MovingAverageBatchNorm2d
        before, centered = nn.Conv2d, CenteredConv2d

    def moving_average(batch: int, window: int, **options: int) -> Setting:
        name = f"moving average, window {window}"
        name += "".join(f", {key} {value}" for key, value in options.items())

        def norm(channels: int) -> nn.Module:
            return layer(channels, window=window, **{"warmup": 100, **options})

        return Setting(name, batch, lambda: build(norm, centered))

    return [
        *(Setting("BatchNorm", batch, lambda: build(plain, before)) for batch in (32, 4, 2)),
        moving_average(4, 8),
        moving_average(2, 16),
    ]


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


def main(quick: bool = False, output: Path | None = None) -> dict[str, list[Run]]:
    """Print a table of test errors, and return the runs."""
    seeds, steps = (1, 60) if quick else (5, 400)
    results = {}
    for kind in ("mlp", "conv"):
        print(f"\n{kind}, {steps} steps, {seeds} seeds: test error in %, median (range)")
        print("| normalization | batch | test error |")
        print("| --- | --- | --- |")
        for setting in settings(kind):
            runs = [
                train(setting, Digits.load(seed), steps=steps, seed=seed) for seed in range(seeds)
            ]
            errors = [run.error for run in runs]
            spread = f"{statistics.median(errors):.1f} ({min(errors):.1f} to {max(errors):.1f})"
            print(f"| {setting.name} | {setting.batch} | {spread} |", flush=True)
            results[f"{kind}, {setting.name}, {setting.batch}"] = runs
    if output is not None:
        curves = {name: [vars(run) for run in runs] for name, runs in results.items()}
        output.write_text(json.dumps(curves))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--json", type=Path, help="where the curves go")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.json)
