"""bnstats measure: the population statistics of a model's data, as a file of their own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnstats import measure_population_stats
from bnstats.cli import measuring
from bnstats.cli.callables import find
from bnstats.cli.checkpoints import Checkpoint
from bnstats.formatting import counted
from bnstats.recomputation.drift import table


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "measure",
        help="write a model's population statistics, and no checkpoint",
        description=__doc__,
        epilog=measuring.EPILOG.format(
            command="measure", options="--checkpoint in.pt --output stats.npz"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measuring.add_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="IN",
        help="loaded into the model; default: the model as MODEL returns it",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="NPZ", help="where the statistics go"
    )
    measuring.add_checkpoint_arguments(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Load, measure, write, and print how far the model's running statistics are."""
    measuring.check_targets(options, "output")
    device = measuring.device_of(options)
    checkpoint = options.checkpoint and Checkpoint.load(
        options.checkpoint, options.key, options.strip_prefix
    )
    with measuring.processes(device) as rank:
        model = measuring.make_model(options)
        if checkpoint:
            checkpoint.load_into(model, options.model)
        stats = measure_population_stats(
            model.to(device), find(options.loader, "LOADER")(),
            **measuring.measurement(options, rank),
        )  # fmt: skip
        if rank > 0:
            return
        stats.save(options.output)
    print(f"{counted(len(stats), 'BatchNorm layer')} measured, method {stats.method!r}\n")
    print(table(stats, stats.drift_from(model)))
    print(f"\nwritten to {options.output}")
