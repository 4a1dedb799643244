"""bnstats check: find faults in a checkpoint's batch-norm statistics, without data.

The exit status is 1 if a layer was never updated, or has statistics that are negative or not
finite: evaluation would be wrong. The rest are notes: channels whose variance is below eps, which
evaluation then divides by, and statistics that a float16 layer could not hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnstats import RunningStats
from bnstats.cli.checkpoints import Checkpoint
from bnstats.cli.measuring import KEY_HELP
from bnstats.errors import InvalidValueError
from bnstats.formatting import counted


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="find broken statistics in a checkpoint, without data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint's file")
    parser.add_argument("--key", help=KEY_HELP)
    parser.add_argument(
        "--eps", type=float, default=1e-5, help="that of the model's layers (default: %(default)s)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Print a line for every finding; return 1 if evaluation would be wrong."""
    checkpoint = Checkpoint.load(options.checkpoint, options.key)
    layers = checkpoint.running_stats()
    if not layers:
        raise InvalidValueError(f"{options.checkpoint} has no running statistics of any layer")
    under = f", under {checkpoint.key!r}" if checkpoint.key else ""
    print(f"{counted(len(layers), 'BatchNorm layer')} in {options.checkpoint}{under}")
    wrong = notes = 0
    for name, running in layers.items():
        prefix = f"{name}." if name else ""
        tracked = checkpoint.state.get(f"{prefix}num_batches_tracked")
        mistakes = list(_mistakes(running, tracked))
        remarks = list(_remarks(running, options.eps))
        wrong, notes = wrong + bool(mistakes), notes + bool(remarks)
        for finding in mistakes:
            print(f"  WRONG  {name}: {finding}")
        for finding in remarks:
            print(f"  note   {name}: {finding}")
    print(f"{wrong} of them wrong, {notes} with a note")
    if checkpoint.others:
        print("not looked at: " + ", ".join(map(repr, checkpoint.others)) + "; pass --key")
    return int(wrong > 0)


def _mistakes(running: RunningStats, tracked: object) -> Iterator[str]:
    mean, var = running
    initial = bool((mean == 0).all() and (var == 1).all())
    if isinstance(tracked, Tensor) and tracked.numel() == 1 and not tracked.item():
        # Statistics may have been written without a training: only the initial ones are wrong.
        if initial:
            yield "never updated: num_batches_tracked is 0, every mean 0 and every variance 1"
    elif initial:
        yield "never updated: every mean is 0 and every variance 1"
    if bad := _count(~(mean.isfinite() & var.isfinite())):
        yield f"NaN or infinity in {bad} of {mean.numel()} channels"
    if bad := _count(var < 0):
        yield f"negative variance in {bad} of {var.numel()} channels, down to {var.min():.3g}"


def _remarks(running: RunningStats, eps: float) -> Iterator[str]:
    mean, var = running
    if small := _count((var >= 0) & (var < eps)):
        yield (
            f"variance below eps={eps:g} in {small} of {var.numel()} channels, down to "
            f"{var[var >= 0].min():.3g}: eps decides what they are divided by"
        )
    largest = torch.finfo(torch.float16).max
    beyond = (mean.abs() > largest) | (var > largest)
    if large := _count(beyond & mean.isfinite() & var.isfinite()):
        yield (
            f"beyond float16 (up to {largest:g}) in {large} of {var.numel()} channels: keep this "
            "layer in float32, and the model under autocast"
        )


def _count(where: Tensor) -> int:
    return int(where.sum())
