"""Masked layers: their cost, and a sequence model on digits of uneven lengths.

An image's rows are its time steps, of which a random number is kept. Batches are padded to four
times the longest sequence. The convolutions' inputs are 0 in padding, and the average before the
classifier is over valid steps, for all three ways to train: layers that take the mask, plain
layers, and plain layers on batches of one length, which need no padding.
"""

from __future__ import annotations

import itertools
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnstats
from benchmarks import command
from benchmarks.machine import device
from benchmarks.rows import Row, Run
from benchmarks.workloads import TRAINING_PASSES, Shape, Work, compare_layers, forward_backward
from bnstats.cli.digits import Digits

SHAPE = (32, 256, 200)
AT_MOST = 1.3
TORCH, MASKED = "nn.BatchNorm1d", "EMABatchNorm1d, half of it padding"

BATCH, STEPS, SHORTEST, LONGEST, PADDED = 16, 400, 3, 8, 32
LEARNING_RATE = 0.1


class SequenceNet(nn.Module):
    """Three convolutions over time, a mean over valid steps, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 32, 32, 32)
        pairs = list(itertools.pairwise(widths))
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Classify sequences (N, 8, L), of which the valid steps (N, L) count."""
        inside = valid.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x * inside)))
        mean = (x * inside).sum(2) / inside.sum(2)
        return self.classifier(mean)


def measure(run: Run) -> list[Row]:
    """Time the layer, and train the model in each way."""
    return _timed(run) + _trained(run)


def _timed(run: Run) -> list[Row]:
    shape = run.shape(SHAPE)
    mask = torch.rand(shape[0], shape[2], device=device()) < 0.5
    return compare_layers(
        "forward and backward",
        shape,
        {
            TORCH: forward_backward(nn.BatchNorm1d(shape[1]), shape),
            MASKED: _masked(bnstats.EMABatchNorm1d(shape[1]), shape, mask),
        },
        TORCH,
        passes=TRAINING_PASSES,
        at_most={MASKED: AT_MOST},
        rounds=3 if run.quick else 200,
        calls=1 if run.quick else 10,
    )


def _masked(layer: nn.Module, shape: Shape, mask: Tensor) -> Work:
    layer.to(device())
    x = torch.randn(shape, device=device()).requires_grad_()
    grad, inputs = torch.randn_like(x), (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x, mask=mask), inputs, grad)


def _trained(run: Run) -> list[Row]:
    seeds, steps = (1, 2) if run.quick else (5, STEPS)
    work = f"test error on digits of {SHORTEST} to {LONGEST} rows, {steps} steps, {seeds} seeds"
    measured = []
    for what, train in {
        "plain layers, padded": partial(_train, padded=PADDED),
        "plain layers, batches of one length": partial(_train, padded=None),
        "masked layers, padded": partial(_train, padded=PADDED, masked=True),
    }.items():
        errors = [train(seed, steps) for seed in range(seeds)]
        summary = (statistics.median(errors), min(errors), max(errors))
        measured.append(Row(work, f"batch {BATCH}", what, *summary, unit="%"))
    return measured


def _train(seed: int, steps: int, *, padded: int | None, masked: bool = False) -> float:
    """Train a model, and return its test error in %."""
    torch.manual_seed(seed)
    model = SequenceNet().to(device())
    if masked:
        bnstats.convert_batchnorm(model, "ema")
    digits, order = Digits.load(seed), torch.Generator().manual_seed(seed)
    images, labels = digits.train.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=order)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH,), generator=order)
        if padded is None:
            lengths[:] = lengths[0]
        x, valid = _sequences(images[chosen], lengths, padded or int(lengths[0]))
        optimizer.zero_grad()
        if masked:
            with bnstats.masked(model, valid):
                output = model(x, valid)
        else:
            output = model(x, valid)
        F.cross_entropy(output, labels[chosen].to(device())).backward()
        optimizer.step()
        schedule.step()
    return _test_error(model, digits, torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def _test_error(model: nn.Module, digits: Digits, order: torch.Generator) -> float:
    images, labels = digits.test.tensors
    lengths = torch.randint(SHORTEST, LONGEST + 1, (len(images),), generator=order)
    x, valid = _sequences(images, lengths, LONGEST)
    answers = model.eval()(x, valid).argmax(1).cpu()
    return round(100 * float((answers != labels).float().mean()), 2)


def _sequences(images: Tensor, lengths: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """Return rows as time steps, (N, 8, padded), of which this many of each are valid."""
    x = images.reshape(-1, 8, 8).transpose(1, 2)[..., :padded]
    x = F.pad(x, (0, padded - x.shape[2]))
    valid = torch.arange(padded) < lengths[:, None]
    return (x * valid.unsqueeze(1)).to(device()), valid.to(device())


if __name__ == "__main__":
    command.main("masks")
