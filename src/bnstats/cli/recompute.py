"""bnstats recompute: a checkpoint with the population statistics of its data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnstats import recompute_population_stats
from bnstats.cli import measuring
from bnstats.cli.callables import find
from bnstats.cli.checkpoints import Checkpoint


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "recompute",
        help="replace a checkpoint's running statistics by the population's",
        description=__doc__,
        epilog=measuring.EPILOG.format(
            command="recompute", options="--checkpoint in.pt --output out.pt"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measuring.add_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="IN", help="loaded into the model"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="the same checkpoint with the new statistics; may be IN with --overwrite",
    )
    parser.add_argument(
        "--stats", type=Path, metavar="NPZ", help="where the statistics go too, as a file of theirs"
    )
    measuring.add_checkpoint_arguments(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Load, measure, write, print."""
    measuring.check_targets(options, "output", "stats", may_replace="output")
    device = measuring.device_of(options)
    checkpoint = Checkpoint.load(options.checkpoint, options.key, options.strip_prefix)
    with measuring.processes(device) as rank:
        model = measuring.make_model(options)
        checkpoint = checkpoint.load_into(model, options.model)
        result = recompute_population_stats(
            model.to(device), find(options.loader, "LOADER")(),
            **measuring.measurement(options, rank),
        )  # fmt: skip
        if rank > 0:
            return
        checkpoint.replace(result.after, model)
        stats = options.stats
        # The checkpoint takes its place when the statistics have taken theirs.
        checkpoint.save(options.output, lambda: result.after.save(stats) if stats else None)
    print(result)
    print(f"\nwritten to {options.output}")
    if checkpoint.others:
        print(f"of {options.checkpoint}, the state dict under {checkpoint.key!r}; as they were: "
              + ", ".join(map(repr, checkpoint.others)))  # fmt: skip
